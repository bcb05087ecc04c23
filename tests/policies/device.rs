//! `infinigen` with its tables on the device against the same with its tables on the host: the same bits, call by call.
//! Here both run on the CPU; on a GPU its operations are compared with those of the CPU (tests/cuda/slots.rs).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvahead::ErrorCode;
use kvahead::backend::DType;
use kvahead::engine::{Device, Model, ModelOptions, Session, SessionOptions, decode_batch};
use kvahead::kv::{KvTier, Payload};
use kvahead::policy::{self, Budget, InfinigenMode, InfinigenOptions, PolicyKind, PolicyOptions, Rule};

use crate::common::{Golden, data, load, relative_error};
use crate::failing::Failing;

fn options(cache: usize, rule: Rule) -> SessionOptions {
    let own = InfinigenOptions {
        cache: Budget::Tokens(cache),
        cache_least: 0,
        rule,
        sinks: 2,
        window: 4,
        ..InfinigenOptions::default()
    };
    let policy = PolicyOptions { kind: PolicyKind::Infinigen, infinigen: own, ..PolicyOptions::default() };
    SessionOptions { policy, kv_dtype: Some(DType::F32), ..SessionOptions::default() }
}

/// As the paper has it, where nothing else is attended than what is selected, guarded, or new.
fn paper(cache: usize, alpha: f32) -> SessionOptions {
    let mut options = options(cache, Rule::Paper { alpha, most: 0.1 });
    let own = &mut options.policy.infinigen;
    let InfinigenOptions { cache, cache_least, rule, .. } = *own;
    *own = InfinigenOptions { cache, cache_least, rule, ..InfinigenOptions::of(InfinigenMode::Paper) };
    options
}

/// The same options, with a cache of which only that is attended.
fn listing(mut options: SessionOptions) -> SessionOptions {
    options.policy.infinigen.attend_cache = false;
    options
}

fn on_device(model: &Model, options: &SessionOptions, left: &Arc<AtomicUsize>) -> Session {
    Session::with_policy(model, options, |setting| {
        let inner = policy::create_on_device(&options.policy, setting)?;
        Ok(Box::new(Failing { inner, left: left.clone() }))
    })
    .unwrap()
}

fn tokens(model: &Model, golden: &Golden, n: usize) -> Vec<u32> {
    let vocabulary = model.config().vocabulary as u32;
    golden.tokens.iter().copied().cycle().take(n).enumerate().map(|(i, t)| (t + i as u32 / 7) % vocabulary).collect()
}

/// Prompts, decoded tokens, truncations; each call made to fail at some places before it is made. `(from, to)`: tokens,
/// where `to < from` truncates.
#[test]
fn the_device_does_what_the_host_does() {
    for name in ["smollm2", "qwen3", "opt-pre-norm", "llama-mqa-tied"] {
        let folder = data().join("golden").join(name);
        let model = load(&folder, Some(DType::F32));
        let tokens = tokens(&model, &Golden::read(&folder, ""), 60);
        let calls = [(0, 20), (20, 21), (21, 22), (22, 23), (23, 29), (29, 30), (30, 31), (31, 25), (25, 26), (26, 27)]
            .into_iter()
            .chain((27..40).map(|i| (i, i + 1)))
            .chain([(40, 8), (8, 9), (9, 10), (10, 45), (45, 46)])
            .chain((46..58).map(|i| (i, i + 1)));
        for options in [
            options(14, Rule::Share(0.1)),
            options(16, Rule::Probability { below: 4.0, most: 0.2 }),
            options(11, Rule::Paper { alpha: 2.0, most: 0.1 }),
            options(60, Rule::Share(0.1)),
            paper(16, 2.0),
            listing(options(20, Rule::Probability { below: 4.0, most: 0.2 })),
        ] {
            let own = &options.policy.infinigen;
            let left = Arc::new(AtomicUsize::new(0));
            let mut device = on_device(&model, &options, &left);
            let mut host = Session::new(&model, &options).unwrap();
            for (number, (from, to)) in calls.clone().enumerate() {
                let case = format!("{name}, {own:?}, tokens {from}..{to}");
                let make = |session: &mut Session| match to {
                    to if to < from => session.truncate(to).map(|()| Vec::new()),
                    to if to == from + 1 => session.decode(tokens[from]).and_then(|()| Ok(session.logits()?.to_vec())),
                    to => session.prefill(&tokens[from..to]).and_then(|()| Ok(session.logits()?.to_vec())),
                };
                for fail in (1..).step_by(1 + number % 3) {
                    left.store(if to < from { 0 } else { fail }, Ordering::Relaxed);
                    let got = make(&mut device);
                    if to < from || left.swap(0, Ordering::Relaxed) > 0 {
                        assert!(got.unwrap() == make(&mut host).unwrap(), "{case}, after failures");
                        break;
                    }
                    assert_eq!(got.unwrap_err().code(), ErrorCode::Device, "{case}");
                }
                let (a, b) = (device.kv_counters().unwrap(), host.kv_counters().unwrap());
                assert_eq!(
                    (a.steps, a.selected, a.misses, a.hits, a.attended, a.candidates, a.held),
                    (b.steps, b.selected, b.misses, b.hits, b.attended, b.candidates, b.held),
                    "{case}"
                );
            }
            let counters = host.kv_counters().unwrap();
            assert!(
                own.cache == Budget::Tokens(60) || counters.misses > 0,
                "{name}, {own:?}: nothing was ever fetched"
            );
        }
    }
}

