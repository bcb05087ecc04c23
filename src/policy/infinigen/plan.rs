//! What a session's options mean for its model: which weights predict, which maps index, how many rows and slots.

use std::sync::Arc;

use crate::backend::{Correction, HeadMaps, IndexBits, IndexRuns, Rehearsal, Selection};
use crate::kv::{Eviction, Guard};
use crate::policy::{
    Budget, IndexBasis, InfinigenOptions, Lookahead, Phase, PolicyOptions, Predictor, QuerySource, Rule, Setting, Step,
};
use crate::speculate::{IndexMaps, Speculation};
use crate::{Error, Result};

use super::columns::Columns;
use super::evict::Held;
use super::replay::Trace;
use super::unsupported;

pub(super) struct Plan {
    options: InfinigenOptions,
    pub(super) resident_layers: usize,
    /// Columns of the index.
    pub(super) columns: usize,
    pub(super) bits: IndexBits,
    pub(super) attend_cache: bool,
    /// Whether what is not attended has a part of the attention.
    pub(super) tail: bool,
    scale: f32,
    speculation: Arc<Speculation>,
    basis: Basis,
    /// What is replayed, and the KV heads of the session.
    trace: Option<(Trace, usize)>,
}

enum Basis {
    /// The leading rows of the balanced maps, by layer of the model.
    Balanced(Arc<Vec<Option<IndexMaps>>>),
    /// All columns of an orthogonal basis in the index, of which queries use those, or combinations, that the prompt has chosen.
    Chosen(Columns),
}

impl Plan {
    pub(super) fn new(options: &PolicyOptions, setting: &Setting) -> Result<Plan> {
        let own = options.infinigen.clone();
        let (layers, d) = (setting.geometry.layers, setting.geometry.head_dim);
        if layers < 2 {
            return Err(unsupported("the model has one layer, and none before it to speculate from"));
        }
        let resident_layers = resident_layers(&own, layers);
        let speculation = setting
            .speculation
            .clone()
            .ok_or_else(|| Error::invalid_argument("policy infinigen needs a calibrated model"))?;
        let chosen = chosen_columns(&own, d);
        let basis = match own.basis {
            IndexBasis::Balanced => Basis::Balanced(speculation.balanced(chosen)?),
            basis => Basis::Chosen(Columns::new(setting, &speculation, resident_layers, basis, chosen)?),
        };
        let trace = match (&own.rule, &own.replay) {
            (Rule::Replay { .. }, Some(path)) => {
                let stored = layers - resident_layers;
                Some((Trace::read(path, &*setting.backend, stored, own.sinks, own.window)?, setting.geometry.kv_heads))
            }
            _ => None,
        };
        Ok(Plan {
            trace,
            resident_layers,
            columns: columns(&own, d),
            bits: bits(&own),
            attend_cache: own.attend_cache,
            tail: own.tail && !matches!(own.rule, Rule::Paper { .. }) && setting.backend.has_tail(),
            scale: setting.scale,
            speculation,
            basis,
            options: own,
        })
    }

    /// The maps of the keys of a layer of the model.
    pub(super) fn key_maps(&self, layer: usize) -> &HeadMaps {
        match &self.basis {
            Basis::Balanced(maps) => &maps[layer].as_ref().expect("a layer that is speculated").key,
            Basis::Chosen(columns) => columns.key(layer),
        }
    }

    fn query_maps(&self, layer: usize) -> &HeadMaps {
        match &self.basis {
            Basis::Balanced(maps) => &maps[layer].as_ref().expect("a layer that is speculated").query,
            Basis::Chosen(columns) => columns.query(layer),
        }
    }

    /// The chooser of columns, where the prompt chooses them.
    pub(super) fn columns_mut(&mut self) -> Option<&mut Columns> {
        match &mut self.basis {
            Basis::Balanced(_) => None,
            Basis::Chosen(columns) => Some(columns),
        }
    }

    /// As that, as long as it has not chosen.
    pub(super) fn choosing(&mut self) -> Option<&mut Columns> {
        self.columns_mut().filter(|columns| !columns.chosen())
    }

