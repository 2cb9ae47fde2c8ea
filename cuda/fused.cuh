/* fused.cuh - products whose results go through SiLU and a gate at once, written out one time instead of
 * written, read and written again: the largest pointwise steps of a block, for Hopper.
 *
 *     forward    y = x W^T + bias;  h = silu(y) other               v, the gated attention, the FFN's hidden
 *     backward   g = dy W;  dx = g a silu'(x);  da = g silu(x);  h = silu(x) a
 *                g = weights^T da;  dx = g silu'(x)                 attention's v = silu(x)
 *
 * One block a multiprocessor walks over tiles of 128 x 256. Its warps have three trades, so that the tensor
 * cores go on with the next tile while one is written:
 *
 *     1 copies      | tile 0      | tile 1      | tile 2      |
 *     8 multiply      | tile 0     >| tile 1     >| tile 2     >
 *     3 write                       | tile 0      | tile 1      |
 *
 * The copying warp asks for pieces of 64 along K, three ahead, into a ring of places; barriers hand each
 * place to (`full`) and fro (`empty`). The multiplying warps, two groups of four, multiply 16 rows of the
 * tile each. At > a warp rounds them to bf16 and puts them into shared memory, its parcel; the writing
 * warps take the parcels in turns (`staged`, a group's four parcels) and give them back (`drained`, one).
 * They go row by row, and what the epilogue reads waits in a ring of their own, as large as shared memory
 * allows: 10 rows in the forward, 12 in the backward, or 6 of two arrays. A block's last tile is written by
 * those that have multiplied it, since nothing else is left for them to do.
 *
 * What the rings ask for and all that is written leaves the second cache first: this kernel reads none of it
 * again, but the weight for every row of tiles, and the rows of A for every column of them.
 *
 * On an H100 80GB, `build/ladder_products --quick --repeats 15`, mega200M's wr forward and wh2 backward
 * take 0.271 and 0.356 ms; the products alone, by cuBLAS, 0.205 each, and with a kernel after them 0.343
 * and 0.515. What was slower there: multiplying warps that write every tile themselves (0.338 and 0.442),
 * also in clusters of two that copy the weight for each other (0.345 and 0.430); writers that hold batches
 * of rows in registers (0.276 and 0.578); eight writers (0.300 and 0.368); and these three when the second
 * cache is asked for their rows a tile ahead (0.297 and 0.416), or in pairs of blocks that copy the weight
 * for each other (mega1.3B's 0.442 and 0.502, not 0.437 and 0.495). All this with rings of 8 rows, and with
 * nothing that leaves the second cache first; both together took a training step of mega1.3B from 267.7 to
 * 264.3 ms. Asking that cache for A and the weight four pieces ahead took it back to 267.4, although in the
 * ladder, by pairs and with rings of 8, it was faster (0.432 and 0.476, not 0.436 and 0.501).
 *
 * Everything else (other devices, float, dropout of h, sizes that tiles do not divide) takes the product of
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

enum {
    FUSED_M = 128, FUSED_N = 256, FUSED_K = 64, // a tile, and the depth of a piece
    FUSED_ROW_BYTES = FUSED_N * 2, FUSED_VEC = 8, // a lane has 8 of a tile's columns
    FUSED_A_BYTES = FUSED_M * FUSED_K * 2, FUSED_B_BYTES = FUSED_N * FUSED_K * 2,
    FUSED_PLACES = 3, FUSED_PLACE_BYTES = FUSED_A_BYTES + FUSED_B_BYTES,
    /* the rows of a tile: of a group of warps, and of one warp, which are a parcel */
    FUSED_GROUPS = 2, FUSED_GROUP_WARPS = 4, FUSED_WARP_ROWS = 16,
    FUSED_PARCELS = FUSED_M / FUSED_WARP_ROWS, FUSED_PARCEL_BYTES = FUSED_WARP_ROWS * FUSED_ROW_BYTES,
    /* a writer's ring holds so many rows of arrays that the epilogue reads, two of them at most; the backward
     * has no bias, so more room */
    FUSED_WRITERS = 3, FUSED_INPUTS = 2, FUSED_RING_ROWS = 10, FUSED_BACKWARD_RING_ROWS = 12,
    FUSED_BIASES = FUSED_PLACES + 1, FUSED_BIAS_BYTES = FUSED_N * 2,
    FUSED_FORWARD_BYTES =
        FUSED_WRITERS * FUSED_RING_ROWS * FUSED_ROW_BYTES + FUSED_BIASES * FUSED_BIAS_BYTES,
    FUSED_BACKWARD_BYTES = FUSED_WRITERS * FUSED_BACKWARD_RING_ROWS * FUSED_ROW_BYTES,
    FUSED_BARRIERS = 2 * FUSED_PLACES + FUSED_GROUPS + FUSED_PARCELS,
    FUSED_THREADS = (1 + FUSED_GROUPS) * WARPGROUP,
    FUSED_SHARED = FUSED_PLACES * FUSED_PLACE_BYTES + FUSED_PARCELS * FUSED_PARCEL_BYTES +
                   FUSED_BARRIERS * 8 + FUSED_BACKWARD_BYTES
};
static_assert(FUSED_FORWARD_BYTES <= FUSED_BACKWARD_BYTES, "the same shared memory serves both directions");
static_assert(FUSED_SHARED <= 232448, "as much shared memory as a block can have");

