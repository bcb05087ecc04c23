//! `store_kv` and `attend`: decode and prefill against a plain softmax, across extents, windows and segments.

use super::*;
use crate::backend::{AttentionShape, KvGeometry, KvRuns, KvRunsMut, Segment, Visible};

/// One layer of one sequence: what was stored, rounded, and where.
struct Sequence {
    geometry: KvGeometry,
    extents: Vec<Buffer>,
    /// tokens × kv_heads × head_dim.
    keys: Vec<f32>,
    values: Vec<f32>,
}

const LAYER: usize = 1;

impl Sequence {
    /// `tokens` random tokens, stored in two calls; everything else in the extents is NaN.
    fn new(b: &CpuBackend, random: &mut Random, geometry: KvGeometry, tokens: usize) -> Sequence {
        let elements = geometry.extent_bytes() / geometry.dtype.bytes();
        let mut extents: Vec<Buffer> =
            (0..geometry.extents(tokens + 1)).map(|_| buffer(b, geometry.dtype, &vec![f32::NAN; elements])).collect();
        let cols = geometry.kv_heads * geometry.head_dim;
        let (keys, values) = (random.normals(tokens * cols), random.normals(tokens * cols));
        let (k, v) = (buffer(b, DType::F32, &keys), buffer(b, DType::F32, &values));
        let (k, v) = (k.rows(DType::F32, tokens, cols), v.rows(DType::F32, tokens, cols));
        let first = random.below(tokens + 1);
        for (from, count) in [(0, first), (first, tokens - first)] {
            let mut runs = KvRunsMut::new(&mut extents, geometry, LAYER);
            b.store_kv(&Stream(0), k.row_range(from, count), v.row_range(from, count), &mut runs, from).unwrap();
        }
        let round = |x: Vec<f32>| x.into_iter().map(|x| rounded(geometry.dtype, x)).collect();
        Sequence { geometry, extents, keys: round(keys), values: round(values) }
    }

    fn runs(&self) -> KvRuns<'_> {
        KvRuns::new(&self.extents, self.geometry, LAYER)
    }

    /// Attention of one query head of the token at `position`.
    fn reference(&self, shape: &AttentionShape, q: &[f32], head: usize, position: usize) -> Vec<f64> {
        let first = shape.window.map_or(0, |w| (position + 1).saturating_sub(w));
        self.reference_over(shape, q, head, &(first..=position).collect::<Vec<_>>()).0
    }

    /// Attention of one query head over some rows, and the probability of each of them.
    fn reference_over(&self, shape: &AttentionShape, q: &[f32], head: usize, rows: &[usize]) -> (Vec<f64>, Vec<f64>) {
        let d = shape.head_dim;
        let kv_head = head / (shape.heads / shape.kv_heads);
        let row = |x: &'_ [f32], t: usize| -> Vec<f64> {
            x[(t * shape.kv_heads + kv_head) * d..][..d].iter().map(|&x| f64::from(x)).collect()
        };
        let scores: Vec<f64> = rows
            .iter()
            .map(|&t| {
                let dot: f64 = q.iter().zip(row(&self.keys, t)).map(|(&q, k)| f64::from(q) * k).sum();
                dot * f64::from(shape.scale)
            })
            .collect();
        let most = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
        let total: f64 = weights.iter().sum();
        let probabilities: Vec<f64> = weights.iter().map(|w| w / total).collect();
        let mut out = vec![0.0; d];
        for (&t, p) in rows.iter().zip(&probabilities) {
            for (o, v) in out.iter_mut().zip(row(&self.values, t)) {
                *o += p * v;
            }
        }
        (out, probabilities)
    }
}

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

    fn name(&self, who: &str) -> String {
        format!(
            "{who} seed {} {} heads {}/{} d {} extent {} window {:?} segments {:?}",
            self.seed,
            self.dtype,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.extent_tokens,
            self.window,
            self.segments
        )
    }

    /// Result of `attend`, and the reference when asked for.
    fn run(&self, b: &CpuBackend, with_reference: bool) -> (Vec<f32>, Vec<f64>) {
        let shape = self.shape();
        let mut random = Random(self.seed);
        let geometry = KvGeometry {
            layers: 3,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            extent_tokens: self.extent_tokens,
            dtype: self.dtype,
        };
        let sequences: Vec<Sequence> = self
            .segments
            .iter()
            .map(|&(rows, position)| Sequence::new(b, &mut random, geometry, position + rows))
            .collect();
        let total: usize = self.segments.iter().map(|s| s.0).sum();
        let cols = self.heads * self.head_dim;
        let q = random.normals(total * cols);
        // Queries are a window of a wider matrix, as after a fused projection.
        let wide: Vec<f32> = q.chunks(cols).flat_map(|row| [row, &[f32::NAN; 5]].concat()).collect();
        let q_buffer = buffer(b, DType::F32, &wide);
        let mut out = poisoned(b, total * cols);
        let mut segments = Vec::new();
        let mut row = 0;
        for (&(rows, position), sequence) in self.segments.iter().zip(&sequences) {
            segments.push(Segment { row, rows, position, runs: sequence.runs(), visible: Visible::Causal });
            row += rows;
        }
        let window = q_buffer.rows(DType::F32, total, cols + 5).col_range(0, cols);
        b.attend(&Stream(0), window, &shape, &segments, out.rows_mut(DType::F32, total, cols)).unwrap();
        let got = floats(b, out.rows(DType::F32, total, cols));
        let mut want = Vec::new();
        if with_reference {
            for (segment, sequence) in segments.iter().zip(&sequences) {
                for j in 0..segment.rows {
                    for head in 0..self.heads {
                        let q = &q[(segment.row + j) * cols + head * self.head_dim..][..self.head_dim];
                        want.extend(sequence.reference(&shape, q, head, segment.position + j));
                    }
                }
            }
        }
        (got, want)
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
            (2, 2, 256, 16, None, vec![(1, 31), (33, 31)]),
            (5, 1, 20, 3, Some(1), vec![(1, 8), (9, 4)]),
            (1, 1, 64, 128, Some(40), vec![(260, 100)]),
        ] {
            cases.push(Case { seed: random.next(), dtype, heads, kv_heads, head_dim, extent_tokens, window, segments });
        }
    }
    cases
}

