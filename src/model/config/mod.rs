//! What a checkpoint says about itself: dimensions, positions, activation, special tokens.
//!
//! One [`Config`] for every source: a Hugging Face `config.json` (`huggingface.rs`), the metadata of a GGUF file
//! (`gguf.rs`), or a named shape for benchmarks (`shapes.rs`). Whatever the source, [`Config::validate`] has seen it
//! before anyone multiplies two of its numbers.

mod gguf;
mod huggingface;
mod shapes;

use std::fmt;

use crate::backend::{Activation, DType};
use crate::model::rope::Rope;
use crate::{Error, Result};

pub use gguf::{from_gguf, generation_from_gguf};
pub use huggingface::{from_json, generation_from_json};
pub use shapes::SHAPES;

/// The families of models that can be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 1 to 3.x, SmolLM and SmolLM2 (Touvron et al. 2023).
    Llama,
    /// Mistral 7B (Jiang et al. 2023): Llama with a sliding window.
    Mistral,
    /// Qwen2 and 2.5: Llama with biases on q, k and v.
    Qwen2,
    /// Qwen3: Llama with a norm on each head of q and k.
    Qwen3,
    /// Phi-3, 3.5 and 4-mini: Llama with fused projections, and LongRoPE for long contexts.
    Phi3,
    /// OPT (Zhang et al. 2022): learned positions, LayerNorm, biases.
    Opt,
}

impl Architecture {
    /// Every architecture.
    pub const ALL: [Architecture; 6] = [
        Architecture::Llama,
        Architecture::Mistral,
        Architecture::Qwen2,
        Architecture::Qwen3,
        Architecture::Phi3,
        Architecture::Opt,
    ];

    /// Its name in `config.json` (`model_type`) and GGUF (`general.architecture`).
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Mistral => "mistral",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen3 => "qwen3",
            Architecture::Phi3 => "phi3",
            Architecture::Opt => "opt",
        }
    }

    /// The architecture of this name.
    pub fn from_name(name: &str) -> Option<Architecture> {
        Architecture::ALL.into_iter().find(|architecture| architecture.name() == name)
    }

    /// All names, for messages.
    fn list() -> String {
        Architecture::ALL.map(Architecture::name).join(", ")
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A model's configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Family.
    pub architecture: Architecture,
    /// Number of blocks, L.
    pub layers: usize,
    /// Width of the residual stream, D.
    pub hidden: usize,
    /// Query heads, H.
    pub heads: usize,
    /// KV heads, G; H is a multiple of G.
    pub kv_heads: usize,
    /// Head dimension, d; not always D/H.
    pub head_dim: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Rows of the embedding; a tokenizer may have fewer tokens.
    pub vocabulary: usize,
    /// Positions that the model was made for.
    pub context_length: usize,
    /// Added to the mean square or variance by norms.
    pub norm_epsilon: f32,
    /// Non-linearity of the MLP.
    pub activation: Activation,
    /// Rotary embedding; `None` where positions are learned.
    pub rope: Option<Rope>,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Biases on the projections to q, k and v.
    pub qkv_bias: bool,
    /// Bias on the attention's output projection.
    pub output_bias: bool,
    /// Biases in the MLP.
    pub mlp_bias: bool,
    /// Sliding window of each layer.
    pub windows: Vec<Option<usize>>,
    /// Token that texts begin with.
    pub bos: Option<u32>,
    /// Tokens that texts end with.
    pub eos: Vec<u32>,
    /// Element type that the checkpoint says its weights have.
    pub stored: Option<DType>,
    /// What only OPT has.
    pub opt: Option<Opt>,
}

/// The choices among OPT checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opt {
    /// Norms before attention and MLP, as in all but OPT-350m.
    pub pre_norm: bool,
    /// Width of the embedding; 512 in OPT-350m, whose hidden width is 1024.
    pub embedding: usize,
    /// Whether norms have weights and biases.
    pub affine: bool,
    /// Whether a norm stands before the head.
    pub final_norm: bool,
}

/// How a checkpoint's makers sample from it (`generation_config.json`).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Sample, rather than take the likeliest token.
    pub do_sample: bool,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Sample among the likeliest tokens that together have this probability.
    pub top_p: Option<f32>,
    /// Sample among this many of the likeliest tokens.
    pub top_k: Option<u32>,
    /// Sample among tokens at least this probable relative to the likeliest.
    pub min_p: Option<f32>,
    /// Divides (multiplies, if negative) the logits of tokens that have occurred.
    pub repetition_penalty: Option<f32>,
    /// Tokens that texts end with: this file's where it names any, else the configuration's.
    pub eos: Vec<u32>,
}

/// The largest dimensions that are believed. Every product of two of them, and of three with an element size, stays
/// far below 2^63; all models in sight are ten times smaller.
const LIMITS: Limits = Limits {
    layers: 1 << 12,
    width: 1 << 20,
    heads: 1 << 12,
    head_dim: 1 << 12,
    vocabulary: 1 << 24,
    positions: 1 << 28,
};

struct Limits {
    layers: usize,
    width: usize,
    heads: usize,
    head_dim: usize,
    vocabulary: usize,
    positions: usize,
}

impl Config {
    /// Factor on q·k.
    pub fn attention_scale(&self) -> f32 {
        (self.head_dim as f64).powf(-0.5) as f32
    }

    /// Checks every dimension against [`LIMITS`] and against the others; `origin` is named in the error.
    fn validate(self, origin: &str) -> Result<Config> {
        let absurd = |what: &str, value: usize, least: usize, most: usize| {
            let message = format!("{origin}: {what} is {value}; expected {least} to {most}");
            if (least..=most).contains(&value) {
                Ok(())
            } else {
                Err(Error::new(crate::ErrorCode::InvalidFormat, message))
            }
        };
        let wrong = |message: String| Err(Error::new(crate::ErrorCode::InvalidFormat, format!("{origin}: {message}")));
        absurd("the number of layers", self.layers, 1, LIMITS.layers)?;
        absurd("the hidden size", self.hidden, 1, LIMITS.width)?;
        absurd("the intermediate size", self.intermediate, 1, LIMITS.width)?;
        absurd("the number of attention heads", self.heads, 1, LIMITS.heads)?;
        absurd("the number of KV heads", self.kv_heads, 1, self.heads)?;
        absurd("the head dimension", self.head_dim, 1, LIMITS.head_dim)?;
        absurd("the vocabulary size", self.vocabulary, 1, LIMITS.vocabulary)?;
        absurd("the context length", self.context_length, 1, LIMITS.positions)?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            return wrong(format!("{} attention heads are no multiple of {} KV heads", self.heads, self.kv_heads));
        }
        if !(self.norm_epsilon.is_finite() && self.norm_epsilon >= 0.0) {
            return wrong(format!("the norm epsilon is {}; expected a small positive number", self.norm_epsilon));
        }
        if let Some(window) = self.windows.iter().flatten().find(|&&window| window == 0 || window > LIMITS.positions) {
            return wrong(format!("the sliding window is {window}; expected 1 to {}", LIMITS.positions));
        }
        if let Some(token) = self.bos.iter().chain(&self.eos).find(|&&token| token as usize >= self.vocabulary) {
            return wrong(format!("the special token {token} is not below the vocabulary size, {}", self.vocabulary));
        }
        if let Some(opt) = &self.opt {
            absurd("the embedding width", opt.embedding, 1, LIMITS.width)?;
        }
        if let Some(rope) = &self.rope {
            rope.validate(self.head_dim).map_err(|error| error.within(origin))?;
        }
        assert_eq!(self.windows.len(), self.layers, "one window a layer");
        Ok(self)
    }
}
