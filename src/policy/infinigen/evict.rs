//! Which tokens the pool holds, and which of them gives way to a new one (§5).
//!
//! - While nothing has been evicted, row t of every run of store and index is the token at position t. From then on each
//!   KV head of each layer has an order of its own: a new token takes the row of a victim.
//! - The cache, its guard and the trace speak of tokens; store, index and rehearsals of rows. [`Held`] translates.
//! - Where a device finds the victims, which token is where is its own to know (`kv::DevicePool`), and here are numbers only.
//! - A step of several tokens may evict several times; what it changes is written down until the next one begins.

use crate::backend::{KvGeometry, Move};
use crate::kv::{Eviction, Guard, Victims};
use crate::policy::PolicyOptions;
use crate::{Error, ErrorCode, Result};

use super::unsupported;

/// No row: the token has been evicted.
const NONE: u32 = u32::MAX;

/// Where the new token of one layer goes.
pub(super) enum Room<'a> {
    /// Into this row of every run, which is new.
    New(usize),
    /// Over victims: the row of each KV head, and the tokens that were there.
    Over(&'a [u32], &'a [u32]),
}

/// The tokens of one session's pool.
pub(super) struct Held {
    kind: Eviction,
    /// Most rows that the options allow.
    most: usize,
    /// Fewest rows of a pool that can evict.
    least: usize,
    kv_heads: usize,
    /// Layer after layer of the store, KV head after KV head; none where nothing is ever evicted, or a device does.
    runs: Vec<Run>,
    /// Rows of each layer of the store, where a device chooses the victims and knows the rest.
    counts: Vec<usize>,
    /// Most rows that there will be when the step is over.
    limit: usize,
    /// Tokens, where nothing is ever evicted.
    length: usize,
    /// Tokens and rows when the step began.
    begun: (usize, usize),
    /// The first token that any run has lost, or [`NONE`]; now, and when the step began.
    lost: (u32, u32),
    /// What the last token was put over.
    rows: Vec<u32>,
    tokens: Vec<u32>,
}

/// One layer and KV head.
struct Run {
    /// Token in each row.
    tokens: Vec<u32>,
    /// Row of each token, or [`NONE`].
    rows: Vec<u32>,
    victims: Victims,
    /// Rows that this step has overwritten, and their tokens before, in order.
    overwritten: Vec<(u32, u32)>,
}

impl Run {
    /// Puts a token into a row.
    fn point(&mut self, row: u32, token: u32) {
        self.rows.resize(self.rows.len().max(token as usize + 1), NONE);
        self.rows[token as usize] = row;
        self.tokens[row as usize] = token;
    }

    fn truncate(&mut self, tokens: usize, rows: usize) {
        self.tokens.truncate(rows);
        self.rows.truncate(tokens);
    }
}

impl Held {
    /// Nothing yet. `least` is the fewest rows with which there is always a victim; `stored` the store's shape.
    pub(super) fn new(options: &PolicyOptions, least: usize, stored: &KvGeometry) -> Held {
        let runs = if options.eviction == Eviction::Off { 0 } else { stored.layers * stored.kv_heads };
        let run = || Run {
            tokens: Vec::new(),
            rows: Vec::new(),
            victims: Victims::new(options.eviction),
            overwritten: Vec::new(),
        };
        Held {
            kind: options.eviction,
            most: if options.pool_tokens == 0 { usize::MAX } else { options.pool_tokens },
            least,
            kv_heads: stored.kv_heads,
            counts: Vec::new(),
            runs: (0..runs).map(|_| run()).collect(),
            limit: 0,
            length: 0,
            begun: (0, 0),
            lost: (NONE, NONE),
            rows: vec![0; stored.kv_heads],
            tokens: vec![0; stored.kv_heads],
        }
    }

    /// As [`Held::new`], where a device chooses the victims.
    pub(super) fn on_device(options: &PolicyOptions, least: usize, stored: &KvGeometry) -> Held {
        let held = Held::new(options, least, stored);
        let layers = if held.evicts() { stored.layers } else { 0 };
        Held { runs: Vec::new(), counts: vec![0; layers], ..held }
    }

    pub(super) fn evicts(&self) -> bool {
        self.kind != Eviction::Off
    }

    /// Whether the step began with no token at all, so that there is nothing to go back to.
    pub(super) fn began_empty(&self) -> bool {
        self.begun.0 == 0
    }

    /// Tokens when this step began.
    pub(super) fn begun_tokens(&self) -> usize {
        self.begun.0
    }

