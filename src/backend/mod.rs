//! How things are computed: one trait of whole operations on opaque buffers, streams and events.
//!
//! - The engine, the policies and the KV store see this trait only; nothing above this room knows which backend runs.
//! - Operations are enqueued on a stream and take effect in the stream's order; `record`/`wait` order streams among
//!   each other. The CPU backend completes each operation before it returns, so its streams and events are empty.
//! - Shapes are the caller's promise and are asserted; sizes that come from a user are checked far above this room.
//! - What may not enter: sessions, policies, files, anything that knows what a token means.

mod blocks;
mod buffer;
pub mod cpu;
pub mod cuda;
mod evicting;
mod index;
mod payload;
mod replay;
mod runs;
mod scratch;
mod slots;
mod timing;
mod weights;

use crate::{Error, Result};
pub use blocks::Blocks;
pub use buffer::{Buffer, DType, Place, Rows, RowsMut};
pub use evicting::{Lost, PoolGeometry, PoolHeader, PoolMut, VictimRule};
pub use index::{IndexBits, IndexGeometry, IndexRuns, IndexRunsMut, Rehearsal, Selected, Selection};
pub use payload::{Landing, Payload, Slot, StoredRuns, StoredRunsMut};
pub use replay::Replay;
pub use runs::{KvGeometry, KvRuns, KvRunsMut, Move};
pub use scratch::{Product, Scratch, Work};
pub use slots::{Admission, Blend, Correction, Guard, Header, Lists, Prefetch, SlotGeometry, Slots, SlotsMut};
use std::ops::Range;
pub use timing::{Timed, Timing};
pub use weights::{Activation, HeadMaps, Linear, Norm, NormKind, Rotation, Vector};

/// Runs operations. `Arc<dyn Backend>` is shared by everything that belongs to one model.
///
/// Activations are rows of [`Backend::activation`] elements, one row a token. Weights are [`Linear`]s.
pub trait Backend: Send + Sync {
    /// One line for people: device, instruction set, threads.
    fn description(&self) -> String;

    /// Whether keys and values may lie in a file: the host reads there what operations have written, and the other way.
    fn has_files(&self) -> bool {
        true
    }

    /// Whether attention reads host memory as fast as any. Where it does not, entries there are fetched before.
    fn reads_host_in_place(&self) -> bool {
        true
    }

    /// Whether it has what eviction from a full pool needs: entries and partial keys that are stored over others.
    fn has_eviction(&self) -> bool {
        false
    }

    /// Whether a hot cache is better kept by [`Backend::prefetch`] and [`Backend::admit`], where asking the host costs
    /// more than the work itself.
    fn selects_on_device(&self) -> bool {
        false
    }

    /// Whether weights may lie in [`Blocks`]; where not, they are widened when they are loaded.
    fn has_blocks(&self) -> bool {
        false
    }

    /// Whether weights may lie in any memory of the host: a mapped file's. They are aligned to their elements there.
    fn has_mapped_weights(&self) -> bool {
        false
    }

    /// Rows of a prompt that it runs at once unless told otherwise: enough to fill it, few enough for scratch memory.
    fn prefill_chunk(&self) -> usize {
        512
    }

    /// Element type of activations (`f32` on the CPU).
    fn activation(&self) -> DType;

    /// `bytes` zeroed bytes in `place`, aligned to 64. Errors with `OutOfMemory`, naming `purpose`.
    fn allocate(&self, bytes: usize, place: Place, purpose: &str) -> Result<Buffer>;

    /// A new stream of execution.
    fn stream(&self) -> Result<Stream>;

    /// A stream beside `of`, for work that overlaps with it, ordered by events only. On a device both are replayed as
    /// one, and events between them cost nothing; there are at most two beside a stream.
    fn side_stream(&self, of: &Stream) -> Result<Stream>;

    /// An event that completes when everything enqueued on `stream` so far has.
    fn record(&self, stream: &Stream) -> Result<Event>;

    /// Makes later work on `stream` wait for `event`.
    fn wait(&self, stream: &Stream, event: &Event) -> Result<()>;

