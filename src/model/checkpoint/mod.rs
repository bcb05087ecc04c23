//! Files that hold a model: opening them, and finding tensors in them.
//!
//! A [`Checkpoint`] offers tensors under Hugging Face names, whatever the file calls them; architectures know no other.
//!
//! Files are read with `pread` into bounded buffers: a short read is an ordinary error. Matrices that a safetensors file has
//! as they are wanted may stay there (`mapping`): nothing is copied, and all processes share one copy. The price is that
//! a file which another process truncates later kills this one with SIGBUS, so it can be turned off.

pub mod folder;
pub mod gguf;
mod mapping;
pub mod quant;
pub mod safetensors;

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::model::config::{Config, GenerationDefaults};
use crate::{Error, ErrorCode, Result};
use gguf::Metadata;
use quant::Encoding;

/// A model in files.
pub trait Checkpoint: Send + Sync {
    /// The folder or file.
    fn path(&self) -> &Path;

    /// Its configuration, validated.
    fn config(&self) -> &Config;

    /// How its makers sample from it.
    fn generation_defaults(&self) -> GenerationDefaults;

    /// The tensor that Hugging Face calls `name`.
    fn tensor(&self, name: &str) -> Option<TensorRef<'_>>;

    /// Every tensor there is, by the name the file has for it.
    fn stored_names(&self) -> Vec<&str>;

    /// The metadata, for a GGUF file: tokenizer and chat template are in it. Otherwise they are files in
    /// [`Checkpoint::path`].
    fn metadata(&self) -> Option<&Metadata> {
        None
    }

    /// The error for a missing tensor: names the file that should have it, and the name that it should have there.
    fn missing(&self, name: &str) -> Error;
}

/// The element type of a tensor in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stored {
    /// One that can be read.
    Known(Encoding),
    /// One that cannot, by name.
    Other(String),
}

impl fmt::Display for Stored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Stored::Known(encoding) => encoding.fmt(f),
            Stored::Other(name) => f.write_str(name),
        }
    }
}

/// The order in which a file has the rows of a head of q or k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    /// As Hugging Face: dimension i of a head rotates with i + d/2.
    Halves,
    /// As the original Llama, and GGUF files of type llama: dimension 2i rotates with 2i + 1. Row `2i + h` of a head
    /// is row `i + h·d/2` in the other order.
    Pairs,
}

/// A tensor in a file: where it is and what it is. Nothing has been read yet.
#[derive(Clone, Copy, Debug)]
pub struct TensorRef<'a> {
    /// The file's path, for errors.
    pub file: &'a Path,
    /// The tensor's name in the file, for errors.
    pub name: &'a str,
    /// Outermost dimension first.
    pub shape: &'a [usize],
    /// Element type.
    pub stored: &'a Stored,
    /// Order of the rows.
    pub order: RowOrder,
    source: &'a File,
    /// Where the file may be mapped.
    mapping: Option<&'a mapping::Mapping>,
    offset: u64,
    bytes: u64,
}

impl<'a> TensorRef<'a> {
    /// The encoding, or an error that says which are known.
    pub fn encoding(&self) -> Result<Encoding> {
        match self.stored {
            Stored::Known(encoding) => Ok(*encoding),
            Stored::Other(name) => Err(Error::unsupported(format!(
                "{}: tensor {:?} has elements of type {name}; expected F32, F16 or BF16",
                self.file.display(),
                self.name
            ))),
        }
    }

    /// Checks the shape.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape == expected {
            return Ok(());
        }
        Err(self.invalid(format!("expected the shape {expected:?}, found {:?}", self.shape)))
    }

    /// Fills `target` with the tensor's bytes from `from` on.
    pub fn read(&self, from: u64, target: &mut [u8]) -> Result<()> {
        let end = from.checked_add(target.len() as u64);
        assert!(end.is_some_and(|end| end <= self.bytes), "a read past the end of the tensor");
        self.source.read_exact_at(target, self.offset + from).map_err(|error| {
            if error.kind() == std::io::ErrorKind::UnexpectedEof {
                return self.invalid("the file has become shorter while it was read");
            }
            Error::io(self.file, &format!("read tensor {:?}", self.name), &error)
        })
    }

    /// An error about the tensor.
    pub fn invalid(&self, message: impl fmt::Display) -> Error {
        Error::invalid_format(self.file, format!("tensor {:?}: {message}", self.name))
    }
}

/// Opens a regular file; returns its length with it.
fn open_regular(path: &Path) -> Result<(File, u64)> {
    // A FIFO would block in `open`, so the kind is looked at first.
    let metadata = std::fs::metadata(path).map_err(|error| Error::io(path, "open it", &error))?;
    if !metadata.is_file() {
        return Err(Error::invalid_format(path, "not a regular file"));
    }
    let file = File::open(path).map_err(|error| Error::io(path, "open it", &error))?;
    let length = file.metadata().map_err(|error| Error::io(path, "read its size", &error))?.len();
    Ok((file, length))
}

/// Reads a text file of at most `limit` bytes.
fn read_text(path: &Path, limit: u64) -> Result<String> {
    use std::io::Read;
    let (file, length) = open_regular(path)?;
    if length > limit {
        let message = format!("it has {length} bytes; the most such a file may have is {limit}");
        return Err(Error::invalid_format(path, message));
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).map_err(|error| Error::io(path, "read it", &error))?;
    String::from_utf8(bytes).map_err(|_| Error::invalid_format(path, "not UTF-8"))
}

/// Refuses tensors (name, first byte, bytes) of `file` that share bytes.
fn check_disjoint<'a>(file: &Path, tensors: impl Iterator<Item = (&'a str, u64, u64)>) -> Result<()> {
    let mut tensors: Vec<_> = tensors.filter(|&(_, _, bytes)| bytes > 0).collect();
    tensors.sort_by_key(|&(_, offset, _)| offset);
    for pair in tensors.windows(2) {
        let [(first, offset, bytes), (second, next, _)] = [pair[0], pair[1]];
        if offset + bytes > next {
            return Err(Error::invalid_format(
                file,
                format!(
                    "tensors {first:?} (bytes {offset} to {}) and {second:?} (from byte {next}) overlap",
                    offset + bytes
                ),
            ));
        }
    }
    Ok(())
}

/// The error for a tensor that `file` should have.
fn missing_tensor(file: &Path, name: &str) -> Error {
    Error::new(ErrorCode::InvalidFormat, format!("{}: the tensor {name:?} is missing", file.display()))
}
