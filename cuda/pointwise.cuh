/* pointwise.cuh - embedding, gates, residuals, dropout and the loss: work that is bounded by the bytes it
 * moves. Each component is here on its own, and beside it the fused form that the model runs.
 */
#ifndef CUDA_POINTWISE_CUH
#define CUDA_POINTWISE_CUH

#include "common.cuh"

enum { POINT_THREADS = 256 };

enum { GATE_BLOCKS = 4 }; /* of the gates' backward on a multiprocessor, with SWEEP_THREADS threads */

/* ----------------------------------------------------------------------------------------------------------
 * Embedding: out = scale weight[token], then dropout.
 */

/* computes: out[row, d] = keep scale weight[tokens[row], d]
 * launch:   grid ceil(rows D / (256 VEC)), block 256: a thread owns VEC elements
 * traffic:  2 rows D sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants D and pointers in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float */
template <typename T, int VEC>
__global__ void embedding_forward_kernel(T *out, const int32_t *tokens, const T *weight, int64_t count,
                                         int D, float scale, Dropout dropout) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (at >= count) return;
    float value[VEC];
    load<VEC>(value, weight + (int64_t)tokens[at / D] * D + at % D);
#pragma unroll
    for (int i = 0; i < VEC; i++) value[i] *= scale * keep_scale(dropout, (uint64_t)(at + i));
    store<VEC>(out + at, value);
}

/* out (rows,D), tokens (rows), weight (V,D) */
template <typename T>
static void embedding_forward(Context *context, T *out, const int32_t *tokens, const T *weight, float scale,
                              int64_t rows, int64_t D, Dropout dropout) {
    WITH_VEC(T, vectorises<T>(D, out, weight),
             LAUNCH((embedding_forward_kernel<T, VEC>), blocks_for(rows * D, POINT_THREADS * VEC),
                    POINT_THREADS, context, out, tokens, weight, rows * D, (int)D, scale, dropout));
}

/* The rows of a batch sorted by token, cut into segments of at most SEGMENT_ROWS rows of one token: so the
 * gradient of a vocabulary row is a sum in a fixed order, and a token that fills half the batch is still
 * shared out over many blocks. Segments of a token that has several go to rows of partial sums first. Built
 * on the host, which has the tokens. */
enum { SEGMENT_ROWS = 64 };
struct Segment {
    int32_t token, start, length,
        partial; /* partial: row of the partial sums, or -1: the token's only segment */
};
struct SegmentGroup {
    int32_t token, first_partial, count; /* a token with several segments */
};
struct EmbeddingPlan {
    int32_t *order; /* (rows) rows sorted by token */
    Segment *segments;
    SegmentGroup *groups;
    int num_segments, num_groups, num_partials;
};

static inline int64_t max_segments(int64_t rows, int64_t V) {
    return (rows < V ? rows : V) + rows / SEGMENT_ROWS + 1;
}
static inline int64_t max_partials(int64_t rows) { return 2 * (rows / SEGMENT_ROWS) + 1; }

/* Fills a plan whose arrays have room for `rows`, max_segments and max_partials entries. counts: V numbers
 * to work in. */
static inline void plan_embedding(EmbeddingPlan *plan, const int32_t *tokens, int64_t rows, int64_t V,
                                  int32_t *counts) {
    for (int64_t v = 0; v < V; v++) counts[v] = 0;
    for (int64_t i = 0; i < rows; i++) counts[tokens[i]]++;
    plan->num_segments = plan->num_groups = plan->num_partials = 0;
    int32_t start = 0;
    for (int64_t v = 0; v < V; v++) {
        int32_t count = counts[v], pieces = (int32_t)ceil_div(count, SEGMENT_ROWS);
        counts[v] = start; // from here on: where the token's next row goes
        if (pieces > 1)
            plan->groups[plan->num_groups++] = SegmentGroup{(int32_t)v, plan->num_partials, pieces};
        for (int32_t i = 0; i < pieces; i++) {
            int32_t left = count - i * SEGMENT_ROWS, length = left < SEGMENT_ROWS ? left : SEGMENT_ROWS;
            plan->segments[plan->num_segments++] = Segment{(int32_t)v, start + i * SEGMENT_ROWS, length,
                                                           pieces > 1 ? plan->num_partials++ : -1};
        }
        start += count;
    }
    for (int64_t i = 0; i < rows; i++) plan->order[counts[tokens[i]]++] = (int32_t)i;
}

