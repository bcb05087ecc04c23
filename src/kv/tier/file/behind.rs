//! Writing behind: new rows lie in pages until their block is whole, and reach the file in batches.
//!
//! - A page holds the block's rows that are new; its mask says which. Rows are served from it as long as it exists, which
//!   is until the file has them.
//! - Appends fill blocks from end to end, so their pages become whole and are written without reading. Rows written over
//!   a victim leave a page that never does: when many wait, the block is read and merged first.
//! - A block that an open fetch reads is not written before that fetch is over, so a read never sees half a row; nor is
//!   one in which the step under way has overwritten a row (`undo`).

use std::collections::{BTreeSet, HashMap};

use super::blocks::Blocks;
use super::pages::Page;
use super::{FileStore, Op, Tuning};
use crate::backend::Slot;
use crate::kv::Place;
use crate::{Error, ErrorCode, Result};

/// Most blocks of one write: 256 KiB, where drives reach their full speed.
const TOGETHER: usize = 64;

/// A block with rows that the file lacks.
struct Dirty {
    page: Page,
    /// Rows that the page has.
    mask: u128,
    state: State,
    /// Rows have come since the write under way began.
    changed: bool,
    /// Order of their coming.
    age: u64,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    /// The rest of the block is being read, into another page.
    Loading,
    Writing,
}

/// The blocks that the file lacks.
#[derive(Default)]
pub(super) struct Behind {
    blocks: HashMap<u64, Dirty>,
    /// Those that are whole, and idle.
    whole: BTreeSet<u64>,
    clock: u64,
    /// Writes and reads-to-merge under way.
    running: usize,
}

impl Behind {
    /// The page and mask of a block that has rows the file lacks.
    pub(super) fn find(&self, block: u64) -> Option<(Page, u128)> {
        if self.blocks.is_empty() {
            return None;
        }
        self.blocks.get(&block).filter(|d| d.mask != 0).map(|d| (d.page, d.mask))
    }
}

fn most_waiting(tuning: &Tuning, blocks: &Blocks) -> usize {
    (tuning.waiting / blocks.block_bytes()).max(4 * blocks.runs())
}

/// Bytes of pages that wait, at most; those of one append come on top.
pub(super) fn most_bytes(tuning: &Tuning, blocks: &Blocks) -> usize {
    most_waiting(tuning, blocks).saturating_mul(blocks.block_bytes())
}

impl FileStore {
    /// Pages that may wait before the caller does.
    fn most_waiting(&self) -> usize {
        most_waiting(&self.tuning, &self.blocks)
    }

    /// Places for the rows of `tokens` tokens, in the order of the backend's slots. They count once `landed` is called.
    pub(super) fn place_rows(&mut self, layer: usize, tokens: usize, place: Place<'_>) -> Result<Vec<(u64, usize)>> {
        let heads = self.geometry.kv_heads;
        let mut rows = Vec::with_capacity(tokens * heads);
        for i in 0..tokens {
            for head in 0..heads {
                let row = place.row(i, head);
                assert!(row < self.blocks.capacity(), "row {row} of a file with room for {}", self.blocks.capacity());
                rows.push(self.blocks.locate(layer, head, row));
            }
        }
        for &(block, _) in &rows {
            if !self.behind.blocks.contains_key(&block) {
                let page = match self.pages.take() {
                    Ok(page) => page,
                    Err(e) => {
                        self.drop_empty(&rows);
                        return Err(e);
                    }
                };
                self.behind.clock += 1;
                let dirty = Dirty { page, mask: 0, state: State::Idle, changed: false, age: self.behind.clock };
                self.behind.blocks.insert(block, dirty);
            }
        }
        Ok(rows)
    }

    /// Where the rows go.
    pub(super) fn slots_of(&self, rows: &[(u64, usize)]) -> Vec<Slot> {
        let bytes = self.blocks.row_bytes();
        rows.iter().map(|(block, row)| self.pages.slot(self.behind.blocks[block].page, row * bytes)).collect()
    }

    /// The rows have been written into their pages.
    pub(super) fn landed(&mut self, rows: &[(u64, usize)]) {
        let (whole, bytes) = (self.blocks.whole(), self.blocks.row_bytes());
        for &(block, row) in rows {
            let dirty = self.behind.blocks.get_mut(&block).expect("placed");
            dirty.mask |= 1 << row;
            dirty.changed = true;
            if dirty.mask == whole && dirty.state == State::Idle {
                self.behind.whole.insert(block);
            }
            if let Some(sums) = &mut self.checksums {
                sums[self.blocks.index(block, row)] = super::checksum(self.pages.bytes(dirty.page, row * bytes, bytes));
            }
        }
    }

    /// Forgets the new version of a row: its page gets the old one, or leaves it to the file.
    pub(super) fn bring_back(&mut self, block: u64, row: usize, old: Option<&[u8]>) {
        let Some(dirty) = self.behind.blocks.get_mut(&block) else { return }; // its rows were never written
        if let Some(old) = old {
            self.pages.write(dirty.page, row * self.blocks.row_bytes(), old);
            dirty.changed = true;
            return;
        }
        dirty.mask &= !(1 << row);
        self.behind.whole.remove(&block);
        self.drop_if_empty(block);
    }

    /// Forgets pages that were made for rows that did not come.
    pub(super) fn drop_empty(&mut self, rows: &[(u64, usize)]) {
        for (block, _) in rows {
            self.drop_if_empty(*block);
        }
    }

