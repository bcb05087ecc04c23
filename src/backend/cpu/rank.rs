//! The best columns of rows of scores, in order.

use super::CpuBackend;
use super::view::{row, row_u32_mut};
use crate::backend::{Rows, RowsMut};

/// See `Backend::rank`.
pub(super) fn rank(cpu: &CpuBackend, scores: Rows<'_>, out: &RowsMut<'_>) {
    cpu.pool.split(scores.rows(), 1, &|range| {
        for i in range {
            let scores = row(&scores, i);
            // SAFETY: each row is handed to one thread.
            let out = unsafe { row_u32_mut(out, i) };
            let order = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
            let mut all: Vec<u32> = (0..scores.len() as u32).collect();
            if out.len() < all.len() {
                all.select_nth_unstable_by(out.len(), order);
                all.truncate(out.len());
            }
            all.sort_unstable_by(order);
            out.copy_from_slice(&all);
        }
    });
}
