/* timestepnorm.cuh - TimestepNorm: each group of features is normalised by the mean and variance of
 * everything that its row of the batch has seen up to and including this step. Both directions are scans
 * over time.
 *
 * Forward. (count, mean, variance) of two stretches of time merge by Chan's formula; nothing is ever the
 * difference of two long sums, so a large mean or a million steps do no harm. A tile of 32 steps is scanned
 * by a warp, a lane a step; the tiles' totals are scanned by a block for each row and group; then every step
 * merges its tile's prefix with its own place in the tile.
 *
 * Backward. With k_t the steps seen at t, and dm_t, dv_t the gradients of mean_t and var_t from y_t alone,
 * let
 *     U_t = sum over s >= t of dv_s / k_s
 *     P_t = sum over s >= t of (dm_s - 2 dv_s (mean_s - mean_t)) / k_s
 * then dx_t = rstd_t g_t + (P_t + 2 (x_t - mean_t) U_t) / size, g = dy (1 + w), size = D/G, because mean_s
 * and var_s weigh every element seen by 1 / (k_s size). Two stretches of time, the earlier one A, merge by
 *     U = U_A + U_B,   P = P_A + P_B - 2 U_B (mean_B - mean_A)      (mean_X: the mean at X's first step)
 * so that again only differences of neighbouring means appear.
 */
#ifndef CUDA_TIMESTEPNORM_CUH
#define CUDA_TIMESTEPNORM_CUH

#include "common.cuh"

enum {
    TILE_STEPS = WARP_SIZE,
    TILE_GROUPS = 32,
    TILE_THREADS = 256,
    TILE_SCAN_THREADS = 256,
    APPLY_ROWS = 8
};

/* Mean and population variance of `count` steps. */
template <typename A> struct Moments { A count, mean, var; };

/* a comes before b. An empty side (count 0) changes nothing. */
template <typename A> __device__ inline Moments<A> merge(const Moments<A> &a, const Moments<A> &b) {
    A total = a.count + b.count;
    if (total == 0) return a;
    A share = b.count / total, difference = b.mean - a.mean;
    Moments<A> result;
    result.count = total;
    result.mean = a.mean + share * difference;
    result.var = a.var + share * (b.var - a.var) + share * (1 - share) * difference * difference;
    return result;
}

template <typename A> __device__ inline Moments<A> shuffle_up(const Moments<A> &m, int step) {
    return Moments<A>{__shfl_up_sync(FULL_MASK, m.count, step), __shfl_up_sync(FULL_MASK, m.mean, step),
                      __shfl_up_sync(FULL_MASK, m.var, step)};
}

/* Inclusive scan over the lanes of a warp. */
template <typename A> __device__ inline Moments<A> warp_scan(Moments<A> m, int lane) {
    for (int step = 1; step < WARP_SIZE; step *= 2) {
        Moments<A> before = shuffle_up(m, step);
        if (lane >= step) m = merge(before, m);
    }
    return m;
}

/* How a block shares a tile: `lanes` threads a group and step (a power of two), each with VEC elements at a
 * time. */
template <typename T> static int lanes_per_group(int64_t size, int vec) {
    int lanes = 1;
    while (lanes * 2 <= WARP_SIZE && lanes * 2 * vec <= size) lanes *= 2;
    return lanes;
}

/* Unit by unit through a tile, `units` at a time, without a division each time. */
struct TileWalk {
    int step, group, groups, step_stride, group_stride;
    __device__ TileWalk(int unit, int units, int groups_here) {
        groups = groups_here, step = unit / groups, group = unit % groups;
        step_stride = units / groups, group_stride = units % groups;
    }
    __device__ void next() {
        step += step_stride, group += group_stride;
        if (group >= groups) group -= groups, step++;
    }
};

