//! Keys and values of new tokens into their runs.

use super::CpuBackend;
use super::simd::{Element, Kernel, Simd, for_dtype};
use super::view::row;
use crate::backend::{KvRuns, KvRunsMut, Move, Rows};

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

/// Stores one token's heads, each in a row of its own.
pub(super) fn store_rows(keys: Rows<'_>, values: Rows<'_>, runs: &mut KvRunsMut<'_>, rows: &[u32]) {
    let geometry = *runs.geometry();
    let d = geometry.head_dim;
    for_dtype!(geometry.dtype, E => {
        let (keys, values) = (row(&keys, 0).chunks_exact(d), row(&values, 0).chunks_exact(d));
        for (head, (key, value)) in keys.zip(values).enumerate() {
            let at = rows[head] as usize;
            // SAFETY: the row lies below the runs' capacity, which the caller asserted; the run has `extent_tokens` rows
            // of 2·d elements each, and `runs` is borrowed mutably.
            let to = unsafe {
                let run = runs.run_mut(at / geometry.extent_tokens, head).cast::<E>();
                std::slice::from_raw_parts_mut(run.add(at % geometry.extent_tokens * 2 * d), 2 * d)
            };
            let (k, v) = to.split_at_mut(d);
            E::narrow(key, k);
            E::narrow(value, v);
        }
    });
}

/// Rows that are asked for before they are copied: they lie anywhere, so nothing but this foresees them.
const COPY_AHEAD: usize = 8;

/// Copies rows between runs of one shape.
pub(super) fn copy_rows(cpu: &CpuBackend, from: &KvRuns<'_>, to: &mut KvRunsMut<'_>, moves: &[Move]) {
    cpu.level.run(Copies { from, to, moves });
}

struct Copies<'a, 'b> {
    from: &'a KvRuns<'a>,
    to: &'a mut KvRunsMut<'b>,
    moves: &'a [Move],
}

impl Kernel for Copies<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let bytes = self.from.geometry().row_bytes();
        for (i, m) in self.moves.iter().enumerate() {
            if let Some(later) = self.moves.get(i + COPY_AHEAD) {
                s.prefetch_all(source(self.from, later), bytes);
            }
            let (row, write, extent) = (source(self.from, m), m.to as usize, self.to.geometry().extent_tokens);
            // SAFETY: both rows lie below their runs' capacity, which the caller asserted; `to` is borrowed mutably, so it is
            // no memory of `from`.
            unsafe {
                let place = self.to.run_mut(write / extent, m.head as usize).add(write % extent * bytes);
                std::ptr::copy_nonoverlapping(row, place, bytes);
            }
        }
    }
}

/// The row that is moved, which lies below the runs' capacity.
fn source(from: &KvRuns<'_>, m: &Move) -> *const u8 {
    let (read, extent) = (m.from as usize, from.geometry().extent_tokens);
    from.run(read / extent, m.head as usize).wrapping_add(read % extent * from.geometry().row_bytes())
}
