// Rows of a table, by id: one block a row.
#include "common.cuh"

struct Embed {
    const void *table;
    const u32 *ids;
    float *out;
    u64 ids_stride;
    u64 out_stride;
    u32 cols;
    u32 table_rows;
    u32 accumulate;
    u32 unused;
};

template <class T> __device__ void embed(const Embed &p) {
    wait_for_previous();
    // Ids were checked far above; one that is not in the table reads its last row rather than foreign memory.
    const u32 id = min(p.ids[blockIdx.x * p.ids_stride], p.table_rows - 1);
    const T *from = static_cast<const T *>(p.table) + u64(id) * p.cols;
    float *out = p.out + blockIdx.x * p.out_stride;
    for (u32 i = threadIdx.x; i < p.cols; i += blockDim.x) {
        const float x = widen(from[i]);
        out[i] = p.accumulate ? out[i] + x : x;
    }
}

extern "C" __global__ void embed_f32(Embed p) { embed<float>(p); }
extern "C" __global__ void embed_f16(Embed p) { embed<f16>(p); }
extern "C" __global__ void embed_bf16(Embed p) { embed<bf16>(p); }