/* Eight bf16 numbers as they move: in words, since the compiler keeps arrays of bf16 element by element. */
using Eight = Packed<uint32_t, FUSED_VEC / 2>;
__device__ inline Eight load_eight(const bf16 *from) {
    return packed<FUSED_VEC / 2>(reinterpret_cast<const uint32_t *>(from));
}
/* What is written leaves the second cache before what is read again. */
__device__ inline void store_eight(bf16 *to, const Eight &words) {
    __stcs(reinterpret_cast<uint4 *>(to), make_uint4(words.v[0], words.v[1], words.v[2], words.v[3]));
}
__device__ inline float number(const Eight &words, int i) {
    return i % 2 ? high_bf16(words.v[i / 2]) : low_bf16(words.v[i / 2]);
}

/* ---- epilogues ----
 *
 * What becomes of eight numbers of a row of the product. GATED: is there a second factor, `other` or `a`?
 */

/* y = product + bias;  h = silu(y) other */
template <bool GATED> struct SiluEpilogue {
    static constexpr bool ROWS_OF_K = false; // the weight's rows run along K
    static constexpr int INPUTS = GATED ? 1 : 0, RING_ROWS = FUSED_RING_ROWS;
    bf16 *y, *h;
    const bf16 *bias, *other; /* bias may be NULL */
    __device__ const bf16 *input(int) const { return other; }
    /* `at`: of the eight in y and h, in this row; nothing is written unless there is such a row */
    __device__ void apply(float (&)[FUSED_VEC], const Eight &product, const Eight (&in)[FUSED_INPUTS],
                          int64_t at, int, bool there) const {
        Eight out;
        if (there) store_eight(y + at, product);
#pragma unroll
        for (int i = 0; i < FUSED_VEC; i += 2) {
            float value[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float v = number(product, i + j);
                value[j] = v * quick_sigmoid(v);
                if (GATED) value[j] *= number(in[0], i + j);
            }
            out.v[i / 2] = word_of(value[0], value[1]);
        }
        if (there) store_eight(h + at, out);
    }
    __device__ void put_sums(float (&)[FUSED_VEC], int, int) const {}
};

/* g = product;  dx = g a silu'(x);  da = g silu(x);  h = silu(x) a; partial sums of dx over 16 rows each.
 * ONLY_DX: neither da nor h. */
