//! Llama (Touvron et al. 2023), and Mistral (Jiang et al. 2023), which adds a sliding window.

use super::Layer;
use crate::Result;
use crate::model::config::Config;
use crate::model::decoder::{Attention, Mlp};
use crate::model::weights::Weights;

/// Grouped-query attention: H query heads share G key and value heads.
pub(super) fn attention(config: &Config, weights: &mut Weights<'_>, layer: &Layer) -> Result<Attention> {
    let queries = config.heads * config.head_dim;
    let keys = config.kv_heads * config.head_dim;
    let qkv = [
        (layer.name("self_attn.q_proj"), queries),
        (layer.name("self_attn.k_proj"), keys),
        (layer.name("self_attn.v_proj"), keys),
    ];
    Ok(Attention {
        qkv: weights.stacked(&qkv, config.hidden, config.qkv_bias)?,
        query_norm: None,
        key_norm: None,
        output: weights.linear(&layer.name("self_attn.o_proj"), config.hidden, queries, config.output_bias)?,
        window: config.windows[layer.index],
    })
}

/// down(silu(gate(x)) · up(x)) (Shazeer 2020).
pub(super) fn mlp(config: &Config, weights: &mut Weights<'_>, layer: &Layer) -> Result<Mlp> {
    let gate_up =
        [(layer.name("mlp.gate_proj"), config.intermediate), (layer.name("mlp.up_proj"), config.intermediate)];
    Ok(Mlp {
        up: weights.stacked(&gate_up, config.hidden, config.mlp_bias)?,
        activation: config.activation,
        down: weights.linear(&layer.name("mlp.down_proj"), config.hidden, config.intermediate, config.mlp_bias)?,
    })
}
