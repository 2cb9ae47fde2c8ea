/* timestepnorm.cuh - TimestepNorm: each group of features is normalised by the mean and variance of
 * everything that its row of the batch has seen up to and including this step. Both directions are scans
 * over time, and each is one kernel that reads its inputs once from memory.
 *
 * A block owns a tile: 32 steps of some groups. It reduces the tile to sums, tells them to the blocks that
 * need them, learns from others what came before, and goes over the tile a second time, which is in the
 * caches by then. 32 tiles make a span; whoever has the last tile of a span tells the sums of everything up
 * to its end. So a tile waits for at most 31 tiles and one span, and adds them in an order that never
 * changes. Threads change roles on the way: a thread owns a group of a step, then a lane a step and a warp a
 * group for the scan, then a thread a group of another tile to learn from, and at last columns.
 *
 * Forward. (count, mean, variance) of two stretches of time merge by Chan's formula. Moments of equal parts
 * come from the sums of differences to a reference that is one of the parts, or merges with them right
 * after: the variance is at least the reference's squared distance over their number, so that nothing
 * cancels and a large mean or a million steps do no harm.
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
    TILE_THREADS = 256,
    TILE_WARPS = TILE_THREADS / WARP_SIZE,
    PIECES = 4,         /* vectors that a thread asks for at a time */
    LANE_FEATURES = 32, /* a group of at most so many is one thread's, in a step */
};

/* Blocks of a multiprocessor, in both directions. The second pass over their tiles wants to find them in the
 * first cache, see fit_cache. */
template <typename T> constexpr int TILE_BLOCKS = sizeof(T) == 2 ? 4 : 2;

/* Sizes of a call, and how its tiles are laid out: `parts` blocks share the groups of a tile, `lanes` threads
 * (a power of two) a group of one step. */
struct TimestepShape {
    int B, steps, D, G, size, num_tiles, num_spans, parts, lanes;
    float eps;
};

static inline TimestepShape timestep_shape(int64_t B, int64_t steps, int64_t D, int64_t G, float eps,
                                           int tile_groups) {
    int64_t size = D / G, tiles = ceil_div(steps, TILE_STEPS), lanes = 1;
    while (lanes < WARP_SIZE && lanes * LANE_FEATURES < size) lanes *= 2;
    TimestepShape shape = {};
    shape.B = (int)B, shape.steps = (int)steps, shape.D = (int)D, shape.G = (int)G, shape.size = (int)size;
    shape.num_tiles = (int)tiles, shape.num_spans = (int)ceil_div(tiles, SPAN_TILES);
    shape.parts = (int)ceil_div(G, tile_groups), shape.lanes = (int)lanes;
    shape.eps = eps;
    return shape;
}
static unsigned tile_blocks(const TimestepShape &shape) {
    return (unsigned)((int64_t)shape.num_tiles * shape.parts * shape.B);
}

/* Groups of a tile: so many that four blocks' tiles fit the first cache, the backward reading two tensors. */
static inline int forward_groups(int64_t size) { return size < 24 ? 32 : 16; }
static inline int backward_groups(int64_t size) { return size < 24 ? 16 : 8; }
/* Runs a statement with the constant GROUPS, which is `many` or half of it. */
#define WITH_GROUPS(many, groups, ...)                                                                      \
    do {                                                                                                    \
        if ((groups) == (many)) {                                                                           \
            constexpr int GROUPS = (many);                                                                  \
            __VA_ARGS__;                                                                                    \
        } else {                                                                                            \
            constexpr int GROUPS = (many) / 2;                                                              \
            __VA_ARGS__;                                                                                    \
        }                                                                                                   \
    } while (0)

/* The tile of this block. Blocks start in the order of their index, so that whatever a block waits for is
 * under way or done: `order` counts tiles from where the scan begins. */
