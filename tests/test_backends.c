/* test_backends.c - whole models on two backends in one process: are they the same model?
 *
 *     test_backends [--short] [--backend NAME] [--only PART,...]         NAME: cpu-double, cuda-fp32 or cuda-bf16
 *
 * The short form is for tools under which every kernel takes a hundred times as long: fewer shapes, in which each
 * kernel still runs.
 *
 * The reference is megalodon_cpu, which test_golden has compared with recorded numbers. Every candidate that can run
 * here is compared with it; where there is no GPU, the double version of megalodon.c stands in, so that the program
 * tests itself. What is compared:
 *   - all named activations, the state, all gradients and those of the state, in graph order, over several
 *     configurations and shapes, from an empty state and from a carried one; the first tensor that differs is named;
 *   - dropout masks, exactly; gradients accumulated over micro-batches; one update; last_logits; two equal runs;
 *   - the losses of 20 training steps;
 *   - a training run and a state that one backend wrote to a file and the other goes on from, both ways.
 *
 * Tolerances, as RMS(ours - want) / RMS(want). fp32: 1e-5 for activations and 1e-4 for gradients, like test_golden
 * and test_components, and losses to 1e-4 nats over 20 steps, which depend on all gradients before them. bf16 has 8
 * bits, so one rounding is up to 4e-3; a block has some ten of them one after the other, and its backward ten more on
 * top: 3e-2 for activations, 8e-2 for gradients, 2e-2 nats. The worst is printed for every configuration; observed
 * (cuda on an H100, nats over 20 steps and after a crossing checkpoint):
 *
 *                                        activations   state    gradients   of the state   nats
 *   cpu-double                           2e-6                   3e-6                       2e-6
 *   cuda-fp32   plain                    1.4e-6        3.3e-7   1.9e-6      7.9e-7         1.5e-7
 *               swiglu, rescale, tied    3.8e-7        2.4e-7   9.6e-7      4.5e-7         2.0e-7
 *               no affine, one head      1.1e-6        3.1e-7   3.4e-6      8.9e-7
 *               dropout                  5.1e-7        2.7e-7   1.4e-6      7.3e-7         1.1e-7
 *               odd sizes                5.5e-7        4.5e-7   1.8e-6      1.3e-6
 *   cuda-bf16   plain                    3.4e-2 *      9.1e-3   2.7e-2      2.0e-2         1.7e-3
 *               swiglu, rescale, tied    9.8e-3        6.2e-3   2.0e-2      9.1e-3         3.2e-3
 *               no affine, one head      4.2e-2 *      1.1e-2   3.3e-2      2.4e-2
 *               dropout                  1.3e-2        8.4e-3   2.4e-2      3.8e-2         1.4e-3
 *               odd sizes                1.7e-2        1.3e-2   3.4e-2      1.7e-2
 *
 * The starred ones are LayerNorm's mean of a single token, 24 features that cancel; they were seen with a floor (see
 * Candidate) of 1e-2, and are why it is 5e-2 for bf16.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "../lib/checkpoint.h"
#include "model.h"
#include "test.h"

#include <unistd.h>

typedef struct Candidate {
    const char *name;
    const MegalodonBackend *backend;         /* NULL: not built in */
    MegalodonPrecision precision;
    double forward, backward, loss;          /* tolerances; loss in nats */
    /* A tensor that cancels to nearly nothing is all rounding error: its error is taken relative to at least this
     * share of the RMS over all tensors of its kind. (Seen: the mean of one token's 24 bf16 features, 4e-2 of
     * itself.) */
    double floor;
} Candidate;

#ifdef MEGALODON_WITH_CUDA
#define CUDA_BACKEND &megalodon_cuda
#else
#define CUDA_BACKEND NULL
#endif

static const Candidate candidates[] = {
    {"cuda-fp32",  CUDA_BACKEND,          MEGALODON_FP32,       1e-5, 1e-4, 1e-4, 1e-3},
    {"cuda-bf16",  CUDA_BACKEND,          MEGALODON_BF16_MIXED, 3e-2, 8e-2, 2e-2, 5e-2},
    {"cpu-double", &megalodon_cpu_double, MEGALODON_FP32,       1e-5, 1e-4, 1e-4, 1e-3},
};
enum { NUM_CANDIDATES = sizeof candidates / sizeof *candidates, STAND_IN = NUM_CANDIDATES - 1 };

/* ---- two models ---- */

enum { REFERENCE, OURS, MAX_B = 3, MAX_T = 64, MAX_GENERATED = 8 };
enum { LONG_CHUNK = 384, LONG_T = 2 * LONG_CHUNK }; /* chunks of several tiles of a GPU's, and two of them */

static bool brief; /* --short */

/* The same model on both backends. */
typedef struct Pair {
    const Candidate *candidate;
    const char *what;                        /* the configuration, for messages */
    bool keep;                               /* our side keeps all activations; else it computes some again */
    MegalodonConfig config;
    const MegalodonBackend *backend[2];
    MegalodonModel *model[2];
} Pair;

/* A backend may keep more than it must where there is memory: our model in the least memory that it can do with. */
static MegalodonModel *create_least(const Pair *pair, MegalodonOptions options, uint64_t seed) {
    const MegalodonBackend *backend = pair->backend[OURS];
    MegalodonModel *model = NULL;
    MegalodonMemory m;
    int64_t least = INT64_MAX, before;
    do { /* each time with a byte less than the last one took */
        before = least;
        if (backend->create(&model, &pair->config, &options)) break;
        backend->memory(model, &m);
        backend->destroy(model);
        least = megalodon_total_memory(&m);
        options.max_bytes = least - 1;
    } while (least < before);
    options.max_bytes = least;
    return model_create(backend, &pair->config, &options, seed);
}

static MegalodonModel *create_side(const Pair *pair, int side, bool training, uint64_t seed) {
    int length = pair->config.chunk_size < LONG_CHUNK ? MAX_T : LONG_T;
    MegalodonOptions options = {.max_batch = training ? MAX_B : MAX_GENERATED, .max_length = length,
                                .training = training,
                                .keep_activations = training && (side == REFERENCE || pair->keep), .carry = true,
                                .state_gradients = training,
                                .precision = side == OURS ? pair->candidate->precision : MEGALODON_FP32};
    if (training && side == OURS && !pair->keep) return create_least(pair, options, seed);
    return model_create(pair->backend[side], &pair->config, &options, seed);
}

static Pair pair_create(const Candidate *candidate, const char *what, const MegalodonConfig *config, bool training,
                        bool keep) {
    Pair pair = {.candidate = candidate, .what = what, .keep = keep, .config = *config,
                 .backend = {&megalodon_cpu, candidate->backend}};
    for (int side = 0; side < 2; side++) pair.model[side] = create_side(&pair, side, training, 17);
    return pair;
}

static void pair_destroy(Pair *pair) {
    for (int side = 0; side < 2; side++) pair->backend[side]->destroy(pair->model[side]);
}

/* Random tokens, and targets of which every seventh does not count. The arrays live until the next call. */
static MegalodonBatch random_batch(const MegalodonConfig *config, int B, int T, uint64_t seed) {
    static int32_t tokens[MAX_B * LONG_T], targets[MAX_B * LONG_T];
    random_tokens(tokens, B * T, config->vocab_size, 2 * seed);
    random_tokens(targets, B * T, config->vocab_size, 2 * seed + 1);
    for (int i = 6; i < B * T; i += 7) targets[i] = MEGALODON_IGNORE;
    return (MegalodonBatch){.tokens = tokens, .targets = targets, .B = B, .T = T, .seed = 5, .step = seed};
}

