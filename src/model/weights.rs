//! Where architectures take their weights from.
//!
//! An architecture asks for matrices and vectors by name and shape; [`Weights`] finds them in a checkpoint (or makes
//! them up, for benchmarks), converts them and puts them into memory of the backend. It runs an architecture twice:
//!
//! 1. as a *survey*: everything is looked up, and its shape and type compared with what the configuration promises,
//!    while nothing is read or allocated, so that a checkpoint that cannot work fails before it costs anything;
//! 2. as a *load*: rows travel in chunks of about a MiB, read, decoded and rounded by several threads at once, so
//!    that the peak of memory is the weights and a few MiB.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::backend::{Backend, Blocks, Buffer, DType, Linear, Norm, NormKind, Place, Stream, Vector};
use crate::model::checkpoint::quant::{self, Encoding};
use crate::model::checkpoint::{Checkpoint, RowOrder, TensorRef};
use crate::model::load::{LoadOptions, Progress};
use crate::{Error, ErrorCode, Result};

/// About how many bytes of f32 a thread decodes at a time: enough to make a read worth it, and small enough for a
/// second-level cache.
const CHUNK_BYTES: usize = 1 << 19;

/// Bytes of the smallest tensor that stays in its file: a page.
const LEAST_MAPPED: usize = 4 << 10;

/// Values of the tile that random matrices repeat. A prime, so that rows of no matrix line up with it and repeat.
const TILE: usize = 262_147;

/// The weights of one model, as an architecture sees them.
pub struct Weights<'a> {
    source: Source<'a>,
    /// Type of matrices in memory; `None`: as stored, quantized ones in blocks where the backend has them, else in bf16.
    dtype: Option<DType>,
    /// Whether the backend has blocks.
    blocks: bool,
    /// Where weights go; `None` during a survey.
    sink: Option<Sink<'a>>,
    used: BTreeSet<String>,
    bytes: u64,
}

enum Source<'a> {
    Checkpoint(&'a dyn Checkpoint),
    Random {
        seed: u64,
        /// Made when it is first needed.
        tile: Vec<f32>,
    },
}

/// Memory of a backend, and how to get there.
struct Sink<'a> {
    backend: &'a dyn Backend,
    stream: Stream,
    threads: usize,
    /// Whether matrices may stay in a mapped file.
    map: bool,
    progress: Meter,
}

/// What a survey has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Survey {
    /// Bytes of backend memory that the weights will take.
    pub bytes: u64,
    /// Tensors of the checkpoint, by their names in the file, that the architecture has not asked for.
    pub unused: Vec<String>,
}

impl<'a> Weights<'a> {
    /// Looks at a checkpoint without reading tensors, for a backend that has blocks, or not.
    pub fn survey(checkpoint: &'a dyn Checkpoint, dtype: Option<DType>, blocks: bool) -> Weights<'a> {
        Weights { blocks, ..Weights::new(Source::Checkpoint(checkpoint), dtype, None) }
    }

    /// Adds up what random weights will take.
    pub fn survey_random(dtype: Option<DType>) -> Weights<'a> {
        Weights::new(Source::Random { seed: 0, tile: Vec::new() }, dtype, None)
    }

