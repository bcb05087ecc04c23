use std::path::Path;
use std::sync::Arc;

use super::{bytes, golden, load, options, values};
use crate::ErrorCode;
use crate::backend::DType;
use crate::engine::{Control, Model, ModelOptions, Session, SessionOptions};

/// Every architecture: products of the right shapes for every layer but the first, maps that keep every score.
#[test]
fn every_architecture_has_products() {
    for name in [
        "llama-mha",
        "llama3-rope",
        "llama-yarn-rope",
        "llama-mqa-tied",
        "smollm2",
        "mistral-window",
        "mistral-head-dim",
        "qwen2",
        "qwen3",
        "phi3",
        "phi3-longrope",
        "opt-pre-norm",
        "opt-post-norm",
    ] {
        let model = load(name, None);
        let (config, d) = (model.config(), model.config().head_dim);
        let speculation = model.calibrate(&mut |_| true).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(speculation.layers().len(), config.layers);
        assert!(speculation.layers()[0].is_none(), "{name}");
        for layer in 1..config.layers {
            let fitted = speculation.fitted(layer);
            let qkv = &model.decoder().blocks[layer].attention.qkv;
            assert_eq!((fitted.outputs, fitted.inputs), (config.heads * d, config.hidden), "{name}");
            assert_eq!((fitted.dtype, fitted.bias.is_some()), (qkv.dtype, qkv.bias.is_some()), "{name}");
            let skew = speculation.skew(layer);
            let whole = speculation.layer(layer).balanced();
            for head in 0..config.kv_heads {
                let skew = values(&model, skew.map(head));
                let (query, key) = (values(&model, whole.query.map(head)), values(&model, whole.key.map(head)));
                for a in 0..d {
                    for b in 0..d {
                        let one = if a == b { 1.0 } else { 0.0 };
                        let dot: f32 = (0..d).map(|i| skew[a * d + i] * skew[b * d + i]).sum();
                        assert!((dot - one).abs() < 1e-5, "{name}, layer {layer}: A is not orthogonal: {dot}");
                        let sum: f32 = (0..d).map(|i| query[i * d + a] * key[i * d + b]).sum();
                        assert!((sum - one).abs() < 1e-4, "{name}, layer {layer}: A_q A_k' is not 1: {sum}");
                    }
                }
                // What is cut out are the leading rows.
                let cut = speculation.balanced(d / 2).unwrap();
                let cut = cut[layer].as_ref().unwrap();
                assert_eq!(values(&model, cut.query.map(head)), query[..d / 2 * d], "{name}");
                assert_eq!(values(&model, cut.key.map(head)), key[..d / 2 * d], "{name}");
            }
        }
    }
}

/// The own weight is the query part of the layer's.
#[test]
fn own_weight_is_a_copy() {
    let model = load("qwen2", Some(DType::F32));
    let speculation = model.calibrate(&mut |_| true).unwrap();
    let attention = &model.decoder().blocks[1].attention;
    let own = speculation.own(1, attention).unwrap();
    let width = model.config().heads * model.config().head_dim;
    assert_eq!(values(&model, own.rows()), values(&model, attention.qkv.rows().row_range(0, width)));
    let bias = attention.qkv.bias.as_ref().unwrap();
    assert_eq!(values(&model, own.bias.as_ref().unwrap().row()), values(&model, bias.row().col_range(0, width)));
    assert!(std::ptr::eq(own, speculation.own(1, attention).unwrap()), "made once");
}

/// The same model and text give the same bits, whatever the number of threads.
#[test]
fn calibration_is_deterministic() {
    let fit = |threads| {
        let options = ModelOptions { threads, ..options(None, Path::new(""), &Arc::default()) };
        let model = Model::load(&golden("smollm2"), options).unwrap();
        bytes(&model, &model.calibrate(&mut |_| true).unwrap())
    };
    let first = fit(1);
    assert!(first == fit(1) && first == fit(2));
}

