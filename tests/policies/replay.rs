//! Traces that are replayed: the same rows are selected, and as many of them are on the device.

use std::collections::BTreeMap;
use std::path::Path;

use kvahead::backend::DType;
use kvahead::engine::{Model, Session, SessionOptions};
use kvahead::policy::{self, Budget, InfinigenOptions, KvCounters, PolicyKind, PolicyOptions, Rule, TraceReader};
use kvahead::{ErrorCode, Result};

use crate::common::{Golden, data, load};

const SINKS: usize = 2;
const WINDOW: usize = 4;

fn options(rule: Rule, replay: Option<&Path>, trace: Option<&Path>) -> SessionOptions {
    let own = InfinigenOptions {
        cache: Budget::Share(0.3),
        cache_least: 0,
        tail: false,
        sinks: SINKS,
        window: WINDOW,
        rule,
        replay: replay.map(Path::to_owned),
        ..InfinigenOptions::default()
    };
    let policy = PolicyOptions {
        kind: PolicyKind::Infinigen,
        infinigen: own,
        trace: trace.map(Path::to_owned),
        ..PolicyOptions::default()
    };
    SessionOptions { policy, kv_dtype: Some(DType::F32), ..SessionOptions::default() }
}

/// Prompt of `prompt` tokens and `steps` decoded ones, all of them from `seed`.
fn run(session: &mut Session, seed: u32, prompt: usize, steps: usize) -> KvCounters {
    let vocabulary = session.model().config().vocabulary as u32;
    let tokens: Vec<u32> = (0..(prompt + steps) as u32).map(|i| (seed + i * i / 3 + 7 * i) % vocabulary).collect();
    session.prefill(&tokens[..prompt]).unwrap();
    tokens[prompt..].iter().for_each(|&token| session.decode(token).unwrap());
    session.kv_counters().unwrap()
}

/// What each layer and KV head selected, step by step.
fn selected(trace: &Path) -> BTreeMap<(u16, u16), Vec<Vec<u32>>> {
    let mut all: BTreeMap<(u16, u16), Vec<Vec<u32>>> = BTreeMap::new();
    for record in TraceReader::open(trace).unwrap().collect::<Result<Vec<_>>>().unwrap() {
        all.entry((record.layer, record.head)).or_default().push(record.selected);
    }
    all
}

fn golden(name: &str) -> Model {
    let folder = data().join("golden").join(name);
    let _ = Golden::read(&folder, "");
    load(&folder, Some(DType::F32))
}

/// The rows that one of a trace stands for, written down as docs/policies.md says it.
fn stretched(row: u32, (from, to): (usize, usize), step: usize) -> std::ops::Range<u32> {
    let old = |length: usize| (length - WINDOW - SINKS) as u64;
    let (row, first) = (u64::from(row), SINKS as u64);
    if row >= first + old(from) {
        // Its distance from the end stays; the trace had `from + step` tokens then.
        let distance = (from + step) as u64 - row;
        let row = (to + step) as u64 - distance;
        return row as u32..row as u32 + 1;
    }
    let at = |k: u64| (first + k * old(to) / old(from)) as u32;
    at(row - first)..at(row - first + 1)
}