/* ---- comparing ---- */

/* What a comparison of all tensors of a kind found. */
typedef struct Divergence {
    char first[MEGALODON_MAX_NAME];          /* in graph order, past the tolerance; "" if there is none */
    double first_error;
    char worst[MEGALODON_MAX_NAME];
    double worst_error;
    int not_kept;                            /* activations that one side does not keep */
} Divergence;

static void remember_worst(Divergence *into, const Divergence *found) {
    if (found->worst_error <= into->worst_error) return;
    memcpy(into->worst, found->worst, sizeof into->worst);
    into->worst_error = found->worst_error;
}

/* A tensor of one side as doubles (free it), or NULL if that side does not keep it. It is NaN before it is fetched, so
 * that what a backend does not write is seen. */
static double *fetch_side(const Pair *pair, int side, MegalodonKind kind, const MegalodonTensor *tensor) {
    bool count = strcmp(tensor->name, "count") == 0;
    double *values = must_allocate((size_t)tensor->size * sizeof *values);
    int64_t integers[MAX_GENERATED];
    for (int64_t i = 0; i < tensor->size; i++) values[i] = NAN;
    const char *error = pair->backend[side]->get(pair->model[side], kind, tensor->name,
                                                 count ? (void *)integers : values,
                                                 count ? MEGALODON_I64 : MEGALODON_F64);
    for (int64_t i = 0; count && i < tensor->size; i++) values[i] = (double)integers[i];
    if (!error) return values;
    if (kind != MEGALODON_ACT) must(error);
    free(values);
    return NULL;
}

/* Compares all tensors of a kind on both sides, gradients from the last layer to the first. n: place in the chunk of
 * the state in question. */
static Divergence compare_kind(const Pair *pair, MegalodonKind kind, int B, int T, int n, double tolerance) {
    MegalodonTensor list[MODEL_MAX_TENSORS];
    double wants[MODEL_MAX_TENSORS], errors[MODEL_MAX_TENSORS], squares = 0, sizes = 0;
    Divergence found = {.worst_error = 0};
    int count = megalodon_tensors(&pair->config, kind, B, T, n, list, MODEL_MAX_TENSORS);
    if (count > MODEL_MAX_TENSORS) must("too many tensors");
    for (int i = 0; i < count; i++) {
        double *want = fetch_side(pair, REFERENCE, kind, &list[i]), *ours = fetch_side(pair, OURS, kind, &list[i]);
        size_t size = (size_t)list[i].size;
        wants[i] = errors[i] = 0;
        if (want && ours) {
            wants[i] = test_rms(want, size);
            for (size_t j = 0; j < size; j++) ours[j] -= want[j];
            errors[i] = test_rms(ours, size);
        } else {
            found.not_kept++;
        }
        if (strcmp(list[i].name, "count") != 0) squares += wants[i] * wants[i] * (double)size, sizes += (double)size;
        free(want);
        free(ours);
    }
    double least = pair->candidate->floor * sqrt(squares / sizes);
    for (int k = 0; k < count; k++) {
        int i = kind == MEGALODON_GRAD ? count - 1 - k : k;
        double unit = wants[i] > least ? wants[i] : least, error = errors[i] == 0 ? 0 : errors[i] / unit;
        if (!isfinite(error)) error = INFINITY;
        if (error > found.worst_error) {
            found.worst_error = error;
            memcpy(found.worst, list[i].name, sizeof found.worst);
        }
        if (error <= tolerance || found.first[0]) continue;
        found.first_error = error;
        memcpy(found.first, list[i].name, sizeof found.first);
    }
    return found;
}

/* compare_kind as one check. `worst` may be NULL. */
static void check_kind(const Pair *pair, MegalodonKind kind, const MegalodonBatch *batch, int n, const char *kind_name,
                       Divergence *worst) {
    bool forward = kind == MEGALODON_ACT || kind == MEGALODON_STATE;
    double tolerance = forward ? pair->candidate->forward : pair->candidate->backward;
    Divergence found = compare_kind(pair, kind, batch->B, batch->T, n, tolerance);
    check(!found.first[0], "%s, %s, B=%d T=%d%s: %s: the first that differs is %s, by %.2e (worst %s, %.2e)",
          pair->candidate->name, pair->what, batch->B, batch->T, batch->carry ? " from a state" : "", kind_name,
          found.first, found.first_error, found.worst, found.worst_error);
    if (!worst) return;
    remember_worst(worst, &found);
    worst->not_kept = found.not_kept;
}

/* ---- activations and gradients ---- */

/* Small random numbers as d loss / d state that went out, the same on both sides. */
static void set_state_gradients(const Pair *pair, int B, int n) {
    MegalodonTensor list[MODEL_MAX_TENSORS];
    int count = megalodon_tensors(&pair->config, MEGALODON_GRAD_STATE_OUT, B, 1, n, list, MODEL_MAX_TENSORS);
    for (int i = 0; i < count; i++) {
        float *values = must_allocate((size_t)list[i].size * sizeof *values);
        for (int64_t j = 0; j < list[i].size; j++)
            values[j] = 1e-3f * (float)((int)(megalodon_random(900 + (uint64_t)i, (uint64_t)j) % 201) - 100);
        for (int side = 0; side < 2; side++)
            must(pair->backend[side]->set(pair->model[side], MEGALODON_GRAD_STATE_OUT, list[i].name, values,
                                          MEGALODON_F32));
        free(values);
    }
}

/* The worst of a configuration, over its shapes. */
typedef struct Worst {
    Divergence activations, state, gradients, state_gradients;
} Worst;

/* One forward and backward on both sides, and everything that comes of it. before: tokens that the state has read. */
static void check_pass(const Pair *pair, int B, int T, int before, bool dropout, Worst *worst) {
    MegalodonLoss loss[2];
    int C = pair->config.chunk_size, n = (before + T) % C;
    for (int side = 0; side < 2 && before; side++) {
        MegalodonBatch first = random_batch(&pair->config, B, before, 3);
        must(pair->backend[side]->forward(pair->model[side], &first, NULL));
    }
    MegalodonBatch batch = random_batch(&pair->config, B, T, 4);
    batch.carry = before > 0;
    batch.dropout = dropout;
    for (int side = 0; side < 2; side++) must(pair->backend[side]->forward(pair->model[side], &batch, &loss[side]));
    double mean = loss[REFERENCE].nll_sum / (double)loss[REFERENCE].counted;
    double ours = loss[OURS].nll_sum / (double)loss[OURS].counted;
    check(loss[OURS].counted == loss[REFERENCE].counted, "%s, %s, B=%d T=%d: %lld targets were counted, expected %lld",
          pair->candidate->name, pair->what, B, T, (long long)loss[OURS].counted, (long long)loss[REFERENCE].counted);
    check(fabs(ours - mean) <= pair->candidate->forward * mean, "%s, %s, B=%d T=%d: loss %.9g, expected %.9g",
          pair->candidate->name, pair->what, B, T, ours, mean);
    check_kind(pair, MEGALODON_ACT, &batch, n, "activations", &worst->activations);
    check_kind(pair, MEGALODON_STATE, &batch, n, "state", &worst->state);
    if (before) set_state_gradients(pair, B, n);
    for (int side = 0; side < 2; side++) {
        pair->backend[side]->zero_gradients(pair->model[side]);
        must(pair->backend[side]->backward(pair->model[side], 1 / (double)loss[REFERENCE].counted));
    }
    check_kind(pair, MEGALODON_GRAD, &batch, n, "gradients", &worst->gradients);
    if (before)
        check_kind(pair, MEGALODON_GRAD_STATE_IN, &batch, before % C, "gradients of the state",
                   &worst->state_gradients);
}

