/* timestepnorm.cuh - TimestepNorm: each group of features is normalised by the mean and variance of
 * everything that its row of the batch has seen up to and including this step. Both directions are scans
 * over time, and each is one kernel that reads its inputs once from memory.
 *
 * A block owns a tile: 32 steps of some groups. It reduces the tile to sums, tells them to the blocks that
 * need them, learns from others what came before, and goes over the tile a second time, which is in the
 * caches by then. A warp owns a group: its lanes are the steps of the tile while the tile is scanned, and
 * other tiles while it looks back. 32 tiles make a span; whoever has the last tile of a span tells the sums
 * of everything up to its end. So a tile reads at most 31 tiles and one span, in an order that never changes.
 *
 * Forward. (count, mean, variance) of two stretches of time merge by Chan's formula. Moments of 32 equal parts
 * come from the sums of differences to the first part: the first one lies within a few standard deviations of
 * the rest (5.6 at most), so that nothing cancels and a large mean or a million steps do no harm.
 *
 * Backward. With k_t the steps seen at t, and dm_t, dv_t the gradients of mean_t and var_t from y_t alone,
 * let
 *     U_t = sum over s >= t of dv_s / k_s
 *     P_t = sum over s >= t of (dm_s - 2 dv_s (mean_s - mean_t)) / k_s
 * then dx_t = rstd_t g_t + (P_t + 2 (x_t - mean_t) U_t) / size, g = dy (1 + w), size = D/G, because mean_s
 * and var_s weigh every element seen by 1 / (k_s size). What P counts from can be changed afterwards: seen
 * from a mean m instead of mean_t it is P_t - 2 U_t (mean_t - m), so that again only differences of
 * neighbouring means appear. A tile's P is seen from the mean at the tile's first step.
 */
#ifndef CUDA_TIMESTEPNORM_CUH
#define CUDA_TIMESTEPNORM_CUH

#include "common.cuh"

enum {
    TILE_STEPS = WARP_SIZE,
    SPAN_TILES = WARP_SIZE,
    TILE_GROUPS = 16,
    TILE_THREADS = 256,
    TILE_WARPS = TILE_THREADS / WARP_SIZE,
    GROUPS_PER_WARP = TILE_GROUPS / TILE_WARPS,
    TILE_BATCH = 4,   /* loads that a thread has under way while it makes sums */
    SHORT_GROUP = 16, /* a group of so few features is one thread's */
};

/* Sizes of a call, and how its tiles are laid out: `parts` blocks share the groups of a tile, `lanes` threads
 * (a power of two) a group of one step. */
struct TimestepShape {
    int B, steps, D, G, size, num_tiles, num_spans, parts, lanes;
    float eps;
};

template <typename T>
static TimestepShape timestep_shape(int64_t B, int64_t steps, int64_t D, int64_t G, float eps, int vec) {
    int64_t size = D / G, tiles = ceil_div(steps, TILE_STEPS), lanes = 1;
    while (size > SHORT_GROUP && lanes * 2 <= WARP_SIZE && lanes * 2 * vec <= size) lanes *= 2;
    return TimestepShape{(int)B,    (int)steps, (int)D,
                         (int)G,    (int)size,  (int)tiles,
                         (int)ceil_div(tiles, SPAN_TILES), (int)ceil_div(G, TILE_GROUPS), (int)lanes,
                         eps};
}

/* The tile of this block. Blocks start in the order of their index, so that whatever a block waits for is
 * under way or done: `order` counts tiles from where the scan begins. */
struct Tile {
    int b, order, index, first_group, groups, first_step, steps;
    __device__ Tile(const TimestepShape &shape, bool backwards) {
        int rest = (int)(blockIdx.x / (unsigned)shape.B), part = rest % shape.parts;
        b = (int)(blockIdx.x % (unsigned)shape.B), order = rest / shape.parts;
        index = backwards ? shape.num_tiles - 1 - order : order;
        first_group = part * TILE_GROUPS, groups = min((int)TILE_GROUPS, shape.G - first_group);
        first_step = index * TILE_STEPS, steps = min((int)TILE_STEPS, shape.steps - first_step);
    }
};