template <bool GATED, bool ONLY_DX = false> struct GateEpilogue {
    static constexpr bool ROWS_OF_K = true; // the weight's rows are K
    static constexpr int INPUTS = GATED ? 2 : 1, RING_ROWS = FUSED_BACKWARD_RING_ROWS;
    static constexpr const bf16 *bias = nullptr;
    bf16 *dx, *da, *h; /* da and h may be NULL; h may be x: the thread that writes an element has read it */
    const bf16 *x, *a;
    float *partial; /* may be NULL */
    int columns, dx_gap, da_gap;
    __device__ const bf16 *input(int i) const { return i == 0 ? x : a; }
    __device__ void apply(float (&sum)[FUSED_VEC], const Eight &product, const Eight (&in)[FUSED_INPUTS],
                          int64_t at, int row, bool there) const {
        Eight dx_out, da_out, h_out;
#pragma unroll
        for (int i = 0; i < FUSED_VEC; i += 2) {
            float dv[2], dother[2], again[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float grad = number(product, i + j), v = number(in[0], i + j), s = quick_sigmoid(v);
                float factor = GATED ? number(in[1], i + j) : 1.0f;
                float silu = v * s; // silu' = s + silu (1 - s)
                dv[j] = grad * factor * (s + fmaf(-silu, s, silu));
                dother[j] = grad * silu;
                again[j] = silu * factor; // in the order of the forward: the same bits
                sum[i + j] += dv[j];
            }
            dx_out.v[i / 2] = word_of(dv[0], dv[1]);
            da_out.v[i / 2] = word_of(dother[0], dother[1]);
            h_out.v[i / 2] = word_of(again[0], again[1]);
        }
        asm volatile("" ::: "memory"); // so that there is one code for rows that are there or not
        if (there) store_eight(dx + at + (int64_t)row * dx_gap, dx_out);
        if (!ONLY_DX && there && da) store_eight(da + at + (int64_t)row * da_gap, da_out);
        if (!ONLY_DX && there && h) store_eight(h + at, h_out);
    }
    /* Sums over all rows of a parcel, of which this is number `block` of the matrix. */
    __device__ void put_sums(float (&sum)[FUSED_VEC], int block, int column) const {
        if (!partial) return;
        float *to = partial + (int64_t)block * columns + column;
        store<4>(to, *reinterpret_cast<float(*)[4]>(sum));
        store<4>(to + 4, *reinterpret_cast<float(*)[4]>(sum + 4));
    }
};

/* ---- the kernel ---- */

/* Shared memory: the ring of places, the parcels, the barriers, the writers' rings, the biases of the last
 * tiles' columns. */
struct FusedMemory {
    char *memory;
    __device__ char *place(int i) const { return memory + i * FUSED_PLACE_BYTES; }
    __device__ char *parcel(int i) const { return place(FUSED_PLACES) + i * FUSED_PARCEL_BYTES; }
    __device__ uint64_t *full(int place) const { return (uint64_t *)parcel(FUSED_PARCELS) + place; }
    __device__ uint64_t *empty(int place) const { return full(FUSED_PLACES) + place; }
    __device__ uint64_t *staged(int group) const { return empty(FUSED_PLACES) + group; }
    __device__ uint64_t *drained(int parcel) const { return staged(FUSED_GROUPS) + parcel; }
    __device__ char *ring(int writer, int rows) const {
        return (char *)drained(FUSED_PARCELS) + writer * rows * FUSED_ROW_BYTES;
    }
    __device__ char *bias(int i) const { return ring(FUSED_WRITERS, FUSED_RING_ROWS) + i * FUSED_BIAS_BYTES; }
};

/* ---- walks: which tiles a block makes, one after the other, and of which pieces ----
 *
 * The host knows the sizes, and each thread of the kernel begins with start(). Of A, the piece at k is the
 * columns from k on or, where A_ROWS_OF_K, the rows from first_k() + k and the columns from a_column() on. Of
 * a B whose rows are K, it is the rows from first_k() + k on. */

/* All tiles of a product whose A has rows along K, along the columns first. */
struct FusedWalk {
    static constexpr bool A_ROWS_OF_K = false;
    int tile, end, step, column_tiles, K;
    FusedWalk(int64_t rows, int64_t columns, int64_t depth) {
        tile = 0, step = 1, column_tiles = (int)(columns / FUSED_N), K = (int)depth;
        end = (int)ceil_div(rows, FUSED_M) * column_tiles;
    }
    int units() const { return end; }
    __device__ void start() { tile = (int)blockIdx.x, step = (int)gridDim.x; }
    __device__ bool goes_on() const { return tile < end; }
    __device__ bool last() const { return tile + step >= end; }
    __device__ void next() { tile += step; }
    __device__ int row() const { return tile / column_tiles * FUSED_M; }
    __device__ int column() const { return tile % column_tiles * FUSED_N; }
    __device__ int pieces() const { return K / FUSED_K; }
    __device__ int first_k() const { return 0; }
    __device__ int a_column() const { return 0; }
};

