//! The trace of a session whose device selects: its lists come over when a token is done, and only then.

use crate::Result;
use crate::kv::{DeviceCache, DevicePool};
use crate::policy::{PolicyOptions, Record, Setting, Step, TraceWriter};

pub(super) struct Traced {
    writer: TraceWriter,
    kv_heads: usize,
    /// The token whose lists the device has.
    position: usize,
    rehearsed: Vec<Rehearsed>,
}

/// A layer that the device has selected for.
struct Rehearsed {
    of_model: usize,
    of_store: usize,
    /// Rows that held tokens.
    candidates: usize,
    /// Whether a correction has joined.
    corrected: bool,
    /// Whether it has attended what was selected. If not, it is not written.
    landed: bool,
}

impl Traced {
    /// Makes the file, where a trace is asked for.
    pub(super) fn create(options: &PolicyOptions, setting: &Setting) -> Result<Option<Traced>> {
        let Some(path) = &options.trace else { return Ok(None) };
        let (layers, kv_heads) = (setting.geometry.layers, setting.geometry.kv_heads);
        let writer = TraceWriter::create(path, layers, kv_heads)?;
        Ok(Some(Traced { writer, kv_heads, position: 0, rehearsed: Vec::new() }))
    }

    /// The device selects for `layer` of the store, of which `candidates` rows hold tokens.
    pub(super) fn rehearsed(&mut self, step: &Step<'_>, layer: usize, candidates: usize) {
        self.position = step.position;
        let (of_model, of_store) = (step.layer, layer);
        self.rehearsed.push(Rehearsed { of_model, of_store, candidates, corrected: false, landed: false });
    }

    /// The device corrects what it has selected for the layer of the store.
    pub(super) fn corrected(&mut self, layer: usize) {
        self.rehearsed.iter_mut().filter(|rehearsed| rehearsed.of_store == layer).for_each(|r| r.corrected = true);
    }

    /// The layer of the store attends what the device has selected for it.
    pub(super) fn landed(&mut self, layer: usize) {
        self.rehearsed.iter_mut().filter(|rehearsed| rehearsed.of_store == layer).for_each(|r| r.landed = true);
    }

    /// Writes down what the device has selected since the last call. After an error it is forgotten.
    pub(super) fn write(&mut self, step: &Step<'_>, cache: &DeviceCache, pool: Option<&DevicePool>) -> Result<()> {
        let mut rehearsed = std::mem::take(&mut self.rehearsed);
        rehearsed.retain(|rehearsed| rehearsed.landed);
        if rehearsed.is_empty() {
            return Ok(());
        }
        let lists = cache.lists(step.backend, step.stream)?;
        let tokens = pool.map(|pool| pool.tokens(step.backend, step.stream)).transpose()?;
        for Rehearsed { of_model, of_store: layer, candidates, corrected, .. } in rehearsed {
            for head in 0..self.kv_heads {
                // What a token selects stays in its row at least until the token is done.
                let of_rows = |rows: &mut dyn Iterator<Item = u32>| {
                    let token = |row| tokens.as_ref().map_or(row, |tokens| tokens.token(layer, head, row));
                    let mut tokens: Vec<u32> = rows.map(token).collect();
                    tokens.sort_unstable();
                    tokens
                };
                let (mut more, mut more_missed) = (&[][..], Vec::new());
                if corrected {
                    more = lists.corrected(layer, head);
                    more_missed.extend(lists.corrected_missed(layer, head));
                }
                self.writer.write(&Record {
                    position: self.position as u32,
                    layer: of_model as u16,
                    head: head as u16,
                    candidates: candidates as u32,
                    selected: of_rows(&mut lists.selected(layer, head).iter().chain(more).copied()),
                    missed: of_rows(&mut lists.missed(layer, head).chain(more_missed)),
                    corrected: of_rows(&mut more.iter().copied()),
                })?;
            }
        }
        self.writer.flush()
    }
}
