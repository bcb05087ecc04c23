//! The hot cache with its tables on the device: prefetch, admit, refill. Launches only; nothing waits.

use super::block::{bytes_of, plain};
use super::index::{self, Layout, extent_table};
use super::kernels::{Kernel, Module};
use super::queue::Queue;
use super::rehearse::{self, Lists};
use super::tail;
use super::{Shared, address};
use crate::Result;
use crate::backend::{
    Admission, DType, IndexGeometry, KvGeometry, KvRuns, KvRunsMut, Prefetch, Rehearsal, Rows, SlotGeometry, Slots,
    SlotsMut,
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
        unused: u32,
    }

    struct Request {
        sequences: u64,
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
        count_stride: u32,
        step: u32,
        list_stride: u64,
    }

    struct Gather {
        sequences: u64,
        count: u32,
        kv_heads: u32,
        row_bytes: u32,
        unused: u32,
    }

    struct Token {
        tables: Tables,
        keys: u64,
        values: u64,
        store: u64,
        cache: u64,
        index: u64,
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
        unused: u32,
    }
}

/// Threads of a block, and blocks of a gather: few, because the link needs no more and others compute meanwhile.
const THREADS: usize = 512;
const GATHER_BLOCKS: usize = 16;

/// Sequences of one launch: a grid's second dimension.
const MOST_SEQUENCES: usize = 65535;

/// The launch that waits last, when it was an admission: the next sequence of the same batch may join it.
#[derive(Clone, Copy)]
pub(super) struct LastAdmit {
    params: Admit,
    geometry: KvGeometry,
    /// Bytes of the block that are in use: its tokens end there.
    end: usize,
}

/// Where what lies in a sequence's tables. `row` is that of a new token.
fn tables_of(slots: &SlotsMut<'_>, row: usize) -> Tables {
    let SlotsMut { geometry: g, layer, limit, guard, step, by_list, .. } = *slots;
    let first = layer * g.kv_heads;
    let at = |word: usize| address(slots.tables.address()) + 4 * word as u64;
    Tables {
        counts: at(SlotGeometry::COUNT * first),
        headers: at(g.header_at(first)),
        used: at(g.used_at(first)),
        selected_counts: at(g.selected_counts_at()),
        selected: at(g.selected_rows_at()),
        move_counts: at(g.move_counts_at()),
        moves: at(g.moves_at()),
        attended_lists: if by_list { at(g.attended_lists_at()) } else { 0 },
        attended: at(g.attended_at()),
        stride: g.table_words() as u64,
        slots: g.slots as u32,
        rows: g.rows as u32,
        most: g.selected as u32,
        limit: limit as u32,
        below: guard.below,
        from: guard.from,
        step,
        row: row as u32,
        most_attended: g.attended as u32,
        unused: 0,
    }
}

/// Where a rehearsal finds what is in slots, and puts the weights.
fn tail_of(tables: &Tables, weights: u64) -> tail::Tables {
    let rows = tables.used + 4 * u64::from(tables.slots);
    let slots = rows + 4 * u64::from(tables.slots);
    tail::Tables {
        counts: tables.counts,
        rows,
        slots,
        weights,
        stride: tables.stride,
        below: tables.below,
        from: tables.from,
        by_list: (tables.attended_lists != 0).into(),
        unused: 0,
    }
}

fn runs_of(extents: u64, geometry: &KvGeometry, layer_offset: usize) -> Runs {
    let (run_bytes, extent_tokens) = (geometry.run_bytes() as u64, geometry.extent_tokens as u64);
    Runs { extents, layer_offset: layer_offset as u64, run_bytes, extent_tokens }
}

fn read_table(runs: &KvRuns<'_>) -> Vec<u64> {
    extent_table((0..runs.extents()).map(|i| runs.extent(i)))
}

fn write_table(runs: &mut KvRunsMut<'_>) -> Vec<u64> {
    extent_table((0..runs.extents()).map(|i| runs.extent_mut(i).cast_const()))
}

