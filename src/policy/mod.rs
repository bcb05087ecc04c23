//! What a layer attends: one trait, one file a policy.
//!
//! - A [`Policy`] is the KV side of one session: it takes each layer's new keys and values, and says what the layer's
//!   attention reads. The engine collects these from every session of a batch and runs one attention for all.
//! - A policy that speculates says what it wants to have rehearsed ([`Policy::lookahead`], [`Policy::rehearsal`]); the
//!   engine computes it one layer ahead, again for the whole batch at once.
//! - A step is a transaction: [`Policy::reserve`] comes first and is the only call that may find no room;
//!   [`Policy::commit`] or [`Policy::roll_back`] ends it.
//! - What may not enter: arithmetic (that is `backend`), tokens, sampling.
//!
//! A new policy is one file here and one line each in [`create`] and [`estimate`]; docs/policies.md has a complete small one.

mod check;
mod dropping;
mod fetched;
mod full;
mod h2o;
mod infinigen;
mod leading;
mod options;
mod staged;
mod tally;
mod trace;
mod window;

pub use options::{Budget, IndexBasis, InfinigenMode, InfinigenOptions, KvCounters, PolicyOptions, Predictor, Rule};

pub use trace::{Record, TraceReader, TraceWriter};

use std::str::FromStr;
use std::sync::Arc;

use crate::backend::{
    AttentionShape, Backend, DType, HeadMaps, IndexGeometry, KvGeometry, KvRuns, Linear, Prefetch, Rehearsal, Rows,
    RowsMut, Selected, Stream, Visible,
};
use crate::kv::{KvTier, Payload, Pool};
use crate::speculate::Speculation;
use crate::{Error, Result};

/// What a policy is told with every call: where the step is, and on what to compute.
#[derive(Clone, Copy)]
pub struct Step<'a> {
    /// What computes.
    pub backend: &'a dyn Backend,
    /// Where the layer's other operations are enqueued.
    pub stream: &'a Stream,
    /// A side stream of it, for what the attention of a coming layer needs.
    pub fetch: &'a Stream,
    /// Layer of the model.
    pub layer: usize,
    /// Position of the first new token.
    pub position: usize,
    /// New tokens.
    pub rows: usize,
    /// What kind of step it is.
    pub phase: Phase,
}

impl Step<'_> {
    /// A matrix of f32, for the host: row after row.
    fn floats(&self, matrix: Rows<'_>) -> Result<Vec<f32>> {
        let mut bytes = vec![0; matrix.rows() * matrix.cols() * DType::F32.bytes()];
        self.backend.download(self.stream, matrix, &mut bytes)?;
        Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect())
    }
}

/// What kind of step it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Tokens of a prompt, which attend everything before them.
    Prefill {
        /// Whether the call that these tokens belong to ends with them.
        last: bool,
    },
    /// One token, which attends what the policy says.
    Decode,
}

/// What a policy wants to have computed for a layer's rehearsal.
#[derive(Clone, Copy)]
pub struct Lookahead<'a> {
    /// Where the queries come from.
    pub source: QuerySource<'a>,
    /// Into the basis of the index.
    pub maps: &'a HeadMaps,
}

