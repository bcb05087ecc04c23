use super::noise;
use crate::speculate::ridge;

/// The normal equations in f64 by Gaussian elimination with pivoting.
fn direct(x: &[f32], inputs: usize, y: &[f32], weight: &[f32]) -> Vec<f64> {
    let (n, outputs) = (x.len() / inputs, weight.len() / inputs);
    let at = |i: usize, j: usize| f64::from(x[i * inputs + j]);
    let mut result = Vec::new();
    for o in 0..outputs {
        let own = &weight[o * inputs..(o + 1) * inputs];
        let residual =
            |i: usize| f64::from(y[i * outputs + o]) - (0..inputs).map(|j| at(i, j) * f64::from(own[j])).sum::<f64>();
        // Rows of [XᵀX + λ, Xᵀr].
        let mut rows: Vec<Vec<f64>> = (0..inputs)
            .map(|a| {
                let mut row: Vec<f64> = (0..inputs).map(|b| (0..n).map(|i| at(i, a) * at(i, b)).sum::<f64>()).collect();
                row.push((0..n).map(|i| at(i, a) * residual(i)).sum::<f64>());
                row
            })
            .collect();
        let lambda = 0.1 * (0..inputs).map(|a| rows[a][a]).sum::<f64>() / inputs as f64;
        (0..inputs).for_each(|a| rows[a][a] += lambda);
        for column in 0..inputs {
            let pivot = (column..inputs).max_by(|&a, &b| rows[a][column].abs().total_cmp(&rows[b][column].abs()));
            rows.swap(column, pivot.unwrap());
            let pivot_row = rows[column].clone();
            for row in rows.iter_mut().skip(column + 1) {
                let factor = row[column] / pivot_row[column];
                row.iter_mut().zip(&pivot_row).for_each(|(x, p)| *x -= factor * p);
            }
        }
        let mut change = vec![0.0; inputs];
        for a in (0..inputs).rev() {
            let known: f64 = (a + 1..inputs).map(|b| rows[a][b] * change[b]).sum();
            change[a] = (rows[a][inputs] - known) / rows[a][a];
        }
        result.extend(change.iter().zip(own).map(|(c, w)| c + f64::from(*w)));
    }
    result
}

#[test]
fn agrees_with_the_normal_equations() {
    for (seed, n, inputs, outputs, threads) in [(1, 200, 24, 9, 1), (2, 37, 41, 5, 2), (3, 300, 70, 130, 3)] {
        let (x, weight) = (noise(seed, n * inputs), noise(seed + 10, outputs * inputs));
        let y = noise(seed + 20, n * outputs);
        let got = ridge::fit(&x, inputs, &y, &weight, threads).unwrap();
        let expected = direct(&x, inputs, &y, &weight);
        // Products are in f32.
        let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let error = (f64::from(*got) - expected).abs() / largest;
            assert!(error < 1e-5, "seed {seed}, {i}: {got} for {expected}");
        }
    }
}

/// Threads share columns out, and so change no bit.
#[test]
fn threads_change_nothing() {
    let (n, inputs, outputs) = (900, 300, 200);
    let (x, weight, y) = (noise(1, n * inputs), noise(2, outputs * inputs), noise(3, n * outputs));
    let fit = |threads| ridge::fit(&x, inputs, &y, &weight, threads).unwrap();
    let alone = fit(1);
    for threads in [2, 3, 5, 16] {
        assert!(alone == fit(threads), "{threads} threads");
    }
}

/// When the weight is right already, nothing is changed; when it is not, it moves towards the truth.
#[test]
fn moves_from_the_weight_to_the_truth() {
    let (n, inputs, outputs) = (400, 16, 6);
    let (x, truth) = (noise(1, n * inputs), noise(2, outputs * inputs));
    let y: Vec<f32> = (0..n * outputs)
        .map(|at| {
            let (i, o) = (at / outputs, at % outputs);
            (0..inputs).map(|j| x[i * inputs + j] * truth[o * inputs + j]).sum()
        })
        .collect();
    let same = ridge::fit(&x, inputs, &y, &truth, 1).unwrap();
    assert!(same.iter().zip(&truth).all(|(a, b)| (a - b).abs() < 1e-5));
    let start = noise(3, outputs * inputs);
    let moved = ridge::fit(&x, inputs, &y, &start, 1).unwrap();
    let distance = |w: &[f32]| w.iter().zip(&truth).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
    assert!(distance(&moved) < 0.2 * distance(&start), "{} of {}", distance(&moved), distance(&start));
    assert!(distance(&moved) > 0.01 * distance(&start), "λ holds it back");
}

#[test]
fn degenerate_input_is_no_failure() {
    let weight = noise(1, 12);
    // Nothing but zeros says nothing: the weight stays.
    assert_eq!(ridge::fit(&[0.0; 40], 4, &noise(2, 30), &weight, 1).unwrap(), weight);
    let mut x = noise(3, 40);
    x[7] = f32::NAN;
    let error = ridge::fit(&x, 4, &noise(2, 30), &weight, 1).unwrap_err();
    assert!(error.message().contains("not finite"), "{error}");
}
