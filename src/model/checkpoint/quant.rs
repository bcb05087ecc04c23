//! How files encode the elements of a tensor, and how to get numbers out again.
//!
//! The quantized encodings are ggml's: a row is cut into blocks of 32 or 256 elements, each with its own scale (and
//! minimum), and an element is `scale · q + minimum`. Everything is computed in f32, in ggml's order of operations,
//! so that the values are bit for bit those that other readers of the same file see.

use std::fmt;

use half::{bf16, f16};

use crate::backend::{Blocks, DType};

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

/// What there is to know about an encoding.
struct Description {
    encoding: Encoding,
    /// Its number in GGUF.
    number: u32,
    name: &'static str,
    block_elements: usize,
    block_bytes: usize,
}

const fn describe(
    encoding: Encoding,
    number: u32,
    name: &'static str,
    block_elements: usize,
    block_bytes: usize,
) -> Description {
    Description { encoding, number, name, block_elements, block_bytes }
}

/// In the order of [`Encoding`].
const DESCRIPTIONS: [Description; 11] = [
    describe(Encoding::F32, 0, "F32", 1, 4),
    describe(Encoding::F16, 1, "F16", 1, 2),
    describe(Encoding::BF16, 30, "BF16", 1, 2),
    describe(Encoding::Q4_0, 2, "Q4_0", 32, 18),
    describe(Encoding::Q4_1, 3, "Q4_1", 32, 20),
    describe(Encoding::Q5_0, 6, "Q5_0", 32, 22),
    describe(Encoding::Q5_1, 7, "Q5_1", 32, 24),
    describe(Encoding::Q8_0, 8, "Q8_0", 32, 34),
    describe(Encoding::Q4K, 12, "Q4_K", 256, 144),
    describe(Encoding::Q5K, 13, "Q5_K", 256, 176),
    describe(Encoding::Q6K, 14, "Q6_K", 256, 210),
];

impl Encoding {
    /// The encoding with this number in GGUF.
    pub fn from_ggml(number: u32) -> Option<Encoding> {
        DESCRIPTIONS.iter().find(|description| description.number == number).map(|description| description.encoding)
    }

    /// The names of all encodings, for messages.
    pub fn ggml_list() -> String {
        DESCRIPTIONS.each_ref().map(|description| description.name).join(", ")
    }

    fn description(self) -> &'static Description {
        &DESCRIPTIONS[self as usize]
    }

    /// Elements of a block, which the innermost dimension is a multiple of.
    pub fn block_elements(self) -> usize {
        self.description().block_elements
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.description().block_bytes
    }

    /// Bytes of a tensor with rows of `columns` elements and the dimensions `outer` around them; `None` where they
    /// are no whole number of blocks or overflow.
    pub fn bytes(self, columns: usize, outer: &[usize]) -> Option<u64> {
        if !columns.is_multiple_of(self.block_elements()) {
            return None;
        }
        let row = (columns / self.block_elements()).checked_mul(self.block_bytes())?;
        let bytes = outer.iter().try_fold(row, |product, &n| product.checked_mul(n))?;
        // A decoded tensor is up to eight times as large as its encoding, and must be countable too.
        bytes.checked_mul(8)?;
        Some(bytes as u64)
    }

    /// The element type that holds exactly these values, for the encodings that are one.
    pub fn plain(self) -> Option<DType> {
        match self {
            Encoding::F32 => Some(DType::F32),
            Encoding::F16 => Some(DType::F16),
            Encoding::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    /// The blocks that a backend may keep in memory, for the encodings that are such.
    pub fn blocks(self) -> Option<Blocks> {
        match self {
            Encoding::Q4_0 => Some(Blocks::Q4_0),
            Encoding::Q4_1 => Some(Blocks::Q4_1),
            Encoding::Q8_0 => Some(Blocks::Q8_0),
            _ => None,
        }
    }

    /// Decodes whole blocks.
    ///
    /// # Panics
    /// When `bytes` and `values` are not the same number of whole blocks.
    pub fn decode(self, bytes: &[u8], values: &mut [f32]) {
        let blocks = values.len() / self.block_elements();
        assert_eq!(values.len(), blocks * self.block_elements(), "values are no whole number of {self} blocks");
        assert_eq!(bytes.len(), blocks * self.block_bytes(), "bytes do not match the values");
        match self {
            Encoding::F32 => each_block(bytes, values, |bytes: &[u8; 4], [value]| *value = f32::from_le_bytes(*bytes)),
            Encoding::F16 => decode_f16(bytes, values),
            Encoding::BF16 => each_block(bytes, values, |bytes: &[u8; 2], [value]| {
                *value = bf16::from_le_bytes(*bytes).to_f32();
            }),
            Encoding::Q4_0 => each_block(bytes, values, q4_0),
            Encoding::Q4_1 => each_block(bytes, values, q4_1),
            Encoding::Q5_0 => each_block(bytes, values, q5_0),
            Encoding::Q5_1 => each_block(bytes, values, q5_1),
            Encoding::Q8_0 => each_block(bytes, values, q8_0),
            Encoding::Q4K => each_block(bytes, values, q4_k),
            Encoding::Q5K => each_block(bytes, values, q5_k),
            Encoding::Q6K => each_block(bytes, values, q6_k),
        }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.description().name)
    }
}

