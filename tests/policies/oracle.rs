//! `window` and `h2o` layer by layer: random keys, values and queries go through the policy and the backend's attention,
//! and through a naive f64 simulation that keeps sets of tokens. Steps are made to fail on the way and done again.

use std::sync::Arc;

use kvahead::backend::cpu::{CpuBackend, CpuOptions};
use kvahead::backend::cuda::CudaBackend;
use kvahead::backend::{AttentionShape, Backend, Buffer, DType, KvGeometry, Place, Segment, Stream};
use kvahead::engine::Device;
use kvahead::kv::Pool;
use kvahead::policy::{self, Budget, Phase, Policy, PolicyKind, PolicyOptions, Setting, Step};

const LAYERS: usize = 2;
const KV_HEADS: usize = 2;
const HEADS: usize = 6;
const D: usize = 16;
const SCALE: f32 = 0.25;

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform, −2 to 2.
    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() >> 40) as f32 / (1 << 22) as f32 - 2.0).collect()
    }
}

/// Of the device that tests compute on.
fn backend() -> Arc<dyn Backend> {
    match crate::common::device() {
        Device::Cuda => Arc::new(CudaBackend::new(0).unwrap()),
        _ => Arc::new(CpuBackend::new(CpuOptions { threads: 2, level: None }).unwrap()),
    }
}

/// What a layer computes for every token, one row a token.
struct Layer {
    queries: Vec<f32>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// What the naive policies have in common.
trait Naive {
    /// The tokens that a decoded one attends in a KV head, itself included, in any order.
    fn decode(&mut self, layers: &[Layer], layer: usize, head: usize, position: usize) -> Vec<usize>;

    /// A prompt of `length` tokens has been attended in full.
    fn prompt(&mut self, layers: &[Layer], length: usize);
}

/// Probabilities of the query head at `position` over `rows`.
fn probabilities(layer: &Layer, head: usize, position: usize, rows: &[usize]) -> Vec<f64> {
    let q = &layer.queries[(position * HEADS + head) * D..][..D];
    let scores: Vec<f64> = rows
        .iter()
        .map(|row| {
            let k = &layer.keys[(row * KV_HEADS + head / (HEADS / KV_HEADS)) * D..][..D];
            q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() * f64::from(SCALE)
        })
        .collect();
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
    scores.iter().map(|s| (s - most).exp() / sum).collect()
}

/// Attention of the query head at `position` over `rows`.
fn attention(layer: &Layer, head: usize, position: usize, rows: &[usize]) -> Vec<f64> {
    let mut out = vec![0.0; D];
    for (row, p) in rows.iter().zip(probabilities(layer, head, position, rows)) {
        let v = &layer.values[(row * KV_HEADS + head / (HEADS / KV_HEADS)) * D..][..D];
        out.iter_mut().zip(v).for_each(|(o, v)| *o += p * f64::from(*v));
    }
    out
}

fn tokens(budget: Budget, length: usize) -> usize {
    match budget {
        Budget::Tokens(tokens) => tokens,
        Budget::Share(share) => (f64::from(share) * length as f64).round() as usize,
    }
}

/// The set follows from the length alone.
struct NaiveWindow {
    budget: Budget,
    sinks: usize,
    resident_layers: usize,
}

impl Naive for NaiveWindow {
    fn decode(&mut self, _: &[Layer], layer: usize, _: usize, position: usize) -> Vec<usize> {
        let n = position + 1;
        if layer < self.resident_layers {
            return (0..n).collect();
        }
        let recent = tokens(self.budget, n).max(self.sinks + 1) - self.sinks;
        (0..n).filter(|&row| row < self.sinks || row + recent >= n).collect()
    }

    fn prompt(&mut self, _: &[Layer], _: usize) {}
}

/// Tokens and masses of every layer and KV head.
#[derive(Clone)]
struct NaiveH2o {
    budget: Budget,
    sets: Vec<Vec<(usize, f64)>>,
}

impl NaiveH2o {
    fn most(&self, n: usize) -> (usize, usize) {
        let most = tokens(self.budget, n).max(1);
        (most, n.saturating_sub(most.div_ceil(2)))
    }

