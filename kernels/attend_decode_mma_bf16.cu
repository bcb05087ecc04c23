// Attention of one new token a sequence on tensor cores, keys and values in bf16.
#include "attend_decode_mma.cuh"

DECODES(attend_decode_mma_bf16, bf16)
