//! The hot cache against a list of (row, last use), and its undo against a copy made before the step.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use crate::backend::cpu::{CpuBackend, CpuOptions};
use crate::backend::{DType, KvGeometry};
use crate::kv::{Guard, HotCache, Pool};

const HEADS: usize = 2;

fn cache(slots: usize) -> HotCache {
    let backend = Arc::new(CpuBackend::new(CpuOptions { threads: 1, level: None }).unwrap());
    let geometry = KvGeometry { layers: 1, kv_heads: HEADS, head_dim: 8, extent_tokens: 16, dtype: DType::F32 };
    let mut cache = HotCache::new(Arc::new(Pool::new(backend, 0)), geometry);
    cache.reserve(slots).unwrap();
    cache
}

/// What lies where in one head: slot by slot.
fn contents(cache: &HotCache, head: usize) -> Vec<u32> {
    cache.rows(0, head).to_vec()
}

/// A naive cache: last use by row.
#[derive(Clone, Default)]
struct Naive {
    used: BTreeMap<u32, u32>,
}

impl Naive {
    fn touch(&mut self, row: u32, clock: u32, slots: usize, guard: Guard) {
        if !self.used.contains_key(&row) && self.used.len() == slots {
            let evictable = self.used.iter().filter(|&(&r, &u)| u < clock && r >= guard.below && r < guard.from);
            let oldest = evictable.map(|(_, &u)| u).min().expect("a victim");
            // Which of equally old rows goes is the cache's choice; the test compares ages, not rows.
            let victim =
                *self.used.iter().find(|&(&r, &u)| u == oldest && r >= guard.below && r < guard.from).unwrap().0;
            self.used.remove(&victim);
        }
        self.used.insert(row, clock);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Steps of random selections: what was selected is there afterwards, what is guarded never leaves, the number of
    /// misses is right, slots and rows stay one to one, ages match the naive model, and a step undone leaves no trace.
    #[test]
    fn behaves_like_a_list_of_last_uses(
        steps in prop::collection::vec((prop::collection::vec(any::<prop::sample::Index>(), 0..5), any::<bool>()), 1..80)
    ) {
        let (sinks, window, slots) = (2u32, 4u32, 16usize);
        let mut cache = cache(slots);
        let mut naive: Vec<Naive> = vec![Naive::default(); HEADS];
        let mut length = 0u32;
        let mut clock = 1;
        for (picks, keep) in steps {
            let before: Vec<_> = (0..HEADS).map(|head| contents(&cache, head)).collect();
            let naive_before = naive.clone();
            cache.begin();
            clock += 1;
            let guard = Guard { below: sinks, from: (length + 1).saturating_sub(window) };
            for head in 0..HEADS {
                let end = guard.from.max(sinks).min(length);
                let mut rows: Vec<u32> = Vec::new();
                if end > sinks {
                    rows.extend(picks.iter().map(|pick| sinks + pick.index((end - sinks) as usize) as u32));
                }
                rows.sort_unstable();
                rows.dedup();
                let missing: Vec<u32> = rows.iter().copied().filter(|row| !naive[head].used.contains_key(row)).collect();
                let mut moves = Vec::new();
                let missed = cache.request(0, head, &rows, slots, guard, &mut moves);
                prop_assert_eq!(missed, missing.len());
                prop_assert_eq!(moves.iter().map(|m| m.from).collect::<Vec<_>>(), missing.clone());
                for m in &moves {
                    prop_assert_eq!(cache.slot(0, head, m.from), Some(m.to));
                }
                prop_assert!(moves.is_sorted_by(|a, b| a.to < b.to), "slots are not given in ascending order");
                // Hits first: what is there already is marked before anything gives way.
                let (hits, misses): (Vec<u32>, Vec<u32>) = rows.iter().partition(|row| !missing.contains(row));
                for row in hits.into_iter().chain(misses).chain([length]) {
                    naive[head].touch(row, clock, slots, guard);
                }
                let slot = cache.admit(0, head, length, slots, guard);
                prop_assert_eq!(contents(&cache, head)[slot as usize], length);
                for &row in rows.iter().chain([&length]) {
                    prop_assert!(cache.slot(0, head, row).is_some(), "row {} was used and is gone", row);
                }
                let here = contents(&cache, head);
                prop_assert!(here.len() <= slots);
                prop_assert_eq!(cache.counts(0)[head] as usize, here.len());
                prop_assert_eq!(here.len(), naive[head].used.len());
                for (slot, &row) in here.iter().enumerate() {
                    prop_assert_eq!(cache.slot(0, head, row), Some(slot as u32));
                }
                for row in (0..sinks.min(length)).chain(guard.from.max(sinks).min(length)..length) {
                    prop_assert!(cache.slot(0, head, row).is_some(), "guarded row {} is gone", row);
                }
                // Follow the cache's choice among equals.
                let ages: Vec<u32> = here.iter().map(|row| *naive_age(&naive[head], &naive_before[head], *row)).collect();
                let mut expected: Vec<u32> = naive[head].used.values().copied().collect();
                let mut got = ages.clone();
                expected.sort_unstable();
                got.sort_unstable();
                prop_assert_eq!(got, expected);
                naive[head].used = here.iter().copied().zip(ages).collect();
            }
            if keep {
                length += 1;
            } else {
                let mut moves = Vec::new();
                cache.undo(0, &mut moves);
                naive = naive_before;
                for (head, before) in before.iter().enumerate() {
                    let here = contents(&cache, head);
                    prop_assert_eq!(&here, before);
                    for m in moves.iter().filter(|m| m.head as usize == head) {
                        prop_assert_eq!(here[m.to as usize], m.from);
                    }
                }
            }
        }
    }

    /// After a truncation the rows that are left lie in a prefix of the slots, and every row that changed its slot, and
    /// no other, is to be fetched again.
    #[test]
    fn truncation_keeps_what_is_left(rows in prop::collection::btree_set(0u32..60, 1..30), length in 0u32..60) {
        let mut cache = cache(32);
        let rows: Vec<u32> = rows.into_iter().collect();
        cache.load(0, 0, &rows, &mut Vec::new());
        let mut moves = Vec::new();
        cache.truncate(0, length, &mut moves);
        let mut left = contents(&cache, 0);
        for (slot, &row) in left.iter().enumerate() {
            let moved = moves.iter().any(|m| m.from == row && m.to == slot as u32);
            prop_assert_eq!(moved, rows[slot] != row);
        }
        prop_assert!(moves.iter().all(|m| left[m.to as usize] == m.from));
        left.sort_unstable();
        prop_assert_eq!(left, rows.into_iter().filter(|&row| row < length).collect::<Vec<_>>());
    }
}

/// Age of a row that the cache holds: from the naive model, or from before where the model evicted an equal instead.
fn naive_age<'a>(now: &'a Naive, before: &'a Naive, row: u32) -> &'a u32 {
    now.used.get(&row).or_else(|| before.used.get(&row)).expect("a row that was never used")
}

/// Undoing a step restores ages too: the same step done again makes the same choice.
#[test]
fn a_step_after_an_undo_is_the_same_step() {
    let (slots, guard) = (8, Guard { below: 1, from: 100 });
    let run = |undo: bool| {
        let mut cache = cache(slots);
        cache.load(0, 0, &[0, 1, 2, 3, 4, 5, 6, 7], &mut Vec::new());
        if undo {
            cache.begin();
            cache.request(0, 0, &[1, 6, 7, 20, 21], slots, guard, &mut Vec::new());
            cache.undo(0, &mut Vec::new());
        }
        cache.begin();
        let mut moves = Vec::new();
        cache.request(0, 0, &[5, 30, 31], slots, guard, &mut moves);
        (contents(&cache, 0), moves)
    };
    assert_eq!(run(false), run(true));
}

/// Of equally old slots the lower ones give way, and the misses take them in ascending order.
#[test]
fn misses_take_the_oldest_slots_in_their_order() {
    let (slots, guard) = (6, Guard { below: 1, from: 100 });
    let mut cache = cache(slots);
    // From the first, most valuable row to the last: slots 1 to 5 are ever older.
    cache.load(0, 0, &[0, 1, 2, 3, 4, 5], &mut Vec::new());
    cache.begin();
    cache.request(0, 0, &[3, 5], slots, guard, &mut Vec::new());
    cache.begin();
    let mut moves = Vec::new();
    cache.request(0, 0, &[20, 21], slots, guard, &mut moves);
    // Slots 4 and 2 are the oldest, in this order.
    assert_eq!(moves.iter().map(|m| (m.from, m.to)).collect::<Vec<_>>(), [(20, 2), (21, 4)]);
    cache.begin();
    moves.clear();
    cache.request(0, 0, &[40, 41], slots, guard, &mut moves);
    // Slot 1 is the oldest; 3 and 5 were used in the same step.
    assert_eq!(moves.iter().map(|m| (m.from, m.to)).collect::<Vec<_>>(), [(40, 1), (41, 3)]);
    assert_eq!(contents(&cache, 0), [0, 40, 20, 41, 21, 5]);
}
