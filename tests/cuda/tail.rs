//! The tail of attention: weights against a naive sum in f64, means and what they are added to against the CPU, bit for bit.

use kvahead::backend::{
    Blend, Buffer, DType, Guard, IndexBits, IndexGeometry, IndexRuns, IndexRunsMut, KvGeometry, KvRunsMut, Payload,
    Place, Prefetch, Rehearsal, Selection, SlotGeometry, SlotsMut, StoredRuns,
};

use crate::rig::*;

/// Tables of one layer in which `count` distinct rows are in the first slots.
fn filled(g: &SlotGeometry, count: usize, random: &mut Random) -> Vec<u32> {
    let mut words = vec![0; g.words()];
    for head in 0..g.kv_heads {
        let slots = &mut words[g.slots_at(head)..][..g.rows];
        slots.fill(SlotGeometry::NONE);
        let mut rows: Vec<u32> = Vec::new();
        while rows.len() < count {
            let row = random.below(g.rows);
            if slots[row] == SlotGeometry::NONE {
                slots[row] = rows.len() as u32;
                rows.push(row as u32);
            }
        }
        words[g.rows_at(head)..][..count].copy_from_slice(&rows);
        words[g.count_at(head)] = count as u32;
    }
    words
}

/// Σ exp(score) of the rows that are not in `here`, over that of all.
fn tail(scores: &[f64], here: &[bool]) -> f64 {
    let most = scores.iter().copied().fold(f64::MIN, f64::max);
    let sum = |wanted: &dyn Fn(usize) -> bool| -> f64 {
        (0..scores.len()).filter(|&row| wanted(row)).map(|row| (scores[row] - most).exp()).sum()
    };
    sum(&|row| !here[row]) / sum(&|_| true)
}

#[test]
fn weights_are_what_is_neither_in_a_slot_nor_selected() {
    with_both(|cuda, _| {
        let mut random = Random(4711);
        for (kv_heads, group, columns, rows, slots, listed, selection) in [
            (2, 4, 24, 5000, 900, false, Selection::Probability { below: 6.0, least: 1, most: 300 }),
            (2, 2, 24, 3000, 700, true, Selection::Probability { below: 5.0, least: 1, most: 300 }),
            (1, 9, 16, 1024, 0, false, Selection::Count { count: 40 }),
            (3, 1, 33, 2500, 513, false, Selection::Random { count: 250, seed: 5, step: 9, period: 4 }),
            (1, 2, 8, 7, 7, true, Selection::Count { count: 1 }),
            (4, 3, 64, 130, 3, false, Selection::Probability { below: 50.0, least: 1, most: 300 }),
        ] {
            let (heads, layers) = (kv_heads * group, 1);
            let tables = SlotGeometry {
                layers,
                kv_heads,
                slots: slots + 400,
                rows,
                selected: 300,
                lists: 1,
                corrected: 0,
                attended: 320,
            };
            let name = format!("{rows} rows, {slots} in slots, listed: {listed}, {selection:?}");
            let index = IndexGeometry { layers: 1, kv_heads, columns, extent_tokens: 256, bits: IndexBits::Full };
            let kv = KvGeometry { layers: 1, kv_heads, head_dim: 8, extent_tokens: 256, dtype: DType::F32 };
            let extents = |count: usize, bytes: usize| -> Vec<Buffer> {
                (0..count).map(|_| cuda.b.allocate(bytes, Place::Device, "a test").unwrap()).collect()
            };
            let mut partial = extents(index.extents(rows), index.extent_bytes());
            let store = extents(kv.extents(rows), kv.extent_bytes());
            let mut cache = extents(kv.extents(tables.slots), kv.extent_bytes());
            let keys = random.normals(rows * kv_heads * columns);
            let given = cuda.buffer(DType::F32, &keys);
            let given = given.rows(DType::F32, rows, kv_heads * columns);
            cuda.b.index_append(&cuda.stream, given, &mut IndexRunsMut::new(&mut partial, index, 0), 0).unwrap();

            let words = filled(&tables, slots, &mut random);
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let mut memory = cuda.b.allocate(tables.bytes(), Place::Device, "a test").unwrap();
            cuda.b.upload(&cuda.stream, &bytes, &mut memory, 0).unwrap();
            let mut q = random.normals(heads * columns);
            if heads > 2 {
                (q[columns], q[2 * columns + 1]) = (f32::NAN, f32::INFINITY);
            }
            let queries = cuda.buffer(DType::F32, &q);
            let scale = 3.0 / (columns as f32).sqrt();
            let (from, to) = (2.min(rows), rows.saturating_sub(5).max(2));
            let mut weights = cuda.poisoned(heads);
            let runs = IndexRuns::new(&partial, index, 0);
            let mut sequence = [Prefetch {
                rehearsal: Rehearsal { row: 0, runs, rows, from, to, scale, selection },
                slots: SlotsMut {
                    tables: &mut memory,
                    geometry: tables,
                    layer: 0,
                    limit: tables.slots,
                    guard: Guard { below: 2, from: to as u32 },
                    step: 1,
                    pool: None,
                    by_list: listed,
                },
                from: StoredRuns::new(&store, kv, Payload::Exact, 0),
                to: KvRunsMut::new(&mut cache, kv, 0),
                saved: None,
                tail: Some(weights.rows_mut(DType::F32, 1, heads)),
                correction: None,
            }];
            cuda.b
                .prefetch(&cuda.stream, &cuda.stream, queries.rows(DType::F32, 1, heads * columns), &mut sequence)
                .unwrap();
            let got = cuda.floats(weights.rows(DType::F32, 1, heads));
            let after: Vec<u32> = cuda.bytes(&memory).as_chunks().0.iter().map(|b| u32::from_ne_bytes(*b)).collect();

            for (head, &got) in got.iter().enumerate() {
                let kv_head = head / group;
                let slot = |row: usize| words[tables.slots_at(kv_head) + row];
                let always = |row: usize| if listed { row < 2 || row >= to } else { slot(row) != SlotGeometry::NONE };
                let mut here: Vec<bool> = (0..rows).map(always).collect();
                let count = after[tables.selected_counts_at(0) + kv_head] as usize;
                let selected = &after[tables.selected_rows_at(0) + kv_head * tables.selected..][..count];
                selected.iter().for_each(|&row| here[row as usize] = true);
                let query = &q[head * columns..][..columns];
                if query.iter().any(|x| !x.is_finite()) {
                    assert_eq!(got, 0.0, "{name}: head {head} has no scores");
                    continue;
                }
                let score = |row: usize| -> f64 {
                    let key = &keys[(row * kv_heads + kv_head) * columns..][..columns];
                    let dot: f64 = query.iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    dot * f64::from(scale)
                };
                let want = tail(&(0..rows).map(score).collect::<Vec<_>>(), &here);
                assert!((f64::from(got) - want).abs() < 2e-5, "{name}: head {head} has {got}, not {want}");
            }
        }
    });
}