/* Unit by unit (a group of a step) through a tile, `units` at a time, without a division each time. */
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

/* ----------------------------------------------------------------------------------------------------------
 * What blocks tell each other. A slot is two doubles whose bits are all set until they are written; each of
 * the two words carries its own news, so that no order between them matters.
 */

using Slot = Pair<double>;
constexpr unsigned long long SLOT_EMPTY = ~0ull, SLOT_NAN = 0x7ff8000000000000ull;

__device__ inline void tell_word(double *word, double value) {
    unsigned long long bits = (unsigned long long)__double_as_longlong(value);
    /* A NaN may have any bits; this one would be waited for. */
    *(volatile unsigned long long *)word = bits == SLOT_EMPTY ? SLOT_NAN : bits;
}
__device__ inline double await_word(const double *word) {
    unsigned long long bits;
    do bits = *(const volatile unsigned long long *)word;
    while (bits == SLOT_EMPTY);
    return __longlong_as_double((long long)bits);
}
__device__ inline void tell(Slot *slot, double x, double y) {
    tell_word(&slot->x, x);
    tell_word(&slot->y, y);
}
__device__ inline Slot await(const Slot *slot) { return Slot{await_word(&slot->x), await_word(&slot->y)}; }

static unsigned tile_blocks(const TimestepShape &shape) {
    return (unsigned)((int64_t)shape.num_tiles * shape.parts * shape.B);
}

/* tiles (B,num_tiles,G), then spans (B,num_spans,G): spans[b, i] is what came before span i */
struct Slots {
    Slot *tiles, *spans;
};
static Slots take_slots(Context *context, const TimestepShape &shape) {
    int64_t tiles = (int64_t)shape.B * shape.num_tiles * shape.G,
            spans = (int64_t)shape.B * shape.num_spans * shape.G;
    Slot *slots = take<Slot>(context, tiles + spans);
    if (shape.num_tiles > 1) fill(context, slots, 0xff, (size_t)(tiles + spans) * sizeof(Slot));
    return Slots{slots, slots + tiles};
}

/* ----------------------------------------------------------------------------------------------------------
 * Forward
 */

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

/* Moments of `parts` equal parts of `count` steps, from the sums of what part_differences gives. */
template <typename A>
__device__ inline Moments<A> whole_of(A first_mean, A sum, A squares, int parts, int count) {
    A inverse = (A)1 / (A)parts, shift = sum * inverse;
    return Moments<A>{(A)(parts * count), first_mean + shift, squares * inverse - shift * shift};
}

/* Moments of steps 0 .. lane of a tile: lane i has the moments of step i alone. */
template <typename A> __device__ inline Moments<A> scan_steps(Pair<A> own, int lane) {
    A first = __shfl_sync(FULL_MASK, own.x, 0), sum = own.x - first, squares = own.y + sum * sum;
#pragma unroll
    for (int step = 1; step < WARP_SIZE; step *= 2) {
        A sum_before = __shfl_up_sync(FULL_MASK, sum, step),
          squares_before = __shfl_up_sync(FULL_MASK, squares, step);
        if (lane >= step) sum += sum_before, squares += squares_before;
    }
    return whole_of(first, sum, squares, lane + 1, 1);
}

/* Moments of everything before this tile, for one group; the whole warp calls it. */
__device__ inline Moments<double> look_back(const TimestepShape &shape, const Tile &tile, const Slots &slots,
                                            const Moments<double> &state, int g, int lane) {
    int span = tile.order / SPAN_TILES, earlier = tile.order % SPAN_TILES;
    int64_t row = (int64_t)tile.b * shape.num_tiles + span * SPAN_TILES + lane;
    Slot part = {0, 0};
    if (lane < earlier) part = await(slots.tiles + row * shape.G + g);
    Moments<double> before = state;
    if (span) {
        Slot prefix = await(slots.spans + ((int64_t)tile.b * shape.num_spans + span) * shape.G + g);
        before.count += (double)span * (SPAN_TILES * TILE_STEPS);
        before.mean = prefix.x, before.var = prefix.y;
    }
    if (earlier == 0) return before;
    double first = __shfl_sync(FULL_MASK, part.x, 0), difference = lane < earlier ? part.x - first : 0;
    double sum = warp_sum(difference), squares = warp_sum(part.y + difference * difference);
    return merge(before, whole_of(first, sum, squares, earlier, (int)TILE_STEPS));
}

