//! What waits to be launched, written down.

use super::super::block::{Plain, bytes_of};
use super::super::kernels::Function;
use super::super::timer::Label;
use super::LANES;

/// A kernel's launch as it waits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Launch {
    pub(super) function: Function,
    pub(super) grid: [u32; 3],
    pub(super) threads: u32,
    pub(super) shared: u32,
    /// Where its parameters lie in `words`, in words of 8 bytes.
    pub(super) params: usize,
    pub(super) lane: usize,
    /// Where its edges end in `edges`; they begin where those of the launch before end.
    pub(super) edges: usize,
}

/// What a sequence of launches is, without the data in the block.
#[derive(Default)]
pub(super) struct Script {
    pub(super) launches: Vec<Launch>,
    pub(super) words: Vec<u64>,
    /// Launches of other lanes that come before a launch.
    pub(super) edges: Vec<usize>,
    /// What each launch is called, which the launch itself decides.
    pub(super) labels: Vec<Label>,
    /// The last launch of each lane.
    pub(super) last: [Option<usize>; LANES],
    /// Whether launches of the main lane are not to begin early, for those beside it need the room.
    pub(super) crowded: bool,
    pub(super) hash: u64,
}

impl Script {
    pub(super) fn clear(&mut self) {
        self.launches.clear();
        self.words.clear();
        self.edges.clear();
        self.labels.clear();
        self.last = [None; LANES];
        self.crowded = false;
        self.hash = 0;
    }

    /// Adds a launch of `lane` that comes after the launches `after` of other lanes.
    #[allow(clippy::too_many_arguments, reason = "each is one thing")]
    pub(super) fn push<P: Plain>(
        &mut self,
        lane: usize,
        after: &[usize],
        function: Function,
        grid: [u32; 3],
        threads: u32,
        shared: u32,
        params: &P,
    ) {
        let from = self.words.len();
        self.edges.extend(after);
        self.last[lane] = Some(self.launches.len());
        self.launches.push(Launch { function, grid, threads, shared, params: from, lane, edges: self.edges.len() });
        self.words.extend(
            bytes_of(std::slice::from_ref(params))
                .chunks_exact(8)
                .map(|word| u64::from_ne_bytes(word.try_into().expect("chunks of eight"))),
        );
        let shape = [
            function.handle as usize as u64,
            u64::from(grid[0]) << 32 | u64::from(grid[1]),
            u64::from(grid[2]) << 32 | lane as u64,
        ];
        let after = after.iter().map(|&launch| launch as u64);
        for word in shape.into_iter().chain(after).chain(self.words[from..].iter().copied()) {
            self.hash = (self.hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }

    pub(super) fn equals(&self, other: &Script) -> bool {
        self.hash == other.hash
            && self.crowded == other.crowded
            && self.launches == other.launches
            && self.words == other.words
            && self.edges == other.edges
    }

    /// The launches of other lanes that come before launch `i`.
    pub(super) fn edges_of(&self, i: usize) -> &[usize] {
        let from = i.checked_sub(1).map_or(0, |before| self.launches[before].edges);
        &self.edges[from..self.launches[i].edges]
    }
}
