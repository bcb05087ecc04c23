//! Entries of which some are dropped for good: slots on the device, and which entry of each KV head lies in which.
//!
//! - While a prompt runs, all of it is held ([`Kept::prompt`]); [`Kept::keep`] then copies what stays into slots, and the
//!   rest is given back.
//! - Afterwards every token takes a free slot ([`Kept::admit`]), before which others may have been dropped
//!   ([`Kept::drop_entry`]). What was there when a step began is not overwritten before the next step begins, so that a
//!   step that fails is undone by restoring the lists alone.
//! - While nothing has been dropped, the token at position p lies in slot p: attention may read the slots as it reads any
//!   sequence.

use std::sync::Arc;

use crate::Result;
use crate::backend::{Backend, KvGeometry, KvRuns, KvRunsMut, Move, Stream};

use super::{Pool, SequenceKv};

/// Entries of one KV head, in the order of their tokens.
#[derive(Debug, Default, PartialEq)]
pub struct Entries {
    rows: Vec<u32>,
    slots: Vec<u32>,
    weights: Vec<f64>,
}

impl Entries {
    /// Position of each entry's token, ascending.
    pub fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// Where each entry lies.
    pub fn slots(&self) -> &[u32] {
        &self.slots
    }

    /// What the policy has added up for each entry.
    pub fn weights(&self) -> &[f64] {
        &self.weights
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// Entries of one KV head and the slots that have none.
#[derive(Debug, Default)]
struct Table {
    entries: Entries,
    /// Slots that may be written.
    free: Vec<u32>,
    /// Slots of entries that this step has dropped: free when the next one begins.
    dropped: Vec<u32>,
    /// Slots that have ever been in use: those from here on are free too.
    used: u32,
}

impl Table {
    fn copy_from(&mut self, other: &Table) {
        self.entries.rows.clone_from(&other.entries.rows);
        self.entries.slots.clone_from(&other.entries.slots);
        self.entries.weights.clone_from(&other.entries.weights);
        self.free.clone_from(&other.free);
        self.dropped.clone_from(&other.dropped);
        self.used = other.used;
    }

    fn push(&mut self, row: u32, weight: f64) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.used += 1;
            self.used - 1
        });
        self.entries.rows.push(row);
        self.entries.slots.push(slot);
        self.entries.weights.push(weight);
        slot
    }

    fn truncate(&mut self, length: u32) {
        self.free.append(&mut self.dropped);
        let entries = &mut self.entries;
        let keep = entries.rows.partition_point(|&row| row < length);
        self.free.extend(entries.slots[keep..].iter().rev());
        entries.rows.truncate(keep);
        entries.slots.truncate(keep);
        entries.weights.truncate(keep);
        // Slots behind the last one in use need not be listed; without any drop that is all of the free ones.
        self.used = entries.slots.iter().max().map_or(0, |&slot| slot + 1);
        let used = self.used;
        self.free.retain(|&slot| slot < used);
    }
}

/// A table, and what it was before this step.
#[derive(Debug, Default)]
struct Undoable {
    now: Table,
    before: Table,
    changed: bool,
}

impl Undoable {
    /// The table, for changing it.
    fn change(&mut self) -> &mut Table {
        if !self.changed {
            self.before.copy_from(&self.now);
            self.changed = true;
        }
        &mut self.now
    }
}

/// Entries that one sequence keeps.
pub struct Kept {
    geometry: KvGeometry,
    slots: SequenceKv,
    prompt: SequenceKv,
    /// One for each KV head, layer after layer; a single one where all keep the same.
    tables: Vec<Undoable>,
    /// Tokens of the sequence, those of the step under way not included.
    length: usize,
}

impl Kept {
    /// No entries yet. `shared`: every KV head of every layer keeps the entries of the same tokens.
    pub fn new(pool: Arc<Pool>, geometry: KvGeometry, shared: bool) -> Kept {
        let tables = if shared { 1 } else { geometry.layers * geometry.kv_heads };
        Kept {
            geometry,
            slots: SequenceKv::new(pool.clone(), geometry),
            prompt: SequenceKv::new(pool, geometry),
            tables: (0..tables).map(|_| Undoable::default()).collect(),
            length: 0,
        }
    }

    /// The shape of the extents.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Slots of each KV head of a full sequence that keeps `most` entries: those, and one that the next token takes before
    /// another is free.
    pub const fn slots_of(most: usize) -> usize {
        most.saturating_add(1)
    }

