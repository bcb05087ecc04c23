//! The speculation index: partial keys go in quantized, rehearsals of attention come out as selected rows.
//!
//! - [`layout`]: where a row lies in a run, and its quantization.
//! - [`dots`]: dot products in whole numbers, on every instruction set the same.
//! - [`score`]: logits, their normalisation, ranks.
//! - [`select`]: the best k, exactly, or those above a limit.
//!
//! A rehearsal is two regions of parallel work (three in the paper's mode): pieces of [`CHUNK`] rows of a KV head give
//! scores and what normalises them, then each KV head ranks its rows and selects. Whoever computes what, sums have one
//! order, and nothing before the ranks uses an operation that rounds differently between levels.

mod dots;
mod layout;
mod score;
mod select;

use super::CpuBackend;
use super::simd::{LANES, Proven};
use super::view::{Shared, row};
use crate::Result;
use crate::backend::index::random_row;
use crate::backend::{IndexBits, IndexRunsMut, Rehearsal, Replay, Rows, Selected, Selection};
use dots::{Dots, Stretch};
use layout::{BLOCK, GROUP_BYTES};
use parking_lot::Mutex;
use score::{CountAbove, FloatDots, Ranks, Scale, SumExp};
use select::Workspace;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Rows of a piece of work; pieces begin at multiples of it.
const CHUNK: usize = 1024;

/// Rows of an extent, at least: extents are multiples of it (`assert_index`).
pub(super) const LEAST_EXTENT: usize = 64;

/// Rows (of any KV head) that are scored before another thread has woken.
const ALONE: usize = 1024;

/// Stores the rows' heads as the rows from `first` on.
pub(super) fn append(cpu: &CpuBackend, keys: Rows<'_>, runs: &mut IndexRunsMut<'_>, first: usize) {
    let geometry = *runs.geometry();
    let extents = first / geometry.extent_tokens..(first + keys.rows()).div_ceil(geometry.extent_tokens);
    let base = extents.start;
    let runs: Vec<Shared> = extents
        .flat_map(|extent| (0..geometry.kv_heads).map(move |head| (extent, head)))
        .map(|(extent, head)| Shared(runs.run_mut(extent, head)))
        .collect();
    let bytes = layout::block_bytes(&geometry);
    cpu.pool.split(keys.rows(), 64, &|range| {
        let mut integers = vec![0; geometry.padded()];
        for i in range {
            let at = first + i;
            let (extent, token) = (at / geometry.extent_tokens - base, at % geometry.extent_tokens);
            for (head, key) in row(&keys, i).chunks_exact(geometry.columns).enumerate() {
                // SAFETY: a run of `extent_tokens` rows, a multiple of a block's, `token` is below that; this lane is
                // written by this thread only, and the runs are borrowed mutably.
                unsafe {
                    let block = runs[extent * geometry.kv_heads + head].get().add(token / BLOCK * bytes);
                    layout::store(&geometry, key, &mut integers, block, token % BLOCK);
                }
            }
        }
    });
}

/// Stores one token's heads, each in a row of its own.
pub(super) fn store_rows(keys: Rows<'_>, runs: &mut IndexRunsMut<'_>, rows: &[u32]) {
    let geometry = *runs.geometry();
    let bytes = layout::block_bytes(&geometry);
    let mut integers = vec![0; geometry.padded()];
    for (head, key) in row(&keys, 0).chunks_exact(geometry.columns).enumerate() {
        let at = rows[head] as usize;
        let (extent, token) = (at / geometry.extent_tokens, at % geometry.extent_tokens);
        // SAFETY: the row lies below the runs' capacity, which the caller asserted; the runs are borrowed mutably.
        unsafe {
            let block = runs.run_mut(extent, head).add(token / BLOCK * bytes);
            layout::store(&geometry, key, &mut integers, block, token % BLOCK);
        }
    }
}

