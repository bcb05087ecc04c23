//! `index_append`, `index_store_rows` and `rehearse` against f64 dot products and a full sort; `project_heads`.

use super::*;
use crate::backend::{HeadMaps, IndexBits, IndexGeometry, IndexRuns, IndexRunsMut, Rehearsal, Selected, Selection};

const LAYER: usize = 1;
const BITS: [IndexBits; 3] = [IndexBits::Four, IndexBits::Eight, IndexBits::Full];

/// An index, and the partial keys that were put into it.
pub(super) struct Index {
    pub geometry: IndexGeometry,
    extents: Vec<Buffer>,
    /// rows × kv_heads × columns.
    keys: Vec<f32>,
}

impl Index {
    /// Appends `keys` in two calls; memory behind them is not zero.
    pub fn new(b: &CpuBackend, geometry: IndexGeometry, keys: Vec<f32>, first: usize) -> Index {
        let cols = geometry.kv_heads * geometry.columns;
        let rows = keys.len() / cols;
        let noise = vec![1e9f32; geometry.extent_bytes() / 4];
        let mut extents: Vec<Buffer> = (0..geometry.extents(rows + 1)).map(|_| buffer(b, DType::F32, &noise)).collect();
        let data = buffer(b, DType::F32, &keys);
        for (from, count) in [(0, first), (first, rows - first)] {
            let mut runs = IndexRunsMut::new(&mut extents, geometry, LAYER);
            b.index_append(&Stream(0), data.rows(DType::F32, rows, cols).row_range(from, count), &mut runs, from)
                .unwrap();
        }
        Index { geometry, extents, keys }
    }

    fn runs(&self) -> IndexRuns<'_> {
        IndexRuns::new(&self.extents, self.geometry, LAYER)
    }

    fn rows(&self) -> usize {
        self.keys.len() / (self.geometry.kv_heads * self.geometry.columns)
    }
}

/// What quantization makes of `x`, from its definition.
fn dequantized(x: &[f32], levels: f64) -> Vec<f64> {
    let most = x.iter().fold(0.0f64, |m, &x| m.max(f64::from(x).abs()));
    let step = if most == 0.0 { 1.0 } else { most / levels };
    x.iter().map(|&x| (f64::from(x) / step).round_ties_even() * step).collect()
}

/// Each row's rank for KV head `g`, or how many rows each head of the paper's rule counts.
fn logits(index: &Index, query: &[f32], heads: usize, scale: f32) -> Vec<Vec<f64>> {
    let IndexGeometry { kv_heads, columns, bits, .. } = index.geometry;
    let round = |x: &[f32], levels: f64| match bits {
        IndexBits::Full => x.iter().map(|&x| f64::from(x)).collect(),
        _ => dequantized(x, levels),
    };
    let levels = if bits == IndexBits::Four { 7.0 } else { 127.0 };
    (0..heads)
        .map(|head| {
            let g = head / (heads / kv_heads);
            let q = round(&query[head * columns..][..columns], 127.0);
            (0..index.rows())
                .map(|t| {
                    let k = round(&index.keys[(t * kv_heads + g) * columns..][..columns], levels);
                    q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * f64::from(scale)
                })
                .collect()
        })
        .collect()
}

fn largest(x: &[f64]) -> f64 {
    x.iter().copied().fold(f64::MIN, f64::max)
}

