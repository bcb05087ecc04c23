// Which of a sequence's rows a step attends whatever it selects (slots.cu says how tables lie).
#pragma once

#include "common.cuh"

struct Attended {
    const u32 *slots;   // the slot of each row, or NO_SLOT; table_stride words from KV head to KV head
    const u32 *used;    // the step in which each slot was used last; as far apart
    const u32 *tokens;  // the token in each row and one, or 0 where it is the row's number; null: it always is
    u64 table_stride;
    u64 tokens_stride;  // words from KV head to KV head
    u32 below;          // guarded tokens: below this, and from that on
    u32 from;
    u32 by_list;        // what is attended is what is guarded, not what is in slots
    u32 step;           // of a correction: what the step has used is attended as well; 0: it has used nothing
};

constexpr u32 NO_SLOT = 0xffffffffu;

// Those of a KV head.
struct AttendedRows {
    const Attended &a;
    const u32 *slots, *used, *tokens;

    __device__ __forceinline__ AttendedRows(const Attended &a, u32 kv_head)
        : a(a), slots(a.slots + kv_head * a.table_stride), used(a.used + kv_head * a.table_stride),
          tokens(a.tokens ? a.tokens + kv_head * a.tokens_stride : nullptr) {}

    __device__ __forceinline__ bool has(u32 row) const {
        if (!a.by_list) return slots[row] != NO_SLOT;
        const u32 token = tokens && tokens[row] ? tokens[row] - 1 : row;
        // (A guarded token of a pool may have lost its slot.)
        if (token < a.below || token >= a.from) return !tokens || slots[row] != NO_SLOT;
        return a.step && slots[row] != NO_SLOT && used[slots[row]] == a.step;
    }
};
