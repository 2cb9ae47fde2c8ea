/* fused.cuh - products whose results go through SiLU and a gate at once, written out one time instead of
 * written, read and written again: the largest pointwise steps of a block, for Hopper.
 *
 *     forward    y = x W^T + bias;  h = silu(y) other               v, the gated attention, the FFN's hidden
 *     backward   g = dy W;  dx = g a silu'(x);  da = g silu(x);  y = a silu(x)
 *
 * One block a multiprocessor walks over tiles of 128 x 256. Its first warp asks for pieces of 64 along K, four
 * ahead, and two groups of four warps multiply 64 rows each:
 *
 *     copies   | piece 0 | piece 1 | piece 2 | ...       a ring of 4 places in shared memory; `full` and `empty`
 *     products           | piece 0 | piece 1 | ...       barriers hand each place to and fro
 *
 * That is the first version; the second, below, lets neighbouring blocks share what they copy and keeps the
 * tensor cores busy during an epilogue.
 *
 * Everything else (other devices, float, dropout, sizes that tiles do not divide) takes the product of
 * matmul.cuh and the kernel of pointwise.cuh; the results are the same but for the order of sums.
 */
#ifndef CUDA_FUSED_CUH
#define CUDA_FUSED_CUH

#include "hopper.cuh"
#include "matmul.cuh"
#include "pointwise.cuh"

/* -DFUSED_PRODUCTS=0: never */
#ifndef FUSED_PRODUCTS
#define FUSED_PRODUCTS 1
#endif

/* 1: fused_product_kernel, a tile's epilogue after its product. 2: team_product_kernel, forward with the
 * epilogue under the next tile's product, backward in pairs of blocks. 3: both with three writers that go row
 * by row; 4: with eight of them, in pairs; 5: three, in pairs; 6: eight. Those from 3 on have run on no device
 * yet. */
#ifndef FUSED_VERSION
#define FUSED_VERSION 1
#endif

enum {
    FUSED_M = 128, FUSED_N = 256, FUSED_K = 64, FUSED_PLACES = 4, FUSED_GROUP_ROWS = 64, FUSED_WARP_ROWS = 16,
    FUSED_A_BYTES = FUSED_M * FUSED_K * 2, FUSED_B_BYTES = FUSED_N * FUSED_K * 2, FUSED_BYTES = FUSED_A_BYTES + FUSED_B_BYTES,
    FUSED_SHARED = FUSED_PLACES * FUSED_BYTES + 2 * FUSED_PLACES * 8,
    FUSED_THREADS = 3 * WARPGROUP, FUSED_VEC = 8,
    /* of the second version: what one warp multiplies of a tile, as bf16, and how a lane takes it */
    FUSED_PARCEL_BYTES = FUSED_WARP_ROWS * FUSED_N * 2, FUSED_PARCELS = FUSED_M / FUSED_WARP_ROWS,
    FUSED_BIAS_BYTES = FUSED_N * 2, FUSED_ROW_BYTES = FUSED_N * 2,
    FUSED_BATCH = 4, FUSED_BATCHES = FUSED_PARCEL_BYTES / 16 / WARP_SIZE / FUSED_BATCH
};

/* Eight numbers of bf16 as they move: in words, since the compiler keeps arrays of bf16 element by element. */
using Eight = Packed<uint32_t, FUSED_VEC / 2>;
__device__ inline Eight load_eight(const bf16 *from) {
    return packed<FUSED_VEC / 2>(reinterpret_cast<const uint32_t *>(from));
}
__device__ inline void store_eight(bf16 *to, const Eight &words) { *reinterpret_cast<Eight *>(to) = words; }
__device__ inline float number(const Eight &words, int i) {
    return __uint_as_float(i % 2 ? words.v[i / 2] & 0xffff0000u : words.v[i / 2] << 16);
}
__device__ inline uint32_t word_of(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}

/* Four lanes in a row hold a pair of columns each, of four blocks of 8 columns: word[i] is block i's. After
 * this, each holds the four pairs of one block, the block of its own number among the four. */
__device__ inline void gather_block(uint32_t (&word)[4]) {
    int lane = (int)threadIdx.x % 4;
    bool odd = lane & 1, high = lane & 2;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        uint32_t other = __shfl_xor_sync(FULL_MASK, odd ? word[i] : word[i + 1], 1);
        (odd ? word[i] : word[i + 1]) = other;
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        uint32_t other = __shfl_xor_sync(FULL_MASK, high ? word[i] : word[i + 2], 2);
        (high ? word[i] : word[i + 2]) = other;
    }
}

/* Two ways to the same number, but for the smallest: see hopper.cuh. */
template <bool QUICK> __device__ inline float fused_sigmoid(float x) {
    return QUICK ? quick_sigmoid(x) : sigmoid(x);
}
template <bool QUICK> __device__ inline float fused_silu(float x) { return x * fused_sigmoid<QUICK>(x); }

/* y = product + bias;  h = silu(y) other */
struct SiluEpilogue {
    static constexpr bool ROWS_OF_K = false; // the weight's rows run along K
    static constexpr bool HAS_BIAS = true; // there may be one
    static constexpr int CHUNK = 4;
    bf16 *y, *h;
    const bf16 *bias, *other; /* either may be NULL */
    struct Inputs {
        Eight other;
    };
    /* the arrays that it reads, in the order of Inputs */
    __host__ __device__ static constexpr int inputs(bool gate) { return gate ? 1 : 0; }
    __host__ __device__ const bf16 *input(int) const { return other; }
    __device__ static void take(Inputs *in, int, const Eight &words) { in->other = words; }
    __device__ uint32_t bias_at(int column) const {
        return bias ? *reinterpret_cast<const uint32_t *>(bias + column) : 0;
    }
    __device__ void prefetch(int64_t at, int bytes) const {
        if (other) prefetch_bytes(other + at, bytes);
    }
    __host__ __device__ bool gated() const { return other != nullptr; }
    __device__ void prefetch_inputs(int64_t at) const { // 64 numbers
        if (other) prefetch_line(other + at);
    }
    __device__ void load(Inputs *in, int64_t at, bool gate) const {
        if (gate) in->other = load_eight(other + at);
    }
    /* QUICK: see fused_sigmoid; gate: gated(), or a constant of the same value; here: is there such a row? */
    template <bool QUICK>
    __device__ void apply(float (&)[FUSED_VEC], const Eight &product, const Inputs &in, int64_t at,
                          bool gate, bool here) const {
        Eight out;
        if (here) store_eight(y + at, product);
#pragma unroll
        for (int i = 0; i < FUSED_VEC; i += 2) {
            float first = fused_silu<QUICK>(number(product, i)),
                  second = fused_silu<QUICK>(number(product, i + 1));
            if (gate) first *= number(in.other, i), second *= number(in.other, i + 1);
            out.v[i / 2] = word_of(first, second);
        }
        if (here) store_eight(h + at, out);
    }
    __device__ void add_sums(const float (&)[FUSED_VEC], int64_t, int) const {}
    __device__ void add_halves(float (&)[FUSED_VEC], int64_t, int) const {}
    __device__ void put_sums(float (&)[FUSED_VEC], int, int) const {}
    __device__ SiluEpilogue from(int64_t at) const {
        return SiluEpilogue{y + at, h + at, bias, other ? other + at : nullptr};
    }
};

