// Every head through the small matrix of its KV head.
//
// grid: (row tiles × output tiles) × KV heads. The rows of a KV head are the heads of its group, token after token. A
// warp takes R rows and O outputs; a dot product is lanes of 32, V columns each, and one tree over the lanes, whatever R
// and O are. So a row's bits do not depend on the rows beside it.
#include "common.cuh"

struct Project {
    const float *x;
    const float *maps;
    float *out;
    u64 x_stride;
    u64 out_stride;
    u32 rows;  // of a KV head: tokens × group
    u32 group;
    u32 inputs;
    u32 outputs;
    u32 tiles;  // of outputs
    u32 unused;
};

constexpr u32 WARPS = 4;

template <int V, int R, int O> __device__ void project(const Project &p) {
    const u32 lane = threadIdx.x % WARP, kv_head = blockIdx.y;
    const u32 first = (blockIdx.x % p.tiles * WARPS + threadIdx.x / WARP) * O;
    const u32 row0 = blockIdx.x / p.tiles * R;
    if (first >= p.outputs) return;
    // Past the end, the last row or output is computed again and not stored.
    const float *x[R], *map[O];
    float sums[R][O] = {};
#pragma unroll
    for (int r = 0; r < R; r++) {
        const u32 row = min(row0 + r, p.rows - 1);
        x[r] = p.x + row / p.group * p.x_stride + u64(kv_head * p.group + row % p.group) * p.inputs;
    }
#pragma unroll
    for (int o = 0; o < O; o++) {
        map[o] = p.maps + (u64(kv_head) * p.outputs + min(first + o, p.outputs - 1)) * p.inputs;
    }
    for (u32 c = lane * V; c < p.inputs; c += WARP * V) {
        float v[R][V], w[O][V];
#pragma unroll
        for (int r = 0; r < R; r++) load_floats<V>(x[r] + c, v[r]);
#pragma unroll
        for (int o = 0; o < O; o++) load_floats<V>(map[o] + c, w[o]);
#pragma unroll
        for (int r = 0; r < R; r++) {
#pragma unroll
            for (int o = 0; o < O; o++) {
#pragma unroll
                for (int i = 0; i < V; i++) sums[r][o] = fmaf(v[r][i], w[o][i], sums[r][o]);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        const u32 row = row0 + r;
#pragma unroll
        for (int o = 0; o < O; o++) {
            const float y = warp_sum(sums[r][o]);
            if (lane == 0 && row < p.rows && first + o < p.outputs) {
                const u64 head = kv_head * p.group + row % p.group;
                p.out[row / p.group * p.out_stride + head * p.outputs + first + o] = y;
            }
        }
    }
}

// By columns that are loaded at a time, rows and outputs of a warp.
extern "C" __global__ void __launch_bounds__(128) project_heads_4_1x1(Project p) { project<4, 1, 1>(p); }
extern "C" __global__ void __launch_bounds__(128) project_heads_4_4x4(Project p) { project<4, 4, 4>(p); }
extern "C" __global__ void __launch_bounds__(128) project_heads_1_1x1(Project p) { project<1, 1, 1>(p); }
extern "C" __global__ void __launch_bounds__(128) project_heads_1_4x4(Project p) { project<1, 4, 4>(p); }
