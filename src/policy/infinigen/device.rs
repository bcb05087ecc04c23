//! `infinigen` where the device keeps the hot cache's tables: the host enqueues a step and learns of no selection in it.
//!
//! The same pieces as in the parent module, and the same outcome, entry by entry: only who decides is another. A layer's
//! rehearsal, lookup and fetch run on the side stream ([`Step::fetch`]) from the moment its queries are predicted; its
//! attention waits for them, and for those of a correction. The store is host memory that the device reads and writes in place.

mod room;

use std::sync::Arc;

use crate::Result;
use crate::backend::{AttentionShape, Backend, Event, KvRuns, Place, Prefetch, Rows, RowsMut, Visible};
use crate::kv::{
    self, CacheMut, DeviceCache, DevicePool, Eviction, KvTier, Payload, RamStore, SequenceIndex, SequenceKv, Store,
};

use super::evict::Held;
use super::plan::{self, Plan};
use super::prompt::{self, Prompt};
use super::tail::Tail;
use super::traced::Traced;
use super::{Ahead, DeviceParts, KvCounters, Lookahead, Phase, Policy, PolicyOptions, Setting, Step, TierBytes};
pub(super) use room::table_bytes;

pub(in crate::policy) struct OnDevice {
    plan: Plan,
    resident: SequenceKv,
    store: RamStore,
    index: SequenceIndex,
    cache: DeviceCache,
    prompt: Prompt,
    /// What stands for the entries that are not attended.
    tail: Option<Tail>,
    /// How many tokens and rows there are.
    held: Held,
    /// Which token is in which row, where some may give way.
    pool: Option<DevicePool>,
    /// Tokens that the resident layers take room for at once; see [`super::Infinigen`].
    resident_tokens: usize,
    /// New tokens of the call under way.
    call: usize,
    /// Whether every token held is in the cache, and whether that was so when this step began.
    whole: bool,
    whole_before: bool,
    /// The prefetch under way of each layer of the store.
    fetches: Vec<Option<Event>>,
    /// Whether this step attends each layer's slots by a list: what is guarded and what was selected.
    by_list: Vec<bool>,
    /// Layers of the store that have been rehearsed and not corrected yet.
    due: Vec<bool>,
    counters: KvCounters,
    counted: KvCounters,
    /// What the cache has counted, and had counted when our counters were last reset.
    totals: kv::CacheTotals,
    reset_at: kv::CacheTotals,
    trace: Option<Traced>,
    row_bytes: usize,
    /// Where the store's memory is.
    place: Place,
    /// Most rows of the session.
    capacity: usize,
    backend: Arc<dyn Backend>,
}

