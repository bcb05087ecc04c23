//! Detokenizers: text that comes one token at a time.

use std::ffi::c_char;
use std::ops::Deref;
use std::sync::{Mutex, MutexGuard};

use super::boundary::{Out, guard, guard_void, handle};
use super::error::kva_error;
use super::model::kva_model;
use super::session::try_lock;
use super::text::{KVA_DETOKENIZE_SKIP_SPECIAL, check_flags};
use crate::Result;
use crate::engine::Model;
use crate::model::tokenizer::{StreamOptions, TextStream, Tokenizer};

/// Turns tokens into text one at a time: gives out what no later token can change, and holds the beginning of a
/// character back until the rest of it comes.
///
/// It keeps its model alive. Used by one thread at a time: a second caller gets `KVA_ERROR_BUSY`.
pub struct kva_detokenizer(Mutex<Streaming>);

struct Streaming {
    stream: TextStream<ModelTokenizer>,
    /// What was given out last, with a NUL.
    text: Vec<u8>,
}

/// The tokenizer of a model that has one, and the model with it.
struct ModelTokenizer(Model);

impl ModelTokenizer {
    fn new(model: &Model) -> Result<ModelTokenizer> {
        model.tokenizer()?;
        Ok(ModelTokenizer(model.clone()))
    }
}

impl Deref for ModelTokenizer {
    type Target = Tokenizer;

    fn deref(&self) -> &Tokenizer {
        self.0.tokenizer().expect("`new` saw it, and models do not change")
    }
}

impl Streaming {
    fn set(text: &str, buffer: &mut Vec<u8>) -> (*const c_char, usize) {
        buffer.clear();
        buffer.extend_from_slice(text.as_bytes());
        buffer.push(0);
        (buffer.as_ptr().cast(), text.len())
    }
}

/// # Safety
///
/// `detokenizer` is NULL or a detokenizer that is not freed as long as the result lives.
unsafe fn lock<'a>(detokenizer: *const kva_detokenizer) -> Result<MutexGuard<'a, Streaming>> {
    // SAFETY: the caller's promise; detokenizers are made by `Box`, so it is aligned.
    try_lock(&handle(unsafe { detokenizer.as_ref() }, "detokenizer")?.0, "the detokenizer")
}

/// Makes a detokenizer, for tokens that go on after others, as generated tokens do after a prompt: a space before
/// their first word is kept.
///
/// `flags` are `KVA_DETOKENIZE_...` bits.
///
/// Ownership: `*detokenizer` is the caller's, freed with `kva_detokenizer_free`; it keeps the model alive. Threads:
/// any, many at once.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, unknown flags), `KVA_ERROR_UNSUPPORTED` (the model has no
/// tokenizer).
/// After an error: `*detokenizer` is unchanged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_detokenizer_create(
    model: Option<&kva_model>,
    flags: u32,
    detokenizer: *mut *mut kva_detokenizer,
) -> Option<Box<kva_error>> {
    guard(|| {
        let model = &handle(model, "model")?.model;
        check_flags(flags, KVA_DETOKENIZE_SKIP_SPECIAL, "KVA_DETOKENIZE")?;
        // SAFETY: the caller's promise: NULL, or a place for the handle.
        let out = unsafe { Out::new(detokenizer, "detokenizer") }?;
        let options = StreamOptions { skip_special: flags & KVA_DETOKENIZE_SKIP_SPECIAL != 0, continues: true };
        let stream = TextStream::new(ModelTokenizer::new(model)?, options);
        let detokenizer = kva_detokenizer(Mutex::new(Streaming { stream, text: Vec::new() }));
        out.write(Box::into_raw(Box::new(detokenizer)));
        Ok(())
    })
}

/// Takes the next token and gives the text that has become certain: whole UTF-8 characters with a NUL after them in
/// `*text`, their number of bytes in `*text_len`, which may be 0.
///
/// Ownership: `*text` belongs to the detokenizer and is valid until the next call on it. Threads: any, one at a
/// time.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL, a token outside the vocabulary), `KVA_ERROR_BUSY`.
/// After an error: the detokenizer is as it was and nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_detokenizer_push(
    detokenizer: *mut kva_detokenizer,
    token: u32,
    text: *mut *const c_char,
    text_len: *mut usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the caller's promise: NULL, or a detokenizer.
        let mut streaming = unsafe { lock(detokenizer) }?;
        // SAFETY: the caller's promise: NULL, or places for the results.
        let (out, out_len) = unsafe { (Out::new(text, "text")?, Out::new(text_len, "text_len")?) };
        let Streaming { stream, text } = &mut *streaming;
        let (text, length) = Streaming::set(stream.push(token)?, text);
        out.write(text);
        out_len.write(length);
        Ok(())
    })
}

/// Ends the text: gives what was held back, U+FFFD in place of a character that was never completed. The
/// detokenizer is then as new.
///
/// Ownership, threads: as `kva_detokenizer_push`.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` (NULL), `KVA_ERROR_BUSY`. After an error: the detokenizer is as it was and
/// nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_detokenizer_finish(
    detokenizer: *mut kva_detokenizer,
    text: *mut *const c_char,
    text_len: *mut usize,
) -> Option<Box<kva_error>> {
    guard(|| {
        // SAFETY: the caller's promise: NULL, or a detokenizer.
        let mut streaming = unsafe { lock(detokenizer) }?;
        // SAFETY: the caller's promise: NULL, or places for the results.
        let (out, out_len) = unsafe { (Out::new(text, "text")?, Out::new(text_len, "text_len")?) };
        let Streaming { stream, text } = &mut *streaming;
        let (text, length) = Streaming::set(stream.finish(), text);
        out.write(text);
        out_len.write(length);
        Ok(())
    })
}

/// Frees a detokenizer.
///
/// Ownership: takes `detokenizer`, which must not be used afterwards, nor by a call still in progress; NULL is
/// allowed.
/// Threads: any, once. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kva_detokenizer_free(detokenizer: Option<Box<kva_detokenizer>>) {
    guard_void(|| drop(detokenizer));
}
