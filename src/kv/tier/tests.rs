//! Every store against a table of what was appended, under random sequences of calls.

use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::{Buffer, DType, KvRunsMut, Move, Place as Memory, Stream};
use crate::kv::Place;

/// SplitMix64.
pub(super) struct Random(pub u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    fn value(&mut self) -> f32 {
        (self.next() as f64 / u64::MAX as f64 * 8.0 - 3.0) as f32
    }
}

pub(super) fn backend() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new(CpuOptions { threads: 1, level: None }).unwrap())
}

fn element(dtype: DType, x: f32) -> Vec<u8> {
    match dtype {
        DType::F32 => x.to_le_bytes().to_vec(),
        DType::F16 => f16::from_f32(x).to_le_bytes().to_vec(),
        _ => bf16::from_f32(x).to_le_bytes().to_vec(),
    }
}

/// What the payload makes of a vector, the plain way.
fn stored(payload: Payload, x: &[f32]) -> Vec<f32> {
    match payload {
        Payload::Exact => x.to_vec(),
        Payload::Int8 => {
            let scale = x.iter().fold(0f32, |most, x| most.max(x.abs())) / 127.0;
            // Codes are integers, so a small negative value comes back as +0.
            x.iter().map(|x| ((x / scale).round_ties_even() + 0.0) * scale).collect()
        }
        Payload::Int4 => x
            .chunks(64)
            .flat_map(|group| {
                let least = group.iter().copied().fold(f32::MAX, f32::min);
                let most = group.iter().copied().fold(f32::MIN, f32::max);
                let minimum = f16::from_f32(least).to_f32();
                let scale = f16::from_f32((most - minimum) / 15.0).to_f32();
                let divisor = if scale > 0.0 { scale } else { 1.0 };
                let value =
                    move |x: &f32| ((x - minimum) / divisor).round_ties_even().clamp(0.0, 15.0) * scale + minimum;
                group.iter().map(value).collect::<Vec<_>>()
            })
            .collect(),
    }
}

/// A move, and the rows that may arrive by it.
type Awaited = (Move, Vec<Vec<u8>>);

/// Rows as they are on the device, by layer, KV head and row.
type Entries = HashMap<(usize, usize, usize), Vec<u8>>;

/// A store, and what it must hold.
pub(super) struct Checked {
    pub(super) backend: Arc<dyn Backend>,
    pub(super) store: Box<dyn Store>,
    geometry: KvGeometry,
    payload: Payload,
    /// Rows appended, by layer.
    pub(super) rows: Vec<usize>,
    /// What has been appended.
    entries: Entries,
    /// The rows that had entries when the step began, and all entries then.
    begun: (usize, Entries),
    /// Open fetches: the layer, and of every move what may arrive.
    open: Vec<(usize, Vec<Awaited>)>,
    /// Layers of which the first rows are being fetched, whose targets have runs as long as the store's.
    whole: Vec<usize>,
}

/// Rows of the targets.
const TARGET: usize = 300;

impl Checked {
    pub(super) fn new(
        backend: Arc<dyn Backend>,
        store: Box<dyn Store>,
        geometry: KvGeometry,
        payload: Payload,
    ) -> Checked {
        let rows = vec![0; geometry.layers];
        Checked {
            backend,
            store,
            geometry,
            payload,
            rows,
            entries: HashMap::new(),
            begun: (0, HashMap::new()),
            open: Vec::new(),
            whole: Vec::new(),
        }
    }

    fn activations(&self, values: &[f32]) -> Buffer {
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let mut buffer = self.backend.allocate(bytes.len(), Memory::Device, "a test").unwrap();
        self.backend.upload(&Stream(0), &bytes, &mut buffer, 0).unwrap();
        buffer
    }

    pub(super) fn append_at(
        &mut self,
        random: &mut Random,
        layer: usize,
        tokens: usize,
        place: Place<'_>,
    ) -> Result<()> {
        let (heads, d) = (self.geometry.kv_heads, self.geometry.head_dim);
        let keys: Vec<f32> = (0..tokens * heads * d).map(|_| random.value()).collect();
        let values: Vec<f32> = (0..tokens * heads * d).map(|_| random.value()).collect();
        let (k, v) = (self.activations(&keys), self.activations(&values));
        let (k, v) = (k.rows(DType::F32, tokens, heads * d), v.rows(DType::F32, tokens, heads * d));
        self.store.append(&*self.backend, &Stream(0), layer, k, v, place)?;
        for i in 0..tokens {
            for head in 0..heads {
                let at = (i * heads + head) * d;
                let vectors = [&keys[at..at + d], &values[at..at + d]].map(|x| stored(self.payload, x));
                let bytes: Vec<u8> = vectors.iter().flatten().flat_map(|&x| element(self.geometry.dtype, x)).collect();
                let row = place.row(i, head);
                for (_, moves) in self.open.iter_mut().filter(|(open, _)| *open == layer) {
                    for (_, may) in moves.iter_mut().filter(|(m, _)| (m.head as usize, m.from as usize) == (head, row))
                    {
                        may.push(bytes.clone());
                    }
                }
                self.entries.insert((layer, head, row), bytes);
            }
        }
        Ok(())
    }

