#!/usr/bin/env bash
# The main job on the real model: kva-generate, a C++ program linked against libkvahead.so, reads a long document and
# answers a question about it. `make demo` runs this after its set-up.
set -euo pipefail
cd "$(dirname "$0")/.."

document=tests/data/demo/document.txt
question="What is the shelf number of this volume in the harbour archive?"

echo "Document: $document ($(wc -w <$document) words of Jane Austen's Persuasion, with an archivist's note somewhere inside)"
echo "Question: $question"
echo
{ cat "$document"; echo; echo "$question"; } |
    build/cpp/bin/kva-generate --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --chat --prompt-file - -n 64 --stats
