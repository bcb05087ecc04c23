//! Second moments of queries and keys, as they are and as rotation spreads them over a context.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par};

use crate::backend::Rotation;

/// Σ x xᵀ over the rows of an n × `width` matrix, where x is each of the column ranges `heads` in turn, after `change`
/// has had its way with each row (its index, its values). All ranges are equally wide.
pub(super) fn second_moment(
    rows: &[f32],
    width: usize,
    heads: impl Iterator<Item = Range<usize>>,
    mut change: impl FnMut(usize, &mut [f64]),
) -> Mat<f64> {
    let mut sum = Mat::<f64>::zeros(0, 0);
    let mut values = Vec::new();
    for head in heads {
        let d = head.len();
        values.clear();
        for (i, row) in rows.chunks_exact(width).enumerate() {
            values.extend(row[head.clone()].iter().map(|&x| f64::from(x)));
            let from = values.len() - d;
            change(i, &mut values[from..]);
        }
        if sum.nrows() == 0 {
            sum = Mat::zeros(d, d);
        }
        let x = MatRef::from_row_major_slice(&values, values.len() / d, d);
        matmul(sum.as_mut(), Accum::Add, x.transpose(), x, 1.0, Par::Seq);
    }
    sum
}

/// Rotates one head's row as the model does at `position`: the angle is a product in f32.
pub(crate) fn rotate(rotation: &Rotation, position: usize, row: &mut [f64]) {
    let half = rotation.frequencies.len();
    let factor = f64::from(rotation.factor);
    for (i, &frequency) in rotation.frequencies.iter().enumerate() {
        let (sin, cos) = f64::from(position as f32 * frequency).sin_cos();
        let (a, b) = (row[i], row[i + half]);
        row[i] = factor * (a * cos - b * sin);
        row[i + half] = factor * (b * cos + a * sin);
    }
}

/// The second moment of vectors with the second moment `moment` before rotation, when each is rotated at a position
/// drawn uniformly from `0..positions`, independently of what it is: the limit of infinitely many draws.
///
/// With z = a + ib for each pair (a, b) that rotates together, rotation at position p is z ↦ z·exp(iθp). Products of two
/// pairs are sums of z·z̄' and z·z', whose angles are (θ − θ')p and (θ + θ')p; their means over p have a closed form.
pub(super) fn spread(moment: &Mat<f64>, rotation: &Rotation, positions: usize) -> Mat<f64> {
    let half = rotation.frequencies.len();
    let d = moment.nrows();
    let frequency = |i: usize| f64::from(rotation.frequencies[i]);
    let factor = f64::from(rotation.factor);
    let mut out = moment.clone();
    for i in 0..half {
        for j in 0..half {
            let (aa, bb) = (moment[(i, j)], moment[(i + half, j + half)]);
            let (ba, ab) = (moment[(i + half, j)], moment[(i, j + half)]);
            let apart = multiply((aa + bb, ba - ab), mean_phase(frequency(i) - frequency(j), positions));
            let along = multiply((aa - bb, ba + ab), mean_phase(frequency(i) + frequency(j), positions));
            let scale = factor * factor / 2.0;
            out[(i, j)] = scale * (along.0 + apart.0);
            out[(i + half, j + half)] = scale * (apart.0 - along.0);
            out[(i + half, j)] = scale * (along.1 + apart.1);
            out[(i, j + half)] = scale * (along.1 - apart.1);
        }
        // Against dimensions that do not rotate.
        for j in 2 * half..d {
            let mean = mean_phase(frequency(i), positions);
            let (a, b) = multiply((moment[(i, j)], moment[(i + half, j)]), mean);
            for (row, value) in [(i, factor * a), (i + half, factor * b)] {
                out[(row, j)] = value;
                out[(j, row)] = value;
            }
        }
    }
    out
}

/// The mean of exp(iωp) over p in 0..n (a Dirichlet kernel), as real and imaginary part.
fn mean_phase(omega: f64, n: usize) -> (f64, f64) {
    let n = n as f64;
    let below = n * (omega / 2.0).sin();
    if below.abs() < 1e-9 {
        return (1.0, 0.0);
    }
    let size = (n * omega / 2.0).sin() / below;
    let (sin, cos) = ((n - 1.0) * omega / 2.0).sin_cos();
    (size * cos, size * sin)
}

fn multiply(x: (f64, f64), y: (f64, f64)) -> (f64, f64) {
    (x.0 * y.0 - x.1 * y.1, x.0 * y.1 + x.1 * y.0)
}
