//! Attention of one new token a sequence, at the speed of reading its KV.
//!
//! A piece of work is one chunk of [`CHUNK`] positions of one KV head of one segment. It goes through the chunk in blocks
//! of sixteen tokens, of a whole chunk four from each quarter: scores of all query heads of the group (one vector a
//! head), their weights, then the values, while later rows are being prefetched; K and V of a token lie side by side, so
//! memory sees a few forward streams. The pieces' partial results are then merged per query in the order of positions, so
//! bits do not depend on who computed what.

use super::super::CpuBackend;
use super::super::simd::{Element, Kernel, LANES, Simd, exp};
use super::super::view::{Shared, row};
use super::{LEAST, first_seen};
use crate::Result;
use crate::backend::{AttentionShape, Rows, RowsMut, Segment, Visible};
use std::marker::PhantomData;
use std::ops::Range;

/// Positions of a piece of work; pieces begin at multiples of it.
const CHUNK: usize = 256;

/// Places of a whole piece that are read in turn. A cache fetches ahead page by page, and a block of one place would be a
/// page; where four are read at once, memory gives a third more (Sapphire Rapids).
const PLACES: usize = 4;

/// Positions of each place.
const PART: usize = CHUNK / PLACES;

/// How far ahead of the current row prefetches run.
const AHEAD: usize = 8 << 10;

/// The same for listed rows, in rows: far enough for memory's latency, near enough to stay in the first-level cache.
const LISTED_AHEAD: usize = 32;

/// Sizes in floats of what pieces leave in scratch memory.
#[derive(Clone, Copy)]
struct Layout {
    /// Query heads of a KV head.
    group: usize,
    head_dim: usize,
    /// Head dimension, rounded up to whole vectors.
    padded: usize,
}

impl Layout {
    /// One partial result: for each query head of the group its weighted values, then each one's m and l.
    fn partial(self) -> usize {
        (self.group * (self.padded + 2)).next_multiple_of(LANES)
    }
}

/// Floats of scratch memory for `segments` segments that attend `rows` rows each.
pub(super) fn floats(shape: &AttentionShape, segments: usize, rows: usize) -> usize {
    let (head_dim, padded) = (shape.head_dim, shape.head_dim.next_multiple_of(LANES));
    let layout = Layout { group: shape.heads / shape.kv_heads, head_dim, padded };
    segments * (shape.heads * padded + rows.div_ceil(CHUNK) * shape.kv_heads * layout.partial())
}

/// The chunks of one segment, among those of all. Where KV heads attend different numbers of rows, a piece past the last
/// chunk of its head does nothing, and nobody reads its partial result.
struct Plan<'a> {
    segment: &'a Segment<'a>,
    /// First row that is attended.
    first: usize,
    /// Chunks of the head that has most.
    chunks: Range<usize>,
    /// Pieces of the segments before this one.
    before: usize,
}

impl Plan<'_> {
    /// End of what KV head `head` attends: of its rows, or of its list.
    fn end(&self, head: usize) -> usize {
        match self.segment.visible {
            Visible::Causal => self.segment.position + 1,
            Visible::First(counts) => counts[head] as usize,
            Visible::Listed(rows) => rows[head].len(),
            Visible::Slots(_) => unreachable!("slots are counted before"),
        }
    }
}