/* out = keep scale weight[token]:  dweight[token] += scale sum over the token's rows of keep dout
 * computes: one segment's sum, added to dweight or put into its row of partial sums
 * launch:   grid segments, block 256: threads own columns in vectors and walk down the segment's rows
 * traffic:  rows D sizeof(T) bytes read, 8 bytes times D for each token in use
 * needs:    VEC 16 / sizeof(T) wants D and pointers in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float, the rows in order: deterministic */
template <typename T, int VEC>
__global__ void embedding_backward_kernel(float *dweight, float *partial, const T *dout, EmbeddingPlan plan,
                                          int D, float scale, Dropout dropout) {
    Segment segment = plan.segments[blockIdx.x];
    for (int c = (int)threadIdx.x * VEC; c < D; c += (int)blockDim.x * VEC) {
        float sum[VEC] = {}, value[VEC];
        for (int i = 0; i < segment.length; i++) {
            int64_t at = (int64_t)plan.order[segment.start + i] * D + c;
            load<VEC>(value, dout + at);
#pragma unroll
            for (int j = 0; j < VEC; j++) sum[j] += value[j] * keep_scale(dropout, (uint64_t)(at + j));
        }
#pragma unroll
        for (int j = 0; j < VEC; j++) {
            if (segment.partial < 0)
                dweight[(int64_t)segment.token * D + c + j] += scale * sum[j];
            else
                partial[(int64_t)segment.partial * D + c + j] = scale * sum[j];
        }
    }
}

/* computes: dweight[token] += sum of the token's rows of partial sums
 * launch:   grid (groups, ceil(D / 256)), block 256: a thread owns a column
 * traffic:  4 partials D bytes
 * needs:    nothing
 * numerics: float, in order: deterministic */
__global__ static void embedding_groups_kernel(float *dweight, const float *partial,
                                               const SegmentGroup *groups, int D) {
    SegmentGroup group = groups[blockIdx.x];
    int c = (int)(blockIdx.y * blockDim.x + threadIdx.x);
    if (c >= D) return;
    float sum = 0;
    for (int i = 0; i < group.count; i++) sum += partial[(int64_t)(group.first_partial + i) * D + c];
    dweight[(int64_t)group.token * D + c] += sum;
}

/* dweight (V,D) added to; dout (rows,D); the plan's arrays are on the device */
template <typename T>
static void embedding_backward(Context *context, float *dweight, const T *dout, EmbeddingPlan plan,
                               float scale, int64_t rows, int64_t D, Dropout dropout) {
    ScratchScope scope(context);
    float *partial = take<float>(context, max_partials(rows) * D);
    WITH_VEC(T, vectorises<T>(D, dout),
             LAUNCH((embedding_backward_kernel<T, VEC>), (unsigned)plan.num_segments, POINT_THREADS, context,
                    dweight, partial, dout, plan, (int)D, scale, dropout));
    if (plan.num_groups)
        LAUNCH(embedding_groups_kernel, dim3((unsigned)plan.num_groups, blocks_for(D, POINT_THREADS)),
               POINT_THREADS, context, dweight, partial, plan.groups, (int)D);
}

/* ----------------------------------------------------------------------------------------------------------
 * SiLU, gate, SwiGLU
 */

/* computes: y = keep silu(x) (a, if given);  r = silu(x) too, if wanted
 * launch:   grid ceil(count / (256 VEC)), block 256: a thread owns VEC elements
 * traffic:  (2 or 3) count sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants count and pointers in multiples of 16 bytes; VEC 1 takes anything; y
 *           may be x or a
 * numerics: float */
template <typename T, int VEC>
__global__ void silu_gate_kernel(T *y, T *r, const T *x, const T *a, int64_t count, Dropout dropout) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (at >= count) return;
    float value[VEC], other[VEC];
    load<VEC>(value, x + at);
