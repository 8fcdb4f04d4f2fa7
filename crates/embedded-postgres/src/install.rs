//! The choice between the downloaded PostgreSQL and an installed one.

use std::path::Path;

use crate::{
    App, Error, download,
    installation::{Installation, OLDEST_MAJOR},
    layout,
};

/// Returns a PostgreSQL for a data directory, and downloads one if necessary. A directory with
/// clusters needs one of their major versions: with another, the application would start without
/// its data.
pub(crate) async fn find(
    app: &App,
    cache_dir: &Path,
    data_dir: &Path,
) -> Result<Installation, Error> {
    let existing = layout::major_versions(data_dir);
    let fits = |major| existing.is_empty() || existing.contains(&major);
    let mut reason = None;
    if fits(download::MAJOR) {
        match download::get(app, cache_dir).await {
            Ok(downloaded) => return Ok(downloaded),
            Err(error) => reason = Some(error),
        }
    }
    let installed = Installation::all(cache_dir, &existing).await;
    let Some(found) = installed.into_iter().find(|it| fits(it.major)) else {
        return Err(match reason {
            Some(reason) => Error::PostgresUnavailable {
                reason,
                oldest_major: OLDEST_MAJOR,
                alternative: app.alternative,
            },
            None => Error::DataOfOtherVersion {
                dir: data_dir.to_owned(),
                majors: existing,
                setting: app.data_dir_var,
            },
        });
    };
    let bin_dir = found.bin_dir.display();
    if let Some(reason) = reason {
        tracing::warn!(reason, %bin_dir, "download failed, using the installed PostgreSQL");
    } else {
        tracing::info!(%bin_dir, "using the PostgreSQL version of the existing data");
    }
    Ok(found)
}
