//! One sequence: its tokens, its KV, the logits after its last token.

use std::sync::Arc;
use std::time::Instant;

use crate::backend::{DType, KvGeometry, Shape};
use crate::kv::{EXTENT_TOKENS, Eviction, KvTier};
use crate::policy::{
    self, DeviceParts, KvCounters, Phase, Policy, PolicyKind, PolicyOptions, Predictor, Setting, Step, TierBytes,
};
use crate::speculate::Speculation;
use crate::{Error, ErrorCode, Result};

use super::forward::Part;
use super::sampling::{self, SamplingOptions};
use super::{Control, Model};

/// Rows of logits that a score holds at once: a vocabulary is wide, and each row is needed only for a moment.
pub(super) const LOGIT_ROWS: usize = 32;

/// How to create a session.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// What each layer attends, and where its entries live.
    pub policy: PolicyOptions,
    /// Most tokens that the session may hold; 0 for the model's context length.
    pub capacity: usize,
    /// Tokens of a prompt that run at once, which bounds scratch memory; 0 for what suits the backend.
    pub prefill_chunk: usize,
    /// Type of keys and values in memory; `None` for the weights' type.
    pub kv_dtype: Option<DType>,
}

/// Options with every default filled in and checked against a model.
#[derive(Clone, Debug)]
pub(super) struct ResolvedOptions {
    pub(super) policy: PolicyOptions,
    pub(super) capacity: usize,
    pub(super) prefill_chunk: usize,
    pub(super) geometry: KvGeometry,
}

impl SessionOptions {
    pub(super) fn resolve(&self, model: &Model) -> Result<ResolvedOptions> {
        let config = model.config();
        let longest = config.context_length;
        if self.capacity > longest {
            return Err(Error::invalid_argument(format!(
                "a session capacity of {} tokens is more than the model's context length of {longest}",
                self.capacity
            )));
        }
        let dtype = self.kv_dtype.unwrap_or(model.dtype());
        if dtype == DType::U32 {
            return Err(Error::invalid_argument("keys and values are f32, f16 or bf16, not u32"));
        }
        self.policy.check()?;
        Ok(ResolvedOptions {
            policy: self.policy.clone(),
            capacity: if self.capacity == 0 { longest } else { self.capacity },
            prefill_chunk: match self.prefill_chunk {
                0 => model.backend().prefill_chunk(),
                rows => rows,
            },
            geometry: KvGeometry {
                layers: config.layers,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                extent_tokens: EXTENT_TOKENS,
                dtype,
            },
        })
    }
}

/// Errors where the model's backend lacks what a policy needs, before anything is made.
fn check_backend(model: &Model, options: &PolicyOptions) -> Result<()> {
    let backend = model.backend();
    let refused = |what: &str| {
        Err(Error::unsupported(format!(
            "{what} is not there on {} yet; load the model with device=cpu",
            backend.description()
        )))
    };
    let stores = matches!(options.kind, PolicyKind::Full | PolicyKind::Int4 | PolicyKind::Infinigen);
    if stores && matches!(options.tier, KvTier::File(_)) && !backend.has_files() {
        return refused("KV in a file (tier file)");
    }
    if options.eviction != Eviction::Off && !backend.has_eviction() {
        return refused("eviction from a full pool");
    }
    Ok(())
}

/// The offline products that a policy stands on, for one that does.
fn speculation(model: &Model, options: &PolicyOptions) -> Result<Option<Arc<Speculation>>> {
    if options.kind != PolicyKind::Infinigen {
        return Ok(None);
    }
    let speculation = model.speculation(&Control::default())?;
    if matches!(options.infinigen.predictor, Predictor::Own | Predictor::Renormalised) {
        for (layer, block) in model.decoder().blocks.iter().enumerate().skip(1) {
            speculation.own(layer, &block.attention)?;
        }
    }
    Ok(Some(speculation))
}