/* The tiles of dv = weights^T da, where A and B have a row for each query of all chunks and a tile's rows are
 * 128 keys of one chunk. K are the queries from the first of these keys on: none before sees them. So the
 * first keys of a chunk have the most pieces and the last keys the fewest. A unit is one of the first and,
 * after it, as far from the end, one of the last, so that all units are about equally long. The units of a
 * chunk follow one another, those of the same columns first: what blocks read at a time is in the caches. */
struct CausalWalk {
    static constexpr bool A_ROWS_OF_K = true;
    int unit, end, step, second; /* second: it is at the unit's second tile */
    int chunk_size, first_column, column_tiles, key_tiles, pairs;
    CausalWalk(int64_t chunks, int64_t C, int64_t from_column, int64_t columns) {
        unit = second = 0, step = 1, chunk_size = (int)C, first_column = (int)from_column;
        column_tiles = (int)(columns / FUSED_N), key_tiles = (int)(C / FUSED_M), pairs = (key_tiles + 1) / 2;
        end = (int)chunks * column_tiles * pairs;
    }
    int units() const { return end; }
    __device__ void start() { unit = (int)blockIdx.x, step = (int)gridDim.x; }
    __device__ bool goes_on() const { return unit < end; }
    /* the middle one of an odd number of tiles is alone */
    __device__ bool alone() const { return 2 * (unit % pairs) + 1 == key_tiles; }
    __device__ bool last() const { return unit + step >= end && (second || alone()); }
    __device__ void next() {
        if (second || alone())
            unit += step, second = 0;
        else
            second = 1;
    }
    __device__ int a_column() const {
        int pair = unit % pairs;
        return (second ? key_tiles - 1 - pair : pair) * FUSED_M;
    }
    __device__ int row() const { return unit / (pairs * column_tiles) * chunk_size + a_column(); }
    __device__ int column() const { return first_column + unit / pairs % column_tiles * FUSED_N; }
    __device__ int pieces() const { return (chunk_size - a_column()) / FUSED_K; }
    __device__ int first_k() const { return row(); }
};

/* One thread of a block: asks for all pieces of all tiles, as far ahead as there are places. */
template <typename E, typename W>
__device__ inline void copy_pieces(const E &epilogue, const CUtensorMap &A, const CUtensorMap &B,
                                   FusedMemory memory, W walk) {
    /* of A and B, where their rows are K */
    constexpr int A_BOXES = FUSED_M / FUSED_K, BOXES = FUSED_N / FUSED_K;
    int place = 0, round = 0;
    for (int tile = 0; walk.goes_on(); walk.next(), tile++) {
        int row = walk.row(), column = walk.column(), pieces = walk.pieces();
        int first_k = walk.first_k(), a_column = walk.a_column();
        for (int piece = 0; piece < pieces; piece++) {
            char *a = memory.place(place), *b = a + FUSED_A_BYTES;
            uint64_t *full = memory.full(place);
            int k = piece * FUSED_K;
            bool with_bias = piece == 0 && epilogue.bias;
            barrier_wait(memory.empty(place), (round & 1) ^ 1); // the first round finds all places empty
            barrier_expect(full, FUSED_PLACE_BYTES + (with_bias ? FUSED_BIAS_BYTES : 0));
            if (with_bias)
                load_bytes(memory.bias(tile % FUSED_BIASES), epilogue.bias + column, FUSED_BIAS_BYTES, full);
            if (!W::A_ROWS_OF_K)
                load_tile(a, &A, row, k, full);
            else
                for (int i = 0; i < A_BOXES; i++)
                    load_tile(a + i * (FUSED_A_BYTES / A_BOXES), &A, first_k + k, a_column + i * FUSED_K,
                              full);
            if (!E::ROWS_OF_K)
                load_tile(b, &B, column, k, full);
            else
                for (int i = 0; i < BOXES; i++)
                    load_tile(b + i * (FUSED_B_BYTES / BOXES), &B, first_k + k, column + i * FUSED_K, full);
            if (++place == FUSED_PLACES) place = 0, round++;
        }
    }
}

/* A warp's 16 rows of products, plus bias, into its parcel. Rows are 512 bytes; piece i of 16 bytes of row r
 * lies at i ^ (r mod 8), so that neither side meets a bank twice. */
