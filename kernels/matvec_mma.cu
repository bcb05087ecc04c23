// Matrix products for decode with bf16 weights, on tensor cores: many rows read each weight once.
//
// Activations stay f32 in effect: each is the sum of three bf16 numbers, exactly, whose products with a bf16 weight are
// exact too, and sums are f32. The depth is cut into slices, and a slice into pieces of 32. A block of eight warps
// multiplies a slice: warp w takes its pieces w, w + 8, …, and the warps' sums are added in order, then those of slices.
// Columns of an mma do not see each other, and slices depend on the matrix alone: a row's bits depend neither on the rows
// beside it nor on which of the two kernels below multiplies it.
//
// What is read at a time lies together: eight warps beside each other read a KiB or more of every weight row. (Of the same
// rows 128 bytes at a time come at two thirds of the speed: memory's own rows change too often.)
#include "async.cuh"

struct Matvec {
    const float *x;
    const bf16 *weight;
    const float *bias;
    float *out;
    float *partials;  // slices × rows × `width`
    u64 x_stride;
    u64 out_stride;
    u32 depth;  // a multiple of 8
    u32 outputs;
    u32 rows;
    u32 row_tiles;  // of 8·N rows; consecutive blocks share the weights
    u32 slices;
    u32 groups;  // of outputs, in eights
    u32 width;   // outputs, a multiple of 8
    u32 ahead;   // of weights in shared memory, in pieces of each warp: two to eight
    u32 accumulate;
    u32 unused;
};

constexpr u32 WARPS = 8, THREADS = WARPS * WARP, PIECE = 32, TERMS = 3;
constexpr u32 MOST_ROUNDS = 4;  // pieces of a warp in a slice

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
__device__ __forceinline__ uint4 split(float (&x)[8]) {
    uint4 words;
    words.x = split(x[0], x[1]);
    words.y = split(x[2], x[3]);
    words.z = split(x[4], x[5]);
    words.w = split(x[6], x[7]);
    return words;
}

// A piece's products. Lane 4g + t holds weights of outputs g and g + 8, and activations of row g: eight of the depth in a
// row from 8t on. Which of them an mma calls its k does not matter, as long as both sides agree.
__device__ __forceinline__ void multiply(float (&sums)[4], uint4 above, uint4 below, uint4 x) {
    mma(sums, above.x, below.x, above.y, below.y, x.x, x.y);
    mma(sums, above.z, below.z, above.w, below.w, x.z, x.w);
}

// Eight activations of a row, zeros where there are none.
__device__ __forceinline__ void load_activations(const Matvec &p, u32 row, u32 k, float (&x)[8]) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) x[i] = 0;
    if (row < p.rows && k < p.depth) load_floats<8>(p.x + row * p.x_stride + k, x);
}

struct Slice {
    u32 first, pieces;

    __device__ __forceinline__ Slice(const Matvec &p, u32 slice) {
        const u64 all = (p.depth + PIECE - 1) / PIECE;
        first = u32(all * slice / p.slices);
        pieces = u32(all * (slice + 1) / p.slices) - first;
    }
};

__device__ __forceinline__ void store(const Matvec &p, u32 row, u32 output, float y) {
    float *out = p.out + row * p.out_stride + output;
    if (p.accumulate) y += *out;
    *out = p.bias ? y + p.bias[output] : y;
}

// Up to 8 rows: time is the reading of the weights, and each warp takes apart what it needs. A block takes 16 outputs and
// all slices; the next slice is on its way to registers while one is multiplied.
struct Few {
    const Matvec &p;
    const bf16 *above, *below;
    u32 row, warp, t;

    __device__ __forceinline__ void load(u32 slice, uint4 (&weights)[MOST_ROUNDS][2]) const {
        if (slice >= p.slices) return;
        const Slice s(p, slice);
#pragma unroll
        for (u32 r = 0; r < MOST_ROUNDS; r++) {
            const u32 piece = warp + r * WARPS, k = (s.first + piece) * PIECE + t * 8;
            const bool real = piece < s.pieces && k < p.depth;
            weights[r][0] = real ? __ldcs(reinterpret_cast<const uint4 *>(above + k)) : make_uint4(0, 0, 0, 0);
            weights[r][1] = real ? __ldcs(reinterpret_cast<const uint4 *>(below + k)) : make_uint4(0, 0, 0, 0);
        }
    }

