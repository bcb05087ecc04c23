//! How far queries move from one token to the next, on the real model: what a selection that is used again for the next
//! token (ALGORITHM.md §7.12) would rest on. Ignored by default: it needs the real model.
//! `cargo test --release --test policies queries_move -- --ignored --nocapture` prints the figures.

use std::sync::{Arc, Mutex};

use kvahead::backend::{AttentionShape, DType, Rows};
use kvahead::engine::{Session, SessionOptions};
use kvahead::policy::{self, PolicyOptions, Step};

use crate::around::{Around, Watch};
use crate::common::{data, load, real_model};

/// Attends everything, and notes for each KV head the cosine of the queries of neighbouring tokens, the least of its group.
struct Watching {
    from: usize,
    cosines: Arc<Mutex<Vec<f64>>>,
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

impl Watch for Watching {
    fn observe(&mut self, step: &Step<'_>, shape: &AttentionShape, queries: Rows<'_>) {
        if step.position < self.from || step.layer < 2 {
            return;
        }
        assert_eq!(queries.dtype(), DType::F32);
        let mut bytes = vec![0; queries.rows() * queries.cols() * 4];
        step.backend.download(step.stream, queries, &mut bytes).unwrap();
        let values: Vec<f32> = bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect();
        let rows: Vec<&[f32]> = values.chunks_exact(queries.cols()).collect();
        let mut cosines = self.cosines.lock().unwrap();
        for pair in rows.windows(2) {
            let heads = pair[0].chunks_exact(shape.head_dim).zip(pair[1].chunks_exact(shape.head_dim));
            let each: Vec<f64> = heads.map(|(a, b)| cosine(a, b)).collect();
            let group = shape.heads / shape.kv_heads;
            cosines.extend(each.chunks_exact(group).map(|group| group.iter().copied().fold(1.0, f64::min)));
        }
    }
}

#[test]
#[ignore = "a measurement, on the real model"]
fn queries_move_from_token_to_token() {
    let model = load(&real_model(), None);
    for (name, from) in [("emma-2k.json", 1024), ("persuasion-8k.json", 7168)] {
        let json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(data().join("reference").join(name)).unwrap()).unwrap();
        let tokens: Vec<u32> =
            json["token_ids"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect();
        let cosines = Arc::new(Mutex::new(Vec::new()));
        let options = SessionOptions::default();
        let mut session = Session::with_policy(&model, &options, |setting| {
            let inner = policy::create(&PolicyOptions::default(), setting)?;
            Ok(Around::boxed(inner, Watching { from, cosines: cosines.clone() }))
        })
        .unwrap();
        session.prefill(&tokens[..tokens.len().min(8191)]).unwrap();
        let mut cosines = std::mem::take(&mut *cosines.lock().unwrap());
        cosines.sort_by(f64::total_cmp);
        let above = |limit: f64| 100.0 * cosines.iter().filter(|&&c| c > limit).count() as f64 / cosines.len() as f64;
        println!(
            "{name}, from {from}: {} pairs, median {:.3}; above 0.8 {:.2}%, 0.9 {:.2}%, 0.95 {:.2}%, 0.98 {:.2}%",
            cosines.len(),
            cosines[cosines.len() / 2],
            above(0.8),
            above(0.9),
            above(0.95),
            above(0.98)
        );
    }
}