/// Where the queries of a rehearsal come from.
#[derive(Clone, Copy)]
pub enum QuerySource<'a> {
    /// This weight on the attention input of the layer before.
    Previous(&'a Linear),
    /// This weight on the hidden state before the layer before, normalised by this layer's norm.
    Renormalised(&'a Linear),
    /// The layer's own queries: too late to hide a fetch, for corrections and for tests.
    Exact,
}

/// What a rehearsal leads to.
#[allow(clippy::large_enum_variant, reason = "it is taken apart as soon as it is made")]
pub enum Ahead<'a> {
    /// What is selected, for the host to go on with in [`Policy::rehearsed`].
    Select(Rehearsal<'a>, &'a mut Selected),
    /// All that comes of it, on the device.
    Prefetch(Box<Prefetch<'a>>),
}

/// The KV side of one session.
///
/// In a step each layer's calls come in this order, and the first three a layer ahead where there is a layer before:
/// `prefetch`, `lookahead` and `rehearsal`, `rehearsed`; then `append`, `land`, `attended`, `complete` (of a decoded token), `observe`.
pub trait Policy: Send {
    /// Begins a step: makes room for a sequence of `length` tokens. On an error nothing has changed.
    fn reserve(&mut self, length: usize) -> Result<()>;

    /// Starts whatever can be read ahead without speculation.
    fn prefetch(&mut self, _step: &Step<'_>) -> Result<()> {
        Ok(())
    }

    /// What the rehearsal of `layer` needs, if this policy rehearses it at `position`. Asked a layer ahead, where all but
    /// [`QuerySource::Exact`] is done, and again when the layer's own queries are there, where that is done.
    fn lookahead(&self, _layer: usize, _position: usize) -> Option<Lookahead<'_>> {
        None
    }

    /// The rehearsal of `layer`, and where its outcome goes. Called where [`Policy::lookahead`] has said something.
    fn rehearsal(&mut self, _layer: usize, _position: usize) -> Option<Ahead<'_>> {
        None
    }

    /// The rehearsal is done: starts to fetch what was selected. (A prefetch has been enqueued on [`Step::fetch`]; that of a
    /// layer's own queries on a stream of its own, for which [`Step::stream`] waits.)
    fn rehearsed(&mut self, _step: &Step<'_>) -> Result<()> {
        Ok(())
    }

    /// Takes a layer's keys and values (rotated, one row a token).
    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()>;

    /// Waits for what the attention of the layer reads.
    fn land(&mut self, _step: &Step<'_>) -> Result<()> {
        Ok(())
    }

    /// What the attention of the layer reads.
    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>);

    /// May change what a decoded token has attended: `attended` is its row, `heads × head_dim`.
    fn complete(&mut self, _step: &Step<'_>, _attended: RowsMut<'_>) -> Result<()> {
        Ok(())
    }

    /// Is shown the queries (rotated, one row a token) that have just attended.
    fn observe(&mut self, _step: &Step<'_>, _shape: &AttentionShape, _queries: Rows<'_>) -> Result<()> {
        Ok(())
    }

    /// The step has succeeded; `step` is its last, with all rows of the call. A prompt of which only the first tokens run at
    /// once ([`Policy::prefills`]) is committed twice: these, then the others.
    fn commit(&mut self, _step: &Step<'_>) -> Result<()> {
        Ok(())
    }

    /// The step has failed: back to `length` tokens, as if it had never begun. Comes after a [`Policy::reserve`] that
    /// succeeded; also after [`Policy::commit`], where another session of the batch or the rest of a prompt could not.
    fn roll_back(&mut self, step: &Step<'_>, length: usize) -> Result<()>;

    /// Whether every token from `length` on can be forgotten, which is asked before [`Policy::truncate`]. An error says
    /// why not, and changes nothing.
    fn can_truncate(&self, _length: usize) -> Result<()> {
        Ok(())
    }

    /// Forgets every token from `length` on. An error leaves a session that can only be freed.
    fn truncate(&mut self, step: &Step<'_>, length: usize) -> Result<()>;

    /// How many of a prompt's `tokens` tokens, which follow `position` others and have been reserved, may run at once; the
    /// others are decoded.
    fn prefills(&self, _position: usize, tokens: usize) -> usize {
        tokens
    }

    /// Bytes of KV held, by tier.
    fn bytes(&self) -> TierBytes;

    /// Of the device bytes of [`Policy::bytes`], those that are no entries held for good.
    fn device_parts(&self) -> DeviceParts {
        DeviceParts::default()
    }

    /// Brings what the device has counted to where [`Policy::counters`] tells it. Between steps.
    fn count(&mut self, _step: &Step<'_>) -> Result<()> {
        Ok(())
    }

    /// What the policy has done since it was made or since the last reset.
    fn counters(&self) -> KvCounters {
        KvCounters::default()
    }

    /// Sets the counters to zero.
    fn reset_counters(&mut self) {}
}

/// Bytes by tier.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TierBytes {
    /// Device memory: HBM, or RAM on the CPU backend.
    pub device: usize,
    /// Pinned host memory.
    pub pinned: usize,
    /// File.
    pub file: usize,
}

/// What some of the bytes in device memory are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceParts {
    /// The speculation index.
    pub index: usize,
    /// The hot cache, its tables included.
    pub cache: usize,
}

/// The policies that a session can be created with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PolicyKind {
    /// Every token, exact.
    #[default]
    Full,
    /// Every token, from entries of 4 bits (FlexGen).
    Int4,
    /// Heavy hitters by accumulated attention, and the recent tokens; the rest is dropped for good (H2O).
    H2o,
    /// The first tokens and the recent ones (StreamingLLM).
    Window,
    /// What speculation selects (InfiniGen).
    Infinigen,
}

/// What a policy is made with.
pub struct Setting {
    /// What computes.
    pub backend: Arc<dyn Backend>,
    /// The model's pool.
    pub pool: Arc<Pool>,
    /// Shape of the model's KV, all layers.
    pub geometry: KvGeometry,
    /// Query heads.
    pub heads: usize,
    /// Factor on q·k.
    pub scale: f32,
    /// Most tokens that the session may hold.
    pub capacity: usize,
    /// The shortest sliding window of the model's layers.
    pub window: Option<usize>,
    /// The offline products, for the policy that speculates.
    pub speculation: Option<Arc<Speculation>>,
}

