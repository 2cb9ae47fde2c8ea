/* norms.cuh - RMSNorm and LayerNorm, forward and backward, with the dropout of m fused into RMSNorm.
 */
#ifndef CUDA_NORMS_CUH
#define CUDA_NORMS_CUH

#include "common.cuh"

enum { NORM_THREADS = 256 };

/* ----------------------------------------------------------------------------------------------------------
 * Forward of both: LayerNorm is the CENTRED one, RMSNorm has no mean, no bias, and dropout after it.
 */

/* Vectors of a row that a thread holds: with more of them, fewer blocks find room. */
enum { NORM_HELD = 4, NORM_HELD_LONG = 8 };

template <typename T> struct NormForward {
    T *y;
    float *mean, *rstd; /* saved; only CENTRED has a mean */
    const T *x, *weight, *bias;
    Dropout dropout;
    int64_t rows;
    int columns, lanes; /* lanes of a warp that own a row */
    float eps;
};

/* computes: y[row, j] = keep ((x[row, j] - mean[row]) rstd[row] (1 + w[j]) + b[j]); mean is 0 if not CENTRED,
 *           keep is 1 if not DROPS
 * launch:   grid ceil(rows lanes / 256), block 256: `lanes` lanes of a warp own a row; a thread asks for HELD
 *           vectors of it at once and holds them as words
 * traffic:  2 rows columns sizeof(T) bytes; of rows that have MORE the rest is read again, from the caches
 * needs:    without MORE columns at most lanes HELD VEC; VEC 16 / sizeof(T) wants columns and pointers in
 *           multiples of 16 bytes; VEC 1 takes anything
 * numerics: float, two passes for the variance, fixed order: deterministic */
template <typename T, int VEC, int HELD, bool MORE, bool CENTRED, bool DROPS>
__global__ void __launch_bounds__(NORM_THREADS, HELD > NORM_HELD || MORE || DROPS ? 3 : 5)
    norm_forward_kernel(NormForward<T> n) {
    int columns = n.columns, lanes = n.lanes, lane = (int)threadIdx.x % lanes;
    int64_t row = (int64_t)blockIdx.x * (NORM_THREADS / lanes) + threadIdx.x / (unsigned)lanes;
    bool active = row < n.rows;
    if (!active) row = 0; // the shuffles below want every lane
    const T *x = n.x + row * columns;
    VectorWords<T, VEC> held[HELD];
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int c = (lane + k * lanes) * VEC;
        if (c < columns) held[k] = words_at<VEC>(x + c);
    }
    /* Calls f(vector, its first column) for all of this thread's vectors. */
    auto each = [&](auto f) {
        float value[VEC];
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int c = (lane + k * lanes) * VEC;
            if (c >= columns) break;
            numbers_of(value, held[k]);
            f(value, c);
        }
        for (int c = (lane + HELD * lanes) * VEC; MORE && c < columns; c += lanes * VEC) {
            load<VEC>(value, x + c);
            f(value, c);
        }
    };
    float mean = 0, sum = 0;
    if (CENTRED) {
        each([&](const float (&value)[VEC], int) {
#pragma unroll
            for (int i = 0; i < VEC; i++) mean += value[i];
        });
        mean = lanes_sum(mean, lanes) / (float)columns;
    }
    each([&](const float (&value)[VEC], int) {
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += (value[i] - mean) * (value[i] - mean);
    });
    float rstd = 1.0f / sqrtf(lanes_sum(sum, lanes) / (float)columns + n.eps);
    if (!active) return;
    if (lane == 0) {
        if (CENTRED) n.mean[row] = mean;
        n.rstd[row] = rstd;
    }
    each([&](const float (&value)[VEC], int c) {
        float w[VEC] = {}, b[VEC] = {}, out[VEC];
        if (n.weight) load<VEC>(w, n.weight + c);
        if (n.bias) load<VEC>(b, n.bias + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) out[i] = (value[i] - mean) * rstd * (1.0f + w[i]) + b[i];
        if (DROPS) drop<VEC>(out, n.dropout, row * columns + c);
        store<VEC>(n.y + row * columns + c, out);
    });
}

