//! Text to token ids and back.
//!
//! Encoding is the crate `tokenizers`, the code Hugging Face runs; what a GGUF file says about its tokenizer is turned
//! into the same form ([`Tokenizer::from_gguf`]). Decoding goes through a table made once ([`pieces`]), so that whole
//! sequences and running streams ([`TextStream`]) agree and a step of generation pays for one token only.
//! [`StopStrings`] ends streamed text.
//!
//! A tokenizer is immutable and may be used from many threads. Files are not believed: what does not parse, names an
//! unknown token or makes a library panic ends in an error that names the file.

mod folder;
mod gguf;
mod pieces;
mod stop;
mod stream;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use tokenizers::tokenizer::{AddedVocabulary, Model as _, OffsetType, PreTokenizer as _, Token};

pub use stop::StopStrings;
pub use stream::TextStream;

use crate::{Error, ErrorCode, Result};
use pieces::{Piece, Pieces};
use stream::{Assembler, Options};

/// A checkpoint's tokenizer, with what it says about special tokens and chat templates.
#[derive(Debug)]
pub struct Tokenizer {
    file: PathBuf,
    encoder: tokenizers::Tokenizer,
    /// The added tokens without the special ones, for text that must not contain control tokens.
    plain: AddedVocabulary,
    pieces: Pieces,
    special: SpecialTokens,
    chat_templates: Vec<NamedTemplate>,
    /// Ids from here on are none; at first the tokenizer's own vocabulary, then the model's.
    limit: u32,
}

/// The special tokens of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct SpecialTokens {
    bos: Option<u32>,
    eos: Option<u32>,
    stop: Vec<u32>,
    /// What `add_special` puts around a text.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

/// A chat template as the checkpoint has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTemplate {
    /// `default`, `tool_use`, …
    pub name: String,
    /// The Jinja source.
    pub source: String,
}

impl Tokenizer {
    /// Puts the parts together; `file` is named in errors.
    fn assemble(
        file: PathBuf,
        encoder: tokenizers::Tokenizer,
        mut special: SpecialTokens,
        chat_templates: Vec<NamedTemplate>,
    ) -> Result<Tokenizer> {
        let pieces = guard(&file, "read the vocabulary", || Pieces::new(&encoder, &file))?;
        let mut plain = encoder.get_added_vocabulary().clone();
        plain.set_encode_special_tokens(true);
        special.stop.extend(special.eos);
        special.stop.sort_unstable();
        special.stop.dedup();
        let limit = pieces.highest() + 1;
        if let Some(id) = special.prefix.iter().chain(&special.suffix).find(|&&id| id >= limit) {
            return Err(Error::invalid_format(
                &file,
                format!("the token id {id}, which goes around texts, is outside the vocabulary of {limit} tokens"),
            ));
        }
        Ok(Tokenizer { file, encoder, plain, pieces, special, chat_templates, limit })
    }

    /// Checks the tokenizer against a model with `vocabulary` rows of embeddings.
    ///
    /// A model may have more rows than the tokenizer has tokens (they are padding, and decode to nothing); a tokenizer
    /// with an id that the model does not have is an error.
    pub fn match_vocabulary(&mut self, vocabulary: usize) -> Result<()> {
        let highest = self.pieces.highest();
        if highest as usize >= vocabulary {
            return Err(Error::invalid_format(
                &self.file,
                format!(
                    "the tokenizer does not match the model: its highest token id is {highest}, and the model has a \
                     vocabulary of {vocabulary}"
                ),
            ));
        }
        let stray = self.special.stop.iter().chain(&self.special.bos).find(|&&id| id as usize >= vocabulary);
        if let Some(id) = stray {
            return Err(Error::invalid_format(
                &self.file,
                format!("the special token id {id} is outside the model's vocabulary of {vocabulary}"),
            ));
        }
        self.limit = u32::try_from(vocabulary).unwrap_or(u32::MAX);
        Ok(())
    }