/* Sizes that a GPU's own tiles divide. */
static MegalodonConfig wide_config(MegalodonConfig config) {
    config.model_dim = 64, config.value_dim = 512, config.ffn_hidden_dim = 256;
    return config;
}

/* Few shapes, since they are large. */
static void check_wide(const Candidate *candidate, const char *what, MegalodonConfig config, bool swiglu,
                       int model_dim) {
    config = wide_config(config), config.swiglu = swiglu;
    if (model_dim > 0) config.model_dim = model_dim, config.vocab_size = 512;
    if (swiglu) config.vocab_size = 4104; /* a row of logits is more than a few warps hold */
    Pair pair = pair_create(candidate, what, &config, true, false);
    Worst worst;
    memset(&worst, 0, sizeof worst);
    check_pass(&pair, MAX_B, 3 * config.chunk_size + 2, 0, false, &worst);
    check_pass(&pair, 1, config.chunk_size, 5, false, &worst);
    printf("%-10s %-26s loss %.1e  state %.1e  gradients %.1e (%s)  of the state %.1e\n", candidate->name, what,
           worst.activations.worst_error, worst.state.worst_error, worst.gradients.worst_error,
           worst.gradients.worst, worst.state_gradients.worst_error);
    pair_destroy(&pair);
}

/* Norms whose rows are so long that threads own several steps of a tile, in vectors of 16 bytes and of 8; and with
 * dropout, rows that need more of a thread's registers, or more than it has, and several vectors a thread of a tile. */
static void check_long_rows(const Candidate *candidate, MegalodonConfig config) {
    static const struct { int model_dim, groups; bool dropout; } sizes[] = {
        {512, 8, false}, {384, 32, false}, {1536, 48, true}, {2304, 8, true}};
    config.num_layers = 1;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        config.model_dim = sizes[i].model_dim, config.norm_num_groups = sizes[i].groups;
        config.hidden_dropout = sizes[i].dropout ? 0.25 : 0;
        Pair pair = pair_create(candidate, "long rows", &config, true, false);
        Worst worst;
        memset(&worst, 0, sizeof worst);
        check_pass(&pair, 2, 62, 0, sizes[i].dropout, &worst);
        check_pass(&pair, 1, 37, 5, sizes[i].dropout, &worst);
        printf("%-10s %-26s loss %.1e  state %.1e  gradients %.1e (%s)\n", candidate->name, pair.what,
               worst.activations.worst_error, worst.state.worst_error, worst.gradients.worst_error,
               worst.gradients.worst);
        pair_destroy(&pair);
    }
}

/* Whole chunks of tiles, whose backward may go other ways than that of parts of them. */
static void check_chunks(const Candidate *candidate, const char *what, MegalodonConfig config, bool dropout) {
    config = wide_config(config);
    config.num_layers = 1, config.chunk_size = LONG_CHUNK;
    Pair pair = pair_create(candidate, what, &config, true, !dropout);
    Worst worst;
    memset(&worst, 0, sizeof worst);
    check_pass(&pair, 2, LONG_T, 0, dropout, &worst);
    check_pass(&pair, 1, LONG_CHUNK, LONG_CHUNK, dropout, &worst);
    check_pass(&pair, 1, LONG_CHUNK, 5, dropout, &worst);
    check_pass(&pair, 1, LONG_T - 128, 0, dropout, &worst);
    printf("%-10s %-26s loss %.1e  state %.1e  gradients %.1e (%s)  of the state %.1e\n", candidate->name, what,
           worst.activations.worst_error, worst.state.worst_error, worst.gradients.worst_error,
           worst.gradients.worst, worst.state_gradients.worst_error);
    pair_destroy(&pair);
}

/* Products of more tiles of 256 columns than any GPU has multiprocessors, so that a block makes several. */
static void check_many_tiles(const Candidate *candidate, MegalodonConfig config) {
    config = wide_config(config);
    config.num_layers = 1, config.swiglu = true, config.ffn_hidden_dim = 300 * 256;
    Pair pair = pair_create(candidate, "many tiles", &config, true, false);
    Worst worst;
    memset(&worst, 0, sizeof worst);
    check_pass(&pair, MAX_B, config.chunk_size, 0, false, &worst);
    printf("%-10s %-26s loss %.1e  gradients %.1e (%s)\n", candidate->name, pair.what, worst.activations.worst_error,
           worst.gradients.worst_error, worst.gradients.worst);
    pair_destroy(&pair);
}

/* All shapes of one configuration: T of one, primes, around the chunk size, several chunks and a rest. */
static void check_shapes(const Candidate *candidate, const char *what, const MegalodonConfig *config, bool dropout,
                         bool keep) {
    int C = config->chunk_size, lengths[] = {1, 2, 7, C - 1, C, C + 1, 3 * C + 2};
    Pair pair = pair_create(candidate, what, config, true, keep);
    Worst worst;
    memset(&worst, 0, sizeof worst);
    for (size_t i = brief ? 1 : 0; i < sizeof lengths / sizeof *lengths; i += brief ? 5 : 1)
        for (int B = brief ? MAX_B : 1; B <= MAX_B; B += 2) {
            check_pass(&pair, B, lengths[i], 0, dropout, &worst);
            check_pass(&pair, B, lengths[i], i % 2 ? C - 1 : C + 3, dropout, &worst);
        }
    printf("%-10s %-26s activations %.1e (%s)  state %.1e  gradients %.1e (%s)  of the state %.1e\n", candidate->name,
           what, worst.activations.worst_error, worst.activations.worst, worst.state.worst_error,
           worst.gradients.worst_error, worst.gradients.worst, worst.state_gradients.worst_error);
    if (keep && worst.activations.not_kept) {
        char text[160];
        snprintf(text, sizeof text, "%s, %s: %d activations are not kept", candidate->name, what,
                 worst.activations.not_kept);
        test_skip(text);
    }
    pair_destroy(&pair);
}

/* ---- dropout ---- */

/* A dropped element is exactly zero and nothing else is, so the masks can be read off the activations behind each site
 * (and off `attn` where a token sees only itself). The sites inside sums are left to check_shapes: a mask that differs
 * there is an error of the order of one. */
static void check_masks(const Candidate *candidate, const MegalodonConfig *config) {
    static const char *const names[] = {"embed", "layers.0.rmsnorm", "layers.0.attn", "layers.0.gated",
                                        "layers.0.nffn.hidden", "layers.0.nffn.fc2", "layers.1.rmsnorm",
                                        "layers.1.gated", "layers.1.nffn.hidden", "layers.1.nffn.fc2"};
    Pair pair = pair_create(candidate, "dropout", config, true, true);
    int C = config->chunk_size;
    for (uint64_t step = 1; step <= 3; step++) {
        MegalodonBatch batch = random_batch(config, MAX_B, 3 * C + 2, step);
        batch.dropout = true;
        for (int side = 0; side < 2; side++) must(pair.backend[side]->forward(pair.model[side], &batch, NULL));
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            MegalodonTensor tensor;
            must(megalodon_find_tensor(config, MEGALODON_ACT, batch.B, batch.T, 0, names[i], &tensor));
            double *want = fetch_side(&pair, REFERENCE, MEGALODON_ACT, &tensor);
            double *ours = fetch_side(&pair, OURS, MEGALODON_ACT, &tensor);
            /* A bf16 sum may also cancel to exactly zero; a mask would have taken an element of ordinary size. */
            double small = want ? candidate->floor * test_rms(want, (size_t)tensor.size) : 0;
            int64_t dropped = 0, differ = 0;
            for (int64_t j = 0; want && ours && j < tensor.size; j++) {
                dropped += want[j] == 0;
                differ += want[j] == 0 ? ours[j] != 0 : ours[j] == 0 && fabs(want[j]) > small;
            }
            if (want && ours)
                check(dropped > 0 && differ == 0, "%s: dropout of %s, step %d: %lld elements dropped, %lld differ",
                      candidate->name, names[i], (int)step, (long long)dropped, (long long)differ);
            free(want);
            free(ours);
        }
    }
    pair_destroy(&pair);
}

