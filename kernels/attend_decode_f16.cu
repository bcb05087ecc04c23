// Attention of one new token a sequence, keys and values in f16.
#include "attend_decode.cuh"

DECODE(attend_decode_f16, f16)
