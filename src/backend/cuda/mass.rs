//! How much of the attention of some rows each token gets.

use super::attention::{MOST_HEAD_DIM, extent_table, in_vectors, listed_bytes, push_listed};
use super::block::{bytes_of, plain};
use super::kernels::{Kernel, Module};
use super::queue::{Queue, Use};
use super::{Shared, address};
use crate::backend::{AttentionShape, DType, Rows, RowsMut, Segment, Visible};
use crate::{Error, Result};

plain! {
    struct Mass {
        q: u64,
        extents: u64,
        listed: u64,
        out: u64,
        parts: u64,
        norms: u64,
        q_stride: u64,
        out_stride: u64,
        layer_offset: u64,
        run_bytes: u64,
        extent_tokens: u32,
        head_dim: u32,
        rows: u32,
        position: u32,
        group: u32,
        window: u32,
        chunks: u32,
        kv_heads: u32,
        padded: u32,
        vectors: u32,
        scale: f32,
        unused: u32,
    }
}

/// Rows that are worked on together: what passes between the kernels is bounded by it.
const SLAB: usize = 256;

/// Queries and tokens of a tile, tokens of a chunk, threads of a block (`attention_mass.cu`).
const TILE: usize = 32;
const CHUNK: usize = 1024;
const THREADS: usize = 256;

/// Bytes of scratch memory for segments of `rows` rows over `tokens` tokens.
pub(super) fn scratch_bytes(shape: &AttentionShape, rows: usize, tokens: usize) -> usize {
    let padded = (rows.min(SLAB) * (shape.heads / shape.kv_heads)).next_multiple_of(TILE);
    (tokens.div_ceil(CHUNK) + 1) * shape.kv_heads * padded * 8
}

/// See `Backend::attention_mass`.
pub(super) fn mass(
    shared: &Shared,
    queue: &mut Queue,
    q: Rows<'_>,
    shape: &AttentionShape,
    segment: &Segment<'_>,
    out: &RowsMut<'_>,
) -> Result<()> {
    if shape.head_dim > MOST_HEAD_DIM {
        return Err(Error::unsupported(format!(
            "a head dimension of {}: the CUDA backend attends up to {MOST_HEAD_DIM}",
            shape.head_dim
        )));
    }
    let geometry = *segment.runs.geometry();
    let [parts, add] = match geometry.dtype {
        DType::F32 => ["mass_parts_f32", "mass_add_f32"],
        DType::F16 => ["mass_parts_f16", "mass_add_f16"],
        DType::BF16 => ["mass_parts_bf16", "mass_add_bf16"],
        DType::U32 => unreachable!("keys and values are not u32"),
    };
    let (kv_heads, group) = (shape.kv_heads, shape.heads / shape.kv_heads);
    let stride = geometry.head_dim.next_multiple_of(4) + 4;
    let kernel = |name| Kernel::new(Module::AttentionMass, name).with_shared(4 * 2 * TILE * stride);
    let table = extent_table(&segment.runs);
    for first in (0..segment.rows).step_by(SLAB) {
        let rows = (segment.rows - first).min(SLAB);
        let tokens = match segment.visible {
            Visible::Causal => segment.position + first + rows,
            Visible::First(counts) => counts.iter().copied().max().unwrap_or(0) as usize,
            Visible::Listed(rows) => rows.iter().map(Vec::len).max().unwrap_or(0),
            Visible::Slots(_) => unreachable!("slots are not ranked"),
        };
        let (chunks, padded) = (tokens.div_ceil(CHUNK), (rows * group).next_multiple_of(TILE));
        // Two floats a query and KV head: of each chunk, then of all.
        let pairs = kv_heads * padded * 8;
        let scratch = queue.scratch(Use::Partials, (chunks + 1) * pairs)?;
        queue.reserve(8 * table.len() + listed_bytes(&segment.visible), kv_heads + 2)?;
        let params = Mass {
            q: address(q.row_range(segment.row + first, rows).base()),
            extents: queue.block.push_table(bytes_of(&table)),
            listed: push_listed(queue, &segment.visible),
            out: address(out.base()),
            parts: scratch,
            norms: scratch + (chunks * pairs) as u64,
            q_stride: q.stride() as u64,
            out_stride: out.stride() as u64,
            layer_offset: segment.runs.layer_offset() as u64,
            run_bytes: geometry.run_bytes() as u64,
            extent_tokens: geometry.extent_tokens as u32,
            head_dim: geometry.head_dim as u32,
            rows: rows as u32,
            position: (segment.position + first) as u32,
            group: group as u32,
            // A window longer than any position is none.
            window: shape.window.map_or(0, |window| u32::try_from(window).unwrap_or(0)),
            chunks: chunks as u32,
            kv_heads: kv_heads as u32,
            padded: padded as u32,
            vectors: in_vectors(&geometry).into(),
            scale: shape.scale,
            unused: 0,
        };
        queue.push(shared, kernel(parts), [chunks, padded / TILE, kv_heads], THREADS, &params)?;
        let norms = Kernel::new(Module::AttentionMass, "mass_norms");
        queue.push(shared, norms, [padded.div_ceil(THREADS), kv_heads, 1], THREADS, &params)?;
        queue.push(shared, kernel(add), [tokens.div_ceil(TILE), kv_heads, 1], THREADS, &params)?;
    }
    Ok(())
}
