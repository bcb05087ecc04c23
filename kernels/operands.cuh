// The operands of a matrix product.
#pragma once

#include "common.cuh"

// out = x · weightᵀ (+ out) + bias.
struct Operands {
    const float *x;
    const void *weight;
    const float *bias;
    float *out;
    u64 x_stride;
    u64 out_stride;
    u32 depth;
    u32 outputs;
    u32 rows;
    u32 accumulate;
};
