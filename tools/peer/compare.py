#!/usr/bin/env python3
"""kvahead and llama.cpp side by side, in one run, on one machine.

Every peer is measured once per repetition and measure before anyone is measured again, and the order
rotates, so that whatever the machine drifts through (heat, neighbours) meets all of them alike.
See README.md for what is measured and what is not.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from contention import wait_until_quiet

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Measure:
    """Prefill of `tokens` from the empty context, or `tokens` decode steps at `depth`."""

    kind: str
    depth: int
    tokens: int

    def __str__(self):
        return f"prefill {self.tokens}" if self.kind == "prefill" else f"decode at {self.depth}"


@dataclass(frozen=True)
class Sample:
    tokens_per_second: float
    others: float  # share of all processors that other processes used meanwhile, 0 to 1

    @classmethod
    def of(cls, answer):
        return cls(answer["tokens"] / answer["seconds"], answer["others"])


class PeerError(Exception):
    """A peer failed or answered something it should not."""


class Peer:
    """One engine in one configuration. `ours` decides which side of the ratio it is on."""

    name: str
    ours: bool

    def prepare(self, depth):
        """Do once, untimed or nearly, what decoding at `depth` needs. Return a prefill Sample, or None."""

    def measure(self, measure):
        """Return one Sample."""
        raise NotImplementedError

    def describe(self):
        """Whatever a reader of the JSON will want to know."""
        return {}

    def close(self):
        pass


class Served(Peer):
    """A process that lives for the whole run, is asked a line of JSON at a time, and keeps a sequence of each depth.

    `llama_peer.py serve` says what the requests are; `kva-bench --interactive` knows the same.
    """

    def __init__(self, command):
        self._process = subprocess.Popen(
            [str(part) for part in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def _ask(self, **request):
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # readline below finds the same death, and says so once
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self.name}: the process ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def prepare(self, depth):
        return Sample.of(self._ask(op="fill", depth=depth)) if depth > 0 else None

    def measure(self, measure):
        if measure.kind == "prefill":
            return Sample.of(self._ask(op="prefill", tokens=measure.tokens))
        return Sample.of(self._ask(op="decode", depth=measure.depth, tokens=measure.tokens))

    def describe(self):
        return self._ask(op="describe")

    def close(self):
        self._process.stdin.close()
        self._process.wait()


class LlamaCpp(Served):
    ours = False

    def __init__(self, python, model_name, model, flash, repack, kv_type, settings):
        self.name = f"llama.cpp {model_name} fa={flash}"
        self.name += "" if repack == "on" else " repack=off"
        self.name += "" if kv_type == "f16" else f" kv={kv_type}"
        command = [python, HERE / "llama_peer.py", "serve", "--model", model, "--flash", flash]
        command += ["--repack", repack, "--kv-type", kv_type, "--n-ctx", settings.n_ctx]
        command += ["--batch", settings.batch, "--threads", settings.threads]
        super().__init__(command)


def policy_flags(policy):
    """A policy as --kva-policy has it, "infinigen;select=0.02", as kva-bench's flags."""
    flags = []
    for setting in f"policy={policy}".split(";"):
        key, equals, value = setting.partition("=")
        flags += [f"--{key}", value] if equals else [f"--{key}"]
    return flags


class KvaBench(Served):
    ours = True

    def __init__(self, program, model_name, model, policy, extra, settings):
        self.name = f"kvahead {model_name}" + ("" if policy == "full" else f" {policy}")
        command = [program, "--interactive", "--model", model, *policy_flags(policy), "--threads", settings.threads]
        super().__init__([*command, *extra])


class Quiet:
    """Measures while other processes leave the machine alone; from `patience` seconds on, whatever they do."""

    def __init__(self, max_others, patience):
        self._max_others = max_others
        self._deadline = time.monotonic() + patience

    def wait(self):
        return wait_until_quiet(self._max_others, self._deadline - time.monotonic())

    def sample(self, peer, measure):
        """Measure until a Sample was not disturbed; return the least disturbed one."""
        samples = []
        while True:
            hopeful = self.wait()
            samples.append(peer.measure(measure))
            if not hopeful or samples[-1].others <= self._max_others:
                return min(samples, key=lambda sample: sample.others)


def run(peers, measures, repetitions, quiet, report):
    """Return ({(measure, peer name): [Sample]}, {(depth, peer name): fill Sample})."""
    fills = {}
    for depth in sorted({measure.depth for measure in measures}):
        for peer in peers:
            report(f"prepare depth {depth}: {peer.name}")
            quiet.wait()
            sample = peer.prepare(depth)
            if sample:
                fills[depth, peer.name] = sample
    samples = {key: [] for key in itertools.product(measures, (peer.name for peer in peers))}
    for repetition in range(repetitions):
        for place, measure in enumerate(measures):
            first = (repetition + place) % len(peers)
            for peer in peers[first:] + peers[:first]:
                samples[measure, peer.name].append(quiet.sample(peer, measure))
        report(f"repetition {repetition + 1} of {repetitions}")
    return samples, fills


def summarize(samples):
    rates = [sample.tokens_per_second for sample in samples]
    return {
        "median": statistics.median(rates),
        "min": min(rates),
        "max": max(rates),
        "others": max(sample.others for sample in samples),
        "samples": [asdict(sample) for sample in samples],
    }


def tabulate(peers, measures, samples):
    """One row per measure and peer. `ratio` is its median over the best median of llama.cpp in that measure."""
    rows = []
    for measure in measures:
        group = [
            {"measure": str(measure), "peer": peer.name, "ours": peer.ours, **summarize(samples[measure, peer.name])}
            for peer in peers
        ]
        best = max((row["median"] for row in group if not row["ours"]), default=None)
        for row in group:
            row["ratio"] = row["median"] / best if best else None
        rows += group
    return rows


