//! Memory that operations take for themselves, and keep for the next ones.

use super::{AttentionShape, DType, IndexGeometry};

/// Bytes that a backend holds, or would hold, for a stream's operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scratch {
    /// In device memory, or RAM on the CPU backend.
    pub device: usize,
    /// In pinned host memory.
    pub pinned: usize,
}

/// The largest steps that there will be, as far as scratch memory depends on them.
#[derive(Clone, Debug)]
pub struct Work<'a> {
    /// Of every layer's attention.
    pub attention: AttentionShape,
    /// Type of keys and values.
    pub kv: DType,
    /// Rows of a prompt that run at once.
    pub rows: usize,
    /// Sequences that are decoded together.
    pub sequences: usize,
    /// Tokens that each of them holds at most.
    pub tokens: usize,
    /// Tokens of an extent.
    pub extent_tokens: usize,
    /// Rows that one decoded token attends in a layer, at most.
    pub attended: usize,
    /// Rows whose attention is ranked at once, 0 for none.
    pub ranked: usize,
    /// What is rehearsed on, if anything is.
    pub index: Option<IndexGeometry>,
    /// The weights that prompts are multiplied with.
    pub products: &'a [Product],
    /// The weights that queries are predicted with, beside the step's own operations.
    pub predictors: &'a [Product],
}

/// What a product's scratch memory depends on, of its weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Product {
    /// Columns of the weight.
    pub inputs: usize,
    /// Rows of the weight.
    pub outputs: usize,
    /// Its type.
    pub dtype: DType,
    /// Whether it lies in blocks.
    pub in_blocks: bool,
}
