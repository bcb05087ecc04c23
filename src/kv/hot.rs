//! The hot cache: a fixed number of slots on the device for each layer and KV head, which hold the entries used last.
//!
//! - A step asks for what it selected ([`HotCache::request`]): entries that are there are marked as used, those that
//!   are not take the slots of the entries unused for longest, and come back as a list of moves for the store's fetch.
//!   What this step has used, and what the [`Guard`] names, never gives way.
//! - Every change of a step is written down, so that a step that fails is undone exactly ([`HotCache::undo`]): the
//!   contents are part of what a later step attends.
//! - Which slot holds what is kept here; the entries themselves lie in [`HotCache::runs`].

use std::sync::Arc;

use crate::Result;
use crate::backend::{Backend, Guard, KvGeometry, KvRuns, KvRunsMut, Move, Slot, Stream};

use super::overwritten::Overwritten;
use super::{Pool, SequenceKv, SlotTable};

/// Slots of every layer and KV head of one sequence.
pub struct HotCache {
    kv: SequenceKv,
    kv_heads: usize,
    tables: Vec<Table>,
    /// Slots in use, layer by layer, head by head: what `Visible::First` takes.
    counts: Vec<u32>,
    /// The number of this token.
    clock: u32,
    /// That of the first token of this step.
    begun: u32,
    /// Entries that this step overwrites, where they are kept ([`HotCache::keep`]).
    overwritten: Overwritten,
    /// What the search for victims works in, and has found.
    search: Search,
}

/// Scratch of [`Table::victims`].
#[derive(Default)]
struct Search {
    /// Oldest use of each block of slots, and the same sorted as far as needed.
    oldest: Vec<u32>,
    sorted: Vec<u32>,
    /// Last use and slot in one number.
    found: Vec<u64>,
}

/// Slots whose oldest use is looked for together.
const BLOCK: usize = 64;

/// Slots of one layer and KV head.
#[derive(Default)]
struct Table {
    slots: SlotTable,
    /// Step in which each slot was used last.
    used: Vec<u32>,
    /// What this step has changed, in order.
    journal: Vec<Change>,
    /// Rows and their last use before this step filled the table anew.
    replaced: Option<(SlotTable, Vec<u32>)>,
}

enum Change {
    Used { slot: u32, before: u32 },
    Pushed,
    Replaced { slot: u32, row: u32, used: u32 },
}

impl HotCache {
    /// An empty cache. `geometry.layers` are the layers that it serves.
    pub fn new(pool: Arc<Pool>, geometry: KvGeometry) -> HotCache {
        let tables = geometry.layers * geometry.kv_heads;
        HotCache {
            kv: SequenceKv::new(pool, geometry),
            kv_heads: geometry.kv_heads,
            tables: (0..tables).map(|_| Table::default()).collect(),
            counts: vec![0; tables],
            clock: 1,
            begun: 1,
            overwritten: Overwritten::new(geometry.row_bytes()),
            search: Search::default(),
        }
    }

    /// Makes room for `slots` slots a layer and KV head. On an error nothing has changed.
    pub fn reserve(&mut self, slots: usize) -> Result<()> {
        self.kv.reserve(slots)
    }

    /// Gives back the room past the slots in use.
    pub fn shrink(&mut self) {
        let used = self.counts.iter().copied().max().unwrap_or(0);
        self.kv.truncate(used as usize);
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.kv.bytes()
    }

    /// A new step begins; the last one can no longer be undone.
    pub fn begin(&mut self) {
        self.clock += 1;
        self.begun = self.clock;
        self.overwritten.clear();
        for table in &mut self.tables {
            table.journal.clear();
            table.replaced = None;
        }
    }

    /// The step goes on with another token: what the last one has used may give way.
    pub fn next_token(&mut self) {
        self.clock += 1;
    }

