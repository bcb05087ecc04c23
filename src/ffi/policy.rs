//! What a session attends and where its KV lives: the settings of [`super::session`] that have to do with policies.
//!
//! Only names are turned into values here; ranges are the engine's business (`PolicyOptions::check`).

use std::ffi::c_char;

use super::boundary::{guard, optional_path};
use super::error::kva_error;
use super::options::{self, Options, sized32};
use super::session::kva_session_options;
use crate::kv::{Eviction, FileOptions, KvTier, Payload};
use crate::policy::{Budget, IndexBasis, InfinigenMode, InfinigenOptions, PolicyKind, PolicyOptions, Predictor, Rule};
use crate::{Error, Result};

/// Every layer attends every token. Exact.
pub const KVA_POLICY_FULL: i32 = 0;
/// Every token, from entries of 4 bits a value (FlexGen's compression).
pub const KVA_POLICY_INT4: i32 = 1;
/// Tokens that got much attention so far, and the recent ones; the rest is dropped for good (H2O).
pub const KVA_POLICY_H2O: i32 = 2;
/// The first tokens and the recent ones (StreamingLLM).
pub const KVA_POLICY_WINDOW: i32 = 3;
/// What speculation selects, one layer ahead (InfiniGen).
pub const KVA_POLICY_INFINIGEN: i32 = 4;

/// In device memory (main memory, where the device is the processor). Nothing is ever fetched.
pub const KVA_KV_TIER_DEVICE: i32 = 0;
/// In host memory: pinned for a GPU, plain main memory for the processor.
pub const KVA_KV_TIER_HOST: i32 = 1;
/// In a preallocated file.
pub const KVA_KV_TIER_FILE: i32 = 2;

/// As on the device.
pub const KVA_KV_PAYLOAD_EXACT: i32 = 0;
/// 8 bits a value, symmetric, with a scale for each key and each value vector.
pub const KVA_KV_PAYLOAD_INT8: i32 = 1;
/// 4 bits a value, asymmetric, in groups of 64.
pub const KVA_KV_PAYLOAD_INT4: i32 = 2;

/// Leave the KV file where it is; otherwise it is unlinked as soon as it is open.
pub const KVA_KV_FILE_KEEP: u32 = 1;
/// Go through the page cache instead of direct I/O.
pub const KVA_KV_FILE_BUFFERED: u32 = 2;
/// Keep a checksum of every row, and compare it on every read.
pub const KVA_KV_FILE_CHECKSUM: u32 = 4;

/// Nothing gives way: a step that finds no room is a `KVA_ERROR_CAPACITY` before it begins.
pub const KVA_EVICTION_OFF: i32 = 0;
/// The oldest entry gives way.
pub const KVA_EVICTION_FIFO: i32 = 1;
/// The entry that was selected longest ago.
pub const KVA_EVICTION_LRU: i32 = 2;
/// The entry that was selected least often, by saturating counters that are all halved when one saturates.
pub const KVA_EVICTION_COUNTER: i32 = 3;

/// What serves best, by measurement.
pub const KVA_INFINIGEN_DEFAULT: i32 = 0;
/// The paper's own settings, and nothing else.
pub const KVA_INFINIGEN_PAPER: i32 = 1;

/// Balanced over queries and keys, rotated to random positions; leading columns.
pub const KVA_INDEX_BALANCED: i32 = 0;
/// The paper's skew; columns chosen from the prompt.
pub const KVA_INDEX_SKEWED: i32 = 1;
/// The head's own columns, chosen from the prompt; all of them at a ratio of 1.
pub const KVA_INDEX_PLAIN: i32 = 2;
/// The paper's skew by the prompt's own queries in place of a calibration text's; columns chosen from the prompt.
pub const KVA_INDEX_PROMPT: i32 = 3;

/// The layer's query weight, corrected by ridge regression on the calibration text.
pub const KVA_PREDICTOR_FITTED: i32 = 0;
/// The layer's query weight on the previous layer's normalised input (the paper).
pub const KVA_PREDICTOR_OWN: i32 = 1;
/// The layer's query weight on the previous layer's input, normalised as this layer does.
pub const KVA_PREDICTOR_RENORMALISED: i32 = 2;
/// The true query, which comes too late to prefetch by: how well a perfect predictor would do.
pub const KVA_PREDICTOR_EXACT: i32 = 3;

