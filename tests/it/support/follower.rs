//! A client that follows changes, and resumes a watch that ends at its cursor.

use std::time::Duration;

use fast_zero::proto::todo::v1::WatchTodosRequest;
use tokio::time::sleep;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{Client, changes::Copy, wait::with_timeout};

/// The pause before a call that found no replica is made again.
const PAUSE: Duration = Duration::from_millis(50);

/// What a client has followed.
pub struct Followed {
    pub copy: Copy,
    /// How its watches have ended.
    pub ends: Vec<Status>,
    /// Full syncs, of which the first watch is one.
    pub full_syncs: usize,
}

impl Followed {
    /// Returns how many watches ended with this reason.
    pub fn ends_with_reason(&self, reason: &str) -> usize {
        let has_reason = |status: &&Status| reason_of(status).as_deref() == Some(reason);
        self.ends.iter().filter(has_reason).count()
    }
}

fn reason_of(status: &Status) -> Option<String> {
    status.get_error_details().error_info().map(|info| info.reason.clone())
}

/// Follows the changes until the copy contains a todo with this title.
pub async fn follow(client: Client, last: &str) -> Followed {
    let mut followed = Followed { copy: Copy::default(), ends: Vec::new(), full_syncs: 0 };
    loop {
        let request = WatchTodosRequest { cursor: followed.copy.cursor.clone(), ..<_>::default() };
        let mut stream = match client.try_watch_todos(request).await {
            Ok(stream) => stream.into_inner(),
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                sleep(PAUSE).await;
                continue;
            }
        };
        let status = loop {
            match with_timeout("a message", stream.message()).await {
                Ok(Some(message)) => {
                    followed.full_syncs += usize::from(message.full && message.caught_up);
                    followed.copy.apply(message);
                    if followed.copy.todos.values().any(|todo| todo.title == last) {
                        return followed;
                    }
                }
                Ok(None) => panic!("a watch ends with an error"),
                Err(status) => break status,
            }
        };
        let retry = status.get_error_details().retry_info().and_then(|info| info.retry_delay);
        followed.ends.push(status);
        sleep(retry.unwrap_or(PAUSE)).await;
    }
}
