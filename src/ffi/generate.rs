//! Generation: the loop that most callers want, with streamed text.

use std::ffi::{c_char, c_void};

use super::boundary::{guard, slice, string};
use super::error::kva_error;
use super::model::KVA_TOKEN_NONE;
use super::options::{self, Options, OutStruct, sized32};
use super::sampling::{kva_sampling_options, sampling_options};
use super::session::{kva_session, lock};
use super::user_data::{UserData, kva_free_callback};
use crate::Result;
use crate::engine::generate::{Finish, GenerateOptions};

/// The model ended the text with a stop token, which is neither emitted nor kept.
pub const KVA_FINISH_STOP_TOKEN: i32 = 1;
/// A stop string appeared. The text ends before it; the session keeps its tokens.
pub const KVA_FINISH_STOP_STRING: i32 = 2;
/// `max_tokens` tokens were emitted.
pub const KVA_FINISH_LENGTH: i32 = 3;
/// The session is full.
pub const KVA_FINISH_CONTEXT: i32 = 4;
/// The callback asked to stop.
pub const KVA_FINISH_CALLBACK: i32 = 5;

const _: () = assert!(
    KVA_FINISH_STOP_TOKEN == Finish::StopToken as i32
        && KVA_FINISH_STOP_STRING == Finish::StopString as i32
        && KVA_FINISH_LENGTH == Finish::Length as i32
        && KVA_FINISH_CONTEXT == Finish::Context as i32
        && KVA_FINISH_CALLBACK == Finish::Callback as i32
);

/// Called for each token of a generation, after it was appended to the session, with the text that has become
/// certain by it: `text_len` bytes of whole UTF-8 characters and a NUL, valid during the call only. The text may be
/// empty: part of a character, or what may become a stop string, is held back. What is held back at the end comes
/// in one more call, with the last token again. A result other than 0 stops the generation, which is no error.
///
/// Runs on the thread that generates, within the call. The session is busy: calls on it return `KVA_ERROR_BUSY`,
/// but `kva_session_cancel` is allowed. It must not free the session.
pub type kva_text_callback =
    Option<unsafe extern "C" fn(user_data: *mut c_void, token: u32, text: *const c_char, text_len: usize) -> i32>;

/// How to generate. Fill it with `kva_generate_options_init`, then change fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_generate_options {
    /// Set by `kva_generate_options_init`.
    pub struct_size: u32,
    /// If not 0, go on past the model's own stop tokens (`kva_model_get_stop_tokens`), which are then emitted like
    /// others. Default 0.
    pub ignore_stop_tokens: u32,
    /// Most tokens to emit; 0 (the default) for as many as the session has room for.
    pub max_tokens: u64,
    /// How to pick tokens; NULL (the default) for the likeliest. Needed during the call only, as all that follows.
    pub sampling: *const kva_sampling_options,
    /// Tokens that end the text, besides the model's own. Default NULL.
    pub stop_tokens: *const u32,
    /// Number of them. Default 0.
    pub stop_token_count: usize,
    /// Texts that end the text, UTF-8, NUL-terminated, not empty; the text is emitted up to the first that appears.
    /// Default NULL.
    pub stop_strings: *const *const c_char,
    /// Number of them. Default 0.
    pub stop_string_count: usize,
    /// Called with each token; may be NULL (the default).
    pub callback: kva_text_callback,
    /// Passed to `callback`.
    pub user_data: *mut c_void,
    /// Called with `user_data` once in each call of `kva_session_generate` that is given it, before that returns;
    /// may be NULL (the default).
    pub free_user_data: kva_free_callback,
}

sized32!(kva_generate_options, last: free_user_data: kva_free_callback);

impl Options for kva_generate_options {
    fn defaults() -> Self {
        kva_generate_options {
            struct_size: size_of::<Self>() as u32,
            ignore_stop_tokens: 0,
            max_tokens: 0,
            sampling: std::ptr::null(),
            stop_tokens: std::ptr::null(),
            stop_token_count: 0,
            stop_strings: std::ptr::null(),
            stop_string_count: 0,
            callback: None,
            user_data: std::ptr::null_mut(),
            free_user_data: None,
        }
    }
}

/// What came of a generation. Set `struct_size` to `sizeof(kva_generate_result)` before the call that fills it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_generate_result {
    /// `sizeof(kva_generate_result)`, set by the caller.
    pub struct_size: u32,
    /// Why the generation ended, one of `KVA_FINISH_...`.
    pub finish_reason: i32,
    /// The last token sampled: the stop token, where one ended the text. `KVA_TOKEN_NONE` if none was.
    pub last_token: u32,
    /// Always 0.
    pub reserved: u32,
    /// Tokens emitted, which the session now holds after the prompt.
    pub tokens: u64,
}

