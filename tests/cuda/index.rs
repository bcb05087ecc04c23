//! The speculation index: rows that go in, rehearsals that select; heads through their maps.
//!
//! What a rehearsal must select is known from f64 dot products of the quantized rows. It selects what the CPU backend
//! does, but for rows so near the threshold that sums of another order may rank them otherwise.

use kvahead::backend::{
    Buffer, DType, HeadMaps, IndexBits, IndexGeometry, IndexRuns, IndexRunsMut, Place, Rehearsal, Replay, Selected,
    Selection,
};

use crate::rig::*;

const LAYER: usize = 1;
const BITS: [IndexBits; 3] = [IndexBits::Four, IndexBits::Eight, IndexBits::Full];

/// Ranks may differ by this.
const TOLERANCE: f64 = 2e-4;

/// One layer of one sequence's index, and the partial keys that were put into it.
struct Index {
    geometry: IndexGeometry,
    extents: Vec<Buffer>,
    /// rows × kv_heads × columns.
    keys: Vec<f32>,
}

impl Index {
    /// No rows yet, and room for `capacity`.
    fn empty(rig: &Rig<'_>, geometry: IndexGeometry, capacity: usize) -> Index {
        let noise = vec![f32::NAN; geometry.extent_bytes() / 4];
        let extents = (0..geometry.extents(capacity)).map(|_| rig.buffer(DType::F32, &noise)).collect();
        Index { geometry, extents, keys: Vec::new() }
    }

    /// Appends `keys` in calls that end at `ends` and at the last row; everything else in the extents is NaN.
    fn new(rig: &Rig<'_>, geometry: IndexGeometry, keys: &[f32], ends: &[usize]) -> Index {
        let rows = keys.len() / (geometry.kv_heads * geometry.columns);
        let mut index = Index::empty(rig, geometry, rows + 1);
        let mut from = 0;
        for &end in ends.iter().chain([&rows]) {
            index.append(rig, &keys[from * index.cols()..end * index.cols()]);
            from = end;
        }
        index
    }

    fn cols(&self) -> usize {
        self.geometry.kv_heads * self.geometry.columns
    }

    fn rows(&self) -> usize {
        self.keys.len() / self.cols()
    }

    fn runs(&self) -> IndexRuns<'_> {
        IndexRuns::new(&self.extents, self.geometry, LAYER)
    }

    /// Appends rows, a window of a wider matrix.
    fn append(&mut self, rig: &Rig<'_>, keys: &[f32]) {
        let (cols, row) = (self.cols(), self.rows());
        let wide: Vec<f32> = keys.chunks_exact(cols).flat_map(|row| [&[9.0; 3][..], row].concat()).collect();
        let data = rig.buffer(DType::F32, &wide);
        let from = data.rows(DType::F32, keys.len() / cols, cols + 3).col_range(3, cols);
        let mut runs = IndexRunsMut::new(&mut self.extents, self.geometry, LAYER);
        rig.b.index_append(&rig.stream, from, &mut runs, row).unwrap();
        self.keys.extend(keys);
    }

    /// Overwrites one row of each KV head.
    fn store(&mut self, rig: &Rig<'_>, key: &[f32], rows: &[u32]) {
        let (cols, columns) = (self.cols(), self.geometry.columns);
        let data = rig.buffer(DType::F32, key);
        let mut runs = IndexRunsMut::new(&mut self.extents, self.geometry, LAYER);
        rig.b.index_store_rows(&rig.stream, data.rows(DType::F32, 1, cols), &mut runs, rows).unwrap();
        for (head, &row) in rows.iter().enumerate() {
            let at = head * columns;
            self.keys[row as usize * cols + at..][..columns].copy_from_slice(&key[at..][..columns]);
        }
    }
}

/// What quantization makes of `x`, from its definition: a row with anything not finite is NaN.
fn dequantized(x: &[f32], levels: Option<f32>) -> Vec<f64> {
    let Some(levels) = levels else {
        return x.iter().map(|&x| f64::from(x)).collect();
    };
    if x.iter().any(|x| !x.is_finite()) {
        return vec![f64::NAN; x.len()];
    }
    let most = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let inverse = if most < 1e-30 { 0.0 } else { levels / most };
    x.iter().map(|x| f64::from((x * inverse).round_ties_even()) * f64::from(most / levels)).collect()
}

