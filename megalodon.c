/* megalodon.c - Megalodon on the CPU, forward and backward, in plain C with OpenMP.
 *
 * This file is the specification that other backends are checked against. It reads top to bottom:
 *   1. shared by all backends: presets, validation, tensor lists, random numbers, initial values
 *   2. arithmetic: threads, exp, the matrix product
 *   3. components: each op_forward beside its op_backward, with formula and shapes
 *   4. the model: memory, forward, backward, AdamW, state
 *   5. the backend table that the programs see, and the component table that tests and ports see
 *
 * One source serves two precisions: `real` is float, or double with -DMEGALODON_REAL=double (gradient
 * checks need it). With -DMEGALODON_BACKEND_ONLY part 1 is left out, so that both builds link into one
 * program.
 *
 * Conventions. Arguments come as outputs, what the backward needs, inputs, parameters, sizes. dx is
 * dLoss/dx and has x's shape. A backward writes the gradients of activations and of incoming states, and
 * adds to those of parameters. Each number is computed by one thread in an order that depends on the sizes
 * alone: any number of threads gives the same bits. Letters and names are those of megalodon.h.
 */
#include "megalodon.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

/* `simd` marks loops whose order of summation is free. Clang warns about those that it leaves scalar; they
 * are right all the same. */
#ifdef __clang__
#pragma clang diagnostic ignored "-Wpass-failed"
#endif

#ifndef MEGALODON_REAL
#define MEGALODON_REAL float
#endif
typedef MEGALODON_REAL real;

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define PI 3.14159265358979323846

enum { MAX_CEMA_NDIM = 64 };     /* the CEMA loops keep a channel's states in arrays of this size */

/* Formats an error sentence. It lives until this thread's next error. */
#ifdef __GNUC__
__attribute__((__format__(__printf__, 1, 2)))
#endif
static const char *errorf(const char *format, ...) {
    static _Thread_local char sentence[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(sentence, sizeof sentence, format, arguments);
    va_end(arguments);
    return sentence;
}

/* OpenMP directives vanish in a build without it. PARALLEL_FOR forks only when `work` (elements touched) is
 * worth the few microseconds that a fork costs; it never changes what is computed. */
#ifdef _OPENMP
#define DIRECTIVE(text) _Pragma(#text)
#define OMP(text) DIRECTIVE(omp text)
#else
#define OMP(text)
#endif
enum { FORK_WORTH = 16384 };
#define PARALLEL_FOR(work) OMP(parallel for schedule(static) if ((work) >= FORK_WORTH))

/* Whether a configuration has a tensor of this kind of presence. */
static bool is_present(const MegalodonConfig *c, MegalodonPresence presence) {
    switch (presence) {
    case MEGALODON_IF_AFFINE:  return c->norm_affine;
    case MEGALODON_IF_SWIGLU:  return c->swiglu;
    case MEGALODON_IF_RESCALE: return c->rescale_nffn;
    case MEGALODON_IF_UNTIED:  return !c->share_emb;
    default:                   return true;
    }
}

/* ----------------------------------------------------------------------------------------------------
 * 1. Shared by all backends
 */
#ifndef MEGALODON_BACKEND_ONLY

#define SIZES(l, d, h, z, e, f, g, c, v)                                                                     \
    .num_layers = l, .model_dim = d, .num_heads = h, .z_dim = z, .value_dim = e, .ffn_hidden_dim = f,        \
    .norm_num_groups = g, .chunk_size = c, .vocab_size = v, .cema_ndim = 16, .norm_eps = 1e-5,               \
    .norm_affine = true

const MegalodonPreset megalodon_presets[] = {
    {"demo", "2.1 M parameters on bytes: learns to write in three minutes on two CPU cores",
        {SIZES(4, 192, 1, 64, 384, 384, 16, 256, 256), .rope_base = 1e4, .swiglu = true}},
    {"bytes12M", "12.1 M parameters on bytes, the size with public enwik8 results",
        {SIZES(6, 384, 1, 96, 768, 768, 32, 512, 256), .rope_base = 1e5, .swiglu = true}},
    {"mega200M", "the released 200 M configuration",
        {SIZES(12, 1024, 1, 256, 2048, 2560, 32, 2048, 32000), .rope_base = 1e4}},
    {"mega1.3B", "the released 1.3 B configuration",
        {SIZES(24, 2048, 2, 512, 4096, 4864, 64, 2048, 32000), .rope_base = 1e4}},
    {"mega1.3B_pg19", "1.3 B for PG-19: SwiGLU, tied and scaled embedding",
        {SIZES(24, 2048, 2, 512, 4096, 3584, 64, 2048, 32000), .rope_base = 1e4, .swiglu = true,
         .share_emb = true, .scale_emb = true}},
    {"mega7.1B", "the released 7 B configuration without SwiGLU",
        {SIZES(32, 4096, 4, 1024, 8192, 11264, 64, 2048, 32000), .rope_base = 1e4}},
    {"mega7.3B", "the paper's 7 B: SwiGLU, chunks of 4096",
        {SIZES(32, 4096, 4, 1024, 8192, 8192, 64, 4096, 32000), .rope_base = 1e5, .swiglu = true}},
    {0}
};

void megalodon_default_config(MegalodonConfig *config) {
#define X(type, field, default_value, meaning) config->field = default_value;
    MEGALODON_CONFIG_FIELDS(X)
#undef X
}

const char *megalodon_preset(const char *name, MegalodonConfig *config) {
    char known[256] = "";
    for (const MegalodonPreset *p = megalodon_presets; p->name; p++) {
        if (strcmp(p->name, name) == 0) {
            *config = p->config;
            return NULL;
        }
        snprintf(known + strlen(known), sizeof known - strlen(known), " %s", p->name);
    }
    return errorf("unknown preset '%s'; known presets:%s", name, known);
}

/* Largest value of any size: products of three sizes then fit in 64 bits with room to spare. */
enum { MAX_SIZE = 1 << 20 };

const char *megalodon_validate(const MegalodonConfig *config) {
    const MegalodonConfig *c = config;
    const struct { const char *name; int value, low, high; } sizes[] = {
        {"num_layers", c->num_layers, 1, 4096},           {"model_dim", c->model_dim, 2, MAX_SIZE},
        {"num_heads", c->num_heads, 1, 4096},             {"z_dim", c->z_dim, 2, MAX_SIZE},
        {"value_dim", c->value_dim, 1, MAX_SIZE},         {"ffn_hidden_dim", c->ffn_hidden_dim, 1, MAX_SIZE},
        {"cema_ndim", c->cema_ndim, 1, MAX_CEMA_NDIM},    {"chunk_size", c->chunk_size, 1, MAX_SIZE},
        {"norm_num_groups", c->norm_num_groups, 1, 65536}, {"vocab_size", c->vocab_size, 2, MAX_SIZE * 16},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i].value < sizes[i].low || sizes[i].value > sizes[i].high)
            return errorf("%s is %d; it must be from %d to %d", sizes[i].name, sizes[i].value, sizes[i].low,
                          sizes[i].high);
    if (c->model_dim % c->norm_num_groups)
        return errorf("model_dim %d is not a multiple of norm_num_groups %d", c->model_dim,
                      c->norm_num_groups);
    if (c->z_dim % c->num_heads)
        return errorf("z_dim %d is not a multiple of num_heads %d", c->z_dim, c->num_heads);
    if (c->z_dim / c->num_heads % 2)
        return errorf(
            "z_dim %d / num_heads %d is %d; the rotary embedding needs an even number of entries a head",
            c->z_dim, c->num_heads, c->z_dim / c->num_heads);
    if (c->value_dim % c->num_heads)
        return errorf("value_dim %d is not a multiple of num_heads %d", c->value_dim, c->num_heads);
    if (!(c->norm_eps > 0 && c->norm_eps <= 1))
        return errorf("norm_eps is %g; it must be above 0 and at most 1", c->norm_eps);
    if (!(c->rope_base >= 1 && c->rope_base <= 1e12))
        return errorf("rope_base is %g; it must be from 1 to 1e12", c->rope_base);
    const struct { const char *name; double p; } dropouts[] = {
        {"dropout", c->dropout}, {"hidden_dropout", c->hidden_dropout},
        {"attention_dropout", c->attention_dropout}};
    for (int i = 0; i < 3; i++)
        if (!(dropouts[i].p >= 0 && dropouts[i].p < 1))
            return errorf("%s is %g; it must be at least 0 and below 1", dropouts[i].name, dropouts[i].p);
    return NULL;
}

int megalodon_shape(const char *letters, const MegalodonConfig *c, int B, int T, int n,
                    int64_t dims[MEGALODON_MAX_DIMS]) {
    int ndim = 0;
    for (const char *p = letters; *p; p++) {
        switch (*p) {
        case ',': continue;
        case 'B': dims[ndim++] = B; break;
        case 'T': dims[ndim++] = T; break;
        case 'n': dims[ndim++] = n; break;
        case 'D': dims[ndim++] = c->model_dim; break;
        case 'N': dims[ndim++] = c->cema_ndim; break;
        case 'H': dims[ndim++] = c->num_heads; break;
        case 'Z': dims[ndim++] = c->z_dim; break;
        case 'z': dims[ndim++] = c->z_dim / c->num_heads; break;
        case 'E': dims[ndim++] = c->value_dim; break;
        case 'e': dims[ndim++] = c->value_dim / c->num_heads; break;
        case 'F': dims[ndim++] = c->ffn_hidden_dim; break;
        case 'G': dims[ndim++] = c->norm_num_groups; break;
        case 'C': dims[ndim++] = c->chunk_size; break;
        case 'V': dims[ndim++] = c->vocab_size; break;
        default:  dims[ndim++] = *p - '0'; break;      /* a digit stands for itself */
        }
    }
    return ndim;
}

typedef struct { const char *name, *shape; MegalodonInit init; MegalodonPresence presence; } TensorSpec;

static const TensorSpec layer_params[] = {
#define X(field, name, shape, init, presence) {name, shape, init, presence},
    MEGALODON_LAYER_PARAMS(X)
};
static const TensorSpec model_params[] = {
    MEGALODON_MODEL_PARAMS(X)
#undef X
};
#define X(field, name, shape, kept, presence) {name, shape, MEGALODON_INIT_ZERO, presence},
static const TensorSpec layer_acts[] = { MEGALODON_LAYER_ACTS(X) };
static const TensorSpec model_acts[] = { MEGALODON_MODEL_ACTS(X) };
#undef X
#define X(field, name, shape) {name, shape, MEGALODON_INIT_ZERO, MEGALODON_ALWAYS},
static const TensorSpec layer_state[] = { MEGALODON_LAYER_STATE(X) };
static const TensorSpec model_state[] = { MEGALODON_MODEL_STATE(X) };
#undef X
#define LENGTH(array) ((int)(sizeof (array) / sizeof *(array)))

/* Appends one tensor to a list if the configuration has it; counts past the capacity without writing. */
static void list_tensor(const MegalodonConfig *c, const TensorSpec *spec, int layer, int B, int T, int n,
                        MegalodonTensor *out, int capacity, int *count) {
    if (!is_present(c, spec->presence)) return;
    if (*count < capacity) {
        MegalodonTensor *t = &out[*count];
        if (layer >= 0) snprintf(t->name, sizeof t->name, "layers.%d.%s", layer, spec->name);
        else snprintf(t->name, sizeof t->name, "%s", spec->name);
        t->ndim = megalodon_shape(spec->shape, c, B, T, n, t->dims);
        t->size = 1;
        for (int i = 0; i < t->ndim; i++) t->size *= t->dims[i];
        t->init = spec->init;
        t->layer = layer;
    }
    ++*count;
}

int megalodon_tensors(const MegalodonConfig *config, MegalodonKind kind, int B, int T, int n,
                      MegalodonTensor *out, int capacity) {
    const TensorSpec *layer = layer_params, *model = model_params;
    int num_layer = LENGTH(layer_params), num_model = LENGTH(model_params), count = 0;
    if (kind == MEGALODON_ACT) {
        layer = layer_acts, num_layer = LENGTH(layer_acts), model = model_acts,
        num_model = LENGTH(model_acts);
    } else if (kind == MEGALODON_STATE || kind == MEGALODON_GRAD_STATE_IN ||
               kind == MEGALODON_GRAD_STATE_OUT) {
        layer = layer_state, num_layer = LENGTH(layer_state), model = model_state,
        num_model = LENGTH(model_state);
    }
    /* The first tensor outside the blocks (embedding, count) comes before them in the graph, the others
     * after. */
    bool counts_have_no_gradient = kind == MEGALODON_GRAD_STATE_IN || kind == MEGALODON_GRAD_STATE_OUT;
    if (!counts_have_no_gradient) list_tensor(config, &model[0], -1, B, T, n, out, capacity, &count);
    for (int l = 0; l < config->num_layers; l++)
        for (int i = 0; i < num_layer; i++)
            list_tensor(config, &layer[i], l, B, T, n, out, capacity, &count);
    for (int i = 1; i < num_model; i++) list_tensor(config, &model[i], -1, B, T, n, out, capacity, &count);
    return count;
}

const char *megalodon_find_tensor(const MegalodonConfig *config, MegalodonKind kind, int B, int T, int n,
                                  const char *name, MegalodonTensor *out) {
    int count = megalodon_tensors(config, kind, B, T, n, NULL, 0);
    MegalodonTensor *list = malloc((size_t)count * sizeof *list);
    if (!list) return errorf("out of memory listing %d tensors", count);
    megalodon_tensors(config, kind, B, T, n, list, count);
    const char *error = errorf("this configuration has no tensor named '%s'", name);
    for (int i = 0; i < count; i++)
        if (strcmp(list[i].name, name) == 0) {
            *out = list[i];
            error = NULL;
        }
    free(list);
    return error;
}

int64_t megalodon_num_parameters(const MegalodonConfig *config) {
    MegalodonConfig one = *config;      /* all blocks are alike: count one and multiply */
    one.num_layers = 1;
    MegalodonTensor list[LENGTH(layer_params) + LENGTH(model_params)];
    int count = megalodon_tensors(&one, MEGALODON_PARAM, 1, 1, 0, list, LENGTH(list));
    int64_t total = 0;
    for (int i = 0; i < count; i++) total += list[i].size * (list[i].layer == 0 ? config->num_layers : 1);
    return total;
}

/* Random numbers without a state: element i of stream `key` is a hash of the two (the output function of
 * splitmix64), so that any backend, thread or restarted run can draw the same value. */