    fn add(&mut self, layers: &[Layer], layer: usize, head: usize, position: usize) {
        let set = &mut self.sets[layer * KV_HEADS + head];
        let rows: Vec<usize> = set.iter().map(|&(row, _)| row).filter(|&row| row <= position).collect();
        for h in head * HEADS / KV_HEADS..(head + 1) * HEADS / KV_HEADS {
            let p = probabilities(&layers[layer], h, position, &rows);
            for (row, p) in rows.iter().zip(p) {
                set.iter_mut().find(|(other, _)| other == row).unwrap().1 += p;
            }
        }
    }

    fn shrink(&mut self, at: usize, n: usize, count: usize) {
        let (_, recent) = self.most(n);
        let set = &mut self.sets[at];
        while set.len() > count {
            let (victim, _) = set
                .iter()
                .enumerate()
                .filter(|(_, (row, _))| *row < recent)
                .min_by(|a, b| a.1.1.total_cmp(&b.1.1))
                .expect("an old token");
            set.remove(victim);
        }
    }
}

impl Naive for NaiveH2o {
    fn decode(&mut self, layers: &[Layer], layer: usize, head: usize, position: usize) -> Vec<usize> {
        let at = layer * KV_HEADS + head;
        self.shrink(at, position + 1, self.most(position + 1).0 - 1);
        self.sets[at].push((position, 0.0));
        self.add(layers, layer, head, position);
        self.sets[at].iter().map(|&(row, _)| row).collect()
    }

    fn prompt(&mut self, layers: &[Layer], length: usize) {
        for layer in 0..LAYERS {
            for head in 0..KV_HEADS {
                let at = layer * KV_HEADS + head;
                self.sets[at] = (0..length).map(|row| (row, 0.0)).collect();
                (0..length).for_each(|position| self.add(layers, layer, head, position));
                self.shrink(at, length, self.most(length).0);
            }
        }
    }
}

/// The policy under test, and a backend.
struct Real {
    backend: Arc<dyn Backend>,
    stream: Stream,
    fetch: Stream,
    policy: Box<dyn Policy>,
    layers: Vec<Layer>,
}

impl Real {
    fn upload(&self, values: &[f32]) -> Buffer {
        let mut buffer = self.backend.allocate(values.len() * 4, Place::Device, "a test").unwrap();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
        self.backend.upload(&self.stream, &bytes, &mut buffer, 0).unwrap();
        buffer
    }

    fn step(&self, layer: usize, position: usize, rows: usize, phase: Phase) -> Step<'_> {
        let (backend, stream) = (&*self.backend, &self.stream);
        Step { backend, stream, fetch: &self.fetch, layer, position, rows, phase }
    }

    /// Runs `rows` tokens through layers `..stop`; outputs, layer by layer.
    fn run(&mut self, position: usize, rows: usize, phase: Phase, stop: usize) -> Vec<Vec<f32>> {
        let shape = AttentionShape { heads: HEADS, kv_heads: KV_HEADS, head_dim: D, scale: SCALE, window: None };
        let mut outputs = Vec::new();
        for layer in 0..stop {
            let part = |values: &[f32], width: usize| values[position * width..(position + rows) * width].to_vec();
            let data = &self.layers[layer];
            let (q, k, v) =
                (part(&data.queries, HEADS * D), part(&data.keys, KV_HEADS * D), part(&data.values, KV_HEADS * D));
            let (q, k, v) = (self.upload(&q), self.upload(&k), self.upload(&v));
            let mut out = self.upload(&vec![f32::NAN; rows * HEADS * D]);
            let mut policy = std::mem::replace(&mut self.policy, Box::new(Nothing));
            let step = self.step(layer, position, rows, phase);
            let (keys, values) = (k.rows(DType::F32, rows, KV_HEADS * D), v.rows(DType::F32, rows, KV_HEADS * D));
            policy.prefetch(&step).unwrap();
            policy.append(&step, keys, values).unwrap();
            policy.land(&step).unwrap();
            let queries = q.rows(DType::F32, rows, HEADS * D);
            let (runs, visible) = policy.attended(&step);
            let segment = Segment { row: 0, rows, position, runs, visible };
            let into = out.rows_mut(DType::F32, rows, HEADS * D);
            self.backend.attend(&self.stream, queries, &shape, &[segment], into).unwrap();
            policy.observe(&step, &shape, queries).unwrap();
            let mut bytes = vec![0; rows * HEADS * D * 4];
            self.backend.download(&self.stream, out.rows(DType::F32, rows, HEADS * D), &mut bytes).unwrap();
            outputs.push(bytes.chunks_exact(4).map(|b| f32::from_ne_bytes(b.try_into().unwrap())).collect());
            self.policy = policy;
        }
        outputs
    }