    /// Reads a checkpoint, whose survey is given, into memory of `backend`.
    pub fn load(
        checkpoint: &'a dyn Checkpoint,
        survey: &Survey,
        backend: &'a dyn Backend,
        options: LoadOptions,
    ) -> Result<Weights<'a>> {
        let LoadOptions { dtype, threads, map, progress } = options;
        let map = map && backend.has_mapped_weights();
        let sink =
            Sink { backend, stream: backend.stream()?, threads, map, progress: Meter::new(survey.bytes, progress)? };
        Ok(Weights::new(Source::Checkpoint(checkpoint), dtype, Some(sink)))
    }

    /// Random weights in memory of `backend`: matrices with the spread of a freshly initialised model, norms of one,
    /// biases of zero. The same seed gives the same weights on every machine. Fit for measuring speed only.
    pub fn random(
        seed: u64,
        dtype: Option<DType>,
        backend: &'a dyn Backend,
        survey: &Survey,
        progress: Option<Progress>,
    ) -> Result<Weights<'a>> {
        let progress = Meter::new(survey.bytes, progress)?;
        let sink = Sink { backend, stream: backend.stream()?, threads: 1, map: false, progress };
        Ok(Weights::new(Source::Random { seed, tile: Vec::new() }, dtype, Some(sink)))
    }

    fn new(source: Source<'a>, dtype: Option<DType>, sink: Option<Sink<'a>>) -> Weights<'a> {
        let blocks = sink.as_ref().is_some_and(|sink| sink.backend.has_blocks());
        Weights { source, dtype, blocks, sink, used: BTreeSet::new(), bytes: 0 }
    }

    /// What has been asked for.
    pub fn into_survey(self) -> Survey {
        let unused = match self.source {
            Source::Checkpoint(checkpoint) => checkpoint.stored_names(),
            Source::Random { .. } => Vec::new(),
        };
        let unused = unused.into_iter().filter(|name| !self.used.contains(*name) && !is_derived(name));
        Survey { bytes: self.bytes, unused: unused.map(str::to_string).collect() }
    }

    /// Waits until everything has arrived, and reports the last of the progress.
    pub fn finish(self) -> Result<()> {
        match self.sink {
            Some(mut sink) => {
                sink.backend.synchronize(&sink.stream)?;
                sink.progress.report(1.0)
            }
            None => Ok(()),
        }
    }

    /// Whether the checkpoint has the tensor `name`.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Checkpoint(checkpoint) => checkpoint.tensor(name).is_some(),
            Source::Random { .. } => false,
        }
    }

    /// The matrix `{name}.weight`, `outputs × inputs`, with `{name}.bias` if wanted.
    pub fn linear(&mut self, name: &str, outputs: usize, inputs: usize, bias: bool) -> Result<Linear> {
        self.stacked(&[(name.to_string(), outputs)], inputs, bias)
    }

    /// The rows of several matrices (name, outputs), one below the other, as one.
    pub fn stacked(&mut self, pieces: &[(String, usize)], inputs: usize, bias: bool) -> Result<Linear> {
        let outputs = pieces.iter().map(|(_, outputs)| outputs).sum();
        let named = |suffix: &str, columns: Option<usize>| -> Vec<(String, Vec<usize>)> {
            let shape = |rows: usize| [rows].into_iter().chain(columns).collect();
            pieces.iter().map(|(name, rows)| (format!("{name}.{suffix}"), shape(*rows))).collect()
        };
        let (dtype, blocks, data) = self.tensor(&named("weight", Some(inputs)), self.dtype, inputs)?;
        let bias = match bias {
            true => Some(self.stacked_vector(&named("bias", None), outputs)?),
            false => None,
        };
        Ok(Linear { outputs, inputs, dtype, blocks, data, bias })
    }

    /// The vector `name`, in f32.
    pub fn vector(&mut self, name: &str, len: usize) -> Result<Vector> {
        self.stacked_vector(&[(name.to_string(), vec![len])], len)
    }

    fn stacked_vector(&mut self, pieces: &[(String, Vec<usize>)], len: usize) -> Result<Vector> {
        let (_, _, data) = self.tensor(pieces, Some(DType::F32), 1)?;
        Ok(Vector { len, data })
    }

    /// RMSNorm with the weight `{name}.weight`.
    pub fn rms_norm(&mut self, name: &str, len: usize, epsilon: f32) -> Result<Norm> {
        Ok(Norm { kind: NormKind::Rms, epsilon, weight: self.vector(&format!("{name}.weight"), len)?, bias: None })
    }

    /// LayerNorm with `{name}.weight` and `{name}.bias`, or, if it is not affine, with ones and zeros.
    pub fn layer_norm(&mut self, name: &str, len: usize, epsilon: f32, affine: bool) -> Result<Norm> {
        let (weight, bias) = match affine {
            true => (self.vector(&format!("{name}.weight"), len)?, self.vector(&format!("{name}.bias"), len)?),
            false => (self.constant(len, 1.0)?, self.constant(len, 0.0)?),
        };
        Ok(Norm { kind: NormKind::Layer, epsilon, weight, bias: Some(bias) })
    }

    fn constant(&mut self, len: usize, value: f32) -> Result<Vector> {
        let bytes = len * DType::F32.bytes();
        self.bytes += bytes as u64;
        let Some(sink) = &mut self.sink else { return Ok(Vector { len, data: nothing() }) };
        let mut data = sink.backend.allocate(bytes, Place::Device, "a constant")?;
        sink.backend.upload(&sink.stream, &value.to_le_bytes().repeat(len), &mut data, 0)?;
        sink.progress.advance(bytes as u64)?;
        Ok(Vector { len, data })
    }

    /// The tensors `pieces` (name and shape), rows of `columns` elements, one below the other.
    fn tensor(
        &mut self,
        pieces: &[(String, Vec<usize>)],
        dtype: Option<DType>,
        columns: usize,
    ) -> Result<(DType, Option<Blocks>, Buffer)> {
        let rows: usize = pieces.iter().map(|(_, shape)| shape[0]).sum();
        let (found, dtype, blocks, head_dim) = match &self.source {
            Source::Checkpoint(checkpoint) => {
                let found = find(*checkpoint, pieces, columns)?;
                let blocks = if dtype.is_none() && self.blocks { common_blocks(&found) } else { None };
                let dtype = dtype.unwrap_or_else(|| common_type(&found));
                (found, dtype, blocks, checkpoint.config().head_dim)
            }
            Source::Random { .. } => (Vec::new(), dtype.unwrap_or(DType::BF16), None, 1),
        };
        // In place once: whoever asks for a tensor again gets a copy.
        let first = found.iter().all(|piece| !self.used.contains(piece.tensor.name));
        self.used.extend(found.iter().map(|piece| piece.tensor.name.to_string()));
        // No overflow: the configuration's limits hold for both factors.
        let bytes = blocks.map_or(rows * columns * dtype.bytes(), |blocks| blocks.bytes(rows, columns));
        self.bytes += bytes as u64;
        let Some(sink) = &mut self.sink else { return Ok((dtype, blocks, nothing())) };
        let transfer = Transfer::new(&found, dtype, blocks, columns, head_dim);
        if sink.map && first && bytes >= LEAST_MAPPED && transfer.keeps_bytes() {
            let (one, others) = found.split_first().expect("some bytes");
            if let Some(data) = one.tensor.in_place(others.iter().map(|piece| &piece.tensor), dtype.bytes())? {
                transfer.run(sink, None)?;
                return Ok((dtype, blocks, data));
            }
        }
        let mut data = sink.backend.allocate(bytes, Place::Device, &pieces[0].0)?;
        match &mut self.source {
            Source::Checkpoint(_) => transfer.run(sink, Some(&mut data))?,
            Source::Random { seed, tile } => {
                if tile.is_empty() {
                    *tile = random_tile(*seed);
                }
                make_up(&pieces[0].0, pieces[0].1.len() == 1, columns, dtype, tile, sink, &mut data)?;
            }
        }
        Ok((dtype, blocks, data))
    }
}