template <int GROUPS> struct Tile {
    int b, order, index, first_group, groups, first_step, steps;
    __device__ Tile(const TimestepShape &shape, bool backwards) {
        int rest = (int)(blockIdx.x / (unsigned)shape.B), part = rest % shape.parts;
        b = (int)(blockIdx.x % (unsigned)shape.B), order = rest / shape.parts;
        index = backwards ? shape.num_tiles - 1 - order : order;
        first_group = part * GROUPS, groups = min(GROUPS, shape.G - first_group);
        first_step = index * TILE_STEPS, steps = min((int)TILE_STEPS, shape.steps - first_step);
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
    /* A NaN may have any bits; these would be waited for. */
    *(volatile unsigned long long *)word = bits == SLOT_EMPTY ? SLOT_NAN : bits;
}
__device__ inline void tell(Slot *slot, double x, double y) {
    tell_word(&slot->x, x);
    tell_word(&slot->y, y);
}

/* Both words of a slot as they were when it was asked. To ask several before the first is awaited takes the
 * time of one. */
struct Asked { unsigned long long x, y; };
__device__ inline Asked ask(const Slot *slot) {
    Asked asked;
    asked.x = *(const volatile unsigned long long *)&slot->x;
    asked.y = *(const volatile unsigned long long *)&slot->y;
    return asked;
}
__device__ inline Slot await(Asked asked, const Slot *slot) {
    while (asked.x == SLOT_EMPTY || asked.y == SLOT_EMPTY) asked = ask(slot);
    return Slot{__longlong_as_double((long long)asked.x), __longlong_as_double((long long)asked.y)};
}

/* tiles (B,num_tiles,G), then spans (B,num_spans,G): spans[b, i] is what came before span i */
struct Slots {
    Slot *tiles, *spans;
    __device__ Slot *tile(const TimestepShape &shape, int b, int index, int g) const {
        return tiles + ((int64_t)b * shape.num_tiles + index) * shape.G + g;
    }
    __device__ Slot *span(const TimestepShape &shape, int b, int index, int g) const {
        return spans + ((int64_t)b * shape.num_spans + index) * shape.G + g;
    }
};
static Slots take_slots(Context *context, const TimestepShape &shape) {
    int64_t tiles = (int64_t)shape.B * shape.num_tiles * shape.G,
            spans = (int64_t)shape.B * shape.num_spans * shape.G;
    Slot *slots = take<Slot>(context, tiles + spans);
    if (shape.num_tiles > 1) fill(context, slots, 0xff, (size_t)(tiles + spans) * sizeof(Slot));
    return Slots{slots, slots + tiles};
}

/* Room for what the threads of a block learned from other tiles: a row a warp. */
template <int GROUPS> struct Learned { Slot of[TILE_WARPS][GROUPS]; };
/* Adds up what the `count` tiles from `first` on told, group by group: term(what tile i told, reference(i)).
 * A thread asks some tiles for group threadIdx.x % GROUPS; the whole block calls it. */
template <int GROUPS, typename R, typename F>
__device__ inline void learn(Learned<GROUPS> &learned, const Slots &slots, const TimestepShape &shape,
                             const Tile<GROUPS> &tile, int first, int count, R reference, F term) {
    constexpr int STRIDE = TILE_THREADS / GROUPS, ASKED = SPAN_TILES / STRIDE;
    int group = (int)threadIdx.x % GROUPS, begin = (int)threadIdx.x / GROUPS;
    auto slot = [&](int i) { return slots.tile(shape, tile.b, first + i, tile.first_group + group); };
    Asked asked[ASKED];
    Slot sum = {0, 0};
#pragma unroll
    for (int k = 0; k < ASKED; k++) {
        int i = begin + k * STRIDE;
        if (i < count && group < tile.groups) asked[k] = ask(slot(i));
    }
#pragma unroll
    for (int k = 0; k < ASKED; k++) {
        int i = begin + k * STRIDE;
        if (i >= count || group >= tile.groups) break;
        double seen_from = reference(first + i); // loaded while the tile is awaited
        Slot part = term(await(asked[k], slot(i)), seen_from);
        sum.x += part.x, sum.y += part.y;
    }
#pragma unroll
    for (int step = WARP_SIZE / 2; step >= GROUPS; step /= 2) {
        sum.x += __shfl_xor_sync(FULL_MASK, sum.x, step);
        sum.y += __shfl_xor_sync(FULL_MASK, sum.y, step);
    }
    int lane = (int)threadIdx.x % WARP_SIZE;
    if (lane < GROUPS) learned.of[threadIdx.x / WARP_SIZE][lane] = sum;
    __syncthreads(); // every warp's sums are there
}
template <int GROUPS> __device__ inline Slot all_learned(const Learned<GROUPS> &learned, int group) {
    Slot sum = {0, 0};
    for (int warp = 0; warp < TILE_WARPS; warp++)
        sum.x += learned.of[warp][group].x, sum.y += learned.of[warp][group].y;
    return sum;
}

/* A pair for each step and group of a tile; one more a row keeps a column's pairs in several banks. */
template <typename A, int GROUPS> using TilePairs = Pair<A>[TILE_STEPS][GROUPS + 1];

/* Calls visit(numbers, i) for a lane's vectors of a group, numbers[n] being from[n][i...]. PIECES of them are
 * asked for before the first is used: a loop whose step only the launch knows asks for one after the other,
 * however it is unrolled. */
template <int VEC, int TENSORS, typename T, typename F>
__device__ inline void each_vector(const T *const (&from)[TENSORS], int size, int lane, int lanes, F visit) {
    for (int begin = lane * VEC; begin < size; begin += PIECES * lanes * VEC) {
        VectorWords<T, VEC> words[PIECES][TENSORS];
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            int i = begin + p * lanes * VEC;
#pragma unroll
            for (int n = 0; n < TENSORS && i < size; n++) words[p][n] = words_at<VEC>(from[n] + i);
        }
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
            int i = begin + p * lanes * VEC;
            if (i >= size) break;
            float numbers[TENSORS][VEC];
#pragma unroll
            for (int n = 0; n < TENSORS; n++) numbers_of(numbers[n], words[p][n]);
            visit(numbers, i);
        }
    }
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

