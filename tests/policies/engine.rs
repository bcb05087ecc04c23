//! Policies through the engine, on the golden checkpoints with keys and values in f32.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use kvahead::backend::{Backend, DType};
use kvahead::engine::{Estimate, Model, Session, SessionOptions, decode_batch};
use kvahead::kv::{Eviction, FileOptions, KvTier, Payload};
use kvahead::policy::{self, Budget, InfinigenMode, InfinigenOptions, PolicyKind, PolicyOptions, Predictor, Rule};
use kvahead::{Error, ErrorCode};

use crate::common::{Golden, data, load, relative_error};
use crate::failing::Failing;

fn model(name: &str) -> (Model, Golden) {
    let folder = data().join("golden").join(name);
    (load(&folder, Some(DType::F32)), Golden::read(&folder, ""))
}

fn of(kind: PolicyKind) -> PolicyOptions {
    PolicyOptions { kind, ..PolicyOptions::default() }
}

fn file(buffered: bool) -> KvTier {
    KvTier::File(FileOptions { buffered, checksum: true, ..FileOptions::default() })
}

fn budget(kind: PolicyKind, budget: Budget) -> PolicyOptions {
    PolicyOptions { budget, resident_layers: 1, ..of(kind) } // of two or three
}

/// Whether the model's device has what the policy needs.
fn there(model: &Model, policy: &PolicyOptions) -> bool {
    let backend: &dyn Backend = model.backend();
    let in_file = matches!(policy.tier, KvTier::File(_));
    let evicts = policy.eviction != Eviction::Off;
    (backend.has_files() || !in_file) && (backend.has_eviction() || !evicts)
}

/// Whether entries may lie there.
fn on(model: &Model, tier: &KvTier) -> bool {
    there(model, &PolicyOptions { tier: tier.clone(), ..of(PolicyKind::Full) })
}

/// One of each way that a policy can be on the model's device.
fn every(model: &Model) -> Vec<PolicyOptions> {
    let full = || of(PolicyKind::Full);
    let all = vec![
        full(),
        PolicyOptions { tier: KvTier::Host, ..full() },
        PolicyOptions { tier: file(true), ..full() },
        PolicyOptions { tier: file(false), payload: Payload::Int8, ..full() },
        PolicyOptions { payload: Payload::Int8, ..full() },
        PolicyOptions { tier: KvTier::Host, payload: Payload::Int8, ..full() },
        of(PolicyKind::Int4),
        PolicyOptions { tier: KvTier::Host, ..of(PolicyKind::Int4) },
        PolicyOptions { tier: file(true), ..of(PolicyKind::Int4) },
        budget(PolicyKind::Window, Budget::Tokens(9)),
        budget(PolicyKind::Window, Budget::Share(0.4)),
        budget(PolicyKind::H2o, Budget::Tokens(9)),
        budget(PolicyKind::H2o, Budget::Share(0.4)),
        infinigen(InfinigenMode::Default),
        PolicyOptions { tier: file(false), ..infinigen(InfinigenMode::Default) },
        PolicyOptions { tier: KvTier::Host, payload: Payload::Int8, ..infinigen(InfinigenMode::Default) },
        infinigen(InfinigenMode::Paper),
        PolicyOptions { eviction: Eviction::Fifo, pool_tokens: 12, ..infinigen(InfinigenMode::Default) },
        PolicyOptions {
            tier: file(false),
            payload: Payload::Int8,
            ..evicting(InfinigenMode::Default, Eviction::Lru, 16, 9)
        },
        PolicyOptions { tier: KvTier::Host, ..evicting(InfinigenMode::Default, Eviction::Counter, 11, 20) },
        evicting(InfinigenMode::Paper, Eviction::Counter, 10, 6),
        correcting(infinigen(InfinigenMode::Default)),
        correcting(infinigen(InfinigenMode::Paper)),
        correcting(PolicyOptions {
            tier: file(false),
            payload: Payload::Int8,
            ..evicting(InfinigenMode::Default, Eviction::Lru, 16, 10)
        }),
        correcting(PolicyOptions { tier: file(true), ..evicting(InfinigenMode::Default, Eviction::Counter, 11, 20) }),
    ];
    all.into_iter().filter(|policy| there(model, policy)).collect()
}

