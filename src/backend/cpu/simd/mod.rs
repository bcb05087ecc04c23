//! One vector of sixteen floats, on every instruction set, behind one safe door each.
//!
//! A kernel is written once, generically over [`Simd`], as a [`Kernel`]; [`Level::run`] instantiates it inside a function
//! that carries the instruction set's `#[target_feature]`. Everything a kernel calls is `#[inline(always)]`, and closures
//! stay out of hot loops: a function that is not inlined there would be compiled without the instructions it uses.
//!
//! A vector has sixteen lanes whatever the hardware: one register of AVX-512, two of AVX2, an array without either. So
//! every level splits a sum the same way, and AVX2 and AVX-512 agree to the bit.
//!
//! A value of a type that implements `Simd` is the proof that its instructions exist: only the doors make one. That is
//! why arithmetic is safe to call; loads and stores are unsafe because of their pointers.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod element;
mod math;
mod scalar;

#[cfg(target_arch = "x86_64")]
pub(super) use avx512::{Avx512, transpose as transpose_512};
pub(super) use element::{Element, for_dtype};
pub(super) use math::{erfc_positive, exp, sigmoid};

/// Lanes of a vector.
pub(super) const LANES: usize = 16;

/// Bytes of a cache line.
const LINE: usize = 64;

/// The instruction sets that kernels exist for, each one including those before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Whatever the compiler's target has.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// As `Avx512`, with AVX512-VNNI.
    Vnni,
    /// As `Vnni`, with AVX512-BF16 and the AMX-BF16 matrix unit.
    Amx,
}

impl Level {
    /// The highest level of this machine. Asks the kernel for the use of AMX where the processor has it.
    pub fn detect() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            let avx512 = avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl");
            let vnni = avx512 && is_x86_feature_detected!("avx512vnni");
            if vnni && is_x86_feature_detected!("avx512bf16") && super::unit::amx_available() {
                return Level::Amx;
            }
            if vnni {
                return Level::Vnni;
            }
            if avx512 {
                return Level::Avx512;
            }
            if avx2 {
                return Level::Avx2;
            }
        }
        Level::Scalar
    }

    /// Every level of this machine, lowest first.
    pub fn available() -> impl Iterator<Item = Level> {
        let highest = Level::detect();
        [Level::Scalar, Level::Avx2, Level::Avx512, Level::Vnni, Level::Amx].into_iter().filter(move |&l| l <= highest)
    }
}

/// A level that this machine was seen to have: what kernels are run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Proven(Level);

impl Proven {
    /// `level`, when it is at most the detected one.
    pub(super) fn new(level: Level) -> Option<Proven> {
        (level <= Level::detect()).then_some(Proven(level))
    }

    pub(super) fn level(self) -> Level {
        self.0
    }

    /// Runs `kernel` with the instructions of this level.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[cfg(target_arch = "x86_64")]
        match self.0 {
            Level::Scalar => {}
            // SAFETY: `Proven` is made for detected levels only.
            Level::Avx2 => return unsafe { avx2::door(kernel) },
            // SAFETY: as above.
            Level::Avx512 | Level::Vnni | Level::Amx => return unsafe { avx512::door(kernel) },
        }
        kernel.run(scalar::Scalar)
    }
}

/// A computation that is generic over the instruction set.
pub(super) trait Kernel {
    /// What it returns.
    type Output;

    /// The computation; implementations are `#[inline(always)]`.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Sixteen floats from `first` on.
const fn levels(first: i32) -> [f32; LANES] {
    let mut levels = [0.0; LANES];
    let mut q = 0;
    while q < LANES {
        levels[q] = (first + q as i32) as f32;
        q += 1;
    }
    levels
}

/// Arithmetic on vectors of [`LANES`] floats.
pub(super) trait Simd: Copy + Send + Sync {
    /// A vector.
    type V: Copy;

    /// Whether the register file holds 28 accumulators (AVX-512) or 12 (two registers a vector, sixteen in all).
    const WIDE: bool;

    /// `x` in every lane.
    fn splat(self, x: f32) -> Self::V;

    /// # Safety
    /// `from` is readable for 16 elements (as with the other full loads).
    unsafe fn load(self, from: *const f32) -> Self::V;
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_f16(self, from: *const half::f16) -> Self::V;
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_bf16(self, from: *const half::bf16) -> Self::V;

