//! A policy around another one that fails when told to.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvahead::backend::{AttentionShape, KvRuns, Rows, RowsMut, Visible};
use kvahead::policy::{Ahead, KvCounters, Lookahead, Policy, Step, TierBytes};
use kvahead::{Error, ErrorCode, Result};

/// Fails at the call that counts `left` down to zero; never while it is zero.
pub struct Failing {
    pub inner: Box<dyn Policy>,
    pub left: Arc<AtomicUsize>,
}

impl Failing {
    fn tick(&self) -> Result<()> {
        let before = self.left.load(Ordering::Relaxed);
        self.left.store(before.saturating_sub(1), Ordering::Relaxed);
        if before == 1 { Err(Error::new(ErrorCode::Device, "made to fail")) } else { Ok(()) }
    }
}

impl Policy for Failing {
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.tick()?;
        self.inner.reserve(length)
    }

    fn prefetch(&mut self, step: &Step<'_>) -> Result<()> {
        self.tick()?;
        self.inner.prefetch(step)
    }

    fn lookahead(&self, layer: usize, position: usize) -> Option<Lookahead<'_>> {
        self.inner.lookahead(layer, position)
    }

    fn rehearsal(&mut self, layer: usize, position: usize) -> Option<Ahead<'_>> {
        self.inner.rehearsal(layer, position)
    }

    fn rehearsed(&mut self, step: &Step<'_>) -> Result<()> {
        self.tick()?;
        self.inner.rehearsed(step)
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        self.tick()?;
        self.inner.append(step, keys, values)
    }

    fn land(&mut self, step: &Step<'_>) -> Result<()> {
        self.tick()?;
        self.inner.land(step)
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        self.inner.attended(step)
    }

    fn complete(&mut self, step: &Step<'_>, attended: RowsMut<'_>) -> Result<()> {
        self.tick()?;
        self.inner.complete(step, attended)
    }

    fn observe(&mut self, step: &Step<'_>, shape: &AttentionShape, queries: Rows<'_>) -> Result<()> {
        self.tick()?;
        self.inner.observe(step, shape, queries)
    }

    /// Fails before and after the policy's own.
    fn commit(&mut self, step: &Step<'_>) -> Result<()> {
        self.tick()?;
        self.inner.commit(step)?;
        self.tick()
    }

    fn roll_back(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        self.inner.roll_back(step, length)
    }

    fn can_truncate(&self, length: usize) -> Result<()> {
        self.inner.can_truncate(length)
    }

    fn truncate(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        self.inner.truncate(step, length)
    }

    fn prefills(&self, position: usize, tokens: usize) -> usize {
        self.inner.prefills(position, tokens)
    }

    fn bytes(&self) -> TierBytes {
        self.inner.bytes()
    }

    fn count(&mut self, step: &Step<'_>) -> Result<()> {
        self.inner.count(step)
    }

    fn counters(&self) -> KvCounters {
        self.inner.counters()
    }

    fn reset_counters(&mut self) {
        self.inner.reset_counters();
    }
}
