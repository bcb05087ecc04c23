#!/usr/bin/env python3
"""Policies by a second hand, to judge kvahead's figures by: SmolLM2 in f32 with PyTorch, decode emulated by teacher
forcing. The first P tokens of a passage are dense; each later one attends what a reading of the specification gives it.

    pip install torch transformers gguf accelerate
    tests/oracle/readings.py --passages emma-2k,northanger-2k               # what there is to read
    tests/oracle/readings.py --passages emma-2k window:0.05 paper paper-union

Prints the increase of perplexity over dense, and the share of past tokens that was selected in layers 2 and up.
docs/quality.md has the table. Nothing is shared with the library but the weights and the texts.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
NEVER = -1e30
PREFIX = {"emma-2k": 1024, "northanger-2k": 1024, "persuasion-8k": 4096}


class Net:
    """The model, layer by layer. Weights are rounded to bf16, as those of tests/data/reference and of the library are."""

    def __init__(self, gguf):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
        c, self.model, self.layers = model.config, model.model, model.model.layers
        self.heads, self.kv_heads, self.d = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        self.group, self.eps = self.heads // self.kv_heads, c.rms_norm_eps
        self.output, self.frequencies = model.lm_head.weight, model.model.rotary_emb.inv_freq.double()

    def norm(self, x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight

    def project(self, x, weight):
        """[n, D] to [heads, n, d]."""
        return (x @ weight.T).view(len(x), -1, self.d).transpose(0, 1)

    def rotate(self, x, positions):
        angle = positions[:, None].double() * self.frequencies
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def run(self, tokens, past, visible):
        """What the layers see of `tokens`, which come after `past` (what this has returned, or nothing), and the last hidden
        states. `visible(layer, positions, states)` says what each row may attend of all so far, [heads, rows, n] or None for all."""
        start = past[0]["k"].shape[1] if past else 0
        positions = torch.arange(start, start + len(tokens))
        x, states = self.model.embed_tokens.weight[tokens], []
        for i, layer in enumerate(self.layers):
            y, a = self.norm(x, layer.input_layernorm.weight), layer.self_attn
            q = self.rotate(self.project(y, a.q_proj.weight), positions)
            k, v = self.rotate(self.project(y, a.k_proj.weight), positions), self.project(y, a.v_proj.weight)
            if past:
                k, v = torch.cat((past[i]["k"], k), 1), torch.cat((past[i]["v"], v), 1)
            states.append({"y": y, "q": q, "k": k, "v": v})
            mask = visible(i, positions, states) if past else None
            outs = []
            for head in range(self.heads):  # one at a time: [rows, n] is large
                allowed = torch.arange(k.shape[1]) <= positions[:, None]
                if mask is not None:
                    allowed &= mask[head if len(mask) > 1 else 0]
                kv = head // self.group
                outs.append(F.scaled_dot_product_attention(q[head], k[kv], v[kv], attn_mask=allowed))
            x = x + torch.stack(outs, 1).flatten(1) @ a.o_proj.weight.T
            y, m = self.norm(x, layer.post_attention_layernorm.weight), layer.mlp
            x = x + (F.silu(y @ m.gate_proj.weight.T) * (y @ m.up_proj.weight.T)) @ m.down_proj.weight.T
        return states, x

    def mean_nll(self, x, targets):
        parts = zip(x.split(256), targets.split(256))
        logits = ((self.norm(x, self.model.norm.weight) @ self.output.T, t) for x, t in parts)
        return torch.cat([F.cross_entropy(l, t, reduction="none") for l, t in logits]).mean().item()


def window(share, whole_layers=0):
    """4 sinks and the recent tokens: together, and with the token itself, a share of the tokens held."""

    def visible(layer, positions, _states):
        if layer < whole_layers:
            return None
        p, row = positions[:, None], torch.arange(positions[-1] + 1)
        return ((row < 4) | (row > p + 4 - torch.round(share * (p + 1))))[None]

    return visible


@dataclass
class Paper:
    """The paper's rule (ALGORITHM.md §2 to §4); fields are what the text leaves open with grouped queries."""

    # Whose scores above the largest − alpha are counted: 'query' heads', or those of 'kv' heads.
    count: str = "query"
    # Who has a list: 'kv' heads by the group's score; 'query' heads, each attending its own; or the 'union' of a group's.
    lists: str = "kv"
    # A group's score: the largest 'relative' to each head's own largest, or the largest as it is ('max').
    score: str = "relative"
    # Whether each count is capped before the mean is taken, not the mean.
    cap_each: bool = False
    # Added: first tokens that are attended in any case and not selected.
    sinks: int = 0
    alpha: float = 4.0
    ratio: float = 0.3
    cap: float = 0.2

    def on(self, net, bases, prompt):
        self.net, self.bases, self.prompt, self.selected, self.past = net, bases, prompt, 0.0, 0.0
        return self

    def __call__(self, layer, positions, states):
        if layer < 2:
            return None
        net, keys, prompt = self.net, states[layer]["k"], self.prompt[layer]
        weight = net.layers[layer].self_attn.q_proj.weight
        queries = net.rotate(net.project(states[layer - 1]["y"], weight), positions)
        rows = torch.arange(keys.shape[1])
        barred = (rows >= positions[:, None]) | (rows < self.sinks)
        scores = []
        for head in range(net.heads):
            kv = head // net.group
            basis, of_group = self.bases[layer][kv], prompt["q"].split(net.group)[kv]
            sums = (of_group @ basis).abs().sum((0, 1)) + (prompt["k"][kv] @ basis).abs().sum(0)
            chosen = basis[:, sums.topk(round(net.d * self.ratio)).indices]
            score = (queries[head] @ chosen) @ (keys[kv] @ chosen).T * net.d**-0.5
            scores.append(score.masked_fill_(barred, NEVER))
        scores = torch.stack(scores)
        largest = scores.amax(-1, keepdim=True)
        of_heads = scores - largest if self.score == "relative" else scores
        groups = of_heads.unflatten(0, (net.kv_heads, net.group)).amax(1)
        counted = scores if self.count == "query" else groups
        counts = (counted > counted.amax(-1, keepdim=True) - self.alpha).sum(-1)
        cap = (self.cap * (positions + 1)).round().long()
        if self.cap_each:
            counts = torch.minimum(counts, cap)
        counts = torch.minimum(counts.float().mean(0).round().long(), cap).clamp(min=1)
        attended = best(groups if self.lists == "kv" else scores, counts) & ~barred
        if self.lists == "union":
            attended = attended.unflatten(0, (net.kv_heads, net.group)).any(1)
        self.selected += attended.float().mean(0).sum().item()
        self.past += positions.sum().item()
        if len(attended) < net.heads:
            attended = attended.repeat_interleave(net.group, 0)
        return attended | (rows == positions[:, None]) | (rows < self.sinks)


