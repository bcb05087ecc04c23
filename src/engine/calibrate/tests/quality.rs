//! How well the products predict, on text they were not made from. Ignored by default: it needs the real model and half
//! a minute. `cargo test --release --lib quality -- --ignored --nocapture` prints the figures.

use std::path::Path;

use super::values;
use crate::backend::Rows;
use crate::engine::calibrate::capture::{Capture, capture_layers};
use crate::engine::calibrate::layout;
use crate::engine::{Model, ModelOptions};
use crate::model::decoder::Positions;
use crate::speculate::{Captured, Speculation, moments};

/// Layers whose recall is measured.
const LAYERS: [usize; 5] = [3, 9, 15, 21, 27];
const RATIO: f64 = 0.3;
/// Share of the tokens that is the exact top set.
const TOP: f64 = 0.05;
const QUERIES: usize = 24;

fn reference(name: &str) -> Vec<u32> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/reference").join(name);
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    json["token_ids"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

/// `x · weightᵀ + bias` of each row, in f32.
fn apply(weight: &[f32], bias: Option<&[f32]>, inputs: usize, x: &[f32]) -> Vec<f32> {
    use faer::MatRef;
    let (n, outputs) = (x.len() / inputs, weight.len() / inputs);
    let x = MatRef::from_row_major_slice(x, n, inputs);
    let y = x * MatRef::from_row_major_slice(weight, outputs, inputs).transpose();
    (0..n * outputs).map(|at| y[(at / outputs, at % outputs)] + bias.map_or(0.0, |bias| bias[at % outputs])).collect()
}

/// 1 − residual over variance, all columns together.
fn r2(got: &[f32], expected: &[f32], width: usize) -> f64 {
    let n = (expected.len() / width) as f64;
    let mut mean = vec![0.0; width];
    expected.chunks(width).for_each(|row| row.iter().zip(&mut mean).for_each(|(x, m)| *m += f64::from(*x) / n));
    let square = |x: f64| x * x;
    let residual: f64 = got.iter().zip(expected).map(|(a, b)| square(f64::from(a - b))).sum();
    let variance: f64 = expected.iter().enumerate().map(|(i, x)| square(f64::from(*x) - mean[i % width])).sum();
    1.0 - residual / variance
}

/// Queries of a layer as its predictors see them coming.
struct Predictions {
    own: Vec<f32>,
    renormalised: Vec<f32>,
    fitted: Vec<f32>,
}

fn floats(model: &Model, rows: Rows<'_>) -> Vec<f32> {
    if rows.dtype() == crate::backend::DType::F32 {
        return values(model, rows);
    }
    let mut bytes = vec![0; 2 * rows.rows() * rows.cols()];
    model.backend().download(&model.backend().stream().unwrap(), rows, &mut bytes).unwrap();
    bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
}

fn predict(model: &Model, speculation: &Speculation, layer: usize, previous: &[f32]) -> Predictions {
    let (blocks, hidden) = (&model.decoder().blocks, model.config().hidden);
    let own = floats(model, speculation.own(layer, &blocks[layer].attention).unwrap().rows());
    let fitted = floats(model, speculation.fitted(layer).rows());
    // Both norms divide by the same root mean square, so one is the other but for the weights.
    let norm = |layer: usize| values(model, blocks[layer].attention_norm.weight.row());
    let factors: Vec<f32> = norm(layer).iter().zip(norm(layer - 1)).map(|(new, old)| new / old).collect();
    let again: Vec<f32> = previous.iter().enumerate().map(|(i, x)| x * factors[i % hidden]).collect();
    Predictions {
        own: apply(&own, None, hidden, previous),
        renormalised: apply(&own, None, hidden, &again),
        fitted: apply(&fitted, None, hidden, previous),
    }
}

#[derive(Default)]
struct Sums {
    r2: [Vec<f64>; 3],
    /// By index and predictor, as they are printed.
    recall: [[Vec<f64>; 3]; 3],
}

fn measure(model: &Model, speculation: &Speculation, tokens: &[u32], recall: bool) -> Sums {
    let mut sums = Sums::default();
    let mut capture = Capture::new(model.backend(), layout(model), tokens.len(), tokens.len());
    let width = model.config().heads * model.config().head_dim;
    capture_layers(model, tokens, tokens.len(), &mut capture, &mut |_, layer, captured| {
        // Layers 0 and 1 are not speculated.
        let Some(captured) = captured.filter(|_| layer >= 2) else { return Ok(()) };
        let predictions = predict(model, speculation, layer, captured.previous);
        let all = [&predictions.own, &predictions.renormalised, &predictions.fitted];
        for (sum, got) in sums.r2.iter_mut().zip(all) {
            sum.push(r2(got, captured.projected, width));
        }
        if recall && LAYERS.contains(&layer) {
            let queries = [captured.queries, &predictions.own, &predictions.fitted];
            measure_recall(model, speculation, layer, &captured, queries, &mut sums.recall);
        }
        Ok(())
    })
    .unwrap();
    sums
}

/// How much of the exact top set of the last queries the first columns of each index find.
fn measure_recall(
    model: &Model,
    speculation: &Speculation,
    layer: usize,
    captured: &Captured<'_>,
    predicted: [&[f32]; 3],
    sums: &mut [[Vec<f64>; 3]; 3],
) {
    let (config, d) = (model.config(), model.config().head_dim);
    let Positions::Rotary(rotary) = &model.decoder().positions else { unreachable!("the real model rotates") };
    let n = captured.positions.len();
    let rotated = |rows: &[f32], width: usize, head: usize, row: usize| -> Vec<f64> {
        let from = row * width + head * d;
        let mut x: Vec<f64> = rows[from..from + d].iter().map(|&x| f64::from(x)).collect();
        moments::rotate(&rotary.short, captured.positions[row], &mut x);
        x
    };
    let columns = (RATIO * d as f64).round() as usize;
    let group = config.heads / config.kv_heads;
    let width = config.heads * d;
    for kv_head in 0..config.kv_heads {
        let keys: Vec<Vec<f64>> = (0..n).map(|row| rotated(captured.keys, config.kv_heads * d, kv_head, row)).collect();
        let identity: Vec<f32> = (0..d * d).map(|at| if at / d == at % d { 1.0 } else { 0.0 }).collect();
        let skew = values(model, speculation.skew(layer).map(kv_head));
        let balanced = speculation.layer(layer).balanced();
        let (query_map, key_map) =
            (values(model, balanced.query.map(kv_head)), values(model, balanced.key.map(kv_head)));
        let indices = [(&identity, &identity, true), (&skew, &skew, true), (&query_map, &key_map, false)];
        for (index, (query_map, key_map, choose)) in indices.into_iter().enumerate() {
            let project = |map: &[f32], x: &[f64]| -> Vec<f64> {
                map.chunks(d).map(|row| row.iter().zip(x).map(|(a, b)| f64::from(*a) * b).sum()).collect()
            };
            let partial: Vec<Vec<f64>> = keys.iter().map(|key| project(key_map, key)).collect();
            // The paper's choice: the columns with the largest sum of |q| and |k| over the prompt.
            let mut chosen: Vec<usize> = (0..d).collect();
            if choose {
                let mut weight = vec![0.0; d];
                let mut add = |x: &[f64]| x.iter().zip(&mut weight).for_each(|(x, w)| *w += x.abs());
                partial.iter().for_each(|key| add(key));
                for row in (0..n).step_by(8) {
                    for head in kv_head * group..(kv_head + 1) * group {
                        let query = project(query_map, &rotated(captured.queries, width, head, row));
                        add(&query.iter().map(|x| x * 8.0).collect::<Vec<_>>());
                    }
                }
                chosen.sort_by(|&a, &b| weight[b].total_cmp(&weight[a]));
            }
            chosen.truncate(columns);
            for (queries, sum) in predicted.iter().zip(&mut sums[index]) {
                for row in n - QUERIES..n {
                    for head in kv_head * group..(kv_head + 1) * group {
                        let exact = rotated(captured.queries, width, head, row);
                        let guess = project(query_map, &rotated(queries, width, head, row));
                        let scores = |of: &dyn Fn(usize) -> f64| top((0..row).map(of).collect());
                        let best = scores(&|t| keys[t].iter().zip(&exact).map(|(a, b)| a * b).sum());
                        let found = scores(&|t| chosen.iter().map(|&c| partial[t][c] * guess[c]).sum());
                        let hits = found.iter().filter(|t| best.binary_search(t).is_ok()).count();
                        sum.push(hits as f64 / best.len() as f64);
                    }
                }
            }
        }
    }
}

/// The indices of the largest scores, ascending.
fn top(scores: Vec<f64>) -> Vec<usize> {
    let count = (TOP * scores.len() as f64).round() as usize;
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.select_nth_unstable_by(count, |&a, &b| scores[b].total_cmp(&scores[a]));
    order.truncate(count);
    order.sort_unstable();
    order
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

#[test]
#[ignore = "needs the real model and half a minute"]
fn real_model() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".cache/SmolLM2-135M-Instruct.Q4_1.gguf");
    let text = std::env::var_os("KVAHEAD_CALIBRATION").map(|path| std::fs::read_to_string(path).unwrap());
    let options = ModelOptions {
        threads: 2,
        calibration_text: text,
        speculation_cache: Some("".into()),
        ..ModelOptions::default()
    };
    let model = Model::load(&path, options).unwrap();
    let start = std::time::Instant::now();
    let speculation = model.calibrate(&mut |_| true).unwrap();
    println!("calibrated in {:.2} s, {} bytes", start.elapsed().as_secs_f64(), speculation.bytes());

    let own_text = super::super::calibration_tokens(&model).unwrap();
    let short = |name| reference(name);
    let passages = [
        ("calibration text", own_text[..own_text.len().min(2048)].to_vec(), false),
        ("emma-2k", short("emma-2k.json"), true),
        ("northanger-2k", short("northanger-2k.json"), false),
        ("persuasion-8k", short("persuasion-8k.json"), true),
    ];
    for (name, tokens, recall) in passages {
        let sums = measure(&model, &speculation, &tokens, recall);
        let [own, renormalised, fitted] = sums.r2.each_ref().map(|values| mean(values));
        println!("{name}: R² own {own:.4}, renormalised {renormalised:.4}, fitted {fitted:.4}");
        assert!(fitted > own && fitted > renormalised, "{name}: the fit must pay");
        if recall {
            println!("  recall of the top {:.0}% at ratio {RATIO}: exact query, own, fitted predictor", 100.0 * TOP);
            for (index, sums) in ["plain", "skewed", "balanced"].iter().zip(&sums.recall) {
                let [exact, own, fitted] = sums.each_ref().map(|values| mean(values));
                println!("  {index:8} {exact:.3} {own:.3} {fitted:.3}");
                assert!(exact > 0.3 && fitted > 0.3, "{name}, {index}: no better than chance would not be 0.05");
            }
        }
    }
}
