//! Randomness that can be repeated.

use std::env;

/// The seed of a test: from the variable `TEST_SEED`, or always the same. What happens at
/// the same time is decided by the machine all the same.
pub fn seed() -> u64 {
    let seed = env::var("TEST_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    println!("TEST_SEED={seed}");
    seed
}
