//! Bases that a prompt has a say in: where they must give the same, and where they must not.

use kvahead::backend::DType;
use kvahead::engine::{Model, ModelOptions, Session, SessionOptions, decode_batch};
use kvahead::kv::KvTier;
use kvahead::policy::{Budget, IndexBasis, InfinigenOptions, PolicyKind, PolicyOptions, Rule};

use crate::common::{data, device};

const PROMPT: usize = 64;
const STEPS: usize = 26;

fn options(basis: IndexBasis, ratio: f32) -> SessionOptions {
    let infinigen = InfinigenOptions {
        basis,
        ratio,
        index_bits: 32,
        rule: Rule::Share(0.1),
        sinks: 2,
        window: 4,
        cache: Budget::Tokens(24),
        cache_least: 0,
        ..InfinigenOptions::default()
    };
    let policy =
        PolicyOptions { kind: PolicyKind::Infinigen, tier: KvTier::Host, infinigen, ..PolicyOptions::default() };
    SessionOptions { policy, kv_dtype: Some(DType::F32), ..SessionOptions::default() }
}

fn text(from: usize, count: usize) -> Vec<u32> {
    (from as u32..(from + count) as u32).map(|i| (i * i * 5 + 11 * i) % 61).collect()
}

/// Logits of steps after a prompt that is computed in chunks of `chunk` tokens.
fn logits(model: &Model, options: &SessionOptions, chunk: usize) -> Vec<f32> {
    let options = SessionOptions { prefill_chunk: chunk, ..options.clone() };
    let mut session = Session::new(model, &options).unwrap();
    session.prefill(&text(0, PROMPT)).unwrap();
    let mut all = Vec::new();
    for token in text(PROMPT, STEPS) {
        decode_batch(&mut [&mut session], &[token]).unwrap();
        all.extend_from_slice(session.logits().unwrap());
    }
    all
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn all_columns_of_any_orthogonal_basis_give_the_same() {
    let options_of = ModelOptions { device: device(), dtype: Some(DType::F32), ..ModelOptions::default() };
    let model = Model::load(&data().join("golden/smollm2"), options_of).unwrap();
    let of = |basis, ratio, chunk| logits(&model, &options(basis, ratio), chunk);
    let whole = of(IndexBasis::Plain, 1.0, PROMPT);
    for basis in [IndexBasis::Skewed, IndexBasis::Prompt] {
        let other = of(basis, 1.0, PROMPT);
        assert!(apart(&whole, &other) < 1e-3, "{basis:?}: {}", apart(&whole, &other));
    }
    // Of fewer columns each basis makes something else, however the prompt is cut. (The last 32 queries fill the cache.)
    let some = |basis| of(basis, 0.25, PROMPT);
    let (plain, skewed, prompt) = (some(IndexBasis::Plain), some(IndexBasis::Skewed), some(IndexBasis::Prompt));
    let cut = of(IndexBasis::Prompt, 0.25, 32);
    assert!(apart(&prompt, &cut) < 1e-3, "in chunks: {}", apart(&prompt, &cut));
    for (a, b) in [(&plain, &prompt), (&skewed, &prompt), (&whole, &prompt)] {
        assert!(apart(a, b) > 1e-3, "the basis makes no difference");
    }
}
