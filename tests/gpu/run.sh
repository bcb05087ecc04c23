#!/usr/bin/env bash
# Runs everything that needs a GPU, and prints a table.
#
#   tests/gpu/run.sh                    builds, then runs here
#   tests/gpu/run.sh --pack FILE.tar    builds, and packs what a machine with a GPU needs: it wants no compiler there,
#                                       only `tar xf FILE.tar && kvahead-gpu/run.sh [part ...]`
#
# Parts: operations (each against the CPU backend), golden (logits of every architecture), policies (against each other and
# against naive ones), real (the real model, where .cache holds it), bench (speed; never asserted), and only when asked for
# offload (speed with KV in host memory; wants 140 GB on the device, 110 on the host) and sanitize (the operations under
# compute-sanitizer). Logs go to $OUT, or a temporary folder.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

# Builds into the folder $1.
build() {
    cd "$here/../.."
    mkdir -p "$1"
    # One line of JSON an artifact; of the tests, the file to run.
    cargo test --release --locked --no-run --message-format=json --test cuda --test golden_logits --test policies \
        --test real_model |
        python3 -c '
import json, shutil, sys
for line in sys.stdin:
    artifact = json.loads(line)
    if artifact.get("executable") and artifact["target"]["kind"] == ["test"]:
        shutil.copy(artifact["executable"], sys.argv[1] + "/" + artifact["target"]["name"])
' "$1"
    cargo build --release --locked
    cmake -S bindings/cpp -B build/cpp -DCMAKE_BUILD_TYPE=Release -DKVAHEAD_LIBRARY_DIR="$PWD/target/release" >/dev/null
    cmake --build build/cpp --target kva-bench --target kva-evaluate >/dev/null
    cp target/release/libkvahead.so "$1/libkvahead.so.0"
    for tool in kva-bench kva-evaluate; do cp "$(find build/cpp -name $tool -type f | head -1)" "$1/"; done
    strip "$1"/*
    cp "$here/run.sh" "$1/"
    mkdir -p "$1/root/tests" "$1/root/docs"
    cp -r tests/data "$1/root/tests/"
    cp docs/policies.md "$1/root/docs/"
    if [ -e .cache/SmolLM2-135M-Instruct.Q4_1.gguf ]; then
        mkdir -p "$1/root/.cache"
        cp .cache/SmolLM2-135M-Instruct.Q4_1.gguf "$1/root/.cache/"
    fi
}

if [ "${1:-}" = --pack ]; then
    file=$(realpath -m "${2:?--pack needs a file}")
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    build "$folder/kvahead-gpu"
    tar -C "$folder" -cf "$file" kvahead-gpu
    echo "$file"
    exit
fi
if [ ! -e "$here/libkvahead.so.0" ]; then
    build "$here/../../build/gpu"
    exec "$here/../../build/gpu/run.sh" "$@"
fi

out=${OUT:-$(mktemp -d)}
export KVAHEAD_TEST_DEVICE=cuda KVAHEAD_TEST_ROOT="$here/root" LD_LIBRARY_PATH="$here${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(operations golden policies real bench)
failed=0
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true

# A line of the table: name, seconds, what the test program says last.
run() {
    local name=$1 start status=0
    shift
    start=$(date +%s)
    "$@" >"$out/$name.log" 2>&1 || status=$?
    [ "$status" = 0 ] || failed=1
    printf '%-14s %-7s %4d s  %s\n' "$name" "$([ "$status" = 0 ] && echo ok || echo "FAILED")" $(($(date +%s) - start)) \
        "$(grep -E '^test result|^error|panicked at|SUMMARY' "$out/$name.log" | tail -1 | cut -c1-120)"
}

# Rows of kva-bench: shape, context, batch, steps, policies.
offload() {
    local shape=$1 context=$2 batch=$3 steps=$4 compare=()
    shift 4
    for policy in "$@"; do compare+=(--compare "$policy"); done
    run "$shape-$context-$#" "$here/kva-bench" --device cuda --shape "$shape" --random-weights 1 --dtype bf16 --fill \
        --no-prefill-repeat --context "$context" --batch "$batch" --gen "$steps" --repeat 3 "${compare[@]}"
    sed -n '/^ *context/,$p' "$out/$shape-$context-$#.log"
}

for part in "${parts[@]}"; do
    case $part in
        operations) run operations "$here/cuda" ;;
        golden) run golden "$here/golden_logits" ;;
        # evict:: reads what attention reads, as the CPU backend lets it; device:: and engine:: evict too.
        policies) run policies "$here/policies" --skip evict:: ;;
        real)
            if [ -e "$KVAHEAD_TEST_ROOT/.cache/SmolLM2-135M-Instruct.Q4_1.gguf" ]; then
                run real "$here/real_model" --nocapture
                grep -h "mean NLL" "$out/real.log" || true
            else
                echo "real           skipped: the model was not packed"
            fi
            ;;
        bench)
            for shape in smollm2-135m llama-2-7b; do
                run "bench-$shape" "$here/kva-bench" --device cuda --shape "$shape" --random-weights 1 --dtype bf16 \
                    --context 128,2048 --batch 1,8 --gen 64 --repeat 3
                sed -n '/^ *context/,$p' "$out/bench-$shape.log"
            done
            ;;
        offload)
            # KV in host memory beside KV on the device. Random weights score flat, so what is selected is fixed: 2% of the
            # tokens, of which 5% are others in the next step; and for opt-13b what the paper's artifact selects.
            near="policy=full" far="policy=full;kv-tier=ram" ours="policy=infinigen;kv-tier=ram"
            usual="$ours;random=0.02;renew=0.05"
            # And what the real model selects on a text of 8,192 tokens, in its last 64 steps, stretched to the shape. (Which
            # device it runs on does not matter to the trace.)
            replayed=()
            if [ -e "$KVAHEAD_TEST_ROOT/.cache/SmolLM2-135M-Instruct.Q4_1.gguf" ]; then
                run trace "$here/kva-evaluate" --device cpu --model "$KVAHEAD_TEST_ROOT/.cache/SmolLM2-135M-Instruct.Q4_1.gguf" \
                    --token-ids "$KVAHEAD_TEST_ROOT/tests/data/reference/persuasion-8k.json" --prefill 8128 \
                    --policy infinigen --kv-tier ram --trace "$out/persuasion.trace"
                grep -hE "selected|hit" "$out/trace.log" || true
                replayed=("$ours;replay=$out/persuasion.trace")
            fi
            offload opt-13b 1920 20 32 "$near" "$ours;random=400;cache=480" "$ours;random=73;cache=480"
            offload opt-13b 1920 20 8 "$near" "$far"
            offload llama-3-8b 32000 1 32 "$near" "$far" "$usual" "${replayed[@]}"
            offload llama-3-8b 32000 4 16 "$near" "$far" "$usual"
            offload llama-3-8b 131000 1 16 "$near" "$far" "$usual" "${replayed[@]}"
            offload llama-2-7b 32000 1 16 "$near" "$far" "$usual" "${replayed[@]}"
            # A session of this takes 60 GiB of host memory.
            offload llama-2-7b 131000 1 16 "$near" "${replayed[0]:-$usual}"
            # When each operation of a step begins and ends: tools/timeline.py draws it.
            run timeline "$here/kva-bench" --device cuda --shape llama-3-8b --random-weights 1 --dtype bf16 --fill \
                --no-prefill-repeat --context 32000 --gen 8 --repeat 1 --policy infinigen --kv-tier ram --random 0.02 \
                --renew 0.05 --timeline "$out/step.json"
            ;;
        sanitize)
            # Each test by itself, as many at a time as there are cores. (What is refused on purpose is no report: API errors
            # are left out.)
            export KVAHEAD_TEST_BRIEF=1
            sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
            running=()
            tests=$("$here/cuda" --list | sed -n 's/^\([a-z]*::.*\): test$/\1/p')
            for tool in memcheck racecheck; do
                for name in $tests; do
                    while [ "$(jobs -rp | wc -l)" -ge "$(nproc)" ]; do sleep 0.2; done
                    (
                        failed=0
                        run "$tool-${name/::/-}" "$sanitizer" --tool $tool --report-api-errors no --error-exitcode 9 "$here/cuda" \
                            --exact "$name"
                        exit $failed
                    ) &
                    running+=($!)
                done
            done
            for job in "${running[@]}"; do wait "$job" || failed=1; done
            ;;
        *) echo "unknown part $part" >&2 && exit 2 ;;
    esac
done
echo "logs: $out"
exit $failed
