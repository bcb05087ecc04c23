// The hot cache's tables where the device keeps them: lookup of what a rehearsal selected, victims, and new tokens.
// (Where what lies is in src/backend/slots.rs, and a plain version of the same in src/backend/cpu/slots.rs.)
//
// A block a KV head and sequence. Misses, victims and journal have one order whatever the threads do: rows ascending,
// slots ascending.
#include "evict.cuh"

constexpr u32 NONE = 0xffffffffu;

enum Header : u32 { STEP = 0, CHANGES = 1, SELECTED = 2, MISSED = 3, ALL_SELECTED = 4, ALL_MISSED = 6, ALL_ATTENDED = 8,
                    ATTENDED = 10, CORRECTED = 11, ALL_CORRECTED = 12, NEXT = 14, HEADER = 15 };
constexpr u32 COUNT = 4, CHANGE = 3;

// One sequence's tables of a layer. Addresses are those of the first KV head; strides are words from head to head.
struct Tables {
    u32 *counts;   // COUNT words a head, the third of which counts
    u32 *headers;  // HEADER words a head
    u32 *used;     // `stride` words a head; behind them rows, slots of rows, journal
    u32 *selected_counts;  // of what is selected, or what a correction adds; and of its moves
    u32 *selected;
    u32 *move_counts;
    u32 *moves;
    uint4 *attended_lists;  // or null: where a KV head's attended slots are listed, how many they are, zero
    u32 *attended;          // the slots themselves
    u64 stride;
    u32 slots;     // room in a table
    u32 rows;
    u32 most;      // room for selected rows, or those that a correction adds
    u32 limit;     // slots that may be used
    u32 below;     // guarded tokens: below this, and from that on
    u32 from;
    u32 step;
    u32 row;       // of a new token
    u32 most_attended;  // room for listed slots
    u32 corrects;       // whether what is selected joins what this step has selected before
    Pool pool;
};

struct Table {
    u32 &count;
    u32 *header;
    u32 *used, *rows, *slots, *journal;

    __device__ Table(const Tables &t, u32 head)
        : count(t.counts[COUNT * head + 2]), header(t.headers + HEADER * head), used(t.used + head * t.stride),
          rows(used + t.slots), slots(rows + t.slots), journal(slots + t.rows) {}

    __device__ void change(u32 i, u32 slot, u32 row, u32 last) {
        u32 *to = journal + CHANGE * i;
        to[0] = slot;
        to[1] = row;
        to[2] = last;
    }

    // Adds to a number of two words.
    __device__ void add(u32 which, u32 more) {
        const u64 sum = (u64(header[which + 1]) << 32 | header[which]) + more;
        header[which] = u32(sum);
        header[which + 1] = u32(sum >> 32);
    }

    // The first call of a step begins its counts. By one thread.
    __device__ void begin(u32 step) {
        if (header[STEP] == step) return;
        header[STEP] = step;
        header[CHANGES] = header[SELECTED] = header[MISSED] = header[ATTENDED] = header[CORRECTED] = 0;
        header[NEXT] = NONE;
    }
};

// Whether a slot may be given away in this step.
__device__ __forceinline__ bool gives_way(const Tables &t, const Held &held, u32 used, u32 row) {
    const u32 token = held.token(row);
    return used < t.step && token >= t.below && token < t.from;
}

constexpr u32 MANY = 4;  // items of a thread whose data are on their way together

// For how many steps each of this thread's slots from `first` on has not been used; 0 where it does not give way.
__device__ __forceinline__ void
ages(const Tables &t, const Table &table, const Held &pool, u32 first, u32 held, u32 (&age)[MANY]) {
    u32 used[MANY], rows[MANY];
#pragma unroll
    for (u32 i = 0; i < MANY; i++) {
        const u32 slot = min(first + item<MANY>(i), held - 1);
        used[i] = table.used[slot];
        rows[i] = table.rows[slot];
    }
#pragma unroll
    for (u32 i = 0; i < MANY; i++) {
        const bool may = first + item<MANY>(i) < held && gives_way(t, pool, used[i], rows[i]);
        age[i] = may ? t.step - used[i] : 0;
    }
}

// What a rehearsal by a layer's own queries has found for one sequence (rehearse.cu).
struct Correct {
    Tables tables;      // with the lists of corrections
    const u32 *keys;    // KV heads × stride: ranks of rows, as numbers
    const u32 *counts;  // KV heads: rows that it has picked
    u32 *picked;        // KV heads × capacity: those rows, ascending
    u32 stride;
    u32 capacity;
    u32 most;           // that may join
    u32 room;           // that the step may select, together with these
};

