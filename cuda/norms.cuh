/* norms.cuh - RMSNorm and LayerNorm, forward and backward, with the dropout of m fused into RMSNorm.
 */
#ifndef CUDA_NORMS_CUH
#define CUDA_NORMS_CUH

#include "common.cuh"

enum { NORM_WARPS = 8 };

/* ----------------------------------------------------------------------------------------------------------
 * Backward of both: LayerNorm is the CENTRED one, RMSNorm has no mean, no bias, and dropout after it.
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
    int columns, batch; /* batch: rows at a time */
};

/* xhat = (x - mean) rstd, y = keep (xhat (1 + w) + b):  with g = keep dy (1 + w):
 * dx = rstd (g - mean(g) - xhat mean(g xhat)), without mean(g) if not CENTRED;  dw += keep dy xhat;  db += dy
 * computes: dx, partial sums of dw, db and of dx itself, and y once more (the backward of the layers that read
 *           y needs it)
 * launch:   grid at most 3 blocks a multiprocessor, block 256: a block takes batches of rows in turn with the
 *           others; in each, first a warp a row for the two means, then a thread walks down its columns
 * traffic:  4 rows columns sizeof(T) bytes: x and dy read (a second time from the caches), dx and y written
 * needs:    VEC 16 / sizeof(T) wants columns and pointers in multiples of 16 bytes; VEC 1 takes anything; dx
 *           may be dy
 * numerics: float sums in a fixed order: deterministic */
