"""Inverse frequencies and attention factors of every rope scaling rule, as transformers computes them."""

import json
from pathlib import Path

from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

LONG = [1.0 + 0.37 * i for i in range(12)]
SHORT = [1.0 + 0.013 * i for i in range(12)]

# name -> dimensions of a head, max_position_embeddings, rope_parameters
CASES = {
    "plain": (64, 8192, {"rope_type": "default", "rope_theta": 100000.0}),
    "linear": (128, 16384, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    "llama-3.1": (128, 131072, {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "llama-3.2": (64, 131072, {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
                               "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),
    "yarn": (128, 131072, {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0,
                           "original_max_position_embeddings": 32768}),
    "yarn-with-everything": (64, 65536, {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 16.0, "beta_fast": 24.0,
                                         "beta_slow": 1.5, "truncate": False, "mscale": 0.8, "mscale_all_dim": 0.5,
                                         "original_max_position_embeddings": 4096}),
    "longrope": (32, 131072, {"rope_type": "longrope", "rope_theta": 10000.0, "long_factor": LONG,
                              "short_factor": SHORT, "partial_rotary_factor": 0.75,
                              "original_max_position_embeddings": 4096}),
}  # fmt: skip


def make(folder: Path) -> str:
    cases = {}
    for name, (head_dim, context, parameters) in CASES.items():
        longrope = parameters["rope_type"] == "longrope"
        shape = dict(hidden_size=4 * head_dim, num_attention_heads=4, num_hidden_layers=1, intermediate_size=8,
                     vocab_size=8, max_position_embeddings=context, rope_parameters=dict(parameters))  # fmt: skip
        if longrope:
            original = parameters["original_max_position_embeddings"]
            config = Phi3Config(original_max_position_embeddings=original, pad_token_id=0, bos_token_id=0,
                                eos_token_id=0, **shape)  # fmt: skip
            rope = Phi3RotaryEmbedding(config)
        else:
            config = LlamaConfig(pad_token_id=0, bos_token_id=0, eos_token_id=0, **shape)
            rope = LlamaRotaryEmbedding(config)
        case = {"config": json.loads(config.to_json_string()), "inv_freq": rope.inv_freq.tolist(),
                "attention_factor": float(rope.attention_scaling)}  # fmt: skip
        if longrope:
            long, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=original + 1)
            case["long_inv_freq"] = long.tolist()
        cases[name] = case
    (folder / "rope.json").write_text(json.dumps(cases, indent=1) + "\n")
    return f"rope.json: {len(cases)} rules"