    /// Token ids of `text`.
    ///
    /// `add_special` puts in front and behind what the checkpoint wants there, often BOS; leave it off for a rendered
    /// chat template, which has it already. `parse_special` reads control tokens written out in the text
    /// (`<|im_start|>`) as such; leave it off for text from users.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        let added = if parse_special { self.encoder.get_added_vocabulary() } else { &self.plain };
        guard(&self.file, "encode text", || {
            let encode = || -> tokenizers::Result<tokenizers::Encoding> {
                let mut text = added.extract_and_normalize(self.encoder.get_normalizer(), text);
                if let Some(splitter) = self.encoder.get_pre_tokenizer() {
                    splitter.pre_tokenize(&mut text)?;
                }
                let model = self.encoder.get_model();
                text.tokenize(|part| model.tokenize(part.get()))?;
                text.into_encoding(None, 0, OffsetType::None)
            };
            let encoding = encode().map_err(|error| {
                Error::new(ErrorCode::InvalidFormat, format!("{}: cannot encode text: {error}", self.file.display()))
            })?;
            let ids = encoding.get_ids();
            if !add_special {
                return Ok(ids.to_vec());
            }
            Ok([&self.special.prefix, ids, &self.special.suffix].concat())
        })
    }

    /// Text of `ids`, without control tokens where `skip_special`.
    ///
    /// As Hugging Face's `decode` with `clean_up_tokenization_spaces=False`, but for one thing: where bytes of a
    /// SentencePiece vocabulary are not UTF-8, only the bytes at fault become U+FFFD, as in SentencePiece itself, not
    /// all bytes of the run. Ids of the model's padding contribute nothing; an id outside the vocabulary is an error.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        let mut assembler = Assembler::new(self, Options { skip_special, continues: false });
        let mut text = String::new();
        for &id in ids {
            assembler.push(self, id, &mut text)?;
        }
        assembler.finish(self, &mut text);
        Ok(text)
    }

    /// An incremental [`Tokenizer::decode`]; [`TextStream::continuing`] is the one for generated tokens.
    pub fn stream(&self, skip_special: bool) -> TextStream<&Tokenizer> {
        TextStream::new(self, skip_special)
    }

    /// One more than the highest token id; the model's vocabulary once [`Tokenizer::match_vocabulary`] has seen it.
    pub fn vocabulary(&self) -> usize {
        self.limit as usize
    }

    /// The token as the vocabulary writes it (`Ġthe`, `▁the`, `<0x0A>`); `None` where there is no such token.
    pub fn token_text(&self, id: u32) -> Option<String> {
        self.encoder.id_to_token(id)
    }

    /// The bytes that the token stands for in text; `None` where there is no such token.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        self.pieces.get(id).map(|piece| piece.bytes)
    }

    /// The id of the token that the vocabulary writes as `text`.
    pub fn token_id(&self, text: &str) -> Option<u32> {
        self.encoder.token_to_id(text)
    }

    /// Whether `id` is a control token.
    pub fn is_special(&self, id: u32) -> bool {
        self.pieces.get(id).is_some_and(|piece| piece.special)
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.special.bos
    }

    /// The token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.special.eos
    }

    /// All tokens that end generation, in ascending order: EOS, and the ends of a turn that the checkpoint names.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.special.stop
    }

    /// The checkpoint's chat templates, usually none or one named `default`.
    pub fn chat_templates(&self) -> &[NamedTemplate] {
        &self.chat_templates
    }

    /// The file that errors name.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The entry of `id`: `None` for padding, an error outside the vocabulary.
    fn piece(&self, id: u32) -> Result<Option<Piece<'_>>> {
        if id >= self.limit {
            return Err(Error::invalid_argument(format!(
                "token id {id} is outside the vocabulary of {} tokens",
                self.limit
            )));
        }
        Ok(self.pieces.get(id))
    }
}

/// Runs `action`, which calls into libraries with what a file said, and turns a panic into an error.
///
/// The libraries check what they read, but not everywhere: a BPE prefix longer than a token, for one, is sliced
/// without a look.
fn guard<T>(file: &Path, doing: &str, action: impl FnOnce() -> Result<T>) -> Result<T> {
    // Nothing that `action` may leave half done is used after an error.
    catch_unwind(AssertUnwindSafe(action)).unwrap_or_else(|panic| {
        let cause = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let cause = cause.unwrap_or("no message").lines().next().unwrap_or_default();
        Err(Error::invalid_format(file, format!("cannot {doing}: the tokenizer library panicked: {cause}")))
    })
}

/// What the post-processor of `encoder` puts around a text.
fn around(encoder: &tokenizers::Tokenizer, file: &Path) -> Result<(Vec<u32>, Vec<u32>)> {
    // A token that no vocabulary has stands for the text.
    let text = u32::MAX;
    let encoding = tokenizers::Encoding::from_tokens(vec![Token::new(text, String::new(), (0, 0))], 0);
    let whole = encoder
        .post_process(encoding, None, true)
        .map_err(|error| Error::invalid_format(file, format!("post_processor: {error}")))?;
    let ids = whole.get_ids();
    match ids.iter().position(|&id| id == text) {
        Some(at) if !ids[at + 1..].contains(&text) => Ok((ids[..at].to_vec(), ids[at + 1..].to_vec())),
        _ => Err(Error::invalid_format(file, "post_processor: its template does not contain the text exactly once")),
    }
}
