//! The families of models, one file each: what a decoder of that family is made of, top to bottom, as in its paper.
//!
//! These files know names and shapes; where weights come from and how they are stored is [`Weights`]' concern.

mod llama;
mod opt;
mod phi;
mod qwen;

use crate::Result;
use crate::model::config::{Architecture, Config};
use crate::model::decoder::{Attention, Block, Decoder, Mlp, NormPlacement, Positions};
use crate::model::weights::Weights;

/// Builds the decoder that `config` describes from `weights`.
pub fn build(config: &Config, weights: &mut Weights<'_>) -> Result<Decoder> {
    match config.architecture {
        Architecture::Llama | Architecture::Mistral => rms_decoder(config, weights, llama::attention, llama::mlp),
        Architecture::Qwen2 => rms_decoder(config, weights, qwen::attention2, llama::mlp),
        Architecture::Qwen3 => rms_decoder(config, weights, qwen::attention3, llama::mlp),
        Architecture::Phi3 => rms_decoder(config, weights, phi::attention, phi::mlp),
        Architecture::Opt => opt::decoder(config, weights),
    }
}

/// Where one layer's weights are, and which layer it is.
struct Layer {
    index: usize,
    prefix: String,
}

impl Layer {
    /// The full name of a part of this layer.
    fn name(&self, part: &str) -> String {
        format!("{}.{part}", self.prefix)
    }
}

/// What the descendants of Llama share: RMSNorm before attention and MLP, rotary positions, and between embedding and
/// head nothing but blocks and a last norm. They differ in `attention` and `mlp`.
fn rms_decoder(
    config: &Config,
    weights: &mut Weights<'_>,
    attention: fn(&Config, &mut Weights<'_>, &Layer) -> Result<Attention>,
    mlp: fn(&Config, &mut Weights<'_>, &Layer) -> Result<Mlp>,
) -> Result<Decoder> {
    let (vocabulary, hidden, epsilon) = (config.vocabulary, config.hidden, config.norm_epsilon);
    let embedding = weights.linear("model.embed_tokens", vocabulary, hidden, false)?;
    let mut blocks = Vec::with_capacity(config.layers);
    for index in 0..config.layers {
        let layer = Layer { index, prefix: format!("model.layers.{index}") };
        blocks.push(Block {
            placement: NormPlacement::Pre,
            attention_norm: weights.rms_norm(&layer.name("input_layernorm"), hidden, epsilon)?,
            attention: attention(config, weights, &layer)?,
            mlp_norm: weights.rms_norm(&layer.name("post_attention_layernorm"), hidden, epsilon)?,
            mlp: mlp(config, weights, &layer)?,
        });
    }
    let final_norm = weights.rms_norm("model.norm", hidden, epsilon)?;
    let head = match config.tied {
        true => None,
        false => Some(weights.linear("lm_head", vocabulary, hidden, false)?),
    };
    let rope = config.rope.as_ref().expect("every configuration but OPT's has a rotary embedding");
    Ok(Decoder {
        embedding,
        positions: Positions::Rotary(rope.rotary()),
        project_in: None,
        blocks,
        final_norm: Some(final_norm),
        project_out: None,
        head,
    })
}