    // Adds the slice's sum to this thread's output of a row.
    __device__ __forceinline__ void take(u32 slice, const uint4 (&weights)[MOST_ROUNDS][2], float &y) const {
        __shared__ float4 shared[2][WARPS][WARP];
        const Slice s(p, slice);
        float sums[4] = {};
#pragma unroll
        for (u32 r = 0; r < MOST_ROUNDS; r++) {
            const u32 piece = warp + r * WARPS;
            if (piece >= s.pieces) break;
            float x[8];
            load_activations(p, row, (s.first + piece) * PIECE + t * 8, x);
#pragma unroll
            for (u32 term = 0; term < TERMS; term++) multiply(sums, weights[r][0], weights[r][1], split(x));
        }
        float4(&now)[WARPS][WARP] = shared[slice % 2];
        now[warp][threadIdx.x % WARP] = make_float4(sums[0], sums[1], sums[2], sums[3]);
        __syncthreads();
        if (threadIdx.x < 4 * WARP) {
            float sum = 0;
#pragma unroll
            for (u32 w = 0; w < WARPS; w++) sum += reinterpret_cast<const float *>(now[w])[threadIdx.x];
            y += sum;
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2) matvec_mma_few(Matvec p) {
    const u32 lane = threadIdx.x % WARP, g = lane / 4, first = blockIdx.x / p.row_tiles * 16;
    const u32 row0 = blockIdx.x % p.row_tiles * 8;
    auto weights = [&](u32 output) { return p.weight + u64(min(output, p.outputs - 1)) * p.depth; };
    const Few few = {p, weights(first + g), weights(first + g + 8), row0 + g, threadIdx.x / WARP, lane % 4};
    uint4 even[MOST_ROUNDS][2], odd[MOST_ROUNDS][2];
    float y = 0;
    few.load(0, even);
    for (u32 slice = 0; slice < p.slices; slice += 2) {
        few.load(slice + 1, odd);
        few.take(slice, even, y);
        if (slice + 1 >= p.slices) break;
        few.load(slice + 2, even);
        few.take(slice + 1, odd, y);
    }
    if (threadIdx.x >= 4 * WARP) return;
    // Thread 4l + i has number i of lane l's fragment.
    const u32 of = threadIdx.x / 4, i = threadIdx.x % 4;
    const u32 row = row0 + 2 * (of % 4) + i % 2, output = first + of / 4 + i / 2 * 8;
    if (row < p.rows && output < p.outputs) store(p, row, output, y);
}

// N tiles of 8 rows: a block takes their activations of its slice apart once, into shared memory, and then walks through a
// group of outputs, 32 at a time. Weights come to shared memory, each 16 bytes copied by the thread that will multiply
// them, some pieces ahead. What it sums is added up by `matvec_mma_sum`.
template <int N> __device__ __forceinline__ void many(const Matvec &p) {
    constexpr u32 M = 2, OUTPUTS = 16 * M, COPIES = 2 * M;
    extern __shared__ __align__(16) uint4 shared[];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const u32 row0 = blockIdx.x % p.row_tiles * 8 * N, slice = blockIdx.x / p.row_tiles % p.slices;
    const u32 group = blockIdx.x / p.row_tiles / p.slices;
    const Slice s(p, slice);
    uint4 *weights = shared + threadIdx.x;                                         // ahead × COPIES × THREADS
    float4 *warps = reinterpret_cast<float4 *>(shared + p.ahead * COPIES * THREADS);  // WARPS × M × N × WARP
    uint4 *activations = shared + p.ahead * COPIES * THREADS + WARPS * M * N * WARP;  // pieces × TERMS × N × WARP
    const u32 begin = u32(u64(p.width / 8) * group / p.groups) * 8;
    const u32 end = min(u32(u64(p.width / 8) * (group + 1) / p.groups) * 8, p.outputs);
    const u32 rounds = warp < s.pieces ? (s.pieces - warp + WARPS - 1) / WARPS : 0;

    // What is to be copied next: a piece of this warp's, of a tile.
    u32 next_output = begin, next_round = 0, free = 0;
    auto copy = [&]() {
        if (next_output < end && rounds > 0) {
            const u32 k = (s.first + warp + next_round * WARPS) * PIECE + t * 8;
#pragma unroll
            for (u32 m = 0; m < COPIES; m++) {
                const u32 output = next_output + g + 8 * m;
                const bool real = output < end && k < p.depth;
                copy_16_or_zeros(shared_address(weights + (free * COPIES + m) * THREADS),
                                 reinterpret_cast<u64>(real ? p.weight + u64(output) * p.depth + k : p.weight), real);
            }
            if (++next_round == rounds) {
                next_round = 0;
                next_output += OUTPUTS;
            }
        }
        end_group();
        free = free + 1 == p.ahead ? 0 : free + 1;
    };
    for (u32 i = 0; i + 1 < p.ahead; i++) copy();

#pragma unroll 2
    for (u32 i = threadIdx.x; i < s.pieces * N * WARP; i += THREADS) {
        const u32 piece = i / (N * WARP), n = i / WARP % N;
        float x[8];
        load_activations(p, row0 + 8 * n + g, (s.first + piece) * PIECE + t * 8, x);
#pragma unroll
        for (u32 term = 0; term < TERMS; term++) activations[((piece * TERMS + term) * N + n) * WARP + lane] = split(x);
    }
    __syncthreads();

    u32 slot = 0;
#pragma unroll 1
    for (u32 first = begin; first < end; first += OUTPUTS) {
        float sums[M][N][4] = {};
#pragma unroll 1
        for (u32 round = 0; round < rounds; round++) {
            wait_for_groups_but(p.ahead - 2);
            uint4 w[COPIES];
#pragma unroll
            for (u32 m = 0; m < COPIES; m++) w[m] = weights[(slot * COPIES + m) * THREADS];
            slot = slot + 1 == p.ahead ? 0 : slot + 1;
            copy();
            const uint4 *x = activations + (warp + round * WARPS) * TERMS * N * WARP + lane;
#pragma unroll
            for (u32 term = 0; term < TERMS; term++) {
#pragma unroll
                for (u32 n = 0; n < N; n++) {
#pragma unroll
                    for (u32 m = 0; m < M; m++) multiply(sums[m][n], w[2 * m], w[2 * m + 1], x[(term * N + n) * WARP]);
                }
            }
        }
#pragma unroll
        for (u32 m = 0; m < M; m++) {
#pragma unroll
            for (u32 n = 0; n < N; n++) {
                const float *c = sums[m][n];
                warps[((warp * M + m) * N + n) * WARP + lane] = make_float4(c[0], c[1], c[2], c[3]);
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < M * N * WARP; i += THREADS) {
            const u32 m = i / (N * WARP), n = i / WARP % N;
            float sum[4] = {};
#pragma unroll
            for (u32 w = 0; w < WARPS; w++) {
                const float4 c = warps[w * M * N * WARP + i];
                sum[0] += c.x;
                sum[1] += c.y;
                sum[2] += c.z;
                sum[3] += c.w;
            }
#pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const u32 row = row0 + n * 8 + 2 * t + j % 2, output = first + m * 16 + g + j / 2 * 8;
                if (row < p.rows && output < end) p.partials[(u64(slice) * p.rows + row) * p.width + output] = sum[j];
            }
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) matvec_mma_16(Matvec p) { many<2>(p); }
extern "C" __global__ void __launch_bounds__(THREADS) matvec_mma_24(Matvec p) { many<3>(p); }

// grid: outputs × rows.
extern "C" __global__ void __launch_bounds__(THREADS) matvec_mma_sum(Matvec p) {
    const u32 output = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
    if (output >= p.outputs) return;
    const float *from = p.partials + u64(row) * p.width + output;
    float y = 0;
#pragma unroll 8
    for (u32 slice = 0; slice < p.slices; slice++) y += __ldcs(from + u64(slice) * p.rows * p.width);
    store(p, row, output, y);
}
