//! How entries are stored where attention does not read them: as on the device, or quantized.

use super::{DType, KvGeometry};

/// How entries are stored away from the device.
///
/// A stored row is a key and its value, vector behind vector:
/// - `Exact`: both as on the device;
/// - `Int8`: two scales (f32), then the key's codes, then the value's, one signed byte each; value = code · scale;
/// - `Int4`: for the key and then for the value: scale and minimum (f16) of every group of 64 dimensions, then the codes,
///   group behind group. Byte j of a group of n holds dimension j in its low half and dimension j + ⌈n/2⌉ in its high
///   one; value = code · scale + minimum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Payload {
    /// As on the device.
    #[default]
    Exact,
    /// 8 bits a value, symmetric, with a scale for each key and each value vector.
    Int8,
    /// 4 bits a value, asymmetric, in groups of 64 (FlexGen's compression).
    Int4,
}

impl Payload {
    /// Dimensions of a group of [`Payload::Int4`]; a vector's last group may be shorter.
    pub const GROUP: usize = 64;

    /// Bytes of one key or value vector of `head_dim` dimensions that is `dtype` on the device.
    pub const fn vector_bytes(self, head_dim: usize, dtype: DType) -> usize {
        match self {
            Payload::Exact => head_dim * dtype.bytes(),
            Payload::Int8 => 4 + head_dim,
            Payload::Int4 => {
                let (groups, last) = (head_dim / Payload::GROUP, head_dim % Payload::GROUP);
                let head = 4 * head_dim.div_ceil(Payload::GROUP);
                head + groups * (Payload::GROUP / 2) + last.div_ceil(2)
            }
        }
    }

    /// Bytes of one stored row: a key and its value.
    pub const fn row_bytes(self, geometry: &KvGeometry) -> usize {
        2 * self.vector_bytes(geometry.head_dim, geometry.dtype)
    }
}

/// Where a stored row lies: `row_bytes` bytes from `offset` on, at any alignment, in the `buffer`-th of the buffers that
/// an operation is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Which buffer.
    pub buffer: usize,
    /// Byte of the buffer.
    pub offset: usize,
}

/// A stored row, and where it is to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Landing {
    /// The row as stored.
    pub from: Slot,
    /// KV head.
    pub head: u32,
    /// Row of that head's run in the target.
    pub to: u32,
}
