//! The one error type of the crate: a code that programs branch on and a message that people read.

use std::fmt;
use std::path::Path;

/// What went wrong, in the terms a caller can act on. The numbers are the C ABI's `kva_error_code` and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum ErrorCode {
    /// An argument is NULL, out of range, of the wrong size, or an unknown enum value.
    InvalidArgument = 1,
    /// A file or folder does not exist.
    NotFound = 2,
    /// A file exists but is not a valid checkpoint, tokenizer or cache.
    InvalidFormat = 3,
    /// Valid input that this build or machine does not support.
    Unsupported = 4,
    /// Memory (host, pinned or device) could not be had.
    OutOfMemory = 5,
    /// The session's context, or a budget, is full.
    Capacity = 6,
    /// The operating system reported an input/output error.
    Io = 7,
    /// Another thread is using the session.
    Busy = 8,
    /// The call was cancelled, by `kva_session_cancel` or by a callback.
    Cancelled = 9,
    /// The compute device failed or is not there.
    Device = 10,
    /// A defect in kvahead: please report it.
    Internal = 11,
}

/// An error: code and message travel together.
#[derive(Clone, Debug)]
pub struct Error {
    code: ErrorCode,
    message: String,
}

/// The crate's result type.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// An error of `code`; `message` names the argument, its value, and what would be right.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Error {
        Error { code, message: message.into() }
    }

    /// [`ErrorCode::InvalidArgument`].
    pub fn invalid_argument(message: impl Into<String>) -> Error {
        Error::new(ErrorCode::InvalidArgument, message)
    }

    /// [`ErrorCode::InvalidFormat`], with the file that is at fault in front.
    pub fn invalid_format(file: &Path, message: impl fmt::Display) -> Error {
        Error::new(ErrorCode::InvalidFormat, format!("{}: {message}", file.display()))
    }

    /// [`ErrorCode::Unsupported`].
    pub fn unsupported(message: impl Into<String>) -> Error {
        Error::new(ErrorCode::Unsupported, message)
    }

    /// [`ErrorCode::NotFound`] or [`ErrorCode::Io`], with the file and what was being done to it.
    pub fn io(file: &Path, doing: &str, error: &std::io::Error) -> Error {
        let code = match error.kind() {
            std::io::ErrorKind::NotFound => ErrorCode::NotFound,
            std::io::ErrorKind::OutOfMemory => ErrorCode::OutOfMemory,
            _ => ErrorCode::Io,
        };
        Error::new(code, format!("{}: cannot {doing}: {error}", file.display()))
    }

    /// The code.
    pub fn code(&self) -> ErrorCode {
        self.code
    }

    /// The message, one line of UTF-8.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The same error with `context: ` in front of its message.
    pub fn within(self, context: impl fmt::Display) -> Error {
        Error { code: self.code, message: format!("{context}: {}", self.message) }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
