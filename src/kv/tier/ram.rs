//! Entries in memory: where attention reads them in place, or quantized, to be fetched.

use std::sync::Arc;

use crate::Result;
use crate::backend::{
    Backend, Buffer, KvGeometry, KvRuns, KvRunsMut, Landing, Move, Payload, Place as Memory, Rows, Slot, StoredRuns,
    StoredRunsMut, Stream,
};

use super::super::overwritten::Overwritten;
use super::super::{FetchCounters, Place, Pool, Store};

/// A store in extents from the pool. Stored exactly, its runs are read in place where attention can; quantized, its rows
/// have the same order with shorter rows: layer by layer, head by head, row by row.
pub struct RamStore {
    pool: Arc<Pool>,
    geometry: KvGeometry,
    payload: Payload,
    place: Memory,
    in_place: bool,
    extents: Vec<Buffer>,
    /// The fetches under way, by layer.
    fetches: Vec<(usize, Wanted)>,
    /// Where rows lie, kept for the next call.
    slots: Vec<Slot>,
    landings: Vec<Landing>,
    /// Rows with entries when the step began, and those of them that it has overwritten.
    begun: usize,
    overwritten: Overwritten,
    counters: FetchCounters,
}

/// What a fetch brings.
enum Wanted {
    Moves(Vec<Move>),
    /// The first rows of every head.
    First(usize),
}

impl RamStore {
    /// An empty store whose extents will come from `pool`, in `place`. `geometry` has the store's number of layers and the
    /// device's element type; `backend` is the pool's.
    pub fn new(
        pool: Arc<Pool>,
        backend: &dyn Backend,
        geometry: KvGeometry,
        payload: Payload,
        place: Memory,
    ) -> RamStore {
        let readable = place == Memory::Device || backend.reads_host_in_place();
        RamStore {
            pool,
            geometry,
            payload,
            place,
            in_place: payload == Payload::Exact && readable,
            extents: Vec::new(),
            fetches: Vec::new(),
            slots: Vec::new(),
            landings: Vec::new(),
            begun: 0,
            overwritten: Overwritten::new(payload.row_bytes(&geometry)),
            counters: FetchCounters::default(),
        }
    }

    /// Bytes of a store of `rows` rows in every run.
    pub fn bytes_of(geometry: &KvGeometry, payload: Payload, rows: usize) -> usize {
        geometry.extents(rows).saturating_mul(extent_bytes(geometry, payload))
    }

    /// The entries of a layer as they are stored: memory that the device can read, well or badly.
    pub fn entries(&self, layer: usize) -> StoredRuns<'_> {
        StoredRuns::new(&self.extents, self.geometry, self.payload, layer)
    }

    /// As [`RamStore::entries`], for writing.
    pub fn entries_mut(&mut self, layer: usize) -> StoredRunsMut<'_> {
        StoredRunsMut::new(&mut self.extents, self.geometry, self.payload, layer)
    }

    /// Whether entries are stored as attention reads them.
    pub fn is_exact(&self) -> bool {
        self.payload == Payload::Exact
    }

    fn row_bytes(&self) -> usize {
        self.payload.row_bytes(&self.geometry)
    }

    fn extent_bytes(&self) -> usize {
        extent_bytes(&self.geometry, self.payload)
    }

    /// Where a stored row lies.
    fn slot(&self, layer: usize, head: usize, row: usize) -> Slot {
        let KvGeometry { kv_heads, extent_tokens, .. } = self.geometry;
        let run = layer * kv_heads + head;
        Slot { buffer: row / extent_tokens, offset: (run * extent_tokens + row % extent_tokens) * self.row_bytes() }
    }

    fn check_row(&self, row: usize) {
        assert!(row < self.capacity(), "row {row} of a store with room for {}", self.capacity());
    }
}

fn extent_bytes(geometry: &KvGeometry, payload: Payload) -> usize {
    geometry.layers * geometry.kv_heads * geometry.extent_tokens * payload.row_bytes(geometry)
}

impl Store for RamStore {
    fn reserve(&mut self, rows: usize) -> Result<()> {
        let missing = self.geometry.extents(rows).saturating_sub(self.extents.len());
        if missing > 0 {
            let mut new = self.pool.acquire_in(self.place, self.extent_bytes(), missing)?;
            self.extents.append(&mut new);
        }
        Ok(())
    }

    fn begin(&mut self, rows: usize) {
        self.begun = rows;
        self.overwritten.clear();
    }

    fn undo(&mut self, backend: &dyn Backend, stream: &Stream) -> Result<()> {
        self.abandon_fetches();
        self.overwritten.restore(backend, stream, &mut self.extents)
    }

