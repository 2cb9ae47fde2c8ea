/* attention.cuh - chunked causal attention: a = softmax(q k^T + mask) v, the mask leaving the keys of the
 * same chunk that are not in the future.
 *
 * Values are wide (e is 2048 where z is 256), so the two products with v are large matrix products, at home
 * in cuBLAS. A chunk's queries are taken a quarter at a time, each against the keys up to its own end: of
 * the scores above the diagonal only those inside a quarter are computed. Scores exist for a few chunks at a
 * time, in scratch memory.
 *
 * Chunks that lie regularly in memory form a span, whose products are batched:
 *     n > 0:  the rest of the chunk that the state began  |  whole chunks  |  the beginning of the last chunk
 * Only the first has keys in the state; those and its new keys are copied side by side.
 */
#ifndef CUDA_ATTENTION_CUH
#define CUDA_ATTENTION_CUH

#include "matmul.cuh"

constexpr size_t SCORE_BYTES = (size_t)256 << 20; /* about how much scratch the scores may take */
enum { SMALLEST_QUERY_BLOCK = 128, SOFTMAX_THREADS = 128, SCORE_VEC = 4 };

/* Where the keys and values of a call come from: n tokens of the chunk in the state, `capacity` rows of
 * memory for each row of the batch, and this call's steps tokens. k (B,T,H,z), v (B,T,H,e), k_in
 * (B,capacity,H,z), v_in (B,capacity,H,e). */
template <typename T> struct AttentionKeys {
    const T *k, *v, *k_in, *v_in;
    int64_t n, capacity, B, steps, H, z, e, C;
};

/* `items` chunks, or parts of chunks, `stride` tokens apart, of `queries` tokens after `old` tokens of the
 * state. Rows are tokens of all batch rows, counted through: b T + t. */
struct Span {
    int64_t row, stride, items, queries, old;
};

template <typename F> static void for_each_span(int64_t B, int64_t steps, int64_t n, int64_t C, F &&f) {
    int64_t begun = n > 0 ? (steps < C - n ? steps : C - n) : 0, whole = (steps - begun) / C;
    int64_t tail = steps - begun - whole * C;
    if (begun) f(Span{0, steps, B, begun, n});
    if (whole && whole * C == steps)
        f(Span{0, C, B * whole, C, 0});
    else if (whole >= B)
        for (int64_t b = 0; b < B; b++) f(Span{b * steps + begun, C, whole, C, 0});
    else
        for (int64_t w = 0; w < whole; w++) f(Span{begun + w * C, steps, B, C, 0});
    if (tail) f(Span{steps - tail, steps, B, tail, 0});
}

/* Bytes of one chunk's scores: `blocks` float matrices of a query block, `wholes` matrices of T of the whole
 * chunk. */
struct ScoreShape {
    int64_t queries, block, columns; /* of one item; columns are rounded up so that rows stay aligned */
    size_t block_bytes, whole_bytes;
};
template <typename T> static ScoreShape score_shape(int64_t queries, int64_t keys, int64_t C) {
    ScoreShape s;
    int64_t quarter = ceil_div(C, 4);
    s.queries = queries;
    s.block = quarter > SMALLEST_QUERY_BLOCK ? quarter : SMALLEST_QUERY_BLOCK;
    if (s.block > queries) s.block = queries;
    s.columns = ceil_div(keys, 8) * 8;
    s.block_bytes = (size_t)(s.block * s.columns) * sizeof(float);
    s.whole_bytes = (size_t)(s.queries * s.columns) * sizeof(T);
    return s;
}

/* Scratch for the scores of any span of a call no larger than this one: grows with B, T and n > 0, nothing
 * else. */
template <typename T> static size_t score_scratch(const AttentionKeys<T> &a, int blocks, int wholes) {
    int64_t queries = a.steps < a.C ? a.steps : a.C, keys = a.n > 0 ? a.C : queries;
    ScoreShape s = score_shape<T>(queries, keys, a.C);
    size_t item = (size_t)blocks * s.block_bytes + (size_t)wholes * s.whole_bytes + SCRATCH_ALIGN;
    size_t all = (size_t)(a.B * (a.steps / a.C + 1)) * item;
    size_t limit = item > SCORE_BYTES ? item : SCORE_BYTES;
    return all < limit ? all : limit;
}