template <bool BIAS>
__device__ inline void stage_products(const float (&d)[128], char *parcel, const char *bias) {
    int lane = (int)threadIdx.x % WARP_SIZE;
    const uint32_t *pairs = (const uint32_t *)bias + lane % 4; // of each 8 columns, the lane has two
    char *row = parcel + lane % 16 * FUSED_ROW_BYTES;
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
                if (BIAS) first += low_bf16(pair), second += high_bf16(pair);
                word[2 * block + half] = word_of(first, second);
            }
        }
        store_matrices(row + (i / 8 * 8 + ((i % 8 + lane / 16) ^ (lane % 8))) * 16, word);
    }
}

/* Where a lane's eight columns of a parcel begin, and how many of its rows the matrix has. */
struct LaneRows {
    int64_t at;
    int row, column, block, count; /* row: the first; block: of FUSED_WARP_ROWS rows */
    template <typename W> __device__ LaneRows(const W &walk, int parcel, int64_t rows, int columns) {
        row = walk.row() + parcel * FUSED_WARP_ROWS;
        int64_t left = rows - row;
        column = walk.column() + (int)threadIdx.x % WARP_SIZE * FUSED_VEC;
        block = row / FUSED_WARP_ROWS, at = (int64_t)row * columns + column;
        count = left < 0 ? 0 : left < FUSED_WARP_ROWS ? (int)left : FUSED_WARP_ROWS;
    }
};
/* The lane's eight columns of a row. */
__device__ inline Eight row_of_parcel(const char *parcel, int row) {
    int piece = (int)threadIdx.x % WARP_SIZE ^ row % 8;
    return load_eight((const bf16 *)(parcel + row * FUSED_ROW_BYTES + piece * 16));
}

/* A writing warp: hands the parcels of all tiles but the last to the epilogue, in turns with the others. Each
 * writer meets both groups in every tile, so that none can miss a phase of `staged`. Of each row, a lane has
 * eight columns. What the epilogue reads is asked for AHEAD rows before, across parcels too; a lane reads
 * only what it has copied itself, so that nobody has to wait for others. */
template <typename E, typename W>
__device__ inline void write_rows(const E &epilogue, FusedMemory memory, W walk, int64_t rows, int columns) {
    constexpr int AHEAD = E::RING_ROWS / (E::INPUTS > 1 ? E::INPUTS : 1), TOGETHER = 2; // rows at a time
    static_assert(AHEAD % TOGETHER == 0, "rows that go together lie together in the ring");
    int writer = (int)threadIdx.x / WARP_SIZE - 1, lane = (int)threadIdx.x % WARP_SIZE, number = writer,
        tile = 0, slot = 0; // slot: of the ring's rows, whose number need not divide a parcel's
    char *ring = memory.ring(writer, E::RING_ROWS) + lane * 16;
    uint64_t policy = goes_first();
    /* For a row behind the matrix's last the last again: its products are 0, and 0 times that has to be 0. */
    auto ask = [&](const LaneRows &from, int row, char *place) {
#pragma unroll
        for (int i = 0; i < TOGETHER; i++) {
            int64_t at = from.at + min(row + i, from.count - 1) * columns;
#pragma unroll
            for (int k = 0; k < E::INPUTS; k++)
                if (from.count > 0)
                    copy_aside(place + (i * E::INPUTS + k) * FUSED_ROW_BYTES, epilogue.input(k) + at, policy);
        }
        copies_commit();
    };
    if (walk.last()) return;
    LaneRows now(walk, number, rows, columns);
#pragma unroll
    for (int row = 0; row < AHEAD; row += TOGETHER) ask(now, row, ring + row * (E::INPUTS * FUSED_ROW_BYTES));
    for (bool more = true; more;) {
        float sum[FUSED_VEC] = {};
        int mine = number, parity = tile & 1;
        number += FUSED_WRITERS;
        if (number >= FUSED_PARCELS) number -= FUSED_PARCELS, tile++, walk.next();
        more = !walk.last();
        LaneRows next(walk, number, more ? rows : 0, columns);
        const char *parcel = memory.parcel(mine);
        barrier_wait(memory.staged(mine / FUSED_GROUP_WARPS), parity);
#pragma unroll 1
        for (int row = 0; row < FUSED_WARP_ROWS; row += TOGETHER) {
            Eight in[TOGETHER][FUSED_INPUTS];
            char *place = ring + slot * (E::INPUTS * FUSED_ROW_BYTES);
            if ((slot += TOGETHER) == AHEAD) slot = 0;
            copies_wait<AHEAD / TOGETHER - 1>();
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
#pragma unroll
                for (int k = 0; k < E::INPUTS; k++)
                    in[i][k] = load_eight((const bf16 *)(place + (i * E::INPUTS + k) * FUSED_ROW_BYTES));
            /* the places are free again */
            int later = row + AHEAD;
            if (later < FUSED_WARP_ROWS)
                ask(now, later, place);
            else
                ask(next, later - FUSED_WARP_ROWS, place);
            if (row >= now.count) continue;
#pragma unroll
            for (int i = 0; i < TOGETHER; i++)
                epilogue.apply(sum, row_of_parcel(parcel, row + i), in[i], now.at + (row + i) * columns,
                               now.row + row + i, row + i < now.count);
        }
        __syncwarp(); // all lanes have read the parcel
        if (lane == 0) barrier_arrive(memory.drained(mine));
        epilogue.put_sums(sum, now.block, now.column);
        now = next;
    }
}

