//! Room for a step's tokens, and putting a token into it.

use crate::backend::Rows;
use crate::kv;
use crate::policy::Step;
use crate::{ErrorCode, Result};

use super::Infinigen;
use super::evict::Room;

impl Infinigen {
    /// Makes room for a sequence of `length` tokens; returns how many of them the pool will hold. With eviction it holds
    /// fewer where there is no more room. On an error nothing has changed.
    pub(super) fn find_room(&mut self, length: usize) -> Result<usize> {
        let (before, begun) = self.held.now();
        let mut result = Ok(0);
        for rows in self.held.wanted(length, self.resident.geometry().extent_tokens, self.store.capacity())? {
            result = self.make_room(length, rows).map(|()| rows);
            match &result {
                Ok(_) => break,
                Err(error) => {
                    let full = error.code() == ErrorCode::Capacity;
                    self.give_back(before, begun);
                    if !full {
                        break;
                    }
                }
            }
        }
        result
    }

    /// Tokens of the resident layers of a sequence of `length` tokens that there is room for.
    pub(super) fn resident_room(&self, length: usize) -> usize {
        if length == 0 { 0 } else { length.max(self.resident_tokens) }
    }

    /// Makes room for a sequence of `length` tokens of which the pool holds `rows`.
    fn make_room(&mut self, length: usize, rows: usize) -> Result<()> {
        self.resident.reserve(self.resident_room(length))?;
        self.index.reserve(rows)?;
        self.cache.reserve(self.plan.slots(rows))?;
        self.store.reserve(rows)?;
        let prompt = self.held.in_order() && rows > self.held.now().1 + 1;
        self.prompt.staged.reserve(if prompt { rows } else { 0 }, &*self.store)
    }

    /// Gives back room beyond that of `length` tokens of which the pool holds `rows`.
    pub(super) fn give_back(&mut self, length: usize, rows: usize) {
        self.cache.shrink();
        self.prompt.staged.truncate(0);
        self.resident.truncate(self.resident_room(length));
        self.index.truncate(rows);
        self.store.truncate(rows);
    }

    /// Keeps what lies in the cache where `admitted` or else `self.moves` will go, for a step that is undone, where the
    /// store could not give it back.
    pub(super) fn keep_slots(&mut self, step: &Step<'_>, layer: usize, admitted: Option<&[u32]>) -> Result<()> {
        if self.exact || self.held.began_empty() {
            return Ok(());
        }
        let (backend, stream) = (step.backend, step.stream);
        match admitted {
            Some(slots) => self.cache.keep(backend, stream, layer, (0..).zip(slots.iter().copied())),
            None => self.cache.keep(backend, stream, layer, self.moves.iter().map(|m| (m.head, m.to))),
        }
    }

    /// Takes the new token: into store and index, over victims where the pool is full, and into the cache.
    pub(super) fn append_one(&mut self, step: &Step<'_>, layer: usize, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        let (backend, stream, heads) = (step.backend, step.stream, self.kv_heads());
        let past = self.held.count(layer, step.position);
        self.counters.candidates += (heads * past) as u64;
        let (guard, slots) = (self.plan.guard(step.position + 1), self.slots(layer, step.position));

        let partial = self.partial_key.rows_mut(backend.activation(), 1, heads * self.plan.columns);
        backend.project_heads(stream, keys, self.plan.key_maps(step.layer), partial)?;
        let partial = self.partial_key.rows(backend.activation(), 1, heads * self.plan.columns);
        let token = step.position as u32;
        let admitted: Vec<u32> = match self.held.place(layer, step.position, guard, &self.selected[layer].rows) {
            Room::New(row) => {
                self.store.append(backend, stream, layer, keys, values, kv::Place::From(row))?;
                backend.index_append(stream, partial, &mut self.index.layer_mut(layer), row)?;
                (0..heads).map(|head| self.cache.admit(layer, head, token, slots, guard)).collect()
            }
            Room::Over(rows, victims) => {
                self.counters.evicted += heads as u64;
                self.store.append(backend, stream, layer, keys, values, kv::Place::Rows(rows))?;
                self.index.overwrite(backend, stream, layer, partial, rows)?;
                let over = |head| self.cache.admit_over(layer, head, victims[head], token, slots, guard);
                (0..heads).map(over).collect()
            }
        };
        self.keep_slots(step, layer, Some(&admitted))?;
        backend.store_kv_rows(stream, keys, values, &mut self.cache.runs_mut(layer), &admitted)
    }
}
