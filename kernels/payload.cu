// Entries into what stores them away from the device, and back (payload.cuh says what they look like there).
//
// Between shared memory, where a warp puts a row together or takes it apart, and where it is stored, which may be host
// memory at the other end of a slow link, it moves in the widest pieces that fit.
#include "payload.cuh"

struct Rows {
    u32 kv_heads;
    u32 head_dim;
    u32 row_bytes;  // as stored
    u32 unused;
};

struct Encode {
    const float *keys;
    const float *values;
    const u64 *slots;  // token by token, head by head
    u64 stride;
    Rows rows;
};

// One block a token, one warp a head at a time.
template <class P> __device__ void encode(const Encode &p) {
    extern __shared__ __align__(16) u8 shared[];
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, d = p.rows.head_dim, bytes = p.rows.row_bytes;
    u8 *row = shared + warp * ((bytes + 15) / 16 * 16);
    for (u32 head = warp; head < p.rows.kv_heads; head += blockDim.x / WARP) {
        const u64 at = blockIdx.x * p.stride + head * d;
        P::encode(p.keys + at, p.values + at, d, lane, row);
        __syncwarp();
        copy_bytes(row, reinterpret_cast<u8 *>(p.slots[u64(blockIdx.x) * p.rows.kv_heads + head]), bytes, lane, WARP);
        __syncwarp();
    }
}

extern "C" __global__ void encode_f32(Encode p) { encode<Exact<float>>(p); }
extern "C" __global__ void encode_f16(Encode p) { encode<Exact<f16>>(p); }
extern "C" __global__ void encode_bf16(Encode p) { encode<Exact<bf16>>(p); }
extern "C" __global__ void encode_int8(Encode p) { encode<Int8>(p); }
extern "C" __global__ void encode_int4(Encode p) { encode<Int4>(p); }

struct Decode {
    const u64 *landings;  // from, to
    u32 count;
    u32 unused;
    Rows rows;
};

// One warp a row.
template <class P, class T> __device__ void decode(const Decode &p) {
    extern __shared__ __align__(16) u8 shared[];
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, bytes = p.rows.row_bytes;
    const u32 at = blockIdx.x * (blockDim.x / WARP) + warp;
    if (at >= p.count) return;
    u8 *row = shared + warp * ((bytes + 15) / 16 * 16);
    copy_bytes(reinterpret_cast<const u8 *>(p.landings[2 * at]), row, bytes, lane, WARP);
    __syncwarp();
    P::template decode<T>(row, p.rows.head_dim, lane, reinterpret_cast<T *>(p.landings[2 * at + 1]));
}

extern "C" __global__ void decode_exact(Decode p) {
    const u32 at = (blockIdx.x * blockDim.x + threadIdx.x) / WARP;
    if (at >= p.count) return;
    const u8 *from = reinterpret_cast<const u8 *>(p.landings[2 * at]);
    copy_bytes(from, reinterpret_cast<u8 *>(p.landings[2 * at + 1]), p.rows.row_bytes, threadIdx.x % WARP, WARP);
}
extern "C" __global__ void decode_int8_f32(Decode p) { decode<Int8, float>(p); }
extern "C" __global__ void decode_int8_f16(Decode p) { decode<Int8, f16>(p); }
extern "C" __global__ void decode_int8_bf16(Decode p) { decode<Int8, bf16>(p); }
extern "C" __global__ void decode_int4_f32(Decode p) { decode<Int4, float>(p); }
extern "C" __global__ void decode_int4_f16(Decode p) { decode<Int4, f16>(p); }
extern "C" __global__ void decode_int4_bf16(Decode p) { decode<Int4, bf16>(p); }

// All heads of a layer from the first row on, of any number of sequences: what is fetched whole, a layer ahead.
struct Fetched {
    const u64 *from;  // extents of the store, and of the target
    const u64 *to;
    const Fetched *next;  // null: none
    u32 count;            // rows of every head
    u32 unused;
};

struct Fetch {
    const Fetched *first;
    u64 from_offset;  // bytes from an extent's start to the layer's first run
    u64 from_run_bytes;
    u64 to_offset;
    u64 to_run_bytes;
    u32 extent_tokens;
    u32 part_rows;  // of a run that a block takes at a time
    Rows rows;
};

// A run's part of up to `part_rows` rows.
struct Part {
    const u8 *from;
    u8 *to;
    u32 rows;
};

// A few blocks walk through the parts of all sequences side by side, in ascending order of addresses as far as extents
// have it: that is what the link likes. `work` takes a part.
template <class F> __device__ void for_each_part(const Fetch &p, F work) {
    const u32 parts = (p.extent_tokens + p.part_rows - 1) / p.part_rows, of_extent = p.rows.kv_heads * parts;
    const u64 to_row_bytes = p.to_run_bytes / p.extent_tokens;
    u32 at = blockIdx.x;
    for (const Fetched *f = p.first; f; f = f->next) {
        const u32 count = f->count, all = (count + p.extent_tokens - 1) / p.extent_tokens * of_extent;
        for (; at < all; at += gridDim.x) {
            const u32 extent = at / of_extent, head = at % of_extent / parts, row = at % parts * p.part_rows;
            const u32 there = min(p.extent_tokens, count - extent * p.extent_tokens);
            if (row >= there) continue;
            work(Part{
                reinterpret_cast<const u8 *>(f->from[extent] + p.from_offset + head * p.from_run_bytes) + u64(row) * p.rows.row_bytes,
                reinterpret_cast<u8 *>(f->to[extent] + p.to_offset + head * p.to_run_bytes) + row * to_row_bytes,
                min(p.part_rows, there - row),
            });
        }
        at -= all;
    }
}

extern "C" __global__ void fetch_exact(Fetch p) {
    for_each_part(p, [&](Part part) {
        copy_bytes(part.from, part.to, part.rows * p.rows.row_bytes, threadIdx.x, blockDim.x);
    });
}

template <class P, class T> __device__ void fetch(const Fetch &p) {
    extern __shared__ __align__(16) u8 shared[];
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, d = p.rows.head_dim, bytes = p.rows.row_bytes;
    for_each_part(p, [&](Part part) {
        __syncthreads();
        copy_bytes(part.from, shared, part.rows * bytes, threadIdx.x, blockDim.x);
        __syncthreads();
        for (u32 row = warp; row < part.rows; row += blockDim.x / WARP) {
            P::template decode<T>(shared + row * bytes, d, lane, reinterpret_cast<T *>(part.to) + u64(row) * 2 * d);
        }
    });
}

extern "C" __global__ void fetch_int8_f32(Fetch p) { fetch<Int8, float>(p); }
extern "C" __global__ void fetch_int8_f16(Fetch p) { fetch<Int8, f16>(p); }
extern "C" __global__ void fetch_int8_bf16(Fetch p) { fetch<Int8, bf16>(p); }
extern "C" __global__ void fetch_int4_f32(Fetch p) { fetch<Int4, float>(p); }
extern "C" __global__ void fetch_int4_f16(Fetch p) { fetch<Int4, f16>(p); }
extern "C" __global__ void fetch_int4_bf16(Fetch p) { fetch<Int4, bf16>(p); }
