// Entries that a cache is to hold, from where they are stored into their slots: over a link, as a rule.
//
// A few blocks, as large as they may be, walk through all rows that are wanted, a warp a row, list by list in ascending order:
// neighbours are read together, and what is read at a time lies in few pages. They take few multiprocessors from whatever
// computes meanwhile, and of those all.
#include "slots.cuh"

struct Gathered {
    const u32 *counts;  // moves of each KV head, `count_stride` words apart
    const u32 *rows;    // of the first KV head; `list_stride` words from head to head, `step` from move to move
    const u32 *slots;   // null: move i goes to slot i
    Runs from;
    Runs to;
    Runs saved;  // where what lies in the slot of move i is kept, in row i; extents null: nowhere
    u32 count_stride;
    u32 step;
    u64 list_stride;
};

struct Gather {
    const Gathered *sequences;
    u32 count;  // sequences
    u32 kv_heads;
    u32 row_bytes;  // as stored
    u32 to_bytes;   // in a slot
    u32 head_dim;
    u32 unused;
};

constexpr u32 LISTS = 1024;  // that are counted together
constexpr u32 IN_FLIGHT = 4;  // rows of a warp
constexpr u32 GATHER_THREADS = 1024, GATHER_WARPS = GATHER_THREADS / WARP;

// Rows of a warp, of which the first `count` are real; the others repeat one, and may be read.
struct Batch {
    const u8 *from[IN_FLIGHT];
    u8 *to[IN_FLIGHT];
    u8 *saved[IN_FLIGHT];
    u32 count;
};

// `work(batch, next)` does what is to be done with a batch. It may call `next` when it needs the batch no more, and other rows
// are still on their way: that finds where the next ones lie. A lane that does not, has none to work on.
template <class F> __device__ void for_each_batch(const Gather &p, F work) {
    __shared__ u32 ends[LISTS], totals[GATHER_WARPS];
    const u32 lists = p.count * p.kv_heads, tid = threadIdx.x;
    const u32 warp = blockIdx.x * GATHER_WARPS + tid / WARP, warps = gridDim.x * GATHER_WARPS;
    for (u32 first = 0; first < lists; first += LISTS) {
        const u32 here = min(LISTS, lists - first);
        u32 all = 0;
        for (u32 l0 = 0; l0 < here; l0 += GATHER_THREADS) {
            const u32 list = first + l0 + tid;
            const bool real = l0 + tid < here;
            u32 count = 0;
            if (real) {
                const Gathered &g = p.sequences[list / p.kv_heads];
                count = g.counts[list % p.kv_heads * g.count_stride];
            }
            u32 total;
            const u32 before = all + scan<GATHER_WARPS>(count, totals, total);
            if (real) ends[l0 + tid] = before + count;
            all += total;
        }
        __syncthreads();
        u32 list = 0;
        Batch batch;
        auto locate = [&](u32 begin) {
            if (begin >= all) return;
            batch.count = 0;
#pragma unroll
            for (u32 k = 0; k < IN_FLIGHT; k++) {
                batch.count += begin + k * warps + warp < all;
                const u32 i = min(begin + k * warps + warp, all - 1);
                while (ends[list] <= i) list++;
                const Gathered &g = p.sequences[(first + list) / p.kv_heads];
                const u32 head = (first + list) % p.kv_heads, at = i - (list ? ends[list - 1] : 0);
                const u64 move = head * g.list_stride + u64(at) * g.step;
                const u32 slot = g.slots ? g.slots[move] : at;
                batch.from[k] = reinterpret_cast<const u8 *>(row_of(g.from, head, g.rows[move], p.row_bytes));
                batch.to[k] = reinterpret_cast<u8 *>(row_of(g.to, head, slot, p.to_bytes));
                batch.saved[k] =
                    g.saved.extents ? reinterpret_cast<u8 *>(row_of(g.saved, head, at, p.to_bytes)) : nullptr;
            }
        };
        locate(0);
        for (u32 begin = 0; begin < all; begin += warps * IN_FLIGHT) {
            work(batch, [&] { locate(begin + warps * IN_FLIGHT); });
        }
        __syncthreads();
    }
}