#[test]
fn rows_are_blended_as_on_the_cpu() {
    with_both(|cuda, cpu| {
        let mut random = Random(42);
        for (rows, cols) in [(1, 1), (1, 192), (3, 37), (9, 1031)] {
            for factor in [0.0, 1.0, 0.37, -0.5] {
                let [from, toward, held] = [0; 3].map(|_| random.normals(rows * (cols + 3)));
                for given in [true, false] {
                    let [got, want] = [cuda, cpu].map(|rig| {
                        let [x, y, mut out] = [&from, &toward, &held].map(|x| rig.buffer(DType::F32, x));
                        let from = given.then(|| x.rows(DType::F32, rows, cols + 3).col_range(2, cols));
                        let blend =
                            Blend { from, out: out.rows_mut(DType::F32, rows, cols + 3).col_range(1, cols), factor };
                        rig.b.blend(&rig.stream, blend, y.rows(DType::F32, rows, cols + 3).col_range(0, cols)).unwrap();
                        rig.floats(out.rows(DType::F32, rows, cols + 3))
                    });
                    assert_same(&format!("{rows} x {cols}, {factor}, {given}"), &got, &want);
                }
            }
        }
    });
}

/// Sequences one behind the other share a launch where their shapes are alike.
#[test]
fn tails_are_added_as_on_the_cpu() {
    with_both(|cuda, cpu| {
        let mut random = Random(43);
        for (heads, kv_heads, d) in [(1, 1, 1), (9, 3, 64), (4, 4, 19), (6, 1, 130)] {
            let count = 5;
            let means = random.normals(count * kv_heads * d);
            let weights: Vec<f32> = random.normals(count * heads).iter().map(|x| x.abs().fract()).collect();
            let attended = random.normals(count * heads * d);
            let [got, want] = [cuda, cpu].map(|rig| {
                let [m, w, mut out] = [&means, &weights, &attended].map(|x| rig.buffer(DType::F32, x));
                for i in 0..count {
                    let m = m.rows(DType::F32, count, kv_heads * d).row_range(i, 1);
                    let w = w.rows(DType::F32, count, heads).row_range(i, 1);
                    let out = out.rows_mut(DType::F32, count, heads * d).row_range(i, 1);
                    rig.b.add_tail(&rig.stream, m, w, out).unwrap();
                }
                rig.floats(out.rows(DType::F32, count, heads * d))
            });
            assert_same(&format!("{heads}, {kv_heads}, {d}"), &got, &want);
        }
    });
}