/// Logits of every row for every query head, −∞ for NaN.
fn logits(index: &Index, query: &[f32], scale: f32) -> Vec<Vec<f64>> {
    let IndexGeometry { kv_heads, columns, bits, .. } = index.geometry;
    let levels = match bits {
        IndexBits::Four => Some(7.0),
        IndexBits::Eight => Some(127.0),
        IndexBits::Full => None,
    };
    let keys: Vec<Vec<f64>> = index.keys.chunks_exact(columns).map(|key| dequantized(key, levels)).collect();
    let heads = query.len() / columns;
    (0..heads)
        .map(|head| {
            let q = dequantized(&query[head * columns..][..columns], levels.map(|_| 127.0));
            let keys = keys.iter().skip(head / (heads / kv_heads)).step_by(kv_heads);
            let logit = |k: &Vec<f64>| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * f64::from(scale);
            keys.map(logit).map(|x| if x.is_nan() { f64::NEG_INFINITY } else { x }).collect()
        })
        .collect()
}

fn largest(x: &[f64]) -> f64 {
    x.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

/// What a rehearsal must find for one KV head: every row's rank, how many rows are selected, and by how much that number
/// may be wrong.
struct Expected {
    ranks: Vec<f64>,
    count: usize,
    slack: usize,
}

fn expected(index: &Index, query: &[f32], rehearsal: &Rehearsal<'_>) -> Vec<Expected> {
    let logits = logits(index, query, rehearsal.scale);
    let (heads, kv_heads) = (logits.len(), index.geometry.kv_heads);
    let group = heads / kv_heads;
    let paper = matches!(rehearsal.selection, Selection::Paper { .. });
    let shifts: Vec<f64> = logits
        .iter()
        .map(|x| match largest(x) {
            f64::NEG_INFINITY => 0.0,
            most if paper => most,
            most => most + x.iter().map(|x| (x - most).exp()).sum::<f64>().ln(),
        })
        .collect();
    let selectable = rehearsal.from..rehearsal.to;
    // How many of the selectable rows lie above a limit, and how many so near it that they may lie on either side.
    let above = |x: &[f64], limit: f64| {
        let x = &x[selectable.clone()];
        let near = x.iter().filter(|&&x| (x - limit).abs() < TOLERANCE).count();
        (x.iter().filter(|&&x| x > limit).count(), near)
    };
    (0..kv_heads)
        .map(|g| {
            let own = g * group..(g + 1) * group;
            let rank = |t: usize| largest(&own.clone().map(|h| logits[h][t] - shifts[h]).collect::<Vec<_>>());
            let ranks: Vec<f64> = (0..index.rows()).map(rank).collect();
            let (count, slack) = match rehearsal.selection {
                Selection::Count { count } => (count, 0),
                Selection::Probability { below, least, most } => {
                    let (count, near) = above(&ranks, -f64::from(below));
                    (count.max(least).min(most), near)
                }
                Selection::Paper { alpha, most } => {
                    let counts = logits.iter().zip(&shifts).map(|(x, m)| above(x, m - f64::from(alpha)));
                    let (count, near) = counts.fold((0, 0), |sum, (count, near)| (sum.0 + count, sum.1 + near));
                    let mean = (count as f64 / heads as f64).round() as usize;
                    (mean.max(1).min(most), if near == 0 { 0 } else { near / heads + 1 })
                }
                Selection::Random { .. } | Selection::Replay { .. } => unreachable!("there is nothing to rank"),
            };
            Expected { ranks, count: count.min(selectable.len()), slack }
        })
        .collect()
}

/// Asserts that `rows` are a best choice.
#[track_caller]
fn assert_best(case: &str, rows: &[u32], expected: &Expected, rehearsal: &Rehearsal<'_>) {
    let Expected { ranks, count, slack } = expected;
    assert!(rows.len().abs_diff(*count) <= *slack, "{case}: {} rows, not {count} ± {slack}", rows.len());
    assert!(rows.windows(2).all(|w| w[0] < w[1]), "{case}: not ascending: {rows:?}");
    assert!(rows.iter().all(|&r| (rehearsal.from..rehearsal.to).contains(&(r as usize))), "{case}: {rows:?}");
    let worst = rows.iter().map(|&r| ranks[r as usize]).fold(f64::INFINITY, f64::min);
    let left = (rehearsal.from..rehearsal.to).filter(|&r| rows.binary_search(&(r as u32)).is_err());
    for row in left {
        assert!(ranks[row] <= worst + TOLERANCE, "{case}: row {row} of {} left out, {worst} taken", ranks[row]);
    }
}

/// Asserts that both select the same rows, but for some at the threshold.
#[track_caller]
fn assert_alike(case: &str, got: &[u32], cpu: &[u32], ranks: &[f64]) {
    let threshold = cpu.iter().map(|&r| ranks[r as usize]).fold(f64::INFINITY, f64::min);
    let only = |a: &[u32], b: &[u32]| a.iter().copied().filter(|r| b.binary_search(r).is_err()).collect::<Vec<_>>();
    for row in [only(got, cpu), only(cpu, got)].concat() {
        let rank = ranks[row as usize];
        let near = rank == threshold || (rank - threshold).abs() < TOLERANCE;
        assert!(near, "{case}: row {row} of rank {rank} in one choice only; the CPU's ends at {threshold}");
    }
}

/// Rehearses with one row of `query` for each index, in one call.
fn rehearse(rig: &Rig<'_>, query: &[f32], rehearsals: &[Rehearsal<'_>]) -> Vec<Vec<Vec<u32>>> {
    let rows = rehearsals.iter().map(|r| r.row).max().unwrap_or(0) + 1;
    let q = rig.buffer(DType::F32, query);
    // What an earlier step left must not matter.
    let mut out = vec![Selected { rows: vec![vec![7; 3]; 9], ..Selected::default() }; rehearsals.len()];
    let mut places: Vec<&mut Selected> = out.iter_mut().collect();
    let q = q.rows(DType::F32, rows, query.len() / rows);
    rig.b.rehearse(&rig.stream, q, rehearsals, &mut places).unwrap();
    out.into_iter().map(|selected| selected.rows).collect()
}