/// Attention of segments of one row each.
pub(super) fn attend<E: Element>(
    cpu: &CpuBackend,
    q: Rows<'_>,
    shape: &AttentionShape,
    segments: &[&Segment<'_>],
    out: &RowsMut<'_>,
) -> Result<()> {
    let layout = Layout {
        group: shape.heads / shape.kv_heads,
        head_dim: shape.head_dim,
        padded: shape.head_dim.next_multiple_of(LANES),
    };
    let mut plans = Vec::with_capacity(segments.len());
    let (mut pieces, mut entries) = (0, 0);
    for segment in segments {
        let first = match segment.visible {
            Visible::Causal => first_seen(shape, segment.position),
            Visible::First(_) | Visible::Listed(_) | Visible::Slots(_) => 0,
        };
        let mut plan = Plan { segment, first, chunks: first / CHUNK..0, before: pieces };
        let longest = (0..shape.kv_heads).map(|head| plan.end(head)).max().unwrap_or(0);
        plan.chunks.end = longest.div_ceil(CHUNK);
        pieces += plan.chunks.len() * shape.kv_heads;
        entries += (0..shape.kv_heads).map(|head| plan.end(head) - first).sum::<usize>();
        plans.push(plan);
    }

    // Scaled and padded queries of all segments, then the partial results of all pieces.
    let queries = segments.len() * shape.heads * layout.padded;
    let floats = queries + pieces * layout.partial();
    let mut scratch = cpu.scratch.take(floats * 4, "partial results of attention")?;
    let scratch = Shared(scratch.address_mut());
    let query_at = |segment: usize, head: usize| {
        // SAFETY: (segment, head) counts the padded queries, which begin the scratch memory.
        unsafe { scratch.get().cast::<f32>().add((segment * shape.heads + head) * layout.padded) }
    };
    let partial_at = |piece: usize| {
        // SAFETY: piece < pieces; partial results follow the queries.
        unsafe { scratch.get().cast::<f32>().add(queries + piece * layout.partial()) }
    };
    for (i, segment) in segments.iter().enumerate() {
        for (head, from) in row(&q, segment.row).chunks_exact(shape.head_dim).enumerate() {
            // SAFETY: room for `padded` floats each; no thread reads them yet.
            let to = unsafe { std::slice::from_raw_parts_mut(query_at(i, head), layout.padded) };
            let (to, rest) = to.split_at_mut(shape.head_dim);
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from * shape.scale);
            rest.fill(0.0);
        }
    }

    let plan_of = |piece: usize| plans.partition_point(|p| p.before <= piece) - 1;
    let row_bytes = 2 * shape.head_dim * size_of::<E>();
    // Contexts this short are done before another thread has woken.
    let grain = if entries * row_bytes < 32 << 10 { pieces } else { 1 };
    cpu.pool.split(pieces, grain, &|range| {
        for piece in range {
            let at = plan_of(piece);
            let plan = &plans[at];
            // Neighbouring heads' runs lie side by side in an extent, so this order walks through memory.
            let (chunk, head) = ((piece - plan.before) / shape.kv_heads, (piece - plan.before) % shape.kv_heads);
            let chunk = plan.chunks.start + chunk;
            let positions = plan.first.max(chunk * CHUNK)..plan.end(head).min((chunk + 1) * CHUNK);
            if positions.is_empty() {
                continue;
            }
            cpu.level.run(Chunk::<E> {
                layout,
                segment: plan.segment,
                head,
                positions,
                queries: query_at(at, head * layout.group),
                partial: partial_at(piece),
                e: PhantomData,
            });
        }
    });

    let heads = segments.len() * shape.kv_heads;
    let grain = (64 * heads / pieces.max(1)).max(1);
    cpu.pool.split(heads, grain, &|range| {
        for i in range {
            let (plan, head) = (&plans[i / shape.kv_heads], i % shape.kv_heads);
            let first = plan.before + head;
            // SAFETY: this piece of work is the only one for this segment (a row of `out` of its own) and KV head;
            // the reference is narrowed to that head's columns before it is used.
            let out = unsafe {
                let columns = layout.group * layout.head_dim;
                let base = out.base().cast::<f32>().add(plan.segment.row * out.stride() + head * columns);
                std::slice::from_raw_parts_mut(base, columns)
            };
            cpu.level.run(Merge {
                layout,
                partials: partial_at(first),
                stride: shape.kv_heads * layout.partial(),
                count: plan.end(head).div_ceil(CHUNK) - plan.chunks.start,
                out,
            });
        }
    });
    Ok(())
}

/// Where the rows of K and V of a block lie.
trait Place<E>: Copy {
    /// The key of token `t`, with its value behind it.
    fn key(self, t: usize) -> *const E;
    /// The row to ask memory for when token `t` is read.
    fn ahead(self, t: usize) -> *const u8;
}

/// Rows of runs, four at a time from each of four places: one behind the other, or each place a stream of its own.
#[derive(Clone, Copy)]
struct Run<E> {
    places: [*const E; PLACES],
    /// Elements from one row to the next.
    stride: usize,
    /// Bytes from a row to what is asked for with it.
    ahead: usize,
}

impl<E: Element> Place<E> for Run<E> {
    #[inline(always)]
    fn key(self, t: usize) -> *const E {
        self.places[t / (LANES / PLACES)].wrapping_add(t % (LANES / PLACES) * self.stride)
    }

    #[inline(always)]
    fn ahead(self, t: usize) -> *const u8 {
        self.key(t).cast::<u8>().wrapping_add(self.ahead)
    }
}

/// Rows from `at` on of a list.
#[derive(Clone, Copy)]
struct Listed<'a, E> {
    keys: &'a [*const E],
    at: usize,
}

