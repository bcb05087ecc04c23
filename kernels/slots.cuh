// What the kernels of the hot cache share: how large blocks are, and where rows lie.
#pragma once

#include "order.cuh"
#include "payload.cuh"

constexpr u32 THREADS = 512, WARPS = THREADS / WARP;

// Where entries lie, by row or by slot.
struct Runs {
    const u64 *extents;
    u64 layer_offset;
    u64 run_bytes;
    u64 extent_tokens;
};

__device__ __forceinline__ u64 row_of(const Runs &runs, u32 head, u32 row, u32 bytes) {
    const u32 tokens = u32(runs.extent_tokens);
    return runs.extents[row / tokens] + runs.layer_offset + head * runs.run_bytes + u64(row % tokens) * bytes;
}
