//! Models: loading, what they are, what their sessions will cost.

use std::ffi::{CString, c_char, c_void};

use super::boundary::{Out, guard, guard_void, handle, optional_path, path, string, text};
use super::error::kva_error;
use super::options::{self, Options, OutStruct, sized32};
use super::session::{kva_session_options, session_options};
use super::user_data::{UserData, kva_free_callback};
use crate::backend::DType;
use crate::engine::{Device, Estimate, LogLevel, Logger, Model, ModelOptions};
use crate::{Error, Result};

/// The library's choice: weights as they are stored, keys and values as the weights. Of quantized weights, Q4_0, Q4_1 and
/// Q8_0 stay as they are on the CPU, with the results that the same weights in bf16 have; others become bf16, as all do that
/// share a matrix with other kinds.
pub const KVA_DTYPE_AUTO: i32 = 0;
/// IEEE 754 single precision.
pub const KVA_DTYPE_F32: i32 = 1;
/// IEEE 754 half precision.
pub const KVA_DTYPE_F16: i32 = 2;
/// bfloat16.
pub const KVA_DTYPE_BF16: i32 = 3;

/// The best device that this build can use on this machine: CUDA where it works, and the processor otherwise.
pub const KVA_DEVICE_AUTO: i32 = 0;
/// The processor.
pub const KVA_DEVICE_CPU: i32 = 1;
/// The first CUDA device that the driver shows (`CUDA_VISIBLE_DEVICES` chooses it), of compute capability 8.0 or later.
/// The driver is opened at run time; without one, loading fails with `KVA_ERROR_DEVICE`.
pub const KVA_DEVICE_CUDA: i32 = 2;

/// Something failed.
pub const KVA_LOG_ERROR: i32 = 1;
/// Something is not as it should be, and work goes on.
pub const KVA_LOG_WARNING: i32 = 2;
/// What a person starting the program wants to know.
pub const KVA_LOG_INFO: i32 = 3;
/// Detail.
pub const KVA_LOG_DEBUG: i32 = 4;

/// In place of a token where there is none.
pub const KVA_TOKEN_NONE: u32 = 0xffff_ffff;

/// Called while a model is loaded or calibrated, with the fraction done, 0 to 1 and never falling. A result other than
/// 0 cancels the call.
///
/// Runs on the thread of that call, within it.
pub type kva_progress_callback = Option<unsafe extern "C" fn(user_data: *mut c_void, fraction: f32) -> i32>;

/// Called with each log line of a model and its sessions; `level` is one of `KVA_LOG_...`. `message` is UTF-8
/// without a line break at its end, and is valid during the call only.
///
/// Runs on any thread, on several at once, within calls that use the model. It must not call functions of the same
/// model or its sessions.
pub type kva_log_callback = Option<unsafe extern "C" fn(user_data: *mut c_void, level: i32, message: *const c_char)>;

/// A loaded checkpoint: weights, tokenizer, and the pool that its sessions' KV comes from.
///
/// Shared by its sessions and detokenizers, each of which keeps it alive. All functions on it may be called from
/// many threads at once.
pub struct kva_model {
    pub(super) model: Model,
    architecture: CString,
    backend: CString,
    storage: CString,
}

/// How to load a model. Fill it with `kva_model_options_init`, then change fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_model_options {
    /// Set by `kva_model_options_init`.
    pub struct_size: u32,
    /// One of `KVA_DEVICE_...`. Default: `KVA_DEVICE_AUTO`.
    pub device: i32,
    /// Type of the weights in memory, one of `KVA_DTYPE_...`. Default: `KVA_DTYPE_AUTO`.
    pub dtype: i32,
    /// Threads that compute; 0 (the default) for as many as this process has processors.
    pub threads: u32,
    /// Most detailed level that `log` is called with, one of `KVA_LOG_...`; 0 (the default) for `KVA_LOG_INFO`.
    pub log_level: i32,
    /// 0 (the default): matrices that a Hugging Face folder holds in the type they are wanted in stay in its files, which are
    /// mapped into memory where the device is the processor; whoever changes or shortens these files while the model lives
    /// changes its weights, or ends the process. 1: everything is read into memory of the library's own.
    pub copy_weights: u32,
    /// Bytes of KV that all sessions of the model together may hold; 0 (the default) for no limit.
    pub kv_limit_bytes: u64,
    /// Called while loading; may be NULL (the default).
    pub progress: kva_progress_callback,
    /// Passed to `progress`.
    pub progress_user_data: *mut c_void,
    /// Called with `progress_user_data` once, before the call that loads returns; may be NULL.
    pub progress_free_user_data: kva_free_callback,
    /// Called with log lines; may be NULL (the default).
    pub log: kva_log_callback,
    /// Passed to `log`.
    pub log_user_data: *mut c_void,
    /// Called with `log_user_data` once: before the call that loads returns, if that fails; otherwise when the last
    /// of the model, its sessions and its detokenizers is freed. May be NULL.
    pub log_free_user_data: kva_free_callback,
    /// Folder that what is learnt from the calibration text is kept in, so that it need not be learnt again; made where
    /// it is not there. NULL (the default): next to the model.
    pub speculation_cache_path: *const c_char,
    /// Text that `KVA_POLICY_INFINIGEN` is calibrated on, in UTF-8: plain prose of at least 2,048 tokens. NULL (the
    /// default): a text of the library's own. Needed during the call only.
    pub calibration_text: *const c_char,
    /// Its length in bytes.
    pub calibration_text_len: usize,
}