/* g = product;  dx = g a silu'(x);  da = g silu(x);  y = a silu(x); partial sums of dx over 16 rows each */
struct GateEpilogue {
    static constexpr bool ROWS_OF_K = true; // the weight's rows are K
    static constexpr bool HAS_BIAS = false;
    static constexpr int CHUNK = 2;
    bf16 *dx, *da, *y; /* da and y may be NULL; y may be x: the thread that writes an element has read it */
    const bf16 *x, *a; /* a may be NULL: as if 1 */
    float *partial;    /* may be NULL */
    int columns;
    struct Inputs {
        Eight x, a;
    };
    __host__ __device__ static constexpr int inputs(bool gate) { return gate ? 2 : 1; }
    __host__ __device__ const bf16 *input(int i) const { return i == 0 ? x : a; }
    __device__ static void take(Inputs *in, int i, const Eight &words) { (i == 0 ? in->x : in->a) = words; }
    static constexpr const bf16 *bias = nullptr;
    __device__ uint32_t bias_at(int) const { return 0; }
    __device__ void prefetch(int64_t at, int bytes) const {
        prefetch_bytes(x + at, bytes);
        if (a) prefetch_bytes(a + at, bytes);
    }
    __host__ __device__ bool gated() const { return a != nullptr; }
    __device__ void prefetch_inputs(int64_t at) const {
        prefetch_line(x + at);
        if (a) prefetch_line(a + at);
    }
    __device__ void load(Inputs *in, int64_t at, bool gate) const {
        in->x = load_eight(x + at);
        if (gate) in->a = load_eight(a + at);
    }
    template <bool QUICK>
    __device__ void apply(float (&sum)[FUSED_VEC], const Eight &product, const Inputs &in, int64_t at,
                          bool gate, bool here) const {
        Eight dx_out, da_out, y_out;
#pragma unroll
        for (int i = 0; i < FUSED_VEC; i += 2) {
            float dv[2], dother[2], again[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float grad = number(product, i + j), v = number(in.x, i + j), s = fused_sigmoid<QUICK>(v);
                float factor = gate ? number(in.a, i + j) : 1.0f;
                float silu = v * s; // silu' = s + silu (1 - s)
                dv[j] = grad * factor * (s + fmaf(-silu, s, silu));
                dother[j] = grad * silu;
                again[j] = factor * silu;
                sum[i + j] += dv[j];
            }
            dx_out.v[i / 2] = word_of(dv[0], dv[1]);
            da_out.v[i / 2] = word_of(dother[0], dother[1]);
            y_out.v[i / 2] = word_of(again[0], again[1]);
        }
        if (here) store_eight(dx + at, dx_out);
        if (here && da) store_eight(da + at, da_out);
        if (here && y) store_eight(y + at, y_out);
    }
    /* Lanes 4 apart own the same columns of other rows. */
    __device__ void add_sums(const float (&sum)[FUSED_VEC], int64_t first_row, int column) const {
        if (!partial) return;
#pragma unroll
        for (int i = 0; i < FUSED_VEC; i++) {
            float total = sum[i];
            for (int step = 4; step < WARP_SIZE; step *= 2) total += __shfl_xor_sync(FULL_MASK, total, step);
            if ((int)threadIdx.x % WARP_SIZE < 4)
                partial[first_row / FUSED_WARP_ROWS * columns + column + i] = total;
        }
    }
    /* Lanes 16 apart own the same columns, each of one half of the rows. */
    __device__ void add_halves(float (&sum)[FUSED_VEC], int64_t first_row, int column) const {
        if (!partial) return;
#pragma unroll
        for (int i = 0; i < FUSED_VEC; i++) sum[i] += __shfl_xor_sync(FULL_MASK, sum[i], 16);
        float *to = partial + first_row / FUSED_WARP_ROWS * columns + column;
        if ((int)threadIdx.x % WARP_SIZE >= 16) return;
        store<4>(to, *reinterpret_cast<float(*)[4]>(sum));
        store<4>(to + 4, *reinterpret_cast<float(*)[4]>(sum + 4));
    }
    /* A lane has all 16 rows of its columns: number `block` of such rows. */
    __device__ void put_sums(float (&sum)[FUSED_VEC], int block, int column) const {
        if (!partial) return;
        float *to = partial + (int64_t)block * columns + column;
        store<4>(to, *reinterpret_cast<float(*)[4]>(sum));
        store<4>(to + 4, *reinterpret_cast<float(*)[4]>(sum + 4));
    }
    /* The same on pointers `at` elements further; partial sums keep theirs. */
    __device__ GateEpilogue from(int64_t at) const {
        return GateEpilogue{dx + at,    da ? da + at : nullptr, y ? y + at : nullptr, x + at,
                            a ? a + at : nullptr, partial, columns};
    }
};

/* Hands a warp's 16 rows of products to the epilogue, 8 columns at a time. first_row: the warp's. */
template <typename E>
__device__ inline void write_products(const E &epilogue, const float (&d)[128], int64_t first_row, int64_t rows,
                                      int first_column, int columns) {
    int lane = (int)threadIdx.x % WARP_SIZE, pair = lane % 4;
    int64_t row = first_row + lane / 4;
#pragma unroll
    for (int chunk = 0; chunk < FUSED_N / 32; chunk += E::CHUNK) {
        /* all that is read is asked for before anything is written */
        typename E::Inputs in[E::CHUNK][2];
        int column = first_column + chunk * 32 + pair * FUSED_VEC;
#pragma unroll
        for (int i = 0; i < E::CHUNK; i++)
#pragma unroll
            for (int half = 0; half < 2; half++)
                if (row + 8 * half < rows)
                    epilogue.load(&in[i][half], (row + 8 * half) * columns + column + i * 32,
                                  epilogue.gated());
#pragma unroll
        for (int i = 0; i < E::CHUNK; i++) {
            float sum[FUSED_VEC] = {};
            uint32_t bias[4];
#pragma unroll
            for (int block = 0; block < 4; block++)
                bias[block] = epilogue.bias_at(first_column + ((chunk + i) * 4 + block) * 8 + pair * 2);
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Eight product;
#pragma unroll
                for (int block = 0; block < 4; block++) {
                    int at = ((chunk + i) * 4 + block) * 4 + half * 2;
                    product.v[block] = word_of(d[at] + __uint_as_float(bias[block] << 16),
                                               d[at + 1] + __uint_as_float(bias[block] & 0xffff0000u));
                }
                gather_block(product.v);
                if (row + 8 * half < rows)
                    epilogue.template apply<false>(sum, product, in[i][half],
                                                   (row + 8 * half) * columns + column + i * 32,
                                                   epilogue.gated(), true);
            }
            epilogue.add_sums(sum, first_row, column + i * 32);
        }
    }
}

