//! Phi-3 (Abdin et al. 2024): Llama with its projections stored fused, which is how they run here anyway.

use super::{Layer, llama};
use crate::Result;
use crate::model::config::Config;
use crate::model::decoder::{Attention, Mlp};
use crate::model::weights::Weights;

/// Grouped-query attention from one stack of q, k and v.
pub(super) fn attention(config: &Config, weights: &mut Weights<'_>, layer: &Layer) -> Result<Attention> {
    // Some GGUF files have been split into three.
    if weights.has(&layer.name("self_attn.q_proj.weight")) {
        return llama::attention(config, weights, layer);
    }
    let queries = config.heads * config.head_dim;
    let keys = config.kv_heads * config.head_dim;
    let qkv = layer.name("self_attn.qkv_proj");
    Ok(Attention {
        qkv: weights.linear(&qkv, queries + 2 * keys, config.hidden, config.qkv_bias)?,
        query_norm: None,
        key_norm: None,
        output: weights.linear(&layer.name("self_attn.o_proj"), config.hidden, queries, config.output_bias)?,
        window: config.windows[layer.index],
    })
}

/// As Llama's, with gate and up in one stack.
pub(super) fn mlp(config: &Config, weights: &mut Weights<'_>, layer: &Layer) -> Result<Mlp> {
    if weights.has(&layer.name("mlp.gate_proj.weight")) {
        return llama::mlp(config, weights, layer);
    }
    let gate_up = layer.name("mlp.gate_up_proj");
    Ok(Mlp {
        up: weights.linear(&gate_up, 2 * config.intermediate, config.hidden, config.mlp_bias)?,
        activation: config.activation,
        down: weights.linear(&layer.name("mlp.down_proj"), config.hidden, config.intermediate, config.mlp_bias)?,
    })
}
