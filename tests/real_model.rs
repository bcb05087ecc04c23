//! The real model on real text against transformers in f32: tokenization identical, mean NLL within 0.002, 8K context
//! included.

mod common;

use common::{data, device, load, real_model};
use kvahead::backend::DType;
use kvahead::engine::{Device, Session, SessionOptions, decode_batch};
use serde_json::Value;

struct Reference {
    text: String,
    tokens: Vec<u32>,
    nll: Vec<f64>,
}

fn reference(name: &str) -> Reference {
    let file = std::fs::read(data().join("reference").join(name)).unwrap();
    let json: Value = serde_json::from_slice(&file).unwrap();
    Reference {
        text: json["text"].as_str().unwrap().to_owned(),
        tokens: json["token_ids"].as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect(),
        nll: json["nll"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect(),
    }
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    values.sum::<f64>() / count
}

fn check(name: &str) {
    let model = load(&real_model(), None);
    let reference = reference(name);
    let tokens = model.tokenizer().unwrap().encode(&reference.text, false, false).unwrap();
    assert_eq!(tokens, reference.tokens, "{name}: tokenization");

    let mut session = Session::new(&model, &SessionOptions::default()).unwrap();
    let mut scores = vec![0.0; tokens.len()];
    session.score(&tokens, &mut scores).unwrap();
    let got = mean(scores[1..].iter().map(|&x| -f64::from(x)));
    let expected = mean(reference.nll.iter().copied());
    println!("{name}: mean NLL {got:.5}, transformers {expected:.5}");
    assert!((got - expected).abs() < 0.002, "{name}: mean NLL {got} for {expected}");
    // A mean can hide errors that cancel: most tokens must agree closely one by one.
    let mut apart: Vec<f64> = scores[1..].iter().zip(&reference.nll).map(|(&s, n)| (f64::from(s) + n).abs()).collect();
    apart.sort_by(f64::total_cmp);
    assert!(apart[apart.len() / 2] < 0.01, "{name}: median difference {}", apart[apart.len() / 2]);
}

#[test]
fn emma_2k() {
    check("emma-2k.json");
}

#[test]
fn northanger_2k() {
    check("northanger-2k.json");
}

#[test]
fn persuasion_8k() {
    check("persuasion-8k.json");
}

/// Decoding token by token, as a running sequence does, gives the same likelihoods.
#[test]
fn decode_agrees_with_transformers() {
    let model = load(&real_model(), None);
    let reference = reference("emma-2k.json");
    let mut session = Session::new(&model, &SessionOptions::default()).unwrap();
    session.prefill(&reference.tokens[..1024]).unwrap();
    let mut differences = Vec::new();
    for i in 1024..1280 {
        let logits = session.logits().unwrap();
        let top = f64::from(logits.iter().copied().fold(f32::MIN, f32::max));
        let sum: f64 = logits.iter().map(|&x| (f64::from(x) - top).exp()).sum();
        let nll = sum.ln() + top - f64::from(logits[reference.tokens[i] as usize]);
        differences.push((nll - reference.nll[i - 1]).abs());
        session.decode(reference.tokens[i]).unwrap();
    }
    let mean = mean(differences.into_iter());
    assert!(mean < 0.02, "mean difference of NLL per token {mean}");
}

/// Weights that stay in blocks give the bits that the same weights in bf16 give: a prompt's logits, decoding alone and in a
/// batch.
#[test]
fn blocks_change_no_bit() {
    let tokens = reference("emma-2k.json").tokens;
    let run = |dtype| {
        let model = load(&real_model(), dtype);
        let session = |from: usize| {
            let mut session = Session::new(&model, &SessionOptions::default()).unwrap();
            session.prefill(&tokens[from..from + 96]).unwrap();
            session
        };
        let mut logits = Vec::new();
        let mut add = |session: &Session| logits.extend(session.logits().unwrap().iter().map(|x| x.to_bits()));
        let mut sessions: Vec<Session> = [0, 100, 300].map(session).into();
        sessions.iter().for_each(&mut add);
        for token in &tokens[400..404] {
            sessions[0].decode(*token).unwrap();
            add(&sessions[0]);
        }
        decode_batch(&mut sessions.iter_mut().collect::<Vec<_>>(), &tokens[500..503]).unwrap();
        sessions.iter().for_each(&mut add);
        (logits, model.weight_bytes())
    };
    let (kept, blocks) = run(None);
    let (widened, bytes) = run(Some(DType::BF16));
    assert!(kept == widened, "logits differ");
    if device() == Device::Cpu {
        assert!(blocks * 5 < bytes * 2, "{blocks} bytes of weights, {bytes} in bf16");
    }
}
