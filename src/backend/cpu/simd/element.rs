//! The element types that weights, keys and values are stored in.

use super::Simd;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// A stored floating-point type.
pub(in crate::backend::cpu) trait Element: Copy + Send + Sync + 'static {
    /// Sixteen elements, widened.
    /// # Safety
    /// `from` is readable for 16 elements.
    unsafe fn load<S: Simd>(simd: S, from: *const Self) -> S::V;

    /// The first `n`, widened, then zeros.
    /// # Safety
    /// `from` is readable for `n` elements, n ≤ 16; nothing past them is touched.
    unsafe fn load_first<S: Simd>(simd: S, from: *const Self, n: usize) -> S::V;

    /// Widens a slice; lengths are equal.
    fn widen(from: &[Self], to: &mut [f32]);

    /// Rounds a slice to nearest, ties to even; lengths are equal.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f32) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load(from) }
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(simd: S, from: *const f32, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_first(from, n) }
    }

    fn widen(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn narrow(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const f16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_f16(from) }
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(simd: S, from: *const f16, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_first_f16(from, n) }
    }

    fn widen(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, from: *const bf16) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_bf16(from) }
    }

    #[inline(always)]
    unsafe fn load_first<S: Simd>(simd: S, from: *const bf16, n: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { simd.load_first_bf16(from, n) }
    }

    fn widen(from: &[bf16], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [bf16]) {
        to.convert_from_f32_slice(from);
    }
}

/// Evaluates `$body` with `$element` as the type that `$dtype` names.
macro_rules! for_dtype {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            $crate::backend::DType::F32 => {
                type $element = f32;
                $body
            }
            $crate::backend::DType::F16 => {
                type $element = half::f16;
                $body
            }
            $crate::backend::DType::BF16 => {
                type $element = half::bf16;
                $body
            }
            $crate::backend::DType::U32 => panic!("u32 is not a floating-point type"),
        }
    };
}
pub(in crate::backend::cpu) use for_dtype;