/// A fixed share of the tokens: `select_share`.
pub const KVA_RULE_SHARE: i32 = 0;
/// Every token whose speculated log-probability is above -`select_below`, at most `select_cap`.
pub const KVA_RULE_PROBABILITY: i32 = 1;
/// As many tokens in each head as the heads have on average within `alpha` of their greatest speculated score, at most
/// `select_cap`.
pub const KVA_RULE_PAPER: i32 = 2;
/// Random tokens, spread evenly over the sequence, whatever the scores say (which are computed all the same). For
/// measuring: random weights have scores that say nothing.
pub const KVA_RULE_RANDOM: i32 = 3;
/// What the trace of another session selected (`replay_path`), stretched to this one, at most `select_cap`; scores are
/// computed all the same. For measuring random weights with the hits and misses of real text: docs/policies.md says how.
pub const KVA_RULE_REPLAY: i32 = 4;

/// b of the probability rule where nobody has said.
const DEFAULT_BELOW: f32 = 7.0;
/// α of the paper's rule where nobody has said.
const DEFAULT_ALPHA: f32 = 4.0;
/// Most of the tokens that a rule without a fixed share selects.
const DEFAULT_CAP: f32 = 0.2;
/// Share of the fixed rule where nobody has said.
const DEFAULT_SHARE: f32 = 0.02;

/// Settings of `KVA_POLICY_INFINIGEN`. Fill it with `kva_infinigen_options_init`, then change fields.
///
/// Shares are of the tokens that a session holds, and greater than 0 unless something else is said.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct kva_infinigen_options {
    /// Set by `kva_infinigen_options_init`.
    pub struct_size: u32,
    /// The mode that the other fields were filled for, one of `KVA_INFINIGEN_...`; to change it, fill them anew.
    pub mode: i32,
    /// Basis of the index, one of `KVA_INDEX_...`. Default: `KVA_INDEX_BALANCED`; paper: `KVA_INDEX_SKEWED`.
    pub basis: i32,
    /// Bits of a number in the index: 4, 8, or 32 (floating point). Default: 4; paper: 32.
    pub index_bits: u32,
    /// Columns of the index as a share of the head dimension, at most 1. Default: 0.5; paper: 0.3.
    pub ratio: f32,
    /// What predicts a layer's queries from the layer before, one of `KVA_PREDICTOR_...`. Default:
    /// `KVA_PREDICTOR_FITTED`; paper: `KVA_PREDICTOR_OWN`.
    pub predictor: i32,
    /// How tokens are selected, one of `KVA_RULE_...`. Default:
    /// `KVA_RULE_PROBABILITY`; paper: `KVA_RULE_PAPER`.
    pub rule: i32,
    /// `KVA_RULE_SHARE`, `KVA_RULE_RANDOM`: share of the tokens to select, at most 1. Default: 0.02.
    pub select_share: f32,
    /// `KVA_RULE_PROBABILITY`: how far below 1 a probability may lie, as a natural logarithm. Default: 7.
    pub select_below: f32,
    /// `KVA_RULE_PAPER`: how far below the greatest a score may lie. Default: 4.
    pub alpha: f32,
    /// `KVA_RULE_PROBABILITY`, `KVA_RULE_PAPER`, `KVA_RULE_REPLAY`: most to select, as a share of the tokens, at most 1. Default: 0.13; paper:
    /// 0.2.
    pub select_cap: f32,
    /// First tokens, always attended. Default: 4; paper: 0.
    pub sinks: u32,
    /// Last tokens, always attended. Default: 64; paper: 0.
    pub window: u32,
    /// First layers, attended in full from device memory; at least 1, unless the predictor is exact. Default: 2.
    pub resident_layers: u32,
    /// Entries that each layer and KV head keeps on the device (sinks, window and cache together), as a share of the
    /// tokens, 0 to 1; not looked at where `cache_tokens` is not 0. Default: 0.2; paper: 0.25.
    pub cache_share: f32,
    /// 1: attend everything that is on the device, selected or not; 0: only what was selected. Default: 1; paper: 0.
    pub attend_cache: u32,
    /// In place of `cache_share`, a number of tokens; 0 (the default) for the share.
    pub cache_tokens: u64,
    /// The cache holds at least this many tokens: a shorter sequence is attended in full. Default: 320; paper: 64.
    pub cache_least: u64,
    /// `KVA_RULE_RANDOM`, in place of `select_share`: a number of tokens; 0 (the default) for the share.
    pub select_tokens: u64,
    /// `KVA_RULE_RANDOM`: how many of the selected tokens are others in the next step, as a share of them. Default: 1.
    pub select_renewed: f32,
    /// 1: attend also one entry that stands for everything else: its value is the mean of all, its weight what speculation
    /// gives to the entries that are not attended; 0: as if they were not there. Not used with
    /// `KVA_RULE_PAPER`. Default: 1; paper: 0.
    pub tail: u32,
    /// Score once more when a layer's own queries have come, and attend of what they select and the step would not attend
    /// the best entries, at most this share of the tokens in each KV head; they are fetched while the step waits. 0: none.
    /// Default: 0; paper: 0.
    pub correct: f32,
    /// Must be 0.
    pub reserved: u32,
    /// `KVA_RULE_REPLAY`: the trace, a file that `trace_path` of a session has made; NULL (the default) for none.
    pub replay_path: *const c_char,
}

