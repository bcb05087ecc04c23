//! What several integration tests need: golden data and a way to run a model on it.
#![allow(dead_code)]

pub mod brief;
pub mod gguf;

use std::path::{Path, PathBuf};

use kvahead::backend::DType;
use kvahead::engine::{Device, Model, ModelOptions, Session, SessionOptions};
use safetensors::SafeTensors;

/// The folder of the committed test data.
pub fn data() -> PathBuf {
    root().join("tests/data")
}

/// The repository: the one that the tests were built in, or `KVAHEAD_TEST_ROOT` where they have been taken elsewhere.
pub fn root() -> PathBuf {
    std::env::var_os("KVAHEAD_TEST_ROOT").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from)
}

/// The real model, which `make test` fetches.
pub fn real_model() -> PathBuf {
    let path = root().join(".cache/SmolLM2-135M-Instruct.Q4_1.gguf");
    assert!(path.exists(), "{} is missing: run `make model` first", path.display());
    path
}

/// What transformers computed for a checkpoint.
pub struct Golden {
    pub tokens: Vec<u32>,
    /// One row a token.
    pub logits: Vec<Vec<f32>>,
    /// The greedy continuation.
    pub greedy: Vec<u32>,
}

impl Golden {
    /// Reads `golden.safetensors`; `prefix` is "" or, for LongRoPE's second run, "short.".
    pub fn read(folder: &Path, prefix: &str) -> Golden {
        let bytes = std::fs::read(folder.join("golden.safetensors")).expect("golden data is committed");
        let tensors = SafeTensors::deserialize(&bytes).expect("golden data is valid");
        let ids = |name: &str| -> Vec<u32> {
            let tensor = tensors.tensor(&format!("{prefix}{name}")).expect(name);
            tensor.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()) as u32).collect()
        };
        let logits = tensors.tensor(&format!("{prefix}logits")).expect("logits");
        let values: Vec<f32> =
            logits.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Golden {
            tokens: ids("tokens"),
            greedy: ids("greedy"),
            logits: values.chunks(logits.shape()[1]).map(<[f32]>::to_vec).collect(),
        }
    }
}

/// Where tests compute: on the CPU, or where `KVAHEAD_TEST_DEVICE` (cpu, cuda) says. `tests/gpu/run.sh` sets it.
pub fn device() -> Device {
    match std::env::var("KVAHEAD_TEST_DEVICE").as_deref() {
        Err(_) | Ok("cpu") => Device::Cpu,
        Ok("cuda") => Device::Cuda,
        Ok(other) => panic!("KVAHEAD_TEST_DEVICE={other}: known are cpu and cuda"),
    }
}

/// Loads `path` with weights in `dtype`.
pub fn load(path: &Path, dtype: Option<DType>) -> Model {
    Model::load(path, ModelOptions { device: device(), dtype, threads: 2, ..ModelOptions::default() })
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A session with keys and values in f32.
pub fn exact_session(model: &Model) -> Session {
    Session::new(model, &SessionOptions { kv_dtype: Some(DType::F32), ..SessionOptions::default() }).unwrap()
}

/// Largest difference over the largest absolute reference value.
pub fn relative_error(got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let difference = got.iter().zip(expected).fold(0.0f32, |m, (a, b)| {
        assert!(a.is_finite(), "a logit is {a}");
        m.max((a - b).abs())
    });
    difference / largest
}

/// The first index of the largest value.
pub fn argmax(logits: &[f32]) -> u32 {
    logits.iter().enumerate().fold(0, |best, (i, &x)| if x > logits[best] { i } else { best }) as u32
}
