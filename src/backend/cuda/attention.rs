//! Attention: one new token a sequence, all sequences in one launch; many new tokens, a launch a sequence.

use super::block::{bytes_of, plain};
use super::kernels::{Kernel, Module};
use super::queue::{Queue, Use};
use super::{Shared, address};
use crate::backend::{AttentionShape, DType, KvGeometry, KvRuns, Rows, RowsMut, Segment, SlotGeometry, Visible};
use crate::{Error, Result};

plain! {
    struct Runs {
        layer_offset: u64,
        run_bytes: u64,
        extent_tokens: u32,
        head_dim: u32,
    }

    struct DecodeSegment {
        extents: u64,
        listed: u64,
        row: u32,
        first: u32,
        end: u32,
        unused: u32,
    }

    struct Listed {
        rows: u64,
        count: u32,
        unused: u32,
    }

    struct Decode {
        q: u64,
        out: u64,
        partials: u64,
        counters: u64,
        segments: u64,
        q_stride: u64,
        out_stride: u64,
        runs: Runs,
        kv_heads: u32,
        group: u32,
        passes: u32,
        parts: u32,
        slots: u32,
        span: u32,
        lanes: u32,
        scale: f32,
    }

    struct Prefill {
        q: u64,
        out: u64,
        extents: u64,
        q_stride: u64,
        out_stride: u64,
        runs: Runs,
        rows: u32,
        position: u32,
        group: u32,
        window: u32,
        vectors: u32,
        scale: f32,
    }
}

/// Widest head that the kernels hold.
pub(super) const MOST_HEAD_DIM: usize = 256;

/// Threads of a decode block, and the partial results that are merged at a time (`attend_decode.cuh`).
const DECODE_THREADS: usize = 128;
const RADIX: usize = 16;

/// Of a plain decode block (`attend_decode_plain.cu`), tokens of its longest chunk and span of chunks, and what a thread has on
/// its way: steps, rows of a step.
const MOST_CHUNK: usize = 256;
const MOST_SPAN: usize = 256;
const AHEAD: usize = 2;
const UNROLL: usize = 4;

/// Plain blocks for each multiprocessor that there are still, where a block takes several chunks.
const SPAN_BLOCKS: usize = 3;

/// Plain kernels by query heads that a block takes: 1, 2, 4, 8.
const DECODE_PLAIN: [&str; 4] =
    ["attend_decode_f32_1", "attend_decode_f32_2", "attend_decode_f32_4", "attend_decode_f32_8"];

/// Decode kernels that use tensor cores, by the head dimension that they go up to.
const DECODE_MMA_F16: [(usize, &str); 3] =
    [(64, "attend_decode_mma_f16_64"), (128, "attend_decode_mma_f16_128"), (256, "attend_decode_mma_f16_256")];
const DECODE_MMA_BF16: [(usize, &str); 3] =
    [(64, "attend_decode_mma_bf16_64"), (128, "attend_decode_mma_bf16_128"), (256, "attend_decode_mma_bf16_256")];

/// Of a decode block that uses tensor cores (`attend_decode_mma.cuh`): query heads, tokens that its warps take at a time, and
/// bytes that each of these has on its way.
const MMA_HEADS: usize = 8;
const MMA_TOKENS: usize = 64;
const MMA_BYTES: usize = 16 << 10;

/// Segments of one decode launch: a grid's third dimension.
const MOST_SEGMENTS: usize = 65535;

/// Query rows and KV tokens of a prefill tile (`attend_prefill.cu`).
const TILE: usize = 32;

/// Threads of a prefill block that uses tensor cores (`attend_prefill_mma.cu`).
const MMA_THREADS: usize = 128;

/// Prefill kernels that use tensor cores, by head dimension: those of models in 16 bits.
const MMA_F16: [(usize, &str); 5] = [
    (64, "attend_prefill_mma_f16_64"),
    (80, "attend_prefill_mma_f16_80"),
    (96, "attend_prefill_mma_f16_96"),
    (128, "attend_prefill_mma_f16_128"),
    (256, "attend_prefill_mma_f16_256"),
];
const MMA_BF16: [(usize, &str); 5] = [
    (64, "attend_prefill_mma_bf16_64"),
    (80, "attend_prefill_mma_bf16_80"),
    (96, "attend_prefill_mma_bf16_96"),
    (128, "attend_prefill_mma_bf16_128"),
    (256, "attend_prefill_mma_bf16_256"),
];