/// Counts and times since the session began or since the last reset.
#[derive(Clone, Copy, Debug, Default)]
pub struct Statistics {
    /// Tokens that went through prefill or score.
    pub prefill_tokens: u64,
    /// Seconds spent there.
    pub prefill_seconds: f64,
    /// Tokens that went through decode.
    pub decode_tokens: u64,
    /// Seconds spent there; a batch's step counts whole for each of its sessions.
    pub decode_seconds: f64,
    /// Tokens sampled.
    pub sampled_tokens: u64,
    /// Seconds spent there.
    pub sample_seconds: f64,
    /// Seconds of decode steps in which entries were on their way over the link, where steps measure that
    /// ([`Model::set_timing`]); a batch's step counts whole for each of its sessions.
    pub link_seconds: f64,
}

/// One sequence. Used by one thread at a time; dropping it gives its KV back to the model's pool.
pub struct Session {
    model: Model,
    options: ResolvedOptions,
    policy: Box<dyn Policy>,
    tokens: Vec<u32>,
    /// Logits after the last token; empty before the first prefill and after a truncation.
    logits: Vec<f32>,
    control: Arc<Control>,
    statistics: Statistics,
    scratch: sampling::Scratch,
    /// Why the session can no longer be used: a failed step could not be undone.
    broken: Option<Error>,
}