struct Corrects {
    const Correct *sequences;
};

// grid: KV heads × sequences. Of the rows that were picked, leaves out those that the step attends already; the best of the
// others become what is selected, ascending.
extern "C" __global__ void __launch_bounds__(512) slots_correct(Corrects p) {
    __shared__ u32 scratch[WARPS + 2], histogram[256];
    const Correct &c = p.sequences[blockIdx.y];
    const Tables t = c.tables;
    const u32 head = blockIdx.x, tid = threadIdx.x;
    const Table table(t, head);
    const Held pool(t.pool, head);
    const u32 *keys = c.keys + u64(head) * c.stride;
    u32 *rows = c.picked + u64(head) * c.capacity, *out = t.selected + u64(head) * t.most;
    const u32 picked = min(c.counts[head], c.capacity);
    const u32 before = table.header[STEP] == t.step ? table.header[SELECTED] : 0;

    u32 absent = 0;
    for (u32 first = 0; first < picked; first += THREADS) {
        const u32 row = first + tid < picked ? rows[first + tid] : 0, slot = table.slots[row];
        bool present = slot != NONE;
        if (t.attended_lists && present) {
            const u32 token = pool.token(row);
            present = token < t.below || token >= t.from || table.used[slot] == t.step;
        }
        const bool stays = first + tid < picked && !present;
        u32 total;
        const u32 at = absent + scan<WARPS>(stays, scratch, total);  // everyone has read
        if (stays) rows[at] = row;
        absent += total;
    }
    __syncthreads();
    const u32 count = min(min(min(c.most, c.room > before ? c.room - before : 0), t.most), absent);
    if (tid == 0) t.selected_counts[head] = count;
    if (count == 0) return;

    const Kth kth = kth_largest<WARPS>(count, 0, 24, false, histogram, scratch, [&](auto visit) {
        for (u32 i = tid; i < absent; i += THREADS) visit(keys[rows[i]]);
    });
    // Rows with larger keys, and of those that equal the last one the first ones.
    u32 larger_before = 0, equal_before = 0;
    for (u32 first = 0; first < absent; first += THREADS) {
        const u32 row = first + tid < absent ? rows[first + tid] : 0, key = keys[row];
        const bool there = first + tid < absent, larger = there && kth.is_larger(key);
        const bool same = there && kth.is_equal(key);
        u32 both;
        const u32 earlier = scan<WARPS>(u32(larger) | u32(same) << 16, scratch, both);
        const u32 equals = equal_before + (earlier >> 16);
        if (larger || (same && equals < kth.equal)) {
            out[larger_before + (earlier & 0xffff) + min(equals, kth.equal)] = row;
        }
        larger_before += both & 0xffff;
        equal_before += both >> 16;
    }
}

struct Request {
    const Tables *sequences;
};

