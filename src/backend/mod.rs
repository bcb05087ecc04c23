//! How things are computed: one trait of whole operations on opaque buffers, streams and events.
//!
//! - The engine, the policies and the KV store see this trait only; nothing above this room knows which backend runs.
//! - Operations are enqueued on a stream and take effect in the stream's order; `record`/`wait` order streams among
//!   each other. The CPU backend completes each operation before it returns, so its streams and events are empty.
//! - Shapes are the caller's promise and are asserted; sizes that come from a user are checked far above this room.
//! - What may not enter: sessions, policies, files, anything that knows what a token means.

mod buffer;
pub mod cpu;
mod weights;

use crate::Result;
pub use buffer::{Buffer, DType, Place, Rows, RowsMut};
pub use weights::{Activation, Linear, Norm, NormKind, Rotation, Vector};

/// Runs operations. `Arc<dyn Backend>` is shared by everything that belongs to one model.
///
/// Activations are rows of [`Backend::activation`] elements, one row a token. Weights are [`Linear`]s.
pub trait Backend: Send + Sync {
    /// One line for people: device, instruction set, threads.
    fn description(&self) -> String;

    /// Element type of activations (`f32` on the CPU).
    fn activation(&self) -> DType;

    /// `bytes` zeroed bytes in `place`, aligned to 64. Errors with `OutOfMemory`, naming `purpose`.
    fn allocate(&self, bytes: usize, place: Place, purpose: &str) -> Result<Buffer>;

    /// A new stream of execution.
    fn stream(&self) -> Result<Stream>;

    /// An event that completes when everything enqueued on `stream` so far has.
    fn record(&self, stream: &Stream) -> Result<Event>;

    /// Makes later work on `stream` wait for `event`.
    fn wait(&self, stream: &Stream, event: &Event) -> Result<()>;

    /// Blocks until `stream` has finished.
    fn synchronize(&self, stream: &Stream) -> Result<()>;

    /// Copies `source` into `target` from its byte `offset` on.
    fn upload(&self, stream: &Stream, source: &[u8], target: &mut Buffer, offset: usize) -> Result<()>;

    /// Copies rows (contiguous or strided) into `target`, tightly packed; complete when it returns.
    fn download(&self, stream: &Stream, source: Rows<'_>, target: &mut [u8]) -> Result<()>;

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

    /// Causal softmax attention of `q` (rows of `heads × head_dim`) over what each segment names, into `out` (same
    /// shape). Segments cover disjoint row ranges. A segment's result does not depend on the others beside it.
    fn attend(
        &self,
        stream: &Stream,
        q: Rows<'_>,
        attention: &AttentionShape,
        segments: &[Segment<'_>],
        out: RowsMut<'_>,
    ) -> Result<()>;

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
    /// Number of rows; row `row + j` is the token at `position + j` and sees positions `0..=position + j`.
    pub rows: usize,
    /// Position of the first row's token.
    pub position: usize,
    /// The layer's keys and values, the rows' own included.
    pub runs: KvRuns<'a>,
}

/// Where one layer of one sequence keeps its keys and values: extents of [`KvRuns::extent_tokens`] tokens, in each of
/// which every KV head of the layer has one contiguous run of rows, K then V of a token side by side.
#[derive(Clone, Copy, Debug)]
pub struct KvRuns<'a> {
    extents: &'a [Buffer],
    geometry: KvGeometry,
    offset: usize,
}

/// As [`KvRuns`], for writing.
#[derive(Debug)]
pub struct KvRunsMut<'a> {
    extents: &'a mut [Buffer],
    geometry: KvGeometry,
    offset: usize,
}

/// The shape of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGeometry {
    /// Layers whose runs an extent holds.
    pub layers: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Head dimension.
    pub head_dim: usize,
    /// Tokens of a run.
    pub extent_tokens: usize,
    /// Element type of keys and values: f32, f16 or bf16.
    pub dtype: DType,
}

impl KvGeometry {
    /// Bytes of one token of one head: its key, then its value.
    pub const fn row_bytes(&self) -> usize {
        2 * self.head_dim * self.dtype.bytes()
    }

    /// Bytes of one run: one head of one layer in one extent.
    pub const fn run_bytes(&self) -> usize {
        self.extent_tokens * self.row_bytes()
    }

    /// Bytes of one extent, all layers and heads.
    pub const fn extent_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.run_bytes()
    }

    /// Extents that hold `tokens` tokens.
    pub const fn extents(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.extent_tokens)
    }
}

impl<'a> KvRuns<'a> {
    /// The runs of `layer` in `extents`, each of which is `geometry.extent_bytes()` long.
    pub fn new(extents: &'a [Buffer], geometry: KvGeometry, layer: usize) -> KvRuns<'a> {
        check_extents(extents, &geometry, layer);
        KvRuns { extents, geometry, offset: layer * geometry.kv_heads * geometry.run_bytes() }
    }

    /// The extents' shape.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Tokens that fit the extents.
    pub fn capacity(&self) -> usize {
        self.extents.len() * self.geometry.extent_tokens
    }

    /// Number of extents.
    pub fn extents(&self) -> usize {
        self.extents.len()
    }

    /// Address of the run of `head` in extent `extent`.
    pub fn run(&self, extent: usize, head: usize) -> *const u8 {
        assert!(head < self.geometry.kv_heads);
        // SAFETY: `check_extents` saw that every extent holds all runs of all layers, and `head` is below their number.
        unsafe { self.extents[extent].address().add(self.offset + head * self.geometry.run_bytes()) }
    }
}

impl<'a> KvRunsMut<'a> {
    /// As [`KvRuns::new`].
    pub fn new(extents: &'a mut [Buffer], geometry: KvGeometry, layer: usize) -> KvRunsMut<'a> {
        check_extents(extents, &geometry, layer);
        KvRunsMut { extents, geometry, offset: layer * geometry.kv_heads * geometry.run_bytes() }
    }

    /// The extents' shape.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Tokens that fit the extents.
    pub fn capacity(&self) -> usize {
        self.extents.len() * self.geometry.extent_tokens
    }

    /// Address of the run of `head` in extent `extent`.
    pub fn run_mut(&mut self, extent: usize, head: usize) -> *mut u8 {
        assert!(head < self.geometry.kv_heads);
        // SAFETY: as in `KvRuns::run`.
        unsafe { self.extents[extent].address_mut().add(self.offset + head * self.geometry.run_bytes()) }
    }
}

fn check_extents(extents: &[Buffer], geometry: &KvGeometry, layer: usize) {
    assert!(layer < geometry.layers, "layer {layer} of {}", geometry.layers);
    assert!(extents.iter().all(|e| e.bytes() >= geometry.extent_bytes()), "an extent is too short");
}