/* computes: A B^T (B's rows along K) or A B (B's rows are K), each result handed to the epilogue
 * launch:   one block a multiprocessor, block 384: a warpgroup copies, two multiply 64 x 256 of a tile each
 * traffic:  A, B and what the epilogue reads and writes, each once; neighbouring blocks read the same rows of A
 * needs:    sm_90a; columns a multiple of 256, K of 64; 196,672 bytes of shared memory
 * numerics: float sums along K in one order: deterministic; the product is rounded to bf16 before the epilogue */
template <typename E>
__global__ void __launch_bounds__(FUSED_THREADS, 1)
    fused_product_kernel(const __grid_constant__ CUtensorMap A, const __grid_constant__ CUtensorMap B, E epilogue,
                         int64_t rows, int columns, int K) {
    char *memory = dynamic_shared();
    uint64_t *full = (uint64_t *)(memory + FUSED_PLACES * FUSED_BYTES), *empty = full + FUSED_PLACES;
    int column_tiles = columns / FUSED_N, pieces = K / FUSED_K;
    int64_t tiles = (rows + FUSED_M - 1) / FUSED_M * column_tiles;
    if (threadIdx.x == 0) {
        for (int i = 0; i < FUSED_PLACES; i++) barrier_init(full + i, 1), barrier_init(empty + i, 2);
        barriers_ready();
    }
    __syncthreads(); // the barriers are initialised
    int place = 0, round = 0; // both sides walk through the places alike
    if (threadIdx.x < WARPGROUP) {
        fewer_registers<40>();
        if (threadIdx.x != 0) return;
        for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
            int row = (int)(tile / column_tiles) * FUSED_M, column = (int)(tile % column_tiles) * FUSED_N;
            for (int piece = 0; piece < pieces; piece++) {
                char *a = memory + place * FUSED_BYTES, *b = a + FUSED_A_BYTES;
                barrier_wait(empty + place, (round & 1) ^ 1); // the first round finds all places empty
                barrier_expect(full + place, FUSED_BYTES);
                load_tile(a, &A, row, piece * FUSED_K, full + place);
                if (!E::ROWS_OF_K)
                    load_tile(b, &B, column, piece * FUSED_K, full + place);
                else
                    for (int i = 0; i < FUSED_N / FUSED_K; i++)
                        load_tile(b + i * FUSED_B_BYTES / 4, &B, piece * FUSED_K, column + i * FUSED_K, full + place);
                /* what the epilogue will read should be in the second cache by then */
                for (int i = piece * FUSED_M / pieces; i < (piece + 1) * FUSED_M / pieces; i++)
                    if (row + i < rows)
                        epilogue.prefetch((int64_t)(row + i) * columns + column, FUSED_N * sizeof(bf16));
                if (++place == FUSED_PLACES) place = 0, round++;
            }
        }
        return;
    }
    more_registers<232>();
    int group = (int)threadIdx.x / WARPGROUP - 1, warp = (int)threadIdx.x % WARPGROUP / WARP_SIZE;
    bool speaks = threadIdx.x % WARPGROUP == 0; // for its warpgroup
    for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float d[128];
        int last = -1; // the place of the piece before
        for (int piece = 0; piece < pieces; piece++) {
            const char *a = memory + place * FUSED_BYTES + group * (FUSED_A_BYTES / 2),
                       *b = memory + place * FUSED_BYTES + FUSED_A_BYTES;
            barrier_wait(full + place, round & 1);
            products_begin();
#pragma unroll
            for (int k = 0; k < FUSED_K / 16; k++)
                product_64x256<E::ROWS_OF_K>(
                    d, operand(a + k * 32, 16, 1024),
                    E::ROWS_OF_K ? operand(b + k * 2048, FUSED_B_BYTES / 4, 1024) : operand(b + k * 32, 16, 1024),
                    piece > 0 || k > 0);
            products_commit();
            products_wait<1>(); // the piece before has been multiplied: its place is free
            if (last >= 0 && speaks) barrier_arrive(empty + last);
            last = place;
            if (++place == FUSED_PLACES) place = 0, round++;
        }
        products_wait<0>();
        products_done(d);
        if (speaks) barrier_arrive(empty + last);
        write_products(epilogue, d,
                       tile / column_tiles * FUSED_M + group * FUSED_GROUP_ROWS + warp * FUSED_WARP_ROWS, rows,
                       (int)(tile % column_tiles) * FUSED_N, columns);
    }
}

/* ----------------------------------------------------------------------------------------------------------
 * The second version. One warp copies, two groups of four warps multiply, and three or eight warps do nothing
 * but epilogues, so that the tensor cores go on with the next tile:
 *
 *     copies     | tile 0         | tile 1         | tile 2         |
 *     products     | tile 0        >| tile 1        >| tile 2        |
 *     writers                       | tile 0    |    | tile 1    |
 *
 * At > a multiplying warp rounds its 16 rows of the tile to bf16 and puts them into shared memory, its parcel,
 * which a writing warp takes from there. Barriers hand them to and fro: `staged` a group's four parcels (with
 * eight writers one), `drained` one. With the last tile, when nothing is left to multiply, each multiplying
 * warp writes its own parcel, if there are not as many writers.
 *
 * Blocks form clusters of ROWS x COLUMNS tiles. Those of one row share the rows of A: each copies its part of
 * them to all; those of one column share B alike. So a place is free when both groups of every block that
 * needs what comes into it have multiplied it, here and there. All blocks of a cluster walk through the same
 * pieces, also where some of their tiles lie outside of the matrix: zeros come from there.
 */

/* What a kernel is made for. WRITER_WARPS: 8, one for each parcel; 3, which take them in turns; or 0: the
 * multiplying warps do all epilogues themselves as in the first version, which leaves room for a place more.
 * PREFETCH: what the epilogue will read is brought into the second cache before. ROWWISE: writers walk through
 * the rows in a short loop and find what they read in shared memory; without it all of a parcel is one piece of
 * code, and registers wait for what is read. */
template <int ROWS, int COLUMNS, int WRITER_WARPS, bool PREFETCH = true,
          bool ROWWISE = WRITER_WARPS == FUSED_PARCELS>
