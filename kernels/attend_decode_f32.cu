// Attention of one new token a sequence, keys and values in f32.
#include "attend_decode.cuh"

DECODE(attend_decode_f32, float)
