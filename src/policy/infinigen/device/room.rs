//! Room for a step's tokens, and putting a token into it: what `super::super::room` is for the host's variant.

use crate::backend::{Admission, IndexGeometry, KvGeometry, Rows, SlotGeometry};
use crate::kv::{CacheMut, DeviceCache, DevicePool, Eviction, Guard, Payload, Store};
use crate::policy::{PolicyOptions, Step};
use crate::{ErrorCode, Result};

use super::{OnDevice, plan};

/// Rows of the smallest tables.
const LEAST_ROWS: usize = 1024;

/// Where a token of a layer goes.
pub(super) struct Place {
    layer: usize,
    position: usize,
    /// Slots that the cache may use.
    slots: usize,
    guard: Guard,
    /// Rows that hold tokens before it.
    pub(super) rows: usize,
    /// Whether it takes the row of a victim.
    full: bool,
    /// Tokens before the call.
    begun: usize,
}

impl Place {
    /// The layer's cache, with the pool that its rows are of; for a correction or not.
    pub(super) fn cache<'a>(
        &self,
        cache: &'a mut DeviceCache,
        pool: Option<&'a mut DevicePool>,
        corrects: bool,
    ) -> CacheMut<'a> {
        let mut cache = cache.slots_mut(self.layer, self.slots, self.guard, corrects);
        cache.slots.pool = pool.map(|pool| pool.layer_mut(self.rows, self.position, self.full, self.begun));
        cache
    }
}

impl OnDevice {
    /// Where the token at `position` will go, before the layer has taken it.
    pub(super) fn place(&self, layer: usize, position: usize) -> Place {
        Place {
            layer,
            position,
            slots: self.plan.slots(self.held.after(layer, position)),
            guard: self.plan.guard(position + 1),
            rows: self.held.count(layer, position),
            full: self.held.full(layer),
            begun: self.held.begun_tokens(),
        }
    }

    /// Makes room for a sequence of `length` tokens; returns how many of them the pool will hold. With eviction it holds
    /// fewer where there is no more room. On an error nothing has changed.
    pub(super) fn find_room(&mut self, length: usize) -> Result<usize> {
        let (before, begun) = self.held.now();
        let mut result = Ok(0);
        for rows in self.held.wanted(length, self.resident.geometry().extent_tokens, self.store.capacity())? {
            result = self.make_room(length, rows).map(|()| rows);
            let Err(error) = &result else { break };
            let full = error.code() == ErrorCode::Capacity;
            self.give_back(before, begun);
            if !full {
                break;
            }
        }
        result
    }

    /// Tokens of the resident layers of a sequence of `length` tokens that there is room for.
    fn resident_room(&self, length: usize) -> usize {
        if length == 0 { 0 } else { length.max(self.resident_tokens) }
    }

    /// Makes room for a sequence of `length` tokens of which the pool holds `rows`.
    fn make_room(&mut self, length: usize, rows: usize) -> Result<()> {
        let (tokens, held) = self.held.now();
        self.resident.reserve(self.resident_room(length))?;
        self.index.reserve(rows)?;
        self.cache.reserve(self.plan.slots(rows))?;
        if rows > self.cache.rows() {
            let rows = table_rows(rows, self.capacity);
            let evicts = self.held.evicts();
            let plan = &self.plan;
            let lists =
                (plan.most_rehearsed(rows, evicts), plan.most_corrected(rows), plan.most_attended(rows, evicts));
            self.cache.reserve_tables(&*self.backend, rows, self.plan.slots(rows), lists)?;
        }
        self.store.reserve(rows)?;
        if let Some(pool) = &mut self.pool {
            let lost = (length - tokens) - (rows - held);
            pool.reserve(&*self.backend, lost.min(held))?;
        }
        let prompt = self.held.in_order() && rows > held + 1;
        self.prompt.staged.reserve(if prompt { rows } else { 0 }, &self.store)
    }

    /// Gives back room beyond that of `length` tokens of which the pool holds `rows`.
    pub(super) fn give_back(&mut self, length: usize, rows: usize) {
        self.cache.shrink(if rows == 0 { 0 } else { self.plan.slots(rows) });
        self.prompt.staged.truncate(0);
        if let Some(pool) = &mut self.pool {
            pool.release();
        }
        self.resident.truncate(self.resident_room(length));
        self.index.truncate(rows);
        self.store.truncate(rows);
    }

    /// Takes the new token: into store and index, over victims where the pool is full, and into the cache.
    pub(super) fn admit(&mut self, step: &Step<'_>, layer: usize, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        self.cache.prepare(step.backend, step.stream)?;
        let (heads, place) = (self.kv_heads(), self.place(layer, step.position));
        self.counters.candidates += (heads * place.rows) as u64;
        let row = self.held.take(layer, step.position);
        if row.is_none() {
            self.counters.evicted += heads as u64;
        }
        let CacheMut { mut slots, entries, saved } = place.cache(&mut self.cache, self.pool.as_mut(), false);
        slots.by_list = self.by_list[layer];
        let admission = Admission {
            row: row.unwrap_or(0),
            slots,
            store: self.store.entries_mut(layer),
            cache: entries,
            saved,
            index: self.index.layer_mut(layer),
            maps: self.plan.key_maps(step.layer),
            mean: self.tail.as_mut().map(|tail| tail.next_mean(layer, step.position)),
        };
        step.backend.admit(step.stream, keys, values, admission)
    }
}

/// Rows of the tables of a pool of `rows` rows, which are at most `capacity`: they grow seldom, because that takes a while,
/// and not directly after a prompt.
fn table_rows(rows: usize, capacity: usize) -> usize {
    (rows + LEAST_ROWS / 2).next_power_of_two().max(LEAST_ROWS).min(capacity)
}

/// Bytes that the tables of a full session of up to `rows` rows take, and what a step that is undone brings back.
pub(in crate::policy::infinigen) fn table_bytes(
    options: &PolicyOptions,
    stored: &KvGeometry,
    index: &IndexGeometry,
    rows: usize,
) -> usize {
    let (own, evicts) = (&options.infinigen, options.eviction != Eviction::Off);
    let (slots, selected) = (plan::slots(own, rows), plan::most_rehearsed(own, rows, evicts));
    let lists = if options.trace.is_some() { stored.layers } else { 1 };
    let attended = plan::most_attended(own, rows, evicts);
    let &KvGeometry { layers, kv_heads, .. } = stored;
    let corrected = plan::most_corrected(own, rows);
    let tables = SlotGeometry { layers, kv_heads, slots, rows, selected, lists, corrected, attended };
    let exact = options.payload == Payload::Exact;
    let saved = if exact { 0 } else { DeviceCache::saved_bytes(stored, selected, corrected) };
    let pool = if evicts { DevicePool::bytes_of(stored, options.payload, index, rows) } else { 0 };
    tables.bytes() + saved + pool
}
