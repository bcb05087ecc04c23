//! A growing list of equally long extents from a pool, given back when dropped.

use std::sync::Arc;

use crate::Result;
use crate::backend::Buffer;

use super::Pool;

/// Extents of one sequence, in order.
pub struct Extents {
    pool: Arc<Pool>,
    bytes: usize,
    buffers: Vec<Buffer>,
}

impl Extents {
    /// No extents yet; each will have `bytes` bytes.
    pub fn new(pool: Arc<Pool>, bytes: usize) -> Extents {
        Extents { pool, bytes, buffers: Vec::new() }
    }

    /// Makes sure that there are `count` extents. On an error there are as many as before.
    pub fn reserve(&mut self, count: usize) -> Result<()> {
        let missing = count.saturating_sub(self.buffers.len());
        if missing > 0 {
            let mut new = self.pool.acquire(self.bytes, missing)?;
            self.buffers.append(&mut new);
        }
        Ok(())
    }

    /// Gives back the extents past the first `count`.
    pub fn truncate(&mut self, count: usize) {
        let mut rest = self.buffers.split_off(count.min(self.buffers.len()));
        self.pool.release(&mut rest);
    }

    /// Number of extents.
    pub fn count(&self) -> usize {
        self.buffers.len()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.buffers.len() * self.bytes
    }

    /// The extents.
    pub fn buffers(&self) -> &[Buffer] {
        &self.buffers
    }

    /// The extents, for writing.
    pub fn buffers_mut(&mut self) -> &mut [Buffer] {
        &mut self.buffers
    }
}

impl Drop for Extents {
    fn drop(&mut self) {
        self.pool.release(&mut self.buffers);
    }
}
