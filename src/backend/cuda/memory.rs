//! Device memory and pinned host memory.
//!
//! Pinned memory that the driver allocates costs it half a second a GiB. Large pieces are therefore anonymous huge pages,
//! touched by several threads and then registered with the driver, which is ten times as fast.

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUdeviceptr, CUstream};

use super::Shared;
use super::context::check;
use super::host;
use crate::backend::{Buffer, Place, cpu};
use crate::{Error, ErrorCode, Result};

/// From this size on host memory is registered: a huge page.
const LEAST_REGISTERED: usize = 2 << 20;

/// Bytes that are worth a thread that touches them, and the most threads.
const TOUCHED: usize = 16 << 20;
const MOST_THREADS: usize = 16;

/// A page, huge or not, is touched at least once in so many bytes.
const PAGE: usize = 4096;

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
    /// The memory that is registered with the driver, where it is not the driver's own.
    registered: Option<Buffer>,
}

impl Raw {
    /// No memory.
    pub(super) const NONE: Raw = Raw { address: 0, bytes: 0, place: Place::Device, registered: None };

    /// Zeroed device memory.
    pub(super) fn device(bytes: usize, purpose: &str) -> Result<Raw> {
        // SAFETY: the context is current.
        let address = unsafe { result::malloc_sync(bytes) }.map_err(|_| refused(bytes, "device", purpose))?;
        let raw = Raw { address, bytes, place: Place::Device, registered: None };
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
        if bytes >= LEAST_REGISTERED {
            if host::available().is_some_and(|available| bytes > available) {
                return Err(refused(bytes, "pinned host", purpose));
            }
            if let Some(raw) = Raw::registered(bytes, purpose) {
                return Ok(raw);
            }
        }
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: the context is current.
        let address =
            unsafe { result::malloc_host(bytes, flags) }.map_err(|_| refused(bytes, "pinned host", purpose))?;
        // SAFETY: `bytes` bytes were allocated just now.
        unsafe { std::ptr::write_bytes(address.cast::<u8>(), 0, bytes) };
        let address = address.expose_provenance() as CUdeviceptr;
        Ok(Raw { address, bytes, place: Place::Pinned, registered: None })
    }

    /// The same of huge pages; `None` where they cannot be had, or the driver refuses them (a limit on locked memory, a
    /// device that sees them under another address).
    fn registered(bytes: usize, purpose: &str) -> Option<Raw> {
        let mut buffer = cpu::host_memory(bytes, purpose).ok()?;
        touch(&mut buffer);
        let host = buffer.address_mut();
        let flags = sys::CU_MEMHOSTREGISTER_PORTABLE | sys::CU_MEMHOSTREGISTER_DEVICEMAP;
        // SAFETY: the context is current, and the range is the buffer's, which is freed after it has been unregistered.
        unsafe { sys::cuMemHostRegister_v2(host.cast(), bytes, flags) }.result().ok()?;
        let mut address = 0;
        // SAFETY: the range is registered and mapped; writes its device address to a local.
        let found = unsafe { sys::cuMemHostGetDevicePointer_v2(&mut address, host.cast(), 0) }.result();
        if found.is_err() || address != host.expose_provenance() as CUdeviceptr {
            // SAFETY: registered just now, and nobody knows of it yet. An error leaves nothing to do.
            let _ = unsafe { sys::cuMemHostUnregister(host.cast()) }.result();
            return None;
        }
        Some(Raw { address, bytes, place: Place::Pinned, registered: Some(buffer) })
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
                Place::Pinned => result::ctx::synchronize().and_then(|()| match &self.registered {
                    // The pages themselves go with `self`.
                    Some(_) => sys::cuMemHostUnregister(self.host().cast()).result(),
                    None => result::free_host(self.host().cast()),
                }),
            }
        };
    }
}

/// Makes the kernel find every page, on several threads where there are many: it does little else while it registers them.
fn touch(buffer: &mut Buffer) {
    let bytes = buffer.bytes();
    let threads =
        std::thread::available_parallelism().map_or(1, |n| n.get()).min(MOST_THREADS).min(bytes.div_ceil(TOUCHED));
    // SAFETY: the buffer's own bytes, borrowed mutably.
    let all = unsafe { std::slice::from_raw_parts_mut(buffer.address_mut(), bytes) };
    let share = bytes.div_ceil(threads.max(1)).next_multiple_of(PAGE);
    let write = |part: &mut [u8]| {
        for page in part.chunks_mut(PAGE) {
            // SAFETY: a byte of the page; volatile, for a plain zero over a zero could be left out.
            unsafe { page.as_mut_ptr().write_volatile(0) };
        }
    };
    std::thread::scope(|scope| {
        let mut parts = all.chunks_mut(share);
        let own = parts.next();
        for part in parts {
            // A thread that cannot be had leaves its pages to be found when they are registered.
            let _ = std::thread::Builder::new().spawn_scoped(scope, move || write(part));
        }
        own.map(write);
    });
}

fn refused(bytes: usize, kind: &str, purpose: &str) -> Error {
    let device = result::mem_get_info().map(|(free, _)| format!("; {free} bytes of the device are free"));
    let host = host::available().map(|free| format!("; {free} bytes of the host are available"));
    let free = device.unwrap_or_default() + &host.unwrap_or_default();
    Error::new(ErrorCode::OutOfMemory, format!("cannot allocate {bytes} bytes of {kind} memory for {purpose}{free}"))
}
