//! Configurations in both dialects, and what is refused.

use std::path::Path;

use serde_json::{Value, json};

use super::data;
use crate::backend::{Activation, DType};
use crate::model::config::{self, Architecture, Config, SHAPES};
use crate::model::rope::Scaling;
use crate::{Error, ErrorCode};

fn golden(name: &str, file: &str) -> Config {
    let path = data(&format!("golden/{name}/{file}"));
    config::from_json(&std::fs::read_to_string(&path).unwrap(), &path).unwrap()
}

#[test]
fn both_dialects_say_the_same() {
    let mut count = 0;
    for entry in std::fs::read_dir(data("golden")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert_eq!(golden(&name, "config.json"), golden(&name, "config.classic.json"), "{name}");
        count += 1;
    }
    assert!(count >= 15, "{count}");
}

#[test]
fn golden_configurations() {
    let config = golden("mistral-window", "config.json");
    assert_eq!(config.architecture, Architecture::Mistral);
    assert_eq!(config.windows, [Some(32), Some(32)]);
    assert_eq!(config.stored, Some(DType::BF16));

    let config = golden("mistral-head-dim", "config.json");
    assert_eq!((config.head_dim, config.hidden / config.heads), (32, 16));
    assert_eq!(config.windows, [None, None]);

    let config = golden("qwen2", "config.classic.json");
    assert!(config.qkv_bias && !config.output_bias);
    assert_eq!(config.windows, [None, None], "use_sliding_window is false");

    let config = golden("opt-post-norm", "config.json");
    let opt = config.opt.as_ref().unwrap();
    assert!(!opt.pre_norm && !opt.final_norm && opt.affine && config.tied);
    assert_eq!((opt.embedding, config.hidden, config.activation), (32, 64, Activation::Relu));

    let config = golden("llama3-rope", "config.json");
    assert!(matches!(config.rope.unwrap().scaling, Scaling::Llama3 { original: 64.0, .. }));
    let config = golden("phi3-longrope", "config.classic.json");
    assert!(matches!(config.rope.unwrap().scaling, Scaling::LongRope { original: 64, .. }));
}

/// A Llama configuration with `changes` made to it.
fn changed(changes: Value) -> crate::Result<Config> {
    let mut config = json!({
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 96, "vocab_size": 192, "max_position_embeddings": 256, "rope_theta": 10000.0,
    });
    let map = config.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        map.insert(key.clone(), value.clone());
    }
    config::from_json(&config.to_string(), Path::new("dir/config.json"))
}

#[test]
fn defaults() {
    let config = changed(json!({ "eos_token_id": [2, 7] })).unwrap();
    assert_eq!((config.kv_heads, config.head_dim, config.norm_epsilon), (4, 16, 1e-6));
    assert_eq!((config.eos, config.bos, config.tied), (vec![2, 7], None, false));
    let config = changed(json!({ "model_type": "qwen3" })).unwrap();
    assert_eq!(config.head_dim, 128);
    let class = changed(json!({ "model_type": null, "architectures": ["LlamaForCausalLM"] })).unwrap();
    assert_eq!(class.architecture, Architecture::Llama);
}

#[test]
fn windows_by_layer() {
    let windows = |changes: Value| {
        let mut all = json!({ "model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": true,
                              "sliding_window": 16, "max_window_layers": 3 });
        all.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        changed(all).map(|config| config.windows)
    };
    assert_eq!(windows(json!({})).unwrap(), [None, None, None, Some(16)]);
    let types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"];
    assert_eq!(windows(json!({ "layer_types": types })).unwrap(), [Some(16), None, Some(16), None]);
    assert_eq!(windows(json!({ "layer_types": ["full_attention"] })).unwrap_err().code(), ErrorCode::InvalidFormat);
    assert_eq!(windows(json!({ "sliding_window": 0 })).unwrap_err().code(), ErrorCode::InvalidFormat);
}

