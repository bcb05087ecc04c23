//! The correction: a second look when a layer's own queries have come (ALGORITHM.md §7.8).
//!
//! The rehearsal has selected by predicted queries, a layer ahead. Between the layer's projection and its attention the
//! true queries go through the same index and the same rule; of what they pick and the step does not attend yet, each KV
//! head gets the best rows, at most a share of the tokens. They are fetched while the layer waits, so a correction costs
//! the time of a rehearsal and of its fetches, which nothing hides. With a tail, the tail's weight becomes that of the true
//! queries as well.
//!
//! Where the device selects, it does all of this by itself (`device`, `backend::Correction`).
//!
//! To the engine a correction is the rehearsal of a policy that asks for the layer's own queries; that it is the second
//! one of the layer is known here.

use crate::Result;
use crate::backend::Selected;
use crate::policy::{Ahead, Step};

use super::Infinigen;

pub(super) struct Correction {
    /// Layers of the store that have been rehearsed and not corrected yet.
    due: Vec<bool>,
    /// What a correction finds, one layer after another.
    found: Selected,
}

impl Correction {
    pub(super) fn new(layers: usize) -> Correction {
        Correction { due: vec![false; layers], found: Selected::default() }
    }

    /// A step begins.
    pub(super) fn begin(&mut self) {
        self.due.fill(false);
    }

    /// Sets whether the layer's next rehearsal is a correction.
    pub(super) fn set_due(&mut self, layer: usize, due: bool) {
        self.due[layer] = due;
    }
}

impl Infinigen {
    /// Whether the layer's next rehearsal is a correction.
    pub(super) fn correction_due(&self, layer: usize) -> bool {
        self.correction.as_ref().is_some_and(|correction| correction.due[layer])
    }

    /// Whether a correction might find anything.
    pub(super) fn may_correct(&self, layer: usize, position: usize) -> bool {
        let past = self.held.count(layer, position);
        let all_here = self.cache.counts(layer).iter().all(|&count| count as usize == past);
        self.plan.may_correct(layer, position, &self.held, all_here)
    }

    /// The rehearsal that corrects a layer.
    pub(super) fn correction(&mut self, layer: usize, position: usize) -> Option<Ahead<'_>> {
        let mut present = std::mem::take(&mut self.correction.as_mut()?.found.present);
        self.present(layer, position, &mut present);
        let found = &mut self.correction.as_mut()?.found;
        found.present = present;
        found.most_absent.clear();
        let selected = &self.selected[layer].rows;
        let correction = self.plan.correction_held(layer, position, &self.held);
        let most = |rows: &Vec<u32>| correction.most_beside(rows.len());
        found.most_absent.extend(selected.iter().map(most));
        Some(Ahead::Select(self.plan.rehearsal_held(self.index.layer(layer), layer, position, &self.held), found))
    }

    /// The correction has been rehearsed: what it has found joins what was selected.
    pub(super) fn correct(&mut self, step: &Step<'_>, layer: usize) -> Result<()> {
        let Some(correction) = &mut self.correction else { return Ok(()) };
        correction.set_due(layer, false);
        let mut found = std::mem::take(&mut correction.found);
        self.moves.clear();
        for (head, rows) in found.rows.iter_mut().enumerate() {
            self.request(step, layer, head, rows, true);
            let selected = &mut self.selected[layer].rows[head];
            selected.extend_from_slice(rows);
            selected.sort_unstable();
        }
        if let Some(tail) = &mut self.tail {
            std::mem::swap(&mut self.selected[layer].tail, &mut found.tail);
            tail.rehearsed_by_host(step, layer, &self.selected[layer].tail)?;
        }
        if let Some(correction) = &mut self.correction {
            correction.found = found;
        }
        if self.moves.is_empty() {
            return Ok(());
        }
        // A layer has one fetch under way at a time.
        self.store.finish_fetch(step.backend, step.stream, layer, &mut self.cache.runs_mut(layer))?;
        self.begin_fetch(step, layer)
    }
}
