//! The configuration that a GGUF file holds in its metadata, and, where the format puts it there, in tensors.

use std::collections::BTreeMap;

use super::{Architecture, Config, GenerationDefaults};
use crate::backend::Activation;
use crate::model::checkpoint::Stored;
use crate::model::checkpoint::gguf::{Entry, Metadata};
use crate::model::checkpoint::quant::Encoding;
use crate::model::rope::{Rope, Scaling, Yarn, longrope_attention};
use crate::{Error, Result};

/// The values of a small F32 tensor, which only the file's owner can read.
pub type ReadSmall<'a> = &'a dyn Fn(&str, &Entry) -> Result<Vec<f32>>;

/// Reads metadata and the list of tensors; `read` gives the values of frequency tables.
pub fn from_gguf(metadata: &Metadata, entries: &BTreeMap<String, Entry>, read: ReadSmall<'_>) -> Result<Config> {
    let name: &str = metadata.require("general.architecture")?;
    // Mistral is `llama` here, and OPT does not exist.
    let architecture = match Architecture::from_name(name) {
        Some(Architecture::Opt | Architecture::Mistral) | None => {
            return Err(Error::unsupported(format!(
                "{}: the architecture {name:?} is not supported in GGUF files; known are llama, phi3, qwen2, qwen3",
                metadata.file().display()
            )));
        }
        Some(architecture) => architecture,
    };
    let keys = Keys { metadata, prefix: name };
    if keys.usize("expert_count")?.unwrap_or(0) > 0 {
        return Err(keys.unsupported("mixtures of experts are not supported"));
    }

    let layers = keys.require_usize("block_count")?;
    let hidden = keys.require_usize("embedding_length")?;
    let heads = keys.require_usize("attention.head_count")?;
    let head_dim = match keys.usize("attention.key_length")? {
        Some(length) => length,
        None => hidden.checked_div(heads).unwrap_or(0),
    };
    if let Some(value) = keys.usize("attention.value_length")?.filter(|&value| value != head_dim) {
        return Err(keys.unsupported(format!("keys of {head_dim} dimensions and values of {value}")));
    }
    let context_length = keys.require_usize("context_length")?;
    let embedding = entries
        .get("token_embd.weight")
        .ok_or_else(|| Error::invalid_format(metadata.file(), "the tensor \"token_embd.weight\" is missing"))?;
    let window = keys.usize("attention.sliding_window")?.filter(|&window| window > 0);
    let has = |name: &str| entries.contains_key(name);
    let config = Config {
        architecture,
        layers,
        hidden,
        heads,
        kv_heads: keys.usize("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        intermediate: keys.require_usize("feed_forward_length")?,
        vocabulary: embedding.shape[0],
        context_length,
        norm_epsilon: metadata.require(&keys.key("attention.layer_norm_rms_epsilon"))?,
        activation: Activation::SiluGated,
        rope: Some(rope(&keys, head_dim, context_length, entries, read)?),
        tied: !has("output.weight"),
        // Llama-type files do not say whether there are biases; they have them.
        qkv_bias: architecture == Architecture::Qwen2 || has("blk.0.attn_q.bias") || has("blk.0.attn_qkv.bias"),
        output_bias: has("blk.0.attn_output.bias"),
        mlp_bias: has("blk.0.ffn_up.bias"),
        windows: vec![window; layers.min(super::LIMITS.layers)],
        bos: metadata.get("tokenizer.ggml.bos_token_id")?,
        eos: eos(metadata)?,
        stored: match &embedding.stored {
            Stored::Known(encoding) => encoding.plain(),
            Stored::Other(_) => None,
        },
        opt: None,
    };
    config.validate(&metadata.file().display().to_string())
}

/// What GGUF files say about sampling: where a text ends.
pub fn generation_from_gguf(config: &Config) -> GenerationDefaults {
    GenerationDefaults { eos: config.eos.clone(), ..GenerationDefaults::default() }
}

/// End of text, and end of turn where a chat model has another token for it.
fn eos(metadata: &Metadata) -> Result<Vec<u32>> {
    let mut eos = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        eos.extend(metadata.get::<u32>(key)?);
    }
    eos.dedup();
    Ok(eos)
}

