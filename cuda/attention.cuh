/* attention.cuh - chunked causal attention: a = softmax(q k^T + mask) v, the mask leaving the keys of the
 * same chunk that are not in the future.
 *
 * Values are wide (e is 2048 where z is 256), so the two products with v are large matrix products, at home
 * in cuBLAS. A chunk's queries are taken a quarter at a time, each against the keys up to its own end: of
 * the scores above the diagonal only those inside a quarter are computed. Few chunks, whose quarters would
 * leave most of the device idle, are taken in halves or whole. Scores exist for many chunks at a
 * time, in scratch memory. Their softmax, the weights, is kept for the backward: as half floats where
 * activations are bf16, since what the backward makes of a weight's rounding would be seen in dq and dk.
 *
 * Chunks that lie regularly in memory form a span, whose products are batched:
 *     n > 0:  the rest of the chunk that the state began  |  whole chunks  |  the beginning of the last chunk
 * Only the first has keys in the state; those and its new keys are copied side by side.
 */
#ifndef CUDA_ATTENTION_CUH
#define CUDA_ATTENTION_CUH

#include <cuda_fp16.h>

#include "fused.cuh"
#include "matmul.cuh"

constexpr size_t SCORE_BYTES = (size_t)512 << 20; /* about how much scratch the scores may take */
/* The warps of a softmax block own SOFTMAX_WARPS short rows or, all together, a long one; a thread holds
 * SCORES_HELD vectors of a row in registers. */
enum { MOST_QUERY_BLOCKS = 4, SMALLEST_QUERY_BLOCK = 256, SOFTMAX_WARPS = 4, SCORE_VEC = 4, SCORES_HELD = 4 };

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

/* The kept weights of a call, (H, B T, pitch): row t of head h has a weight for each key of its chunk so far,
 * times KEPT_SCALE, which makes normal half floats of all that matter. The pitch is a multiple of 8 and at
 * least the largest number of keys. data NULL: not wanted. */
template <typename T> using KeptWeight = std::conditional_t<std::is_same<T, bf16>::value, __half, float>;
template <typename T> struct AttentionWeights {
    KeptWeight<T> *data;
    int64_t pitch;
};
constexpr float KEPT_SCALE = 4096.0f;
static inline int64_t weights_pitch(int64_t keys) { return ceil_div(keys, 8) * 8; }

template <> __host__ __device__ inline __half from_float<__half>(float x) { return __float2half(x); }
template <int VEC>
__device__ inline void numbers_of(float (&to)[VEC], const VectorWords<__half, VEC> &words) {
#pragma unroll
    for (int i = 0; i < VEC; i++)
        to[i] = __half2float(__ushort_as_half((unsigned short)(words.v[i / 2] >> i % 2 * 16)));
}

/* Into how many blocks of queries chunks are cut: as many, up to four, as still give three quarters of the
 * multiprocessors a tile of 256 x 128 in the products with v. Four blocks compute 5/8 of all scores; eight
 * would compute 9/16, but in products so much smaller that a step on an H100 got no faster. */
template <typename T>
static int64_t query_blocks(const Context *context, const AttentionKeys<T> &a, int64_t items) {
    int64_t blocks = MOST_QUERY_BLOCKS;
    while (blocks > 1 &&
           items * ceil_div(ceil_div(a.C, blocks), 256) * ceil_div(a.e, 128) * 4 < context->num_sms * 3)
        blocks /= 2;
    return blocks;
}

/* Bytes of one item's scores: a float matrix for a block of queries, and a matrix of T for a block of queries
 * or for all of them. */
struct ScoreShape {
    int64_t queries, block, columns; /* columns are rounded up so that rows stay aligned */
    size_t float_block, block_bytes, whole_bytes;
};
template <typename T>
static ScoreShape score_shape(int64_t queries, int64_t keys, int64_t C, int64_t blocks) {
    ScoreShape s;
    int64_t part = ceil_div(C, blocks);
    s.queries = queries;
    s.block = part > SMALLEST_QUERY_BLOCK ? part : SMALLEST_QUERY_BLOCK;
    if (s.block > queries) s.block = queries;
    s.columns = weights_pitch(keys);
    s.float_block = (size_t)(s.block * s.columns) * sizeof(float);
    s.block_bytes = (size_t)(s.block * s.columns) * sizeof(T);
    s.whole_bytes = (size_t)(s.queries * s.columns) * sizeof(T);
    return s;
}

