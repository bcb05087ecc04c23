//! Entries in a file: read ahead, written behind.
//!
//! ```text
//!  append ─► encode ─► pages of whole blocks ── batches ─► file
//!                        │ rows the file lacks               │ begin_fetch: reads are under way when it returns
//!                        └──────────────► finish_fetch ◄─────┘ ─► decode ─► target
//! ```
//!
//! - `open`: makes the file; `blocks`: which bytes are which rows; `pages`: aligned memory for blocks.
//! - `undo`: what a step that fails has overwritten.
//! - `io`: the engines, `ring` (io_uring) and `threads` (where that is forbidden); `ahead` reads, `behind` writes.
//! - One failed read or write makes the store unusable, with the reason: it never hands out what it is not sure of.
//! - What may not enter: which entries are worth fetching.

mod ahead;
mod behind;
mod blocks;
mod io;
mod open;
mod pages;
#[cfg(target_os = "linux")]
mod ring;
#[cfg(test)]
mod tests;
mod threads;
mod undo;

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Backend, KvGeometry, KvRuns, KvRunsMut, Move, Payload, Rows, Stream};
use crate::kv::{FetchCounters, FileOptions, Place, Store};
use crate::{Error, ErrorCode, Result};

use ahead::Fetch;
use behind::Behind;
use blocks::Blocks;
use io::{Io, Request};
use pages::{Page, Pages};
use undo::Undo;

/// Times that a request which moved too few bytes is tried, the first included. The kernel may stop early for reasons of
/// its own; a file that has shrunk is seen at once.
const TRIES: u8 = 3;

/// How much memory is spent on keeping a drive busy.
#[derive(Clone, Copy, Debug)]
struct Tuning {
    /// Bytes of blocks that wait to be written, at least; more where every run's last block needs it.
    waiting: usize,
    /// Most bytes of one read: drives reach their full speed below it, with several under way.
    piece: usize,
    /// Bytes of one fetch for blocks that are being read or have arrived. What they do not hold is read as they land.
    ahead: usize,
}

const TUNING: Tuning = Tuning { waiting: 8 << 20, piece: 1 << 20, ahead: 8 << 20 };

/// A store in a preallocated file.
pub struct FileStore {
    geometry: KvGeometry,
    payload: Payload,
    blocks: Blocks,
    path: PathBuf,
    file: Arc<File>,
    direct: bool,
    tuning: Tuning,
    io: Box<dyn Io>,
    pages: Pages,
    behind: Behind,
    undo: Undo,
    fetches: Vec<Fetch>,
    /// Requests under way, by token.
    operations: HashMap<u64, Op>,
    /// Last token given.
    next: u64,
    /// Checksum of every row, 0 where none was written, if they are kept.
    checksums: Option<Vec<u32>>,
    /// Reads of fetches under way, and since when there are any.
    reads: usize,
    reading_since: Option<Instant>,
    /// Why the store is unusable.
    failed: Option<Error>,
    counters: FetchCounters,
}

/// What a request is for.
enum Op {
    /// Of these blocks' pages.
    Write(Vec<u64>),
    /// Of a block, to be merged with its page.
    Load(u64, Page),
    /// For a fetch, which may be given up by the time it completes.
    Read { fetch: u64, piece: usize, pages: Vec<Page> },
}

impl FileStore {
    /// Makes the file, for `capacity_rows` rows in every run, or for as many as fit `options.limit`. `geometry` has the
    /// store's number of layers and the device's element type.
    ///
    /// Memory: up to 8 MiB for rows that are to be written and 8 MiB for each fetch, as they are needed.
    ///
    /// Errors: a path that exists is `InvalidArgument`; no room for the file is `Capacity`; others are `Io`.
    pub fn new(
        backend: Arc<dyn Backend>,
        geometry: KvGeometry,
        payload: Payload,
        options: &FileOptions,
        capacity_rows: usize,
    ) -> Result<FileStore> {
        FileStore::with_engine(backend, geometry, payload, options, capacity_rows, TUNING, io::engine)
    }

    /// Bytes of such a store: of memory at most, and of the file.
    pub fn bytes_of(
        geometry: &KvGeometry,
        payload: Payload,
        options: &FileOptions,
        capacity_rows: usize,
    ) -> (usize, usize) {
        let blocks = Blocks::new(geometry, payload, capacity_rows, options.limit);
        let file = blocks.file_bytes().map_or(usize::MAX, |n| n as usize);
        let of_layer = file / geometry.layers.max(1);
        // Two fetches are under way at a time.
        let pages =
            behind::most_bytes(&TUNING, &blocks).min(file) + 2 * ahead::most_bytes(&TUNING, &blocks).min(of_layer);
        (Pages::allocated_for(pages, blocks.block_bytes()), file)
    }

