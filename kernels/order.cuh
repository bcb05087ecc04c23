// What a block does with the order of things: sums of what is before, places of what is wanted, the k-th largest number.
#pragma once

#include "common.cuh"

// Sum of what the threads before this one have, and of all. Every thread of W warps calls it; `totals` has W words.
template <u32 W> __device__ __forceinline__ u32 scan(u32 x, u32 *totals, u32 &total) {
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

// A block of W warps looks at W × MANY × 32 items at a time, of which this is the i-th of a thread: so that a warp reads
// neighbours, and has its items before those of the next one.
template <u32 MANY> __device__ __forceinline__ u32 item(u32 i) {
    return (threadIdx.x / WARP * MANY + i) * WARP + threadIdx.x % WARP;
}

// How many wanted items are before each of this thread's; returns how many there are. `totals` as above.
template <u32 W, u32 MANY>
__device__ __forceinline__ u32 places(const bool (&wanted)[MANY], u32 *totals, u32 (&before)[MANY]) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 ballots[MANY], here = 0;
#pragma unroll
    for (u32 i = 0; i < MANY; i++) {
        ballots[i] = __ballot_sync(FULL, wanted[i]);
        here += __popc(ballots[i]);
    }
    __syncthreads();
    if (lane == 0) totals[warp] = here;
    __syncthreads();
    u32 at = 0, total = 0;
#pragma unroll
    for (u32 w = 0; w < W; w++) {
        at += w < warp ? totals[w] : 0;
        total += totals[w];
    }
#pragma unroll
    for (u32 i = 0; i < MANY; i++) {
        before[i] = at + __popc(ballots[i] & ((1u << lane) - 1));
        at += __popc(ballots[i]);
    }
    return total;
}

// The k-th largest of numbers: the largest are those whose leading digits are more than `prefix`, which are `above`, and
// `equal` of those whose leading digits are `prefix`.
struct Kth {
    u32 prefix, shift, above, equal;

    __device__ __forceinline__ bool is_larger(u32 x) const { return x >> shift > prefix; }
    __device__ __forceinline__ bool is_equal(u32 x) const { return x >> shift == prefix; }
};

// Finds it digit by digit, from the one that begins at bit `shift` on, which no number has more digits before. `above` are known
// to be larger than all of them; with those, `count` are wanted, and it is fewer where there are fewer. Without `exact` digits
// that make no difference are left out, and `equal` are all that there are. `for_each(visit)` visits this thread's numbers. By a
// block of W warps, at least 256 threads; `histogram` has 256 words, `scratch` W and two.
template <u32 W, class F>
__device__ __forceinline__ Kth
kth_largest(u32 count, u32 above, int shift, bool exact, u32 *histogram, u32 *scratch, F for_each) {
    const u32 tid = threadIdx.x;
    u32 *found = scratch + W;
    Kth kth = {0, u32(shift), above, 0};
    for (bool first = true;; first = false) {
        if (tid < 256) histogram[tid] = 0;
        __syncthreads();
        for_each([&](u32 x) {
            if (first || x >> (shift + 8) == kth.prefix) atomicAdd(&histogram[x >> shift & 255], 1);
        });
        __syncthreads();
        u32 total;
        const u32 digit = 255 - tid, here = tid < 256 ? histogram[digit] : 0;
        const u32 larger = kth.above + scan<W>(here, scratch, total);
        count = min(count, kth.above + total);
        if (count <= kth.above) return kth;  // there is none
        if (larger < count && larger + here >= count) {
            found[0] = digit;
            found[1] = larger;
        }
        __syncthreads();
        kth = {kth.prefix << 8 | found[0], u32(shift), found[1], count - found[1]};
        if (shift == 0 || (!exact && histogram[found[0]] == kth.equal)) return kth;
        shift -= 8;
        __syncthreads();  // the histogram has been read
    }
}
