/* norms.cuh - RMSNorm and LayerNorm, forward and backward, with the dropout of m fused into RMSNorm.
 */
#ifndef CUDA_NORMS_CUH
#define CUDA_NORMS_CUH

#include "common.cuh"

enum { NORM_THREADS = 256 };

/* ----------------------------------------------------------------------------------------------------------
 * Forward of both: LayerNorm is the CENTRED one, RMSNorm has no mean, no bias, and dropout after it.
 */

/* Vectors of a row that a thread holds; more are read again. */
enum { NORM_HELD = 4 };

/* computes: y[row, j] = keep ((x[row, j] - mean[row]) rstd[row] (1 + w[j]) + b[j]); mean is 0 if not CENTRED
 * launch:   grid ceil(rows lanes / 256), block 256: `lanes` lanes of a warp own a row
 * traffic:  2 rows columns sizeof(T) bytes; of very long rows x is read again, from the caches
 * needs:    VEC 16 / sizeof(T) wants columns and pointers in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float, two passes for the variance, fixed order: deterministic */
template <typename T, int VEC, bool CENTRED>
__global__ void norm_forward_kernel(T *y, float *saved_mean, float *saved_rstd, const T *x, const T *weight,
                                    const T *bias, int64_t rows, int columns, int lanes, float eps,
                                    Dropout dropout) {
    int64_t row = (int64_t)blockIdx.x * (NORM_THREADS / lanes) + threadIdx.x / (unsigned)lanes;
    bool active = row < rows;
    if (!active) row = 0; // the shuffles below want every lane
    int lane = (int)threadIdx.x % lanes;
    const T *x_row = x + row * columns;
    Packed<T, VEC> held[NORM_HELD];
#pragma unroll
    for (int k = 0; k < NORM_HELD; k++) {
        int c = (lane + k * lanes) * VEC;
        if (c < columns) held[k] = packed<VEC>(x_row + c);
    }
    /* Calls f(vector, its first column) for all of this thread's vectors. */
    auto each = [&](auto f) {
#pragma unroll
        for (int k = 0; k < NORM_HELD; k++) {
            int c = (lane + k * lanes) * VEC;
            if (c < columns) f(held[k], c);
        }
        for (int c = (lane + NORM_HELD * lanes) * VEC; c < columns; c += lanes * VEC)
            f(packed<VEC>(x_row + c), c);
    };
    float mean = 0, sum = 0;
    if (CENTRED) {
        each([&](const Packed<T, VEC> &value, int) {
#pragma unroll
            for (int i = 0; i < VEC; i++) mean += to_float(value.v[i]);
        });
        mean = lanes_sum(mean, lanes) / (float)columns;
    }
    each([&](const Packed<T, VEC> &value, int) {
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += (to_float(value.v[i]) - mean) * (to_float(value.v[i]) - mean);
    });
    float rstd = 1.0f / sqrtf(lanes_sum(sum, lanes) / (float)columns + eps);
    if (!active) return;
    if (lane == 0) {
        if (CENTRED) saved_mean[row] = mean;
        saved_rstd[row] = rstd;
    }
    each([&](const Packed<T, VEC> &value, int c) {
        float w[VEC] = {}, b[VEC] = {}, out[VEC];
        if (weight) load<VEC>(w, weight + c);
        if (bias) load<VEC>(b, bias + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) out[i] = (to_float(value.v[i]) - mean) * rstd * (1.0f + w[i]) + b[i];
        if (!CENTRED) drop<VEC>(out, dropout, row * columns + c);
        store<VEC>(y + row * columns + c, out);
    });
}

template <typename T, bool CENTRED>
static void norm_forward(Context *context, T *y, float *mean, float *rstd, const T *x, const T *weight,
                         const T *bias, int64_t rows, int64_t columns, float eps, Dropout dropout) {
    WITH_VEC(T, vectorises<T>(columns, y, x, weight, bias), {
        int lanes = 1;
        while (lanes < WARP_SIZE && lanes * VEC * NORM_HELD < columns) lanes *= 2;
        LAUNCH((norm_forward_kernel<T, VEC, CENTRED>), blocks_for(rows * lanes, NORM_THREADS), NORM_THREADS,
               context, y, mean, rstd, x, weight, bias, rows, (int)columns, lanes, eps, dropout);
    });
}

/* ----------------------------------------------------------------------------------------------------------
 * Backward of both
 */

/* A block takes a few rows at a time, as many as the first cache holds for all blocks of a multiprocessor. */
enum { NORM_BATCH = 16, NORM_BATCH_BYTES = 32768, NORM_BLOCKS = 3 };

template <typename T> struct NormBackward {
    T *dx, *y;
    float *partial_w, *partial_b, *partial_dx; /* rows of take_sum, or NULL; only CENTRED has the last two */
    const T *dy, *x;
    const float *mean, *rstd;
    const T *weight, *bias;
    Dropout dropout;
    int64_t rows;
    int columns, gap, batch; /* gap: between rows of dx and of dy; batch: rows at a time */
};