/* What a softmax kernel knows about its rows. */
struct SoftmaxRows {
    int64_t row, stride;      /* token of the first item's first query of this block; tokens between items */
    int first_query, queries; /* of the block, counted from the span's first query */
    int old, columns, pitch;  /* keys of the state; keys in use; distance between rows of scores */
    int64_t whole_batch;      /* distance between items in the matrices of whole chunks */
    int steps, H, h, C;
    Dropout dropout;
};

/* The place of an element among all attention weights, which decides whether dropout takes it. */
__device__ inline uint64_t weight_index(const SoftmaxRows &s, int64_t row, int key) {
    return (uint64_t)(((row / s.steps * s.H + s.h) * s.steps + row % s.steps) * s.C + key);
}

/* The next scores of a row of which `seen` more count. The others are not read, behind a row's end nothing
 * was written; `otherwise` stands for them. */
__device__ inline void load_scores(float (&to)[SCORE_VEC], const float *from, int seen, float otherwise) {
    if (seen >= SCORE_VEC) {
        load<SCORE_VEC>(to, from);
        return;
    }
#pragma unroll
    for (int i = 0; i < SCORE_VEC; i++) to[i] = i < seen ? from[i] : otherwise;
}

/* The dropout factors of weights from key `key` on. */
__device__ inline void keep_weights(float (&keep)[SCORE_VEC], const SoftmaxRows &s, int64_t row, int key) {
#pragma unroll
    for (int i = 0; i < SCORE_VEC; i++) keep[i] = 1.0f;
    if (s.dropout.threshold) keep_scales<SCORE_VEC>(keep, s.dropout, (int64_t)weight_index(s, row, key));
}

/* computes: weights = keep softmax(scores) over the keys that a query may see, 0 for the others; lse
 * launch:   grid (queries of the block, items), block 128: a block owns a row of scores
 * traffic:  (4 + sizeof(T)) bytes a score; the second reading comes from the cache
 * needs:    rows of scores and weights start at multiples of 8 elements
 * numerics: float, fixed order: deterministic */
template <typename T>
__global__ void softmax_forward_kernel(T *weights, float *lse, const float *scores, SoftmaxRows s) {
    __shared__ float shared[SOFTMAX_THREADS / WARP_SIZE];
    int query = (int)blockIdx.x, item = (int)blockIdx.y, seen = s.old + s.first_query + query + 1;
    int64_t at = ((int64_t)item * s.queries + query) * s.pitch, row = s.row + item * s.stride + query;
    float largest = -INFINITY, sum = 0, value[SCORE_VEC], keep[SCORE_VEC];
    for (int j = (int)threadIdx.x * SCORE_VEC; j < seen; j += SOFTMAX_THREADS * SCORE_VEC) {
        load_scores(value, scores + at + j, seen - j, -INFINITY);
        float here = value[0]; // j < seen
#pragma unroll
        for (int i = 1; i < SCORE_VEC; i++) here = fmaxf(here, value[i]);
        if (here > largest) {
            sum *= __expf(largest - here);
            largest = here;
        }
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) sum += __expf(value[i] - largest); // exp(-inf) is 0
    }
    float top = block_max(largest, shared);
    float total = block_sum(largest == -INFINITY ? 0.0f : sum * __expf(largest - top), shared),
          scale = 1.0f / total;
    for (int j = (int)threadIdx.x * SCORE_VEC; j < s.columns; j += SOFTMAX_THREADS * SCORE_VEC) {
        load_scores(value, scores + at + j, seen - j, -INFINITY);
        keep_weights(keep, s, row, j);
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) value[i] = __expf(value[i] - top) * scale * keep[i];
        store<SCORE_VEC>(weights + at + j, value);
    }
    if (threadIdx.x == 0) lse[row * s.H + s.h] = top + logf(total);
}

