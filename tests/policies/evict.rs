//! Eviction from a full pool, against naive pools: what each KV head attends is read back from the memory that attention
//! reads, and told apart by the bits of its keys and values.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use kvahead::backend::{DType, KvRuns, Rows, Visible};
use kvahead::engine::{Model, ModelOptions, Session, SessionOptions, decode_batch};
use kvahead::kv::{Eviction, FileOptions, KvTier, Payload, SequenceKv};
use kvahead::policy::{
    self, Budget, InfinigenMode, InfinigenOptions, KvCounters, Phase, Policy, PolicyKind, PolicyOptions, Predictor,
    Record, Rule, Setting, Step, TierBytes, TraceReader,
};
use kvahead::{Error, ErrorCode, Result};

use crate::around::{Around, Watch};
use crate::common::{data, load, relative_error};
use crate::failing::Failing;

const KINDS: [Eviction; 3] = [Eviction::Fifo, Eviction::Lru, Eviction::Counter];
const SINKS: usize = 2;
const WINDOW: usize = 4;
const RESIDENT: usize = 1;

fn model() -> Model {
    load(&data().join("golden/smollm2"), Some(DType::F32))
}

fn text(length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| (i * i * 7 + 3 * i) % 61).collect()
}

/// `cache` slots; a fifth of the tokens selected.
fn evicting(eviction: Eviction, pool_tokens: usize, cache: usize) -> PolicyOptions {
    let infinigen = InfinigenOptions {
        rule: Rule::Share(0.2),
        sinks: SINKS,
        window: WINDOW,
        resident_layers: RESIDENT,
        cache: Budget::Tokens(cache),
        cache_least: 0,
        ..InfinigenOptions::default()
    };
    PolicyOptions { kind: PolicyKind::Infinigen, eviction, pool_tokens, infinigen, ..PolicyOptions::default() }
}

fn options(policy: &PolicyOptions) -> SessionOptions {
    SessionOptions {
        policy: policy.clone(),
        kv_dtype: Some(DType::F32),
        prefill_chunk: 11,
        ..SessionOptions::default()
    }
}

fn session(model: &Model, policy: &PolicyOptions) -> Session {
    Session::new(model, &options(policy)).unwrap()
}

/// Who finds the victims: the host, or what a device does by itself.
#[derive(Clone, Copy, Debug)]
enum Chooser {
    Host,
    Device,
}

const CHOOSERS: [Chooser; 2] = [Chooser::Host, Chooser::Device];

fn create(chooser: Chooser, policy: &PolicyOptions, setting: Setting) -> Result<Box<dyn Policy>> {
    match chooser {
        Chooser::Host => policy::create(policy, setting),
        Chooser::Device => policy::create_on_device(policy, setting),
    }
}

fn chosen_by(chooser: Chooser, model: &Model, policy: &PolicyOptions) -> Session {
    Session::with_policy(model, &options(policy), |setting| create(chooser, policy, setting)).unwrap()
}

/// Prompts by their lengths, with single tokens (1) decoded. Logits after each.
fn run(session: &mut Session, tokens: &[u32], calls: &[usize]) -> Vec<Vec<f32>> {
    let mut from = 0;
    let logits = calls.iter().map(|&count| {
        match count {
            1 => session.decode(tokens[from]).unwrap(),
            _ => session.prefill(&tokens[from..from + count]).unwrap(),
        }
        from += count;
        session.logits().unwrap().to_vec()
    });
    logits.collect()
}

/// Short and long prompts, at the beginning and later.
fn scenarios() -> Vec<Vec<usize>> {
    let decoded = |count: usize| vec![1; count];
    vec![
        [vec![10], decoded(60)].concat(),
        [vec![57], decoded(20)].concat(),
        [vec![20], decoded(15), vec![33], decoded(10), vec![2, 5], decoded(5)].concat(),
    ]
}

/// Attended tokens of each KV head, by position and layer.
type Sets = BTreeMap<(usize, usize), Vec<BTreeSet<u32>>>;