/* computes: for each group and step of a tile, mean and variance of the tile's steps up to it; and of the
 * whole tile
 * launch:   grid (tiles, ceil(G / 32), B), block 256: `lanes` lanes own a group of a step; then a warp scans
 *           a group
 * traffic:  B T D sizeof(T) bytes read, 2 B T G sizeof(Accum) written
 * needs:    VEC wants D/G and pointers in multiples of VEC elements; VEC 1 takes anything
 * numerics: two passes for a step's variance; Accum is double for float; fixed order: deterministic */
template <typename T, int VEC>
__global__ void timestepnorm_tile_kernel(Pair<Accum<T>> *local, Pair<double> *tiles, const T *x, int steps,
                                         int D, int G, int lanes) {
    using A = Accum<T>;
    __shared__ Pair<A> step_moments[TILE_STEPS][TILE_GROUPS + 1];
    int size = D / G, tile = (int)blockIdx.x, num_tiles = (int)gridDim.x, b = (int)blockIdx.z;
    int first_group = (int)blockIdx.y * TILE_GROUPS, groups = min(TILE_GROUPS, G - first_group);
    int first_step = tile * TILE_STEPS, count = min((int)TILE_STEPS, steps - first_step);
    int lane = (int)threadIdx.x % lanes, units = TILE_THREADS / lanes;
    A inverse_size = (A)1 / (A)size;
    /* All lanes of a warp make the same number of rounds, so that the shuffles below find them all. */
    TileWalk walk((int)threadIdx.x / lanes, units, groups);
    for (int round = 0; round * units < groups * count; round++, walk.next()) {
        bool active = walk.step < count;
        int step = active ? walk.step : 0, group = active ? walk.group : 0;
        const T *values =
            x + ((int64_t)b * steps + first_step + step) * D + (int64_t)(first_group + group) * size;
        float value[VEC];
        A sum = 0, squares = 0;
        for (int i = lane * VEC; i < size; i += lanes * VEC) {
            load<VEC>(value, values + i);
#pragma unroll
            for (int j = 0; j < VEC; j++) sum += value[j];
        }
        A mean = lanes_sum(sum, lanes) * inverse_size;
        for (int i = lane * VEC; i < size; i += lanes * VEC) {
            load<VEC>(value, values + i);
#pragma unroll
            for (int j = 0; j < VEC; j++) squares += (value[j] - mean) * (value[j] - mean);
        }
        A var = lanes_sum(squares, lanes) * inverse_size;
        if (active && lane == 0) step_moments[step][group] = Pair<A>{mean, var};
    }
    __syncthreads(); // the steps' own moments are all there for the scans

    int step = (int)threadIdx.x % WARP_SIZE;
    for (int group = (int)threadIdx.x / WARP_SIZE; group < groups; group += TILE_THREADS / WARP_SIZE) {
        Moments<A> m = {0, 0, 0};
        if (step < count) m = Moments<A>{1, step_moments[step][group].x, step_moments[step][group].y};
        m = warp_scan(m, step);
        if (step < count) step_moments[step][group] = Pair<A>{m.mean, m.var};
        if (step == count - 1)
            tiles[((int64_t)b * G + first_group + group) * num_tiles + tile] = Pair<double>{m.mean, m.var};
    }
    __syncthreads(); // the scans are done: write them out row by row
    for (int i = (int)threadIdx.x; i < count * groups; i += TILE_THREADS)
        local[((int64_t)b * steps + first_step + i / groups) * G + first_group + i % groups] =
            step_moments[i / groups][i % groups];
}

/* computes: tiles[b, g, i] becomes the moments of everything before tile i (the state that came in
 * included); the
 *           moments after the last tile go to mean_out and var_out
 * launch:   grid B G, block 256: a thread owns a tile, 256 tiles at a time
 * traffic:  32 B G T/32 bytes
 * needs:    nothing; mean_in NULL is an empty state; state in and out may be the same memory
 * numerics: double, fixed order: deterministic */