/* with w = exp(score - lse), f the dropout factors and dw = f (da v^T):  dscore = w (dw - sum w dw);
 * weights = w f computes: dscores and, for dv, the weights again, into the matrices of whole chunks
 * launch:   grid (queries of the block, items), block 128: a block owns a row of scores
 * traffic:  (8 + 2 sizeof(T)) bytes a score; the second reading comes from the cache
 * needs:    rows start at multiples of 8 elements
 * numerics: float, fixed order: deterministic */
template <typename T>
__global__ void softmax_backward_kernel(T *dscores, T *weights, const float *scores, const float *dweights,
                                        const float *lse, SoftmaxRows s) {
    __shared__ float shared[SOFTMAX_THREADS / WARP_SIZE];
    int query = (int)blockIdx.x, item = (int)blockIdx.y, seen = s.old + s.first_query + query + 1;
    int64_t at = ((int64_t)item * s.queries + query) * s.pitch, row = s.row + item * s.stride + query;
    int64_t to = item * s.whole_batch + (int64_t)(s.first_query + query) * s.pitch;
    float row_lse = lse[row * s.H + s.h], sum = 0, value[SCORE_VEC], grad[SCORE_VEC], keep[SCORE_VEC];
    for (int j = (int)threadIdx.x * SCORE_VEC; j < seen; j += SOFTMAX_THREADS * SCORE_VEC) {
        load_scores(value, scores + at + j, seen - j, -INFINITY);
        load_scores(grad, dweights + at + j, seen - j, 0.0f);
        keep_weights(keep, s, row, j);
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) sum += __expf(value[i] - row_lse) * grad[i] * keep[i];
    }
    sum = block_sum(sum, shared);
    for (int j = (int)threadIdx.x * SCORE_VEC; j < s.columns; j += SOFTMAX_THREADS * SCORE_VEC) {
        load_scores(value, scores + at + j, seen - j, -INFINITY);
        load_scores(grad, dweights + at + j, seen - j, 0.0f);
        keep_weights(keep, s, row, j);
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) {
            float w = __expf(value[i] - row_lse); // 0 for a key that is not seen
            grad[i] = w * (keep[i] * grad[i] - sum);
            value[i] = w * keep[i];
        }
        store<SCORE_VEC>(dscores + to + j, grad);
        store<SCORE_VEC>(weights + to + j, value);
    }
}

/* The keys (or values) of a span and their distances: this call's own, or the state's and this call's side
 * by side. */
template <typename T>
static Matrix<const T> span_keys(Context *context, const AttentionKeys<T> &a, const Span &span, const T *now,
                                 const T *state, T *together, int64_t width) {
    if (!span.old) return matrix(now + span.row * width, width, span.stride * width);
    int64_t keys = span.old + span.queries;
    size_t bytes = (size_t)width * sizeof(T);
    copy_rows(context, together, (size_t)keys * bytes, state, (size_t)a.capacity * bytes,
              (size_t)span.old * bytes, (size_t)span.items);
    copy_rows(context, together + span.old * width, (size_t)keys * bytes, now + span.row * width,
              (size_t)span.stride * bytes, (size_t)span.queries * bytes, (size_t)span.items);
    return matrix((const T *)together, width, keys * width);
}

template <typename T> static Matrix<T> shifted(Matrix<T> m, int64_t item, int64_t row, int64_t column) {
    m.data += item * m.batch_stride + row * m.row_stride + column;
    return m;
}

template <typename T>
static SoftmaxRows softmax_rows(const AttentionKeys<T> &a, const Span &span, const ScoreShape &shape,
                                int64_t item, int64_t h, int64_t first_query, int64_t queries,
                                Dropout dropout) {
    SoftmaxRows s;
    s.row = span.row + item * span.stride + first_query, s.stride = span.stride;
    s.first_query = (int)first_query, s.queries = (int)queries;
    s.old = (int)span.old, s.columns = (int)(span.old + first_query + queries), s.pitch = (int)shape.columns;
    s.whole_batch = shape.queries * shape.columns;
    s.steps = (int)a.steps, s.H = (int)a.H, s.h = (int)h, s.C = (int)a.C;
    s.dropout = dropout;
    return s;
}