/// Rounds `values` to `dtype`, nearest even, and says whether all results are finite.
///
/// # Panics
/// When `bytes` has not the size of as many elements, or for [`DType::U32`].
pub fn round(values: &[f32], dtype: DType, bytes: &mut [u8]) -> bool {
    assert_eq!(bytes.len(), values.len() * dtype.bytes());
    match dtype {
        DType::F32 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = value.to_le_bytes();
            }
        }
        DType::BF16 => {
            for (value, bytes) in values.iter().zip(bytes.as_chunks_mut().0) {
                *bytes = bf16_bits(*value).to_le_bytes();
            }
        }
        DType::F16 => {
            use half::slice::HalfFloatSliceExt;
            // Through a small array, because `bytes` may not be aligned and this conversion uses the CPU's own.
            let mut rounded = [f16::ZERO; 256];
            for (values, bytes) in values.chunks(256).zip(bytes.chunks_mut(512)) {
                let rounded = &mut rounded[..values.len()];
                rounded.convert_from_f32_slice(values);
                for (value, bytes) in rounded.iter().zip(bytes.as_chunks_mut().0) {
                    *bytes = value.to_le_bytes();
                }
            }
        }
        DType::U32 => unreachable!("weights are floats"),
    }
    all_finite(bytes, dtype)
}

/// Whether every element of `bytes` is finite.
pub fn all_finite(bytes: &[u8], dtype: DType) -> bool {
    // An infinity or NaN has all bits of the exponent set. Written as a fold without an early exit so that it
    // vectorises.
    fn any16(bytes: &[u8], exponent: u16) -> bool {
        let found = |found, bytes: &[u8; 2]| found | (u16::from_le_bytes(*bytes) & exponent == exponent);
        bytes.chunks(4096).any(|bytes| bytes.as_chunks().0.iter().fold(false, found))
    }
    match dtype {
        DType::F16 => !any16(bytes, 0x7c00),
        DType::BF16 => !any16(bytes, 0x7f80),
        DType::F32 => {
            let found = |found, bytes: &[u8; 4]| found | (u32::from_le_bytes(*bytes) & 0x7f80_0000 == 0x7f80_0000);
            !bytes.chunks(4096).any(|bytes| bytes.as_chunks().0.iter().fold(false, found))
        }
        DType::U32 => true,
    }
}

