// Matrix products for decode with bf16 weights, on tensor cores: up to 24 rows read each weight once.
//
// Activations stay f32 in effect: each is the sum of three bf16 numbers, exactly, whose products with a bf16 weight are
// exact too, and sums are f32. The depth is cut into pieces of 32; sum w of sixteen is that of pieces w, w + 16, …, one
// after the other, and the sums are added in order. Rows of an mma do not see each other, and all kernels sum in this order:
// a row's bits depend neither on the rows beside it nor on how many there are.
//
// A block of sixteen warps for each multiprocessor, a warp for each sum, walks through an equal part of the outputs, some
// eights of them at a time: as many as registers hold, for they share what a warp takes apart, which costs as much as
// multiplying. Weights come to shared memory a piece ahead, each 16 bytes copied by the thread that will multiply them; its warps read
// a KiB of every weight row beside each other.
//
// In a piece, lane 4g + t holds eight in a row of the depth from 8t on: weights of output g of each eight, and activations
// of row g of each eight. Which of them an mma calls its k does not matter, as long as both sides agree; so 16 bytes as they
// are loaded are what two mma take. Weights are the mma's second factor: its registers lie side by side as they come, where
// those of the first would have to be moved together first, which took more instructions than all else.
#include "async.cuh"
#include "operands.cuh"

// The depth is a multiple of 8.
struct Matvec : Operands {
    u32 row_tiles;  // consecutive blocks share the weights
    u32 parts;      // of the outputs
};

constexpr u32 WARPS = 16, THREADS = WARPS * WARP, PIECE = 32, STRIDE = WARPS * PIECE, TERMS = 3;

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
__device__ __forceinline__ void split(float (&x)[8], u32 (&words)[4]) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) words[i] = split(x[2 * i], x[2 * i + 1]);
}

// Eight activations of a row, zeros where there are none.
__device__ __forceinline__ void load_activations(const Matvec &p, u32 row, u32 k, float (&x)[8]) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) x[i] = 0;
    if (row < p.rows && k < p.depth) load_floats<8>(p.x + row * p.x_stride + k, x);
}

// Products of an eight of outputs with two eights of rows; `below` may be zeros.
__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&above)[4], const u32 (&below)[4], uint4 weights) {
    mma(sums, above[0], below[0], above[1], below[1], weights.x, weights.y);
    mma(sums, above[2], below[2], above[3], below[3], weights.z, weights.w);
}

__device__ __forceinline__ void store(const Matvec &p, u32 row, u32 output, float y) {
    if (row >= p.rows || output >= p.outputs) return;
    float *out = p.out + row * p.out_stride + output;
    if (p.accumulate) y += *out;
    *out = p.bias ? y + p.bias[output] : y;
}

