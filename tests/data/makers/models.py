"""Tiny Hugging Face checkpoints with seeded random weights, and what transformers computes from them.

Every folder of `golden/` is one architecture variant as `save_pretrained` writes it, plus `golden.safetensors`:

    tokens  i64 [n]         the prompt
    logits  f32 [n, vocab]  one full forward over `tokens`: f32, eager attention, stored weights widened to f32
    greedy  i64 [24]        argmax continuation of `tokens`, the whole sequence recomputed for every token

Weights are scaled so that a wrong implementation is seen: attention scores have a standard deviation near 2, logits
above 1, norm weights and biases are far from 1 and 0. `check_sensitivity` proves it for every tensor of every model.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

GREEDY_TOKENS = 24
# Greedy tokens are compared exactly, so no step may be a near tie. f32 against f64 moves logits by less than 1e-4; a
# KV cache in bf16 by up to 0.1, which is why the gap is not smaller.
MIN_TOP2_GAP = 0.08
# A continuation that falls into a loop at once would hide errors of later steps.
MIN_DISTINCT_GREEDY = 6
# Smallest normal f16: weights below it become 0, so that bf16 weights convert to f16 (GGUF) without loss.
F16_SMALLEST_NORMAL = 2.0**-14


@dataclass
class Spec:
    """One folder of `golden/`."""

    name: str
    config: Callable[[], PreTrainedConfig]
    tokens: int = 48
    # Stored type. bf16 unless the case is about another one: it is what real checkpoints use, at half the size.
    dtype: torch.dtype = torch.bfloat16
    generation: dict = field(default_factory=dict)
    # `save_pretrained` writes one file below this size, several with an index above it.
    max_shard_size: str = "5GB"
    # A second, shorter prompt, saved as `short.tokens`, `short.logits`, `short.greedy`.
    short_tokens: int = 0
    # Overwrites the classic spelling of the config where a real checkpoint of that age says something else.
    classic: dict = field(default_factory=dict)
    # Tokenizer folder (of `tokenizer/`) whose files belong to this checkpoint.
    tokenizer: str | None = None


IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SMALL = dict(vocab_size=192, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, **IDS)
GQA = dict(SMALL, num_key_value_heads=2)


def rope(rope_type: str, theta: float = 10000.0, **parameters) -> dict:
    return {"rope_type": rope_type, "rope_theta": theta, **parameters}


def llama(**changes) -> Callable[[], PreTrainedConfig]:
    return lambda: transformers.LlamaConfig(**{**GQA, "max_position_embeddings": 256, **changes})


LLAMA3_ROPE = rope(
    # With 8 frequencies of theta 500000 these put one above, one between and six below the two wavelength limits.
    "llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)

MODELS = [
    Spec(
        "llama3-rope",
        # Positions 0..95 lie beyond the 64 the model was "trained" for.
        llama(vocab_size=320, max_position_embeddings=512, rope_parameters=LLAMA3_ROPE),
        tokens=96,
        tokenizer="llama3",
        generation=dict(eos_token_id=[2, 4], do_sample=True, temperature=0.6, top_p=0.9),
    ),
    Spec(
        "qwen2",
        lambda: transformers.Qwen2Config(
            **{**GQA, "vocab_size": 320, "max_position_embeddings": 256, "rms_norm_eps": 1e-6},
            rope_parameters=rope("default", 1000000.0),
        ),
        tokenizer="qwen2",
        # Qwen2 names a window although it is switched off: a reader must look at `use_sliding_window`.
        classic={"sliding_window": 16, "max_window_layers": 1},
    ),
    Spec(
        "opt-pre-norm",
        lambda: transformers.OPTConfig(
            vocab_size=192, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=96, do_layer_norm_before=True, tie_word_embeddings=True,
            bos_token_id=2, eos_token_id=2, pad_token_id=1,
        ),  # fmt: skip
        dtype=torch.float16,
    ),
    Spec(
        "opt-post-norm",
        lambda: transformers.OPTConfig(
            vocab_size=192, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=96, do_layer_norm_before=False, word_embed_proj_dim=32, tie_word_embeddings=True,
            bos_token_id=2, eos_token_id=2, pad_token_id=1,
        ),  # fmt: skip
    ),
    Spec(
        "llama-mha",
        llama(num_key_value_heads=4, rms_norm_eps=1e-2),  # an epsilon that shows if it is not read
        dtype=torch.float32,
        classic={"num_key_value_heads": None},  # llama-1 configs have no such key: as many KV heads as heads
    ),
    Spec("llama-linear-rope", llama(rope_parameters=rope("linear", factor=4.0)), tokens=96),
    Spec(
        "llama-yarn-rope",
        # No attention_factor: the default 0.1 ln(4) + 1 applies. Ramp over the frequencies: 0, 1/3, 2/3, 1, 1, ...
        llama(rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=64)),
        tokens=96,
    ),
    Spec("llama-mqa-tied", llama(num_key_value_heads=1, tie_word_embeddings=True), dtype=torch.float16),
    Spec(
        "smollm2",
        llama(
            vocab_size=320, hidden_size=72, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=3,
            tie_word_embeddings=True, rms_norm_eps=1e-5, rope_parameters=rope("default", 100000.0),
            max_position_embeddings=512, pad_token_id=2,
        ),  # fmt: skip
        tokenizer="smollm2",
        generation=dict(max_new_tokens=40, do_sample=True, temperature=0.2, top_p=0.9),
    ),
    Spec(
        "mistral-window",
        lambda: transformers.MistralConfig(
            **GQA, max_position_embeddings=256, sliding_window=32, rope_parameters=rope("default")
        ),
        tokens=96,
    ),
    Spec(
        "mistral-head-dim",
        lambda: transformers.MistralConfig(
            **GQA, max_position_embeddings=256, head_dim=32, sliding_window=None,
            rope_parameters=rope("default", 1000000.0),
        ),  # fmt: skip
    ),
    Spec(
        "qwen3",
        lambda: transformers.Qwen3Config(
            **{**GQA, "max_position_embeddings": 256, "rms_norm_eps": 1e-6},
            head_dim=32, rope_parameters=rope("default", 1000000.0),
        ),  # fmt: skip
    ),
    Spec(
        "phi3",
        lambda: transformers.Phi3Config(
            **GQA, max_position_embeddings=96, original_max_position_embeddings=96, rope_parameters=rope("default")
        ),
    ),
    Spec(
        "phi3-longrope",
        lambda: transformers.Phi3Config(
            **GQA, max_position_embeddings=256, original_max_position_embeddings=64,
            rope_parameters=rope(
                "longrope",
                short_factor=[1.0, 1.02, 1.05, 1.1, 1.2, 1.4, 1.7, 2.0],
                long_factor=[1.1, 1.4, 2.0, 3.1, 4.6, 7.0, 11.0, 16.0],
            ),
        ),  # fmt: skip
        # transformers rotates *all* positions of a forward by the long factors once its length exceeds
        # original_max_position_embeddings, by the short ones otherwise. 96 (+24) stays above 64, 32 (+24) below:
        # neither run crosses the limit, so each is consistent with keys cached from its own prefill.
        tokens=96,
        short_tokens=32,
    ),
    Spec("sharded", llama(), max_shard_size="100KB"),
]


# ---------------------------------------------------------------------------------------------------------- weights


def tensor_rng(*key: str) -> np.random.Generator:
    """A generator of its own per tensor: adding a tensor or a model changes no other."""
    digest = hashlib.sha256("/".join(key).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:8], "little")))


def random_weight(model: str, name: str, shape: tuple[int, ...], tied: bool) -> torch.Tensor:
    """Random values at the scale this tensor's role asks for (see the module's first paragraph)."""
    rng = tensor_rng(model, name)
    part = name.removesuffix(".weight").removesuffix(".bias").split(".")[-1]

    if name.endswith(".bias"):
        value = rng.normal(0.0, 0.5 if part in ("q_proj", "k_proj") else 0.2, shape)
    elif part in ("q_norm", "k_norm"):
        value = rng.uniform(1.0, 1.9, shape)  # scores have the product of both as their scale
    elif len(shape) == 1:
        value = rng.uniform(0.5, 1.5, shape)
    elif part == "embed_tokens":
        # Tied, the same rows are the output projection: logits have std near 0.35 * sqrt(hidden).
        value = rng.normal(0.0, 0.35 if tied else 1.0, shape)
    elif part == "embed_positions":
        value = rng.normal(0.0, 1.2, shape)  # the only thing that tells equal tokens apart in OPT
    else:
        gain = {"q_proj": 1.4, "k_proj": 1.4, "qkv_proj": 1.4, "lm_head": 2.5, "down_proj": 2.0, "fc2": 0.8}
        value = rng.normal(0.0, gain.get(part, 1.2) / np.sqrt(shape[-1]), shape)

    value = np.where(np.abs(value) < F16_SMALLEST_NORMAL, 0.0, value)
    return torch.from_numpy(value.astype(np.float32))


def build(spec: Spec) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(spec.config(), dtype=spec.dtype)
    tied = model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():  # yields a tied weight once
        parameter.data = random_weight(spec.name, name, tuple(parameter.shape), tied).to(spec.dtype)
    if spec.generation:
        ids = dict(bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id,
                   pad_token_id=model.config.pad_token_id)  # fmt: skip
        model.generation_config = GenerationConfig(**{**ids, **spec.generation})
    return model


# ---------------------------------------------------------------------------------------------------------- dialect


def classic_config(config: dict, overrides: dict) -> dict:
    """The same config as transformers 4 spelled it, which is how nearly every published checkpoint spells it."""
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.44.0"
    parameters = config.pop("rope_parameters", None)
    if parameters is not None:
        parameters = dict(parameters)
        config["rope_theta"] = parameters.pop("rope_theta")
        if parameters.get("partial_rotary_factor") == 1.0:
            del parameters["partial_rotary_factor"]
        kind = parameters.pop("rope_type")
        if config["model_type"] == "phi3":  # kept beside max_position_embeddings, not in the dictionary
            parameters.pop("original_max_position_embeddings", None)
        # `type` came first, `rope_type` replaced it with transformers 4.43; both are found in the wild.
        key = "rope_type" if kind == "llama3" else "type"
        config["rope_scaling"] = None if kind == "default" else {key: kind, **parameters}
    config.pop("layer_types", None)
    if config.get("head_dim") == config["hidden_size"] // config["num_attention_heads"]:
        del config["head_dim"]  # was written only where it could not be derived
    config.update(overrides)
    return {key: value for key, value in config.items() if not (key in overrides and value is None)}


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- reference


def load(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def forward(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]), use_cache=False).logits[0]


def continue_greedily(model: torch.nn.Module, tokens: list[int]) -> list[int] | None:
    """The argmax continuation; None where two logits compete for a place."""
    sequence = list(tokens)
    for _ in range(GREEDY_TOKENS):
        best = torch.topk(forward(model, sequence)[-1], 2)
        if best.values[0] - best.values[1] < MIN_TOP2_GAP:
            return None
        sequence.append(best.indices[0].item())
    return sequence[len(tokens) :]


def special_ids(model: torch.nn.Module) -> set[int]:
    ids = [0, 1, 2, 3, 4]
    for value in (model.config.bos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id):
        ids += value if isinstance(value, list) else [value]
    return set(ids)


def reference(model: torch.nn.Module, name: str, length: int) -> dict[str, torch.Tensor]:
    """Prompt, logits and greedy continuation: the first random prompt whose continuation is a sharp test."""
    special = special_ids(model)
    for attempt in range(1000):
        rng = tensor_rng(name, "prompt", str(length), str(attempt))
        ordinary = rng.integers(max(special) + 1, model.config.vocab_size, length - 1).tolist()
        tokens = [model.config.bos_token_id, *ordinary]
        greedy = continue_greedily(model, tokens)
        if greedy and len(set(greedy)) >= MIN_DISTINCT_GREEDY and not special & set(greedy):
            return {
                "tokens": torch.tensor(tokens),
                "logits": forward(model, tokens).contiguous(),
                "greedy": torch.tensor(greedy),
            }
    raise RuntimeError(f"{name}: no prompt of {length} tokens gives a usable greedy continuation")


# ----------------------------------------------------------------------------------------------------------- checks


@contextlib.contextmanager
def everything_in_f64():
    """transformers computes norms, softmax and rope in f32 whatever the model's type; this makes them f64 too."""
    saved = torch.float32, torch.float, torch.Tensor.float
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.float, torch.Tensor.float = saved


