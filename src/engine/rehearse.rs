//! Speculation in the step loop: the queries that a layer will have, guessed one layer ahead, against its index.

use crate::Result;
use crate::backend::{Backend, HeadMaps, Prefetch, Rehearsal, Selected, Shape, Stream};
use crate::model::decoder::Positions;
use crate::policy::{Ahead, QuerySource};

use super::forward::{Forward, Part};
use super::workspace::Input;

/// What the rows of one rehearsal have in common.
#[derive(Clone, Copy)]
struct Plan<'a> {
    row: usize,
    source: QuerySource<'a>,
    maps: &'a HeadMaps,
}

impl Plan<'_> {
    /// Whether both need the same products.
    fn same(&self, other: &Plan<'_>) -> bool {
        let source = match (self.source, other.source) {
            (QuerySource::Previous(a), QuerySource::Previous(b))
            | (QuerySource::Renormalised(a), QuerySource::Renormalised(b)) => std::ptr::eq(a, b),
            (QuerySource::Exact, QuerySource::Exact) => true,
            _ => false,
        };
        source && std::ptr::eq(self.maps, other.maps)
    }
}

/// Tells the policies of the `wanted` parts that `layer` was rehearsed.
pub(super) fn tell(
    backend: &dyn Backend,
    streams: (&Stream, &Stream),
    layer: usize,
    wanted: &[usize],
    parts: &mut [Part<'_>],
) -> Result<()> {
    wanted.iter().try_for_each(|&i| {
        let step = parts[i].step(backend, streams, layer);
        parts[i].policy.rehearsed(&step)
    })
}

impl Forward<'_> {
    /// Rehearses `layer` for every part whose policy wants it: with an `input` (the attention input of the layer
    /// before) those that predict queries, without one those that ask for the layer's own, which are in the workspace.
    /// Returns which parts these were; their policies are still to be told ([`tell`]).
    pub(super) fn rehearse(
        &mut self,
        layer: usize,
        input: Option<Input>,
        parts: &mut [Part<'_>],
    ) -> Result<Vec<usize>> {
        if layer >= self.decoder.blocks.len() {
            return Ok(Vec::new());
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
            return Ok(wanted);
        }
        // All of it on a side stream, from what the main one has computed so far.
        let input_ready = self.backend.record(&self.workspace.stream)?;
        self.backend.wait(&self.workspace.ahead, &input_ready)?;
        // Plans of the same weight and maps on neighbouring rows, as of a batch of one policy, are computed together: the
        // weight is read once, and a row's bits do not depend on the rows beside it.
        let mut at = 0;
        for run in plans.chunk_by(|a, b| b.row == a.row + 1 && a.same(b)) {
            self.partial_queries(layer, input, &run[0], run.len(), at)?;
            at += run.len();
        }
        drop(plans);
        self.queried = Some(self.backend.record(&self.workspace.ahead)?);

        // What comes of a layer's own queries is waited for, and fetched before what is fetched for the next layer.
        let late = input.is_none();
        self.rehearse_rows(layer, parts, &wanted, late)?;
        let (backend, w) = (self.backend, &*self.workspace);
        if late {
            backend.wait(&w.stream, &backend.record(&w.ahead)?)?;
        }
        Ok(wanted)
    }

    /// Rehearses the `wanted` parts, whose partial queries are the first rows of the layer's: for the host to go on with,
    /// or with all that comes of it. `late`: entries are not fetched behind those of the next layer.
    fn rehearse_rows(&self, layer: usize, parts: &mut [Part<'_>], wanted: &[usize], late: bool) -> Result<()> {
        let (backend, w) = (self.backend, &*self.workspace);
        let copies = if late { &w.ahead } else { &w.fetch };
        let mut at = 0;
        let (mut rehearsals, mut selected): (Vec<Rehearsal<'_>>, Vec<&mut Selected>) = (Vec::new(), Vec::new());
        let mut prefetches: Vec<Prefetch<'_>> = Vec::new();
        for (i, part) in parts.iter_mut().enumerate() {
            if wanted.get(at) != Some(&i) {
                continue;
            }
            match part.policy.rehearsal(layer, part.position) {
                Some(Ahead::Select(rehearsal, place)) => {
                    rehearsals.push(Rehearsal { row: at, ..rehearsal });
                    selected.push(place);
                }
                Some(Ahead::Prefetch(mut prefetch)) => {
                    prefetch.rehearsal.row = at;
                    prefetches.push(*prefetch);
                }
                None => {}
            }
            at += 1;
        }
        let partial = |columns| w.partial.get(at).col_range(0, self.dimensions.heads * columns);
        let mut places = &mut selected[..];
        // Partial queries of another width lie otherwise in their rows.
        for alike in rehearsals.chunk_by(|a, b| a.runs.geometry().columns == b.runs.geometry().columns) {
            let (own, rest) = places.split_at_mut(alike.len());
            backend.rehearse(&w.ahead, partial(alike[0].runs.geometry().columns), alike, own)?;
            places = rest;
        }
        let columns = |prefetch: &Prefetch<'_>| prefetch.rehearsal.runs.geometry().columns;
        for alike in prefetches.chunk_by_mut(|a, b| columns(a) == columns(b)) {
            backend.prefetch(&w.ahead, copies, partial(columns(&alike[0])), alike)?;
        }
        Ok(())
    }

    /// Computes the partial queries of `rows` parts from the one of `plan` on into rows `at..` of the workspace's.
    fn partial_queries(
        &mut self,
        layer: usize,
        input: Option<Input>,
        plan: &Plan<'_>,
        rows: usize,
        at: usize,
    ) -> Result<()> {
        let (backend, d, w) = (self.backend, self.dimensions, &mut *self.workspace);
        let stream = &w.ahead;
        let (first, end) = (plan.row, plan.row + rows);
        let q_width = d.heads * d.head_dim;
        let predicted = match plan.source {
            QuerySource::Previous(weight) => {
                let input = input.expect("predicted queries have an input");
                let x = input.of(&w.hidden, &w.normed).get(end).row_range(first, rows);
                Some((x, weight))
            }
            QuerySource::Renormalised(weight) => {
                let norm = &self.decoder.blocks[layer].attention_norm;
                let x = w.hidden.get(end).row_range(first, rows);
                backend.norm(stream, x, norm, w.renormalised.get_mut(rows))?;
                Some((w.renormalised.get(rows), weight))
            }
            QuerySource::Exact => None,
        };
        let queries = match predicted {
            None => w.qkv.get(end).row_range(first, rows).col_range(0, q_width),
            Some((x, weight)) => {
                backend.matmul(stream, x, weight, false, Shape::Decode, w.predicted.get_mut(rows))?;
                if let Some(norm) = &self.decoder.blocks[layer].attention.query_norm {
                    backend.norm_heads(stream, w.predicted.get_mut(rows), norm)?;
                }
                if let Positions::Rotary(rotary) = &self.decoder.positions {
                    let table = w.rotation.get(end).row_range(first, rows);
                    backend.rotate(stream, &rotary.short, table, d.head_dim, w.predicted.get_mut(rows))?;
                }
                w.predicted.get(rows)
            }
        };
        let width = d.heads * plan.maps.outputs;
        let partial = w.partial.get_mut(at + rows).row_range(at, rows).col_range(0, width);
        backend.project_heads(stream, queries, plan.maps, partial)
    }
}
