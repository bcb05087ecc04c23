// Matrix products for decode: few rows of activations, so time is the reading of the weights.
//
// A warp computes R outputs of M rows. Lane l takes the vectors l, l + 32, … of the depth in order, and one fixed tree
// adds the lanes; M and R only share loads. So a row's bits depend neither on the rows beside it nor on the tiling.
#include "operands.cuh"

struct Matvec : Operands {
    u32 tiles;  // of M rows; consecutive blocks share the weights
    u32 unused;
};

constexpr u32 WARPS = 4;

template <class T, int V, int M, int R> __device__ __forceinline__ void matvec(const Matvec &p) {
    const u32 lane = threadIdx.x % WARP;
    const u32 first = (blockIdx.x / p.tiles * WARPS + threadIdx.x / WARP) * R;
    const u32 row = blockIdx.x % p.tiles * M;
    if (first >= p.outputs) return;
    const T *weight[R];
    const float *x[M];
    float sums[M][R] = {};
    // Past the end, the last output or row is computed again and not stored.
#pragma unroll
    for (int r = 0; r < R; r++) {
        weight[r] = static_cast<const T *>(p.weight) + u64(min(first + r, p.outputs - 1)) * p.depth;
    }
#pragma unroll
    for (int m = 0; m < M; m++) x[m] = p.x + min(row + m, p.rows - 1) * p.x_stride;

    constexpr int UNROLL = M * R == 1 ? 4 : M * R <= 4 ? 2 : 1;
    const u32 vectors = p.depth / V;
    auto load_weights = [&](u32 c, float(&w)[R][V]) {
#pragma unroll
        for (int r = 0; r < R; r++) stream_load<T, V>(weight[r] + c * V, w[r]);
    };
    auto multiply = [&](u32 c, const float(&w)[R][V]) {
#pragma unroll
        for (int m = 0; m < M; m++) {
            float v[V];
            load_floats<V>(x[m] + c * V, v);
#pragma unroll
            for (int r = 0; r < R; r++) {
#pragma unroll
                for (int i = 0; i < V; i++) sums[m][r] = fmaf(v[i], w[r][i], sums[m][r]);
            }
        }
    };
    float first_weights[UNROLL][R][V];
#pragma unroll
    for (int j = 0; j < UNROLL; j++) {
        if (lane + j * WARP < vectors) load_weights(lane + j * WARP, first_weights[j]);
    }
    wait_for_previous();
#pragma unroll
    for (int j = 0; j < UNROLL; j++) {
        if (lane + j * WARP < vectors) multiply(lane + j * WARP, first_weights[j]);
    }
#pragma unroll UNROLL
    for (u32 c = lane + UNROLL * WARP; c < vectors; c += WARP) {
        float w[R][V];
        load_weights(c, w);
        multiply(c, w);
    }
#pragma unroll
    for (int m = 0; m < M; m++) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            float y = warp_sum(sums[m][r]);
            if (lane == 0 && row + m < p.rows && first + r < p.outputs) {
                float *out = p.out + (row + m) * p.out_stride + first + r;
                if (p.accumulate) y += *out;
                *out = p.bias ? y + p.bias[first + r] : y;
            }
        }
    }
}

// NAME_TYPE_MxR, and for depths or addresses that 16 bytes do not divide, NAME_TYPE_scalar_MxR.
#define MATVEC(NAME, T)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128) NAME##_1x1(Matvec p) { matvec<T, LANES<T>, 1, 1>(p); }       \
    extern "C" __global__ void __launch_bounds__(128) NAME##_1x2(Matvec p) { matvec<T, LANES<T>, 1, 2>(p); }       \
    extern "C" __global__ void __launch_bounds__(128) NAME##_2x2(Matvec p) { matvec<T, LANES<T>, 2, 2>(p); }       \
    extern "C" __global__ void __launch_bounds__(128) NAME##_4x2(Matvec p) { matvec<T, LANES<T>, 4, 2>(p); }       \
    extern "C" __global__ void __launch_bounds__(128) NAME##_8x4(Matvec p) { matvec<T, LANES<T>, 8, 4>(p); }       \
    extern "C" __global__ void __launch_bounds__(128) NAME##_scalar_1x1(Matvec p) { matvec<T, 1, 1, 1>(p); }       \
    extern "C" __global__ void __launch_bounds__(128) NAME##_scalar_4x1(Matvec p) { matvec<T, 1, 4, 1>(p); }

MATVEC(matvec_f32, float)
MATVEC(matvec_f16, f16)
MATVEC(matvec_bf16, bf16)
