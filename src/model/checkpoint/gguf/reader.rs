//! Little-endian reads from a file whose every number may be a lie.
//!
//! The reader knows how many bytes the file has left, and reserves memory only for what is really there.

use std::fmt;
use std::io::Read;
use std::path::Path;

use crate::{Error, Result};

/// How much of a value is read, and reserved, at a time: a file that shrinks while it is read costs no more than this.
const STEP: u64 = 1 << 20;

/// A position in a file.
pub(super) struct Reader<'a, R> {
    source: R,
    file: &'a Path,
    position: u64,
    length: u64,
}

impl<'a, R: Read> Reader<'a, R> {
    /// Reads `source`, which is at the start of a file of `length` bytes; `file` is named in errors.
    pub(super) fn new(source: R, file: &'a Path, length: u64) -> Reader<'a, R> {
        Reader { source, file, position: 0, length }
    }

    pub(super) fn file(&self) -> &Path {
        self.file
    }

    /// Bytes read so far.
    pub(super) fn position(&self) -> u64 {
        self.position
    }

    /// Bytes from here to the end of the file.
    pub(super) fn remaining(&self) -> u64 {
        self.length - self.position
    }

    pub(super) fn invalid(&self, message: impl fmt::Display) -> Error {
        Error::invalid_format(self.file, message)
    }

    pub(super) fn unsupported(&self, message: impl fmt::Display) -> Error {
        Error::unsupported(format!("{}: {message}", self.file.display()))
    }

    /// The next `count` bytes, which are part of `what`.
    pub(super) fn bytes(&mut self, count: u64, what: &str) -> Result<Vec<u8>> {
        if count > self.remaining() {
            return Err(self.truncated(count, what));
        }
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < count {
            let from = bytes.len();
            let step = STEP.min(count - from as u64) as usize;
            bytes.resize(from + step, 0);
            self.fill(&mut bytes[from..], what)?;
        }
        Ok(bytes)
    }

    pub(super) fn u32(&mut self, what: &str) -> Result<u32> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes, what)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub(super) fn u64(&mut self, what: &str) -> Result<u64> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes, what)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// A length and that many bytes of UTF-8, `limit` at most.
    pub(super) fn string(&mut self, what: &str, limit: u64) -> Result<String> {
        let length = self.u64(what)?;
        if length > limit {
            return Err(self.invalid(format!(
                "{what}, at byte {}, claims {length} bytes; the most it may have is {limit}",
                self.position
            )));
        }
        let bytes = self.bytes(length, what)?;
        String::from_utf8(bytes)
            .map_err(|_| self.invalid(format!("{what}, ending at byte {}, is not UTF-8", self.position)))
    }

    fn fill(&mut self, target: &mut [u8], what: &str) -> Result<()> {
        if target.len() as u64 > self.remaining() {
            return Err(self.truncated(target.len() as u64, what));
        }
        self.source.read_exact(target).map_err(|error| Error::io(self.file, &format!("read {what}"), &error))?;
        self.position += target.len() as u64;
        Ok(())
    }

    fn truncated(&self, count: u64, what: &str) -> Error {
        self.invalid(format!(
            "the file ends inside {what}: {count} bytes are needed at byte {}, {} are left",
            self.position,
            self.remaining()
        ))
    }
}