/* As few lanes own a row as hold it in NORM_HELD vectors each, and a warp owns a longer one. */
template <typename T, int VEC, bool CENTRED, bool DROPS>
static void norm_forward_of(Context *context, NormForward<T> n) {
    n.lanes = 1;
    while (n.lanes < WARP_SIZE && n.lanes * VEC * NORM_HELD < n.columns) n.lanes *= 2;
    unsigned blocks = blocks_for(n.rows * n.lanes, NORM_THREADS);
    if (n.columns <= n.lanes * VEC * NORM_HELD)
        LAUNCH((norm_forward_kernel<T, VEC, NORM_HELD, false, CENTRED, DROPS>), blocks, NORM_THREADS,
               context, n);
    else if (n.columns <= n.lanes * VEC * NORM_HELD_LONG)
        LAUNCH((norm_forward_kernel<T, VEC, NORM_HELD_LONG, false, CENTRED, DROPS>), blocks, NORM_THREADS,
               context, n);
    else
        LAUNCH((norm_forward_kernel<T, VEC, NORM_HELD, true, CENTRED, DROPS>), blocks, NORM_THREADS,
               context, n);
}
template <typename T, bool CENTRED> static void norm_forward(Context *context, const NormForward<T> &n) {
    WITH_VEC(T, vectorises<T>(n.columns, n.y, n.x, n.weight, n.bias), {
        if (n.dropout.threshold) // of RMSNorm
            norm_forward_of<T, VEC, CENTRED, !CENTRED>(context, n);
        else
            norm_forward_of<T, VEC, CENTRED, false>(context, n);
    });
}

/* ----------------------------------------------------------------------------------------------------------
 * Backward of both
 */

template <typename T> struct NormBackward {
    T *dx, *y;
    float *partial_w, *partial_b, *partial_dx; /* rows of take_sum, or NULL; only CENTRED has the last two */
    const T *dy, *x;
    const float *mean, *rstd;
    const T *weight, *bias;
    Dropout dropout;
    int64_t rows;
    int columns, gap, batch; /* gap: between rows of dx and of dy; batch: see NORM_BATCH */
};

/* Gradients that are sums over rows; NULL: not wanted. They wait for add_sums. */
struct NormSums { float *dweight, *dbias, *dcolumns; };

template <typename T>
static void take_norm_sums(Context *context, NormBackward<T> &n, const NormSums &sums, int64_t blocks) {
    n.partial_w = take_sum(context, sums.dweight, blocks, n.columns);
    n.partial_b = take_sum(context, sums.dbias, blocks, n.columns);
    n.partial_dx = take_sum(context, sums.dcolumns, blocks, n.columns);
}

/* ---- rows of any length, in batches: a batch is read a second time, from the caches ---- */

/* A block takes a few rows at a time, as many as the first cache holds for all blocks of a multiprocessor. */
enum { NORM_BATCH = 16, NORM_BATCH_BYTES = 32768, NORM_BLOCKS = 3 };

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
static void norm_backward_batches(Context *context, NormBackward<T> n, const NormSums &sums) {
    WITH_VEC(T, vectorises<T>(n.columns | n.gap, n.dx, n.y, n.dy, n.x, n.weight, n.bias), {
        int64_t groups = SWEEP_THREADS / min(ceil_div(n.columns, VEC), (int64_t)SWEEP_THREADS);
        int64_t fit =
            min((int64_t)NORM_BATCH_BYTES / (2 * n.columns * (int64_t)sizeof(T)), (int64_t)NORM_BATCH);
        n.batch = (int)min(max(fit / groups, (int64_t)1) * groups, (int64_t)NORM_BATCH);
        int64_t blocks = min(ceil_div(n.rows, n.batch), (int64_t)context->num_sms * NORM_BLOCKS);
        take_norm_sums(context, n, sums, blocks);
        LAUNCH((norm_backward_kernel<T, VEC, CENTRED>), (unsigned)blocks, SWEEP_THREADS, context, n);
    });
}

/* ---- rows that the registers of a few warps hold: x and dy are read once. The rows to come are on their way
 * into shared memory meanwhile, and every thread reads only what it has asked for itself. ---- */

