// A rehearsal of attention on the speculation index, and the rows that it selects: three launches.
//
// 1. rehearse_score: logits of every row for every query head, from whole numbers, and of each chunk of rows the largest
//    logit m and the sum of exp(logit − m). Each row of the index is read once for up to eight query heads.
// 2. rehearse_rank: what normalises each head, from all its chunks; each row's rank, the largest log-probability of a
//    head of the group, as a number whose order is that of the ranks; a histogram of these numbers' first digits.
// 3. rehearse_select: a block a KV head finds the number of the k-th best row digit by digit, and writes the rows above
//    it, and of those that equal it the first ones, in ascending order.
//
// grids: chunks × (KV heads × passes, or KV heads) × sequences. Everything that changes from step to step is in the table
// of sequences; a block past its sequence's end leaves at once. A sequence's results depend on nothing but its own data.
#include <math_constants.h>

#include "common.cuh"

struct Sequence {
    const u64 *extents;
    float *scores;     // query heads × stride
    u32 *keys;         // KV heads × stride: ranks as numbers
    float2 *stats;     // query heads × (stride / CHUNK): m and the sum
    u32 *histograms;   // KV heads × BINS
    u32 *counted;      // KV heads: rows that the rule's limit lets pass
    u32 *out_rows;     // KV heads × capacity
    u32 *out_counts;   // KV heads
    const struct Replay *replay;  // of rule REPLAY
    u32 row;           // of the queries
    u32 rows;          // of the index
    u32 from;          // rows that may be selected
    u32 to;
    u32 stride;        // a multiple of CHUNK
    u32 capacity;
    u32 rule;
    u32 least;         // bounds of the number of selected rows
    u32 most;
    float limit;       // the rule's, in logits
    float scale;
    u32 seed;          // of rule RANDOM
    u32 step;
    u32 period;
};

enum Rule : u32 { COUNT = 0, PROBABILITY = 1, PAPER = 2, RANDOM = 3, REPLAY = 4 };

// A trace in the place of what is selected: `Replay` in src/backend/replay.rs.
struct Replay {
    const u32 *table;
    const u32 *lists;  // of each of the trace's KV heads the words of the table where its rows begin and end
    u32 heads;
    u32 first;
    u32 narrow;
    u32 wide;
    u32 shift;
    u32 unused;
};

struct Rehearse {
    const float *queries;
    const Sequence *sequences;
    u64 queries_stride;
    u64 layer_offset;  // bytes from an extent's start to the layer's first run
    u64 run_bytes;
    u32 extent_tokens;
    u32 kv_heads;
    u32 group;
    u32 columns;
    u32 words;  // of a row
    u32 passes;
};

constexpr u32 THREADS = 256, ROWS = 4, CHUNK = THREADS * ROWS, WARPS = THREADS / WARP;
constexpr u32 TILE = 32;  // tokens whose rows lie unit by unit: index.cu says how
constexpr float TINY = 1e-30f;
constexpr u32 DIGIT = 11, BINS = 1 << DIGIT;

// Query words that belong to a word of a row.
template <int BITS> constexpr int PER_WORD = BITS == 4 ? 2 : 1;

template <int BITS> struct Sum { typedef int type; };
template <> struct Sum<32> { typedef float type; };

// `sum` and the products of a row's word with its j-th query word.
template <int BITS, class S> __device__ __forceinline__ S add_products(u32 word, int j, u32 query, S sum) {
    if constexpr (BITS == 4) return __dp4a(int(word >> (4 * j) & 0x0f0f0f0fu), int(query), sum);
    if constexpr (BITS == 8) return __dp4a(int(word), int(query), sum);
    if constexpr (BITS == 32) return fmaf(__uint_as_float(word), __uint_as_float(query), sum);
}

// N consecutive words, 16 bytes at a time where they divide them.
template <int N> __device__ __forceinline__ void load_words(const u32 *from, u32 (&to)[N]) {
    if constexpr (N % 4 == 0) {
#pragma unroll
        for (int i = 0; i < N; i += 4) {
            const uint4 four = *reinterpret_cast<const uint4 *>(from + i);
            to[i] = four.x;
            to[i + 1] = four.y;
            to[i + 2] = four.z;
            to[i + 3] = four.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) to[i] = from[i];
    }
}

