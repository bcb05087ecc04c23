//! Corrections of `infinigen`, layer by layer, against a naive simulation: f64 scores of the true queries, a cache that is
//! a list, and attention over the tokens that should be in it. The index is the head's own columns in full, so that a
//! score is that of attention itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use kvahead::backend::{AttentionShape, DType, Rows};
use kvahead::engine::{Model, ModelOptions, Session, SessionOptions, decode_batch};
use kvahead::kv::{FileOptions, KvTier, Payload};
use kvahead::policy::{
    self, Budget, IndexBasis, InfinigenOptions, KvCounters, Phase, PolicyKind, PolicyOptions, Predictor, Record, Rule,
    Step, TraceReader,
};

use crate::around::{Around, Watch};
use crate::common::brief::some;
use crate::common::{data, device};

const SINKS: usize = 2;
const WINDOW: usize = 4;
const RESIDENT: usize = 1;
const CACHE: usize = 24;
/// What is always attended, the newest token included, and one slot more.
const ALWAYS: usize = SINKS + WINDOW + 1;
const TOKENS: usize = 90;

fn model(threads: usize) -> Model {
    let options = ModelOptions { device: device(), dtype: Some(DType::F32), threads, ..ModelOptions::default() };
    Model::load(&data().join("golden/smollm2"), options).unwrap()
}

fn text(from: usize) -> Vec<u32> {
    (from as u32..(from + TOKENS) as u32).map(|i| (i * i * 7 + 3 * i) % 61).collect()
}

fn correcting(rule: Rule, correct: f32) -> PolicyOptions {
    let infinigen = InfinigenOptions {
        basis: IndexBasis::Plain,
        ratio: 1.0,
        index_bits: 32,
        rule,
        sinks: SINKS,
        window: WINDOW,
        resident_layers: RESIDENT,
        cache: Budget::Tokens(CACHE),
        cache_least: 0,
        attend_cache: !matches!(rule, Rule::Paper { .. }),
        correct,
        ..InfinigenOptions::default()
    };
    PolicyOptions { kind: PolicyKind::Infinigen, infinigen, ..PolicyOptions::default() }
}

fn options(policy: &PolicyOptions) -> SessionOptions {
    SessionOptions { policy: policy.clone(), kv_dtype: Some(DType::F32), ..SessionOptions::default() }
}

const RULES: [Rule; 3] =
    [Rule::Share(0.2), Rule::Probability { below: 3.0, most: 0.25 }, Rule::Paper { alpha: 1.0, most: 0.2 }];

/// What went through a layer at a position.
#[derive(Clone, Default)]
struct Seen {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// What attention gave, and what it was once it was complete.
    attended: [Vec<f32>; 2],
}

type Log = HashMap<(usize, usize), Seen>;

/// Notes what goes into a policy and what comes out.
struct Watching {
    log: Arc<Mutex<Log>>,
}

fn floats(step: &Step<'_>, rows: Rows<'_>) -> Vec<f32> {
    let mut bytes = vec![0; rows.rows() * rows.cols() * 4];
    step.backend.download(step.stream, rows, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect()
}

impl Watching {
    fn note(&self, step: &Step<'_>, what: impl FnOnce(&mut Seen)) {
        what(self.log.lock().unwrap().entry((step.position, step.layer)).or_default());
    }
}

impl Watch for Watching {
    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) {
        for i in 0..keys.rows() {
            let mut log = self.log.lock().unwrap();
            let seen = log.entry((step.position + i, step.layer)).or_default();
            (seen.keys, seen.values) = (floats(step, keys.row_range(i, 1)), floats(step, values.row_range(i, 1)));
        }
    }

    fn complete(&mut self, step: &Step<'_>, attended: Rows<'_>) {
        self.note(step, |seen| seen.attended[0] = floats(step, attended));
    }

    fn completed(&mut self, step: &Step<'_>, attended: Rows<'_>) {
        self.note(step, |seen| seen.attended[1] = floats(step, attended));
    }

    fn observe(&mut self, step: &Step<'_>, _: &AttentionShape, queries: Rows<'_>) {
        if step.phase == Phase::Decode {
            self.note(step, |seen| seen.queries = floats(step, queries));
        }
    }
}

/// The sinks as a prompt, then token by token.
fn run(session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
    session.prefill(&tokens[..SINKS]).unwrap();
    tokens[SINKS..]
        .iter()
        .map(|&token| {
            session.decode(token).unwrap();
            session.logits().unwrap().to_vec()
        })
        .collect()
}

