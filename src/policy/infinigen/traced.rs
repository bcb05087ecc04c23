//! The trace of a session whose device selects: its lists come over when a token is done, and only then.

use crate::Result;
use crate::kv::{DeviceCache, DevicePool};
use crate::policy::{PolicyOptions, Record, Setting, Step, TraceWriter};

pub(super) struct Traced {
    writer: TraceWriter,
    kv_heads: usize,
    /// The token whose lists the device has, and what its layers could select: of the model, of the store, candidates.
    position: usize,
    rehearsed: Vec<(usize, usize, usize)>,
    /// Layers of the store that have attended what they selected: the others are not written.
    landed: Vec<usize>,
}

impl Traced {
    /// Makes the file, where a trace is asked for.
    pub(super) fn create(options: &PolicyOptions, setting: &Setting) -> Result<Option<Traced>> {
        let Some(path) = &options.trace else { return Ok(None) };
        let (layers, kv_heads) = (setting.geometry.layers, setting.geometry.kv_heads);
        let writer = TraceWriter::create(path, layers, kv_heads)?;
        Ok(Some(Traced { writer, kv_heads, position: 0, rehearsed: Vec::new(), landed: Vec::new() }))
    }

    /// The device selects for `layer` of the store, of which `candidates` rows hold tokens.
    pub(super) fn rehearsed(&mut self, step: &Step<'_>, layer: usize, candidates: usize) {
        self.position = step.position;
        self.rehearsed.push((step.layer, layer, candidates));
    }

    /// The layer of the store attends what the device has selected for it.
    pub(super) fn landed(&mut self, layer: usize) {
        self.landed.push(layer);
    }

    /// Writes down what the device has selected since the last call. After an error it is forgotten.
    pub(super) fn write(&mut self, step: &Step<'_>, cache: &DeviceCache, pool: Option<&DevicePool>) -> Result<()> {
        let landed = std::mem::take(&mut self.landed);
        let mut rehearsed = std::mem::take(&mut self.rehearsed);
        rehearsed.retain(|(_, layer, _)| landed.contains(layer));
        if rehearsed.is_empty() {
            return Ok(());
        }
        let lists = cache.lists(step.backend, step.stream)?;
        let tokens = pool.map(|pool| pool.tokens(step.backend, step.stream)).transpose()?;
        for (of_model, layer, candidates) in rehearsed {
            for head in 0..self.kv_heads {
                // What a token selects stays in its row at least until the token is done.
                let of_rows = |rows: &mut dyn Iterator<Item = u32>| {
                    let token = |row| tokens.as_ref().map_or(row, |tokens| tokens.token(layer, head, row));
                    let mut tokens: Vec<u32> = rows.map(token).collect();
                    tokens.sort_unstable();
                    tokens
                };
                self.writer.write(&Record {
                    position: self.position as u32,
                    layer: of_model as u16,
                    head: head as u16,
                    candidates: candidates as u32,
                    selected: of_rows(&mut lists.selected(layer, head).iter().copied()),
                    missed: of_rows(&mut lists.missed(layer, head)),
                    corrected: Vec::new(),
                })?;
            }
        }
        self.writer.flush()
    }
}
