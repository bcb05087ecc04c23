//! What a trace selected, stretched to another sequence: for measuring with the hits and misses of real text.

use super::Buffer;

/// The lists of rows that one step and layer of a trace selected, on the device, and how they are stretched.
///
/// A trace's row below `first` stands for none. Its next `narrow` rows stand for the sequence's next `wide`: row
/// `first + k` for the rows from `first + k · wide / narrow` to `first + (k + 1) · wide / narrow`, each rounded down, which
/// the neighbours meet. Later rows stand for one row each, `shift` rows on.
#[derive(Clone, Copy, Debug)]
pub struct Replay<'a> {
    /// Words of 32 bits.
    pub table: &'a Buffer,
    /// Where in it the lists' ends are told: for each KV head of the trace the word where its rows begin and the one where
    /// they end.
    pub lists: usize,
    /// KV heads of the trace: head h of H replays that of h · heads / H.
    pub heads: u32,
    /// See above.
    pub first: u32,
    /// See above.
    pub narrow: u32,
    /// See above.
    pub wide: u32,
    /// May be below 0, and then wraps.
    pub shift: u32,
}

impl Replay<'_> {
    /// The trace's KV head that a KV head of `kv_heads` replays.
    pub fn head(&self, head: usize, kv_heads: usize) -> usize {
        head * self.heads as usize / kv_heads
    }

    /// The rows that a row of the trace stands for: from the first to before the second.
    pub fn stretch(&self, row: u32) -> (u32, u32) {
        let Some(k) = row.checked_sub(self.first) else { return (0, 0) };
        if k >= self.narrow {
            let row = row.wrapping_add(self.shift);
            return (row, row.saturating_add(1));
        }
        let at = |k: u32| self.first + (u64::from(k) * u64::from(self.wide) / u64::from(self.narrow)) as u32;
        (at(k), at(k + 1))
    }

    /// Appends the rows that the ascending `rows` of a trace stand for, as far as they are among `from..to`, until there
    /// are `most`.
    pub fn stretched(&self, rows: &[u32], from: usize, to: usize, most: usize, out: &mut Vec<u32>) {
        let all = rows.iter().flat_map(|&row| {
            let (begin, end) = self.stretch(row);
            begin.max(from as u32)..end.min(to as u32)
        });
        out.extend(all.take(most));
    }
}