/* ---- the rest of a training step ---- */

/* Rows in micro-batches of one on our side, in one batch on the reference's: the gradients add up to the same. Then
 * two updates, the first one clipped. eps is above most gradients: with a tiny one, the first update is the sign of the
 * gradient, and rounding errors decide over those of tiny gradients. The decay is large, so that an error of 1% in it
 * would be seen. */
static void check_accumulation(const Candidate *candidate, const MegalodonConfig *config) {
    const int T = config->chunk_size + 3;
    Pair pair = pair_create(candidate, "accumulated", config, true, false);
    MegalodonBatch batch = random_batch(config, MAX_B, T, 8), row = batch;
    MegalodonLoss loss, part;
    int64_t counted = 0;
    for (int side = 0; side < 2; side++) pair.backend[side]->zero_gradients(pair.model[side]);
    must(pair.backend[REFERENCE]->forward(pair.model[REFERENCE], &batch, &loss));
    must(pair.backend[REFERENCE]->backward(pair.model[REFERENCE], 1 / (double)loss.counted));
    row.B = 1;
    for (int b = 0; b < MAX_B; b++) {
        row.tokens = batch.tokens + b * T;
        row.targets = batch.targets + b * T;
        must(pair.backend[OURS]->forward(pair.model[OURS], &row, &part));
        must(pair.backend[OURS]->backward(pair.model[OURS], 1 / (double)loss.counted));
        counted += part.counted;
    }
    check(counted == loss.counted, "%s: micro-batches count %lld targets, one batch %lld", candidate->name,
          (long long)counted, (long long)loss.counted);
    check_kind(&pair, MEGALODON_GRAD, &batch, 0, "gradients", NULL);
    for (int step = 1; step <= 2; step++) {
        MegalodonAdamW adamw = {.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-2, .weight_decay = 5,
                                .clip = step == 1 ? 0.5 : 0, .step = step, .spare_cema = step == 2};
        double norm[2];
        for (int side = 0; side < 2; side++) must(pair.backend[side]->update(pair.model[side], &adamw, &norm[side]));
        check(fabs(norm[OURS] - norm[REFERENCE]) <= candidate->backward * norm[REFERENCE],
              "%s: gradient norm %.9g, expected %.9g", candidate->name, norm[OURS], norm[REFERENCE]);
        check_kind(&pair, MEGALODON_PARAM, &batch, 0, "parameters after an update", NULL);
        check_kind(&pair, MEGALODON_MOMENT1, &batch, 0, "first moments", NULL);
        check_kind(&pair, MEGALODON_MOMENT2, &batch, 0, "second moments", NULL);
    }
    pair_destroy(&pair);
}

/* A step of check_recorded. */
enum { ADD = 1, DROP = 2, UPDATE = 4, NO_LOSS = 8 };
typedef struct RecordedStep {
    int B, T;                                /* T: tokens more than a chunk */
    double scale;                            /* of the loss; 0: no backward */
    int what;                                /* ADD: to the gradients of the step before */
} RecordedStep;

/* Training without a state, whose passes a backend may record when they come again: every way in which a step can
 * differ from the one before, between steps that are alike but for their tokens. Two models take turns, whose weights
 * differ: a recording is one model's. */
static void check_recorded(const Candidate *candidate, const char *what, const MegalodonConfig *config) {
    static const RecordedStep steps[] = {
        {2, 3, 0.1, 0},    {2, 3, 0.1, UPDATE},                         /* the same again, then other weights */
        {2, 3, 0.1, 0},    {2, 3, 1.0, 0},       {2, 3, 0.1, 0},        /* another scale */
        {2, 3, 0.1, ADD},  {2, 3, 0.1, ADD},     {2, 3, 0.1, ADD},      /* micro-batches */
        {1, 3, 0.1, 0},    {1, 3, 0.1, 0},       {1, 3, 0.1, 0},        /* fewer rows */
        {1, -2, 0.1, 0},   {1, -2, 0.1, 0},      {1, -2, 0.1, 0},       /* fewer tokens */
        {2, 3, 0.1, DROP}, {2, 3, 0.1, DROP | UPDATE},                  /* masks, which change */
        {2, 3, 0.1, 0},    {2, 3, 0.1, 0},                              /* the masks are gone */
        {2, 3, 0.0, 0},    {2, 3, 0.0, NO_LOSS}, {2, 3, 0.0, NO_LOSS},  /* evaluation */
        {2, 3, 0.1, 0},    {2, 3, 0.1, DROP},    {2, 3, 0.1, ADD | DROP},
    };
    enum { MODELS = 2, NUM = sizeof steps / sizeof *steps, MOST = 2 };
    Pair pairs[MODELS];
    for (int i = 0; i < MODELS; i++) {
        pairs[i] = (Pair){.candidate = candidate, .what = what, .config = *config,
                          .backend = {&megalodon_cpu, candidate->backend}};
        for (int side = 0; side < 2; side++) {
            MegalodonOptions options = {.max_batch = MOST, .max_length = config->chunk_size + 3, .training = true,
                                        .precision = side == OURS ? candidate->precision : MEGALODON_FP32};
            pairs[i].model[side] = model_create(pairs[i].backend[side], config, &options, 17 + (uint64_t)i);
        }
    }
    for (int i = 0; i < MODELS * NUM; i++) {
        const Pair *pair = &pairs[i % MODELS];
        const RecordedStep *step = &steps[i / MODELS];
        MegalodonAdamW adamw = {.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-2, .step = 1};
        MegalodonBatch batch = random_batch(config, step->B, config->chunk_size + step->T, 30 + (uint64_t)i);
        MegalodonLoss loss[2];
        batch.dropout = (step->what & DROP) != 0;
        if (step->what & NO_LOSS) batch.targets = NULL;
        for (int side = 0; side < 2; side++) {
            if (!(step->what & ADD)) pair->backend[side]->zero_gradients(pair->model[side]);
            must(pair->backend[side]->forward(pair->model[side], &batch, &loss[side]));
            if (step->scale != 0) must(pair->backend[side]->backward(pair->model[side], step->scale));
            if (step->what & UPDATE) must(pair->backend[side]->update(pair->model[side], &adamw, NULL));
        }
        check(fabs(loss[OURS].nll_sum - loss[REFERENCE].nll_sum) <= candidate->loss * (double)loss[REFERENCE].counted,
              "%s, %s, model %d, step %d: the loss is %.9g, expected %.9g", candidate->name, what, i % MODELS,
              i / MODELS, loss[OURS].nll_sum, loss[REFERENCE].nll_sum);
        if (step->scale != 0) check_kind(pair, MEGALODON_GRAD, &batch, 0, "gradients", NULL);
    }
    for (int i = 0; i < MODELS; i++) pair_destroy(&pairs[i]);
}