    fn drop_if_empty(&mut self, block: u64) {
        if self.behind.blocks.get(&block).is_some_and(|d| d.mask == 0 && d.state == State::Idle) {
            let dirty = self.behind.blocks.remove(&block).expect("just seen");
            self.pages.give(dirty.page);
        }
    }

    /// Rows from `rows` on mean nothing any more.
    pub(super) fn forget_rows(&mut self, rows: usize) {
        let blocks: Vec<u64> = self.behind.blocks.keys().copied().collect();
        for block in blocks {
            let keep = rows.saturating_sub(self.blocks.first_row(block));
            if keep >= self.blocks.rows_per_block() {
                continue;
            }
            let dirty = self.behind.blocks.get_mut(&block).expect("just listed");
            dirty.mask &= (1 << keep) - 1;
            self.behind.whole.remove(&block);
            self.drop_if_empty(block);
        }
    }

    /// Starts the writes that are worth it, and waits where too much is waiting already.
    pub(super) fn write_behind(&mut self) -> Result<()> {
        let most = self.most_waiting();
        if self.behind.whole.len() >= most / 4 || self.behind.blocks.len() > most / 2 {
            self.write_whole()?;
        }
        if self.behind.blocks.len() > most / 2 {
            self.merge_oldest(most / 4)?;
        }
        while self.behind.blocks.len() > most {
            if self.behind.running == 0 {
                self.write_whole()?;
                self.merge_oldest(most / 2)?;
                if self.behind.running == 0 {
                    break; // all that is left waits for open fetches or for the step, which the caller will end
                }
            }
            self.poll(true)?;
            self.write_whole()?;
        }
        Ok(())
    }

    /// Whether a block must not be written now.
    fn busy(&self, block: u64) -> bool {
        self.under_fetch(block) || self.undo.holds(block)
    }

    /// Writes every whole block that nobody is reading.
    fn write_whole(&mut self) -> Result<()> {
        let ready: Vec<u64> = self.behind.whole.iter().copied().filter(|&b| !self.busy(b)).collect();
        let together = ready.chunk_by(|&a, &b| a + 1 == b).flat_map(|run| run.chunks(TOGETHER));
        let mut requests = Vec::new();
        for blocks in together {
            let mut pages = Vec::with_capacity(blocks.len());
            for block in blocks {
                let dirty = self.behind.blocks.get_mut(block).expect("whole blocks have pages");
                (dirty.state, dirty.changed) = (State::Writing, false);
                self.behind.whole.remove(block);
                pages.push(dirty.page);
            }
            self.behind.running += 1;
            let bytes = blocks.len() * self.blocks.block_bytes();
            requests.push(self.request(Op::Write(blocks.to_vec()), blocks[0], &pages, 0, bytes));
        }
        self.submit(requests)
    }

    /// Reads the blocks of the oldest pages that are not whole, until `leave` are left.
    fn merge_oldest(&mut self, leave: usize) -> Result<()> {
        let whole = self.blocks.whole();
        let idle = self.behind.blocks.iter().filter(|(_, d)| d.state == State::Idle && d.mask != whole);
        let mut oldest: Vec<(u64, u64)> = idle.map(|(&block, d)| (d.age, block)).collect();
        oldest.sort_unstable();
        oldest.truncate(oldest.len().saturating_sub(leave));
        let mut requests = Vec::new();
        for (_, block) in oldest {
            if self.busy(block) {
                continue;
            }
            let page = self.pages.take()?;
            self.behind.blocks.get_mut(&block).expect("just listed").state = State::Loading;
            self.behind.running += 1;
            requests.push(self.request(Op::Load(block, page), block, &[page], 0, self.blocks.block_bytes()));
        }
        self.submit(requests)
    }

    /// A write has completed.
    pub(super) fn written(&mut self, blocks: &[u64]) {
        self.behind.running -= 1;
        let whole = self.blocks.whole();
        for &block in blocks {
            let dirty = self.behind.blocks.get_mut(&block).expect("a page stays while it is written");
            dirty.state = State::Idle;
            if dirty.changed && dirty.mask != 0 {
                if dirty.mask == whole {
                    self.behind.whole.insert(block);
                }
            } else {
                dirty.mask = 0;
                self.drop_if_empty(block);
            }
        }
    }

    /// The rest of a block has been read, into `page`.
    pub(super) fn loaded(&mut self, block: u64, page: Page) {
        self.behind.running -= 1;
        let (bytes, whole) = (self.blocks.row_bytes(), self.blocks.whole());
        let dirty = self.behind.blocks.get_mut(&block).expect("a page stays while its block is read");
        dirty.state = State::Idle;
        if dirty.mask != 0 {
            for row in (0..self.blocks.rows_per_block()).filter(|row| dirty.mask >> row & 1 == 0) {
                self.pages.copy(page, dirty.page, row * bytes, bytes);
            }
            dirty.mask = whole;
            self.behind.whole.insert(block);
        }
        self.pages.give(page);
        self.drop_if_empty(block);
    }

    /// What reserving more than the file holds is answered with.
    pub(super) fn too_many_rows(&self, rows: usize) -> Error {
        Error::new(
            ErrorCode::Capacity,
            format!(
                "{}: {rows} rows of keys and values do not fit the file, which has room for {}",
                self.path.display(),
                self.blocks.capacity()
            ),
        )
    }
}
