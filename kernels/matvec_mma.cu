// Matrix products for decode with bf16 weights, on tensor cores: up to 32 rows read each weight once.
//
// Activations stay f32 in effect: each is the sum of three bf16 numbers, exactly, whose products with a bf16 weight are
// exact too, and sums are f32. A block of eight warps takes 16 · M outputs; warp w takes the depth's pieces w, w + 8, … of
// 32, and the warps' sums are added in order. Columns of an mma do not see each other, so a row's bits depend neither on
// the rows beside it nor on the tiling.
//
// Weights of the next pieces are on their way while these are multiplied. One tile of rows is bound by weights, so two
// pieces are in flight; more tiles are bound by taking activations apart, which 32 outputs share.
#include "common.cuh"

struct Matvec {
    const float *x;
    const void *weight;
    const float *bias;
    float *out;
    u64 x_stride;
    u64 out_stride;
    u32 depth;
    u32 outputs;
    u32 rows;
    u32 tiles;  // of 8·N rows; consecutive blocks share the weights
    u32 accumulate;
    u32 unused;
};

constexpr u32 WARPS = 8, DEPTH = 32;

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
template <int M, int N> struct Tile {
    static constexpr int PIECES = N == 1 ? 2 : 1;
    static constexpr u32 STEP = WARPS * DEPTH * PIECES, OUTPUTS = 16 * M;
    const Matvec &p;
    const bf16 *rows[2 * M];
    u32 row;  // the lane's of the first tile
    u32 t;
    float sums[M][N][4];

    __device__ __forceinline__ void load(u32 k0, uint4 (&weights)[PIECES][2 * M]) const {
#pragma unroll
        for (u32 u = 0; u < PIECES; u++) {
            const u32 k = k0 + u * WARPS * DEPTH + t * 8;
#pragma unroll
            for (int m = 0; m < 2 * M; m++) {
                weights[u][m] = make_uint4(0, 0, 0, 0);
                if (k < p.depth) weights[u][m] = __ldcs(reinterpret_cast<const uint4 *>(rows[m] + k));
            }
        }
    }

    __device__ __forceinline__ void multiply(u32 k0, const uint4 (&weights)[PIECES][2 * M]) {
#pragma unroll
        for (u32 u = 0; u < PIECES; u++) {
            const u32 k = k0 + u * WARPS * DEPTH + t * 8;
#pragma unroll
            for (int n = 0; n < N; n++) {
                float x[8] = {};
                if (row + 8 * n < p.rows && k < p.depth) load_floats<8>(p.x + (row + 8 * n) * p.x_stride + k, x);
#pragma unroll
                for (int part = 0; part < 3; part++) {
                    u32 words[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) words[i] = split(x[2 * i], x[2 * i + 1]);
#pragma unroll
                    for (int m = 0; m < M; m++) {
                        const uint4 above = weights[u][2 * m], below = weights[u][2 * m + 1];
                        mma(sums[m][n], above.x, below.x, above.y, below.y, words[0], words[1]);
                        mma(sums[m][n], above.z, below.z, above.w, below.w, words[2], words[3]);
                    }
                }
            }
        }
    }
};

template <int M, int N> __device__ __forceinline__ void matvec(const Matvec &p) {
    typedef Tile<M, N> T;
    constexpr u32 OUTPUTS = T::OUTPUTS;
    __shared__ float sums[WARPS][N][OUTPUTS * 8];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const u32 first = blockIdx.x / p.tiles * OUTPUTS, row0 = blockIdx.x % p.tiles * 8 * N;
    T tile = {p, {}, row0 + g, t, {}};
#pragma unroll
    for (int m = 0; m < 2 * M; m++) {
        tile.rows[m] = static_cast<const bf16 *>(p.weight) + u64(min(first + g + 8 * m, p.outputs - 1)) * p.depth;
    }
    uint4 even[T::PIECES][2 * M], odd[T::PIECES][2 * M];
    u32 k = warp * DEPTH;
    tile.load(k, even);
    while (k < p.depth) {
        tile.load(k + T::STEP, odd);
        tile.multiply(k, even);
        k += T::STEP;
        if (k >= p.depth) break;
        tile.load(k + T::STEP, even);
        tile.multiply(k, odd);
        k += T::STEP;
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int n = 0; n < N; n++) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                sums[warp][n][(2 * t + i % 2) * OUTPUTS + 16 * m + g + i / 2 * 8] = tile.sums[m][n][i];
            }
        }
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < N * OUTPUTS * 8; i += WARPS * WARP) {
        const u32 row = row0 + i / OUTPUTS, output = first + i % OUTPUTS;
        if (row >= p.rows || output >= p.outputs) continue;
        float y = 0;
#pragma unroll
        for (u32 w = 0; w < WARPS; w++) y += sums[w][i / (OUTPUTS * 8)][i % (OUTPUTS * 8)];
        float *out = p.out + row * p.out_stride + output;
        if (p.accumulate) y += *out;
        *out = p.bias ? y + p.bias[output] : y;
    }
}

extern "C" __global__ void __launch_bounds__(256) matvec_mma_8(Matvec p) { matvec<1, 1>(p); }
extern "C" __global__ void __launch_bounds__(256) matvec_mma_16(Matvec p) { matvec<2, 2>(p); }
extern "C" __global__ void __launch_bounds__(256) matvec_mma_24(Matvec p) { matvec<2, 3>(p); }
extern "C" __global__ void __launch_bounds__(256) matvec_mma_32(Matvec p) { matvec<2, 4>(p); }
