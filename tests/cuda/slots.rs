//! The hot cache's tables on the device: every step leaves the tables, the journal and the entries that the CPU's plain
//! version leaves.

use kvahead::backend::{
    Admission, AttentionShape, Blend, Buffer, Correction, DType, Guard, HeadMaps, Header, IndexBits, IndexGeometry,
    IndexRuns, IndexRunsMut, KvGeometry, KvRuns, KvRunsMut, Lost, Payload, Place, PoolGeometry, PoolMut, Prefetch,
    Rehearsal, Segment, Selection, Slot, SlotGeometry, Slots, SlotsMut, StoredRuns, StoredRunsMut, VictimRule, Visible,
};

use crate::rig::*;

const LAYERS: usize = 2;

/// Of a batch, the sequence that attends what it lists, and the one without a tail.
const LISTS: usize = 1;
const NO_TAIL: usize = 2;

#[derive(Clone, Copy)]
struct Shape {
    kv: KvGeometry,
    index: IndexGeometry,
    slots: SlotGeometry,
    group: usize,
    payload: Payload,
    /// Who gives way, where the pool is full from the first step on.
    rule: Option<VictimRule>,
}

impl Shape {
    fn new(kv_heads: usize, group: usize, head_dim: usize, dtype: DType, slots: usize, selected: usize) -> Shape {
        let (layers, rows, columns) = (LAYERS, 640, head_dim / 2);
        Shape {
            kv: KvGeometry { layers, kv_heads, head_dim, extent_tokens: 64, dtype },
            index: IndexGeometry { layers, kv_heads, columns, extent_tokens: 64, bits: IndexBits::Four },
            slots: SlotGeometry {
                layers,
                kv_heads,
                slots,
                rows,
                selected,
                lists: LAYERS,
                corrected: selected / 3 + 1,
                attended: selected + selected / 3 + 14,
            },
            group,
            payload: Payload::Exact,
            rule: None,
        }
    }

    /// With a full pool.
    fn evicting(self, rule: VictimRule) -> Shape {
        Shape { rule: Some(rule), ..self }
    }

    /// The pool of a call that loses up to five rows.
    fn pool(&self) -> PoolGeometry {
        PoolGeometry {
            layers: LAYERS,
            kv_heads: self.kv.kv_heads,
            rows: self.slots.rows,
            lost: 5,
            stored_bytes: self.payload.row_bytes(&self.kv),
            index_bytes: self.index.row_bytes() + 4,
        }
    }

    /// With entries that are stored so.
    fn stored(self, payload: Payload) -> Shape {
        Shape { payload, ..self }
    }
}

/// One sequence on one backend.
struct Sequence {
    store: Vec<Buffer>,
    cache: Vec<Buffer>,
    /// What the cache held before the step, where the store is not exact.
    saved: Vec<Buffer>,
    /// The same of corrections.
    saved_corrected: Vec<Buffer>,
    index: Vec<Buffer>,
    tables: Buffer,
    pool: Pool,
    /// What a rehearsal finds of each layer's query heads, and the values' mean of each layer, before and after a token.
    weights: Buffer,
    means: [Buffer; 2],
    length: usize,
    /// Rows that hold tokens: as many as there are tokens, but where the pool is full.
    rows: usize,
    /// Tokens when the call began.
    begun: usize,
}

/// Its pool, where it has one.
struct Pool {
    tables: Buffer,
    before: Buffer,
    lost: Buffer,
}

