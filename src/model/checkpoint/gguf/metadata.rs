//! The key-value part of a GGUF file, and reading it without believing it.
//!
//! A GGUF header is a list of typed values under dotted names (`llama.block_count`, `tokenizer.ggml.tokens`). Whoever
//! needs one asks for it by the Rust type it should have:
//!
//! ```ignore
//! let layers: u64 = metadata.require("llama.block_count")?;
//! let tokens: &[String] = metadata.require("tokenizer.ggml.tokens")?;
//! let scores: Option<Vec<f32>> = metadata.get("tokenizer.ggml.scores")?;
//! ```
//!
//! A missing key or one of another type is an error that names the file and the key. Integers convert between widths
//! where the value fits; nothing else converts.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use super::reader::Reader;
use crate::{Error, Result};

/// Longest name of a key or tensor: the specification's own limit for keys.
pub(super) const MAX_NAME_BYTES: u64 = 65_535;

/// How deep arrays may nest. Writers in use never nest at all.
const MAX_DEPTH: usize = 4;

/// All key-value pairs of one file.
#[derive(Clone, Debug)]
pub struct Metadata {
    file: PathBuf,
    values: BTreeMap<String, Value>,
}

/// One value, at the width it has in the file.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any of the unsigned types.
    Unsigned(u64),
    /// Any of the signed types.
    Signed(i64),
    /// `float32`.
    F32(f32),
    /// `float64`.
    F64(f64),
    /// `bool`.
    Bool(bool),
    /// `string`.
    String(String),
    /// An array of strings.
    Strings(Vec<String>),
    /// An array of a fixed-width type, as it stands in the file, so that it takes no more memory than there.
    Numbers(Numbers),
    /// An array of arrays.
    Arrays(Vec<Value>),
}

/// An array of fixed-width values.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers {
    kind: Kind,
    bytes: Vec<u8>,
}

/// The value types of the format, by their number in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_number(number: u32) -> Option<Kind> {
        use Kind::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64].get(number as usize).copied()
    }

    /// Bytes of a value in the file; for strings and arrays, of the shortest one there can be.
    const fn bytes(self) -> usize {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 | Kind::String => 8,
            Kind::Array => 12,
        }
    }

    /// The value that `bytes`, of this kind's width, stand for.
    fn decode(self, bytes: &[u8]) -> Value {
        let mut wide = [0; 8];
        wide[..bytes.len()].copy_from_slice(bytes);
        let unsigned = u64::from_le_bytes(wide);
        match self {
            Kind::U8 | Kind::U16 | Kind::U32 | Kind::U64 => Value::Unsigned(unsigned),
            Kind::I8 => Value::Signed(unsigned as i8 as i64),
            Kind::I16 => Value::Signed(unsigned as i16 as i64),
            Kind::I32 => Value::Signed(unsigned as i32 as i64),
            Kind::I64 => Value::Signed(unsigned as i64),
            Kind::F32 => Value::F32(f32::from_bits(unsigned as u32)),
            Kind::F64 => Value::F64(f64::from_bits(unsigned)),
            Kind::Bool => Value::Bool(unsigned != 0),
            Kind::String | Kind::Array => unreachable!("only fixed-width kinds are decoded"),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::U8 => "uint8",
            Kind::I8 => "int8",
            Kind::U16 => "uint16",
            Kind::I16 => "int16",
            Kind::U32 => "uint32",
            Kind::I32 => "int32",
            Kind::F32 => "float32",
            Kind::Bool => "bool",
            Kind::String => "string",
            Kind::Array => "array",
            Kind::U64 => "uint64",
            Kind::I64 => "int64",
            Kind::F64 => "float64",
        })
    }
}

impl Numbers {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.kind.bytes()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// The elements.
    pub fn iter(&self) -> impl Iterator<Item = Value> + '_ {
        self.bytes.chunks_exact(self.kind.bytes()).map(|bytes| self.kind.decode(bytes))
    }
}

impl Value {
    /// What it is, for messages.
    fn describe(&self) -> String {
        match self {
            Value::Unsigned(_) => "an unsigned integer".into(),
            Value::Signed(_) => "a signed integer".into(),
            Value::F32(_) => "a float32".into(),
            Value::F64(_) => "a float64".into(),
            Value::Bool(_) => "a bool".into(),
            Value::String(_) => "a string".into(),
            Value::Strings(strings) => format!("an array of {} strings", strings.len()),
            Value::Numbers(numbers) => format!("an array of {} values of type {}", numbers.len(), numbers.kind),
            Value::Arrays(arrays) => format!("an array of {} arrays", arrays.len()),
        }
    }
}

impl Metadata {
    /// Reads `count` pairs.
    pub(super) fn read<R: Read>(reader: &mut Reader<'_, R>, count: u64) -> Result<Metadata> {
        let mut values = BTreeMap::new();
        for _ in 0..count {
            let key = reader.string("a metadata key", MAX_NAME_BYTES)?;
            let kind = read_kind(reader, &key)?;
            let value = read_value(reader, kind, &key, 0)?;
            if values.insert(key.clone(), value).is_some() {
                return Err(reader.invalid(format!("metadata key {key:?} occurs twice")));
            }
        }
        Ok(Metadata { file: reader.file().to_path_buf(), values })
    }

