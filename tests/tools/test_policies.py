"""What the tools share about policies: flags, grids, traces, heat maps, plots."""

import csv
import json
import re
import tempfile
import unittest
import xml.etree.ElementTree as xml
from pathlib import Path

from tool import MODEL, ToolTest
from trace_file import record, trace

TOKENS = [(i * 37 + 11) % 320 for i in range(200)]
GREY = "#d8d8d8"  # nothing was speculated
SVG = "{http://www.w3.org/2000/svg}"


class PolicyTest(ToolTest):
    name = "kva-evaluate"

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.tokens = self.file("tokens.json", json.dumps(TOKENS))
        self.basic = ("--model", MODEL, "--dtype", "f32", "--token-ids", self.tokens)

    def file(self, name, content):
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


class FlagTest(PolicyTest):
    def test_every_tool_has_them(self):
        for self.name in ("kva-evaluate", "kva-bench", "kva-generate"):
            out, _ = self.run_tool("--help")
            for flag in ("--policy full|int4|h2o|window|infinigen", "--kv-tier device|ram|file", "--budget SHARE|TOKENS", "--select SHARE",
                         "--cache SHARE|TOKENS", "--trace FILE", "--eviction off|fifo|lru|counter"):
                self.assertIn(flag, out)
            self.wrong("--policy", "lru", says="--policy 'lru': must be one of full|int4|h2o|window|infinigen")
            self.wrong("--index-bits", "5", says="must be one of 4|8|32")

    def test_budgets(self):
        right = "must be a share of the tokens (0.2 or 20%) or a whole number of tokens (512)"
        for budget in ("", "x", "-1", "1.5", "101%", "%", "nan", "inf", "1e999", "99999999999999999999", "2 0"):
            self.wrong(*self.basic, "--policy", "window", "--budget", budget, says=f"--budget '{budget}': {right}")

    def test_a_flag_without_a_use_is_refused(self):
        for flags, says in (
            (("--budget", "0.1"), "--budget needs --policy window or h2o"),
            (("--policy", "infinigen", "--budget", "0.1"), "--budget needs --policy window or h2o (infinigen has --select"),
            (("--sinks", "4"), "--sinks needs --policy window or infinigen"),
            (("--policy", "h2o", "--resident-layers", "1"), "--resident-layers needs --policy window or infinigen"),
            (("--select", "0.1"), "--select needs --policy infinigen"),
            (("--policy", "h2o", "--alpha", "4"), "--alpha needs --policy infinigen"),
            (("--no-attend-cache",), "--no-attend-cache needs --policy infinigen"),
            (("--no-tail",), "--no-tail needs --policy infinigen"),
            (("--correct", "0.01"), "--correct needs --policy infinigen"),
            (("--policy", "window", "--eviction", "lru"), "--eviction needs --policy infinigen"),
            (("--policy", "window", "--pool-tokens", "99"), "--pool-tokens needs --policy infinigen"),
            (("--policy", "infinigen", "--select", "0.1", "--cap", "0.1"), "--cap needs --probability, --alpha or --replay"),
            (("--policy", "infinigen", "--select", "0.1", "--alpha", "4"), "exclude each other"),
            (("--policy", "infinigen", "--select", "0.1", "--replay", "x"), "exclude each other"),
            (("--policy", "window", "--replay", "x"), "--replay needs --policy infinigen"),
            (("--kv-file", "x"), "--kv-file needs --kv-tier file"),
            (("--kv-buffered",), "--kv-buffered needs --kv-tier file"),
            (("--kv-tier", "file", "--kv-keep"), "--kv-keep needs --kv-tier file and --kv-file PATH"),
        ):
            self.wrong(*self.basic, *flags, says=says)

    def test_the_library_checks_ranges(self):
        for flags, says in (
            (("--policy", "window", "--budget", "4"), "budget is 4 tokens"),
            (("--policy", "infinigen", "--select", "0"), "select_share is 0"),
            (("--policy", "infinigen", "--eviction", "fifo", "--pool-tokens", "68"), "pool_tokens is 68"),
            (("--policy", "infinigen", "--select", "2"), "select_share is 2"),
            (("--policy", "infinigen", "--ratio", "0"), "ratio is 0"),
            (("--policy", "infinigen", "--correct", "1.5"), "correct is 1.5"),
            (("--policy", "infinigen", "--resident-layers", "0"), "resident_layers is 0"),
        ):
            self.wrong(*self.basic, *flags, says=says, status=1)

    def test_the_json_has_all_settings(self):
        answer = self.folder / "answer.json"
        self.run_tool(*self.basic, "--stepwise", "--prefill", 190, "--json", answer)
        result = json.loads(answer.read_text())
        self.assertEqual(result["options"]["policy"], "full")
        self.assertEqual(result["options"]["kv_tier"], "device")
        for key in ("kv_fraction_selected", "kv_fraction_attended", "hit_rate", "misses_per_step_fraction"):
            self.assertIn(key, result)
        self.assertEqual(result["bytes_fetched"], {"host": 0, "file": 0, "file_read": 0})
        self.assertEqual((result["evicted"], result["corrected"]), (0, 0))
        self.assertGreater(result["kv_bytes"]["device"], 0)


