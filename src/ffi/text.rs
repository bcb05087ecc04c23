//! Text and tokens: a model's tokenizer and chat template.

use std::ffi::c_char;

use super::boundary::{Out, OutSlice, guard, handle, slice, string, text};
use super::error::kva_error;
use super::model::kva_model;
use crate::model::chat::Message;
use crate::{Error, Result};

/// Add what the model expects around a text, such as its beginning-of-text token.
pub const KVA_TOKENIZE_ADD_SPECIAL: u32 = 1;
/// Read special tokens written in the text, such as "<|im_end|>". Only for text that you trust; without it they are
/// ordinary characters.
pub const KVA_TOKENIZE_PARSE_SPECIAL: u32 = 2;

/// Leave special tokens out of the text.
pub const KVA_DETOKENIZE_SKIP_SPECIAL: u32 = 1;

/// One message of a conversation. This struct never changes.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_chat_message {
    /// Who speaks: "system", "user", "assistant", or what else the model's template knows. UTF-8, NUL-terminated.
    pub role: *const c_char,
    /// What is said. UTF-8, NUL-terminated.
    pub content: *const c_char,
}

/// Errors where `flags` has bits outside `known`.
pub(super) fn check_flags(flags: u32, known: u32, name: &str) -> Result<()> {
    if flags & !known != 0 {
        return Err(Error::invalid_argument(format!(
            "flags are {flags:#x}, but only the {name} bits {known:#x} are known"
        )));
    }
    Ok(())
}

/// Writes a text with a NUL after it, and its length without.
fn write_text(mut out: OutSlice<c_char>, text_len: Out<usize>, text: &str) -> Result<()> {
    out.check_room(text.len() + 1, "text", "bytes")?;
    if !out.is_absent() {
        // SAFETY: `c_char` is a byte, signed or not: same size, same alignment, every value valid.
        let bytes = unsafe { std::slice::from_raw_parts(text.as_ptr().cast::<c_char>(), text.len()) };
        out.write(0, bytes);
        out.write(text.len(), &[0]);
    }
    text_len.write(text.len());
    Ok(())
}

/// Writes tokens and their number.
fn write_tokens(mut out: OutSlice<u32>, count: Out<usize>, tokens: &[u32]) -> Result<()> {
    out.check_room(tokens.len(), "tokens", "tokens")?;
    out.write(0, tokens);
    count.write(tokens.len());
    Ok(())
}

/// Turns text into tokens: writes them to `tokens` and their number to `*count`.
///
/// `text` holds `text_len` bytes of UTF-8; it needs no NUL, and may contain any. `flags` are `KVA_TOKENIZE_...`
/// bits. With `tokens` NULL and `capacity` 0 the tokens are only counted.
///
/// Ownership: all memory is the caller's; nothing is kept. Threads: any, many at once.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (text that is not UTF-8, unknown flags, or a `capacity` that is too small:
/// the message says how many are needed), `KVA_ERROR_UNSUPPORTED` (the model has no tokenizer). After an error:
/// nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_tokenize(
    model: Option<&kva_model>,
    text: *const c_char,
    text_len: usize,
    flags: u32,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        let model = &handle(model, "model")?.model;
        check_flags(flags, KVA_TOKENIZE_ADD_SPECIAL | KVA_TOKENIZE_PARSE_SPECIAL, "KVA_TOKENIZE")?;
        // SAFETY: the arguments are as documented.
        let (text, out, count) = unsafe {
            (self::text(text, text_len, "text")?, OutSlice::new(tokens, capacity, "tokens")?, Out::new(count, "count")?)
        };
        let (add, parse) = (flags & KVA_TOKENIZE_ADD_SPECIAL != 0, flags & KVA_TOKENIZE_PARSE_SPECIAL != 0);
        write_tokens(out, count, &model.tokenizer()?.encode(text, add, parse)?)
    })
}