__global__ static void timestepnorm_scan_kernel(Pair<double> *tiles, double *mean_out, double *var_out,
                                                const int64_t *count, const double *mean_in,
                                                const double *var_in, int num_tiles, int steps, int G) {
    __shared__ Moments<double> warp_totals[TILE_SCAN_THREADS / WARP_SIZE];
    int bg = (int)blockIdx.x, lane = (int)threadIdx.x % WARP_SIZE, warp = (int)threadIdx.x / WARP_SIZE;
    Moments<double> before = {0, 0, 0};
    if (mean_in) before = Moments<double>{(double)count[bg / G], mean_in[bg], var_in[bg]};
    for (int first = 0; first < num_tiles; first += TILE_SCAN_THREADS) {
        int tile = first + (int)threadIdx.x;
        Moments<double> m = {0, 0, 0};
        if (tile < num_tiles) {
            Pair<double> total = tiles[(int64_t)bg * num_tiles + tile];
            m = Moments<double>{(double)min((int)TILE_STEPS, steps - tile * TILE_STEPS), total.x, total.y};
        }
        m = warp_scan(m, lane);
        if (lane == WARP_SIZE - 1) warp_totals[warp] = m;
        Moments<double> exclusive = shuffle_up(m, 1);
        if (lane == 0) exclusive = Moments<double>{0, 0, 0};
        __syncthreads(); // the warps' totals are there
        Moments<double> prefix = before;
        for (int i = 0; i < warp; i++) prefix = merge(prefix, warp_totals[i]);
        prefix = merge(prefix, exclusive);
        if (tile < num_tiles) tiles[(int64_t)bg * num_tiles + tile] = Pair<double>{prefix.mean, prefix.var};
        for (int i = 0; i < TILE_SCAN_THREADS / WARP_SIZE; i++) before = merge(before, warp_totals[i]);
        __syncthreads(); // all have read the totals: the next round may write them
    }
    if (threadIdx.x == 0 && mean_out) mean_out[bg] = before.mean, var_out[bg] = before.var;
}

/* computes: mean_t, var_t and y_t = (x_t - mean_t) / sqrt(var_t + eps) (1 + w) + b
 * launch:   grid (ceil(T / 8), B), block 256: threads merge the moments of 8 steps, then walk over the rows
 *           in vectors
 * traffic:  2 B T D sizeof(T) + 2 B T G (sizeof(Accum) + 4) bytes
 * needs:    VEC wants D/G and pointers in multiples of VEC elements; VEC 1 takes anything
 * numerics: prefixes are merged in double */
template <typename T, int VEC>
__global__ void timestepnorm_apply_kernel(T *y, float *mean, float *var, const Pair<Accum<T>> *local,
                                          const Pair<double> *tiles, const int64_t *count, bool has_state,
                                          const T *x, const T *weight, const T *bias, int steps, int D,
                                          int G, int num_tiles, float eps) {
    using A = Accum<T>;
    __shared__ A shared_mean[APPLY_ROWS * TILE_GROUPS];
    __shared__ float shared_rstd[APPLY_ROWS * TILE_GROUPS];
    int b = (int)blockIdx.y, first = (int)blockIdx.x * APPLY_ROWS,
        rows = min((int)APPLY_ROWS, steps - first), size = D / G;
    double seen = has_state ? (double)count[b] : 0;
    for (int first_group = 0; first_group < G; first_group += TILE_GROUPS) {
        int groups = min((int)TILE_GROUPS, G - first_group);
        for (int i = (int)threadIdx.x; i < rows * groups; i += (int)blockDim.x) {
            int t = first + i / groups, g = first_group + i % groups, tile = t / TILE_STEPS;
            int64_t at = ((int64_t)b * steps + t) * G + g;
            Pair<double> prefix = tiles[((int64_t)b * G + g) * num_tiles + tile];
            Moments<double> m = merge(
                Moments<double>{seen + (double)tile * TILE_STEPS, prefix.x, prefix.y},
                Moments<double>{(double)(t % TILE_STEPS + 1), (double)local[at].x, (double)local[at].y});
            mean[at] = (float)m.mean;
            var[at] = (float)m.var;
            shared_mean[i] = (A)m.mean;
            shared_rstd[i] = (float)(1.0 / sqrt(m.var + (double)eps));
        }
        __syncthreads(); // the moments of these rows and groups are there
        int width = groups * size, vectors = width / VEC;
        for (int i = (int)threadIdx.x; i < rows * vectors; i += (int)blockDim.x) {
            int row = i / vectors, column = (i % vectors) * VEC, group = column / size,
                d = first_group * size + column;
            float value[VEC], w[VEC], add[VEC];
            int64_t at = ((int64_t)b * steps + first + row) * D + d;
            load<VEC>(value, x + at);
            load<VEC>(w, weight + d);
            load<VEC>(add, bias + d);
            A mean_here = shared_mean[row * groups + group];
            float rstd = shared_rstd[row * groups + group];
#pragma unroll
            for (int j = 0; j < VEC; j++)
                value[j] = (float)(value[j] - mean_here) * rstd * (1.0f + w[j]) + add[j];
            store<VEC>(y + at, value);
        }
        __syncthreads(); // all have read the moments: the next groups may overwrite them
    }
}

