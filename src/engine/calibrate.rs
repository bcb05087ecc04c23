//! The run that speculation learns from: one text through the model, once, and each layer's products as it passes.
//!
//! The text is cut into pieces no longer than the model's context, and all of them run as one step, layer by layer. So
//! a layer is seen once and whole: what it leaves behind are its products and its input, which the next layer's fit
//! needs. KV is kept for one layer at a time, scratch memory is given back at the end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::backend::{Backend, Buffer, DType, KvGeometry, KvRuns, KvRunsMut, Place, Rows, Shape, Stream, Visible};
use crate::kv::EXTENT_TOKENS;
use crate::model::decoder::Positions;
use crate::policy::{Phase, Policy, Step, TierBytes};
use crate::speculate::{CALIBRATION_TEXT, Captured, Fitter, Layout, Speculation};
use crate::{Error, ErrorCode, Result};

use super::forward::{Forward, Part, Probe};
use super::workspace::Workspace;
use super::{Control, LogLevel, Model};

/// Fewest tokens that a model is calibrated on.
const LEAST_TOKENS: usize = 2048;

/// Tokens of a text that are used; the rest is left out. They all run at once, which bounds memory.
const MOST_TOKENS: usize = 8192;

/// Tokens of a piece, where the context allows as many.
const PIECE_TOKENS: usize = 2048;

/// First tokens of a piece: attention sinks, whose states are like no other token's.
const SINKS: usize = 4;

/// How often a thread that waits for another one's calibration looks whether it was cancelled.
const PATIENCE: Duration = Duration::from_millis(20);

/// How a model is calibrated, and the result.
pub(super) struct Calibration {
    text: Option<String>,
    threads: usize,
    /// Held for the length of a calibration.
    done: Mutex<Option<Arc<Speculation>>>,
}

impl Calibration {
    pub(super) fn new(text: Option<String>, threads: usize) -> Calibration {
        Calibration { text, threads, done: Mutex::default() }
    }
}

impl Model {
    /// The offline products of speculation, made now if they have not been made yet. `progress` is called with the
    /// fraction done and returns whether to go on. One caller makes them; others wait for him.
    ///
    /// Errors: `Cancelled`, `OutOfMemory`; `InvalidArgument` for a calibration text that is too short; `Unsupported` for
    /// a model whose activations are not finite.
    pub fn calibrate(&self, progress: &mut dyn FnMut(f32) -> bool) -> Result<Arc<Speculation>> {
        let mut done = loop {
            if let Some(done) = self.calibration().done.try_lock_for(PATIENCE) {
                break done;
            }
            go_on(progress, 0.0)?;
        };
        if let Some(speculation) = &*done {
            return Ok(speculation.clone());
        }
        let speculation = Arc::new(run(self, progress)?);
        *done = Some(speculation.clone());
        Ok(speculation)
    }

    /// As [`Model::calibrate`], for a session: cancelled by its control, progress in the log.
    pub fn speculation(&self, control: &Control) -> Result<Arc<Speculation>> {
        let mut reported = 0;
        let mut cancelled = None;
        let result = self.calibrate(&mut |fraction| {
            let tenths = (fraction * 10.0) as u32;
            if tenths > reported {
                reported = tenths;
                self.log(LogLevel::Info, || format!("calibrating speculation: {}%", tenths * 10));
            }
            cancelled = control.check().err();
            cancelled.is_none()
        });
        match cancelled {
            Some(error) => Err(error),
            None => result,
        }
    }
}

fn go_on(progress: &mut dyn FnMut(f32) -> bool, fraction: f32) -> Result<()> {
    match progress(fraction) {
        true => Ok(()),
        false => Err(Error::new(ErrorCode::Cancelled, "calibration was cancelled by the progress callback")),
    }
}

/// The ids that a model is calibrated on.
fn calibration_tokens(model: &Model) -> Result<Vec<u32>> {
    let text = model.calibration().text.as_deref();
    let mut tokens = match model.tokenizer() {
        Ok(tokenizer) => tokenizer.encode(text.unwrap_or(CALIBRATION_TEXT), true, false)?,
        // A model without text has random weights: any ids are as good as any others.
        Err(_) => random_tokens(model.config().vocabulary),
    };
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= model.config().vocabulary) {
        return Err(Error::new(
            ErrorCode::InvalidFormat,
            format!("the tokenizer gives the token {token}, which the model's embedding does not have"),
        ));
    }
    if tokens.len() < LEAST_TOKENS {
        return Err(Error::invalid_argument(format!(
            "the calibration text has {} tokens; expected at least {LEAST_TOKENS}",
            tokens.len()
        )));
    }
    tokens.truncate(MOST_TOKENS);
    Ok(tokens)
}

