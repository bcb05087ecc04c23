//! `full`: every layer attends every token. Exact; the baseline that all others are measured against.

use std::sync::Arc;

use crate::Result;
use crate::backend::{Backend, KvGeometry, KvRuns, Rows, Stream};
use crate::kv::{Pool, SequenceKv};

use super::{Policy, TierBytes};

pub(super) struct Full {
    kv: SequenceKv,
}

impl Full {
    pub(super) fn new(pool: Arc<Pool>, geometry: KvGeometry) -> Full {
        Full { kv: SequenceKv::new(pool, geometry) }
    }
}

impl Policy for Full {
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.kv.reserve(length)
    }

    fn append(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        keys: Rows<'_>,
        values: Rows<'_>,
        position: usize,
    ) -> Result<()> {
        backend.store_kv(stream, keys, values, &mut self.kv.layer_mut(layer), position)
    }

    fn attended(&self, layer: usize) -> KvRuns<'_> {
        self.kv.layer(layer)
    }

    fn truncate(&mut self, length: usize) {
        self.kv.truncate(length);
    }

    fn bytes(&self) -> TierBytes {
        TierBytes { device: self.kv.bytes(), ..TierBytes::default() }
    }
}
