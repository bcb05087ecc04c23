//! Matrix products, for decode and for prefill.

use kvahead::backend::{DType, Shape};

use crate::rig::*;

struct Case {
    dtype: DType,
    rows: usize,
    depth: usize,
    outputs: usize,
    bias: bool,
    accumulate: bool,
}

impl Case {
    /// The product, and with `one_by_one` the same a row at a time.
    fn run(&self, rig: &Rig<'_>, shape: Shape, one_by_one: bool) -> Vec<f32> {
        let Case { dtype, rows, depth, outputs, .. } = *self;
        let mut random = Random((rows * 31 + depth * 7 + outputs) as u64);
        let scale = 1.0 / (depth as f32).sqrt();
        let w: Vec<f32> = random.normals(outputs * depth).iter().map(|x| x * scale).collect();
        // Activations are a window of wider rows.
        let (x, bias, before) =
            (random.normals(rows * (depth + 4)), random.normals(outputs), random.normals(rows * outputs));
        let weight = rig.linear(dtype, outputs, &w, self.bias.then_some(&bias[..]));
        let x = rig.buffer(DType::F32, &x);
        let x = x.rows(DType::F32, rows, depth + 4).col_range(0, depth);
        let mut out = if self.accumulate { rig.buffer(DType::F32, &before) } else { rig.poisoned(rows * outputs) };
        let step = if one_by_one { 1 } else { rows };
        for from in (0..rows).step_by(step) {
            let to = out.rows_mut(DType::F32, rows, outputs).row_range(from, step);
            rig.b.matmul(&rig.stream, x.row_range(from, step), &weight, self.accumulate, shape, to).unwrap();
        }
        rig.floats(out.rows(DType::F32, rows, outputs))
    }

    fn name(&self) -> String {
        let Case { dtype, rows, depth, outputs, bias, accumulate } = self;
        format!("{dtype} {rows} x {depth} x {outputs} bias {bias} accumulate {accumulate}")
    }
}

fn large(dtype: DType, depth: usize, outputs: usize) -> impl Iterator<Item = Case> {
    let case = move |rows| Case { dtype, rows, depth, outputs, bias: rows == 9, accumulate: rows == 3 };
    [1, 3, 8, 9, 20, 32, 45].into_iter().map(case)
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in STORED {
        for (i, (depth, outputs)) in
            [(1, 1), (16, 3), (37, 5), (64, 130), (576, 960), (1536, 577), (2049, 65)].into_iter().enumerate()
        {
            for (j, rows) in [1, 2, 3, 4, 7, 8, 20].into_iter().enumerate() {
                cases.push(Case { dtype, rows, depth, outputs, bias: (i + j) % 2 == 0, accumulate: (i + j) % 3 == 0 });
            }
        }
        cases.push(Case { dtype, rows: 1, depth: 64, outputs: 20001, bias: true, accumulate: false });
        // Large enough for tensor cores; one to three eights of rows, and more.
        cases.extend(large(dtype, 1032, 4099));
    }
    cases
}

#[test]
fn decode_products() {
    with_both(|cuda, cpu| {
        // Few and many outputs a multiprocessor, too, one and several blocks for the depth of a tile, and less depth than a
        // block has warps for.
        let more = [(1400, 3001), (264, 16390), (264, 40010), (2056, 2050), (4104, 1030), (4104, 5001)];
        let more = more.into_iter().flat_map(|(d, n)| large(DType::BF16, d, n));
        // And more rows than one launch takes.
        let many = Case { dtype: DType::BF16, rows: 205, depth: 4104, outputs: 1030, bias: true, accumulate: true };
        for case in some(cases().into_iter().chain(more).chain([many])) {
            let got = case.run(cuda, Shape::Decode, false);
            assert_close(&case.name(), &got, &case.run(cpu, Shape::Decode, false), 4e-6);
            assert_same(&case.name(), &case.run(cuda, Shape::Decode, true), &got);
        }
    });
}

#[test]
fn prefill_products() {
    with_both(|cuda, cpu| {
        for mut case in some(cases()) {
            case.rows = case.rows * 13 + 1;
            let got = case.run(cuda, Shape::Prefill, false);
            // Through cuBLAS, activations are rounded to 16-bit weights' type.
            let tolerance = match case.dtype {
                DType::F32 => 1e-5,
                DType::F16 => 4e-3,
                _ => 3e-2,
            };
            assert_close(&case.name(), &got, &case.run(cpu, Shape::Decode, false), tolerance);
            // Which is an error of rounding, not of a row: on average it is far smaller.
            let want = case.run(cpu, Shape::Decode, false);
            let square = |x: f32| f64::from(x) * f64::from(x);
            let error: f64 = got.iter().zip(&want).map(|(&g, &w)| square(g - w)).sum();
            let size: f64 = want.iter().map(|&w| square(w)).sum();
            assert!(
                (error / size).sqrt() < f64::from(tolerance),
                "{}: relative error {}",
                case.name(),
                (error / size).sqrt()
            );
        }
    });
}
