//! The one line that the log has of each call.

use std::{sync::Arc, time::Instant};

use tonic::Code;

use crate::{
    metrics::{self, Counted, Method},
    traces::CallTrace,
};

/// The longest name of a method that is logged, in bytes.
const MAX_METHOD_LENGTH: usize = 128;

/// What the log calls a method. The path of one that does not exist may be as long as the
/// caller likes.
pub(super) fn method_name(path: &str) -> &str {
    let name = path.strip_prefix('/').unwrap_or(path);
    &name[..name.floor_char_boundary(MAX_METHOD_LENGTH)]
}

/// Writes the call's line, counts it and ends its span when it ends, whichever way: a caller
/// that goes away drops it.
pub(super) struct CallLog {
    begun: Instant,
    of_probe: bool,
    method: Arc<Method>,
    trace: CallTrace,
    /// How it ended: until that is known, by the caller's going away.
    pub(super) code: Code,
    _in_flight: Counted,
}

impl CallLog {
    pub(super) fn begin(
        of_probe: bool,
        method: Arc<Method>,
        trace: CallTrace,
        in_flight: Counted,
    ) -> Self {
        let (begun, code) = (Instant::now(), Code::Cancelled);
        Self { begun, of_probe, method, trace, code, _in_flight: in_flight }
    }
}

impl Drop for CallLog {
    fn drop(&mut self) {
        let duration = self.begun.elapsed();
        let duration_ms = duration.as_secs_f64() * 1_000.0;
        self.method.count(self.code, duration);
        self.trace.end(self.code);
        let code = metrics::code_name(self.code);
        // Probes come every few seconds, for ever.
        if self.of_probe {
            tracing::debug!(code, duration_ms, "call");
        } else {
            tracing::info!(code, duration_ms, "call");
        }
    }
}