/* The same run twice gives the same bits. */
static void check_repeatable(const Candidate *candidate, const MegalodonConfig *config) {
    Pair pair = pair_create(candidate, "repeated", config, true, false);
    const MegalodonBackend *backend = pair.backend[OURS];
    MegalodonModel *model = pair.model[OURS];
    MegalodonTensor list[MODEL_MAX_TENSORS];
    double *before[MODEL_MAX_TENSORS];
    int count = megalodon_tensors(config, MEGALODON_GRAD, 1, 1, 0, list, MODEL_MAX_TENSORS), equal = 0;
    for (int run = 0; run < 2; run++) {
        MegalodonBatch batch = random_batch(config, MAX_B, MAX_T, 8);
        batch.dropout = true;
        backend->zero_gradients(model);
        must(backend->forward(model, &batch, NULL));
        must(backend->backward(model, 0.01));
        for (int i = 0; i < count; i++) {
            double *values = fetch_side(&pair, OURS, MEGALODON_GRAD, &list[i]);
            if (run == 0) {
                before[i] = values;
                continue;
            }
            equal += !memcmp(values, before[i], (size_t)list[i].size * sizeof *values);
            free(values);
            free(before[i]);
        }
    }
    check(equal == count, "%s: %d of %d gradients differ between two equal runs", candidate->name, count - equal,
          count);
    pair_destroy(&pair);
}

/* ---- training ---- */

enum { STEPS = 20 };

/* Steps [first, last) of a training run of four batches that come again and again, with dropout; their losses. */
static void train(const MegalodonBackend *backend, MegalodonModel *model, const MegalodonConfig *config, int first,
                  int last, double *losses) {
    for (int step = first; step < last; step++) {
        MegalodonBatch batch = random_batch(config, MAX_B, config->chunk_size * 2 + 3, 20 + (uint64_t)step % 4);
        MegalodonAdamW adamw = {.lr = 1e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = 1,
                                .step = step + 1};
        MegalodonLoss loss;
        double norm;
        batch.dropout = true;
        batch.step = (uint64_t)step;
        backend->zero_gradients(model);
        must(backend->forward(model, &batch, &loss));
        must(backend->backward(model, 1 / (double)loss.counted));
        must(backend->update(model, &adamw, &norm));
        losses[step] = loss.nll_sum / (double)loss.counted;
    }
}

/* The largest distance of the losses of steps [first, last); infinite if one is no number. */
static double largest_distance(const double *a, const double *b, int first, int last) {
    double largest = 0;
    for (int step = first; step < last; step++) {
        double distance = fabs(a[step] - b[step]);
        if (!(distance <= largest)) largest = isfinite(distance) ? distance : INFINITY;
    }
    return largest;
}

/* Removes the one step in a run's folder, and the folder. */
static void remove_run(const char *folder) {
    char path[SAFETENSORS_MAX_PATH];
    must(checkpoint_directory(folder, path));
    checkpoint_remove(path);
    must(checkpoint_join(path, folder, "latest"));
    unlink(path);
    rmdir(folder);
}

/* 20 steps side by side; then one side's checkpoint of step 8, loaded by the other, goes on to the same losses. */
static void check_training(const Candidate *candidate, const char *what, const MegalodonConfig *config) {
    enum { SAVED = 8 };
    static const SafetensorsPair no_facts[] = {{NULL, NULL}};
    double losses[2][STEPS], resumed[STEPS];
    Pair pair = pair_create(candidate, what, config, true, false);
    for (int side = 0; side < 2; side++) {
        char folder[] = "/tmp/test_backends_XXXXXX";
        Safetensors trainer;
        int other = 1 - side;
        train(pair.backend[side], pair.model[side], config, 0, SAVED, losses[side]);
        if (!mkdtemp(folder)) must("cannot create a folder in /tmp");
        must(checkpoint_write(folder, SAVED, 0, pair.backend[side], pair.model[side], config, no_facts, false));
        train(pair.backend[side], pair.model[side], config, SAVED, STEPS, losses[side]);

        MegalodonModel *fresh = create_side(&pair, other, true, 99);
        must(checkpoint_resume(folder, pair.backend[other], fresh, config, &trainer));
        safetensors_close(&trainer);
        train(pair.backend[other], fresh, config, SAVED, STEPS, resumed);
        pair.backend[other]->destroy(fresh);
        remove_run(folder);
        double distance = largest_distance(resumed, losses[side], SAVED, STEPS);
        check(distance <= candidate->loss, "%s, %s: resumed on %s from a checkpoint of %s, losses are off by %.2e",
              candidate->name, what, pair.backend[other]->name, pair.backend[side]->name, distance);
        printf("%-10s %-26s checkpoint of %s, %s goes on: losses differ by at most %.1e nats\n", candidate->name,
               what, pair.backend[side]->name, pair.backend[other]->name, distance);
    }
    double distance = largest_distance(losses[OURS], losses[REFERENCE], 0, STEPS);
    check(distance <= candidate->loss, "%s, %s: losses of %d steps are off by %.2e", candidate->name, what, STEPS,
          distance);
    check(losses[OURS][STEPS - 1] < losses[OURS][0] - 0.01, "%s, %s: the loss went from %.4f to %.4f", candidate->name,
          what, losses[OURS][0], losses[OURS][STEPS - 1]);
    printf("%-10s %-26s %d steps: losses differ by at most %.1e nats (from %.4f to %.4f)\n", candidate->name, what,
           STEPS, distance, losses[OURS][0], losses[OURS][STEPS - 1]);
    pair_destroy(&pair);
}

/* ---- state and logits ---- */

/* Logits of the last position of each row on both sides agree. Returns their distance. */
static double check_last_logits(const Pair *pair, MegalodonModel *const model[2], const char *when) {
    int B, n;
    pair->backend[OURS]->state_shape(model[OURS], &B, &n);
    int count = B * pair->config.vocab_size;
    double *values[2];
    for (int side = 0; side < 2; side++) {
        float *logits = must_allocate((size_t)count * sizeof *logits);
        values[side] = must_allocate((size_t)count * sizeof **values);
        for (int i = 0; i < count; i++) logits[i] = NAN;
        must(pair->backend[side]->last_logits(model[side], logits));
        for (int i = 0; i < count; i++) values[side][i] = logits[i];
        free(logits);
    }
    double error = relative_rms(values[OURS], values[REFERENCE], (size_t)count);
    check(error <= pair->candidate->forward, "%s, %s, %s: last logits are off by %.2e", pair->candidate->name,
          pair->what, when, error);
    free(values[REFERENCE]);
    free(values[OURS]);
    return error;
}

/* Inference, piece by piece. After `cut` tokens each side's state goes through a file into a fresh model of the other;
 * all four models then go on and must agree. */
