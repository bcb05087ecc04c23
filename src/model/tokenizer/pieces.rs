//! From token ids to bytes: what each id of the vocabulary contributes to decoded text.
//!
//! The crate `tokenizers` decodes a whole sequence at once, through a chain of decoders that pass lists of strings on.
//! A stream of tokens needs the same answer one token at a time. So the chain is compiled, when the tokenizer is
//! loaded, into a table with the bytes of every id and a small [`Plan`] with what depends on position: how bytes of
//! different tokens join into UTF-8, and what is stripped at the start. Decoding of whole sequences uses the same
//! table, so that the two cannot differ.

use std::path::Path;

use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder as _, Model as _};

use crate::{Error, Result};

/// Ids above this are refused: the table is indexed by id, and no vocabulary comes near.
pub(super) const MAX_VOCABULARY: u32 = 1 << 22;

/// How bytes join into text, and what happens at the start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) joining: Joining,
    /// Characters to strip from the start of the text, and how many at most.
    pub(super) strip: Option<(char, usize)>,
    /// The first token that contributes loses every one of this mark, `▁` (Metaspace with a prefix).
    pub(super) bare_first: Option<char>,
    /// Tokens are separated by a space: what `tokenizers` does where there is no decoder.
    pub(super) spaces: bool,
}

/// How bytes of different tokens join into UTF-8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Joining {
    /// Byte-level BPE: all bytes form one run, invalid sequences become U+FFFD as in [`String::from_utf8_lossy`].
    ByteLevel,
    /// SentencePiece: only `<0x..>` tokens are bytes; each byte that is not part of valid UTF-8 becomes one U+FFFD.
    ByteFallback,
}

/// What the chain of decoders does to the text of a single token.
enum Step<'a> {
    /// Characters of the GPT-2 alphabet back to bytes.
    ByteLevel,
    /// A textual replacement.
    Replace(&'a DecoderWrapper),
    /// `▁` to a space.
    Metaspace(char),
    /// `<0x41>` to the byte.
    ByteFallback,
}

/// The table.
#[derive(Debug)]
pub(super) struct Pieces {
    plan: Plan,
    bytes: Vec<u8>,
    /// End of each id's bytes; `ends[id - 1]` is the start.
    ends: Vec<u32>,
    kinds: Vec<u8>,
}

/// Flags in `kinds`.
const PRESENT: u8 = 1;
const SPECIAL: u8 = 2;
const BYTE: u8 = 4;

/// One id's entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    /// What it contributes.
    pub(super) bytes: &'a [u8],
    /// A control token, left out of text by default.
    pub(super) special: bool,
    /// A single raw byte of a byte-fallback vocabulary.
    pub(super) byte: bool,
}

impl Pieces {
    /// Compiles the decoder of `tokenizer`; `file` is named in errors.
    pub(super) fn new(tokenizer: &tokenizers::Tokenizer, file: &Path) -> Result<Pieces> {
        let (plan, steps) = compile(tokenizer.get_decoder(), file)?;
        let model = tokenizer.get_model();
        let added = tokenizer.get_added_vocabulary();

        // Nearly every vocabulary is 0..size, which is found out on the way; only others pay for a copy of the whole
        // vocabulary, to find the highest id.
        let size = model.get_vocab_size();
        let highest_added = added.get_added_tokens_decoder().keys().copied().max().unwrap_or(0);
        let mut highest = u32::try_from(size.saturating_sub(1)).unwrap_or(u32::MAX).max(highest_added);
        check_highest(highest, file)?;
        let mut pieces = Pieces {
            plan,
            bytes: Vec::with_capacity(8 * (highest as usize + 1)),
            ends: Vec::with_capacity(highest as usize + 1),
            kinds: Vec::with_capacity(highest as usize + 1),
        };
        let (mut id, mut found) = (0, 0);
        loop {
            while id <= highest {
                let text = model.id_to_token(id);
                found += usize::from(text.is_some());
                pieces.push(
                    added.simple_id_to_token(id).or(text),
                    |text| added.is_special_token(text),
                    &steps,
                    file,
                )?;
                id += 1;
            }
            if found >= size {
                return Ok(pieces);
            }
            highest = model.get_vocab().into_values().max().unwrap_or(0);
            check_highest(highest, file)?;
            // Tokens may share an id; then nothing more is to be found.
            found = size;
        }
    }

