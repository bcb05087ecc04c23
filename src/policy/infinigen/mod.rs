//! `infinigen`: attends what speculation selects one layer ahead, and fetches only what is not on the device yet.
//!
//! | where | what |
//! |---|---|
//! | `resident` | the first layers, in full, on the device |
//! | `store` | the entries of all other layers, away from the device |
//! | `index` | a partial key of every entry in the store, on the device |
//! | `cache` | sinks, recent window and the entries selected last, on the device: what attention reads |
//!
//! A prompt is attended in full; its end fills the cache with what its last queries attended most. A step then goes
//! through each layer as `policy::Policy` says: rehearse on the index, ask the cache, fetch the misses, admit the new token,
//! attend. A sequence that fits the cache is attended in full, without speculation.
//!
//! With eviction, store and index hold at most so many tokens, and a new one takes the place of another (`evict`).

mod columns;
mod device;
mod evict;
mod plan;
mod prompt;
mod room;
mod tail;
mod traced;

use crate::backend::{
    AttentionShape, Backend, Buffer, IndexBits, IndexGeometry, KvGeometry, KvRuns, Move, Place, Rows, RowsMut,
    Selected, Visible,
};
use crate::kv::{self, Eviction, HotCache, KvTier, Payload, SequenceIndex, SequenceKv, Store};
use crate::{Error, Result};

use super::{
    Ahead, KvCounters, Lookahead, Phase, Policy, PolicyOptions, Record, Setting, Step, TierBytes, TraceWriter,
};
pub(super) use device::OnDevice;
use evict::Held;
use plan::Plan;
use prompt::Prompt;
use tail::Tail;

pub(super) struct Infinigen {
    plan: Plan,
    held: Held,
    /// Tokens that the resident layers take room for at once, 0 for as many as there are: a session that evicts must not
    /// find their room taken by its own pool.
    resident_tokens: usize,
    /// Whether the store gives back the bits that it was given.
    exact: bool,
    resident: SequenceKv,
    store: Box<dyn Store>,
    index: SequenceIndex,
    cache: HotCache,
    prompt: Prompt,
    /// What stands for the entries that are not attended.
    tail: Option<Tail>,
    /// What each layer of the store selects in this step.
    selected: Vec<Selected>,
    /// Slots that each layer of the store attends in this step, where that is not the whole cache.
    listed: Vec<Vec<Vec<u32>>>,
    /// One row of partial keys.
    partial_key: Buffer,
    moves: Vec<Move>,
    counters: KvCounters,
    /// Our counters when this step began: a step that fails counts nothing.
    counted: KvCounters,
    /// The store's counters when ours were last reset.
    fetched_before: kv::FetchCounters,
    trace: Option<TraceWriter>,
}

