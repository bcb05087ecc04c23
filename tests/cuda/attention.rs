//! `store_kv`, the gather, and attention: decode, prefill, listed rows.

use kvahead::backend::{AttentionShape, Buffer, DType, KvGeometry, KvRuns, KvRunsMut, Move, Segment, Visible};

use crate::rig::*;

const LAYER: usize = 1;

/// One layer of one sequence.
struct Sequence {
    geometry: KvGeometry,
    extents: Vec<Buffer>,
}

impl Sequence {
    /// `tokens` random tokens, stored in two calls; everything else in the extents is NaN.
    fn new(rig: &Rig<'_>, random: &mut Random, geometry: KvGeometry, tokens: usize) -> Sequence {
        let elements = geometry.extent_bytes() / geometry.dtype.bytes();
        let mut extents: Vec<Buffer> =
            (0..geometry.extents(tokens + 1)).map(|_| rig.buffer(geometry.dtype, &vec![f32::NAN; elements])).collect();
        let cols = geometry.kv_heads * geometry.head_dim;
        let kv = rig.buffer(DType::F32, &random.normals(tokens * 2 * cols));
        let rows = kv.rows(DType::F32, tokens, 2 * cols);
        let (k, v) = (rows.col_range(0, cols), rows.col_range(cols, cols));
        let first = random.below(tokens + 1);
        for (from, count) in [(0, first), (first, tokens - first)] {
            let mut runs = KvRunsMut::new(&mut extents, geometry, LAYER);
            let (k, v) = (k.row_range(from, count), v.row_range(from, count));
            rig.b.store_kv(&rig.stream, k, v, &mut runs, from).unwrap();
        }
        Sequence { geometry, extents }
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

    /// All segments in one call, or each by itself.
    fn run(&self, rig: &Rig<'_>, apart: bool) -> Vec<f32> {
        let mut random = Random(self.seed);
        let geometry = KvGeometry {
            layers: 3,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            extent_tokens: self.extent_tokens,
            dtype: self.dtype,
        };
        let sequences: Vec<Sequence> =
            self.segments.iter().map(|&(rows, at)| Sequence::new(rig, &mut random, geometry, at + rows)).collect();
        let total: usize = self.segments.iter().map(|s| s.0).sum();
        let cols = self.heads * self.head_dim;
        // Queries are a window of a wider matrix, as after a fused projection.
        let q = rig.buffer(DType::F32, &random.normals(total * (cols + 5)));
        let q = q.rows(DType::F32, total, cols + 5).col_range(0, cols);
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
            assert_close(&format!("{case:?}"), &got, &case.run(cpu, false), 5e-5);
            assert_same(&format!("{case:?} apart"), &case.run(cuda, true), &got);
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
