/* ladder_timestepnorm.cu - the kernels of TimestepNorm, from one warp that walks through time to blocks that
 * tell each other their sums.
 *
 * The last version of each direction is the one that trains: timestepnorm_forward and timestepnorm_backward
 * of cuda/timestepnorm.cuh, called, not copied. The ones before it each have one idea. Truth is computed on
 * the CPU, in double, step by step: the backward there goes back through the update of mean and variance
 * itself and knows nothing of the sums P and U that the kernels use.
 */
#include "ladder.cuh"

#include "../cuda/timestepnorm.cuh"

#define OPTIONS(X)                                                                                          \
    X(INT, batch, "8", 1, 4096, "ROWS", "Size", "sequences")                                                \
    X(INT, seq_len, "4096", 1, 1048576, "STEPS", "Size", "steps of a sequence")                             \
    X(INT, model_dim, "1024", 1, 65536, "FEATURES", "Size", "features")                                     \
    X(INT, norm_num_groups, "32", 1, 65536, "GROUPS", "Size", "groups of features, of at most 256 each")
struct Values {
    OPTIONS(OPTION_MEMBER)
};
static const Option options[] = {OPTIONS(OPTION_ROW)};

enum { WARPS = 8, MOST_FEATURES = 256, HELD_FEATURES = MOST_FEATURES / WARP_SIZE };
constexpr float EPS = 1e-5f;
/* One rounding to bf16 is up to 2e-3 of a number, in the RMS 1.7e-3. */
constexpr double ROUNDED = 2.5e-3, SUMMED = 1e-4;

/* One set of arguments: x, dy (B,T,D) are read, the others written; mean, var (B,T,G). */
struct Arguments {
    bf16 *x, *dy, *y, *dx;
    float *mean, *var;
};
/* Common to all sets: weight, bias (D) and their gradients, which a version adds to. */
struct Parameters {
    bf16 *weight, *bias;
    float *dweight, *dbias;
};

__host__ __device__ static int64_t rows_of(const TimestepShape &s) { return (int64_t)s.B * s.steps; }

/* ----------------------------------------------------------------------------------------------------------
 * 1. A warp owns a group of a row and walks through time.
 */

/* computes: mean_t, var_t and y_t = (x_t - mean_t) / sqrt(var_t + eps) (1 + w) + b
 * launch:   grid B G, block 32: a lane has every 32nd feature of the group
 * traffic:  2 B T D sizeof(T) + 8 B T G bytes
 * needs:    D/G <= 256
 * numerics: the moments so far in double */
template <typename T>
__global__ void walk_forward_kernel(T *y, float *mean, float *var, const T *x, const T *weight,
                                    const T *bias, TimestepShape s) {
    int b = (int)blockIdx.x / s.G, g = (int)blockIdx.x % s.G, lane = (int)threadIdx.x;
    Moments<double> seen = {0, 0, 0};
    for (int t = 0; t < s.steps; t++) {
        int64_t row = (int64_t)b * s.steps + t, at = row * s.D + (int64_t)g * s.size; // x[b,t,g size ..]
        float value[HELD_FEATURES], sum = 0, squares = 0;
#pragma unroll
        for (int k = 0; k < HELD_FEATURES; k++) {
            int i = lane + k * WARP_SIZE;
            value[k] = i < s.size ? to_float(x[at + i]) : 0.0f;
            sum += value[k];
        }
        float own = warp_sum(sum) / (float)s.size;
#pragma unroll
        for (int k = 0; k < HELD_FEATURES; k++)
            if (lane + k * WARP_SIZE < s.size) squares += (value[k] - own) * (value[k] - own);
        seen = merge(seen, Moments<double>{1, own, warp_sum(squares) / (float)s.size});
        float center = (float)seen.mean, rstd = 1.0f / sqrtf((float)seen.var + s.eps);
        if (lane == 0) mean[row * s.G + g] = center, var[row * s.G + g] = (float)seen.var;
#pragma unroll
        for (int k = 0; k < HELD_FEATURES; k++) {
            int i = lane + k * WARP_SIZE, d = g * s.size + i;
            if (i >= s.size) continue;
            float w = 1.0f + to_float(weight[d]);
            y[at + i] = from_float<T>((value[k] - center) * rstd * w + to_float(bias[d]));
        }
    }
}

/* computes: dx_t = rstd g + (P_t + 2 (x_t - mean_t) U_t) / size, and dw, db of one row of the batch
 * launch:   grid B G, block 32: as the forward, from the last step to the first
 * traffic:  3 B T D sizeof(T) + 8 B T G bytes
 * needs:    D/G <= 256
 * numerics: P and U in double */