/// See `Backend::prefetch`.
pub(super) fn prefetch(
    shared: &Shared,
    queue: &mut Queue,
    queries: Rows<'_>,
    sequences: &mut [Prefetch<'_>],
) -> Result<()> {
    let rehearsals: Vec<Rehearsal<'_>> = sequences.iter().map(|sequence| sequence.rehearsal).collect();
    let tables: Vec<Tables> = sequences.iter().map(|sequence| tables_of(&sequence.slots, 0)).collect();
    let lists: Vec<Lists> = sequences
        .iter()
        .zip(&tables)
        .map(|(sequence, t)| Lists {
            rows: t.selected,
            counts: t.selected_counts,
            most: t.most,
            tail: sequence.tail.as_ref().map(|tail| tail_of(t, address(tail.base()))),
        })
        .collect();
    rehearse::rehearse_into(shared, queue, queries, &rehearsals, &lists)?;

    let alike = |a: &Prefetch<'_>, b: &Prefetch<'_>| {
        a.from.geometry() == b.from.geometry() && a.from.layer_offset() == b.from.layer_offset()
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

        let extents: Vec<[Vec<u64>; 2]> =
            sequences.iter_mut().map(|s| [read_table(&s.from), write_table(&mut s.to)]).collect();
        let bytes = extents.iter().flatten().map(|table| 8 * table.len()).sum::<usize>();
        queue.reserve(bytes + size_of::<Gathered>() * sequences.len(), 2 * sequences.len() + 1)?;
        let gathered: Vec<Gathered> = sequences
            .iter()
            .zip(&extents)
            .zip(tables)
            .map(|((sequence, [from, to]), tables)| Gathered {
                counts: tables.move_counts,
                rows: tables.moves,
                slots: tables.moves + 4,
                from: runs_of(
                    queue.block.push_table(bytes_of(from)),
                    sequence.from.geometry(),
                    sequence.from.layer_offset(),
                ),
                to: runs_of(queue.block.push_table(bytes_of(to)), sequence.to.geometry(), sequence.to.layer_offset()),
                count_stride: 1,
                step: 2,
                list_stride: 2 * u64::from(tables.most),
            })
            .collect();
        gather(shared, queue, &gathered, sequences[0].from.geometry())?;
    }
    Ok(())
}

/// Copies entries. The block was asked whether it has room.
fn gather(shared: &Shared, queue: &mut Queue, sequences: &[Gathered], geometry: &KvGeometry) -> Result<()> {
    let row_bytes = geometry.row_bytes();
    let params = Gather {
        sequences: queue.block.push(bytes_of(sequences)),
        count: sequences.len() as u32,
        kv_heads: geometry.kv_heads as u32,
        row_bytes: row_bytes as u32,
        unused: 0,
    };
    // A row of two halves of at least two bytes each is a multiple of four bytes, and so is its place in an extent.
    let name = if row_bytes.is_multiple_of(16) { "slots_gather_16" } else { "slots_gather_4" };
    queue.push(shared, Kernel::new(Module::Slots, name), [GATHER_BLOCKS, 1, 1], THREADS, &params)
}

/// See `Backend::refill`.
pub(super) fn refill(
    shared: &Shared,
    queue: &mut Queue,
    slots: Slots<'_>,
    from: &KvRuns<'_>,
    to: &mut KvRunsMut<'_>,
) -> Result<()> {
    let g = slots.geometry;
    let first = slots.layer * g.kv_heads;
    let at = |word: usize| address(slots.tables.address()) + 4 * word as u64;
    let (read, write) = (read_table(from), write_table(to));
    queue.reserve(8 * (read.len() + write.len()) + size_of::<Gathered>(), 3)?;
    let all = Gathered {
        counts: at(g.count_at(first)),
        rows: at(g.rows_at(first)),
        slots: 0,
        from: runs_of(queue.block.push_table(bytes_of(&read)), from.geometry(), from.layer_offset()),
        to: runs_of(queue.block.push_table(bytes_of(&write)), to.geometry(), to.layer_offset()),
        count_stride: SlotGeometry::COUNT as u32,
        step: 1,
        list_stride: g.table_words() as u64,
    };
    gather(shared, queue, &[all], from.geometry())
}

/// See `Backend::admit`.
pub(super) fn admit(
    shared: &Shared,
    queue: &mut Queue,
    keys: Rows<'_>,
    values: Rows<'_>,
    admission: Admission<'_>,
) -> Result<()> {
    let Admission { row, slots, mut store, mut cache, index, maps, mean } = admission;
    let geometry = *store.geometry();
    let extents: Vec<u64> = index::extent_table((0..index.extents()).map(|i| index.extent(i)));
    let (stored, cached) = (write_table(&mut store), write_table(&mut cache));
    let bytes = 8 * (extents.len() + stored.len() + cached.len()) + size_of::<Token>();
    // Tables first: a token that joins the last launch lies directly behind that one's.
    let last = queue.last_admit;
    queue.reserve(bytes, 4)?;
    let token = Token {
        tables: tables_of(&slots, row),
        keys: address(keys.base()),
        values: address(values.base()),
        store: queue.block.push_table(bytes_of(&stored)),
        cache: queue.block.push_table(bytes_of(&cached)),
        index: queue.block.push_table(bytes_of(&extents)),
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
        store_run_bytes: geometry.run_bytes() as u64,
        cache_offset: cache.layer_offset() as u64,
        cache_run_bytes: cache.geometry().run_bytes() as u64,
        extent_tokens: geometry.extent_tokens as u32,
        head_dim: geometry.head_dim as u32,
        row_bytes: geometry.row_bytes() as u32,
        unused: 0,
    };
    let joins = last.filter(|before| {
        Admit { tokens: 0, ..before.params } == params
            && before.geometry == geometry
            && before.end == queue.block.used()
            && queue.last_admit.is_some()
    });
    if let Some(before) = joins {
        queue.block.extend(bytes_of(&[token]));
        queue.widen_last(1);
        params = before.params;
    } else {
        params.tokens = queue.block.push(bytes_of(&[token]));
        let name = match geometry.dtype {
            DType::F32 => "slots_admit_f32",
            DType::F16 => "slots_admit_f16",
            DType::BF16 => "slots_admit_bf16",
            DType::U32 => unreachable!("keys and values are not u32"),
        };
        let kernel = Kernel::new(Module::Slots, name).with_shared((4 * of_index.columns).next_multiple_of(16));
        queue.push(shared, kernel, [1, slots.geometry.kv_heads, 1], THREADS, &params)?;
    }
    queue.last_admit = Some(LastAdmit { params, geometry, end: queue.block.used() });
    Ok(())
}