/* Moments of equal parts, from the sums over them of their mean's difference to a reference, and of its
 * square plus their variance. inverse: 1 / the number of parts. */
template <typename A> __device__ inline Pair<A> moments_of(A reference, A sum, A squares, A inverse) {
    A shift = sum * inverse;
    return Pair<A>{reference + shift, squares * inverse - shift * shift};
}

/* Moments of steps 0 .. lane of a tile: lane i has the moments of step i alone. inverse: 1 / (lane + 1). */
template <typename A> __device__ inline Pair<A> scan_steps(Pair<A> own, int lane, A inverse) {
    A first = __shfl_sync(FULL_MASK, own.x, 0), sum = own.x - first, squares = own.y + sum * sum;
#pragma unroll
    for (int step = 1; step < WARP_SIZE; step *= 2) {
        A sum_before = __shfl_up_sync(FULL_MASK, sum, step),
          squares_before = __shfl_up_sync(FULL_MASK, squares, step);
        if (lane >= step) sum += sum_before, squares += squares_before;
    }
    return moments_of(first, sum, squares, inverse);
}

/* The moments of each step alone. */
template <int VEC, typename T, int GROUPS>
__device__ inline void own_moments(TilePairs<Accum<T>, GROUPS> &moments, const T *corner,
                                   const Tile<GROUPS> &tile, const TimestepShape &shape) {
    using A = Accum<T>;
    int size = shape.size, lanes = shape.lanes, lane = (int)threadIdx.x % lanes;
    A inverse_size = (A)1 / (A)size;
    /* All threads make as many rounds, so that shuffles find every lane. */
    for (int unit = (int)threadIdx.x / lanes; unit < TILE_STEPS * GROUPS; unit += TILE_THREADS / lanes) {
        int step = unit / GROUPS, group = unit % GROUPS;
        bool active = step < tile.steps && group < tile.groups;
        const T *values[1] = {active ? corner + (int64_t)step * shape.D + group * size : corner};
        A first = to_float(values[0][0]), sum = 0, squares = 0;
        each_vector<VEC>(values, size, lane, lanes, [&](const float (&value)[1][VEC], int) {
#pragma unroll
            for (int k = 0; k < VEC; k++) {
                A difference = value[0][k] - first;
                sum += difference, squares += difference * difference;
            }
        });
        if (lanes > 1) sum = lanes_sum(sum, lanes), squares = lanes_sum(squares, lanes);
        if (active && lane == 0) moments[step][group] = moments_of(first, sum, squares, inverse_size);
    }
}

/* computes: mean_t, var_t and y_t = (x_t - mean_t) / sqrt(var_t + eps) (1 + w) + b, and the moments after the
 *           last step
 * launch:   grid (tiles ceil(G / GROUPS) B), block 256: a block owns 32 steps of GROUPS groups
 * traffic:  2 B T D sizeof(T) + 8 B T G bytes, x a second time from the caches
 * needs:    VEC wants D/G and pointers in multiples of VEC elements; VEC 1 takes anything; empty slots; state
 *           in and out may be the same memory; mean_in NULL is an empty state
 * numerics: Accum is double for float; between tiles double; fixed order: deterministic */