#[derive(Default)]
struct Log {
    /// Tokens by layer, KV head, and the bits of key and value.
    tokens: HashMap<(usize, usize, Vec<u8>), u32>,
    attended: Sets,
}

/// Notes what a policy attends when it decodes.
struct Watching {
    log: Arc<Mutex<Log>>,
    kv_heads: usize,
}

/// The bytes of some columns of a row of 32-bit numbers.
fn bytes(rows: &Rows<'_>, row: usize, from: usize, count: usize) -> Vec<u8> {
    assert!(rows.dtype().bytes() == 4 && row < rows.rows() && from + count <= rows.cols());
    // SAFETY: in bounds of a live window, on the CPU.
    let part = unsafe { std::slice::from_raw_parts(rows.base().add((row * rows.stride() + from) * 4), count * 4) };
    part.to_vec()
}

impl Watch for Watching {
    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) {
        let d = keys.cols() / self.kv_heads;
        let mut log = self.log.lock().unwrap();
        for i in 0..keys.rows() {
            for head in 0..self.kv_heads {
                let entry = [bytes(&keys, i, head * d, d), bytes(&values, i, head * d, d)].concat();
                let before = log.tokens.insert((step.layer, head, entry), (step.position + i) as u32);
                assert!(before.is_none_or(|token| token as usize == step.position + i), "two tokens look the same");
            }
        }
    }

    fn attended(&self, step: &Step<'_>, runs: &KvRuns<'_>, visible: &Visible<'_>) {
        if step.phase == Phase::Decode {
            let (geometry, mut log) = (*runs.geometry(), self.log.lock().unwrap());
            let sets = (0..geometry.kv_heads).map(|head| {
                let rows: Vec<u32> = match visible {
                    Visible::Causal => (0..=step.position as u32).collect(),
                    Visible::First(counts) => (0..counts[head]).collect(),
                    Visible::Listed(lists) => lists[head].clone(),
                    Visible::Slots(slots) => {
                        let g = slots.geometry;
                        let words = slots.tables.rows(DType::U32, 1, g.words());
                        let count = bytes(&words, 0, g.count_at(slots.layer * g.kv_heads + head), 1);
                        (0..u32::from_ne_bytes(count.try_into().unwrap())).collect()
                    }
                };
                let tokens: BTreeSet<u32> = rows
                    .iter()
                    .map(|&row| {
                        let (extent, at) =
                            (row as usize / geometry.extent_tokens, row as usize % geometry.extent_tokens);
                        let bytes = geometry.row_bytes();
                        // SAFETY: a row of a run, on the CPU.
                        let entry =
                            unsafe { std::slice::from_raw_parts(runs.run(extent, head).add(at * bytes), bytes) };
                        log.tokens[&(step.layer, head, entry.to_vec())]
                    })
                    .collect();
                assert_eq!(tokens.len(), rows.len(), "an entry is attended twice");
                tokens
            });
            let sets = sets.collect();
            log.attended.insert((step.position, step.layer), sets);
        }
    }
}

/// Logits, attended sets, and what was selected by position, layer and KV head.
struct Outcome {
    logits: Vec<Vec<f32>>,
    attended: Sets,
    selected: HashMap<(usize, usize, usize), Selected>,
    counters: KvCounters,
}

fn watch(chooser: Chooser, model: &Model, policy: &PolicyOptions, tokens: &[u32], calls: &[usize]) -> Outcome {
    let folder = tempfile::tempdir().unwrap();
    let trace = folder.path().join("trace");
    let mut policy = PolicyOptions { trace: Some(trace.clone()), ..policy.clone() };
    // What is given to the oracle is attended and nothing else.
    policy.infinigen.tail = false;
    let log = Arc::new(Mutex::new(Log::default()));
    let mut session = Session::with_policy(model, &options(&policy), |setting| {
        let kv_heads = setting.geometry.kv_heads;
        Ok(Around::boxed(create(chooser, &policy, setting)?, Watching { log: log.clone(), kv_heads }))
    })
    .unwrap();
    let logits = run(&mut session, tokens, calls);
    let counters = session.kv_counters().unwrap();
    drop(session);
    let attended = std::mem::take(&mut log.lock().unwrap().attended);
    Outcome { logits, attended, selected: selections(&trace), counters }
}

