//! The device's memory, and the host's that it may access.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;

use cudarc::driver::sys::CUresult;

/// Bytes of the device: no more than a machine that runs tests has to spare, for all that is allocated is written.
const TOTAL: u64 = 8 << 30;

/// As a driver aligns what it allocates.
const ALIGN: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Device,
    /// Of the host, allocated here.
    Pinned,
    /// Of the host, the program's own.
    Registered,
    /// Variables of modules.
    Module,
}

#[derive(Default)]
pub(super) struct Memory {
    pieces: BTreeMap<u64, (u64, Kind)>,
    used: u64,
}

impl Memory {
    pub(super) fn allocate(&mut self, bytes: usize, kind: Kind) -> Result<u64, CUresult> {
        if bytes == 0 {
            return Err(CUresult::CUDA_ERROR_INVALID_VALUE);
        }
        if kind == Kind::Device && self.used + bytes as u64 > TOTAL {
            return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        }
        let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| CUresult::CUDA_ERROR_OUT_OF_MEMORY)?;
        // SAFETY: the size is not zero.
        let address = unsafe { alloc(layout) };
        if address.is_null() {
            return Err(CUresult::CUDA_ERROR_OUT_OF_MEMORY);
        }
        // SAFETY: `bytes` bytes were allocated just now. Ones: no number, and no address.
        unsafe { address.write_bytes(0xff, bytes) };
        if kind == Kind::Device {
            self.used += bytes as u64;
        }
        let address = address.expose_provenance() as u64;
        self.insert(address, bytes as u64, kind);
        Ok(address)
    }

    pub(super) fn insert(&mut self, address: u64, bytes: u64, kind: Kind) {
        self.pieces.insert(address, (bytes, kind));
    }

    /// Gives back what begins at an address and is of this kind.
    pub(super) fn remove(&mut self, address: u64, kind: Kind) -> Result<(), CUresult> {
        let bytes = match self.pieces.get(&address) {
            Some(&(bytes, of)) if of == kind => bytes,
            _ => return Err(CUresult::CUDA_ERROR_INVALID_VALUE),
        };
        self.pieces.remove(&address);
        if kind == Kind::Device {
            self.used -= bytes;
        }
        if matches!(kind, Kind::Device | Kind::Pinned) {
            let layout = Layout::from_size_align(bytes as usize, ALIGN).expect("it was one when it was allocated");
            // SAFETY: allocated by `allocate` with this layout, and forgotten just now.
            unsafe { dealloc(std::ptr::with_exposed_provenance_mut(address as usize), layout) };
        }
        Ok(())
    }

    /// The piece, from where to where, that holds all of these bytes: the device's, or the host's that it knows.
    pub(super) fn find(&self, address: u64, bytes: u64) -> Option<(u64, u64)> {
        let (&begin, &(size, _)) = self.pieces.range(..=address).next_back()?;
        (address.checked_add(bytes)? <= begin + size).then_some((begin, begin + size))
    }

    pub(super) fn holds(&self, address: u64, bytes: u64) -> bool {
        self.find(address, bytes).is_some()
    }

    /// Free bytes of the device, and all.
    pub(super) fn info(&self) -> (u64, u64) {
        (TOTAL - self.used, TOTAL)
    }
}
