// Entries as they are stored away from the device, and back. What their bytes mean is in src/backend/payload.rs, and they
// are the CPU backend's: maxima, quotients and roundings, and no sums over a vector. Where a product and a sum follow
// each other the __f*_rn forms keep the compiler from fusing them.
//
// Rows lie at any alignment, so a warp puts one together, or takes it apart, in shared memory; between there and where it
// is stored, which may be host memory at the other end of a slow link, it moves in the widest pieces that fit.
#include "common.cuh"

typedef unsigned char u8;

constexpr u32 GROUP = 64;  // dimensions of a group of 4-bit codes

struct Rows {
    u32 kv_heads;
    u32 head_dim;
    u32 row_bytes;  // as stored
    u32 unused;
};

// Copies bytes with `lanes` threads, of which this is `lane`, 16 or 4 at a time where addresses and size allow.
template <class Unit> __device__ __forceinline__ void copy_units(const u8 *from, u8 *to, u32 bytes, u32 lane, u32 lanes) {
    constexpr u32 UNROLL = 4;
    const u32 n = bytes / sizeof(Unit);
    const Unit *source = reinterpret_cast<const Unit *>(from);
    Unit *target = reinterpret_cast<Unit *>(to);
    for (u32 i = lane; i < n; i += UNROLL * lanes) {
        Unit units[UNROLL];
#pragma unroll
        for (u32 j = 0; j < UNROLL; j++) {
            if (i + j * lanes < n) units[j] = source[i + j * lanes];
        }
#pragma unroll
        for (u32 j = 0; j < UNROLL; j++) {
            if (i + j * lanes < n) target[i + j * lanes] = units[j];
        }
    }
}
__device__ __forceinline__ void copy_bytes(const u8 *from, u8 *to, u32 bytes, u32 lane, u32 lanes) {
    const u64 alignment = reinterpret_cast<u64>(from) | reinterpret_cast<u64>(to) | bytes;
    if (alignment % 16 == 0) {
        copy_units<uint4>(from, to, bytes, lane, lanes);
    } else if (alignment % 4 == 0) {
        copy_units<u32>(from, to, bytes, lane, lanes);
    } else {
        copy_units<u8>(from, to, bytes, lane, lanes);
    }
}

__device__ __forceinline__ float word(const u8 *at) {
    return __uint_as_float(u32(at[0]) | u32(at[1]) << 8 | u32(at[2]) << 16 | u32(at[3]) << 24);
}
__device__ __forceinline__ f16 half_word(const u8 *at) { return __ushort_as_half(u32(at[0]) | u32(at[1]) << 8); }

// Four consecutive elements, aligned to the whole of them.
template <class T> __device__ __forceinline__ void store_four(const float (&x)[4], T *to) {
    if constexpr (sizeof(T) == 4) {
        *reinterpret_cast<float4 *>(to) = make_float4(x[0], x[1], x[2], x[3]);
    } else {
        __align__(8) T four[4] = {narrow<T>(x[0]), narrow<T>(x[1]), narrow<T>(x[2]), narrow<T>(x[3])};
        *reinterpret_cast<uint2 *>(to) = *reinterpret_cast<const uint2 *>(four);
    }
}

// As on the device. A warp calls these, with the row in shared memory.
template <class T> struct Exact {
    static __device__ void encode(const float *key, const float *value, u32 d, u32 lane, u8 *row) {
        T *to = reinterpret_cast<T *>(row);
        for (u32 i = lane; i < d; i += WARP) {
            to[i] = narrow<T>(key[i]);
            to[d + i] = narrow<T>(value[i]);
        }
    }
};

struct Int8 {
    static __device__ void encode_vector(const float *x, u32 d, u32 lane, u8 *scale_at, u8 *codes) {
        float most = 0;
        for (u32 i = lane; i < d; i += WARP) most = fmaxf(most, fabsf(x[i]));
        const float scale = __fdiv_rn(warp_max(most), 127.0f);
        const float divisor = scale > 0 ? scale : 1.0f;
        for (u32 i = lane; i < d; i += WARP) {
            const float code = rintf(__fdiv_rn(x[i], divisor));
            codes[i] = u8(int(fminf(fmaxf(code, -127.0f), 127.0f)));
        }
        if (lane < 4) scale_at[lane] = u8(__float_as_uint(scale) >> 8 * lane);
    }
    static __device__ void encode(const float *key, const float *value, u32 d, u32 lane, u8 *row) {
        encode_vector(key, d, lane, row, row + 8);
        encode_vector(value, d, lane, row + 4, row + 8 + d);
    }
    template <class T> static __device__ void decode(const u8 *row, u32 d, u32 lane, T *to) {
        const float of_key = word(row), of_value = word(row + 4);
        if (d % 4 == 0) {  // all rows are aligned to four then
            for (u32 i = 4 * lane; i < 2 * d; i += 4 * WARP) {
                const u32 codes = *reinterpret_cast<const u32 *>(row + 8 + i);
                const float scale = i < d ? of_key : of_value;
                float x[4];
#pragma unroll
                for (u32 j = 0; j < 4; j++) x[j] = __fmul_rn(float(static_cast<signed char>(codes >> 8 * j)), scale);
                store_four(x, to + i);
            }
            return;
        }
        for (u32 i = lane; i < 2 * d; i += WARP) {
            const float code = float(static_cast<signed char>(row[8 + i]));
            to[i] = narrow<T>(__fmul_rn(code, i < d ? of_key : of_value));
        }
    }
};

