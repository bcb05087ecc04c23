//! Text out of a running stream of tokens.
//!
//! A character may be split over tokens: `é` can come as the bytes `c3` and `a9` from two of them. A stream gives out
//! what no later token can change and holds the rest back, at most three bytes. What the pushes and [`TextStream::finish`]
//! return, put together, is what [`Tokenizer::decode`] makes of all tokens; a push costs the length of its token.

use std::ops::Deref;

use super::Tokenizer;
use super::pieces::Joining;
use crate::Result;

/// Which text a stream makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Options {
    /// Leave control tokens (`<|im_end|>`) out of the text.
    pub(super) skip_special: bool,
    /// The tokens go on after others: nothing is stripped at the start.
    pub(super) continues: bool,
}

/// Decodes tokens one at a time. `T` is a reference to a tokenizer: `&Tokenizer`, or `Arc<Tokenizer>`.
#[derive(Clone, Debug)]
pub struct TextStream<T> {
    tokenizer: T,
    assembler: Assembler,
}

impl<T: Deref<Target = Tokenizer>> TextStream<T> {
    /// The text of the tokens to come, as [`Tokenizer::decode`] makes it, without control tokens where `skip_special`.
    pub fn new(tokenizer: T, skip_special: bool) -> TextStream<T> {
        let assembler = Assembler::new(&tokenizer, Options { skip_special, continues: false });
        TextStream { tokenizer, assembler }
    }

    /// The text of tokens that go on after others, as generated ones do after a prompt: SentencePiece tokenizers strip
    /// a space from the start of a text, which here is a space between words, and is kept.
    pub fn continuing(tokenizer: T, skip_special: bool) -> TextStream<T> {
        let assembler = Assembler::new(&tokenizer, Options { skip_special, continues: true });
        TextStream { tokenizer, assembler }
    }

    /// Takes a token and returns the text that is now certain, perhaps none.
    ///
    /// An id outside the vocabulary is an error, and leaves the stream as it was.
    pub fn push(&mut self, token: u32) -> Result<String> {
        let mut text = String::new();
        self.assembler.push(&self.tokenizer, token, &mut text)?;
        Ok(text)
    }

    /// Ends the text: returns what was held back, U+FFFD in the place of an unfinished character. The stream is then
    /// as new.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.assembler.finish(&self.tokenizer, &mut text);
        text
    }
}

/// The state of a stream, apart from where the tokenizer and the text are.
#[derive(Clone, Debug)]
pub(super) struct Assembler {
    options: Options,
    /// No token has contributed yet.
    first: bool,
    /// How many characters may still be stripped from the start.
    strip: usize,
    /// The beginning of a character: at most three bytes between calls.
    pending: Vec<u8>,
}

impl Assembler {
    pub(super) fn new(tokenizer: &Tokenizer, options: Options) -> Assembler {
        let mut assembler = Assembler { options, first: true, strip: 0, pending: Vec::new() };
        assembler.restart(tokenizer);
        assembler
    }

    fn restart(&mut self, tokenizer: &Tokenizer) {
        let plan = tokenizer.pieces.plan();
        self.first = !self.options.continues;
        self.strip = match plan.strip {
            Some((_, count)) if !self.options.continues => count,
            _ => 0,
        };
        self.pending.clear();
    }

    pub(super) fn push(&mut self, tokenizer: &Tokenizer, token: u32, out: &mut String) -> Result<()> {
        let Some(piece) = tokenizer.piece(token)? else { return Ok(()) };
        if piece.special && self.options.skip_special {
            return Ok(());
        }
        let plan = tokenizer.pieces.plan();
        let start = out.len();
        let first = std::mem::replace(&mut self.first, false);
        if plan.spaces && !first {
            self.append(out, b" ", false, plan.joining);
        }
        match plan.bare_first.filter(|_| first) {
            // Metaspace drops the mark wherever it stands in the first token. The table has it as a space, which
            // cannot be told from a real one; the vocabulary can.
            Some(mark) => {
                let bare = tokenizer.token_text(token).unwrap_or_default().replace(mark, "");
                self.append(out, bare.as_bytes(), false, plan.joining);
            }
            None => self.append(out, piece.bytes, piece.byte, plan.joining),
        }
        self.strip_start(tokenizer, out, start);
        Ok(())
    }

    pub(super) fn finish(&mut self, tokenizer: &Tokenizer, out: &mut String) {
        let start = out.len();
        self.flush(out, tokenizer.pieces.plan().joining);
        self.strip_start(tokenizer, out, start);
        self.restart(tokenizer);
    }

    fn append(&mut self, out: &mut String, bytes: &[u8], byte: bool, joining: Joining) {
        match joining {
            Joining::ByteFallback if !byte => {
                self.flush(out, joining);
                // Text of the vocabulary, UTF-8 by construction.
                out.push_str(&String::from_utf8_lossy(bytes));
            }
            _ => {
                self.pending.extend_from_slice(bytes);
                self.drain(out, joining);
            }
        }
    }

    /// Moves what is complete, or hopeless, from `pending` to `out`.
    fn drain(&mut self, out: &mut String, joining: Joining) {
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    // `valid` is UTF-8, as the error says; lossy conversion borrows it.
                    out.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(length) = error.error_len() else { break };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[if joining == Joining::ByteFallback { 1 } else { length }..];
                }
            }
        }
        let consumed = self.pending.len() - rest.len();
        self.pending.drain(..consumed);
    }

    /// Gives up on an unfinished character: one U+FFFD for it, or one for each of its bytes.
    fn flush(&mut self, out: &mut String, joining: Joining) {
        if !self.pending.is_empty() {
            let count = if joining == Joining::ByteFallback { self.pending.len() } else { 1 };
            out.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
            self.pending.clear();
        }
    }

    /// Strips what is still due from the part of `out` that begins at `start`.
    fn strip_start(&mut self, tokenizer: &Tokenizer, out: &mut String, start: usize) {
        let Some((mark, _)) = tokenizer.pieces.plan().strip else { return };
        while self.strip > 0 && out.len() > start {
            if out[start..].starts_with(mark) {
                out.replace_range(start..start + mark.len_utf8(), "");
                self.strip -= 1;
            } else {
                self.strip = 0;
            }
        }
    }
}
