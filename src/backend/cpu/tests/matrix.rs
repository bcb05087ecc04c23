//! `matmul` in both shapes, `embed`.

use super::*;
use crate::backend::Shape;

struct Case {
    seed: u64,
    dtype: DType,
    m: usize,
    n: usize,
    k: usize,
    accumulate: bool,
    bias: bool,
}

struct Inputs {
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Option<Vec<f32>>,
    before: Vec<f32>,
}

impl Case {
    fn inputs(&self) -> Inputs {
        let mut random = Random(self.seed);
        let w = random.normals(self.n * self.k).iter().map(|&x| rounded(self.dtype, x)).collect();
        Inputs {
            x: random.normals(self.m * self.k),
            w,
            bias: self.bias.then(|| random.normals(self.n)),
            before: if self.accumulate { random.normals(self.m * self.n) } else { vec![f32::NAN; self.m * self.n] },
        }
    }

    fn name(&self, who: &str) -> String {
        let Case { seed, dtype, m, n, k, accumulate, bias } = self;
        format!("{who} seed {seed} {dtype} {m}x{n}x{k} accumulate {accumulate} bias {bias}")
    }

    fn reference(&self, inputs: &Inputs) -> Vec<f64> {
        let dot = |i: usize, j: usize| -> f64 {
            let (x, w) = (&inputs.x[i * self.k..][..self.k], &inputs.w[j * self.k..][..self.k]);
            x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
        };
        (0..self.m * self.n)
            .map(|at| {
                let (i, j) = (at / self.n, at % self.n);
                dot(i, j)
                    + inputs.bias.as_ref().map_or(0.0, |b| f64::from(b[j]))
                    + if self.accumulate { f64::from(inputs.before[at]) } else { 0.0 }
            })
            .collect()
    }

    /// With x and out as windows of wider rows, whose other columns must stay as they are.
    fn run(&self, b: &CpuBackend, inputs: &Inputs, shape: Shape) -> Vec<f32> {
        let widen = |x: &[f32], cols: usize, with: f32| -> Vec<f32> {
            x.chunks(cols).flat_map(|row| [&[with], row, &[with, with]].concat()).collect()
        };
        let weight = linear(b, self.dtype, self.n, &inputs.w, inputs.bias.as_deref());
        let x = buffer(b, DType::F32, &widen(&inputs.x, self.k, f32::NAN));
        let mut out = buffer(b, DType::F32, &widen(&inputs.before, self.n, 77.0));
        let x = x.rows(DType::F32, self.m, self.k + 3).col_range(1, self.k);
        let to = out.rows_mut(DType::F32, self.m, self.n + 3).col_range(1, self.n);
        b.matmul(&Stream(0), x, &weight, self.accumulate, shape, to).unwrap();
        let all = out.rows(DType::F32, self.m, self.n + 3);
        for edge in [all.col_range(0, 1), all.col_range(self.n + 1, 2)] {
            assert!(floats(b, edge).iter().all(|&x| x == 77.0), "{}: wrote past its columns", self.name(""));
        }
        floats(b, all.col_range(1, self.n))
    }
}

fn cases() -> Vec<Case> {
    let mut random = Random(1);
    let mut cases = Vec::new();
    let sizes = [
        (1, 1, 1),
        (1, 7, 16),
        (2, 33, 17),
        (5, 31, 40),
        (16, 32, 64),
        (31, 64, 48),
        (33, 96, 33),
        (47, 100, 96),
        (64, 65, 129),
        (3, 5, 1100),
        (130, 40, 1056),
    ];
    for (i, (m, n, k)) in sizes.into_iter().enumerate() {
        for dtype in STORED {
            let seed = random.next();
            cases.push(Case { seed, dtype, m, n, k, accumulate: i % 2 == 1, bias: i % 3 == 1 });
        }
    }
    cases
}

#[test]
fn products_equal_the_reference() {
    for case in cases() {
        let inputs = case.inputs();
        let want = case.reference(&inputs);
        for (name, b) in backends() {
            for shape in [Shape::Decode, Shape::Prefill] {
                // Errors grow with the root of the depth: of f32 sums, or of what operands lose that are split for tiles or
                // made integers (`unit::vnni`: 7e-5 of a sum's spread, which is half the scale; six times that).
                let tolerance = match b.level() {
                    _ if shape == Shape::Decode || case.dtype == DType::F32 => 3e-6,
                    Level::Vnni => 2.2e-4,
                    Level::Amx => 1.2e-5,
                    Level::Scalar | Level::Avx2 | Level::Avx512 => 3e-6,
                };
                let got = case.run(&b, &inputs, shape);
                let scale = (case.k as f64).sqrt() * 2.0 + 1.0;
                assert_close(&case.name(&format!("{name} {shape:?}")), &got, &want, tolerance, scale);
            }
        }
    }
}

/// Rows that are hard for a unit of integers, beside columns like them: outliers, of either sign throughout, parallel (the
/// largest sum there can be), tiny, huge, zero, far from zero.
fn hard(random: &mut Random, dtype: DType, rows: usize, k: usize) -> Vec<f32> {
    let mut x = random.normals(rows * k);
    for (i, row) in x.chunks_mut(k).enumerate() {
        match i % 8 {
            0 => row[random.below(k)] *= 3000.0,
            1 => row.iter_mut().for_each(|x| *x = x.abs() + 1.0),
            2 => row.iter_mut().for_each(|x| *x = -1.5),
            3 => row.iter_mut().step_by(2).for_each(|x| *x = 1e-3),
            4 => row.iter_mut().for_each(|x| *x *= 1e-4),
            5 => row.iter_mut().for_each(|x| *x *= 1e4),
            6 => row.fill(0.0),
            _ => row[..k.min(3)].fill(200.0),
        }
    }
    x.into_iter().map(|x| rounded(dtype, x)).collect()
}