/// The same with a weak predictor, which leaves something to correct.
fn correcting(policy: PolicyOptions) -> PolicyOptions {
    let infinigen = InfinigenOptions { predictor: Predictor::Own, correct: 0.1, ..policy.infinigen };
    PolicyOptions { infinigen, ..policy }
}

/// A pool and a cache of so many tokens.
fn evicting(mode: InfinigenMode, eviction: Eviction, pool_tokens: usize, cache: usize) -> PolicyOptions {
    let policy = infinigen(mode);
    let infinigen = InfinigenOptions { cache: Budget::Tokens(cache), ..policy.infinigen };
    PolicyOptions { eviction, pool_tokens, infinigen, ..policy }
}

/// Small enough that a golden text does not fit the cache.
fn infinigen(mode: InfinigenMode) -> PolicyOptions {
    let own = InfinigenOptions { cache: Budget::Tokens(14), cache_least: 0, ..InfinigenOptions::of(mode) };
    let own = match mode {
        InfinigenMode::Default => InfinigenOptions { rule: Rule::Share(0.08), sinks: 2, window: 4, ..own },
        InfinigenMode::Paper => own,
    };
    PolicyOptions { infinigen: own, ..of(PolicyKind::Infinigen) }
}

fn options(policy: &PolicyOptions) -> SessionOptions {
    SessionOptions { policy: policy.clone(), kv_dtype: Some(DType::F32), ..SessionOptions::default() }
}

fn session(model: &Model, policy: &PolicyOptions) -> Session {
    Session::new(model, &options(policy)).unwrap()
}

/// What a session is taken through: prompts of some tokens and decoded ones, and where each begins and ends.
fn calls(tokens: usize) -> Vec<(usize, usize)> {
    let (first, second) = (tokens / 2, tokens / 2 + 5);
    let mut calls = vec![(0, first)];
    calls.extend((first..second).map(|i| (i, i + 1)));
    calls.push((second, second + 6));
    calls.extend((second + 6..tokens).map(|i| (i, i + 1)));
    calls
}

fn call(session: &mut Session, tokens: &[u32], (from, to): (usize, usize)) -> kvahead::Result<Vec<f32>> {
    if to - from == 1 {
        session.decode(tokens[from])?
    } else {
        session.prefill(&tokens[from..to])?
    };
    Ok(session.logits()?.to_vec())
}

/// Logits after each call.
fn run(session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
    calls(tokens.len()).into_iter().map(|at| call(session, tokens, at).unwrap()).collect()
}

#[test]
fn exact_entries_give_the_same_bits_wherever_they_are() {
    for name in ["smollm2", "mistral-window", "opt-pre-norm", "llama-mqa-tied"] {
        let (model, golden) = model(name);
        for prefill_chunk in [0, 7] {
            let with = |tier: KvTier| {
                let policy = PolicyOptions { tier, ..of(PolicyKind::Full) };
                let mut session = Session::new(&model, &SessionOptions { prefill_chunk, ..options(&policy) }).unwrap();
                run(&mut session, &golden.tokens)
            };
            let expected = with(KvTier::Device);
            let tiers = [KvTier::Host, file(true), file(false)];
            for tier in tiers.into_iter().filter(|tier| on(&model, tier)) {
                assert!(with(tier.clone()) == expected, "{name}: {tier:?}, chunks of {prefill_chunk}");
            }
        }
    }
}

#[test]
fn quantized_entries_stay_near() {
    let (model, golden) = model("smollm2");
    let expected = run(&mut session(&model, &of(PolicyKind::Full)), &golden.tokens);
    let mut errors = Vec::new();
    for (policy, most) in [
        (PolicyOptions { payload: Payload::Int8, ..of(PolicyKind::Full) }, 0.02),
        (PolicyOptions { payload: Payload::Int4, ..of(PolicyKind::Full) }, 0.3),
    ] {
        let mut near = session(&model, &policy);
        let logits = run(&mut near, &golden.tokens);
        assert_eq!(logits[0], expected[0], "a prompt in one piece attends its own exact entries");
        let error = logits.iter().zip(&expected).map(|(a, b)| relative_error(a, b)).fold(0.0, f32::max);
        assert!(error > 0.0 && error < most, "{:?}: {error}", policy.payload);
        errors.push(error);
        for tier in [KvTier::Host, file(true)].into_iter().filter(|tier| on(&model, tier)) {
            let elsewhere = run(&mut session(&model, &PolicyOptions { tier, ..policy.clone() }), &golden.tokens);
            assert!(elsewhere == logits, "{:?} differs in another tier", policy.payload);
        }
        let counters = near.kv_counters().unwrap();
        assert_eq!((counters.attended, counters.hits), (counters.held, 0));
        assert!(counters.misses > 0 && counters.misses == counters.candidates && counters.host_bytes > 0);
    }
    assert!(errors[0] < errors[1], "{errors:?}");
    let int4 = run(&mut session(&model, &of(PolicyKind::Int4)), &golden.tokens);
    let same = PolicyOptions { payload: Payload::Int4, ..of(PolicyKind::Full) };
    assert!(int4 == run(&mut session(&model, &same), &golden.tokens), "int4 is full with that payload");
}

