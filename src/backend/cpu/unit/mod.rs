//! Matrix units: what multiplies blocks of matrices during prefill.
//!
//! A product C += A · B runs in two steps, the same for every unit, so that `gemm` and prefill attention are written
//! once: both operands are packed into the unit's own form, *A* rows of activations (f32), *B* in panels of
//! [`PANEL`] columns of a stored type; then [`Unit::multiply`] does the arithmetic on one panel.
//!
//! - [`Fma`]: vector multiply-add in f32, on every instruction set.
//! - [`Amx`]: the tile unit, which takes bf16; f32 and f16 operands are split into two bf16 each.
//!
//! Packing pads with zeros: the depth to the unit's step, B to whole panels, A to whole blocks of rows.

#[cfg(target_arch = "x86_64")]
mod amx;
mod fma;

use super::simd::{Element, Kernel, Level, Proven, Simd};
#[cfg(target_arch = "x86_64")]
pub(super) use amx::{Amx, available as amx_available};
pub(super) use fma::Fma;
use std::marker::PhantomData;

/// Columns of a panel of B.
pub(super) const PANEL: usize = 32;

/// A way to multiply matrices of f32 (A) by matrices of `E` (B). Copied into every thread.
pub(super) trait Unit<E: Element>: Copy + Send + Sync {
    /// Rows that [`Unit::pack_a`] may be split at, and that A is padded to.
    const ROWS: usize;

    /// Bytes of packed A per row (of padded rows) at depth `k`.
    fn a_row_bytes(k: usize) -> usize;

    /// Bytes of a packed panel of B at depth `k`.
    fn panel_bytes(k: usize) -> usize;

    /// Packs `rows` rows of `k` floats, `stride` apart, as the rows from `first` (a multiple of [`Unit::ROWS`]) on.
    ///
    /// # Safety
    /// The rows are readable; `a` is writable for `a_row_bytes(k)` × the padded number of rows, aligned to 64.
    unsafe fn pack_a(self, from: *const f32, stride: usize, rows: usize, k: usize, a: *mut u8, first: usize);

    /// Packs a panel whose column j is the `k` consecutive elements at `columns[j]` (rows of a weight, keys); columns
    /// that are not there are zero.
    ///
    /// # Safety
    /// `columns` are at most [`PANEL`] addresses, each readable for `k` elements; `panel` is writable for
    /// `panel_bytes(k)`, aligned to 64.
    unsafe fn pack_columns(self, columns: &[*const E], k: usize, panel: *mut u8);

    /// Packs a panel whose row i is the `width` ≤ [`PANEL`] consecutive elements at `rows[i]` (values).
    ///
    /// # Safety
    /// Each address in `rows` is readable for `width` elements; `panel` is writable for `panel_bytes(rows.len())`,
    /// aligned to 64.
    unsafe fn pack_rows(self, rows: &[*const E], width: usize, panel: *mut u8);

    /// C = A · B, or C += with `add`, for rows `first..first + rows` of packed A (`first` a multiple of
    /// [`Unit::ROWS`]) and one panel of which `cols` columns count. Row r of the result goes to
    /// `c + (r − first) · stride`.
    ///
    /// # Safety
    /// `a` and `panel` were packed with depth `k`; the result's rows are writable for `cols` floats, nobody else uses
    /// them, and the calling thread is inside [`Unit::session`].
    #[allow(clippy::too_many_arguments)]
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
    );

    /// Prepares the calling thread for [`Unit::multiply`], until the guard is dropped.
    fn session(self) -> impl Sized;
}

/// Whether the machine has the AMX unit; nowhere but on x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn amx_available() -> bool {
    false
}

/// A computation that is generic over the unit.
pub(super) trait Task<E: Element> {
    /// What it returns.
    type Output;

    /// The computation; implementations are `#[inline(always)]`, as those of `Kernel`.
    fn run<U: Unit<E>>(self, unit: U) -> Self::Output;
}

/// What runs tasks on one unit. `gemm` and prefill attention get one from [`for_unit`] and know no more about it.
pub(super) trait Runner<E: Element>: Copy + Send + Sync {
    /// Runs `task` on this unit.
    fn run<T: Task<E>>(self, task: T) -> T::Output;

    /// The sizes of operands of depth `k`.
    fn sizes(self, k: usize) -> Sizes {
        self.run(AskSizes(k))
    }
}

/// What [`Unit`] says about operands of one depth.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) a_row_bytes: usize,
    pub(super) panel_bytes: usize,
    /// [`Unit::ROWS`].
    pub(super) rows: usize,
}

struct AskSizes(usize);

impl<E: Element> Task<E> for AskSizes {
    type Output = Sizes;

    #[inline(always)]
    fn run<U: Unit<E>>(self, _unit: U) -> Sizes {
        Sizes { a_row_bytes: U::a_row_bytes(self.0), panel_bytes: U::panel_bytes(self.0), rows: U::ROWS }
    }
}

/// The vector unit of a level.
#[derive(Clone, Copy)]
pub(super) struct Vectors(pub(super) Proven);

impl<E: Element> Runner<E> for Vectors {
    fn run<T: Task<E>>(self, task: T) -> T::Output {
        self.0.run(OnVectors { task, element: PhantomData })
    }
}

/// A task as a kernel.
struct OnVectors<T, E> {
    task: T,
    element: PhantomData<E>,
}

impl<E: Element, T: Task<E>> Kernel for OnVectors<T, E> {
    type Output = T::Output;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> T::Output {
        self.task.run(Fma(simd))
    }
}

#[cfg(target_arch = "x86_64")]
impl<E: amx::Split> Runner<E> for Amx {
    fn run<T: Task<E>>(self, task: T) -> T::Output {
        task.run(self)
    }
}

/// Evaluates `$body` with `$element` as the type that `$dtype` names and `$runner` as the best unit for it at `$level`.
macro_rules! for_unit {
    ($level:expr, $dtype:expr, ($runner:ident, $element:ident) => $body:expr) => {{
        let level: $crate::backend::cpu::simd::Proven = $level;
        let dtype: $crate::backend::DType = $dtype;
        match $crate::backend::cpu::unit::amx_of(level) {
            #[cfg(target_arch = "x86_64")]
            Some($runner) if dtype == $crate::backend::DType::BF16 => {
                type $element = half::bf16;
                $body
            }
            #[cfg(target_arch = "x86_64")]
            Some($runner) if dtype == $crate::backend::DType::F16 => {
                type $element = half::f16;
                $body
            }
            _ => {
                let $runner = $crate::backend::cpu::unit::Vectors(level);
                $crate::backend::cpu::simd::for_dtype!(dtype, $element => $body)
            }
        }
    }};
}
pub(super) use for_unit;

/// The tile unit, where the level includes it.
#[cfg(target_arch = "x86_64")]
pub(super) fn amx_of(level: Proven) -> Option<Amx> {
    // SAFETY: a proven level was detected on this machine; `Level::Amx` includes AVX-512, its BF16, and `available`.
    (level.level() == Level::Amx).then(|| unsafe { Amx::new() })
}

/// The tile unit, where the level includes it: nowhere but on x86-64.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn amx_of(_level: Proven) -> Option<()> {
    None
}
