//! One sequence's keys and values, and its partial keys, in extents.

use std::sync::Arc;

use crate::Result;
use crate::backend::{
    Backend, Buffer, IndexGeometry, IndexRuns, IndexRunsMut, KvGeometry, KvRuns, KvRunsMut, Payload, Rows, Slot,
    StoredRuns, Stream,
};

use super::overwritten::Overwritten;
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

    /// The extents.
    pub(super) fn buffers(&self) -> &[Buffer] {
        self.extents.buffers()
    }

    /// The extents, for writing.
    pub(super) fn buffers_mut(&mut self) -> &mut [Buffer] {
        self.extents.buffers_mut()
    }

    /// One layer, for reading.
    pub fn layer(&self, layer: usize) -> KvRuns<'_> {
        KvRuns::new(self.extents.buffers(), self.geometry, layer)
    }

    /// One layer, as a store's that keeps exact entries.
    pub fn entries(&self, layer: usize) -> StoredRuns<'_> {
        StoredRuns::new(self.extents.buffers(), self.geometry, Payload::Exact, layer)
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
    /// Rows with partial keys when the step began, and the runs in which it has overwritten some: how rows lie in a run
    /// is the backend's own, so runs are kept whole.
    begun: usize,
    overwritten: Overwritten,
}

impl SequenceIndex {
    /// An empty index whose extents will come from `pool`.
    pub fn new(pool: Arc<Pool>, geometry: IndexGeometry) -> SequenceIndex {
        let (extents, overwritten) = (geometry.extent_bytes(), Overwritten::new(geometry.run_bytes()));
        SequenceIndex { geometry, extents: Extents::new(pool, extents), begun: 0, overwritten }
    }

    /// A step begins, with partial keys in the first `rows` rows: of these what it overwrites can be brought back until
    /// the next one begins.
    pub fn begin(&mut self, rows: usize) {
        self.begun = rows;
        self.overwritten.clear();
    }

    /// Stores one token's partial keys over those of victims, in another row for each KV head.
    pub fn overwrite(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        keys: Rows<'_>,
        rows: &[u32],
    ) -> Result<()> {
        let &IndexGeometry { kv_heads, extent_tokens, .. } = &self.geometry;
        for (head, &row) in rows.iter().enumerate().filter(|&(_, &row)| (row as usize) < self.begun) {
            let offset = (layer * kv_heads + head) * self.geometry.run_bytes();
            let run = Slot { buffer: row as usize / extent_tokens, offset };
            self.overwritten.save(backend, stream, self.extents.buffers(), run)?;
        }
        backend.index_store_rows(stream, keys, &mut self.layer_mut(layer), rows)
    }

    /// Brings back what this step has overwritten. What it has appended may change with it, and means nothing.
    pub fn undo(&mut self, backend: &dyn Backend, stream: &Stream) -> Result<()> {
        self.overwritten.restore(backend, stream, self.extents.buffers_mut())
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
