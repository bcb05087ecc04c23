// Attention of one new token a sequence, keys and values in bf16.
#include "attend_decode.cuh"

DECODE(attend_decode_bf16, bf16)