    /// Blocks until `stream` has finished.
    fn synchronize(&self, stream: &Stream) -> Result<()>;

    /// Measures from now on when what runs on `stream` and on those beside it begins and ends; what was measured before is
    /// forgotten. `Unsupported` for anything but `Off` where the backend cannot.
    fn set_timing(&self, _stream: &Stream, timing: Timing) -> Result<()> {
        match timing {
            Timing::Off => Ok(()),
            _ => Err(Error::unsupported(format!("{} does not measure its operations", self.description()))),
        }
    }

    /// What was measured on `stream` and on those beside it since the last call, as far as a [`Backend::synchronize`] or a
    /// [`Backend::download`] has waited for it.
    fn take_timed(&self, _stream: &Stream) -> Result<Vec<Timed>> {
        Ok(Vec::new())
    }

    /// Scratch memory that is held for operations on `stream` and on those beside it; with `work`, what will be held when
    /// that has run. What libraries take for themselves (cuBLAS) is not known.
    fn scratch(&self, _stream: &Stream, _work: Option<&Work<'_>>) -> Result<Scratch> {
        Ok(Scratch::default())
    }

    /// Copies `source` into `target` from its byte `offset` on.
    fn upload(&self, stream: &Stream, source: &[u8], target: &mut Buffer, offset: usize) -> Result<()>;