/// What a step has selected, and those of it that a correction has added.
#[derive(Default)]
struct Selected {
    tokens: Vec<u32>,
    corrected: Vec<u32>,
}

fn selections(trace: &Path) -> HashMap<(usize, usize, usize), Selected> {
    let records = TraceReader::open(trace).unwrap().map(|record| record.unwrap());
    let selected = |r: Record| Selected { tokens: r.selected, corrected: r.corrected };
    records.map(|r| ((r.position as usize, r.layer as usize, r.head as usize), selected(r))).collect()
}

/// The tokens that one KV head holds, and when and how often each was used.
struct NaivePool {
    kind: Eviction,
    limit: usize,
    /// Token, when it came, when it was used last, how often it was used.
    held: Vec<(u32, usize, usize, u32)>,
    evicted: BTreeSet<u32>,
}

impl NaivePool {
    /// What was selected is used before what a correction has added, and that before the new token.
    fn token(&mut self, position: usize, Selected { tokens: selected, corrected }: &Selected) {
        let now = 3 * position;
        for entry in self.held.iter_mut().filter(|entry| selected.contains(&entry.0)) {
            entry.2 = now + usize::from(corrected.contains(&entry.0));
        }
        if self.kind == Eviction::Counter {
            let first = selected.iter().filter(|token| !corrected.contains(token));
            for token in first.chain(corrected) {
                let entry = self.held.iter_mut().find(|entry| entry.0 == *token).expect("what is selected is held");
                entry.3 += 1;
                if entry.3 == 255 {
                    self.held.iter_mut().for_each(|entry| entry.3 /= 2);
                }
            }
        }
        if self.held.len() == self.limit {
            let may_go = |token: u32| {
                token as usize >= SINKS && (token as usize) + WINDOW <= position && !selected.contains(&token)
            };
            let rank = |entry: &(u32, usize, usize, u32)| match self.kind {
                Eviction::Lru => (entry.2, entry.1),
                Eviction::Counter => (entry.3 as usize, entry.1),
                _ => (0, entry.1),
            };
            let victim = self.held.iter().filter(|entry| may_go(entry.0)).min_by_key(|entry| rank(entry)).unwrap().0;
            self.held.retain(|entry| entry.0 != victim);
            assert!(self.evicted.insert(victim));
        }
        self.held.push((position as u32, now + 2, now + 2, 0));
    }

    fn tokens(&self) -> BTreeSet<u32> {
        self.held.iter().map(|entry| entry.0).collect()
    }
}

/// Attends sets that are given to it, of entries that are all there.
struct Given {
    kv: SequenceKv,
    sets: Arc<Sets>,
    lists: Vec<Vec<u32>>,
    limit: usize,
    evicted: bool,
}

impl Policy for Given {
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.kv.reserve(length)
    }
    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        step.backend.store_kv(step.stream, keys, values, &mut self.kv.layer_mut(step.layer), step.position)?;
        if step.phase == Phase::Decode {
            self.lists = self.sets[&(step.position, step.layer)].iter().map(|s| s.iter().copied().collect()).collect();
            self.evicted |= step.position >= self.limit;
        }
        Ok(())
    }
    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        let decode = step.phase == Phase::Decode;
        (self.kv.layer(step.layer), if decode { Visible::Listed(&self.lists) } else { Visible::Causal })
    }
    fn roll_back(&mut self, _: &Step<'_>, _: usize) -> Result<()> {
        Ok(())
    }
    fn truncate(&mut self, _: &Step<'_>, _: usize) -> Result<()> {
        Ok(())
    }
    fn prefills(&self, position: usize, tokens: usize) -> usize {
        if self.evicted { 0 } else { tokens.min(self.limit - position) }
    }
    fn bytes(&self) -> TierBytes {
        TierBytes::default()
    }
}

