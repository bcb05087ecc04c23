//! Pointers and panics: everything that turns a C argument into a checked Rust value, and a Rust result into a C one.

use std::any::Any;
use std::ffi::{CStr, OsStr, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

use super::error::kva_error;
use crate::{Error, ErrorCode, Result};

/// Runs the body of a function of the ABI: errors and panics both become the returned error.
///
/// `AssertUnwindSafe`: what a panic may leave half done is behind a poisoned lock afterwards (`session::Handle`),
/// or was built by the body itself and is dropped with it.
pub(super) fn guard(body: impl FnOnce() -> Result<()>) -> Option<Box<kva_error>> {
    let result = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(internal(&*panic)));
    result.err().map(|error| Box::new(kva_error::new(&error)))
}

/// As [`guard`], for functions that cannot report: a panic ends here.
pub(super) fn guard_void(body: impl FnOnce()) {
    // The panic hook has printed it already.
    let _ = catch_unwind(AssertUnwindSafe(body));
}

fn internal(panic: &(dyn Any + Send)) -> Error {
    let what = match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text.as_str(),
        _ => "a panic without a message",
    };
    Error::new(ErrorCode::Internal, format!("this is a defect in kvahead, please report it: {what}"))
}

/// A handle that must be there.
pub(super) fn handle<'a, T>(handle: Option<&'a T>, name: &str) -> Result<&'a T> {
    handle.ok_or_else(|| null(name))
}

fn null(name: &str) -> Error {
    Error::invalid_argument(format!("{name} is NULL"))
}

fn check_pointer<T>(pointer: *const T, name: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(null(name));
    }
    if !pointer.is_aligned() {
        return Err(Error::invalid_argument(format!(
            "{name} is {pointer:p}, which is not aligned to {} bytes as its type asks",
            align_of::<T>()
        )));
    }
    Ok(())
}

fn check_slice<T>(pointer: *const T, length: usize, name: &str) -> Result<()> {
    if pointer.is_null() && length > 0 {
        return Err(Error::invalid_argument(format!("{name} is NULL, but its length is {length}")));
    }
    if !pointer.is_null() {
        check_pointer(pointer, name)?;
    }
    if length.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(Error::invalid_argument(format!(
            "{name} has a length of {length}, which is more than memory can hold"
        )));
    }
    Ok(())
}

/// An array that is read: NULL with length 0 is an empty one.
///
/// # Safety
///
/// `pointer` is NULL or points to `length` readable elements which nobody writes to for as long as the slice lives.
pub(super) unsafe fn slice<'a, T>(pointer: *const T, length: usize, name: &str) -> Result<&'a [T]> {
    check_slice(pointer, length, name)?;
    if length == 0 {
        return Ok(&[]);
    }
    // SAFETY: not NULL, aligned, at most `isize::MAX` bytes (just checked); readable and left alone (the caller's promise).
    Ok(unsafe { std::slice::from_raw_parts(pointer, length) })
}

/// A text with a length: NULL with length 0 is an empty one.
///
/// # Safety
///
/// As [`slice`].
pub(super) unsafe fn text<'a>(pointer: *const c_char, length: usize, name: &str) -> Result<&'a str> {
    // SAFETY: the caller's promise is the same.
    let bytes = unsafe { slice(pointer.cast::<u8>(), length, name) }?;
    utf8(bytes, name)
}

/// A text that ends with a NUL.
///
/// # Safety
///
/// `pointer` is NULL or points to a NUL-terminated string which nobody writes to for as long as the result lives.
pub(super) unsafe fn string<'a>(pointer: *const c_char, name: &str) -> Result<&'a str> {
    check_pointer(pointer, name)?;
    // SAFETY: not NULL (just checked), terminated and left alone (the caller's promise).
    let text = unsafe { CStr::from_ptr(pointer) };
    utf8(text.to_bytes(), name)
}

/// The name of a file or folder: any bytes where the system's names are bytes.
///
/// # Safety
///
/// As [`string`].
#[cfg(unix)]
pub(super) unsafe fn path<'a>(pointer: *const c_char, name: &str) -> Result<&'a Path> {
    use std::os::unix::ffi::OsStrExt;
    check_pointer(pointer, name)?;
    // SAFETY: not NULL (just checked), terminated and left alone (the caller's promise).
    let text = unsafe { CStr::from_ptr(pointer) };
    not_empty(OsStr::from_bytes(text.to_bytes()), name)
}

