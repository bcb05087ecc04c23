// Causal attention of many new tokens of one sequence on tensor cores, KV in bf16 or f16: FlashAttention-2 (Dao 2023).
//
// A block of four warps takes 64 or 128 query rows of a head, 16·M a warp, and walks the KV that they see in tiles. The
// next tile is on its way to shared memory (cp.async) while this one is multiplied. Scores, the online softmax and sums
// are f32; queries and the softmax's weights are rounded to the type of the KV. A row's bits do not depend on the rows
// beside it: tiles begin at multiples of their size, and one of which a row sees nothing changes nothing of it.
//
// grid: query heads × row tiles, those that see the most first; heads that share KV run side by side.
#include "async.cuh"
#include "attend.cuh"
#include "mma.cuh"

// Four 8 × 8 matrices of 16-bit numbers. Lane 8i + r says where row r of matrix i lies; lane 4r + c gets columns 2c and
// 2c + 1 of row r of each, or, transposed, rows 2c and 2c + 1 of column r.
__device__ __forceinline__ void load_matrices(u32 (&a)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(from));
}
__device__ __forceinline__ void load_transposed(u32 (&a)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(from));
}

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
    u32 vectors;  // 1: rows can be read 16 bytes at a time
    float scale;  // above zero
};

constexpr u32 WARPS = 4, THREADS = WARPS * WARP;

// Tiles of heads of D dimensions in shared memory: rows of 16-byte pieces, so that the eight rows of a matrix lie in
// different banks. Rows of a multiple of eight pieces have them permuted; others are an odd number of pieces apart.
template <int D> struct Layout {
    static constexpr u32 M = D <= 128 ? 2 : 1;
    static constexpr u32 ROWS = WARPS * 16 * M, TOKENS = D <= 128 ? 64 : 32;
    static constexpr u32 PIECES = D / 8;
    static constexpr bool PERMUTED = PIECES % 8 == 0;
    static constexpr u32 STRIDE = 16 * (PERMUTED ? PIECES : PIECES | 1);
    static constexpr u32 TILE = TOKENS * STRIDE;  // bytes of a tile's keys; its values follow

    static __device__ __forceinline__ u32 at(u32 row, u32 piece) {
        return row * STRIDE + 16 * (PERMUTED ? piece ^ row % 8 : piece);
    }
};