template <typename T>
static void span_forward(Context *context, T *out, float *lse, const T *query, const AttentionKeys<T> &a,
                         const Span &span, char *memory, size_t bytes, T *k_together, T *v_together,
                         Dropout dropout) {
    int64_t Z = a.H * a.z, E = a.H * a.e;
    ScoreShape shape = score_shape<T>(span.queries, span.old + span.queries, a.C);
    size_t item_bytes = shape.block_bytes + (size_t)(shape.block * shape.columns) * sizeof(T);
    int64_t most = (int64_t)(bytes / (item_bytes + SCRATCH_ALIGN)),
            groups = ceil_div(span.items, most > 1 ? most : 1);
    int64_t group = ceil_div(span.items, groups);
    float *scores = (float *)memory;
    T *weights = (T *)(memory + (size_t)group * shape.block_bytes);
    Matrix<const T> k = span_keys(context, a, span, a.k, a.k_in, k_together, Z);
    Matrix<const T> v = span_keys(context, a, span, a.v, a.v_in, v_together, E);
    Matrix<const T> q = matrix(query + span.row * Z, Z, span.stride * Z);
    Matrix<T> o = matrix(out + span.row * E, E, span.stride * E);
    for (int64_t h = 0; h < a.H; h++)
        for (int64_t item = 0; item < span.items; item += group) {
            int64_t items = group < span.items - item ? group : span.items - item;
            for (int64_t first = 0; first < span.queries; first += shape.block) {
                int64_t queries = shape.block < span.queries - first ? shape.block : span.queries - first;
                int64_t keys = span.old + first + queries;
                Matrix<float> s = matrix(scores, shape.columns, queries * shape.columns);
                Matrix<const T> w = matrix((const T *)weights, shape.columns, queries * shape.columns);
                matmul(context, false, true, queries, keys, a.z, 1.0f, shifted(q, item, first, h * a.z),
                       shifted(k, item, 0, h * a.z), 0.0f, s, items);
                LAUNCH((softmax_forward_kernel<T>), dim3((unsigned)queries, (unsigned)items),
                       SOFTMAX_THREADS, context, weights, lse, scores,
                       softmax_rows(a, span, shape, item, h, first, queries, dropout));
                matmul(context, false, false, queries, a.e, keys, 1.0f, w, shifted(v, item, 0, h * a.e),
                       0.0f, shifted(o, item, first, h * a.e), items);
            }
        }
}

/* out (B,T,H,e); lse (B,T,H) saved: log sum exp of each query's scores; query (B,T,H,z) */
template <typename T>
static void attention_forward(Context *context, T *out, float *lse, const T *query,
                              const AttentionKeys<T> &a, Dropout dropout) {
    ScratchScope scope(context);
    size_t bytes = score_scratch(a, 1, 1);
    char *memory = take<char>(context, (int64_t)bytes);
    T *k_together = a.n ? take<T>(context, a.B * a.C * a.H * a.z) : nullptr;
    T *v_together = a.n ? take<T>(context, a.B * a.C * a.H * a.e) : nullptr;
    for_each_span(a.B, a.steps, a.n, a.C, [&](const Span &span) {
        span_forward(context, out, lse, query, a, span, memory, bytes, k_together, v_together, dropout);
    });
}

/* Gradients of keys (or values) that lie side by side go to the state's gradient (NULL: not wanted) and to
 * this call's. */
template <typename T>
static void split_gradient(Context *context, T *now, T *state, const T *together, const AttentionKeys<T> &a,
                           const Span &span, int64_t width) {
    size_t bytes = (size_t)width * sizeof(T), pitch = (size_t)(span.old + span.queries) * bytes;
    if (state)
        copy_rows(context, state, (size_t)a.capacity * bytes, together, pitch, (size_t)span.old * bytes,
                  (size_t)span.items);
    copy_rows(context, now + span.row * width, (size_t)span.stride * bytes, together + span.old * width,
              pitch, (size_t)span.queries * bytes, (size_t)span.items);
}

/* Gradients of what a span read. For a span with old keys k and v are those of `together`. */
template <typename T> struct SpanGradients { Matrix<T> q, k, v; };