sized32!(kva_model_options, versions: [log_free_user_data: kva_free_callback, calibration_text_len: usize]);

impl Options for kva_model_options {
    fn defaults() -> Self {
        kva_model_options {
            struct_size: size_of::<Self>() as u32,
            device: KVA_DEVICE_AUTO,
            dtype: KVA_DTYPE_AUTO,
            threads: 0,
            log_level: 0,
            copy_weights: 0,
            kv_limit_bytes: 0,
            progress: None,
            progress_user_data: std::ptr::null_mut(),
            progress_free_user_data: None,
            log: None,
            log_user_data: std::ptr::null_mut(),
            log_free_user_data: None,
            speculation_cache_path: std::ptr::null(),
            calibration_text: std::ptr::null(),
            calibration_text_len: 0,
        }
    }
}

/// What a model is. Set `struct_size` to `sizeof(kva_model_info)` before the call that fills it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_model_info {
    /// `sizeof(kva_model_info)`, set by the caller.
    pub struct_size: u32,
    /// Type of the weights in memory, one of `KVA_DTYPE_...`, never `KVA_DTYPE_AUTO`; of quantized ones `KVA_DTYPE_BF16`,
    /// which they stand for.
    pub dtype: i32,
    /// Layers.
    pub layers: u32,
    /// Query heads.
    pub heads: u32,
    /// KV heads; `heads` is a multiple of it.
    pub kv_heads: u32,
    /// Width of a head.
    pub head_dim: u32,
    /// Width of the residual stream.
    pub hidden_size: u32,
    /// Number of tokens that the model knows, and of logits after each token.
    pub vocabulary_size: u32,
    /// Token that texts begin with, or `KVA_TOKEN_NONE`.
    pub bos_token: u32,
    /// First of the tokens that texts end with, or `KVA_TOKEN_NONE`; for all of them, see
    /// `kva_model_get_stop_tokens`.
    pub eos_token: u32,
    /// 1 if the model has a tokenizer, else 0.
    pub has_tokenizer: u32,
    /// 1 if the model has a chat template, else 0.
    pub has_chat_template: u32,
    /// Most tokens that a session may hold.
    pub context_length: u64,
    /// Number of weights; a matrix used twice counts once.
    pub parameters: u64,
    /// Bytes of weights in memory.
    pub weight_bytes: u64,
    /// Seconds that loading took.
    pub load_seconds: f64,
    /// Family of the model, such as "llama". Owned by the model handle.
    pub architecture: *const c_char,
    /// What computes: device, instruction set, threads; one line for people. Owned by the model handle.
    pub backend: *const c_char,
    /// How the weights lie in memory, for people: their type, or the kinds of their blocks and what these stand for, such as
    /// "q4_1+q8_0 as bf16". Owned by the model handle.
    pub weight_storage: *const c_char,
}

sized32!(kva_model_info, versions: [backend: *const c_char, weight_storage: *const c_char]);

