//! Matrices that a warp holds in its lanes' registers: 8 × 8 of 16-bit numbers a word, two of a row side by side, the lane
//! 4r + k holding columns 2k and 2k + 1 of row r.

use std::sync::OnceLock;

use super::warp::{ALL, Step, Warp};
use super::{LANES, Space};
use crate::ptx::*;

/// All 16-bit numbers as floats.
fn table() -> &'static [f32] {
    static TABLE: OnceLock<Vec<f32>> = OnceLock::new();
    TABLE.get_or_init(|| (0..=u16::MAX).map(|bits| half::f16::from_bits(bits).to_f32()).collect())
}

/// The two numbers of a word.
#[inline(always)]
fn pair(table: &[f32], bf16: bool, word: u32) -> [f32; 2] {
    if bf16 {
        [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)]
    } else {
        [table[(word & 0xffff) as usize], table[(word >> 16) as usize]]
    }
}

fn transposed(word: &[u32; LANES]) -> [u32; LANES] {
    let element = |row: usize, column: usize| word[4 * row + column / 2] >> (16 * (column % 2)) & 0xffff;
    std::array::from_fn(|lane| {
        let (row, column) = (lane / 4, lane % 4 * 2);
        element(column, row) | element(column + 1, row) << 16
    })
}

impl Warp {
    /// c + a · b of 16 × 16 by 16 × 8; sums are floats, in the order of the depth.
    #[inline(always)]
    pub(super) fn mma(&mut self, bf16: bool, i: &Instruction) {
        let table = table();
        let (mut a, mut b, mut c) = ([[0f32; 16]; 16], [[0f32; 8]; 16], [[0f32; 8]; 16]);
        let mut lane = 0;
        while lane < LANES {
            let (row, column) = (lane / 4, lane % 4 * 2);
            let mut part = 0;
            while part < 4 {
                let (r, k) = (row + part % 2 * 8, column + part / 2 * 8);
                [a[r][k], a[r][k + 1]] = pair(table, bf16, self.word(i.from[part])[lane]);
                c[r][column + part / 2] = f32::from_bits(self.word(i.from[6 + part % 2 * 2 + part / 2])[lane]);
                part += 1;
            }
            [b[column][row], b[column + 1][row]] = pair(table, bf16, self.word(i.from[4])[lane]);
            [b[column + 8][row], b[column + 9][row]] = pair(table, bf16, self.word(i.from[5])[lane]);
            lane += 1;
        }
        // (Loops that a compiler surely unrolls.)
        let mut row = 0;
        while row < 16 {
            let mut sums = c[row];
            let mut k = 0;
            while k < 16 {
                let mut column = 0;
                while column < 8 {
                    sums[column] = a[row][k].mul_add(b[k][column], sums[column]);
                    column += 1;
                }
                k += 1;
            }
            c[row] = sums;
            row += 1;
        }
        let mut part = 0;
        while part < 4 {
            let (mut values, mut lane) = ([0; LANES], 0);
            while lane < LANES {
                values[lane] = c[lane / 4 + part / 2 * 8][lane % 4 * 2 + part % 2].to_bits();
                lane += 1;
            }
            self.set_word(i.to[part], ALL, &values);
            part += 1;
        }
    }

    pub(super) fn load_matrices(&mut self, transpose: bool, count: u8, i: &Instruction, space: &Space) -> Step<()> {
        let addresses = *self.word(i.from[0]);
        for part in 0..usize::from(count) {
            let mut word = [0; LANES];
            for row in 0..8 {
                let address = (i64::from(addresses[8 * part + row]) + i.offset) as u64;
                let bytes = self.shared(address, 16, space)?;
                // SAFETY: sixteen bytes of the block's shared memory, by the call above; aligned to sixteen.
                let words = unsafe { bytes.cast::<[u32; 4]>().read() };
                word[4 * row..4 * row + 4].copy_from_slice(&words);
            }
            self.set_word(i.to[part], ALL, &if transpose { transposed(&word) } else { word });
        }
        Ok(())
    }

    pub(super) fn transpose_matrix(&mut self, i: &Instruction) {
        let values = transposed(self.word(i.from[0]));
        self.set_word(i.to[0], ALL, &values);
    }
}
