//! Attention of many new tokens, as matrix products of tiles.
//!
//! A piece of work is one tile of query rows (some tokens × the query heads that share a KV head). It walks the KV it may
//! see in blocks of [`BLOCK`] tokens: scores = queries · keysᵀ, their weights under the online softmax, then values +=
//! weights · V. Keys and values are packed into the unit's form once per tile and block; scratch memory is a tile's.

use super::super::CpuBackend;
use super::super::memory::ALIGN;
use super::super::simd::{Element, Kernel, LANES, Proven, Simd, exp};
use super::super::unit::{PANEL, Runner, Task, Unit};
use super::super::view::{Shared, row};
use super::{LEAST, first_seen};
use crate::Result;
use crate::backend::{AttentionShape, Rows, RowsMut, Segment};
use std::marker::PhantomData;

/// KV tokens of a block; blocks begin at multiples of it.
const BLOCK: usize = 128;

/// Query rows that a tile aims at: enough to make the packing of a block cheap beside its use.
const TILE_ROWS: usize = 192;

/// Tokens of a tile, a function of the shape alone.
fn tile_tokens(group: usize) -> usize {
    let tokens = TILE_ROWS.div_ceil(group).clamp(1, 128);
    if tokens > 8 { tokens.next_multiple_of(32) } else { tokens }
}

/// Byte offsets of a tile's scratch memory.
#[derive(Clone, Copy)]
struct Layout {
    /// Scaled queries, f32, packed as A.
    packed_queries: usize,
    /// Panels of keys.
    keys: usize,
    key_panel: usize,
    /// Panels of values.
    values: usize,
    value_panel: usize,
    /// Scores, then weights: rows of [`BLOCK`] floats.
    scores: usize,
    /// Weights, packed as A.
    packed_weights: usize,
    /// Weighted values: rows of `out_stride` floats. Before the first block: the scaled queries.
    out: usize,
    out_stride: usize,
    /// m, l of each row.
    state: usize,
    bytes: usize,
}

impl Layout {
    fn new<E: Element, R: Runner<E>>(unit: R, rows: usize, head_dim: usize) -> Layout {
        let (query, weight) = (unit.sizes(head_dim), unit.sizes(BLOCK));
        let padded_rows = rows.next_multiple_of(query.rows);
        let out_stride = head_dim.next_multiple_of(PANEL);
        let mut bytes = 0;
        let mut place = |size: usize| {
            let at = bytes;
            bytes += size.next_multiple_of(ALIGN);
            at
        };
        Layout {
            packed_queries: place(padded_rows * query.a_row_bytes),
            keys: place(BLOCK.div_ceil(PANEL) * query.panel_bytes),
            key_panel: query.panel_bytes,
            values: place(out_stride / PANEL * weight.panel_bytes),
            value_panel: weight.panel_bytes,
            scores: place(padded_rows * BLOCK * 4),
            packed_weights: place(padded_rows * weight.a_row_bytes),
            out: place(padded_rows * out_stride * 4),
            out_stride,
            state: place(padded_rows * 2 * 4),
            bytes,
        }
    }
}

/// Bytes of a thread's scratch memory for segments of `rows` rows.
pub(super) fn tile_bytes<E: Element, R: Runner<E>>(unit: R, shape: &AttentionShape, rows: usize) -> usize {
    let group = shape.heads / shape.kv_heads;
    Layout::new::<E, R>(unit, tile_tokens(group).min(rows) * group, shape.head_dim).bytes
}

/// Attention of one segment.
pub(super) fn attend<E: Element, R: Runner<E>>(
    cpu: &CpuBackend,
    unit: R,
    q: Rows<'_>,
    shape: &AttentionShape,
    segment: &Segment<'_>,
    out: &RowsMut<'_>,
) -> Result<()> {
    let group = shape.heads / shape.kv_heads;
    let tile = tile_tokens(group).min(segment.rows);
    let layout = Layout::new::<E, R>(unit, tile * group, shape.head_dim);
    let mut scratch = cpu.scratch.take(cpu.pool.threads() * layout.bytes, "a tile of attention")?;
    let scratch = Shared(scratch.address_mut());
    let tiles = segment.rows.div_ceil(tile);
    cpu.pool.split_indexed(tiles * shape.kv_heads, 1, &|thread, range| {
        for piece in range {
            // The longest tiles come first, so that threads end together.
            let (head, index) = (piece % shape.kv_heads, tiles - 1 - piece / shape.kv_heads);
            let first = index * tile;
            // SAFETY: every thread has `layout.bytes` of the scratch memory to itself.
            let place = unsafe { scratch.get().add(thread * layout.bytes) };
            unit.run(Tile {
                level: cpu.level,
                layout,
                shape,
                segment,
                q,
                out,
                head,
                first,
                tokens: (segment.rows - first).min(tile),
                place,
                e: PhantomData,
            });
        }
    });
    Ok(())
}

