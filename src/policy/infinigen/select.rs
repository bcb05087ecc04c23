//! What a step attends beside sinks and window: what the rehearsal of a layer has selected, and a correction added to it.

use crate::Result;
use crate::policy::{Record, Step, TraceWriter};

use super::Infinigen;

/// The trace of a session: a record is written when its layer lands, because until then a correction may add to it.
pub(super) struct Tracing {
    writer: TraceWriter,
    pending: Vec<Record>,
}

impl Tracing {
    pub(super) fn new(writer: TraceWriter) -> Tracing {
        Tracing { writer, pending: Vec::new() }
    }

    /// A step begins.
    pub(super) fn begin(&mut self) {
        self.pending.clear();
    }

    /// Notes what a KV head has selected, or what a correction adds to it.
    fn note(&mut self, record: Record) {
        let same = |other: &&mut Record| (other.layer, other.head) == (record.layer, record.head);
        match self.pending.iter_mut().find(same) {
            None => self.pending.push(record),
            Some(before) => {
                let join = |before: &mut Vec<u32>, more: &[u32]| {
                    before.extend_from_slice(more);
                    before.sort_unstable();
                };
                join(&mut before.selected, &record.selected);
                join(&mut before.missed, &record.missed);
                join(&mut before.corrected, &record.corrected);
            }
        }
    }

    /// Writes what has been noted of a layer of the model.
    pub(super) fn land(&mut self, layer: usize) -> Result<()> {
        let Tracing { writer, pending } = self;
        pending.extract_if(.., |record| usize::from(record.layer) == layer).try_for_each(|record| writer.write(&record))
    }

    /// Hands everything that was written to the operating system.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.writer.flush()
    }
}

impl Infinigen {
    /// The rows of the index that the token at `position` attends for certain, for each KV head: what is on the device,
    /// or else sinks, window and what this step has selected so far.
    pub(super) fn present(&self, layer: usize, position: usize, present: &mut Vec<Vec<u32>>) {
        let guard = self.plan.guard(position + 1);
        let always = (0..guard.below.min(guard.from)).chain(guard.from..position as u32);
        present.resize_with(self.kv_heads(), Vec::new);
        for (head, present) in present.iter_mut().enumerate() {
            present.clear();
            if self.plan.attend_cache || self.whole(layer, position) {
                present.extend(self.cache.rows(layer, head));
            } else {
                let selected = self.selected[layer].rows.get(head).into_iter().flatten();
                present.extend(always.clone().chain(selected.copied()));
            }
            self.held.rows_of(layer, head, present);
        }
    }

    /// The rehearsal of a layer has selected: asks the cache, and starts to fetch what it lacks.
    pub(super) fn select(&mut self, step: &Step<'_>, layer: usize) -> Result<()> {
        if let Some(tail) = &mut self.tail {
            tail.rehearsed_by_host(step, layer, &self.selected[layer].tail)?;
        }
        self.moves.clear();
        for head in 0..self.kv_heads() {
            let mut rows = std::mem::take(&mut self.selected[layer].rows[head]);
            self.request(step, layer, head, &mut rows, false);
            self.selected[layer].rows[head] = rows;
        }
        if let Some(correction) = &mut self.correction {
            correction.set_due(layer, true);
        }
        self.begin_fetch(step, layer)
    }

    /// Marks rows of the index as used by this step, and adds what the cache lacks to `self.moves`. The rows become
    /// their tokens, ascending. `corrects`: they were not selected before the layer's own queries came.
    pub(super) fn request(&mut self, step: &Step<'_>, layer: usize, head: usize, rows: &mut Vec<u32>, corrects: bool) {
        let (guard, slots) = (self.plan.guard(step.position + 1), self.slots(layer, step.position));
        self.held.selected(layer, head, rows, guard);
        // In the order of their rows, which is that of a fetch.
        let missed = self.cache.request(layer, head, rows, slots, guard, &mut self.moves);
        rows.sort_unstable();
        self.counters.selected += rows.len() as u64;
        self.counters.misses += missed as u64;
        self.counters.hits += (rows.len() - missed) as u64;
        if corrects {
            self.counters.corrected += rows.len() as u64;
        }
        if let Some(trace) = &mut self.trace {
            let mut missed: Vec<u32> = self.moves[self.moves.len() - missed..].iter().map(|m| m.from).collect();
            missed.sort_unstable();
            trace.note(Record {
                position: step.position as u32,
                layer: step.layer as u16,
                head: head as u16,
                candidates: self.held.count(layer, step.position) as u32,
                selected: rows.clone(),
                missed,
                corrected: if corrects { rows.clone() } else { Vec::new() },
            });
        }
    }

    /// Starts to fetch `self.moves`, which are of tokens, into the cache. What is in memory needs no waiting, and is there at
    /// once.
    pub(super) fn begin_fetch(&mut self, step: &Step<'_>, layer: usize) -> Result<()> {
        self.held.locate(layer, &mut self.moves);
        self.keep_slots(step, layer, None)?;
        if self.moves.is_empty() {
            return Ok(());
        }
        self.store.begin_fetch(layer, &self.moves)?;
        if self.store.in_memory() {
            let runs = &mut self.cache.runs_mut(layer);
            self.store.finish_fetch(step.backend, step.stream, layer, runs)?;
        }
        Ok(())
    }

    /// Starts and ends a fetch of `self.moves`.
    pub(super) fn fetch_now(&mut self, step: &Step<'_>, layer: usize) -> Result<()> {
        if self.moves.is_empty() {
            return Ok(());
        }
        self.begin_fetch(step, layer)?;
        self.store.finish_fetch(step.backend, step.stream, layer, &mut self.cache.runs_mut(layer))
    }

    /// Slots of what was selected, of sinks and window, and of the token itself.
    pub(super) fn list(&mut self, layer: usize, length: usize) {
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
}
