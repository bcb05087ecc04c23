// Attention of one new token a sequence. Reading K and V is all the time there is, so each is read once for the query
// heads that share it, and a sequence is cut into chunks for the multiprocessors.
//
// grid: spans of chunks × (KV heads × passes) × segments. A block of four warps takes the chunks of one span, of one KV head
// and up to G query heads (a group of more is taken in passes). It leaves, for each chunk and query head, the largest score
// m, the sum l of exp(score − m) and the values weighted by exp(score − m); the block that finishes last merges the chunks in
// order. Chunks depend on the segment's own length only, and so do its bits: how many a span has changes none.
//
// A thread copies what it will read itself to shared memory, AHEAD steps before, so that K and V of the next chunk come in
// while this one's scores become weights.
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
    float *partials;
    u32 *counters;  // zero, and left zero
    const Segment *segments;
    u64 q_stride;
    u64 out_stride;
    Runs runs;
    u32 kv_heads;
    u32 group;
    u32 passes;
    u32 most_chunks;
    u32 span;   // chunks that a block takes
    u32 lanes;  // that share a row: a power of two, at most 32
    float scale;
    u32 unused;
};

constexpr u32 THREADS = 128, MOST_CHUNK = 256, MOST_SPAN = 256;  // tokens of a chunk, and of a span
constexpr int UNROLL = 4;   // rows that a thread reads in a step
constexpr u32 AHEAD = 2;    // steps

// Tokens of a chunk of a sequence that attends n. (Its twin in Rust sizes the grid.)
__device__ __forceinline__ u32 chunk_tokens(u32 n) { return n <= 2048 ? 64 : n <= 8192 ? 128 : MOST_CHUNK; }

// The steps of a span in order, chunk after chunk: of keys column by column for each tile of rows, then of values row by row
// for each of columns. Where rows cannot be read 16 bytes at a time, nothing is copied and a step reads them in place.
template <class T, int V> struct Steps {
    static constexpr bool COPIED = V != 1;
    const T *const *rows;  // of the span
    uint4 *room;           // AHEAD × UNROLL × THREADS
    u32 d, chunk, all, lanes, lane, sub, subs, columns;
    u32 slot;
    struct At {
        u32 from;  // the chunk's first row
        u32 tile, column;
        bool value;
    } next;  // to be copied

    __device__ __forceinline__ Steps(const T *const *rows, uint4 *room, u32 d, u32 chunk, u32 all, u32 lanes)
        : rows(rows), room(room + threadIdx.x), d(d), chunk(chunk), all(all), lanes(lanes), lane(threadIdx.x % lanes),
          sub(threadIdx.x / lanes), subs(THREADS / lanes), columns((d + lanes * V - 1) / (lanes * V)), slot(0),
          next{0, 0, 0, false} {}

    __device__ __forceinline__ u32 count(u32 from) const { return min(chunk, all - from); }
    __device__ __forceinline__ u32 tiles(u32 from) const { return (count(from) + subs * UNROLL - 1) / (subs * UNROLL); }
    __device__ __forceinline__ u32 row(u32 tile, u32 u) const { return (tile * UNROLL + u) * subs + sub; }
    __device__ __forceinline__ u32 column(u32 at) const { return (at * lanes + lane) * V; }
    // Behind a chunk's last row it is read again, and weighs nothing.
    __device__ __forceinline__ const T *address(const At &at, u32 u) const {
        return rows[at.from + min(row(at.tile, u), count(at.from) - 1)] + (at.value ? d : 0) + column(at.column);
    }

    // Asks for the next step that was not asked for, into the slot that was read last.
    __device__ __forceinline__ void copy() {
        if constexpr (COPIED) {
            if (next.from < all) {
                if (column(next.column) < d) {
#pragma unroll
                    for (u32 u = 0; u < UNROLL; u++) {
                        copy_16(shared_address(room + (slot * UNROLL + u) * THREADS),
                                reinterpret_cast<u64>(address(next, u)));
                    }
                }
                const u32 tiles = this->tiles(next.from);
                if (next.value) {
                    if (++next.tile == tiles) {
                        next.tile = 0;
                        if (++next.column == columns) next = {next.from + chunk, 0, 0, false};
                    }
                } else if (++next.column == columns) {
                    next.column = 0;
                    if (++next.tile == tiles) next = {next.from, 0, 0, true};
                }
            }
            end_group();
            slot = (slot + 1) % AHEAD;
        }
    }

    // Reads the step `at`, whose turn it is. Every thread calls it.
    __device__ __forceinline__ void read(const At &at, float (&x)[UNROLL][V]) {
        if constexpr (COPIED) {
            wait_for_groups_but<AHEAD - 1>();
#pragma unroll
            for (u32 u = 0; u < UNROLL; u++) unpack<T>(room[(slot * UNROLL + u) * THREADS], x[u]);
            copy();
        } else if (column(at.column) < d) {
#pragma unroll
            for (u32 u = 0; u < UNROLL; u++) load<T, V>(address(at, u), x[u]);
        }
    }
};

