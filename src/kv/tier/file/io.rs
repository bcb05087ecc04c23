//! Reads and writes that run behind the caller's back: through io_uring, or on threads where that is forbidden.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::threads::Threads;

/// A read or a write, of memory in parts.
pub(super) struct Request {
    /// The caller's name for it.
    pub token: u64,
    /// Whether the file is written.
    pub write: bool,
    /// Byte of the file.
    pub offset: u64,
    /// Memory, in order. Whoever submits keeps it alive, and does not free or reuse it, until the request is reaped.
    pub parts: Vec<libc::iovec>,
    /// Length of all parts.
    pub bytes: usize,
    /// How often it has been submitted before.
    pub tries: u8,
}

// SAFETY: the parts are plain addresses; who touches the memory when is `Io`'s contract.
unsafe impl Send for Request {}

/// What has become of a request: bytes moved, or why none were.
pub(super) type Done = (Request, io::Result<usize>);

/// An engine for requests on one file. They complete in any order.
pub(super) trait Io: Send {
    /// Starts requests, or queues what does not fit the engine.
    fn submit(&mut self, requests: Vec<Request>) -> io::Result<()>;

    /// Adds what has completed to `done`. With `wait`, blocks until something has, unless nothing is under way.
    fn reap(&mut self, wait: bool, done: &mut Vec<Done>) -> io::Result<()>;

    /// Drops what is only queued, waits for the rest, and forgets all of it. Whether no memory is in use any more.
    fn drain(&mut self) -> bool;
}

/// io_uring where the kernel allows it, threads otherwise.
pub(super) fn engine(file: &Arc<File>) -> crate::Result<Box<dyn Io>> {
    #[cfg(target_os = "linux")]
    if let Ok(ring) = super::ring::Ring::new(Arc::clone(file)) {
        return Ok(Box::new(ring));
    }
    Ok(Box::new(Threads::new(file)?))
}
