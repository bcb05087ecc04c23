//! How partial keys lie in a run, and how they are quantized.
//!
//! A run is a row of blocks of sixteen tokens, [`block_bytes`] each. A block holds one 32-bit word a token for each group
//! of columns, sixteen tokens' words side by side (one vector), group after group, and then the tokens' sixteen scales.
//! A word is eight columns of four bits (bytes 0 to 3 hold columns 0 to 3 in their lower and 4 to 7 in their upper
//! halves), four columns of eight bits, or one f32. So one load feeds sixteen dot products, and no sum crosses lanes.
//!
//! Integers are stored with an offset that makes them unsigned, because the machine multiplies unsigned by signed bytes.

use crate::backend::{IndexBits, IndexGeometry};

/// Tokens of a block.
pub(super) const BLOCK: usize = 16;

/// Bytes that one word of each of a block's tokens takes.
pub(super) const GROUP_BYTES: usize = 4 * BLOCK;

/// What is added to an integer of four bits to store it.
pub(super) const OFFSET_FOUR: i32 = 8;
/// What is added to an integer of eight bits to store it.
pub(super) const OFFSET_EIGHT: i32 = 128;

/// Below this a row is zero: the reciprocal of its scale would overflow.
const TINY: f32 = 1e-30;

/// Bytes of a block: columns, then scales.
pub(super) fn block_bytes(geometry: &IndexGeometry) -> usize {
    BLOCK * (geometry.row_bytes() + 4)
}

/// Words of a row.
pub(super) fn words(geometry: &IndexGeometry) -> usize {
    geometry.row_bytes() / 4
}

/// Rounds to −levels..=levels with the returned scale: x ≈ scale · out. `out` may be longer than `x`; the rest is zero.
/// A row that holds anything not finite is zero with the scale NaN.
pub(super) fn quantize(x: &[f32], levels: f32, out: &mut [i8]) -> f32 {
    out.fill(0);
    let mut most = 0.0f32;
    let mut finite = true;
    for &x in x {
        finite &= x.is_finite();
        most = most.max(x.abs());
    }
    if !finite {
        return f32::NAN;
    }
    if most < TINY {
        return 0.0;
    }
    let inverse = levels / most;
    for (out, x) in out.iter_mut().zip(x) {
        *out = nearest(x * inverse) as i8;
    }
    most / levels
}

/// The nearest integer, ties to even, of |x| < 2²²: adding 1.5 · 2²³ leaves it in the lowest bits, without a library call.
fn nearest(x: f32) -> i32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT).to_bits() as i32 - SHIFT.to_bits() as i32
}

/// Stores one partial key in lane `lane` of a block. `integers` is scratch memory of `padded()` elements.
///
/// # Safety
/// `block` is writable for [`block_bytes`] bytes and aligned to 4, and nobody else uses lane `lane` of it.
pub(super) unsafe fn store(geometry: &IndexGeometry, key: &[f32], integers: &mut [i8], block: *mut u8, lane: usize) {
    assert!(key.len() == geometry.columns && integers.len() == geometry.padded() && lane < BLOCK);
    let words = words(geometry);
    let put = |at: usize, word: u32| {
        // SAFETY: at ≤ words: a word of one of the block's groups, or a scale behind them; the lane is the caller's.
        unsafe { block.cast::<u32>().add(at * BLOCK + lane).write(word) }
    };
    let scale = match geometry.bits {
        IndexBits::Four => {
            let scale = quantize(key, 7.0, integers);
            for (at, columns) in integers.chunks_exact(8).enumerate() {
                let half = |i: usize| (i32::from(columns[i]) + OFFSET_FOUR) as u32;
                put(at, (0..4).fold(0, |word, i| word | (half(i) | half(i + 4) << 4) << (8 * i)));
            }
            scale
        }
        IndexBits::Eight => {
            let scale = quantize(key, 127.0, integers);
            for (at, columns) in integers.chunks_exact(4).enumerate() {
                let byte = |i: usize| (i32::from(columns[i]) + OFFSET_EIGHT) as u32;
                put(at, (0..4).fold(0, |word, i| word | byte(i) << (8 * i)));
            }
            scale
        }
        IndexBits::Full => {
            for at in 0..words {
                put(at, key.get(at).copied().unwrap_or(0.0).to_bits());
            }
            1.0
        }
    };
    put(words, scale.to_bits());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantization_errs_by_half_a_step_at_most() {
        let mut random = super::super::super::tests::Random(7);
        for levels in [7.0, 127.0] {
            for n in [1, 5, 32, 61] {
                let x = random.normals(n);
                let mut out = vec![1i8; n + 3];
                let scale = quantize(&x, levels, &mut out);
                let most = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                assert!((scale - most / levels).abs() <= scale * 1e-6);
                for (&x, &q) in x.iter().zip(&out) {
                    assert!(f32::from(q).abs() <= levels);
                    assert!((f32::from(q) * scale - x).abs() <= scale * 0.5001, "{x} became {q} of {scale}");
                }
                assert_eq!(out[n..], [0; 3]);
            }
        }
    }

    #[test]
    fn zero_and_what_is_not_finite() {
        let mut out = [3i8; 2];
        assert_eq!((quantize(&[0.0, -0.0], 7.0, &mut out), out), (0.0, [0, 0]));
        assert_eq!((quantize(&[1e-40, 0.0], 127.0, &mut out), out), (0.0, [0, 0]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(quantize(&[1.0, bad], 7.0, &mut out).is_nan());
            assert_eq!(out, [0, 0]);
        }
    }
}
