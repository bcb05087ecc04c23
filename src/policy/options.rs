//! What a caller may choose about a session's KV: the policy, where its entries live, and the policy's own settings.

use std::path::PathBuf;

use crate::kv::{Eviction, KvTier, Payload};

/// A number of tokens, absolute or relative to the tokens held.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Tokens.
    Tokens(usize),
    /// A share of the tokens that the sequence holds, 0 to 1.
    Share(f32),
}

impl Budget {
    /// In tokens, for a sequence of `length` tokens.
    pub fn tokens(self, length: usize) -> usize {
        match self {
            Budget::Tokens(tokens) => tokens,
            Budget::Share(share) => (f64::from(share) * length as f64).round() as usize,
        }
    }
}

/// The two shapes of `infinigen`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InfinigenMode {
    /// ALGORITHM.md §7.
    #[default]
    Default,
    /// The paper's own, and nothing else.
    Paper,
}

/// The basis that partial keys are columns of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum IndexBasis {
    /// Balanced over queries and keys rotated to random positions (§7.1); leading columns.
    #[default]
    Balanced,
    /// The paper's skew (§2); columns chosen from the prompt.
    Skewed,
    /// The head's own columns, chosen from the prompt; all of them at a ratio of 1.
    Plain,
    /// The paper's skew by the prompt's own queries in place of a calibration text's; columns chosen from the prompt.
    Prompt,
}

/// What predicts a layer's queries from the layer before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Predictor {
    /// The layer's query weight corrected by ridge regression (§7.2).
    #[default]
    Fitted,
    /// The layer's own query weight on the previous layer's normalised input (paper).
    Own,
    /// The layer's own query weight, on the previous layer's input normalised by this layer's norm.
    Renormalised,
    /// The true query, known only when it is too late: the oracle for tests.
    Exact,
}

/// How rows are picked from speculated scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// A fixed share of the tokens.
    Share(f32),
    /// Every token whose speculated log-probability exceeds −b, at most a share of the tokens.
    Probability {
        /// b.
        below: f32,
        /// Most, as a share of the tokens.
        most: f32,
    },
    /// The paper's mean count over the heads, at most a share of the tokens.
    Paper {
        /// α.
        alpha: f32,
        /// Most, as a share of the tokens.
        most: f32,
    },
    /// Random tokens, spread evenly over the sequence, whatever the scores say (which are computed all the same). For
    /// measuring: random weights have scores that say nothing.
    Random {
        /// How many.
        count: Budget,
        /// How many of them are others in the next step, as a share of them.
        renewed: f32,
    },
    /// What a trace selected ([`InfinigenOptions::replay`]), stretched to the sequence; scores are computed all the same.
    /// For measuring random weights with the hits and misses of real text.
    Replay {
        /// Most, as a share of the tokens.
        most: f32,
    },
}

/// Settings of `infinigen`.
#[derive(Clone, Debug, PartialEq)]
pub struct InfinigenOptions {
    /// Sets what the mode fixes: see [`InfinigenOptions::of`].
    pub mode: InfinigenMode,
    /// Basis of the index.
    pub basis: IndexBasis,
    /// Columns of the index over the head dimension, r.
    pub ratio: f32,
    /// Bits of an index column: 4, 8 or 32.
    pub index_bits: u32,
    /// What predicts queries.
    pub predictor: Predictor,
    /// How rows are picked.
    pub rule: Rule,
    /// First tokens, always attended.
    pub sinks: usize,
    /// Last tokens, always attended.
    pub window: usize,
    /// First layers, attended in full from device memory.
    pub resident_layers: usize,
    /// Entries that each layer and KV head keeps on the device: sinks, window and hot cache together.
    pub cache: Budget,
    /// Fewest of them: a sequence as short as this is attended in full.
    pub cache_least: usize,
    /// Attend everything that is on the device, selected or not.
    pub attend_cache: bool,
    /// Attend also one entry that stands for everything else, with the mean value and the weight that speculation gives
    /// to it. Not with the paper's rule.
    pub tail: bool,
    /// Score once more when a layer's own queries have come, and attend of what they select and the step would not attend
    /// the best entries, at most this share of the tokens in each KV head; 0 for none.
    pub correct: f32,
    /// The trace of [`Rule::Replay`].
    pub replay: Option<PathBuf>,
}