struct Team {
    static constexpr bool PREFETCHES = PREFETCH && WRITER_WARPS > 0, OWN = WRITER_WARPS == FUSED_PARCELS,
                          BY_ROWS = ROWWISE;
    static constexpr int CLUSTER_ROWS = ROWS, CLUSTER_COLUMNS = COLUMNS, CLUSTER = ROWS * COLUMNS,
                         WRITERS = WRITER_WARPS, PLACES = WRITERS ? 3 : FUSED_PLACES,
                         PARCELS = WRITERS ? FUSED_PARCELS : 0, BIASES = PLACES + 1,
                         STAGED = OWN ? PARCELS : 2, BARRIERS = 2 * PLACES + STAGED + PARCELS,
                         RING_ROWS = OWN ? 4 : 8, RING_BYTES = RING_ROWS * FUSED_ROW_BYTES,
                         SHARED = PLACES * FUSED_BYTES + PARCELS * FUSED_PARCEL_BYTES +
                                  (BY_ROWS ? WRITERS * RING_BYTES : 0) + BIASES * FUSED_BIAS_BYTES +
                                  BARRIERS * 8;
    /* Warpgroups that do not multiply, and registers of a thread. 640 threads begin with 96 each, too few for
     * a product of 64 x 256 in one instruction. */
    static constexpr int OTHERS = OWN ? 3 : 1, THREADS = (OTHERS + 2) * WARPGROUP,
                         MULTIPLY_REGISTERS = OWN ? 160 : 232, WRITE_REGISTERS = 64,
                         COPY_REGISTERS = OWN ? 32 : 40;
    static constexpr bool HALVES = OWN;
    static_assert(FUSED_M % (8 * COLUMNS) == 0 && FUSED_N / FUSED_K % ROWS == 0 && SHARED <= 232448);
    static_assert(OWN || WRITERS == 0 || WRITERS == WARPGROUP / WARP_SIZE - 1);
};
/* An epilogue that only gates is written by other warps under the next tile's product; of one that reads and
 * writes more all warps do a part. */
template <typename E> using MeasuredTeam = std::conditional_t<E::ROWS_OF_K, Team<2, 1, 0>, Team<1, 1, 3>>;
constexpr bool IN_PAIRS = FUSED_VERSION == 4 || FUSED_VERSION == 5;
using RowsTeam = Team<IN_PAIRS ? 2 : 1, 1, FUSED_VERSION % 2 ? 3 : FUSED_PARCELS, true, true>;
template <typename E> using BestTeam = std::conditional_t<FUSED_VERSION == 2, MeasuredTeam<E>, RowsTeam>;

/* Shared memory: the ring of places, the parcels, the writers' rings, the biases of the last tiles' columns,
 * the barriers. */
template <typename T> struct TeamMemory {
    char *memory;
    __device__ char *place(int i) const { return memory + i * FUSED_BYTES; }
    __device__ char *parcel(int i) const { return place(T::PLACES) + i * FUSED_PARCEL_BYTES; }
    __device__ char *ring(int i) const { return parcel(T::PARCELS) + i * T::RING_BYTES; }
    __device__ char *bias(int i) const { return ring(T::BY_ROWS ? T::WRITERS : 0) + i * FUSED_BIAS_BYTES; }
    __device__ uint64_t *full(int i) const { return (uint64_t *)bias(T::BIASES) + i; }
    __device__ uint64_t *empty(int i) const { return full(T::PLACES) + i; }
    __device__ uint64_t *staged(int i) const { return full(2 * T::PLACES) + i; }
    __device__ uint64_t *drained(int i) const { return full(2 * T::PLACES + T::STAGED) + i; }
};

/* A block's walk over its tiles: the cluster takes ROWS x COLUMNS of them at a time, along the columns first.
 */
template <typename T> struct TeamWalk {
    int rank, now, end, step, row_tiles, column_tiles, width; /* width: of the matrix, in clusters */
    __device__ TeamWalk(int64_t rows, int columns) {
        rank = T::CLUSTER > 1 ? cluster_rank() : 0;
        row_tiles = (int)((rows + FUSED_M - 1) / FUSED_M), column_tiles = columns / FUSED_N;
        width = (column_tiles + T::CLUSTER_COLUMNS - 1) / T::CLUSTER_COLUMNS;
        now = (int)blockIdx.x / T::CLUSTER, step = (int)gridDim.x / T::CLUSTER;
        end = (row_tiles + T::CLUSTER_ROWS - 1) / T::CLUSTER_ROWS * width;
    }
    __device__ bool goes_on() const { return now < end; }
    __device__ void next() { now += step; }
    __device__ int row_in_cluster() const { return rank / T::CLUSTER_COLUMNS; }
    __device__ int column_in_cluster() const { return rank % T::CLUSTER_COLUMNS; }
    __device__ int row_tile() const { return now / width * T::CLUSTER_ROWS + row_in_cluster(); }
    __device__ int column_tile() const { return now % width * T::CLUSTER_COLUMNS + column_in_cluster(); }
    __device__ bool inside() const { return row_tile() < row_tiles && column_tile() < column_tiles; }
    __device__ bool last() const { return now + step >= end; }
    __device__ int64_t row() const { return (int64_t)row_tile() * FUSED_M; }
    __device__ int column() const { return column_tile() * FUSED_N; }
    /* bits of the blocks that need the same rows of A, or the same part of B */
    __device__ unsigned same_row() const {
        return ((1u << T::CLUSTER_COLUMNS) - 1) << row_in_cluster() * T::CLUSTER_COLUMNS;
    }
    __device__ unsigned same_column() const {
        unsigned blocks = 0;
        for (int i = 0; i < T::CLUSTER_ROWS; i++) blocks |= 1u << i * T::CLUSTER_COLUMNS;
        return blocks << column_in_cluster();
    }
};

template <int COUNT>
__device__ inline void load_part(unsigned blocks, void *to, const CUtensorMap *map, int row, int column,
                                 uint64_t *barrier) {
    if (COUNT == 1)
        load_tile(to, map, row, column, barrier);
    else
        load_tile_for(blocks, to, map, row, column, barrier);
}

/* The maps of a kernel: the operands, and what the epilogue reads. */
struct TeamMaps {
    CUtensorMap A, B, input[2];
};

