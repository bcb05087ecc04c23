//! Matrix products: our own kernel for decode, cuBLAS (or a plain kernel where there is none) for prefill.

use super::blas::{Blas, Product};
use super::block::plain;
use super::kernels::{Kernel, Module};
use super::queue::{Queue, Use};
use super::slots::GATHER_BLOCKS;
use super::{Shared, address};
use crate::Result;
use crate::backend::{DType, Linear, Rows, RowsMut};

plain! {
    /// What every product of our own has (`kernels/operands.cuh`).
    struct Operands {
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

    struct Matvec {
        operands: Operands,
        tiles: u32,
        unused: u32,
    }

    struct MatvecMma {
        operands: Operands,
        row_tiles: u32,
        parts: u32,
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

impl Operands {
    fn new(x: &Rows<'_>, weight: &Linear, accumulate: bool, out: &RowsMut<'_>) -> Operands {
        Operands {
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
        }
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

/// Kernels on tensor cores (`matvec_mma.cu`), by eights of rows and of outputs that a block takes at a time.
const MMA_KERNELS: [(usize, usize, &str); 8] = [
    (1, 4, "matvec_mma_8_32"),
    (1, 5, "matvec_mma_8_40"),
    (1, 8, "matvec_mma_8_64"),
    (2, 4, "matvec_mma_16_32"),
    (2, 5, "matvec_mma_16_40"),
    (2, 8, "matvec_mma_16_64"),
    (3, 4, "matvec_mma_24_32"),
    (3, 5, "matvec_mma_24_40"),
];

/// Threads of their blocks.
const MMA_THREADS: usize = 512;

/// Bytes of shared memory of a block of such a kernel: two pieces of weights, and sixteen warps' sums.
const fn mma_shared(rows: usize, outputs: usize) -> usize {
    2 * outputs * MMA_THREADS * 16 + 16 * outputs * rows * 32 * 8
}

/// Elements from which on a matrix goes to tensor cores: smaller ones give every multiprocessor too little to do. (Measured on
/// an H100, with an earlier kernel: a step of the 135M model took 1.24 ms without and 1.51 ms with, of the 7B model with 8 rows
/// 11.1 ms and 8.1 ms.)
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
    let params = Matvec { operands: Operands::new(&x, weight, accumulate, &out), tiles: tiles as u32, unused: 0 };
    let grid = [tiles * outputs.div_ceil(outputs_a_block), 1, 1];
    queue.push(shared, kernel, grid, 32 * WARPS, &params)
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
    let eights = outputs.div_ceil(8);
    // A part fills its multiprocessor. A few are left to what copies entries meanwhile: without them, some parts would
    // begin when others have ended.
    let multiprocessors = shared.context.multiprocessors;
    let parts = multiprocessors.saturating_sub(GATHER_BLOCKS).max(multiprocessors / 2).min(eights);
    let share = eights.div_ceil(parts);
    // Few tiles of rows, for each reads all weights; then few rounds through a part; then few outputs that are not there.
    let &(tile, at_a_time, name) = MMA_KERNELS
        .iter()
        .filter(|(tile, at_a_time, _)| mma_shared(*tile, *at_a_time) <= shared.context.shared_bytes)
        .min_by_key(|(tile, at_a_time, _)| (rows.div_ceil(8 * tile), *tile, share.div_ceil(*at_a_time), *at_a_time))
        .expect("the smallest fits every device");
    let row_tiles = rows.div_ceil(8 * tile);
    let params = MatvecMma {
        operands: Operands::new(&x, weight, accumulate, &out),
        row_tiles: row_tiles as u32,
        parts: parts as u32,
    };
    let kernel = Kernel::new(Module::MatvecMma, name).with_shared(mma_shared(tile, at_a_time));
    queue.push(shared, kernel, [parts * row_tiles, 1, 1], MMA_THREADS, &params)
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
    let params = Operands::new(&x, weight, accumulate, &out);
    let name = ["gemm_f32", "gemm_f16", "gemm_bf16"][type_index(weight.dtype)];
    let grid = [weight.outputs.div_ceil(64), x.rows().div_ceil(64), 1];
    queue.push(shared, Kernel::new(Module::Gemm, name), grid, 256, &params)
}