/* y, x (B,T,D); mean, var (B,T,G) saved; mean_out, var_out (NULL: not wanted), mean_in, var_in (NULL: empty)
 * (B,G) double; count (B) steps before; weight, bias (D). */
template <typename T>
static void timestepnorm_forward(Context *context, T *y, float *mean, float *var, double *mean_out,
                                 double *var_out, const T *x, const int64_t *count, const double *mean_in,
                                 const double *var_in, const T *weight, const T *bias, int64_t B,
                                 int64_t steps, int64_t D, int64_t G, float eps) {
    ScratchScope scope(context);
    int num_tiles = (int)ceil_div(steps, TILE_STEPS);
    Pair<Accum<T>> *local = take<Pair<Accum<T>>>(context, B * steps * G);
    Pair<double> *tiles = take<Pair<double>>(context, B * G * num_tiles);
    WITH_WIDTH(T, vector_width<T>(D / G, y, x, weight, bias), {
        LAUNCH((timestepnorm_tile_kernel<T, VEC>),
               dim3((unsigned)num_tiles, blocks_for(G, TILE_GROUPS), (unsigned)B), TILE_THREADS, context,
               local, tiles, x, (int)steps, (int)D, (int)G, lanes_per_group<T>(D / G, VEC));
        LAUNCH(timestepnorm_scan_kernel, (unsigned)(B * G), TILE_SCAN_THREADS, context, tiles, mean_out,
               var_out, count, mean_in, var_in, num_tiles, (int)steps, (int)G);
        LAUNCH((timestepnorm_apply_kernel<T, VEC>), dim3(blocks_for(steps, APPLY_ROWS), (unsigned)B),
               TILE_THREADS, context, y, mean, var, local, tiles, count, mean_in != nullptr, x, weight, bias,
               (int)steps, (int)D, (int)G, num_tiles, eps);
    });
}

/* computes: y = (x - mean) / sqrt(var + eps) (1 + w) + b from the saved moments
 * launch:   grid ceil(B T D / (256 VEC)), block 256: a thread owns VEC elements
 * traffic:  2 B T D sizeof(T) + 8 B T G bytes
 * needs:    VEC wants D/G and pointers in multiples of VEC elements; VEC 1 takes anything
 * numerics: float */
template <typename T, int VEC>
__global__ void timestepnorm_again_kernel(T *y, const float *mean, const float *var, const T *x,
                                          const T *weight, const T *bias, int64_t count, int D, int G,
                                          float eps) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (at >= count) return;
    /* A division of 64 bits costs more than the rest of this kernel. */
    int64_t row = (at >> 32) == 0 ? (int64_t)((uint32_t)at / (uint32_t)D) : at / D;
    int d = (int)(at - row * D);
    int64_t group = row * G + d / (D / G);
    float value[VEC], w[VEC], add[VEC], mean_here = mean[group], rstd = 1.0f / sqrtf(var[group] + eps);
    load<VEC>(value, x + at);
    load<VEC>(w, weight + d);
    load<VEC>(add, bias + d);
