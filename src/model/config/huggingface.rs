//! `config.json` and `generation_config.json` of a Hugging Face folder.
//!
//! Two dialects are about: the classic one, with `rope_theta` and `rope_scaling` side by side, and that of
//! transformers 5, with both in `rope_parameters`. Keys that are absent have the defaults of transformers'
//! configuration classes.

use std::path::Path;

use serde_json::{Map, Value};

use super::{Architecture, Config, GenerationDefaults, Opt};
use crate::backend::{Activation, DType};
use crate::model::rope::{Rope, Scaling, Yarn, longrope_attention};
use crate::{Error, Result};

/// Reads the text of a `config.json`; `file` is named in errors.
pub fn from_json(text: &str, file: &Path) -> Result<Config> {
    let root = parse(text, file)?;
    let fields = Fields { map: &root, file };
    let architecture = architecture(&fields)?;
    if let Some(quantization) = fields.object("quantization_config")? {
        let method = quantization.string("quant_method")?.unwrap_or("unnamed");
        return Err(fields.unsupported(format!(
            "the weights are quantized ({method}); use the unquantized checkpoint, or a GGUF file"
        )));
    }
    let config = match architecture {
        Architecture::Opt => opt(&fields)?,
        other => llama_like(&fields, other)?,
    };
    config.validate(&file.display().to_string())
}

fn architecture(fields: &Fields<'_>) -> Result<Architecture> {
    let named = fields.strings("architectures")?;
    let found = match fields.string("model_type")? {
        Some(name) => name.to_string(),
        // Old checkpoints name only the class: LlamaForCausalLM.
        None => match named.first() {
            Some(class) => class.split("For").next().unwrap_or_default().to_lowercase(),
            None => return Err(fields.missing("model_type")),
        },
    };
    Architecture::from_name(&found).ok_or_else(|| {
        fields.unsupported(format!("the architecture {found:?} is not supported; known are {}", Architecture::list()))
    })
}