static void check_state(const Candidate *candidate, const char *what, const MegalodonConfig *config, int cut) {
    Pair pair = pair_create(candidate, what, config, false, true);
    MegalodonModel *crossed[2];
    double worst = 0;
    MegalodonBatch batch = random_batch(config, MAX_B, cut, 11);
    for (int side = 0; side < 2; side++) must(pair.backend[side]->forward(pair.model[side], &batch, NULL));
    check_last_logits(&pair, pair.model, "first piece");
    for (int side = 0; side < 2; side++) {
        char path[] = "/tmp/test_backends_XXXXXX";
        int file = mkstemp(path), other = 1 - side;
        if (file < 0) must("cannot create a temporary file");
        close(file);
        crossed[other] = create_side(&pair, other, false, 17);
        must(checkpoint_state_save(path, pair.backend[side], pair.model[side], config));
        must(checkpoint_state_load(path, pair.backend[other], crossed[other], config));
        unlink(path);
    }
    static const int pieces[] = {1, 1, 5, 20, 1};
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        batch = random_batch(config, MAX_B, pieces[i], 30 + i);
        batch.targets = NULL;
        batch.carry = true;
        for (int side = 0; side < 2; side++) {
            must(pair.backend[side]->forward(pair.model[side], &batch, NULL));
            must(pair.backend[side]->forward(crossed[side], &batch, NULL));
        }
        MegalodonModel *const from_reference[2] = {pair.model[REFERENCE], crossed[OURS]};
        MegalodonModel *const from_ours[2] = {crossed[REFERENCE], pair.model[OURS]};
        worst = fmax(worst, check_last_logits(&pair, pair.model, "each from its own state"));
        worst = fmax(worst, check_last_logits(&pair, from_reference, "from the reference's state"));
        worst = fmax(worst, check_last_logits(&pair, from_ours, "from the candidate's state"));
    }
    printf("%-10s %-26s states cross after %d tokens: last logits differ by at most %.1e\n", candidate->name, what,
           cut, worst);
    /* To the end of the chunk; then the last row starts anew. */
    int position = cut, C = config->chunk_size;
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) position += pieces[i];
    const bool last_row[MAX_B] = {[MAX_B - 1] = true};
    for (int again = 0; again < 2; again++) {
        batch = random_batch(config, MAX_B, again ? 3 : C - position % C, 50 + (uint64_t)again);
        batch.targets = NULL;
        batch.carry = true;
        for (int side = 0; side < 2; side++) {
            if (again) must(pair.backend[side]->reset_rows(pair.model[side], last_row));
            must(pair.backend[side]->forward(pair.model[side], &batch, NULL));
        }
        check_last_logits(&pair, pair.model, again ? "after a row started anew" : "at the end of a chunk");
    }
    for (int side = 0; side < 2; side++) pair.backend[side]->destroy(crossed[side]);
    pair_destroy(&pair);
}

/* ---- generation: one token at a time, which backends make in ways of their own ---- */

/* The same token everywhere. The array lives until the next call. */
static MegalodonBatch repeated_batch(const MegalodonConfig *config, int B, int T, int seed) {
    static int32_t tokens[MAX_B * MAX_T];
    for (int i = 0; i < B * T; i++) tokens[i] = seed % config->vocab_size;
    return (MegalodonBatch){.tokens = tokens, .B = B, .T = T};
}

/* Weights for a generation in which nothing goes unseen, the same on both sides in every precision: those that begin as
 * zeros, but for CEMA's, become others, and the feed-forward parts, which begin small beside what they are added to, as
 * large as it. gamma: the mean of what queries and keys are multiplied by, less 1; with a large one each token sees
 * little but itself. */
static void set_weights(const Pair *pair, float gamma) {
    MegalodonTensor list[MODEL_MAX_TENSORS];
    int count = megalodon_tensors(&pair->config, MEGALODON_PARAM, 1, 1, 0, list, MODEL_MAX_TENSORS);
    for (int i = 0; i < count; i++) {
        const char *name = list[i].name;
        bool gammas = strstr(name, "mega.gamma"), feeds = strstr(name, "nffn.fc");
        bool zero = gammas || strstr(name, "norm.") || strstr(name, "mega.beta") || strstr(name, ".bias");
        bool scale = strcmp(name + strlen(name) - 5, "alpha") == 0 && strstr(name, "nffn");
        if (!zero && !feeds && !scale) continue;
        float *values = must_allocate((size_t)list[i].size * sizeof *values);
        megalodon_initial_values(&pair->config, &list[i], 700, values);
        for (int64_t j = 0; j < list[i].size; j++) {
            float other = (float)((int)(megalodon_random(700 + (uint64_t)i, (uint64_t)j) % 129) - 64) / 128;
            values[j] = zero ? other + (gammas ? gamma : 0) : feeds ? 3 * values[j] : 1 + other;
        }
        for (int side = 0; side < 2; side++)
            must(pair->backend[side]->set(pair->model[side], MEGALODON_PARAM, name, values, MEGALODON_F32));
        free(values);
    }
}

/* `steps` tokens one by one after a prompt, the last one with a loss, which is another way than that of generation;
 * each one's logits, asked for again, must be the same bits. Then the state, and (in the short form only after a prompt
 * of one token) the same again from an empty state, which must give the same bits. Of a long prompt each piece repeats
 * one of two tokens: if keys are left out, the mean of the values is another one. */
static void check_sharp_generation(const Candidate *candidate, const char *what, const MegalodonConfig *config, int B,
                                   int prompt, int steps, float gamma) {
    Pair pair = pair_create(candidate, what, config, false, true);
    set_weights(&pair, gamma);
    int runs = brief && prompt > 1 ? 1 : 2, V = config->vocab_size, most = MAX_T / B;
    int pieces = (prompt + most - 1) / most;
    float *logits[2];
    double worst = 0;
    for (int run = 0; run < 2; run++) logits[run] = must_allocate((size_t)(B * V) * sizeof **logits);
    for (int run = 0; run < runs; run++) {
        for (int i = 0; i < pieces + steps; i++) {
            int read = prompt - i * most < most ? prompt - i * most : most;
            MegalodonBatch batch = i < pieces && pieces > 1
                                       ? repeated_batch(config, B, read, 50 + i % 2)
                                       : random_batch(config, B, i < pieces ? read : 1, 50 + (uint64_t)i);
            if (i + 1 < pieces + steps) batch.targets = NULL;
            batch.carry = i > 0;
            for (int side = run ? OURS : REFERENCE; side < 2; side++)
                must(pair.backend[side]->forward(pair.model[side], &batch, NULL));
            if (run == 0) worst = fmax(worst, check_last_logits(&pair, pair.model, "token by token"));
            if (run == 1 || i < pieces) continue; /* in the second run nobody asks for a step's logits */
            for (int again = 0; again < 2; again++)
                must(pair.backend[OURS]->last_logits(pair.model[OURS], logits[again]));
            check(memcmp(logits[0], logits[1], (size_t)(B * V) * sizeof **logits) == 0,
                  "%s, %s, B=%d: the same logits, asked for again, are others", candidate->name, what, B);
        }
        must(pair.backend[OURS]->last_logits(pair.model[OURS], logits[run]));
        MegalodonBatch last = random_batch(config, B, 1, 50);
        last.carry = true;
        if (run == 0)
            check_kind(&pair, MEGALODON_STATE, &last, (prompt + steps) % config->chunk_size, "state", NULL);
    }
    check(runs == 1 || memcmp(logits[0], logits[1], (size_t)(B * V) * sizeof **logits) == 0,
          "%s, %s, B=%d: the same tokens again gave other logits", candidate->name, what, B);
    printf("%-10s %-26s %d tokens one by one, %d rows: last logits differ by at most %.1e\n", candidate->name, what,
           steps, B, worst);
    for (int run = 0; run < 2; run++) free(logits[run]);
    pair_destroy(&pair);
}

