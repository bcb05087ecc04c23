//! The tail: one entry that stands for everything a step does not attend (ALGORITHM.md §7.6).
//!
//! Its weight in each query head is the probability that the rehearsal gives to the rows that are neither on the device nor
//! selected; its value is the mean of all values so far. Without it, what is attended gets all of the attention, as if
//! the rest were not there: thousands of tokens of which none matters, but all together do.
//!
//! Means lie on the device, twice: a step reads the ones that the step before has left and writes the others, so that a
//! step that fails leaves no trace.

use crate::Result;
use crate::backend::{
    AttentionShape, Backend, Blend, Buffer, DType, KvGeometry, KvRuns, Place, Rows, RowsMut, Segment, Visible,
};
use crate::kv::{self, Store};
use crate::policy::Step;
use crate::policy::staged::Staged;

pub(super) struct Tail {
    /// Mean value of each KV head: a row a layer of the store.
    means: [Buffer; 2],
    /// What the last step has left.
    current: usize,
    /// Whether the step under way is over: from the next one on, what it has left counts.
    committed: bool,
    layers: Vec<Layer>,
    kv_heads: usize,
    head_dim: usize,
    /// A query to which all keys are alike, and what it attends.
    no_query: Buffer,
    mean: Buffer,
    /// What each query head gives to the tail: a row a layer of the store.
    weights: Buffer,
    heads: usize,
}

#[derive(Clone, Copy, Default)]
struct Layer {
    /// This step has written the layer's mean.
    written: bool,
    /// This step has rehearsed the layer.
    rehearsed: bool,
}

/// What [`Tail::bytes`] will say.
pub(super) fn bytes(stored: &KvGeometry) -> usize {
    (2 * stored.layers + 2) * stored.kv_heads * stored.head_dim * 4
}

impl Tail {
    pub(super) fn new(backend: &dyn Backend, stored: &KvGeometry, heads: usize) -> Result<Tail> {
        let &KvGeometry { layers, kv_heads, head_dim, .. } = stored;
        let means = || backend.allocate(layers * kv_heads * head_dim * 4, Place::Device, "mean values");
        Ok(Tail {
            means: [means()?, means()?],
            current: 0,
            committed: false,
            layers: vec![Layer::default(); layers],
            kv_heads,
            head_dim,
            no_query: backend.allocate(kv_heads * head_dim * 4, Place::Device, "a query of zeros")?,
            mean: backend.allocate(kv_heads * head_dim * 4, Place::Device, "mean values")?,
            weights: backend.allocate(layers * heads * 4, Place::Device, "weights of tails")?,
            heads,
        })
    }

    /// Bytes of device memory, but for the few of the weights.
    pub(super) fn bytes(&self) -> usize {
        self.means.iter().map(Buffer::bytes).sum::<usize>() + self.no_query.bytes() + self.mean.bytes()
    }

    /// A step begins.
    pub(super) fn begin(&mut self) {
        if std::mem::take(&mut self.committed) {
            self.current ^= 1;
        }
        self.layers.fill(Layer::default());
    }

    /// The step has succeeded; it can still be rolled back.
    pub(super) fn commit(&mut self) {
        self.committed = true;
    }

    /// Forgets the step.
    pub(super) fn roll_back(&mut self) {
        self.committed = false;
        self.layers.fill(Layer::default());
    }

