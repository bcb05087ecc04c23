use faer::Mat;

use super::noise;
use crate::speculate::basis::{balanced, skew};
use crate::speculate::moments::second_moment;

/// Rows whose directions differ in size by orders of magnitude.
fn uneven(seed: u64, n: usize, d: usize) -> Vec<f32> {
    let (white, mix) = (noise(seed, n * d), noise(seed + 100, d * d));
    let mut rows = Vec::with_capacity(n * d);
    for row in white.chunks(d) {
        for j in 0..d {
            rows.push((0..d).map(|i| row[i] * 10f32.powf(-3.0 * i as f32 / d as f32) * mix[i * d + j]).sum());
        }
    }
    rows
}

fn moment(rows: &[f32], d: usize) -> Mat<f64> {
    second_moment(rows, d, std::iter::once(0..d), |_, _| ())
}

fn apply(map: &[f32], x: &[f32]) -> Vec<f64> {
    map.chunks(x.len()).map(|row| row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()).collect()
}

#[test]
fn skew_is_orthogonal_and_ordered() {
    for (seed, d) in [(1, 8), (2, 33), (3, 64)] {
        let rows = uneven(seed, 150, d);
        let map = skew(&moment(&rows, d)).unwrap();
        for a in 0..d {
            for b in 0..d {
                let dot: f64 = (0..d).map(|i| f64::from(map[a * d + i]) * f64::from(map[b * d + i])).sum();
                assert!((dot - if a == b { 1.0 } else { 0.0 }).abs() < 1e-5, "({a}, {b}): {dot}");
            }
        }
        // Right singular vectors: columns of the skewed queries are orthogonal, the largest first.
        let skewed: Vec<Vec<f64>> = rows.chunks(d).map(|row| apply(&map, row)).collect();
        let product = |a: usize, b: usize| skewed.iter().map(|row| row[a] * row[b]).sum::<f64>();
        for a in 0..d {
            assert!(a == 0 || product(a, a) <= product(a - 1, a - 1) * (1.0 + 1e-6), "column {a}");
            for b in 0..a {
                assert!(product(a, b).abs() < 1e-5 * product(0, 0), "({a}, {b}): {}", product(a, b));
            }
        }
    }
}

/// The singular vectors that an SVD of the rows themselves gives, but for their signs.
#[test]
fn skew_agrees_with_an_svd_of_the_rows() {
    let (n, d) = (90, 16);
    let rows = uneven(7, n, d);
    let map = skew(&moment(&rows, d)).unwrap();
    let matrix = Mat::from_fn(n, d, |i, j| rows[i * d + j]);
    let svd = matrix.thin_svd().unwrap();
    for a in 0..d {
        let dot: f64 = (0..d).map(|i| f64::from(map[a * d + i]) * f64::from(svd.V()[(i, a)])).sum();
        assert!((dot.abs() - 1.0).abs() < 1e-3, "vector {a}: {dot}");
    }
}

#[test]
fn balanced_maps_keep_every_score() {
    for (seed, d) in [(1, 8), (2, 24), (3, 64)] {
        let (queries, keys) = (uneven(seed, 200, d), uneven(seed + 50, 200, d));
        let (query_map, key_map) = balanced(&moment(&queries, d), &moment(&keys, d)).unwrap();
        // A_q · A_kᵀ = 1.
        for i in 0..d {
            for j in 0..d {
                let at = |map: &[f32], a: usize, i: usize| f64::from(map[a * d + i]);
                let sum: f64 = (0..d).map(|a| at(&query_map, a, i) * at(&key_map, a, j)).sum();
                assert!((sum - if i == j { 1.0 } else { 0.0 }).abs() < 1e-4, "({i}, {j}): {sum}");
            }
        }
    }
}

/// Leading rows of the balanced maps lose less of the scores than as many rows of the skew, or of nothing.
#[test]
fn balanced_maps_lose_least() {
    let (d, kept) = (32, 10);
    let (queries, keys) = (uneven(1, 300, d), uneven(2, 300, d));
    let identity: Vec<f32> = (0..d * d).map(|at| if at / d == at % d { 1.0 } else { 0.0 }).collect();
    let skew = skew(&moment(&queries, d)).unwrap();
    let (query_map, key_map) = balanced(&moment(&queries, d), &moment(&keys, d)).unwrap();
    let loss = |query_map: &[f32], key_map: &[f32]| {
        let mut loss = 0.0;
        for q in queries.chunks(d) {
            let partial = apply(&query_map[..kept * d], q);
            for k in keys.chunks(d).take(50) {
                let exact: f64 = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let got: f64 = partial.iter().zip(apply(&key_map[..kept * d], k)).map(|(a, b)| a * b).sum();
                loss += (exact - got).powi(2);
            }
        }
        loss
    };
    let (plain, skewed, best) = (loss(&identity, &identity), loss(&skew, &skew), loss(&query_map, &key_map));
    assert!(best < skewed && skewed < plain, "balanced {best}, skewed {skewed}, plain {plain}");
}

#[test]
fn degenerate_moments() {
    let zero = Mat::zeros(4, 4);
    let (query_map, key_map) = balanced(&zero, &zero).unwrap();
    assert!(query_map.iter().chain(&key_map).all(|x| x.is_finite()));
    assert!(skew(&zero).unwrap().iter().all(|x| x.is_finite()));
    let mut broken = Mat::zeros(4, 4);
    broken[(1, 2)] = f64::INFINITY;
    assert!(skew(&broken).is_err() && balanced(&broken, &zero).is_err());
}