/* Scratch of an item in the forward (scores and weights) and in the backward (gradients of the weights, then
 * of the scores, and the weights). */
static inline size_t forward_bytes(const ScoreShape &s) { return s.float_block + s.block_bytes; }
static inline size_t backward_bytes(const ScoreShape &s) { return s.float_block + 2 * s.whole_bytes; }

/* Scratch for the scores of any span of a call no larger than this one: grows with B, T and n > 0, nothing
 * else. Fewer items may be cut into larger blocks, so that each number of items is asked. item_bytes: one of
 * the two functions above. */
template <typename T, typename F>
static size_t score_scratch(const Context *context, const AttentionKeys<T> &a, F item_bytes) {
    int64_t queries = a.steps < a.C ? a.steps : a.C, keys = a.n > 0 ? a.C : queries;
    size_t whole = item_bytes(score_shape<T>(queries, keys, a.C, 1)) + SCRATCH_ALIGN, most = 0;
    for (int64_t items = a.B * (a.steps / a.C + 1), blocks = 0; items > 0; items--) {
        if (query_blocks(context, a, items) == blocks) continue; // more items with these blocks were asked
        blocks = query_blocks(context, a, items);
        size_t all = (size_t)items * (item_bytes(score_shape<T>(queries, keys, a.C, blocks)) + SCRATCH_ALIGN);
        if (all > most) most = all;
    }
    size_t limit = whole > SCORE_BYTES ? whole : SCORE_BYTES;
    return most < limit ? most : limit;
}
/* How many items of a span are taken at a time: groups of about the same size. */
static inline int64_t score_group(int64_t items, size_t bytes, size_t item_bytes) {
    int64_t most = (int64_t)(bytes / (item_bytes + SCRATCH_ALIGN));
    return ceil_div(items, ceil_div(items, most > 1 ? most : 1));
}

/* What a softmax kernel knows about its rows. All matrices are given from the block's first query on. */
struct SoftmaxRows {
    int64_t row, stride;      /* token of the first item's first query of this block; tokens between items */
    int first_query, queries; /* of the block, counted from the span's first query */
    int old, columns, pitch;  /* keys of the state; keys in use; distance between rows of scores */
    int64_t batch; /* of the matrices of T between items: weights and dscores, with the same pitch */
    int64_t kept_pitch, kept_batch; /* distances between rows and items of the kept weights */
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
template <bool DROPS>
__device__ inline void keep_weights(float (&keep)[SCORE_VEC], const SoftmaxRows &s, int64_t row, int key) {
#pragma unroll
    for (int i = 0; i < SCORE_VEC; i++) keep[i] = 1.0f;
    if (DROPS) keep_scales<SCORE_VEC>(keep, s.dropout, (int64_t)weight_index(s, row, key));
}

/* Weights that were kept, from their words. */
template <typename K>
__device__ inline void weights_of(float (&to)[SCORE_VEC], const VectorWords<K, SCORE_VEC> &words) {
    numbers_of(to, words);
#pragma unroll
    for (int i = 0; i < SCORE_VEC; i++) to[i] *= 1 / KEPT_SCALE;
}

template <int WARPS> __device__ inline float row_sum(float x, float *shared) {
    if constexpr (WARPS == 1) return warp_sum(x);
    return block_sum(x, shared);
}
template <int WARPS> __device__ inline float row_max(float x, float *shared) {
    if constexpr (WARPS == 1) return warp_max(x);
    return block_max(x, shared);
}

/* computes: w = softmax(scores) over the keys that a query may see, 0 for the others, into `kept` (NULL: not
 *           wanted);  weights = w f, f the dropout factors;  lse
 * launch:   grid (queries of the block / 4, items), block 128: a warp owns a row; WARPS > 1: grid (queries,
 *           items), and all WARPS warps own a row
 * traffic:  (6 + sizeof(T)) bytes a score; what the registers cannot hold is read again from the caches
 * needs:    rows start at multiples of 8 elements
 * numerics: float, fixed order: deterministic */
template <typename T, int WARPS, bool DROPS>
__global__ void softmax_forward_kernel(T *weights, KeptWeight<T> *kept, float *lse, const float *scores,
                                       SoftmaxRows s) {
    __shared__ float shared[WARPS];
    constexpr int LANES = WARPS * WARP_SIZE, STEP = LANES * SCORE_VEC;
    int query = WARPS == 1 ? (int)(blockIdx.x * SOFTMAX_WARPS + threadIdx.x / WARP_SIZE) : (int)blockIdx.x;
    if (query >= s.queries) return; // a whole row's threads leave
    int item = (int)blockIdx.y, first = (int)threadIdx.x % LANES * SCORE_VEC;
    int seen = s.old + s.first_query + query + 1;
    int64_t row = s.row + item * s.stride + query, to = item * s.batch + (int64_t)query * s.pitch;
    const float *from = scores + ((int64_t)item * s.queries + query) * s.pitch;
    float held[SCORES_HELD][SCORE_VEC], largest = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < SCORES_HELD; i++) {
        int j = first + i * STEP;
        if (j < s.columns) load_scores(held[i], from + j, seen - j, -INFINITY);
    }
    auto each_vector = [&](auto &&visit) {
#pragma unroll
        for (int i = 0; i < SCORES_HELD; i++)
            if (first + i * STEP < s.columns) visit(first + i * STEP, held[i]);
        for (int j = first + SCORES_HELD * STEP; j < s.columns; j += STEP) {
            float value[SCORE_VEC];
            load_scores(value, from + j, seen - j, -INFINITY);
            visit(j, value);
        }
    };
    each_vector([&](int, const float (&value)[SCORE_VEC]) {
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) largest = fmaxf(largest, value[i]);
    });
    float top = row_max<WARPS>(largest, shared);
    each_vector([&](int, const float (&value)[SCORE_VEC]) {
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) sum += __expf(value[i] - top); // exp(-inf) is 0
    });
    float total = row_sum<WARPS>(sum, shared), scale = 1.0f / total;
    if (first == 0) lse[row * s.H + s.h] = top + logf(total);
    each_vector([&](int j, const float (&value)[SCORE_VEC]) {
        float w[SCORE_VEC], keep[SCORE_VEC];
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) w[i] = __expf(value[i] - top) * scale;
        keep_weights<DROPS>(keep, s, row, j);
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) keep[i] *= w[i], w[i] *= KEPT_SCALE;
        store<SCORE_VEC>(weights + to + j, keep);
        if (kept) store<SCORE_VEC>(kept + item * s.kept_batch + query * s.kept_pitch + j, w);
    });
}