#[test]
fn a_budget_for_everything_is_full() {
    for name in ["smollm2", "qwen3", "opt-post-norm"] {
        let (model, golden) = model(name);
        let mut full = session(&model, &of(PolicyKind::Full));
        full.prefill(&golden.tokens[..20]).unwrap();
        let expected: Vec<_> =
            (20..golden.tokens.len()).map(|i| call(&mut full, &golden.tokens, (i, i + 1)).unwrap()).collect();
        for kind in [PolicyKind::Window, PolicyKind::H2o] {
            for all in [Budget::Tokens(golden.tokens.len()), Budget::Share(1.0)] {
                let mut other = session(&model, &budget(kind, all));
                other.prefill(&golden.tokens[..20]).unwrap();
                for (i, expected) in (20..).zip(&expected) {
                    let logits = call(&mut other, &golden.tokens, (i, i + 1)).unwrap();
                    assert!(relative_error(&logits, expected) < 1e-5, "{name}: {}, token {i}", kind.name());
                }
            }
            // And less is not.
            let mut less = session(&model, &budget(kind, Budget::Share(0.3)));
            less.prefill(&golden.tokens[..20]).unwrap();
            assert!(relative_error(&call(&mut less, &golden.tokens, (20, 21)).unwrap(), &expected[0]) > 1e-4);
        }
    }
}

/// What is not attended is not nothing: with a tail a session is nearer to one that attends everything, and so it is after
/// a truncation by a few tokens or by most of them.
#[test]
fn a_tail_stands_for_what_is_not_attended() {
    for name in ["smollm2", "qwen3"] {
        let (model, golden) = model(name);
        if !model.backend().has_tail() {
            return;
        }
        let n = golden.tokens.len();
        let logits = |policy: &PolicyOptions, back: Option<usize>| {
            let mut session = session(&model, policy);
            session.prefill(&golden.tokens[..n / 2]).unwrap();
            golden.tokens[n / 2..].iter().for_each(|&token| session.decode(token).unwrap());
            let from = back.unwrap_or(n);
            session.truncate(from).unwrap();
            (0..n - from / 2).map(|i| call(&mut session, &[7, 3, 11], (i % 3, i % 3 + 1)).unwrap()).collect::<Vec<_>>()
        };
        for back in [None, Some(n - 3), Some(n / 3 + 5)] {
            let full = logits(&of(PolicyKind::Full), back);
            let error = |tail: bool| {
                let mut policy = infinigen(InfinigenMode::Default);
                policy.infinigen.tail = tail;
                let near = logits(&policy, back);
                near.iter().zip(&full).map(|(a, b)| relative_error(a, b)).sum::<f32>() / full.len() as f32
            };
            let (with, without) = (error(true), error(false));
            println!("{name}, back to {back:?}: {with} with a tail, {without} without");
            assert!(with < 0.9 * without, "{name}, back to {back:?}: {with} with a tail, {without} without");
        }
    }
}