/* The same by the warp that multiplied the parcel, when nothing is left to multiply. */
template <typename E>
__device__ inline void write_last_rows(const E &epilogue, const LaneRows &rows, const char *parcel,
                                       int columns) {
    constexpr int TOGETHER = 4;
    float sum[FUSED_VEC] = {};
#pragma unroll 1
    for (int first = 0; first < rows.count; first += TOGETHER) {
        Eight in[TOGETHER][FUSED_INPUTS];
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
#pragma unroll
            for (int k = 0; k < E::INPUTS; k++)
                if (first + i < rows.count)
                    in[i][k] = load_eight(epilogue.input(k) + rows.at + (first + i) * columns);
#pragma unroll
        for (int i = 0; i < TOGETHER; i++)
            if (first + i < rows.count)
                epilogue.apply(sum, row_of_parcel(parcel, first + i), in[i], rows.at + (first + i) * columns,
                               rows.row + first + i, true);
    }
    epilogue.put_sums(sum, rows.block, rows.column);
}

/* Two groups of four warps: each multiplies 64 rows of every tile and hands them on. A tile's bias is
 * overwritten with the first piece of the tile FUSED_BIASES = FUSED_PLACES + 1 later. That piece waits until
 * the one FUSED_PLACES before it, so one of a later tile than the bias's, has been multiplied, and by then
 * all warps have used the bias. */
template <typename E, typename W>
__device__ inline void multiply_tiles(const E &epilogue, FusedMemory memory, W walk, int64_t rows,
                                      int columns) {
    int group = (int)threadIdx.x / WARPGROUP - 1, thread = (int)threadIdx.x % WARPGROUP,
        parcel = group * FUSED_GROUP_WARPS + thread / WARP_SIZE, place = 0, round = 0;
    for (int tile = 0;; tile++) {
        float d[128];
        int last = -1, pieces = walk.pieces(); // last: the place of the piece before
        for (int piece = 0; piece < pieces; piece++) {
            const char *a = memory.place(place) + group * (FUSED_A_BYTES / FUSED_GROUPS),
                       *b = memory.place(place) + FUSED_A_BYTES;
            barrier_wait(memory.full(place), round & 1);
            products_begin();
#pragma unroll
            for (int k = 0; k < FUSED_K / 16; k++)
                product_64x256<W::A_ROWS_OF_K, E::ROWS_OF_K>(
                    d, operand(a + k * (W::A_ROWS_OF_K ? 2048 : 32), 16, 1024),
                    E::ROWS_OF_K ? operand(b + k * 2048, FUSED_B_BYTES / 4, 1024)
                                 : operand(b + k * 32, 16, 1024),
                    piece > 0 || k > 0);
            products_commit();
            products_wait<1>(); // the piece before has been multiplied: its place is free
            if (last >= 0 && thread == 0) barrier_arrive(memory.empty(last));
            last = place;
            if (++place == FUSED_PLACES) place = 0, round++;
        }
        products_wait<0>();
        products_done(d);
        if (thread == 0) barrier_arrive(memory.empty(last));
        barrier_wait(memory.drained(parcel), (tile & 1) ^ 1);
        if (epilogue.bias)
            stage_products<true>(d, memory.parcel(parcel), memory.bias(tile % FUSED_BIASES));
        else
            stage_products<false>(d, memory.parcel(parcel), nullptr);
        __syncwarp(); // all lanes have stored
        if (walk.last()) break;
        if (thread % WARP_SIZE == 0) barrier_arrive(memory.staged(group));
        walk.next();
    }
    write_last_rows(epilogue, LaneRows(walk, parcel, rows, columns), memory.parcel(parcel), columns);
}

