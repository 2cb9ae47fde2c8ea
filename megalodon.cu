/* megalodon.cu - Megalodon on a CUDA device: the backend megalodon_cuda.
 *
 * It mirrors megalodon.c: components carry the same names and argument orders, and the model's functions
 * come in the same order. The kernels stand in cuda/, in the order of that file:
 *
 *   cuda/common.cuh        checked calls, scratch, vectors, reductions, dropout mask
 *   cuda/matmul.cuh        cuBLAS, the linear layer; cuda/plain.cuh: products without cuBLAS
 *   cuda/hopper.cuh        cuda/fused.cuh: products with SiLU and gates in their epilogue
 *   cuda/timestepnorm.cuh  cuda/cema.cuh  cuda/norms.cuh  cuda/queries.cuh  cuda/attention.cuh
 *   cuda/pointwise.cuh     cuda/loss.cuh: the loss and its gradient
 *   cuda/decode.cuh        one token a row: a step of generation, its TimestepNorm and CEMA
 *   cuda/decode_products.cuh  cuda/decode_attention.cuh: its products and attention, of any type and size
 *   cuda/decode_tiles.cuh  its products on the tensor cores; a layer's first kernel for one row
 *   cuda/decode_streams.cuh  its products of many weights, which come through shared memory
 *   cuda/decode_clusters.cuh  its attention in clusters of blocks
 *   cuda/timeline.cuh      where the time of a step goes, a tool
 *
 * What differs from the CPU, for speed: elementwise steps are fused (z-norm, affine and RoPE; SiLU, gate and
 * dropout; a residual rides in the product's epilogue), a backward kernel that needs a CHEAP activation's
 * inputs anyway writes that activation once more, passes that come again are recorded and replayed, layers
 * that read the same activation share products in the backward, gradients of small weights are computed
 * beside other kernels, and everything temporary lives in one scratch stack whose size create() measures by a
 * dry run.
 */
#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstring>
#include <vector>

#include "cuda/attention.cuh"
#include "cuda/cema.cuh"
#include "cuda/decode.cuh"
#include "cuda/decode_clusters.cuh"
#include "cuda/decode_streams.cuh"
#include "cuda/decode_tiles.cuh"
#include "cuda/fused.cuh"
#include "cuda/loss.cuh"
#include "cuda/megalodon_cuda.h"
#include "cuda/norms.cuh"
#include "cuda/pointwise.cuh"
#include "cuda/queries.cuh"
#include "cuda/timestepnorm.cuh"

/* The error sentence of this thread. */
static const char *errorf(const char *format, ...) {
    static thread_local char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return message;
}

/* ----------------------------------------------------------------------------------------------------------
 * 1. Kernels of the model: AdamW, norm of the gradients, the working copy of the weights
 */

enum { ARENA_ALIGN = 64, NORM_CHUNK = 65536, UPDATE_THREADS = 256, UPDATE_VEC = 4 };

/* Numbers on the device that one step's kernels hand to each other. */
struct Scalars {
    double loss, norm;
    float clip; /* factor of the gradients, 0 where the norm is not finite: then nothing may change */
};

/* computes: partial[block] = sum of g[i]^2 over the block's 65536 gradients
 * launch:   grid ceil(count / 65536), block 256: a thread adds every 256th vector
 * traffic:  4 count bytes
 * needs:    count a multiple of 4
 * numerics: double, fixed order: deterministic, the same on every device */
__global__ static void square_sums_kernel(double *partial, const float *g, int64_t count) {
    __shared__ double shared[UPDATE_THREADS / WARP_SIZE];
    int64_t first = (int64_t)blockIdx.x * NORM_CHUNK, last = min(first + NORM_CHUNK, count);
    double sum = 0;
    float value[UPDATE_VEC];
    for (int64_t i = first + threadIdx.x * UPDATE_VEC; i < last; i += UPDATE_THREADS * UPDATE_VEC) {
        load<UPDATE_VEC>(value, g + i);
#pragma unroll
        for (int j = 0; j < UPDATE_VEC; j++) sum += (double)value[j] * value[j];
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/* computes: norm = sqrt of the sum of the partial sums; clip = the factor that brings it down to `largest`
 * (0: no clipping), or 0 if the norm is not finite or above `most` (0: any may be)
 * launch:   one block of 1024: a thread adds every 1024th
 * traffic:  8 count bytes
 * needs:    nothing
 * numerics: double, fixed order: deterministic */
__global__ static void clip_kernel(Scalars *scalars, const double *partial, int64_t count, double largest,
                                   double most) {
    __shared__ double shared[SUM_THREADS / WARP_SIZE];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += SUM_THREADS) sum += partial[i];
    sum = sqrt(block_sum(sum, shared));
    if (threadIdx.x != 0) return;
    scalars->norm = sum;
    bool used = isfinite(sum) && !(most > 0 && sum > most);
    scalars->clip = !used ? 0.0f : largest > 0 && sum > largest ? (float)(largest / sum) : 1.0f;
}

struct AdamW {
    float b1, b2, lr, eps, correction1, correction2, decay;
};

/* computes: g' = clip g;  m1 = b1 m1 + (1-b1) g';  m2 = b2 m2 + (1-b2) g'^2;
 *           w = decay w - lr (m1 correction1) / (sqrt(m2 correction2) + eps);  copy = bf16 of w, if there is
 *           one
 * launch:   grid ceil(count / 1024), block 256: a thread owns 4 parameters
 * traffic:  28 count bytes, and 2 count for the copy
 * needs:    count a multiple of 4
 * numerics: float; clip 0 (a norm that is not finite or too large) changes nothing */
__global__ static void adamw_kernel(float *w, bf16 *copy, float *m1, float *m2, const float *g,
                                    const Scalars *scalars, int64_t count, AdamW adamw) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * UPDATE_VEC;
    float clip = scalars->clip, weight[UPDATE_VEC], first[UPDATE_VEC], second[UPDATE_VEC], grad[UPDATE_VEC];
    if (at >= count || clip == 0) return;
    load<UPDATE_VEC>(weight, w + at);
    load<UPDATE_VEC>(first, m1 + at);
    load<UPDATE_VEC>(second, m2 + at);
    load<UPDATE_VEC>(grad, g + at);
#pragma unroll
    for (int i = 0; i < UPDATE_VEC; i++) {
        float gradient = grad[i] * clip;
        first[i] = adamw.b1 * first[i] + (1 - adamw.b1) * gradient;
        second[i] = adamw.b2 * second[i] + (1 - adamw.b2) * gradient * gradient;
        weight[i] = adamw.decay * weight[i] - adamw.lr * (first[i] * adamw.correction1) /
                                                  (sqrtf(second[i] * adamw.correction2) + adamw.eps);
    }
    store<UPDATE_VEC>(w + at, weight);
    store<UPDATE_VEC>(m1 + at, first);
    store<UPDATE_VEC>(m2 + at, second);
    if (copy) store<UPDATE_VEC>(copy + at, weight);
}

/* computes: to[i] = from[i] in another type
 * launch:   grid ceil(count / 256), block 256: a thread owns an element
 * traffic:  (sizeof(O) + sizeof(I)) count bytes
 * needs:    nothing
 * numerics: round to nearest */
template <typename O, typename I> __global__ void convert_kernel(O *to, const I *from, int64_t count) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) to[i] = from_float<O>(to_float(from[i]));
}
template <typename O, typename I>
static void convert(Context *context, O *to, const I *from, int64_t count) {
    LAUNCH((convert_kernel<O, I>), blocks_for(count, 256), 256, context, to, from, count);
}

/* computes: out[b] = in[b] (0 where there is no state) + steps
 * launch:   grid ceil(B / 256), block 256: a thread owns a row of the batch
 * traffic:  16 B bytes
 * needs:    nothing; out may be in
 * numerics: integers */
__global__ static void count_kernel(int64_t *out, const int64_t *in, int64_t steps, int B) {
    int b = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (b < B) out[b] = (in ? in[b] : 0) + steps;
}

/* ----------------------------------------------------------------------------------------------------------
 * 2. The model
 */

/* Activations that are statistics: float whatever the activation type is. */
static constexpr bool same(const char *a, const char *b) {
    return *a == *b && (*a == 0 || same(a + 1, b + 1));
}
static constexpr bool is_statistic(const char *field) {
    return same(field, "mean") || same(field, "var") || same(field, "c_rstd") || same(field, "lse") ||
           same(field, "y_mean") || same(field, "y_rstd") || same(field, "final_mean") ||
           same(field, "final_var") || same(field, "nll");
}

/* The structs mirror the lists of megalodon.h: a pointer for each tensor, NULL where the configuration has
 * none. */
#define X(field, name, shape, ...) P *field;
template <typename P> struct LayerParams { MEGALODON_LAYER_PARAMS(X) };
template <typename P> struct ModelParams { MEGALODON_MODEL_PARAMS(X) };
#undef X
#define X(field, name, shape, ...) std::conditional_t<is_statistic(#field), float, T> *field;
template <typename T> struct LayerActs { MEGALODON_LAYER_ACTS(X) };
template <typename T> struct ModelActs { MEGALODON_MODEL_ACTS(X) };
#undef X

/* k and v have room for C tokens a row, the first n of them in use. */
template <typename T> struct LayerState {
    double *norm_mean, *norm_var;
    float *cema;
    T *k, *v;
};
/* The state of B rows after count[b] tokens. */
template <typename T> struct State {
    int B, n;
    int64_t *count; /* (B) on the device */
    std::vector<LayerState<T>> layers;
    double *final_mean, *final_var; /* (B,G) */
};

enum Kept { SAVED, CHEAP, LOGITS };
enum { MOST_KEPT = 4 }; /* CHEAP activations that there may be memory for */

/* Memory for logits. In training each block of them reads and writes the gradient of the whole output matrix,
 * so that few large blocks are faster. */
constexpr size_t LOGIT_BYTES = (size_t)128 << 20, TRAINING_LOGIT_BYTES = (size_t)512 << 20;
enum { SMALLEST_LOGIT_ROWS = 128 };

/* What the launches of a pass depend on. n: tokens before in the chunk; of a backward, the scale of the loss
 * and whether gradients are added to. */
struct PassShape {
    int B, T, n;
    bool targets;
    float scale;
    bool add;
    bool operator==(const PassShape &other) const {
        return B == other.B && T == other.T && n == other.n && targets == other.targets &&
               scale == other.scale && add == other.add;
    }
};
/* A pass that was recorded, and the shape of the last one. B 0: none. refused: there was no memory for a
 * recording; all passes are made as they come from then on. */
struct Recording {
    cudaGraphExec_t graph;
    PassShape recorded, previous;
    bool refused;
};

/* What the two precisions share, and what the table's functions see. */
struct MegalodonModel {
    MegalodonConfig config;
    MegalodonOptions options;
    MegalodonMemory memory;
    Context context;
    std::vector<void *> arenas; /* device memory, freed by destroy */
    std::vector<MegalodonTensor>
        params; /* the list of parameters and each one's place in the arenas below */
    std::vector<int64_t> offset;
    std::vector<size_t> arena_order; /* the parameters in the order of their offsets, see FOLLOWERS */
    int64_t arena_size; /* numbers in one arena, padding included (always zero) */
    float *weights, *grads, *moment1, *moment2;
    int64_t sums_size;    /* of those, the first ones are no product's: their gradients are only added to */
    bool gradients_unset; /* they count as zero, whatever is in memory: the next backward's products write */
    int kept_layers[MOST_KEPT]; /* see plan_kept */
    bool weights_changed; /* by set, since the working copy and CEMA's coefficients were made */
    std::vector<LayerParams<float>> masters, dlayers;
    ModelParams<float> dtop;
    std::vector<CemaCoefficients> coef;
    float2 *rope; /* (C,z/2) */
    double *norm_partials;
    Scalars *scalars, *host_scalars;
    float *last_logits; /* (B,V) */
    float *host_logits; /* (B,V) of at most DECODE_ROWS rows, pinned: a step writes them there */
    int *arrivals;      /* decode_attention's counters, zero between steps */
    int cluster_room;   /* see attention_cluster_room */
    std::vector<DecodePrepared> prepared; /* for each layer's opening (decode_tiles.cuh) and the final norm */
    float *opened_u;    /* (D): u of the layer that opened last, until its own states have moved on */

    MegalodonBatch batch; /* the last forward's */
    bool carried, have_dstate_out, can_backward;
    bool logits_sent; /* the last forward's logits are on their way to host_logits .. */
    bool step_runs;   /* .. and may not have come: that step may still read tokens where the host has them */
    /* One block of memory for all that a step uploads, on the host (pinned) and on the device. */
    char *host_upload, *device_upload;
    size_t upload_bytes;
    cudaEvent_t uploaded;
    int32_t *tokens, *targets; /* on the device */
    EmbeddingPlan plan;        /* arrays on the device */
    std::vector<int32_t> token_counts;
    /* Generation, reading a stream and training repeat one pass of many kernels, between which a device that
     * is handed them one by one waits: a pass that is made a second time is recorded, and from then on
     * replayed. */
    Recording forwards, backwards;
    virtual ~MegalodonModel() {}
};

template <typename T> struct Model : MegalodonModel {
    T *copy; /* the weights in T: the weights themselves, or a bf16 copy */
    std::vector<LayerParams<T>> layers;
    ModelParams<T> top;
    std::vector<LayerActs<T>> acts;
    ModelActs<T> top_acts;
    std::vector<AttentionWeights<T>> attention_weights; /* of each layer, in training */
    T *last;          /* (B,D) final_norm of the last position */
    State<T> state, state_in, dstate_in, dstate_out;
};

/* An arena is laid out twice by the same code: once to learn its size, once for real. The first time its
 * addresses are made up (not null, since null means absent). */
struct Arena {
    char *base;
    size_t used;
};
template <typename P> static P *take(Arena *arena, int64_t count) {
    size_t at = arena->used;
    arena->used += ((size_t)count * sizeof(P) + SCRATCH_ALIGN - 1) / SCRATCH_ALIGN * SCRATCH_ALIGN;
    return (P *)((uintptr_t)arena->base + at);
}

static bool is_present(const MegalodonConfig *c, MegalodonPresence presence) {
    switch (presence) {
    case MEGALODON_IF_AFFINE: return c->norm_affine;
    case MEGALODON_IF_SWIGLU: return c->swiglu;
    case MEGALODON_IF_RESCALE: return c->rescale_nffn;
    case MEGALODON_IF_UNTIED: return !c->share_emb;
    default: return true;
    }
}

static int64_t element_count(const MegalodonModel *m, const char *shape, int B, int T, int n) {
    int64_t dims[MEGALODON_MAX_DIMS], size = 1;
    int ndim = megalodon_shape(shape, &m->config, B, T, n, dims);
    for (int i = 0; i < ndim; i++) size *= dims[i];
    return size;
}

template <typename T> static void layout_weights(Model<T> *m, Arena *arena) {
    m->weights = take<float>(arena, m->arena_size);
    m->copy = std::is_same<T, float>::value ? (T *)m->weights : take<T>(arena, m->arena_size);
}
template <typename T> static void layout_gradients(Model<T> *m, Arena *arena) {
    if (m->options.training) m->grads = take<float>(arena, m->arena_size);
}
template <typename T> static void layout_moments(Model<T> *m, Arena *arena) {
    if (!m->options.training) return;
    m->moment1 = take<float>(arena, m->arena_size);
    m->moment2 = take<float>(arena, m->arena_size);
}