/// What sessions will cost. Set `struct_size` to `sizeof(kva_estimate)` before the call that fills it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_estimate {
    /// `sizeof(kva_estimate)`, set by the caller.
    pub struct_size: u32,
    /// Always 0.
    pub reserved: u32,
    /// Bytes of weights, which are in memory already.
    pub weight_bytes: u64,
    /// Bytes of KV in device memory (main memory, where the device is the processor).
    pub kv_device_bytes: u64,
    /// Bytes of KV in pinned host memory.
    pub kv_pinned_bytes: u64,
    /// Bytes of KV in files.
    pub kv_file_bytes: u64,
    /// Bytes of scratch memory in device memory (main memory, where the device is the processor), held once for the whole
    /// model: what is held once the largest prompt and the largest step have run. What a library takes for itself
    /// (cuBLAS) is not counted, nor what a prompt gives back at its end.
    pub scratch_bytes: u64,
    /// Bytes of scratch memory in pinned host memory, held once for the whole model.
    pub scratch_pinned_bytes: u64,
}

sized32!(kva_estimate, versions: [scratch_bytes: u64, scratch_pinned_bytes: u64]);

impl kva_model {
    fn new(model: Model) -> kva_model {
        let line = |text: String| CString::new(text.replace('\0', "")).unwrap_or_default();
        kva_model {
            architecture: line(model.config().architecture.name().into()),
            backend: line(model.backend().description()),
            storage: line(model.storage()),
            model,
        }
    }
}

/// The element type that a `KVA_DTYPE_...` names; `None` for `KVA_DTYPE_AUTO`.
pub(super) fn dtype(value: i32, name: &str) -> Result<Option<DType>> {
    match value {
        KVA_DTYPE_AUTO => Ok(None),
        KVA_DTYPE_F32 => Ok(Some(DType::F32)),
        KVA_DTYPE_F16 => Ok(Some(DType::F16)),
        KVA_DTYPE_BF16 => Ok(Some(DType::BF16)),
        _ => Err(Error::invalid_argument(format!("{name} is {value}, which is no KVA_DTYPE"))),
    }
}

fn dtype_constant(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => KVA_DTYPE_F32,
        DType::F16 => KVA_DTYPE_F16,
        DType::BF16 => KVA_DTYPE_BF16,
        // Weights and KV have no other types.
        _ => KVA_DTYPE_AUTO,
    }
}

/// Options as the engine takes them. The user data is in charge of somebody before anything can fail.
///
/// # Safety
///
/// As [`options::read`], what the fields point to is as documented there, and the callbacks may be called as their types
/// say.
unsafe fn model_options(pointer: *const kva_model_options) -> Result<ModelOptions> {
    // SAFETY: the caller's promise.
    let given = unsafe { options::read(pointer, "options") }?;
    let options = given.value;
    let progress_data = UserData::new(options.progress_user_data, options.progress_free_user_data);
    let log_data = UserData::new(options.log_user_data, options.log_free_user_data);
    given.unknown?;
    // SAFETY: the caller's promise.
    let (cache, calibration) = unsafe {
        (
            optional_path(options.speculation_cache_path, "options.speculation_cache_path")?,
            text(options.calibration_text, options.calibration_text_len, "options.calibration_text")?,
        )
    };
    let level = match options.log_level {
        0 | KVA_LOG_INFO => LogLevel::Info,
        KVA_LOG_ERROR => LogLevel::Error,
        KVA_LOG_WARNING => LogLevel::Warning,
        KVA_LOG_DEBUG => LogLevel::Debug,
        level => {
            return Err(Error::invalid_argument(format!("options.log_level is {level}, which is no KVA_LOG level")));
        }
    };
    Ok(ModelOptions {
        device: match options.device {
            KVA_DEVICE_AUTO => Device::Auto,
            KVA_DEVICE_CPU => Device::Cpu,
            KVA_DEVICE_CUDA => Device::Cuda,
            device => {
                return Err(Error::invalid_argument(format!("options.device is {device}, which is no KVA_DEVICE")));
            }
        },
        dtype: dtype(options.dtype, "options.dtype")?,
        threads: options.threads as usize,
        copy_weights: options::switch(options.copy_weights, "options.copy_weights")?,
        kv_limit: usize::try_from(options.kv_limit_bytes).unwrap_or(usize::MAX),
        // Without a callback the data has no use, and is freed here.
        progress: options.progress.map(|callback| -> crate::model::load::Progress {
            Box::new(move |fraction| {
                // SAFETY: the function came with its data, which lives as long as this closure; we are on the thread of
                // the call that loads, as its type says.
                unsafe { callback(progress_data.pointer(), fraction) == 0 }
            })
        }),
        calibration_text: (!calibration.is_empty()).then(|| calibration.to_owned()),
        speculation_cache: cache,
        logger: options.log.map(|callback| Logger {
            level,
            sink: Box::new(move |level, message| {
                let message = CString::new(message.replace('\0', "\u{fffd}")).unwrap_or_default();
                // SAFETY: the function came with its data, which lives as long as this closure, and may be called from
                // any thread; the message is a string that outlives the call.
                unsafe { callback(log_data.pointer(), level as i32, message.as_ptr()) }
            }),
        }),
    })
}

