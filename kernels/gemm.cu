// Matrix products for prefill where cuBLAS is not there, and what surrounds cuBLAS where it is.
#include "operands.cuh"

constexpr u32 TILE = 64, DEPTH = 16;

// A block of 256 threads computes 64 rows × 64 outputs, each thread 4 × 4 of them.
template <class T> __device__ void gemm(const Operands &p) {
    __shared__ float x[DEPTH][TILE + 4], w[DEPTH][TILE + 4];
    const u32 row = blockIdx.y * TILE, output = blockIdx.x * TILE;
    const u32 across = threadIdx.x % 16, down = threadIdx.x / 16;
    float sums[4][4] = {};
    for (u32 from = 0; from < p.depth; from += DEPTH) {
        for (u32 i = threadIdx.x; i < TILE * DEPTH; i += blockDim.x) {
            const u32 k = i % DEPTH, at = i / DEPTH;
            const bool inside = from + k < p.depth;
            x[k][at] = inside && row + at < p.rows ? p.x[(row + at) * p.x_stride + from + k] : 0.0f;
            w[k][at] = inside && output + at < p.outputs
                           ? widen(static_cast<const T *>(p.weight)[u64(output + at) * p.depth + from + k])
                           : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < DEPTH; k++) {
            float a[4], b[4];
            load_floats<4>(&x[k][down * 4], a);
            load_floats<4>(&w[k][across * 4], b);
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sums[i][j] = fmaf(a[i], b[j], sums[i][j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            const u32 r = row + down * 4 + i, n = output + across * 4 + j;
            if (r < p.rows && n < p.outputs) {
                float *out = p.out + r * p.out_stride + n;
                float y = p.accumulate ? *out + sums[i][j] : sums[i][j];
                *out = p.bias ? y + p.bias[n] : y;
            }
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) gemm_f32(Operands p) { gemm<float>(p); }
extern "C" __global__ void __launch_bounds__(256) gemm_f16(Operands p) { gemm<f16>(p); }
extern "C" __global__ void __launch_bounds__(256) gemm_bf16(Operands p) { gemm<bf16>(p); }

struct Convert {
    const float *x;
    void *out;
    u64 x_stride;
    u64 out_stride;
    u32 rows;
    u32 cols;
};

template <class T> __device__ void convert(const Convert &p) {
    const u32 col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= p.cols) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        static_cast<T *>(p.out)[row * p.out_stride + col] = narrow<T>(p.x[row * p.x_stride + col]);
    }
}

extern "C" __global__ void convert_f16(Convert p) { convert<f16>(p); }
extern "C" __global__ void convert_bf16(Convert p) { convert<bf16>(p); }

struct AddBias {
    const float *bias;
    float *out;
    u64 out_stride;
    u32 rows;
    u32 cols;
};

extern "C" __global__ void add_bias(AddBias p) {
    const u32 col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= p.cols) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) p.out[row * p.out_stride + col] += p.bias[col];
}
