//! `store_kv`, the gather, and attention: decode, prefill, listed rows.

use kvahead::backend::{AttentionShape, Buffer, DType, KvGeometry, KvRuns, KvRunsMut, Move, Segment, Visible};

use crate::rig::*;

const LAYER: usize = 1;

/// Columns of a matrix of queries beside those that are attended.
const BESIDE: usize = 5;

fn rounded(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => half::f16::from_f32(x).to_f32(),
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// One layer of one sequence.
struct Sequence {
    geometry: KvGeometry,
    extents: Vec<Buffer>,
    /// What was stored, before it was rounded: a token's keys of all heads, then its values.
    kv: Vec<f32>,
}

impl Sequence {
    /// `tokens` random tokens, stored in two calls; everything else in the extents is NaN.
    fn new(rig: &Rig<'_>, random: &mut Random, geometry: KvGeometry, tokens: usize) -> Sequence {
        let elements = geometry.extent_bytes() / geometry.dtype.bytes();
        let mut extents: Vec<Buffer> =
            (0..geometry.extents(tokens + 1)).map(|_| rig.buffer(geometry.dtype, &vec![f32::NAN; elements])).collect();
        let cols = geometry.kv_heads * geometry.head_dim;
        let kv = random.normals(tokens * 2 * cols);
        let stored = rig.buffer(DType::F32, &kv);
        let rows = stored.rows(DType::F32, tokens, 2 * cols);
        let (k, v) = (rows.col_range(0, cols), rows.col_range(cols, cols));
        let first = random.below(tokens + 1);
        for (from, count) in [(0, first), (first, tokens - first)] {
            let mut runs = KvRunsMut::new(&mut extents, geometry, LAYER);
            let (k, v) = (k.row_range(from, count), v.row_range(from, count));
            rig.b.store_kv(&rig.stream, k, v, &mut runs, from).unwrap();
        }
        Sequence { geometry, extents, kv }
    }

    fn runs(&self) -> KvRuns<'_> {
        KvRuns::new(&self.extents, self.geometry, LAYER)
    }
}

#[derive(Debug)]
struct Case {
    seed: u64,
    dtype: DType,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    extent_tokens: usize,
    window: Option<usize>,
    /// Rows and position of each segment.
    segments: Vec<(usize, usize)>,
}

impl Case {
    fn shape(&self) -> AttentionShape {
        AttentionShape {
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            scale: 2.0 / (self.head_dim as f32).sqrt(),
            window: self.window,
        }
    }

    fn rows(&self) -> usize {
        self.segments.iter().map(|s| s.0).sum()
    }

