//! The paper's choice of columns (§4.3): the prompt says which columns of an orthogonal basis matter.
//!
//! The index keeps all columns, because the choice is known only when the prompt is over; queries use the chosen ones,
//! so that a score is exactly that of partial keys. (The paper stores no more than these; so does the balanced
//! basis, which needs no prompt to choose.)

use std::sync::Arc;

use crate::Result;
use crate::backend::{Buffer, DType, HeadMaps, Place, Rows};
use crate::policy::{Setting, Step};
use crate::speculate::Speculation;

pub(super) struct Columns {
    speculation: Arc<Speculation>,
    resident_layers: usize,
    /// Columns to choose.
    count: usize,
    /// The head's own columns, where these and not the skewed ones are chosen from.
    plain: Option<Arc<HeadMaps>>,
    /// Σ|q̃| + Σ|k̃| of each column, KV head after KV head, by layer of the store.
    sums: Vec<Vec<f64>>,
    /// What queries go through: the rows of the basis, zero where not chosen. All of them until the first prompt ends.
    query: Vec<Option<HeadMaps>>,
    /// Whether they had been chosen when this step began.
    chosen_before: bool,
    scratch: Option<Buffer>,
}

impl Columns {
    pub(super) fn new(
        setting: &Setting,
        speculation: &Arc<Speculation>,
        resident_layers: usize,
        skewed: bool,
        count: usize,
    ) -> Result<Columns> {
        let geometry = &setting.geometry;
        let (heads, d, layers) = (geometry.kv_heads, geometry.head_dim, geometry.layers - resident_layers);
        let plain = if skewed { None } else { Some(speculation.identity(heads, d)?) };
        Ok(Columns {
            speculation: speculation.clone(),
            resident_layers,
            count,
            plain,
            sums: vec![vec![0.0; heads * d]; layers],
            query: (0..layers).map(|_| None).collect(),
            chosen_before: false,
            scratch: None,
        })
    }

    /// The whole basis of a layer of the model.
    pub(super) fn key(&self, layer: usize) -> &HeadMaps {
        self.plain.as_deref().unwrap_or_else(|| self.speculation.skew(layer))
    }

    /// What queries of a layer of the model go through.
    pub(super) fn query(&self, layer: usize) -> &HeadMaps {
        self.query[layer - self.resident_layers].as_ref().unwrap_or_else(|| self.key(layer))
    }

    /// Whether the columns have been chosen.
    pub(super) fn chosen(&self) -> bool {
        self.query.iter().all(Option::is_some)
    }

    /// Adds up the absolute values of some rows of queries or keys of a layer of the model.
    pub(super) fn add(&mut self, step: &Step<'_>, heads: Rows<'_>) -> Result<()> {
        let (rows, columns) = (heads.rows(), heads.cols());
        let bytes = rows * columns * DType::F32.bytes();
        if self.scratch.as_ref().is_none_or(|scratch| scratch.bytes() < bytes) {
            self.scratch = Some(step.backend.allocate(bytes, Place::Device, "columns of a prompt")?);
        }
        let Some(mut scratch) = self.scratch.take() else { return Ok(()) };
        let maps = self.key(step.layer);
        let (kv_heads, d) = (maps.kv_heads, maps.outputs);
        step.backend.project_heads(step.stream, heads, maps, scratch.rows_mut(DType::F32, rows, columns))?;
        let mut values = vec![0; bytes];
        step.backend.download(step.stream, scratch.rows(DType::F32, rows, columns), &mut values)?;
        self.scratch = Some(scratch);
        let sums = &mut self.sums[step.layer - self.resident_layers];
        let group = columns / d / kv_heads;
        for row in values.chunks_exact(columns * 4) {
            for (i, value) in row.chunks_exact(4).enumerate() {
                let value = f32::from_ne_bytes([value[0], value[1], value[2], value[3]]);
                sums[i / d / group * d + i % d] += f64::from(value.abs());
            }
        }
        Ok(())
    }

    /// A step begins.
    pub(super) fn begin(&mut self) {
        self.chosen_before = self.chosen();
    }

    /// The step has failed: nothing has been added or chosen in it. (What is not chosen yet begins with its first prompt.)
    pub(super) fn roll_back(&mut self) {
        if !self.chosen_before {
            self.sums.iter_mut().for_each(|sums| sums.fill(0.0));
            self.query.fill_with(|| None);
        }
    }

    /// The prompt is over: chooses the columns.
    pub(super) fn choose(&mut self, step: &Step<'_>) -> Result<()> {
        for layer in 0..self.query.len() {
            let maps = self.key(layer + self.resident_layers);
            let (heads, d) = (maps.kv_heads, maps.inputs);
            let mut bytes = vec![0; heads * d * d * 4];
            step.backend.download(step.stream, maps.data.rows(DType::F32, heads * d, d), &mut bytes)?;
            let mut values: Vec<f32> =
                bytes.chunks_exact(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect();
            for (head, sums) in self.sums[layer].chunks_exact(d).enumerate() {
                let mut order: Vec<usize> = (0..d).collect();
                order.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]).then(a.cmp(&b)));
                for &column in &order[self.count..] {
                    values[(head * d + column) * d..(head * d + column + 1) * d].fill(0.0);
                }
            }
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
            let mut data = step.backend.allocate(bytes.len(), Place::Device, "columns of a session")?;
            step.backend.upload(step.stream, &bytes, &mut data, 0)?;
            self.query[layer] = Some(HeadMaps { kv_heads: heads, inputs: d, outputs: d, data });
        }
        self.scratch = None;
        Ok(())
    }
}