/* xhat = (x - mean) rstd, y = keep (xhat (1 + w) + b):  with g = keep dy (1 + w):
 * dx = rstd (g - mean(g) - xhat mean(g xhat)), without mean(g) if not CENTRED;  dw += keep dy xhat;  db += dy
 * computes: dx, partial sums of dw, db and of dx itself, and y once more (the backward of the layers that
 *           read y needs it)
 * launch:   grid at most 3 blocks a multiprocessor, block 256: a block takes batches of rows in turn with the
 *           others; in each, first a warp a row for the two means, then a thread walks down its columns
 * traffic:  4 rows columns sizeof(T) bytes: x and dy read (a second time from the caches), dx and y written
 * needs:    VEC 16 / sizeof(T) wants columns, gap and pointers in multiples of 16 bytes; VEC 1 takes
 *           anything; dx may be dy
 * numerics: float sums in a fixed order: deterministic */
template <typename T, int VEC, bool CENTRED>
__global__ void __launch_bounds__(SWEEP_THREADS, NORM_BLOCKS) norm_backward_kernel(NormBackward<T> n) {
    __shared__ float row_g[2][NORM_BATCH], row_gx[2][NORM_BATCH];
    __shared__ SweepSums<VEC> shared;
    int64_t first = (int64_t)blockIdx.x * n.batch, stride = (int64_t)gridDim.x * n.batch;
    int lane = (int)threadIdx.x % WARP_SIZE, columns = n.columns, pitch = columns + n.gap;
    Sweep sweep(columns, VEC);
    bool wide = columns > sweep.lanes * VEC; // then a thread has several vectors, and sums wait in memory
    float dw[VEC] = {}, db[VEC] = {}, dsum[VEC] = {}, value[VEC], grad[VEC], w[VEC] = {}, b[VEC] = {};
    int64_t out = (int64_t)blockIdx.x * columns;
    int side = 0;
    for (int64_t begin = first; begin < n.rows; begin += stride, side ^= 1) {
        int count = (int)min((int64_t)n.batch, n.rows - begin);
        for (int r = (int)threadIdx.x / WARP_SIZE; r < count; r += SWEEP_THREADS / WARP_SIZE) {
            int64_t row = begin + r;
            float g_sum = 0, gx_sum = 0, rstd = n.rstd[row], mean = CENTRED ? n.mean[row] : 0.0f;
            for (int c = lane * VEC; c < columns; c += WARP_SIZE * VEC) {
                load<VEC>(value, n.x + row * columns + c);
                load<VEC>(grad, n.dy + row * pitch + c);
                if (n.weight) load<VEC>(w, n.weight + c);
                if (!CENTRED) drop<VEC>(grad, n.dropout, row * columns + c);
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    float g = grad[i] * (1.0f + w[i]);
                    if (CENTRED) g_sum += g;
                    gx_sum += g * (value[i] - mean);
                }
            }
            if (CENTRED) g_sum = warp_sum(g_sum);
            gx_sum = warp_sum(gx_sum) * rstd;
            if (lane == 0)
                row_g[side][r] = g_sum / (float)columns, row_gx[side][r] = gx_sum / (float)columns;
        }
        /* The batch's means are known, and nobody reads its dy for them any more: dx may overwrite it. The
         * other side is still being read, but not after the next barrier. */
        __syncthreads();
        for (int c = sweep.lane * VEC; sweep.group < sweep.groups && c < columns; c += sweep.lanes * VEC) {
            if (n.weight) load<VEC>(w, n.weight + c);
            if (n.bias) load<VEC>(b, n.bias + c);
            if (wide) {
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    dw[i] = n.partial_w && begin > first ? n.partial_w[out + c + i] : 0.0f;
                    db[i] = n.partial_b && begin > first ? n.partial_b[out + c + i] : 0.0f;
                    dsum[i] = n.partial_dx && begin > first ? n.partial_dx[out + c + i] : 0.0f;
                }
            }
            for (int r = sweep.group; r < count; r += sweep.groups) {
                int64_t row = begin + r;
                float rstd = n.rstd[row], mean = CENTRED ? n.mean[row] : 0.0f, again[VEC];
                float g_mean = row_g[side][r], gx_mean = row_gx[side][r];
                load<VEC>(value, n.x + row * columns + c);
                load<VEC>(grad, n.dy + row * pitch + c);
                if (!CENTRED) drop<VEC>(grad, n.dropout, row * columns + c);
#pragma unroll
                for (int i = 0; i < VEC; i++) {
                    float xhat = (value[i] - mean) * rstd;
                    dw[i] += grad[i] * xhat;
                    if (CENTRED) db[i] += grad[i];
                    again[i] = xhat * (1.0f + w[i]) + b[i];
                    grad[i] = rstd * (grad[i] * (1.0f + w[i]) - g_mean - xhat * gx_mean);
                    if (CENTRED) dsum[i] += grad[i];
                }
                store<VEC>(n.dx + row * pitch + c, grad);
                if (!n.y) continue;
                if (!CENTRED) drop<VEC>(again, n.dropout, row * columns + c);
                store<VEC>(n.y + row * columns + c, again);
            }
            if (wide) {
                if (n.partial_w) store<VEC>(n.partial_w + out + c, dw);
                if (n.partial_b) store<VEC>(n.partial_b + out + c, db);
                if (n.partial_dx) store<VEC>(n.partial_dx + out + c, dsum);
            }
        }
    }
    if (wide) return;
    if (n.partial_w) sweep_row<VEC>(n.partial_w + out, sweep, columns, dw, shared);
    if (n.partial_b) sweep_row<VEC>(n.partial_b + out, sweep, columns, db, shared);
    if (n.partial_dx) sweep_row<VEC>(n.partial_dx + out, sweep, columns, dsum, shared);
}