impl Session {
    /// An empty session. KV memory is taken from the model's pool as the session grows.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Session> {
        Session::with_policy(model, options, |setting| policy::create(&options.policy, setting))
    }

    /// As [`Session::new`], with a policy that the caller makes: one that has no name of its own, as a rule an
    /// experiment. docs/policies.md has an example.
    pub fn with_policy(
        model: &Model,
        options: &SessionOptions,
        make: impl FnOnce(Setting) -> Result<Box<dyn Policy>>,
    ) -> Result<Session> {
        let options = options.resolve(model)?;
        check_backend(model, &options.policy)?;
        let setting = Setting {
            backend: model.shared_backend().clone(),
            pool: model.pool().clone(),
            geometry: options.geometry,
            heads: model.config().heads,
            scale: model.config().attention_scale(),
            capacity: options.capacity,
            window: model.config().windows.iter().flatten().copied().min(),
            speculation: speculation(model, &options.policy)?,
        };
        Ok(Session {
            policy: make(setting)?,
            model: model.clone(),
            options,
            tokens: Vec::new(),
            logits: Vec::new(),
            control: Arc::default(),
            statistics: Statistics::default(),
            scratch: sampling::Scratch::default(),
            broken: None,
        })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// Tokens held, in order.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Most tokens that the session may hold.
    pub fn capacity(&self) -> usize {
        self.options.capacity
    }

    /// For other threads: cancel, length.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// Counts and times.
    pub fn statistics(&self) -> &Statistics {
        &self.statistics
    }

    /// Sets counts and times to zero.
    pub fn reset_statistics(&mut self) -> Result<()> {
        self.count()?;
        self.statistics = Statistics::default();
        self.policy.reset_counters();
        Ok(())
    }

    fn count(&mut self) -> Result<()> {
        let length = self.tokens.len();
        self.end(length, 0, |policy, step| policy.count(step))
    }

    /// Bytes of KV held, by tier.
    pub fn kv_bytes(&self) -> TierBytes {
        self.policy.bytes()
    }

    /// What some of its bytes in device memory are for.
    pub fn device_parts(&self) -> DeviceParts {
        self.policy.device_parts()
    }

    /// What the policy has done since the session began or since the last reset.
    pub fn kv_counters(&mut self) -> Result<KvCounters> {
        self.count()?;
        Ok(self.policy.counters())
    }

    /// Logits after the last token (`vocabulary` values).
    pub fn logits(&self) -> Result<&[f32]> {
        if self.logits.is_empty() {
            return Err(Error::invalid_argument(
                "the session has no logits: prefill or decode first (a truncation forgets them)",
            ));
        }
        Ok(&self.logits)
    }

    /// Forgets every token from `length` on. The logits go too, unless nothing is forgotten.
    ///
    /// Errors: `Unsupported` where the policy has dropped entries that the shorter sequence would have; the session
    /// is as it was.
    pub fn truncate(&mut self, length: usize) -> Result<()> {
        if length > self.tokens.len() {
            return Err(Error::invalid_argument(format!(
                "cannot truncate to {length} tokens: the session holds {}",
                self.tokens.len()
            )));
        }
        if length < self.tokens.len() {
            self.usable()?;
            self.count()?; // which tells a policy what its device has dropped
            let refused = |error: Error| error.within(format!("cannot truncate to {length} tokens"));
            self.policy.can_truncate(length).map_err(refused)?;
            let rows = self.tokens.len() - length;
            if let Err(error) = self.end(length, rows, |policy, step| policy.truncate(step, length)) {
                self.broken = Some(error.clone());
                return Err(error);
            }
            self.tokens.truncate(length);
            self.control.set_length(length);
            self.logits.clear();
        }
        Ok(())
    }

    /// Errors where a step that failed could not be undone.
    fn usable(&self) -> Result<()> {
        match &self.broken {
            Some(error) => Err(error.clone().within("the session can no longer be used, only freed")),
            None => Ok(()),
        }
    }

    /// Ends a step: tells the policy that rows from `position` on have come or gone.
    fn end(
        &mut self,
        position: usize,
        rows: usize,
        work: impl FnOnce(&mut dyn Policy, &Step<'_>) -> Result<()>,
    ) -> Result<()> {
        let model = self.model.clone();
        model.forward(|forward| {
            let phase = if rows == 1 { Phase::Decode } else { Phase::Prefill { last: true } };
            let (stream, fetch) = (&forward.workspace.stream, &forward.workspace.fetch);
            let backend = forward.backend;
            work(&mut *self.policy, &Step { backend, stream, fetch, layer: 0, position, rows, phase })
        })
    }

    /// Undoes a step that has failed with `error`, which is returned; a session that cannot be as it was is broken.
    fn roll_back(&mut self, error: Error) -> Error {
        let length = self.tokens.len();
        if let Err(again) = self.end(length, 0, |policy, step| policy.roll_back(step, length)) {
            self.broken = Some(again.within("a step that failed could not be undone"));
        }
        error
    }

    /// Appends `tokens` and computes the logits after the last.
    pub fn prefill(&mut self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            return Err(Error::invalid_argument("tokens is empty: a prefill needs at least one token"));
        }
        self.append(tokens, None)
    }

    /// Appends `tokens` and writes to `out[i]` the natural logarithm of the probability of `tokens[i]` after everything
    /// before it; NaN for the first token of an empty session, which nothing precedes.
    pub fn score(&mut self, tokens: &[u32], out: &mut [f32]) -> Result<()> {
        if tokens.is_empty() || out.len() != tokens.len() {
            return Err(Error::invalid_argument(format!(
                "a score needs one place for each of its {} tokens (at least one), not {}",
                tokens.len(),
                out.len()
            )));
        }
        if !self.tokens.is_empty() && self.logits.is_empty() {
            return Err(Error::invalid_argument(
                "the session has tokens but no logits (a truncation forgets them), so the first token cannot be scored",
            ));
        }
        self.append(tokens, Some(out))
    }

    fn append(&mut self, tokens: &[u32], mut scores: Option<&mut [f32]>) -> Result<()> {
        let start = Instant::now();
        let before = self.tokens.len();
        let mut logits = vec![0.0; self.model.dimensions().vocabulary];
        let count = tokens.len();
        self.transaction(tokens, |session| {
            let together = session.policy.prefills(before, count);
            if together > 0 {
                session.run_prompt(tokens, together, scores.as_deref_mut(), &mut logits)?;
                session.end(before, together, |policy, step| policy.commit(step))?;
            }
            if together < count {
                session.run_singly(tokens, together, scores.as_deref_mut(), &mut logits)?;
                session.end(before + together, count - together, |policy, step| policy.commit(step))?;
            }
            Ok(())
        })?;
        if let Some(scores) = scores {
            scores[0] = sampling::log_probability(&self.logits, tokens[0]);
        }
        self.commit(tokens, logits);
        self.statistics.prefill_tokens += tokens.len() as u64;
        self.statistics.prefill_seconds += start.elapsed().as_secs_f64();
        Ok(())
    }

    /// Appends `tokens`, whose entries `work` gives to the policy; the logits after them are zeros.
    pub(super) fn prompt(
        &mut self,
        tokens: &[u32],
        work: impl FnOnce(&mut dyn Policy, &Control) -> Result<()>,
    ) -> Result<()> {
        let (before, count) = (self.tokens.len(), tokens.len());
        self.transaction(tokens, |session| {
            let together = session.policy.prefills(before, count);
            if together < count {
                return Err(Error::unsupported(format!(
                    "the policy takes {together} tokens of a prompt of {count} at once"
                )));
            }
            work(&mut *session.policy, &session.control)?;
            session.end(before, count, |policy, step| policy.commit(step))
        })?;
        self.commit(tokens, vec![0.0; self.model.dimensions().vocabulary]);
        Ok(())
    }

    /// Runs `work`, which gives the policy the entries of `tokens` and commits them; undone where it fails.
    fn transaction(&mut self, tokens: &[u32], work: impl FnOnce(&mut Session) -> Result<()>) -> Result<()> {
        self.usable()?;
        self.check_tokens(tokens)?;
        self.control.check()?;
        self.policy.reserve(self.tokens.len() + tokens.len())?;
        work(self).map_err(|error| self.roll_back(error))
    }

    /// Runs the first `together` tokens of a prompt in chunks of many rows.
    fn run_prompt(
        &mut self,
        tokens: &[u32],
        together: usize,
        mut scores: Option<&mut [f32]>,
        logits: &mut [f32],
    ) -> Result<()> {
        let (model, before) = (self.model.clone(), self.tokens.len());
        tokens[..together].chunks(self.options.prefill_chunk).enumerate().try_for_each(|(i, chunk)| {
            let done = i * self.options.prefill_chunk;
            let last = done + chunk.len() == together;
            let mut part = [Part {
                policy: &mut *self.policy,
                control: &self.control,
                position: before + done,
                rows: chunk.len(),
                total: before + tokens.len(),
                phase: Phase::Prefill { last },
            }];
            model.forward(|mut forward| {
                forward.run(chunk, &mut part, Shape::Prefill, LOGIT_ROWS)?;
                if let Some(scores) = scores.as_deref_mut() {
                    // Row j of the chunk predicts token done + j + 1.
                    let following = &tokens[done + 1..tokens.len().min(done + chunk.len() + 1)];
                    for (block, targets) in following.chunks(LOGIT_ROWS).enumerate() {
                        let from = block * LOGIT_ROWS;
                        forward.head(chunk.len(), from, targets.len(), Shape::Prefill)?;
                        let at = done + 1 + from;
                        forward.log_probabilities(targets, &mut scores[at..at + targets.len()])?;
                    }
                }
                if last {
                    forward.head(chunk.len(), chunk.len() - 1, 1, Shape::Decode)?;
                    forward.download_logits(1, logits)?;
                }
                Ok(())
            })
        })
    }

    /// Runs a prompt's tokens from `first` on one at a time, for a policy that drops what they would attend together.
    fn run_singly(
        &mut self,
        tokens: &[u32],
        first: usize,
        mut scores: Option<&mut [f32]>,
        logits: &mut [f32],
    ) -> Result<()> {
        let (model, before) = (self.model.clone(), self.tokens.len());
        (first..tokens.len()).try_for_each(|i| {
            let mut part = [Part {
                policy: &mut *self.policy,
                control: &self.control,
                position: before + i,
                rows: 1,
                total: before + tokens.len(),
                phase: Phase::Decode,
            }];
            model.forward(|mut forward| {
                forward.run(&tokens[i..i + 1], &mut part, Shape::Decode, 1)?;
                forward.head(1, 0, 1, Shape::Decode)?;
                if let (Some(scores), true) = (scores.as_deref_mut(), i + 1 < tokens.len()) {
                    forward.log_probabilities(&tokens[i + 1..i + 2], &mut scores[i + 1..i + 2])?;
                }
                if i + 1 == tokens.len() {
                    forward.download_logits(1, logits)?;
                }
                Ok(())
            })
        })
    }

    /// Appends one token and computes the logits after it.
    pub fn decode(&mut self, token: u32) -> Result<()> {
        decode_batch(&mut [self], &[token])
    }

    /// Picks the next token from the session's logits; changes nothing but the statistics.
    pub fn sample(&mut self, options: &SamplingOptions) -> Result<u32> {
        let start = Instant::now();
        self.logits()?;
        let token = sampling::sample(&self.logits, options, &self.tokens, self.tokens.len() as u64, &mut self.scratch)?;
        self.statistics.sampled_tokens += 1;
        self.statistics.sample_seconds += start.elapsed().as_secs_f64();
        Ok(token)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let vocabulary = self.model.config().vocabulary;
        if let Some((i, token)) = tokens.iter().enumerate().find(|&(_, &token)| token as usize >= vocabulary) {
            return Err(Error::invalid_argument(format!(
                "tokens[{i}] is {token}, but the model's vocabulary has {vocabulary} tokens"
            )));
        }
        let (held, capacity) = (self.tokens.len(), self.options.capacity);
        if tokens.len() > capacity - held {
            return Err(Error::new(
                ErrorCode::Capacity,
                format!("{} more tokens do not fit the session: it holds {held} of at most {capacity}", tokens.len()),
            ));
        }
        Ok(())
    }

    fn commit(&mut self, tokens: &[u32], logits: Vec<f32>) {
        self.tokens.extend_from_slice(tokens);
        self.logits = logits;
        self.control.set_length(self.tokens.len());
    }
}

