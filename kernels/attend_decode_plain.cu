// Attention of one new token a sequence in plain f32 products: keys and values in f32, and rows of any width. Others have
// tensor cores (attend_decode_mma.cuh).
//
// A thread copies what it will read itself to shared memory, AHEAD steps before, so that K and V of the next chunk come in
// while this one's scores become weights.
#include "attend_decode.cuh"

constexpr int UNROLL = 4;  // rows that a thread reads in a step
constexpr u32 AHEAD = 2;   // steps
constexpr u32 MOST_CHUNK = 256, MOST_SPAN = 256;  // tokens of a chunk, and of a span

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
    wait_for_previous();
    extern __shared__ __align__(16) float shared[];
    __shared__ const T *rows[MOST_SPAN];
    __shared__ float most[G], total[G];
    const u32 d = p.runs.head_dim, lanes = p.lanes;
    float *q = shared;                          // G × d
    float *weights = q + G * d;                 // G × MOST_CHUNK
    float *sums = weights + G * MOST_CHUNK;     // a warp: G × lanes × V
    uint4 *room = reinterpret_cast<uint4 *>(sums + WARPS * G * lanes * V);

    const Work<G> work(p);
    const u32 heads = work.heads, chunk = chunk_tokens(work.n), chunks = max(1u, (work.n + chunk - 1) / chunk);
    const u32 first_chunk = blockIdx.x * p.span, end_chunk = min(first_chunk + p.span, chunks);
    if (first_chunk >= chunks) return;
    const u32 begin = first_chunk * chunk, all = min(end_chunk * chunk, work.n) - begin;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < all; i += THREADS) rows[i] = work.template address<T>(p, work.row(begin + i));
    __syncthreads();
    Steps<T, V> steps(rows, room, d, chunk, all, lanes);
#pragma unroll
    for (u32 i = 0; i < AHEAD; i++) steps.copy();
#pragma unroll 1
    for (u32 i = threadIdx.x; i < G * d; i += THREADS) {
        const u32 g = min(i / d, heads - 1);
        q[i] = p.q[work.segment.row * p.q_stride + (work.head0 + g) * d + i % d] * (p.scale * LOG2_E);
    }
    __syncthreads();

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
        for (u32 g = threadIdx.x / WARP; g < G; g += WARPS) {
            float *w = weights + g * MOST_CHUNK, m = LEAST, l = 0;
#pragma unroll 1
            for (u32 t = threadIdx.x % WARP; t < count; t += WARP) m = fmaxf(m, w[t]);
            m = warp_max(m);
#pragma unroll 1
            for (u32 t = threadIdx.x % WARP; t < count; t += WARP) {
                w[t] = exp2f(w[t] - m);
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
                    for (u32 w = 0; w < WARPS; w++) y += sums[w * G * width + i];
                    if (chunks == 1) {
                        work.out(p, g)[column] = work.n ? y / total[g] : 0.0f;
                    } else {
                        work.values(p, g, j)[column] = y;
                    }
                }
            }
            __syncthreads();
        }
        if (chunks > 1 && threadIdx.x < heads) {
            float *to = work.sums(p, threadIdx.x, j);
            to[0] = most[threadIdx.x];
            to[1] = total[threadIdx.x];
        }
    }
    if (d % 4 == 0) {
        merge<float4>(p, work, chunks, first_chunk, end_chunk - first_chunk);
    } else {
        merge<float>(p, work, chunks, first_chunk, end_chunk - first_chunk);
    }
}

#define DECODE(NAME, BLOCKS, T, V, G) \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(Decode p) { decode<T, V, G>(p); }

DECODE(attend_decode_f32_1, 4, float, 4, 1)
DECODE(attend_decode_f32_2, 4, float, 4, 2)
DECODE(attend_decode_f32_4, 4, float, 4, 4)
DECODE(attend_decode_f32_8, 1, float, 4, 8)
DECODE(attend_decode_f32_scalar, 1, float, 1, 2)
DECODE(attend_decode_f16_scalar, 1, f16, 1, 2)
DECODE(attend_decode_bf16_scalar, 1, bf16, 1, 2)
