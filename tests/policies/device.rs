//! `infinigen` with its tables on the device against the same with its tables on the host: the same bits, call by call.
//! Here both run on the CPU; on a GPU its operations are compared with those of the CPU (tests/cuda/slots.rs).

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvahead::ErrorCode;
use kvahead::backend::DType;
use kvahead::engine::{Device, Model, ModelOptions, Session, SessionOptions, decode_batch};
use kvahead::kv::{Eviction, KvTier, Payload};
use kvahead::policy::{self, Budget, InfinigenMode, InfinigenOptions, PolicyKind, PolicyOptions, Rule, TraceReader};

use crate::common::brief::{brief, some};
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

/// As [`on_device`], with the host's own or what this backend has.
fn failing(model: &Model, options: &SessionOptions, left: &Arc<AtomicUsize>) -> Session {
    Session::with_policy(model, options, |setting| {
        let inner = policy::create(&options.policy, setting)?;
        Ok(Failing::around(inner, left))
    })
    .unwrap()
}

/// As the paper has it, where nothing else is attended than what is selected, guarded, or new.
fn paper(cache: usize, alpha: f32) -> SessionOptions {
    let mut options = options(cache, Rule::Paper { alpha, most: 0.1 });
    let own = &mut options.policy.infinigen;
    let InfinigenOptions { cache, cache_least, rule, .. } = *own;
    *own = InfinigenOptions { cache, cache_least, rule, ..InfinigenOptions::of(InfinigenMode::Paper) };
    options
}

/// The same options, with corrections by up to a share of the tokens.
fn correcting(mut options: SessionOptions, share: f32) -> SessionOptions {
    options.policy.infinigen.correct = share;
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
        Ok(Failing::around(inner, left))
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
        let stored = |payload: Payload, mut options: SessionOptions| {
            options.policy.payload = payload;
            options
        };
        for options in some([
            options(14, Rule::Share(0.1)),
            stored(Payload::Int8, options(16, Rule::Probability { below: 4.0, most: 0.2 })),
            options(11, Rule::Paper { alpha: 2.0, most: 0.1 }),
            stored(Payload::Int4, options(13, Rule::Share(0.2))),
            stored(Payload::Int8, options(60, Rule::Share(0.1))),
            paper(16, 2.0),
            stored(Payload::Int4, paper(16, 2.0)),
            listing(options(20, Rule::Probability { below: 4.0, most: 0.2 })),
            stored(Payload::Int8, listing(options(16, Rule::Share(0.1)))),
            correcting(options(14, Rule::Share(0.1)), 0.1),
            correcting(options(16, Rule::Probability { below: 4.0, most: 0.2 }), 0.05),
            stored(Payload::Int8, correcting(options(18, Rule::Share(0.1)), 0.5)),
            stored(Payload::Int4, correcting(listing(options(20, Rule::Probability { below: 4.0, most: 0.2 })), 0.1)),
            correcting(listing(options(20, Rule::Share(0.1))), 0.1),
            correcting(paper(16, 2.0), 0.1),
        ]) {
            let (own, payload) = (&options.policy.infinigen, options.policy.payload);
            let left = Arc::new(AtomicUsize::new(0));
            let mut device = on_device(&model, &options, &left);
            let mut host = Session::new(&model, &options).unwrap();
            for (number, (from, to)) in calls.clone().enumerate() {
                let case = format!("{name}, {own:?}, {payload:?}, tokens {from}..{to}");
                let make = |session: &mut Session| match to {
                    to if to < from => session.truncate(to).map(|()| Vec::new()),
                    to if to == from + 1 => session.decode(tokens[from]).and_then(|()| Ok(session.logits()?.to_vec())),
                    to => session.prefill(&tokens[from..to]).and_then(|()| Ok(session.logits()?.to_vec())),
                };
                for fail in (1..).step_by((1 + number % 3) * if brief() { 17 } else { 1 }) {
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
                    (a.steps, a.selected, a.misses, a.hits, a.corrected, a.attended, a.candidates, a.held),
                    (b.steps, b.selected, b.misses, b.hits, b.corrected, b.attended, b.candidates, b.held),
                    "{case}"
                );
            }
            let counters = host.kv_counters().unwrap();
            assert_eq!(counters.corrected > 0, own.correct > 0.0, "{name}, {own:?}");
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
            correcting(options(16, Rule::Probability { below: 4.0, most: 0.2 }), 0.1),
            correcting(listing(options(20, Rule::Share(0.1))), 0.1),
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
    let mut kinds = [
        options(14, Rule::Share(0.1)),
        listing(options(14, Rule::Share(0.1))),
        options(30, Rule::Share(0.2)),
        correcting(options(14, Rule::Share(0.1)), 0.1),
    ];
    kinds[1].policy.payload = Payload::Int8;
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
        decode_batch(&mut batch.iter_mut().collect::<Vec<_>>(), &[token; 8]).unwrap();
        for (i, (alone, together)) in alone.iter_mut().zip(&batch).enumerate() {
            alone.decode(token).unwrap();
            assert_eq!(alone.logits().unwrap(), together.logits().unwrap(), "step {step}, session {i}");
        }
    }
}

