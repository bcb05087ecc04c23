//! What a step has selected on a device, for those who want to read it afterwards.

use crate::backend::SlotGeometry;

/// The lists of a [`super::DeviceCache`] that keeps those of every layer.
pub struct DeviceLists {
    geometry: SlotGeometry,
    /// The tables from [`SlotGeometry::lists_at`] on.
    words: Vec<u32>,
}

impl DeviceLists {
    pub(super) fn new(geometry: SlotGeometry, words: Vec<u32>) -> DeviceLists {
        DeviceLists { geometry, words }
    }

    /// Rows that a KV head of a layer selected, ascending.
    pub fn selected(&self, layer: usize, head: usize) -> &[u32] {
        let g = &self.geometry;
        let count = self.at(g.selected_counts_at(layer) + head)[0] as usize;
        &self.at(g.selected_rows_at(layer) + head * g.selected)[..count.min(g.selected)]
    }

    /// Those of them that were not in the cache, ascending.
    pub fn missed(&self, layer: usize, head: usize) -> impl Iterator<Item = u32> + '_ {
        let g = &self.geometry;
        let count = self.at(g.move_counts_at(layer) + head)[0] as usize;
        let moves = self.at(g.moves_at(layer) + 2 * head * g.selected);
        moves[..2 * count.min(g.selected)].iter().step_by(2).copied()
    }

    /// Rows that a correction added, ascending.
    pub fn corrected(&self, layer: usize, head: usize) -> &[u32] {
        let g = &self.geometry;
        let count = self.at(g.corrected_counts_at(layer) + head)[0] as usize;
        &self.at(g.corrected_rows_at(layer) + head * g.corrected)[..count.min(g.corrected)]
    }

    /// Those of them that were not in the cache, ascending.
    pub fn corrected_missed(&self, layer: usize, head: usize) -> impl Iterator<Item = u32> + '_ {
        let g = &self.geometry;
        let count = self.at(g.correction_counts_at(layer) + head)[0] as usize;
        let moves = self.at(g.correction_moves_at(layer) + 2 * head * g.corrected);
        moves[..2 * count.min(g.corrected)].iter().step_by(2).copied()
    }

    /// What lies from a word of the tables on.
    fn at(&self, word: usize) -> &[u32] {
        &self.words[word - self.geometry.lists_at()..]
    }
}