/// Rank of every row for each KV head, and the number of rows that the rule allows it.
fn reference(index: &Index, query: &[f32], heads: usize, rehearsal: &Rehearsal<'_>) -> (Vec<Vec<f64>>, Vec<usize>) {
    let group = heads / index.geometry.kv_heads;
    let logits = logits(index, query, heads, rehearsal.scale);
    let shift = |x: &Vec<f64>| match rehearsal.selection {
        Selection::Paper { .. } => largest(x),
        _ => largest(x) + x.iter().map(|s| (s - largest(x)).exp()).sum::<f64>().ln(),
    };
    let shifts: Vec<f64> = logits.iter().map(shift).collect();
    let ranks: Vec<Vec<f64>> = (0..index.geometry.kv_heads)
        .map(|g| {
            (0..index.rows())
                .map(|t| largest(&(g * group..(g + 1) * group).map(|h| logits[h][t] - shifts[h]).collect::<Vec<_>>()))
                .collect()
        })
        .collect();
    let selectable = rehearsal.from..rehearsal.to;
    let counts = ranks
        .iter()
        .map(|ranks| match rehearsal.selection {
            Selection::Count { count } => count,
            Selection::Probability { below, least, most } => {
                let above = ranks[selectable.clone()].iter().filter(|&&r| r > -f64::from(below)).count();
                above.max(least).min(most)
            }
            Selection::Paper { alpha, most } => {
                let above = logits
                    .iter()
                    .zip(&shifts)
                    .map(|(x, m)| x[selectable.clone()].iter().filter(|&&s| s > m - f64::from(alpha)).count());
                ((above.sum::<usize>() as f64 / heads as f64).round() as usize).max(1).min(most)
            }
            Selection::Random { .. } | Selection::Replay { .. } => unreachable!("there is nothing to rank"),
        })
        .map(|count| count.min(selectable.len()))
        .collect();
    (ranks, counts)
}

/// Asserts that `rows` are a best choice of `ranks[from..to]`, up to errors of `tolerance` in ranks and threshold.
#[track_caller]
fn assert_best(case: &str, rows: &[u32], ranks: &[f64], rehearsal: &Rehearsal<'_>, want: usize, tolerance: f64) {
    let slack = match rehearsal.selection {
        Selection::Count { .. } => 0,
        Selection::Probability { below, .. } => {
            ranks.iter().filter(|&&r| (r + f64::from(below)).abs() < tolerance).count()
        }
        Selection::Paper { .. } => 1,
        Selection::Random { .. } | Selection::Replay { .. } => unreachable!("there is nothing to rank"),
    };
    assert!(rows.len().abs_diff(want) <= slack, "{case}: {} rows, not {want}", rows.len());
    assert!(rows.windows(2).all(|w| w[0] < w[1]), "{case}: not ascending: {rows:?}");
    assert!(rows.iter().all(|&r| (rehearsal.from..rehearsal.to).contains(&(r as usize))), "{case}: {rows:?}");
    let worst = rows.iter().map(|&r| ranks[r as usize]).fold(f64::MAX, f64::min);
    let left = (rehearsal.from..rehearsal.to).filter(|&r| rows.binary_search(&(r as u32)).is_err());
    for row in left {
        assert!(ranks[row] <= worst + tolerance, "{case}: row {row} of {} left out, {worst} taken", ranks[row]);
    }
}