/// One layer's shape, and what went through it.
struct Layer<'a> {
    log: &'a Log,
    layer: usize,
    kv_heads: usize,
    heads: usize,
    d: usize,
}

impl Layer<'_> {
    fn seen(&self, position: usize) -> &Seen {
        &self.log[&(position, self.layer)]
    }

    /// Logits of a query head at `position` for every past token and itself.
    fn logits(&self, position: usize, head: usize) -> Vec<f64> {
        let q = &self.seen(position).queries[head * self.d..][..self.d];
        let group = self.heads / self.kv_heads;
        let scale = 1.0 / (self.d as f64).sqrt();
        (0..=position)
            .map(|t| {
                let k = &self.seen(t).keys[head / group * self.d..][..self.d];
                q.iter().zip(k).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>() * scale
            })
            .collect()
    }

    fn value(&self, token: usize, head: usize, i: usize) -> f64 {
        f64::from(self.seen(token).values[head / (self.heads / self.kv_heads) * self.d + i])
    }

    /// What the rule selects by the true queries, the best first, for each KV head.
    fn best(&self, rule: Rule, position: usize) -> Vec<Vec<u32>> {
        let n = position + 1;
        let selectable = SINKS..n - WINDOW;
        let most = |share: f32| {
            let wanted = (f64::from(share) * n as f64).round() as usize;
            wanted.clamp(1, CACHE - ALWAYS).min(selectable.len())
        };
        // Scores of past tokens, less what normalises them.
        let scores: Vec<Vec<f64>> = (0..self.heads)
            .map(|head| {
                let logits = &self.logits(position, head)[..position];
                let largest = logits.iter().copied().fold(f64::MIN, f64::max);
                let shift = match rule {
                    Rule::Paper { .. } => largest,
                    _ => largest + logits.iter().map(|x| (x - largest).exp()).sum::<f64>().ln(),
                };
                logits.iter().map(|x| x - shift).collect()
            })
            .collect();
        let group = self.heads / self.kv_heads;
        (0..self.kv_heads)
            .map(|g| {
                let of_group = &scores[g * group..(g + 1) * group];
                let rank = |t: usize| of_group.iter().map(|scores| scores[t]).fold(f64::MIN, f64::max);
                let count = match rule {
                    Rule::Share(share) => most(share),
                    Rule::Probability { below, most: cap } => {
                        let above = selectable.clone().filter(|&t| rank(t) > -f64::from(below)).count();
                        above.max(1).min(most(cap))
                    }
                    Rule::Paper { alpha, most: cap } => {
                        let above =
                            |s: &Vec<f64>| s[selectable.clone()].iter().filter(|&&s| s > -f64::from(alpha)).count();
                        let mean = scores.iter().map(above).sum::<usize>() as f64 / self.heads as f64;
                        (mean.round() as usize).max(1).min(most(cap))
                    }
                    Rule::Random { .. } | Rule::Replay { .. } => unreachable!("nothing to rank"),
                };
                let mut rows: Vec<u32> = selectable.clone().map(|t| t as u32).collect();
                rows.sort_by(|&a, &b| rank(b as usize).total_cmp(&rank(a as usize)));
                rows.truncate(count);
                rows
            })
            .collect()
    }
}

/// Slots of a KV head: token, and when it was used last.
#[derive(Default)]
struct NaiveCache {
    slots: Vec<(u32, usize)>,
}

impl NaiveCache {
    fn holds(&self, token: u32) -> bool {
        self.slots.iter().any(|slot| slot.0 == token)
    }

    /// The tokens become the ones used last; those that were not there come over the ones unused for longest.
    fn take(&mut self, tokens: &[u32], position: usize) -> Vec<u32> {
        let (mut missed, mut slots) = (Vec::new(), Vec::new());
        for &token in tokens {
            match self.slots.iter_mut().find(|slot| slot.0 == token) {
                Some(slot) => slot.1 = position,
                None => missed.push(token),
            }
        }
        let guarded = |token: u32| (token as usize) < SINKS || token as usize + WINDOW > position;
        let free = CACHE - self.slots.len();
        let mut victims: Vec<(usize, usize)> = (0..self.slots.len())
            .filter(|&i| self.slots[i].1 < position && !guarded(self.slots[i].0))
            .map(|i| (self.slots[i].1, i))
            .collect();
        victims.sort_unstable();
        slots.extend(victims.iter().map(|v| v.1).take(missed.len().saturating_sub(free)));
        slots.sort_unstable();
        for (i, &token) in missed.iter().enumerate() {
            match i.checked_sub(free) {
                None => self.slots.push((token, position)),
                Some(i) => self.slots[slots[i]] = (token, position),
            }
        }
        missed
    }
}