impl Sequence {
    fn new(rig: &Rig<'_>, shape: &Shape, words: &[u32], length: usize) -> Sequence {
        let extents = |count: usize, bytes: usize, place: Place| -> Vec<Buffer> {
            (0..count).map(|_| rig.b.allocate(bytes, place, "a test").unwrap()).collect()
        };
        let mut tables = rig.b.allocate(shape.slots.bytes(), Place::Device, "a test").unwrap();
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        rig.b.upload(&rig.stream, &bytes, &mut tables, 0).unwrap();
        let width = shape.kv.kv_heads * shape.kv.head_dim;
        Sequence {
            store: extents(
                shape.slots.rows.div_ceil(64),
                shape.slots.tables() * 64 * shape.payload.row_bytes(&shape.kv),
                Place::Pinned,
            ),
            cache: extents(shape.slots.slots.div_ceil(64), shape.kv.extent_bytes(), Place::Device),
            saved: extents(shape.slots.selected / 64 + 1, shape.kv.extent_bytes(), Place::Device),
            saved_corrected: extents(shape.slots.corrected / 64 + 1, shape.kv.extent_bytes(), Place::Device),
            index: extents(shape.slots.rows.div_ceil(64), shape.index.extent_bytes(), Place::Device),
            tables,
            pool: {
                let pool = |bytes| rig.b.allocate(bytes, Place::Device, "a test").unwrap();
                let (bytes, lost) = (shape.pool().bytes(), shape.pool().lost_bytes());
                Pool { tables: pool(bytes), before: pool(bytes), lost: pool(lost) }
            },
            weights: rig.poisoned(LAYERS * shape.kv.kv_heads * shape.group),
            means: [0.0; 2].map(|zero| rig.buffer(DType::F32, &vec![zero; LAYERS * width])),
            length,
            rows: length,
            begun: length,
        }
    }

    fn take_back(&mut self, rig: &Rig<'_>, shape: &Shape) {
        for layer in 0..LAYERS {
            let lost = Lost {
                tables: &self.pool.tables,
                lost: &self.pool.lost,
                geometry: shape.pool(),
                layer,
                begun: self.begun,
                store: StoredRunsMut::new(&mut self.store, shape.kv, shape.payload, layer),
                index: IndexRunsMut::new(&mut self.index, shape.index, layer),
            };
            rig.b.take_back(&rig.stream, lost).unwrap();
        }
        rig.b.copy(&rig.stream, &self.pool.before, &mut self.pool.tables).unwrap();
    }

    fn words(&self, rig: &Rig<'_>) -> Vec<u32> {
        let bytes = rig.bytes(&self.tables);
        bytes.chunks_exact(4).map(|b| u32::from_ne_bytes(b.try_into().unwrap())).collect()
    }

    fn slots_mut<'a>(
        tables: &'a mut Buffer,
        pool: &'a mut Pool,
        shape: &Shape,
        at: At,
        (token, rows, begun): (usize, usize, usize),
        by_list: bool,
    ) -> SlotsMut<'a> {
        let At { layer, limit, step } = at;
        let guard = Guard { below: 3, from: (token + 1).saturating_sub(9) as u32 };
        let Pool { tables: known, lost, .. } = pool;
        let geometry = shape.pool();
        let pool =
            shape.rule.map(|rule| PoolMut { tables: known, lost, geometry, rule, rows, token, full: true, begun });
        SlotsMut { tables, geometry: shape.slots, layer, limit, guard, step, pool, by_list }
    }
}

/// Tables of empty slots.
fn empty(shape: &SlotGeometry) -> Vec<u32> {
    let mut words = vec![0; shape.words()];
    for table in 0..shape.tables() {
        words[shape.slots_at(table)..][..shape.rows].fill(SlotGeometry::NONE);
    }
    words
}

/// Some rows in some slots: all that are guarded, and others.
fn filled(shape: &SlotGeometry, length: usize, count: usize, random: &mut Random) -> Vec<u32> {
    let mut words = empty(shape);
    for table in 0..shape.tables() {
        let mut rows: Vec<u32> = (0..3).chain(length as u32 - 9..length as u32).collect();
        while rows.len() < count {
            let row = random.below(length) as u32;
            if !rows.contains(&row) {
                rows.push(row);
            }
        }
        for i in (1..rows.len()).rev() {
            rows.swap(i, random.below(i + 1));
        }
        for (slot, &row) in rows.iter().enumerate() {
            words[shape.rows_at(table) + slot] = row;
            // Few different steps, so that many are equally old.
            words[shape.used_at(table) + slot] = random.below(5) as u32 + 1;
            words[shape.slots_at(table) + row as usize] = slot as u32;
        }
        words[shape.count_at(table)] = rows.len() as u32;
    }
    words
}

