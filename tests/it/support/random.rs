//! Reproducible randomness.

use std::env;

/// Returns the seed of a test: the variable `TEST_SEED`, or a fixed one. The order of
/// concurrent operations still depends on the machine.
pub fn seed() -> u64 {
    let seed = env::var("TEST_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    println!("TEST_SEED={seed}");
    seed
}