/// Turns tokens into text: writes UTF-8 and a NUL to `text`, and its length without the NUL to `*text_len`. Bytes
/// that are not UTF-8 become U+FFFD.
///
/// `flags` are `KVA_DETOKENIZE_...` bits. `capacity` counts bytes, the NUL among them. With `text` NULL and
/// `capacity` 0 only the length is found. For text that comes one token at a time use a `kva_detokenizer`.
///
/// Ownership: all memory is the caller's; nothing is kept. Threads: any, many at once.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (a token outside the vocabulary, unknown flags, or a `capacity` that is too
/// small: the message says how many bytes are needed), `KVA_ERROR_UNSUPPORTED` (the model has no tokenizer). After
/// an error: nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_detokenize(
    model: Option<&kva_model>,
    tokens: *const u32,
    count: usize,
    flags: u32,
    text: *mut c_char,
    capacity: usize,
    text_len: *mut usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        let model = &handle(model, "model")?.model;
        check_flags(flags, KVA_DETOKENIZE_SKIP_SPECIAL, "KVA_DETOKENIZE")?;
        // SAFETY: the arguments are as documented.
        let (tokens, out, text_len) = unsafe {
            (slice(tokens, count, "tokens")?, OutSlice::new(text, capacity, "text")?, Out::new(text_len, "text_len")?)
        };
        let text = model.tokenizer()?.decode(tokens, flags & KVA_DETOKENIZE_SKIP_SPECIAL != 0)?;
        write_text(out, text_len, &text)
    })
}

/// The tokens that end a text, ascending: writes them to `tokens` and their number to `*count`.
/// `kva_session_generate` stops at these.
///
/// With `tokens` NULL and `capacity` 0 they are only counted.
///
/// Ownership: all memory is the caller's; nothing is kept. Threads: any, many at once.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, or a `capacity` that is too small). After an error: nothing was
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_get_stop_tokens(
    model: Option<&kva_model>,
    tokens: *mut u32,
    capacity: usize,
    count: *mut usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        let model = &handle(model, "model")?.model;
        // SAFETY: the arguments are as documented.
        let (out, count) = unsafe { (OutSlice::new(tokens, capacity, "tokens")?, Out::new(count, "count")?) };
        write_tokens(out, count, &model.stop_tokens())
    })
}

/// Writes a conversation as the text that the model was trained on, with the checkpoint's own chat template: UTF-8
/// and a NUL to `text`, and its length without the NUL to `*text_len`.
///
/// With `add_generation_prompt` other than 0 the text ends where the model's answer begins. `capacity` counts
/// bytes, the NUL among them; with `text` NULL and `capacity` 0 only the length is found. Tokenize the text with
/// `KVA_TOKENIZE_PARSE_SPECIAL` and without `KVA_TOKENIZE_ADD_SPECIAL`: the template has written all special
/// tokens.
///
/// Ownership: all memory is the caller's; nothing is kept. Threads: any, many at once.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, text that is not UTF-8, a conversation that the template refuses, a
/// `capacity` that is too small: the message says how many bytes are needed), `KVA_ERROR_UNSUPPORTED` (the model
/// has no chat template), `KVA_ERROR_INVALID_FORMAT` (its template is broken). After an error: nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_model_apply_chat_template(
    model: Option<&kva_model>,
    messages: *const kva_chat_message,
    count: usize,
    add_generation_prompt: u32,
    text: *mut c_char,
    capacity: usize,
    text_len: *mut usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        let model = &handle(model, "model")?.model;
        // SAFETY: the arguments are as documented.
        let (messages, out, text_len) = unsafe {
            (
                slice(messages, count, "messages")?,
                OutSlice::new(text, capacity, "text")?,
                Out::new(text_len, "text_len")?,
            )
        };
        let messages: Vec<Message> = messages.iter().enumerate().map(message).collect::<Result<_>>()?;
        let text = model.chat_template()?.render(&messages, add_generation_prompt != 0)?;
        write_text(out, text_len, &text)
    })
}

fn message((i, message): (usize, &kva_chat_message)) -> Result<Message> {
    let (role, content) = (format!("messages[{i}].role"), format!("messages[{i}].content"));
    // SAFETY: the caller's promise: NULL, or strings that end with a NUL and are left alone during the call.
    unsafe { Ok(Message::new(string(message.role, &role)?, string(message.content, &content)?)) }
}