/* computes: A B^T (B's rows along K), A B (B's rows are K) or, of each chunk, A^T B (the rows of both are K),
 *           each result handed to the epilogue
 * launch:   one block a multiprocessor but no more than the walk has units, block 384: a warp copies, three
 *           write, eight multiply 16 x 256 of a tile each
 * traffic:  A (of a chunk, half of it), B and what the epilogue reads and writes, each once; neighbouring
 *           blocks read the same rows of A
 * needs:    sm_90a; columns a multiple of 256, K of 64, chunks of 128; pointers, and the distances between
 *           rows of all matrices, of 16 bytes; FUSED_SHARED (231,552) bytes of shared memory
 * numerics: float sums along K in one order: deterministic; the product is rounded to bf16 before the
 *           epilogue */
template <typename E, typename W>
__global__ void __launch_bounds__(FUSED_THREADS, 1)
    fused_product_kernel(const __grid_constant__ CUtensorMap A, const __grid_constant__ CUtensorMap B,
                         E epilogue, W walk, int64_t rows, int columns) {
    FusedMemory memory = {dynamic_shared()};
    walk.start();
    if (threadIdx.x == 0) {
        for (int i = 0; i < FUSED_PLACES; i++)
            barrier_init(memory.full(i), 1), barrier_init(memory.empty(i), FUSED_GROUPS);
        for (int i = 0; i < FUSED_GROUPS; i++) barrier_init(memory.staged(i), FUSED_GROUP_WARPS);
        for (int i = 0; i < FUSED_PARCELS; i++) barrier_init(memory.drained(i), 1);
        barriers_ready();
    }
    __syncthreads(); // the barriers are initialised
    if (threadIdx.x >= WARPGROUP)
        multiply_tiles(epilogue, memory, walk, rows, columns);
    else if (threadIdx.x >= WARP_SIZE)
        write_rows(epilogue, memory, walk, rows, columns);
    else if (threadIdx.x == 0)
        copy_pieces(epilogue, A, B, memory, walk);
}

/* ---- launchers ---- */

/* May the kernel do a product with so many rows and columns? The pointers are all that it and the epilogue
 * use. */
template <typename T, typename... P>
static bool fused_fits(const Context *context, int64_t rows, int64_t columns, int64_t K,
                       const P *...pointers) {
    return std::is_same<T, bf16>::value && FUSED_PRODUCTS && context->hopper && rows > FEW_ROWS &&
           columns % FUSED_N == 0 && K % FUSED_K == 0 && vectorises<bf16>(columns, pointers...);
}

/* columns: the distance between rows of all that the epilogue uses, but for its gaps */
template <typename E, typename W>
static void launch_fused(Context *context, const E &epilogue, const W &walk, const CUtensorMap &A,
                         const CUtensorMap &B, int64_t rows, int64_t columns) {
    unsigned blocks = (unsigned)(walk.units() < context->num_sms ? walk.units() : context->num_sms);
    LAUNCH_WITH_SHARED((fused_product_kernel<E, W>), blocks, FUSED_THREADS, FUSED_SHARED, context, A, B,
                       epilogue, walk, rows, (int)columns);
}

/* x is rows,K, with x_gap numbers between rows; weight is columns,K, or K,columns if the epilogue says so. */
template <typename E>
static void fused_product(Context *context, const E &epilogue, const bf16 *x, const bf16 *weight,
                          int64_t rows, int64_t columns, int64_t K, int64_t x_gap = 0) {
    if (context->dry_run) return;
    CUtensorMap A = tile_map(x, rows, K, FUSED_M, x_gap),
                B = E::ROWS_OF_K ? tile_map(weight, K, columns, FUSED_K)
                                 : tile_map(weight, columns, K, FUSED_N);
    launch_fused(context, epilogue, FusedWalk(rows, columns, K), A, B, rows, columns);
}

