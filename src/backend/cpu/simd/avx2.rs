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
    unsafe fn dequantize<const FIRST: i32>(self, words: *const u32, shift: u32, scale: f32, min: f32) -> [V; 2] {
        // Permutations, which would look results up, take longer here than computing them.
        // SAFETY: 16 readable words, by the caller's promise; features by `self`.
        let (a, b) = unsafe { (_mm256_loadu_si256(words.cast()), _mm256_loadu_si256(words.add(8).cast())) };
        let (scale, min) = (self.splat(scale), self.splat(min));
        let low = with_proof!((four_bits::<FIRST>(a, shift), four_bits::<FIRST>(b, shift)));
        let high = with_proof!((four_bits::<FIRST>(a, 16 + shift), four_bits::<FIRST>(b, 16 + shift)));
        [self.round_bf16(self.fma(low, scale, min)), self.round_bf16(self.fma(high, scale, min))]
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
        with_proof!(sums(v))
    }

    #[inline(always)]
    fn transpose(self, v: [V; LANES]) -> [V; LANES] {
        with_proof!(transpose(v))
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

/// [`Simd::sums`], in the order of AVX-512: of each quarter of a vector, then of those.
#[inline]
#[target_feature(enable = "avx2")]
fn sums(v: [V; LANES]) -> V {
    let mut eights = [_mm256_setzero_ps(); 2];
    for i in 0..2 {
        let (a, b) = (8 * i, 8 * i + 4);
        let low = sums_of_halves(
            sums_of_four(v[a].0, v[a + 1].0, v[a + 2].0, v[a + 3].0),
            sums_of_four(v[b].0, v[b + 1].0, v[b + 2].0, v[b + 3].0),
        );
        let high = sums_of_halves(
            sums_of_four(v[a].1, v[a + 1].1, v[a + 2].1, v[a + 3].1),
            sums_of_four(v[b].1, v[b + 1].1, v[b + 2].1, v[b + 3].1),
        );
        eights[i] = _mm256_add_ps(low, high);
    }
    (eights[0], eights[1])
}

/// In each half, the sums of its four lanes of each of the four.
#[inline]
#[target_feature(enable = "avx2")]
fn sums_of_four(a: __m256, b: __m256, c: __m256, d: __m256) -> __m256 {
    let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
    _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)))
}

/// The sum of `a`'s halves, then that of `b`'s.
#[inline]
#[target_feature(enable = "avx2")]
fn sums_of_halves(a: __m256, b: __m256) -> __m256 {
    _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
}

/// Transposes a 16 × 16 matrix: squares of 8 × 8, of which those beside the diagonal change places.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(v: [V; LANES]) -> [V; LANES] {
    let [mut a, mut b, mut c, mut d] = [[_mm256_setzero_ps(); 8]; 4];
    for i in 0..8 {
        (a[i], b[i]) = v[i];
        (c[i], d[i]) = v[8 + i];
    }
    let (a, b, c, d) = (transpose_eight(a), transpose_eight(b), transpose_eight(c), transpose_eight(d));
    let mut out = v;
    for i in 0..8 {
        out[i] = (a[i], c[i]);
        out[8 + i] = (b[i], d[i]);
    }
    out
}

/// Transposes an 8 × 8 matrix: pairs, fours, then halves of a register.
#[inline]
#[target_feature(enable = "avx2")]
fn transpose_eight(v: [__m256; 8]) -> [__m256; 8] {
    // Register 4 · i + j holds column j, and in its other half 4 + j, of rows 4 · i …
    let mut fours = v;
    for i in [0, 4] {
        let (ab_low, ab_high) = (_mm256_unpacklo_ps(v[i], v[i + 1]), _mm256_unpackhi_ps(v[i], v[i + 1]));
        let (cd_low, cd_high) = (_mm256_unpacklo_ps(v[i + 2], v[i + 3]), _mm256_unpackhi_ps(v[i + 2], v[i + 3]));
        let (ab_low, cd_low) = (_mm256_castps_pd(ab_low), _mm256_castps_pd(cd_low));
        let (ab_high, cd_high) = (_mm256_castps_pd(ab_high), _mm256_castps_pd(cd_high));
        fours[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low));
        fours[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low));
        fours[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high));
        fours[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high));
    }
    let mut out = v;
    for j in 0..4 {
        out[j] = _mm256_permute2f128_ps::<0x20>(fours[j], fours[4 + j]);
        out[4 + j] = _mm256_permute2f128_ps::<0x31>(fours[j], fours[4 + j]);
    }
    out
}

/// Four bits of each word and `FIRST`.
#[inline]
#[target_feature(enable = "avx2")]
fn four_bits<const FIRST: i32>(words: __m256i, shift: u32) -> __m256 {
    let bits = _mm256_srlv_epi32(words, _mm256_set1_epi32(shift as i32));
    let q = _mm256_and_si256(bits, _mm256_set1_epi32(15));
    _mm256_cvtepi32_ps(_mm256_add_epi32(q, _mm256_set1_epi32(FIRST)))
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