/* Training keeps some CHEAP activations all the same: u and v always, which the backward would have to read
 * and to write for, and within a budget those below, which it only writes once more, as many layers of the
 * first, then of the second... as fit. Those that a product's epilogue writes come first: tensor cores wait
 * for it.
 *
 * The budget: KEPT_GIB, or half of what weights, gradients and moments take, if that is more; but with it
 * all must fit 15 sixteenths of the device's memory, which leaves room for kernels and recordings. It does
 * not depend on what is free, so that one command makes one plan; only where that would not fit into what is
 * free, less is kept.
 *
 * KEPT_GIB: 2 GiB keep mega200M's step of 8 x 4096 tokens within 20 GiB of a GPU (19.80 measured on an H100
 * 80GB by `bench step`) and still hold a * r of all its layers and the hidden vector of three of twelve. */
enum { KEPT_GIB = 2 };
static const char *const kept_fields[MOST_KEPT] = {"ar", "hidden", "m", "n"};

static int64_t layer_activation_bytes(const MegalodonModel *m, const char *field) {
    const MegalodonOptions *o = &m->options;
    int64_t width = o->precision == MEGALODON_BF16_MIXED ? sizeof(bf16) : sizeof(float);
#define X(name_, name, shape, ...)                                                                          \
    if (same(field, #name_))                                                                                \
        return (int64_t)scratch_size(                                                                       \
            (size_t)(element_count(m, shape, o->max_batch, o->max_length, 0) * width));
    MEGALODON_LAYER_ACTS(X)
#undef X
    return 0;
}

/* Plans what is kept within a budget, and returns what that takes. */
static size_t plan_kept(MegalodonModel *m, size_t budget) {
    size_t all = 0;
    for (int i = 0; i < MOST_KEPT; i++) {
        size_t bytes = (size_t)layer_activation_bytes(m, kept_fields[i]), fit = (budget - all) / bytes;
        m->kept_layers[i] = fit < (size_t)m->config.num_layers ? (int)fit : m->config.num_layers;
        all += (size_t)m->kept_layers[i] * bytes;
    }
    return all;
}

/* Does training keep this CHEAP activation of a layer? */
static bool keeps(const MegalodonModel *m, int layer, const char *field) {
    for (int i = 0; i < MOST_KEPT; i++)
        if (same(field, kept_fields[i])) return layer < m->kept_layers[i];
    return same(field, "u") || same(field, "v");
}

/* An activation's own memory for the largest batch. CHEAP ones have none unless they are kept: whoever
 * computes one borrows scratch. Without a backward, layers share: `earlier` is what an earlier layer has
 * (NULL: take). */
template <typename P>
static P *take_activation(const MegalodonModel *m, Arena *arena, int layer, const char *field,
                          const char *shape, Kept kept, MegalodonPresence presence, P *earlier) {
    const MegalodonOptions *o = &m->options;
    bool own = kept == SAVED || o->keep_activations || (o->training && keeps(m, layer, field));
    if (!is_present(&m->config, presence) || !own) return nullptr;
    if (earlier && !o->keep_activations && !o->training) return earlier;
    return take<P>(arena, element_count(m, shape, o->max_batch, o->max_length, 0));
}

template <typename T> static void layout_activations(Model<T> *m, Arena *arena) {
    for (int l = 0; l < m->config.num_layers; l++) {
        /* A block reads the output of the one before while it writes its own: those alternate between two
         * buffers. */
#define X(field, name, shape, kept, presence)                                                               \
    m->acts[l].field = take_activation(m, arena, l, #field, shape, kept, presence,                          \
                                       l < (same(#field, "out") ? 2 : 1)                                    \
                                           ? (decltype(m->acts[l].field))nullptr                            \
                                           : m->acts[l - (same(#field, "out") ? 2 : 1)].field);
        MEGALODON_LAYER_ACTS(X)
#undef X
    }
#define X(field, name, shape, kept, presence)                                                               \
    m->top_acts.field =                                                                                     \
        take_activation(m, arena, -1, #field, shape, kept, presence, (decltype(m->top_acts.field))nullptr);
    MEGALODON_MODEL_ACTS(X)
#undef X
    m->last = take<T>(arena, (int64_t)m->options.max_batch * m->config.model_dim);
    if (!m->options.training) return;
    int64_t keys = m->options.carry || m->options.max_length > m->config.chunk_size ? m->config.chunk_size
                                                                                     : m->options.max_length;
    for (AttentionWeights<T> &weights : m->attention_weights) {
        int64_t rows = (int64_t)m->options.max_batch * m->options.max_length * m->config.num_heads;
        weights.pitch = weights_pitch(keys);
        weights.data = take<KeptWeight<T>>(arena, rows * weights.pitch);
    }
}

template <typename T> static void take_state(const Model<T> *m, Arena *arena, State<T> *state) {
    const MegalodonConfig *c = &m->config;
    int64_t B = m->options.max_batch, statistics = B * c->norm_num_groups;
    state->count = take<int64_t>(arena, B);
    for (LayerState<T> &layer : state->layers) {
        layer.norm_mean = take<double>(arena, statistics);
        layer.norm_var = take<double>(arena, statistics);
        layer.cema = take<float>(arena, B * c->model_dim * c->cema_ndim * 2);
        layer.k = take<T>(arena, B * c->chunk_size * c->z_dim);
        layer.v = take<T>(arena, B * c->chunk_size * c->value_dim);
    }
    state->final_mean = take<double>(arena, statistics);
    state->final_var = take<double>(arena, statistics);
}

static bool keeps_state(const MegalodonModel *m) { return m->options.carry || !m->options.training; }

/* Rows of the largest batch that decode_pass takes. */
static int64_t few_rows(const MegalodonModel *m) {
    return m->options.max_batch < DECODE_ROWS ? m->options.max_batch : (int)DECODE_ROWS;
}

/* Can a step with one row begin its layers with an opening (see decode_tiles.cuh)? It does not pay where the
 * blocks of the states' part, which stand beside those of fc2, would have to wait for a processor. */
template <typename T> static bool has_openings(const Model<T> *m) {
    const MegalodonConfig *c = &m->config;
    DecodeTiles opening = {};
    opening.products.M = 1, opening.K = c->model_dim;
    opening.opens = true, opening.opening.G = c->norm_num_groups;
    int64_t blocks = ceil_div(c->model_dim, TILE_OUTPUTS) + ceil_div(c->model_dim, TILE_MANY_CHANNELS);
    return std::is_same<T, bf16>::value && !m->options.training && c->model_dim <= TOKEN_MAX_DIM &&
           c->model_dim % TILE_CHUNK == 0 && c->ffn_hidden_dim % TILE_CHUNK == 0 &&
           blocks <= m->context.num_sms && tile_shared(opening, nullptr, nullptr) <= TILE_MAX_SHARED;
}

/* Training keeps the incoming state for the backward; inference moves one state on in place. */
template <typename T> static void layout_state(Model<T> *m, Arena *arena) {
    if (!keeps_state(m)) return;
    take_state(m, arena, &m->state);
    m->state_in = m->state;
    if (!m->options.training) return;
    take_state(m, arena, &m->state_in);
    if (!m->options.state_gradients) return;
    take_state(m, arena, &m->dstate_in);
    take_state(m, arena, &m->dstate_out);
}

template <typename T> static void layout_workspace(Model<T> *m, Arena *arena) {
    const MegalodonConfig *c = &m->config;
    int64_t rows = (int64_t)m->options.max_batch * m->options.max_length,
            states = (int64_t)c->model_dim * c->cema_ndim;
    for (CemaCoefficients &coef : m->coef)
        coef = cema_coefficients_at(take<float>(arena, states * NUM_CEMA_COEFFICIENTS), c->model_dim,
                                    c->cema_ndim);
    m->rope = take<float2>(arena, (int64_t)c->chunk_size * (c->z_dim / c->num_heads / 2));
    m->norm_partials = take<double>(arena, ceil_div(m->arena_size, NORM_CHUNK));
    m->scalars = take<Scalars>(arena, 1);
    m->last_logits = take<float>(arena, (int64_t)m->options.max_batch * c->vocab_size);
    m->arrivals = take<int>(arena, decode_attention_sizes(few_rows(m), c->num_heads,
                                                          c->value_dim / c->num_heads).arrivals);
    m->context.cublas_workspace = take<char>(arena, (int64_t)CUBLAS_WORKSPACE);
    if (m->context.side.context)
        m->context.side.context->cublas_workspace = take<char>(arena, (int64_t)CUBLAS_WORKSPACE);

    Arena upload = {arena->base + arena->used, 0};
    m->tokens = take<int32_t>(&upload, rows);
    m->targets = take<int32_t>(&upload, rows);
    if (m->options.training) {
        m->plan.order = take<int32_t>(&upload, rows);
        m->plan.segments = take<Segment>(&upload, max_segments(rows, c->vocab_size));
        m->plan.groups = take<SegmentGroup>(&upload, max_partials(rows));
    }
    m->device_upload = take<char>(arena, (int64_t)upload.used);
    if (has_openings(m)) {
        m->prepared.resize((size_t)c->num_layers + 1);
        m->opened_u = take<float>(arena, c->model_dim);
    }
    for (DecodePrepared &prepared : m->prepared) {
        prepared.response = take<float2>(arena, c->model_dim);
        prepared.moments = take<double>(arena, 2 * c->norm_num_groups + 2);
    }
    m->upload_bytes = upload.used;
}

template <typename T> static void layout_scratch(Model<T> *m, Arena *arena) {
    m->context.scratch = take<char>(arena, (int64_t)m->context.scratch_bytes);
}

static int find_param(const MegalodonModel *m, const char *name) {
    for (size_t i = 0; i < m->params.size(); i++)
        if (strcmp(m->params[i].name, name) == 0) return (int)i;
    return -1;
}

/* Layers that read the same activation: the second one's weight stands right behind the first one's, and so
 * does its gradient, so that both are one matrix of more rows. The gradients of their outputs lie side by
 * side in the backward: one product makes the gradient of what they read, and one may make all of their
 * weights'. */
static const char *const FOLLOWERS[][2] = {{"mega.wh1.weight", "mega.wr.weight"},
                                           {"mega.wr.weight", "mega.wz.weight"},
                                           {"nffn.fc1.weight", "nffn.fc3.weight"}};

/* The parameter that has to stand right behind another one, or -1. */
static int follower(const MegalodonModel *m, const char *name) {
    char full[MEGALODON_MAX_NAME];
    for (const auto &pair : FOLLOWERS) {
        const char *end = strstr(name, pair[0]);
        if (!end) continue;
        snprintf(full, sizeof full, "%.*s%s", (int)(end - name), name, pair[1]);
        return find_param(m, full);
    }
    return -1;
}
static bool follows(const char *name) {
    for (const auto &pair : FOLLOWERS)
        if (strstr(name, pair[1])) return true;
    return false;
}

template <typename P> static P *param_in(const MegalodonModel *m, P *arena, int layer, const char *name) {
    char full[MEGALODON_MAX_NAME];
    if (layer >= 0)
        snprintf(full, sizeof full, "layers.%d.%s", layer, name);
    else
        snprintf(full, sizeof full, "%s", name);
    int i = find_param(m, full);
    return i < 0 || !arena ? nullptr : arena + m->offset[(size_t)i];
}

template <typename P>
static void point_params(const MegalodonModel *m, P *arena, std::vector<LayerParams<P>> *layers,
                         ModelParams<P> *top) {
    for (int l = 0; l < m->config.num_layers; l++) {
#define X(field, name, ...) (*layers)[(size_t)l].field = param_in(m, arena, l, name);
        MEGALODON_LAYER_PARAMS(X)
#undef X
    }
#define X(field, name, ...) top->field = param_in(m, arena, -1, name);
    MEGALODON_MODEL_PARAMS(X)
#undef X
    if (m->config.share_emb) top->output_weight = top->embed_weight;
}

template <typename T> static void point_all_params(Model<T> *m) {
    ModelParams<float> unused;
    point_params(m, m->weights, &m->masters, &unused);
    point_params(m, m->copy, &m->layers, &m->top);
    point_params(m, m->grads, &m->dlayers, &m->dtop);
}

/* ---- forward ---- */

static float embedding_scale(const MegalodonConfig *c) {
    return c->scale_emb ? (float)sqrt((double)c->model_dim) : 1.0f;
}

/* The dropout of a site in the last forward: none where the batch has none. */
static Dropout dropout_at(const MegalodonModel *m, double p, int layer, MegalodonSite site) {
    if (!m->batch.dropout || p == 0) return no_dropout();
    return make_dropout(p, megalodon_dropout_key(m->batch.seed, m->batch.step, layer, site));
}

/* Memory for a CHEAP activation: its own if it is kept, else scratch. */
template <typename T> static T *room(MegalodonModel *m, T *own, int64_t count) {
    return own ? own : take<T>(&m->context, count);
}
/* Memory for something of the backward: that of an activation that nobody reads any more, or scratch if all
 * are kept. */
template <typename T> static T *over(MegalodonModel *m, T *activation, int64_t count) {
    return m->options.keep_activations ? take<T>(&m->context, count) : activation;
}

static int64_t tokens_before(const MegalodonModel *m, int n) { return m->carried ? n : 0; }

template <typename T> static AttentionKeys<T> attention_keys(const Model<T> *m, int l, const T *v) {
    const MegalodonConfig *c = &m->config;
    AttentionKeys<T> keys = {m->acts[l].k,
                             v,
                             nullptr,
                             nullptr,
                             tokens_before(m, m->state_in.n),
                             c->chunk_size,
                             m->batch.B,
                             m->batch.T,
                             c->num_heads,
                             c->z_dim / c->num_heads,
                             c->value_dim / c->num_heads,
                             c->chunk_size};
    if (m->carried) keys.k_in = m->state_in.layers[l].k, keys.v_in = m->state_in.layers[l].v;
    return keys;
}

template <typename T> static QueryShape query_shape(const Model<T> *m) {
    const MegalodonConfig *c = &m->config;
    const int64_t *count = m->carried ? m->state_in.count : nullptr;
    return QueryShape{m->batch.B * m->batch.T, count,        m->batch.T, c->num_heads,
                      c->z_dim / c->num_heads,          c->chunk_size};
}

/* a = attention(q, k, v), and the state that it leaves. One token a row at a time, without a backward, has
 * kernels of its own, which add the token to the state in place. */
template <typename T> static void model_attention(Model<T> *m, int l, const T *v) {
    const MegalodonConfig *c = &m->config;
    LayerActs<T> *a = &m->acts[l];
    int64_t B = m->batch.B, steps = m->batch.T, Z = c->z_dim, E = c->value_dim, H = c->num_heads,
            C = c->chunk_size;
    int64_t n = tokens_before(m, m->state_in.n);
    Dropout dropout = dropout_at(m, c->attention_dropout, l, MEGALODON_SITE_ATTENTION);
    if (steps == 1 && !m->options.training && dropout.threshold == 0) {
        attention_step(&m->context, a->a, a->lse, a->q, a->k, v, m->state.layers[l].k, m->state.layers[l].v,
                       m->state_in.count, B, H, Z / H, E / H, C);
        return;
    }
    attention_forward(&m->context, a->a, a->lse, m->attention_weights[l], a->q, attention_keys(m, l, v),
                      dropout);
    if (!keeps_state(m)) return;
    const LayerState<T> *in = &m->state_in.layers[l], *out = &m->state.layers[l];
    attention_state_forward(&m->context, out->k, in->k, a->k, n, C, B, steps, Z, C);
    attention_state_forward(&m->context, out->v, in->v, v, n, C, B, steps, E, C);
}

/* The mega half of a block:  y = m Wh1^T + bh1 + (a r) Wh2^T + x. x (B,T,D) is the block's input. */
template <typename T> static void mega_forward(Model<T> *m, int l, const T *x) {
    const MegalodonConfig *c = &m->config;
    const LayerParams<T> *w = &m->layers[l];
    const LayerState<T> none = {}, *in = m->carried ? &m->state_in.layers[l] : &none;
    const LayerState<T> *out = keeps_state(m) ? &m->state.layers[l] : &none;
    LayerActs<T> *a = &m->acts[l];
    Context *context = &m->context;
    ScratchScope scope(context);
    int64_t B = m->batch.B, steps = m->batch.T, rows = B * steps, D = c->model_dim, Z = c->z_dim,
            E = c->value_dim;
    float eps = (float)c->norm_eps;

    T *u = room(m, a->u, rows * D), *mm = room(m, a->m, rows * D), *v = room(m, a->v, rows * E);
    timestepnorm_forward(context, u, a->mean, a->var, out->norm_mean, out->norm_var, x, m->state_in.count,
                         in->norm_mean, in->norm_var, w->timenorm_weight, w->timenorm_bias, B, steps, D,
                         c->norm_num_groups, eps);
    linear_silu_forward<T>(context, v, a->vv, nullptr, u, w->wv_weight, w->wv_bias, nullptr, rows, E, D,
                           no_dropout());
    cema_forward(context, a->c, out->cema, u, in->cema, m->coef[l], m->masters[l].cema_omega, B, steps, D,
                 c->cema_ndim);
    rmsnorm_forward(context, mm, a->c_rstd, a->c, w->rmsnorm_weight, rows, D, eps,
                    dropout_at(m, c->hidden_dropout, l, MEGALODON_SITE_M));
    linear_forward<T>(context, a->zz, mm, w->wz_weight, w->wz_bias, nullptr, rows, Z, D);
    queries_forward(context, a->q, a->k, a->zn, a->zz, w->gamma, w->beta, m->rope, query_shape(m), eps);
    model_attention(m, l, v);
    T *ar = a->ar || a->v ? room(m, a->ar, rows * E) : v; // else v is not needed any more
    linear_silu_forward<T>(context, ar, a->rr, a->r, mm, w->wr_weight, w->wr_bias, a->a, rows, E, D,
                           dropout_at(m, c->hidden_dropout, l, MEGALODON_SITE_GATED));

    Dropout dropout = dropout_at(m, c->dropout, l, MEGALODON_SITE_H);
    const T *residual =
        dropout.threshold ? nullptr : x; // dropout stands between the products and the residual
    linear_forward<T>(context, a->y, mm, w->wh1_weight, w->wh1_bias, residual, rows, D, D);
    linear_forward<T>(context, a->y, ar, w->wh2_weight, nullptr, a->y, rows, D, E);
    if (dropout.threshold) rescale_forward<T>(context, a->y, nullptr, a->y, x, nullptr, rows, D, dropout);
}

/* The feed-forward half:  out = alpha * fc2(hidden) + x: the second hop skips from the block's input, not
 * from y. */
template <typename T> static void ffn_forward(Model<T> *m, int l, const T *x) {
    const MegalodonConfig *c = &m->config;
    const LayerParams<T> *w = &m->layers[l];
    LayerActs<T> *a = &m->acts[l];
    Context *context = &m->context;
    ScratchScope scope(context);
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim, F = c->ffn_hidden_dim;

    T *n = room(m, a->n, rows * D), *hidden = room(m, a->hidden, rows * F);
    layernorm_forward(context, n, a->y_mean, a->y_rstd, a->y, w->ffnnorm_weight, w->ffnnorm_bias, rows, D,
                      (float)c->norm_eps);
    if (c->swiglu) linear_forward<T>(context, a->f3, n, w->fc3_weight, nullptr, nullptr, rows, F, D);
    linear_silu_forward<T>(context, hidden, a->f1, nullptr, n, w->fc1_weight, nullptr, a->f3, rows, F, D,
                           dropout_at(m, c->hidden_dropout, l, MEGALODON_SITE_HIDDEN));
    Dropout dropout = dropout_at(m, c->dropout, l, MEGALODON_SITE_FFN);
    if (!c->rescale_nffn && dropout.threshold == 0) {
        linear_forward<T>(context, a->out, hidden, w->fc2_weight, nullptr, x, rows, D, F);
        return;
    }
    T *f = c->rescale_nffn ? a->f2 : a->out;
    linear_forward<T>(context, f, hidden, w->fc2_weight, nullptr, nullptr, rows, D, F);
    rescale_forward<T>(context, a->out, c->rescale_nffn ? f : nullptr, f, x, w->ffn_alpha, rows, D, dropout);
}

/* ---- backward ---- */

enum { ROW_ALIGN = 64 }; /* numbers */

/* Gradients in a block's backward: dy of the mega half's output, and side by side those of the outputs of the
 * three layers that read m, in rows of `pitch` numbers, a multiple of ROW_ALIGN, of which they are the first
 * `width`. dy is dh, unless there is a dropout between. */
template <typename T> struct MegaGradients {
    T *dy, *dh, *drr, *dzz; /* (B,T,D), (B,T,D), (B,T,E), (B,T,Z) */
    int64_t width, pitch;
    int dy_gap;
    /* between rows of so many of the columns */
    int gap(int64_t columns) const { return (int)(pitch - columns); }
};
template <typename T> static MegaGradients<T> take_mega_gradients(Model<T> *m) {
    const MegalodonConfig *c = &m->config;
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim, E = c->value_dim;
    MegaGradients<T> grad = {};
    grad.width = D + E + c->z_dim, grad.pitch = ceil_div(grad.width, ROW_ALIGN) * ROW_ALIGN;
    grad.dy = grad.dh = take<T>(&m->context, rows * grad.pitch), grad.dy_gap = grad.gap(D);
    grad.drr = grad.dh + D, grad.dzz = grad.drr + E;
    if (dropout_at(m, c->dropout, 0, MEGALODON_SITE_H).threshold)
        grad.dy = take<T>(&m->context, rows * D), grad.dy_gap = 0;
    return grad;
}

/* Backward of ffn_forward. dx = dout is read; dy becomes the gradient of the mega half's output. dx stays,
 * since out = f + x hands dout on to x unchanged. */
template <typename T>
static void ffn_backward(Model<T> *m, int l, const T *dx, const MegaGradients<T> &grad) {
    const MegalodonConfig *c = &m->config;
    const LayerParams<T> *w = &m->layers[l];
    LayerParams<float> *dw = &m->dlayers[l];
    LayerActs<T> *a = &m->acts[l];
    Context *context = &m->context;
    ScratchScope scope(context);
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim, F = c->ffn_hidden_dim;
    bool add = !m->gradients_unset;

    Dropout dropout = dropout_at(m, c->dropout, l, MEGALODON_SITE_FFN);
    const T *df = dx;
    if (c->rescale_nffn || dropout.threshold) {
        T *scaled = take<T>(context, rows * D);
        rescale_backward<T>(context, scaled, nullptr, dw->ffn_alpha, dx, a->f2, w->ffn_alpha, rows, D,
                            dropout);
        df = scaled;
    }
    T *hidden = room(m, a->hidden, rows * F), *n = room(m, a->n, rows * D);
    /* fc1 and fc3 read n: df1 and df3 lie side by side */
    int64_t both = c->swiglu ? 2 * F : F;
    T *df1 = take<T>(context, rows * both), *df3 = c->swiglu ? df1 + F : nullptr;
    int gap = (int)(both - F);
    linear_gate_backward<T>(context, df1, df3, a->hidden ? nullptr : hidden, nullptr, df, w->fc2_weight,
                            a->f1, a->f3, rows, D, F,
                            dropout_at(m, c->hidden_dropout, l, MEGALODON_SITE_HIDDEN), Gaps{gap, 0, gap});
    linear_backward_weight_aside(context, dw->fc2_weight, add, df, hidden, rows, D, F);
    side_ready(context);
    linear_backward_input(context, grad.dy, false, df1, w->fc1_weight, rows, both, D,
                          Gaps{grad.dy_gap, 0, 0});
    side_start<T>(context);
    /* y = h + bh1 + ... + x: dy's column sums are the gradient of bh1, unless there is a dropout between. */
    layernorm_backward<T>(context, grad.dy, a->n ? nullptr : n, dw->ffnnorm_weight, dw->ffnnorm_bias,
                          grad.dy == grad.dh ? dw->wh1_bias : nullptr, grad.dy, a->y_mean, a->y_rstd, a->y,
                          w->ffnnorm_weight, w->ffnnorm_bias, rows, D, grad.dy_gap);
    linear_backward_weight(context, dw->fc1_weight, add, df1, n, rows, both, D);
    side_join(context);
    add_sums(context);
}

/* Backward of mega_forward. In: dy, and in dx what x got from the second hop. Out: dx, whole. */
template <typename T>
static void mega_backward(Model<T> *m, int l, const T *x, T *dx, const MegaGradients<T> &grad) {
    const MegalodonConfig *c = &m->config;
    const LayerParams<T> *w = &m->layers[l];
    const LayerParams<float> *master = &m->masters[l];
    LayerParams<float> *dw = &m->dlayers[l];
    const LayerState<T> none = {}, *in = m->carried ? &m->state_in.layers[l] : &none;
    const LayerState<T> *din = m->carried && m->options.state_gradients ? &m->dstate_in.layers[l] : &none;
    const LayerState<T> *dout = m->have_dstate_out ? &m->dstate_out.layers[l] : &none;
    LayerActs<T> *a = &m->acts[l];
    Context *context = &m->context;
    ScratchScope scope(context);
    int64_t B = m->batch.B, steps = m->batch.T, rows = B * steps, D = c->model_dim, Z = c->z_dim,
            E = c->value_dim;
    int64_t C = c->chunk_size, G = c->norm_num_groups, n = tokens_before(m, m->state_in.n);
    float eps = (float)c->norm_eps;
    bool add = !m->gradients_unset;

    /* y = dropout(m Wh1^T + bh1 + ar Wh2^T) + x,  ar = dropout(a silu(rr)) */
    T *dh = grad.dh, *drr = grad.drr, *dzz = grad.dzz;
    if (grad.dy != dh) { // else ffn_backward has summed dy's columns
        dropout_forward<T>(context, dh, grad.dy, rows, D, dropout_at(m, c->dropout, l, MEGALODON_SITE_H),
                           grad.gap(D));
        add_column_sums(context, dw->wh1_bias, dh, rows, D, grad.gap(D));
    }
    /* This is the last time that rr is read, element by element: unless v takes its place, ar may. y has been
     * read by ffn_backward. */
    T *da = take<T>(context, rows * E), *dm = over(m, a->y, rows * D);
    T *ar = a->ar ? a->ar : a->v ? a->rr : take<T>(context, rows * E);
    linear_gate_backward<T>(context, drr, da, a->ar ? nullptr : ar, dw->wr_bias, dh, w->wh2_weight, a->rr,
                            a->a, rows, D, E, dropout_at(m, c->hidden_dropout, l, MEGALODON_SITE_GATED),
                            Gaps{grad.gap(E), grad.gap(D), 0});
    linear_backward_weight_aside(context, dw->wh2_weight, add, dh, ar, rows, D, E, Gaps{0, grad.gap(D), 0});

    /* a = attention(q, k, v), v = silu(u Wv^T + bv), q and k from z. rr and a have been read for the last
     * time. */
    T *v = a->v ? a->v : a->rr, *dv = over(m, a->a, rows * E);
    if (!a->v) silu_forward(context, v, a->vv, rows * E);
    AttentionKeys<T> keys = attention_keys(m, l, (const T *)v);
    bool through = silu_fits(context, keys, dv, da, a->vv); // dv becomes vv's gradient there
    {
        ScratchScope queries(context);
        T *dq = take<T>(context, rows * Z), *dk = take<T>(context, rows * Z);
        attention_backward<T>(context, dq, dk, dv, din->k, din->v, da, m->attention_weights[l], a->q, keys,
                              through ? a->vv : nullptr, through ? dw->wv_bias : nullptr,
                              dropout_at(m, c->attention_dropout, l, MEGALODON_SITE_ATTENTION));
        if (m->have_dstate_out) {
            attention_state_backward<T>(context, din->k, dk, dout->k, n, C, B, steps, Z, C);
            attention_state_backward<T>(context, din->v, dv, dout->v, n, C, B, steps, E, C);
        }
        queries_backward<T>(context, dzz, dw->gamma, dw->beta, dw->wz_bias, dq, dk, a->zz, w->gamma, m->rope,
                            query_shape(m), eps, grad.gap(Z));
    }

    /* m = dropout(rmsnorm(c)): the backward brings m back, which the weights of the three layers that read it
     * wait for. dm = [dh drr dzz] [Wh1; Wr; Wz] is one product, see FOLLOWERS. */
    T *mm = room(m, a->m, rows * D), *u = room(m, a->u, rows * D), *du = take<T>(context, rows * D);
    Gaps gaps = {0, grad.gap(grad.width), 0};
    side_ready(context);
    linear_backward_input(context, dm, false, dh, w->wh1_weight, rows, grad.width, D, gaps);
    side_start<T>(context);
    if (!through) silu_backward<T>(context, dv, dw->wv_bias, dv, a->vv, rows, E);
    rmsnorm_backward<T>(context, dm, a->m ? nullptr : mm, dw->rmsnorm_weight, dm, a->c_rstd, a->c,
                        w->rmsnorm_weight, rows, D, dropout_at(m, c->hidden_dropout, l, MEGALODON_SITE_M));
    /* The weights of all three: small ones by one product, on the multiprocessors that CEMA leaves idle or
     * beside what comes after; large ones one by one, since their tiles fit the device better (265.3 against
     * 268.3 ms for a step of mega1.3B on an H100). */
    if (context->side.context) {
        linear_backward_weight_aside(context, dw->wh1_weight, add, dh, mm, rows, grad.width, D, gaps);
    } else {
        linear_backward_weight(context, dw->wh1_weight, add, dh, mm, rows, D, D, Gaps{0, grad.gap(D), 0});
        linear_backward_weight(context, dw->wr_weight, add, drr, mm, rows, E, D, Gaps{0, grad.gap(E), 0});
        linear_backward_weight(context, dw->wz_weight, add, dzz, mm, rows, Z, D, Gaps{0, grad.gap(Z), 0});
    }
    int idle = cema_idle(context, B, steps, D);
    if (side_fits(context, idle)) {
        side_ready(context);
        side_start<T>(context, idle);
    }

    /* c = cema(u), u = timestepnorm(x); x also got dy from the first hop and dx from the second. CEMA writes
     * du and the product of v's layer adds to it, reading du under its arithmetic. */
    if (!a->u)
        timestepnorm_again<T>(context, u, a->mean, a->var, x, w->timenorm_weight, w->timenorm_bias, rows, D,
                              G, eps);
    cema_backward<T>(context, du, din->cema, dw->cema_alpha, dw->cema_delta, dw->cema_theta, dw->cema_gamma,
                     dw->cema_omega, dm, dout->cema, u, in->cema, m->coef[l], master->cema_alpha,
                     master->cema_delta, master->cema_theta, master->cema_omega, B, steps, D, c->cema_ndim);
    linear_backward_weight_aside(context, dw->wv_weight, add, dv, u, rows, E, D);
    side_ready(context);
    linear_backward_input(context, du, true, dv, w->wv_weight, rows, E, D);
    side_start<T>(context);
    timestepnorm_backward<T>(context, dx, din->norm_mean, din->norm_var, dw->timenorm_weight,
                             dw->timenorm_bias, du, dout->norm_mean, dout->norm_var, dx, grad.dy, a->mean,
                             a->var, x, m->state_in.count, in->norm_mean, w->timenorm_weight, B, steps, D, G,
                             eps, grad.dy_gap);
    side_join(context);
    add_sums(context);
}

/* ---- the head ---- */

/* The loss is the last thing of a forward and its gradient the first of the backward. In training both are
 * made in the forward, while a block's logits are there, so that no logits are computed twice or held for all
 * tokens. The scale of the gradient is known to the backward only, and is applied there. Until then the two
 * gradients lie at the bottom of the scratch stack, which nothing else uses between a forward and its
 * backward. */
template <typename T> struct HeadGradients {
    T *dfinal;      /* (B,T,D) */
    float *dweight; /* (V,D) */
};
template <typename T> static HeadGradients<T> take_head_gradients(Model<T> *m) {
    const MegalodonConfig *c = &m->config;
    REQUIRE(m->context.scratch_used == 0);
    T *dfinal = take<T>(&m->context, (int64_t)m->batch.B * m->batch.T * c->model_dim);
    return HeadGradients<T>{dfinal, take<float>(&m->context, (int64_t)c->vocab_size * c->model_dim)};
}

/* How many rows of logits fit into the memory for them; a block is about as large and never larger. */
template <typename T> static int64_t most_logit_rows(const Model<T> *m, int64_t rows) {
    size_t bytes = m->options.training ? TRAINING_LOGIT_BYTES : LOGIT_BYTES;
    int64_t fit = (int64_t)(bytes / sizeof(T)) / m->config.vocab_size;
    if (fit < SMALLEST_LOGIT_ROWS) fit = SMALLEST_LOGIT_ROWS;
    return fit < rows ? fit : rows;
}

/* logits = final Wout^T, a block of rows at a time:  nll = cross_entropy(logits, targets); in training also
 * dlogits = softmax(logits) - onehot(targets);  dfinal = dlogits Wout;  dWout = dlogits^T final */
template <typename T> static void head_forward(Model<T> *m, HeadGradients<T> grad, const T *final) {
    const MegalodonConfig *c = &m->config;
    Context *context = &m->context;
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim, V = c->vocab_size;
    T *kept = m->top_acts.logits;
    if (!m->batch.targets && !kept) return;
    ScratchScope scope(context);
    int64_t most = most_logit_rows(m, rows), block = ceil_div(ceil_div(rows, ceil_div(rows, most)), 8) * 8;
    if (block > most) block = most; // blocks of about the same size, a multiple of 8 where it can be
    T *memory = take<T>(context, most * V);
    for (int64_t r = 0; r < rows; r += block) {
        int64_t count = rows - r < block ? rows - r : block;
        T *logits = kept ? kept + r * V : memory;
        linear_forward<T>(context, logits, final + r * D, m->top.output_weight, nullptr, nullptr, count, V,
                          D);
        if (!m->batch.targets) continue;
        if (!m->options.training) {
            cross_entropy_forward<T>(context, m->top_acts.nll + r, nullptr, logits, m->targets + r, count, V);
            continue;
        }
        loss_and_gradient<T>(context, memory, m->top_acts.nll + r, logits, m->targets + r, count, V);
        linear_backward_input(context, grad.dfinal + r * D, false, memory, m->top.output_weight, count, V, D);
        linear_backward_weight(context, grad.dweight, r > 0, memory, final + r * D, count, V, D);
    }
}

/* The scale of the loss on the gradients that head_forward left. Returns dfinal, which stays at the bottom of
 * scratch. */
template <typename T> static T *head_backward(Model<T> *m, float scale) {
    const MegalodonConfig *c = &m->config;
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim, V = c->vocab_size;
    {
        ScratchScope scope(&m->context);
        HeadGradients<T> grad = take_head_gradients(m);
        scale_in_place(&m->context, grad.dfinal, scale, rows * D);
        copy_scaled(&m->context, m->dtop.output_weight, grad.dweight, scale,
                    !m->gradients_unset || c->share_emb, V * D);
    }
    return take<T>(&m->context, rows * D);
}

/* ---- whole passes: no error, no wait, so that a dry run can make them too ---- */

template <typename T> static void forward_pass(Model<T> *m) {
    const MegalodonConfig *c = &m->config;
    Context *context = &m->context;
    ScratchScope scope(context);
    int64_t B = m->batch.B, steps = m->batch.T, rows = B * steps, D = c->model_dim;
    HeadGradients<T> head = {};
    if (m->options.training) head = take_head_gradients(m);
    T *x = m->top_acts.embed;
    embedding_forward<T>(context, x, m->tokens, m->top.embed_weight, embedding_scale(c), rows, D,
                         dropout_at(m, c->dropout, -1, MEGALODON_SITE_EMBED));
    for (int l = 0; l < c->num_layers; l++) {
        mega_forward<T>(m, l, x);
        ffn_forward<T>(m, l, x);
        x = m->acts[l].out;
    }
    ModelActs<T> *a = &m->top_acts;
    T *final = room(m, a->final, rows * D);
    bool keeps = keeps_state(m);
    timestepnorm_forward<T>(context, final, a->final_mean, a->final_var,
                            keeps ? m->state.final_mean : nullptr, keeps ? m->state.final_var : nullptr, x,
                            m->state_in.count, m->carried ? m->state_in.final_mean : nullptr,
                            m->carried ? m->state_in.final_var : nullptr, m->top.final_weight,
                            m->top.final_bias, B, steps, D, c->norm_num_groups, (float)c->norm_eps);
    if (keeps)
        LAUNCH(count_kernel, blocks_for(B, 256), 256, context, m->state.count,
               m->carried ? m->state_in.count : nullptr, steps, (int)B);
    copy_rows(context, m->last, (size_t)D * sizeof(T), final + (steps - 1) * D,
              (size_t)(steps * D) * sizeof(T), (size_t)D * sizeof(T), (size_t)B);
    head_forward<T>(m, head, final);
}

/* Where `device` memory of the upload lies on the host. */
template <typename P> static P *on_host(const MegalodonModel *m, P *device) {
    return (P *)(m->host_upload + ((char *)device - m->device_upload));
}

/* ---- one token a row ---- */

/* One token a row, no loss, nothing kept: its kernels find the place in the chunk on the device and the
 * state stays where it is, so that the same launches serve every token. */
static bool is_step(const MegalodonModel *m) {
    return m->batch.T == 1 && !m->options.training && !m->options.keep_activations && !m->batch.targets &&
           !m->batch.dropout;
}
/* Of those, what the fused kernels take. */
static bool is_decode_step(const MegalodonModel *m) {
    int z = m->config.z_dim / m->config.num_heads;
    return is_step(m) && m->batch.B <= DECODE_ROWS && z <= DECODE_MAX_HEAD;
}

template <typename T>
static DecodeProduct<T> decode_product(const T *weight, const T *bias, const T *x, int64_t N, int64_t K) {
    DecodeProduct<T> q = {};
    q.weight = weight, q.bias = bias, q.x = x, q.N = (int)N, q.K = (int)K;
    return q;
}
template <typename T> static DecodeProducts<T> decode_group(const MegalodonModel *m) {
    DecodeProducts<T> p = {};
    p.M = m->batch.B, p.eps = (float)m->config.norm_eps;
    return p;
}

/* Does layer l (num_layers: the final norm) begin with an opening? There is no layer -1. */
static bool opens(const MegalodonModel *m, int l) {
    return l >= 0 && m->batch.B == 1 && !m->prepared.empty();
}

/* What the opening of layer l, or the final norm, reads and writes. */
template <typename T> static DecodeOpening decode_opening(const Model<T> *m, int l) {
    DecodeOpening opening = {};
    if constexpr (std::is_same<T, bf16>::value) {
        bool final_norm = l == m->config.num_layers;
        opening.prepared = m->prepared[l];
        if (final_norm) opening.prepared.response = nullptr;
        opening.weight = final_norm ? m->top.final_weight : m->layers[l].timenorm_weight;
        opening.bias = final_norm ? m->top.final_bias : m->layers[l].timenorm_bias;
        opening.mean = final_norm ? m->state.final_mean : m->state.layers[l].norm_mean;
        opening.var = final_norm ? m->state.final_var : m->state.layers[l].norm_var;
        opening.u = m->opened_u, opening.G = m->config.norm_num_groups;
    }
    return opening;
}

/* The states' part of layer l: what layer l + 1 opens with and, where l has opened, the move of its own. */
template <typename T> static DecodeStates decode_states_of(const Model<T> *m, int l) {
    const MegalodonConfig *c = &m->config;
    DecodeStates states = {};
    bool last = l + 1 == c->num_layers;
    states.prepared = m->prepared[l + 1];
    if (last) states.prepared.response = nullptr;
    else states.coef = m->coef[l + 1], states.h = m->state.layers[l + 1].cema,
         states.omega = m->masters[l + 1].cema_omega;
    states.mean = last ? m->state.final_mean : m->state.layers[l + 1].norm_mean;
    states.var = last ? m->state.final_var : m->state.layers[l + 1].norm_var;
    states.count = m->state.count;
    if (opens(m, l))
        states.own_coef = m->coef[l], states.own_h = m->state.layers[l].cema, states.u = m->opened_u;
    states.D = c->model_dim, states.G = c->norm_num_groups, states.N = c->cema_ndim;
    return states;
}

/* The first kernel of a step whose layers open. */
template <typename T> static void decode_step_token(Model<T> *m, const DecodeNorm<T> &norm) {
    if constexpr (std::is_same<T, bf16>::value)
        decode_token(&m->context, DecodeToken{decode_states_of(m, -1), norm.embedded, norm.embed,
                                              norm.tokens, norm.scale, 0});
}

/* Products with an opening, or with the states' part beside them. */
template <typename T>
static void decode_step_tiles(Model<T> *m, const char *name, const DecodeProducts<T> &products,
                              const DecodeOpening *opening, const DecodeStates *states) {
    if constexpr (std::is_same<T, bf16>::value) {
        DecodeTiles tiles = {};
        tiles.products = products;
        if (opening) tiles.opening = *opening, tiles.opens = true;
        if (states) tiles.states = *states;
        REQUIRE(tiles_fit(&tiles));
        decode_tiles(&m->context, name, tiles);
    }
}

/* mega_forward for a step. norm: what this block's TimestepNorm and CEMA read and write. Returns y. */
template <typename T> static T *mega_step(Model<T> *m, int l, const T *x, DecodeNorm<T> norm) {
    const MegalodonConfig *c = &m->config;
    const LayerParams<T> *w = &m->layers[l];
    LayerState<T> *state = &m->state.layers[l];
    LayerActs<T> *a = &m->acts[l];
    Context *context = &m->context;
    ScratchScope scope(context);
    int64_t B = m->batch.B, D = c->model_dim, Z = c->z_dim, E = c->value_dim, H = c->num_heads, e = E / H;
    DecodeAttentionSizes sizes = decode_attention_sizes(B, H, e);
    T *u = take<T>(context, B * D), *h = take<T>(context, B * D), *ar = take<T>(context, B * E);
    float *partial = take<float>(context, sizes.partial);
    float2 *parts = take<float2>(context, sizes.parts);

    norm.u = u, norm.c = a->c, norm.h = state->cema, norm.coef = m->coef[l];
    norm.omega = m->masters[l].cema_omega, norm.mean = state->norm_mean, norm.var = state->norm_var;
    norm.weight = w->timenorm_weight, norm.bias = w->timenorm_bias;
    if (!opens(m, l)) decode_norm(context, norm, B);

    /* zz, r = silu(rr) and h = m Wh1^T + bh1 + x read m = rmsnorm(c); v = silu(vv) reads u */
    const T *average = opens(m, l) ? x : a->c, *normed = opens(m, l) ? x : u;
    DecodeProducts<T> p = decode_group<T>(m);
    p.product[p.number++] = decode_product<T>(w->wz_weight, w->wz_bias, average, Z, D);
    p.product[p.number++] = decode_product<T>(w->wr_weight, w->wr_bias, average, E, D);
    p.product[p.number++] = decode_product<T>(w->wh1_weight, w->wh1_bias, average, D, D);
    p.product[p.number++] = decode_product<T>(w->wv_weight, w->wv_bias, normed, E, D);
    for (int i = 0; i < p.number; i++) {
        bool is_v = i == p.number - 1;
        if (opens(m, l)) p.product[i].input = is_v ? DECODE_NORMED : DECODE_AVERAGED;
        else p.product[i].input = is_v ? DECODE_PLAIN : DECODE_RMSNORM;
        if (opens(m, l) || !is_v) p.product[i].norm_weight = w->rmsnorm_weight;
    }
    DecodeProduct<T> *zz = p.product, *r = p.product + 1, *h1 = p.product + 2, *v = p.product + 3;
    zz->out = a->zz;
    r->out = a->rr, r->silu = true;
    h1->out = h, h1->add = x;
    v->out = state->v, v->silu = true, v->count = m->state.count, v->C = c->chunk_size;
    if (opens(m, l)) {
        DecodeOpening opening = decode_opening(m, l);
        decode_step_tiles<T>(m, "opening z r h1 v", p, &opening, nullptr);
    } else {
        decode_step_products<T>(context, "z r h1 v", p);
    }

    DecodeAttention<T> attention = {ar, state->k, partial, parts, m->arrivals, a->zz, a->rr, state->v,
                                    w->gamma, w->beta, m->rope, m->state.count, (int)H, (int)(Z / H),
                                    (int)e, c->chunk_size, (float)c->norm_eps, 0};
    decode_step_attention(context, attention, B, m->cluster_room);

    p = decode_group<T>(m);
    p.product[p.number++] = decode_product<T>(w->wh2_weight, nullptr, ar, D, E);
    p.product[0].out = a->y, p.product[0].add = h;
    decode_step_products<T>(context, "h2", p);
    return a->y;
}

/* ffn_forward for a step */
template <typename T> static void ffn_step(Model<T> *m, int l, T *out, const T *x, const T *y) {
    const MegalodonConfig *c = &m->config;
    const LayerParams<T> *w = &m->layers[l];
    Context *context = &m->context;
    ScratchScope scope(context);
    int64_t D = c->model_dim, F = c->ffn_hidden_dim;
    T *hidden = take<T>(context, m->batch.B * F);

    DecodeProducts<T> p = decode_group<T>(m);
    p.product[p.number++] = decode_product<T>(w->fc1_weight, nullptr, y, F, D);
    p.product[0].out = hidden, p.product[0].silu = true, p.product[0].second = w->fc3_weight;
    p.product[0].input = DECODE_LAYERNORM;
    p.product[0].norm_weight = w->ffnnorm_weight, p.product[0].norm_bias = w->ffnnorm_bias;
    decode_step_products<T>(context, "fc1", p);

    p = decode_group<T>(m);
    p.product[p.number++] = decode_product<T>(w->fc2_weight, nullptr, hidden, D, F);
    p.product[0].out = out, p.product[0].scale = w->ffn_alpha, p.product[0].add = x;
    if (opens(m, l + 1)) {
        DecodeStates states = decode_states_of(m, l);
        decode_step_tiles<T>(m, "fc2, states", p, nullptr, &states);
    } else {
        decode_step_products<T>(context, "fc2", p);
    }
}

/* forward_pass for a step, and the logits, which are what a step is made for: the first kernel reads the
 * tokens where the host has them, and the last one writes the logits there. */
template <typename T> static void decode_pass(Model<T> *m) {
    const MegalodonConfig *c = &m->config;
    Context *context = &m->context;
    int64_t B = m->batch.B, V = c->vocab_size;
    DecodeNorm<T> norm = {};
    norm.embed = m->top.embed_weight, norm.embedded = m->top_acts.embed;
    norm.tokens = context->dry_run ? m->tokens : on_host(m, m->tokens);
    norm.scale = embedding_scale(c), norm.count = m->state.count, norm.eps = (float)c->norm_eps;
    norm.D = c->model_dim, norm.G = c->norm_num_groups, norm.N = c->cema_ndim;
    T *x = m->top_acts.embed;
    timeline_begin();
    if (opens(m, 0)) decode_step_token(m, norm);
    for (int l = 0; l < c->num_layers; l++) {
        T *y = mega_step(m, l, x, norm);
        ffn_step(m, l, m->acts[l].out, x, y);
        norm.tokens = nullptr, norm.x = x = m->acts[l].out;
        timeline_next_layer();
    }
    bool opening = opens(m, c->num_layers);
    norm.u = m->last, norm.mean = m->state.final_mean, norm.var = m->state.final_var;
    norm.weight = m->top.final_weight, norm.bias = m->top.final_bias;
    if (!opening) decode_norm(context, norm, B);

    DecodeProducts<T> p = decode_group<T>(m);
    p.product[p.number++] =
        decode_product<T>(m->top.output_weight, nullptr, opening ? x : m->last, V, c->model_dim);
    p.product[0].wide_out = m->host_logits;
    p.advance = m->state.count; // all that read the counts have ended when this kernel writes
    if (opening) {
        DecodeOpening final_norm = decode_opening(m, c->num_layers);
        p.product[0].input = DECODE_NORMED;
        decode_step_tiles<T>(m, "final norm, logits", p, &final_norm, nullptr);
    } else {
        decode_step_products<T>(context, "logits", p);
    }
}

/* All but the embedding's gradient. The gradient of its output is at the bottom of scratch after that. */
template <typename T> static void backward_pass(Model<T> *m, double scale) {
    const MegalodonConfig *c = &m->config;
    Context *context = &m->context;
    ScratchScope scope(context);
    int64_t B = m->batch.B, steps = m->batch.T, D = c->model_dim, G = c->norm_num_groups;
    bool din = m->carried && m->options.state_gradients;
    float eps = (float)c->norm_eps;
    ModelActs<T> *a = &m->top_acts;
    const T *last = m->acts[c->num_layers - 1].out;
    if (m->gradients_unset) clear(context, m->grads, (size_t)m->sums_size * sizeof(float));
    T *dx = head_backward(m, (float)scale);
    MegaGradients<T> grad = take_mega_gradients(m);
    timestepnorm_backward<T>(context, dx, din ? m->dstate_in.final_mean : nullptr,
                             din ? m->dstate_in.final_var : nullptr, m->dtop.final_weight,
                             m->dtop.final_bias, dx, m->have_dstate_out ? m->dstate_out.final_mean : nullptr,
                             m->have_dstate_out ? m->dstate_out.final_var : nullptr, nullptr, nullptr,
                             a->final_mean, a->final_var, last, m->state_in.count,
                             m->carried ? m->state_in.final_mean : nullptr, m->top.final_weight, B, steps, D,
                             G, eps);
    add_sums(context);
    for (int l = c->num_layers - 1; l >= 0; l--) {
        ffn_backward<T>(m, l, dx, grad);
        mega_backward<T>(m, l, l ? m->acts[l - 1].out : a->embed, dx, grad);
    }
}

/* The end of the backward, whose launches depend on the tokens. dx is where backward_pass has left it. */
template <typename T> static void embedding_pass(Model<T> *m) {
    const MegalodonConfig *c = &m->config;
    Context *context = &m->context;
    ScratchScope scope(context);
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim;
    REQUIRE(context->scratch_used == 0);
    const T *dx = take<T>(context, rows * D);
    embedding_backward<T>(context, m->dtop.embed_weight, dx, m->plan, embedding_scale(c), rows, D,
                          dropout_at(m, c->dropout, -1, MEGALODON_SITE_EMBED));
}

/* ---- create and destroy ---- */

/* Walks through the largest passes without launching anything: the high-water mark of scratch is what a step
 * needs. Every launcher's need grows with B, T and with n > 0, so that these passes stand for all. */
template <typename T> static size_t measure_scratch(Model<T> *m) {
    Context *context = &m->context;
    context->dry_run = true;
    context->scratch = no_scratch();
    context->scratch_used = context->scratch_peak = 0;
    static const int32_t some_target = 0;
    const int lengths[] = {1, m->options.max_length};
    for (int steps : lengths) {
        m->batch = MegalodonBatch{};
        m->batch.B = m->options.max_batch, m->batch.T = steps;
        m->batch.targets = &some_target;
        m->batch.dropout = true;
        for (int with_dropout = 0; with_dropout < 2; with_dropout++) {
            m->batch.dropout = with_dropout;
            m->carried = keeps_state(m);
            m->state_in.n = m->config.chunk_size > 1 && m->carried ? 1 : 0;
            m->have_dstate_out = m->options.training && m->options.state_gradients;
            forward_pass(m);
            if (m->options.training) {
                backward_pass(m, 1);
                embedding_pass(m);
            }
        }
        if (!m->options.training) {
            m->batch.B = (int)few_rows(m);
            decode_pass(m);
        }
    }
    size_t peak = context->scratch_peak;
    m->batch = MegalodonBatch{};
    m->carried = m->have_dstate_out = false;
    m->state_in.n = 0;
    context->dry_run = false;
    context->scratch_peak = 0;
    return peak;
}

/* Sizes an arena with its layout function. */
template <typename T> static size_t measure(Model<T> *m, void (*layout)(Model<T> *, Arena *)) {
    Arena arena = {(char *)(uintptr_t)SCRATCH_ALIGN, 0};
    layout(m, &arena);
    return arena.used;
}

/* Allocates an arena zeroed, and lays it out. */
template <typename T>
static const char *build_arena(Model<T> *m, void (*layout)(Model<T> *, Arena *), int64_t *bytes) {
    Arena arena = {nullptr, 0};
    size_t size = measure(m, layout);
    if (size == 0) return nullptr;
    if (!CHECK_CUDA_UNLESS(cudaErrorMemoryAllocation, cudaMalloc((void **)&arena.base, size))) {
        size_t free_bytes = 0, all = 0;
        CHECK_CUDA(cudaMemGetInfo(&free_bytes, &all));
        return errorf("out of device memory: asked for %.2f GiB (%zu bytes) in one piece, and %.2f GiB (%zu "
                      "bytes) are free; a smaller batch needs less, and other programs may use the device",
                      (double)size / (1 << 30), size, (double)free_bytes / (1 << 30), free_bytes);
    }
    m->arenas.push_back(arena.base);
    CHECK_CUDA(cudaMemset(arena.base, 0, size));
    *bytes += (int64_t)size;
    layout(m, &arena);
    return nullptr;
}

/* Is the gradient one matrix product? Then the first one after zero_gradients need not be added to zeros. */
static bool has_product_gradient(const MegalodonTensor *tensor) {
    return tensor->init == MEGALODON_INIT_HE || strcmp(tensor->name, "output.output.weight") == 0;
}

/* How much may be kept that need not be. */
static size_t kept_budget(const MegalodonModel *m) {
    const MegalodonOptions *o = &m->options;
    if (!o->training || o->keep_activations) return 0;
    size_t copy = o->precision == MEGALODON_BF16_MIXED ? sizeof(bf16) : 0;
    size_t half = (size_t)m->arena_size * (4 * sizeof(float) + copy) / 2; // weights, gradients, two moments
    return half > (size_t)KEPT_GIB << 30 ? half : (size_t)KEPT_GIB << 30;
}

/* Is there enough memory, before any is taken? bytes_needed() is asked after a plan of what is kept was made.
 * Error: how much is needed at least, how much is free, and the largest batch, by halves, that would fit. */
template <typename F> static const char *check_bytes(MegalodonModel *m, F bytes_needed) {
    const MegalodonConfig *c = &m->config;
    MegalodonOptions *options = &m->options;
    int B = options->max_batch, T = options->max_length, widest = c->model_dim;
    for (int size : {c->z_dim, c->value_dim, c->ffn_hidden_dim, c->vocab_size}) widest = max(widest, size);
    double tensor = (double)widest * B * max(T, c->chunk_size) * sizeof(float);
    if (tensor > 0x1p42) // the products below could not be counted
        return errorf("batch %d x length %d: this model would need %.0f bytes for a single tensor; make it "
                      "smaller, or the batch, or the sequence",
                      B, T, tensor);
    size_t free_bytes = 0, all = 0, needed = bytes_needed();
    CHECK_CUDA(cudaMemGetInfo(&free_bytes, &all));
    size_t limit = free_bytes;
    if (options->max_bytes > 0 && (size_t)options->max_bytes < limit) limit = (size_t)options->max_bytes;
    if (needed <= limit) {
        size_t with_kept = all / 16 * 15, kept = plan_kept(m, kept_budget(m));
        if (with_kept > limit) with_kept = limit;
        while ((needed = bytes_needed()) > with_kept && kept > 0) { // the plan that stays is measured
            size_t over = needed - with_kept;
            kept = plan_kept(m, kept > over ? kept - over : 0);
        }
        return nullptr;
    }
    int fitting = B / 2;
    while (options->max_batch = fitting, fitting > 0 && bytes_needed() > limit) fitting /= 2;
    options->max_batch = B;
    char hint[96] = "not even one row would fit: make the model or the sequence smaller";
    if (fitting > 0)
        snprintf(hint, sizeof hint, "a batch of %d row%s would fit", fitting, fitting == 1 ? "" : "s");
    return errorf("this model needs %.2f GiB of device memory (%zu bytes) for a batch of %d x %d tokens, and "
                  "%.2f GiB (%zu bytes) are free; %s",
                  (double)needed / (1 << 30), needed, B, T, (double)limit / (1 << 30), limit, hint);
}

template <typename T> static const char *build(Model<T> *m) {
    const MegalodonConfig *c = &m->config;
    size_t L = (size_t)c->num_layers;
    m->params.resize((size_t)megalodon_tensors(c, MEGALODON_PARAM, 1, 1, 0, nullptr, 0));
    megalodon_tensors(c, MEGALODON_PARAM, 1, 1, 0, m->params.data(), (int)m->params.size());
    m->offset.resize(m->params.size());
    for (int products = 0; products < 2; products++) {
        for (size_t i = 0; i < m->params.size(); i++) {
            if (has_product_gradient(&m->params[i]) != (bool)products || follows(m->params[i].name)) continue;
            for (int next = (int)i; next >= 0; next = follower(m, m->params[(size_t)next].name)) {
                m->offset[(size_t)next] = m->arena_size;
                m->arena_order.push_back((size_t)next);
                m->arena_size += m->params[(size_t)next].size;
            }
            m->arena_size = ceil_div(m->arena_size, ARENA_ALIGN) * ARENA_ALIGN;
        }
        if (!products) m->sums_size = m->arena_size;
    }
    m->masters.resize(L), m->dlayers.resize(L), m->layers.resize(L), m->acts.resize(L), m->coef.resize(L);
    m->attention_weights.resize(L);
    State<T> *states[] = {&m->state, &m->state_in, &m->dstate_in, &m->dstate_out};
    for (State<T> *state : states) state->layers.resize(L);
    m->token_counts.resize((size_t)c->vocab_size);

    struct {
        void (*layout)(Model<T> *, Arena *);
        int64_t *bytes;
    } const arenas[] = {
        {layout_weights<T>, &m->memory.parameters}, {layout_gradients<T>, &m->memory.gradients},
        {layout_moments<T>, &m->memory.moments},    {layout_activations<T>, &m->memory.activations},
        {layout_state<T>, &m->memory.state},        {layout_workspace<T>, &m->memory.workspace},
        {layout_scratch<T>, &m->memory.workspace}};
    auto bytes_needed = [&] {
        size_t needed = 0;
        for (const auto &arena : arenas) {
            if (arena.layout == layout_scratch<T>) {
                point_all_params(m);
                m->context.scratch_bytes = measure_scratch(m);
            }
            needed += measure(m, arena.layout);
        }
        return needed;
    };
    const char *refusal = check_bytes(m, bytes_needed);
    if (refusal) return refusal;
    for (const auto &arena : arenas) {
        const char *error = build_arena(m, arena.layout, arena.bytes);
        if (error) return error;
    }
    CHECK_CUDA(
        cudaDeviceSynchronize()); // the zeros came by the default stream, which the model's does not wait for
    point_all_params(m);
    CHECK_CUDA(cudaMallocHost((void **)&m->host_upload, m->upload_bytes));
    CHECK_CUDA(cudaMallocHost((void **)&m->host_scalars, sizeof(Scalars)));
    CHECK_CUDA(cudaMallocHost((void **)&m->host_logits,
                              (size_t)(few_rows(m) * c->vocab_size) * sizeof(float)));
    use_workspace(&m->context);
    if (m->context.side.context) use_workspace(m->context.side.context);
    rope_table(&m->context, m->rope, c->chunk_size, c->z_dim / c->num_heads, c->rope_base);
    CHECK_CUDA(cudaStreamSynchronize(m->context.stream));
    return nullptr;
}

static void start_context(Context *context, bool own_stream) {
    int device = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaDeviceGetAttribute(&context->num_sms, cudaDevAttrMultiProcessorCount, device));
    if (own_stream) CHECK_CUDA(cudaStreamCreateWithFlags(&context->stream, cudaStreamNonBlocking));
    start_products(context);
    int *answer = nullptr;
    CHECK_CUDA(cudaMalloc((void **)&answer, sizeof *answer));
    context->hopper = hopper_code(context, answer);
    CHECK_CUDA(cudaFree(answer));
}

/* The side stream: its blocks go first, so that they find multiprocessors as soon as a kernel leaves them. */
static void start_side(Context *context) {
    int lowest = 0, highest = 0;
    SideStream *side = &context->side;
    side->context = new Context();
    side->context->hopper = context->hopper;
    CHECK_CUDA(cudaDeviceGetStreamPriorityRange(&lowest, &highest));
    CHECK_CUDA(cudaStreamCreateWithPriority(&side->context->stream, cudaStreamNonBlocking, highest));
    CHECK_CUDA(cudaEventCreateWithFlags(&side->ready, cudaEventDisableTiming));
    CHECK_CUDA(cudaEventCreateWithFlags(&side->done, cudaEventDisableTiming));
    start_products(side->context);
}
static void end_side(SideStream *side) {
    if (!side->context) return;
    CHECK_CUDA(cudaStreamSynchronize(side->context->stream));
    end_products(side->context);
    CHECK_CUDA(cudaEventDestroy(side->ready));
    CHECK_CUDA(cudaEventDestroy(side->done));
    CHECK_CUDA(cudaStreamDestroy(side->context->stream));
    delete side->context;
}

static void cuda_destroy(MegalodonModel *m) {
    if (!m) return;
    end_side(&m->context.side);
    CHECK_CUDA(cudaStreamSynchronize(m->context.stream));
#if DECODE_TIMELINE
    const PassShape &last = m->forwards.recorded;
    if (last.B && last.T == 1 && !last.targets) timeline_report(&m->context, m->forwards.graph);
#endif
    end_products(&m->context);
    CHECK_CUDA(cudaEventDestroy(m->uploaded));
    for (Recording *recording : {&m->forwards, &m->backwards})
        if (recording->recorded.B) CHECK_CUDA(cudaGraphExecDestroy(recording->graph));
    CHECK_CUDA(cudaStreamDestroy(m->context.stream));
    for (void *arena : m->arenas) CHECK_CUDA(cudaFree(arena));
    if (m->host_upload) CHECK_CUDA(cudaFreeHost(m->host_upload));
    if (m->host_scalars) CHECK_CUDA(cudaFreeHost(m->host_scalars));
    if (m->host_logits) CHECK_CUDA(cudaFreeHost(m->host_logits));
    delete m;
}

template <typename T>
static const char *create_model(MegalodonModel **model, const MegalodonConfig *config,
                                const MegalodonOptions *options) {
    Model<T> *m = new Model<T>();
    m->config = *config;
    m->options = *options;
    start_context(&m->context, true);
    if (std::is_same<T, bf16>::value && !options->training) {
        m->cluster_room = attention_cluster_room(&m->context, config->z_dim / config->num_heads,
                                                 config->value_dim / config->num_heads);
        int64_t outputs = (int64_t)config->z_dim + 2 * (int64_t)config->value_dim + config->model_dim;
        m->context.streams = step_streams(&m->context, outputs * config->model_dim);
    }
    int64_t widest = max(config->value_dim, max(config->ffn_hidden_dim, config->model_dim));
    if (options->training && side_pays(&m->context, widest * config->model_dim)) start_side(&m->context);
    CHECK_CUDA(cudaEventCreateWithFlags(&m->uploaded, cudaEventDisableTiming));
    m->weights_changed = true;
    const char *error = build(m);
    if (error) {
        cuda_destroy(m);
        return error;
    }
    *model = m;
    return nullptr;
}

static const char *cuda_unavailable(void) {
    static char message[256];
    int devices = 0, device = 0, major = 0, driver = 0, runtime = 0;
    cudaError_t status = cudaGetDeviceCount(&devices);
    if (status != cudaSuccess || devices == 0) {
        cudaGetLastError();
        cudaDriverGetVersion(&driver);
        cudaRuntimeGetVersion(&runtime);
        if (driver > 0 && driver < runtime)
            snprintf(message, sizeof message,
                     "the driver knows CUDA %d.%d and this program was built for %d.%d: update the "
                     "driver",
                     driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
        else if (driver == 0)
            snprintf(message, sizeof message, "no CUDA device was found: this machine has no NVIDIA driver");
        else
            snprintf(message, sizeof message, "no CUDA device was found (%s)",
                     status == cudaSuccess ? "none is visible" : cudaGetErrorString(status));
        return message;
    }
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    if (major >= 8) return nullptr;
    snprintf(message, sizeof message, "the device has compute capability %d.x and at least 8.0 is needed",
             major);
    return message;
}

static const char *cuda_create(MegalodonModel **model, const MegalodonConfig *config,
                               const MegalodonOptions *options) {
    *model = nullptr;
    const char *error = megalodon_validate(config);
    if (!error) error = cuda_unavailable();
    if (error) return error;
    if (options->max_batch < 1 || options->max_length < 1)
        return errorf("batch %d x length %d: both must be at least 1", options->max_batch,
                      options->max_length);
    if (options->precision == MEGALODON_BF16_MIXED) return create_model<bf16>(model, config, options);
    return create_model<float>(model, config, options);
}

/* Calls f<T>(...) of the model's type: ON_MODEL(m, f, more arguments) */
#define ON_MODEL(m, f, ...)                                                                                 \
    ((m)->options.precision == MEGALODON_BF16_MIXED ? f(static_cast<Model<bf16> *>(m), ##__VA_ARGS__)       \
                                                    : f(static_cast<Model<float> *>(m), ##__VA_ARGS__))

/* ---- the table's functions ---- */

/* Empties rows [first, first + rows) of a state, their keys and values too. */
template <typename T> static void clear_rows(Model<T> *m, State<T> *s, int64_t first, int64_t rows) {
    const MegalodonConfig *c = &m->config;
    Context *x = &m->context;
    int64_t G = c->norm_num_groups, cema = (int64_t)c->model_dim * c->cema_ndim * 2;
    int64_t keys = (int64_t)c->chunk_size * c->z_dim, values = (int64_t)c->chunk_size * c->value_dim;
    for (LayerState<T> &layer : s->layers) {
        clear(x, layer.norm_mean + first * G, (size_t)(rows * G) * sizeof(double));
        clear(x, layer.norm_var + first * G, (size_t)(rows * G) * sizeof(double));
        clear(x, layer.cema + first * cema, (size_t)(rows * cema) * sizeof(float));
        clear(x, layer.k + first * keys, (size_t)(rows * keys) * sizeof(T));
        clear(x, layer.v + first * values, (size_t)(rows * values) * sizeof(T));
    }
    clear(x, s->final_mean + first * G, (size_t)(rows * G) * sizeof(double));
    clear(x, s->final_var + first * G, (size_t)(rows * G) * sizeof(double));
    clear(x, s->count + first, (size_t)rows * sizeof(int64_t));
}
template <typename T> static void clear_state(Model<T> *m, State<T> *s) {
    clear_rows(m, s, 0, m->options.max_batch);
}

/* Makes the present state the incoming one. Inference has one state: an empty start is a state of zeros. */
template <typename T> static void begin_state(Model<T> *m) {
    m->carried = m->batch.carry;
    m->have_dstate_out = false;
    if (!keeps_state(m)) return;
    if (m->options.training)
        std::swap(m->state, m->state_in);
    else if (!m->carried) {
        clear_state(m, &m->state);
        m->state.n = 0;
        m->carried = true;
    }
    if (!m->options.training) m->state_in.n = m->state.n;
    m->state.B = m->batch.B;
    m->state.n = (int)((tokens_before(m, m->state_in.n) + m->batch.T) % m->config.chunk_size);
}

/* Sends `bytes` of the upload from offset `from` on. */
static void upload(MegalodonModel *m, size_t from, size_t bytes) {
    CHECK_CUDA(cudaMemcpyAsync(m->device_upload + from, m->host_upload + from, bytes, cudaMemcpyHostToDevice,
                               m->context.stream));
    CHECK_CUDA(cudaEventRecord(m->uploaded, m->context.stream));
}

/* Waits for the end of the last forward, if that was a step and nobody has waited for it. */
static void end_step(MegalodonModel *m) {
    if (m->step_runs) CHECK_CUDA(cudaStreamSynchronize(m->context.stream));
    m->step_runs = false;
}

/* Sends tokens, and while they are on their way targets; a step may read them where they are. */
static void upload_batch(MegalodonModel *m) {
    size_t rows = (size_t)m->batch.B * (size_t)m->batch.T;
    if (m->logits_sent) end_step(m); // the last forward was a step, which uploads nothing
    else CHECK_CUDA(cudaEventSynchronize(m->uploaded)); // the last upload has left the host's memory
    memcpy(on_host(m, m->tokens), m->batch.tokens, rows * sizeof(int32_t));
    if (is_decode_step(m)) return;
    upload(m, 0, rows * sizeof(int32_t));
    if (!m->batch.targets) return;
    memcpy(on_host(m, m->targets), m->batch.targets, rows * sizeof(int32_t));
    upload(m, (size_t)((char *)m->targets - m->device_upload), rows * sizeof(int32_t));
}

/* Makes and sends the plan of the embedding's gradient, which only the backward wants: the device is busy
 * with the forward meanwhile. */
static void upload_plan(MegalodonModel *m) {
    EmbeddingPlan plan = {
        on_host(m, m->plan.order), on_host(m, m->plan.segments), on_host(m, m->plan.groups), 0, 0, 0};
    plan_embedding(&plan, m->batch.tokens, (int64_t)m->batch.B * m->batch.T, m->config.vocab_size,
                   m->token_counts.data());
    m->plan.num_segments = plan.num_segments, m->plan.num_groups = plan.num_groups;
    m->plan.num_partials = plan.num_partials;
    size_t from = (size_t)((char *)m->plan.order - m->device_upload);
    upload(m, from, m->upload_bytes - from);
}

static void refresh_coefficients(MegalodonModel *m) {
    const MegalodonConfig *c = &m->config;
    for (size_t l = 0; l < m->coef.size(); l++)
        cema_coefficients(&m->context, m->coef[l], m->masters[l].cema_alpha, m->masters[l].cema_delta,
                          m->masters[l].cema_theta, m->masters[l].cema_gamma, c->model_dim, c->cema_ndim);
}

/* The working copy and CEMA's coefficients, after weights were set. */
template <typename T> static void refresh_weights(Model<T> *m) {
    if (!m->weights_changed) return;
    if ((void *)m->copy != (void *)m->weights) convert(&m->context, m->copy, m->weights, m->arena_size);
    refresh_coefficients(m);
    m->weights_changed = false;
}

template <typename T> static void make_pass(Model<T> *m) {
    if (is_decode_step(m)) decode_pass(m);
    else forward_pass(m);
}

/* Records a pass instead of making it. What was recorded before is let go: if it is still being replayed,
 * CUDA frees it afterwards. */
template <typename F> static void record(MegalodonModel *m, Recording *r, const PassShape &shape, F &&pass) {
    cudaGraph_t graph;
    if (r->recorded.B) CHECK_CUDA(cudaGraphExecDestroy(r->graph));
    r->recorded = PassShape{};
    CHECK_CUDA(cudaStreamBeginCapture(m->context.stream, cudaStreamCaptureModeThreadLocal));
    pass();
    CHECK_CUDA(cudaStreamEndCapture(m->context.stream, &graph));
    r->refused = !CHECK_CUDA_UNLESS(cudaErrorMemoryAllocation, cudaGraphInstantiate(&r->graph, graph, 0));
    if (!r->refused) r->recorded = shape;
    CHECK_CUDA(cudaGraphDestroy(graph));
}

/* Makes a pass, whose launches are the same for the same shape. */
template <typename F> static void replay(MegalodonModel *m, Recording *r, const PassShape &shape, F &&pass) {
    bool again = r->previous == shape;
    r->previous = shape;
    if (again && !r->refused && !(r->recorded == shape)) record(m, r, shape, pass);
    if (r->recorded == shape) CHECK_CUDA(cudaGraphLaunch(r->graph, m->context.stream));
    else pass();
}

/* Do the launches of a pass depend on its shape alone? Masks of dropout change from step to step; training
 * that keeps the state has it in two places in turn. A model that keeps all activations is there to be
 * looked at: its kernels come one by one. */
static bool repeats(const MegalodonModel *m) {
    const MegalodonConfig *c = &m->config;
    bool drops = m->batch.dropout && (c->dropout > 0 || c->hidden_dropout > 0 || c->attention_dropout > 0);
    bool swaps_states = m->options.training && keeps_state(m);
    return !swaps_states && !drops && !m->options.keep_activations;
}

template <typename T>
static const char *forward_model(Model<T> *m, const MegalodonBatch *batch, MegalodonLoss *loss) {
    const char *error = megalodon_check_batch(&m->config, &m->options, batch, m->state.B);
    if (error) return error;
    m->batch = *batch;
    begin_state(m);
    upload_batch(m);
    refresh_weights(m);
    if (repeats(m)) {
        /* a step finds its place in the chunk on the device */
        int n = is_step(m) ? 0 : m->state_in.n;
        PassShape shape = {batch->B, batch->T, n, batch->targets != nullptr, 0, false};
        replay(m, &m->forwards, shape, [&] { make_pass(m); });
    } else {
        forward_pass(m);
    }
    m->logits_sent = m->step_runs = is_decode_step(m);
    m->can_backward = m->options.training && batch->targets;
    if (m->can_backward) upload_plan(m);
    if (!loss) return nullptr;
    *loss = MegalodonLoss{0, 0};
    if (!batch->targets) return nullptr;
    int64_t rows = (int64_t)batch->B * batch->T;
    for (int64_t i = 0; i < rows; i++) loss->counted += batch->targets[i] != MEGALODON_IGNORE;
    LAUNCH(sum_kernel, 1, SUM_THREADS, &m->context, &m->scalars->loss, m->top_acts.nll, rows);
    CHECK_CUDA(cudaMemcpyAsync(&m->host_scalars->loss, &m->scalars->loss, sizeof(double),
                               cudaMemcpyDeviceToHost, m->context.stream));
    CHECK_CUDA(cudaStreamSynchronize(m->context.stream));
    loss->nll_sum = m->host_scalars->loss;
    return nullptr;
}
static const char *cuda_forward(MegalodonModel *m, const MegalodonBatch *batch, MegalodonLoss *loss) {
    return ON_MODEL(m, forward_model, batch, loss);
}

template <typename T> static const char *last_logits_of(Model<T> *m, float *out) {
    int64_t B = m->batch.B, D = m->config.model_dim, V = m->config.vocab_size;
    if (B == 0) return errorf("there are no logits before the first forward");
    if (m->logits_sent) { // a step has them on their way already
        end_step(m);
        memcpy(out, m->host_logits, (size_t)(B * V) * sizeof(float));
        return nullptr;
    }
    if (B <= FEW_ROWS)
        linear_few_rows<T, float>(&m->context, m->last_logits, m->last, m->top.output_weight, nullptr,
                                  nullptr, (int)B, (int)V, (int)D);
    else
        matmul<T, float>(&m->context, false, true, B, V, D, 1.0f, matrix((const T *)m->last, D),
                         matrix((const T *)m->top.output_weight, D), 0.0f, matrix(m->last_logits, V));
    CHECK_CUDA(cudaMemcpyAsync(out, m->last_logits, (size_t)(B * V) * sizeof(float), cudaMemcpyDeviceToHost,
                               m->context.stream));
    CHECK_CUDA(cudaStreamSynchronize(m->context.stream));
    return nullptr;
}
static const char *cuda_last_logits(MegalodonModel *m, float *out) {
    return ON_MODEL(m, last_logits_of, out);
}

template <typename T> static const char *backward_model(Model<T> *m, double scale) {
    if (!m->can_backward)
        return errorf("backward needs a forward with targets, once each, in a model made for training");
    m->can_backward = false;
    if (m->carried && m->options.state_gradients)
        m->dstate_in.B = m->state_in.B, m->dstate_in.n = m->state_in.n;
    if (repeats(m)) {
        PassShape shape = {m->batch.B, m->batch.T, 0, true, (float)scale, !m->gradients_unset};
        replay(m, &m->backwards, shape, [&] { backward_pass(m, scale); });
    } else {
        backward_pass(m, scale);
    }
    embedding_pass(m);
    m->gradients_unset = false;
    return nullptr;
}
static const char *cuda_backward(MegalodonModel *m, double scale) {
    return ON_MODEL(m, backward_model, scale);
}

static void cuda_zero_gradients(MegalodonModel *m) { m->gradients_unset = true; }

/* Writes the zeros that zero_gradients promised, before anything but a backward reads gradients. */
static void settle_gradients(MegalodonModel *m) {
    if (m->gradients_unset && m->grads) clear(&m->context, m->grads, (size_t)m->arena_size * sizeof(float));
    m->gradients_unset = false;
}

/* The numbers [begin, end) of the arenas, and of the bf16 copy. */
static void update_range(MegalodonModel *m, int64_t begin, int64_t end, const MegalodonAdamW *adamw,
                         double weight_decay) {
    AdamW a = {(float)adamw->beta1,
               (float)adamw->beta2,
               (float)adamw->lr,
               (float)adamw->eps,
               (float)(1 / (1 - pow(adamw->beta1, (double)adamw->step))),
               (float)(1 / (1 - pow(adamw->beta2, (double)adamw->step))),
               (float)(1 - adamw->lr * weight_decay)};
    bool has_copy = m->options.precision == MEGALODON_BF16_MIXED;
    bf16 *copy = has_copy ? static_cast<Model<bf16> *>(m)->copy + begin : nullptr;
    LAUNCH(adamw_kernel, blocks_for(end - begin, UPDATE_THREADS * UPDATE_VEC), UPDATE_THREADS, &m->context,
           m->weights + begin, copy, m->moment1 + begin, m->moment2 + begin, m->grads + begin, m->scalars,
           end - begin, a);
}

/* AdamW with decoupled decay on every parameter, or on all but CEMA's; gradients clipped by the global
 * norm. */
static const char *cuda_update(MegalodonModel *m, const MegalodonAdamW *adamw, double *grad_norm) {
    if (!m->options.training) return errorf("a model made for inference cannot be updated");
    settle_gradients(m);
    int64_t chunks = ceil_div(m->arena_size, NORM_CHUNK);
    LAUNCH(square_sums_kernel, (unsigned)chunks, UPDATE_THREADS, &m->context, m->norm_partials, m->grads,
           m->arena_size);
    LAUNCH(clip_kernel, 1, SUM_THREADS, &m->context, m->scalars, m->norm_partials, chunks, adamw->clip,
           adamw->max_norm);
    const std::vector<size_t> &order = m->arena_order;
    for (size_t i = 0, next; i < order.size(); i = next) { // neighbours of one decay together
        double decay = megalodon_weight_decay(adamw, &m->params[order[i]]);
        for (next = i + 1; next < order.size(); next++)
            if (megalodon_weight_decay(adamw, &m->params[order[next]]) != decay) break;
        int64_t end = next < order.size() ? m->offset[order[next]] : m->arena_size;
        update_range(m, m->offset[order[i]], end, adamw, decay);
    }
    refresh_coefficients(m);
    if (!grad_norm) return nullptr;
    CHECK_CUDA(cudaMemcpyAsync(&m->host_scalars->norm, &m->scalars->norm, sizeof(double),
                               cudaMemcpyDeviceToHost, m->context.stream));
    CHECK_CUDA(cudaStreamSynchronize(m->context.stream));
    *grad_norm = m->host_scalars->norm;
    return nullptr;
}

/* ---- get and set ---- */

/* Where a tensor lies: `rows` pieces of `row_size` numbers, `stride` apart, of one of four types. */
struct View {
    void *data;
    MegalodonDType type;
    int64_t rows, row_size, stride;
};
template <typename P> static MegalodonDType dtype_of(const P *) {
    return std::is_same<P, float>::value    ? MEGALODON_F32
           : std::is_same<P, double>::value ? MEGALODON_F64
           : std::is_same<P, bf16>::value   ? MEGALODON_BF16
                                            : MEGALODON_I64;
}
template <typename P> static void view_as(View *view, P *data) {
    view->data = data, view->type = dtype_of(data);
}
static size_t dtype_bytes(MegalodonDType type) {
    return type == MEGALODON_BF16 ? 2 : type == MEGALODON_F32 || type == MEGALODON_I32 ? 4 : 8;
}

/* "layers.3.norm.mean" -> "norm.mean"; a name outside the blocks stays. */
static const char *field_of(const MegalodonTensor *tensor, const char *name) {
    return tensor->layer < 0 ? name : strchr(strchr(name, '.') + 1, '.') + 1;
}

template <typename T>
static const char *view_state(Model<T> *m, MegalodonKind kind, const char *name, View *view) {
    const MegalodonConfig *c = &m->config;
    State<T> *s = kind == MEGALODON_STATE           ? &m->state
                  : kind == MEGALODON_GRAD_STATE_IN ? &m->dstate_in
                                                    : &m->dstate_out;
    MegalodonTensor tensor = {};
    const char *error = megalodon_find_tensor(c, kind, s->B, 1, s->n, name, &tensor);
    if (error) return error;
    *view = View{nullptr, MEGALODON_F32, 1, tensor.size, tensor.size};
    const char *field = field_of(&tensor, name);
    if (strcmp(name, "count") == 0)
        view_as(view, s->count);
    else if (tensor.layer < 0)
        view_as(view, strstr(name, "mean") ? s->final_mean : s->final_var);
    else {
        const LayerState<T> *layer = &s->layers[(size_t)tensor.layer];
        if (strcmp(field, "norm.mean") == 0)
            view_as(view, layer->norm_mean);
        else if (strcmp(field, "norm.var") == 0)
            view_as(view, layer->norm_var);
        else if (strcmp(field, "cema") == 0)
            view_as(view, layer->cema);
        else {
            bool is_k = strcmp(field, "k") == 0;
            view_as(view, is_k ? layer->k : layer->v);
            view->rows = s->B;
            view->row_size = s->B ? tensor.size / s->B : 0;
            view->stride = (int64_t)c->chunk_size * (is_k ? c->z_dim : c->value_dim);
        }
    }
    return nullptr;
}

template <typename T> static const char *view_activation(Model<T> *m, const char *name, View *view) {
    MegalodonTensor tensor = {};
    const char *error =
        megalodon_find_tensor(&m->config, MEGALODON_ACT, m->batch.B, m->batch.T, 0, name, &tensor);
    if (error) return error;
    if (!m->options.keep_activations && strcmp(name, "nll") != 0)
        return errorf("activation '%s' is not kept: the model was made without keep_activations", name);
    *view = View{nullptr, MEGALODON_F32, 1, tensor.size, tensor.size};
    const char *field = field_of(&tensor, name);
#define X(member, field_name, ...)                                                                          \
    if (tensor.layer >= 0 && strcmp(field, field_name) == 0)                                                \
        view_as(view, m->acts[(size_t)tensor.layer].member);
    MEGALODON_LAYER_ACTS(X)
#undef X
#define X(member, field_name, ...)                                                                          \
    if (tensor.layer < 0 && strcmp(field, field_name) == 0) view_as(view, m->top_acts.member);
    MEGALODON_MODEL_ACTS(X)
#undef X
    return nullptr;
}

template <typename T>
static const char *view_of(Model<T> *m, MegalodonKind kind, const char *name, View *view) {
    if (kind == MEGALODON_ACT) return view_activation(m, name, view);
    bool of_state =
        kind == MEGALODON_STATE || kind == MEGALODON_GRAD_STATE_IN || kind == MEGALODON_GRAD_STATE_OUT;
    if (of_state) {
        bool exists = kind == MEGALODON_STATE
                          ? keeps_state(m)
                          : m->options.training && m->options.carry && m->options.state_gradients;
        if (!exists)
            return errorf("this model has no '%s': it was made without carry or state_gradients", name);
        return view_state(m, kind, name, view);
    }
    float *arena = kind == MEGALODON_PARAM     ? m->weights
                   : kind == MEGALODON_GRAD    ? m->grads
                   : kind == MEGALODON_MOMENT1 ? m->moment1
                                               : m->moment2;
    int i = find_param(m, name);
    if (i < 0) return errorf("this configuration has no parameter named '%s'", name);
    if (!arena) return errorf("a model made for inference has no gradient or moment of '%s'", name);
    if (kind == MEGALODON_GRAD) settle_gradients(m);
    const MegalodonTensor &tensor = m->params[(size_t)i];
    *view = View{arena + m->offset[(size_t)i], MEGALODON_F32, 1, tensor.size, tensor.size};
    return nullptr;
}

static double number_at(MegalodonDType type, const void *data, int64_t i) {
    switch (type) {
    case MEGALODON_F32: return ((const float *)data)[i];
    case MEGALODON_F64: return ((const double *)data)[i];
    case MEGALODON_BF16: return to_float(((const bf16 *)data)[i]);
    default: return 0;
    }
}
static void put_number(MegalodonDType type, void *data, int64_t i, double x) {
    switch (type) {
    case MEGALODON_F32: ((float *)data)[i] = (float)x; break;
    case MEGALODON_F64: ((double *)data)[i] = x; break;
    case MEGALODON_BF16: ((bf16 *)data)[i] = from_float<bf16>((float)x); break;
    default: break;
    }
}
static bool is_number(MegalodonDType type) {
    return type == MEGALODON_F32 || type == MEGALODON_F64 || type == MEGALODON_BF16;
}

/* Between the device's type and the caller's, on the host: nothing here is in a step. */
template <typename T>
static const char *get_from(Model<T> *m, MegalodonKind kind, const char *name, void *out,
                            MegalodonDType dtype) {
    View v;
    const char *error = view_of(m, kind, name, &v);
    if (error) return error;
    if ((dtype == MEGALODON_I64) != (v.type == MEGALODON_I64))
        return errorf("'%s' is not of the type asked for", name);
    if (dtype != MEGALODON_I64 && !is_number(dtype)) return errorf("'%s' cannot be had as that type", name);
    size_t bytes = dtype_bytes(v.type);
    int64_t size = v.rows * v.row_size;
    if (size == 0) return nullptr;
    std::vector<char> staged(dtype == v.type ? 0 : (size_t)size * bytes);
    char *raw = dtype == v.type ? (char *)out : staged.data();
    CHECK_CUDA(cudaMemcpy2DAsync(raw, (size_t)v.row_size * bytes, v.data, (size_t)v.stride * bytes,
                                 (size_t)v.row_size * bytes, (size_t)v.rows, cudaMemcpyDeviceToHost,
                                 m->context.stream));
    CHECK_CUDA(cudaStreamSynchronize(m->context.stream));
    if (dtype != v.type)
        for (int64_t i = 0; i < size; i++) put_number(dtype, out, i, number_at(v.type, raw, i));
    return nullptr;
}
static const char *cuda_get(MegalodonModel *m, MegalodonKind kind, const char *name, void *out,
                            MegalodonDType dtype) {
    return ON_MODEL(m, get_from, kind, name, out, dtype);
}

template <typename T>
static const char *set_in(Model<T> *m, MegalodonKind kind, const char *name, const void *in,
                          MegalodonDType dtype) {
    if (kind == MEGALODON_ACT || kind == MEGALODON_GRAD_STATE_IN)
        return errorf("'%s' is a result and cannot be set", name);
    if (strcmp(name, "count") == 0) return errorf("'count' is set by start_state");
    View v;
    if (kind == MEGALODON_GRAD_STATE_OUT && m->options.state_gradients && !m->have_dstate_out)
        m->dstate_out.B = m->state.B, m->dstate_out.n = m->state.n;
    const char *error = view_of(m, kind, name, &v);
    if (error) return error;
    if (!is_number(dtype)) return errorf("'%s' cannot be set from that type", name);
    if (kind == MEGALODON_GRAD_STATE_OUT && !m->have_dstate_out) {
        clear_state(m, &m->dstate_out);
        m->have_dstate_out = true;
    }
    if (kind == MEGALODON_PARAM) m->weights_changed = true;
    size_t bytes = dtype_bytes(v.type);
    int64_t size = v.rows * v.row_size;
    if (size == 0) return nullptr;
    std::vector<char> staged(dtype == v.type ? 0 : (size_t)size * bytes);
    for (int64_t i = 0; dtype != v.type && i < size; i++)
        put_number(v.type, staged.data(), i, number_at(dtype, in, i));
    CHECK_CUDA(cudaMemcpy2DAsync(v.data, (size_t)v.stride * bytes, dtype == v.type ? in : staged.data(),
                                 (size_t)v.row_size * bytes, (size_t)v.row_size * bytes, (size_t)v.rows,
                                 cudaMemcpyHostToDevice, m->context.stream));
    CHECK_CUDA(cudaStreamSynchronize(m->context.stream));
    return nullptr;
}
static const char *cuda_set(MegalodonModel *m, MegalodonKind kind, const char *name, const void *in,
                            MegalodonDType dtype) {
    return ON_MODEL(m, set_in, kind, name, in, dtype);
}

template <typename T> static const char *start_state_of(Model<T> *m, int B, const int64_t *count) {
    if (!keeps_state(m)) return errorf("this model was made without `carry`: it has no state");
    if (B < 1 || B > m->options.max_batch)
        return errorf("a state of %d rows does not fit a model made for %d", B, m->options.max_batch);
    int C = m->config.chunk_size;
    for (int b = 0; b < B; b++)
        if (count[b] < 0 || count[b] % C != count[0] % C)
            return errorf("row %d of the state has seen %lld tokens and row 0 %lld: rows must stand at the "
                          "same place in "
                          "their chunk of %d",
                          b, (long long)count[b], (long long)count[0], C);
    clear_state(m, &m->state);
    m->state.B = B;
    m->state.n = (int)(count[0] % C);
    CHECK_CUDA(cudaMemcpyAsync(m->state.count, count, (size_t)B * sizeof *count, cudaMemcpyHostToDevice,
                               m->context.stream));
    CHECK_CUDA(cudaStreamSynchronize(m->context.stream));
    return nullptr;
}
static const char *cuda_start_state(MegalodonModel *m, int B, const int64_t *count) {
    return ON_MODEL(m, start_state_of, B, count);
}

template <typename T> static const char *reset_rows_of(Model<T> *m, const bool *rows) {
    const char *error = megalodon_check_reset(&m->options, m->state.B, m->state.n);
    for (int b = 0; b < m->state.B && !error; b++)
        if (rows[b]) clear_rows(m, &m->state, b, 1);
    return error;
}
static const char *cuda_reset_rows(MegalodonModel *m, const bool *rows) {
    return ON_MODEL(m, reset_rows_of, rows);
}

template <typename T> static void state_shape_of(const Model<T> *m, int *B, int *n) {
    *B = m->state.B, *n = m->state.n;
}
static void cuda_state_shape(const MegalodonModel *model, int *B, int *n) {
    MegalodonModel *m = const_cast<MegalodonModel *>(model);
    ON_MODEL(m, state_shape_of, B, n);
}

static void cuda_memory(const MegalodonModel *m, MegalodonMemory *memory) {
    size_t free_bytes = 0, all = 0;
    CHECK_CUDA(cudaMemGetInfo(&free_bytes, &all));
    *memory = m->memory;
    memory->device_used = (int64_t)(all - free_bytes);
}

/* ----------------------------------------------------------------------------------------------------------
 * 3. Tables: the components with untyped device arguments, in the order of megalodon_components, and the
 * backend
 */

/* Names for the sizes of a component call, so that each wrapper below is one readable line. */
#define SIZES_OF(s)                                                                                         \
    const MegalodonConfig *c = &(s)->config;                                                                \
    const int64_t B = (s)->B, steps = (s)->T, n = (s)->n, rows = B * steps, D = c->model_dim,               \
                  N = c->cema_ndim;                                                                         \
    const int64_t H = c->num_heads, Z = c->z_dim, E = c->value_dim, F = c->ffn_hidden_dim,                  \
                  G = c->norm_num_groups;                                                                   \
    const int64_t C = c->chunk_size, V = c->vocab_size, z = Z / H, e = E / H;                               \
    const float eps = (float)c->norm_eps;                                                                   \
    (void)n, (void)rows, (void)D, (void)N, (void)F, (void)G, (void)C, (void)V, (void)z, (void)e, (void)eps
#define FORWARD(name)                                                                                       \
    template <typename T>                                                                                   \
    static void component_##name##_forward(Context *x, void *const *a, const MegalodonShape *s)
#define BACKWARD(name)                                                                                      \
    template <typename T>                                                                                   \
    static void component_##name##_backward(Context *x, void *const *g, void *const *a,                     \
                                            const MegalodonShape *s)
/* Arguments and gradients by type: REAL, STAT, WIDE, integers. Gradients of weights are always float (see
 * below). */
#define R(p) ((T *)(p))
#define S(p) ((float *)(p))
#define W(p) ((double *)(p))
#define I32(p) ((const int32_t *)(p))
#define I64(p) ((const int64_t *)(p))

FORWARD(embedding) {
    SIZES_OF(s);
    embedding_forward<T>(x, R(a[0]), I32(a[1]), R(a[2]), embedding_scale(c), rows, D, no_dropout());
}
BACKWARD(embedding) {
    SIZES_OF(s);
    std::vector<int32_t> tokens((size_t)rows), counts((size_t)V), order((size_t)rows);
    std::vector<Segment> segments((size_t)max_segments(rows, V));
    std::vector<SegmentGroup> groups((size_t)max_partials(rows));
    EmbeddingPlan host = {order.data(), segments.data(), groups.data(), 0, 0, 0}, plan;
    ScratchScope scope(x);
    plan.order = take<int32_t>(x, rows);
    plan.segments = take<Segment>(x, (int64_t)segments.size());
    plan.groups = take<SegmentGroup>(x, (int64_t)groups.size());
    if (!x->dry_run) {
        CHECK_CUDA(cudaMemcpy(tokens.data(), a[1], (size_t)rows * sizeof(int32_t), cudaMemcpyDeviceToHost));
        plan_embedding(&host, tokens.data(), rows, V, counts.data());
        CHECK_CUDA(
            cudaMemcpy(plan.order, host.order, (size_t)rows * sizeof(int32_t), cudaMemcpyHostToDevice));
        CHECK_CUDA(cudaMemcpy(plan.segments, host.segments, segments.size() * sizeof(Segment),
                              cudaMemcpyHostToDevice));
        CHECK_CUDA(cudaMemcpy(plan.groups, host.groups, groups.size() * sizeof(SegmentGroup),
                              cudaMemcpyHostToDevice));
    }
    plan.num_segments = host.num_segments, plan.num_groups = host.num_groups,
    plan.num_partials = host.num_partials;
    embedding_backward<T>(x, S(g[2]), R(g[0]), plan, embedding_scale(c), rows, D, no_dropout());
}

FORWARD(timestepnorm) {
    SIZES_OF(s);
    timestepnorm_forward<T>(x, R(a[0]), S(a[1]), S(a[2]), W(a[3]), W(a[4]), R(a[5]), I64(a[6]), W(a[7]),
                            W(a[8]), R(a[9]), R(a[10]), B, steps, D, G, eps);
}
BACKWARD(timestepnorm) {
    SIZES_OF(s);
    timestepnorm_backward<T>(x, R(g[5]), W(g[7]), W(g[8]), S(g[9]), S(g[10]), R(g[0]), W(g[3]), W(g[4]),
                             nullptr, nullptr, S(a[1]), S(a[2]), R(a[5]), I64(a[6]), W(a[7]), R(a[9]), B,
                             steps, D, G, eps);
}

/* Coefficients of one call; the model keeps its own. */
static CemaCoefficients component_coefficients(Context *x, void *const *a, int64_t D, int64_t N) {
    CemaCoefficients coef = cema_coefficients_at(take<float>(x, D * N * NUM_CEMA_COEFFICIENTS), D, N);
    cema_coefficients(x, coef, S(a[4]), S(a[5]), S(a[6]), S(a[7]), D, N);
    return coef;
}
FORWARD(cema) {
    SIZES_OF(s);
    ScratchScope scope(x);
    CemaCoefficients coef = component_coefficients(x, a, D, N);
    cema_forward<T>(x, R(a[0]), S(a[1]), R(a[2]), S(a[3]), coef, S(a[8]), B, steps, D, N);
}
BACKWARD(cema) {
    SIZES_OF(s);
    ScratchScope scope(x);
    CemaCoefficients coef = component_coefficients(x, a, D, N);
    cema_backward<T>(x, R(g[2]), S(g[3]), S(g[4]), S(g[5]), S(g[6]), S(g[7]), S(g[8]), R(g[0]),
                     S(g[1]), R(a[2]), S(a[3]), coef, S(a[4]), S(a[5]), S(a[6]), S(a[8]), B, steps, D, N);
}

FORWARD(rmsnorm) {
    SIZES_OF(s);
    rmsnorm_forward<T>(x, R(a[0]), S(a[1]), R(a[2]), R(a[3]), rows, D, eps, no_dropout());
}
BACKWARD(rmsnorm) {
    SIZES_OF(s);
    rmsnorm_backward<T>(x, R(g[2]), nullptr, S(g[3]), R(g[0]), S(a[1]), R(a[2]), R(a[3]), rows, D,
                        no_dropout());
}

FORWARD(linear) {
    SIZES_OF(s);
    linear_forward<T>(x, R(a[0]), R(a[1]), R(a[2]), R(a[3]), nullptr, rows, E, D);
}
BACKWARD(linear) {
    SIZES_OF(s);
    linear_backward<T>(x, R(g[1]), S(g[2]), S(g[3]), R(g[0]), R(a[1]), R(a[2]), rows, E, D);
}

FORWARD(znorm) {
    SIZES_OF(s);
    znorm_forward<T>(x, R(a[0]), R(a[1]), rows, H, z, eps);
}
BACKWARD(znorm) {
    SIZES_OF(s);
    znorm_backward<T>(x, R(g[1]), R(g[0]), R(a[1]), rows, H, z, eps);
}

FORWARD(qk_affine) {
    SIZES_OF(s);
    qk_affine_forward<T>(x, R(a[0]), R(a[1]), R(a[2]), R(a[3]), R(a[4]), rows, H, z);
}
BACKWARD(qk_affine) {
    SIZES_OF(s);
    qk_affine_backward<T>(x, R(g[2]), S(g[3]), S(g[4]), R(g[0]), R(g[1]), R(a[2]), R(a[3]), rows, H, z);
}

static float2 *component_rope_table(Context *x, const MegalodonShape *s) {
    SIZES_OF(s);
    float2 *table = take<float2>(x, C * (z / 2));
    rope_table(x, table, C, z, c->rope_base);
    return table;
}
FORWARD(rope) {
    SIZES_OF(s);
    ScratchScope scope(x);
    rope_forward<T>(x, R(a[0]), R(a[1]), component_rope_table(x, s), n, B, steps, H, z, C);
}
BACKWARD(rope) {
    SIZES_OF(s);
    (void)a;
    ScratchScope scope(x);
    rope_backward<T>(x, R(g[1]), R(g[0]), component_rope_table(x, s), n, B, steps, H, z, C);
}

FORWARD(silu) {
    SIZES_OF(s);
    silu_forward<T>(x, R(a[0]), R(a[1]), rows * E);
}
BACKWARD(silu) {
    SIZES_OF(s);
    silu_backward<T>(x, R(g[1]), nullptr, R(g[0]), R(a[1]), rows, E);
}

template <typename T> static AttentionKeys<T> component_keys(void *const *a, const MegalodonShape *s) {
    SIZES_OF(s);
    return AttentionKeys<T>{R(a[3]), R(a[4]), R(a[5]), R(a[6]), a[5] ? n : 0, n, B, steps, H, z, e, C};
}
FORWARD(attention) {
    attention_forward<T>(x, R(a[0]), S(a[1]), AttentionWeights<T>{nullptr, 0}, R(a[2]),
                         component_keys<T>(a, s), make_dropout(s->config.attention_dropout, s->key));
}
/* A model keeps the weights from its forward; one call has to compute them again. */
BACKWARD(attention) {
    SIZES_OF(s);
    ScratchScope scope(x);
    Dropout dropout = make_dropout(c->attention_dropout, s->key);
    AttentionWeights<T> weights = {nullptr, weights_pitch(C)};
    weights.data = take<KeptWeight<T>>(x, rows * H * weights.pitch);
    T *out = take<T>(x, rows * E);
    float *lse = take<float>(x, rows * H);
    attention_forward<T>(x, out, lse, weights, R(a[2]), component_keys<T>(a, s), dropout);
    attention_backward<T>(x, R(g[2]), R(g[3]), R(g[4]), R(g[5]), R(g[6]), R(g[0]), weights, R(a[2]),
                          component_keys<T>(a, s), nullptr, nullptr, dropout);
}

FORWARD(gate) {
    SIZES_OF(s);
    gate_forward<T>(x, R(a[0]), R(a[1]), R(a[2]), rows * E);
}
BACKWARD(gate) {
    SIZES_OF(s);
    gate_backward<T>(x, R(g[1]), R(g[2]), R(g[0]), R(a[1]), R(a[2]), rows * E);
}

FORWARD(layernorm) {
    SIZES_OF(s);
    layernorm_forward<T>(x, R(a[0]), S(a[1]), S(a[2]), R(a[3]), R(a[4]), R(a[5]), rows, D, eps);
}
BACKWARD(layernorm) {
    SIZES_OF(s);
    layernorm_backward<T>(x, R(g[3]), nullptr, S(g[4]), S(g[5]), nullptr, R(g[0]), S(a[1]), S(a[2]), R(a[3]),
                          R(a[4]), R(a[5]), rows, D);
}

FORWARD(swiglu) {
    SIZES_OF(s);
    swiglu_forward<T>(x, R(a[0]), R(a[1]), R(a[2]), rows * F, no_dropout());
}
BACKWARD(swiglu) {
    SIZES_OF(s);
    swiglu_backward<T>(x, R(g[1]), R(g[2]), nullptr, R(g[0]), R(a[1]), R(a[2]), rows, F, no_dropout());
}

FORWARD(rescale) {
    SIZES_OF(s);
    rescale_forward<T>(x, R(a[0]), nullptr, R(a[1]), R(a[2]), R(a[3]), rows, D, no_dropout());
}
BACKWARD(rescale) {
    SIZES_OF(s);
    rescale_backward<T>(x, R(g[1]), R(g[2]), S(g[3]), R(g[0]), R(a[1]), R(a[3]), rows, D, no_dropout());
}

FORWARD(dropout) {
    SIZES_OF(s);
    dropout_forward<T>(x, R(a[0]), R(a[1]), rows, D, make_dropout(c->dropout, s->key));
}
BACKWARD(dropout) {
    SIZES_OF(s);
    (void)a;
    dropout_forward<T>(x, R(g[1]), R(g[0]), rows, D, make_dropout(c->dropout, s->key));
}

FORWARD(cross_entropy) {
    SIZES_OF(s);
    cross_entropy_forward<T>(x, S(a[0]), nullptr, R(a[1]), I32(a[2]), rows, V);
}
BACKWARD(cross_entropy) {
    SIZES_OF(s);
    cross_entropy_backward<T>(x, R(g[1]), S(g[0]), 1.0f, R(a[1]), nullptr, I32(a[2]), rows, V);
}

/* The context of component calls: the default stream, and scratch that grows to what a call's dry run asks
 * for. A model allocates nothing in a step; a single call has no create() to do it in. */
static Context *component_context(void) {
    static Context context;
    static bool started = false;
    if (!started) {
        start_context(&context, false);
        CHECK_CUDA(cudaMalloc(&context.cublas_workspace, CUBLAS_WORKSPACE));
        use_workspace(&context);
        started = true;
    }
    return &context;
}

/* Runs f twice: dry, to learn its scratch, and for real. */
template <typename F> static void call_component(F &&f) {
    Context *x = component_context();
    char *scratch = x->scratch;
    x->dry_run = true, x->scratch = no_scratch(), x->scratch_used = x->scratch_peak = 0;
    f(x);
    x->dry_run = false, x->scratch = scratch, x->scratch_used = 0;
    if (x->scratch_peak > x->scratch_bytes) {
        CHECK_CUDA(cudaDeviceSynchronize());
        CHECK_CUDA(cudaFree(x->scratch));
        CHECK_CUDA(cudaMalloc((void **)&x->scratch, x->scratch_peak));
        x->scratch_bytes = x->scratch_peak;
    }
    f(x);
}

/* Kernels add to float gradients of weights; where the caller's are bf16, they are converted before and
 * after. A gradient that is not wanted goes to scratch. */
template <typename T, typename F>
static void call_backward(MegalodonComponentId id, F f, void *const *g, void *const *a,
                          const MegalodonShape *s) {
    call_component([&](Context *x) {
        ScratchScope scope(x);
        void *grads[MEGALODON_MAX_ARGS] = {};
        int64_t sizes[MEGALODON_MAX_ARGS] = {};
        const MegalodonArg *args = megalodon_components[id].args;
        bool narrow[MEGALODON_MAX_ARGS] = {};
        for (int i = 0; i < MEGALODON_MAX_ARGS && args[i].name; i++) {
            int64_t dims[MEGALODON_MAX_DIMS];
            int ndim = megalodon_shape(args[i].shape, &s->config, s->B, s->T, s->n, dims);
            sizes[i] = 1;
            for (int d = 0; d < ndim; d++) sizes[i] *= dims[d];
            bool weight = args[i].role == MEGALODON_WEIGHT;
            grads[i] = g[i];
            narrow[i] =
                weight && g[i] && args[i].type == MEGALODON_REAL_ARG && !std::is_same<T, float>::value;
            if (narrow[i]) {
                grads[i] = take<float>(x, sizes[i]);
                convert(x, (float *)grads[i], (const T *)g[i], sizes[i]);
            } else if (!g[i] && a[i] && (weight || args[i].role == MEGALODON_IN)) {
                grads[i] = take<float>(x, sizes[i]);
                clear(x, grads[i], (size_t)sizes[i] * sizeof(float));
            }
        }
        f(x, grads, a, s);
        add_sums(x);
        for (int i = 0; i < MEGALODON_MAX_ARGS; i++)
            if (narrow[i]) convert(x, (T *)g[i], (const float *)grads[i], sizes[i]);
    });
}

#define ENTRY(ID, name)                                                                                     \
    static void entry_##name##_forward(void *const *a, const MegalodonShape *s) {                           \
        call_component([&](Context *x) {                                                                    \
            if (s->precision == MEGALODON_BF16_MIXED)                                                       \
                component_##name##_forward<bf16>(x, a, s);                                                  \
            else                                                                                            \
                component_##name##_forward<float>(x, a, s);                                                 \
        });                                                                                                 \
    }                                                                                                       \
    static void entry_##name##_backward(void *const *g, void *const *a, const MegalodonShape *s) {          \
        if (s->precision == MEGALODON_BF16_MIXED)                                                           \
            call_backward<bf16>(MEGALODON_##ID, component_##name##_backward<bf16>, g, a, s);                \
        else                                                                                                \
            call_backward<float>(MEGALODON_##ID, component_##name##_backward<float>, g, a, s);              \
    }
#define COMPONENTS(X)                                                                                       \
    X(EMBEDDING, embedding)                                                                                 \
    X(TIMESTEPNORM, timestepnorm) X(CEMA, cema) X(RMSNORM, rmsnorm) X(LINEAR, linear) X(ZNORM, znorm)       \
        X(QK_AFFINE, qk_affine) X(ROPE, rope) X(SILU, silu) X(ATTENTION, attention) X(GATE, gate)           \
            X(LAYERNORM, layernorm) X(SWIGLU, swiglu) X(RESCALE, rescale) X(DROPOUT, dropout)               \
                X(CROSS_ENTROPY, cross_entropy)
COMPONENTS(ENTRY)

/* In the order of MegalodonComponentId. */
#define PAIR(ID, name) {entry_##name##_forward, entry_##name##_backward},
static const MegalodonComponentFunctions cuda_components[MEGALODON_NUM_COMPONENTS] = {COMPONENTS(PAIR)};

extern "C" {

void *megalodon_cuda_alloc(size_t bytes) {
    void *device = nullptr;
    CHECK_CUDA(cudaMalloc(&device, bytes ? bytes : 1));
    return device;
}
void megalodon_cuda_free(void *device) { CHECK_CUDA(cudaFree(device)); }
void megalodon_cuda_upload(void *device, const void *host, size_t bytes) {
    CHECK_CUDA(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice));
}
void megalodon_cuda_download(void *host, const void *device, size_t bytes) {
    CHECK_CUDA(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost));
}
void megalodon_cuda_wait(void) { CHECK_CUDA(cudaDeviceSynchronize()); }

extern const MegalodonBackend megalodon_cuda;
const MegalodonBackend megalodon_cuda = {
    "cuda",           cuda_unavailable, cuda_create,         cuda_destroy, cuda_forward,
    cuda_last_logits, cuda_backward,    cuda_zero_gradients, cuda_update,  cuda_get,
    cuda_set,         cuda_start_state, cuda_reset_rows,     cuda_state_shape, cuda_memory,
    cuda_components,
};
}
