//! The tokenizer of a Hugging Face folder.
//!
//! | file | what is taken from it |
//! |---|---|
//! | `tokenizer.json` | vocabulary, merges, normalizer, pre-tokenizer, post-processor, decoder, added tokens |
//! | `vocab.json` + `merges.txt` | where there is no `tokenizer.json` (OPT): byte-level BPE as in GPT-2 |
//! | `tokenizer_config.json` | BOS, EOS, `add_bos_token`, `add_eos_token`, `added_tokens_decoder`, `chat_template` |
//! | `special_tokens_map.json` | BOS and EOS where `tokenizer_config.json` has none |
//! | `chat_template.jinja`, `chat_template.json` | the chat template; the first wins over `tokenizer_config.json` |
//! | `generation_config.json`, `config.json` | further tokens that end generation |

use std::fs;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{
    AddedToken, DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
};

use super::{NamedTemplate, SpecialTokens, Tokenizer, around, guard};
use crate::{Error, Result};

/// Files larger than this are refused unread; the largest in use have 40 MB.
const MAX_BYTES: u64 = 1 << 30;

impl Tokenizer {
    /// Reads the tokenizer of the checkpoint in `folder`.
    pub fn from_folder(folder: &Path) -> Result<Tokenizer> {
        let config_file = folder.join("tokenizer_config.json");
        let config = Config { values: read_json(&config_file)?.unwrap_or(Value::Null), file: &config_file };
        let special_map = read_json(&folder.join("special_tokens_map.json"))?.unwrap_or(Value::Null);

        let file = folder.join("tokenizer.json");
        let vocab = folder.join("vocab.json");
        let (file, mut encoder, from_vocab) = match read(&file)? {
            Some(text) => {
                let encoder = guard(&file, "read it", || parse(&text, &file))?;
                (file, encoder, false)
            }
            None => match (read(&vocab)?, read(&folder.join("merges.txt"))?) {
                (Some(words), Some(merges)) => {
                    let encoder = guard(&vocab, "read it", || byte_level_bpe(&words, &merges, &vocab))?;
                    (vocab, encoder, true)
                }
                _ => {
                    return Err(Error::new(
                        crate::ErrorCode::NotFound,
                        format!(
                            "{}: not there, and no vocab.json with merges.txt either; a tokenizer.model alone is not \
                             read: save the tokenizer with Hugging Face's fast tokenizers first",
                            file.display()
                        ),
                    ));
                }
            },
        };

        let named = |key: &str| config.token(key).or_else(|| token_content(&special_map[key]));
        guard(&file, "add its tokens", || {
            config.add_tokens(&mut encoder)?;
            if from_vocab {
                let tokens = ["bos_token", "eos_token", "unk_token", "pad_token"].map(named);
                let tokens: Vec<_> =
                    tokens.into_iter().flatten().map(|content| AddedToken::from(content, true)).collect();
                encoder.add_special_tokens(&tokens);
            }
            Ok(())
        })?;

        let id_of = |key: &str| -> Result<Option<u32>> {
            let Some(token) = named(key) else { return Ok(None) };
            match encoder.token_to_id(&token) {
                Some(id) => Ok(Some(id)),
                None => Err(Error::invalid_format(
                    &config_file,
                    format!("{key} is {token:?}, which is not in the vocabulary of {}", file.display()),
                )),
            }
        };
        let (bos, eos) = (id_of("bos_token")?, id_of("eos_token")?);
        let (prefix, suffix) = guard(&file, "run its post_processor", || config.around(&encoder, bos, eos, &file))?;
        let stop = stop_tokens(folder)?;
        let templates = chat_templates(folder, &config)?;
        Tokenizer::assemble(file, encoder, SpecialTokens { bos, eos, stop, prefix, suffix }, templates)
    }
}

/// `tokenizer.json`, with the model left for the type that fits it.
#[derive(Deserialize)]
struct TokenizerJson<'a> {
    #[serde(default)]
    version: Option<String>,
    #[serde(default)]
    added_tokens: Vec<AddedTokenJson>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
    #[serde(borrow)]
    model: &'a RawValue,
}

#[derive(Deserialize)]
struct AddedTokenJson {
    id: u32,
    #[serde(flatten)]
    token: AddedToken,
}

