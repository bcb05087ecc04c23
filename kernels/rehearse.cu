// A rehearsal of attention on the speculation index, and the rows that it selects: four launches.
//
// 1. rehearse_score: logits of every row for every query head, from whole numbers, and of each chunk of rows the largest
//    logit m and the sum of exp(logit − m). Each row of the index is read once for up to eight query heads.
// 2. rehearse_rank: what normalises each head, from all its chunks; each row's rank, the largest log-probability of a
//    head of the group, as a number whose order is that of the ranks; how many rows are how far from the best one. Where the
//    tail is wanted (tail.cu), of each chunk and head also the probability of what is attended anyhow.
// 3. rehearse_mark: from these counts it is known which rows are among the k best, but for a few that are as far from the best
//    one as the k-th is: a bit a row says so, and another one that a row is one of the few.
// 4. rehearse_select: a block a KV head takes the best of the few, of equals the first ones, and writes rows in ascending order.
//
// grids: spans × (KV heads × passes, or KV heads) × sequences; of the last, KV heads × sequences. A block takes a span of a
// sequence's chunks, one after the other: no more blocks than multiprocessors, and no larger than beside one of a product, for
// the device has a step to compute meanwhile, whose small kernels would wait for many blocks that all end together. Everything that
// changes from step to step is in the table of sequences. A sequence's results depend on nothing but its own data.
#include <math_constants.h>

#include "order.cuh"
#include "tail.cuh"

struct Sequence {
    const u64 *extents;
    float *scores;     // query heads × stride
    u32 *keys;         // KV heads × stride: ranks as numbers
    u32 *better;       // KV heads × (stride / 32): a bit a row that is surely among the best
    u32 *level;        // as many: of rows that may be
    u32 *histograms;   // KV heads × BINS: rows by distance from the best, the farthest first
    struct State *states;  // KV heads
    float2 *stats;     // query heads × (stride / CHUNK): m and the sum
    float *attended_sums;  // as many: the probability of rows that are attended
    float *shifts;     // query heads, for the tail: what makes a logit a logarithm of a probability
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
    Attended attended;  // slots null: the tail is not wanted
};

// What is known of a KV head, from launch to launch.
struct State {
    u32 counted;  // rows that the rule's limit lets pass, of all query heads of the group where it is PAPER
    u32 count;    // rows that are selected
    u32 better;   // those among them that are nearer to the best row than the last one is
    float top;    // the best rank
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
constexpr u32 BINS = 2048;
constexpr u32 TOGETHER = 4;  // query heads whose logits are on their way together

// The chunks of a block, of those that have any of the rows from..to.
struct Span {
    u32 begin, end;

    __device__ __forceinline__ Span(u32 from, u32 to) {
        const u32 first = from / CHUNK, chunks = to > from ? (to + CHUNK - 1) / CHUNK - first : 0;
        begin = first + u64(chunks) * blockIdx.x / gridDim.x;
        end = first + u64(chunks) * (blockIdx.x + 1) / gridDim.x;
    }
};

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
    __shared__ float2 parts[2][WARPS][G];  // of chunks in turn
    typedef typename Sum<BITS>::type S;
    const Sequence s = p.sequences[blockIdx.z];
    const u32 kv_head = blockIdx.y / p.passes, pass = blockIdx.y % p.passes;
    if (blockIdx.x == 0 && pass == 0) {
        // For the launches behind this one.
        for (u32 i = threadIdx.x; i < BINS; i += THREADS) s.histograms[kv_head * BINS + i] = 0;
        if (threadIdx.x == 0) s.states[kv_head].counted = 0;
    }
    const Span span(0, s.rows);
    if (span.begin >= span.end) return;
    const u32 heads = min(u32(G), p.group - pass * G), head0 = kv_head * p.group + pass * G;
    const u32 query_words = p.words * PER_WORD<BITS>, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    // Of each row of a chunk its tile, and its place there; past the end, the last row is read again.
    const u32 *rows[ROWS];
    float scales[ROWS];
    u32 words[ROWS][U];
    auto load_rows = [&](u32 unit) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) load_words<U>(rows[i] + unit * TILE * U, words[i]);
    };
    auto begin_chunk = [&](u32 chunk) {
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const u32 row = min(chunk * CHUNK + i * THREADS + threadIdx.x, s.rows - 1);
            const u32 token = row % p.extent_tokens;
            const u64 run = s.extents[row / p.extent_tokens] + p.layer_offset + kv_head * p.run_bytes;
            const u32 *start = reinterpret_cast<const u32 *>(run);
            rows[i] = start + u64(token / TILE) * TILE * p.words + token % TILE * U;
            scales[i] = BITS == 32 ? 1.0f : __uint_as_float(start[u64(p.extent_tokens) * p.words + token]);
        }
        load_rows(0);
    };
    begin_chunk(span.begin);  // on their way while the queries are prepared

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