#pragma unroll
    for (int i = 0; i < VEC; i++) value[i] = silu(value[i]);
    if (r) store<VEC>(r + at, value);
    if (a) {
        load<VEC>(other, a + at);
#pragma unroll
        for (int i = 0; i < VEC; i++) value[i] *= other[i];
    }
    drop<VEC>(value, dropout, at);
    store<VEC>(y + at, value);
}

template <typename T>
static void silu_gate(Context *context, T *y, T *r, const T *x, const T *a, int64_t count, Dropout dropout) {
    WITH_VEC(T, vectorises<T>(count, y, r, x, a),
             LAUNCH((silu_gate_kernel<T, VEC>), blocks_for(count, POINT_THREADS * VEC), POINT_THREADS,
                    context, y, r, x, a, count, dropout));
}
/* y = silu(x) */
template <typename T> static void silu_forward(Context *context, T *y, const T *x, int64_t count) {
    silu_gate(context, y, (T *)nullptr, x, (const T *)nullptr, count, no_dropout());
}
/* ar = dropout(a silu(rr)); r (NULL: not wanted) = silu(rr) */
template <typename T>
static void silu_gate_forward(Context *context, T *ar, T *r, const T *a, const T *rr, int64_t count,
                              Dropout dropout) {
    silu_gate(context, ar, r, rr, a, count, dropout);
}
/* hidden = dropout(silu(f1) f3); f3 NULL: without it */
template <typename T>
static void swiglu_forward(Context *context, T *hidden, const T *f1, const T *f3, int64_t count,
                           Dropout dropout) {
    silu_gate(context, hidden, (T *)nullptr, f1, f3, count, dropout);
}

/* y = keep silu(x) a:  dx = keep dy a silu'(x);  da = keep dy silu(x)
 * computes: dx, da and, if wanted, y once more and partial sums of dx over rows
 * launch:   grid at least rows / share (see gate_blocks), block 256: a thread owns columns in vectors and
 *           walks down `share` rows (see Sweep)
 * traffic:  up to 6 rows columns sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants columns, gaps and pointers in multiples of 16 bytes; VEC 1 takes
 *           anything; a NULL: as if 1, with da NULL; dx or da may be dy, with the same gap
 * numerics: float sums in a fixed order: deterministic */
template <typename T, int VEC, bool DROPS>
__global__ void __launch_bounds__(SWEEP_THREADS, GATE_BLOCKS)
    silu_gate_backward_kernel(T *dx, T *da, T *y, float *partial, const T *dy, const T *x, const T *a,
                              int rows, int columns, int share, Dropout dropout, Gaps gaps) {
    __shared__ SweepSums<VEC> shared;
    Sweep sweep(columns, VEC);
    int first = (int)blockIdx.x * share, last = min(first + share, rows);
    int64_t stride = (int64_t)sweep.groups * columns;
    float *out = partial + (int64_t)blockIdx.x * columns, sum[VEC] = {};
    for (int c = sweep.lane * VEC; sweep.group < sweep.groups && c < columns; c += sweep.lanes * VEC) {
        int row = first + sweep.group;
        int64_t at = (int64_t)row * columns + c;
        /* The results may lie over the inputs, so the compiler may not move the next row's loads up: they
         * are asked for here before this row's results are written. */
        Packed<T, VEC> value, grad, other, next_value, next_grad, next_other;
#pragma unroll
        for (int i = 0; i < VEC; i++) next_other.v[i] = from_float<T>(1.0f), sum[i] = 0;
        if (row < last) {
            next_value = packed<VEC>(x + at), next_grad = packed<VEC>(dy + at + (int64_t)row * gaps.dy);
            if (a) next_other = packed<VEC>(a + at);
        }
        for (; row < last; row += sweep.groups, at += stride) {
            value = next_value, grad = next_grad, other = next_other;
            int next = row + sweep.groups;
            if (next < last) {
                next_value = packed<VEC>(x + at + stride);
                next_grad = packed<VEC>(dy + at + stride + (int64_t)next * gaps.dy);
                if (a) next_other = packed<VEC>(a + at + stride);
            }
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float keep = DROPS ? keep_scale(dropout, (uint64_t)(at + i)) : 1.0f;
                float v = to_float(value.v[i]), s = sigmoid(v), kept = keep * to_float(grad.v[i]),
                      factor = to_float(other.v[i]), dv = kept * factor * s * (1.0f + v * (1.0f - s));
                sum[i] += dv;
                grad.v[i] = from_float<T>(dv);
                value.v[i] = from_float<T>(kept * v * s);
                other.v[i] = from_float<T>(v * s * factor * keep); // in the order of the forward
            }
            *reinterpret_cast<Packed<T, VEC> *>(dx + at + (int64_t)row * gaps.dx) = grad;
            if (da) *reinterpret_cast<Packed<T, VEC> *>(da + at + (int64_t)row * gaps.da) = value;
            if (y) *reinterpret_cast<Packed<T, VEC> *>(y + at) = other;
        }
        if (partial && sweep.groups == 1) store<VEC>(out + c, sum);
    }
    if (partial && sweep.groups > 1) sweep_row<VEC>(out, sweep, columns, sum, shared);
}

