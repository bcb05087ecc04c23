//! Watching a run: what each layer computes, copied to the host, and KV for one layer at a time.

use crate::Result;
use crate::backend::{Backend, Buffer, DType, KvGeometry, KvRuns, KvRunsMut, Place, Rows, Shape, Stream, Visible};
use crate::engine::forward::{Forward, Part, Probe};
use crate::engine::workspace::Workspace;
use crate::engine::{Control, Model};
use crate::kv::EXTENT_TOKENS;
use crate::policy::{Phase, Policy, Step, TierBytes};
use crate::speculate::{Captured, Layout};

/// First tokens of a piece: attention sinks, whose states are like no other token's.
const SINKS: usize = 4;

/// Takes what was captured of a layer; `None` for layer 0, which has no layer before it.
pub(super) type Take<'a> = &'a mut dyn FnMut(&Stream, usize, Option<Captured<'_>>) -> Result<()>;

/// Runs `tokens` through the model in pieces of `piece` tokens and hands over what each layer leaves behind.
pub(super) fn capture_layers(
    model: &Model,
    tokens: &[u32],
    piece: usize,
    capture: &mut Capture<'_>,
    take: Take<'_>,
) -> Result<()> {
    let (backend, config) = (model.backend(), model.config());
    let geometry = KvGeometry {
        layers: 1,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        extent_tokens: EXTENT_TOKENS,
        dtype: DType::F32,
    };
    let mut caches =
        tokens.chunks(piece).map(|_| OneLayer::new(backend, geometry, piece)).collect::<Result<Vec<_>>>()?;
    let control = Control::default();
    let mut parts: Vec<Part<'_>> = caches
        .iter_mut()
        .zip(tokens.chunks(piece))
        .map(|(cache, tokens)| Part {
            policy: cache,
            control: &control,
            position: 0,
            rows: tokens.len(),
            total: piece,
            phase: Phase::Prefill { last: true },
        })
        .collect();
    let mut workspace = Workspace::new(backend, model.dimensions())?;
    let mut forward = Forward {
        backend,
        decoder: model.decoder(),
        dimensions: model.dimensions(),
        attention_scale: config.attention_scale(),
        workspace: &mut workspace,
        probe: Some(&mut Watch { capture, take }),
        queried: None,
    };
    forward.run(tokens, &mut parts, Shape::Prefill, 1)
}

/// Host copies of what a layer computes, without the rows of sinks.
pub(super) struct Capture<'a> {
    backend: &'a dyn Backend,
    layout: Layout,
    /// Runs of rows that are no sinks.
    kept: Vec<(usize, usize)>,
    positions: Vec<usize>,
    previous: Vec<f32>,
    input: Vec<f32>,
    projected: Vec<f32>,
    queries: Vec<f32>,
    keys: Vec<f32>,
}

impl<'a> Capture<'a> {
    pub(super) fn new(backend: &'a dyn Backend, layout: Layout, tokens: usize, piece: usize) -> Capture<'a> {
        let pieces = (0..tokens).step_by(piece).map(|start| (start, piece.min(tokens - start)));
        let kept: Vec<_> =
            pieces.filter(|&(_, rows)| rows > SINKS).map(|(start, rows)| (start + SINKS, rows - SINKS)).collect();
        let positions = kept.iter().flat_map(|&(_, rows)| SINKS..SINKS + rows).collect();
        let empty = Vec::new;
        Capture {
            backend,
            layout,
            kept,
            positions,
            previous: empty(),
            input: empty(),
            projected: empty(),
            queries: empty(),
            keys: empty(),
        }
    }
}

/// Copies the kept rows of `rows`, which are activations.
fn copy(
    backend: &dyn Backend,
    stream: &Stream,
    kept: &[(usize, usize)],
    rows: Rows<'_>,
    to: &mut Vec<f32>,
) -> Result<()> {
    assert_eq!(rows.dtype(), DType::F32, "calibration reads activations of f32");
    let count: usize = kept.iter().map(|&(_, rows)| rows).sum();
    to.resize(count * rows.cols(), 0.0);
    let mut rest = &mut to[..];
    for &(from, count) in kept {
        let (own, after) = rest.split_at_mut(count * rows.cols());
        // SAFETY: every byte pattern is a valid f32, and the view covers exactly `own`, borrowed for this call.
        let bytes = unsafe { std::slice::from_raw_parts_mut(own.as_mut_ptr().cast(), std::mem::size_of_val(own)) };
        backend.download(stream, rows.row_range(from, count), bytes)?;
        rest = after;
    }
    Ok(())
}

/// The probe of a calibration.
struct Watch<'a, 'b> {
    capture: &'a mut Capture<'b>,
    take: Take<'a>,
}

impl Probe for Watch<'_, '_> {
    fn projected(&mut self, stream: &Stream, _: usize, input: Rows<'_>, qkv: Rows<'_>) -> Result<()> {
        let c = &mut *self.capture;
        std::mem::swap(&mut c.previous, &mut c.input);
        copy(c.backend, stream, &c.kept, input, &mut c.input)?;
        let queries = qkv.col_range(0, c.layout.heads * c.layout.head_dim);
        copy(c.backend, stream, &c.kept, queries, &mut c.projected)
    }

    fn normalised(&mut self, stream: &Stream, layer: usize, qkv: Rows<'_>) -> Result<()> {
        let c = &mut *self.capture;
        let (width, kv_width) = (c.layout.heads * c.layout.head_dim, c.layout.kv_heads * c.layout.head_dim);
        copy(c.backend, stream, &c.kept, qkv.col_range(0, width), &mut c.queries)?;
        copy(c.backend, stream, &c.kept, qkv.col_range(width, kv_width), &mut c.keys)?;
        let captured = Captured {
            previous: &c.previous,
            projected: &c.projected,
            queries: &c.queries,
            keys: &c.keys,
            positions: &c.positions,
        };
        (self.take)(stream, layer, (layer > 0).then_some(captured))
    }
}

/// Keys and values of one sequence, of the layer that is being computed only: a prefill at once needs no more.
struct OneLayer {
    extents: Vec<Buffer>,
    geometry: KvGeometry,
}

impl OneLayer {
    fn new(backend: &dyn Backend, geometry: KvGeometry, tokens: usize) -> Result<OneLayer> {
        let extent = |_| backend.allocate(geometry.extent_bytes(), Place::Device, "KV of the calibration text");
        Ok(OneLayer { extents: (0..geometry.extents(tokens)).map(extent).collect::<Result<_>>()?, geometry })
    }
}

impl Policy for OneLayer {
    fn reserve(&mut self, _: usize) -> Result<()> {
        Ok(())
    }

    fn append(&mut self, step: &Step<'_>, keys: Rows<'_>, values: Rows<'_>) -> Result<()> {
        let mut runs = KvRunsMut::new(&mut self.extents, self.geometry, 0);
        step.backend.store_kv(step.stream, keys, values, &mut runs, step.position)
    }

    fn attended(&self, _: &Step<'_>) -> (KvRuns<'_>, Visible<'_>) {
        (KvRuns::new(&self.extents, self.geometry, 0), Visible::Causal)
    }

    fn roll_back(&mut self, _: &Step<'_>, _: usize) -> Result<()> {
        Ok(())
    }

    fn truncate(&mut self, _: &Step<'_>, _: usize) -> Result<()> {
        Ok(())
    }

    fn bytes(&self) -> TierBytes {
        TierBytes { device: self.extents.iter().map(Buffer::bytes).sum(), ..TierBytes::default() }
    }
}
