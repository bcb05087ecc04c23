//! What a number of sessions of a context length will cost, before anything is allocated.

use crate::Result;
use crate::backend::KvGeometry;
use crate::policy::TierBytes;

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
        let geometry: KvGeometry = resolved.geometry;
        let each = geometry.extents(resolved.capacity) as u64 * geometry.extent_bytes() as u64;
        let rows = resolved.prefill_chunk.min(resolved.capacity).max(sessions);
        let scratch =
            model.forward(|forward| Ok(forward.workspace.bytes(rows, sessions.max(super::session::LOGIT_ROWS))))?;
        let device = usize::try_from(each.saturating_mul(sessions as u64)).unwrap_or(usize::MAX);
        Ok(Estimate {
            weights: model.weight_bytes(),
            kv: TierBytes { device, ..TierBytes::default() },
            scratch: scratch as u64,
        })
    }
}
