//! Partial keys: heads through the maps that make them, and their quantized rows into an index.

use super::block::{bytes_of, plain};
use super::kernels::{Kernel, Module};
use super::queue::Queue;
use super::{Shared, address};
use crate::Result;
use crate::backend::{HeadMaps, IndexBits, IndexGeometry, IndexRunsMut, Rows, RowsMut};

plain! {
    /// How a run holds rows (`kernels/index.cuh`).
    pub(super) struct Layout {
        layer_offset: u64,
        run_bytes: u64,
        extent_tokens: u32,
        columns: u32,
        words: u32,
        bits: u32,
    }

    struct Place {
        extents: u64,
        rows: u64,
        first: u32,
        unused: u32,
    }

    struct Append {
        keys: u64,
        place: u64,
        stride: u64,
        layout: Layout,
        kv_heads: u32,
        count: u32,
    }

    struct Project {
        x: u64,
        maps: u64,
        out: u64,
        x_stride: u64,
        out_stride: u64,
        rows: u32,
        group: u32,
        inputs: u32,
        outputs: u32,
        tiles: u32,
        unused: u32,
    }
}

/// Dot products from which on a warp of [`project_heads`] takes sixteen of them.
const MANY_PRODUCTS: usize = 1 << 16;

/// Asserts what the kernels stand on: whole tiles of 32 tokens, and runs that are aligned like their extents.
pub(super) fn assert_index(geometry: &IndexGeometry) {
    assert!(geometry.kv_heads > 0 && geometry.columns > 0 && geometry.extent_tokens > 0);
    assert!(geometry.extent_tokens.is_multiple_of(64), "{} tokens are not whole tiles", geometry.extent_tokens);
}

/// Bits of a column, as the kernels have them.
pub(super) fn bits(geometry: &IndexGeometry) -> usize {
    match geometry.bits {
        IndexBits::Four => 4,
        IndexBits::Eight => 8,
        IndexBits::Full => 32,
    }
}

/// How the runs of a layer hold rows, as the kernels have it.
pub(super) fn layout(geometry: &IndexGeometry, layer_offset: usize) -> Layout {
    Layout {
        layer_offset: layer_offset as u64,
        run_bytes: geometry.run_bytes() as u64,
        extent_tokens: geometry.extent_tokens as u32,
        columns: geometry.columns as u32,
        words: (geometry.row_bytes() / 4) as u32,
        bits: bits(geometry) as u32,
    }
}

/// Addresses of a sequence's extents; zeros behind them, so that the table's length changes rarely.
pub(super) fn extent_table(extents: impl Iterator<Item = *const u8>) -> Vec<u64> {
    let mut table: Vec<u64> = extents.map(address).collect();
    table.resize(table.len().next_power_of_two().max(16), 0);
    table
}

/// See `Backend::index_append`.
pub(super) fn append(
    shared: &Shared,
    queue: &mut Queue,
    keys: Rows<'_>,
    runs: &IndexRunsMut<'_>,
    first: usize,
) -> Result<()> {
    store(shared, queue, keys, runs, first, None)
}

/// See `Backend::index_store_rows`.
pub(super) fn store_rows(
    shared: &Shared,
    queue: &mut Queue,
    keys: Rows<'_>,
    runs: &IndexRunsMut<'_>,
    rows: &[u32],
) -> Result<()> {
    store(shared, queue, keys, runs, 0, Some(rows))
}

/// Rows of keys into the rows from `first` on, or one row of keys into `rows`.
fn store(
    shared: &Shared,
    queue: &mut Queue,
    keys: Rows<'_>,
    runs: &IndexRunsMut<'_>,
    first: usize,
    rows: Option<&[u32]>,
) -> Result<()> {
    let geometry = *runs.geometry();
    let table = extent_table((0..runs.extents()).map(|i| runs.extent(i)));
    queue.reserve(8 * table.len() + 4 * geometry.kv_heads + size_of::<Place>(), 3)?;
    let place = Place {
        extents: queue.block.push_table(bytes_of(&table)),
        rows: rows.map_or(0, |rows| queue.block.push(bytes_of(rows))),
        first: first as u32,
        unused: 0,
    };
    let count = keys.rows() * geometry.kv_heads;
    let params = Append {
        keys: address(keys.base()),
        place: queue.block.push(bytes_of(&[place])),
        stride: keys.stride() as u64,
        layout: layout(&geometry, runs.layer_offset()),
        kv_heads: geometry.kv_heads as u32,
        count: count as u32,
    };
    let warps = 4;
    let kernel = Kernel::new(Module::Index, "index_append");
    queue.push(shared, kernel, [count.div_ceil(warps), 1, 1], 32 * warps, &params)
}

/// See `Backend::project_heads`.
pub(super) fn project_heads(
    shared: &Shared,
    queue: &mut Queue,
    x: Rows<'_>,
    maps: &HeadMaps,
    out: &RowsMut<'_>,
) -> Result<()> {
    let group = x.cols() / maps.inputs / maps.kv_heads;
    let rows = x.rows() * group;
    let map = maps.map(0);
    let aligned = |address: u64, stride: usize| address.is_multiple_of(16) && stride.is_multiple_of(4);
    let vectors = aligned(address(x.base()), x.stride()) && aligned(address(map.base()), maps.inputs);
    let many = rows * maps.kv_heads * maps.outputs >= MANY_PRODUCTS;
    // Rows and outputs of a warp; four warps of a block lie side by side.
    let side = if many { 4 } else { 1 };
    let name = match (vectors, many) {
        (true, false) => "project_heads_4_1x1",
        (true, true) => "project_heads_4_4x4",
        (false, false) => "project_heads_1_1x1",
        (false, true) => "project_heads_1_4x4",
    };
    let tiles = maps.outputs.div_ceil(4 * side);
    let params = Project {
        x: address(x.base()),
        maps: address(map.base()),
        out: address(out.base()),
        x_stride: x.stride() as u64,
        out_stride: out.stride() as u64,
        rows: rows as u32,
        group: group as u32,
        inputs: maps.inputs as u32,
        outputs: maps.outputs as u32,
        tiles: tiles as u32,
        unused: 0,
    };
    let kernel = Kernel::new(Module::ProjectHeads, name);
    queue.push(shared, kernel, [rows.div_ceil(side) * tiles, maps.kv_heads, 1], 128, &params)
}
