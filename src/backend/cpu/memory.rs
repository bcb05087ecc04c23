//! Memory of the CPU backend: zeroed, aligned, in huge pages where it is large, and an error when there is none.
//!
//! Weights and KV extents are streamed from end to end for every token, so their pages' translations must not cost
//! a page walk every 4 KiB: from [`HUGE`] up, memory comes from `mmap`, aligned to a huge page and advised to use them.

use crate::backend::{Buffer, Place};
use crate::{Error, ErrorCode, Result};
use parking_lot::Mutex;
use std::alloc::Layout;
use std::ops::{Deref, DerefMut};

/// Alignment of every buffer: a cache line, and the widest vector.
pub(super) const ALIGN: usize = 64;

/// Size of a huge page, and from which size on allocations ask for them.
const HUGE: usize = 2 << 20;

/// `bytes` zeroed bytes, aligned to [`ALIGN`]; `OutOfMemory`, naming `purpose`, when they cannot be had.
pub(super) fn allocate(bytes: usize, place: Place, purpose: &str) -> Result<Buffer> {
    let refused =
        || Error::new(ErrorCode::OutOfMemory, format!("cannot allocate {bytes} bytes of host memory for {purpose}"));
    if bytes == 0 {
        // SAFETY: no byte is ever read or written through a buffer of zero bytes, and nothing is released.
        return Ok(unsafe { Buffer::from_raw(std::ptr::without_provenance_mut(ALIGN), 0, place, Box::new(|_, _| ())) });
    }
    // What is left for rounding up to whole huge pages must not overflow either.
    if bytes > isize::MAX as usize - 2 * HUGE {
        return Err(refused());
    }
    #[cfg(unix)]
    if bytes >= HUGE {
        return mapped::allocate(bytes, place).ok_or_else(refused);
    }
    let layout = Layout::from_size_align(bytes, ALIGN).map_err(|_| refused())?;
    // SAFETY: the layout's size is not zero.
    let address = unsafe { std::alloc::alloc_zeroed(layout) };
    if address.is_null() {
        return Err(refused());
    }
    let release = move |address, _| {
        // SAFETY: `address` came from `alloc_zeroed` with this layout, and a Buffer releases once.
        unsafe { std::alloc::dealloc(address, layout) }
    };
    // SAFETY: fresh zeroed memory of `bytes` bytes aligned to 64, valid until `release`.
    Ok(unsafe { Buffer::from_raw(address, bytes, place, Box::new(release)) })
}

#[cfg(unix)]
mod mapped {
    use super::{Buffer, HUGE, Place};

    /// Anonymous pages on a huge page's boundary. `bytes + 2 * HUGE` does not overflow.
    pub(super) fn allocate(bytes: usize, place: Place) -> Option<Buffer> {
        // One huge page more than needed holds an aligned start; what lies before and after it goes back at once.
        let length = bytes.next_multiple_of(HUGE);
        let whole = length + HUGE;
        // SAFETY: an anonymous mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                whole,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return None;
        }
        let before = start.align_offset(HUGE);
        let after = HUGE - before;
        // SAFETY: `before <= HUGE`, so both pieces and the `length` bytes between them lie inside the mapping made
        // above, which nobody else knows; `before` and `after` are multiples of the page size because mmap's result is.
        let address = unsafe {
            let address = start.cast::<u8>().add(before);
            if before > 0 {
                libc::munmap(start, before);
            }
            if after > 0 {
                libc::munmap(address.add(length).cast(), after);
            }
            #[cfg(target_os = "linux")]
            libc::madvise(address.cast(), length, libc::MADV_HUGEPAGE); // advice: a refusal costs speed only
            address
        };
        let release = move |address: *mut u8, _| {
            // SAFETY: the mapping of `length` bytes that was made above; a Buffer releases once.
            unsafe { libc::munmap(address.cast(), length) };
        };
        // SAFETY: anonymous pages are zeroed, aligned to 2 MiB, ours alone, and stay mapped until `release`.
        Some(unsafe { Buffer::from_raw(address, bytes, place, Box::new(release)) })
    }
}

