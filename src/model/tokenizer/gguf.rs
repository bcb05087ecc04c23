//! The tokenizer of a GGUF file.
//!
//! GGUF keeps a vocabulary, not a tokenizer: `tokenizer.ggml.model` names the algorithm and `tokenizer.ggml.pre` the
//! way in which text is cut into words first; the rest is convention, here built as the Hugging Face tokenizer that the
//! file was made from.
//!
//! | `model` | algorithm |
//! |---|---|
//! | `gpt2` | byte-level BPE with `tokenizer.ggml.merges`, words cut as `pre` says |
//! | `llama` | SentencePiece BPE: `▁` for space, byte fallback; merges follow from the pieces' scores |

use std::collections::HashMap;
use std::path::Path;

use tokenizers::AddedToken;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::unicode::NFC;
use tokenizers::normalizers::utils::Sequence as Normalizers;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence as Splitters;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior::Isolated;
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper};

use super::{NamedTemplate, SpecialTokens, Tokenizer, guard};
use crate::model::checkpoint::gguf::Metadata;
use crate::{Error, Result};

/// `tokenizer.ggml.token_type`, where it matters.
mod kind {
    pub const UNKNOWN: u64 = 2;
    pub const CONTROL: u64 = 3;
    pub const USER_DEFINED: u64 = 4;
    pub const UNUSED: u64 = 5;
}

/// Control tokens that end a turn in the chat formats of the families read here. A GGUF file names one EOS; converters
/// do not agree on which.
const TURN_ENDS: [&str; 6] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"];

impl Tokenizer {
    /// Builds the tokenizer that `metadata` describes.
    pub fn from_gguf(metadata: &Metadata) -> Result<Tokenizer> {
        let file = metadata.file();
        let vocabulary = Vocabulary::read(metadata)?;
        let model: &str = metadata.require("tokenizer.ggml.model")?;
        let (mut encoder, defaults) = guard(file, "build its tokenizer", || match model {
            "gpt2" => byte_level(metadata, &vocabulary),
            "llama" => sentence_piece(metadata, &vocabulary),
            other => Err(Error::unsupported(format!(
                "{}: tokenizer.ggml.model is {other:?}; supported are \"gpt2\" and \"llama\"",
                file.display()
            ))),
        })?;
        guard(file, "add its tokens", || {
            encoder.add_tokens(&vocabulary.added(swallows_space(metadata)?));
            Ok(())
        })?;

        let id = |key: &str| -> Result<Option<u32>> {
            let id = metadata.get::<u32>(key)?;
            match id {
                Some(id) if id as usize >= vocabulary.tokens.len() => {
                    Err(metadata.invalid(key, format!("{id} is outside the vocabulary of {}", vocabulary.tokens.len())))
                }
                id => Ok(id),
            }
        };
        let bos = id("tokenizer.ggml.bos_token_id")?;
        let eos = id("tokenizer.ggml.eos_token_id")?;
        let flag = |key: &str, default: bool| metadata.get(key).map(|flag| flag.unwrap_or(default));
        let prefix = bos.filter(|_| defaults.add_bos);
        let suffix = eos.filter(|_| defaults.add_eos);
        let prefix = if flag("tokenizer.ggml.add_bos_token", prefix.is_some())? { bos } else { None };
        let suffix = if flag("tokenizer.ggml.add_eos_token", suffix.is_some())? { eos } else { None };

        let mut stop = Vec::new();
        for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
            stop.extend(id(key)?);
        }
        stop.extend(vocabulary.controls().filter(|(_, text)| TURN_ENDS.contains(text)).map(|(id, _)| id));

        let mut templates = Vec::new();
        if let Some(source) = metadata.get::<&str>("tokenizer.chat_template")? {
            templates.push(NamedTemplate { name: "default".into(), source: source.into() });
        }
        for name in metadata.get::<&[String]>("tokenizer.chat_templates")?.unwrap_or_default() {
            let source: &str = metadata.require(&format!("tokenizer.chat_template.{name}"))?;
            templates.push(NamedTemplate { name: name.clone(), source: source.into() });
        }

        let special = SpecialTokens {
            bos,
            eos,
            stop,
            prefix: prefix.into_iter().collect(),
            suffix: suffix.into_iter().collect(),
        };
        Tokenizer::assemble(file.to_path_buf(), encoder, special, templates)
    }
}

/// What holds where the file has no flags of its own.
struct Defaults {
    add_bos: bool,
    add_eos: bool,
}