/// Shows `work` the words of one row, its scale last, and takes what it makes of them.
pub(super) fn exchange_row(runs: &mut IndexRunsMut<'_>, head: usize, row: u32, work: impl FnOnce(&mut [u32])) {
    let geometry = *runs.geometry();
    assert!((row as usize) < runs.capacity(), "a row past the extents' end");
    let (extent, token) = (row as usize / geometry.extent_tokens, row as usize % geometry.extent_tokens);
    let block = token / BLOCK * layout::block_bytes(&geometry);
    // SAFETY: the row lies below the runs' capacity, and so does its block.
    let block = unsafe { runs.run_mut(extent, head).add(block) };
    let at = |word: usize| word * BLOCK + token % BLOCK;
    let words = layout::words(&geometry) + 1;
    // SAFETY: words of one lane of a block, and its scale behind them; the runs are borrowed mutably.
    let mut row: Vec<u32> = (0..words).map(|word| unsafe { block.cast::<u32>().add(at(word)).read() }).collect();
    work(&mut row);
    for (word, value) in row.into_iter().enumerate() {
        // SAFETY: as above.
        unsafe { block.cast::<u32>().add(at(word)).write(value) };
    }
}

/// One rehearsal among those of a call.
struct Plan<'a> {
    rehearsal: &'a Rehearsal<'a>,
    kv_heads: usize,
    /// Query heads of a KV head.
    group: usize,
    chunks: usize,
    /// Rows in whole blocks: floats of a query head's scores.
    stride: usize,
    /// Words of a query: four quantized columns, or one f32.
    query_words: usize,
    /// Where its queries begin in `Queries::words`, and its query heads in `Queries::factors`.
    first_word: usize,
    first_head: usize,
    /// Pieces and KV heads of the rehearsals before.
    first_piece: usize,
    first_kv_head: usize,
    /// Where its scores begin in scratch memory, and the largest and sum of each piece and head behind them.
    scores: usize,
    stats: usize,
}

/// All query heads of a call.
#[derive(Default)]
struct Queries {
    /// Bytes of quantized columns, or floats.
    words: Vec<i32>,
    /// What makes a dot product with the words a logit, but for the row's scale.
    factors: Vec<f32>,
}

impl Queries {
    fn push(&mut self, rehearsal: &Rehearsal<'_>, query: &[f32]) {
        let geometry = rehearsal.runs.geometry();
        match geometry.bits {
            IndexBits::Full => {
                self.words.extend(query.iter().map(|x| x.to_bits() as i32));
                self.words.resize(self.words.len() + geometry.padded() - query.len(), 0);
                self.factors.push(rehearsal.scale);
            }
            IndexBits::Four | IndexBits::Eight => {
                let first = self.words.len();
                self.words.resize(first + geometry.padded() / 4, 0);
                // SAFETY: the words just added, as bytes, which have no invalid values.
                let bytes = unsafe {
                    std::slice::from_raw_parts_mut(self.words[first..].as_mut_ptr().cast::<i8>(), geometry.padded())
                };
                self.factors.push(layout::quantize(query, 127.0, bytes) * rehearsal.scale);
            }
        }
    }
}

/// Floats of scratch memory for `count` rehearsals over `rows` rows of `heads` query heads.
pub(super) fn floats(threads: usize, heads: usize, count: usize, rows: usize) -> usize {
    let (chunks, stride) = (rows.div_ceil(CHUNK), rows.next_multiple_of(BLOCK));
    let own = 3 * stride + (stride / BLOCK).next_multiple_of(LANES);
    count * (heads * (stride + 2 * chunks)).next_multiple_of(LANES) + threads * own
}

