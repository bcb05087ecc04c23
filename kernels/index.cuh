// How a run of the speculation index holds rows.
//
// A run holds first the columns of all its tokens and then their scales, f32. A row is W words: eight columns of four
// bits (bytes 0 to 3 hold columns 0 to 3 in their lower and 4 to 7 in their upper halves, 8 added to each), four signed
// columns of eight bits, or one f32. Rows come in tiles of 32 tokens, in which words lie unit by unit: the first unit of
// each token, then the second of each … . A unit is four words where they divide W, else one; so whatever the width of a
// row, the 32 threads of a warp that read one token each read consecutive memory. (rehearse.cu reads it.)
#pragma once

#include <math_constants.h>

#include "common.cuh"

struct Layout {
    u64 layer_offset;  // bytes from an extent's start to the layer's first run
    u64 run_bytes;
    u32 extent_tokens;
    u32 columns;
    u32 words;  // of a row, W
    u32 bits;   // 4, 8 or 32
};

constexpr u32 TILE = 32;

// Below this a row is zero: the reciprocal of its scale would overflow.
constexpr float TINY = 1e-30f;

// Word `w` of a token's row, counted from the run's start.
__device__ __forceinline__ u64 word_of(u32 words, u32 token, u32 w) {
    const u32 unit = words % 4 ? 1 : 4;
    return (u64(token / TILE) * words + w / unit * unit) * TILE + token % TILE * unit + w % unit;
}

// Where the run of a KV head with this row begins.
__device__ __forceinline__ u64 run_of(const Layout &p, const u64 *extents, u32 head, u32 row) {
    return extents[row / p.extent_tokens] + p.layer_offset + head * p.run_bytes;
}

// A warp stores a partial key as a token of a run. The same bits as the CPU backend's: no product here meets a sum in
// one rounding.
__device__ void store_row(const Layout &p, u64 run, u32 token, const float *key) {
    const u32 lane = threadIdx.x % WARP;
    u32 *words = reinterpret_cast<u32 *>(run);
    float *scale = reinterpret_cast<float *>(words + u64(p.extent_tokens) * p.words) + token;

    if (p.bits == 32) {
        for (u32 w = lane; w < p.words; w += WARP) {
            words[word_of(p.words, token, w)] = w < p.columns ? __float_as_uint(key[w]) : 0;
        }
        if (lane == 0) *scale = 1.0f;
        return;
    }

    float most = 0;
    bool finite = true;
    for (u32 c = lane; c < p.columns; c += WARP) {
        const float size = fabsf(key[c]);
        finite = finite && size < CUDART_INF_F;
        most = fmaxf(most, size);
    }
    most = warp_max(most);
    finite = __all_sync(FULL, finite);
    const float levels = p.bits == 4 ? 7.0f : 127.0f;
    const bool zero = !finite || most < TINY;
    const float inverse = zero ? 0.0f : levels / most;
    const u32 per_word = 32 / p.bits;
    for (u32 w = lane; w < p.words; w += WARP) {
        u32 word = 0;
        for (u32 j = 0; j < per_word; j++) {
            const u32 c = w * per_word + j;
            const int q = zero || c >= p.columns ? 0 : __float2int_rn(__fmul_rn(key[c], inverse));
            word |= p.bits == 4 ? u32(q + 8) << (j % 4 * 8 + j / 4 * 4) : (u32(q) & 255) << (8 * j);
        }
        words[word_of(p.words, token, w)] = word;
    }
    if (lane == 0) *scale = !finite ? CUDART_NAN_F : zero ? 0.0f : most / levels;
}