/// Everything but OPT: RMSNorm, rotary positions, gated MLP.
fn llama_like(fields: &Fields<'_>, architecture: Architecture) -> Result<Config> {
    let layers = fields.require_usize("num_hidden_layers")?;
    let hidden = fields.require_usize("hidden_size")?;
    let heads = fields.require_usize("num_attention_heads")?;
    let head_dim = match (fields.usize("head_dim")?, architecture) {
        (Some(head_dim), _) => head_dim,
        (None, Architecture::Qwen3) => 128,
        (None, _) => hidden.checked_div(heads).unwrap_or(0),
    };
    let attention_bias = fields.bool("attention_bias")?.unwrap_or(false);
    let context_length = fields.require_usize("max_position_embeddings")?;
    let activation = match fields.string("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Activation::SiluGated,
        "gelu_pytorch_tanh" | "gelu_new" | "gelu_fast" => Activation::GeluTanhGated,
        other => return Err(fields.unsupported(format!("hidden_act {other:?}; supported are silu and gelu_new"))),
    };
    Ok(Config {
        architecture,
        layers,
        hidden,
        heads,
        kv_heads: fields.usize("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        intermediate: fields.require_usize("intermediate_size")?,
        vocabulary: fields.require_usize("vocab_size")?,
        context_length,
        norm_epsilon: fields.f64("rms_norm_eps")?.unwrap_or(match architecture {
            Architecture::Phi3 => 1e-5,
            _ => 1e-6,
        }) as f32,
        activation,
        rope: Some(rope(fields, architecture, head_dim, context_length)?),
        tied: fields.bool("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: attention_bias || architecture == Architecture::Qwen2,
        output_bias: attention_bias && architecture != Architecture::Qwen2,
        mlp_bias: fields.bool("mlp_bias")?.unwrap_or(false),
        windows: windows(fields, architecture, layers)?,
        bos: fields.token("bos_token_id")?,
        eos: fields.tokens("eos_token_id")?,
        stored: stored(fields)?,
        opt: None,
    })
}

fn opt(fields: &Fields<'_>) -> Result<Config> {
    let layers = fields.require_usize("num_hidden_layers")?;
    let hidden = fields.require_usize("hidden_size")?;
    let heads = fields.require_usize("num_attention_heads")?;
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(fields.invalid("num_attention_heads", format!("{heads} heads do not divide {hidden}")));
    }
    let activation = match fields.string("activation_function")?.unwrap_or("relu") {
        "relu" => Activation::Relu,
        "gelu" => Activation::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Activation::GeluTanh,
        other => {
            let message = format!("activation_function {other:?}; supported are relu, gelu and gelu_new");
            return Err(fields.unsupported(message));
        }
    };
    let pre_norm = fields.bool("do_layer_norm_before")?.unwrap_or(true);
    let bias = fields.bool("enable_bias")?.unwrap_or(true);
    Ok(Config {
        architecture: Architecture::Opt,
        layers,
        hidden,
        heads,
        kv_heads: heads,
        head_dim: hidden / heads,
        intermediate: fields.require_usize("ffn_dim")?,
        vocabulary: fields.require_usize("vocab_size")?,
        context_length: fields.require_usize("max_position_embeddings")?,
        norm_epsilon: 1e-5,
        activation,
        rope: None,
        tied: fields.bool("tie_word_embeddings")?.unwrap_or(true),
        qkv_bias: bias,
        output_bias: bias,
        mlp_bias: bias,
        windows: no_windows(layers),
        bos: fields.token("bos_token_id")?,
        eos: fields.tokens("eos_token_id")?,
        stored: stored(fields)?,
        opt: Some(Opt {
            pre_norm,
            embedding: fields.usize("word_embed_proj_dim")?.unwrap_or(hidden),
            affine: fields.bool("layer_norm_elementwise_affine")?.unwrap_or(true),
            final_norm: pre_norm && !fields.bool("_remove_final_layer_norm")?.unwrap_or(false),
        }),
    })
}

/// One window a layer; none for layers that [`Config::validate`] is going to refuse.
fn no_windows(layers: usize) -> Vec<Option<usize>> {
    vec![None; layers.min(super::LIMITS.layers)]
}

fn windows(fields: &Fields<'_>, architecture: Architecture, layers: usize) -> Result<Vec<Option<usize>>> {
    let mut windows = no_windows(layers);
    let window = fields.usize("sliding_window")?;
    match architecture {
        Architecture::Mistral | Architecture::Phi3 => windows.fill(window),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            if !fields.bool("use_sliding_window")?.unwrap_or(false) {
                return Ok(windows);
            }
            let types = fields.strings("layer_types")?;
            if types.is_empty() {
                let first = fields.usize("max_window_layers")?.unwrap_or(28);
                windows.iter_mut().skip(first).for_each(|own| *own = window);
                return Ok(windows);
            }
            if types.len() != layers {
                let message = format!("names {} layers; the model has {layers}", types.len());
                return Err(fields.invalid("layer_types", message));
            }
            for (own, kind) in windows.iter_mut().zip(types) {
                *own = match kind {
                    "full_attention" => None,
                    "sliding_attention" => window,
                    other => return Err(fields.unsupported(format!("the layer type {other:?}"))),
                };
            }
        }
        Architecture::Llama | Architecture::Opt => {}
    }
    Ok(windows)
}

/// The element type that the weights are said to have.
fn stored(fields: &Fields<'_>) -> Result<Option<DType>> {
    let name = match fields.string("dtype")? {
        Some(name) => Some(name),
        None => fields.string("torch_dtype")?,
    };
    Ok(match name {
        Some("float32") => Some(DType::F32),
        Some("float16") => Some(DType::F16),
        Some("bfloat16") => Some(DType::BF16),
        _ => None,
    })
}

