/* norms.cuh - RMSNorm and LayerNorm, forward and backward, with the dropout of m fused into RMSNorm.
 */
#ifndef CUDA_NORMS_CUH
#define CUDA_NORMS_CUH

#include "common.cuh"

enum { NORM_WARPS = 8 };

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
    float sum = 0, value[VEC], w[VEC] = {}, keep[VEC];
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
        keep_scales<VEC>(keep, dropout, row * columns + c);
#pragma unroll
        for (int i = 0; i < VEC; i++)
            value[i] *= rstd * (1.0f + w[i]) * keep[i];
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

/* y = x rstd (1 + w):  with g = keep dy (1 + w):  dx = rstd (g - x rstd^2 mean(g x));  dw += sum over rows
 * of keep dy x rstd computes: dx, partial sums of dw, and y once more (the backward of the layers that read
 * y needs it)
 * launch:   grid ceil(rows / 32), block 256: first a warp a row for the mean, then a thread walks down its
 *           columns
 * traffic:  4 rows columns sizeof(T) bytes: x and dy read (a second time from the caches), dx and y written
 * needs:    VEC 16 / sizeof(T) wants columns and pointers in multiples of 16 bytes; VEC 1 takes anything; dx
 *           may be dy
 * numerics: float sums in a fixed order: deterministic */
template <typename T, int VEC>
__global__ void __launch_bounds__(SWEEP_THREADS, 4)
    rmsnorm_backward_kernel(T *dx, T *y, float *partial, const T *dy, const float *saved_rstd, const T *x,
                            const T *weight, int64_t rows, int columns, Dropout dropout) {
    __shared__ float row_factor[SWEEP_ROWS];
    int64_t first = (int64_t)blockIdx.x * SWEEP_ROWS, last = min(first + SWEEP_ROWS, rows);
    float value[VEC], grad[VEC], keep[VEC], w[VEC] = {};
    int lane = (int)threadIdx.x % WARP_SIZE;
    for (int64_t row = first + threadIdx.x / WARP_SIZE; row < last; row += SWEEP_THREADS / WARP_SIZE) {
        float products = 0;
        for (int c = lane * VEC; c < columns; c += WARP_SIZE * VEC) {
            load<VEC>(value, x + row * columns + c);
            load<VEC>(grad, dy + row * columns + c);
            if (weight) load<VEC>(w, weight + c);
            keep_scales<VEC>(keep, dropout, row * columns + c);
#pragma unroll
            for (int i = 0; i < VEC; i++) products += keep[i] * grad[i] * (1.0f + w[i]) * value[i];
        }
        products = warp_sum(products);
        if (lane == 0)
            row_factor[row - first] = saved_rstd[row] * saved_rstd[row] * products / (float)columns;
    }
    __syncthreads(); // the rows' sums are known, and nobody reads dy for them any more: dx may overwrite it

    Sweep sweep(columns, VEC);
    if (sweep.group >= sweep.groups) return;
    float *out = partial ? partial + ((int64_t)blockIdx.x * sweep.groups + sweep.group) * columns : nullptr;
    for (int c = sweep.lane * VEC; c < columns; c += sweep.lanes * VEC) {
        float dw[VEC] = {}, again[VEC];
        if (weight) load<VEC>(w, weight + c);
        for (int64_t row = first + sweep.group; row < last; row += sweep.groups) {
            float rstd = saved_rstd[row], factor = row_factor[row - first];
            load<VEC>(value, x + row * columns + c);
            load<VEC>(grad, dy + row * columns + c);
            keep_scales<VEC>(keep, dropout, row * columns + c);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float xhat = value[i] * rstd;
                dw[i] += keep[i] * grad[i] * xhat;
                again[i] = keep[i] * xhat * (1.0f + w[i]);
                grad[i] = rstd * (keep[i] * grad[i] * (1.0f + w[i]) - value[i] * factor);
            }
            store<VEC>(dx + row * columns + c, grad);
            if (y) store<VEC>(y + row * columns + c, again);
        }
        if (out) {
#pragma unroll
            for (int i = 0; i < VEC; i++) out[c + i] = dw[i];
        }
    }
}

