//! Rotary position embedding.

use super::CpuBackend;
use super::simd::{Kernel, LANES, Simd};
use super::view::{id, row, row_mut};
use crate::backend::{Rotation, Rows, RowsMut};

/// Sines worth a piece of parallel work.
const PIECE: usize = 1 << 10;

/// Elements rotated that are worth one.
const ROTATE_PIECE: usize = 16 << 10;

/// Cosines, then sines, of each position's angles, times the factor.
///
/// The angle is rounded to f32 as the reference implementation's is; its cosine is then as exact as f32 allows.
pub(super) fn table(cpu: &CpuBackend, rotation: &Rotation, positions: Rows<'_>, table: RowsMut<'_>) {
    let pairs = rotation.frequencies.len();
    cpu.pool.split(positions.rows(), PIECE / pairs.max(1), &|rows| {
        for i in rows {
            // SAFETY: row i belongs to this thread alone.
            let (cosines, sines) = unsafe { row_mut(&table, i) }.split_at_mut(pairs);
            let position = id(&positions, i) as f32;
            for (j, &frequency) in rotation.frequencies.iter().enumerate() {
                let (sine, cosine) = f64::from(position * frequency).sin_cos();
                cosines[j] = cosine as f32 * rotation.factor;
                sines[j] = sine as f32 * rotation.factor;
            }
        }
    });
}

/// Rotates every head of every row of `x` by that row of `table`.
pub(super) fn rotate(cpu: &CpuBackend, dims: usize, table: Rows<'_>, head_dim: usize, x: RowsMut<'_>) {
    cpu.pool.split(x.rows(), ROTATE_PIECE / x.cols().max(1), &|rows| {
        for i in rows {
            let (cosines, sines) = row(&table, i).split_at(dims / 2);
            // SAFETY: row i belongs to this thread alone.
            let heads = unsafe { row_mut(&x, i) };
            cpu.level.run(Rotate { heads, head_dim, cosines, sines });
        }
    });
}

struct Rotate<'a> {
    heads: &'a mut [f32],
    head_dim: usize,
    cosines: &'a [f32],
    sines: &'a [f32],
}

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let pairs = self.cosines.len();
        for head in self.heads.chunks_exact_mut(self.head_dim) {
            let (first, rest) = head.split_at_mut(pairs);
            let second = &mut rest[..pairs];
            for i in (0..pairs).step_by(LANES) {
                let (a, b) = (s.load_slice(&first[i..]), s.load_slice(&second[i..]));
                let (cosine, sine) = (s.load_slice(&self.cosines[i..]), s.load_slice(&self.sines[i..]));
                s.store_slice(&mut first[i..], s.sub(s.mul(a, cosine), s.mul(b, sine)));
                s.store_slice(&mut second[i..], s.fma(a, sine, s.mul(b, cosine)));
            }
        }
    }
}
