//! The integer unit: products of 16-bit integers summed in 32 bits (`vpdpwssd` of AVX512-VNNI), twice the multiply-adds
//! of the vector unit in one instruction.
//!
//! Depth is cut into blocks of [`BLOCK`]. A block of a row of A, and one of a column of B, is x ≈ scale · q with integers
//! q, so that a block's product is scale · scale · Σ q·q: an exact sum of integers, then one rounding to f32.
//!
//! *Scale.* The integers of a block have a Euclidean norm of at most [`NORM`], so that by Cauchy and Schwarz no sum of
//! products, however its signs fall, leaves 32 bits: Σ q·q ≤ 46,340² < 2³¹. (What passes 2³¹ on the way wraps around and
//! comes back.) They are at most [`LARGEST`], too, which counts where few elements make up the norm.
//!
//! *Error.* An element is off by at most half a scale, ‖x‖ / 92,600, and by 0.29 scales at random; so a block's product is
//! off by 9·10⁻⁶ ‖a‖·‖b‖ (2.5·10⁻⁴ at the very worst), and a sum of even terms by 7·10⁻⁵ of its spread. Rounding the
//! activations to bf16, as is common, is off by 8·10⁻⁴ of it. A block is short so that an outlier takes bits from its 63
//! neighbours only.
//!
//! Weights in f32 are left to the vector unit: who stores them so wants all their bits.

use super::{PANEL, Unit};
use crate::backend::cpu::simd::{Avx512, Element, LANES, Simd};
use half::{bf16, f16};
use std::arch::asm;
use std::arch::x86_64::*;

/// Depth of a block, even.
const BLOCK: usize = 64;

/// Largest norm of a block's integers, less what rounding them may add: √64 / 2, and a few units for the f32 arithmetic. A
/// multiple of √64: a block of equal elements is exact.
const NORM: f32 = 46_296.0;

/// Largest integer.
const LARGEST: f32 = 32_767.0;

/// Elements of a block are taken relative to its largest magnitude, or to this where all are smaller: its inverse is finite.
const SMALLEST: f32 = 1.0 / (1u128 << 100) as f32;

/// Bytes of a block of one row of A.
const A_BLOCK: usize = BLOCK * 2;

/// Bytes of a block of a panel's integers: a line holds elements 2p and 2p + 1 of each of the columns, side by side.
const B_LINES: usize = BLOCK * PANEL * 2;

/// Bytes of a block of a panel: the integers, then the scale of each column.
const B_BLOCK: usize = B_LINES + PANEL * 4;

/// Stored types that the unit takes.
pub(in crate::backend::cpu) trait Short: Element {}
impl Short for f16 {}
impl Short for bf16 {}

/// AVX-512 with VNNI.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Vnni(Avx512);

impl Vnni {
    /// # Safety
    /// AVX-512 F, BW, DQ, VL and VNNI, and what the door of AVX2 names, were seen.
    pub(in crate::backend::cpu) unsafe fn new() -> Vnni {
        // SAFETY: the caller's promise.
        Vnni(unsafe { Avx512::new() })
    }
}

/// Bytes from one packed row of A to the next: the blocks' integers, then their scales, in an odd number of cache lines,
/// so that the rows of a tile fall into different sets of the cache.
#[inline(always)]
const fn row_bytes(k: usize) -> usize {
    let blocks = k.div_ceil(BLOCK);
    ((blocks * (A_BLOCK + 4)).div_ceil(64) | 1) * 64
}

/// Packs rows of A.
///
/// # Safety
/// As [`Unit::pack_a`], with the features of [`Vnni`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn pack_a(s: Avx512, from: *const f32, stride: usize, rows: usize, k: usize, a: *mut u8, first: usize) {
    let blocks = k.div_ceil(BLOCK);
    for r in 0..rows {
        // SAFETY: row first + r of packed A has `row_bytes(k)` bytes.
        let to = unsafe { a.add((first + r) * row_bytes(k)) };
        for block in 0..blocks {
            let depth = block * BLOCK;
            let mut x = [s.zero(); BLOCK / LANES];
            let mut largest = _mm512_set1_ps(SMALLEST);
            for (i, x) in x.iter_mut().enumerate() {
                let at = depth + i * LANES;
                // SAFETY: row r is readable for k floats, of which those from `at` on, sixteen at most, are loaded.
                *x = unsafe { s.load_first(from.add(r * stride + at.min(k)), k.saturating_sub(at).min(LANES)) };
                largest = _mm512_max_ps(largest, _mm512_abs_ps(*x));
            }
            let most = s.largest(largest);
            let inverse = s.splat(1.0 / most);
            let mut squares = s.zero();
            for x in x {
                let x = _mm512_mul_ps(x, inverse);
                squares = _mm512_fmadd_ps(x, x, squares);
            }
            // NaN, if there is one, stays: it is not at least `LARGEST`.
            let range = NORM / s.sum(squares).sqrt();
            let range = if range >= LARGEST { LARGEST } else { range };
            let factor = s.splat(range / most);
            // SAFETY: block `block` of this row's integers, and its scale behind all of them.
            unsafe {
                for (i, x) in x.into_iter().enumerate() {
                    let words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(x, factor)));
                    _mm256_storeu_si256(to.add(block * A_BLOCK + i * 2 * LANES).cast(), words);
                }
                to.add(blocks * A_BLOCK + block * 4).cast::<f32>().write(most / range);
            }
        }
    }
}

