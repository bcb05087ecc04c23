//! How much of the attention of some rows each token gets.
//!
//! Rows go in slabs of [`SLAB`]; a piece of work is one chunk of [`CHUNK`] tokens of one KV head. A first pass over the
//! pieces finds what normalises each query, a second one computes the scores again and adds up probabilities. Sixteen
//! keys at a time are widened and transposed once for all queries of the slab, so that lanes are tokens and nothing is
//! summed across them. A token's probabilities are added by one piece in the order of rows, whatever the threads.

use super::super::CpuBackend;
use super::super::simd::{Element, Kernel, LANES, Simd, exp};
use super::super::view::{Shared, row};
use super::{LEAST, first_seen};
use crate::Result;
use crate::backend::{AttentionShape, Rows, RowsMut, Segment, Visible};
use std::marker::PhantomData;

/// Tokens of a piece of work.
const CHUNK: usize = 256;

/// Rows that are worked on together.
const SLAB: usize = 64;

/// Queries that share a load of keys; those of a slab are padded to whole fours.
const TOGETHER: usize = 4;

/// Sizes in floats.
#[derive(Clone, Copy)]
struct Layout {
    /// Query heads of a KV head.
    group: usize,
    /// Head dimension, rounded up to whole vectors.
    padded: usize,
    /// Queries of one KV head in a slab, in whole fours.
    queries: usize,
}

/// Floats of scratch memory for segments of `rows` rows over `tokens` tokens.
pub(super) fn floats(threads: usize, shape: &AttentionShape, rows: usize, tokens: usize) -> usize {
    let (kv_heads, padded) = (shape.kv_heads, shape.head_dim.next_multiple_of(LANES));
    let queries = (rows.min(SLAB) * (shape.heads / kv_heads)).next_multiple_of(TOGETHER);
    let shared = kv_heads * queries * (padded + 2 * tokens.div_ceil(CHUNK) + 1);
    shared.next_multiple_of(LANES) + threads * (padded + 2 * queries) * LANES
}

/// Adds the masses of one segment to `out`.
pub(super) fn mass<E: Element>(
    cpu: &CpuBackend,
    q: Rows<'_>,
    shape: &AttentionShape,
    segment: &Segment<'_>,
    out: &RowsMut<'_>,
) -> Result<()> {
    let kv_heads = shape.kv_heads;
    let end = |head: usize| match segment.visible {
        Visible::Causal => segment.position + segment.rows,
        Visible::First(counts) => counts[head] as usize,
        Visible::Listed(rows) => rows[head].len(),
        Visible::Slots(_) => unreachable!("slots are not ranked"),
    };
    let chunks = (0..kv_heads).map(end).max().unwrap_or(0).div_ceil(CHUNK);
    let (group, padded) = (shape.heads / kv_heads, shape.head_dim.next_multiple_of(LANES));
    let queries = (segment.rows.min(SLAB) * group).next_multiple_of(TOGETHER);
    // Scratch memory: scaled queries, then largest and sum of each chunk, KV head and query, the log-sum-exp of each KV
    // head and query, and what each thread has for itself: transposed keys, and two vectors a query.
    let parts = kv_heads * queries * padded;
    let norms = parts + 2 * chunks * kv_heads * queries;
    let threads = (norms + kv_heads * queries).next_multiple_of(LANES);
    let own = (padded + 2 * queries) * LANES;
    let layout = Layout { group, padded, queries };
    let floats = threads + cpu.pool.threads() * own;
    debug_assert_eq!(
        floats,
        self::floats(cpu.pool.threads(), shape, segment.rows, (0..kv_heads).map(end).max().unwrap_or(0))
    );
    let mut scratch = cpu.scratch.take(floats * 4, "the mass of attention")?;
    let scratch = Shared(scratch.address_mut());
    // SAFETY: `at` ≤ floats.
    let float_at = |at: usize| unsafe { scratch.get().cast::<f32>().add(at) };

    for first in (0..segment.rows).step_by(SLAB) {
        let rows = (segment.rows - first).min(SLAB);
        // SAFETY: the queries begin the scratch memory; no thread reads them yet.
        let scaled = unsafe { std::slice::from_raw_parts_mut(float_at(0), parts) };
        scaled.fill(0.0);
        for i in 0..rows {
            let heads = row(&q, segment.row + first + i).chunks_exact(shape.head_dim);
            for (h, from) in heads.enumerate() {
                let to = &mut scaled[((h / group * queries) + i * group + h % group) * padded..];
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from * shape.scale);
            }
        }
        let piece = |thread: usize, item: usize| {
            let (chunk, head) = (item / kv_heads, item % kv_heads);
            let last = match segment.visible {
                Visible::Causal => segment.position + first + rows,
                _ => end(head),
            };
            Part::<E> {
                layout,
                shape,
                segment,
                first,
                rows,
                head,
                from: chunk * CHUNK,
                to: last.min((chunk + 1) * CHUNK),
                queries: float_at(head * queries * padded),
                parts: float_at(parts + 2 * item * queries),
                norms: float_at(norms + head * queries),
                own: float_at(threads + thread * own),
                // SAFETY: row `head` of `out`.
                out: unsafe { out.base().cast::<f32>().add(head * out.stride()) },
                e: PhantomData,
            }
        };
        cpu.pool.split_indexed(chunks * kv_heads, 1, &|thread, range| {
            for item in range {
                cpu.level.run(Normalise(piece(thread, item)));
            }
        });
        cpu.pool.split(kv_heads * queries, 256, &|range| {
            for i in range {
                let (head, query) = (i / queries, i % queries);
                let part = |chunk: usize| {
                    let at = float_at(parts + 2 * ((chunk * kv_heads + head) * queries + query));
                    // SAFETY: written by the first pass, which has ended.
                    unsafe { (at.read(), at.add(1).read()) }
                };
                let most = (0..chunks).map(|c| part(c).0).fold(LEAST, f32::max);
                let sum: f32 = (0..chunks).map(|c| part(c).1 * (part(c).0 - most).exp()).sum();
                // A query that only pads its slab sees nothing.
                let norm = if sum > 0.0 { most + sum.ln() } else { LEAST };
                // SAFETY: the norm of this KV head and query, written here alone.
                unsafe { float_at(norms + i).write(norm) };
            }
        });
        cpu.pool.split_indexed(chunks * kv_heads, 1, &|thread, range| {
            for item in range {
                cpu.level.run(Add(piece(thread, item)));
            }
        });
    }
    Ok(())
}