fn rope(fields: &Fields<'_>, architecture: Architecture, head_dim: usize, context_length: usize) -> Result<Rope> {
    // Later keys win: what stands in the rope object goes before what stands beside it.
    let own = match fields.object("rope_scaling")? {
        Some(own) => Some(own),
        None => fields.object("rope_parameters")?,
    };
    if let Some(own) = &own
        && let Some((layer_type, _)) = own.map.iter().find(|(_, value)| value.is_object())
    {
        return Err(fields.unsupported(format!("rope parameters by layer type ({layer_type:?})")));
    }
    let f64_of = |key: &str| match own.as_ref().map(|own| own.f64(key)).transpose()?.flatten() {
        Some(value) => Ok(Some(value)),
        None => fields.f64(key),
    };
    let theta = f64_of("rope_theta")?.unwrap_or(10_000.0);
    let partial = f64_of("partial_rotary_factor")?.unwrap_or(1.0);
    if architecture != Architecture::Phi3 && partial != 1.0 {
        return Err(fields.unsupported(format!("partial_rotary_factor {partial} in a model of type {architecture}")));
    }
    if !(0.0..=1.0).contains(&partial) {
        return Err(fields.invalid("partial_rotary_factor", format!("expected 0 to 1, found {partial}")));
    }
    let dims = (head_dim as f64 * partial) as usize;
    let scaling = match &own {
        Some(own) => scaling(fields, own, architecture, context_length)?,
        None => Scaling::None,
    };
    Ok(Rope { theta, dims, scaling })
}

fn scaling(fields: &Fields<'_>, own: &Fields<'_>, architecture: Architecture, context: usize) -> Result<Scaling> {
    let kind = match own.string("rope_type")? {
        Some(kind) => kind,
        None => own.string("type")?.unwrap_or("default"),
    };
    // Early Phi-3 checkpoints call LongRoPE by other names.
    let kind = if architecture == Architecture::Phi3 && matches!(kind, "su" | "yarn") { "longrope" } else { kind };
    let original = || -> Result<usize> {
        Ok(match fields.usize("original_max_position_embeddings")? {
            Some(original) => original,
            None => own.usize("original_max_position_embeddings")?.unwrap_or(context),
        })
    };
    match kind {
        "default" => Ok(Scaling::None),
        "linear" => Ok(Scaling::Linear { factor: own.require_f64("factor")? }),
        "llama3" => Ok(Scaling::Llama3 {
            factor: own.require_f64("factor")?,
            low: own.require_f64("low_freq_factor")?,
            high: own.require_f64("high_freq_factor")?,
            original: original()? as f64,
        }),
        "yarn" => {
            let original = original()? as f64;
            let factor = own.f64("factor")?.unwrap_or(context as f64 / original);
            let recommended = match (own.f64("mscale")?, own.f64("mscale_all_dim")?) {
                (Some(scale), Some(all)) if scale != 0.0 && all != 0.0 => {
                    Yarn::recommended_attention(factor, scale) / Yarn::recommended_attention(factor, all)
                }
                _ => Yarn::recommended_attention(factor, 1.0),
            };
            let or = |value: Option<f64>, default| value.filter(|&value| value != 0.0).unwrap_or(default);
            Ok(Scaling::Yarn(Yarn {
                factor,
                original,
                beta_fast: or(own.f64("beta_fast")?, 32.0),
                beta_slow: or(own.f64("beta_slow")?, 1.0),
                truncate: own.bool("truncate")?.unwrap_or(true),
                attention: own.f64("attention_factor")?.unwrap_or(recommended),
            }))
        }
        "longrope" => {
            let original = original()?;
            let factor = own.f64("factor")?.unwrap_or(context as f64 / original as f64);
            let attention = own.f64("attention_factor")?.unwrap_or(longrope_attention(factor, original as f64));
            let list = |key| own.numbers(key)?.ok_or_else(|| own.missing(key));
            Ok(Scaling::LongRope { short: list("short_factor")?, long: list("long_factor")?, original, attention })
        }
        other => Err(fields.unsupported(format!(
            "rope scaling of type {other:?}; supported are default, linear, llama3, yarn and longrope"
        ))),
    }
}

