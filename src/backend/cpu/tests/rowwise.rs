//! Norms, activations, rotations, log-probabilities.

use super::*;
use crate::backend::{Activation, Norm, NormKind, Rotation};

fn norm_reference(x: &[f32], norm: NormKind, epsilon: f32, w: &[f32], bias: Option<&[f32]>) -> Vec<f64> {
    let n = x.len() as f64;
    let mean = if norm == NormKind::Layer { x.iter().map(|&x| f64::from(x)).sum::<f64>() / n } else { 0.0 };
    let variance = x.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    let scale = 1.0 / (variance + f64::from(epsilon)).sqrt();
    (0..x.len())
        .map(|i| (f64::from(x[i]) - mean) * scale * f64::from(w[i]) + bias.map_or(0.0, |b| f64::from(b[i])))
        .collect()
}

#[test]
fn norms_equal_the_reference() {
    let mut random = Random(11);
    for (name, b) in backends() {
        for kind in [NormKind::Rms, NormKind::Layer] {
            for (rows, cols) in [(1, 1), (3, 15), (2, 16), (5, 64), (70, 577), (2, 4096)] {
                // A mean far from zero: what a careless variance gets wrong.
                let x: Vec<f32> = random.normals(rows * cols).iter().map(|x| x + 3.0).collect();
                let w = random.normals(cols);
                let bias = (kind == NormKind::Layer).then(|| random.normals(cols));
                let norm =
                    Norm { kind, epsilon: 1e-5, weight: vector(&b, &w), bias: bias.as_deref().map(|x| vector(&b, x)) };
                let want: Vec<f64> =
                    x.chunks(cols).flat_map(|x| norm_reference(x, kind, 1e-5, &w, bias.as_deref())).collect();
                let case = format!("{name} {kind:?} {rows}x{cols}");
                let mut data = buffer(&b, DType::F32, &x);
                let mut out = poisoned(&b, rows * cols);
                let to = out.rows_mut(DType::F32, rows, cols);
                b.norm(&Stream(0), data.rows(DType::F32, rows, cols), &norm, to).unwrap();
                // One column's layer norm is 0 · huge.
                let tolerance = if cols == 1 { 1e-3 } else { 2e-6 };
                let got = floats(&b, out.rows(DType::F32, rows, cols));
                assert_close(&case, &got, &want, tolerance, 1.0);

                // In place, all rows as heads of one.
                b.norm_heads(&Stream(0), data.rows_mut(DType::F32, 1, rows * cols), &norm).unwrap();
                assert_same(&case, &floats(&b, data.rows(DType::F32, rows, cols)), &got);
            }
        }
    }
}

/// erf by its series for small arguments and its continued fraction for large ones.
fn erf(x: f64) -> f64 {
    if x.abs() < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..80 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    } else {
        let y = x.abs();
        let fraction = (1..60).rev().fold(y, |tail, n| y + f64::from(n) / 2.0 / tail);
        (1.0 - (-y * y).exp() / (fraction * std::f64::consts::PI.sqrt())).copysign(x)
    }
}

