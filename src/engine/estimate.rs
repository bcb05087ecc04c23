//! What a number of sessions of a context length will cost, before anything is allocated.

use crate::Result;
use crate::backend::{AttentionShape, Linear, Product, Scratch, Work};
use crate::model::decoder::Block;
use crate::policy::{self, TierBytes};

use super::Model;
use super::session::{LOGIT_ROWS, SessionOptions};

/// Bytes, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Weights, allocated already.
    pub weights: u64,
    /// KV of all the sessions when full, by tier.
    pub kv: TierBytes,
    /// Scratch memory once the largest prompt and the largest decode step have run; what is held already is part of it.
    pub scratch: Scratch,
}

impl Estimate {
    /// For `sessions` sessions of `options` on `model`, all of them full, decoded as one batch.
    pub fn new(model: &Model, options: &SessionOptions, sessions: usize) -> Result<Estimate> {
        let resolved = options.resolve(model)?;
        let (geometry, capacity) = (&resolved.geometry, resolved.capacity);
        let each = policy::estimate(&resolved.policy, model.backend(), geometry, capacity);
        let rows = resolved.prefill_chunk.min(capacity);
        let effort = policy::effort(&resolved.policy, geometry, capacity, rows);
        let products = products(model);
        let predictors = if effort.index.is_some() { predictors(model) } else { Vec::new() };
        let config = model.config();
        let work = Work {
            attention: AttentionShape {
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                scale: config.attention_scale(),
                window: None,
            },
            kv: geometry.dtype,
            rows,
            sequences: sessions,
            tokens: capacity,
            extent_tokens: geometry.extent_tokens,
            attended: effort.attended,
            ranked: effort.ranked,
            index: effort.index,
            products: &products,
            predictors: &predictors,
        };
        let scratch = model.forward(|forward| {
            let workspace = &mut *forward.workspace;
            let own = workspace.bytes(rows.max(sessions), sessions.max(LOGIT_ROWS));
            let Scratch { device, pinned } = forward.backend.scratch(&workspace.stream, Some(&work))?;
            Ok(Scratch { device: device.saturating_add(own), pinned })
        })?;
        let all = |bytes: usize| bytes.saturating_mul(sessions);
        Ok(Estimate {
            weights: model.weight_bytes(),
            kv: TierBytes { device: all(each.device), pinned: all(each.pinned), file: all(each.file) },
            scratch,
        })
    }
}

impl Model {
    /// Scratch memory that is held for steps of the model: intermediate rows, and what the backend's operations keep.
    pub fn scratch(&self) -> Result<Scratch> {
        self.forward(|forward| {
            let workspace = &mut *forward.workspace;
            let Scratch { device, pinned } = forward.backend.scratch(&workspace.stream, None)?;
            Ok(Scratch { device: device + workspace.held(), pinned })
        })
    }
}

/// The weights that a prompt's rows are multiplied with.
fn products(model: &Model) -> Vec<Product> {
    let of_block =
        |block: &Block| [&block.attention.qkv, &block.attention.output, &block.mlp.up, &block.mlp.down].map(product);
    distinct(model.decoder().blocks.iter().flat_map(of_block))
}

/// What queries are predicted with: the layers' own weights, or others of their shape.
fn predictors(model: &Model) -> Vec<Product> {
    let outputs = model.config().heads * model.config().head_dim;
    let of_block = |block: &Block| Product { outputs, ..product(&block.attention.qkv) };
    distinct(model.decoder().blocks.iter().map(of_block))
}

fn product(weight: &Linear) -> Product {
    Product { inputs: weight.inputs, outputs: weight.outputs, dtype: weight.dtype, in_blocks: weight.blocks.is_some() }
}

fn distinct(products: impl Iterator<Item = Product>) -> Vec<Product> {
    let mut all: Vec<Product> = products.collect();
    all.sort_unstable_by_key(|product| (product.inputs, product.outputs, product.dtype.bytes(), product.in_blocks));
    all.dedup();
    all
}
