//! Every operation of the CUDA backend against the CPU backend, on fresh random inputs of odd sizes, outputs poisoned.
//!
//! On a machine without a CUDA driver each test says that it was skipped, and what is asserted is that the backend says
//! why. `tests/gpu/run.sh` runs them where there is one, `tests/emulator/run.sh` where there is none, with
//! `KVAHEAD_TEST_DEVICE=cuda`, and then a skip is a failure.

mod attention;
#[path = "../common/brief.rs"]
mod brief;
mod index;
mod mass;
mod matrix;
mod payload;
mod rank;
mod rig;
mod rowwise;
mod slots;
mod streams;
mod tail;

use kvahead::ErrorCode;
use kvahead::backend::cuda::CudaBackend;
use kvahead::engine::{Device, Model, ModelOptions};

#[test]
fn without_a_device_there_is_a_clear_error() {
    let Err(error) = CudaBackend::new(0) else {
        assert_eq!(CudaBackend::new(1000).err().map(|error| error.code()), Some(ErrorCode::Device));
        return;
    };
    assert_eq!(error.code(), ErrorCode::Device);
    assert!(error.message().contains("CUDA"), "{error}");
    let options = ModelOptions { device: Device::Cuda, ..ModelOptions::default() };
    let error = Model::random("smollm2-135m", 1, options).err().expect("there is no device");
    assert_eq!(error.code(), ErrorCode::Device);
}

#[test]
fn auto_takes_the_cpu_where_there_is_no_device_and_says_so() {
    use kvahead::engine::{LogLevel, Logger};
    use std::sync::{Arc, Mutex};
    let lines: Arc<Mutex<Vec<String>>> = Arc::default();
    let sink = lines.clone();
    let logger =
        Logger { level: LogLevel::Info, sink: Box::new(move |_, line| sink.lock().unwrap().push(line.to_owned())) };
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/llama-mha");
    if !path.exists() {
        return; // Taken elsewhere without its data; the golden tests run there.
    }
    let model = Model::load(&path, ModelOptions { logger: Some(logger), ..ModelOptions::default() }).unwrap();
    let cuda = CudaBackend::new(0).is_ok();
    assert_eq!(model.backend().description().starts_with("CUDA"), cuda);
    let said = lines.lock().unwrap().iter().any(|line| line.contains("device auto: computing on the CPU"));
    assert_eq!(said, !cuda);
}

#[test]
fn what_the_device_lacks_is_refused_when_the_session_is_made() {
    use kvahead::engine::{Session, SessionOptions};
    use kvahead::kv::{FileOptions, KvTier};
    use kvahead::policy::PolicyOptions;
    rig::with_both(|_, _| {
        let root = std::env::var_os("KVAHEAD_TEST_ROOT").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
        let path = std::path::Path::new(&root).join("tests/data/golden/llama-mha");
        let model = Model::load(&path, ModelOptions { device: Device::Cuda, ..ModelOptions::default() }).unwrap();
        let with = |tier| {
            let policy = PolicyOptions { tier, ..PolicyOptions::default() };
            Session::new(&model, &SessionOptions { policy, ..SessionOptions::default() })
        };
        let error = with(KvTier::File(FileOptions::default())).err().expect("no files");
        assert_eq!(error.code(), ErrorCode::Unsupported);
        assert!(error.message().contains("tier file") && error.message().contains("device=cpu"), "{error}");
        with(KvTier::Host).unwrap();
    });
}
