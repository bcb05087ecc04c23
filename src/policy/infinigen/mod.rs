//! `infinigen`: attends what speculation selects one layer ahead, and fetches only what is not on the device yet.
//!
//! | where | what |
//! |---|---|
//! | `resident` | the first layers, in full, on the device |
//! | `store` | the entries of all other layers, away from the device |
//! | `index` | a partial key of every entry in the store, on the device |
//! | `cache` | sinks, recent window and the entries selected last, on the device: what attention reads |
//!
//! A prompt is attended in full; each layer's end fills its cache with what the last queries attended most. A step then goes
//! through each layer as `policy::Policy` says: rehearse on the index, ask the cache, fetch the misses, admit the new token,
//! attend. When the layer's own queries are there, a correction may add to what was selected (`correct`). A sequence that fits the cache is attended in full, without speculation.
//!
//! With eviction, store and index hold at most so many tokens, and a new one takes the place of another (`evict`).

mod columns;
mod correct;
mod device;
mod evict;
mod plan;
mod prompt;
mod replay;
mod room;
mod select;
mod tail;
mod traced;

use crate::backend::{
    AttentionShape, Backend, Buffer, IndexBits, IndexGeometry, KvGeometry, KvRuns, Move, Place, Rows, RowsMut,
    Selected, Visible,
};
use crate::kv::{self, Eviction, HotCache, KvTier, Payload, SequenceIndex, SequenceKv, Store};
use crate::{Error, Result};