template <typename T, int VEC, bool CENTRED>
__global__ void __launch_bounds__(SWEEP_THREADS, NORM_BLOCKS) norm_backward_kernel(NormBackward<T> n) {
    __shared__ float row_g[2][NORM_BATCH], row_gx[2][NORM_BATCH];
    __shared__ SweepSums<VEC> shared;
    int64_t first = (int64_t)blockIdx.x * n.batch, stride = (int64_t)gridDim.x * n.batch;
    int lane = (int)threadIdx.x % WARP_SIZE, columns = n.columns;
    Sweep sweep(columns, VEC);
    bool wide = columns > sweep.lanes * VEC; // then a thread has several vectors, and sums wait in memory
    float dw[VEC] = {}, db[VEC] = {}, dsum[VEC] = {}, value[VEC], grad[VEC], w[VEC] = {}, b[VEC] = {};
    int64_t out = (int64_t)blockIdx.x * columns;
    int side = 0;
    for (int64_t begin = first; begin < n.rows; begin += stride, side ^= 1) {
        int count = (int)min((int64_t)n.batch, n.rows - begin);
        if (VEC > 1 && threadIdx.x == 0 && begin + stride < n.rows) { // the next batch is on its way meanwhile
            size_t bytes = (size_t)(min((int64_t)n.batch, n.rows - begin - stride) * columns) * sizeof(T);
            prefetch(n.x + (begin + stride) * columns, bytes);
            prefetch(n.dy + (begin + stride) * columns, bytes);
        }
        for (int r = (int)threadIdx.x / WARP_SIZE; r < count; r += SWEEP_THREADS / WARP_SIZE) {
            int64_t row = begin + r;
            float g_sum = 0, gx_sum = 0, rstd = n.rstd[row], mean = CENTRED ? n.mean[row] : 0.0f;
            for (int c = lane * VEC; c < columns; c += WARP_SIZE * VEC) {
                load<VEC>(value, n.x + row * columns + c);
                load<VEC>(grad, n.dy + row * columns + c);
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
            if (lane == 0) row_g[side][r] = g_sum / (float)columns, row_gx[side][r] = gx_sum / (float)columns;
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
                load<VEC>(grad, n.dy + row * columns + c);
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
                store<VEC>(n.dx + row * columns + c, grad);
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
    WITH_VEC(T, vectorises<T>(columns, n.dx, n.y, n.dy, n.x, n.weight, n.bias), {
        int64_t groups = SWEEP_THREADS / min(ceil_div(columns, VEC), (int64_t)SWEEP_THREADS);
        int64_t fit = min((int64_t)NORM_BATCH_BYTES / (2 * columns * (int64_t)sizeof(T)), (int64_t)NORM_BATCH);
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

/* computes: y[row, j] = keep x[row, j] rstd[row] (1 + w[j])
 * launch:   grid ceil(rows / 8), block 256: a warp owns a row and reads it twice, the second time from the
 *           cache
 * traffic:  2 rows columns sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants columns and pointers in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float sums in a fixed order: deterministic */
template <typename T, int VEC>
__global__ void rmsnorm_forward_kernel(T *y, float *saved_rstd, const T *x, const T *weight, int64_t rows,
                                       int columns, float eps, Dropout dropout) {
    int64_t row = (int64_t)blockIdx.x * NORM_WARPS + threadIdx.x / WARP_SIZE;
    int lane = (int)threadIdx.x % WARP_SIZE;
    if (row >= rows) return; // a whole warp leaves
    const T *x_row = x + row * columns;
    float sum = 0, value[VEC], w[VEC] = {};
    for (int c = lane * VEC; c < columns; c += WARP_SIZE * VEC) {
        load<VEC>(value, x_row + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += value[i] * value[i];
    }
    float rstd = 1.0f / sqrtf(warp_sum(sum) / (float)columns + eps);
    if (lane == 0) saved_rstd[row] = rstd;
    for (int c = lane * VEC; c < columns; c += WARP_SIZE * VEC) {
        load<VEC>(value, x_row + c);
        if (weight) load<VEC>(w, weight + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) value[i] *= rstd * (1.0f + w[i]);
        drop<VEC>(value, dropout, row * columns + c);
        store<VEC>(y + row * columns + c, value);
    }
}

/* y and x are rows,columns; rstd (rows) is saved; weight (columns) may be NULL. */
template <typename T>
static void rmsnorm_forward(Context *context, T *y, float *rstd, const T *x, const T *weight, int64_t rows,
                            int64_t columns, float eps, Dropout dropout) {
    WITH_VEC(T, vectorises<T>(columns, y, x, weight),
             LAUNCH((rmsnorm_forward_kernel<T, VEC>), blocks_for(rows, NORM_WARPS), NORM_WARPS * WARP_SIZE,
                    context, y, rstd, x, weight, rows, (int)columns, eps, dropout));
}

/* dx is written and may be dy; y (NULL: not wanted) is recomputed; dweight (NULL: none) is added to by the next
 * add_sums. */
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

/* Mean and rstd of one row, by a whole warp; the variance is that of the differences, so a large mean does
 * no harm. */
template <typename T, int VEC>
__device__ inline void row_moments(const T *row, int columns, float eps, float *mean, float *rstd) {
    int lane = (int)threadIdx.x % WARP_SIZE;
    float value[VEC], sum = 0, squares = 0;
    for (int c = lane * VEC; c < columns; c += WARP_SIZE * VEC) {
        load<VEC>(value, row + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += value[i];
    }
    *mean = warp_sum(sum) / (float)columns;
    for (int c = lane * VEC; c < columns; c += WARP_SIZE * VEC) {
        load<VEC>(value, row + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) squares += (value[i] - *mean) * (value[i] - *mean);
    }
    *rstd = 1.0f / sqrtf(warp_sum(squares) / (float)columns + eps);
}

/* computes: y[row, j] = (x[row, j] - mean[row]) rstd[row] (1 + w[j]) + b[j]
 * launch:   grid ceil(rows / 8), block 256: a warp owns a row
 * traffic:  2 rows columns sizeof(T) bytes; x is read three times, twice from the caches
 * needs:    VEC 16 / sizeof(T) wants columns and pointers in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float, two passes for the variance, fixed order: deterministic */
template <typename T, int VEC>
__global__ void layernorm_forward_kernel(T *y, float *saved_mean, float *saved_rstd, const T *x,
                                         const T *weight, const T *bias, int64_t rows, int columns,
                                         float eps) {
    int64_t row = (int64_t)blockIdx.x * NORM_WARPS + threadIdx.x / WARP_SIZE;
    int lane = (int)threadIdx.x % WARP_SIZE;
    if (row >= rows) return; // a whole warp leaves
    float mean, rstd, value[VEC], w[VEC] = {}, b[VEC] = {};
    row_moments<T, VEC>(x + row * columns, columns, eps, &mean, &rstd);
    if (lane == 0) saved_mean[row] = mean, saved_rstd[row] = rstd;
    for (int c = lane * VEC; c < columns; c += WARP_SIZE * VEC) {
        load<VEC>(value, x + row * columns + c);
        if (weight) load<VEC>(w, weight + c);
        if (bias) load<VEC>(b, bias + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) value[i] = (value[i] - mean) * rstd * (1.0f + w[i]) + b[i];
        store<VEC>(y + row * columns + c, value);
    }
}

/* y and x are rows,columns; mean and rstd (rows) are saved; weight and bias (columns) may be NULL. */
template <typename T>
static void layernorm_forward(Context *context, T *y, float *mean, float *rstd, const T *x, const T *weight,
                              const T *bias, int64_t rows, int64_t columns, float eps) {
    WITH_VEC(T, vectorises<T>(columns, y, x, weight, bias),
             LAUNCH((layernorm_forward_kernel<T, VEC>), blocks_for(rows, NORM_WARPS), NORM_WARPS * WARP_SIZE,
                    context, y, mean, rstd, x, weight, bias, rows, (int)columns, eps));
}

/* dx is written and may be dy; y (NULL: not wanted) is recomputed; dweight, dbias and dcolumns (NULL: none) are
 * added to by the next add_sums, dcolumns the column sums of dx: the gradient of a bias that was added to x. */
template <typename T>
static void layernorm_backward(Context *context, T *dx, T *y, float *dweight, float *dbias, float *dcolumns,
                               const T *dy, const float *mean, const float *rstd, const T *x,
                               const T *weight, const T *bias, int64_t rows, int64_t columns) {
    NormBackward<T> norm = {};
    norm.dx = dx, norm.y = y, norm.dy = dy, norm.x = x, norm.mean = mean, norm.rstd = rstd;
    norm.weight = weight, norm.bias = bias;
    norm_backward<T, true>(context, norm, dweight, dbias, dcolumns, rows, columns);
}

#endif