// N eights of rows by up to E eights of outputs at a time.
//
// grid: parts × tiles of rows.
template <u32 N, u32 E> struct Product {
    static constexpr u32 PAIRS = (N + 1) / 2;
    const Matvec &p;
    uint4 *room;    // 2 × E × THREADS
    float2 *warps;  // WARPS × E × N × WARP
    u32 row0, lane, warp, g, t;
    u32 begin, end, chunk;  // of the block's eights of outputs, and how many it takes at a time
    u32 next_eight, next_k;

    __device__ __forceinline__ Product(const Matvec &p, uint4 *shared)
        : p(p), room(shared + threadIdx.x), warps(reinterpret_cast<float2 *>(shared + 2 * E * THREADS)),
          row0(blockIdx.x % p.row_tiles * 8 * N), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), g(lane / 4), t(lane % 4) {
        const u32 part = blockIdx.x / p.row_tiles, eights = (p.outputs + 7) / 8;
        begin = u32(u64(eights) * part / p.parts);
        end = u32(u64(eights) * (part + 1) / p.parts);
        const u32 chunks = (end - begin + E - 1) / E;
        chunk = chunks ? (end - begin + chunks - 1) / chunks : 1;
        next_eight = begin;
        next_k = warp * PIECE;
    }

    // Asks for this thread's weights of the next piece, if there is one.
    __device__ __forceinline__ void copy(u32 slot) {
        if (next_eight >= end || next_k >= p.depth) return;
        const u32 k = next_k + t * 8, first = next_eight * 8 + g, here = min(chunk, end - next_eight);
        const bf16 *from = static_cast<const bf16 *>(p.weight) + u64(first) * p.depth + k;
        const u32 to = shared_address(room + slot * E * THREADS);
#pragma unroll
        for (u32 j = 0; j < E; j++) {
            const bool real = k < p.depth && first + 8 * j < p.outputs;
            if (j < here) copy_16_or_zeros(to + j * THREADS * 16, reinterpret_cast<u64>(real ? from : p.weight), real);
            from += 8 * u64(p.depth);
        }
        next_k += STRIDE;
        if (next_k >= p.depth) {
            next_k = warp * PIECE;
            next_eight += chunk;
        }
    }

    __device__ __forceinline__ void run() {
        copy(0);
        u32 slot = 0;
#pragma unroll 1
        for (u32 first = begin; first < end; first += chunk) {
            float sums[E][PAIRS][4] = {};
#pragma unroll 1
            for (u32 k = warp * PIECE; k < p.depth; k += STRIDE) {
                float x[N][8];
#pragma unroll
                for (u32 n = 0; n < N; n++) load_activations(p, row0 + 8 * n + g, k + t * 8, x[n]);
                wait_for_copies();
                uint4 weights[E];
#pragma unroll
                for (u32 j = 0; j < E; j++) weights[j] = room[(slot * E + j) * THREADS];
                slot ^= 1;
                copy(slot);
#pragma unroll
                for (u32 term = 0; term < TERMS; term++) {
                    u32 words[2 * PAIRS][4] = {};
#pragma unroll
                    for (u32 n = 0; n < N; n++) split(x[n], words[n]);
#pragma unroll
                    for (u32 j = 0; j < E; j++) {  // of those past the chunk, too: what they sum is not stored
#pragma unroll
                        for (u32 q = 0; q < PAIRS; q++) multiply(sums[j][q], words[2 * q], words[2 * q + 1], weights[j]);
                    }
                }
            }
            add_up(first, min(chunk, end - first), sums);
        }
    }

    // Adds the warps' sums.
    __device__ __forceinline__ void add_up(u32 first, u32 here, const float (&sums)[E][PAIRS][4]) {
#pragma unroll
        for (u32 j = 0; j < E; j++) {
#pragma unroll
            for (u32 n = 0; n < N; n++) {
                const float *c = sums[j][n / 2] + n % 2 * 2;
                warps[((warp * E + j) * N + n) * WARP + lane] = make_float2(c[0], c[1]);
            }
        }
        __syncthreads();
#pragma unroll 1
        for (u32 i = threadIdx.x; i < here * N * WARP; i += THREADS) {
            float y[2] = {};
#pragma unroll
            for (u32 w = 0; w < WARPS; w++) {
                const float2 c = warps[w * E * N * WARP + i];
                y[0] += c.x;
                y[1] += c.y;
            }
            const u32 row = row0 + i / WARP % N * 8 + g, output = (first + i / WARP / N) * 8 + 2 * t;
            store(p, row, output, y[0]);
            store(p, row, output + 1, y[1]);
        }
        __syncthreads();
    }
};

template <u32 N, u32 E> __device__ __forceinline__ void matvec(const Matvec &p) {
    extern __shared__ __align__(16) uint4 shared[];
    Product<N, E>(p, shared).run();
}

// matvec_mma_ROWS_OUTPUTS. (Of 24 rows by 64 outputs, registers do not hold the sums.)
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_8_32(Matvec p) { matvec<1, 4>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_8_40(Matvec p) { matvec<1, 5>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_8_64(Matvec p) { matvec<1, 8>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_16_32(Matvec p) { matvec<2, 4>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_16_40(Matvec p) { matvec<2, 5>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_16_64(Matvec p) { matvec<2, 8>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_24_32(Matvec p) { matvec<3, 4>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_24_40(Matvec p) { matvec<3, 5>(p); }
