//! The CUDA backend: weights, activations and KV in device memory, kernels of our own, cuBLAS for prefill where it is.
//!
//! - [`context`]: the driver, opened at run time; [`memory`]: device and pinned memory; [`kernels`]: PTX, loaded lazily.
//! - [`queue`]: a stream. Operations wait on the host until a result is asked for; [`block`] holds what changes from step
//!   to step, so that a decode step that does what the last one did is replayed as one graph.
//! - One file an operation group: shapes are checked here, parameters are packed there, arithmetic is in `kernels/`.
//!
//! Only `download` and `synchronize` wait for the device (and growing a scratch buffer, which ends soon). Decode products
//! and attention are deterministic, and a row's bits do not depend on the rows beside it.

mod attention;
mod blas;
mod block;
mod context;
mod evict;
mod host;
mod index;
mod kernels;
mod mass;
mod matmul;
mod memory;
mod payload;
mod queue;
mod rank;
mod rehearse;
mod rowwise;
mod scratch;
mod slots;
mod store_kv;
mod tail;
mod timer;

use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use crate::backend::{
    Activation, Admission, AttentionShape, Backend, Blend, Buffer, DType, Event, HeadMaps, IndexRunsMut, KvGeometry,
    KvRuns, KvRunsMut, Landing, Linear, Lost, Move, Norm, Payload, Place, Prefetch, Rehearsal, Rotation, Rows, RowsMut,
    Scratch, Segment, Selected, Selection, Shape, Slot, SlotGeometry, Slots, SlotsMut, StoredRuns, Stream, Timed,
    Timing, Visible, Work,
};
use crate::{Error, ErrorCode, Result};
use blas::Blas;
use context::{Context, Entered};
use kernels::Kernels;
use queue::{Point, Queue, SharedQueue};

/// Computes on a CUDA device. May be shared by threads; operations of one stream take turns.
pub struct CudaBackend {
    shared: Arc<Shared>,
}

/// What buffers keep alive too.
struct Shared {
    context: Context,
    kernels: Kernels,
    queues: RwLock<Vec<SharedQueue>>,
    /// Opened by the first prefill; `None` inside where there is none.
    blas: Mutex<Option<Option<Blas>>>,
}

impl CudaBackend {
    /// Opens device `ordinal`, as the driver counts those it shows (`CUDA_VISIBLE_DEVICES`).
    ///
    /// Errors: `Device` when there is no driver, no such device, or one older than compute capability 8.0.
    pub fn new(ordinal: i32) -> Result<CudaBackend> {
        let context = Context::new(ordinal)?;
        let shared = Shared { context, kernels: Kernels::default(), queues: RwLock::default(), blas: Mutex::new(None) };
        Ok(CudaBackend { shared: Arc::new(shared) })
    }

    /// How often a whole sequence of launches was replayed as a graph, all streams together. For tests and curious people.
    pub fn replays(&self) -> u64 {
        self.shared.queues.read().iter().map(|queue| queue.lock().replays()).sum()
    }

    /// The library that multiplies large matrices, as far as one was opened.
    pub fn blas(&self) -> Option<String> {
        self.shared.blas.lock().as_ref().and_then(|blas| blas.as_ref()).map(|blas| blas.name().to_owned())
    }

    /// The stream's queue, locked, with the context current.
    fn enter(&self, stream: &Stream) -> Result<(Guard, Entered)> {
        let entered = self.shared.context.enter()?;
        let (queue, lane) = place_of(stream);
        let queue = self.shared.queues.read()[queue].clone();
        let mut queue = queue.lock_arc();
        queue.switch(lane);
        Ok((queue, entered))
    }
}

/// Of a stream: which queue, and which lane of it.
fn place_of(stream: &Stream) -> (usize, usize) {
    ((stream.0 >> LANE_BITS) as usize, (stream.0 & ((1 << LANE_BITS) - 1)) as usize)
}

/// Bits of a stream's number that say the lane.
const LANE_BITS: u32 = 2;