use super::{
    Ahead, DeviceParts, Effort, KvCounters, Lookahead, Phase, Policy, PolicyOptions, Setting, Step, TierBytes,
    TraceWriter,
};
use correct::Correction;
pub(super) use device::OnDevice;
use evict::Held;
use plan::Plan;
use prompt::Prompt;
use select::Tracing;
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
    /// What looks once more when the true queries have come.
    correction: Option<Correction>,
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
    trace: Option<Tracing>,
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
            correction: plan.corrects().then(|| Correction::new(stored.layers)),
            selected: vec![Selected::default(); stored.layers],
            listed: vec![vec![Vec::new(); geometry.kv_heads]; stored.layers],
            partial_key: backend.allocate(geometry.kv_heads * plan.columns * 4, Place::Device, "partial keys")?,
            moves: Vec::new(),
            counters: KvCounters::default(),
            counted: KvCounters::default(),
            fetched_before: kv::FetchCounters::default(),
            trace: match &options.trace {
                Some(path) => Some(Tracing::new(TraceWriter::create(path, geometry.layers, geometry.kv_heads)?)),
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

    /// Fills the cache of a layer with the best of what was ranked at the end of a prompt, while the layer is here.
    fn load(&mut self, step: &Step<'_>, layer: usize, length: usize) -> Result<()> {
        let (guard, slots) = (self.plan.guard(length), self.plan.slots(length));
        self.moves.clear();
        for (head, ranked) in self.prompt.ranked(step)?.into_iter().enumerate() {
            let ranked = self.plan.first(layer, head, ranked, length);
            let rows = prompt::first_load(&ranked, length, slots, guard);
            self.cache.load(layer, head, &rows, &mut self.moves);
        }
        self.keep_slots(step, layer, None)?;
        let runs = self.prompt.staged.runs(layer, &*self.store);
        step.backend.copy_kv_rows(step.stream, &runs, &mut self.cache.runs_mut(layer), &self.moves)
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
        self.prompt.begin(self.held.begun_tokens());
        self.selected.iter_mut().for_each(|selected| selected.rows.iter_mut().for_each(Vec::clear));
        if let Some(tail) = &mut self.tail {
            tail.begin();
        }
        if let Some(correction) = &mut self.correction {
            correction.begin();
        }
        if let Some(trace) = &mut self.trace {
            trace.begin();
        }
        if let Some(columns) = self.plan.columns_mut() {
            columns.begin();
        }
        self.counted = self.counters;
        Ok(())
    }

    fn prefetch(&mut self, step: &Step<'_>) -> Result<()> {
        match (step.phase, self.stored(step.layer)) {
            (Phase::Prefill { .. }, Some(layer)) => self.prompt.prefetch(step, layer, &mut *self.store),
            (Phase::Decode, _) if step.layer == 0 => {
                self.cache.next_token();
                self.plan.begin(step)
            }
            _ => Ok(()),
        }
    }

    fn lookahead(&self, layer: usize, position: usize) -> Option<Lookahead<'_>> {
        let stored = self.stored(layer)?;
        if self.correction_due(stored) {
            return self.may_correct(stored, position).then(|| self.plan.correction(layer));
        }
        let watched = self.held.count(stored, position) > 0 && self.held.watches(|rows| self.plan.slots(rows));
        (!self.whole(stored, position) || watched).then(|| self.plan.lookahead(layer))
    }

    fn rehearsal(&mut self, layer: usize, position: usize) -> Option<Ahead<'_>> {
        let stored = self.stored(layer)?;
        if self.correction_due(stored) {
            return self.correction(stored, position);
        }
        if self.tail.is_some() {
            // Rows that will give way to this step's misses are among them: few, and used least.
            let mut present = std::mem::take(&mut self.selected[stored].present);
            self.present(stored, position, &mut present);
            self.selected[stored].present = present;
        }
        let rehearsal = self.plan.rehearsal_held(self.index.layer(stored), stored, position, &self.held);
        Some(Ahead::Select(rehearsal, &mut self.selected[stored]))
    }

    fn rehearsed(&mut self, step: &Step<'_>) -> Result<()> {
        match self.stored(step.layer) {
            None => Ok(()),
            Some(layer) if self.correction_due(layer) => self.correct(step, layer),
            Some(layer) => self.select(step, layer),
        }
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
                let index = &mut self.index.layer_mut(layer);
                self.prompt.append(step, layer, [keys, values], &mut self.plan, &mut *self.store, index)
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
            return self.prompt.staged.land(step, layer, &mut *self.store);
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
        if let Some(correction) = &mut self.correction {
            correction.set_due(layer, false);
        }
        if let Some(trace) = &mut self.trace {
            trace.land(step.layer)?;
        }
        self.count_attended(attended, self.kv_heads() * length);
        Ok(())
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        match self.stored(step.layer) {
            None => (self.resident.layer(step.layer), Visible::Causal),
            Some(layer) if step.phase != Phase::Decode => {
                (self.prompt.staged.runs(layer, &*self.store), Visible::Causal)
            }
            Some(layer) if self.listed[layer].iter().all(|list| !list.is_empty()) => {
                (self.cache.runs(layer), Visible::Listed(&self.listed[layer]))
            }
            Some(layer) => (self.cache.runs(layer), Visible::First(self.cache.counts(layer))),
        }
    }

    fn observe(&mut self, step: &Step<'_>, shape: &AttentionShape, queries: Rows<'_>) -> Result<()> {
        let (Some(layer), Phase::Prefill { .. }) = (self.stored(step.layer), step.phase) else {
            return Ok(());
        };
        let (plan, tail) = (&mut self.plan, self.tail.as_mut());
        if self.prompt.observe(step, layer, (shape, queries), plan, tail, &*self.store)? {
            self.load(step, layer, step.position + step.rows)?;
        }
        self.prompt.staged.attended(step, layer, &*self.store)
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
            return self.trace.as_mut().map_or(Ok(()), Tracing::flush);
        }
        if let Some(columns) = self.plan.choosing() {
            columns.choose(step)?;
        }
        if let Some(first) = self.prompt.recent(length) {
            for layer in 0..self.selected.len() {
                self.moves.clear();
                for head in 0..self.kv_heads() {
                    let ranked = self.prompt.take_kept(layer, head);
                    let moves = &mut self.moves;
                    prompt::join(&mut self.cache, &self.plan, (layer, head), ranked, first, length, moves);
                }
                self.fetch_now(step, layer)?;
            }
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
            tail.truncate(step, &mut self.prompt.staged, &mut *self.store, length, self.held.in_order())?;
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

    fn device_parts(&self) -> DeviceParts {
        DeviceParts { index: self.index.bytes(), cache: self.cache.bytes() }
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

/// See `policy::effort`; `whole` is that of layers attended in full, of which there are some.
pub(super) fn effort(options: &PolicyOptions, geometry: &KvGeometry, whole: Effort) -> Effort {
    if geometry.layers < 2 {
        return whole; // no such session can be made
    }
    let own = &options.infinigen;
    let (_, stored) = split(geometry, plan::resident_layers(own, geometry.layers));
    let index = index_geometry(&stored, plan::columns(own, geometry.head_dim), plan::bits(own));
    // A sequence that fits the cache is not rehearsed.
    let rehearsed = plan::slots(own, whole.attended) < whole.attended || options.eviction != Eviction::Off;
    Effort { ranked: prompt::RANKING_QUERIES, index: rehearsed.then_some(index), ..whole }
}

/// Models that this policy cannot serve.
fn unsupported(what: &str) -> Error {
    Error::unsupported(format!("policy infinigen: {what}"))
}
