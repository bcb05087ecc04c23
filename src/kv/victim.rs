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