/// An event's number: from above 10 bits of a queue, 2 of a lane, 38 of a script or CUDA event, 14 of a launch.
fn event_of(queue: usize, point: Point) -> Result<Event> {
    if queue >= 1 << 10 {
        return Err(Error::new(ErrorCode::Internal, "events are recorded on the first 1024 streams only"));
    }
    let script = point.script & ((1 << 38) - 1);
    Ok(Event((queue as u64) << 54 | (point.lane as u64) << 52 | script << 14 | point.launches as u64))
}

/// See [`event_of`].
fn point_of(event: &Event) -> (usize, Point) {
    let bits = |from: u32, count: u32| event.0 >> from & ((1 << count) - 1);
    (bits(54, 10) as usize, Point { lane: bits(52, 2) as usize, script: bits(14, 38), launches: bits(0, 14) as usize })
}

type Guard = parking_lot::ArcMutexGuard<parking_lot::RawMutex, Queue>;

impl Shared {
    /// Launches what waits on any stream; failures will show where results are asked for.
    fn launch_everything(&self) {
        if let Ok(_entered) = self.context.enter() {
            for queue in self.queues.read().iter() {
                let mut queue = queue.lock();
                if queue.waiting() > 0 {
                    let _ = queue.launch(false);
                }
            }
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if let Ok(_entered) = self.context.enter() {
            for queue in self.queues.get_mut().drain(..) {
                queue.lock().free();
            }
            *self.blas.get_mut() = None;
            self.kernels.unload();
        }
    }
}

/// A device address as kernels take it.
fn address(pointer: *const u8) -> u64 {
    pointer.expose_provenance() as u64
}

/// Asserts that a window holds activations.
macro_rules! assert_activations {
    ($($x:ident),*) => { $(assert_eq!($x.dtype(), DType::F32, concat!(stringify!($x), " must be activations"));)* };
}

/// Asserts that rows of `bytes` bytes lie inside their buffers.
fn assert_slots(mut slots: impl Iterator<Item = Slot>, bytes: usize, buffers: &[Buffer]) {
    let inside = |s: Slot| s.offset.checked_add(bytes).is_some_and(|end| end <= buffers[s.buffer].bytes());
    assert!(slots.all(inside), "a stored row past its buffer's end");
}

/// Asserts that a rehearsal fits its queries and its index.
fn assert_rehearsal(queries: Rows<'_>, rehearsal: &Rehearsal<'_>) {
    let geometry = rehearsal.runs.geometry();
    index::assert_index(geometry);
    let heads = queries.cols() / geometry.columns;
    assert!(queries.cols().is_multiple_of(geometry.columns));
    assert!(heads.is_multiple_of(geometry.kv_heads) && heads > 0);
    assert!(rehearsal.row < queries.rows());
    assert!(rehearsal.rows <= rehearsal.runs.capacity(), "rows past the extents' end");
    assert!(rehearsal.from <= rehearsal.to && rehearsal.to <= rehearsal.rows, "rows that are not there");
}

/// Asserts that tables are as long as their shape says.
fn assert_tables(tables: &Buffer, geometry: &SlotGeometry, layer: usize) {
    assert!(tables.bytes() >= geometry.bytes() && layer < geometry.layers, "tables that are too short");
}

/// Asserts that what is kept of a step's changes lies as the cache does, and has room for `rows` rows.
fn assert_saved(rows: usize, cache: &KvRunsMut<'_>, saved: &Option<KvRunsMut<'_>>) {
    if let Some(saved) = saved {
        assert_eq!((saved.geometry(), saved.layer_offset()), (cache.geometry(), cache.layer_offset()));
        assert!(saved.capacity() >= rows, "no room for what a step changes");
    }
}

/// Asserts that a pool, if there is one, is as long as its shape says and has the rows that are asked for.
fn assert_pool(slots: &SlotsMut<'_>) {
    if let Some(pool) = &slots.pool {
        evict::assert_pool(pool.tables, pool.lost, &pool.geometry, slots.layer);
        assert_eq!((pool.geometry.layers, pool.geometry.kv_heads), (slots.geometry.layers, slots.geometry.kv_heads));
        let rows = pool.rows + usize::from(!pool.full);
        assert!(rows <= pool.geometry.rows && rows <= slots.geometry.rows, "rows past the end");
    }
}

impl Backend for CudaBackend {
    fn description(&self) -> String {
        let Context { name, capability, .. } = &self.shared.context;
        format!("CUDA, {name}, compute capability {}.{}", capability.0, capability.1)
    }

