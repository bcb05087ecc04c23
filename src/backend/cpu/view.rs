//! Windows of floats as slices, one row at a time.

use crate::backend::{DType, Rows, RowsMut};

/// Row `i` of a window of f32.
pub(super) fn row<'a>(x: &Rows<'a>, i: usize) -> &'a [f32] {
    assert!(x.dtype() == DType::F32 && i < x.rows());
    // SAFETY: the window lies inside a live, initialised buffer of this backend, aligned to 64 with offsets in whole
    // elements; row `i` is one of its rows; and nobody writes while the window borrows the buffer.
    unsafe { std::slice::from_raw_parts(x.base().cast::<f32>().add(i * x.stride()), x.cols()) }
}

/// Row `i` of a writable window of f32.
///
/// # Safety
/// No other reference to the row's elements is alive: each row is handed to one thread at a time.
#[allow(clippy::mut_from_ref)] // threads share the window and write disjoint rows of it
pub(super) unsafe fn row_mut<'a>(x: &'a RowsMut<'_>, i: usize) -> &'a mut [f32] {
    assert!(x.dtype() == DType::F32 && i < x.rows());
    // SAFETY: as in `row`; exclusive among windows by the borrow of the buffer, among rows by the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(x.base().cast::<f32>().add(i * x.stride()), x.cols()) }
}

/// Row `i` of a window of u32.
pub(super) fn row_u32<'a>(x: &Rows<'a>, i: usize) -> &'a [u32] {
    assert!(x.dtype() == DType::U32 && i < x.rows());
    // SAFETY: as in `row`.
    unsafe { std::slice::from_raw_parts(x.base().cast::<u32>().add(i * x.stride()), x.cols()) }
}

/// Row `i` of a writable window of u32.
///
/// # Safety
/// As of [`row_mut`].
#[allow(clippy::mut_from_ref)] // as above
pub(super) unsafe fn row_u32_mut<'a>(x: &'a RowsMut<'_>, i: usize) -> &'a mut [u32] {
    assert!(x.dtype() == DType::U32 && i < x.rows());
    // SAFETY: as in `row_mut`.
    unsafe { std::slice::from_raw_parts_mut(x.base().cast::<u32>().add(i * x.stride()), x.cols()) }
}

/// Element 0 of row `i` of one column of u32.
pub(super) fn id(x: &Rows<'_>, i: usize) -> usize {
    assert!(x.dtype() == DType::U32 && x.cols() == 1 && i < x.rows());
    // SAFETY: as in `row`.
    unsafe { x.base().cast::<u32>().add(i * x.stride()).read() as usize }
}

/// An address of scratch memory that threads write disjoint parts of.
#[derive(Clone, Copy)]
pub(super) struct Shared(pub(super) *mut u8);

// SAFETY: an address is only a number; whoever writes through it argues at that place why no other thread does.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// The address. (A method, so that closures capture the whole value and not the raw pointer in it.)
    pub(super) fn get(self) -> *mut u8 {
        self.0
    }
}