/* weights = w f, f the dropout factors, with dw = f (da v^T):  dscore = w (dw - sum w dw)
 * computes: dscores and, for dv, the weights again
 * launch:   as softmax_forward_kernel
 * traffic:  (6 + 2 sizeof(T)) bytes a score; what the registers cannot hold is read again from the caches
 * needs:    rows start at multiples of 8 elements; keys not seen have weight 0
 * numerics: float, fixed order: deterministic */
template <typename T, int WARPS, bool DROPS>
__global__ void softmax_backward_kernel(T *dscores, T *weights, const KeptWeight<T> *kept,
                                        const float *dweights, SoftmaxRows s) {
    __shared__ float shared[WARPS];
    constexpr int LANES = WARPS * WARP_SIZE, STEP = LANES * SCORE_VEC;
    int query = WARPS == 1 ? (int)(blockIdx.x * SOFTMAX_WARPS + threadIdx.x / WARP_SIZE) : (int)blockIdx.x;
    if (query >= s.queries) return; // a whole row's threads leave
    int item = (int)blockIdx.y, first = (int)threadIdx.x % LANES * SCORE_VEC;
    int seen = s.old + s.first_query + query + 1;
    int64_t row = s.row + item * s.stride + query, to = item * s.batch + (int64_t)query * s.pitch;
    const float *from = dweights + ((int64_t)item * s.queries + query) * s.pitch;
    kept += item * s.kept_batch + query * s.kept_pitch;
    /* All of a row is asked for before any of it is used; weights stay words until then. */
    VectorWords<KeptWeight<T>, SCORE_VEC> held[SCORES_HELD];
    float held_grad[SCORES_HELD][SCORE_VEC], sum = 0;
#pragma unroll
    for (int i = 0; i < SCORES_HELD; i++) {
        int j = first + i * STEP;
        if (j >= s.columns) break;
        held[i] = words_at<SCORE_VEC>(kept + j);
        load_scores(held_grad[i], from + j, seen - j, 0.0f);
    }
    auto each_vector = [&](auto &&visit) {
        float w[SCORE_VEC], grad[SCORE_VEC];
#pragma unroll
        for (int i = 0; i < SCORES_HELD; i++) {
            int j = first + i * STEP;
            if (j >= s.columns) break;
            weights_of(w, held[i]);
            visit(j, w, held_grad[i]);
        }
        for (int j = first + SCORES_HELD * STEP; j < s.columns; j += STEP) {
            weights_of(w, words_at<SCORE_VEC>(kept + j));
            load_scores(grad, from + j, seen - j, 0.0f);
            visit(j, w, grad);
        }
    };
    each_vector([&](int j, const float (&w)[SCORE_VEC], const float (&grad)[SCORE_VEC]) {
        float keep[SCORE_VEC];
        keep_weights<DROPS>(keep, s, row, j);
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) sum += w[i] * grad[i] * keep[i];
    });
    sum = row_sum<WARPS>(sum, shared);
    each_vector([&](int j, const float (&w)[SCORE_VEC], const float (&grad)[SCORE_VEC]) {
        float keep[SCORE_VEC], value[SCORE_VEC];
        keep_weights<DROPS>(keep, s, row, j);
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) value[i] = w[i] * (keep[i] * grad[i] - sum);
        store<SCORE_VEC>(dscores + to + j, value);
#pragma unroll
        for (int i = 0; i < SCORE_VEC; i++) value[i] = w[i] * keep[i];
        store<SCORE_VEC>(weights + to + j, value);
    });
}