template <typename T>
__global__ void walk_backward_kernel(T *dx, float *partial_w, float *partial_b, const T *dy,
                                     const float *mean, const float *var, const T *x, const T *weight,
                                     TimestepShape s) {
    int b = (int)blockIdx.x / s.G, g = (int)blockIdx.x % s.G, lane = (int)threadIdx.x;
    double p = 0, u = 0, mean_after = 0;
    float dw[HELD_FEATURES] = {}, db[HELD_FEATURES] = {};
    for (int t = s.steps - 1; t >= 0; t--) {
        int64_t row = (int64_t)b * s.steps + t, at = row * s.D + (int64_t)g * s.size;
        float center = mean[row * s.G + g], rstd = 1.0f / sqrtf(var[row * s.G + g] + s.eps);
        float gain[HELD_FEATURES], centred[HELD_FEATURES], sum = 0, product = 0;
#pragma unroll
        for (int k = 0; k < HELD_FEATURES; k++) {
            int i = lane + k * WARP_SIZE, d = g * s.size + i;
            bool here = i < s.size;
            float grad = here ? to_float(dy[at + i]) : 0.0f;
            gain[k] = here ? grad * (1.0f + to_float(weight[d])) : 0.0f;
            centred[k] = here ? to_float(x[at + i]) - center : 0.0f;
            sum += gain[k], product += gain[k] * centred[k];
            dw[k] += grad * centred[k] * rstd, db[k] += grad;
        }
        p -= 2 * u * (mean_after - center); // seen from this step's mean now
        p -= rstd * warp_sum(sum) / (t + 1.0);
        u -= 0.5 * rstd * rstd * rstd * warp_sum(product) / (t + 1.0);
        mean_after = center;
#pragma unroll
        for (int k = 0; k < HELD_FEATURES; k++)
            if (lane + k * WARP_SIZE < s.size)
                dx[at + lane + k * WARP_SIZE] =
                    from_float<T>(rstd * gain[k] + ((float)p + 2 * centred[k] * (float)u) / (float)s.size);
    }
#pragma unroll
    for (int k = 0; k < HELD_FEATURES; k++) {
        int i = lane + k * WARP_SIZE, d = g * s.size + i;
        if (i < s.size) partial_w[(int64_t)b * s.D + d] = dw[k], partial_b[(int64_t)b * s.D + d] = db[k];
    }
}

/* ----------------------------------------------------------------------------------------------------------
 * 2. Every step is reduced to two numbers a group, which a second kernel scans over time and a third applies.
 */

/* computes: own[b,t,g] = mean and population variance of one group of one step
 * launch:   grid ceil(B T G / 8), block 256: a warp owns a group of a step
 * traffic:  B T D sizeof(T) + 8 B T G bytes
 * needs:    nothing
 * numerics: float, two passes */
template <typename T>
__global__ void step_moments_kernel(Pair<float> *own, const T *x, int64_t units, int size) {
    int64_t unit = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP_SIZE;
    if (unit >= units) return; // a whole warp leaves
    int lane = (int)threadIdx.x % WARP_SIZE;
    float sum = 0, squares = 0;
    for (int i = lane; i < size; i += WARP_SIZE) sum += to_float(x[unit * size + i]);
    float mean = warp_sum(sum) / (float)size;
    for (int i = lane; i < size; i += WARP_SIZE) {
        float difference = to_float(x[unit * size + i]) - mean;
        squares += difference * difference;
    }
    float var = warp_sum(squares) / (float)size;
    if (lane == 0) own[unit] = Pair<float>{mean, var};
}

/* computes: mean_t and var_t from the moments of the steps alone
 * launch:   grid B G, block 32: a warp scans 32 steps at a time
 * traffic:  16 B T G bytes
 * needs:    nothing
 * numerics: double between the stretches of 32 steps */
__global__ static void scan_moments_kernel(float *mean, float *var, const Pair<float> *own,
                                           TimestepShape s) {
    int b = (int)blockIdx.x / s.G, g = (int)blockIdx.x % s.G, lane = (int)threadIdx.x;
    Moments<double> before = {0, 0, 0};
    for (int first = 0; first < s.steps; first += WARP_SIZE) {
        int t = first + lane, last = min((int)WARP_SIZE, s.steps - first) - 1;
        int64_t at = ((int64_t)b * s.steps + min(t, s.steps - 1)) * s.G + g;
        Pair<float> part = scan_steps(own[at], lane, 1.0f / (float)(lane + 1));
        Moments<double> here = merge(before, Moments<double>{lane + 1.0, part.x, part.y});
        if (t < s.steps) mean[at] = (float)here.mean, var[at] = (float)here.var;
        before.count = __shfl_sync(FULL_MASK, here.count, last);
        before.mean = __shfl_sync(FULL_MASK, here.mean, last);
        before.var = __shfl_sync(FULL_MASK, here.var, last);
    }
}

