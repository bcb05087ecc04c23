import signal
import subprocess
import unittest

from tool import CONTEXT, MODEL, CommonTests, ToolTest


class GenerateTest(CommonTests, ToolTest):
    name = "kva-generate"
    basic = ("--model", MODEL, "--dtype", "f32", "--prompt", "Once upon a time")

    def test_streams_text_and_tells_the_speed(self):
        out, err = self.run_tool(*self.basic, "-n", 8)
        self.assertTrue(out.endswith("\n"))
        self.assertRegex(err, r"prefill +\d+ tokens in +[\d.]+ s +[\d.]+ tokens/s")
        self.assertRegex(err, r"decode +\d+ tokens in +[\d.]+ s +[\d.]+ tokens/s")

    def test_greedy_and_seeded_texts_repeat(self):
        for flags in ((), ("--temperature", "1.5", "--seed", "7", "--top-k=50", "--top-p", "0.95", "--min-p", "0.01")):
            first, second = (self.run_tool(*self.basic, "-n", 16, *flags)[0] for _ in range(2))
            self.assertEqual(first, second)
        other = self.run_tool(*self.basic, "-n", 16, "--temperature", "1.5", "--seed", "8")[0]
        self.assertNotEqual(first, other)

    def test_penalties_are_taken(self):
        flags = ("--repetition-penalty", "1.3", "--frequency-penalty", "0.5", "--presence-penalty", "0.5")
        self.assertNotEqual(self.run_tool(*self.basic, "-n", 24)[0], self.run_tool(*self.basic, "-n", 24, *flags)[0])

    def test_prompt_from_a_file_or_standard_input(self):
        model = ("--model", MODEL, "--dtype", "f32", "-n", 8)
        expected = self.run_tool(*self.basic, "-n", 8)[0]
        self.assertEqual(self.run_tool(*model, "--prompt-file", "-", input="Once upon a time")[0], expected)
        self.wrong(*model, "--prompt-file", "/nowhere/prompt", says="/nowhere/prompt: cannot open it", status=1)

    def test_chat_puts_the_prompt_in_the_template(self):
        _, plain = self.run_tool(*self.basic, "-n", 1)
        _, chat = self.run_tool(*self.basic, "-n", 1, "--chat")
        _, with_system = self.run_tool(*self.basic, "-n", 1, "--chat", "--system", "You are terse and kind.")
        prefilled = [int(err.split("prefill")[1].split()[0]) for err in (plain, chat, with_system)]
        self.assertEqual(len(set(prefilled)), 3, prefilled)
        self.assertLess(prefilled[0], prefilled[1])

    def test_stop_strings_end_the_text_and_are_not_in_it(self):
        whole = self.run_tool(*self.basic, "-n", 24)[0]
        stop = whole[4:7]
        out, err = self.run_tool(*self.basic, "-n", 24, "--stop", "never to be seen", "--stop", stop, "--stats")
        self.assertEqual(out.rstrip("\n"), whole[: whole.index(stop)].rstrip("\n"))
        self.assertIn("a stop string", err)

    def test_stats_say_why_it_ended_and_what_it_took(self):
        _, err = self.run_tool(*self.basic, "-n", 4, "--stats")
        for word in ("ended    the token limit", "model    llama", "backend ", "KV       full, ", "memory "):
            self.assertIn(word, err)

    def test_context_bounds_the_session(self):
        _, err = self.run_tool(*self.basic, "--context", 24, "--stats", "--stop", "never to be seen")
        self.assertRegex(err, r"of 24 tokens held")
        self.wrong(*self.basic, "--context", CONTEXT + 1, says=str(CONTEXT), status=1)
        self.wrong(*self.basic, "--context", 2, says="2", status=1)

    def test_interrupt_still_prints_the_speed(self):
        command = [self.program(), *self.basic, "--stop", "never to be seen"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertTrue(process.stdout.read(1))  # it is in the middle of the text
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        # On a fast machine it may have been done before the signal came.
        self.assertIn(process.returncode, (130, 0), err)
        self.assertIn(b"decode", err)

    def test_what_cannot_be_done_is_said(self):
        self.wrong("--prompt", "x", says="no model: give --model PATH")
        self.wrong(says="no model: give --model PATH")
        self.wrong("--model", MODEL, says="no prompt: give --prompt TEXT or --prompt-file FILE")
        self.wrong(*self.basic, "--prompt-file", "x", says="exclude each other")
        self.wrong(*self.basic, "--system", "x", says="--system needs --chat")
        self.wrong("--model", "/nowhere/model.gguf", "--prompt", "x", says="/nowhere/model.gguf", status=1)
        self.wrong("--model", __file__, "--prompt", "x", says=__file__, status=1)
        self.wrong(*self.basic, "--temperature", "warm", says="--temperature 'warm': must be a number")
        self.wrong(*self.basic, "--policy", "window", "--select", "0.1", says="--select needs --policy infinigen")
        self.wrong(*self.basic, "--policy", "window", "--budget", "2", says="budget is 2 tokens", status=1)
        self.wrong(*self.basic, "--calibration", "/nowhere/text", says="/nowhere/text: cannot open it", status=1)
        self.wrong(*self.basic, "--top-p", "-1", says="top_p", status=1)


if __name__ == "__main__":
    unittest.main()