/* Room for AHEAD rows that are on their way and the one that is worked on, HELD vectors a thread, and in the
 * end for sums. 3 blocks with two rows of 2,048 bf16 each on their way have asked for 48 KB a multiprocessor,
 * which is about what memory needs at its full rate; threads that hold more have less room for rows ahead. */
template <typename T, int VEC, int HELD> struct NormMemory {
    static constexpr int BLOCKS = HELD == 1 ? 3 : 2; // of a multiprocessor: what the sums leave of registers
    static constexpr int AHEAD = HELD == 2 ? 1 : 2;
    union {
        struct {
            VectorWords<T, VEC> x[AHEAD + 1][HELD][SWEEP_THREADS], dy[AHEAD + 1][HELD][SWEEP_THREADS];
            float mean[AHEAD + 1][SWEEP_THREADS], rstd[AHEAD + 1][SWEEP_THREADS];
        };
        SweepSums<VEC> sums;
    };
};

/* computes: as norm_backward_kernel
 * launch:   grid at most 3 or 2 blocks a multiprocessor, block 256: WARPS warps own a row, a thread HELD
 *           vectors of it; a block takes 8 / WARPS rows at a time, in turn with the others, and its sums over
 *           rows stay in registers until the end
 * traffic:  as norm_backward_kernel, but nothing is read twice
 * needs:    columns at most 32 WARPS HELD VEC; VEC wants columns, gap and pointers in multiples of VEC
 *           elements; 30 to 42 KB of shared memory; dx may be dy
 * numerics: float sums in a fixed order: deterministic */
template <typename T, int VEC, int HELD, int WARPS, bool CENTRED>
__global__ void __launch_bounds__(SWEEP_THREADS, (NormMemory<T, VEC, HELD>::BLOCKS))
    norm_backward_ahead_kernel(NormBackward<T> n) {
    constexpr int AHEAD = NormMemory<T, VEC, HELD>::AHEAD, LANES = WARPS * WARP_SIZE, WIDTH = LANES * VEC;
    constexpr int TEAMS = SWEEP_THREADS / LANES;
    __shared__ NormMemory<T, VEC, HELD> memory;
    __shared__ float2 parts[2][TEAMS][WARPS];
    int team = (int)threadIdx.x / LANES, first_column = (int)threadIdx.x % LANES * VEC;
    int columns = n.columns, pitch = columns + n.gap, rows = (int)n.rows;
    int stride = (int)gridDim.x * TEAMS, begin = (int)blockIdx.x * TEAMS, slot = 0, side = 0;
    float share = 1.0f / (float)columns, gain[HELD][VEC] = {}, sum_w[HELD][VEC] = {};
    float sum_b[HELD][VEC] = {}, sum_dx[HELD][VEC] = {};
    auto ask = [&](int row, int to) {
        bool some = row < rows;
        if (!some) row = 0;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int c = first_column + k * WIDTH, column = c < columns ? c : 0;
            const T *x = n.x + (int64_t)row * columns + column, *dy = n.dy + (int64_t)row * pitch + column;
            copy_early<VEC * sizeof(T)>(&memory.x[to][k][threadIdx.x], x, some && c < columns);
            copy_early<VEC * sizeof(T)>(&memory.dy[to][k][threadIdx.x], dy, some && c < columns);
        }
        copy_early<sizeof(float)>(&memory.rstd[to][threadIdx.x], n.rstd + row, some);
        if (CENTRED) copy_early<sizeof(float)>(&memory.mean[to][threadIdx.x], n.mean + row, some);
        copies_commit();
    };
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        int c = first_column + k * WIDTH;
        if (n.weight && c < columns) load<VEC>(gain[k], n.weight + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) gain[k][i] += 1;
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) ask(begin + team + i * stride, i);
    for (; begin < rows; begin += stride) {
        /* The row before this one has been dealt with: its place is free. */
        int row = begin + team;
        ask(row + AHEAD * stride, slot == 0 ? AHEAD : slot - 1);
        copies_wait<AHEAD>();
        float xhat[HELD][VEC], grad[HELD][VEC], g_mean = 0, gx_mean = 0;
        float rstd = memory.rstd[slot][threadIdx.x], mean = CENTRED ? memory.mean[slot][threadIdx.x] : 0.0f;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            numbers_of(xhat[k], memory.x[slot][k][threadIdx.x]);
            numbers_of(grad[k], memory.dy[slot][k][threadIdx.x]);
            if (!CENTRED) drop<VEC>(grad[k], n.dropout, (int64_t)row * columns + first_column + k * WIDTH);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                xhat[k][i] = (CENTRED ? xhat[k][i] - mean : xhat[k][i]) * rstd;
                float g = grad[k][i] * gain[k][i];
                if (CENTRED) g_mean += g;
                gx_mean += g * xhat[k][i];
            }
        }
        if (CENTRED) g_mean = warp_sum(g_mean);
        gx_mean = warp_sum(gx_mean);
        if constexpr (WARPS > 1) {
            if (threadIdx.x % WARP_SIZE == 0)
                parts[side][team][threadIdx.x % LANES / WARP_SIZE] = make_float2(g_mean, gx_mean);
            __syncthreads(); // the row's parts are there; nobody reads the other side's after this
            g_mean = gx_mean = 0;
#pragma unroll
            for (int warp = 0; warp < WARPS; warp++)
                g_mean += parts[side][team][warp].x, gx_mean += parts[side][team][warp].y;
            side ^= 1;
        }
        g_mean *= share, gx_mean *= share;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int c = first_column + k * WIDTH;
            float out[VEC], bias[VEC] = {};
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                out[i] = grad[k][i] * gain[k][i] - xhat[k][i] * gx_mean;
                out[i] = rstd * (CENTRED ? out[i] - g_mean : out[i]);
                sum_w[k][i] += grad[k][i] * xhat[k][i];
                if (CENTRED) sum_b[k][i] += grad[k][i], sum_dx[k][i] += out[i];
            }
            if (row >= rows || c >= columns) continue;
            store<VEC>(n.dx + (int64_t)row * pitch + c, out);
            if (!n.y) continue;
            if (n.bias) load<VEC>(bias, n.bias + c);
