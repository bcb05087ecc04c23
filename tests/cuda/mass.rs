//! The mass of attention, against sums of f64.

use half::{bf16, f16};
use kvahead::backend::{AttentionShape, Buffer, DType, KvGeometry, KvRuns, KvRunsMut, Place, Segment, Visible};

use crate::rig::*;

const LAYER: usize = 1;

#[derive(Debug)]
struct Case {
    seed: u64,
    dtype: DType,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    extent_tokens: usize,
    window: Option<usize>,
    rows: usize,
    position: usize,
    place: Place,
}

/// What a value is when it has been stored.
fn rounded(dtype: DType, x: f32) -> f64 {
    match dtype {
        DType::F32 => f64::from(x),
        DType::F16 => f16::from_f32(x).to_f64(),
        _ => bf16::from_f32(x).to_f64(),
    }
}

struct Inputs {
    /// Of every token and KV head.
    keys: Vec<f32>,
    /// A row more than the segment has, in front.
    q: Vec<f32>,
    before: Vec<f32>,
    counts: Vec<u32>,
    lists: Vec<Vec<u32>>,
}

impl Case {
    fn shape(&self) -> AttentionShape {
        let scale = 2.0 / (self.head_dim as f32).sqrt();
        let (heads, kv_heads, head_dim) = (self.heads, self.kv_heads, self.head_dim);
        AttentionShape { heads, kv_heads, head_dim, scale, window: self.window }
    }

    fn tokens(&self) -> usize {
        self.position + self.rows
    }

    fn inputs(&self) -> Inputs {
        let mut random = Random(self.seed);
        let tokens = self.tokens();
        let counts: Vec<u32> = (0..self.kv_heads).map(|_| 1 + random.below(tokens) as u32).collect();
        let lists = counts.iter().map(|&n| (0..n).map(|_| random.below(tokens) as u32).collect()).collect();
        Inputs {
            keys: random.normals(tokens * self.kv_heads * self.head_dim),
            q: random.normals((self.rows + 1) * (self.heads * self.head_dim + 5)),
            before: random.normals(self.kv_heads * (tokens + 3)),
            counts,
            lists,
        }
    }

    fn run(&self, rig: &Rig<'_>, inputs: &Inputs, visible: Visible<'_>) -> Vec<f32> {
        let (tokens, d) = (self.tokens(), self.head_dim);
        let (extent_tokens, dtype) = (self.extent_tokens, self.dtype);
        let geometry = KvGeometry { layers: 3, kv_heads: self.kv_heads, head_dim: d, extent_tokens, dtype };
        // Whatever is not a key is NaN.
        let poison: Vec<u8> = match dtype {
            DType::F32 => f32::NAN.to_le_bytes().to_vec(),
            DType::F16 => f16::NAN.to_le_bytes().to_vec(),
            _ => bf16::NAN.to_le_bytes().to_vec(),
        };
        let poison = poison.repeat(geometry.extent_bytes() / dtype.bytes());
        let mut extents: Vec<Buffer> = (0..geometry.extents(tokens))
            .map(|_| {
                let mut extent = rig.b.allocate(poison.len(), self.place, "a test").unwrap();
                rig.b.upload(&rig.stream, &poison, &mut extent, 0).unwrap();
                extent
            })
            .collect();
        let cols = self.kv_heads * d;
        let (keys, values) = (rig.buffer(DType::F32, &inputs.keys), rig.poisoned(tokens * cols));
        let mut runs = KvRunsMut::new(&mut extents, geometry, LAYER);
        let (k, v) = (keys.rows(DType::F32, tokens, cols), values.rows(DType::F32, tokens, cols));
        rig.b.store_kv(&rig.stream, k, v, &mut runs, 0).unwrap();

        let cols = self.heads * d;
        let q = rig.buffer(DType::F32, &inputs.q);
        let q = q.rows(DType::F32, self.rows + 1, cols + 5).col_range(0, cols);
        let mut out = rig.buffer(DType::F32, &inputs.before);
        let rows = if matches!(visible, Visible::Causal) { self.rows } else { 1 };
        let runs = KvRuns::new(&extents, geometry, LAYER);
        let segment = Segment { row: 1, rows, position: self.position, runs, visible };
        let to = out.rows_mut(DType::F32, self.kv_heads, tokens + 3);
        rig.b.attention_mass(&rig.stream, q, &self.shape(), &segment, to).unwrap();
        rig.floats(out.rows(DType::F32, self.kv_heads, tokens + 3))
    }

