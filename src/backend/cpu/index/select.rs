//! The k best of many ranks, exactly: ties go to the earlier row.
//!
//! The k-th largest rank is found by bisection over the values that a float can have, counting with vectors how many
//! ranks lie above; then one pass in row order takes what is above it, and of what equals it the first ones. Most rows
//! are out before: the k-th largest of the blocks' largest ranks is a lower bound of the k-th largest rank.

use super::super::simd::{Kernel, LANES, Proven, Simd};

/// What [`best`] works in.
pub(super) struct Workspace<'a> {
    /// Ranks of the rows from `first` on, in whole vectors; never NaN.
    pub ranks: &'a [f32],
    /// The largest of each vector of `ranks`; padded with −∞ to whole vectors.
    pub largest: &'a [f32],
    /// As long as `ranks`, for candidates' ranks …
    pub values: &'a mut [f32],
    /// … and their rows.
    pub rows: &'a mut [u32],
    /// Row of the first rank, a multiple of 16.
    pub first: usize,
}

/// The `count` best of rows `from..to`, ascending, into `out`.
pub(super) fn best(level: Proven, work: Workspace<'_>, from: usize, to: usize, count: usize, out: &mut Vec<u32>) {
    out.clear();
    let count = count.min(to - from);
    if count == to - from {
        out.extend(from as u32..to as u32);
        return;
    }
    if count == 0 {
        return;
    }
    let Workspace { ranks, largest, values, rows, first } = work;
    let blocks = ranks.len() / LANES;
    // Each block's largest belongs to one of its selectable rows unless all of these are −∞ as well.
    let bound = if count <= blocks {
        level.run(Nth { values: largest, count, least: f32::NEG_INFINITY })
    } else {
        f32::NEG_INFINITY
    };
    let mut found = 0;
    for (block, &largest) in largest[..blocks].iter().enumerate() {
        if largest < bound {
            continue;
        }
        let begin = first + block * LANES;
        for row in begin.max(from)..(begin + LANES).min(to) {
            // Written always, kept if it is good enough: no branch to guess.
            let rank = ranks[row - first];
            values[found] = rank;
            rows[found] = row as u32;
            found += usize::from(rank >= bound);
        }
    }
    let padded = found.next_multiple_of(LANES);
    values[found..padded].fill(f32::NEG_INFINITY);
    let limit = level.run(Nth { values: &values[..padded], count, least: bound });
    let above = values[..found].iter().filter(|&&x| x > limit).count();
    let mut equal = count - above;
    out.reserve(count);
    for (&value, &row) in values[..found].iter().zip(&*rows) {
        if value > limit || (value == limit && equal > 0) {
            equal -= usize::from(value == limit);
            out.push(row);
        }
    }
}

/// The `count`-th largest of `values`, or a number below it with as many values at or above it. Never NaN, whole vectors;
/// at least `count` of them are at least `least`.
struct Nth<'a> {
    values: &'a [f32],
    count: usize,
    least: f32,
}

impl Kernel for Nth<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let mut largest = s.splat(self.least);
        for i in (0..self.values.len()).step_by(LANES) {
            largest = s.max(s.load_slice(&self.values[i..]), largest);
        }
        // At least `count` values are ≥ low, fewer are ≥ high.
        let (mut low, mut high) = (i64::from(ordered(self.least)), i64::from(ordered(s.largest(largest))) + 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            let limit = s.splat(unordered(middle as i32));
            let mut below = [s.zero(); 2];
            let mut pairs = self.values.chunks_exact(2 * LANES);
            for pair in &mut pairs {
                below[0] = s.add(below[0], s.if_less(s.load_slice(pair), limit, s.splat(1.0), s.zero()));
                below[1] = s.add(below[1], s.if_less(s.load_slice(&pair[LANES..]), limit, s.splat(1.0), s.zero()));
            }
            if !pairs.remainder().is_empty() {
                let last = s.load_slice(pairs.remainder());
                below[0] = s.add(below[0], s.if_less(last, limit, s.splat(1.0), s.zero()));
            }
            let count = self.values.len() - s.sum(s.add(below[0], below[1])) as usize;
            if count < self.count {
                high = middle;
            } else {
                low = middle;
                if count == self.count {
                    break;
                }
            }
        }
        unordered(low as i32)
    }
}

/// A float as an integer of the same order.
#[inline(always)]
fn ordered(x: f32) -> i32 {
    let bits = x.to_bits() as i32;
    bits ^ ((bits >> 31) as u32 >> 1) as i32
}

/// The inverse of [`ordered`].
#[inline(always)]
fn unordered(x: i32) -> f32 {
    f32::from_bits((x ^ ((x >> 31) as u32 >> 1) as i32) as u32)
}