    fn cols(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The sequence of each segment, and queries: a window of a wider matrix, as after a fused projection.
    fn inputs(&self, rig: &Rig<'_>) -> (Vec<Sequence>, Vec<f32>) {
        let mut random = Random(self.seed);
        let geometry = KvGeometry {
            layers: 3,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            extent_tokens: self.extent_tokens,
            dtype: self.dtype,
        };
        let sequences =
            self.segments.iter().map(|&(rows, at)| Sequence::new(rig, &mut random, geometry, at + rows)).collect();
        (sequences, random.normals(self.rows() * (self.cols() + BESIDE)))
    }

    /// All segments in one call, or each by itself.
    fn run(&self, rig: &Rig<'_>, apart: bool) -> Vec<f32> {
        let (sequences, q) = self.inputs(rig);
        let (total, cols) = (self.rows(), self.cols());
        let q = rig.buffer(DType::F32, &q);
        let q = q.rows(DType::F32, total, cols + BESIDE).col_range(0, cols);
        let mut out = rig.poisoned(total * cols);
        let mut segments = Vec::new();
        let mut row = 0;
        for (&(rows, position), sequence) in self.segments.iter().zip(&sequences) {
            segments.push(Segment { row, rows, position, runs: sequence.runs(), visible: Visible::Causal });
            row += rows;
        }
        for segments in segments.chunks(if apart { 1 } else { segments.len() }) {
            let to = out.rows_mut(DType::F32, total, cols);
            rig.b.attend(&rig.stream, q, &self.shape(), segments, to).unwrap();
        }
        rig.floats(out.rows(DType::F32, total, cols))
    }

    /// Whether CUDA attends a segment of so many rows on tensor cores, which rounds queries and weights.
    fn rounds(&self, rows: usize) -> bool {
        rows > 1 && self.dtype != DType::F32 && [64, 80, 96, 128, 256].contains(&self.head_dim)
    }

    /// Attention in f64 of queries, keys and values rounded to the stored type, and what rounding the softmax's weights
    /// to it can change of each element: the unit roundoff of every |weight · value|.
    fn naive(&self, rig: &Rig<'_>) -> (Vec<f64>, Vec<f64>) {
        let (sequences, q) = self.inputs(rig);
        let (d, group) = (self.head_dim, self.heads / self.kv_heads);
        let round = |x: &f32| f64::from(rounded(self.dtype, *x));
        let roundoff = if self.dtype == DType::F16 { 2f64.powi(-11) } else { 2f64.powi(-8) };
        let (mut want, mut slack) = (Vec::new(), Vec::new());
        let mut queries = q.chunks_exact(self.cols() + BESIDE);
        for (&(rows, position), sequence) in self.segments.iter().zip(&sequences) {
            let kv: Vec<f64> = sequence.kv.iter().map(round).collect();
            let part = |token: usize, part: usize| &kv[(token * 2 * self.kv_heads + part) * d..][..d];
            for (at, query) in (position..position + rows).zip(&mut queries) {
                let first = self.window.map_or(0, |window| (at + 1).saturating_sub(window));
                for (head, q) in query.chunks_exact(d).take(self.heads).enumerate() {
                    let q: Vec<f64> = q.iter().map(round).collect();
                    let dot = |k: &[f64]| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>();
                    let scale = f64::from(self.shape().scale);
                    let scores: Vec<f64> = (first..=at).map(|t| scale * dot(part(t, head / group))).collect();
                    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
                    let (mut y, mut size) = (vec![0.0; d], vec![0.0; d]);
                    for (t, score) in (first..).zip(&scores) {
                        let weight = (score - most).exp() / sum;
                        for (i, v) in part(t, self.kv_heads + head / group).iter().enumerate() {
                            y[i] += weight * v;
                            size[i] += weight * v.abs();
                        }
                    }
                    want.extend(y);
                    slack.extend(size.iter().map(|size| roundoff * size));
                }
            }
        }
        (want, slack)
    }
}

fn cases() -> Vec<Case> {
    let mut random = Random(23);
    let mut cases = Vec::new();
    for dtype in STORED {
        for (heads, kv_heads, head_dim, extent_tokens, window, segments) in [
            (1, 1, 2, 1, None, vec![(1, 0)]),
            (2, 1, 16, 4, None, vec![(1, 9), (1, 0), (3, 0)]),
            (3, 3, 6, 5, Some(3), vec![(1, 17), (20, 0)]),
            (9, 3, 64, 64, None, vec![(1, 300), (1, 255), (70, 130), (1, 256)]),
            (4, 2, 80, 7, Some(20), vec![(1, 60), (50, 40)]),
            (8, 1, 96, 100, None, vec![(40, 0), (1, 520)]),
            (6, 1, 128, 33, Some(300), vec![(1, 700), (34, 300)]),
            (14, 2, 64, 256, None, vec![(1, 5000), (1, 63), (1, 64), (1, 2047), (1, 2048)]),
            (11, 1, 32, 64, None, vec![(1, 200), (65, 7)]),
            (2, 2, 256, 16, None, vec![(1, 31), (33, 31), (1, 400)]),
            (5, 1, 20, 3, Some(1), vec![(1, 8), (9, 4)]),
            (1, 1, 64, 128, Some(40), vec![(260, 100)]),
            (8, 8, 8, 256, None, vec![(1, 20000)]),
            (7, 1, 128, 256, None, vec![(1, 9000), (1, 3), (1, 1024)]),
            (9, 3, 80, 64, Some(900), vec![(1, 1500), (1, 62)]),
            (20, 2, 96, 100, None, vec![(1, 700), (1, 2100)]),
            (5, 1, 256, 256, None, vec![(1, 3000), (1, 100)]),
            (16, 2, 256, 40, None, vec![(1, 900)]),
        ] {
            cases.push(Case { seed: random.next(), dtype, heads, kv_heads, head_dim, extent_tokens, window, segments });
        }
    }
    cases
}

#[test]
fn attention_equals_the_cpu() {
    with_both(|cuda, cpu| {
        for case in cases() {
            let got = case.run(cuda, false);
            let want = case.run(cpu, false);
            let mut row = 0;
            for &(rows, _) in &case.segments {
                // The CPU rounds no queries and no weights; here each is off by up to 2⁻⁸ of it, in f16 2⁻¹¹.
                let tolerance = match case.dtype {
                    DType::BF16 if case.rounds(rows) => 2e-2,
                    DType::F16 if case.rounds(rows) => 2.5e-3,
                    _ => 5e-5,
                };
                let range = row * case.cols()..(row + rows) * case.cols();
                assert_close(&format!("{case:?} from row {row}"), &got[range.clone()], &want[range], tolerance);
                row += rows;
            }
            assert_same(&format!("{case:?} apart"), &case.run(cuda, true), &got);
        }
    });
}

/// Queries beyond the range of f16, and some that are next to nothing beside others: with a scale that makes up for it, nothing
/// of attention changes.
#[test]
fn queries_of_any_size() {
    with_both(|cuda, cpu| {
        let mut random = Random(53);
        for dtype in [DType::F16, DType::BF16] {
            let (heads, kv_heads, head_dim, tokens) = (6, 2, 64, 1000);
            let geometry = KvGeometry { layers: 2, kv_heads, head_dim, extent_tokens: 64, dtype };
            let (seed, size) = (random.next(), 3e6);
            let mut q = random.normals(heads * head_dim);
            q.iter_mut().for_each(|x| *x *= size);
            q.iter_mut().step_by(7).for_each(|x| *x *= 1e-7);
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.2 / size, window: None };
            let run = |rig: &Rig<'_>| {
                let sequence = Sequence::new(rig, &mut Random(seed), geometry, tokens);
                let q = rig.buffer(DType::F32, &q);
                let mut out = rig.poisoned(heads * head_dim);
                let visible = Visible::Causal;
                let segment = Segment { row: 0, rows: 1, position: tokens - 1, runs: sequence.runs(), visible };
                let to = out.rows_mut(DType::F32, 1, heads * head_dim);
                rig.b.attend(&rig.stream, q.rows(DType::F32, 1, heads * head_dim), &shape, &[segment], to).unwrap();
                rig.floats(out.rows(DType::F32, 1, heads * head_dim))
            };
            assert_close(&format!("{dtype}"), &run(cuda), &run(cpu), 2e-5);
        }
    });
}

