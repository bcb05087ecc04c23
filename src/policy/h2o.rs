//! `h2o`: half of the budget for the most recent tokens, half for heavy hitters, those that have been attended most; all
//! others are dropped for good (Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
//! Language Models", NeurIPS 2023).
//!
//! How much a token has been attended is the sum of the probabilities that all queries so far, the prompt's included,
//! have given it, over the query heads of its KV head. Layers and KV heads keep different tokens. The first tokens are
//! nothing special.
//!
//! The budget is what a token attends, itself included: where the paper's code attends the whole cache and the new token,
//! and drops afterwards, the same entry is dropped here just before.

use crate::backend::{AttentionShape, Buffer, DType, KvGeometry, KvRuns, Place, Rows, Segment, Visible};
use crate::kv::{Entries, Kept};
use crate::{Error, Result};

use super::dropping::{self, Dropping, Rule};
use super::{Budget, PolicyOptions, Setting, Step, TierBytes};

pub(super) type H2o = Dropping<HeavyHitters>;

impl H2o {
    pub(super) fn new(options: &PolicyOptions, setting: Setting) -> Result<H2o> {
        super::refuse_window("h2o", &setting)?;
        Ok(Dropping::with(HeavyHitters::new(options, setting.geometry), setting))
    }
}

/// What `Policy::bytes` will say of a session of `length` tokens.
pub(super) fn estimate(options: &PolicyOptions, geometry: &KvGeometry, length: usize) -> TierBytes {
    let rule = HeavyHitters::new(options, *geometry);
    let mut bytes = dropping::estimate(geometry, length, rule.most(length));
    bytes.device += mass_bytes(geometry, rule.most(length).min(length));
    bytes
}

/// Bytes of the masses of `entries` entries of a layer.
fn mass_bytes(geometry: &KvGeometry, entries: usize) -> usize {
    geometry.kv_heads * entries * DType::F32.bytes()
}

pub(super) struct HeavyHitters {
    budget: Budget,
    geometry: KvGeometry,
    /// Masses of a prompt under way, layer by layer, each `kv_heads` rows as wide as there is room for the prompt.
    prompt: Vec<Buffer>,
    /// The same when it has ended, for every layer and KV head.
    ended: Vec<Vec<f32>>,
    /// Masses of one decode step in one layer.
    scratch: Option<Buffer>,
}

impl HeavyHitters {
    fn new(options: &PolicyOptions, geometry: KvGeometry) -> HeavyHitters {
        HeavyHitters { budget: options.budget, geometry, prompt: Vec::new(), ended: Vec::new(), scratch: None }
    }

    /// First position of the recent half.
    fn recent(&self, length: usize) -> usize {
        length.saturating_sub(self.most(length).div_ceil(2))
    }

    /// Adds the masses that the queries give to a prompt.
    fn observe_prompt(
        &mut self,
        step: &Step<'_>,
        shape: &AttentionShape,
        queries: Rows<'_>,
        segment: &Segment<'_>,
    ) -> Result<()> {
        let width = segment.runs.capacity();
        if step.layer == self.prompt.len() {
            let bytes = mass_bytes(&self.geometry, width);
            self.prompt.push(step.backend.allocate(bytes, Place::Device, "attention of a prompt")?);
        }
        let mass = self.prompt[step.layer].rows_mut(DType::F32, shape.kv_heads, width);
        step.backend.attention_mass(step.stream, queries, shape, segment, mass)
    }
}

impl Rule for HeavyHitters {
    const SHARED: bool = false;

    fn most(&self, length: usize) -> usize {
        self.budget.tokens(length).max(1)
    }

    /// The one attended least outside the recent half, the older one of two alike.
    fn victim(&self, entries: &Entries, length: usize) -> usize {
        let recent = self.recent(length) as u32;
        let old = entries.rows().partition_point(|&row| row < recent).clamp(1, entries.len());
        let weights = &entries.weights()[..old];
        (1..old).fold(0, |least, i| if weights[i] < weights[least] { i } else { least })
    }

    fn stay(&self, layer: usize, head: usize, length: usize) -> Vec<(u32, f64)> {
        let mass = &self.ended[layer * self.geometry.kv_heads + head];
        let recent = self.recent(length);
        let heavy = (self.most(length).min(length)) - (length - recent);
        let mut rows: Vec<usize> = (0..recent).collect();
        // The newer one of two alike, as `victim` has it.
        rows.sort_by(|&a, &b| mass[b].total_cmp(&mass[a]).then(b.cmp(&a)));
        rows.truncate(heavy);
        rows.sort_unstable();
        rows.into_iter().chain(recent..length).map(|row| (row as u32, f64::from(mass[row]))).collect()
    }

    fn observe(
        &mut self,
        step: &Step<'_>,
        shape: &AttentionShape,
        queries: Rows<'_>,
        runs: KvRuns<'_>,
        visible: Visible<'_>,
    ) -> Result<Option<Vec<Vec<f32>>>> {
        let segment = Segment { row: 0, rows: step.rows, position: step.position, runs, visible };
        let Visible::Listed(listed) = visible else {
            self.observe_prompt(step, shape, queries, &segment)?;
            return Ok(None);
        };
        let entries = listed[0].len();
        let bytes = mass_bytes(&self.geometry, entries);
        if self.scratch.as_ref().is_none_or(|scratch| scratch.bytes() < bytes) {
            // Room for as many entries as the slots that they lie in: that rarely grows.
            let bytes = mass_bytes(&self.geometry, runs.capacity());
            self.scratch = Some(step.backend.allocate(bytes, Place::Device, "attention of a step")?);
        }
        let Some(scratch) = &mut self.scratch else { return Ok(None) };
        step.backend.upload(step.stream, &vec![0; bytes], scratch, 0)?;
        let mass = scratch.rows_mut(DType::F32, shape.kv_heads, entries);
        step.backend.attention_mass(step.stream, queries, shape, &segment, mass)?;
        let mass = download(step, scratch, shape.kv_heads, entries)?;
        Ok(Some(mass))
    }

    fn end_prompt(&mut self, step: &Step<'_>) -> Result<()> {
        let width = |buffer: &Buffer| buffer.bytes() / mass_bytes(&self.geometry, 1);
        for buffer in &self.prompt {
            self.ended.append(&mut download(step, buffer, self.geometry.kv_heads, width(buffer))?);
        }
        Ok(())
    }

    fn forget_prompt(&mut self) {
        self.prompt = Vec::new();
        self.ended = Vec::new();
    }

    /// Only to nothing: the sums hold what the forgotten tokens have attended.
    fn can_truncate(&self, _kept: &Kept, length: usize) -> Result<()> {
        if length == 0 {
            return Ok(());
        }
        Err(Error::unsupported(
            "policy h2o cannot forget some of its tokens: which entries it has kept depends on what they attended; it can \
             be cleared",
        ))
    }

    fn bytes(&self) -> usize {
        self.prompt.iter().chain(&self.scratch).map(Buffer::bytes).sum()
    }
}

/// The rows of a buffer of masses.
fn download(step: &Step<'_>, buffer: &Buffer, rows: usize, columns: usize) -> Result<Vec<Vec<f32>>> {
    let masses = step.floats(buffer.rows(DType::F32, rows, columns))?;
    Ok(masses.chunks_exact(columns).map(<[f32]>::to_vec).collect())
}