/* computes: own[b,t,g] = dm_t / k_t and dv_t / k_t of one group of one step
 * launch:   grid ceil(B T G / 8), block 256: a warp owns a group of a step
 * traffic:  2 B T D sizeof(T) + 16 B T G bytes
 * needs:    nothing
 * numerics: float */
template <typename T>
__global__ void step_shares_kernel(Pair<float> *own, const T *dy, const float *mean, const float *var,
                                   const T *x, const T *weight, TimestepShape s) {
    int64_t unit = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP_SIZE;
    if (unit >= rows_of(s) * s.G) return; // a whole warp leaves
    int lane = (int)threadIdx.x % WARP_SIZE, t = (int)(unit / s.G % s.steps), g = (int)(unit % s.G);
    float center = mean[unit], rstd = 1.0f / sqrtf(var[unit] + s.eps), sum = 0, product = 0;
    for (int i = lane; i < s.size; i += WARP_SIZE) {
        float gain = to_float(dy[unit * s.size + i]) * (1.0f + to_float(weight[g * s.size + i]));
        sum += gain, product += gain * (to_float(x[unit * s.size + i]) - center);
    }
    sum = warp_sum(sum), product = warp_sum(product);
    if (lane == 0)
        own[unit] =
            Pair<float>{-rstd * sum / (float)(t + 1), -0.5f * rstd * rstd * rstd * product / (float)(t + 1)};
}

/* computes: own[b,t,g] becomes P_t / size and 2 U_t / size
 * launch:   grid B G, block 32: a warp scans 32 steps at a time, the last ones first
 * traffic:  20 B T G bytes
 * needs:    nothing
 * numerics: double */
__global__ static void scan_shares_kernel(Pair<float> *own, const float *mean, TimestepShape s) {
    int b = (int)blockIdx.x / s.G, g = (int)blockIdx.x % s.G, lane = (int)threadIdx.x;
    double reference = mean[((int64_t)b * s.steps + s.steps - 1) * s.G + g], p_after = 0, u_after = 0;
    for (int first = (s.steps - 1) / WARP_SIZE * WARP_SIZE; first >= 0; first -= WARP_SIZE) {
        int t = first + lane;
        int64_t at = ((int64_t)b * s.steps + min(t, s.steps - 1)) * s.G + g;
        double shift = mean[at] - reference, u = t < s.steps ? own[at].y : 0,
               p = t < s.steps ? own[at].x - 2 * u * shift : 0; // seen from the last step's mean
        for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
            double later_p = __shfl_down_sync(FULL_MASK, p, distance),
                   later_u = __shfl_down_sync(FULL_MASK, u, distance);
            if (lane + distance < WARP_SIZE) p += later_p, u += later_u;
        }
        p += p_after, u += u_after;
        p_after = __shfl_sync(FULL_MASK, p, 0), u_after = __shfl_sync(FULL_MASK, u, 0);
        if (t < s.steps)
            own[at] = Pair<float>{(float)((p + 2 * u * shift) / s.size), (float)(2 * u / s.size)};
    }
}

/* computes: dx = rstd g + P / size + (x - mean) 2 U / size, and partial sums of dw and db
 * launch:   grid ceil(B T / 64), block 256: a thread owns columns and walks down the rows (see Sweep)
 * traffic:  3 B T D sizeof(T) + 16 B T G bytes
 * needs:    nothing
 * numerics: float */
template <typename T>
__global__ void apply_backward_kernel(T *dx, float *partial_w, float *partial_b, const Pair<float> *sums,
                                      const T *dy, const float *mean, const float *var, const T *x,
                                      const T *weight, TimestepShape s) {
    int64_t rows = rows_of(s);
    for (int d = (int)threadIdx.x; d < s.D; d += (int)blockDim.x) {
        float dw = 0, db = 0, gain = 1.0f + to_float(weight[d]);
        for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
            int64_t at = row * s.D + d, group = row * s.G + d / s.size;
            float rstd = 1.0f / sqrtf(var[group] + s.eps), centred = to_float(x[at]) - mean[group],
                  grad = to_float(dy[at]);
            dw += grad * centred * rstd, db += grad;
            dx[at] = from_float<T>(rstd * grad * gain + sums[group].x + centred * sums[group].y);
        }
        partial_w[(int64_t)blockIdx.x * s.D + d] = dw, partial_b[(int64_t)blockIdx.x * s.D + d] = db;
    }
}

