//! Which entry gives way: victims of a full pool (paper §4.4).

use super::Eviction;

/// The rows of one layer and KV head, all of them in use, and what is known of each. A row is overwritten in place, so
/// rows never move and their number only grows.
///
/// What a step changes is written down, once for each row, so that a step that fails is undone exactly
/// ([`Victims::undo`]): which entry gives way next depends on it.
#[derive(Clone, Debug)]
pub struct Victims {
    kind: Eviction,
    /// When each row's entry came. Ties of everything else go by age, so the clock never stands still.
    born: Vec<u32>,
    /// What `kind` ranks by: time of the last use, or uses counted.
    used: Vec<u32>,
    clock: u32,
    /// The step in which each row was last saved.
    stamps: Vec<u32>,
    /// Rows as they were when the step began, with `born` and `used`.
    saved: Vec<(u32, u32, u32)>,
    step: u32,
    /// Rows, and the clock, when the step began.
    begun: (usize, u32),
}

/// A counter that arrives here halves all of them: eight bits, as in the paper's pool.
const SATURATED: u32 = u8::MAX as u32;

impl Victims {
    /// No rows yet. With [`Eviction::Off`] nothing is kept, and there is never a victim.
    pub fn new(kind: Eviction) -> Victims {
        Victims {
            kind,
            born: Vec::new(),
            used: Vec::new(),
            clock: 0,
            stamps: Vec::new(),
            saved: Vec::new(),
            step: 1,
            begun: (0, 0),
        }
    }

    /// Rows known.
    pub fn rows(&self) -> usize {
        self.born.len()
    }

    /// A new step begins; the last one can no longer be undone.
    pub fn begin(&mut self) {
        self.saved.clear();
        self.step += 1;
        self.begun = (self.born.len(), self.clock);
    }

    /// Takes back what this step has changed.
    pub fn undo(&mut self) {
        let (rows, clock) = self.begun;
        for (row, born, used) in self.saved.drain(..) {
            (self.born[row as usize], self.used[row as usize]) = (born, used);
            self.stamps[row as usize] = 0;
        }
        self.truncate(rows);
        self.clock = clock;
    }

    /// Remembers a row that is about to change.
    fn save(&mut self, row: usize) {
        if row < self.begun.0 && self.stamps[row] != self.step {
            self.stamps[row] = self.step;
            self.saved.push((row as u32, self.born[row], self.used[row]));
        }
    }

    /// Further rows have been appended, in order of age: there are `rows` in all now.
    pub fn grow(&mut self, rows: usize) {
        if self.kind == Eviction::Off {
            return;
        }
        while self.born.len() < rows {
            self.born.push(0);
            self.used.push(0);
            self.stamps.push(self.step); // as if saved: there is nothing to go back to
            self.inserted(self.born.len() - 1);
        }
    }

    /// Only the first `rows` rows are left.
    pub fn truncate(&mut self, rows: usize) {
        self.born.truncate(rows);
        self.used.truncate(rows);
        self.stamps.truncate(rows);
    }

    /// A new entry has been written over the one in `row`: the youngest, and not used yet.
    pub fn inserted(&mut self, row: usize) {
        if self.kind == Eviction::Off {
            return;
        }
        self.save(row);
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
                for &row in rows {
                    self.save(row as usize);
                    self.used[row as usize] = self.clock;
                }
            }
            Eviction::Counter => {
                for &row in rows {
                    self.save(row as usize);
                    self.used[row as usize] += 1;
                    if self.used[row as usize] == SATURATED {
                        (0..self.used.len()).for_each(|row| self.save(row));
                        self.used.iter_mut().for_each(|count| *count /= 2);
                    }
                }
            }
        }
    }

    /// The row to overwrite: of those that are not protected the oldest, the one used longest ago, or the one used least
    /// often, the older where they tie. `None` when every row is protected, or nothing is ever evicted.
    pub fn pick(&self, protected: impl Fn(u32) -> bool) -> Option<u32> {
        let by_use = matches!(self.kind, Eviction::Lru | Eviction::Counter);
        let mut best = None;
        let mut least = u64::MAX;
        for (row, (&used, &born)) in (0..).zip(self.used.iter().zip(&self.born)) {
            let rank = if by_use { u64::from(used) << 32 } else { 0 } | u64::from(born);
            // Few rows are better than all before them, and only those are asked for.
            if rank < least && !protected(row) {
                (best, least) = (Some(row), rank);
            }
        }
        best
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
                    // A step that is given up leaves no trace.
                    victims.begin();
                    let before = (victims.born.clone(), victims.used.clone(), victims.clock);
                    victims.grow(rows + times % 3);
                    for _ in 0..times {
                        victims.used(&set(used.rotate_left(3)));
                        victims.pick(|row| protected.contains(&row)).into_iter().for_each(|row| victims.inserted(row as usize));
                    }
                    victims.undo();
                    prop_assert_eq!((victims.born.clone(), victims.used.clone(), victims.clock), before);
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
