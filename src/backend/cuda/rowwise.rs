//! What takes every row by itself: embedding, norms, activations, rotation, log-probabilities.

use super::block::{bytes_of, plain};
use super::kernels::{Kernel, Module};
use super::queue::Queue;
use super::{Shared, address};
use crate::Result;
use crate::backend::{Activation, DType, Linear, Norm, NormKind, Rotation, Rows, RowsMut};

plain! {
    struct Embed {
        table: u64,
        ids: u64,
        out: u64,
        ids_stride: u64,
        out_stride: u64,
        cols: u32,
        table_rows: u32,
        accumulate: u32,
        unused: u32,
    }

    struct Normalise {
        x: u64,
        weight: u64,
        bias: u64,
        out: u64,
        x_stride: u64,
        out_stride: u64,
        rows: u32,
        cols: u32,
        parts: u32,
        centred: u32,
        epsilon: f32,
        unused: u32,
    }

    struct Activate {
        x: u64,
        out: u64,
        x_stride: u64,
        out_stride: u64,
        rows: u32,
        cols: u32,
        kind: u32,
        unused: u32,
    }

    struct Table {
        frequencies: u64,
        positions: u64,
        table: u64,
        positions_stride: u64,
        table_stride: u64,
        rows: u32,
        pairs: u32,
        factor: f32,
        unused: u32,
    }

    struct Rotate {
        table: u64,
        x: u64,
        table_stride: u64,
        x_stride: u64,
        heads: u32,
        head_dim: u32,
        pairs: u32,
        unused: u32,
    }

    struct LogProbability {
        logits: u64,
        targets: u64,
        out: u64,
        logits_stride: u64,
        targets_stride: u64,
        out_stride: u64,
        cols: u32,
        unused: u32,
    }
}

/// Most blocks in a grid's second dimension; kernels that use it for rows walk on from there.
const MOST_ROWS: usize = 65535;

pub(super) fn embed(
    shared: &Shared,
    queue: &mut Queue,
    table: &Linear,
    ids: Rows<'_>,
    accumulate: bool,
    out: RowsMut<'_>,
) -> Result<()> {
    let name = match table.dtype {
        DType::F32 => "embed_f32",
        DType::F16 => "embed_f16",
        DType::BF16 => "embed_bf16",
        DType::U32 => unreachable!("weights are not u32"),
    };
    let params = Embed {
        table: address(table.rows().base()),
        ids: address(ids.base()),
        out: address(out.base()),
        ids_stride: ids.stride() as u64,
        out_stride: out.stride() as u64,
        cols: table.inputs as u32,
        table_rows: table.outputs as u32,
        accumulate: accumulate.into(),
        unused: 0,
    };
    queue.push(shared, Kernel::new(Module::Embed, name), [out.rows(), 1, 1], 256, &params)
}

pub(super) fn norm(shared: &Shared, queue: &mut Queue, x: Rows<'_>, norm: &Norm, out: RowsMut<'_>) -> Result<()> {
    normalise(shared, queue, x, norm, 1, &out)
}

pub(super) fn norm_heads(shared: &Shared, queue: &mut Queue, x: RowsMut<'_>, norm: &Norm) -> Result<()> {
    normalise(shared, queue, x.as_rows(), norm, x.cols() / norm.weight.len, &x)
}

/// Each of `parts` runs of columns by itself. `out` may be `x`: an element is written by the thread that read it last.
fn normalise(
    shared: &Shared,
    queue: &mut Queue,
    x: Rows<'_>,
    norm: &Norm,
    parts: usize,
    out: &RowsMut<'_>,
) -> Result<()> {
    let cols = norm.weight.len;
    let params = Normalise {
        x: address(x.base()),
        weight: address(norm.weight.row().base()),
        bias: norm.bias.as_ref().map_or(0, |bias| address(bias.row().base())),
        out: address(out.base()),
        x_stride: x.stride() as u64,
        out_stride: out.stride() as u64,
        rows: x.rows() as u32,
        cols: cols as u32,
        parts: parts as u32,
        centred: (norm.kind == NormKind::Layer).into(),
        epsilon: norm.epsilon,
        unused: 0,
    };
    let aligned = |address: u64, stride: usize| address.is_multiple_of(16) && stride.is_multiple_of(4);
    let fours = aligned(params.x, x.stride()) && aligned(params.out, out.stride()) && aligned(params.weight, cols);
    let (name, threads) = match cols {
        0..=128 => ("normalise", 32),
        // Rows that registers hold, by whether a thread has four or sixteen elements of one.
        129..=1024 if fours && params.bias.is_multiple_of(16) => ("normalise_4", (cols / 4).next_multiple_of(32)),
        1025..=8192 if fours && params.bias.is_multiple_of(16) => ("normalise_16", (cols / 16).next_multiple_of(32)),
        129..=512 => ("normalise", 128),
        _ => ("normalise", 256),
    };
    queue.push(shared, Kernel::new(Module::Norm, name), [x.rows() * parts, 1, 1], threads, &params)
}