impl OnDevice {
    pub(in crate::policy) fn new(options: &PolicyOptions, setting: Setting) -> Result<OnDevice> {
        crate::policy::refuse_window("infinigen", &setting)?;
        if matches!(options.tier, KvTier::File(_)) {
            return Err(super::unsupported("the file tier is not there on a GPU yet; load the model with device=cpu"));
        }
        let plan = Plan::new(options, &setting)?;
        let trace = Traced::create(options, &setting)?;
        let exact = options.payload == Payload::Exact;
        let Setting { backend, pool, geometry, heads, capacity, .. } = setting;
        let (resident, stored) = super::split(&geometry, plan.resident_layers);
        let index = super::index_geometry(&stored, plan.columns, plan.bits);
        let place = if options.tier == KvTier::Host { Place::Pinned } else { Place::Device };
        let (capacity, resident_tokens) = match plan::full_rows(options, capacity) {
            (rows, _) if options.eviction == Eviction::Off => (rows, 0),
            full => full,
        };
        Ok(OnDevice {
            resident: SequenceKv::new(pool.clone(), resident),
            store: RamStore::new(pool.clone(), &*backend, stored, options.payload, place),
            index: SequenceIndex::new(pool.clone(), index),
            cache: DeviceCache::new(&*backend, pool.clone(), stored, exact, trace.is_some())?,
            prompt: Prompt::new(pool, stored),
            tail: if plan.tail { Some(Tail::new(&*backend, &stored, heads)?) } else { None },
            whole: true,
            whole_before: true,
            held: Held::on_device(options, plan::least_rows(&options.infinigen), &stored),
            pool: DevicePool::new(&*backend, options.eviction, &stored, options.payload, &index, capacity)?,
            resident_tokens,
            call: 0,
            by_list: vec![false; stored.layers],
            due: vec![false; stored.layers],
            fetches: (0..stored.layers).map(|_| None).collect(),
            counters: KvCounters::default(),
            counted: KvCounters::default(),
            totals: kv::CacheTotals::default(),
            reset_at: kv::CacheTotals::default(),
            trace,
            row_bytes: options.payload.row_bytes(&stored),
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

    /// Whether a pool of `rows` rows fits the cache.
    fn fits(&self, rows: usize) -> bool {
        rows <= self.plan.slots(rows)
    }

    /// Whether a step attends a layer's slots by a list, before the layer has taken the token at `position`. (What is all
    /// here is attended whole, even if it was rehearsed to know what is used.)
    fn lists(&self, layer: usize, position: usize) -> bool {
        !(self.plan.attend_cache || self.whole && self.fits(self.held.after(layer, position)))
    }

    /// Fills the cache of a layer with the best of what was ranked at the end of a prompt, while the layer is here.
    fn load(&mut self, step: &Step<'_>, layer: usize, length: usize) -> Result<()> {
        let lists = match self.plan.replays() {
            true => self.prompt.ranked(step)?,
            false => Vec::new(),
        };
        let lists = lists.into_iter().enumerate();
        let lists: Vec<_> = lists.map(|(head, ranked)| self.plan.first(layer, head, ranked, length)).collect();
        if !lists.is_empty() {
            self.prompt.rank_by(step, &lists)?;
        }
        let stored = self.store.entries(layer);
        let from = self.prompt.staged.entries(layer, &self.store).unwrap_or(stored);
        let room = (self.plan.slots(length), self.plan.guard(length));
        self.cache.load(step.backend, step.stream, layer, room, length, self.prompt.best(), &from)
    }

    /// Writes down what the last token has selected, where that is asked for.
    fn write_trace(&mut self, step: &Step<'_>) -> Result<()> {
        self.trace.as_mut().map_or(Ok(()), |trace| trace.write(step, &self.cache, self.pool.as_ref()))
    }
}

impl Policy for OnDevice {
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.call = length - self.held.now().0;
        let rows = self.find_room(length)?;
        self.held.begin(rows);
        self.cache.begin();
        if let Some(pool) = &mut self.pool {
            pool.begin();
        }
        self.prompt.begin(self.held.begun_tokens());
        if let Some(tail) = &mut self.tail {
            tail.begin();
        }
        if let Some(columns) = self.plan.columns_mut() {
            columns.begin();
        }
        self.due.fill(false);
        self.counted = self.counters;
        self.whole_before = self.whole;
        Ok(())
    }

    fn prefetch(&mut self, step: &Step<'_>) -> Result<()> {
        if let (Some(layer), Phase::Prefill { .. }) = (self.stored(step.layer), step.phase) {
            return self.prompt.prefetch(step, layer, &mut self.store);
        }
        if step.layer > 0 {
            return Ok(());
        }
        self.plan.begin(step)?;
        self.write_trace(step)?;
        self.cache.grow(step.backend, step.stream)?;
        if step.phase == Phase::Decode {
            self.cache.next_token();
        }
        match &mut self.pool {
            Some(pool) if step.phase == Phase::Decode => {
                if self.call > 1 {
                    self.cache.keep_all(step.backend, step.stream)?;
                }
                pool.keep(step.backend, step.stream)
            }
            _ => Ok(()),
        }
    }

    fn lookahead(&self, layer: usize, position: usize) -> Option<Lookahead<'_>> {
        let stored = self.stored(layer)?;
        let (past, after) = (self.held.count(stored, position), self.held.after(stored, position));
        if self.due[stored] {
            let all_here = self.whole && self.fits(past);
            let may = self.plan.may_correct(stored, position, &self.held, all_here);
            return may.then(|| self.plan.correction(layer));
        }
        let watched = past > 0 && self.held.watches(|rows| self.plan.slots(rows));
        (!(self.whole && self.fits(after)) || watched).then(|| self.plan.lookahead(layer))
    }

    fn rehearsal(&mut self, layer: usize, position: usize) -> Option<Ahead<'_>> {
        let stored = self.stored(layer)?;
        let rehearsal = self.plan.rehearsal_held(self.index.layer(stored), stored, position, &self.held);
        let (place, by_list) = (self.place(stored, position), self.lists(stored, position));
        let correction = self.due[stored].then(|| self.plan.correction_held(stored, position, &self.held));
        let cache = place.cache(&mut self.cache, self.pool.as_mut(), correction.is_some());
        let CacheMut { mut slots, entries: to, saved } = cache;
        slots.by_list = by_list;
        let tail = self.tail.as_mut().map(|tail| tail.weights_mut(stored));
        let from = self.store.entries(stored);
        Some(Ahead::Prefetch(Box::new(Prefetch { rehearsal, slots, from, to, saved, tail, correction })))
    }

