// Attention of one new token a sequence on tensor cores, KV in bf16 or f16, up to eight query heads a KV head.
//
// It is near f32. A query and a softmax weight are the sum of three numbers of the KV's type, whose products with a key or a
// value are exact; scores, the softmax and sums are f32. (The range of f16 is less than that of f32: there a query is scaled
// to it by a power of two, and weights are up to 2^15. What is below 2^-39 of the largest is lost.)
//
// Chunk i of n has every n-th group of 64 tokens from the i-th on, a tile of 16 for each of four warps: as all blocks begin
// together, they read one stretch of memory, then the next, and that is faster than a stretch for each. A warp has an online
// softmax of its own, and what the four have is added in the end. Tiles are on their way to shared memory, DEPTH of them, while
// others are multiplied; no warp waits for another.
//
// Tokens are the rows of a product's first factor, and heads the columns of its second. Which of the 16 of the depth an mma
// calls its k does not matter as long as both sides agree, nor which dimension it calls its row, as long as who stores it
// knows. So lane 4r + c reads 16 bytes at a time: of the keys of tokens r and r + 8 eight dimensions from 8c on, of the values
// of tokens 2c, 2c + 1, 2c + 8 and 2c + 9 eight from 8r on; and two tokens' values of a dimension move together by one
// instruction.
#pragma once

#include "attend_decode.cuh"
#include "mma.cuh"

constexpr u32 HEADS = 8, TILE = 16, TERMS = 3;
constexpr u32 WARP_BYTES = 16384;  // that a warp has on its way

// Whether a type has the range of f32.
template <class T> constexpr bool WIDE = true;
template <> constexpr bool WIDE<f16> = false;

// Takes the 16-bit numbers nearest to two floats out of them.
template <class T> __device__ __forceinline__ u32 split(float &low, float &high) {
    const u32 both = narrow2(low, high, T());
    float l, h;
    widen2(both, T(), l, h);
    low -= l;
    high -= h;
    return both;
}

// An 8 × 8 matrix of 16-bit numbers, transposed: lane 4r + c holds columns 2c and 2c + 1 of row r.
__device__ __forceinline__ u32 transpose(u32 a) {
    u32 b;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a));
    return b;
}

// A warp's tiles of heads of up to D dimensions, a multiple of 8. Rows of 16-byte pieces lie in shared memory permuted so that
// eight lanes that read together, of two rows of keys or of four of values, find different banks.
template <class T, u32 D> struct Tiles {
    static constexpr u32 PIECES = D / 8, KEY_STEPS = D / 32, VALUE_STEPS = D / 64;
    static constexpr u32 ROOM = 2 * TILE * PIECES;                // 16 bytes: a tile's keys, then its values
    static constexpr u32 DEPTH = WARP_BYTES / (ROOM * 16) < 2 ? 2 : WARP_BYTES / (ROOM * 16);
    static constexpr bool HELD = D <= 128;                        // whether registers hold the queries
    static constexpr u32 QUERIES = HELD ? 0 : KEY_STEPS * TERMS * WARP;  // 16 bytes of shared memory

    const Decode &p;
    const Work<HEADS> &work;
    uint4 *room;  // DEPTH × ROOM
    u32 lane;
    u32 step;
    u32 next, slot;  // the tile that is copied next, and where
    // Of that tile's rows where a lane's lies, and of the tile's behind it which it is: found out ahead, for each takes a read
    // that waits for the last.
    const T *address;
    u32 row;

    // Every `step`-th from the `first` on.
    __device__ __forceinline__ Tiles(const Decode &p, const Work<HEADS> &work, uint4 *room, u32 first, u32 step)
        : p(p), work(work), room(room + threadIdx.x / WARP * DEPTH * ROOM), lane(threadIdx.x % WARP), step(step),
          next(first), slot(0) {
        if (work.n > 0) {
            address = work.template address<T>(p, row_of(next));
            row = row_of(next + step);
        }
    }

    // Behind the last row it is read again, and weighs nothing.
    __device__ __forceinline__ u32 row_of(u32 tile) const { return work.row(min(tile * TILE + lane % TILE, work.n - 1)); }

    static __device__ __forceinline__ u32 key(u32 row, u32 piece) { return row * PIECES + (piece ^ row % 2 * 4); }
    static __device__ __forceinline__ u32 value(u32 row, u32 piece) {
        return (TILE + row) * PIECES + (piece ^ row / 2 % 4 * 2);
    }

    // Waits for the tile whose turn it is.
    __device__ __forceinline__ const uint4 *wait() const {
        wait_for_groups_but<DEPTH - 1>();
        __syncwarp();
        return room + slot * ROOM;
    }

    // Asks for the next tile, into the room of the one that was read last.
    __device__ __forceinline__ void copy() {
        __syncwarp();
        if (next * TILE < work.n) {
            const u32 d = p.runs.head_dim;
#pragma unroll
            for (u32 u = 0; u < ROOM / WARP; u++) {
                const u32 row = (u * WARP + lane) / (2 * PIECES), piece = (u * WARP + lane) % PIECES;
                const bool values = (u * WARP + lane) / PIECES % 2;
                const u64 from = __shfl_sync(FULL, reinterpret_cast<u64>(address), row) + 16 * piece;
                uint4 *to = room + slot * ROOM + (values ? value(row, piece) : key(row, piece));
                copy_16_or_zeros(shared_address(to), from + (values ? d * sizeof(T) : 0), 8 * piece < d);
            }
            next += step;
            address = work.template address<T>(p, row);
            row = row_of(next + step);
        }
        end_group();
        slot = slot + 1 == DEPTH ? 0 : slot + 1;
    }
};

