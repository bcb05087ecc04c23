//! What a step writes over, kept until it can no longer fail: how an eviction is undone.

use std::collections::HashSet;

use crate::Result;
use crate::backend::{Backend, Buffer, DType, Slot, Stream};

/// Equally long stretches of extents as they were when the step began. An extent is a whole number of stretches.
pub(super) struct Overwritten {
    /// Bytes of a stretch, an even number.
    length: usize,
    places: Vec<Slot>,
    seen: HashSet<(usize, usize)>,
    bytes: Vec<u8>,
}

impl Overwritten {
    pub(super) fn new(length: usize) -> Overwritten {
        Overwritten { length, places: Vec::new(), seen: HashSet::new(), bytes: Vec::new() }
    }

    /// A new step begins; the last one can no longer be undone.
    pub(super) fn clear(&mut self) {
        self.places.clear();
        self.seen.clear();
        self.bytes.clear();
    }

    /// Keeps the stretch at `place`, unless this step has kept it already.
    pub(super) fn save(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        extents: &[Buffer],
        place: Slot,
    ) -> Result<()> {
        if self.seen.contains(&(place.buffer, place.offset)) {
            return Ok(());
        }
        let (extent, from) = (&extents[place.buffer], self.bytes.len());
        self.bytes.resize(from + self.length, 0);
        // A window of two-byte elements: the backend copies bytes, whatever they mean.
        let stretches = extent.rows(DType::F16, extent.bytes() / self.length, self.length / DType::F16.bytes());
        let stretch = stretches.row_range(place.offset / self.length, 1);
        if let Err(error) = backend.download(stream, stretch, &mut self.bytes[from..]) {
            self.bytes.truncate(from);
            return Err(error);
        }
        self.places.push(place);
        self.seen.insert((place.buffer, place.offset));
        Ok(())
    }

    /// Writes everything back. After an error it can be tried again.
    pub(super) fn restore(&mut self, backend: &dyn Backend, stream: &Stream, extents: &mut [Buffer]) -> Result<()> {
        for (place, bytes) in self.places.iter().zip(self.bytes.chunks_exact(self.length)) {
            backend.upload(stream, bytes, &mut extents[place.buffer], place.offset)?;
        }
        self.clear();
        Ok(())
    }
}
