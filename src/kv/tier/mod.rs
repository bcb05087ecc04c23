//! The stores: one file a tier.
//!
//! - [`RamStore`]: memory, as on the device or quantized.
//! - [`FileStore`]: a file, read ahead and written behind.
//! - What may not enter: which entries are worth fetching (that is `policy`).

#[cfg(unix)]
mod file;
mod ram;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::Result;
use crate::backend::{Backend, KvGeometry, Payload, Place};

use super::{KvTier, Pool, Store};
#[cfg(unix)]
pub use file::FileStore;
pub use ram::RamStore;

/// A store of `geometry.layers` layers in `tier`, for at most `capacity_rows` rows in each run where the tier's size is
/// fixed when it is made (a file). `geometry` is that of the device; `pool` and `backend` are the model's.
///
/// Errors: those of making a file. Memory is acquired by [`Store::reserve`].
pub fn store(
    pool: &Arc<Pool>,
    backend: &Arc<dyn Backend>,
    geometry: KvGeometry,
    payload: Payload,
    tier: &KvTier,
    capacity_rows: usize,
) -> Result<Box<dyn Store>> {
    match tier {
        KvTier::Device | KvTier::Host => {
            let place = if *tier == KvTier::Host { Place::Pinned } else { Place::Device };
            Ok(Box::new(RamStore::new(Arc::clone(pool), &**backend, geometry, payload, place)))
        }
        #[cfg(unix)]
        KvTier::File(options) => {
            Ok(Box::new(FileStore::new(Arc::clone(backend), geometry, payload, options, capacity_rows)?))
        }
        #[cfg(not(unix))]
        KvTier::File(_) => {
            let _ = (backend, capacity_rows);
            Err(crate::Error::unsupported("keys and values in a file are not supported on this system"))
        }
    }
}

/// What [`Store::bytes`] of such a store will be, at most, when it is full: in host memory, in files.
pub fn store_bytes(geometry: &KvGeometry, payload: Payload, tier: &KvTier, capacity_rows: usize) -> (usize, usize) {
    match tier {
        KvTier::Device | KvTier::Host => (RamStore::bytes_of(geometry, payload, capacity_rows), 0),
        #[cfg(unix)]
        KvTier::File(options) => FileStore::bytes_of(geometry, payload, options, capacity_rows),
        #[cfg(not(unix))]
        KvTier::File(_) => (0, 0),
    }
}
