import json
import math
import tempfile
import unittest
from pathlib import Path

from tool import DATA, MODEL, CommonTests, ToolTest

TOKENS = [(i * 37 + 11) % 320 for i in range(120)]


class EvaluateTest(CommonTests, ToolTest):
    name = "kva-evaluate"

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def file(self, content):
        path = self.folder / f"{len(list(self.folder.iterdir()))}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def evaluate(self, *arguments):
        answer = self.folder / "answer.json"
        out, _ = self.run_tool("--model", MODEL, "--dtype", "f32", *arguments, "--json", answer)
        result = json.loads(answer.read_text())
        self.assertIn(f"mean NLL    {result['mean_nll']:.4f}", out)
        return result

    def test_an_array_and_an_object_say_the_same(self):
        one = self.evaluate("--token-ids", self.file(TOKENS))
        two = self.evaluate("--token-ids", self.file({"name": "x", "token_ids": TOKENS, "nll": []}))
        self.assertEqual(one["nll"], two["nll"])
        self.assertEqual(len(one["nll"]), len(TOKENS) - 1)
        self.assertEqual(one["positions"], len(TOKENS) - 1)

    def test_the_mean_is_over_positions_from_prefill_on(self):
        file = self.file(TOKENS)
        for prefill in (0, 1, 50, len(TOKENS) - 2):
            result = self.evaluate("--token-ids", file, "--prefill", prefill)
            rest = result["nll"][prefill:]
            self.assertEqual(result["positions"], len(rest))
            self.assertAlmostEqual(result["mean_nll"], math.fsum(rest) / len(rest), places=9)
            self.assertAlmostEqual(result["perplexity"], math.exp(result["mean_nll"]), places=6)
        self.wrong("--model", MODEL, "--token-ids", file, "--prefill", len(TOKENS) - 1, says="P is at most 118")

    def test_steps_give_what_chunks_give(self):
        file = self.file(TOKENS)
        chunks = self.evaluate("--token-ids", file)["nll"]
        for prefill in (0, 1, 60):
            steps = self.evaluate("--token-ids", file, "--prefill", prefill, "--stepwise")["nll"]
            self.assertEqual(len(steps), len(chunks))
            self.assertLess(max(abs(a - b) for a, b in zip(steps, chunks)), 1e-4)

    def test_a_text(self):
        result = self.evaluate("--text", self.file("It is a truth universally acknowledged, that a tiny model is wrong."))
        self.assertEqual(result["tokens"], result["positions"] + 1)
        self.assertGreater(result["mean_nll"], 0)

    def test_what_cannot_be_done_is_said(self):
        model = ("--model", MODEL)
        self.wrong(*model, says="nothing to evaluate: give --text FILE or --token-ids FILE")
        self.wrong(*model, "--text", "a", "--token-ids", "b", says="exclude each other")
        self.wrong(*model, "--text", "/nowhere/text", says="/nowhere/text: cannot open it", status=1)
        self.wrong(*model, "--token-ids", self.file(TOKENS), "--json", "/nowhere/x", says="cannot create it", status=1)
        binary = DATA / "gguf" / "smollm2.gguf"
        self.wrong(*model, "--text", binary, says=f"{binary}: text is not UTF-8", status=1)
        for content, says in (
            ("{", "not JSON"),
            ("{}", "an object whose token_ids is one"),
            ("[1, -2]", "token_ids[1] is -2"),
            ('[1, "two"]', 'token_ids[1] is "two"'),
            ("[1, 4294967296]", "token_ids[1] is 4294967296"),
            ("[1]", "1 tokens; at least 2 are needed"),
            ("[1, 320]", "320"),
            (json.dumps([1] * 600), "600"),
        ):
            file = self.file(content)
            self.wrong(*model, "--token-ids", file, says=says, status=1)


if __name__ == "__main__":
    unittest.main()
