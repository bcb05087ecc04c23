//! Vectors as arrays: the reference for the others, and what runs where there is nothing better.

use super::{LANES, Simd};
use half::{bf16, f16};

/// Always there, so its value needs no proof.
#[derive(Clone, Copy)]
pub(super) struct Scalar;

type V = [f32; LANES];

macro_rules! lanes {
    ($i:ident => $value:expr) => {{
        let mut out = [0.0; LANES];
        let mut $i = 0;
        while $i < LANES {
            out[$i] = $value;
            $i += 1;
        }
        out
    }};
}

impl Simd for Scalar {
    type V = V;
    const WIDE: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> V {
        [x; LANES]
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> V {
        // SAFETY: the caller's promise: 16 readable elements.
        lanes!(i => unsafe { from.add(i).read() })
    }

    #[inline(always)]
    unsafe fn load_f16(self, from: *const f16) -> V {
        // SAFETY: the caller's promise: 16 readable elements.
        lanes!(i => unsafe { from.add(i).read() }.to_f32())
    }

    #[inline(always)]
    unsafe fn load_bf16(self, from: *const bf16) -> V {
        // SAFETY: the caller's promise: 16 readable elements.
        lanes!(i => unsafe { from.add(i).read() }.to_f32())
    }

    #[inline(always)]
    unsafe fn load_first(self, from: *const f32, n: usize) -> V {
        // SAFETY: the caller's promise: `n` readable elements.
        lanes!(i => if i < n { unsafe { from.add(i).read() } } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn load_first_f16(self, from: *const f16, n: usize) -> V {
        // SAFETY: the caller's promise: `n` readable elements.
        lanes!(i => if i < n { unsafe { from.add(i).read() }.to_f32() } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn load_first_bf16(self, from: *const bf16, n: usize) -> V {
        // SAFETY: the caller's promise: `n` readable elements.
        lanes!(i => if i < n { unsafe { from.add(i).read() }.to_f32() } else { 0.0 })
    }

    #[inline(always)]
    unsafe fn widen_eight(self, from: *const f16, to: *mut f32) {
        for i in 0..8 {
            // SAFETY: 8 elements on either side, by the caller's promise.
            unsafe { to.add(i).write(from.add(i).read_unaligned().to_f32()) }
        }
    }

    #[inline(always)]
    unsafe fn load_i8(self, from: *const i8) -> V {
        // SAFETY: the caller's promise: 16 readable elements.
        lanes!(i => f32::from(unsafe { from.add(i).read() }))
    }

    #[inline(always)]
    unsafe fn dequantize<const FIRST: i32>(self, words: *const u32, shift: u32, scale: f32, min: f32) -> [V; 2] {
        let mut out = [[0.0; LANES]; 2];
        for (half, out) in out.iter_mut().enumerate() {
            let q: V = lanes!(i => {
                // SAFETY: the caller's promise: 16 readable words.
                let word = unsafe { words.add(i).read_unaligned() };
                ((word >> (16 * half as u32 + shift) & 15) as i32 + FIRST) as f32
            });
            *out = self.round_bf16(self.fma(q, [scale; LANES], [min; LANES]));
        }
        out
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32, v: V) {
        // SAFETY: the caller's promise: 16 writable elements.
        unsafe { to.cast::<V>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize, v: V) {
        for (i, x) in v.into_iter().enumerate().take(n) {
            // SAFETY: the caller's promise: `n` writable elements.
            unsafe { to.add(i).write(x) }
        }
    }

    #[inline(always)]
    fn add(self, a: V, b: V) -> V {
        lanes!(i => a[i] + b[i])
    }

    #[inline(always)]
    fn sub(self, a: V, b: V) -> V {
        lanes!(i => a[i] - b[i])
    }

    #[inline(always)]
    fn mul(self, a: V, b: V) -> V {
        lanes!(i => a[i] * b[i])
    }

    #[inline(always)]
    fn div(self, a: V, b: V) -> V {
        lanes!(i => a[i] / b[i])
    }

    #[inline(always)]
    fn fma(self, a: V, b: V, c: V) -> V {
        // Not `mul_add`: without the instruction that is a library call an order of magnitude slower.
        lanes!(i => a[i] * b[i] + c[i])
    }

    #[inline(always)]
    fn max(self, a: V, b: V) -> V {
        lanes!(i => if a[i] > b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn min(self, a: V, b: V) -> V {
        lanes!(i => if a[i] < b[i] { a[i] } else { b[i] })
    }

    #[inline(always)]
    fn round(self, a: V) -> V {
        lanes!(i => a[i].round_ties_even())
    }

    #[inline(always)]
    fn scale2(self, a: V, n: V) -> V {
        lanes!(i => a[i] * f32::from_bits(((n[i] as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn power(self, a: V) -> V {
        lanes!(i => f32::from_bits(a[i].to_bits() & 0xff80_0000))
    }

    #[inline(always)]
    fn if_less(self, a: V, b: V, yes: V, no: V) -> V {
        lanes!(i => if a[i] < b[i] { yes[i] } else { no[i] })
    }

    #[inline(always)]
    fn sum(self, mut a: V) -> f32 {
        let mut half = LANES / 2;
        while half > 0 {
            for i in 0..half {
                a[i] += a[i + half];
            }
            half /= 2;
        }
        a[0]
    }

    #[inline(always)]
    fn largest(self, a: V) -> f32 {
        let mut most = a[0];
        for x in a {
            most = if x > most { x } else { most };
        }
        most
    }

    #[inline(always)]
    fn sums(self, v: [V; LANES]) -> V {
        lanes!(i => self.sum(v[i]))
    }

    #[inline(always)]
    fn transpose(self, v: [V; LANES]) -> [V; LANES] {
        let mut out = [[0.0; LANES]; LANES];
        for (i, row) in v.iter().enumerate() {
            for (j, &x) in row.iter().enumerate() {
                out[j][i] = x;
            }
        }
        out
    }

    #[inline(always)]
    fn prefetch(self, _address: *const u8) {}
}