    /// Adds the entry of the next id.
    fn push(
        &mut self,
        text: Option<String>,
        special: impl Fn(&str) -> bool,
        steps: &[Step<'_>],
        file: &Path,
    ) -> Result<()> {
        let mut kind = 0;
        if let Some(text) = text {
            kind = PRESENT;
            if special(&text) {
                kind |= SPECIAL;
            }
            if apply(steps, text, &mut self.bytes, file)? {
                kind |= BYTE;
            }
        }
        self.kinds.push(kind);
        let end = u32::try_from(self.bytes.len())
            .map_err(|_| Error::invalid_format(file, "the tokens of the vocabulary are longer than 4 GiB together"))?;
        self.ends.push(end);
        Ok(())
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The highest id there is.
    pub(super) fn highest(&self) -> u32 {
        // Never empty, and never longer than `MAX_VOCABULARY`.
        self.ends.len() as u32 - 1
    }

    /// The entry of `id`; `None` where the vocabulary has no such token.
    pub(super) fn get(&self, id: u32) -> Option<Piece<'_>> {
        let index = id as usize;
        let kind = *self.kinds.get(index)?;
        if kind & PRESENT == 0 {
            return None;
        }
        let start = if index == 0 { 0 } else { self.ends[index - 1] as usize };
        let bytes = &self.bytes[start..self.ends[index] as usize];
        Some(Piece { bytes, special: kind & SPECIAL != 0, byte: kind & BYTE != 0 })
    }
}

fn check_highest(highest: u32, file: &Path) -> Result<()> {
    if highest >= MAX_VOCABULARY {
        let message = format!("token id {highest} is absurd; expected ids below {MAX_VOCABULARY}");
        return Err(Error::invalid_format(file, message));
    }
    Ok(())
}

/// The per-token steps and the positional rest of a chain of decoders, or an error that names a decoder whose effect
/// on a token depends on its neighbours in some other way.
fn compile<'a>(decoder: Option<&'a DecoderWrapper>, file: &Path) -> Result<(Plan, Vec<Step<'a>>)> {
    let mut plan = Plan { joining: Joining::ByteFallback, strip: None, bare_first: None, spaces: false };
    let mut steps = Vec::new();
    let Some(decoder) = decoder else {
        plan.spaces = true;
        return Ok((plan, steps));
    };
    let chain = match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders(),
        single => std::slice::from_ref(single),
    };
    let mut fused = false;
    for decoder in chain {
        match decoder {
            DecoderWrapper::ByteLevel(_) if steps.is_empty() && !fused => {
                plan.joining = Joining::ByteLevel;
                steps.push(Step::ByteLevel);
                fused = true;
            }
            DecoderWrapper::Replace(_) if !fused => steps.push(Step::Replace(decoder)),
            DecoderWrapper::ByteFallback(_) if !fused => steps.push(Step::ByteFallback),
            DecoderWrapper::Metaspace(metaspace) if chain.len() == 1 => {
                use tokenizers::pre_tokenizers::metaspace::PrependScheme;
                if metaspace.get_prepend_scheme() != PrependScheme::Never {
                    plan.bare_first = Some(metaspace.get_replacement());
                }
                steps.push(Step::Metaspace(metaspace.get_replacement()));
            }
            DecoderWrapper::Fuse(_) => fused = true,
            DecoderWrapper::Strip(strip) if fused && strip.stop == 0 && plan.strip.is_none() => {
                plan.strip = Some((strip.content, strip.start));
            }
            other => {
                // Only the kind is of interest, and a chain may hold long patterns.
                let kind = format!("{other:?}");
                let kind = kind.split(['(', ' ', '{']).next().unwrap_or_default();
                return Err(Error::unsupported(format!(
                    "{}: the decoder {kind} is not supported here; supported are ByteLevel, Metaspace, and sequences of \
                     Replace, ByteFallback, Fuse and a Strip at the start",
                    file.display()
                )));
            }
        }
    }
    Ok((plan, steps))
}

/// Appends what the token `text` contributes to `out`; true where it is a raw byte.
fn apply(steps: &[Step<'_>], mut text: String, out: &mut Vec<u8>, file: &Path) -> Result<bool> {
    for step in steps {
        match step {
            Step::ByteLevel => {
                let start = out.len();
                for character in text.chars() {
                    match byte_of(character) {
                        Some(byte) => out.push(byte),
                        None => {
                            // Not of the alphabet: an added token, which stands for itself.
                            out.truncate(start);
                            out.extend_from_slice(text.as_bytes());
                            return Ok(false);
                        }
                    }
                }
                return Ok(false);
            }
            Step::Replace(replace) => {
                let parts = replace
                    .decode_chain(vec![text])
                    .map_err(|error| Error::invalid_format(file, format!("the Replace decoder failed: {error}")))?;
                text = parts.concat();
            }
            Step::Metaspace(mark) => text = text.replace(*mark, " "),
            Step::ByteFallback => {
                if let Some(byte) = fallback_byte(&text) {
                    out.push(byte);
                    return Ok(true);
                }
            }
        }
    }
    out.extend_from_slice(text.as_bytes());
    Ok(false)
}

/// The byte that `<0x41>` stands for.
fn fallback_byte(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The byte that a character of the GPT-2 alphabet stands for.
///
/// Printable Latin-1 stands for itself; the other 68 bytes, in order, are U+0100 and up.
fn byte_of(character: char) -> Option<u8> {
    let code = character as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;

    #[test]
    fn the_alphabet_is_that_of_the_library() {
        let alphabet = ByteLevel::alphabet();
        assert_eq!(alphabet.len(), 256);
        let mut seen = [false; 256];
        for character in alphabet {
            seen[byte_of(character).unwrap() as usize] = true;
            let decoded = ByteLevel::default().decode_chain(vec![character.to_string()]).unwrap().concat();
            let byte = byte_of(character).unwrap();
            assert_eq!(decoded, String::from_utf8_lossy(&[byte]));
        }
        assert!(seen.iter().all(|&seen| seen));
        assert_eq!(byte_of('\u{144}'), None);
        assert_eq!(byte_of(' '), None);
    }

    #[test]
    fn fallback_bytes() {
        assert_eq!(fallback_byte("<0x0A>"), Some(10));
        assert_eq!(fallback_byte("<0xfF>"), Some(255));
        for text in ["<0x0>", "<0xGG>", "<0x0A", "<0xé>", "a", "<0x+1 >"] {
            assert_eq!(fallback_byte(text), None, "{text}");
        }
    }
}
