//! The CPU backend: SIMD on every instruction set, the AMX unit where there is one, and a pool of threads.
//!
//! - [`simd`]: one vector type a level, one safe door each; every kernel is written once.
//! - [`unit`]: what multiplies matrices during prefill: vectors, or tiles.
//! - [`pool`]: the threads; [`memory`]: aligned memory in huge pages, and scratch.
//! - One file an operation. Each is deterministic: results depend on shapes, never on the number of threads.
//!
//! This file checks shapes and hands on. What may not enter: arithmetic.

// Kernels index several arrays of registers with one counter; iterators would hide which and cost inlining.
#![allow(clippy::needless_range_loop)]

mod activation;
mod attention;
mod embed;
mod evict;
mod gemm;
mod index;
mod log_probability;
mod matvec;
mod memory;
mod norm;
mod payload;
mod pool;
mod project;
mod rank;
mod rotary;
mod scratch;
mod simd;
mod slots;
mod store_kv;
mod stored;
mod tail;
#[cfg(test)]
mod tests;
mod unit;
mod view;

use crate::backend::{
    Activation, Admission, AttentionShape, Backend, Blend, Buffer, DType, Event, HeadMaps, IndexGeometry, IndexRunsMut,
    KvGeometry, KvRuns, KvRunsMut, Landing, Linear, Lost, Move, Norm, Payload, Place, Prefetch, Rehearsal, Rotation,
    Rows, RowsMut, Scratch, Segment, Selected, Shape, Slot, Slots, SlotsMut, StoredRuns, Stream, Visible, Work,
};
use crate::{Error, Result};
use half::bf16;
use memory::ScratchPool;
use pool::Pool;
use simd::Proven;
use std::ops::Range;
use stored::Widen;

pub use simd::Level;

/// More threads than any machine gains from; a larger number is a mistake.
const MOST_THREADS: usize = 1024;

/// How to make a [`CpuBackend`].
#[derive(Clone, Copy, Debug, Default)]
pub struct CpuOptions {
    /// Threads that work on an operation, the caller's included; 0: as many as the process may run on.
    pub threads: usize,
    /// Instruction set; the highest available when not given.
    pub level: Option<Level>,
}

/// Host memory as the CPU backend has it: zeroed, aligned, in huge pages where it is large.
pub(super) fn host_memory(bytes: usize, purpose: &str) -> Result<Buffer> {
    memory::allocate(bytes, Place::Pinned, purpose)
}

/// Computes on the processor. May be shared by threads; their operations take turns.
pub struct CpuBackend {
    level: Proven,
    pool: Pool,
    scratch: ScratchPool,
}

impl CpuBackend {
    /// Starts the threads. Errors: more than 1024 of them, a level that this machine lacks, no memory for a thread.
    pub fn new(options: CpuOptions) -> Result<CpuBackend> {
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, |n| n.get()).min(MOST_THREADS),
            n if n <= MOST_THREADS => n,
            n => return Err(Error::invalid_argument(format!("threads = {n}: at most {MOST_THREADS}"))),
        };
        let wanted = options.level.unwrap_or_else(Level::detect);
        let level = Proven::new(wanted).ok_or_else(|| {
            Error::unsupported(format!("this processor lacks {wanted:?}: its level is {:?}", Level::detect()))
        })?;
        Ok(CpuBackend { level, pool: Pool::new(threads)?, scratch: ScratchPool::default() })
    }

    /// Widens rows of stored runs into others.
    fn land(&self, stream: &Stream, from: &StoredRuns<'_>, to: &mut KvRunsMut<'_>, moves: &[Move]) -> Result<()> {
        let landing = |m: &Move| Landing { from: from.slot(m.head as usize, m.from as usize), head: m.head, to: m.to };
        let landings: Vec<Landing> = moves.iter().map(landing).collect();
        self.decode_kv_rows(stream, from.payload(), from.buffers(), &landings, to)
    }

    /// The instruction set in use.
    pub fn level(&self) -> Level {
        self.level.level()
    }
}

/// Asserts that a window holds activations.
macro_rules! assert_activations {
    ($($x:ident),*) => { $(assert_eq!($x.dtype(), DType::F32, concat!(stringify!($x), " must be activations"));)* };
}

