//! Follows the todos of a user: keeps a copy of them in step with the server, in a file.
//!
//! Two parts are meant to be copied: [`Copy`] stores the todos and the cursor, and [`follow`]
//! watches, resumes and reconnects.

use std::{
    collections::{BTreeMap, HashSet},
    convert::Infallible,
    env, fs, io,
    path::Path,
    process::ExitCode,
    time::Duration,
};

use fast_zero_example::{
    Session, exit_code, is_refreshable,
    proto::fastzero::todo::v1::{
        Todo, WatchTodosRequest, WatchTodosResponse, todo_change::Change,
        todo_service_client::TodoServiceClient,
    },
    reason, retry_delay,
};
use prost::Message;
use tokio::time::{sleep, timeout};
use tonic::{Code, Request, Status, Streaming};
use tower::BoxError;

/// The delay before a watch doubles with each failure in a row, up to the maximum.
const INITIAL_BACKOFF: Duration = Duration::from_millis(500);
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// How long a watch may be silent. The server sends a message at least every 33 seconds, so a
/// longer silence means that the network has lost the connection without a word.
const MAX_SILENCE: Duration = Duration::from_mins(1);

/// The todos and the cursor, in one file: a write of the file changes them together. A client with
/// many todos stores both in a database instead, and changes them in one transaction.
///
/// A copy is of one user.
#[derive(Clone, PartialEq, Message)]
struct Copy {
    /// The position in the changes of the user. Empty before a full sync.
    #[prost(string, tag = "1")]
    cursor: String,
    #[prost(btree_map = "string, message", tag = "2")]
    todos: BTreeMap<String, Todo>,
    /// The IDs that the full sync in progress has contained.
    #[prost(string, repeated, tag = "3")]
    seen: Vec<String>,
}

impl Copy {
    /// Reads the copy. Returns an empty one if there is no file.
    fn load(path: &Path) -> io::Result<Self> {
        match fs::read(path) {
            Ok(bytes) => Ok(Self::decode(&*bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        }
    }

    /// Replaces the file. A crash of the program leaves the old file or the new one.
    fn store(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("new");
        fs::write(&new, self.encode_to_vec())?;
        fs::rename(new, path)
    }

    /// Applies a message of WatchTodos. SyncTodos returns the same fields. A repetition is
    /// harmless.
    fn apply(&mut self, message: &WatchTodosResponse) {
        if message.full && self.cursor.is_empty() {
            // A full sync starts: mark.
            self.seen.clear();
        }
        for change in &message.changes {
            match &change.change {
                Some(Change::Todo(todo)) => {
                    self.todos.insert(todo.id.clone(), todo.clone());
                    if message.full {
                        self.seen.push(todo.id.clone());
                    }
                }
                Some(Change::Deleted(deleted)) => {
                    let id = deleted.todo.as_ref().map_or("", |todo| &todo.id);
                    self.todos.remove(id);
                }
                None => {}
            }
        }
        if message.full && message.caught_up {
            // The full sync ends: sweep. A client that also creates todos must not remove those
            // that it has not sent to the server yet.
            let seen: HashSet<_> = self.seen.drain(..).collect();
            self.todos.retain(|id, _| seen.contains(id));
        }
        self.cursor.clone_from(&message.cursor);
    }
}

/// Opens a watch from the cursor.
async fn open(
    session: &Session,
    access_token: &str,
    cursor: &str,
) -> Result<Streaming<WatchTodosResponse>, BoxError> {
    let message = WatchTodosRequest { cursor: cursor.to_owned(), from_now: false };
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {access_token}").parse()?);
    let mut todos = TodoServiceClient::new(session.channel());
    Ok(unless_silent(todos.watch_todos(request)).await?.into_inner())
}

/// Waits for the next message.
async fn next(stream: &mut Streaming<WatchTodosResponse>) -> Result<WatchTodosResponse, Status> {
    let message = unless_silent(stream.message()).await?;
    message.ok_or_else(|| Status::unavailable("the stream has ended without an error"))
}

async fn unless_silent<T>(event: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    let silence = |_| Err(Status::unavailable("the server is silent"));
    timeout(MAX_SILENCE, event).await.unwrap_or_else(silence)
}

/// Keeps the copy in step. Returns only with an error that a retry does not cure.
async fn follow(session: &Session, path: &Path) -> Result<Infallible, BoxError> {
    let mut copy = Copy::load(path)?;
    let (mut rejected, mut backoff) = (None, INITIAL_BACKOFF);
    // Whether a watch has failed with TOKEN_INVALID since the last message.
    let mut was_invalid = false;
    loop {
        let mut access_token = String::new();
        let mut watch = async || -> Result<Infallible, BoxError> {
            access_token = session.access_token(rejected.as_deref()).await?;
            let mut stream = open(session, &access_token, &copy.cursor).await?;
            loop {
                let message = next(&mut stream).await?;
                copy.apply(&message);
                copy.store(path)?;
                show(&message, &copy);
                backoff = INITIAL_BACKOFF;
                was_invalid = false;
            }
        };
        let Err(error) = watch().await;
        // Another error concerns the file.
        let status = *error.downcast::<Status>()?;
        let reason = reason(&status);
        println!("watch ended: {:?} {reason}", status.code());
        let is_invalid = reason == "TOKEN_INVALID";
        match status.code() {
            _ if reason == "CURSOR_EXPIRED" => copy.cursor.clear(),
            // A refresh did not help.
            _ if is_invalid && was_invalid => return Err(status.into()),
            _ if is_refreshable(&reason) => {
                rejected = Some(access_token);
                was_invalid |= is_invalid;
            }
            // A watch changes nothing, so it is safe to retry after all other errors.
            Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::Unimplemented => return Err(status.into()),
            _ => {}
        }
        let retry_delay = retry_delay(&status).unwrap_or_default();
        sleep(retry_delay + backoff.mul_f64(fastrand::f64())).await;
        backoff = (2 * backoff).min(MAX_BACKOFF);
    }
}

/// Prints the changes of a message, and the copy if it has caught up.
fn show(message: &WatchTodosResponse, copy: &Copy) {
    if message.full {
        println!("full sync");
    }
    for change in &message.changes {
        match &change.change {
            Some(Change::Todo(todo)) => println!("changed: {}", todo.title),
            Some(Change::Deleted(deleted)) => {
                println!("deleted: {}", deleted.todo.as_ref().map_or("", |todo| &todo.title));
            }
            None => {}
        }
    }
    if message.caught_up {
        println!("caught up: {} todos", copy.todos.len());
        for todo in copy.todos.values() {
            println!("  {} {} {}", todo.etag, todo.state().as_str_name(), todo.title);
        }
    }
}

async fn run() -> Result<(), BoxError> {
    let path = env::var_os("FASTZERO_COPY").unwrap_or_else(|| "todos.copy".into());
    match follow(&*Session::open().await?, Path::new(&path)).await? {}
}

#[tokio::main]
async fn main() -> ExitCode {
    exit_code(run().await)
}
