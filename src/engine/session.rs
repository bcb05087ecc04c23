//! One sequence: its tokens, its KV, the logits after its last token.

use std::sync::Arc;
use std::time::Instant;

use crate::backend::{DType, KvGeometry, Shape};
use crate::kv::EXTENT_TOKENS;
use crate::policy::{KvCounters, Policy, PolicyOptions, TierBytes};
use crate::{Error, ErrorCode, Result};

use super::forward::Part;
use super::sampling::{self, SamplingOptions};
use super::{Control, Model};

/// Rows of logits that a score holds at once: a vocabulary is wide, and each row is needed only for a moment.
pub(super) const LOGIT_ROWS: usize = 32;

/// Rows of a prefill that run at once unless the options say otherwise.
const DEFAULT_PREFILL_CHUNK: usize = 512;

/// How to create a session.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// What each layer attends, and where its entries live.
    pub policy: PolicyOptions,
    /// Most tokens that the session may hold; 0 for the model's context length.
    pub capacity: usize,
    /// Tokens of a prompt that run at once, which bounds scratch memory; 0 for 512.
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
            prefill_chunk: if self.prefill_chunk == 0 { DEFAULT_PREFILL_CHUNK } else { self.prefill_chunk },
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
}

impl Session {
    /// An empty session. KV memory is taken from the model's pool as the session grows.
    pub fn new(model: &Model, options: &SessionOptions) -> Result<Session> {
        let options = options.resolve(model)?;
        Ok(Session {
            policy: options.policy.kind.create(model.pool().clone(), options.geometry),
            model: model.clone(),
            options,
            tokens: Vec::new(),
            logits: Vec::new(),
            control: Arc::default(),
            statistics: Statistics::default(),
            scratch: sampling::Scratch::default(),
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
    pub fn reset_statistics(&mut self) {
        self.statistics = Statistics::default();
        self.policy.reset_counters();
    }

    /// Bytes of KV held, by tier.
    pub fn kv_bytes(&self) -> TierBytes {
        self.policy.bytes()
    }

    /// What the policy has done since the session began or since the last reset.
    pub fn kv_counters(&self) -> KvCounters {
        self.policy.counters()
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
    pub fn truncate(&mut self, length: usize) -> Result<()> {
        if length > self.tokens.len() {
            return Err(Error::invalid_argument(format!(
                "cannot truncate to {length} tokens: the session holds {}",
                self.tokens.len()
            )));
        }
        if length < self.tokens.len() {
            self.tokens.truncate(length);
            self.policy.truncate(length);
            self.control.set_length(length);
            self.logits.clear();
        }
        Ok(())
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
        self.check_tokens(tokens)?;
        self.control.check()?;
        let (model, before, total) = (self.model.clone(), self.tokens.len(), self.tokens.len() + tokens.len());
        self.policy.reserve(total)?;
        let vocabulary = model.dimensions().vocabulary;
        let mut logits = vec![0.0; vocabulary];
        let result = tokens.chunks(self.options.prefill_chunk).enumerate().try_for_each(|(i, chunk)| {
            let done = i * self.options.prefill_chunk;
            let last = done + chunk.len() == tokens.len();
            let mut part = [Part {
                policy: &mut *self.policy,
                control: &self.control,
                position: before + done,
                rows: chunk.len(),
                total,
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
                    forward.download_logits(1, &mut logits)?;
                }
                Ok(())
            })
        });
        if let Err(error) = result {
            self.policy.truncate(before);
            return Err(error);
        }
        if let Some(scores) = scores {
            scores[0] = sampling::log_probability(&self.logits, tokens[0]);
        }
        self.commit(tokens, logits);
        self.statistics.prefill_tokens += tokens.len() as u64;
        self.statistics.prefill_seconds += start.elapsed().as_secs_f64();
        Ok(())
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
        session.check_tokens(std::slice::from_ref(token)).map_err(|e| e.within(format!("sessions[{i}]")))?;
        session.control.check()?;
    }
    let vocabulary = model.dimensions().vocabulary;
    let mut logits = vec![0.0; sessions.len() * vocabulary];
    let result = run_batch(&model, sessions, tokens, &mut logits);
    if let Err(error) = result {
        for session in sessions {
            session.policy.truncate(session.tokens.len());
        }
        return Err(error);
    }
    let seconds = start.elapsed().as_secs_f64();
    for ((session, token), row) in sessions.iter_mut().zip(tokens).zip(logits.chunks(vocabulary)) {
        session.commit(std::slice::from_ref(token), row.to_vec());
        session.statistics.decode_tokens += 1;
        session.statistics.decode_seconds += seconds;
    }
    Ok(())
}

fn run_batch(model: &Model, sessions: &mut [&mut Session], tokens: &[u32], logits: &mut [f32]) -> Result<()> {
    for session in sessions.iter_mut() {
        session.policy.reserve(session.tokens.len() + 1)?;
    }
    let mut parts: Vec<Part<'_>> = sessions
        .iter_mut()
        .map(|session| Part {
            position: session.tokens.len(),
            rows: 1,
            total: session.tokens.len() + 1,
            policy: &mut *session.policy,
            control: &session.control,
        })
        .collect();
    let rows = parts.len();
    model.forward(|mut forward| {
        forward.run(tokens, &mut parts, Shape::Decode, rows)?;
        forward.head(rows, 0, rows, Shape::Decode)?;
        forward.download_logits(rows, logits)
    })
}