/// Asserts that a segment fits the layer's attention and its runs hold what it attends.
fn assert_attention(attention: &AttentionShape, segment: &Segment<'_>, queries: usize) {
    assert!(attention.kv_heads > 0 && attention.heads.is_multiple_of(attention.kv_heads) && attention.head_dim > 0);
    assert!(attention.window != Some(0), "a window of no tokens");
    let geometry = segment.runs.geometry();
    assert_eq!((geometry.kv_heads, geometry.head_dim), (attention.kv_heads, attention.head_dim));
    assert!(segment.row + segment.rows <= queries);
    let capacity = segment.runs.capacity();
    let kv_heads = attention.kv_heads;
    match segment.visible {
        Visible::Causal => assert!(segment.position + segment.rows <= capacity, "tokens past the extents' end"),
        Visible::First(counts) => {
            assert_eq!((segment.rows, counts.len()), (1, kv_heads), "one row, and a count for each KV head");
            assert!(counts.iter().all(|&n| n > 0 && n as usize <= capacity), "no rows, or past the extents' end");
        }
        Visible::Listed(rows) => {
            assert_eq!((segment.rows, rows.len()), (1, kv_heads), "one row, and a list for each KV head");
            let fits = |rows: &Vec<u32>| !rows.is_empty() && rows.iter().all(|&row| (row as usize) < capacity);
            assert!(rows.iter().all(fits), "no rows, or past the extents' end");
        }
        Visible::Slots(_) => unreachable!("slots are counted before"),
    }
}

/// Asserts that an index can be laid out: whole blocks of tokens.
fn assert_index(geometry: &IndexGeometry) {
    assert!(geometry.kv_heads > 0 && geometry.columns > 0 && geometry.extent_tokens > 0);
    assert!(
        geometry.extent_tokens.is_multiple_of(index::LEAST_EXTENT),
        "{} tokens are not whole blocks",
        geometry.extent_tokens
    );
}

/// Asserts that rows of `bytes` bytes lie inside their buffers.
fn assert_slots(mut slots: impl Iterator<Item = Slot>, bytes: usize, buffers: &[Buffer]) {
    let inside = |s: Slot| s.offset.checked_add(bytes).is_some_and(|end| end <= buffers[s.buffer].bytes());
    assert!(slots.all(inside), "a stored row past its buffer's end");
}

impl Backend for CpuBackend {
    fn description(&self) -> String {
        let level = match self.level() {
            Level::Scalar => "scalar",
            Level::Avx2 => "AVX2",
            Level::Avx512 => "AVX-512",
            Level::Vnni => "AVX-512 with VNNI",
            Level::Amx => "AVX-512 and AMX-BF16",
        };
        format!("CPU, {level}, {} threads", self.pool.threads())
    }

    fn has_eviction(&self) -> bool {
        true
    }

    fn has_blocks(&self) -> bool {
        true
    }

    fn has_mapped_weights(&self) -> bool {
        true
    }

    fn activation(&self) -> DType {
        DType::F32
    }

    fn allocate(&self, bytes: usize, place: Place, purpose: &str) -> Result<Buffer> {
        memory::allocate(bytes, place, purpose)
    }

    fn stream(&self) -> Result<Stream> {
        Ok(Stream(0))
    }

    fn side_stream(&self, _of: &Stream) -> Result<Stream> {
        self.stream()
    }

    fn record(&self, _stream: &Stream) -> Result<Event> {
        Ok(Event(0))
    }

    fn wait(&self, _stream: &Stream, _event: &Event) -> Result<()> {
        Ok(())
    }

    fn synchronize(&self, _stream: &Stream) -> Result<()> {
        Ok(())
    }

    fn scratch(&self, _stream: &Stream, work: Option<&Work<'_>>) -> Result<Scratch> {
        Ok(scratch::scratch(self, work))
    }

    fn upload(&self, _stream: &Stream, source: &[u8], target: &mut Buffer, offset: usize) -> Result<()> {
        let end = offset.checked_add(source.len());
        assert!(end.is_some_and(|end| end <= target.bytes()), "an upload past the buffer's end");
        // SAFETY: the range was checked; `target` is borrowed mutably and so cannot overlap `source`.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), target.address_mut().add(offset), source.len()) };
        Ok(())
    }

