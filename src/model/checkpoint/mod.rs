//! Files that hold a model: opening them, and finding tensors in them.
//!
//! Files are read with `pread` into bounded buffers, not mapped into memory: weights are converted, and copied into
//! memory of the backend, anyway; a mapping would add nothing but the danger that a file truncated by another process
//! kills the host with SIGBUS. A short read is an ordinary error.

pub mod gguf;
pub mod quant;

use std::fs::File;
use std::path::Path;

use crate::{Error, Result};

/// Opens a regular file; returns its length with it.
fn open_regular(path: &Path) -> Result<(File, u64)> {
    // A FIFO would block in `open`, so the kind is looked at first.
    let metadata = std::fs::metadata(path).map_err(|error| Error::io(path, "open it", &error))?;
    if !metadata.is_file() {
        return Err(Error::invalid_format(path, "not a regular file"));
    }
    let file = File::open(path).map_err(|error| Error::io(path, "open it", &error))?;
    let length = file.metadata().map_err(|error| Error::io(path, "read its size", &error))?.len();
    Ok((file, length))
}

/// Refuses tensors (name, first byte, bytes) of `file` that share bytes.
fn check_disjoint<'a>(file: &Path, tensors: impl Iterator<Item = (&'a str, u64, u64)>) -> Result<()> {
    let mut tensors: Vec<_> = tensors.filter(|&(_, _, bytes)| bytes > 0).collect();
    tensors.sort_by_key(|&(_, offset, _)| offset);
    for pair in tensors.windows(2) {
        let [(first, offset, bytes), (second, next, _)] = [pair[0], pair[1]];
        if offset + bytes > next {
            return Err(Error::invalid_format(
                file,
                format!(
                    "tensors {first:?} (bytes {offset} to {}) and {second:?} (from byte {next}) overlap",
                    offset + bytes
                ),
            ));
        }
    }
    Ok(())
}
