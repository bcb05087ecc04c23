// Causal attention of many new tokens of one sequence, in f32: tiles of query rows meet tiles of KV, and the softmax is
// kept online (Milakov and Gimelshein 2018), as in FlashAttention; the n × n scores never exist.
//
// grid: row tiles × query heads. 256 threads: thread (r, c) of 32 × 8 owns row r; of the scores columns c, c + 8, …, of
// the output the fours of columns 4c, 4c + 32, ….
#include "attend.cuh"

struct Prefill {
    const float *q;
    float *out;
    const u64 *extents;
    u64 q_stride;
    u64 out_stride;
    Runs runs;
    u32 rows;
    u32 position;
    u32 group;
    u32 window;  // 0: none
    u32 vectors;  // whether 16-byte loads fit
    float scale;
};

constexpr u32 ROWS = 32, TOKENS = 32, THREADS = 256;

// A tile's keys (offset 0) or values (offset d), widened, into shared memory; columns past d are zero.
template <class T>
__device__ void fetch(const Prefill &p, const T *const (&rows)[TOKENS], u32 count, u32 offset, u32 stride, float *to) {
    const u32 d = p.runs.head_dim, padded = stride - 4;
    if (p.vectors) {
        constexpr u32 V = LANES<T>;
        const u32 vectors = d / V;
        for (u32 i = threadIdx.x; i < TOKENS * vectors; i += THREADS) {
            const u32 t = i / vectors, c = i % vectors * V;
            float v[V] = {};
            if (t < count) load<T, V>(rows[t] + offset + c, v);
#pragma unroll
            for (u32 j = 0; j < V; j += 4) {
                *reinterpret_cast<float4 *>(to + t * stride + c + j) = make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]);
            }
        }
    } else {
        for (u32 i = threadIdx.x; i < TOKENS * padded; i += THREADS) {
            const u32 t = i / padded, c = i % padded;
            to[t * stride + c] = t < count && c < d ? widen(rows[t][offset + c]) : 0.0f;
        }
    }
}

template <class T, int D> __device__ void prefill(const Prefill &p) {
    extern __shared__ __align__(16) float shared[];
    __shared__ const T *rows[TOKENS];
    __shared__ float weights[ROWS][TOKENS + 1];
    const u32 d = p.runs.head_dim, padded = (d + 3) / 4 * 4, stride = padded + 4;
    float *q = shared, *kv = q + ROWS * stride;
    const u32 head = blockIdx.y, kv_head = head / p.group, row0 = blockIdx.x * ROWS;
    const u32 r = threadIdx.x / 8, c = threadIdx.x % 8;
    const u32 here = min(ROWS, p.rows - row0);
    for (u32 i = threadIdx.x; i < ROWS * padded; i += THREADS) {
        const u32 row = i / padded, column = i % padded;
        q[row * stride + column] =
            row < here && column < d ? p.q[(row0 + row) * p.q_stride + head * d + column] * p.scale : 0.0f;
    }
    const u32 position = p.position + row0 + r;
    auto first_seen = [&](u32 at) { return p.window && at + 1 > p.window ? at + 1 - p.window : 0; };
    const u32 first = first_seen(position);
    const u32 end = p.position + row0 + here;  // past the last token that any row sees
    float m = LEAST, l = 0, y[D / 32][4] = {};
    for (u32 t0 = first_seen(p.position + row0) / TOKENS * TOKENS; t0 < end; t0 += TOKENS) {
        const u32 count = min(TOKENS, end - t0);
        __syncthreads();
        if (threadIdx.x < count) rows[threadIdx.x] = run_row<T>(p.runs, p.extents, kv_head, t0 + threadIdx.x);
        __syncthreads();
        fetch<T>(p, rows, count, 0, stride, kv);
        __syncthreads();
        float scores[4] = {};
        for (u32 k = 0; k < padded; k += 4) {
            const float4 a = *reinterpret_cast<const float4 *>(q + r * stride + k);
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const float4 b = *reinterpret_cast<const float4 *>(kv + (c + 8 * j) * stride + k);
                scores[j] = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, scores[j]))));
            }
        }
        float next = m;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const u32 t = t0 + c + 8 * j;
            if (t > position || t < first) scores[j] = LEAST;
            next = fmaxf(next, scores[j]);
        }
#pragma unroll
        for (int step = 4; step > 0; step /= 2) next = fmaxf(next, __shfl_xor_sync(FULL, next, step));
        float sum = 0;
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            // A tile may hold nothing that this row sees: its scores are all LEAST, and weigh nothing.
            const float w = scores[j] == LEAST ? 0.0f : expf(scores[j] - next);
            weights[r][c + 8 * j] = w;
            sum += w;
        }
#pragma unroll
        for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(FULL, sum, step);
        const float rescale = expf(m - next);
        l = l * rescale + sum;
        m = next;
        __syncthreads();
        fetch<T>(p, rows, count, d, stride, kv);
        __syncthreads();
#pragma unroll
        for (int j = 0; j < D / 32; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) y[j][i] *= rescale;
        }
        for (u32 t = 0; t < count; t++) {
            const float w = weights[r][t];
#pragma unroll
            for (u32 j = 0; j < D / 32; j++) {
                const u32 column = 4 * c + 32 * j;
                if (column < padded) {
                    const float4 v = *reinterpret_cast<const float4 *>(kv + t * stride + column);
                    y[j][0] = fmaf(w, v.x, y[j][0]);
                    y[j][1] = fmaf(w, v.y, y[j][1]);
                    y[j][2] = fmaf(w, v.z, y[j][2]);
                    y[j][3] = fmaf(w, v.w, y[j][3]);
                }
            }
        }
    }
    if (r >= here) return;
    float *out = p.out + (row0 + r) * p.out_stride + head * d;
#pragma unroll
    for (u32 j = 0; j < D / 32; j++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            if (4 * c + 32 * j + i < d) out[4 * c + 32 * j + i] = y[j][i] / l;
        }
    }
}

#define PREFILL(NAME, T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_64(Prefill p) { prefill<T, 64>(p); }                 \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_128(Prefill p) { prefill<T, 128>(p); }               \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_256(Prefill p) { prefill<T, 256>(p); }

PREFILL(attend_prefill_f32, float)
PREFILL(attend_prefill_f16, f16)
PREFILL(attend_prefill_bf16, bf16)