#pragma unroll
    for (int j = 0; j < VEC; j++) value[j] = (value[j] - mean_here) * rstd * (1.0f + w[j]) + add[j];
    store<VEC>(y + at, value);
}

/* The forward's y once more, from what it saved. */
template <typename T>
static void timestepnorm_again(Context *context, T *y, const float *mean, const float *var, const T *x,
                               const T *weight, const T *bias, int64_t rows, int64_t D, int64_t G,
                               float eps) {
    WITH_WIDTH(T, vector_width<T>(D / G, y, x, weight, bias),
             LAUNCH((timestepnorm_again_kernel<T, VEC>), blocks_for(rows * D, 256 * VEC), 256, context, y,
                    mean, var, x, weight, bias, rows * D, (int)D, (int)G, eps));
}

/* ----------------------------------------------------------------------------------------------------------
 * Backward
 */

/* P and U of a stretch of time, and the mean at its first step. An empty stretch has U = P = 0 and any mean.
 * */
template <typename A> struct Suffix { A p, u, mean; };

/* a comes before b */
template <typename A> __device__ inline Suffix<A> merge(const Suffix<A> &a, const Suffix<A> &b) {
    return Suffix<A>{a.p + b.p - 2 * b.u * (b.mean - a.mean), a.u + b.u, a.mean};
}

/* Inclusive suffix scan over the lanes of a warp: lane i gets lanes i, i+1, ... */
template <typename A> __device__ inline Suffix<A> warp_suffix_scan(Suffix<A> s, int lane) {
    for (int step = 1; step < WARP_SIZE; step *= 2) {
        Suffix<A> after = {__shfl_down_sync(FULL_MASK, s.p, step), __shfl_down_sync(FULL_MASK, s.u, step),
                           __shfl_down_sync(FULL_MASK, s.mean, step)};
        if (lane + step < WARP_SIZE) s = merge(s, after);
    }
    return s;
}

/* y = (x - mean) rstd (1 + w) + b:  dm_t = -rstd sum g,  dv_t = -rstd^2/2 sum g xhat
 * computes: for each group and step of a tile the suffix (P, U) within the tile; and the tile's whole
 * launch:   grid (tiles, ceil(G / 32), B), block 256: as timestepnorm_tile_kernel
 * traffic:  2 B T D sizeof(T) bytes read, 2 B T G sizeof(Accum) written
 * needs:    VEC wants D/G and pointers in multiples of VEC elements; VEC 1 takes anything
 * numerics: Accum is double for float; fixed order: deterministic */