/// Every KV head of every layer keeps what a naive pool keeps, attends sinks, window and what was selected, nothing that
/// was evicted, and everything where the cache has room for it; and the logits are those of a policy that has all
/// entries and attends these sets.
#[test]
fn what_is_attended_is_what_a_naive_pool_holds() {
    let model = model();
    let (layers, heads) = (model.config().layers, model.config().kv_heads);
    let tokens = text(120);
    for (kind, chooser) in KINDS.iter().flat_map(|&kind| CHOOSERS.map(|chooser| (kind, chooser))) {
        for (limit, cache, correct) in [
            (24, 100, 0.0),
            (24, 24, 0.0),
            (24, 13, 0.0),
            (7, 7, 0.0),
            (8, 100, 0.0),
            (40, 16, 0.0),
            (24, 24, 0.1),
            (24, 13, 0.1),
            (12, 11, 0.5),
            (40, 16, 0.2),
        ] {
            for calls in scenarios() {
                let what =
                    format!("{kind:?} by {chooser:?}, {limit} rows, {cache} slots, {correct} corrected, {calls:?}");
                let mut policy = evicting(kind, limit, cache);
                if correct > 0.0 {
                    (policy.infinigen.correct, policy.infinigen.predictor) = (correct, Predictor::Own);
                }
                let outcome = watch(chooser, &model, &policy, &tokens, &calls);
                let total: usize = calls.iter().sum();
                let mut evicted = 0;
                for layer in RESIDENT..layers {
                    for head in 0..heads {
                        let mut naive = NaivePool { kind, limit, held: Vec::new(), evicted: BTreeSet::new() };
                        for position in 0..total {
                            let none = Selected::default();
                            let selected = outcome.selected.get(&(position, layer, head)).unwrap_or(&none);
                            naive.token(position, selected);
                            let Some(attended) = outcome.attended.get(&(position, layer)) else { continue };
                            let (attended, held) = (&attended[head], naive.tokens());
                            assert!(attended.is_subset(&held), "{what}: {position}: {attended:?} of {held:?}");
                            let recent = (position + 1).saturating_sub(WINDOW)..position + 1;
                            let always = (0..SINKS.min(position)).chain(recent).map(|token| token as u32);
                            assert!(
                                always.chain(selected.tokens.iter().copied()).all(|token| attended.contains(&token)),
                                "{what}"
                            );
                            if cache >= limit {
                                assert_eq!(attended, &held, "{what}: {position}");
                            } else {
                                assert!(attended.len() <= cache, "{what}: {position}");
                            }
                        }
                        assert_eq!(naive.evicted.len(), total - limit, "{what}");
                        evicted += naive.evicted.len() as u64;
                    }
                }
                let corrects = correct > 0.0 && cache < limit;
                assert_eq!(outcome.counters.corrected > 0, corrects, "{what}");
                // Of a prompt only what is decoded is counted, and all of that.
                assert_eq!(outcome.counters.evicted, evicted, "{what}");
                assert!(kind == Eviction::Fifo || !outcome.selected.is_empty(), "{what}: nothing was ever selected");

                let sets = Arc::new(outcome.attended);
                let mut given = Session::with_policy(&model, &options(&policy), |setting: Setting| {
                    let kv = SequenceKv::new(setting.pool, setting.geometry);
                    Ok(Box::new(Given { kv, sets: sets.clone(), lists: Vec::new(), limit, evicted: false }))
                })
                .unwrap();
                for (i, (a, b)) in outcome.logits.iter().zip(run(&mut given, &tokens, &calls)).enumerate() {
                    let error = relative_error(a, &b);
                    assert!(error < 1e-5, "{what}: call {i}: {error}");
                }
            }
        }
    }
}