/// Reads `tokenizer.json`.
///
/// The crate's own reader builds a tree of the whole model first; reading a BPE model straight into its type takes two
/// thirds of the time. Truncation and padding, which are for training, are left out, and so is dropout.
fn parse(text: &str, file: &Path) -> Result<tokenizers::Tokenizer> {
    let invalid = |part: &str, error: &dyn std::fmt::Display| Error::invalid_format(file, format!("{part}: {error}"));
    let json: TokenizerJson<'_> =
        serde_json::from_str(text).map_err(|error| Error::invalid_format(file, error.to_string()))?;
    if let Some(version) = json.version.filter(|version| version != "1.0") {
        return Err(Error::unsupported(format!("{}: version {version:?}; expected \"1.0\"", file.display())));
    }

    let mut encoder = tokenizers::Tokenizer::new(model(json.model, file)?);
    let normalizer: Option<NormalizerWrapper> =
        serde_json::from_value(json.normalizer).map_err(|error| invalid("normalizer", &error))?;
    encoder.with_normalizer(normalizer);
    let splitter: Option<PreTokenizerWrapper> =
        serde_json::from_value(json.pre_tokenizer).map_err(|error| invalid("pre_tokenizer", &error))?;
    encoder.with_pre_tokenizer(splitter);
    let post: Option<PostProcessorWrapper> =
        serde_json::from_value(json.post_processor).map_err(|error| invalid("post_processor", &error))?;
    encoder.with_post_processor(post);
    let decoder: Option<DecoderWrapper> =
        serde_json::from_value(json.decoder).map_err(|error| invalid("decoder", &error))?;
    encoder.with_decoder(decoder);

    // The library takes the ids of added tokens from the model or counts them on, whatever the file says.
    let tokens: Vec<AddedToken> = json.added_tokens.iter().map(|entry| entry.token.clone()).collect();
    encoder.add_tokens(&tokens);
    for AddedTokenJson { id, token } in &json.added_tokens {
        let real = encoder.token_to_id(&token.content);
        if real != Some(*id) && !token.content.is_empty() {
            let real = real.map_or("none".to_string(), |real| real.to_string());
            let message = format!("token {:?} has the id {id}; the vocabulary makes it {real}", token.content);
            return Err(invalid("added_tokens", &message));
        }
    }
    Ok(encoder)
}

/// The model, of whatever type.
fn model(json: &RawValue, file: &Path) -> Result<ModelWrapper> {
    #[derive(Deserialize)]
    struct Kind<'a> {
        #[serde(rename = "type", default, borrow)]
        kind: Option<std::borrow::Cow<'a, str>>,
    }
    let invalid = |error: serde_json::Error| Error::invalid_format(file, format!("model: {error}"));
    let kind: Kind<'_> = serde_json::from_str(json.get()).map_err(invalid)?;
    if kind.kind.as_deref() != Some("BPE") {
        let tree: Value = serde_json::from_str(json.get()).map_err(invalid)?;
        return serde_json::from_value(tree).map_err(invalid);
    }
    let mut bpe: BPE = serde_json::from_str(json.get()).map_err(invalid)?;
    bpe.dropout = None;
    Ok(bpe.into())
}

/// GPT-2's tokenizer from its two files.
fn byte_level_bpe(words: &str, merges: &str, file: &Path) -> Result<tokenizers::Tokenizer> {
    let invalid = |error: &dyn std::fmt::Display| Error::invalid_format(file, error.to_string());
    let words: std::collections::HashMap<String, u32> = serde_json::from_str(words).map_err(|error| invalid(&error))?;
    let merges = merges.lines().filter(|line| !line.starts_with("#version") && !line.is_empty()).map(|line| {
        let (left, right) = line
            .split_once(' ')
            .ok_or_else(|| invalid(&format!("merges.txt: the line {line:?} is not two tokens and a space")))?;
        Ok((left.to_string(), right.to_string()))
    });
    let bpe = BPE::builder()
        .vocab_and_merges(words.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges.collect::<Result<_>>()?)
        .build()
        .map_err(|error| invalid(&error))?;
    let mut encoder = tokenizers::Tokenizer::new(bpe);
    encoder.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    encoder.with_decoder(Some(ByteLevel::new(true, true, true)));
    Ok(encoder)
}

/// `tokenizer_config.json`; `Null` where there is none.
struct Config<'a> {
    values: Value,
    file: &'a Path,
}