    pub(super) fn append(&mut self, random: &mut Random, layer: usize, tokens: usize) -> Result<()> {
        let first = self.rows[layer];
        self.store.reserve(first + tokens)?;
        self.append_at(random, layer, tokens, Place::From(first))?;
        self.rows[layer] += tokens;
        Ok(())
    }

    /// Overwrites a row of each KV head: any, or one of the first few, so that blocks fill and rows are met again.
    fn overwrite(&mut self, random: &mut Random, layer: usize) -> Result<()> {
        let among = if random.below(2) == 0 { self.rows[layer] } else { self.rows[layer].min(5) };
        let rows: Vec<u32> = (0..self.geometry.kv_heads).map(|_| random.below(among) as u32).collect();
        self.append_at(random, layer, 1, Place::Rows(&rows))
    }

    /// Begins a fetch of some of the layer's rows, each with probability 1 / `sparse`.
    pub(super) fn begin(&mut self, random: &mut Random, layer: usize, sparse: usize) -> Result<()> {
        let mut moves = Vec::new();
        for head in 0..self.geometry.kv_heads {
            let start = random.below(TARGET); // places differ, and are not in order
            let chosen = (0..self.rows[layer]).filter(|_| random.below(sparse) == 0).take(TARGET);
            moves.extend(chosen.enumerate().map(|(i, row)| Move {
                head: head as u32,
                from: row as u32,
                to: ((start + i * 7) % TARGET) as u32,
            }));
        }
        self.store.begin_fetch(layer, &moves)?;
        let may = |m: &Move| vec![self.entries[&(layer, m.head as usize, m.from as usize)].clone()];
        self.open.push((layer, moves.iter().map(|m| (*m, may(m))).collect()));
        Ok(())
    }

    /// Begins a fetch of the layer's first rows, all of them or some.
    fn begin_first(&mut self, random: &mut Random, layer: usize) -> Result<()> {
        let rows = random.below(self.rows[layer] + 1).min(TARGET);
        self.store.begin_fetch_first(layer, rows)?;
        let may = |m: &Move| vec![self.entries[&(layer, m.head as usize, m.from as usize)].clone()];
        self.open.push((layer, Move::whole(self.geometry.kv_heads, rows).map(|m| (m, may(&m))).collect()));
        self.whole.push(layer);
        Ok(())
    }

    pub(super) fn finish(&mut self, layer: usize) -> Result<()> {
        let whole = self.whole.contains(&layer);
        self.whole.retain(|&other| other != layer);
        let tokens = if whole { self.geometry.extent_tokens } else { 100 };
        let geometry = KvGeometry { layers: 1, extent_tokens: tokens, ..self.geometry };
        let mut target: Vec<Buffer> = (0..geometry.extents(TARGET))
            .map(|_| {
                let mut buffer = self.backend.allocate(geometry.extent_bytes(), Memory::Device, "a test").unwrap();
                self.backend.upload(&Stream(0), &vec![0xa5; buffer.bytes()], &mut buffer, 0).unwrap();
                buffer
            })
            .collect();
        let mut runs = KvRunsMut::new(&mut target, geometry, 0);
        let open = self.open.iter().position(|(open, _)| *open == layer).map(|at| self.open.swap_remove(at).1);
        self.store.finish_fetch(&*self.backend, &Stream(0), layer, &mut runs)?;
        let wanted: HashMap<(usize, usize), _> =
            open.unwrap_or_default().into_iter().map(|(m, may)| ((m.head as usize, m.to as usize), (m, may))).collect();
        for head in 0..geometry.kv_heads {
            for row in 0..TARGET {
                let bytes = geometry.row_bytes();
                // SAFETY: row `row % tokens` of a run of `tokens` rows.
                let got = unsafe {
                    std::slice::from_raw_parts(runs.run_mut(row / tokens, head).add(row % tokens * bytes), bytes)
                };
                match wanted.get(&(head, row)) {
                    Some((m, may)) => assert!(may.iter().any(|may| may == got), "layer {layer}, {m:?} is wrong"),
                    None => assert!(got.iter().all(|&b| b == 0xa5), "row {row} of head {head} was touched"),
                }
            }
        }
        Ok(())
    }

    fn truncate(&mut self, rows: usize) {
        self.store.truncate(rows);
        self.open.clear();
        self.whole.clear();
        self.entries.retain(|&(_, _, row), _| row < rows);
        self.rows.iter_mut().for_each(|r| *r = rows.min(*r));
        self.begin_step();
    }

    pub(super) fn begin_step(&mut self) {
        let rows = self.rows.iter().copied().min().unwrap_or(0);
        self.store.begin(rows);
        self.begun = (rows, self.entries.clone());
    }

