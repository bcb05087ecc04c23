// Matrix products for decode with bf16 weights, on tensor cores: up to 24 rows read each weight once.
//
// Activations stay f32 in effect: each is the sum of three bf16 numbers, exactly, whose products with a bf16 weight are
// exact too, and sums are f32. The depth is cut into splits, by the matrix alone, and a split into pieces of 32; sum w of
// eight is that of the split's pieces w, w + 8, …, one after the other. The sums are added in order, then the splits are.
// Rows of an mma do not see each other, and all kernels sum in this order: a row's bits depend neither on the rows beside it
// nor on how many there are.
//
// Beside its weights a multiprocessor reads all activations of a tile of outputs, from L2: of 20 rows as many bytes as of 40
// outputs' weights. So tiles are wide, and where outputs are too few for every multiprocessor to have a wide one, blocks share
// a tile and split the depth; the last of them to finish adds up.
//
// Each of a block's eight warps, one for each sum, has a piece of its own in shared memory, by units of 32 outputs. What it has
// read of a unit it asks for again, of its next piece: so all other units are always on their way, and no warp waits for
// another before the end of the tile.
//
// Weights are the mma's first factor, activations the second. An output's 64 bytes of a piece lie in shared memory as they do in
// the matrix, but for the order of its four eights of the depth: with it, eight outputs have theirs in different banks. (Sectors of
// 32 bytes that come to lie otherwise than as one aligned sector cost a fifth of the speed, in two places half of it.)
#include "async.cuh"
#include "operands.cuh"

// The depth is a multiple of 8, and activations are aligned to 8 bytes.
struct Matvec : Operands {
    float *partials;  // where the depth is split: of each tile, split by split
    u32 *counters;    // splits that have written theirs; zero, and left zero
    u32 row_tiles;    // consecutive blocks share the weights
    u32 tiles;        // of outputs
    u32 splits;       // up to MOST_SPLITS; where there are several, a tile is no wider than the kernel
    u32 unused;
};

constexpr u32 WARPS = 8, THREADS = WARPS * WARP, TERMS = 3, MOST_SPLITS = 4;
constexpr u32 PIECE = 32, EIGHTS = PIECE / 8, STRIDE = WARPS * PIECE;  // of the depth
constexpr u32 UNIT = 32, OUTPUT_BYTES = PIECE * 2, UNIT_BYTES = UNIT * OUTPUT_BYTES;

// c += a · b: 16 × 16 by 16 × 8, fragments as PTX's mma.m16n8k16 lays them out.
__device__ __forceinline__ void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The first factor of an mma; lane l says where eight of the depth lie of output l % 16, the first or the last eight.
__device__ __forceinline__ void load_weights(u32 (&a)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                 : "r"(from)
                 : "memory");
}

// Takes the bf16 numbers nearest to two floats out of them.
__device__ __forceinline__ u32 split(float2 &x) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(x.y), "f"(x.x));
    x.x -= __uint_as_float(both << 16);
    x.y -= __uint_as_float(both & 0xffff0000u);
    return both;
}

