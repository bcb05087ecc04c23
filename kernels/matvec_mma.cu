// Matrix products for decode with bf16 weights, on tensor cores: up to 32 rows read each weight once.
//
// Activations stay f32 in effect: each is the sum of three bf16 numbers, exactly, whose products with a bf16 weight are
// exact too, and sums are f32. A block of eight warps takes 16 outputs; warp w takes the depth's pieces w, w + 8, … of 32,
// and the warps' sums are added in order. Columns of an mma do not see each other, so a row's bits depend neither on the
// rows beside it nor on the tiling.
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

constexpr u32 WARPS = 8, OUTPUTS = 16, DEPTH = 32;

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

// N tiles of 8 rows. Lane 4g + t holds weights of outputs g and g + 8, and activations of row g: of each piece of the
// depth eight in a row from 8t on. Which of them an mma calls its k does not matter, as long as both sides agree.
template <int N> __device__ __forceinline__ void matvec(const Matvec &p) {
    __shared__ float sums[WARPS][N][OUTPUTS * 8];
    constexpr int UNROLL = N == 1 ? 4 : 2;
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t = lane % 4;
    const u32 first = blockIdx.x / p.tiles * OUTPUTS, row0 = blockIdx.x % p.tiles * 8 * N;
    const bf16 *weight = static_cast<const bf16 *>(p.weight);
    const bf16 *upper = weight + u64(min(first + g, p.outputs - 1)) * p.depth;
    const bf16 *lower = weight + u64(min(first + g + 8, p.outputs - 1)) * p.depth;
    float c[N][4] = {};
    for (u32 k0 = warp * DEPTH; k0 < p.depth; k0 += WARPS * DEPTH * UNROLL) {
        uint4 a[UNROLL], b[UNROLL];
#pragma unroll
        for (u32 u = 0; u < UNROLL; u++) {
            const u32 k = k0 + u * WARPS * DEPTH + t * 8;
            a[u] = b[u] = make_uint4(0, 0, 0, 0);
            if (k < p.depth) {
                a[u] = __ldcs(reinterpret_cast<const uint4 *>(upper + k));
                b[u] = __ldcs(reinterpret_cast<const uint4 *>(lower + k));
            }
        }
#pragma unroll
        for (u32 u = 0; u < UNROLL; u++) {
            const u32 k = k0 + u * WARPS * DEPTH + t * 8;
            const u32 above[4] = {a[u].x, a[u].y, a[u].z, a[u].w}, below[4] = {b[u].x, b[u].y, b[u].z, b[u].w};
#pragma unroll
            for (int n = 0; n < N; n++) {
                float x[8] = {};
                const u32 row = row0 + n * 8 + g;
                if (row < p.rows && k < p.depth) load_floats<8>(p.x + row * p.x_stride + k, x);
#pragma unroll
                for (int part = 0; part < 3; part++) {
                    u32 words[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) words[i] = split(x[2 * i], x[2 * i + 1]);
#pragma unroll
                    for (int s = 0; s < 4; s += 2) {
                        mma(c[n], above[s], below[s], above[s + 1], below[s + 1], words[s], words[s + 1]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) sums[warp][n][(2 * t + i % 2) * OUTPUTS + g + i / 2 * 8] = c[n][i];
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

extern "C" __global__ void __launch_bounds__(256) matvec_mma_8(Matvec p) { matvec<1>(p); }
extern "C" __global__ void __launch_bounds__(256) matvec_mma_16(Matvec p) { matvec<2>(p); }
extern "C" __global__ void __launch_bounds__(256) matvec_mma_24(Matvec p) { matvec<3>(p); }
extern "C" __global__ void __launch_bounds__(256) matvec_mma_32(Matvec p) { matvec<4>(p); }
