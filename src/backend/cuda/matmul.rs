//! Matrix products: our own kernel for decode, cuBLAS (or a plain kernel where there is none) for prefill.

use std::cmp::Reverse;

use super::blas::{Blas, Product};
use super::block::plain;
use super::context::Context;
use super::kernels::{Kernel, Module};
use super::queue::{Queue, Use};
use super::{Shared, address};
use crate::Result;
use crate::backend::{DType, Linear, Rows, RowsMut};

plain! {
    struct Matvec {
        x: u64,
        weight: u64,
        bias: u64,
        out: u64,
        x_stride: u64,
        out_stride: u64,
        depth: u32,
        outputs: u32,
        rows: u32,
        tiles: u32,
        accumulate: u32,
        unused: u32,
    }

    struct MatvecMma {
        x: u64,
        weight: u64,
        bias: u64,
        out: u64,
        partials: u64,
        x_stride: u64,
        out_stride: u64,
        depth: u32,
        outputs: u32,
        rows: u32,
        row_tiles: u32,
        slices: u32,
        groups: u32,
        width: u32,
        ahead: u32,
        accumulate: u32,
        unused: u32,
    }

    struct Gemm {
        x: u64,
        weight: u64,
        bias: u64,
        out: u64,
        x_stride: u64,
        out_stride: u64,
        depth: u32,
        outputs: u32,
        rows: u32,
        accumulate: u32,
    }

    struct Convert {
        x: u64,
        out: u64,
        x_stride: u64,
        out_stride: u64,
        rows: u32,
        cols: u32,
    }

    struct AddBias {
        bias: u64,
        out: u64,
        out_stride: u64,
        rows: u32,
        cols: u32,
    }
}

/// Warps of a decode block, each with outputs of its own.
const WARPS: usize = 4;

/// Most blocks in a grid's second dimension; kernels that use it for rows walk on from there.
const MOST_ROWS: usize = 65535;

/// Kernels by rows and outputs that a warp takes at a time.
const TILES: [(usize, usize); 5] = [(1, 1), (1, 2), (2, 2), (4, 2), (8, 4)];

const VECTOR: [[&str; 5]; 3] = [
    ["matvec_f32_1x1", "matvec_f32_1x2", "matvec_f32_2x2", "matvec_f32_4x2", "matvec_f32_8x4"],
    ["matvec_f16_1x1", "matvec_f16_1x2", "matvec_f16_2x2", "matvec_f16_4x2", "matvec_f16_8x4"],
    ["matvec_bf16_1x1", "matvec_bf16_1x2", "matvec_bf16_2x2", "matvec_bf16_4x2", "matvec_bf16_8x4"],
];

const SCALAR_TILES: [(usize, usize); 2] = [(1, 1), (4, 1)];

const SCALAR: [[&str; 2]; 3] = [
    ["matvec_f32_scalar_1x1", "matvec_f32_scalar_4x1"],
    ["matvec_f16_scalar_1x1", "matvec_f16_scalar_4x1"],
    ["matvec_bf16_scalar_1x1", "matvec_bf16_scalar_4x1"],
];

/// Threads of a block on tensor cores (`matvec_mma.cu`), outputs of one that multiplies few rows, and the rows that those
/// are.
const MMA_THREADS: usize = 256;
const MMA_FEW_OUTPUTS: usize = 16;
const MMA_FEW_ROWS: usize = 8;

/// The depth of a piece, and the pieces that a slice has at most: a warp has four registers' worth of them.
const MMA_PIECE: usize = 32;
const MMA_MOST_PIECES: usize = 32;

/// Shared memory of a block that multiplies many rows: of a piece's activations and of the warps' sums, for each tile of
/// eight rows, of which there are up to three; and of the weights that come next, for each piece of a warp.
const MMA_ACTIVATIONS: usize = 8 * MMA_PIECE * 3 * 2;
const MMA_SUMS: usize = 8 * 32 * 8 * 4;
const MMA_WEIGHTS: usize = 32 * MMA_PIECE * 8 * 2;
const MMA_TILES: usize = 3;

/// Elements from which on a matrix goes to tensor cores. Smaller ones have too few blocks of 16 outputs to fill the chip:
/// on an H100 a step of the 135M model takes 1.24 ms without and 1.51 ms with; of the 7B model 8 rows 11.1 ms and 8.1 ms.
const MMA_LEAST: usize = 4 << 20;

fn type_index(dtype: DType) -> usize {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::U32 => unreachable!("weights are not u32"),
    }
}