/* ----------------------------------------------------------------------------------------------------------
 * 3. Tiles of 32 steps: a first kernel makes one sum a tile, a second one adds those up, and the kernel of
 * the
 *    last version, which finds all that it would wait for already told, makes the sums within a tile again.
 */

/* computes: slots.tiles: the moments of each tile
 * launch:   grid ceil(B tiles G / 8), block 256: a warp owns a group of a tile, a lane a step
 * traffic:  B T D sizeof(T) + B T G / 2 bytes
 * needs:    nothing
 * numerics: float, from differences to the first value */
template <typename T> __global__ void tile_moments_kernel(Slots slots, const T *x, TimestepShape s) {
    int64_t unit = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP_SIZE;
    if (unit >= (int64_t)s.B * s.num_tiles * s.G) return; // a whole warp leaves
    int lane = (int)threadIdx.x % WARP_SIZE, g = (int)(unit % s.G);
    int tile = (int)(unit / s.G % s.num_tiles), t = tile * TILE_STEPS + lane;
    int64_t row = unit / s.G / s.num_tiles * s.steps + min(t, s.steps - 1);
    const T *group = x + row * s.D + (int64_t)g * s.size;
    float first = to_float(group[0]), sum = 0, squares = 0;
    for (int i = 0; i < s.size; i++) {
        float difference = to_float(group[i]) - first;
        sum += difference, squares += difference * difference;
    }
    Pair<float> own = moments_of(first, sum, squares, 1.0f / (float)s.size);
    Pair<float> total = scan_steps(own, lane, 1.0f / (float)(lane + 1));
    if (t == min((tile + 1) * (int)TILE_STEPS, s.steps) - 1) tell(slots.tiles + unit, total.x, total.y);
}

/* computes: slots.spans[b,i,g]: the moments of all tiles before span i
 * launch:   grid ceil(B spans G / 256), block 256: a thread owns a span of a group
 * traffic:  about 8 B T G / 32 bytes times the number of spans, from the cache
 * needs:    nothing
 * numerics: double, from differences to the first tile's mean */
__global__ static void span_moments_kernel(Slots slots, TimestepShape s) {
    int64_t unit = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (unit >= (int64_t)s.B * s.num_spans * s.G) return;
    int g = (int)(unit % s.G), span = (int)(unit / s.G % s.num_spans), tiles = span * SPAN_TILES;
    const Slot *first = slots.tiles + unit / s.G / s.num_spans * s.num_tiles * s.G + g;
    double sum = 0, squares = 0;
    for (int i = 0; i < tiles; i++) {
        double difference = first[(int64_t)i * s.G].x - first->x;
        sum += difference, squares += first[(int64_t)i * s.G].y + difference * difference;
    }
    if (tiles == 0) return;
    Slot total = moments_of(first->x, sum, squares, 1.0 / tiles);
    tell(slots.spans + unit, total.x, total.y);
}

/* computes: slots.tiles: P, seen from the tile's first mean, and U of each tile
 * launch:   grid ceil(B tiles G / 8), block 256: a warp owns a group of a tile, a lane a step
 * traffic:  2 B T D sizeof(T) + 8 B T G bytes
 * needs:    nothing
 * numerics: float */
template <typename T>
__global__ void tile_shares_kernel(Slots slots, const T *dy, const float *mean, const float *var, const T *x,
                                   const T *weight, TimestepShape s) {
    int64_t unit = (int64_t)blockIdx.x * WARPS + threadIdx.x / WARP_SIZE;
    if (unit >= (int64_t)s.B * s.num_tiles * s.G) return; // a whole warp leaves
    int lane = (int)threadIdx.x % WARP_SIZE, g = (int)(unit % s.G);
    int t = (int)(unit / s.G % s.num_tiles) * TILE_STEPS + lane;
    int64_t row = unit / s.G / s.num_tiles * s.steps + min(t, s.steps - 1),
            at = row * s.D + (int64_t)g * s.size;
    float center = mean[row * s.G + g], rstd = 1.0f / sqrtf(var[row * s.G + g] + s.eps), sum = 0,
          product = 0;
    for (int i = 0; i < s.size; i++) {
        float gain = to_float(dy[at + i]) * (1.0f + to_float(weight[g * s.size + i]));
        sum += gain, product += gain * (to_float(x[at + i]) - center);
    }
    float share = t < s.steps ? 1.0f / (float)(t + 1) : 0.0f,
          u = -0.5f * rstd * rstd * rstd * product * share;
    float p = -rstd * sum * share - 2 * u * (center - __shfl_sync(FULL_MASK, center, 0));
    p = warp_sum(p), u = warp_sum(u);
    if (lane == 0) tell(slots.tiles + unit, p, u);
}

