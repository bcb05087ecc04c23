//! What another thread may do to a session while it works: ask it to stop, and read its length.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::{Error, ErrorCode, Result};

/// Shared between a session and whoever watches it. Atomics only, so it may be used from a signal handler.
#[derive(Debug, Default)]
pub struct Control {
    cancel: AtomicBool,
    length: AtomicUsize,
}

impl Control {
    /// Asks the call in progress, or else the next one, to stop within one layer.
    pub fn cancel(&self) {
        self.cancel.store(true, Ordering::Relaxed);
    }

    /// Takes a request back that no call has consumed.
    pub fn clear(&self) {
        self.cancel.store(false, Ordering::Relaxed);
    }

    /// Tokens the session holds.
    pub fn length(&self) -> usize {
        self.length.load(Ordering::Relaxed)
    }

    pub(super) fn set_length(&self, length: usize) {
        self.length.store(length, Ordering::Relaxed);
    }

    /// Consumes a pending request as an error.
    pub(super) fn check(&self) -> Result<()> {
        if self.cancel.swap(false, Ordering::Relaxed) {
            return Err(Error::new(ErrorCode::Cancelled, "the session was cancelled; it is as it was before the call"));
        }
        Ok(())
    }
}