    fn activation(&self) -> DType {
        DType::F32
    }

    fn allocate(&self, bytes: usize, place: Place, purpose: &str) -> Result<Buffer> {
        memory::allocate(&self.shared, bytes, place, purpose)
    }

    fn stream(&self) -> Result<Stream> {
        let _entered = self.shared.context.enter()?;
        let mut queues = self.shared.queues.write();
        queues.push(Arc::new(Mutex::new(Queue::new()?)));
        Ok(Stream((queues.len() as u64 - 1) << LANE_BITS))
    }

    fn side_stream(&self, of: &Stream) -> Result<Stream> {
        let (mut queue, _entered) = self.enter(of)?;
        Ok(Stream(of.0 >> LANE_BITS << LANE_BITS | queue.add_lane()? as u64))
    }

    fn record(&self, stream: &Stream) -> Result<Event> {
        let (mut queue, _entered) = self.enter(stream)?;
        event_of(place_of(stream).0, queue.point()?)
    }

    fn wait(&self, stream: &Stream, event: &Event) -> Result<()> {
        let (from, point) = point_of(event);
        if from == place_of(stream).0 {
            return self.enter(stream)?.0.wait(point);
        }
        // All that the other queue was told, which is never wrong to wait for.
        let event = self.enter(&Stream((from as u64) << LANE_BITS))?.0.event()?;
        self.enter(stream)?.0.wait_event(event)
    }

    fn synchronize(&self, stream: &Stream) -> Result<()> {
        let (mut queue, _entered) = self.enter(stream)?;
        queue.finish()
    }

    fn set_timing(&self, stream: &Stream, timing: Timing) -> Result<()> {
        let (mut queue, _entered) = self.enter(stream)?;
        queue.set_timing(timing)
    }

    fn take_timed(&self, stream: &Stream) -> Result<Vec<Timed>> {
        let (mut queue, _entered) = self.enter(stream)?;
        Ok(queue.take_timed())
    }

    fn scratch(&self, stream: &Stream, work: Option<&Work<'_>>) -> Result<Scratch> {
        let (queue, _entered) = self.enter(stream)?;
        Ok(scratch::scratch(&self.shared, &queue, work))
    }

    fn upload(&self, stream: &Stream, source: &[u8], target: &mut Buffer, offset: usize) -> Result<()> {
        let end = offset.checked_add(source.len());
        assert!(end.is_some_and(|end| end <= target.bytes()), "an upload past the buffer's end");
        let (mut queue, _entered) = self.enter(stream)?;
        queue.upload(&self.shared, source, address(target.address()) + offset as u64)
    }

    fn download(&self, stream: &Stream, source: Rows<'_>, target: &mut [u8]) -> Result<()> {
        let bytes = source.rows() * source.cols() * source.dtype().bytes();
        assert_eq!(target.len(), bytes, "a download's target must hold the rows exactly");
        let (mut queue, _entered) = self.enter(stream)?;
        queue.download(source, target)
    }

    fn embed(&self, stream: &Stream, table: &Linear, ids: Rows<'_>, accumulate: bool, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(out);
        assert_eq!((ids.rows(), ids.dtype(), table.inputs), (out.rows(), DType::U32, out.cols()));
        let (mut queue, _entered) = self.enter(stream)?;
        rowwise::embed(&self.shared, &mut queue, table, ids, accumulate, out)
    }