impl<E: Element> Place<E> for Listed<'_, E> {
    #[inline(always)]
    fn key(self, t: usize) -> *const E {
        self.keys[self.at + t]
    }

    #[inline(always)]
    fn ahead(self, t: usize) -> *const u8 {
        // Past the end the last row, which has been asked for: harmless.
        self.keys[(self.at + t + LISTED_AHEAD).min(self.keys.len() - 1)].cast()
    }
}

/// The `i`-th token of a whole piece that is read in parts.
#[inline(always)]
fn in_turn(i: usize) -> usize {
    const EACH: usize = LANES / PLACES;
    i % LANES / EACH * PART + i / LANES * EACH + i % EACH
}

/// One piece of work.
struct Chunk<'a, E> {
    layout: Layout,
    segment: &'a Segment<'a>,
    /// KV head.
    head: usize,
    /// Of its rows, or of its list; at most [`CHUNK`].
    positions: Range<usize>,
    /// `group` × `padded` floats.
    queries: *const f32,
    /// [`Layout::partial`] floats.
    partial: *mut f32,
    e: PhantomData<E>,
}

impl<E: Element> Kernel for Chunk<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // The usual head dimensions get loops of known length: a tenth less time, where compilation pays for it.
        match self.layout.head_dim {
            64 if S::WIDE => self.group::<S, 64>(s),
            128 if S::WIDE => self.group::<S, 128>(s),
            _ => self.group::<S, 0>(s),
        }
    }
}