template <class T, int D> __device__ __forceinline__ void prefill(const Prefill &p) {
    typedef Layout<D> L;
    constexpr u32 M = L::M, TOKENS = L::TOKENS, STEPS = D / 16, GROUPS = TOKENS / 16;
    constexpr bool HELD = D <= 64;  // whether registers hold the queries
    extern __shared__ __align__(16) u32 shared[];
    // Of a tile's rows. Behind the last one it is read again: what weighs nothing must be a number.
    __shared__ u64 addresses[2][TOKENS];
    const u32 queries = shared_address(shared), kv = queries + L::ROWS * L::STRIDE;
    const u32 thread = threadIdx.x % THREADS;  // the compiler learns its bits
    const u32 head = blockIdx.x, row0 = (gridDim.y - 1 - blockIdx.y) * L::ROWS;
    const u32 here = min(L::ROWS, p.rows - row0), end = p.position + row0 + here;
    auto first_seen = [&](u32 at) { return p.window && at + 1 > p.window ? at + 1 - p.window : 0; };
    const u32 first_tile = first_seen(p.position + row0) / TOKENS, end_tile = (end + TOKENS - 1) / TOKENS;

    auto locate = [&](u32 tile) {
        const u32 t = min(tile * TOKENS + thread, end - 1);
        return thread < TOKENS ? reinterpret_cast<u64>(run_row<T>(p.runs, p.extents, head / p.group, t)) : 0;
    };
    auto fetch = [&](u32 tile) {
        constexpr u32 ROW = 2 * L::PIECES, COPIES = TOKENS * ROW / THREADS;
        static_assert(COPIES * THREADS == TOKENS * ROW, "threads copy alike");
        const u64 *rows = addresses[tile % 2];
        const u32 to = kv + tile % 2 * 2 * L::TILE;
        if constexpr (L::PERMUTED) {
            // A thread copies one piece of every STEP-th row, and the permutation differs by whole bits.
            constexpr u32 STEP = THREADS / ROW;
            const u32 t = thread / ROW, piece = thread % ROW, place = 16 * (piece % L::PIECES ^ t);
            const u32 first = to + piece / L::PIECES * L::TILE + t * L::STRIDE;
#pragma unroll
            for (u32 u = 0; u < COPIES; u++) {
                const u32 differs = 16 * (u * STEP % 8);
                copy_16(first + u * STEP * L::STRIDE + (place ^ differs), rows[t + u * STEP] + 16 * piece);
            }
        } else {
#pragma unroll
            for (u32 u = 0; u < COPIES; u++) {
                const u32 i = thread + u * THREADS, t = i / ROW, piece = i % ROW;
                copy_16(to + piece / L::PIECES * L::TILE + L::at(t, piece % L::PIECES), rows[t] + 16 * piece);
            }
        }
    };

    if (thread < TOKENS) {
        addresses[first_tile % 2][thread] = locate(first_tile);
        addresses[(first_tile + 1) % 2][thread] = locate(first_tile + 1);
    }
    __syncthreads();
    fetch(first_tile);
#pragma unroll 8
    for (u32 u = 0; u < L::ROWS * D / 2 / THREADS; u++) {
        const u32 i = thread + u * THREADS, row = i / (D / 2), column = i % (D / 2) * 2;
        const float *q = p.q + (row0 + row) * p.q_stride + head * D + column;
        const u32 both = row < here ? narrow2(q[0], q[1], T()) : 0;
        shared[L::at(row, column / 8) / 4 + column % 8 / 2] = both;
    }

    const u32 lane = thread % WARP, warp = thread / WARP, warp_row = warp * 16 * M;
    // Which row and piece of a 16 × 16 tile a lane names: of queries and values; of keys, whose rows are columns of b.
    const u32 a_row = lane % 16, a_piece = lane / 16, b_row = lane / 16 * 8 + lane % 8, b_piece = lane / 8 % 2;
    const u32 lowest = p.position + row0 + warp_row, highest = lowest + 16 * M - 1;  // positions of the warp's rows
    const u32 seen_by_lowest = first_seen(lowest), seen_by_highest = first_seen(highest);
    const float to_exponent = p.scale * 1.4426950408889634f;  // scores are powers of two from here on
    u32 held[HELD ? STEPS : 1][M][4];
    float y[M][D / 8][4] = {}, most[M][2], sums[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; m++) most[m][0] = most[m][1] = LEAST;

    auto load_queries = [&](u32 (&a)[M][4], u32 step) {
#pragma unroll
        for (u32 m = 0; m < M; m++) {
            load_matrices(a[m], queries + L::at(warp_row + 16 * m + a_row, 2 * step + a_piece));
        }
    };

    auto attend = [&](u32 tile) {
        const u32 keys = kv + tile % 2 * 2 * L::TILE, values = keys + L::TILE, t0 = tile * TOKENS;
        float s[M][TOKENS / 8][4] = {};
#pragma unroll
        for (u32 step = 0; step < STEPS; step++) {
            u32 loaded[M][4];
            if constexpr (!HELD) load_queries(loaded, step);
            const u32(&a)[M][4] = HELD ? held[HELD ? step : 0] : loaded;
#pragma unroll
            for (u32 n = 0; n < GROUPS; n++) {
                u32 b[4];
                load_matrices(b, keys + L::at(16 * n + b_row, 2 * step + b_piece));
#pragma unroll
                for (u32 m = 0; m < M; m++) {
                    mma(s[m][2 * n], a[m], b[0], b[1], T());
                    mma(s[m][2 * n + 1], a[m], b[2], b[3], T());
                }
            }
        }
        if (t0 + TOKENS - 1 > lowest || t0 < seen_by_highest) {
#pragma unroll
            for (u32 m = 0; m < M; m++) {
#pragma unroll
                for (u32 half = 0; half < 2; half++) {
                    const u32 at = lowest + 16 * m + 8 * half + lane / 4, first = first_seen(at);
#pragma unroll
                    for (u32 n = 0; n < TOKENS / 8; n++) {
#pragma unroll
                        for (u32 i = 0; i < 2; i++) {
                            const u32 t = t0 + 8 * n + lane % 4 * 2 + i;
                            if (t > at || t < first) s[m][n][2 * half + i] = -__int_as_float(0x7f800000);
                        }
                    }
                }
            }
        }
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                // Never below LEAST, a number: where a row sees nothing of the tile, differences are 0, weights 2^-∞.
                float next = most[m][half];
#pragma unroll
                for (u32 n = 0; n < TOKENS / 8; n++) {
                    next = fmaxf(next, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
                }
#pragma unroll
                for (int step = 2; step > 0; step /= 2) next = fmaxf(next, __shfl_xor_sync(FULL, next, step));
                const float rescale = exp2_fast((most[m][half] - next) * to_exponent), shift = -next * to_exponent;
                most[m][half] = next;
                float sum = 0;
#pragma unroll
                for (u32 n = 0; n < TOKENS / 8; n++) {
#pragma unroll
                    for (u32 i = 2 * half; i < 2 * half + 2; i++) {
                        s[m][n][i] = exp2_fast(fmaf(s[m][n][i], to_exponent, shift));
                        sum += s[m][n][i];
                    }
                }
                sums[m][half] = fmaf(sums[m][half], rescale, sum);
#pragma unroll
                for (u32 n = 0; n < D / 8; n++) {
                    y[m][n][2 * half] *= rescale;
                    y[m][n][2 * half + 1] *= rescale;
                }
            }
        }
#pragma unroll
        for (u32 group = 0; group < GROUPS; group++) {
            // What an mma leaves as two 16 × 8 results is laid out as the next one's left side, 16 × 16.
            u32 a[M][4];
#pragma unroll
            for (u32 m = 0; m < M; m++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    const float(&w)[4] = s[m][2 * group + i / 2];
                    a[m][i] = narrow2(w[i % 2 * 2], w[i % 2 * 2 + 1], T());
                }
            }
#pragma unroll
            for (u32 n = 0; n < STEPS; n++) {
                u32 b[4];
                load_transposed(b, values + L::at(16 * group + a_row, 2 * n + a_piece));
#pragma unroll
                for (u32 m = 0; m < M; m++) {
                    mma(y[m][2 * n], a[m], b[0], b[1], T());
                    mma(y[m][2 * n + 1], a[m], b[2], b[3], T());
                }
            }
        }
    };