    fn norm(&self, stream: &Stream, x: Rows<'_>, norm: &Norm, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(x, out);
        assert_eq!((x.rows(), x.cols()), (out.rows(), out.cols()));
        assert_eq!(x.cols(), norm.weight.len);
        assert!(norm.bias.as_ref().is_none_or(|b| b.len == norm.weight.len));
        let (mut queue, _entered) = self.enter(stream)?;
        rowwise::norm(&self.shared, &mut queue, x, norm, out)
    }

    fn norm_heads(&self, stream: &Stream, x: RowsMut<'_>, norm: &Norm) -> Result<()> {
        assert_activations!(x);
        assert!(norm.weight.len > 0 && x.cols().is_multiple_of(norm.weight.len));
        assert!(norm.bias.as_ref().is_none_or(|b| b.len == norm.weight.len));
        let (mut queue, _entered) = self.enter(stream)?;
        rowwise::norm_heads(&self.shared, &mut queue, x, norm)
    }

    fn matmul_beside(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        weight: &Linear,
        accumulate: bool,
        shape: Shape,
        out: RowsMut<'_>,
        beside: &mut (dyn FnMut() + Send),
    ) -> Result<()> {
        beside();
        assert_activations!(x, out);
        assert_eq!(x.rows(), out.rows());
        assert_eq!((x.cols(), out.cols()), (weight.inputs, weight.outputs));
        assert!(weight.inputs > 0);
        assert!(weight.bias.as_ref().is_none_or(|b| b.len == weight.outputs));
        let (mut queue, _entered) = self.enter(stream)?;
        match shape {
            Shape::Decode => matmul::decode(&self.shared, &mut queue, x, weight, accumulate, out),
            Shape::Prefill => matmul::prefill(&self.shared, &mut queue, x, weight, accumulate, out),
        }
    }

    fn activate(&self, stream: &Stream, x: Rows<'_>, activation: Activation, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(x, out);
        let factor = if activation.gated() { 2 } else { 1 };
        assert_eq!((x.rows(), x.cols()), (out.rows(), factor * out.cols()));
        let (mut queue, _entered) = self.enter(stream)?;
        rowwise::activate(&self.shared, &mut queue, x, activation, out)
    }

    fn rotation_table(
        &self,
        stream: &Stream,
        rotation: &Rotation,
        positions: Rows<'_>,
        table: RowsMut<'_>,
    ) -> Result<()> {
        assert_activations!(table);
        assert_eq!((positions.rows(), rotation.dims()), (table.rows(), table.cols()));
        assert_eq!(positions.dtype(), DType::U32);
        let (mut queue, _entered) = self.enter(stream)?;
        rowwise::rotation_table(&self.shared, &mut queue, rotation, positions, table)
    }

    fn rotate(
        &self,
        stream: &Stream,
        rotation: &Rotation,
        table: Rows<'_>,
        head_dim: usize,
        x: RowsMut<'_>,
    ) -> Result<()> {
        assert_activations!(table, x);
        assert_eq!((table.rows(), table.cols()), (x.rows(), rotation.dims()));
        assert!(head_dim > 0 && x.cols().is_multiple_of(head_dim) && rotation.dims() <= head_dim);
        let (mut queue, _entered) = self.enter(stream)?;
        rowwise::rotate(&self.shared, &mut queue, table, head_dim, x)
    }

    fn store_kv(
        &self,
        stream: &Stream,
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
        let (mut queue, _entered) = self.enter(stream)?;
        store_kv::store(&self.shared, &mut queue, keys, values, runs, position)
    }

    fn store_kv_rows(
        &self,
        stream: &Stream,
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
        let (mut queue, _entered) = self.enter(stream)?;
        store_kv::store_rows(&self.shared, &mut queue, keys, values, runs, rows)
    }

    fn copy_kv_rows(&self, stream: &Stream, from: &KvRuns<'_>, to: &mut KvRunsMut<'_>, moves: &[Move]) -> Result<()> {
        let (a, b) = (from.geometry(), to.geometry());
        assert_eq!((a.kv_heads, a.head_dim, a.dtype), (b.kv_heads, b.head_dim, b.dtype));
        let fits = |m: &Move| (m.from as usize) < from.capacity() && (m.to as usize) < to.capacity();
        assert!(moves.iter().all(|m| (m.head as usize) < a.kv_heads && fits(m)), "a row past the extents' end");
        let (mut queue, _entered) = self.enter(stream)?;
        store_kv::copy_rows(&self.shared, &mut queue, from, to, moves)
    }