/// Tensors that checkpoints carry although they follow from the configuration, or have been read with it.
fn is_derived(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name.starts_with("rope_f")
}

/// A buffer of no bytes, for surveys.
fn nothing() -> Buffer {
    let address = std::ptr::without_provenance_mut(64);
    // SAFETY: no bytes are valid at every aligned, non-null address, and there is nothing to release.
    unsafe { Buffer::from_raw(address, 0, Place::Device, Box::new(|_, _| {})) }
}

/// A tensor that has been found, with the right shape and a known encoding.
struct Piece<'a> {
    tensor: TensorRef<'a>,
    encoding: Encoding,
    rows: usize,
}

fn find<'a>(checkpoint: &'a dyn Checkpoint, wanted: &[(String, Vec<usize>)], columns: usize) -> Result<Vec<Piece<'a>>> {
    let mut pieces = Vec::with_capacity(wanted.len());
    for (name, shape) in wanted {
        let tensor = checkpoint.tensor(name).ok_or_else(|| checkpoint.missing(name))?;
        tensor.expect_shape(shape)?;
        let encoding = tensor.encoding()?;
        if !columns.is_multiple_of(encoding.block_elements()) {
            return Err(tensor.invalid(format!("{encoding} cannot encode rows of {columns}")));
        }
        pieces.push(Piece { tensor, encoding, rows: shape[0] });
    }
    Ok(pieces)
}

/// The type that holds all pieces without loss; bf16 for quantized ones, whose values are coarser anyway.
fn common_type(pieces: &[Piece<'_>]) -> DType {
    let types = pieces.iter().map(|piece| piece.encoding.plain().unwrap_or(DType::BF16));
    types.reduce(|one, other| if one == other { one } else { DType::F32 }).unwrap_or(DType::F32)
}

/// The blocks that all pieces are encoded in, unless two of them would share a tile.
fn common_blocks(pieces: &[Piece<'_>]) -> Option<Blocks> {
    let (last, others) = pieces.split_last()?;
    let whole = |piece: &Piece<'_>| piece.encoding == last.encoding && piece.rows.is_multiple_of(Blocks::ROWS);
    last.encoding.blocks().filter(|_| others.iter().all(whole))
}

/// Consecutive rows of one piece.
struct Job {
    piece: usize,
    row: usize,
    rows: usize,
    /// Where they go.
    offset: usize,
}

/// Pieces on their way into one buffer.
struct Transfer<'a> {
    pieces: &'a [Piece<'a>],
    dtype: DType,
    blocks: Option<Blocks>,
    columns: usize,
    head_dim: usize,
    jobs: Vec<Job>,
}

