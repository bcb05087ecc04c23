//! GGUF files beyond the committed ones: Phi-3, Qwen3, rope scaling in metadata, other spellings.

mod common;

use std::path::{Path, PathBuf};

use common::gguf::{self, Value, small_llama};
use kvahead::backend::DType;
use kvahead::model::checkpoint::Checkpoint;
use kvahead::model::config::{Architecture, Config};
use kvahead::model::load;
use kvahead::model::rope::{Scaling, Yarn};
use kvahead::{ErrorCode, Result};
use safetensors::SafeTensors;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden").join(name)
}

fn open(file: &gguf::File) -> Result<Box<dyn Checkpoint>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, file.bytes()).unwrap();
    load::open(&path)
}

fn config(file: &gguf::File) -> Config {
    open(file).unwrap().config().clone()
}

/// The golden folder `name` as a GGUF file of architecture `architecture`, with its tensors in F32.
fn convert(name: &str, architecture: &str) -> (gguf::File, Config) {
    let path = golden(name);
    let config = load::open(&path).unwrap().config().clone();
    let mut file = gguf::File::new();
    let key = |key: &str| format!("{architecture}.{key}");
    let rope = config.rope.as_ref().unwrap();
    file.set("general.architecture", architecture)
        .set(&key("block_count"), config.layers as u32)
        .set(&key("embedding_length"), config.hidden as u32)
        .set(&key("feed_forward_length"), config.intermediate as u32)
        .set(&key("attention.head_count"), config.heads as u32)
        .set(&key("attention.head_count_kv"), config.kv_heads as u32)
        .set(&key("attention.key_length"), config.head_dim as u32)
        .set(&key("attention.value_length"), config.head_dim as u32)
        .set(&key("attention.layer_norm_rms_epsilon"), config.norm_epsilon)
        .set(&key("context_length"), config.context_length as u32)
        .set(&key("rope.freq_base"), rope.theta as f32)
        .set(&key("rope.dimension_count"), rope.dims as u32)
        .set("tokenizer.ggml.bos_token_id", config.bos.unwrap())
        .set("tokenizer.ggml.eos_token_id", config.eos[0]);
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let bytes = std::fs::read(path.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    for (name, tensor) in tensors.tensors() {
        let name = names.iter().fold(name, |name, (from, to)| name.replace(from, to));
        let values: Vec<f32> =
            tensor.data().as_chunks().0.iter().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32()).collect();
        file.tensor(&name, tensor.shape(), &values);
    }
    (file, config)
}

#[test]
fn qwen3() {
    let (file, expected) = convert("qwen3", "qwen3");
    let checkpoint = open(&file).unwrap();
    let expected = Config { stored: Some(DType::F32), ..expected };
    assert_eq!(*checkpoint.config(), expected);
    assert!(load::survey(&*checkpoint, None, true).unwrap().unused.is_empty());
}

#[test]
fn phi3_is_fused() {
    let (file, expected) = convert("phi3", "phi3");
    let checkpoint = open(&file).unwrap();
    assert_eq!(*checkpoint.config(), Config { stored: Some(DType::F32), ..expected });
    assert!(load::survey(&*checkpoint, None, true).unwrap().unused.is_empty());
}

#[test]
fn phi3_with_longrope() {
    let (mut file, expected) = convert("phi3-longrope", "phi3");
    let rope = expected.rope.clone().unwrap();
    let Scaling::LongRope { short, long, original, .. } = &rope.scaling else { panic!() };
    file.tensor("rope_factors_short.weight", &[8], short).tensor("rope_factors_long.weight", &[8], long);
    file.set("phi3.rope.scaling.original_context_length", *original as u32);
    let checkpoint = open(&file).unwrap();
    assert_eq!(checkpoint.config().rope, Some(rope.clone()));
    assert!(load::survey(&*checkpoint, None, true).unwrap().unused.is_empty());

    file.set("phi3.rope.scaling.attn_factor", 1.25);
    let Scaling::LongRope { attention, .. } = config(&file).rope.unwrap().scaling else { panic!() };
    assert_eq!(attention, 1.25);
    file.find("rope_factors_long.weight").dims[0] = 7;
    assert!(open(&file).err().unwrap().message().contains("expected F32 [8]"));
}

#[test]
fn rope_scaling_in_metadata() {
    let scaling = |file: &gguf::File| config(file).rope.unwrap().scaling;
    let mut file = small_llama();
    assert_eq!(scaling(&file), Scaling::None);
    file.set("llama.rope.scaling.type", "none");
    assert_eq!(scaling(&file), Scaling::None);
    file.set("llama.rope.scaling.type", "linear").set("llama.rope.scaling.factor", 4.0);
    assert_eq!(scaling(&file), Scaling::Linear { factor: 4.0 });
    file.set("llama.rope.scaling.type", "yarn").set("llama.rope.scaling.original_context_length", 32);
    let attention = 0.1 * 4f64.ln() + 1.0;
    let yarn = Yarn { factor: 4.0, original: 32.0, beta_fast: 32.0, beta_slow: 1.0, truncate: true, attention };
    assert_eq!(scaling(&file), Scaling::Yarn(yarn));
    file.set("llama.rope.scaling.type", "su");
    assert_eq!(open(&file).err().unwrap().code(), ErrorCode::Unsupported);
    let mut file = small_llama();
    file.set("llama.rope.scale_linear", 2.0);
    assert_eq!(scaling(&file), Scaling::Linear { factor: 2.0 });
}

#[test]
fn spellings() {
    let mut file = small_llama();
    assert_eq!(config(&file).architecture, Architecture::Llama);
    assert!(config(&file).tied, "there is no output.weight");
    file.set("llama.attention.head_count_kv", Value::U32s(vec![2, 2]));
    assert_eq!(config(&file).kv_heads, 2);
    file.set("llama.attention.head_count_kv", Value::U32s(vec![2, 1]));
    assert!(open(&file).err().unwrap().message().contains("differs from layer to layer"));
    file.set("llama.attention.head_count_kv", Value::I32(2)).set("llama.block_count", Value::U64(1));
    assert_eq!((config(&file).kv_heads, config(&file).layers), (2, 1));
    file.set("llama.attention.sliding_window", 0);
    assert_eq!(config(&file).windows, [None]);
    file.set("llama.attention.sliding_window", 16);
    assert_eq!(config(&file).windows, [Some(16)]);
    file.set("tokenizer.ggml.eot_token_id", 7);
    assert_eq!(config(&file).eos, [2, 7]);
    file.set("llama.expert_count", 8);
    assert_eq!(open(&file).err().unwrap().code(), ErrorCode::Unsupported);
    for name in ["gemma", "mistral", "opt"] {
        let mut file = small_llama();
        file.set("general.architecture", name);
        let error = open(&file).err().unwrap();
        assert_eq!(error.code(), ErrorCode::Unsupported);
        assert!(error.message().contains("known are llama, phi3, qwen2, qwen3"), "{error}");
    }
}

#[test]
fn larger_alignment() {
    let mut file = small_llama();
    file.alignment = 256;
    file.set("general.alignment", 256);
    load::survey(&*open(&file).unwrap(), None, true).unwrap();
}

#[test]
fn unused_tensors_are_listed() {
    let mut file = small_llama();
    file.tensor("blk.0.extra.weight", &[2], &[1.0, 2.0]);
    let checkpoint = open(&file).unwrap();
    assert_eq!(load::survey(&*checkpoint, None, true).unwrap().unused, ["blk.0.extra.weight"]);
}
