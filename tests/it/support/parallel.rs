//! Concurrent calls.

use tokio::task::JoinSet;

/// Runs all calls concurrently, and returns their results in the order of completion.
pub async fn join_all<F>(calls: impl IntoIterator<Item = F>) -> Vec<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    calls.into_iter().collect::<JoinSet<_>>().join_all().await
}