template <class T, int V, int G> __device__ void decode(const Decode &p) {
    extern __shared__ __align__(16) float shared[];
    __shared__ const T *rows[MOST_SPAN];
    __shared__ float most[G], total[G];
    __shared__ bool last;
    const u32 d = p.runs.head_dim, lanes = p.lanes;
    float *q = shared;                          // G × d
    float *weights = q + G * d;                 // G × MOST_CHUNK
    float *sums = weights + G * MOST_CHUNK;     // a warp: G × lanes × V
    uint4 *room = reinterpret_cast<uint4 *>(sums + THREADS / WARP * G * lanes * V);

    const Segment segment = p.segments[blockIdx.z];
    const u32 kv_head = blockIdx.y / p.passes, from_head = blockIdx.y % p.passes * G;
    const u32 heads = min(u32(G), p.group - from_head);
    u32 first = segment.first, n = segment.end - segment.first;
    const u32 *list = nullptr;
    if (segment.listed) {
        list = segment.listed[kv_head].rows;
        first = 0;
        n = segment.listed[kv_head].count;
    }
    const u32 chunk = chunk_tokens(n), chunks = max(1u, (n + chunk - 1) / chunk);
    const u32 first_chunk = blockIdx.x * p.span, end_chunk = min(first_chunk + p.span, chunks);
    if (first_chunk >= chunks) return;
    const u32 begin = first_chunk * chunk, all = min(end_chunk * chunk, n) - begin;
    const u32 head0 = kv_head * p.group + from_head;

#pragma unroll 1
    for (u32 i = threadIdx.x; i < all; i += THREADS) {
        const u32 at = first + begin + i;
        rows[i] = run_row<T>(p.runs, segment.extents, kv_head, list ? list[at] : at);
    }
    __syncthreads();
    Steps<T, V> steps(rows, room, d, chunk, all, lanes);
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) steps.copy();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < G * d; i += THREADS) {
        const u32 g = min(i / d, heads - 1);
        q[i] = p.q[segment.row * p.q_stride + (head0 + g) * d + i % d] * p.scale;
    }
    __syncthreads();

    const u64 partial = d + 2;
    const u64 heads_all = u64(p.kv_heads) * p.group;
    float *partials = p.partials + (blockIdx.z * heads_all + head0) * p.most_chunks * partial;
    const u32 warp = threadIdx.x / WARP, lane = steps.lane, width = lanes * V;