/// See `Backend::rehearse`.
pub(super) fn rehearse(
    cpu: &CpuBackend,
    queries: Rows<'_>,
    rehearsals: &[Rehearsal<'_>],
    selected: &mut [&mut Selected],
) -> Result<()> {
    let mut plans = Vec::with_capacity(rehearsals.len());
    let mut all = Queries::default();
    let (mut pieces, mut kv_heads, mut floats, mut longest) = (0, 0, 0, 0);
    for (rehearsal, selected) in rehearsals.iter().zip(selected.iter_mut()) {
        let geometry = rehearsal.runs.geometry();
        let heads = queries.cols() / geometry.columns;
        let (first_word, first_head) = (all.words.len(), all.factors.len());
        row(&queries, rehearsal.row).chunks_exact(geometry.columns).for_each(|query| all.push(rehearsal, query));
        let (chunks, stride) = (rehearsal.rows.div_ceil(CHUNK), rehearsal.rows.next_multiple_of(BLOCK));
        plans.push(Plan {
            rehearsal,
            kv_heads: geometry.kv_heads,
            group: heads / geometry.kv_heads,
            chunks,
            stride,
            query_words: (all.words.len() - first_word) / heads,
            first_word,
            first_head,
            first_piece: pieces,
            first_kv_head: kv_heads,
            scores: floats,
            stats: floats + heads * stride,
        });
        pieces += chunks * geometry.kv_heads;
        kv_heads += geometry.kv_heads;
        floats += (heads * (stride + 2 * chunks)).next_multiple_of(LANES);
        longest = longest.max(stride);
        selected.rows.resize_with(geometry.kv_heads, Vec::new);
        let wants_tail = !selected.present.is_empty() && !matches!(rehearsal.selection, Selection::Paper { .. });
        selected.tail.resize(if wants_tail { heads } else { 0 }, 0.0);
    }

    // Behind the scores of all, each thread has ranks, blocks' largest, candidates and their rows.
    let largest = (longest / BLOCK).next_multiple_of(LANES);
    let own = 3 * longest + largest;
    let mut scratch = cpu.scratch.take((floats + cpu.pool.threads() * own) * 4, "scores of a rehearsal")?;
    let scratch = Shared(scratch.address_mut());
    // SAFETY: `at` ≤ floats, which begin the scratch memory.
    let float_at = |at: usize| unsafe { scratch.get().cast::<f32>().add(at) };

    let total: usize = plans.iter().map(|p| p.rehearsal.rows * p.kv_heads).sum();
    cpu.pool.split(pieces, if total <= ALONE { pieces } else { 1 }, &|range| {
        for piece in range {
            let plan = &plans[plans.partition_point(|p| p.first_piece <= piece) - 1];
            let (chunk, head) =
                ((piece - plan.first_piece) / plan.kv_heads, (piece - plan.first_piece) % plan.kv_heads);
            // SAFETY: the scores of this KV head's group, of which this piece of work writes its rows, and its own stats.
            unsafe {
                let scores = float_at(plan.scores + head * plan.group * plan.stride + chunk * CHUNK);
                let stats = float_at(plan.stats + 2 * (chunk * plan.kv_heads + head) * plan.group);
                score_chunk(cpu, plan, &all, chunk, head, scores, stats);
            }
        }
    });

    // What is subtracted from each head's scores, from the pieces in their order.
    let mut shifts = vec![0.0; all.factors.len()];
    for plan in &plans {
        for head in 0..plan.kv_heads * plan.group {
            let stats = |chunk: usize| {
                let at = float_at(plan.stats + 2 * (chunk * plan.kv_heads * plan.group + head));
                // SAFETY: written by the piece of this chunk and KV head, whose region has ended.
                unsafe { (at.read(), at.add(1).read()) }
            };
            let most = (0..plan.chunks).map(|c| stats(c).0).fold(f32::NEG_INFINITY, f32::max);
            shifts[plan.first_head + head] = match plan.rehearsal.selection {
                _ if most == f32::NEG_INFINITY => 0.0,
                Selection::Paper { .. } => most,
                _ => most + (0..plan.chunks).map(|c| stats(c).1 * (stats(c).0 - most).exp()).sum::<f32>().ln(),
            };
        }
    }

    // The scores of a KV head's query heads, now complete.
    let scores_of = |plan: &Plan<'_>, head: usize| {
        let count = plan.group * plan.stride;
        // SAFETY: `count` floats that the first region wrote; nobody writes them any more.
        unsafe { std::slice::from_raw_parts(float_at(plan.scores + head * count).cast_const(), count) }
    };
    let plan_of = |item: usize| {
        let at = plans.partition_point(|p| p.first_kv_head <= item) - 1;
        (at, &plans[at], item - plans[at].first_kv_head)
    };
    let grain = if total <= ALONE { kv_heads } else { 1 };
    let counts: Vec<AtomicUsize> = plans.iter().map(|_| AtomicUsize::new(0)).collect();
    if plans.iter().any(|p| matches!(p.rehearsal.selection, Selection::Paper { .. })) {
        cpu.pool.split(kv_heads, grain, &|range| {
            for (at, plan, head) in range.map(plan_of) {
                let Selection::Paper { alpha, .. } = plan.rehearsal.selection else { continue };
                for (h, scores) in scores_of(plan, head).chunks_exact(plan.stride.max(1)).enumerate() {
                    let limit = shifts[plan.first_head + head * plan.group + h] - alpha;
                    let (from, to) = (plan.rehearsal.from, plan.rehearsal.to);
                    let count = cpu.level.run(CountAbove { scores, from, to, limit });
                    counts[at].fetch_add(count, Ordering::Relaxed); // read after the region
                }
            }
        });
    }

    let outcomes: Vec<Mutex<Outcome<'_>>> =
        selected.iter_mut().flat_map(|s| Outcome::of_heads(s)).map(Mutex::new).collect();
    cpu.pool.split_indexed(kv_heads, grain, &|thread, range| {
        let mut given = Vec::new(); // where a trace is replayed
        for (at, plan, head) in range.map(plan_of) {
            let mut outcome = outcomes[plan.first_kv_head + head].lock();
            let Rehearsal { from, to, selection, .. } = *plan.rehearsal;
            if plan.stride == 0 {
                outcome.rows.clear();
                outcome.tail.fill(0.0);
                continue;
            }
            let shifts = &shifts[plan.first_head + head * plan.group..][..plan.group];
            let first = from / BLOCK * BLOCK;
            let rows = to.next_multiple_of(BLOCK) - first;
            // SAFETY: this thread's own floats behind those of all, of which `rows` ≤ `longest`; a u32 is as large.
            let (ranks, blocks, values, numbers) = unsafe {
                let base = float_at(floats + thread * own);
                (
                    std::slice::from_raw_parts_mut(base, rows),
                    std::slice::from_raw_parts_mut(base.add(3 * longest), (rows / BLOCK).next_multiple_of(LANES)),
                    std::slice::from_raw_parts_mut(base.add(longest), rows),
                    std::slice::from_raw_parts_mut(base.add(2 * longest).cast::<u32>(), rows),
                )
            };
            blocks[rows / BLOCK..].fill(f32::NEG_INFINITY);
            let largest = &mut blocks[..rows / BLOCK];
            let scores = scores_of(plan, head);
            cpu.level.run(Ranks { scores, stride: plan.stride, shifts, from, to, ranks, largest });
            let mut above = None;
            let count = match selection {
                Selection::Count { count } => count,
                Selection::Probability { below, least, most } => {
                    let limit = -below;
                    let scores = CountAbove { scores: ranks, from: from - first, to: to - first, limit };
                    let count = cpu.level.run(scores);
                    above = Some(limit).filter(|_| (least..=most).contains(&count));
                    count.max(least).min(most)
                }
                Selection::Paper { most, .. } => {
                    let (sum, heads) = (counts[at].load(Ordering::Relaxed), plan.kv_heads * plan.group);
                    ((2 * sum + heads) / (2 * heads)).max(1).min(most)
                }
                Selection::Random { count, .. } => count,
                Selection::Replay { most, replay } => {
                    given.clear();
                    replay.stretched(list_of(&replay, head, plan.kv_heads), from, to, most, &mut given);
                    given.len()
                }
            };
            let work = Workspace { ranks, largest: blocks, values, rows: numbers, first };
            match above {
                Some(limit) => select::above(&work, limit, count, outcome.rows),
                None => select::best(cpu.level, work, from, to, count, outcome.rows),
            }
            if let Selection::Random { seed, step, period, .. } = selection {
                let count = outcome.rows.len() as u32;
                let row = |j| random_row(seed, head as u32, j, count, step, period, from as u32, to as u32);
                outcome.rows.clear();
                outcome.rows.extend((0..count).map(row));
            }
            if let Selection::Replay { .. } = selection {
                outcome.rows.clone_from(&given);
            }
            outcome.keep_absent(ranks, numbers, first);
            if outcome.tail.is_empty() {
                continue;
            }
            // SAFETY: this KV head's scores, which this thread alone has from here on; and this thread's own floats of
            // candidates and their rows, whose references above are not used any more.
            let (scores, values) = unsafe {
                let scores = float_at(plan.scores + head * plan.group * plan.stride);
                (
                    std::slice::from_raw_parts_mut(scores, plan.group * plan.stride),
                    std::slice::from_raw_parts_mut(float_at(floats + thread * own + longest), 2 * longest),
                )
            };
            outcome.estimate_tail(cpu.level, scores, plan.stride, shifts, values);
        }
    });
    Ok(())
}