    /// The first `n` lanes from memory, zero in the others.
    /// # Safety
    /// `from` is readable for `n` elements, n ≤ 16; nothing past them is touched.
    unsafe fn load_first(self, from: *const f32, n: usize) -> Self::V;
    /// # Safety
    /// As [`Simd::load_first`].
    unsafe fn load_first_f16(self, from: *const half::f16, n: usize) -> Self::V;
    /// # Safety
    /// As [`Simd::load_first`].
    unsafe fn load_first_bf16(self, from: *const half::bf16, n: usize) -> Self::V;

    /// Eight halves from memory to memory, widened.
    /// # Safety
    /// `from` is readable and `to` writable for 8 elements.
    unsafe fn widen_eight(self, from: *const half::f16, to: *mut f32);

    /// Sixteen signed bytes as floats.
    /// # Safety
    /// As [`Simd::load`].
    unsafe fn load_i8(self, from: *const i8) -> Self::V;

    /// Of four bits q each, `shift..shift + 4` of word i and those sixteen higher: lane i of (q + `FIRST`) · scale + min,
    /// rounded once, then as [`Simd::round_bf16`] does; `shift` ≤ 12.
    /// # Safety
    /// `words` is readable for 16 words.
    unsafe fn dequantize<const FIRST: i32>(self, words: *const u32, shift: u32, scale: f32, min: f32) -> [Self::V; 2];

    /// # Safety
    /// `to` is writable for 16 elements.
    unsafe fn store(self, to: *mut f32, v: Self::V);
    /// # Safety
    /// `to` is writable for `n` elements, n ≤ 16; nothing past them is touched.
    unsafe fn store_first(self, to: *mut f32, n: usize, v: Self::V);

    /// a + b
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a − b
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once where the hardware can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` when either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` when either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// a · 2ⁿ for an integral n in −126..=127 and a normal result.
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V;
    /// Sign and exponent of a normal number: a power of two, 1 to 2 times as near to zero. Of a zero a zero.
    fn power(self, a: Self::V) -> Self::V;
    /// Where a < b, `yes`, elsewhere `no`.
    fn if_less(self, a: Self::V, b: Self::V, yes: Self::V, no: Self::V) -> Self::V;

    /// Sum of all lanes: halves are added until one lane is left.
    fn sum(self, a: Self::V) -> f32;
    /// Largest lane.
    fn largest(self, a: Self::V) -> f32;
    /// Lane i is the sum of the lanes of `v[i]`, in some fixed order.
    fn sums(self, v: [Self::V; LANES]) -> Self::V;
    /// Sixteen vectors as a matrix, transposed.
    fn transpose(self, v: [Self::V; LANES]) -> [Self::V; LANES];

    /// Asks for the cache line at `address`, which need not be readable.
    fn prefetch(self, address: *const u8);

    /// Asks for the `bytes` bytes from `address` on, line by line, as [`Simd::prefetch`] does.
    #[inline(always)]
    fn prefetch_all(self, address: *const u8, bytes: usize) {
        for line in 0..bytes.div_ceil(LINE) {
            self.prefetch(address.wrapping_add(line * LINE));
        }
    }

    /// Zero in every lane.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// To the nearest bf16, ties to even, as floats: for zeros, of which each becomes +0, and for normal numbers small
    /// enough that 2¹⁷ times them are finite.
    #[inline(always)]
    fn round_bf16(self, a: Self::V) -> Self::V {
        // Next to 2¹⁶ times its own power of two, of the same sign, a number keeps the eight bits that bf16 has. The
        // products are exact, so nothing depends on whether the hardware fuses.
        let power = self.power(a);
        let beside = self.fma(power, self.splat(65536.0), a);
        self.fma(power, self.splat(-65536.0), beside)
    }

    /// The vector at the start of `from`, with zeros where the slice ends before.
    #[inline(always)]
    fn load_slice(self, from: &[f32]) -> Self::V {
        if from.len() >= LANES {
            // SAFETY: the slice has at least 16 elements.
            unsafe { self.load(from.as_ptr()) }
        } else {
            // SAFETY: the slice has `len` elements, fewer than 16.
            unsafe { self.load_first(from.as_ptr(), from.len()) }
        }
    }

    /// Writes as many lanes as fit to the start of `to`.
    #[inline(always)]
    fn store_slice(self, to: &mut [f32], v: Self::V) {
        if to.len() >= LANES {
            // SAFETY: the slice has at least 16 elements.
            unsafe { self.store(to.as_mut_ptr(), v) }
        } else {
            // SAFETY: the slice has `len` elements, fewer than 16.
            unsafe { self.store_first(to.as_mut_ptr(), to.len(), v) }
        }
    }
}