/// Packs columns `group` · 16 and the fifteen after it of one block of a panel, from its rows, of which `n` count.
///
/// # Safety
/// `to` is a block of a panel, [`B_BLOCK`] writable bytes; with the features of [`Vnni`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn pack_block(rows: &[__m512; BLOCK], n: usize, group: usize, to: *mut u8) {
    let mut most = _mm512_set1_ps(SMALLEST);
    for row in &rows[..n] {
        most = _mm512_max_ps(most, _mm512_abs_ps(*row));
    }
    let inverse = _mm512_div_ps(_mm512_set1_ps(1.0), most);
    let mut squares = _mm512_setzero_ps();
    for row in &rows[..n] {
        let x = _mm512_mul_ps(*row, inverse);
        squares = _mm512_fmadd_ps(x, x, squares);
    }
    // In this order: `min` gives its second operand when either is NaN.
    let range = _mm512_div_ps(_mm512_set1_ps(NORM), _mm512_sqrt_ps(squares));
    let range = _mm512_min_ps(_mm512_set1_ps(LARGEST), range);
    let factor = _mm512_div_ps(range, most);
    for (line, pair) in rows.chunks_exact(2).enumerate().take(n.div_ceil(2)) {
        let even = _mm512_cvtps_epi32(_mm512_mul_ps(pair[0], factor));
        let odd = _mm512_cvtps_epi32(_mm512_mul_ps(pair[1], factor));
        let both = _mm512_mask_blend_epi16(0xaaaa_aaaa, even, _mm512_slli_epi32::<16>(odd));
        // SAFETY: `line` < BLOCK / 2 lines of PANEL pairs, this group's half of it.
        unsafe { _mm512_storeu_si512(to.add((line * PANEL + group * LANES) * 4).cast(), both) };
    }
    // SAFETY: the scales of this group's columns, behind the lines.
    unsafe { _mm512_storeu_ps(to.add(B_LINES + group * LANES * 4).cast(), _mm512_div_ps(most, range)) };
}

/// Packs a panel of columns.
///
/// # Safety
/// As [`Unit::pack_columns`], with the features of [`Vnni`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn pack_columns<E: Short>(s: Avx512, columns: &[*const E], k: usize, panel: *mut u8) {
    for (block, depth) in (0..k).step_by(BLOCK).enumerate() {
        let n = (k - depth).min(BLOCK);
        for group in 0..PANEL / LANES {
            let mut rows = [s.zero(); BLOCK];
            for from in (0..n).step_by(LANES) {
                let mut square = [s.zero(); LANES];
                for (i, line) in square.iter_mut().enumerate() {
                    if let Some(&column) = columns.get(group * LANES + i) {
                        // SAFETY: the column is readable for k elements, of which those from depth + from < k on, sixteen at
                        // most, are loaded.
                        *line = unsafe {
                            match n - from {
                                LANES.. => E::load(s, column.add(depth + from)),
                                n => E::load_first(s, column.add(depth + from), n),
                            }
                        };
                    }
                }
                rows[from..from + LANES].copy_from_slice(&s.transpose(square));
            }
            // SAFETY: block `block` of the panel's.
            unsafe { pack_block(&rows, n, group, panel.add(block * B_BLOCK)) };
        }
    }
}

/// Packs a panel of rows.
///
/// # Safety
/// As [`Unit::pack_rows`], with the features of [`Vnni`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn pack_rows<E: Short>(s: Avx512, from: &[*const E], width: usize, panel: *mut u8) {
    for (block, from) in from.chunks(BLOCK).enumerate() {
        for group in 0..PANEL / LANES {
            let column = (group * LANES).min(width);
            let mut rows = [s.zero(); BLOCK];
            for (row, &from) in rows.iter_mut().zip(from) {
                // SAFETY: `from` is readable for `width` elements, of which those from `column` on, sixteen at most, are
                // loaded.
                *row = unsafe { E::load_first(s, from.add(column), (width - column).min(LANES)) };
            }
            // SAFETY: block `block` of the panel's.
            unsafe { pack_block(&rows, from.len(), group, panel.add(block * B_BLOCK)) };
        }
    }
}

/// Some rows of A, a panel, and where their product goes.
#[derive(Clone, Copy)]
struct Tile {
    a: *const u8,
    panel: *const u8,
    k: usize,
    c: *mut f32,
    /// Floats.
    stride: usize,
    cols: usize,
    add: bool,
}

