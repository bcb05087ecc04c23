//! Ridge regression of one layer's queries on the input of the layer before.

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::Solve;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};

use crate::{Error, ErrorCode, Result};

/// λ over the mean diagonal of XᵀX.
const LAMBDA: f64 = 0.1;

/// W' = W + ΔW (outputs × inputs, row-major), where ΔW minimises ‖Y − X·W'ᵀ‖² + λ‖ΔW‖²: away from W, which is right but
/// for the change from layer to layer, only as far as the data says.
///
/// `x`: n × `inputs`, `y`: n × outputs, both row-major and f32; `weight`: outputs × inputs. Products are in f32 (their
/// error is far below λ), the solution in f64.
pub(super) fn fit(x: &[f32], inputs: usize, y: &[f32], weight: &[f32], threads: usize) -> Result<Vec<f32>> {
    let outputs = weight.len() / inputs;
    let n = x.len() / inputs;
    let (x, y) = (MatRef::from_row_major_slice(x, n, inputs), MatRef::from_row_major_slice(y, n, outputs));
    let weight = MatRef::from_row_major_slice(weight, outputs, inputs);
    let mut moment = widen(&product(x.transpose(), x, threads));
    // The residual itself is regressed, not y and W·x apart, which would cancel.
    let residual = y - product(x, weight.transpose(), threads);
    let right = widen(&product(x.transpose(), residual.as_ref(), threads));
    let mean = (0..inputs).map(|i| moment[(i, i)]).sum::<f64>() / inputs as f64;
    if !mean.is_finite() {
        return Err(super::fit::not_finite());
    }
    let lambda = if mean > 0.0 { LAMBDA * mean } else { 1.0 };
    for i in 0..inputs {
        moment[(i, i)] += lambda;
    }
    let factors = moment.llt(Side::Lower).map_err(|_| {
        Error::new(ErrorCode::Internal, "calibration: the moment matrix of a layer's input is not positive definite")
    })?;
    let change = factors.solve(&right);
    Ok((0..outputs * inputs)
        .map(|at| (f64::from(weight[(at / inputs, at % inputs)]) + change[(at % inputs, at / inputs)]) as f32)
        .collect())
}

fn widen(x: &Mat<f32>) -> Mat<f64> {
    Mat::from_fn(x.nrows(), x.ncols(), |i, j| f64::from(x[(i, j)]))
}

/// `lhs · rhs`, its columns shared out among threads.
pub(super) fn product(lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>, threads: usize) -> Mat<f32> {
    let mut out = Mat::zeros(lhs.nrows(), rhs.ncols());
    share(out.as_mut(), lhs, rhs, threads);
    out
}

fn share(out: MatMut<'_, f32>, lhs: MatRef<'_, f32>, rhs: MatRef<'_, f32>, threads: usize) {
    if threads < 2 || rhs.ncols() < 64 {
        matmul(out, Accum::Replace, lhs, rhs, 1.0, Par::Seq);
        return;
    }
    let at = rhs.ncols() * (threads / 2) / threads;
    let (left, right) = out.split_at_col_mut(at);
    let (rhs_left, rhs_right) = rhs.split_at_col(at);
    std::thread::scope(|scope| {
        scope.spawn(|| share(left, lhs, rhs_left, threads / 2));
        share(right, lhs, rhs_right, threads - threads / 2);
    });
}
