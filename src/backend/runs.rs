//! Where one layer of one sequence keeps its keys and values, as attention reads them.

use super::{Buffer, DType, Place};

/// Where one layer of one sequence keeps its keys and values: extents of [`KvRuns::extent_tokens`] tokens, in each of
/// which every KV head of the layer has one contiguous run of rows, K then V of a token side by side.
#[derive(Clone, Copy, Debug)]
pub struct KvRuns<'a> {
    extents: &'a [Buffer],
    geometry: KvGeometry,
    offset: usize,
}

/// As [`KvRuns`], for writing.
#[derive(Debug)]
pub struct KvRunsMut<'a> {
    extents: &'a mut [Buffer],
    geometry: KvGeometry,
    offset: usize,
}

/// The shape of an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvGeometry {
    /// Layers whose runs an extent holds.
    pub layers: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Head dimension.
    pub head_dim: usize,
    /// Tokens of a run.
    pub extent_tokens: usize,
    /// Element type of keys and values: f32, f16 or bf16.
    pub dtype: DType,
}

impl KvGeometry {
    /// Bytes of one token of one head: its key, then its value.
    pub const fn row_bytes(&self) -> usize {
        2 * self.head_dim * self.dtype.bytes()
    }

    /// Bytes of one run: one head of one layer in one extent.
    pub const fn run_bytes(&self) -> usize {
        self.extent_tokens * self.row_bytes()
    }

    /// Bytes of one extent, all layers and heads.
    pub const fn extent_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.run_bytes()
    }

    /// Extents that hold `tokens` tokens.
    pub const fn extents(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.extent_tokens)
    }
}

impl<'a> KvRuns<'a> {
    /// The runs of `layer` in `extents`, each of which is `geometry.extent_bytes()` long.
    pub fn new(extents: &'a [Buffer], geometry: KvGeometry, layer: usize) -> KvRuns<'a> {
        check_extents(extents, &geometry, layer);
        KvRuns { extents, geometry, offset: layer * geometry.kv_heads * geometry.run_bytes() }
    }

    /// The extents' shape.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
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

    /// Address of the run of `head` in extent `extent`.
    pub fn run(&self, extent: usize, head: usize) -> *const u8 {
        assert!(head < self.geometry.kv_heads);
        // SAFETY: `check_extents` saw that every extent holds all runs of all layers, and `head` is below their number.
        unsafe { self.extents[extent].address().add(self.offset + head * self.geometry.run_bytes()) }
    }
}

impl<'a> KvRunsMut<'a> {
    /// As [`KvRuns::new`].
    pub fn new(extents: &'a mut [Buffer], geometry: KvGeometry, layer: usize) -> KvRunsMut<'a> {
        check_extents(extents, &geometry, layer);
        KvRunsMut { extents, geometry, offset: layer * geometry.kv_heads * geometry.run_bytes() }
    }

    /// The extents' shape.
    pub fn geometry(&self) -> &KvGeometry {
        &self.geometry
    }

    /// Tokens that fit the extents.
    pub fn capacity(&self) -> usize {
        self.extents.len() * self.geometry.extent_tokens
    }

    /// Number of extents.
    pub fn extents(&self) -> usize {
        self.extents.len()
    }

    /// The same runs, for reading.
    pub fn runs(&self) -> KvRuns<'_> {
        KvRuns { extents: self.extents, geometry: self.geometry, offset: self.offset }
    }

    /// Address of extent `extent`.
    pub fn extent_mut(&mut self, extent: usize) -> *mut u8 {
        self.extents[extent].address_mut()
    }

    /// Bytes from an extent's start to the layer's first run.
    pub fn layer_offset(&self) -> usize {
        self.offset
    }

    /// Address of the run of `head` in extent `extent`.
    pub fn run_mut(&mut self, extent: usize, head: usize) -> *mut u8 {
        assert!(head < self.geometry.kv_heads);
        // SAFETY: as in `KvRuns::run`.
        unsafe { self.extents[extent].address_mut().add(self.offset + head * self.geometry.run_bytes()) }
    }
}

fn check_extents(extents: &[Buffer], geometry: &KvGeometry, layer: usize) {
    assert!(layer < geometry.layers, "layer {layer} of {}", geometry.layers);
    assert!(extents.iter().all(|e| e.bytes() >= geometry.extent_bytes()), "an extent is too short");
}

/// One row of a gather.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// KV head.
    pub head: u32,
    /// Row of that head's run to read.
    pub from: u32,
    /// Row of that head's run in the target to write.
    pub to: u32,
}

impl Move {
    /// The first `rows` rows of every head, each to its own place: head by head, ascending.
    pub fn whole(heads: usize, rows: usize) -> impl Iterator<Item = Move> {
        let of_head = move |head| (0..rows as u32).map(move |row| Move { head, from: row, to: row });
        (0..heads as u32).flat_map(of_head)
    }
}
