//! How weights are stored, as products read them: elements, or tiles of [`Blocks`].
//!
//! A format hands out vectors of floats: for every row of a few neighbouring ones, [`Stored::VECTORS`] vectors of
//! consecutive columns. A tile's are those that its elements, widened and rounded to bf16 by `model/checkpoint/quant.rs`,
//! would be loaded as: every q·d is exact in f32, so that d·q + m is rounded once there and here, and is a multiple of
//! 2⁻²⁴, so that none is subnormal.

use super::simd::{Element, Kernel, LANES, Simd};
use crate::backend::{Blocks, Linear};
use half::bf16;
use std::mem::MaybeUninit;
use std::ops::Range;

/// A format of weights.
pub(super) trait Stored: Copy + Send + Sync + 'static {
    /// Vectors of a step in a row.
    const VECTORS: usize;

    /// Bytes of a step in a row.
    const BYTES: usize;

    /// Whether rows lie by [`Blocks::ROWS`], of which all are read at a time.
    const TILED: bool;

    /// The first [`Stored::VECTORS`] vectors of `N` rows at step `step`; with `n` < 16 the last step, of as many columns.
    ///
    /// # Safety
    /// At `rows` the first of `N` rows begins, and the others `stride` bytes after each other; they are readable to their
    /// end, and a step of `n` columns lies in them. Where the format is tiled, they are a group of tiles: `N` is
    /// [`Blocks::ROWS`], `n` is [`LANES`], and there is no stride.
    unsafe fn load<S: Simd, const N: usize>(
        s: S,
        rows: *const u8,
        stride: usize,
        step: usize,
        n: usize,
    ) -> [[S::V; 2]; N];
}

impl<E: Element> Stored for E {
    const VECTORS: usize = 1;
    const BYTES: usize = LANES * size_of::<E>();
    const TILED: bool = false;

    #[inline(always)]
    unsafe fn load<S: Simd, const N: usize>(
        s: S,
        rows: *const u8,
        stride: usize,
        step: usize,
        n: usize,
    ) -> [[S::V; 2]; N] {
        let mut out = [[s.zero(); 2]; N];
        for j in 0..N {
            // SAFETY: `n` elements of row j from the step on are there, by the caller's promise.
            out[j][0] = unsafe {
                let at = rows.add(j * stride).cast::<E>().add(step * LANES);
                if n == LANES { E::load(s, at) } else { E::load_first(s, at, n) }
            };
        }
        out
    }
}

/// [`Blocks::Q4_0`].
#[derive(Clone, Copy)]
pub(super) struct Q4_0;

/// [`Blocks::Q4_1`].
#[derive(Clone, Copy)]
pub(super) struct Q4_1;

/// [`Blocks::Q8_0`].
#[derive(Clone, Copy)]
pub(super) struct Q8_0;

/// The first eight halves of a tile, of which the scales are the first, widened into `to`.
///
/// # Safety
/// `tile` is readable for a tile, all of which are longer.
#[inline(always)]
unsafe fn scales<S: Simd>(s: S, tile: *const u8, to: &mut MaybeUninit<[f32; 8]>) -> &[f32; 8] {
    // SAFETY: the caller's promise; what is behind the scales are halves as good as any, that nobody looks at. All of `to`
    // is written.
    unsafe {
        s.widen_eight(tile.cast(), to.as_mut_ptr().cast());
        // Through memory, which broadcasts an element for nothing, where the compiler would shuffle registers.
        std::hint::black_box(to).assume_init_ref()
    }
}

/// The rows of a tile as an array of `N`, which a caller of [`Stored::load`] promises to be all.
#[inline(always)]
fn all<V: Copy, const N: usize>(rows: [[V; 2]; Blocks::ROWS]) -> [[V; 2]; N] {
    let mut out = [rows[0]; N];
    #[allow(clippy::manual_memcpy, reason = "a copy of all at once goes through memory")]
    for r in 1..N {
        out[r] = rows[r];
    }
    out
}

macro_rules! tiled {
    ($format:ident, |$s:ident, $tile:ident| $rows:expr) => {
        impl Stored for $format {
            const VECTORS: usize = Blocks::COLUMNS / LANES;
            const BYTES: usize = Blocks::$format.block_bytes();
            const TILED: bool = true;

            #[inline(always)]
            unsafe fn load<S: Simd, const N: usize>(
                $s: S,
                rows: *const u8,
                _stride: usize,
                step: usize,
                _n: usize,
            ) -> [[S::V; 2]; N] {
                // SAFETY: the step is one of the rows' tiles, by the caller's promise.
                let $tile = unsafe { rows.add(step * Blocks::ROWS * Self::BYTES) };
                all($rows)
            }
        }
    };
}

tiled!(Q4_0, |s, tile| {
    // SAFETY: a tile is four scales of two bytes and sixteen words.
    unsafe {
        let mut place = MaybeUninit::uninit();
        let d = scales(s, tile, &mut place);
        let mut out = [[s.zero(); 2]; Blocks::ROWS];
        for r in 0..Blocks::ROWS {
            out[r] = s.dequantize::<-8>(tile.add(8).cast(), 4 * r as u32, d[r], 0.0);
        }
        out
    }
});

