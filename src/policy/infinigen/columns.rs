//! The paper's choice of columns (§4.3): the prompt says which columns of an orthogonal basis matter, or even which basis.
//!
//! The index keeps all columns, because the choice is known only when the prompt is over; queries use the chosen ones,
//! so that a score is exactly that of partial keys. (The paper stores no more than these; so does the balanced
//! basis, which needs no prompt to choose.) Where the basis is the prompt's own, A say, the index keeps the head's columns, and
//! queries become those of A's chosen columns in the head's: q·A·Aᵀ·k is the score of partial keys too.

use std::sync::Arc;

use crate::Result;
use crate::backend::{Buffer, DType, HeadMaps, Place, Rows};
use crate::policy::{IndexBasis, Setting, Step};
use crate::speculate::{PromptBasis, Speculation};

pub(super) struct Columns {
    speculation: Arc<Speculation>,
    resident_layers: usize,
    /// Columns to choose.
    count: usize,
    /// What the index keeps, where that is the head's own columns and not the skewed ones.
    plain: Option<Arc<HeadMaps>>,
    /// What is known of the prompt, by layer of the store.
    seen: Vec<Seen>,
    /// What queries go through: the rows of the basis, zero where not chosen. All of them until the first prompt ends.
    query: Vec<Option<HeadMaps>>,
    /// Whether they had been chosen when this step began.
    chosen_before: bool,
    scratch: Option<Buffer>,
}

/// Of one layer, KV head after KV head.
enum Seen {
    /// Σ|q̃| + Σ|k̃| of each column.
    Sums(Vec<f64>),
    /// What the prompt's own basis is made of.
    Moments(Vec<PromptBasis>),
}

impl Seen {
    fn new(basis: IndexBasis, heads: usize, d: usize) -> Seen {
        match basis {
            IndexBasis::Prompt => Seen::Moments((0..heads).map(|_| PromptBasis::new(d)).collect()),
            _ => Seen::Sums(vec![0.0; heads * d]),
        }
    }

    fn forget(&mut self) {
        match self {
            Seen::Sums(sums) => sums.fill(0.0),
            Seen::Moments(heads) => heads.iter_mut().for_each(PromptBasis::forget),
        }
    }
}

impl Columns {
    pub(super) fn new(
        setting: &Setting,
        speculation: &Arc<Speculation>,
        resident_layers: usize,
        basis: IndexBasis,
        count: usize,
    ) -> Result<Columns> {
        let geometry = &setting.geometry;
        let (heads, d, layers) = (geometry.kv_heads, geometry.head_dim, geometry.layers - resident_layers);
        let skewed = basis == IndexBasis::Skewed;
        let plain = if skewed { None } else { Some(speculation.identity(heads, d)?) };
        Ok(Columns {
            speculation: speculation.clone(),
            resident_layers,
            count,
            plain,
            seen: (0..layers).map(|_| Seen::new(basis, heads, d)).collect(),
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

    /// Takes note of some rows of keys of a layer of the model.
    pub(super) fn add_keys(&mut self, step: &Step<'_>, keys: Rows<'_>) -> Result<()> {
        self.add(step, keys, true)
    }

    /// As [`Columns::add_keys`], of queries.
    pub(super) fn add_queries(&mut self, step: &Step<'_>, queries: Rows<'_>) -> Result<()> {
        self.add(step, queries, false)
    }

    fn add(&mut self, step: &Step<'_>, heads: Rows<'_>, keys: bool) -> Result<()> {
        let (rows, columns) = (heads.rows(), heads.cols());
        let bytes = rows * columns * DType::F32.bytes();
        if self.scratch.as_ref().is_none_or(|scratch| scratch.bytes() < bytes) {
            self.scratch = Some(step.backend.allocate(bytes, Place::Device, "columns of a prompt")?);
        }
        let Some(mut scratch) = self.scratch.take() else { return Ok(()) };
        let maps = self.key(step.layer);
        let (kv_heads, d) = (maps.kv_heads, maps.outputs);
        step.backend.project_heads(step.stream, heads, maps, scratch.rows_mut(DType::F32, rows, columns))?;
        let values = step.floats(scratch.rows(DType::F32, rows, columns))?;
        self.scratch = Some(scratch);
        let group = columns / d / kv_heads;
        match &mut self.seen[step.layer - self.resident_layers] {
            Seen::Sums(sums) => {
                for row in values.chunks_exact(columns) {
                    for (i, value) in row.iter().enumerate() {
                        sums[i / d / group * d + i % d] += f64::from(value.abs());
                    }
                }
            }
            Seen::Moments(heads) => {
                for (i, head) in heads.iter_mut().enumerate() {
                    head.add(&values, columns, i * group..(i + 1) * group, keys);
                }
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
            self.seen.iter_mut().for_each(Seen::forget);
            self.query.fill_with(|| None);
        }
    }

    /// The prompt is over: chooses the columns.
    pub(super) fn choose(&mut self, step: &Step<'_>) -> Result<()> {
        for layer in 0..self.query.len() {
            let maps = self.key(layer + self.resident_layers);
            let (heads, d) = (maps.kv_heads, maps.inputs);
            let values = match &self.seen[layer] {
                Seen::Sums(sums) => self.chosen_rows(step, maps, sums)?,
                Seen::Moments(heads) => {
                    let maps = heads.iter().map(|head| head.projection(self.count)).collect::<Result<Vec<_>>>()?;
                    maps.concat()
                }
            };
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
            let mut data = step.backend.allocate(bytes.len(), Place::Device, "columns of a session")?;
            step.backend.upload(step.stream, &bytes, &mut data, 0)?;
            self.query[layer] = Some(HeadMaps { kv_heads: heads, inputs: d, outputs: d, data });
        }
        self.scratch = None;
        Ok(())
    }

    /// The rows of a basis, those with the largest sums as they are and zeros for the others.
    fn chosen_rows(&self, step: &Step<'_>, maps: &HeadMaps, sums: &[f64]) -> Result<Vec<f32>> {
        let (heads, d) = (maps.kv_heads, maps.inputs);
        let mut values = step.floats(maps.data.rows(DType::F32, heads * d, d))?;
        for (head, sums) in sums.chunks_exact(d).enumerate() {
            let mut order: Vec<usize> = (0..d).collect();
            order.sort_by(|&a, &b| sums[b].total_cmp(&sums[a]).then(a.cmp(&b)));
            for &column in &order[self.count..] {
                values[(head * d + column) * d..(head * d + column + 1) * d].fill(0.0);
            }
        }
        Ok(values)
    }
}