/// Ids from a fixed seed.
fn random_tokens(vocabulary: usize) -> Vec<u32> {
    use rand_core::{RngCore, SeedableRng};
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(0);
    (0..LEAST_TOKENS).map(|_| (random.next_u64() % vocabulary as u64) as u32).collect()
}

fn run(model: &Model, progress: &mut dyn FnMut(f32) -> bool) -> Result<Speculation> {
    let start = Instant::now();
    go_on(progress, 0.0)?;
    let tokens = calibration_tokens(model)?;
    let speculation = fit(model, &tokens, progress)?;
    model.log(LogLevel::Info, || {
        let seconds = start.elapsed().as_secs_f64();
        format!("calibrated speculation on {} tokens in {seconds:.2} s", tokens.len())
    });
    Ok(speculation)
}

fn fit(model: &Model, tokens: &[u32], progress: &mut dyn FnMut(f32) -> bool) -> Result<Speculation> {
    let config = model.config();
    let piece = piece_tokens(tokens.len(), config.context_length);
    let rotations = match &model.decoder().positions {
        Positions::Rotary(rotary) => Some((rotary.for_length(piece), rotary.for_length(config.context_length))),
        Positions::Learned { .. } => None,
    };
    let layout =
        Layout { hidden: config.hidden, heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
    let threads = match model.calibration().threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    };
    let mut capture = Capture::new(model.backend(), layout, tokens.len(), piece);
    let mut layers = Vec::with_capacity(config.layers);
    let fitter = Fitter { backend: model.backend(), layout, rotations, context_length: config.context_length, threads };
    let blocks = &model.decoder().blocks;
    capture_layers(model, tokens, piece, &mut capture, &mut |stream, layer, captured| {
        layers.push(match captured {
            Some(captured) => Some(fitter.layer(stream, &blocks[layer].attention, &captured)?),
            None => None,
        });
        go_on(progress, (layer + 1) as f32 / blocks.len() as f32)
    })?;
    Ok(Speculation::new(model.shared_backend().clone(), layers))
}

/// Pieces of one length, as few as the context allows; only the last may be shorter.
fn piece_tokens(tokens: usize, context_length: usize) -> usize {
    let longest = PIECE_TOKENS.min(context_length);
    tokens.div_ceil(tokens.div_ceil(longest))
}

/// Takes what was captured of a layer; `None` for layer 0, which has no layer before it.
type Take<'a> = &'a mut dyn FnMut(&Stream, usize, Option<Captured<'_>>) -> Result<()>;

/// Runs `tokens` through the model in pieces of `piece` tokens and hands over what each layer leaves behind.
fn capture_layers(
    model: &Model,
    tokens: &[u32],
    piece: usize,
    capture: &mut Capture<'_>,
    take: Take<'_>,
) -> Result<()> {
    let (backend, config) = (model.backend(), model.config());
    let geometry = KvGeometry {
        layers: 1,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        extent_tokens: EXTENT_TOKENS,
        dtype: DType::F32,
    };
    let mut caches =
        tokens.chunks(piece).map(|_| OneLayer::new(backend, geometry, piece)).collect::<Result<Vec<_>>>()?;
    let control = Control::default();
    let mut parts: Vec<Part<'_>> = caches
        .iter_mut()
        .zip(tokens.chunks(piece))
        .map(|(cache, tokens)| Part {
            policy: cache,
            control: &control,
            position: 0,
            rows: tokens.len(),
            total: piece,
            phase: Phase::Prefill { last: true },
        })
        .collect();
    let mut workspace = Workspace::new(backend, model.dimensions())?;
    let mut forward = Forward {
        backend,
        decoder: model.decoder(),
        dimensions: model.dimensions(),
        attention_scale: config.attention_scale(),
        workspace: &mut workspace,
        probe: Some(&mut Watch { capture, take }),
    };
    forward.run(tokens, &mut parts, Shape::Prefill, 1)
}

/// Host copies of what a layer computes, without the rows of sinks.
struct Capture<'a> {
    backend: &'a dyn Backend,
    layout: Layout,
    /// Runs of rows that are no sinks.
    kept: Vec<(usize, usize)>,
    positions: Vec<usize>,
    previous: Vec<f32>,
    input: Vec<f32>,
    projected: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
}

