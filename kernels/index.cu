// Partial keys into the speculation index, quantized: 4 or 8 bits a column with one scale a row, or f32.
#include "index.cuh"

// Where rows go, data of the step: the launch is then the same in every step.
struct Place {
    const u64 *extents;
    const u32 *rows;  // of each KV head, or null: `first` and those that follow
    u32 first;
    u32 unused;
};

struct Append {
    const float *keys;
    const Place *place;
    u64 stride;
    Layout layout;
    u32 kv_heads;
    u32 count;  // rows × KV heads
};

// One warp a row of one KV head.
extern "C" __global__ void index_append(Append p) {
    const u32 item = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP;
    if (item >= p.count) return;
    const u32 i = item / p.kv_heads, head = item % p.kv_heads;
    const float *key = p.keys + i * p.stride + head * p.layout.columns;
    const u32 row = p.place->rows ? p.place->rows[head] : p.place->first + i;
    const u32 token = row % p.layout.extent_tokens;
    const u64 run = run_of(p.layout, p.place->extents, head, row);
    store_row(p.layout, run, token, key);
}
