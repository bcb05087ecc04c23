#!/usr/bin/env python3
"""llama.cpp through its C API, as one process that is told what to measure.

    llama_peer.py serve    --model M.gguf ...   one JSON request a line in, one JSON answer a line out
    llama_peer.py generate --model M.gguf ...   greedy text, to see that a model file is sound

`serve` knows these requests (depth 0 is the empty context):
    {"op": "describe"}                              -> versions, system_info, which buffers hold the weights
    {"op": "fill", "depth": D}                      -> prefill a context to depth D and keep it
    {"op": "prefill", "tokens": P}                  -> prefill P tokens into the empty context
    {"op": "decode", "depth": D, "tokens": N}       -> N one-token steps from depth D, then cut back to D
Measurements answer {"tokens", "seconds", "others"}; see contention.py for `others`. A failed request
answers {"error"}. The process ends at end of input.

The clock runs over llama_decode and llama_synchronize only: no sampling, no copy of the logits into
Python, logits for the last token of a prefill and for each decoded token, as a generation loop needs them.
Every depth has a context of its own, so a depth is prefilled once per process, and its attention never
walks cells that belong to another depth.
"""

import argparse
import ctypes
import json
import os
import sys

import llama_cpp

from contention import Contention

KV_TYPES = {"f16": 1, "bf16": 30, "f32": 0, "q8_0": 8}  # enum ggml_type

# Log lines worth keeping: where the weights and the KV cache went, and whether flash attention is on.
LOG_WORTH_KEEPING = ("buffer size", "flash_attn")


class LlamaError(Exception):
    """A call into llama.cpp failed."""


class Model:
    def __init__(self, path, repack):
        self.log = []
        # Held as an attribute: llama.cpp keeps the pointer for the life of the process.
        self._log_callback = llama_cpp.llama_log_callback(self._on_log)
        llama_cpp.llama_log_set(self._log_callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = repack
        self.pointer = llama_cpp.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self.pointer:
            raise LlamaError(f"{path}: llama.cpp cannot load it\n" + "".join(self.log))
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.pointer)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def _on_log(self, level, text, _user_data):
        text = text.decode("utf-8", "replace")
        if level in (3, 4):  # warning, error
            sys.stderr.write(text)
        self.log.append(text)

    def notable_log(self):
        lines = "".join(self.log).splitlines()
        return [line for line in lines if any(word in line for word in LOG_WORTH_KEEPING)]

    def tokenize(self, text):
        data = text.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 8))()
        count = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), tokens, len(tokens), True, True)
        if count < 0:
            raise LlamaError(f"llama_tokenize returned {count}")
        return list(tokens[:count])

    def piece(self, token):
        room = ctypes.create_string_buffer(256)
        count = llama_cpp.llama_token_to_piece(self.vocabulary, token, room, len(room), 0, True)
        return room.raw[: max(count, 0)]


class Context:
    """One sequence. `depth` tokens are in its KV cache."""

    def __init__(self, model, options):
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = options.n_ctx
        parameters.n_batch = parameters.n_ubatch = options.batch
        parameters.n_seq_max = 1
        parameters.n_threads = parameters.n_threads_batch = options.threads
        parameters.flash_attn_type = {"on": 1, "off": 0}[options.flash]
        parameters.type_k = parameters.type_v = KV_TYPES[options.kv_type]
        parameters.no_perf = True
        self.model = model
        self.pointer = llama_cpp.llama_init_from_model(model.pointer, parameters)
        if not self.pointer:
            raise LlamaError("llama_init_from_model failed\n" + "".join(model.log[-20:]))
        self.memory = llama_cpp.llama_get_memory(self.pointer)
        self.batch_size = options.batch
        self.batch = llama_cpp.llama_batch_init(options.batch, 0, 1)
        self.depth = 0

    def decode(self, tokens):
        """Append `tokens`, at most one batch a call to llama_decode; logits for the last one only."""
        batch = self.batch
        last = len(tokens) - 1
        for start in range(0, len(tokens), self.batch_size):
            chunk = tokens[start : start + self.batch_size]
            for i, token in enumerate(chunk):
                batch.token[i] = token
                batch.pos[i] = self.depth + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = start + i == last
            batch.n_tokens = len(chunk)
            code = llama_cpp.llama_decode(self.pointer, batch)
            if code != 0:
                raise LlamaError(f"llama_decode returned {code} at depth {self.depth}")
            self.depth += len(chunk)
        llama_cpp.llama_synchronize(self.pointer)

    def cut(self, depth):
        """Forget every token from position `depth` on."""
        if depth == 0:
            llama_cpp.llama_memory_clear(self.memory, False)
        elif not llama_cpp.llama_memory_seq_rm(self.memory, 0, depth, -1):
            raise LlamaError(f"llama_memory_seq_rm refused to cut at {depth}")
        self.depth = depth

    def most_likely(self):
        logits = llama_cpp.llama_get_logits_ith(self.pointer, -1)
        return max(range(self.model.vocabulary_size), key=logits.__getitem__)


