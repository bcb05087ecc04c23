//! The byte-limited store of extents that the sequences of one model share.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::backend::{Backend, Buffer, Place};
use crate::{Error, ErrorCode, Result};

/// Hands out extents. Extents that come back are kept for the next sequence until [`Pool::trim`].
pub struct Pool {
    backend: Arc<dyn Backend>,
    limit: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Bytes allocated from the backend, in use or spare.
    allocated: usize,
    /// Bytes that sequences hold.
    used: usize,
    /// Extents waiting for a sequence, by place and size.
    spare: HashMap<(Place, usize), Vec<Buffer>>,
}

/// What a pool holds, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Held by sequences.
    pub used: usize,
    /// Allocated and waiting for the next sequence.
    pub spare: usize,
}

impl Pool {
    /// A pool of at most `limit` bytes; 0 means as much as there is memory.
    pub fn new(backend: Arc<dyn Backend>, limit: usize) -> Pool {
        Pool { backend, limit, state: Mutex::default() }
    }

    /// The limit in bytes, 0 for none.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// What is held now.
    pub fn usage(&self) -> PoolUsage {
        let state = self.state.lock();
        PoolUsage { used: state.used, spare: state.allocated - state.used }
    }

    /// `count` extents of `bytes` each: all of them, or an error and none.
    ///
    /// Errors: `Capacity` when the limit would be passed, `OutOfMemory` when the machine has no more.
    pub fn acquire(&self, bytes: usize, count: usize) -> Result<Vec<Buffer>> {
        self.acquire_in(Place::Device, bytes, count)
    }

    /// As [`Pool::acquire`], in `place`. The limit is one for all places.
    pub fn acquire_in(&self, place: Place, bytes: usize, count: usize) -> Result<Vec<Buffer>> {
        let mut state = self.state.lock();
        let wanted = bytes.checked_mul(count).and_then(|n| n.checked_add(state.used));
        if self.limit != 0 && wanted.is_none_or(|n| n > self.limit) {
            return Err(Error::new(
                ErrorCode::Capacity,
                format!(
                    "the KV pool is full: {count} more extents of {bytes} bytes do not fit its limit of {} bytes, of which {} are in use",
                    self.limit, state.used
                ),
            ));
        }
        let mut extents = Vec::with_capacity(count);
        while extents.len() < count {
            let extent = match state.spare.get_mut(&(place, bytes)).and_then(Vec::pop) {
                Some(extent) => Ok(extent),
                None => {
                    state.make_room(bytes, self.limit);
                    self.backend.allocate(bytes, place, "KV cache").inspect(|_| state.allocated += bytes)
                }
            };
            match extent {
                Ok(extent) => {
                    state.used += bytes;
                    extents.push(extent);
                }
                Err(error) => {
                    state.put_back(&mut extents);
                    return Err(error);
                }
            }
        }
        Ok(extents)
    }

    /// Takes extents back.
    pub fn release(&self, extents: &mut Vec<Buffer>) {
        self.state.lock().put_back(extents);
    }

    /// Gives spare extents back to the machine.
    pub fn trim(&self) {
        self.state.lock().drop_spare(0);
    }
}

impl State {
    fn put_back(&mut self, extents: &mut Vec<Buffer>) {
        for extent in extents.drain(..) {
            self.used -= extent.bytes();
            self.spare.entry((extent.place(), extent.bytes())).or_default().push(extent);
        }
    }

    /// Drops spare extents of other sizes where a new one of `bytes` would pass the limit.
    fn make_room(&mut self, bytes: usize, limit: usize) {
        if limit != 0 && self.allocated + bytes > limit {
            self.drop_spare(limit.saturating_sub(bytes));
        }
    }

    /// Drops spare extents until at most `target` bytes are allocated, or none is spare.
    fn drop_spare(&mut self, target: usize) {
        for ((_, bytes), extents) in &mut self.spare {
            while self.allocated > target && extents.pop().is_some() {
                self.allocated -= bytes;
            }
        }
    }
}