/// What a level's matrix unit may be off by. Integers: a score of normal numbers by 9e-6 · |q| · |k| · 2 / √head_dim, so
/// 1.8e-5 · √head_dim, and weights by as much of themselves, four times that; their products with a few values by 9e-6 · |v|.
fn tolerance(level: Level, dtype: DType, head_dim: usize) -> f64 {
    match level {
        _ if dtype == DType::F32 => 4e-6,
        Level::Vnni => 1e-4 + 7.2e-5 * (head_dim as f64).sqrt(),
        Level::Amx => 5e-5,
        Level::Scalar | Level::Avx2 | Level::Avx512 => 4e-6,
    }
}

#[test]
fn attention_equals_the_reference() {
    for case in cases() {
        for (name, b) in backends() {
            let (got, want) = case.run(&b, true);
            let tolerance = tolerance(b.level(), case.dtype, case.head_dim);
            assert_close(&case.name(&name), &got, &want, tolerance, 1.0);
        }
    }
}

#[test]
fn bits_do_not_depend_on_threads_or_on_other_segments() {
    for level in Level::available() {
        for case in cases() {
            let (want, _) = case.run(&backend(level, 1), false);
            for threads in [2, 3] {
                let (got, _) = case.run(&backend(level, threads), false);
                assert_same(&case.name(&format!("{level:?} x{threads}")), &got, &want);
            }
        }
    }
    // The first segment's inputs follow from the seed before the others': alone, it gives the same bits. (Its queries
    // come after all sequences' keys, so the sequence is built twice and the queries are the same for one segment only
    // when nothing is drawn between; hence a comparison through `attend` on one shared set of inputs.)
    let b = backend(Level::detect(), 2);
    let mut random = Random(29);
    let geometry = KvGeometry { layers: 2, kv_heads: 2, head_dim: 32, extent_tokens: 16, dtype: DType::BF16 };
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 32, scale: 0.2, window: None };
    let (one, other) = (Sequence::new(&b, &mut random, geometry, 400), Sequence::new(&b, &mut random, geometry, 90));
    let q = buffer(&b, DType::F32, &random.normals(60 * 128));
    let run = |segments: &[Segment<'_>]| {
        let mut out = buffer(&b, DType::F32, &[0.0; 60 * 128]);
        b.attend(&Stream(0), q.rows(DType::F32, 60, 128), &shape, segments, out.rows_mut(DType::F32, 60, 128)).unwrap();
        floats(&b, out.rows(DType::F32, 60, 128))
    };
    let a = Segment { row: 0, rows: 1, position: 399, runs: one.runs(), visible: Visible::Causal };
    let c = Segment { row: 1, rows: 1, position: 80, runs: other.runs(), visible: Visible::Causal };
    let e = Segment { row: 2, rows: 58, position: 30, runs: other.runs(), visible: Visible::Causal };
    let together = run(&[a, c, e]);
    for (segment, rows) in [(a, 0..1), (c, 1..2), (e, 2..60)] {
        let range = rows.start * 128..rows.end * 128;
        assert_same("segments", &run(&[segment])[range.clone()], &together[range]);
    }
}

