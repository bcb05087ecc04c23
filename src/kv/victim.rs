//! Which entry gives way: victims of a full pool (paper §4.4).

use super::Eviction;

/// The rows of one layer and KV head, all of them in use, and what is known of each. A row is overwritten in place, so
/// rows never move and their number only grows.
#[derive(Clone, Debug)]
pub struct Victims {
    kind: Eviction,
    /// When each row's entry came. Ties of everything else go by age, so the clock never stands still.
    born: Vec<u64>,
    /// What `kind` ranks by: time of the last use, or uses counted.
    used: Vec<u64>,
    clock: u64,
}

/// A counter that arrives here halves all of them: eight bits, as in the paper's pool.
const SATURATED: u64 = u8::MAX as u64;

impl Victims {
    /// No rows yet. With [`Eviction::Off`] nothing is kept, and there is never a victim.
    pub fn new(kind: Eviction) -> Victims {
        Victims { kind, born: Vec::new(), used: Vec::new(), clock: 0 }
    }

    /// Rows known.
    pub fn rows(&self) -> usize {
        self.born.len()
    }

    /// Further rows have been appended, in order of age: there are `rows` in all now.
    pub fn grow(&mut self, rows: usize) {
        if self.kind == Eviction::Off {
            return;
        }
        while self.born.len() < rows {
            self.born.push(0);
            self.used.push(0);
            self.inserted(self.born.len() - 1);
        }
    }

    /// Only the first `rows` rows are left (a step that was given up).
    pub fn truncate(&mut self, rows: usize) {
        self.born.truncate(rows);
        self.used.truncate(rows);
    }

    /// A new entry has been written over the one in `row`: the youngest, and not used yet.
    pub fn inserted(&mut self, row: usize) {
        if self.kind == Eviction::Off {
            return;
        }
        self.clock += 1;
        self.born[row] = self.clock;
        self.used[row] = if self.kind == Eviction::Lru { self.clock } else { 0 };
    }

    /// These rows, each once, have been selected by one step.
    pub fn used(&mut self, rows: &[u32]) {
        match self.kind {
            Eviction::Off | Eviction::Fifo => {}
            Eviction::Lru => {
                self.clock += 1;
                rows.iter().for_each(|&row| self.used[row as usize] = self.clock);
            }
            Eviction::Counter => {
                for &row in rows {
                    self.used[row as usize] += 1;
                    if self.used[row as usize] == SATURATED {
                        self.used.iter_mut().for_each(|count| *count /= 2);
                    }
                }
            }
        }
    }

    /// The row to overwrite: of those that are not protected the oldest, the one used longest ago, or the one used least
    /// often, the older where they tie. `None` when every row is protected, or nothing is ever evicted.
    pub fn pick(&self, protected: impl Fn(u32) -> bool) -> Option<u32> {
        let rank = |&row: &u32| {
            let row = row as usize;
            match self.kind {
                Eviction::Off | Eviction::Fifo => (0, self.born[row]),
                Eviction::Lru | Eviction::Counter => (self.used[row], self.born[row]),
            }
        };
        (0..self.born.len() as u32).filter(|&row| !protected(row)).min_by_key(rank)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashSet;

    const KINDS: [Eviction; 3] = [Eviction::Fifo, Eviction::Lru, Eviction::Counter];

    /// The same rules over a history that is read anew for every question.
    #[derive(Default)]
    struct Naive {
        /// What has happened: `None` for a new entry in the row, `Some(step)` for a use of it by that step.
        events: Vec<(u32, Option<usize>)>,
    }

    impl Naive {
        fn pick(&self, kind: Eviction, protected: &HashSet<u32>) -> Option<u32> {
            let rows: HashSet<u32> = self.events.iter().map(|e| e.0).collect();
            let born = |row| self.events.iter().rposition(|&(r, use_)| r == row && use_.is_none()).unwrap();
            let last = |row| {
                let use_ = self.events.iter().rposition(|&(r, use_)| r == row && use_.is_some());
                // A step uses all of its rows at one time: that of its first.
                let time = use_.map(|at| self.events.iter().position(|e| e.1 == self.events[at].1).unwrap());
                time.filter(|&t| t > born(row)).unwrap_or(born(row))
            };
            let count = |row: u32| {
                let mut counts = std::collections::HashMap::<u32, u32>::new();
                for &(r, use_) in &self.events {
                    if use_.is_none() {
                        counts.insert(r, 0);
                        continue;
                    }
                    *counts.get_mut(&r).unwrap() += 1;
                    if counts[&r] == 255 {
                        counts.values_mut().for_each(|c| *c >>= 1);
                    }
                }
                counts[&row] as usize
            };
            let rank = |row: u32| match kind {
                Eviction::Lru => last(row),
                Eviction::Counter => count(row),
                _ => 0,
            };
            rows.into_iter().filter(|row| !protected.contains(row)).min_by_key(|&row| (rank(row), born(row)))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn victims_equal_a_history(
            rows in 1usize..12,
            steps in proptest::collection::vec((any::<u16>(), any::<u16>(), 1usize..150), 1..12),
        ) {
            for kind in KINDS {
                let (mut victims, mut naive) = (Victims::new(kind), Naive::default());
                victims.grow(rows);
                naive.events.extend((0..rows as u32).map(|row| (row, None)));
                let mut step = 0;
                for &(used, protected, times) in &steps {
                    let set = |bits: u16| (0..rows as u32).filter(|row| bits >> row & 1 == 1).collect::<Vec<_>>();
                    for _ in 0..times {
                        step += 1;
                        victims.used(&set(used));
                        naive.events.extend(set(used).into_iter().map(|row| (row, Some(step))));
                    }
                    let protected: HashSet<u32> = set(protected).into_iter().collect();
                    let picked = victims.pick(|row| protected.contains(&row));
                    prop_assert_eq!(picked, naive.pick(kind, &protected), "{:?}", kind);
                    if let Some(row) = picked {
                        victims.inserted(row as usize);
                        naive.events.push((row, None));
                    }
                }
            }
        }
    }

    #[test]
    fn k_evictions_take_k_distinct_entries() {
        for kind in KINDS {
            let (rows, sinks, window, k) = (100usize, 4u32, 8usize, 60);
            let mut victims = Victims::new(kind);
            victims.grow(rows);
            let mut entries: Vec<usize> = (0..rows).collect(); // row -> token
            for token in rows..rows + k {
                victims.used(&[(token * 7 % rows) as u32, (token * 13 % 50) as u32]);
                let protected = |row: u32| row < sinks || entries[row as usize] + window >= token;
                let row = victims.pick(protected).unwrap();
                assert!(!protected(row));
                entries[row as usize] = token;
                victims.inserted(row as usize);
            }
            let left: HashSet<usize> = entries.iter().copied().collect();
            assert_eq!((0..rows + k).filter(|token| !left.contains(token)).count(), k, "{kind:?}");
            assert!((0..sinks as usize).chain(rows + k - window..rows + k).all(|token| left.contains(&token)));
        }
    }

    #[test]
    fn nothing_gives_way_where_nothing_may() {
        let mut victims = Victims::new(Eviction::Lru);
        victims.grow(3);
        assert_eq!(victims.pick(|_| true), None);
        let mut off = Victims::new(Eviction::Off);
        off.grow(3);
        off.used(&[1]);
        assert_eq!(off.pick(|_| false), None);
    }
}