    fn reference(&self, inputs: &Inputs, visible: Visible<'_>) -> Vec<f32> {
        let (tokens, d, group) = (self.tokens(), self.head_dim, self.heads / self.kv_heads);
        let mut want: Vec<f64> = inputs.before.iter().map(|&x| f64::from(x)).collect();
        let keys: Vec<f64> = inputs.keys.iter().map(|&x| rounded(self.dtype, x)).collect();
        let rows = if matches!(visible, Visible::Causal) { self.rows } else { 1 };
        for j in 0..rows {
            for head in 0..self.heads {
                let g = head / group;
                let at = self.position + j;
                let first = self.window.map_or(0, |window| (at + 1).saturating_sub(window));
                let (seen, column): (Vec<usize>, usize) = match visible {
                    Visible::Causal => ((first..=at).collect(), first),
                    Visible::First(counts) => ((0..counts[g] as usize).collect(), 0),
                    Visible::Listed(lists) => (lists[g].iter().map(|&row| row as usize).collect(), 0),
                    Visible::Slots(_) => unreachable!("not among them"),
                };
                let q = &inputs.q[(1 + j) * (self.heads * d + 5) + head * d..][..d];
                let scores: Vec<f64> = seen
                    .iter()
                    .map(|&t| {
                        let key = &keys[(t * self.kv_heads + g) * d..][..d];
                        let dot: f64 = q.iter().zip(key).map(|(&q, k)| f64::from(q) * k).sum();
                        dot * f64::from(self.shape().scale)
                    })
                    .collect();
                let most = scores.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - most).exp()).sum();
                for (i, s) in scores.iter().enumerate() {
                    want[g * (tokens + 3) + column + i] += (s - most).exp() / sum;
                }
            }
        }
        want.into_iter().map(|x| x as f32).collect()
    }
}

fn cases() -> Vec<Case> {
    let mut random = Random(71);
    let mut cases = Vec::new();
    for dtype in STORED {
        for (heads, kv_heads, head_dim, extent_tokens, window, rows, position, place) in [
            (2, 1, 16, 4, None, 1, 0, Place::Device),
            (9, 3, 64, 64, None, 32, 500, Place::Device),
            (3, 3, 6, 5, Some(3), 20, 0, Place::Pinned),
            (5, 1, 80, 100, Some(90), 130, 40, Place::Device),
            (1, 1, 20, 7, None, 70, 0, Place::Device),
            (4, 2, 61, 33, Some(1), 40, 60, Place::Device),
            (6, 1, 96, 16, None, 300, 20, Place::Pinned),
            (14, 2, 128, 256, None, 3, 1500, Place::Device),
            (8, 1, 256, 100, Some(700), 5, 1020, Place::Device),
            (7, 1, 2, 64, None, 1, 3000, Place::Device),
        ] {
            let seed = random.next();
            cases.push(Case { seed, dtype, heads, kv_heads, head_dim, extent_tokens, window, rows, position, place });
        }
    }
    cases
}

#[test]
fn masses_are_the_sums_of_probabilities() {
    with_both(|cuda, cpu| {
        for case in some(cases()) {
            let inputs = case.inputs();
            for visible in [Visible::Causal, Visible::First(&inputs.counts), Visible::Listed(&inputs.lists)] {
                let got = case.run(cuda, &inputs, visible);
                assert_close(&format!("{case:?}, {visible:?}"), &got, &case.reference(&inputs, visible), 2e-5);
                assert_close(&format!("{case:?}, the CPU"), &got, &case.run(cpu, &inputs, visible), 2e-5);
                assert_same(&format!("{case:?} again"), &case.run(cuda, &inputs, visible), &got);
            }
        }
    });
}

/// A long context, of which every token is alike: each gets what the others get, and together all there is.
#[test]
fn long_contexts() {
    with_both(|cuda, _| {
        let (tokens, d, kv_heads, group) = (100_000, 8, 2, 2);
        let geometry = KvGeometry { layers: 1, kv_heads, head_dim: d, extent_tokens: 256, dtype: DType::BF16 };
        let mut extents: Vec<Buffer> = (0..geometry.extents(tokens))
            .map(|_| cuda.buffer(DType::BF16, &vec![1.0; geometry.extent_bytes() / 2]))
            .collect();
        let runs = KvRunsMut::new(&mut extents, geometry, 0);
        assert!(runs.capacity() >= tokens);
        let rows = 3;
        let q = cuda.buffer(DType::F32, &vec![0.5; rows * kv_heads * group * d]);
        let mut out = cuda.buffer(DType::F32, &vec![0.0; kv_heads * tokens]);
        let shape = AttentionShape { heads: kv_heads * group, kv_heads, head_dim: d, scale: 1.0, window: None };
        let runs = KvRuns::new(&extents, geometry, 0);
        let segment = Segment { row: 0, rows, position: tokens - rows, runs, visible: Visible::Causal };
        let to = out.rows_mut(DType::F32, kv_heads, tokens);
        let queries = q.rows(DType::F32, rows, kv_heads * group * d);
        cuda.b.attention_mass(&cuda.stream, queries, &shape, &segment, to).unwrap();
        let got = cuda.floats(out.rows(DType::F32, kv_heads, tokens));
        for head in got.chunks(tokens) {
            let sum: f64 = head.iter().map(|&x| f64::from(x)).sum();
            assert!((sum - (rows * group) as f64).abs() < 1e-3, "{sum}");
            for (t, &x) in head.iter().enumerate() {
                let seeing = rows.min(tokens - t) * group;
                let want = seeing as f64 / tokens as f64;
                assert!((f64::from(x) / want - 1.0).abs() < 1e-3, "token {t}: {x}, not {want}");
            }
        }
    });
}