    pub(super) fn lookahead(&self, layer: usize) -> Lookahead<'_> {
        let own = || self.speculation.own_copy(layer).expect("made when the session was created");
        let source = match self.options.predictor {
            Predictor::Fitted => QuerySource::Previous(self.speculation.fitted(layer)),
            Predictor::Own => QuerySource::Previous(own()),
            Predictor::Renormalised => QuerySource::Renormalised(own()),
            Predictor::Exact => QuerySource::Exact,
        };
        Lookahead { source, maps: self.query_maps(layer) }
    }

    /// What the correction of a layer of the model needs.
    pub(super) fn correction(&self, layer: usize) -> Lookahead<'_> {
        Lookahead { source: QuerySource::Exact, maps: self.query_maps(layer) }
    }

    /// Whether there are corrections. The true queries have nothing to correct where they have selected.
    pub(super) fn corrects(&self) -> bool {
        corrects(&self.options)
    }

    /// The correction for the token at `position`: as far as the slots go, and in a full pool one row less than there are.
    pub(super) fn correction_held(&self, layer: usize, position: usize, held: &Held) -> Correction {
        let after = held.after(layer, position);
        let mut room = self.slots(after).saturating_sub(always(&self.options));
        if held.full(layer) {
            room = room.min((held.count(layer, position) + 1).saturating_sub(always(&self.options)));
        }
        Correction { most: Budget::Share(self.options.correct).tokens(after), room }
    }

    /// Whether a correction might find anything, where `all_here` says that every row is in the cache.
    pub(super) fn may_correct(&self, layer: usize, position: usize, held: &Held, all_here: bool) -> bool {
        !(all_here && self.attend_cache) && self.correction_held(layer, position, held).most_beside(0) > 0
    }

    /// Most rows that a correction adds to a KV head's for a sequence of `length` tokens; 0 where there is none.
    pub(super) fn most_corrected(&self, length: usize) -> usize {
        most_corrected(&self.options, length)
    }

    /// A decode step begins.
    pub(super) fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        match &mut self.trace {
            Some((trace, _)) if step.phase == Phase::Decode => trace.begin(step),
            _ => Ok(()),
        }
    }

    /// Whether a trace is replayed.
    pub(super) fn replays(&self) -> bool {
        self.trace.is_some()
    }

    /// The rows that a prompt of `length` tokens puts into the cache of a layer and KV head of the store, the most valuable
    /// first: those `ranked`, unless a trace is replayed.
    pub(super) fn first(&self, layer: usize, head: usize, ranked: Vec<u32>, length: usize) -> Vec<u32> {
        match &self.trace {
            Some((trace, kv_heads)) => trace.first((layer, head), *kv_heads, ranked, length),
            None => ranked,
        }
    }

    /// The rehearsal of a layer with this index for the token at `position`.
    ///
    /// Out of order the window lies anywhere, so it may be selected too: `Held` drops it from what is selected, and as
    /// many rows more may be. A full pool keeps a row that is neither guarded nor selected: the victim.
    pub(super) fn rehearsal_held<'a>(
        &'a self,
        runs: IndexRuns<'a>,
        layer: usize,
        position: usize,
        held: &Held,
    ) -> Rehearsal<'a> {
        let rows = held.count(layer, position);
        let guard = self.guard(position + 1);
        let from = (guard.below as usize).min(rows);
        let to = if held.in_order() { (guard.from as usize).clamp(from, rows) } else { rows };
        let window = if held.in_order() { 0 } else { self.options.window };
        let after = held.after(layer, position);
        let mut most = most_selected(&self.options, after, window);
        if held.full(layer) {
            most = most.min(rows - (always(&self.options) - 1)).max(1);
        }
        self.rehearsal(runs, layer, position, (rows, from, to), most)
    }

    fn rehearsal<'a>(
        &'a self,
        runs: IndexRuns<'a>,
        layer: usize,
        position: usize,
        (rows, from, to): (usize, usize, usize),
        most: usize,
    ) -> Rehearsal<'a> {
        let selection = match self.options.rule {
            Rule::Share(_) => Selection::Count { count: most },
            Rule::Probability { below, .. } => Selection::Probability { below, least: 1, most },
            Rule::Paper { alpha, .. } => Selection::Paper { alpha, most },
            Rule::Random { renewed, .. } => {
                let period = (1.0 / renewed).round().clamp(1.0, 1e6) as u32;
                Selection::Random { count: most, seed: layer as u32, step: position as u32, period }
            }
            Rule::Replay { .. } => {
                let (trace, _) = self.trace.as_ref().expect("the options were checked");
                Selection::Replay { most, replay: trace.replay(layer, position) }
            }
        };
        Rehearsal { row: 0, runs, rows, from, to, scale: self.scale, selection }
    }

    /// Rows that never leave the cache of a sequence of `length` tokens, the newest included.
    pub(super) fn guard(&self, length: usize) -> Guard {
        let from = length.saturating_sub(self.options.window.max(1));
        Guard { below: self.options.sinks as u32, from: from as u32 }
    }

    /// Most rows that a rehearsal for a sequence of `length` tokens selects.
    pub(super) fn most_selected(&self, length: usize) -> usize {
        most_selected(&self.options, length, 0)
    }

    /// As [`Plan::most_selected`], before what is guarded was left out of it: see [`Plan::rehearsal_held`].
    pub(super) fn most_rehearsed(&self, length: usize, evicts: bool) -> usize {
        most_rehearsed(&self.options, length, evicts)
    }

    /// Most slots that a step lists for a sequence of `length` tokens; 0 where the cache is attended whole.
    pub(super) fn most_attended(&self, length: usize, evicts: bool) -> usize {
        most_attended(&self.options, length, evicts)
    }

    /// Rows of a prompt of `length` tokens that may get a slot by their rank, though others get one anyway.
    pub(super) fn ranked(&self, length: usize) -> usize {
        (self.slots(length) + always(&self.options)).min(length)
    }

    /// Slots of each layer and KV head for a sequence of `length` tokens.
    pub(super) fn slots(&self, length: usize) -> usize {
        slots(&self.options, length)
    }
}

