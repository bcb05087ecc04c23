//! Every head through the small matrix of its KV head.

use super::CpuBackend;
use super::simd::{Kernel, LANES, Simd};
use super::view::{row, row_mut};
use crate::backend::{HeadMaps, Rows, RowsMut};

/// Multiplications worth a piece of parallel work.
const PIECE: usize = 128 << 10;

/// `out[i][h] = maps[h / group] · x[i][h]`.
pub(super) fn project_heads(cpu: &CpuBackend, x: Rows<'_>, maps: &HeadMaps, out: RowsMut<'_>) {
    let group = x.cols() / maps.inputs / maps.kv_heads;
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