/// One piece of work of either pass.
struct Part<'a, E> {
    layout: Layout,
    shape: &'a AttentionShape,
    segment: &'a Segment<'a>,
    /// First row of the slab, of the segment's, and their number.
    first: usize,
    rows: usize,
    /// KV head.
    head: usize,
    /// Tokens `from..to`, or entries of a list; none where `to` ≤ `from`.
    from: usize,
    to: usize,
    /// `layout.queries` × `layout.padded` floats.
    queries: *const f32,
    /// Largest and sum of each query, of this piece.
    parts: *mut f32,
    norms: *const f32,
    own: *mut f32,
    /// The KV head's masses.
    out: *mut f32,
    e: PhantomData<E>,
}

impl<E: Element> Part<'_, E> {
    /// The key of token or entry `at`.
    #[inline(always)]
    fn key(&self, at: usize) -> *const E {
        let row = match self.segment.visible {
            Visible::Listed(rows) => rows[self.head][at] as usize,
            _ => at,
        };
        let geometry = self.segment.runs.geometry();
        let run = self.segment.runs.run(row / geometry.extent_tokens, self.head).cast::<E>();
        // SAFETY: the row lies in its run: `attention_mass` has asserted that it is below the runs' capacity.
        unsafe { run.add(row % geometry.extent_tokens * 2 * geometry.head_dim) }
    }

    /// Transposes the keys of up to sixteen tokens from `at` on: `layout.padded` vectors, of which lanes are tokens.
    #[inline(always)]
    fn transpose<S: Simd>(&self, s: S, at: usize) {
        let d = self.shape.head_dim;
        let count = (self.to - at).min(LANES);
        let mut keys = [std::ptr::null::<E>(); LANES];
        for t in 0..count {
            keys[t] = self.key(at + t);
        }
        for i in (0..d).step_by(LANES) {
            let mut part = [s.zero(); LANES];
            for t in 0..count {
                // SAFETY: at most sixteen of the key's d elements, from i on.
                part[t] = unsafe {
                    if d - i >= LANES { E::load(s, keys[t].add(i)) } else { E::load_first(s, keys[t].add(i), d - i) }
                };
            }
            for (j, v) in s.transpose(part).into_iter().enumerate() {
                // SAFETY: vector i + j of `padded`, the first of this thread's own floats.
                unsafe { s.store(self.own.add((i + j) * LANES), v) };
            }
        }
    }

    /// Scores of [`TOGETHER`] queries from `query` on with the sixteen tokens from `at` on, −∞ where a query does not
    /// see the token; nothing when none sees any.
    #[inline(always)]
    fn scores<S: Simd>(&self, s: S, at: usize, query: usize) -> Option<[S::V; TOGETHER]> {
        const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        // Which of these tokens a query sees, as lanes.
        let mut seen = [(0, 0); TOGETHER];
        let mut any = false;
        for i in 0..TOGETHER {
            let token = (query + i) / self.layout.group;
            if token < self.rows {
                let (from, to) = match self.segment.visible {
                    Visible::Causal => {
                        let position = self.segment.position + self.first + token;
                        (first_seen(self.shape, position), self.to.min(position + 1))
                    }
                    _ => (0, self.to),
                };
                seen[i] = (from.saturating_sub(at).min(LANES), to.saturating_sub(at).min(LANES));
                any |= seen[i].0 < seen[i].1;
            }
        }
        if !any {
            return None;
        }
        let mut sums = [s.zero(); TOGETHER];
        let padded = self.layout.padded;
        for c in 0..padded {
            // SAFETY: `padded` vectors of keys; `padded` floats of each of `layout.queries` queries, whole fours.
            unsafe {
                let keys = s.load(self.own.add(c * LANES));
                for i in 0..TOGETHER {
                    sums[i] = s.fma(s.splat(self.queries.add((query + i) * padded + c).read()), keys, sums[i]);
                }
            }
        }
        let lane = s.load_slice(&LANE);
        let hidden = s.splat(f32::NEG_INFINITY);
        for i in 0..TOGETHER {
            let (from, to) = seen[i];
            if (from, to) != (0, LANES) {
                let after = s.if_less(lane, s.splat(to as f32), sums[i], hidden);
                sums[i] = s.if_less(lane, s.splat(from as f32), hidden, after);
            }
        }
        Some(sums)
    }
}

