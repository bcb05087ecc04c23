//! A policy around another one, for tests that watch it or make it fail: every call goes through, and somebody is told.

use kvahead::Result;
use kvahead::backend::{AttentionShape, KvRuns, Rows, RowsMut, Visible};
use kvahead::policy::{Ahead, DeviceParts, KvCounters, Lookahead, Policy, Step, TierBytes};

/// Who is told. Nothing is expected of it.
pub trait Watch: Send {
    /// Before each call that a step may end with, and once more after a commit. An error takes the place of the call's outcome.
    fn call(&self) -> Result<()> {
        Ok(())
    }

    /// Keys and values are about to be appended.
    fn append(&mut self, _step: &Step<'_>, _keys: Rows<'_>, _values: Rows<'_>) {}

    /// What a layer attends.
    fn attended(&self, _step: &Step<'_>, _runs: &KvRuns<'_>, _visible: &Visible<'_>) {}

    /// What attention gave, and what it is once the policy has completed it.
    fn complete(&mut self, _step: &Step<'_>, _attended: Rows<'_>) {}

    /// See above.
    fn completed(&mut self, _step: &Step<'_>, _attended: Rows<'_>) {}

    /// Queries are about to be observed.
    fn observe(&mut self, _step: &Step<'_>, _shape: &AttentionShape, _queries: Rows<'_>) {}
}

pub struct Around<W> {
    inner: Box<dyn Policy>,
    watch: W,
}

impl<W: Watch + 'static> Around<W> {
    pub fn boxed(inner: Box<dyn Policy>, watch: W) -> Box<dyn Policy> {
        Box::new(Around { inner, watch })
    }
}

impl<W: Watch> Policy for Around<W> {
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.watch.call()?;
        self.inner.reserve(length)
    }

    fn prefetch(&mut self, step: &Step<'_>) -> Result<()> {
        self.watch.call()?;
        self.inner.prefetch(step)
    }

    fn lookahead(&self, layer: usize, position: usize) -> Option<Lookahead<'_>> {
        self.inner.lookahead(layer, position)
    }

    fn rehearsal(&mut self, layer: usize, position: usize) -> Option<Ahead<'_>> {
        self.inner.rehearsal(layer, position)
    }

    fn rehearsed(&mut self, step: &Step<'_>) -> Result<()> {
        self.watch.call()?;
        self.inner.rehearsed(step)
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        self.watch.call()?;
        self.watch.append(step, keys, values);
        self.inner.append(step, keys, values)
    }

    fn land(&mut self, step: &Step<'_>) -> Result<()> {
        self.watch.call()?;
        self.inner.land(step)
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        let (runs, visible) = self.inner.attended(step);
        self.watch.attended(step, &runs, &visible);
        (runs, visible)
    }

    fn complete(&mut self, step: &Step<'_>, mut attended: RowsMut<'_>) -> Result<()> {
        self.watch.call()?;
        self.watch.complete(step, attended.as_rows());
        self.inner.complete(step, attended.reborrow())?;
        self.watch.completed(step, attended.as_rows());
        Ok(())
    }

    fn observe(&mut self, step: &Step<'_>, shape: &AttentionShape, queries: Rows<'_>) -> Result<()> {
        self.watch.call()?;
        self.watch.observe(step, shape, queries);
        self.inner.observe(step, shape, queries)
    }

    fn commit(&mut self, step: &Step<'_>) -> Result<()> {
        self.watch.call()?;
        self.inner.commit(step)?;
        self.watch.call()
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

    fn device_parts(&self) -> DeviceParts {
        self.inner.device_parts()
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
