//! The step loop: tokens in, hidden states out, keys and values to each sequence's policy on the way.
//!
//! One function serves prefill (many rows of one sequence) and decode (one row of each of many sequences): a step is a
//! list of [`Part`]s, each of which is consecutive rows of one sequence.

use crate::Result;
use crate::backend::{AttentionShape, Backend, Event, Norm, Rows, Segment, Shape, Stream};
use crate::model::config::Config;
use crate::model::decoder::{Attention, Block, Decoder, Mlp, NormPlacement, Positions};
use crate::policy::{Phase, Policy, Step};

use super::Control;
use super::rehearse;
use super::workspace::{Input, Workspace};

/// The widths that scratch memory is cut to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dimensions {
    pub(super) embedding: usize,
    pub(super) hidden: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) qkv: usize,
    pub(super) attended: usize,
    pub(super) up: usize,
    pub(super) activated: usize,
    pub(super) rotary: usize,
    pub(super) vocabulary: usize,
}

impl Dimensions {
    pub(super) fn new(config: &Config, decoder: &Decoder) -> Dimensions {
        let widest = |width: fn(&Block) -> usize| decoder.blocks.iter().map(width).max().unwrap_or(0);
        Dimensions {
            embedding: decoder.embedding.inputs,
            hidden: config.hidden,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            qkv: widest(|block| block.attention.qkv.outputs),
            attended: widest(|block| block.attention.output.inputs),
            up: widest(|block| block.mlp.up.outputs),
            activated: widest(|block| block.mlp.down.inputs),
            rotary: match &decoder.positions {
                Positions::Rotary(rotary) => rotary.short.dims(),
                Positions::Learned { .. } => 0,
            },
            vocabulary: decoder.embedding.outputs,
        }
    }
}

/// Consecutive rows of one sequence in a step.
pub(super) struct Part<'a> {
    /// The sequence's KV.
    pub(super) policy: &'a mut dyn Policy,
    /// Who may cancel it.
    pub(super) control: &'a Control,
    /// Position of its first row's token.
    pub(super) position: usize,
    /// Number of rows.
    pub(super) rows: usize,
    /// Tokens that the sequence will hold when the whole call is done: LongRoPE picks its frequencies by it.
    pub(super) total: usize,
    /// Prompt or decode.
    pub(super) phase: Phase,
}

impl Part<'_> {
    /// What the part's policy is told in `layer`.
    pub(super) fn step<'a>(
        &self,
        backend: &'a dyn Backend,
        (stream, fetch): (&'a Stream, &'a Stream),
        layer: usize,
    ) -> Step<'a> {
        Step { backend, stream, fetch, layer, position: self.position, rows: self.rows, phase: self.phase }
    }
}

/// Looks on while a step runs: what calibration captures. An error ends the step.
pub(super) trait Probe {
    /// A layer's attention input, and its queries, keys and values as projected: not yet normalised, not yet rotated.
    fn projected(&mut self, stream: &Stream, layer: usize, input: Rows<'_>, qkv: Rows<'_>) -> Result<()>;

    /// The same queries, keys and values after the heads' norms, not yet rotated.
    fn normalised(&mut self, stream: &Stream, layer: usize, qkv: Rows<'_>) -> Result<()>;
}

/// Runs steps of one model in one workspace.
pub(super) struct Forward<'a> {
    pub(super) backend: &'a dyn Backend,
    pub(super) decoder: &'a Decoder,
    pub(super) dimensions: &'a Dimensions,
    pub(super) attention_scale: f32,
    pub(super) workspace: &'a mut Workspace,
    pub(super) probe: Option<&'a mut dyn Probe>,
    /// When the side stream will have read the layer's input for the queries of the next one.
    pub(super) queried: Option<Event>,
}