def best(scores, counts):
    """For each row the `counts` largest of its scores."""
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for part, of_part, most in zip(mask.split(128, 1), scores.split(128, 1), counts.split(128)):
        top = of_part.topk(int(most.max()), -1).indices
        part.scatter_(-1, top, (torch.arange(top.shape[-1]) < most[:, None]).expand_as(top))
    return mask


def skew(net, tokens):
    """§2: right singular vectors of the rotated queries of a group, sink rows left out, for each layer and KV head."""
    pieces = [net.run(piece, None, None)[0] for piece in tokens.split(-(-len(tokens) // 2))]
    bases = []
    for layer in range(len(net.layers)):
        queries = torch.cat([piece[layer]["q"][:, 4:] for piece in pieces], 1).split(net.group)
        bases.append([torch.linalg.svd(q.flatten(0, 1).double(), full_matrices=False).Vh.T.float() for q in queries])
    return bases


READINGS = {
    "window:SHARE": "sinks and recent tokens in every layer",
    "window-2:SHARE": "the same, layers 0 and 1 attended in full",
    "paper": "each KV head the best by its group; query heads are counted (what the library does)",
    "paper-kv": "KV heads are counted, by the group's relative score",
    "paper-kv-max": "KV heads are counted, by the group's largest score",
    "paper-union": "each query head its own best; a group attends the union",
    "paper-union-each": "the same, each head's count capped before the mean is taken",
    "paper-query": "each query head its own best, and attends these alone",
    "paper-sinks": "4 sinks attended in any case, and neither selected nor looked at for the largest score",
}


def reading(name):
    if name.startswith("window"):
        kind, share = name.split(":")
        return window(float(share), 2 if kind == "window-2" else 0)
    return {
        "paper": Paper(),
        "paper-kv": Paper(count="kv"),
        "paper-kv-max": Paper(count="kv", score="max"),
        "paper-union": Paper(lists="union"),
        "paper-union-each": Paper(lists="union", cap_each=True),
        "paper-query": Paper(lists="query"),
        "paper-sinks": Paper(sinks=4),
    }[name]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--passages", default="emma-2k,northanger-2k", help="of tests/data/reference")
    parser.add_argument("readings", nargs="*")
    args = parser.parse_args()
    if not args.readings:
        print("\n".join(f"{name:16} {what}" for name, what in READINGS.items()))
        return
    torch.set_grad_enabled(False)
    net, bases = Net(args.model), None
    if any(name.startswith("paper") for name in args.readings):
        text = (ROOT / "src/speculate/calibration.txt").read_text()
        tokenizer = AutoTokenizer.from_pretrained(args.model.parent, gguf_file=args.model.name)
        bases = skew(net, torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]))
    for passage in args.passages.split(","):
        tokens = torch.tensor(json.loads((ROOT / f"tests/data/reference/{passage}.json").read_text())["token_ids"])
        length = PREFIX[passage]
        prompt, _ = net.run(tokens[:length], None, None)

        def mean_nll(visible):
            _, x = net.run(tokens[length:-1], prompt, visible)
            return net.mean_nll(x, tokens[length + 1 :])

        dense = mean_nll(lambda *_: None)
        print(f"{passage}: dense, mean NLL {dense:.4f}", flush=True)
        for name in args.readings:
            policy = reading(name)
            if isinstance(policy, Paper):
                policy.on(net, bases, prompt)
            increase = 100 * math.expm1(mean_nll(policy) - dense)
            share = f", {100 * policy.selected / policy.past:.2f}% selected" if isinstance(policy, Paper) else ""
            print(f"{passage}: {name} {increase:+.1f}%{share}", flush=True)


if __name__ == "__main__":
    main()