static void check_generation(const Candidate *candidate, const char *what, const MegalodonConfig *config, int B,
                             int prompt, int steps) {
    check_sharp_generation(candidate, what, config, B, prompt, steps, 0);
}

/* Sizes at which a GPU changes its ways of making a token: each number of rows, from the first token on; heads as
 * wide as a cluster of blocks takes them, and wider, with a group and states that take several turns; groups whose
 * size is no power of two; layers too wide for the states to be made beside a product; so few values that blocks
 * which share out m Wh1^T with them have 16 numbers each, and as many channels as such a block has room for; so many
 * keys that a block takes them in two turns, one for each piece of 64, or in three; the end of such a chunk; a new key
 * that counts among so many. */
static void check_ways(const Candidate *candidate, const MegalodonConfig *tiled) {
    MegalodonConfig head = *tiled, groups = *tiled, wide = *tiled, longer = *tiled, full = *tiled;
    int around = tiled->chunk_size + 3;
    for (int B = 1; B <= MAX_GENERATED; B++) check_generation(candidate, "tiles, from nothing", tiled, B, 1, 4);
    head.num_heads = 1, head.z_dim = 256, head.value_dim = 288, head.norm_num_groups = 1, head.cema_ndim = 20;
    for (int B = 1; B < MAX_B; B++) check_generation(candidate, "a head of 256", &head, B, 1, around);
    head.z_dim = head.value_dim = 264;
    check_generation(candidate, "a head of 264", &head, 1, 1, around);
    groups.model_dim = 96, groups.norm_num_groups = 4, groups.norm_affine = true;
    check_generation(candidate, "groups of 24", &groups, 1, 1, 4);
    wide.model_dim = 1440, wide.norm_num_groups = 15;
    check_generation(candidate, "wide layers", &wide, 1, 1, 3);
    full.num_heads = 1, full.model_dim = 160, full.norm_num_groups = 5, full.value_dim = 256;
    check_generation(candidate, "a full share of h1", &full, 1, 1, 4);
    full.num_heads = 2, full.model_dim = 1024, full.norm_num_groups = 32, full.z_dim = 512, full.value_dim = 1024;
    check_generation(candidate, "as many channels as lanes", &full, 1, 1, 4);
    longer.num_layers = 2, longer.chunk_size = 2200;
    check_generation(candidate, "long chunk, two turns", &longer, 1, 2038, 4);
    check_generation(candidate, "long chunk, to its end", &longer, 1, 2197, 5);
    check_sharp_generation(candidate, "long chunk, the last key", &longer, 1, 2038, 4, 3); /* seen among so many */
}

/* ---- reading: calls of one length, which a backend may record and repeat ---- */

/* Calls of a chunk, of less than a chunk, of a token, of a chunk again from another place, and of so many tokens that
 * several blocks of a GPU share the state that they move on; with a loss now and then. */
static void check_reading(const Candidate *candidate, const char *what, const MegalodonConfig *config) {
    Pair pair = pair_create(candidate, what, config, false, true);
    int C = config->chunk_size, lengths[] = {C, C, C, C, 3, 3, C, C, C, 1, 1, 1, C, C, C, 64, 64}, B = 2;
    double worst = 0;
    for (int i = 0; i < (int)(sizeof lengths / sizeof *lengths); i++) {
        MegalodonBatch batch = random_batch(config, B, lengths[i], 70 + (uint64_t)i);
        MegalodonLoss loss[2];
        if (i % 4 != 3 && i < 11) batch.targets = NULL;
        batch.carry = i > 0;
        for (int side = 0; side < 2; side++)
            must(pair.backend[side]->forward(pair.model[side], &batch, &loss[side]));
        worst = fmax(worst, check_last_logits(&pair, pair.model, "call by call"));
        double want = loss[REFERENCE].nll_sum;
        check(fabs(loss[OURS].nll_sum - want) <= candidate->forward * want,
              "%s, %s, call %d of %d tokens: the loss is %.9g, expected %.9g", candidate->name, what, i, lengths[i],
              loss[OURS].nll_sum, want);
        int rows, n;
        pair.backend[REFERENCE]->state_shape(pair.model[REFERENCE], &rows, &n);
        check_kind(&pair, MEGALODON_STATE, &batch, n, "state", NULL);
    }
    printf("%-10s %-26s call by call: last logits differ by at most %.1e\n", candidate->name, what, worst);
    pair_destroy(&pair);
}

/* A backend moves a state on in place, and the blocks of a GPU that share a row read it while another one waits to
 * write it: calls of 32 pieces of 32 tokens each, twice, must give the same bits. */
static void check_same_reading(const Candidate *candidate, const MegalodonConfig *config) {
    enum { ROWS = 2, LENGTH = 1024 };
    int calls = brief || candidate == &candidates[STAND_IN] ? 2 : 40, V = config->vocab_size, different = 0;
    size_t size = (size_t)(ROWS * V);
    int32_t *tokens = must_allocate(ROWS * LENGTH * sizeof *tokens);
    float *logits = must_allocate((size_t)calls * size * sizeof *logits), *again = must_allocate(size * sizeof *again);
    MegalodonOptions options = {.max_batch = ROWS, .max_length = LENGTH, .carry = true,
                                .precision = candidate->precision};
    MegalodonModel *model = model_create(candidate->backend, config, &options, 17);
    random_tokens(tokens, ROWS * LENGTH, V, 90);
    for (int run = 0; run < 2; run++)
        for (int i = 0; i < calls; i++) {
            MegalodonBatch batch = {.tokens = tokens, .B = ROWS, .T = LENGTH, .carry = i > 0};
            float *own = run ? again : logits + (size_t)i * size;
            must(candidate->backend->forward(model, &batch, NULL));
            must(candidate->backend->last_logits(model, own));
            different += memcmp(own, logits + (size_t)i * size, size * sizeof *own) != 0;
        }
    check(different == 0, "%s: %d of %d calls of %d tokens gave other logits the second time", candidate->name,
          different, calls, LENGTH);
    candidate->backend->destroy(model);
    free(again);
    free(logits);
    free(tokens);
}

/* ---- the program ---- */

/* Sizes that large models have: whole tiles of the matrix units. */
static MegalodonConfig tiled_config(void) {
    MegalodonConfig config = small_config();
    config.model_dim = 64;
    config.z_dim = 32;
    config.value_dim = 96;
    config.ffn_hidden_dim = 160;
    config.cema_ndim = 16;
    config.vocab_size = 51;
    return config;
}

/* Sizes that no block of a kernel divides. */
static MegalodonConfig odd_config(void) {
    MegalodonConfig config = small_config();
    config.model_dim = 45;
    config.num_heads = 3;
    config.z_dim = 18;
    config.value_dim = 51;
    config.ffn_hidden_dim = 37;
    config.cema_ndim = 5;
    config.chunk_size = 13;
    config.norm_num_groups = 5;
    config.vocab_size = 101;
    return config;
}

/* Layers with so many outputs, and a sum so long, that a GPU takes them in ways of its own; `odd`: sizes that no block
 * divides. */
static MegalodonConfig many_outputs_config(bool odd) {
    MegalodonConfig config = small_config();
    config.num_layers = 1;
    config.swiglu = false;
    config.num_heads = 1;
    config.model_dim = odd ? 15 : 16;
    config.norm_num_groups = odd ? 5 : 4;
    config.z_dim = odd ? 6 : 16;
    config.value_dim = odd ? 33 : 32;
    config.ffn_hidden_dim = odd ? 8449 : 8456;
    config.vocab_size = odd ? 4225 : 4232;
    return config;
}

