// The non-linearity of an MLP, element by element. Accurate functions: no fast-math.
#include "common.cuh"

struct Activate {
    const float *x;
    float *out;
    u64 x_stride;
    u64 out_stride;
    u32 rows;
    u32 cols;
    u32 kind;
    u32 unused;
};

enum Kind : u32 { SILU_GATED, GELU_TANH_GATED, RELU, GELU, GELU_TANH };

__device__ __forceinline__ float gelu_tanh(float x) {
    const float inner = 0.7978845608028654f * fmaf(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + tanhf(inner));
}

__device__ __forceinline__ float apply(u32 kind, float x) {
    switch (kind) {
        case SILU_GATED: return x / (1.0f + expf(-x));
        case GELU_TANH_GATED:
        case GELU_TANH: return gelu_tanh(x);
        case RELU: return fmaxf(x, 0.0f);
        default: return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
    }
}

extern "C" __global__ void __launch_bounds__(256) activate(Activate p) {
    wait_for_previous();
    const u32 col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= p.cols) return;
    for (u32 row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const float *x = p.x + row * p.x_stride;
        float y = apply(p.kind, x[col]);
        if (p.kind <= GELU_TANH_GATED) y *= x[p.cols + col];
        p.out[row * p.out_stride + col] = y;
    }
}
