//! How tensors are encoded in files.

use std::fmt;

/// The encoding of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    BF16,
    /// 32 × 4 bits, scale.
    Q4_0,
    /// 32 × 4 bits, scale and minimum.
    Q4_1,
    /// 32 × 5 bits, scale.
    Q5_0,
    /// 32 × 5 bits, scale and minimum.
    Q5_1,
    /// 32 × 8 bits, scale.
    Q8_0,
    /// 256 × 4 bits in eight sub-blocks with 6-bit scales and minima.
    Q4K,
    /// 256 × 5 bits in eight sub-blocks with 6-bit scales and minima.
    Q5K,
    /// 256 × 6 bits in sixteen sub-blocks with 8-bit scales.
    Q6K,
}

/// Every encoding with its number in GGUF, its name, and the elements and bytes of a block.
const ENCODINGS: [(Encoding, u32, &str, usize, usize); 11] = [
    (Encoding::F32, 0, "F32", 1, 4),
    (Encoding::F16, 1, "F16", 1, 2),
    (Encoding::BF16, 30, "BF16", 1, 2),
    (Encoding::Q4_0, 2, "Q4_0", 32, 18),
    (Encoding::Q4_1, 3, "Q4_1", 32, 20),
    (Encoding::Q5_0, 6, "Q5_0", 32, 22),
    (Encoding::Q5_1, 7, "Q5_1", 32, 24),
    (Encoding::Q8_0, 8, "Q8_0", 32, 34),
    (Encoding::Q4K, 12, "Q4_K", 256, 144),
    (Encoding::Q5K, 13, "Q5_K", 256, 176),
    (Encoding::Q6K, 14, "Q6_K", 256, 210),
];

impl Encoding {
    /// The encoding with this number in GGUF.
    pub fn from_ggml(number: u32) -> Option<Encoding> {
        ENCODINGS.iter().find(|row| row.1 == number).map(|row| row.0)
    }

    /// The names of all encodings, for messages.
    pub fn ggml_list() -> String {
        ENCODINGS.map(|row| row.2).join(", ")
    }

    fn row(self) -> &'static (Encoding, u32, &'static str, usize, usize) {
        ENCODINGS.iter().find(|row| row.0 == self).expect("the table has every encoding")
    }

    /// Elements of a block, which the innermost dimension is a multiple of.
    pub fn block_elements(self) -> usize {
        self.row().3
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Bytes of a tensor with rows of `columns` elements and the dimensions `outer` around them; `None` where they
    /// are no whole number of blocks or overflow.
    pub fn bytes(self, columns: usize, outer: &[usize]) -> Option<u64> {
        if !columns.is_multiple_of(self.block_elements()) {
            return None;
        }
        let row = (columns / self.block_elements()).checked_mul(self.block_bytes())?;
        let bytes = outer.iter().try_fold(row, |product, &n| product.checked_mul(n))?;
        // Elements too must be countable: a decoded tensor is up to eight times as large as its encoding.
        bytes.checked_mul(8)?;
        Some(bytes as u64)
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.row().2)
    }
}
