//! Logits of a rehearsal, their normalisation, and a row's rank.
//!
//! Nothing here uses a fused multiply-add where bits decide on a selection: levels differ in whether they have one.

use super::super::simd::{Kernel, LANES, Simd};

/// Lane numbers.
const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];

/// Lanes `from..to` of `x`, the others `other`.
#[inline(always)]
fn within<S: Simd>(s: S, x: S::V, from: f32, to: f32, other: S::V) -> S::V {
    let lane = s.load_slice(&LANE);
    s.if_less(lane, s.splat(from), other, s.if_less(lane, s.splat(to), x, other))
}

/// Dot products of f32 columns with blocks: what [`super::dots::Dots`] is for integers.
pub(super) struct FloatDots {
    /// `columns` floats.
    pub query: *const f32,
    pub columns: usize,
    pub blocks: *const u8,
    pub count: usize,
    pub block_bytes: usize,
    /// Sixteen floats a block.
    pub out: *mut f32,
}

impl Kernel for FloatDots {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for i in 0..self.count {
            // SAFETY: whoever made this promises `count` blocks of `columns` vectors each, as many floats of the query,
            // and a vector a block to write to.
            unsafe {
                let block = self.blocks.add(i * self.block_bytes).cast::<f32>();
                let mut sum = s.zero();
                for c in 0..self.columns {
                    sum = s.fma(s.splat(self.query.add(c).read()), s.load(block.add(c * LANES)), sum);
                }
                s.store(self.out.add(i * LANES), sum);
            }
        }
    }
}

/// Turns dot products into logits in place: times the row's scale, times the query's. What is NaN becomes −∞, and so do
/// rows past the last. Returns the largest.
pub(super) struct Scale {
    pub scores: *mut f32,
    /// Scales of the first block's rows.
    pub scales: *const f32,
    pub block_bytes: usize,
    /// Rows.
    pub count: usize,
    /// Scale of the query and of the logits.
    pub factor: f32,
    /// The largest before these.
    pub largest: f32,
}

impl Kernel for Scale {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let never = s.splat(f32::NEG_INFINITY);
        let mut largest = s.splat(self.largest);
        for i in (0..self.count).step_by(LANES) {
            // SAFETY: whoever made this promises whole vectors of scores for `count` rows, and as many blocks.
            unsafe {
                let at = self.scores.add(i);
                let scale = s.load(self.scales.byte_add(i / LANES * self.block_bytes));
                let mut score = s.max(s.mul(s.mul(s.load(at), scale), s.splat(self.factor)), never);
                if i + LANES > self.count {
                    score = within(s, score, 0.0, (self.count - i) as f32, never);
                }
                s.store(at, score);
                largest = s.max(score, largest);
            }
        }
        s.largest(largest)
    }
}

/// Σ exp(score − shift) over whole vectors.
pub(super) struct SumExp<'a> {
    pub scores: &'a [f32],
    pub shift: f32,
}

impl Kernel for SumExp<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let shift = s.splat(self.shift);
        let mut sums = [s.zero(); 2];
        let mut pairs = self.scores.chunks_exact(2 * LANES);
        for pair in &mut pairs {
            sums[0] = s.add(sums[0], exp(s, s.sub(s.load_slice(pair), shift)));
            sums[1] = s.add(sums[1], exp(s, s.sub(s.load_slice(&pair[LANES..]), shift)));
        }
        if !pairs.remainder().is_empty() {
            sums[0] = s.add(sums[0], exp(s, s.sub(s.load_slice(pairs.remainder()), shift)));
        }
        s.sum(s.add(sums[0], sums[1]))
    }
}