def f64_logits(folder: Path, tokens: list[int]) -> torch.Tensor:
    model = load(folder)
    with everything_in_f64():
        wide = AutoModelForCausalLM.from_config(model.config, dtype=torch.float64, attn_implementation="eager").eval()
        wide.load_state_dict(model.state_dict())
        wide = wide.double()
        return forward(wide, tokens)


def check_sensitivity(model: torch.nn.Module, tokens: list[int], logits: torch.Tensor) -> tuple[str, float]:
    """Perturbs each tensor by a tenth of its size; returns the one that moves the logits least, and by how much."""
    moves = {}
    for name, parameter in model.named_parameters():
        if model.config.model_type == "opt" and name.endswith("k_proj.bias"):
            continue  # adds the same q.b to every score of a row: softmax does not see it where there is no rope
        original = parameter.data
        noise = torch.from_numpy(tensor_rng("noise", name).normal(0.0, 1.0, tuple(parameter.shape))).float()
        parameter.data = original + 0.1 * original.std() * noise
        moves[name] = (forward(model, tokens) - logits).abs().max().item()
        parameter.data = original
    return min(moves.items(), key=lambda item: item[1])


def ablations(config: PreTrainedConfig) -> list[dict]:
    """Config values each of which a reader could overlook."""
    changes = []
    parameters = getattr(config, "rope_parameters", None)
    if parameters is not None:
        changes.append({"rope_parameters": {**parameters, "rope_theta": parameters["rope_theta"] * 2}})
        if parameters["rope_type"] != "default":
            changes.append({"rope_parameters": rope("default", parameters["rope_theta"])})
        if parameters["rope_type"] in ("yarn", "longrope"):
            changes.append({"rope_parameters": {**parameters, "attention_factor": 1.0}})
    window = getattr(config, "sliding_window", None)
    if window is not None:
        changes += [{"sliding_window": value} for value in (None, window - 1, window + 1)]
    if getattr(config, "rms_norm_eps", 0) > 1e-4:
        changes.append({"rms_norm_eps": 1e-6})
    return changes