/// Wherever exact entries are, and however many threads compute: the same bits. Until the pool is full, eviction changes
/// nothing at all.
#[test]
fn eviction_is_the_same_in_every_tier_and_before_it_begins() {
    let (model, tokens) = (model(), text(120));
    let one = ModelOptions { dtype: Some(DType::F32), threads: 1, ..ModelOptions::default() };
    let one = Model::load(&data().join("golden/smollm2"), one).unwrap();
    let file = |buffered| KvTier::File(FileOptions { buffered, checksum: true, ..FileOptions::default() });
    for kind in KINDS {
        for calls in scenarios() {
            for payload in [Payload::Exact, Payload::Int8, Payload::Int4] {
                let policy = PolicyOptions { payload, ..evicting(kind, 24, 13) };
                let expected = run(&mut session(&model, &policy), &tokens, &calls);
                assert!(run(&mut session(&one, &policy), &tokens, &calls) == expected, "{kind:?}: threads");
                for tier in [KvTier::Host, file(true), file(false)] {
                    let elsewhere = PolicyOptions { tier, ..policy.clone() };
                    assert!(run(&mut session(&model, &elsewhere), &tokens, &calls) == expected, "{elsewhere:?}");
                }
                let off = PolicyOptions { eviction: Eviction::Off, pool_tokens: 0, ..policy.clone() };
                let never = run(&mut session(&model, &off), &tokens, &calls);
                let wide = PolicyOptions { pool_tokens: 120, ..policy };
                assert!(run(&mut session(&model, &wide), &tokens, &calls) == never, "{kind:?}: not full");
                assert!(never != expected, "{kind:?}: nothing was lost");
            }
        }
    }
}

/// A prompt longer than the pool is one of the pool's length, and decoded tokens.
#[test]
fn a_long_prompt_is_decoded_past_the_pool() {
    let (model, tokens) = (model(), text(90));
    for mode in [InfinigenMode::Default, InfinigenMode::Paper] {
        let mut policy = evicting(Eviction::Counter, 30, 16);
        if mode == InfinigenMode::Paper {
            policy.infinigen =
                InfinigenOptions { cache: Budget::Tokens(14), cache_least: 0, ..InfinigenOptions::of(mode) };
        }
        let mut whole = session(&model, &policy);
        let mut scores = vec![0.0; tokens.len()];
        whole.score(&tokens, &mut scores).unwrap();
        let mut parts = session(&model, &policy);
        parts.prefill(&tokens[..30]).unwrap();
        for i in 30..tokens.len() {
            let logits = parts.logits().unwrap();
            let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
            let expected = f64::from(logits[tokens[i] as usize]) - sum.ln();
            assert!((f64::from(scores[i]) - expected).abs() < 1e-4, "{mode:?}: token {i}");
            parts.decode(tokens[i]).unwrap();
        }
        assert_eq!(whole.logits().unwrap(), parts.logits().unwrap(), "{mode:?}");
        let counters = whole.kv_counters().unwrap();
        assert_eq!(counters.steps, 60);
        assert_eq!(counters, KvCounters { host_bytes: counters.host_bytes, ..parts.kv_counters().unwrap() });
    }
}