sized32!(kva_generate_result, last: tokens: u64);

/// Fills `options` with the defaults.
///
/// Ownership: `options` is the caller's; the library keeps no reference. Threads: any.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` for NULL or for a `struct_size` that is not `sizeof(kva_generate_options)`
/// of some version.
/// After an error: nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_generate_options_init(
    options: *mut kva_generate_options,
    struct_size: usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the caller's promise: NULL, or `struct_size` bytes.
        unsafe { options::initialise(options, struct_size, "options") }
    })
}

/// Appends a prompt, then samples and appends tokens until one of `KVA_FINISH_...`, streaming the text to a
/// callback.
///
/// The prompt may be empty (NULL, 0) where the session has logits, so that a text can be continued. `options` may
/// be NULL for the defaults: the likeliest tokens until a stop token or the end of the session. `result` may be
/// NULL.
///
/// Afterwards the session holds the prompt and every token that was emitted, and the logits after the last of them.
///
/// Ownership: all memory is the caller's; nothing is kept. The user data is freed exactly once on every path, also
/// when this call fails, except where `options->struct_size` itself is refused: then the library cannot tell where
/// it is. Threads: any, one at a time.
/// Errors: as `kva_session_prefill` and `kva_session_sample`; `KVA_ERROR_UNSUPPORTED` for stop strings with a model
/// that has no tokenizer.
/// After an error: nothing was written to `*result`. If the error came before the first token (arguments, the
/// prompt), the session is as it was before the call. Otherwise (`KVA_ERROR_CANCELLED` in the middle, for one) it
/// holds the prompt and every token emitted so far, each of which the callback has seen, and can go on from there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_session_generate(
    session: *mut kva_session,
    prompt: *const u32,
    prompt_count: usize,
    options: *const kva_generate_options,
    result: *mut kva_generate_result,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the arguments are as documented. The options come first: they hold what must be freed.
        let given = unsafe { options::read(options, "options") }?;
        let options = given.value;
        let user_data = UserData::new(options.user_data, options.free_user_data);
        given.unknown?;
        // SAFETY: the arguments are as documented.
        let (prompt, out, generate) = unsafe {
            let out = if result.is_null() { None } else { Some(OutStruct::new(result, "result")?) };
            (slice(prompt, prompt_count, "prompt")?, out, generate_options(&options)?)
        };
        // SAFETY: as above.
        let mut session = unsafe { lock(session) }?;
        let mut terminated = Vec::new();
        let mut emit = |token: u32, text: &str| {
            let Some(callback) = options.callback else { return true };
            terminated.clear();
            terminated.extend_from_slice(text.as_bytes());
            terminated.push(0);
            // SAFETY: the function came with its data, which lives until the end of this call; the text has `text.len()`
            // bytes and a NUL.
            unsafe { callback(user_data.pointer(), token, terminated.as_ptr().cast(), text.len()) == 0 }
        };
        let generated = session.generate(prompt, &generate, &mut emit)?;
        if let Some(out) = out {
            out.write(kva_generate_result {
                struct_size: 0,
                finish_reason: generated.finish as i32,
                last_token: generated.last_token.unwrap_or(KVA_TOKEN_NONE),
                reserved: 0,
                tokens: generated.tokens as u64,
            });
        }
        Ok(())
    })
}

/// # Safety
///
/// The arrays and strings in `options` are as documented.
unsafe fn generate_options(options: &kva_generate_options) -> Result<GenerateOptions> {
    // SAFETY: the caller's promise.
    let (sampling, stop_tokens, stop_strings) = unsafe {
        (
            sampling_options(options.sampling, "options.sampling")?,
            slice(options.stop_tokens, options.stop_token_count, "options.stop_tokens")?,
            slice(options.stop_strings, options.stop_string_count, "options.stop_strings")?,
        )
    };
    let stop_strings = stop_strings.iter().enumerate().map(|(i, &text)| {
        // SAFETY: the caller's promise.
        unsafe { string(text, &format!("options.stop_strings[{i}]")) }.map(str::to_owned)
    });
    Ok(GenerateOptions {
        max_tokens: usize::try_from(options.max_tokens).unwrap_or(usize::MAX),
        sampling,
        stop_tokens: stop_tokens.to_vec(),
        ignore_model_stop_tokens: options.ignore_stop_tokens != 0,
        stop_strings: stop_strings.collect::<Result<_>>()?,
    })
}
