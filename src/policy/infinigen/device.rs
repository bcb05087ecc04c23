//! `infinigen` where the device keeps the hot cache's tables: the host enqueues a step and learns of no selection in it.
//!
//! The same pieces as in the parent module, and the same outcome, entry by entry: only who decides is another. A layer's
//! rehearsal, lookup and fetch run on the side stream ([`Step::fetch`]) from the moment its queries are predicted; its
//! attention waits for them. The store is host memory that the device reads and writes in place.

use std::sync::Arc;

use crate::backend::{
    Admission, AttentionShape, Backend, Event, KvGeometry, KvRuns, Place, Prefetch, Rows, RowsMut, SlotGeometry,
    Visible,
};
use crate::kv::{self, DeviceCache, Eviction, KvTier, Payload, RamStore, SequenceIndex, SequenceKv, Store};

use crate::Result;
use crate::policy::InfinigenOptions;

use super::evict::Held;
use super::plan::{self, Plan};
use super::prompt::{self, Prompt};
use super::tail::Tail;
use super::{Ahead, KvCounters, Lookahead, Phase, Policy, PolicyOptions, Setting, Step, TierBytes};

/// Rows of the smallest tables.
const LEAST_ROWS: usize = 1024;

pub(in crate::policy) struct OnDevice {
    plan: Plan,
    resident: SequenceKv,
    store: RamStore,
    index: SequenceIndex,
    cache: DeviceCache,
    prompt: Prompt,
    /// What stands for the entries that are not attended.
    tail: Option<Tail>,
    /// Says how many tokens there may be: nothing is evicted here.
    held: Held,
    /// Whether every token held is in the cache, and whether that was so when this step began.
    whole: bool,
    whole_before: bool,
    /// The prefetch under way of each layer of the store.
    fetches: Vec<Option<Event>>,
    /// Whether this step attends each layer's slots by a list: what is guarded and what was selected.
    by_list: Vec<bool>,
    counters: KvCounters,
    counted: KvCounters,
    /// What the cache has counted, and had counted when our counters were last reset.
    totals: kv::CacheTotals,
    reset_at: kv::CacheTotals,
    row_bytes: usize,
    /// Where the store's memory is.
    place: Place,
    /// Most tokens of the session.
    capacity: usize,
    backend: Arc<dyn Backend>,
}

impl OnDevice {
    pub(in crate::policy) fn new(options: &PolicyOptions, setting: Setting) -> Result<OnDevice> {
        crate::policy::refuse_window("infinigen", &setting)?;
        refuse(options)?;
        let plan = Plan::new(options, &setting)?;
        let Setting { backend, pool, geometry, heads, capacity, .. } = setting;
        let (resident, stored) = super::split(&geometry, plan.resident_layers);
        let index = super::index_geometry(&stored, plan.columns, plan.bits);
        let place = if options.tier == KvTier::Host { Place::Pinned } else { Place::Device };
        Ok(OnDevice {
            resident: SequenceKv::new(pool.clone(), resident),
            store: RamStore::new(pool.clone(), &*backend, stored, Payload::Exact, place),
            index: SequenceIndex::new(pool.clone(), index),
            cache: DeviceCache::new(&*backend, pool.clone(), stored)?,
            prompt: Prompt::new(pool, stored),
            tail: if plan.tail { Some(Tail::new(&*backend, &stored, heads)?) } else { None },
            whole: true,
            whole_before: true,
            held: Held::new(options, 0, &stored),
            by_list: vec![false; stored.layers],
            fetches: (0..stored.layers).map(|_| None).collect(),
            counters: KvCounters::default(),
            counted: KvCounters::default(),
            totals: kv::CacheTotals::default(),
            reset_at: kv::CacheTotals::default(),
            row_bytes: stored.row_bytes(),
            place,
            capacity,
            backend,
            plan,
        })
    }

    fn kv_heads(&self) -> usize {
        self.resident.geometry().kv_heads
    }

    /// The layer of the store that a layer of the model is; `None` for resident ones.
    fn stored(&self, layer: usize) -> Option<usize> {
        layer.checked_sub(self.plan.resident_layers)
    }

