//! Errors as a C caller holds them.

use std::ffi::{CStr, CString, c_char};

use super::boundary::guard_void;
use crate::{Error, ErrorCode};

/// No error: the code of NULL.
pub const KVA_OK: i32 = 0;
/// An argument is NULL, out of range, of the wrong size, or an unknown enum value.
pub const KVA_ERROR_INVALID_ARGUMENT: i32 = 1;
/// A file or folder does not exist.
pub const KVA_ERROR_NOT_FOUND: i32 = 2;
/// A file exists but is not a valid checkpoint or tokenizer.
pub const KVA_ERROR_INVALID_FORMAT: i32 = 3;
/// Valid input that this build, this machine or this model does not support.
pub const KVA_ERROR_UNSUPPORTED: i32 = 4;
/// Memory could not be had.
pub const KVA_ERROR_OUT_OF_MEMORY: i32 = 5;
/// The session's capacity, or a budget such as `kv_limit_bytes`, is full.
pub const KVA_ERROR_CAPACITY: i32 = 6;
/// The operating system reported an input/output error.
pub const KVA_ERROR_IO: i32 = 7;
/// Another call is using the session or detokenizer.
pub const KVA_ERROR_BUSY: i32 = 8;
/// The call was cancelled, by `kva_session_cancel` or by a progress callback.
pub const KVA_ERROR_CANCELLED: i32 = 9;
/// The compute device failed or is not there.
pub const KVA_ERROR_DEVICE: i32 = 10;
/// A defect in kvahead: please report it. Handles that the failed call used may only be freed.
pub const KVA_ERROR_INTERNAL: i32 = 11;

const _: () = assert!(
    KVA_ERROR_INVALID_ARGUMENT == ErrorCode::InvalidArgument as i32
        && KVA_ERROR_NOT_FOUND == ErrorCode::NotFound as i32
        && KVA_ERROR_INVALID_FORMAT == ErrorCode::InvalidFormat as i32
        && KVA_ERROR_UNSUPPORTED == ErrorCode::Unsupported as i32
        && KVA_ERROR_OUT_OF_MEMORY == ErrorCode::OutOfMemory as i32
        && KVA_ERROR_CAPACITY == ErrorCode::Capacity as i32
        && KVA_ERROR_IO == ErrorCode::Io as i32
        && KVA_ERROR_BUSY == ErrorCode::Busy as i32
        && KVA_ERROR_CANCELLED == ErrorCode::Cancelled as i32
        && KVA_ERROR_DEVICE == ErrorCode::Device as i32
        && KVA_ERROR_INTERNAL == ErrorCode::Internal as i32
);

/// What went wrong: a code for programs and a message for people. Owned by whoever received it; freed with
/// `kva_error_free`. It does not change, so it may be read from any thread.
pub struct kva_error {
    code: i32,
    message: CString,
}

impl kva_error {
    pub(super) fn new(error: &Error) -> kva_error {
        // A message may quote a file's own names, and those may hold anything.
        let message = error.message().replace('\0', "\u{fffd}");
        kva_error { code: error.code() as i32, message: CString::new(message).unwrap_or_default() }
    }

    #[cfg(test)]
    pub(super) fn code(&self) -> i32 {
        self.code
    }

    #[cfg(test)]
    pub(super) fn message(&self) -> &CStr {
        &self.message
    }
}

/// The code of an error, one of `KVA_ERROR_...`; `KVA_OK` for NULL.
///
/// Ownership: `error` stays the caller's. Threads: any. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kva_error_code(error: Option<&kva_error>) -> i32 {
    error.map_or(KVA_OK, |error| error.code)
}

/// The message of an error: UTF-8, without a line break at its end, naming the argument or file, the value, and
/// what would be right; "" for NULL. Its wording may change between versions.
///
/// Ownership: the text belongs to `error` and is valid until that is freed. Threads: any. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kva_error_message(error: Option<&kva_error>) -> *const c_char {
    let message: &CStr = error.map_or(c"", |error| &error.message);
    message.as_ptr()
}

/// Frees an error.
///
/// Ownership: takes `error`, which must not be used afterwards; NULL is allowed. Threads: any. Errors: none.
#[unsafe(no_mangle)]
pub extern "C" fn kva_error_free(error: Option<Box<kva_error>>) {
    guard_void(|| drop(error));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_any_content() {
        let error = kva_error::new(&Error::unsupported("tensor \"a\0b\" is odd"));
        assert_eq!(error.message().to_str().unwrap(), "tensor \"a\u{fffd}b\" is odd");
        assert_eq!(kva_error_code(None), KVA_OK);
        assert_eq!(kva_error_code(Some(&error)), KVA_ERROR_UNSUPPORTED);
        kva_error_free(None);
        kva_error_free(Some(Box::new(error)));
    }
}
