//! One safetensors file.
//!
//! ```text
//! header length: u64, header: JSON { name: { dtype, shape, data_offsets: [from, to] }, "__metadata__": {…} }, data
//! ```
//!
//! The element types and the form of a header entry are the `safetensors` crate's; what the format promises about the
//! entries together is checked here, so that the errors can name file and tensor, and so that only the header is read.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ::safetensors::Dtype;
use ::safetensors::tensor::TensorInfo;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use super::mapping::Mapping;
use super::quant::Encoding;
use super::{RowOrder, Stored, TensorRef};
use crate::{Error, Result};

/// Longest header, by the reference implementation's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open file whose header has been checked against the file's size.
#[derive(Debug)]
pub struct Safetensors {
    path: PathBuf,
    file: File,
    mapping: Mapping,
    entries: BTreeMap<String, Entry>,
}

/// Where a tensor lies and what it is.
#[derive(Debug)]
struct Entry {
    shape: Vec<usize>,
    stored: Stored,
    offset: u64,
    bytes: u64,
}

impl Safetensors {
    /// Opens `path` and reads its header.
    pub fn open(path: &Path) -> Result<Safetensors> {
        let (file, length) = super::open_regular(path)?;
        let invalid = |message: String| Error::invalid_format(path, message);
        let read = |target: &mut [u8], at| {
            file.read_exact_at(target, at).map_err(|error| Error::io(path, "read its header", &error))
        };
        if length < 8 {
            return Err(invalid(format!("it has {length} bytes, too few for a safetensors file")));
        }
        let mut prefix = [0; 8];
        read(&mut prefix, 0)?;
        let header = u64::from_le_bytes(prefix);
        if header > MAX_HEADER_BYTES || header > length - 8 {
            return Err(invalid(format!(
                "the header claims {header} bytes; {} follow in the file, and {MAX_HEADER_BYTES} are the limit",
                length - 8
            )));
        }
        let mut text = vec![0; header as usize];
        read(&mut text, 8)?;
        let infos = parse_header(&text).map_err(|error| invalid(format!("not a valid safetensors header: {error}")))?;

        let start = 8 + header;
        let mut entries = BTreeMap::new();
        for (name, info) in infos {
            let entry =
                check(&info, start, length).map_err(|message| invalid(format!("tensor {name:?}: {message}")))?;
            entries.insert(name, entry);
        }
        super::check_disjoint(path, entries.iter().map(|(name, e)| (name.as_str(), e.offset, e.bytes)))?;
        // Disjoint and inside, so the sum cannot overflow, and a sum that is too small means bytes of no tensor.
        let held: u64 = entries.values().map(|entry| entry.bytes).sum();
        if held != length - start {
            return Err(invalid(format!(
                "{} bytes follow the header, but the tensors have {held}; is the file damaged?",
                length - start
            )));
        }
        Ok(Safetensors { path: path.to_path_buf(), file, mapping: Mapping::default(), entries })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The names of the tensors.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        let (name, entry) = self.entries.get_key_value(name)?;
        Some(TensorRef {
            file: &self.path,
            name,
            shape: &entry.shape,
            stored: &entry.stored,
            order: RowOrder::Halves,
            source: &self.file,
            mapping: Some(&self.mapping),
            offset: entry.offset,
            bytes: entry.bytes,
        })
    }
}

/// Checks one header entry by itself: data start at byte `start` of a file of `length` bytes.
fn check(info: &TensorInfo, start: u64, length: u64) -> std::result::Result<Entry, String> {
    let (from, to) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
    let available = length - start;
    if from > to || to > available {
        return Err(format!("data offsets {from} to {to} lie outside the {available} bytes after the header"));
    }
    let elements = info.shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n));
    let bits = elements.and_then(|elements| elements.checked_mul(info.dtype.bitsize()));
    if bits.is_none_or(|bits| bits.div_ceil(8) as u64 != to - from) {
        return Err(format!(
            "{:?} of shape {:?} does not have the {} bytes of its offsets",
            info.dtype,
            info.shape,
            to - from
        ));
    }
    let stored = match info.dtype {
        Dtype::F32 => Stored::Known(Encoding::F32),
        Dtype::F16 => Stored::Known(Encoding::F16),
        Dtype::BF16 => Stored::Known(Encoding::BF16),
        other => Stored::Other(format!("{other:?}")),
    };
    Ok(Entry { shape: info.shape.clone(), stored, offset: start + from, bytes: to - from })
}

/// The tensors of a header, in its order; an error where a name occurs twice, which a map would hide.
fn parse_header(text: &[u8]) -> serde_json::Result<BTreeMap<String, TensorInfo>> {
    struct Header;

    impl<'de> Visitor<'de> for Header {
        type Value = BTreeMap<String, TensorInfo>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of tensors by name")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Self::Value, A::Error> {
            let mut infos = BTreeMap::new();
            while let Some(name) = map.next_key::<String>()? {
                if name == "__metadata__" {
                    map.next_value::<IgnoredAny>()?;
                    continue;
                }
                let info = map.next_value()?;
                if infos.insert(name.clone(), info).is_some() {
                    return Err(serde::de::Error::custom(format!("tensor {name:?} occurs twice")));
                }
            }
            Ok(infos)
        }
    }

    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let infos = deserializer.deserialize_map(Header)?;
    // Writers pad the header with spaces; nothing else may follow.
    deserializer.end()?;
    Ok(infos)
}