    /// Copies rows (contiguous or strided) into `target`, tightly packed; complete when it returns.
    fn download(&self, stream: &Stream, source: Rows<'_>, target: &mut [u8]) -> Result<()>;

    /// Copies `rows` of a weight in its element type, as [`Backend::download`] does; of blocks the values they stand for.
    fn download_weight(&self, stream: &Stream, weight: &Linear, rows: Range<usize>, target: &mut [u8]) -> Result<()> {
        self.download(stream, weight.rows().row_range(rows.start, rows.len()), target)
    }

    /// `out[i] = table[ids[i]]`; `ids` is one column of `u32`, each below the table's rows.
    /// With `accumulate`, adds to `out` instead (learned positions).
    fn embed(&self, stream: &Stream, table: &Linear, ids: Rows<'_>, accumulate: bool, out: RowsMut<'_>) -> Result<()>;

    /// Row-wise normalisation of `x` into `out`. `x` may have more rows than one token when heads are normalised
    /// separately (Qwen3: a window of `tokens × heads` rows of `head_dim`).
    fn norm(&self, stream: &Stream, x: Rows<'_>, norm: &Norm, out: RowsMut<'_>) -> Result<()>;

    /// As [`Backend::norm`], in place, on each run of `norm.len()` columns of `x` by itself (per-head q/k norm).
    fn norm_heads(&self, stream: &Stream, x: RowsMut<'_>, norm: &Norm) -> Result<()>;

    /// `out = x · weightᵀ + bias`, or `out += …` with `accumulate`. `x`: m × inputs, `out`: m × outputs, both
    /// activations (`out` may be f32 instead, for logits); accumulation in f32. With [`Shape::Decode`] every row's result is bit-identical whatever m is.
    fn matmul(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        weight: &Linear,
        accumulate: bool,
        shape: Shape,
        out: RowsMut<'_>,
    ) -> Result<()> {
        self.matmul_beside(stream, x, weight, accumulate, shape, out, &mut || {})
    }

    /// As [`Backend::matmul`], with `beside` done before it or while it runs, once, by some thread: work of the host that
    /// neither needs `out` nor touches `x`. A backend that only enqueues what it is told does it first.
    #[allow(clippy::too_many_arguments, reason = "those of a product, and one")]
    fn matmul_beside(
        &self,
        stream: &Stream,
        x: Rows<'_>,
        weight: &Linear,
        accumulate: bool,
        shape: Shape,
        out: RowsMut<'_>,
        beside: &mut (dyn FnMut() + Send),
    ) -> Result<()>;

    /// `out[:, j] = activation(gate_up[:, j]) * gate_up[:, j + n]` for gated kinds (`out` has n columns, `gate_up` 2n),
    /// `out = activation(x)` for plain ones.
    fn activate(&self, stream: &Stream, x: Rows<'_>, activation: Activation, out: RowsMut<'_>) -> Result<()>;

    /// Cosines then sines of every position: `table` is f32, one row a token, `rotation.dims()` columns.
    fn rotation_table(
        &self,
        stream: &Stream,
        rotation: &Rotation,
        positions: Rows<'_>,
        table: RowsMut<'_>,
    ) -> Result<()>;

    /// Rotates each head (`head_dim` consecutive columns) of each row of `x` by that row of `table`; dimensions past
    /// `rotation.dims()` stay as they are.
    fn rotate(
        &self,
        stream: &Stream,
        rotation: &Rotation,
        table: Rows<'_>,
        head_dim: usize,
        x: RowsMut<'_>,
    ) -> Result<()>;

    /// Stores keys and values (m rows of `kv_heads × head_dim` activations) of m consecutive tokens, the first at
    /// `position`, into `runs`, rounded to its dtype.
    fn store_kv(
        &self,
        stream: &Stream,
        keys: Rows<'_>,
        values: Rows<'_>,
        runs: &mut KvRunsMut<'_>,
        position: usize,
    ) -> Result<()>;

    /// As [`Backend::store_kv`] for one token, whose row is another one for each KV head: `rows[head]`.
    fn store_kv_rows(
        &self,
        stream: &Stream,
        keys: Rows<'_>,
        values: Rows<'_>,
        runs: &mut KvRunsMut<'_>,
        rows: &[u32],
    ) -> Result<()>;

    /// Copies rows (a key and its value) between runs of one shape, in the order of `moves`: the gather. Rows of one
    /// head in ascending order of `from` are read fastest.
    fn copy_kv_rows(&self, stream: &Stream, from: &KvRuns<'_>, to: &mut KvRunsMut<'_>, moves: &[Move]) -> Result<()>;

    /// Copies the rows `rows` of every head between runs of one shape: long pieces, by what does not take part in arithmetic.
    fn copy_kv(
        &self,
        stream: &Stream,
        from: &KvRuns<'_>,
        to: &mut KvRunsMut<'_>,
        rows: std::ops::Range<usize>,
    ) -> Result<()>;

    /// Stores keys and values (m rows of `kv_heads × head_dim` activations) as `payload` has it, that of token i and head h
    /// in slot `i × kv_heads + h`, which overlaps no other. Every backend writes the same bytes for the same finite input.
    #[allow(clippy::too_many_arguments, reason = "each is one thing")]
    fn encode_kv(
        &self,
        stream: &Stream,
        keys: Rows<'_>,
        values: Rows<'_>,
        payload: Payload,
        geometry: &KvGeometry,
        slots: &[Slot],
        targets: &mut [Buffer],
    ) -> Result<()>;

    /// Widens stored rows, wherever they lie in `sources`, into `to`. Two landings in one place leave either there.
    fn decode_kv_rows(
        &self,
        stream: &Stream,
        payload: Payload,
        sources: &[Buffer],
        landings: &[Landing],
        to: &mut KvRunsMut<'_>,
    ) -> Result<()>;

    /// Lands the first `rows` rows of every head of a layer that is fetched whole, each in the row of its own place in `to`,
    /// widened as by [`Backend::decode_kv_rows`]. Runs of both are equally long.
    fn fetch_kv(&self, stream: &Stream, from: &StoredRuns<'_>, to: &mut KvRunsMut<'_>, rows: usize) -> Result<()>;

    /// Softmax attention of `q` (rows of `heads × head_dim`) over what each segment names, into `out` (same
    /// shape). Segments cover disjoint row ranges. A segment's result does not depend on the others beside it.
    fn attend(
        &self,
        stream: &Stream,
        q: Rows<'_>,
        attention: &AttentionShape,
        segments: &[Segment<'_>],
        out: RowsMut<'_>,
    ) -> Result<()>;

    /// Adds to `out[g][t]` the softmax probability that the causal attention of each of the segment's rows gives to the
    /// token at position t, summed over the rows and over the query heads of KV head g. `out` is f32, one row a KV head,
    /// of at least `position + rows` columns. (H2O's heavy hitters; which entries to keep resident after a prefill.)
    fn attention_mass(
        &self,
        stream: &Stream,
        q: Rows<'_>,
        attention: &AttentionShape,
        segment: &Segment<'_>,
        out: RowsMut<'_>,
    ) -> Result<()>;

    /// Finds the best columns of every row of `scores`, f32: `out` (u32) gets as many as it has columns, the largest first, of
    /// equals the lower ones. The order is IEEE 754's total one.
    fn rank(&self, stream: &Stream, scores: Rows<'_>, out: RowsMut<'_>) -> Result<()>;

    /// Puts every head through its KV head's map: `out[i][h] = maps[h / group] · x[i][h]`. `x` has `heads × maps.inputs`
    /// columns, `out` has `heads × maps.outputs`; `heads` is a multiple of the maps' KV heads, `group` the factor.
    fn project_heads(&self, stream: &Stream, x: Rows<'_>, maps: &HeadMaps, out: RowsMut<'_>) -> Result<()>;

    /// Stores the partial keys (m rows of `kv_heads × columns` activations) of m consecutive tokens, the first in row
    /// `row` of each run, quantized to the index's type. Every row has a scale of its own.
    fn index_append(&self, stream: &Stream, keys: Rows<'_>, runs: &mut IndexRunsMut<'_>, row: usize) -> Result<()>;

    /// As [`Backend::index_append`] for one token, whose row is another one for each KV head: `rows[head]`.
    fn index_store_rows(
        &self,
        stream: &Stream,
        keys: Rows<'_>,
        runs: &mut IndexRunsMut<'_>,
        rows: &[u32],
    ) -> Result<()>;

    /// Rehearses attention on the index and selects: for each of `rehearsals`, whose partial queries are one row of
    /// `queries` (`heads × columns` activations), scores every row of the index and picks rows by its rule, into the
    /// `Selected` of the same place. Results depend on nothing else: not on threads, batch or instruction set.
    fn rehearse(
        &self,
        stream: &Stream,
        queries: Rows<'_>,
        rehearsals: &[Rehearsal<'_>],
        selected: &mut [&mut Selected],
    ) -> Result<()>;

    /// Rehearses attention as [`Backend::rehearse`] does, looks the selected rows up in each sequence's tables, marks them
    /// as used, gives those that are not there the slots of the rows unused for longest (ties: the lower slot; both rows
    /// and slots in ascending order), and copies their entries. Tails are found out where they are wanted. The host learns of
    /// none of it. With a pool, rows whose tokens are guarded are left out of what is selected, and the use of the others is
    /// noted.
    ///
    /// Entries are copied on `copies`, a stream beside `stream` or the same, after all else: so the next layer's rows are
    /// looked up while this one's come. What is recorded on `copies` afterwards stands for everything. Where a sequence is
    /// corrected, `copies` is `stream`.
    fn prefetch(
        &self,
        stream: &Stream,
        copies: &Stream,
        queries: Rows<'_>,
        sequences: &mut [Prefetch<'_>],
    ) -> Result<()>;

    /// Takes a new token's keys and values (one row): into its row of the store, into a slot of the cache (a free one, or
    /// that of the row unused for longest), its partial key into the index, and the values into the layer's mean. Lists what
    /// is attended, where that is not every slot in use.
    fn admit(&self, stream: &Stream, keys: Rows<'_>, values: Rows<'_>, admission: Admission<'_>) -> Result<()>;

    /// Copies a buffer to another of the same size.
    fn copy(&self, stream: &Stream, from: &Buffer, to: &mut Buffer) -> Result<()>;

    /// Brings back what [`Backend::admit`] has overwritten in a full pool, in the call that is given up: entries and partial
    /// keys. What is known of the rows stays as it is.
    fn take_back(&self, stream: &Stream, lost: Lost<'_>) -> Result<()>;

    /// Fills a layer's tables anew for a sequence of `length` tokens, which holds at least [`SlotsMut::limit`] of them: of each KV
    /// head the first slots get what is guarded, in ascending order, and the rest up to the limit the first rows of its row
    /// of `ranked` (u32) that are not. Each slot counts as used later than the next one. There is no pool.
    fn load_slots(&self, stream: &Stream, slots: SlotsMut<'_>, length: usize, ranked: Rows<'_>) -> Result<()>;

    /// Copies the entry of every row that has a slot into it.
    fn refill(&self, stream: &Stream, slots: Slots<'_>, from: &StoredRuns<'_>, to: &mut KvRunsMut<'_>) -> Result<()>;

    /// Whether rehearsals find out tails ([`Backend::rehearse`], or [`Backend::prefetch`] where the device selects), and
    /// [`Backend::blend`] and [`Backend::add_tail`] work.
    fn has_tail(&self) -> bool {
        false
    }

    /// `out = from + factor · (toward − from)`, element by element, each operation rounded. `toward` are activations of the
    /// shape of `out`.
    fn blend(&self, _stream: &Stream, _blend: Blend<'_>, _toward: Rows<'_>) -> Result<()> {
        Err(Error::unsupported("this backend cannot blend rows"))
    }

    /// Lets each query head attend its KV head's mean value with a weight and everything else with the rest of it:
    /// `out[h] += weights[h] · (means[h's KV head] − out[h])`, each operation rounded. `means` and `weights` are one row of
    /// f32 each, `kv_heads × d` and `heads`, `out` one of activations, `heads × d`.
    fn add_tail(&self, _stream: &Stream, _means: Rows<'_>, _weights: Rows<'_>, _out: RowsMut<'_>) -> Result<()> {
        Err(Error::unsupported("this backend cannot add tails"))
    }

    /// `out[i] = logits[i][targets[i]] − log Σ exp(logits[i])`, f32, one column.
    fn log_probability(&self, stream: &Stream, logits: Rows<'_>, targets: Rows<'_>, out: RowsMut<'_>) -> Result<()>;
}

/// In which order a matrix product accumulates, and so what it is fast at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// Many rows of one prompt: blocked for arithmetic.
    Prefill,
    /// One row a sequence: blocked for memory bandwidth; a row's bits do not depend on the rows beside it.
    Decode,
}

/// A queue of operations. Opaque; the number is the backend's own.
#[derive(Debug)]
pub struct Stream(#[allow(dead_code, reason = "read by backends that run later than the call")] pub(crate) u64);

/// A point in a stream. Opaque.
#[derive(Debug)]
pub struct Event(#[allow(dead_code, reason = "read by backends that run later than the call")] pub(crate) u64);

/// The dimensions that every attention of a layer shares.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Query heads, H.
    pub heads: usize,
    /// KV heads, G; H is a multiple of G.
    pub kv_heads: usize,
    /// Head dimension, d.
    pub head_dim: usize,
    /// Factor on q·k, d^-1/2 unless the model says otherwise.
    pub scale: f32,
    /// Sliding window: a token at position p sees positions > p − window only.
    pub window: Option<usize>,
}

/// Consecutive rows of one sequence in an attention call.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// First row of `q` and `out`.
    pub row: usize,
    /// Number of rows; row `row + j` is the token at `position + j`.
    pub rows: usize,
    /// Position of the first row's token.
    pub position: usize,
    /// The layer's keys and values, the rows' own included.
    pub runs: KvRuns<'a>,
    /// Which rows of the runs are attended.
    pub visible: Visible<'a>,
}

/// Which rows of its runs a segment attends.
#[derive(Clone, Copy, Debug)]
pub enum Visible<'a> {
    /// Row t of a run is the token at position t: every token up to the row's own, as far as the layer's window goes.
    Causal,
    /// Of KV head g the first `counts[g]` rows, in any order of tokens, all in the past. For segments of one row.
    First(&'a [u32]),
    /// Of KV head g the rows `rows[g]`, in any order of tokens, all in the past. For segments of one row.
    Listed(&'a [Vec<u32>]),
    /// Of each KV head the slots in use, or those that the step has listed: the device knows which. For segments of one row.
    Slots(Slots<'a>),
}
