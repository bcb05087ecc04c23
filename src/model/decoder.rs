//! A model as the engine runs it: the blocks of a decoder-only transformer, with their weights on a backend.
//!
//! Architecture files (`architecture/`) build this from a checkpoint; the engine walks it. What a layer is made of is
//! data here, so that the step loop is written once.

use std::collections::BTreeSet;

use crate::backend::{Activation, Linear, Norm, Rotation};

/// A decoder-only transformer.
#[derive(Debug)]
pub struct Decoder {
    /// Token embedding, `vocabulary × embedding width`.
    pub embedding: Linear,
    /// How positions enter.
    pub positions: Positions,
    /// From embedding width to hidden width, where they differ (OPT-350m).
    pub project_in: Option<Linear>,
    /// The layers.
    pub blocks: Vec<Block>,
    /// Before the head; absent in post-norm OPT.
    pub final_norm: Option<Norm>,
    /// From hidden width back to embedding width, where they differ.
    pub project_out: Option<Linear>,
    /// The head; `None` when tied to the embedding.
    pub head: Option<Linear>,
}

/// How positions enter a model.
#[derive(Debug)]
pub enum Positions {
    /// Rotary embedding of queries and keys.
    Rotary(Rotary),
    /// A learned table added to the embedding; position p reads row `p + offset`.
    Learned {
        /// `positions × hidden`.
        table: Linear,
        /// 2 in OPT.
        offset: usize,
    },
}

/// The rotation, which LongRoPE picks by the length of the sequence.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// For every sequence, or for short ones.
    pub short: Rotation,
    /// LongRoPE: for sequences (prompt and continuation so far) longer than the given number of tokens.
    pub long: Option<(usize, Rotation)>,
}

impl Rotary {
    /// The rotation of a sequence that will hold `tokens` tokens.
    pub fn for_length(&self, tokens: usize) -> &Rotation {
        match &self.long {
            Some((threshold, long)) if tokens > *threshold => long,
            _ => &self.short,
        }
    }
}

/// Where a block normalises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormPlacement {
    /// x + f(norm(x)).
    Pre,
    /// norm(x + f(x)) (OPT-350m).
    Post,
}

/// One layer: attention, then MLP, each with a residual connection around it.
#[derive(Debug)]
pub struct Block {
    /// Where both norms stand.
    pub placement: NormPlacement,
    /// The attention's norm.
    pub attention_norm: Norm,
    /// Attention.
    pub attention: Attention,
    /// The MLP's norm.
    pub mlp_norm: Norm,
    /// MLP.
    pub mlp: Mlp,
}

/// Grouped-query attention.
#[derive(Debug)]
pub struct Attention {
    /// Query, key and value weights stacked: outputs are `heads·d`, then `kv_heads·d`, then `kv_heads·d`.
    pub qkv: Linear,
    /// Norm of each query head, before rotation (Qwen3).
    pub query_norm: Option<Norm>,
    /// Norm of each key head, before rotation (Qwen3).
    pub key_norm: Option<Norm>,
    /// Output projection, `hidden × heads·d`.
    pub output: Linear,
    /// Sliding window in tokens (Mistral 7B v0.1).
    pub window: Option<usize>,
}

/// The feed-forward part.
#[derive(Debug)]
pub struct Mlp {
    /// Gate and up weights stacked (gated kinds), or the first layer (plain kinds).
    pub up: Linear,
    /// The non-linearity.
    pub activation: Activation,
    /// Back to the hidden width.
    pub down: Linear,
}

impl Decoder {
    /// Every matrix; a tied head is none.
    fn matrices(&self) -> impl Iterator<Item = &Linear> {
        let table = match &self.positions {
            Positions::Learned { table, .. } => Some(table),
            Positions::Rotary(_) => None,
        };
        let ends = [Some(&self.embedding), table, self.project_in.as_ref()].into_iter().flatten();
        let blocks = self
            .blocks
            .iter()
            .flat_map(|block| [&block.attention.qkv, &block.attention.output, &block.mlp.up, &block.mlp.down]);
        ends.chain(blocks).chain([&self.project_out, &self.head].into_iter().flatten())
    }

    /// How matrices lie in memory: an element type, or blocks and what they stand for, such as "q4_1+q8_0 as bf16".
    pub fn storage(&self) -> String {
        let names = |blocks: bool| {
            let matrices = self.matrices().filter(|matrix| matrix.blocks.is_some() == blocks);
            let name = |matrix: &Linear| matrix.blocks.map_or(matrix.dtype.to_string(), |blocks| blocks.to_string());
            matrices.map(name).collect::<BTreeSet<String>>().into_iter().collect::<Vec<_>>().join("+")
        };
        match (names(true), names(false)) {
            (blocks, elements) if blocks.is_empty() => elements,
            (blocks, elements) if elements.is_empty() => format!("{blocks} as bf16"),
            (blocks, elements) => format!("{blocks} as bf16, {elements}"),
        }
    }

    /// Number of weights and their bytes in memory; a tied head counts once.
    pub fn size(&self) -> (u64, u64) {
        let mut size = (0, 0);
        for linear in self.matrices() {
            let bias = linear.bias.as_ref().map_or(0, |bias| bias.len as u64);
            size.0 += linear.outputs as u64 * linear.inputs as u64 + bias;
            size.1 += linear.data.bytes() as u64 + 4 * bias;
        }
        let norms = self.blocks.iter().flat_map(|block| {
            let own = [Some(&block.attention_norm), Some(&block.mlp_norm)];
            own.into_iter().chain([block.attention.query_norm.as_ref(), block.attention.key_norm.as_ref()])
        });
        for norm in norms.chain([self.final_norm.as_ref()]).flatten() {
            let values = (norm.weight.len + norm.bias.as_ref().map_or(0, |bias| bias.len)) as u64;
            size.0 += values;
            size.1 += 4 * values;
        }
        size
    }
}