/// One decode step of several sessions of one model: appends `tokens[i]` to `sessions[i]` and computes the logits after
/// it. All of them, or none. Each session's result is bit-identical to a step of its own.
pub fn decode_batch(sessions: &mut [&mut Session], tokens: &[u32]) -> Result<()> {
    let start = Instant::now();
    let Some(first) = sessions.first() else {
        return Err(Error::invalid_argument("a batch needs at least one session"));
    };
    if tokens.len() != sessions.len() {
        return Err(Error::invalid_argument(format!("{} tokens for {} sessions", tokens.len(), sessions.len())));
    }
    let model = first.model.clone();
    for (i, (session, token)) in sessions.iter().zip(tokens).enumerate() {
        if !session.model.same(&model) {
            return Err(Error::invalid_argument(format!("sessions[{i}] belongs to another model than sessions[0]")));
        }
        session.usable().map_err(|e| e.within(format!("sessions[{i}]")))?;
        session.check_tokens(std::slice::from_ref(token)).map_err(|e| e.within(format!("sessions[{i}]")))?;
        session.control.check()?;
    }
    let mut begun = 0;
    let reserved = sessions.iter_mut().try_for_each(|session| {
        session.policy.reserve(session.tokens.len() + 1)?;
        begun += 1;
        Ok(())
    });
    if let Err(error) = reserved {
        // The others have not begun, and have nothing to undo.
        return Err(sessions[..begun].iter_mut().fold(error, |error, session| session.roll_back(error)));
    }
    let vocabulary = model.dimensions().vocabulary;
    let mut logits = vec![0.0; sessions.len() * vocabulary];
    let result = run_batch(&model, sessions, tokens, &mut logits).and_then(|link_seconds| {
        sessions.iter_mut().try_for_each(|s| {
            let length = s.tokens.len();
            s.end(length, 1, |policy, step| policy.commit(step))
        })?;
        Ok(link_seconds)
    });
    let link_seconds = match result {
        Ok(link_seconds) => link_seconds,
        Err(error) => return Err(sessions.iter_mut().fold(error, |error, session| session.roll_back(error))),
    };
    let seconds = start.elapsed().as_secs_f64();
    for ((session, token), row) in sessions.iter_mut().zip(tokens).zip(logits.chunks(vocabulary)) {
        session.commit(std::slice::from_ref(token), row.to_vec());
        session.statistics.decode_tokens += 1;
        session.statistics.decode_seconds += seconds;
        session.statistics.link_seconds += link_seconds;
    }
    Ok(())
}

/// Returns the seconds in which entries were fetched, as far as they are measured.
fn run_batch(model: &Model, sessions: &mut [&mut Session], tokens: &[u32], logits: &mut [f32]) -> Result<f64> {
    let mut parts: Vec<Part<'_>> = sessions
        .iter_mut()
        .map(|session| Part {
            position: session.tokens.len(),
            rows: 1,
            total: session.tokens.len() + 1,
            phase: Phase::Decode,
            policy: &mut *session.policy,
            control: &session.control,
        })
        .collect();
    let rows = parts.len();
    model.forward(|mut forward| {
        forward.begin_measuring()?;
        forward.run(tokens, &mut parts, Shape::Decode, rows)?;
        forward.head(rows, 0, rows, Shape::Decode)?;
        forward.download_logits(rows, logits)?;
        forward.end_measuring()
    })
}