/* One thread of a block: asks for its parts of all pieces of all tiles, as far ahead as there are places. */
template <bool GATED, typename E, typename T>
__device__ inline void copy_pieces(const E &epilogue, const TeamMaps &maps, TeamMemory<T> memory,
                                   TeamWalk<T> walk, int pieces) {
    const CUtensorMap *A = &maps.A, *B = &maps.B;
    constexpr int A_PARTS = T::CLUSTER_COLUMNS, B_PARTS = T::CLUSTER_ROWS, BOXES = FUSED_N / FUSED_K,
                  INPUT_BOXES = E::inputs(GATED) * BOXES;
    int part_a = walk.column_in_cluster(), part_b = walk.row_in_cluster(), place = 0, round = 0, tile = 0;
    unsigned for_a = walk.same_row(), for_b = walk.same_column();
    for (; walk.goes_on(); walk.next(), tile++) {
        bool has_bias = T::WRITERS > 0 && E::HAS_BIAS && epilogue.bias && walk.inside();
        int row = (int)walk.row() + part_a * (FUSED_M / A_PARTS), column = walk.column();
        for (int piece = 0; piece < pieces; piece++) {
            char *a = memory.place(place), *b = a + FUSED_A_BYTES;
            uint64_t *full = memory.full(place);
            int k = piece * FUSED_K;
            barrier_wait(memory.empty(place), (round & 1) ^ 1); // the first round finds all places empty
            /* its own parts and those of its neighbours, and with the first piece the bias */
            barrier_expect(full, FUSED_BYTES + (piece == 0 && has_bias ? FUSED_BIAS_BYTES : 0));
            if (piece == 0 && has_bias)
                load_bytes(memory.bias(tile % T::BIASES), epilogue.bias + column, FUSED_BIAS_BYTES, full);
            load_part<A_PARTS>(for_a, a + part_a * (FUSED_A_BYTES / A_PARTS), A, row, k, full);
            if (!E::ROWS_OF_K)
                load_part<B_PARTS>(for_b, b + part_b * (FUSED_B_BYTES / B_PARTS), B,
                                   column + part_b * (FUSED_N / B_PARTS), k, full);
            else
                for (int i = 0; i < BOXES / B_PARTS; i++) {
                    int box = part_b * (BOXES / B_PARTS) + i;
                    load_part<B_PARTS>(for_b, b + box * (FUSED_B_BYTES / BOXES), B, k, column + box * FUSED_K,
                                       full);
                }
            if (T::BY_ROWS && T::PREFETCHES && walk.inside())
                for (int i = piece * INPUT_BOXES / pieces; i < (piece + 1) * INPUT_BOXES / pieces; i++)
                    prefetch_tile(&maps.input[i / BOXES], (int)walk.row(), column + i % BOXES * FUSED_K);
            if (++place == T::PLACES) place = 0, round++;
        }
    }
}

/* A warp's 16 rows of products, plus bias, into its parcel. Rows are 512 bytes; piece i of 16 bytes of row r
 * lies at i ^ (r mod 8), so that neither side meets a bank twice. */
template <bool BIAS>
__device__ inline void stage_products(const float (&d)[128], char *parcel, const char *bias) {
    int lane = (int)threadIdx.x % WARP_SIZE;
    const uint32_t *pairs = (const uint32_t *)bias + lane % 4; // of each 8 columns, the lane has two
    char *row = parcel + lane % 16 * (FUSED_N * sizeof(bf16));
#pragma unroll
    for (int i = 0; i < FUSED_N / 8; i += 2) {
        uint32_t word[4];
#pragma unroll
        for (int block = 0; block < 2; block++) {
            uint32_t pair = BIAS ? pairs[(i + block) * 4] : 0;
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int at = (i + block) * 4 + half * 2;
                float first = d[at], second = d[at + 1];
                if (BIAS) first += __uint_as_float(pair << 16), second += __uint_as_float(pair & 0xffff0000u);
                word[2 * block + half] = word_of(first, second);
            }
        }
        store_matrices(row + (i / 8 * 8 + ((i % 8 + lane / 16) ^ (lane % 8))) * 16, word);
    }
}

/* A parcel and where it belongs. A lane owns 8 columns of 8 rows of each half of a parcel, FUSED_BATCH rows at
 * a time: batch b is of half b / 2, and its rows are 4 (lane / 16) + 2 (b mod 2), the row 8 further, and the
 * next of both. In this order sums over rows are those of the first version. */
template <typename E, bool GATED> struct Parcel {
    E epilogue; /* its pointers stand at the parcel's first number */
    int64_t row;
    int column, columns, rows; /* rows: how many of the matrix there are, from its first on */
    __device__ static int row_of(int batch, int i) {
        return (int)threadIdx.x % WARP_SIZE / 16 * 4 + batch % 2 * 2 + i / 2 + i % 2 * 8;
    }
    __device__ static int piece_of(int batch) { return batch / 2 * 16 + (int)threadIdx.x % 16; }
    template <typename T>
    __device__ Parcel(const E &whole, const TeamWalk<T> &walk, int number, int64_t all_rows, int all_columns)
        : epilogue(whole) {
        row = walk.row() + number * FUSED_WARP_ROWS, column = walk.column(), columns = all_columns;
        rows = all_rows - row < FUSED_WARP_ROWS ? (int)(all_rows - row) : FUSED_WARP_ROWS;
        epilogue = whole.from(row * columns + column);
        asm volatile("" : "+r"(columns)); // so that no product of it waits in a register for the next parcel
    }
    /* A line is 64 numbers, a quarter of a row. */
    __device__ void prefetch() const {
#pragma unroll
        for (int line = (int)threadIdx.x % WARP_SIZE; line < FUSED_WARP_ROWS * 4; line += WARP_SIZE)
            if (line / 4 < rows) epilogue.prefetch_inputs(line / 4 * columns + line % 4 * (FUSED_N / 4));
    }
    /* A row behind the matrix's last reads the last's numbers, which may have been overwritten by then: its
     * products are 0, so nothing comes of them, and nothing is written. */
    __device__ void load(typename E::Inputs *in, int batch, int i) const {
        epilogue.load(in, min(row_of(batch, i), rows - 1) * columns + piece_of(batch) * FUSED_VEC, GATED);
    }
    __device__ void apply(float (&sum)[FUSED_VEC], const Eight &product, const typename E::Inputs &in,
                          int batch, int i) const {
        int r = row_of(batch, i);
        epilogue.template apply<true>(sum, product, in, r * columns + piece_of(batch) * FUSED_VEC, GATED,
                                      r < rows);
    }
};

/* Hands a parcel to the epilogue. in: its first batch of what the epilogue reads; the others are asked for a
 * batch ahead. when_read() is called when nothing of the parcel's memory is needed any more; load_coming(in, i)
 * may then ask for number i of another parcel's first batch. */
template <typename E, bool GATED, typename R, typename L>
__device__ inline void write_parcel(const Parcel<E, GATED> &parcel, const char *memory,
                                    typename E::Inputs (&in)[FUSED_BATCH], const R &when_read,
                                    const L &load_coming) {
    float total[FUSED_VEC] = {};
#pragma unroll
    for (int batch = 0; batch < FUSED_BATCHES; batch++) {
        Eight product[FUSED_BATCH];
        float sum[2][FUSED_VEC] = {};
#pragma unroll
        for (int i = 0; i < FUSED_BATCH; i++) {
            int row = parcel.row_of(batch, i), piece = parcel.piece_of(batch) ^ (row % 8);
            product[i] = load_eight((const bf16 *)(memory + row * (FUSED_N * sizeof(bf16)) + piece * 16));
        }
        if (batch == FUSED_BATCHES - 1) when_read();
#pragma unroll
        for (int i = 0; i < FUSED_BATCH; i++) {
            parcel.apply(sum[i / 2], product[i], in[i], batch, i);
            if (batch < FUSED_BATCHES - 1)
                parcel.load(&in[i], batch + 1, i);
            else
                load_coming(&in[i], i);
        }
#pragma unroll
        for (int i = 0; i < FUSED_VEC; i++)
            total[i] = batch % 2 ? total[i] + (sum[0][i] + sum[1][i]) : sum[0][i] + sum[1][i];
        if (batch % 2)
            parcel.epilogue.add_halves(total, parcel.row,
                                       parcel.column + parcel.piece_of(batch) * FUSED_VEC);
    }
}

