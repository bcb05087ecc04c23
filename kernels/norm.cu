// Row-wise normalisation: one block a row, or one warp where rows are short (heads).
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
