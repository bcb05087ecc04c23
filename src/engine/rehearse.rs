//! Speculation in the step loop: the queries that a layer will have, guessed one layer ahead, against its index.

use crate::Result;
use crate::backend::{HeadMaps, Linear, Rehearsal, Rows, Selected, Shape};
use crate::model::decoder::Positions;
use crate::policy::QuerySource;

use super::forward::{Forward, Part};
use super::workspace::Input;

/// What the rows of one rehearsal have in common.
#[derive(Clone, Copy)]
struct Plan<'a> {
    row: usize,
    source: QuerySource<'a>,
    maps: &'a HeadMaps,
}

impl Forward<'_> {
    /// Rehearses `layer` for every part whose policy wants it: with an `input` (the attention input of the layer
    /// before) those that predict queries, without one those that ask for the layer's own, which are in the workspace.
    pub(super) fn rehearse(&mut self, layer: usize, input: Option<Input>, parts: &mut [Part<'_>]) -> Result<()> {
        if layer >= self.decoder.blocks.len() {
            return Ok(());
        }
        let mut wanted = Vec::new();
        let mut plans = Vec::new();
        let mut row = 0;
        for (i, part) in parts.iter().enumerate() {
            let decoding = part.rows == 1 && part.phase == crate::policy::Phase::Decode;
            if let Some(ahead) = part.policy.lookahead(layer, part.position).filter(|_| decoding)
                && matches!(ahead.source, QuerySource::Exact) == input.is_none()
            {
                wanted.push(i);
                plans.push(Plan { row, source: ahead.source, maps: ahead.maps });
            }
            row += part.rows;
        }
        if plans.is_empty() {
            return Ok(());
        }
        for (at, plan) in plans.iter().enumerate() {
            self.partial_query(layer, input, plan, at)?;
        }
        drop(plans);

        let (backend, w) = (self.backend, &mut *self.workspace);
        let mut columns = 0;
        let mut at = 0;
        let (mut rehearsals, mut selected): (Vec<Rehearsal<'_>>, Vec<&mut Selected>) = (Vec::new(), Vec::new());
        for (i, part) in parts.iter_mut().enumerate() {
            if wanted.get(at) != Some(&i) {
                continue;
            }
            if let Some((mut rehearsal, place)) = part.policy.rehearsal(layer, part.position) {
                rehearsal.row = at;
                columns = columns.max(rehearsal.runs.geometry().columns);
                rehearsals.push(rehearsal);
                selected.push(place);
            }
            at += 1;
        }
        let queries = w.partial.get(at).col_range(0, self.dimensions.heads * columns);
        backend.rehearse(&w.stream, queries, &rehearsals, &mut selected)?;
        drop(rehearsals);
        wanted.into_iter().try_for_each(|i| {
            let step = parts[i].step(backend, &w.stream, layer);
            parts[i].policy.rehearsed(&step)
        })
    }

    /// Computes the partial query of one part into row `at` of the workspace's partial queries.
    fn partial_query(&mut self, layer: usize, input: Option<Input>, plan: &Plan<'_>, at: usize) -> Result<()> {
        let (backend, d, w) = (self.backend, self.dimensions, &mut *self.workspace);
        let q_width = d.heads * d.head_dim;
        let total = at + 1;
        let weight: Option<&Linear> = match plan.source {
            QuerySource::Previous(weight) => {
                let input = input.expect("predicted queries have an input");
                let x = input.of(&w.hidden, &w.normed).get(plan.row + 1).row_range(plan.row, 1);
                let to = w.predicted.get_mut(total).row_range(at, 1);
                backend.matmul(&w.stream, x, weight, false, Shape::Decode, to)?;
                Some(weight)
            }
            QuerySource::Renormalised(weight) => {
                let norm = &self.decoder.blocks[layer].attention_norm;
                let x = w.hidden.get(plan.row + 1).row_range(plan.row, 1);
                backend.norm(&w.stream, x, norm, w.renormalised.get_mut(1))?;
                let to = w.predicted.get_mut(total).row_range(at, 1);
                backend.matmul(&w.stream, w.renormalised.get(1), weight, false, Shape::Decode, to)?;
                Some(weight)
            }
            QuerySource::Exact => None,
        };
        let maps = plan.maps;
        let place =
            |partial: crate::backend::RowsMut<'_>, x: Rows<'_>| backend.project_heads(&w.stream, x, maps, partial);
        let width = d.heads * maps.outputs;
        if weight.is_none() {
            let x = w.qkv.get(plan.row + 1).row_range(plan.row, 1).col_range(0, q_width);
            return place(w.partial.get_mut(total).row_range(at, 1).col_range(0, width), x);
        }
        if let Some(norm) = &self.decoder.blocks[layer].attention.query_norm {
            backend.norm_heads(&w.stream, w.predicted.get_mut(total).row_range(at, 1), norm)?;
        }
        if let Positions::Rotary(rotary) = &self.decoder.positions {
            let table = w.rotation.get(plan.row + 1).row_range(plan.row, 1);
            let x = w.predicted.get_mut(total).row_range(at, 1);
            backend.rotate(&w.stream, &rotary.short, table, d.head_dim, x)?;
        }
        let x = w.predicted.get(total).row_range(at, 1);
        place(w.partial.get_mut(total).row_range(at, 1).col_range(0, width), x)
    }
}