/// To nearest even; a NaN stays one. Without a branch, unlike `half`'s own, so that it vectorises.
fn bf16_bits(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    (if value.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

fn decode_f16(bytes: &[u8], values: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    let mut halves = [f16::ZERO; 256];
    for (bytes, values) in bytes.chunks(512).zip(values.chunks_mut(256)) {
        let halves = &mut halves[..values.len()];
        for (half, bytes) in halves.iter_mut().zip(bytes.as_chunks().0) {
            *half = f16::from_le_bytes(*bytes);
        }
        halves.convert_to_f32_slice(values);
    }
}

/// Runs `decode` on every block of B bytes and N values.
fn each_block<const B: usize, const N: usize>(
    bytes: &[u8],
    values: &mut [f32],
    decode: impl Fn(&[u8; B], &mut [f32; N]),
) {
    for (bytes, values) in bytes.as_chunks().0.iter().zip(values.as_chunks_mut().0) {
        decode(bytes, values);
    }
}

/// The f16 at byte `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// d: f16, then 16 bytes whose low nibbles are elements 0 to 15 and whose high nibbles are 16 to 31. x = d (q − 8).
fn q4_0(block: &[u8; 18], values: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (j, &byte) in block[2..].iter().enumerate() {
        values[j] = (i32::from(byte & 15) - 8) as f32 * d;
        values[j + 16] = (i32::from(byte >> 4) - 8) as f32 * d;
    }
}

/// d, m: f16, then nibbles as in Q4_0. x = d q + m.
fn q4_1(block: &[u8; 20], values: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    for (j, &byte) in block[4..].iter().enumerate() {
        values[j] = f32::from(byte & 15) * d + m;
        values[j + 16] = f32::from(byte >> 4) * d + m;
    }
}

/// The two 5-bit numbers whose low bits are in byte `j` of the nibbles, and high bits in `high`.
fn five_bits(byte: u8, high: u32, j: usize) -> [i32; 2] {
    let low = u32::from(byte & 15) | (high >> j & 1) << 4;
    let upper = u32::from(byte >> 4) | (high >> (j + 16) & 1) << 4;
    [low as i32, upper as i32]
}

/// d: f16, the fifth bits: u32, then nibbles as in Q4_0. x = d (q − 16).
fn q5_0(block: &[u8; 22], values: &mut [f32; 32]) {
    let d = half_at(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for (j, &byte) in block[6..].iter().enumerate() {
        let [low, upper] = five_bits(byte, high, j);
        values[j] = (low - 16) as f32 * d;
        values[j + 16] = (upper - 16) as f32 * d;
    }
}

/// d, m: f16, the fifth bits: u32, then nibbles as in Q4_0. x = d q + m.
fn q5_1(block: &[u8; 24], values: &mut [f32; 32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for (j, &byte) in block[8..].iter().enumerate() {
        let [low, upper] = five_bits(byte, high, j);
        values[j] = low as f32 * d + m;
        values[j + 16] = upper as f32 * d + m;
    }
}

/// d: f16, then 32 signed bytes. x = d q.
fn q8_0(block: &[u8; 34], values: &mut [f32; 32]) {
    let d = half_at(block, 0);
    for (value, &byte) in values.iter_mut().zip(&block[2..]) {
        *value = f32::from(byte as i8) * d;
    }
}

/// The 6-bit scale and minimum of sub-block `j` of a K-quant: eight of each in twelve bytes. The first four scales and
/// minima are the low six bits of bytes 0–3 and 4–7; the others have their low nibbles in bytes 8–11 and their upper
/// two bits on top of the first eight bytes.
fn scale_and_minimum(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, minimum) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

/// d, dmin: f16, 12 bytes of scales and minima, 128 of nibbles: every 32 bytes hold two sub-blocks of 32 elements, the
/// first in the low nibbles. x = (d · scale) q − dmin · minimum.
fn q4_k(block: &[u8; 144], values: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, nibbles) = block[4..].split_at(12);
    for (pair, (nibbles, values)) in nibbles.chunks_exact(32).zip(values.chunks_exact_mut(64)).enumerate() {
        let (scale, minimum) = scale_and_minimum(scales, 2 * pair);
        let (d1, m1) = (d * scale, dmin * minimum);
        let (scale, minimum) = scale_and_minimum(scales, 2 * pair + 1);
        let (d2, m2) = (d * scale, dmin * minimum);
        let (low, upper) = values.split_at_mut(32);
        for (j, &byte) in nibbles.iter().enumerate() {
            low[j] = d1 * f32::from(byte & 15) - m1;
            upper[j] = d2 * f32::from(byte >> 4) - m2;
        }
    }
}

/// As Q4_K, with 32 bytes of fifth bits before the nibbles: bit s of byte j belongs to element j of sub-block s.
fn q5_k(block: &[u8; 176], values: &mut [f32; 256]) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let (scales, rest) = block[4..].split_at(12);
    let (high, nibbles) = rest.split_at(32);
    for (pair, (nibbles, values)) in nibbles.chunks_exact(32).zip(values.chunks_exact_mut(64)).enumerate() {
        let (scale, minimum) = scale_and_minimum(scales, 2 * pair);
        let (d1, m1) = (d * scale, dmin * minimum);
        let (scale, minimum) = scale_and_minimum(scales, 2 * pair + 1);
        let (d2, m2) = (d * scale, dmin * minimum);
        let (low, upper) = values.split_at_mut(32);
        for (j, &byte) in nibbles.iter().enumerate() {
            let fifth = high[j] >> (2 * pair);
            low[j] = d1 * f32::from(byte & 15 | (fifth & 1) << 4) - m1;
            upper[j] = d2 * f32::from(byte >> 4 | (fifth >> 1 & 1) << 4) - m2;
        }
    }
}

/// 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, d: f16. Each half of the block is 128 elements:
/// four runs of 32, whose nibbles are the low and then the high halves of 64 bytes, and whose upper bits are the four
/// pairs of 32 bytes. A scale serves 16 elements. x = (d · scale) (q − 32).
fn q6_k(block: &[u8; 210], values: &mut [f32; 256]) {
    let d = half_at(block, 208);
    for (half, values) in values.chunks_exact_mut(128).enumerate() {
        let nibbles = &block[64 * half..][..64];
        let pairs = &block[128 + 32 * half..][..32];
        let scales = &block[192 + 8 * half..][..8];
        for (run, values) in values.chunks_exact_mut(32).enumerate() {
            for (j, value) in values.iter_mut().enumerate() {
                let byte = nibbles[32 * (run & 1) + j];
                let low = if run < 2 { byte & 15 } else { byte >> 4 };
                let q = i32::from(low | (pairs[j] >> (2 * run) & 3) << 4) - 32;
                *value = d * f32::from(scales[2 * run + j / 16] as i8) * q as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptions_stand_in_the_order_of_the_enum() {
        for (index, description) in DESCRIPTIONS.iter().enumerate() {
            assert_eq!(description.encoding as usize, index);
            assert_eq!(Encoding::from_ggml(description.number), Some(description.encoding));
        }
    }

    #[test]
    fn sizes_refuse_what_cannot_be() {
        assert_eq!(Encoding::Q4_1.bytes(64, &[3]), Some(120));
        assert_eq!(Encoding::Q4_1.bytes(65, &[3]), None);
        assert_eq!(Encoding::F32.bytes(usize::MAX, &[1]), None);
        assert_eq!(Encoding::F32.bytes(1 << 31, &[1 << 31, 4]), None);
    }

    #[test]
    fn bf16_rounds_as_half_does() {
        let mut bits = 1u32;
        for _ in 0..1_000_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let value = f32::from_bits(bits);
            assert_eq!(bf16_bits(value), bf16::from_f32(value).to_bits(), "{bits:#x}");
        }
        assert_eq!(bf16_bits(f32::INFINITY), 0x7f80);
        assert!(bf16::from_bits(bf16_bits(f32::from_bits(0x7f80_0001))).is_nan());
    }

    #[test]
    fn rounding_reports_what_is_not_finite() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let mut bytes = vec![0; 5 * dtype.bytes()];
            assert!(round(&[0.0, -1.5, 3e-9, 6e4, 1.0], dtype, &mut bytes));
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert!(!round(&[0.0, 1.0, 2.0, 3.0, bad], dtype, &mut bytes), "{bad} in {dtype}");
            }
        }
        assert!(!round(&[1e5], DType::F16, &mut [0; 2]), "1e5 overflows f16");
    }
}
