//! Where keys and values live.
//!
//! - [`Pool`]: one per model; hands out extents under a byte limit and takes them back for the next sequence. All extents
//!   of a model are equally long, so sequences of any length come and go without fragmentation.
//! - [`SequenceKv`]: one sequence's extents, in token order. Growing adds an extent; nothing is ever copied.
//! - [`Store`]: a sequence's entries away from the device, in memory or in a file ([`store()`] makes one).
//! - [`Victims`]: which entry a new one overwrites when nothing may grow.
//! - What may not enter: what a layer attends (that is `policy`), and how (that is `backend`).

mod device_cache;
mod device_lists;
mod device_pool;
mod device_saved;
mod extents;
mod hot;
mod kept;
mod options;
mod overwritten;
mod pool;
mod sequence;
mod slots;
mod store;
#[cfg(test)]
mod tests;
mod tier;
mod victim;

pub use crate::backend::{Guard, Payload};
pub use device_cache::{CacheMut, CacheTotals, DeviceCache};
pub use device_lists::DeviceLists;
pub use device_pool::{DevicePool, PoolTokens};
pub use extents::Extents;
pub use hot::HotCache;
pub use kept::{Entries, Kept};
pub use options::{Eviction, FileOptions, KvTier};
pub use pool::{Pool, PoolUsage};
pub use sequence::{SequenceIndex, SequenceKv};
pub use slots::SlotTable;
pub use store::{FetchCounters, Place, Store};
#[cfg(unix)]
pub use tier::FileStore;
pub use tier::{RamStore, store, store_bytes};
pub use victim::Victims;

/// Tokens of one run: long enough that a run is read at full memory speed (64 KiB at d = 64, bf16), short enough that a
/// short sequence wastes little.
pub const EXTENT_TOKENS: usize = 256;