    fn capacity(&self) -> usize {
        self.extents.len() * self.geometry.extent_tokens
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
        if let Place::Rows(rows) = place {
            for (head, &row) in rows.iter().enumerate().filter(|&(_, &row)| (row as usize) < self.begun) {
                let slot = self.slot(layer, head, row as usize);
                self.overwritten.save(backend, stream, &self.extents, slot)?;
            }
        }
        if self.payload == Payload::Exact {
            let mut runs = KvRunsMut::new(&mut self.extents, self.geometry, layer);
            return match place {
                Place::From(row) => backend.store_kv(stream, keys, values, &mut runs, row),
                Place::Rows(rows) => backend.store_kv_rows(stream, keys, values, &mut runs, rows),
            };
        }
        let mut slots = std::mem::take(&mut self.slots);
        slots.clear();
        for i in 0..keys.rows() {
            for head in 0..self.geometry.kv_heads {
                let row = place.row(i, head);
                self.check_row(row);
                slots.push(self.slot(layer, head, row));
            }
        }
        self.slots = slots;
        backend.encode_kv(stream, keys, values, self.payload, &self.geometry, &self.slots, &mut self.extents)
    }

    fn runs(&self, layer: usize) -> Option<KvRuns<'_>> {
        self.in_place.then(|| KvRuns::new(&self.extents, self.geometry, layer))
    }

    fn begin_fetch(&mut self, layer: usize, moves: &[Move]) -> Result<()> {
        assert!(self.fetches.iter().all(|(other, _)| *other != layer), "layer {layer} is being fetched already");
        moves.iter().for_each(|m| self.check_row(m.from as usize));
        self.fetches.push((layer, Wanted::Moves(moves.to_vec())));
        Ok(())
    }

    fn begin_fetch_first(&mut self, layer: usize, rows: usize) -> Result<()> {
        assert!(self.fetches.iter().all(|(other, _)| *other != layer), "layer {layer} is being fetched already");
        assert!(rows <= self.capacity(), "{rows} rows of a store with room for {}", self.capacity());
        self.fetches.push((layer, Wanted::First(rows)));
        Ok(())
    }

    fn copy_first(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        rows: usize,
        target: &mut KvRunsMut<'_>,
    ) -> Result<bool> {
        if self.payload != Payload::Exact {
            return Ok(false);
        }
        backend.copy_kv(stream, &KvRuns::new(&self.extents, self.geometry, layer), target, 0..rows)?;
        self.counters.host_bytes += (self.geometry.kv_heads * rows * self.row_bytes()) as u64;
        Ok(true)
    }

    fn copy_from(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        from: &KvRuns<'_>,
        rows: std::ops::Range<usize>,
    ) -> Result<bool> {
        if self.payload != Payload::Exact {
            return Ok(false);
        }
        backend.copy_kv(stream, from, &mut KvRunsMut::new(&mut self.extents, self.geometry, layer), rows)?;
        Ok(true)
    }

    fn in_memory(&self) -> bool {
        true
    }

    fn finish_fetch(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        target: &mut KvRunsMut<'_>,
    ) -> Result<()> {
        let Some(at) = self.fetches.iter().position(|(other, _)| *other == layer) else { return Ok(()) };
        let moves = match self.fetches.swap_remove(at).1 {
            Wanted::Moves(moves) => moves,
            Wanted::First(rows) => {
                backend.fetch_kv(stream, &self.entries(layer), target, rows)?;
                self.counters.host_bytes += (self.geometry.kv_heads * rows * self.row_bytes()) as u64;
                return Ok(());
            }
        };
        if self.payload == Payload::Exact {
            let runs = KvRuns::new(&self.extents, self.geometry, layer);
            backend.copy_kv_rows(stream, &runs, target, &moves)?;
        } else {
            let mut landings = std::mem::take(&mut self.landings);
            landings.clear();
            landings.extend(moves.iter().map(|m| Landing {
                from: self.slot(layer, m.head as usize, m.from as usize),
                head: m.head,
                to: m.to,
            }));
            self.landings = landings;
            backend.decode_kv_rows(stream, self.payload, &self.extents, &self.landings, target)?;
        }
        self.counters.host_bytes += (moves.len() * self.row_bytes()) as u64;
        Ok(())
    }

    fn abandon_fetches(&mut self) {
        self.fetches.clear();
    }

    fn truncate(&mut self, rows: usize) {
        self.abandon_fetches();
        let keep = self.geometry.extents(rows).min(self.extents.len());
        let mut rest = self.extents.split_off(keep);
        self.pool.release(&mut rest);
    }

    fn bytes(&self) -> (usize, usize) {
        (self.extents.len() * self.extent_bytes(), 0)
    }

    fn counters(&self) -> FetchCounters {
        self.counters
    }
}

impl Drop for RamStore {
    fn drop(&mut self) {
        self.pool.release(&mut self.extents);
    }
}
