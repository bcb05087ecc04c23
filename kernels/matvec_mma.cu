// Matrix products for decode with bf16 weights, on tensor cores: up to 32 rows read each weight once.
//
// Activations stay f32 in effect: each is the sum of three bf16 numbers, exactly, whose products with a bf16 weight are
// exact too. Tensor cores sum the products of a stage, 64 of the depth; stages are added in f32, rounded to nearest.
//
// A tile is 256 outputs, 32 a warp. The stages of all tiles, tile after tile, are one long list, of which each block takes
// an equal part: so every multiprocessor reads weights until the end, whatever the matrix's shape. Weights of later stages
// are on their way to shared memory, across the tiles' borders, each 16 bytes copied by the thread that will multiply them;
// activations of the next stage are taken apart meanwhile, once for all warps. Where several blocks have stages of one
// tile, the last of them to finish adds their sums in order. The parts depend on the matrix alone, and columns of an mma do
// not see each other: a row's bits depend neither on the rows beside it nor on how many there are.
//
// grid: parts × tiles of rows; blocks beside each other share the weights.
#include "async.cuh"

struct Matvec {
    const float *x;
    const bf16 *weight;
    const float *bias;
    float *out;
    float4 *partials;  // of each block, what it has of its first tile and of its last: SUMS · 8·N rows each
    u32 *counters;     // zero, and left zero: one a tile and tile of rows
    u64 x_stride;
    u64 out_stride;
    u32 depth;  // a multiple of 8
    u32 outputs;
    u32 rows;
    u32 row_tiles;  // of 8·N rows
    u32 parts;      // at most as many as there are stages
    u32 ahead;      // stages of weights in shared memory: two to eight
    u32 accumulate;
    u32 unused;
};

constexpr u32 WARPS = 8, THREADS = WARPS * WARP;
constexpr u32 M = 2, OUTPUTS = WARPS * 16 * M;       // mma's 16 outputs a warp, and outputs of a tile
constexpr u32 PIECE = 32, PIECES = 2, STAGE = PIECE * PIECES;  // of the depth
constexpr u32 TERMS = 3;
constexpr u32 COPIES = PIECES * 2 * M;  // of a thread, for a stage's weights

// c += a · b: 16 × 16 by 16 × 8, fragments as PTX's mma.m16n8k16 lays them out.
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Takes the bf16 numbers nearest to two floats out of them.
__device__ __forceinline__ u32 split(float &low, float &high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    low -= __uint_as_float(both << 16);
    high -= __uint_as_float(both & 0xffff0000u);
    return both;
}

// N tiles of 8 rows. Lane 4g + t holds weights of outputs g, g + 8, …, and activations of row g: of each piece of the
// depth eight in a row from 8t on. Which of them an mma calls its k does not matter, as long as both sides agree.
template <int N> struct Product {
    const Matvec &p;
    uint4 *weights;      // ahead × COPIES × THREADS, each thread's own
    uint4 *activations;  // two stages × PIECES × TERMS × N × WARP
    u32 row0, stages;    // of all rows; of a tile
    u32 lane, warp, g, t;
    float sums[M][N][4];

    __device__ Product(const Matvec &p, uint4 *shared)
        : p(p), weights(shared), activations(shared + p.ahead * COPIES * THREADS), row0(blockIdx.x % p.row_tiles * 8 * N),
          stages((p.depth + STAGE - 1) / STAGE), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), g(lane / 4), t(lane % 4) {}

    // The first stage of a part, and the part that has a stage.
    __device__ u32 first_of(u32 part) const { return u32(u64(all()) * part / p.parts); }
    __device__ u32 part_of(u32 stage) const { return u32((u64(stage + 1) * p.parts - 1) / all()); }
    __device__ u32 all() const { return (p.outputs + OUTPUTS - 1) / OUTPUTS * stages; }

    // Asks for this thread's weights of a stage.
    __device__ __forceinline__ void fetch(u32 stage, u32 slot) const {
        const u32 first = stage / stages * OUTPUTS + warp * 16 * M + g, k0 = stage % stages * STAGE + t * 8;
        const u32 to = shared_address(weights + slot * COPIES * THREADS + threadIdx.x);
#pragma unroll
        for (u32 m = 0; m < 2 * M; m++) {
            const bf16 *row = p.weight + u64(min(first + 8 * m, p.outputs - 1)) * p.depth;
#pragma unroll
            for (u32 u = 0; u < PIECES; u++) {
                const u32 k = k0 + u * PIECE;
                copy_16_or_zeros(to + (u * 2 * M + m) * THREADS * 16, reinterpret_cast<u64>(k < p.depth ? row + k : row),
                                 k < p.depth);
            }
        }
    }

    // A thread's activations of a stage: eight of one row, or none where there are fewer than threads.
    __device__ __forceinline__ void load(u32 stage, float (&x)[8]) const {
        if (warp >= PIECES * N) return;
        const u32 row = row0 + warp % N * 8 + g, k = stage % stages * STAGE + warp / N * PIECE + t * 8;
        if (row < p.rows && k < p.depth) {
            load_floats<8>(p.x + row * p.x_stride + k, x);
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; i++) x[i] = 0;
        }
    }

    // Takes them apart, for all warps.
    __device__ __forceinline__ void share(u32 buffer, float (&x)[8]) {
        if (warp >= PIECES * N) return;
        const u32 u = warp / N, n = warp % N;
#pragma unroll
        for (u32 term = 0; term < TERMS; term++) {
            uint4 words;
            words.x = split(x[0], x[1]);
            words.y = split(x[2], x[3]);
            words.z = split(x[4], x[5]);
            words.w = split(x[6], x[7]);
            activations[((buffer * PIECES + u) * TERMS + term) * N * WARP + n * WARP + lane] = words;
        }
    }

    __device__ __forceinline__ void multiply(u32 slot, u32 buffer) {
        float stage[M][N][4] = {};
        const uint4 *own = weights + slot * COPIES * THREADS + threadIdx.x;
#pragma unroll
        for (u32 u = 0; u < PIECES; u++) {
            uint4 w[2 * M];
#pragma unroll
            for (u32 m = 0; m < 2 * M; m++) w[m] = own[(u * 2 * M + m) * THREADS];
            const uint4 *x = activations + (buffer * PIECES + u) * TERMS * N * WARP + lane;
#pragma unroll
            for (u32 term = 0; term < TERMS; term++) {
#pragma unroll
                for (u32 n = 0; n < N; n++) {
                    const uint4 words = x[(term * N + n) * WARP];
#pragma unroll
                    for (u32 m = 0; m < M; m++) {
                        mma(stage[m][n], w[2 * m].x, w[2 * m + 1].x, w[2 * m].y, w[2 * m + 1].y, words.x, words.y);
                        mma(stage[m][n], w[2 * m].z, w[2 * m + 1].z, w[2 * m].w, w[2 * m + 1].w, words.z, words.w);
                    }
                }
            }
        }
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 n = 0; n < N; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) sums[m][n][i] += stage[m][n][i];
            }
        }
    }

    // Where a block leaves what it has of its first tile, or of its last.
    __device__ float4 *partial(u32 part, u32 which) const {
        const u64 block = u64(part) * p.row_tiles + blockIdx.x % p.row_tiles;
        return p.partials + (2 * block + which) * M * N * THREADS + threadIdx.x;
    }

    // Of a tile some of whose stages other parts have: true for the last block to get here, which then has all sums.
    __device__ __forceinline__ bool merge(u32 tile, u32 part) {
        __shared__ bool last;
        const u32 begin = tile * stages;
        float4 *to = partial(part, first_of(part) < begin);
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 n = 0; n < N; n++) {
                const float *c = sums[m][n];
                to[(m * N + n) * THREADS] = make_float4(c[0], c[1], c[2], c[3]);
            }
        }
        const u32 from = part_of(begin), end = part_of(begin + stages - 1) + 1;
        u32 *counter = p.counters + tile * p.row_tiles + blockIdx.x % p.row_tiles;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) last = atomicAdd(counter, 1) == end - from - 1;
        __syncthreads();
        if (!last) return false;
        __threadfence();
        if (threadIdx.x == 0) *counter = 0;
        clear();