/// Every call is made to fail at every place where it can, and then done.
#[test]
fn a_step_that_fails_leaves_the_session_as_it_was() {
    let (model, golden) = model("smollm2");
    let tokens = &golden.tokens[..28];
    for policy in every(&model) {
        let expected = run(&mut session(&model, &policy), tokens);
        let left = Arc::new(AtomicUsize::new(0));
        let mut failing = Session::with_policy(&model, &options(&policy), |setting| {
            Ok(Failing::around(policy::create(&policy, setting)?, &left))
        })
        .unwrap();
        let mut failures = 0;
        for (at, expected) in calls(tokens.len()).into_iter().zip(&expected) {
            for fail in 1.. {
                let (counters, bytes) = (failing.kv_counters().unwrap(), failing.kv_bytes());
                left.store(fail, Ordering::Relaxed);
                let result = call(&mut failing, tokens, at);
                if left.swap(0, Ordering::Relaxed) > 0 {
                    assert!(&result.unwrap() == expected, "{policy:?}: tokens {at:?} after failures");
                    break;
                }
                assert_eq!(result.unwrap_err().code(), ErrorCode::Device);
                assert_eq!(failing.tokens().len(), at.0);
                let now = failing.kv_counters().unwrap();
                assert_eq!((now.steps, now.attended), (counters.steps, counters.attended), "{policy:?}");
                // (h2o keeps its scratch memory.)
                assert!(policy.kind == PolicyKind::H2o || failing.kv_bytes().device == bytes.device, "{policy:?}");
                failures += 1;
            }
        }
        assert!(failures > 100, "{failures}");
    }
}

#[test]
fn a_cancelled_batch_leaves_every_session_as_it_was() {
    let (model, golden) = model("smollm2");
    let policies = every(&model);
    let mut sessions: Vec<Session> = policies.iter().map(|policy| session(&model, policy)).collect();
    let mut alone: Vec<Session> = policies.iter().map(|policy| session(&model, policy)).collect();
    for (i, session) in sessions.iter_mut().chain(&mut alone).enumerate() {
        session.prefill(&golden.tokens[..10 + i % policies.len()]).unwrap();
    }
    for (step, &token) in golden.tokens.iter().enumerate().take(24) {
        if step % 3 == 0 {
            sessions[step % policies.len()].control().cancel();
            let mut batch: Vec<&mut Session> = sessions.iter_mut().collect();
            let error = decode_batch(&mut batch, &vec![token; policies.len()]).unwrap_err();
            assert_eq!(error.code(), ErrorCode::Cancelled);
        }
        let mut batch: Vec<&mut Session> = sessions.iter_mut().collect();
        decode_batch(&mut batch, &vec![token; policies.len()]).unwrap();
        for (i, alone) in alone.iter_mut().enumerate() {
            alone.decode(token).unwrap();
            assert_eq!(alone.logits().unwrap(), sessions[i].logits().unwrap(), "step {step}: {:?}", policies[i]);
        }
    }
}

/// Sessions of several lengths, past the end of an extent, that fetch everything in every step: what a batch fetches
/// together is what each fetches alone, step after step.
#[test]
fn a_batch_fetches_what_its_sessions_would() {
    let (model, _) = model("smollm2");
    let host = |payload| PolicyOptions { tier: KvTier::Host, payload, ..of(PolicyKind::Full) };
    for policy in [host(Payload::Exact), host(Payload::Int8), host(Payload::Int4)] {
        let prompts = [250, 3, 255, 256, 511 - 24];
        let sessions = || -> Vec<Session> {
            prompts
                .into_iter()
                .map(|length| {
                    let mut session = session(&model, &policy);
                    session.prefill(&(0..length).map(|i| (i * i + length) % 50).collect::<Vec<u32>>()).unwrap();
                    session
                })
                .collect()
        };
        let (mut together, mut alone) = (sessions(), sessions());
        let mut full = session(&model, &of(PolicyKind::Full));
        full.prefill(together[0].tokens()).unwrap();
        for step in 0..24 {
            let tokens: Vec<u32> = (0..prompts.len() as u32).map(|i| (7 * step + i) % 50).collect();
            decode_batch(&mut together.iter_mut().collect::<Vec<_>>(), &tokens).unwrap();
            for ((i, session), &token) in alone.iter_mut().enumerate().zip(&tokens) {
                session.decode(token).unwrap();
                let (one, all) = (session.logits().unwrap(), together[i].logits().unwrap());
                assert!(one == all, "{policy:?}: step {step}, session {i}");
            }
            full.decode(tokens[0]).unwrap();
            if policy.payload == Payload::Exact {
                assert!(full.logits().unwrap() == together[0].logits().unwrap(), "step {step}");
            }
        }
    }
}