/// A model without a tokenizer is calibrated on random ids.
#[test]
fn random_model() {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("llama-mha").join(file), folder.path().join(file)).unwrap();
    }
    let model = Model::load(folder.path(), options(None, Path::new(""), &Arc::default())).unwrap();
    assert!(model.tokenizer().is_err());
    model.calibrate(&mut |_| true).unwrap();
}

/// Skewed weights give the logits of the unskewed ones.
#[test]
fn folded_opt_gives_the_same_logits() {
    for name in ["opt-pre-norm", "opt-post-norm"] {
        let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 5) % 60).collect();
        let logits = |model: &Model| {
            let exact = SessionOptions { kv_dtype: Some(DType::F32), ..SessionOptions::default() };
            let mut session = Session::new(model, &exact).unwrap();
            session.prefill(&tokens).unwrap();
            session.logits().unwrap().to_vec()
        };
        let mut model = load(name, Some(DType::F32));
        let plain = logits(&model);
        let before = values(&model, model.decoder().blocks[1].attention.qkv.rows());
        model.fold_skew().unwrap();
        let after = values(&model, model.decoder().blocks[1].attention.qkv.rows());
        let (d, hidden) = (model.config().head_dim, model.config().hidden);
        let moved = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(moved > 0.01, "{name}: nothing was folded");
        let values_from = 2 * model.config().heads * d * hidden;
        assert_eq!(before[values_from..], after[values_from..], "{name}: values must stay");
        let largest = plain.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        for (folded, plain) in logits(&model).iter().zip(&plain) {
            assert!((folded - plain).abs() < 1e-4 * largest, "{name}: {folded} for {plain}");
        }
    }
    let error = load("smollm2", None).fold_skew().unwrap_err();
    assert_eq!(error.code(), ErrorCode::Unsupported);
}

/// Cancelled at any layer, by callback or by a session's control, a model can still be calibrated.
#[test]
fn cancellation_leaves_nothing_behind() {
    let model = load("smollm2", None);
    for calls in 0..=model.config().layers {
        let mut left = calls;
        let result = model.calibrate(&mut |_| {
            left = left.wrapping_sub(1);
            left != usize::MAX
        });
        assert_eq!(result.err().unwrap().code(), ErrorCode::Cancelled, "after {calls} calls");
    }
    let control = Control::default();
    control.cancel();
    assert_eq!(model.speculation(&control).err().unwrap().code(), ErrorCode::Cancelled);
    // The request was consumed.
    let first = model.speculation(&control).unwrap();
    assert!(Arc::ptr_eq(&first, &model.calibrate(&mut |_| true).unwrap()), "made once");
    let fresh = load("smollm2", None);
    assert!(bytes(&model, &first) == bytes(&fresh, &fresh.calibrate(&mut |_| true).unwrap()));
}

/// One makes the products, others wait, and who waits can be cancelled.
#[test]
fn several_callers() {
    let model = load("smollm2", None);
    let (entered, wait) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| {
            let mut calls = 0;
            model.calibrate(&mut |_| {
                calls += 1;
                if calls == 2 {
                    entered.wait();
                    wait.wait();
                }
                true
            })
        });
        entered.wait();
        let error = model.calibrate(&mut |_| false).err().unwrap();
        assert_eq!(error.code(), ErrorCode::Cancelled);
        wait.wait();
        let second = model.calibrate(&mut |_| true).unwrap();
        assert!(Arc::ptr_eq(&first.join().unwrap().unwrap(), &second));
    });
}

#[test]
fn a_short_text_is_refused() {
    let options =
        ModelOptions { calibration_text: Some("Too short.".into()), ..options(None, Path::new(""), &Arc::default()) };
    let model = Model::load(&golden("smollm2"), options).unwrap();
    let error = model.calibrate(&mut |_| true).err().unwrap();
    assert_eq!(error.code(), ErrorCode::InvalidArgument);
    assert!(error.message().contains("2048"), "{error}");
}
