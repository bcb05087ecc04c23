//! A full pool whose device chooses the victims: what is known of each row lies there, and so does what a call overwrites.
//!
//! Within a step `Backend::prefetch` notes uses and `Backend::admit` gives rows away. Before a call that may do either what
//! is known is copied, on the device ([`DevicePool::keep`]); a call that fails brings back what it has overwritten and
//! takes the copy ([`DevicePool::undo`]).

use crate::Result;
use crate::backend::{
    Backend, Buffer, DType, IndexGeometry, KvGeometry, Lost, Payload, Place, PoolGeometry, PoolHeader, PoolMut, Stream,
    VictimRule,
};

use super::{Eviction, RamStore, SequenceIndex};

/// What the memory is for.
const POOL: &str = "the pool's tables";

/// Who gives way, and which tokens are where, of every layer and KV head of one sequence.
pub struct DevicePool {
    rule: VictimRule,
    geometry: PoolGeometry,
    tables: Buffer,
    /// The tables when the call under way began, if it has kept them.
    before: Buffer,
    kept: bool,
    /// What a decoded token overwrites.
    lost: Buffer,
    /// What a call of several tokens does, and how many rows there is room for.
    long: Option<(usize, Buffer)>,
}

/// The token in each row, once they have parted.
pub struct PoolTokens {
    geometry: PoolGeometry,
    words: Vec<u32>,
}

impl PoolTokens {
    /// The token in a row of a KV head of a layer.
    pub fn token(&self, layer: usize, head: usize, row: u32) -> u32 {
        let g = &self.geometry;
        self.words[g.tokens_at(layer * g.kv_heads + head) + row as usize].checked_sub(1).unwrap_or(row)
    }
}

impl DevicePool {
    /// A pool in order, of at most `rows` rows of `store` and `index`; none where nothing is ever evicted.
    pub fn new(
        backend: &dyn Backend,
        eviction: Eviction,
        store: &KvGeometry,
        payload: Payload,
        index: &IndexGeometry,
        rows: usize,
    ) -> Result<Option<DevicePool>> {
        let rule = match eviction {
            Eviction::Off => return Ok(None),
            Eviction::Fifo => VictimRule::Fifo,
            Eviction::Lru => VictimRule::Lru,
            Eviction::Counter => VictimRule::Counter,
        };
        let geometry = DevicePool::geometry(store, payload, index, rows);
        let allocate = |bytes| backend.allocate(bytes, Place::Device, POOL);
        Ok(Some(DevicePool {
            rule,
            tables: allocate(geometry.bytes())?,
            before: allocate(geometry.bytes())?,
            kept: false,
            lost: allocate(geometry.lost_bytes())?,
            long: None,
            geometry,
        }))
    }

    fn geometry(store: &KvGeometry, payload: Payload, index: &IndexGeometry, rows: usize) -> PoolGeometry {
        PoolGeometry {
            layers: store.layers,
            kv_heads: store.kv_heads,
            rows,
            lost: 1,
            stored_bytes: payload.row_bytes(store),
            index_bytes: index.row_bytes() + 4,
        }
    }

    /// Bytes of a pool of `rows` rows.
    pub fn bytes_of(store: &KvGeometry, payload: Payload, index: &IndexGeometry, rows: usize) -> usize {
        let geometry = DevicePool::geometry(store, payload, index, rows);
        2 * geometry.bytes() + geometry.lost_bytes()
    }

    /// Bytes held, but for what a call of several tokens overwrites, which is gone when the next one begins.
    pub fn bytes(&self) -> usize {
        self.tables.bytes() + self.before.bytes() + self.lost.bytes()
    }

    /// Makes room for a call that overwrites `rows` rows of each KV head that it began with. On an error nothing has changed.
    pub fn reserve(&mut self, backend: &dyn Backend, rows: usize) -> Result<()> {
        let geometry = PoolGeometry { lost: rows, ..self.geometry };
        self.long = match rows {
            0 | 1 => None,
            rows => Some((rows, backend.allocate(geometry.lost_bytes(), Place::Device, POOL)?)),
        };
        Ok(())
    }

    /// Gives back what [`DevicePool::reserve`] has taken.
    pub fn release(&mut self) {
        self.long = None;
    }

    /// A new call begins; the last one can no longer be undone.
    pub fn begin(&mut self) {
        self.kept = false;
    }

