//! Every architecture against Hugging Face transformers: prefill and step-by-step decode in f32 to 1e-4, greedy tokens
//! exactly. `tests/data/README.md` says how the data was made and why 1e-4 can be asked for.

mod common;

use std::path::{Path, PathBuf};

use common::{Golden, argmax, data, exact_session, load, relative_error};
use kvahead::backend::DType;
use kvahead::engine::sampling::SamplingOptions;
use kvahead::engine::{Model, Session, SessionOptions, decode_batch};

const TOLERANCE: f32 = 1e-4;

/// Checks one run of golden data on a loaded model.
fn check(model: &Model, golden: &Golden, what: &str) {
    let n = golden.tokens.len();
    let near = |got: &[f32], row: usize, how: &str| {
        let error = relative_error(got, &golden.logits[row]);
        assert!(error < TOLERANCE, "{what}: {how}, row {row}: relative error {error}");
    };

    let mut session = exact_session(model);
    session.prefill(&golden.tokens).unwrap();
    near(session.logits().unwrap(), n - 1, "prefill at once");

    // The greedy continuation, one decode step a token.
    for (step, &expected) in golden.greedy.iter().enumerate() {
        let token = session.sample(&SamplingOptions::default()).unwrap();
        assert_eq!(token, expected, "{what}: greedy token {step}");
        session.decode(token).unwrap();
    }

    // Prefill in chunks that divide nothing.
    let chunked = SessionOptions { kv_dtype: Some(DType::F32), prefill_chunk: 7, ..SessionOptions::default() };
    let mut session = Session::new(model, &chunked).unwrap();
    session.prefill(&golden.tokens).unwrap();
    near(session.logits().unwrap(), n - 1, "prefill in chunks of 7");

    // Every row's log probability of the next token.
    let mut session = exact_session(model);
    let mut scores = vec![0.0; n];
    session.score(&golden.tokens, &mut scores).unwrap();
    assert!(scores[0].is_nan(), "{what}: nothing precedes the first token");
    for i in 1..n {
        let row = &golden.logits[i - 1];
        let top = f64::from(row[argmax(row) as usize]);
        let sum: f64 = row.iter().map(|&x| (f64::from(x) - top).exp()).sum();
        let expected = f64::from(row[golden.tokens[i] as usize]) - top - sum.ln();
        assert!((f64::from(scores[i]) - expected).abs() < 2e-3, "{what}: score {i}: {} for {expected}", scores[i]);
    }
}

/// Checks step-by-step decode from the first token on, and the same in a batch beside another sequence.
fn check_decode(model: &Model, golden: &Golden, what: &str) {
    let mut alone = exact_session(model);
    let mut batched = exact_session(model);
    let mut beside = exact_session(model);
    beside.prefill(&golden.greedy).unwrap();
    for (row, &token) in golden.tokens.iter().enumerate() {
        alone.decode(token).unwrap();
        let error = relative_error(alone.logits().unwrap(), &golden.logits[row]);
        assert!(error < TOLERANCE, "{what}: decode, row {row}: relative error {error}");
        decode_batch(&mut [&mut beside, &mut batched], &[golden.tokens[0], token]).unwrap();
        assert_eq!(alone.logits().unwrap(), batched.logits().unwrap(), "{what}: row {row} differs in a batch");
    }
}

fn folder(name: &str) -> PathBuf {
    data().join("golden").join(name)
}

/// The folder with its other configuration dialect: transformers 4's keys.
fn classic(name: &str) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder(name)).unwrap() {
        let entry = entry.unwrap();
        if entry.file_name() != "config.json" {
            let to = if entry.file_name() == "config.classic.json" { "config.json".into() } else { entry.file_name() };
            std::fs::copy(entry.path(), copy.path().join(to)).unwrap();
        }
    }
    copy
}

fn check_folder(path: &Path, name: &str, prefix: &str, long_only: bool) {
    let model = load(path, Some(DType::F32));
    let golden = Golden::read(&folder(name), prefix);
    check(&model, &golden, name);
    if !long_only {
        check_decode(&model, &golden, name);
    }
}

macro_rules! golden {
    ($($test:ident: $name:literal;)*) => {$(
        #[test]
        fn $test() {
            check_folder(&folder($name), $name, "", false);
            let classic = classic($name);
            check_folder(classic.path(), $name, "", false);
        }
    )*};
}

golden! {
    llama_mha: "llama-mha";
    llama3_rope: "llama3-rope";
    llama_linear_rope: "llama-linear-rope";
    llama_yarn_rope: "llama-yarn-rope";
    llama_mqa_tied: "llama-mqa-tied";
    smollm2: "smollm2";
    mistral_window: "mistral-window";
    mistral_head_dim: "mistral-head-dim";
    qwen2: "qwen2";
    qwen3: "qwen3";
    phi3: "phi3";
    opt_pre_norm: "opt-pre-norm";
    opt_post_norm: "opt-post-norm";
    sharded: "sharded";
}

/// LongRoPE picks its frequencies by the length of the whole sequence, so decoding up to a long one token by token is
/// another computation than prefilling it; the short run can do both.
#[test]
fn phi3_longrope() {
    check_folder(&folder("phi3-longrope"), "phi3-longrope", "", true);
    check_folder(&folder("phi3-longrope"), "phi3-longrope", "short.", false);
}

/// GGUF files hold the same weights as the folders of the same names, in llama.cpp's conventions.
#[test]
fn gguf_files_compute_the_same() {
    for (file, name) in [
        ("smollm2.gguf", "smollm2"),
        ("llama3-rope.gguf", "llama3-rope"),
        ("qwen2.gguf", "qwen2"),
        ("qwen2.v2.gguf", "qwen2"),
    ] {
        check_folder(&data().join("gguf").join(file), name, "", false);
    }
}

/// Weights kept as stored and a cache in their type: the default, which rounds more.
#[test]
fn default_types_stay_near() {
    for entry in std::fs::read_dir(data().join("golden")).unwrap() {
        let path = entry.unwrap().path();
        let golden = Golden::read(&path, "");
        let mut session = Session::new(&load(&path, None), &SessionOptions::default()).unwrap();
        session.prefill(&golden.tokens).unwrap();
        let error = relative_error(session.logits().unwrap(), golden.logits.last().unwrap());
        assert!(error < 2e-2, "{}: relative error {error}", path.display());
    }
}
