/* plain.cuh - one kernel for every matrix product: any sizes, layouts, strides and batches, float or bf16 in
 * and out. It wants nothing of a device but loads, shared memory, barriers and multiply-adds, and no library.
 *
 * Built with -DPLAIN_PRODUCTS=1 the backend makes all its products by it, in place of cuBLAS and of the
 * kernels for Hopper: tools that check memory and races see every access of a step then, and a port to other
 * devices has all products from the first day. cuBLAS is many times faster.
 */
#ifndef CUDA_PLAIN_CUH
#define CUDA_PLAIN_CUH

#include "common.cuh"

enum {
    PLAIN_TILE = 64,  /* rows and columns of a block's part of the result */
    PLAIN_DEPTH = 16, /* of K at a time */
    PLAIN_EACH = 4,   /* rows and columns of a thread, PLAIN_LANES apart */
    PLAIN_LANES = PLAIN_TILE / PLAIN_EACH,
    PLAIN_THREADS = PLAIN_LANES * PLAIN_LANES
};

/* Element (i, k) of matrix b of a batch stands at data[b batch + i outer + k inner]; sums are over k. */
template <typename T> struct PlainOperand {
    const T *data;
    int64_t outer, inner, batch;
};

/* out[b, m, n] = alpha (sum over k of A[b, m, k] B[b, n, k]) + beta add[b, m, n] + bias[n]; add or bias NULL:
 * without. add lies as out does, and may be out. */
template <typename T, typename O> struct PlainProduct {
    O *out;
    const O *add;
    const T *bias;
    PlainOperand<T> a, b;
    int64_t M, N, K, row_stride, batch_stride; /* the latter two of out and add */
    float alpha, beta;
};

/* PLAIN_TILE rows of an operand from `first` on, and PLAIN_DEPTH of K; zero where the matrix ends.
 * Neighbouring threads read what is next to each other in memory. */
template <typename T>
__device__ inline void plain_fill(float (&piece)[PLAIN_DEPTH][PLAIN_TILE + 1], const PlainOperand<T> &from,
                                  const T *data, int64_t first, int64_t rows, int64_t first_k, int64_t K) {
    for (int i = (int)threadIdx.x; i < PLAIN_DEPTH * PLAIN_TILE; i += PLAIN_THREADS) {
        int k = from.inner == 1 ? i % PLAIN_DEPTH : i / PLAIN_TILE;
        int row = from.inner == 1 ? i / PLAIN_DEPTH : i % PLAIN_TILE;
        bool inside = first + row < rows && first_k + k < K;
        int64_t at = (first + row) * from.outer + (first_k + k) * from.inner;
        piece[k][row] = inside ? to_float(data[at]) : 0.0f;
    }
}

/* computes: a PlainProduct
 * launch:   grid ceil(M / 64) ceil(N / 64) batch, block 256: a block owns 64 x 64 results, a thread 4 x 4
 * traffic:  (M N / 64) 2 K sizeof(T) bytes a batch, most of it from the caches
 * needs:    nothing
 * numerics: float, k in order: deterministic */
template <typename T, typename O>
__global__ void __launch_bounds__(PLAIN_THREADS) plain_product_kernel(PlainProduct<T, O> p) {
    __shared__ float a[PLAIN_DEPTH][PLAIN_TILE + 1], b[PLAIN_DEPTH][PLAIN_TILE + 1];
    int64_t across = (p.N + PLAIN_TILE - 1) / PLAIN_TILE, down = (p.M + PLAIN_TILE - 1) / PLAIN_TILE;
    int64_t tile = blockIdx.x, batch = tile / (across * down);
    int64_t first_m = tile / across % down * PLAIN_TILE, first_n = tile % across * PLAIN_TILE;
    const T *a_data = p.a.data + batch * p.a.batch, *b_data = p.b.data + batch * p.b.batch;
    int row = (int)threadIdx.x / PLAIN_LANES, column = (int)threadIdx.x % PLAIN_LANES;
    bool busy = first_m + row < p.M && first_n + column < p.N;
    float sum[PLAIN_EACH][PLAIN_EACH] = {};
    for (int64_t k = 0; k < p.K; k += PLAIN_DEPTH) {
        plain_fill(a, p.a, a_data, first_m, p.M, k, p.K);
        plain_fill(b, p.b, b_data, first_n, p.N, k, p.K);
        __syncthreads(); // both pieces are there
        for (int step = 0; busy && step < PLAIN_DEPTH; step++) {
            float left[PLAIN_EACH], right[PLAIN_EACH];
#pragma unroll
            for (int i = 0; i < PLAIN_EACH; i++) {
                left[i] = a[step][row + i * PLAIN_LANES];
                right[i] = b[step][column + i * PLAIN_LANES];
            }
#pragma unroll
            for (int i = 0; i < PLAIN_EACH; i++)
#pragma unroll
                for (int j = 0; j < PLAIN_EACH; j++) sum[i][j] = fmaf(left[i], right[j], sum[i][j]);
        }
        __syncthreads(); // all have read them: the next pieces may take their place
    }
#pragma unroll
    for (int i = 0; i < PLAIN_EACH; i++) {
#pragma unroll
        for (int j = 0; j < PLAIN_EACH; j++) {
            int64_t m = first_m + row + i * PLAIN_LANES, n = first_n + column + j * PLAIN_LANES;
            if (m >= p.M || n >= p.N) continue;
            int64_t at = batch * p.batch_stride + m * p.row_stride + n;
            float value = p.alpha * sum[i][j];
            if (p.add) value += p.beta * to_float(p.add[at]);
            if (p.bias) value += to_float(p.bias[n]);
            p.out[at] = from_float<O>(value);
        }
    }
}

template <typename T, typename O>
static void plain_product(Context *context, const PlainProduct<T, O> &p, int64_t batch) {
    int64_t blocks = ceil_div(p.M, PLAIN_TILE) * ceil_div(p.N, PLAIN_TILE) * batch;
    REQUIRE(blocks <= INT32_MAX);
    LAUNCH((plain_product_kernel<T, O>), (unsigned)blocks, PLAIN_THREADS, context, p);
}

#endif