/* Launches one of the two with as many warps a row as hold it in registers, at most 8. Without dropout they
 * know nothing of it and need fewer registers. */
#define LAUNCH_SOFTMAX(kernel, context, shape, items, ...)                                                  \
    do {                                                                                                    \
        SoftmaxRows rows = shape;                                                                           \
        if (rows.dropout.threshold == 0)                                                                    \
            LAUNCH_SOFTMAX_OF(kernel, false, context, rows, items, __VA_ARGS__);                            \
        else                                                                                                \
            LAUNCH_SOFTMAX_OF(kernel, true, context, rows, items, __VA_ARGS__);                             \
    } while (0)
#define LAUNCH_SOFTMAX_OF(kernel, drops, context, rows, items, ...)                                         \
    do {                                                                                                    \
        constexpr int HELD = WARP_SIZE * SCORE_VEC * SCORES_HELD;                                           \
        dim3 grid((unsigned)rows.queries, (unsigned)(items)), short_grid = grid;                            \
        short_grid.x = blocks_for(rows.queries, SOFTMAX_WARPS);                                             \
        if (rows.columns <= HELD)                                                                           \
            LAUNCH((kernel<T, 1, drops>), short_grid, SOFTMAX_WARPS * WARP_SIZE, context, __VA_ARGS__,      \
                   rows);                                                                                   \
        else if (rows.columns <= 2 * HELD)                                                                  \
            LAUNCH((kernel<T, 2, drops>), grid, 2 * WARP_SIZE, context, __VA_ARGS__, rows);                 \
        else if (rows.columns <= 4 * HELD)                                                                  \
            LAUNCH((kernel<T, 4, drops>), grid, 4 * WARP_SIZE, context, __VA_ARGS__, rows);                 \
        else                                                                                                \
            LAUNCH((kernel<T, 8, drops>), grid, 8 * WARP_SIZE, context, __VA_ARGS__, rows);                 \
    } while (0)

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

/* The kept weights of a span's queries. */
template <typename T>
static Matrix<KeptWeight<T>> span_weights(const AttentionWeights<T> &kept, const AttentionKeys<T> &a,
                                          const Span &span, int64_t h) {
    if (!kept.data) return Matrix<KeptWeight<T>>{};
    return matrix(kept.data + (h * a.B * a.steps + span.row) * kept.pitch, kept.pitch,
                  span.stride * kept.pitch);
}

/* batch: distance between the items' matrices of T; kept: from the first item's first query on */
template <typename T>
static SoftmaxRows softmax_rows(const AttentionKeys<T> &a, const Span &span, const ScoreShape &shape,
                                int64_t item, int64_t h, int64_t first_query, int64_t queries, int64_t batch,
                                const Matrix<KeptWeight<T>> &kept, Dropout dropout) {
    SoftmaxRows s;
    s.row = span.row + item * span.stride + first_query, s.stride = span.stride;
    s.first_query = (int)first_query, s.queries = (int)queries;
    s.old = (int)span.old, s.columns = (int)(span.old + first_query + queries), s.pitch = (int)shape.columns;
    s.batch = batch;
    s.kept_pitch = kept.row_stride, s.kept_batch = kept.batch_stride;
    s.steps = (int)a.steps, s.H = (int)a.H, s.h = (int)h, s.C = (int)a.C;
    s.dropout = dropout;
    return s;
}

