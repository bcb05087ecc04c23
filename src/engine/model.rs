//! A loaded model: weights on a backend, tokenizer, and the KV pool that its sessions share.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::backend::{Backend, DType};
use crate::kv::Pool;
use crate::model::chat::ChatTemplate;
use crate::model::checkpoint::Checkpoint;
use crate::model::config::{Config, GenerationDefaults};
use crate::model::decoder::Decoder;
use crate::model::load::{self, LoadOptions, Progress};
use crate::model::tokenizer::Tokenizer;
use crate::speculate::cache::Folders;
use crate::{Error, ErrorCode, Result};

use super::Device;
use super::calibrate::Calibration;
use super::forward::{Dimensions, Forward};
use super::workspace::Workspace;

/// How much a log line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(i32)]
pub enum LogLevel {
    /// Something failed.
    Error = 1,
    /// Something is not as it should be, and work goes on.
    Warning = 2,
    /// What a person starting the program wants to know.
    Info = 3,
    /// Detail.
    Debug = 4,
}

/// Where log lines go, from any thread, several at once.
pub type LogSink = Box<dyn Fn(LogLevel, &str) + Send + Sync>;

/// Takes log lines, from any thread.
pub struct Logger {
    /// Lines above this level are not made.
    pub level: LogLevel,
    /// Called with the level and one line of text.
    pub sink: LogSink,
}

/// How to load a model.
#[derive(Default)]
pub struct ModelOptions {
    /// Device.
    pub device: Device,
    /// Type of the weights in memory; `None`: as stored, quantized ones as they are where the backend has them
    /// ([`Backend::has_blocks`]), else in bf16.
    pub dtype: Option<DType>,
    /// Threads, 0 for all processors that this process may use.
    pub threads: usize,
    /// Read all weights into memory of our own, also those that could stay in a mapped file.
    pub copy_weights: bool,
    /// Bytes of KV that all sessions together may hold, 0 for no limit.
    pub kv_limit: usize,
    /// Called with the fraction loaded; returns whether to go on.
    pub progress: Option<Progress>,
    /// Log sink.
    pub logger: Option<Logger>,
    /// Text that speculation is calibrated on, of at least 2,048 tokens; `None` for the library's own.
    pub calibration_text: Option<String>,
    /// Folder of the file that keeps what calibration has found; an empty path for no such file; `None` for the model's
    /// own folder, or the user's cache folder where that cannot be written.
    pub speculation_cache: Option<PathBuf>,
}

/// A model, shared by reference count: a clone is the same model, and a session holds one.
#[derive(Clone)]
pub struct Model {
    inner: Arc<Inner>,
}

struct Inner {
    config: Config,
    defaults: GenerationDefaults,
    decoder: Decoder,
    dimensions: Dimensions,
    tokenizer: Option<Tokenizer>,
    /// Or why there is none: a model whose template is broken is still a model.
    chat: Result<ChatTemplate>,
    backend: Arc<dyn Backend>,
    pool: Arc<Pool>,
    dtype: DType,
    parameters: u64,
    weight_bytes: u64,
    load_seconds: f64,
    random: bool,
    logger: Option<Logger>,
    calibration: Calibration,
    /// Held for the length of one step, or of one chunk of a prefill.
    workspace: Mutex<Workspace>,
}

impl Model {
    /// Loads a Hugging Face folder or a GGUF file.
    pub fn load(path: &Path, options: ModelOptions) -> Result<Model> {
        let start = Instant::now();
        let checkpoint = load::open(path)?;
        let config = checkpoint.config().clone();
        let tokenizer = tokenizer(&*checkpoint)?;
        let defaults = checkpoint.generation_defaults();
        let load = |backend: &dyn Backend, options| load::decoder(&*checkpoint, backend, options);
        Model::build(start, config, defaults, tokenizer, options, Some(path), load)
    }

    /// A model of a named shape with random weights, for benchmarks. It has no tokenizer.
    pub fn random(shape: &str, seed: u64, options: ModelOptions) -> Result<Model> {
        let start = Instant::now();
        let config = Config::shape(shape)?;
        let load = |backend: &dyn Backend, options| load::random_decoder(&config, seed, backend, options);
        Model::build(start, config.clone(), GenerationDefaults::default(), None, options, None, load)
    }

    fn build(
        start: Instant,
        config: Config,
        defaults: GenerationDefaults,
        tokenizer: Option<Tokenizer>,
        options: ModelOptions,
        path: Option<&Path>,
        load: impl FnOnce(&dyn Backend, LoadOptions) -> Result<Decoder>,
    ) -> Result<Model> {
        let backend = options.device.open(options.threads, options.logger.as_ref())?;
        let decoder = load(
            &*backend,
            LoadOptions {
                dtype: options.dtype,
                threads: options.threads,
                map: !options.copy_weights,
                progress: options.progress,
            },
        )?;
        let dimensions = Dimensions::new(&config, &decoder);
        let workspace = Mutex::new(Workspace::new(&*backend, &dimensions)?);
        let (parameters, weight_bytes) = decoder.size();
        let folders = Folders::new(options.speculation_cache.as_deref(), path);
        let inner = Inner {
            dtype: decoder.blocks.first().map_or(decoder.embedding.dtype, |block| block.attention.qkv.dtype),
            pool: Arc::new(Pool::new(backend.clone(), options.kv_limit)),
            load_seconds: start.elapsed().as_secs_f64(),
            random: path.is_none(),
            logger: options.logger,
            calibration: Calibration::new(options.calibration_text, folders, options.threads),
            config,
            defaults,
            decoder,
            dimensions,
            chat: match &tokenizer {
                Some(tokenizer) => ChatTemplate::of(tokenizer),
                None => Err(no_tokenizer()),
            },
            tokenizer,
            backend,
            parameters,
            weight_bytes,
            workspace,
        };
        let model = Model { inner: Arc::new(inner) };
        model.log(LogLevel::Info, || {
            format!(
                "loaded {}: {} layers, {} parameters, {} bytes of weights ({}), {} in {:.2} s",
                model.config().architecture.name(),
                model.config().layers,
                parameters,
                weight_bytes,
                model.storage(),
                model.backend().description(),
                model.load_seconds()
            )
        });
        Ok(model)
    }

