//! Keys and values of new tokens into their runs, and rows between runs.

use super::block::{bytes_of, plain};
use super::kernels::{Kernel, Module};
use super::queue::Queue;
use super::{Shared, address};
use crate::Result;
use crate::backend::{DType, KvGeometry, KvRuns, KvRunsMut, Move, Rows};

plain! {
    struct Store {
        keys: u64,
        values: u64,
        targets: u64,
        stride: u64,
        run_bytes: u64,
        kv_heads: u32,
        head_dim: u32,
        per_head: u32,
        unused: u32,
    }

    struct Copy {
        moves: u64,
        count: u32,
        row_bytes: u32,
    }
}

/// Moves that one launch takes.
const MOVES: usize = 1 << 14;

/// The launch that waits last, when it was a store: the next sequence's rows of the same batch may join it.
pub(super) struct LastStore {
    kernel: &'static str,
    geometry: KvGeometry,
    stride: usize,
    /// Where the next row's keys and values would lie.
    keys: u64,
    values: u64,
    /// Bytes of the block that are in use: its table ends there.
    pub(super) end: usize,
}

impl LastStore {
    /// A launch of these rows, whose table ends the block (`end`) when it has been put there.
    pub(super) fn after(kernel: &'static str, geometry: &KvGeometry, keys: Rows<'_>, values: Rows<'_>) -> LastStore {
        let end = |x: Rows<'_>| address(x.base()) + (x.rows() * x.stride() * 4) as u64;
        LastStore { kernel, geometry: *geometry, stride: keys.stride(), keys: end(keys), values: end(values), end: 0 }
    }
}

/// Whether rows may be added to the last launch by widening it and extending its table by `bytes`; `next` is what it
/// would be afterwards.
pub(super) fn joins(queue: &Queue, next: &LastStore, keys: Rows<'_>, values: Rows<'_>, bytes: usize) -> bool {
    queue.last_store.as_ref().is_some_and(|before| {
        (before.kernel, before.geometry, before.stride) == (next.kernel, next.geometry, next.stride)
            && (before.keys, before.values) == (address(keys.base()), address(values.base()))
            && before.end == queue.block.used()
            && queue.block.fits(bytes, 1)
    })
}

fn kernel(dtype: DType) -> Kernel {
    Kernel::new(
        Module::StoreKv,
        match dtype {
            DType::F32 => "store_f32",
            DType::F16 => "store_f16",
            DType::BF16 => "store_bf16",
            DType::U32 => unreachable!("keys and values are not u32"),
        },
    )
}

/// Threads of a block, each with a column of a row, and blocks that a row is spread over.
fn threads(keys: Rows<'_>) -> usize {
    keys.cols().next_multiple_of(32).min(256)
}

fn slices(keys: Rows<'_>) -> usize {
    keys.cols().div_ceil(256)
}

pub(super) fn store(
    shared: &Shared,
    queue: &mut Queue,
    keys: Rows<'_>,
    values: Rows<'_>,
    runs: &mut KvRunsMut<'_>,
    position: usize,
) -> Result<()> {
    if keys.rows() == 0 {
        return Ok(());
    }
    assert_eq!(keys.stride(), values.stride(), "keys and values of one projection");
    let geometry = *runs.geometry();
    let targets: Vec<u64> = (position..position + keys.rows())
        .map(|token| {
            let run = address(runs.run_mut(token / geometry.extent_tokens, 0));
            run + (token % geometry.extent_tokens * geometry.row_bytes()) as u64
        })
        .collect();
    let targets = bytes_of(&targets);
    let kernel = kernel(geometry.dtype);
    let mut last = LastStore::after(kernel.name, &geometry, keys, values);
    if joins(queue, &last, keys, values, targets.len()) {
        queue.block.extend(targets);
        queue.widen_last(keys.rows());
    } else {
        queue.reserve(targets.len(), 1)?;
        let params = Store {
            keys: address(keys.base()),
            values: address(values.base()),
            targets: queue.block.push(targets),
            stride: keys.stride() as u64,
            run_bytes: geometry.run_bytes() as u64,
            kv_heads: geometry.kv_heads as u32,
            head_dim: geometry.head_dim as u32,
            per_head: 0,
            unused: 0,
        };
        queue.push(shared, kernel, [keys.rows(), slices(keys), 1], threads(keys), &params)?;
    }
    last.end = queue.block.used();
    queue.last_store = Some(last);
    Ok(())
}