    /// Copies what is known, unless this call has.
    pub fn keep(&mut self, backend: &dyn Backend, stream: &Stream) -> Result<()> {
        if !self.kept {
            backend.copy(stream, &self.tables, &mut self.before)?;
            self.kept = true;
        }
        Ok(())
    }

    /// The pool for a token of a layer with so many `rows`; `full`: it takes the row of a victim. The call began with `begun`
    /// tokens.
    pub fn layer_mut(&mut self, rows: usize, token: usize, full: bool, begun: usize) -> PoolMut<'_> {
        let DevicePool { rule, tables, lost, long, geometry, .. } = self;
        let (capacity, lost) = match long {
            Some((capacity, lost)) => (*capacity, lost),
            None => (1, lost),
        };
        PoolMut {
            tables,
            lost,
            geometry: PoolGeometry { lost: capacity, ..*geometry },
            rule: *rule,
            rows,
            token,
            full,
            begun,
        }
    }

    /// Brings back what the call has overwritten, and what was known when it began, with `begun` tokens.
    pub fn undo(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        begun: usize,
        store: &mut RamStore,
        index: &mut SequenceIndex,
    ) -> Result<()> {
        if std::mem::take(&mut self.kept) {
            let DevicePool { tables, lost, long, .. } = &*self;
            let (capacity, lost) = long.as_ref().map_or((1, lost), |(capacity, lost)| (*capacity, lost));
            let geometry = PoolGeometry { lost: capacity, ..self.geometry };
            for layer in 0..geometry.layers {
                let (store, index) = (store.entries_mut(layer), index.layer_mut(layer));
                backend.take_back(stream, Lost { tables, lost, geometry, layer, begun, store, index })?;
            }
            backend.copy(stream, &self.before, &mut self.tables)?;
            // `long` is given back next.
            backend.synchronize(stream)?;
        }
        Ok(())
    }

    /// Forgets every token from `length` on, of which none before has been evicted.
    pub fn truncate(&mut self, backend: &dyn Backend, stream: &Stream, length: usize) -> Result<()> {
        let (g, mut words) = (self.geometry, self.words(backend, stream)?);
        for table in 0..g.layers * g.kv_heads {
            words[g.header_at(table)..][..PoolGeometry::HEADER].fill(0);
            words[g.tokens_at(table)..][..g.rows].fill(0);
            let uses = &mut words[g.uses_at(table)..][..g.rows];
            uses[length.min(g.rows)..].fill(0);
            if self.rule == VictimRule::Lru {
                // Positions come again, and with them times: those that were go before them, in their order.
                let time = |(row, &used): (u32, &u32)| if used == 0 { 3 * row + 2 } else { used };
                let times: Vec<u32> = (0..).zip(&uses[..length.min(g.rows)]).map(time).collect();
                let mut order = times.clone();
                order.sort_unstable();
                order.dedup();
                for (used, time) in uses.iter_mut().zip(&times) {
                    *used = order.partition_point(|before| before < time) as u32 + 1;
                }
            }
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        backend.upload(stream, &bytes, &mut self.tables, 0)
    }

    /// The first token that any KV head has lost.
    pub fn first_lost(&self, backend: &dyn Backend, stream: &Stream) -> Result<Option<u32>> {
        let g = &self.geometry;
        let (tables, words) = (g.layers * g.kv_heads, g.table_words());
        let mut bytes = vec![0; 4 * tables * PoolGeometry::HEADER];
        let headers = self.tables.rows(DType::U32, tables, words).col_range(0, PoolGeometry::HEADER);
        backend.download(stream, headers, &mut bytes)?;
        let lost = numbers(&bytes).skip(PoolHeader::Lost as usize).step_by(PoolGeometry::HEADER);
        Ok(lost.filter_map(|lost| lost.checked_sub(1)).min())
    }

    /// Which token is in which row.
    pub fn tokens(&self, backend: &dyn Backend, stream: &Stream) -> Result<PoolTokens> {
        Ok(PoolTokens { geometry: self.geometry, words: self.words(backend, stream)? })
    }

    fn words(&self, backend: &dyn Backend, stream: &Stream) -> Result<Vec<u32>> {
        let mut bytes = vec![0; self.geometry.bytes()];
        backend.download(stream, self.tables.rows(DType::U32, 1, bytes.len() / 4), &mut bytes)?;
        Ok(numbers(&bytes).collect())
    }
}

fn numbers(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]))
}