template <typename T, int VEC>
__global__ void timestepnorm_backward_tile_kernel(Pair<Accum<T>> *local, Pair<double> *tiles, const T *dy,
                                                  const double *dmean_out, const double *dvar_out,
                                                  const float *mean, const float *var, const T *x,
                                                  const int64_t *count, bool has_state, const T *weight,
                                                  int steps, int D, int G, int lanes, float eps) {
    using A = Accum<T>;
    __shared__ Pair<A> step_sums[TILE_STEPS][TILE_GROUPS + 1];
    int size = D / G, tile = (int)blockIdx.x, num_tiles = (int)gridDim.x, b = (int)blockIdx.z;
    int first_group = (int)blockIdx.y * TILE_GROUPS, groups = min((int)TILE_GROUPS, G - first_group);
    int first_step = tile * TILE_STEPS, tile_steps = min((int)TILE_STEPS, steps - first_step);
    int lane = (int)threadIdx.x % lanes, units = TILE_THREADS / lanes;
    A seen = has_state ? (A)count[b] : (A)0;
    TileWalk walk((int)threadIdx.x / lanes, units, groups);
    for (int round = 0; round * units < groups * tile_steps; round++, walk.next()) {
        bool active = walk.step < tile_steps;
        int step = active ? walk.step : 0, group = active ? walk.group : 0, t = first_step + step;
        int64_t row = (int64_t)b * steps + t, column = (int64_t)(first_group + group) * size;
        float value[VEC], grad[VEC], w[VEC], mean_here = mean[row * G + first_group + group];
        A sum = 0, product = 0;
        for (int i = lane * VEC; i < size; i += lanes * VEC) {
            load<VEC>(value, x + row * D + column + i);
            load<VEC>(grad, dy + row * D + column + i);
            load<VEC>(w, weight + column + i);
#pragma unroll
            for (int j = 0; j < VEC; j++) {
                A g = grad[j] * (1.0f + w[j]);
                sum += g;
                product += g * (value[j] - mean_here);
            }
        }
        sum = lanes_sum(sum, lanes), product = lanes_sum(product, lanes);
        if (active && lane == 0) {
            A rstd = (A)1 / sqrt((A)var[row * G + first_group + group] + (A)eps), k = seen + (A)(t + 1);
            A dm = -rstd * sum, dv = (A)-0.5 * rstd * rstd * rstd * product;
            int bg = b * G + first_group + group;
            if (t == steps - 1 && dmean_out) dm += (A)dmean_out[bg];
            if (t == steps - 1 && dvar_out) dv += (A)dvar_out[bg];
            step_sums[step][group] = Pair<A>{dm / k, dv / k};
        }
    }
    __syncthreads(); // every step's own share is there for the scans

    int step = (int)threadIdx.x % WARP_SIZE;
    for (int group = (int)threadIdx.x / WARP_SIZE; group < groups; group += TILE_THREADS / WARP_SIZE) {
        Suffix<A> s = {0, 0, 0};
        if (step < tile_steps) {
            s.p = step_sums[step][group].x, s.u = step_sums[step][group].y;
            s.mean = (A)mean[((int64_t)b * steps + first_step + step) * G + first_group + group];
        }
        s = warp_suffix_scan(s, step);
        if (step < tile_steps) step_sums[step][group] = Pair<A>{s.p, s.u};
        if (step == 0)
            tiles[((int64_t)b * G + first_group + group) * num_tiles + tile] = Pair<double>{s.p, s.u};
    }
    __syncthreads(); // the scans are done: write them out row by row
    for (int i = (int)threadIdx.x; i < tile_steps * groups; i += TILE_THREADS)
        local[((int64_t)b * steps + first_step + i / groups) * G + first_group + i % groups] =
            step_sums[i / groups][i % groups];
}

/* computes: tiles[b, g, i] becomes (P, U) of everything after tile i, seen from the first step of tile i + 1;
 *           dmean_in = n (P_0 - 2 U_0 (mean_0 - mean_in)),  dvar_in = n U_0,  n the steps before
 * launch:   grid B G, block 256: a thread owns a tile, 256 tiles at a time, the last ones first
 * traffic:  32 B G T/32 bytes
 * needs:    nothing; dmean_in NULL: not wanted
 * numerics: double, fixed order: deterministic */