    /// Whether a sequence of `length` tokens fits the cache.
    fn fits(&self, length: usize) -> bool {
        length <= self.plan.slots(length)
    }

    /// Makes room for a sequence of `length` tokens.
    fn make_room(&mut self, length: usize) -> Result<()> {
        let prompt = length > self.held.now().0 + 1;
        self.held.wanted(length, 1, 0)?;
        self.resident.reserve(length)?;
        self.index.reserve(length)?;
        self.cache.reserve(self.plan.slots(length))?;
        if length > self.cache.rows() {
            let rows = table_rows(length, self.capacity);
            let lists = (self.plan.most_selected(rows), self.plan.most_attended(rows));
            self.cache.reserve_tables(&*self.backend, rows, self.plan.slots(rows), lists)?;
        }
        self.store.reserve(length)?;
        self.prompt.reserve(if prompt { length } else { 0 }, &self.store)
    }

    /// Gives back room beyond that of `length` tokens.
    fn give_back(&mut self, length: usize) {
        self.cache.shrink(if length == 0 { 0 } else { self.plan.slots(length) });
        self.prompt.release();
        self.resident.truncate(length);
        self.index.truncate(length);
        self.store.truncate(length);
    }

    fn admit(&mut self, step: &Step<'_>, layer: usize, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        self.cache.prepare(step.backend, step.stream)?;
        let length = step.position + 1;
        let (mut slots, cache) = self.cache.slots_mut(layer, self.plan.slots(length), self.plan.guard(length));
        slots.by_list = self.by_list[layer];
        let admission = Admission {
            row: step.position,
            slots,
            store: self.store.entries_mut(layer),
            cache,
            index: self.index.layer_mut(layer),
            maps: self.plan.key_maps(step.layer),
            mean: self.tail.as_mut().map(|tail| tail.next_mean(layer, step.position)),
        };
        step.backend.admit(step.stream, keys, values, admission)
    }
}

/// Rows of the tables of a sequence of `length` tokens: they grow seldom, because that takes a while, and not directly
/// after a prompt.
fn table_rows(length: usize, capacity: usize) -> usize {
    (length + LEAST_ROWS / 2).next_power_of_two().max(LEAST_ROWS).min(capacity)
}

/// Bytes of the tables of a session when it is full.
pub(super) fn table_bytes(options: &InfinigenOptions, stored: &KvGeometry, capacity: usize) -> usize {
    let rows = table_rows(capacity, capacity);
    let (slots, selected) = (plan::slots(options, rows), plan::most_selected(options, rows, 0));
    let attended = plan::most_attended(options, rows);
    SlotGeometry { layers: stored.layers, kv_heads: stored.kv_heads, slots, rows, selected, attended }.bytes()
}

/// Errors where the options ask for what only the host's variant does.
fn refuse(options: &PolicyOptions) -> Result<()> {
    let what = if options.eviction != Eviction::Off {
        "eviction from a full pool"
    } else if options.payload != Payload::Exact {
        "a quantized payload"
    } else if matches!(options.tier, KvTier::File(_)) {
        "the file tier"
    } else if options.trace.is_some() {
        "a trace"
    } else {
        return Ok(());
    };
    Err(super::unsupported(&format!("{what} is not there on a GPU yet; load the model with device=cpu")))
}

impl Policy for OnDevice {
    fn reserve(&mut self, length: usize) -> Result<()> {
        let before = self.held.now().0;
        if let Err(error) = self.make_room(length) {
            self.give_back(before);
            return Err(error);
        }
        self.cache.begin();
        self.prompt.begin();
        if let Some(tail) = &mut self.tail {
            tail.begin();
        }
        if let Some(columns) = self.plan.columns_mut() {
            columns.begin();
        }
        self.counted = self.counters;
        self.whole_before = self.whole;
        Ok(())
    }

    fn prefetch(&mut self, step: &Step<'_>) -> Result<()> {
        if step.layer == 0 { self.cache.grow(step.backend, step.stream) } else { Ok(()) }
    }