fn rope(
    keys: &Keys<'_>,
    head_dim: usize,
    context_length: usize,
    entries: &BTreeMap<String, Entry>,
    read: ReadSmall<'_>,
) -> Result<Rope> {
    let theta = keys.f64("rope.freq_base")?.unwrap_or(10_000.0);
    let dims = keys.usize("rope.dimension_count")?.unwrap_or(head_dim);
    let original = keys.usize("rope.scaling.original_context_length")?.unwrap_or(context_length);
    if dims > head_dim {
        return Err(keys.metadata.invalid(
            &keys.key("rope.dimension_count"),
            format!("{dims} of {head_dim} head dimensions cannot rotate"),
        ));
    }
    // A table of frequencies, refused before it is read where its size cannot be right.
    let table = |name: &str| -> Result<Option<Vec<f32>>> {
        let Some(entry) = entries.get(name) else { return Ok(None) };
        if entry.stored != Stored::Known(Encoding::F32) || entry.shape != [dims / 2] {
            return Err(Error::invalid_format(
                keys.metadata.file(),
                format!("tensor {name:?}: expected F32 [{}], found {} {:?}", dims / 2, entry.stored, entry.shape),
            ));
        }
        read(name, entry).map(Some)
    };

    if let (Some(short), Some(long)) = (table("rope_factors_short.weight")?, table("rope_factors_long.weight")?) {
        let stretched = longrope_attention(context_length as f64 / original as f64, original as f64);
        let attention = keys.f64("rope.scaling.attn_factor")?.unwrap_or(stretched);
        return Ok(Rope { theta, dims, scaling: Scaling::LongRope { short, long, original, attention } });
    }
    if let Some(divisors) = table("rope_freqs.weight")? {
        return Ok(Rope { theta, dims, scaling: Scaling::Divisors(divisors) });
    }
    let factor = match keys.f64("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.f64("rope.scale_linear")?,
    };
    let scaling = match (keys.metadata.get::<&str>(&keys.key("rope.scaling.type"))?, factor) {
        (None | Some("linear"), Some(factor)) if factor != 0.0 => Scaling::Linear { factor },
        (None | Some("none" | "linear"), _) => Scaling::None,
        (Some("yarn"), Some(factor)) => Scaling::Yarn(Yarn {
            factor,
            original: original as f64,
            beta_fast: keys.f64("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: keys.f64("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            truncate: true,
            attention: keys.f64("rope.scaling.attn_factor")?.unwrap_or(1.0) * Yarn::recommended_attention(factor, 1.0),
        }),
        (Some(other), factor) => {
            return Err(keys.unsupported(format!(
                "rope scaling of type {other:?} with the factor {factor:?}; supported are none, linear, yarn, and \
                 tables of factors"
            )));
        }
    };
    Ok(Rope { theta, dims, scaling })
}

/// The keys of one architecture: `llama.block_count`.
struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: &'a str,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.prefix)
    }

    /// A size; where a file has one for each layer, they must be equal.
    fn usize(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        let value = match self.metadata.get::<u64>(&key) {
            Ok(value) => value,
            Err(error) => {
                let Ok(Some(values)) = self.metadata.get::<Vec<u64>>(&key) else { return Err(error) };
                match values.first() {
                    Some(&first) if values.iter().all(|&value| value == first) => Some(first),
                    _ => return Err(self.unsupported(format!("{key:?} differs from layer to layer"))),
                }
            }
        };
        match value.map(usize::try_from).transpose() {
            Ok(value) => Ok(value),
            Err(_) => Err(self.metadata.invalid(&key, "the value is too large")),
        }
    }

    fn require_usize(&self, name: &str) -> Result<usize> {
        match self.usize(name)? {
            Some(value) => Ok(value),
            None => self.metadata.require::<u64>(&self.key(name)).map(|value| value as usize),
        }
    }

    fn f64(&self, name: &str) -> Result<Option<f64>> {
        self.metadata.get(&self.key(name))
    }

    fn unsupported(&self, message: impl std::fmt::Display) -> Error {
        Error::unsupported(format!("{}: {message}", self.metadata.file().display()))
    }
}
