//! Layers of a store where attention cannot read it: each comes into one of two staging areas, and new entries leave from there.
//!
//! - While a layer is computed, the next one is on its way (FlexGen's order): of a chunk of a prompt everything before it. What
//!   a step brings itself is put into the area directly, and attended exactly in that step, whatever the payload; later
//!   steps see it as it was stored.
//! - From memory a layer lands as soon as it is asked for, on the side stream for fetches; from a file when it is needed.
//!   A prompt's chunks move exact entries by copy engines where the backend has them (`copy_first` in, `copy_from` out),
//!   so that the prompt keeps the multiprocessors.
//! - Events for each area keep the streams apart: the fetch waits until the area has been attended, attention until the
//!   fetch has landed, and new entries until those of the layer before have left.
//!
//! A store that attention reads in place needs none of it, and then nothing happens here. `layer` is that of the store.

use std::ops::Range;
use std::sync::Arc;

use crate::Result;
use crate::backend::{Event, KvGeometry, KvRuns, Move, Rows, StoredRuns};
use crate::kv::{self, Pool, SequenceKv, Store};

use super::Step;

pub(super) struct Staged {
    /// Layer i in the area i mod 2, each as long as one layer of the sequence.
    areas: [SequenceKv; 2],
    /// The area's last attention.
    attended: [Option<Event>; 2],
    /// The area's fetch, where it has been enqueued already.
    landed: [Option<Event>; 2],
    /// The area's entries of a prompt on their way to the store.
    left: [Option<Event>; 2],
}

/// Bytes of both areas for sequences of `tokens` tokens.
pub(super) fn bytes(stored: &KvGeometry, tokens: usize) -> usize {
    let layer = KvGeometry { layers: 1, ..*stored };
    2 * layer.extents(tokens) * layer.extent_bytes()
}

fn in_place(store: &dyn Store, layer: usize) -> bool {
    store.runs(layer).is_some()
}

impl Staged {
    /// Areas without room, for layers of `stored`.
    pub(super) fn new(pool: Arc<Pool>, stored: &KvGeometry) -> Staged {
        let area = || SequenceKv::new(pool.clone(), KvGeometry { layers: 1, ..*stored });
        Staged { areas: [area(), area()], attended: [None, None], landed: [None, None], left: [None, None] }
    }

    /// Makes room for sequences of `tokens` tokens of this store. After an error there may be more room than before.
    pub(super) fn reserve(&mut self, tokens: usize, store: &dyn Store) -> Result<()> {
        let tokens = if in_place(store, 0) { 0 } else { tokens };
        self.areas.iter_mut().try_for_each(|area| area.reserve(tokens))
    }

    /// Gives back the room past the first `tokens` tokens, which nothing uses any more; what was under way is forgotten.
    pub(super) fn truncate(&mut self, tokens: usize) {
        (self.landed, self.left) = ([None, None], [None, None]);
        self.areas.iter_mut().for_each(|area| area.truncate(tokens));
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.areas.iter().map(SequenceKv::bytes).sum()
    }

    /// Starts to bring everything before the step.
    pub(super) fn prefetch(&mut self, step: &Step<'_>, layer: usize, store: &mut dyn Store) -> Result<()> {
        let Step { backend, fetch, position, rows, .. } = *step;
        if position == 0 || in_place(store, layer) {
            return Ok(());
        }
        if !store.in_memory() {
            return store.begin_fetch_first(layer, position);
        }
        let at = layer % 2;
        if let Some(attended) = &self.attended[at] {
            backend.wait(fetch, attended)?;
        }
        let area = &mut self.areas[at].layer_mut(0);
        if rows == 1 || !store.copy_first(backend, fetch, layer, position, area)? {
            store.begin_fetch_first(layer, position)?;
            store.finish_fetch(backend, fetch, layer, area)?;
        }
        self.landed[at] = Some(backend.record(fetch)?);
        Ok(())
    }

    /// Takes the step's entries, for attention and for the store.
    pub(super) fn append(
        &mut self,
        step: &Step<'_>,
        layer: usize,
        keys: Rows<'_>,
        values: Rows<'_>,
        store: &mut dyn Store,
    ) -> Result<()> {
        let Step { backend, stream, fetch, position, rows, .. } = *step;
        let place = kv::Place::From(position);
        if in_place(store, layer) {
            return store.append(backend, stream, layer, keys, values, place);
        }
        let at = layer % 2;
        if let Some(left) = self.left[at].take() {
            backend.wait(stream, &left)?;
        }
        // Behind the rows that the fetch under way writes.
        backend.store_kv(stream, keys, values, &mut self.areas[at].layer_mut(0), position)?;
        if rows > 1 {
            // Those of a prompt leave for the host while the layer goes on.
            let computed = backend.record(stream)?;
            backend.wait(fetch, &computed)?;
            let area = self.areas[at].layer(0);
            if store.copy_from(backend, fetch, layer, &area, position..position + rows)? {
                self.left[at] = Some(backend.record(fetch)?);
                return Ok(());
            }
        }
        store.append(backend, stream, layer, keys, values, place)
    }

    /// Waits for what was before the step.
    pub(super) fn land(&mut self, step: &Step<'_>, layer: usize, store: &mut dyn Store) -> Result<()> {
        if in_place(store, layer) {
            return Ok(());
        }
        match self.landed[layer % 2].take() {
            Some(landed) => step.backend.wait(step.stream, &landed),
            None => {
                let area = &mut self.areas[layer % 2].layer_mut(0);
                store.finish_fetch(step.backend, step.stream, layer, area)
            }
        }
    }

    /// The layer in full, after [`Staged::land`].
    pub(super) fn runs<'a>(&'a self, layer: usize, store: &'a dyn Store) -> KvRuns<'a> {
        store.runs(layer).unwrap_or_else(|| self.areas[layer % 2].layer(0))
    }

    /// As [`Staged::runs`], as a gather reads it; `None` where that is the store itself.
    pub(super) fn entries(&self, layer: usize, store: &dyn Store) -> Option<StoredRuns<'_>> {
        (!in_place(store, layer)).then(|| self.areas[layer % 2].entries(0))
    }

    /// All that reads the layer has been enqueued.
    pub(super) fn attended(&mut self, step: &Step<'_>, layer: usize, store: &dyn Store) -> Result<()> {
        if !in_place(store, layer) {
            self.attended[layer % 2] = Some(step.backend.record(step.stream)?);
        }
        Ok(())
    }

    /// Fetches rows of a layer into the first rows of an area, which is returned.
    pub(super) fn bring(
        &mut self,
        step: &Step<'_>,
        layer: usize,
        store: &mut dyn Store,
        rows: Range<usize>,
    ) -> Result<KvRuns<'_>> {
        let area = &mut self.areas[0];
        area.reserve(rows.len())?;
        let of_head = |head| rows.clone().enumerate().map(move |(to, from)| (head, from as u32, to as u32));
        let heads = 0..area.geometry().kv_heads as u32;
        let moves: Vec<Move> = heads.flat_map(of_head).map(|(head, from, to)| Move { head, from, to }).collect();
        store.begin_fetch(layer, &moves)?;
        store.finish_fetch(step.backend, step.stream, layer, &mut area.layer_mut(0))?;
        Ok(area.layer(0))
    }
}