    /// Begins a step to `length` tokens, in which no KV head keeps more than `most`. On an error nothing has changed.
    pub fn reserve(&mut self, length: usize, most: usize) -> Result<()> {
        let new = length - self.length;
        // Tokens that are admitted and dropped in the same step leave their slots at once; others only after it.
        let held = self.tables.iter().map(|table| table.now.entries.len()).max().unwrap_or(0);
        if self.length == 0 {
            self.prompt.reserve(length)?;
        }
        if let Err(error) = self.slots.reserve(held + new.min(most)) {
            self.prompt.truncate(0);
            return Err(error);
        }
        for Undoable { now, changed, .. } in &mut self.tables {
            now.free.append(&mut now.dropped);
            *changed = false;
        }
        Ok(())
    }

    /// Tokens of a prompt that there is room for.
    pub fn prompt_capacity(&self) -> usize {
        self.prompt.layer(0).capacity()
    }

    /// A layer of the prompt, token after token.
    pub fn prompt(&self, layer: usize) -> KvRuns<'_> {
        self.prompt.layer(layer)
    }

    /// As [`Kept::prompt`], for writing.
    pub fn prompt_mut(&mut self, layer: usize) -> KvRunsMut<'_> {
        self.prompt.layer_mut(layer)
    }

    /// The slots of a layer.
    pub fn runs(&self, layer: usize) -> KvRuns<'_> {
        self.slots.layer(layer)
    }

    /// As [`Kept::runs`], for writing.
    pub fn runs_mut(&mut self, layer: usize) -> KvRunsMut<'_> {
        self.slots.layer_mut(layer)
    }

    fn at(&self, layer: usize, head: usize) -> usize {
        if self.tables.len() == 1 { 0 } else { layer * self.geometry.kv_heads + head }
    }

    /// What a KV head keeps.
    pub fn entries(&self, layer: usize, head: usize) -> &Entries {
        &self.tables[self.at(layer, head)].now.entries
    }

    /// Drops the entry that is the `index`-th of its KV head.
    pub fn drop_entry(&mut self, layer: usize, head: usize, index: usize) {
        let (at, begun) = (self.at(layer, head), self.length as u32);
        let table = self.tables[at].change();
        let row = table.entries.rows.remove(index);
        let slot = table.entries.slots.remove(index);
        table.entries.weights.remove(index);
        if row < begun { &mut table.dropped } else { &mut table.free }.push(slot);
    }

    /// Gives the token at position `row`, the newest, a slot.
    pub fn admit(&mut self, layer: usize, head: usize, row: u32) -> u32 {
        let at = self.at(layer, head);
        self.tables[at].change().push(row, 0.0)
    }

    /// Adds to the weights of a KV head's entries, in their order.
    pub fn weigh(&mut self, layer: usize, head: usize, weights: impl Iterator<Item = f64>) {
        let at = self.at(layer, head);
        let entries = &mut self.tables[at].change().entries;
        entries.weights.iter_mut().zip(weights).for_each(|(weight, more)| *weight += more);
    }

    /// Ends a prompt: each KV head keeps the entries that `choose` names (ascending position, and weight), which are copied
    /// to slots.
    pub fn keep(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        mut choose: impl FnMut(usize, usize) -> Vec<(u32, f64)>,
    ) -> Result<()> {
        let mut moves: Vec<Move> = Vec::new();
        let heads = self.geometry.kv_heads;
        for layer in 0..self.geometry.layers {
            moves.clear();
            for head in 0..heads {
                let at = self.at(layer, head);
                let table = self.tables[at].change();
                if at == layer * heads + head {
                    table.truncate(0);
                    for (row, weight) in choose(layer, head) {
                        table.push(row, weight);
                    }
                }
                let entries = table.entries.rows.iter().zip(&table.entries.slots);
                moves.extend(entries.map(|(&from, &to)| Move { head: head as u32, from, to }));
            }
            backend.copy_kv_rows(stream, &self.prompt.layer(layer), &mut self.slots.layer_mut(layer), &moves)?;
        }
        Ok(())
    }

    /// The step has succeeded: the sequence has `length` tokens.
    pub fn commit(&mut self, length: usize) {
        self.prompt.truncate(0);
        self.length = length;
    }

    /// The step has failed: as it was before, with `length` tokens.
    pub fn undo(&mut self, length: usize) {
        for Undoable { now, before, changed } in &mut self.tables {
            if std::mem::take(changed) {
                std::mem::swap(now, before);
            }
        }
        self.end(length);
    }

    /// Forgets every token from `length` on.
    pub fn truncate(&mut self, length: usize) {
        for table in &mut self.tables {
            table.changed = false;
            table.now.truncate(length as u32);
        }
        self.end(length);
    }

    fn end(&mut self, length: usize) {
        let used = self.tables.iter().map(|table| table.now.used).max().unwrap_or(0);
        self.slots.truncate(used as usize);
        self.commit(length);
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.slots.bytes() + self.prompt.bytes()
    }
}