template <typename T>
static void span_backward(Context *context, const SpanGradients<T> &grad, const T *dout, const float *lse,
                          const T *query, Matrix<const T> k, Matrix<const T> v, const AttentionKeys<T> &a,
                          const Span &span, char *memory, size_t bytes, Dropout dropout) {
    int64_t Z = a.H * a.z, E = a.H * a.e;
    ScoreShape shape = score_shape<T>(span.queries, span.old + span.queries, a.C);
    size_t item_bytes = 2 * (shape.block_bytes + shape.whole_bytes);
    int64_t most = (int64_t)(bytes / (item_bytes + SCRATCH_ALIGN)),
            groups = ceil_div(span.items, most > 1 ? most : 1);
    int64_t group = ceil_div(span.items, groups), whole = shape.queries * shape.columns;
    float *scores = (float *)memory, *dweights = (float *)(memory + (size_t)group * shape.block_bytes);
    T *dscores = (T *)(memory + 2 * (size_t)group * shape.block_bytes), *weights = dscores + group * whole;
    Matrix<const T> q = matrix(query + span.row * Z, Z, span.stride * Z),
                    da = matrix(dout + span.row * E, E, span.stride * E);
    Matrix<const T> ds = matrix((const T *)dscores, shape.columns, whole),
                    w = matrix((const T *)weights, shape.columns, whole);
    for (int64_t h = 0; h < a.H; h++)
        for (int64_t item = 0; item < span.items; item += group) {
            int64_t items = group < span.items - item ? group : span.items - item;
            /* By blocks of queries: the scores and their gradients, and dq = dscores k. */
            for (int64_t first = 0; first < span.queries; first += shape.block) {
                int64_t queries = shape.block < span.queries - first ? shape.block : span.queries - first;
                int64_t keys = span.old + first + queries, batch = queries * shape.columns;
                matmul(context, false, true, queries, keys, a.z, 1.0f, shifted(q, item, first, h * a.z),
                       shifted(k, item, 0, h * a.z), 0.0f, matrix(scores, shape.columns, batch), items);
                matmul(context, false, true, queries, keys, a.e, 1.0f, shifted(da, item, first, h * a.e),
                       shifted(v, item, 0, h * a.e), 0.0f, matrix(dweights, shape.columns, batch), items);
                LAUNCH((softmax_backward_kernel<T>), dim3((unsigned)queries, (unsigned)items),
                       SOFTMAX_THREADS, context, dscores, weights, scores, dweights, lse,
                       softmax_rows(a, span, shape, item, h, first, queries, dropout));
                matmul(context, false, false, queries, a.z, keys, 1.0f, shifted(ds, 0, first, 0),
                       shifted(k, item, 0, h * a.z), 0.0f, shifted(grad.q, item, first, h * a.z), items);
            }
            /* By blocks of keys: the keys that end with a block of queries are seen by it and by all later
             * ones, so that each gradient is one product: dk = dscores^T q, dv = weights^T da. */
            for (int64_t first = 0; first < span.queries; first += shape.block) {
                int64_t queries = shape.block < span.queries - first ? shape.block : span.queries - first;
                int64_t key = first ? span.old + first : 0, keys = span.old + first + queries - key;
                int64_t later = span.queries - first;
                matmul(context, true, false, keys, a.z, later, 1.0f, shifted(ds, 0, first, key),
                       shifted(q, item, first, h * a.z), 0.0f, shifted(grad.k, item, key, h * a.z), items);
                matmul(context, true, false, keys, a.e, later, 1.0f, shifted(w, 0, first, key),
                       shifted(da, item, first, h * a.e), 0.0f, shifted(grad.v, item, key, h * a.e), items);
            }
        }
}

/* dquery, dk, dv, dk_in, dv_in as query, k, v, k_in, v_in (dk_in, dv_in NULL: not wanted); all are written.
 * Scores are computed again from q, k and lse. */
