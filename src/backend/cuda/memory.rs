//! Device memory and pinned host memory.

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdeviceptr, CUstream};

use super::Shared;
use super::context::check;
use crate::backend::{Buffer, Place};
use crate::{Error, ErrorCode, Result};

/// See `Backend::allocate`.
pub(super) fn allocate(shared: &Arc<Shared>, bytes: usize, place: Place, purpose: &str) -> Result<Buffer> {
    if bytes == 0 {
        // SAFETY: no byte is ever read or written through a buffer of zero bytes, and nothing is released.
        return Ok(unsafe { Buffer::from_raw(std::ptr::without_provenance_mut(256), 0, place, Box::new(|_, _| ())) });
    }
    let _entered = shared.context.enter()?;
    let raw = match place {
        Place::Device => Raw::device(bytes, purpose)?,
        Place::Pinned => Raw::pinned(bytes, purpose)?,
    };
    let owner = shared.clone();
    let address = std::ptr::with_exposed_provenance_mut(raw.address as usize);
    let release = Box::new(move |_, _| {
        // Operations that were enqueued and have not been launched may still name this memory; freeing waits for the rest.
        owner.launch_everything();
        if let Ok(_entered) = owner.context.enter() {
            raw.free();
        }
    });
    // SAFETY: fresh memory of `bytes` bytes, zeroed, aligned to 256 by the driver, valid until `release`.
    Ok(unsafe { Buffer::from_raw(address, bytes, place, release) })
}

/// An allocation that frees itself only when told to. The context is entered around every call.
pub(super) struct Raw {
    pub(super) address: CUdeviceptr,
    pub(super) bytes: usize,
    place: Place,
}

impl Raw {
    /// No memory.
    pub(super) const NONE: Raw = Raw { address: 0, bytes: 0, place: Place::Device };

    /// Zeroed device memory.
    pub(super) fn device(bytes: usize, purpose: &str) -> Result<Raw> {
        // SAFETY: the context is current.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|_| refused(bytes, "device", purpose))?;
        let raw = Raw { address, bytes, place: Place::Device };
        // SAFETY: the range was allocated just now. The null stream is synchronised, because other streams do not wait for it.
        let zeroed = unsafe { result::memset_d8_sync(address, 0, bytes) };
        let zeroed = zeroed.and_then(|()| {
            // SAFETY: a null stream is the legacy default stream.
            unsafe { result::stream::synchronize(std::ptr::null_mut::<std::ffi::c_void>() as CUstream) }
        });
        if let Err(error) = check("clear memory", zeroed) {
            raw.free();
            return Err(error);
        }
        Ok(raw)
    }

    /// Zeroed host memory, mapped: its address is the same on the device.
    pub(super) fn pinned(bytes: usize, purpose: &str) -> Result<Raw> {
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the context is current.
        let address =
            unsafe { result::malloc_host(bytes, flags) }.map_err(|_| refused(bytes, "pinned host", purpose))?;
        // SAFETY: `bytes` bytes were allocated just now.
        unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0, bytes) };
        Ok(Raw { address: address.expose_provenance() as CUdeviceptr, bytes, place: Place::Pinned })
    }

    /// The memory as the host sees it; for pinned memory.
    pub(super) fn host(&self) -> *mut u8 {
        debug_assert!(self.place == Place::Pinned || self.bytes == 0);
        std::ptr::with_exposed_provenance_mut(self.address as usize)
    }

    /// Gives it back, after everything on the device that may use it.
    pub(super) fn free(&self) {
        if self.bytes == 0 {
            return;
        }
        // SAFETY: allocated by `device` or `pinned`, freed once by its owner. Errors of a failed device leave nothing to do.
        let _ = unsafe {
            match self.place {
                Place::Device => result::free_sync(self.address),
                // Unlike device memory, freeing host memory does not wait for work that uses it.
                Place::Pinned => result::ctx::synchronize().and_then(|()| result::free_host(self.host().cast())),
            }
        };
    }
}

fn refused(bytes: usize, kind: &str, purpose: &str) -> Error {
    let free = result::mem_get_info()
        .map_or_else(|_| String::new(), |(free, _)| format!("; {free} bytes of the device are free"));
    Error::new(ErrorCode::OutOfMemory, format!("cannot allocate {bytes} bytes of {kind} memory for {purpose}{free}"))
}