#[test]
fn errors_of_prefill_are_those_of_blocks() {
    let mut random = Random(41);
    for (m, n, k) in [(17, 40, 64), (30, 33, 200), (16, 16, 1100), (15, 8, 63)] {
        for dtype in [DType::F16, DType::BF16] {
            let (x, w) = (hard(&mut random, DType::F32, m, k), hard(&mut random, dtype, n, k));
            let inputs = Inputs { x, w, bias: None, before: vec![f32::NAN; m * n] };
            let case = Case { seed: 41, dtype, m, n, k, accumulate: false, bias: false };
            let want = case.reference(&inputs);
            for (name, b) in backends() {
                let got = case.run(&b, &inputs, Shape::Prefill);
                for (at, (&got, &want)) in got.iter().zip(&want).enumerate() {
                    // Integers (`unit::vnni`) are off by 1/2 each, so 64 of them by a norm of 4: of 46,300, or of 32,767
                    // where few elements make up the norm; twice that for both operands. Other units err by less.
                    let norms = |x: &[f32], row: usize| -> Vec<f64> {
                        let square = |x: &f32| f64::from(*x) * f64::from(*x);
                        x[row * k..][..k].chunks(64).map(|block| block.iter().map(square).sum::<f64>().sqrt()).collect()
                    };
                    let (a, w) = (norms(&inputs.x, at / n), norms(&inputs.w, at % n));
                    let most = a.iter().zip(&w).map(|(a, w)| a * w).sum::<f64>();
                    let error = (f64::from(got) - want).abs();
                    assert!(error <= 2.5e-4 * most, "{}: {at}: {got}, not {want}", case.name(&name));
                }
            }
        }
    }
}

#[test]
fn what_is_not_finite_stays_in_its_row() {
    for (name, b) in backends() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let case = Case { seed: 43, dtype: DType::BF16, m: 20, n: 33, k: 150, accumulate: false, bias: false };
            let mut inputs = case.inputs();
            let good = case.run(&b, &inputs, Shape::Prefill);
            inputs.x[4 * case.k + 70] = bad;
            let got = case.run(&b, &inputs, Shape::Prefill);
            for (at, (got, good)) in got.iter().zip(&good).enumerate() {
                match at / case.n {
                    4 => assert!(!got.is_finite(), "{name} {bad}: {got}"),
                    _ => assert_eq!(got.to_bits(), good.to_bits(), "{name} {bad}: row {}", at / case.n),
                }
            }
        }
    }
}

#[test]
fn decode_rows_do_not_depend_on_their_neighbours() {
    for level in Level::available() {
        let b = backend(level, 2);
        for dtype in STORED {
            let case = Case { seed: 5, dtype, m: 11, n: 37, k: 83, accumulate: true, bias: true };
            let inputs = case.inputs();
            let all = case.run(&b, &inputs, Shape::Decode);
            for m in 1..case.m {
                let part = Case { m, ..case };
                let first = case.m - m;
                let own = Inputs {
                    x: inputs.x[first * case.k..].to_vec(),
                    before: inputs.before[first * case.n..].to_vec(),
                    w: inputs.w.clone(),
                    bias: inputs.bias.clone(),
                };
                let got = part.run(&b, &own, Shape::Decode);
                assert_same(&part.name(&format!("{level:?}")), &got, &all[first * case.n..]);
            }
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_the_run() {
    for level in Level::available() {
        for dtype in STORED {
            for shape in [Shape::Decode, Shape::Prefill] {
                let case = Case { seed: 9, dtype, m: 70, n: 600, k: 130, accumulate: false, bias: true };
                let inputs = case.inputs();
                let want = case.run(&backend(level, 1), &inputs, shape);
                for threads in [1, 2, 3, 8] {
                    let got = case.run(&backend(level, threads), &inputs, shape);
                    assert_same(&case.name(&format!("{level:?} x{threads} {shape:?}")), &got, &want);
                }
            }
        }
    }
}

#[test]
fn embeddings_are_rows_of_the_table() {
    let mut random = Random(3);
    for (name, b) in backends() {
        for dtype in STORED {
            for (rows, cols, m) in [(7, 1, 3), (50, 33, 70), (5, 600, 100)] {
                let w: Vec<f32> = random.normals(rows * cols).iter().map(|&x| rounded(dtype, x)).collect();
                let ids: Vec<usize> = (0..m).map(|_| random.below(rows)).collect();
                let table = linear(&b, dtype, rows, &w, None);
                let id_buffer = buffer(&b, DType::U32, &ids.iter().map(|&i| i as f32).collect::<Vec<_>>());
                let mut out = poisoned(&b, m * cols);
                let want: Vec<f32> = ids.iter().flat_map(|&i| w[i * cols..][..cols].to_vec()).collect();
                for times in [1.0, 2.0] {
                    let to = out.rows_mut(DType::F32, m, cols);
                    b.embed(&Stream(0), &table, id_buffer.rows(DType::U32, m, 1), times == 2.0, to).unwrap();
                    let got = floats(&b, out.rows(DType::F32, m, cols));
                    let want: Vec<f32> = want.iter().map(|x| x * times).collect();
                    assert_same(&format!("{name} {dtype}"), &got, &want);
                }
            }
        }
    }
}