/// The name of a file or folder, in UTF-8.
///
/// # Safety
///
/// As [`string`].
#[cfg(not(unix))]
pub(super) unsafe fn path<'a>(pointer: *const c_char, name: &str) -> Result<&'a Path> {
    // SAFETY: the caller's promise is the same.
    not_empty(OsStr::new(unsafe { string(pointer, name) }?), name)
}

/// A [`path`] that may be absent: NULL is none.
///
/// # Safety
///
/// As [`string`].
pub(super) unsafe fn optional_path(pointer: *const c_char, name: &str) -> Result<Option<PathBuf>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise, for the length of this call.
    unsafe { path(pointer, name) }.map(|path| Some(path.to_owned()))
}

fn not_empty<'a>(path: &'a OsStr, name: &str) -> Result<&'a Path> {
    if path.is_empty() {
        return Err(Error::invalid_argument(format!("{name} is empty")));
    }
    Ok(Path::new(path))
}

fn utf8<'a>(bytes: &'a [u8], name: &str) -> Result<&'a str> {
    std::str::from_utf8(bytes).map_err(|error| {
        Error::invalid_argument(format!("{name} is not UTF-8: the byte at offset {} is wrong", error.valid_up_to()))
    })
}

/// Where one result goes. Writing consumes it and cannot fail, so that a function writes its results last, all or
/// none.
pub(super) struct Out<T>(NonNull<T>);

impl<T> Out<T> {
    /// # Safety
    ///
    /// `pointer` is NULL or points to memory that may be written to, and that nobody else uses, until the result
    /// is.
    pub(super) unsafe fn new(pointer: *mut T, name: &str) -> Result<Out<T>> {
        check_pointer(pointer, name)?;
        NonNull::new(pointer).map(Out).ok_or_else(|| null(name))
    }

    pub(super) fn write(self, value: T) {
        // SAFETY: aligned (checked in `new`) and writable (promised there); what it held is C's and is not dropped.
        unsafe { self.0.write(value) }
    }
}

/// Where an array of results goes, which may be absent (NULL with length 0).
pub(super) struct OutSlice<T> {
    pointer: *mut T,
    length: usize,
}

impl<T: Copy> OutSlice<T> {
    /// # Safety
    ///
    /// `pointer` is NULL or points to `length` elements that may be written to, and that nobody else uses, until
    /// the results are.
    pub(super) unsafe fn new(pointer: *mut T, length: usize, name: &str) -> Result<OutSlice<T>> {
        check_slice(pointer, length, name)?;
        Ok(OutSlice { pointer, length })
    }

    pub(super) fn is_absent(&self) -> bool {
        self.pointer.is_null()
    }

    /// Errors unless there is room for `needed` elements of `what`, or no array at all.
    pub(super) fn check_room(&self, needed: usize, name: &str, what: &str) -> Result<()> {
        if !self.is_absent() && self.length < needed {
            return Err(Error::invalid_argument(format!(
                "{name} has room for {} {what}, but {needed} are needed",
                self.length
            )));
        }
        Ok(())
    }

    /// Errors unless the array has exactly `expected` elements of `what`, or is absent.
    pub(super) fn check_length(&self, expected: usize, name: &str, what: &str) -> Result<()> {
        if !self.is_absent() && self.length != expected {
            return Err(Error::invalid_argument(format!(
                "{name} has a length of {}, but {what} is {expected}",
                self.length
            )));
        }
        Ok(())
    }

    /// Writes `values` from element `at` on, unless there is no array.
    pub(super) fn write(&mut self, at: usize, values: &[T]) {
        if self.is_absent() {
            return;
        }
        assert!(at <= self.length && values.len() <= self.length - at);
        // SAFETY: the elements `at..at + values.len()` lie in the array (just asserted), which is aligned (checked in
        // `new`), writable and nobody else's, so it does not overlap `values` (promised there).
        unsafe { self.pointer.add(at).copy_from_nonoverlapping(values.as_ptr(), values.len()) }
    }
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;