/// The vocabulary as the file has it.
struct Vocabulary<'a> {
    tokens: &'a [String],
    kinds: Vec<u64>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &'a Metadata) -> Result<Vocabulary<'a>> {
        let tokens: &[String] = metadata.require("tokenizer.ggml.tokens")?;
        let limit = super::pieces::MAX_VOCABULARY;
        if tokens.is_empty() || tokens.len() > limit as usize {
            let message = format!("{} tokens; expected 1 to {limit}", tokens.len());
            return Err(metadata.invalid("tokenizer.ggml.tokens", message));
        }
        let key = "tokenizer.ggml.token_type";
        let kinds = metadata.get::<Vec<u64>>(key)?.unwrap_or_default();
        if !kinds.is_empty() && kinds.len() != tokens.len() {
            return Err(metadata.invalid(key, format!("{} entries for {} tokens", kinds.len(), tokens.len())));
        }
        Ok(Vocabulary { tokens, kinds })
    }

    fn kind(&self, id: usize) -> u64 {
        self.kinds.get(id).copied().unwrap_or(1)
    }

    /// The padding that converters put where the model has rows and the tokenizer no tokens.
    fn is_padding(&self, id: usize) -> bool {
        self.kind(id) == kind::UNUSED && self.tokens[id] == format!("[PAD{id}]")
    }

    fn ids(&self) -> Vocab {
        let ids = (0..self.tokens.len()).filter(|&id| !self.is_padding(id));
        ids.map(|id| (self.tokens[id].clone(), id as u32)).collect()
    }

    fn controls(&self) -> impl Iterator<Item = (u32, &str)> {
        let ids = (0..self.tokens.len()).filter(|&id| matches!(self.kind(id), kind::CONTROL | kind::UNKNOWN));
        ids.map(|id| (id as u32, self.tokens[id].as_str()))
    }

    /// Tokens that are found in text before it is cut into words; the control tokens of a turn with the white space
    /// after them, where `swallow_space`.
    fn added(&self, swallow_space: bool) -> Vec<AddedToken> {
        let tokens = self.tokens.iter().enumerate();
        let tokens = tokens.filter_map(|(id, text)| match self.kind(id) {
            kind::CONTROL | kind::UNKNOWN => {
                let swallows = swallow_space && !["<unk>", "<s>", "<|endoftext|>"].contains(&text.as_str());
                Some(AddedToken::from(text.clone(), true).rstrip(swallows))
            }
            kind::USER_DEFINED => Some(AddedToken::from(text.clone(), false).normalized(false)),
            _ => None,
        });
        tokens.collect()
    }
}

/// Whether control tokens take the white space after them with them. GGUF has no place for that property; Phi-3's
/// tokenizer has it, and its chat format writes a line break after each token of a turn.
fn swallows_space(metadata: &Metadata) -> Result<bool> {
    let phi3 = metadata.get::<&str>("general.architecture")? == Some("phi3");
    Ok(phi3 && metadata.get::<&str>("tokenizer.ggml.model")? == Some("llama"))
}

// The patterns are the models' own, as in their tokenizer.json.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `pre` values, with the family's way of cutting words.
const SUPPORTED_PRE: &str = "default, gpt-2, mpt, olmo, jais, smollm, starcoder, refact, codeshell, llama-bpe, llama3, \
                             llama-v3, falcon3, smaug-bpe, dbrx, qwen2, deepseek-r1-qwen, stablelm2, tekken, gpt-4o, llama4";

/// How a family of byte-level BPE tokenizers cuts words.
struct Words {
    /// Patterns, one after the other, each match a word of its own.
    patterns: &'static [&'static str],
    /// Every digit is a word, before the patterns.
    digits: bool,
    /// Unicode normalization form C first.
    nfc: bool,
    /// A word that is a token stays one, whatever the merges say.
    ignore_merges: bool,
    add_bos: bool,
}

impl Words {
    fn of(pre: &str) -> Option<Words> {
        let plain = Words { patterns: &[GPT2], digits: false, nfc: false, ignore_merges: false, add_bos: false };
        Some(match pre {
            // What llama.cpp does with files that do not say; most are older than the key.
            "default" => Words { patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], ..plain },
            "gpt-2" | "mpt" | "olmo" | "jais" => plain,
            "smollm" | "starcoder" | "refact" | "codeshell" => Words { digits: true, ..plain },
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => {
                Words { patterns: &[LLAMA3], ignore_merges: true, add_bos: true, ..plain }
            }
            "smaug-bpe" | "dbrx" => Words { patterns: &[LLAMA3], ..plain },
            "qwen2" => Words { patterns: &[QWEN2], nfc: true, ..plain },
            "deepseek-r1-qwen" | "stablelm2" => Words { patterns: &[QWEN2], ..plain },
            "tekken" => Words { patterns: &[TEKKEN], ignore_merges: true, add_bos: true, ..plain },
            "gpt-4o" | "llama4" => Words { patterns: &[GPT4O], ..plain },
            _ => return None,
        })
    }
}