/// A long prompt that is given up after many evictions leaves every entry as it was, wherever it is: what comes next is
/// something else, and fetches what had been overwritten.
#[test]
fn a_prompt_given_up_brings_every_victim_back() {
    let (model, tokens) = (model(), text(120));
    let file = |buffered| KvTier::File(FileOptions { buffered, checksum: true, ..FileOptions::default() });
    let places = [
        (KvTier::Device, Payload::Exact),
        (KvTier::Host, Payload::Int8),
        (file(true), Payload::Exact),
        (file(false), Payload::Int4),
    ];
    for kind in KINDS {
        for (tier, payload) in places.clone() {
            let policy = PolicyOptions { tier, payload, ..evicting(kind, 24, 11) };
            let prepare = [vec![18], vec![1; 12]].concat();
            let mut twin = session(&model, &policy);
            run(&mut twin, &tokens, &prepare);
            let expected = run(&mut twin, &tokens[30..], &[1; 30]);
            for fail in [7, 60, 170, 300, 419] {
                let left = Arc::new(AtomicUsize::new(0));
                let mut failing = Session::with_policy(&model, &options(&policy), |setting| {
                    Ok(Failing::around(policy::create(&policy, setting)?, &left))
                })
                .unwrap();
                run(&mut failing, &tokens, &prepare);
                let before = failing.kv_counters().unwrap();
                left.store(fail, Ordering::Relaxed);
                let error = failing.prefill(&tokens[60..100]).unwrap_err();
                assert_eq!(error.code(), ErrorCode::Device, "{fail} calls: {error}");
                assert_eq!(failing.kv_counters().unwrap().evicted, before.evicted);
                let logits = run(&mut failing, &tokens[30..], &[1; 30]);
                assert!(logits == expected, "{policy:?}: given up after {fail} calls");
            }
        }
    }
}

/// Sessions that evict, beside one that does not, alone and in a batch.
#[test]
fn a_batch_evicts_as_each_of_its_sessions_alone() {
    let (model, tokens) = (model(), text(100));
    let off = PolicyOptions { eviction: Eviction::Off, pool_tokens: 0, ..evicting(Eviction::Fifo, 0, 13) };
    let policies: Vec<PolicyOptions> = KINDS
        .iter()
        .flat_map(|&kind| [evicting(kind, 20, 30), evicting(kind, 26, 12)])
        .chain([off, PolicyOptions::default()])
        .collect();
    let mut alone: Vec<Session> = policies.iter().map(|policy| session(&model, policy)).collect();
    let mut together: Vec<Session> = policies.iter().map(|policy| session(&model, policy)).collect();
    for session in alone.iter_mut().chain(&mut together) {
        session.prefill(&tokens[..17]).unwrap();
    }
    for &token in &tokens[17..70] {
        let mut batch: Vec<&mut Session> = together.iter_mut().collect();
        decode_batch(&mut batch, &vec![token; policies.len()]).unwrap();
        for (i, (alone, together)) in alone.iter_mut().zip(&together).enumerate() {
            alone.decode(token).unwrap();
            assert_eq!(alone.logits().unwrap(), together.logits().unwrap(), "{:?}", policies[i]);
        }
    }
}

/// Without eviction the step that finds no room is refused before it begins.
#[test]
fn a_full_pool_without_eviction_is_a_capacity_error() {
    let (model, tokens) = (model(), text(60));
    let policy = evicting(Eviction::Off, 20, 13);
    let mut full = session(&model, &policy);
    full.prefill(&tokens[..20]).unwrap();
    let before = full.logits().unwrap().to_vec();
    for result in [full.decode(1), full.prefill(&tokens[..2])] {
        let error: Error = result.unwrap_err();
        assert_eq!(error.code(), ErrorCode::Capacity);
        assert!(error.message().contains("pool_tokens is 20"), "{error}");
    }
    assert_eq!((full.logits().unwrap(), full.tokens().len()), (&before[..], 20));
    full.truncate(10).unwrap();
    full.prefill(&tokens[10..20]).unwrap();
}

