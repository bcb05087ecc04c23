//! What a number of sessions of a context length will cost, before anything is allocated.

use crate::Result;
use crate::policy::{self, TierBytes};

use super::Model;
use super::session::SessionOptions;

/// Bytes, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Estimate {
    /// Weights, allocated already.
    pub weights: u64,
    /// KV of all the sessions when full, by tier.
    pub kv: TierBytes,
    /// Scratch memory of the largest step.
    pub scratch: u64,
}

impl Estimate {
    /// For `sessions` sessions of `options` on `model`, all of them full, decoded as one batch.
    pub fn new(model: &Model, options: &SessionOptions, sessions: usize) -> Result<Estimate> {
        let resolved = options.resolve(model)?;
        let each = policy::estimate(&resolved.policy, model.backend(), &resolved.geometry, resolved.capacity);
        let rows = resolved.prefill_chunk.min(resolved.capacity).max(sessions);
        let scratch =
            model.forward(|forward| Ok(forward.workspace.bytes(rows, sessions.max(super::session::LOGIT_ROWS))))?;
        let all = |bytes: usize| bytes.saturating_mul(sessions);
        Ok(Estimate {
            weights: model.weight_bytes(),
            kv: TierBytes { device: all(each.device), pinned: all(each.pinned), file: all(each.file) },
            scratch: scratch as u64,
        })
    }
}
