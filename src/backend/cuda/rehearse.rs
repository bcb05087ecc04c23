//! Rehearsals of attention on an index, and the rows that they select: four launches for all sequences of a call, and one
//! more each for those that are corrected and those that want the tail.
//!
//! [`rehearse_into`] leaves the lists in device memory and waits for nothing, so that it may be part of a step that is
//! replayed; [`rehearse`] is the operation of the backend, which hands them to the host.

use super::block::{bytes_of, plain};
use super::index::{bits, extent_table};
use super::kernels::{Kernel, Module};
use super::queue::{Queue, Use};
use super::slots::{self, Joining};
use super::tail;
use super::{Shared, address};
use crate::Result;
use crate::backend::{Buffer, DType, Place, Rehearsal, Replay, Rows, Selected, Selection};

plain! {
    struct Sequence {
        extents: u64,
        scores: u64,
        keys: u64,
        better: u64,
        level: u64,
        histograms: u64,
        states: u64,
        stats: u64,
        attended_sums: u64,
        shifts: u64,
        out_rows: u64,
        out_counts: u64,
        replay: u64,
        row: u32,
        rows: u32,
        from: u32,
        to: u32,
        stride: u32,
        capacity: u32,
        rule: u32,
        least: u32,
        most: u32,
        limit: f32,
        scale: f32,
        seed: u32,
        step: u32,
        period: u32,
        attended: tail::Attended,
    }

    struct Replayed {
        table: u64,
        lists: u64,
        heads: u32,
        first: u32,
        narrow: u32,
        wide: u32,
        shift: u32,
        unused: u32,
    }

    struct Rehearse {
        queries: u64,
        sequences: u64,
        queries_stride: u64,
        layer_offset: u64,
        run_bytes: u64,
        extent_tokens: u32,
        kv_heads: u32,
        group: u32,
        columns: u32,
        words: u32,
        passes: u32,
    }
}

/// Rows of a chunk, bins of a histogram, bytes of a KV head's state, warps of a block that ranks, threads of one that selects
/// (`rehearse.cu`).
const CHUNK: usize = 1024;
const BINS: usize = 2048;
const STATE: usize = 16;
const WARPS: usize = 8;
const SELECT: usize = 512;

/// Scratch memory that the sequences of one launch share; a longer call takes several.
const MOST_SCRATCH: usize = 256 << 20;

/// Sequences of one launch: a grid's third dimension.
const MOST_SEQUENCES: usize = 65535;

/// Rows of all KV heads and sequences up to which a rehearsal leaves room for launches that begin early. Beyond, it is what a step
/// waits for. (Measured on an H200: a step of llama-3-8b takes 8% less with them at 32,000 tokens, 6% more at 131,000.)
const MOST_BESIDE: usize = 1 << 19;

/// Bytes of lists that are fetched with their counts, without a look at how long the lists are.
const SMALL_LISTS: usize = 256 << 10;

/// Where the lists of one rehearsal go: device addresses of `rows`, u32 `[kv_heads][most]`, and of `counts`, u32
/// `[kv_heads]`. A list never gets longer than `most`, whatever the rule says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lists {
    pub(super) rows: u64,
    pub(super) counts: u64,
    pub(super) most: u32,
    /// Given, where the lists are only what a correction is made of, in memory that it may write.
    pub(super) correction: Option<Joining>,
    /// Given, where the tail is wanted: behind the correction, if there is one.
    pub(super) tail: Option<tail::Wanted>,
}

/// What a rehearsal takes of scratch memory, in bytes from its start, where scores lie.
struct Layout {
    /// Floats of a query head's scores: a power of two of chunks, so that memory and launches change rarely.
    stride: usize,
    keys: usize,
    better: usize,
    level: usize,
    histograms: usize,
    states: usize,
    stats: usize,
    attended_sums: usize,
    shifts: usize,
    bytes: usize,
}

impl Layout {
    fn new(rehearsal: &Rehearsal<'_>, heads: usize) -> Layout {
        Layout::of(rehearsal.rows, heads, rehearsal.runs.geometry().kv_heads)
    }

    fn of(rows: usize, heads: usize, kv_heads: usize) -> Layout {
        let chunks = rows.div_ceil(CHUNK).next_power_of_two();
        // What is read 16 bytes at a time comes first.
        let keys = 4 * heads * chunks * CHUNK;
        let better = keys + 4 * kv_heads * chunks * CHUNK;
        let level = better + kv_heads * chunks * CHUNK / 8;
        let histograms = level + kv_heads * chunks * CHUNK / 8;
        let states = histograms + 4 * kv_heads * BINS;
        let stats = states + STATE * kv_heads;
        let attended_sums = stats + 8 * heads * chunks;
        let shifts = attended_sums + 4 * heads * chunks;
        let bytes = (shifts + 4 * heads).next_multiple_of(256);
        Layout { stride: chunks * CHUNK, keys, better, level, histograms, states, stats, attended_sums, shifts, bytes }
    }

