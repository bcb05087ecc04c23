//! Weights that stay quantized in memory: blocks of a checkpoint, laid out for matrix products.
//!
//! A block is 32 neighbouring elements of a row with a scale of their own. In files a row is one block after the other. Here
//! the blocks of [`Blocks::ROWS`] rows over the same columns are one *tile*, and a matrix is a sequence of tiles: those of
//! the first four rows by ascending column, then those of the next four, the last rows filled up with zeros. So a product
//! of four outputs reads one stretch of memory; one conversion widens a tile's scales, and one load brings 4 × 16 bits of
//! each lane of a vector. A tile takes exactly the bytes that its blocks take in the file.
//!
//! ```text
//! Q4_0   4 × d               16 × u32
//! Q4_1   4 × (d, m)          16 × u32      word i: bits 4r.. are element i of row r, bits 16 + 4r.. element 16 + i
//! Q8_0   4 × d               4 × 32 × i8
//! ```
//!
//! What a block stands for is said where checkpoints are read, in `model/checkpoint/quant.rs`.

use std::fmt;

/// The encodings of blocks that products read as they are. The names are ggml's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Blocks {
    /// 4 bits and a scale: x = d (q − 8).
    Q4_0,
    /// 4 bits, a scale and a minimum: x = d q + m.
    Q4_1,
    /// Signed bytes and a scale: x = d q.
    Q8_0,
}

impl Blocks {
    /// Rows of a tile.
    pub const ROWS: usize = 4;

    /// Columns of a tile: the elements of a block.
    pub const COLUMNS: usize = 32;

    /// Bytes of a block's scale and minimum, f16 each, which come first.
    const fn scale_bytes(self) -> usize {
        match self {
            Blocks::Q4_0 | Blocks::Q8_0 => 2,
            Blocks::Q4_1 => 4,
        }
    }

    /// Bytes of a block.
    pub const fn block_bytes(self) -> usize {
        let elements = match self {
            Blocks::Q4_0 | Blocks::Q4_1 => Blocks::COLUMNS / 2,
            Blocks::Q8_0 => Blocks::COLUMNS,
        };
        self.scale_bytes() + elements
    }

    /// Bytes of a tile.
    pub const fn tile_bytes(self) -> usize {
        Blocks::ROWS * self.block_bytes()
    }

    /// Bytes of a row of `columns` elements, a quarter of its tiles.
    ///
    /// # Panics
    /// When `columns` is no multiple of [`Blocks::COLUMNS`].
    pub const fn row_bytes(self, columns: usize) -> usize {
        assert!(columns.is_multiple_of(Blocks::COLUMNS), "no whole blocks");
        columns / Blocks::COLUMNS * self.block_bytes()
    }

    /// Bytes of a matrix.
    pub const fn bytes(self, rows: usize, columns: usize) -> usize {
        rows.next_multiple_of(Blocks::ROWS) * self.row_bytes(columns)
    }

    /// Whether every element of some whole blocks of a file is finite: where the scales are, all are, since no 8 bits times
    /// an f16 pass the range of f32 or bf16.
    ///
    /// # Panics
    /// When `bytes` are no whole blocks.
    pub fn all_finite(self, bytes: &[u8]) -> bool {
        assert!(bytes.len().is_multiple_of(self.block_bytes()), "no whole number of {self} blocks");
        let infinite = |half: &[u8; 2]| u16::from_le_bytes(*half) & 0x7c00 == 0x7c00;
        !bytes.chunks_exact(self.block_bytes()).any(|block| {
            let (scales, _) = block[..self.scale_bytes()].as_chunks();
            scales.iter().any(infinite)
        })
    }

    /// Lays out `rows`, whole rows of a file of `columns` elements each, as tiles.
    ///
    /// # Panics
    /// When `rows` are no whole rows, or `tiles` has not the size of as many rows, filled up to whole tiles.
    pub fn tile(self, rows: &[u8], columns: usize, tiles: &mut [u8]) {
        let row_bytes = self.row_bytes(columns);
        assert!(rows.len().is_multiple_of(row_bytes));
        assert_eq!(tiles.len(), self.bytes(rows.len() / row_bytes, columns));
        tiles.fill(0);
        let groups = rows.chunks(Blocks::ROWS * row_bytes).zip(tiles.chunks_exact_mut(Blocks::ROWS * row_bytes));
        for (rows, tiles) in groups {
            for (r, row) in rows.chunks_exact(row_bytes).enumerate() {
                let blocks = row.chunks_exact(self.block_bytes());
                for (block, tile) in blocks.zip(tiles.chunks_exact_mut(self.tile_bytes())) {
                    self.place(block, r, tile);
                }
            }
        }
    }

    /// Puts a block into row `r` of a tile that holds zeros there.
    fn place(self, block: &[u8], r: usize, tile: &mut [u8]) {
        let (scales, elements) = block.split_at(self.scale_bytes());
        let (tile_scales, tile_elements) = tile.split_at_mut(Blocks::ROWS * scales.len());
        tile_scales[r * scales.len()..][..scales.len()].copy_from_slice(scales);
        match self {
            Blocks::Q4_0 | Blocks::Q4_1 => {
                for (byte, word) in elements.iter().zip(tile_elements.as_chunks_mut::<4>().0) {
                    let pair = u32::from(byte & 15) | u32::from(byte >> 4) << 16;
                    *word = (u32::from_le_bytes(*word) | pair << (4 * r)).to_le_bytes();
                }
            }
            Blocks::Q8_0 => tile_elements[r * Blocks::COLUMNS..][..Blocks::COLUMNS].copy_from_slice(elements),
        }
    }
}

impl fmt::Display for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Blocks::Q4_0 => "q4_0",
            Blocks::Q4_1 => "q4_1",
            Blocks::Q8_0 => "q8_0",
        })
    }
}