template <typename T, int VEC, int GROUPS>
__global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS<T>)
    timestepnorm_forward_kernel(T *y, float *mean, float *var, double *mean_out, double *var_out,
                                Slots slots, const T *__restrict__ x, const int64_t *count,
                                const double *mean_in, const double *var_in, const T *weight, const T *bias,
                                TimestepShape shape) {
    using A = Accum<T>;
    __shared__ TilePairs<A, GROUPS> moments;
    __shared__ Pair<A> before[GROUPS];
    __shared__ float rstds[TILE_STEPS][GROUPS + 1];
    __shared__ Learned<GROUPS> learned;
    __shared__ Slot state[GROUPS];
    Tile<GROUPS> tile(shape, false);
    int size = shape.size;
    int64_t first_row = (int64_t)tile.b * shape.steps + tile.first_step;
    const T *corner = x + first_row * shape.D + (int64_t)tile.first_group * size;

    /* The state may be overwritten as soon as this block has told its sums to the one that has the last tile:
     * it is in this block's memory before. Later spans have no use for it. */
    if (mean_in && tile.order < SPAN_TILES && (int)threadIdx.x < tile.groups) {
        int bg = tile.b * shape.G + tile.first_group + (int)threadIdx.x;
        state[threadIdx.x] = Slot{mean_in[bg], var_in[bg]};
    }

    own_moments<VEC>(moments, corner, tile, shape);
    __syncthreads(); // the steps' own moments are all there for the scans, and so is the state

    {
        int step = (int)threadIdx.x % WARP_SIZE;
        A inverse = (A)1 / (A)(step + 1);
        for (int group = (int)threadIdx.x / WARP_SIZE; group < tile.groups; group += TILE_WARPS) {
            Pair<A> local =
                scan_steps(step < tile.steps ? moments[step][group] : Pair<A>{0, 0}, step, inverse);
            if (step < tile.steps) moments[step][group] = local;
            if (step == tile.steps - 1 && tile.index < shape.num_tiles - 1)
                tell(slots.tile(shape, tile.b, tile.index, tile.first_group + group), local.x, local.y);
        }
    }
    __syncthreads(); // the first step's mean, which is the reference below, is still there after the scans

    int span = tile.order / SPAN_TILES, earlier = tile.order % SPAN_TILES;
    double seen = mean_in ? (double)count[tile.b] : 0;
    const Slot *span_slot = slots.span(shape, tile.b, span, tile.first_group + (int)threadIdx.x);
    Asked asked = {SLOT_EMPTY, SLOT_EMPTY};
    if (span && (int)threadIdx.x < tile.groups) asked = ask(span_slot);
    if (earlier) {
        int group = (int)threadIdx.x % GROUPS;
        double reference = group < tile.groups ? (double)moments[0][group].x : 0;
        learn(
            learned, slots, shape, tile, span * SPAN_TILES, earlier, [&](int) { return reference; },
            [](Slot part, double seen_from) {
                double difference = part.x - seen_from;
                return Slot{difference, part.y + difference * difference};
            });
    }
    if ((int)threadIdx.x < tile.groups) {
        int group = (int)threadIdx.x, g = tile.first_group + group, bg = tile.b * shape.G + g;
        Moments<double> all = {seen, 0, 0};
        if (mean_in && !span) all.mean = state[group].x, all.var = state[group].y;
        if (span) {
            Slot prefix = await(asked, span_slot);
            all = Moments<double>{seen + (double)span * (SPAN_TILES * TILE_STEPS), prefix.x, prefix.y};
        }
        if (earlier) {
            Slot sum = all_learned(learned, group);
            Slot part = moments_of((double)moments[0][group].x, sum.x, sum.y, 1 / (double)earlier);
            all = merge(all, Moments<double>{(double)(earlier * TILE_STEPS), part.x, part.y});
        }
        before[group] = Pair<A>{(A)all.mean, (A)all.var};
        bool last = tile.index == shape.num_tiles - 1;
        if (last ? mean_out != nullptr : earlier == SPAN_TILES - 1) {
            Pair<A> own = moments[tile.steps - 1][group];
            all = merge(all, Moments<double>{(double)tile.steps, (double)own.x, (double)own.y});
            if (last)
                mean_out[bg] = all.mean, var_out[bg] = all.var;
            else
                tell(slots.span(shape, tile.b, span + 1, g), all.mean, all.var);
        }
    }
    __syncthreads(); // every group knows what came before

    seen += (double)tile.first_step;
    for (int unit = (int)threadIdx.x; unit < TILE_STEPS * GROUPS; unit += TILE_THREADS) {
        int step = unit / GROUPS, group = unit % GROUPS;
        if (step >= tile.steps || group >= tile.groups) continue;
        Pair<A> own = moments[step][group];
        Moments<A> here = merge(Moments<A>{(A)seen, before[group].x, before[group].y},
                                Moments<A>{(A)(step + 1), own.x, own.y});
        int64_t at = (first_row + step) * shape.G + tile.first_group + group;
        mean[at] = (float)here.mean, var[at] = (float)here.var;
        moments[step][group].x = here.mean;
        rstds[step][group] = (float)((A)1 / sqrt(here.var + (A)shape.eps));
    }
    __syncthreads(); // the moments of every step and group are there

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
    int groups = forward_groups(D / G);
    TimestepShape shape = timestep_shape(B, steps, D, G, eps, groups);
    Slots slots = take_slots(context, shape);
    WITH_WIDTH(T, vector_width<T>(D / G, y, x, weight, bias), WITH_GROUPS(32, groups, {
                   fit_cache(context, timestepnorm_forward_kernel<T, VEC, GROUPS>, TILE_BLOCKS<T>);
                   LAUNCH((timestepnorm_forward_kernel<T, VEC, GROUPS>), tile_blocks(shape), TILE_THREADS,
                          context, y, mean, var, mean_out, var_out, slots, x, count, mean_in, var_in, weight,
                          bias, shape);
               }));
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

template <typename T> struct TimestepBackward {
    T *dx;
    double *dmean_in, *dvar_in;
    float *partial_w, *partial_b; /* rows of take_sum, or NULL */
    Slots slots;
    const T *dy;
    const double *dmean_out, *dvar_out;
    const T *add[2]; /* to dx; NULL: nothing */
    int add_gap[2];  /* between their rows */
    const float *mean, *var;
    const int64_t *count;
    const double *mean_in;
    const T *weight;
};

/* Rows of what is added to dx, on their way into shared memory: 32 bytes a thread of each tensor, which the
 * thread itself will read. The first are asked for before the block waits for others, since nothing that it
 * learns from them changes them; in the second pass over the tile each row would wait for memory before the
 * next is asked for. Single elements are read when they are needed. In the end this is the place of the
 * column sums. */
template <typename T, int VEC> struct AddsAhead {
    static constexpr int ROWS = VEC > 1 ? 32 / (VEC * (int)sizeof(T)) : 0;
    union {
        Packed<T, VEC> rows[2][ROWS > 0 ? ROWS : 1][TILE_THREADS];
        SweepSums<VEC> sums;
    };

    /* Asks for what is added to dx[row, c...], a group of copies; not `here`: for nothing. */
    __device__ void ask(const TimestepBackward<T> &p, int slot, int row, int c, int D, bool here) {
        if constexpr (ROWS > 0) {
            for (int n = 0; n < 2; n++)
                if (here && p.add[n])
                    copy_early<VEC * sizeof(T)>(&rows[n][slot][threadIdx.x],
                                                p.add[n] + (int64_t)row * (D + p.add_gap[n]) + c, true);
            copies_commit();
        }
    }
    /* Asks for the first rows of the sweep, from column c on. */
    __device__ void begin(const TimestepBackward<T> &p, const Sweep &sweep, int first_row, int steps, int c,
                          int D) {
#pragma unroll 2 // all four of short vectors would cost registers
        for (int i = 0, t = sweep.group; i < ROWS; i++, t += sweep.groups)
            ask(p, i, first_row + t, c, D, t < steps);
    }
    /* Adds it to grad. */
    __device__ void add(float (&grad)[VEC], const TimestepBackward<T> &p, int slot, int row, int c, int D) {
        if constexpr (ROWS > 0) copies_wait<ROWS - 1>();
#pragma unroll
        for (int n = 0; n < 2; n++) {
            if (!p.add[n]) continue;
            float value[VEC];
            if constexpr (ROWS > 0)
                load<VEC>(value, rows[n][slot][threadIdx.x].v);
            else
                load<VEC>(value, p.add[n] + (int64_t)row * (D + p.add_gap[n]) + c);
#pragma unroll
            for (int i = 0; i < VEC; i++) grad[i] += value[i];
        }
    }
};

/* Each step's own dm / k and dv / k, with k the steps seen, and its mean and 1 / sqrt(var + eps). */
template <int VEC, typename T, int GROUPS>
__device__ inline void own_shares(TilePairs<Accum<T>, GROUPS> &shares, TilePairs<float, GROUPS> &moments,
                                  const TimestepBackward<T> &p, const T *x, const Tile<GROUPS> &tile,
                                  const TimestepShape &shape) {
    using A = Accum<T>;
    int size = shape.size, lanes = shape.lanes, lane = (int)threadIdx.x % lanes;
    A seen = (A)tile.first_step + (p.mean_in ? (A)p.count[tile.b] : (A)0);
    for (int unit = (int)threadIdx.x / lanes; unit < TILE_STEPS * GROUPS; unit += TILE_THREADS / lanes) {
        int step = unit / GROUPS, group = unit % GROUPS;
        bool active = step < tile.steps && group < tile.groups;
        if (!active) step = group = 0; // the shuffles want every lane
        int64_t row = (int64_t)tile.b * shape.steps + tile.first_step + step;
        int64_t statistic = row * shape.G + tile.first_group + group, at = row * shape.D;
        int column = (tile.first_group + group) * size;
        const T *inputs[2] = {x + at + column, p.dy + at + column};
        float mean_here = p.mean[statistic], var_here = p.var[statistic];
        A sum = 0, product = 0;
        each_vector<VEC>(inputs, size, lane, lanes, [&](const float (&numbers)[2][VEC], int i) {
            float w[VEC];
            load<VEC>(w, p.weight + column + i);
#pragma unroll
            for (int k = 0; k < VEC; k++) {
                A g = numbers[1][k] * (1.0f + w[k]);
                sum += g;
                product += g * (numbers[0][k] - mean_here);
            }
        });
        if (lanes > 1) sum = lanes_sum(sum, lanes), product = lanes_sum(product, lanes);
        if (!active || lane != 0) continue;
        A rstd = (A)1 / sqrt((A)var_here + (A)shape.eps);
        A dm = -rstd * sum, dv = (A)-0.5 * rstd * rstd * rstd * product;
        if (tile.first_step + step == shape.steps - 1) { // the last moments are the state that goes out
            int bg = tile.b * shape.G + tile.first_group + group;
            if (p.dmean_out) dm += (A)p.dmean_out[bg];
            if (p.dvar_out) dv += (A)p.dvar_out[bg];
        }
        A share = (A)1 / (seen + (A)(step + 1));
        shares[step][group] = Pair<A>{dm * share, dv * share};
        moments[step][group] = Pair<float>{mean_here, (float)rstd};
    }
}

/* dx and the tile's partial sums, from P / size and 2 U / size, mean and rstd of every step and group. */
template <int VEC, typename T, int GROUPS>
__device__ inline void tile_gradients(const TilePairs<Accum<T>, GROUPS> &shares,
                                      const TilePairs<float, GROUPS> &moments, AddsAhead<T, VEC> &adds,
                                      const TimestepBackward<T> &p, const T *x, const Tile<GROUPS> &tile,
                                      const TimestepShape &shape) {
    constexpr int ROWS = AddsAhead<T, VEC>::ROWS;
    int size = shape.size, width = tile.groups * size, first_column = tile.first_group * size;
    int first_row = tile.b * shape.steps + tile.first_step;
    int64_t out = ((int64_t)tile.b * shape.num_tiles + tile.index) * shape.D + first_column;
    Sweep sweep(width, VEC);
    bool working = sweep.group < sweep.groups;
    float dw[VEC] = {}, db[VEC] = {};
    for (int c = sweep.lane * VEC; working && c < width; c += sweep.lanes * VEC) {
        int group = c / size, column = first_column + c;
        float w[VEC], value[VEC], grad[VEC];
        load<VEC>(w, p.weight + column);
        if (c >= sweep.lanes * VEC) adds.begin(p, sweep, first_row, tile.steps, column, shape.D);
#pragma unroll
        for (int i = 0; i < VEC; i++) dw[i] = db[i] = 0;
        for (int t = sweep.group, slot = 0; t < tile.steps; t += sweep.groups) {
            int64_t at = (int64_t)(first_row + t) * shape.D + column;
            float mean_here = moments[t][group].x, rstd = moments[t][group].y;
            float shift = (float)shares[t][group].x, slope = (float)shares[t][group].y;
            load<VEC>(value, x + at);
            load<VEC>(grad, p.dy + at);
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float centred = value[i] - mean_here;
                dw[i] += grad[i] * centred * rstd;
                db[i] += grad[i];
                grad[i] = grad[i] * (1.0f + w[i]) * rstd + shift + centred * slope;
            }
            adds.add(grad, p, slot, first_row + t, column, shape.D);
            store<VEC>(p.dx + at, grad);
            int next = t + ROWS * sweep.groups; // into the place that has just been read
            adds.ask(p, slot, first_row + next, column, shape.D, next < tile.steps);
            slot = slot == ROWS - 1 ? 0 : slot + 1;
        }
        if (sweep.groups == 1) {
            if (p.partial_w) store<VEC>(p.partial_w + out + c, dw);
            if (p.partial_b) store<VEC>(p.partial_b + out + c, db);
        }
    }
    if (sweep.groups == 1) return;
    if (p.partial_w) sweep_row<VEC>(p.partial_w + out, sweep, width, dw, adds.sums);
    if (p.partial_b) sweep_row<VEC>(p.partial_b + out, sweep, width, db, adds.sums);
}

