//! From a path to a [`Decoder`] on a backend.

use std::path::Path;

use crate::backend::{Backend, DType};
use crate::model::architecture;
use crate::model::checkpoint::Checkpoint;
use crate::model::checkpoint::folder::Folder;
use crate::model::checkpoint::gguf::GgufCheckpoint;
use crate::model::config::Config;
use crate::model::decoder::Decoder;
use crate::model::weights::{Survey, Weights};
use crate::{Error, ErrorCode, Result};

/// Called with the fraction loaded, 0 to 1, on the thread that loads; returns whether to go on.
pub type Progress = Box<dyn FnMut(f32) -> bool + Send>;

/// More threads than this only wait for each other's reads.
const MAX_THREADS: usize = 16;

/// How to load weights.
#[derive(Default)]
pub struct LoadOptions {
    /// Type of matrices in memory; `None`: as stored, quantized ones in blocks where the backend has them
    /// ([`Backend::has_blocks`]) and the file's are of its kinds, else in bf16.
    pub dtype: Option<DType>,
    /// Threads that read and convert, 0 for all processors that this process may use.
    pub threads: usize,
    /// Leave matrices that a file holds as they are wanted where they are, on a backend that can use them there
    /// ([`Backend::has_mapped_weights`]).
    pub map: bool,
    /// Told how far loading has come; may cancel it.
    pub progress: Option<Progress>,
}

/// Opens a Hugging Face folder or a GGUF file. Reads configuration and headers, no tensors.
pub fn open(path: &Path) -> Result<Box<dyn Checkpoint>> {
    let metadata = std::fs::metadata(path).map_err(|error| Error::io(path, "open the model", &error))?;
    if metadata.is_dir() {
        return Ok(Box::new(Folder::open(path)?));
    }
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    let folder = path.parent().unwrap_or(Path::new("."));
    match extension {
        "safetensors" | "json" => Err(Error::unsupported(format!(
            "{}: a model is a folder or a GGUF file; give the folder, {}",
            path.display(),
            if folder.as_os_str().is_empty() { ".".into() } else { folder.display().to_string() }
        ))),
        "bin" | "pt" | "pth" => Err(Error::unsupported(format!(
            "{}: PyTorch pickles are not read; convert to safetensors or GGUF",
            path.display()
        ))),
        _ => Ok(Box::new(GgufCheckpoint::open(path)?)),
    }
}

/// Checks that a checkpoint has everything its architecture needs, and adds up what it will take on a backend that has
/// blocks ([`Backend::has_blocks`]), or not.
pub fn survey(checkpoint: &dyn Checkpoint, dtype: Option<DType>, blocks: bool) -> Result<Survey> {
    check_type(dtype)?;
    let mut weights = Weights::survey(checkpoint, dtype, blocks);
    architecture::build(checkpoint.config(), &mut weights)?;
    Ok(weights.into_survey())
}

/// Builds the model in memory of `backend`.
pub fn decoder(checkpoint: &dyn Checkpoint, backend: &dyn Backend, options: LoadOptions) -> Result<Decoder> {
    let survey = survey(checkpoint, options.dtype, backend.has_blocks())?;
    let threads = threads(options.threads);
    let mut weights = Weights::load(checkpoint, &survey, backend, LoadOptions { threads, ..options })?;
    let decoder = architecture::build(checkpoint.config(), &mut weights)?;
    weights.finish()?;
    Ok(decoder)
}

/// Adds up what random weights will take, in the type of the real ones unless `dtype` says otherwise.
pub fn random_survey(config: &Config, dtype: Option<DType>) -> Result<Survey> {
    check_type(dtype)?;
    let mut weights = Weights::survey_random(dtype.or(config.stored));
    architecture::build(config, &mut weights)?;
    Ok(weights.into_survey())
}

/// Builds a model of this configuration with random weights; types as in [`random_survey`].
pub fn random_decoder(config: &Config, seed: u64, backend: &dyn Backend, options: LoadOptions) -> Result<Decoder> {
    let survey = random_survey(config, options.dtype)?;
    let dtype = options.dtype.or(config.stored);
    let mut weights = Weights::random(seed, dtype, backend, &survey, options.progress)?;
    let decoder = architecture::build(config, &mut weights)?;
    weights.finish()?;
    Ok(decoder)
}

fn check_type(dtype: Option<DType>) -> Result<()> {
    match dtype {
        Some(DType::U32) => Err(Error::new(ErrorCode::InvalidArgument, "weights cannot be u32; use f32, f16 or bf16")),
        _ => Ok(()),
    }
}

fn threads(wanted: usize) -> usize {
    let wanted = match wanted {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        wanted => wanted,
    };
    wanted.min(MAX_THREADS)
}
