//! Memory that belongs to a backend, and typed, bounds-checked windows into it.

use std::fmt;
use std::marker::PhantomData;

/// Element types that buffers hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    BF16,
    /// Token ids and positions.
    U32,
}

impl DType {
    /// Bytes of one element.
    #[inline]
    pub const fn bytes(self) -> usize {
        match self {
            DType::F32 | DType::U32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::U32 => "u32",
        })
    }
}

/// Where a buffer lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The memory that kernels compute in: HBM, or plain RAM on the CPU backend.
    Device,
    /// Host memory that the device can read in place: pinned and mapped, or plain RAM on the CPU backend.
    Pinned,
}

/// What gives a buffer's memory back; runs once, when the buffer is dropped.
type Release = Box<dyn FnOnce(*mut u8, usize) + Send + Sync>;

/// A piece of memory owned through a backend. Its address means something to that backend only.
///
/// Reading goes through `&Buffer`, writing through `&mut Buffer`, so two operations can never be asked to write the
/// same bytes at once; a backend whose streams run later than the call keeps that order with its own events.
pub struct Buffer {
    address: *mut u8,
    bytes: usize,
    place: Place,
    release: Option<Release>,
}

// SAFETY: a Buffer is the only owner of its memory (`from_raw`'s contract), the memory is not tied to a thread, and
// shared access through `&Buffer` only ever reads.
unsafe impl Send for Buffer {}
// SAFETY: as above; every method on `&Buffer` is read-only.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Wraps memory that a backend has obtained. `release` gets the same address and size back, once.
    ///
    /// # Safety
    /// `address` must point to `bytes` bytes, initialised, aligned to at least 64 (weights that lie in a mapped file: to their
    /// elements), which nothing else refers to and which stay valid until `release` runs.
    pub unsafe fn from_raw(address: *mut u8, bytes: usize, place: Place, release: Release) -> Buffer {
        Buffer { address, bytes, place, release: Some(release) }
    }

    /// Size in bytes.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it lives.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The address, meaningful to the backend that made the buffer.
    #[inline]
    pub fn address(&self) -> *const u8 {
        self.address
    }

    /// The address for writing.
    #[inline]
    pub fn address_mut(&mut self) -> *mut u8 {
        self.address
    }

    /// The buffer's start as `rows` × `cols` contiguous elements.
    ///
    /// # Panics
    /// When the buffer is smaller than that: a defect of the caller, never of input.
    #[inline]
    pub fn rows(&self, dtype: DType, rows: usize, cols: usize) -> Rows<'_> {
        self.check(dtype, rows, cols);
        Rows { base: self.address, rows, cols, stride: cols, dtype, borrow: PhantomData }
    }

    /// As [`Buffer::rows`], for writing.
    #[inline]
    pub fn rows_mut(&mut self, dtype: DType, rows: usize, cols: usize) -> RowsMut<'_> {
        self.check(dtype, rows, cols);
        RowsMut { base: self.address, rows, cols, stride: cols, dtype, borrow: PhantomData }
    }

    #[inline]
    fn check(&self, dtype: DType, rows: usize, cols: usize) {
        let wanted = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.bytes()));
        assert!(
            wanted.is_some_and(|n| n <= self.bytes),
            "a buffer of {} bytes cannot hold {rows} x {cols} {dtype}",
            self.bytes
        );
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            release(self.address, self.bytes);
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes, {:?})", self.bytes, self.place)
    }
}

/// A read-only window: `rows` rows of `cols` elements, consecutive rows `stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a> {
    base: *const u8,
    rows: usize,
    cols: usize,
    stride: usize,
    dtype: DType,
    borrow: PhantomData<&'a Buffer>,
}

/// A writable window; see [`Rows`].
#[derive(Debug)]
pub struct RowsMut<'a> {
    base: *mut u8,
    rows: usize,
    cols: usize,
    stride: usize,
    dtype: DType,
    borrow: PhantomData<&'a mut Buffer>,
}

// SAFETY: a window is a borrow of a Buffer, which is Send and Sync, with the same read or write exclusivity.
unsafe impl Send for Rows<'_> {}
// SAFETY: as above.
unsafe impl Sync for Rows<'_> {}
// SAFETY: as above.
unsafe impl Send for RowsMut<'_> {}
// SAFETY: as above; nothing is written through `&RowsMut` except by a backend that holds it exclusively.
unsafe impl Sync for RowsMut<'_> {}

macro_rules! window_accessors {
    ($window:ident, $pointer:ty) => {
        impl<'a> $window<'a> {
            /// Number of rows.
            #[inline]
            pub fn rows(&self) -> usize {
                self.rows
            }

            /// Elements in a row.
            #[inline]
            pub fn cols(&self) -> usize {
                self.cols
            }

            /// Elements from the start of one row to the start of the next.
            #[inline]
            pub fn stride(&self) -> usize {
                self.stride
            }

            /// Element type.
            #[inline]
            pub fn dtype(&self) -> DType {
                self.dtype
            }

            /// Address of the first element, meaningful to the owning backend.
            #[inline]
            pub fn base(&self) -> $pointer {
                self.base
            }

            /// The window of rows `from..from + count`.
            pub fn row_range(self, from: usize, count: usize) -> $window<'a> {
                assert!(from + count <= self.rows, "rows {from}+{count} of {}", self.rows);
                let skip = if count == 0 { 0 } else { from * self.stride * self.dtype.bytes() };
                // SAFETY: `skip` stays inside the window, which lies inside its buffer.
                $window { base: unsafe { self.base.add(skip) }, rows: count, ..self }
            }

            /// The window of columns `from..from + count` of every row.
            pub fn col_range(self, from: usize, count: usize) -> $window<'a> {
                assert!(from + count <= self.cols, "columns {from}+{count} of {}", self.cols);
                // SAFETY: the offset stays inside the first row, which lies inside the buffer.
                $window { base: unsafe { self.base.add(from * self.dtype.bytes()) }, cols: count, ..self }
            }
        }
    };
}

window_accessors!(Rows, *const u8);
window_accessors!(RowsMut, *mut u8);

impl RowsMut<'_> {
    /// The same window for reading.
    pub fn as_rows(&self) -> Rows<'_> {
        Rows {
            base: self.base,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
            dtype: self.dtype,
            borrow: PhantomData,
        }
    }

    /// A shorter-lived copy of the same window, so that it can be handed on and used again afterwards.
    pub fn reborrow(&mut self) -> RowsMut<'_> {
        RowsMut {
            base: self.base,
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
            dtype: self.dtype,
            borrow: PhantomData,
        }
    }
}