#pragma unroll
            for (int i = 0; i < VEC; i++) out[i] = xhat[k][i] * gain[k][i] + bias[i];
            if (!CENTRED) drop<VEC>(out, n.dropout, (int64_t)row * columns + c);
            store<VEC>(n.y + (int64_t)row * columns + c, out);
        }
        slot = slot == AHEAD ? 0 : slot + 1;
    }
    copies_wait<0>(); // zeros still come where rows past the last were asked for: the sums lie there
    /* The block's sums over rows are those of its teams. */
    auto write = [&](float *partial, const float (&sum)[HELD][VEC]) {
        if (!partial) return;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            int c = first_column + k * WIDTH;
            __syncthreads(); // nobody reads rows or the sums of another vector any more
            store<VEC>(memory.sums[threadIdx.x].v, sum[k]);
            __syncthreads(); // all teams' sums are there
            if (team > 0 || c >= columns) continue;
            float total[VEC] = {}, part[VEC];
#pragma unroll
            for (int t = 0; t < TEAMS; t++) {
                load<VEC>(part, memory.sums[t * LANES + (int)threadIdx.x].v);
#pragma unroll
                for (int i = 0; i < VEC; i++) total[i] += part[i];
            }
            store<VEC>(partial + (int64_t)blockIdx.x * columns + c, total);
        }
    };
    write(n.partial_w, sum_w);
    if (CENTRED) write(n.partial_b, sum_b), write(n.partial_dx, sum_dx);
}

template <typename T, int VEC, int HELD, int WARPS, bool CENTRED>
static void norm_backward_ahead(Context *context, NormBackward<T> n, const NormSums &sums) {
    int64_t most = (int64_t)context->num_sms * NormMemory<T, VEC, HELD>::BLOCKS;
    int64_t blocks = min(ceil_div(n.rows * WARPS, SWEEP_THREADS / WARP_SIZE), most);
    take_norm_sums(context, n, sums, blocks);
    LAUNCH((norm_backward_ahead_kernel<T, VEC, HELD, WARPS, CENTRED>), (unsigned)blocks, SWEEP_THREADS,
           context, n);
}