/* Blocks of the gates' backward for about SWEEP_ROWS rows each: so many that they fill the device a whole
 * number of times, or what there is for less than half of one time. Never fewer for more rows, which a dry
 * run of the largest batch counts on. */
static inline int64_t gate_blocks(const Context *context, int64_t rows, unsigned threads) {
    int64_t slots = (int64_t)context->num_sms * (GATE_BLOCKS * SWEEP_THREADS / threads);
    int64_t waves = (rows + slots * SWEEP_ROWS / 2) / (slots * SWEEP_ROWS);
    return waves > 0 ? waves * slots : (int64_t)sweep_blocks(rows);
}

/* dbias (columns; NULL: none) += column sums of dx, with the next add_sums; y (NULL: not wanted) is the
 * forward's result once more */
template <typename T>
static void silu_gate_backward(Context *context, T *dx, T *da, T *y, float *dbias, const T *dy, const T *x,
                               const T *a, int64_t rows, int64_t columns, Dropout dropout, Gaps gaps = {}) {
    int all_gaps = gaps.dx | gaps.dy | gaps.da;
    WITH_VEC(T, vectorises<T>(columns | all_gaps, dx, da, y, dy, x, a), {
        int64_t blocks = gate_blocks(context, rows, sweep_threads(columns, VEC));
        int64_t share = ceil_div(rows, blocks);
        float *partial = take_sum(context, dbias, blocks, columns);
        /* Without sums the columns do not matter, and rows of just the right width keep every thread busy. */
        int64_t width = SWEEP_THREADS * VEC;
        if (!dbias && !all_gaps && rows * columns % width == 0)
            rows = blocks = rows * columns / width, columns = width, share = 1;
        if (dropout.threshold)
            LAUNCH((silu_gate_backward_kernel<T, VEC, true>), (unsigned)blocks,
                   sweep_threads(columns, VEC), context, dx, da, y, partial, dy, x, a, (int)rows,
                   (int)columns, (int)share, dropout, gaps);
        else
            LAUNCH((silu_gate_backward_kernel<T, VEC, false>), (unsigned)blocks,
                   sweep_threads(columns, VEC), context, dx, da, y, partial, dy, x, a, (int)rows,
                   (int)columns, (int)share, dropout, gaps);
    });
}
template <typename T>
static void silu_backward(Context *context, T *dx, float *dbias, const T *dy, const T *x, int64_t rows,
                          int64_t columns) {
    silu_gate_backward(context, dx, (T *)nullptr, (T *)nullptr, dbias, dy, x, (const T *)nullptr, rows,
                       columns, no_dropout());
}
/* df1 may be dhidden; hidden (NULL: not wanted) is recomputed; f3, df3 NULL: plain SiLU */
template <typename T>
static void swiglu_backward(Context *context, T *df1, T *df3, T *hidden, const T *dhidden, const T *f1,
                            const T *f3, int64_t rows, int64_t columns, Dropout dropout) {
    silu_gate_backward(context, df1, df3, hidden, (float *)nullptr, dhidden, f1, f3, rows, columns, dropout);
}