/// On tensor cores nothing is lost but what rounding queries (which the oracle does too) and weights takes: all head
/// dimensions, groups, windows, tiles that end anywhere, extents that are no multiple of a tile.
#[test]
fn prefill_on_tensor_cores_equals_f64() {
    with_both(|cuda, cpu| {
        let mut random = Random(41);
        for dtype in [DType::F16, DType::BF16] {
            for (heads, kv_heads, head_dim, extent_tokens, window, segments) in [
                (1, 1, 64, 64, None, vec![(128, 0)]),
                (2, 1, 64, 7, Some(40), vec![(70, 130), (3, 64), (129, 0)]),
                (6, 2, 80, 16, None, vec![(131, 17)]),
                (3, 3, 80, 256, Some(64), vec![(64, 64), (2, 0)]),
                (4, 1, 96, 100, None, vec![(65, 63), (2, 700)]),
                (8, 1, 128, 256, Some(200), vec![(300, 150)]),
                (2, 2, 128, 33, None, vec![(257, 65), (64, 64)]),
                (8, 2, 128, 64, Some(1), vec![(130, 5)]),
                (3, 1, 256, 16, None, vec![(70, 31), (2, 500)]),
                (2, 2, 256, 256, Some(50), vec![(129, 64)]),
            ] {
                let case =
                    Case { seed: random.next(), dtype, heads, kv_heads, head_dim, extent_tokens, window, segments };
                assert!(case.segments.iter().all(|s| case.rounds(s.0)));
                let got = case.run(cuda, false);
                let (want, slack) = case.naive(cpu);
                assert_eq!(got.len(), want.len());
                for (i, ((&got, want), slack)) in got.iter().zip(&want).zip(&slack).enumerate() {
                    let error = (f64::from(got) - want).abs();
                    assert!(error <= 1.02 * slack + 2e-5, "{case:?}: element {i} is {got}, not {want} ± {slack}");
                }
            }
        }
    });
}

/// A row's bits do not depend on the chunk that it comes in.
#[test]
fn chunks_of_a_prompt_give_the_same_bits() {
    with_both(|cuda, _| {
        let mut random = Random(43);
        for (dtype, head_dim) in [(DType::BF16, 128), (DType::F16, 64), (DType::BF16, 256)] {
            let (heads, kv_heads, tokens) = (4, 2, 301);
            let geometry = KvGeometry { layers: 2, kv_heads, head_dim, extent_tokens: 48, dtype };
            let sequence = Sequence::new(cuda, &mut random, geometry, tokens);
            let cols = heads * head_dim;
            let q = cuda.buffer(DType::F32, &random.normals(tokens * cols));
            let q = q.rows(DType::F32, tokens, cols);
            let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.2, window: Some(150) };
            let attend = |ends: &[usize]| {
                let mut out = cuda.poisoned(tokens * cols);
                let mut position = 0;
                for &end in ends {
                    let (row, rows, runs) = (position, end - position, sequence.runs());
                    let segment = Segment { row, rows, position, runs, visible: Visible::Causal };
                    let to = out.rows_mut(DType::F32, tokens, cols);
                    cuda.b.attend(&cuda.stream, q, &shape, &[segment], to).unwrap();
                    position = end;
                }
                cuda.floats(out.rows(DType::F32, tokens, cols))
            };
            assert_same(&format!("{dtype} {head_dim}"), &attend(&[37, 39, 170, 301]), &attend(&[301]));
        }
    });
}

