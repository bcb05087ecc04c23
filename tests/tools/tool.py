"""What the tests of the tools share. Standard library only."""

import os
import subprocess
import unittest
from pathlib import Path

DATA = Path(os.environ["KVAHEAD_TEST_DATA"])
MODEL = str(DATA / "golden" / "smollm2")
CONTEXT = 512  # the tiny model's


class ToolTest(unittest.TestCase):
    """`name` is the program."""

    name: str

    def program(self):
        return str(Path(os.environ["KVAHEAD_TOOLS"]) / self.name)

    def run_tool(self, *arguments, status=0, input=None):
        """Runs it, checks its exit status, and returns what it wrote: (stdout, stderr)."""
        done = subprocess.run(
            [self.program(), *map(str, arguments)], input=input, capture_output=True, text=True, timeout=300
        )
        self.assertEqual(done.returncode, status, f"{arguments}\nstdout: {done.stdout}\nstderr: {done.stderr}")
        return done.stdout, done.stderr

    def wrong(self, *arguments, says, status=2):
        """A command line that is refused, with an error that names the program and contains `says`."""
        out, err = self.run_tool(*arguments, status=status)
        self.assertEqual(out, "")
        self.assertTrue(err.startswith(f"{self.name}: "), err)
        self.assertIn(says, err)
        if status == 2:
            self.assertIn(f"Try '{self.name} --help'.", err)


class CommonTests:
    """Mixed into the test of every tool."""

    def test_help_lists_the_flags(self):
        for flag in ("--help", "-h"):
            out, err = self.run_tool(flag)
            self.assertIn(f"Usage: {self.name}", out)
            self.assertIn("--model PATH", out)
            self.assertEqual(err, "")
            self.assertLessEqual(max(map(len, out.splitlines())), 120)

    def test_version(self):
        out, _ = self.run_tool("--version")
        self.assertRegex(out, rf"^{self.name} \d+\.\d+\.\d+ \(library \d+\.\d+\.\d+\)\n$")

    def test_wrong_flags(self):
        self.wrong("--modle", "x", says="unknown option --modle (did you mean --model?)")
        self.wrong("--model", says="--model needs a value")
        self.wrong("stray", says="unexpected argument 'stray'")
        self.wrong("--dtype", "f8", says="--dtype 'f8': must be one of auto|f32|f16|bf16")
        self.wrong("--dtype=f8", says="--dtype 'f8'")
        for number in ("-1", "1.5", "two", "", "99999999999999999999"):
            self.wrong("--threads", number, says=f"--threads '{number}': must be a whole number")
