//! A full pool whose rows the device gives away: what the kernels know of it, and a call that is undone.

use super::block::{bytes_of, plain};
use super::index::{self, Layout, extent_table};
use super::kernels::{Kernel, Module};
use super::queue::Queue;
use super::{Shared, address};
use crate::Result;
use crate::backend::{Buffer, Lost, PoolGeometry, PoolMut};

plain! {
    pub(super) struct Pool {
        pub(super) tables: u64,
        lost: u64,
        lost_stride: u64,
        pub(super) room: u32,
        rows: u32,
        capacity: u32,
        rule: u32,
        token: u32,
        full: u32,
        begun: u32,
        unused: u32,
    }

    struct Copy {
        from: u64,
        to: u64,
        words: u64,
    }

    struct TakeBack {
        pool: Pool,
        store: u64,
        index: u64,
        layout: Layout,
        store_offset: u64,
        store_run_bytes: u64,
        extent_tokens: u32,
        stored_bytes: u32,
    }
}

/// Threads of a block, and most blocks of a copy.
const THREADS: usize = 512;
const COPY_BLOCKS: usize = 256;

/// Asserts what the kernels stand on.
pub(super) fn assert_pool(tables: &Buffer, lost: &Buffer, geometry: &PoolGeometry, layer: usize) {
    assert!(layer < geometry.layers && tables.bytes() >= geometry.bytes(), "a pool that is too short");
    assert!(lost.bytes() >= geometry.lost_bytes(), "no room for what is lost");
}

/// What the kernels know of a layer's pool; zeros where there is none.
pub(super) fn pool_of(pool: Option<&PoolMut<'_>>, layer: usize) -> Pool {
    let Some(pool) = pool else {
        return Pool {
            tables: 0,
            lost: 0,
            lost_stride: 0,
            room: 0,
            rows: 0,
            capacity: 0,
            rule: 0,
            token: 0,
            full: 0,
            begun: 0,
            unused: 0,
        };
    };
    Pool {
        rows: pool.rows as u32,
        rule: pool.rule as u32,
        token: pool.token as u32,
        full: u32::from(pool.full),
        ..at_rest(pool.tables, pool.lost, &pool.geometry, layer, pool.begun)
    }
}

/// A pool that nothing is put into.
fn at_rest(tables: &Buffer, lost: &Buffer, g: &PoolGeometry, layer: usize, begun: usize) -> Pool {
    let first = layer * g.kv_heads;
    Pool {
        tables: address(tables.address()) + 4 * g.header_at(first) as u64,
        lost: address(lost.address()) + (first * g.lost_stride()) as u64,
        lost_stride: g.lost_stride() as u64,
        room: g.rows as u32,
        capacity: g.lost as u32,
        begun: begun as u32,
        ..pool_of(None, layer)
    }
}

/// See `Backend::copy`.
pub(super) fn copy(shared: &Shared, queue: &mut Queue, from: &Buffer, to: &mut Buffer) -> Result<()> {
    let words = from.bytes() / 8;
    let params = Copy { from: address(from.address()), to: address(to.address()), words: words as u64 };
    let blocks = words.div_ceil(THREADS).min(COPY_BLOCKS);
    queue.push(shared, Kernel::new(Module::Evict, "copy_words"), [blocks, 1, 1], THREADS, &params)
}

/// See `Backend::take_back`.
pub(super) fn take_back(shared: &Shared, queue: &mut Queue, lost: Lost<'_>) -> Result<()> {
    let Lost { tables, lost, geometry, layer, begun, store, index } = lost;
    let store = store.runs();
    let stored = extent_table((0..store.extents()).map(|i| store.extent(i)));
    let keys = extent_table((0..index.extents()).map(|i| index.extent(i)));
    queue.reserve(8 * (stored.len() + keys.len()), 2)?;
    let params = TakeBack {
        pool: at_rest(tables, lost, &geometry, layer, begun),
        store: queue.block.push_table(bytes_of(&stored)),
        index: queue.block.push_table(bytes_of(&keys)),
        layout: index::layout(index.geometry(), index.layer_offset()),
        store_offset: store.layer_offset() as u64,
        store_run_bytes: store.run_bytes() as u64,
        extent_tokens: store.geometry().extent_tokens as u32,
        stored_bytes: store.row_bytes() as u32,
    };
    queue.push(shared, Kernel::new(Module::Evict, "take_back"), [geometry.kv_heads, 1, 1], THREADS, &params)
}