/// Reads the text of a `generation_config.json`; `file` is named in errors.
pub fn generation_from_json(text: &str, file: &Path, config: &Config) -> Result<GenerationDefaults> {
    let root = parse(text, file)?;
    let fields = Fields { map: &root, file };
    let number = |key: &str| match fields.f64(key)? {
        Some(value) if !value.is_finite() || value < 0.0 => {
            Err(fields.invalid(key, format!("expected a number of at least 0, found {value}")))
        }
        value => Ok(value.map(|value| value as f32)),
    };
    let mut eos = fields.tokens("eos_token_id")?;
    if let Some(token) = eos.iter().find(|&&token| token as usize >= config.vocabulary) {
        let message = format!("{token} is not below the vocabulary size, {}", config.vocabulary);
        return Err(fields.invalid("eos_token_id", message));
    }
    if eos.is_empty() {
        eos.clone_from(&config.eos);
    }
    Ok(GenerationDefaults {
        do_sample: fields.bool("do_sample")?.unwrap_or(false),
        temperature: number("temperature")?,
        top_p: number("top_p")?,
        top_k: fields.token("top_k")?,
        min_p: number("min_p")?,
        repetition_penalty: number("repetition_penalty")?,
        eos,
    })
}

fn parse(text: &str, file: &Path) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::invalid_format(file, "expected a JSON object")),
        Err(error) => Err(Error::invalid_format(file, format!("not valid JSON: {error}"))),
    }
}

/// Typed access to a JSON object. An absent key and `null` are the same.
struct Fields<'a> {
    map: &'a Map<String, Value>,
    file: &'a Path,
}

impl<'a> Fields<'a> {
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn typed<T>(&self, key: &str, expected: &str, convert: impl Fn(&'a Value) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(converted) => Ok(Some(converted)),
            None => {
                let mut found = value.to_string();
                if let Some((end, _)) = found.char_indices().nth(60) {
                    found.truncate(end);
                    found.push('…');
                }
                Err(self.invalid(key, format!("expected {expected}, found {found}")))
            }
        }
    }

    fn usize(&self, key: &str) -> Result<Option<usize>> {
        // Some writers have 2048.0 where they mean 2048.
        let whole = |value: &Value| match value.as_u64() {
            Some(whole) => usize::try_from(whole).ok(),
            None => value.as_f64().filter(|v| v.fract() == 0.0 && (0.0..=1e15).contains(v)).map(|v| v as usize),
        };
        self.typed(key, "a non-negative integer", whole)
    }

    fn require_usize(&self, key: &str) -> Result<usize> {
        self.usize(key)?.ok_or_else(|| self.missing(key))
    }

    fn f64(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn require_f64(&self, key: &str) -> Result<f64> {
        self.f64(key)?.ok_or_else(|| self.missing(key))
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>> {
        self.typed(key, "a string", Value::as_str)
    }

    /// A list of strings, empty where the key is absent.
    fn strings(&self, key: &str) -> Result<Vec<&'a str>> {
        let list = |value: &'a Value| value.as_array()?.iter().map(Value::as_str).collect();
        Ok(self.typed(key, "a list of strings", list)?.unwrap_or_default())
    }

    fn numbers(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let list = |value: &Value| value.as_array()?.iter().map(|v| v.as_f64().map(|v| v as f32)).collect();
        self.typed(key, "a list of numbers", list)
    }

    fn token(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "an integer from 0 to 2^32 - 1", |value| value.as_u64()?.try_into().ok())
    }

    /// A token or a list of them.
    fn tokens(&self, key: &str) -> Result<Vec<u32>> {
        let list = |value: &Value| match value {
            Value::Array(values) => values.iter().map(|v| v.as_u64()?.try_into().ok()).collect::<Option<Vec<u32>>>(),
            value => Some(vec![value.as_u64()?.try_into().ok()?]),
        };
        Ok(self.typed(key, "a token id or a list of them", list)?.unwrap_or_default())
    }

    fn object(&self, key: &str) -> Result<Option<Fields<'a>>> {
        let map = self.typed(key, "an object", Value::as_object)?;
        Ok(map.map(|map| Fields { map, file: self.file }))
    }

    fn missing(&self, key: &str) -> Error {
        Error::invalid_format(self.file, format!("the key {key:?} is missing"))
    }

    fn invalid(&self, key: &str, message: impl std::fmt::Display) -> Error {
        Error::invalid_format(self.file, format!("{key:?}: {message}"))
    }

    fn unsupported(&self, message: impl std::fmt::Display) -> Error {
        Error::unsupported(format!("{}: {message}", self.file.display()))
    }
}
