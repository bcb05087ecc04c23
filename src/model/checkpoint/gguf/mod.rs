//! GGUF, versions 2 and 3: one file with metadata, tensor descriptions and tensor data.
//!
//! ```text
//! "GGUF" version:u32 tensors:u64 pairs:u64
//! pairs   × { key:string type:u32 value }                        -> Metadata
//! tensors × { name:string n:u32 dims:u64×n type:u32 offset:u64 } -> Entry
//! padding to general.alignment, then the data that the offsets count from
//! ```
//!
//! Every count, length and offset is compared with the size of the file before it is used, so that a hostile header
//! costs no more memory than its own size and ends in an error that says where.

mod checkpoint;
mod metadata;
mod reader;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

pub use checkpoint::GgufCheckpoint;
pub use metadata::{FromValue, Metadata, Numbers, Value};

use super::Stored;
use super::quant::Encoding;
use crate::Result;
use metadata::MAX_NAME_BYTES;
use reader::Reader;

/// The first four bytes.
pub const MAGIC: [u8; 4] = *b"GGUF";

/// Alignment of tensor data where `general.alignment` does not say.
const DEFAULT_ALIGNMENT: u64 = 32;

/// More than any writer uses; keeps sums of offsets far from overflow.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// Dimensions of a tensor, by ggml's own limit.
const MAX_DIMENSIONS: u32 = 4;

/// An open GGUF file whose header has been checked against the file's size.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    file: File,
    metadata: Metadata,
    entries: BTreeMap<String, Entry>,
}

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Outermost dimension first, as in Hugging Face checkpoints; the file has them the other way round.
    pub shape: Vec<usize>,
    /// Element type.
    pub stored: Stored,
    /// First byte, from the start of the file.
    pub offset: u64,
    /// Size in bytes.
    pub bytes: u64,
}

impl Gguf {
    /// Opens `path` and reads its header.
    pub fn open(path: &Path) -> Result<Gguf> {
        let (file, length) = super::open_regular(path)?;
        let mut reader = Reader::new(BufReader::with_capacity(1 << 18, &file), path, length);
        let (metadata, entries) = read_header(&mut reader, length)?;
        Ok(Gguf { path: path.to_path_buf(), file, metadata, entries })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The key-value pairs.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The tensors, by the name they have in the file.
    pub fn entries(&self) -> &BTreeMap<String, Entry> {
        &self.entries
    }

    /// The open file, for reading tensor data.
    pub(super) fn file(&self) -> &File {
        &self.file
    }
}

/// Reads everything up to the tensor data of a file of `length` bytes.
fn read_header<R: Read>(reader: &mut Reader<'_, R>, length: u64) -> Result<(Metadata, BTreeMap<String, Entry>)> {
    let magic = reader.bytes(4, "the magic number")?;
    if magic != MAGIC {
        return Err(reader.invalid(format!("not a GGUF file: it starts with {magic:02x?}, not with \"GGUF\"")));
    }
    match reader.u32("the version")? {
        2 | 3 => {}
        version if version & 0xffff == 0 => {
            return Err(reader.unsupported("this GGUF file is big-endian; only little-endian files are read"));
        }
        version => {
            return Err(reader.unsupported(format!("GGUF version {version}; versions 2 and 3 are read")));
        }
    }
    let tensors = reader.u64("the number of tensors")?;
    let pairs = reader.u64("the number of metadata pairs")?;
    // The shortest pair is an empty key, a type and one byte; the shortest tensor an empty name, a count of
    // dimensions, one dimension, a type and an offset.
    for (count, least, what) in [(pairs, 8 + 4 + 1, "metadata pairs"), (tensors, 8 + 4 + 8 + 4 + 8, "tensors")] {
        if count.checked_mul(least).is_none_or(|bytes| bytes > reader.remaining()) {
            return Err(reader.invalid(format!(
                "the header claims {count} {what}, which cannot fit into the {} bytes that follow",
                reader.remaining()
            )));
        }
    }

    let metadata = Metadata::read(reader, pairs)?;
    let alignment = metadata.get::<u64>("general.alignment")?.unwrap_or(DEFAULT_ALIGNMENT);
    if !alignment.is_power_of_two() || alignment > MAX_ALIGNMENT {
        let message = format!("expected a power of two up to {MAX_ALIGNMENT}, found {alignment}");
        return Err(metadata.invalid("general.alignment", message));
    }

    let mut entries = BTreeMap::new();
    for _ in 0..tensors {
        let (name, entry) = read_entry(reader, alignment)?;
        if entries.contains_key(&name) {
            return Err(reader.invalid(format!("tensor {name:?} occurs twice")));
        }
        entries.insert(name, entry);
    }

    let start = reader.position().next_multiple_of(alignment);
    for (name, entry) in &mut entries {
        // `offset + start` cannot overflow: `start` is within an alignment of the file's length.
        let end = entry.offset.checked_add(start).and_then(|offset| offset.checked_add(entry.bytes));
        if end.is_none_or(|end| end > length) {
            return Err(reader.invalid(format!(
                "tensor {name:?} lies outside the file: {} bytes at offset {} of the data, which starts at byte {start} \
                 of {length}; is the file truncated?",
                entry.bytes, entry.offset
            )));
        }
        entry.offset += start;
    }
    super::check_disjoint(reader.file(), entries.iter().map(|(name, e)| (name.as_str(), e.offset, e.bytes)))?;
    Ok((metadata, entries))
}

fn read_entry<R: Read>(reader: &mut Reader<'_, R>, alignment: u64) -> Result<(String, Entry)> {
    let name = reader.string("a tensor name", MAX_NAME_BYTES)?;
    let count = reader.u32("a tensor description")?;
    if count == 0 || count > MAX_DIMENSIONS {
        return Err(reader.invalid(format!("tensor {name:?} has {count} dimensions; expected 1 to {MAX_DIMENSIONS}")));
    }
    let mut shape = Vec::new();
    for _ in 0..count {
        let dimension = reader.u64("a tensor description")?;
        match usize::try_from(dimension) {
            Ok(dimension @ 1..) => shape.push(dimension),
            _ => return Err(reader.invalid(format!("tensor {name:?} has a dimension of {dimension}"))),
        }
    }
    let number = reader.u32("a tensor description")?;
    let Some(encoding) = Encoding::from_ggml(number) else {
        return Err(reader.unsupported(format!(
            "tensor {name:?} has the ggml type {number}; supported are {}",
            Encoding::ggml_list()
        )));
    };
    let Some(bytes) = encoding.bytes(shape[0], &shape[1..]) else {
        return Err(reader.invalid(format!(
            "tensor {name:?} has the dimensions {shape:?}: too many elements, or a first dimension that is not a \
             multiple of {}, the block of {encoding}",
            encoding.block_elements()
        )));
    };
    shape.reverse();
    let offset = reader.u64("a tensor description")?;
    if !offset.is_multiple_of(alignment) {
        return Err(reader.invalid(format!("tensor {name:?} has the offset {offset}, not a multiple of {alignment}")));
    }
    Ok((name, Entry { shape, stored: Stored::Known(encoding), offset, bytes }))
}