    fn rehearsed(&mut self, step: &Step<'_>) -> Result<()> {
        if let Some(layer) = self.stored(step.layer) {
            if std::mem::take(&mut self.due[layer]) {
                // The engine has waited for all of it.
                self.trace.iter_mut().for_each(|trace| trace.corrected(layer));
                return Ok(());
            }
            self.due[layer] = self.plan.corrects();
            self.fetches[layer] = Some(step.backend.record(step.fetch)?);
            if let Some(trace) = &mut self.trace {
                trace.rehearsed(step, layer, self.held.count(layer, step.position));
            }
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
            self.due[layer] = false;
            let fetched = self.fetches[layer].take();
            // What was not rehearsed is all here, and attended.
            self.by_list[layer] = fetched.is_some() && self.lists(layer, step.position);
            if let Some(fetched) = fetched {
                step.backend.wait(step.stream, &fetched)?;
            }
            return self.admit(step, layer, keys, values);
        }
        self.held.extend(layer, step.rows);
        let index = &mut self.index.layer_mut(layer);
        self.prompt.append(step, layer, [keys, values], &mut self.plan, &mut self.store, index)
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
            return self.prompt.staged.land(step, layer, &mut self.store);
        }
        self.counters.held += (self.kv_heads() * (step.position + 1)) as u64;
        if let Some(trace) = &mut self.trace {
            trace.landed(layer);
        }
        Ok(())
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        match self.stored(step.layer) {
            None => (self.resident.layer(step.layer), Visible::Causal),
            Some(layer) if step.phase != Phase::Decode => {
                (self.prompt.staged.runs(layer, &self.store), Visible::Causal)
            }
            Some(layer) => {
                let limit = self.plan.slots(self.held.count(layer, step.position + 1));
                (self.cache.runs(layer), Visible::Slots(self.cache.slots(layer, limit, self.by_list[layer])))
            }
        }
    }

    fn observe(&mut self, step: &Step<'_>, shape: &AttentionShape, queries: Rows<'_>) -> Result<()> {
        let (Some(layer), Phase::Prefill { .. }) = (self.stored(step.layer), step.phase) else {
            return Ok(());
        };
        let (plan, tail) = (&mut self.plan, self.tail.as_mut());
        if self.prompt.observe(step, layer, (shape, queries), plan, tail, &self.store)? {
            self.load(step, layer, step.position + step.rows)?;
        }
        self.prompt.staged.attended(step, layer, &self.store)
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
        if !self.prompt.ended() {
            self.whole &= self.fits(self.held.count(0, length));
            self.counters.steps += step.rows as u64;
            return self.write_trace(step);
        }
        if let Some(columns) = self.plan.choosing() {
            columns.choose(step)?;
        }
        self.whole = match self.prompt.recent(length) {
            None => self.fits(length),
            Some(first) => {
                let heads = self.kv_heads();
                let (plan, prompt) = (&self.plan, &mut self.prompt);
                self.cache.keep(step.backend, step.stream)?;
                self.cache.edit(step.backend, step.stream, &mut self.store, |cache, layer, moves| {
                    for head in 0..heads {
                        let ranked = prompt.take_kept(layer, head);
                        prompt::join(cache, plan, (layer, head), ranked, first, length, moves);
                    }
                })?;
                self.whole && self.fits(length)
            }
        };
        self.prompt.finish();
        Ok(())
    }

    fn roll_back(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        self.store.abandon_fetches();
        // What is under way on the side stream writes where the undo will, and into what is given back.
        step.backend.synchronize(step.stream)?;
        self.fetches.iter_mut().for_each(|fetch| *fetch = None);
        // What was undone is in a trace too; one that cannot be written keeps no step from being undone.
        let _ = self.write_trace(step);
        self.prompt.roll_back();
        if let Some(tail) = &mut self.tail {
            tail.roll_back();
        }
        self.counters = self.counted;
        self.whole = self.whole_before;
        if let Some(columns) = self.plan.columns_mut() {
            columns.roll_back();
        }
        if let Some(pool) = &mut self.pool {
            let begun = self.held.begun_tokens();
            pool.undo(step.backend, step.stream, begun, &mut self.store, &mut self.index)?;
        }
        self.cache.undo(step.backend, step.stream, &self.store)?;
        self.held.undo();
        self.give_back(length, self.held.count(0, length));
        Ok(())
    }

    fn can_truncate(&self, length: usize) -> Result<()> {
        self.held.can_truncate(length)
    }

    fn truncate(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        if let Some(tail) = &mut self.tail {
            tail.truncate(step, &mut self.prompt.staged, &mut self.store, length, self.held.in_order())?;
        }
        self.cache.begin();
        self.held.truncate(length);
        if let Some(pool) = &mut self.pool {
            pool.truncate(step.backend, step.stream, length)?;
        }
        let (plan, heads) = (&self.plan, self.kv_heads());
        self.cache.edit(step.backend, step.stream, &mut self.store, |cache, layer, moves| {
            cache.truncate(layer, length as u32, moves);
            prompt::restock(cache, plan, layer, heads, length, moves);
        })?;
        self.cache.begin();
        self.whole |= self.fits(length + 1);
        self.give_back(length, length);
        Ok(())
    }

    fn prefills(&self, position: usize, tokens: usize) -> usize {
        self.held.in_full(position, tokens)
    }

    fn bytes(&self) -> TierBytes {
        let (stored, file) = self.store.bytes();
        let device = self.resident.bytes() + self.index.bytes() + self.cache.bytes() + self.prompt.bytes();
        let device = device + self.pool.as_ref().map_or(0, DevicePool::bytes);
        let device = device + self.tail.as_ref().map_or(0, Tail::bytes);
        match self.place {
            Place::Pinned => TierBytes { device, pinned: stored, file },
            Place::Device => TierBytes { device: device + stored, pinned: 0, file },
        }
    }

    fn device_parts(&self) -> DeviceParts {
        DeviceParts { index: self.index.bytes(), cache: self.cache.bytes() }
    }

    fn count(&mut self, step: &Step<'_>) -> Result<()> {
        self.totals = self.cache.totals(step.backend, step.stream)?;
        let parted = self.pool.as_ref().filter(|_| !self.held.in_order());
        let lost = parted.map(|pool| pool.first_lost(step.backend, step.stream)).transpose()?;
        lost.flatten().into_iter().for_each(|token| self.held.set_lost(token));
        Ok(())
    }

    fn counters(&self) -> KvCounters {
        let (now, before) = (&self.totals, &self.reset_at);
        let (selected, misses) = (now.selected - before.selected, now.missed - before.missed);
        KvCounters {
            selected,
            misses,
            hits: selected - misses,
            corrected: now.corrected - before.corrected,
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