/// See `Backend::attend`.
pub(super) fn attend(
    shared: &Shared,
    queue: &mut Queue,
    q: Rows<'_>,
    shape: &AttentionShape,
    segments: &[Segment<'_>],
    out: RowsMut<'_>,
) -> Result<()> {
    if shape.head_dim > MOST_HEAD_DIM {
        return Err(Error::unsupported(format!(
            "a head dimension of {}: the CUDA backend attends up to {MOST_HEAD_DIM}",
            shape.head_dim
        )));
    }
    let (single, several): (Vec<&Segment<'_>>, Vec<_>) = segments.iter().partition(|segment| segment.rows == 1);
    let mut single = single.as_slice();
    while let Some(first) = single.first() {
        // Sequences of one model are alike; where they are not, each kind gets a launch.
        let key = |s: &Segment<'_>| (*s.runs.geometry(), s.runs.layer_offset());
        let count = single.iter().take(MOST_SEGMENTS).take_while(|s| key(s) == key(first)).count();
        decode(shared, queue, q, shape, &single[..count], &out)?;
        single = &single[count..];
    }
    several.into_iter().filter(|s| s.rows > 0).try_for_each(|segment| prefill(shared, queue, q, shape, segment, &out))
}

fn runs_of(runs: &KvRuns<'_>) -> Runs {
    let geometry = runs.geometry();
    Runs {
        layer_offset: runs.layer_offset() as u64,
        run_bytes: geometry.run_bytes() as u64,
        extent_tokens: geometry.extent_tokens as u32,
        head_dim: geometry.head_dim as u32,
    }
}

/// Addresses of a sequence's extents; zeros behind them, so that the table's length changes rarely.
pub(super) fn extent_table(runs: &KvRuns<'_>) -> Vec<u64> {
    let mut table: Vec<u64> = (0..runs.extents()).map(|i| address(runs.extent(i))).collect();
    table.resize(table.len().next_power_of_two().max(16), 0);
    table
}

/// Whether a key, and a value behind it, can be read 16 bytes at a time.
pub(super) fn in_vectors(geometry: &KvGeometry) -> bool {
    (geometry.head_dim * geometry.dtype.bytes()).is_multiple_of(16)
}

/// First position that the token at `position` sees.
fn first_seen(shape: &AttentionShape, position: usize) -> usize {
    shape.window.map_or(0, |window| (position + 1).saturating_sub(window))
}

/// Rows that a segment attends: the most of any head.
fn attended(shape: &AttentionShape, segment: &Segment<'_>) -> usize {
    match segment.visible {
        Visible::Causal => segment.position + 1 - first_seen(shape, segment.position),
        Visible::First(counts) => counts.iter().copied().max().unwrap_or(0) as usize,
        Visible::Listed(rows) => rows.iter().map(Vec::len).max().unwrap_or(0),
        Visible::Slots(slots) if slots.by_list => slots.limit.min(slots.geometry.attended),
        Visible::Slots(slots) => slots.limit,
    }
}

/// What serves a decode launch.
struct Decoder {
    kernel: Kernel,
    /// Blocks that the query heads of a KV head take.
    passes: usize,
    /// Of one that uses tensor cores, chunks that a sequence is cut into, at most; 0 for plain ones.
    parts: usize,
    /// Of a plain one, threads that share a row.
    lanes: usize,
}

impl Decoder {
    /// For KV of this type and shape.
    fn new(shared: &Shared, dtype: DType, shape: &AttentionShape) -> Decoder {
        let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        let (module, kernels) = match dtype {
            _ if !(d * dtype.bytes()).is_multiple_of(16) => return Decoder::plain(dtype, d, group, 2, 1),
            DType::F32 => return Decoder::plain(dtype, d, group, group.next_power_of_two().min(8), 4),
            DType::F16 => (Module::AttendDecodeMmaF16, DECODE_MMA_F16),
            DType::BF16 => (Module::AttendDecodeMmaBf16, DECODE_MMA_BF16),
            DType::U32 => unreachable!("keys and values are not u32"),
        };
        let &(most, name) = kernels.iter().find(|(most, _)| d <= *most).expect("`attend` has looked");
        // `Tiles` of the kernel: of each warp some tiles of 16 rows, and the queries where registers do not hold them.
        let row = 2 * 2 * most;
        let tiles = (MMA_BYTES / (16 * row)).max(2);
        let (queries, blocks) = if most <= 128 { (0, 2) } else { (most / 32 * 3 * 512, 1) };
        let kernel = Kernel::new(module, name).with_shared(DECODE_THREADS / 32 * tiles * 16 * row + queries);
        let passes = group.div_ceil(MMA_HEADS);
        // One sequence alone takes the whole device at once: all blocks begin and end together.
        let parts = (blocks * shared.context.multiprocessors / (shape.kv_heads * passes)).max(1);
        Decoder { kernel, passes, parts, lanes: 0 }
    }

    /// A plain one for `tile` query heads, of which a thread reads `width` elements at a time.
    fn plain(dtype: DType, head_dim: usize, group: usize, tile: usize, width: usize) -> Decoder {
        let name = match dtype {
            _ if width > 1 => DECODE_PLAIN[usize::ilog2(tile) as usize],
            DType::F16 => "attend_decode_f16_scalar",
            DType::BF16 => "attend_decode_bf16_scalar",
            _ => "attend_decode_f32_scalar",
        };
        let lanes = (head_dim / width).next_power_of_two().min(32);
        let copies = if width == 1 { 0 } else { AHEAD * UNROLL * DECODE_THREADS * 16 };
        let sums = DECODE_THREADS / 32 * lanes * width;
        let shared_bytes = (4 * tile * (head_dim + MOST_CHUNK + sums) + copies).next_multiple_of(16);
        let kernel = Kernel::new(Module::AttendDecodePlain, name).with_shared(shared_bytes);
        Decoder { kernel, passes: group.div_ceil(tile), parts: 0, lanes }
    }

    /// Tokens of a chunk of a sequence that attends `n`.
    fn chunk_tokens(&self, n: usize) -> usize {
        match n {
            // Every so many-th of them, in fact.
            _ if self.parts > 0 => n.div_ceil(self.parts).next_multiple_of(MMA_TOKENS).max(MMA_TOKENS),
            0..=2048 => 64,
            2049..=8192 => 128,
            _ => MOST_CHUNK,
        }
    }

    /// Chunks of a sequence that attends up to `n`: a power of two, so that the launch stays the same for a while as sequences
    /// grow, or as many as there are at most.
    fn chunks(&self, n: usize) -> usize {
        match self.parts {
            0 => n.div_ceil(self.chunk_tokens(n)).next_power_of_two(),
            parts => n.div_ceil(MMA_TOKENS).next_power_of_two().min(parts),
        }
    }

    /// Partial results of so many chunks, with those that they are merged into.
    fn slots(chunks: usize) -> usize {
        std::iter::successors(Some(chunks), |&left| (left > 1).then(|| left.div_ceil(RADIX))).sum()
    }

    /// Bytes of partial results, and of counters, for `sequences` new tokens.
    fn scratch_bytes(&self, shape: &AttentionShape, sequences: usize, chunks: usize) -> [usize; 2] {
        let slots = sequences * Decoder::slots(chunks);
        [slots * shape.heads * (shape.head_dim + 2) * 4, slots * shape.kv_heads * self.passes * 4]
    }
}

/// Bytes of partial results, and of counters, for `sequences` new tokens that attend `rows` rows each.
pub(super) fn scratch_bytes(
    shared: &Shared,
    shape: &AttentionShape,
    dtype: DType,
    sequences: usize,
    rows: usize,
) -> [usize; 2] {
    let decoder = Decoder::new(shared, dtype, shape);
    decoder.scratch_bytes(shape, sequences, decoder.chunks(rows))
}

/// Sequences with one new token each, of one geometry and layer.
fn decode(
    shared: &Shared,
    queue: &mut Queue,
    q: Rows<'_>,
    shape: &AttentionShape,
    segments: &[&Segment<'_>],
    out: &RowsMut<'_>,
) -> Result<()> {
    let geometry = *segments[0].runs.geometry();
    let decoder = Decoder::new(shared, geometry.dtype, shape);
    let rows = || segments.iter().map(|s| attended(shape, s));
    let chunks = rows().map(|n| decoder.chunks(n)).max().unwrap_or(0);
    let blocks = chunks * shape.kv_heads * decoder.passes * segments.len();
    let span = match decoder.parts {
        0 => {
            let longest = rows().map(|n| decoder.chunk_tokens(n)).max().unwrap_or(MOST_CHUNK);
            let span = blocks / (SPAN_BLOCKS * shared.context.multiprocessors);
            // Chunks that are merged together are of one span, or of whole spans.
            1 << span.clamp(1, MOST_SPAN / longest).min(chunks).ilog2()
        }
        _ => 1,
    };
    let [partials, counters] = decoder.scratch_bytes(shape, segments.len(), chunks);
    let partials = queue.scratch(Use::Partials, partials)?;
    let counters = queue.scratch(Use::Counters, counters)?;

    let tables: Vec<Vec<u64>> = segments.iter().map(|s| extent_table(&s.runs)).collect();
    let bytes = tables.iter().map(|t| 8 * t.len()).sum::<usize>()
        + segments.iter().map(|s| listed_bytes(&s.visible)).sum::<usize>()
        + segments.len() * size_of::<DecodeSegment>();
    queue.reserve(bytes, 3 * segments.len() + 1)?;
    let described: Vec<DecodeSegment> = segments
        .iter()
        .zip(&tables)
        .map(|(segment, table)| DecodeSegment {
            extents: queue.block.push_table(bytes_of(table)),
            listed: push_listed(queue, &segment.visible),
            row: segment.row as u32,
            first: first_seen(shape, segment.position) as u32,
            end: segment.position as u32 + 1,
            unused: 0,
        })
        .collect();
    let params = Decode {
        q: address(q.base()),
        out: address(out.base()),
        partials,
        counters,
        segments: queue.block.push(bytes_of(&described)),
        q_stride: q.stride() as u64,
        out_stride: out.stride() as u64,
        runs: runs_of(&segments[0].runs),
        kv_heads: shape.kv_heads as u32,
        group: (shape.heads / shape.kv_heads) as u32,
        passes: decoder.passes as u32,
        parts: decoder.parts as u32,
        slots: Decoder::slots(chunks) as u32,
        span: span as u32,
        lanes: decoder.lanes as u32,
        scale: shape.scale,
    };
    let grid = [chunks.div_ceil(span), shape.kv_heads * decoder.passes, segments.len()];
    queue.push(shared, decoder.kernel, grid, DECODE_THREADS, &params)
}

const _: () = assert!(size_of::<Listed>() == 4 * SlotGeometry::COUNT);

/// Bytes, at most, that [`push_listed`] puts into the block.
pub(super) fn listed_bytes(visible: &Visible<'_>) -> usize {
    match visible {
        Visible::Causal | Visible::Slots(_) => 0,
        Visible::First(counts) => counts.len() * size_of::<Listed>(),
        Visible::Listed(rows) => {
            rows.iter().map(|rows| 4 * rows.len() + 16).sum::<usize>() + rows.len() * size_of::<Listed>()
        }
    }
}

/// Puts the rows that a segment attends into the block, 0 where they are all rows up to a position.
pub(super) fn push_listed(queue: &mut Queue, visible: &Visible<'_>) -> u64 {
    let listed: Vec<Listed> = match visible {
        Visible::Causal => return 0,
        // The tables begin with what `Listed` is, and so do their lists.
        Visible::Slots(slots) => {
            let counts = SlotGeometry::COUNT * slots.layer * slots.geometry.kv_heads;
            let word = if slots.by_list { slots.geometry.attended_lists_at() } else { counts };
            return address(slots.tables.address()) + 4 * word as u64;
        }
        Visible::First(counts) => counts.iter().map(|&count| Listed { rows: 0, count, unused: 0 }).collect(),
        Visible::Listed(rows) => rows
            .iter()
            // An empty list must not look like no list.
            .map(|rows| Listed { rows: queue.block.push(bytes_of(rows)), count: rows.len() as u32, unused: 0 })
            .collect(),
    };
    queue.block.push(bytes_of(&listed))
}

/// Consecutive new tokens of one sequence.
fn prefill(
    shared: &Shared,
    queue: &mut Queue,
    q: Rows<'_>,
    shape: &AttentionShape,
    segment: &Segment<'_>,
    out: &RowsMut<'_>,
) -> Result<()> {
    assert!(matches!(segment.visible, Visible::Causal), "segments of several rows are causal");
    let geometry = *segment.runs.geometry();
    let table = extent_table(&segment.runs);
    queue.reserve(8 * table.len(), 1)?;
    let rows = q.row_range(segment.row, segment.rows);
    let params = Prefill {
        q: address(rows.base()),
        out: address(out.base()) + (segment.row * out.stride() * 4) as u64,
        extents: queue.block.push_table(bytes_of(&table)),
        q_stride: q.stride() as u64,
        out_stride: out.stride() as u64,
        runs: runs_of(&segment.runs),
        rows: segment.rows as u32,
        position: segment.position as u32,
        group: (shape.heads / shape.kv_heads) as u32,
        // A window longer than any position is none.
        window: shape.window.map_or(0, |window| u32::try_from(window).unwrap_or(0)),
        vectors: in_vectors(&geometry).into(),
        scale: shape.scale,
    };
    if let Some(tiles) = mma_tiles(shape, &geometry) {
        let grid = [shape.heads, segment.rows.div_ceil(tiles.rows), 1];
        return queue.push(shared, tiles.kernel, grid, MMA_THREADS, &params);
    }
    let names = match geometry.dtype {
        DType::F32 => ["attend_prefill_f32_64", "attend_prefill_f32_128", "attend_prefill_f32_256"],
        DType::F16 => ["attend_prefill_f16_64", "attend_prefill_f16_128", "attend_prefill_f16_256"],
        DType::BF16 => ["attend_prefill_bf16_64", "attend_prefill_bf16_128", "attend_prefill_bf16_256"],
        DType::U32 => unreachable!("keys and values are not u32"),
    };
    let name = match geometry.head_dim {
        0..=64 => names[0],
        65..=128 => names[1],
        _ => names[2],
    };
    let stride = geometry.head_dim.next_multiple_of(4) + 4;
    let kernel = Kernel::new(Module::AttendPrefill, name).with_shared(4 * 2 * TILE * stride);
    queue.push(shared, kernel, [segment.rows.div_ceil(TILE), shape.heads, 1], 256, &params)
}

/// A prefill kernel that uses tensor cores, and the query rows that a block of it takes.
struct MmaTiles {
    kernel: Kernel,
    rows: usize,
}

/// What serves a shape on tensor cores; None: nothing, the kernel of plain products does.
fn mma_tiles(shape: &AttentionShape, geometry: &KvGeometry) -> Option<MmaTiles> {
    let d = geometry.head_dim;
    let kernels = match geometry.dtype {
        DType::F16 => MMA_F16,
        DType::BF16 => MMA_BF16,
        _ => return None,
    };
    let &(_, name) = kernels.iter().find(|(dimension, _)| *dimension == d)?;
    // The kernel takes the largest score before it is scaled.
    if shape.scale <= 0.0 {
        return None;
    }
    // `Layout` of the kernel: bytes of a row in shared memory, and what lies there: queries, and two tiles of KV.
    let (rows, tokens) = if d <= 128 { (128, 64) } else { (64, 32) };
    let pieces = d / 8;
    let stride = 16 * if pieces.is_multiple_of(8) { pieces } else { pieces | 1 };
    let kernel = Kernel::new(Module::AttendPrefillMma, name).with_shared((rows + 2 * 2 * tokens) * stride);
    Some(MmaTiles { kernel, rows })
}