// grid: KV heads × sequences. Also finds the slot that a new token will take, for there is more time here. (Registers are few
// enough for a block beside one of a product.)
extern "C" __global__ void __launch_bounds__(512, 3) slots_request(Request p) {
    __shared__ u32 scratch[WARPS + 2], histogram[256], changes;
    const Tables t = p.sequences[blockIdx.y];
    const u32 head = blockIdx.x, tid = threadIdx.x;
    Table table(t, head);
    const Held pool(t.pool, head);
    if (tid == 0) {
        table.begin(t.step);
        table.header[NEXT] = NONE;
        changes = t.corrects ? table.header[CHANGES] : 0;
    }
    __syncthreads();
    const u32 changed = changes;  // before
    u32 count = min(t.selected_counts[head], t.most);
    u32 *selected = t.selected + head * t.most;
    if (t.pool.tables) {
        count = use_selected(t.pool, pool, t.below, t.from, selected, count, t.corrects, scratch);
        if (tid == 0) t.selected_counts[head] = count;
    }
    u32 *moves = t.moves + 2 * head * t.most;

    // Hits are marked; misses move up: their row, and for now their place among the selected.
    u32 missed = 0;
    for (u32 first = 0; first < count; first += THREADS * MANY) {
        u32 rows[MANY], slots[MANY], used[MANY], at[MANY];
        bool miss[MANY];
#pragma unroll
        for (u32 i = 0; i < MANY; i++) rows[i] = selected[min(first + item<MANY>(i), count - 1)];
#pragma unroll
        for (u32 i = 0; i < MANY; i++) slots[i] = table.slots[rows[i]];
#pragma unroll
        for (u32 i = 0; i < MANY; i++) {
            miss[i] = first + item<MANY>(i) < count && slots[i] == NONE;
            used[i] = slots[i] == NONE ? 0 : table.used[slots[i]];
        }
        const u32 total = places<WARPS>(miss, scratch, at);  // everyone has read
#pragma unroll
        for (u32 i = 0; i < MANY; i++) {
            const u32 which = first + item<MANY>(i);
            if (miss[i]) {
                moves[2 * (missed + at[i])] = rows[i];
                moves[2 * (missed + at[i]) + 1] = which;
            } else if (which < count) {
                table.change(changed + which, slots[i], rows[i], used[i]);
                table.used[slots[i]] = t.step;
            }
        }
        missed += total;
    }
    __syncthreads();

    const u32 held = table.count, room = t.limit > held ? t.limit - held : 0;
    const u32 pushed = min(missed, room), wanted = missed - pushed;
    const bool full = held + pushed >= t.limit;
    if (full && held > 0) {
        // The age of the oldest slots that may give way, and of one more.
        const int digits = max(0, (31 - __clz(t.step)) / 8 * 8);
        const Kth kth = kth_largest<WARPS>(wanted + 1, 0, digits, true, histogram, scratch, [&](auto visit) {
            for (u32 first = 0; first < held; first += THREADS * MANY) {
                u32 age[MANY];
                ages(t, table, pool, first, held, age);
#pragma unroll
                for (u32 i = 0; i < MANY; i++) {
                    if (age[i]) visit(age[i]);
                }
            }
        });
        // The older ones, and of those of that age the first ones, in their order. (Where no slot gives way there is no such age.)
        const bool spare = kth.above + kth.equal == wanted + 1;
        const u32 last = kth.equal - spare;
        u32 olds = 0, equals = 0;
        for (u32 first = 0; first < held && kth.equal > 0; first += THREADS * MANY) {
            u32 age[MANY], old_before[MANY], equal_before[MANY];
            bool old[MANY], same[MANY];
            ages(t, table, pool, first, held, age);
#pragma unroll
            for (u32 i = 0; i < MANY; i++) {
                old[i] = age[i] && kth.is_larger(age[i]);
                same[i] = age[i] && kth.is_equal(age[i]);
            }
            const u32 all_old = places<WARPS>(old, scratch, old_before);
            const u32 all_same = places<WARPS>(same, scratch, equal_before);
#pragma unroll
            for (u32 i = 0; i < MANY; i++) {
                const u32 slot = first + item<MANY>(i), equal = equals + equal_before[i];
                if (same[i] && spare && equal == last) table.header[NEXT] = slot;
                if (!old[i] && !(same[i] && equal < last)) continue;
                u32 *move = moves + 2 * (pushed + olds + old_before[i] + min(equal, last));
                const u32 which = move[1], row = move[0], gone = table.rows[slot];
                table.change(changed + which, slot, gone, t.step - age[i]);
                table.slots[gone] = NONE;
                table.rows[slot] = row;
                table.used[slot] = t.step;
                table.slots[row] = slot;
                move[1] = slot;
            }
            olds += all_old;
            equals += all_same;
            if (olds == kth.above && equals >= kth.equal) break;
        }
    }
    for (u32 m = tid; m < pushed; m += THREADS) {
        const u32 slot = held + m, i = moves[2 * m + 1], row = moves[2 * m];
        table.change(changed + i, slot, NONE, 0);
        table.rows[slot] = row;
        table.used[slot] = t.step;
        table.slots[row] = slot;
        moves[2 * m + 1] = slot;
    }
    __syncthreads();  // everyone has read the count
    if (tid == 0) {
        table.count = held + pushed;
        table.header[CHANGES] = changed + count;
        table.header[t.corrects ? CORRECTED : SELECTED] = count;
        table.header[MISSED] = missed + (t.corrects ? table.header[MISSED] : 0);
        if (t.corrects) table.add(ALL_CORRECTED, count);
        table.add(ALL_SELECTED, count);
        table.add(ALL_MISSED, missed);
        t.move_counts[head] = missed;
    }
}

