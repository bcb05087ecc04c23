//! AVX-512: a vector is one register.

use super::{Kernel, LANES, Simd, levels};
use half::{bf16, f16};
use std::arch::x86_64::*;

/// Proof of AVX-512 F, BW, DQ and VL.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Avx512(());

impl Avx512 {
    /// # Safety
    /// The machine has the features of [`door`], and what is called with the proof is compiled for them.
    pub(in crate::backend::cpu) unsafe fn new() -> Avx512 {
        Avx512(())
    }
}

/// Runs `kernel` with AVX-512.
///
/// # Safety
/// The machine has the features named here, and those of AVX2's door.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn door<K: Kernel>(kernel: K) -> K::Output {
    kernel.run(Avx512(()))
}

/// The first `n` of sixteen lanes.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    debug_assert!(n <= LANES);
    ((1u32 << n) - 1) as __mmask16
}

/// Calls intrinsics that need nothing but the instruction set.
macro_rules! with_proof {
    ($e:expr) => {
        // SAFETY: a value of `Avx512` is made only where the features were seen, in `door` and by the callers of `new`;
        // the intrinsic touches registers only.
        unsafe { $e }
    };
}

impl Simd for Avx512 {
    type V = __m512;
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        with_proof!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> __m512 {
        // SAFETY: 16 readable elements, by the caller's promise; features by `self`.
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> __m512 {
        // SAFETY: as above.
        unsafe { widen_bf16(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_first(self, from: *const f32, n: usize) -> __m512 {
        // SAFETY: masked-out elements are not touched; the others are readable by the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(first(n), from) }
    }

    #[inline(always)]
    unsafe fn load_first_f16(self, from: *const f16, n: usize) -> __m512 {
        // SAFETY: as above.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_first_bf16(self, from: *const bf16, n: usize) -> __m512 {
        // SAFETY: as above.
        unsafe { widen_bf16(_mm256_maskz_loadu_epi16(first(n), from.cast())) }
    }

    #[inline(always)]
    unsafe fn widen_eight(self, from: *const f16, to: *mut f32) {
        // SAFETY: 8 elements on either side, by the caller's promise; features by `self`.
        unsafe { _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> __m512 {
        // SAFETY: 16 readable elements, by the caller's promise; features by `self`.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn dequantize<const FIRST: i32>(self, words: *const u32, shift: u32, scale: f32, min: f32) -> [__m512; 2] {
        // All sixteen results, of which the permutation picks by four bits of each index.
        // SAFETY: 16 readable words, by the caller's promise, and levels; features by `self`.
        unsafe {
            let levels = self.load(const { &levels(FIRST) }.as_ptr());
            let table = self.round_bf16(self.fma(levels, self.splat(scale), self.splat(min)));
            let words = _mm512_loadu_si512(words.cast());
            let low = _mm512_srlv_epi32(words, _mm512_set1_epi32(shift as i32));
            let high = _mm512_srlv_epi32(words, _mm512_set1_epi32(16 + shift as i32));
            [_mm512_permutexvar_ps(low, table), _mm512_permutexvar_ps(high, table)]
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: __m512) {
        // SAFETY: 16 writable elements, by the caller's promise.
        unsafe { _mm512_storeu_ps(to, v) }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize, v: __m512) {
        // SAFETY: masked-out elements are not touched; the others are writable by the caller's promise.
        unsafe { _mm512_mask_storeu_ps(to, first(n), v) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        with_proof!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        with_proof!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        with_proof!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        with_proof!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        with_proof!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        with_proof!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        with_proof!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        with_proof!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }

    #[inline(always)]
    fn scale2(self, a: __m512, n: __m512) -> __m512 {
        with_proof!(_mm512_scalef_ps(a, n))
    }

    #[inline(always)]
    fn power(self, a: __m512) -> __m512 {
        with_proof!(_mm512_and_ps(a, _mm512_castsi512_ps(_mm512_set1_epi32(0xff80_0000_u32 as i32))))
    }

    #[inline(always)]
    fn if_less(self, a: __m512, b: __m512, yes: __m512, no: __m512) -> __m512 {
        with_proof!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_LT_OQ>(a, b), no, yes))
    }

    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        with_proof!({
            let a = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let a = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_add_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)))
        })
    }

    #[inline(always)]
    fn largest(self, a: __m512) -> f32 {
        with_proof!(_mm512_reduce_max_ps(a))
    }

    #[inline(always)]
    fn sums(self, v: [__m512; LANES]) -> __m512 {
        // Each step halves the number of vectors: within a quarter register by unpacking, then across quarters.
        with_proof!({
            let zero = _mm512_setzero_ps();
            let mut pairs = [zero; 8];
            for i in 0..8 {
                let (a, b) = (v[2 * i], v[2 * i + 1]);
                pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            }
            let mut fours = [zero; 4];
            for i in 0..4 {
                let (a, b) = (_mm512_castps_pd(pairs[2 * i]), _mm512_castps_pd(pairs[2 * i + 1]));
                fours[i] = _mm512_add_ps(
                    _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                    _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)),
                );
            }
            let mut eights = [zero; 2];
            for i in 0..2 {
                let (a, b) = (fours[2 * i], fours[2 * i + 1]);
                eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b));
            }
            let (a, b) = (eights[0], eights[1]);
            _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
        })
    }

    #[inline(always)]
    fn transpose(self, v: [__m512; LANES]) -> [__m512; LANES] {
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
#[target_feature(enable = "avx512f")]
fn widen_bf16(x: __m256i) -> __m512 {
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x)))
}

/// Transposes a 16 × 16 matrix of 32-bit elements: pairs, fours, then quarters of a register.
#[inline]
#[target_feature(enable = "avx512f")]
pub(in crate::backend::cpu) fn transpose(v: [__m512; LANES]) -> [__m512; LANES] {
    let zero = _mm512_setzero_ps();
    let mut pairs = [zero; LANES];
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]);
    }
    // Register 4·i + j holds column 4·q + j of rows 4·i.. in its quarter q.
    let mut fours = [zero; LANES];
    for i in 0..4 {
        for j in 0..2 {
            let (a, b) = (_mm512_castps_pd(pairs[4 * i + j]), _mm512_castps_pd(pairs[4 * i + 2 + j]));
            fours[4 * i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[4 * i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    let mut out = [zero; LANES];
    for j in 0..4 {
        let (a, b, c, d) = (fours[j], fours[4 + j], fours[8 + j], fours[12 + j]);
        let even_low = _mm512_shuffle_f32x4::<0x88>(a, b); // a0 a2 b0 b2
        let even_high = _mm512_shuffle_f32x4::<0x88>(c, d);
        let odd_low = _mm512_shuffle_f32x4::<0xdd>(a, b); // a1 a3 b1 b3
        let odd_high = _mm512_shuffle_f32x4::<0xdd>(c, d);
        out[j] = _mm512_shuffle_f32x4::<0x88>(even_low, even_high);
        out[4 + j] = _mm512_shuffle_f32x4::<0x88>(odd_low, odd_high);
        out[8 + j] = _mm512_shuffle_f32x4::<0xdd>(even_low, even_high);
        out[12 + j] = _mm512_shuffle_f32x4::<0xdd>(odd_low, odd_high);
    }
    out
}