sized32!(kva_infinigen_options, versions: [tail: u32, replay_path: *const c_char]);

impl Options for kva_infinigen_options {
    fn defaults() -> Self {
        InfinigenOptions::default().into()
    }
}

impl From<InfinigenOptions> for kva_infinigen_options {
    fn from(options: InfinigenOptions) -> Self {
        let mut select = (DEFAULT_SHARE, DEFAULT_BELOW, DEFAULT_ALPHA, DEFAULT_CAP);
        let mut random = (0, 1.0);
        let rule = match options.rule {
            Rule::Share(share) => {
                select.0 = share;
                KVA_RULE_SHARE
            }
            Rule::Probability { below, most } => {
                (select.1, select.3) = (below, most);
                KVA_RULE_PROBABILITY
            }
            Rule::Paper { alpha, most } => {
                (select.2, select.3) = (alpha, most);
                KVA_RULE_PAPER
            }
            Rule::Random { count, renewed } => {
                random.1 = renewed;
                match count {
                    Budget::Share(share) => select.0 = share,
                    Budget::Tokens(tokens) => random.0 = tokens as u64,
                }
                KVA_RULE_RANDOM
            }
            Rule::Replay { most } => {
                select.3 = most;
                KVA_RULE_REPLAY
            }
        };
        let (cache_share, cache_tokens) = match options.cache {
            Budget::Share(share) => (share, 0),
            Budget::Tokens(tokens) => (0.0, tokens as u64),
        };
        kva_infinigen_options {
            struct_size: size_of::<Self>() as u32,
            mode: match options.mode {
                InfinigenMode::Default => KVA_INFINIGEN_DEFAULT,
                InfinigenMode::Paper => KVA_INFINIGEN_PAPER,
            },
            basis: match options.basis {
                IndexBasis::Balanced => KVA_INDEX_BALANCED,
                IndexBasis::Skewed => KVA_INDEX_SKEWED,
                IndexBasis::Plain => KVA_INDEX_PLAIN,
                IndexBasis::Prompt => KVA_INDEX_PROMPT,
            },
            index_bits: options.index_bits,
            ratio: options.ratio,
            predictor: match options.predictor {
                Predictor::Fitted => KVA_PREDICTOR_FITTED,
                Predictor::Own => KVA_PREDICTOR_OWN,
                Predictor::Renormalised => KVA_PREDICTOR_RENORMALISED,
                Predictor::Exact => KVA_PREDICTOR_EXACT,
            },
            rule,
            select_share: select.0,
            select_below: select.1,
            alpha: select.2,
            select_cap: select.3,
            sinks: options.sinks as u32,
            window: options.window as u32,
            resident_layers: options.resident_layers as u32,
            cache_share,
            attend_cache: options.attend_cache.into(),
            cache_tokens,
            cache_least: options.cache_least as u64,
            select_tokens: random.0,
            select_renewed: random.1,
            tail: options.tail.into(),
            correct: options.correct,
            reserved: 0,
            replay_path: std::ptr::null(),
        }
    }
}

fn unknown(name: &str, value: impl std::fmt::Display, kind: &str) -> Error {
    Error::invalid_argument(format!("{name} is {value}, which is no {kind}"))
}