impl Config<'_> {
    /// The text of the token under `key`.
    fn token(&self, key: &str) -> Option<String> {
        token_content(&self.values[key])
    }

    /// Adds the tokens of `added_tokens_decoder` that `tokenizer.json` does not have.
    fn add_tokens(&self, encoder: &mut tokenizers::Tokenizer) -> Result<()> {
        let Some(entries) = self.values["added_tokens_decoder"].as_object() else { return Ok(()) };
        let mut tokens = Vec::new();
        for (id, token) in entries {
            let invalid = |message: &dyn std::fmt::Display| {
                Error::invalid_format(self.file, format!("added_tokens_decoder, entry {id:?}: {message}"))
            };
            let id: u32 = id.parse().map_err(|error| invalid(&error))?;
            let token: AddedToken = serde_json::from_value(token.clone()).map_err(|error| invalid(&error))?;
            tokens.push((id, token));
        }
        tokens.sort_by_key(|&(id, _)| id);
        let known = encoder.get_added_tokens_decoder();
        let new: Vec<_> = tokens.into_iter().filter(|(id, token)| known.get(id) != Some(token)).collect();
        if new.is_empty() {
            return Ok(());
        }
        let contents: Vec<_> = new.iter().map(|(_, token)| token.clone()).collect();
        encoder.add_tokens(&contents);
        for (id, token) in new {
            if encoder.token_to_id(&token.content) != Some(id) {
                return Err(Error::invalid_format(
                    self.file,
                    format!("added_tokens_decoder: token {:?} cannot have the id {id}", token.content),
                ));
            }
        }
        Ok(())
    }

    /// What goes around a text.
    ///
    /// `tokenizer.json` says it by its post-processor. The Llama and Gemma classes of Hugging Face overwrite that with
    /// `add_bos_token` (on unless said otherwise) and `add_eos_token`; and where there is no such post-processor, the
    /// two flags are all there is.
    fn around(
        &self,
        encoder: &tokenizers::Tokenizer,
        bos: Option<u32>,
        eos: Option<u32>,
        file: &Path,
    ) -> Result<(Vec<u32>, Vec<u32>)> {
        let class = self.values["tokenizer_class"].as_str().unwrap_or_default();
        let class = class.strip_suffix("Fast").unwrap_or(class);
        let rewrites = ["LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"].contains(&class);
        if !rewrites && encoder.get_post_processor().is_some_and(adds_tokens) {
            return around(encoder, file);
        }
        let flag = |key: &str, default: bool| self.values[key].as_bool().unwrap_or(default);
        let prefix = bos.filter(|_| flag("add_bos_token", rewrites));
        let suffix = eos.filter(|_| flag("add_eos_token", false));
        Ok((prefix.into_iter().collect(), suffix.into_iter().collect()))
    }
}

/// Whether a post-processor says which tokens go around a text (and not only what offsets are).
fn adds_tokens(post: &PostProcessorWrapper) -> bool {
    match post {
        PostProcessorWrapper::ByteLevel(_) => false,
        PostProcessorWrapper::Sequence(sequence) => sequence.as_ref().iter().any(adds_tokens),
        _ => true,
    }
}

/// A token as configuration files write it: its text, or an object with it.
fn token_content(value: &Value) -> Option<String> {
    value.as_str().or_else(|| value["content"].as_str()).map(str::to_string)
}

/// `eos_token_id` of `generation_config.json`, or else of `config.json`: a number, a list, or nothing.
fn stop_tokens(folder: &Path) -> Result<Vec<u32>> {
    for name in ["generation_config.json", "config.json"] {
        let file = folder.join(name);
        let Some(config) = read_json(&file)? else { continue };
        let ids = match &config["eos_token_id"] {
            Value::Null => continue,
            Value::Array(ids) => ids.as_slice(),
            id => std::slice::from_ref(id),
        };
        let ids = ids.iter().map(|id| {
            id.as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| Error::invalid_format(&file, format!("eos_token_id: expected token ids, found {id}")))
        });
        return ids.collect();
    }
    Ok(Vec::new())
}

/// The chat templates, from wherever they are.
fn chat_templates(folder: &Path, config: &Config<'_>) -> Result<Vec<NamedTemplate>> {
    let unnamed = |source: String| vec![NamedTemplate { name: "default".into(), source }];
    if let Some(source) = read(&folder.join("chat_template.jinja"))? {
        return Ok(unnamed(source));
    }
    let file = folder.join("chat_template.json");
    let (value, file) = match &config.values["chat_template"] {
        Value::Null => match read_json(&file)? {
            Some(json) => (json["chat_template"].clone(), file.as_path()),
            None => return Ok(Vec::new()),
        },
        value => (value.clone(), config.file),
    };
    let invalid =
        || Error::invalid_format(file, "chat_template: expected a string, or a list of objects with name and template");
    match value {
        Value::Null => Ok(Vec::new()),
        Value::String(source) => Ok(unnamed(source)),
        Value::Array(entries) => {
            let entry = |entry: &Value| {
                let name = entry["name"].as_str().ok_or_else(invalid)?.to_string();
                let source = entry["template"].as_str().ok_or_else(invalid)?.to_string();
                Ok(NamedTemplate { name, source })
            };
            entries.iter().map(entry).collect()
        }
        _ => Err(invalid()),
    }
}

/// The text of a file, `None` where there is none.
fn read(file: &Path) -> Result<Option<String>> {
    let metadata = match fs::metadata(file) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(file, "read it", &error)),
    };
    if !metadata.is_file() {
        return Err(Error::invalid_format(file, "not a regular file"));
    }
    if metadata.len() > MAX_BYTES {
        return Err(Error::invalid_format(file, format!("{} bytes; expected at most {MAX_BYTES}", metadata.len())));
    }
    match fs::read(file) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(error) => {
                Err(Error::invalid_format(file, format!("not UTF-8 at byte {}", error.utf8_error().valid_up_to())))
            }
        },
        Err(error) => Err(Error::io(file, "read it", &error)),
    }
}

/// The JSON of a file, `None` where there is none.
fn read_json(file: &Path) -> Result<Option<Value>> {
    let Some(text) = read(file)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|error| Error::invalid_format(file, error.to_string()))
}
