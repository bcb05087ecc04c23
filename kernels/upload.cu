// Small uploads: bytes that travelled with the step's block of dynamic data go where they belong.
#include "common.cuh"

struct Upload {
    const u32 *from;
    u32 *to;
    u64 words;
};

extern "C" __global__ void upload(Upload p) {
    for (u64 i = threadIdx.x; i < p.words; i += blockDim.x) p.to[i] = p.from[i];
}
