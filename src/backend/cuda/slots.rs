//! The hot cache with its tables on the device: prefetch, admit, refill. Launches only; nothing waits.

use super::block::{bytes_of, plain};
use super::evict::{self, Pool};
use super::index::{self, Layout, extent_table};
use super::kernels::{Kernel, Module};
use super::queue::Queue;
use super::rehearse::{self, Lists};
use super::tail;
use super::{Shared, address};
use crate::Result;
use crate::backend::{
    Admission, Correction, DType, IndexGeometry, KvRuns, KvRunsMut, Payload, Place, PoolGeometry, Prefetch, Rehearsal,
    Rows, SlotGeometry, Slots, SlotsMut, StoredRuns,
};

plain! {
    struct Tables {
        counts: u64,
        headers: u64,
        used: u64,
        selected_counts: u64,
        selected: u64,
        move_counts: u64,
        moves: u64,
        attended_lists: u64,
        attended: u64,
        stride: u64,
        slots: u32,
        rows: u32,
        most: u32,
        limit: u32,
        below: u32,
        from: u32,
        step: u32,
        row: u32,
        most_attended: u32,
        corrects: u32,
        pool: Pool,
    }

    pub(super) struct Correct {
        tables: Tables,
        keys: u64,
        counts: u64,
        picked: u64,
        stride: u32,
        capacity: u32,
        most: u32,
        room: u32,
    }

    struct Corrects {
        sequences: u64,
    }

    struct Request {
        sequences: u64,
    }

    struct Load {
        tables: u64,
        ranked: u64,
        ranked_stride: u64,
        ranked_count: u32,
        length: u32,
    }

    struct Runs {
        extents: u64,
        layer_offset: u64,
        run_bytes: u64,
        extent_tokens: u64,
    }

    struct Gathered {
        counts: u64,
        rows: u64,
        slots: u64,
        from: Runs,
        to: Runs,
        saved: Runs,
        count_stride: u32,
        step: u32,
        list_stride: u64,
    }

    struct Gather {
        sequences: u64,
        count: u32,
        kv_heads: u32,
        row_bytes: u32,
        to_bytes: u32,
        head_dim: u32,
        unused: u32,
    }

    struct Token {
        tables: Tables,
        keys: u64,
        values: u64,
        store: u64,
        cache: u64,
        index: u64,
        saved: u64,
        mean_from: u64,
        mean: u64,
        mean_factor: f32,
        unused: u32,
    }

    struct Admit {
        tokens: u64,
        maps: u64,
        index: Layout,
        store_offset: u64,
        store_run_bytes: u64,
        cache_offset: u64,
        cache_run_bytes: u64,
        extent_tokens: u32,
        head_dim: u32,
        row_bytes: u32,
        stored_bytes: u32,
    }
}

/// Threads of a block, and of one of a gather.
const THREADS: usize = 512;
const GATHER_THREADS: usize = 1024;

/// Blocks that share the work of admitting a token of a KV head: its slot, and its row.
const ADMIT_PARTS: usize = 2;

/// Blocks of a gather: the link needs no more. Each has a multiprocessor to itself, which products leave free for it. And
/// blocks where what is copied is on the device, and nothing runs beside.
pub(super) const GATHER_BLOCKS: usize = 4;
const REFILL_BLOCKS: usize = 128;

/// Rows that a warp of a gather has in flight (`gather.cu`).
const IN_FLIGHT: usize = 4;

/// Sequences of one launch: a grid's second dimension.
const MOST_SEQUENCES: usize = 65535;

/// The launch that waits last, when it was an admission: the next sequence of the same batch may join it.
#[derive(Clone, Copy)]
pub(super) struct LastAdmit {
    params: Admit,
    kernel: &'static str,
    /// Bytes of the block that are in use: its tokens end there.
    end: usize,
}

