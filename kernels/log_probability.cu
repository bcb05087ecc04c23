// Log-probabilities of given tokens: one block a row.
#include "common.cuh"

struct LogProbability {
    const float *logits;
    const u32 *targets;
    float *out;
    u64 logits_stride;
    u64 targets_stride;
    u64 out_stride;
    u32 cols;
    u32 unused;
};

extern "C" __global__ void __launch_bounds__(512) log_probability(LogProbability p) {
    const float *x = p.logits + blockIdx.x * p.logits_stride;
    float most = LEAST;
    for (u32 i = threadIdx.x; i < p.cols; i += blockDim.x) most = fmaxf(most, x[i]);
    most = block_max(most);
    double sum = 0;
    for (u32 i = threadIdx.x; i < p.cols; i += blockDim.x) sum += double(expf(x[i] - most));
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        const u32 target = min(p.targets[blockIdx.x * p.targets_stride], p.cols - 1);
        p.out[blockIdx.x * p.out_stride] = float(double(x[target]) - double(most) - log(sum));
    }
}
