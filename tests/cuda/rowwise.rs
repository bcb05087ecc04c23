//! Embedding, norms, activations, rotation, log-probabilities.

use kvahead::backend::{Activation, DType, Norm, NormKind, Rotation};

use crate::rig::*;

#[test]
fn embedding() {
    with_both(|cuda, cpu| {
        let mut random = Random(1);
        for dtype in STORED {
            for (vocabulary, cols, tokens, accumulate) in [(7, 1, 1, false), (100, 33, 9, true), (1000, 576, 70, false)]
            {
                let (w, x) = (random.normals(vocabulary * cols), random.normals(tokens * cols));
                let ids: Vec<f32> = (0..tokens).map(|_| random.below(vocabulary) as f32).collect();
                let run = |rig: &Rig<'_>| {
                    let table = rig.linear(dtype, vocabulary, &w, None);
                    let ids = rig.buffer(DType::U32, &ids);
                    let mut out = if accumulate { rig.buffer(DType::F32, &x) } else { rig.poisoned(tokens * cols) };
                    let to = out.rows_mut(DType::F32, tokens, cols);
                    rig.b.embed(&rig.stream, &table, ids.rows(DType::U32, tokens, 1), accumulate, to).unwrap();
                    rig.floats(out.rows(DType::F32, tokens, cols))
                };
                assert_same(&format!("{dtype} {vocabulary} {cols}"), &run(cuda), &run(cpu));
            }
        }
    });
}

#[test]
fn norms() {
    with_both(|cuda, cpu| {
        let mut random = Random(2);
        for kind in [NormKind::Rms, NormKind::Layer] {
            for (rows, cols) in [(1, 2), (3, 15), (2, 16), (5, 64), (70, 577), (2, 5120)] {
                let x: Vec<f32> = random.normals(rows * (cols + 3)).iter().map(|x| x + 3.0).collect();
                let (w, shift) = (random.normals(cols), random.normals(cols));
                let run = |rig: &Rig<'_>| {
                    let bias = (kind == NormKind::Layer).then(|| rig.vector(&shift));
                    let norm = Norm { kind, epsilon: 1e-5, weight: rig.vector(&w), bias };
                    let data = rig.buffer(DType::F32, &x);
                    let mut out = rig.poisoned(rows * cols);
                    let from = data.rows(DType::F32, rows, cols + 3).col_range(1, cols);
                    rig.b.norm(&rig.stream, from, &norm, out.rows_mut(DType::F32, rows, cols)).unwrap();
                    let mut all = rig.floats(out.rows(DType::F32, rows, cols));
                    // In place, three heads a row inside wider rows.
                    let wide: Vec<f32> = x.iter().cycle().take(rows * (3 * cols + 2)).copied().collect();
                    let mut heads = rig.buffer(DType::F32, &wide);
                    let window = heads.rows_mut(DType::F32, rows, 3 * cols + 2).col_range(2, 3 * cols);
                    rig.b.norm_heads(&rig.stream, window, &norm).unwrap();
                    all.extend(rig.floats(heads.rows(DType::F32, rows, 3 * cols + 2)));
                    all
                };
                assert_close(&format!("{kind:?} {rows}x{cols}"), &run(cuda), &run(cpu), 4e-6);
            }
        }
    });
}

#[test]
fn activations() {
    with_both(|cuda, cpu| {
        let mut random = Random(3);
        for kind in
            [Activation::SiluGated, Activation::GeluTanhGated, Activation::Relu, Activation::Gelu, Activation::GeluTanh]
        {
            for (rows, cols) in [(1, 1), (3, 15), (2, 16), (100, 333), (2, 14336)] {
                let halves = if kind.gated() { 2 } else { 1 };
                let mut x: Vec<f32> = random.normals(rows * cols * halves).iter().map(|x| x * 4.0).collect();
                for (to, from) in x.iter_mut().zip([0.0, -0.0, 100.0, -100.0, 1e4, -1e4]) {
                    *to = from;
                }
                let run = |rig: &Rig<'_>| {
                    let data = rig.buffer(DType::F32, &x);
                    let mut out = rig.poisoned(rows * cols);
                    let from = data.rows(DType::F32, rows, cols * halves);
                    rig.b.activate(&rig.stream, from, kind, out.rows_mut(DType::F32, rows, cols)).unwrap();
                    rig.floats(out.rows(DType::F32, rows, cols))
                };
                assert_close(&format!("{kind:?} {rows}x{cols}"), &run(cuda), &run(cpu), 2e-6);
            }
        }
    });
}

#[test]
fn rotation() {
    with_both(|cuda, cpu| {
        let mut random = Random(4);
        for (tokens, heads, head_dim, pairs) in [(1, 1, 2, 1), (3, 2, 16, 8), (5, 3, 80, 16), (40, 9, 64, 32)] {
            let frequencies: Vec<f32> = (0..pairs).map(|i| 10000f32.powf(-(i as f32) / pairs as f32)).collect();
            let rotation = Rotation { frequencies, factor: 1.25 };
            let positions: Vec<f32> = (0..tokens).map(|_| random.below(100_000) as f32).collect();
            let cols = heads * head_dim;
            let x = random.normals(tokens * (cols + 7));
            let run = |rig: &Rig<'_>| {
                let ids = rig.buffer(DType::U32, &positions);
                let mut table = rig.poisoned(tokens * 2 * pairs);
                let to = table.rows_mut(DType::F32, tokens, 2 * pairs);
                rig.b.rotation_table(&rig.stream, &rotation, ids.rows(DType::U32, tokens, 1), to).unwrap();
                let table = table.rows(DType::F32, tokens, 2 * pairs);
                let mut data = rig.buffer(DType::F32, &x);
                let window = data.rows_mut(DType::F32, tokens, cols + 7).col_range(0, cols);
                rig.b.rotate(&rig.stream, &rotation, table, head_dim, window).unwrap();
                let mut all = rig.floats(table);
                all.extend(rig.floats(data.rows(DType::F32, tokens, cols + 7)));
                all
            };
            assert_close(&format!("{tokens} {heads} {head_dim} {pairs}"), &run(cuda), &run(cpu), 1e-6);
        }
    });
}

#[test]
fn log_probabilities() {
    with_both(|cuda, cpu| {
        let mut random = Random(5);
        for (rows, cols) in [(1, 1), (2, 15), (3, 16), (9, 1000), (2, 49152)] {
            let x: Vec<f32> = random.normals(rows * cols).iter().map(|x| x * 6.0 - 40.0).collect();
            let targets: Vec<f32> = (0..rows).map(|_| random.below(cols) as f32).collect();
            let run = |rig: &Rig<'_>| {
                let (logits, ids) = (rig.buffer(DType::F32, &x), rig.buffer(DType::U32, &targets));
                let mut out = rig.poisoned(rows);
                let to = out.rows_mut(DType::F32, rows, 1);
                let logits = logits.rows(DType::F32, rows, cols);
                rig.b.log_probability(&rig.stream, logits, ids.rows(DType::U32, rows, 1), to).unwrap();
                rig.floats(out.rows(DType::F32, rows, 1))
            };
            assert_close(&format!("{rows}x{cols}"), &run(cuda), &run(cpu), 2e-6);
        }
    });
}
