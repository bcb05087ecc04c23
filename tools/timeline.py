#!/usr/bin/env python3
"""Draws a decode step: a lane for each stream, and one for what crosses the link, from the trace that
`kva-bench --timeline` writes. Standard library only.

    tools/timeline.py step.json step.svg [--from MS] [--to MS] [--title TEXT]
"""

import argparse
import html
import json
import math

WIDTH, LEFT, RIGHT = 1200, 110, 20
LANE, GAP, TOP = 34, 14, 64
INK, FAINT = "#222", "#ddd"

# What an operation is for, by the beginning of its kernel's name; the first that fits.
KINDS = [
    ("fetch", "#d1495b", "fetch over the link", ()),
    ("select", "#edae49", "speculate, select, look up", ("rehearse_", "slots_request", "slots_correct", "project_heads", "tail_weights")),
    ("store", "#66a182", "store K and V", ("store_kv", "slots_admit", "encode_", "index_", "copy_")),
    ("attention", "#30638e", "attention", ("attend_", "tail_add")),
    ("products", "#8fb8de", "matrix products", ("matvec", "gemm")),
    ("other", "#b8b8b8", "the rest", ("",)),
]


def kind(event):
    if event.get("cat") == "fetch":
        return KINDS[0]
    return next(k for k in KINDS[1:] if any(event["name"].startswith(start) for start in k[3]))


def read(path):
    """(device, names of streams, operations)"""
    with open(path) as file:
        events = json.load(file)["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    device = next((e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "process_name"), "")
    return device, names, [e for e in events if e["ph"] == "X"]


def busy(spans):
    """Length of the union of (begin, end)."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def ticks(begin, end):
    """Round numbers, some ten of them."""
    least = (end - begin) / 12
    power = 10 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    first = math.ceil(begin / step - 1e-9)
    return [i * step for i in range(first, math.floor(end / step + 1e-9) + 1)]


def draw(device, names, operations, begin, end, title):
    shown = [e for e in operations if e["ts"] < end and e["ts"] + e["dur"] > begin]
    x = lambda at: LEFT + (min(max(at, begin), end) - begin) / (end - begin) * (WIDTH - LEFT - RIGHT)
    label = {0: "compute", 1: "fetch stream", 2: "ahead stream"}
    lanes = [(label.get(tid, names.get(tid, str(tid))), lambda e, tid=tid: e["tid"] == tid) for tid in sorted(names)]
    lanes.append(("link", lambda e: e.get("cat") == "fetch"))
    lanes.append(("store", lambda e: kind(e)[0] == "store"))
    height = TOP + len(lanes) * (LANE + GAP) + 58
    out = []

    def text(at, y, words, size=13, anchor="start", weight="normal"):
        out.append(
            f'<text x="{at:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
            f'fill="{INK}">{html.escape(words)}</text>'
        )

    text(LEFT, 22, title, 16, weight="bold")
    length = max(e["ts"] + e["dur"] for e in operations) - min(e["ts"] for e in operations)
    link = busy([(e["ts"], e["ts"] + e["dur"]) for e in operations if e.get("cat") == "fetch"])
    part = "" if end - begin >= length else f", {(begin) / 1e3:.2f} to {end / 1e3:.2f} ms of it"
    text(LEFT, 42, f"{device}; a step of {length / 1e3:.2f} ms{part}; link busy {100 * link / length:.1f}% of the step", 12)
    bottom = TOP + len(lanes) * (LANE + GAP)
    for tick in ticks(begin / 1e3, end / 1e3):
        at = x(tick * 1e3)
        out.append(f'<line x1="{at:.1f}" y1="{TOP - 6}" x2="{at:.1f}" y2="{bottom}" stroke="{FAINT}"/>')
        text(at, bottom + 14, f"{tick:g} ms", 11, "middle")
    for row, (name, member) in enumerate(lanes):
        y = TOP + row * (LANE + GAP)
        text(LEFT - 10, y + LANE / 2 + 5, name, 13, "end")
        out.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - RIGHT}" height="{LANE}" fill="#f6f6f6"/>')
        for e in filter(member, shown):
            a, b = x(e["ts"]), x(e["ts"] + e["dur"])
            tip = html.escape(f"{e['name']}: {e['dur']:.1f} µs from {e['ts'] / 1e3:.3f} ms on")
            out.append(
                f'<rect x="{a:.2f}" y="{y}" width="{max(b - a, 0.4):.2f}" height="{LANE}" fill="{kind(e)[1]}">'
                f"<title>{tip}</title></rect>"
            )
    at = LEFT
    for _, colour, words, _ in KINDS:
        out.append(f'<rect x="{at}" y="{bottom + 28}" width="12" height="12" fill="{colour}"/>')
        text(at + 18, bottom + 39, words, 12)
        at += 36 + 7 * len(words)
    style = 'font-family="Helvetica, Arial, DejaVu Sans, sans-serif"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" {style}>'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height}" fill="white"/>', *out, "</svg>", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("picture")
    parser.add_argument("--from", dest="begin", type=float, help="milliseconds of the step to begin with (default 0)")
    parser.add_argument("--to", dest="end", type=float, help="milliseconds of the step to end with (default: its end)")
    parser.add_argument("--title", default="One decode step")
    arguments = parser.parse_args()
    device, names, operations = read(arguments.trace)
    if not operations:
        parser.error(f"{arguments.trace} has no operation in it")
    begin = 1e3 * arguments.begin if arguments.begin is not None else 0.0
    end = 1e3 * arguments.end if arguments.end is not None else max(e["ts"] + e["dur"] for e in operations)
    if not begin < end:
        parser.error(f"nothing lies between {begin / 1e3} and {end / 1e3} ms")
    with open(arguments.picture, "w") as file:
        file.write(draw(device, names, operations, begin, end, arguments.title))


if __name__ == "__main__":
    main()