tiled!(Q4_1, |s, tile| {
    // SAFETY: a tile is four scales and minima of two bytes each and sixteen words.
    unsafe {
        let mut place = MaybeUninit::uninit();
        let scales = scales(s, tile, &mut place);
        let mut out = [[s.zero(); 2]; Blocks::ROWS];
        for r in 0..Blocks::ROWS {
            out[r] = s.dequantize::<0>(tile.add(16).cast(), 4 * r as u32, scales[2 * r], scales[2 * r + 1]);
        }
        out
    }
});

tiled!(Q8_0, |s, tile| {
    // SAFETY: a tile is four scales of two bytes and four times 32 signed bytes.
    unsafe {
        let mut place = MaybeUninit::uninit();
        let d = scales(s, tile, &mut place);
        let mut out = [[s.zero(); 2]; Blocks::ROWS];
        for r in 0..Blocks::ROWS {
            for half in 0..2 {
                let q = s.load_i8(tile.add(8 + r * Blocks::COLUMNS + half * LANES).cast());
                out[r][half] = s.round_bf16(s.mul(q, s.splat(d[r])));
            }
        }
        out
    }
});

/// Evaluates `$body` with `$format` as the way that `$weight` is stored.
macro_rules! for_stored {
    ($weight:expr, $format:ident => $body:expr) => {
        match $weight.blocks {
            None => $crate::backend::cpu::simd::for_dtype!($weight.dtype, $format => $body),
            Some(blocks) => $crate::backend::cpu::stored::for_blocks!(blocks, $format => $body),
        }
    };
}
pub(super) use for_stored;

/// Evaluates `$body` with `$format` as the type that `$blocks` names.
macro_rules! for_blocks {
    ($blocks:expr, $format:ident => $body:expr) => {
        match $blocks {
            $crate::backend::Blocks::Q4_0 => {
                type $format = $crate::backend::cpu::stored::Q4_0;
                $body
            }
            $crate::backend::Blocks::Q4_1 => {
                type $format = $crate::backend::cpu::stored::Q4_1;
                $body
            }
            $crate::backend::Blocks::Q8_0 => {
                type $format = $crate::backend::cpu::stored::Q8_0;
                $body
            }
        }
    };
}
pub(super) use for_blocks;

/// What blocks are widened to.
pub(super) trait Widened: Copy + Send {
    /// `x`, which is a bf16.
    fn of(x: f32) -> Self;
}

impl Widened for f32 {
    #[inline(always)]
    fn of(x: f32) -> f32 {
        x
    }
}

impl Widened for bf16 {
    #[inline(always)]
    fn of(x: f32) -> bf16 {
        bf16::from_bits((x.to_bits() >> 16) as u16)
    }
}

/// Writes what some columns of some rows of blocks stand for, row after row.
pub(super) struct Widen<'a, T> {
    pub(super) weight: &'a Linear,
    pub(super) blocks: Blocks,
    pub(super) rows: Range<usize>,
    /// Whole blocks.
    pub(super) columns: Range<usize>,
    /// `rows.len() × columns.len()`.
    pub(super) to: &'a mut [T],
}

impl<T: Widened> Kernel for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let Range { start, end } = self.columns;
        assert!(self.rows.end <= self.weight.outputs && end <= self.weight.inputs);
        assert!(self.weight.bytes() <= self.weight.data.bytes(), "a weight past its buffer's end");
        assert!(start.is_multiple_of(Blocks::COLUMNS) && end.is_multiple_of(Blocks::COLUMNS));
        assert_eq!(self.to.len(), self.rows.len() * (end - start));
        for_blocks!(self.blocks, W => self.groups::<S, W>(s));
    }
}

impl<T: Widened> Widen<'_, T> {
    #[inline(always)]
    fn groups<S: Simd, W: Stored>(&mut self, s: S) {
        let (inputs, width) = (self.weight.inputs, self.columns.len());
        let row_bytes = inputs / Blocks::COLUMNS * W::BYTES;
        for group in self.rows.start / Blocks::ROWS..self.rows.end.div_ceil(Blocks::ROWS) {
            let first = group * Blocks::ROWS;
            for column in (0..width).step_by(Blocks::COLUMNS) {
                let tile = (self.columns.start + column) / Blocks::COLUMNS;
                // SAFETY: the weight's tiles lie in its buffer, as `run` has seen; group `group` of them holds rows of it, and tile `tile`
                // columns.
                let rows = unsafe {
                    let at = self.weight.data.address().add(first * row_bytes);
                    W::load::<S, { Blocks::ROWS }>(s, at, 0, tile, LANES)
                };
                for r in 0..Blocks::ROWS {
                    if self.rows.contains(&(first + r)) {
                        let to = &mut self.to[(first + r - self.rows.start) * width + column..][..Blocks::COLUMNS];
                        for (half, to) in to.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                            let mut values = [0.0; LANES];
                            s.store_slice(&mut values, rows[r][half]);
                            for i in 0..LANES {
                                to[i] = T::of(values[i]);
                            }
                        }
                    }
                }
            }
        }
    }
}