template <typename T>
static void span_forward(Context *context, T *out, float *lse, const AttentionWeights<T> &kept,
                         const T *query, const AttentionKeys<T> &a, const Span &span, char *memory,
                         size_t bytes, T *k_together, T *v_together, Dropout dropout) {
    int64_t Z = a.H * a.z, E = a.H * a.e;
    ScoreShape shape = score_shape<T>(span.queries, span.old + span.queries, a.C,
                                      query_blocks(context, a, span.items));
    int64_t group = score_group(span.items, bytes, forward_bytes(shape));
    float *scores = (float *)memory;
    T *weights = (T *)(memory + (size_t)group * shape.float_block);
    Matrix<const T> k = span_keys(context, a, span, a.k, a.k_in, k_together, Z);
    Matrix<const T> v = span_keys(context, a, span, a.v, a.v_in, v_together, E);
    Matrix<const T> q = matrix(query + span.row * Z, Z, span.stride * Z);
    Matrix<T> o = matrix(out + span.row * E, E, span.stride * E);
    for (int64_t h = 0; h < a.H; h++)
        for (int64_t item = 0; item < span.items; item += group) {
            int64_t items = group < span.items - item ? group : span.items - item;
            for (int64_t first = 0; first < span.queries; first += shape.block) {
                int64_t queries = shape.block < span.queries - first ? shape.block : span.queries - first;
                int64_t keys = span.old + first + queries, batch = queries * shape.columns;
                matmul(context, false, true, queries, keys, a.z, 1.0f, shifted(q, item, first, h * a.z),
                       shifted(k, item, 0, h * a.z), 0.0f, matrix(scores, shape.columns, batch), items);
                Matrix<KeptWeight<T>> own = span_weights(kept, a, span, h);
                if (own.data) own = shifted(own, item, first, 0);
                LAUNCH_SOFTMAX(softmax_forward_kernel, context,
                               softmax_rows(a, span, shape, item, h, first, queries, batch, own, dropout),
                               items, weights, own.data, lse, scores);
                matmul(context, false, false, queries, a.e, keys, 1.0f,
                       matrix((const T *)weights, shape.columns, batch), shifted(v, item, 0, h * a.e), 0.0f,
                       shifted(o, item, first, h * a.e), items);
            }
        }
}

/* out (B,T,H,e); lse (B,T,H) saved: log sum exp of each query's scores; kept: the weights, saved too (data
 * NULL: not wanted); query (B,T,H,z) */