/// Rows that are listed give what a sequence of just those rows gives; so do the first rows.
#[test]
fn listed_rows() {
    with_both(|cuda, _| {
        let mut random = Random(31);
        for dtype in STORED {
            for (heads, kv_heads, head_dim, tokens) in [(4, 2, 64, 300), (3, 3, 20, 40), (16, 2, 128, 5000)] {
                let geometry = KvGeometry { layers: 2, kv_heads, head_dim, extent_tokens: 64, dtype };
                let all = Sequence::new(cuda, &mut random, geometry, tokens);
                let count = 1 + random.below(tokens - 1);
                let listed: Vec<Vec<u32>> = (0..kv_heads)
                    .map(|_| {
                        let mut rows: Vec<u32> = (0..tokens as u32).collect();
                        for i in 0..count {
                            let other = i + random.below(tokens - i);
                            rows.swap(i, other);
                        }
                        rows.truncate(count);
                        rows
                    })
                    .collect();
                let mut moves: Vec<Move> = Vec::new();
                for (head, rows) in (0..).zip(&listed) {
                    moves.extend((0..).zip(rows).map(|(to, &from)| Move { head, from, to }));
                }
                let mut gathered = Sequence::new(cuda, &mut random, geometry, count);
                let mut target = KvRunsMut::new(&mut gathered.extents, geometry, LAYER);
                cuda.b.copy_kv_rows(&cuda.stream, &all.runs(), &mut target, &moves).unwrap();

                let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.2, window: None };
                let q = cuda.buffer(DType::F32, &random.normals(heads * head_dim));
                let attend = |runs, position, visible| {
                    let mut out = cuda.poisoned(heads * head_dim);
                    let segment = Segment { row: 0, rows: 1, position, runs, visible };
                    let to = out.rows_mut(DType::F32, 1, heads * head_dim);
                    let q = q.rows(DType::F32, 1, heads * head_dim);
                    cuda.b.attend(&cuda.stream, q, &shape, &[segment], to).unwrap();
                    cuda.floats(out.rows(DType::F32, 1, heads * head_dim))
                };
                let want = attend(gathered.runs(), count - 1, Visible::Causal);
                let case = format!("{dtype} {heads}/{kv_heads} {head_dim} {tokens} {count}");
                assert_same(&case, &attend(all.runs(), tokens - 1, Visible::Listed(&listed)), &want);
                let counts = vec![count as u32; kv_heads];
                assert_same(&case, &attend(gathered.runs(), tokens - 1, Visible::First(&counts)), &want);
            }
        }
    });
}

/// A row of its own for each head, and what lies beside it untouched.
#[test]
fn stored_rows() {
    with_both(|cuda, cpu| {
        for dtype in STORED {
            let geometry = KvGeometry { layers: 2, kv_heads: 3, head_dim: 10, extent_tokens: 7, dtype };
            let run = |rig: &Rig<'_>| {
                let mut random = Random(37);
                let mut sequence = Sequence::new(rig, &mut random, geometry, 20);
                let kv = rig.buffer(DType::F32, &random.normals(60));
                let row = kv.rows(DType::F32, 1, 60);
                let mut runs = KvRunsMut::new(&mut sequence.extents, geometry, LAYER);
                let (k, v) = (row.col_range(0, 30), row.col_range(30, 30));
                rig.b.store_kv_rows(&rig.stream, k, v, &mut runs, &[4, 19, 0]).unwrap();
                sequence.extents.iter().flat_map(|extent| rig.bytes(extent)).collect::<Vec<u8>>()
            };
            // NaN may be written in more ways than one: compared as what it is.
            assert_eq!(canonical(dtype, &run(cuda)), canonical(dtype, &run(cpu)), "{dtype}");
        }
    });
}

fn canonical(dtype: DType, bytes: &[u8]) -> Vec<String> {
    bytes
        .chunks_exact(dtype.bytes())
        .map(|b| match dtype {
            DType::F32 => f32::from_le_bytes(b.try_into().unwrap()).to_string(),
            DType::F16 => half::f16::from_le_bytes(b.try_into().unwrap()).to_string(),
            _ => half::bf16::from_le_bytes(b.try_into().unwrap()).to_string(),
        })
        .collect()
}