pub(super) fn activate(
    shared: &Shared,
    queue: &mut Queue,
    x: Rows<'_>,
    activation: Activation,
    out: RowsMut<'_>,
) -> Result<()> {
    let kind = match activation {
        Activation::SiluGated => 0,
        Activation::GeluTanhGated => 1,
        Activation::Relu => 2,
        Activation::Gelu => 3,
        Activation::GeluTanh => 4,
    };
    let params = Activate {
        x: address(x.base()),
        out: address(out.base()),
        x_stride: x.stride() as u64,
        out_stride: out.stride() as u64,
        rows: out.rows() as u32,
        cols: out.cols() as u32,
        kind,
        unused: 0,
    };
    let grid = [out.cols().div_ceil(256), out.rows().min(MOST_ROWS), 1];
    queue.push(shared, Kernel::new(Module::Activate, "activate"), grid, 256, &params)
}

pub(super) fn rotation_table(
    shared: &Shared,
    queue: &mut Queue,
    rotation: &Rotation,
    positions: Rows<'_>,
    table: RowsMut<'_>,
) -> Result<()> {
    let frequencies = bytes_of(&rotation.frequencies);
    queue.reserve(frequencies.len(), 1)?;
    let params = Table {
        frequencies: queue.block.push_table(frequencies),
        positions: address(positions.base()),
        table: address(table.base()),
        positions_stride: positions.stride() as u64,
        table_stride: table.stride() as u64,
        rows: table.rows() as u32,
        pairs: rotation.frequencies.len() as u32,
        factor: rotation.factor,
        unused: 0,
    };
    queue.push(shared, Kernel::new(Module::Rotary, "rotation_table"), [table.rows(), 1, 1], 64, &params)
}

pub(super) fn rotate(
    shared: &Shared,
    queue: &mut Queue,
    table: Rows<'_>,
    head_dim: usize,
    mut x: RowsMut<'_>,
) -> Result<()> {
    let pairs = table.cols() / 2;
    let heads = x.cols() / head_dim;
    // Rows are the grid's second dimension, which ends early.
    for from in (0..x.rows()).step_by(MOST_ROWS) {
        let count = MOST_ROWS.min(x.rows() - from);
        let (table, x) = (table.row_range(from, count), x.reborrow().row_range(from, count));
        let params = Rotate {
            table: address(table.base()),
            x: address(x.base()),
            table_stride: table.stride() as u64,
            x_stride: x.stride() as u64,
            heads: heads as u32,
            head_dim: head_dim as u32,
            pairs: pairs as u32,
            unused: 0,
        };
        let grid = [(heads * pairs).div_ceil(256), count, 1];
        queue.push(shared, Kernel::new(Module::Rotary, "rotate"), grid, 256, &params)?;
    }
    Ok(())
}

pub(super) fn log_probability(
    shared: &Shared,
    queue: &mut Queue,
    logits: Rows<'_>,
    targets: Rows<'_>,
    out: RowsMut<'_>,
) -> Result<()> {
    let params = LogProbability {
        logits: address(logits.base()),
        targets: address(targets.base()),
        out: address(out.base()),
        logits_stride: logits.stride() as u64,
        targets_stride: targets.stride() as u64,
        out_stride: out.stride() as u64,
        cols: logits.cols() as u32,
        unused: 0,
    };
    let kernel = Kernel::new(Module::LogProbability, "log_probability");
    queue.push(shared, kernel, [logits.rows(), 1, 1], 512, &params)
}
