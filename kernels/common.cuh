// What every kernel stands on: element types widened to f32, 16-byte loads, reductions in a fixed order.
//
// Kernels take one struct of parameters by value, laid out without padding: pointers first, then 32-bit numbers, an even
// count of them. Its twin in Rust lies beside the operation's launch (src/backend/cuda/). A window is a pointer and a
// stride in elements. All arithmetic is f32; fmaf says where a product and a sum are rounded once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int u32;
typedef unsigned long long u64;
typedef __nv_bfloat16 bf16;
typedef __half f16;

// A score below any real one, and finite: differences of two of it are no NaN.
constexpr float LEAST = -1e30f;

constexpr u32 WARP = 32;
constexpr u32 FULL = 0xffffffffu;

// Lets the launch behind this one begin, and waits until the one before it has ended. What stands before it in a kernel may run
// beside that launch, and reads only what no launch of a step writes: weights. (Before Hopper there are no such instructions. What
// stands behind //sm_90 is a comment there, and no longer where src/backend/cuda/kernels.rs takes the mark away.)
__device__ __forceinline__ void wait_for_previous() {
    asm volatile("//sm_90 griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("//sm_90 griddepcontrol.wait;" ::: "memory");
}

// Elements in 16 bytes.
template <class T> constexpr int LANES = 16 / sizeof(T);

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(f16 x) { return __half2float(x); }
__device__ __forceinline__ float widen(bf16 x) { return __bfloat162float(x); }

template <class T> __device__ __forceinline__ T narrow(float x);
template <> __device__ __forceinline__ float narrow<float>(float x) { return x; }
template <> __device__ __forceinline__ f16 narrow<f16>(float x) { return __float2half_rn(x); }
template <> __device__ __forceinline__ bf16 narrow<bf16>(float x) { return __float2bfloat16_rn(x); }

// The two halves of a word of two elements.
__device__ __forceinline__ void widen2(u32 word, f16, float &low, float &high) {
    const float2 both = __half22float2(*reinterpret_cast<const __half2 *>(&word));
    low = both.x;
    high = both.y;
}
__device__ __forceinline__ void widen2(u32 word, bf16, float &low, float &high) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
}

// Four words as LANES<T> floats.
template <class T> __device__ __forceinline__ void unpack(uint4 raw, float (&v)[LANES<T>]) {
    if constexpr (sizeof(T) == 4) {
        v[0] = __uint_as_float(raw.x);
        v[1] = __uint_as_float(raw.y);
        v[2] = __uint_as_float(raw.z);
        v[3] = __uint_as_float(raw.w);
    } else {
        widen2(raw.x, T(), v[0], v[1]);
        widen2(raw.y, T(), v[2], v[3]);
        widen2(raw.z, T(), v[4], v[5]);
        widen2(raw.w, T(), v[6], v[7]);
    }
}

// V consecutive elements: one of any alignment, or 16 bytes aligned to 16.
template <class T, int V> __device__ __forceinline__ void load(const T *from, float (&v)[V]) {
    if constexpr (V == 1) {
        v[0] = widen(*from);
    } else {
        static_assert(V == LANES<T>, "one element, or 16 bytes of them");
        unpack<T>(*reinterpret_cast<const uint4 *>(from), v);
    }
}

// As load, for data that is read once: it does not displace what is read again.
template <class T, int V> __device__ __forceinline__ void stream_load(const T *from, float (&v)[V]) {
    if constexpr (V == 1) {
        v[0] = widen(*from);
    } else {
        static_assert(V == LANES<T>, "one element, or 16 bytes of them");
        unpack<T>(__ldcs(reinterpret_cast<const uint4 *>(from)), v);
    }
}

// V consecutive floats, V = 1 or a multiple of 4 aligned to 16 bytes.
template <int V> __device__ __forceinline__ void load_floats(const float *from, float (&v)[V]) {
    if constexpr (V == 1) {
        v[0] = *from;
    } else {
#pragma unroll
        for (int i = 0; i < V; i += 4) {
            const float4 four = *reinterpret_cast<const float4 *>(from + i);
            v[i] = four.x;
            v[i + 1] = four.y;
            v[i + 2] = four.z;
            v[i + 3] = four.w;
        }
    }
}

// Sums over a warp; every lane gets the result, from one fixed tree.
template <class F> __device__ __forceinline__ F warp_sum(F x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL, x, step));
    return x;
}

// Sums over a block of up to 1024 threads, a multiple of 32; every thread gets the result.
template <class F> __device__ __forceinline__ F block_sum(F x) {
    __shared__ F parts[WARP];
    x = warp_sum(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    const u32 warps = blockDim.x / WARP;
    return warp_sum(threadIdx.x % WARP < warps ? parts[threadIdx.x % WARP] : F(0));
}

__device__ __forceinline__ float block_max(float x) {
    __shared__ float parts[WARP];
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = x;
    __syncthreads();
    const u32 warps = blockDim.x / WARP;
    return warp_max(threadIdx.x % WARP < warps ? parts[threadIdx.x % WARP] : LEAST);
}