pub(super) fn store_rows(
    shared: &Shared,
    queue: &mut Queue,
    keys: Rows<'_>,
    values: Rows<'_>,
    runs: &mut KvRunsMut<'_>,
    rows: &[u32],
) -> Result<()> {
    let geometry = *runs.geometry();
    let targets: Vec<u64> = (0..geometry.kv_heads)
        .map(|head| {
            let at = rows[head] as usize;
            let run = address(runs.run_mut(at / geometry.extent_tokens, head));
            run + (at % geometry.extent_tokens * geometry.row_bytes()) as u64
        })
        .collect();
    queue.reserve(8 * targets.len(), 1)?;
    let params = Store {
        keys: address(keys.base()),
        values: address(values.base()),
        targets: queue.block.push(bytes_of(&targets)),
        stride: keys.stride() as u64,
        run_bytes: geometry.run_bytes() as u64,
        kv_heads: geometry.kv_heads as u32,
        head_dim: geometry.head_dim as u32,
        per_head: 1,
        unused: 0,
    };
    queue.push(shared, kernel(geometry.dtype), [1, slices(keys), 1], threads(keys), &params)
}

pub(super) fn copy_rows(
    shared: &Shared,
    queue: &mut Queue,
    from: &KvRuns<'_>,
    to: &mut KvRunsMut<'_>,
    moves: &[Move],
) -> Result<()> {
    let bytes = from.geometry().row_bytes();
    let (source, target) = (from.geometry().extent_tokens, to.geometry().extent_tokens);
    // A row of two halves of at least two bytes each is a multiple of four bytes, and so is its place in an extent.
    let name = if bytes.is_multiple_of(16) { "copy_16" } else { "copy_4" };
    for moves in moves.chunks(MOVES) {
        let pairs: Vec<u64> = moves
            .iter()
            .flat_map(|m| {
                let (head, read, write) = (m.head as usize, m.from as usize, m.to as usize);
                [
                    address(from.run(read / source, head)) + (read % source * bytes) as u64,
                    address(to.run_mut(write / target, head)) + (write % target * bytes) as u64,
                ]
            })
            .collect();
        queue.reserve(8 * pairs.len(), 1)?;
        let params =
            Copy { moves: queue.block.push(bytes_of(&pairs)), count: moves.len() as u32, row_bytes: bytes as u32 };
        let kernel = Kernel::new(Module::StoreKv, name);
        queue.push(shared, kernel, [moves.len().div_ceil(8), 1, 1], 256, &params)?;
    }
    Ok(())
}

/// See `Backend::copy_kv`: a piece an extent, of all heads.
pub(super) fn copy_range(
    queue: &mut Queue,
    from: &KvRuns<'_>,
    to: &mut KvRunsMut<'_>,
    rows: std::ops::Range<usize>,
) -> Result<()> {
    let geometry = *from.geometry();
    let (tokens, bytes, pitch) = (geometry.extent_tokens, geometry.row_bytes(), geometry.run_bytes());
    let mut row = rows.start;
    while row < rows.end {
        let (extent, token) = (row / tokens, row % tokens);
        let count = (tokens - token).min(rows.end - row);
        let source = address(from.run(extent, 0)) + (token * bytes) as u64;
        let target = address(to.run_mut(extent, 0)) + (token * bytes) as u64;
        queue.copy_pieces(source, target, pitch, count * bytes, geometry.kv_heads)?;
        row += count;
    }
    Ok(())
}