/* Short rows are a warp's, three vectors of 8 bytes a lane; longer ones several warps', a vector or two of 16
 * bytes a lane. */
template <typename T, bool CENTRED>
static void norm_backward(Context *context, const NormBackward<T> &n, const NormSums &sums) {
    constexpr int WIDE = 16 / (int)sizeof(T), HALF = WIDE / 2, WARP_WIDE = WARP_SIZE * WIDE;
    int width = vector_width<T>(n.columns | n.gap, n.dx, n.y, n.dy, n.x, n.weight, n.bias);
    if (width >= HALF && n.columns <= 3 * WARP_SIZE * HALF)
        norm_backward_ahead<T, HALF, 3, 1, CENTRED>(context, n, sums);
    else if (width == WIDE && n.columns <= 2 * WARP_WIDE)
        norm_backward_ahead<T, WIDE, 1, 2, CENTRED>(context, n, sums);
    else if (width == WIDE && n.columns <= 4 * WARP_WIDE)
        norm_backward_ahead<T, WIDE, 1, 4, CENTRED>(context, n, sums);
    else if (width == WIDE && n.columns <= 8 * WARP_WIDE)
        norm_backward_ahead<T, WIDE, 1, 8, CENTRED>(context, n, sums);
    else if (width == WIDE && n.columns <= 16 * WARP_WIDE)
        norm_backward_ahead<T, WIDE, 2, 8, CENTRED>(context, n, sums);
    else
        norm_backward_batches<T, CENTRED>(context, n, sums);
}

/* ----------------------------------------------------------------------------------------------------------
 * RMSNorm: y = x rstd (1 + w), rstd = 1 / sqrt(mean(x^2) + eps); then dropout.
 */

/* y and x are rows,columns; rstd (rows) is saved; weight (columns) may be NULL. */
template <typename T>
static void rmsnorm_forward(Context *context, T *y, float *rstd, const T *x, const T *weight, int64_t rows,
                            int64_t columns, float eps, Dropout dropout) {
    NormForward<T> norm = {};
    norm.y = y, norm.rstd = rstd, norm.x = x, norm.weight = weight, norm.dropout = dropout;
    norm.rows = rows, norm.columns = (int)columns, norm.eps = eps;
    norm_forward<T, false>(context, norm);
}

/* dx is written and may be dy; y (NULL: not wanted) is recomputed; dweight (NULL: none) is added to by the
 * next add_sums. */
template <typename T>
static void rmsnorm_backward(Context *context, T *dx, T *y, float *dweight, const T *dy, const float *rstd,
                             const T *x, const T *weight, int64_t rows, int64_t columns, Dropout dropout) {
    NormBackward<T> norm = {};
    norm.dx = dx, norm.y = y, norm.dy = dy, norm.x = x, norm.rstd = rstd, norm.weight = weight;
    norm.dropout = dropout, norm.rows = rows, norm.columns = (int)columns;
    norm_backward<T, false>(context, norm, NormSums{dweight, nullptr, nullptr});
}

/* ----------------------------------------------------------------------------------------------------------
 * LayerNorm: y = (x - mean) rstd (1 + w) + b, rstd = 1 / sqrt(var + eps).
 */

/* y and x are rows,columns; mean and rstd (rows) are saved; weight and bias (columns) may be NULL. */
template <typename T>
static void layernorm_forward(Context *context, T *y, float *mean, float *rstd, const T *x, const T *weight,
                              const T *bias, int64_t rows, int64_t columns, float eps) {
    NormForward<T> norm = {};
    norm.y = y, norm.mean = mean, norm.rstd = rstd, norm.x = x, norm.weight = weight, norm.bias = bias;
    norm.rows = rows, norm.columns = (int)columns, norm.eps = eps;
    norm_forward<T, true>(context, norm);
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
    norm.weight = weight, norm.bias = bias;
    norm.rows = rows, norm.columns = (int)columns, norm.gap = gap;
    norm_backward<T, true>(context, norm, NormSums{dweight, dbias, dcolumns});
}

#endif