/* Where a lane's eight columns of a parcel begin, and how many of its rows the matrix has. */
struct LaneRows {
    int64_t at;
    int column, block, count; /* block: of FUSED_WARP_ROWS rows */
    template <typename T> __device__ LaneRows(const TeamWalk<T> &walk, int number, int64_t rows, int columns) {
        int64_t row = walk.row() + number * FUSED_WARP_ROWS, left = rows - row;
        column = walk.column() + (int)threadIdx.x % WARP_SIZE * FUSED_VEC;
        block = (int)(row / FUSED_WARP_ROWS), at = row * columns + column;
        count = left < 0 ? 0 : left < FUSED_WARP_ROWS ? (int)left : FUSED_WARP_ROWS;
    }
};
/* The lane's eight columns of a row. */
__device__ inline Eight row_of_parcel(const char *parcel, int row) {
    int piece = (int)threadIdx.x % WARP_SIZE ^ row % 8;
    return load_eight((const bf16 *)(parcel + row * FUSED_ROW_BYTES + piece * 16));
}

/* A writing warp, row by row: hands parcels to the epilogue; of each row, a lane has eight columns. What the
 * epilogue reads is asked for AHEAD rows before, across parcels too, and waits in shared memory; a lane reads
 * what it has copied itself, so that nobody has to wait for others. */
template <bool GATED, typename E, typename T>
__device__ inline void write_rows(const E &epilogue, TeamMemory<T> memory, TeamWalk<T> walk, int64_t rows,
                                  int columns) {
    constexpr int INPUTS = E::inputs(GATED), AHEAD = T::RING_ROWS / (INPUTS > 1 ? 2 : 1),
                  TOGETHER = T::OWN ? 1 : 2; // rows at a time
    int writer = (int)threadIdx.x / WARP_SIZE - (T::OWN ? WARPGROUP / WARP_SIZE : 1),
        lane = (int)threadIdx.x % WARP_SIZE, number = writer, tiles = 0;
    char *ring = memory.ring(writer) + lane * 16;
    auto done = [&] { return T::OWN ? !walk.goes_on() : walk.last(); };
    auto go_inside = [&] {
        while (!done() && !walk.inside()) walk.next();
    };
    /* For a row behind the matrix's last the last again: its products are 0, and 0 times that has to be 0. */
    auto ask = [&](const LaneRows &from, int row, char *place) {
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            int64_t at = from.at + min(row + i, from.count - 1) * columns;
#pragma unroll
            for (int k = 0; k < INPUTS; k++)
                if (from.count > 0)
                    copy_aside(place + (i * INPUTS + k) * FUSED_ROW_BYTES, epilogue.input(k) + at);
        }
        copies_commit();
    };
    go_inside();
    if (done()) return;
    LaneRows now(walk, number, rows, columns);
#pragma unroll
    for (int row = 0; row < AHEAD; row += TOGETHER) ask(now, row, ring + row * (INPUTS * FUSED_ROW_BYTES));
    for (bool more = true; more;) {
        float sum[FUSED_VEC] = {};
        int mine = number, parity = tiles & 1;
        number += T::WRITERS;
        if (number >= T::PARCELS) number -= T::PARCELS, tiles++, walk.next(), go_inside();
        more = !done();
        LaneRows next(walk, number, more ? rows : 0, columns);
        const char *parcel = memory.parcel(mine);
        barrier_wait(memory.staged(T::OWN ? mine : mine / (WARPGROUP / WARP_SIZE)), parity);
#pragma unroll 1
        for (int row = 0; row < FUSED_WARP_ROWS; row += TOGETHER) {
            typename E::Inputs in[TOGETHER];
            char *place = ring + row % AHEAD * (INPUTS * FUSED_ROW_BYTES);
            copies_wait<AHEAD / TOGETHER - 1>();
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
#pragma unroll
                for (int k = 0; k < INPUTS; k++)
                    E::take(&in[i], k, load_eight((const bf16 *)(place + (i * INPUTS + k) * FUSED_ROW_BYTES)));
            /* the places are free again */
            int later = row + AHEAD;
            if (later < FUSED_WARP_ROWS)
                ask(now, later, place);
            else
                ask(next, later - FUSED_WARP_ROWS, place);
            if (row >= now.count) continue;
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
                epilogue.template apply<true>(sum, row_of_parcel(parcel, row + i), in[i],
                                              now.at + (row + i) * columns, GATED, row + i < now.count);
        }
        __syncwarp(); // all lanes have read the parcel
        if (lane == 0) barrier_arrive(memory.drained(mine));
        epilogue.put_sums(sum, now.block, now.column);
        now = next;
    }
}

/* The same by the warp that multiplied the parcel, when nothing is left to multiply. */
template <bool GATED, typename E>
__device__ inline void write_last_rows(const E &epilogue, const LaneRows &rows, const char *parcel,
                                       int columns) {
    float sum[FUSED_VEC] = {};
#pragma unroll 1
    for (int first = 0; first < rows.count; first += FUSED_BATCH) {
        typename E::Inputs in[FUSED_BATCH];
#pragma unroll
        for (int i = 0; i < FUSED_BATCH; i++)
            if (first + i < rows.count) epilogue.load(&in[i], rows.at + (first + i) * columns, GATED);
#pragma unroll
        for (int i = 0; i < FUSED_BATCH; i++)
            if (first + i < rows.count)
                epilogue.template apply<true>(sum, row_of_parcel(parcel, first + i), in[i],
                                              rows.at + (first + i) * columns, GATED, true);
    }
    epilogue.put_sums(sum, rows.block, rows.column);
}

/* Two groups of four warps: each multiplies 64 rows of every tile and hands them on. A tile's bias is
 * overwritten with the first piece of the tile BIASES = PLACES + 1 later. That piece waits until the one PLACES
 * before it, so one of a later tile than the bias's, has been multiplied, and by then all warps have used the
 * bias. */