fn selections(rows: usize) -> Vec<Selection<'static>> {
    vec![
        Selection::Count { count: 0 },
        Selection::Count { count: 1 },
        Selection::Count { count: rows / 50 + 2 },
        Selection::Count { count: rows / 3 },
        Selection::Count { count: rows + 5 },
        Selection::Count { count: usize::MAX },
        Selection::Probability { below: 6.0, least: 2, most: rows },
        Selection::Probability { below: 9.0, least: 2, most: rows / 20 + 1 },
        Selection::Probability { below: 0.0, least: 5, most: usize::MAX },
        Selection::Paper { alpha: 2.0, most: rows / 5 + 1 },
        Selection::Paper { alpha: 4.0, most: 3 },
    ]
}

/// Heads, KV heads, columns, tokens of an extent, rows.
const SHAPES: [(usize, usize, usize, usize, usize); 9] = [
    (1, 1, 1, 64, 1),
    (9, 3, 32, 256, 3000),
    (4, 2, 13, 64, 333),
    (8, 8, 64, 1024, 2048),
    (4, 1, 13, 128, 1024),
    (8, 2, 128, 256, 1025),
    (8, 1, 64, 64, 130),
    (11, 1, 32, 64, 1500),
    (2, 2, 8, 1088, 5500),
];

#[test]
fn rehearsals_select_the_best_rows() {
    with_both(|cuda, cpu| {
        let mut random = Random(41);
        for bits in BITS {
            for (heads, kv_heads, columns, extent_tokens, rows) in SHAPES {
                let geometry = IndexGeometry { layers: 2, kv_heads, columns, extent_tokens, bits };
                let keys = random.normals(rows * kv_heads * columns);
                let query = random.normals(heads * columns);
                let ends = [random.below(rows + 1)];
                let index = Index::new(cuda, geometry, &keys, &ends);
                let other = Index::new(cpu, geometry, &keys, &[]);
                let (from, to) = if rows > 100 { (5, rows - 61) } else { (0, rows) };
                for selection in some(selections(rows)) {
                    let scale = 2.0 / (columns as f32).sqrt();
                    let rehearsal = Rehearsal { row: 0, runs: index.runs(), rows, from, to, scale, selection };
                    let got = rehearse(cuda, &query, &[rehearsal]).remove(0);
                    let beside = rehearse(cpu, &query, &[Rehearsal { runs: other.runs(), ..rehearsal }]).remove(0);
                    let expected = expected(&index, &query, &rehearsal);
                    assert_eq!(got.len(), kv_heads);
                    for g in 0..kv_heads {
                        let case = format!("{heads} heads, {geometry:?}, {rows} rows, {selection:?}, head {g}");
                        assert_best(&case, &got[g], &expected[g], &rehearsal);
                        assert_alike(&case, &got[g], &beside[g], &expected[g].ranks);
                    }
                }
            }
        }
    });
}

