//! Named shapes for benchmarks with random weights, as their papers and checkpoints give them.

use super::{Architecture, Config, Opt};
use crate::backend::{Activation, DType};
use crate::model::rope::{Rope, Scaling};
use crate::{Error, Result};

/// The names that [`Config::shape`] knows.
pub const SHAPES: [&str; 7] =
    ["opt-6.7b", "opt-13b", "opt-30b", "llama-2-7b", "llama-2-13b", "llama-3-8b", "smollm2-135m"];

/// Longest text of a shape whose positions rotate.
const LONGEST: usize = 1 << 18;

impl Config {
    /// The configuration of a well-known model, by name.
    pub fn shape(name: &str) -> Result<Config> {
        let config = match name {
            "opt-6.7b" => opt(32, 4096, 32),
            "opt-13b" => opt(40, 5120, 40),
            "opt-30b" => opt(48, 7168, 56),
            "llama-2-7b" => llama(32, 4096, (32, 32), 11008, 32000, 4096, 10_000.0),
            "llama-2-13b" => llama(40, 5120, (40, 40), 13824, 32000, 4096, 10_000.0),
            "llama-3-8b" => llama(32, 4096, (32, 8), 14336, 128_256, 8192, 500_000.0),
            "smollm2-135m" => Config { tied: true, ..llama(30, 576, (9, 3), 1536, 49152, 8192, 100_000.0) },
            _ => {
                return Err(Error::invalid_argument(format!(
                    "unknown shape {name:?}; known are {}",
                    SHAPES.join(", ")
                )));
            }
        };
        // Positions that rotate have no end, and random weights were trained at no length.
        let context_length = if config.rope.is_some() { LONGEST } else { config.context_length };
        Config { context_length, ..config }.validate(name)
    }
}

fn opt(layers: usize, hidden: usize, heads: usize) -> Config {
    Config {
        architecture: Architecture::Opt,
        layers,
        hidden,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        intermediate: 4 * hidden,
        vocabulary: 50272,
        context_length: 2048,
        norm_epsilon: 1e-5,
        activation: Activation::Relu,
        rope: None,
        tied: true,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        windows: vec![None; layers],
        bos: Some(2),
        eos: vec![2],
        stored: Some(DType::F16),
        opt: Some(Opt { pre_norm: true, embedding: hidden, affine: true, final_norm: true }),
    }
}

fn llama(
    layers: usize,
    hidden: usize,
    (heads, kv_heads): (usize, usize),
    intermediate: usize,
    vocabulary: usize,
    context_length: usize,
    theta: f64,
) -> Config {
    Config {
        architecture: Architecture::Llama,
        layers,
        hidden,
        heads,
        kv_heads,
        head_dim: hidden / heads,
        intermediate,
        vocabulary,
        context_length,
        norm_epsilon: 1e-5,
        activation: Activation::SiluGated,
        rope: Some(Rope { theta, dims: hidden / heads, scaling: Scaling::None }),
        tied: false,
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        windows: vec![None; layers],
        bos: Some(1),
        eos: vec![2],
        stored: Some(DType::BF16),
        opt: None,
    }
}
