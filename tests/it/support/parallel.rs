//! Many calls at a time.

use tokio::task::JoinSet;

/// Makes all calls at once, and gives their answers in the order in which they came.
pub async fn at_once<F>(calls: impl IntoIterator<Item = F>) -> Vec<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    calls.into_iter().collect::<JoinSet<_>>().join_all().await
}