/// Where what lies in a sequence's tables. `row` is that of a new token; `corrects`: lists are those of corrections.
fn tables_of(slots: &SlotsMut<'_>, row: usize, corrects: bool) -> Tables {
    let SlotsMut { geometry: g, layer, limit, guard, step, by_list, .. } = *slots;
    let first = layer * g.kv_heads;
    let at = |word: usize| address(slots.tables.address()) + 4 * word as u64;
    let lists = g.lists_of(layer, corrects);
    Tables {
        counts: at(SlotGeometry::COUNT * first),
        headers: at(g.header_at(first)),
        used: at(g.used_at(first)),
        selected_counts: at(lists.counts),
        selected: at(lists.rows),
        move_counts: at(lists.move_counts),
        moves: at(lists.moves),
        attended_lists: if by_list { at(g.attended_lists_at()) } else { 0 },
        attended: at(g.attended_at()),
        stride: g.table_words() as u64,
        slots: g.slots as u32,
        rows: g.rows as u32,
        most: lists.room as u32,
        limit: limit as u32,
        below: guard.below,
        from: guard.from,
        step,
        row: row as u32,
        most_attended: g.attended as u32,
        corrects: corrects.into(),
        pool: evict::pool_of(slots.pool.as_ref(), layer),
    }
}

/// Where a rehearsal finds what is attended, and puts the weights.
fn tail_of(tables: &Tables, weights: u64) -> tail::Wanted {
    let pool = &tables.pool;
    let attended = tail::Attended {
        slots: tables.used + 8 * u64::from(tables.slots),
        used: tables.used,
        tokens: if pool.tables == 0 { 0 } else { pool.tables + 4 * PoolGeometry::HEADER as u64 },
        stride: tables.stride,
        tokens_stride: PoolGeometry::HEADER as u64 + 2 * u64::from(pool.room),
        below: tables.below,
        from: tables.from,
        by_list: (tables.attended_lists != 0).into(),
        step: if tables.corrects == 0 { 0 } else { tables.step },
    };
    tail::Wanted { attended, weights }
}

/// What the kernels know of runs, but for the address of their extents' table.
fn runs_of(runs: &KvRuns<'_>) -> Runs {
    let (run_bytes, extent_tokens) = (runs.geometry().run_bytes() as u64, runs.geometry().extent_tokens as u64);
    Runs { extents: 0, layer_offset: runs.layer_offset() as u64, run_bytes, extent_tokens }
}

/// As [`runs_of`].
fn stored_of(runs: &StoredRuns<'_>) -> Runs {
    let (run_bytes, extent_tokens) = (runs.run_bytes() as u64, runs.geometry().extent_tokens as u64);
    Runs { extents: 0, layer_offset: runs.layer_offset() as u64, run_bytes, extent_tokens }
}

fn stored_table(runs: &StoredRuns<'_>) -> Vec<u64> {
    extent_table((0..runs.extents()).map(|i| runs.extent(i)))
}

fn write_table(runs: &mut KvRunsMut<'_>) -> Vec<u64> {
    extent_table((0..runs.extents()).map(|i| runs.extent_mut(i).cast_const()))
}

/// Where what a correction finds goes, and how much of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Joining {
    tables: Tables,
    most: u32,
    room: u32,
}

impl Joining {
    /// The lists of what joins: of rows, and of how many they are, for how many there is room.
    pub(super) fn lists(&self) -> (u64, u64, u32) {
        (self.tables.selected, self.tables.selected_counts, self.tables.most)
    }

    /// What the kernel needs, where ranks of rows lie `stride` apart from `keys` on, and rows have been picked.
    pub(super) fn of(&self, (keys, stride): (u64, u32), (picked, counts, capacity): (u64, u64, u32)) -> Correct {
        let &Joining { tables, most, room } = self;
        Correct { tables, keys, counts, picked, stride, capacity, most, room }
    }
}

/// Finds what joins of what has been picked for the sequences. The block was asked whether it has room for them.
pub(super) fn correct(shared: &Shared, queue: &mut Queue, sequences: &[Correct], kv_heads: usize) -> Result<()> {
    let params = Corrects { sequences: queue.block.push(bytes_of(sequences)) };
    queue.push(shared, Kernel::new(Module::Slots, "slots_correct"), [kv_heads, sequences.len(), 1], THREADS, &params)
}

