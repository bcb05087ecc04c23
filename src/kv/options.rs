//! Where entries are kept, in which form, and what happens when there is no more room.

use std::path::PathBuf;

/// Where a policy keeps the entries that it does not hold on the device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KvTier {
    /// Device memory: HBM, or plain RAM on the CPU backend. Nothing is ever fetched.
    #[default]
    Device,
    /// Host memory: pinned and mapped for a GPU, plain RAM on the CPU backend.
    Host,
    /// A preallocated file.
    File(FileOptions),
}

/// How to use a file as KV memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// The file, made anew for the session; a path that exists is an error. `None`: a nameless file in the system's
    /// temporary folder.
    pub path: Option<PathBuf>,
    /// Most bytes of the file, 0 for what the session's capacity needs.
    pub limit: u64,
    /// Leave the file in its place; otherwise it is unlinked as soon as it is open.
    pub keep: bool,
    /// Go through the page cache instead of direct I/O.
    pub buffered: bool,
    /// Keep a checksum of every row, and compare it on every read.
    pub checksum: bool,
}

/// Which entry gives way when the pool is full (paper §4.4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Eviction {
    /// None: a step that finds no room is a `Capacity` error before it begins.
    #[default]
    Off,
    /// The oldest entry.
    Fifo,
    /// The entry that was selected longest ago.
    Lru,
    /// The entry selected least often, by saturating counters that are all halved when one saturates.
    Counter,
}
