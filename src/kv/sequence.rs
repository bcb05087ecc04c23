//! One sequence's keys and values, all layers, in extents.

use std::sync::Arc;

use crate::Result;
use crate::backend::{Buffer, KvGeometry, KvRuns, KvRunsMut};

use super::Pool;

/// The extents of one sequence. What is stored in them up to which token is the caller's to know.
pub struct SequenceKv {
    pool: Arc<Pool>,
    geometry: KvGeometry,
    extents: Vec<Buffer>,
}

impl SequenceKv {
    /// An empty sequence whose extents will come from `pool`.
    pub fn new(pool: Arc<Pool>, geometry: KvGeometry) -> SequenceKv {
        SequenceKv { pool, geometry, extents: Vec::new() }
    }

    /// The shape of the extents.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Makes room for `tokens` tokens in all. On an error the sequence is as it was.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        let missing = self.geometry.extents(tokens).saturating_sub(self.extents.len());
        if missing > 0 {
            let mut new = self.pool.acquire(self.geometry.extent_bytes(), missing)?;
            self.extents.append(&mut new);
        }
        Ok(())
    }

    /// Gives back the extents past the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        let keep = self.geometry.extents(tokens).min(self.extents.len());
        let mut rest = self.extents.split_off(keep);
        self.pool.release(&mut rest);
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.extents.len() * self.geometry.extent_bytes()
    }

    /// One layer, for reading.
    pub fn layer(&self, layer: usize) -> KvRuns<'_> {
        KvRuns::new(&self.extents, self.geometry, layer)
    }

    /// One layer, for writing.
    pub fn layer_mut(&mut self, layer: usize) -> KvRunsMut<'_> {
        KvRunsMut::new(&mut self.extents, self.geometry, layer)
    }
}

impl Drop for SequenceKv {
    fn drop(&mut self) {
        self.pool.release(&mut self.extents);
    }
}