template <typename T>
static void attention_forward(Context *context, T *out, float *lse, const AttentionWeights<T> &kept,
                              const T *query, const AttentionKeys<T> &a, Dropout dropout) {
    ScratchScope scope(context);
    size_t bytes = score_scratch(context, a, forward_bytes);
    char *memory = take<char>(context, (int64_t)bytes);
    T *k_together = a.n ? take<T>(context, a.B * a.C * a.H * a.z) : nullptr;
    T *v_together = a.n ? take<T>(context, a.B * a.C * a.H * a.e) : nullptr;
    for_each_span(a.B, a.steps, a.n, a.C, [&](const Span &span) {
        span_forward(context, out, lse, kept, query, a, span, memory, bytes, k_together, v_together,
                     dropout);
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

/* Where v = silu(x), the gradient of x can take the place of v's: dx = dv silu'(x), with partial sums of its
 * columns. x NULL: dv stays.
 *
 * The partial sums take the place of kept weights: a row of them for each 16 tokens of all heads needs less
 * than the same tokens' weights of the first head, which have been read by then. */
template <typename T> struct SiluOfValues {
    const T *x;
    float *partial;
};

/* Can it in this call? Chunks have to be whole and begin with the call, so that nothing is added to dv
 * later, and a block of queries has to have whole tiles of keys, since what lies behind it was not written. A
 * dry run is told no: then silu_backward follows, which needs more scratch memory. */
template <typename T>
static bool silu_fits(const Context *context, const AttentionKeys<T> &a, const T *dv, const T *dout,
                      const T *x) {
    if (context->dry_run || !causal_silu_fits<T>(context, a.C, a.e, dv, dout, x)) return false;
    int64_t chunks = a.B * (a.steps / a.C);
    size_t sums = (size_t)(a.H * a.e) * sizeof(float), weights = (size_t)a.C * sizeof(KeptWeight<T>);
    return a.n == 0 && a.steps % a.C == 0 && sums <= FUSED_WARP_ROWS * weights &&
           score_shape<T>(a.C, a.C, a.C, query_blocks(context, a, chunks)).block % FUSED_M == 0;
}

template <typename T>
static void span_backward(Context *context, const SpanGradients<T> &grad, const T *dout,
                          const AttentionWeights<T> &kept, const T *query, Matrix<const T> k,
                          Matrix<const T> v, const SiluOfValues<T> &silu, const AttentionKeys<T> &a,
                          const Span &span, char *memory, size_t bytes, Dropout dropout) {
    int64_t Z = a.H * a.z, E = a.H * a.e;
    ScoreShape shape = score_shape<T>(span.queries, span.old + span.queries, a.C,
                                      query_blocks(context, a, span.items));
    int64_t group = score_group(span.items, bytes, backward_bytes(shape));
    int64_t whole = shape.queries * shape.columns;
    float *dweights = (float *)memory;
    T *dscores = (T *)(memory + (size_t)group * shape.float_block), *weights = dscores + group * whole;
    Matrix<const T> q = matrix(query + span.row * Z, Z, span.stride * Z),
                    da = matrix(dout + span.row * E, E, span.stride * E);
    Matrix<const T> ds = matrix((const T *)dscores, shape.columns, whole),
                    w = matrix((const T *)weights, shape.columns, whole);
    for (int64_t h = 0; h < a.H; h++)
        for (int64_t item = 0; item < span.items; item += group) {
            int64_t items = group < span.items - item ? group : span.items - item;
            /* By blocks of queries: the gradients of weights and scores, and dq = dscores k. */
            for (int64_t first = 0; first < span.queries; first += shape.block) {
                int64_t queries = shape.block < span.queries - first ? shape.block : span.queries - first;
                int64_t keys = span.old + first + queries, batch = queries * shape.columns;
                matmul(context, false, true, queries, keys, a.e, 1.0f, shifted(da, item, first, h * a.e),
                       shifted(v, item, 0, h * a.e), 0.0f, matrix(dweights, shape.columns, batch), items);
                Matrix<KeptWeight<T>> own = shifted(span_weights(kept, a, span, h), item, first, 0);
                LAUNCH_SOFTMAX(softmax_backward_kernel, context,
                               softmax_rows(a, span, shape, item, h, first, queries, whole, own, dropout),
                               items, dscores + first * shape.columns, weights + first * shape.columns,
                               own.data, dweights);
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
                if (silu.x) continue;
                matmul(context, true, false, keys, a.e, later, 1.0f, shifted(w, 0, first, key),
                       shifted(da, item, first, h * a.e), 0.0f, shifted(grad.v, item, key, h * a.e), items);
            }
            /* All of dv in one launch, with what becomes of it. */
            if constexpr (std::is_same<T, bf16>::value) {
                int64_t row = item * a.C; // of all chunks
                if (silu.x)
                    causal_silu_backward(context, grad.v.data + row * E,
                                         silu.partial + row / FUSED_WARP_ROWS * E, weights, dout + row * E,
                                         silu.x + row * E, items, a.C, E, h * a.e, a.e);
            }
        }
}

/* dquery, dk, dv, dk_in, dv_in as query, k, v, k_in, v_in (dk_in, dv_in NULL: not wanted); all are written.
 * kept: the forward's weights. x NULL: no more; else, if silu_fits, v = silu(x), the gradient of x takes the
 * place of dv, and its column sums are added to dbias by the next add_sums. Until then partial sums lie over
 * `kept`, whose weights are lost. */
template <typename T>
static void attention_backward(Context *context, T *dquery, T *dk, T *dv, T *dk_in, T *dv_in, const T *dout,
                               const AttentionWeights<T> &kept, const T *query, const AttentionKeys<T> &a,
                               const T *x, float *dbias, Dropout dropout) {
    ScratchScope scope(context);
    int64_t Z = a.H * a.z, E = a.H * a.e;
    size_t bytes = score_scratch(context, a, backward_bytes);
    char *memory = take<char>(context, (int64_t)bytes);
    SiluOfValues<T> silu = {x, (float *)kept.data};
    if (x) sum_later(context, dbias, silu.partial, a.B * a.steps / FUSED_WARP_ROWS, E);
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
        span_backward(context, grad, dout, kept, query, k, v, silu, a, span, memory, bytes, dropout);
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
