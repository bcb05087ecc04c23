//! What is estimated beside what is held when all of it has run.

use kvahead::backend::DType;
use kvahead::engine::{Device, Estimate, Model, ModelOptions, Session, SessionOptions, decode_batch};
use kvahead::kv::KvTier;
use kvahead::policy::{Budget, InfinigenOptions, PolicyKind, PolicyOptions, Rule, TierBytes};

use crate::common::{data, device, load};

const CAPACITY: usize = 420;
const PROMPT: usize = 400;

fn policies() -> Vec<PolicyOptions> {
    let of = |kind| PolicyOptions { kind, ..PolicyOptions::default() };
    let infinigen = |cache, tier| PolicyOptions {
        infinigen: InfinigenOptions {
            cache: Budget::Tokens(cache),
            cache_least: 0,
            rule: Rule::Share(0.05),
            ..InfinigenOptions::default()
        },
        tier,
        ..of(PolicyKind::Infinigen)
    };
    vec![
        of(PolicyKind::Full),
        PolicyOptions { tier: KvTier::Host, ..of(PolicyKind::Full) },
        PolicyOptions { budget: Budget::Tokens(90), ..of(PolicyKind::Window) },
        infinigen(120, KvTier::Host),
        infinigen(120, KvTier::Device),
        infinigen(1000, KvTier::Host),
    ]
}

/// Within 5%, as the header promises.
#[track_caller]
fn assert_near(case: &str, what: &str, estimated: usize, held: usize) {
    let apart = estimated.abs_diff(held) as f64;
    assert!(apart <= 0.05 * held as f64, "{case}: {estimated} bytes of {what} were estimated, {held} are held");
}

/// Runs as many `sessions` as there is an estimate for, from a prompt of `prompt` tokens to `options.capacity`.
fn check(case: &str, model: &Model, options: &SessionOptions, sessions: usize, prompt: usize) {
    // Which libraries there are is known from the first prompt on.
    Session::new(model, &SessionOptions::default()).unwrap().prefill(&[1, 2]).unwrap();
    // What calibration needs is needed once, and held from then on.
    drop(Session::new(model, options).unwrap());
    let before = model.scratch().unwrap();
    let estimate = Estimate::new(model, options, sessions).unwrap();
    assert_eq!(before, model.scratch().unwrap(), "{case}: an estimate allocates nothing");

    let vocabulary = model.config().vocabulary as u32;
    let tokens: Vec<u32> = (0..prompt as u32).map(|i| (7 * i + i / 5) % vocabulary).collect();
    let mut all: Vec<Session> = (0..sessions).map(|_| Session::new(model, options).unwrap()).collect();
    all.iter_mut().for_each(|session| session.prefill(&tokens).unwrap());
    for token in 0..(options.capacity - prompt) as u32 {
        decode_batch(&mut all.iter_mut().collect::<Vec<_>>(), &vec![token % vocabulary; sessions]).unwrap();
    }
    let held = model.scratch().unwrap();
    assert_near(case, "scratch memory", estimate.scratch.device, held.device);
    assert_near(case, "pinned scratch memory", estimate.scratch.pinned, held.pinned);
    let kv = all.iter().map(Session::kv_bytes).fold(TierBytes::default(), |a, b| TierBytes {
        device: a.device + b.device,
        pinned: a.pinned + b.pinned,
        file: a.file + b.file,
    });
    assert_near(case, "KV on the device", estimate.kv.device, kv.device);
    assert_near(case, "KV in host memory", estimate.kv.pinned, kv.pinned);
}

#[test]
fn what_is_estimated_is_held_in_the_end() {
    for name in ["smollm2", "llama-mha"] {
        for policy in policies() {
            for (sessions, prefill_chunk) in [(1, 0), (5, 64)] {
                let case = format!("{name}, {sessions} sessions, {policy:?}");
                // A model of its own, for it keeps what others have needed.
                let model = load(&data().join("golden").join(name), Some(DType::BF16));
                let capacity = CAPACITY.min(model.config().context_length);
                let options =
                    SessionOptions { policy: policy.clone(), capacity, prefill_chunk, ..SessionOptions::default() };
                check(&case, &model, &options, sessions, PROMPT.min(capacity - 20));
            }
        }
    }
}

#[test]
fn what_is_estimated_of_a_real_shape_is_held_in_the_end() {
    // As large as the device that computes is made for.
    let (shape, prompt, sessions) = match device() {
        Device::Cuda => ("llama-3-8b", 32_000, 2),
        _ => ("smollm2-135m", 600, 2),
    };
    let of = |kind, tier| PolicyOptions { kind, tier, ..PolicyOptions::default() };
    for policy in [
        of(PolicyKind::Full, KvTier::Device),
        of(PolicyKind::Full, KvTier::Host),
        of(PolicyKind::Infinigen, KvTier::Host),
        of(PolicyKind::Int4, KvTier::Host),
    ] {
        let case = format!("{shape}, {policy:?}");
        let options =
            ModelOptions { device: device(), dtype: Some(DType::BF16), threads: 2, ..ModelOptions::default() };
        let model = Model::random(shape, 1, options).unwrap();
        let options = SessionOptions { policy, capacity: prompt + 10, ..SessionOptions::default() };
        check(&case, &model, &options, sessions, prompt);
    }
}
