//! Random differences, so that connections and replicas do not act at the same time.

use std::time::Duration;

/// Returns a duration that differs by up to a tenth.
#[must_use]
pub fn with_jitter(duration: Duration) -> Duration {
    // The last bits of a UUIDv7 are random.
    let (_, random) = uuid::Uuid::now_v7().as_u64_pair();
    let random = u16::try_from(random & 0xffff).unwrap_or_default();
    duration.mul_f64(0.9 + 0.2 * f64::from(random) / 65_535.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_jitter_is_at_most_a_tenth() {
        for _ in 0..100 {
            let age = with_jitter(Duration::from_secs(100)).as_secs_f64();
            assert!((90.0..=110.0).contains(&age), "{age}");
        }
    }
}
