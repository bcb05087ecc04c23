#!/usr/bin/env bash
# The main job on the real model: kva-generate, a C++ program linked against libkvahead.so, reads a long document and
# answers a question about it, first with all KV in RAM and every token attended, then with KV in a file, a small part of it on the
# device, and speculation saying what to fetch. `make demo` runs this after its set-up.
set -euo pipefail
cd "$(dirname "$0")/.."

document=tests/data/demo/document.txt
question="What is the shelf number of this volume in the harbour archive?"

answer() {
    { cat "$document"; echo; echo "$question"; } |
        build/cpp/bin/kva-generate --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --chat --prompt-file - -n 64 --stats "$@"
}

echo "Document: $document ($(wc -w <$document) words of Jane Austen's Persuasion, with an archivist's note somewhere inside)"
echo "Question: $question"
echo
echo "== Exact: every token attended, all KV in RAM"
answer --policy full
echo
echo "== InfiniGen: KV in a file, a tenth of it on the device, the rest fetched as speculation selects it"
echo "   (the first time, the model is calibrated for it, which takes about 20 seconds; the result is kept in .cache/)"
answer --policy infinigen --kv-tier file --cache 10%
