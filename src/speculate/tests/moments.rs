use super::noise;
use crate::backend::Rotation;
use crate::speculate::moments::{rotate, second_moment, spread};

fn rotation(half: usize, theta: f32, factor: f32) -> Rotation {
    Rotation { frequencies: (0..half).map(|i| theta.powf(-(i as f32) / half as f32)).collect(), factor }
}

/// The closed form against what it is the mean of: every row rotated to every position.
#[test]
fn spread_is_the_mean_over_all_positions() {
    for (seed, d, half, positions, factor) in [(1, 12, 6, 97, 1.0), (2, 14, 4, 301, 1.3), (3, 8, 4, 1, 1.0)] {
        let rotation = rotation(half, 50.0, factor);
        let rows = noise(seed, 5 * d);
        let head = || std::iter::once(0..d);
        let got = spread(&second_moment(&rows, d, head(), |_, _| ()), &rotation, positions);
        let mut expected = vec![0.0; d * d];
        for position in 0..positions {
            let moment = second_moment(&rows, d, head(), |_, row| rotate(&rotation, position, row));
            for (at, sum) in expected.iter_mut().enumerate() {
                *sum += moment[(at / d, at % d)] / positions as f64;
            }
        }
        for (at, expected) in expected.iter().enumerate() {
            let got = got[(at / d, at % d)];
            // The model's angles are products in f32.
            assert!((got - expected).abs() < 1e-4, "seed {seed}: ({}, {}): {got} for {expected}", at / d, at % d);
        }
    }
}

/// The second moment of two heads of a group, element by element.
#[test]
fn second_moment_sums_over_rows_and_heads() {
    let (n, width, d) = (7, 20, 4);
    let rows = noise(4, n * width);
    let got = second_moment(&rows, width, [4..8, 8..12].into_iter(), |i, row| row[0] += i as f64);
    for a in 0..d {
        for b in 0..d {
            let mut expected = 0.0;
            for i in 0..n {
                for start in [4, 8] {
                    let x = |c: usize| f64::from(rows[i * width + start + c]) + if c == 0 { i as f64 } else { 0.0 };
                    expected += x(a) * x(b);
                }
            }
            assert!((got[(a, b)] - expected).abs() < 1e-9);
        }
    }
}

/// Rotation as the backend does it.
#[test]
fn rotate_agrees_with_the_backend() {
    use crate::backend::cpu::{CpuBackend, CpuOptions};
    use crate::backend::{Backend, DType, Place};
    let backend = CpuBackend::new(CpuOptions { threads: 1, level: None }).unwrap();
    let stream = backend.stream().unwrap();
    let (d, rotation) = (12, rotation(4, 1000.0, 1.2));
    let values = noise(5, d);
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let position = 1234;
    let mut x = backend.allocate(4 * d, Place::Device, "test").unwrap();
    let mut table = backend.allocate(32, Place::Device, "test").unwrap();
    let mut at = backend.allocate(4, Place::Device, "test").unwrap();
    backend.upload(&stream, &bytes, &mut x, 0).unwrap();
    backend.upload(&stream, &(position as u32).to_le_bytes(), &mut at, 0).unwrap();
    let table_rows = table.rows_mut(DType::F32, 1, 8);
    backend.rotation_table(&stream, &rotation, at.rows(DType::U32, 1, 1), table_rows).unwrap();
    backend.rotate(&stream, &rotation, table.rows(DType::F32, 1, 8), d, x.rows_mut(DType::F32, 1, d)).unwrap();
    let mut out = vec![0; 4 * d];
    backend.download(&stream, x.rows(DType::F32, 1, d), &mut out).unwrap();
    let mut row: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
    rotate(&rotation, position, &mut row);
    for (got, expected) in row.iter().zip(out.as_chunks().0) {
        assert!((got - f64::from(f32::from_le_bytes(*expected))).abs() < 1e-4);
    }
}