/// See `Backend::prefetch`. Entries are copied on the lane `copies`.
pub(super) fn prefetch(
    shared: &Shared,
    queue: &mut Queue,
    copies: usize,
    queries: Rows<'_>,
    sequences: &mut [Prefetch<'_>],
) -> Result<()> {
    let rehearsals: Vec<Rehearsal<'_>> = sequences.iter().map(|sequence| sequence.rehearsal).collect();
    let tables = |sequence: &Prefetch<'_>| tables_of(&sequence.slots, 0, sequence.correction.is_some());
    let tables: Vec<Tables> = sequences.iter().map(tables).collect();
    let lists: Vec<Lists> = sequences
        .iter()
        .zip(&tables)
        .map(|(sequence, t)| {
            let tail = sequence.tail.as_ref().map(|tail| tail_of(t, address(tail.base())));
            let Some(Correction { most, room }) = sequence.correction else {
                return Lists { rows: t.selected, counts: t.selected_counts, most: t.most, correction: None, tail };
            };
            // What is picked is not yet what is selected.
            let g = &sequence.slots.geometry;
            let at = |word: usize| address(sequence.slots.tables.address()) + 4 * word as u64;
            Lists {
                rows: at(g.picked_rows_at()),
                counts: at(g.picked_counts_at()),
                most: g.selected as u32,
                correction: Some(Joining { tables: *t, most: most as u32, room: room as u32 }),
                tail,
            }
        })
        .collect();
    rehearse::rehearse_into(shared, queue, queries, &rehearsals, &lists)?;

    let alike = |a: &Prefetch<'_>, b: &Prefetch<'_>| {
        let key = |p: &Prefetch<'_>| (*p.from.geometry(), p.from.payload(), p.from.layer_offset());
        key(a) == key(b)
    };
    let mut done = 0;
    for sequences in sequences.chunk_by_mut(alike).flat_map(|alike| alike.chunks_mut(MOST_SEQUENCES)) {
        let tables = &tables[done..done + sequences.len()];
        done += sequences.len();
        let kv_heads = sequences[0].slots.geometry.kv_heads;
        queue.reserve(size_of_val(tables), 1)?;
        let request = Request { sequences: queue.block.push(bytes_of(tables)) };
        let kernel = Kernel::new(Module::Slots, "slots_request");
        queue.push(shared, kernel, [kv_heads, sequences.len(), 1], THREADS, &request)?;

        let wanted = sequences.iter_mut().zip(tables).map(|(sequence, tables)| Wanted {
            list: Gathered {
                counts: tables.move_counts,
                rows: tables.moves,
                slots: tables.moves + 4,
                from: stored_of(&sequence.from),
                to: runs_of(&sequence.to.runs()),
                saved: runs_of(&sequence.to.runs()),
                count_stride: 1,
                step: 2,
                list_stride: 2 * u64::from(tables.most),
            },
            from: stored_table(&sequence.from),
            to: write_table(&mut sequence.to),
            saved: sequence.saved.as_mut().map(write_table),
        });
        let wanted: Vec<Wanted> = wanted.collect();
        let (lane, requested) = (queue.lane(), queue.point()?);
        queue.switch(copies);
        queue.wait(requested)?;
        gather(shared, queue, wanted, &sequences[0].from, GATHER_BLOCKS)?;
        queue.switch(lane);
    }
    Ok(())
}

/// Entries to be gathered for one sequence, and addresses of extents.
struct Wanted {
    list: Gathered,
    from: Vec<u64>,
    to: Vec<u64>,
    saved: Option<Vec<u64>>,
}

/// Copies entries that are stored as those of `like` are, or widens them.
fn gather(shared: &Shared, queue: &mut Queue, wanted: Vec<Wanted>, like: &StoredRuns<'_>, blocks: usize) -> Result<()> {
    let words: usize = wanted.iter().map(|w| w.from.len() + w.to.len() + w.saved.as_ref().map_or(0, Vec::len)).sum();
    queue.reserve(8 * words + size_of::<Gathered>() * wanted.len(), 3 * wanted.len() + 1)?;
    let lists = wanted.iter().map(|Wanted { list, from, to, saved }| {
        let mut table = |table: &[u64]| queue.block.push_table(bytes_of(table));
        Gathered {
            from: Runs { extents: table(from), ..list.from },
            to: Runs { extents: table(to), ..list.to },
            saved: Runs { extents: saved.as_ref().map_or(0, |saved| table(saved)), ..list.saved },
            ..*list
        }
    });
    let lists: Vec<Gathered> = lists.collect();
    let (geometry, row_bytes) = (like.geometry(), like.row_bytes());
    let params = Gather {
        sequences: queue.block.push(bytes_of(&lists)),
        count: lists.len() as u32,
        kv_heads: geometry.kv_heads as u32,
        row_bytes: row_bytes as u32,
        to_bytes: geometry.row_bytes() as u32,
        head_dim: geometry.head_dim as u32,
        unused: 0,
    };
    let of_type = |names: [&'static str; 3]| match geometry.dtype {
        DType::F32 => names[0],
        DType::F16 => names[1],
        DType::BF16 => names[2],
        DType::U32 => unreachable!("keys and values are not u32"),
    };
    let name = match like.payload() {
        // A row of two halves of at least two bytes each is a multiple of four bytes, and so is its place in an extent.
        Payload::Exact if row_bytes.is_multiple_of(16) => "gather_16",
        Payload::Exact => "gather_4",
        Payload::Int8 => of_type(["gather_int8_f32", "gather_int8_f16", "gather_int8_bf16"]),
        Payload::Int4 => of_type(["gather_int4_f32", "gather_int4_f16", "gather_int4_bf16"]),
    };
    let rows = if like.payload() == Payload::Exact { 0 } else { GATHER_THREADS / 32 * IN_FLIGHT };
    let kernel =
        Kernel::new(Module::Gather, name).reading(like.place()).with_shared(rows * row_bytes.next_multiple_of(16));
    queue.push(shared, kernel, [blocks, 1, 1], GATHER_THREADS, &params)
}

/// See `Backend::load_slots`.
pub(super) fn load(
    shared: &Shared,
    queue: &mut Queue,
    slots: &SlotsMut<'_>,
    length: usize,
    ranked: Rows<'_>,
) -> Result<()> {
    let tables = tables_of(slots, 0, false);
    queue.reserve(size_of::<Tables>(), 1)?;
    let params = Load {
        tables: queue.block.push(bytes_of(&[tables])),
        ranked: address(ranked.base()),
        ranked_stride: ranked.stride() as u64,
        ranked_count: ranked.cols() as u32,
        length: length as u32,
    };
    queue.push(shared, Kernel::new(Module::Slots, "slots_load"), [ranked.rows(), 1, 1], THREADS, &params)
}

/// See `Backend::refill`.
pub(super) fn refill(
    shared: &Shared,
    queue: &mut Queue,
    slots: Slots<'_>,
    from: &StoredRuns<'_>,
    to: &mut KvRunsMut<'_>,
) -> Result<()> {
    let g = slots.geometry;
    let first = slots.layer * g.kv_heads;
    let at = |word: usize| address(slots.tables.address()) + 4 * word as u64;
    let list = Gathered {
        counts: at(g.count_at(first)),
        rows: at(g.rows_at(first)),
        slots: 0,
        from: stored_of(from),
        to: runs_of(&to.runs()),
        saved: runs_of(&to.runs()),
        count_stride: SlotGeometry::COUNT as u32,
        step: 1,
        list_stride: g.table_words() as u64,
    };
    let wanted = Wanted { list, from: stored_table(from), to: write_table(to), saved: None };
    let blocks = if from.place() == Place::Device { REFILL_BLOCKS } else { GATHER_BLOCKS };
    gather(shared, queue, vec![wanted], from, blocks)
}

/// See `Backend::admit`.
pub(super) fn admit(
    shared: &Shared,
    queue: &mut Queue,
    keys: Rows<'_>,
    values: Rows<'_>,
    admission: Admission<'_>,
) -> Result<()> {
    let Admission { row, slots, store, mut cache, saved, index, maps, mean } = admission;
    let store = store.runs();
    let geometry = *store.geometry();
    let extents: Vec<u64> = index::extent_table((0..index.extents()).map(|i| index.extent(i)));
    let (stored, cached) = (stored_table(&store), write_table(&mut cache));
    let saved = saved.map(|mut saved| write_table(&mut saved));
    let words = extents.len() + stored.len() + cached.len() + saved.as_ref().map_or(0, Vec::len);
    // Tables first: a token that joins the last launch lies directly behind that one's.
    let last = queue.last_admit;
    queue.reserve(8 * words + size_of::<Token>(), 5)?;
    let token = Token {
        tables: tables_of(&slots, row, false),
        keys: address(keys.base()),
        values: address(values.base()),
        store: queue.block.push_table(bytes_of(&stored)),
        cache: queue.block.push_table(bytes_of(&cached)),
        index: queue.block.push_table(bytes_of(&extents)),
        saved: saved.map_or(0, |saved| queue.block.push_table(bytes_of(&saved))),
        // What has no beginning begins where it ends.
        mean_from: mean.as_ref().map_or(0, |mean| address(mean.from.unwrap_or(mean.out.as_rows()).base())),
        mean: mean.as_ref().map_or(0, |mean| address(mean.out.base())),
        mean_factor: mean.as_ref().map_or(0.0, |mean| mean.factor),
        unused: 0,
    };
    let of_index: &IndexGeometry = index.geometry();
    let mut params = Admit {
        tokens: 0,
        maps: address(maps.data.address()),
        index: index::layout(of_index, index.layer_offset()),
        store_offset: store.layer_offset() as u64,
        store_run_bytes: store.run_bytes() as u64,
        cache_offset: cache.layer_offset() as u64,
        cache_run_bytes: cache.geometry().run_bytes() as u64,
        extent_tokens: geometry.extent_tokens as u32,
        head_dim: geometry.head_dim as u32,
        row_bytes: geometry.row_bytes() as u32,
        stored_bytes: store.row_bytes() as u32,
    };
    let name = admit_kernel(store.payload(), geometry.dtype);
    let joins = last.filter(|before| {
        Admit { tokens: 0, ..before.params } == params
            && before.kernel == name
            && before.end == queue.block.used()
            && queue.last_admit.is_some()
    });
    if let Some(before) = joins {
        queue.block.extend(bytes_of(&[token]));
        queue.widen_last(1);
        params = before.params;
    } else {
        params.tokens = queue.block.push(bytes_of(&[token]));
        // Partial keys, and a stored row.
        let bytes = (4 * of_index.columns).next_multiple_of(16) + store.row_bytes().next_multiple_of(16);
        let kernel = Kernel::new(Module::Slots, name).with_shared(bytes);
        queue.push(shared, kernel, [1, slots.geometry.kv_heads, ADMIT_PARTS], THREADS, &params)?;
    }
    queue.last_admit = Some(LastAdmit { params, kernel: name, end: queue.block.used() });
    Ok(())
}

/// The kernel by how entries are stored, and what they are on the device.
fn admit_kernel(payload: Payload, dtype: DType) -> &'static str {
    let names = match payload {
        Payload::Exact => ["slots_admit_exact_f32", "slots_admit_exact_f16", "slots_admit_exact_bf16"],
        Payload::Int8 => ["slots_admit_int8_f32", "slots_admit_int8_f16", "slots_admit_int8_bf16"],
        Payload::Int4 => ["slots_admit_int4_f32", "slots_admit_int4_f16", "slots_admit_int4_bf16"],
    };
    match dtype {
        DType::F32 => names[0],
        DType::F16 => names[1],
        DType::BF16 => names[2],
        DType::U32 => unreachable!("keys and values are not u32"),
    }
}
