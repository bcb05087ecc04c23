//! What a layer attends: one trait, one file a policy.
//!
//! - A [`Policy`] is the KV side of one session: it takes each layer's new keys and values, and says what the layer's
//!   attention reads. The engine collects these from every session of a batch and runs one attention for all.
//! - A step is a transaction: [`Policy::reserve`] comes first and is the only call that may find no room; entries past
//!   the committed length mean nothing until the engine commits.
//! - What may not enter: arithmetic (that is `backend`), tokens, sampling.

mod check;
mod full;
mod options;

pub use options::{Budget, IndexBasis, InfinigenMode, InfinigenOptions, KvCounters, PolicyOptions, Predictor, Rule};

use std::str::FromStr;
use std::sync::Arc;

use crate::backend::{Backend, KvGeometry, KvRuns, Rows, Stream};
use crate::kv::Pool;
use crate::{Error, Result};

/// The KV side of one session.
pub trait Policy: Send {
    /// Makes room for a sequence of `length` tokens. On an error nothing has changed.
    fn reserve(&mut self, length: usize) -> Result<()>;

    /// Takes a layer's keys and values (rotated, one row a token) of the tokens from `position` on.
    fn append(
        &mut self,
        backend: &dyn Backend,
        stream: &Stream,
        layer: usize,
        keys: Rows<'_>,
        values: Rows<'_>,
        position: usize,
    ) -> Result<()>;

    /// What the attention of `layer` reads.
    fn attended(&self, layer: usize) -> KvRuns<'_>;

    /// Forgets every token from `length` on.
    fn truncate(&mut self, length: usize);

    /// Bytes of KV held, by tier.
    fn bytes(&self) -> TierBytes;

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

    /// A new, empty policy of this kind, which keeps its entries in `pool`.
    pub fn create(self, pool: Arc<Pool>, geometry: KvGeometry) -> Box<dyn Policy> {
        match self {
            PolicyKind::Full => Box::new(full::Full::new(pool, geometry)),
            _ => todo!(),
        }
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