class SweepTest(PolicyTest):
    def sweep(self, *arguments, status=0):
        """(stdout, stderr, rows of the CSV, the plot)"""
        table, picture = self.folder / "sweep.csv", self.folder / "sweep.svg"
        out, err = self.run_tool(*self.basic, "--prefill", 150, "--csv", table, "--svg", picture, *arguments, status=status)
        with open(table, newline="") as file:
            return out, err, list(csv.DictReader(file)), xml.parse(picture).getroot()

    def test_a_grid(self):
        answer = self.folder / "answer.json"
        out, _, rows, picture = self.sweep(
            "--stepwise", "--sweep", "policy=full;kv-dtype=f32,f16,bf16", "--sweep", "policy=full", "--json", answer
        )
        self.assertEqual([row["kv_dtype"] for row in rows], ["f32", "f16", "bf16", "auto"])
        self.assertEqual([row["label"] for row in rows], [f"full, kv-dtype {t}" for t in ("f32", "f16", "bf16")] + ["full"])
        self.assertEqual(rows[0]["mean_nll"], rows[3]["mean_nll"])
        self.assertNotEqual(rows[0]["mean_nll"], rows[2]["mean_nll"])
        for row in rows:
            self.assertEqual(row["positions"], "49")
            self.assertIn(f"{float(row['mean_nll']):.4f}", out)
        results = json.loads(answer.read_text())["results"]
        self.assertEqual([len(result["nll"]) for result in results], [len(TOKENS) - 1] * 4)
        self.assertEqual((picture.get("width"), picture.get("height")), ("800", "500"))
        words = [text.text for text in picture.iter(f"{SVG}text")]
        self.assertIn("perplexity", words)
        self.assertIn("full", words)
        self.assertTrue(any("relative KV size" in word for word in words), words)

    def test_a_file_of_grids(self):
        grids = self.file("grids.json", json.dumps(["policy=full", {"policy": "full", "kv-dtype": ["f16", "bf16"], "no-attend-cache": False}]))
        _, _, rows, _ = self.sweep("--sweep", grids)
        self.assertEqual([row["kv_dtype"] for row in rows], ["auto", "f16", "bf16"])

    def test_a_point_that_fails_does_not_stop_the_others(self):
        _, err, rows, _ = self.sweep("--sweep", "policy=window;budget=3", "--sweep", "policy=full", status=1)
        self.assertEqual([row["policy"] for row in rows], ["full"])
        self.assertIn("window, budget 3: ", err)
        self.assertIn("budget is 3 tokens", err)
        self.assertIn("1 of 2 evaluations failed", err)

    def test_what_cannot_be_done_is_said(self):
        for specification, says in (
            ("policy=lru", "--policy 'lru': must be one of"),
            ("polcy=full", "unknown option --polcy (did you mean --policy?)"),
            ("policy=full;", "has an empty setting"),
            ("policy=full;kv-dtype", "--kv-dtype needs a value"),
            ("policy=infinigen;no-attend-cache=1", "--no-attend-cache takes no value"),
            ("policy=full;select=0.1", "--select needs --policy infinigen"),
            ("model=x", "unknown option --model"),
        ):
            self.wrong(*self.basic, "--sweep", specification, says=says)
        self.wrong(*self.basic, "--csv", "x", says="--csv needs --sweep SPEC")
        self.wrong(*self.basic, "--svg", "x", says="--svg needs --sweep SPEC")
        self.wrong(*self.basic, "--sweep", "/nowhere/grid", says="/nowhere/grid: cannot open it", status=1)
        for content, says in (("{}", "must be a JSON array"), ("[1]", "neither an object nor a string"),
                              ('[{"policy": []}]', "has no values"), ('[{"policy": {}}]', "is not a value")):
            self.wrong(*self.basic, "--sweep", self.file("bad.json", content), says=says)