/* Whole passes, with and without a state, then parts of a training step. */
static void check_steps(const Candidate *candidate, const char *only) {
    MegalodonConfig plain = small_config(), full = plain, bare = plain, dropout = plain, odd = odd_config();
    plain.swiglu = false;
    full.rescale_nffn = full.share_emb = full.scale_emb = true;
    bare.norm_affine = bare.swiglu = false;
    bare.num_heads = 1;
    MegalodonConfig tiled = tiled_config();
    tiled.vocab_size = 56;
    tiled.dropout = tiled.hidden_dropout = tiled.attention_dropout = 0.25;
    odd.dropout = odd.hidden_dropout = odd.attention_dropout = 0.25;
    MegalodonConfig odd_and_even = odd; // gradients side by side: pairs of the last ones begin at odd places
    odd_and_even.value_dim = 54;
    dropout.dropout = dropout.hidden_dropout = dropout.attention_dropout = 0.25;
    dropout.rescale_nffn = true;
    if (test_among(only, "shapes")) {
        if (!brief) check_shapes(candidate, "plain", &plain, false, true);
        check_shapes(candidate, "swiglu, rescale, tied", &full, false, true);
        if (!brief) check_shapes(candidate, "no affine, one head", &bare, false, true);
        if (!brief) check_shapes(candidate, "dropout", &dropout, true, true);
        if (!brief) check_shapes(candidate, "odd sizes", &odd, false, true);
        check_shapes(candidate, "dropout, recomputed", &dropout, true, false);
        check_shapes(candidate, "odd sizes, recomputed", &odd, true, false);
        check_shapes(candidate, "odd and even sizes", &odd_and_even, true, false);
        check_shapes(candidate, "tiles, dropout", &tiled, true, false);
    }
    if (test_among(only, "wide")) {
        if (!brief) check_wide(candidate, "wide", plain, false, 0);
        check_wide(candidate, "wide, swiglu", plain, true, 0);
        check_wide(candidate, "wide, also the model", plain, false, 256);
        check_chunks(candidate, "chunks", plain, false);
        check_chunks(candidate, "chunks, dropout", dropout, true);
        if (!brief && candidate != &candidates[STAND_IN]) check_many_tiles(candidate, plain);
        check_long_rows(candidate, plain);
    }
    if (test_among(only, "dropout")) check_masks(candidate, &dropout);
    if (test_among(only, "update")) {
        check_accumulation(candidate, &full);
        MegalodonConfig wide = wide_config(dropout);
        check_recorded(candidate, "recorded", &dropout);
        check_recorded(candidate, "recorded, wide", &wide);
        check_repeatable(candidate, &dropout);
    }
    if (!test_among(only, "training") || (brief && !only)) return;
    check_training(candidate, "plain", &plain);
    check_training(candidate, "dropout", &dropout);
    check_training(candidate, "swiglu, rescale, tied", &full);
}

/* Inference: states that cross, calls of many lengths, one token at a time. */
static void check_inference(const Candidate *candidate, const char *only) {
    MegalodonConfig full = small_config(), bare = full, odd = odd_config(), tiled = tiled_config(), tiled_full = tiled;
    full.rescale_nffn = full.share_emb = full.scale_emb = true;
    bare.norm_affine = bare.swiglu = false;
    bare.num_heads = 1;
    tiled.swiglu = tiled.norm_affine = false;
    tiled_full.rescale_nffn = tiled_full.share_emb = tiled_full.scale_emb = true;
    if (test_among(only, "state")) {
        check_state(candidate, "swiglu, rescale, tied", &full, 5);
        check_state(candidate, "odd sizes", &odd, 2 * odd.chunk_size);
        if (!brief) check_state(candidate, "no affine, one head", &bare, bare.chunk_size - 1);
        if (!brief) check_state(candidate, "tiles", &tiled, 5);
    }
    if (test_among(only, "reading")) {
        check_reading(candidate, "tiles, swiglu, tied", &tiled_full);
        check_reading(candidate, "odd sizes", &odd);
        check_same_reading(candidate, &full);
    }
    if (!test_among(only, "generation")) return;
    if (candidate->precision == MEGALODON_BF16_MIXED && !brief) {
        /* a layer as wide as those of large models; a second of a processor's time, so only here */
        MegalodonConfig large = tiled;
        large.num_layers = 1;
        large.model_dim = 1024;
        large.value_dim = 4096;
        large.ffn_hidden_dim = 12288;
        for (int B = 1; B <= MAX_B; B += 2) check_generation(candidate, "large", &large, B, 3, 19);
        MegalodonConfig deep = large; /* fewer outputs, each the sum of many numbers */
        deep.model_dim = 1600;
        deep.ffn_hidden_dim = 256;
        check_generation(candidate, "large, long sums", &deep, 1, 3, 3);
    }
    MegalodonConfig many = many_outputs_config(false), many_odd = many_outputs_config(true);
    check_ways(candidate, &tiled);
    for (int B = 1; B <= MAX_GENERATED; B += 7) {
        check_generation(candidate, "many outputs", &many, B, 3, 3);
        check_generation(candidate, "many outputs, odd sizes", &many_odd, B, 3, 3);
    }
    for (int B = 1; B <= MAX_B; B += 2) {
        int around = brief ? 3 : 3 + tiled.chunk_size; /* two chunks and a little, or one */
        check_generation(candidate, "tiles", &tiled, B, 3, tiled.chunk_size + around);
        check_generation(candidate, "tiles, swiglu, tied", &tiled_full, B, 3, tiled.chunk_size + around);
        check_generation(candidate, "odd sizes", &odd, B, 3, odd.chunk_size * (brief ? 1 : 2) + 3);
    }
}

static const char *const parts[] = {"shapes",   "wide",  "dropout", "update",
                                    "training", "state", "reading", "generation"};
enum { NUM_PARTS = sizeof parts / sizeof *parts };

static void usage(void) {
    fprintf(stderr, "usage: test_backends [--short] [--backend NAME] [--only PART,...]\n  NAME:");
    for (int i = 0; i < NUM_CANDIDATES; i++) fprintf(stderr, " %s", candidates[i].name);
    fprintf(stderr, "\n  PART:");
    for (int i = 0; i < NUM_PARTS; i++) fprintf(stderr, " %s", parts[i]);
    fprintf(stderr, "\n");
    exit(1);
}

int main(int argc, char **argv) {
    TestChoice choice;
    if (!test_choose(&choice, argc, argv)) usage();
    const char *backend = choice.backends, *only = choice.parts;
    bool known = !backend, any = false;
    brief = choice.brief;
    for (int i = 0; i < NUM_CANDIDATES; i++) known = known || !strcmp(backend, candidates[i].name);
    for (int i = 0; i < NUM_PARTS; i++) any = any || test_among(only, parts[i]);
    if (!known || !any) usage();
    test_begin("backends");
    any = false;
    for (int i = 0; i < NUM_CANDIDATES; i++) {
        const Candidate *candidate = &candidates[i];
        if (backend ? strcmp(backend, candidate->name) != 0 : i == STAND_IN && any) continue;
        const char *why = candidate->backend ? candidate->backend->unavailable()
                                             : "this program was built without that backend";
        char text[512];
        snprintf(text, sizeof text, "%s: %s", candidate->name, why ? why : "");
        if (why) {
            test_skip(text);
        } else {
            check_steps(candidate, only);
            check_inference(candidate, only);
        }
        any = any || !why;
    }
    return test_end();
}
