//! `SyncTodos` and `WatchTodos` of `fastzero.todo.v1.TodoService`.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use tonic::{Status, codegen::tokio_stream::Stream};

use super::{
    Change, ChangePage, StartAt,
    cursor::{ChangeCursor, CursorCodec},
    hub::WatchHub,
    store::{ChangeStore, PageLimits},
    watch::Watch,
};
use crate::{
    database::Database,
    rpc::{
        error::Error,
        open_stream::OpenStream,
        page_token::parse_size,
        proto::todo::v1::{self as pb, todo_change},
        validation::FieldViolations,
    },
    types::id::UserId,
};

/// The two methods that follow changes.
#[derive(Debug)]
pub(crate) struct ChangeService {
    store: ChangeStore,
    cursors: CursorCodec,
    hub: WatchHub,
}

impl ChangeService {
    /// Creates the service, and starts the polls of its watches.
    pub(crate) fn new(database: Database, cursors: CursorCodec, hub: WatchHub) -> Self {
        let store = ChangeStore::new(database);
        hub.start(store.clone());
        Self { store, cursors, hub }
    }

    pub(in crate::todo) async fn sync(
        &self,
        owner_id: UserId,
        request: pb::SyncTodosRequest,
    ) -> Result<pb::SyncTodosResponse, Error> {
        let mut violations = FieldViolations::default();
        let size = violations.check("page_size", parse_size(request.page_size));
        let cursor = match self.cursors.decode(&request.cursor, owner_id, self.store.now()) {
            Err(Error::InvalidRequest(invalid)) => {
                violations.extend(invalid);
                None
            }
            // Reported only if the request is valid.
            decoded => Some(decoded),
        };
        let (size, cursor) = violations.finish(|| size.zip(cursor))?;
        let start = cursor?.map_or(StartAt::Beginning, StartAt::Cursor);
        let page = self.store.read(owner_id, start, PageLimits::response(size), ()).await?;
        let ChangePage { changes, cursor, caught_up, full } = page;
        Ok(pb::SyncTodosResponse {
            changes: changes.into_iter().map(pb::TodoChange::from).collect(),
            cursor: self.cursors.encode(&cursor, owner_id),
            caught_up,
            full,
        })
    }

    pub(in crate::todo) fn watch(
        &self,
        owner_id: UserId,
        request: &pb::WatchTodosRequest,
        stream: OpenStream,
    ) -> Result<WatchMessages, Error> {
        let start = match self.cursors.decode(&request.cursor, owner_id, self.store.now())? {
            Some(cursor) => StartAt::Cursor(cursor),
            None if request.from_now => StartAt::Present,
            None => StartAt::Beginning,
        };
        let watch = Watch::new(owner_id, self.store.clone(), self.hub.watch(owner_id)?, start);
        let encoder = Encoder { cursors: self.cursors.clone(), owner_id, stream };
        Ok(WatchMessages { step: Some(Box::pin(step(watch))), encoder })
    }
}

type Step = Pin<Box<dyn Future<Output = (Watch, Result<ChangePage, Error>)> + Send>>;

async fn step(mut watch: Watch) -> (Watch, Result<ChangePage, Error>) {
    let page = watch.next().await;
    (watch, page)
}

/// The messages of a watch. They go through [`OpenStream`], whose body polls for the next one when
/// HTTP/2 has taken the one before. As a stream, it only has the error at the end.
pub(crate) struct WatchMessages {
    /// `None` after the end.
    step: Option<Step>,
    encoder: Encoder,
}

impl Stream for WatchMessages {
    type Item = Result<pb::WatchTodosResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(next) = &mut self.step else {
            return Poll::Ready(None);
        };
        let (watch, page) = ready!(next.as_mut().poll(context));
        match page {
            Ok(page) => {
                self.step = Some(Box::pin(step(watch)));
                self.encoder.send(page);
                Poll::Pending
            }
            Err(error) => {
                self.step = None;
                self.encoder.end(&error);
                Poll::Ready(Some(Err(error.into())))
            }
        }
    }
}

/// Makes messages of pages.
struct Encoder {
    cursors: CursorCodec,
    owner_id: UserId,
    stream: OpenStream,
}

impl Encoder {
    fn send(&self, page: ChangePage) {
        let ChangePage { changes, cursor, caught_up, full } = page;
        let message = pb::WatchTodosResponse {
            changes: changes.into_iter().map(pb::TodoChange::from).collect(),
            cursor: self.cursors.encode(&cursor, self.owner_id),
            caught_up,
            full,
        };
        let last = last_message(&message, &cursor);
        self.stream.send(&message, message.changes.len(), &last);
    }

    /// Ends the stream with an error of its own.
    fn end(&self, error: &Error) {
        self.stream.set_reason(error);
        if matches!(error, Error::CursorExpired(_)) {
            self.stream.clear_last_message();
        }
    }
}

/// Returns the message that ends a stream after this one. Nothing was read for it, so it does not
/// say that there are no changes.
fn last_message(message: &pb::WatchTodosResponse, cursor: &ChangeCursor) -> pb::WatchTodosResponse {
    pb::WatchTodosResponse {
        changes: Vec::new(),
        cursor: message.cursor.clone(),
        caught_up: false,
        full: cursor.full,
    }
}

impl From<Change> for pb::TodoChange {
    fn from(change: Change) -> Self {
        let change = match change {
            Change::Todo(todo) => todo_change::Change::Todo(todo.into()),
            Change::Deleted(deleted) => todo_change::Change::Deleted(deleted.into()),
        };
        Self { change: Some(change) }
    }
}