    /// Whether both handles are the same model.
    pub fn same(&self, other: &Model) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// The checkpoint's configuration.
    pub fn config(&self) -> &Config {
        &self.inner.config
    }

    /// The checkpoint's own sampling settings and end tokens.
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.inner.defaults
    }

    /// The tokenizer; an error for a model that has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.inner.tokenizer.as_ref().ok_or_else(no_tokenizer)
    }

    /// The chat template; an error for a model that has none, or one that does not parse.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        self.inner.chat.as_ref().map_err(Error::clone)
    }

    /// Type of the weights in memory, or of what their blocks stand for.
    pub fn dtype(&self) -> DType {
        self.inner.dtype
    }

    /// How the weights lie in memory; see [`Decoder::storage`].
    pub fn storage(&self) -> String {
        self.inner.decoder.storage()
    }

    /// Number of weights, a tied head counted once.
    pub fn parameters(&self) -> u64 {
        self.inner.parameters
    }

    /// Bytes of weights in memory.
    pub fn weight_bytes(&self) -> u64 {
        self.inner.weight_bytes
    }

    /// Seconds that loading took.
    pub fn load_seconds(&self) -> f64 {
        self.inner.load_seconds
    }

    /// What computes.
    pub fn backend(&self) -> &dyn Backend {
        &*self.inner.backend
    }

    /// The pool that the sessions' KV comes from.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.inner.pool
    }

    /// Tokens after which a text ends, from the checkpoint's generation settings and its tokenizer.
    pub fn stop_tokens(&self) -> Vec<u32> {
        let mut tokens = self.inner.defaults.eos.clone();
        tokens.extend_from_slice(&self.inner.config.eos);
        if let Some(tokenizer) = &self.inner.tokenizer {
            tokens.extend(tokenizer.stop_tokens());
        }
        tokens.sort_unstable();
        tokens.dedup();
        tokens
    }

    /// Sends a line to the model's log, if it has one that wants it.
    pub fn log(&self, level: LogLevel, message: impl FnOnce() -> String) {
        if let Some(logger) = &self.inner.logger
            && level <= logger.level
        {
            (logger.sink)(level, &message());
        }
    }

    pub(super) fn dimensions(&self) -> &Dimensions {
        &self.inner.dimensions
    }

    /// Runs `work` with the model's workspace, one caller at a time.
    pub(super) fn forward<T>(&self, work: impl FnOnce(Forward<'_>) -> Result<T>) -> Result<T> {
        let mut workspace = self.inner.workspace.lock();
        work(Forward {
            backend: &*self.inner.backend,
            decoder: &self.inner.decoder,
            dimensions: &self.inner.dimensions,
            attention_scale: self.inner.config.attention_scale(),
            workspace: &mut workspace,
            probe: None,
            queried: None,
        })
    }

    /// See [`crate::speculate::fold()`]. The model must not be shared.
    #[cfg(test)]
    pub(super) fn fold_skew(&mut self) -> Result<()> {
        let speculation = self.calibrate(&mut |_| true)?;
        let layout = super::calibrate::layout(self);
        let inner = Arc::get_mut(&mut self.inner).expect("a model of one handle");
        crate::speculate::fold(&*inner.backend, &mut inner.decoder, layout, &speculation)
    }

    /// Whether it is one of [`Model::random`].
    pub(super) fn has_random_weights(&self) -> bool {
        self.inner.random
    }

    pub(super) fn decoder(&self) -> &Decoder {
        &self.inner.decoder
    }

    pub(super) fn shared_backend(&self) -> &Arc<dyn Backend> {
        &self.inner.backend
    }

    pub(super) fn calibration(&self) -> &Calibration {
        &self.inner.calibration
    }
}

/// The checkpoint's tokenizer. A folder may lack one (a model without text); a GGUF file always says something.
fn tokenizer(checkpoint: &dyn Checkpoint) -> Result<Option<Tokenizer>> {
    let mut tokenizer = match checkpoint.metadata() {
        Some(metadata) => Tokenizer::from_gguf(metadata)?,
        None => match Tokenizer::from_folder(checkpoint.path()) {
            Err(error) if error.code() == ErrorCode::NotFound => return Ok(None),
            tokenizer => tokenizer?,
        },
    };
    tokenizer.match_vocabulary(checkpoint.config().vocabulary)?;
    Ok(Some(tokenizer))
}

fn no_tokenizer() -> Error {
    Error::unsupported("this model has no tokenizer")
}
