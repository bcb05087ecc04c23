"""GGUF files: every tensor type with its values, and models of `golden/` as llama.cpp's converter would write them.

What llama.cpp's `convert_hf_to_gguf.py` does, and a reader must undo or know:
- llama architecture: the rows of Q and K are permuted from Hugging Face's half-split rotary order to interleaved
  pairs (`permute`); qwen2 keeps the half-split order.
- llama-3.1 rope scaling is no metadata but a tensor, `rope_freqs.weight`: divisors of the rotary frequencies.
- norms and biases stay F32 whatever the file's type; tied embeddings have no `output.weight`.
- dimensions are listed innermost first.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file
from safetensors.torch import load_file

from . import models

# --------------------------------------------------------------------------------------------------------- all types

QUANTS = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q4_K, Type.Q5_K,
          Type.Q6_K]  # fmt: skip
# Types the gguf package reads but cannot write -> byte offsets of the f16 scales in a block; all other bytes may be
# anything. Q4_K and Q5_K start with d and dmin, Q6_K ends with d.
SCALES = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}
ROWS, COLUMNS = 4, 512


def random_blocks(kind: Type) -> np.ndarray:
    """Random bytes with sane scales: every bit pattern of the quants and packed block scales is a valid one."""
    rng = models.tensor_rng("quants", kind.name)
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (ROWS * COLUMNS // values, size), dtype=np.uint8)
    for offset in SCALES[kind]:
        scale = rng.uniform(-0.01, 0.01, len(blocks)).astype(np.float16)
        blocks[:, offset : offset + 2] = scale[:, None].view(np.uint8)
    return blocks.reshape(ROWS, -1)


def make_quants(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder / "quants.gguf", "llama")
    writer.add_name("one tensor of every type")
    values = {}
    for kind in QUANTS:
        name = kind.name.lower()
        if kind in SCALES:
            data = random_blocks(kind)
        else:
            rng = models.tensor_rng("quants", kind.name)
            data = gguf.quants.quantize(rng.normal(0.0, 1.0, (ROWS, COLUMNS)).astype(np.float32), kind)
        values[name] = np.ascontiguousarray(gguf.quants.dequantize(data, kind), dtype=np.float32)
        assert values[name].shape == (ROWS, COLUMNS) and np.isfinite(values[name]).all()
        writer.add_tensor(name, data, raw_dtype=kind)
    finish(writer)
    save_file(values, folder / "quants.safetensors")


# ------------------------------------------------------------------------------------------------------------ models

# golden folder -> architecture, tokenizer.ggml.pre, type of the matrices
GGUF_MODELS = {
    "smollm2": ("llama", "smollm", Type.F16),
    "llama3-rope": ("llama", "llama-bpe", Type.F32),
    "qwen2": ("qwen2", "qwen2", Type.BF16),
}
# The one that is also written as version 2 (the same bytes but for the version: 3 only added big-endian files).
VERSION_2 = "qwen2"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to interleaved pairs: row i and i + d/2 become 2i and 2i+1."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def rope_divisors(config: dict) -> np.ndarray:
    """What `llama3` rope scaling divides each rotary frequency by."""
    scaling, dim = config["rope_parameters"], config["head_dim"]
    frequency = 1.0 / scaling["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * np.pi)
    low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def convert(
    tensors: dict[str, torch.Tensor], config: dict, arch: str, kind: Type
) -> dict[str, tuple[np.ndarray, Type]]:
    """Names, types and row order of llama.cpp."""
    arch_id = {name: id for id, name in gguf.MODEL_ARCH_NAMES.items()}[arch]
    names = gguf.get_tensor_name_map(arch_id, config["num_hidden_layers"])
    result = {}
    if config["rope_parameters"]["rope_type"] == "llama3":
        result["rope_freqs.weight"] = rope_divisors(config), Type.F32
    for name, tensor in tensors.items():
        value = tensor.float().numpy()
        if arch == "llama" and "q_proj" in name:
            value = permute(value, config["num_attention_heads"])
        if arch == "llama" and "k_proj" in name:
            value = permute(value, config["num_key_value_heads"])
        stored = Type.F32 if value.ndim == 1 else kind
        data = gguf.quants.quantize(np.ascontiguousarray(value), stored)
        # The golden logits hold for this file only if no weight was rounded.
        assert np.array_equal(gguf.quants.dequantize(data, stored), value), f"{name} does not fit {stored.name}"
        result[names.get_name(name, try_suffixes=(".weight", ".bias"))] = data, stored
    return result


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, pre: str) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    ids = {**vocab, **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    special = {token["content"] for token in tokenizer["added_tokens"] if token["special"]}
    tokens = sorted(ids, key=ids.get)
    assert [ids[token] for token in tokens] == list(range(len(tokens)))

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for role, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
                      ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):  # fmt: skip
        if config.get(f"{role}_token"):
            add(ids[config[f"{role}_token"]])
    writer.add_add_bos_token(tokenizer["post_processor"] is not None)
    own_file = folder / "chat_template.jinja"
    template = own_file.read_text(encoding="utf-8") if own_file.exists() else config["chat_template"]
    writer.add_chat_template(template if isinstance(template, str) else template[0]["template"])


def make_model(out: Path, name: str) -> None:
    arch, pre, kind = GGUF_MODELS[name]
    source = out / "golden" / name
    config = json.loads((source / "config.json").read_text())
    path = out / "gguf" / f"{name}.gguf"

    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(f"kvahead golden {name}")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if arch == "llama":
        writer.add_vocab_size(config["vocab_size"])
        writer.add_rope_dimension_count(config["head_dim"])
    file_types = {Type.F32: gguf.LlamaFileType.ALL_F32, Type.F16: gguf.LlamaFileType.MOSTLY_F16,
                  Type.BF16: gguf.LlamaFileType.MOSTLY_BF16}  # fmt: skip
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, source, pre)
    for tensor_name, (data, stored) in convert(load_file(source / "model.safetensors"), config, arch, kind).items():
        writer.add_tensor(tensor_name, data, raw_dtype=stored)
    finish(writer)
    if name == VERSION_2:
        content = bytearray(path.read_bytes())
        assert content[:8] == b"GGUF\x03\0\0\0"
        content[4] = 2
        path.with_suffix(".v2.gguf").write_bytes(content)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ------------------------------------------------------------------------------------------------------------ checks


def check_model(out: Path, name: str, path: Path) -> None:
    """transformers' own GGUF import must find the weights and the golden logits again, bit by bit."""
    golden = load_file(out / "golden" / name / "golden.safetensors")
    model = models.load(out / "golden" / name)
    read = models.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    state = read.state_dict()
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), f"{path.name}: {key} differs"
    if "rope_freqs.weight" not in {tensor.name for tensor in gguf.GGUFReader(path).tensors}:
        assert torch.equal(models.forward(read, golden["tokens"].tolist()), golden["logits"]), f"{path.name}: logits"
    else:  # which the import ignores: compare what the file says with what transformers computed
        config = model.config.to_dict()
        dim, theta = config["head_dim"], config["rope_parameters"]["rope_theta"]
        frequency = theta ** -(torch.arange(0, dim, 2) / dim) / torch.from_numpy(rope_divisors(config))
        assert torch.allclose(frequency, model.model.rotary_emb.inv_freq, rtol=1e-5), f"{path.name}: rope_freqs"


def make(out: Path) -> str:
    folder = out / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    make_quants(folder)
    for name in GGUF_MODELS:
        make_model(out, name)
        check_model(out, name, folder / f"{name}.gguf")
    return ", ".join(f"{path.name} {path.stat().st_size}" for path in sorted(folder.iterdir()))
