#!/usr/bin/env bash
# Runs the tests of the CUDA backend without a GPU: on the emulated device of this folder.
#
#   tests/emulator/run.sh          what CI runs: every operation, the logits of every architecture, and of the policies those
#                                  in which the device does what a host would
#   tests/emulator/run.sh PART [ARGUMENT ...]    operations, golden or policies, whole, the test program with these arguments
#
# Tests are brief here, as under compute-sanitizer. What chance decides begins with EMULATED_CUDA_SEED (1 unless it is set), so that a
# failure comes again; see src/lib.rs.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo=${CARGO:-cargo}

"$cargo" build --release --locked -p emulated-cuda
# Under the driver's name in a folder of its own, where no program finds it by accident.
driver=$PWD/target/emulated-cuda
mkdir -p "$driver"
cp target/release/libemulated_cuda.so "$driver/libcuda.so"
export LD_LIBRARY_PATH="$driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# Without cuBLAS, which would look for a device of its own.
export KVAHEAD_TEST_DEVICE=cuda KVAHEAD_TEST_BRIEF=1 KVAHEAD_CUBLAS= EMULATED_CUDA_SEED=${EMULATED_CUDA_SEED:-1}

part() {
    local name=$1
    shift
    case $name in
        operations) "$cargo" test --release --locked --test cuda -- "$@" ;;
        golden) "$cargo" test --release --locked --test golden_logits -- "$@" ;;
        # evict:: reads what attention reads, as the CPU backend lets it; the shape of an 8B model is too large.
        policies) "$cargo" test --release --locked --test policies -- --skip evict:: --skip of_a_real_shape "$@" ;;
        *) echo "unknown part $name" >&2 && exit 2 ;;
    esac
}

if [ $# -gt 0 ]; then
    part "$@"
else
    part operations
    part golden
    part policies device:: oracle:: replay::
fi