    /// Rows in use when this step began.
    pub(super) fn begun_rows(&self) -> usize {
        self.begun.1
    }

    /// Numbers of rows to try to make room for, the best first, for a sequence of `length` tokens. With eviction the pool
    /// may stay as it is; `step` is by how much it grows, and `room` what it has room for.
    ///
    /// Errors: more tokens than the options allow, where nothing is evicted.
    pub(super) fn wanted(&mut self, length: usize, step: usize, room: usize) -> Result<Vec<usize>> {
        if !self.evicts() {
            if length > self.most {
                let message = format!(
                    "{length} tokens do not fit the pool: pool_tokens is {}, and nothing is evicted",
                    self.most
                );
                return Err(Error::new(ErrorCode::Capacity, message));
            }
            return Ok(vec![length]);
        }
        let (tokens, rows) = self.now();
        let best = (rows + (length - tokens)).min(self.most);
        let mut wanted = vec![best, rows];
        wanted.extend((rows / step + 1..best.div_ceil(step)).map(|n| n * step));
        wanted.extend(Some(room).filter(|&room| room > rows && room < best));
        wanted.retain(|&rows| rows == best || rows >= self.least);
        wanted.sort_unstable_by(|a, b| b.cmp(a));
        wanted.dedup();
        Ok(wanted)
    }

    /// Tokens and rows between steps.
    pub(super) fn now(&self) -> (usize, usize) {
        match (self.counts.first(), self.runs.first()) {
            (Some(&rows), _) => (self.length, rows),
            (None, Some(run)) => (run.rows.len(), run.tokens.len()),
            (None, None) => (self.length, self.length),
        }
    }

    /// The sequence has `length` tokens now.
    pub(super) fn commit(&mut self, length: usize) {
        self.length = length;
    }

    /// A step begins; there will be at most `limit` rows.
    pub(super) fn begin(&mut self, limit: usize) {
        self.limit = limit;
        self.begun = self.now();
        self.lost.1 = self.lost.0;
        for run in &mut self.runs {
            run.victims.begin();
            run.overwritten.clear();
        }
    }

    /// Rows of a layer of a sequence of `length` tokens, now.
    pub(super) fn count(&self, layer: usize, length: usize) -> usize {
        match (self.counts.get(layer), self.runs.get(layer * self.kv_heads)) {
            (Some(&rows), _) => rows,
            (None, Some(run)) => run.tokens.len(),
            (None, None) => length,
        }
    }

    /// Rows of a layer once it has taken the token at `position`.
    pub(super) fn after(&self, layer: usize, position: usize) -> usize {
        if self.evicts() { (self.count(layer, position) + 1).min(self.limit) } else { position + 1 }
    }

    /// Whether the next token of a layer takes the row of a victim.
    pub(super) fn full(&self, layer: usize) -> bool {
        self.evicts() && self.count(layer, 0) == self.limit
    }

    /// Whether row t of every run is the token at position t.
    pub(super) fn in_order(&self) -> bool {
        self.lost.0 == NONE
    }

    /// Whether rehearsals are needed to know what is used, where attention does not need them: victims go by use, and
    /// all of a full pool fits the cache.
    pub(super) fn watches(&self, slots: impl Fn(usize) -> usize) -> bool {
        let by_use = matches!(self.kind, Eviction::Lru | Eviction::Counter);
        by_use && (slots(self.most) == self.most || !self.in_order())
    }

    /// How many of `tokens` tokens after `position` can be attended in full together: those that fit, and none once
    /// something is missing.
    pub(super) fn in_full(&self, position: usize, tokens: usize) -> usize {
        match (self.evicts(), self.in_order()) {
            (false, _) => tokens,
            (true, true) => tokens.min(self.limit - position),
            (true, false) => 0,
        }
    }

    /// A layer takes `tokens` tokens of a prompt, which fit.
    pub(super) fn extend(&mut self, layer: usize, tokens: usize) {
        if let Some(rows) = self.counts.get_mut(layer) {
            *rows += tokens;
        }
        for run in self.runs.iter_mut().skip(layer * self.kv_heads).take(self.kv_heads) {
            let first = run.tokens.len() as u32;
            run.tokens.extend(first..first + tokens as u32);
            run.rows.extend(first..first + tokens as u32);
            run.victims.grow(run.tokens.len());
        }
    }

