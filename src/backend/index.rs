//! The speculation index: partial keys of every token, and what a rehearsal on it selects.

use super::{Buffer, Replay};

/// How an index stores a partial key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IndexBits {
    /// 4 bits a column, symmetric, with one scale a row.
    #[default]
    Four,
    /// 8 bits a column, symmetric, with one scale a row.
    Eight,
    /// f32: for tests, and for the paper's exact partial keys.
    Full,
}

/// The shape of an index extent: as of [`super::KvGeometry`], with partial keys in the place of rows of K and V.
///
/// How rows lie in a run is the backend's own: it may interleave the tokens of a block, so a run is read and written
/// through the backend's operations only. Only its size is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IndexGeometry {
    /// Layers whose runs an extent holds.
    pub layers: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Columns of a partial key, d'.
    pub columns: usize,
    /// Tokens of a run, a multiple of 64.
    pub extent_tokens: usize,
    /// Type of the columns.
    pub bits: IndexBits,
}

impl IndexGeometry {
    /// Columns rounded up to what a row takes: whole groups of eight.
    pub const fn padded(&self) -> usize {
        self.columns.next_multiple_of(8)
    }

    /// Bytes of one row's columns.
    pub const fn row_bytes(&self) -> usize {
        match self.bits {
            IndexBits::Four => self.padded() / 2,
            IndexBits::Eight => self.padded(),
            IndexBits::Full => 4 * self.padded(),
        }
    }

    /// Bytes of one run: each row's columns and its scale, an f32.
    pub const fn run_bytes(&self) -> usize {
        self.extent_tokens * (self.row_bytes() + 4)
    }

    /// Bytes of one extent, all layers and heads.
    pub const fn extent_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.run_bytes()
    }

    /// Extents that hold `tokens` tokens.
    pub const fn extents(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.extent_tokens)
    }
}

macro_rules! index_runs {
    ($(#[$doc:meta])* $name:ident, $extents:ty) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name<'a> {
            extents: $extents,
            geometry: IndexGeometry,
            offset: usize,
        }

        impl<'a> $name<'a> {
            /// The runs of `layer` in `extents`, each of which is `geometry.extent_bytes()` long.
            pub fn new(extents: $extents, geometry: IndexGeometry, layer: usize) -> $name<'a> {
                assert!(layer < geometry.layers, "layer {layer} of {}", geometry.layers);
                assert!(extents.iter().all(|e| e.bytes() >= geometry.extent_bytes()), "an extent is too short");
                $name { extents, geometry, offset: layer * geometry.kv_heads * geometry.run_bytes() }
            }

            /// The extents' shape.
            pub fn geometry(&self) -> &IndexGeometry {
                &self.geometry
            }

            /// Tokens that fit the extents.
            pub fn capacity(&self) -> usize {
                self.extents.len() * self.geometry.extent_tokens
            }

            /// Number of extents.
            pub fn extents(&self) -> usize {
                self.extents.len()
            }

            /// Address of extent `extent`.
            pub fn extent(&self, extent: usize) -> *const u8 {
                self.extents[extent].address()
            }

            /// Bytes from an extent's start to the layer's first run.
            pub fn layer_offset(&self) -> usize {
                self.offset
            }

            /// Bytes from an extent's start to the run of `head`.
            fn run_offset(&self, head: usize) -> usize {
                assert!(head < self.geometry.kv_heads);
                self.offset + head * self.geometry.run_bytes()
            }
        }
    };
}

index_runs!(
    /// Where one layer of one sequence keeps its partial keys.
    #[derive(Clone, Copy)]
    IndexRuns, &'a [Buffer]
);
index_runs!(
    /// As [`IndexRuns`], for writing.
    IndexRunsMut, &'a mut [Buffer]
);

impl IndexRuns<'_> {
    /// Address of the run of `head` in extent `extent`.
    pub fn run(&self, extent: usize, head: usize) -> *const u8 {
        let offset = self.run_offset(head);
        // SAFETY: `new` saw that every extent holds all runs of all layers, and `head` is below their number.
        unsafe { self.extents[extent].address().add(offset) }
    }
}

impl IndexRunsMut<'_> {
    /// Address of the run of `head` in extent `extent`.
    pub fn run_mut(&mut self, extent: usize, head: usize) -> *mut u8 {
        let offset = self.run_offset(head);
        // SAFETY: as in `IndexRuns::run`.
        unsafe { self.extents[extent].address_mut().add(offset) }
    }
}