template <class T, u32 D> __device__ __forceinline__ void decode(const Decode &p) {
    wait_for_previous();
    typedef Tiles<T, D> L;
    // Exponent of the largest query and of the largest weight.
    constexpr u32 QUERY_EXPONENT = 14, WEIGHT_EXPONENT = WIDE<T> ? 0 : 15;
    extern __shared__ __align__(128) uint4 shared[];  // whole sectors, whatever lies before
    __shared__ float2 sums[WARPS][HEADS];  // m and l of each warp
    uint4 *room = shared, *queries = room + L::DEPTH * L::ROOM * WARPS;
    float *merged = reinterpret_cast<float *>(room);  // in the end, values: WARPS × heads × d
    const u32 d = p.runs.head_dim, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, r = lane / 4, c = lane % 4;

    const Work<HEADS> work(p);
    const u32 chunks = max(1u, min(p.parts, (work.n + WARPS * TILE - 1) / (WARPS * TILE)));
    if (blockIdx.x >= chunks) return;
    L tiles(p, work, room, blockIdx.x * WARPS + warp, chunks * WARPS);
#pragma unroll
    for (u32 i = 0; i < L::DEPTH; i++) tiles.copy();

    // Queries: lane 4r + c has those of head r, as it has dimensions of keys.
    float down[2] = {1, 1};  // what scores of heads 2c and 2c + 1 are to be scaled by
    uint4 held[L::HELD ? L::KEY_STEPS : 1][TERMS];
    {
        const float *q = p.q + work.segment.row * p.q_stride + u64(work.head0 + min(r, work.heads - 1)) * d;
        auto load = [&](u32 s, float(&x)[8]) {
            const u32 column = 32 * s + 8 * c;
            const bool real = r < work.heads && column < d;
#pragma unroll
            for (u32 i = 0; i < 8; i++) x[i] = real ? q[column + i] * (p.scale * LOG2_E) : 0;
        };
        float up = 1;
        if constexpr (!WIDE<T>) {
            float most = 0;
#pragma unroll
            for (u32 s = 0; s < L::KEY_STEPS; s++) {
                float x[8];
                load(s, x);
#pragma unroll
                for (u32 i = 0; i < 8; i++) most = fmaxf(most, fabsf(x[i]));
            }
            most = fmaxf(most, __shfl_xor_sync(FULL, most, 1));
            most = fmaxf(most, __shfl_xor_sync(FULL, most, 2));
            const u32 exponent = max(__float_as_uint(most) >> 23, 30u);
            up = __uint_as_float((127 + QUERY_EXPONENT + 127 - exponent) << 23);
            const float own = __uint_as_float((exponent - QUERY_EXPONENT) << 23);
            down[0] = __shfl_sync(FULL, own, 8 * c);
            down[1] = __shfl_sync(FULL, own, 8 * c + 4);
        }
#pragma unroll
        for (u32 s = 0; s < L::KEY_STEPS; s++) {
            float x[8];
            load(s, x);
#pragma unroll
            for (u32 i = 0; i < 8; i++) x[i] *= up;
#pragma unroll
            for (u32 term = 0; term < TERMS; term++) {
                uint4 words;
                words.x = split<T>(x[0], x[1]);
                words.y = split<T>(x[2], x[3]);
                words.z = split<T>(x[4], x[5]);
                words.w = split<T>(x[6], x[7]);
                if constexpr (L::HELD) {
                    held[s][term] = words;
                } else if (s % WARPS == warp) {
                    queries[(s * TERMS + term) * WARP + lane] = words;
                }
            }
        }
    }
    if constexpr (!L::HELD) __syncthreads();

    float most[2] = {LEAST, LEAST}, total[2] = {};  // of heads 2c and 2c + 1
    // Of those heads, dimensions 64s + 8r + 2i, then 64s + 8r + 2i + 1.
    float y[L::VALUE_STEPS][4][4] = {};
#pragma unroll 1
    for (u32 token = (blockIdx.x * WARPS + warp) * TILE; token < work.n; token += chunks * WARPS * TILE) {
        // Scores: of token r and heads 2c and 2c + 1, then of token r + 8.
        float s[TERMS][4] = {};
        const uint4 *tile = tiles.wait();
#pragma unroll
        for (u32 step = 0; step < L::KEY_STEPS; step++) {
            const uint4 above = tile[L::key(r, 4 * step + c)], below = tile[L::key(r + 8, 4 * step + c)];
#pragma unroll
            for (u32 term = 0; term < TERMS; term++) {
                const uint4 q = L::HELD ? held[L::HELD ? step : 0][term] : queries[(step * TERMS + term) * WARP + lane];
                mma(s[term], {above.x, below.x, above.y, below.y}, q.x, q.y, T());
                mma(s[term], {above.z, below.z, above.w, below.w}, q.z, q.w, T());
            }
        }

        float weights[4];
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            weights[i] = ((s[2][i] + s[1][i]) + s[0][i]) * down[i % 2];
            if (token + r + i / 2 * 8 >= work.n) weights[i] = LEAST;
        }
#pragma unroll
        for (u32 h = 0; h < 2; h++) {
            float m = fmaxf(weights[h], weights[h + 2]);
#pragma unroll
            for (u32 step = 4; step < WARP; step *= 2) m = fmaxf(m, __shfl_xor_sync(FULL, m, step));
            m = fmaxf(m, most[h]);
            const float factor = exp2_fast(most[h] - m);
            most[h] = m;
            weights[h] = exp2_fast(weights[h] - m + WEIGHT_EXPONENT);
            weights[h + 2] = exp2_fast(weights[h + 2] - m + WEIGHT_EXPONENT);
            total[h] = fmaf(total[h], factor, weights[h] + weights[h + 2]);
#pragma unroll
            for (u32 step = 0; step < L::VALUE_STEPS; step++) {
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    y[step][i][h] *= factor;
                    y[step][i][h + 2] *= factor;
                }
            }
        }
        u32 terms[TERMS][2];