/// Layers attended in full from the device, of a model of `layers` layers: one at least, and not all.
pub(super) fn resident_layers(options: &InfinigenOptions, layers: usize) -> usize {
    options.resident_layers.clamp(1, layers - 1)
}

/// Columns that queries use.
fn chosen_columns(options: &InfinigenOptions, head_dim: usize) -> usize {
    ((head_dim as f32 * options.ratio).round() as usize).clamp(1, head_dim)
}

/// Columns that the index holds.
pub(super) fn columns(options: &InfinigenOptions, head_dim: usize) -> usize {
    if options.basis == IndexBasis::Balanced { chosen_columns(options, head_dim) } else { head_dim }
}

pub(super) fn bits(options: &InfinigenOptions) -> IndexBits {
    match options.index_bits {
        4 => IndexBits::Four,
        8 => IndexBits::Eight,
        _ => IndexBits::Full,
    }
}

/// Most rows that a rehearsal selects: what the rule says and `more`, as far as the slots go beside what is always attended.
pub(super) fn most_selected(options: &InfinigenOptions, length: usize, more: usize) -> usize {
    let most = match options.rule {
        Rule::Share(share) => Budget::Share(share),
        Rule::Probability { most, .. } | Rule::Paper { most, .. } | Rule::Replay { most } => Budget::Share(most),
        Rule::Random { count, .. } => count,
    };
    let wanted = most.tokens(length).saturating_add(more);
    wanted.min(slots(options, length).saturating_sub(always(options))).max(1)
}

/// Most rows that a rehearsal selects where the window may be among them, if the pool ever `evicts`.
pub(super) fn most_rehearsed(options: &InfinigenOptions, length: usize, evicts: bool) -> usize {
    most_selected(options, length, if evicts { options.window } else { 0 })
}

/// See [`Plan::corrects`].
fn corrects(options: &InfinigenOptions) -> bool {
    options.correct > 0.0 && options.predictor != Predictor::Exact
}

/// See [`Plan::most_corrected`].
pub(super) fn most_corrected(options: &InfinigenOptions, length: usize) -> usize {
    let room = slots(options, length).saturating_sub(always(options));
    if corrects(options) { Budget::Share(options.correct).tokens(length).min(room) } else { 0 }
}

/// Fewest rows of a pool that can evict: sinks, window with the newest token, and a victim.
pub(super) fn least_rows(options: &InfinigenOptions) -> usize {
    always(options)
}

/// Rows of the pool of a full session of `capacity` tokens, and tokens of its resident layers.
pub(super) fn full_rows(options: &PolicyOptions, capacity: usize) -> (usize, usize) {
    let rows = if options.pool_tokens == 0 { capacity } else { capacity.min(options.pool_tokens) };
    (rows, if options.eviction == Eviction::Off { rows } else { capacity })
}

/// Slots that sinks, window and the newest token take.
fn always(options: &InfinigenOptions) -> usize {
    options.sinks + options.window.max(1) + 1
}

/// See [`Plan::most_attended`].
pub(super) fn most_attended(options: &InfinigenOptions, length: usize, evicts: bool) -> usize {
    let selected = most_rehearsed(options, length, evicts) + most_corrected(options, length);
    if options.attend_cache { 0 } else { always(options) + selected }
}

/// Slots of each layer and KV head for a sequence of `length` tokens: the budget, and never fewer than what is always
/// attended and one selected row.
pub(super) fn slots(options: &InfinigenOptions, length: usize) -> usize {
    options.cache.tokens(length).max(options.cache_least).max(always(options) + 1).min(length.max(1))
}
