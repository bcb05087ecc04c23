// Copies from device memory to shared memory that go on while a thread does something else (cp.async).
#pragma once

#include "common.cuh"

// Addresses in shared memory are numbers of 32 bits here: what the instructions below take.
__device__ __forceinline__ u32 shared_address(const void *p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 16 bytes; the thread that asked has them after a wait, others after a barrier behind that.
__device__ __forceinline__ void copy_16(u32 to, u64 from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
// As above, or zeros: then `from` is not read.
__device__ __forceinline__ void copy_16_or_zeros(u32 to, u64 from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
// As that, of data that is read once: L2 gives it up first, and fetches 128 bytes where some are missing. (A size that the
// compiler cannot tell for 16 or 0 takes another instruction, a slower one.)
__device__ __forceinline__ void copy_16_of_stream(u32 to, u64 from, bool real) {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
                 "r"(real ? 16 : 0), "l"(policy)
                 : "memory");
}

// What the thread asked for since the last time is a group; waits for all groups but the last N.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wait_for_groups_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