/// Prompts, decoded tokens, calls of several tokens that are decoded one by one, truncations; other calls in their place are
/// made to fail before.
#[test]
fn the_device_evicts_what_the_host_does() {
    let folder = data().join("golden").join("smollm2");
    let model = load(&folder, Some(DType::F32));
    let tokens = tokens(&model, &Golden::read(&folder, ""), 400);
    let singly = |from: usize, to: usize| (from..to).map(|i| (i, i + 1)).collect::<Vec<_>>();
    let short = [vec![(0, 9)], singly(9, 40), vec![(40, 46)], singly(46, 60), vec![(60, 2)], singly(2, 30)].concat();
    let long = [vec![(0, 37)], singly(37, 50), vec![(50, 62)], singly(62, 66), vec![(66, 0), (0, 30)], singly(30, 36)];
    let back = [vec![(0, 12)], singly(12, 21), vec![(21, 8)], singly(8, 45), vec![(45, 44)], singly(45, 50)].concat();
    // Until counters saturate.
    let on = [vec![(0, 8)], singly(8, 400)].concat();
    for (number, (kind, pool, options, payload, calls)) in some([
        (Eviction::Fifo, 20, options(12, Rule::Share(0.2)), Payload::Exact, &short),
        (Eviction::Lru, 20, options(13, Rule::Share(0.2)), Payload::Int8, &short),
        (Eviction::Counter, 22, options(14, Rule::Probability { below: 4.0, most: 0.3 }), Payload::Exact, &short),
        (Eviction::Lru, 18, options(60, Rule::Share(0.2)), Payload::Exact, &short),
        (Eviction::Counter, 8, options(8, Rule::Share(0.2)), Payload::Int4, &long.concat()),
        (Eviction::Fifo, 24, options(24, Rule::Paper { alpha: 2.0, most: 0.2 }), Payload::Int8, &long.concat()),
        (Eviction::Counter, 20, options(11, Rule::Share(0.3)), Payload::Int8, &long.concat()),
        (Eviction::Lru, 22, options(12, Rule::Share(0.2)), Payload::Exact, &back),
        (Eviction::Counter, 22, options(12, Rule::Share(0.2)), Payload::Int8, &back),
        (Eviction::Counter, 13, options(60, Rule::Share(0.3)), Payload::Exact, &on),
        // Where all that is held is in the cache, it is attended whole.
        (Eviction::Lru, 20, listing(options(13, Rule::Share(0.2))), Payload::Exact, &short),
        (
            Eviction::Counter,
            22,
            listing(options(14, Rule::Probability { below: 4.0, most: 0.3 })),
            Payload::Int8,
            &back,
        ),
        (Eviction::Fifo, 24, listing(options(12, Rule::Share(0.2))), Payload::Int4, &long.concat()),
        (Eviction::Lru, 18, listing(options(60, Rule::Paper { alpha: 2.0, most: 0.2 })), Payload::Exact, &short),
        (Eviction::Lru, 18, listing(options(60, Rule::Share(0.2))), Payload::Exact, &short),
        (Eviction::Counter, 20, paper(12, 2.0), Payload::Exact, &short),
        (Eviction::Lru, 22, correcting(options(14, Rule::Share(0.1)), 0.1), Payload::Int8, &short),
        (
            Eviction::Counter,
            22,
            correcting(listing(options(14, Rule::Share(0.1))), 0.1),
            Payload::Exact,
            &long.concat(),
        ),
    ])
    .enumerate()
    {
        let (files, own) = (tempfile::tempdir().unwrap(), &options.policy.infinigen);
        let traced = |name: &str| {
            let mut options = options.clone();
            let policy = &mut options.policy;
            (policy.eviction, policy.pool_tokens, policy.payload) = (kind, pool, payload);
            policy.trace = Some(files.path().join(name));
            options.prefill_chunk = 11;
            options
        };
        let left = Arc::new(AtomicUsize::new(0));
        let mut device = on_device(&model, &traced("device"), &left);
        let mut host = failing(&model, &traced("host"), &left);
        let mut evicted = 0;
        for (call, &(from, to)) in calls.iter().enumerate() {
            let case = format!("{kind:?}, {pool} rows, {own:?}, {payload:?}, tokens {from}..{to}");
            let make = |session: &mut Session, fail: usize| {
                let text: Vec<u32> = (from..to).map(|i| tokens[(i + 7 * fail) % tokens.len()]).collect();
                match text.len() {
                    0 => session.truncate(to).map(|()| Vec::new()),
                    1 => session.decode(text[0]).and_then(|()| Ok(session.logits()?.to_vec())),
                    _ => session.prefill(&text).and_then(|()| Ok(session.logits()?.to_vec())),
                }
            };
            let first = 1 + (7 * call + number) % 5;
            for fail in [first, 6 * first + 1, 40 * first, 113 * first, 0] {
                let fail = if to < from || from > 90 { 0 } else { fail };
                let both = [&mut device, &mut host].map(|session| {
                    left.store(fail, Ordering::Relaxed);
                    let made = make(session, fail);
                    let failed = fail > 0 && left.swap(0, Ordering::Relaxed) == 0;
                    // A truncation that is refused is a result as well.
                    let made = made.map_err(|error| error.to_string());
                    assert!(made.is_err() || !failed, "{case}");
                    (failed, made, session.tokens().len())
                });
                let errors = both.each_ref().map(|(_, made, _)| made.as_ref().err());
                assert!(both[0] == both[1], "{case}, made to fail at {fail}: {errors:?}");
                if !both[0].0 {
                    break;
                }
            }
            let (a, b) = (device.kv_counters().unwrap(), host.kv_counters().unwrap());
            assert_eq!(
                (a.steps, a.selected, a.misses, a.hits, a.corrected, a.attended, a.candidates, a.held, a.evicted),
                (b.steps, b.selected, b.misses, b.hits, b.corrected, b.attended, b.candidates, b.held, b.evicted),
                "{case}"
            );
            evicted = b.evicted;
        }
        assert!(evicted > 0, "nothing was evicted");
        drop((device, host));
        let of = |name: &str| std::fs::read(files.path().join(name)).unwrap();
        assert!(of("device") == of("host"), "{kind:?}, {pool} rows, {own:?}: traces differ");
    }
}