/* y = x W^T + bias (NULL: none);  h = dropout(silu(y) other) (NULL: as if 1);  s (NULL: not wanted) =
 * silu(y). y, h, other (M,N), x (M,K), weight (N,K) */
template <typename T>
static void linear_silu_forward(Context *context, T *h, T *y, T *s, const T *x, const T *weight,
                                const T *bias, const T *other, int64_t M, int64_t N, int64_t K,
                                Dropout dropout) {
    if (!s && !dropout.threshold && fused_fits<T>(context, M, N, K, h, y, x, weight, bias, other)) {
        if constexpr (std::is_same<T, bf16>::value) {
            SiluEpilogue<true> gated = {y, h, bias, other};
            SiluEpilogue<false> plain = {y, h, bias, other};
            if (other)
                fused_product(context, gated, x, weight, M, N, K);
            else
                fused_product(context, plain, x, weight, M, N, K);
        }
        return;
    }
    linear_forward<T>(context, y, x, weight, bias, nullptr, M, N, K);
    silu_gate(context, h, s, y, other, M * N, dropout);
}

/* h = dropout(silu(x) a), g = dh = dy W:  dx = g a silu'(x);  da = g silu(x);  dbias += column sums of dx,
 * with the next add_sums;  and h again. dy (M,N), weight (N,K), the others (M,K); da, h, a and dbias may be
 * NULL, and h may be x. Gaps: see Gaps. */
template <typename T>
static void linear_gate_backward(Context *context, T *dx, T *da, T *h, float *dbias, const T *dy,
                                 const T *weight, const T *x, const T *a, int64_t M, int64_t N, int64_t K,
                                 Dropout dropout, Gaps gaps = {}) {
    if (!dropout.threshold && fused_fits<T>(context, M, K, N, dx, da, h, dy, weight, x, a) &&
        vectorises<T>(gaps.dx | gaps.dy | gaps.da)) {
        float *partial = take_sum(context, dbias, ceil_div(M, FUSED_M) * (FUSED_M / FUSED_WARP_ROWS), K);
        if constexpr (std::is_same<T, bf16>::value) {
            GateEpilogue<true> gated = {dx, da, h, x, a, partial, (int)K, gaps.dx, gaps.da};
            GateEpilogue<false> plain = {dx, da, h, x, a, partial, (int)K, gaps.dx, gaps.da};
            if (a)
                fused_product(context, gated, dy, weight, M, K, N, gaps.dy);
            else
                fused_product(context, plain, dy, weight, M, K, N, gaps.dy);
        }
        return;
    }
    linear_backward_input(context, dx, false, dy, weight, M, N, K, Gaps{gaps.dx, gaps.dy, 0});
    silu_gate_backward(context, dx, da, h, dbias, dx, x, a, M, K, dropout, Gaps{gaps.dx, gaps.dx, gaps.da});
}

/* May causal_silu_backward take chunks of C tokens and heads of e columns? The pointers are what it uses. */
template <typename T, typename... P>
static bool causal_silu_fits(const Context *context, int64_t C, int64_t e, const P *...pointers) {
    return std::is_same<T, bf16>::value && FUSED_PRODUCTS && context->hopper && C % FUSED_M == 0 &&
           e % FUSED_N == 0 && vectorises<bf16>(e, pointers...);
}

/* v = silu(x) of one head:  dv = weights^T da of each chunk;  dx = dv silu'(x);  partial: sums of dx over 16
 * rows each. weights (chunks,C,C): a row for each query, in which later keys are 0 as far as the query's 128
 * go, and are not read behind; dx, da, x (chunks,C,E) and partial (chunks C / 16,E), of which the head has e
 * columns from first_column on. */
static inline void causal_silu_backward(Context *context, bf16 *dx, float *partial, const bf16 *weights,
                                        const bf16 *da, const bf16 *x, int64_t chunks, int64_t C, int64_t E,
                                        int64_t first_column, int64_t e) {
    int64_t rows = chunks * C;
    GateEpilogue<false, true> epilogue = {dx, nullptr, nullptr, x, nullptr, partial, (int)E};
    launch_fused(context, epilogue, CausalWalk(chunks, C, first_column, e),
                 tile_map(weights, rows, C, FUSED_K), tile_map(da, rows, E, FUSED_K), rows, E);
}

#endif