#pragma unroll 1
    for (u32 j = first_chunk; j < end_chunk; j++) {
        const u32 from = (j - first_chunk) * chunk, count = steps.count(from), tiles = steps.tiles(from);
        // Scores: `lanes` threads a row, each V columns at a time.
#pragma unroll 1
        for (u32 tile = 0; tile < tiles; tile++) {
            float scores[UNROLL][G] = {};
#pragma unroll 1
            for (u32 at = 0; at < steps.columns; at++) {
                float k[UNROLL][V];
                steps.read({from, tile, at, false}, k);
                const u32 c = steps.column(at);
                if (c >= d) continue;
#pragma unroll
                for (int g = 0; g < G; g++) {
                    float part[V];
                    load_floats<V>(q + g * d + c, part);
#pragma unroll
                    for (int u = 0; u < UNROLL; u++) {
#pragma unroll
                        for (int i = 0; i < V; i++) scores[u][g] = fmaf(part[i], k[u][i], scores[u][g]);
                    }
                }
            }
#pragma unroll 1
            for (u32 step = lanes / 2; step > 0; step /= 2) {
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
#pragma unroll
                    for (int g = 0; g < G; g++) scores[u][g] += __shfl_xor_sync(FULL, scores[u][g], step);
                }
            }
#pragma unroll
            for (int u = 0; u < UNROLL; u++) {
                const u32 t = steps.row(tile, u);
#pragma unroll
                for (int g = 0; g < G; g++) {
                    if (lane == 0 && t < count) weights[g * MOST_CHUNK + t] = scores[u][g];
                }
            }
        }
        __syncthreads();

        // A warp a head: largest score, weights, their sum.
        for (u32 g = threadIdx.x / WARP; g < G; g += THREADS / WARP) {
            float *w = weights + g * MOST_CHUNK, m = LEAST, l = 0;
#pragma unroll 1
            for (u32 t = threadIdx.x % WARP; t < count; t += WARP) m = fmaxf(m, w[t]);
            m = warp_max(m);
#pragma unroll 1
            for (u32 t = threadIdx.x % WARP; t < count; t += WARP) {
                w[t] = expf(w[t] - m);
                l += w[t];
            }
            l = warp_sum(l);
            if (threadIdx.x % WARP == 0) {
                most[g] = m;
                total[g] = l;
            }
        }
        __syncthreads();

        // Weighted values; what the threads of a column have is added in a fixed order.
#pragma unroll 1
        for (u32 at = 0; at < steps.columns; at++) {
            float values[G][V] = {};
#pragma unroll 1
            for (u32 tile = 0; tile < tiles; tile++) {
                float v[UNROLL][V] = {};
                steps.read({from, tile, at, true}, v);
#pragma unroll
                for (int u = 0; u < UNROLL; u++) {
                    const u32 t = steps.row(tile, u);
#pragma unroll
                    for (int g = 0; g < G; g++) {
                        const float w = t < count ? weights[g * MOST_CHUNK + t] : 0.0f;
#pragma unroll
                        for (int i = 0; i < V; i++) values[g][i] = fmaf(w, v[u][i], values[g][i]);
                    }
                }
            }
#pragma unroll 1
            for (u32 step = lanes; step < WARP; step *= 2) {
#pragma unroll
                for (int g = 0; g < G; g++) {
#pragma unroll
                    for (int i = 0; i < V; i++) values[g][i] += __shfl_xor_sync(FULL, values[g][i], step);
                }
            }
#pragma unroll
            for (int g = 0; g < G; g++) {
#pragma unroll
                for (int i = 0; i < V; i++) {
                    if (threadIdx.x % WARP < lanes) sums[((warp * G + g) * lanes + lane) * V + i] = values[g][i];
                }
            }
            __syncthreads();
#pragma unroll 1
            for (u32 i = threadIdx.x; i < heads * width; i += THREADS) {
                const u32 g = i / width, column = at * width + i % width;
                if (column < d) {
                    float y = 0;
#pragma unroll
                    for (u32 w = 0; w < THREADS / WARP; w++) y += sums[w * G * width + i];
                    if (chunks == 1) {
                        p.out[segment.row * p.out_stride + (head0 + g) * d + column] = n ? y / total[g] : 0.0f;
                    } else {
                        partials[(g * p.most_chunks + j) * partial + 2 + column] = y;
                    }
                }
            }
            __syncthreads();
        }
        if (chunks > 1 && threadIdx.x < heads) {
            float *to = partials + (threadIdx.x * p.most_chunks + j) * partial;
            to[0] = most[threadIdx.x];
            to[1] = total[threadIdx.x];
        }
    }
    if (chunks == 1) return;

    // The last block of this head to get here sees what all the others wrote.
    __threadfence();
    __syncthreads();
    u32 *counter = p.counters + blockIdx.z * gridDim.y + blockIdx.y;
    if (threadIdx.x == 0) last = atomicAdd(counter, end_chunk - first_chunk) + end_chunk - first_chunk == chunks;
    __syncthreads();
    if (!last) return;
    __threadfence();
    if (threadIdx.x == 0) *counter = 0;
    // A warp a head finds the largest score of all chunks.