/* computes: y = a r, or with dy: da = dy r, dr = dy a
 * launch:   grid ceil(count / 256), block 256: a thread owns an element
 * traffic:  3 or 5 count sizeof(T) bytes
 * needs:    nothing; the model runs the fused silu_gate kernels instead
 * numerics: float */
template <typename T> __global__ void gate_forward_kernel(T *y, const T *a, const T *r, int64_t count) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = from_float<T>(to_float(a[i]) * to_float(r[i]));
}
template <typename T>
__global__ void gate_backward_kernel(T *da, T *dr, const T *dy, const T *a, const T *r, int64_t count) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float grad = to_float(dy[i]), left = to_float(a[i]), right = to_float(r[i]);
    da[i] = from_float<T>(grad * right);
    dr[i] = from_float<T>(grad * left);
}
template <typename T>
static void gate_forward(Context *context, T *y, const T *a, const T *r, int64_t count) {
    LAUNCH((gate_forward_kernel<T>), blocks_for(count, POINT_THREADS), POINT_THREADS, context, y, a, r,
           count);
}
template <typename T>
static void gate_backward(Context *context, T *da, T *dr, const T *dy, const T *a, const T *r,
                          int64_t count) {
    LAUNCH((gate_backward_kernel<T>), blocks_for(count, POINT_THREADS), POINT_THREADS, context, da, dr, dy,
           a, r, count);
}

/* ----------------------------------------------------------------------------------------------------------
 * Dropout, residual, rescale: out = alpha (keep f) + x.
 */

/* computes: g = keep f (written to `kept` if wanted);  out = alpha g + x, without alpha or x where they are
 * NULL
 * launch:   grid ceil(count / (256 VEC)), block 256: a thread owns VEC elements
 * traffic:  (2 + kept + x) count sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants columns, gap and pointers in multiples of 16 bytes; VEC 1 takes
 *           anything; out may be f or x, without a gap
 * numerics: float */
template <typename T, int VEC>
__global__ void residual_kernel(T *out, T *kept, const T *f, const T *x, const T *alpha, int64_t count,
                                int columns, Dropout dropout, int out_gap) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (at >= count) return;
    float value[VEC], other[VEC];
    load<VEC>(value, f + at);
#pragma unroll
    for (int i = 0; i < VEC; i++) value[i] *= keep_scale(dropout, (uint64_t)(at + i));
    if (kept) store<VEC>(kept + at, value);
    if (alpha) {
        load<VEC>(other, alpha + at % columns);
#pragma unroll
        for (int i = 0; i < VEC; i++) value[i] *= other[i];
    }
    if (x) {
        load<VEC>(other, x + at);
#pragma unroll
        for (int i = 0; i < VEC; i++) value[i] += other[i];
    }
    store<VEC>(out + at + (out_gap ? at / columns * out_gap : 0), value);
}

/* out = alpha dropout(f) + x; kept (NULL: not wanted) = dropout(f), may be f; out_gap: the numbers between
 * rows of out */
template <typename T>
static void rescale_forward(Context *context, T *out, T *kept, const T *f, const T *x, const T *alpha,
                            int64_t rows, int64_t columns, Dropout dropout, int out_gap = 0) {
    WITH_VEC(T, vectorises<T>(columns | out_gap, out, kept, f, x, alpha),
             LAUNCH((residual_kernel<T, VEC>), blocks_for(rows * columns, POINT_THREADS * VEC),
                    POINT_THREADS, context, out, kept, f, x, alpha, rows * columns, (int)columns, dropout,
                    out_gap));
}
/* y = dropout(x); also its backward, whose mask is the same; y_gap: the numbers between rows of y */
template <typename T>
static void dropout_forward(Context *context, T *y, const T *x, int64_t rows, int64_t columns,
                            Dropout dropout, int y_gap = 0) {
    rescale_forward(context, y, (T *)nullptr, x, (const T *)nullptr, (const T *)nullptr, rows, columns,
                    dropout, y_gap);
}