    fn end(&mut self, position: usize, rows: usize, fail: bool) {
        let mut policy = std::mem::replace(&mut self.policy, Box::new(Nothing));
        let phase = if rows == 1 { Phase::Decode } else { Phase::Prefill { last: true } };
        let step = self.step(0, position, rows, phase);
        if fail { policy.roll_back(&step, position) } else { policy.commit(&step) }.unwrap();
        self.policy = policy;
    }
}

/// Stands in while the policy is borrowed.
struct Nothing;

impl Policy for Nothing {
    fn reserve(&mut self, _: usize) -> kvahead::Result<()> {
        unreachable!()
    }
    fn append(
        &mut self,
        _: &Step<'_>,
        _: kvahead::backend::Rows<'_>,
        _: kvahead::backend::Rows<'_>,
    ) -> kvahead::Result<()> {
        unreachable!()
    }
    fn attended(&self, _: &Step<'_>) -> (kvahead::backend::KvRuns<'_>, kvahead::backend::Visible<'_>) {
        unreachable!()
    }
    fn roll_back(&mut self, _: &Step<'_>, _: usize) -> kvahead::Result<()> {
        unreachable!()
    }
    fn truncate(&mut self, _: &Step<'_>, _: usize) -> kvahead::Result<()> {
        unreachable!()
    }
    fn bytes(&self) -> policy::TierBytes {
        unreachable!()
    }
}

fn compare(got: &[f32], expected: &[f64], what: &str) {
    for (i, (a, b)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*a) - b).abs() < 1e-4, "{what}, dimension {i}: {a} for {b}");
    }
}

