//! `full`: every layer attends every token. Exact; the baseline that all others are measured against.
//!
//! This file is the policy with everything on the device; with another tier or payload it is `fetched`.

use std::sync::Arc;

use crate::Result;
use crate::backend::{KvGeometry, KvRuns, Rows, Visible};
use crate::kv::{FetchCounters, Pool, SequenceKv};

use super::tally::Tally;
use super::{KvCounters, Policy, Step, TierBytes};

pub(super) struct Full {
    kv: SequenceKv,
    tally: Tally,
}

impl Full {
    pub(super) fn new(pool: Arc<Pool>, geometry: KvGeometry) -> Full {
        Full { kv: SequenceKv::new(pool, geometry), tally: Tally::default() }
    }

    /// Gives back what was reserved past `length` tokens.
    pub(super) fn shrink(&mut self, length: usize) {
        self.kv.truncate(length);
    }
}

/// What [`Policy::bytes`] will say of a session of `length` tokens.
pub(super) fn estimate(geometry: &KvGeometry, length: usize) -> TierBytes {
    TierBytes { device: geometry.extents(length) * geometry.extent_bytes(), ..TierBytes::default() }
}

impl Policy for Full {
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.kv.reserve(length)?;
        self.tally.begin();
        Ok(())
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        step.backend.store_kv(step.stream, keys, values, &mut self.kv.layer_mut(step.layer), step.position)
    }

    fn land(&mut self, step: &Step<'_>) -> Result<()> {
        let heads = self.kv.geometry().kv_heads;
        self.tally.layer(step, heads, step.position + 1);
        self.tally.fetched(step, heads * step.position, 0);
        Ok(())
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        (self.kv.layer(step.layer), Visible::Causal)
    }

    fn roll_back(&mut self, _step: &Step<'_>, length: usize) -> Result<()> {
        self.kv.truncate(length);
        self.tally.undo();
        Ok(())
    }

    fn truncate(&mut self, _step: &Step<'_>, length: usize) -> Result<()> {
        self.kv.truncate(length);
        Ok(())
    }

    fn bytes(&self) -> TierBytes {
        TierBytes { device: self.kv.bytes(), ..TierBytes::default() }
    }

    fn counters(&self) -> KvCounters {
        self.tally.counters()
    }

    fn reset_counters(&mut self) {
        self.tally.reset(FetchCounters::default());
    }
}