// Copies the rows of a batch; `to[k]` is where the k-th goes.
template <class Unit> __device__ __forceinline__ void copy_batch(const Batch &batch, u8 *const (&to)[IN_FLIGHT], u32 bytes) {
    for (u32 u = threadIdx.x % WARP; u < bytes / sizeof(Unit); u += WARP) {
        Unit values[IN_FLIGHT];
#pragma unroll
        for (u32 k = 0; k < IN_FLIGHT; k++) values[k] = reinterpret_cast<const Unit *>(batch.from[k])[u];
#pragma unroll
        for (u32 k = 0; k < IN_FLIGHT; k++) {
            if (k < batch.count) reinterpret_cast<Unit *>(to[k])[u] = values[k];
        }
    }
}

// While rows come, it is found out where the next ones lie.
template <class Unit> __device__ void gather(const Gather &p) {
    const u32 units = p.row_bytes / sizeof(Unit);
    for_each_batch(p, [&](const Batch &batch, auto next) {
        const u32 count = batch.count;
        for (u32 u = threadIdx.x % WARP; u < units; u += WARP) {
            Unit values[IN_FLIGHT], *into[IN_FLIGHT];
#pragma unroll
            for (u32 k = 0; k < IN_FLIGHT; k++) {
                values[k] = reinterpret_cast<const Unit *>(batch.from[k])[u];
                into[k] = reinterpret_cast<Unit *>(batch.to[k]) + u;
            }
            if (u + WARP >= units) next();
#pragma unroll
            for (u32 k = 0; k < IN_FLIGHT; k++) {
                if (k < count) *into[k] = values[k];
            }
        }
    });
}

extern "C" __global__ void __launch_bounds__(1024) gather_16(Gather p) { gather<uint4>(p); }
extern "C" __global__ void __launch_bounds__(1024) gather_4(Gather p) { gather<u32>(p); }

// Rows that are stored otherwise come into shared memory as they are, and are widened from there.
template <class P, class T> __device__ void gather_widened(const Gather &p) {
    extern __shared__ __align__(16) u8 shared[];
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, stride = (p.row_bytes + 15) / 16 * 16;
    u8 *rows[IN_FLIGHT];
#pragma unroll
    for (u32 k = 0; k < IN_FLIGHT; k++) rows[k] = shared + (warp * IN_FLIGHT + k) * stride;
    for_each_batch(p, [&](const Batch &batch, auto next) {
        if (p.row_bytes % 16 == 0) {
            copy_batch<uint4>(batch, rows, p.row_bytes);
        } else if (p.row_bytes % 4 == 0) {
            copy_batch<u32>(batch, rows, p.row_bytes);
        } else {
            copy_batch<u8>(batch, rows, p.row_bytes);
        }
        for (u32 k = 0; k < batch.count; k++) {
            if (batch.saved[k]) copy_bytes(batch.to[k], batch.saved[k], p.to_bytes, lane, WARP);
        }
        __syncwarp();
        for (u32 k = 0; k < batch.count; k++) {
            P::template decode<T>(rows[k], p.head_dim, lane, reinterpret_cast<T *>(batch.to[k]));
        }
        __syncwarp();
        next();
    });
}

extern "C" __global__ void __launch_bounds__(1024) gather_int8_f32(Gather p) { gather_widened<Int8, float>(p); }
extern "C" __global__ void __launch_bounds__(1024) gather_int8_f16(Gather p) { gather_widened<Int8, f16>(p); }
extern "C" __global__ void __launch_bounds__(1024) gather_int8_bf16(Gather p) { gather_widened<Int8, bf16>(p); }
extern "C" __global__ void __launch_bounds__(1024) gather_int4_f32(Gather p) { gather_widened<Int4, float>(p); }
extern "C" __global__ void __launch_bounds__(1024) gather_int4_f16(Gather p) { gather_widened<Int4, f16>(p); }
extern "C" __global__ void __launch_bounds__(1024) gather_int4_bf16(Gather p) { gather_widened<Int4, bf16>(p); }