impl Infinigen {
    pub(super) fn new(options: &PolicyOptions, setting: Setting) -> Result<Infinigen> {
        super::refuse_window("infinigen", &setting)?;
        let plan = Plan::new(options, &setting)?;
        let Setting { backend, pool, geometry, heads, capacity, .. } = setting;
        let (resident, stored) = split(&geometry, plan.resident_layers);
        let (rows, _) = plan::full_rows(options, capacity);
        let index = index_geometry(&stored, plan.columns, plan.bits);
        Ok(Infinigen {
            resident: SequenceKv::new(pool.clone(), resident),
            store: kv::store(&pool, &backend, stored, options.payload, &options.tier, rows)?,
            index: SequenceIndex::new(pool.clone(), index),
            cache: HotCache::new(pool.clone(), stored),
            prompt: Prompt::new(pool, stored),
            tail: if plan.tail { Some(Tail::new(&*backend, &stored, heads)?) } else { None },
            selected: vec![Selected::default(); stored.layers],
            listed: vec![vec![Vec::new(); geometry.kv_heads]; stored.layers],
            partial_key: backend.allocate(geometry.kv_heads * plan.columns * 4, Place::Device, "partial keys")?,
            moves: Vec::new(),
            counters: KvCounters::default(),
            counted: KvCounters::default(),
            fetched_before: kv::FetchCounters::default(),
            trace: match &options.trace {
                Some(path) => Some(TraceWriter::create(path, geometry.layers, geometry.kv_heads)?),
                None => None,
            },
            held: Held::new(options, plan::least_rows(&options.infinigen), &stored),
            exact: options.payload == Payload::Exact,
            resident_tokens: if options.eviction == Eviction::Off { 0 } else { capacity },
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

    /// Slots of a layer for the token at `position`.
    fn slots(&self, layer: usize, position: usize) -> usize {
        self.plan.slots(self.held.after(layer, position))
    }

    /// Whether a layer attends all that it will hold with the token at `position`, whether it is rehearsed or not.
    fn whole(&self, layer: usize, position: usize) -> bool {
        let (past, after) = (self.held.count(layer, position), self.held.after(layer, position));
        self.plan.slots(after) == after && self.cache.counts(layer).iter().all(|&count| count as usize == past)
    }

    /// Starts and ends a fetch of `self.moves`, which are of tokens, into the cache.
    fn fetch_now(&mut self, step: &Step<'_>, layer: usize) -> Result<()> {
        if !self.moves.is_empty() {
            self.held.locate(layer, &mut self.moves);
            self.keep_slots(step, layer, None)?;
            self.store.begin_fetch(layer, &self.moves)?;
            self.store.finish_fetch(step.backend, step.stream, layer, &mut self.cache.runs_mut(layer))?;
        }
        Ok(())
    }

    /// Slots of what was selected, of sinks and window, and of the token itself.
    fn list(&mut self, layer: usize, length: usize) {
        let guard = self.plan.guard(length);
        let past = 0..length as u32;
        for head in 0..self.kv_heads() {
            let list = &mut self.listed[layer][head];
            list.clear();
            let always = past.clone().take(guard.below as usize).chain(guard.from.max(guard.below)..past.end);
            let selected = self.selected[layer].rows[head].iter().copied();
            let current = (guard.from > past.end - 1).then_some(past.end - 1);
            for row in always.chain(selected).chain(current) {
                list.extend(self.cache.slot(layer, head, row));
            }
            list.sort_unstable();
            list.dedup();
        }
    }

    fn count_attended(&mut self, attended: u64, held: usize) {
        self.counters.attended += attended;
        self.counters.held += held as u64;
    }
}

impl Policy for Infinigen {
    fn reserve(&mut self, length: usize) -> Result<()> {
        let rows = self.find_room(length)?;
        self.held.begin(rows);
        self.store.begin(self.held.begun_rows());
        self.index.begin(self.held.begun_rows());
        self.cache.begin();
        self.prompt.begin();
        self.selected.iter_mut().for_each(|selected| selected.rows.iter_mut().for_each(Vec::clear));
        if let Some(tail) = &mut self.tail {
            tail.begin();
        }
        if let Some(columns) = self.plan.columns_mut() {
            columns.begin();
        }
        self.counted = self.counters;
        Ok(())
    }

    fn prefetch(&mut self, step: &Step<'_>) -> Result<()> {
        if step.layer == 0 && step.phase == Phase::Decode {
            self.cache.next_token();
        }
        Ok(())
    }

    fn lookahead(&self, layer: usize, position: usize) -> Option<Lookahead<'_>> {
        let stored = self.stored(layer)?;
        let watched = self.held.count(stored, position) > 0 && self.held.watches(|rows| self.plan.slots(rows));
        (!self.whole(stored, position) || watched).then(|| self.plan.lookahead(layer))
    }

    fn rehearsal(&mut self, layer: usize, position: usize) -> Option<Ahead<'_>> {
        let stored = self.stored(layer)?;
        let rehearsal = self.plan.rehearsal_held(self.index.layer(stored), stored, position, &self.held);
        let in_slots = self.plan.attend_cache || self.whole(stored, position);
        let selected = &mut self.selected[stored];
        if self.tail.is_some() {
            // Rows that will give way to this step's misses are among them: few, and used least.
            let guard = self.plan.guard(position + 1);
            let always = (0..guard.below.min(guard.from)).chain(guard.from..position as u32);
            selected.present.resize_with(self.cache.counts(stored).len(), Vec::new);
            for (head, present) in selected.present.iter_mut().enumerate() {
                present.clear();
                match in_slots {
                    true => present.extend(self.cache.rows(stored, head)),
                    false => present.extend(always.clone()),
                }
                self.held.rows_of(stored, head, present);
            }
        }
        Some(Ahead::Select(rehearsal, selected))
    }

    fn rehearsed(&mut self, step: &Step<'_>) -> Result<()> {
        let Some(layer) = self.stored(step.layer) else { return Ok(()) };
        let (guard, slots) = (self.plan.guard(step.position + 1), self.slots(layer, step.position));
        let past = self.held.count(layer, step.position);
        if let Some(tail) = &mut self.tail {
            tail.rehearsed_by_host(step, layer, &self.selected[layer].tail)?;
        }
        self.moves.clear();
        for head in 0..self.kv_heads() {
            let tokens = &mut self.selected[layer].rows[head];
            self.held.selected(layer, head, tokens, guard);
            // In the order of their rows, which is that of a fetch.
            let missed = self.cache.request(layer, head, tokens, slots, guard, &mut self.moves);
            tokens.sort_unstable();
            self.counters.selected += tokens.len() as u64;
            self.counters.misses += missed as u64;
            self.counters.hits += (tokens.len() - missed) as u64;
            if let Some(trace) = &mut self.trace {
                let mut missed: Vec<u32> = self.moves[self.moves.len() - missed..].iter().map(|m| m.from).collect();
                missed.sort_unstable();
                trace.write(&Record {
                    position: step.position as u32,
                    layer: step.layer as u16,
                    head: head as u16,
                    candidates: past as u32,
                    selected: tokens.clone(),
                    missed,
                })?;
            }
        }
        self.held.locate(layer, &mut self.moves);
        self.keep_slots(step, layer, None)?;
        if self.moves.is_empty() { Ok(()) } else { self.store.begin_fetch(layer, &self.moves) }
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        let Some(layer) = self.stored(step.layer) else {
            let runs = &mut self.resident.layer_mut(step.layer);
            return step.backend.store_kv(step.stream, keys, values, runs, step.position);
        };
        if let (Some(tail), Phase::Decode) = (&mut self.tail, step.phase) {
            tail.append(step, layer, values)?;
        }
        match step.phase {
            Phase::Decode => self.append_one(step, layer, keys, values),
            Phase::Prefill { .. } => {
                self.held.extend(layer, step.rows);
                self.store.append(step.backend, step.stream, layer, keys, values, kv::Place::From(step.position))?;
                if let Some(columns) = self.plan.columns_mut().filter(|columns| !columns.chosen()) {
                    columns.add(step, keys)?;
                }
                let maps = self.plan.key_maps(step.layer);
                self.prompt.index(step, keys, maps, &mut self.index.layer_mut(layer))
            }
        }
    }

    fn land(&mut self, step: &Step<'_>) -> Result<()> {
        let length = step.position + step.rows;
        let Some(layer) = self.stored(step.layer) else {
            if step.phase == Phase::Decode {
                self.count_attended((self.kv_heads() * length) as u64, self.kv_heads() * length);
            }
            return Ok(());
        };
        if step.phase != Phase::Decode {
            return self.prompt.land(step, layer, &mut *self.store);
        }
        self.store.finish_fetch(step.backend, step.stream, layer, &mut self.cache.runs_mut(layer))?;
        let mut attended: u64 = self.cache.counts(layer).iter().map(|&count| u64::from(count)).sum();
        if !self.plan.attend_cache && attended < (self.kv_heads() * self.held.count(layer, length)) as u64 {
            self.list(layer, length);
            attended = self.listed[layer].iter().map(|list| list.len() as u64).sum();
        } else {
            self.listed[layer].iter_mut().for_each(Vec::clear);
        }
        self.selected[layer].rows.iter_mut().for_each(Vec::clear);
        self.count_attended(attended, self.kv_heads() * length);
        Ok(())
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        match self.stored(step.layer) {
            None => (self.resident.layer(step.layer), Visible::Causal),
            Some(layer) if step.phase != Phase::Decode => (self.prompt.runs(layer, &*self.store), Visible::Causal),
            Some(layer) if self.listed[layer].iter().all(|list| !list.is_empty()) => {
                (self.cache.runs(layer), Visible::Listed(&self.listed[layer]))
            }
            Some(layer) => (self.cache.runs(layer), Visible::First(self.cache.counts(layer))),
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
        if let Some(tail) = &mut self.tail {
            let length = step.position + step.rows;
            tail.blend_runs(step, layer, self.prompt.runs(layer, &*self.store), length, 1.0)?;
        }
        let most = self.plan.ranked(step.position + step.rows);
        self.prompt.observe(step, (layer, most), shape, queries, &*self.store)
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
            self.counters.steps += step.rows as u64;
            return self.trace.as_mut().map_or(Ok(()), TraceWriter::flush);
        }
        let recent = self.prompt.recent(step.position, step.rows);
        if let Some(columns) = self.plan.columns_mut().filter(|columns| !columns.chosen()) {
            columns.choose(step)?;
        }
        for layer in 0..self.selected.len() {
            self.moves.clear();
            for head in 0..self.kv_heads() {
                let ranked = self.prompt.take_ranked(layer, head);
                let moves = &mut self.moves;
                prompt::fill(&mut self.cache, &self.plan, (layer, head), ranked, recent, length, moves);
            }
            self.fetch_now(step, layer)?;
        }
        self.prompt.finish();
        Ok(())
    }

    fn roll_back(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        self.store.abandon_fetches();
        self.prompt.roll_back();
        if let Some(tail) = &mut self.tail {
            tail.roll_back();
        }
        self.counters = self.counted;
        if let Some(columns) = self.plan.columns_mut() {
            columns.roll_back();
        }
        self.held.undo();
        self.store.undo(step.backend, step.stream)?;
        self.index.undo(step.backend, step.stream)?;
        for layer in 0..self.selected.len() {
            self.moves.clear();
            self.cache.undo(layer, &mut self.moves);
            if self.exact {
                self.fetch_now(step, layer)?;
            }
        }
        self.cache.restore(step.backend, step.stream)?;
        self.give_back(length, self.held.count(0, length));
        Ok(())
    }

    fn can_truncate(&self, length: usize) -> Result<()> {
        self.held.can_truncate(length)
    }

    fn truncate(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        if let Some(tail) = &mut self.tail {
            tail.truncate(step, &mut self.prompt, &mut *self.store, length, self.held.in_order())?;
        }
        self.cache.begin();
        self.held.truncate(length);
        for layer in 0..self.selected.len() {
            self.moves.clear();
            self.cache.truncate(layer, length as u32, &mut self.moves);
            self.fetch_now(step, layer)?;
            self.moves.clear();
            let heads = self.kv_heads();
            prompt::restock(&mut self.cache, &self.plan, layer, heads, length, &mut self.moves);
            self.fetch_now(step, layer)?;
        }
        self.cache.begin();
        self.resident.truncate(self.resident_room(length));
        self.index.truncate(length);
        self.store.truncate(length);
        Ok(())
    }

    fn prefills(&self, position: usize, tokens: usize) -> usize {
        self.held.in_full(position, tokens)
    }

    fn bytes(&self) -> TierBytes {
        let (host, file) = self.store.bytes();
        let device = self.resident.bytes() + self.index.bytes() + self.cache.bytes() + self.prompt.bytes();
        let device = device + self.tail.as_ref().map_or(0, Tail::bytes);
        TierBytes { device, pinned: host, file }
    }

    fn counters(&self) -> KvCounters {
        let (now, before) = (self.store.counters(), self.fetched_before);
        KvCounters {
            host_bytes: now.host_bytes - before.host_bytes,
            file_bytes: now.file_bytes - before.file_bytes,
            file_read_bytes: now.file_read_bytes - before.file_read_bytes,
            read_seconds: now.read_seconds - before.read_seconds,
            wait_seconds: now.wait_seconds - before.wait_seconds,
            ..self.counters
        }
    }

    fn reset_counters(&mut self) {
        self.counters = KvCounters::default();
        self.fetched_before = self.store.counters();
    }
}

/// Shapes of the layers that stay on the device, and of those in the store.
fn split(geometry: &KvGeometry, resident_layers: usize) -> (KvGeometry, KvGeometry) {
    let of = |layers: usize| KvGeometry { layers, ..*geometry };
    (of(resident_layers), of(geometry.layers - resident_layers))
}

fn index_geometry(stored: &KvGeometry, columns: usize, bits: IndexBits) -> IndexGeometry {
    let &KvGeometry { layers, kv_heads, extent_tokens, .. } = stored;
    IndexGeometry { layers, kv_heads, columns, extent_tokens, bits }
}

/// What [`Policy::bytes`] will say, at most, of a session of `capacity` tokens when it is full.
pub(super) fn estimate(
    options: &PolicyOptions,
    backend: &dyn Backend,
    geometry: &KvGeometry,
    capacity: usize,
) -> TierBytes {
    if geometry.layers < 2 {
        return TierBytes::default(); // no such session can be made
    }
    let own = &options.infinigen;
    let (resident, stored) = split(geometry, plan::resident_layers(own, geometry.layers));
    let index = index_geometry(&stored, plan::columns(own, geometry.head_dim), plan::bits(own));
    let (rows, resident_tokens) = plan::full_rows(options, capacity);
    let (host, file) = kv::store_bytes(&stored, options.payload, &options.tier, rows);
    let device = resident.extents(resident_tokens) * resident.extent_bytes()
        + index.extents(rows) * index.extent_bytes()
        + stored.extents(plan::slots(own, rows)) * stored.extent_bytes()
        + if own.tail && backend.has_tail() { tail::bytes(&stored) } else { 0 };
    if !backend.selects_on_device() {
        return TierBytes { device, pinned: host, file };
    }
    let device = device + device::table_bytes(options, &stored, &index, rows);
    if options.tier == KvTier::Host {
        TierBytes { device, pinned: host, file }
    } else {
        TierBytes { device: device + host, pinned: 0, file }
    }
}

/// Models that this policy cannot serve.
fn unsupported(what: &str) -> Error {
    Error::unsupported(format!("policy infinigen: {what}"))
}