/// A batch in which one session finds no room: those before it are undone, those after it have not begun.
#[test]
fn a_batch_without_room_leaves_every_session_as_it_was() {
    let (model, golden) = model("smollm2");
    let policies = every(&model);
    let mut alone: Vec<Session> = policies.iter().map(|policy| session(&model, policy)).collect();
    let left = Arc::new(AtomicUsize::new(0));
    let mut sessions: Vec<Session> = policies
        .iter()
        .enumerate()
        .map(|(i, policy)| {
            Session::with_policy(&model, &options(policy), |setting| {
                let inner = policy::create(policy, setting)?;
                Ok(if i == 4 { Failing::around(inner, &left) } else { inner })
            })
            .unwrap()
        })
        .collect();
    for session in sessions.iter_mut().chain(&mut alone) {
        session.prefill(&golden.tokens[..12]).unwrap();
    }
    for &token in &golden.tokens[..12] {
        left.store(1, Ordering::Relaxed);
        let mut batch: Vec<&mut Session> = sessions.iter_mut().collect();
        assert_eq!(decode_batch(&mut batch, &vec![token; policies.len()]).unwrap_err().code(), ErrorCode::Device);
        decode_batch(&mut batch, &vec![token; policies.len()]).unwrap();
        for (i, alone) in alone.iter_mut().enumerate() {
            alone.decode(token).unwrap();
            assert_eq!(alone.logits().unwrap(), sessions[i].logits().unwrap(), "{:?}", policies[i]);
        }
    }
}

#[test]
fn truncation_is_exact_or_refused() {
    let (model, golden) = model("smollm2");
    let tokens = &golden.tokens[..32];
    for policy in every(&model) {
        for length in [0, 3, 12, 15, 30, 31] {
            let mut long = session(&model, &policy);
            long.prefill(&tokens[..16]).unwrap();
            tokens[16..].iter().for_each(|&token| long.decode(token).unwrap());
            let fresh = || {
                let mut fresh = session(&model, &policy);
                let prompt = length.min(16);
                if prompt > 0 {
                    fresh.prefill(&tokens[..prompt]).unwrap();
                }
                tokens[prompt..length].iter().for_each(|&token| fresh.decode(token).unwrap());
                fresh.decode(7).unwrap();
                fresh.logits().unwrap().to_vec()
            };
            let evicts = policy.eviction != Eviction::Off;
            let drops = evicts || matches!(policy.kind, PolicyKind::Window | PolicyKind::H2o);
            match long.truncate(length) {
                // What is on the device is attended, and that is another thing after another history: what must hold is
                // that the same history gives the same, and that what fits the cache is attended in full.
                Ok(()) if policy.kind == PolicyKind::Infinigen => {
                    let mut twin = session(&model, &policy);
                    twin.prefill(&tokens[..16]).unwrap();
                    tokens[16..].iter().for_each(|&token| twin.decode(token).unwrap());
                    twin.truncate(length).unwrap();
                    [&mut long, &mut twin].into_iter().for_each(|session| session.decode(7).unwrap());
                    assert_eq!(long.logits().unwrap(), twin.logits().unwrap(), "{policy:?}: back to {length}");
                    if length < 14 && policy.payload == Payload::Exact {
                        let mut full = session(&model, &of(PolicyKind::Full));
                        full.prefill(&[&tokens[..length], &[7]].concat()).unwrap();
                        let error = relative_error(long.logits().unwrap(), full.logits().unwrap());
                        assert!(error < 1e-5, "{policy:?}: back to {length}: {error}");
                    }
                }
                Ok(()) => {
                    long.decode(7).unwrap();
                    assert!(long.logits().unwrap() == fresh(), "{policy:?}: back to {length}");
                    assert!(length <= 4 || !drops || policy.kind == PolicyKind::Window, "{policy:?}: to {length}");
                }
                Err(error) => {
                    assert!(drops && length > 0, "{policy:?}: back to {length}: {error}");
                    assert_eq!(error.code(), ErrorCode::Unsupported);
                    assert!(error.message().starts_with(&format!("cannot truncate to {length} tokens: policy ")));
                    // As it was.
                    let mut same = session(&model, &policy);
                    same.prefill(&tokens[..16]).unwrap();
                    tokens[16..].iter().for_each(|&token| same.decode(token).unwrap());
                    assert_eq!(long.logits().unwrap(), same.logits().unwrap());
                    same.decode(7).unwrap();
                    long.decode(7).unwrap();
                    assert_eq!(long.logits().unwrap(), same.logits().unwrap());
                }
            }
        }
    }
    // A window that has dropped nothing yet goes back anywhere; one of a fixed size nowhere, once it has.
    let mut wide = session(&model, &budget(PolicyKind::Window, Budget::Tokens(40)));
    wide.prefill(tokens).unwrap();
    wide.truncate(17).unwrap();
    let mut narrow = session(&model, &budget(PolicyKind::Window, Budget::Tokens(10)));
    narrow.prefill(tokens).unwrap();
    narrow.truncate(31).unwrap_err();
    narrow.truncate(4).unwrap();
    assert_eq!(narrow.tokens().len(), 4);
}