/// What a thread works in.
#[derive(Default)]
struct Scratch {
    encoded: Vec<u8>,
    values: Vec<f32>,
    rounded: Vec<u8>,
    tiles: Vec<u8>,
}

impl<'a> Transfer<'a> {
    fn new(
        pieces: &'a [Piece<'a>],
        dtype: DType,
        blocks: Option<Blocks>,
        columns: usize,
        head_dim: usize,
    ) -> Transfer<'a> {
        let mut jobs = Vec::new();
        let mut offset = 0;
        for (index, piece) in pieces.iter().enumerate() {
            // Whole heads, so that rows change places within a chunk, and whole tiles.
            let heads = if piece.tensor.order == RowOrder::Pairs { head_dim } else { 1 };
            let whole = if blocks.is_some() { heads * Blocks::ROWS } else { heads };
            let step = (CHUNK_BYTES / (4 * columns)).max(1).next_multiple_of(whole);
            for row in (0..piece.rows).step_by(step) {
                let rows = step.min(piece.rows - row);
                jobs.push(Job { piece: index, row, rows, offset });
                offset += blocks.map_or(rows * columns * dtype.bytes(), |blocks| blocks.bytes(rows, columns));
            }
        }
        Transfer { pieces, dtype, blocks, columns, head_dim, jobs }
    }

    /// Whether the bytes in memory are those of the file, in its order.
    fn keeps_bytes(&self) -> bool {
        let plain =
            |piece: &Piece<'_>| piece.encoding.plain() == Some(self.dtype) && piece.tensor.order == RowOrder::Halves;
        self.blocks.is_none() && self.pieces.iter().all(plain)
    }

    /// Reads and checks every value, and puts it into `target`, if there is one.
    fn run(&self, sink: &mut Sink<'_>, target: Option<&mut Buffer>) -> Result<()> {
        let next = AtomicUsize::new(0);
        let stopped = AtomicBool::new(false);
        let moved = AtomicU64::new(0);
        let failure = Mutex::new(None);
        let target = Mutex::new(target);
        let (backend, stream) = (sink.backend, &sink.stream);
        // Runs jobs until there are none; `after` runs between them.
        let work = |after: &mut dyn FnMut() -> Result<()>| {
            let mut scratch = Scratch::default();
            while !stopped.load(Ordering::Relaxed) {
                let Some(job) = self.jobs.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                let result = self.decode(job, &mut scratch).and_then(|bytes| {
                    if let Some(target) = &mut *target.lock() {
                        backend.upload(stream, bytes, target, job.offset)?;
                    }
                    moved.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    after()
                });
                if let Err(error) = result {
                    failure.lock().get_or_insert(error);
                    stopped.store(true, Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..sink.threads.min(self.jobs.len()) {
                scope.spawn(|| work(&mut || Ok(())));
            }
            // This thread works too, and is the one that calls back.
            let progress = &mut sink.progress;
            work(&mut || progress.advance(moved.swap(0, Ordering::Relaxed)));
        });
        match failure.into_inner() {
            Some(error) => Err(error),
            None => sink.progress.advance(moved.into_inner()),
        }
    }

    /// The bytes of the job's rows in memory.
    fn decode<'s>(&self, job: &Job, scratch: &'s mut Scratch) -> Result<&'s [u8]> {
        let Piece { tensor, encoding, .. } = &self.pieces[job.piece];
        let row_bytes = self.columns / encoding.block_elements() * encoding.block_bytes();
        let Scratch { encoded, values, rounded, tiles } = scratch;
        encoded.resize(job.rows * row_bytes, 0);
        tensor.read(job.row as u64 * row_bytes as u64, encoded)?;

        let all_finite = |bytes: &[u8]| match self.blocks {
            Some(blocks) => blocks.all_finite(bytes),
            None => quant::all_finite(bytes, self.dtype),
        };
        let kept = self.blocks.is_some() || encoding.plain() == Some(self.dtype);
        let (finite, bytes) = if kept && tensor.order == RowOrder::Halves {
            (all_finite(encoded), &*encoded)
        } else {
            let stride = if kept { row_bytes } else { self.columns * self.dtype.bytes() };
            rounded.resize(job.rows * stride, 0);
            values.resize(self.columns, 0.0);
            let mut finite = true;
            for (row, encoded) in encoded.chunks_exact(row_bytes).enumerate() {
                let place = self.place(tensor.order, row);
                let target = &mut rounded[place * stride..][..stride];
                if kept {
                    target.copy_from_slice(encoded);
                    finite &= all_finite(target);
                } else {
                    encoding.decode(encoded, values);
                    if encoding.blocks().is_some() {
                        // −0 becomes 0, as where blocks are kept.
                        values.iter_mut().for_each(|value| *value += 0.0);
                    }
                    finite &= quant::round(values, self.dtype, target);
                }
            }
            (finite, &*rounded)
        };
        if !finite {
            return Err(tensor.invalid(format!(
                "a value in rows {} to {} is infinite, NaN, or too large for {}",
                job.row,
                job.row + job.rows - 1,
                self.dtype
            )));
        }
        let Some(blocks) = self.blocks else { return Ok(bytes) };
        tiles.resize(blocks.bytes(job.rows, self.columns), 0);
        blocks.tile(bytes, self.columns, tiles);
        Ok(tiles)
    }

    /// Where row `row` of a chunk of whole heads goes.
    fn place(&self, order: RowOrder, row: usize) -> usize {
        match order {
            RowOrder::Halves => row,
            RowOrder::Pairs => {
                let (head, row) = (row / self.head_dim * self.head_dim, row % self.head_dim);
                head + row / 2 + row % 2 * (self.head_dim / 2)
            }
        }
    }
}

