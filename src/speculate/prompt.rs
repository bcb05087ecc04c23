//! The paper's skew (ALGORITHM.md §2), by the queries of a prompt and not of a calibration text.

use std::ops::Range;

use faer::Mat;

use super::basis::{self, Map};
use super::moments::second_moment;
use crate::{Error, ErrorCode, Result};

/// What is known of one KV head's queries and keys, rotated if the model rotates.
pub(crate) struct PromptBasis {
    queries: Moment,
    keys: Moment,
}

/// Σ x xᵀ, and how many x there are.
struct Moment {
    sum: Mat<f64>,
    count: usize,
}

impl Moment {
    fn new(d: usize) -> Moment {
        Moment { sum: Mat::zeros(d, d), count: 0 }
    }

    /// About Σ|x·v| for a unit vector v: what it is if all |x·v| are alike. (The absolute values themselves are known only to
    /// who sees each x once v is known.)
    fn size(&self, v: &[f32]) -> f64 {
        let d = v.len();
        let of = |i: usize| (0..d).map(|j| self.sum[(i, j)] * f64::from(v[j])).sum::<f64>() * f64::from(v[i]);
        (self.count as f64 * (0..d).map(of).sum::<f64>().max(0.0)).sqrt()
    }
}

impl PromptBasis {
    /// Nothing yet of a head of dimension `d`.
    pub(crate) fn new(d: usize) -> PromptBasis {
        PromptBasis { queries: Moment::new(d), keys: Moment::new(d) }
    }

    pub(crate) fn forget(&mut self) {
        *self = PromptBasis::new(self.keys.sum.nrows());
    }

    /// Takes note of rows of an n × `width` matrix: of these heads in it, which are the KV head's keys or its queries.
    pub(crate) fn add(&mut self, rows: &[f32], width: usize, heads: Range<usize>, keys: bool) {
        let moment = if keys { &mut self.keys } else { &mut self.queries };
        let d = moment.sum.nrows();
        moment.count += rows.len() / width * heads.len();
        moment.sum += second_moment(rows, width, heads.map(|head| head * d..(head + 1) * d), |_, _| ());
    }

    /// A_c·A_cᵀ, row by row, where A_c are the `count` columns of the queries' skew A that queries and keys make largest: a
    /// partial score (A_cᵀq)·(A_cᵀk) is (A_c·A_cᵀ·q)·k.
    pub(crate) fn projection(&self, count: usize) -> Result<Map> {
        let d = self.queries.sum.nrows();
        let finite = |moment: &Moment| (0..d).all(|i| moment.sum[(i, i)].is_finite());
        if !finite(&self.queries) || !finite(&self.keys) {
            let message = "the prompt's queries or keys are not finite, and have no basis";
            return Err(Error::new(ErrorCode::Unsupported, message));
        }
        let skew = basis::skew(&self.queries.sum)?;
        let mut order: Vec<(f64, &[f32])> =
            skew.chunks_exact(d).map(|column| (self.queries.size(column) + self.keys.size(column), column)).collect();
        order.sort_by(|a, b| b.0.total_cmp(&a.0));
        let entry = |at: usize| {
            let (i, j) = (at / d, at % d);
            order[..count].iter().map(|(_, v)| f64::from(v[i]) * f64::from(v[j])).sum::<f64>() as f32
        };
        Ok((0..d * d).map(entry).collect())
    }
}
