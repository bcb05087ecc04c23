//! Memory for blocks of the file on their way: aligned for direct I/O, in pieces that never move.

use std::sync::Arc;

use crate::Result;
use crate::backend::{Backend, Buffer, Place, Slot};

/// What direct I/O asks of addresses, offsets and lengths. (512 would do on many drives; 4 KiB does on all, and is what
/// they read anyway.)
pub(super) const ALIGN: usize = 4096;

/// Bytes that are allocated at a time: one huge page.
const CHUNK: usize = 2 << 20;

/// Memory for one block.
pub(super) type Page = u32;

/// A heap of pages of one size. What was allocated stays until the store goes.
pub(super) struct Pages {
    backend: Arc<dyn Backend>,
    bytes: usize,
    per_chunk: usize,
    chunks: Vec<Buffer>,
    /// Where each chunk's first page begins in it, and its address.
    starts: Vec<(usize, *mut u8)>,
    free: Vec<Page>,
}

// SAFETY: the addresses in `starts` are those of `chunks`, which may be sent.
unsafe impl Send for Pages {}

fn pages_of_chunk(page: usize) -> usize {
    (CHUNK / page).max(2)
}

impl Pages {
    /// Pages of `bytes` bytes, a multiple of [`ALIGN`].
    pub(super) fn new(backend: Arc<dyn Backend>, bytes: usize) -> Pages {
        let per_chunk = pages_of_chunk(bytes);
        Pages { backend, bytes, per_chunk, chunks: Vec::new(), starts: Vec::new(), free: Vec::new() }
    }

    /// Bytes that are allocated for `bytes` bytes of pages of `page` bytes.
    pub(super) fn allocated_for(bytes: usize, page: usize) -> usize {
        // The first page of a chunk may fall to its alignment.
        let chunk = pages_of_chunk(page);
        bytes.div_ceil((chunk - 1) * page).saturating_mul(chunk * page)
    }

    /// A page with any contents. Errors: no memory.
    pub(super) fn take(&mut self) -> Result<Page> {
        if self.free.is_empty() {
            // Pinned buffers lie in host memory, whatever the backend.
            let mut chunk = self.backend.allocate(self.per_chunk * self.bytes, Place::Pinned, "reads of a file")?;
            let address = chunk.address_mut();
            let skip = address.align_offset(ALIGN);
            // An unaligned chunk has one page less, whose number stays unused.
            let pages = (chunk.bytes() - skip) / self.bytes;
            // SAFETY: there are at least two pages in a chunk, and a page is no shorter than what is skipped.
            self.starts.push((skip, unsafe { address.add(skip) }));
            self.chunks.push(chunk);
            let first = (self.chunks.len() - 1) * self.per_chunk;
            // The lowest is taken first, so that neighbours in the file are mostly neighbours in memory.
            self.free.extend((first..first + pages).rev().map(|p| p as Page));
        }
        Ok(self.free.pop().expect("a new chunk has pages"))
    }

    /// Gives a page back, which nothing reads or writes any more.
    pub(super) fn give(&mut self, page: Page) {
        self.free.push(page);
    }

    /// Where byte `at` of a page lies in [`Pages::chunks`].
    pub(super) fn slot(&self, page: Page, at: usize) -> Slot {
        let (chunk, index) = (page as usize / self.per_chunk, page as usize % self.per_chunk);
        Slot { buffer: chunk, offset: self.starts[chunk].0 + index * self.bytes + at }
    }

    /// The address of a page, good for its bytes.
    pub(super) fn address(&self, page: Page) -> *mut u8 {
        let (chunk, index) = (page as usize / self.per_chunk, page as usize % self.per_chunk);
        // SAFETY: page numbers come from `take`, so the page lies inside its chunk.
        unsafe { self.starts[chunk].1.add(index * self.bytes) }
    }

    /// Bytes `at..at + count` of a page that no read is under way into.
    pub(super) fn bytes(&self, page: Page, at: usize, count: usize) -> &[u8] {
        assert!(at + count <= self.bytes);
        // SAFETY: in bounds of an initialised page; writing it takes `&mut self`, or a read, which there is none of.
        unsafe { std::slice::from_raw_parts(self.address(page).add(at), count) }
    }

    /// Overwrites the bytes of a page from `at` on; one that is being written may reach the file torn.
    pub(super) fn write(&mut self, page: Page, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.bytes);
        // SAFETY: in bounds of a page, `self` is borrowed mutably, and `bytes` lie elsewhere: pages are lent as shared
        // borrows of `self` only.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.address(page).add(at), bytes.len()) }
    }

    /// Copies bytes `at..at + count` of one page to the same place of another; no request uses either range.
    pub(super) fn copy(&mut self, from: Page, to: Page, at: usize, count: usize) {
        assert!(from != to && at + count <= self.bytes);
        // SAFETY: in bounds of two different pages, and `self` is borrowed mutably.
        unsafe { std::ptr::copy_nonoverlapping(self.address(from).add(at), self.address(to).add(at), count) }
    }

    /// The buffers that slots refer to.
    pub(super) fn chunks(&self) -> &[Buffer] {
        &self.chunks
    }

    /// As [`Pages::chunks`], for writing into slots of pages.
    pub(super) fn chunks_mut(&mut self) -> &mut [Buffer] {
        &mut self.chunks
    }

    /// Bytes allocated.
    pub(super) fn allocated(&self) -> usize {
        self.chunks.iter().map(Buffer::bytes).sum()
    }

    /// `bytes` bytes from byte `skip` of the first of these pages on, as parts of a request.
    pub(super) fn parts(&self, pages: &[Page], skip: usize, bytes: usize) -> Vec<libc::iovec> {
        let mut parts: Vec<libc::iovec> = Vec::new();
        let (mut skip, mut left) = (skip, bytes);
        for &page in pages {
            // SAFETY: `skip` is inside the first page, and zero after it.
            let address = unsafe { self.address(page).add(skip) };
            let length = (self.bytes - skip).min(left);
            match parts.last_mut() {
                Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == address => {
                    last.iov_len += length;
                }
                _ => parts.push(libc::iovec { iov_base: address.cast(), iov_len: length }),
            }
            (skip, left) = (0, left - length);
        }
        parts
    }

    /// Leaves the memory to a kernel that may still write to it.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.chunks));
    }
}