#[test]
fn decode_agrees_with_prefill() {
    for level in Level::available() {
        let b = backend(level, 2);
        let mut random = Random(31);
        for dtype in STORED {
            let geometry = KvGeometry { layers: 2, kv_heads: 3, head_dim: 64, extent_tokens: 48, dtype };
            let shape = AttentionShape { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, window: None };
            let sequence = Sequence::new(&b, &mut random, geometry, 200);
            let q = buffer(&b, DType::F32, &random.normals(200 * 576));
            let mut out = poisoned(&b, 200 * 576);
            let all = Segment { row: 0, rows: 200, position: 0, runs: sequence.runs(), visible: Visible::Causal };
            let q = q.rows(DType::F32, 200, 576);
            b.attend(&Stream(0), q, &shape, &[all], out.rows_mut(DType::F32, 200, 576)).unwrap();
            let together = floats(&b, out.rows(DType::F32, 200, 576));
            let steps: Vec<Segment<'_>> = (0..200)
                .map(|i| Segment { row: i, rows: 1, position: i, runs: sequence.runs(), visible: Visible::Causal })
                .collect();
            b.attend(&Stream(0), q, &shape, &steps, out.rows_mut(DType::F32, 200, 576)).unwrap();
            let apart: Vec<f64> = floats(&b, out.rows(DType::F32, 200, 576)).into_iter().map(f64::from).collect();
            let tolerance = tolerance(level, dtype, 64).max(5e-5);
            assert_close(&format!("{level:?} {dtype}"), &together, &apart, tolerance, 1.0);
        }
    }
}

/// What each KV head of a decode segment attends, by each of the rules.
fn visible_rows(random: &mut Random, kv_heads: usize, tokens: usize) -> (Vec<u32>, Vec<Vec<u32>>) {
    let counts = (0..kv_heads).map(|_| 1 + random.below(tokens) as u32).collect();
    let lists = (0..kv_heads)
        .map(|_| {
            // A random part of the rows in random order.
            let mut rows: Vec<u32> = (0..tokens as u32).collect();
            (1..tokens).rev().for_each(|i| rows.swap(i, random.below(i + 1)));
            rows.truncate(1 + random.below(tokens));
            rows
        })
        .collect();
    (counts, lists)
}

#[test]
fn first_and_listed_rows_equal_the_reference_beside_causal_ones() {
    let mut random = Random(67);
    for dtype in STORED {
        for (heads, kv_heads, head_dim, extent_tokens, tokens) in
            [(9, 3, 64, 64, 700), (2, 1, 16, 4, 9), (3, 3, 6, 5, 33), (5, 1, 80, 100, 520), (6, 2, 128, 33, 300)]
        {
            let geometry = KvGeometry { layers: 3, kv_heads, head_dim, extent_tokens, dtype };
            let scale = 2.0 / (head_dim as f32).sqrt();
            // A window, so that it is seen to hold for causal segments only.
            let shape = AttentionShape { heads, kv_heads, head_dim, scale, window: Some(tokens / 2) };
            let cols = heads * head_dim;
            let seed = random.next();
            let mut alike: Option<(Level, Vec<f32>)> = None;
            for (name, b) in backends() {
                let mut random = Random(seed);
                let sequence = Sequence::new(&b, &mut random, geometry, tokens);
                let (counts, lists) = visible_rows(&mut random, kv_heads, tokens);
                let visible = [Visible::Causal, Visible::First(&counts), Visible::Listed(&lists)];
                let q = random.normals(3 * cols);
                let data = buffer(&b, DType::F32, &q);
                let run = |segments: &[Segment<'_>]| {
                    let mut out = poisoned(&b, 3 * cols);
                    let q = data.rows(DType::F32, 3, cols);
                    b.attend(&Stream(0), q, &shape, segments, out.rows_mut(DType::F32, 3, cols)).unwrap();
                    floats(&b, out.rows(DType::F32, 3, cols))
                };
                let segments: Vec<Segment<'_>> = (0..3)
                    .map(|row| {
                        // Of runs that are not in order of tokens, positions may lie past the capacity.
                        let position = if row == 0 { tokens - 1 } else { 100 * tokens };
                        Segment { row, rows: 1, position, runs: sequence.runs(), visible: visible[row] }
                    })
                    .collect();
                let got = run(&segments);
                let mut want = Vec::new();
                for (row, visible) in visible.iter().enumerate() {
                    for head in 0..heads {
                        let g = head / (heads / kv_heads);
                        let rows: Vec<usize> = match visible {
                            Visible::Causal => (tokens - tokens / 2..tokens).collect(),
                            Visible::First(counts) => (0..counts[g] as usize).collect(),
                            Visible::Listed(lists) => lists[g].iter().map(|&row| row as usize).collect(),
                            Visible::Slots(_) => unreachable!("not among them"),
                        };
                        let q = &q[row * cols + head * head_dim..][..head_dim];
                        want.extend(sequence.reference_over(&shape, q, head, &rows).0);
                    }
                }
                let case = format!("{name} {geometry:?} {heads} heads, seed {seed}");
                assert_close(&case, &got, &want, 4e-6, 1.0);
                for segment in &segments {
                    let range = segment.row * cols..(segment.row + 1) * cols;
                    assert_same(&case, &run(&[*segment])[range.clone()], &got[range]);
                }
                // The first rows in order, as a list and as a number, are the same arithmetic where extents hold whole
                // blocks.
                if extent_tokens % 16 == 0 {
                    let ordered: Vec<Vec<u32>> = counts.iter().map(|&n| (0..n).collect()).collect();
                    let listed = Segment { visible: Visible::Listed(&ordered), ..segments[1] };
                    assert_same(&case, &run(&[listed])[cols..2 * cols], &got[cols..2 * cols]);
                }
                match &alike {
                    Some((level, bits)) if *level == b.level() => assert_same(&case, &got, bits),
                    _ => alike = Some((b.level(), got)),
                }
            }
        }
    }
}

