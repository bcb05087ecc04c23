// Attention of one new token a sequence: what its kernels share. Reading K and V is all the time there is, so each is read
// once for the query heads that share it, and a sequence is cut into chunks for the multiprocessors.
//
// grid: spans of chunks × (KV heads × passes) × segments. A block of four warps takes the chunks of one span, of one KV head
// and up to G query heads (a group of more is taken in passes). It leaves, for each chunk and query head, a partial result:
// the largest score m, the sum l of 2^(score − m) and the values weighted by 2^(score − m). Partial results are merged RADIX
// at a time, in order, by the block that finishes the last of them, and so is what that gives, until one is left. Chunks
// depend on the segment's own length only, and so do its bits.
#pragma once

#include "async.cuh"
#include "attend.cuh"

struct Segment {
    const u64 *extents;
    const struct Listed *listed;  // of each KV head, or null: rows first..end
    u32 row;
    u32 first;
    u32 end;
    u32 unused;
};

struct Listed {
    const u32 *rows;  // null: rows 0..count
    u32 count;
    u32 unused;
};

struct Decode {
    const float *q;
    float *out;
    float *partials;  // weighted values of each segment, query head and partial result, then m and l of each
    u32 *counters;    // of each segment, KV head, pass and partial result: zero, and left zero
    const Segment *segments;
    u64 q_stride;
    u64 out_stride;
    Runs runs;
    u32 kv_heads;
    u32 group;
    u32 passes;
    u32 parts;  // chunks that a sequence is cut into, at most (attend_decode_mma.cuh)
    u32 slots;  // partial results that there is room for
    u32 span;   // chunks that a block takes: a power of two, at most RADIX (attend_decode_plain.cu)
    u32 lanes;  // that share a row: a power of two, at most 32 (attend_decode_plain.cu)
    float scale;
};

constexpr u32 WARPS = 4, THREADS = WARPS * WARP;
constexpr u32 RADIX = 16;                      // partial results that are merged at a time
constexpr float LOG2_E = 1.4426950408889634f;  // scores are powers of two

// What a block has to do: of which rows, and for which query heads.
template <u32 G> struct Work {
    Segment segment;
    u32 kv_head, head0, heads;  // the first of its query heads, and how many
    u32 n;                      // rows
    const u32 *list;

    __device__ __forceinline__ Work(const Decode &p) : segment(p.segments[blockIdx.z]), list(nullptr) {
        const u32 from_head = blockIdx.y % p.passes * G;
        kv_head = blockIdx.y / p.passes;
        heads = min(G, p.group - from_head);
        head0 = kv_head * p.group + from_head;
        n = segment.end - segment.first;
        if (segment.listed) {
            list = segment.listed[kv_head].rows;
            segment.first = 0;
            n = segment.listed[kv_head].count;
        }
    }

    // The i-th row, and where it lies.
    __device__ __forceinline__ u32 row(u32 i) const { return list ? list[i] : segment.first + i; }
    template <class T> __device__ __forceinline__ const T *address(const Decode &p, u32 row) const {
        return run_row<T>(p.runs, segment.extents, kv_head, row);
    }

    // Of a query head: its partial result `slot`, and its attention.
    __device__ __forceinline__ u64 place(const Decode &p, u32 head, u32 slot) const {
        return ((u64(blockIdx.z) * p.kv_heads * p.group + head0) + head) * p.slots + slot;
    }
    __device__ __forceinline__ float *values(const Decode &p, u32 head, u32 slot) const {
        return p.partials + place(p, head, slot) * p.runs.head_dim;
    }
    // m, then l.
    __device__ __forceinline__ float *sums(const Decode &p, u32 head, u32 slot) const {
        const u64 all_values = u64(gridDim.z) * p.kv_heads * p.group * p.slots * p.runs.head_dim;
        return p.partials + all_values + 2 * place(p, head, slot);
    }
    __device__ __forceinline__ float *out(const Decode &p, u32 head) const {
        return p.out + segment.row * p.out_stride + u64(head0 + head) * p.runs.head_dim;
    }
};

__device__ __forceinline__ float load_fresh(const float *from, float) { return __ldcg(from); }
__device__ __forceinline__ float4 load_fresh(const float *from, float4) {
    return __ldcg(reinterpret_cast<const float4 *>(from));
}
__device__ __forceinline__ void add(float &sum, float factor, float x) { sum = fmaf(factor, x, sum); }
__device__ __forceinline__ void add(float4 &sum, float factor, float4 x) {
    sum.x = fmaf(factor, x.x, sum.x);
    sum.y = fmaf(factor, x.y, sum.y);
    sum.z = fmaf(factor, x.z, sum.z);
    sum.w = fmaf(factor, x.w, sum.w);
}

// Merges the results of `chunks` chunks, of which the block has written `mine` from `at` on. Columns are read a Unit at a time,
// a float or four.
template <class Unit, u32 G> __device__ void merge(const Decode &p, const Work<G> &work, u32 chunks, u32 at, u32 mine) {
    __shared__ bool last;
    constexpr u32 WIDTH = sizeof(Unit) / sizeof(float);
    const u32 columns = p.runs.head_dim / WIDTH;
    u32 *counters = p.counters + u64(blockIdx.z * gridDim.y + blockIdx.y) * p.slots;
    // Of `left` results, the first in `slot`.
    u32 slot = 0;
#pragma unroll 1
    for (u32 left = chunks; left > 1;) {
        // The last block to get here sees what all the others wrote.
        __threadfence();
        __syncthreads();
        at /= RADIX;
        const u32 members = min(RADIX, left - at * RADIX), first = slot + at * RADIX;
        if (threadIdx.x == 0) last = atomicAdd(counters + at, mine) + mine == members;
        __syncthreads();
        if (!last) return;
        __threadfence();
        if (threadIdx.x == 0) counters[at] = 0;
        const u32 parents = (left + RADIX - 1) / RADIX;
#pragma unroll 1
        for (u32 i = threadIdx.x; i < work.heads * columns; i += THREADS) {
            const u32 g = i / columns, column = i % columns * WIDTH;
            float m[RADIX], l[RADIX], most = LEAST, total = 0;
            Unit values[RADIX], y = {};
#pragma unroll
            for (u32 j = 0; j < RADIX; j++) {
                const u32 member = first + min(j, members - 1);
                m[j] = __ldcg(work.sums(p, g, member));
                l[j] = __ldcg(work.sums(p, g, member) + 1);
                values[j] = load_fresh(work.values(p, g, member) + column, Unit());
            }
#pragma unroll
            for (u32 j = 0; j < RADIX; j++) most = fmaxf(most, m[j]);
#pragma unroll
            for (u32 j = 0; j < RADIX; j++) {
                const float factor = j < members ? exp2f(m[j] - most) : 0;
                total = fmaf(factor, l[j], total);
                add(y, factor, values[j]);
            }
            const float *each = reinterpret_cast<const float *>(&y);
            float *to = parents == 1 ? work.out(p, g) + column : work.values(p, g, slot + left + at) + column;
#pragma unroll
            for (u32 c = 0; c < WIDTH; c++) to[c] = parents == 1 ? each[c] / total : each[c];
            if (parents > 1 && column == 0) {
                work.sums(p, g, slot + left + at)[0] = most;
                work.sums(p, g, slot + left + at)[1] = total;
            }
        }
        counters += parents;
        slot += left;
        left = parents;
        mine = 1;
    }
}