/// Fills `options` with the defaults.
///
/// Ownership: `options` is the caller's; the library keeps no reference. Threads: any.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` for NULL or for a `struct_size` that is not `sizeof(kva_model_options)` of
/// some version.
/// After an error: nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_options_init(
    options: *mut kva_model_options,
    struct_size: usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the caller's promise: NULL, or `struct_size` bytes.
        unsafe { options::initialise(options, struct_size, "options") }
    })
}

/// Loads the checkpoint at `path`: a Hugging Face folder (`config.json`, safetensors, `tokenizer.json`), or a GGUF
/// file.
///
/// `path` is a file name as the system has it (UTF-8, on most). `options` may be NULL for the defaults. What the
/// file says is checked before it is believed: a damaged or hostile checkpoint is an error.
///
/// Ownership: `*model` is the caller's, freed with `kva_model_free`. `path` and `options` are not needed after the
/// call. The user data of both callbacks is freed exactly once on every path, also when this call fails, except
/// where `options->struct_size` itself is refused: then the library cannot tell where they are.
/// Threads: any.
/// Errors: `KVA_ERROR_NOT_FOUND`, `KVA_ERROR_IO`, `KVA_ERROR_INVALID_FORMAT` (the message names file and tensor),
/// `KVA_ERROR_UNSUPPORTED` (architecture, tensor type, device), `KVA_ERROR_OUT_OF_MEMORY`, `KVA_ERROR_CANCELLED`
/// (by `progress`), `KVA_ERROR_INVALID_ARGUMENT`.
/// After an error: `*model` is unchanged and nothing is held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_load(
    path: *const c_char,
    options: *const kva_model_options,
    model: *mut *mut kva_model,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the arguments are as documented. The options come first: they hold what must be freed.
        let (options, path, out) =
            unsafe { (model_options(options)?, self::path(path, "path")?, Out::new(model, "model")?) };
        let model = Model::load(path, options)?;
        out.write(Box::into_raw(Box::new(kva_model::new(model))));
        Ok(())
    })
}

/// Makes a model of a known shape with random weights, for measuring speed. It has no tokenizer.
///
/// `shape` is one of "opt-6.7b", "opt-13b", "opt-30b", "llama-2-7b", "llama-2-13b", "llama-3-8b", "smollm2-135m".
/// The same `seed` makes the same weights.
///
/// Ownership, threads: as `kva_model_load`.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (for an unknown shape, the message lists the known ones),
/// `KVA_ERROR_OUT_OF_MEMORY`, `KVA_ERROR_CANCELLED`, `KVA_ERROR_UNSUPPORTED`.
/// After an error: `*model` is unchanged and nothing is held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_create_random(
    shape: *const c_char,
    seed: u64,
    options: *const kva_model_options,
    model: *mut *mut kva_model,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the arguments are as documented. The options come first: they hold what must be freed.
        let (options, shape, out) =
            unsafe { (model_options(options)?, string(shape, "shape")?, Out::new(model, "model")?) };
        let model = Model::random(shape, seed, options)?;
        out.write(Box::into_raw(Box::new(kva_model::new(model))));
        Ok(())
    })
}

/// Frees a model handle. Sessions and detokenizers of the model stay usable, and keep its memory until the last of
/// them is freed.
///
/// Ownership: takes `model`, which must not be used afterwards, nor by a call still in progress; NULL is allowed.
/// Threads: any, once. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kva_model_free(model: Option<Box<kva_model>>) {
    guard_void(|| drop(model));
}

