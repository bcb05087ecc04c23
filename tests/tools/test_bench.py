import json
import subprocess
import tempfile
import unittest
from pathlib import Path

from tool import CONTEXT, MODEL, CommonTests, ToolTest


class BenchTest(CommonTests, ToolTest):
    name = "kva-bench"

    def bench(self, *arguments):
        """(stdout, the JSON)"""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            out, _ = self.run_tool("--model", MODEL, *arguments, "--json", file)
            return out, json.loads(file.read_text())

    def test_a_row_for_each_context_and_batch(self):
        out, result = self.bench("--context", "1,40", "--batch", "1,3", "--gen", 4, "--repeat", 3, "--threads", 1)
        self.assertEqual([(row["context"], row["batch"]) for row in result["rows"]], [(1, 1), (1, 3), (40, 1), (40, 3)])
        for row in result["rows"]:
            self.assertEqual(row["policy"], "full")
            for rate in (row["prefill_tokens_per_second"], row["decode_tokens_per_second"]):
                self.assertEqual(len(rate["samples"]), 3)
                self.assertTrue(0 < rate["min"] <= rate["median"] <= rate["max"], rate)
            self.assertGreater(row["kv_bytes"], 0)
            self.assertGreater(row["peak_memory_bytes"], 0)
        self.assertGreaterEqual(result["peak_memory_bytes"], max(row["peak_memory_bytes"] for row in result["rows"]))
        self.assertEqual(result["model"]["path"], MODEL)
        self.assertGreater(result["model"]["weight_bytes"], 0)
        self.assertIn("cpu", result["machine"])
        self.assertRegex(out, r"(?m)^ +40 +3 +full +[\d.]+ \([\d.]+ - [\d.]+\)")

    def test_policies_are_compared_in_one_run(self):
        out, result = self.bench("--context", "8,40", "--gen", 4, "--repeat", 3, "--compare", "policy=full;kv-dtype=f32,f16")
        rows = result["rows"]
        self.assertEqual([(row["context"], row["label"]) for row in rows],
                         [(c, f"full, kv-dtype {t}") for c in (8, 40) for t in ("f32", "f16")])
        for first, second in (rows[:2], rows[2:]):
            self.assertEqual(first["decode_ratio_to_first"]["samples"], [1, 1, 1])
            for ratio, a, b in zip(second["decode_ratio_to_first"]["samples"], first["decode_tokens_per_second"]["samples"],
                                   second["decode_tokens_per_second"]["samples"]):
                self.assertAlmostEqual(ratio, b / a)
            self.assertEqual(first["kv_bytes"], 2 * second["kv_bytes"])
            self.assertEqual(first["options"]["kv_dtype"], "f32")
            self.assertEqual(first["bytes_fetched_per_step"], {"host": 0, "file": 0, "file_read": 0})
            self.assertEqual(first["kv_bytes_by_tier"]["device"], first["kv_bytes"])
        self.assertRegex(out, r"(?m)^ +40 +1 +full, kv-dtype f16 .*\) +[\d.]+ +[\d.]+ KiB")

    def test_prefill_once(self):
        _, result = self.bench("--context", 16, "--gen", 2, "--repeat", 3, "--no-prefill-repeat")
        self.assertEqual(len(result["rows"][0]["prefill_tokens_per_second"]["samples"]), 1)
        self.assertEqual(len(result["rows"][0]["decode_tokens_per_second"]["samples"]), 3)

    def test_the_empty_context_has_no_prefill(self):
        _, result = self.bench("--context", 0, "--gen", 2, "--repeat", 1)
        self.assertIsNone(result["rows"][0]["prefill_tokens_per_second"])

    def test_the_whole_context_can_be_measured(self):
        self.bench("--context", CONTEXT - 2, "--gen", 2, "--repeat", 2)
        self.wrong("--model", MODEL, "--context", CONTEXT, "--gen", 2, says=f"context length of {CONTEXT}")

    def test_interactive(self):
        requests = [
            {"op": "describe"},
            {"op": "prefill", "tokens": 20},
            {"op": "fill", "depth": 32},
            {"op": "decode", "depth": 32, "tokens": 5},
            {"op": "decode", "depth": 0, "tokens": 3},
            {"op": "decode", "depth": 32, "tokens": 5},
            {"op": "decode", "depth": 7, "tokens": 5},
            {"op": "prefill", "tokens": CONTEXT + 1},
            {"op": "dance"},
            {"op": "decode", "depth": 0, "tokens": 0},
            "not an object",
        ]
        lines = [json.dumps(request) for request in requests] + ["not JSON"]
        done = subprocess.run(
            [self.program(), "--model", MODEL, "--interactive"], input="\n".join(lines), capture_output=True, text=True
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        self.assertEqual(len(answers), len(lines))
        self.assertIn("machine", answers[0])
        for answer, tokens in zip(answers[1:6], (20, 32, 5, 3, 5)):
            self.assertEqual(answer["tokens"], tokens)
            self.assertGreater(answer["seconds"], 0)
            self.assertTrue(0 <= answer["others"] <= 1)
        for answer in answers[6:]:
            self.assertEqual(list(answer), ["error"])
        self.assertIn("fill it first", answers[6]["error"])
        self.assertIn("dance", answers[8]["error"])

    def test_a_trace_is_replayed(self):
        small = ("--policy", "infinigen", "--cache", "0.3", "--window", "8", "--sinks", "2")
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace"
            self.bench("--context", 400, "--gen", 6, "--repeat", 1, *small, "--select", "0.05", "--trace", trace)
            for context in (400, 480):
                out, result = self.bench("--context", context, "--gen", 6, "--repeat", 2, "--no-prefill-repeat", "--fill", *small,
                                         "--replay", trace)
                row = result["rows"][0]
                self.assertEqual((row["options"]["rule"], row["options"]["replay"]), ("replay", str(trace)))
                # 5% of 400 to 405 tokens, and as many of the longer sequence.
                self.assertAlmostEqual(row["selected_per_step_and_head"], 0.05 * context, delta=1)
                self.assertIsNone(row["link_busy"])  # the processor does not measure it
                self.assertRegex(out, r"a step takes [\d.]+ ms; KV: .* device \(index .*, cache .*\)")
                self.assertRegex(out, r"it reads [\d.]+ \w+ of memory \(weights .*, entries .*, index .*\)")

    def test_what_was_dropped_is_made_anew_between_repetitions(self):
        for policy in ("window", "h2o"):
            _, result = self.bench("--context", 400, "--gen", 4, "--repeat", 3, "--no-prefill-repeat", "--policy", policy, "--budget", 20)
            self.assertEqual(len(result["rows"][0]["decode_tokens_per_second"]["samples"]), 3)

    def test_what_cannot_be_done_is_said(self):
        self.wrong(says="no model")
        self.wrong("--model", MODEL, "--shape", "llama-2-7b", says="exclude each other")
        self.wrong("--shape", "llama-2-7b", says="--shape needs --random-weights SEED")
        self.wrong("--shape", "llama-9", "--random-weights", 1, says="smollm2-135m", status=1)
        self.wrong("--model", MODEL, "--context", "1,,2", says="--context '1,,2': must be a whole number")
        self.wrong("--model", MODEL, "--batch", "0", says="--batch must be at least 1")
        self.wrong("--model", MODEL, "--select", "0.1", says="--select needs --policy infinigen")
        self.wrong("--model", MODEL, "--kv-tier", "file", "--kv-file", "x", "--kv-keep", says="--kv-keep has no use here")
        self.wrong("--model", MODEL, "--compare", "policy=full", "--interactive", says="exclude each other")
        self.wrong("--model", MODEL, "--compare", "policy=lru", says="--policy 'lru'")
        self.wrong("--model", MODEL, "--gen", "0", says="--gen must be at least 1")
        self.wrong("--model", MODEL, "--context", "8,9", "--timeline", "x.json", says="--timeline is of one step")
        with tempfile.TemporaryDirectory() as folder:
            self.wrong("--model", MODEL, "--device", "cpu", "--timeline", Path(folder) / "x.json",
                       "--context", "8", "--gen", "2", says="does not measure its operations", status=1)
        self.wrong("--model", MODEL, "--policy", "infinigen", "--replay", "/nowhere/trace", "--context", "8",
                   says="/nowhere/trace", status=1)
        self.wrong("--model", MODEL, "--context", "8", "--json", "/nowhere/x.json", says="/nowhere/x.json: cannot create it", status=1)


if __name__ == "__main__":
    unittest.main()