template <typename T, bool CENTRED>
static void norm_backward(Context *context, NormBackward<T> n, float *dweight, float *dbias, float *dcolumns,
                          int64_t rows, int64_t columns) {
    WITH_VEC(T, vectorises<T>(columns | n.gap, n.dx, n.y, n.dy, n.x, n.weight, n.bias), {
        int64_t groups = SWEEP_THREADS / min(ceil_div(columns, VEC), (int64_t)SWEEP_THREADS);
        int64_t fit =
            min((int64_t)NORM_BATCH_BYTES / (2 * columns * (int64_t)sizeof(T)), (int64_t)NORM_BATCH);
        n.batch = (int)min(max(fit / groups, (int64_t)1) * groups, (int64_t)NORM_BATCH);
        n.rows = rows, n.columns = (int)columns;
        int64_t blocks = min(ceil_div(rows, n.batch), (int64_t)context->num_sms * NORM_BLOCKS);
        n.partial_w = take_sum(context, dweight, blocks, columns);
        n.partial_b = take_sum(context, dbias, blocks, columns);
        n.partial_dx = take_sum(context, dcolumns, blocks, columns);
        LAUNCH((norm_backward_kernel<T, VEC, CENTRED>), (unsigned)blocks, SWEEP_THREADS, context, n);
    });
}

/* ----------------------------------------------------------------------------------------------------------
 * RMSNorm: y = x rstd (1 + w), rstd = 1 / sqrt(mean(x^2) + eps); then dropout.
 */

/* y and x are rows,columns; rstd (rows) is saved; weight (columns) may be NULL. */
template <typename T>
static void rmsnorm_forward(Context *context, T *y, float *rstd, const T *x, const T *weight, int64_t rows,
                            int64_t columns, float eps, Dropout dropout) {
    norm_forward<T, false>(context, y, nullptr, rstd, x, weight, nullptr, rows, columns, eps, dropout);
}

/* dx is written and may be dy; y (NULL: not wanted) is recomputed; dweight (NULL: none) is added to by the
 * next add_sums. */
template <typename T>
static void rmsnorm_backward(Context *context, T *dx, T *y, float *dweight, const T *dy, const float *rstd,
                             const T *x, const T *weight, int64_t rows, int64_t columns, Dropout dropout) {
    NormBackward<T> norm = {};
    norm.dx = dx, norm.y = y, norm.dy = dy, norm.x = x, norm.rstd = rstd, norm.weight = weight;
    norm.dropout = dropout;
    norm_backward<T, false>(context, norm, dweight, nullptr, nullptr, rows, columns);
}

/* ----------------------------------------------------------------------------------------------------------
 * LayerNorm: y = (x - mean) rstd (1 + w) + b, rstd = 1 / sqrt(var + eps).
 */

/* y and x are rows,columns; mean and rstd (rows) are saved; weight and bias (columns) may be NULL. */
template <typename T>
static void layernorm_forward(Context *context, T *y, float *mean, float *rstd, const T *x, const T *weight,
                              const T *bias, int64_t rows, int64_t columns, float eps) {
    norm_forward<T, true>(context, y, mean, rstd, x, weight, bias, rows, columns, eps, no_dropout());
}

/* dx is written and may be dy; y (NULL: not wanted) is recomputed; dweight, dbias and dcolumns (NULL: none)
 * are added to by the next add_sums, dcolumns the column sums of dx: the gradient of a bias that was added
 * to x. gap: the numbers between rows of dx, and of dy. */
template <typename T>
static void layernorm_backward(Context *context, T *dx, T *y, float *dweight, float *dbias, float *dcolumns,
                               const T *dy, const float *mean, const float *rstd, const T *x,
                               const T *weight, const T *bias, int64_t rows, int64_t columns, int gap = 0) {
    NormBackward<T> norm = {};
    norm.dx = dx, norm.y = y, norm.dy = dy, norm.x = x, norm.mean = mean, norm.rstd = rstd;
    norm.weight = weight, norm.bias = bias, norm.gap = gap;
    norm_backward<T, true>(context, norm, dweight, dbias, dcolumns, rows, columns);
}

#endif
