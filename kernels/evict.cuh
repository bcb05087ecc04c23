// A full pool whose rows the device gives away by itself (src/backend/evicting.rs says where what lies, and
// src/backend/cpu/evict.rs is a plain version): which token is in each row, how it was used, and what a call has overwritten.
#pragma once

#include "index.cuh"
#include "slots.cuh"

enum Victim : u32 { FIFO = 0, LRU = 1, COUNTER = 2 };
enum PoolHeader : u32 { LOST = 0, KEPT = 1, BEGUN = 2, POOL_HEADER = 4 };
constexpr u32 SATURATED = 255;

// One sequence's pool of a layer. Addresses are those of the first KV head.
struct Pool {
    u32 *tables;      // POOL_HEADER words, the token in each row, each row's use; null: row t is token t, for ever
    unsigned char *lost;
    u64 lost_stride;  // bytes from head to head
    u32 room;         // rows of a table
    u32 rows;         // that hold tokens
    u32 capacity;     // rows that a call may lose
    u32 rule;
    u32 token;        // under way
    u32 full;         // whether it takes the row of a victim
    u32 begun;        // tokens before the call: a victim among them can be brought back
    u32 unused;
};

// That of one KV head.
struct Held {
    u32 *header, *tokens, *uses;
    u32 rule;

    __device__ Held(const Pool &p, u32 head)
        : header(p.tables ? p.tables + u64(head) * (POOL_HEADER + 2 * p.room) : nullptr), tokens(header + POOL_HEADER),
          uses(tokens + p.room), rule(p.rule) {}

    __device__ u32 token(u32 row) const { return header && tokens[row] ? tokens[row] - 1 : row; }

    // What goes first has the least.
    __device__ u64 rank(u32 row) const {
        const u32 came = token(row), use = rule == FIFO ? 0 : uses[row];
        return u64(rule == LRU && use == 0 ? 3 * came + 2 : use) << 32 | came;
    }
};

// What a call overwrites of one KV head: rows, entries, partial keys.
struct Lost {
    u32 *rows;
    unsigned char *entries, *keys;
    u32 entry_bytes, key_words;

    __device__ Lost(const Pool &p, u32 head, u32 stored_bytes, u32 words)
        : rows(reinterpret_cast<u32 *>(p.lost + head * p.lost_stride)),
          entries(p.lost + head * p.lost_stride + (4 * p.capacity + 15) / 16 * 16),
          keys(entries + u64(p.capacity) * ((stored_bytes + 15) / 16 * 16)), entry_bytes((stored_bytes + 15) / 16 * 16),
          key_words(words + 1) {}

    __device__ u8 *entry(u32 i) const { return entries + u64(i) * entry_bytes; }
    __device__ u32 *key(u32 i) const { return reinterpret_cast<u32 *>(keys) + u64(i) * key_words; }
};

// Word `w` of a token's partial key in a run; its scale behind the last.
__device__ __forceinline__ u32 *key_word(const Layout &p, u64 run, u32 token, u32 w) {
    u32 *words = reinterpret_cast<u32 *>(run);
    return words + (w == p.words ? u64(p.extent_tokens) * p.words + token : word_of(p.words, token, w));
}

// A block leaves of `count` selected rows (ascending) those whose tokens are not guarded, notes their use, and returns how
// many they are. `corrects`: others have been used in this step before. `scratch` has WARPS and one words.
__device__ __forceinline__ u32 use_selected(
    const Pool &p, const Held &held, u32 below, u32 from, u32 *selected, u32 count, bool corrects, u32 *scratch
) {
    const u32 tid = threadIdx.x;
    u32 kept = 0;
    for (u32 first = 0; first < count; first += THREADS) {
        const u32 row = first + tid < count ? selected[first + tid] : 0, token = held.token(row);
        const bool stays = first + tid < count && token >= below && token < from;
        u32 total;
        const u32 at = kept + scan<WARPS>(stays, scratch, total);  // everyone has read
        if (stays) selected[at] = row;
        kept += total;
    }
    __syncthreads();
    if (p.rule == LRU) {
        for (u32 i = tid; i < kept; i += THREADS) held.uses[selected[i]] = 3 * p.token + corrects;
    }
    u32 *saturated = scratch + WARPS;
    for (u32 start = 0; p.rule == COUNTER && start < kept;) {
        // Up to the first count that saturates; then all are halved, and it goes on.
        if (tid == 0) *saturated = kept;
        __syncthreads();
        for (u32 i = start + tid; i < kept; i += THREADS) {
            if (held.uses[selected[i]] + 1 == SATURATED) atomicMin(saturated, i);
        }
        __syncthreads();
        const u32 found = *saturated, end = min(found + 1, kept);
        for (u32 i = start + tid; i < end; i += THREADS) held.uses[selected[i]]++;
        __syncthreads();
        if (found < kept) {
            for (u32 row = tid; row < p.rows; row += THREADS) held.uses[row] /= 2;
        }
        __syncthreads();
        start = end;
    }
    return kept;
}

// A block finds the row that gives way. `used` are the last uses of slots, `slots` those of rows: what this step has
// selected stays.
__device__ __forceinline__ u32 find_victim(
    const Pool &p, const Held &held, u32 below, u32 from, const u32 *used, const u32 *slots, u32 step
) {
    __shared__ u64 bests[WARPS];
    __shared__ u32 victim;
    u64 least = ~0ull;
    u32 best = 0;
#pragma unroll 4
    for (u32 row = threadIdx.x; row < p.rows; row += THREADS) {
        const u64 rank = held.rank(row);
        const u32 token = u32(rank), slot = slots[row];
        const bool may = token >= below && token < from && (slot == 0xffffffffu || used[slot] != step);
        if (may && rank < least) {
            least = rank;
            best = row;
        }
    }
    u64 all = least;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) all = min(all, __shfl_xor_sync(FULL, all, step));
    if (threadIdx.x % WARP == 0) bests[threadIdx.x / WARP] = all;
    if (threadIdx.x == 0) victim = p.rows - 1;  // there is one, as promised
    __syncthreads();
    for (u32 w = 0; w < WARPS; w++) all = min(all, bests[w]);
    if (least == all && all != ~0ull) victim = best;  // ranks differ: their lower halves are tokens
    __syncthreads();
    return victim;
}