fn run(b: &CpuBackend, query: &[f32], rehearsals: &[Rehearsal<'_>]) -> Vec<Selected> {
    run_beside(b, query, rehearsals, &vec![Vec::new(); rehearsals.len()])
}

/// As [`run`], with the rows that are present in each rehearsal's heads.
fn run_beside(b: &CpuBackend, query: &[f32], rehearsals: &[Rehearsal<'_>], present: &[Vec<Vec<u32>>]) -> Vec<Selected> {
    correct(b, query, rehearsals, present, &vec![Vec::new(); rehearsals.len()])
}

/// As [`run_beside`], with the most rows that each head is corrected by.
fn correct(
    b: &CpuBackend,
    query: &[f32],
    rehearsals: &[Rehearsal<'_>],
    present: &[Vec<Vec<u32>>],
    most_absent: &[Vec<usize>],
) -> Vec<Selected> {
    let count = rehearsals.iter().map(|r| r.row).max().unwrap_or(0) + 1;
    let cols = query.len() / count;
    let q = buffer(b, DType::F32, query);
    // What an earlier step left must not matter.
    let old = |(present, most_absent): (&Vec<Vec<u32>>, &Vec<usize>)| Selected {
        rows: vec![vec![7; 3]; 9],
        present: present.clone(),
        most_absent: most_absent.clone(),
        tail: vec![f32::NAN; 5],
    };
    let mut out: Vec<Selected> = present.iter().zip(most_absent).map(old).collect();
    let mut places: Vec<&mut Selected> = out.iter_mut().collect();
    b.rehearse(&Stream(0), q.rows(DType::F32, count, cols), rehearsals, &mut places).unwrap();
    out
}

/// Heads, KV heads, columns, tokens of an extent, rows.
const SHAPES: [(usize, usize, usize, usize, usize); 6] = [
    (1, 1, 1, 64, 1),
    (9, 3, 32, 256, 3000),
    (4, 2, 19, 64, 333),
    (5, 1, 16, 128, 1024),
    (6, 1, 64, 64, 130),
    (2, 2, 8, 1088, 2500),
];

fn selections(rows: usize) -> Vec<Selection<'static>> {
    vec![
        Selection::Count { count: 0 },
        Selection::Count { count: 1 },
        Selection::Count { count: rows / 50 + 2 },
        Selection::Count { count: rows / 3 },
        Selection::Count { count: rows + 5 },
        Selection::Probability { below: 6.0, least: 2, most: rows },
        Selection::Probability { below: 9.0, least: 2, most: rows / 20 + 1 },
        Selection::Probability { below: 0.0, least: 5, most: rows },
        Selection::Paper { alpha: 2.0, most: rows / 5 + 1 },
        Selection::Paper { alpha: 4.0, most: 3 },
    ]
}

#[test]
fn rehearsals_select_the_best_rows_and_the_same_everywhere() {
    let mut random = Random(41);
    for bits in BITS {
        for (heads, kv_heads, columns, extent_tokens, rows) in SHAPES {
            let geometry = IndexGeometry { layers: 2, kv_heads, columns, extent_tokens, bits };
            let keys = random.normals(rows * kv_heads * columns);
            let query = random.normals(heads * columns);
            let first = random.below(rows + 1);
            let (from, to) = if rows > 100 { (4, rows - 61) } else { (0, rows) };
            let mut alike: Option<Vec<Selected>> = None;
            for (name, b) in backends() {
                let index = Index::new(&b, geometry, keys.clone(), first);
                let mut all = Vec::new();
                for selection in selections(rows) {
                    let scale = 2.0 / (columns as f32).sqrt();
                    let rehearsal = Rehearsal { row: 0, runs: index.runs(), rows, from, to, scale, selection };
                    let got = run(&b, &query, &[rehearsal]).remove(0);
                    let case = format!("{name} {geometry:?} {rows} rows, {selection:?}");
                    assert_eq!(got.rows.len(), kv_heads, "{case}");
                    let (ranks, counts) = reference(&index, &query, heads, &rehearsal);
                    for g in 0..kv_heads {
                        assert_best(&case, &got.rows[g], &ranks[g], &rehearsal, counts[g], 2e-4);
                    }
                    all.push(got);
                }
                if bits != IndexBits::Full || name.ends_with("x3") {
                    let same = alike.get_or_insert_with(|| all.clone());
                    if bits != IndexBits::Full {
                        let rows = |all: &[Selected]| all.iter().map(|s| s.rows.clone()).collect::<Vec<_>>();
                        assert_eq!(rows(&all), rows(same), "{name} {geometry:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn rehearsals_do_not_depend_on_threads_or_on_others_beside_them() {
    let mut random = Random(43);
    for level in Level::available() {
        let (one, three) = (backend(level, 1), backend(level, 3));
        for bits in BITS {
            let geometry = IndexGeometry { layers: 2, kv_heads: 3, columns: 32, extent_tokens: 256, bits };
            let lengths = [2100, 90, 0, 1500];
            let indices: Vec<Index> =
                lengths.iter().map(|&n| Index::new(&one, geometry, random.normals(n * 96), n / 2)).collect();
            let query = random.normals(4 * 9 * 32);
            for selection in selections(500) {
                let rehearsals: Vec<Rehearsal<'_>> = indices
                    .iter()
                    .enumerate()
                    .map(|(row, index)| {
                        let (rows, from) = (index.rows(), index.rows().min(5));
                        let runs = index.runs();
                        Rehearsal { row, runs, rows, from, to: rows - from.min(rows - from), scale: 0.3, selection }
                    })
                    .collect();
                let present: Vec<Vec<Vec<u32>>> = match selection {
                    Selection::Paper { .. } => vec![Vec::new(); 4],
                    _ => lengths.iter().map(|&rows| some_rows(&mut random, rows, 3)).collect(),
                };
                // The second is corrected.
                let most_absent = |i| if i == 1 && !present[1].is_empty() { vec![2, 0, 99] } else { Vec::new() };
                let most_absent: Vec<Vec<usize>> = (0..4).map(most_absent).collect();
                let together = correct(&one, &query, &rehearsals, &present, &most_absent);
                let parallel = correct(&three, &query, &rehearsals, &present, &most_absent);
                for (i, rehearsal) in rehearsals.iter().enumerate() {
                    let rehearsal = [Rehearsal { row: 0, ..*rehearsal }];
                    let (beside, most_absent) = (&present[i..i + 1], &most_absent[i..i + 1]);
                    let alone = correct(&three, &query[i * 288..][..288], &rehearsal, beside, most_absent);
                    assert_eq!(together[i].tail, parallel[i].tail, "{level:?} {bits:?} {selection:?} {i}");
                    assert_eq!(together[i].tail, alone[0].tail, "{level:?} {bits:?} {selection:?} {i} alone");
                    assert_eq!(together[i].rows, parallel[i].rows, "{level:?} {bits:?} {selection:?} {i}");
                    assert_eq!(together[i].rows, alone[0].rows, "{level:?} {bits:?} {selection:?} {i} alone");
                }
            }
        }
    }
}

/// Some of `rows` rows for each of `heads` heads, in no order.
fn some_rows(random: &mut Random, rows: usize, heads: usize) -> Vec<Vec<u32>> {
    (0..heads)
        .map(|_| {
            let chance = 1 + random.below(9);
            let mut some: Vec<u32> = (0..rows as u32).filter(|_| random.below(chance) == 0).collect();
            (1..some.len()).for_each(|i| some.swap(i, random.below(i + 1)));
            some
        })
        .collect()
}

#[test]
fn the_tail_is_what_is_neither_present_nor_selected() {
    let mut random = Random(47);
    for bits in BITS {
        for (heads, kv_heads, columns, extent_tokens, rows) in SHAPES {
            let geometry = IndexGeometry { layers: 2, kv_heads, columns, extent_tokens, bits };
            let keys = random.normals(rows * kv_heads * columns);
            let query = random.normals(heads * columns);
            let present = some_rows(&mut random, rows, kv_heads);
            let (from, to) = if rows > 100 { (4, rows - 61) } else { (0, rows) };
            for (name, b) in backends() {
                let index = Index::new(&b, geometry, keys.clone(), rows / 2);
                for selection in selections(rows) {
                    if matches!(selection, Selection::Paper { .. }) {
                        continue;
                    }
                    let scale = 2.0 / (columns as f32).sqrt();
                    let rehearsal = Rehearsal { row: 0, runs: index.runs(), rows, from, to, scale, selection };
                    let got = run_beside(&b, &query, &[rehearsal], std::slice::from_ref(&present)).remove(0);
                    let plain = run(&b, &query, &[rehearsal]).remove(0);
                    let case = format!("{name} {geometry:?} {rows} rows, {selection:?}");
                    assert_eq!(got.rows, plain.rows, "{case}: the tail changes the selection");
                    assert!(plain.tail.is_empty(), "{case}: a tail that nobody has asked for");
                    assert_tail(&case, &got, &present, &logits(&index, &query, heads, scale));
                }
            }
        }
    }
}

/// Asserts that the tail is the probability of what is neither present nor selected, by the heads' `logits`.
#[track_caller]
fn assert_tail(case: &str, got: &Selected, present: &[Vec<u32>], logits: &[Vec<f64>]) {
    assert_eq!(got.tail.len(), logits.len(), "{case}");
    for (head, logits) in logits.iter().enumerate() {
        let g = head / (got.tail.len() / present.len());
        let most = largest(logits);
        let weights: Vec<f64> = logits.iter().map(|logit| (logit - most).exp()).collect();
        let mut left = weights.clone();
        present[g].iter().chain(&got.rows[g]).for_each(|&row| left[row as usize] = 0.0);
        let tail = left.iter().sum::<f64>() / weights.iter().sum::<f64>();
        let error = (f64::from(got.tail[head]) - tail).abs();
        assert!(error < 1e-4, "{case}, head {head}: {} for {tail}", got.tail[head]);
    }
}

/// Of what the rule picks, what is present is left out, and of the others each head keeps its best.
#[test]
fn a_correction_is_the_best_of_what_is_selected_and_absent() {
    let mut random = Random(53);
    for bits in BITS {
        for (heads, kv_heads, columns, extent_tokens, rows) in SHAPES {
            let geometry = IndexGeometry { layers: 2, kv_heads, columns, extent_tokens, bits };
            let keys = random.normals(rows * kv_heads * columns);
            let query = random.normals(heads * columns);
            let (from, to) = if rows > 100 { (4, rows - 61) } else { (0, rows) };
            let present = [some_rows(&mut random, rows, kv_heads)];
            let most = [(0..kv_heads).map(|g| random.below([3, rows / 20 + 2, rows + 2][g])).collect()];
            let rules = [selections(rows), vec![Selection::Random { count: rows / 3, seed: 1, step: 5, period: 2 }]];
            for (name, b) in backends() {
                let index = Index::new(&b, geometry, keys.clone(), rows / 2);
                for selection in rules.concat() {
                    let scale = 2.0 / (columns as f32).sqrt();
                    let rehearsal = Rehearsal { row: 0, runs: index.runs(), rows, from, to, scale, selection };
                    let plain = run(&b, &query, &[rehearsal]).remove(0);
                    let got = correct(&b, &query, &[rehearsal], &present, &most).remove(0);
                    let case = format!("{name} {geometry:?} {rows} rows, {selection:?}");
                    // (What is random ranks by its scores here as well.)
                    let by_scores = match selection {
                        Selection::Random { .. } => Selection::Count { count: 0 },
                        other => other,
                    };
                    let rehearsal = Rehearsal { selection: by_scores, ..rehearsal };
                    let (ranks, _) = reference(&index, &query, heads, &rehearsal);
                    for g in 0..kv_heads {
                        let mut absent = plain.rows[g].clone();
                        absent.retain(|row| !present[0][g].contains(row));
                        let rows = &got.rows[g];
                        assert_eq!(rows.len(), most[0][g].min(absent.len()), "{case}");
                        assert!(rows.windows(2).all(|w| w[0] < w[1]), "{case}: not ascending: {rows:?}");
                        let (kept, left): (Vec<u32>, Vec<u32>) = absent.iter().partition(|row| rows.contains(row));
                        assert_eq!(&kept, rows, "{case}: rows that are present, or that the rule does not pick");
                        let worst = kept.iter().map(|&row| ranks[g][row as usize]).fold(f64::MAX, f64::min);
                        for row in left {
                            assert!(ranks[g][row as usize] <= worst + 2e-4, "{case}: row {row} left out");
                        }
                    }
                    match selection {
                        Selection::Paper { .. } => assert!(got.tail.is_empty(), "{case}"),
                        _ => assert_tail(&case, &got, &present[0], &logits(&index, &query, heads, scale)),
                    }
                }
            }
        }
    }
}

/// Where what was selected is all there, the same queries find nothing more, at any level and however many rows tie.
#[test]
fn there_is_nothing_to_correct_for_the_queries_that_have_selected() {
    let mut random = Random(59);
    let geometry = IndexGeometry { layers: 2, kv_heads: 2, columns: 8, extent_tokens: 64, bits: IndexBits::Four };
    for (_, b) in backends() {
        let keys = (0..700 * 16).map(|_| random.below(3) as f32 - 1.0).collect();
        let index = Index::new(&b, geometry, keys, 100);
        let query = random.normals(4 * 8);
        for selection in selections(700) {
            let rehearsal =
                Rehearsal { row: 0, runs: index.runs(), rows: 700, from: 4, to: 640, scale: 0.3, selection };
            let selected = run(&b, &query, &[rehearsal]).remove(0);
            let got = correct(&b, &query, &[rehearsal], &[selected.rows], &[vec![700; 2]]).remove(0);
            assert_eq!(got.rows, vec![Vec::<u32>::new(); 2], "{selection:?}");
        }
    }
}

/// Where scores are NaN nothing is known of a tail, and it has no part.
#[test]
fn there_is_no_tail_without_scores() {
    let (_, b) = backends().next().unwrap();
    let geometry = IndexGeometry { layers: 2, kv_heads: 1, columns: 8, extent_tokens: 64, bits: IndexBits::Full };
    let index = Index::new(&b, geometry, Random(5).normals(40 * 8), 20);
    let selection = Selection::Count { count: 3 };
    let rehearsal = Rehearsal { row: 0, runs: index.runs(), rows: 40, from: 0, to: 40, scale: 1.0, selection };
    let got = run_beside(&b, &[f32::NAN; 8], &[rehearsal], &[vec![vec![9, 30]]]).remove(0);
    assert_eq!(got.tail, [0.0]);
}

#[test]
fn rows_can_be_overwritten_one_by_one() {
    let mut random = Random(47);
    for bits in BITS {
        let geometry = IndexGeometry { layers: 2, kv_heads: 2, columns: 12, extent_tokens: 64, bits };
        let b = backend(Level::detect(), 2);
        let mut index = Index::new(&b, geometry, random.normals(150 * 24), 40);
        for _ in 0..50 {
            let rows = [random.below(150) as u32, random.below(150) as u32];
            let key = random.normals(24);
            let data = buffer(&b, DType::F32, &key);
            let mut runs = IndexRunsMut::new(&mut index.extents, geometry, LAYER);
            b.index_store_rows(&Stream(0), data.rows(DType::F32, 1, 24), &mut runs, &rows).unwrap();
            for (head, &row) in rows.iter().enumerate() {
                index.keys[(row as usize * 2 + head) * 12..][..12].copy_from_slice(&key[head * 12..][..12]);
            }
        }
        let query = random.normals(4 * 12);
        let selection = Selection::Count { count: 20 };
        let rehearsal = Rehearsal { row: 0, runs: index.runs(), rows: 150, from: 0, to: 150, scale: 0.5, selection };
        let got = run(&b, &query, &[rehearsal]);
        let (ranks, counts) = reference(&index, &query, 4, &rehearsal);
        for g in 0..2 {
            assert_best(&format!("{bits:?}"), &got[0].rows[g], &ranks[g], &rehearsal, counts[g], 1e-4);
        }
    }
}

#[test]
fn ties_go_to_earlier_rows_and_nan_comes_last() {
    for (name, b) in backends() {
        for bits in BITS {
            let geometry = IndexGeometry { layers: 2, kv_heads: 1, columns: 4, extent_tokens: 64, bits };
            let select = |keys: Vec<f32>, query: f32, count: usize| {
                let rows = keys.len() / 4;
                let index = Index::new(&b, geometry, keys, 3);
                let selection = Selection::Count { count };
                let rehearsal =
                    Rehearsal { row: 0, runs: index.runs(), rows, from: 2, to: rows - 1, scale: 1.0, selection };
                run(&b, &[query; 4], &[rehearsal]).remove(0).rows.remove(0)
            };
            // All alike, all zero, and with a query that is zero.
            for (key, query) in [(0.5, 1.0), (0.0, 1.0), (0.5, 0.0)] {
                let got = select(vec![key; 400], query, 30);
                assert_eq!(got, (2..32).collect::<Vec<u32>>(), "{name} {bits:?} {key} {query}");
            }
            // Every third row is NaN, and row 50 is the best.
            let mut keys: Vec<f32> = (0..100).flat_map(|t| [if t % 3 == 0 { f32::NAN } else { 1.0 }; 4]).collect();
            keys[200..204].fill(2.0);
            let good: Vec<u32> = (2..99).filter(|t| t % 3 != 0).collect();
            assert_eq!(select(keys.clone(), 1.0, 1), [50], "{name} {bits:?}");
            assert_eq!(select(keys.clone(), 1.0, 2), [2, 50], "{name} {bits:?}");
            assert_eq!(select(keys.clone(), 1.0, good.len()), good, "{name} {bits:?}");
            let mut more = [good, vec![3, 6]].concat();
            more.sort_unstable();
            assert_eq!(select(keys.clone(), 1.0, more.len()), more, "{name} {bits:?}");
            assert_eq!(select(keys, f32::NAN, 5), [2, 3, 4, 5, 6], "{name} {bits:?}");
        }
    }
}

#[test]
fn heads_go_through_their_maps() {
    let mut random = Random(53);
    for (rows, heads, kv_heads, inputs, outputs) in
        [(1, 9, 3, 64, 32), (70, 9, 3, 64, 32), (3, 2, 1, 5, 7), (2, 4, 4, 80, 17), (1, 1, 1, 1, 1)]
    {
        let (x, map) = (random.normals(rows * heads * inputs), random.normals(kv_heads * outputs * inputs));
        let mut want = Vec::new();
        for x in x.chunks_exact(heads * inputs) {
            for h in 0..heads {
                for o in 0..outputs {
                    let row = &map[(h / (heads / kv_heads) * outputs + o) * inputs..][..inputs];
                    let x = &x[h * inputs..][..inputs];
                    want.push(row.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum());
                }
            }
        }
        for (name, b) in backends() {
            let maps = HeadMaps { kv_heads, inputs, outputs, data: buffer(&b, DType::F32, &map) };
            let project = |x: &[f32]| {
                let rows = x.len() / (heads * inputs);
                let data = buffer(&b, DType::F32, x);
                let mut out = poisoned(&b, rows * heads * outputs);
                let x = data.rows(DType::F32, rows, heads * inputs);
                b.project_heads(&Stream(0), x, &maps, out.rows_mut(DType::F32, rows, heads * outputs)).unwrap();
                floats(&b, out.rows(DType::F32, rows, heads * outputs))
            };
            let case = format!("{name} {rows} x {heads}/{kv_heads} x {inputs} -> {outputs}");
            let got = project(&x);
            assert_close(&case, &got, &want, 2e-6 * (inputs as f64).sqrt(), 1.0);
            let last = &x[(rows - 1) * heads * inputs..];
            assert_same(&case, &project(last), &got[(rows - 1) * heads * outputs..]);
        }
    }
}

#[test]
fn random_rows_are_spread_and_some_of_them_stay() {
    let cpu = CpuBackend::new(CpuOptions { threads: 2, level: None }).unwrap();
    let mut random = Random(41);
    let (kv_heads, columns, rows) = (3, 16, 5000);
    let geometry = IndexGeometry { layers: 2, kv_heads, columns, extent_tokens: 128, bits: IndexBits::Four };
    let index = Index::new(&cpu, geometry, random.normals(rows * kv_heads * columns), 100);
    let queries = buffer(&cpu, DType::F32, &random.normals(kv_heads * 2 * columns));
    let select = |from: usize, to: usize, count: usize, step: u32, period: u32| -> Vec<Vec<u32>> {
        let selection = Selection::Random { count, seed: 9, step, period };
        let rehearsal = Rehearsal { row: 0, runs: index.runs(), rows, from, to, scale: 1.0, selection };
        let mut selected = Selected::default();
        let queries = queries.rows(DType::F32, 1, kv_heads * 2 * columns);
        cpu.rehearse(&Stream(0), queries, &[rehearsal], &mut [&mut selected]).unwrap();
        selected.rows
    };
    for (from, to, count) in [(4, 4900, 100), (0, 5000, 5000), (100, 130, 7), (10, 3000, 1)] {
        let now = select(from, to, count, 50, 4);
        for rows in &now {
            assert_eq!(rows.len(), count);
            assert!(rows.windows(2).all(|w| w[0] < w[1]) && rows[0] >= from as u32 && rows[count - 1] < to as u32);
        }
        assert_eq!(now, select(from, to, count, 50, 4));
    }
    // Of a hundred about a quarter are renewed each step, all of them with a period of 1, and heads differ.
    let now = select(4, 4900, 100, 50, 4);
    let kept = |other: &[Vec<u32>]| -> Vec<usize> {
        now.iter().zip(other).map(|(a, b)| a.iter().filter(|row| b.contains(row)).count()).collect()
    };
    assert!(kept(&select(4, 4901, 100, 51, 4)).iter().all(|kept| (50..95).contains(kept)));
    assert!(kept(&select(4, 4900, 100, 51, 1)).iter().all(|&kept| kept < 20));
    assert_ne!(now[0], now[1]);
}