/// Normal-like values of variance one: sums of uniform ones, from a counter-based generator.
fn random_tile(seed: u64) -> Vec<f32> {
    // SplitMix64 (Steele et al. 2014).
    let mut state = seed;
    let mut next = move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    };
    // Four uniform 16-bit numbers have the variance 4/12 of the square of their range.
    let scale = (12.0f32 / 4.0).sqrt() / 65536.0;
    let value = |bits: u64| {
        let sum: i64 = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as i64).sum();
        (sum - 2 * 65535) as f32 * scale
    };
    (0..TILE).map(|_| value(next())).collect()
}

/// Fills `target` with `tile`, over and over, from a place that depends on the tensor's name.
fn make_up(
    name: &str,
    is_vector: bool,
    columns: usize,
    dtype: DType,
    tile: &[f32],
    sink: &mut Sink<'_>,
    target: &mut Buffer,
) -> Result<()> {
    let scale = 1.0 / (columns as f32).sqrt();
    let values: Vec<f32> = match is_vector {
        // Norms leave the size of things alone; biases add nothing.
        true => vec![if name.ends_with("weight") { 1.0 } else { 0.0 }; tile.len()],
        false => tile.iter().map(|value| value * scale).collect(),
    };
    let mut bytes = vec![0; values.len() * dtype.bytes()];
    quant::round(&values, dtype, &mut bytes);
    let start = name.bytes().fold(0, |hash: usize, byte| hash.wrapping_mul(31).wrapping_add(byte.into())) % tile.len();
    let mut offset = 0;
    let mut from = start * dtype.bytes();
    while offset < target.bytes() {
        let piece = &bytes[from..];
        let piece = &piece[..piece.len().min(target.bytes() - offset)];
        sink.backend.upload(&sink.stream, piece, target, offset)?;
        sink.progress.advance(piece.len() as u64)?;
        offset += piece.len();
        from = 0;
    }
    Ok(())
}

/// Reports progress, not more often than a person could see it.
struct Meter {
    total: u64,
    done: u64,
    reported: f32,
    callback: Option<Progress>,
}

impl Meter {
    fn new(total: u64, callback: Option<Progress>) -> Result<Meter> {
        let mut meter = Meter { total, done: 0, reported: 0.0, callback };
        meter.report(0.0)?;
        Ok(meter)
    }

    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        let fraction = (self.done as f64 / self.total.max(1) as f64).min(1.0) as f32;
        if fraction - self.reported < 0.005 { Ok(()) } else { self.report(fraction) }
    }

    fn report(&mut self, fraction: f32) -> Result<()> {
        self.reported = fraction;
        match self.callback.as_mut().is_none_or(|callback| callback(fraction)) {
            true => Ok(()),
            false => Err(Error::new(ErrorCode::Cancelled, "loading was cancelled by the progress callback")),
        }
    }
}
