//! `window`: the first tokens and the most recent ones; all others are dropped for good (Xiao et al., "Efficient Streaming
//! Language Models with Attention Sinks", ICLR 2024).
//!
//! The budget is what a token attends: sinks, recent tokens, and itself. As a share it grows with the sequence; what has
//! been dropped stays dropped. Every layer and KV head keeps the same tokens, but for the first layers
//! (`resident_layers`), which keep all: so that what is compared with `infinigen` differs from it in the layers behind only.
//!
//! StreamingLLM gives tokens new positions by their place in the cache. Here keys keep the rotation of the position that
//! their token has in the text: that is what the figures of ALGORITHM.md are of, and the model is not asked about more
//! than its context length.

use crate::backend::KvGeometry;
use crate::kv::{Entries, Kept};
use crate::{Error, Result};

use super::dropping::{self, Dropping, Rule};
use super::leading;
use super::{Budget, Policy, PolicyOptions, Setting, TierBytes};

pub(super) fn create(options: &PolicyOptions, setting: Setting) -> Result<Box<dyn Policy>> {
    super::refuse_window("window", &setting)?;
    leading::create(options.resident_layers, setting, |setting| Dropping::with(WindowRule::new(options), setting))
}

/// What `Policy::bytes` will say of a session of `length` tokens.
pub(super) fn estimate(options: &PolicyOptions, geometry: &KvGeometry, length: usize) -> TierBytes {
    leading::estimate(options.resident_layers, geometry, length, |geometry| {
        dropping::estimate(geometry, length, WindowRule::new(options).most(length))
    })
}

pub(super) struct WindowRule {
    budget: Budget,
    sinks: usize,
}

impl WindowRule {
    fn new(options: &PolicyOptions) -> WindowRule {
        WindowRule { budget: options.budget, sinks: options.sinks }
    }
}

impl Rule for WindowRule {
    const SHARED: bool = true;

    /// The budget, of which at least one token is no sink.
    fn most(&self, length: usize) -> usize {
        self.budget.tokens(length).max(self.sinks.saturating_add(1))
    }

    /// The oldest that is no sink.
    fn victim(&self, _entries: &Entries, _length: usize) -> usize {
        self.sinks
    }

    fn stay(&self, _layer: usize, _head: usize, length: usize) -> Vec<(u32, f64)> {
        let sinks = self.sinks.min(length);
        let recent = (self.most(length) - self.sinks).min(length - sinks);
        (0..sinks).chain(length - recent..length).map(|row| (row as u32, 0.0)).collect()
    }

    /// Possible where everything that a sequence of `length` tokens attends is still there.
    fn can_truncate(&self, kept: &Kept, length: usize) -> Result<()> {
        let rows = kept.entries(0, 0).rows();
        let there = rows.partition_point(|&row| (row as usize) < length);
        if there >= self.most(length).min(length) {
            return Ok(());
        }
        Err(Error::unsupported(format!(
            "policy window has dropped tokens that the {} most recent ones of the shorter sequence would be; it can go \
             back to at most its {} sinks, or be cleared",
            self.most(length) - self.sinks,
            self.sinks
        )))
    }
}
