//! Matrix products for decode: few rows of activations, so time is the reading of the weights.
//!
//! Every output is one vector of partial sums over the depth in order, then one fixed tree of additions. Nothing else
//! enters it, so a row's bits depend neither on the rows beside it nor on the number of threads. Blocks of several
//! outputs and rows only share loads: [`OUTPUTS`] neighbouring weight rows are read at a time. Their lines are asked for
//! in another order, that of memory: a thread's share of the weight is one stretch, and prefetching runs [`AHEAD`] of
//! the arithmetic through it, across the ends of rows, blocks and pieces. Several rows at once, a row apart, are what
//! hardware prefetchers do not recognise; without this a thread reads at a third of the memory's speed.
//!
//! Where there is AMX (Sapphire Rapids and its successors), the rows of a block are an eighth of the weight apart instead.
//! One stream, prefetched or not, is as fast as the first-level cache has buffers for lines, 10 GB/s a core; the
//! second-level cache fetches ahead by itself, page by page, and with a page in each of eight places a core reads 13.

use super::CpuBackend;
use super::simd::{Kernel, LANES, Level, Simd};
use super::stored::{Stored, for_stored};
use super::view::row;
use crate::backend::{Blocks, Linear, Rows, RowsMut};
use std::marker::PhantomData;
use std::ops::Range;

/// Weight rows of a block of the product; of a tile of [`Blocks`] too.
const OUTPUTS: usize = Blocks::ROWS;

/// Bytes from the weights that are multiplied to those that are prefetched: about 0.4 µs of reading, a few times what
/// memory takes to answer, and well inside the first-level cache.
const AHEAD: usize = 12 << 10;

/// Bytes of weights that one piece of parallel work covers, about 4 µs of reading; of blocks, whose bytes are worth more
/// arithmetic, a quarter.
const PIECE: usize = 64 << 10;

/// `out = x · weightᵀ (+ out) + bias`, each row by itself; and `beside`, see [`super::pool::Pool::split_beside`].
pub(super) fn matmul(
    cpu: &CpuBackend,
    x: Rows<'_>,
    weight: &Linear,
    accumulate: bool,
    out: RowsMut<'_>,
    beside: &mut (dyn FnMut() + Send),
) {
    assert!(weight.bytes() <= weight.data.bytes(), "a weight past its buffer's end");
    for_stored!(weight, W => {
        let piece = if W::TILED { PIECE / 4 } else { PIECE };
        let rows = piece / row_bytes::<W>(weight.inputs);
        let product = |outputs, apart| {
            cpu.level.run(Product::<W> { x, weight, accumulate, out: &out, outputs, apart, format: PhantomData });
        };
        // Outputs from one row of a block to the next.
        let apart = if W::TILED || cpu.level.level() < Level::Amx { 1 } else { (weight.outputs / OUTPUTS).max(1) };
        if apart == 1 {
            let grain = rows.max(1).next_multiple_of(OUTPUTS);
            cpu.pool.split_beside(weight.outputs, grain, beside, &|_, outputs| product(outputs, 1));
        } else {
            cpu.pool.split_beside(apart, (rows / OUTPUTS).max(1), beside, &|_, outputs| product(outputs, apart));
            product(OUTPUTS * apart..weight.outputs, 1);
        }
    });
}

/// Bytes of a row of `columns` weights, at least one column.
#[inline(always)]
fn row_bytes<W: Stored>(columns: usize) -> usize {
    columns * W::BYTES / (W::VECTORS * LANES)
}

/// Some outputs of all rows.
struct Product<'a, W> {
    x: Rows<'a>,
    weight: &'a Linear,
    accumulate: bool,
    out: &'a RowsMut<'a>,
    /// These, or with `apart` > 1 the first ones of blocks whose outputs are so far apart.
    outputs: Range<usize>,
    apart: usize,
    format: PhantomData<W>,
}

impl<W: Stored> Kernel for Product<'_, W> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let end = self.outputs.end;
        let mut n = self.outputs.start;
        while self.apart > 1 && n < end {
            self.rows::<S, OUTPUTS>(s, n, OUTPUTS);
            n += 1;
        }
        while end - n >= OUTPUTS {
            self.rows::<S, OUTPUTS>(s, n, OUTPUTS);
            n += OUTPUTS;
        }
        if W::TILED && n < end {
            // The last tile is whole, though not all of its rows are the weight's.
            self.rows::<S, OUTPUTS>(s, n, end - n);
            n = end;
        }
        while n < end {
            self.rows::<S, 1>(s, n, 1);
            n += 1;
        }
    }
}

