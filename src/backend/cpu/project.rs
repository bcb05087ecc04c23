//! Every head through the small matrix of its KV head.

use super::CpuBackend;
use super::simd::{Kernel, LANES, Simd};
use super::view::{row, row_mut};
use crate::backend::{HeadMaps, Rows, RowsMut};

/// Multiplications worth a piece of parallel work.
const PIECE: usize = 128 << 10;

/// Bytes of maps that are worth one, for a single row: its time is that of reading them.
const MAP_PIECE: usize = 4 << 10;

/// `out[i][h] = maps[h / group] · x[i][h]`.
pub(super) fn project_heads(cpu: &CpuBackend, x: Rows<'_>, maps: &HeadMaps, out: RowsMut<'_>) {
    let group = x.cols() / maps.inputs / maps.kv_heads;
    if x.rows() == 1 {
        return project_row(cpu, row(&x, 0), maps, group, &out);
    }
    let grain = (PIECE / (x.cols() * maps.outputs)).max(1);
    cpu.pool.split(x.rows(), grain, &|rows| {
        for i in rows {
            // SAFETY: row i belongs to this thread alone.
            let to = unsafe { row_mut(&out, i) };
            let heads = row(&x, i).chunks_exact(maps.inputs).zip(to.chunks_exact_mut(maps.outputs));
            for (head, (x, out)) in heads.enumerate() {
                cpu.level.run(Product { x, map: maps.map(head / group), out });
            }
        }
    });
}

/// As [`project_heads`], of one row: pieces are sixteen outputs of a map for all heads of its group.
fn project_row(cpu: &CpuBackend, x: &[f32], maps: &HeadMaps, group: usize, out: &RowsMut<'_>) {
    let parts = maps.outputs.div_ceil(LANES);
    let grain = (MAP_PIECE / (LANES * maps.inputs * size_of::<f32>())).max(1);
    cpu.pool.split(maps.kv_heads * parts, grain, &|pieces| {
        for piece in pieces {
            let (kv_head, first) = (piece / parts, piece % parts * LANES);
            let count = LANES.min(maps.outputs - first);
            let map = maps.map(kv_head).row_range(first, count);
            for head in kv_head * group..(kv_head + 1) * group {
                let x = &x[head * maps.inputs..][..maps.inputs];
                // SAFETY: columns of the only row of `out`, which are this piece's alone: `count` of the head's from `first` on.
                let out = unsafe {
                    let at = out.base().cast::<f32>().add(head * maps.outputs + first);
                    std::slice::from_raw_parts_mut(at, count)
                };
                cpu.level.run(Product { x, map, out });
            }
        }
    });
}

/// One head: sixteen dot products together, whose sums across lanes are added up in one go.
struct Product<'a> {
    x: &'a [f32],
    map: Rows<'a>,
    out: &'a mut [f32],
}

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inputs = self.x.len();
        for (part, out) in self.out.chunks_mut(LANES).enumerate() {
            let mut products = [s.zero(); LANES];
            for j in 0..out.len() {
                let map = row(&self.map, part * LANES + j);
                let mut sum = s.zero();
                for i in (0..inputs).step_by(LANES) {
                    sum = s.fma(s.load_slice(&self.x[i..]), s.load_slice(&map[i..]), sum);
                }
                products[j] = sum;
            }
            s.store_slice(out, s.sums(products));
        }
    }
}