/* dx is written and may be dy; y (NULL: not wanted) is recomputed; dweight (NULL: none) is added to. */
template <typename T>
static void rmsnorm_backward(Context *context, T *dx, T *y, float *dweight, const T *dy, const float *rstd,
                             const T *x, const T *weight, int64_t rows, int64_t columns, Dropout dropout) {
    ScratchScope scope(context);
    float *partial = dweight ? take_partials(context, rows, columns) : nullptr;
    WITH_VEC(T, vectorises<T>(columns, dx, y, dy, x, weight), {
        LAUNCH((rmsnorm_backward_kernel<T, VEC>), sweep_blocks(rows), SWEEP_THREADS, context, dx, y, partial,
               dy, rstd, x, weight, rows, (int)columns, dropout);
        if (dweight)
            add_partials(context, dweight, partial, (int64_t)sweep_blocks(rows) * sweep_groups(columns, VEC),
                         columns);
    });
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

/* y = xhat (1 + w) + b:  with g = dy (1 + w):  dx = rstd (g - mean(g) - xhat mean(g xhat));  dw += dy xhat;
 * db += dy computes: dx, partial sums of dw and db, and y once more (NULL: not wanted)
 * launch:   grid ceil(rows / 32), block 256: first a warp a row for its sums, then a thread walks down its
 *           columns
 * traffic:  4 rows columns sizeof(T) bytes: x and dy read (again from the caches), dx and y written
 * needs:    VEC 16 / sizeof(T) wants columns and pointers in multiples of 16 bytes; VEC 1 takes anything; dx
 *           may be dy
 * numerics: float sums in a fixed order: deterministic */
template <typename T, int VEC>
__global__ void __launch_bounds__(SWEEP_THREADS, 4)
    layernorm_backward_kernel(T *dx, T *y, float *partial_w, float *partial_b, const T *dy, const T *x,
                              const float *mean, const float *rstd, const T *weight, const T *bias,
                              int64_t rows, int columns) {
    __shared__ float row_g[SWEEP_ROWS], row_gx[SWEEP_ROWS];
    int64_t first = (int64_t)blockIdx.x * SWEEP_ROWS, last = min(first + SWEEP_ROWS, rows);
    float value[VEC], grad[VEC], w[VEC] = {}, b[VEC] = {};
    int lane = (int)threadIdx.x % WARP_SIZE;
    for (int64_t row = first + threadIdx.x / WARP_SIZE; row < last; row += SWEEP_THREADS / WARP_SIZE) {
        float g_sum = 0, gx_sum = 0, row_mean = mean[row], row_rstd = rstd[row];
        for (int c = lane * VEC; c < columns; c += WARP_SIZE * VEC) {
            load<VEC>(value, x + row * columns + c);
            load<VEC>(grad, dy + row * columns + c);
            if (weight) load<VEC>(w, weight + c);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float g = grad[i] * (1.0f + w[i]);
                g_sum += g;
                gx_sum += g * (value[i] - row_mean) * row_rstd;
            }
        }
        g_sum = warp_sum(g_sum), gx_sum = warp_sum(gx_sum);
        if (lane == 0)
            row_g[row - first] = g_sum / (float)columns, row_gx[row - first] = gx_sum / (float)columns;
    }
    __syncthreads(); // the rows' sums are known, and nobody reads dy for them any more: dx may overwrite it

    Sweep sweep(columns, VEC);
    if (sweep.group >= sweep.groups) return;
    int64_t out = ((int64_t)blockIdx.x * sweep.groups + sweep.group) * columns;
    for (int c = sweep.lane * VEC; c < columns; c += sweep.lanes * VEC) {
        float dw[VEC] = {}, db[VEC] = {}, again[VEC];
        if (weight) load<VEC>(w, weight + c);
        if (bias) load<VEC>(b, bias + c);
        for (int64_t row = first + sweep.group; row < last; row += sweep.groups) {
            int r = (int)(row - first);
            float row_mean = mean[row], row_rstd = rstd[row];
            load<VEC>(value, x + row * columns + c);
            load<VEC>(grad, dy + row * columns + c);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float xhat = (value[i] - row_mean) * row_rstd;
                dw[i] += grad[i] * xhat;
                db[i] += grad[i];
                again[i] = xhat * (1.0f + w[i]) + b[i];
                grad[i] = row_rstd * (grad[i] * (1.0f + w[i]) - row_g[r] - xhat * row_gx[r]);
            }
            store<VEC>(dx + row * columns + c, grad);
            if (y) store<VEC>(y + row * columns + c, again);
        }
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            if (partial_w) partial_w[out + c + i] = dw[i];
            if (partial_b) partial_b[out + c + i] = db[i];
        }
    }
}

/* dx is written and may be dy; y (NULL: not wanted) is recomputed; dweight, dbias (NULL: none) are added to.
 * */
template <typename T>
static void layernorm_backward(Context *context, T *dx, T *y, float *dweight, float *dbias, const T *dy,
                               const float *mean, const float *rstd, const T *x, const T *weight,
                               const T *bias, int64_t rows, int64_t columns) {
    ScratchScope scope(context);
    float *partial_w = dweight ? take_partials(context, rows, columns) : nullptr;
    float *partial_b = dbias ? take_partials(context, rows, columns) : nullptr;
    WITH_VEC(T, vectorises<T>(columns, dx, y, dy, x, weight, bias), {
        int64_t count = (int64_t)sweep_blocks(rows) * sweep_groups(columns, VEC);
        LAUNCH((layernorm_backward_kernel<T, VEC>), sweep_blocks(rows), SWEEP_THREADS, context, dx, y,
               partial_w, partial_b, dy, x, mean, rstd, weight, bias, rows, (int)columns);
        if (dweight) add_partials(context, dweight, partial_w, count, columns);
        if (dbias) add_partials(context, dbias, partial_b, count, columns);
    });
}

#endif
