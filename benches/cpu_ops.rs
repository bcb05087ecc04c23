//! How fast the CPU backend's operations are on the shapes of a small Llama (SmolLM2-135M), printed beside what the
//! machine can read: `cargo bench --bench cpu_ops -- [threads] [levels] [part of a name]`.
//!
//! Each line is the best of many rounds (with one thread, of its processor time); every decode line is followed by its share of the reading ceiling measured just
//! before it, because on a shared machine both drift together.

use kvahead::backend::cpu::{CpuBackend, CpuOptions, Level};
use kvahead::backend::{
    Activation, AttentionShape, Backend, Blocks, Buffer, DType, HeadMaps, IndexBits, IndexGeometry, IndexRuns,
    IndexRunsMut, KvGeometry, KvRuns, Linear, Norm, NormKind, Place, Rehearsal, Segment, Selected, Selection, Shape,
    Stream, Vector, Visible,
};
use std::hint::black_box;
use std::time::{Duration, Instant};

const HIDDEN: usize = 576;
const FFN: usize = 1536;
const VOCAB: usize = 49152;
const LAYERS: usize = 30;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;

/// Outputs and inputs of a layer's matrices, fused as the engine has them.
const MATRICES: [(usize, usize); 4] =
    [((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), (HIDDEN, HIDDEN), (2 * FFN, HIDDEN), (HIDDEN, FFN)];

/// How long each line is tried for.
const ROUNDS: Duration = Duration::from_millis(2000);

struct Bench {
    cpu: CpuBackend,
    stream: Stream,
    threads: usize,
    filter: String,
    noise: u64,
}

impl Bench {
    fn wanted(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// A buffer of small random numbers.
    fn random(&mut self, dtype: DType, count: usize) -> Buffer {
        let mut bytes = Vec::with_capacity(count * dtype.bytes());
        for _ in 0..count {
            self.noise = self.noise.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let x = (self.noise >> 40) as f32 / (1 << 24) as f32 - 0.5;
            match dtype {
                DType::F32 => bytes.extend(x.to_le_bytes()),
                DType::F16 => bytes.extend(half::f16::from_f32(x).to_le_bytes()),
                DType::BF16 => bytes.extend(half::bf16::from_f32(x).to_le_bytes()),
                DType::U32 => unreachable!(),
            }
        }
        let mut buffer = self.cpu.allocate(bytes.len(), Place::Device, "a bench").unwrap();
        self.cpu.upload(&self.stream, &bytes, &mut buffer, 0).unwrap();
        buffer
    }

    fn linear(&mut self, dtype: DType, outputs: usize, inputs: usize) -> Linear {
        Linear { outputs, inputs, dtype, blocks: None, data: self.random(dtype, outputs * inputs), bias: None }
    }

    /// A matrix of blocks; any small halves are good scales, and any bits good elements.
    fn in_blocks(&mut self, blocks: Blocks, outputs: usize, inputs: usize) -> Linear {
        let data = self.random(DType::F16, blocks.bytes(outputs, inputs) / DType::F16.bytes());
        Linear { outputs, inputs, dtype: DType::BF16, blocks: Some(blocks), data, bias: None }
    }

    /// Bytes per second that all threads together read from memory.
    fn ceiling(&self) -> f64 {
        let count = (256 << 20) / 8;
        let mut buffer = self.cpu.allocate(count * 8, Place::Device, "a bench").unwrap();
        self.cpu.upload(&self.stream, &vec![1; count * 8], &mut buffer, 0).unwrap();
        // SAFETY: the buffer holds `count` words, initialised and aligned.
        let words = unsafe { std::slice::from_raw_parts(buffer.address().cast::<u64>(), count) };
        let read = |part: &[u64]| {
            let mut sums = [0u64; 32];
            for chunk in part.chunks_exact(32) {
                for (sum, word) in sums.iter_mut().zip(chunk) {
                    *sum = sum.wrapping_add(*word);
                }
            }
            black_box(sums);
        };
        let (own, others) = words.split_at(words.len() / self.threads);
        let best = best(self.threads, || {
            std::thread::scope(|scope| {
                for part in others.chunks(own.len()) {
                    scope.spawn(move || read(part));
                }
                read(own);
            });
        });
        (words.len() * 8) as f64 / best
    }

    fn bandwidth(&self, name: &str, bytes: usize, run: impl FnMut()) {
        let before = self.ceiling();
        let seconds = best(self.threads, run);
        let ceiling = before.max(self.ceiling());
        let rate = bytes as f64 / seconds;
        println!(
            "{name:<44} {:>9.1} us {:>8.1} GB/s, {:>3.0}% of {:.1}",
            seconds * 1e6,
            rate / 1e9,
            100.0 * rate / ceiling,
            ceiling / 1e9
        );
    }

    fn arithmetic(&self, name: &str, operations: f64, run: impl FnMut()) {
        let seconds = best(self.threads, run);
        println!("{name:<44} {:>9.1} us {:>8.1} GFLOP/s", seconds * 1e6, operations / seconds / 1e9);
    }
}

/// Seconds on a clock that suits the threads: with one thread the processor time of the caller, which other programs on
/// the machine do not stretch; otherwise the wall's.
fn now(threads: usize) -> f64 {
    let clock = if threads == 1 { libc::CLOCK_THREAD_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is writable; both clocks exist.
    unsafe { libc::clock_gettime(clock, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Seconds of the fastest of many runs.
fn best(threads: usize, mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::MAX;
    let mut rounds = 0;
    while rounds < 5 || begin.elapsed() < ROUNDS {
        let start = now(threads);
        run();
        best = best.min(now(threads) - start);
        rounds += 1;
    }
    best
}

fn decode_products(bench: &mut Bench, weights: &str, linear: impl Fn(&mut Bench, usize, usize) -> Linear) {
    for rows in [1, 2, 4] {
        let name = format!("decode products, {rows} row(s), {weights}");
        if !bench.wanted(&name) {
            continue;
        }
        let mut weights = Vec::new();
        for _ in 0..LAYERS {
            for (n, k) in MATRICES {
                weights.push(linear(bench, n, k));
            }
        }
        weights.push(linear(bench, VOCAB, HIDDEN));
        let x = bench.random(DType::F32, rows * FFN);
        let mut out = bench.random(DType::F32, rows * VOCAB);
        let bytes = weights.iter().map(|w| w.data.bytes()).sum();
        bench.bandwidth(&name, bytes, || {
            for w in &weights {
                let x = x.rows(DType::F32, rows, w.inputs);
                let out = out.rows_mut(DType::F32, rows, w.outputs);
                bench.cpu.matmul(&bench.stream, x, w, false, Shape::Decode, out).unwrap();
            }
        });
    }
}

fn prefill_products(bench: &mut Bench, weights: &str, linear: impl Fn(&mut Bench, usize, usize) -> Linear) {
    for rows in [32, 128, 512] {
        for (n, k) in MATRICES {
            let name = format!("prefill product {rows} x {n} x {k}, {weights}");
            if !bench.wanted(&name) {
                continue;
            }
            let w = linear(bench, n, k);
            let x = bench.random(DType::F32, rows * k);
            let mut out = bench.random(DType::F32, rows * n);
            bench.arithmetic(&name, 2.0 * (rows * n * k) as f64, || {
                let (x, out) = (x.rows(DType::F32, rows, k), out.rows_mut(DType::F32, rows, n));
                bench.cpu.matmul(&bench.stream, x, &w, false, Shape::Prefill, out).unwrap();
            });
        }
    }
}

fn attention(bench: &mut Bench, dtype: DType) {
    let shape = AttentionShape { heads: HEADS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, scale: 0.125, window: None };
    let cols = HEADS * HEAD_DIM;
    let geometry = |layers| KvGeometry { layers, kv_heads: KV_HEADS, head_dim: HEAD_DIM, extent_tokens: 256, dtype };
    for depth in [128, 4096, 7900] {
        let name = format!("decode attention at depth {depth}, {dtype}");
        if !bench.wanted(&name) {
            continue;
        }
        let geometry = geometry(LAYERS);
        let extents: Vec<Buffer> = (0..geometry.extents(depth))
            .map(|_| bench.random(dtype, geometry.extent_bytes() / dtype.bytes()))
            .collect();
        let q = bench.random(DType::F32, cols);
        let mut out = bench.random(DType::F32, cols);
        let bytes = LAYERS * KV_HEADS * depth * geometry.row_bytes();
        bench.bandwidth(&name, bytes, || {
            for layer in 0..LAYERS {
                let runs = KvRuns::new(&extents, geometry, layer);
                let segment = Segment { row: 0, rows: 1, position: depth - 1, runs, visible: Visible::Causal };
                let out = out.rows_mut(DType::F32, 1, cols);
                bench.cpu.attend(&bench.stream, q.rows(DType::F32, 1, cols), &shape, &[segment], out).unwrap();
            }
        });
    }
    for (position, rows) in [(0, 512), (7680, 512), (0, 8192)] {
        let name = format!("prefill attention {rows} at {position}, {dtype}");
        if !bench.wanted(&name) {
            continue;
        }
        let geometry = geometry(1);
        let extents: Vec<Buffer> = (0..geometry.extents(position + rows))
            .map(|_| bench.random(dtype, geometry.extent_bytes() / dtype.bytes()))
            .collect();
        let q = bench.random(DType::F32, rows * cols);
        let mut out = bench.random(DType::F32, rows * cols);
        let pairs = (rows * position + rows * (rows + 1) / 2) as f64;
        bench.arithmetic(&name, 4.0 * pairs * cols as f64, || {
            let runs = KvRuns::new(&extents, geometry, 0);
            let segment = Segment { row: 0, rows, position, runs, visible: Visible::Causal };
            let out = out.rows_mut(DType::F32, rows, cols);
            bench.cpu.attend(&bench.stream, q.rows(DType::F32, rows, cols), &shape, &[segment], out).unwrap();
        });
    }
}

/// Decode attention over what a policy names: the first rows, or a twentieth of all in ascending order.
fn named_rows(bench: &mut Bench, dtype: DType) {
    let shape = AttentionShape { heads: HEADS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, scale: 0.125, window: None };
    let cols = HEADS * HEAD_DIM;
    let geometry = KvGeometry { layers: LAYERS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, extent_tokens: 256, dtype };
    let depth = 7900;
    for (kind, count) in [("first", 395), ("first", 7900), ("listed", 395), ("listed", 7900)] {
        let name = format!("decode attention, {kind} {count} rows, {dtype}");
        if !bench.wanted(&name) {
            continue;
        }
        let extents: Vec<Buffer> = (0..geometry.extents(depth))
            .map(|_| bench.random(dtype, geometry.extent_bytes() / dtype.bytes()))
            .collect();
        let q = bench.random(DType::F32, cols);
        let mut out = bench.random(DType::F32, cols);
        let counts = [count as u32; KV_HEADS];
        let lists: Vec<Vec<u32>> =
            (0..KV_HEADS).map(|_| (0..count).map(|i| (i * depth / count) as u32).collect()).collect();
        let visible = if kind == "first" { Visible::First(&counts) } else { Visible::Listed(&lists) };
        bench.bandwidth(&name, LAYERS * KV_HEADS * count * geometry.row_bytes(), || {
            for layer in 0..LAYERS {
                let runs = KvRuns::new(&extents, geometry, layer);
                let segment = Segment { row: 0, rows: 1, position: depth - 1, runs, visible };
                let out = out.rows_mut(DType::F32, 1, cols);
                bench.cpu.attend(&bench.stream, q.rows(DType::F32, 1, cols), &shape, &[segment], out).unwrap();
            }
        });
    }
    let name = format!("attention mass, 32 rows at {depth}, {dtype}");
    if bench.wanted(&name) {
        let geometry = KvGeometry { layers: 1, ..geometry };
        let extents: Vec<Buffer> = (0..geometry.extents(depth + 32))
            .map(|_| bench.random(dtype, geometry.extent_bytes() / dtype.bytes()))
            .collect();
        let q = bench.random(DType::F32, 32 * cols);
        let mut out = bench.random(DType::F32, KV_HEADS * (depth + 32));
        bench.arithmetic(&name, 4.0 * (32 * depth * cols) as f64, || {
            let runs = KvRuns::new(&extents, geometry, 0);
            let segment = Segment { row: 0, rows: 32, position: depth, runs, visible: Visible::Causal };
            let out = out.rows_mut(DType::F32, KV_HEADS, depth + 32);
            bench.cpu.attention_mass(&bench.stream, q.rows(DType::F32, 32, cols), &shape, &segment, out).unwrap();
        });
    }
}

/// What speculation costs beside a layer: projections, and a rehearsal over as many layers' indices as a model has.
fn speculation(bench: &mut Bench) {
    const COLUMNS: usize = 32;
    for rows in [1, 512] {
        let name = format!("head maps, {rows} row(s)");
        if bench.wanted(&name) {
            let data = bench.random(DType::F32, KV_HEADS * COLUMNS * HEAD_DIM);
            let maps = HeadMaps { kv_heads: KV_HEADS, inputs: HEAD_DIM, outputs: COLUMNS, data };
            let x = bench.random(DType::F32, rows * HEADS * HEAD_DIM);
            let mut out = bench.random(DType::F32, rows * HEADS * COLUMNS);
            bench.arithmetic(&name, 2.0 * (rows * HEADS * HEAD_DIM * COLUMNS) as f64, || {
                let out = out.rows_mut(DType::F32, rows, HEADS * COLUMNS);
                let x = x.rows(DType::F32, rows, HEADS * HEAD_DIM);
                bench.cpu.project_heads(&bench.stream, x, &maps, out).unwrap();
            });
        }
    }
    let tokens = 7900;
    for bits in [IndexBits::Four, IndexBits::Eight, IndexBits::Full] {
        let geometry = IndexGeometry { layers: LAYERS, kv_heads: KV_HEADS, columns: COLUMNS, extent_tokens: 256, bits };
        let mut extents: Vec<Buffer> = (0..geometry.extents(tokens))
            .map(|_| bench.cpu.allocate(geometry.extent_bytes(), Place::Device, "a bench").unwrap())
            .collect();
        let keys = bench.random(DType::F32, tokens * KV_HEADS * COLUMNS);
        for layer in 0..LAYERS {
            let mut runs = IndexRunsMut::new(&mut extents, geometry, layer);
            let keys = keys.rows(DType::F32, tokens, KV_HEADS * COLUMNS);
            bench.cpu.index_append(&bench.stream, keys, &mut runs, 0).unwrap();
        }
        let name = format!("index append, 512 rows, {bits:?}");
        if bench.wanted(&name) {
            bench.arithmetic(&name, (512 * KV_HEADS * COLUMNS) as f64, || {
                let mut runs = IndexRunsMut::new(&mut extents, geometry, 0);
                let keys = keys.rows(DType::F32, 512, KV_HEADS * COLUMNS);
                bench.cpu.index_append(&bench.stream, keys, &mut runs, 0).unwrap();
            });
        }
        for selection in [
            Selection::Count { count: tokens / 50 },
            Selection::Count { count: tokens / 5 },
            Selection::Probability { below: 8.0, least: 16, most: tokens / 5 },
            Selection::Paper { alpha: 4.0, most: tokens / 5 },
        ] {
            let name = format!("rehearse {tokens} {bits:?} {selection:?}");
            if !bench.wanted(&name) {
                continue;
            }
            let q = bench.random(DType::F32, HEADS * COLUMNS);
            let mut selected = Selected::default();
            let seconds = best(bench.threads, || {
                for layer in 0..LAYERS {
                    let runs = IndexRuns::new(&extents, geometry, layer);
                    let (from, to) = (4, tokens - 64);
                    let rehearsal = Rehearsal { row: 0, runs, rows: tokens, from, to, scale: 1.0, selection };
                    let q = q.rows(DType::F32, 1, HEADS * COLUMNS);
                    bench.cpu.rehearse(&bench.stream, q, &[rehearsal], &mut [&mut selected]).unwrap();
                }
            });
            println!("{name:<80} {:>9.1} us a layer", seconds * 1e6 / LAYERS as f64);
        }
    }
}

fn small(bench: &mut Bench) {
    for rows in [1, 512] {
        let norm_name = format!("rms norm, {rows} row(s)");
        let activate_name = format!("silu, {rows} row(s)");
        if bench.wanted(&norm_name) {
            let data = bench.random(DType::F32, HIDDEN);
            let norm = Norm { kind: NormKind::Rms, epsilon: 1e-5, weight: Vector { len: HIDDEN, data }, bias: None };
            let x = bench.random(DType::F32, rows * HIDDEN);
            let mut out = bench.random(DType::F32, rows * HIDDEN);
            bench.arithmetic(&norm_name, (rows * HIDDEN) as f64, || {
                let (x, out) = (x.rows(DType::F32, rows, HIDDEN), out.rows_mut(DType::F32, rows, HIDDEN));
                bench.cpu.norm(&bench.stream, x, &norm, out).unwrap();
            });
        }
        if bench.wanted(&activate_name) {
            let x = bench.random(DType::F32, rows * 2 * FFN);
            let mut out = bench.random(DType::F32, rows * FFN);
            bench.arithmetic(&activate_name, (rows * FFN) as f64, || {
                let (x, out) = (x.rows(DType::F32, rows, 2 * FFN), out.rows_mut(DType::F32, rows, FFN));
                bench.cpu.activate(&bench.stream, x, Activation::SiluGated, out).unwrap();
            });
        }
    }
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with("--")).collect();
    let threads = words.iter().find_map(|w| w.parse().ok()).unwrap_or(0);
    let named = |w: &&String, level: Level| w.eq_ignore_ascii_case(&format!("{level:?}"));
    let is_level = |w: &&String| Level::available().any(|level| named(w, level));
    let levels: Vec<Level> = Level::available().filter(|&l| words.iter().any(|w| named(&w, l))).collect();
    let levels = if levels.is_empty() { Level::available().filter(|&l| l > Level::Scalar).collect() } else { levels };
    let filter = words.iter().find(|w| w.parse::<usize>().is_err() && !is_level(w)).cloned().unwrap_or_default();
    for level in levels {
        let cpu = CpuBackend::new(CpuOptions { threads, level: Some(level) }).unwrap();
        println!("\n{}", cpu.description());
        let threads = if threads == 0 { std::thread::available_parallelism().unwrap().get() } else { threads };
        let stream = cpu.stream().unwrap();
        let mut bench = Bench { cpu, stream, threads, filter: filter.clone(), noise: 1 };
        for dtype in [DType::BF16, DType::F16, DType::F32] {
            let linear = |bench: &mut Bench, n, k| bench.linear(dtype, n, k);
            if level != Level::Amx {
                decode_products(&mut bench, &dtype.to_string(), linear);
            }
            prefill_products(&mut bench, &dtype.to_string(), linear);
            attention(&mut bench, dtype);
            named_rows(&mut bench, dtype);
        }
        for blocks in [Blocks::Q4_0, Blocks::Q4_1, Blocks::Q8_0] {
            let linear = |bench: &mut Bench, n, k| bench.in_blocks(blocks, n, k);
            if level != Level::Amx {
                decode_products(&mut bench, &blocks.to_string(), linear);
            }
            prefill_products(&mut bench, &blocks.to_string(), linear);
        }
        // As SmolLM2-135M's file has it.
        let mixed =
            |bench: &mut Bench, n, k| bench.in_blocks(if n == VOCAB { Blocks::Q8_0 } else { Blocks::Q4_1 }, n, k);
        decode_products(&mut bench, "q4_1 and q8_0", mixed);
        speculation(&mut bench);
        small(&mut bench);
    }
}
