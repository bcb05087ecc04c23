//! Steps that are given up after they have overwritten entries: the hot cache over several tokens, and the index.

use std::sync::Arc;

use proptest::prelude::*;

use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::{Backend, DType, IndexBits, IndexGeometry, KvGeometry, Place, Stream};
use crate::kv::{Guard, HotCache, Pool, SequenceIndex};

const HEADS: usize = 2;
const SLOTS: usize = 9;
const GUARD: Guard = Guard { below: 2, from: u32::MAX };

fn backend() -> Arc<dyn Backend> {
    Arc::new(CpuBackend::new(CpuOptions { threads: 1, level: None }).unwrap())
}

/// One token: what it selects, then its own row, over that of a victim. What it used stays, what was replaced is gone.
fn token(cache: &mut HotCache, row: u32, picks: &[u32], victim: u32) {
    let victim = 2 + victim % (row - 2);
    cache.next_token();
    for head in 0..HEADS {
        let mut rows: Vec<u32> = picks.iter().map(|pick| 2 + pick % (row - 2)).filter(|&row| row != victim).collect();
        rows.sort_unstable();
        rows.dedup();
        cache.request(0, head, &rows, SLOTS, GUARD, &mut Vec::new());
        let here = cache.slot(0, head, victim);
        let slot = cache.admit_over(0, head, victim, row, SLOTS, GUARD);
        assert!(here.is_none_or(|here| here == slot));
        assert_eq!((cache.slot(0, head, victim), cache.slot(0, head, row)), (None, Some(slot)));
        assert!(rows.iter().all(|&row| cache.slot(0, head, row).is_some()));
        assert!(cache.counts(0)[head] as usize <= SLOTS);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// After the undo of a step of many tokens each slot holds what it held, everything that differed is fetched again
    /// once, and what comes next is what would have come.
    #[test]
    fn a_step_of_many_tokens_leaves_no_trace(
        before in prop::collection::vec((prop::collection::vec(any::<u32>(), 0..4), 2u32..40), 0..20),
        given_up in prop::collection::vec((prop::collection::vec(any::<u32>(), 0..4), 2u32..60), 1..30),
        loads: bool,
        after in prop::collection::vec((prop::collection::vec(any::<u32>(), 0..4), 2u32..60), 0..20),
    ) {
        let geometry = KvGeometry { layers: 1, kv_heads: HEADS, head_dim: 8, extent_tokens: 16, dtype: DType::F32 };
        let run = |undo: bool| {
            let mut cache = HotCache::new(Arc::new(Pool::new(backend(), 0)), geometry);
            cache.reserve(SLOTS).unwrap();
            let mut row = 40;
            for head in 0..HEADS {
                cache.load(0, head, &[0, 1, 5, 7, 8], &mut Vec::new());
            }
            for (picks, victim) in &before {
                cache.begin();
                token(&mut cache, row, picks, *victim);
                row += 1;
            }
            let rows = |cache: &HotCache| -> Vec<Vec<u32>> {
                (0..HEADS).map(|head| cache.rows(0, head).to_vec()).collect()
            };
            if undo {
                cache.begin();
                let held = rows(&cache);
                if loads {
                    (0..HEADS).for_each(|head| cache.load(0, head, &[3, 0, 1], &mut Vec::new()));
                }
                for (i, (picks, victim)) in given_up.iter().enumerate() {
                    token(&mut cache, row + i as u32, picks, *victim);
                }
                let changed = rows(&cache);
                let mut moves = Vec::new();
                cache.undo(0, &mut moves);
                assert_eq!(rows(&cache), held);
                for (head, (held, changed)) in held.iter().zip(&changed).enumerate() {
                    let mut fetched: Vec<u32> =
                        moves.iter().filter(|m| m.head as usize == head).map(|m| m.to).collect();
                    let count = fetched.len();
                    fetched.sort_unstable();
                    fetched.dedup();
                    assert_eq!(fetched.len(), count, "a slot is fetched twice");
                    for (slot, row) in held.iter().enumerate() {
                        let differs = changed.get(slot) != Some(row);
                        assert!(!differs || fetched.contains(&(slot as u32)), "slot {slot} is not fetched");
                    }
                }
                assert!(moves.iter().all(|m| held[m.head as usize][m.to as usize] == m.from));
            }
            let mut seen = Vec::new();
            for (picks, victim) in &after {
                cache.begin();
                token(&mut cache, row, picks, *victim);
                row += 1;
                seen.push(rows(&cache));
            }
            seen
        };
        prop_assert_eq!(run(true), run(false));
    }

    /// The rows that had partial keys have them again, bit for bit; a second step is undone to where it began.
    #[test]
    fn an_index_gets_its_partial_keys_back(
        rows in prop::collection::vec((0u32..100, 0u32..100), 1..12),
        kept in 0usize..12,
        full: bool,
    ) {
        let backend = backend();
        let bits = if full { IndexBits::Full } else { IndexBits::Four };
        let geometry = IndexGeometry { layers: 2, kv_heads: HEADS, columns: 5, extent_tokens: 64, bits };
        let mut index = SequenceIndex::new(Arc::new(Pool::new(backend.clone(), 0)), geometry);
        index.reserve(100).unwrap();
        // Each seed below 23 has a step of its own from one value to the next, so no key of one seed is one of another's.
        let keys = |count: usize, seed: usize| {
            let values = (0..count * HEADS * 5).map(|i| ((i * (seed + 1)) % 23) as f32 - 11.0);
            let bytes: Vec<u8> = values.flat_map(f32::to_ne_bytes).collect();
            let mut buffer = backend.allocate(bytes.len(), Place::Device, "a test").unwrap();
            backend.upload(&Stream(0), &bytes, &mut buffer, 0).unwrap();
            buffer
        };
        let bytes = |index: &SequenceIndex| -> Vec<u8> {
            let runs = (0..2).flat_map(|layer| (0..2).flat_map(move |extent| (0..HEADS).map(move |head| (layer, extent, head))));
            runs.flat_map(|(layer, extent, head)| {
                // SAFETY: a run of an extent, on the CPU.
                unsafe { std::slice::from_raw_parts(index.layer(layer).run(extent, head), geometry.run_bytes()) }.to_vec()
            })
            .collect()
        };
        for layer in 0..2 {
            let keys = keys(100, layer);
            let keys = keys.rows(DType::F32, 100, HEADS * 5);
            backend.index_append(&Stream(0), keys, &mut index.layer_mut(layer), 0).unwrap();
        }
        let kept = kept.min(rows.len());
        let mut expected = bytes(&index);
        for (i, &(a, b)) in rows.iter().enumerate() {
            if i == 0 || i == kept {
                index.begin(100);
                expected = bytes(&index);
            }
            let keys = keys(1, 2 + i);
            index.overwrite(&*backend, &Stream(0), i % 2, keys.rows(DType::F32, 1, HEADS * 5), &[a, b]).unwrap();
        }
        prop_assert!(bytes(&index) != expected);
        index.undo(&*backend, &Stream(0)).unwrap();
        prop_assert_eq!(bytes(&index), expected);
    }
}