impl Forward<'_> {
    /// Runs all layers over `tokens`, the rows of all `parts` in order, and leaves the last layer's output in the
    /// workspace. Room has been reserved in every policy. An error, or a cancellation of any part, leaves entries past
    /// the committed lengths, which mean nothing.
    pub(super) fn run(
        &mut self,
        tokens: &[u32],
        parts: &mut [Part<'_>],
        shape: Shape,
        logit_rows: usize,
    ) -> Result<()> {
        let rows = tokens.len();
        self.workspace.reserve(self.backend, rows, logit_rows)?;
        self.embed(tokens, parts)?;
        self.prefetch(0, parts)?;
        for (layer, block) in self.decoder.blocks.iter().enumerate() {
            for part in parts.iter() {
                part.control.check()?;
            }
            self.prefetch(layer + 1, parts)?;
            self.block(layer, block, rows, parts, shape)?;
        }
        Ok(())
    }

    /// Lets policies read ahead what `layer` will attend in any case.
    fn prefetch(&self, layer: usize, parts: &mut [Part<'_>]) -> Result<()> {
        if layer == self.decoder.blocks.len() {
            return Ok(());
        }
        parts.iter_mut().try_for_each(|part| {
            let step = part.step(self.backend, self.workspace.streams(), layer);
            part.policy.prefetch(&step)
        })
    }

    fn embed(&mut self, tokens: &[u32], parts: &[Part<'_>]) -> Result<()> {
        let (backend, w, rows) = (self.backend, &mut *self.workspace, tokens.len());
        let positions: Vec<u32> =
            parts.iter().flat_map(|part| (part.position..part.position + part.rows).map(|p| p as u32)).collect();
        w.tokens.upload(backend, &w.stream, tokens)?;
        w.positions.upload(backend, &w.stream, &positions)?;

        let table = &self.decoder.embedding;
        if let Some(project_in) = &self.decoder.project_in {
            backend.embed(&w.stream, table, w.tokens.get(rows), false, w.embedded.get_mut(rows))?;
            let shape = Shape::Decode;
            backend.matmul(&w.stream, w.embedded.get(rows), project_in, false, shape, w.hidden.get_mut(rows))?;
        } else {
            backend.embed(&w.stream, table, w.tokens.get(rows), false, w.hidden.get_mut(rows))?;
        }

        match &self.decoder.positions {
            Positions::Learned { table, offset } => {
                let lookups: Vec<u32> = positions.iter().map(|p| p + *offset as u32).collect();
                w.lookups.upload(backend, &w.stream, &lookups)?;
                backend.embed(&w.stream, table, w.lookups.get(rows), true, w.hidden.get_mut(rows))
            }
            Positions::Rotary(rotary) => {
                let mut row = 0;
                for part in parts {
                    let rotation = rotary.for_length(part.total);
                    let at = w.positions.get(rows).row_range(row, part.rows);
                    let table = w.rotation.get_mut(rows).row_range(row, part.rows);
                    backend.rotation_table(&w.stream, rotation, at, table)?;
                    row += part.rows;
                }
                Ok(())
            }
        }
    }

    fn block(&mut self, layer: usize, block: &Block, rows: usize, parts: &mut [Part<'_>], shape: Shape) -> Result<()> {
        match block.placement {
            NormPlacement::Pre => {
                self.normalise(rows, &block.attention_norm)?;
                let rehearsed = self.rehearse(layer + 1, Some(Input::Normed), parts)?;
                self.attention(layer, &block.attention, Input::Normed, (rows, shape), parts, &rehearsed)?;
                self.normalise(rows, &block.mlp_norm)?;
                self.mlp(&block.mlp, Input::Normed, rows, shape)
            }
            NormPlacement::Post => {
                let rehearsed = self.rehearse(layer + 1, Some(Input::Hidden), parts)?;
                self.attention(layer, &block.attention, Input::Hidden, (rows, shape), parts, &rehearsed)?;
                self.normalise(rows, &block.attention_norm)?;
                self.workspace.exchange_hidden_and_normed();
                self.mlp(&block.mlp, Input::Hidden, rows, shape)?;
                self.normalise(rows, &block.mlp_norm)?;
                self.workspace.exchange_hidden_and_normed();
                Ok(())
            }
        }
    }

    /// normed = norm(hidden).
    fn normalise(&mut self, rows: usize, norm: &Norm) -> Result<()> {
        let w = &mut *self.workspace;
        self.backend.norm(&w.stream, w.hidden.get(rows), norm, w.normed.get_mut(rows))
    }

    /// hidden += output(attend(qkv(input))). The policies of the parts that were `rehearsed` for the next layer choose what they
    /// fetch for it beside the first product.
    fn attention(
        &mut self,
        layer: usize,
        attention: &Attention,
        input: Input,
        (rows, shape): (usize, Shape),
        parts: &mut [Part<'_>],
        rehearsed: &[usize],
    ) -> Result<()> {
        let (backend, d, w) = (self.backend, self.dimensions, &mut *self.workspace);
        let (q_width, kv_width) = (d.heads * d.head_dim, d.kv_heads * d.head_dim);
        let mut told = Ok(());
        backend.matmul_beside(
            &w.stream,
            input.of(&w.hidden, &w.normed).get(rows),
            &attention.qkv,
            false,
            shape,
            w.qkv.get_mut(rows),
            &mut || told = rehearse::tell(backend, (&w.stream, &w.fetch), layer + 1, rehearsed, parts),
        )?;
        told?;
        if let Some(probe) = &mut self.probe {
            probe.projected(&w.stream, layer, input.of(&w.hidden, &w.normed).get(rows), w.qkv.get(rows))?;
        }
        if let Some(norm) = &attention.query_norm {
            backend.norm_heads(&w.stream, w.qkv.get_mut(rows).col_range(0, q_width), norm)?;
        }
        if let Some(norm) = &attention.key_norm {
            backend.norm_heads(&w.stream, w.qkv.get_mut(rows).col_range(q_width, kv_width), norm)?;
        }
        if let Some(probe) = &mut self.probe {
            probe.normalised(&w.stream, layer, w.qkv.get(rows))?;
        }
        if let Positions::Rotary(rotary) = &self.decoder.positions {
            // Queries and keys lie side by side and rotate alike. The table already holds each row's own frequencies.
            let heads = w.qkv.get_mut(rows).col_range(0, q_width + kv_width);
            backend.rotate(&w.stream, &rotary.short, w.rotation.get(rows), d.head_dim, heads)?;
        }
        let late = self.rehearse(layer, None, parts)?;
        rehearse::tell(backend, self.workspace.streams(), layer, &late, parts)?;

        let w = &mut *self.workspace;
        let qkv = w.qkv.get(rows);
        let mut row = 0;
        for part in parts.iter_mut() {
            let own = qkv.row_range(row, part.rows);
            let (keys, values) = (own.col_range(q_width, kv_width), own.col_range(q_width + kv_width, kv_width));
            let step = part.step(backend, (&w.stream, &w.fetch), layer);
            part.policy.append(&step, keys, values)?;
            part.policy.land(&step)?;
            row += part.rows;
        }
        let mut row = 0;
        let segments: Vec<Segment<'_>> = parts
            .iter()
            .map(|part| {
                let (runs, visible) = part.policy.attended(&part.step(backend, (&w.stream, &w.fetch), layer));
                row += part.rows;
                Segment { row: row - part.rows, rows: part.rows, position: part.position, runs, visible }
            })
            .collect();
        let attention_shape = AttentionShape {
            heads: d.heads,
            kv_heads: d.kv_heads,
            head_dim: d.head_dim,
            scale: self.attention_scale,
            window: attention.window,
        };
        let queries = qkv.col_range(0, q_width);
        backend.attend(&w.stream, queries, &attention_shape, &segments, w.attended.get_mut(rows))?;
        let mut row = 0;
        for part in parts.iter_mut() {
            let step = part.step(backend, (&w.stream, &w.fetch), layer);
            if step.phase == Phase::Decode {
                part.policy.complete(&step, w.attended.get_mut(rows).row_range(row, 1))?;
            }
            part.policy.observe(&step, &attention_shape, queries.row_range(row, part.rows))?;
            row += part.rows;
        }
        if let Some(queried) = self.queried.take() {
            backend.wait(&w.stream, &queried)?;
        }
        backend.matmul(&w.stream, w.attended.get(rows), &attention.output, true, shape, w.hidden.get_mut(rows))
    }

    /// hidden += down(activation(up(input))).
    fn mlp(&mut self, mlp: &Mlp, input: Input, rows: usize, shape: Shape) -> Result<()> {
        let (backend, w) = (self.backend, &mut *self.workspace);
        backend.matmul(
            &w.stream,
            input.of(&w.hidden, &w.normed).get(rows),
            &mlp.up,
            false,
            shape,
            w.up.get_mut(rows),
        )?;
        backend.activate(&w.stream, w.up.get(rows), mlp.activation, w.activated.get_mut(rows))?;
        backend.matmul(&w.stream, w.activated.get(rows), &mlp.down, true, shape, w.hidden.get_mut(rows))
    }

    /// Leaves the logits of rows `from..from + count` of the last [`Forward::run`], which had `rows` rows, in the
    /// workspace. `count` is at most the `logit_rows` of that run.
    pub(super) fn head(&mut self, rows: usize, from: usize, count: usize, shape: Shape) -> Result<()> {
        let (backend, decoder, w) = (self.backend, self.decoder, &mut *self.workspace);
        let mut x = w.hidden.get(rows).row_range(from, count);
        if let Some(norm) = &decoder.final_norm {
            backend.norm(&w.stream, x, norm, w.selected.get_mut(count))?;
            x = w.selected.get(count);
        }
        if let Some(project_out) = &decoder.project_out {
            backend.matmul(&w.stream, x, project_out, false, shape, w.projected.get_mut(count))?;
            x = w.projected.get(count);
        }
        let head = decoder.head.as_ref().unwrap_or(&decoder.embedding);
        backend.matmul(&w.stream, x, head, false, shape, w.logits.get_mut(count))
    }

    /// Copies the first `count` rows of logits out; `logits` is `count × vocabulary`.
    pub(super) fn download_logits(&mut self, count: usize, logits: &mut [f32]) -> Result<()> {
        let w = &mut *self.workspace;
        self.backend.download(&w.stream, w.logits.get(count), as_bytes_mut(logits))
    }

    /// Log probabilities of `targets`, one for each of the first rows of logits.
    pub(super) fn log_probabilities(&mut self, targets: &[u32], out: &mut [f32]) -> Result<()> {
        let (w, count) = (&mut *self.workspace, targets.len());
        w.targets.upload(self.backend, &w.stream, targets)?;
        let scores = w.scores.get_mut(count);
        self.backend.log_probability(&w.stream, w.logits.get(count), w.targets.get(count), scores)?;
        self.backend.download(&w.stream, w.scores.get(count), as_bytes_mut(out))
    }
}

fn as_bytes_mut(values: &mut [f32]) -> &mut [u8] {
    // SAFETY: every byte pattern is a valid f32 and the view covers exactly `values`, borrowed as long as the result.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), std::mem::size_of_val(values)) }
}
