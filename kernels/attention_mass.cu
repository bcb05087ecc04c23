// How much of the attention of some rows each token gets.
//
// The query heads of a KV head lie side by side: query i is row i / group, so that a tile of keys serves the whole group.
// 1. `mass_parts`, chunks of tokens × tiles of queries × KV heads: the largest score m of each query in the chunk, and the
//    sum of exp(score − m).
// 2. `mass_norms`, a thread a query: both over all chunks, in order.
// 3. `mass_add`, tiles of tokens × KV heads: scores once more, and each token's probabilities added up, query by query in
//    a fixed order. No other block writes that token.
//
// Blocks of 256 threads meet 32 queries with 32 tokens: thread (r, c) of 32 × 8 has query r and tokens c, c + 8, ….
#include "attend.cuh"

struct Listed {
    const u32 *rows;  // null: rows 0..count
    u32 count;
    u32 unused;
};

struct Mass {
    const float *q;
    const u64 *extents;
    const Listed *listed;  // of each KV head, or null: causal
    float *out;
    float2 *parts;  // chunks × KV heads × padded queries: m and the sum
    float2 *norms;  // KV heads × padded queries: m and what its exp(score − m) is multiplied by
    u64 q_stride;
    u64 out_stride;
    Runs runs;
    u32 rows;
    u32 position;
    u32 group;
    u32 window;  // 0: none
    u32 chunks;
    u32 kv_heads;
    u32 padded;   // queries, in whole tiles
    u32 vectors;  // whether 16-byte loads fit
    float scale;
    u32 unused;
};

constexpr u32 QUERIES = 32, TOKENS = 32, THREADS = 256, CHUNK = 1024;

// Tokens, or entries of a list.
struct Range {
    u32 from, to;
    __device__ bool has(u32 t) const { return t >= from && t < to; }
};

// What a query sees.
__device__ __forceinline__ Range seen(const Mass &p, u32 head, u32 query) {
    if (query >= p.rows * p.group) return {0, 0};
    if (p.listed) return {0, p.listed[head].count};
    const u32 end = p.position + query / p.group + 1;
    return {p.window && end > p.window ? end - p.window : 0, end};
}

// What the queries of the tile from `query` on see together.
__device__ __forceinline__ Range seen_by_tile(const Mass &p, u32 head, u32 query) {
    const u32 last = min(query + QUERIES, p.rows * p.group) - 1;
    return {seen(p, head, query).from, seen(p, head, last).to};
}

__device__ __forceinline__ u32 stride_of(const Mass &p) { return (p.runs.head_dim + 3) / 4 * 4 + 4; }

// A tile of queries, scaled, into shared memory; zeros past the head's end and past the last query.
__device__ void load_queries(const Mass &p, u32 head, u32 first, float *to) {
    const u32 d = p.runs.head_dim, stride = stride_of(p), padded = stride - 4;
    for (u32 i = threadIdx.x; i < QUERIES * padded; i += THREADS) {
        const u32 r = i / padded, c = i % padded, query = first + r;
        const bool there = query < p.rows * p.group && c < d;
        const float *q = p.q + query / p.group * p.q_stride + (head * p.group + query % p.group) * d;
        to[r * stride + c] = there ? q[c] * p.scale : 0.0f;
    }
}

// A tile of keys, widened; zeros past the head's end and past the last token.
template <class T> __device__ void load_keys(const Mass &p, u32 head, u32 first, u32 end, float *to) {
    __shared__ const T *rows[TOKENS];
    const u32 d = p.runs.head_dim, stride = stride_of(p), padded = stride - 4;
    if (threadIdx.x < TOKENS) {
        const u32 at = min(first + threadIdx.x, end - 1);
        const u32 *list = p.listed ? p.listed[head].rows : nullptr;
        rows[threadIdx.x] = run_row<T>(p.runs, p.extents, head, list ? list[at] : at);
    }
    __syncthreads();
    if (p.vectors) {
        constexpr u32 V = LANES<T>;
        const u32 vectors = d / V;
        for (u32 i = threadIdx.x; i < TOKENS * vectors; i += THREADS) {
            const u32 t = i / vectors, c = i % vectors * V;
            float v[V] = {};
            if (first + t < end) load<T, V>(rows[t] + c, v);
#pragma unroll
            for (u32 j = 0; j < V; j += 4) {
                *reinterpret_cast<float4 *>(to + t * stride + c + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
            }
        }
    } else {
        for (u32 i = threadIdx.x; i < TOKENS * padded; i += THREADS) {
            const u32 t = i / padded, c = i % padded;
            to[t * stride + c] = first + t < end && c < d ? widen(rows[t][c]) : 0.0f;
        }
    }
}

__device__ __forceinline__ void score(const Mass &p, const float *q, const float *keys, float (&scores)[4]) {
    const u32 stride = stride_of(p), r = threadIdx.x / 8, c = threadIdx.x % 8;
    for (u32 k = 0; k < stride - 4; k += 4) {
        const float4 a = *reinterpret_cast<const float4 *>(q + r * stride + k);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const float4 b = *reinterpret_cast<const float4 *>(keys + (c + 8 * j) * stride + k);
            scores[j] = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, scores[j]))));
        }
    }
}