/* out = alpha f + x, f = keep f':  df' = keep alpha dout;  dx = dout;  dalpha += sum over rows of dout f
 * computes: df', dx (if wanted) and partial sums of dalpha
 * launch:   grid ceil(rows / 32), block 256: a thread owns columns in vectors and walks down the rows (see
 *           Sweep)
 * traffic:  up to 4 rows columns sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants columns and pointers in multiples of 16 bytes; VEC 1 takes anything;
 *           alpha NULL: as if 1
 * numerics: float sums in a fixed order: deterministic */
template <typename T, int VEC>
__global__ void rescale_backward_kernel(T *df, T *dx, float *partial, const T *dout, const T *f,
                                        const T *alpha, int rows, int columns, Dropout dropout) {
    __shared__ SweepSums<VEC> shared;
    Sweep sweep(columns, VEC);
    int first = (int)blockIdx.x * SWEEP_ROWS, last = min(first + (int)SWEEP_ROWS, rows);
    float *out = partial + (int64_t)blockIdx.x * columns, sum[VEC] = {}, grad[VEC], value[VEC], factor[VEC];
    for (int c = sweep.lane * VEC; sweep.group < sweep.groups && c < columns; c += sweep.lanes * VEC) {
#pragma unroll
        for (int i = 0; i < VEC; i++) factor[i] = 1, sum[i] = 0;
        if (alpha) load<VEC>(factor, alpha + c);
        for (int row = first + sweep.group; row < last; row += sweep.groups) {
            int64_t at = (int64_t)row * columns + c;
            load<VEC>(grad, dout + at);
            if (dx) store<VEC>(dx + at, grad);
            if (partial) {
                load<VEC>(value, f + at);
#pragma unroll
                for (int i = 0; i < VEC; i++) sum[i] += grad[i] * value[i];
            }
#pragma unroll
            for (int i = 0; i < VEC; i++) grad[i] *= factor[i] * keep_scale(dropout, (uint64_t)(at + i));
            store<VEC>(df + at, grad);
        }
        if (partial && sweep.groups == 1) store<VEC>(out + c, sum);
    }
    if (partial && sweep.groups > 1) sweep_row<VEC>(out, sweep, columns, sum, shared);
}

/* dalpha (columns; NULL: none) added to by the next add_sums; f is after dropout; dx (NULL: not wanted) */
template <typename T>
static void rescale_backward(Context *context, T *df, T *dx, float *dalpha, const T *dout, const T *f,
                             const T *alpha, int64_t rows, int64_t columns, Dropout dropout) {
    float *partial = take_sum(context, dalpha, sweep_blocks(rows), columns);
    WITH_VEC(T, vectorises<T>(columns, df, dx, dout, f, alpha),
             LAUNCH((rescale_backward_kernel<T, VEC>), sweep_blocks(rows), sweep_threads(columns, VEC),
                    context, df, dx, partial, dout, f, alpha, (int)rows, (int)columns, dropout));
}

/* ----------------------------------------------------------------------------------------------------------
 * Cross-entropy: nll = -log softmax(logits)[target], 0 where the target is MEGALODON_IGNORE.
 */

/* log sum exp of a row, by the whole block: each thread keeps a maximum and a sum relative to it. */
template <typename T, int VEC> __device__ inline float row_lse(const T *row, int V, float *shared) {
    float largest = -INFINITY, sum = 0, value[VEC];
    for (int v = (int)threadIdx.x * VEC; v < V; v += (int)blockDim.x * VEC) {
        load<VEC>(value, row + v);
        float here = value[0];
#pragma unroll
        for (int i = 1; i < VEC; i++) here = fmaxf(here, value[i]);
        if (here > largest) {
            sum *= __expf(largest - here); // exp(-inf) is 0 the first time
            largest = here;
        }
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += __expf(value[i] - largest);
    }
    float top = block_max(largest, shared);
    float total = block_sum(largest == -INFINITY ? 0.0f : sum * __expf(largest - top), shared);
    return top + logf(total);
}

