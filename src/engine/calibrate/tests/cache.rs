use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use super::{bytes, golden, options};
use crate::backend::DType;
use crate::engine::{Model, ModelOptions};

struct Run {
    bytes: Vec<u8>,
    log: Vec<String>,
    /// Calls of the progress callback: one for each layer of a calibration, and one before it.
    calls: usize,
}

fn run(name: &str, dtype: Option<DType>, cache: &Path) -> Run {
    let log = Arc::new(Mutex::new(Vec::new()));
    run_with(name, options(dtype, cache, &log), &log)
}

fn run_with(name: &str, options: ModelOptions, log: &Mutex<Vec<String>>) -> Run {
    let model = Model::load(&golden(name), options).unwrap();
    log.lock().clear();
    let mut calls = 0;
    let speculation = model.calibrate(&mut |_| {
        calls += 1;
        true
    });
    let bytes = bytes(&model, &speculation.unwrap());
    Run { bytes, log: std::mem::take(&mut log.lock()), calls }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

#[test]
fn a_second_load_is_warm_and_the_same() {
    for name in ["smollm2", "qwen2", "qwen3", "opt-post-norm"] {
        let folder = tempfile::tempdir().unwrap();
        let cold = run(name, None, &folder.path().join("made/when/needed"));
        let warm = run(name, None, &folder.path().join("made/when/needed"));
        assert!(cold.calls > 1 && warm.calls == 1, "{name}: {} calls, then {}", cold.calls, warm.calls);
        assert!(cold.bytes == warm.bytes, "{name}");
        assert!(cold.log.last().unwrap().starts_with("wrote "), "{:?}", cold.log);
        assert_eq!(files(&folder.path().join("made/when/needed")).len(), 1, "no temporary file stays");
    }
}

/// What the products depend on, the key depends on.
#[test]
fn other_products_have_other_files() {
    let folder = tempfile::tempdir().unwrap();
    let count = || files(folder.path()).len();
    run("smollm2", None, folder.path());
    run("smollm2", Some(DType::F32), folder.path());
    assert_eq!(count(), 2, "another type");
    let log = Arc::default();
    let text = crate::speculate::CALIBRATION_TEXT.to_uppercase();
    let other = ModelOptions { calibration_text: Some(text), ..options(None, folder.path(), &log) };
    run_with("smollm2", other, &log);
    assert_eq!(count(), 3, "another text");
    run("llama-mha", None, folder.path());
    assert_eq!(count(), 4, "another model");

    // The same shape and configuration, one weight changed.
    let changed = tempfile::tempdir().unwrap();
    for file in files(&golden("smollm2")) {
        std::fs::copy(&file, changed.path().join(file.file_name().unwrap())).unwrap();
    }
    let weights = changed.path().join("model.safetensors");
    let mut content = std::fs::read(&weights).unwrap();
    let last = content.len() - 1;
    content[last] ^= 0x80;
    std::fs::write(&weights, content).unwrap();
    let model = Model::load(changed.path(), options(None, folder.path(), &log)).unwrap();
    model.calibrate(&mut |_| true).unwrap();
    assert_eq!(count(), 5, "another sign of one weight");
}

/// Damaged anywhere, a file is rebuilt; it is never trusted, and never in the way.
#[test]
fn a_damaged_file_is_rebuilt() {
    let folder = tempfile::tempdir().unwrap();
    let cold = run("qwen2", None, folder.path());
    let path = files(folder.path()).remove(0);
    let good = std::fs::read(&path).unwrap();
    let mut damaged: Vec<(String, Vec<u8>)> = Vec::new();
    // Magic, version, key, shape, padding, weights, maps, checksum; and the last layer as well as the first.
    let end = good.len();
    for at in [0, 8, 12, 27, 28, 40, 52, 60, 64, 200, end / 2, end / 2 + 1, end - 100, end - 8, end - 1] {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        damaged.push((format!("byte {at} changed"), bytes));
    }
    for length in [0, 1, 8, 63, 64, 65, end / 2, end - 8, end - 1] {
        damaged.push((format!("cut to {length}"), good[..length].to_vec()));
    }
    damaged.push(("longer".into(), [&good[..], &[0]].concat()));
    damaged.push(("all ones".into(), vec![0xff; end]));
    // The blocks of two layers in each other's place: every checksum would be right, were it not for the layer.
    let block = (end - 64) / 2;
    if (end - 64).is_multiple_of(2) {
        let swapped = [&good[..64], &good[64 + block..], &good[64..64 + block]].concat();
        damaged.push(("layers exchanged".into(), swapped));
    }
    for (what, bytes) in damaged {
        if bytes == good {
            continue;
        }
        std::fs::write(&path, &bytes).unwrap();
        let rebuilt = run("qwen2", None, folder.path());
        assert!(rebuilt.calls > 1, "{what}: was trusted");
        assert!(rebuilt.log[0].contains("not used"), "{what}: {:?}", rebuilt.log);
        assert!(rebuilt.bytes == cold.bytes, "{what}");
        assert!(std::fs::read(&path).unwrap() == good, "{what}: was not replaced");
        assert_eq!(files(folder.path()).len(), 1, "{what}");
    }
}

/// What lies in the file's place and is no file.
#[test]
fn strange_files() {
    let folder = tempfile::tempdir().unwrap();
    let cold = run("qwen2", None, folder.path());
    let path = files(folder.path()).remove(0);

    std::fs::remove_file(&path).unwrap();
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: `name` is a C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let run_again = run("qwen2", None, folder.path());
    assert!(run_again.calls > 1 && run_again.bytes == cold.bytes);
    assert!(path.is_file(), "the FIFO was replaced");

    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let run_again = run("qwen2", None, folder.path());
    assert!(run_again.calls > 1 && run_again.bytes == cold.bytes);
    assert!(run_again.log.last().unwrap().contains("not cached"), "{:?}", run_again.log);
    assert_eq!(files(folder.path()).len(), 1, "no temporary file stays");

    // A loop of links.
    std::fs::remove_dir(&path).unwrap();
    std::os::unix::fs::symlink(&path, &path).unwrap();
    assert!(run("qwen2", None, folder.path()).bytes == cold.bytes);
}

/// A folder that cannot be is a warning.
#[test]
fn an_unwritable_folder_is_a_warning() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "in the way").unwrap();
    let run = run("qwen2", None, &file.join("below"));
    assert!(run.calls > 1);
    assert!(run.log.last().unwrap().contains("not cached"), "{:?}", run.log);
    assert_eq!(std::fs::read(&file).unwrap(), b"in the way");
}
