//! OPT (Zhang et al. 2022): LayerNorm, biases, ReLU, and a learned vector for each position. The model of the
//! InfiniGen paper.

use super::Layer;
use crate::Result;
use crate::model::config::{Config, Opt};
use crate::model::decoder::{Attention, Block, Decoder, Mlp, NormPlacement, Positions};
use crate::model::weights::Weights;

/// The position table begins with two rows for padding.
const POSITION_OFFSET: usize = 2;

pub(super) fn decoder(config: &Config, weights: &mut Weights<'_>) -> Result<Decoder> {
    let opt = config.opt.as_ref().expect("an OPT configuration");
    let (vocabulary, hidden, embedding_width) = (config.vocabulary, config.hidden, opt.embedding);
    // Checkpoints saved without the head lack the outer name.
    let root = match weights.has("decoder.embed_tokens.weight") {
        true => "decoder",
        false => "model.decoder",
    };
    let name = |part: &str| format!("{root}.{part}");

    let embedding = weights.linear(&name("embed_tokens"), vocabulary, embedding_width, false)?;
    let positions = config.context_length + POSITION_OFFSET;
    let table = weights.linear(&name("embed_positions"), positions, hidden, false)?;
    // OPT-350m's embedding is narrower than its blocks.
    let narrow = embedding_width != hidden;
    let project_in = match narrow {
        true => Some(weights.linear(&name("project_in"), hidden, embedding_width, false)?),
        false => None,
    };
    let mut blocks = Vec::with_capacity(config.layers);
    for index in 0..config.layers {
        blocks.push(block(config, opt, weights, &Layer { index, prefix: name(&format!("layers.{index}")) })?);
    }
    let final_norm = match opt.final_norm {
        true => Some(weights.layer_norm(&name("final_layer_norm"), hidden, config.norm_epsilon, opt.affine)?),
        false => None,
    };
    let project_out = match narrow {
        true => Some(weights.linear(&name("project_out"), embedding_width, hidden, false)?),
        false => None,
    };
    let head = match config.tied {
        true => None,
        false => Some(weights.linear("lm_head", vocabulary, embedding_width, false)?),
    };
    Ok(Decoder {
        embedding,
        positions: Positions::Learned { table, offset: POSITION_OFFSET },
        project_in,
        blocks,
        final_norm,
        project_out,
        head,
    })
}

fn block(config: &Config, opt: &Opt, weights: &mut Weights<'_>, layer: &Layer) -> Result<Block> {
    let (hidden, epsilon) = (config.hidden, config.norm_epsilon);
    let qkv = ["q_proj", "k_proj", "v_proj"].map(|part| (layer.name(&format!("self_attn.{part}")), hidden));
    Ok(Block {
        placement: if opt.pre_norm { NormPlacement::Pre } else { NormPlacement::Post },
        attention_norm: weights.layer_norm(&layer.name("self_attn_layer_norm"), hidden, epsilon, opt.affine)?,
        attention: Attention {
            qkv: weights.stacked(&qkv, hidden, config.qkv_bias)?,
            query_norm: None,
            key_norm: None,
            output: weights.linear(&layer.name("self_attn.out_proj"), hidden, hidden, config.output_bias)?,
            window: None,
        },
        // The block's own, not the model's last.
        mlp_norm: weights.layer_norm(&layer.name("final_layer_norm"), hidden, epsilon, opt.affine)?,
        mlp: Mlp {
            up: weights.linear(&layer.name("fc1"), config.intermediate, hidden, config.mlp_bias)?,
            activation: config.activation,
            down: weights.linear(&layer.name("fc2"), hidden, config.intermediate, config.mlp_bias)?,
        },
    })
}