/// `out = x · weightᵀ (+ out) + bias`; a row's bits do not depend on the others.
pub(super) fn decode(
    shared: &Shared,
    queue: &mut Queue,
    x: Rows<'_>,
    weight: &Linear,
    accumulate: bool,
    out: RowsMut<'_>,
) -> Result<()> {
    let (rows, outputs) = (x.rows(), weight.outputs);
    // Whether a row can be read 16 bytes at a time depends on the matrix and on the width of activations, not on rows.
    let vectors = (weight.inputs * weight.dtype.bytes()).is_multiple_of(16)
        && x.stride().is_multiple_of(4)
        && address(x.base()).is_multiple_of(16);
    let index = type_index(weight.dtype);
    // By the matrix alone, never by the rows: the two kernels round differently.
    let large = weight.dtype == DType::BF16 && outputs * weight.inputs >= MMA_LEAST;
    if vectors && large {
        return on_tensor_cores(shared, queue, x, weight, accumulate, out);
    }
    let (kernel, outputs_a_block, m) = if vectors {
        let tile = match rows {
            // Two outputs a warp once there are warps enough to fill the chip twice.
            0..=1 => usize::from(outputs >= 16384),
            2 => 2,
            3..=4 => 3,
            _ => 4,
        };
        let (m, r) = TILES[tile];
        (Kernel::new(Module::Matvec, VECTOR[index][tile]), WARPS * r, m)
    } else {
        let tile = usize::from(rows > 1);
        let (m, r) = SCALAR_TILES[tile];
        (Kernel::new(Module::Matvec, SCALAR[index][tile]), WARPS * r, m)
    };
    let tiles = rows.div_ceil(m);
    let params = Matvec {
        x: address(x.base()),
        weight: address(weight.rows().base()),
        bias: weight.bias.as_ref().map_or(0, |bias| address(bias.row().base())),
        out: address(out.base()),
        x_stride: x.stride() as u64,
        out_stride: out.stride() as u64,
        depth: weight.inputs as u32,
        outputs: outputs as u32,
        rows: rows as u32,
        tiles: tiles as u32,
        accumulate: accumulate.into(),
        unused: 0,
    };
    let grid = [tiles * outputs.div_ceil(outputs_a_block), 1, 1];
    queue.push(shared, kernel, grid, 32 * WARPS, &params)
}

/// How a matrix's product is cut: by the matrix and the device alone, so that the rows do not change a sum's order.
struct Cut {
    /// Slices of the depth, and groups of outputs: a block for each pair.
    slices: usize,
    groups: usize,
    /// Pieces of weights in shared memory.
    ahead: usize,
}

impl Cut {
    fn new(context: &Context, depth: usize, outputs: usize) -> Cut {
        // Half of the smallest devices' shared memory is enough to keep memory busy; larger ones keep more on its way.
        let ahead = if context.shared_bytes >= 160 << 10 { 4 } else { 2 };
        let room = context.shared_bytes.saturating_sub(ahead * MMA_WEIGHTS + MMA_TILES * MMA_SUMS);
        let most = (room / (MMA_TILES * MMA_ACTIVATIONS)).clamp(1, MMA_MOST_PIECES);
        let pieces = depth.div_ceil(MMA_PIECE);
        let least = pieces.div_ceil(most);
        // Slices are a block's sums to be added, so few; but as many as leave no multiprocessor idle.
        let groups = |slices: usize| (context.multiprocessors / slices).clamp(1, outputs.div_ceil(8));
        let slices = (least..=(2 * least).min(pieces))
            .max_by_key(|&slices| ((groups(slices) * slices).min(context.multiprocessors), Reverse(slices)))
            .unwrap_or(least);
        Cut { slices, groups: groups(slices), ahead }
    }
}

/// See `kernels/matvec_mma.cu`.
fn on_tensor_cores(
    shared: &Shared,
    queue: &mut Queue,
    x: Rows<'_>,
    weight: &Linear,
    accumulate: bool,
    out: RowsMut<'_>,
) -> Result<()> {
    let (rows, outputs) = (x.rows(), weight.outputs);
    let cut = Cut::new(&shared.context, weight.inputs, outputs);
    let few = rows <= MMA_FEW_ROWS;
    let row_tiles = rows.div_ceil(if few { MMA_FEW_ROWS } else { 8 * MMA_TILES });
    let tiles = rows.div_ceil(8 * row_tiles.max(1));
    let width = outputs.next_multiple_of(8);
    let partials = if few { 0 } else { queue.scratch(Use::Sums, cut.slices * rows * width * 4)? };
    let params = MatvecMma {
        x: address(x.base()),
        weight: address(weight.rows().base()),
        bias: weight.bias.as_ref().map_or(0, |bias| address(bias.row().base())),
        out: address(out.base()),
        partials,
        x_stride: x.stride() as u64,
        out_stride: out.stride() as u64,
        depth: weight.inputs as u32,
        outputs: outputs as u32,
        rows: rows as u32,
        row_tiles: row_tiles as u32,
        slices: cut.slices as u32,
        groups: cut.groups as u32,
        width: width as u32,
        ahead: cut.ahead as u32,
        accumulate: accumulate.into(),
        unused: 0,
    };
    if few {
        let grid = [row_tiles * outputs.div_ceil(MMA_FEW_OUTPUTS), 1, 1];
        return queue.push(shared, Kernel::new(Module::MatvecMma, "matvec_mma_few"), grid, MMA_THREADS, &params);
    }
    let pieces = weight.inputs.div_ceil(MMA_PIECE).div_ceil(cut.slices);
    let (name, tiles) = if tiles <= 2 { ("matvec_mma_16", 2) } else { ("matvec_mma_24", MMA_TILES) };
    let bytes = cut.ahead * MMA_WEIGHTS + tiles * (MMA_SUMS + pieces * MMA_ACTIVATIONS);
    let grid = [cut.groups * cut.slices * row_tiles, 1, 1];
    queue.push(shared, Kernel::new(Module::MatvecMma, name).with_shared(bytes), grid, MMA_THREADS, &params)?;
    let grid = [outputs.div_ceil(MMA_THREADS), rows, 1];
    queue.push(shared, Kernel::new(Module::MatvecMma, "matvec_mma_sum"), grid, MMA_THREADS, &params)
}