template <bool GATED, typename E, typename T>
__device__ inline void multiply_tiles(const E &epilogue, TeamMemory<T> memory, TeamWalk<T> walk, int64_t rows,
                                      int columns, int pieces) {
    int group = (int)threadIdx.x / WARPGROUP - T::OTHERS, thread = (int)threadIdx.x % WARPGROUP,
        warp = thread / WARP_SIZE, parcel = group * (WARPGROUP / WARP_SIZE) + warp, place = 0, round = 0,
        staged = 0, tile = 0;
    TeamWalk<T> last_walk = walk; // where the last tile is
    bool keeps = false;           // its parcel, which is of the last tile
    /* thread i speaks for its group to block i */
    bool speaks = thread < T::CLUSTER && ((walk.same_row() | walk.same_column()) >> thread & 1);
    auto release = [&](int done) {
        if (!speaks) return;
        if (T::CLUSTER == 1)
            barrier_arrive(memory.empty(done));
        else
            barrier_arrive_at(memory.empty(done), thread);
    };
    for (; walk.goes_on(); walk.next(), tile++) {
        float d[128];
        int last = -1; // the place of the piece before
        if (!T::BY_ROWS && T::PREFETCHES && walk.last() && walk.inside())
            Parcel<E, GATED>(epilogue, walk, parcel, rows, columns).prefetch();
        for (int piece = 0; piece < pieces; piece++) {
            const char *a = memory.place(place) + group * (FUSED_A_BYTES / 2),
                       *b = memory.place(place) + FUSED_A_BYTES;
            barrier_wait(memory.full(place), round & 1);
            products_begin();
#pragma unroll
            for (int k = 0; k < FUSED_K / 16; k++) {
                uint64_t of_a = operand(a + k * 32, 16, 1024);
                auto of_b = [&](int half) {
                    const char *from = b + half * (FUSED_B_BYTES / 2);
                    return E::ROWS_OF_K ? operand(from + k * 2048, FUSED_B_BYTES / 4, 1024)
                                        : operand(from + k * 32, 16, 1024);
                };
                bool add = piece > 0 || k > 0;
                if constexpr (T::HALVES) {
                    product_64x128<E::ROWS_OF_K, 0>(d, of_a, of_b(0), add);
                    product_64x128<E::ROWS_OF_K, 1>(d, of_a, of_b(1), add);
                } else {
                    product_64x256<E::ROWS_OF_K>(d, of_a, of_b(0), add);
                }
            }
            products_commit();
            products_wait<1>(); // the piece before has been multiplied: its place is free
            if (last >= 0) release(last);
            last = place;
            if (++place == T::PLACES) place = 0, round++;
        }
        products_wait<0>();
        products_done(d);
        release(last);
        if (!walk.inside()) continue;
        if constexpr (T::WRITERS == 0) {
            write_products(epilogue, d, walk.row() + parcel * FUSED_WARP_ROWS, rows, walk.column(), columns);
        } else {
            barrier_wait(memory.drained(parcel), (staged++ & 1) ^ 1);
            if (E::HAS_BIAS && epilogue.bias)
                stage_products<true>(d, memory.parcel(parcel), memory.bias(tile % T::BIASES));
            else
                stage_products<false>(d, memory.parcel(parcel), nullptr);
            __syncwarp(); // all lanes have stored
            keeps = !T::OWN && walk.last(), last_walk = walk;
            if (!keeps && thread % WARP_SIZE == 0) barrier_arrive(memory.staged(T::OWN ? parcel : group));
        }
    }
    if constexpr (T::WRITERS > 0 && !T::OWN) {
        if (!keeps) return;
        if constexpr (T::BY_ROWS) {
            write_last_rows<GATED>(epilogue, LaneRows(last_walk, parcel, rows, columns), memory.parcel(parcel),
                                   columns);
            return;
        }
        Parcel<E, GATED> mine(epilogue, last_walk, parcel, rows, columns);
        typename E::Inputs in[FUSED_BATCH];
#pragma unroll
        for (int i = 0; i < FUSED_BATCH; i++) mine.load(&in[i], 0, i);
        write_parcel(mine, memory.parcel(parcel), in, [] {}, [](typename E::Inputs *, int) {});
    }
}

/* The writing warps take the parcels of all tiles but the last in turns. Each meets both groups in every tile,
 * so that none can miss a phase of `staged`. */
template <bool GATED, typename E, typename T>
__device__ inline void write_tiles(const E &epilogue, TeamMemory<T> memory, TeamWalk<T> walk, int64_t rows,
                                   int columns) {
    int number = (int)threadIdx.x / WARP_SIZE - 1, tiles = 0;
    typename E::Inputs in[FUSED_BATCH];
    auto go_inside = [&] {
        while (!walk.last() && !walk.inside()) walk.next();
    };
    go_inside();
    if (walk.last()) return;
    Parcel<E, GATED> coming(epilogue, walk, number, rows, columns);
#pragma unroll
    for (int i = 0; i < FUSED_BATCH; i++) coming.load(&in[i], 0, i);
    for (bool more = true; more;) {
        Parcel<E, GATED> parcel = coming;
        int mine = number, parity = tiles & 1;
        number += T::WRITERS;
        if (number >= T::PARCELS) number -= T::PARCELS, tiles++, walk.next(), go_inside();
        more = !walk.last();
        if (T::PREFETCHES && more) Parcel<E, GATED>(epilogue, walk, number, rows, columns).prefetch();
        barrier_wait(memory.staged(mine / (WARPGROUP / WARP_SIZE)), parity);
        auto when_read = [&] {
            __syncwarp(); // all lanes have read the parcel
            if (threadIdx.x % WARP_SIZE == 0) barrier_arrive(memory.drained(mine));
            if (more) coming = Parcel<E, GATED>(epilogue, walk, number, rows, columns);
        };
        /* after the last parcel it asks for that one's numbers again */
        write_parcel(parcel, memory.parcel(mine), in, when_read,
                     [&](typename E::Inputs *to, int i) { coming.load(to, 0, i); });
    }
}

/* No block leaves while another of its cluster may still arrive at its barriers. */
template <typename T> __device__ inline void leave() {
    if (T::CLUSTER > 1) cluster_sync();
}

/* computes: A B^T (B's rows along K) or A B (B's rows are K), each result handed to the epilogue
 *           (GATED: epilogue.gated())
 * launch:   a cluster of T::CLUSTER blocks as often as the device holds, block 384 or 640: a warp copies,
 *           T::WRITERS write, eight multiply 16 x 256 of a tile each
 * traffic:  A, B and what the epilogue reads and writes, each once; from the second cache, a block takes
 *           A / T::CLUSTER_COLUMNS + B / T::CLUSTER_ROWS of a tile
 * needs:    sm_90a; columns a multiple of 256, K of 64; T::SHARED bytes of shared memory
 * numerics: float sums along K in one order: deterministic; the product is rounded to bf16 before the epilogue */