/* computes: lse[row] = log sum exp logits[row], nll[row] = lse - logits[row, target]
 * launch:   grid rows, block 256: a block owns a row
 * traffic:  rows V sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants V and pointers in multiples of 16 bytes; VEC 1 takes anything; lse
 *           NULL: not wanted
 * numerics: float, fixed order: deterministic */
template <typename T, int VEC>
__global__ void cross_entropy_forward_kernel(float *nll, float *lse, const T *logits, const int32_t *targets,
                                             int V) {
    __shared__ float shared[POINT_THREADS / WARP_SIZE];
    const T *row = logits + (int64_t)blockIdx.x * V;
    int target = targets[blockIdx.x];
    float value = row_lse<T, VEC>(row, V, shared);
    if (threadIdx.x != 0) return;
    nll[blockIdx.x] = target == MEGALODON_IGNORE ? 0.0f : value - to_float(row[target]);
    if (lse) lse[blockIdx.x] = value;
}

/* nll, lse (rows); logits (rows,V); targets (rows) */
template <typename T>
static void cross_entropy_forward(Context *context, float *nll, float *lse, const T *logits,
                                  const int32_t *targets, int64_t rows, int64_t V) {
    WITH_VEC(T, vectorises<T>(V, logits),
             LAUNCH((cross_entropy_forward_kernel<T, VEC>), (unsigned)rows, POINT_THREADS, context, nll, lse,
                    logits, targets, (int)V));
}

/* computes: dlogits[row, v] = g (exp(logits[row, v] - lse[row]) - (v == target)), g = dnll[row] or scale; 0
 * where ignored
 * launch:   grid rows, block 256: a block owns a row
 * traffic:  2 rows V sizeof(T) bytes, 3 without lse
 * needs:    VEC as in the forward; lse NULL: computed again; dnll NULL: scale for every row; dlogits may be
 *           logits
 * numerics: float */
template <typename T, int VEC>
__global__ void cross_entropy_backward_kernel(T *dlogits, const float *dnll, float scale, const T *logits,
                                              const float *lse, const int32_t *targets, int V) {
    __shared__ float shared[POINT_THREADS / WARP_SIZE];
    const T *row = logits + (int64_t)blockIdx.x * V;
    T *drow = dlogits + (int64_t)blockIdx.x * V;
    int target = targets[blockIdx.x];
    bool ignored = target == MEGALODON_IGNORE; // the same for the whole block
    float g = ignored ? 0.0f : dnll ? dnll[blockIdx.x] : scale;
    float shift = ignored ? 0.0f : lse ? lse[blockIdx.x] : row_lse<T, VEC>(row, V, shared), value[VEC];
    for (int v = (int)threadIdx.x * VEC; v < V; v += (int)blockDim.x * VEC) {
        load<VEC>(value, row + v);
#pragma unroll
        for (int i = 0; i < VEC; i++)
            value[i] = ignored ? 0.0f : g * (__expf(value[i] - shift) - (v + i == target ? 1.0f : 0.0f));
        store<VEC>(drow + v, value);
    }
}

template <typename T>
static void cross_entropy_backward(Context *context, T *dlogits, const float *dnll, float scale,
                                   const T *logits, const float *lse, const int32_t *targets, int64_t rows,
                                   int64_t V) {
    WITH_VEC(T, vectorises<T>(V, logits, dlogits),
             LAUNCH((cross_entropy_backward_kernel<T, VEC>), (unsigned)rows, POINT_THREADS, context, dlogits,
                    dnll, scale, logits, lse, targets, (int)V));
}

enum { SUM_THREADS = 1024 };

/* computes: out[0] = sum of x[i]
 * launch:   one block of 1024: a thread adds every 1024th
 * traffic:  4 count bytes
 * needs:    nothing
 * numerics: double, fixed order: deterministic */
__global__ static void sum_kernel(double *out, const float *x, int64_t count) {
    __shared__ double shared[SUM_THREADS / WARP_SIZE];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += SUM_THREADS) sum += x[i];
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) out[0] = sum;
}

#endif