template <typename T>
static void attention_backward(Context *context, T *dquery, T *dk, T *dv, T *dk_in, T *dv_in, const T *dout,
                               const float *lse, const T *query, const AttentionKeys<T> &a,
                               Dropout dropout) {
    ScratchScope scope(context);
    int64_t Z = a.H * a.z, E = a.H * a.e;
    size_t bytes = score_scratch(a, 2, 2);
    char *memory = take<char>(context, (int64_t)bytes);
    T *together[4] = {}; // k, v and their gradients
    for (int i = 0; i < 4 && a.n; i++) together[i] = take<T>(context, a.B * a.C * (i % 2 ? E : Z));
    for_each_span(a.B, a.steps, a.n, a.C, [&](const Span &span) {
        Matrix<const T> k = span_keys(context, a, span, a.k, a.k_in, together[0], Z);
        Matrix<const T> v = span_keys(context, a, span, a.v, a.v_in, together[1], E);
        SpanGradients<T> grad;
        grad.q = matrix(dquery + span.row * Z, Z, span.stride * Z);
        grad.k = span.old ? matrix(together[2], Z, k.batch_stride)
                          : matrix(dk + span.row * Z, Z, span.stride * Z);
        grad.v = span.old ? matrix(together[3], E, v.batch_stride)
                          : matrix(dv + span.row * E, E, span.stride * E);
        span_backward(context, grad, dout, lse, query, k, v, a, span, memory, bytes, dropout);
        if (!span.old) return;
        split_gradient(context, dk, dk_in, together[2], a, span, Z);
        split_gradient(context, dv, dv_in, together[3], a, span, E);
    });
}

/* ----------------------------------------------------------------------------------------------------------
 * The state that attention leaves: keys (or values) of the unfinished chunk.
 */

/* state (B,capacity,width) becomes the new state of n_out = (n + T) mod C rows; `before` is the old one and
 * may be the same memory; x (B,T,width) is this call's. */
template <typename T>
static void attention_state_forward(Context *context, T *state, const T *before, const T *x, int64_t n,
                                    int64_t capacity, int64_t B, int64_t steps, int64_t width, int64_t C) {
    int64_t n_out = (n + steps) % C, kept = n + steps < C ? n : 0, fresh = n_out - kept;
    size_t bytes = (size_t)width * sizeof(T);
    if (kept && before != state)
        copy_rows(context, state, (size_t)capacity * bytes, before, (size_t)capacity * bytes,
                  (size_t)kept * bytes, (size_t)B);
    copy_rows(context, state + kept * width, (size_t)capacity * bytes, x + (steps - fresh) * width,
              (size_t)steps * bytes, (size_t)fresh * bytes, (size_t)B);
}

/* computes: to[b, i, :] += from[b, i, :] for `rows` rows of each of B pieces, each with its own distance
 * between pieces
 * launch:   grid (ceil(rows width / 256), B), block 256: a thread owns an element
 * traffic:  3 B rows width sizeof(T) bytes
 * needs:    nothing; only where a gradient of the outgoing state is set
 * numerics: float */
template <typename T>
__global__ void add_rows_kernel(T *to, int64_t to_pitch, const T *from, int64_t from_pitch, int64_t count) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, b = blockIdx.y;
    if (i < count)
        to[b * to_pitch + i] =
            from_float<T>(to_float(to[b * to_pitch + i]) + to_float(from[b * from_pitch + i]));
}

/* The state's tokens were copied from `before` and from x: their gradients are added there (dbefore NULL:
 * not wanted). */
template <typename T>
static void attention_state_backward(Context *context, T *dbefore, T *dx, const T *dstate, int64_t n,
                                     int64_t capacity, int64_t B, int64_t steps, int64_t width, int64_t C) {
    int64_t n_out = (n + steps) % C, kept = n + steps < C ? n : 0, fresh = n_out - kept;
    if (dbefore && kept)
        LAUNCH((add_rows_kernel<T>), dim3(blocks_for(kept * width, 256), (unsigned)B), 256, context, dbefore,
               capacity * width, dstate, capacity * width, kept * width);
    if (fresh)
        LAUNCH((add_rows_kernel<T>), dim3(blocks_for(fresh * width, 256), (unsigned)B), 256, context,
               dx + (steps - fresh) * width, steps * width, dstate + kept * width, capacity * width,
               fresh * width);
}

/* ----------------------------------------------------------------------------------------------------------
 * One token a row, from the state: what generation does. No matrix products: reading the cached values is
 * all the work, so it is spread over the device. The place in the chunk is read from the count on the device.
 */

enum { STEP_WARPS = 4, STEP_KEYS = 32, STEP_THREADS = 64 };

