// Rotary position embedding.
#include "common.cuh"

struct Table {
    const float *frequencies;
    const u32 *positions;
    float *table;
    u64 positions_stride;
    u64 table_stride;
    u32 rows;
    u32 pairs;
    float factor;
    u32 unused;
};

// Cosines, then sines. The angle is rounded to f32 as the reference implementation's is; its cosine is then exact.
extern "C" __global__ void rotation_table(Table p) {
    wait_for_previous();
    const u32 row = blockIdx.x;
    const float position = float(p.positions[row * p.positions_stride]);
    float *table = p.table + row * p.table_stride;
    for (u32 i = threadIdx.x; i < p.pairs; i += blockDim.x) {
        double sine, cosine;
        sincos(double(__fmul_rn(position, p.frequencies[i])), &sine, &cosine);
        table[i] = float(cosine) * p.factor;
        table[p.pairs + i] = float(sine) * p.factor;
    }
}

struct Rotate {
    const float *table;
    float *x;
    u64 table_stride;
    u64 x_stride;
    u32 heads;
    u32 head_dim;
    u32 pairs;
    u32 unused;
};

extern "C" __global__ void __launch_bounds__(256) rotate(Rotate p) {
    wait_for_previous();
    const float *table = p.table + blockIdx.y * p.table_stride;
    const u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= p.heads * p.pairs) return;
    const u32 i = at % p.pairs;
    float *x = p.x + blockIdx.y * p.x_stride + at / p.pairs * p.head_dim + i;
    const float a = x[0], b = x[p.pairs], cosine = table[i], sine = table[p.pairs + i];
    x[0] = a * cosine - b * sine;
    x[p.pairs] = fmaf(a, sine, b * cosine);
}