/// On a GPU, sessions are as near to the CPU's as rounding allows: what is predicted, quantized and ranked may seldom fall
/// to the other side of a threshold, but a tail with another weight or an entry that is not attended shows everywhere.
#[test]
fn a_gpu_does_what_the_cpu_does() {
    for name in ["smollm2", "qwen3"] {
        let folder = data().join("golden").join(name);
        let model = load(&folder, Some(DType::F32));
        if !model.backend().selects_on_device() {
            return; // nothing to compare with
        }
        let on_cpu = ModelOptions { device: Device::Cpu, dtype: Some(DType::F32), ..ModelOptions::default() };
        let on_cpu = Model::load(&folder, on_cpu).unwrap();
        let tokens = tokens(&model, &Golden::read(&folder, ""), 50);
        for options in [
            options(16, Rule::Probability { below: 4.0, most: 0.2 }),
            listing(options(20, Rule::Share(0.1))),
            paper(16, 2.0),
        ] {
            let own = &options.policy.infinigen;
            let logits = |model: &Model| {
                let mut session = Session::new(model, &options).unwrap();
                session.prefill(&tokens[..24]).unwrap();
                let mut step = |&token: &u32| {
                    session.decode(token).unwrap();
                    session.logits().unwrap().to_vec()
                };
                tokens[24..].iter().map(&mut step).collect::<Vec<_>>()
            };
            let (got, want) = (logits(&model), logits(&on_cpu));
            let errors: Vec<f32> = got.iter().zip(&want).map(|(got, want)| relative_error(got, want)).collect();
            let mean = errors.iter().sum::<f32>() / errors.len() as f32;
            println!("{name}, {own:?}: {mean} from the CPU's");
            assert!(mean < 0.01, "{name}, {own:?}: {errors:?}");
        }
    }
}

#[test]
fn batches_of_both_equal_each_alone() {
    let folder = data().join("golden").join("smollm2");
    let model = load(&folder, Some(DType::F32));
    let tokens = tokens(&model, &Golden::read(&folder, ""), 60);
    let left = Arc::default();
    let kinds = [options(14, Rule::Share(0.1)), listing(options(14, Rule::Share(0.1))), options(30, Rule::Share(0.2))];
    let make = |device: bool| -> Vec<Session> {
        let of = |options: &SessionOptions| match device {
            true => on_device(&model, options, &left),
            false => Session::new(&model, options).unwrap(),
        };
        kinds.iter().map(of).collect()
    };
    let mut batch: Vec<Session> = make(true).into_iter().chain(make(false)).collect();
    let mut alone: Vec<Session> = make(false).into_iter().chain(make(true)).collect();
    for (i, session) in batch.iter_mut().chain(&mut alone).enumerate() {
        session.prefill(&tokens[..20 + i % kinds.len()]).unwrap();
    }
    for (step, &token) in tokens[24..44].iter().enumerate() {
        decode_batch(&mut batch.iter_mut().collect::<Vec<_>>(), &[token; 6]).unwrap();
        for (i, (alone, together)) in alone.iter_mut().zip(&batch).enumerate() {
            alone.decode(token).unwrap();
            assert_eq!(alone.logits().unwrap(), together.logits().unwrap(), "step {step}, session {i}");
        }
    }
}

#[test]
fn what_the_device_cannot_do_is_refused() {
    let model = load(&data().join("golden").join("smollm2"), Some(DType::F32));
    let refused = |change: &dyn Fn(&mut PolicyOptions), says: &str| {
        let mut options = options(14, Rule::Share(0.1));
        change(&mut options.policy);
        let made = Session::with_policy(&model, &options, |setting| policy::create_on_device(&options.policy, setting));
        let error = made.map(|_| ()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unsupported);
        assert!(error.message().contains(says), "{error}");
    };
    refused(&|policy| policy.payload = Payload::Int8, "payload");
    refused(&|policy| policy.tier = KvTier::File(Default::default()), "file");
    refused(&|policy| policy.trace = Some("/tmp/never".into()), "trace");
}
