//! AVX2 with FMA and F16C: a vector is two registers, lanes 0–7 and 8–15.

use super::{Kernel, LANES, Simd};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Proof of AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Runs `kernel` with AVX2.
///
/// # Safety
/// The machine has the features named here.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn door<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx2(()))
}

type V = (__m256, __m256);

/// Calls intrinsics that need nothing but the instruction set.
macro_rules! with_proof {
    ($e:expr) => {
        // SAFETY: a value of `Avx2` exists only inside `door`, whose caller has seen the features; the intrinsic
        // touches registers only.
        unsafe { $e }
    };
}

/// One intrinsic on both halves.
macro_rules! both {
    ($f:path, $($a:ident),*) => { with_proof!(($f($($a.0),*), $f($($a.1),*))) };
}

/// The first `n` of `from` in an array, zeros behind them.
///
/// # Safety
/// `from` is readable for `n` elements, n ≤ 16.
#[inline(always)]
unsafe fn padded<T: Copy>(from: *const T, n: usize, zero: T) -> [T; LANES] {
    debug_assert!(n <= LANES);
    let mut out = [zero; LANES];
    // SAFETY: `n` readable elements by the caller's promise, at most the array's 16.
    unsafe { std::ptr::copy_nonoverlapping(from, out.as_mut_ptr(), n) };
    out
}

impl Simd for Avx2 {
    type V = V;
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        with_proof!((_mm256_set1_ps(x), _mm256_set1_ps(x)))
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> V {
        // SAFETY: 16 readable elements, by the caller's promise; features by `self`.
        unsafe { (_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> V {
        // SAFETY: as above.
        unsafe {
            let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            (_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> V {
        // SAFETY: as above.
        unsafe {
            let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
            (widen_bf16(low), widen_bf16(high))
        }
    }

    #[inline(always)]
    unsafe fn load_first(self, from: *const f32, n: usize) -> V {
        // SAFETY: `padded` reads the `n` elements that the caller promises; the array has 16.
        unsafe { self.load(padded(from, n, 0.0).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load_first_f16(self, from: *const f16, n: usize) -> V {
        // SAFETY: as above.
        unsafe { self.load_f16(padded(from, n, f16::ZERO).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn load_first_bf16(self, from: *const bf16, n: usize) -> V {
        // SAFETY: as above.
        unsafe { self.load_bf16(padded(from, n, bf16::ZERO).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn widen_eight(self, from: *const f16, to: *mut f32) {
        // SAFETY: 8 elements on either side, by the caller's promise; features by `self`.
        unsafe { _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> V {
        // SAFETY: as above.
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            let (low, high) = (_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes)));
            (_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }

    #[inline(always)]
    unsafe fn pick(self, table: V, words: *const u32, shift: u32) -> V {
        // SAFETY: 16 readable words, by the caller's promise; features by `self`.
        unsafe {
            let (low, high) = (_mm256_loadu_si256(words.cast()), _mm256_loadu_si256(words.add(8).cast()));
            (pick_half(table, low, shift), pick_half(table, high, shift))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: V) {
        // SAFETY: 16 writable elements, by the caller's promise.
        unsafe {
            _mm256_storeu_ps(to, v.0);
            _mm256_storeu_ps(to.add(8), v.1);
        }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize, v: V) {
        debug_assert!(n <= LANES);
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the array has 16 elements, of which the first `n` go where the caller promises room for them.
        unsafe {
            self.store(lanes.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n);
        }
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        both!(_mm256_add_ps, a, b)
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        both!(_mm256_sub_ps, a, b)
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        both!(_mm256_mul_ps, a, b)
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        both!(_mm256_div_ps, a, b)
    }

    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        both!(_mm256_fmadd_ps, a, b, c)
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        both!(_mm256_max_ps, a, b)
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        both!(_mm256_min_ps, a, b)
    }

    #[inline(always)]
    fn round(self, a: V) -> V {
        both!(round_half, a)
    }

    #[inline(always)]
    fn scale2(self, a: V, n: V) -> V {
        both!(scale2_half, a, n)
    }

    #[inline(always)]
    fn power(self, a: V) -> V {
        both!(power_half, a)
    }

    #[inline(always)]
    fn if_less(self, a: V, b: V, yes: V, no: V) -> V {
        both!(if_less_half, a, b, yes, no)
    }

    #[inline(always)]
    fn sum(self, a: V) -> f32 {
        with_proof!({
            let a = _mm256_add_ps(a.0, a.1);
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn largest(self, a: V) -> f32 {
        with_proof!({
            let a = _mm256_max_ps(a.0, a.1);
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn sums(self, v: [V; LANES]) -> V {
        let mut out = [0.0f32; LANES];
        for i in 0..LANES {
            out[i] = self.sum(v[i]);
        }
        self.load_slice(&out)
    }

    #[inline(always)]
    fn transpose(self, v: [V; LANES]) -> [V; LANES] {
        let mut lanes = [[0.0f32; LANES]; LANES];
        for i in 0..LANES {
            self.store_slice(&mut lanes[i], v[i]);
        }
        let mut out = [self.zero(); LANES];
        for j in 0..LANES {
            let mut column = [0.0f32; LANES];
            for i in 0..LANES {
                column[i] = lanes[i][j];
            }
            out[j] = self.load_slice(&column);
        }
        out
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        // A prefetch of any address is harmless.
        with_proof!(_mm_prefetch::<_MM_HINT_T0>(address.cast()))
    }
}

/// bf16 is the upper half of f32.
#[inline]
#[target_feature(enable = "avx2")]
fn widen_bf16(x: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(x)))
}

/// Eight lanes of [`Simd::pick`]: three bits of an index choose in each half of the table, the fourth between them.
#[inline]
#[target_feature(enable = "avx2")]
fn pick_half(table: V, words: __m256i, shift: u32) -> __m256 {
    let index = _mm256_srlv_epi32(words, _mm256_set1_epi32(shift as i32));
    let (low, high) = (_mm256_permutevar8x32_ps(table.0, index), _mm256_permutevar8x32_ps(table.1, index));
    _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn power_half(a: __m256) -> __m256 {
    _mm256_and_ps(a, _mm256_castsi256_ps(_mm256_set1_epi32(0xff80_0000_u32 as i32)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn round_half(a: __m256) -> __m256 {
    _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
}

#[inline]
#[target_feature(enable = "avx2")]
fn scale2_half(a: __m256, n: __m256) -> __m256 {
    let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    _mm256_mul_ps(a, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn if_less_half(a: __m256, b: __m256, yes: __m256, no: __m256) -> __m256 {
    _mm256_blendv_ps(no, yes, _mm256_cmp_ps::<_CMP_LT_OQ>(a, b))
}