    /// Rows that have come since the step began stay; they mean nothing to a caller that undoes it.
    pub(super) fn undo(&mut self) -> Result<()> {
        self.store.undo(&*self.backend, &Stream(0))?;
        self.open.clear();
        let (rows, before) = &self.begun;
        self.entries
            .extend(before.iter().filter(|((_, _, row), _)| row < rows).map(|(at, bytes)| (*at, bytes.clone())));
        Ok(())
    }

    fn abandon(&mut self) {
        self.store.abandon_fetches();
        self.open.clear();
        self.whole.clear();
    }

    /// One random call.
    fn step(&mut self, kind: u8, seed: u64, capacity: usize) -> Result<()> {
        let random = &mut Random(seed);
        let layer = random.below(self.geometry.layers);
        let open = self.open.iter().any(|(open, _)| *open == layer);
        match kind {
            0..=2 => {
                let tokens = (1 + random.below(40)).min(capacity - self.rows[layer]);
                if tokens > 0 { self.append(random, layer, tokens) } else { Ok(()) }
            }
            3..=5 if self.rows[layer] > 0 => self.overwrite(random, layer),
            6 | 7 if !open => {
                let sparse = 1 + random.below(4);
                self.begin(random, layer, sparse)
            }
            16 | 17 if !open => self.begin_first(random, layer),
            8..=10 => self.finish(layer),
            11 => {
                let rows = random.below(capacity);
                self.truncate(rows);
                Ok(())
            }
            12 => {
                self.abandon();
                Ok(())
            }
            13 | 14 => {
                self.begin_step();
                Ok(())
            }
            15 => self.undo(),
            _ => Ok(()),
        }
    }

    /// Runs the calls, then fetches all there is.
    pub(super) fn run(&mut self, calls: &[(u8, u64)], capacity: usize) {
        for &(kind, seed) in calls {
            self.step(kind, seed, capacity).unwrap();
        }
        self.abandon();
        for layer in 0..self.geometry.layers {
            self.begin(&mut Random(7), layer, 1).unwrap();
            self.finish(layer).unwrap();
        }
    }
}

pub(super) fn calls() -> impl Strategy<Value = Vec<(u8, u64)>> {
    proptest::collection::vec((0u8..18, any::<u64>()), 1..80)
}

pub(super) fn payloads() -> impl Strategy<Value = Payload> {
    prop_oneof![Just(Payload::Exact), Just(Payload::Int8), Just(Payload::Int4)]
}

pub(super) fn geometries() -> impl Strategy<Value = KvGeometry> {
    let dtypes = prop_oneof![Just(DType::F32), Just(DType::F16), Just(DType::BF16)];
    (1usize..4, 1usize..4, prop_oneof![Just(8usize), Just(37), Just(64), Just(100), Just(129)], dtypes).prop_map(
        |(layers, kv_heads, head_dim, dtype)| KvGeometry { layers, kv_heads, head_dim, extent_tokens: 64, dtype },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn memory_holds_what_was_appended(calls in calls(), payload in payloads(), geometry in geometries()) {
        let backend = backend();
        let pool = Arc::new(Pool::new(Arc::clone(&backend), 0));
        let store = store(&pool, &backend, geometry, payload, &KvTier::Host, 0).unwrap();
        Checked::new(backend, store, geometry, payload).run(&calls, 250);
        prop_assert_eq!(pool.usage().used, 0);
    }
}

#[test]
fn exact_entries_in_memory_are_read_in_place() {
    let backend = backend();
    let pool = Arc::new(Pool::new(Arc::clone(&backend), 0));
    let geometry = KvGeometry { layers: 2, kv_heads: 2, head_dim: 8, extent_tokens: 64, dtype: DType::F32 };
    for (payload, in_place) in [(Payload::Exact, true), (Payload::Int8, false), (Payload::Int4, false)] {
        let mut store = store(&pool, &backend, geometry, payload, &KvTier::Device, 0).unwrap();
        store.reserve(65).unwrap();
        assert_eq!(store.capacity(), 128);
        assert_eq!(store.runs(1).is_some(), in_place);
        assert_eq!(store.bytes(), (2 * 2 * 128 * payload.row_bytes(&geometry), 0));
    }
}

#[test]
fn stores_of_all_shapes_share_a_limit() {
    let backend = backend();
    let geometry = KvGeometry { layers: 1, kv_heads: 1, head_dim: 64, extent_tokens: 64, dtype: DType::BF16 };
    let pool = Arc::new(Pool::new(Arc::clone(&backend), 64 * 256 + 64 * 136));
    let mut exact = RamStore::new(Arc::clone(&pool), &*backend, geometry, Payload::Exact, Memory::Pinned);
    let mut int8 = RamStore::new(Arc::clone(&pool), &*backend, geometry, Payload::Int8, Memory::Device);
    exact.reserve(64).unwrap();
    int8.reserve(64).unwrap();
    let error = int8.reserve(65).unwrap_err();
    assert_eq!(error.code(), crate::ErrorCode::Capacity);
    assert_eq!(int8.capacity(), 64);
    exact.truncate(0);
    int8.reserve(65).unwrap();
}