// A warp quantizes one head's query to −127..127 (or copies it): words to `to`; what makes a dot product with them a
// logit but for the row's scale, and what the offset of four-bit columns adds to every dot product.
template <int BITS>
__device__ void prepare(const float *query, u32 columns, u32 words, float scale, u32 *to, float &factor, int &offset) {
    const u32 lane = threadIdx.x % WARP;
    if constexpr (BITS == 32) {
        for (u32 w = lane; w < words; w += WARP) to[w] = w < columns ? __float_as_uint(query[w]) : 0;
        factor = scale;
        offset = 0;
    } else {
        float most = 0;
        bool finite = true;
        for (u32 c = lane; c < columns; c += WARP) {
            const float size = fabsf(query[c]);
            finite = finite && size < CUDART_INF_F;
            most = fmaxf(most, size);
        }
        most = warp_max(most);
        finite = __all_sync(FULL, finite);
        const bool zero = !finite || most < TINY;
        const float inverse = zero ? 0.0f : 127.0f / most;
        int sum = 0;
        for (u32 w = lane; w < words; w += WARP) {
            u32 word = 0;
            for (u32 j = 0; j < 4; j++) {
                const u32 c = 4 * w + j;
                const int q = zero || c >= columns ? 0 : __float2int_rn(__fmul_rn(query[c], inverse));
                word |= (u32(q) & 255) << (8 * j);
                sum += q;
            }
            to[w] = word;
        }
        factor = __fmul_rn(!finite ? CUDART_NAN_F : zero ? 0.0f : most / 127.0f, scale);
        offset = BITS == 4 ? 8 * warp_sum(sum) : 0;
    }
}

// U: words of a unit. G: query heads at a time.
template <int BITS, int U, int G> __device__ void score(const Rehearse &p) {
    extern __shared__ __align__(16) u32 queries[];  // G × query words
    __shared__ float factors[G];
    __shared__ int offsets[G];
    __shared__ float2 parts[WARPS][G];
    typedef typename Sum<BITS>::type S;
    const Sequence s = p.sequences[blockIdx.z];
    const u32 kv_head = blockIdx.y / p.passes, pass = blockIdx.y % p.passes;
    if (blockIdx.x == 0 && pass == 0) {
        // For the launches behind this one.
        for (u32 i = threadIdx.x; i < BINS; i += THREADS) s.histograms[kv_head * BINS + i] = 0;
        if (threadIdx.x == 0) s.counted[kv_head] = 0;
    }
    const u32 begin = blockIdx.x * CHUNK;
    if (begin >= s.rows) return;
    const u32 heads = min(u32(G), p.group - pass * G), head0 = kv_head * p.group + pass * G;
    const u32 query_words = p.words * PER_WORD<BITS>, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // Of each row its tile, and its place there; past the end, the last row is read again.
    const u32 *rows[ROWS];
    float scales[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const u32 row = min(begin + i * THREADS + threadIdx.x, s.rows - 1);
        const u32 token = row % p.extent_tokens;
        const u64 run = s.extents[row / p.extent_tokens] + p.layer_offset + kv_head * p.run_bytes;
        const u32 *start = reinterpret_cast<const u32 *>(run);
        rows[i] = start + u64(token / TILE) * TILE * p.words + token % TILE * U;
        scales[i] = BITS == 32 ? 1.0f : __uint_as_float(start[u64(p.extent_tokens) * p.words + token]);
    }
    u32 words[ROWS][U];
    auto load_rows = [&](u32 unit) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) load_words<U>(rows[i] + unit * TILE * U, words[i]);
    };
    load_rows(0);  // on their way while the queries are prepared

    for (u32 g = warp; g < G; g += WARPS) {
        // Past the group's end, the last head is computed again and not stored.
        const float *query = p.queries + s.row * p.queries_stride + u64(head0 + min(g, heads - 1)) * p.columns;
        float factor;
        int offset;
        prepare<BITS>(query, p.columns, query_words, s.scale, queries + g * query_words, factor, offset);
        if (lane == 0) {
            factors[g] = factor;
            offsets[g] = offset;
        }
    }
    __syncthreads();

    S sums[ROWS][G];
#pragma unroll
    for (int g = 0; g < G; g++) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) sums[i][g] = S(-offsets[g]);
    }
    for (u32 unit = 0; unit < p.words / U; unit++) {
        if (unit > 0) load_rows(unit);
#pragma unroll
        for (int g = 0; g < G; g++) {
            u32 query[U * PER_WORD<BITS>];
            load_words<U * PER_WORD<BITS>>(queries + g * query_words + unit * U * PER_WORD<BITS>, query);
#pragma unroll
            for (int w = 0; w < U; w++) {
#pragma unroll
                for (int j = 0; j < PER_WORD<BITS>; j++) {
                    const u32 q = query[w * PER_WORD<BITS> + j];
#pragma unroll
                    for (int i = 0; i < ROWS; i++) sums[i][g] = add_products<BITS>(words[i][w], j, q, sums[i][g]);
                }
            }
        }
    }