/// One piece of work.
struct Tile<'a, E> {
    level: Proven,
    layout: Layout,
    shape: &'a AttentionShape,
    segment: &'a Segment<'a>,
    q: Rows<'a>,
    out: &'a RowsMut<'a>,
    /// KV head.
    head: usize,
    /// First token, counted from the segment's.
    first: usize,
    tokens: usize,
    /// `layout.bytes` bytes.
    place: *mut u8,
    e: PhantomData<E>,
}

impl<E: Element> Task<E> for Tile<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<U: Unit<E>>(self, unit: U) {
        let _session = unit.session();
        let group = self.shape.heads / self.shape.kv_heads;
        let d = self.shape.head_dim;
        let rows = self.tokens * group;
        let Layout { out_stride, key_panel, value_panel, .. } = self.layout;
        let position = self.segment.position + self.first;
        // SAFETY: offsets into this piece's own `layout.bytes` bytes, each part sized for the rows of a whole tile, of
        // which this one has at most as many; all are multiples of 64.
        let (queries, keys, values, scores, weights, sums, state) = unsafe {
            (
                self.place.add(self.layout.packed_queries),
                self.place.add(self.layout.keys),
                self.place.add(self.layout.values),
                self.place.add(self.layout.scores).cast::<f32>(),
                self.place.add(self.layout.packed_weights),
                self.place.add(self.layout.out).cast::<f32>(),
                self.place.add(self.layout.state).cast::<f32>(),
            )
        };
        // Row r of the tile is query head r % group of token r / group.
        for r in 0..rows {
            let from = row(&self.q, self.segment.row + self.first + r / group);
            let from = &from[(self.head * group + r % group) * d..][..d];
            // SAFETY: row r of `sums` has out_stride ≥ d floats.
            let to = unsafe { std::slice::from_raw_parts_mut(sums.add(r * out_stride), d) };
            to.iter_mut().zip(from).for_each(|(to, from)| *to = from * self.shape.scale);
            // SAFETY: m and l of row r.
            unsafe {
                state.add(2 * r).write(LEAST);
                state.add(2 * r + 1).write(0.0);
            }
        }
        // SAFETY: `rows` rows of d floats; `queries` was sized for them.
        unsafe { unit.pack_a(sums, out_stride, rows, d, queries, 0) };

        let end = position + self.tokens;
        let mut block = first_seen(self.shape, position) / BLOCK * BLOCK;
        let mut add = false;
        while block < end {
            let count = (end - block).min(BLOCK);
            let addresses = self.rows_of(block, count);
            for (i, columns) in addresses[..count].chunks(PANEL).enumerate() {
                // SAFETY: each address is a key of d elements; panel i of the keys is packed and used here only. The
                // scores of a row are BLOCK floats, of which these columns are written.
                unsafe {
                    let panel = keys.add(i * key_panel);
                    unit.pack_columns(columns, d, panel);
                    unit.multiply(queries, 0, rows, panel, d, scores.add(i * PANEL), BLOCK, columns.len(), false);
                }
            }
            self.level.run(Soften {
                rows,
                group,
                position,
                window: self.shape.window,
                block,
                count,
                scores,
                state,
                sums,
                width: d,
                stride: out_stride,
                add,
            });
            // SAFETY: the weights have taken the scores' place; depth is `count` in both operands.
            unsafe { unit.pack_a(scores, BLOCK, rows, count, weights, 0) };
            for (i, from) in (0..d).step_by(PANEL).enumerate() {
                let width = (d - from).min(PANEL);
                let mut slices = [std::ptr::null::<E>(); BLOCK];
                for (slice, key) in slices.iter_mut().zip(&addresses[..count]) {
                    // SAFETY: the value of d elements lies behind the key.
                    *slice = unsafe { key.add(d + from) };
                }
                // SAFETY: `width` elements of each value from `from` on; rows of `sums` have out_stride floats.
                unsafe {
                    let panel = values.add(i * value_panel);
                    unit.pack_rows(&slices[..count], width, panel);
                    unit.multiply(weights, 0, rows, panel, count, sums.add(from), out_stride, width, add);
                }
            }
            add = true;
            block += BLOCK;
        }

