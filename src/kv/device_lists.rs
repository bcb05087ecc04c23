//! What a step has selected on a device, for those who want to read it afterwards.

use crate::backend::{Lists, SlotGeometry};

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
        self.rows(self.geometry.lists_of(layer, false), head)
    }

    /// Those of them that were not in the cache, ascending.
    pub fn missed(&self, layer: usize, head: usize) -> impl Iterator<Item = u32> + '_ {
        self.moved(self.geometry.lists_of(layer, false), head)
    }

    /// Rows that a correction added, ascending.
    pub fn corrected(&self, layer: usize, head: usize) -> &[u32] {
        self.rows(self.geometry.lists_of(layer, true), head)
    }

    /// Those of them that were not in the cache, ascending.
    pub fn corrected_missed(&self, layer: usize, head: usize) -> impl Iterator<Item = u32> + '_ {
        self.moved(self.geometry.lists_of(layer, true), head)
    }

    fn rows(&self, lists: Lists, head: usize) -> &[u32] {
        let count = self.at(lists.counts + head)[0] as usize;
        &self.at(lists.rows + head * lists.room)[..count.min(lists.room)]
    }

    fn moved(&self, lists: Lists, head: usize) -> impl Iterator<Item = u32> + '_ {
        let count = self.at(lists.move_counts + head)[0] as usize;
        let moves = self.at(lists.moves + 2 * head * lists.room);
        moves[..2 * count.min(lists.room)].iter().step_by(2).copied()
    }

    /// What lies from a word of the tables on.
    fn at(&self, word: usize) -> &[u32] {
        &self.words[word - self.geometry.lists_at()..]
    }
}