    /// The entries of a layer.
    pub fn runs(&self, layer: usize) -> KvRuns<'_> {
        self.kv.layer(layer)
    }

    /// The entries of a layer, for writing.
    pub fn runs_mut(&mut self, layer: usize) -> KvRunsMut<'_> {
        self.kv.layer_mut(layer)
    }

    /// Slots in use of each KV head of a layer.
    pub fn counts(&self, layer: usize) -> &[u32] {
        &self.counts[layer * self.kv_heads..(layer + 1) * self.kv_heads]
    }

    /// Where a row lies.
    pub fn slot(&self, layer: usize, head: usize, row: u32) -> Option<u32> {
        self.tables[layer * self.kv_heads + head].slots.slot(row)
    }

    /// Rows that are here, in the order of their slots.
    pub fn rows(&self, layer: usize, head: usize) -> &[u32] {
        self.tables[layer * self.kv_heads + head].slots.rows()
    }

    /// The step in which each slot was used last.
    pub(super) fn used(&self, layer: usize, head: usize) -> &[u32] {
        &self.tables[layer * self.kv_heads + head].used
    }

    /// Makes a table what it was elsewhere: the rows in its slots, and their last use.
    pub(super) fn set(&mut self, layer: usize, head: usize, rows: &[u32], used: &[u32]) {
        let at = layer * self.kv_heads + head;
        let mut table = Table { used: used.to_vec(), ..Table::default() };
        for &row in rows {
            table.slots.push(row);
        }
        self.tables[at] = table;
        self.counts[at] = rows.len() as u32;
    }

    /// The number of this step.
    pub(super) fn clock(&self) -> u32 {
        self.clock
    }

    /// Sets the number of this step.
    pub(super) fn set_clock(&mut self, clock: u32) {
        self.clock = clock;
    }

    /// Marks `rows` (ascending) as used by this step and gives those that are not here a slot: `moves` gets what must be
    /// fetched, ascending. Returns the number of them. `slots` is the most that the table may use, and is enough
    /// for what is guarded, `rows`, and one more.
    pub fn request(
        &mut self,
        layer: usize,
        head: usize,
        rows: &[u32],
        slots: usize,
        guard: Guard,
        moves: &mut Vec<Move>,
    ) -> usize {
        let (at, clock, begun) = (layer * self.kv_heads + head, self.clock, self.begun);
        let table = &mut self.tables[at];
        let first = moves.len();
        for &row in rows {
            match table.slots.slot(row) {
                Some(slot) => table.touch(slot, clock, begun),
                None => moves.push(Move { head: head as u32, from: row, to: u32::MAX }),
            }
        }
        let missed = moves.len() - first;
        if missed > 0 {
            let pushed = missed.min(slots.saturating_sub(table.slots.len()));
            for m in &mut moves[first..first + pushed] {
                m.to = table.push(m.from, clock);
            }
            let rest = &mut moves[first + pushed..];
            table.victims(rest.len(), clock, guard, &mut self.search);
            let found = &self.search.found;
            assert!(found.len() >= rest.len(), "fewer slots than what is guarded and selected");
            for (m, &victim) in rest.iter_mut().zip(found) {
                m.to = victim as u32;
                table.replace(m.to, m.from, clock);
            }
            self.counts[at] = table.slots.len() as u32;
        }
        missed
    }

    /// Gives the new token's row a slot, which is returned.
    pub fn admit(&mut self, layer: usize, head: usize, row: u32, slots: usize, guard: Guard) -> u32 {
        let (at, clock) = (layer * self.kv_heads + head, self.clock);
        let table = &mut self.tables[at];
        if let Some(slot) = table.slots.slot(row) {
            table.touch(slot, clock, self.begun);
            return slot;
        }
        if table.slots.len() < slots {
            self.counts[at] += 1;
            return table.push(row, clock);
        }
        table.victims(1, clock, guard, &mut self.search);
        let victim = *self.search.found.first().expect("one slot more than what is guarded and selected") as u32;
        table.replace(victim, row, clock);
        victim
    }

    /// Gives the new token's row the slot of the row that it replaces in the store, if that has one, and otherwise any.
    #[allow(clippy::too_many_arguments, reason = "each is one thing")]
    pub fn admit_over(&mut self, layer: usize, head: usize, victim: u32, row: u32, slots: usize, guard: Guard) -> u32 {
        let table = &mut self.tables[layer * self.kv_heads + head];
        match table.slots.slot(victim) {
            Some(slot) => {
                table.replace(slot, row, self.clock);
                slot
            }
            None => self.admit(layer, head, row, slots, guard),
        }
    }

    /// Keeps the entries in slots (KV head, slot) that are about to be overwritten. Needed where the store would not give
    /// back the same bits: an entry that was admitted is exact, also where the store has it quantized.
    pub fn keep(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        slots: impl Iterator<Item = (u32, u32)>,
    ) -> Result<()> {
        let KvGeometry { kv_heads, extent_tokens, .. } = *self.kv.geometry();
        for (head, slot) in slots {
            let (extent, at) = (slot as usize / extent_tokens, slot as usize % extent_tokens);
            let row = (layer * kv_heads + head as usize) * extent_tokens + at;
            let place = Slot { buffer: extent, offset: row * self.kv.geometry().row_bytes() };
            self.overwritten.save(backend, stream, self.kv.buffers(), place)?;
        }
        Ok(())
    }

    /// Brings back all entries that this step has kept, in place of the fetches that [`HotCache::undo`] asks for.
    pub fn restore(&mut self, backend: &dyn Backend, stream: &Stream) -> Result<()> {
        self.overwritten.restore(backend, stream, self.kv.buffers_mut())
    }

    /// Takes back what this step has changed in a layer. `moves` gets the entries that must be fetched once more.
    pub fn undo(&mut self, layer: usize, moves: &mut Vec<Move>) {
        for head in 0..self.kv_heads {
            let at = layer * self.kv_heads + head;
            let table = &mut self.tables[at];
            let first = moves.len();
            let mut changed = Vec::new();
            if let Some((slots, used)) = table.replaced.take() {
                changed.extend(0..slots.len() as u32);
                *table = Table { slots, used, ..Table::default() };
            }
            while let Some(change) = table.journal.pop() {
                match change {
                    Change::Used { slot, before } => table.used[slot as usize] = before,
                    Change::Pushed => {
                        table.slots.pop();
                        table.used.pop();
                    }
                    Change::Replaced { slot, row, used } => {
                        table.slots.replace(slot, row);
                        table.used[slot as usize] = used;
                        changed.push(slot);
                    }
                }
            }
            // A step of several tokens may have changed a slot more than once, or taken it only to replace it.
            changed.sort_unstable();
            changed.dedup();
            let rows = table.slots.rows();
            let fetched = changed.into_iter().filter_map(|to| rows.get(to as usize).map(|&from| (from, to)));
            moves.extend(fetched.map(|(from, to)| Move { head: head as u32, from, to }));
            moves[first..].sort_unstable_by_key(|m| m.from);
            self.counts[at] = table.slots.len() as u32;
        }
    }

    /// Fills a table anew with `rows`, the most valuable first, and `moves` with what must be fetched for it.
    pub fn load(&mut self, layer: usize, head: usize, rows: &[u32], moves: &mut Vec<Move>) {
        let at = layer * self.kv_heads + head;
        let table = &mut self.tables[at];
        let (slots, used) = (std::mem::take(&mut table.slots), std::mem::take(&mut table.used));
        *table = Table { replaced: Some((slots, used)), ..Table::default() };
        self.clock = self.clock.max(rows.len() as u32 + 1);
        let first = moves.len();
        for (i, &row) in rows.iter().enumerate() {
            let to = table.slots.push(row);
            table.used.push((rows.len() - i) as u32);
            moves.push(Move { head: head as u32, from: row, to });
        }
        moves[first..].sort_unstable_by_key(|m| m.from);
        self.counts[at] = rows.len() as u32;
    }

    /// Forgets every row from `length` on. `moves` gets the entries that change slots, to be fetched once more.
    pub fn truncate(&mut self, layer: usize, length: u32, moves: &mut Vec<Move>) {
        for head in 0..self.kv_heads {
            let at = layer * self.kv_heads + head;
            let table = &mut self.tables[at];
            table.journal.clear();
            table.replaced = None;
            let mut changed = Vec::new();
            for slot in (0..table.slots.len() as u32).rev() {
                if table.slots.rows()[slot as usize] >= length {
                    table.used.swap_remove(slot as usize);
                    changed.extend(table.slots.swap_remove(slot));
                }
            }
            changed.sort_unstable();
            changed.dedup();
            let slots = &table.slots;
            moves.extend(
                changed
                    .into_iter()
                    .filter_map(|row| slots.slot(row).map(|to| Move { head: head as u32, from: row, to })),
            );
            self.counts[at] = table.slots.len() as u32;
        }
    }
}