    /// The file it came from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The value under `key` as a `T`, `None` where the key is absent, an error where it is of another type.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        match T::from_value(value) {
            Some(converted) => Ok(Some(converted)),
            None => Err(self.invalid(key, format!("expected {}, found {}", T::EXPECTED, value.describe()))),
        }
    }

    /// As [`Metadata::get`], where the key must be there.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.get(key)?.ok_or_else(|| {
            Error::invalid_format(&self.file, format!("metadata key {key:?} is missing; expected {}", T::EXPECTED))
        })
    }

    /// An error about the value of `key`.
    pub fn invalid(&self, key: &str, message: impl fmt::Display) -> Error {
        Error::invalid_format(&self.file, format!("metadata key {key:?}: {message}"))
    }

    /// Whether there is such a key.
    pub fn contains(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// All pairs, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.values.iter().map(|(key, value)| (key.as_str(), value))
    }
}

fn read_kind<R: Read>(reader: &mut Reader<'_, R>, key: &str) -> Result<Kind> {
    let number = reader.u32("a value type")?;
    Kind::from_number(number).ok_or_else(|| {
        reader.invalid(format!("metadata key {key:?} has the unknown value type {number}; types are 0 to 12"))
    })
}

fn read_value<R: Read>(reader: &mut Reader<'_, R>, kind: Kind, key: &str, depth: usize) -> Result<Value> {
    match kind {
        Kind::String => {
            let limit = reader.remaining();
            Ok(Value::String(reader.string(&format!("metadata key {key:?}"), limit)?))
        }
        Kind::Array => read_array(reader, key, depth + 1),
        fixed => {
            let bytes = reader.bytes(fixed.bytes() as u64, &format!("metadata key {key:?}"))?;
            if fixed == Kind::Bool && bytes[0] > 1 {
                return Err(reader.invalid(format!("metadata key {key:?} is a bool of value {}", bytes[0])));
            }
            Ok(fixed.decode(&bytes))
        }
    }
}

fn read_array<R: Read>(reader: &mut Reader<'_, R>, key: &str, depth: usize) -> Result<Value> {
    if depth > MAX_DEPTH {
        return Err(reader.invalid(format!("metadata key {key:?} nests arrays deeper than {MAX_DEPTH}")));
    }
    let kind = read_kind(reader, key)?;
    let count = reader.u64("an array length")?;
    let what = format!("metadata key {key:?}, an array of {count} values of type {kind}");
    // Every element takes at least `kind.bytes()` of what is left of the file, so a count can be refused here before
    // anything is reserved for it.
    let bytes = count.checked_mul(kind.bytes() as u64).filter(|&bytes| bytes <= reader.remaining());
    let Some(bytes) = bytes else {
        return Err(reader.invalid(format!("{what}, goes past the end of the file")));
    };
    match kind {
        Kind::String => {
            let mut strings = Vec::new();
            for _ in 0..count {
                let limit = reader.remaining();
                strings.push(reader.string(&what, limit)?);
            }
            Ok(Value::Strings(strings))
        }
        Kind::Array => {
            let mut arrays = Vec::new();
            for _ in 0..count {
                arrays.push(read_array(reader, key, depth + 1)?);
            }
            Ok(Value::Arrays(arrays))
        }
        fixed => Ok(Value::Numbers(Numbers { kind: fixed, bytes: reader.bytes(bytes, &what)? })),
    }
}

/// Rust types that a [`Value`] can be read as.
pub trait FromValue<'a>: Sized {
    /// The type, for messages: "a string".
    const EXPECTED: &'static str;

    /// The value, if it is of this type.
    fn from_value(value: &'a Value) -> Option<Self>;
}

impl FromValue<'_> for u64 {
    const EXPECTED: &'static str = "a non-negative integer";

    fn from_value(value: &Value) -> Option<u64> {
        match *value {
            Value::Unsigned(value) => Some(value),
            Value::Signed(value) => value.try_into().ok(),
            _ => None,
        }
    }
}

impl FromValue<'_> for u32 {
    const EXPECTED: &'static str = "a non-negative integer below 2^32";

    fn from_value(value: &Value) -> Option<u32> {
        u64::from_value(value)?.try_into().ok()
    }
}

impl FromValue<'_> for i64 {
    const EXPECTED: &'static str = "an integer";

    fn from_value(value: &Value) -> Option<i64> {
        match *value {
            Value::Unsigned(value) => value.try_into().ok(),
            Value::Signed(value) => Some(value),
            _ => None,
        }
    }
}

impl FromValue<'_> for f64 {
    const EXPECTED: &'static str = "a float";

    fn from_value(value: &Value) -> Option<f64> {
        match *value {
            Value::F32(value) => Some(value.into()),
            Value::F64(value) => Some(value),
            _ => None,
        }
    }
}

impl FromValue<'_> for f32 {
    const EXPECTED: &'static str = "a float";

    fn from_value(value: &Value) -> Option<f32> {
        f64::from_value(value).map(|value| value as f32)
    }
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "a bool";

    fn from_value(value: &Value) -> Option<bool> {
        match *value {
            Value::Bool(value) => Some(value),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "a string";

    fn from_value(value: &'a Value) -> Option<&'a str> {
        match value {
            Value::String(value) => Some(value),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a [String] {
    const EXPECTED: &'static str = "an array of strings";

    fn from_value(value: &'a Value) -> Option<&'a [String]> {
        match value {
            Value::Strings(values) => Some(values),
            _ => None,
        }
    }
}

macro_rules! from_numbers {
    ($($element:ty: $expected:literal),*) => {$(
        impl FromValue<'_> for Vec<$element> {
            const EXPECTED: &'static str = $expected;

            fn from_value(value: &Value) -> Option<Vec<$element>> {
                match value {
                    Value::Numbers(numbers) => numbers.iter().map(|value| <$element>::from_value(&value)).collect(),
                    _ => None,
                }
            }
        }
    )*};
}

from_numbers! {
    u64: "an array of non-negative integers",
    u32: "an array of non-negative integers below 2^32",
    i64: "an array of integers",
    f32: "an array of floats",
    bool: "an array of bools"
}