    fn with_engine(
        backend: Arc<dyn Backend>,
        geometry: KvGeometry,
        payload: Payload,
        options: &FileOptions,
        capacity_rows: usize,
        tuning: Tuning,
        engine: impl FnOnce(&Arc<File>) -> Result<Box<dyn Io>>,
    ) -> Result<FileStore> {
        let blocks = Blocks::new(&geometry, payload, capacity_rows, options.limit);
        let bytes = blocks.file_bytes().ok_or_else(|| {
            Error::new(
                ErrorCode::Capacity,
                format!("{capacity_rows} rows of keys and values are more than a file holds"),
            )
        })?;
        if bytes == 0 && capacity_rows > 0 {
            return Err(Error::new(
                ErrorCode::Capacity,
                format!(
                    "a file of at most {} bytes is too small: each of {} runs takes {} bytes at a time",
                    options.limit,
                    blocks.runs(),
                    blocks.block_bytes()
                ),
            ));
        }
        let opened = open::open(options, bytes)?;
        let file = Arc::new(opened.file);
        Ok(FileStore {
            io: engine(&file)?,
            pages: Pages::new(backend, blocks.block_bytes()),
            checksums: options.checksum.then(|| vec![0; blocks.runs() * blocks.capacity()]),
            geometry,
            payload,
            blocks,
            path: opened.path,
            file,
            direct: opened.direct,
            tuning,
            behind: Behind::default(),
            undo: Undo::default(),
            fetches: Vec::new(),
            operations: HashMap::new(),
            next: 0,
            reads: 0,
            reading_since: None,
            failed: None,
            counters: FetchCounters::default(),
        })
    }

    /// Whether reads and writes go around the page cache.
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// The reason, where the store is unusable.
    fn usable(&self) -> Result<()> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    /// Remembers an error after which what is stored cannot be relied on.
    fn lasting<T>(&mut self, result: Result<T>) -> Result<T> {
        if let Err(e) = &result
            && self.failed.is_none()
        {
            self.failed = Some(e.clone().within("the file of keys and values is unusable"));
        }
        result
    }

    /// A request for `bytes` bytes from byte `skip` of block `first` on, whose memory is `pages`.
    fn request(&mut self, op: Op, first: u64, pages: &[Page], skip: usize, bytes: usize) -> Request {
        self.next += 1;
        let write = matches!(op, Op::Write(_));
        self.operations.insert(self.next, op);
        Request {
            token: self.next,
            write,
            offset: first * self.blocks.block_bytes() as u64 + skip as u64,
            parts: self.pages.parts(pages, skip, bytes),
            bytes,
            tries: 0,
        }
    }

    fn submit(&mut self, requests: Vec<Request>) -> Result<()> {
        if requests.is_empty() {
            return Ok(());
        }
        let submitted = self.io.submit(requests).map_err(|e| Error::io(&self.path, "submit reads and writes", &e));
        self.lasting(submitted)
    }

    /// Starts to fetch `count` rows.
    fn begin(&mut self, layer: usize, count: usize, moves: impl Iterator<Item = Move>) -> Result<()> {
        self.usable()?;
        assert!(self.fetches.iter().all(|f| f.layer != layer), "layer {layer} is being fetched already");
        self.poll(false)?;
        let fetch = self.plan_fetch(layer, count, moves)?;
        self.fetches.push(fetch);
        let begun = self.read_ahead(self.fetches.len() - 1);
        if begun.is_err()
            && let Some(fetch) = self.fetches.pop()
        {
            self.drop_fetch(fetch);
        }
        begun
    }

    /// Counts reads of fetches under way.
    fn reading(&mut self, more: isize) {
        if self.reads == 0 {
            self.reading_since = Some(Instant::now());
        }
        self.reads = self.reads.checked_add_signed(more).expect("a read completes once");
        if self.reads == 0
            && let Some(since) = self.reading_since.take()
        {
            self.counters.read_seconds += since.elapsed().as_secs_f64();
        }
    }

    /// Takes in what has completed; with `wait`, blocks until something has.
    fn poll(&mut self, wait: bool) -> Result<()> {
        let mut done = Vec::new();
        let reaped = self.io.reap(wait, &mut done).map_err(|e| Error::io(&self.path, "wait for reads and writes", &e));
        let mut outcome = self.lasting(reaped);
        for (request, result) in done {
            // Every completion is taken in, whatever became of the others: pages must come back.
            let taken = self.complete(request, result);
            let taken = self.lasting(taken);
            outcome = outcome.and(taken);
        }
        outcome
    }