#pragma unroll
    for (int g = 0; g < G; g++) {
        float scores[ROWS], m = -CUDART_INF_F, l = 0;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const u32 row = begin + i * THREADS + threadIdx.x;
            // NaN becomes −∞: it ranks below all others.
            const float logit = __fmul_rn(__fmul_rn(float(sums[i][g]), scales[i]), factors[g]);
            scores[i] = row < s.rows ? fmaxf(logit, -CUDART_INF_F) : -CUDART_INF_F;
            m = fmaxf(m, scores[i]);
            if (row < s.rows && g < heads) s.scores[u64(head0 + g) * s.stride + row] = scores[i];
        }
        m = warp_max(m);
        if (m > -CUDART_INF_F) {
#pragma unroll
            for (int i = 0; i < ROWS; i++) l += __expf(scores[i] - m);
        }
        l = warp_sum(l);
        if (lane == 0) parts[warp][g] = make_float2(m, l);
    }
    __syncthreads();
    if (threadIdx.x < heads) {
        float m = -CUDART_INF_F, l = 0;
        for (u32 w = 0; w < WARPS; w++) m = fmaxf(m, parts[w][threadIdx.x].x);
        for (u32 w = 0; w < WARPS && m > -CUDART_INF_F; w++) {
            l += parts[w][threadIdx.x].y * expf(parts[w][threadIdx.x].x - m);
        }
        s.stats[u64(head0 + threadIdx.x) * (s.stride / CHUNK) + blockIdx.x] = make_float2(m, l);
    }
}

// rehearse_score_BITS_UNIT_HEADS.
#define SCORE(BITS, U, G)                                                                       \
    extern "C" __global__ void __launch_bounds__(256) rehearse_score_##BITS##_##U##_##G(Rehearse p) { \
        score<BITS, U, G>(p);                                                                   \
    }
#define SCORES(BITS, U) SCORE(BITS, U, 1) SCORE(BITS, U, 4) SCORE(BITS, U, 8)

SCORES(4, 1)
SCORES(4, 4)
SCORES(8, 1)
SCORES(8, 4)
SCORES(32, 4)

// A float that is not NaN as a number of the same order; every zero as one number. None is 0.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

extern "C" __global__ void __launch_bounds__(256) rehearse_rank(Rehearse p) {
    extern __shared__ __align__(16) float shifts[];  // of the group: what is subtracted from a head's logits
    __shared__ u32 histogram[BINS];
    const Sequence s = p.sequences[blockIdx.z];
    const u32 begin = blockIdx.x * CHUNK, kv_head = blockIdx.y;
    if (begin >= s.to || begin + CHUNK <= s.from) return;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 row0 = begin + ROWS * threadIdx.x;
    const float *scores = s.scores + u64(kv_head * p.group) * s.stride + row0;
    float next[ROWS];  // on its way while the chunks are merged
    load_floats<ROWS>(scores, next);
    const u32 chunks = (s.rows + CHUNK - 1) / CHUNK;
    for (u32 g = warp; g < p.group; g += WARPS) {
        const float2 *stats = s.stats + u64(kv_head * p.group + g) * (s.stride / CHUNK);
        float m = -CUDART_INF_F, l = 0;
        for (u32 c = lane; c < chunks; c += WARP) m = fmaxf(m, stats[c].x);
        m = warp_max(m);
        for (u32 c = lane; c < chunks && m > -CUDART_INF_F; c += WARP) l += stats[c].y * expf(stats[c].x - m);
        l = warp_sum(l);
        if (lane == 0) shifts[g] = m == -CUDART_INF_F ? 0.0f : s.rule == PAPER ? m : m + logf(l);
    }
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) histogram[i] = 0;
    __syncthreads();

    float ranks[ROWS];
    u32 counted = 0;
#pragma unroll
    for (int i = 0; i < ROWS; i++) ranks[i] = -CUDART_INF_F;
    for (u32 g = 0; g < p.group; g++) {
        float logits[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) logits[i] = next[i];
        if (g + 1 < p.group) load_floats<ROWS>(scores + u64(g + 1) * s.stride, next);
        const float limit = shifts[g] - s.limit;
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            ranks[i] = fmaxf(ranks[i], logits[i] - shifts[g]);
            if (s.rule == PAPER && row0 + i >= s.from && row0 + i < s.to) counted += logits[i] > limit;
        }
    }
    u32 keys[ROWS];
