//! Calibration of whole models: tiny ones of every architecture, and the real one for how well it predicts.

mod cache;
mod products;
mod quality;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::backend::{Buffer, DType, Rows};
use crate::engine::{LogLevel, Logger, Model, ModelOptions};
use crate::speculate::Speculation;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(name)
}

/// The options of a model that logs into `lines` and caches in `cache` (nowhere, when it is empty).
fn options(dtype: Option<DType>, cache: &Path, lines: &Arc<Mutex<Vec<String>>>) -> ModelOptions {
    let lines = lines.clone();
    ModelOptions {
        dtype,
        threads: 2,
        speculation_cache: Some(cache.to_path_buf()),
        logger: Some(Logger {
            level: LogLevel::Info,
            sink: Box::new(move |_, line| lines.lock().push(line.to_string())),
        }),
        ..ModelOptions::default()
    }
}

/// A tiny checkpoint without a cache.
fn load(name: &str, dtype: Option<DType>) -> Model {
    Model::load(&golden(name), options(dtype, Path::new(""), &Arc::default())).unwrap()
}

/// The elements of f32 rows.
fn values(model: &Model, rows: Rows<'_>) -> Vec<f32> {
    assert_eq!(rows.dtype(), DType::F32);
    let mut bytes = vec![0; 4 * rows.rows() * rows.cols()];
    model.backend().download(&model.backend().stream().unwrap(), rows, &mut bytes).unwrap();
    bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

/// Every byte of the products, to compare.
fn bytes(model: &Model, speculation: &Speculation) -> Vec<u8> {
    let stream = model.backend().stream().unwrap();
    let mut all = Vec::new();
    let mut add = |buffer: &Buffer| {
        let mut bytes = vec![0; buffer.bytes()];
        let rows = buffer.rows(DType::F16, 1, buffer.bytes() / 2);
        model.backend().download(&stream, rows, &mut bytes).unwrap();
        all.extend(bytes);
    };
    for layer in speculation.layers().iter().flatten() {
        add(&layer.fitted().data);
        layer.fitted().bias.iter().for_each(|bias| add(&bias.data));
        let maps = [layer.skew(), &layer.balanced().query, &layer.balanced().key];
        maps.iter().for_each(|maps| add(&maps.data));
    }
    all
}
