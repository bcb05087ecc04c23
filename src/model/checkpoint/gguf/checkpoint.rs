//! A GGUF file as a [`Checkpoint`]: its tensors under Hugging Face names.

use std::os::unix::fs::FileExt;
use std::path::Path;

use super::{Gguf, Metadata};
use crate::model::checkpoint::{Checkpoint, RowOrder, TensorRef, missing_tensor};
use crate::model::config::{self, Architecture, Config, GenerationDefaults};
use crate::{Error, Result};

/// A model in one GGUF file.
#[derive(Debug)]
pub struct GgufCheckpoint {
    gguf: Gguf,
    config: Config,
}

impl GgufCheckpoint {
    /// Opens `path` and reads its configuration.
    pub fn open(path: &Path) -> Result<GgufCheckpoint> {
        let gguf = Gguf::open(path)?;
        let read = |name: &str, entry: &super::Entry| {
            let mut bytes = vec![0; entry.bytes as usize];
            gguf.file()
                .read_exact_at(&mut bytes, entry.offset)
                .map_err(|error| Error::io(path, &format!("read tensor {name:?}"), &error))?;
            Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
        };
        let config = config::from_gguf(gguf.metadata(), gguf.entries(), &read)?;
        Ok(GgufCheckpoint { gguf, config })
    }
}

impl Checkpoint for GgufCheckpoint {
    fn path(&self) -> &Path {
        self.gguf.path()
    }

    fn config(&self) -> &Config {
        &self.config
    }

    fn generation_defaults(&self) -> GenerationDefaults {
        config::generation_from_gguf(&self.config)
    }

    fn tensor(&self, name: &str) -> Option<TensorRef<'_>> {
        let stored = stored_name(name)?;
        let (name, entry) = self.gguf.entries().get_key_value(&stored)?;
        let rotated = stored.ends_with(".attn_q.weight")
            || stored.ends_with(".attn_k.weight")
            || stored.ends_with(".attn_q.bias")
            || stored.ends_with(".attn_k.bias");
        Some(TensorRef {
            file: self.gguf.path(),
            name,
            shape: &entry.shape,
            stored: &entry.stored,
            // The converter of llama-type models brings q and k into the order that llama.cpp rotates in.
            order: if rotated && self.config.architecture == Architecture::Llama {
                RowOrder::Pairs
            } else {
                RowOrder::Halves
            },
            source: self.gguf.file(),
            mapping: None,
            offset: entry.offset,
            bytes: entry.bytes,
        })
    }

    fn stored_names(&self) -> Vec<&str> {
        self.gguf.entries().keys().map(String::as_str).collect()
    }

    fn metadata(&self) -> Option<&Metadata> {
        Some(self.gguf.metadata())
    }

    fn missing(&self, name: &str) -> Error {
        missing_tensor(self.gguf.path(), stored_name(name).as_deref().unwrap_or(name))
    }
}

/// The name that GGUF has for a tensor that Hugging Face calls `name`.
fn stored_name(name: &str) -> Option<String> {
    let Some(rest) = name.strip_prefix("model.layers.") else {
        return Some(
            match name {
                "model.embed_tokens.weight" => "token_embd.weight",
                "model.norm.weight" => "output_norm.weight",
                "lm_head.weight" => "output.weight",
                _ => return None,
            }
            .to_string(),
        );
    };
    let (layer, rest) = rest.split_once('.')?;
    let (part, suffix) = rest.rsplit_once('.')?;
    let part = match part {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        // Phi-3's fused projection keeps the name of its second half.
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.{suffix}"))
}

#[cfg(test)]
mod tests {
    use super::stored_name;

    #[test]
    fn names() {
        let name = |name| stored_name(name).unwrap();
        assert_eq!(name("model.embed_tokens.weight"), "token_embd.weight");
        assert_eq!(name("model.layers.12.self_attn.q_proj.bias"), "blk.12.attn_q.bias");
        assert_eq!(name("model.layers.0.mlp.gate_up_proj.weight"), "blk.0.ffn_up.weight");
        assert_eq!(stored_name("model.layers.0.mlp.experts.weight"), None);
    }
}