/* y = (x - mean) rstd (1 + w) + b:  dm_t = -rstd sum g,  dv_t = -rstd^2/2 sum g xhat
 * computes: dx = rstd g + (P + 2 (x - mean) U) / size (+ what is added), partial sums of dw = dy xhat and
 *           db = dy, one row a tile; dmean_in = n (P_0 - 2 U_0 (mean_0 - mean_in)), dvar_in = n U_0, n the
 *           steps before
 * launch:   grid (tiles ceil(G / GROUPS) B), block 256: as the forward, the last tile first
 * traffic:  (3 + adds) B T D sizeof(T) + 8 B T G bytes, x and dy a second time from the caches
 * needs:    VEC wants D/G, gaps and pointers in multiples of VEC elements; VEC 1 takes anything; empty slots;
 *           dx may be dy or, without a gap, what is added
 * numerics: Accum is double for float; between tiles double; fixed order: deterministic */
template <typename T, int VEC, int GROUPS>
__global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS<T>)
    timestepnorm_backward_kernel(TimestepBackward<T> p, const T *__restrict__ x, TimestepShape shape) {
    using A = Accum<T>;
    /* shares: dm / k and dv / k, then their scan, then P / size and 2 U / size; moments: mean and rstd */
    __shared__ TilePairs<A, GROUPS> shares;
    __shared__ TilePairs<float, GROUPS> moments;
    __shared__ Learned<GROUPS> learned;
    __shared__ Slot after[GROUPS];
    __shared__ AddsAhead<T, VEC> adds;
    Tile<GROUPS> tile(shape, true);
    own_shares<VEC>(shares, moments, p, x, tile, shape);
    __syncthreads(); // every step's own share is there for the scans

    for (int group = (int)threadIdx.x / WARP_SIZE; group < tile.groups; group += TILE_WARPS) {
        int step = (int)threadIdx.x % WARP_SIZE;
        bool active = step < tile.steps;
        Pair<A> own = active ? shares[step][group] : Pair<A>{0, 0};
        if (active) own.x -= 2 * own.y * (A)(moments[step][group].x - moments[0][group].x);
#pragma unroll
        for (int distance = 1; distance < WARP_SIZE; distance *= 2) {
            A p_later = __shfl_down_sync(FULL_MASK, own.x, distance),
              u_later = __shfl_down_sync(FULL_MASK, own.y, distance);
            if (step + distance < WARP_SIZE) own.x += p_later, own.y += u_later;
        }
        if (active)
            shares[step][group] = own; // P seen from the tile's first mean, and U, of this tile alone
        if (step == 0 && tile.index > 0)
            tell(p.slots.tile(shape, tile.b, tile.index, tile.first_group + group), own.x, own.y);
    }
    __syncthreads(); // the scans are done

    Sweep sweep(tile.groups * shape.size, VEC);
    if (sweep.group < sweep.groups)
        adds.begin(p, sweep, tile.b * shape.steps + tile.first_step, tile.steps,
                   tile.first_group * shape.size + sweep.lane * VEC, shape.D);

    int span = tile.order / SPAN_TILES, later = tile.order % SPAN_TILES;
    const Slot *span_slot = p.slots.span(shape, tile.b, span, tile.first_group + (int)threadIdx.x);
    Asked asked = {SLOT_EMPTY, SLOT_EMPTY};
    if (span && (int)threadIdx.x < tile.groups) asked = ask(span_slot);
    const float *means = p.mean + (int64_t)tile.b * shape.steps * shape.G + tile.first_group;
    /* How far another tile's first mean is from this one's. */
    auto mean_distance = [&](int index, int group) {
        return (double)means[(int64_t)index * TILE_STEPS * shape.G + group] - (double)moments[0][group].x;
    };
    if (later)
        learn(
            learned, p.slots, shape, tile, tile.index + 1, later,
            [&](int other) { return mean_distance(other, (int)threadIdx.x % GROUPS); },
            [](Slot part, double seen_from) { return Slot{part.x - 2 * part.y * seen_from, part.y}; });
    if ((int)threadIdx.x < tile.groups) {
        int group = (int)threadIdx.x, g = tile.first_group + group, bg = tile.b * shape.G + g;
        Slot all = later ? all_learned(learned, group) : Slot{0, 0};
        if (span) {
            double seen_from = mean_distance(tile.index + later + 1, group); // the first tile after this span
            Slot rest = await(asked, span_slot);
            all.x += rest.x - 2 * rest.y * seen_from, all.y += rest.y;
        }
        after[group] = all;
        all.x += shares[0][group].x, all.y += shares[0][group].y;
        if (tile.index > 0 && later == SPAN_TILES - 1)
            tell(p.slots.span(shape, tile.b, span + 1, g), all.x, all.y);
        if (tile.index == 0 && p.dmean_in) {
            double n = p.mean_in ? (double)p.count[tile.b] : 0, mean_in = p.mean_in ? p.mean_in[bg] : 0;
            p.dmean_in[bg] = n * (all.x - 2 * all.y * ((double)moments[0][group].x - mean_in));
            p.dvar_in[bg] = n * all.y;
        }
    }
    __syncthreads(); // every group knows what comes after, and the first step's share has been read

    for (int unit = (int)threadIdx.x; unit < TILE_STEPS * GROUPS; unit += TILE_THREADS) {
        int step = unit / GROUPS, group = unit % GROUPS;
        if (step >= tile.steps || group >= tile.groups) continue;
        Pair<A> own = shares[step][group];
        double u_all = after[group].y + (double)own.y, p_all = after[group].x + (double)own.x;
        p_all += 2 * u_all * (double)(moments[step][group].x - moments[0][group].x);
        shares[step][group] = Pair<A>{(A)p_all / (A)shape.size, 2 * (A)u_all / (A)shape.size};
    }
    __syncthreads(); // P and U of every step and group are there
    tile_gradients<VEC>(shares, moments, adds, p, x, tile, shape);
}

