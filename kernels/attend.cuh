// What both attention kernels share: where the rows of a run lie.
//
// An extent holds, for every layer and KV head, a run of `extent_tokens` rows; a row is a token's key, then its value.
// The table of a sequence's extents is data of the step, so that a launch stays the same while a sequence grows.
#pragma once

#include "common.cuh"

struct Runs {
    u64 layer_offset;  // bytes from an extent's start to the layer's first run
    u64 run_bytes;
    u32 extent_tokens;
    u32 head_dim;
};

// Address of a head's row `t`.
template <class T> __device__ __forceinline__ const T *run_row(const Runs &runs, const u64 *extents, u32 head, u32 t) {
    const u32 extent = t / runs.extent_tokens, token = t % runs.extent_tokens;
    const u64 run = extents[extent] + runs.layer_offset + head * runs.run_bytes;
    return reinterpret_cast<const T *>(run) + u64(token) * 2 * runs.head_dim;
}
