//! How entries are stored where attention does not read them: as on the device, or quantized.

use super::{Buffer, DType, KvGeometry, Place};

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

/// Where one layer of one sequence lies as a payload has it: as [`KvRuns`](super::KvRuns), with rows of the payload's
/// length. An extent holds layer after layer, head after head, row after row.
#[derive(Clone, Copy, Debug)]
pub struct StoredRuns<'a> {
    extents: &'a [Buffer],
    geometry: KvGeometry,
    payload: Payload,
    offset: usize,
}

impl<'a> StoredRuns<'a> {
    /// The runs of `layer` in `extents`, each of which holds all of `geometry`'s layers.
    pub fn new(extents: &'a [Buffer], geometry: KvGeometry, payload: Payload, layer: usize) -> StoredRuns<'a> {
        let layer_bytes = geometry.kv_heads * geometry.extent_tokens * payload.row_bytes(&geometry);
        assert!(layer < geometry.layers, "layer {layer} of {}", geometry.layers);
        assert!(extents.iter().all(|e| e.bytes() >= geometry.layers * layer_bytes), "an extent is too short");
        StoredRuns { extents, geometry, payload, offset: layer * layer_bytes }
    }

    /// The shape of the extents, with the device's element type.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// How rows are stored.
    pub fn payload(&self) -> Payload {
        self.payload
    }

    /// Bytes of a stored row.
    pub fn row_bytes(&self) -> usize {
        self.payload.row_bytes(&self.geometry)
    }

    /// Bytes of one run: one head of one layer in one extent.
    pub fn run_bytes(&self) -> usize {
        self.geometry.extent_tokens * self.row_bytes()
    }

    /// Tokens that fit the extents.
    pub fn capacity(&self) -> usize {
        self.extents.len() * self.geometry.extent_tokens
    }

    /// Number of extents.
    pub fn extents(&self) -> usize {
        self.extents.len()
    }

    /// Address of extent `extent`.
    pub fn extent(&self, extent: usize) -> *const u8 {
        self.extents[extent].address()
    }

    /// Where the extents are.
    pub fn place(&self) -> Place {
        self.extents.first().map_or(Place::Device, Buffer::place)
    }

    /// Bytes from an extent's start to the layer's first run.
    pub fn layer_offset(&self) -> usize {
        self.offset
    }

    /// The extents, as the buffers of [`StoredRuns::slot`].
    pub fn buffers(&self) -> &'a [Buffer] {
        self.extents
    }

    /// Where a row of a head's runs lies.
    pub fn slot(&self, head: usize, row: usize) -> Slot {
        let tokens = self.geometry.extent_tokens;
        let offset = self.offset + head * self.run_bytes() + row % tokens * self.row_bytes();
        Slot { buffer: row / tokens, offset }
    }

    /// Address of the run of `head` in extent `extent`.
    pub fn run(&self, extent: usize, head: usize) -> *const u8 {
        assert!(head < self.geometry.kv_heads);
        // SAFETY: `new` saw that every extent holds all runs of all layers, and `head` is below their number.
        unsafe { self.extents[extent].address().add(self.offset + head * self.run_bytes()) }
    }
}

/// As [`StoredRuns`], for writing.
#[derive(Debug)]
pub struct StoredRunsMut<'a> {
    extents: &'a mut [Buffer],
    geometry: KvGeometry,
    payload: Payload,
    layer: usize,
}

impl<'a> StoredRunsMut<'a> {
    /// As [`StoredRuns::new`].
    pub fn new(extents: &'a mut [Buffer], geometry: KvGeometry, payload: Payload, layer: usize) -> StoredRunsMut<'a> {
        StoredRuns::new(extents, geometry, payload, layer);
        StoredRunsMut { extents, geometry, payload, layer }
    }

    /// The same runs, for reading.
    pub fn runs(&self) -> StoredRuns<'_> {
        StoredRuns::new(self.extents, self.geometry, self.payload, self.layer)
    }

    /// The extents, as the buffers of [`StoredRuns::slot`].
    pub fn buffers_mut(&mut self) -> &mut [Buffer] {
        self.extents
    }
}
