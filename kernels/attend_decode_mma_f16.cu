// Attention of one new token a sequence on tensor cores, keys and values in f16.
#include "attend_decode_mma.cuh"

DECODES(attend_decode_mma_f16, f16)
