//! The tier that entries are fetched from: host memory or a file, in whatever form they are stored there.

use crate::Result;
use crate::backend::{Backend, KvRuns, KvRunsMut, Move, Rows, Stream};

/// Where new entries go.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// Consecutive tokens in consecutive rows of every run, the first in this one.
    From(usize),
    /// One token, in another row for each KV head: over the entry of a victim.
    Rows(&'a [u32]),
}

impl Place<'_> {
    /// The row of the `i`-th token in the run of `head`.
    pub(super) fn row(&self, i: usize, head: usize) -> usize {
        match *self {
            Place::From(first) => first + i,
            Place::Rows(rows) => {
                assert_eq!(i, 0, "victims take one token");
                rows[head] as usize
            }
        }
    }
}

/// What a store has moved since it was made. Differences over a step are what the step did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FetchCounters {
    /// Bytes of entries fetched from host memory, as stored there.
    pub host_bytes: u64,
    /// Bytes of entries fetched from the file, as stored there.
    pub file_bytes: u64,
    /// Bytes that were really read for them: whole blocks, and gaps that were read together with their neighbours.
    pub file_read_bytes: u64,
    /// Seconds during which reads were in flight.
    pub read_seconds: f64,
    /// Seconds that [`Store::finish_fetch`] stood still for them.
    pub wait_seconds: f64,
}

/// The entries of one sequence away from the device: for each of its layers and KV heads one run of rows, a row being
/// the key and the value of a token. Layers count from 0 in the store, whatever layer of the model they are.
///
/// What lies in rows past those that were written means nothing. Every entry that was appended can be fetched at
/// once, also when it has not reached its tier yet. After an error of reading or writing the store may refuse further
/// calls, with the reason; it never hands out a wrong entry.
pub trait Store: Send {
    /// Makes room for `rows` rows in every run. On an error nothing has changed.
    fn reserve(&mut self, rows: usize) -> Result<()>;

    /// A step begins, with entries in the first `rows` rows of every run: of these what it overwrites can be brought back
    /// until the next one begins.
    fn begin(&mut self, rows: usize);

    /// Brings back what this step has overwritten. Fetches that were begun are dropped.
    fn undo(&mut self, backend: &dyn Backend, stream: &Stream) -> Result<()>;

    /// Rows that there is room for.
    fn capacity(&self) -> usize;

    /// Takes new entries of a layer: rows of `kv_heads × head_dim` activations, one row a token. Writing happens behind
    /// the caller's back where the tier is slow.
    fn append(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        keys: Rows<'_>,
        values: Rows<'_>,
        place: Place<'_>,
    ) -> Result<()>;

    /// The layer's runs, where they are memory that attention can read in place; `None` where entries must be fetched.
    fn runs(&self, layer: usize) -> Option<KvRuns<'_>>;

    /// Starts to fetch entries of a layer: `from` is a row of the store, `to` one of the target of
    /// [`Store::finish_fetch`]. Moves are sorted by head, then by `from`. At most one fetch of each layer, and fetches of
    /// two layers, are under way at a time. A row that is overwritten before the fetch is finished arrives as it was or
    /// as it is then, never as a mixture.
    fn begin_fetch(&mut self, layer: usize, moves: &[Move]) -> Result<()>;

    /// As [`Store::begin_fetch`] of the first `rows` rows of every head, each to its own place in a target whose runs are
    /// as long as the store's.
    fn begin_fetch_first(&mut self, layer: usize, rows: usize) -> Result<()>;

    /// Whether entries are in memory, so that [`Store::finish_fetch`] waits for nothing but enqueues operations.
    fn in_memory(&self) -> bool;

    /// As a fetch of the first rows from beginning to end, for a layer of a prompt: by what does not take part in arithmetic.
    /// Returns whether this store can; it has done nothing otherwise.
    fn copy_first(
        &mut self,
        _backend: &dyn Backend,
        _stream: &Stream,
        _layer: usize,
        _rows: usize,
        _target: &mut KvRunsMut<'_>,
    ) -> Result<bool> {
        Ok(false)
    }

    /// As [`Store::append`], from rows `rows` of runs that hold the entries as they are stored, likewise.
    fn copy_from(
        &mut self,
        _backend: &dyn Backend,
        _stream: &Stream,
        _layer: usize,
        _from: &KvRuns<'_>,
        _rows: std::ops::Range<usize>,
    ) -> Result<bool> {
        Ok(false)
    }

    /// Waits for the layer's fetch and lands its entries in `target`, widened to its type. Nothing happens where none
    /// was begun. On an error rows of the target that were to be written are undefined.
    fn finish_fetch(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        target: &mut KvRunsMut<'_>,
    ) -> Result<()>;

    /// Drops fetches that were begun and never finished (a step that was given up).
    fn abandon_fetches(&mut self);

    /// Only the first `rows` rows of every run mean anything from now on; room past them may be given back. Fetches that
    /// were begun are dropped.
    fn truncate(&mut self, rows: usize);

    /// Bytes held: in host memory (RAM on the CPU backend), in files.
    fn bytes(&self) -> (usize, usize);

    /// What has been moved.
    fn counters(&self) -> FetchCounters;
}