struct Load {
    const Tables *tables;
    const u32 *ranked;  // of each KV head the rows that are not guarded, and others, the best first
    u64 ranked_stride;
    u32 ranked_count;
    u32 length;  // tokens, of which there are as many as slots at least
};

// grid: KV heads. Fills a table anew, for the end of a prompt: what is guarded, then the best rows. Each slot counts as used
// later than the next one.
extern "C" __global__ void __launch_bounds__(512) slots_load(Load p) {
    __shared__ u32 totals[WARPS];
    const Tables t = *p.tables;
    const u32 head = blockIdx.x, tid = threadIdx.x;
    Table table(t, head);
    for (u32 row = tid; row < t.rows; row += THREADS) table.slots[row] = NONE;
    __syncthreads();
    auto put = [&](u32 slot, u32 row) {
        table.rows[slot] = row;
        table.used[slot] = t.limit - slot;
        table.slots[row] = slot;
    };
    const u32 below = min(t.below, p.length), from = min(max(t.from, below), p.length);
    const u32 always = below + p.length - from;
    for (u32 i = tid; i < min(always, t.limit); i += THREADS) put(i, i < below ? i : from + i - below);
    const u32 *ranked = p.ranked + head * p.ranked_stride;
    for (u32 first = 0, at = always; first < p.ranked_count && at < t.limit; first += THREADS) {
        const u32 row = first + tid < p.ranked_count ? ranked[first + tid] : NONE;
        const bool wanted = row >= below && row < from;
        u32 total;
        const u32 slot = at + scan<WARPS>(wanted, totals, total);
        if (wanted && slot < t.limit) put(slot, row);
        at += total;
    }
    if (tid == 0) {
        table.count = t.limit;  // there are as many, as promised
        table.header[STEP] = 0;
    }
}

// Lists the slots that this step has used and those that are guarded, in ascending order; says how many. By a whole block.
__device__ u32 list_attended(const Tables &t, const Table &table, const Held &pool, u32 head) {
    __shared__ u32 totals[WARPS];
    const u32 held = table.count;
    u32 *list = t.attended + u64(head) * t.most_attended;
    u32 listed = 0;
    for (u32 first = 0; first < held; first += THREADS * MANY) {
        bool attended[MANY];
        u32 before[MANY];
#pragma unroll
        for (u32 i = 0; i < MANY; i++) {
            const u32 slot = first + item<MANY>(i), token = slot < held ? pool.token(table.rows[slot]) : 0;
            attended[i] = slot < held && (table.used[slot] == t.step || token < t.below || token >= t.from);
        }
        const u32 here = places<WARPS>(attended, totals, before);
#pragma unroll
        for (u32 i = 0; i < MANY; i++) {
            const u32 at = listed + before[i];
            if (attended[i] && at < t.most_attended) list[at] = first + item<MANY>(i);
        }
        listed += here;
    }
    listed = min(listed, t.most_attended);
    const u64 address = reinterpret_cast<u64>(list);
    if (threadIdx.x == 0) t.attended_lists[head] = make_uint4(u32(address), u32(address >> 32), listed, 0);
    return listed;
}

// A new token of one sequence.
struct Token {
    Tables tables;
    const float *keys;  // all KV heads
    const float *values;
    const u64 *store;  // addresses of extents
    const u64 *cache;
    const u64 *index;
    const u64 *saved;  // where what lies in the token's slot is kept, as the cache: in row `most` of its tables; or null
    const float *mean_from;  // the layer's mean value of all KV heads before this token
    float *mean;             // and with it, or null
    float mean_factor;
    u32 unused;
};

struct Admit {
    const Token *tokens;
    const float *maps;  // KV heads × columns × head_dim
    Layout index;
    u64 store_offset;  // bytes from an extent's start to the layer's first run
    u64 store_run_bytes;
    u64 cache_offset;
    u64 cache_run_bytes;
    u32 extent_tokens;  // of store and cache
    u32 head_dim;
    u32 row_bytes;     // of the cache
    u32 stored_bytes;  // of the store
};