#[test]
fn unsupported_things_are_named() {
    let refused = |changes: Value, expected: &str| {
        let error: Error = changed(changes).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unsupported, "{error}");
        assert!(error.message().starts_with("dir/config.json: ") && error.message().contains(expected), "{error}");
    };
    refused(json!({ "model_type": "mixtral" }), "known are llama, mistral, qwen2, qwen3, phi3, opt");
    refused(json!({ "quantization_config": { "quant_method": "awq" } }), "awq");
    refused(json!({ "hidden_act": "relu2" }), "relu2");
    refused(json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }), "dynamic");
    refused(json!({ "rope_parameters": { "full_attention": { "rope_theta": 1.0 } } }), "full_attention");
    refused(json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor");
    refused(
        json!({ "model_type": "qwen2", "use_sliding_window": true, "layer_types": ["chunked_attention", "x"] }),
        "chunked_attention",
    );
}

#[test]
fn absurd_values_are_refused() {
    let refused = |changes: Value, expected: &str| {
        let error = changed(changes.clone()).expect_err(&changes.to_string());
        assert_eq!(error.code(), ErrorCode::InvalidFormat, "{error}");
        assert!(error.message().starts_with("dir/config.json: ") && error.message().contains(expected), "{error}");
    };
    let huge = u64::MAX;
    let dimensions = [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ];
    for key in dimensions {
        refused(json!({ key: 0 }), "0");
        refused(json!({ key: huge }), &huge.to_string());
        refused(json!({ key: huge / 2 + 1 }), "");
        refused(json!({ key: -1 }), key);
        refused(json!({ key: 1.5 }), key);
        refused(json!({ key: "many" }), key);
        refused(json!({ key: [64] }), key);
    }
    refused(json!({ "num_key_value_heads": 3 }), "multiple");
    refused(json!({ "head_dim": 15 }), "15");
    refused(json!({ "rms_norm_eps": -1.0 }), "epsilon");
    refused(json!({ "rms_norm_eps": 1e300 }), "epsilon");
    refused(json!({ "rope_theta": 0 }), "theta");
    refused(json!({ "eos_token_id": 192 }), "192");
    refused(json!({ "eos_token_id": "</s>" }), "eos_token_id");
    refused(json!({ "hidden_size": null }), "missing");
    refused(json!({ "rope_scaling": { "type": "linear" } }), "factor");
    refused(json!({ "rope_scaling": { "type": "linear", "factor": 0.0 } }), "factor");
    refused(
        json!({ "rope_scaling": { "type": "longrope", "short_factor": [1.0], "long_factor": [1.0] } }),
        "expected 8",
    );
    let error = config::from_json("{", Path::new("dir/config.json")).unwrap_err();
    assert!(error.message().starts_with("dir/config.json: not valid JSON"), "{error}");
    assert!(config::from_json("[]", Path::new("x")).is_err());
}

#[test]
fn generation_defaults() {
    let config = changed(json!({ "eos_token_id": 5 })).unwrap();
    let read = |value: Value| config::generation_from_json(&value.to_string(), Path::new("g.json"), &config);
    let defaults = read(json!({ "do_sample": true, "temperature": 0.6, "top_p": 0.9, "top_k": 20,
                                "repetition_penalty": 1.1, "eos_token_id": [1, 2] }))
    .unwrap();
    assert!(defaults.do_sample);
    assert_eq!((defaults.temperature, defaults.top_p, defaults.top_k), (Some(0.6), Some(0.9), Some(20)));
    assert_eq!((defaults.repetition_penalty, defaults.eos), (Some(1.1), vec![1, 2]));
    assert_eq!(read(json!({})).unwrap().eos, [5], "the configuration's, where this file names none");
    for bad in [json!({ "temperature": -1 }), json!({ "top_k": 1.5 }), json!({ "eos_token_id": [192] })] {
        assert_eq!(read(bad).unwrap_err().code(), ErrorCode::InvalidFormat);
    }
}

#[test]
fn shapes() {
    for name in SHAPES {
        Config::shape(name).unwrap();
    }
    let error = Config::shape("gpt-5").unwrap_err();
    assert_eq!(error.code(), ErrorCode::InvalidArgument);
    assert!(error.message().contains("opt-6.7b, opt-13b"), "{error}");
}