__global__ static void timestepnorm_backward_scan_kernel(Pair<double> *tiles, double *dmean_in,
                                                         double *dvar_in, const float *mean,
                                                         const int64_t *count, const double *mean_in,
                                                         int num_tiles, int steps, int G) {
    __shared__ Suffix<double> warp_totals[TILE_SCAN_THREADS / WARP_SIZE];
    constexpr int warps = TILE_SCAN_THREADS / WARP_SIZE;
    int bg = (int)blockIdx.x, lane = (int)threadIdx.x % WARP_SIZE, warp = (int)threadIdx.x / WARP_SIZE;
    int b = bg / G, g = bg % G, rounds = (num_tiles + TILE_SCAN_THREADS - 1) / TILE_SCAN_THREADS;
    const float *means = mean + (int64_t)b * steps * G + g; // means[t G] is mean[b, t, g]
    double end_mean = (double)means[(int64_t)(steps - 1) * G];
    Suffix<double> after = {0, 0, end_mean};
    for (int round = rounds - 1; round >= 0; round--) {
        int tile = round * TILE_SCAN_THREADS + (int)threadIdx.x;
        Suffix<double> s = {0, 0, end_mean};
        if (tile < num_tiles) {
            Pair<double> total = tiles[(int64_t)bg * num_tiles + tile];
            s = Suffix<double>{total.x, total.y, (double)means[(int64_t)tile * TILE_STEPS * G]};
        }
        s = warp_suffix_scan(s, lane);
        if (lane == 0) warp_totals[warp] = s;
        Suffix<double> exclusive = {__shfl_down_sync(FULL_MASK, s.p, 1), __shfl_down_sync(FULL_MASK, s.u, 1),
                                    __shfl_down_sync(FULL_MASK, s.mean, 1)};
        __syncthreads(); // the warps' totals are there
        Suffix<double> rest = after;
        for (int i = warps - 1; i > warp; i--) rest = merge(warp_totals[i], rest);
        if (lane < WARP_SIZE - 1) rest = merge(exclusive, rest);
        /* rest.mean is the mean at the next tile's first step, the reference that the header promises. */
        if (tile < num_tiles) tiles[(int64_t)bg * num_tiles + tile] = Pair<double>{rest.p, rest.u};
        for (int i = warps - 1; i >= 0; i--) after = merge(warp_totals[i], after);
        __syncthreads(); // all have read the totals: the next round may write them
    }
    if (threadIdx.x == 0 && dmean_in) {
        double n = mean_in ? (double)count[b] : 0, before = mean_in ? mean_in[bg] : 0;
        dmean_in[bg] = n * (after.p - 2 * after.u * (after.mean - before));
        dvar_in[bg] = n * after.u;
    }
}

/* computes: dx = rstd g + (P + 2 (x - mean) U) / size (+ add1 + add2), partial sums of dw = dy xhat and db =
 * dy
 * launch:   grid (ceil(T / 32), B), block 256: threads own columns and walk down 32 rows (see Sweep)
 * traffic:  (3 + adds) B T D sizeof(T) bytes
 * needs:    VEC wants D/G and pointers in multiples of VEC elements; VEC 1 takes anything; dx may
 *           be dy, add1 or add2
 * numerics: float sums in a fixed order, suffixes merged in double: deterministic */
template <typename T, int VEC>
__global__ void __launch_bounds__(SWEEP_THREADS, sizeof(T) == 2 ? 4 : 2)
    timestepnorm_backward_apply_kernel(T *dx, float *partial_w, float *partial_b, const T *dy, const T *add1,
                                       const T *add2, const Pair<Accum<T>> *local, const Pair<double> *tiles,
                                       const float *mean, const float *var, const T *x, const T *weight,
                                       int steps, int D, int G, int num_tiles, float eps) {
    static_assert((int)SWEEP_ROWS == (int)TILE_STEPS, "a block walks down one tile");
    Sweep sweep(D, VEC);
    if (sweep.group >= sweep.groups) return;
    int tile = (int)blockIdx.x, b = (int)blockIdx.y, size = D / G, first = tile * TILE_STEPS;
    int last = min(first + (int)TILE_STEPS, steps);
    int64_t out = (((int64_t)b * gridDim.x + tile) * sweep.groups + sweep.group) * D;
    float inverse_size = 1.0f / (float)size;
    for (int c = sweep.lane * VEC; c < D; c += sweep.lanes * VEC) {
        int g = c / size;
        float dw[VEC] = {}, db[VEC] = {}, w[VEC], value[VEC], grad[VEC], add[VEC];
        load<VEC>(w, weight + c);
        Pair<double> after = tiles[((int64_t)b * G + g) * num_tiles + tile];
        float next_mean = last < steps ? mean[((int64_t)b * steps + last) * G + g] : 0.0f;
        for (int t = first + sweep.group; t < last; t += sweep.groups) {
            int64_t row = (int64_t)b * steps + t, at = row * D + c;
            float mean_here = mean[row * G + g], rstd = 1.0f / sqrtf(var[row * G + g] + eps);
            /* Nothing comes after the last tile: U is 0 there, and next_mean does not matter. */
            float p = (float)((double)local[row * G + g].x + after.x -
                              2 * after.y * ((double)next_mean - (double)mean_here)) *
                      inverse_size;
            float u = 2.0f * (float)((double)local[row * G + g].y + after.y) * inverse_size;
            load<VEC>(value, x + at);
            load<VEC>(grad, dy + at);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float centred = value[i] - mean_here;
                dw[i] += grad[i] * centred * rstd;
                db[i] += grad[i];
                grad[i] = grad[i] * (1.0f + w[i]) * rstd + p + centred * u;
            }
            if (add1) {
                load<VEC>(add, add1 + at);
#pragma unroll
                for (int i = 0; i < VEC; i++) grad[i] += add[i];
            }
            if (add2) {
                load<VEC>(add, add2 + at);
#pragma unroll
                for (int i = 0; i < VEC; i++) grad[i] += add[i];
            }
            store<VEC>(dx + at, grad);
        }
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            if (partial_w) partial_w[out + c + i] = dw[i];
            if (partial_b) partial_b[out + c + i] = db[i];
        }
    }
}