def print_table(rows):
    width = max(len(row["peer"]) for row in rows)
    heading = f"{'measure':<15} {'peer':<{width}} {'tokens/s':>9} {'min':>8} – {'max':<8} {'ratio':>6} {'others':>6}"
    print(heading)
    previous = None
    for row in rows:
        if row["measure"] != previous:
            print("-" * len(heading))
        ratio = f"{row['ratio']:6.3f}" if row["ratio"] else f"{'':6}"
        print(
            f"{row['measure'] if row['measure'] != previous else '':<15} {row['peer']:<{width}}"
            f" {row['median']:>9.2f} {row['min']:>8.2f} – {row['max']:<8.2f} {ratio} {row['others']:>6.1%}"
        )
        previous = row["measure"]
    print(
        "\ntokens/s: median. ratio: to the best llama.cpp of the group. "
        "others: the largest\nshare of the machine that other processes took during a sample."
    )


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    return {"cpu": cpu, "processors": os.cpu_count(), "kernel": platform.release(), "load": os.getloadavg()}


def named_path(text):
    name, separator, path = text.partition("=")
    if not (separator and name and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    if not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a file")
    return name, Path(path)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = parser.add_argument_group("peers")
    models.add_argument("--llama-model", type=named_path, action="append", default=[], metavar="NAME=GGUF")
    models.add_argument("--flash", nargs="+", choices=("on", "off"), default=["on", "off"])
    models.add_argument(
        "--repack", nargs="+", choices=("on", "off"), default=["on"], help="llama.cpp's extra weight buffers"
    )
    models.add_argument("--kv-type", nargs="+", default=["f16"], help="llama.cpp's KV cache type")
    models.add_argument("--llama-python", default=sys.executable, help="a Python that has llama-cpp-python")
    models.add_argument("--kva-bench", type=Path, metavar="PROGRAM")
    models.add_argument("--kva-model", type=named_path, action="append", default=[], metavar="NAME=GGUF")
    models.add_argument("--kva-policy", nargs="+", default=["full"],
                        help="policies of kva-bench to measure, perhaps with settings: 'infinigen;select=0.02;kv-tier=ram'")
    models.add_argument(
        "--kva-arg", action="append", default=[], help="one more argument for kva-bench; write --kva-arg=--x"
    )
    what = parser.add_argument_group("measures")
    what.add_argument("--prefill", type=int, nargs="*", default=[512])
    what.add_argument("--depth", type=int, nargs="*", default=[0, 4096, 7900])
    what.add_argument("--gen", type=int, default=32, help="decode steps a measurement")
    what.add_argument("--repeat", type=int, default=7)
    what.add_argument("--threads", type=int, default=2)
    what.add_argument("--n-ctx", type=int, default=8192)
    what.add_argument("--batch", type=int, default=512)
    sharing = parser.add_argument_group("a shared machine")
    sharing.add_argument("--max-others", type=float, default=0.05, help="largest share of the machine others may take")
    sharing.add_argument(
        "--patience", type=float, default=1800, help="seconds into the run until which it insists on that"
    )
    parser.add_argument("--json", type=Path, help="write every sample here")
    chosen = parser.parse_args()

    if bool(chosen.kva_bench) != bool(chosen.kva_model):
        parser.error("--kva-bench and --kva-model go together")
    if not (chosen.llama_model or chosen.kva_model):
        parser.error("nobody to measure: give --llama-model or --kva-model")
    if not (chosen.prefill or chosen.depth):
        parser.error("nothing to measure: give --prefill or --depth")
    if min([chosen.gen, chosen.repeat, chosen.threads, *chosen.prefill]) < 1:
        parser.error("--gen, --repeat, --threads and --prefill start at 1")
    longest = max([*chosen.prefill, *(depth + chosen.gen for depth in chosen.depth)])
    if longest > chosen.n_ctx:
        parser.error(f"{longest} tokens do not fit --n-ctx {chosen.n_ctx}")
    return chosen


def main():
    chosen = arguments()
    measures = [Measure("prefill", 0, tokens) for tokens in chosen.prefill]
    measures += [Measure("decode", depth, chosen.gen) for depth in chosen.depth]
    began, before = time.time(), machine()
    quiet = Quiet(chosen.max_others, chosen.patience)
    peers = []
    try:
        for (name, model), policy in itertools.product(chosen.kva_model, chosen.kva_policy):
            peers.append(KvaBench(chosen.kva_bench, name, model, policy, chosen.kva_arg, chosen))
        for (name, model), *configuration in itertools.product(
            chosen.llama_model, chosen.flash, chosen.repack, chosen.kv_type
        ):
            peers.append(LlamaCpp(chosen.llama_python, name, model, *configuration, chosen))
        samples, fills = run(peers, measures, chosen.repeat, quiet, lambda text: print(text, file=sys.stderr))
        descriptions = {peer.name: peer.describe() for peer in peers}
    except PeerError as error:
        sys.exit(f"compare.py: {error}")
    finally:
        for peer in peers:
            peer.close()

    rows = tabulate(peers, measures, samples)
    print_table(rows)
    if chosen.json:
        result = {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(began)),
            "seconds": time.time() - began,
            "machine": {**before, "load_after": os.getloadavg()},
            "arguments": {key: value for key, value in vars(chosen).items()},
            "peers": descriptions,
            "fills": [{"depth": depth, "peer": peer, **asdict(sample)} for (depth, peer), sample in fills.items()],
            "rows": rows,
        }
        chosen.json.write_text(json.dumps(result, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