/// As many rows as fill several tiles of what selects, with lists longer than what is fetched at once.
#[test]
fn long_sequences() {
    with_both(|cuda, _| {
        let mut random = Random(42);
        let rows = 70_000;
        for (bits, heads, kv_heads, columns) in [(IndexBits::Four, 4, 1, 32), (IndexBits::Eight, 2, 2, 13)] {
            let geometry = IndexGeometry { layers: 2, kv_heads, columns, extent_tokens: 4096, bits };
            let index = Index::new(cuda, geometry, &random.normals(rows * kv_heads * columns), &[12_345]);
            let query = random.normals(heads * columns);
            for (from, to, selection) in [
                (0, rows, Selection::Count { count: 1400 }),
                (4097, rows - 64, Selection::Count { count: 50_000 }),
                (3, rows - 1, Selection::Probability { below: 10.0, least: 1, most: rows }),
                (64, 68_001, Selection::Paper { alpha: 3.0, most: rows }),
            ] {
                let rehearsal = Rehearsal { row: 0, runs: index.runs(), rows, from, to, scale: 0.4, selection };
                let got = rehearse(cuda, &query, &[rehearsal]).remove(0);
                for (g, expected) in expected(&index, &query, &rehearsal).iter().enumerate() {
                    let case = format!("{heads} heads, {geometry:?}, {selection:?}, head {g}");
                    assert_best(&case, &got[g], expected, &rehearsal);
                }
            }
        }
    });
}

/// Sequences of different lengths, one of them empty, get in one call what each gets alone.
#[test]
fn several_sequences() {
    with_both(|cuda, _| {
        let mut random = Random(43);
        let (heads, kv_heads, columns) = (9, 3, 32);
        for bits in BITS {
            let geometry = IndexGeometry { layers: 2, kv_heads, columns, extent_tokens: 256, bits };
            let indices: Vec<Index> = [2100, 90, 0, 1500, 6]
                .iter()
                .map(|&n| Index::new(cuda, geometry, &random.normals(n * kv_heads * columns), &[n / 2]))
                .collect();
            let query = random.normals(indices.len() * heads * columns);
            let rules = selections(500);
            for turn in some(0..rules.len()) {
                // Another rule for each sequence.
                let rehearsals: Vec<Rehearsal<'_>> = indices
                    .iter()
                    .enumerate()
                    .map(|(row, index)| {
                        let (rows, from) = (index.rows(), index.rows().min(5));
                        let to = rows - from.min(rows - from);
                        let selection = rules[(turn + row) % rules.len()];
                        Rehearsal { row, runs: index.runs(), rows, from, to, scale: 0.3, selection }
                    })
                    .collect();
                let together = rehearse(cuda, &query, &rehearsals);
                for (i, rehearsal) in rehearsals.iter().enumerate() {
                    let query = &query[i * heads * columns..][..heads * columns];
                    let alone = rehearse(cuda, query, &[Rehearsal { row: 0, ..*rehearsal }]).remove(0);
                    let case = format!("{bits:?} {:?} sequence {i}", rehearsal.selection);
                    assert_eq!(together[i], alone, "{case}");
                    for (g, expected) in expected(&indices[i], query, rehearsal).iter().enumerate() {
                        assert_best(&case, &alone[g], expected, rehearsal);
                    }
                }
            }
        }
    });
}

