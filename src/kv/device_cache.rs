//! A hot cache whose tables lie on the device, so that a step asks the host for nothing.
//!
//! Within a step `Backend::prefetch` and `Backend::admit` change the tables, and at the end of a prompt `Backend::load_slots`
//! does. What happens seldom (a few tokens that join a cache, a step to be undone, a truncation) is done here: the tables come over, a [`HotCache`] without entries of its own
//! changes them, they go back, and entries are fetched from the store.

use std::sync::Arc;

use crate::Result;
use crate::backend::{
    Backend, Buffer, DType, Guard, Header, KvGeometry, KvRuns, KvRunsMut, Move, Place, Rows, SlotGeometry, Slots,
    SlotsMut, StoredRuns, Stream,
};

use super::device_saved::Saved;
use super::{DeviceLists, HotCache, Pool, RamStore, SequenceKv, Store};

/// What the tables' memory is for.
const TABLES: &str = "the hot cache's tables";

/// Slots of every layer and KV head of one sequence.
pub struct DeviceCache {
    kv: SequenceKv,
    geometry: SlotGeometry,
    tables: Buffer,
    /// Tables with more room, which become ours at the next chance.
    grown: Option<(SlotGeometry, Buffer)>,
    /// The tables that this step has moved out of, as they were, and whether they were ready.
    outgrown: Option<(SlotGeometry, Buffer, bool)>,
    /// Whether the tables hold anything that means something.
    ready: bool,
    /// The number of this step.
    step: u32,
    /// Changes the tables; it has no entries of its own.
    host: HotCache,
    /// The tables before this step edited them, if it has; nothing inside where there were none.
    before: Option<Option<Vec<u32>>>,
    /// Entries that a step has overwritten, where the store would not give back the same bits: see [`Saved`].
    saved: Option<Saved>,
    refilled: u64,
}

/// The cache of a layer in one step.
pub struct CacheMut<'a> {
    /// Its tables.
    pub slots: SlotsMut<'a>,
    /// Entries, by slot.
    pub entries: KvRunsMut<'a>,
    /// See [`Prefetch::saved`](crate::backend::Prefetch::saved).
    pub saved: Option<KvRunsMut<'a>>,
}

/// What all steps did together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheTotals {
    /// Rows selected.
    pub selected: u64,
    /// Those of them that were not here.
    pub missed: u64,
    /// Those of them that corrections have added.
    pub corrected: u64,
    /// Entries attended.
    pub attended: u64,
    /// Entries fetched by edits.
    pub refilled: u64,
}

impl DeviceCache {
    /// An empty cache of the layers of `kv`, without room. `exact`: the store gives back the bits that it was given.
    /// `listed`: what each layer selects is kept until the step is over ([`DeviceCache::lists`]).
    pub fn new(
        backend: &dyn Backend,
        pool: Arc<Pool>,
        kv: KvGeometry,
        exact: bool,
        listed: bool,
    ) -> Result<DeviceCache> {
        let KvGeometry { layers, kv_heads, .. } = kv;
        let lists = if listed { layers } else { 1 };
        let geometry =
            SlotGeometry { layers, kv_heads, slots: 0, rows: 0, selected: 0, lists, corrected: 0, attended: 0 };
        Ok(DeviceCache {
            tables: backend.allocate(0, Place::Device, TABLES)?,
            geometry,
            grown: None,
            outgrown: None,
            ready: false,
            step: 1,
            host: HotCache::new(pool.clone(), kv),
            before: None,
            saved: (!exact).then(|| Saved::new(pool.clone(), kv)),
            refilled: 0,
            kv: SequenceKv::new(pool, kv),
        })
    }

    /// Rows that the tables have room for.
    pub fn rows(&self) -> usize {
        self.grown.as_ref().map_or(self.geometry.rows, |(geometry, _)| geometry.rows)
    }