/// What the trace selected for the KV head that `head` of `kv_heads` replays.
fn list_of<'a>(replay: &Replay<'a>, head: usize, kv_heads: usize) -> &'a [u32] {
    let table = replay.table;
    // SAFETY: as many initialised bytes, aligned to 64; any bytes are a u32; nobody writes while the buffer is borrowed.
    let words = unsafe { std::slice::from_raw_parts(table.address().cast::<u32>(), table.bytes() / 4) };
    let ends = replay.lists + 2 * replay.head(head, kv_heads);
    &words[words[ends] as usize..words[ends + 1] as usize]
}

/// What a rehearsal finds out for one KV head.
struct Outcome<'a> {
    rows: &'a mut Vec<u32>,
    present: &'a [u32],
    /// For a correction: most rows that are not present.
    most_absent: Option<usize>,
    /// Of its query heads; none where it is not wanted.
    tail: &'a mut [f32],
}

impl<'a> Outcome<'a> {
    fn of_heads(selected: &'a mut Selected) -> impl Iterator<Item = Outcome<'a>> {
        let Selected { rows, present, most_absent, tail } = selected;
        let (present, most_absent) = (&*present, &*most_absent);
        let group = tail.len() / rows.len().max(1);
        let mut tails = tail.chunks_exact_mut(group.max(1));
        rows.iter_mut().enumerate().map(move |(head, rows)| Outcome {
            rows,
            present: present.get(head).map_or(&[], Vec::as_slice),
            most_absent: most_absent.get(head).copied(),
            tail: tails.next().unwrap_or_default(),
        })
    }

    /// In a correction, leaves out what is present, and of the others all but the best, ties going to the earlier row.
    /// `ranks` are those of the rows from `first` on, as is `marks`, which is used up.
    fn keep_absent(&mut self, ranks: &[f32], marks: &mut [u32], first: usize) {
        let Some(most) = self.most_absent else { return };
        marks.fill(0);
        for &row in self.present {
            if let Some(mark) = (row as usize).checked_sub(first).and_then(|at| marks.get_mut(at)) {
                *mark = 1;
            }
        }
        self.rows.retain(|&row| marks[row as usize - first] == 0);
        if self.rows.len() > most {
            let rank = |row: u32| ranks[row as usize - first];
            self.rows.select_nth_unstable_by(most, |&a, &b| rank(b).total_cmp(&rank(a)).then(a.cmp(&b)));
            self.rows.truncate(most);
            self.rows.sort_unstable();
        }
    }

    /// 1 − what the rows that are present or selected have. `scores`, `stride` apart for each query head, are used up;
    /// `values` takes two for every row.
    fn estimate_tail(&mut self, level: Proven, scores: &mut [f32], stride: usize, shifts: &[f32], values: &mut [f32]) {
        for ((tail, scores), &shift) in self.tail.iter_mut().zip(scores.chunks_exact_mut(stride)).zip(shifts) {
            // Not where scores are NaN or infinite.
            let known = shift.is_finite() && scores.iter().any(|&score| score > f32::NEG_INFINITY);
            let count = self.present.len() + self.rows.len();
            let (present, selected) = values.split_at_mut(self.present.len());
            for (values, rows) in [(present, self.present), (selected, &*self.rows)] {
                for (value, &row) in values.iter_mut().zip(rows) {
                    // A row that is there twice counts once.
                    *value = std::mem::replace(&mut scores[row as usize], f32::NEG_INFINITY);
                }
            }
            let padded = count.next_multiple_of(LANES);
            values[count..padded].fill(f32::NEG_INFINITY);
            let here = level.run(SumExp { scores: &values[..padded], shift });
            *tail = if known { (1.0 - here).max(0.0) } else { 0.0 };
        }
    }
}

/// Scores of one chunk of one KV head's rows for its query heads, and of each the largest and Σ exp(score − largest).
///
/// # Safety
/// `scores` has room for the chunk's rows in whole blocks, `plan.stride` apart for each query head; `stats` for two
/// floats a query head; nobody else uses them.
unsafe fn score_chunk(
    cpu: &CpuBackend,
    plan: &Plan<'_>,
    all: &Queries,
    chunk: usize,
    head: usize,
    scores: *mut f32,
    stats: *mut f32,
) {
    let Rehearsal { runs, rows, selection, .. } = plan.rehearsal;
    let geometry = runs.geometry();
    let (group, query_words, block_bytes) = (plan.group, plan.query_words, layout::block_bytes(geometry));
    let words = all.words[plan.first_word + head * group * query_words..][..group * query_words].as_ptr();
    let factors = &all.factors[plan.first_head + head * group..][..group];
    let (begin, end) = (chunk * CHUNK, (*rows).min((chunk + 1) * CHUNK));
    for h in 0..group {
        // SAFETY: two floats a query head.
        unsafe { stats.add(2 * h).write(f32::NEG_INFINITY) };
    }
    // Extents and chunks hold whole blocks, so every stretch begins with one.
    let mut stretches = [Stretch { blocks: std::ptr::null(), count: 0 }; CHUNK / LEAST_EXTENT];
    let mut used = 0;
    let mut at = begin;
    while at < end {
        let (extent, token) = (at / geometry.extent_tokens, at % geometry.extent_tokens);
        let here = (end - at).min(geometry.extent_tokens - token);
        // SAFETY: the block of row `token` of a run.
        let blocks = unsafe { runs.run(extent, head).add(token / BLOCK * block_bytes) };
        stretches[used] = Stretch { blocks, count: here.div_ceil(BLOCK) };
        used += 1;
        at += here;
    }
    let stretches = &stretches[..used];
    if geometry.bits != IndexBits::Full {
        let dots = Dots {
            four: geometry.bits == IndexBits::Four,
            heads: group,
            queries: words,
            query_words,
            stretches,
            block_bytes,
            out: scores,
            out_stride: plan.stride,
        };
        // SAFETY: a query has the columns of a block, in words; `scores` takes whole blocks, of which all stretches but the
        // last one are made.
        unsafe { dots.run(cpu.level) };
    }
    let mut at = 0;
    for &Stretch { blocks, count } in stretches {
        // SAFETY: the `count` blocks of the stretch; `scores` takes whole blocks; a query has the columns of a block, in words;
        // the scales lie behind them.
        unsafe {
            let out = scores.add(at);
            if geometry.bits == IndexBits::Full {
                for h in 0..group {
                    cpu.level.run(FloatDots {
                        query: words.add(h * query_words).cast(),
                        columns: query_words,
                        blocks,
                        count,
                        block_bytes,
                        out: out.add(h * plan.stride),
                    });
                }
            }
            let scales = blocks.add(layout::words(geometry) * GROUP_BYTES).cast::<f32>();
            let here = (end - begin - at).min(count * BLOCK);
            for (h, &factor) in factors.iter().enumerate() {
                let (scores, largest) = (out.add(h * plan.stride), stats.add(2 * h));
                let scale = Scale { scores, scales, block_bytes, count: here, factor, largest: largest.read() };
                largest.write(cpu.level.run(scale));
            }
        }
        at += count * BLOCK;
    }
    if matches!(selection, Selection::Paper { .. }) {
        return;
    }
    for h in 0..group {
        // SAFETY: the scores written above, in whole blocks; two floats a query head.
        unsafe {
            let scores = std::slice::from_raw_parts(scores.add(h * plan.stride), (end - begin).next_multiple_of(BLOCK));
            let shift = stats.add(2 * h).read();
            stats.add(2 * h + 1).write(cpu.level.run(SumExp { scores, shift }));
        }
    }
}