/* computes: slots.spans[b,i,g]: P and U of all tiles after span i, where spans are counted from the end, P
 * seen
 *           from the first mean after it
 * launch:   grid ceil(B spans G / 256), block 256: a thread owns a span of a group
 * traffic:  about 8 B T G / 32 bytes times the number of spans, from the cache
 * needs:    nothing
 * numerics: double */
__global__ static void span_shares_kernel(Slots slots, const float *mean, TimestepShape s) {
    int64_t unit = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (unit >= (int64_t)s.B * s.num_spans * s.G) return;
    int g = (int)(unit % s.G), span = (int)(unit / s.G % s.num_spans),
        first = s.num_tiles - span * SPAN_TILES;
    int64_t b = unit / s.G / s.num_spans;
    double p = 0, u = 0;
    for (int tile = first; tile < s.num_tiles; tile++) {
        const Slot *slot = slots.tiles + (b * s.num_tiles + tile) * s.G + g;
        double seen_from = mean[(b * s.steps + (int64_t)tile * TILE_STEPS) * s.G + g] -
                           mean[(b * s.steps + (int64_t)first * TILE_STEPS) * s.G + g];
        p += slot->x - 2 * slot->y * seen_from, u += slot->y;
    }
    if (span > 0) tell(slots.spans + unit, p, u);
}

/* ----------------------------------------------------------------------------------------------------------
 * Truth: on the CPU, in double, a step after the other.
 */

struct Truth {
    std::vector<double> y, mean, var, dx, dw, db;
};

/* One group of a row, forward and back. d: its first feature. */
static void true_group(Truth *truth, const std::vector<double> &x, const std::vector<double> &dy,
                       const std::vector<double> &w, const std::vector<double> &b, const TimestepShape &s,
                       int64_t row, int g) {
    size_t steps = (size_t)s.steps;
    std::vector<double> own_mean(steps), own_var(steps), mean(steps), var(steps);
    double dmean = 0, dvar = 0; // of the moments after step t, from all later steps
    for (size_t t = 0; t < steps; t++) {
        size_t at = ((size_t)row * steps + t) * (size_t)s.D + (size_t)(g * s.size);
        double n = (double)t, c1 = n / (n + 1), c2 = 1 / (n + 1);
        for (int i = 0; i < s.size; i++) own_mean[t] += x[at + (size_t)i] / s.size;
        for (int i = 0; i < s.size; i++) own_var[t] += pow(x[at + (size_t)i] - own_mean[t], 2) / s.size;
        double last_mean = t ? mean[t - 1] : 0, last_var = t ? var[t - 1] : 0, d = own_mean[t] - last_mean;
        mean[t] = c1 * last_mean + c2 * own_mean[t];
        var[t] = c1 * last_var + c2 * own_var[t] + c1 * c2 * d * d;
        for (int i = 0; i < s.size; i++) {
            size_t j = (size_t)(g * s.size + i);
            truth->y[at + (size_t)i] =
                (x[at + (size_t)i] - mean[t]) / sqrt(var[t] + EPS) * (1 + w[j]) + b[j];
        }
        truth->mean[((size_t)row * steps + t) * (size_t)s.G + (size_t)g] = mean[t];
        truth->var[((size_t)row * steps + t) * (size_t)s.G + (size_t)g] = var[t];
    }
    for (size_t t = steps; t-- > 0;) {
        size_t at = ((size_t)row * steps + t) * (size_t)s.D + (size_t)(g * s.size);
        double rstd = 1 / sqrt(var[t] + EPS), n = (double)t, c1 = n / (n + 1), c2 = 1 / (n + 1);
        for (int i = 0; i < s.size; i++) {
            size_t j = (size_t)(g * s.size + i);
            double grad = dy[at + (size_t)i], gain = grad * (1 + w[j]),
                   centred = x[at + (size_t)i] - mean[t];
            dmean -= rstd * gain, dvar -= 0.5 * rstd * rstd * rstd * gain * centred;
            truth->dw[j] += grad * centred * rstd, truth->db[j] += grad;
        }
        /* mean = c1 last_mean + c2 own_mean;  var = c1 last_var + c2 own_var + c1 c2 d^2, d = own - last
         * mean */
        double d = own_mean[t] - (t ? mean[t - 1] : 0), dd = 2 * c1 * c2 * d * dvar;
        double down_mean = c2 * dmean + dd, down_var = c2 * dvar;
        for (int i = 0; i < s.size; i++)
            truth->dx[at + (size_t)i] = dy[at + (size_t)i] * (1 + w[(size_t)(g * s.size + i)]) * rstd +
                                        down_mean / s.size +
                                        2 * down_var * (x[at + (size_t)i] - own_mean[t]) / s.size;
        dmean = c1 * dmean - dd, dvar = c1 * dvar;
    }
}

