//! `blend` and `add_tail` against their definitions.

use super::*;
use crate::backend::Blend;

#[test]
fn rows_are_blended() {
    let mut random = Random(71);
    let (_, b) = backends().next().unwrap();
    for (rows, cols) in [(1, 1), (1, 192), (3, 37)] {
        for factor in [0.0, 1.0, 0.25, -0.5] {
            let (begin, toward, held) =
                (random.normals(rows * cols), random.normals(rows * cols), random.normals(rows * cols));
            let (x, y) = (buffer(&b, DType::F32, &begin), buffer(&b, DType::F32, &toward));
            for given in [true, false] {
                let mut out = buffer(&b, DType::F32, &held);
                let from = given.then(|| x.rows(DType::F32, rows, cols));
                let blend = Blend { from, out: out.rows_mut(DType::F32, rows, cols), factor };
                b.blend(&Stream(0), blend, y.rows(DType::F32, rows, cols)).unwrap();
                let got = floats(&b, out.rows(DType::F32, rows, cols));
                for (i, got) in got.iter().enumerate() {
                    let a = if given { begin[i] } else { held[i] };
                    let want = f64::from(a) + f64::from(factor) * (f64::from(toward[i]) - f64::from(a));
                    assert!(
                        (f64::from(*got) - want).abs() < 1e-6,
                        "{rows} x {cols}, {factor}, {given}: {got} for {want}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_tail_gets_its_part_of_each_head() {
    let mut random = Random(73);
    let (_, b) = backends().next().unwrap();
    for (heads, kv_heads, d) in [(1, 1, 1), (9, 3, 64), (4, 4, 19), (6, 1, 8)] {
        let (means, attended) = (random.normals(kv_heads * d), random.normals(heads * d));
        let weights: Vec<f32> = (0..heads).map(|head| head as f32 / heads as f32).collect();
        let (means_of, mut out) = (buffer(&b, DType::F32, &means), buffer(&b, DType::F32, &attended));
        let weights_of = buffer(&b, DType::F32, &weights);
        let (means_of, weights_of) =
            (means_of.rows(DType::F32, 1, kv_heads * d), weights_of.rows(DType::F32, 1, heads));
        b.add_tail(&Stream(0), means_of, weights_of, out.rows_mut(DType::F32, 1, heads * d)).unwrap();
        let got = floats(&b, out.rows(DType::F32, 1, heads * d));
        for (i, got) in got.iter().enumerate() {
            let (head, weight) = (i / d, f64::from(weights[i / d]));
            let mean = f64::from(means[head / (heads / kv_heads) * d + i % d]);
            let want = (1.0 - weight) * f64::from(attended[i]) + weight * mean;
            assert!((f64::from(*got) - want).abs() < 1e-6, "{heads}, {kv_heads}, {d}: {got} for {want}");
        }
    }
}