fn check(options: &PolicyOptions, naive: &mut dyn Naive, prompt: usize, total: usize, seed: u64) {
    let mut random = Random(seed);
    let backend = backend();
    let geometry = KvGeometry { layers: LAYERS, kv_heads: KV_HEADS, head_dim: D, extent_tokens: 64, dtype: DType::F32 };
    let setting = Setting {
        pool: Arc::new(Pool::new(backend.clone(), 0)),
        backend: backend.clone(),
        geometry,
        heads: HEADS,
        scale: SCALE,
        capacity: total,
        window: None,
        speculation: None,
    };
    let policy = policy::create(options, setting).unwrap();
    let layers = (0..LAYERS)
        .map(|_| Layer {
            queries: random.values(total * HEADS * D),
            keys: random.values(total * KV_HEADS * D),
            values: random.values(total * KV_HEADS * D),
        })
        .collect();
    let stream = backend.stream().unwrap();
    let fetch = backend.side_stream(&stream).unwrap();
    let mut real = Real { stream, fetch, backend, policy, layers };
    let PolicyOptions { kind, budget, sinks, resident_layers, .. } = options;
    let what = format!("{} {budget:?}, {sinks} sinks, {resident_layers} layers in full, prompt {prompt}", kind.name());

    // The prompt, in chunks; given up once, and done again.
    for fail in [true, false] {
        if prompt == 0 {
            break;
        }
        real.policy.reserve(prompt).unwrap();
        for from in (0..prompt).step_by(33) {
            let rows = 33.min(prompt - from);
            let last = from + rows == prompt;
            let stop = if fail && last { 1 } else { LAYERS };
            let outputs = real.run(from, rows, Phase::Prefill { last }, stop);
            for (layer, out) in outputs.iter().enumerate() {
                for (i, out) in out.chunks_exact(D).enumerate() {
                    let (position, head) = (from + i / HEADS, i % HEADS);
                    let past: Vec<usize> = (0..=position).collect();
                    compare(out, &attention(&real.layers[layer], head, position, &past), &format!("{what}: prompt"));
                }
            }
        }
        real.end(0, prompt, fail);
    }
    naive.prompt(&real.layers, prompt);
    real.policy.reset_counters();

    // Tokens one by one, in steps of one and sometimes of several; every third step is begun, given up, and done again.
    // The first layers that attend everything count in that only, unless all do.
    let first = match options.kind {
        PolicyKind::Window if options.resident_layers < LAYERS => options.resident_layers,
        _ => 0,
    };
    let (mut attended, mut selected, mut position) = (0, 0, prompt);
    while position < total {
        let rows = if random.below(4) == 0 { 1 + random.below(9) } else { 1 }.min(total - position);
        if random.below(3) == 0 {
            let before = real.policy.counters();
            real.policy.reserve(position + rows).unwrap();
            let done = random.below(rows);
            (position..position + done).for_each(|p| drop(real.run(p, 1, Phase::Decode, LAYERS)));
            real.run(position + done, 1, Phase::Decode, random.below(LAYERS + 1));
            if random.below(2) == 0 && done + 1 == rows {
                real.end(position, rows, false);
            }
            real.end(position, rows, true);
            assert_eq!(real.policy.counters(), before, "{what}: a step that failed has been counted");
        }
        real.policy.reserve(position + rows).unwrap();
        for p in position..position + rows {
            let outputs = real.run(p, 1, Phase::Decode, LAYERS);
            for (layer, out) in outputs.iter().enumerate() {
                for head in 0..KV_HEADS {
                    let seen = naive.decode(&real.layers, layer, head, p);
                    attended += seen.len() as u64;
                    selected += if layer < first { 0 } else { seen.len() as u64 - 1 };
                    for h in head * HEADS / KV_HEADS..(head + 1) * HEADS / KV_HEADS {
                        let expected = attention(&real.layers[layer], h, p, &seen);
                        compare(&out[h * D..][..D], &expected, &format!("{what}: layer {layer}, head {h}, token {p}"));
                    }
                }
            }
        }
        real.end(position, rows, false);
        position += rows;
    }
    let counters = real.policy.counters();
    let steps = (total - prompt) as u64;
    assert_eq!((counters.steps, counters.attended), (steps, attended), "{what}");
    assert_eq!(counters.selected, selected, "{what}");
    let past: usize = (prompt..total).map(|p| p * KV_HEADS).sum();
    assert_eq!(counters.held, (past * LAYERS) as u64 + steps * (LAYERS * KV_HEADS) as u64, "{what}");
    assert_eq!(counters.candidates, (past * (LAYERS - first)) as u64, "{what}");
}

const BUDGETS: [Budget; 6] = [
    Budget::Tokens(1),
    Budget::Tokens(7),
    Budget::Tokens(24),
    Budget::Tokens(1000),
    Budget::Share(0.05),
    Budget::Share(0.37),
];

#[test]
fn window_attends_sinks_and_recent_tokens() {
    for (seed, budget) in BUDGETS.into_iter().enumerate() {
        for (sinks, prompt, resident_layers) in [(4, 0, 1), (4, 90, 0), (0, 70, 1), (3, 2, 5), (40, 90, 0), (4, 90, 1)]
        {
            let kind = PolicyKind::Window;
            let options = PolicyOptions { kind, budget, sinks, resident_layers, ..PolicyOptions::default() };
            check(&options, &mut NaiveWindow { budget, sinks, resident_layers }, prompt, 150, seed as u64);
        }
    }
}

#[test]
fn h2o_attends_heavy_hitters_and_recent_tokens() {
    for (seed, budget) in BUDGETS.into_iter().enumerate() {
        for prompt in [0, 1, 90] {
            let options = PolicyOptions { kind: PolicyKind::H2o, budget, ..PolicyOptions::default() };
            let mut naive = NaiveH2o { budget, sets: vec![Vec::new(); LAYERS * KV_HEADS] };
            check(&options, &mut naive, prompt, 150, 100 + seed as u64);
        }
    }
}