/// eˣ for x ≤ 0 to 3·10⁻⁶, without fused multiply-adds; 2⁻¹²⁶ for −∞ and NaN.
///
/// eˣ = 2ⁿ · 2ᶠ with |f| ≤ ½, of which the Taylor series has six terms.
#[inline(always)]
fn exp<S: Simd>(s: S, x: S::V) -> S::V {
    let t = s.max(s.mul(x, s.splat(std::f32::consts::LOG2_E)), s.splat(-126.0));
    let n = s.round(t);
    let f = s.sub(t, n);
    let mut p = s.splat(1.333_355_8e-3);
    p = s.add(s.mul(p, f), s.splat(9.618_129e-3));
    p = s.add(s.mul(p, f), s.splat(5.550_411e-2));
    p = s.add(s.mul(p, f), s.splat(2.402_265e-1));
    p = s.add(s.mul(p, f), s.splat(std::f32::consts::LN_2));
    p = s.add(s.mul(p, f), s.splat(1.0));
    s.scale2(p, n)
}

/// How many scores of rows `from..to` lie above `limit`.
pub(super) struct CountAbove<'a> {
    pub scores: &'a [f32],
    pub from: usize,
    pub to: usize,
    pub limit: f32,
}

impl Kernel for CountAbove<'_> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let never = s.splat(f32::NEG_INFINITY);
        let mut count = s.zero();
        let mut i = self.from / LANES * LANES;
        while i < self.to {
            let mut x = s.max(s.load_slice(&self.scores[i..]), never);
            if i < self.from || i + LANES > self.to {
                x = within(s, x, self.from as f32 - i as f32, (self.to - i) as f32, never);
            }
            count = s.add(count, s.if_less(s.splat(self.limit), x, s.splat(1.0), s.zero()));
            i += LANES;
        }
        s.sum(count) as usize
    }
}

/// Ranks of rows from `first` on, a multiple of 16, in whole vectors up to `to`: the largest score of a head of the group
/// minus the head's `shifts`; −∞ outside `from..to`. With each vector's largest.
pub(super) struct Ranks<'a> {
    /// Scores of the group's heads, `stride` apart.
    pub scores: &'a [f32],
    pub stride: usize,
    pub shifts: &'a [f32],
    pub from: usize,
    pub to: usize,
    pub ranks: &'a mut [f32],
    pub largest: &'a mut [f32],
}

impl Kernel for Ranks<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let never = s.splat(f32::NEG_INFINITY);
        let mut i = self.from / LANES * LANES;
        for (ranks, largest) in self.ranks.chunks_exact_mut(LANES).zip(self.largest) {
            let mut rank = never;
            for (h, &shift) in self.shifts.iter().enumerate() {
                // One index rather than slices of `stride`, which would divide for every vector.
                let score = s.load_slice(&self.scores[h * self.stride + i..]);
                rank = s.max(s.sub(score, s.splat(shift)), rank);
            }
            if i < self.from || i + LANES > self.to {
                rank = within(s, rank, self.from as f32 - i as f32, self.to as f32 - i as f32, never);
            }
            s.store_slice(ranks, rank);
            *largest = s.largest(rank);
            i += LANES;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::simd::{Level, Proven};
    use super::*;

    #[test]
    fn sums_of_exponentials_are_right_and_the_same_on_every_level() {
        let mut random = super::super::super::tests::Random(3);
        for vectors in [1, 2, 7, 64] {
            let scores: Vec<f32> = (0..vectors * LANES).map(|_| 9.0 * random.normal() - 40.0).collect();
            let shift = scores.iter().copied().fold(f32::MIN, f32::max);
            let want: f64 = scores.iter().map(|&x| (f64::from(x) - f64::from(shift)).exp()).sum();
            let run = |level: Proven| level.run(SumExp { scores: &scores, shift });
            let first = run(Proven::new(Level::Scalar).unwrap());
            assert!((f64::from(first) / want - 1.0).abs() < 1e-5, "{first}, not {want}");
            for level in Level::available().filter_map(Proven::new) {
                assert_eq!(run(level).to_bits(), first.to_bits(), "{level:?}");
            }
        }
    }
}
