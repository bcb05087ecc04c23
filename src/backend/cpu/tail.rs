//! What stands for the entries that a step does not attend: mean values, and their part of the attention.
//!
//! A few hundred floats a layer, so neither threads nor vectors are worth their while.

use super::view::{row, row_mut};
use crate::backend::{Blend, Rows, RowsMut};

/// See `Backend::blend`.
pub(super) fn blend(Blend { from, out, factor }: Blend<'_>, toward: Rows<'_>) {
    for i in 0..out.rows() {
        // SAFETY: the only reference to the row's elements.
        let out = unsafe { row_mut(&out, i) };
        if let Some(from) = &from {
            out.copy_from_slice(row(from, i));
        }
        out.iter_mut().zip(row(&toward, i)).for_each(|(out, toward)| *out += factor * (toward - *out));
    }
}

/// See `Backend::add_tail`.
pub(super) fn add(means: Rows<'_>, weights: Rows<'_>, out: RowsMut<'_>) {
    let weights = row(&weights, 0);
    let d = out.cols() / weights.len();
    let group = weights.len() / (means.cols() / d);
    // SAFETY: the only reference to the row's elements.
    let out = unsafe { row_mut(&out, 0) };
    let means = row(&means, 0).chunks_exact(d).flat_map(|mean| std::iter::repeat_n(mean, group));
    for ((out, mean), weight) in out.chunks_exact_mut(d).zip(means).zip(weights) {
        out.iter_mut().zip(mean).for_each(|(out, mean)| *out += weight * (mean - *out));
    }
}
