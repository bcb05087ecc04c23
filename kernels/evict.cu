// A step that evicts, undone: what is known of a pool is copied before a call and copied back, and what the call has
// overwritten goes back to where it was.
#include "evict.cuh"

struct Copy {
    const u64 *from;
    u64 *to;
    u64 words;  // of eight bytes
};

extern "C" __global__ void copy_words(Copy p) {
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < p.words; i += u64(gridDim.x) * blockDim.x) p.to[i] = p.from[i];
}

struct TakeBack {
    Pool pool;
    const u64 *store;  // addresses of extents
    const u64 *index;
    Layout layout;
    u64 store_offset;  // bytes from an extent's start to the layer's first run
    u64 store_run_bytes;
    u32 extent_tokens;  // of the store
    u32 stored_bytes;
};

// grid: KV heads.
extern "C" __global__ void __launch_bounds__(512) take_back(TakeBack p) {
    const u32 head = blockIdx.x, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Held held(p.pool, head);
    const Lost lost(p.pool, head, p.stored_bytes, p.layout.words);
    const u32 count = held.header[BEGUN] == p.pool.begun + 1 ? held.header[KEPT] : 0;
    const Runs stored = {p.store, p.store_offset, p.store_run_bytes, p.extent_tokens};
    for (u32 i = warp; i < count; i += WARPS) {
        const u32 row = lost.rows[i];
        u8 *to = reinterpret_cast<u8 *>(row_of(stored, head, row, p.stored_bytes));
        copy_bytes(lost.entry(i), to, p.stored_bytes, lane, WARP);
        const u64 run = run_of(p.layout, p.index, head, row);
        for (u32 w = lane; w < lost.key_words; w += WARP) {
            *key_word(p.layout, run, row % p.layout.extent_tokens, w) = lost.key(i)[w];
        }
    }
}