/* dx = gradient of x + add1 + add2 (B,T,D; NULL: nothing to add); dx may be dy, add1 or add2. dmean_in,
 * dvar_in (B,G) double, NULL: not wanted; dweight, dbias (D) added to, NULL: none; dmean_out, dvar_out NULL:
 * zero. */
template <typename T>
static void timestepnorm_backward(Context *context, T *dx, double *dmean_in, double *dvar_in, float *dweight,
                                  float *dbias, const T *dy, const double *dmean_out, const double *dvar_out,
                                  const T *add1, const T *add2, const float *mean, const float *var,
                                  const T *x, const int64_t *count, const double *mean_in, const T *weight,
                                  int64_t B, int64_t steps, int64_t D, int64_t G, float eps) {
    ScratchScope scope(context);
    int num_tiles = (int)ceil_div(steps, TILE_STEPS);
    int64_t partial_rows = B * num_tiles * sweep_groups(D, 8);
    Pair<Accum<T>> *local = take<Pair<Accum<T>>>(context, B * steps * G);
    Pair<double> *tiles = take<Pair<double>>(context, B * G * num_tiles);
    float *partial_w = dweight ? take<float>(context, partial_rows * D) : nullptr;
    float *partial_b = dbias ? take<float>(context, partial_rows * D) : nullptr;
    WITH_WIDTH(T, vector_width<T>(D / G, dx, dy, add1, add2, x, weight), {
        int64_t partials = B * num_tiles * sweep_groups(D, VEC);
        LAUNCH((timestepnorm_backward_tile_kernel<T, VEC>),
               dim3((unsigned)num_tiles, blocks_for(G, TILE_GROUPS), (unsigned)B), TILE_THREADS, context,
               local, tiles, dy, dmean_out, dvar_out, mean, var, x, count, mean_in != nullptr, weight,
               (int)steps, (int)D, (int)G, lanes_per_group<T>(D / G, VEC), eps);
        LAUNCH(timestepnorm_backward_scan_kernel, (unsigned)(B * G), TILE_SCAN_THREADS, context, tiles,
               dmean_in, dvar_in, mean, count, mean_in, num_tiles, (int)steps, (int)G);
        LAUNCH((timestepnorm_backward_apply_kernel<T, VEC>), dim3((unsigned)num_tiles, (unsigned)B),
               SWEEP_THREADS, context, dx, partial_w, partial_b, dy, add1, add2, local, tiles, mean, var, x,
               weight, (int)steps, (int)D, (int)G, num_tiles, eps);
        if (dweight) add_partials(context, dweight, partial_w, partials, D);
        if (dbias) add_partials(context, dbias, partial_b, partials, D);
    });
}

#endif