#[test]
fn ties_go_to_earlier_rows_and_nan_comes_last() {
    with_both(|cuda, _| {
        for bits in BITS {
            let geometry = IndexGeometry { layers: 2, kv_heads: 1, columns: 4, extent_tokens: 64, bits };
            let select = |keys: Vec<f32>, query: f32, selection| {
                let rows = keys.len() / 4;
                let index = Index::new(cuda, geometry, &keys, &[3]);
                let rehearsal =
                    Rehearsal { row: 0, runs: index.runs(), rows, from: 2, to: rows - 1, scale: 1.0, selection };
                rehearse(cuda, &[query; 4], &[rehearsal]).remove(0).remove(0)
            };
            let count = |count| Selection::Count { count };
            // All alike, all zero of either sign, and with a query that is zero; short, and over several tiles.
            for (key, query) in [(0.5, 1.0), (0.0, 1.0), (-0.0, 1.0), (0.5, 0.0), (0.5, -0.0)] {
                for rows in [400, 9000] {
                    let got = select(vec![key; 4 * rows], query, count(rows / 2));
                    assert_eq!(got, (2..rows as u32 / 2 + 2).collect::<Vec<u32>>(), "{bits:?} {key} {query} {rows}");
                }
            }
            // Products that vanish leave zeros of both signs, which are one score.
            let tiny: Vec<f32> = (0..800).map(|i| if i / 4 % 2 == 0 { -9e-31 } else { 9e-31 }).collect();
            let paper = Selection::Paper { alpha: 1.0, most: 30 };
            assert_eq!(select(tiny, 1e-20, paper), (2..32).collect::<Vec<u32>>(), "{bits:?}");
            // Every third row is NaN, and row 50 is the best.
            let mut keys: Vec<f32> = (0..100).flat_map(|t| [if t % 3 == 0 { f32::NAN } else { 1.0 }; 4]).collect();
            keys[200..204].fill(2.0);
            let good: Vec<u32> = (2..99).filter(|t| t % 3 != 0).collect();
            assert_eq!(select(keys.clone(), 1.0, count(1)), [50], "{bits:?}");
            assert_eq!(select(keys.clone(), 1.0, count(2)), [2, 50], "{bits:?}");
            assert_eq!(select(keys.clone(), 1.0, count(good.len())), good, "{bits:?}");
            let mut more = [good.clone(), vec![3, 6]].concat();
            more.sort_unstable();
            assert_eq!(select(keys.clone(), 1.0, count(more.len())), more, "{bits:?}");
            assert_eq!(select(keys.clone(), f32::NAN, count(5)), [2, 3, 4, 5, 6], "{bits:?}");
            // Neither rule counts a NaN.
            let probable = Selection::Probability { below: 1e6, least: 0, most: 99 };
            assert_eq!(select(keys.clone(), 1.0, probable), good, "{bits:?}");
            assert_eq!(select(keys, 1.0, Selection::Paper { alpha: 1e6, most: 99 }), good, "{bits:?}");
        }
    });
}

/// A row of its own for each head, and what lies beside it untouched.
#[test]
fn rows_can_be_overwritten_one_by_one() {
    with_both(|cuda, _| {
        let mut random = Random(47);
        for bits in BITS {
            for columns in [12, 32] {
                let geometry = IndexGeometry { layers: 2, kv_heads: 2, columns, extent_tokens: 64, bits };
                let mut index = Index::new(cuda, geometry, &random.normals(150 * 2 * columns), &[40]);
                for _ in 0..50 {
                    let rows = [random.below(150) as u32, random.below(150) as u32];
                    index.store(cuda, &random.normals(2 * columns), &rows);
                }
                let query = random.normals(4 * columns);
                for selection in some(selections(150)) {
                    let rehearsal =
                        Rehearsal { row: 0, runs: index.runs(), rows: 150, from: 0, to: 150, scale: 0.5, selection };
                    let got = rehearse(cuda, &query, &[rehearsal]).remove(0);
                    for (g, expected) in expected(&index, &query, &rehearsal).iter().enumerate() {
                        assert_best(&format!("{bits:?} {columns} {selection:?}"), &got[g], expected, &rehearsal);
                    }
                }
            }
        }
    });
}

