//! A trace in the place of what speculation selects: hits and misses of real text for a model that has random weights.
//!
//! Step k after a prompt selects what step k of the trace did, and after its last step the trace begins anew. A layer of the
//! store replays the layer of the trace at the same share of the depth, a KV head likewise. Rows older than the window at
//! the prompt's end are stretched ([`crate::backend::Replay`] says how), so that their share stays, and blocks come and go
//! as the trace's rows do; younger rows keep their distance from the end. The prompt's end fills the cache as the trace
//! found it, as far as that is known: with what was there when it was first selected, and without what was not.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use crate::backend::{Backend, Buffer, Place, Replay};
use crate::policy::{Record, Step, TraceReader};
use crate::{Error, ErrorCode, Result};

pub(super) struct Trace {
    /// Ends of all lists, then the lists.
    words: Vec<u32>,
    /// The same on the device, once a step has brought it there.
    table: Buffer,
    there: bool,
    /// Position of each step's token.
    positions: Vec<u32>,
    layers: usize,
    heads: usize,
    /// For each layer and KV head the rows that were in the cache when they were first selected, in that order.
    found: Vec<Vec<u32>>,
    /// And those that were not.
    lacking: Vec<Vec<u32>>,
    /// Layers of the session's store.
    stored_layers: usize,
    sinks: u32,
    window: u32,
    /// Length of the prompt that is replayed after.
    start: u32,
}

impl Trace {
    pub(super) fn read(
        path: &Path,
        backend: &dyn Backend,
        stored_layers: usize,
        sinks: usize,
        window: usize,
    ) -> Result<Trace> {
        let reader = TraceReader::open(path)?;
        let (_, heads) = reader.shape();
        let mut steps: BTreeMap<u32, BTreeMap<(u16, u16), Record>> = BTreeMap::new();
        for record in reader {
            let record = record?;
            // Of a step that was undone and made again, what came last.
            steps.entry(record.position).or_default().insert((record.layer, record.head), record);
        }
        let layers: BTreeSet<u16> = steps.values().flat_map(|step| step.keys().map(|&(layer, _)| layer)).collect();
        // A step that was cut short says too little.
        steps.retain(|_, step| step.len() == layers.len() * heads);
        if steps.is_empty() {
            let what = "the trace has no step in which every KV head of every layer selects";
            return Err(Error::new(ErrorCode::InvalidFormat, format!("{}: {what}", path.display())));
        }
        let lists = steps.len() * layers.len() * heads;
        let rows: usize = steps.values().flat_map(BTreeMap::values).map(|record| record.selected.len()).sum();
        if u32::try_from(2 * lists + rows).is_err() {
            return Err(Error::unsupported(format!(
                "{}: a trace of {rows} rows is too long to replay",
                path.display()
            )));
        }
        let mut words = Vec::with_capacity(2 * lists + rows);
        let mut at = 2 * lists;
        for record in steps.values().flat_map(BTreeMap::values) {
            words.extend([at as u32, (at + record.selected.len()) as u32]);
            at += record.selected.len();
        }
        steps.values().flat_map(BTreeMap::values).for_each(|record| words.extend(&record.selected));
        let mut found = vec![Vec::new(); layers.len() * heads];
        let mut lacking = found.clone();
        let mut seen = vec![HashSet::new(); found.len()];
        for step in steps.values() {
            for (list, record) in step.values().enumerate() {
                for &row in record.selected.iter().filter(|&&row| seen[list].insert(row)) {
                    let missed = record.missed.binary_search(&row).is_ok();
                    if missed { &mut lacking[list] } else { &mut found[list] }.push(row);
                }
            }
        }
        Ok(Trace {
            table: backend.allocate(4 * words.len(), Place::Device, "a trace that is replayed")?,
            words,
            there: false,
            positions: steps.keys().copied().collect(),
            layers: layers.len(),
            heads,
            found,
            lacking,
            stored_layers,
            sinks: sinks as u32,
            window: window.max(1) as u32,
            start: u32::MAX,
        })
    }

    /// A decode step begins.
    pub(super) fn begin(&mut self, step: &Step<'_>) -> Result<()> {
        if !self.there {
            let bytes: Vec<u8> = self.words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            step.backend.upload(step.stream, &bytes, &mut self.table, 0)?;
            (self.there, self.words) = (true, Vec::new());
        }
        self.start = self.start.min(step.position as u32);
        Ok(())
    }

    /// How the trace is stretched for a step at `position` of a sequence whose prompt had `start` tokens.
    fn stretched(&self, start: u32, position: u32) -> Replay<'_> {
        let at = (position - start) as usize % self.positions.len();
        // Rows that are older than the window when the prompt ends.
        let old = |length: u32| length.saturating_sub(self.window).saturating_sub(self.sinks);
        Replay {
            table: &self.table,
            lists: 2 * at * self.layers * self.heads,
            heads: self.heads as u32,
            first: self.sinks,
            narrow: old(self.positions[0]),
            wide: old(start),
            shift: position.wrapping_sub(self.positions[at]),
        }
    }

    fn layer(&self, stored: usize) -> usize {
        stored * self.layers / self.stored_layers
    }

    /// What a layer of the store selects for the token at `position`.
    pub(super) fn replay(&self, stored: usize, position: usize) -> Replay<'_> {
        let replay = self.stretched(self.start.min(position as u32), position as u32);
        Replay { lists: replay.lists + 2 * self.layer(stored) * self.heads, ..replay }
    }

    /// The rows of a prompt of `length` tokens in the order in which a layer of the store wants them in its cache: what the
    /// trace found there, what it never selected (by rank, the others behind), what it had to fetch.
    pub(super) fn first(
        &self,
        (stored, head): (usize, usize),
        kv_heads: usize,
        ranked: Vec<u32>,
        length: usize,
    ) -> Vec<u32> {
        let replay = self.stretched(length as u32, length as u32);
        let list = self.layer(stored) * self.heads + replay.head(head, kv_heads);
        let stretched = |rows: &[u32]| {
            let mut all = Vec::new();
            for &row in rows.iter().filter(|&&row| row < self.positions[0]) {
                replay.stretched(&[row], 0, length, usize::MAX, &mut all);
            }
            all
        };
        let (mut rows, lacking) = (stretched(&self.found[list]), stretched(&self.lacking[list]));
        let mut known = vec![false; length];
        rows.iter().chain(&lacking).for_each(|&row| known[row as usize] = true);
        let others = ranked.into_iter().chain(0..length as u32);
        rows.extend(others.filter(|&row| !std::mem::replace(&mut known[row as usize], true)));
        rows.extend(lacking);
        rows
    }
}
