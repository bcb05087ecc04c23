//! Which bytes of the file are which rows.

use super::pages::ALIGN;
use crate::backend::{KvGeometry, Payload};

/// Rows of a block that a mask has bits for.
const MOST_ROWS: usize = 128;

/// The file is one contiguous region of blocks for each layer and KV head, so that neighbouring rows are read together.
/// A row lies inside one block: where rows do not fill it, its end is unused (none of a 256-byte row, 0.4% of an INT8
/// row at d = 64).
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    kv_heads: usize,
    runs: usize,
    row_bytes: usize,
    block_bytes: usize,
    rows_per_block: usize,
    per_run: usize,
}

impl Blocks {
    /// For `rows` rows in every run, or as many as fit `limit` bytes where that is not 0.
    pub(super) fn new(geometry: &KvGeometry, payload: Payload, rows: usize, limit: u64) -> Blocks {
        let row_bytes = payload.row_bytes(geometry);
        let block_bytes = row_bytes.next_multiple_of(ALIGN);
        let rows_per_block = (block_bytes / row_bytes).min(MOST_ROWS);
        let runs = geometry.layers * geometry.kv_heads;
        let mut per_run = rows.div_ceil(rows_per_block);
        if limit != 0 {
            let most = limit / (runs * block_bytes) as u64;
            per_run = per_run.min(usize::try_from(most).unwrap_or(usize::MAX));
        }
        Blocks { kv_heads: geometry.kv_heads, runs, row_bytes, block_bytes, rows_per_block, per_run }
    }

    /// Number of runs: layers times heads.
    pub(super) fn runs(&self) -> usize {
        self.runs
    }

    pub(super) fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    pub(super) fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    pub(super) fn rows_per_block(&self) -> usize {
        self.rows_per_block
    }

    /// Rows that fit every run.
    pub(super) fn capacity(&self) -> usize {
        self.per_run * self.rows_per_block
    }

    /// Length of the file; `None` where no file is that long.
    pub(super) fn file_bytes(&self) -> Option<u64> {
        (self.runs as u64).checked_mul(self.per_run as u64)?.checked_mul(self.block_bytes as u64)
    }

    /// The block of a row, counted over the whole file, and which of its rows it is.
    pub(super) fn locate(&self, layer: usize, head: usize, row: usize) -> (u64, usize) {
        debug_assert!(head < self.kv_heads && row < self.capacity());
        let run = layer * self.kv_heads + head;
        ((run * self.per_run + row / self.rows_per_block) as u64, row % self.rows_per_block)
    }

    /// Row of its run that a block begins with.
    pub(super) fn first_row(&self, block: u64) -> usize {
        block as usize % self.per_run * self.rows_per_block
    }

    /// Number of a row among all rows of all runs: for tables.
    pub(super) fn index(&self, block: u64, row: usize) -> usize {
        block as usize * self.rows_per_block + row
    }

    /// Bit of every row of a block.
    pub(super) fn whole(&self) -> u128 {
        u128::MAX >> (MOST_ROWS - self.rows_per_block)
    }

    /// Whether two blocks lie in the same run.
    pub(super) fn same_run(&self, a: u64, b: u64) -> bool {
        a as usize / self.per_run == b as usize / self.per_run
    }
}