    /// Where a rehearsal on the device puts the layer's weights.
    pub(super) fn weights_mut(&mut self, layer: usize) -> RowsMut<'_> {
        self.weights.rows_mut(DType::F32, self.layers.len(), self.heads).row_range(layer, 1)
    }

    /// The layer has been rehearsed, and its weights are there: it does not attend everything.
    pub(super) fn rehearsed(&mut self, layer: usize) {
        self.layers[layer].rehearsed = true;
    }

    /// As [`Tail::rehearsed`], where the host has the weights.
    pub(super) fn rehearsed_by_host(&mut self, step: &Step<'_>, layer: usize, weights: &[f32]) -> Result<()> {
        assert_eq!(weights.len(), self.heads, "a weight a query head");
        let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_ne_bytes()).collect();
        step.backend.upload(step.stream, &bytes, &mut self.weights, layer * bytes.len())?;
        self.rehearsed(layer);
        Ok(())
    }

    /// Takes the values of the token at `step.position` into the layer's mean.
    pub(super) fn append(&mut self, step: &Step<'_>, layer: usize, values: Rows<'_>) -> Result<()> {
        let blend = self.next_mean(layer, step.position);
        step.backend.blend(step.stream, blend, values)
    }

    /// How the layer's mean moves towards the values of the token at `position`, for whoever lets it.
    pub(super) fn next_mean(&mut self, layer: usize, position: usize) -> Blend<'_> {
        self.blend(layer, 1.0 / (position + 1) as f32).0
    }

    /// Moves the layer's mean by `factor` towards that of the first `rows` rows of `runs`. Where those are `rows` of
    /// n that there will be, the factor is rows / n; where they go and n stay, it is −rows / n.
    pub(super) fn blend_runs(
        &mut self,
        step: &Step<'_>,
        layer: usize,
        runs: KvRuns<'_>,
        rows: usize,
        factor: f32,
    ) -> Result<()> {
        let (kv_heads, head_dim, activation) = (self.kv_heads, self.head_dim, step.backend.activation());
        // What a query attends to which all keys are alike is the mean of their values.
        let shape = AttentionShape { heads: kv_heads, kv_heads, head_dim, scale: 1.0, window: None };
        let counts = vec![rows as u32; kv_heads];
        let segment = Segment { row: 0, rows: 1, position: rows - 1, runs, visible: Visible::First(&counts) };
        let width = self.width();
        let (query, mean) = (self.no_query.rows(activation, 1, width), self.mean.rows_mut(activation, 1, width));
        step.backend.attend(step.stream, query, &shape, &[segment], mean)?;
        let (blend, mean) = self.blend(layer, factor);
        step.backend.blend(step.stream, blend, mean.rows(activation, 1, width))
    }

    /// Takes the values of every token from `length` on out of the means, of a sequence that ends with the step's tokens:
    /// by reading what is forgotten, from the end on, or what stays, whichever is less, through areas that hold nothing. (Out
    /// of order nobody knows where the forgotten ones lie.)
    pub(super) fn truncate(
        &mut self,
        step: &Step<'_>,
        staged: &mut Staged,
        store: &mut dyn Store,
        length: usize,
        in_order: bool,
    ) -> Result<()> {
        let forgotten = (step.position + step.rows).saturating_sub(length);
        self.begin();
        if forgotten == 0 || length == 0 {
            return Ok(());
        }
        let goes = forgotten < length && in_order;
        let (first, end) = if goes { (length, length + forgotten) } else { (0, length) };
        for layer in 0..self.layers.len() {
            for at in (first..end).step_by(kv::EXTENT_TOKENS) {
                let rows = kv::EXTENT_TOKENS.min(end - at);
                let begin = if goes { end - (at - first) - rows } else { at };
                let runs = staged.bring(step, layer, store, begin..begin + rows)?;
                let factor = if goes { -(rows as f32) / begin as f32 } else { rows as f32 / (begin + rows) as f32 };
                self.blend_runs(step, layer, runs, rows, factor)?;
            }
        }
        self.commit();
        self.begin();
        staged.truncate(0);
        Ok(())
    }

    /// Gives the tail its part of what the layer's query heads have attended, a row of `heads × head_dim`.
    pub(super) fn add(&self, step: &Step<'_>, layer: usize, attended: RowsMut<'_>) -> Result<()> {
        if !self.layers[layer].rehearsed {
            return Ok(()); // everything has been attended
        }
        let means = self.means[self.newest(layer)].rows(DType::F32, self.layers.len(), self.width());
        let weights = self.weights.rows(DType::F32, self.layers.len(), self.heads);
        step.backend.add_tail(step.stream, means.row_range(layer, 1), weights.row_range(layer, 1), attended)
    }

    fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Which means hold the layer's newest.
    fn newest(&self, layer: usize) -> usize {
        if self.layers[layer].written { self.current ^ 1 } else { self.current }
    }

    /// The layer's mean in this step: `mean + factor · (values − mean)`; and where a mean of values may lie.
    fn blend(&mut self, layer: usize, factor: f32) -> (Blend<'_>, &Buffer) {
        let (layers, width) = (self.layers.len(), self.width());
        let written = std::mem::replace(&mut self.layers[layer].written, true);
        let [a, b] = &mut self.means;
        let (before, after) = if self.current == 0 { (&*a, b) } else { (&*b, a) };
        let before = before.rows(DType::F32, layers, width).row_range(layer, 1);
        let out = after.rows_mut(DType::F32, layers, width).row_range(layer, 1);
        (Blend { from: (!written).then_some(before), out, factor }, &self.mean)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::Stream;
    use crate::backend::cpu::{CpuBackend, CpuOptions};
    use crate::kv::{Pool, SequenceKv};
    use crate::policy::Phase;

    const KV_HEADS: usize = 2;
    const D: usize = 8;
    const WIDTH: usize = KV_HEADS * D;
    const LAYERS: usize = 2;

    struct Rig {
        backend: Arc<CpuBackend>,
        kv: SequenceKv,
        tail: Tail,
        /// Values by layer and token.
        values: Vec<Vec<[f32; WIDTH]>>,
    }

    impl Rig {
        fn new() -> Rig {
            let backend = Arc::new(CpuBackend::new(CpuOptions { threads: 1, level: None }).unwrap());
            let geometry =
                KvGeometry { layers: LAYERS, kv_heads: KV_HEADS, head_dim: D, extent_tokens: 64, dtype: DType::F32 };
            let mut kv = SequenceKv::new(Arc::new(Pool::new(backend.clone(), 0)), geometry);
            kv.reserve(300).unwrap();
            let tail = Tail::new(&*backend, &geometry, KV_HEADS).unwrap();
            Rig { backend, kv, tail, values: vec![Vec::new(); LAYERS] }
        }

        fn upload(&self, values: &[f32]) -> Buffer {
            let mut buffer = self.backend.allocate(values.len() * 4, Place::Device, "a test").unwrap();
            let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_ne_bytes()).collect();
            self.backend.upload(&Stream(0), &bytes, &mut buffer, 0).unwrap();
            buffer
        }

        /// New values for a layer's next token, and the step that they come with.
        fn next(&mut self, layer: usize) -> Buffer {
            let position = self.values[layer].len();
            let value = std::array::from_fn(|i| ((position * 31 + i * 7 + layer * 3) % 23) as f32 - 4.0);
            let buffer = self.upload(&value);
            let rows = buffer.rows(DType::F32, 1, WIDTH);
            self.backend.store_kv(&Stream(0), rows, rows, &mut self.kv.layer_mut(layer), position).unwrap();
            self.values[layer].push(value);
            buffer
        }

        fn decode(&mut self) {
            self.tail.begin();
            for layer in 0..LAYERS {
                let buffer = self.next(layer);
                let backend = self.backend.clone();
                let step = step(&backend, &Stream(0), self.values[layer].len() - 1);
                self.tail.append(&step, layer, buffer.rows(DType::F32, 1, WIDTH)).unwrap();
            }
        }

        /// A layer's mean, as a head sees it that has attended zeros, with a weight of 1 for the tail.
        fn assert_means(&mut self, what: &str) {
            for layer in 0..LAYERS {
                let mut out = self.upload(&[0.0; WIDTH]);
                let backend = self.backend.clone();
                let step = step(&backend, &Stream(0), 0);
                self.tail.rehearsed_by_host(&step, layer, &[1.0; KV_HEADS]).unwrap();
                self.tail.add(&step, layer, out.rows_mut(DType::F32, 1, WIDTH)).unwrap();
                let mut bytes = vec![0; WIDTH * 4];
                self.backend.download(&Stream(0), out.rows(DType::F32, 1, WIDTH), &mut bytes).unwrap();
                let got = bytes.as_chunks().0.iter().map(|b| f32::from_ne_bytes(*b));
                let count = self.values[layer].len() as f64;
                for (i, got) in got.enumerate() {
                    let want = self.values[layer].iter().map(|value| f64::from(value[i])).sum::<f64>() / count;
                    assert!((f64::from(got) - want).abs() < 1e-4, "{what}, layer {layer}, {i}: {got} for {want}");
                }
            }
        }
    }

    fn step<'a>(backend: &'a CpuBackend, stream: &'a Stream, position: usize) -> Step<'a> {
        Step { backend, stream, fetch: stream, layer: 0, position, rows: 1, phase: Phase::Decode }
    }

    #[test]
    fn means_follow_prompts_steps_and_steps_undone() {
        let mut rig = Rig::new();
        let (backend, stream) = (rig.backend.clone(), Stream(0));
        rig.tail.begin();
        for layer in 0..LAYERS {
            (0..101).for_each(|_| drop(rig.next(layer)));
            rig.tail.blend_runs(&step(&backend, &stream, 100), layer, rig.kv.layer(layer), 101, 1.0).unwrap();
        }
        rig.assert_means("after a prompt");
        rig.tail.commit();
        for round in 0..40 {
            rig.decode();
            match round % 3 {
                0 => rig.tail.commit(),
                // Undone before its end, and after it.
                which => {
                    if which == 2 {
                        rig.tail.commit();
                    }
                    rig.tail.roll_back();
                    rig.values.iter_mut().for_each(|values| values.truncate(values.len() - 1));
                }
            }
            rig.tail.begin();
            rig.assert_means("after a step");
        }
    }

    #[test]
    fn a_step_of_several_tokens_is_one_step() {
        let mut rig = Rig::new();
        rig.decode();
        let (backend, stream) = (rig.backend.clone(), Stream(0));
        for layer in 0..LAYERS {
            for _ in 0..9 {
                let buffer = rig.next(layer);
                let step = step(&backend, &stream, rig.values[layer].len() - 1);
                rig.tail.append(&step, layer, buffer.rows(DType::F32, 1, WIDTH)).unwrap();
            }
        }
        rig.assert_means("within the step");
        rig.tail.commit();
        rig.tail.begin();
        rig.assert_means("after it");
    }

    #[test]
    fn rows_can_be_taken_out() {
        let mut rig = Rig::new();
        for _ in 0..90 {
            rig.decode();
            rig.tail.commit();
        }
        rig.tail.begin();
        let (backend, stream) = (rig.backend.clone(), Stream(0));
        for layer in 0..LAYERS {
            // The first rows of the runs: what goes is at the beginning here.
            rig.tail.blend_runs(&step(&backend, &stream, 0), layer, rig.kv.layer(layer), 33, -33.0 / 57.0).unwrap();
            rig.values[layer].drain(..33);
        }
        rig.assert_means("after 33 of 90 rows have gone");
    }

    #[test]
    fn a_layer_that_was_not_rehearsed_has_no_tail() {
        let mut rig = Rig::new();
        rig.decode();
        let mut out = rig.upload(&[5.0; WIDTH]);
        let step = step(&rig.backend, &Stream(0), 0);
        rig.tail.add(&step, 0, out.rows_mut(DType::F32, 1, WIDTH)).unwrap();
        let mut bytes = vec![0; WIDTH * 4];
        rig.backend.download(&Stream(0), out.rows(DType::F32, 1, WIDTH), &mut bytes).unwrap();
        assert!(bytes.as_chunks().0.iter().all(|b| f32::from_ne_bytes(*b) == 5.0));
    }
}
