//! `full` away from the device, and `int4`: every layer attends every token, from a store.
//!
//! - A store whose entries are memory that attention reads as it is (exact ones in RAM, on the CPU) is read in place:
//!   nothing is copied, and nothing counts as fetched.
//! - Otherwise the whole of each layer is fetched while the layer before is computed, for decode and for prompts alike
//!   ([`super::staged`]); every chunk of a prompt fetches what came before it once.
//! - A step's own entries are attended exactly in that step, whatever the payload, and as they were stored in all later
//!   ones, as in FlexGen.
//!
//! Counters: in decode each entry of a past token that is fetched is a miss, each that is read in place a hit. Bytes are
//! those of the store, prompts included.

use crate::Result;
use crate::backend::{AttentionShape, Backend, KvGeometry, KvRuns, Rows, Visible};
use crate::kv::{self, KvTier, Payload, Store};

use super::staged::{self, Staged};
use super::tally::Tally;
use super::{KvCounters, Policy, PolicyOptions, Setting, Step, TierBytes};

pub(super) struct Fetched {
    kv_heads: usize,
    store: Box<dyn Store>,
    staged: Staged,
    /// Whether the store is device memory.
    on_device: bool,
    /// Tokens held, those of a step under way not included.
    length: usize,
    tally: Tally,
}

impl Fetched {
    /// `payload` overrules that of the options.
    pub(super) fn new(options: &PolicyOptions, payload: Payload, setting: Setting) -> Result<Fetched> {
        let Setting { backend, pool, geometry, capacity, .. } = setting;
        Ok(Fetched {
            kv_heads: geometry.kv_heads,
            staged: Staged::new(pool.clone(), &geometry),
            store: kv::store(&pool, &backend, geometry, payload, &options.tier, capacity)?,
            on_device: options.tier == KvTier::Device,
            length: 0,
            tally: Tally::default(),
        })
    }

    /// Whether attention reads the store itself.
    fn in_place(&self, layer: usize) -> bool {
        self.store.runs(layer).is_some()
    }

    /// Back to `length` tokens.
    fn shorten(&mut self, length: usize) {
        self.store.abandon_fetches();
        self.store.truncate(length);
        self.staged.truncate(length);
        self.length = length;
    }
}

/// What [`Policy::bytes`] will say, at most, of a session of `capacity` tokens when it is full.
pub(super) fn estimate(
    options: &PolicyOptions,
    payload: Payload,
    backend: &dyn Backend,
    geometry: &KvGeometry,
    capacity: usize,
) -> TierBytes {
    let stored = kv::store_bytes(geometry, payload, &options.tier, capacity);
    let readable = match options.tier {
        KvTier::Device => true,
        KvTier::Host => backend.reads_host_in_place(),
        KvTier::File(_) => false,
    };
    let staged = if payload == Payload::Exact && readable { 0 } else { staged::bytes(geometry, capacity) };
    bytes_of(stored, options.tier == KvTier::Device, staged)
}

/// Bytes by tier of a store (memory, file) and of what is staged.
fn bytes_of((memory, file): (usize, usize), on_device: bool, staged: usize) -> TierBytes {
    let (device, pinned) = if on_device { (memory, 0) } else { (0, memory) };
    TierBytes { device: device + staged, pinned, file }
}

impl Policy for Fetched {
    fn reserve(&mut self, length: usize) -> Result<()> {
        if let Err(error) = self.staged.reserve(length, &*self.store).and_then(|()| self.store.reserve(length)) {
            self.staged.truncate(self.length);
            return Err(error);
        }
        self.tally.begin();
        Ok(())
    }

    fn prefetch(&mut self, step: &Step<'_>) -> Result<()> {
        self.staged.prefetch(step, step.layer, &mut *self.store)
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        self.staged.append(step, step.layer, keys, values, &mut *self.store)
    }

    fn land(&mut self, step: &Step<'_>) -> Result<()> {
        self.tally.layer(step, self.kv_heads, step.position + 1);
        let past = self.kv_heads * step.position;
        match self.in_place(step.layer) {
            true => self.tally.fetched(step, past, 0),
            false => self.tally.fetched(step, 0, past),
        }
        self.staged.land(step, step.layer, &mut *self.store)
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        (self.staged.runs(step.layer, &*self.store), Visible::Causal)
    }

    fn observe(&mut self, step: &Step<'_>, _shape: &AttentionShape, _queries: Rows<'_>) -> Result<()> {
        self.staged.attended(step, step.layer, &*self.store)
    }

    fn commit(&mut self, step: &Step<'_>) -> Result<()> {
        self.length = step.position + step.rows;
        Ok(())
    }

    fn roll_back(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        // Nobody has waited for what the step had enqueued, and what is given back may be another session's next.
        let finished = step.backend.synchronize(step.stream);
        self.shorten(length);
        finished?;
        self.tally.undo();
        Ok(())
    }

    fn truncate(&mut self, _step: &Step<'_>, length: usize) -> Result<()> {
        self.shorten(length);
        Ok(())
    }

    fn bytes(&self) -> TierBytes {
        bytes_of(self.store.bytes(), self.on_device, self.staged.bytes())
    }

    fn counters(&self) -> KvCounters {
        self.tally.with(self.store.counters())
    }

    fn reset_counters(&mut self) {
        self.tally.reset(self.store.counters());
    }
}