/// The same file, record by record, with what was undone in it; and a trace changes nothing.
#[test]
fn traces_of_both_are_the_same() {
    let folder = data().join("golden").join("qwen3");
    let model = load(&folder, Some(DType::F32));
    let tokens = tokens(&model, &Golden::read(&folder, ""), 60);
    let files = tempfile::tempdir().unwrap();
    for (cache, rule, correct) in [
        (14, Rule::Share(0.1), 0.0),
        (16, Rule::Probability { below: 4.0, most: 0.2 }, 0.0),
        (16, Rule::Share(0.1), 0.05),
    ] {
        let left = Arc::new(AtomicUsize::new(0));
        let plain = correcting(options(cache, rule), correct);
        let traced = |name: &str| {
            let mut options = plain.clone();
            options.policy.trace = Some(files.path().join(name));
            options
        };
        let mut untraced = on_device(&model, &plain, &left);
        let mut device = on_device(&model, &traced("device"), &left);
        let mut host = failing(&model, &traced("host"), &left);
        for session in [&mut untraced, &mut device, &mut host] {
            session.prefill(&tokens[..20]).unwrap();
        }
        for (i, &token) in tokens[20..].iter().enumerate() {
            for fail in [2 + 5 * i % 31, 0] {
                for session in [&mut device, &mut host] {
                    left.store(fail, Ordering::Relaxed);
                    let failed = session.decode(token).is_err();
                    assert_eq!(failed, fail > 0 && left.swap(0, Ordering::Relaxed) == 0);
                    if !failed && fail > 0 {
                        session.truncate(20 + i).unwrap();
                    }
                }
            }
            untraced.decode(token).unwrap();
        }
        let counters = untraced.kv_counters().unwrap();
        drop((device, host));
        let of = |name: &str| std::fs::read(files.path().join(name)).unwrap();
        assert!(of("device") == of("host"), "{cache} slots, {rule:?}");
        let records = TraceReader::open(&files.path().join("device")).unwrap().map(Result::unwrap);
        let missed = records.map(|record| record.missed.len() as u64).sum::<u64>();
        assert!(missed > counters.misses && counters.misses > 0, "{missed} of {}", counters.misses);
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
    refused(&|policy| policy.tier = KvTier::File(Default::default()), "file");
}