uint64_t megalodon_random(uint64_t key, uint64_t counter) {
    uint64_t z = key + (counter + 1) * 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

uint64_t megalodon_dropout_key(uint64_t seed, uint64_t step, int layer, MegalodonSite site) {
    uint64_t key = megalodon_random(seed, step);
    return megalodon_random(key, (uint64_t)(layer + 1) * 16 + (uint64_t)site);
}

/* Uniform in (0, 1): 53 bits, never 0 or 1. */
static double random_uniform(uint64_t key, uint64_t counter) {
    return ((double)(megalodon_random(key, counter) >> 11) + 0.5) * 0x1p-53;
}

/* Standard normal value number i of a stream (Box-Muller), drawn again until |x| < limit. */
static double random_normal(uint64_t key, uint64_t i, double limit) {
    for (uint64_t attempt = 0;; attempt++) {
        uint64_t stream = attempt ? megalodon_random(key, ~attempt) : key;
        double u = random_uniform(stream, 2 * i), v = random_uniform(stream, 2 * i + 1);
        double x = sqrt(-2 * log(u)) * cos(2 * PI * v);
        if (fabs(x) < limit) return x;
    }
}

/* theta[j] = logit(f) with f = exp(-i ln(D) / D) and i a random permutation of 1..D: one base frequency a
 * channel. */
static void initialise_theta(float *out, int64_t D, uint64_t key) {
    for (int64_t j = 0; j < D; j++) {
        double f = exp(-(double)(j + 1) * log((double)D) / (double)D);
        out[j] = (float)(log(f) - log1p(-f));
    }
    for (int64_t j = D - 1; j > 0; j--) {
        int64_t other = (int64_t)(random_uniform(key, (uint64_t)j) * (double)(j + 1));
        float swap = out[j];
        out[j] = out[other];
        out[other] = swap;
    }
}

void megalodon_initial_values(const MegalodonConfig *config, const MegalodonTensor *tensor, uint64_t seed,
                              float *out) {
    uint64_t key = megalodon_random(seed, 0);                /* a stream for each name */
    for (const char *p = tensor->name; *p; p++) key = megalodon_random(key, (unsigned char)*p);
    const double no_limit = INFINITY;
    double fan_in = (double)tensor->dims[tensor->ndim - 1];
    if (tensor->init == MEGALODON_INIT_CEMA_THETA) {
        initialise_theta(out, tensor->size, key);
        return;
    }
    PARALLEL_FOR(tensor->size)
    for (int64_t i = 0; i < tensor->size; i++) {
        uint64_t n = (uint64_t)i;
        double x = 0;
        switch (tensor->init) {
        case MEGALODON_INIT_HE:         x = random_normal(key, n, no_limit) / sqrt(3 * fan_in); break;
        case MEGALODON_INIT_EMBED:      x = random_normal(key, n, 3) / sqrt((double)config->model_dim); break;
        case MEGALODON_INIT_CEMA:       x = random_normal(key, n, no_limit) * 0.2; break;
        case MEGALODON_INIT_CEMA_GAMMA: x = i % 2 ? 0 : random_normal(key, n / 2, no_limit); break;
        case MEGALODON_INIT_CEMA_OMEGA: x = random_normal(key, n, 4) * 0.25; break;
        case MEGALODON_INIT_RESCALE:    x = 0.1 * pow(0.5, tensor->layer); break;
        default: break;
        }
        out[i] = (float)x;
    }
}

const char *megalodon_initialise(const MegalodonBackend *backend, MegalodonModel *model,
                                 const MegalodonConfig *config, uint64_t seed) {
    int count = megalodon_tensors(config, MEGALODON_PARAM, 1, 1, 0, NULL, 0);
    MegalodonTensor *list = malloc((size_t)count * sizeof *list);
    if (!list) return errorf("out of memory listing %d tensors", count);
    megalodon_tensors(config, MEGALODON_PARAM, 1, 1, 0, list, count);
    const char *error = NULL;
    for (int i = 0; i < count && !error; i++) {
        float *values = malloc((size_t)list[i].size * sizeof *values);
        if (!values) {
            error = errorf("out of memory: %s needs %lld bytes", list[i].name, (long long)list[i].size * 4);
            break;
        }
        megalodon_initial_values(config, &list[i], seed, values);
        error = backend->set(model, MEGALODON_PARAM, list[i].name, values, MEGALODON_F32);
        free(values);
    }
    free(list);
    return error;
}

const char *megalodon_check_batch(const MegalodonConfig *config, const MegalodonOptions *options,
                                  const MegalodonBatch *batch, int state_rows) {
    if (batch->B < 1 || batch->T < 1 || batch->B > options->max_batch || batch->T > options->max_length)
        return errorf("a batch of %d x %d tokens does not fit a model made for %d x %d", batch->B, batch->T,
                      options->max_batch, options->max_length);
    int64_t rows = (int64_t)batch->B * batch->T, V = config->vocab_size;
    for (int64_t i = 0; i < rows; i++) {
        if (batch->tokens[i] < 0 || batch->tokens[i] >= V)
            return errorf("token %d at row %lld, position %lld is outside the vocabulary of %lld",
                          batch->tokens[i], (long long)(i / batch->T), (long long)(i % batch->T),
                          (long long)V);
        if (batch->targets && batch->targets[i] != MEGALODON_IGNORE &&
            (batch->targets[i] < 0 || batch->targets[i] >= V))
            return errorf("target %d at row %lld, position %lld is outside the vocabulary of %lld",
                          batch->targets[i], (long long)(i / batch->T), (long long)(i % batch->T),
                          (long long)V);
    }
    if (!batch->carry) return NULL;
    if (options->training && !options->carry)
        return errorf("this model was made without `carry`: it has no state to go on from");
    if (state_rows != batch->B)
        return errorf("the state has %d rows and the batch %d: they must agree to go on", state_rows,
                      batch->B);
    return NULL;
}

const char *megalodon_check_reset(const MegalodonOptions *options, int state_rows, int n) {
    if ((options->training && !options->carry) || state_rows == 0)
        return errorf("there is no state whose rows could start anew");
    if (n != 0)
        return errorf("the state stands %d tokens inside a chunk: a row can start anew "
                      "only at a chunk's start", n);
    return NULL;
}

/* outputs, saved for the backward, inputs, parameters; shapes in the header's letters */
const MegalodonComponent megalodon_components[MEGALODON_NUM_COMPONENTS] = {
    [MEGALODON_EMBEDDING] = {"embedding", {
        {"out", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,D"},
        {"tokens", MEGALODON_INDEX, MEGALODON_I32_ARG, "B,T"},
        {"weight", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "V,D"}}},
    [MEGALODON_TIMESTEPNORM] = {"timestepnorm", {
        {"y", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,D"},
        {"mean", MEGALODON_SAVED, MEGALODON_STAT_ARG, "B,T,G"},
        {"var", MEGALODON_SAVED, MEGALODON_STAT_ARG, "B,T,G"},
        {"mean_out", MEGALODON_STATE_OUT, MEGALODON_WIDE_ARG, "B,G"},
        {"var_out", MEGALODON_STATE_OUT, MEGALODON_WIDE_ARG, "B,G"},
        {"x", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,D"},
        {"count", MEGALODON_INDEX, MEGALODON_I64_ARG, "B"},
        {"mean_in", MEGALODON_STATE_IN, MEGALODON_WIDE_ARG, "B,G"},
        {"var_in", MEGALODON_STATE_IN, MEGALODON_WIDE_ARG, "B,G"},
        {"weight", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "D"},
        {"bias", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "D"}}},
    [MEGALODON_CEMA] = {"cema", {
        {"y", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,D"},
        {"h_out", MEGALODON_STATE_OUT, MEGALODON_STAT_ARG, "B,D,N,2"},
        {"u", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,D"},
        {"h_in", MEGALODON_STATE_IN, MEGALODON_STAT_ARG, "B,D,N,2"},
        {"alpha", MEGALODON_WEIGHT, MEGALODON_STAT_ARG, "D,N,1"},
        {"delta", MEGALODON_WEIGHT, MEGALODON_STAT_ARG, "D,N,1"},
        {"theta", MEGALODON_WEIGHT, MEGALODON_STAT_ARG, "D,1,1"},
        {"gamma", MEGALODON_WEIGHT, MEGALODON_STAT_ARG, "D,N,2"},
        {"omega", MEGALODON_WEIGHT, MEGALODON_STAT_ARG, "D,1"}}},
    [MEGALODON_RMSNORM] = {"rmsnorm", {
        {"y", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,D"},
        {"rstd", MEGALODON_SAVED, MEGALODON_STAT_ARG, "B,T"},
        {"x", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,D"},
        {"weight", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "D"}}},
    [MEGALODON_LINEAR] = {"linear", {
        {"y", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,E"},
        {"x", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,D"},
        {"weight", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "E,D"},
        {"bias", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "E"}}},
    [MEGALODON_ZNORM] = {"znorm", {
        {"zn", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,Z"},
        {"zz", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,Z"}}},
    [MEGALODON_QK_AFFINE] = {"qk_affine", {
        {"q", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,Z"},
        {"k", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,Z"},
        {"zn", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,Z"},
        {"gamma", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "2,Z"},
        {"beta", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "2,Z"}}},
    [MEGALODON_ROPE] = {"rope", {
        {"y", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,H,z"},
        {"x", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,H,z"}}},
    [MEGALODON_SILU] = {"silu", {
        {"y", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,E"},
        {"x", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,E"}}},
    [MEGALODON_ATTENTION] = {"attention", {
        {"a", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,H,e"},
        {"lse", MEGALODON_SAVED, MEGALODON_STAT_ARG, "B,T,H"},
        {"q", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,H,z"},
        {"k", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,H,z"},
        {"v", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,H,e"},
        {"k_in", MEGALODON_STATE_IN, MEGALODON_REAL_ARG, "B,n,H,z"},
        {"v_in", MEGALODON_STATE_IN, MEGALODON_REAL_ARG, "B,n,H,e"}}},
    [MEGALODON_GATE] = {"gate", {
        {"y", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,E"},
        {"a", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,E"},
        {"r", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,E"}}},
    [MEGALODON_LAYERNORM] = {"layernorm", {
        {"y", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,D"},
        {"mean", MEGALODON_SAVED, MEGALODON_STAT_ARG, "B,T"},
        {"rstd", MEGALODON_SAVED, MEGALODON_STAT_ARG, "B,T"},
        {"x", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,D"},
        {"weight", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "D"},
        {"bias", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "D"}}},
    [MEGALODON_SWIGLU] = {"swiglu", {
        {"hidden", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,F"},
        {"f1", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,F"},
        {"f3", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,F"}}},
    [MEGALODON_RESCALE] = {"rescale", {
        {"out", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,D"},
        {"f", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,D"},
        {"x", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,D"},
        {"alpha", MEGALODON_WEIGHT, MEGALODON_REAL_ARG, "D"}}},
    [MEGALODON_DROPOUT] = {"dropout", {
        {"y", MEGALODON_OUT, MEGALODON_REAL_ARG, "B,T,D"},
        {"x", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,D"}}},
    [MEGALODON_CROSS_ENTROPY] = {"cross_entropy", {
        {"nll", MEGALODON_OUT, MEGALODON_STAT_ARG, "B,T"},
        {"logits", MEGALODON_IN, MEGALODON_REAL_ARG, "B,T,V"},
        {"targets", MEGALODON_INDEX, MEGALODON_I32_ARG, "B,T"}}},
};

#endif  /* MEGALODON_BACKEND_ONLY */

/* ----------------------------------------------------------------------------------------------------
 * 2. Arithmetic
 */

static int max_threads(void) {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/* A thread's scratch memory for n numbers, 64-byte aligned. It grows on the first call with a larger n;
 * create() makes that call in every thread, so that no step allocates. Contents do not survive the next
 * call in the same thread. */
static real *thread_scratch(size_t n) {
    static _Thread_local struct { real *data; size_t size; } scratch;
    if (n > scratch.size) {
        free(scratch.data);
        scratch.size = (n + 15) / 16 * 16;
        scratch.data = aligned_alloc(64, scratch.size * sizeof(real));
        if (!scratch.data) {
            fprintf(stderr, "error: %s:%d: out of memory for %zu bytes of scratch\n", __FILE__, __LINE__,
                    scratch.size * sizeof(real));
            exit(1);
        }
    }
    return scratch.data;
}

static inline real real_sqrt(real x) {
    return sizeof(real) == sizeof(float) ? (real)sqrtf((float)x) : (real)sqrt((double)x);
}

/* ----------------------------------------------------------------------------------------------------
 * Matrix product. Nearly all the arithmetic of the model is here, so this one function is blocked for
 * registers and caches; every other loop of this file is written to be read.
 *
 *            NC columns
 *         +----+----+----+      A tile of C (MR x NR) stays in vector registers while k runs over a block
 *      KC | B  | B  | B  |      of depth KC. Step k multiplies MR numbers, column k of a panel of A, by NR
 *         +----+----+----+      numbers, row k of a panel of B. The packed block of B (KC x NC, panel after
 *           NR   NR   NR        panel) stays in the second-level cache while all of A passes by; a packed
 *    KC                         panel of A (MR x KC) stays in the first-level cache while the panels of B
 *   +---+ +----+----+----+      pass by.
 *   | A | | C  | C  | C  | MR
 *   +---+ +----+----+----+      Packing also hides the strides and fills ragged edges with zeros, so that one
 *   | A | | C  | C  | C  | MR   kernel serves all. The threads pack a block of B together, then share out the
 *   +---+ +----+----+----+      tiles of C.
 *
 * An element is summed in an order that follows from K alone, whatever M, N, the threads and its place in a
 * tile. So the bits are the same for any number of threads, and a row of C depends on the same row of A
 * only, as long as the same way is taken: with few rows (generation) B is read once where it lies, without
 * packing.
 */
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, MR = 14 };     /* 32 registers: 14 x 2 for C, 2 for B, 1 for A */
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, MR = 6 };      /* 16 registers: 6 x 2 for C, 2 for B, 1 for A  */
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, MR = 14 };     /* 32 registers                                 */
#else
enum { VECTOR_BYTES = 16, MR = 6 };      /* SSE2: 16 registers                           */
#endif
enum {
    LANES = VECTOR_BYTES / sizeof(real),
    NR = 2 * LANES,                                      /* columns of a tile                               */
    KC = 384,                                            /* depth of a block                                */
    KC_STRIDE = KC + 16,                                 /* keeps rows of A off each other's cache sets     */
    NC = 512 * sizeof(float) / sizeof(real) / NR * NR,   /* columns of a block of B                         */
    FEW_ROWS = 12,                                       /* up to here packing W^T costs more than it gains */
    ROWS = 4,                                            /* summed together without packing                 */
    DOT_VECTORS = 4,                                     /* independent sums of a dot product, in vectors   */
    STRIP_VECTORS = 4                                    /* columns that a thread sums at once, in vectors  */
};

/* Where a float sum is computed in a wider type (x87), there are no vectors of floats either. */
#if defined(__GNUC__) && __FLT_EVAL_METHOD__ == 0
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
typedef real Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
ALWAYS_INLINE Vector vector_load(const real *p) { return *(const Vector *)p; }
ALWAYS_INLINE void vector_store(real *p, Vector v) { *(Vector *)p = v; }
ALWAYS_INLINE Vector vector_add(Vector x, Vector y) { return x + y; }
ALWAYS_INLINE Vector vector_multiply_add(Vector x, Vector y, Vector z) { return x * y + z; }
ALWAYS_INLINE Vector vector_scale_add(real s, Vector y, Vector z) { return s * y + z; }
#else
#define ALWAYS_INLINE static inline
#define UNROLL
typedef struct { real lane[LANES]; } Vector;
ALWAYS_INLINE Vector vector_load(const real *p) { Vector v; memcpy(&v, p, sizeof v); return v; }
ALWAYS_INLINE void vector_store(real *p, Vector v) { memcpy(p, &v, sizeof v); }
ALWAYS_INLINE Vector vector_add(Vector x, Vector y) {
    for (int i = 0; i < LANES; i++) x.lane[i] += y.lane[i];
    return x;
}
ALWAYS_INLINE Vector vector_multiply_add(Vector x, Vector y, Vector z) {
    for (int i = 0; i < LANES; i++) z.lane[i] = x.lane[i] * y.lane[i] + z.lane[i];
    return z;
}
ALWAYS_INLINE Vector vector_scale_add(real s, Vector y, Vector z) {
    for (int i = 0; i < LANES; i++) z.lane[i] = s * y.lane[i] + z.lane[i];
    return z;
}
#endif

static inline int64_t min_i64(int64_t x, int64_t y) { return x < y ? x : y; }

/* C(rows,columns) = A(MR,kc) B(kc,NR), or += if add, for one tile. A[i,k] = a[i*a_row + k*a_column], B[k,j] =
 * b[k*NR + j]: packed panels whose missing rows and columns are zero. */
ALWAYS_INLINE void matmul_tile(real *c, int64_t ldc, int rows, int columns, bool add,
                               const real *a, int a_row, int a_column, const real *b, int kc) {
    Vector sum[MR][2];
    memset(sum, 0, sizeof sum);
    for (int k = 0; k < kc; k++) {
        Vector b0 = vector_load(b + k * NR), b1 = vector_load(b + k * NR + LANES);
        UNROLL
        for (int i = 0; i < MR; i++) {
            real a_ik = a[i * a_row + k * a_column];
            sum[i][0] = vector_scale_add(a_ik, b0, sum[i][0]);
            sum[i][1] = vector_scale_add(a_ik, b1, sum[i][1]);
        }
    }
    if (rows == MR && columns == NR) {
        UNROLL
        for (int i = 0; i < MR; i++) {
            real *c_i = c + i * ldc;
            vector_store(c_i, add ? vector_add(vector_load(c_i), sum[i][0]) : sum[i][0]);
            vector_store(c_i + LANES, add ? vector_add(vector_load(c_i + LANES), sum[i][1]) : sum[i][1]);
        }
    } else {
        real tile[MR][NR];
        memcpy(tile, sum, sizeof tile);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) c[i * ldc + j] = add ? c[i * ldc + j] + tile[i][j] : tile[i][j];
    }
}

/* Packs A(rows,kc) for matmul_tile. Rows that are contiguous in memory stay rows (MR,KC_STRIDE), anything
 * else becomes columns (kc,MR): whichever is a plain copy. */
static void pack_a(real *packed, const real *a, int64_t rsa, int64_t csa, int rows, int kc) {
    if (csa == 1) {
        for (int i = 0; i < MR; i++) {
            if (i < rows) memcpy(packed + i * KC_STRIDE, a + i * rsa, kc * sizeof(real));
            else memset(packed + i * KC_STRIDE, 0, kc * sizeof(real));
        }
    } else if (rsa == 1 && rows == MR) {
        for (int k = 0; k < kc; k++) memcpy(packed + k * MR, a + k * csa, MR * sizeof(real));
    } else {
        for (int k = 0; k < kc; k++)
            for (int i = 0; i < MR; i++) packed[k * MR + i] = i < rows ? a[i * rsa + k * csa] : 0;
    }
}

/* Packs B(kc,columns) as kc rows of NR numbers. */
static void pack_b(real *packed, const real *b, int64_t rsb, int64_t csb, int columns, int kc) {
    if (columns < NR) memset(packed, 0, (size_t)kc * NR * sizeof(real));
    if (csb == 1 && columns == NR) {
        for (int k = 0; k < kc; k++) memcpy(packed + k * NR, b + k * rsb, NR * sizeof(real));
    } else if (rsb == 1 && columns == NR) {
        /* a transposition: four columns at a time, in runs so short that the rows they fill stay in the
         * cache */
        enum { RUN = 32, GROUP = 4 };
        for (int k0 = 0; k0 < kc; k0 += RUN)
            for (int j = 0; j < NR; j += GROUP)
                for (int k = k0; k < min_i64(k0 + RUN, kc); k++) {
                    real group[GROUP];
                    for (int i = 0; i < GROUP; i++) group[i] = b[(j + i) * csb + k];
                    memcpy(packed + k * NR + j, group, sizeof group);
                }
    } else {
        for (int k = 0; k < kc; k++)
            for (int j = 0; j < columns; j++) packed[k * NR + j] = b[k * rsb + j * csb];
    }
}

static int matmul_threads(void) {
#ifdef _OPENMP
    if (!omp_in_parallel()) return omp_get_max_threads();
#endif
    return 1;
}

/* One block: C(M,nc) = A(M,kc) B(kc,nc), or += if add, by all the threads of the parallel region around the
 * call. packed_b is theirs together, packed_a each one's own. */
static void matmul_block(real *c, int64_t ldc, const real *a, int64_t rsa, int64_t csa, const real *b,
                         int64_t rsb, int64_t csb, int64_t M, int nc, int kc, bool add, int threads,
                         real *packed_b, real *packed_a) {
    int panels = (nc + NR - 1) / NR;
    /* implicit barriers: nobody multiplies before all is packed, nobody packs again before all is
     * multiplied */
    OMP(for schedule(dynamic))
    for (int p = 0; p < panels; p++)
        pack_b(packed_b + (int64_t)p * NR * kc, b + p * NR * csb, rsb, csb, (int)min_i64(nc - p * NR, NR),
               kc);

    /* a task is MR rows and, where that makes too few tasks for the threads, only a part of the panels */
    int64_t row_panels = (M + MR - 1) / MR;
    int parts = (int)min_i64(panels, threads == 1 ? 1 : (4 * threads + row_panels - 1) / row_panels);
    OMP(for schedule(dynamic))
    for (int64_t task = 0; task < row_panels * parts; task++) {
        int64_t m = task / parts * MR;
        int part = (int)(task % parts), rows = (int)min_i64(M - m, MR);
        pack_a(packed_a, a + m * rsa, rsa, csa, rows, kc);
        for (int p = panels * part / parts; p < panels * (part + 1) / parts; p++) {
            const real *panel = packed_b + (int64_t)p * NR * kc;
            real *tile = c + m * ldc + p * NR;
            int columns = (int)min_i64(nc - p * NR, NR);
            if (csa == 1) matmul_tile(tile, ldc, rows, columns, add, packed_a, KC_STRIDE, 1, panel, kc);
            else matmul_tile(tile, ldc, rows, columns, add, packed_a, 1, MR, panel, kc);
        }
    }
}

/* c(rows) = A(rows,K) b(K), all contiguous along k: sum i of DOT_VECTORS x LANES sums takes every k that is
 * i modulo their number, and then they are added in pairs. */
ALWAYS_INLINE void matmul_dots(real *c, int64_t ldc, const real *a, int64_t rsa, const real *b, int rows,
                               int64_t K, bool add) {
    enum { STEP = DOT_VECTORS * LANES };
    Vector sum[ROWS][DOT_VECTORS];
    memset(sum, 0, sizeof sum);
    int64_t k = 0;
    for (; k + STEP <= K; k += STEP)
        UNROLL
        for (int j = 0; j < DOT_VECTORS; j++) {
            Vector b_kj = vector_load(b + k + j * LANES);
            UNROLL
            for (int m = 0; m < rows; m++)
                sum[m][j] = vector_multiply_add(vector_load(a + m * rsa + k + j * LANES), b_kj, sum[m][j]);
        }
    for (int m = 0; m < rows; m++) {
        real lanes[LANES];
        if (k < K) {
            real rest[2][STEP] = {{0}};
            memcpy(rest[0], a + m * rsa + k, (size_t)(K - k) * sizeof(real));
            memcpy(rest[1], b + k, (size_t)(K - k) * sizeof(real));
            for (int j = 0; j < DOT_VECTORS; j++)
                sum[m][j] = vector_multiply_add(vector_load(rest[0] + j * LANES),
                                                vector_load(rest[1] + j * LANES), sum[m][j]);
        }
        for (int width = DOT_VECTORS / 2; width > 0; width /= 2)
            for (int j = 0; j < width; j++) sum[m][j] = vector_add(sum[m][j], sum[m][j + width]);
        vector_store(lanes, sum[m][0]);
        for (int width = LANES / 2; width > 0; width /= 2)
            for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
        c[m * ldc] = add ? c[m * ldc] + lanes[0] : lanes[0];
    }
}

/* C(rows,columns) = A(rows,K) B(K,columns) for contiguous rows of B: the sums of a strip of columns stay in
 * registers. */
ALWAYS_INLINE void matmul_strip(real *c, int64_t ldc, const real *a, int64_t rsa, const real *b, int64_t rsb,
                                int columns, int rows, int64_t K, bool add) {
    enum { WIDTH = STRIP_VECTORS * LANES };
    Vector sum[ROWS][STRIP_VECTORS];
    real padded[WIDTH] = {0}, sums[ROWS][WIDTH];
    memset(sum, 0, sizeof sum);
    for (int64_t k = 0; k < K; k++) {
        const real *b_k = b + k * rsb;
        if (columns < WIDTH) b_k = memcpy(padded, b_k, (size_t)columns * sizeof(real));
        UNROLL
        for (int j = 0; j < STRIP_VECTORS; j++) {
            Vector b_kj = vector_load(b_k + j * LANES);
            UNROLL
            for (int m = 0; m < rows; m++) sum[m][j] = vector_scale_add(a[m * rsa + k], b_kj, sum[m][j]);
        }
    }
    memcpy(sums, sum, sizeof sums);
    for (int m = 0; m < rows; m++)
        for (int j = 0; j < columns; j++) c[m * ldc + j] = add ? c[m * ldc + j] + sums[m][j] : sums[m][j];
}

/* One of the two above; `rows` must be a constant, so that the sums become registers. */
ALWAYS_INLINE void matmul_rows(real *c, int64_t ldc, const real *a, int64_t rsa, const real *b, int64_t rsb,
                               int columns, int rows, int64_t K, bool add) {
    if (rsb == 1) matmul_dots(c, ldc, a, rsa, b, rows, K, add);
    else matmul_strip(c, ldc, a, rsa, b, rsb, columns, rows, K, add);
}

/* Few rows, contiguous in A, and B contiguous one way or the other: bounded by the reading of B, which
 * comes from memory once, a column or a strip of columns at a time. */
static void matmul_few_rows(real *c, int64_t ldc, const real *a, int64_t rsa, const real *b, int64_t rsb,
                            int64_t csb, int64_t M, int64_t N, int64_t K, bool add) {
    /* A small matrix is read before another thread has woken up, the more so where other programs run. */
    int threads = N * K < 1 << 20 ? 1 : matmul_threads();
    int64_t step = rsb == 1 ? 1 : STRIP_VECTORS * LANES;
    (void)threads;                                       /* unused without OpenMP */
    OMP(parallel for schedule(static) num_threads(threads) if(threads > 1))
    for (int64_t n = 0; n < N; n += step) {
        for (int64_t m = 0; m < M; m += ROWS) {
            real *c_mn = c + m * ldc + n;
            const real *a_m = a + m * rsa, *b_n = b + n * csb;
            int columns = (int)min_i64(N - n, step);
            switch (min_i64(M - m, ROWS)) {
            case 1: matmul_rows(c_mn, ldc, a_m, rsa, b_n, rsb, columns, 1, K, add); break;
            case 2: matmul_rows(c_mn, ldc, a_m, rsa, b_n, rsb, columns, 2, K, add); break;
            case 3: matmul_rows(c_mn, ldc, a_m, rsa, b_n, rsb, columns, 3, K, add); break;
            default: matmul_rows(c_mn, ldc, a_m, rsa, b_n, rsb, columns, ROWS, K, add);
            }
        }
    }
}

/* C(M,N) = A(M,K) B(K,N), or C += A B if accumulate. Elements are addressed by strides: A[m,k] = a[m*rsa +
 * k*csa], B[k,n] = b[k*rsb + n*csb], C[m,n] = c[m*ldc + n]. Any sizes >= 0 (K = 0: an empty sum); C
 * overlaps neither A nor B. Runs on all threads, or on one when called inside a parallel region or when the
 * product is small. */
static void matmul(real *c, int64_t ldc, const real *a, int64_t rsa, int64_t csa, const real *b, int64_t rsb,
                   int64_t csb, int64_t M, int64_t N, int64_t K, bool accumulate) {
    static _Thread_local _Alignas(64) real b_buffer[KC * NC];
    if (M <= 0 || N <= 0) return;
    if (K <= 0) {
        for (int64_t m = 0; m < M && !accumulate; m++) memset(c + m * ldc, 0, N * sizeof(real));
        return;
    }
    if (csa == 1 && ((rsb == 1 && M <= FEW_ROWS) || (csb == 1 && M <= ROWS))) {
        matmul_few_rows(c, ldc, a, rsa, b, rsb, csb, M, N, K, accumulate);
        return;
    }
    int threads = M * N * K < 1 << 19 ? 1 : matmul_threads();
    int64_t blocks = (K + KC - 1) / KC, kc = (K + blocks - 1) / blocks;     /* blocks of nearly equal depth */
    real *packed_b = b_buffer;                                              /* of the calling thread        */
    OMP(parallel num_threads(threads) if(threads > 1))
    {
        static _Thread_local _Alignas(64) real packed_a[MR * KC_STRIDE];
        for (int64_t n = 0; n < N; n += NC)
            for (int64_t k = 0; k < K; k += kc)
                matmul_block(c + n, ldc, a + k * csa, rsa, csa, b + k * rsb + n * csb, rsb, csb, M,
                             (int)min_i64(N - n, NC), (int)min_i64(K - k, kc), accumulate || k > 0,
                             threads, packed_b, packed_a);
    }
}

/* e^x that compilers turn into vector code in a loop. float: x = n ln 2 + r with |r| <= ln(2)/2, a
 * polynomial for e^r (equal-ripple, 3e-9), and 2^n in two factors made of exponent bits, so that results
 * fade through the denormal numbers to 0 and pass into infinity; NaN stays NaN. Error at most 1.01 units in
 * the last place over [-87, 88]. double, which serves tests: the library's. */
static inline real real_exp(real x) {
    if (sizeof(real) == sizeof(double)) return (real)exp((double)x);
    const float round = 12582912.0f;                       /* 1.5 * 2^23: adding it rounds to an integer */
    const uint32_t round_bits = 0x4B400000u, limit = 0x42D00000u, infinity = 0x7F800000u;
    float y = (float)x, scale1, scale2;
    uint32_t bits, sign;
    /* |x| > 104 becomes 104, where the result is 0 or infinity already; on bits, since gcc makes no vector
     * code of a comparison that might meet NaN */
    memcpy(&bits, &y, sizeof bits);
    sign = bits & 0x80000000u;
    bits -= sign;
    bits = sign | (bits > limit && bits <= infinity ? limit : bits);
    memcpy(&y, &bits, sizeof y);

    float shifted = y * 1.44269504f + round, n = shifted - round;
    float r = y - n * 0.693359375f - n * -2.12194440e-4f;  /* ln 2 in two parts: n times the first is exact */
    float p = 0.0013814536f;
    p = p * r + 0.0083687450f;
    p = p * r + 0.0416683904f;
    p = p * r + 0.1666652040f;
    p = p * r + 0.4999999343f;
    p = p * r * r + r + 1.0f;
    memcpy(&bits, &shifted, sizeof bits);                  /* the low bits hold n */
    int32_t whole = (int32_t)(bits - round_bits), half = whole >> 1;
    bits = (uint32_t)(half + 127) << 23;
    memcpy(&scale1, &bits, sizeof scale1);
    bits = (uint32_t)(whole - half + 127) << 23;
    memcpy(&scale2, &bits, sizeof scale2);
    return (real)(p * scale1 * scale2);
}

/* 1 / (1 + e^-x): no cancellation for either sign of x, 0 and 1 at the far ends. */
static inline real real_sigmoid(real x) {
    return 1 / (1 + real_exp(-x));
}

/* ----------------------------------------------------------------------------------------------------
 * 3. Components
 */

/* Sums over all rows: a thread owns so many columns, two lines of the cache, and takes the rows in order. */
enum { COLUMNS = 32 };

/* Embedding:  out[t] = scale * weight[token[t]]
 * out (rows,D), tokens (rows), weight (V,D) */
static void embedding_forward(real *out, const int32_t *tokens, const real *weight, real scale, int64_t rows,
                              int64_t D) {
    PARALLEL_FOR(rows * D)
    for (int64_t i = 0; i < rows; i++) {
        const real *w = weight + (int64_t)tokens[i] * D;
        for (int64_t d = 0; d < D; d++) out[i * D + d] = scale * w[d];
    }
}

/* out = scale * weight[token]:  dweight[token] += scale * dout. Threads own columns, since a token may come
 * often. */
static void embedding_backward(real *dweight, const real *dout, const int32_t *tokens, real scale,
                               int64_t rows, int64_t D) {
    PARALLEL_FOR(rows * D)
    for (int64_t d0 = 0; d0 < D; d0 += COLUMNS) {
        int64_t d1 = MIN(d0 + COLUMNS, D);
        for (int64_t i = 0; i < rows; i++) {
            real *dw = dweight + (int64_t)tokens[i] * D;
            for (int64_t d = d0; d < d1; d++) dw[d] += scale * dout[i * D + d];
        }
    }
}

/* dweight[d] += sum over rows of dy[d] * xhat[d], and dbias[d] += sum of dy[d], for the three norms:
 * xhat = (x - mean) * rstd with one mean and rstd for each group of D/G features of a row (mean NULL: 0).
 * If rstd is NULL, `var` holds variances and rstd = 1/sqrt(var + eps). dweight or dbias may be NULL. */
static void norm_weight_backward(real *dweight, real *dbias, const real *dy, const real *x, const real *mean,
                                 const real *rstd, const real *var, double eps, int64_t rows, int64_t D,
                                 int64_t G) {
    PARALLEL_FOR(rows * D)
    for (int64_t d0 = 0; d0 < D; d0 += COLUMNS) {
        real dw[COLUMNS] = {0}, db[COLUMNS] = {0};
        int64_t n = MIN(COLUMNS, D - d0), group_size = D / G;
        for (int64_t i = 0; i < rows; i++) {
            const real *dy_i = dy + i * D + d0, *x_i = x + i * D + d0;
            for (int64_t d = 0; d < n;) {
                int64_t g = (d0 + d) / group_size, end = MIN(n, (g + 1) * group_size - d0);
                real mu = mean ? mean[i * G + g] : 0;
                real r = rstd ? rstd[i * G + g] : (real)(1 / sqrt((double)var[i * G + g] + eps));
                for (; d < end; d++) {
                    dw[d] += dy_i[d] * (x_i[d] - mu) * r;
                    db[d] += dy_i[d];
                }
            }
        }
        for (int64_t d = 0; d < n; d++) {
            if (dweight) dweight[d0 + d] += dw[d];
            if (dbias) dbias[d0 + d] += db[d];
        }
    }
}

/* TimestepNorm, second half:  y = (x - mean_t) / sqrt(var_t + eps) * (1 + weight) + bias
 * y, x (B,T,D); mean, var (B,T,G); weight, bias (D). rows = B*T. Also recomputes y for the backward. */
static void timestepnorm_apply(real *y, const real *mean, const real *var, const real *x, const real *weight,
                               const real *bias, int64_t rows, int64_t D, int64_t G, double eps) {
    PARALLEL_FOR(rows * D)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t g = 0; g < G; g++) {
            real mu = mean[i * G + g], rstd = (real)(1 / sqrt((double)var[i * G + g] + eps));
            for (int64_t d = g * (D / G); d < (g + 1) * (D / G); d++)
                y[i * D + d] = (x[i * D + d] - mu) * rstd * (1 + weight[d]) + bias[d];
        }
}

/* One step's own mean m and population variance s over its group of n features. */
static void group_moments(double *m, double *s, const real *x, int64_t n) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    *m = sum / (double)n;
    for (int64_t i = 0; i < n; i++) squares += (x[i] - *m) * (x[i] - *m);
    *s = squares / (double)n;
}

/* TimestepNorm: mean and variance over all steps so far, the current one included, for each row and group.
 * A step with own moments m, s joins n earlier ones, c1 = n/(n+1), c2 = 1/(n+1):
 *     var_t = c1 var + c2 s + c1 c2 (m - mean)^2        mean_t = mean + c2 (m - mean)
 *     y_t   = (x_t - mean_t) / sqrt(var_t + eps) * (1 + weight) + bias
 * y, x (B,T,D); mean, var (B,T,G) saved; mean_out, var_out, mean_in, var_in (B,G) double; count (B) steps
 * before. mean_in NULL: an empty state. State in and out may be the same memory. The running moments are
 * double: after a million steps an increment is far below what a float near 1 can hold. */
static void timestepnorm_forward(real *y, real *mean, real *var, double *mean_out, double *var_out,
                                 const real *x, const int64_t *count, const double *mean_in,
                                 const double *var_in, const real *weight, const real *bias, int64_t B,
                                 int64_t T, int64_t D, int64_t G, double eps) {
    int64_t size = D / G;
    OMP(parallel for collapse(2) schedule(static) if (B * T * D >= FORK_WORTH))
    for (int64_t b = 0; b < B; b++)
        for (int64_t g = 0; g < G; g++) {
            double n = mean_in ? (double)count[b] : 0;
            double mu = mean_in ? mean_in[b * G + g] : 0, sigma2 = mean_in ? var_in[b * G + g] : 0;
            for (int64_t t = 0; t < T; t++, n++) {
                double m, s, c2 = 1 / (n + 1), c1 = n * c2;
                group_moments(&m, &s, x + (b * T + t) * D + g * size, size);
                double d = m - mu;
                mu += c2 * d;
                sigma2 = c1 * sigma2 + c2 * s + c1 * c2 * d * d;
                mean[(b * T + t) * G + g] = (real)mu;
                var[(b * T + t) * G + g] = (real)sigma2;
            }
            if (mean_out) mean_out[b * G + g] = mu, var_out[b * G + g] = sigma2;
        }
    timestepnorm_apply(y, mean, var, x, weight, bias, B * T, D, G, eps);
}

/* Backward in time through the merges. With gm, gv the gradients of mean_t and var_t (from y_t and from
 * step t+1):
 *     var_t  = c1 var + c2 s + c1 c2 (m - mean)^2  ->  dvar += c1 gv;  ds = c2 gv
 *     mean_t = mean + c2 (m - mean)                ->  dmean += c1 gm - k;  dm = c2 gm + k
 *                                                      with k = 2 c1 c2 (m - mean) gv
 *     y = xhat (1 + w) + bias, dxhat = dy (1 + w)  ->  gm -= rstd sum dxhat;  gv -= rstd^2/2 sum dxhat xhat
 *     x enters y, m and s                          ->  dx = dxhat rstd + dm/size + ds 2 (x - m)/size
 * dx may be dy. dmean_out (NULL: 0) and dmean_in (NULL: not wanted) as in the forward. */
static void timestepnorm_backward(real *dx, double *dmean_in, double *dvar_in, real *dweight, real *dbias,
                                  const real *dy, const double *dmean_out, const double *dvar_out,
                                  const real *mean, const real *var, const real *x, const int64_t *count,
                                  const double *mean_in, const real *weight, int64_t B, int64_t T, int64_t D,
                                  int64_t G, double eps) {
    int64_t size = D / G;
    norm_weight_backward(dweight, dbias, dy, x, mean, NULL, var, eps, B * T, D, G);
    OMP(parallel for collapse(2) schedule(static) if (B * T * D >= FORK_WORTH))
    for (int64_t b = 0; b < B; b++)
        for (int64_t g = 0; g < G; g++) {
            double gm = dmean_out ? dmean_out[b * G + g] : 0, gv = dvar_out ? dvar_out[b * G + g] : 0;
            double start = mean_in ? (double)count[b] : 0;
            for (int64_t t = T - 1; t >= 0; t--) {
                const real *x_t = x + (b * T + t) * D + g * size, *dy_t = dy + (b * T + t) * D + g * size;
                const real *w = weight + g * size;
                real *dx_t = dx + (b * T + t) * D + g * size;
                double mu = mean[(b * T + t) * G + g],
                       rstd = 1 / sqrt((double)var[(b * T + t) * G + g] + eps);
                double sum = 0, product = 0, m, s;
                group_moments(&m, &s, x_t, size);
                for (int64_t i = 0; i < size; i++) {
                    double dxhat = (double)dy_t[i] * (1 + w[i]);
                    sum += dxhat;
                    product += dxhat * (x_t[i] - mu) * rstd;
                }
                gm -= rstd * sum;
                gv -= 0.5 * rstd * rstd * product;
                double n = start + (double)t, c2 = 1 / (n + 1), c1 = n * c2;
                double before = t ? mean[(b * T + t - 1) * G + g] : mean_in ? mean_in[b * G + g] : 0;
                double k = 2 * c1 * c2 * (m - before) * gv, dm = c2 * gm + k, ds = c2 * gv;
                for (int64_t i = 0; i < size; i++)
                    dx_t[i] = (real)((double)dy_t[i] * (1 + w[i]) * rstd +
                                     (dm + 2 * ds * (x_t[i] - m)) / (double)size);
                gm = c1 * gm - k;
                gv = c1 * gv;
            }
            if (dmean_in) dmean_in[b * G + g] = gm, dvar_in[b * G + g] = gv;
        }
}

/* CEMA's coefficients, from parameters that are logits. A channel j has N complex states with
 *     p = sigmoid(alpha)
 *     q = (1 - sigmoid(alpha) sigmoid(delta)) exp(i k sigmoid(theta) 2 pi / N),  k = 1..N
 *     c = gamma / sqrt(N)
 * Arrays are (D,N); they are computed once for each value of the parameters. */
typedef struct { real *p, *q_re, *q_im, *c_re, *c_im; } CemaCoefficients;
enum { NUM_CEMA_COEFFICIENTS = 5 };

static CemaCoefficients cema_coefficients_at(real *memory, int64_t D, int64_t N) {
    return (CemaCoefficients){memory, memory + D * N, memory + 2 * D * N, memory + 3 * D * N,
                              memory + 4 * D * N};
}

static double logistic(double x) { return 1 / (1 + exp(-x)); }

static void cema_coefficients(CemaCoefficients out, const real *alpha, const real *delta, const real *theta,
                              const real *gamma, int64_t D, int64_t N) {
    double scale = sqrt(1 / (double)N);
    PARALLEL_FOR(D * N * 16)
    for (int64_t j = 0; j < D; j++)
        for (int64_t k = 0; k < N; k++) {
            int64_t i = j * N + k;
            double p = logistic(alpha[i]), radius = 1 - p * logistic(delta[i]);
            double phase = (double)(k + 1) * logistic(theta[j]) * 2 * PI / (double)N;
            out.p[i] = (real)p;
            out.q_re[i] = (real)(radius * cos(phase));
            out.q_im[i] = (real)(radius * sin(phase));
            out.c_re[i] = (real)(scale * gamma[2 * i]);
            out.c_im[i] = (real)(scale * gamma[2 * i + 1]);
        }
}

/* One channel's coefficients and states side by side, so that the loops over k become vector instructions.
 * Sized for N = 16 when that is what the caller passes as a constant. */
typedef struct { real p[MAX_CEMA_NDIM], q_re[MAX_CEMA_NDIM], q_im[MAX_CEMA_NDIM], c_re[MAX_CEMA_NDIM],
                      c_im[MAX_CEMA_NDIM]; } CemaChannel;

static CemaChannel cema_channel(CemaCoefficients coef, int64_t j, int64_t N) {
    CemaChannel channel;
    size_t bytes = (size_t)N * sizeof(real);
    memcpy(channel.p, coef.p + j * N, bytes);
    memcpy(channel.q_re, coef.q_re + j * N, bytes);
    memcpy(channel.q_im, coef.q_im + j * N, bytes);
    memcpy(channel.c_re, coef.c_re + j * N, bytes);
    memcpy(channel.c_im, coef.c_im + j * N, bytes);
    return channel;
}

/* h <- q h + p u, for one channel's N states. */
static inline void cema_step(real *h_re, real *h_im, const CemaChannel *c, real u, int64_t N) {
    OMP(simd)
    for (int64_t k = 0; k < N; k++) {
        real re = c->q_re[k] * h_re[k] - c->q_im[k] * h_im[k] + c->p[k] * u;
        h_im[k] = c->q_re[k] * h_im[k] + c->q_im[k] * h_re[k];
        h_re[k] = re;
    }
}

/* One channel over T steps; u and y have stride D. y NULL: only the state moves. */
static inline void cema_channel_forward(real *y, real *h_re, real *h_im, const real *u, const CemaChannel *c,
                                        real omega, int64_t T, int64_t D, int64_t N) {
    for (int64_t t = 0; t < T; t++) {
        cema_step(h_re, h_im, c, u[t * D], N);
        if (!y) continue;
        real sum = 0;
        OMP(simd reduction(+:sum))
        for (int64_t k = 0; k < N; k++) sum += c->c_re[k] * h_re[k] - c->c_im[k] * h_im[k];
        y[t * D] = sum + omega * u[t * D];
    }
}

static void cema_load_state(real *h_re, real *h_im, const real *h, int64_t N) {
    for (int64_t k = 0; k < N; k++) h_re[k] = h ? h[2 * k] : 0, h_im[k] = h ? h[2 * k + 1] : 0;
}

static void cema_store_state(real *h, const real *h_re, const real *h_im, int64_t N) {
    for (int64_t k = 0; k < N; k++) h[2 * k] = h_re[k], h[2 * k + 1] = h_im[k];
}

/* CEMA: for each channel j of D, N complex states
 *     h_t = q h_{t-1} + p u_t        y_t = Re( sum_k c h_t[k] ) + omega u_t
 * y, u (B,T,D); h_out, h_in (B,D,N,2) interleaved (re, im); coefficients (D,N); omega (D). h_in NULL: zero.
 * State in and out may be the same memory; h_out NULL: not wanted. */
static void cema_forward(real *y, real *h_out, const real *u, const real *h_in, CemaCoefficients coef,
                         const real *omega, int64_t B, int64_t T, int64_t D, int64_t N) {
    OMP(parallel for collapse(2) schedule(static) if (B * T * D * N >= FORK_WORTH))
    for (int64_t b = 0; b < B; b++)
        for (int64_t j = 0; j < D; j++) {
            real h_re[MAX_CEMA_NDIM], h_im[MAX_CEMA_NDIM];
            const CemaChannel channel = cema_channel(coef, j, N);
            const real *u_bj = u + b * T * D + j;
            real *y_bj = y + b * T * D + j;
            cema_load_state(h_re, h_im, h_in ? h_in + (b * D + j) * N * 2 : NULL, N);
            if (N == 16) cema_channel_forward(y_bj, h_re, h_im, u_bj, &channel, omega[j], T, D, 16);
            else cema_channel_forward(y_bj, h_re, h_im, u_bj, &channel, omega[j], T, D, N);
            if (h_out) cema_store_state(h_out + (b * D + j) * N * 2, h_re, h_im, N);
        }
}

enum { CEMA_BLOCK = 64 };        /* the backward holds the states of this many steps at a time */

/* Sums over time of one channel's gradients of p, q, c (complex as re, im) and omega. */
typedef struct { double p[MAX_CEMA_NDIM], q_re[MAX_CEMA_NDIM], q_im[MAX_CEMA_NDIM], c_re[MAX_CEMA_NDIM],
                        c_im[MAX_CEMA_NDIM], omega; } CemaSums;

/* One block of at most CEMA_BLOCK steps of one channel, backward in time. g (re, im) is the gradient of the
 * state after the block, then of the state before it. history holds CEMA_BLOCK+1 states, N re then N im
 * each. */
static inline void cema_block_backward(real *du, real *g_re, real *g_im, CemaSums *sums, const real *dy,
                                       const real *u, const real *h_start, real *history,
                                       const CemaChannel *c, real omega, int64_t steps, int64_t D,
                                       int64_t N) {
    memcpy(history, h_start, 2 * (size_t)N * sizeof(real));
    for (int64_t t = 0; t < steps; t++) {
        real *h = history + (t + 1) * 2 * N;
        memcpy(h, h - 2 * N, 2 * (size_t)N * sizeof(real));
        cema_step(h, h + N, c, u[t * D], N);
    }
    real dp[MAX_CEMA_NDIM] = {0}, dq_re[MAX_CEMA_NDIM] = {0}, dq_im[MAX_CEMA_NDIM] = {0};
    real dc_re[MAX_CEMA_NDIM] = {0}, dc_im[MAX_CEMA_NDIM] = {0}, domega = 0;
    for (int64_t t = steps - 1; t >= 0; t--) {
        const real *before = history + t * 2 * N, *h = before + 2 * N;
        real dy_t = dy[t * D], u_t = u[t * D], sum = 0;
        OMP(simd reduction(+:sum))
        for (int64_t k = 0; k < N; k++) {
            real re = g_re[k] + c->c_re[k] * dy_t, im = g_im[k] - c->c_im[k] * dy_t;
            dc_re[k] += dy_t * h[k];                             /* y = Re(c h): dh += conj(c) dy (above) */
            dc_im[k] -= dy_t * h[N + k];                         /*              dc += conj(h) dy         */
            sum += c->p[k] * re;                                 /* h = q h' + p u: du += p Re(dh)        */
            dp[k] += u_t * re;
            dq_re[k] += re * before[k] + im * before[N + k];     /*                 dq += dh conj(h')     */
            dq_im[k] += im * before[k] - re * before[N + k];
            g_re[k] = c->q_re[k] * re + c->q_im[k] * im;         /*                 dh' = conj(q) dh      */
            g_im[k] = c->q_re[k] * im - c->q_im[k] * re;
        }
        du[t * D] = sum + omega * dy_t;
        domega += dy_t * u_t;
    }
    for (int64_t k = 0; k < N; k++) {
        sums->p[k] += dp[k];
        sums->q_re[k] += dq_re[k], sums->q_im[k] += dq_im[k];
        sums->c_re[k] += dc_re[k], sums->c_im[k] += dc_im[k];
    }
    sums->omega += domega;
}

/* Turns one channel's sums into gradients of its parameters:
 *     p = a, radius = 1 - a d, q = radius exp(i phase), phase = k s 2 pi/N
 *     with a, d, s = sigmoid(alpha), sigmoid(delta), sigmoid(theta)
 *     c = gamma / sqrt(N) */
static void cema_parameter_backward(real *dalpha, real *ddelta, real *dtheta, real *dgamma, real *domega,
                                    const CemaSums *sums, const real *alpha, const real *delta, real theta,
                                    int64_t N) {
    double s = logistic(theta), ds = 0;
    for (int64_t k = 0; k < N; k++) {
        double a = logistic(alpha[k]), d = logistic(delta[k]), radius = 1 - a * d;
        double turn = (double)(k + 1) * 2 * PI / (double)N, phase = turn * s;
        double dradius = sums->q_re[k] * cos(phase) + sums->q_im[k] * sin(phase);
        double dphase = radius * (sums->q_im[k] * cos(phase) - sums->q_re[k] * sin(phase));
        dalpha[k] += (real)((sums->p[k] - d * dradius) * a * (1 - a));
        ddelta[k] += (real)(-a * dradius * d * (1 - d));
        dgamma[2 * k] += (real)(sums->c_re[k] / sqrt((double)N));
        dgamma[2 * k + 1] += (real)(sums->c_im[k] / sqrt((double)N));
        ds += dphase * turn;
    }
    *dtheta += (real)(ds * s * (1 - s));
    *domega += (real)sums->omega;
}

/* Numbers of scratch for a thread of cema_backward: a block's states, and the state at each block's start. */
static size_t cema_scratch(int64_t T, int64_t N) {
    return (size_t)(((T + CEMA_BLOCK - 1) / CEMA_BLOCK + CEMA_BLOCK + 1) * 2 * N);
}

/* Backward of cema_forward. The states are not saved: a first pass over u finds the state at the start of
 * each block of CEMA_BLOCK steps, then the blocks are walked from the last to the first, recomputing their
 * states.
 * du, dy (B,T,D), du may be dy; dh_in (NULL: not wanted), dh_out (NULL: zero) (B,D,N,2). A thread owns
 * channels. */
static void cema_backward(real *du, real *dh_in, real *dalpha, real *ddelta, real *dtheta, real *dgamma,
                          real *domega, const real *dy, const real *dh_out, const real *u, const real *h_in,
                          CemaCoefficients coef, const real *alpha, const real *delta, const real *theta,
                          const real *omega, int64_t B, int64_t T, int64_t D, int64_t N) {
    OMP(parallel for schedule(static) if (B * T * D * N >= FORK_WORTH))
    for (int64_t j = 0; j < D; j++) {
        int64_t blocks = (T + CEMA_BLOCK - 1) / CEMA_BLOCK;
        real *history = thread_scratch(cema_scratch(T, N)), *starts = history + (CEMA_BLOCK + 1) * 2 * N;
        const CemaChannel channel = cema_channel(coef, j, N);
        CemaSums sums = {0};
        for (int64_t b = 0; b < B; b++) {
            const real *u_bj = u + b * T * D + j, *dy_bj = dy + b * T * D + j;
            real *du_bj = du + b * T * D + j, h_re[MAX_CEMA_NDIM], h_im[MAX_CEMA_NDIM];
            cema_load_state(h_re, h_im, h_in ? h_in + (b * D + j) * N * 2 : NULL, N);
            for (int64_t i = 0; i < blocks; i++) {
                memcpy(starts + i * 2 * N, h_re, (size_t)N * sizeof(real));
                memcpy(starts + i * 2 * N + N, h_im, (size_t)N * sizeof(real));
                if (i == blocks - 1) break;
                const real *u_i = u_bj + i * CEMA_BLOCK * D;
                if (N == 16) cema_channel_forward(NULL, h_re, h_im, u_i, &channel, 0, CEMA_BLOCK, D, 16);
                else cema_channel_forward(NULL, h_re, h_im, u_i, &channel, 0, CEMA_BLOCK, D, N);
            }
            real g_re[MAX_CEMA_NDIM], g_im[MAX_CEMA_NDIM];
            cema_load_state(g_re, g_im, dh_out ? dh_out + (b * D + j) * N * 2 : NULL, N);
            for (int64_t i = blocks - 1; i >= 0; i--) {
                int64_t t0 = i * CEMA_BLOCK, steps = MIN(T - t0, CEMA_BLOCK);
                real *du_i = du_bj + t0 * D;
                const real *dy_i = dy_bj + t0 * D, *u_i = u_bj + t0 * D, *start = starts + i * 2 * N;
                if (N == 16) cema_block_backward(du_i, g_re, g_im, &sums, dy_i, u_i, start, history, &channel,
                                                 omega[j], steps, D, 16);
                else cema_block_backward(du_i, g_re, g_im, &sums, dy_i, u_i, start, history, &channel,
                                         omega[j], steps, D, N);
            }
            if (dh_in) cema_store_state(dh_in + (b * D + j) * N * 2, g_re, g_im, N);
        }
        cema_parameter_backward(dalpha + j * N, ddelta + j * N, dtheta + j, dgamma + j * N * 2, domega + j,
                                &sums, alpha + j * N, delta + j * N, theta[j], N);
    }
}

/* RMSNorm:  y = x * rstd * (1 + weight),  rstd = 1/sqrt(mean(x^2) + eps)
 * y, x (rows,D); rstd (rows) saved; weight (D) or NULL for none. */
static void rmsnorm_forward(real *y, real *rstd, const real *x, const real *weight, int64_t rows, int64_t D,
                            double eps) {
    PARALLEL_FOR(rows * D)
    for (int64_t i = 0; i < rows; i++) {
        const real *x_i = x + i * D;
        real squares = 0;
        OMP(simd reduction(+:squares))
        for (int64_t d = 0; d < D; d++) squares += x_i[d] * x_i[d];
        real r = (real)(1 / sqrt((double)squares / (double)D + eps));
        rstd[i] = r;
        for (int64_t d = 0; d < D; d++) y[i * D + d] = x_i[d] * r * (weight ? 1 + weight[d] : 1);
    }
}

/* xhat = x rstd, dxhat = dy (1 + weight):  dx = rstd (dxhat - xhat mean(dxhat xhat));  dweight += dy xhat
 * dx may be dy. */
static void rmsnorm_backward(real *dx, real *dweight, const real *dy, const real *rstd, const real *x,
                             const real *weight, int64_t rows, int64_t D) {
    if (dweight) norm_weight_backward(dweight, NULL, dy, x, NULL, rstd, NULL, 0, rows, D, 1);
    PARALLEL_FOR(rows * D)
    for (int64_t i = 0; i < rows; i++) {
        const real *x_i = x + i * D, *dy_i = dy + i * D;
        real product = 0, r = rstd[i];
        OMP(simd reduction(+:product))
        for (int64_t d = 0; d < D; d++) product += dy_i[d] * (weight ? 1 + weight[d] : 1) * x_i[d];
        real k = product * r * r * r / (real)D;
        for (int64_t d = 0; d < D; d++)
            dx[i * D + d] = dy_i[d] * (weight ? 1 + weight[d] : 1) * r - x_i[d] * k;
    }
}

/* Linear:  y = x weight^T + bias
 * y (rows,N); x (rows,K); weight (N,K); bias (N) or NULL. accumulate: y += instead of y =. */
static void linear_forward(real *y, const real *x, const real *weight, const real *bias, int64_t rows,
                           int64_t K, int64_t N, bool accumulate) {
    matmul(y, N, x, K, 1, weight, 1, K, rows, N, K, accumulate);
    if (!bias) return;
    PARALLEL_FOR(rows * N)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t n = 0; n < N; n++) y[i * N + n] += bias[n];
}

/* dbias[n] += sum over rows of dy[n] */
static void bias_backward(real *dbias, const real *dy, int64_t rows, int64_t N) {
    PARALLEL_FOR(rows * N)
    for (int64_t n0 = 0; n0 < N; n0 += COLUMNS) {
        int64_t n1 = MIN(n0 + COLUMNS, N);
        real sum[COLUMNS] = {0};
        for (int64_t i = 0; i < rows; i++)
            for (int64_t n = n0; n < n1; n++) sum[n - n0] += dy[i * N + n];
        for (int64_t n = n0; n < n1; n++) dbias[n] += sum[n - n0];
    }
}

/* y = x weight^T + bias:  dx = dy weight;  dweight += dy^T x;  dbias += sum dy
 * accumulate_dx: dx +=, for an input that several products share. dx NULL: not wanted. */
static void linear_backward(real *dx, real *dweight, real *dbias, const real *dy, const real *x,
                            const real *weight, int64_t rows, int64_t K, int64_t N, bool accumulate_dx) {
    if (dx) matmul(dx, K, dy, N, 1, weight, K, 1, rows, K, N, accumulate_dx);
    if (dweight) matmul(dweight, K, dy, 1, N, x, K, 1, N, K, rows, true);
    if (dbias) bias_backward(dbias, dy, rows, N);
}

/* z-norm:  zn = zz / sqrt(mean(zz^2) + eps) over the z entries of each head, no weight
 * zn, zz (rows,H,z) */
static void znorm_forward(real *zn, const real *zz, int64_t rows, int64_t H, int64_t z, double eps) {
    PARALLEL_FOR(rows * H * z)
    for (int64_t i = 0; i < rows * H; i++) {
        const real *x = zz + i * z;
        real squares = 0;
        OMP(simd reduction(+:squares))
        for (int64_t d = 0; d < z; d++) squares += x[d] * x[d];
        real rstd = (real)(1 / sqrt((double)squares / (double)z + eps));
        for (int64_t d = 0; d < z; d++) zn[i * z + d] = x[d] * rstd;
    }
}

/* zn = zz rstd:  dzz = rstd (dzn - zn mean(dzn zn)).  dzz may be dzn. */
static void znorm_backward(real *dzz, const real *dzn, const real *zz, int64_t rows, int64_t H, int64_t z,
                           double eps) {
    PARALLEL_FOR(rows * H * z)
    for (int64_t i = 0; i < rows * H; i++) {
        const real *x = zz + i * z, *dy = dzn + i * z;
        real squares = 0, product = 0;
        OMP(simd reduction(+:squares, product))
        for (int64_t d = 0; d < z; d++) squares += x[d] * x[d], product += dy[d] * x[d];
        real rstd = (real)(1 / sqrt((double)squares / (double)z + eps));
        real k = product * rstd * rstd * rstd / (real)z;
        for (int64_t d = 0; d < z; d++) dzz[i * z + d] = dy[d] * rstd - x[d] * k;
    }
}

/* Query and key from one vector:  q = zn (1 + gamma[0]) / sqrt(z) + beta[0],  k the same with row 1
 * q, k, zn (rows,Z); gamma, beta (2,Z); z = Z/H. The scores then need no scale. */
static void qk_affine_forward(real *q, real *k, const real *zn, const real *gamma, const real *beta,
                              int64_t rows, int64_t Z, int64_t z) {
    real scale = (real)(1 / sqrt((double)z));
    PARALLEL_FOR(rows * Z)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < Z; d++) {
            real x = zn[i * Z + d] * scale;
            q[i * Z + d] = x * (1 + gamma[d]) + beta[d];
            k[i * Z + d] = x * (1 + gamma[Z + d]) + beta[Z + d];
        }
}

/* dzn = (dq (1 + gamma[0]) + dk (1 + gamma[1])) / sqrt(z);  dgamma[0] += dq zn / sqrt(z);  dbeta[0] += dq;
 * [1] with dk */
static void qk_affine_backward(real *dzn, real *dgamma, real *dbeta, const real *dq, const real *dk,
                               const real *zn, const real *gamma, int64_t rows, int64_t Z, int64_t z) {
    real scale = (real)(1 / sqrt((double)z));
    PARALLEL_FOR(rows * Z)
    for (int64_t d0 = 0; d0 < Z; d0 += COLUMNS) {
        int64_t n = MIN(COLUMNS, Z - d0);
        real dgamma_q[COLUMNS] = {0}, dgamma_k[COLUMNS] = {0}, dbeta_q[COLUMNS] = {0}, dbeta_k[COLUMNS] = {0};
        for (int64_t i = 0; i < rows; i++)
            for (int64_t d = 0; d < n; d++) {
                int64_t at = i * Z + d0 + d;
                dgamma_q[d] += dq[at] * zn[at] * scale;
                dgamma_k[d] += dk[at] * zn[at] * scale;
                dbeta_q[d] += dq[at];
                dbeta_k[d] += dk[at];
                dzn[at] = (dq[at] * (1 + gamma[d0 + d]) + dk[at] * (1 + gamma[Z + d0 + d])) * scale;
            }
        for (int64_t d = 0; d < n; d++) {
            dgamma[d0 + d] += dgamma_q[d], dgamma[Z + d0 + d] += dgamma_k[d];
            dbeta[d0 + d] += dbeta_q[d], dbeta[Z + d0 + d] += dbeta_k[d];
        }
    }
}

/* RoPE's table:  (cos, sin) of position * base^(-2i/z) for position 0..C-1 and pair i;  table (C,z/2,2) */
static void rope_table(real *table, int64_t C, int64_t z, double base) {
    for (int64_t position = 0; position < C; position++)
        for (int64_t i = 0; i < z / 2; i++) {
            double angle = (double)position * pow(base, -2 * (double)i / (double)z);
            table[(position * (z / 2) + i) * 2] = (real)cos(angle);
            table[(position * (z / 2) + i) * 2 + 1] = (real)sin(angle);
        }
}

/* RoPE:  each adjacent pair (x[2i], x[2i+1]) turns by the angle of its position in the chunk, (n + t) mod C
 * y, x (B,T,H,z); y may be x. direction +1 forward, -1 backward. */
static void rope_turn(real *y, const real *x, const real *table, real direction, int64_t n, int64_t B,
                      int64_t T, int64_t H, int64_t z, int64_t C) {
    PARALLEL_FOR(B * T * H * z)
    for (int64_t i = 0; i < B * T; i++) {
        const real *turn = table + (n + i % T) % C * z;
        for (int64_t h = 0; h < H; h++) {
            const real *x_h = x + (i * H + h) * z;
            real *y_h = y + (i * H + h) * z;
            for (int64_t d = 0; d < z; d += 2) {
                real even = x_h[d], odd = x_h[d + 1], cosine = turn[d], sine = direction * turn[d + 1];
                y_h[d] = even * cosine - odd * sine;
                y_h[d + 1] = even * sine + odd * cosine;
            }
        }
    }
}

static void rope_forward(real *y, const real *x, const real *table, int64_t n, int64_t B, int64_t T,
                         int64_t H, int64_t z, int64_t C) {
    rope_turn(y, x, table, 1, n, B, T, H, z, C);
}

/* A rotation's transpose turns back. */
static void rope_backward(real *dx, const real *dy, const real *table, int64_t n, int64_t B, int64_t T,
                          int64_t H, int64_t z, int64_t C) {
    rope_turn(dx, dy, table, -1, n, B, T, H, z, C);
}

/* Dropout decides by the element's index in its tensor: kept elements are scaled by 1/(1-p). */
static inline real dropout_factor(uint64_t key, int64_t index, double p) {
    uint64_t threshold = (uint64_t)(p * 16777216);
    return megalodon_random(key, (uint64_t)index) >> 40 < threshold ? 0 : (real)(1 / (1 - p));
}

/* Dropout:  y = x * factor(key, index).  y may be x; p = 0 copies. */
static void dropout_forward(real *y, const real *x, int64_t size, double p, uint64_t key) {
    if (p == 0) {
        if (y != x) memcpy(y, x, (size_t)size * sizeof(real));
        return;
    }
    PARALLEL_FOR(size * 4)
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * dropout_factor(key, i, p);
}

/* dx = dy * factor: the same mask again */
static void dropout_backward(real *dx, const real *dy, int64_t size, double p, uint64_t key) {
    dropout_forward(dx, dy, size, p, key);
}

/* Where the keys and values of a call come from. Positions count from the start of the chunk that the call
 * begins in: 0..n-1 are in the state, n..n+T-1 are this call's. A row of the batch has room for `capacity`
 * state tokens. */
typedef struct { const real *k, *v, *k_in, *v_in; int64_t n, capacity, B, T, H, z, e, C; } AttentionKeys;

enum { QUERY_BLOCK = 64 };       /* queries handled together: their scores for a chunk fit in the cache */

/* One block of queries: positions [p0, p1), keys [s, p1) of which `old` come from the state. */
typedef struct { int64_t b, h, s, p0, p1, old, rows, keys; } QueryBlock;

static int64_t query_blocks_per_chunk(int64_t C) { return (C + QUERY_BLOCK - 1) / QUERY_BLOCK; }

/* Block i of chunk c, clipped to this call's queries; rows <= 0 where the call has none there. */
static QueryBlock query_block(const AttentionKeys *a, int64_t b, int64_t h, int64_t c, int64_t i) {
    QueryBlock q = {.b = b, .h = h, .s = c * a->C};
    q.p0 = MAX(q.s + i * QUERY_BLOCK, a->n);
    q.p1 = MIN(MIN(q.s + (i + 1) * QUERY_BLOCK, q.s + a->C), a->n + a->T);
    q.rows = q.p1 - q.p0;
    q.keys = q.p1 - q.s;
    q.old = c == 0 ? MIN(a->n, q.keys) : 0;
    return q;
}

/* Address of row `position` of a tensor (B,T,H,w) of this call. */
#define AT_POSITION(tensor, a, q, position, w) \
    ((tensor) + (((q)->b * (a)->T + (position) - (a)->n) * (a)->H + (q)->h) * (w))
/* Address of row 0 of a state tensor (B,capacity,H,w). */
#define AT_STATE(tensor, a, q, w) ((tensor) + ((q)->b * (a)->capacity * (a)->H + (q)->h) * (w))

/* scores (rows,keys) = left . right^T, right being keys or values from the state and from this call */
static void attention_scores(real *scores, const real *left, const real *state, const real *now,
                             const AttentionKeys *a, const QueryBlock *q, int64_t w) {
    int64_t stride = a->H * w, first = q->s + q->old;
    if (q->old)
        matmul(scores, q->keys, left, stride, 1, AT_STATE(state, a, q, w), 1, stride, q->rows, q->old, w,
               false);
    matmul(scores + q->old, q->keys, left, stride, 1, AT_POSITION(now, a, q, first, w), 1, stride, q->rows,
           q->keys - q->old, w, false);
}

/* out (rows, w) = weights (rows,keys) . right (keys, w), right again from the state and from this call */
static void attention_mix(real *out, const real *weights, const real *state, const real *now,
                          const AttentionKeys *a, const QueryBlock *q, int64_t w) {
    int64_t stride = a->H * w, first = q->s + q->old;
    if (q->old)
        matmul(out, stride, weights, q->keys, 1, AT_STATE(state, a, q, w), stride, 1, q->rows, w, q->old,
               false);
    matmul(out, stride, weights + q->old, q->keys, 1, AT_POSITION(now, a, q, first, w), stride, 1, q->rows, w,
           q->keys - q->old, q->old > 0);
}

/* Dropout factor of the weight of query `row` of a block for key j of its chunk. Its index is
 * ((b H + h) T + t) C + j. */
static inline real attention_dropout_factor(const AttentionKeys *a, const QueryBlock *q, int64_t row,
                                            int64_t j, double p, uint64_t key) {
    int64_t t = q->p0 + row - a->n;
    return p == 0 ? 1 : dropout_factor(key, ((q->b * a->H + q->h) * a->T + t) * a->C + j, p);
}

/* Chunked causal attention:  a = softmax(q k^T + mask) v,  mask: same chunk and not the future
 * a (B,T,H,e); lse (B,T,H) saved, the log of each softmax's denominator; q, k (B,T,H,z); v (B,T,H,e);
 * k_in (B,capacity,H,z), v_in (B,capacity,H,e): the n tokens of the chunk that came before. p, key: dropout.
 * Threads share out query blocks if there are enough; else each product inside is shared out. */
static void attention_forward(real *out, real *lse, const real *query, AttentionKeys keys, double p,
                              uint64_t key) {
    const AttentionKeys *a = &keys;
    int64_t per_chunk = query_blocks_per_chunk(a->C), chunks = (a->n + a->T - 1) / a->C + 1;
    int64_t units = a->B * a->H * chunks * per_chunk;
    OMP(parallel for schedule(dynamic) if (a->T >= QUERY_BLOCK && units >= 2 * max_threads()))
    for (int64_t unit = 0; unit < units; unit++) {
        int64_t bh = unit / (chunks * per_chunk), c = unit / per_chunk % chunks;
        QueryBlock block = query_block(a, bh / a->H, bh % a->H, c, unit % per_chunk), *q = &block;
        if (q->rows <= 0) continue;
        real *scores = thread_scratch((size_t)(QUERY_BLOCK * a->C));
        attention_scores(scores, AT_POSITION(query, a, q, q->p0, a->z), a->k_in, a->k, a, q, a->z);
        for (int64_t row = 0; row < q->rows; row++) {
            real *s = scores + row * q->keys, largest = -INFINITY, sum = 0;
            int64_t seen = q->p0 + row - q->s + 1;
            OMP(simd reduction(max:largest))
            for (int64_t j = 0; j < seen; j++) largest = s[j] > largest ? s[j] : largest;
            OMP(simd reduction(+:sum))
            for (int64_t j = 0; j < seen; j++) {
                s[j] = real_exp(s[j] - largest);
                sum += s[j];
            }
            real scale = 1 / sum;
            for (int64_t j = 0; j < seen; j++) s[j] *= scale;
            for (int64_t j = seen; j < q->keys; j++) s[j] = 0;
            if (p > 0)
                for (int64_t j = 0; j < seen; j++) s[j] *= attention_dropout_factor(a, q, row, j, p, key);
            *AT_POSITION(lse, a, q, q->p0 + row, 1) = largest + (real)log((double)sum);
        }
        attention_mix(AT_POSITION(out, a, q, q->p0, a->e), scores, a->v_in, a->v, a, q, a->e);
    }
}

/* Backward of one block of queries. dk, dv and their state twins are added to. With w = softmax weights and
 * f = dropout factors:
 *     a = (w f) v             ->  dv += (w f)^T da;  dw = (da v^T) f
 *     w = softmax(q k^T)      ->  dscores = w (dw - sum dw w);  dq = dscores k;  dk += dscores^T q */
static void attention_block_backward(real *dquery, real *dk, real *dv, real *dk_in, real *dv_in,
                                     const real *dout, const real *lse, const real *query,
                                     const AttentionKeys *a, const QueryBlock *q, double p, uint64_t key) {
    real *weights = thread_scratch((size_t)(2 * QUERY_BLOCK * a->C)), *dscores = weights + QUERY_BLOCK * a->C;
    const real *query_b = AT_POSITION(query, a, q, q->p0, a->z),
               *dout_b = AT_POSITION(dout, a, q, q->p0, a->e);
    attention_scores(weights, query_b, a->k_in, a->k, a, q, a->z);
    attention_scores(dscores, dout_b, a->v_in, a->v, a, q, a->e);
    for (int64_t row = 0; row < q->rows; row++) {
        real *w = weights + row * q->keys, *ds = dscores + row * q->keys, sum = 0;
        real l = *AT_POSITION(lse, a, q, q->p0 + row, 1);
        int64_t seen = q->p0 + row - q->s + 1;
        OMP(simd)
        for (int64_t j = 0; j < seen; j++) w[j] = real_exp(w[j] - l);
        if (p > 0) for (int64_t j = 0; j < seen; j++) ds[j] *= attention_dropout_factor(a, q, row, j, p, key);
        OMP(simd reduction(+:sum))
        for (int64_t j = 0; j < seen; j++) sum += w[j] * ds[j];
        for (int64_t j = 0; j < seen; j++) ds[j] = w[j] * (ds[j] - sum);
        if (p > 0) for (int64_t j = 0; j < seen; j++) w[j] *= attention_dropout_factor(a, q, row, j, p, key);
        for (int64_t j = seen; j < q->keys; j++) w[j] = ds[j] = 0;
    }
    attention_mix(AT_POSITION(dquery, a, q, q->p0, a->z), dscores, a->k_in, a->k, a, q, a->z);
    int64_t first = q->s + q->old, now = q->keys - q->old, kz = a->H * a->z, ve = a->H * a->e;
    if (q->old && dk_in) {
        matmul(AT_STATE(dk_in, a, q, a->z), kz, dscores, 1, q->keys, query_b, kz, 1, q->old, a->z, q->rows,
               true);
        matmul(AT_STATE(dv_in, a, q, a->e), ve, weights, 1, q->keys, dout_b, ve, 1, q->old, a->e, q->rows,
               true);
    }
    matmul(AT_POSITION(dk, a, q, first, a->z), kz, dscores + q->old, 1, q->keys, query_b, kz, 1, now, a->z,
           q->rows, true);
    matmul(AT_POSITION(dv, a, q, first, a->e), ve, weights + q->old, 1, q->keys, dout_b, ve, 1, now, a->e,
           q->rows, true);
}

/* Backward of attention_forward: dquery, dk, dv as query, k, v; dk_in, dv_in as k_in, v_in (NULL: not
 * wanted). A thread owns a chunk of a head, whose query blocks it takes in order; scores are recomputed
 * from q, k and lse. */
static void attention_backward(real *dquery, real *dk, real *dv, real *dk_in, real *dv_in, const real *dout,
                               const real *lse, const real *query, AttentionKeys keys, double p,
                               uint64_t key) {
    const AttentionKeys *a = &keys;
    int64_t per_chunk = query_blocks_per_chunk(a->C), chunks = (a->n + a->T - 1) / a->C + 1;
    int64_t units = a->B * a->H * chunks;
    memset(dk, 0, (size_t)(a->B * a->T * a->H * a->z) * sizeof(real));
    memset(dv, 0, (size_t)(a->B * a->T * a->H * a->e) * sizeof(real));
    if (dk_in) memset(dk_in, 0, (size_t)(a->B * a->capacity * a->H * a->z) * sizeof(real));
    if (dv_in) memset(dv_in, 0, (size_t)(a->B * a->capacity * a->H * a->e) * sizeof(real));
    OMP(parallel for schedule(dynamic) if (a->T >= QUERY_BLOCK && units >= 2 * max_threads()))
    for (int64_t unit = 0; unit < units; unit++) {
        int64_t bh = unit / chunks;
        for (int64_t i = 0; i < per_chunk; i++) {
            QueryBlock q = query_block(a, bh / a->H, bh % a->H, unit % chunks, i);
            if (q.rows > 0)
                attention_block_backward(dquery, dk, dv, dk_in, dv_in, dout, lse, query, a, &q, p, key);
        }
    }
}

/* The state that attention leaves: keys (or values) of the unfinished chunk. x (B,T,H,w) are this call's;
 * `state` (B,capacity,H,w) becomes the new state, `before` is the old one and may be the same memory. width
 * = H*w. */
static void attention_state_forward(real *state, const real *before, const real *x, int64_t n,
                                    int64_t capacity, int64_t B, int64_t T, int64_t width, int64_t C) {
    int64_t n_out = (n + T) % C, kept = n + T < C ? n : 0, fresh = n_out - kept;
    for (int64_t b = 0; b < B; b++) {
        real *state_b = state + b * capacity * width;
        if (kept && before != state)
            memcpy(state_b, before + b * capacity * width, (size_t)(kept * width) * sizeof(real));
        memcpy(state_b + kept * width, x + (b * T + T - fresh) * width,
               (size_t)(fresh * width) * sizeof(real));
    }
}

/* The state's tokens were copied from `before` and from x: their gradients are added there (dbefore NULL:
 * not wanted). */
static void attention_state_backward(real *dbefore, real *dx, const real *dstate, int64_t n, int64_t capacity,
                                     int64_t B, int64_t T, int64_t width, int64_t C) {
    int64_t n_out = (n + T) % C, kept = n + T < C ? n : 0, fresh = n_out - kept;
    for (int64_t b = 0; b < B; b++) {
        const real *dstate_b = dstate + b * capacity * width;
        real *dx_b = dx + (b * T + T - fresh) * width;
        for (int64_t i = 0; dbefore && i < kept * width; i++)
            dbefore[b * capacity * width + i] += dstate_b[i];
        for (int64_t i = 0; i < fresh * width; i++) dx_b[i] += dstate_b[kept * width + i];
    }
}

/* SiLU:  y = x sigmoid(x) */
static void silu_forward(real *y, const real *x, int64_t size) {
    OMP(parallel for simd schedule(static) if (size >= FORK_WORTH))
    for (int64_t i = 0; i < size; i++) y[i] = x[i] * real_sigmoid(x[i]);
}

/* dx = dy s (1 + x (1 - s)),  s = sigmoid(x).  dx may be dy. */
static void silu_backward(real *dx, const real *dy, const real *x, int64_t size) {
    OMP(parallel for simd schedule(static) if (size >= FORK_WORTH))
    for (int64_t i = 0; i < size; i++) {
        real s = real_sigmoid(x[i]);
        dx[i] = dy[i] * s * (1 + x[i] * (1 - s));
    }
}

/* Gate:  y = a * r */
static void gate_forward(real *y, const real *a, const real *r, int64_t size) {
    OMP(parallel for simd schedule(static) if (size >= FORK_WORTH))
    for (int64_t i = 0; i < size; i++) y[i] = a[i] * r[i];
}

/* da = dy * r;  dr = dy * a.  da may be dy. */
static void gate_backward(real *da, real *dr, const real *dy, const real *a, const real *r, int64_t size) {
    OMP(parallel for simd schedule(static) if (size >= FORK_WORTH))
    for (int64_t i = 0; i < size; i++) {
        dr[i] = dy[i] * a[i];
        da[i] = dy[i] * r[i];
    }
}

/* LayerNorm:  y = (x - mean) rstd (1 + weight) + bias,  rstd = 1/sqrt(population variance + eps)
 * y, x (rows,D); mean, rstd (rows) saved; weight, bias (D) or both NULL. */
static void layernorm_forward(real *y, real *mean, real *rstd, const real *x, const real *weight,
                              const real *bias, int64_t rows, int64_t D, double eps) {
    PARALLEL_FOR(rows * D)
    for (int64_t i = 0; i < rows; i++) {
        const real *x_i = x + i * D;
        real sum = 0, squares = 0;
        OMP(simd reduction(+:sum))
        for (int64_t d = 0; d < D; d++) sum += x_i[d];
        real mu = sum / (real)D;
        OMP(simd reduction(+:squares))
        for (int64_t d = 0; d < D; d++) squares += (x_i[d] - mu) * (x_i[d] - mu);
        real r = (real)(1 / sqrt((double)squares / (double)D + eps));
        mean[i] = mu;
        rstd[i] = r;
        if (weight)
            for (int64_t d = 0; d < D; d++) y[i * D + d] = (x_i[d] - mu) * r * (1 + weight[d]) + bias[d];
        else
            for (int64_t d = 0; d < D; d++) y[i * D + d] = (x_i[d] - mu) * r;
    }
}

/* xhat = (x - mean) rstd, dxhat = dy (1 + weight):
 * dx = rstd (dxhat - mean(dxhat) - xhat mean(dxhat xhat));  dweight += dy xhat;  dbias += dy.  dx may be
 * dy. */
static void layernorm_backward(real *dx, real *dweight, real *dbias, const real *dy, const real *mean,
                               const real *rstd, const real *x, const real *weight, int64_t rows, int64_t D) {
    if (dweight) norm_weight_backward(dweight, dbias, dy, x, mean, rstd, NULL, 0, rows, D, 1);
    PARALLEL_FOR(rows * D)
    for (int64_t i = 0; i < rows; i++) {
        const real *x_i = x + i * D, *dy_i = dy + i * D;
        real sum = 0, product = 0, mu = mean[i], r = rstd[i];
        OMP(simd reduction(+:sum, product))
        for (int64_t d = 0; d < D; d++) {
            real dxhat = dy_i[d] * (weight ? 1 + weight[d] : 1);
            sum += dxhat;
            product += dxhat * (x_i[d] - mu) * r;
        }
        sum /= (real)D;
        product /= (real)D;
        for (int64_t d = 0; d < D; d++)
            dx[i * D + d] = r * (dy_i[d] * (weight ? 1 + weight[d] : 1) - sum - (x_i[d] - mu) * r * product);
    }
}

/* SwiGLU's product:  hidden = silu(f1) * f3.  All (size). */
static void swiglu_forward(real *hidden, const real *f1, const real *f3, int64_t size) {
    OMP(parallel for simd schedule(static) if (size >= FORK_WORTH))
    for (int64_t i = 0; i < size; i++) hidden[i] = f1[i] * real_sigmoid(f1[i]) * f3[i];
}

/* df1 = dhidden f3 silu'(f1);  df3 = dhidden silu(f1).  df1 may be dhidden. */
static void swiglu_backward(real *df1, real *df3, const real *dhidden, const real *f1, const real *f3,
                            int64_t size) {
    OMP(parallel for simd schedule(static) if (size >= FORK_WORTH))
    for (int64_t i = 0; i < size; i++) {
        real s = real_sigmoid(f1[i]), d = dhidden[i];
        df3[i] = d * f1[i] * s;
        df1[i] = d * f3[i] * s * (1 + f1[i] * (1 - s));
    }
}

/* Second hop with a scaled branch:  out = alpha * f + x.  out, f, x (rows,D); alpha (D) or NULL for 1. out
 * may be x. */
static void rescale_forward(real *out, const real *f, const real *x, const real *alpha, int64_t rows,
                            int64_t D) {
    PARALLEL_FOR(rows * D)
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < D; d++) out[i * D + d] = (alpha ? alpha[d] : 1) * f[i * D + d] + x[i * D + d];
}

/* df = alpha dout;  dalpha += sum dout f;  dx = dout, which the caller has already (dx NULL or a place to
 * copy it). */
static void rescale_backward(real *df, real *dx, real *dalpha, const real *dout, const real *f,
                             const real *alpha, int64_t rows, int64_t D) {
    PARALLEL_FOR(rows * D)
    for (int64_t d0 = 0; d0 < D; d0 += COLUMNS) {
        real sum[COLUMNS] = {0};
        int64_t d1 = MIN(d0 + COLUMNS, D);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t d = d0; d < d1; d++) {
                real g = dout[i * D + d];
                if (alpha) sum[d - d0] += g * f[i * D + d];
                if (dx) dx[i * D + d] = g;
                df[i * D + d] = (alpha ? alpha[d] : 1) * g;
            }
        for (int64_t d = d0; alpha && d < d1; d++) dalpha[d] += sum[d - d0];
    }
}

/* Cross-entropy:  nll = -log softmax(logits)[target];  0 where the target is MEGALODON_IGNORE
 * nll (rows); logits (rows,V); targets (rows) */
static void cross_entropy_forward(real *nll, const real *logits, const int32_t *targets, int64_t rows,
                                  int64_t V) {
    PARALLEL_FOR(rows * V)
    for (int64_t i = 0; i < rows; i++) {
        const real *x = logits + i * V;
        real largest = -INFINITY, sum = 0;
        nll[i] = 0;
        if (targets[i] == MEGALODON_IGNORE) continue;
        OMP(simd reduction(max:largest))
        for (int64_t v = 0; v < V; v++) largest = x[v] > largest ? x[v] : largest;
        OMP(simd reduction(+:sum))
        for (int64_t v = 0; v < V; v++) sum += real_exp(x[v] - largest);
        nll[i] = (real)log((double)sum) + largest - x[targets[i]];
    }
}

/* dlogits = dnll (softmax(logits) - onehot(target));  0 where ignored.  dnll NULL: `scale` for every row.
 * dlogits may be logits. */
static void cross_entropy_backward(real *dlogits, const real *dnll, real scale, const real *logits,
                                   const int32_t *targets, int64_t rows, int64_t V) {
    PARALLEL_FOR(rows * V)
    for (int64_t i = 0; i < rows; i++) {
        const real *x = logits + i * V;
        real *dx = dlogits + i * V, largest = -INFINITY, sum = 0, g = dnll ? dnll[i] : scale;
        if (targets[i] == MEGALODON_IGNORE) {
            memset(dx, 0, (size_t)V * sizeof(real));
            continue;
        }
        OMP(simd reduction(max:largest))
        for (int64_t v = 0; v < V; v++) largest = x[v] > largest ? x[v] : largest;
        OMP(simd reduction(+:sum))
        for (int64_t v = 0; v < V; v++) {
            real e = real_exp(x[v] - largest);
            sum += e;
            dx[v] = e;
        }
        real k = g / sum;
        for (int64_t v = 0; v < V; v++) dx[v] *= k;
        dx[targets[i]] -= g;
    }
}

/* ----------------------------------------------------------------------------------------------------
 * 4. The model
 */

/* The structs mirror the lists of megalodon.h: a pointer for each tensor, NULL where the configuration has
 * none. */
#define X(field, name, shape, ...) real *field;
typedef struct { MEGALODON_LAYER_PARAMS(X) } LayerParams;
typedef struct { MEGALODON_MODEL_PARAMS(X) } ModelParams;
typedef struct { MEGALODON_LAYER_ACTS(X) } LayerActs;
typedef struct { MEGALODON_MODEL_ACTS(X) } ModelActs;
#undef X

typedef struct { double *norm_mean, *norm_var; real *cema, *k, *v; } LayerState;

/* The state of B rows after count[b] tokens. k and v have room for C tokens a row, the first n of them in
 * use. */
typedef struct {
    int B, n;
    int64_t *count;                      /* (B) */
    LayerState *layers;                  /* (L) */
    double *final_mean, *final_var;      /* (B,G) */
} State;

typedef enum { SAVED, CHEAP, LOGITS } Kept;

enum {
    LOGIT_ROWS = 256,        /* rows of logits that exist at a time: the loss looks at a row's logits once */
    NORM_CHUNK = 65536       /* gradients whose squares are summed together */
};

struct MegalodonModel {
    MegalodonConfig config;
    MegalodonOptions options;
    MegalodonMemory memory;
    void *arenas[8];                     /* all memory, freed by destroy */
    int num_arenas;

    MegalodonTensor *params;             /* the parameters and each one's place in the four arenas below */
    int64_t *offset;
    int num_params;
    int64_t arena_size;                  /* numbers in one of them, padding included (always zero) */
    real *weights, *grads, *moment1, *moment2;

    LayerParams *layers, *dlayers;       /* (L) pointers into weights and grads */
    ModelParams top, dtop;
    CemaCoefficients *coef;              /* (L) CEMA's coefficients for the present weights, if coef_valid */
    bool coef_valid;
    real *rope;                          /* (C,z/2,2) */

    LayerActs *acts;                     /* (L) */
    ModelActs top_acts;
    real *branch;                        /* (B,T,D) a block's branch before it joins the residual stream */
    real *logit_block;                   /* (LOGIT_ROWS,V) */
    struct {                             /* gradients of activations, shared by the layers */
        real *x, *branch, *y;            /* (B,T,D) */
        real *wide[2];                   /* (B,T,max(E,F)) */
        real *z[3];                      /* (B,T,Z) */
    } grad;
    double *norm_partials;

    State state, state_in, dstate_in, dstate_out;
    bool carried, have_dstate_out;       /* the last forward had a state in; GRAD_STATE_OUT was set since */

    MegalodonBatch batch;                /* the last forward's; tokens and targets are copies */
    int32_t *tokens, *targets;
    bool can_backward;
};

/* An arena is laid out twice by the same code: once without memory to learn its size, once for real. */
typedef struct { char *base; uint64_t used; } Arena;

static void *arena_take(Arena *arena, int64_t count, size_t size) {
    uint64_t at = arena->used;
    arena->used += ((uint64_t)count * size + 63) / 64 * 64;
    return arena->base ? arena->base + at : NULL;
}

#define TAKE(arena, type, count) ((type *)arena_take(arena, count, sizeof(type)))

static int64_t element_count(const MegalodonModel *m, const char *shape, int B, int T, int n) {
    int64_t dims[MEGALODON_MAX_DIMS], size = 1;
    int ndim = megalodon_shape(shape, &m->config, B, T, n, dims);
    for (int i = 0; i < ndim; i++) size *= dims[i];
    return size;
}

static void layout_weights(MegalodonModel *m, Arena *arena) { m->weights = TAKE(arena, real, m->arena_size); }
static void layout_gradients(MegalodonModel *m, Arena *arena) { m->grads = TAKE(arena, real, m->arena_size); }
static void layout_moments(MegalodonModel *m, Arena *arena) {
    m->moment1 = TAKE(arena, real, m->arena_size);
    m->moment2 = TAKE(arena, real, m->arena_size);
}

/* Takes an activation's memory for the largest batch, or gives the one that all layers share. */
static real *take_activation(const MegalodonModel *m, Arena *arena, const char *shape, Kept kept,
                             MegalodonPresence presence, int layer, real *first) {
    bool shared = !m->options.keep_activations && (kept == CHEAP || !m->options.training);
    if (!is_present(&m->config, presence)) return NULL;
    if (layer > 0 && shared) return first;
    return TAKE(arena, real, element_count(m, shape, m->options.max_batch, m->options.max_length, 0));
}

static void layout_activations(MegalodonModel *m, Arena *arena) {
    const MegalodonConfig *c = &m->config;
    int64_t rows = (int64_t)m->options.max_batch * m->options.max_length;
    for (int l = 0; l < c->num_layers; l++) {
#define X(field, name, shape, kept, presence) \
        m->acts[l].field = take_activation(m, arena, shape, kept, presence, l, m->acts[0].field);
        MEGALODON_LAYER_ACTS(X)
#undef X
    }
#define X(field, name, shape, kept, presence) \
    if (kept != LOGITS || m->options.keep_activations) \
        m->top_acts.field = take_activation(m, arena, shape, kept, presence, 0, NULL);
    MEGALODON_MODEL_ACTS(X)
#undef X
    m->branch = TAKE(arena, real, rows * c->model_dim);
    m->logit_block = TAKE(arena, real, MIN(rows, LOGIT_ROWS) * c->vocab_size);
    m->tokens = TAKE(arena, int32_t, rows);
    m->targets = TAKE(arena, int32_t, rows);
    if (!m->options.training) return;
    m->grad.x = TAKE(arena, real, rows * c->model_dim);
    m->grad.branch = TAKE(arena, real, rows * c->model_dim);
    m->grad.y = TAKE(arena, real, rows * c->model_dim);
    for (int i = 0; i < 2; i++)
        m->grad.wide[i] = TAKE(arena, real, rows * MAX(c->value_dim, c->ffn_hidden_dim));
    for (int i = 0; i < 3; i++) m->grad.z[i] = TAKE(arena, real, rows * c->z_dim);
}

static void take_state(const MegalodonModel *m, Arena *arena, State *state) {
    const MegalodonConfig *c = &m->config;
    int64_t B = m->options.max_batch, statistics = B * c->norm_num_groups;
    state->count = TAKE(arena, int64_t, B);
    for (int l = 0; l < c->num_layers; l++) {
        state->layers[l].norm_mean = TAKE(arena, double, statistics);
        state->layers[l].norm_var = TAKE(arena, double, statistics);
        state->layers[l].cema = TAKE(arena, real, B * c->model_dim * c->cema_ndim * 2);
        state->layers[l].k = TAKE(arena, real, B * c->chunk_size * c->z_dim);
        state->layers[l].v = TAKE(arena, real, B * c->chunk_size * c->value_dim);
    }
    state->final_mean = TAKE(arena, double, statistics);
    state->final_var = TAKE(arena, double, statistics);
}

static bool keeps_state(const MegalodonModel *m) { return m->options.carry || !m->options.training; }

/* Training keeps the incoming state for the backward; inference moves one state on in place. */
static void layout_state(MegalodonModel *m, Arena *arena) {
    if (!keeps_state(m)) return;
    take_state(m, arena, &m->state);
    if (!m->options.training) {
        LayerState *layers = m->state_in.layers;
        memcpy(layers, m->state.layers, (size_t)m->config.num_layers * sizeof *layers);
        m->state_in = m->state;
        m->state_in.layers = layers;
        return;
    }
    take_state(m, arena, &m->state_in);
    if (!m->options.state_gradients) return;
    take_state(m, arena, &m->dstate_in);
    take_state(m, arena, &m->dstate_out);
}

static size_t scratch_size(const MegalodonModel *m) {
    size_t attention = (size_t)(2 * QUERY_BLOCK) * (size_t)m->config.chunk_size;
    size_t cema = m->options.training ? cema_scratch(m->options.max_length, m->config.cema_ndim) : 0;
    return MAX(attention, cema);
}

static void layout_workspace(MegalodonModel *m, Arena *arena) {
    const MegalodonConfig *c = &m->config;
    int64_t coefficients = (int64_t)c->model_dim * c->cema_ndim * NUM_CEMA_COEFFICIENTS;
    real *memory = TAKE(arena, real, coefficients * c->num_layers);
    for (int l = 0; l < c->num_layers && memory; l++)
        m->coef[l] = cema_coefficients_at(memory + l * coefficients, c->model_dim, c->cema_ndim);
    m->rope = TAKE(arena, real, (int64_t)c->chunk_size * (c->z_dim / c->num_heads));
    m->norm_partials = TAKE(arena, double, m->arena_size / NORM_CHUNK + 1);
}

/* The model's tables of pointers, and the parameter list with each tensor's place. */
static void layout_tables(MegalodonModel *m, Arena *arena) {
    int64_t L = m->config.num_layers;
    m->params = TAKE(arena, MegalodonTensor, m->num_params);
    m->offset = TAKE(arena, int64_t, m->num_params);
    m->layers = TAKE(arena, LayerParams, L);
    m->dlayers = TAKE(arena, LayerParams, L);
    m->coef = TAKE(arena, CemaCoefficients, L);
    m->acts = TAKE(arena, LayerActs, L);
    State *states[] = {&m->state, &m->state_in, &m->dstate_in, &m->dstate_out};
    for (int i = 0; i < 4; i++) states[i]->layers = TAKE(arena, LayerState, L);
}

typedef void Layout(MegalodonModel *, Arena *);

/* Bytes of an arena: 64 bits, also where memory has fewer addresses. */
static uint64_t measure(MegalodonModel *m, Layout *layout) {
    Arena arena = {0};
    layout(m, &arena);
    return arena.used;
}

/* Sizes an arena with its layout function, allocates it zeroed, lays it out. Error: the bytes asked for. */
static const char *build_arena(MegalodonModel *m, Layout *layout, int64_t *bytes) {
    Arena arena = {.used = measure(m, layout)};
    if (arena.used == 0) return NULL;
    if (arena.used <= SIZE_MAX) arena.base = aligned_alloc(64, (size_t)arena.used);
    if (!arena.base) return errorf("out of memory: asked for %.2f GiB", (double)arena.used / (1 << 30));
    memset(arena.base, 0, (size_t)arena.used);
    *bytes += (int64_t)arena.used;
    m->arenas[m->num_arenas++] = arena.base;
    arena.used = 0;
    layout(m, &arena);
    return NULL;
}

static int find_param(const MegalodonModel *m, const char *name) {
    for (int i = 0; i < m->num_params; i++)
        if (strcmp(m->params[i].name, name) == 0) return i;
    return -1;
}

static real *param_in(const MegalodonModel *m, real *arena, int layer, const char *name) {
    char full[MEGALODON_MAX_NAME];
    if (layer >= 0) snprintf(full, sizeof full, "layers.%d.%s", layer, name);
    else snprintf(full, sizeof full, "%s", name);
    int i = find_param(m, full);
    return i < 0 || !arena ? NULL : arena + m->offset[i];
}

static void point_params(const MegalodonModel *m, real *arena, LayerParams *layers, ModelParams *top) {
    for (int l = 0; l < m->config.num_layers; l++) {
#define X(field, name, ...) layers[l].field = param_in(m, arena, l, name);
        MEGALODON_LAYER_PARAMS(X)
#undef X
    }
#define X(field, name, ...) top->field = param_in(m, arena, -1, name);
    MEGALODON_MODEL_PARAMS(X)
#undef X
    if (m->config.share_emb) top->output_weight = top->embed_weight;
}

static void cpu_destroy(MegalodonModel *m) {
    if (!m) return;
    for (int i = 0; i < m->num_arenas; i++) free(m->arenas[i]);
    free(m);
}

/* The arenas beside the tables, in the order in which they are built, and where each one's size is noted. */
typedef struct { Layout *layout; int64_t *bytes; } ArenaPlan;
enum { NUM_ARENAS = 6 };
static void plan_arenas(MegalodonModel *m, ArenaPlan plan[NUM_ARENAS]) {
    MegalodonMemory *memory = &m->memory;
    bool training = m->options.training;
    const ArenaPlan all[NUM_ARENAS] = {
        {layout_weights, &memory->parameters},      {training ? layout_gradients : NULL, &memory->gradients},
        {layout_activations, &memory->activations}, {training ? layout_moments : NULL, &memory->moments},
        {layout_state, &memory->state},             {layout_workspace, &memory->workspace}};
    memcpy(plan, all, sizeof all);
}

static uint64_t bytes_needed(MegalodonModel *m) {
    ArenaPlan plan[NUM_ARENAS];
    uint64_t needed = (uint64_t)max_threads() * scratch_size(m) * sizeof(real);
    plan_arenas(m, plan);
    for (int i = 0; i < NUM_ARENAS; i++)
        if (plan[i].layout) needed += measure(m, plan[i].layout);
    return needed;
}

/* Is there enough memory, before any is taken? Error: how much is needed, how much there may be, and the
 * largest batch, by halves, that would fit. */
static const char *check_bytes(MegalodonModel *m) {
    const MegalodonConfig *c = &m->config;
    MegalodonOptions *o = &m->options;
    /* Sizes whose products cannot be counted: the widest activation, and the keys and values of the state. */
    double wide = MAX(MAX(c->model_dim, c->z_dim), MAX(c->value_dim, MAX(c->ffn_hidden_dim, c->vocab_size)));
    double tensor = wide * o->max_batch * MAX(o->max_length, c->chunk_size) * sizeof(real);
    if (tensor > 0x1p42)
        return errorf("batch %d x length %d: this model would need %.0f bytes for a single tensor; make it "
                      "smaller, or the batch, or the sequence", o->max_batch, o->max_length, tensor);
    uint64_t needed = bytes_needed(m), limit = o->max_bytes > 0 ? (uint64_t)o->max_bytes : SIZE_MAX;
    if (needed <= limit) return NULL;
    int batch = o->max_batch, fitting = batch / 2;
    while (o->max_batch = fitting, fitting > 0 && bytes_needed(m) > limit) fitting /= 2;
    o->max_batch = batch;
    char hint[96] = "not even one row would fit: make the model or the sequence smaller";
    const char *plural = fitting == 1 ? "" : "s";
    if (fitting > 0) snprintf(hint, sizeof hint, "a batch of %d row%s would fit", fitting, plural);
    return errorf("this model needs %.2f GiB of memory (%llu bytes) for a batch of %d x %d tokens, and %.2f "
                  "GiB (%llu bytes) are free; %s",
                  (double)needed / (1 << 30), (unsigned long long)needed, batch, o->max_length,
                  (double)limit / (1 << 30), (unsigned long long)limit, hint);
}

static const char *build(MegalodonModel *m) {
    const MegalodonConfig *c = &m->config;
    ArenaPlan plan[NUM_ARENAS];
    int64_t tables = 0;
    const char *error = NULL;
    m->num_params = megalodon_tensors(c, MEGALODON_PARAM, 1, 1, 0, NULL, 0);
    if ((error = build_arena(m, layout_tables, &tables))) return error;
    megalodon_tensors(c, MEGALODON_PARAM, 1, 1, 0, m->params, m->num_params);
    for (int i = 0; i < m->num_params; i++) {
        m->offset[i] = m->arena_size;
        m->arena_size += (m->params[i].size + 15) / 16 * 16;
    }
    if ((error = check_bytes(m))) return error;
    plan_arenas(m, plan);
    for (int i = 0; i < NUM_ARENAS; i++)
        if (plan[i].layout && (error = build_arena(m, plan[i].layout, plan[i].bytes))) return error;
    m->memory.workspace += tables + (int64_t)max_threads() * (int64_t)(scratch_size(m) * sizeof(real));
    point_params(m, m->weights, m->layers, &m->top);
    point_params(m, m->grads, m->dlayers, &m->dtop);
    rope_table(m->rope, c->chunk_size, c->z_dim / c->num_heads, c->rope_base);
    OMP(parallel)
    thread_scratch(scratch_size(m));
    return NULL;
}

static const char *cpu_create(MegalodonModel **model, const MegalodonConfig *config,
                              const MegalodonOptions *options) {
    *model = NULL;
    const char *error = megalodon_validate(config);
    if (error) return error;
    if (options->max_batch < 1 || options->max_length < 1)
        return errorf("batch %d x length %d: both must be at least 1", options->max_batch,
                      options->max_length);
    if (options->precision != MEGALODON_FP32)
        return errorf("the CPU backend computes in fp32; bf16 needs the CUDA backend");
    MegalodonModel *m = calloc(1, sizeof *m);
    if (!m) return errorf("out of memory");
    m->config = *config;
    m->options = *options;
    if ((error = build(m))) {
        cpu_destroy(m);
        return error;
    }
    *model = m;
    return NULL;
}

/* The dropout of a site in the last forward: 0 where the batch has none. */
static double dropout_of(const MegalodonModel *m, double p) { return m->batch.dropout ? p : 0; }
static uint64_t dropout_key(const MegalodonModel *m, int layer, MegalodonSite site) {
    return megalodon_dropout_key(m->batch.seed, m->batch.step, layer, site);
}

static AttentionKeys attention_keys(const MegalodonModel *m, int l) {
    const MegalodonConfig *c = &m->config;
    AttentionKeys keys = {.k = m->acts[l].k, .v = m->acts[l].v, .n = m->carried ? m->state_in.n : 0,
                          .capacity = c->chunk_size, .B = m->batch.B, .T = m->batch.T, .H = c->num_heads,
                          .z = c->z_dim / c->num_heads, .e = c->value_dim / c->num_heads, .C = c->chunk_size};
    if (m->carried) keys.k_in = m->state_in.layers[l].k, keys.v_in = m->state_in.layers[l].v;
    return keys;
}

/* The mega half of a block:  y = m Wh1^T + bh1 + (a r) Wh2^T + x,  doc/model.md has the whole forward.
 * x (B,T,D) is the block's input. */
static void mega_forward(MegalodonModel *m, int l, const real *x) {
    const MegalodonConfig *c = &m->config;
    const LayerParams *w = &m->layers[l];
    const LayerState none = {0}, *in = m->carried ? &m->state_in.layers[l] : &none;
    const LayerState *out = keeps_state(m) ? &m->state.layers[l] : &none;
    LayerActs *a = &m->acts[l];
    int64_t B = m->batch.B, T = m->batch.T, rows = B * T, D = c->model_dim, Z = c->z_dim, E = c->value_dim;
    int64_t H = c->num_heads, C = c->chunk_size, n = m->carried ? m->state_in.n : 0;
    double hidden_p = dropout_of(m, c->hidden_dropout);

    timestepnorm_forward(a->u, a->mean, a->var, out->norm_mean, out->norm_var, x, m->state_in.count,
                         in->norm_mean, in->norm_var, w->timenorm_weight, w->timenorm_bias, B, T, D,
                         c->norm_num_groups, c->norm_eps);
    cema_forward(a->c, out->cema, a->u, in->cema, m->coef[l], w->cema_omega, B, T, D, c->cema_ndim);
    rmsnorm_forward(a->m, a->c_rstd, a->c, w->rmsnorm_weight, rows, D, c->norm_eps);
    dropout_forward(a->m, a->m, rows * D, hidden_p, dropout_key(m, l, MEGALODON_SITE_M));

    linear_forward(a->zz, a->m, w->wz_weight, w->wz_bias, rows, D, Z, false);
    znorm_forward(a->zn, a->zz, rows, H, Z / H, c->norm_eps);
    qk_affine_forward(a->q, a->k, a->zn, w->gamma, w->beta, rows, Z, Z / H);
    rope_forward(a->q, a->q, m->rope, n, B, T, H, Z / H, C);
    rope_forward(a->k, a->k, m->rope, n, B, T, H, Z / H, C);
    linear_forward(a->vv, a->u, w->wv_weight, w->wv_bias, rows, D, E, false);
    silu_forward(a->v, a->vv, rows * E);
    linear_forward(a->rr, a->m, w->wr_weight, w->wr_bias, rows, D, E, false);
    silu_forward(a->r, a->rr, rows * E);

    attention_forward(a->a, a->lse, a->q, attention_keys(m, l), dropout_of(m, c->attention_dropout),
                      dropout_key(m, l, MEGALODON_SITE_ATTENTION));
    if (keeps_state(m)) {
        attention_state_forward(out->k, in->k, a->k, n, C, B, T, Z, C);
        attention_state_forward(out->v, in->v, a->v, n, C, B, T, E, C);
    }
    gate_forward(a->ar, a->a, a->r, rows * E);
    dropout_forward(a->ar, a->ar, rows * E, hidden_p, dropout_key(m, l, MEGALODON_SITE_GATED));
    linear_forward(m->branch, a->m, w->wh1_weight, w->wh1_bias, rows, D, D, false);
    linear_forward(m->branch, a->ar, w->wh2_weight, NULL, rows, E, D, true);
    dropout_forward(m->branch, m->branch, rows * D, dropout_of(m, c->dropout),
                    dropout_key(m, l, MEGALODON_SITE_H));
    rescale_forward(a->y, m->branch, x, NULL, rows, D);
}

/* The feed-forward half:  out = alpha * fc2(hidden) + x: the second hop skips from the block's input, not
 * from y. */
static void ffn_forward(MegalodonModel *m, int l, const real *x) {
    const MegalodonConfig *c = &m->config;
    const LayerParams *w = &m->layers[l];
    LayerActs *a = &m->acts[l];
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim, F = c->ffn_hidden_dim;
    real *f = c->rescale_nffn ? a->f2 : m->branch;

    layernorm_forward(a->n, a->y_mean, a->y_rstd, a->y, w->ffnnorm_weight, w->ffnnorm_bias, rows, D,
                      c->norm_eps);
    linear_forward(a->f1, a->n, w->fc1_weight, NULL, rows, D, F, false);
    if (c->swiglu) {
        linear_forward(a->f3, a->n, w->fc3_weight, NULL, rows, D, F, false);
        swiglu_forward(a->hidden, a->f1, a->f3, rows * F);
    } else {
        silu_forward(a->hidden, a->f1, rows * F);
    }
    dropout_forward(a->hidden, a->hidden, rows * F, dropout_of(m, c->hidden_dropout),
                    dropout_key(m, l, MEGALODON_SITE_HIDDEN));
    linear_forward(f, a->hidden, w->fc2_weight, NULL, rows, F, D, false);
    dropout_forward(f, f, rows * D, dropout_of(m, c->dropout), dropout_key(m, l, MEGALODON_SITE_FFN));
    rescale_forward(a->out, f, x, w->ffn_alpha, rows, D);
}

/* Brings back what CHEAP activations of a block held after its forward, for the backward. */
static void layer_recompute(MegalodonModel *m, int l, const real *x) {
    const MegalodonConfig *c = &m->config;
    const LayerParams *w = &m->layers[l];
    LayerActs *a = &m->acts[l];
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim, E = c->value_dim,
            F = c->ffn_hidden_dim;
    double hidden_p = dropout_of(m, c->hidden_dropout);
    timestepnorm_apply(a->u, a->mean, a->var, x, w->timenorm_weight, w->timenorm_bias, rows, D,
                       c->norm_num_groups, c->norm_eps);
    rmsnorm_forward(a->m, a->c_rstd, a->c, w->rmsnorm_weight, rows, D, c->norm_eps);
    dropout_forward(a->m, a->m, rows * D, hidden_p, dropout_key(m, l, MEGALODON_SITE_M));
    znorm_forward(a->zn, a->zz, rows, c->num_heads, c->z_dim / c->num_heads, c->norm_eps);
    silu_forward(a->v, a->vv, rows * E);
    silu_forward(a->r, a->rr, rows * E);
    gate_forward(a->ar, a->a, a->r, rows * E);
    dropout_forward(a->ar, a->ar, rows * E, hidden_p, dropout_key(m, l, MEGALODON_SITE_GATED));
    layernorm_forward(a->n, a->y_mean, a->y_rstd, a->y, w->ffnnorm_weight, w->ffnnorm_bias, rows, D,
                      c->norm_eps);
    if (c->swiglu) swiglu_forward(a->hidden, a->f1, a->f3, rows * F);
    else silu_forward(a->hidden, a->f1, rows * F);
    dropout_forward(a->hidden, a->hidden, rows * F, hidden_p, dropout_key(m, l, MEGALODON_SITE_HIDDEN));
}

/* sum += term, elementwise: where a gradient arrives over two paths */
static void add_to(real *sum, const real *term, int64_t size) {
    OMP(parallel for simd schedule(static) if (size >= FORK_WORTH))
    for (int64_t i = 0; i < size; i++) sum[i] += term[i];
}

/* Backward of ffn_forward. In: grad.x = dout. Out: grad.y = dy (the gradient of the mega half's output);
 * grad.x stays, since out = f + x hands dout on to x unchanged. */
static void ffn_backward(MegalodonModel *m, int l) {
    const MegalodonConfig *c = &m->config;
    const LayerParams *w = &m->layers[l];
    LayerParams *dw = &m->dlayers[l];
    LayerActs *a = &m->acts[l];
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim, F = c->ffn_hidden_dim;
    real *df = m->grad.branch, *dhidden = m->grad.wide[0], *df1 = dhidden, *df3 = m->grad.wide[1],
         *dn = m->grad.y;

    rescale_backward(df, NULL, dw->ffn_alpha, m->grad.x, a->f2, w->ffn_alpha, rows, D);
    dropout_backward(df, df, rows * D, dropout_of(m, c->dropout), dropout_key(m, l, MEGALODON_SITE_FFN));
    linear_backward(dhidden, dw->fc2_weight, NULL, df, a->hidden, w->fc2_weight, rows, F, D, false);
    dropout_backward(dhidden, dhidden, rows * F, dropout_of(m, c->hidden_dropout),
                     dropout_key(m, l, MEGALODON_SITE_HIDDEN));
    if (c->swiglu) swiglu_backward(df1, df3, dhidden, a->f1, a->f3, rows * F);
    else silu_backward(df1, dhidden, a->f1, rows * F);
    linear_backward(dn, dw->fc1_weight, NULL, df1, a->n, w->fc1_weight, rows, D, F, false);
    if (c->swiglu) linear_backward(dn, dw->fc3_weight, NULL, df3, a->n, w->fc3_weight, rows, D, F, true);
    layernorm_backward(dn, dw->ffnnorm_weight, dw->ffnnorm_bias, dn, a->y_mean, a->y_rstd, a->y,
                       w->ffnnorm_weight, rows, D);
}

/* Backward of mega_forward. In: grad.y = dy, grad.x = what x got from the second hop. Out: grad.x = dx,
 * whole. */
static void mega_backward(MegalodonModel *m, int l, const real *x) {
    const MegalodonConfig *c = &m->config;
    const LayerParams *w = &m->layers[l];
    LayerParams *dw = &m->dlayers[l];
    const LayerState none = {0}, *in = m->carried ? &m->state_in.layers[l] : &none;
    const LayerState *din = m->carried && m->options.state_gradients ? &m->dstate_in.layers[l] : &none;
    const LayerState *dout = m->have_dstate_out ? &m->dstate_out.layers[l] : &none;
    LayerActs *a = &m->acts[l];
    int64_t B = m->batch.B, T = m->batch.T, rows = B * T, D = c->model_dim, Z = c->z_dim, E = c->value_dim;
    int64_t H = c->num_heads, C = c->chunk_size, n = m->carried ? m->state_in.n : 0;
    double hidden_p = dropout_of(m, c->hidden_dropout);

    /* y = dropout(m Wh1^T + bh1 + ar Wh2^T) + x,  ar = dropout(a r) */
    real *dh = m->grad.branch, *dm = m->grad.y, *da = m->grad.wide[0], *dr = m->grad.wide[1];
    add_to(m->grad.x, m->grad.y, rows * D);
    dropout_backward(dh, m->grad.y, rows * D, dropout_of(m, c->dropout), dropout_key(m, l, MEGALODON_SITE_H));
    linear_backward(dm, dw->wh1_weight, dw->wh1_bias, dh, a->m, w->wh1_weight, rows, D, D, false);
    linear_backward(da, dw->wh2_weight, NULL, dh, a->ar, w->wh2_weight, rows, E, D, false);
    dropout_backward(da, da, rows * E, hidden_p, dropout_key(m, l, MEGALODON_SITE_GATED));
    gate_backward(da, dr, da, a->a, a->r, rows * E);

    /* r = silu(m Wr^T + br) */
    silu_backward(dr, dr, a->rr, rows * E);
    linear_backward(dm, dw->wr_weight, dw->wr_bias, dr, a->m, w->wr_weight, rows, D, E, true);

    /* a = attention(q, k, v), v = silu(u Wv^T + bv) */
    real *dq = m->grad.z[0], *dk = m->grad.z[1], *dzz = m->grad.z[2], *dv = m->grad.wide[1],
         *du = m->grad.branch;
    attention_backward(dq, dk, dv, din->k, din->v, da, a->lse, a->q, attention_keys(m, l),
                       dropout_of(m, c->attention_dropout), dropout_key(m, l, MEGALODON_SITE_ATTENTION));
    if (m->have_dstate_out) {
        attention_state_backward(din->k, dk, dout->k, n, C, B, T, Z, C);
        attention_state_backward(din->v, dv, dout->v, n, C, B, T, E, C);
    }
    silu_backward(dv, dv, a->vv, rows * E);
    linear_backward(du, dw->wv_weight, dw->wv_bias, dv, a->u, w->wv_weight, rows, D, E, false);

    /* q, k = rope(affine(znorm(m Wz^T + bz))) */
    rope_backward(dq, dq, m->rope, n, B, T, H, Z / H, C);
    rope_backward(dk, dk, m->rope, n, B, T, H, Z / H, C);
    qk_affine_backward(dzz, dw->gamma, dw->beta, dq, dk, a->zn, w->gamma, rows, Z, Z / H);
    znorm_backward(dzz, dzz, a->zz, rows, H, Z / H, c->norm_eps);
    linear_backward(dm, dw->wz_weight, dw->wz_bias, dzz, a->m, w->wz_weight, rows, D, Z, true);

    /* m = dropout(rmsnorm(cema(u))), u = timestepnorm(x) */
    dropout_backward(dm, dm, rows * D, hidden_p, dropout_key(m, l, MEGALODON_SITE_M));
    rmsnorm_backward(dm, dw->rmsnorm_weight, dm, a->c_rstd, a->c, w->rmsnorm_weight, rows, D);
    cema_backward(dm, din->cema, dw->cema_alpha, dw->cema_delta, dw->cema_theta, dw->cema_gamma,
                  dw->cema_omega, dm, dout->cema, a->u, in->cema, m->coef[l], w->cema_alpha, w->cema_delta,
                  w->cema_theta, w->cema_omega, B, T, D, c->cema_ndim);
    add_to(du, dm, rows * D);
    timestepnorm_backward(du, din->norm_mean, din->norm_var, dw->timenorm_weight, dw->timenorm_bias, du,
                          dout->norm_mean, dout->norm_var, a->mean, a->var, x, m->state_in.count,
                          in->norm_mean, w->timenorm_weight, B, T, D, c->norm_num_groups, c->norm_eps);
    add_to(m->grad.x, du, rows * D);
}

/* logits = final Wout^T, a block of rows at a time:  nll = cross_entropy(logits, targets) */
static void head_forward(MegalodonModel *m) {
    const MegalodonConfig *c = &m->config;
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim, V = c->vocab_size;
    if (!m->batch.targets && !m->top_acts.logits) return;
    for (int64_t r = 0; r < rows; r += LOGIT_ROWS) {
        int64_t count = MIN(rows - r, LOGIT_ROWS);
        real *logits = m->top_acts.logits ? m->top_acts.logits + r * V : m->logit_block;
        linear_forward(logits, m->top_acts.final + r * D, m->top.output_weight, NULL, count, D, V, false);
        if (m->batch.targets) cross_entropy_forward(m->top_acts.nll + r, logits, m->targets + r, count, V);
    }
}

/* dlogits = scale (softmax(logits) - onehot), with the logits computed again;  dfinal = dlogits Wout;
 * dWout += dlogits^T final */
static void head_backward(MegalodonModel *m, real *dfinal, double scale) {
    const MegalodonConfig *c = &m->config;
    int64_t rows = (int64_t)m->batch.B * m->batch.T, D = c->model_dim, V = c->vocab_size;
    real *block = m->logit_block, *dweight = m->dtop.output_weight;
    for (int64_t r = 0; r < rows; r += LOGIT_ROWS) {
        int64_t count = MIN(rows - r, LOGIT_ROWS);
        const real *final = m->top_acts.final + r * D;
        linear_forward(block, final, m->top.output_weight, NULL, count, D, V, false);
        cross_entropy_backward(block, NULL, (real)scale, block, m->targets + r, count, V);
        linear_backward(dfinal + r * D, dweight, NULL, block, final, m->top.output_weight, count, D, V,
                        false);
    }
}

/* Makes the present state the incoming one, and counts the tokens that this batch adds to it. */
static void begin_state(MegalodonModel *m) {
    int64_t B = m->batch.B, T = m->batch.T;
    m->carried = m->batch.carry;
    m->have_dstate_out = false;
    if (!keeps_state(m)) return;
    if (m->options.training) {
        State swap = m->state_in;
        m->state_in = m->state;
        m->state = swap;
    } else {
        m->state_in.n = m->state.n;
    }
    m->state.B = (int)B;
    m->state.n = (int)(((m->carried ? m->state_in.n : 0) + T) % m->config.chunk_size);
}

static void end_state(MegalodonModel *m) {
    for (int64_t b = 0; keeps_state(m) && b < m->batch.B; b++)
        m->state.count[b] = (m->carried ? m->state_in.count[b] : 0) + m->batch.T;
}

static const char *cpu_forward(MegalodonModel *m, const MegalodonBatch *batch, MegalodonLoss *loss) {
    const MegalodonConfig *c = &m->config;
    const char *error = megalodon_check_batch(c, &m->options, batch, m->state.B);
    if (error) return error;
    int64_t B = batch->B, T = batch->T, rows = B * T, D = c->model_dim;
    m->batch = *batch;
    memcpy(m->tokens, batch->tokens, (size_t)rows * sizeof *m->tokens);
    if (batch->targets) memcpy(m->targets, batch->targets, (size_t)rows * sizeof *m->targets);
    begin_state(m);
    for (int l = 0; l < c->num_layers && !m->coef_valid; l++)
        cema_coefficients(m->coef[l], m->layers[l].cema_alpha, m->layers[l].cema_delta,
                          m->layers[l].cema_theta, m->layers[l].cema_gamma, D, c->cema_ndim);
    m->coef_valid = true;

    real *x = m->top_acts.embed, scale = c->scale_emb ? (real)sqrt((double)D) : 1;
    embedding_forward(x, m->tokens, m->top.embed_weight, scale, rows, D);
    dropout_forward(x, x, rows * D, dropout_of(m, c->dropout), dropout_key(m, -1, MEGALODON_SITE_EMBED));
    for (int l = 0; l < c->num_layers; l++) {
        mega_forward(m, l, x);
        ffn_forward(m, l, x);
        x = m->acts[l].out;
    }
    ModelActs *a = &m->top_acts;
    State none = {0}, *in = m->carried ? &m->state_in : &none, *out = keeps_state(m) ? &m->state : &none;
    timestepnorm_forward(a->final, a->final_mean, a->final_var, out->final_mean, out->final_var, x,
                         m->state_in.count, in->final_mean, in->final_var, m->top.final_weight,
                         m->top.final_bias, B, T, D, c->norm_num_groups, c->norm_eps);
    end_state(m);
    head_forward(m);
    m->can_backward = m->options.training && batch->targets;

    MegalodonLoss total = {0};
    for (int64_t i = 0; batch->targets && i < rows; i++)
        if (m->targets[i] != MEGALODON_IGNORE) {
            total.nll_sum += m->top_acts.nll[i];
            total.counted++;
        }
    if (loss) *loss = total;
    return NULL;
}

static const char *cpu_last_logits(MegalodonModel *m, float *out) {
    int64_t B = m->batch.B, T = m->batch.T, D = m->config.model_dim, V = m->config.vocab_size;
    if (B == 0) return errorf("there are no logits before the first forward");
    for (int64_t b = 0; b < B; b++) {
        linear_forward(m->logit_block, m->top_acts.final + (b * T + T - 1) * D, m->top.output_weight, NULL, 1,
                       D, V, false);
        for (int64_t v = 0; v < V; v++) out[b * V + v] = (float)m->logit_block[v];
    }
    return NULL;
}

static const char *cpu_backward(MegalodonModel *m, double scale) {
    const MegalodonConfig *c = &m->config;
    int64_t B = m->batch.B, T = m->batch.T, rows = B * T, D = c->model_dim;
    if (!m->can_backward)
        return errorf("backward needs a forward with targets, once each, in a model made for training");
    m->can_backward = false;
    bool din = m->carried && m->options.state_gradients;
    if (din) m->dstate_in.B = m->state_in.B, m->dstate_in.n = m->state_in.n;

    ModelActs *a = &m->top_acts;
    const real *last = m->acts[c->num_layers - 1].out;
    head_backward(m, m->grad.x, scale);
    timestepnorm_backward(m->grad.x, din ? m->dstate_in.final_mean : NULL,
                          din ? m->dstate_in.final_var : NULL, m->dtop.final_weight, m->dtop.final_bias,
                          m->grad.x, m->have_dstate_out ? m->dstate_out.final_mean : NULL,
                          m->have_dstate_out ? m->dstate_out.final_var : NULL, a->final_mean, a->final_var,
                          last, m->state_in.count, m->carried ? m->state_in.final_mean : NULL,
                          m->top.final_weight, B, T, D, c->norm_num_groups, c->norm_eps);
    for (int l = c->num_layers - 1; l >= 0; l--) {
        const real *x = l ? m->acts[l - 1].out : a->embed;
        if (!m->options.keep_activations) layer_recompute(m, l, x);
        ffn_backward(m, l);
        mega_backward(m, l, x);
    }
    dropout_backward(m->grad.x, m->grad.x, rows * D, dropout_of(m, c->dropout),
                     dropout_key(m, -1, MEGALODON_SITE_EMBED));
    embedding_backward(m->dtop.embed_weight, m->grad.x, m->tokens, c->scale_emb ? (real)sqrt((double)D) : 1,
                       rows, D);
    return NULL;
}

static void cpu_zero_gradients(MegalodonModel *m) {
    if (m->grads) memset(m->grads, 0, (size_t)m->arena_size * sizeof(real));
}

/* Global norm of the gradients: squares summed in double, in chunks of fixed size, the chunks in order. */
static double gradient_norm(MegalodonModel *m) {
    int64_t chunks = (m->arena_size + NORM_CHUNK - 1) / NORM_CHUNK;
    PARALLEL_FOR(m->arena_size)
    for (int64_t i = 0; i < chunks; i++) {
        double sum = 0;
        int64_t end = MIN((i + 1) * NORM_CHUNK, m->arena_size);
        OMP(simd reduction(+:sum))
        for (int64_t j = i * NORM_CHUNK; j < end; j++) sum += (double)m->grads[j] * m->grads[j];
        m->norm_partials[i] = sum;
    }
    double total = 0;
    for (int64_t i = 0; i < chunks; i++) total += m->norm_partials[i];
    return sqrt(total);
}

/* The numbers [begin, end) of the arenas:
 *     m1 = b1 m1 + (1-b1) g    m2 = b2 m2 + (1-b2) g^2
 *     w  = w - lr ( (m1/(1-b1^t)) / (sqrt(m2/(1-b2^t)) + eps) + decay w ) */
static void update_range(MegalodonModel *m, int64_t begin, int64_t end, const MegalodonAdamW *adamw,
                         real clip, double weight_decay) {
    real b1 = (real)adamw->beta1, b2 = (real)adamw->beta2, lr = (real)adamw->lr, eps = (real)adamw->eps;
    real correction1 = (real)(1 / (1 - pow(adamw->beta1, (double)adamw->step)));
    real correction2 = (real)(1 / (1 - pow(adamw->beta2, (double)adamw->step)));
    real decay = (real)(1 - adamw->lr * weight_decay);
    real *w = m->weights, *g = m->grads, *m1 = m->moment1, *m2 = m->moment2;
    OMP(parallel for simd schedule(static) if (end - begin >= FORK_WORTH))
    for (int64_t i = begin; i < end; i++) {
        real gradient = g[i] * clip;
        m1[i] = b1 * m1[i] + (1 - b1) * gradient;
        m2[i] = b2 * m2[i] + (1 - b2) * gradient * gradient;
        w[i] = decay * w[i] - lr * (m1[i] * correction1) / (real_sqrt(m2[i] * correction2) + eps);
    }
}

/* AdamW with decoupled decay on every parameter, or on all but CEMA's, g clipped by the global norm. */
static const char *cpu_update(MegalodonModel *m, const MegalodonAdamW *adamw, double *grad_norm) {
    if (!m->options.training) return errorf("a model made for inference cannot be updated");
    double norm = gradient_norm(m);
    if (grad_norm) *grad_norm = norm;
    if (!isfinite(norm) || (adamw->max_norm > 0 && norm > adamw->max_norm)) return NULL;
    real clip = (real)(adamw->clip > 0 && norm > adamw->clip ? adamw->clip / norm : 1);
    for (int i = 0, next; i < m->num_params; i = next) {             /* neighbours of one decay together */
        double decay = megalodon_weight_decay(adamw, &m->params[i]);
        for (next = i + 1; next < m->num_params; next++)
            if (megalodon_weight_decay(adamw, &m->params[next]) != decay) break;
        int64_t end = next < m->num_params ? m->offset[next] : m->arena_size;
        update_range(m, m->offset[i], end, adamw, clip, decay);
    }
    m->coef_valid = false;
    return NULL;
}

/* Where a tensor lies: `rows` pieces of `row_size` numbers, `stride` apart, of one of three types. */
typedef struct { real *reals; double *doubles; int64_t *integers; int64_t rows, row_size, stride; } View;

static const char *view_state(MegalodonModel *m, MegalodonKind kind, const char *name, View *view) {
    const MegalodonConfig *c = &m->config;
    State *s = kind == MEGALODON_STATE           ? &m->state
               : kind == MEGALODON_GRAD_STATE_IN ? &m->dstate_in
                                                 : &m->dstate_out;
    MegalodonTensor tensor = {0};
    const char *error = megalodon_find_tensor(c, kind, s->B, 1, s->n, name, &tensor);
    if (error) return error;
    *view = (View){.rows = 1, .row_size = tensor.size, .stride = tensor.size};
    if (strcmp(name, "count") == 0) view->integers = s->count;
    else if (tensor.layer < 0) view->doubles = strstr(name, "mean") ? s->final_mean : s->final_var;
    else {
        const LayerState *layer = &s->layers[tensor.layer];
        const char *field = strchr(strchr(name, '.') + 1, '.') + 1;          /* after "layers.N." */
        if (strcmp(field, "norm.mean") == 0) view->doubles = layer->norm_mean;
        else if (strcmp(field, "norm.var") == 0) view->doubles = layer->norm_var;
        else if (strcmp(field, "cema") == 0) view->reals = layer->cema;
        else {
            bool is_k = strcmp(field, "k") == 0;
            view->reals = is_k ? layer->k : layer->v;
            view->rows = s->B;
            view->row_size = s->B ? tensor.size / s->B : 0;
            view->stride = (int64_t)c->chunk_size * (is_k ? c->z_dim : c->value_dim);
        }
    }
    return NULL;
}

static const char *view_activation(MegalodonModel *m, const char *name, View *view) {
    MegalodonTensor tensor = {0};
    const char *error =
        megalodon_find_tensor(&m->config, MEGALODON_ACT, m->batch.B, m->batch.T, 0, name, &tensor);
    if (error) return error;
    if (!m->options.keep_activations && strcmp(name, "nll") != 0)
        return errorf("activation '%s' is not kept: the model was made without keep_activations", name);
    *view = (View){.rows = 1, .row_size = tensor.size, .stride = tensor.size};
    const char *field = tensor.layer < 0 ? name : strchr(strchr(name, '.') + 1, '.') + 1;
#define X(member, field_name, ...) \
    if (tensor.layer >= 0 && strcmp(field, field_name) == 0) view->reals = m->acts[tensor.layer].member;
    MEGALODON_LAYER_ACTS(X)
#undef X
#define X(member, field_name, ...) \
    if (tensor.layer < 0 && strcmp(field, field_name) == 0) view->reals = m->top_acts.member;
    MEGALODON_MODEL_ACTS(X)
#undef X
    return NULL;
}

static const char *view_of(MegalodonModel *m, MegalodonKind kind, const char *name, View *view) {
    if (kind == MEGALODON_ACT) return view_activation(m, name, view);
    bool of_state =
        kind == MEGALODON_STATE || kind == MEGALODON_GRAD_STATE_IN || kind == MEGALODON_GRAD_STATE_OUT;
    if (of_state) {
        if (kind == MEGALODON_STATE ? !keeps_state(m) : !m->options.state_gradients)
            return errorf("this model has no '%s': it was made without carry or state_gradients", name);
        return view_state(m, kind, name, view);
    }
    real *arena = kind == MEGALODON_PARAM ? m->weights : kind == MEGALODON_GRAD ? m->grads
                : kind == MEGALODON_MOMENT1 ? m->moment1 : m->moment2;
    int i = find_param(m, name);
    if (i < 0) return errorf("this configuration has no parameter named '%s'", name);
    if (!arena) return errorf("a model made for inference has no gradient or moment of '%s'", name);
    *view = (View){.reals = arena + m->offset[i], .rows = 1, .row_size = m->params[i].size,
                   .stride = m->params[i].size};
    return NULL;
}

/* bfloat16 is the upper half of a float, rounded to nearest even; a NaN stays one. */
static uint16_t bf16_from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

static float float_from_bf16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static const char *cpu_get(MegalodonModel *m, MegalodonKind kind, const char *name, void *out,
                           MegalodonDType dtype) {
    View v;
    const char *error = view_of(m, kind, name, &v);
    if (error) return error;
    if ((dtype == MEGALODON_I64) != (v.integers != NULL))
        return errorf("'%s' is not of the type asked for", name);
    for (int64_t row = 0; row < v.rows; row++)
        for (int64_t i = 0; i < v.row_size; i++) {
            int64_t from = row * v.stride + i, to = row * v.row_size + i;
            double x = v.reals ? (double)v.reals[from] : v.doubles ? v.doubles[from] : 0;
            switch (dtype) {
            case MEGALODON_F32:  ((float *)out)[to] = (float)x; break;
            case MEGALODON_F64:  ((double *)out)[to] = x; break;
            case MEGALODON_BF16: ((uint16_t *)out)[to] = bf16_from_float((float)x); break;
            case MEGALODON_I64:  ((int64_t *)out)[to] = v.integers[from]; break;
            default: return errorf("'%s' cannot be had as that type", name);
            }
        }
    return NULL;
}

/* Empties rows [first, first + rows) of a state. */
static void clear_rows(MegalodonModel *m, State *s, int64_t first, int64_t rows) {
    const MegalodonConfig *c = &m->config;
    int64_t G = c->norm_num_groups, cema = (int64_t)c->model_dim * c->cema_ndim * 2;
    int64_t keys = (int64_t)c->chunk_size * c->z_dim, values = (int64_t)c->chunk_size * c->value_dim;
    for (int l = 0; l < c->num_layers; l++) {
        LayerState *layer = &s->layers[l];
        memset(layer->norm_mean + first * G, 0, (size_t)(rows * G) * sizeof(double));
        memset(layer->norm_var + first * G, 0, (size_t)(rows * G) * sizeof(double));
        memset(layer->cema + first * cema, 0, (size_t)(rows * cema) * sizeof(real));
        memset(layer->k + first * keys, 0, (size_t)(rows * keys) * sizeof(real));
        memset(layer->v + first * values, 0, (size_t)(rows * values) * sizeof(real));
    }
    memset(s->final_mean + first * G, 0, (size_t)(rows * G) * sizeof(double));
    memset(s->final_var + first * G, 0, (size_t)(rows * G) * sizeof(double));
    memset(s->count + first, 0, (size_t)rows * sizeof(int64_t));
}
static void clear_state(MegalodonModel *m, State *s) { clear_rows(m, s, 0, m->options.max_batch); }

static const char *cpu_set(MegalodonModel *m, MegalodonKind kind, const char *name, const void *in,
                           MegalodonDType dtype) {
    if (kind == MEGALODON_ACT || kind == MEGALODON_GRAD_STATE_IN)
        return errorf("'%s' is a result and cannot be set", name);
    if (strcmp(name, "count") == 0) return errorf("'count' is set by start_state");
    if (kind == MEGALODON_GRAD_STATE_OUT && m->options.state_gradients && !m->have_dstate_out) {
        m->dstate_out.B = m->state.B, m->dstate_out.n = m->state.n;
        clear_state(m, &m->dstate_out);
        m->have_dstate_out = true;
    }
    View v;
    const char *error = view_of(m, kind, name, &v);
    if (error) return error;
    for (int64_t row = 0; row < v.rows; row++)
        for (int64_t i = 0; i < v.row_size; i++) {
            int64_t to = row * v.stride + i, from = row * v.row_size + i;
            double x = 0;
            switch (dtype) {
            case MEGALODON_F32:  x = ((const float *)in)[from]; break;
            case MEGALODON_F64:  x = ((const double *)in)[from]; break;
            case MEGALODON_BF16: x = float_from_bf16(((const uint16_t *)in)[from]); break;
            default: return errorf("'%s' cannot be set from that type", name);
            }
            if (v.reals) v.reals[to] = (real)x;
            else v.doubles[to] = x;
        }
    if (kind == MEGALODON_PARAM) m->coef_valid = false;
    return NULL;
}

static const char *cpu_start_state(MegalodonModel *m, int B, const int64_t *count) {
    if (!keeps_state(m)) return errorf("this model was made without `carry`: it has no state");
    if (B < 1 || B > m->options.max_batch)
        return errorf("a state of %d rows does not fit a model made for %d", B, m->options.max_batch);
    int C = m->config.chunk_size;
    for (int b = 0; b < B; b++)
        if (count[b] < 0 || count[b] % C != count[0] % C)
            return errorf(
                "row %d of the state has seen %lld tokens and row 0 %lld: rows must stand at the same place "
                "in their chunk of %d",
                b, (long long)count[b], (long long)count[0], C);
    clear_state(m, &m->state);
    m->state.B = B;
    m->state.n = (int)(count[0] % C);
    memcpy(m->state.count, count, (size_t)B * sizeof *count);
    return NULL;
}

static const char *cpu_reset_rows(MegalodonModel *m, const bool *rows) {
    const char *error = megalodon_check_reset(&m->options, m->state.B, m->state.n);
    for (int b = 0; b < m->state.B && !error; b++)
        if (rows[b]) clear_rows(m, &m->state, b, 1);
    return error;
}

static void cpu_state_shape(const MegalodonModel *m, int *B, int *n) {
    *B = m->state.B;
    *n = m->state.n;
}

static void cpu_memory(const MegalodonModel *m, MegalodonMemory *memory) { *memory = m->memory; }
static const char *cpu_unavailable(void) { return NULL; }

/* ----------------------------------------------------------------------------------------------------
 * 5. Tables: the components with untyped arguments, in the order of megalodon_components, and the backend
 */

/* Names for the sizes and arguments of a component call, so that each wrapper below is one readable line. */
#define SIZES_OF(s)                                                                                          \
    const MegalodonConfig *c = &(s)->config;                                                                 \
    const int64_t B = (s)->B, T = (s)->T, n = (s)->n, rows = B * T, D = c->model_dim, N = c->cema_ndim;      \
    const int64_t H = c->num_heads, Z = c->z_dim, E = c->value_dim, F = c->ffn_hidden_dim;                   \
    const int64_t G = c->norm_num_groups, C = c->chunk_size, V = c->vocab_size, z = Z / H, e = E / H;        \
    const double eps = c->norm_eps;                                                                          \
    (void)n, (void)rows, (void)D, (void)N, (void)F, (void)G, (void)C, (void)V, (void)z, (void)e, (void)eps
#define FORWARD(name) static void component_##name##_forward(void *const *a, const MegalodonShape *s)
#define BACKWARD(name)                                                                                       \
    static void component_##name##_backward(void *const *g, void *const *a, const MegalodonShape *s)

static real embedding_scale(const MegalodonConfig *c) {
    return c->scale_emb ? (real)sqrt((double)c->model_dim) : 1;
}

FORWARD(embedding) { SIZES_OF(s); embedding_forward(a[0], a[1], a[2], embedding_scale(c), rows, D); }
BACKWARD(embedding) { SIZES_OF(s); embedding_backward(g[2], g[0], a[1], embedding_scale(c), rows, D); }

FORWARD(timestepnorm) {
    SIZES_OF(s);
    timestepnorm_forward(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], B, T, D, G, eps);
}
BACKWARD(timestepnorm) {
    SIZES_OF(s);
    timestepnorm_backward(g[5], g[7], g[8], g[9], g[10], g[0], g[3], g[4], a[1], a[2], a[5], a[6], a[7], a[9],
                          B, T, D, G, eps);
}

/* Coefficients of one call; the model keeps its own. */
static CemaCoefficients component_coefficients(void *const *a, int64_t D, int64_t N) {
    real *memory = malloc((size_t)(NUM_CEMA_COEFFICIENTS * D * N) * sizeof(real));
    if (!memory) abort();
    CemaCoefficients coef = cema_coefficients_at(memory, D, N);
    cema_coefficients(coef, a[4], a[5], a[6], a[7], D, N);
    return coef;
}
FORWARD(cema) {
    SIZES_OF(s);
    CemaCoefficients coef = component_coefficients(a, D, N);
    cema_forward(a[0], a[1], a[2], a[3], coef, a[8], B, T, D, N);
    free(coef.p);
}
BACKWARD(cema) {
    SIZES_OF(s);
    CemaCoefficients coef = component_coefficients(a, D, N);
    cema_backward(g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[0], g[1], a[2], a[3], coef, a[4], a[5], a[6],
                  a[8], B, T, D, N);
    free(coef.p);
}

FORWARD(rmsnorm) { SIZES_OF(s); rmsnorm_forward(a[0], a[1], a[2], a[3], rows, D, eps); }
BACKWARD(rmsnorm) { SIZES_OF(s); rmsnorm_backward(g[2], g[3], g[0], a[1], a[2], a[3], rows, D); }

FORWARD(linear) { SIZES_OF(s); linear_forward(a[0], a[1], a[2], a[3], rows, D, E, false); }
BACKWARD(linear) { SIZES_OF(s); linear_backward(g[1], g[2], g[3], g[0], a[1], a[2], rows, D, E, false); }

FORWARD(znorm) { SIZES_OF(s); znorm_forward(a[0], a[1], rows, H, z, eps); }
BACKWARD(znorm) { SIZES_OF(s); znorm_backward(g[1], g[0], a[1], rows, H, z, eps); }

FORWARD(qk_affine) { SIZES_OF(s); qk_affine_forward(a[0], a[1], a[2], a[3], a[4], rows, Z, z); }
BACKWARD(qk_affine) { SIZES_OF(s); qk_affine_backward(g[2], g[3], g[4], g[0], g[1], a[2], a[3], rows, Z, z); }

static void component_rope(real *y, const real *x, const MegalodonShape *s, bool backward) {
    SIZES_OF(s);
    real *table = malloc((size_t)(C * z) * sizeof(real));
    if (!table) abort();
    rope_table(table, C, z, c->rope_base);
    if (backward) rope_backward(y, x, table, n, B, T, H, z, C);
    else rope_forward(y, x, table, n, B, T, H, z, C);
    free(table);
}
FORWARD(rope) { component_rope(a[0], a[1], s, false); }
BACKWARD(rope) { (void)a; component_rope(g[1], g[0], s, true); }

FORWARD(silu) { SIZES_OF(s); silu_forward(a[0], a[1], rows * E); }
BACKWARD(silu) { SIZES_OF(s); silu_backward(g[1], g[0], a[1], rows * E); }

static AttentionKeys component_keys(void *const *a, const MegalodonShape *s) {
    SIZES_OF(s);
    return (AttentionKeys){.k = a[3], .v = a[4], .k_in = a[5], .v_in = a[6], .n = n, .capacity = n,
                           .B = B, .T = T, .H = H, .z = z, .e = e, .C = C};
}
FORWARD(attention) {
    attention_forward(a[0], a[1], a[2], component_keys(a, s), s->config.attention_dropout, s->key);
}
BACKWARD(attention) {
    attention_backward(g[2], g[3], g[4], g[5], g[6], g[0], a[1], a[2], component_keys(a, s),
                       s->config.attention_dropout, s->key);
}

FORWARD(gate) { SIZES_OF(s); gate_forward(a[0], a[1], a[2], rows * E); }
BACKWARD(gate) { SIZES_OF(s); gate_backward(g[1], g[2], g[0], a[1], a[2], rows * E); }

FORWARD(layernorm) { SIZES_OF(s); layernorm_forward(a[0], a[1], a[2], a[3], a[4], a[5], rows, D, eps); }
BACKWARD(layernorm) {
    SIZES_OF(s);
    layernorm_backward(g[3], g[4], g[5], g[0], a[1], a[2], a[3], a[4], rows, D);
}

FORWARD(swiglu) { SIZES_OF(s); swiglu_forward(a[0], a[1], a[2], rows * F); }
BACKWARD(swiglu) { SIZES_OF(s); swiglu_backward(g[1], g[2], g[0], a[1], a[2], rows * F); }

FORWARD(rescale) { SIZES_OF(s); rescale_forward(a[0], a[1], a[2], a[3], rows, D); }
BACKWARD(rescale) { SIZES_OF(s); rescale_backward(g[1], g[2], g[3], g[0], a[1], a[3], rows, D); }

FORWARD(dropout) { SIZES_OF(s); dropout_forward(a[0], a[1], rows * D, c->dropout, s->key); }
BACKWARD(dropout) { SIZES_OF(s); (void)a; dropout_backward(g[1], g[0], rows * D, c->dropout, s->key); }

FORWARD(cross_entropy) { SIZES_OF(s); cross_entropy_forward(a[0], a[1], a[2], rows, V); }
BACKWARD(cross_entropy) { SIZES_OF(s); cross_entropy_backward(g[1], g[0], 1, a[1], a[2], rows, V); }

#define PAIR(ID, name) [MEGALODON_##ID] = {component_##name##_forward, component_##name##_backward}
static const MegalodonComponentFunctions cpu_components[MEGALODON_NUM_COMPONENTS] = {
    PAIR(EMBEDDING, embedding), PAIR(TIMESTEPNORM, timestepnorm), PAIR(CEMA, cema), PAIR(RMSNORM, rmsnorm),
    PAIR(LINEAR, linear), PAIR(ZNORM, znorm), PAIR(QK_AFFINE, qk_affine), PAIR(ROPE, rope), PAIR(SILU, silu),
    PAIR(ATTENTION, attention), PAIR(GATE, gate), PAIR(LAYERNORM, layernorm), PAIR(SWIGLU, swiglu),
    PAIR(RESCALE, rescale), PAIR(DROPOUT, dropout), PAIR(CROSS_ENTROPY, cross_entropy),
};

/* The symbol follows the type: megalodon_cpu for float, megalodon_cpu_double for double. */
#define BACKEND_float megalodon_cpu
#define BACKEND_double megalodon_cpu_double
#define JOIN(a, b) a##b
#define BACKEND_OF(type) JOIN(BACKEND_, type)

const MegalodonBackend BACKEND_OF(MEGALODON_REAL) = {
    .name = sizeof(real) == sizeof(float) ? "cpu" : "cpu-double",
    .unavailable = cpu_unavailable,
    .create = cpu_create,
    .destroy = cpu_destroy,
    .forward = cpu_forward,
    .last_logits = cpu_last_logits,
    .backward = cpu_backward,
    .zero_gradients = cpu_zero_gradients,
    .update = cpu_update,
    .get = cpu_get,
    .set = cpu_set,
    .start_state = cpu_start_state,
    .reset_rows = cpu_reset_rows,
    .state_shape = cpu_state_shape,
    .memory = cpu_memory,
    .components = cpu_components,
};