// A block notes that the token in a row is lost, and keeps what will be overwritten: what a call that is given up brings back.
__device__ void keep(const Admit &p, const Token &token, const Held &held, u32 head, u32 row, const u8 *entry) {
    const Pool &pool = token.tables.pool;
    const u32 victim = held.token(row), tid = threadIdx.x;
    const u32 kept = held.header[BEGUN] == pool.begun + 1 ? held.header[KEPT] : 0, lost = held.header[LOST];
    const bool there = victim < pool.begun;
    if (there) {
        const Lost to(pool, head, p.stored_bytes, p.index.words);
        copy_bytes(entry, to.entry(kept), p.stored_bytes, tid, THREADS);
        const u64 run = run_of(p.index, token.index, head, row);
        for (u32 w = tid; w < to.key_words; w += THREADS) {
            to.key(kept)[w] = *key_word(p.index, run, row % p.index.extent_tokens, w);
        }
        if (tid == 0) to.rows[kept] = row;
    }
    __syncthreads();  // everyone has read the header
    if (tid == 0) {
        held.header[LOST] = lost ? min(lost, victim + 1) : victim + 1;
        held.header[KEPT] = kept + there;
        held.header[BEGUN] = pool.begun + 1;
    }
}

// grid: sequences × KV heads × 2. A block gives the new token a slot and puts its entry there; another one puts entry and
// partial key into store and index, unless it takes a victim's row, which the first one has to find. P is how entries are stored.
template <class P, class T> __device__ void admit(const Admit &p) {
    wait_for_previous();
    extern __shared__ __align__(16) float partial[];  // columns; behind them, aligned to 16, a stored row
    __shared__ u64 best[WARPS];
    __shared__ u32 taken;
    const Token &token = p.tokens[blockIdx.x];
    const Tables t = token.tables;
    const u32 head = blockIdx.y, tid = threadIdx.x, warp = tid / WARP, lane = tid % WARP;
    const float *key = token.keys + head * p.head_dim, *value = token.values + head * p.head_dim;
    Table table(t, head);
    const Held pool(t.pool, head);
    const Runs stored = {token.store, p.store_offset, p.store_run_bytes, p.extent_tokens};
    constexpr bool exact = is_exact<P>;
    auto project = [&] {
        // Columns whose maps are on their way together.
        for (u32 c0 = warp; c0 < p.index.columns; c0 += MANY * WARPS) {
            float sums[MANY] = {};
#pragma unroll 4
            for (u32 i = lane; i < p.head_dim; i += WARP) {
#pragma unroll
                for (u32 k = 0; k < MANY; k++) {
                    const u32 c = min(c0 + k * WARPS, p.index.columns - 1);
                    sums[k] = fmaf(p.maps[(u64(head) * p.index.columns + c) * p.head_dim + i], key[i], sums[k]);
                }
            }
#pragma unroll
            for (u32 k = 0; k < MANY; k++) {
                sums[k] = warp_sum(sums[k]);
                if (lane == 0 && c0 + k * WARPS < p.index.columns) partial[c0 + k * WARPS] = sums[k];
            }
        }
    };
    // Behind a barrier behind `project`.
    auto record = [&](u32 row) {
        u8 *store = reinterpret_cast<u8 *>(row_of(stored, head, row, p.stored_bytes));
        for (u32 c = tid; exact && c < p.head_dim; c += THREADS) {
            reinterpret_cast<T *>(store)[c] = narrow<T>(key[c]);
            reinterpret_cast<T *>(store)[p.head_dim + c] = narrow<T>(value[c]);
        }
        if (!exact && warp == 1) {
            u8 *encoded = reinterpret_cast<u8 *>(partial + (p.index.columns + 3) / 4 * 4);
            P::encode(key, value, p.head_dim, lane, encoded);
            __syncwarp();
            copy_bytes(encoded, store, p.stored_bytes, lane, WARP);
        }
        if (warp == 0) store_row(p.index, run_of(p.index, token.index, head, row), row % p.index.extent_tokens, partial);
    };
    if (blockIdx.z == 1) {
        if (t.pool.full) return;
        project();
        __syncthreads();
        record(t.row);
        return;
    }

    const u32 held = table.count;
    u32 row = t.row, own = NONE;
    if (t.pool.full) {
        row = find_victim(t.pool, pool, t.below, t.from, table.used, table.slots, t.step);
        own = table.slots[row];
        keep(p, token, pool, head, row, reinterpret_cast<const u8 *>(row_of(stored, head, row, p.stored_bytes)));
    }
    // What one thread will need is on its way while the others search.
    u32 header[HEADER], next_row = 0, next_used = 0;
    const u32 next = table.header[STEP] == t.step ? table.header[NEXT] : NONE;  // if this step was rehearsed
    if (tid == 0) {
#pragma unroll
        for (u32 i = 0; i < HEADER; i++) header[i] = table.header[i];
        if (next != NONE) {
            next_row = table.rows[next];
            next_used = table.used[next];
        }
    }
    if (held >= t.limit && own == NONE && next == NONE) {
        u64 oldest = ~0ull;
#pragma unroll 4
        for (u32 slot = tid; slot < held; slot += THREADS) {
            const u32 used = table.used[slot];
            if (gives_way(t, pool, used, table.rows[slot])) oldest = min(oldest, u64(used) << 32 | slot);
        }
#pragma unroll
        for (int step = 16; step > 0; step /= 2) oldest = min(oldest, __shfl_xor_sync(FULL, oldest, step));
        if (lane == 0) best[warp] = oldest;
    }
    if (t.pool.full) project();
    __syncthreads();
    if (tid == 0) {
        if (header[STEP] != t.step) {
            header[STEP] = t.step;
            header[CHANGES] = header[SELECTED] = header[MISSED] = header[CORRECTED] = 0;
            header[NEXT] = NONE;
        }
        const u32 change = header[CHANGES]++;
        u32 slot = held, now = held + 1;
        if (own != NONE) {
            slot = own;
            now = held;
            table.change(change, slot, row, table.used[slot]);
        } else if (held < t.limit) {
            table.change(change, slot, NONE, 0);
            table.count = now;
        } else {
            slot = next;
            if (next == NONE) {
                u64 oldest = best[0];
                for (u32 w = 1; w < WARPS; w++) oldest = min(oldest, best[w]);
                slot = min(u32(oldest), held - 1);  // there is one, as promised
                next_row = table.rows[slot];
                next_used = u32(oldest >> 32);
            }
            now = held;
            table.change(change, slot, next_row, next_used);
            table.slots[next_row] = NONE;
        }
        table.rows[slot] = row;
        table.used[slot] = t.step;
        table.slots[row] = slot;
        if (t.pool.tables) {
            pool.tokens[row] = t.pool.token + 1;
            pool.uses[row] = 0;
        }
        if (t.attended_lists) now = 0;  // counted below
        const u64 attended = (u64(header[ALL_ATTENDED + 1]) << 32 | header[ALL_ATTENDED]) + now;
        header[ALL_ATTENDED] = u32(attended);
        header[ALL_ATTENDED + 1] = u32(attended >> 32);
        header[ATTENDED] = now;
#pragma unroll
        for (u32 i = 0; i < HEADER; i++) table.header[i] = header[i];
        taken = slot;
    }
    __syncthreads();
    if (t.attended_lists) {
        const u32 listed = list_attended(t, table, pool, head);
        if (tid == 0) {
            table.header[ATTENDED] = listed;
            table.add(ALL_ATTENDED, listed);
        }
    }
    const Runs cached = {token.cache, p.cache_offset, p.cache_run_bytes, p.extent_tokens};
    T *cache = reinterpret_cast<T *>(row_of(cached, head, taken, p.row_bytes));
    if (!exact && token.saved) {
        const Runs saves = {token.saved, p.cache_offset, p.cache_run_bytes, p.extent_tokens};
        T *saved = reinterpret_cast<T *>(row_of(saves, head, t.most, p.row_bytes));
        for (u32 c = tid; c < p.head_dim; c += THREADS) {
            saved[c] = cache[c];
            saved[p.head_dim + c] = cache[p.head_dim + c];
        }
    }
    for (u32 c = tid; c < p.head_dim; c += THREADS) {
        cache[c] = narrow<T>(key[c]);
        cache[p.head_dim + c] = narrow<T>(value[c]);
        if (token.mean) {
            // Rounded one by one, as by tail_blend.
            const u32 at = head * p.head_dim + c;
            const float before = token.mean_from[at];
            token.mean[at] = __fadd_rn(before, __fmul_rn(token.mean_factor, __fsub_rn(value[c], before)));
        }
    }
    if (t.pool.full) record(row);
}

// slots_admit_STORED_TYPE.
#define ADMIT(NAME, P, T) \
    extern "C" __global__ void __launch_bounds__(512, 2) slots_admit_##NAME(Admit p) { admit<P, T>(p); }
#define ADMITS(NAME, T) ADMIT(exact_##NAME, Exact<T>, T) ADMIT(int8_##NAME, Int8, T) ADMIT(int4_##NAME, Int4, T)

ADMITS(f32, float)
ADMITS(f16, f16)
ADMITS(bf16, bf16)