/// `out = x · weightᵀ (+ out) + bias`, blocked for arithmetic.
///
/// With 16-bit weights cuBLAS multiplies activations rounded to the weights' type, and sums in f32.
pub(super) fn prefill(
    shared: &Shared,
    queue: &mut Queue,
    x: Rows<'_>,
    weight: &Linear,
    accumulate: bool,
    out: RowsMut<'_>,
) -> Result<()> {
    if x.rows() == 0 || weight.outputs == 0 {
        return Ok(());
    }
    let mut blas = shared.blas.lock();
    match blas.get_or_insert_with(Blas::open) {
        Some(blas) => through_blas(shared, queue, blas, x, weight, accumulate, out),
        None => plain_gemm(shared, queue, x, weight, accumulate, out),
    }
}

fn through_blas(
    shared: &Shared,
    queue: &mut Queue,
    blas: &Blas,
    x: Rows<'_>,
    weight: &Linear,
    accumulate: bool,
    out: RowsMut<'_>,
) -> Result<()> {
    let (rows, depth) = (x.rows(), weight.inputs);
    let (mut from, mut stride) = (address(x.base()), x.stride());
    if weight.dtype != DType::F32 {
        // Rows of 16 bytes, whatever the depth.
        stride = depth.next_multiple_of(8);
        let converted = queue.scratch(Use::Converted, rows * stride * 2)?;
        let params = Convert {
            x: from,
            out: converted,
            x_stride: x.stride() as u64,
            out_stride: stride as u64,
            rows: rows as u32,
            cols: depth as u32,
        };
        let name = if weight.dtype == DType::F16 { "convert_f16" } else { "convert_bf16" };
        let grid = [depth.div_ceil(256), rows.min(MOST_ROWS), 1];
        queue.push(shared, Kernel::new(Module::Gemm, name), grid, 256, &params)?;
        from = converted;
    }
    let product = Product {
        x: from,
        x_stride: stride,
        weight: address(weight.rows().base()),
        dtype: weight.dtype,
        out: address(out.base()),
        out_stride: out.stride(),
        rows,
        outputs: weight.outputs,
        depth,
        accumulate,
    };
    blas.multiply(queue.stream()?, &product)?;
    let Some(bias) = &weight.bias else { return Ok(()) };
    let params = AddBias {
        bias: address(bias.row().base()),
        out: address(out.base()),
        out_stride: out.stride() as u64,
        rows: rows as u32,
        cols: weight.outputs as u32,
    };
    let grid = [weight.outputs.div_ceil(256), rows.min(MOST_ROWS), 1];
    queue.push(shared, Kernel::new(Module::Gemm, "add_bias"), grid, 256, &params)
}

fn plain_gemm(
    shared: &Shared,
    queue: &mut Queue,
    x: Rows<'_>,
    weight: &Linear,
    accumulate: bool,
    out: RowsMut<'_>,
) -> Result<()> {
    let params = Gemm {
        x: address(x.base()),
        weight: address(weight.rows().base()),
        bias: weight.bias.as_ref().map_or(0, |bias| address(bias.row().base())),
        out: address(out.base()),
        x_stride: x.stride() as u64,
        out_stride: out.stride() as u64,
        depth: weight.inputs as u32,
        outputs: weight.outputs as u32,
        rows: x.rows() as u32,
        accumulate: accumulate.into(),
    };
    let name = ["gemm_f32", "gemm_f16", "gemm_bf16"][type_index(weight.dtype)];
    let grid = [weight.outputs.div_ceil(64), x.rows().div_ceil(64), 1];
    queue.push(shared, Kernel::new(Module::Gemm, name), grid, 256, &params)
}
