//! The data of a step that changes while its launches stay the same: positions, lengths, tables of addresses.
//!
//! Operations put such data here and hand the kernel a device address into the block. The block is filled on the host
//! while operations are enqueued and copied over in one piece before they run, so a step costs one small copy, and a
//! step that does the same as the last one differs from it in these bytes only: its launches can be replayed.

use cudarc::driver::result;
use cudarc::driver::sys::CUstream;

use super::context::check;
use super::memory::Raw;
use crate::Result;

/// Bytes of a new block; it grows when a single operation needs more.
const BYTES: usize = 1 << 20;

pub(super) struct Block {
    host: Raw,
    device: Raw,
    used: usize,
    /// Bytes that have been sent.
    sent: usize,
    /// Tables that were put here since the last reset: offset and length in bytes.
    tables: Vec<(usize, usize)>,
    /// The one behind that which was asked for last: every layer asks for the same ones in the same order.
    next_table: usize,
}

impl Block {
    pub(super) const fn new() -> Block {
        Block { host: Raw::NONE, device: Raw::NONE, used: 0, sent: 0, tables: Vec::new(), next_table: 0 }
    }

    /// Whether `bytes` more, in up to `pieces` pieces, fit.
    pub(super) fn fits(&self, bytes: usize, pieces: usize) -> bool {
        self.used + bytes + 16 * pieces <= self.device.bytes
    }

    /// Makes an empty block of at least `bytes`. Everything that used the old one has finished.
    pub(super) fn grow(&mut self, bytes: usize) -> Result<()> {
        if bytes > self.device.bytes {
            self.free();
            let bytes = bytes.next_power_of_two().max(BYTES);
            self.host = Raw::pinned(bytes, "launch parameters")?;
            self.device = Raw::device(bytes, "launch parameters")?;
        }
        self.reset();
        Ok(())
    }

    /// Starts over. Everything that used the block has finished.
    pub(super) fn reset(&mut self) {
        (self.used, self.sent) = (0, 0);
        self.tables.clear();
        self.next_table = 0;
    }

    /// Bytes of each of the two copies: now, and once an operation has put `bytes` there.
    pub(super) fn bytes(&self, bytes: usize) -> usize {
        match bytes {
            0 => self.device.bytes,
            bytes => self.device.bytes.max(bytes.next_power_of_two().max(BYTES)),
        }
    }

    /// Bytes in use.
    pub(super) fn used(&self) -> usize {
        self.used
    }

    /// Appends `bytes`, aligned to 16; returns their device address. `fits` said yes.
    pub(super) fn push(&mut self, bytes: &[u8]) -> u64 {
        self.used = self.used.next_multiple_of(16);
        self.extend(bytes)
    }

    /// Appends `bytes` directly behind what is there.
    pub(super) fn extend(&mut self, bytes: &[u8]) -> u64 {
        assert!(self.used + bytes.len() <= self.device.bytes, "the block was not asked whether it fits");
        let at = self.used;
        // SAFETY: the range lies inside the pinned allocation. The device reads ranges that were sent, and this one was not.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host.host().add(at), bytes.len()) };
        self.used += bytes.len();
        self.device.address + at as u64
    }

    /// Writes over what [`Block::push`] has put at `address`, if none of it has been sent.
    pub(super) fn rewrite(&mut self, address: u64, bytes: &[u8]) {
        let at = (address - self.device.address) as usize;
        assert!(self.sent <= at && at + bytes.len() <= self.used, "what was sent is not rewritten");
        // SAFETY: the range lies inside the pinned allocation, and the device has not been sent it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host.host().add(at), bytes.len()) };
    }

    /// As [`Block::push`] for a table that other operations of the step may have put here before.
    pub(super) fn push_table(&mut self, bytes: &[u8]) -> u64 {
        let same = |&i: &usize| {
            let (at, length) = self.tables[i];
            // SAFETY: the range was written by `push` and lies inside the pinned allocation.
            length == bytes.len() && unsafe { std::slice::from_raw_parts(self.host.host().add(at), length) } == bytes
        };
        if let Some(i) = (self.next_table..self.tables.len()).chain(0..self.next_table).find(same) {
            self.next_table = i + 1;
            return self.device.address + self.tables[i].0 as u64;
        }
        let address = self.push(bytes);
        self.tables.push(((address - self.device.address) as usize, bytes.len()));
        self.next_table = self.tables.len();
        address
    }

    /// Copies what has not been sent yet, in the stream's order.
    pub(super) fn send(&mut self, stream: CUstream) -> Result<()> {
        if self.sent < self.used {
            let count = self.used - self.sent;
            // SAFETY: both ranges lie inside their allocations; the host range is pinned and stays as it is until `reset`.
            check("send launch parameters", unsafe {
                let source = std::slice::from_raw_parts(self.host.host().add(self.sent), count);
                result::memcpy_htod_async(self.device.address + self.sent as u64, source, stream)
            })?;
            self.sent = self.used;
        }
        Ok(())
    }

    /// Gives the memory back. The context is current.
    pub(super) fn free(&mut self) {
        self.host.free();
        self.device.free();
        (self.host, self.device) = (Raw::NONE, Raw::NONE);
        self.reset();
    }
}

/// Plain values as bytes.
pub(super) fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: `Plain` types have no padding, so every byte is initialised; the view covers exactly `values`.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), std::mem::size_of_val(values)) }
}

/// Types without padding and without anything but numbers, which kernels read.
///
/// # Safety
/// Every byte of a value is initialised.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: a number.
unsafe impl Plain for u32 {}
// SAFETY: a number.
unsafe impl Plain for u64 {}
// SAFETY: a number.
unsafe impl Plain for f32 {}

/// Declares structs that kernels take, and proves that they have no padding: fields are 4 or 8 bytes wide, the sum of their
/// sizes is the struct's, and that is a multiple of 8.
macro_rules! plain {
    ($($(#[$doc:meta])* $vis:vis struct $name:ident { $($seen:vis $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, PartialEq)]
        $vis struct $name { $($seen $field: $type,)* }

        const _: () = assert!(
            size_of::<$name>() == 0 $(+ size_of::<$type>())* && size_of::<$name>() % 8 == 0,
            "a kernel's parameters have padding"
        );

        // SAFETY: all fields are plain, and the assertion above says that nothing lies between or behind them.
        unsafe impl $crate::backend::cuda::block::Plain for $name {}
    )*};
}
pub(super) use plain;
