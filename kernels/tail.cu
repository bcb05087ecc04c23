// The tail: one entry that stands for everything a step does not attend (src/policy/infinigen/tail.rs).
//
// 1. tail_weights, behind a rehearsal and before its rows get slots: each query head's probability of all rows that are
//    neither in a slot nor selected, which is 1 less that of the rows that are. A block a query head and sequence. (Where a
//    step attends a list, what is guarded takes the place of what is in slots.)
// 2. tail_add, behind attention: each query head's mean value, by that weight, into what it has attended.
// 3. tail_blend: rows that move towards others, of which means are made where no new token brings its values (slots.cu).
//
// Sums have one order whatever runs beside them. Sums and products of 2 and 3 are rounded one by one, as the CPU's are.
#include <math_constants.h>

#include "common.cuh"

// A sequence that has been rehearsed (rehearse.cu says how scores and stats lie), and where its rows lie (slots.cu).
struct Sequence {
    const float *scores;         // query heads × stride
    const float2 *stats;         // query heads × stats_stride: of each chunk the largest score m and the sum of exp(score − m)
    const u32 *selected;         // KV heads × capacity
    const u32 *selected_counts;  // KV heads
    const u32 *counts;           // slots in use: COUNT words a KV head, the third of which counts
    const u32 *rows;             // the row in each slot; table_stride words from KV head to KV head
    const u32 *slots;            // the slot of each row, or NONE; as far apart
    const u32 *used;             // the step in which each slot was used last; as far apart
    float *weights;              // query heads
    const u32 *tokens;           // the token in each row and one, or 0 where it is the row's number; null: it always is
    u64 table_stride;
    u64 tokens_stride;           // words from KV head to KV head
    u32 below;                   // guarded tokens: below this, and from that on
    u32 from;
    u32 by_list;                 // what is attended whatever is selected is what is guarded, not what is in slots
    u32 step;                    // of a correction: what the step has used is attended as well; 0: it has used nothing
    u32 stride;
    u32 stats_stride;
    u32 chunks;
    u32 capacity;
    u32 index_rows;
    u32 unused;
};

struct Weights {
    const Sequence *sequences;
    u32 group;
    u32 unused;
};

constexpr u32 THREADS = 512, COUNT = 4, NONE = 0xffffffffu;

// grid: query heads × sequences.
extern "C" __global__ void __launch_bounds__(512) tail_weights(Weights p) {
    const Sequence s = p.sequences[blockIdx.y];
    const u32 head = blockIdx.x, kv_head = head / p.group, lane = threadIdx.x % WARP;
    // The logarithm of the sum of all exponentials, by every warp for itself.
    const float2 *stats = s.stats + u64(head) * s.stats_stride;
    float m = -CUDART_INF_F, l = 0;
    for (u32 c = lane; c < s.chunks; c += WARP) m = fmaxf(m, stats[c].x);
    m = warp_max(m);
    for (u32 c = lane; c < s.chunks && m > -CUDART_INF_F; c += WARP) l += stats[c].y * expf(stats[c].x - m);
    const float shift = m + logf(warp_sum(l));
    if (!(fabsf(shift) < CUDART_INF_F)) {  // no score is one
        if (threadIdx.x == 0) s.weights[head] = 0;
        return;
    }

    const float *scores = s.scores + u64(head) * s.stride;
    const u32 *rows = s.rows + kv_head * s.table_stride, *slots = s.slots + kv_head * s.table_stride;
    const u32 *tokens = s.tokens ? s.tokens + kv_head * s.tokens_stride : nullptr;
    auto guarded = [&](u32 row) {
        const u32 token = tokens && tokens[row] ? tokens[row] - 1 : row;
        return token < s.below || token >= s.from;
    };
    const u32 *used = s.used + kv_head * s.table_stride;
    // What is guarded is in slots, too; where rows are tokens it is found without them.
    const u32 below = min(min(s.below, s.from), s.index_rows), from = min(s.from, s.index_rows);
    const bool by_row = s.by_list && !tokens && !s.step;
    const u32 always = by_row ? below + s.index_rows - from : s.counts[COUNT * kv_head + 2];
    float here = 0;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < always; i += THREADS) {
        const u32 row = !by_row ? rows[i] : i < below ? i : from + i - below;
        const bool attended = !s.by_list || guarded(row) || (s.step && used[i] == s.step);
        if (row < s.index_rows && attended) here += expf(scores[row] - shift);
    }
    // Of what is selected, what has not been counted.
    const u32 *selected = s.selected + u64(kv_head) * s.capacity;
    const u32 count = min(s.selected_counts[kv_head], s.capacity);
#pragma unroll 4
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        const u32 row = selected[i];
        const bool counted = (by_row || slots[row] != NONE) && (!s.by_list || guarded(row));
        if (!counted) here += expf(scores[row] - shift);
    }
    here = block_sum(here);
    if (threadIdx.x == 0) s.weights[head] = fmaxf(1.0f - here, 0.0f);
}

__device__ __forceinline__ float blended(float from, float toward, float factor) {
    return __fadd_rn(from, __fmul_rn(factor, __fsub_rn(toward, from)));
}

struct Added {
    const float *means;    // KV heads × head_dim
    const float *weights;  // query heads
    float *out;            // query heads × head_dim
};

struct Add {
    const Added *sequences;
    u32 group;
    u32 head_dim;
};

// grid: sequences × query heads.
extern "C" __global__ void __launch_bounds__(128) tail_add(Add p) {
    const Added a = p.sequences[blockIdx.x];
    const u32 head = blockIdx.y;
    const float weight = a.weights[head];
    const float *mean = a.means + head / p.group * p.head_dim;
    float *out = a.out + head * p.head_dim;
    for (u32 c = threadIdx.x; c < p.head_dim; c += blockDim.x) out[c] = blended(out[c], mean[c], weight);
}

struct Blend {
    const float *from;  // may be `out`
    const float *toward;
    float *out;
    u64 from_stride;
    u64 toward_stride;
    u64 out_stride;
    u32 rows;
    u32 cols;
    float factor;
    u32 unused;
};

extern "C" __global__ void __launch_bounds__(256) tail_blend(Blend p) {
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x, row = i / p.cols, c = i % p.cols;
    if (row >= p.rows) return;
    const float from = p.from[row * p.from_stride + c], toward = p.toward[row * p.toward_stride + c];
    p.out[row * p.out_stride + c] = blended(from, toward, p.factor);
}