#pragma unroll
        for (u32 term = 0; term < TERMS; term++) {
            terms[term][0] = transpose(split<T>(weights[0], weights[1]));
            terms[term][1] = transpose(split<T>(weights[2], weights[3]));
        }

#pragma unroll
        for (u32 step = 0; step < L::VALUE_STEPS; step++) {
            u32 v[4][4];  // of each token, two dimensions a word
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const uint4 words = tile[L::value(2 * c + i % 2 + i / 2 * 8, 8 * step + r)];
                v[i][0] = words.x;
                v[i][1] = words.y;
                v[i][2] = words.z;
                v[i][3] = words.w;
            }
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                const u32 a[4] = {__byte_perm(v[0][i], v[1][i], 0x5410), __byte_perm(v[0][i], v[1][i], 0x7632),
                                  __byte_perm(v[2][i], v[3][i], 0x5410), __byte_perm(v[2][i], v[3][i], 0x7632)};
#pragma unroll
                for (u32 term = 0; term < TERMS; term++) mma(y[step][i], a, terms[term][0], terms[term][1], T());
            }
        }
        tiles.copy();
    }

    // The four warps' results are added in order.
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
#pragma unroll
        for (u32 step = 4; step < WARP; step *= 2) total[h] += __shfl_xor_sync(FULL, total[h], step);
        if (r == 0) sums[warp][2 * c + h] = make_float2(most[h], total[h]);
    }
    wait_for_copies();
    __syncthreads();
#pragma unroll
    for (u32 h = 0; h < 2; h++) {
        const u32 head = 2 * c + h;
        if (head >= work.heads) continue;
        float m = LEAST;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) m = fmaxf(m, sums[w][head].x);
        const float factor = exp2_fast(most[h] - m);
        float *to = merged + (warp * work.heads + head) * d;
#pragma unroll
        for (u32 step = 0; step < L::VALUE_STEPS; step++) {
            const u32 column = 64 * step + 8 * r;
            if (column >= d) continue;
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                *reinterpret_cast<float2 *>(to + column + 2 * i) =
                    make_float2(y[step][i][h] * factor, y[step][i][h + 2] * factor);
            }
        }
    }
    __syncthreads();
    const u32 size = work.heads * d;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < size; i += THREADS) {
        const u32 head = i / d, column = i % d;
        float m = LEAST, l = 0, x = 0;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) m = fmaxf(m, sums[w][head].x);
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) {
            l = fmaf(sums[w][head].y, exp2_fast(sums[w][head].x - m), l);
            x += merged[w * size + i];
        }
        if (chunks == 1) {
            work.out(p, head)[column] = work.n ? x / l : 0.0f;
        } else {
            work.values(p, head, blockIdx.x)[column] = x;
            if (column == 0) {
                work.sums(p, head, blockIdx.x)[0] = m;
                work.sums(p, head, blockIdx.x)[1] = l;
            }
        }
    }
    merge<float4>(p, work, chunks, blockIdx.x, 1);
}

// The kernels of a type of KV, each in a file of its own: one that is not used is not compiled.
#define DECODE(NAME, T, D) \
    extern "C" __global__ void __launch_bounds__(THREADS, D <= 128 ? 2 : 1) NAME##_##D(Decode p) { decode<T, D>(p); }
#define DECODES(NAME, T) DECODE(NAME, T, 64) DECODE(NAME, T, 128) DECODE(NAME, T, 256)