class Server:
    def __init__(self, model, options):
        self.model = model
        self.options = options
        self.contexts = {0: Context(model, options)}

    def tokens(self, count):
        """`count` token ids, always the same: a dense model takes as long over any of them."""
        ids, state = [], 1
        for _ in range(count):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            ids.append((state >> 33) % self.model.vocabulary_size)
        return ids

    def timed(self, context, calls):
        """Time `calls`, lists of tokens, each appended by one Context.decode.

        One untimed step goes first: the process measured before this one has had the caches, and the
        clock rate may have dropped in between.
        """
        depth = context.depth
        context.decode(calls[0][:1])
        context.cut(depth)
        with Contention() as clock:
            for tokens in calls:
                context.decode(tokens)
        return {"tokens": sum(map(len, calls)), "seconds": clock.seconds, "others": clock.others}

    def describe(self):
        return {
            "llama_cpp_python": llama_cpp.__version__,
            "system_info": llama_cpp.llama_print_system_info().decode(),
            "log": self.model.notable_log(),
        }

    def fill(self, depth):
        self.contexts[depth] = Context(self.model, self.options)
        return self.timed(self.contexts[depth], [self.tokens(depth)])

    def prefill(self, tokens):
        context = self.contexts[0]
        context.cut(0)
        return self.timed(context, [self.tokens(tokens)])

    def decode(self, depth, tokens):
        context = self.contexts[depth]
        context.cut(depth)
        return self.timed(context, [[token] for token in self.tokens(tokens)])

    def serve(self, requests, answers):
        operations = {name: getattr(self, name) for name in ("describe", "fill", "prefill", "decode")}
        for line in requests:
            request = json.loads(line)
            try:
                answer = operations[request.pop("op")](**request)
            except (LlamaError, KeyError, TypeError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers, flush=True)


def generate(model, options):
    context = Context(model, options)
    context.decode(model.tokenize(options.prompt))
    text = b""
    for _ in range(options.tokens):
        token = context.most_likely()
        if llama_cpp.llama_vocab_is_eog(model.vocabulary, token):
            break
        text += model.piece(token)
        context.decode([token])
    print(text.decode("utf-8", "replace"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    serving = commands.add_parser("serve")
    generating = commands.add_parser("generate")
    for command in (serving, generating):
        command.add_argument("--model", required=True)
        command.add_argument("--flash", choices=("on", "off"), default="on", help="flash attention")
        command.add_argument("--repack", choices=("on", "off"), default="on", help="llama.cpp's extra weight buffers")
        command.add_argument("--kv-type", choices=KV_TYPES, default="f16")
        command.add_argument("--n-ctx", type=int, default=8192)
        command.add_argument("--batch", type=int, default=512, help="n_batch and n_ubatch")
        command.add_argument("--threads", type=int, default=2)
    generating.add_argument("--prompt", required=True)
    generating.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()

    try:
        model = Model(options.model, options.repack == "on")
        if options.command == "generate":
            generate(model, options)
        else:
            Server(model, options).serve(sys.stdin, sys.stdout)
    except LlamaError as error:
        sys.exit(f"llama_peer.py: {error}")


if __name__ == "__main__":
    main()