impl<'a> Capture<'a> {
    fn new(backend: &'a dyn Backend, layout: Layout, tokens: usize, piece: usize) -> Capture<'a> {
        let pieces = (0..tokens).step_by(piece).map(|start| (start, piece.min(tokens - start)));
        let kept: Vec<_> =
            pieces.filter(|&(_, rows)| rows > SINKS).map(|(start, rows)| (start + SINKS, rows - SINKS)).collect();
        let positions = kept.iter().flat_map(|&(_, rows)| SINKS..SINKS + rows).collect();
        let empty = Vec::new;
        Capture {
            backend,
            layout,
            kept,
            positions,
            previous: empty(),
            input: empty(),
            projected: empty(),
            queries: empty(),
            keys: empty(),
        }
    }
}

/// Copies the kept rows of `rows`, which are activations.
fn copy(
    backend: &dyn Backend,
    stream: &Stream,
    kept: &[(usize, usize)],
    rows: Rows<'_>,
    to: &mut Vec<f32>,
) -> Result<()> {
    assert_eq!(rows.dtype(), DType::F32, "calibration reads activations of f32");
    let count: usize = kept.iter().map(|&(_, rows)| rows).sum();
    to.resize(count * rows.cols(), 0.0);
    let mut rest = &mut to[..];
    for &(from, count) in kept {
        let (own, after) = rest.split_at_mut(count * rows.cols());
        // SAFETY: every byte pattern is a valid f32, and the view covers exactly `own`, borrowed for this call.
        let bytes = unsafe { std::slice::from_raw_parts_mut(own.as_mut_ptr().cast(), std::mem::size_of_val(own)) };
        backend.download(stream, rows.row_range(from, count), bytes)?;
        rest = after;
    }
    Ok(())
}

/// The probe of a calibration.
struct Watch<'a, 'b> {
    capture: &'a mut Capture<'b>,
    take: Take<'a>,
}

impl Probe for Watch<'_, '_> {
    fn projected(&mut self, stream: &Stream, _: usize, input: Rows<'_>, qkv: Rows<'_>) -> Result<()> {
        let c = &mut *self.capture;
        std::mem::swap(&mut c.previous, &mut c.input);
        copy(c.backend, stream, &c.kept, input, &mut c.input)?;
        let queries = qkv.col_range(0, c.layout.heads * c.layout.head_dim);
        copy(c.backend, stream, &c.kept, queries, &mut c.projected)
    }

    fn normalised(&mut self, stream: &Stream, layer: usize, qkv: Rows<'_>) -> Result<()> {
        let c = &mut *self.capture;
        let (width, kv_width) = (c.layout.heads * c.layout.head_dim, c.layout.kv_heads * c.layout.head_dim);
        copy(c.backend, stream, &c.kept, qkv.col_range(0, width), &mut c.queries)?;
        copy(c.backend, stream, &c.kept, qkv.col_range(width, kv_width), &mut c.keys)?;
        let captured = Captured {
            previous: &c.previous,
            projected: &c.projected,
            queries: &c.queries,
            keys: &c.keys,
            positions: &c.positions,
        };
        (self.take)(stream, layer, (layer > 0).then_some(captured))
    }
}

/// Keys and values of one sequence, of the layer that is being computed only: a prefill at once needs no more.
struct OneLayer {
    extents: Vec<Buffer>,
    geometry: KvGeometry,
}

impl OneLayer {
    fn new(backend: &dyn Backend, geometry: KvGeometry, tokens: usize) -> Result<OneLayer> {
        let extent = |_| backend.allocate(geometry.extent_bytes(), Place::Device, "KV of the calibration text");
        Ok(OneLayer { extents: (0..geometry.extents(tokens)).map(extent).collect::<Result<_>>()?, geometry })
    }
}

impl Policy for OneLayer {
    fn reserve(&mut self, _: usize) -> Result<()> {
        Ok(())
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        let mut runs = KvRunsMut::new(&mut self.extents, self.geometry, 0);
        step.backend.store_kv(step.stream, keys, values, &mut runs, step.position)
    }

    fn attended(&self, _: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        (KvRuns::new(&self.extents, self.geometry, 0), Visible::Causal)
    }

    fn roll_back(&mut self, _: &Step<'_>, _: usize) -> Result<()> {
        Ok(())
    }

    fn truncate(&mut self, _: &Step<'_>, _: usize) -> Result<()> {
        Ok(())
    }

    fn bytes(&self) -> TierBytes {
        TierBytes { device: self.extents.iter().map(Buffer::bytes).sum(), ..TierBytes::default() }
    }
}