    /// Finds a place for the token at `position`. What `guard` names and what this step has `selected` (tokens,
    /// ascending, for each KV head) does not give way.
    pub(super) fn place(&mut self, layer: usize, position: usize, guard: Guard, selected: &[Vec<u32>]) -> Room<'_> {
        if !self.evicts() {
            return Room::New(position);
        }
        let token = position as u32;
        let full = self.full(layer);
        for (head, run) in self.runs[layer * self.kv_heads..][..self.kv_heads].iter_mut().enumerate() {
            if !full {
                run.tokens.push(NONE);
                run.victims.grow(run.tokens.len());
                run.point(run.tokens.len() as u32 - 1, token);
                continue;
            }
            let tokens = &run.tokens;
            let selected = selected.get(head).map_or(&[][..], Vec::as_slice);
            let protected = |row: u32| {
                let token = tokens[row as usize];
                guard.protects(token) || selected.binary_search(&token).is_ok()
            };
            // A rehearsal leaves one row that is neither guarded nor selected, at least.
            let row = run.victims.pick(protected).expect("more rows than what is guarded and selected");
            let victim = run.tokens[row as usize];
            run.victims.inserted(row as usize);
            run.overwritten.push((row, victim));
            run.rows[victim as usize] = NONE;
            run.point(row, token);
            (self.rows[head], self.tokens[head]) = (row, victim);
            self.lost.0 = self.lost.0.min(victim);
        }
        if full { Room::Over(&self.rows, &self.tokens) } else { Room::New(self.count(layer, 0) - 1) }
    }

    /// A layer of a device takes the token at `position`: into this row, or where there is none over victims.
    pub(super) fn take(&mut self, layer: usize, position: usize) -> Option<usize> {
        if self.full(layer) {
            self.lost.0 = 0; // unless the device is asked
            return None;
        }
        match self.counts.get_mut(layer) {
            Some(rows) => {
                *rows += 1;
                Some(*rows - 1)
            }
            None => Some(position),
        }
    }

    /// The device says which token was lost first.
    pub(super) fn set_lost(&mut self, token: u32) {
        self.lost.0 = token;
    }

    /// A rehearsal has selected these rows, which become their tokens, ordered as the rows were. What `guard` names is
    /// on the device anyway and left out.
    pub(super) fn selected(&mut self, layer: usize, head: usize, rows: &mut Vec<u32>, guard: Guard) {
        if !self.evicts() {
            return;
        }
        let run = &mut self.runs[layer * self.kv_heads + head];
        rows.retain(|&row| !guard.protects(run.tokens[row as usize]));
        run.victims.used(rows);
        rows.iter_mut().for_each(|row| *row = run.tokens[*row as usize]);
    }

    /// Replaces tokens that are held by their rows of a KV head's run.
    pub(super) fn rows_of(&self, layer: usize, head: usize, tokens: &mut [u32]) {
        if let Some(run) = self.runs.get(layer * self.kv_heads + head) {
            tokens.iter_mut().for_each(|token| *token = run.rows[*token as usize]);
        }
    }

    /// Makes tokens that are to be fetched into rows of the store, in the order that it wants.
    pub(super) fn locate(&self, layer: usize, moves: &mut [Move]) {
        if self.in_order() {
            return;
        }
        for m in moves.iter_mut() {
            m.from = self.runs[layer * self.kv_heads + m.head as usize].rows[m.from as usize];
        }
        moves.sort_unstable_by_key(|m| (m.head, m.from));
    }

    /// Takes back what this step has changed.
    pub(super) fn undo(&mut self) {
        let (tokens, rows) = self.begun;
        self.length = tokens;
        self.counts.fill(rows);
        for run in &mut self.runs {
            while let Some((row, token)) = run.overwritten.pop() {
                run.point(row, token);
            }
            run.truncate(tokens, rows);
            run.victims.undo();
        }
        self.lost.0 = self.lost.1;
    }

    /// Whether the first `length` tokens are all there.
    pub(super) fn can_truncate(&self, length: usize) -> Result<()> {
        if length as u32 <= self.lost.0 {
            return Ok(());
        }
        Err(unsupported(&format!(
            "tokens from {} on have been evicted, so only the first {0} or fewer can be gone back to",
            self.lost.0
        )))
    }

    /// Forgets every token from `length` on, of which none before has been evicted.
    pub(super) fn truncate(&mut self, length: usize) {
        for run in &mut self.runs {
            // A token that came over a victim is younger than it, so those that stay are in the rows of their positions.
            run.truncate(length, length);
            run.victims.truncate(length);
            run.victims.begin();
            run.overwritten.clear();
        }
        self.lost = (NONE, NONE);
        self.length = length;
        self.counts.fill(length);
        self.begun = self.now();
    }
}