static void compute_truth(Ladder *ladder, Truth *truth, const Arguments &set, const Parameters &p,
                          const TimestepShape &s) {
    int64_t rows = rows_of(s);
    std::vector<double> x = ladder_fetch(ladder, set.x, rows * s.D),
                        dy = ladder_fetch(ladder, set.dy, rows * s.D),
                        w = ladder_fetch(ladder, p.weight, s.D), b = ladder_fetch(ladder, p.bias, s.D);
    for (std::vector<double> *activation : {&truth->y, &truth->dx}) activation->resize(x.size());
    for (std::vector<double> *statistic : {&truth->mean, &truth->var})
        statistic->resize((size_t)(rows * s.G));
    for (std::vector<double> *parameter : {&truth->dw, &truth->db}) parameter->resize((size_t)s.D);
    for (int64_t row = 0; row < s.B; row++)
        for (int g = 0; g < s.G; g++) true_group(truth, x, dy, w, b, s, row, g);
}

/* ----------------------------------------------------------------------------------------------------------
 * The versions in turn
 */

static void climb_forward(Ladder *ladder, const std::vector<Arguments> &sets, const Parameters &p,
                          const Truth &truth, const TimestepShape &s) {
    Context *context = &ladder->context;
    int64_t rows = rows_of(s), units = rows * s.G;
    int count = (int)sets.size();
    double bytes = 2.0 * (double)(rows * s.D) * sizeof(bf16) + 2.0 * (double)units * sizeof(float);
    LadderOutput<bf16> y = {"y", sets[0].y, rows * s.D, &truth.y, ROUNDED};
    LadderOutput<float> mean = {"mean", sets[0].mean, units, &truth.mean, SUMMED},
                        var = {"var", sets[0].var, units, &truth.var, SUMMED};
    printf("forward\n");
    ladder_step(
        ladder, "walk", "a warp owns a group of a row and walks through time", bytes, count,
        [&](int i) {
            const Arguments &set = sets[(size_t)i];
            LAUNCH(walk_forward_kernel<bf16>, (unsigned)(s.B * s.G), WARP_SIZE, context, set.y, set.mean,
                   set.var, set.x, p.weight, p.bias, s);
        },
        y, mean, var);
    ladder_step(
        ladder, "scan", "steps are reduced in parallel, their moments scanned, then applied", bytes, count,
        [&](int i) {
            ScratchScope scope(context);
            const Arguments &set = sets[(size_t)i];
            Pair<float> *own = take<Pair<float>>(context, units);
            LAUNCH(step_moments_kernel<bf16>, blocks_for(units, WARPS), WARPS * WARP_SIZE, context, own,
                   set.x, units, s.size);
            LAUNCH(scan_moments_kernel, (unsigned)(s.B * s.G), WARP_SIZE, context, set.mean, set.var, own,
                   s);
            timestepnorm_again<bf16>(context, set.y, set.mean, set.var, set.x, p.weight, p.bias, rows, s.D,
                                     s.G, s.eps);
        },
        y, mean, var);
    ladder_step(
        ladder, "tiles", "only one sum a tile of 32 steps goes through memory; x is read twice", bytes,
        count,
        [&](int i) {
            ScratchScope scope(context);
            const Arguments &set = sets[(size_t)i];
            int groups = forward_groups(s.size);
            TimestepShape tiled = timestep_shape(s.B, s.steps, s.D, s.G, s.eps, groups);
            Slots slots = take_slots(context, s);
            LAUNCH(tile_moments_kernel<bf16>, blocks_for((int64_t)s.B * s.num_tiles * s.G, WARPS),
                   WARPS * WARP_SIZE, context, slots, set.x, s);
            LAUNCH(span_moments_kernel, blocks_for((int64_t)s.B * s.num_spans * s.G, 256), 256, context,
                   slots, s);
            WITH_WIDTH(
                bf16, vector_width<bf16>(s.size),
                WITH_GROUPS(32, groups,
                            LAUNCH((timestepnorm_forward_kernel<bf16, VEC, GROUPS>), tile_blocks(tiled),
                                   TILE_THREADS, context, set.y, set.mean, set.var, nullptr, nullptr, slots,
                                   set.x, nullptr, nullptr, nullptr, p.weight, p.bias, tiled)));
        },
        y, mean, var);
    ladder_step(
        ladder, "timestepnorm_forward", "blocks tell each other their sums: x is read once", bytes, count,
        [&](int i) {
            const Arguments &set = sets[(size_t)i];
            timestepnorm_forward<bf16>(context, set.y, set.mean, set.var, nullptr, nullptr, set.x, nullptr,
                                       nullptr, nullptr, p.weight, p.bias, s.B, s.steps, s.D, s.G, s.eps);
        },
        y, mean, var);
}

