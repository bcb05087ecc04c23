//! The vector unit: blocks of C in registers, rows of A broadcast element by element against a panel of B in f32.

use super::{PANEL, Unit};
use crate::backend::cpu::simd::{Element, LANES, Simd};

/// Vector multiply-add on the instruction set `S`.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Fma<S>(pub(in crate::backend::cpu) S);

/// Floats from one packed row of A to the next: rounded up to a cache line, plus one more, so that the rows of a block
/// do not all fall into the same set of the cache when k is a power of two.
const fn row_floats(k: usize) -> usize {
    k.next_multiple_of(16) + 16
}

impl<S: Simd, E: Element> Unit<E> for Fma<S> {
    const ROWS: usize = 1;

    #[inline(always)]
    fn a_row_bytes(k: usize) -> usize {
        row_floats(k) * 4
    }

    #[inline(always)]
    fn panel_bytes(k: usize) -> usize {
        k * PANEL * 4
    }

    #[inline(always)]
    unsafe fn pack_a(self, from: *const f32, stride: usize, rows: usize, k: usize, a: *mut u8, first: usize) {
        let to = a.cast::<f32>();
        for r in 0..rows {
            // SAFETY: the caller promises readable rows and room for all packed rows, `row_floats(k)` ≥ k each.
            unsafe {
                std::ptr::copy_nonoverlapping(from.add(r * stride), to.add((first + r) * row_floats(k)), k);
            }
        }
    }

    #[inline(always)]
    unsafe fn pack_columns(self, columns: &[*const E], k: usize, panel: *mut u8) {
        let s = self.0;
        let to = panel.cast::<f32>();
        for group in 0..PANEL / LANES {
            let mut depth = 0;
            while depth < k {
                let n = (k - depth).min(LANES);
                let mut square = [s.zero(); LANES];
                for i in 0..LANES {
                    if let Some(&column) = columns.get(group * LANES + i) {
                        // SAFETY: the column is readable for `k` elements, and depth + n ≤ k.
                        square[i] = unsafe {
                            if n == LANES {
                                E::load(s, column.add(depth))
                            } else {
                                E::load_first(s, column.add(depth), n)
                            }
                        };
                    }
                }
                let square = s.transpose(square);
                for i in 0..n {
                    // SAFETY: depth + i < k, so this is row depth + i of the panel's k rows of PANEL floats.
                    unsafe { s.store(to.add((depth + i) * PANEL + group * LANES), square[i]) };
                }
                depth += LANES;
            }
        }
    }

    #[inline(always)]
    unsafe fn pack_rows(self, rows: &[*const E], width: usize, panel: *mut u8) {
        let s = self.0;
        let to = panel.cast::<f32>();
        for (i, &row) in rows.iter().enumerate() {
            for group in 0..PANEL / LANES {
                let from = group * LANES;
                let n = width.saturating_sub(from).min(LANES);
                // SAFETY: `row` is readable for `width` elements, of which n from `from` on are loaded (none, and at
                // the row's start, when it ends before); row i of the panel has PANEL floats.
                unsafe {
                    let v = if n == LANES {
                        E::load(s, row.add(from))
                    } else {
                        E::load_first(s, row.add(from.min(width)), n)
                    };
                    s.store(to.add(i * PANEL + from), v);
                }
            }
        }
    }

    #[inline(always)]
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
        let s = self.0;
        // SAFETY: the caller's promises about A, the panel and C, handed on block by block: `r` never passes `rows`,
        // and `Block` touches its own rows and `cols` columns only.
        unsafe {
            let a = a.cast::<f32>().add(first * row_floats(k));
            let at = |r: usize| Block {
                a: a.add(r * row_floats(k)),
                lda: row_floats(k),
                b: panel.cast(),
                k,
                c: c.add(r * stride),
                ldc: stride,
                cols,
                add,
            };
            let mut r = 0;
            if S::WIDE {
                while rows - r >= 14 {
                    at(r).full::<S, 14>(s);
                    r += 14;
                }
                while rows - r >= 7 {
                    at(r).full::<S, 7>(s);
                    r += 7;
                }
                while rows - r >= 3 {
                    at(r).full::<S, 3>(s);
                    r += 3;
                }
            } else {
                while rows - r >= 6 {
                    at(r).halves::<S, 6>(s);
                    r += 6;
                }
                while rows - r >= 3 {
                    at(r).halves::<S, 3>(s);
                    r += 3;
                }
            }
            while r < rows {
                at(r).full::<S, 1>(s);
                r += 1;
            }
        }
    }

    #[inline(always)]
    fn session(self) -> impl Sized {}
}

/// One block of the product: some rows of A, one panel.
#[derive(Clone, Copy)]
struct Block {
    a: *const f32,
    lda: usize,
    b: *const f32,
    k: usize,
    c: *mut f32,
    ldc: usize,
    cols: usize,
    add: bool,
}

impl Block {
    /// All 32 columns at once.
    ///
    /// # Safety
    /// As [`Unit::multiply`], for `R` rows.
    #[inline(always)]
    unsafe fn full<S: Simd, const R: usize>(self, s: S) {
        // SAFETY: the caller's promises; the panel's rows have PANEL = 2 · 16 floats.
        unsafe { self.columns::<S, R, 2>(s, 0) }
    }

    /// Sixteen columns after the other, where registers are few.
    ///
    /// # Safety
    /// As [`Unit::multiply`], for `R` rows.
    #[inline(always)]
    unsafe fn halves<S: Simd, const R: usize>(self, s: S) {
        // SAFETY: the caller's promises; the panel's rows have PANEL = 2 · 16 floats.
        unsafe {
            self.columns::<S, R, 1>(s, 0);
            if self.cols > LANES {
                self.columns::<S, R, 1>(s, LANES);
            }
        }
    }

    /// `R` rows by `N` vectors, from column `from` on.
    ///
    /// # Safety
    /// As [`Unit::multiply`], for `R` rows; `from + 16 · N ≤ PANEL`.
    #[inline(always)]
    unsafe fn columns<S: Simd, const R: usize, const N: usize>(self, s: S, from: usize) {
        let mut sums = [[s.zero(); N]; R];
        for depth in 0..self.k {
            // SAFETY: depth < k: row `depth` of the panel and element `depth` of each of R packed rows exist.
            unsafe {
                let b = self.b.add(depth * PANEL + from);
                let mut columns = [s.zero(); N];
                for n in 0..N {
                    columns[n] = s.load(b.add(n * LANES));
                }
                for r in 0..R {
                    let x = s.splat(self.a.add(r * self.lda + depth).read());
                    for n in 0..N {
                        sums[r][n] = s.fma(x, columns[n], sums[r][n]);
                    }
                }
            }
        }
        for r in 0..R {
            for n in 0..N {
                let column = from + n * LANES;
                let count = self.cols.saturating_sub(column).min(LANES);
                // SAFETY: C's row r is writable for `cols` floats, of which `count` from `column` on are touched.
                unsafe {
                    let c = self.c.add(r * self.ldc + column.min(self.cols));
                    if count == LANES {
                        let before = if self.add { s.load(c) } else { s.zero() };
                        s.store(c, s.add(before, sums[r][n]));
                    } else {
                        let before = if self.add { s.load_first(c, count) } else { s.zero() };
                        s.store_first(c, count, s.add(before, sums[r][n]));
                    }
                }
            }
        }
    }
}
