//! Undoing a step: rows that it wrote over entries are kept from the file until it can no longer fail.
//!
//! - The file has the old row, or its page had it and a copy of that is kept here. Either way nothing is read to keep it.
//! - The blocks of such rows are not written before the next step begins.

use std::collections::{HashMap, HashSet};

use super::FileStore;
use crate::Result;

/// A row that was overwritten.
struct Old {
    /// Its bytes, where a page had it; otherwise the file has it.
    bytes: Option<Vec<u8>>,
    /// Its checksum, where they are kept.
    checksum: u32,
}

/// What the step under way has overwritten.
#[derive(Default)]
pub(super) struct Undo {
    /// Rows with entries when the step began.
    begun: usize,
    /// By block and row of the block.
    rows: HashMap<(u64, usize), Old>,
    /// Blocks of these rows.
    held: HashSet<u64>,
}

impl Undo {
    /// Whether a block may not be written yet.
    pub(super) fn holds(&self, block: u64) -> bool {
        self.held.contains(&block)
    }
}

impl FileStore {
    /// A step begins.
    pub(super) fn begin_step(&mut self, rows: usize) {
        self.undo.begun = rows;
        self.undo.rows.clear();
        self.undo.held.clear();
    }

    /// These rows, which have places in pages, are about to be written, for the first time or over entries.
    pub(super) fn keep_old(&mut self, rows: &[(u64, usize)]) {
        let bytes = self.blocks.row_bytes();
        for &(block, row) in rows {
            let before = self.blocks.first_row(block) + row < self.undo.begun;
            if !before || self.undo.rows.contains_key(&(block, row)) {
                continue;
            }
            let paged = self.behind.find(block).filter(|(_, mask)| mask >> row & 1 == 1);
            let old = Old {
                bytes: paged.map(|(page, _)| self.pages.bytes(page, row * bytes, bytes).to_vec()),
                checksum: self.checksums.as_ref().map_or(0, |sums| sums[self.blocks.index(block, row)]),
            };
            self.undo.rows.insert((block, row), old);
            self.undo.held.insert(block);
        }
    }

    /// Brings back what the step has overwritten.
    pub(super) fn undo_step(&mut self) -> Result<()> {
        self.usable()?;
        for ((block, row), old) in std::mem::take(&mut self.undo.rows) {
            if let Some(sums) = &mut self.checksums {
                sums[self.blocks.index(block, row)] = old.checksum;
            }
            self.bring_back(block, row, old.bytes.as_deref());
        }
        self.undo.held.clear();
        Ok(())
    }
}
