//! What the policies that drop entries for good have in common; `window` and `h2o` say which ones.
//!
//! - The first prompt is attended in full and held in full while it runs. Its end drops all but the budget.
//! - From then on tokens go one by one, also those of a later prompt: before a token attends, as many entries give way as
//!   it takes for budget to be what is attended, the token itself included.
//! - Keys stay rotated by the positions that their tokens had, whatever has been dropped before them.
//! - A step is undone by restoring lists: `kv::Kept` overwrites no entry in the step that drops it.

use crate::Result;
use crate::backend::{AttentionShape, KvGeometry, KvRuns, Rows, Visible};
use crate::kv::{Entries, FetchCounters, Kept};

use super::tally::Tally;
use super::{KvCounters, Phase, Policy, Setting, Step, TierBytes};

/// Which entries are dropped.
pub(super) trait Rule: Send {
    /// Whether every KV head of every layer keeps the entries of the same tokens.
    const SHARED: bool;

    /// Most entries that the last of `length` tokens attends, itself included: at least 1, and at most one more for each
    /// more token.
    fn most(&self, length: usize) -> usize;

    /// The entry that gives way to the last of `length` tokens, as an index into `entries`, of which there are more than
    /// `most(length) - 1`.
    fn victim(&self, entries: &Entries, length: usize) -> usize;

    /// What stays of a prompt of `length` tokens, `most(length)` of them: positions, ascending, and weights.
    fn stay(&self, layer: usize, head: usize, length: usize) -> Vec<(u32, f64)>;

    /// Is shown the queries that have just attended `visible` of `runs`; returns what to add to the weights of the
    /// entries of each KV head, in their order, if anything.
    fn observe(
        &mut self,
        _step: &Step<'_>,
        _shape: &AttentionShape,
        _queries: Rows<'_>,
        _runs: KvRuns<'_>,
        _visible: Visible<'_>,
    ) -> Result<Option<Vec<Vec<f32>>>> {
        Ok(None)
    }

    /// The last chunk of a prompt has been observed: what `stay` needs is made ready.
    fn end_prompt(&mut self, _step: &Step<'_>) -> Result<()> {
        Ok(())
    }

    /// Forgets the prompt under way, if there is one.
    fn forget_prompt(&mut self) {}

    /// Whether `kept` can go back from its length to a shorter one.
    fn can_truncate(&self, kept: &Kept, length: usize) -> Result<()>;

    /// Bytes on the device.
    fn bytes(&self) -> usize {
        0
    }
}

pub(super) struct Dropping<R> {
    rule: R,
    kept: Kept,
    /// Whether the step under way is a prompt that is attended in full.
    prompting: bool,
    /// Slots that each KV head of the layer attends.
    listed: Vec<Vec<u32>>,
    /// Slots that the newest token takes.
    admitted: Vec<u32>,
    tally: Tally,
}

impl<R: Rule> Dropping<R> {
    pub(super) fn with(rule: R, setting: Setting) -> Dropping<R> {
        let heads = setting.geometry.kv_heads;
        Dropping {
            rule,
            kept: Kept::new(setting.pool, setting.geometry, R::SHARED),
            prompting: false,
            listed: vec![Vec::new(); heads],
            admitted: vec![0; heads],
            tally: Tally::default(),
        }
    }

    fn kv_heads(&self) -> usize {
        self.kept.geometry().kv_heads
    }

    /// Makes room for the newest token and gives it its slots.
    fn admit(&mut self, step: &Step<'_>) {
        let length = step.position + 1;
        // Where all layers keep the same, the first has done it for all.
        if R::SHARED && step.layer > 0 {
            return;
        }
        for head in 0..self.kv_heads() {
            if !R::SHARED || head == 0 {
                while self.kept.entries(step.layer, head).len() >= self.rule.most(length) {
                    let victim = self.rule.victim(self.kept.entries(step.layer, head), length);
                    self.kept.drop_entry(step.layer, head, victim);
                }
                self.admitted[head] = self.kept.admit(step.layer, head, step.position as u32);
            } else {
                self.admitted[head] = self.admitted[0];
            }
            self.listed[head].clear();
            self.listed[head].extend_from_slice(self.kept.entries(step.layer, head).slots());
        }
    }