impl InfinigenOptions {
    /// The settings of a mode.
    pub fn of(mode: InfinigenMode) -> InfinigenOptions {
        match mode {
            InfinigenMode::Default => InfinigenOptions {
                mode,
                basis: IndexBasis::Balanced,
                ratio: 0.5,
                index_bits: 4,
                predictor: Predictor::Fitted,
                rule: Rule::Probability { below: 7.0, most: 0.13 },
                sinks: 4,
                window: 64,
                resident_layers: 2,
                cache: Budget::Share(0.2),
                cache_least: 320,
                attend_cache: true,
                tail: true,
                correct: 0.0,
                replay: None,
            },
            InfinigenMode::Paper => InfinigenOptions {
                mode,
                basis: IndexBasis::Skewed,
                ratio: 0.3,
                index_bits: 32,
                predictor: Predictor::Own,
                rule: Rule::Paper { alpha: 4.0, most: 0.2 },
                sinks: 0,
                window: 0,
                resident_layers: 2,
                cache: Budget::Share(0.25),
                cache_least: 64,
                attend_cache: false,
                tail: false,
                correct: 0.0,
                replay: None,
            },
        }
    }
}

impl Default for InfinigenOptions {
    fn default() -> Self {
        InfinigenOptions::of(InfinigenMode::Default)
    }
}

/// A session's policy and everything that can be chosen about it.
#[derive(Clone, Debug)]
pub struct PolicyOptions {
    /// Which policy.
    pub kind: super::PolicyKind,
    /// Where entries live.
    pub tier: KvTier,
    /// How they are stored there.
    pub payload: Payload,
    /// `window`, `h2o`: tokens attended, sinks included (`h2o`: half of them recent).
    pub budget: Budget,
    /// `window`: first tokens, always attended.
    pub sinks: usize,
    /// `window`: first layers, whose tokens are all attended.
    pub resident_layers: usize,
    /// What happens when the pool is full.
    pub eviction: Eviction,
    /// `infinigen`: most entries a layer and KV head of the session keeps in the pool, 0 for as many as there is room.
    /// Eviction begins here, or sooner where there is no room; without it a step that would pass it finds none.
    pub pool_tokens: usize,
    /// Settings of `infinigen`.
    pub infinigen: InfinigenOptions,
    /// Write what was speculated, selected, hit, missed and fetched to this file.
    pub trace: Option<PathBuf>,
}

impl Default for PolicyOptions {
    fn default() -> Self {
        PolicyOptions {
            kind: super::PolicyKind::default(),
            tier: KvTier::default(),
            payload: Payload::default(),
            budget: Budget::Share(0.2),
            sinks: 4,
            resident_layers: 2,
            eviction: Eviction::default(),
            pool_tokens: 0,
            infinigen: InfinigenOptions::default(),
            trace: None,
        }
    }
}

/// What a policy has done since the session began or since the last reset. Counts are of entries: one is the key and
/// value of one token of one KV head of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KvCounters {
    /// Decode steps.
    pub steps: u64,
    /// Entries of past tokens that the policy selected (or attended, where it does not select), over speculated layers.
    pub selected: u64,
    /// Entries of past tokens that there were, over speculated layers.
    pub candidates: u64,
    /// Entries attended, over all layers.
    pub attended: u64,
    /// Entries that full attention would have attended, over all layers.
    pub held: u64,
    /// Selected entries that were on the device already.
    pub hits: u64,
    /// Selected entries that were not, and were fetched.
    pub misses: u64,
    /// Selected entries that a correction has added.
    pub corrected: u64,
    /// Bytes fetched from the host tier.
    pub host_bytes: u64,
    /// Bytes read from the file tier, as the entries need them.
    pub file_bytes: u64,
    /// Bytes that the file tier really read: whole blocks, gaps included.
    pub file_read_bytes: u64,
    /// Seconds that reads from the file tier were in flight.
    pub read_seconds: f64,
    /// Seconds that a step stood still for them.
    pub wait_seconds: f64,
    /// Entries overwritten because the pool was full.
    pub evicted: u64,
}