/* computes: state rows count[b] mod C of k and v = this token's k and v
 * launch:   grid (ceil((Z + E) / 256), B), block 256: a thread owns an element
 * traffic:  2 B (Z + E) sizeof(T) bytes
 * needs:    nothing
 * numerics: a copy */
template <typename T>
__global__ void append_token_kernel(T *k_state, T *v_state, const T *k, const T *v, const int64_t *count,
                                    int Z, int E, int C) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x), b = (int)blockIdx.y;
    int64_t place = (int64_t)b * C + count[b] % C;
    if (i < Z)
        k_state[place * Z + i] = k[(int64_t)b * Z + i];
    else if (i < Z + E)
        v_state[place * E + i - Z] = v[(int64_t)b * E + i - Z];
}

/* computes: scores[b, h, j] = q[b, h] . k_state[b, j, h] for j <= count[b] mod C
 * launch:   grid (ceil(C / 4), H, B), block 128: a warp owns a key
 * traffic:  B (n + 1) Z sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants z and pointers in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float, fixed order: deterministic */
template <typename T, int VEC>
__global__ void step_scores_kernel(float *scores, const T *q, const T *k_state, const int64_t *count, int H,
                                   int z, int C) {
    int key = (int)blockIdx.x * STEP_WARPS + (int)threadIdx.x / WARP_SIZE,
        lane = (int)threadIdx.x % WARP_SIZE;
    int h = (int)blockIdx.y, b = (int)blockIdx.z;
    if (key > count[b] % C) return; // a whole warp leaves
    const T *left = q + ((int64_t)b * H + h) * z, *right = k_state + (((int64_t)b * C + key) * H + h) * z;
    float sum = 0, x[VEC], y[VEC];
    for (int i = lane * VEC; i < z; i += WARP_SIZE * VEC) {
        load<VEC>(x, left + i);
        load<VEC>(y, right + i);
#pragma unroll
        for (int j = 0; j < VEC; j++) sum += x[j] * y[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) scores[((int64_t)b * H + h) * C + key] = sum;
}

/* computes: partial[b, h, s, :] = sum over 32 keys j of exp(scores[j] - top) v_state[b, j, h, :], top the
 * largest of the 32
 * launch:   grid (ceil(e / (64 VEC)), ceil(C / 32), B H), block 64: a thread owns VEC columns
 * traffic:  B (n + 1) E sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants e and pointers in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float, the keys in order: deterministic */
template <typename T, int VEC>
__global__ void step_values_kernel(float *partial, const float *scores, const T *v_state,
                                   const int64_t *count, int H, int e, int C, int splits) {
    __shared__ float weight[STEP_KEYS];
    int bh = (int)blockIdx.z, b = bh / H, h = bh % H, first = (int)blockIdx.y * STEP_KEYS;
    int keys = min((int)STEP_KEYS, (int)(count[b] % C) + 1 - first);
    if (keys <= 0) return; // the whole block leaves
    if (threadIdx.x < WARP_SIZE) {
        float score = (int)threadIdx.x < keys ? scores[(int64_t)bh * C + first + threadIdx.x] : -INFINITY;
        weight[threadIdx.x] = expf(score - warp_max(score));
    }
    __syncthreads(); // the weights are there
    int c = ((int)blockIdx.x * STEP_THREADS + (int)threadIdx.x) * VEC;
    if (c >= e) return;
    const T *value = v_state + (((int64_t)b * C + first) * H + h) * e + c;
    float sum[VEC] = {}, x[VEC];
#pragma unroll 8
    for (int j = 0; j < keys; j++) {
        load<VEC>(x, value + (int64_t)j * H * e);
#pragma unroll
        for (int i = 0; i < VEC; i++) sum[i] = fmaf(weight[j], x[i], sum[i]);
    }
    float *out = partial + ((int64_t)bh * splits + blockIdx.y) * e + c;
#pragma unroll
    for (int i = 0; i < VEC; i++) out[i] = sum[i];
}

/* computes: out[b, h, :] = sum over splits of exp(top_s - lse) partial[s, :];  lse
 * launch:   grid (ceil(e / 64), B H), block 64: a thread owns a column; every block reads all scores for top
 *           and lse
 * traffic:  4 B E (n + 1) / 32 bytes
 * needs:    nothing
 * numerics: float, the splits in order: deterministic */
template <typename T>
__global__ void step_combine_kernel(T *out, float *lse, const float *partial, const float *scores,
                                    const int64_t *count, int H, int e, int C, int splits) {
    __shared__ float shared[STEP_THREADS / WARP_SIZE];
    int bh = (int)blockIdx.y, keys = (int)(count[bh / H] % C) + 1;
    const float *row = scores + (int64_t)bh * C;
    float largest = -INFINITY, sum = 0;
    for (int j = (int)threadIdx.x; j < keys; j += STEP_THREADS) largest = fmaxf(largest, row[j]);
    largest = block_max(largest, shared);
    for (int j = (int)threadIdx.x; j < keys; j += STEP_THREADS) sum += expf(row[j] - largest);
    sum = block_sum(sum, shared);
    if (blockIdx.x == 0 && threadIdx.x == 0) lse[bh] = largest + logf(sum);
    /* Each split's partial sum is relative to its own largest score: a warp finds those, a key a lane. */
    __shared__ float factor[STEP_THREADS];
    int c = (int)(blockIdx.x * STEP_THREADS + threadIdx.x), lane = (int)threadIdx.x % WARP_SIZE;
    float total = 0;
    for (int first = 0; first * STEP_KEYS < keys; first += STEP_THREADS) {
        for (int s = (int)threadIdx.x / WARP_SIZE; s < STEP_THREADS; s += STEP_THREADS / WARP_SIZE) {
            int key = (first + s) * STEP_KEYS + lane;
            float top = warp_max(key < keys ? row[key] : -INFINITY);
            if (lane == 0) factor[s] = top == -INFINITY ? 0.0f : expf(top - largest) / sum;
        }
        __syncthreads(); // the factors of these splits are there
        int here = min((int)STEP_THREADS, (keys + STEP_KEYS - 1) / STEP_KEYS - first);
        if (c < e)
            for (int s = 0; s < here; s++)
                total += factor[s] * partial[((int64_t)bh * splits + first + s) * e + c];
        __syncthreads(); // all have read the factors: the next splits may overwrite them
    }
    if (c < e) out[(int64_t)bh * e + c] = from_float<T>(total);
}

/* out (B,H,e), lse (B,H); q, k (B,H,z), v (B,H,e) of one token a row; the states (B,C,H,z) and (B,C,H,e)
 * take k and v in. */
template <typename T>
static void attention_step(Context *context, T *out, float *lse, const T *q, const T *k, const T *v,
                           T *k_state, T *v_state, const int64_t *count, int64_t B, int64_t H, int64_t z,
                           int64_t e, int64_t C) {
    ScratchScope scope(context);
    int splits = (int)ceil_div(C, STEP_KEYS);
    float *scores = take<float>(context, B * H * C), *partial = take<float>(context, B * H * splits * e);
    LAUNCH((append_token_kernel<T>), dim3(blocks_for(H * (z + e), 256), (unsigned)B), 256, context, k_state,
           v_state, k, v, count, (int)(H * z), (int)(H * e), (int)C);
    WITH_VEC(T, vectorises<T>(z, q, k_state),
             LAUNCH((step_scores_kernel<T, VEC>), dim3(blocks_for(C, STEP_WARPS), (unsigned)H, (unsigned)B),
                    STEP_WARPS * WARP_SIZE, context, scores, q, k_state, count, (int)H, (int)z, (int)C));
    WITH_VEC(T, vectorises<T>(e, v_state),
             LAUNCH((step_values_kernel<T, VEC>),
                    dim3(blocks_for(e, STEP_THREADS * VEC), (unsigned)splits, (unsigned)(B * H)),
                    STEP_THREADS, context, partial, scores, v_state, count, (int)H, (int)e, (int)C, splits));
    LAUNCH((step_combine_kernel<T>), dim3(blocks_for(e, STEP_THREADS), (unsigned)(B * H)), STEP_THREADS,
           context, out, lse, partial, scores, count, (int)H, (int)e, (int)C, splits);
}

#endif