/// How a rehearsal picks rows.
#[derive(Clone, Copy, Debug)]
pub enum Selection<'a> {
    /// Each KV head its `count` best rows, by the largest speculated probability that a query head of its group gives.
    Count {
        /// Rows a KV head.
        count: usize,
    },
    /// Each KV head the rows to which a query head of its group gives a log-probability above `-below`; the best
    /// `most` of them where they are more, the best `least` rows where they are fewer.
    Probability {
        /// b, in logits.
        below: f32,
        /// Fewest rows a KV head.
        least: usize,
        /// Most rows a KV head.
        most: usize,
    },
    /// The paper's: per query head count the scores above the largest minus `alpha`; the mean count over all heads, at
    /// most `most`, is what each KV head fetches, its best rows by the largest score of a query head of its group.
    Paper {
        /// α, in logits.
        alpha: f32,
        /// Most rows a KV head.
        most: usize,
    },
    /// Random rows, the same for the same numbers; see [`super::Backend::rehearse`]. Scores are computed and not used.
    Random {
        /// Rows a KV head.
        count: usize,
        /// Where random numbers begin.
        seed: u32,
        /// Which step it is.
        step: u32,
        /// Steps after which a row has given way to another: 1 and all are others in every step.
        period: u32,
    },
    /// The rows that a trace selected. Scores are computed and not used.
    Replay {
        /// Most rows a KV head: the first of them.
        most: usize,
        /// The trace.
        replay: Replay<'a>,
    },
}

/// Which rows [`Selection::Random`] selects: the `j`-th of `count` for a KV head, of rows `from..to`. Every backend
/// selects the same. The rows are in `count` parts, of each of which one is selected; a part's choice lasts for `period`
/// steps, and in every step about as many choose anew.
#[allow(clippy::too_many_arguments, reason = "each is one number")]
pub(super) fn random_row(seed: u32, head: u32, j: u32, count: u32, step: u32, period: u32, from: u32, to: u32) -> u32 {
    let part = scramble(seed ^ scramble(head << 20 ^ j));
    let turn = (step + part % period) / period;
    // Parts stay where they are while a sequence grows by a few tokens.
    let span = to - from;
    let span = if span >= 2048.max(count) { span / 1024 * 1024 } else { span };
    let span = span.max(count);
    let begin = (u64::from(span) * u64::from(j) / u64::from(count)) as u32;
    let end = (u64::from(span) * u64::from(j + 1) / u64::from(count)) as u32;
    from + begin + scramble(part ^ scramble(turn)) % (end - begin)
}

/// A hash of 32 bits.
const fn scramble(x: u32) -> u32 {
    let x = (x ^ x >> 16).wrapping_mul(0x7feb_352d);
    let x = (x ^ x >> 15).wrapping_mul(0x846c_a68b);
    x ^ x >> 16
}

/// One sequence in a rehearsal.
#[derive(Clone, Copy, Debug)]
pub struct Rehearsal<'a> {
    /// Row of `queries`.
    pub row: usize,
    /// The layer's index.
    pub runs: IndexRuns<'a>,
    /// Rows of the index that hold tokens: what probabilities are normalised over.
    pub rows: usize,
    /// Rows that may be selected: `from..to` of them. The others (sinks, the recent window) are attended anyway.
    pub from: usize,
    /// End of the rows that may be selected.
    pub to: usize,
    /// Factor on partial query · partial key that makes it a logit.
    pub scale: f32,
    /// How to pick.
    pub selection: Selection<'a>,
}

/// What a rehearsal selects, and what it knows of it. Reused from step to step.
#[derive(Clone, Debug, Default)]
pub struct Selected {
    /// For each KV head the selected rows, ascending. Rows of equal score are taken in ascending order; a score that is
    /// NaN ranks below all others.
    pub rows: Vec<Vec<u32>>,
    /// Given, where the tail or a correction is wanted: for each KV head the rows of the index that will be attended whether
    /// they are selected or not, each once.
    pub present: Vec<Vec<u32>>,
    /// Given, for a correction: what the rule picks of the rows that are present is left out, and of the others each KV head
    /// keeps the best ones, at most so many.
    pub most_absent: Vec<usize>,
    /// Where `present` is given: for each query head the speculated probability of all rows that are neither present nor
    /// selected, 0 to 1. Not with [`Selection::Paper`], which knows no probabilities.
    pub tail: Vec<f32>,
}
