//! The run that speculation learns from: one text through the model, once, and each layer's products as it passes.
//!
//! The text is cut into pieces no longer than the model's context, and all of them run as one step, layer by layer. So
//! a layer is seen once and whole: what it leaves behind are its products and its input, which the next layer's fit
//! needs. KV is kept for one layer at a time, scratch memory is given back at the end.

mod capture;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::model::decoder::Positions;
use crate::speculate::cache::{Folders, Format, Key};
use crate::speculate::{CALIBRATION_TEXT, Fitter, Layout, Speculation};
use crate::{Error, ErrorCode, Result};

use capture::{Capture, capture_layers};

use super::{Control, LogLevel, Model};

/// Fewest tokens that a model is calibrated on.
const LEAST_TOKENS: usize = 2048;

/// Tokens of a text that are used; the rest is left out. They all run at once, which bounds memory.
const MOST_TOKENS: usize = 8192;

/// Tokens of a piece, where the context allows as many.
const PIECE_TOKENS: usize = 2048;

/// How often a thread that waits for another one's calibration looks whether it was cancelled.
const PATIENCE: Duration = Duration::from_millis(20);

/// How a model is calibrated, and the result.
pub(super) struct Calibration {
    text: Option<String>,
    folders: Folders,
    threads: usize,
    /// Held for the length of a calibration.
    done: Mutex<Option<Arc<Speculation>>>,
}

impl Calibration {
    pub(super) fn new(text: Option<String>, folders: Folders, threads: usize) -> Calibration {
        Calibration { text, folders, threads, done: Mutex::default() }
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

/// Products from the cache, or from a calibration, which is then put there.
fn run(model: &Model, progress: &mut dyn FnMut(f32) -> bool) -> Result<Speculation> {
    let start = Instant::now();
    go_on(progress, 0.0)?;
    if model.has_random_weights() {
        return Speculation::plain(model.shared_backend().clone(), &model.decoder().blocks, layout(model));
    }
    let tokens = calibration_tokens(model)?;
    let key = Key::of(model.backend(), model.config(), model.decoder(), &tokens)?;
    let format = Format::new(key, layout(model), model.decoder());
    let folders = &model.calibration().folders;
    let mut rejected = |path: &Path, error: &Error| {
        model.log(LogLevel::Warning, || format!("{}: not used, will be made anew: {error}", path.display()));
    };
    if let Some(speculation) = folders.load(&format, model.shared_backend(), &mut rejected) {
        let seconds = start.elapsed().as_secs_f64();
        model.log(LogLevel::Info, || format!("loaded {} in {seconds:.3} s", format.file_name()));
        return Ok(speculation);
    }
    let speculation = fit(model, &tokens, progress)?;
    let seconds = start.elapsed().as_secs_f64();
    model.log(LogLevel::Info, || format!("calibrated speculation on {} tokens in {seconds:.2} s", tokens.len()));
    match folders.save(&format, model.backend(), &speculation) {
        Ok(Some(path)) => model.log(LogLevel::Info, || format!("wrote {}", path.display())),
        Ok(None) => {}
        Err(error) => model.log(LogLevel::Warning, || format!("speculation is not cached: {error}")),
    }
    Ok(speculation)
}

pub(super) fn layout(model: &Model) -> Layout {
    let config = model.config();
    Layout { hidden: config.hidden, heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim }
}

fn fit(model: &Model, tokens: &[u32], progress: &mut dyn FnMut(f32) -> bool) -> Result<Speculation> {
    let config = model.config();
    let piece = piece_tokens(tokens.len(), config.context_length);
    let rotations = match &model.decoder().positions {
        Positions::Rotary(rotary) => Some((rotary.for_length(piece), rotary.for_length(config.context_length))),
        Positions::Learned { .. } => None,
    };
    let layout = layout(model);
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
