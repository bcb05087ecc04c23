//! What products were made from, as a number.

use std::fmt;

use xxhash_rust::xxh3::Xxh3;

use crate::Result;
use crate::backend::{Backend, Linear, Norm, Rows, Stream, Vector};
use crate::model::config::Config;
use crate::model::decoder::{Decoder, Positions};

/// Rows of a matrix that are hashed, spread evenly from the first to the last.
const SAMPLED_ROWS: usize = 64;

/// A hash (XXH3, 128 bits) of a model and of the tokens it is calibrated on.
///
/// It covers the configuration, every vector, and of every matrix the shape, the type in memory and 64 rows spread evenly.
/// So it tells models apart whose training differed in any way, and copies in another element type; a change of single
/// rows of a matrix by hand may escape it. Against somebody who wants it to collide it promises nothing: he can write the
/// cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key(u128);

impl Key {
    /// The key of a model in memory of `backend`, calibrated on `tokens`.
    pub fn of(backend: &dyn Backend, config: &Config, decoder: &Decoder, tokens: &[u32]) -> Result<Key> {
        let mut hash = Hash { backend, stream: backend.stream()?, state: Xxh3::new(), scratch: Vec::new() };
        // Debug prints every field, floats so that they can be told apart.
        hash.state.update(format!("{config:?}").as_bytes());
        hash.number(tokens.len());
        tokens.iter().for_each(|token| hash.state.update(&token.to_le_bytes()));
        hash.decoder(decoder)?;
        Ok(Key(hash.state.digest128()))
    }

    /// The key as the bytes of a file's header.
    pub(super) fn bytes(self) -> [u8; 16] {
        self.0.to_le_bytes()
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

struct Hash<'a> {
    backend: &'a dyn Backend,
    stream: Stream,
    state: Xxh3,
    scratch: Vec<u8>,
}

impl Hash<'_> {
    fn number(&mut self, number: usize) {
        self.state.update(&(number as u64).to_le_bytes());
    }

    fn decoder(&mut self, decoder: &Decoder) -> Result<()> {
        self.linear(&decoder.embedding)?;
        if let Positions::Learned { table, .. } = &decoder.positions {
            self.linear(table)?;
        }
        for linear in [&decoder.project_in, &decoder.project_out, &decoder.head].into_iter().flatten() {
            self.linear(linear)?;
        }
        for block in &decoder.blocks {
            for linear in [&block.attention.qkv, &block.attention.output, &block.mlp.up, &block.mlp.down] {
                self.linear(linear)?;
            }
            let heads = [block.attention.query_norm.as_ref(), block.attention.key_norm.as_ref()];
            let norms = [Some(&block.attention_norm), Some(&block.mlp_norm)].into_iter().chain(heads);
            norms.flatten().try_for_each(|norm| self.norm(norm))?;
        }
        decoder.final_norm.iter().try_for_each(|norm| self.norm(norm))
    }

    fn linear(&mut self, linear: &Linear) -> Result<()> {
        self.state.update(format!("{}", linear.dtype).as_bytes());
        self.number(linear.outputs);
        self.number(linear.inputs);
        let sampled = SAMPLED_ROWS.min(linear.outputs);
        let last = linear.outputs - 1;
        for i in 0..sampled {
            let row = if sampled == 1 { 0 } else { i * last / (sampled - 1) };
            // Blocks are hashed as what they stand for, so that it does not matter whether they are kept.
            self.scratch.resize(linear.inputs * linear.dtype.bytes(), 0);
            self.backend.download_weight(&self.stream, linear, row..row + 1, &mut self.scratch)?;
            self.state.update(&self.scratch);
        }
        linear.bias.iter().try_for_each(|bias| self.vector(bias))
    }

    fn norm(&mut self, norm: &Norm) -> Result<()> {
        self.vector(&norm.weight)?;
        norm.bias.iter().try_for_each(|bias| self.vector(bias))
    }

    fn vector(&mut self, vector: &Vector) -> Result<()> {
        self.number(vector.len);
        self.rows(vector.row())
    }

    fn rows(&mut self, rows: Rows<'_>) -> Result<()> {
        self.scratch.resize(rows.rows() * rows.cols() * rows.dtype().bytes(), 0);
        self.backend.download(&self.stream, rows, &mut self.scratch)?;
        self.state.update(&self.scratch);
        Ok(())
    }
}