impl PolicyKind {
    /// Every kind, in the order in which help texts list them.
    pub const ALL: [PolicyKind; 5] =
        [PolicyKind::Full, PolicyKind::Int4, PolicyKind::H2o, PolicyKind::Window, PolicyKind::Infinigen];

    /// The name in options and flags.
    pub fn name(self) -> &'static str {
        match self {
            PolicyKind::Full => "full",
            PolicyKind::Int4 => "int4",
            PolicyKind::H2o => "h2o",
            PolicyKind::Window => "window",
            PolicyKind::Infinigen => "infinigen",
        }
    }
}

/// A new, empty policy.
pub fn create(options: &PolicyOptions, setting: Setting) -> Result<Box<dyn Policy>> {
    Ok(match options.kind {
        PolicyKind::Full if options.on_device() => Box::new(full::Full::new(setting.pool, setting.geometry)),
        PolicyKind::Full => Box::new(fetched::Fetched::new(options, options.payload, setting)?),
        PolicyKind::Int4 => Box::new(fetched::Fetched::new(options, Payload::Int4, setting)?),
        PolicyKind::H2o => Box::new(h2o::H2o::new(options, setting)?),
        PolicyKind::Window => window::create(options, setting)?,
        PolicyKind::Infinigen if setting.backend.selects_on_device() => {
            Box::new(infinigen::OnDevice::new(options, setting)?)
        }
        PolicyKind::Infinigen => Box::new(infinigen::Infinigen::new(options, setting)?),
    })
}

/// As [`create`], but where there is a choice what the device does by itself on any backend: for tests, which compare
/// it with what the host does.
#[doc(hidden)]
pub fn create_on_device(options: &PolicyOptions, setting: Setting) -> Result<Box<dyn Policy>> {
    match options.kind {
        PolicyKind::Infinigen => Ok(Box::new(infinigen::OnDevice::new(options, setting)?)),
        _ => create(options, setting),
    }
}

/// What [`Policy::bytes`] will say of a full session of `capacity` tokens. Of the file tier's memory it is the most that
/// can be.
pub fn estimate(options: &PolicyOptions, backend: &dyn Backend, geometry: &KvGeometry, capacity: usize) -> TierBytes {
    match options.kind {
        PolicyKind::Full if options.on_device() => full::estimate(geometry, capacity),
        PolicyKind::Full => fetched::estimate(options, options.payload, backend, geometry, capacity),
        PolicyKind::Int4 => fetched::estimate(options, Payload::Int4, backend, geometry, capacity),
        PolicyKind::H2o => h2o::estimate(options, geometry, capacity),
        PolicyKind::Window => window::estimate(options, geometry, capacity),
        PolicyKind::Infinigen => infinigen::estimate(options, backend, geometry, capacity),
    }
}

/// What scratch memory depends on of a policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effort {
    /// Rows that a decoded token attends in one layer, at most.
    pub attended: usize,
    /// Rows of a prompt whose attention is ranked at once, 0 for none.
    pub ranked: usize,
    /// What is rehearsed on.
    pub index: Option<IndexGeometry>,
}

/// The effort of a session of `capacity` tokens whose prompts run in chunks of `rows`.
pub fn effort(options: &PolicyOptions, geometry: &KvGeometry, capacity: usize, rows: usize) -> Effort {
    let whole = Effort { attended: capacity, ..Effort::default() };
    let budget = || options.budget.tokens(capacity).saturating_add(1).min(capacity);
    match options.kind {
        PolicyKind::Full | PolicyKind::Int4 => whole,
        PolicyKind::Window if options.resident_layers == 0 => Effort { attended: budget(), ..whole },
        PolicyKind::Window => whole,
        PolicyKind::H2o => Effort { attended: budget(), ranked: rows, ..whole },
        PolicyKind::Infinigen => infinigen::effort(options, geometry, whole),
    }
}

impl PolicyOptions {
    /// Whether all entries are on the device, as attention reads them.
    fn on_device(&self) -> bool {
        self.tier == KvTier::Device && self.payload == Payload::Exact
    }
}

/// Errors where a layer's sliding window would hide tokens of the session: rows in slots have no position to see it by.
fn refuse_window(policy: &str, setting: &Setting) -> Result<()> {
    match setting.window.filter(|&window| window < setting.capacity) {
        Some(window) => Err(Error::unsupported(format!(
            "policy {policy} does not go with the model's own sliding window of {window} tokens: use policy full, or a \
             session capacity of at most {window} instead of {}",
            setting.capacity
        ))),
        None => Ok(()),
    }
}

impl FromStr for PolicyKind {
    type Err = Error;

    fn from_str(name: &str) -> Result<PolicyKind> {
        PolicyKind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| {
            let known: Vec<_> = PolicyKind::ALL.iter().map(|kind| kind.name()).collect();
            Error::invalid_argument(format!("unknown policy \"{name}\"; known: {}", known.join(", ")))
        })
    }
}
