//! Jitter: spreads what replicas and clients would otherwise do at once.

use std::time::Duration;

/// Returns a random number from 0 to 1.
#[must_use]
pub fn random_fraction() -> f64 {
    // The last bits of a UUIDv7 are random.
    let (_, random) = uuid::Uuid::now_v7().as_u64_pair();
    let random = u16::try_from(random & 0xffff).unwrap_or_default();
    f64::from(random) / f64::from(u16::MAX)
}

/// Returns a duration that differs by up to a tenth.
#[must_use]
pub fn with_jitter(duration: Duration) -> Duration {
    duration.mul_f64(0.9 + 0.2 * random_fraction())
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
