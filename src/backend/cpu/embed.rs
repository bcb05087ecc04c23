//! Rows of a table, by id.

use super::CpuBackend;
use super::simd::{Element, for_dtype};
use super::stored::Widen;
use super::view::{id, row_mut};
use crate::backend::{Blocks, Linear, Rows, RowsMut};

/// Elements worth a piece of parallel work.
const PIECE: usize = 32 << 10;

/// `out[i] (+)= table[ids[i]]`.
pub(super) fn embed(cpu: &CpuBackend, table: &Linear, ids: Rows<'_>, accumulate: bool, out: RowsMut<'_>) {
    let cols = table.inputs;
    if let Some(blocks) = table.blocks {
        return embed_blocks(cpu, table, blocks, ids, accumulate, out);
    }
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

/// As [`embed`], of a table of blocks.
fn embed_blocks(cpu: &CpuBackend, table: &Linear, blocks: Blocks, ids: Rows<'_>, accumulate: bool, out: RowsMut<'_>) {
    cpu.pool.split(ids.rows(), PIECE / table.inputs.max(1), &|rows| {
        let mut wide = [0.0; 8 * Blocks::COLUMNS];
        for i in rows {
            let id = id(&ids, i);
            assert!(id < table.outputs, "id {id} of a table of {} rows", table.outputs);
            // SAFETY: row i belongs to this thread alone.
            let out = unsafe { row_mut(&out, i) };
            for (chunk, out) in out.chunks_mut(wide.len()).enumerate() {
                let from = chunk * wide.len();
                let (columns, wide) = (from..from + out.len(), &mut wide[..out.len()]);
                cpu.level.run(Widen { weight: table, blocks, rows: id..id + 1, columns, to: wide });
                out.iter_mut().zip(wide).for_each(|(y, x)| *y = if accumulate { *y + *x } else { *x });
            }
        }
    });
}
