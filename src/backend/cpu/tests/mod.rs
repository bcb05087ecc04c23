//! Every operation at every level against a plain f64 reference, on fresh random inputs of odd sizes.
//!
//! Outputs are poisoned with NaN before each call and must be overwritten; every failure names its case, whose inputs
//! follow from the seed in it.

mod attention;
mod blocks;
mod index;
mod matrix;
mod payload;
mod rank;
mod rowwise;
mod tail;

use super::{CpuBackend, CpuOptions, Level};
use crate::backend::{Backend, Buffer, DType, Linear, Place, Rows, Stream, Vector};
use half::{bf16, f16};

pub(super) const STORED: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A small random generator (SplitMix64): tests need no more, and a seed must mean the same for ever.
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// About normal, variance one.
    pub fn normal(&mut self) -> f32 {
        let sum: f64 = (0..4).map(|_| self.next() as f64 / u64::MAX as f64).sum();
        ((sum - 2.0) * 3f64.sqrt()) as f32
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

pub(super) fn backend(level: Level, threads: usize) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads, level: Some(level) }).unwrap()
}

/// Every level of this machine, with each of some numbers of threads.
pub(super) fn backends() -> impl Iterator<Item = (String, CpuBackend)> {
    Level::available().flat_map(|level| {
        [1, 3].into_iter().map(move |threads| (format!("{level:?} x{threads}"), backend(level, threads)))
    })
}

/// What `dtype` makes of `x`.
pub(super) fn rounded(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F32 => x,
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        DType::U32 => unreachable!(),
    }
}

pub(super) fn bytes_of(dtype: DType, x: &[f32]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(x.len() * dtype.bytes());
    for &x in x {
        match dtype {
            DType::F32 => bytes.extend(x.to_le_bytes()),
            DType::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
            DType::BF16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
            DType::U32 => bytes.extend((x as u32).to_le_bytes()),
        }
    }
    bytes
}

pub(super) fn buffer(b: &CpuBackend, dtype: DType, x: &[f32]) -> Buffer {
    let bytes = bytes_of(dtype, x);
    let mut buffer = b.allocate(bytes.len(), Place::Device, "a test").unwrap();
    b.upload(&Stream(0), &bytes, &mut buffer, 0).unwrap();
    buffer
}

/// Activations that hold NaN.
pub(super) fn poisoned(b: &CpuBackend, n: usize) -> Buffer {
    buffer(b, DType::F32, &vec![f32::NAN; n])
}

pub(super) fn floats(b: &CpuBackend, rows: Rows<'_>) -> Vec<f32> {
    let mut bytes = vec![0; rows.rows() * rows.cols() * 4];
    b.download(&Stream(0), rows, &mut bytes).unwrap();
    bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
}

pub(super) fn vector(b: &CpuBackend, x: &[f32]) -> Vector {
    Vector { len: x.len(), data: buffer(b, DType::F32, x) }
}

pub(super) fn linear(b: &CpuBackend, dtype: DType, outputs: usize, w: &[f32], bias: Option<&[f32]>) -> Linear {
    Linear {
        outputs,
        inputs: w.len() / outputs,
        dtype,
        blocks: None,
        data: buffer(b, dtype, w),
        bias: bias.map(|x| vector(b, x)),
    }
}

/// Asserts |got − want| ≤ tolerance · (|want| + scale) everywhere.
#[track_caller]
pub(super) fn assert_close(case: &str, got: &[f32], want: &[f64], tolerance: f64, scale: f64) {
    assert_eq!(got.len(), want.len(), "{case}");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(g) - w).abs();
        assert!(error <= tolerance * (w.abs() + scale), "{case}: element {i} is {g}, not {w}");
    }
}

/// Asserts the same bits.
#[track_caller]
pub(super) fn assert_same(case: &str, got: &[f32], want: &[f32]) {
    assert!(got.iter().map(|x| x.to_bits()).eq(want.iter().map(|x| x.to_bits())), "{case}: bits differ");
}

#[test]
fn options_are_checked() {
    use crate::ErrorCode;
    let code = |threads, level| CpuBackend::new(CpuOptions { threads, level }).err().map(|e| e.code());
    assert_eq!(code(usize::MAX, None), Some(ErrorCode::InvalidArgument));
    assert_eq!(code(0, None), None);
    for level in [Level::Scalar, Level::Avx2, Level::Avx512, Level::Vnni, Level::Amx] {
        let expected = (level > Level::detect()).then_some(ErrorCode::Unsupported);
        assert_eq!(code(1, Some(level)), expected);
    }
}

#[test]
fn copies_go_there_and_back() {
    let b = backend(Level::Scalar, 1);
    let x: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let data = buffer(&b, DType::F32, &x);
    assert_eq!(floats(&b, data.rows(DType::F32, 3, 4)), x);
    let window = data.rows(DType::F32, 3, 4).col_range(1, 2).row_range(1, 2);
    assert_eq!(floats(&b, window), [5., 6., 9., 10.]);
}