#pragma unroll
    for (int i = 0; i < ROWS; i++) {
        const bool selectable = row0 + i >= s.from && row0 + i < s.to;
        keys[i] = selectable ? ordered(ranks[i]) : 0;
        if (selectable) atomicAdd(&histogram[keys[i] >> (32 - DIGIT)], 1);
        if (s.rule == PROBABILITY) counted += selectable && ranks[i] > -s.limit;
    }
    *reinterpret_cast<uint4 *>(s.keys + u64(kv_head) * s.stride + row0) = make_uint4(keys[0], keys[1], keys[2], keys[3]);
    counted = warp_sum(counted);
    if (lane == 0 && counted) atomicAdd(s.counted + kv_head, counted);
    __syncthreads();
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) {
        if (histogram[i]) atomicAdd(s.histograms + kv_head * BINS + i, histogram[i]);
    }
}

constexpr u32 SELECT = 1024;  // threads

// Sum of what the threads before this one have, and of what all have. Calls alternate between two `totals` of WARP words.
__device__ __forceinline__ u32 scan(u32 x, u32 *totals, u32 &total) {
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    u32 sum = x;
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const u32 before = __shfl_up_sync(FULL, sum, step);
        if (lane >= step) sum += before;
    }
    if (lane == WARP - 1) totals[warp] = sum;
    __syncthreads();
    u32 warps = totals[lane];
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
        const u32 before = __shfl_up_sync(FULL, warps, step);
        if (lane >= step) warps += before;
    }
    total = __shfl_sync(FULL, warps, WARP - 1);
    const u32 before = __shfl_sync(FULL, warps, (warp + WARP - 1) % WARP);
    return (warp ? before : 0) + sum - x;
}

// The four keys from row `row` on; zeros past the last row that may be selected.
__device__ __forceinline__ uint4 keys_at(const u32 *keys, u32 row, u32 to) {
    return row < to ? *reinterpret_cast<const uint4 *>(keys + row) : make_uint4(0, 0, 0, 0);
}

