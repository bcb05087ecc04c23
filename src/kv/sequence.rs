//! One sequence's keys and values, and its partial keys, in extents.

use std::sync::Arc;

use crate::Result;
use crate::backend::{IndexGeometry, IndexRuns, IndexRunsMut, KvGeometry, KvRuns, KvRunsMut};

use super::{Extents, Pool};

/// Keys and values of one sequence, some layers. What is stored up to which token is the caller's to know.
pub struct SequenceKv {
    geometry: KvGeometry,
    extents: Extents,
}

impl SequenceKv {
    /// An empty sequence whose extents will come from `pool`.
    pub fn new(pool: Arc<Pool>, geometry: KvGeometry) -> SequenceKv {
        SequenceKv { geometry, extents: Extents::new(pool, geometry.extent_bytes()) }
    }

    /// The shape of the extents.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Makes room for `tokens` tokens in all. On an error the sequence is as it was.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.extents.reserve(self.geometry.extents(tokens))
    }

    /// Gives back the extents past the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        self.extents.truncate(self.geometry.extents(tokens));
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.extents.bytes()
    }

    /// One layer, for reading.
    pub fn layer(&self, layer: usize) -> KvRuns<'_> {
        KvRuns::new(self.extents.buffers(), self.geometry, layer)
    }

    /// One layer, for writing.
    pub fn layer_mut(&mut self, layer: usize) -> KvRunsMut<'_> {
        KvRunsMut::new(self.extents.buffers_mut(), self.geometry, layer)
    }
}

/// Partial keys of one sequence, some layers: the speculation index.
pub struct SequenceIndex {
    geometry: IndexGeometry,
    extents: Extents,
}

impl SequenceIndex {
    /// An empty index whose extents will come from `pool`.
    pub fn new(pool: Arc<Pool>, geometry: IndexGeometry) -> SequenceIndex {
        SequenceIndex { geometry, extents: Extents::new(pool, geometry.extent_bytes()) }
    }

    /// The shape of the extents.
    pub fn geometry(&self) -> &IndexGeometry {
        &self.geometry
    }

    /// Makes room for `tokens` tokens in all. On an error the index is as it was.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        self.extents.reserve(self.geometry.extents(tokens))
    }

    /// Gives back the extents past the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        self.extents.truncate(self.geometry.extents(tokens));
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.extents.bytes()
    }

    /// One layer, for reading.
    pub fn layer(&self, layer: usize) -> IndexRuns<'_> {
        IndexRuns::new(self.extents.buffers(), self.geometry, layer)
    }

    /// One layer, for writing.
    pub fn layer_mut(&mut self, layer: usize) -> IndexRunsMut<'_> {
        IndexRunsMut::new(self.extents.buffers_mut(), self.geometry, layer)
    }
}