static void clear_gradients(Context *context, const Parameters &p, const TimestepShape &s) {
    clear(context, p.dweight, (size_t)s.D * sizeof(float));
    clear(context, p.dbias, (size_t)s.D * sizeof(float));
}

static void climb_backward(Ladder *ladder, const std::vector<Arguments> &sets, const Parameters &p,
                           const Truth &truth, const TimestepShape &s) {
    Context *context = &ladder->context;
    int64_t rows = rows_of(s), units = rows * s.G;
    int count = (int)sets.size();
    double bytes = 3.0 * (double)(rows * s.D) * sizeof(bf16) + 2.0 * (double)units * sizeof(float);
    LadderOutput<bf16> dx = {"dx", sets[0].dx, rows * s.D, &truth.dx, ROUNDED};
    LadderOutput<float> dw = {"dweight", p.dweight, s.D, &truth.dw, SUMMED},
                        db = {"dbias", p.dbias, s.D, &truth.db, SUMMED};
    printf("backward\n");
    ladder->first_ms = 0;
    ladder_step(
        ladder, "walk", "a warp owns a group of a row and walks back through time", bytes, count,
        [&](int i) {
            const Arguments &set = sets[(size_t)i];
            clear_gradients(context, p, s);
            float *partial_w = take_sum(context, p.dweight, s.B, s.D),
                  *partial_b = take_sum(context, p.dbias, s.B, s.D);
            LAUNCH(walk_backward_kernel<bf16>, (unsigned)(s.B * s.G), WARP_SIZE, context, set.dx, partial_w,
                   partial_b, set.dy, set.mean, set.var, set.x, p.weight, s);
            add_sums(context);
        },
        dx, dw, db);
    ladder_step(
        ladder, "scan", "steps are reduced in parallel, their sums scanned, then applied", bytes, count,
        [&](int i) {
            ScratchScope scope(context);
            const Arguments &set = sets[(size_t)i];
            clear_gradients(context, p, s);
            Pair<float> *own = take<Pair<float>>(context, units);
            float *partial_w = take_sum(context, p.dweight, sweep_blocks(rows), s.D),
                  *partial_b = take_sum(context, p.dbias, sweep_blocks(rows), s.D);
            LAUNCH(step_shares_kernel<bf16>, blocks_for(units, WARPS), WARPS * WARP_SIZE, context, own,
                   set.dy, set.mean, set.var, set.x, p.weight, s);
            LAUNCH(scan_shares_kernel, (unsigned)(s.B * s.G), WARP_SIZE, context, own, set.mean, s);
            LAUNCH(apply_backward_kernel<bf16>, sweep_blocks(rows), SWEEP_THREADS, context, set.dx,
                   partial_w, partial_b, own, set.dy, set.mean, set.var, set.x, p.weight, s);
            add_sums(context);
        },
        dx, dw, db);
    ladder_step(
        ladder, "tiles", "only one sum a tile of 32 steps goes through memory; x and dy are read twice",
        bytes, count,
        [&](int i) {
            ScratchScope scope(context);
            const Arguments &set = sets[(size_t)i];
            clear_gradients(context, p, s);
            int groups = backward_groups(s.size);
            TimestepShape tiled = timestep_shape(s.B, s.steps, s.D, s.G, s.eps, groups);
            Slots slots = take_slots(context, s);
            int64_t partials = (int64_t)s.B * s.num_tiles;
            float *partial_w = take_sum(context, p.dweight, partials, s.D),
                  *partial_b = take_sum(context, p.dbias, partials, s.D);
            LAUNCH(tile_shares_kernel<bf16>, blocks_for((int64_t)s.B * s.num_tiles * s.G, WARPS),
                   WARPS * WARP_SIZE, context, slots, set.dy, set.mean, set.var, set.x, p.weight, s);
            LAUNCH(span_shares_kernel, blocks_for((int64_t)s.B * s.num_spans * s.G, 256), 256, context,
                   slots, set.mean, s);
            TimestepBackward<bf16> last = {};
            last.dx = set.dx, last.partial_w = partial_w, last.partial_b = partial_b, last.slots = slots;
            last.dy = set.dy, last.mean = set.mean, last.var = set.var, last.weight = p.weight;
            WITH_WIDTH(bf16, vector_width<bf16>(s.size),
                       WITH_GROUPS(16, groups,
                                   LAUNCH((timestepnorm_backward_kernel<bf16, VEC, GROUPS>),
                                          tile_blocks(tiled), TILE_THREADS, context, last, set.x, tiled)));
            add_sums(context);
        },
        dx, dw, db);
    ladder_step(
        ladder, "timestepnorm_backward", "blocks tell each other their sums: x and dy are read once", bytes,
        count,
        [&](int i) {
            const Arguments &set = sets[(size_t)i];
            clear_gradients(context, p, s);
            timestepnorm_backward<bf16>(context, set.dx, nullptr, nullptr, p.dweight, p.dbias, set.dy,
                                        nullptr, nullptr, nullptr, nullptr, set.mean, set.var, set.x,
                                        nullptr, nullptr, p.weight, s.B, s.steps, s.D, s.G, s.eps);
            add_sums(context);
        },
        dx, dw, db);
}

