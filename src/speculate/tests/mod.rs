//! Every product against an oracle that is written the obvious way.

mod basis;
mod moments;
mod prompt;
mod ridge;

/// Normal-like values from a fixed seed: sums of uniform ones.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    use rand_core::{RngCore, SeedableRng};
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || f64::from(random.next_u32()) / f64::from(u32::MAX) - 0.5;
    (0..count).map(|_| (0..4).map(|_| uniform()).sum::<f64>() as f32).collect()
}