/// A run with a trace: its log, its records by position, layer and KV head, and its counters.
fn watch(model: &Model, policy: &PolicyOptions) -> (Log, HashMap<(usize, usize, usize), Record>, KvCounters) {
    let folder = tempfile::tempdir().unwrap();
    let policy = PolicyOptions { trace: Some(folder.path().join("trace")), ..policy.clone() };
    let log = Arc::new(Mutex::new(Log::new()));
    let mut session = Session::with_policy(model, &options(&policy), |setting| {
        Ok(Around::boxed(policy::create(&policy, setting)?, Watching { log: log.clone() }))
    })
    .unwrap();
    run(&mut session, &text(0));
    let counters = session.kv_counters().unwrap();
    drop(session);
    let records = TraceReader::open(&folder.path().join("trace")).unwrap().map(|record| record.unwrap());
    let records = records.map(|r| ((r.position as usize, r.layer as usize, r.head as usize), r)).collect();
    let log = std::mem::take(&mut *log.lock().unwrap());
    (log, records, counters)
}

#[test]
fn a_correction_adds_what_the_true_queries_miss() {
    let model = model(2);
    let (layers, kv_heads, heads) = (model.config().layers, model.config().kv_heads, model.config().heads);
    for rule in some(RULES) {
        for (predictor, share) in [(Predictor::Own, 0.04), (Predictor::Fitted, 0.04), (Predictor::Own, 0.5)] {
            let mut policy = correcting(rule, share);
            policy.infinigen.predictor = predictor;
            let attend_cache = policy.infinigen.attend_cache;
            let (log, records, counters) = watch(&model, &policy);
            let (mut selected, mut missed, mut corrected) = (0, 0, 0);
            for layer in RESIDENT..layers {
                let layer = Layer { log: &log, layer, kv_heads, heads, d: model.config().head_dim };
                let mut caches: Vec<NaiveCache> = (0..kv_heads).map(|_| NaiveCache::default()).collect();
                for position in 0..TOKENS {
                    if position < CACHE {
                        caches.iter_mut().for_each(|cache| drop(cache.take(&[position as u32], position)));
                        continue;
                    }
                    let best = layer.best(rule, position);
                    for (g, cache) in caches.iter_mut().enumerate() {
                        let what = format!("{rule:?}, {predictor:?}, {share}: {position}, {}, {g}", layer.layer);
                        let record = &records[&(position, layer.layer, g)];
                        let mut first = record.selected.clone();
                        first.retain(|token| !record.corrected.contains(token));
                        let mut fetched = cache.take(&first, position);
                        let window = position as u32 + 1 - WINDOW as u32..position as u32;
                        let always: Vec<u32> = (0..SINKS as u32).chain(window).collect();
                        let present: Vec<u32> = if attend_cache {
                            cache.slots.iter().map(|slot| slot.0).collect()
                        } else {
                            always.iter().chain(&first).copied().collect()
                        };
                        let most = (f64::from(share) * (position + 1) as f64).round() as usize;
                        let most = most.min(CACHE - ALWAYS - first.len());
                        let absent = best[g].iter().copied().filter(|token| !present.contains(token));
                        let mut added: Vec<u32> = absent.take(most).collect();
                        added.sort_unstable();
                        assert_eq!(record.corrected, added, "{what}: after {first:?}, of {:?}", best[g]);
                        fetched.extend(cache.take(&added, position));
                        fetched.sort_unstable();
                        assert_eq!(record.missed, fetched, "{what}");
                        cache.take(&[position as u32], position);
                        selected += record.selected.len() as u64;
                        missed += fetched.len() as u64;
                        corrected += added.len() as u64;

                        let attended: Vec<usize> = if attend_cache {
                            assert!(added.iter().all(|&token| cache.holds(token)), "{what}");
                            cache.slots.iter().map(|slot| slot.0 as usize).collect()
                        } else {
                            let all = always.iter().chain(&record.selected).map(|&token| token as usize);
                            all.chain([position]).collect()
                        };
                        let beside: Vec<usize> = present.iter().chain(&added).map(|&token| token as usize).collect();
                        for head in g * heads / kv_heads..(g + 1) * heads / kv_heads {
                            check_attention(&layer, position, head, &attended, &beside, attend_cache, &what);
                        }
                    }
                }
            }
            assert!(corrected > 100, "{rule:?}, {predictor:?}: {corrected} corrections");
            let counted = (counters.selected, counters.misses, counters.hits, counters.corrected);
            assert_eq!(counted, (selected, missed, selected - missed, corrected), "{rule:?}, {predictor:?}");
        }
    }
}

