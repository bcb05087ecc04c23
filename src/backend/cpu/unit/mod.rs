//! Matrix units: what multiplies blocks of matrices during prefill.
//!
//! A product C += A · B runs in two steps, the same for every unit, so that `gemm` and prefill attention are written
//! once: both operands are packed into the unit's own form, *A* rows of activations (f32), *B* in panels of
//! [`PANEL`] columns of a stored type; then [`Unit::multiply`] does the arithmetic on one panel.
//!
//! - [`Fma`]: vector multiply-add in f32, on every instruction set.
//! - [`Vnni`]: vector multiply-add of 16-bit integers, to which blocks of both operands are scaled.
//! - [`Amx`]: the tile unit, which takes bf16; f32 and f16 operands are split into two bf16 each.
//!
//! Packing pads with zeros: the depth to the unit's step, B to whole panels, A to whole blocks of rows.

#[cfg(target_arch = "x86_64")]
mod amx;
mod fma;
#[cfg(target_arch = "x86_64")]
mod vnni;

#[cfg(target_arch = "x86_64")]
use super::simd::Level;
use super::simd::{Element, Kernel, Proven, Simd};
use crate::backend::DType;
#[cfg(target_arch = "x86_64")]
pub(super) use amx::{Amx, available as amx_available};
pub(super) use fma::Fma;
use std::marker::PhantomData;
#[cfg(target_arch = "x86_64")]
pub(super) use vnni::Vnni;

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

#[cfg(target_arch = "x86_64")]
impl<E: vnni::Short> Runner<E> for Vnni {
    fn run<T: Task<E>>(self, task: T) -> T::Output {
        task.run(self)
    }
}

/// The unit for a stored type at a level.
pub(super) enum Choice {
    Vectors(Vectors),
    #[cfg(target_arch = "x86_64")]
    Vnni(Vnni),
    #[cfg(target_arch = "x86_64")]
    Amx(Amx),
}

impl Choice {
    /// The fastest unit whose error is that of few units in the last place of `dtype`, or less.
    pub(super) fn new(level: Proven, dtype: DType) -> Choice {
        #[cfg(target_arch = "x86_64")]
        match level.level() {
            _ if dtype == DType::F32 => {}
            // SAFETY: a proven level was detected on this machine; `Level::Vnni` includes AVX-512 and its VNNI.
            Level::Vnni => return Choice::Vnni(unsafe { Vnni::new() }),
            // SAFETY: likewise; `Level::Amx` includes AVX-512, its BF16, and `available`.
            Level::Amx => return Choice::Amx(unsafe { Amx::new() }),
            Level::Scalar | Level::Avx2 | Level::Avx512 => {}
        }
        let _ = dtype;
        Choice::Vectors(Vectors(level))
    }
}

/// Evaluates `$body` with `$element` as the type that `$dtype` names and `$runner` as the best unit for it at `$level`.
macro_rules! for_unit {
    ($level:expr, $dtype:expr, ($runner:ident, $element:ident) => $body:expr) => {{
        let dtype: $crate::backend::DType = $dtype;
        match $crate::backend::cpu::unit::Choice::new($level, dtype) {
            $crate::backend::cpu::unit::Choice::Vectors($runner) => {
                $crate::backend::cpu::simd::for_dtype!(dtype, $element => $body)
            }
            #[cfg(target_arch = "x86_64")]
            $crate::backend::cpu::unit::Choice::Vnni($runner) => {
                $crate::backend::cpu::unit::for_half!(dtype, $element => $body)
            }
            #[cfg(target_arch = "x86_64")]
            $crate::backend::cpu::unit::Choice::Amx($runner) => {
                $crate::backend::cpu::unit::for_half!(dtype, $element => $body)
            }
        }
    }};
}
pub(super) use for_unit;

/// Evaluates `$body` with `$element` as the type of two bytes that `$dtype` names: units other than the vectors' take no
/// other.
macro_rules! for_half {
    ($dtype:expr, $element:ident => $body:expr) => {
        if $dtype == $crate::backend::DType::F16 {
            type $element = half::f16;
            $body
        } else {
            type $element = half::bf16;
            $body
        }
    };
}
pub(super) use for_half;
