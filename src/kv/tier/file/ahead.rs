//! Reading ahead: which rows of a fetch lie where, and landing them.

use std::ops::Range;
use std::time::Instant;

use super::blocks::Blocks;
use super::pages::Page;
use super::{FileStore, Op, Tuning};
use crate::backend::{Backend, KvRunsMut, Landing, Move, Stream};
use crate::{Error, ErrorCode, Result};

/// Blocks that nobody asked for are read when they lie between two that are, and are at most so many bytes: what a drive
/// transfers in the time that another request costs it (2 to 10 µs, at 2 to 7 GB/s).
const GAP_DIRECT: usize = 16 << 10;

/// The same for the page cache: what it copies in the time of another request (about 1 µs).
const GAP_BUFFERED: usize = 4 << 10;

/// A fetch that was begun.
pub(super) struct Fetch {
    pub(super) id: u64,
    pub(super) layer: usize,
    /// Rows that the file does not have yet, in pages of the fetch's own.
    ready: Vec<Landing>,
    ready_pages: Vec<Page>,
    /// The others, in order.
    rows: Vec<FileRow>,
    /// Reads, in order of their blocks.
    pieces: Vec<Piece>,
    /// Pieces that have been submitted.
    submitted: usize,
    /// Pages of pieces that were submitted and have not landed.
    pages: usize,
    arrived: Vec<(usize, Vec<Page>)>,
    landed: usize,
}

struct FileRow {
    to: Move,
    block: u64,
    /// Row of the block.
    row: usize,
    /// As it was when the fetch began; 0 for none.
    checksum: u32,
}

struct Piece {
    first: u64,
    blocks: usize,
    rows: Range<usize>,
}

impl Fetch {
    /// The read of piece `index` has come.
    pub(super) fn arrive(&mut self, index: usize, pages: Vec<Page>) {
        self.arrived.push((index, pages));
    }
}

/// Bytes of pages that one fetch holds, at most; copies of rows that the file does not have yet come on top.
pub(super) fn most_bytes(tuning: &Tuning, blocks: &Blocks) -> usize {
    tuning.ahead.max(tuning.piece.max(blocks.block_bytes()))
}

impl FileStore {
    /// Whether an open fetch reads a block.
    pub(super) fn under_fetch(&self, block: u64) -> bool {
        self.fetches.iter().any(|fetch| {
            let after = fetch.pieces.partition_point(|p| p.first <= block);
            after > 0 && block < fetch.pieces[after - 1].first + fetch.pieces[after - 1].blocks as u64
        })
    }

    /// Sorts the moves, `count` of them, into rows at hand and reads.
    pub(super) fn plan_fetch(
        &mut self,
        layer: usize,
        count: usize,
        moves: impl Iterator<Item = Move>,
    ) -> Result<Fetch> {
        self.next += 1;
        let mut fetch = Fetch {
            id: self.next,
            layer,
            ready: Vec::new(),
            ready_pages: Vec::new(),
            rows: Vec::with_capacity(count),
            pieces: Vec::new(),
            submitted: 0,
            pages: 0,
            arrived: Vec::new(),
            landed: 0,
        };
        let block_bytes = self.blocks.block_bytes();
        let gap = (if self.direct { GAP_DIRECT } else { GAP_BUFFERED }) / block_bytes;
        let most = (self.tuning.piece / block_bytes).max(1);
        // What is known of the block of the last move.
        let mut current = None;
        for m in moves {
            let (head, from) = (m.head as usize, m.from as usize);
            assert!(head < self.geometry.kv_heads && from < self.blocks.capacity(), "no such row: {m:?}");
            let (block, row) = self.blocks.locate(layer, head, from);
            if current.is_none_or(|(known, _)| known != block) {
                let copy = match self.behind.find(block) {
                    // Copied: by the time the rows land, the page may be written and used for something else.
                    Some((page, mask)) => match self.pages.take() {
                        Ok(copy) => {
                            self.pages.copy(page, copy, 0, block_bytes);
                            fetch.ready_pages.push(copy);
                            Some((copy, mask))
                        }
                        Err(e) => {
                            self.drop_fetch(fetch);
                            return Err(e);
                        }
                    },
                    None => None,
                };
                current = Some((block, copy));
            }
            if let Some((_, Some((page, mask)))) = current
                && mask >> row & 1 == 1
            {
                let from = self.pages.slot(page, row * self.blocks.row_bytes());
                fetch.ready.push(Landing { from, head: m.head, to: m.to });
                continue;
            }
            let checksum = self.checksums.as_ref().map_or(0, |sums| sums[self.blocks.index(block, row)]);
            fetch.rows.push(FileRow { to: m, block, row, checksum });
            let at = fetch.rows.len();
            match fetch.pieces.last_mut() {
                Some(piece)
                    if block >= piece.first
                        && block <= piece.first + (piece.blocks + gap) as u64
                        && block - piece.first < most as u64
                        && self.blocks.same_run(block, piece.first) =>
                {
                    piece.blocks = piece.blocks.max((block - piece.first) as usize + 1);
                    piece.rows.end = at;
                }
                last => {
                    let sorted = last.is_none_or(|piece| block >= piece.first + piece.blocks as u64);
                    assert!(sorted, "the moves of a fetch must be sorted by head, then by row");
                    fetch.pieces.push(Piece { first: block, blocks: 1, rows: at - 1..at });
                }
            }
        }
        Ok(fetch)
    }

