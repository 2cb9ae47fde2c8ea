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

enum {
    FUSED_M = 128, FUSED_N = 256, FUSED_K = 64, FUSED_PLACES = 4, FUSED_GROUP_ROWS = 64, FUSED_WARP_ROWS = 16,
    FUSED_A_BYTES = FUSED_M * FUSED_K * 2, FUSED_B_BYTES = FUSED_N * FUSED_K * 2, FUSED_BYTES = FUSED_A_BYTES + FUSED_B_BYTES,
    FUSED_SHARED = FUSED_PLACES * FUSED_BYTES + 2 * FUSED_PLACES * 8,
    FUSED_THREADS = 3 * WARPGROUP, FUSED_VEC = 8
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

/* y = product + bias;  h = silu(y) other */
struct SiluEpilogue {
    static constexpr bool ROWS_OF_K = false; // the weight's rows run along K
    static constexpr int CHUNK = 4;
    bf16 *y, *h;
    const bf16 *bias, *other; /* either may be NULL */
    struct Inputs {
        Eight other;
    };
    __device__ uint32_t bias_at(int column) const {
        return bias ? *reinterpret_cast<const uint32_t *>(bias + column) : 0;
    }
    __device__ void prefetch(int64_t at, int bytes) const {
        if (other) prefetch_bytes(other + at, bytes);
    }
    __device__ void load(Inputs *in, int64_t at) const {
        if (other) in->other = load_eight(other + at);
    }
    __device__ void apply(float (&)[FUSED_VEC], const Eight &product, const Inputs &in, int64_t at) const {
        Eight out;
        store_eight(y + at, product);
#pragma unroll
        for (int i = 0; i < FUSED_VEC; i += 2) {
            float first = silu(number(product, i)), second = silu(number(product, i + 1));
            if (other) first *= number(in.other, i), second *= number(in.other, i + 1);
            out.v[i / 2] = word_of(first, second);
        }
        store_eight(h + at, out);
    }
    __device__ void add_sums(const float (&)[FUSED_VEC], int64_t, int) const {}
};

/* g = product;  dx = g a silu'(x);  da = g silu(x);  y = a silu(x); partial sums of dx over 16 rows each */
struct GateEpilogue {
    static constexpr bool ROWS_OF_K = true; // the weight's rows are K
    static constexpr int CHUNK = 2;
    bf16 *dx, *da, *y; /* da and y may be NULL */
    const bf16 *x, *a; /* a may be NULL: as if 1 */
    float *partial;    /* may be NULL */
    int columns;
    struct Inputs {
        Eight x, a;
    };
    __device__ uint32_t bias_at(int) const { return 0; }
    __device__ void prefetch(int64_t at, int bytes) const {
        prefetch_bytes(x + at, bytes);
        if (a) prefetch_bytes(a + at, bytes);
    }
    __device__ void load(Inputs *in, int64_t at) const {
        in->x = load_eight(x + at);
        if (a) in->a = load_eight(a + at);
    }
    __device__ void apply(float (&sum)[FUSED_VEC], const Eight &product, const Inputs &in,
                          int64_t at) const {
        Eight dx_out, da_out, y_out;
#pragma unroll
        for (int i = 0; i < FUSED_VEC; i += 2) {
            float dv[2], dother[2], again[2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float grad = number(product, i + j), v = number(in.x, i + j), s = sigmoid(v);
                float factor = a ? number(in.a, i + j) : 1.0f;
                dv[j] = grad * factor * s * (1.0f + v * (1.0f - s));
                dother[j] = grad * v * s;
                again[j] = factor * v * s;
                sum[i + j] += dv[j];
            }
            dx_out.v[i / 2] = word_of(dv[0], dv[1]);
            da_out.v[i / 2] = word_of(dother[0], dother[1]);
            y_out.v[i / 2] = word_of(again[0], again[1]);
        }
        store_eight(dx + at, dx_out);
        if (da) store_eight(da + at, da_out);
        if (y) store_eight(y + at, y_out);
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
                    epilogue.load(&in[i][half], (row + 8 * half) * columns + column + i * 32);
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
                    epilogue.apply(sum, product, in[i][half], (row + 8 * half) * columns + column + i * 32);
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
 * the next add_sums;  and h again. dy (M,N), weight (N,K), the others (M,K); da, h, a and dbias may be NULL. */
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