impl Table {
    /// Only the first use in a step, which began at `begun`, is worth a note: it is what the step is undone to.
    fn touch(&mut self, slot: u32, clock: u32, begun: u32) {
        let before = std::mem::replace(&mut self.used[slot as usize], clock);
        if before < begun {
            self.journal.push(Change::Used { slot, before });
        }
    }

    fn push(&mut self, row: u32, clock: u32) -> u32 {
        self.used.push(clock);
        self.journal.push(Change::Pushed);
        self.slots.push(row)
    }

    fn replace(&mut self, slot: u32, row: u32, clock: u32) {
        let used = std::mem::replace(&mut self.used[slot as usize], clock);
        let row = self.slots.replace(slot, row);
        self.journal.push(Change::Replaced { slot, row, used });
    }

    /// The `count` slots unused for longest, of equals the lower ones, into `search.found`, in ascending order of slots.
    ///
    /// There are thousands of slots and few victims, every step and KV head, so most slots are only compared: the
    /// `count`-th oldest of the blocks' oldest uses is a bound, for as many slots are at least as old.
    fn victims(&self, count: usize, clock: u32, guard: Guard, search: &mut Search) {
        let Search { oldest, sorted, found } = search;
        found.clear();
        if count == 0 {
            return;
        }
        // Never the use of a slot that may give way.
        let never = u32::MAX;
        let age = |used: u32, row: u32| if (used < clock) & !guard.protects(row) { used } else { never };
        let blocks = || self.used.chunks(BLOCK).zip(self.slots.rows().chunks(BLOCK));
        oldest.clear();
        for (used, rows) in blocks() {
            let mut least = never;
            for (&used, &row) in used.iter().zip(rows) {
                least = least.min(age(used, row));
            }
            oldest.push(least);
        }
        let bound = if count <= oldest.len() {
            sorted.clone_from(oldest);
            *sorted.select_nth_unstable(count - 1).1
        } else {
            never
        };
        for (block, (used, rows)) in blocks().enumerate().filter(|&(block, _)| oldest[block] <= bound) {
            for (i, (&used, &row)) in used.iter().zip(rows).enumerate() {
                let age = age(used, row);
                if age <= bound && age != never {
                    found.push(u64::from(age) << 32 | (block * BLOCK + i) as u64);
                }
            }
        }
        if count < found.len() {
            found.select_nth_unstable(count);
            found.truncate(count);
        }
        found.sort_unstable_by_key(|&victim| victim as u32);
    }
}
