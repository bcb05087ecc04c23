//! A backend with a stream, and values that go there and come back.

use half::{bf16, f16};
use kvahead::backend::cpu::{CpuBackend, CpuOptions, Level};
use kvahead::backend::cuda::CudaBackend;
use kvahead::backend::{Backend, Buffer, DType, Linear, Place, Rows, Stream, Vector};

pub use crate::brief::{brief, some};

pub const STORED: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A small random generator (SplitMix64): a seed means the same for ever.
pub struct Random(pub u64);

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

/// A backend and a stream of it.
pub struct Rig<'a> {
    pub b: &'a dyn Backend,
    pub stream: Stream,
}

impl<'a> Rig<'a> {
    pub fn new(b: &'a dyn Backend) -> Rig<'a> {
        Rig { b, stream: b.stream().unwrap() }
    }

    pub fn buffer(&self, dtype: DType, x: &[f32]) -> Buffer {
        let mut bytes = Vec::with_capacity(x.len() * dtype.bytes());
        for &x in x {
            match dtype {
                DType::F32 => bytes.extend(x.to_le_bytes()),
                DType::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
                DType::BF16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
                DType::U32 => bytes.extend((x as u32).to_le_bytes()),
            }
        }
        let mut buffer = self.b.allocate(bytes.len(), Place::Device, "a test").unwrap();
        self.b.upload(&self.stream, &bytes, &mut buffer, 0).unwrap();
        buffer
    }

    /// Activations that hold NaN.
    pub fn poisoned(&self, n: usize) -> Buffer {
        self.buffer(DType::F32, &vec![f32::NAN; n])
    }

    pub fn floats(&self, rows: Rows<'_>) -> Vec<f32> {
        let mut bytes = vec![0; rows.rows() * rows.cols() * 4];
        self.b.download(&self.stream, rows, &mut bytes).unwrap();
        bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect()
    }

    pub fn bytes(&self, buffer: &Buffer) -> Vec<u8> {
        let mut bytes = vec![0; buffer.bytes()];
        let rows = buffer.rows(DType::F16, 1, buffer.bytes() / 2);
        self.b.download(&self.stream, rows, &mut bytes).unwrap();
        bytes
    }

    pub fn vector(&self, x: &[f32]) -> Vector {
        Vector { len: x.len(), data: self.buffer(DType::F32, x) }
    }

    pub fn linear(&self, dtype: DType, outputs: usize, w: &[f32], bias: Option<&[f32]>) -> Linear {
        let data = self.buffer(dtype, w);
        Linear { outputs, inputs: w.len() / outputs, dtype, blocks: None, data, bias: bias.map(|x| self.vector(x)) }
    }
}

/// A CUDA backend of the test's own; says so where there is none.
pub fn cuda() -> Option<CudaBackend> {
    CudaBackend::new(0)
        .inspect_err(|error| {
            assert_ne!(std::env::var("KVAHEAD_TEST_DEVICE").as_deref(), Ok("cuda"), "{error}");
            println!("skipped: {error}");
        })
        .ok()
}

/// Runs a test with the CUDA backend, and with the CPU backend as the oracle.
pub fn with_both(test: impl Fn(&Rig<'_>, &Rig<'_>)) {
    let Some(cuda) = cuda() else { return };
    // Levels above that multiply prompts with 16-bit numbers.
    let level = Level::detect().min(Level::Avx512);
    let cpu = CpuBackend::new(CpuOptions { threads: 2, level: Some(level) }).unwrap();
    test(&Rig::new(&cuda), &Rig::new(&cpu));
}

/// Asserts |got − want| ≤ tolerance · (|want| + 1) everywhere.
#[track_caller]
pub fn assert_close(case: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{case}");
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (g - w).abs();
        assert!(error <= tolerance * (w.abs() + 1.0), "{case}: element {i} is {g}, not {w}");
    }
}

/// Asserts the same bits.
#[track_caller]
pub fn assert_same(case: &str, got: &[f32], want: &[f32]) {
    assert!(got.iter().map(|x| x.to_bits()).eq(want.iter().map(|x| x.to_bits())), "{case}: bits differ");
}
