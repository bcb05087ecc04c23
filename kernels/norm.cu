// Row-wise normalisation: one block a row, or one warp where rows are short (heads). A row is read once, into registers,
// where it fits them and its elements lie four by four.
//
// Mean and variance are taken in two passes, the variance about the mean as rounded, like the CPU's.
#include "common.cuh"

struct Norm {
    const float *x;
    const float *weight;
    const float *bias;
    float *out;
    u64 x_stride;
    u64 out_stride;
    u32 rows;
    u32 cols;
    u32 parts;  // runs of `cols` columns in a row, each normalised by itself
    u32 centred;
    float epsilon;
    u32 unused;
};

extern "C" __global__ void __launch_bounds__(256) normalise(Norm p) {
    wait_for_previous();
    const u32 row = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
    const float *x = p.x + row * p.x_stride + part * p.cols;
    float *out = p.out + row * p.out_stride + part * p.cols;
    float mean = 0;
    if (p.centred) {
        float sum = 0;
        for (u32 i = threadIdx.x; i < p.cols; i += blockDim.x) sum += x[i];
        mean = block_sum(sum) / float(p.cols);
    }
    float squares = 0;
    for (u32 i = threadIdx.x; i < p.cols; i += blockDim.x) {
        const float v = x[i] - mean;
        squares = fmaf(v, v, squares);
    }
    const float scale = 1.0f / sqrtf(block_sum(squares) / float(p.cols) + p.epsilon);
    for (u32 i = threadIdx.x; i < p.cols; i += blockDim.x) {
        const float y = (x[i] - mean) * scale * p.weight[i];
        out[i] = p.bias ? y + p.bias[i] : y;
    }
}

// Up to 4 · HELD elements a thread; rows, weights and biases aligned to 16 bytes.
template <int HELD> __device__ __forceinline__ void normalise_held(const Norm &p) {
    const u32 row = blockIdx.x / p.parts, part = blockIdx.x % p.parts, fours = p.cols / 4;
    const float4 *x = reinterpret_cast<const float4 *>(p.x + row * p.x_stride + part * p.cols);
    float4 *out = reinterpret_cast<float4 *>(p.out + row * p.out_stride + part * p.cols);
    const float4 zero = make_float4(0, 0, 0, 0);
    float4 held[HELD], weights[HELD], biases[HELD];
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        const u32 i = threadIdx.x + j * blockDim.x;
        weights[j] = i < fours ? reinterpret_cast<const float4 *>(p.weight)[i] : zero;
        biases[j] = i < fours && p.bias ? reinterpret_cast<const float4 *>(p.bias)[i] : zero;
    }
    wait_for_previous();
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        const u32 i = threadIdx.x + j * blockDim.x;
        held[j] = i < fours ? x[i] : zero;
    }
    float mean = 0;
    if (p.centred) {
        float sum = 0;
#pragma unroll
        for (int j = 0; j < HELD; j++) sum += held[j].x + held[j].y + (held[j].z + held[j].w);
        mean = block_sum(sum) / float(p.cols);
    }
    float squares = 0;
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        if (threadIdx.x + j * blockDim.x >= fours) continue;
        float4 &v = held[j];
        v = make_float4(v.x - mean, v.y - mean, v.z - mean, v.w - mean);
        squares = fmaf(v.x, v.x, fmaf(v.y, v.y, fmaf(v.z, v.z, fmaf(v.w, v.w, squares))));
    }
    const float scale = 1.0f / sqrtf(block_sum(squares) / float(p.cols) + p.epsilon);
#pragma unroll
    for (int j = 0; j < HELD; j++) {
        const u32 i = threadIdx.x + j * blockDim.x;
        const float4 v = held[j], w = weights[j], b = biases[j];
        if (i < fours) {
            out[i] = make_float4(v.x * scale * w.x + b.x, v.y * scale * w.y + b.y, v.z * scale * w.z + b.z,
                                 v.w * scale * w.w + b.w);
        }
    }
}

extern "C" __global__ void __launch_bounds__(512) normalise_4(Norm p) { normalise_held<1>(p); }
extern "C" __global__ void __launch_bounds__(512) normalise_16(Norm p) { normalise_held<4>(p); }