/* computes: mean_t, var_t and y_t = (x_t - mean_t) / sqrt(var_t + eps) (1 + w) + b, and the moments after the
 *           last step
 * launch:   grid (tiles ceil(G / 16) B), block 256: a block owns 32 steps of 16 groups; `lanes` threads make
 *           the sums of a group of a step, a warp scans a group, then threads own columns and walk down
 * traffic:  2 B T D sizeof(T) + 8 B T G bytes, x a second time from the caches
 * needs:    VEC wants D/G and pointers in multiples of VEC elements; VEC 1 takes anything; empty slots; state
 *           in and out may be the same memory; mean_in NULL is an empty state
 * numerics: Accum is double for float; between tiles double; fixed order: deterministic */
template <typename T, int VEC>
__global__ void __launch_bounds__(TILE_THREADS, sizeof(T) == 2 ? 4 : 2)
    timestepnorm_forward_kernel(T *y, float *mean, float *var, double *mean_out, double *var_out, Slots slots,
                                const T *__restrict__ x, const int64_t *count, const double *mean_in,
                                const double *var_in, const T *weight, const T *bias, TimestepShape shape) {
    using A = Accum<T>;
    __shared__ Pair<A> moments[TILE_STEPS][TILE_GROUPS + 1];
    __shared__ float rstds[TILE_STEPS][TILE_GROUPS + 1];
    Tile tile(shape, false);
    int size = shape.size, lane = (int)threadIdx.x % shape.lanes, units = TILE_THREADS / shape.lanes;
    int64_t first_row = (int64_t)tile.b * shape.steps + tile.first_step;
    const T *corner = x + first_row * shape.D + (int64_t)tile.first_group * size;

    /* The moments of each step alone, from differences to the group's first value. All lanes of a warp make the
     * same number of rounds, so that the shuffles find them all. */
    TileWalk walk((int)threadIdx.x / shape.lanes, units, tile.groups);
    for (int round = 0; round * units < tile.groups * tile.steps; round += TILE_BATCH) {
        const T *values[TILE_BATCH];
        Pair<A> *out[TILE_BATCH];
        A first[TILE_BATCH], sum[TILE_BATCH] = {}, squares[TILE_BATCH] = {};
#pragma unroll
        for (int j = 0; j < TILE_BATCH; j++, walk.next()) {
            bool active = walk.step < tile.steps;
            values[j] = corner + (active ? (int64_t)walk.step * shape.D + walk.group * size : 0);
            out[j] = active && lane == 0 ? &moments[walk.step][walk.group] : nullptr;
            first[j] = to_float(values[j][0]);
        }
        for (int i = lane * VEC; i < size; i += shape.lanes * VEC) {
            Packed<T, VEC> value[TILE_BATCH];
#pragma unroll
            for (int j = 0; j < TILE_BATCH; j++) value[j] = packed<VEC>(values[j] + i);
#pragma unroll
            for (int j = 0; j < TILE_BATCH; j++) {
#pragma unroll
                for (int k = 0; k < VEC; k++) {
                    A difference = to_float(value[j].v[k]) - first[j];
                    sum[j] += difference, squares[j] += difference * difference;
                }
            }
        }
#pragma unroll
        for (int j = 0; j < TILE_BATCH; j++) {
            A s = lanes_sum(sum[j], shape.lanes), q = lanes_sum(squares[j], shape.lanes);
            Moments<A> m = whole_of(first[j], s, q, size, 1);
            if (out[j]) *out[j] = Pair<A>{m.mean, m.var};
        }
    }
    __syncthreads(); // the steps' own moments are all there for the scans

    int step = (int)threadIdx.x % WARP_SIZE, warp = (int)threadIdx.x / WARP_SIZE;
    Moments<A> local[GROUPS_PER_WARP];
#pragma unroll
    for (int i = 0; i < GROUPS_PER_WARP; i++) {
        int group = warp + i * TILE_WARPS;
        if (group >= tile.groups) break; // a whole warp leaves
        Pair<A> own = step < tile.steps ? moments[step][group] : Pair<A>{0, 0};
        local[i] = scan_steps(own, step);
        if (step == tile.steps - 1 && tile.index < shape.num_tiles - 1)
            tell(slots.tiles + ((int64_t)tile.b * shape.num_tiles + tile.index) * shape.G + tile.first_group +
                     group,
                 local[i].mean, local[i].var);
    }
#pragma unroll
    for (int i = 0; i < GROUPS_PER_WARP; i++) {
        int group = warp + i * TILE_WARPS, g = tile.first_group + group, bg = tile.b * shape.G + g;
        if (group >= tile.groups) break; // a whole warp leaves
        Moments<double> state = {0, 0, 0};
        if (mean_in) state = Moments<double>{(double)count[tile.b], mean_in[bg], var_in[bg]};
        Moments<double> before = look_back(shape, tile, slots, state, g, step);
        bool last = tile.index == shape.num_tiles - 1, ends_span = tile.order % SPAN_TILES == SPAN_TILES - 1;
        if (step == tile.steps - 1 && (last || ends_span)) {
            Moments<double> after = merge(
                before, Moments<double>{(double)tile.steps, (double)local[i].mean, (double)local[i].var});
            if (last && mean_out) mean_out[bg] = after.mean, var_out[bg] = after.var;
            if (!last)
                tell(slots.spans +
                         ((int64_t)tile.b * shape.num_spans + tile.order / SPAN_TILES + 1) * shape.G + g,
                     after.mean, after.var);
        }
        Moments<A> here = merge(Moments<A>{(A)before.count, (A)before.mean, (A)before.var}, local[i]);
        moments[step][group] = Pair<A>{here.mean, here.var};
        rstds[step][group] = (float)((A)1 / sqrt(here.var + (A)shape.eps));
    }
    __syncthreads(); // the moments of every step and group are there

    for (int i = (int)threadIdx.x; i < tile.steps * tile.groups; i += TILE_THREADS) {
        int t = i / tile.groups, group = i % tile.groups;
        int64_t at = (first_row + t) * shape.G + tile.first_group + group;
        mean[at] = (float)moments[t][group].x;
        var[at] = (float)moments[t][group].y;
    }
    int width = tile.groups * size;
    Sweep sweep(width, VEC);
    if (sweep.group >= sweep.groups) return;
    for (int c = sweep.lane * VEC; c < width; c += sweep.lanes * VEC) {
        int group = c / size, d = tile.first_group * size + c;
        float w[VEC], add[VEC], value[VEC];
        load<VEC>(w, weight + d);
        load<VEC>(add, bias + d);
#pragma unroll 4
        for (int t = sweep.group; t < tile.steps; t += sweep.groups) {
            A mean_here = moments[t][group].x;
            float rstd = rstds[t][group];
            load<VEC>(value, corner + (int64_t)t * shape.D + c);
#pragma unroll
            for (int j = 0; j < VEC; j++)
                value[j] = (float)(value[j] - mean_here) * rstd * (1.0f + w[j]) + add[j];
            store<VEC>(y + (first_row + t) * shape.D + d, value);
        }
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
    WITH_WIDTH(T, vector_width<T>(D / G, y, x, weight, bias), {
        TimestepShape shape = timestep_shape<T>(B, steps, D, G, eps, VEC);
        Slots slots = take_slots(context, shape);
        LAUNCH((timestepnorm_forward_kernel<T, VEC>), tile_blocks(shape), TILE_THREADS, context, y, mean, var,
               mean_out, var_out, slots, x, count, mean_in, var_in, weight, bias, shape);
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

/* P and U of everything after this tile, P seen from the mean `here`, for one group; the whole warp calls it.
 * means[t G] is mean[b, t, g]. */
__device__ inline Slot look_ahead(const TimestepShape &shape, const Tile &tile, const Slots &slots,
                                  const float *means, float here, int g, int lane) {
    int span = tile.order / SPAN_TILES, later = tile.order % SPAN_TILES;
    int other = shape.num_tiles - 1 - (span * SPAN_TILES + lane); // lane 0 has the last tile of this span
    Slot sum = {0, 0};
    if (lane < later) {
        double seen_from = (double)means[(int64_t)other * TILE_STEPS * shape.G] - (double)here;
        sum = await(slots.tiles + ((int64_t)tile.b * shape.num_tiles + other) * shape.G + g);
        sum.x -= 2 * sum.y * seen_from;
    }
    if (later) sum = Slot{warp_sum(sum.x), warp_sum(sum.y)};
    if (span) {
        int next = tile.index + later + 1; // the first tile after this span
        double seen_from = (double)means[(int64_t)next * TILE_STEPS * shape.G] - (double)here;
        Slot rest = await(slots.spans + ((int64_t)tile.b * shape.num_spans + span) * shape.G + g);
        sum.x += rest.x - 2 * rest.y * seen_from, sum.y += rest.y;
    }
    return sum;
}

/* y = (x - mean) rstd (1 + w) + b:  dm_t = -rstd sum g,  dv_t = -rstd^2/2 sum g xhat
 * computes: dx = rstd g + (P + 2 (x - mean) U) / size (+ add1 + add2), partial sums of dw = dy xhat and
 *           db = dy, one row a tile; dmean_in = n (P_0 - 2 U_0 (mean_0 - mean_in)), dvar_in = n U_0, n the steps
 *           before
 * launch:   grid (tiles ceil(G / 16) B), block 256: as the forward, the last tile first
 * traffic:  (3 + adds) B T D sizeof(T) + 8 B T G bytes, x and dy a second time from the caches
 * needs:    VEC wants D/G and pointers in multiples of VEC elements; VEC 1 takes anything; empty slots; dx may
 *           be dy, add1 or add2
 * numerics: Accum is double for float; between tiles double; fixed order: deterministic */
template <typename T, int VEC>
__global__ void __launch_bounds__(TILE_THREADS, sizeof(T) == 2 ? 3 : 2)
    timestepnorm_backward_kernel(T *dx, double *dmean_in, double *dvar_in, float *partial_w, float *partial_b,
                                 Slots slots, const T *dy, const double *dmean_out, const double *dvar_out,
                                 const T *add1, const T *add2, const float *mean, const float *var,
                                 const T *__restrict__ x, const int64_t *count, const double *mean_in,
                                 const T *weight, TimestepShape shape) {
    using A = Accum<T>;
    __shared__ Pair<A> shares[TILE_STEPS][TILE_GROUPS + 1];     // dm / k and dv / k, then P / size and 2 U / size
    __shared__ Pair<float> moments[TILE_STEPS][TILE_GROUPS + 1]; // mean and rstd
    __shared__ SweepSums<VEC> column_sums;
    Tile tile(shape, true);
    int size = shape.size, lane = (int)threadIdx.x % shape.lanes, units = TILE_THREADS / shape.lanes;
    int first_column = tile.first_group * size;
    int64_t first_row = (int64_t)tile.b * shape.steps + tile.first_step;
    A seen = mean_in ? (A)count[tile.b] : (A)0;

    TileWalk walk((int)threadIdx.x / shape.lanes, units, tile.groups);
    for (int round = 0; round * units < tile.groups * tile.steps; round += TILE_BATCH / 2) {
        int64_t at[TILE_BATCH / 2];
        int step[TILE_BATCH / 2], group[TILE_BATCH / 2];
        float mean_here[TILE_BATCH / 2], var_here[TILE_BATCH / 2];
        A sum[TILE_BATCH / 2] = {}, product[TILE_BATCH / 2] = {};
#pragma unroll
        for (int j = 0; j < TILE_BATCH / 2; j++, walk.next()) {
            step[j] = walk.step < tile.steps ? walk.step : -1, group[j] = step[j] < 0 ? 0 : walk.group;
            int64_t row = first_row + max(step[j], 0), statistic = row * shape.G + tile.first_group + group[j];
            at[j] = row * shape.D + first_column + group[j] * size;
            mean_here[j] = mean[statistic], var_here[j] = var[statistic];
        }
        for (int i = lane * VEC; i < size; i += shape.lanes * VEC) {
            Packed<T, VEC> value[TILE_BATCH / 2], grad[TILE_BATCH / 2], w[TILE_BATCH / 2];
#pragma unroll
            for (int j = 0; j < TILE_BATCH / 2; j++) {
                value[j] = packed<VEC>(x + at[j] + i), grad[j] = packed<VEC>(dy + at[j] + i);
                w[j] = packed<VEC>(weight + first_column + group[j] * size + i);
            }
#pragma unroll
            for (int j = 0; j < TILE_BATCH / 2; j++) {
#pragma unroll
                for (int k = 0; k < VEC; k++) {
                    A g = to_float(grad[j].v[k]) * (1.0f + to_float(w[j].v[k]));
                    sum[j] += g;
                    product[j] += g * (to_float(value[j].v[k]) - mean_here[j]);
                }
            }
        }
#pragma unroll
        for (int j = 0; j < TILE_BATCH / 2; j++) {
            A total = lanes_sum(sum[j], shape.lanes), products = lanes_sum(product[j], shape.lanes);
            if (step[j] < 0 || lane != 0) continue;
            A rstd = (A)1 / sqrt((A)var_here[j] + (A)shape.eps);
            A dm = -rstd * total, dv = (A)-0.5 * rstd * rstd * rstd * products;
            int t = tile.first_step + step[j], bg = tile.b * shape.G + tile.first_group + group[j];
            if (t == shape.steps - 1 && dmean_out) dm += (A)dmean_out[bg];
            if (t == shape.steps - 1 && dvar_out) dv += (A)dvar_out[bg];
            A share = (A)1 / (seen + (A)(t + 1));
            shares[step[j]][group[j]] = Pair<A>{dm * share, dv * share};
            moments[step[j]][group[j]] = Pair<float>{mean_here[j], (float)rstd};
        }
    }
    __syncthreads(); // every step's own share is there for the scans

    int step = (int)threadIdx.x % WARP_SIZE, warp = (int)threadIdx.x / WARP_SIZE;
    Pair<A> local[GROUPS_PER_WARP]; // P seen from the tile's first mean, and U
    float difference[GROUPS_PER_WARP], first_mean[GROUPS_PER_WARP];
#pragma unroll
    for (int i = 0; i < GROUPS_PER_WARP; i++) {
        int group = warp + i * TILE_WARPS;
        if (group >= tile.groups) break; // a whole warp leaves
        bool active = step < tile.steps;
        Pair<A> own = active ? shares[step][group] : Pair<A>{0, 0};
        float mean_here = active ? moments[step][group].x : 0.0f;
        first_mean[i] = __shfl_sync(FULL_MASK, mean_here, 0);
        difference[i] = active ? mean_here - first_mean[i] : 0.0f;
        own.x -= 2 * own.y * (A)difference[i];
#pragma unroll
        for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
            A p = __shfl_down_sync(FULL_MASK, own.x, distance), u = __shfl_down_sync(FULL_MASK, own.y, distance);
            if (step + distance < WARP_SIZE) own.x += p, own.y += u;
        }
        local[i] = own;
        if (step == 0 && tile.index > 0)
            tell(slots.tiles + ((int64_t)tile.b * shape.num_tiles + tile.index) * shape.G + tile.first_group +
                     group,
                 own.x, own.y);
    }
#pragma unroll
    for (int i = 0; i < GROUPS_PER_WARP; i++) {
        int group = warp + i * TILE_WARPS, g = tile.first_group + group, bg = tile.b * shape.G + g;
        if (group >= tile.groups) break; // a whole warp leaves
        const float *means = mean + (int64_t)tile.b * shape.steps * shape.G + g;
        Slot all = look_ahead(shape, tile, slots, means, first_mean[i], g, step);
        all.x += local[i].x, all.y += local[i].y;
        if (step == 0 && tile.index > 0 && tile.order % SPAN_TILES == SPAN_TILES - 1)
            tell(slots.spans + ((int64_t)tile.b * shape.num_spans + tile.order / SPAN_TILES + 1) * shape.G + g,
                 all.x, all.y);
        if (step == 0 && tile.index == 0 && dmean_in) {
            double n = mean_in ? (double)count[tile.b] : 0, before = mean_in ? mean_in[bg] : 0;
            dmean_in[bg] = n * (all.x - 2 * all.y * ((double)first_mean[i] - before));
            dvar_in[bg] = n * all.y;
        }
        all.x += 2 * all.y * (double)difference[i];
        shares[step][group] = Pair<A>{(A)(all.x / size), (A)(2 * all.y / size)};
    }
    __syncthreads(); // P and U of every step and group are there

    int width = tile.groups * size;
    Sweep sweep(width, VEC);
    int64_t out = ((int64_t)tile.b * shape.num_tiles + tile.index) * shape.D + first_column;
    bool working = sweep.group < sweep.groups;
    float dw[VEC] = {}, db[VEC] = {};
    for (int c = sweep.lane * VEC; working && c < width; c += sweep.lanes * VEC) {
        int group = c / size;
        float w[VEC], value[VEC], grad[VEC], add[VEC];
        load<VEC>(w, weight + first_column + c);
#pragma unroll
        for (int i = 0; i < VEC; i++) dw[i] = db[i] = 0;
        for (int t = sweep.group; t < tile.steps; t += sweep.groups) {
            int64_t at = (first_row + t) * shape.D + first_column + c;
            float mean_here = moments[t][group].x, rstd = moments[t][group].y;
            float p = (float)shares[t][group].x, u = (float)shares[t][group].y;
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
        if (sweep.groups == 1) {
            if (partial_w) store<VEC>(partial_w + out + c, dw);
            if (partial_b) store<VEC>(partial_b + out + c, db);
        }
    }
    if (sweep.groups == 1) return;
    if (partial_w) sweep_row<VEC>(partial_w + out, sweep, width, dw, column_sums);
    if (partial_b) sweep_row<VEC>(partial_b + out, sweep, width, db, column_sums);
}

/* dx = gradient of x + add1 + add2 (B,T,D; NULL: nothing to add); dx may be dy, add1 or add2. dmean_in,
 * dvar_in (B,G) double, NULL: not wanted; dweight, dbias (D) added to, NULL: none; dmean_out, dvar_out NULL:
 * zero. The two sums wait for add_sums. */
template <typename T>
static void timestepnorm_backward(Context *context, T *dx, double *dmean_in, double *dvar_in, float *dweight,
                                  float *dbias, const T *dy, const double *dmean_out, const double *dvar_out,
                                  const T *add1, const T *add2, const float *mean, const float *var,
                                  const T *x, const int64_t *count, const double *mean_in, const T *weight,
                                  int64_t B, int64_t steps, int64_t D, int64_t G, float eps) {
    ScratchScope scope(context);
    WITH_WIDTH(T, vector_width<T>(D / G, dx, dy, add1, add2, x, weight), {
        TimestepShape shape = timestep_shape<T>(B, steps, D, G, eps, VEC);
        Slots slots = take_slots(context, shape);
        int64_t partials = B * shape.num_tiles;
        float *partial_w = take_sum(context, dweight, partials, D);
        float *partial_b = take_sum(context, dbias, partials, D);
        LAUNCH((timestepnorm_backward_kernel<T, VEC>), tile_blocks(shape), TILE_THREADS, context, dx, dmean_in,
               dvar_in, partial_w, partial_b, slots, dy, dmean_out, dvar_out, add1, add2, mean, var, x, count,
               mean_in, weight, shape);
    });
}

#endif