#[test]
fn what_is_dropped_is_given_back() {
    let (model, _) = model("smollm2");
    let tokens: Vec<u32> = (0..510).map(|i| i % 50).collect();
    for kind in [PolicyKind::Window, PolicyKind::H2o] {
        let everywhere = PolicyOptions { resident_layers: 0, ..budget(kind, Budget::Tokens(20)) };
        let mut kept = session(&model, &everywhere);
        kept.prefill(&tokens).unwrap();
        let mut full = session(&model, &of(PolicyKind::Full));
        full.prefill(&tokens).unwrap();
        assert_eq!(2 * kept.kv_bytes().device, full.kv_bytes().device, "{}: one extent of two", kind.name());
        kept.decode(1).unwrap();
        let counters = kept.kv_counters().unwrap();
        let entries = 3 * 3;
        assert_eq!((counters.steps, counters.attended, counters.held), (1, entries * 20, entries * 511));
    }
}

#[test]
fn a_model_with_a_window_of_its_own_is_refused() {
    let (model, golden) = model("mistral-window");
    let kinds = [PolicyKind::Window, PolicyKind::H2o, PolicyKind::Infinigen];
    for kind in kinds.into_iter().filter(|&kind| there(&model, &of(kind))) {
        let error: Error = Session::new(&model, &options(&of(kind))).err().expect("refused");
        assert_eq!(error.code(), ErrorCode::Unsupported, "{error}");
        assert!(error.message().contains("sliding window of 32 tokens"), "{error}");
    }
    // A session that never comes so far is not.
    let short = SessionOptions { capacity: 32, ..options(&budget(PolicyKind::H2o, Budget::Tokens(32))) };
    let mut session = Session::new(&model, &short).unwrap();
    session.prefill(&golden.tokens[..32]).unwrap();
    assert!(relative_error(session.logits().unwrap(), &golden.logits[31]) < 1e-4);
}

#[test]
fn estimates_are_what_a_full_session_holds() {
    let (model, _) = model("smollm2");
    for policy in every(&model).into_iter().chain([budget(PolicyKind::H2o, Budget::Tokens(300))]) {
        for capacity in [1, 200, 256, 512] {
            let options = SessionOptions { capacity, ..options(&policy) };
            let estimate = Estimate::new(&model, &options, 3).unwrap().kv;
            let mut session = Session::new(&model, &options).unwrap();
            let prompt: Vec<u32> = (0..capacity as u32 / 2).map(|i| i % 50).collect();
            if !prompt.is_empty() {
                session.prefill(&prompt).unwrap();
            }
            (prompt.len()..capacity).for_each(|i| session.decode(i as u32 % 50).unwrap());
            let bytes = session.kv_bytes();
            let near = |estimate: usize, bytes: usize| estimate.abs_diff(3 * bytes) * 20 <= 3 * bytes;
            assert!(near(estimate.device, bytes.device), "{policy:?}, {capacity}: {estimate:?} for {bytes:?}");
            assert!(near(estimate.file, bytes.file), "{policy:?}, {capacity}: {estimate:?} for {bytes:?}");
            if matches!(policy.tier, KvTier::File(_)) {
                assert!(bytes.file > 0 && estimate.pinned >= 3 * bytes.pinned, "{estimate:?} for {bytes:?}");
            } else {
                assert!(near(estimate.pinned, bytes.pinned), "{policy:?}, {capacity}: {estimate:?} for {bytes:?}");
            }
        }
    }
}
