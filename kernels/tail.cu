// The tail: one entry that stands for everything a step does not attend (src/policy/infinigen/tail.rs).
//
// 1. tail_weights, behind a rehearsal and before its rows get slots: each query head's probability of all rows that are
//    neither attended anyhow nor selected, which is 1 less that of the rows that are. (What is attended anyhow the rehearsal
//    has added up, chunk by chunk.) A block a query head and sequence.
// 2. tail_add, behind attention: each query head's mean value, by that weight, into what it has attended.
// 3. tail_blend: rows that move towards others, of which means are made where no new token brings its values (slots.cu).
//
// Sums have one order whatever runs beside them. Sums and products of 2 and 3 are rounded one by one, as the CPU's are.
#include <math_constants.h>

#include "tail.cuh"

// A sequence that has been rehearsed (rehearse.cu says how scores and sums lie).
struct Sequence {
    const float *scores;         // query heads × stride
    const float *shifts;         // query heads: what makes a score a logarithm of a probability; not finite where no score is one
    const float *attended_sums;  // query heads × sums_stride: of each chunk the probability of what is attended
    const u32 *selected;         // KV heads × capacity
    const u32 *selected_counts;  // KV heads
    float *weights;              // query heads
    u32 stride;
    u32 sums_stride;
    u32 chunks;
    u32 capacity;
    Attended attended;
};

struct Weights {
    const Sequence *sequences;
    u32 group;
    u32 unused;
};

// grid: query heads × sequences.
extern "C" __global__ void __launch_bounds__(256) tail_weights(Weights p) {
    const Sequence &s = p.sequences[blockIdx.y];
    const u32 head = blockIdx.x, kv_head = head / p.group, lane = threadIdx.x % WARP;
    const u32 *selected = s.selected + u64(kv_head) * s.capacity;
    const u32 count = min(s.selected_counts[kv_head], s.capacity);
    const float shift = s.chunks > 0 ? s.shifts[head] : -CUDART_INF_F;
    if (!(fabsf(shift) < CUDART_INF_F)) {
        if (threadIdx.x == 0) s.weights[head] = 0;
        return;
    }
    // What is attended, by every warp for itself.
    const float *sums = s.attended_sums + u64(head) * s.sums_stride;
    float attended = 0;
    for (u32 c = lane; c < s.chunks; c += WARP) attended += sums[c];
    attended = warp_sum(attended);

    // Of what is selected, what has not been counted.
    const float *scores = s.scores + u64(head) * s.stride;
    const AttendedRows rows(s.attended, kv_head);
    float here = 0;
#pragma unroll 4
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        const u32 row = selected[i];
        if (!rows.has(row)) here += expf(scores[row] - shift);
    }
    here = block_sum(here);
    if (threadIdx.x == 0) s.weights[head] = fmaxf(1.0f - (attended + here), 0.0f);
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
    wait_for_previous();
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
