// Entries as they are stored away from the device, and back: what their bytes mean is in src/backend/payload.rs, and they
// are the CPU backend's: maxima, quotients and roundings, and no sums over a vector. Where a product and a sum follow
// each other the __f*_rn forms keep the compiler from fusing them.
//
// Rows lie at any alignment, so a warp puts one together, or takes it apart, in shared memory.
#pragma once

#include "common.cuh"

typedef unsigned char u8;

constexpr u32 GROUP = 64;  // dimensions of a group of 4-bit codes

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

template <class P> constexpr bool is_exact = false;
template <class T> constexpr bool is_exact<Exact<T>> = true;

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
