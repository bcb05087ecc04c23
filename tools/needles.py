#!/usr/bin/env python3
"""Needles in a haystack: which policies still find a number in a long text?

From a seed it makes chat prompts of public-domain prose with a 7-digit number hidden at five depths, asks for the number at
the end, and lets kva-generate answer under each policy. A policy is a list of kva-generate's flags without their dashes:

    tools/needles.py --model model.gguf policy=full 'policy=window;budget=0.2' 'policy=infinigen;select=0.02'

The table says how many each answers. Standard library only.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROSE = ROOT / "tests" / "data" / "reference" / "persuasion-8k.json"
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
CHARACTERS_A_TOKEN = 4.12  # of this prose, by SmolLM2's tokenizer
OVERHEAD_TOKENS = 75  # the chat template, the needle and the question
QUESTION = "What is the secret number that is hidden in the text above? Answer with the number only."


def sentences(text):
    """The text in pieces that end with a sentence; joined they are the text, with white space made single."""
    return re.findall(r".+?[.!?][\"'”’]?(?:\s|$)|.+$", " ".join(text.split()))


def needle(number):
    return f"The secret number is {number}. Remember it: the secret number is {number}. "


def prompt(text, number, depth, tokens, start):
    """About `tokens` tokens of prose from sentence `start` on (then from the beginning again), with the number at `depth`."""
    length = int((tokens - OVERHEAD_TOKENS) * CHARACTERS_A_TOKEN)
    if length <= 0:
        raise SystemExit(f"needles: --tokens {tokens} leaves no room for prose")
    prose, size = [], 0
    for sentence in text[start:] + text[:start]:
        if size + len(sentence) > length:
            break
        prose.append(sentence)
        size += len(sentence)
    at, passed = 0, 0
    while at < len(prose) and passed + len(prose[at]) / 2 < depth * size:
        passed += len(prose[at])
        at += 1
    hidden = prose[:at] + [needle(number)] + prose[at:]
    return "".join(hidden).strip() + "\n\n" + QUESTION


def prompts(seed, repeats, tokens, prose=PROSE):
    """[(depth, number, prompt)]; the same seed makes the same."""
    rng = random.Random(seed)
    text = sentences(json.loads(Path(prose).read_text())["text"])
    made = []
    for depth in DEPTHS:
        for _ in range(repeats):
            number = rng.randrange(1_000_000, 10_000_000)
            made.append((depth, str(number), prompt(text, number, depth, tokens, rng.randrange(len(text)))))
    return made


def flags(specification):
    """policy=window;budget=0.2 -> --policy window --budget 0.2"""
    words = []
    for setting in specification.split(";"):
        key, equals, value = setting.partition("=")
        words += [f"--{key}", value] if equals else [f"--{key}"]
    return words


def answer(command, text):
    """(what the model said, tokens of the prompt)"""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"needles: {' '.join(command)}\n{done.stderr.strip()}")
    return done.stdout.strip(), int(re.search(r"prefill +(\d+) tokens", done.stderr).group(1))


def found(said, number):
    """Whether the number is in the answer, perhaps written 1,234,567."""
    return number in re.sub(r"(?<=\d)[ ,.](?=\d)", "", said)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("policies", nargs="*", default=["policy=full", "policy=window;budget=0.2", "policy=infinigen"], metavar="POLICY",
                        help="flags of kva-generate, as 'policy=window;budget=0.2' (default: full, window with 20%%, infinigen)")
    parser.add_argument("--model", default=ROOT / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf", metavar="PATH")
    parser.add_argument("--tool", default=ROOT / "build" / "cpp" / "bin" / "kva-generate", metavar="PATH", help="kva-generate")
    parser.add_argument("--tokens", type=int, default=4096, metavar="N", help="of a prompt, about (default 4096)")
    parser.add_argument("--repeats", type=int, default=2, metavar="N", help="prompts a depth (default 2)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="of places and numbers (default 1)")
    parser.add_argument("--flags", default="", metavar="TEXT", help="more flags for kva-generate, as '--threads 1'")
    parser.add_argument("--json", metavar="FILE", help="write every answer to FILE")
    return parser.parse_args()


def main():
    options = arguments()
    made = prompts(options.seed, options.repeats, options.tokens)
    base = [str(options.tool), "--model", str(options.model), "--chat", "--prompt-file", "-", "--max-tokens", "32", *options.flags.split()]
    answers, lengths = [], []
    width = max(len(policy) for policy in options.policies)
    heads = "".join(f"{depth:>7.0%}" for depth in DEPTHS)
    print(f"{'depth':<{width}}{heads}    all", flush=True)
    for policy in options.policies:
        right = {depth: 0 for depth in DEPTHS}
        for depth, number, text in made:
            said, length = answer(base + flags(policy), text)
            lengths.append(length)
            right[depth] += found(said, number)
            answers.append({"policy": policy, "depth": depth, "number": number, "answer": said, "right": found(said, number)})
            if sys.stderr.isatty():
                print(f"\r{policy}: {sum(right.values())} of {len(answers) % len(made) or len(made)}", end="\033[K\r", file=sys.stderr)
        cells = "".join(f"{f'{right[depth]}/{options.repeats}':>7}" for depth in DEPTHS)
        print(f"{policy:<{width}}{cells}  {f'{sum(right.values())}/{len(made)}':>5}", flush=True)
    print(f"\n{min(lengths)} to {max(lengths)} tokens a prompt, seed {options.seed}")
    if options.json:
        Path(options.json).write_text(json.dumps({"seed": options.seed, "answers": answers}, indent=1) + "\n")


if __name__ == "__main__":
    main()