    fn forget_step(&mut self) {
        self.prompting = false;
        self.rule.forget_prompt();
    }
}

/// What [`Policy::bytes`] will say of a session of `length` tokens that attends `most` of them. While its prompt runs,
/// there is the whole prompt beside it.
pub(super) fn estimate(geometry: &KvGeometry, length: usize, most: usize) -> TierBytes {
    let slots = Kept::slots_of(most).min(length);
    TierBytes { device: geometry.extents(slots) * geometry.extent_bytes(), ..TierBytes::default() }
}

impl<R: Rule> Policy for Dropping<R> {
    fn reserve(&mut self, length: usize) -> Result<()> {
        self.kept.reserve(length, self.rule.most(length))?;
        self.tally.begin();
        Ok(())
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        if step.phase != Phase::Decode {
            self.prompting = true;
            let runs = &mut self.kept.prompt_mut(step.layer);
            return step.backend.store_kv(step.stream, keys, values, runs, step.position);
        }
        self.admit(step);
        let runs = &mut self.kept.runs_mut(step.layer);
        step.backend.store_kv_rows(step.stream, keys, values, runs, &self.admitted)
    }

    fn land(&mut self, step: &Step<'_>) -> Result<()> {
        let (heads, attended) = (self.kv_heads(), self.listed[0].len());
        self.tally.layer(step, heads, attended);
        if step.phase == Phase::Decode {
            self.tally.fetched(step, heads * (attended - 1), 0);
        }
        Ok(())
    }

    fn attended(&self, step: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        if step.phase != Phase::Decode {
            return (self.kept.prompt(step.layer), Visible::Causal);
        }
        // All tokens are there, so each is in the slot of its position.
        let whole = self.listed[0].len() == step.position + 1;
        (self.kept.runs(step.layer), if whole { Visible::Causal } else { Visible::Listed(&self.listed) })
    }

    fn observe(&mut self, step: &Step<'_>, shape: &AttentionShape, queries: Rows<'_>) -> Result<()> {
        let visible = if step.phase == Phase::Decode { Visible::Listed(&self.listed) } else { Visible::Causal };
        let runs = match step.phase {
            Phase::Decode => self.kept.runs(step.layer),
            Phase::Prefill { .. } => self.kept.prompt(step.layer),
        };
        if let Some(weights) = self.rule.observe(step, shape, queries, runs, visible)? {
            for (head, weights) in weights.into_iter().enumerate() {
                self.kept.weigh(step.layer, head, weights.into_iter().map(f64::from));
            }
        }
        Ok(())
    }

    fn commit(&mut self, step: &Step<'_>) -> Result<()> {
        let length = step.position + step.rows;
        if self.prompting {
            self.rule.end_prompt(step)?;
            let rule = &self.rule;
            self.kept.keep(step.backend, step.stream, |layer, head| rule.stay(layer, head, length))?;
        }
        self.kept.commit(length);
        self.forget_step();
        Ok(())
    }

    fn roll_back(&mut self, _step: &Step<'_>, length: usize) -> Result<()> {
        self.kept.undo(length);
        self.tally.undo();
        self.forget_step();
        Ok(())
    }

    fn can_truncate(&self, length: usize) -> Result<()> {
        self.rule.can_truncate(&self.kept, length)
    }

    fn truncate(&mut self, _step: &Step<'_>, length: usize) -> Result<()> {
        self.kept.truncate(length);
        Ok(())
    }

    fn prefills(&self, position: usize, tokens: usize) -> usize {
        if position == 0 { tokens } else { 0 }
    }

    fn bytes(&self) -> TierBytes {
        TierBytes { device: self.kept.bytes() + self.rule.bytes(), ..TierBytes::default() }
    }

    fn counters(&self) -> KvCounters {
        self.tally.counters()
    }

    fn reset_counters(&mut self) {
        self.tally.reset(FetchCounters::default());
    }
}