template <typename E, typename T, bool GATED>
__global__ void __launch_bounds__(T::THREADS, 1)
    team_product_kernel(const __grid_constant__ TeamMaps maps, E epilogue, int64_t rows, int columns, int K) {
    TeamMemory<T> memory = {dynamic_shared()};
    TeamWalk<T> walk(rows, columns);
    int pieces = K / FUSED_K;
    if (threadIdx.x == 0) {
        /* two groups of every block of the same row or column, this one once */
        constexpr int READERS = 2 * (T::CLUSTER_ROWS + T::CLUSTER_COLUMNS - 1);
        for (int i = 0; i < T::PLACES; i++)
            barrier_init(memory.full(i), 1), barrier_init(memory.empty(i), READERS);
        for (int i = 0; i < T::STAGED; i++) barrier_init(memory.staged(i), T::OWN ? 1 : WARPGROUP / WARP_SIZE);
        for (int i = 0; i < T::PARCELS; i++) barrier_init(memory.drained(i), 1);
        barriers_ready();
        if (T::CLUSTER > 1) cluster_barriers_ready();
    }
    __syncthreads(); // the barriers are initialised
    if (T::CLUSTER > 1) cluster_sync(); // the neighbours' too
    if (threadIdx.x >= T::OTHERS * WARPGROUP) {
        if (T::WRITERS == 0 || T::OWN) more_registers<T::MULTIPLY_REGISTERS>();
        multiply_tiles<GATED>(epilogue, memory, walk, rows, columns, pieces);
        leave<T>();
    } else if (threadIdx.x >= WARPGROUP) {
        fewer_registers<T::WRITE_REGISTERS>();
        if constexpr (T::OWN) write_rows<GATED>(epilogue, memory, walk, rows, columns);
        leave<T>();
    } else {
        if (T::WRITERS == 0 || T::OWN) fewer_registers<T::COPY_REGISTERS>();
        if (threadIdx.x == 0)
            copy_pieces<GATED>(epilogue, maps, memory, walk, pieces);
        else if (threadIdx.x >= WARP_SIZE && T::WRITERS > 0 && !T::OWN) {
            if constexpr (T::BY_ROWS)
                write_rows<GATED>(epilogue, memory, walk, rows, columns);
            else
                write_tiles<GATED>(epilogue, memory, walk, rows, columns);
        }
        __syncwarp(); // the copying warp is one again
        leave<T>();
    }
}

template <typename T, bool GATED, typename E>
static void launch_team(Context *context, const E &epilogue, const bf16 *x, const bf16 *weight, int64_t rows,
                        int64_t columns, int64_t K) {
    static int most = 0; // clusters that run at the same time
    if (most == 0)
        most = clusters_at_once(context, team_product_kernel<E, T, GATED>, T::CLUSTER, T::THREADS,
                                T::SHARED);
    TeamMaps maps = {};
    maps.A = tile_map(x, rows, K, FUSED_M / T::CLUSTER_COLUMNS);
    maps.B = E::ROWS_OF_K ? tile_map(weight, K, columns, FUSED_K)
                          : tile_map(weight, columns, K, FUSED_N / T::CLUSTER_ROWS);
    for (int i = 0; i < E::inputs(GATED); i++)
        maps.input[i] = tile_map(epilogue.input(i), rows, columns, FUSED_M);
    int64_t clusters =
        ceil_div(rows, FUSED_M * T::CLUSTER_ROWS) * ceil_div(columns, FUSED_N * T::CLUSTER_COLUMNS);
    LAUNCH_CLUSTERS((team_product_kernel<E, T, GATED>), clusters < most ? clusters : most, T::CLUSTER,
                    T::THREADS, T::SHARED, context, maps, epilogue, rows, (int)columns, (int)K);
}
/* x is rows,K; weight is columns,K, or K,columns if the epilogue says so. */
template <typename T, typename E>
static void team_product(Context *context, const E &epilogue, const bf16 *x, const bf16 *weight, int64_t rows,
                         int64_t columns, int64_t K) {
    if (context->dry_run) return;
    if (epilogue.gated())
        launch_team<T, true>(context, epilogue, x, weight, rows, columns, K);
    else
        launch_team<T, false>(context, epilogue, x, weight, rows, columns, K);
}

/* ----------------------------------------------------------------------------------------------------------
 * Launchers
 */

/* May the kernel do a product with so many rows and columns? The pointers are all that it and the epilogue use. */
template <typename T, typename... P>
static bool fused_fits(const Context *context, int64_t rows, int64_t columns, int64_t K, const P *...pointers) {
    return std::is_same<T, bf16>::value && FUSED_PRODUCTS && context->hopper && rows > FEW_ROWS &&
           columns % FUSED_N == 0 && K % FUSED_K == 0 && vectorises<bf16>(columns, pointers...);
}

/* x is rows,K; weight is columns,K, or K,columns if the epilogue says so. */
template <typename E>
static void fused_product(Context *context, const E &epilogue, const bf16 *x, const bf16 *weight, int64_t rows,
                          int64_t columns, int64_t K) {
    if (FUSED_VERSION >= 2) {
        team_product<BestTeam<E>>(context, epilogue, x, weight, rows, columns, K);
        return;
    }
    if (context->dry_run) return;
    CUtensorMap A = tile_map(x, rows, K, FUSED_M),
                B = E::ROWS_OF_K ? tile_map(weight, K, columns, FUSED_K) : tile_map(weight, columns, K, FUSED_N);
    int64_t tiles = ceil_div(rows, FUSED_M) * (columns / FUSED_N);
    unsigned blocks = (unsigned)(tiles < context->num_sms ? tiles : context->num_sms);
    LAUNCH_WITH_SHARED(fused_product_kernel<E>, blocks, FUSED_THREADS, FUSED_SHARED, context, A, B, epilogue, rows,
                       (int)columns, (int)K);
}

/* y = x W^T + bias (NULL: none);  h = dropout(silu(y) other) (NULL: as if 1);  s (NULL: not wanted) = silu(y).
 * y, h, other (M,N), x (M,K), weight (N,K) */
template <typename T>
static void linear_silu_forward(Context *context, T *h, T *y, T *s, const T *x, const T *weight, const T *bias,
                                const T *other, int64_t M, int64_t N, int64_t K, Dropout dropout) {
    if (!s && !dropout.threshold && fused_fits<T>(context, M, N, K, h, y, x, weight, bias, other)) {
        if constexpr (std::is_same<T, bf16>::value)
            fused_product(context, SiluEpilogue{y, h, bias, other}, x, weight, M, N, K);
        return;
    }
    linear_forward<T>(context, y, x, weight, bias, nullptr, M, N, K);
    silu_gate(context, h, s, y, other, M * N, dropout);
}

/* h = dropout(silu(x) a), g = dh = dy W:  dx = g a silu'(x);  da = g silu(x);  dbias += column sums of dx, with
 * the next add_sums;  and h again. dy (M,N), weight (N,K), the others (M,K); da, h, a and dbias may be NULL,
 * and h may be x. */
template <typename T>
static void linear_gate_backward(Context *context, T *dx, T *da, T *h, float *dbias, const T *dy, const T *weight,
                                 const T *x, const T *a, int64_t M, int64_t N, int64_t K, Dropout dropout) {
    if (!dropout.threshold && fused_fits<T>(context, M, K, N, dx, da, h, dy, weight, x, a)) {
        float *partial = take_sum(context, dbias, ceil_div(M, FUSED_M) * (FUSED_M / FUSED_WARP_ROWS), K);
        if constexpr (std::is_same<T, bf16>::value)
            fused_product(context, GateEpilogue{dx, da, h, x, a, partial, (int)K}, dy, weight, M, K, N);
        return;
    }
    linear_backward_input(context, dx, false, dy, weight, M, N, K);
    silu_gate_backward(context, dx, da, h, dbias, dx, x, a, M, K, dropout);
}

#endif
