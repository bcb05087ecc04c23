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

mod columns;
mod plan;
mod prompt;
mod tail;

use crate::backend::{
    AttentionShape, Buffer, IndexBits, IndexGeometry, KvGeometry, KvRuns, Move, Place, Rehearsal, Rows, RowsMut,
    Selected, Visible,
};
use crate::kv::{self, HotCache, SequenceIndex, SequenceKv, Store};
use crate::{Error, Result};

use super::{KvCounters, Lookahead, Phase, Policy, PolicyOptions, Record, Setting, Step, TierBytes, TraceWriter};
use plan::Plan;
use prompt::Prompt;
use tail::Tail;

pub(super) struct Infinigen {
    plan: Plan,
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
        let Setting { backend, pool, geometry, capacity, .. } = setting;
        let (resident, stored) = split(&geometry, plan.resident_layers);
        let index = index_geometry(&stored, plan.columns, plan.bits);
        Ok(Infinigen {
            resident: SequenceKv::new(pool.clone(), resident),
            store: kv::store(&pool, &backend, stored, options.payload, &options.tier, capacity)?,
            index: SequenceIndex::new(pool.clone(), index),
            cache: HotCache::new(pool.clone(), stored),
            prompt: Prompt::new(pool, stored),
            tail: if plan.tail { Some(Tail::new(&*backend, &stored)?) } else { None },
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

    /// Starts and ends a fetch of `self.moves` into the cache.
    fn fetch_now(&mut self, step: &Step<'_>, layer: usize) -> Result<()> {
        if !self.moves.is_empty() {
            self.store.begin_fetch(layer, &self.moves)?;
            self.store.finish_fetch(step.backend, step.stream, layer, &mut self.cache.runs_mut(layer))?;
        }
        Ok(())
    }

    /// Admits the new token, and lists what is attended where that is not all of the cache.
    fn append_one(&mut self, step: &Step<'_>, layer: usize, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        let (length, heads) = (step.position + 1, self.kv_heads());
        let (guard, slots) = (self.plan.guard(length), self.plan.slots(length));
        let row = step.position as u32;
        let admitted: Vec<u32> = (0..heads).map(|head| self.cache.admit(layer, head, row, slots, guard)).collect();
        step.backend.store_kv_rows(step.stream, keys, values, &mut self.cache.runs_mut(layer), &admitted)?;

        let partial = self.partial_key.rows_mut(step.backend.activation(), 1, heads * self.plan.columns);
        step.backend.project_heads(step.stream, keys, self.plan.key_maps(step.layer), partial)?;
        let partial = self.partial_key.rows(step.backend.activation(), 1, heads * self.plan.columns);
        step.backend.index_append(step.stream, partial, &mut self.index.layer_mut(layer), step.position)
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

    /// Takes the values of every token from `length` on out of the tail's means.
    fn truncate_tail(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        let Some(tail) = &mut self.tail else { return Ok(()) };
        let forgotten = (step.position + step.rows).saturating_sub(length);
        tail.begin();
        if forgotten > 0 && length > 0 {
            // By reading what is forgotten, from the end on, or what stays, whichever is less.
            let goes = forgotten < length;
            let (first, end) = if goes { (length, length + forgotten) } else { (0, length) };
            for layer in 0..self.selected.len() {
                for at in (first..end).step_by(kv::EXTENT_TOKENS) {
                    let rows = kv::EXTENT_TOKENS.min(end - at);
                    let begin = if goes { end - (at - first) - rows } else { at };
                    let runs = self.prompt.bring(step, layer, &mut *self.store, begin..begin + rows)?;
                    let factor = if goes { -(rows as f32) / begin as f32 } else { rows as f32 / (begin + rows) as f32 };
                    tail.blend_runs(step, layer, runs, rows, factor)?;
                }
            }
            tail.commit();
            tail.begin();
            self.prompt.finish();
        }
        Ok(())
    }

    fn count_attended(&mut self, attended: u64, held: usize) {
        self.counters.attended += attended;
        self.counters.held += held as u64;
    }
}

impl Policy for Infinigen {
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.resident.reserve(length)?;
        self.index.reserve(length)?;
        self.cache.reserve(self.plan.slots(length))?;
        self.store.reserve(length)?;
        self.cache.begin();
        self.prompt.begin();
        if let Some(tail) = &mut self.tail {
            tail.begin();
        }
        if let Some(columns) = self.plan.columns_mut() {
            columns.begin();
        }
        self.counted = self.counters;
        Ok(())
    }

    fn lookahead(&self, layer: usize, position: usize) -> Option<Lookahead<'_>> {
        let stored = self.stored(layer)?;
        let all_here = self.cache.counts(stored).iter().all(|&count| count as usize == position);
        let fits = position < self.plan.slots(position + 1);
        (!(all_here && fits)).then(|| self.plan.lookahead(layer))
    }

    fn rehearsal(&mut self, layer: usize, position: usize) -> Option<(Rehearsal<'_>, &mut Selected)> {
        let stored = self.stored(layer)?;
        let rehearsal = self.plan.rehearsal(self.index.layer(stored), position);
        let selected = &mut self.selected[stored];
        if self.tail.is_some() {
            // Rows that will give way to this step's misses are among them: few, and used least.
            let heads = self.cache.counts(stored).len();
            selected.present.resize_with(heads, Vec::new);
            for (head, present) in selected.present.iter_mut().enumerate() {
                present.clear();
                if self.plan.attend_cache {
                    present.extend(self.cache.rows(stored, head));
                } else {
                    present.extend((0..rehearsal.from as u32).chain(rehearsal.to as u32..rehearsal.rows as u32));
                }
            }
        }
        Some((rehearsal, selected))
    }

    fn rehearsed(&mut self, step: &Step<'_>) -> Result<()> {
        let Some(layer) = self.stored(step.layer) else { return Ok(()) };
        let length = step.position + 1;
        let (guard, slots) = (self.plan.guard(length), self.plan.slots(length));
        if let Some(tail) = &mut self.tail {
            tail.rehearsed(layer);
        }
        self.moves.clear();
        for head in 0..self.kv_heads() {
            let rows = &self.selected[layer].rows[head];
            let missed = self.cache.request(layer, head, rows, slots, guard, &mut self.moves);
            self.counters.selected += rows.len() as u64;
            self.counters.misses += missed as u64;
            self.counters.hits += (rows.len() - missed) as u64;
            if let Some(trace) = &mut self.trace {
                trace.write(&Record {
                    position: step.position as u32,
                    layer: step.layer as u16,
                    head: head as u16,
                    candidates: step.position as u32,
                    selected: rows.clone(),
                    missed: self.moves[self.moves.len() - missed..].iter().map(|m| m.from).collect(),
                })?;
            }
        }
        if self.moves.is_empty() { Ok(()) } else { self.store.begin_fetch(layer, &self.moves) }
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        let Some(layer) = self.stored(step.layer) else {
            let runs = &mut self.resident.layer_mut(step.layer);
            return step.backend.store_kv(step.stream, keys, values, runs, step.position);
        };
        self.store.append(step.backend, step.stream, layer, keys, values, kv::Place::From(step.position))?;
        if let (Some(tail), Phase::Decode) = (&mut self.tail, step.phase) {
            tail.append(step, layer, values)?;
        }
        match step.phase {
            Phase::Decode => self.append_one(step, layer, keys, values),
            Phase::Prefill { .. } => {
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
        if !self.plan.attend_cache && attended < (self.kv_heads() * length) as u64 {
            self.list(layer, length);
            attended = self.listed[layer].iter().map(|list| list.len() as u64).sum();
        } else {
            self.listed[layer].iter_mut().for_each(Vec::clear);
        }
        self.counters.candidates += (self.kv_heads() * step.position) as u64;
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
        self.prompt.observe(step, layer, shape, queries, &*self.store)
    }

    fn complete(&mut self, step: &Step<'_>, attended: RowsMut<'_>) -> Result<()> {
        match (self.stored(step.layer), &self.tail) {
            (Some(layer), Some(tail)) => tail.add(step, layer, &self.selected[layer].tail, attended),
            _ => Ok(()),
        }
    }

    fn commit(&mut self, step: &Step<'_>) -> Result<()> {
        let length = step.position + step.rows;
        if let Some(tail) = &mut self.tail {
            tail.commit();
        }
        if step.phase == Phase::Decode && !self.prompt.ended() {
            self.counters.steps += 1;
            return self.trace.as_mut().map_or(Ok(()), TraceWriter::flush);
        }
        let (guard, slots) = (self.plan.guard(length), self.plan.slots(length));
        let recent = self.prompt.recent(step.position, step.rows);
        if let Some(columns) = self.plan.columns_mut().filter(|columns| !columns.chosen()) {
            columns.choose()?;
        }
        for layer in 0..self.selected.len() {
            self.moves.clear();
            for head in 0..self.kv_heads() {
                let ranked = self.prompt.take_ranked(layer, head);
                match recent {
                    // A few tokens after a sequence that has its cache: they join it, with what they attended most.
                    Some(first) => {
                        let room = slots.saturating_sub(guard.below as usize + 1);
                        let from = first.min(guard.from as usize).max(length.saturating_sub(room));
                        let most = self.plan.most_selected(length).min(room - (length - from).min(room));
                        let mut rows: Vec<u32> = ranked.into_iter().take(most).collect();
                        rows.extend(from as u32..length as u32);
                        rows.sort_unstable();
                        rows.dedup();
                        self.cache.request(layer, head, &rows, slots, guard, &mut self.moves);
                    }
                    None => {
                        let rows = prompt::first_load(&ranked, length, slots, guard);
                        self.cache.load(layer, head, &rows, &mut self.moves);
                    }
                }
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
        for layer in 0..self.selected.len() {
            self.moves.clear();
            self.cache.undo(layer, &mut self.moves);
            self.fetch_now(step, layer)?;
        }
        self.cache.shrink();
        self.resident.truncate(length);
        self.index.truncate(length);
        self.store.truncate(length);
        Ok(())
    }

    fn truncate(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        self.truncate_tail(step, length)?;
        self.cache.begin();
        for layer in 0..self.selected.len() {
            self.moves.clear();
            self.cache.truncate(layer, length as u32, &mut self.moves);
            self.fetch_now(step, layer)?;
            // The window has moved back, over entries that may have left the cache; and what fits it is there in full.
            self.moves.clear();
            let (guard, slots) = (self.plan.guard(length), self.plan.slots(length + 1));
            let sinks = if length < slots { length as u32 } else { guard.below.min(length as u32) };
            let always: Vec<u32> = (0..sinks).chain(guard.from.max(sinks)..length as u32).collect();
            for head in 0..self.kv_heads() {
                self.cache.request(layer, head, &always, slots, guard, &mut self.moves);
            }
            self.fetch_now(step, layer)?;
        }
        self.cache.begin();
        self.resident.truncate(length);
        self.index.truncate(length);
        self.store.truncate(length);
        Ok(())
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
pub(super) fn estimate(options: &PolicyOptions, geometry: &KvGeometry, capacity: usize) -> TierBytes {
    if geometry.layers < 2 {
        return TierBytes::default(); // no such session can be made
    }
    let own = &options.infinigen;
    let (resident, stored) = split(geometry, plan::resident_layers(own, geometry.layers));
    let index = index_geometry(&stored, plan::columns(own, geometry.head_dim), plan::bits(own));
    let (host, file) = kv::store_bytes(&stored, options.payload, &options.tier, capacity);
    let device = resident.extents(capacity) * resident.extent_bytes()
        + index.extents(capacity) * index.extent_bytes()
        + stored.extents(plan::slots(own, capacity)) * stored.extent_bytes()
        + if own.tail { tail::bytes(&stored) } else { 0 };
    TierBytes { device, pinned: host, file }
}

/// Models that this policy cannot serve.
fn unsupported(what: &str) -> Error {
    Error::unsupported(format!("policy infinigen: {what}"))
}
