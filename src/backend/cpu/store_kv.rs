//! Keys and values of new tokens into their runs.

use super::CpuBackend;
use super::simd::{Element, for_dtype};
use super::view::row;
use crate::backend::{KvRunsMut, Rows};

/// Stores the rows' heads as the tokens from `position` on, rounded to nearest.
pub(super) fn store(_cpu: &CpuBackend, keys: Rows<'_>, values: Rows<'_>, runs: &mut KvRunsMut<'_>, position: usize) {
    let geometry = *runs.geometry();
    let d = geometry.head_dim;
    for_dtype!(geometry.dtype, E => for i in 0..keys.rows() {
        let (extent, token) = ((position + i) / geometry.extent_tokens, (position + i) % geometry.extent_tokens);
        let (keys, values) = (row(&keys, i).chunks_exact(d), row(&values, i).chunks_exact(d));
        for (head, (key, value)) in keys.zip(values).enumerate() {
            // SAFETY: `run_mut` gives a run of `extent_tokens` tokens of 2·d elements each, `token` is below that, and
            // `runs` is borrowed mutably.
            let to = unsafe {
                let run = runs.run_mut(extent, head).cast::<E>();
                std::slice::from_raw_parts_mut(run.add(token * 2 * d), 2 * d)
            };
            let (k, v) = to.split_at_mut(d);
            E::narrow(key, k);
            E::narrow(value, v);
        }
    });
}