    fn download(&self, _stream: &Stream, source: Rows<'_>, target: &mut [u8]) -> Result<()> {
        let row = source.cols() * source.dtype().bytes();
        assert_eq!(target.len(), source.rows() * row, "a download's target must hold the rows exactly");
        for i in 0..source.rows() {
            let to = &mut target[i * row..(i + 1) * row];
            // SAFETY: row i of the window lies inside its live buffer; `to` is of the same length and elsewhere.
            unsafe {
                let from = source.base().add(i * source.stride() * source.dtype().bytes());
                std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), row);
            }
        }
        Ok(())
    }

    fn download_weight(&self, stream: &Stream, weight: &Linear, rows: Range<usize>, target: &mut [u8]) -> Result<()> {
        let Some(blocks) = weight.blocks else {
            return self.download(stream, weight.rows().row_range(rows.start, rows.len()), target);
        };
        let mut values = vec![bf16::ZERO; rows.len() * weight.inputs];
        self.level.run(Widen { weight, blocks, rows, columns: 0..weight.inputs, to: &mut values });
        assert_eq!(target.len(), values.len() * size_of::<bf16>(), "a download's target must hold the rows exactly");
        values.iter().zip(target.as_chunks_mut().0).for_each(|(value, to)| *to = value.to_ne_bytes());
        Ok(())
    }

    fn embed(&self, _: &Stream, table: &Linear, ids: Rows<'_>, accumulate: bool, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(out);
        assert_eq!((ids.rows(), table.inputs), (out.rows(), out.cols()));
        embed::embed(self, table, ids, accumulate, out);
        Ok(())
    }

    fn norm(&self, _: &Stream, x: Rows<'_>, norm: &Norm, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(x, out);
        assert_eq!((x.rows(), x.cols()), (out.rows(), out.cols()));
        assert_eq!(x.cols(), norm.weight.len);
        assert!(norm.bias.as_ref().is_none_or(|b| b.len == norm.weight.len));
        norm::norm(self, x, norm, out);
        Ok(())
    }

    fn norm_heads(&self, _: &Stream, x: RowsMut<'_>, norm: &Norm) -> Result<()> {
        assert_activations!(x);
        assert!(norm.weight.len > 0 && x.cols().is_multiple_of(norm.weight.len));
        assert!(norm.bias.as_ref().is_none_or(|b| b.len == norm.weight.len));
        norm::norm_heads(self, x, norm);
        Ok(())
    }

    fn matmul_beside(
        &self,
        _: &Stream,
        x: Rows<'_>,
        weight: &Linear,
        accumulate: bool,
        shape: Shape,
        out: RowsMut<'_>,
        beside: &mut (dyn FnMut() + Send),
    ) -> Result<()> {
        assert_activations!(x, out);
        assert_eq!(x.rows(), out.rows());
        assert_eq!((x.cols(), out.cols()), (weight.inputs, weight.outputs));
        assert!(weight.inputs > 0);
        assert!(weight.bias.as_ref().is_none_or(|b| b.len == weight.outputs));
        match shape {
            Shape::Decode => matvec::matmul(self, x, weight, accumulate, out, beside),
            Shape::Prefill => {
                beside();
                gemm::matmul(self, x, weight, accumulate, out)?;
            }
        }
        Ok(())
    }

    fn activate(&self, _: &Stream, x: Rows<'_>, activation: Activation, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(x, out);
        let factor = if activation.gated() { 2 } else { 1 };
        assert_eq!((x.rows(), x.cols()), (out.rows(), factor * out.cols()));
        activation::activate(self, x, activation, out);
        Ok(())
    }

    fn rotation_table(&self, _: &Stream, rotation: &Rotation, positions: Rows<'_>, table: RowsMut<'_>) -> Result<()> {
        assert_activations!(table);
        assert_eq!((positions.rows(), rotation.dims()), (table.rows(), table.cols()));
        rotary::table(self, rotation, positions, table);
        Ok(())
    }

    fn rotate(&self, _: &Stream, rotation: &Rotation, table: Rows<'_>, head_dim: usize, x: RowsMut<'_>) -> Result<()> {
        assert_activations!(table, x);
        assert_eq!((table.rows(), table.cols()), (x.rows(), rotation.dims()));
        assert!(head_dim > 0 && x.cols().is_multiple_of(head_dim) && rotation.dims() <= head_dim);
        rotary::rotate(self, rotation.dims(), table, head_dim, x);
        Ok(())
    }

    fn store_kv(
        &self,
        _: &Stream,
        keys: Rows<'_>,
        values: Rows<'_>,
        runs: &mut KvRunsMut<'_>,
        position: usize,
    ) -> Result<()> {
        assert_activations!(keys, values);
        let geometry = runs.geometry();
        assert_eq!((keys.rows(), keys.cols()), (values.rows(), values.cols()));
        assert_eq!(keys.cols(), geometry.kv_heads * geometry.head_dim);
        assert!(position + keys.rows() <= runs.capacity(), "tokens past the extents' end");
        store_kv::store(self, keys, values, runs, position);
        Ok(())
    }

    fn store_kv_rows(
        &self,
        _: &Stream,
        keys: Rows<'_>,
        values: Rows<'_>,
        runs: &mut KvRunsMut<'_>,
        rows: &[u32],
    ) -> Result<()> {
        assert_activations!(keys, values);
        let geometry = runs.geometry();
        assert_eq!((keys.rows(), values.rows(), keys.cols()), (1, 1, values.cols()));
        assert_eq!(keys.cols(), geometry.kv_heads * geometry.head_dim);
        assert_eq!(rows.len(), geometry.kv_heads);
        assert!(rows.iter().all(|&row| (row as usize) < runs.capacity()), "a row past the extents' end");
        store_kv::store_rows(keys, values, runs, rows);
        Ok(())
    }

    fn copy_kv_rows(&self, _: &Stream, from: &KvRuns<'_>, to: &mut KvRunsMut<'_>, moves: &[Move]) -> Result<()> {
        let (a, b) = (from.geometry(), to.geometry());
        assert_eq!((a.kv_heads, a.head_dim, a.dtype), (b.kv_heads, b.head_dim, b.dtype));
        let fits = |m: &Move| (m.from as usize) < from.capacity() && (m.to as usize) < to.capacity();
        assert!(moves.iter().all(|m| (m.head as usize) < a.kv_heads && fits(m)), "a row past the extents' end");
        store_kv::copy_rows(self, from, to, moves);
        Ok(())
    }

    fn copy_kv(
        &self,
        stream: &Stream,
        from: &KvRuns<'_>,
        to: &mut KvRunsMut<'_>,
        rows: std::ops::Range<usize>,
    ) -> Result<()> {
        let heads = from.geometry().kv_heads as u32;
        let of_head = |head| rows.clone().map(move |row| Move { head, from: row as u32, to: row as u32 });
        self.copy_kv_rows(stream, from, to, &(0..heads).flat_map(of_head).collect::<Vec<_>>())
    }

    fn encode_kv(
        &self,
        _: &Stream,
        keys: Rows<'_>,
        values: Rows<'_>,
        payload: Payload,
        geometry: &KvGeometry,
        slots: &[Slot],
        targets: &mut [Buffer],
    ) -> Result<()> {
        assert_activations!(keys, values);
        assert_eq!((keys.rows(), keys.cols()), (values.rows(), values.cols()));
        assert_eq!(keys.cols(), geometry.kv_heads * geometry.head_dim);
        assert_eq!(slots.len(), keys.rows() * geometry.kv_heads);
        assert_slots(slots.iter().copied(), payload.row_bytes(geometry), targets);
        payload::encode(self, keys, values, payload, geometry, slots, targets);
        Ok(())
    }

    fn decode_kv_rows(
        &self,
        _: &Stream,
        payload: Payload,
        sources: &[Buffer],
        landings: &[Landing],
        to: &mut KvRunsMut<'_>,
    ) -> Result<()> {
        let geometry = to.geometry();
        assert_slots(landings.iter().map(|l| l.from), payload.row_bytes(geometry), sources);
        let fits = |l: &Landing| (l.head as usize) < geometry.kv_heads && (l.to as usize) < to.capacity();
        assert!(landings.iter().all(fits), "a row past the extents' end");
        payload::decode(self, payload, sources, landings, to);
        Ok(())
    }

    fn fetch_kv(&self, _: &Stream, from: &StoredRuns<'_>, to: &mut KvRunsMut<'_>, rows: usize) -> Result<()> {
        let (a, b) = (from.geometry(), to.geometry());
        assert_eq!((a.kv_heads, a.head_dim, a.dtype), (b.kv_heads, b.head_dim, b.dtype));
        assert_eq!(a.extent_tokens, b.extent_tokens, "runs of two lengths");
        assert!(rows <= from.capacity().min(to.capacity()), "rows past the extents' end");
        payload::fetch(self, from, to, rows);
        Ok(())
    }

    fn attend(
        &self,
        _: &Stream,
        q: Rows<'_>,
        attention: &AttentionShape,
        segments: &[Segment<'_>],
        out: RowsMut<'_>,
    ) -> Result<()> {
        assert_activations!(q, out);
        assert_eq!((q.rows(), q.cols()), (out.rows(), out.cols()));
        assert_eq!(q.cols(), attention.heads * attention.head_dim);
        let counts: Vec<Vec<u32>> = segments
            .iter()
            .map(|segment| match segment.visible {
                Visible::Slots(slots) if !slots.by_list => slots::counts(&slots),
                _ => Vec::new(),
            })
            .collect();
        let lists: Vec<Vec<Vec<u32>>> = segments
            .iter()
            .map(|segment| match segment.visible {
                Visible::Slots(slots) if slots.by_list => slots::listed(&slots),
                _ => Vec::new(),
            })
            .collect();
        let counted =
            segments.iter().zip(counts.iter().zip(&lists)).map(|(segment, (counts, lists))| match segment.visible {
                Visible::Slots(slots) if slots.by_list => Segment { visible: Visible::Listed(lists), ..*segment },
                Visible::Slots(_) => Segment { visible: Visible::First(counts), ..*segment },
                _ => *segment,
            });
        let segments: Vec<Segment<'_>> = counted.collect();
        for (i, segment) in segments.iter().enumerate() {
            assert_attention(attention, segment, q.rows());
            let apart =
                |other: &Segment<'_>| other.row + other.rows <= segment.row || segment.row + segment.rows <= other.row;
            assert!(segments[..i].iter().all(apart), "segments overlap");
        }
        attention::attend(self, q, attention, &segments, out)
    }

    fn attention_mass(
        &self,
        _: &Stream,
        q: Rows<'_>,
        attention: &AttentionShape,
        segment: &Segment<'_>,
        out: RowsMut<'_>,
    ) -> Result<()> {
        assert_activations!(q, out);
        assert_eq!((q.cols(), out.rows()), (attention.heads * attention.head_dim, attention.kv_heads));
        assert_attention(attention, segment, q.rows());
        let columns = match segment.visible {
            Visible::Causal => segment.position + segment.rows,
            Visible::First(counts) => counts.iter().map(|&n| n as usize).max().unwrap_or(0),
            Visible::Listed(rows) => rows.iter().map(Vec::len).max().unwrap_or(0),
            Visible::Slots(_) => unreachable!("slots are not ranked"),
        };
        assert!(out.cols() >= columns, "{} columns cannot take the masses of {columns} tokens", out.cols());
        attention::mass(self, q, attention, segment, out)
    }

    fn rank(&self, _: &Stream, scores: Rows<'_>, out: RowsMut<'_>) -> Result<()> {
        assert_eq!((scores.dtype(), out.dtype(), scores.rows()), (DType::F32, DType::U32, out.rows()));
        assert!(out.cols() <= scores.cols(), "more columns than there are");
        rank::rank(self, scores, &out);
        Ok(())
    }

    fn project_heads(&self, _: &Stream, x: Rows<'_>, maps: &HeadMaps, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(x, out);
        assert!(maps.kv_heads > 0 && maps.inputs > 0 && maps.outputs > 0);
        let heads = x.cols() / maps.inputs;
        assert!(x.cols().is_multiple_of(maps.inputs) && heads.is_multiple_of(maps.kv_heads) && heads > 0);
        assert_eq!((out.rows(), out.cols()), (x.rows(), heads * maps.outputs));
        project::project_heads(self, x, maps, out);
        Ok(())
    }

    fn index_append(&self, _: &Stream, keys: Rows<'_>, runs: &mut IndexRunsMut<'_>, row: usize) -> Result<()> {
        assert_activations!(keys);
        assert_index(runs.geometry());
        assert_eq!(keys.cols(), runs.geometry().kv_heads * runs.geometry().columns);
        assert!(row + keys.rows() <= runs.capacity(), "rows past the extents' end");
        index::append(self, keys, runs, row);
        Ok(())
    }

    fn index_store_rows(&self, _: &Stream, keys: Rows<'_>, runs: &mut IndexRunsMut<'_>, rows: &[u32]) -> Result<()> {
        assert_activations!(keys);
        assert_index(runs.geometry());
        assert_eq!((keys.rows(), keys.cols()), (1, runs.geometry().kv_heads * runs.geometry().columns));
        assert_eq!(rows.len(), runs.geometry().kv_heads);
        assert!(rows.iter().all(|&row| (row as usize) < runs.capacity()), "a row past the extents' end");
        index::store_rows(keys, runs, rows);
        Ok(())
    }

    fn rehearse(
        &self,
        _: &Stream,
        queries: Rows<'_>,
        rehearsals: &[Rehearsal<'_>],
        selected: &mut [&mut Selected],
    ) -> Result<()> {
        assert_activations!(queries);
        assert_eq!(rehearsals.len(), selected.len());
        for rehearsal in rehearsals {
            let geometry = rehearsal.runs.geometry();
            assert_index(geometry);
            let heads = queries.cols() / geometry.columns;
            assert!(queries.cols().is_multiple_of(geometry.columns));
            assert!(heads.is_multiple_of(geometry.kv_heads) && heads > 0);
            assert!(rehearsal.row < queries.rows());
            assert!(rehearsal.rows <= rehearsal.runs.capacity(), "rows past the extents' end");
            assert!(rehearsal.from <= rehearsal.to && rehearsal.to <= rehearsal.rows, "rows that are not there");
        }
        for (rehearsal, selected) in rehearsals.iter().zip(&*selected).filter(|(_, s)| !s.present.is_empty()) {
            assert_eq!(selected.present.len(), rehearsal.runs.geometry().kv_heads);
            assert!(selected.present.iter().all(|rows| rows.len() <= rehearsal.rows), "a row is present twice");
        }
        for selected in selected.iter().filter(|s| !s.most_absent.is_empty()) {
            assert_eq!(selected.most_absent.len(), selected.present.len(), "a correction without what is present");
        }
        index::rehearse(self, queries, rehearsals, selected)
    }

    fn prefetch(
        &self,
        stream: &Stream,
        copies: &Stream,
        queries: Rows<'_>,
        sequences: &mut [Prefetch<'_>],
    ) -> Result<()> {
        let rehearsals: Vec<Rehearsal<'_>> = sequences.iter().map(|sequence| sequence.rehearsal).collect();
        let mut selected = vec![Selected::default(); sequences.len()];
        for (sequence, selected) in sequences.iter().zip(&mut selected) {
            let Prefetch { slots, rehearsal, tail, correction, .. } = sequence;
            if tail.is_some() || correction.is_some() {
                selected.present = slots::present(slots, rehearsal.rows, correction.is_some());
            }
            if let Some(correction) = correction {
                let before = slots::selected(slots).into_iter();
                selected.most_absent = before.map(|selected| correction.most_beside(selected)).collect();
            }
        }
        self.rehearse(stream, queries, &rehearsals, &mut selected.iter_mut().collect::<Vec<_>>())?;
        for (sequence, selected) in sequences.iter_mut().zip(&mut selected) {
            let (mut moves, mut saves) = (Vec::new(), Vec::new());
            for (head, rows) in selected.rows.iter_mut().enumerate() {
                let first = moves.len();
                let corrects = sequence.correction.is_some();
                evict::select(&mut sequence.slots, head, rows, corrects);
                slots::request(&mut sequence.slots, head, rows, &mut moves, corrects);
                saves.extend((0..).zip(&moves[first..]).map(|(to, m)| Move { from: m.to, to, ..*m }));
            }
            if let Some(saved) = &mut sequence.saved {
                self.copy_kv_rows(copies, &sequence.to.runs(), saved, &saves)?;
            }
            self.land(copies, &sequence.from, &mut sequence.to, &moves)?;
            if let Some(tail) = &mut sequence.tail {
                assert_eq!((tail.rows(), tail.cols(), tail.dtype()), (1, selected.tail.len(), DType::F32));
                // SAFETY: the only reference to the row's elements.
                unsafe { view::row_mut(tail, 0) }.copy_from_slice(&selected.tail);
            }
        }
        Ok(())
    }

    fn admit(&self, stream: &Stream, keys: Rows<'_>, values: Rows<'_>, admission: Admission<'_>) -> Result<()> {
        let Admission { row, mut slots, mut store, mut cache, saved, mut index, maps, mean } = admission;
        let heads = slots.geometry.kv_heads;
        let mut rows = vec![row as u32; heads];
        if slots.pool.is_some() {
            for (head, row) in rows.iter_mut().enumerate() {
                let selected = slots::has_selected(&slots, head);
                *row = evict::place(&mut slots, head, selected, &store, &mut index);
            }
        }
        let admitted: Vec<u32> = (0..).zip(&rows).map(|(head, &row)| slots::admit(&mut slots, head, row)).collect();
        if let Some(mut saved) = saved {
            let to = slots.geometry.selected as u32;
            let saves = (0..).zip(&admitted).map(|(head, &from)| Move { head, from, to });
            self.copy_kv_rows(stream, &cache.runs(), &mut saved, &saves.collect::<Vec<_>>())?;
        }
        let runs = store.runs();
        let (geometry, payload) = (*runs.geometry(), runs.payload());
        let places: Vec<Slot> = (0..).zip(&rows).map(|(head, &row)| runs.slot(head, row as usize)).collect();
        self.encode_kv(stream, keys, values, payload, &geometry, &places, store.buffers_mut())?;
        self.store_kv_rows(stream, keys, values, &mut cache, &admitted)?;
        if let Some(mean) = mean {
            self.blend(stream, mean, values)?;
        }
        let columns = heads * maps.outputs;
        let mut partial = self.allocate(4 * columns, Place::Device, "a partial key")?;
        self.project_heads(stream, keys, maps, partial.rows_mut(DType::F32, 1, columns))?;
        self.index_store_rows(stream, partial.rows(DType::F32, 1, columns), &mut index, &rows)
    }

    fn copy(&self, _: &Stream, from: &Buffer, to: &mut Buffer) -> Result<()> {
        assert_eq!(from.bytes(), to.bytes(), "buffers of two sizes");
        // SAFETY: as many bytes of both, and `to` is borrowed mutably, so that it is another.
        unsafe { std::ptr::copy_nonoverlapping(from.address(), to.address_mut(), from.bytes()) };
        Ok(())
    }

    fn take_back(&self, _: &Stream, lost: Lost<'_>) -> Result<()> {
        evict::take_back(lost);
        Ok(())
    }

    fn load_slots(&self, _: &Stream, mut slots: SlotsMut<'_>, length: usize, ranked: Rows<'_>) -> Result<()> {
        assert_eq!((ranked.dtype(), ranked.rows()), (DType::U32, slots.geometry.kv_heads));
        assert!(slots.pool.is_none() && slots.limit <= length && length <= slots.geometry.rows, "rows past the end");
        for head in 0..ranked.rows() {
            slots::load(&mut slots, head, length, view::row_u32(&ranked, head));
        }
        Ok(())
    }

    fn refill(&self, stream: &Stream, slots: Slots<'_>, from: &StoredRuns<'_>, to: &mut KvRunsMut<'_>) -> Result<()> {
        self.land(stream, from, to, &slots::held(&slots))
    }

    fn has_tail(&self) -> bool {
        true
    }

    fn blend(&self, _: &Stream, blend: Blend<'_>, toward: Rows<'_>) -> Result<()> {
        blend.check(toward);
        tail::blend(blend, toward);
        Ok(())
    }

    fn add_tail(&self, _: &Stream, means: Rows<'_>, weights: Rows<'_>, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(means, weights, out);
        assert_eq!((means.rows(), weights.rows(), out.rows()), (1, 1, 1));
        assert!(weights.cols() > 0 && out.cols().is_multiple_of(weights.cols()));
        let d = out.cols() / weights.cols();
        assert!(means.cols().is_multiple_of(d) && weights.cols().is_multiple_of(means.cols() / d));
        tail::add(means, weights, out);
        Ok(())
    }

    fn log_probability(&self, _: &Stream, logits: Rows<'_>, targets: Rows<'_>, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(logits, out);
        assert_eq!((logits.rows(), logits.rows(), 1), (targets.rows(), out.rows(), out.cols()));
        assert!(logits.cols() > 0);
        log_probability::log_probability(self, logits, targets, out);
        Ok(())
    }
}
