//! Row-wise normalisation.

use super::CpuBackend;
use super::simd::{Kernel, LANES, Simd};
use super::view::{row, row_mut};
use crate::backend::{Norm, NormKind, Rows, RowsMut};

/// Elements worth a piece of parallel work.
const PIECE: usize = 16 << 10;

/// Elements that are summed in f32 before the sum moves on to f64.
const RUN: usize = 8 * LANES;

/// `out[i] = norm(x[i])`.
pub(super) fn norm(cpu: &CpuBackend, x: Rows<'_>, norm: &Norm, out: RowsMut<'_>) {
    let (weight, bias) = parameters(norm);
    cpu.pool.split(x.rows(), PIECE / weight.len().max(1), &|rows| {
        for i in rows {
            // SAFETY: row i belongs to this thread alone.
            let to = unsafe { row_mut(&out, i) };
            to.copy_from_slice(row(&x, i));
            cpu.level.run(InPlace { x: to, norm, weight, bias });
        }
    });
}

/// Normalises every run of `norm.weight.len` columns of each row in place.
pub(super) fn norm_heads(cpu: &CpuBackend, x: RowsMut<'_>, norm: &Norm) {
    let (weight, bias) = parameters(norm);
    cpu.pool.split(x.rows(), PIECE / x.cols().max(1), &|rows| {
        for i in rows {
            // SAFETY: row i belongs to this thread alone.
            let heads = unsafe { row_mut(&x, i) };
            for head in heads.chunks_exact_mut(weight.len()) {
                cpu.level.run(InPlace { x: head, norm, weight, bias });
            }
        }
    });
}

fn parameters(norm: &Norm) -> (&[f32], Option<&[f32]>) {
    (row(&norm.weight.row(), 0), norm.bias.as_ref().map(|b| row(&b.row(), 0)))
}

struct InPlace<'a> {
    x: &'a mut [f32],
    norm: &'a Norm,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
}

impl Kernel for InPlace<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let count = self.x.len() as f64;
        let mean = match self.norm.kind {
            NormKind::Rms => 0.0,
            NormKind::Layer => (sum::<S, false>(s, self.x, s.zero()) / count) as f32,
        };
        // The variance about the mean as rounded: what is subtracted below is the same number.
        let squares = sum::<S, true>(s, self.x, s.splat(mean)) / count;
        let scale = (1.0 / (squares + f64::from(self.norm.epsilon)).sqrt()) as f32;
        let (mean, scale) = (s.splat(mean), s.splat(scale));
        for i in (0..self.x.len()).step_by(LANES) {
            let x = s.load_slice(&self.x[i..]);
            let mut y = s.mul(s.mul(s.sub(x, mean), scale), s.load_slice(&self.weight[i..]));
            if let Some(bias) = self.bias {
                y = s.add(y, s.load_slice(&bias[i..]));
            }
            s.store_slice(&mut self.x[i..], y);
        }
    }
}

/// Σ (x − shift), or of its squares.
#[inline(always)]
fn sum<S: Simd, const SQUARE: bool>(s: S, x: &[f32], shift: S::V) -> f64 {
    let mut total = 0.0;
    for run in x.chunks(RUN) {
        let mut sums = s.zero();
        for i in (0..run.len()).step_by(LANES) {
            let whole = run.len() - i >= LANES;
            let mut v = s.sub(s.load_slice(&run[i..]), shift);
            if !whole {
                // Lanes past the end are zero, not −shift.
                let mut lanes = [0.0; LANES];
                s.store_slice(&mut lanes[..run.len() - i], v);
                v = s.load_slice(&lanes);
            }
            sums = if SQUARE { s.fma(v, v, sums) } else { s.add(v, sums) };
        }
        total += f64::from(s.sum(sums));
    }
    total
}