// N eights of rows, by up to E units of outputs at a time.
//
// grid: tiles × splits × tiles of rows.
template <u32 N, u32 E> struct Product {
    static constexpr u32 WIDTH = E * UNIT, PITCH = WIDTH + 4, SIXTEENS = WIDTH / 16;
    const Matvec &p;
    u32 ring;       // of this warp, in shared memory
    float *sums;    // WARPS × 8 × PITCH
    float *biases;  // WIDTH
    u32 lane, warp, g, t;
    u32 row0, row_tile, tile, part;
    u32 begin, end, width;  // outputs of the tile, and how many the block takes at a time
    u32 from_k, to_k;       // of the depth, this warp's first piece and the split's end
    // The piece that is asked for, and of this lane's share of it the next address, how many outputs there are, and whether its
    // eight of the depth is.
    u32 next_first, next_k;
    u64 next;
    int real_outputs;
    bool real_depth;

    __device__ __forceinline__ Product(const Matvec &p, unsigned char *shared)
        : p(p), lane(threadIdx.x % WARP), warp(threadIdx.x / WARP), g(lane / 4), t(lane % 4) {
        ring = shared_address(shared) + warp * E * UNIT_BYTES;
        sums = reinterpret_cast<float *>(shared + WARPS * E * UNIT_BYTES);
        biases = sums + WARPS * 8 * PITCH;
        row_tile = blockIdx.x % p.row_tiles;
        row0 = row_tile * 8 * N;
        part = blockIdx.x / p.row_tiles % p.splits;
        tile = blockIdx.x / p.row_tiles / p.splits;
        const u32 eights = (p.outputs + 7) / 8, pieces = (p.depth + PIECE - 1) / PIECE;
        begin = eights * tile / p.tiles * 8;
        end = min(eights * (tile + 1) / p.tiles * 8, p.outputs);
        const u32 sixteens = (end - begin + 15) / 16, rounds = max((sixteens + SIXTEENS - 1) / SIXTEENS, 1);
        width = (sixteens + rounds - 1) / rounds * 16;
        from_k = (pieces * part / p.splits + warp) * PIECE;
        to_k = min(pieces * (part + 1) / p.splits * PIECE, p.depth);
        next_first = begin;
        next_k = from_k;
        aim();
    }

    // A copy is of eight outputs' pieces; lane l has the l % 4th 16 bytes of the l / 4th.
    __device__ __forceinline__ void aim() {
        const u32 k = next_k + t * 8;
        next = reinterpret_cast<u64>(p.weight) + (u64(next_first + g) * p.depth + k) * 2;
        real_outputs = next_first < end && next_k < to_k ? int(min(width, end - next_first)) - int(g) : 0;
        real_depth = k < to_k;
    }

    // Asks for a unit of this warp's next piece, all units in turn. Each is a group, if there is one or not.
    __device__ __forceinline__ void copy(u32 unit) {
        const u32 to = ring + unit * UNIT_BYTES + g * OUTPUT_BYTES + (t ^ g / 2) * 16;
#pragma unroll
        for (u32 i = 0; i < UNIT; i += 8) {
            if (int(unit * UNIT + i) < real_outputs) copy_16_of_stream(to + i * OUTPUT_BYTES, next, real_depth);
            next += 16 * u64(p.depth);
        }
        end_group();
        if (unit + 1 < E) return;
        next_k += STRIDE;
        if (next_k >= to_k) {
            next_k = from_k;
            next_first += width;
        }
        aim();
    }

    // This lane's activations of a piece, zeros where there are none: of row g of each eight, two of each eight of the depth.
    __device__ __forceinline__ void load_activations(u32 k, float2 (&x)[N][EIGHTS]) {
#pragma unroll
        for (u32 n = 0; n < N; n++) {
            const u32 row = row0 + 8 * n + g;
            const float *from = p.x + row * p.x_stride + k + 2 * t;
#pragma unroll
            for (u32 e = 0; e < EIGHTS; e++) {
                const bool real = row < p.rows && k + 8 * e < to_k;
                x[n][e] = real ? *reinterpret_cast<const float2 *>(from + 8 * e) : make_float2(0, 0);
            }
        }
    }

    __device__ __forceinline__ void run() {
#pragma unroll
        for (u32 unit = 0; unit < E; unit++) copy(unit);
        wait_for_previous();
#pragma unroll 1
        for (u32 first = begin; first < end; first += width) {
            if (threadIdx.x < WIDTH) {
                const u32 output = first + threadIdx.x;
                biases[threadIdx.x] = p.bias && output < end ? p.bias[output] : 0;
            }
            float c[SIXTEENS][N][4] = {};
            multiply(c);
            add_up(first, c);
        }
    }

    // (Past the outputs that are real, too: what lies there is multiplied faster than left out, and is not stored.)
    __device__ __forceinline__ void multiply(float (&c)[SIXTEENS][N][4]) {
        const u32 row = lane % 16, half = lane / 16;
        float2 x[N][EIGHTS];
        load_activations(from_k, x);
#pragma unroll 1
        for (u32 k = from_k; k < to_k; k += STRIDE) {
            u32 terms[TERMS][N][EIGHTS];
#pragma unroll
            for (u32 n = 0; n < N; n++) {
#pragma unroll
                for (u32 e = 0; e < EIGHTS; e++) {
#pragma unroll
                    for (u32 term = 0; term < TERMS; term++) terms[term][n][e] = split(x[n][e]);
                }
            }
            load_activations(k + STRIDE, x);
#pragma unroll
            for (u32 unit = 0; unit < E; unit++) {
                wait_for_groups_but<E - 1>();
                __syncwarp();
                u32 weights[2][EIGHTS / 2][4];
#pragma unroll
                for (u32 s = 0; s < 2; s++) {
                    const u32 from = ring + unit * UNIT_BYTES + (16 * s + row) * OUTPUT_BYTES;
#pragma unroll
                    for (u32 e = 0; e < EIGHTS; e += 2) load_weights(weights[s][e / 2], from + ((e + half) ^ row / 2 % 4) * 16);
                }
                __syncwarp();
                copy(unit);
#pragma unroll
                for (u32 e = 0; e < EIGHTS; e += 2) {
#pragma unroll
                    for (u32 term = 0; term < TERMS; term++) {
#pragma unroll
                        for (u32 s = 0; s < 2; s++) {
#pragma unroll
                            for (u32 n = 0; n < N; n++) {
                                mma(c[2 * unit + s][n], weights[s][e / 2], terms[term][n][e], terms[term][n][e + 1]);
                            }
                        }
                    }
                }
            }
        }
    }

    // Adds the warps' sums, and the splits where this block is the tile's last. Of each eight of rows, warp w then has row w, and
    // of each unit lane l output l.
    __device__ __forceinline__ void add_up(u32 first, const float (&c)[SIXTEENS][N][4]) {
        const u32 here = min(width, end - first);
        float *partials = p.partials + u64(tile * p.row_tiles + row_tile) * p.splits * (N * 8 * WIDTH) + warp * WIDTH + lane;
#pragma unroll
        for (u32 n = 0; n < N; n++) {
#pragma unroll
            for (u32 s = 0; s < SIXTEENS; s++) {
                float *to = sums + (warp * 8 + 2 * t) * PITCH + s * 16 + g;
                to[0] = c[s][n][0];
                to[PITCH] = c[s][n][1];
                to[8] = c[s][n][2];
                to[PITCH + 8] = c[s][n][3];
            }
            __syncthreads();
            float y[E] = {};
#pragma unroll
            for (u32 w = 0; w < WARPS; w++) {
#pragma unroll
                for (u32 i = 0; i < E; i++) y[i] += sums[(w * 8 + warp) * PITCH + i * UNIT + lane];
            }
            if (p.splits == 1) {
                store(first, here, n, y);
            } else if (row0 + 8 * n + warp < p.rows) {
#pragma unroll
                for (u32 i = 0; i < E; i++) {
                    if (i * UNIT + lane < here) partials[(part * N + n) * 8 * WIDTH + i * UNIT] = y[i];
                }
            }
            __syncthreads();
        }
        if (p.splits == 1 || !is_last()) return;
        float y[N][E] = {};
#pragma unroll
        for (u32 s = 0; s < MOST_SPLITS; s++) {
#pragma unroll
            for (u32 n = 0; n < N; n++) {
#pragma unroll
                for (u32 i = 0; i < E; i++) {
                    const bool real = s < p.splits && row0 + 8 * n + warp < p.rows && i * UNIT + lane < here;
                    y[n][i] += real ? __ldcg(partials + (s * N + n) * 8 * WIDTH + i * UNIT) : 0;
                }
            }
        }
#pragma unroll
        for (u32 n = 0; n < N; n++) store(first, here, n, y[n]);
    }

    // Whether this block's partials are the tile's last; then it sees all of them.
    __device__ __forceinline__ bool is_last() {
        __shared__ bool last;
        __threadfence();
        __syncthreads();
        u32 *counter = p.counters + tile * p.row_tiles + row_tile;
        if (threadIdx.x == 0) last = atomicAdd(counter, 1) + 1 == p.splits;
        __syncthreads();
        if (!last) return false;
        __threadfence();
        if (threadIdx.x == 0) *counter = 0;
        return true;
    }

    // What is read is read together: one wait, not one an output.
    __device__ __forceinline__ void store(u32 first, u32 here, u32 n, const float (&y)[E]) {
        const u32 row = row0 + 8 * n + warp;
        if (row >= p.rows) return;
        float *out = p.out + row * p.out_stride + first + lane;
        float before[E];
#pragma unroll
        for (u32 i = 0; i < E; i++) before[i] = p.accumulate && i * UNIT + lane < here ? out[i * UNIT] : 0;
#pragma unroll
        for (u32 i = 0; i < E; i++) {
            if (i * UNIT + lane < here) out[i * UNIT] = y[i] + before[i] + biases[i * UNIT + lane];
        }
    }
};

template <u32 N, u32 E> __device__ __forceinline__ void matvec(const Matvec &p) {
    extern __shared__ __align__(128) unsigned char shared[];  // whole sectors, whatever lies before
    Product<N, E>(p, shared).run();
}

// matvec_mma_ROWS_OUTPUTS.
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_8_96(Matvec p) { matvec<1, 3>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_8_128(Matvec p) { matvec<1, 4>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_8_160(Matvec p) { matvec<1, 5>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_16_96(Matvec p) { matvec<2, 3>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_16_128(Matvec p) { matvec<2, 4>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_16_160(Matvec p) { matvec<2, 5>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_24_96(Matvec p) { matvec<3, 3>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_24_128(Matvec p) { matvec<3, 4>(p); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) matvec_mma_24_160(Matvec p) { matvec<3, 5>(p); }
