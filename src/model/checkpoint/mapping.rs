//! A weight file as a part of memory: pages come from the file when they are touched first, and are the system's one
//! copy for every process that maps it.

use std::fs::File;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use memmap2::{MmapOptions, MmapRaw};

use super::TensorRef;
use crate::Result;
use crate::backend::{Buffer, Place};

/// The mapping of one file, made when it is first wanted.
#[derive(Debug, Default)]
pub(super) struct Mapping(OnceLock<Option<Arc<MmapRaw>>>);

impl Mapping {
    /// The file's bytes, or nothing where the system maps no such file.
    fn get(&self, file: &File) -> Option<Arc<MmapRaw>> {
        // Copy on write: who folds something into a weight changes memory, never the file.
        let map = || {
            // SAFETY: what a process sees of a file that another changes or shortens meanwhile is the caller's risk, which
            // `kva_model_options.copy_weights` takes away; no reference to the bytes is made here.
            let map = unsafe { MmapOptions::new().map_copy(file) }.ok()?;
            Some(Arc::new(MmapRaw::from(map)))
        };
        self.0.get_or_init(map).clone()
    }
}

impl TensorRef<'_> {
    /// The bytes of this tensor and of those `after` it, in place, as memory that a backend on the host can use; nothing
    /// where they do not lie one directly behind the other in one mapped file, or not on multiples of `align`.
    ///
    /// Errors: the file has become shorter.
    pub fn in_place<'t>(&self, after: impl Iterator<Item = &'t TensorRef<'t>>, align: usize) -> Result<Option<Buffer>> {
        let Some(map) = self.mapping.and_then(|mapping| mapping.get(self.source)) else { return Ok(None) };
        let mut end = self.offset + self.bytes;
        for tensor in after {
            if !std::ptr::eq::<Path>(tensor.file, self.file) || tensor.offset != end {
                return Ok(None);
            }
            end += tensor.bytes;
        }
        if end > map.len() as u64 {
            return Err(self.invalid("the file has become shorter while it was read"));
        }
        // No overflow: both lie within the mapping.
        let (at, bytes) = (self.offset as usize, (end - self.offset) as usize);
        if !(map.as_ptr() as usize + at).is_multiple_of(align) {
            return Ok(None);
        }
        // SAFETY: `at` lies within the mapping.
        let address = unsafe { map.as_mut_ptr().add(at) };
        // SAFETY: `bytes` bytes of the mapping, which is private and writable, and which the closure keeps until it is
        // dropped with the buffer. Tensors of a file are disjoint, and a loader takes each in place once.
        Ok(Some(unsafe { Buffer::from_raw(address, bytes, Place::Device, Box::new(move |_, _| drop(map))) }))
    }
}