/// `gpt2`: byte-level BPE.
fn byte_level(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<(tokenizers::Tokenizer, Defaults)> {
    let file = metadata.file();
    let pre = metadata.get::<&str>("tokenizer.ggml.pre")?.unwrap_or("default");
    let words = Words::of(pre).ok_or_else(|| {
        Error::unsupported(format!("{}: tokenizer.ggml.pre is {pre:?}; supported are {SUPPORTED_PRE}", file.display()))
    })?;

    let key = "tokenizer.ggml.merges";
    let merges = metadata.require::<&[String]>(key)?.iter().map(|merge| {
        // A token may begin with a space, in files of old converters.
        let at = merge.char_indices().skip(1).find(|&(_, character)| character == ' ').map(|(at, _)| at);
        let at = at.ok_or_else(|| metadata.invalid(key, format!("{merge:?} is not two tokens and a space")))?;
        Ok((merge[..at].to_string(), merge[at + 1..].to_string()))
    });
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.ids(), merges.collect::<Result<Merges>>()?)
        .ignore_merges(words.ignore_merges)
        .build()
        .map_err(|error| metadata.invalid(key, error))?;

    let mut splitters: Vec<PreTokenizerWrapper> = Vec::new();
    if words.digits {
        splitters.push(Digits::new(true).into());
    }
    for pattern in words.patterns {
        let split = Split::new(SplitPattern::Regex((*pattern).to_string()), Isolated, false);
        splitters.push(split.map_err(|error| library(file, error))?.into());
    }
    splitters.push(ByteLevel::new(false, true, false).into());

    let mut encoder = tokenizers::Tokenizer::new(bpe);
    if words.nfc {
        encoder.with_normalizer(Some(NFC));
    }
    encoder.with_pre_tokenizer(Some(Splitters::new(splitters)));
    encoder.with_decoder(Some(ByteLevel::new(true, true, true)));
    Ok((encoder, Defaults { add_bos: words.add_bos, add_eos: false }))
}

/// `llama`: SentencePiece BPE.
fn sentence_piece(metadata: &Metadata, vocabulary: &Vocabulary<'_>) -> Result<(tokenizers::Tokenizer, Defaults)> {
    let file = metadata.file();
    let key = "tokenizer.ggml.scores";
    let scores: Vec<f32> = metadata.require(key)?;
    if scores.len() != vocabulary.tokens.len() {
        let message = format!("{} scores for {} tokens", scores.len(), vocabulary.tokens.len());
        return Err(metadata.invalid(key, message));
    }
    let mut builder = BPE::builder()
        .vocab_and_merges(vocabulary.ids(), merges_of(vocabulary, &scores))
        .fuse_unk(true)
        .byte_fallback(true);
    if let Some(id) = metadata.get::<u32>("tokenizer.ggml.unknown_token_id")? {
        let Some(text) = vocabulary.tokens.get(id as usize) else {
            let message = format!("{id} is outside the vocabulary of {}", vocabulary.tokens.len());
            return Err(metadata.invalid("tokenizer.ggml.unknown_token_id", message));
        };
        builder = builder.unk_token(text.clone());
    }
    let bpe = builder.build().map_err(|error| library(file, error))?;

    let mark = |from: &str, to: &str| Replace::new(from, to).map_err(|error| library(file, error));
    let prefix = metadata.get("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        normalizers.push(Prepend::new("▁".into()).into());
    }
    normalizers.push(mark(" ", "▁")?.into());
    let mut decoders = vec![mark("▁", " ")?.into(), ByteFallback::new().into(), Fuse::new().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }

    let mut encoder = tokenizers::Tokenizer::new(bpe);
    encoder.with_normalizer(Some(Normalizers::new(normalizers)));
    encoder.with_decoder(Some(Decoders::new(decoders)));
    Ok((encoder, Defaults { add_bos: true, add_eos: false }))
}

/// The merges of a SentencePiece vocabulary: every way to put a piece together from two, the pieces in the order of
/// their scores. The order among the rest is that of transformers' converter, so that both make the same tokens.
fn merges_of(vocabulary: &Vocabulary<'_>, scores: &[f32]) -> Merges {
    struct Merge<'a> {
        score: f32,
        /// Lengths in characters.
        left_length: usize,
        right_length: usize,
        left: &'a str,
        right: &'a str,
    }
    // Nobody trains longer pieces (SentencePiece stops at 16 characters by default), and the work grows with the square.
    const MAX_PIECE: usize = 256;
    let ids: HashMap<&str, usize> = vocabulary.tokens.iter().map(String::as_str).zip(0..).collect();
    let mut merges = Vec::new();
    for (piece, &score) in vocabulary.tokens.iter().zip(scores).filter(|(piece, _)| piece.len() <= MAX_PIECE) {
        let from = merges.len();
        let length = piece.chars().count();
        for (left_length, (at, _)) in piece.char_indices().enumerate().skip(1) {
            let (left, right) = piece.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                merges.push(Merge { score, left_length, right_length: length - left_length, left, right });
            }
        }
        merges[from..].sort_by_key(|merge| (ids[merge.left], ids[merge.right]));
    }
    merges.sort_by(|a, b| {
        let order = b.score.total_cmp(&a.score);
        order.then(b.left_length.cmp(&a.left_length)).then(b.right_length.cmp(&a.right_length))
    });
    merges.into_iter().map(|merge| (merge.left.to_string(), merge.right.to_string())).collect()
}

/// An error of the tokenizer library.
fn library(file: &Path, error: impl std::fmt::Display) -> Error {
    Error::invalid_format(file, format!("cannot build its tokenizer: {error}"))
}