struct Int4 {
    static __device__ u32 vector_bytes(u32 d) { return (d + GROUP - 1) / GROUP * 4 + d / GROUP * (GROUP / 2) + (d % GROUP + 1) / 2; }

    static __device__ void encode_vector(const float *x, u32 d, u32 lane, u8 *parameters) {
        constexpr float FINITE = 65504.0f;
        u8 *codes = parameters + (d + GROUP - 1) / GROUP * 4;
        for (u32 from = 0; from < d; from += GROUP) {
            const u32 n = min(GROUP, d - from), half = (n + 1) / 2;
            // Lanes past the end repeat the group's first element, which changes neither bound.
            const float first = x[from + (lane < n ? lane : 0)], second = x[from + (lane + WARP < n ? lane + WARP : 0)];
            // The least is the negative of the largest negative: so a least of zero is −0, as on the CPU.
            const float least = -warp_max(fmaxf(__fsub_rn(0.0f, first), __fsub_rn(0.0f, second)));
            const float most = warp_max(fmaxf(first, second));
            const f16 minimum = __float2half_rn(fminf(fmaxf(least, -FINITE), FINITE));
            const float low = __half2float(minimum);
            const f16 scale = __float2half_rn(fminf(fmaxf(__fdiv_rn(__fsub_rn(most, low), 15.0f), 0.0f), FINITE));
            const float wide = __half2float(scale), divisor = wide > 0 ? wide : 1.0f;
            auto code = [&](u32 i) {
                const float code = rintf(__fdiv_rn(__fsub_rn(x[from + i], low), divisor));
                return u32(fminf(fmaxf(code, 0.0f), 15.0f));
            };
            if (lane < half) codes[lane] = u8(code(lane) | (half + lane < n ? code(half + lane) << 4 : 0));
            if (lane < 2) {
                parameters[lane] = u8(__half_as_ushort(scale) >> 8 * lane);
                parameters[2 + lane] = u8(__half_as_ushort(minimum) >> 8 * lane);
            }
            parameters += 4;
            codes += half;
        }
    }
    static __device__ void encode(const float *key, const float *value, u32 d, u32 lane, u8 *row) {
        encode_vector(key, d, lane, row);
        encode_vector(value, d, lane, row + vector_bytes(d));
    }
    template <class T> static __device__ void decode(const u8 *row, u32 d, u32 lane, T *to) {
        if (d % GROUP == 0) {  // all rows are aligned to four then, and eight lanes share a group
            const u32 groups = d / GROUP;
            for (u32 i = lane / 8; i < 2 * groups; i += WARP / 8) {
                const u32 group = i % groups, at = lane % 8 * 4;
                const u8 *vector = row + i / groups * vector_bytes(d);
                const u32 both = *reinterpret_cast<const u32 *>(vector + 4 * groups + group * (GROUP / 2) + at);
                const float scale = __half2float(half_word(vector + 4 * group));
                const float minimum = __half2float(half_word(vector + 4 * group + 2));
                float low[4], high[4];
#pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    low[j] = __fadd_rn(__fmul_rn(float(both >> 8 * j & 15), scale), minimum);
                    high[j] = __fadd_rn(__fmul_rn(float(both >> (8 * j + 4) & 15), scale), minimum);
                }
                store_four(low, to + i * GROUP + at);
                store_four(high, to + i * GROUP + GROUP / 2 + at);
            }
            return;
        }
        for (u32 vector = 0; vector < 2; vector++, row += vector_bytes(d), to += d) {
            const u8 *parameters = row, *codes = row + (d + GROUP - 1) / GROUP * 4;
            for (u32 from = 0; from < d; from += GROUP) {
                const u32 n = min(GROUP, d - from), half = (n + 1) / 2;
                const float scale = __half2float(half_word(parameters)), minimum = __half2float(half_word(parameters + 2));
                if (lane < half) {
                    const u32 both = codes[lane];
                    to[from + lane] = narrow<T>(__fadd_rn(__fmul_rn(float(both & 15), scale), minimum));
                    if (half + lane < n) {
                        to[from + half + lane] = narrow<T>(__fadd_rn(__fmul_rn(float(both >> 4), scale), minimum));
                    }
                }
                parameters += 4;
                codes += half;
            }
        }
    }
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