impl Tile {
    /// The product of `R` rows.
    ///
    /// # Safety
    /// As [`Unit::multiply`], for `R` rows, with the features of [`Vnni`].
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    unsafe fn product<const R: usize>(self) {
        let blocks = self.k.div_ceil(BLOCK);
        let lda = row_bytes(self.k);
        let mut total = [[_mm512_setzero_ps(); 2]; R];
        for block in 0..blocks {
            let pairs = (self.k - block * BLOCK).min(BLOCK).div_ceil(2);
            let mut sums = [[_mm512_setzero_si512(); 2]; R];
            // SAFETY: block `block` of the panel and of R packed rows, of whose pairs the first `pairs` were written, and
            // the scales behind them.
            unsafe {
                let a = self.a.add(block * A_BLOCK);
                let b = self.panel.add(block * B_BLOCK);
                for pair in 0..pairs {
                    let line = b.add(pair * PANEL * 4);
                    let columns = [_mm512_loadu_si512(line.cast()), _mm512_loadu_si512(line.add(64).cast())];
                    for r in 0..R {
                        let x = _mm512_set1_epi32(a.add(r * lda + pair * 4).cast::<i32>().read());
                        for i in 0..2 {
                            sums[r][i] = multiply_add(sums[r][i], x, columns[i]);
                        }
                    }
                }
                let by_column = [_mm512_loadu_ps(b.add(B_LINES).cast()), _mm512_loadu_ps(b.add(B_LINES + 64).cast())];
                for r in 0..R {
                    let by_row =
                        _mm512_set1_ps(self.a.add(r * lda + blocks * A_BLOCK + block * 4).cast::<f32>().read());
                    for i in 0..2 {
                        let sum = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][i]), by_column[i]);
                        total[r][i] = _mm512_fmadd_ps(sum, by_row, total[r][i]);
                    }
                }
            }
        }
        for r in 0..R {
            for i in 0..2 {
                let column = (i * LANES).min(self.cols);
                let count = (self.cols - column).min(LANES);
                // SAFETY: C's row r is writable for `cols` floats, of which `count` from `column` on are touched.
                unsafe {
                    let c = self.c.add(r * self.stride + column);
                    let mask = ((1u32 << count) - 1) as __mmask16;
                    if count == LANES {
                        let before = if self.add { _mm512_loadu_ps(c) } else { _mm512_setzero_ps() };
                        _mm512_storeu_ps(c, _mm512_add_ps(before, total[r][i]));
                    } else {
                        let before = if self.add { _mm512_maskz_loadu_ps(mask, c) } else { _mm512_setzero_ps() };
                        _mm512_mask_storeu_ps(c, mask, _mm512_add_ps(before, total[r][i]));
                    }
                }
            }
        }
    }
}

/// In each lane, `sum` and the products of its two integers. In assembly, since the compiler turns the intrinsic into a
/// multiplication and an addition, which come sooner in a chain of sums, but half as often.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn multiply_add(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction is VNNI's and touches these registers only.
    unsafe {
        asm!(
            "vpdpwssd {sum}, {a}, {b}",
            sum = inout(zmm_reg) sum, a = in(zmm_reg) a, b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

impl<E: Short> Unit<E> for Vnni {
    const ROWS: usize = 1;

    fn a_row_bytes(k: usize) -> usize {
        row_bytes(k)
    }

    fn panel_bytes(k: usize) -> usize {
        k.div_ceil(BLOCK) * B_BLOCK
    }

    unsafe fn pack_a(self, from: *const f32, stride: usize, rows: usize, k: usize, a: *mut u8, first: usize) {
        // SAFETY: the caller's promises; a `Vnni` proves the features.
        unsafe { pack_a(self.0, from, stride, rows, k, a, first) }
    }

    unsafe fn pack_columns(self, columns: &[*const E], k: usize, panel: *mut u8) {
        // SAFETY: the caller's promises; a `Vnni` proves the features.
        unsafe { pack_columns(self.0, columns, k, panel) }
    }

    unsafe fn pack_rows(self, rows: &[*const E], width: usize, panel: *mut u8) {
        // SAFETY: the caller's promises; a `Vnni` proves the features.
        unsafe { pack_rows(self.0, rows, width, panel) }
    }

    unsafe fn multiply(
        self,
        a: *const u8,
        first: usize,
        rows: usize,
        panel: *const u8,
        k: usize,
        c: *mut f32,
        stride: usize,
        cols: usize,
        add: bool,
    ) {
        let mut r = 0;
        while r < rows {
            // SAFETY: the caller's promises about A, the panel and C, handed on for the rows from r on, of which no more
            // than are left are computed; a `Vnni` proves the features.
            unsafe {
                let a = a.add((first + r) * row_bytes(k));
                let tile = Tile { a, panel, k, c: c.add(r * stride), stride, cols, add };
                match rows - r {
                    14.. => tile.product::<14>(),
                    7.. => tile.product::<7>(),
                    3.. => tile.product::<3>(),
                    _ => tile.product::<1>(),
                }
            }
            r += match rows - r {
                14.. => 14,
                7.. => 7,
                3.. => 3,
                _ => 1,
            };
        }
    }

    fn session(self) -> impl Sized {}
}