/// Attention of a query head over `attended`, and with a tail that has what the true query gives to all but `beside`.
fn check_attention(
    layer: &Layer<'_>,
    position: usize,
    head: usize,
    attended: &[usize],
    beside: &[usize],
    tail: bool,
    what: &str,
) {
    let logits = layer.logits(position, head);
    let largest = logits.iter().copied().fold(f64::MIN, f64::max);
    let weights: Vec<f64> = logits.iter().map(|x| (x - largest).exp()).collect();
    let total: f64 = attended.iter().map(|&t| weights[t]).sum();
    let past: f64 = weights[..position].iter().sum();
    let left = 1.0 - beside.iter().map(|&t| weights[t]).sum::<f64>() / past;
    let left = if tail { left.max(0.0) } else { 0.0 };
    for i in 0..layer.d {
        let expected = attended.iter().map(|&t| weights[t] * layer.value(t, head, i)).sum::<f64>() / total;
        let mean = (0..=position).map(|t| layer.value(t, head, i)).sum::<f64>() / (position + 1) as f64;
        let [before, after] = &layer.seen(position).attended;
        let at = head * layer.d + i;
        assert!((f64::from(before[at]) - expected).abs() < 1e-4, "{what}: {} for {expected}", before[at]);
        let expected = (1.0 - left) * expected + left * mean;
        assert!((f64::from(after[at]) - expected).abs() < 1e-4, "{what}: {} for {expected} with a tail", after[at]);
    }
}

/// The true queries have selected already.
#[test]
fn an_exact_predictor_leaves_nothing_to_correct() {
    let model = model(2);
    for rule in RULES {
        let logits = |correct: f32| {
            let mut policy = correcting(rule, correct);
            policy.infinigen.predictor = Predictor::Exact;
            let mut session = Session::new(&model, &options(&policy)).unwrap();
            let logits = run(&mut session, &text(0));
            assert_eq!(session.kv_counters().unwrap().corrected, 0, "{rule:?}");
            logits
        };
        assert!(logits(0.0) == logits(0.5), "{rule:?}");
    }
}

/// Wherever exact entries are, however many threads compute, and whoever is beside: the same bits.
#[test]
fn corrections_are_the_same_in_every_tier_and_batch() {
    let (two, one) = (model(2), model(1));
    let files = two.backend().has_files();
    let file = |buffered| KvTier::File(FileOptions { buffered, checksum: true, ..FileOptions::default() });
    let mut policies = Vec::new();
    let mut expected = Vec::new();
    for (i, rule) in some(RULES.into_iter().enumerate()) {
        for payload in [Payload::Exact, Payload::Int8] {
            let policy = PolicyOptions { payload, ..correcting(rule, 0.1) };
            let logits = run(&mut Session::new(&two, &options(&policy)).unwrap(), &text(i));
            assert!(run(&mut Session::new(&one, &options(&policy)).unwrap(), &text(i)) == logits, "{rule:?}: threads");
            let tiers = [KvTier::Host, file(true), file(false)];
            for tier in tiers.into_iter().filter(|tier| files || *tier == KvTier::Host) {
                let elsewhere = PolicyOptions { tier, ..policy.clone() };
                let mut session = Session::new(&two, &options(&elsewhere)).unwrap();
                assert!(run(&mut session, &text(i)) == logits, "{elsewhere:?}");
                assert!(session.kv_counters().unwrap().corrected > 0);
            }
            policies.push((policy, i));
            expected.push(logits);
        }
    }
    // Among them one that does not correct.
    let plain = correcting(RULES[0], 0.0);
    expected.insert(1, run(&mut Session::new(&two, &options(&plain)).unwrap(), &text(0)));
    policies.insert(1, (plain, 0));
    let mut sessions: Vec<Session> =
        policies.iter().map(|(policy, _)| Session::new(&two, &options(policy)).unwrap()).collect();
    let texts: Vec<Vec<u32>> = policies.iter().map(|&(_, text_of)| text(text_of)).collect();
    for (session, text) in sessions.iter_mut().zip(&texts) {
        session.prefill(&text[..SINKS]).unwrap();
    }
    for at in SINKS..TOKENS {
        let tokens: Vec<u32> = texts.iter().map(|text| text[at]).collect();
        decode_batch(&mut sessions.iter_mut().collect::<Vec<_>>(), &tokens).unwrap();
        for (i, session) in sessions.iter().enumerate() {
            assert!(session.logits().unwrap() == expected[i][at - SINKS], "{:?}: token {at}", policies[i]);
        }
    }
}