def check_ablations(folder: Path, tokens: list[int], logits: torch.Tensor) -> None:
    """The logits must tell when one of `ablations` is computed instead."""
    for change in ablations(transformers.AutoConfig.from_pretrained(folder)):
        config = transformers.AutoConfig.from_pretrained(folder, **change)
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        move = (forward(model, tokens) - logits).abs().max().item()
        assert move > 0.02, f"{folder.name}: {change} hardly matters ({move})"


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


def make(spec: Spec, out: Path) -> str:
    """Writes one folder, checks it, and returns a line about it. Tokenizers must have been made before."""
    folder = out / "golden" / spec.name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    build(spec).save_pretrained(folder, max_shard_size=spec.max_shard_size)
    if spec.tokenizer:
        shutil.copytree(out / "tokenizer" / spec.tokenizer, folder, dirs_exist_ok=True)

    # From here on only what lies on disk is used.
    model = load(folder)
    golden = reference(model, spec.name, spec.tokens)
    if spec.short_tokens:
        short = reference(model, spec.name, spec.short_tokens)
        golden.update({f"short.{key}": value for key, value in short.items()})
    save_file(golden, folder / "golden.safetensors")

    tokens, logits = golden["tokens"].tolist(), golden["logits"]
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.classic.json", classic_config(config, spec.classic))
    check_classic(folder, tokens, logits)
    spread = logits.std().item()
    assert spread > 1.0, f"{spec.name}: logits are nearly constant ({spread})"
    weakest, move = check_sensitivity(model, tokens, logits)
    assert move > 0.02, f"{spec.name}: {weakest} hardly matters ({move})"
    check_ablations(folder, tokens, logits)
    error = relative_difference(logits, f64_logits(folder, tokens))
    return (
        f"{spec.name:20} std {spread:5.2f}  max {logits.abs().max():6.2f}  f32/f64 {error:.1e}"
        f"  weakest {move:.3f} {weakest}"
    )


def check_classic(folder: Path, tokens: list[int], logits: torch.Tensor) -> None:
    """transformers must read `config.classic.json` as the very same model."""
    config = transformers.AutoConfig.for_model(
        **json.loads((folder / "config.classic.json").read_text(encoding="utf-8"))
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert torch.equal(forward(model, tokens), logits), f"{folder.name}: config.classic.json means something else"