    fn attend(
        &self,
        stream: &Stream,
        q: Rows<'_>,
        attention: &AttentionShape,
        segments: &[Segment<'_>],
        out: RowsMut<'_>,
    ) -> Result<()> {
        assert_activations!(q, out);
        assert_eq!((q.rows(), q.cols()), (out.rows(), out.cols()));
        assert_eq!(q.cols(), attention.heads * attention.head_dim);
        assert!(attention.kv_heads > 0 && attention.heads.is_multiple_of(attention.kv_heads) && attention.head_dim > 0);
        assert!(attention.window != Some(0), "a window of no tokens");
        for (i, segment) in segments.iter().enumerate() {
            let geometry = segment.runs.geometry();
            assert_eq!((geometry.kv_heads, geometry.head_dim), (attention.kv_heads, attention.head_dim));
            assert!(segment.row + segment.rows <= q.rows());
            let apart =
                |other: &Segment<'_>| other.row + other.rows <= segment.row || segment.row + segment.rows <= other.row;
            assert!(segments[..i].iter().all(apart), "segments overlap");
        }
        let (mut queue, _entered) = self.enter(stream)?;
        attention::attend(&self.shared, &mut queue, q, attention, segments, out)
    }

    fn has_files(&self) -> bool {
        false
    }

    /// It could, over the link; but then the link rests while anything else is computed.
    fn reads_host_in_place(&self) -> bool {
        false
    }

    fn prefill_chunk(&self) -> usize {
        4096
    }

    fn selects_on_device(&self) -> bool {
        true
    }

    /// Of `infinigen`, whose pools it keeps.
    fn has_eviction(&self) -> bool {
        true
    }

    fn copy_kv(
        &self,
        stream: &Stream,
        from: &KvRuns<'_>,
        to: &mut KvRunsMut<'_>,
        rows: std::ops::Range<usize>,
    ) -> Result<()> {
        let (a, b) = (*from.geometry(), *to.geometry());
        assert_eq!((a.kv_heads, a.head_dim, a.dtype), (b.kv_heads, b.head_dim, b.dtype));
        assert_eq!(a.extent_tokens, b.extent_tokens, "extents of one length");
        assert!(rows.end <= from.capacity() && rows.end <= to.capacity(), "rows past the extents' end");
        let (mut queue, _entered) = self.enter(stream)?;
        store_kv::copy_range(&mut queue, from, to, rows)
    }

    fn encode_kv(
        &self,
        stream: &Stream,
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
        let (mut queue, _entered) = self.enter(stream)?;
        payload::encode(&self.shared, &mut queue, [keys, values], payload, geometry, slots, targets)
    }

    fn decode_kv_rows(
        &self,
        stream: &Stream,
        payload: Payload,
        sources: &[Buffer],
        landings: &[Landing],
        to: &mut KvRunsMut<'_>,
    ) -> Result<()> {
        let geometry = to.geometry();
        assert_slots(landings.iter().map(|l| l.from), payload.row_bytes(geometry), sources);
        let fits = |l: &Landing| (l.head as usize) < geometry.kv_heads && (l.to as usize) < to.capacity();
        assert!(landings.iter().all(fits), "a row past the extents' end");
        let (mut queue, _entered) = self.enter(stream)?;
        payload::decode(&self.shared, &mut queue, payload, sources, landings, to)
    }

    fn fetch_kv(&self, stream: &Stream, from: &StoredRuns<'_>, to: &mut KvRunsMut<'_>, rows: usize) -> Result<()> {
        let (a, b) = (from.geometry(), to.geometry());
        assert_eq!((a.kv_heads, a.head_dim, a.dtype), (b.kv_heads, b.head_dim, b.dtype));
        assert_eq!(a.extent_tokens, b.extent_tokens, "runs of two lengths");
        assert!(rows <= from.capacity().min(to.capacity()), "rows past the extents' end");
        let (mut queue, _entered) = self.enter(stream)?;
        payload::fetch(&self.shared, &mut queue, from, to, rows)
    }

    fn attention_mass(
        &self,
        stream: &Stream,
        q: Rows<'_>,
        attention: &AttentionShape,
        segment: &Segment<'_>,
        out: RowsMut<'_>,
    ) -> Result<()> {
        assert_activations!(q, out);
        assert_eq!((q.cols(), out.rows()), (attention.heads * attention.head_dim, attention.kv_heads));
        assert!(attention.kv_heads > 0 && attention.heads.is_multiple_of(attention.kv_heads) && attention.head_dim > 0);
        assert!(attention.window != Some(0), "a window of no tokens");
        let geometry = segment.runs.geometry();
        assert_eq!((geometry.kv_heads, geometry.head_dim), (attention.kv_heads, attention.head_dim));
        assert!(segment.row + segment.rows <= q.rows());
        let capacity = segment.runs.capacity();
        let columns = match segment.visible {
            Visible::Causal => {
                assert!(segment.position + segment.rows <= capacity, "tokens past the extents' end");
                segment.position + segment.rows
            }
            Visible::First(counts) => {
                assert_eq!((segment.rows, counts.len()), (1, attention.kv_heads));
                assert!(counts.iter().all(|&n| n as usize <= capacity), "rows past the extents' end");
                counts.iter().map(|&n| n as usize).max().unwrap_or(0)
            }
            Visible::Listed(rows) => {
                assert_eq!((segment.rows, rows.len()), (1, attention.kv_heads));
                assert!(rows.iter().flatten().all(|&row| (row as usize) < capacity), "rows past the extents' end");
                rows.iter().map(Vec::len).max().unwrap_or(0)
            }
            Visible::Slots(_) => unreachable!("slots are not ranked"),
        };
        assert!(out.cols() >= columns, "{} columns cannot take the masses of {columns} tokens", out.cols());
        let (mut queue, _entered) = self.enter(stream)?;
        mass::mass(&self.shared, &mut queue, q, attention, segment, &out)
    }

    fn rank(&self, stream: &Stream, scores: Rows<'_>, out: RowsMut<'_>) -> Result<()> {
        assert_eq!((scores.dtype(), out.dtype(), scores.rows()), (DType::F32, DType::U32, out.rows()));
        assert!(out.cols() <= scores.cols(), "more columns than there are");
        let (mut queue, _entered) = self.enter(stream)?;
        rank::rank(&self.shared, &mut queue, scores, &out)
    }

    fn project_heads(&self, stream: &Stream, x: Rows<'_>, maps: &HeadMaps, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(x, out);
        assert!(maps.kv_heads > 0 && maps.inputs > 0 && maps.outputs > 0);
        let heads = x.cols() / maps.inputs;
        assert!(x.cols().is_multiple_of(maps.inputs) && heads.is_multiple_of(maps.kv_heads) && heads > 0);
        assert_eq!((out.rows(), out.cols()), (x.rows(), heads * maps.outputs));
        let (mut queue, _entered) = self.enter(stream)?;
        index::project_heads(&self.shared, &mut queue, x, maps, &out)
    }

    fn index_append(&self, stream: &Stream, keys: Rows<'_>, runs: &mut IndexRunsMut<'_>, row: usize) -> Result<()> {
        assert_activations!(keys);
        index::assert_index(runs.geometry());
        assert_eq!(keys.cols(), runs.geometry().kv_heads * runs.geometry().columns);
        assert!(row + keys.rows() <= runs.capacity(), "rows past the extents' end");
        let (mut queue, _entered) = self.enter(stream)?;
        index::append(&self.shared, &mut queue, keys, runs, row)
    }

    fn index_store_rows(
        &self,
        stream: &Stream,
        keys: Rows<'_>,
        runs: &mut IndexRunsMut<'_>,
        rows: &[u32],
    ) -> Result<()> {
        assert_activations!(keys);
        index::assert_index(runs.geometry());
        assert_eq!((keys.rows(), keys.cols()), (1, runs.geometry().kv_heads * runs.geometry().columns));
        assert_eq!(rows.len(), runs.geometry().kv_heads);
        assert!(rows.iter().all(|&row| (row as usize) < runs.capacity()), "a row past the extents' end");
        let (mut queue, _entered) = self.enter(stream)?;
        index::store_rows(&self.shared, &mut queue, keys, runs, rows)
    }

    fn rehearse(
        &self,
        stream: &Stream,
        queries: Rows<'_>,
        rehearsals: &[Rehearsal<'_>],
        selected: &mut [&mut Selected],
    ) -> Result<()> {
        assert_activations!(queries);
        assert_eq!(rehearsals.len(), selected.len());
        rehearsals.iter().for_each(|rehearsal| assert_rehearsal(queries, rehearsal));
        let (mut queue, _entered) = self.enter(stream)?;
        rehearse::rehearse(&self.shared, &mut queue, queries, rehearsals, selected)
    }

    fn prefetch(
        &self,
        stream: &Stream,
        copies: &Stream,
        queries: Rows<'_>,
        sequences: &mut [Prefetch<'_>],
    ) -> Result<()> {
        assert_activations!(queries);
        assert_eq!(place_of(stream).0, place_of(copies).0, "entries are copied on a stream beside");
        for Prefetch { rehearsal, slots, from, to, saved, tail, correction } in &*sequences {
            assert_rehearsal(queries, rehearsal);
            assert_tables(slots.tables, &slots.geometry, slots.layer);
            let (a, b) = (from.geometry(), to.geometry());
            assert_eq!((a.kv_heads, a.head_dim, a.dtype), (b.kv_heads, b.head_dim, b.dtype));
            assert!(rehearsal.rows <= from.capacity() && rehearsal.rows <= slots.geometry.rows, "rows past the end");
            assert!(slots.limit <= slots.geometry.slots && slots.limit <= to.capacity(), "slots past the end");
            let corrects = correction.is_some();
            assert!(!corrects || slots.geometry.corrected > 0 && stream.0 == copies.0, "no room for a correction");
            let kept = if corrects { slots.geometry.corrected } else { slots.geometry.selected + 1 };
            assert_saved(kept, to, saved);
            assert_pool(slots);
            if let Some(tail) = tail {
                let heads = queries.cols() / rehearsal.runs.geometry().columns;
                assert_eq!((tail.rows(), tail.cols(), tail.dtype()), (1, heads, DType::F32));
                assert!(!matches!(rehearsal.selection, Selection::Paper { .. }), "that rule knows no probabilities");
            }
        }
        let (mut queue, _entered) = self.enter(stream)?;
        slots::prefetch(&self.shared, &mut queue, place_of(copies).1, queries, sequences)
    }

    fn admit(&self, stream: &Stream, keys: Rows<'_>, values: Rows<'_>, admission: Admission<'_>) -> Result<()> {
        assert_activations!(keys, values);
        let Admission { row, slots, store, cache, saved, index, maps, mean } = &admission;
        let store = store.runs();
        assert_tables(slots.tables, &slots.geometry, slots.layer);
        assert_saved(slots.geometry.selected + 1, cache, saved);
        assert_pool(slots);
        let (a, b) = (store.geometry(), cache.geometry());
        assert_eq!(
            (a.kv_heads, a.head_dim, a.dtype, a.extent_tokens),
            (b.kv_heads, b.head_dim, b.dtype, b.extent_tokens)
        );
        assert_eq!(
            (keys.rows(), values.rows(), keys.cols(), values.cols()),
            (1, 1, a.kv_heads * a.head_dim, keys.cols())
        );
        assert_eq!((maps.kv_heads, maps.inputs, maps.outputs), (a.kv_heads, a.head_dim, index.geometry().columns));
        assert_eq!((index.geometry().kv_heads, slots.geometry.kv_heads), (a.kv_heads, a.kv_heads));
        assert!(*row < store.capacity() && *row < index.capacity() && *row < slots.geometry.rows, "a row past the end");
        assert!(slots.limit > 0 && slots.limit <= slots.geometry.slots.min(cache.capacity()), "slots past the end");
        assert!(!slots.by_list || slots.geometry.attended > 0, "no room for a list");
        if let Some(mean) = mean {
            mean.check(values);
        }
        let (mut queue, _entered) = self.enter(stream)?;
        slots::admit(&self.shared, &mut queue, keys, values, admission)
    }

    fn copy(&self, stream: &Stream, from: &Buffer, to: &mut Buffer) -> Result<()> {
        assert!(from.bytes() == to.bytes() && from.bytes().is_multiple_of(8), "buffers of two sizes, or of no words");
        let (mut queue, _entered) = self.enter(stream)?;
        evict::copy(&self.shared, &mut queue, from, to)
    }

    fn take_back(&self, stream: &Stream, lost: Lost<'_>) -> Result<()> {
        evict::assert_pool(lost.tables, lost.lost, &lost.geometry, lost.layer);
        let (mut queue, _entered) = self.enter(stream)?;
        evict::take_back(&self.shared, &mut queue, lost)
    }

    fn load_slots(&self, stream: &Stream, slots: SlotsMut<'_>, length: usize, ranked: Rows<'_>) -> Result<()> {
        assert_tables(slots.tables, &slots.geometry, slots.layer);
        assert_eq!((ranked.dtype(), ranked.rows()), (DType::U32, slots.geometry.kv_heads));
        assert!(slots.limit <= slots.geometry.slots && slots.limit <= length, "slots past the end");
        assert!(slots.pool.is_none() && length <= slots.geometry.rows, "rows past the end");
        let (mut queue, _entered) = self.enter(stream)?;
        slots::load(&self.shared, &mut queue, &slots, length, ranked)
    }

    fn refill(&self, stream: &Stream, slots: Slots<'_>, from: &StoredRuns<'_>, to: &mut KvRunsMut<'_>) -> Result<()> {
        assert_tables(slots.tables, &slots.geometry, slots.layer);
        let (a, b) = (from.geometry(), to.geometry());
        assert_eq!((a.kv_heads, a.head_dim, a.dtype), (b.kv_heads, b.head_dim, b.dtype));
        let (mut queue, _entered) = self.enter(stream)?;
        slots::refill(&self.shared, &mut queue, slots, from, to)
    }

    fn has_tail(&self) -> bool {
        true
    }

    fn blend(&self, stream: &Stream, blend: Blend<'_>, toward: Rows<'_>) -> Result<()> {
        blend.check(toward);
        let (mut queue, _entered) = self.enter(stream)?;
        tail::blend(&self.shared, &mut queue, blend, toward)
    }

    fn add_tail(&self, stream: &Stream, means: Rows<'_>, weights: Rows<'_>, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(means, weights, out);
        assert_eq!((means.rows(), weights.rows(), out.rows()), (1, 1, 1));
        assert!(weights.cols() > 0 && out.cols().is_multiple_of(weights.cols()));
        let d = out.cols() / weights.cols();
        assert!(means.cols().is_multiple_of(d) && weights.cols().is_multiple_of(means.cols() / d));
        let (mut queue, _entered) = self.enter(stream)?;
        tail::add(&self.shared, &mut queue, means, weights, out)
    }

    fn log_probability(&self, stream: &Stream, logits: Rows<'_>, targets: Rows<'_>, out: RowsMut<'_>) -> Result<()> {
        assert_activations!(logits, out);
        assert_eq!((logits.rows(), logits.rows(), 1), (targets.rows(), out.rows(), out.cols()));
        assert!(logits.cols() > 0 && targets.dtype() == DType::U32);
        let (mut queue, _entered) = self.enter(stream)?;
        rowwise::log_probability(&self.shared, &mut queue, logits, targets, out)
    }
}
