//! A loaded model: weights on a backend, tokenizer, and the KV pool that its sessions share.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::{Backend, DType};
use crate::kv::Pool;
use crate::model::chat::ChatTemplate;
use crate::model::config::{Config, GenerationDefaults};
use crate::model::decoder::Decoder;
use crate::model::load::{self, LoadOptions, Progress};
use crate::model::tokenizer::Tokenizer;
use crate::{Error, Result};

use super::forward::{Dimensions, Forward};
use super::workspace::Workspace;

/// Where a model computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The best device that this build can use here.
    #[default]
    Auto,
    /// The processor.
    Cpu,
}

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

/// Takes log lines, from any thread.
pub struct Logger {
    /// Lines above this level are not made.
    pub level: LogLevel,
    /// Called with the level and one line of text.
    pub sink: Box<dyn Fn(LogLevel, &str) + Send + Sync>,
}

/// How to load a model.
#[derive(Default)]
pub struct ModelOptions {
    /// Device.
    pub device: Device,
    /// Type of the weights in memory; `None`: as stored, quantized ones in bf16.
    pub dtype: Option<DType>,
    /// Threads, 0 for all processors that this process may use.
    pub threads: usize,
    /// Bytes of KV that all sessions together may hold, 0 for no limit.
    pub kv_limit: usize,
    /// Called with the fraction loaded; returns whether to go on.
    pub progress: Option<Progress>,
    /// Log sink.
    pub logger: Option<Logger>,
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
    chat: Option<ChatTemplate>,
    backend: Arc<dyn Backend>,
    pool: Arc<Pool>,
    dtype: DType,
    parameters: u64,
    weight_bytes: u64,
    load_seconds: f64,
    logger: Option<Logger>,
    /// Held for the length of one step, or of one chunk of a prefill.
    workspace: Mutex<Workspace>,
}