        for r in 0..rows {
            // SAFETY: l of row r and its d sums; the columns of this head in this token's row of `out` belong to this
            // piece of work alone.
            unsafe {
                let sum = state.add(2 * r + 1).read();
                let from = std::slice::from_raw_parts(sums.add(r * out_stride), d);
                let token = self.segment.row + self.first + r / group;
                let column = (self.head * group + r % group) * d;
                let to = self.out.base().cast::<f32>().add(token * self.out.stride() + column);
                let to = std::slice::from_raw_parts_mut(to, d);
                to.iter_mut().zip(from).for_each(|(to, from)| *to = from / sum);
            }
        }
    }
}

impl<E: Element> Tile<'_, E> {
    /// Addresses of the rows of K and V of `count` positions from `position` on.
    #[inline(always)]
    fn rows_of(&self, position: usize, count: usize) -> [*const E; BLOCK] {
        let geometry = self.segment.runs.geometry();
        let mut out = [std::ptr::null(); BLOCK];
        let mut i = 0;
        while i < count {
            let (extent, token) = ((position + i) / geometry.extent_tokens, (position + i) % geometry.extent_tokens);
            let here = (geometry.extent_tokens - token).min(count - i);
            let run = self.segment.runs.run(extent, self.head).cast::<E>();
            for j in 0..here {
                // SAFETY: token + j < extent_tokens rows of 2·d elements in the run.
                out[i + j] = unsafe { run.add((token + j) * 2 * geometry.head_dim) };
            }
            i += here;
        }
        out
    }
}

/// Turns a block's scores into weights, and shrinks what earlier blocks left in `sums` where a larger score came.
struct Soften {
    rows: usize,
    group: usize,
    /// Of row 0's token.
    position: usize,
    window: Option<usize>,
    /// First position of the block.
    block: usize,
    count: usize,
    scores: *mut f32,
    state: *mut f32,
    sums: *mut f32,
    width: usize,
    stride: usize,
    /// Whether `sums` holds anything yet.
    add: bool,
}

impl Kernel for Soften {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        const LANE: [f32; LANES] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
        let lane = s.load_slice(&LANE);
        for r in 0..self.rows {
            // What the row's token sees of the block, as columns from..to.
            let position = self.position + r / self.group;
            let to = (position + 1).saturating_sub(self.block).min(self.count);
            let from = self.window.map_or(0, |w| (position + 1).saturating_sub(w).saturating_sub(self.block).min(to));
            // SAFETY: row r of the scores has BLOCK floats, whole vectors, of which `count` are scores; m and l of row r;
            // `width` sums of row r. All are this thread's own.
            unsafe {
                let scores = self.scores.add(r * BLOCK);
                let state = self.state.add(2 * r);
                let mut largest = s.splat(LEAST);
                for i in (0..self.count).step_by(LANES) {
                    let mut x = s.load(scores.add(i));
                    if i < from || i + LANES > to {
                        let before = s.if_less(lane, s.splat(from as f32 - i as f32), s.splat(f32::NEG_INFINITY), x);
                        x = s.if_less(lane, s.splat(to as f32 - i as f32), before, s.splat(f32::NEG_INFINITY));
                        s.store(scores.add(i), x);
                    }
                    largest = s.max(largest, x);
                }
                let (before, mut sum) = (state.read(), state.add(1).read());
                let most = before.max(s.largest(largest));
                if most > before {
                    let shrink = exp(s, s.splat(before - most));
                    sum *= s.sum(shrink) / LANES as f32;
                    for i in (0..if self.add { self.width } else { 0 }).step_by(LANES) {
                        let at = self.sums.add(r * self.stride + i);
                        let n = (self.width - i).min(LANES);
                        s.store_first(at, n, s.mul(s.load_first(at, n), shrink));
                    }
                }
                let mut total = s.zero();
                for i in (0..self.count).step_by(LANES) {
                    let weight = exp(s, s.sub(s.load(scores.add(i)), s.splat(most)));
                    s.store(scores.add(i), weight);
                    total = s.add(total, weight);
                }
                state.write(most);
                state.add(1).write(sum + s.sum(total));
            }
        }
    }
}