fn activation_reference(activation: Activation, x: f32) -> f64 {
    let x = f64::from(x);
    match activation {
        Activation::SiluGated => x / (1.0 + (-x).exp()),
        Activation::GeluTanhGated | Activation::GeluTanh => {
            x / 2.0 * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Gelu => x / 2.0 * (1.0 + erf(x / 2f64.sqrt())),
    }
}

#[test]
fn activations_equal_the_reference() {
    let mut random = Random(13);
    let kinds =
        [Activation::SiluGated, Activation::GeluTanhGated, Activation::Relu, Activation::Gelu, Activation::GeluTanh];
    for (name, b) in backends() {
        for kind in kinds {
            for (rows, cols) in [(1, 1), (3, 15), (2, 16), (100, 333)] {
                let halves = if kind.gated() { 2 } else { 1 };
                let mut x: Vec<f32> = random.normals(rows * cols * halves).iter().map(|x| x * 4.0).collect();
                for (to, from) in x.iter_mut().zip([0.0, -0.0, 100.0, -100.0, 1e4, -1e4]) {
                    *to = from;
                }
                let want: Vec<f64> = x
                    .chunks(cols * halves)
                    .flat_map(|row| {
                        (0..cols).map(|j| {
                            let up = if kind.gated() { f64::from(row[cols + j]) } else { 1.0 };
                            activation_reference(kind, row[j]) * up
                        })
                    })
                    .collect();
                let data = buffer(&b, DType::F32, &x);
                let mut out = poisoned(&b, rows * cols);
                let to = out.rows_mut(DType::F32, rows, cols);
                b.activate(&Stream(0), data.rows(DType::F32, rows, cols * halves), kind, to).unwrap();
                let got = floats(&b, out.rows(DType::F32, rows, cols));
                assert_close(&format!("{name} {kind:?} {rows}x{cols}"), &got, &want, 1e-6, 1.0);
            }
        }
    }
}

#[test]
fn rotations_equal_the_reference() {
    let mut random = Random(17);
    for (name, b) in backends() {
        for (tokens, heads, head_dim, pairs) in [(1, 1, 2, 1), (3, 2, 16, 8), (5, 3, 80, 16), (40, 9, 64, 32)] {
            let frequencies: Vec<f32> = (0..pairs).map(|i| 10000f32.powf(-(i as f32) / pairs as f32)).collect();
            let rotation = Rotation { frequencies: frequencies.clone(), factor: 1.25 };
            let positions: Vec<usize> = (0..tokens).map(|_| random.below(100_000)).collect();
            let ids = buffer(&b, DType::U32, &positions.iter().map(|&p| p as f32).collect::<Vec<_>>());
            let mut table = poisoned(&b, tokens * 2 * pairs);
            let to = table.rows_mut(DType::F32, tokens, 2 * pairs);
            b.rotation_table(&Stream(0), &rotation, ids.rows(DType::U32, tokens, 1), to).unwrap();
            let angle = |t: usize, i: usize| f64::from(positions[t] as f32 * frequencies[i]);
            let want: Vec<f64> = (0..tokens)
                .flat_map(|t| {
                    let cosines = (0..pairs).map(move |i| angle(t, i).cos() * 1.25);
                    cosines.chain((0..pairs).map(move |i| angle(t, i).sin() * 1.25))
                })
                .collect();
            let table = table.rows(DType::F32, tokens, 2 * pairs);
            let case = format!("{name} {tokens} {heads} {head_dim} {pairs}");
            assert_close(&case, &floats(&b, table), &want, 1e-6, 1.0);

            let cols = heads * head_dim;
            let x = random.normals(tokens * cols);
            let mut data = buffer(&b, DType::F32, &x);
            b.rotate(&Stream(0), &rotation, table, head_dim, data.rows_mut(DType::F32, tokens, cols)).unwrap();
            let want: Vec<f64> = (0..tokens * cols)
                .map(|at| {
                    let (t, i) = (at / cols, at % head_dim);
                    let value = |i: usize| f64::from(x[at - at % head_dim + i]);
                    let turn = |i: usize| (want[t * 2 * pairs + i], want[t * 2 * pairs + pairs + i]);
                    if i < pairs {
                        let (cosine, sine) = turn(i);
                        value(i) * cosine - value(i + pairs) * sine
                    } else if i < 2 * pairs {
                        let (cosine, sine) = turn(i - pairs);
                        value(i) * cosine + value(i - pairs) * sine
                    } else {
                        value(i)
                    }
                })
                .collect();
            assert_close(&case, &floats(&b, data.rows(DType::F32, tokens, cols)), &want, 1e-6, 1.0);
        }
    }
}

#[test]
fn log_probabilities_equal_the_reference() {
    let mut random = Random(19);
    for (name, b) in backends() {
        for (rows, cols) in [(1, 1), (2, 15), (3, 16), (9, 1000), (2, 49152)] {
            let x: Vec<f32> = random.normals(rows * cols).iter().map(|x| x * 6.0 - 40.0).collect();
            let targets: Vec<usize> = (0..rows).map(|_| random.below(cols)).collect();
            let logits = buffer(&b, DType::F32, &x);
            let ids = buffer(&b, DType::U32, &targets.iter().map(|&t| t as f32).collect::<Vec<_>>());
            let mut out = poisoned(&b, rows);
            let to = out.rows_mut(DType::F32, rows, 1);
            b.log_probability(&Stream(0), logits.rows(DType::F32, rows, cols), ids.rows(DType::U32, rows, 1), to)
                .unwrap();
            let want: Vec<f64> = x
                .chunks(cols)
                .zip(&targets)
                .map(|(x, &t)| f64::from(x[t]) - x.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln())
                .collect();
            let got = floats(&b, out.rows(DType::F32, rows, 1));
            assert_close(&format!("{name} {rows}x{cols}"), &got, &want, 1e-6, 1.0);
        }
    }
}