#pragma unroll 1
    for (u32 tile = first_tile; tile < end_tile; tile++) {
        wait_for_copies();
        // Everyone's copies are here, and nobody reads the other half any more.
        __syncthreads();
        if (tile + 1 < end_tile) fetch(tile + 1);
        const u64 address = locate(tile + 2);
        if constexpr (HELD) {
            if (tile == first_tile) {
#pragma unroll
                for (u32 step = 0; step < STEPS; step++) load_queries(held[step], step);
            }
        }
        // Warps differ in what they see: a tile may be ahead of one's last row, or before the window of its first.
        if (warp_row < here && tile * TOKENS <= highest && tile * TOKENS + TOKENS > seen_by_lowest) attend(tile);
        if (thread < TOKENS) addresses[tile % 2][thread] = address;
    }

    // A lane summed the weights of its columns.
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
#pragma unroll
            for (int step = 2; step > 0; step /= 2) sums[m][half] += __shfl_xor_sync(FULL, sums[m][half], step);
        }
    }
    const bool pairs = (reinterpret_cast<u64>(p.out) | p.out_stride * 4) % 8 == 0;
#pragma unroll
    for (u32 m = 0; m < M; m++) {
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 row = warp_row + 16 * m + 8 * half + lane / 4;
            if (row >= here) continue;
            const float inverse = __fdividef(1.0f, sums[m][half]);
            float *out = p.out + (row0 + row) * p.out_stride + head * D + lane % 4 * 2;
#pragma unroll
            for (u32 n = 0; n < D / 8; n++) {
                const float left = y[m][n][2 * half] * inverse, right = y[m][n][2 * half + 1] * inverse;
                if (pairs) {
                    *reinterpret_cast<float2 *>(out + 8 * n) = make_float2(left, right);
                } else {
                    out[8 * n] = left;
                    out[8 * n + 1] = right;
                }
            }
        }
    }
}

#define PREFILL(NAME, T)                                                                                               \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME##_64(Prefill p) { prefill<T, 64>(p); }              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME##_80(Prefill p) { prefill<T, 80>(p); }              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME##_96(Prefill p) { prefill<T, 96>(p); }              \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME##_128(Prefill p) { prefill<T, 128>(p); }            \
    extern "C" __global__ void __launch_bounds__(THREADS, 2) NAME##_256(Prefill p) { prefill<T, 256>(p); }

PREFILL(attend_prefill_mma_f16, f16)
PREFILL(attend_prefill_mma_bf16, bf16)