#[test]
fn a_trace_is_replayed_at_its_own_length_and_at_others() {
    let folder = tempfile::tempdir().unwrap();
    let (trace, again) = (folder.path().join("trace"), folder.path().join("again"));
    for name in ["smollm2", "qwen3"] {
        let model = golden(name);
        if model.backend().selects_on_device() {
            return; // Traces are the host's; tests/cuda/index.rs compares what a device selects.
        }
        let (length, steps) = (150, 12);
        let rule = Rule::Probability { below: 3.0, most: 0.13 };
        let first = run(&mut Session::new(&model, &options(rule, None, Some(&trace))).unwrap(), 1, length, steps);
        assert!(first.misses > 0 && first.hits > 0, "{name}: {first:?}");
        let wanted = selected(&trace);

        let replay = Rule::Replay { most: 0.2 };
        for long in [length, (2 * length + 47).min(model.config().context_length - steps)] {
            let case = format!("{name}, {length} tokens as {long}");
            let host = options(replay, Some(&trace), Some(&again));
            // Another text: what it selects does not matter.
            let counters = run(&mut Session::new(&model, &host).unwrap(), 5, long, steps);
            let got = selected(&again);
            assert_eq!(got.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "{case}");
            for (place, wanted) in &wanted {
                for (step, rows) in wanted.iter().enumerate() {
                    let want: Vec<u32> = rows.iter().flat_map(|&row| stretched(row, (length, long), step)).collect();
                    assert_eq!(got[place][step], want, "{case}, step {step}, layer and head {place:?}");
                }
            }
            let rate = |c: &KvCounters| c.hits as f64 / c.selected as f64;
            let share = |c: &KvCounters| c.selected as f64 / c.candidates as f64;
            // Sinks, window and new tokens take fewer of the slots of a longer sequence.
            let close = if long == length { 0.01 } else { 0.1 };
            assert!(
                (rate(&counters) - rate(&first)).abs() < close,
                "{case}: {} is not {}",
                rate(&counters),
                rate(&first)
            );
            assert!((share(&counters) - share(&first)).abs() < 0.01, "{case}: {} {}", share(&counters), share(&first));

            // The device's variant selects, finds and misses the same.
            let own = options(replay, Some(&trace), None);
            let make = |setting| policy::create_on_device(&own.policy, setting);
            let device = run(&mut Session::with_policy(&model, &own, make).unwrap(), 5, long, steps);
            assert_eq!((device.selected, device.misses), (counters.selected, counters.misses), "{case}");
        }
    }
}

/// More steps than the trace has, and back again by a truncation.
#[test]
fn a_trace_begins_anew_after_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let (trace, again) = (folder.path().join("trace"), folder.path().join("again"));
    let model = golden("smollm2");
    if model.backend().selects_on_device() {
        return;
    }
    run(&mut Session::new(&model, &options(Rule::Share(0.1), None, Some(&trace))).unwrap(), 1, 60, 4);
    let wanted = selected(&trace);
    let replay = options(Rule::Replay { most: 1.0 }, Some(&trace), Some(&again));
    let mut session = Session::new(&model, &replay).unwrap();
    run(&mut session, 5, 60, 10);
    session.truncate(61).unwrap();
    session.decode(3).unwrap();
    drop(session);
    for (place, got) in selected(&again) {
        let steps = (0..10).chain([1]);
        for (got, step) in got.iter().zip(steps) {
            // Where the trace begins anew, rows that were young keep their distance from an end that is further on.
            let from_end = |rows: &[u32], length: u32| rows.iter().map(|&row| length - row).collect::<Vec<_>>();
            let old = |rows: &[u32]| rows.iter().copied().filter(|&row| row < 56).collect::<Vec<_>>();
            let young = |rows: &[u32], length: usize| {
                from_end(&rows.iter().copied().filter(|&row| row >= 56).collect::<Vec<_>>(), length as u32)
            };
            let want = &wanted[&place][step % 4];
            assert_eq!(old(got), old(want), "step {step}");
            assert_eq!(young(got, 60 + step), young(want, 60 + step % 4), "step {step}");
        }
    }
}

#[test]
fn what_cannot_be_replayed_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trace");
    let model = golden("smollm2");
    let refused = |replay: Option<&Path>, code: ErrorCode, says: &str| {
        let error = Session::new(&model, &options(Rule::Replay { most: 0.2 }, replay, None)).err().expect(says);
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(says), "{error}");
    };
    refused(None, ErrorCode::InvalidArgument, "replay names none");
    refused(Some(&path), ErrorCode::NotFound, "trace");
    std::fs::write(&path, "no trace at all, though long enough").unwrap();
    refused(Some(&path), ErrorCode::InvalidFormat, "no trace of version 2");
    drop(policy::TraceWriter::create(&path, 2, 3).unwrap());
    refused(Some(&path), ErrorCode::InvalidFormat, "no step");
}