#pragma unroll 1
    for (u32 g = warp; g < heads; g += THREADS / WARP) {
        const float *from = partials + g * p.most_chunks * partial;
        float m = LEAST;
        for (u32 j = threadIdx.x % WARP; j < chunks; j += WARP) m = fmaxf(m, __ldcg(from + j * partial));
        m = warp_max(m);
        if (threadIdx.x % WARP == 0) most[g] = m;
        if (threadIdx.x % WARP == 0) total[g] = 0;
    }
    // Chunks in order, as many at a time as there is room for their factors; a thread has every 128th column of all heads.
    constexpr u32 COLUMNS = 2 * G;
    float y[COLUMNS] = {};
#pragma unroll 1
    for (u32 j0 = 0; j0 < chunks; j0 += MOST_CHUNK) {
        const u32 here = min(MOST_CHUNK, chunks - j0);
        __syncthreads();
#pragma unroll 1
        for (u32 g = warp; g < heads; g += THREADS / WARP) {
            const float *from = partials + (g * p.most_chunks + j0) * partial;
            float l = 0;
            for (u32 j = threadIdx.x % WARP; j < here; j += WARP) {
                const float factor = expf(__ldcg(from + j * partial) - most[g]);
                weights[g * MOST_CHUNK + j] = factor;
                l = fmaf(factor, __ldcg(from + j * partial + 1), l);
            }
            l = warp_sum(l);
            if (threadIdx.x % WARP == 0) total[g] += l;
        }
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < COLUMNS; i++) {
            const u32 at = threadIdx.x + i * THREADS, g = at / d;
            if (g < heads) {
                const float *from = partials + (g * p.most_chunks + j0) * partial + 2 + at % d;
#pragma unroll 4
                for (u32 j = 0; j < here; j++) y[i] = fmaf(weights[g * MOST_CHUNK + j], __ldcg(from + j * partial), y[i]);
            }
        }
    }
#pragma unroll
    for (u32 i = 0; i < COLUMNS; i++) {
        const u32 at = threadIdx.x + i * THREADS, g = at / d;
        if (g < heads) p.out[segment.row * p.out_stride + head0 * d + at] = y[i] / total[g];
    }
}

// The kernels of a type of KV, each in a file of its own: one that is not used is not compiled. NAME_G for rows whose
// halves 16 bytes divide, NAME_scalar_G for others.
#define DECODE(NAME, T)                                                                                        \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) NAME##_1(Decode p) { decode<T, LANES<T>, 1>(p); } \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) NAME##_2(Decode p) { decode<T, LANES<T>, 2>(p); } \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) NAME##_4(Decode p) { decode<T, LANES<T>, 4>(p); } \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_8(Decode p) { decode<T, LANES<T>, 8>(p); }    \
    extern "C" __global__ void __launch_bounds__(THREADS) NAME##_scalar_2(Decode p) { decode<T, 1, 2>(p); }
