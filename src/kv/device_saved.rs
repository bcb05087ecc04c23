//! Entries of a device's hot cache that a step overwrites, for a step that is undone.
//!
//! An entry that was admitted is exact, also where the store has it quantized, so there it cannot be fetched once more.
//! What a decoded token overwrites is kept on the device as it goes (`Prefetch::saved`, `Admission::saved`); before an edit
//! of the tables, which is seldom, the whole cache goes to the host.

use std::sync::Arc;

use crate::Result;
use crate::backend::{Backend, Buffer, Header, KvGeometry, KvRuns, KvRunsMut, Move, Slot, SlotGeometry, Stream};

use super::overwritten::Overwritten;
use super::{Pool, SequenceKv};

pub(super) struct Saved {
    /// Of each layer and KV head what lay in the slots of the misses, and last what lay in that of the new token.
    kv: SequenceKv,
    /// As much of the misses of corrections.
    corrected: SequenceKv,
    /// All entries, extent by extent.
    all: Overwritten,
}

impl Saved {
    pub(super) fn new(pool: Arc<Pool>, kv: KvGeometry) -> Saved {
        let of = || SequenceKv::new(pool.clone(), kv);
        Saved { kv: of(), corrected: of(), all: Overwritten::new(kv.extent_bytes()) }
    }

    /// Makes room for what a step overwrites that selects up to `selected` rows, and corrects by up to `corrected`.
    pub(super) fn reserve(&mut self, selected: usize, corrected: usize) -> Result<()> {
        self.kv.reserve(selected + 1)?;
        self.corrected.reserve(corrected)
    }

    /// Gives back room beyond that.
    pub(super) fn shrink(&mut self, selected: usize, corrected: usize) {
        self.kv.truncate(if selected == 0 { 0 } else { selected + 1 });
        self.corrected.truncate(corrected);
    }

    pub(super) fn bytes(&self) -> usize {
        self.kv.bytes() + self.corrected.bytes()
    }

    /// Bytes of what [`Saved::reserve`] makes room for.
    pub(super) fn bytes_of(kv: &KvGeometry, selected: usize, corrected: usize) -> usize {
        (kv.extents(selected + 1) + kv.extents(corrected)) * kv.extent_bytes()
    }

    /// A new step begins; the last one can no longer be undone.
    pub(super) fn begin(&mut self) {
        self.all.clear();
    }

    /// What is kept of a layer; `corrects`: that of corrections.
    pub(super) fn layer(&self, layer: usize, corrects: bool) -> KvRuns<'_> {
        if corrects { self.corrected.layer(layer) } else { self.kv.layer(layer) }
    }

    /// As [`Saved::layer`], for writing.
    pub(super) fn layer_mut(&mut self, layer: usize, corrects: bool) -> KvRunsMut<'_> {
        if corrects { self.corrected.layer_mut(layer) } else { self.kv.layer_mut(layer) }
    }

    /// Keeps all entries, unless this step has already.
    pub(super) fn keep(&mut self, backend: &dyn Backend, stream: &Stream, extents: &[Buffer]) -> Result<()> {
        let mut all = (0..extents.len()).map(|buffer| Slot { buffer, offset: 0 });
        all.try_for_each(|extent| self.all.save(backend, stream, extents, extent))
    }

    /// Brings all entries back that were kept so.
    pub(super) fn restore(&mut self, backend: &dyn Backend, stream: &Stream, extents: &mut [Buffer]) -> Result<()> {
        self.all.restore(backend, stream, extents)
    }

    /// From which row what `step` has overwritten in a layer goes back to which slot: by the journal in the tables. First what
    /// is not of corrections, then what is.
    pub(super) fn overwritten(&self, g: &SlotGeometry, words: &[u32], layer: usize, step: u32) -> [Vec<Move>; 2] {
        let mut moves = [Vec::new(), Vec::new()];
        for head in 0..g.kv_heads {
            let table = layer * g.kv_heads + head;
            let header = |which: Header| words[g.header_at(table) + which as usize];
            if header(Header::Step) != step {
                continue;
            }
            let selected = header(Header::Selected);
            let mut missed = [0, 0];
            for i in 0..header(Header::Changes) {
                let at = g.journal_at(table) + SlotGeometry::CHANGE * i as usize;
                let (slot, row) = (words[at], words[at + 1]);
                let admitted = i >= selected + header(Header::Corrected);
                let of = usize::from(i >= selected && !admitted);
                let from = if admitted { g.selected as u32 } else { missed[of] };
                // (A token that takes the row of a victim takes its slot, in which the row stays the same.)
                let hit = !admitted && words[g.rows_at(table) + slot as usize] == row;
                missed[of] += u32::from(!hit && !admitted);
                if !hit && row != SlotGeometry::NONE {
                    moves[of].push(Move { head: head as u32, from, to: slot });
                }
            }
        }
        moves
    }
}