/* dx = gradient of x + add1 + add2 (B,T,D; NULL: nothing to add); dx may be dy, add1 or, without a gap, add2.
 * dmean_in, dvar_in (B,G) double, NULL: not wanted; dweight, dbias (D) added to, NULL: none; dmean_out,
 * dvar_out NULL: zero. The two sums wait for add_sums. add2_gap: the numbers between rows of add2. */
template <typename T>
static void timestepnorm_backward(Context *context, T *dx, double *dmean_in, double *dvar_in, float *dweight,
                                  float *dbias, const T *dy, const double *dmean_out, const double *dvar_out,
                                  const T *add1, const T *add2, const float *mean, const float *var,
                                  const T *x, const int64_t *count, const double *mean_in, const T *weight,
                                  int64_t B, int64_t steps, int64_t D, int64_t G, float eps,
                                  int add2_gap = 0) {
    ScratchScope scope(context);
    int groups = backward_groups(D / G);
    TimestepShape shape = timestep_shape(B, steps, D, G, eps, groups);
    Slots slots = take_slots(context, shape);
    int64_t partials = B * shape.num_tiles;
    float *partial_w = take_sum(context, dweight, partials, D),
          *partial_b = take_sum(context, dbias, partials, D);
    TimestepBackward<T> p = {dx, dmean_in, dvar_in, partial_w, partial_b, slots, dy, dmean_out, dvar_out,
                             {add1, add2}, {0, add2_gap}, mean, var, count, mean_in, weight};
    WITH_WIDTH(T, vector_width<T>(D / G | add2_gap, dx, dy, add1, add2, x, weight),
               WITH_GROUPS(16, groups, {
                   fit_cache(context, timestepnorm_backward_kernel<T, VEC, GROUPS>, TILE_BLOCKS<T>);
                   LAUNCH((timestepnorm_backward_kernel<T, VEC, GROUPS>), tile_blocks(shape), TILE_THREADS,
                          context, p, x, shape);
               }));
}

#endif