/// The first pass: largest score m and Σ exp(score − m) of each query over the piece's tokens.
struct Normalise<'a, E>(Part<'a, E>);

impl<E: Element> Kernel for Normalise<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let part = self.0;
        let queries = part.layout.queries;
        // Lanes keep a maximum and a sum each.
        let state = |query: usize| part.own.wrapping_add((part.layout.padded + 2 * query) * LANES);
        for query in 0..queries {
            // SAFETY: two vectors a query behind the keys, in this thread's own floats.
            unsafe {
                s.store(state(query), s.splat(LEAST));
                s.store(state(query).add(LANES), s.zero());
            }
        }
        for at in (part.from..part.to.max(part.from)).step_by(LANES) {
            part.transpose(s, at);
            for query in (0..queries).step_by(TOGETHER) {
                let Some(scores) = part.scores(s, at, query) else { continue };
                for i in 0..TOGETHER {
                    // SAFETY: as above.
                    unsafe {
                        let (most, sum) = (state(query + i), state(query + i).add(LANES));
                        let before = s.load(most);
                        let now = s.max(scores[i], before);
                        let kept = s.mul(s.load(sum), exp(s, s.sub(before, now)));
                        s.store(sum, s.add(kept, exp(s, s.sub(scores[i], now))));
                        s.store(most, now);
                    }
                }
            }
        }
        for query in 0..queries {
            // SAFETY: as above; m and l of the query, which this piece of work alone writes.
            unsafe {
                let (lanes, sums) = (s.load(state(query)), s.load(state(query).add(LANES)));
                let most = s.largest(lanes);
                part.parts.add(2 * query).write(most);
                part.parts.add(2 * query + 1).write(s.sum(s.mul(sums, exp(s, s.sub(lanes, s.splat(most))))));
            }
        }
    }
}

/// The second pass: adds probabilities to the masses of the piece's tokens.
struct Add<'a, E>(Part<'a, E>);

impl<E: Element> Kernel for Add<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let part = self.0;
        for at in (part.from..part.to.max(part.from)).step_by(LANES) {
            part.transpose(s, at);
            let mut total = s.zero();
            for query in (0..part.layout.queries).step_by(TOGETHER) {
                let Some(scores) = part.scores(s, at, query) else { continue };
                for i in 0..TOGETHER {
                    // SAFETY: one norm a query.
                    let norm = unsafe { part.norms.add(query + i).read() };
                    total = s.add(total, exp(s, s.sub(scores[i], s.splat(norm))));
                }
            }
            let count = (part.to - at).min(LANES);
            // SAFETY: `out` has a column for each token or entry, which this piece of work alone writes.
            unsafe {
                let out = part.out.add(at);
                s.store_first(out, count, s.add(s.load_first(out, count), total));
            }
        }
    }
}
