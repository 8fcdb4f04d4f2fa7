//! The choice between the downloaded PostgreSQL and an installed one.

use std::path::Path;

use crate::{
    App, Error, download,
    installation::{Installation, OLDEST_MAJOR},
};

/// Returns a PostgreSQL, and downloads one if necessary. `existing` are the major versions
/// that have a cluster: one of them is used if possible, so that the data stays in use.
pub(crate) async fn find(
    app: &App,
    cache_dir: &Path,
    existing: &[u32],
) -> Result<Installation, Error> {
    if !existing.is_empty() && !download::is_one_of(existing) {
        let installed = Installation::all(cache_dir, existing).await;
        if let Some(same) = installed.into_iter().find(|it| existing.contains(&it.major)) {
            let bin_dir = same.bin_dir.display();
            tracing::info!(%bin_dir, "using the PostgreSQL version of the existing data");
            return Ok(same);
        }
        tracing::warn!(
            versions = ?existing,
            "no matching PostgreSQL for the existing data, creating a new data directory"
        );
    }
    let reason = match download::get(app, cache_dir).await {
        Ok(downloaded) => return Ok(downloaded),
        Err(reason) => reason,
    };
    match Installation::all(cache_dir, existing).await.into_iter().next() {
        Some(best) => {
            let bin_dir = best.bin_dir.display();
            tracing::warn!(reason, %bin_dir, "download failed, using the installed PostgreSQL");
            Ok(best)
        }
        None => Err(Error::PostgresUnavailable {
            reason,
            oldest_major: OLDEST_MAJOR,
            alternative: app.alternative,
        }),
    }
}