#pragma unroll 1
    for (u32 chunk = span.begin; chunk < span.end; chunk++) {
        S sums[ROWS][G];
#pragma unroll
        for (int g = 0; g < G; g++) {
#pragma unroll
            for (int i = 0; i < ROWS; i++) sums[i][g] = S(-offsets[g]);
        }
#pragma unroll 1
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
        float own_scales[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) own_scales[i] = scales[i];
        if (chunk + 1 < span.end) begin_chunk(chunk + 1);

        float2(&of_warps)[WARPS][G] = parts[chunk % 2];
#pragma unroll
        for (int g = 0; g < G; g++) {
            float scores[ROWS], m = -CUDART_INF_F, l = 0;
#pragma unroll
            for (int i = 0; i < ROWS; i++) {
                const u32 row = chunk * CHUNK + i * THREADS + threadIdx.x;
                // NaN becomes −∞: it ranks below all others.
                const float logit = __fmul_rn(__fmul_rn(float(sums[i][g]), own_scales[i]), factors[g]);
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
            if (lane == 0) of_warps[warp][g] = make_float2(m, l);
        }
        __syncthreads();
        if (threadIdx.x < heads) {
            float m = -CUDART_INF_F, l = 0;
            for (u32 w = 0; w < WARPS; w++) m = fmaxf(m, of_warps[w][threadIdx.x].x);
            for (u32 w = 0; w < WARPS && m > -CUDART_INF_F; w++) {
                l += of_warps[w][threadIdx.x].y * expf(of_warps[w][threadIdx.x].x - m);
            }
            s.stats[u64(head0 + threadIdx.x) * (s.stride / CHUNK) + chunk] = make_float2(m, l);
        }
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

// And back.
__device__ __forceinline__ float rank_of(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The bin of a row by its distance from the best one, the nearest last. What is farther apart lies in wider bins, a sixty-fourth
// as wide as it is far: so few rows share one, however the ranks are spread. A larger rank never has a lower bin.
__device__ __forceinline__ u32 bin_of(float top, float rank) {
    constexpr u32 STEPS = 64, FIRST = 127 - 16;  // of a doubling; the exponent of 2^-16
    static_assert(BINS == 32 * STEPS, "up to 2^16");
    const float distance = top - rank;
    if (distance < 1.0f / 65536) return BINS - 1;
    const u32 at = __float_as_uint(distance) / (0x800000u / STEPS) - FIRST * STEPS;  // infinity, NaN: beyond
    return BINS - 1 - min(at, BINS - 1);
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

// Where a KV head's words of the table begin and end.
__device__ __forceinline__ uint2 replayed(const Rehearse &p, const Replay &replay, u32 kv_head) {
    const u32 *ends = replay.lists + 2 * (kv_head * replay.heads / p.kv_heads);
    return make_uint2(ends[0], ends[1]);
}

extern "C" __global__ void __launch_bounds__(256) rehearse_rank(Rehearse p) {
    // Of the group: what is subtracted from a head's logits, and its best rank; then, of each warp, what is attended of chunks in
    // turn.
    extern __shared__ __align__(16) float shared[];
    __shared__ u32 histogram[BINS];
    const Sequence &s = p.sequences[blockIdx.z];
    const u32 kv_head = blockIdx.y, from = s.from, to = s.to, rows = s.rows, rule = s.rule, stride = s.stride;
    const bool weighs = s.attended.slots;
    const Span span = weighs ? Span(0, rows) : Span(from, to);
    if (span.begin >= span.end) return;
    float *shifts = shared, *tops = shifts + p.group, *sums = tops + p.group;
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 chunks = (rows + CHUNK - 1) / CHUNK;
    for (u32 g = warp; g < p.group; g += WARPS) {
        const float2 *stats = s.stats + u64(kv_head * p.group + g) * (stride / CHUNK);
        float m = -CUDART_INF_F, l = 0;
        for (u32 c = lane; c < chunks; c += WARP) m = fmaxf(m, stats[c].x);
        m = warp_max(m);
        for (u32 c = lane; c < chunks && m > -CUDART_INF_F; c += WARP) l += stats[c].y * expf(stats[c].x - m);
        l = warp_sum(l);
        const float shift = m == -CUDART_INF_F ? 0.0f : rule == PAPER ? m : m + logf(l);
        if (lane == 0) {
            shifts[g] = shift;
            tops[g] = m - shift;
            // (By one block.)
            if (weighs && span.begin == 0) s.shifts[kv_head * p.group + g] = m == -CUDART_INF_F ? m : shift;
        }
    }
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) histogram[i] = 0;
    __syncthreads();
    float top = -CUDART_INF_F;
    for (u32 g = 0; g < p.group; g++) top = fmaxf(top, tops[g]);

    u32 counted = 0;
    if (span.begin <= from / CHUNK && from / CHUNK < span.end && from < to) {  // one block does
        if (threadIdx.x == 0) s.states[kv_head].top = top;
        if (rule == REPLAY) {
            const Replay replay = *s.replay;
            const uint2 list = replayed(p, replay, kv_head);
            for (u32 i = list.x + threadIdx.x; i < list.y; i += THREADS) {
                u32 low, high;
                stretch(s, replay, i, list.y, low, high);
                counted += high - low;
            }
        }
    }
#pragma unroll 1
    for (u32 chunk = span.begin; chunk < span.end; chunk++) {
        const u32 row0 = chunk * CHUNK + ROWS * threadIdx.x;
        const float *scores = s.scores + u64(kv_head * p.group) * stride + row0;
        float *of_warps = sums + chunk % 2 * WARPS * p.group;
        bool attended[ROWS] = {};
        if (weighs) {
            const AttendedRows attends(s.attended, kv_head);
#pragma unroll
            for (int i = 0; i < ROWS; i++) attended[i] = row0 + i < rows && attends.has(row0 + i);
        }
        float ranks[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) ranks[i] = -CUDART_INF_F;
#pragma unroll 1
        for (u32 g0 = 0; g0 < p.group; g0 += TOGETHER) {
            float logits[TOGETHER][ROWS];
#pragma unroll
            for (u32 k = 0; k < TOGETHER; k++) {
                load_floats<ROWS>(scores + u64(min(g0 + k, p.group - 1)) * stride, logits[k]);
            }
#pragma unroll
            for (u32 k = 0; k < TOGETHER; k++) {
                const u32 g = g0 + k;
                if (g >= p.group) break;
                const float shift = shifts[g], limit = shift - s.limit;
                float here = 0;
#pragma unroll
                for (int i = 0; i < ROWS; i++) {
                    ranks[i] = fmaxf(ranks[i], logits[k][i] - shift);
                    if (rule == PAPER && row0 + i >= from && row0 + i < to) counted += logits[k][i] > limit;
                    if (attended[i]) here += expf(logits[k][i] - shift);
                }
                if (weighs) {
                    here = warp_sum(here);
                    if (lane == 0) of_warps[warp * p.group + g] = here;
                }
            }
        }
        u32 keys[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
            const bool selectable = row0 + i >= from && row0 + i < to;
            keys[i] = ordered(ranks[i]);
            if (selectable) atomicAdd(&histogram[bin_of(top, rank_of(keys[i]))], 1);
            if (rule == PROBABILITY) counted += selectable && ranks[i] > -s.limit;
        }
        *reinterpret_cast<uint4 *>(s.keys + u64(kv_head) * stride + row0) =
            make_uint4(keys[0], keys[1], keys[2], keys[3]);
        if (!weighs) continue;
        __syncthreads();
        for (u32 g = threadIdx.x; g < p.group; g += THREADS) {
            float all = 0;
            for (u32 w = 0; w < WARPS; w++) all += of_warps[w * p.group + g];
            s.attended_sums[u64(kv_head * p.group + g) * (stride / CHUNK) + chunk] = all;
        }
    }
    counted = warp_sum(counted);
    if (lane == 0 && counted) atomicAdd(&s.states[kv_head].counted, counted);
    __syncthreads();
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) {
        if (histogram[i]) atomicAdd(s.histograms + kv_head * BINS + i, histogram[i]);
    }
}

// How many rows of a KV head are selected.
__device__ __forceinline__ u32 wanted(const Rehearse &p, const Sequence &s, u32 kv_head) {
    u32 count = s.rule == PROBABILITY || s.rule == REPLAY ? s.states[kv_head].counted : 0;
    if (s.rule == PAPER) {
        // The mean of all query heads, rounded.
        const u64 heads = p.kv_heads * p.group;
        u64 sum = 0;
        for (u32 head = 0; head < p.kv_heads; head++) sum += s.states[head].counted;
        count = u32((2 * sum + heads) / (2 * heads));
    }
    return min(min(max(count, s.least), s.most), min(s.to - s.from, s.capacity));
}

extern "C" __global__ void __launch_bounds__(256) rehearse_mark(Rehearse p) {
    __shared__ u32 totals[WARPS], found[2];
    const Sequence &s = p.sequences[blockIdx.z];
    const u32 kv_head = blockIdx.y, from = s.from, to = s.to;
    const Span span(from, to);
    if (span.begin >= span.end) return;
    const u32 *keys = s.keys + u64(kv_head) * s.stride + threadIdx.x;
    u32 own[ROWS];
    auto load_chunk = [&](u32 chunk) {
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) own[i] = keys[chunk * CHUNK + i * THREADS];
    };
    load_chunk(span.begin);  // on their way
    const u32 count = wanted(p, s, kv_head);
    const float top = s.states[kv_head].top;

    // The bin of the count-th best row. Each thread has a few bins, the first thread the best.
    constexpr u32 OWN = BINS / THREADS;
    const u32 high = BINS - OWN * threadIdx.x;
    u32 bins[OWN], sum = 0, total;
    load_words<OWN>(s.histograms + kv_head * BINS + high - OWN, bins);
#pragma unroll
    for (u32 i = 0; i < OWN; i++) sum += bins[i];
    u32 before = scan<WARPS>(sum, totals, total);
    if (before < count && before + sum >= count) {
#pragma unroll
        for (u32 i = OWN; i-- > 0;) {
            if (before < count && before + bins[i] >= count) {
                found[0] = high - OWN + i;
                found[1] = before;
            }
            before += bins[i];
        }
    }
    if (threadIdx.x == 0 && count == 0) found[0] = BINS;
    __syncthreads();
    if (threadIdx.x == 0 && span.begin == from / CHUNK) {
        s.states[kv_head].count = count;
        s.states[kv_head].better = found[1];
    }
    const u32 bin_of_last = found[0];
    u32 *better = s.better + (u64(kv_head) * s.stride + threadIdx.x) / WARP;
    u32 *level = s.level + (u64(kv_head) * s.stride + threadIdx.x) / WARP;
#pragma unroll 1
    for (u32 chunk = span.begin; chunk < span.end; chunk++) {
        u32 bin[ROWS];
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) bin[i] = bin_of(top, rank_of(own[i]));
        if (chunk + 1 < span.end) load_chunk(chunk + 1);
#pragma unroll
        for (u32 i = 0; i < ROWS; i++) {
            const u32 row = chunk * CHUNK + i * THREADS + threadIdx.x;
            const bool selectable = row >= from && row < to;
            const u32 are_better = __ballot_sync(FULL, selectable && bin[i] > bin_of_last);
            const u32 are_level = __ballot_sync(FULL, selectable && bin[i] == bin_of_last);
            if (threadIdx.x % WARP == 0) {
                better[(chunk * CHUNK + i * THREADS) / WARP] = are_better;
                level[(chunk * CHUNK + i * THREADS) / WARP] = are_level;
            }
        }
    }
}

