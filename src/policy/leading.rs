//! The first layers in full, and a policy for those behind them.
//!
//! Nothing foretells the first layers (ALGORITHM.md §4), so `infinigen` keeps them in full, by itself; the figures of §9 are
//! with the first two in full for every policy.

use crate::Result;
use crate::backend::{AttentionShape, KvGeometry, KvRuns, Rows, Visible};

use super::full::{self, Full};
use super::{KvCounters, Policy, Setting, Step, TierBytes};

/// `behind` serves the layers from `layers` on. It neither fetches nor rehearses.
pub(super) struct Leading<P> {
    layers: usize,
    leading: Full,
    behind: P,
    /// Tokens before the step under way.
    length: usize,
}

/// The geometry of `layers` of the layers.
fn of(geometry: &KvGeometry, layers: usize) -> KvGeometry {
    KvGeometry { layers, ..*geometry }
}

/// The first `layers` layers in full, behind them what `behind` makes.
pub(super) fn create<P: Policy + 'static>(
    layers: usize,
    setting: Setting,
    behind: impl FnOnce(Setting) -> P,
) -> Result<Box<dyn Policy>> {
    let geometry = setting.geometry;
    if layers == 0 {
        return Ok(Box::new(behind(setting)));
    }
    if layers >= geometry.layers {
        return Ok(Box::new(Full::new(setting.pool, geometry)));
    }
    let leading = Full::new(setting.pool.clone(), of(&geometry, layers));
    let behind = behind(Setting { geometry: of(&geometry, geometry.layers - layers), ..setting });
    Ok(Box::new(Leading { layers, leading, behind, length: 0 }))
}

/// What `Policy::bytes` will say of a session of `length` tokens; `behind` says it of the layers behind.
pub(super) fn estimate(
    layers: usize,
    geometry: &KvGeometry,
    length: usize,
    behind: impl FnOnce(&KvGeometry) -> TierBytes,
) -> TierBytes {
    let layers = layers.min(geometry.layers);
    let leading = if layers == 0 { TierBytes::default() } else { full::estimate(&of(geometry, layers), length) };
    if layers == geometry.layers {
        return leading;
    }
    let behind = behind(&of(geometry, geometry.layers - layers));
    TierBytes { device: leading.device + behind.device, ..behind }
}

impl<P> Leading<P> {
    /// The step as the policy of the layers behind knows it, if its layer is one of them.
    fn behind<'a>(&self, step: &Step<'a>) -> Option<Step<'a>> {
        step.layer.checked_sub(self.layers).map(|layer| Step { layer, ..*step })
    }
}

impl<P: Policy> Policy for Leading<P> {
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.leading.reserve(length)?;
        self.behind.reserve(length).inspect_err(|_| self.leading.shrink(self.length))
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        match self.behind(step) {
            Some(step) => self.behind.append(&step, keys, values),
            None => self.leading.append(step, keys, values),
        }
    }

    fn land(&mut self, step: &Step<'_>) -> Result<()> {
        match self.behind(step) {
            Some(step) => self.behind.land(&step),
            None => self.leading.land(step),
        }
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        match self.behind(step) {
            Some(step) => self.behind.attended(&step),
            None => self.leading.attended(step),
        }
    }

    fn observe(&mut self, step: &Step<'_>, shape: &AttentionShape, queries: Rows<'_>) -> Result<()> {
        self.behind(step).map_or(Ok(()), |step| self.behind.observe(&step, shape, queries))
    }

    fn commit(&mut self, step: &Step<'_>) -> Result<()> {
        self.behind.commit(step)?;
        self.length = step.position + step.rows;
        Ok(())
    }

    fn roll_back(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        self.length = length;
        self.leading.roll_back(step, length)?;
        self.behind.roll_back(step, length)
    }

    fn can_truncate(&self, length: usize) -> Result<()> {
        self.behind.can_truncate(length)
    }

    fn truncate(&mut self, step: &Step<'_>, length: usize) -> Result<()> {
        self.length = length;
        self.leading.truncate(step, length)?;
        self.behind.truncate(step, length)
    }

    fn prefills(&self, position: usize, tokens: usize) -> usize {
        self.behind.prefills(position, tokens)
    }

    fn bytes(&self) -> TierBytes {
        let behind = self.behind.bytes();
        TierBytes { device: self.leading.bytes().device + behind.device, ..behind }
    }

    /// As for `infinigen`, the leading layers count in what was attended only.
    fn counters(&self) -> KvCounters {
        let (leading, behind) = (self.leading.counters(), self.behind.counters());
        let (attended, held) = (leading.attended + behind.attended, leading.held + behind.held);
        KvCounters { attended, held, ..behind }
    }

    fn reset_counters(&mut self) {
        self.leading.reset_counters();
        self.behind.reset_counters();
    }
}
