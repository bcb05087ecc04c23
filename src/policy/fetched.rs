//! `full` away from the device, and `int4`: every layer attends every token, from a store.
//!
//! - A store whose entries are memory that attention reads as it is (exact ones in RAM, on the CPU) is read in place:
//!   nothing is copied, and nothing counts as fetched.
//! - Otherwise the whole of each layer is fetched into one of two staging areas, each as long as one layer of the
//!   sequence: while a layer is computed, the next one is on its way (FlexGen's order). This is so for decode and for
//!   prompts alike; every chunk of a prompt fetches what came before it once.
//! - From memory a layer lands as soon as it is asked for, on the side stream for fetches; from a file when it is needed.
//!   A prompt's chunks move exact entries by copy engines where the backend has them (`copy_first` in, `copy_from` out),
//!   so that the prompt keeps the multiprocessors.
//!   Two events for each area keep the streams apart: the fetch waits until the area has been attended, and attention
//!   until the fetch has landed.
//! - A step's own entries are put into the staging area directly. They are attended exactly in that step, whatever the
//!   payload, and as they were stored in all later ones, as in FlexGen.
//!
//! Counters: in decode each entry of a past token that is fetched is a miss, each that is read in place a hit. Bytes are
//! those of the store, prompts included.

use crate::Result;
use crate::backend::{AttentionShape, Backend, Event, KvGeometry, KvRuns, Rows, Visible};
use crate::kv::{self, KvTier, Payload, SequenceKv, Store};

use super::tally::Tally;
use super::{KvCounters, Policy, PolicyOptions, Setting, Step, TierBytes};

pub(super) struct Fetched {
    kv_heads: usize,
    store: Box<dyn Store>,
    /// Layer i in the area i mod 2.
    staging: [SequenceKv; 2],
    /// The area's last attention.
    attended: [Option<Event>; 2],
    /// The area's fetch, where it has been enqueued already.
    landed: [Option<Event>; 2],
    /// The area's entries of a prompt on their way to the store.
    left: [Option<Event>; 2],
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
        let staging = || SequenceKv::new(pool.clone(), layer_of(&geometry));
        Ok(Fetched {
            kv_heads: geometry.kv_heads,
            staging: [staging(), staging()],
            store: kv::store(&pool, &backend, geometry, payload, &options.tier, capacity)?,
            attended: [None, None],
            landed: [None, None],
            left: [None, None],
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
        (self.landed, self.left) = ([None, None], [None, None]);
        self.store.abandon_fetches();
        self.store.truncate(length);
        self.staging.iter_mut().for_each(|staging| staging.truncate(length));
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
    let layer = layer_of(geometry);
    let staged =
        if payload == Payload::Exact && readable { 0 } else { 2 * layer.extents(capacity) * layer.extent_bytes() };
    bytes_of(stored, options.tier == KvTier::Device, staged)
}

/// Bytes by tier of a store (memory, file) and of what is staged.
fn bytes_of((memory, file): (usize, usize), on_device: bool, staged: usize) -> TierBytes {
    let (device, pinned) = if on_device { (memory, 0) } else { (0, memory) };
    TierBytes { device: device + staged, pinned, file }
}

/// The shape of a staging area.
fn layer_of(geometry: &KvGeometry) -> KvGeometry {
    KvGeometry { layers: 1, ..*geometry }
}

impl Policy for Fetched {
    fn reserve(&mut self, length: usize) -> Result<()> {
        let staged = if self.in_place(0) { 0 } else { length };
        let [first, second] = &mut self.staging;
        let result =
            first.reserve(staged).and_then(|()| second.reserve(staged)).and_then(|()| self.store.reserve(length));
        if result.is_err() {
            let held = self.length;
            self.staging.iter_mut().for_each(|staging| staging.truncate(held));
            return result;
        }
        self.tally.begin();
        Ok(())
    }

    fn prefetch(&mut self, step: &Step<'_>) -> Result<()> {
        if step.position == 0 || self.in_place(step.layer) {
            return Ok(());
        }
        let area = step.layer % 2;
        if self.store.in_memory() {
            if let Some(attended) = &self.attended[area] {
                step.backend.wait(step.fetch, attended)?;
            }
            let Step { backend, fetch, layer, position, .. } = *step;
            let staging = &mut self.staging[area].layer_mut(0);
            if step.rows == 1 || !self.store.copy_first(backend, fetch, layer, position, staging)? {
                self.store.begin_fetch_first(layer, position)?;
                self.store.finish_fetch(backend, fetch, layer, staging)?;
            }
            self.landed[area] = Some(backend.record(fetch)?);
            return Ok(());
        }
        self.store.begin_fetch_first(step.layer, step.position)
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        let Step { backend, stream, fetch, layer, position, rows, .. } = *step;
        let place = kv::Place::From(position);
        if self.in_place(layer) {
            return self.store.append(backend, stream, layer, keys, values, place);
        }
        let area = layer % 2;
        if let Some(left) = self.left[area].take() {
            backend.wait(stream, &left)?;
        }
        // Behind the rows that the fetch under way writes.
        backend.store_kv(stream, keys, values, &mut self.staging[area].layer_mut(0), position)?;
        if rows > 1 {
            // Those of a prompt leave for the host while the layer goes on.
            let computed = backend.record(stream)?;
            backend.wait(fetch, &computed)?;
            let staged = self.staging[area].layer(0);
            if self.store.copy_from(backend, fetch, layer, &staged, position..position + rows)? {
                self.left[area] = Some(backend.record(fetch)?);
                return Ok(());
            }
        }
        self.store.append(backend, stream, layer, keys, values, place)
    }

    fn land(&mut self, step: &Step<'_>) -> Result<()> {
        self.tally.layer(step, self.kv_heads, step.position + 1);
        let past = self.kv_heads * step.position;
        if self.in_place(step.layer) {
            self.tally.fetched(step, past, 0);
            return Ok(());
        }
        self.tally.fetched(step, 0, past);
        let area = step.layer % 2;
        match self.landed[area].take() {
            Some(landed) => step.backend.wait(step.stream, &landed),
            None => {
                let staging = &mut self.staging[area].layer_mut(0);
                self.store.finish_fetch(step.backend, step.stream, step.layer, staging)
            }
        }
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        let runs = self.store.runs(step.layer).unwrap_or_else(|| self.staging[step.layer % 2].layer(0));
        (runs, Visible::Causal)
    }

    fn observe(&mut self, step: &Step<'_>, _shape: &AttentionShape, _queries: Rows<'_>) -> Result<()> {
        if !self.in_place(step.layer) {
            self.attended[step.layer % 2] = Some(step.backend.record(step.stream)?);
        }
        Ok(())
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
        bytes_of(self.store.bytes(), self.on_device, self.staging.iter().map(SequenceKv::bytes).sum())
    }

    fn counters(&self) -> KvCounters {
        self.tally.with(self.store.counters())
    }

    fn reset_counters(&mut self) {
        self.tally.reset(self.store.counters());
    }
}
