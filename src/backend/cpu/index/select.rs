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

/// The rows above `limit`, ascending, into `out`, where it is known that they are `count`: no search for a bound.
pub(super) fn above(work: &Workspace<'_>, limit: f32, count: usize, out: &mut Vec<u32>) {
    out.clear();
    out.resize(count + 1, 0);
    let mut found = 0;
    for (block, ranks) in work.ranks.chunks_exact(LANES).enumerate() {
        if work.largest[block] <= limit {
            continue;
        }
        for (i, &rank) in ranks.iter().enumerate() {
            // As in `best`; one more than there are takes what is not good enough behind the last.
            out[found] = (work.first + block * LANES + i) as u32;
            found += usize::from(rank > limit);
        }
    }
    assert_eq!(found, count, "rows above a limit");
    out.truncate(count);
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

#[cfg(test)]
mod tests {
    use super::super::super::simd::Level;
    use super::super::super::tests::Random;
    use super::*;

    /// By sorting: larger ranks first, then earlier rows.
    fn reference(ranks: &[f32], from: usize, to: usize, count: usize) -> Vec<u32> {
        let mut rows: Vec<u32> = (from as u32..to as u32).collect();
        rows.sort_by(|&a, &b| ranks[b as usize].total_cmp(&ranks[a as usize]).then(a.cmp(&b)));
        rows.truncate(count);
        rows.sort_unstable();
        rows
    }

    #[test]
    fn the_best_rows_are_those_of_a_full_sort() {
        let mut random = Random(61);
        for level in Level::available().filter_map(Proven::new) {
            for case in 0..400 {
                let rows = 1 + random.below([3, 40, 300, 5000][case % 4]);
                let from = random.below(rows);
                let to = from + random.below(rows - from + 1);
                let distinct = [1, 3, 50, usize::MAX][case / 4 % 4];
                let ranks: Vec<f32> = (0..rows)
                    .map(|_| match random.below(10) {
                        0 => f32::NEG_INFINITY,
                        _ if distinct == usize::MAX => random.normal() * 10.0 - 5.0,
                        _ => random.below(distinct) as f32 - 1.0,
                    })
                    .collect();
                let count = random.below([rows + 2, rows / 50 + 2][case / 16 % 2]);
                // As a rehearsal hands them over: whole vectors from a multiple of 16 on, −∞ outside from..to.
                let first = from / LANES * LANES;
                let padded = (to.next_multiple_of(LANES) - first).max(LANES);
                let mut own = vec![f32::NEG_INFINITY; padded];
                (from..to).for_each(|row| own[row - first] = ranks[row]);
                let mut largest: Vec<f32> =
                    own.chunks_exact(LANES).map(|c| c.iter().copied().fold(f32::NEG_INFINITY, f32::max)).collect();
                largest.resize(largest.len().next_multiple_of(LANES), f32::NEG_INFINITY);
                let (mut values, mut numbers) = (vec![f32::NAN; padded], vec![9; padded]);
                let work = Workspace { ranks: &own, largest: &largest, values: &mut values, rows: &mut numbers, first };
                let mut got = vec![1, 2, 3];
                best(level, work, from, to, count, &mut got);
                assert_eq!(
                    got,
                    reference(&ranks, from, to, count),
                    "{level:?} {case}: {from}..{to}, {count} of {rows}"
                );
                // Those above a limit are the best of their number, and in no other order.
                let limit = ranks[random.below(rows)];
                let higher = (from..to).filter(|&row| ranks[row] > limit).count();
                let work = Workspace { ranks: &own, largest: &largest, values: &mut values, rows: &mut numbers, first };
                above(&work, limit, higher, &mut got);
                assert_eq!(got, reference(&ranks, from, to, higher), "{level:?} {case}: above {limit}");
            }
        }
    }
}
