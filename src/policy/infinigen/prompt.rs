//! What a prompt leaves for decode: the index, and the ranking that the cache is first filled by.

use std::sync::Arc;

use crate::Result;
use crate::backend::{
    AttentionShape, Buffer, DType, HeadMaps, IndexRunsMut, KvGeometry, Move, Place, Rows, Segment, Visible,
};
use crate::kv::{Guard, HotCache, Pool, Store};
use crate::policy::staged::Staged;
use crate::policy::{Phase, Step};

use super::plan::Plan;
use super::tail::Tail;

/// Queries at the end of a prompt whose attention ranks entries for the cache.
pub(super) const RANKING_QUERIES: usize = 32;

/// The state of a prompt under way.
pub(super) struct Prompt {
    kv_heads: usize,
    /// Layers in full, where the store's entries are not memory that attention can read.
    pub(super) staged: Staged,
    /// Partial keys of one chunk.
    partial: Option<Buffer>,
    ranking: Option<Ranking>,
    /// What [`Prompt::keep_ranked`] has kept, for each layer and KV head of the store.
    kept: Vec<Vec<u32>>,
    /// Tokens when the call began.
    begun: usize,
    /// Whether the prompt's last chunk has run.
    ended: bool,
    /// Whether a prompt has filled the cache, now and when this step began.
    filled: bool,
    filled_before: bool,
}

/// One layer's entries by the attention of the last queries.
struct Ranking {
    /// Attention that each token gets from them: a row a KV head.
    mass: Buffer,
    /// As many zeros, for the next layer.
    zeros: Buffer,
    length: usize,
    /// The most attended rows, the most attended first: as many for each KV head.
    best: Buffer,
    most: usize,
}

impl Prompt {
    pub(super) fn new(pool: Arc<Pool>, stored: KvGeometry) -> Prompt {
        Prompt {
            kv_heads: stored.kv_heads,
            staged: Staged::new(pool, &stored),
            partial: None,
            ranking: None,
            kept: vec![Vec::new(); stored.layers * stored.kv_heads],
            begun: 0,
            ended: false,
            filled: false,
            filled_before: false,
        }
    }

    pub(super) fn bytes(&self) -> usize {
        let ranking = self.ranking.as_ref().map(|r| [&r.mass, &r.zeros, &r.best]);
        let scratch = self.partial.iter().chain(ranking.into_iter().flatten());
        self.staged.bytes() + scratch.map(Buffer::bytes).sum::<usize>()
    }

    /// Whether a prompt's last chunk has run since the last commit.
    pub(super) fn ended(&self) -> bool {
        self.ended
    }

    /// Starts to bring what a layer attends beside the step's own entries.
    pub(super) fn prefetch(&mut self, step: &Step<'_>, layer: usize, store: &mut dyn Store) -> Result<()> {
        self.staged.reserve(step.position + step.rows, store)?;
        self.staged.prefetch(step, layer, store)
    }