/// Scratch memory that operations borrow for the length of a call, kept for the next one.
///
/// Contents are whatever the last user left. Every concurrent caller gets a block of its own.
#[derive(Default)]
pub(super) struct ScratchPool {
    free: Mutex<Vec<Buffer>>,
}

/// Blocks kept for reuse: as many as callers that usually run side by side.
const KEPT: usize = 4;

impl ScratchPool {
    /// At least `bytes` bytes, aligned to [`ALIGN`].
    pub(super) fn take(&self, bytes: usize, purpose: &str) -> Result<Scratch<'_>> {
        let kept = {
            let mut free = self.free.lock();
            let fitting = free.iter().position(|b| b.bytes() >= bytes);
            // One that is too small gives way to what is allocated: a caller that grows holds one block.
            let at = fitting.or_else(|| (0..free.len()).max_by_key(|&i| free[i].bytes()));
            at.map(|at| free.swap_remove(at)).filter(|_| fitting.is_some())
        };
        let block = match kept {
            Some(block) => block,
            None => allocate(ScratchPool::rounded(bytes), Place::Device, purpose)?,
        };
        Ok(Scratch { pool: self, block: Some(block) })
    }

    /// Bytes of a block for `bytes`: rounded up, so that slowly growing requests (attention partials) reuse one.
    pub(super) fn rounded(bytes: usize) -> usize {
        bytes.checked_next_power_of_two().unwrap_or(bytes)
    }

    /// Bytes of the blocks that nobody has borrowed.
    pub(super) fn bytes(&self) -> usize {
        self.free.lock().iter().map(Buffer::bytes).sum()
    }

    fn give_back(&self, block: Buffer) {
        let mut free = self.free.lock();
        free.push(block);
        if free.len() > KEPT {
            let smallest = (0..free.len()).min_by_key(|&i| free[i].bytes());
            smallest.map(|i| free.swap_remove(i));
        }
    }
}

/// A borrowed block of scratch memory.
pub(super) struct Scratch<'a> {
    pool: &'a ScratchPool,
    block: Option<Buffer>,
}

impl Deref for Scratch<'_> {
    type Target = Buffer;

    fn deref(&self) -> &Buffer {
        self.block.as_ref().expect("present until drop")
    }
}

impl DerefMut for Scratch<'_> {
    fn deref_mut(&mut self) -> &mut Buffer {
        self.block.as_mut().expect("present until drop")
    }
}

impl Drop for Scratch<'_> {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.pool.give_back(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zeroed_aligned_and_writable() {
        for bytes in [0, 1, 63, 64, 4097, HUGE - 1, HUGE, HUGE + 1, 3 * HUGE + 5] {
            let mut buffer = allocate(bytes, Place::Device, "a test").unwrap();
            assert_eq!(buffer.bytes(), bytes);
            assert_eq!(buffer.address().addr() % ALIGN, 0);
            // SAFETY: the buffer has `bytes` bytes and is borrowed mutably.
            let contents = unsafe { std::slice::from_raw_parts_mut(buffer.address_mut(), bytes) };
            assert!(contents.iter().all(|&b| b == 0));
            contents.fill(7);
        }
    }

    #[test]
    fn absurd_sizes_are_errors_that_name_the_purpose() {
        for bytes in [usize::MAX, isize::MAX as usize, 1 << 46] {
            let error = allocate(bytes, Place::Device, "the moon").unwrap_err();
            assert_eq!(error.code(), ErrorCode::OutOfMemory);
            assert!(error.message().contains("the moon"), "{error}");
        }
    }

    #[test]
    fn scratch_is_reused() {
        let pool = ScratchPool::default();
        let first = pool.take(1000, "a test").unwrap().address();
        assert_eq!(pool.take(900, "a test").unwrap().address(), first);
    }
}