    fn chunks(&self) -> usize {
        self.stride / CHUNK
    }
}

/// Bytes of scratch memory for rehearsals of `count` sequences over `rows` rows each.
pub(super) fn scratch_bytes(rows: usize, heads: usize, kv_heads: usize, count: usize) -> usize {
    let each = Layout::of(rows, heads, kv_heads).bytes;
    each * count.min((MOST_SCRATCH / each).max(1))
}

/// As `Backend::rehearse`, with the lists into device memory. Enqueues launches only. What changes from step to step lies
/// in the block, and grids depend on lengths that are rounded to powers of two.
pub(super) fn rehearse_into(
    shared: &Shared,
    queue: &mut Queue,
    queries: Rows<'_>,
    rehearsals: &[Rehearsal<'_>],
    outs: &[Lists],
) -> Result<()> {
    assert_eq!(rehearsals.len(), outs.len());
    let (mut rehearsals, mut outs) = (rehearsals, outs);
    while let Some(first) = rehearsals.first() {
        // Sequences of one model are alike; where they are not, each kind gets launches of its own.
        let key = |r: &Rehearsal<'_>| (*r.runs.geometry(), r.runs.layer_offset());
        let heads = queries.cols() / first.runs.geometry().columns;
        let mut bytes = 0;
        let count = rehearsals
            .iter()
            .take(MOST_SEQUENCES)
            .take_while(|r| {
                bytes += Layout::new(r, heads).bytes;
                key(r) == key(first) && bytes <= MOST_SCRATCH
            })
            .count()
            .max(1);
        launch(shared, queue, queries, heads, &rehearsals[..count], &outs[..count])?;
        (rehearsals, outs) = (&rehearsals[count..], &outs[count..]);
    }
    Ok(())
}

/// Sequences of one geometry and layer.
fn launch(
    shared: &Shared,
    queue: &mut Queue,
    queries: Rows<'_>,
    heads: usize,
    rehearsals: &[Rehearsal<'_>],
    outs: &[Lists],
) -> Result<()> {
    let geometry = *rehearsals[0].runs.geometry();
    let (kv_heads, group) = (geometry.kv_heads, heads / geometry.kv_heads);
    let layouts: Vec<Layout> = rehearsals.iter().map(|r| Layout::new(r, heads)).collect();
    let mut scratch = queue.scratch(Use::Rehearsals, layouts.iter().map(|l| l.bytes).sum())?;
    let tables: Vec<Vec<u64>> =
        rehearsals.iter().map(|r| extent_table((0..r.runs.extents()).map(|i| r.runs.extent(i)))).collect();
    let each =
        size_of::<Sequence>() + size_of::<tail::Sequence>() + size_of::<Replayed>() + size_of::<slots::Correct>();
    let bytes = tables.iter().map(|t| 8 * t.len()).sum::<usize>() + rehearsals.len() * each;
    queue.reserve(bytes, 2 * rehearsals.len() + 3)?;
    let sequences: Vec<Sequence> = rehearsals
        .iter()
        .zip(&tables)
        .zip(layouts.iter().zip(outs))
        .map(|((rehearsal, table), (layout, out))| {
            let at = scratch;
            scratch += layout.bytes as u64;
            let extents = queue.block.push_table(bytes_of(table));
            let replay = match &rehearsal.selection {
                Selection::Replay { replay, .. } => queue.block.push(bytes_of(&[replayed(replay)])),
                _ => 0,
            };
            Sequence { replay, ..describe(rehearsal, extents, layout, at, out) }
        })
        .collect();

    let words = geometry.row_bytes() / 4;
    let bits = bits(&geometry);
    let tile = match group {
        1 => 1,
        2..=4 => 4,
        _ => 8,
    };
    let passes = group.div_ceil(tile);
    let params = Rehearse {
        queries: address(queries.base()),
        sequences: queue.block.push(bytes_of(&sequences)),
        queries_stride: queries.stride() as u64,
        layer_offset: rehearsals[0].runs.layer_offset() as u64,
        run_bytes: geometry.run_bytes() as u64,
        extent_tokens: geometry.extent_tokens as u32,
        kv_heads: kv_heads as u32,
        group: group as u32,
        columns: geometry.columns as u32,
        words: words as u32,
        passes: passes as u32,
    };
    let chunks = layouts.iter().map(Layout::chunks).max().expect("there is a rehearsal");
    let count = rehearsals.len();
    // A word of four-bit columns meets two words of a query.
    let query_bytes = tile * words * if bits == 4 { 8 } else { 4 };
    let score = Kernel::new(Module::Rehearse, score_kernel(bits, words, tile)).with_shared(query_bytes);
    // As many blocks as multiprocessors: see the kernels.
    let spans = |heads: usize| (shared.context.multiprocessors / (heads * count)).clamp(1, chunks);
    queue.push(shared, score, [spans(kv_heads * passes), kv_heads * passes, count], CHUNK / 4, &params)?;
    // What is subtracted from each head and its best rank, and of each warp what is attended of two chunks.
    let shared_bytes = (4 * group * (2 + 2 * WARPS)).next_multiple_of(16);
    let rank = Kernel::new(Module::Rehearse, "rehearse_rank").with_shared(shared_bytes);
    let grid = [spans(kv_heads), kv_heads, count];
    queue.push(shared, rank, grid, CHUNK / 4, &params)?;
    queue.push(shared, Kernel::new(Module::Rehearse, "rehearse_mark"), grid, CHUNK / 4, &params)?;
    queue.push(shared, Kernel::new(Module::Rehearse, "rehearse_select"), [kv_heads, 1, count], SELECT, &params)?;
    if layouts.iter().map(|layout| layout.stride * kv_heads).sum::<usize>() > MOST_BESIDE {
        queue.crowd();
    }

    let corrections: Vec<slots::Correct> = sequences
        .iter()
        .zip(outs)
        .filter_map(|(s, out)| {
            out.correction.map(|joining| joining.of((s.keys, s.stride), (s.out_rows, s.out_counts, s.capacity)))
        })
        .collect();
    if !corrections.is_empty() {
        slots::correct(shared, queue, &corrections, kv_heads)?;
    }
    let tails: Vec<tail::Sequence> = sequences
        .iter()
        .zip(outs)
        .filter_map(|(sequence, out)| {
            let picked = (sequence.out_rows, sequence.out_counts, sequence.capacity);
            let selected = out.correction.map_or(picked, |joining| joining.lists());
            out.tail.map(|tail| sequence.with_tail(tail.weights, selected))
        })
        .collect();
    if tails.is_empty() { Ok(()) } else { tail::weigh(shared, queue, &tails, heads, group) }
}

impl Sequence {
    /// What a tail is found from, once rows have been selected: lists, counts, and their capacity.
    fn with_tail(&self, weights: u64, (selected, selected_counts, capacity): (u64, u64, u32)) -> tail::Sequence {
        tail::Sequence {
            scores: self.scores,
            shifts: self.shifts,
            attended_sums: self.attended_sums,
            selected,
            selected_counts,
            weights,
            stride: self.stride,
            sums_stride: self.stride / CHUNK as u32,
            chunks: self.rows.div_ceil(CHUNK as u32),
            capacity,
            attended: self.attended,
        }
    }
}

/// What the kernels know of one rehearsal whose scratch memory is at `scratch`.
fn describe(rehearsal: &Rehearsal<'_>, extents: u64, layout: &Layout, scratch: u64, out: &Lists) -> Sequence {
    let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let (rule, limit, least, most) = match rehearsal.selection {
        Selection::Count { count } => (0, 0.0, number(count), number(count)),
        Selection::Probability { below, least, most } => (1, below, number(least), number(most)),
        Selection::Paper { alpha, most } => (2, alpha, 1, number(most)),
        Selection::Random { count, .. } => (3, 0.0, number(count), number(count)),
        Selection::Replay { most, .. } => (4, 0.0, 0, number(most)),
    };
    let (seed, step, period) = match rehearsal.selection {
        Selection::Random { seed, step, period, .. } => (seed, step, period),
        _ => (0, 0, 1),
    };
    Sequence {
        extents,
        scores: scratch,
        keys: scratch + layout.keys as u64,
        better: scratch + layout.better as u64,
        level: scratch + layout.level as u64,
        histograms: scratch + layout.histograms as u64,
        states: scratch + layout.states as u64,
        stats: scratch + layout.stats as u64,
        attended_sums: scratch + layout.attended_sums as u64,
        shifts: scratch + layout.shifts as u64,
        out_rows: out.rows,
        out_counts: out.counts,
        replay: 0,
        row: rehearsal.row as u32,
        rows: rehearsal.rows as u32,
        from: rehearsal.from as u32,
        to: rehearsal.to as u32,
        stride: layout.stride as u32,
        capacity: out.most,
        rule,
        least,
        most,
        limit,
        scale: rehearsal.scale,
        seed,
        step,
        period,
        attended: out.tail.map_or(tail::Attended::default(), |tail| tail.attended),
    }
}

/// A replay as the kernels know it.
fn replayed(replay: &Replay<'_>) -> Replayed {
    let &Replay { table, lists, heads, first, narrow, wide, shift } = replay;
    let table = address(table.address());
    Replayed { table, lists: table + 4 * lists as u64, heads, first, narrow, wide, shift, unused: 0 }
}

/// The kernel by bits of a column, words that are loaded at a time, and query heads that a block takes.
fn score_kernel(bits: usize, words: usize, tile: usize) -> &'static str {
    let names = match (bits, words.is_multiple_of(4)) {
        (4, false) => ["rehearse_score_4_1_1", "rehearse_score_4_1_4", "rehearse_score_4_1_8"],
        (4, true) => ["rehearse_score_4_4_1", "rehearse_score_4_4_4", "rehearse_score_4_4_8"],
        (8, false) => ["rehearse_score_8_1_1", "rehearse_score_8_1_4", "rehearse_score_8_1_8"],
        (8, true) => ["rehearse_score_8_4_1", "rehearse_score_8_4_4", "rehearse_score_8_4_8"],
        // Rows of f32 are whole groups of eight words.
        _ => ["rehearse_score_32_4_1", "rehearse_score_32_4_4", "rehearse_score_32_4_8"],
    };
    match tile {
        1 => names[0],
        4 => names[1],
        _ => names[2],
    }
}

/// See `Backend::rehearse`.
pub(super) fn rehearse(
    shared: &Shared,
    queue: &mut Queue,
    queries: Rows<'_>,
    rehearsals: &[Rehearsal<'_>],
    selected: &mut [&mut Selected],
) -> Result<()> {
    if rehearsals.is_empty() {
        return Ok(());
    }
    let longest = |r: &Rehearsal<'_>| {
        let most = match r.selection {
            Selection::Count { count: most }
            | Selection::Probability { most, .. }
            | Selection::Paper { most, .. }
            | Selection::Random { count: most, .. }
            | Selection::Replay { most, .. } => most,
        };
        most.min(r.to - r.from)
    };
    // A matrix of words: the counts in the first rows, then a row a list.
    let width = rehearsals.iter().map(longest).max().unwrap_or(0).max(1);
    let lists: usize = rehearsals.iter().map(|r| r.runs.geometry().kv_heads).sum();
    let counts = lists.div_ceil(width);
    let bytes = 4 * (counts + lists) * width;
    let memory = queue.scratch(Use::Lists, bytes)?;
    let mut list = 0;
    let outs: Vec<Lists> = rehearsals
        .iter()
        .map(|r| {
            let (counts, rows) = (memory + 4 * list as u64, memory + 4 * ((counts + list) * width) as u64);
            list += r.runs.geometry().kv_heads;
            Lists { rows, counts, most: width as u32, correction: None, tail: None }
        })
        .collect();
    rehearse_into(shared, queue, queries, rehearsals, &outs)?;

    // SAFETY: scratch memory of at least `bytes` bytes, zeroed when it was allocated, aligned to 256 by the driver. It is the
    // queue's, which is locked until this function returns, and nobody asks for it again before; nothing is released.
    let memory = unsafe {
        let start = std::ptr::with_exposed_provenance_mut(memory as usize);
        Buffer::from_raw(start, bytes, Place::Device, Box::new(|_, _| ()))
    };
    let matrix = memory.rows(DType::U32, counts + lists, width);
    // Short lists come with their counts; of long ones as much as the longest has.
    let together = bytes <= SMALL_LISTS;
    let mut words = vec![0; if together { bytes } else { 4 * counts * width }];
    queue.download(matrix.row_range(0, words.len() / (4 * width)), &mut words)?;
    let mut rows = words.split_off(4 * counts * width);
    let counted: Vec<usize> = numbers(&words[..4 * lists]).map(|n| n as usize).collect();
    let stride = if together { width } else { counted.iter().copied().max().unwrap_or(0) };
    if !together {
        rows = vec![0; 4 * lists * stride];
        queue.download(matrix.row_range(counts, lists).col_range(0, stride), &mut rows)?;
    }
    let mut lists = (0..lists).map(|i| numbers(&rows[4 * i * stride..][..4 * counted[i]]));
    for (rehearsal, selected) in rehearsals.iter().zip(selected) {
        selected.rows.resize_with(rehearsal.runs.geometry().kv_heads, Vec::new);
        for (to, list) in selected.rows.iter_mut().zip(&mut lists) {
            to.clear();
            to.extend(list);
        }
    }
    Ok(())
}

/// Words of the device's, little-endian as the host's.
fn numbers(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().expect("chunks of four")))
}
