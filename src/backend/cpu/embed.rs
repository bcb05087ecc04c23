//! Rows of a table, by id.

use super::CpuBackend;
use super::simd::{Element, for_dtype};
use super::view::{id, row_mut};
use crate::backend::{Linear, Rows, RowsMut};

/// Elements worth a piece of parallel work.
const PIECE: usize = 32 << 10;

/// `out[i] (+)= table[ids[i]]`.
pub(super) fn embed(cpu: &CpuBackend, table: &Linear, ids: Rows<'_>, accumulate: bool, out: RowsMut<'_>) {
    let cols = table.inputs;
    for_dtype!(table.dtype, E => cpu.pool.split(ids.rows(), PIECE / cols.max(1), &|rows| {
        for i in rows {
            let id = id(&ids, i);
            assert!(id < table.outputs, "id {id} of a table of {} rows", table.outputs);
            // SAFETY: row `id` is one of the table's, inside its live and initialised buffer, aligned to 64 with rows of
            // whole elements.
            let from = unsafe { std::slice::from_raw_parts(table.rows().base().cast::<E>().add(id * cols), cols) };
            // SAFETY: row i belongs to this thread alone.
            let out = unsafe { row_mut(&out, i) };
            if accumulate {
                let mut wide = [0.0; 256];
                for (out, from) in out.chunks_mut(wide.len()).zip(from.chunks(wide.len())) {
                    let wide = &mut wide[..from.len()];
                    E::widen(from, wide);
                    out.iter_mut().zip(wide).for_each(|(y, x)| *y += *x);
                }
            } else {
                E::widen(from, out);
            }
        }
    }));
}