class HeatmapTest(PolicyTest):
    def heatmap(self, content, *arguments):
        picture = self.folder / "map.svg"
        self.run_tool("--read-trace", self.file("trace", content), "--heatmap", picture, *arguments)
        return picture.read_text()

    def cells(self, picture):
        """Colours of the cells, by (x, y), from left to right and top to bottom."""
        found = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" fill="(#\w{6})"', picture)
        cells = [(float(y), float(x), fill) for x, y, _, height, fill in found if 64 <= float(x) < 684 and float(y) >= 46 and fill != GREY]
        return [fill for _, _, fill in sorted(cells)]

    def records(self):
        # Layer 0 is resident. Layer 1 fetches nothing, then all; layer 2 all, then half.
        return [
            record(4, 1, 0, 4, [0, 1], []),
            record(4, 2, 0, 4, [0, 1, 2, 3], [0, 1, 2, 3]),
            record(5, 1, 0, 4, [0, 1, 2, 3], [0, 1, 2, 3]),
            record(5, 2, 0, 4, [0, 1, 2, 3], [0, 1], [1]),
        ]

    def test_steps(self):
        cells = self.cells(self.heatmap(trace(3, 1, self.records())))
        none, most, half = "#fffff5", "#46001e", "#fc8d3c"
        self.assertEqual(cells, [none, most, most, half])

    def test_positions(self):
        # Of layer 2, both steps fetch rows 0 and 1, one of them 2 and 3, and row 4 was never fetched.
        cells = self.cells(self.heatmap(trace(3, 1, self.records()), "--heatmap-by", "position"))
        none, most, half = "#fffff5", "#46001e", "#fc8d3c"
        self.assertEqual(cells, [half, half, half, half, none, most, most, half, half, none])

    def test_many_steps_share_columns(self):
        records = [record(step, layer, head, step, [0, step - 1], [step - 1])
                   for step in range(100, 1100) for layer in (1, 2) for head in (0, 1)]
        picture = self.heatmap(trace(30, 2, records))
        self.assertEqual(len(self.cells(picture)), 200)
        self.assertIn(">100</text>", picture)
        self.assertIn(">1099</text>", picture)

    def test_damaged_traces(self):
        good = trace(3, 1, self.records())
        for content, says in (
            (b"", "ends in the middle"),
            (good[:10], "ends in the middle"),
            (good[:-1], "ends in the middle"),
            (good[:24], "not one record"),
            (trace(3, 1, [], magic=b"KVATRICE"), "does not begin with KVATRACE"),
            (trace(3, 1, [], version=1), "version 1"),
            (trace(1 << 31, 1, []), "more layers"),
            (trace(3, 1, [record(4, 3, 0, 4, [], [])]), "layer 3"),
            (trace(3, 1, [record(4, 0, 1, 4, [], [])]), "KV head 1"),
            (trace(3, 1, [record(4, 1, 0, 1, [0, 1], [])]), "2 selected of 1"),
            (trace(3, 1, [record(4, 1, 0, 4, [1, 0], [])]), "row 0 is not above"),
            (trace(3, 1, [record(4, 1, 0, 4, [1, 1], [])]), "row 1 is not above"),
            (trace(3, 1, [record(4, 1, 0, 4, [4], [])]), "below 4"),
        ):
            file = self.file("trace", content)
            self.wrong("--read-trace", file, "--heatmap", self.folder / "map.svg", says=says, status=1)

    def test_what_cannot_be_done_is_said(self):
        self.wrong("--read-trace", "x", says="--read-trace needs --heatmap FILE")
        self.wrong("--read-trace", "/nowhere/trace", "--heatmap", "y", says="/nowhere/trace: cannot open it", status=1)
        self.wrong(*self.basic, "--heatmap", "x", says="--heatmap needs --policy infinigen")
        self.wrong(*self.basic, "--heatmap", "x", "--sweep", "policy=full", says="--heatmap shows one evaluation")


if __name__ == "__main__":
    unittest.main()