impl<E: Element> Chunk<'_, E> {
    /// The layout, with head dimension `D` known at compile time unless that is 0.
    #[inline(always)]
    fn layout<const D: usize>(&self) -> Layout {
        if D == 0 { self.layout } else { Layout { head_dim: D, padded: D.next_multiple_of(LANES), ..self.layout } }
    }

    /// The whole chunk, for all query heads, four at a time.
    #[inline(always)]
    fn group<S: Simd, const D: usize>(&self, s: S) {
        let mut head = 0;
        while head < self.layout.group {
            match self.layout.group - head {
                1 => self.heads::<S, D, 1>(s, head),
                2 => self.heads::<S, D, 2>(s, head),
                3 => self.heads::<S, D, 3>(s, head),
                _ => self.heads::<S, D, 4>(s, head),
            }
            head += 4;
        }
    }

    /// The whole chunk, for `H` query heads from `first` on.
    #[inline(always)]
    fn heads<S: Simd, const D: usize, const H: usize>(&self, s: S, first: usize) {
        let Layout { group, head_dim, padded } = self.layout::<D>();
        let geometry = self.segment.runs.geometry();
        // SAFETY: the partial result has `group` × `padded` floats of values, of which these are `H` heads' …
        let (queries, values) = unsafe { (self.queries.add(first * padded), self.partial.add(first * padded)) };
        for i in (0..H * padded).step_by(LANES) {
            // SAFETY: … and whole vectors each.
            unsafe { s.store(values.add(i), s.zero()) };
        }
        let mut most = [LEAST; H];
        let mut sums = [s.zero(); H];
        let mut products = [[s.zero(); LANES]; H];

        // Of a whole piece sixteen tokens are four of each part: an order that depends on numbers alone.
        let whole = self.positions.len() == CHUNK && geometry.extent_tokens.is_multiple_of(PART);
        if let Visible::Listed(lists) = self.segment.visible {
            let list = &lists[self.head][self.positions.clone()];
            let mut keys = [std::ptr::null::<E>(); CHUNK];
            for (i, key) in keys[..list.len()].iter_mut().enumerate() {
                let row = list[if whole { in_turn(i) } else { i }];
                let (extent, token) = (row as usize / geometry.extent_tokens, row as usize % geometry.extent_tokens);
                // SAFETY: `token` < `extent_tokens` rows of K and V in the run.
                *key = unsafe { self.segment.runs.run(extent, self.head).cast::<E>().add(token * 2 * head_dim) };
            }
            for &key in &keys[..list.len().min(LISTED_AHEAD)] {
                s.prefetch_all(key.cast(), 2 * head_dim * size_of::<E>());
            }
            for at in (0..list.len()).step_by(LANES) {
                let rows = Listed { keys: &keys[..list.len()], at };
                let count = (list.len() - at).min(LANES);
                // SAFETY: `count` of the list's rows.
                unsafe {
                    self.block::<S, D, H, _>(s, rows, count, queries, values, &mut products, &mut most, &mut sums);
                }
            }
        } else if whole {
            let stride = 2 * head_dim;
            let mut places = [std::ptr::null::<E>(); PLACES];
            for part in 0..PLACES {
                let position = self.positions.start + part * PART;
                let (extent, token) = (position / geometry.extent_tokens, position % geometry.extent_tokens);
                // SAFETY: `token` < `extent_tokens` rows of K and V in the run, in which the whole part lies.
                places[part] = unsafe { self.segment.runs.run(extent, self.head).cast::<E>().add(token * stride) };
            }
            for at in (0..PART).step_by(LANES / PLACES) {
                // Behind the last rows comes the same part of the next piece, mostly: another head's run.
                let beyond = if at * PLACES + CHUNK / 8 < CHUNK { 0 } else { (CHUNK - PART) * stride * size_of::<E>() };
                let mut rows = Run { places, stride, ahead: AHEAD / PLACES + beyond };
                for part in 0..PLACES {
                    rows.places[part] = places[part].wrapping_add(at * stride);
                }
                // SAFETY: four rows of each part, from row `at` < `PART` on.
                unsafe {
                    self.block::<S, D, H, _>(s, rows, LANES, queries, values, &mut products, &mut most, &mut sums);
                }
            }
        } else {
            let stride = 2 * head_dim;
            let mut position = self.positions.start;
            while position < self.positions.end {
                let (extent, token) = (position / geometry.extent_tokens, position % geometry.extent_tokens);
                let here = (self.positions.end - position).min(geometry.extent_tokens - token);
                // SAFETY: `token` < `extent_tokens` rows of K and V in the run.
                let run = unsafe { self.segment.runs.run(extent, self.head).cast::<E>().add(token * stride) };
                for t in (0..here).step_by(LANES) {
                    let count = (here - t).min(LANES);
                    let mut rows = Run { places: [run; PLACES], stride, ahead: AHEAD };
                    for part in 0..PLACES {
                        rows.places[part] = run.wrapping_add((t + part * (LANES / PLACES)) * stride);
                    }
                    // SAFETY: rows t.. of `here` in the run, at most sixteen.
                    unsafe {
                        self.block::<S, D, H, _>(s, rows, count, queries, values, &mut products, &mut most, &mut sums);
                    }
                }
                position += here;
            }
        }

        for h in 0..H {
            // SAFETY: m and l of head first + h, behind the values.
            unsafe {
                let state = self.partial.add(group * padded + 2 * (first + h));
                state.write(most[h]);
                state.add(1).write(s.sum(sums[h]));
            }
        }
    }

    /// `count` ≤ 16 tokens for `H` heads.
    ///
    /// # Safety
    /// `rows` names `count` rows of K and V; `queries` and `values` `H` × `padded` floats.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    unsafe fn block<S: Simd, const D: usize, const H: usize, P: Place<E>>(
        &self,
        s: S,
        rows: P,
        count: usize,
        queries: *const f32,
        values: *mut f32,
        products: &mut [[S::V; LANES]; H],
        most: &mut [f32; H],
        sums: &mut [S::V; H],
    ) {
        const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        let Layout { head_dim, padded, .. } = self.layout::<D>();
        let whole = head_dim / LANES * LANES;

        // Scores: sixteen sums of products a head, added up across lanes together. Where tokens are fewer, what an
        // earlier block left in `products` goes into lanes that are masked below.
        for t in 0..count {
            let key = rows.key(t);
            s.prefetch_all(rows.ahead(t), 2 * head_dim * size_of::<E>());
            let mut dots = [s.zero(); H];
            let mut i = 0;
            while i < whole {
                // SAFETY: i + 16 ≤ head_dim elements of the key, padded floats of each query.
                unsafe {
                    let k = E::load(s, key.add(i));
                    for h in 0..H {
                        dots[h] = s.fma(s.load(queries.add(h * padded + i)), k, dots[h]);
                    }
                }
                i += LANES;
            }
            if whole < head_dim {
                // SAFETY: as above, for the head_dim − whole elements that are left.
                unsafe {
                    let k = E::load_first(s, key.add(whole), head_dim - whole);
                    for h in 0..H {
                        dots[h] = s.fma(s.load(queries.add(h * padded + whole)), k, dots[h]);
                    }
                }
            }
            for h in 0..H {
                products[h][t] = dots[h];
            }
        }

        // Weights, relative to the largest score so far.
        let mut weights = [[0.0f32; LANES]; H];
        for h in 0..H {
            let mut scores = s.sums(products[h]);
            if count < LANES {
                scores = s.if_less(s.load_slice(&LANE), s.splat(count as f32), scores, s.splat(f32::NEG_INFINITY));
            }
            let largest = s.largest(scores);
            if largest > most[h] {
                let shrink = exp(s, s.splat(most[h] - largest));
                most[h] = largest;
                sums[h] = s.mul(sums[h], shrink);
                for i in (0..padded).step_by(LANES) {
                    // SAFETY: whole vectors of head h's values.
                    unsafe {
                        let at = values.add(h * padded + i);
                        s.store(at, s.mul(s.load(at), shrink));
                    }
                }
            }
            let weight = exp(s, s.sub(scores, s.splat(most[h])));
            sums[h] = s.add(sums[h], weight);
            s.store_slice(&mut weights[h], weight);
        }

        // Values.
        // SAFETY: the value row of token t begins head_dim behind its key; slices of N vectors stay below head_dim, in
        // `values` below padded.
        unsafe {
            let mut i = 0;
            // Where a vector is two registers of sixteen, four of a head do not fit.
            while S::WIDE && whole - i >= 4 * LANES {
                self.values::<S, D, H, 4, P>(s, rows, count, i, values, &weights);
                i += 4 * LANES;
            }
            while i < whole {
                self.values::<S, D, H, 1, P>(s, rows, count, i, values, &weights);
                i += LANES;
            }
            if whole < head_dim {
                for h in 0..H {
                    let at = values.add(h * padded + whole);
                    let mut sum = s.load(at);
                    for t in 0..count {
                        let v = E::load_first(s, rows.key(t).add(head_dim + whole), head_dim - whole);
                        sum = s.fma(s.splat(weights[h][t]), v, sum);
                    }
                    s.store(at, sum);
                }
            }
        }
    }

    /// Adds the weighted values of dimensions `i..i + 16 N`.
    ///
    /// # Safety
    /// As for [`Chunk::block`], of whose values these are a slice.
    #[inline(always)]
    unsafe fn values<S: Simd, const D: usize, const H: usize, const N: usize, P: Place<E>>(
        &self,
        s: S,
        rows: P,
        count: usize,
        i: usize,
        values: *mut f32,
        weights: &[[f32; LANES]; H],
    ) {
        let Layout { head_dim, padded, .. } = self.layout::<D>();
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[s.zero(); N]; H];
            for h in 0..H {
                for n in 0..N {
                    sums[h][n] = s.load(values.add(h * padded + i + n * LANES));
                }
            }
            for t in 0..count {
                let mut v = [s.zero(); N];
                for n in 0..N {
                    v[n] = E::load(s, rows.key(t).add(head_dim + i + n * LANES));
                }
                for h in 0..H {
                    let weight = s.splat(weights[h][t]);
                    for n in 0..N {
                        sums[h][n] = s.fma(weight, v[n], sums[h][n]);
                    }
                }
            }
            for h in 0..H {
                for n in 0..N {
                    s.store(values.add(h * padded + i + n * LANES), sums[h][n]);
                }
            }
        }
    }
}