/// Steps that append rows and rehearse are replayed as graphs while the sequence grows, also past a power of two of
/// chunks, where one is captured anew.
#[test]
fn steps_are_replayed() {
    let Some(cuda) = cuda() else { return };
    let rig = Rig::new(&cuda);
    let mut random = Random(51);
    let geometry = IndexGeometry { layers: 2, kv_heads: 2, columns: 32, extent_tokens: 64, bits: IndexBits::Four };
    let mut index = Index::empty(&rig, geometry, 2000);
    index.append(&rig, &random.normals(900 * 64));
    // As many launches as make a graph worth while: a step of 25 tokens, each appended by itself.
    let (mut data, mut query) = (rig.poisoned(25 * 64), rig.poisoned(4 * 32));
    for step in 0..12 {
        let (keys, q) = (random.normals(25 * 64), random.normals(4 * 32));
        for (to, from) in [(&mut data, &keys), (&mut query, &q)] {
            let bytes: Vec<u8> = from.iter().flat_map(|x| x.to_le_bytes()).collect();
            rig.b.upload(&rig.stream, &bytes, to, 0).unwrap();
        }
        for i in 0..25 {
            let row = index.rows() + i;
            let mut runs = IndexRunsMut::new(&mut index.extents, geometry, LAYER);
            let key = data.rows(DType::F32, 25, 64).row_range(i, 1);
            rig.b.index_append(&rig.stream, key, &mut runs, row).unwrap();
        }
        index.keys.extend(keys);
        let (rows, selection) = (index.rows(), Selection::Count { count: 40 });
        let rehearsal = Rehearsal { row: 0, runs: index.runs(), rows, from: 4, to: rows - 9, scale: 0.4, selection };
        let mut selected = Selected::default();
        let partial = query.rows(DType::F32, 1, 4 * 32);
        rig.b.rehearse(&rig.stream, partial, &[rehearsal], &mut [&mut selected]).unwrap();
        for (g, expected) in expected(&index, &q, &rehearsal).iter().enumerate() {
            assert_best(&format!("step {step}"), &selected.rows[g], expected, &rehearsal);
        }
    }
    assert!(cuda.replays() > 6, "{} of 12 steps were replayed", cuda.replays());
}

/// Against f64; a row gives the same bits alone, wherever it lies.
#[test]
fn heads_go_through_their_maps() {
    with_both(|cuda, _| {
        let mut random = Random(53);
        for (rows, heads, kv_heads, inputs, outputs) in [
            (1, 9, 3, 64, 32),
            (70, 9, 3, 64, 32),
            (3, 2, 1, 5, 7),
            (2, 4, 4, 80, 17),
            (1, 1, 1, 1, 1),
            (20, 32, 8, 128, 64),
            (300, 8, 8, 128, 64),
            (150, 11, 1, 256, 77),
            (600, 6, 2, 30, 13),
        ] {
            let cols = heads * inputs;
            let (x, map) = (random.normals(rows * cols), random.normals(kv_heads * outputs * inputs));
            let mut want = Vec::new();
            for x in x.chunks_exact(cols) {
                for h in 0..heads {
                    for o in 0..outputs {
                        let row = &map[(h / (heads / kv_heads) * outputs + o) * inputs..][..inputs];
                        let products = row.iter().zip(&x[h * inputs..]).map(|(&a, &b)| f64::from(a) * f64::from(b));
                        want.push(products.sum::<f64>() as f32);
                    }
                }
            }
            let maps = HeadMaps { kv_heads, inputs, outputs, data: cuda.buffer(DType::F32, &map) };
            // A window of a wider matrix, `beside` columns before it.
            let project = |x: &[f32], beside: usize| {
                let rows = x.len() / cols;
                let wide: Vec<f32> = x.chunks_exact(cols).flat_map(|x| [&vec![9.0; beside][..], x].concat()).collect();
                let data = cuda.buffer(DType::F32, &wide);
                let x = data.rows(DType::F32, rows, cols + beside).col_range(beside, cols);
                let mut out = cuda.poisoned(rows * (heads * outputs + 5));
                let to = out.rows_mut(DType::F32, rows, heads * outputs + 5).col_range(2, heads * outputs);
                cuda.b.project_heads(&cuda.stream, x, &maps, to).unwrap();
                let all = out.rows(DType::F32, rows, heads * outputs + 5);
                assert!(cuda.floats(all.col_range(0, 2)).iter().all(|x| x.is_nan()), "written beside the window");
                cuda.floats(all.col_range(2, heads * outputs))
            };
            let case = format!("{rows} x {heads}/{kv_heads} x {inputs} -> {outputs}");
            let got = project(&x, 4);
            assert_close(&case, &got, &want, 2e-6 * (inputs as f32).sqrt());
            assert_close(&case, &project(&x, 3), &want, 2e-6 * (inputs as f32).sqrt());
            for row in [0, rows - 1] {
                let alone = project(&x[row * cols..][..cols], 4);
                assert_same(&case, &alone, &got[row * heads * outputs..][..heads * outputs]);
            }
        }
    });
}

