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
        let page = self.store.read(owner_id, start, PageLimits::response(size)).await?;
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
        Ok(WatchMessages { next: Next::Step(Box::pin(step(watch))), encoder })
    }
}

/// The next message.
enum Next {
    /// The last one is not sent yet. tonic polls for the next one at once, to send both together.
    AfterSent(Watch),
    Step(Step),
    None,
}

type Step = Pin<Box<dyn Future<Output = (Watch, Result<ChangePage, Error>)> + Send>>;

async fn step(mut watch: Watch) -> (Watch, Result<ChangePage, Error>) {
    let page = watch.next().await;
    (watch, page)
}

/// The messages of a watch. Each is read when the client has taken the one before.
pub(crate) struct WatchMessages {
    next: Next,
    encoder: Encoder,
}

impl Stream for WatchMessages {
    type Item = Result<pb::WatchTodosResponse, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let polled = match &mut self.next {
            Next::Step(step) => step.as_mut().poll(context),
            Next::None => return Poll::Ready(None),
            Next::AfterSent(_) => {
                if let Next::AfterSent(watch) = std::mem::replace(&mut self.next, Next::None) {
                    self.next = Next::Step(Box::pin(step(watch)));
                }
                // HTTP/2 polls again when it can send.
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
        };
        let (watch, page) = ready!(polled);
        self.next = Next::None;
        Poll::Ready(Some(match page {
            Ok(page) => {
                self.next = Next::AfterSent(watch);
                Ok(self.encoder.encode(page))
            }
            Err(error) => {
                self.encoder.end(&error);
                Err(error.into())
            }
        }))
    }
}

/// Makes messages of pages.
struct Encoder {
    cursors: CursorCodec,
    owner_id: UserId,
    stream: OpenStream,
}

impl Encoder {
    fn encode(&self, page: ChangePage) -> pb::WatchTodosResponse {
        let ChangePage { changes, cursor, caught_up, full } = page;
        let message = pb::WatchTodosResponse {
            changes: changes.into_iter().map(pb::TodoChange::from).collect(),
            cursor: self.cursors.encode(&cursor, self.owner_id),
            caught_up,
            full,
        };
        let last = last_message(&message, &cursor);
        self.stream.record(&message, message.changes.len(), &last);
        message
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