    fn lookahead(&self, layer: usize, position: usize) -> Option<Lookahead<'_>> {
        self.stored(layer)?;
        (!(self.whole && self.fits(position + 1))).then(|| self.plan.lookahead(layer))
    }

    fn rehearsal(&mut self, layer: usize, position: usize) -> Option<Ahead<'_>> {
        let stored = self.stored(layer)?;
        let length = position + 1;
        let (mut slots, to) = self.cache.slots_mut(stored, self.plan.slots(length), self.plan.guard(length));
        slots.by_list = !self.plan.attend_cache;
        let rehearsal = self.plan.rehearsal_in_order(self.index.layer(stored), stored, position);
        let tail = self.tail.as_mut().map(|tail| tail.weights_mut(stored));
        Some(Ahead::Prefetch(Box::new(Prefetch { rehearsal, slots, from: self.store.entries(stored), to, tail })))
    }

    fn rehearsed(&mut self, step: &Step<'_>) -> Result<()> {
        if let Some(layer) = self.stored(step.layer) {
            self.fetches[layer] = Some(step.backend.record(step.fetch)?);
            if let Some(tail) = &mut self.tail {
                tail.rehearsed(layer);
            }
        }
        Ok(())
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        let Some(layer) = self.stored(step.layer) else {
            let runs = &mut self.resident.layer_mut(step.layer);
            return step.backend.store_kv(step.stream, keys, values, runs, step.position);
        };
        if step.phase == Phase::Decode {
            // The tables are the prefetch's until it is done.
            let fetched = self.fetches[layer].take();
            // What was not rehearsed is all here, and attended.
            self.by_list[layer] = fetched.is_some() && !self.plan.attend_cache;
            if let Some(fetched) = fetched {
                step.backend.wait(step.stream, &fetched)?;
            }
            return self.admit(step, layer, keys, values);
        }
        self.store.append(step.backend, step.stream, layer, keys, values, kv::Place::From(step.position))?;
        if let Some(columns) = self.plan.columns_mut().filter(|columns| !columns.chosen()) {
            columns.add(step, keys)?;
        }
        self.prompt.index(step, keys, self.plan.key_maps(step.layer), &mut self.index.layer_mut(layer))
    }

    fn land(&mut self, step: &Step<'_>) -> Result<()> {
        let Some(layer) = self.stored(step.layer) else {
            if step.phase == Phase::Decode {
                let entries = (self.kv_heads() * (step.position + 1)) as u64;
                self.counters.attended += entries;
                self.counters.held += entries;
            }
            return Ok(());
        };
        if step.phase != Phase::Decode {
            return self.prompt.land(step, layer, &mut self.store);
        }
        self.counters.candidates += (self.kv_heads() * step.position) as u64;
        self.counters.held += (self.kv_heads() * (step.position + 1)) as u64;
        Ok(())
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        match self.stored(step.layer) {
            None => (self.resident.layer(step.layer), Visible::Causal),
            Some(layer) if step.phase != Phase::Decode => (self.prompt.runs(layer, &self.store), Visible::Causal),
            Some(layer) => {
                let limit = self.plan.slots(step.position + 1);
                (self.cache.runs(layer), Visible::Slots(self.cache.slots(layer, limit, self.by_list[layer])))
            }
        }
    }

    fn observe(&mut self, step: &Step<'_>, shape: &AttentionShape, queries: Rows<'_>) -> Result<()> {
        let (Some(layer), Phase::Prefill { last }) = (self.stored(step.layer), step.phase) else {
            return Ok(());
        };
        if let Some(columns) = self.plan.columns_mut().filter(|columns| !columns.chosen()) {
            columns.add(step, queries)?;
        }
        if !last {
            return Ok(());
        }
        let length = step.position + step.rows;
        if let Some(tail) = &mut self.tail {
            tail.blend_runs(step, layer, self.prompt.runs(layer, &self.store), length, 1.0)?;
        }
        self.prompt.observe(step, (layer, self.plan.ranked(length)), shape, queries, &self.store)
    }

    fn complete(&mut self, step: &Step<'_>, attended: RowsMut<'_>) -> Result<()> {
        match (self.stored(step.layer), &self.tail) {
            (Some(layer), Some(tail)) => tail.add(step, layer, attended),
            _ => Ok(()),
        }
    }

    fn commit(&mut self, step: &Step<'_>) -> Result<()> {
        let length = step.position + step.rows;
        if let Some(tail) = &mut self.tail {
            tail.commit();
        }
        self.held.commit(length);
        if step.phase == Phase::Decode && !self.prompt.ended() {
            self.whole &= self.fits(length);
            self.counters.steps += 1;
            return Ok(());
        }
        if let Some(columns) = self.plan.columns_mut().filter(|columns| !columns.chosen()) {
            columns.choose(step)?;
        }
        let recent = self.prompt.recent(step.position, step.rows);
        let (layers, heads) = (self.fetches.len(), self.kv_heads());
        let (plan, prompt) = (&self.plan, &mut self.prompt);
        self.cache.edit(step.backend, step.stream, &self.store, |cache| {
            let mut moves = Vec::new(); // all of them are fetched
            for (layer, head) in (0..layers).flat_map(|layer| (0..heads).map(move |head| (layer, head))) {
                moves.clear();
                prompt::fill(cache, plan, (layer, head), prompt.take_ranked(layer, head), recent, length, &mut moves);
            }
        })?;
        self.whole = match recent {
            Some(_) => self.whole && self.fits(length),
            None => self.fits(length),
        };
        self.prompt.finish();
        Ok(())
    }

    fn roll_back(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        self.store.abandon_fetches();
        // What is under way on the side stream writes where the undo will, and into what is given back.
        step.backend.synchronize(step.stream)?;
        self.fetches.iter_mut().for_each(|fetch| *fetch = None);
        self.prompt.roll_back();
        if let Some(tail) = &mut self.tail {
            tail.roll_back();
        }
        self.counters = self.counted;
        self.whole = self.whole_before;
        if let Some(columns) = self.plan.columns_mut() {
            columns.roll_back();
        }
        self.cache.undo(step.backend, step.stream, &self.store)?;
        self.held.commit(length);
        self.give_back(length);
        Ok(())
    }

    fn truncate(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        if let Some(tail) = &mut self.tail {
            tail.truncate(step, &mut self.prompt, &mut self.store, length, true)?;
        }
        self.cache.begin();
        let (plan, layers, heads) = (&self.plan, self.fetches.len(), self.kv_heads());
        self.cache.edit(step.backend, step.stream, &self.store, |cache| {
            let mut moves = Vec::new(); // all of them are fetched
            for layer in 0..layers {
                moves.clear();
                cache.truncate(layer, length as u32, &mut moves);
                prompt::restock(cache, plan, layer, heads, length, &mut moves);
            }
        })?;
        self.cache.begin();
        self.whole |= self.fits(length + 1);
        self.held.commit(length);
        self.give_back(length);
        Ok(())
    }

    fn bytes(&self) -> TierBytes {
        let (stored, file) = self.store.bytes();
        let device = self.resident.bytes() + self.index.bytes() + self.cache.bytes() + self.prompt.bytes();
        let device = device + self.tail.as_ref().map_or(0, Tail::bytes);
        match self.place {
            Place::Pinned => TierBytes { device, pinned: stored, file },
            Place::Device => TierBytes { device: device + stored, pinned: 0, file },
        }
    }

    fn count(&mut self, step: &Step<'_>) -> Result<()> {
        self.totals = self.cache.totals(step.backend, step.stream)?;
        Ok(())
    }

    fn counters(&self) -> KvCounters {
        let (now, before) = (&self.totals, &self.reset_at);
        let (selected, misses) = (now.selected - before.selected, now.missed - before.missed);
        KvCounters {
            selected,
            misses,
            hits: selected - misses,
            attended: self.counters.attended + now.attended - before.attended,
            host_bytes: (now.missed + now.refilled - before.missed - before.refilled) * self.row_bytes as u64,
            ..self.counters
        }
    }

    fn reset_counters(&mut self) {
        self.counters = KvCounters::default();
        self.reset_at = self.totals;
    }
}