/// Without a limit of its own a session evicts when the model's pool, or its file, has no more room.
#[test]
fn a_pool_without_room_evicts() {
    let folder = data().join("golden/smollm2");
    let tokens: Vec<u32> = text(500);
    let sized = |kv_limit: usize| {
        let options = ModelOptions { dtype: Some(DType::F32), threads: 2, kv_limit, ..ModelOptions::default() };
        Model::load(&folder, options).unwrap()
    };
    let unlimited = sized(0);
    let (layers, heads, d) = (unlimited.config().layers, unlimited.config().kv_heads, unlimited.config().head_dim);
    // What a session of 300 tokens takes, and a little; its second extents of store and index do not fit.
    let extent = 256 * heads * 2 * d * 4;
    let limit = (2 * RESIDENT + (layers - RESIDENT) * 2 + 1) * extent;
    for kind in KINDS {
        let policy = evicting(kind, 0, 40);
        let model = sized(limit);
        for calls in [[vec![200], vec![1; 200]].concat(), vec![400]] {
            let mut limited = session(&model, &policy);
            let logits = run(&mut limited, &tokens, &calls);
            assert_eq!(
                limited.kv_counters().unwrap().evicted,
                ((layers - RESIDENT) * heads * (400 - 256)) as u64,
                "{kind:?}"
            );
            assert!(model.pool().usage().used <= limit);
            // The same as with a limit of one extent of its own.
            let own = PolicyOptions { pool_tokens: 256, ..policy.clone() };
            assert!(run(&mut session(&unlimited, &own), &tokens, &calls) == logits, "{kind:?}");
            drop(limited);
            // The device finds the same.
            let mut limited = chosen_by(Chooser::Device, &model, &policy);
            assert!(run(&mut limited, &tokens, &calls) == logits, "{kind:?}");
            drop(limited);
            // Without eviction that is the end, and the session keeps what it has.
            let off = PolicyOptions { eviction: Eviction::Off, ..policy.clone() };
            let mut off = session(&model, &off);
            off.prefill(&tokens[..200]).unwrap();
            let used = model.pool().usage().used;
            let error = (200..400).find_map(|i| off.decode(tokens[i]).err()).expect("no room");
            assert_eq!((error.code(), off.tokens().len()), (ErrorCode::Capacity, 256), "{error}");
            assert_eq!(model.pool().usage().used, used, "{error}");
        }
        // The file of a session of 100 tokens.
        let runs = ((layers - RESIDENT) * heads) as u64;
        let file =
            FileOptions { limit: runs * (100 * 2 * d as u64 * 4).next_multiple_of(4096), ..FileOptions::default() };
        let policy = PolicyOptions { tier: KvTier::File(file), ..evicting(kind, 0, 40) };
        let mut limited = session(&unlimited, &policy);
        run(&mut limited, &tokens, &[vec![60], vec![1; 100], vec![40]].concat());
        // Two blocks of 64 rows in each run.
        assert_eq!(limited.kv_counters().unwrap().evicted, runs * (200 - 128), "{kind:?}");
    }
}

/// Back to where nothing is missing, and no further.
#[test]
fn truncation_stops_at_what_was_evicted() {
    let (model, tokens) = (model(), text(60));
    for kind in KINDS {
        let policy = evicting(kind, 20, 13);
        let mut evicted = session(&model, &policy);
        run(&mut evicted, &tokens, &[vec![15], vec![1; 20]].concat());
        let error = evicted.truncate(30).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unsupported);
        assert!(error.message().contains("have been evicted, so only the first"), "{error}");
        let mut twin = session(&model, &policy);
        run(&mut twin, &tokens, &[vec![15], vec![1; 20]].concat());
        for session in [&mut evicted, &mut twin] {
            session.decode(5).unwrap();
        }
        assert_eq!(evicted.logits().unwrap(), twin.logits().unwrap());
        // The sinks are there for ever, and what begins with them is a new session.
        evicted.truncate(SINKS).unwrap();
        let mut fresh = session(&model, &policy);
        fresh.prefill(&tokens[..SINKS]).unwrap();
        for &token in &tokens[SINKS..50] {
            evicted.decode(token).unwrap();
            fresh.decode(token).unwrap();
            assert_eq!(evicted.logits().unwrap(), fresh.logits().unwrap(), "{kind:?}");
        }
        // What has not evicted yet goes back anywhere.
        let mut young = session(&model, &policy);
        run(&mut young, &tokens, &[vec![15], vec![1; 5]].concat());
        young.truncate(17).unwrap();
        run(&mut young, &tokens[17..], &[1; 20]);
    }
}