template <class T> __device__ void parts(const Mass &p) {
    extern __shared__ __align__(16) float shared[];
    float *q = shared, *keys = q + QUERIES * stride_of(p);
    const u32 head = blockIdx.z, first = blockIdx.y * QUERIES, r = threadIdx.x / 8, c = threadIdx.x % 8;
    const Range all = seen_by_tile(p, head, first), own = seen(p, head, first + r);
    const u32 from = max(blockIdx.x * CHUNK, all.from / TOKENS * TOKENS), to = min((blockIdx.x + 1) * CHUNK, all.to);
    load_queries(p, head, first, q);
    float m = LEAST, l = 0;
    for (u32 t0 = from; t0 < to; t0 += TOKENS) {
        __syncthreads();
        load_keys<T>(p, head, t0, to, keys);
        __syncthreads();
        float scores[4] = {}, next = m;
        score(p, q, keys, scores);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (own.has(t0 + c + 8 * j)) next = fmaxf(next, scores[j]);
        }
        l *= expf(m - next);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (own.has(t0 + c + 8 * j)) l += expf(scores[j] - next);
        }
        m = next;
    }
    // The eight threads of a query.
    float most = m;
#pragma unroll
    for (u32 step = 4; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(FULL, most, step));
    l *= expf(m - most);
#pragma unroll
    for (u32 step = 4; step > 0; step /= 2) l += __shfl_xor_sync(FULL, l, step);
    if (c == 0) p.parts[u64(blockIdx.x * p.kv_heads + head) * p.padded + first + r] = make_float2(most, l);
}

extern "C" __global__ void __launch_bounds__(THREADS) mass_norms(Mass p) {
    const u32 query = blockIdx.x * THREADS + threadIdx.x, head = blockIdx.y;
    if (query >= p.padded) return;
    const float2 *part = p.parts + u64(head) * p.padded + query;
    const u64 next = u64(p.kv_heads) * p.padded;
    float m = LEAST, l = 0;
    for (u32 chunk = 0; chunk < p.chunks; chunk++) m = fmaxf(m, part[chunk * next].x);
    for (u32 chunk = 0; chunk < p.chunks; chunk++) l = fmaf(part[chunk * next].y, expf(part[chunk * next].x - m), l);
    // A query that only fills its tile sees nothing.
    p.norms[u64(head) * p.padded + query] = make_float2(m, l > 0 ? 1.0f / l : 0.0f);
}

template <class T> __device__ void add(const Mass &p) {
    extern __shared__ __align__(16) float shared[];
    __shared__ float sums[QUERIES][TOKENS + 1];
    float *q = shared, *keys = q + QUERIES * stride_of(p);
    const u32 head = blockIdx.y, t0 = blockIdx.x * TOKENS, r = threadIdx.x / 8, c = threadIdx.x % 8;
    const u32 queries = p.rows * p.group, end = seen(p, head, queries - 1).to;
    if (t0 >= end) return;
    // The first row that sees a token of the tile.
    const u32 first = p.listed || t0 <= p.position ? 0 : (t0 - p.position) * p.group / QUERIES * QUERIES;
    load_keys<T>(p, head, t0, end, keys);
    float total[4] = {};
    for (u32 from = first; from < queries && seen(p, head, from).from < t0 + TOKENS; from += QUERIES) {
        __syncthreads();
        load_queries(p, head, from, q);
        __syncthreads();
        const Range own = seen(p, head, from + r);
        const float2 norm = p.norms[u64(head) * p.padded + from + r];
        float scores[4] = {};
        score(p, q, keys, scores);
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (own.has(t0 + c + 8 * j)) total[j] = fmaf(expf(scores[j] - norm.x), norm.y, total[j]);
        }
    }
#pragma unroll
    for (u32 j = 0; j < 4; j++) sums[r][c + 8 * j] = total[j];
    __syncthreads();
    if (threadIdx.x < TOKENS && t0 + threadIdx.x < end) {
        float sum = 0;
        for (u32 i = 0; i < QUERIES; i++) sum += sums[i][threadIdx.x];
        p.out[head * p.out_stride + t0 + threadIdx.x] += sum;
    }
}

#define MASS(T, NAME)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS) mass_parts_##NAME(Mass p) { parts<T>(p); }                   \
    extern "C" __global__ void __launch_bounds__(THREADS) mass_add_##NAME(Mass p) { add<T>(p); }

MASS(float, f32)
MASS(f16, f16)
MASS(bf16, bf16)
