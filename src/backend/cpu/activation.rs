//! The non-linearities of MLPs.

use super::CpuBackend;
use super::simd::{Kernel, LANES, Simd, erfc_positive, sigmoid};
use super::view::{row, row_mut};
use crate::backend::{Activation, Rows, RowsMut};

/// Elements worth a piece of parallel work.
const PIECE: usize = 8 << 10;

/// `out = activation(x)`, times the second half of x's columns for gated kinds.
pub(super) fn activate(cpu: &CpuBackend, x: Rows<'_>, activation: Activation, out: RowsMut<'_>) {
    let cols = out.cols();
    cpu.pool.split(x.rows(), PIECE / cols.max(1), &|rows| {
        for i in rows {
            let (x, up) = row(&x, i).split_at(cols);
            // SAFETY: row i belongs to this thread alone.
            let out = unsafe { row_mut(&out, i) };
            cpu.level.run(Activate { x, up, activation, out });
        }
    });
}

struct Activate<'a> {
    x: &'a [f32],
    /// Empty for plain kinds.
    up: &'a [f32],
    activation: Activation,
    out: &'a mut [f32],
}

impl Kernel for Activate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for i in (0..self.x.len()).step_by(LANES) {
            let x = s.load_slice(&self.x[i..]);
            let y = match self.activation {
                Activation::SiluGated => s.mul(s.mul(x, sigmoid(s, x)), s.load_slice(&self.up[i..])),
                Activation::GeluTanhGated => s.mul(gelu_tanh(s, x), s.load_slice(&self.up[i..])),
                // The zero comes first: NaN stays NaN.
                Activation::Relu => s.max(s.zero(), x),
                Activation::Gelu => gelu(s, x),
                Activation::GeluTanh => gelu_tanh(s, x),
            };
            s.store_slice(&mut self.out[i..], y);
        }
    }
}

/// x/2 · (1 + tanh u) = x · sigmoid(2u), u = √(2/π) · (x + 0.044715 x³).
#[inline(always)]
fn gelu_tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let cube = s.mul(s.mul(x, x), x);
    let inner = s.fma(cube, s.splat(0.044_715), x);
    // Twice the root of 2/π.
    s.mul(x, sigmoid(s, s.mul(inner, s.splat(1.595_769))))
}

/// x/2 · (1 + erf(x/√2)) = max(x, 0) − |x|/2 · erfc(|x|/√2), which loses no digits where erf is near −1.
#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::V) -> S::V {
    let size = s.max(s.sub(s.zero(), x), x);
    let tail = erfc_positive(s, s.mul(size, s.splat(std::f32::consts::FRAC_1_SQRT_2)));
    s.sub(s.max(s.zero(), x), s.mul(s.mul(size, s.splat(0.5)), tail))
}