    /// Submits reads of a fetch as far as its memory goes.
    pub(super) fn read_ahead(&mut self, at: usize) -> Result<()> {
        let most = self.tuning.ahead / self.blocks.block_bytes();
        let (block_bytes, row_bytes) = (self.blocks.block_bytes(), self.blocks.row_bytes());
        let mut requests = Vec::new();
        let outcome = loop {
            let fetch = &self.fetches[at];
            let index = fetch.submitted;
            let Some(piece) = fetch.pieces.get(index) else { break Ok(()) };
            if fetch.pages > 0 && fetch.pages + piece.blocks > most {
                break Ok(());
            }
            let (first, blocks) = (piece.first, piece.blocks);
            // Whole blocks around the page cache; through it, just the rows.
            let (skip, bytes) = if self.direct {
                (0, blocks * block_bytes)
            } else {
                let (from, to) = (&fetch.rows[piece.rows.start], &fetch.rows[piece.rows.end - 1]);
                let end = (to.block - first) as usize * block_bytes + (to.row + 1) * row_bytes;
                (from.row * row_bytes, end - from.row * row_bytes)
            };
            let id = fetch.id;
            let pages = match self.take_pages(blocks) {
                Ok(pages) => pages,
                Err(e) => break Err(e),
            };
            let fetch = &mut self.fetches[at];
            fetch.submitted += 1;
            fetch.pages += blocks;
            let op = Op::Read { fetch: id, piece: index, pages: pages.clone() };
            requests.push(self.request(op, first, &pages, skip, bytes));
            self.counters.file_read_bytes += bytes as u64;
            self.reading(1);
        };
        self.submit(requests)?;
        outcome
    }

    fn take_pages(&mut self, count: usize) -> Result<Vec<Page>> {
        let mut pages = Vec::with_capacity(count);
        while pages.len() < count {
            match self.pages.take() {
                Ok(page) => pages.push(page),
                Err(e) => {
                    pages.into_iter().for_each(|page| self.pages.give(page));
                    return Err(e);
                }
            }
        }
        Ok(pages)
    }

    /// Lands the whole of fetch `at`, waiting for its reads.
    pub(super) fn land(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        at: usize,
        target: &mut KvRunsMut<'_>,
    ) -> Result<()> {
        let ready = std::mem::take(&mut self.fetches[at].ready);
        self.counters.host_bytes += (ready.len() * self.blocks.row_bytes()) as u64;
        self.counters.file_bytes += (self.fetches[at].rows.len() * self.blocks.row_bytes()) as u64;
        if !ready.is_empty() {
            backend.decode_kv_rows(stream, self.payload, self.pages.chunks(), &ready, target)?;
        }
        let mut landings = ready;
        loop {
            self.poll(false)?;
            let arrived = std::mem::take(&mut self.fetches[at].arrived);
            if !arrived.is_empty() {
                landings.clear();
                for (index, pages) in &arrived {
                    self.verify(&self.fetches[at], *index, pages, &mut landings)?;
                }
                backend.decode_kv_rows(stream, self.payload, self.pages.chunks(), &landings, target)?;
                // The pages are about to be used again; a backend whose streams run later must have read them.
                backend.synchronize(stream)?;
                for (_, pages) in arrived {
                    self.fetches[at].landed += 1;
                    self.fetches[at].pages -= pages.len();
                    pages.into_iter().for_each(|page| self.pages.give(page));
                }
                self.read_ahead(at)?;
                continue;
            }
            let fetch = &self.fetches[at];
            if fetch.landed == fetch.pieces.len() {
                break;
            }
            let start = Instant::now();
            let reaped = self.poll(true);
            self.counters.wait_seconds += start.elapsed().as_secs_f64();
            reaped?;
        }
        backend.synchronize(stream)
    }

    /// Where the rows of an arrived piece lie, and that they are what was written.
    fn verify(&self, fetch: &Fetch, index: usize, pages: &[Page], landings: &mut Vec<Landing>) -> Result<()> {
        let (piece, bytes) = (&fetch.pieces[index], self.blocks.row_bytes());
        for row in &fetch.rows[piece.rows.clone()] {
            let page = pages[(row.block - piece.first) as usize];
            if row.checksum != 0 && super::checksum(self.pages.bytes(page, row.row * bytes, bytes)) != row.checksum {
                let offset = row.block * self.blocks.block_bytes() as u64 + (row.row * bytes) as u64;
                return Err(Error::new(
                    ErrorCode::Io,
                    format!(
                        "{}: the {bytes} bytes at {offset} are not what was written there (their checksums differ)",
                        self.path.display()
                    ),
                ));
            }
            landings.push(Landing { from: self.pages.slot(page, row.row * bytes), head: row.to.head, to: row.to.to });
        }
        Ok(())
    }

    /// Gives a fetch's pages back. Those of reads under way follow when they complete.
    pub(super) fn drop_fetch(&mut self, fetch: Fetch) {
        fetch.ready_pages.into_iter().for_each(|page| self.pages.give(page));
        for (_, pages) in fetch.arrived {
            pages.into_iter().for_each(|page| self.pages.give(page));
        }
    }
}