    /// Takes a chunk's entries of a layer, and appends their partial keys to its index.
    pub(super) fn append(
        &mut self,
        step: &Step<'_>,
        layer: usize,
        [keys, values]: [Rows<'_>; 2],
        plan: &mut Plan,
        store: &mut dyn Store,
        index: &mut IndexRunsMut<'_>,
    ) -> Result<()> {
        self.staged.reserve(step.position + step.rows, store)?;
        self.staged.append(step, layer, keys, values, store)?;
        if let Some(columns) = plan.choosing() {
            columns.add_keys(step, keys)?;
        }
        self.index(step, keys, plan.key_maps(step.layer), index)
    }

    /// Sees a chunk's queries of a layer. By the last of a prompt the layer's entries are ranked: returns whether its cache is to be
    /// filled by that now, or else keeps it until the prompt is over.
    pub(super) fn observe(
        &mut self,
        step: &Step<'_>,
        layer: usize,
        (shape, queries): (&AttentionShape, Rows<'_>),
        plan: &mut Plan,
        tail: Option<&mut Tail>,
        store: &dyn Store,
    ) -> Result<bool> {
        if let Some(columns) = plan.choosing() {
            columns.add_queries(step, queries)?;
        }
        if !matches!(step.phase, Phase::Prefill { last: true }) {
            return Ok(false);
        }
        let length = step.position + step.rows;
        if let Some(tail) = tail {
            tail.blend_runs(step, layer, self.staged.runs(layer, store), length, 1.0)?;
        }
        self.rank(step, (layer, plan.ranked(length)), shape, queries, store)?;
        if self.recent(length).is_none() {
            return Ok(true);
        }
        self.keep_ranked(step, layer)?;
        Ok(false)
    }

    fn index(&mut self, step: &Step<'_>, keys: Rows<'_>, maps: &HeadMaps, index: &mut IndexRunsMut<'_>) -> Result<()> {
        let (dtype, columns) = (step.backend.activation(), maps.kv_heads * maps.outputs);
        let bytes = step.rows * columns * dtype.bytes();
        if self.partial.as_ref().is_none_or(|partial| partial.bytes() < bytes) {
            self.partial = Some(step.backend.allocate(bytes, Place::Device, "partial keys of a prompt")?);
        }
        let Some(partial) = &mut self.partial else { return Ok(()) };
        step.backend.project_heads(step.stream, keys, maps, partial.rows_mut(dtype, step.rows, columns))?;
        step.backend.index_append(step.stream, partial.rows(dtype, step.rows, columns), index, step.position)
    }

    /// Ranks the layer's `most` most attended entries by the attention of the last queries.
    fn rank(
        &mut self,
        step: &Step<'_>,
        (layer, most): (usize, usize),
        shape: &AttentionShape,
        queries: Rows<'_>,
        store: &dyn Store,
    ) -> Result<()> {
        let (backend, stream, length) = (step.backend, step.stream, step.position + step.rows);
        let rows = step.rows.min(RANKING_QUERIES);
        let skip = step.rows - rows;
        if self.ranking.as_ref().is_none_or(|ranking| (ranking.length, ranking.most) != (length, most)) {
            let bytes = (shape.kv_heads * length * 4).next_multiple_of(8);
            let allocate = |bytes| backend.allocate(bytes, Place::Device, "attention of a prompt");
            let best = allocate(shape.kv_heads * most * 4)?;
            self.ranking = Some(Ranking { mass: allocate(bytes)?, zeros: allocate(bytes)?, length, best, most });
        }
        let runs = self.staged.runs(layer, store);
        let Some(Ranking { mass, zeros, best, .. }) = &mut self.ranking else { unreachable!("made above") };
        backend.copy(stream, zeros, mass)?;
        let segment = Segment { row: 0, rows, position: step.position + skip, runs, visible: Visible::Causal };
        let queries = queries.row_range(skip, rows);
        backend.attention_mass(stream, queries, shape, &segment, mass.rows_mut(DType::F32, shape.kv_heads, length))?;
        let mass = mass.rows(DType::F32, shape.kv_heads, length);
        backend.rank(stream, mass, best.rows_mut(DType::U32, shape.kv_heads, most))?;
        self.ended = true;
        Ok(())
    }

    /// What was ranked last: the most attended rows, the most attended first, for each KV head.
    pub(super) fn best(&self) -> Rows<'_> {
        let Ranking { best, most, .. } = self.ranking.as_ref().expect("a layer has been ranked");
        best.rows(DType::U32, self.kv_heads, *most)
    }

    /// As [`Prompt::best`], for the host: a list a KV head.
    pub(super) fn ranked(&self, step: &Step<'_>) -> Result<Vec<Vec<u32>>> {
        let best = self.best();
        let mut bytes = vec![0; best.rows() * best.cols() * 4];
        step.backend.download(step.stream, best, &mut bytes)?;
        let rows = |bytes: &[u8]| bytes.as_chunks().0.iter().map(|b| u32::from_ne_bytes(*b)).collect();
        Ok(bytes.chunks_exact(best.cols() * 4).map(rows).collect())
    }

    /// Puts other lists in the place of [`Prompt::best`], as far as there is room.
    pub(super) fn rank_by(&mut self, step: &Step<'_>, lists: &[Vec<u32>]) -> Result<()> {
        let Some(Ranking { best, most, .. }) = &mut self.ranking else { return Ok(()) };
        let padded = |list: &Vec<u32>| -> Vec<u32> {
            list.iter().copied().chain(std::iter::repeat(u32::MAX)).take(*most).collect()
        };
        let bytes: Vec<u8> = lists.iter().flat_map(padded).flat_map(u32::to_ne_bytes).collect();
        step.backend.upload(step.stream, &bytes, best, 0)
    }

    /// Keeps what was ranked last until the prompt is over.
    fn keep_ranked(&mut self, step: &Step<'_>, layer: usize) -> Result<()> {
        let lists = self.ranked(step)?;
        self.kept.iter_mut().skip(layer * self.kv_heads).zip(lists).for_each(|(kept, list)| *kept = list);
        Ok(())
    }

    pub(super) fn take_kept(&mut self, layer: usize, head: usize) -> Vec<u32> {
        std::mem::take(&mut self.kept[layer * self.kv_heads + head])
    }

    /// For a call of a few tokens, up to `length`, after a sequence that has its cache already: the first of them.
    pub(super) fn recent(&self, length: usize) -> Option<usize> {
        (self.filled && self.begun > 0 && length - self.begun < RANKING_QUERIES).then_some(self.begun)
    }

    /// The prompt is over, and the cache filled.
    pub(super) fn finish(&mut self) {
        self.filled |= self.ended;
        self.give_up();
    }

    /// A step begins, after `tokens` tokens.
    pub(super) fn begin(&mut self, tokens: usize) {
        self.begun = tokens;
        self.filled_before = self.filled;
    }

    /// Forgets the step under way.
    pub(super) fn roll_back(&mut self) {
        self.filled = self.filled_before;
        self.give_up();
    }

    fn give_up(&mut self) {
        self.ended = false;
        (self.partial, self.ranking) = (None, None);
        self.staged.truncate(0);
        self.kept.iter_mut().for_each(Vec::clear);
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

/// Puts what a few tokens leave, from `first` on after a sequence that has its cache, into that of one layer and KV head: the
/// tokens, and what they attended most (`ranked`). `moves` gets what must be fetched.
pub(super) fn join(
    cache: &mut HotCache,
    plan: &Plan,
    (layer, head): (usize, usize),
    ranked: Vec<u32>,
    first: usize,
    length: usize,
    moves: &mut Vec<Move>,
) {
    let (guard, slots) = (plan.guard(length), plan.slots(length));
    let room = slots.saturating_sub(guard.below as usize + 1);
    let from = first.min(guard.from as usize).max(length.saturating_sub(room));
    let most = plan.most_selected(length).min(room - (length - from).min(room));
    let mut rows: Vec<u32> = ranked.into_iter().take(most).collect();
    rows.extend(from as u32..length as u32);
    rows.sort_unstable();
    rows.dedup();
    cache.request(layer, head, &rows, slots, guard, moves);
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