int main(int argc, char **argv) {
    Ladder ladder;
    Values values;
    ladder_options(&ladder, argc, argv, "ladder_timestepnorm",
                   "Times versions of TimestepNorm's kernels, bf16, and checks each against double.",
                   options, OPTION_COUNT(options), &values);
    int B = values.batch, steps = values.seq_len, D = values.model_dim, G = values.norm_num_groups;
    if (D % G != 0) die_if(errorf("--model-dim %d is not a multiple of --norm-num-groups %d", D, G));
    if (D / G > MOST_FEATURES)
        die_if(errorf(
            "--model-dim %d / --norm-num-groups %d is groups of %d features: this ladder takes at most "
            "%d",
            D, G, D / G, (int)MOST_FEATURES));
    int64_t rows = (int64_t)B * steps, size = rows * D;
    /* The largest need: the sums of a version and its partial sums, a row of them for 32 rows of x. */
    ladder_open(&ladder, (size_t)(rows * G * 16 + (rows + 32 * B) * D / 2) + ((size_t)64 << 20));
    TimestepShape s =
        timestep_shape(B, steps, D, G, EPS, 1); // a model's has more groups to a block
    Parameters p = {ladder_allocate<bf16>(D), ladder_allocate<bf16>(D), ladder_allocate<float>(D),
                    ladder_allocate<float>(D)};
    ladder_fill(&ladder, p.weight, D, 1, 0.0f, 0.2f);
    ladder_fill(&ladder, p.bias, D, 2, 0.0f, 0.2f);
    std::vector<Arguments> sets((size_t)ladder_sets(&ladder, 4.0 * (double)size * sizeof(bf16)));
    for (size_t i = 0; i < sets.size(); i++) {
        sets[i] = Arguments{ladder_allocate<bf16>(size),      ladder_allocate<bf16>(size),
                            ladder_allocate<bf16>(size),      ladder_allocate<bf16>(size),
                            ladder_allocate<float>(rows * G), ladder_allocate<float>(rows * G)};
        ladder_fill(&ladder, sets[i].x, size, 10 + 2 * i, 0.5f, 1.0f);
        ladder_fill(&ladder, sets[i].dy, size, 11 + 2 * i, 0.0f, 1.0f);
        /* The backward of every set wants the moments of its forward, whichever versions are chosen. */
        timestepnorm_forward<bf16>(&ladder.context, sets[i].y, sets[i].mean, sets[i].var, nullptr, nullptr,
                                   sets[i].x, nullptr, nullptr, nullptr, p.weight, p.bias, B, steps, D, G,
                                   EPS);
    }
    Truth truth;
    compute_truth(&ladder, &truth, sets[0], p, s);
    climb_forward(&ladder, sets, p, truth, s);
    climb_backward(&ladder, sets, p, truth, s);
    return ladder_close(&ladder);
}