    /// Makes room for the entries of `slots` slots. On an error nothing has changed.
    pub fn reserve(&mut self, slots: usize) -> Result<()> {
        self.kv.reserve(slots)
    }

    /// Makes room in the tables for sequences of `rows` tokens, of which up to `slots` have slots and a step selects up to
    /// `selected`, corrects by up to `corrected` and lists up to `attended`. On an error nothing has changed.
    pub fn reserve_tables(
        &mut self,
        backend: &dyn Backend,
        rows: usize,
        slots: usize,
        (selected, corrected, attended): (usize, usize, usize),
    ) -> Result<()> {
        let geometry = SlotGeometry { slots, rows, selected, corrected, attended, ..self.geometry };
        if let Some(saved) = &mut self.saved {
            saved.reserve(selected, corrected)?;
        }
        self.grown = Some((geometry, backend.allocate(geometry.bytes(), Place::Device, TABLES)?));
        Ok(())
    }

    /// Moves into tables that have been reserved. To be called before anything else in a step.
    pub fn grow(&mut self, backend: &dyn Backend, stream: &Stream) -> Result<()> {
        let Some((geometry, buffer)) = self.grown.take() else { return Ok(()) };
        let old = if self.ready { Some(self.get(backend, stream)?) } else { None };
        let before = std::mem::replace(&mut self.geometry, geometry);
        self.outgrown = Some((before, std::mem::replace(&mut self.tables, buffer), self.ready));
        let Some(old) = old else { return Ok(()) };
        let mut words = self.empty();
        for table in 0..geometry.tables() {
            words[geometry.count_at(table)] = old[before.count_at(table)];
            for (to, from, length) in [
                (geometry.header_at(table), before.header_at(table), SlotGeometry::HEADER),
                (geometry.used_at(table), before.used_at(table), before.slots),
                (geometry.rows_at(table), before.rows_at(table), before.slots),
                (geometry.slots_at(table), before.slots_at(table), before.rows),
            ] {
                words[to..to + length].copy_from_slice(&old[from..from + length]);
            }
        }
        self.put(backend, stream, &words)
    }

    /// Gives back the room past the first `slots` slots, and that of tables that were reserved in vain.
    pub fn shrink(&mut self, slots: usize) {
        self.grown = None;
        if let Some(saved) = &mut self.saved {
            saved.shrink(self.geometry.selected, self.geometry.corrected);
        }
        self.kv.truncate(slots);
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let other =
            [self.grown.as_ref().map(|(_, tables)| tables), self.outgrown.as_ref().map(|(_, tables, _)| tables)];
        let other = other.into_iter().flatten().map(Buffer::bytes).sum::<usize>();
        self.kv.bytes() + self.tables.bytes() + other + self.saved.as_ref().map_or(0, Saved::bytes)
    }

    /// A new step begins; the last one can no longer be undone.
    pub fn begin(&mut self) {
        self.step += 1;
        self.before = None;
        self.outgrown = None;
        if let Some(saved) = &mut self.saved {
            saved.begin();
        }
    }

    /// The step goes on with another token: what the last one has used may give way.
    pub fn next_token(&mut self) {
        self.step += 1;
    }

    /// Keeps tables and entries, for a step of several tokens, whose journals tell of the last one only.
    pub fn keep_all(&mut self, backend: &dyn Backend, stream: &Stream) -> Result<()> {
        self.keep(backend, stream)?;
        if self.before.is_none() {
            self.before = Some(if self.ready { Some(self.get(backend, stream)?) } else { None });
        }
        Ok(())
    }