/// A pool in order whose rows have been used: counts that are about to saturate, or times.
fn used(shape: &Shape, length: usize, random: &mut Random) -> Vec<u8> {
    let g = shape.pool();
    let mut words = vec![0u32; g.bytes() / 4];
    for table in 0..LAYERS * shape.kv.kv_heads {
        for used in &mut words[g.uses_at(table)..][..length] {
            *used = match shape.rule {
                Some(VictimRule::Counter) => 245 + random.below(10) as u32,
                _ => 2 * random.below(length / 2) as u32,
            };
        }
    }
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Sets words to zero that mean nothing: room that is not in use. Without what is attended by list, where addresses are.
fn meaningful(shape: &SlotGeometry, mut words: Vec<u32>) -> Vec<u32> {
    words.truncate(shape.lists_end());
    for table in 0..shape.tables() {
        let count = words[shape.count_at(table)] as usize;
        let changes = words[shape.header_at(table) + Header::Changes as usize] as usize;
        words[shape.header_at(table) + Header::Next as usize] = 0; // the device's own affair; what a token takes shows it
        words[shape.used_at(table) + count..shape.used_at(table) + shape.slots].fill(0);
        words[shape.rows_at(table) + count..shape.rows_at(table) + shape.slots].fill(0);
        let journal = shape.journal_at(table);
        let room = shape.selected + shape.corrected + 1;
        words[journal + SlotGeometry::CHANGE * changes..journal + SlotGeometry::CHANGE * room].fill(0);
    }
    for layer in 0..shape.layers {
        for head in 0..shape.kv_heads {
            for (count, list, room, length) in [
                (shape.selected_counts_at(layer), shape.selected_rows_at(layer), shape.selected, 1),
                (shape.move_counts_at(layer), shape.moves_at(layer), shape.selected, 2),
                (shape.corrected_counts_at(layer), shape.corrected_rows_at(layer), shape.corrected, 1),
                (shape.correction_counts_at(layer), shape.correction_moves_at(layer), shape.corrected, 2),
            ] {
                let (used, room) = (length * words[count + head] as usize, length * room);
                words[list + head * room + used..list + (head + 1) * room].fill(0);
            }
        }
    }
    // What was picked for a correction is used up.
    words[shape.picked_counts_at()..shape.corrected_counts_at(0)].fill(0);
    words
}

/// The slots that the last layer to do so has listed.
fn lists(shape: &SlotGeometry, words: &[u32]) -> Vec<Vec<u32>> {
    let count = |head: usize| words[shape.attended_lists_at() + SlotGeometry::COUNT * head + 2] as usize;
    (0..shape.kv_heads)
        .map(|head| words[shape.attended_at() + head * shape.attended..][..count(head)].to_vec())
        .collect()
}

fn entries(rig: &Rig<'_>, extents: &[Buffer]) -> Vec<u8> {
    extents.iter().flat_map(|extent| rig.bytes(extent)).collect()
}

/// The first columns as they are: partial keys then round alike everywhere.
fn maps(rig: &Rig<'_>, shape: &Shape) -> HeadMaps {
    let (d, columns) = (shape.kv.head_dim, shape.index.columns);
    let values: Vec<f32> = (0..shape.kv.kv_heads * columns * d).map(|i| f32::from(i % d == i / d % columns)).collect();
    HeadMaps { kv_heads: shape.kv.kv_heads, inputs: d, outputs: columns, data: rig.buffer(DType::F32, &values) }
}

/// Where a step is: the layer, the slots that may be used, its number.
#[derive(Clone, Copy)]
struct At {
    layer: usize,
    limit: usize,
    step: u32,
}

/// `correction`: the layer has been prefetched in this step.
fn prefetch(
    rig: &Rig<'_>,
    shape: &Shape,
    sequences: &mut [Sequence],
    at: At,
    q: &[f32],
    correction: Option<Correction>,
) {
    let layer = at.layer;
    let heads = shape.group * shape.kv.kv_heads;
    let width = heads * shape.index.columns;
    let queries = rig.buffer(DType::F32, q);
    let saves = shape.payload != Payload::Exact;
    let mut all: Vec<Prefetch<'_>> = sequences
        .iter_mut()
        .enumerate()
        .map(|(row, s)| {
            let token = (s.length, s.rows, s.begun);
            // In a full pool the window may be anywhere.
            let to = if shape.rule.is_some() { s.rows } else { s.length.saturating_sub(8) };
            let selection = match row % 2 {
                0 => Selection::Count { count: shape.slots.selected },
                _ => Selection::Probability { below: 5.0, least: 1, most: shape.slots.selected },
            };
            let runs = IndexRuns::new(&s.index, shape.index, layer);
            Prefetch {
                rehearsal: Rehearsal { row, runs, rows: s.rows, from: 3.min(to), to, scale: 0.3, selection },
                slots: Sequence::slots_mut(&mut s.tables, &mut s.pool, shape, at, token, row == LISTS),
                from: StoredRuns::new(&s.store, shape.kv, shape.payload, layer),
                to: KvRunsMut::new(&mut s.cache, shape.kv, layer),
                saved: saves.then(|| match correction {
                    Some(_) => KvRunsMut::new(&mut s.saved_corrected, shape.kv, layer),
                    None => KvRunsMut::new(&mut s.saved, shape.kv, layer),
                }),
                correction,
                // Not every sequence of a batch has a tail.
                tail: (row != NO_TAIL).then(|| s.weights.rows_mut(DType::F32, LAYERS, heads).row_range(layer, 1)),
            }
        })
        .collect();
    rig.b.prefetch(&rig.stream, &rig.stream, queries.rows(DType::F32, q.len() / width, width), &mut all).unwrap();
}

fn admit(rig: &Rig<'_>, shape: &Shape, sequences: &mut [Sequence], at: At, kv: &[f32], maps: &HeadMaps) {
    let layer = at.layer;
    let width = shape.kv.kv_heads * shape.kv.head_dim;
    let rows = rig.buffer(DType::F32, kv);
    let rows = rows.rows(DType::F32, sequences.len(), 2 * width);
    for (i, s) in sequences.iter_mut().enumerate() {
        let own = rows.row_range(i, 1);
        let [a, b] = &mut s.means;
        let (from, out) = if at.step.is_multiple_of(2) { (&*a, b) } else { (&*b, a) };
        let from = from.rows(DType::F32, LAYERS, width).row_range(layer, 1);
        let out = out.rows_mut(DType::F32, LAYERS, width).row_range(layer, 1);
        // The first sequence goes on from what is there.
        let from = (i != 0).then_some(from);
        let admission = Admission {
            row: s.length,
            slots: Sequence::slots_mut(&mut s.tables, &mut s.pool, shape, at, (s.length, s.rows, s.begun), i == LISTS),
            store: StoredRunsMut::new(&mut s.store, shape.kv, shape.payload, layer),
            cache: KvRunsMut::new(&mut s.cache, shape.kv, layer),
            saved: (shape.payload != Payload::Exact).then(|| KvRunsMut::new(&mut s.saved, shape.kv, layer)),
            index: IndexRunsMut::new(&mut s.index, shape.index, layer),
            maps,
            mean: (i != NO_TAIL).then(|| Blend { from, out, factor: 1.0 / (s.length + 1) as f32 }),
        };
        rig.b.admit(&rig.stream, own.col_range(0, width), own.col_range(width, width), admission).unwrap();
    }
}

#[test]
fn steps_leave_what_the_cpu_leaves() {
    with_both(|cuda, cpu| {
        let shapes = [
            (Shape::new(3, 3, 64, DType::F32, 90, 20), 90, 60),
            (Shape::new(1, 8, 128, DType::BF16, 40, 11), 37, 20),
            (Shape::new(5, 1, 80, DType::F16, 320, 120), 300, 290),
            (Shape::new(2, 4, 62, DType::BF16, 200, 64), 180, 180),
            (Shape::new(3, 3, 64, DType::F32, 90, 20).stored(Payload::Int8), 90, 60),
            (Shape::new(2, 8, 128, DType::BF16, 40, 11).stored(Payload::Int8), 37, 20),
            (Shape::new(2, 2, 128, DType::F16, 140, 70).stored(Payload::Int4), 120, 110),
            (Shape::new(5, 1, 80, DType::BF16, 320, 120).stored(Payload::Int4), 300, 290),
            (Shape::new(2, 4, 61, DType::BF16, 200, 64).stored(Payload::Int8), 180, 180),
            (Shape::new(2, 4, 61, DType::F32, 200, 64).stored(Payload::Int4), 180, 180),
            (Shape::new(3, 3, 64, DType::F32, 90, 20).evicting(VictimRule::Fifo), 90, 60),
            (Shape::new(2, 2, 64, DType::BF16, 90, 30).evicting(VictimRule::Lru).stored(Payload::Int8), 70, 70),
            (Shape::new(2, 2, 128, DType::F16, 400, 40).evicting(VictimRule::Lru), 400, 300),
            (Shape::new(3, 4, 64, DType::BF16, 120, 60).evicting(VictimRule::Counter), 110, 100),
            (Shape::new(1, 4, 61, DType::F32, 90, 20).evicting(VictimRule::Counter).stored(Payload::Int4), 90, 60),
        ];
        let (mut largest, mut joined) = (0f32, 0);
        for (number, (shape, limit, held)) in shapes.into_iter().enumerate() {
            let mut random = Random(77 + number as u64);
            let lengths = [400, 310, 333];
            let rigs = [cuda, cpu];
            let maps: Vec<HeadMaps> = rigs.iter().map(|rig| maps(rig, &shape)).collect();
            let width = shape.kv.kv_heads * shape.kv.head_dim;
            let mut both: [Vec<Sequence>; 2] = [Vec::new(), Vec::new()];
            for length in lengths {
                let words = filled(&shape.slots, length, held, &mut random);
                let known = used(&shape, length, &mut random);
                for (rig, sequences) in rigs.iter().zip(&mut both) {
                    let mut sequence = Sequence::new(rig, &shape, &words, length);
                    rig.b.upload(&rig.stream, &known, &mut sequence.pool.tables, 0).unwrap();
                    sequences.push(sequence);
                }
                for layer in 0..LAYERS {
                    let (keys, values) = (random.normals(length * width), random.normals(length * width));
                    let partial: Vec<f32> = keys
                        .chunks_exact(shape.kv.head_dim)
                        .flat_map(|key| key[..shape.index.columns].iter().copied())
                        .collect();
                    for (rig, sequences) in rigs.iter().zip(&mut both) {
                        let s = sequences.last_mut().unwrap();
                        let (k, v) = (rig.buffer(DType::F32, &keys), rig.buffer(DType::F32, &values));
                        let (k, v) = (k.rows(DType::F32, length, width), v.rows(DType::F32, length, width));
                        let mut runs = StoredRunsMut::new(&mut s.store, shape.kv, shape.payload, layer);
                        let places: Vec<Slot> = (0..length * shape.kv.kv_heads)
                            .map(|i| runs.runs().slot(i % shape.kv.kv_heads, i / shape.kv.kv_heads))
                            .collect();
                        let store = runs.buffers_mut();
                        rig.b.encode_kv(&rig.stream, k, v, shape.payload, &shape.kv, &places, store).unwrap();
                        let p = rig.buffer(DType::F32, &partial);
                        let p = p.rows(DType::F32, length, partial.len() / length);
                        let runs = &mut IndexRunsMut::new(&mut s.index, shape.index, layer);
                        rig.b.index_append(&rig.stream, p, runs, 0).unwrap();
                        let slots = Slots { tables: &s.tables, geometry: shape.slots, layer, limit, by_list: false };
                        let from = StoredRuns::new(&s.store, shape.kv, shape.payload, layer);
                        let to = &mut KvRunsMut::new(&mut s.cache, shape.kv, layer);
                        rig.b.refill(&rig.stream, slots, &from, to).unwrap();
                    }
                }
            }
            let mut stores: Vec<Vec<u8>> = Vec::new();
            for step in 10..if brief() { 17 } else { 42 } {
                // Calls of three tokens each.
                if shape.rule.is_some() && step % 3 == 1 {
                    stores = both[0].iter().map(|s| entries(cuda, &s.store)).collect();
                    for (rig, s) in
                        rigs.iter().zip(&mut both).flat_map(|(rig, all)| all.iter_mut().map(move |s| (rig, s)))
                    {
                        s.begun = s.length;
                        rig.b.copy(&rig.stream, &s.pool.tables, &mut s.pool.before).unwrap();
                    }
                }
                for layer in 0..LAYERS {
                    let at = At { layer, limit, step };
                    let q = random.normals(lengths.len() * shape.group * shape.kv.kv_heads * shape.index.columns);
                    let kv = random.normals(lengths.len() * 2 * width);
                    // The layer's own queries are others, and ask for few rows or many.
                    let own = random.normals(q.len());
                    let most = [1, 3, shape.slots.corrected][random.below(3)];
                    let room = shape.slots.selected + [0, 2, most][random.below(3)];
                    // What is guarded and selected, a new token and its slot must fit.
                    let correction = Correction { most, room: room.min(limit - 14) };
                    for ((rig, sequences), maps) in rigs.iter().zip(&mut both).zip(&maps) {
                        if step % 5 != 0 {
                            prefetch(rig, &shape, sequences, at, &q, None);
                        }
                        if step % 5 > 1 {
                            prefetch(rig, &shape, sequences, at, &own, Some(correction));
                        }
                        admit(rig, &shape, sequences, at, &kv, maps);
                    }
                }
                for (i, (a, b)) in both[0].iter().zip(&both[1]).enumerate() {
                    let case = format!("shape {number}, step {step}, sequence {i}");
                    let got = meaningful(&shape.slots, a.words(cuda));
                    let want = meaningful(&shape.slots, b.words(cpu));
                    let differs = got.iter().zip(&want).position(|(a, b)| a != b);
                    assert_eq!(differs, None, "{case}: word {differs:?} of the tables");
                    assert!(entries(cuda, &a.cache) == entries(cpu, &b.cache), "{case}: entries in slots differ");
                    assert!(entries(cuda, &a.store) == entries(cpu, &b.store), "{case}: entries in the store differ");
                    assert!(entries(cuda, &a.saved) == entries(cpu, &b.saved), "{case}: what was kept differs");
                    let corrected = entries(cuda, &a.saved_corrected) == entries(cpu, &b.saved_corrected);
                    assert!(corrected, "{case}: what was kept of corrections differs");
                    let header = |table: usize| want[shape.slots.header_at(table) + Header::Corrected as usize];
                    joined += (0..shape.slots.tables()).map(header).sum::<u32>();
                    assert!(cuda.bytes(&a.pool.tables) == cpu.bytes(&b.pool.tables), "{case}: the pools differ");
                    if i == LISTS {
                        let (got, want) = (lists(&shape.slots, &a.words(cuda)), lists(&shape.slots, &b.words(cpu)));
                        assert_eq!(got, want, "{case}: what is listed");
                        // With eviction a guarded token may have lost its slot in a call that was undone.
                        let least = if shape.rule.is_some() { 1 } else { 12 + usize::from(step % 5 != 0) };
                        assert!(got.iter().all(|list| list.len() >= least && list.is_sorted()), "{case}: {got:?}");
                    }
                    for (a, b) in a.means.iter().zip(&b.means) {
                        assert!(cuda.bytes(a) == cpu.bytes(b), "{case}: mean values differ");
                    }
                    let weights = shape.kv.kv_heads * shape.group;
                    let of = |rig: &Rig<'_>, s: &Sequence| rig.floats(s.weights.rows(DType::F32, LAYERS, weights));
                    if i != NO_TAIL && step > 10 {
                        assert_close(&case, &of(cuda, a), &of(cpu, b), 1e-5);
                        largest = of(cuda, a).into_iter().fold(largest, f32::max);
                    } else {
                        assert!(of(cuda, a).iter().all(|weight| weight.is_nan()), "{case}: a tail nobody asked for");
                    }
                }
                // Every other call is undone, and another one takes its place.
                let undone = shape.rule.is_some() && step % 6 == 0;
                for (rig, sequences) in rigs.iter().zip(&mut both).filter(|_| undone) {
                    sequences.iter_mut().for_each(|s| s.take_back(rig, &shape));
                }
                for (i, (a, b)) in both[0].iter().zip(&both[1]).enumerate().filter(|_| undone) {
                    let case = format!("shape {number}, step {step} undone, sequence {i}");
                    assert!(entries(cuda, &a.store) == stores[i], "{case}: the store is not what it was");
                    assert!(entries(cpu, &b.store) == stores[i], "{case}: the CPU's store is not what it was");
                    assert!(cuda.bytes(&a.pool.tables) == cpu.bytes(&b.pool.tables), "{case}: the pools differ");
                }
                for s in both.iter_mut().flatten() {
                    s.length = if undone { s.begun } else { s.length + 1 };
                    s.rows += usize::from(shape.rule.is_none());
                }
            }
            attends_its_slots(cuda, cpu, &shape, &both, limit, &mut random);
        }
        assert!(brief() || largest > 0.3, "there was no tail to speak of: {largest}");
        assert!(brief() || joined > 1000, "nothing to speak of was corrected: {joined}");
    });
}

/// The end of a prompt: what is guarded, then the best of what is ranked; over tables that have held something else.
#[test]
fn a_prompt_fills_the_slots_that_the_cpu_fills() {
    with_both(|cuda, cpu| {
        for (number, (shape, lengths)) in [
            (Shape::new(3, 3, 64, DType::F32, 90, 20), [600, 95, 90]),
            (Shape::new(1, 8, 128, DType::BF16, 40, 11), [40, 41, 500]),
            (Shape::new(5, 1, 80, DType::F16, 520, 120), [640, 521, 600]),
        ]
        .into_iter()
        .enumerate()
        {
            let mut random = Random(5 + number as u64);
            for (case, length) in lengths.into_iter().enumerate() {
                let limit = shape.slots.slots.min(length) - case;
                let words = filled(&shape.slots, length, 30, &mut random);
                let kv_heads = shape.kv.kv_heads;
                let most = (limit + 14).min(length);
                let ranked: Vec<f32> = (0..LAYERS * kv_heads)
                    .flat_map(|_| {
                        let mut rows: Vec<f32> = (0..length).map(|row| row as f32).collect();
                        (1..length).for_each(|i| rows.swap(i, random.below(i + 1)));
                        rows.truncate(most);
                        rows
                    })
                    .collect();
                let entries_of: Vec<f32> = random.normals(LAYERS * length * 2 * kv_heads * shape.kv.head_dim);
                let [got, want] = [cuda, cpu].map(|rig| {
                    let mut s = Sequence::new(rig, &shape, &words, length);
                    let ranked = rig.buffer(DType::U32, &ranked);
                    for layer in 0..LAYERS {
                        let width = kv_heads * shape.kv.head_dim;
                        let kv =
                            rig.buffer(DType::F32, &entries_of[layer * length * 2 * width..][..length * 2 * width]);
                        let kv = kv.rows(DType::F32, length, 2 * width);
                        // In memory of the device, as a prompt's layer is.
                        let mut staged: Vec<Buffer> = (0..length.div_ceil(64))
                            .map(|_| rig.b.allocate(shape.kv.extent_bytes(), Place::Device, "a test").unwrap())
                            .collect();
                        let (k, v) = (kv.col_range(0, width), kv.col_range(width, width));
                        let runs = &mut KvRunsMut::new(&mut staged, shape.kv, layer);
                        rig.b.store_kv(&rig.stream, k, v, runs, 0).unwrap();
                        let slots = SlotsMut {
                            tables: &mut s.tables,
                            geometry: shape.slots,
                            layer,
                            limit,
                            guard: Guard { below: 3, from: length as u32 - 9 },
                            step: 9,
                            pool: None,
                            by_list: false,
                        };
                        let ranked = ranked.rows(DType::U32, LAYERS * kv_heads, most);
                        let ranked = ranked.row_range(layer * kv_heads, kv_heads);
                        rig.b.load_slots(&rig.stream, slots, length, ranked).unwrap();
                        let slots = Slots { tables: &s.tables, geometry: shape.slots, layer, limit, by_list: false };
                        let from = StoredRuns::new(&staged, shape.kv, Payload::Exact, layer);
                        let to = &mut KvRunsMut::new(&mut s.cache, shape.kv, layer);
                        rig.b.refill(&rig.stream, slots, &from, to).unwrap();
                    }
                    (meaningful(&shape.slots, s.words(rig)), entries(rig, &s.cache))
                });
                let differs = got.0.iter().zip(&want.0).position(|(a, b)| a != b);
                assert_eq!(differs, None, "shape {number}, {length} tokens: word {differs:?} of the tables");
                assert!(got.1 == want.1, "shape {number}, {length} tokens: entries differ");
                for table in 0..shape.slots.tables() {
                    let g = &shape.slots;
                    assert_eq!(want.0[g.count_at(table)] as usize, limit);
                    let rows = &want.0[g.rows_at(table)..][..limit];
                    let ahead: Vec<u32> = (0..3).chain(length as u32 - 9..length as u32).collect();
                    assert_eq!(rows[..12], ahead, "what is guarded comes first");
                    let own = &ranked[table * most..][..most];
                    let others = own.iter().map(|&row| row as u32).filter(|row| !ahead.contains(row));
                    assert!(others.take(limit - 12).eq(rows[12..].iter().copied()), "{length}: then the best");
                    assert!(want.0[g.used_at(table)..][..limit].iter().copied().eq((1..=limit as u32).rev()));
                }
            }
        }
    });
}

fn attends_its_slots(
    cuda: &Rig<'_>,
    cpu: &Rig<'_>,
    shape: &Shape,
    both: &[Vec<Sequence>; 2],
    limit: usize,
    random: &mut Random,
) {
    let (kv_heads, head_dim) = (shape.kv.kv_heads, shape.kv.head_dim);
    let heads = kv_heads * shape.group;
    let q = random.normals(both[0].len() * heads * head_dim);
    let attention = AttentionShape { heads, kv_heads, head_dim, scale: 0.1, window: None };
    let attend = |rig: &Rig<'_>, sequences: &[Sequence]| {
        let queries = rig.buffer(DType::F32, &q);
        let mut out = rig.poisoned(q.len());
        let segments: Vec<Segment<'_>> = sequences
            .iter()
            .enumerate()
            .map(|(row, s)| Segment {
                row,
                rows: 1,
                position: s.length,
                runs: KvRuns::new(&s.cache, shape.kv, 1),
                visible: Visible::Slots(Slots {
                    tables: &s.tables,
                    geometry: shape.slots,
                    layer: LAYERS - 1,
                    limit,
                    by_list: row == LISTS,
                }),
            })
            .collect();
        let (rows, width) = (sequences.len(), heads * head_dim);
        let queries = queries.rows(DType::F32, rows, width);
        rig.b.attend(&rig.stream, queries, &attention, &segments, out.rows_mut(DType::F32, rows, width)).unwrap();
        rig.floats(out.rows(DType::F32, rows, width))
    };
    assert_close("attention over slots", &attend(cuda, &both[0]), &attend(cpu, &both[1]), 1e-4);
}