#[test]
fn masses_are_the_sums_of_probabilities() {
    let mut random = Random(71);
    for dtype in STORED {
        for (heads, kv_heads, head_dim, extent_tokens, window, rows, position) in [
            (9, 3, 64, 64, None, 32, 500),
            (2, 1, 16, 4, None, 1, 0),
            (3, 3, 6, 5, Some(3), 20, 0),
            (5, 1, 80, 100, Some(90), 130, 40),
            (1, 1, 20, 7, None, 70, 0),
        ] {
            let geometry = KvGeometry { layers: 3, kv_heads, head_dim, extent_tokens, dtype };
            let scale = 2.0 / (head_dim as f32).sqrt();
            let shape = AttentionShape { heads, kv_heads, head_dim, scale, window };
            let (cols, tokens, group) = (heads * head_dim, position + rows, heads / kv_heads);
            let seed = random.next();
            let mut alike: Option<(Level, Vec<f32>)> = None;
            for (name, b) in backends() {
                let mut random = Random(seed);
                let sequence = Sequence::new(&b, &mut random, geometry, tokens);
                let (counts, lists) = visible_rows(&mut random, kv_heads, tokens);
                let q = random.normals((rows + 1) * cols);
                let before = random.normals(kv_heads * (tokens + 3));
                let data = buffer(&b, DType::F32, &q);
                let mut all = Vec::new();
                for visible in [Visible::Causal, Visible::First(&counts), Visible::Listed(&lists)] {
                    let rows = if matches!(visible, Visible::Causal) { rows } else { 1 };
                    let segment = Segment { row: 1, rows, position, runs: sequence.runs(), visible };
                    let mut want: Vec<f64> = before.iter().map(|&x| f64::from(x)).collect();
                    for j in 0..rows {
                        for head in 0..heads {
                            let g = head / group;
                            let first = window.map_or(0, |w| (position + j + 1).saturating_sub(w));
                            let (seen, column): (Vec<usize>, usize) = match visible {
                                Visible::Causal => ((first..=position + j).collect(), first),
                                Visible::First(counts) => ((0..counts[g] as usize).collect(), 0),
                                Visible::Listed(lists) => (lists[g].iter().map(|&row| row as usize).collect(), 0),
                                Visible::Slots(_) => unreachable!("not among them"),
                            };
                            let q = &q[(1 + j) * cols + head * head_dim..][..head_dim];
                            let (_, p) = sequence.reference_over(&shape, q, head, &seen);
                            for (i, p) in p.into_iter().enumerate() {
                                want[g * (tokens + 3) + column + i] += p;
                            }
                        }
                    }
                    let mut out = buffer(&b, DType::F32, &before);
                    let place = out.rows_mut(DType::F32, kv_heads, tokens + 3);
                    let q = data.rows(DType::F32, data.bytes() / 4 / cols, cols);
                    b.attention_mass(&Stream(0), q, &shape, &segment, place).unwrap();
                    let got = floats(&b, out.rows(DType::F32, kv_heads, tokens + 3));
                    let case = format!("{name} {geometry:?} {heads} heads, {rows} rows at {position}, seed {seed}");
                    assert_close(&case, &got, &want, 1e-5, 1.0);
                    all.extend(got);
                }
                match &alike {
                    Some((level, bits)) if *level == b.level() => assert_same(&name, &all, bits),
                    _ => alike = Some((b.level(), all)),
                }
            }
        }
    }
}