__device__ __forceinline__ u32 scramble(u32 x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// As `random_row` in src/backend/index.rs.
__device__ __forceinline__ u32 random_row(const Sequence &s, u32 head, u32 j, u32 count) {
    const u32 part = scramble(s.seed ^ scramble(head << 20 ^ j)), turn = (s.step + part % s.period) / s.period;
    u32 span = s.to - s.from;
    if (span >= max(2048u, count)) span = span / 1024 * 1024;
    span = max(span, count);
    const u32 begin = u32(u64(span) * j / count), end = u32(u64(span) * (j + 1) / count);
    return s.from + begin + scramble(part ^ scramble(turn)) % (end - begin);
}

// The rows that word `i` of a trace's table stands for, as far as they may be selected.
__device__ __forceinline__ void stretch(const Sequence &s, const Replay &replay, u32 i, u32 end, u32 &low, u32 &high) {
    low = high = s.from;
    if (i >= end) return;
    const u32 row = replay.table[i], k = row - replay.first;
    if (row < replay.first) return;
    const bool old = k < replay.narrow;
    low = old ? replay.first + u32(u64(k) * replay.wide / replay.narrow) : row + replay.shift;
    high = old ? replay.first + u32(u64(k + 1) * replay.wide / replay.narrow) : low + 1;
    low = max(low, s.from);
    high = max(low, min(high, s.to));
}

extern "C" __global__ void __launch_bounds__(1024) rehearse_select(Rehearse p) {
    __shared__ u32 histogram[BINS], totals[2][WARP], found[2];
    const Sequence s = p.sequences[blockIdx.z];
    const u32 kv_head = blockIdx.x, tid = threadIdx.x;
    u32 *out = s.out_rows + u64(kv_head) * s.capacity;
    const u32 *keys = s.keys + u64(kv_head) * s.stride;
    u32 count = s.rule == PROBABILITY ? s.counted[kv_head] : 0, turn = 0;
    Replay replay = {};
    u32 list_begin = 0, list_end = 0;
    if (s.rule == REPLAY) {
        replay = *s.replay;
        const u32 *ends = replay.lists + 2 * (kv_head * replay.heads / p.kv_heads);
        list_begin = ends[0];
        list_end = ends[1];
        for (u32 i = list_begin; i < list_end; i += SELECT) {
            u32 low, high, total;
            stretch(s, replay, i + tid, list_end, low, high);
            scan(high - low, totals[turn++ % 2], total);
            count += total;
        }
    }
    if (s.rule == PAPER) {
        // The mean of all query heads, rounded.
        const u64 heads = p.kv_heads * p.group;
        u64 sum = 0;
        for (u32 head = 0; head < p.kv_heads; head++) sum += s.counted[head];
        count = u32((2 * sum + heads) / (2 * heads));
    }
    count = min(min(max(count, s.least), s.most), min(s.to - s.from, s.capacity));
    if (tid == 0) s.out_counts[kv_head] = count;
    if (count == 0) return;

    // The key of the count-th best row, digit by digit. `above` rows have larger keys than those that begin with `prefix`.
    u32 prefix = 0, above = 0;
    const u32 begin = s.from / ROWS * ROWS;
#pragma unroll 1
    for (int shift = 32 - int(DIGIT);; shift -= DIGIT) {
        const u32 digit = shift < 0 ? DIGIT + shift : DIGIT, low = max(shift, 0);
        if (shift == 32 - int(DIGIT)) {
            for (u32 i = tid; i < BINS; i += SELECT) histogram[i] = s.histograms[kv_head * BINS + i];
        } else {
            for (u32 i = tid; i < BINS; i += SELECT) histogram[i] = 0;
            __syncthreads();
            constexpr u32 AHEAD = 4;  // loads in flight
            for (u32 row0 = begin + ROWS * tid; row0 < s.to; row0 += AHEAD * ROWS * SELECT) {
                uint4 fours[AHEAD];
#pragma unroll
                for (u32 u = 0; u < AHEAD; u++) fours[u] = keys_at(keys, row0 + u * ROWS * SELECT, s.to);
#pragma unroll
                for (u32 u = 0; u < AHEAD; u++) {
                    const u32 row = row0 + u * ROWS * SELECT;
                    const u32 all[ROWS] = {fours[u].x, fours[u].y, fours[u].z, fours[u].w};
#pragma unroll
                    for (u32 i = 0; i < ROWS; i++) {
                        const bool selectable = row + i >= s.from && row + i < s.to;
                        if (selectable && all[i] >> (low + digit) == prefix) {
                            atomicAdd(&histogram[all[i] >> low & ((1u << digit) - 1)], 1);
                        }
                    }
                }
            }
        }
        __syncthreads();
        // Each thread has two bins, the first thread the highest.
        const u32 high = BINS - 1 - 2 * tid, first = histogram[high], second = histogram[high - 1];
        u32 total;
        const u32 before = above + scan(first + second, totals[turn++ % 2], total);
        if (before < count && before + first + second >= count) {
            const bool in_first = before + first >= count;
            found[0] = in_first ? high : high - 1;
            found[1] = in_first ? before : before + first;
        }
        __syncthreads();
        prefix = prefix << digit | found[0];
        above = found[1];
        if (shift <= 0) break;
    }

    const u32 equal = count - above;  // rows of the threshold's key that are taken
    u32 larger_before = 0, equal_before = 0;
    uint4 next = keys_at(keys, begin + ROWS * tid, s.to);
#pragma unroll 1
    for (u32 tile = begin; tile < s.to; tile += ROWS * SELECT) {
        const u32 row = tile + ROWS * tid;
        const u32 all[ROWS] = {next.x, next.y, next.z, next.w};
        next = keys_at(keys, row + ROWS * SELECT, s.to);
        // Two counts in one word: at most 4096 each.
        u32 here = 0;
        bool selectable[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            selectable[i] = row + i >= s.from && row + i < s.to;
            if (selectable[i]) here += u32(all[i] > prefix) + (u32(all[i] == prefix) << 16);
        }
        u32 total;
        const u32 before = scan(here, totals[turn++ % 2], total);
        u32 larger = larger_before + (before & 0xffff), equals = equal_before + (before >> 16);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const bool is_larger = selectable[i] && all[i] > prefix, is_equal = selectable[i] && all[i] == prefix;
            if (is_larger || (is_equal && equals < equal)) out[larger + min(equals, equal)] = row + i;
            larger += is_larger;
            equals += is_equal;
        }
        larger_before += total & 0xffff;
        equal_before += total >> 16;
        if (larger_before + min(equal_before, equal) >= count) break;
    }
    if (s.rule == RANDOM) {
        __syncthreads();  // what was selected has been written
        for (u32 j = tid; j < count; j += SELECT) out[j] = random_row(s, kv_head, j, count);
    }
    if (s.rule == REPLAY) {
        __syncthreads();
        u32 before = 0;
        for (u32 i = list_begin; i < list_end && before < count; i += SELECT) {
            u32 low, high, total;
            stretch(s, replay, i + tid, list_end, low, high);
            u32 at = before + scan(high - low, totals[turn++ % 2], total);
            for (u32 row = low; row < high && at < count; row++) out[at++] = row;
            before += total;
        }
    }
}