#pragma unroll 2
        for (u32 other = from; other < end; other++) {
            const float4 *of = partial(other, first_of(other) < begin);
#pragma unroll
            for (u32 m = 0; m < M; m++) {
#pragma unroll
                for (u32 n = 0; n < N; n++) {
                    const float4 c = __ldcg(of + (m * N + n) * THREADS);
                    sums[m][n][0] += c.x;
                    sums[m][n][1] += c.y;
                    sums[m][n][2] += c.z;
                    sums[m][n][3] += c.w;
                }
            }
        }
        return true;
    }

    __device__ __forceinline__ void store(u32 tile) const {
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 n = 0; n < N; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const u32 row = row0 + n * 8 + 2 * t + i % 2;
                    const u32 output = tile * OUTPUTS + (warp * M + m) * 16 + g + i / 2 * 8;
                    if (row >= p.rows || output >= p.outputs) continue;
                    float *out = p.out + row * p.out_stride + output, y = sums[m][n][i];
                    if (p.accumulate) y += *out;
                    *out = p.bias ? y + p.bias[output] : y;
                }
            }
        }
    }

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 n = 0; n < N; n++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) sums[m][n][i] = 0;
            }
        }
    }

    __device__ __forceinline__ void run() {
        const u32 part = blockIdx.x / p.row_tiles, begin = first_of(part), end = first_of(part + 1);
        for (u32 i = 0; i + 1 < p.ahead; i++) {
            if (begin + i < end) fetch(begin + i, i);
            end_group();
        }
        float x[8];
        load(begin, x);
        share(0, x);
        if (begin + 1 < end) load(begin + 1, x);
        clear();
        u32 slot = 0, free = p.ahead - 1, buffer = 0, first = begin;
        for (u32 stage = begin; stage < end; stage++) {
            wait_for_groups_but(p.ahead - 2);
            // This stage's activations are there, and everyone has done with those of the one before.
            __syncthreads();
            if (stage + p.ahead - 1 < end) fetch(stage + p.ahead - 1, free);
            end_group();
            if (stage + 1 < end) share(buffer ^ 1, x);
            if (stage + 2 < end) load(stage + 2, x);
            multiply(slot, buffer);
            free = slot;
            slot = slot + 1 == p.ahead ? 0 : slot + 1;
            buffer ^= 1;
            const u32 tile = stage / stages;
            if ((stage + 1) % stages != 0 && stage + 1 < end) continue;
            // The block's last stage of this tile.
            const bool whole = first == tile * stages && stage + 1 == first + stages;
            if (whole || merge(tile, part)) store(tile);
            clear();
            first = stage + 1;
        }
    }
};

template <int N> __device__ __forceinline__ void matvec(const Matvec &p) {
    extern __shared__ __align__(16) uint4 shared[];
    Product<N>(p, shared).run();
}

extern "C" __global__ void __launch_bounds__(THREADS) matvec_mma_8(Matvec p) { matvec<1>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) matvec_mma_16(Matvec p) { matvec<2>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) matvec_mma_24(Matvec p) { matvec<3>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) matvec_mma_32(Matvec p) { matvec<4>(p); }
