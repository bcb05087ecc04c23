//! Matrix products for decode: few rows of activations, so time is the reading of the weights.
//!
//! Every output is one vector of partial sums over the depth in order, then one fixed tree of additions. Nothing else
//! enters it, so a row's bits depend neither on the rows beside it nor on the number of threads. Blocks of several
//! outputs and rows only share loads: [`OUTPUTS`] neighbouring weight rows are read at a time. Their lines are asked for
//! in another order, that of memory: a thread's share of the weight is one stretch, and prefetching runs [`AHEAD`] of
//! the arithmetic through it, across the ends of rows, blocks and pieces. Several rows at once, a row apart, are what
//! hardware prefetchers do not recognise; without this a thread reads at a third of the memory's speed.

use super::CpuBackend;
use super::simd::{Element, Kernel, LANES, Simd, for_dtype};
use super::view::row;
use crate::backend::{Linear, Rows, RowsMut};
use std::marker::PhantomData;
use std::ops::Range;

/// Weight rows of a block.
const OUTPUTS: usize = 4;

/// Bytes from the weights that are multiplied to those that are prefetched: about 0.4 µs of reading, a few times what
/// memory takes to answer, and well inside the first-level cache.
const AHEAD: usize = 12 << 10;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Bytes of weights that one piece of parallel work covers, about 4 µs of reading.
const PIECE: usize = 64 << 10;

/// `out = x · weightᵀ (+ out) + bias`, each row by itself.
pub(super) fn matmul(cpu: &CpuBackend, x: Rows<'_>, weight: &Linear, accumulate: bool, out: RowsMut<'_>) {
    let row_bytes = (weight.inputs * weight.dtype.bytes()).max(1);
    let grain = (PIECE / row_bytes).max(1).next_multiple_of(OUTPUTS);
    for_dtype!(weight.dtype, E => {
        cpu.pool.split(weight.outputs, grain, &|outputs| {
            cpu.level.run(Product::<E> { x, weight, accumulate, out: &out, outputs, e: PhantomData });
        });
    });
}

/// Some outputs of all rows.
struct Product<'a, E> {
    x: Rows<'a>,
    weight: &'a Linear,
    accumulate: bool,
    out: &'a RowsMut<'a>,
    outputs: Range<usize>,
    e: PhantomData<E>,
}

impl<E: Element> Kernel for Product<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let end = self.outputs.end;
        let mut n = self.outputs.start;
        while end - n >= OUTPUTS {
            self.rows::<S, OUTPUTS>(s, n);
            n += OUTPUTS;
        }
        while n < end {
            self.rows::<S, 1>(s, n);
            n += 1;
        }
    }
}

impl<E: Element> Product<'_, E> {
    /// `N` outputs from `n` on, of all rows.
    #[inline(always)]
    fn rows<S: Simd, const N: usize>(&self, s: S, n: usize) {
        let rows = self.x.rows();
        let mut m = 0;
        while rows - m >= 4 {
            self.block::<S, 4, N>(s, m, n);
            m += 4;
        }
        while m < rows {
            self.block::<S, 1, N>(s, m, n);
            m += 1;
        }
    }

    /// `M` rows from `m` on by `N` outputs from `n` on.
    #[inline(always)]
    fn block<S: Simd, const M: usize, const N: usize>(&self, s: S, m: usize, n: usize) {
        let k = self.weight.inputs;
        debug_assert!(m + M <= self.x.rows() && n + N <= self.weight.outputs);
        let mut sums = [[s.zero(); N]; M];
        let whole = k / LANES * LANES;
        for depth in (0..whole).step_by(LANES) {
            self.step::<S, M, N>(s, m, n, depth, LANES, &mut sums);
        }
        if whole < k {
            self.step::<S, M, N>(s, m, n, whole, k - whole, &mut sums);
        }
        for i in 0..M {
            // SAFETY: columns n..n + N of row m + i of `out`: each output belongs to one thread.
            let out = unsafe {
                let at = self.out.base().cast::<f32>().add((m + i) * self.out.stride() + n);
                std::slice::from_raw_parts_mut(at, N)
            };
            for j in 0..N {
                let mut y = s.sum(sums[i][j]);
                if self.accumulate {
                    y += out[j];
                }
                if let Some(bias) = &self.weight.bias {
                    y += row(&bias.row(), 0)[n + j];
                }
                out[j] = y;
            }
        }
    }

    /// Adds the products of `here` elements from `depth` on to a block's sums.
    #[inline(always)]
    fn step<S: Simd, const M: usize, const N: usize>(
        &self,
        s: S,
        m: usize,
        n: usize,
        depth: usize,
        here: usize,
        sums: &mut [[S::V; N]; M],
    ) {
        let k = self.weight.inputs;
        let w = self.weight.rows().base().cast::<E>();
        let x = self.x.base().cast::<f32>();
        if m == 0 {
            // The block's N·k elements are one stretch, of which each step asks for as much as it reads. What lies
            // past the weight's end is asked for in vain.
            let ahead = w.wrapping_add(n * k + N * depth).cast::<u8>().wrapping_add(AHEAD);
            for line in 0..(N * LANES * size_of::<E>()).div_ceil(LINE) {
                s.prefetch(ahead.wrapping_add(line * LINE));
            }
        }
        let mut weights = [s.zero(); N];
        for j in 0..N {
            // SAFETY: output n + j is a row of the weight with `k` elements; `here` of them from `depth` on are
            // read.
            unsafe {
                let at = w.add((n + j) * k + depth);
                weights[j] = if here == LANES { E::load(s, at) } else { E::load_first(s, at, here) };
            }
        }
        for i in 0..M {
            // SAFETY: row m + i of `x` has `k` elements, of which `here` from `depth` on are read.
            let v = unsafe {
                let at = x.add((m + i) * self.x.stride() + depth);
                if here == LANES { s.load(at) } else { s.load_first(at, here) }
            };
            for j in 0..N {
                sums[i][j] = s.fma(v, weights[j], sums[i][j]);
            }
        }
    }
}