/// The choice is made of numbers alone: every backend's is the same.
#[test]
fn random_rows_are_those_of_the_cpu() {
    with_both(|cuda, cpu| {
        let mut random = Random(12);
        let geometry = IndexGeometry { layers: 2, kv_heads: 5, columns: 16, extent_tokens: 128, bits: IndexBits::Four };
        let (rows, group) = (4000, 2);
        let keys = random.normals(rows * geometry.kv_heads * geometry.columns);
        let query = random.normals(group * geometry.kv_heads * geometry.columns);
        let [on_cuda, on_cpu] = [cuda, cpu].map(|rig| Index::new(rig, geometry, &keys, &[rows]));
        for (from, to, count, period) in [(4, 3900, 90, 20), (0, 4000, 4000, 1), (7, 50, 11, 3), (0, 3000, 1, 1)] {
            for step in some(3000..3010) {
                let selection = Selection::Random { count, seed: 3, step, period };
                let of = |runs| Rehearsal { row: 0, runs, rows, from, to, scale: 1.0, selection };
                let got = rehearse(cuda, &query, &[of(on_cuda.runs())]);
                let want = rehearse(cpu, &query, &[of(on_cpu.runs())]);
                assert_eq!(got, want, "{count} of {from}..{to}, step {step}");
            }
        }
    });
}

/// A trace's rows are stretched to the same rows by every backend, and to those of a loop that knows nothing of lists.
#[test]
fn replayed_rows_are_those_of_the_cpu() {
    with_both(|cuda, cpu| {
        let mut random = Random(13);
        let geometry = IndexGeometry { layers: 2, kv_heads: 5, columns: 16, extent_tokens: 128, bits: IndexBits::Four };
        let (rows, group, heads) = (9000, 2, 3);
        let keys = random.normals(rows * geometry.kv_heads * geometry.columns);
        let query = random.normals(group * geometry.kv_heads * geometry.columns);
        let [on_cuda, on_cpu] = [cuda, cpu].map(|rig| Index::new(rig, geometry, &keys, &[rows]));
        // Rows of a trace of 3000 tokens whose first list is long, whose second is empty; something else lies before.
        let lists: Vec<Vec<u32>> =
            [2, 4000, 40].map(|one_of| (0..3000).filter(|_| random.below(one_of) == 0).collect()).to_vec();
        let (mut words, mut at) = (vec![7; 5], 5 + 2 * heads);
        for list in &lists {
            words.extend([at as u32, (at + list.len()) as u32]);
            at += list.len();
        }
        words.extend(lists.concat());
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let [on_device, here] = [cuda, cpu].map(|rig| {
            let mut table = rig.b.allocate(bytes.len(), Place::Device, "a test").unwrap();
            rig.b.upload(&rig.stream, &bytes, &mut table, 0).unwrap();
            table
        });
        for (narrow, wide, shift, from, to, most) in [
            (2900, 8900, 6000, 4, 8940, 9000),
            (2900, 2900, 0, 4, 2940, 9000),
            (2900, 1000, 1100u32.wrapping_neg(), 4, 1900, 9000),
            (2900, 8900, 6000, 30, 5000, 77),
            (0, 0, 6000, 4, 9000, 9000),
            (2996, 8996, 0, 0, 9000, 1),
        ] {
            let of = |runs, table| {
                let replay = Replay { table, lists: 5, heads: heads as u32, first: 4, narrow, wide, shift };
                let selection = Selection::Replay { most, replay };
                Rehearsal { row: 0, runs, rows, from, to, scale: 1.0, selection }
            };
            let got = rehearse(cuda, &query, &[of(on_cuda.runs(), &on_device)]);
            let want = rehearse(cpu, &query, &[of(on_cpu.runs(), &here)]);
            assert_eq!(got, want, "{narrow} rows to {wide}, {most} of {from}..{to}");
            for (head, rows) in want[0].iter().enumerate() {
                let list = &lists[head * heads / geometry.kv_heads];
                let stands_for = |row: u32| {
                    list.iter().any(|&r| match r.checked_sub(4) {
                        None => false,
                        Some(k) if k < narrow => {
                            let k = u64::from(k);
                            let (wide, narrow) = (u64::from(wide), u64::from(narrow));
                            (4 + k * wide / narrow..4 + (k + 1) * wide / narrow).contains(&u64::from(row))
                        }
                        Some(_) => row == r.wrapping_add(shift),
                    })
                };
                let naive: Vec<u32> = (from as u32..to as u32).filter(|&row| stands_for(row)).take(most).collect();
                assert_eq!(*rows, naive, "head {head}: {narrow} rows to {wide}, {most} of {from}..{to}");
            }
        }
    });
}
