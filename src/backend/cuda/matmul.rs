//! Matrix products: our own kernel for decode, cuBLAS (or a plain kernel where there is none) for prefill.

use super::blas::{Blas, Product};
use super::block::plain;
use super::kernels::{Kernel, Module};
use super::queue::{Queue, Use};
use super::slots::GATHER_BLOCKS;
use super::{Shared, address};
use crate::Result;
use crate::backend::{DType, Linear, Product as Weight, Rows, RowsMut};

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
        partials: u64,
        counters: u64,
        row_tiles: u32,
        tiles: u32,
        splits: u32,
        unused: u32,
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

/// Kernels on tensor cores (`matvec_mma.cu`), by eights of rows and outputs that a block takes at a time.
const MMA_KERNELS: [(usize, usize, &str); 9] = [
    (1, 96, "matvec_mma_8_96"),
    (1, 128, "matvec_mma_8_128"),
    (1, 160, "matvec_mma_8_160"),
    (2, 96, "matvec_mma_16_96"),
    (2, 128, "matvec_mma_16_128"),
    (2, 160, "matvec_mma_16_160"),
    (3, 96, "matvec_mma_24_96"),
    (3, 128, "matvec_mma_24_128"),
    (3, 160, "matvec_mma_24_160"),
];

/// Threads of their blocks, and the depth that each of a block's eight warps takes at a time.
const MMA_THREADS: usize = 256;
const MMA_PIECE: usize = 32;

/// Blocks, at most, that share a tile of outputs, and pieces that each warp of them has at least.
const MMA_SPLITS: [usize; 3] = [4, 2, 1];
const MMA_LEAST_PIECES: usize = 4;

/// Rows of one launch, which bounds what blocks that share a tile write: a multiple of every kernel's.
const MMA_MOST_ROWS: usize = 192;

/// Bytes of shared memory of a block of such a kernel: eight warps' pieces of weights, their sums of eight rows, and biases.
const fn mma_shared(outputs: usize) -> usize {
    8 * outputs * MMA_PIECE * 2 + 8 * 8 * (outputs + 4) * 4 + outputs * 4
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
    if vectors && is_large(weight.dtype, weight.inputs, outputs) {
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

/// How blocks share a product on tensor cores.
struct MmaPlan {
    /// The kernel, its rows and its outputs.
    name: &'static str,
    rows: usize,
    outputs: usize,
    row_tiles: usize,
    tiles: usize,
    splits: usize,
}

impl MmaPlan {
    fn new(shared: &Shared, inputs: usize, outputs: usize, rows: usize) -> MmaPlan {
        let fits = |width: usize| mma_shared(width) <= shared.context.shared_bytes;
        let widest = MMA_KERNELS.iter().map(|kernel| kernel.1).filter(|&width| fits(width)).max();
        let widest = widest.expect("the smallest fits every device");
        // A block fills its multiprocessor. A few are left to what copies entries meanwhile: without them, some blocks would
        // begin when others have ended.
        let multiprocessors = shared.context.multiprocessors;
        let blocks = multiprocessors.saturating_sub(GATHER_BLOCKS).max(multiprocessors / 2);
        let eights = outputs.div_ceil(8);
        let share = |splits: usize| 8 * eights.div_ceil((blocks / splits).clamp(1, eights));
        // By the matrix alone, never by the rows, whose bits depend on it.
        let pieces = inputs.div_ceil(MMA_PIECE);
        let splits = MMA_SPLITS.into_iter().find(|&splits| {
            splits == 1 || (share(splits) <= widest && pieces >= splits * MMA_LEAST_PIECES * (MMA_THREADS / 32))
        });
        let splits = splits.expect("one is always right");
        let share = share(splits);
        // Few tiles of rows, for each reads all weights; then few rounds through a tile; then few outputs that are not there.
        let &(tile, width, name) = MMA_KERNELS
            .iter()
            .filter(|(_, width, _)| fits(*width))
            .min_by_key(|(tile, width, _)| (rows.div_ceil(8 * tile), *tile, share.div_ceil(*width), *width))
            .expect("the smallest fits every device");
        MmaPlan {
            name,
            rows: 8 * tile,
            outputs: width,
            row_tiles: rows.div_ceil(8 * tile),
            tiles: (blocks / splits).clamp(1, eights),
            splits,
        }
    }

    /// Bytes of partial sums and of counters.
    fn scratch_bytes(&self) -> [usize; 2] {
        if self.splits == 1 {
            return [0, 0];
        }
        let tiles = self.tiles * self.row_tiles;
        [tiles * self.splits * self.rows * self.outputs * 4, tiles * 4]
    }
}

/// Whether a product goes to tensor cores: by the matrix alone, never by the rows, for the two kinds of kernel round
/// differently.
fn is_large(dtype: DType, inputs: usize, outputs: usize) -> bool {
    dtype == DType::BF16 && outputs * inputs >= MMA_LEAST
}

/// Bytes of partial sums and of counters, at most, of decode's products of up to `rows` rows.
pub(super) fn scratch_bytes(shared: &Shared, products: &[Weight], rows: usize) -> [usize; 2] {
    let large = products.iter().filter(|weight| is_large(weight.dtype, weight.inputs, weight.outputs));
    let plans = large.map(|weight| MmaPlan::new(shared, weight.inputs, weight.outputs, rows.clamp(1, MMA_MOST_ROWS)));
    plans.map(|plan| plan.scratch_bytes()).fold([0, 0], |most, bytes| [most[0].max(bytes[0]), most[1].max(bytes[1])])
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
    let mut operands = Operands::new(&x, weight, accumulate, &out);
    for first in (0..x.rows()).step_by(MMA_MOST_ROWS) {
        let rows = (x.rows() - first).min(MMA_MOST_ROWS);
        let plan = MmaPlan::new(shared, weight.inputs, weight.outputs, rows);
        let [partials, counters] = plan.scratch_bytes();
        operands.rows = rows as u32;
        let params = MatvecMma {
            operands,
            partials: queue.scratch(Use::Partials, partials)?,
            counters: queue.scratch(Use::Counters, counters)?,
            row_tiles: plan.row_tiles as u32,
            tiles: plan.tiles as u32,
            splits: plan.splits as u32,
            unused: 0,
        };
        let kernel = Kernel::new(Module::MatvecMma, plan.name).with_shared(mma_shared(plan.outputs));
        queue.push(shared, kernel, [plan.tiles * plan.splits * plan.row_tiles, 1, 1], MMA_THREADS, &params)?;
        operands.x += 4 * operands.x_stride * rows as u64;
        operands.out += 4 * operands.out_stride * rows as u64;
    }
    Ok(())
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
