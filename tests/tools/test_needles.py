import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tool import DATA, MODEL

SCRIPT = DATA.parent.parent / "tools" / "needles.py"
spec = importlib.util.spec_from_file_location("needles", SCRIPT)
needles = importlib.util.module_from_spec(spec)
spec.loader.exec_module(needles)


class NeedlesTest(unittest.TestCase):
    def test_a_number_at_every_depth(self):
        made = needles.prompts(seed=3, repeats=2, tokens=4096)
        self.assertEqual([depth for depth, _, _ in made], [depth for depth in needles.DEPTHS for _ in range(2)])
        self.assertEqual(len({number for _, number, _ in made}), 10)
        for depth, number, text in made:
            self.assertRegex(number, r"^\d{7}$")
            self.assertEqual(text.count(number), 2)
            self.assertAlmostEqual(text.index(number) / len(text), depth, delta=0.03)
            self.assertTrue(text.endswith(needles.QUESTION))
            self.assertAlmostEqual(len(text) / needles.CHARACTERS_A_TOKEN, 4096, delta=200)

    def test_the_seed_decides(self):
        self.assertEqual(needles.prompts(1, 1, 1000), needles.prompts(1, 1, 1000))
        self.assertNotEqual(needles.prompts(1, 1, 1000), needles.prompts(2, 1, 1000))

    def test_answers(self):
        for said in ("1234567", "The secret number is 1234567.", "1,234,567", "1 234 567!"):
            self.assertTrue(needles.found(said, "1234567"), said)
        for said in ("", "123456", "1234568", "12 and 34567"):
            self.assertFalse(needles.found(said, "1234567"), said)

    def test_a_run(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "answers.json"
            tool = Path(os.environ["KVAHEAD_TOOLS"]) / "kva-generate"
            command = [sys.executable, SCRIPT, "--tool", tool, "--model", MODEL, "--tokens", "120", "--repeats", "1", "--json", file,
                       "policy=full", "policy=full;kv-dtype=f32"]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertRegex(done.stdout, r"(?m)^policy=full;kv-dtype=f32( +[01]/1){5} +\d/5$")
            self.assertEqual(len(json.loads(file.read_text())["answers"]), 10)


if __name__ == "__main__":
    unittest.main()