/// Merges the partial results of one segment and KV head.
struct Merge<'a> {
    layout: Layout,
    partials: *const f32,
    /// Floats from one partial result of this KV head to the next.
    stride: usize,
    count: usize,
    /// `group` × `head_dim`.
    out: &'a mut [f32],
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Layout { group, head_dim, padded } = self.layout;
        for (h, out) in self.out.chunks_exact_mut(head_dim).enumerate() {
            // SAFETY: `count` partial results, `stride` apart, are complete since their region has ended; each has m and l
            // of every head of the group behind the values, `padded` of them a head.
            unsafe {
                let state = |i: usize| {
                    let at = self.partials.add(i * self.stride + group * padded + 2 * h);
                    (at.read(), at.add(1).read())
                };
                let mut most = LEAST;
                for i in 0..self.count {
                    let (m, _) = state(i);
                    most = if m > most { m } else { most };
                }
                let mut total = s.zero();
                for i in 0..self.count {
                    let (m, l) = state(i);
                    total = s.fma(s.splat(l), exp(s, s.splat(m - most)), total);
                }
                for d in (0..head_dim).step_by(LANES) {
                    let mut sum = s.zero();
                    for i in 0..self.count {
                        let (m, _) = state(i);
                        let values = self.partials.add(i * self.stride + h * padded + d);
                        sum = s.fma(s.load(values), exp(s, s.splat(m - most)), sum);
                    }
                    s.store_slice(&mut out[d..], s.div(sum, total));
                }
            }
        }
    }
}
