// What the kernels of the hot cache share: where rows lie, and sums over a block.
#pragma once

#include "payload.cuh"

constexpr u32 THREADS = 512, WARPS = THREADS / WARP;

// Sum of what the threads before this one have, and of all. Every thread of W warps calls it.
template <u32 W = WARPS> __device__ __forceinline__ u32 scan(u32 x, u32 *totals, u32 &total) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 sum = x;
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const u32 before = __shfl_up_sync(FULL, sum, step);
        if (lane >= step) sum += before;
    }
    __syncthreads();  // the last call's totals have been read
    if (lane == WARP - 1) totals[warp] = sum;
    __syncthreads();
    u32 before = 0;
    total = 0;
#pragma unroll
    for (u32 w = 0; w < W; w++) {
        before += w < warp ? totals[w] : 0;
        total += totals[w];
    }
    return before + sum - x;
}

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
