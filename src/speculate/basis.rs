//! Changes of basis for one KV head, from second moments of its queries and keys.
//!
//! Everything runs in f64 on d × d matrices. Eigenvectors of QᵀQ are the right singular vectors of Q; squaring in f64
//! loses √2⁻⁵² of the largest singular value, less than an SVD in f32 does (2⁻²⁴).

use faer::{Mat, Side};

use crate::{Error, ErrorCode, Result};

/// Part of the mean diagonal that is added to a second moment, so that no direction counts as never used.
const DAMPING: f64 = 0.01;

/// A d × d map as rows, one below the other.
pub(super) type Map = Vec<f32>;

/// Aᵀ of the paper's skew A = V, where Q = UΣVᵀ and `queries` is QᵀQ: an orthogonal matrix, the row of the largest
/// singular value first.
pub(super) fn skew(queries: &Mat<f64>) -> Result<Map> {
    let (_, vectors) = eigen(queries)?;
    let d = queries.nrows();
    Ok(rows(d, |i, j| vectors[(j, d - 1 - i)]))
}

/// (A_qᵀ, A_kᵀ) with A_q·A_kᵀ = 1, such that the first d' rows of both give the best approximation of rank d' to q·k on
/// average over queries and keys of these second moments (sums over any number of rows).
pub(super) fn balanced(queries: &Mat<f64>, keys: &Mat<f64>) -> Result<(Map, Map)> {
    let d = queries.nrows();
    let (query_root, query_inverse) = roots(&damped(queries))?;
    let (key_root, key_inverse) = roots(&damped(keys))?;
    let svd = (&query_root * &key_root).svd().map_err(|_| no_convergence("singular values"))?;
    let sizes: Vec<f64> = (0..d).map(|i| svd.S()[i].sqrt()).collect();
    // Rows of A_qᵀ = S^½ Uᵀ C_q^-½.
    let queries = svd.U().transpose() * &query_inverse;
    let keys = svd.V().transpose() * &key_inverse;
    Ok((rows(d, |i, j| sizes[i] * queries[(i, j)]), rows(d, |i, j| sizes[i] * keys[(i, j)])))
}

fn rows(d: usize, value: impl Fn(usize, usize) -> f64) -> Map {
    (0..d * d).map(|at| value(at / d, at % d) as f32).collect()
}

fn damped(moment: &Mat<f64>) -> Mat<f64> {
    let d = moment.nrows();
    let mean = (0..d).map(|i| moment[(i, i)]).sum::<f64>() / d as f64;
    // A head that is always zero has no basis; any will do.
    let added = if mean > 0.0 { DAMPING * mean } else { 1.0 };
    Mat::from_fn(d, d, |i, j| moment[(i, j)] + if i == j { added } else { 0.0 })
}

/// C^½ and C^-½ of a positive definite matrix.
fn roots(moment: &Mat<f64>) -> Result<(Mat<f64>, Mat<f64>)> {
    let (values, vectors) = eigen(moment)?;
    let d = moment.nrows();
    let power = |exponent: f64| {
        let scaled = Mat::from_fn(d, d, |i, j| vectors[(i, j)] * values[j].powf(exponent));
        &scaled * vectors.transpose()
    };
    Ok((power(0.5), power(-0.5)))
}

/// Eigenvalues, ascending, and eigenvectors as columns.
fn eigen(moment: &Mat<f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let d = moment.nrows();
    if (0..d).any(|i| (0..d).any(|j| !moment[(i, j)].is_finite())) {
        return Err(super::fit::not_finite());
    }
    let eigen = moment.self_adjoint_eigen(Side::Lower).map_err(|_| no_convergence("eigenvalues"))?;
    Ok(((0..d).map(|i| eigen.S()[i]).collect(), eigen.U().to_owned()))
}

fn no_convergence(what: &str) -> Error {
    Error::new(ErrorCode::Internal, format!("calibration: the {what} of a head did not converge"))
}
