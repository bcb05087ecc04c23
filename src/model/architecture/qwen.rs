//! Qwen2 and 2.5 (Yang et al. 2024) and Qwen3 (Yang et al. 2025): Llama but for the attention.

use super::{Layer, llama};
use crate::Result;
use crate::model::config::Config;
use crate::model::decoder::Attention;
use crate::model::weights::Weights;

/// Qwen2: q, k and v have biases, which its configuration always asks for.
pub(super) fn attention2(config: &Config, weights: &mut Weights<'_>, layer: &Layer) -> Result<Attention> {
    llama::attention(config, weights, layer)
}

/// Qwen3: no biases, but an RMSNorm over each head of q and k, before rotation.
pub(super) fn attention3(config: &Config, weights: &mut Weights<'_>, layer: &Layer) -> Result<Attention> {
    let mut norm = |part| weights.rms_norm(&layer.name(part), config.head_dim, config.norm_epsilon).map(Some);
    let query_norm = norm("self_attn.q_norm")?;
    let key_norm = norm("self_attn.k_norm")?;
    Ok(Attention { query_norm, key_norm, ..llama::attention(config, weights, layer)? })
}