    /// The entries of a layer.
    pub fn runs(&self, layer: usize) -> KvRuns<'_> {
        self.kv.layer(layer)
    }

    /// The tables of a layer, for attention that reads up to `limit` slots: those in use, or those listed.
    pub fn slots(&self, layer: usize, limit: usize, by_list: bool) -> Slots<'_> {
        Slots { tables: &self.tables, geometry: self.geometry, layer, limit, by_list }
    }

    /// Bytes of entries that a step overwrites which selects up to `selected` rows and corrects by up to `corrected`.
    pub fn saved_bytes(kv: &KvGeometry, selected: usize, corrected: usize) -> usize {
        Saved::bytes_of(kv, selected, corrected)
    }

    /// The tables of a layer in this step, of which `limit` slots may be used, its entries, and where those are kept that
    /// the step overwrites, or that it overwrites as it `corrects`. (There is no pool, and the step does not list.)
    pub fn slots_mut(&mut self, layer: usize, limit: usize, guard: Guard, corrects: bool) -> CacheMut<'_> {
        let DeviceCache { geometry, step, .. } = *self;
        let tables = &mut self.tables;
        let slots = SlotsMut { tables, geometry, layer, limit, guard, step, pool: None, by_list: false };
        let saved = self.saved.as_mut().map(|saved| saved.layer_mut(layer, corrects));
        CacheMut { slots, entries: self.kv.layer_mut(layer), saved }
    }

    /// Makes the tables of an empty cache, where nothing has yet.
    pub fn prepare(&mut self, backend: &dyn Backend, stream: &Stream) -> Result<()> {
        if !self.ready {
            self.put(backend, stream, &self.empty())?;
        }
        Ok(())
    }

    /// Keeps all entries, for an [`DeviceCache::edit`] that may be undone.
    pub fn keep(&mut self, backend: &dyn Backend, stream: &Stream) -> Result<()> {
        match &mut self.saved {
            Some(saved) if self.ready => saved.keep(backend, stream, self.kv.buffers()),
            _ => Ok(()),
        }
    }

    /// Fills the tables of a layer anew, for a sequence of `length` tokens, and its `slots` slots from `from`, in which row t
    /// is token t: see [`Backend::load_slots`]. All layers are filled in one step, in their order.
    #[allow(clippy::too_many_arguments, reason = "each is one thing")]
    pub fn load(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        (slots, guard): (usize, Guard),
        length: usize,
        ranked: Rows<'_>,
        from: &StoredRuns<'_>,
    ) -> Result<()> {
        self.grow(backend, stream)?;
        self.keep_all(backend, stream)?;
        backend.load_slots(stream, self.slots_mut(layer, slots, guard, false).slots, length, ranked)?;
        self.refill(backend, stream, from, layer)?;
        // Each slot counts as used in a step of its own.
        self.step = self.step.max(slots as u32 + 1);
        self.ready |= layer + 1 == self.geometry.layers;
        Ok(())
    }

    /// Lets `change` work on the tables of each layer, and fetches what it asks for.
    pub fn edit(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        store: &mut RamStore,
        mut change: impl FnMut(&mut HotCache, usize, &mut Vec<Move>),
    ) -> Result<()> {
        self.grow(backend, stream)?;
        let before = if self.ready { Some(self.get(backend, stream)?) } else { None };
        let mut words = before.clone().unwrap_or_else(|| self.empty());
        self.before.get_or_insert(before);
        self.load_host(&words);
        let mut moves = vec![Vec::new(); self.geometry.layers];
        moves.iter_mut().enumerate().for_each(|(layer, moves)| change(&mut self.host, layer, moves));
        self.store_host(&mut words);
        self.put(backend, stream, &words)?;
        for (layer, mut moves) in moves.into_iter().enumerate() {
            // Some may have given way to others since.
            moves.retain(|m| self.host.slot(layer, m.head as usize, m.from) == Some(m.to));
            moves.sort_unstable_by_key(|m| (m.head, m.from));
            moves.dedup();
            self.refilled += moves.len() as u64;
            if moves.len() == self.host.counts(layer).iter().map(|&count| count as usize).sum::<usize>() {
                self.refill(backend, stream, &store.entries(layer), layer)?;
            } else {
                store.begin_fetch(layer, &moves)?;
                store.finish_fetch(backend, stream, layer, &mut self.kv.layer_mut(layer))?;
            }
        }
        Ok(())
    }

    /// Takes back what this step has changed, entries and all.
    pub fn undo(&mut self, backend: &dyn Backend, stream: &Stream, store: &RamStore) -> Result<()> {
        if self.saved.is_some() {
            self.restore(backend, stream)?;
        }
        if let Some((geometry, tables, ready)) = self.outgrown.take() {
            // The step had done nothing yet when it moved.
            (self.geometry, self.tables, self.ready, self.before) = (geometry, tables, ready, None);
        } else {
            let before = match self.before.take() {
                Some(before) => before,
                None if self.ready => Some(self.get(backend, stream)?),
                None => None,
            };
            self.ready = before.is_some();
            if let Some(mut words) = before {
                for table in 0..self.geometry.tables() {
                    self.undo_table(&mut words, table);
                }
                self.put(backend, stream, &words)?;
            }
        }
        if self.ready && self.saved.is_none() {
            for layer in 0..self.geometry.layers {
                self.refill(backend, stream, &store.entries(layer), layer)?;
            }
        }
        Ok(())
    }

    /// Brings back the entries that this step has overwritten.
    fn restore(&mut self, backend: &dyn Backend, stream: &Stream) -> Result<()> {
        let words = if self.ready && self.before.is_none() { Some(self.get(backend, stream)?) } else { None };
        let (g, step, saved) = (self.geometry, self.step, self.saved.as_mut().expect("entries are kept"));
        match words {
            Some(words) => (0..g.layers).try_for_each(|layer| {
                let moves = saved.overwritten(&g, &words, layer, step);
                [false, true].into_iter().zip(&moves).filter(|(_, moves)| !moves.is_empty()).try_for_each(
                    |(corrects, moves)| {
                        let from = saved.layer(layer, corrects);
                        backend.copy_kv_rows(stream, &from, &mut self.kv.layer_mut(layer), moves)
                    },
                )
            }),
            None => saved.restore(backend, stream, self.kv.buffers_mut()),
        }
    }

    /// Fetches every entry that is in the tables of a layer.
    fn refill(&mut self, backend: &dyn Backend, stream: &Stream, from: &StoredRuns<'_>, layer: usize) -> Result<()> {
        let (tables, geometry) = (&self.tables, self.geometry);
        let slots = Slots { tables, geometry, layer, limit: geometry.slots, by_list: false };
        backend.refill(stream, slots, from, &mut self.kv.layer_mut(layer))
    }

    fn undo_table(&self, words: &mut [u32], table: usize) {
        let g = &self.geometry;
        let header = |which: Header| g.header_at(table) + which as usize;
        if words[header(Header::Step)] != self.step {
            return;
        }
        let changes = words[header(Header::Changes)] as usize;
        for i in (0..changes).rev() {
            let at = g.journal_at(table) + SlotGeometry::CHANGE * i;
            let (slot, row, used) = (words[at] as usize, words[at + 1], words[at + 2]);
            let now = words[g.rows_at(table) + slot];
            words[g.slots_at(table) + now as usize] = SlotGeometry::NONE;
            if row == SlotGeometry::NONE {
                words[g.count_at(table)] -= 1;
            } else {
                words[g.rows_at(table) + slot] = row;
                words[g.used_at(table) + slot] = used;
                words[g.slots_at(table) + row as usize] = slot as u32;
            }
        }
        let steps = [
            (Header::Selected, Header::AllSelected),
            (Header::Corrected, Header::AllSelected),
            (Header::Corrected, Header::AllCorrected),
            (Header::Missed, Header::AllMissed),
            (Header::Attended, Header::AllAttended),
        ];
        for (one, all) in steps {
            let less = total(words, header(all)) - u64::from(words[header(one)]);
            (words[header(all)], words[header(all) + 1]) = (less as u32, (less >> 32) as u32);
        }
        steps.iter().for_each(|&(one, _)| words[header(one)] = 0);
        words[header(Header::Step)] = 0;
    }

    /// What all steps did together.
    pub fn totals(&self, backend: &dyn Backend, stream: &Stream) -> Result<CacheTotals> {
        let mut totals = CacheTotals { refilled: self.refilled, ..CacheTotals::default() };
        if !self.ready {
            return Ok(totals);
        }
        let g = &self.geometry;
        let count = g.tables() * SlotGeometry::HEADER;
        let from = g.header_at(0);
        let rows = self.tables.rows(DType::U32, 1, g.words()).col_range(from, count);
        let words = download(backend, stream, rows)?;
        for header in words.chunks_exact(SlotGeometry::HEADER) {
            totals.selected += total(header, Header::AllSelected as usize);
            totals.missed += total(header, Header::AllMissed as usize);
            totals.corrected += total(header, Header::AllCorrected as usize);
            totals.attended += total(header, Header::AllAttended as usize);
        }
        Ok(totals)
    }

    /// What every layer's last rehearsal selected and missed.
    pub fn lists(&self, backend: &dyn Backend, stream: &Stream) -> Result<DeviceLists> {
        let g = self.geometry;
        let lists = self.tables.rows(DType::U32, 1, g.words()).col_range(g.lists_at(), g.lists_end() - g.lists_at());
        Ok(DeviceLists::new(g, download(backend, stream, lists)?))
    }

    fn empty(&self) -> Vec<u32> {
        let mut words = vec![0; self.geometry.words()];
        for table in 0..self.geometry.tables() {
            words[self.geometry.slots_at(table)..][..self.geometry.rows].fill(SlotGeometry::NONE);
        }
        words
    }

    fn get(&self, backend: &dyn Backend, stream: &Stream) -> Result<Vec<u32>> {
        download(backend, stream, self.tables.rows(DType::U32, 1, self.geometry.words()))
    }

    fn put(&mut self, backend: &dyn Backend, stream: &Stream, words: &[u32]) -> Result<()> {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        backend.upload(stream, &bytes, &mut self.tables, 0)?;
        self.ready = true;
        Ok(())
    }

    fn load_host(&mut self, words: &[u32]) {
        let g = self.geometry;
        for table in 0..g.tables() {
            let count = words[g.count_at(table)] as usize;
            let rows = &words[g.rows_at(table)..][..count];
            let used = &words[g.used_at(table)..][..count];
            self.host.set(table / g.kv_heads, table % g.kv_heads, rows, used);
        }
        self.host.set_clock(self.step);
    }

    fn store_host(&mut self, words: &mut [u32]) {
        let g = self.geometry;
        for table in 0..g.tables() {
            let (layer, head) = (table / g.kv_heads, table % g.kv_heads);
            let (rows, used) = (self.host.rows(layer, head), self.host.used(layer, head));
            words[g.count_at(table)] = rows.len() as u32;
            words[g.header_at(table) + Header::Step as usize] = 0;
            words[g.rows_at(table)..][..rows.len()].copy_from_slice(rows);
            words[g.used_at(table)..][..used.len()].copy_from_slice(used);
            let slots = &mut words[g.slots_at(table)..][..g.rows];
            slots.fill(SlotGeometry::NONE);
            for (slot, &row) in rows.iter().enumerate() {
                slots[row as usize] = slot as u32;
            }
        }
        self.step = self.step.max(self.host.clock());
    }
}

fn total(words: &[u32], at: usize) -> u64 {
    u64::from(words[at]) | u64::from(words[at + 1]) << 32
}

fn download(backend: &dyn Backend, stream: &Stream, rows: crate::backend::Rows<'_>) -> Result<Vec<u32>> {
    let mut bytes = vec![0; 4 * rows.rows() * rows.cols()];
    backend.download(stream, rows, &mut bytes)?;
    Ok(bytes.chunks_exact(4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect())
}