/// Sizes of the ABI have 64 bits everywhere; one that this machine cannot count to is as good as the greatest.
fn tokens(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

fn budget(share: f32, tokens: u64) -> Budget {
    if tokens == 0 { Budget::Share(share) } else { Budget::Tokens(self::tokens(tokens)) }
}
fn infinigen_mode(value: i32, name: &str) -> Result<InfinigenMode> {
    match value {
        KVA_INFINIGEN_DEFAULT => Ok(InfinigenMode::Default),
        KVA_INFINIGEN_PAPER => Ok(InfinigenMode::Paper),
        mode => Err(unknown(name, mode, "KVA_INFINIGEN mode")),
    }
}

impl TryFrom<kva_infinigen_options> for InfinigenOptions {
    type Error = Error;

    fn try_from(options: kva_infinigen_options) -> Result<InfinigenOptions> {
        options::check_reserved(options.reserved, "options.infinigen")?;
        Ok(InfinigenOptions {
            mode: infinigen_mode(options.mode, "options.infinigen.mode")?,
            basis: match options.basis {
                KVA_INDEX_BALANCED => IndexBasis::Balanced,
                KVA_INDEX_SKEWED => IndexBasis::Skewed,
                KVA_INDEX_PLAIN => IndexBasis::Plain,
                KVA_INDEX_PROMPT => IndexBasis::Prompt,
                basis => return Err(unknown("options.infinigen.basis", basis, "KVA_INDEX")),
            },
            ratio: options.ratio,
            index_bits: options.index_bits,
            predictor: match options.predictor {
                KVA_PREDICTOR_FITTED => Predictor::Fitted,
                KVA_PREDICTOR_OWN => Predictor::Own,
                KVA_PREDICTOR_RENORMALISED => Predictor::Renormalised,
                KVA_PREDICTOR_EXACT => Predictor::Exact,
                predictor => return Err(unknown("options.infinigen.predictor", predictor, "KVA_PREDICTOR")),
            },
            rule: match options.rule {
                KVA_RULE_SHARE => Rule::Share(options.select_share),
                KVA_RULE_PROBABILITY => Rule::Probability { below: options.select_below, most: options.select_cap },
                KVA_RULE_PAPER => Rule::Paper { alpha: options.alpha, most: options.select_cap },
                KVA_RULE_RANDOM => Rule::Random {
                    count: budget(options.select_share, options.select_tokens),
                    renewed: options.select_renewed,
                },
                KVA_RULE_REPLAY => Rule::Replay { most: options.select_cap },
                rule => return Err(unknown("options.infinigen.rule", rule, "KVA_RULE")),
            },
            sinks: options.sinks as usize,
            window: options.window as usize,
            resident_layers: options.resident_layers as usize,
            cache: budget(options.cache_share, options.cache_tokens),
            cache_least: tokens(options.cache_least),
            attend_cache: options::switch(options.attend_cache, "options.infinigen.attend_cache")?,
            tail: options::switch(options.tail, "options.infinigen.tail")?,
            correct: options.correct,
            replay: None, // a pointer, which only an unsafe function can read
        })
    }
}

/// # Safety
///
/// As [`policy_options`].
unsafe fn tier(options: &kva_session_options) -> Result<KvTier> {
    let tier = match options.kv_tier {
        KVA_KV_TIER_DEVICE => KvTier::Device,
        KVA_KV_TIER_HOST => KvTier::Host,
        KVA_KV_TIER_FILE => {
            let flags = options.kv_file_flags;
            let known = KVA_KV_FILE_KEEP | KVA_KV_FILE_BUFFERED | KVA_KV_FILE_CHECKSUM;
            if flags & !known != 0 {
                return Err(Error::invalid_argument(format!(
                    "options.kv_file_flags is {flags:#x}, in which {:#x} is no KVA_KV_FILE flag",
                    flags & !known
                )));
            }
            let has = |flag| flags & flag != 0;
            return Ok(KvTier::File(FileOptions {
                // SAFETY: the caller's promise.
                path: unsafe { optional_path(options.kv_file_path, "options.kv_file_path") }?,
                limit: options.kv_file_limit_bytes,
                keep: has(KVA_KV_FILE_KEEP),
                buffered: has(KVA_KV_FILE_BUFFERED),
                checksum: has(KVA_KV_FILE_CHECKSUM),
            }));
        }
        tier => return Err(unknown("options.kv_tier", tier, "KVA_KV_TIER")),
    };
    if !options.kv_file_path.is_null() || options.kv_file_limit_bytes != 0 || options.kv_file_flags != 0 {
        return Err(Error::invalid_argument(
            "options.kv_file_path, kv_file_limit_bytes or kv_file_flags is set, but options.kv_tier is not \
             KVA_KV_TIER_FILE",
        ));
    }
    Ok(tier)
}

/// The part of a session's options that the policy is made of.
///
/// # Safety
///
/// What the fields point to is as documented there.
pub(super) unsafe fn policy_options(options: &kva_session_options) -> Result<PolicyOptions> {
    // SAFETY: the caller's promise: NULL, or a struct as long as it says.
    let infinigen = unsafe { options::read(options.infinigen, "options.infinigen") }?;
    infinigen.unknown?;
    // SAFETY: the caller's promise.
    let replay = unsafe { optional_path(infinigen.value.replay_path, "options.infinigen.replay_path") }?;
    Ok(PolicyOptions {
        kind: match options.policy {
            KVA_POLICY_FULL => PolicyKind::Full,
            KVA_POLICY_INT4 => PolicyKind::Int4,
            KVA_POLICY_H2O => PolicyKind::H2o,
            KVA_POLICY_WINDOW => PolicyKind::Window,
            KVA_POLICY_INFINIGEN => PolicyKind::Infinigen,
            policy => return Err(unknown("options.policy", policy, "KVA_POLICY")),
        },
        // SAFETY: the caller's promise.
        tier: unsafe { tier(options) }?,
        payload: match options.kv_payload {
            KVA_KV_PAYLOAD_EXACT => Payload::Exact,
            KVA_KV_PAYLOAD_INT8 => Payload::Int8,
            KVA_KV_PAYLOAD_INT4 => Payload::Int4,
            payload => return Err(unknown("options.kv_payload", payload, "KVA_KV_PAYLOAD")),
        },
        budget: budget(options.budget_share, options.budget_tokens),
        sinks: options.sinks as usize,
        resident_layers: tokens(options.resident_layers),
        eviction: match options.eviction {
            KVA_EVICTION_OFF => Eviction::Off,
            KVA_EVICTION_FIFO => Eviction::Fifo,
            KVA_EVICTION_LRU => Eviction::Lru,
            KVA_EVICTION_COUNTER => Eviction::Counter,
            eviction => return Err(unknown("options.eviction", eviction, "KVA_EVICTION")),
        },
        pool_tokens: tokens(options.pool_tokens),
        infinigen: InfinigenOptions { replay, ..infinigen.value.try_into()? },
        // SAFETY: the caller's promise.
        trace: unsafe { optional_path(options.trace_path, "options.trace_path") }?,
    })
}

/// Fills `options` with the settings of a mode, one of `KVA_INFINIGEN_...`.
///
/// Ownership: `options` is the caller's; the library keeps no reference. Threads: any.
/// Errors: `KVA_ERROR_INVALID_ARGUMENT` for NULL, for an unknown mode, or for a `struct_size` that is not
/// `sizeof(kva_infinigen_options)` of some version.
/// After an error: nothing was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kva_infinigen_options_init(
    options: *mut kva_infinigen_options,
    struct_size: usize,
    mode: i32,
) -> Option<Box<kva_error>> {
    guard(|| {
        let mode = infinigen_mode(mode, "mode")?;
        // SAFETY: the caller's promise: NULL, or `struct_size` bytes.
        unsafe { options::initialise_with(options, struct_size, InfinigenOptions::of(mode).into(), "options") }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_survives_the_way_to_c_and_back() {
        let cases = [
            InfinigenOptions::of(InfinigenMode::Default),
            InfinigenOptions::of(InfinigenMode::Paper),
            InfinigenOptions {
                basis: IndexBasis::Plain,
                ratio: 1.0,
                index_bits: 8,
                predictor: Predictor::Renormalised,
                rule: Rule::Probability { below: 8.5, most: 0.125 },
                sinks: 1,
                window: 2,
                resident_layers: 3,
                cache: Budget::Tokens(99),
                cache_least: 5,
                tail: false,
                correct: 0.01,
                ..InfinigenOptions::default()
            },
            InfinigenOptions { rule: Rule::Replay { most: 0.5 }, ..InfinigenOptions::default() },
            InfinigenOptions { predictor: Predictor::Exact, cache: Budget::Share(0.0), ..InfinigenOptions::default() },
        ];
        for options in cases {
            let c = kva_infinigen_options::from(options.clone());
            assert_eq!(InfinigenOptions::try_from(c).unwrap(), options);
        }
    }
}
