//! The best columns of rows of scores, in order.

use super::block::plain;
use super::kernels::{Kernel, Module};
use super::queue::{Queue, Use};
use super::{Shared, address};
use crate::Result;
use crate::backend::{Rows, RowsMut};

plain! {
    struct Rank {
        scores: u64,
        out: u64,
        lists: u64,
        stride: u64,
        out_stride: u64,
        columns: u32,
        wanted: u32,
    }
}

/// Threads of a block, which sorts a row.
const THREADS: usize = 1024;

/// Bytes of scratch memory for `rows` rows of `columns` scores: two lists of numbers each.
pub(super) fn scratch_bytes(rows: usize, columns: usize) -> usize {
    2 * 4 * rows * columns
}

/// See `Backend::rank`.
pub(super) fn rank(shared: &Shared, queue: &mut Queue, scores: Rows<'_>, out: &RowsMut<'_>) -> Result<()> {
    let (rows, columns) = (scores.rows(), scores.cols());
    let params = Rank {
        scores: address(scores.base()),
        out: address(out.base()),
        lists: queue.scratch(Use::Partials, scratch_bytes(rows, columns))?,
        stride: scores.stride() as u64,
        out_stride: out.stride() as u64,
        columns: columns as u32,
        wanted: out.cols() as u32,
    };
    queue.push(shared, Kernel::new(Module::Rank, "rank_columns"), [rows, 1, 1], THREADS, &params)
}