impl<W: Stored> Product<'_, W> {
    /// `N` outputs from `n` on, of which `count` are there, of all rows.
    #[inline(always)]
    fn rows<S: Simd, const N: usize>(&self, s: S, n: usize, count: usize) {
        let rows = self.x.rows();
        let mut m = 0;
        // The sums of four rows fill the registers where a vector is one of 32; where it is two of 16, they do not fit.
        while S::WIDE && rows - m >= 4 {
            self.block::<S, 4, N>(s, m, n, count);
            m += 4;
        }
        while W::TILED && rows - m >= 2 {
            // Two rows share what it takes to widen a tile; elements are as quickly loaded again.
            self.block::<S, 2, N>(s, m, n, count);
            m += 2;
        }
        while m < rows {
            self.block::<S, 1, N>(s, m, n, count);
            m += 1;
        }
    }

    /// `M` rows from `m` on by `N` outputs from `n` on, of which `count` are there.
    #[inline(always)]
    fn block<S: Simd, const M: usize, const N: usize>(&self, s: S, m: usize, n: usize, count: usize) {
        let k = self.weight.inputs;
        debug_assert!(m + M <= self.x.rows() && count <= N && n + (count - 1) * self.apart < self.weight.outputs);
        let mut sums = [[s.zero(); N]; M];
        let width = W::VECTORS * LANES;
        let w = self.weight.data.address().wrapping_add(n * row_bytes::<W>(k));
        // SAFETY: `x` has rows m..m + M.
        let x = unsafe { self.x.base().cast::<f32>().add(m * self.x.stride()) };
        for step in 0..k / width {
            self.step::<S, M, N>(s, w, x, m == 0, step, LANES, &mut sums);
        }
        if !W::TILED && !k.is_multiple_of(width) {
            self.step::<S, M, N>(s, w, x, m == 0, k / width, k % width, &mut sums);
        }
        for i in 0..M {
            for j in 0..N {
                let mut y = s.sum(sums[i][j]);
                if j >= count {
                    break;
                }
                let output = n + j * self.apart;
                // SAFETY: `output` is a column of row m + i of `out`, and each one belongs to one thread.
                let out = unsafe { &mut *self.out.base().cast::<f32>().add((m + i) * self.out.stride() + output) };
                if self.accumulate {
                    y += *out;
                }
                if let Some(bias) = &self.weight.bias {
                    y += row(&bias.row(), 0)[output];
                }
                *out = y;
            }
        }
    }

    /// Adds the products of step `step`, `here` columns a vector, to a block's sums. `w` is where its weights begin, `x` its
    /// activations; whoever is the `first` to read the weights fetches others ahead.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "all but two stay the same in a loop")]
    fn step<S: Simd, const M: usize, const N: usize>(
        &self,
        s: S,
        w: *const u8,
        x: *const f32,
        first: bool,
        step: usize,
        here: usize,
        sums: &mut [[S::V; N]; M],
    ) {
        let stride = self.apart * row_bytes::<W>(self.weight.inputs);
        if first && self.apart > 1 {
            for j in 0..N {
                s.prefetch(w.wrapping_add(j * stride + step * W::BYTES + AHEAD / OUTPUTS));
            }
        } else if first {
            // The block's rows are one stretch, of which each step asks for as much as it reads. What lies past the
            // weight's end is asked for in vain.
            s.prefetch_all(w.wrapping_add(N * step * W::BYTES + AHEAD), N * W::BYTES);
        }
        // SAFETY: at `w` N rows of the weight begin (or fill up its last tile), which its buffer was seen to hold; the step
        // lies in them, and only an untiled format has one of fewer than `LANES` columns.
        let weights = unsafe { W::load::<S, N>(s, w, stride, step, here) };
        for v in 0..W::VECTORS {
            for i in 0..M {
                // SAFETY: the block's row i has as many elements as a weight's, of which `here` from the vector's first on are
                // read.
                let x = unsafe {
                    let at = x.add(i * self.x.stride() + (step * W::VECTORS + v) * LANES);
                    if here == LANES { s.load(at) } else { s.load_first(at, here) }
                };
                for j in 0..N {
                    sums[i][j] = s.fma(x, weights[j][v], sums[i][j]);
                }
            }
        }
    }
}