constexpr u32 SELECT = 512, SELECT_WARPS = SELECT / WARP;  // threads

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

constexpr u32 WORDS = 4;  // of 32 rows each, that a thread has at a time

extern "C" __global__ void __launch_bounds__(512, 3) rehearse_select(Rehearse p) {
    __shared__ u32 histogram[256], scratch[SELECT_WARPS + 2];
    const Sequence s = p.sequences[blockIdx.z];
    const u32 kv_head = blockIdx.x, tid = threadIdx.x;
    u32 *out = s.out_rows + u64(kv_head) * s.capacity;
    const u32 *keys = s.keys + u64(kv_head) * s.stride;
    const State state = s.states[kv_head];
    const u32 count = s.from < s.to ? state.count : 0;  // else nobody has counted
    if (tid == 0) s.out_counts[kv_head] = count;
    if (count == 0) return;
    const u32 *better = s.better + u64(kv_head) * s.stride / WARP, *level = s.level + u64(kv_head) * s.stride / WARP;
    const u32 first = s.from / CHUNK * (CHUNK / WARP), end = (s.to + CHUNK - 1) / CHUNK * (CHUNK / WARP);

    const Kth kth = kth_largest<SELECT_WARPS>(count, state.better, 24, false, histogram, scratch, [&](auto visit) {
        for (u32 w = first + WORDS * tid; w < end; w += WORDS * SELECT) {
            u32 words[WORDS];
            load_words<WORDS>(level + w, words);
#pragma unroll
            for (u32 i = 0; i < WORDS; i++) {
                for (u32 bits = words[i]; bits; bits &= bits - 1) visit(keys[(w + i) * WARP + __ffs(bits) - 1]);
            }
        }
    });

    u32 written = 0, equal_before = 0;
#pragma unroll 1
    for (u32 tile = first; tile < end; tile += WORDS * SELECT) {
        const u32 w = tile + WORDS * tid;
        u32 taken[WORDS] = {}, same[WORDS] = {}, equals = 0, here = 0, total;
        if (w < end) {
            load_words<WORDS>(better + w, taken);
            load_words<WORDS>(level + w, same);
        }
#pragma unroll
        for (u32 i = 0; i < WORDS; i++) {
            for (u32 bits = same[i]; bits; bits &= bits - 1) {
                const u32 bit = bits & -bits, key = keys[(w + i) * WARP + __ffs(bits) - 1];
                if (!kth.is_equal(key)) same[i] ^= bit;
                if (kth.is_larger(key)) taken[i] |= bit;
            }
            equals += __popc(same[i]);
        }
        // Of equals the first ones.
        const u32 before = equal_before + scan<SELECT_WARPS>(equals, scratch, total);
        u32 left = kth.equal > before ? kth.equal - before : 0;
        equal_before += total;
#pragma unroll
        for (u32 i = 0; i < WORDS; i++) {
            for (; same[i] && left > 0; left--) {
                taken[i] |= same[i] & -same[i];
                same[i] &= same[i] - 1;
            }
            here += __popc(taken[i]);
        }
        u32 at = written + scan<SELECT_WARPS>(here, scratch, total);
        written += total;
#pragma unroll
        for (u32 i = 0; i < WORDS; i++) {
            for (u32 bits = taken[i]; bits; bits &= bits - 1) out[at++] = (w + i) * WARP + __ffs(bits) - 1;
        }
    }
    if (s.rule == RANDOM) {
        __syncthreads();  // what was selected has been written
        for (u32 j = tid; j < count; j += SELECT) out[j] = random_row(s, kv_head, j, count);
    }
    if (s.rule == REPLAY) {
        __syncthreads();
        const Replay replay = *s.replay;
        const uint2 list = replayed(p, replay, kv_head);
        u32 before = 0;
        for (u32 i = list.x; i < list.y && before < count; i += SELECT) {
            u32 low, high, total;
            stretch(s, replay, i + tid, list.y, low, high);
            u32 at = before + scan<SELECT_WARPS>(high - low, scratch, total);
            for (u32 row = low; row < high && at < count; row++) out[at++] = row;
            before += total;
        }
    }
}