    #[test]
    fn errors_and_panics_become_errors() {
        assert!(guard(|| Ok(())).is_none());
        let error = guard(|| Err(Error::invalid_argument("threads is odd"))).unwrap();
        assert_eq!((error.code(), error.message()), (1, c"threads is odd"));
        let panics: [fn() -> Result<()>; 3] =
            [|| panic!("plain"), || panic!("with {}", "arguments"), || std::panic::panic_any(7)];
        for (panic, message) in panics.into_iter().zip(["plain", "with arguments", "without a message"]) {
            let error = guard(panic).unwrap();
            assert_eq!(error.code(), ErrorCode::Internal as i32);
            assert!(error.message().to_str().unwrap().contains(message), "{:?}", error.message());
        }
        guard_void(|| panic!("nobody hears it"));
    }

    #[test]
    fn slices_may_be_null_only_when_empty() {
        let numbers = [1u32, 2, 3];
        // SAFETY: NULL, or an array of at least the given length; lengths past that are refused before they are used.
        unsafe {
            assert_eq!(slice(numbers.as_ptr(), 3, "tokens").unwrap(), [1, 2, 3]);
            assert!(slice(numbers.as_ptr(), 0, "tokens").unwrap().is_empty());
            assert!(slice::<u32>(ptr::null(), 0, "tokens").unwrap().is_empty());
            let error = slice::<u32>(ptr::null(), 2, "tokens").unwrap_err();
            assert_eq!(error.message(), "tokens is NULL, but its length is 2");
            assert_eq!(slice(numbers.as_ptr(), usize::MAX, "tokens").unwrap_err().code(), ErrorCode::InvalidArgument);
            let odd = numbers.as_ptr().cast::<u8>().add(1).cast::<u32>();
            assert_eq!(slice(odd, 1, "tokens").unwrap_err().code(), ErrorCode::InvalidArgument);
            assert!(slice(odd, 0, "tokens").is_err());
        }
    }

    #[test]
    fn texts_are_utf8() {
        // SAFETY: NULL, or literals with the given lengths.
        unsafe {
            assert_eq!(text(c"h\xc3\xa9".as_ptr(), 3, "text").unwrap(), "hé");
            let error = text(c"h\xc3".as_ptr(), 2, "text").unwrap_err();
            assert_eq!(error.message(), "text is not UTF-8: the byte at offset 1 is wrong");
            assert_eq!(text(ptr::null(), 0, "text").unwrap(), "");
            assert!(text(ptr::null(), 1, "text").is_err());
            assert_eq!(string(c"user".as_ptr(), "role").unwrap(), "user");
            assert_eq!(string(ptr::null(), "role").unwrap_err().message(), "role is NULL");
            assert!(path(c"".as_ptr(), "path").is_err());
            assert_eq!(path(c"/tmp".as_ptr(), "path").unwrap(), Path::new("/tmp"));
            assert_eq!(optional_path(ptr::null(), "trace").unwrap(), None);
            assert_eq!(optional_path(c"/tmp".as_ptr(), "trace").unwrap(), Some("/tmp".into()));
            assert_eq!(optional_path(c"".as_ptr(), "trace").unwrap_err().message(), "trace is empty");
        }
    }

    #[test]
    fn results_are_written_where_there_is_room() {
        let mut numbers = [0u32; 4];
        // SAFETY: NULL, or an array of the given length that nothing else uses meanwhile.
        unsafe {
            assert!(Out::<u32>::new(ptr::null_mut(), "count").is_err());
            Out::new(&raw mut numbers[3], "count").unwrap().write(9);

            let mut out = OutSlice::new(numbers.as_mut_ptr(), 3, "tokens").unwrap();
            out.check_room(3, "tokens", "tokens").unwrap();
            let error = out.check_room(4, "tokens", "tokens").unwrap_err();
            assert_eq!(error.message(), "tokens has room for 3 tokens, but 4 are needed");
            assert!(out.check_length(2, "logits", "the vocabulary").is_err());
            out.write(1, &[5, 6]);

            let mut absent = OutSlice::<u32>::new(ptr::null_mut(), 0, "tokens").unwrap();
            absent.check_room(100, "tokens", "tokens").unwrap();
            absent.check_length(100, "tokens", "tokens").unwrap();
            absent.write(7, &[1]);
            assert!(OutSlice::<u32>::new(ptr::null_mut(), 1, "tokens").is_err());
        }
        assert_eq!(numbers, [0, 5, 6, 9]);
    }
}
