import importlib.util
import json
import subprocess
import sys
import tempfile
import unittest
import xml.etree.ElementTree
from pathlib import Path

from tool import DATA

SCRIPT = DATA.parent.parent / "tools" / "timeline.py"
spec = importlib.util.spec_from_file_location("timeline", SCRIPT)
timeline = importlib.util.module_from_spec(spec)
spec.loader.exec_module(timeline)

SVG = "{http://www.w3.org/2000/svg}"


def operation(name, stream, begin, length, cat="compute"):
    return {"name": name, "cat": cat, "ph": "X", "pid": 0, "tid": stream, "ts": begin, "dur": length}


TRACE = [
    {"name": "process_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "a device"}},
    {"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "main"}},
    {"name": "thread_name", "ph": "M", "pid": 0, "tid": 1, "args": {"name": "side 1"}},
    operation("norm", 0, 0, 10),
    operation("matvec_bf16_1x1", 0, 10, 490),
    operation("slots_gather_16", 1, 20, 300, "fetch"),
    operation("slots_admit_bf16", 0, 500, 500),
]


class TimelineTest(unittest.TestCase):
    def draw(self, *arguments, events=TRACE, status=0):
        with tempfile.TemporaryDirectory() as folder:
            trace, picture = Path(folder) / "step.json", Path(folder) / "step.svg"
            trace.write_text(json.dumps({"traceEvents": events}))
            done = subprocess.run([sys.executable, SCRIPT, trace, picture, *arguments], capture_output=True, text=True)
            self.assertEqual(done.returncode, status, done.stderr)
            return done.stderr if status else xml.etree.ElementTree.parse(picture).getroot()

    def titles(self, picture):
        return [title.text for title in picture.iter(f"{SVG}title")]

    def test_every_operation_is_drawn(self):
        picture = self.draw("--title", "A <step>")
        words = [text.text for text in picture.iter(f"{SVG}text")]
        self.assertIn("A <step>", words)
        self.assertIn("a device; a step of 1.00 ms; link busy 30.0% of the step", words)
        for lane in ("compute", "fetch stream", "link", "store"):
            self.assertIn(lane, words)
        # What fetches is in its stream and in the link's lane, what stores in its stream and in the store's.
        names = sorted(title.split(":")[0] for title in self.titles(picture))
        self.assertEqual(names, sorted(["norm", "matvec_bf16_1x1"] + 2 * ["slots_gather_16", "slots_admit_bf16"]))

    def test_a_part_is_drawn(self):
        titles = self.titles(self.draw("--from", "0.35", "--to", "0.6"))
        self.assertEqual({title.split(":")[0] for title in titles}, {"matvec_bf16_1x1", "slots_admit_bf16"})

    def test_spans_that_overlap_count_once(self):
        self.assertEqual(timeline.busy([(4, 6), (0, 2), (1, 1.5), (5, 7)]), 5)

    def test_nothing_to_draw(self):
        self.assertIn("has no operation", self.draw(events=TRACE[:3], status=2))
        self.assertIn("nothing lies between", self.draw("--from", "2", "--to", "1", status=2))


if __name__ == "__main__":
    unittest.main()