    fn complete(&mut self, mut request: Request, result: std::io::Result<usize>) -> Result<()> {
        let doing = if request.write { "write" } else { "read" };
        let place = format_args!("{} bytes at {}", request.bytes, request.offset).to_string();
        let short = match result {
            Ok(moved) if moved == request.bytes => None,
            Ok(moved) => Some(moved),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) => Some(0),
            Err(e) => {
                self.settle(request.token, false);
                return Err(Error::io(&self.path, &format!("{doing} {place}"), &e));
            }
        };
        let Some(moved) = short else {
            self.settle(request.token, true);
            return Ok(());
        };
        let length = self.file.metadata().map_or(0, |m| m.len());
        request.tries += 1;
        if request.tries < TRIES && length >= request.offset + request.bytes as u64 {
            return self.submit(vec![request]);
        }
        self.settle(request.token, false);
        Err(Error::new(
            ErrorCode::Io,
            format!(
                "{}: cannot {doing} {place}: only {moved} were moved, the file has {length} bytes now",
                self.path.display()
            ),
        ))
    }

    /// A request is over. After a failed one pages need not be orderly any more, only accounted for.
    fn settle(&mut self, token: u64, good: bool) {
        match self.operations.remove(&token) {
            Some(Op::Write(blocks)) if good => self.written(&blocks),
            Some(Op::Load(block, page)) if good => self.loaded(block, page),
            // What failed to be written is still in its page; nothing is read from an unusable store.
            Some(Op::Write(_) | Op::Load(..)) | None => {}
            Some(Op::Read { fetch, piece, pages }) => {
                self.reading(-1);
                match self.fetches.iter_mut().find(|f| f.id == fetch) {
                    Some(fetch) if good => fetch.arrive(piece, pages),
                    _ => pages.into_iter().for_each(|page| self.pages.give(page)),
                }
            }
        }
    }
}

/// Checksum of a row; never 0, which stands for none.
fn checksum(row: &[u8]) -> u32 {
    crc32fast::hash(row).max(1)
}

impl Store for FileStore {
    fn reserve(&mut self, rows: usize) -> Result<()> {
        self.usable()?;
        if rows > self.blocks.capacity() { Err(self.too_many_rows(rows)) } else { Ok(()) }
    }

    fn begin(&mut self, rows: usize) {
        self.begin_step(rows);
    }

    fn undo(&mut self, _backend: &dyn Backend, _stream: &Stream) -> Result<()> {
        self.abandon_fetches();
        self.undo_step()
    }

    fn capacity(&self) -> usize {
        self.blocks.capacity()
    }

    fn append(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        keys: Rows<'_>,
        values: Rows<'_>,
        place: Place<'_>,
    ) -> Result<()> {
        self.usable()?;
        self.poll(false)?;
        let rows = self.place_rows(layer, keys.rows(), place)?;
        self.keep_old(&rows);
        let slots = self.slots_of(&rows);
        let chunks = self.pages.chunks_mut();
        let encoded = backend
            .encode_kv(stream, keys, values, self.payload, &self.geometry, &slots, chunks)
            // A backend whose streams run later must have written what the file is about to get.
            .and_then(|()| backend.synchronize(stream));
        if let Err(e) = encoded {
            self.drop_empty(&rows);
            return self.lasting(Err(e)); // rows that were overwritten may be torn
        }
        self.landed(&rows);
        let written = self.write_behind();
        self.lasting(written)
    }

    fn runs(&self, _layer: usize) -> Option<KvRuns<'_>> {
        None
    }

    fn begin_fetch(&mut self, layer: usize, moves: &[Move]) -> Result<()> {
        self.begin(layer, moves.len(), moves.iter().copied())
    }

    fn begin_fetch_first(&mut self, layer: usize, rows: usize) -> Result<()> {
        let heads = self.geometry.kv_heads;
        self.begin(layer, heads * rows, Move::whole(heads, rows))
    }

    fn in_memory(&self) -> bool {
        false
    }

    fn finish_fetch(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        target: &mut KvRunsMut<'_>,
    ) -> Result<()> {
        self.usable()?;
        let Some(at) = self.fetches.iter().position(|f| f.layer == layer) else { return Ok(()) };
        let landed = self.land(backend, stream, at, target);
        let landed = self.lasting(landed);
        let fetch = self.fetches.swap_remove(at);
        self.drop_fetch(fetch);
        landed?;
        // Blocks that the fetch held back may go now.
        let written = self.write_behind();
        self.lasting(written)
    }

    fn abandon_fetches(&mut self) {
        for fetch in std::mem::take(&mut self.fetches) {
            self.drop_fetch(fetch);
        }
    }

    fn truncate(&mut self, rows: usize) {
        self.abandon_fetches();
        self.forget_rows(rows);
    }

    fn bytes(&self) -> (usize, usize) {
        (self.pages.allocated(), self.blocks.file_bytes().map_or(usize::MAX, |n| n as usize))
    }

    fn counters(&self) -> FetchCounters {
        self.counters
    }
}

impl Drop for FileStore {
    fn drop(&mut self) {
        if !self.io.drain() {
            // The kernel could not be asked, and may still be writing into the pages.
            self.pages.leak();
        }
    }
}
