//! What a prompt leaves for decode: the index, and the ranking that the cache is first filled by.

use std::ops::Range;
use std::sync::Arc;

use crate::Result;
use crate::backend::{
    AttentionShape, Buffer, DType, HeadMaps, IndexRunsMut, KvGeometry, KvRuns, Move, Place, Rows, Segment, Visible,
};
use crate::kv::{Guard, HotCache, Pool, SequenceKv, Store};
use crate::policy::Step;

use super::plan::Plan;

/// Queries at the end of a prompt whose attention ranks entries for the cache.
pub(super) const RANKING_QUERIES: usize = 32;

/// The state of a prompt under way.
pub(super) struct Prompt {
    /// One layer in full, where the store's entries are not memory that attention can read.
    staging: SequenceKv,
    /// Partial keys of one chunk.
    partial: Option<Buffer>,
    /// The most attended rows at the end of the prompt, the most attended first, for each layer and KV head of the store.
    ranked: Vec<Vec<u32>>,
    /// Whether the prompt's last chunk has run.
    ended: bool,
    /// Whether a prompt has filled the cache, now and when this step began.
    filled: bool,
    filled_before: bool,
}

impl Prompt {
    pub(super) fn new(pool: Arc<Pool>, stored: KvGeometry) -> Prompt {
        Prompt {
            staging: SequenceKv::new(pool, KvGeometry { layers: 1, ..stored }),
            partial: None,
            ranked: vec![Vec::new(); stored.layers * stored.kv_heads],
            ended: false,
            filled: false,
            filled_before: false,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        self.staging.bytes() + self.partial.as_ref().map_or(0, Buffer::bytes)
    }

    /// Whether a prompt's last chunk has run since the last commit.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Appends a chunk's partial keys to the index.
    pub(super) fn index(
        &mut self,
        step: &Step<'_>,
        keys: Rows<'_>,
        maps: &HeadMaps,
        index: &mut IndexRunsMut<'_>,
    ) -> Result<()> {
        let (dtype, columns) = (step.backend.activation(), maps.kv_heads * maps.outputs);
        let bytes = step.rows * columns * dtype.bytes();
        if self.partial.as_ref().is_none_or(|partial| partial.bytes() < bytes) {
            self.partial = Some(step.backend.allocate(bytes, Place::Device, "partial keys of a prompt")?);
        }
        let Some(partial) = &mut self.partial else { return Ok(()) };
        step.backend.project_heads(step.stream, keys, maps, partial.rows_mut(dtype, step.rows, columns))?;
        step.backend.index_append(step.stream, partial.rows(dtype, step.rows, columns), index, step.position)
    }

    /// Makes room for what [`Prompt::land`] needs of a sequence of `tokens` tokens.
    pub(super) fn reserve(&mut self, tokens: usize, store: &dyn Store) -> Result<()> {
        self.staging.reserve(if store.runs(0).is_some() { 0 } else { tokens })
    }

    /// Gives that room back.
    pub(super) fn release(&mut self) {
        self.staging.truncate(0);
    }

    /// Brings the layer's entries to where attention can read them.
    pub(super) fn land(&mut self, step: &Step<'_>, layer: usize, store: &mut dyn Store) -> Result<()> {
        if store.runs(layer).is_some() {
            return Ok(());
        }
        let length = step.position + step.rows;
        self.staging.reserve(length)?;
        store.begin_fetch_first(layer, length)?;
        store.finish_fetch(step.backend, step.stream, layer, &mut self.staging.layer_mut(0))
    }

    /// The layer in full; after [`Prompt::land`].
    pub(super) fn runs<'a>(&'a self, layer: usize, store: &'a dyn Store) -> KvRuns<'a> {
        store.runs(layer).unwrap_or_else(|| self.staging.layer(0))
    }

    /// Fetches rows of a layer into the first rows of the staging area, which is returned.
    pub(super) fn bring(
        &mut self,
        step: &Step<'_>,
        layer: usize,
        store: &mut dyn Store,
        rows: Range<usize>,
    ) -> Result<KvRuns<'_>> {
        self.staging.reserve(rows.len())?;
        let of_head = |head| rows.clone().enumerate().map(move |(to, from)| (head, from as u32, to as u32));
        let heads = 0..self.staging.geometry().kv_heads as u32;
        let moves: Vec<Move> = heads.flat_map(of_head).map(|(head, from, to)| Move { head, from, to }).collect();
        store.begin_fetch(layer, &moves)?;
        store.finish_fetch(step.backend, step.stream, layer, &mut self.staging.layer_mut(0))?;
        Ok(self.staging.layer(0))
    }

