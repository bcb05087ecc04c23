// The best columns of rows of scores, in order: every column is sorted, and the first ones are written.
//
// A block a row sorts column numbers by radix, from the lowest eight bits of the scores to the highest: stable, so that of
// equals the lower columns come first. Scores are read where they are, the numbers go to and fro between two lists.
#include "common.cuh"

struct Rank {
    const float *scores;
    u32 *out;
    u32 *lists;  // rows × 2 × columns
    u64 stride;
    u64 out_stride;
    u32 columns;
    u32 wanted;
};

constexpr u32 THREADS = 1024, WARPS = THREADS / WARP, BITS = 8, BINS = 1 << BITS, PASSES = 32 / BITS;

// A number of the opposite order: the largest score has the least, in IEEE 754's total order.
__device__ __forceinline__ u32 descending(float score) {
    const u32 bits = __float_as_uint(score);
    return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}

extern "C" __global__ void __launch_bounds__(1024) rank_columns(Rank p) {
    // Where a digit's next column goes; of the tile, how many of it each warp has, and then those of the warps before.
    __shared__ u32 next[BINS], counts[WARPS][BINS];
    const u32 tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP;
    const float *scores = p.scores + blockIdx.x * p.stride;
    u32 *lists[2] = {p.lists + u64(blockIdx.x) * 2 * p.columns, p.lists + (u64(blockIdx.x) * 2 + 1) * p.columns};
#pragma unroll 1
    for (u32 pass = 0; pass < PASSES; pass++) {
        const bool last = pass + 1 == PASSES;
        const u32 *from = lists[(pass + 1) % 2];
        u32 *to = last ? p.out + blockIdx.x * p.out_stride : lists[pass % 2];
        const u32 room = last ? p.wanted : p.columns, shift = pass * BITS;
        auto column_at = [&](u32 i) { return pass ? from[i] : i; };
        auto digit_of = [&](u32 column) { return descending(scores[column]) >> shift & (BINS - 1); };

        if (tid < BINS) next[tid] = 0;
        __syncthreads();
        for (u32 i = tid; i < p.columns; i += THREADS) atomicAdd(&next[digit_of(i)], 1);  // in whatever order
        __syncthreads();
        if (warp == 0) {
            // Sums of what is before: eight digits a lane.
            constexpr u32 OWN = BINS / WARP;
            u32 own[OWN], sum = 0;
            for (u32 i = 0; i < OWN; i++) {
                own[i] = sum;
                sum += next[lane * OWN + i];
            }
            u32 all = sum;
            for (u32 step = 1; step < WARP; step *= 2) {
                const u32 before = __shfl_up_sync(FULL, all, step);
                if (lane >= step) all += before;
            }
            for (u32 i = 0; i < OWN; i++) next[lane * OWN + i] = all - sum + own[i];
        }
#pragma unroll 1
        for (u32 first = 0; first < p.columns; first += THREADS) {
            for (u32 i = tid; i < WARPS * BINS; i += THREADS) counts[i / BINS][i % BINS] = 0;
            __syncthreads();
            const bool there = first + tid < p.columns;
            const u32 column = there ? column_at(first + tid) : 0, digit = there ? digit_of(column) : BINS;
            const u32 alike = __match_any_sync(FULL, digit), before = __popc(alike & ((1u << lane) - 1));
            if (there && before == 0) counts[warp][digit] = __popc(alike);
            __syncthreads();
            if (tid < BINS) {
                u32 at = next[tid];
#pragma unroll 4
                for (u32 w = 0; w < WARPS; w++) {
                    const u32 here = counts[w][tid];
                    counts[w][tid] = at;
                    at += here;
                }
                next[tid] = at;
            }
            __syncthreads();
            if (there) {
                const u32 at = counts[warp][digit] + before;
                if (at < room) to[at] = column;
            }
            __syncthreads();
        }
    }
}
