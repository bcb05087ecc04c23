//! `full`: every layer attends every token. Exact; the baseline that all others are measured against.

use crate::Result;
use crate::backend::{KvRuns, Rows, Visible};
use crate::kv::SequenceKv;

use super::{Policy, Setting, Step, TierBytes};

pub(super) struct Full {
    kv: SequenceKv,
}

impl Full {
    pub(super) fn new(setting: Setting) -> Full {
        Full { kv: SequenceKv::new(setting.pool, setting.geometry) }
    }
}

impl Policy for Full {
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.kv.reserve(length)
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        step.backend.store_kv(step.stream, keys, values, &mut self.kv.layer_mut(step.layer), step.position)
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        (self.kv.layer(step.layer), Visible::Causal)
    }

    fn roll_back(&mut self, _step: &Step<'_>, length: usize) -> Result<()> {
        self.kv.truncate(length);
        Ok(())
    }

    fn truncate(&mut self, _step: &Step<'_>, length: usize) -> Result<()> {
        self.kv.truncate(length);
        Ok(())
    }

    fn bytes(&self) -> TierBytes {
        TierBytes { device: self.kv.bytes(), ..TierBytes::default() }
    }
}
