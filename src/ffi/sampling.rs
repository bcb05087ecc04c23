//! Sampling: logits to a token.

use super::boundary::{Out, guard, slice};
use super::error::kva_error;
use super::options::{self, Options, sized32};
use super::session::{kva_session, lock};
use crate::Result;
use crate::engine::sampling::SamplingOptions;

/// What is added to the logit of one token. This struct never changes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_logit_bias {
    /// The token.
    pub token: u32,
    /// Added to its logit; -INFINITY forbids the token.
    pub bias: f32,
}

/// How to pick a token. Fill it with `kva_sampling_options_init`, then change fields; as it comes, the likeliest
/// token is taken.
///
/// In this order: biases, repetition, frequency and presence penalties, temperature, top-k, top-p, min-p, one draw.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_sampling_options {
    /// Set by `kva_sampling_options_init`.
    pub struct_size: u32,
    /// Divides the logits, 0 or more. 0 (the default) takes the likeliest token, after biases and penalties.
    pub temperature: f32,
    /// Sample among this many of the likeliest tokens; 0 (the default) for all.
    pub top_k: u32,
    /// Sample among the likeliest tokens that together have this probability, 0 to 1; 1 (the default) for all.
    pub top_p: f32,
    /// Sample among tokens that are at least this probable, as a fraction of the likeliest one's probability; 0
    /// (the default) for all.
    pub min_p: f32,
    /// Divides (multiplies, where negative) the logits of tokens that occur among the last `penalty_window`; 1 (the
    /// default) for no change.
    pub repetition_penalty: f32,
    /// Subtracted from a token's logit for each time it occurs there. Default 0.
    pub frequency_penalty: f32,
    /// Subtracted from a token's logit once if it occurs there. Default 0.
    pub presence_penalty: f32,
    /// How many of the session's last tokens the penalties look at; 0 (the default) for all.
    pub penalty_window: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Seed of the draws, default 0. A draw depends on the seed and on the number of tokens in the session only, so
    /// the same calls give the same tokens.
    pub seed: u64,
    /// Biases, `logit_bias_count` of them; needed during the call only. Default NULL.
    pub logit_bias: *const kva_logit_bias,
    /// Number of biases. Default 0.
    pub logit_bias_count: usize,
}

sized32!(kva_sampling_options, last: logit_bias_count: usize);

impl Options for kva_sampling_options {
    fn defaults() -> Self {
        kva_sampling_options {
            struct_size: size_of::<Self>() as u32,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            penalty_window: 0,
            reserved: 0,
            seed: 0,
            logit_bias: std::ptr::null(),
            logit_bias_count: 0,
        }
    }
}

/// Options as the engine takes them; it checks the values.
///
/// # Safety
///
/// As [`options::read`], and the biases are as documented.
pub(super) unsafe fn sampling_options(pointer: *const kva_sampling_options, name: &str) -> Result<SamplingOptions> {
    // SAFETY: the caller's promise.
    let given = unsafe { options::read(pointer, name) }?;
    given.unknown?;
    let options = given.value;
    options::check_reserved(options.reserved, name)?;
    // SAFETY: the caller's promise.
    let biases = unsafe { slice(options.logit_bias, options.logit_bias_count, "logit_bias") }?;
    Ok(SamplingOptions {
        temperature: options.temperature,
        top_k: options.top_k as usize,
        top_p: options.top_p,
        min_p: options.min_p,
        repetition_penalty: options.repetition_penalty,
        frequency_penalty: options.frequency_penalty,
        presence_penalty: options.presence_penalty,
        penalty_window: options.penalty_window as usize,
        seed: options.seed,
        logit_bias: biases.iter().map(|bias| (bias.token, bias.bias)).collect(),
    })
}

/// Fills `options` with the defaults.
///
/// Ownership: `options` is the caller's; the library keeps no reference. Threads: any.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` for NULL or for a `struct_size` that is not `sizeof(kva_sampling_options)`
/// of some version.
/// After an error: nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_sampling_options_init(
    options: *mut kva_sampling_options,
    struct_size: usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the caller's promise: NULL, or `struct_size` bytes.
        unsafe { options::initialise(options, struct_size, "options") }
    })
}

/// Picks the next token from the logits after the session's last token. The session is not changed: append the
/// token with `kva_session_decode`.
///
/// `options` may be NULL: the likeliest token. Of several equally likely ones, the lowest.
///
/// Ownership: nothing is kept. Threads: any, one at a time.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, a value out of range, or a session without logits: an empty one, or
/// one that was truncated since), `KVA_ERROR_BUSY`.
/// After an error: nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_sample(
    session: *mut kva_session,
    options: *const kva_sampling_options,
    token: *mut u32,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the arguments are as documented.
        let mut session = unsafe { lock(session) }?;
        // SAFETY: as above.
        let (options, out) = unsafe { (sampling_options(options, "options")?, Out::new(token, "token")?) };
        options.validate(session.model().config().vocabulary)?;
        out.write(session.sample(&options)?);
        Ok(())
    })
}
