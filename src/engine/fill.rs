//! Entries of a text that was never computed: for measuring decode at lengths whose prefill would take too long.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::Control;
use super::forward::Forward;
use super::session::Session;
use crate::backend::{AttentionShape, Buffer, DType, Place};
use crate::model::config::Config;
use crate::policy::{Phase, Policy, Step};
use crate::{Error, Result};

/// Tokens whose entries are handed over at a time.
const CHUNK: usize = 1024;

/// Layers and chunks take their entries from one random buffer, each from another one of these rows on.
const OFFSETS: usize = 61;

impl Session {
    /// Fills an empty session with `length` tokens of id 0 whose keys and values are random numbers from `seed`. The
    /// policy is taken through a prompt; nothing is computed, and the logits are zeros. For measuring speed only: what is
    /// decoded afterwards means nothing.
    ///
    /// Errors: as [`Session::prefill`]; `InvalidArgument` for a session that is not empty.
    pub fn fill(&mut self, length: usize, seed: u64) -> Result<()> {
        if !self.tokens().is_empty() || length == 0 {
            return Err(Error::invalid_argument(format!(
                "a fill needs an empty session and at least one token: this one holds {}, and {length} were asked for",
                self.tokens().len()
            )));
        }
        let model = self.model().clone();
        self.prompt(&vec![0; length], |policy, control| {
            model.forward(|forward| entries(&forward, model.config(), policy, control, length, seed))
        })
    }
}

/// Takes the policy through a prompt of `length` tokens.
fn entries(
    forward: &Forward<'_>,
    config: &Config,
    policy: &mut dyn Policy,
    control: &Control,
    length: usize,
    seed: u64,
) -> Result<()> {
    let backend = forward.backend;
    let (stream, fetch) = (&forward.workspace.stream, &forward.workspace.fetch);
    let (kv_width, q_width) = (config.kv_heads * config.head_dim, config.heads * config.head_dim);
    let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
    let shape = AttentionShape { heads, kv_heads, head_dim, scale: forward.attention_scale, window: None };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut upload = |rows: usize, width: usize| -> Result<Buffer> {
        let bytes: Vec<u8> = (0..rows * width).flat_map(|_| uniform(&mut random).to_ne_bytes()).collect();
        let mut buffer = backend.allocate(bytes.len(), Place::Device, "random entries")?;
        backend.upload(stream, &bytes, &mut buffer, 0)?;
        Ok(buffer)
    };
    let most = CHUNK.min(length);
    let (keys, values) = (upload(most + OFFSETS, kv_width)?, upload(most + OFFSETS, kv_width)?);
    let queries = upload(most, q_width)?;
    let keys = keys.rows(DType::F32, most + OFFSETS, kv_width);
    let values = values.rows(DType::F32, most + OFFSETS, kv_width);
    for layer in 0..config.layers {
        for (chunk, position) in (0..length).step_by(CHUNK).enumerate() {
            control.check()?;
            let rows = CHUNK.min(length - position);
            let last = position + rows == length;
            let step = Step { backend, stream, fetch, layer, position, rows, phase: Phase::Prefill { last } };
            let at = (7 * layer + 3 * chunk) % OFFSETS;
            policy.append(&step, keys.row_range(at, rows), values.row_range(at, rows))?;
            if last {
                policy.land(&step)?;
                policy.observe(&step, &shape, queries.rows(DType::F32, most, q_width).row_range(0, rows))?;
            }
        }
    }
    backend.synchronize(stream)
}

/// From −√3 to √3: a variance of one.
fn uniform(random: &mut ChaCha8Rng) -> f32 {
    (random.next_u32() as f32 / u32::MAX as f32 * 2.0 - 1.0) * 3f32.sqrt()
}