/// Says what a model is.
///
/// Ownership: the strings in `*info` belong to the `model` handle and are valid until it is freed. Threads: any,
/// many at once.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` for NULL or a wrong `info->struct_size`. After an error: `*info` is
/// unchanged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_get_info(
    model: Option<&kva_model>,
    info: *mut kva_model_info,
) -> Option<Box<kva_error>> {
    guard(|| {
        let kva_model { model, architecture, backend, storage } = handle(model, "model")?;
        // SAFETY: the caller's promise: NULL, or a struct as long as it says.
        let out = unsafe { OutStruct::new(info, "info") }?;
        let config = model.config();
        let tokenizer = model.tokenizer().ok();
        let bos = config.bos.or_else(|| tokenizer.and_then(|tokenizer| tokenizer.bos()));
        let eos = tokenizer.and_then(|tokenizer| tokenizer.eos()).or_else(|| model.stop_tokens().first().copied());
        out.write(kva_model_info {
            struct_size: 0,
            dtype: dtype_constant(model.dtype()),
            layers: config.layers as u32,
            heads: config.heads as u32,
            kv_heads: config.kv_heads as u32,
            head_dim: config.head_dim as u32,
            hidden_size: config.hidden as u32,
            vocabulary_size: config.vocabulary as u32,
            bos_token: bos.unwrap_or(KVA_TOKEN_NONE),
            eos_token: eos.unwrap_or(KVA_TOKEN_NONE),
            has_tokenizer: tokenizer.is_some().into(),
            has_chat_template: model.chat_template().is_ok().into(),
            context_length: config.context_length as u64,
            parameters: model.parameters(),
            weight_bytes: model.weight_bytes(),
            load_seconds: model.load_seconds(),
            architecture: architecture.as_ptr(),
            backend: backend.as_ptr(),
            weight_storage: storage.as_ptr(),
        });
        Ok(())
    })
}

/// Learns from the calibration text what `KVA_POLICY_INFINIGEN` speculates with, or reads it from the cache. Without this
/// call the model's first session with that policy does it, which may take minutes; a second call has nothing to do.
///
/// `progress` may be NULL. A call while another thread calibrates the same model waits for that one.
///
/// Ownership: `free_user_data` (may be NULL) is called with `user_data` exactly once, before this call returns.
/// Threads: any, many at once.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, or a calibration text that is too short), `KVA_ERROR_UNSUPPORTED` (a model
/// that cannot be calibrated), `KVA_ERROR_OUT_OF_MEMORY`, `KVA_ERROR_CANCELLED` (by `progress`). A cache that cannot be
/// written is a line in the log.
/// After an error: the model is as it was.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_calibrate(
    model: Option<&kva_model>,
    progress: kva_progress_callback,
    user_data: *mut c_void,
    free_user_data: kva_free_callback,
) -> Option<Box<kva_error>> {
    // In charge of the data before anything can fail.
    let data = UserData::new(user_data, free_user_data);
    guard(move || {
        let model = &handle(model, "model")?.model;
        let mut go_on = |fraction: f32| match progress {
            // SAFETY: the function came with its data, which lives as long as this call; we are on its thread, as its
            // type says.
            Some(progress) => unsafe { progress(data.pointer(), fraction) == 0 },
            None => true,
        };
        model.calibrate(&mut go_on).map(drop)
    })
}

/// Says what `sessions` sessions with these options would cost, all of them full and decoded in one batch.
/// Allocates nothing.
///
/// `options` may be NULL for the defaults (the model's whole context length).
///
/// Ownership: nothing is kept. Threads: any, many at once; it may wait while another thread's step of the model
/// ends.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` as `kva_session_create`, or for a wrong `estimate->struct_size`.
/// After an error: `*estimate` is unchanged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_estimate(
    model: Option<&kva_model>,
    options: *const kva_session_options,
    sessions: usize,
    estimate: *mut kva_estimate,
) -> Option<Box<kva_error>> {
    guard(|| {
        let model = &handle(model, "model")?.model;
        // SAFETY: the caller's promise: NULL, or structs as long as they say.
        let (options, out) = unsafe { (session_options(options)?, OutStruct::new(estimate, "estimate")?) };
        let estimate = Estimate::new(model, &options, sessions)?;
        out.write(kva_estimate {
            struct_size: 0,
            reserved: 0,
            weight_bytes: estimate.weights,
            kv_device_bytes: estimate.kv.device as u64,
            kv_pinned_bytes: estimate.kv.pinned as u64,
            kv_file_bytes: estimate.kv.file as u64,
            scratch_bytes: estimate.scratch.device as u64,
            scratch_pinned_bytes: estimate.scratch.pinned as u64,
        });
        Ok(())
    })
}