    /// Ranks the layer's `most` most attended entries by the attention of the last queries.
    pub(super) fn observe(
        &mut self,
        step: &Step<'_>,
        (layer, most): (usize, usize),
        shape: &AttentionShape,
        queries: Rows<'_>,
        store: &dyn Store,
    ) -> Result<()> {
        let length = step.position + step.rows;
        let rows = step.rows.min(RANKING_QUERIES);
        let skip = step.rows - rows;
        let mut mass = step.backend.allocate(shape.kv_heads * length * 4, Place::Device, "attention of a prompt")?;
        let segment = Segment {
            row: 0,
            rows,
            position: step.position + skip,
            runs: self.runs(layer, store),
            visible: Visible::Causal,
        };
        let queries = queries.row_range(skip, rows);
        let out = mass.rows_mut(DType::F32, shape.kv_heads, length);
        step.backend.attention_mass(step.stream, queries, shape, &segment, out)?;
        let mut bytes = vec![0; shape.kv_heads * length * 4];
        step.backend.download(step.stream, mass.rows(DType::F32, shape.kv_heads, length), &mut bytes)?;
        for (head, bytes) in bytes.chunks_exact(length * 4).enumerate() {
            let mass: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect();
            let ranked = &mut self.ranked[layer * shape.kv_heads + head];
            *ranked = (0..length as u32).collect();
            let order = |a: &u32, b: &u32| mass[*b as usize].total_cmp(&mass[*a as usize]).then(a.cmp(b));
            if most < length {
                ranked.select_nth_unstable_by(most, order);
                ranked.truncate(most);
            }
            ranked.sort_unstable_by(order);
        }
        self.ended = true;
        Ok(())
    }

    /// For a prompt of a few tokens after a sequence that has its cache already: the first of them.
    pub(super) fn recent(&self, position: usize, rows: usize) -> Option<usize> {
        (self.filled && position > 0 && rows < RANKING_QUERIES).then_some(position)
    }

    pub(super) fn take_ranked(&mut self, layer: usize, head: usize) -> Vec<u32> {
        let heads = self.staging.geometry().kv_heads;
        std::mem::take(&mut self.ranked[layer * heads + head])
    }

    /// The prompt is over, and the cache filled.
    pub(super) fn finish(&mut self) {
        self.filled |= self.ended;
        self.give_up();
    }

    /// A step begins.
    pub(super) fn begin(&mut self) {
        self.filled_before = self.filled;
    }

    /// Forgets the step under way.
    pub(super) fn roll_back(&mut self) {
        self.filled = self.filled_before;
        self.give_up();
    }

    fn give_up(&mut self) {
        self.ended = false;
        self.partial = None;
        self.release();
        self.ranked.iter_mut().for_each(Vec::clear);
    }
}

/// What an empty cache of `slots` slots is filled with, the most valuable first: what never gives way, then by rank.
pub(super) fn first_load(ranked: &[u32], length: usize, slots: usize, guard: Guard) -> Vec<u32> {
    let length = length as u32;
    let always: Vec<u32> = (0..guard.below.min(length)).chain(guard.from.max(guard.below)..length).collect();
    let free = slots.saturating_sub(always.len());
    let others = ranked.iter().copied().filter(|&row| row >= guard.below && row < guard.from);
    always.into_iter().chain(others.take(free)).collect()
}

/// Puts what a prompt leaves into the cache of one layer and KV head: `ranked` are its rows by attention, `recent` as of
/// [`Prompt::recent`]. `moves` gets what must be fetched.
pub(super) fn fill(
    cache: &mut HotCache,
    plan: &Plan,
    (layer, head): (usize, usize),
    ranked: Vec<u32>,
    recent: Option<usize>,
    length: usize,
    moves: &mut Vec<Move>,
) {
    let (guard, slots) = (plan.guard(length), plan.slots(length));
    match recent {
        // A few tokens after a sequence that has its cache: they join it, with what they attended most.
        Some(first) => {
            let room = slots.saturating_sub(guard.below as usize + 1);
            let from = first.min(guard.from as usize).max(length.saturating_sub(room));
            let most = plan.most_selected(length).min(room - (length - from).min(room));
            let mut rows: Vec<u32> = ranked.into_iter().take(most).collect();
            rows.extend(from as u32..length as u32);
            rows.sort_unstable();
            rows.dedup();
            cache.request(layer, head, &rows, slots, guard, moves);
        }
        None => {
            let ranked = plan.first(layer, head, ranked, length);
            cache.load(layer, head, &first_load(&ranked, length, slots, guard), moves);
        }
    }
}

/// After a truncation to `length` tokens: the window has moved back, over entries that may have left the cache, and what
/// fits it is there in full.
pub(super) fn restock(
    cache: &mut HotCache,
    plan: &Plan,
    layer: usize,
    heads: usize,
    length: usize,
    moves: &mut Vec<Move>,
) {
    let (guard, slots) = (plan.guard(length), plan.slots(length + 1));
    let sinks = if length < slots { length as u32 } else { guard.below.min(length as u32) };
    let always: Vec<u32> = (0..sinks).chain(guard.from.max(sinks)..length as u32).collect();
    for head in 0..heads {
        cache.request(layer, head, &always, slots, guard, moves);
    }
}
