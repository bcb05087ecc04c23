//! The tail of attention: weights behind a rehearsal, mean values into what was attended, and rows that are blended.

use super::block::{bytes_of, plain};
use super::kernels::{Kernel, Module};
use super::queue::Queue;
use super::{Shared, address};
use crate::Result;
use crate::backend::{Blend, Rows, RowsMut};

plain! {
    /// A sequence whose rehearsal has been ranked and selected from.
    pub(super) struct Sequence {
        pub(super) scores: u64,
        pub(super) shifts: u64,
        pub(super) attended_sums: u64,
        pub(super) selected: u64,
        pub(super) selected_counts: u64,
        pub(super) weights: u64,
        pub(super) stride: u32,
        pub(super) sums_stride: u32,
        pub(super) chunks: u32,
        pub(super) capacity: u32,
        pub(super) attended: Attended,
    }

    /// Which rows of a layer are attended whatever is selected (`kernels/tail.cuh`); addresses are those of the first KV head.
    #[derive(Default)]
    pub(super) struct Attended {
        pub(super) slots: u64,
        pub(super) used: u64,
        pub(super) tokens: u64,
        pub(super) stride: u64,
        pub(super) tokens_stride: u64,
        pub(super) below: u32,
        pub(super) from: u32,
        pub(super) by_list: u32,
        pub(super) step: u32,
    }

    struct Weights {
        sequences: u64,
        group: u32,
        unused: u32,
    }

    struct Added {
        means: u64,
        weights: u64,
        out: u64,
    }

    struct Add {
        sequences: u64,
        group: u32,
        head_dim: u32,
    }

    struct Blended {
        from: u64,
        toward: u64,
        out: u64,
        from_stride: u64,
        toward_stride: u64,
        out_stride: u64,
        rows: u32,
        cols: u32,
        factor: f32,
        unused: u32,
    }
}

/// A tail of which a rehearsal is to find the weights: what is attended anyhow, and where the weights go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    pub(super) attended: Attended,
    pub(super) weights: u64,
}

/// Threads of a block that sums (`tail.cu`), adds, blends.
const SUM: usize = 256;
const ADD: usize = 128;
const BLEND: usize = 256;

/// The launch that waits last, when it added a tail: the next sequence of the same batch may join it.
#[derive(Clone, Copy)]
pub(super) struct LastAdd {
    params: Add,
    heads: usize,
    /// Bytes of the block that are in use: its sequences end there.
    end: usize,
}

/// Weights of the sequences' `heads` query heads. The block was asked whether it has room for the sequences.
pub(super) fn weigh(
    shared: &Shared,
    queue: &mut Queue,
    sequences: &[Sequence],
    heads: usize,
    group: usize,
) -> Result<()> {
    let params = Weights { sequences: queue.block.push(bytes_of(sequences)), group: group as u32, unused: 0 };
    queue.push(shared, Kernel::new(Module::Tail, "tail_weights"), [heads, sequences.len(), 1], SUM, &params)
}

/// See `Backend::add_tail`.
pub(super) fn add(
    shared: &Shared,
    queue: &mut Queue,
    means: Rows<'_>,
    weights: Rows<'_>,
    out: RowsMut<'_>,
) -> Result<()> {
    let heads = weights.cols();
    let head_dim = out.cols() / heads;
    let added = Added { means: address(means.base()), weights: address(weights.base()), out: address(out.base()) };
    let mut params = Add { sequences: 0, group: (heads / (means.cols() / head_dim)) as u32, head_dim: head_dim as u32 };
    let last = queue.last_add;
    queue.reserve(size_of::<Added>(), 1)?;
    let joins = last.filter(|before| {
        Add { sequences: 0, ..before.params } == params
            && before.heads == heads
            && before.end == queue.block.used()
            && queue.last_add.is_some()
    });
    if let Some(before) = joins {
        queue.block.extend(bytes_of(&[added]));
        queue.widen_last(1);
        params = before.params;
    } else {
        params.sequences = queue.block.push(bytes_of(&[added]));
        queue.push(shared, Kernel::new(Module::Tail, "tail_add"), [1, heads, 1], ADD, &params)?;
    }
    queue.last_add = Some(LastAdd { params, heads, end: queue.block.used() });
    Ok(())
}

/// See `Backend::blend`.
pub(super) fn blend(shared: &Shared, queue: &mut Queue, blend: Blend<'_>, toward: Rows<'_>) -> Result<()> {
    let Blend { from, out, factor } = blend;
    let (rows, cols) = (toward.rows(), toward.cols());
    let from = from.unwrap_or(out.as_rows());
    let params = Blended {
        from: address(from.base()),
        toward: address(toward.base()),
        out: address(out.base()),
        from_stride: from.stride() as u64,
        toward_stride: toward.stride() as u64,
        out_stride: out.stride() as u64,
        rows: rows as u32,
        cols: cols as u32,
        factor,
        unused: 0,
    };
    queue.push(shared, Kernel::new(Module::Tail, "tail_blend"), [(rows * cols).div_ceil(BLEND), 1, 1], BLEND, &params)
}
