// Keys and values of new tokens into their runs, and rows between runs.
//
// A row of a run is a token's key, then its value. Where rows go is data of the step (a table of addresses), not a
// parameter: the launch is then the same in every step.
#include "common.cuh"

struct Store {
    const float *keys;
    const float *values;
    const u64 *targets;  // of each row: head 0's row, or with `per_head` each head's
    u64 stride;
    u64 run_bytes;
    u32 kv_heads;
    u32 head_dim;
    u32 per_head;
    u32 unused;
};

template <class T> __device__ void store(const Store &p) {
    wait_for_previous();
    const u32 width = p.kv_heads * p.head_dim;
    const float *keys = p.keys + blockIdx.x * p.stride, *values = p.values + blockIdx.x * p.stride;
    for (u32 i = blockIdx.y * blockDim.x + threadIdx.x; i < width; i += gridDim.y * blockDim.x) {
        const u32 head = i / p.head_dim, column = i % p.head_dim;
        const u64 row = p.per_head ? p.targets[blockIdx.x * p.kv_heads + head] : p.targets[blockIdx.x] + head * p.run_bytes;
        T *to = reinterpret_cast<T *>(row) + column;
        to[0] = narrow<T>(keys[i]);
        to[p.head_dim] = narrow<T>(values[i]);
    }
}

extern "C" __global__ void store_f32(Store p) { store<float>(p); }
extern "C" __global__ void store_f16(Store p) { store<f16>(p); }
extern "C" __global__ void store_bf16(Store p) { store<bf16>(p); }

struct Copy {
    const u64 *moves;  // from, to
    u32 count;
    u32 row_bytes;
};

// One warp a row. `Unit` divides the row and its alignment.
template <class Unit> __device__ void copy(const Copy &p) {
    const u32 warp = (blockIdx.x * blockDim.x + threadIdx.x) / WARP, lane = threadIdx.x % WARP;
    if (warp >= p.count) return;
    const Unit *from = reinterpret_cast<const Unit *>(p.moves[2 * warp]);
    Unit *to = reinterpret_cast<Unit *>(p.moves[2 * warp + 1]);
    for (u32 i = lane; i < p.row_bytes / sizeof(Unit); i += WARP) to[i] = from[i];
}

extern "C" __global__ void copy_16(Copy p) { copy<uint4>(p); }
extern "C" __global__ void copy_4(Copy p) { copy<u32>(p); }
