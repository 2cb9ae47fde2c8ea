/* test_state.c - the state is whole: it does not matter how a sequence is cut into calls.
 *
 * Any split gives the logits of one pass (in double to 1e-12; the order of some sums differs, nothing else), token by
 * token too. In training the gradient flows back through the state: cut in two, with the first part run again, it gives
 * the gradients of one pass. A state that was written to a file and read back continues bit for bit.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "../lib/checkpoint.h"
#include "model.h"
#include "test.h"

#include <unistd.h>

enum { B = 2, T = 61, MAX_PARTS = 64 };

static const MegalodonBackend *const wide = &megalodon_cpu_double;

/* A model with its batch of B,T random tokens. */
typedef struct Setup {
    const MegalodonBackend *backend;
    MegalodonConfig config;
    MegalodonModel *model;
    int32_t tokens[B * T], targets[B * T];
} Setup;

static void setup_create(Setup *s, const MegalodonBackend *backend, const MegalodonConfig *config, bool training) {
    *s = (Setup){.backend = backend, .config = *config};
    MegalodonOptions options = {.max_batch = B, .max_length = T, .training = training, .keep_activations = true,
                                .carry = true, .state_gradients = training};
    s->model = model_create(backend, config, &options, 17);
    random_tokens(s->tokens, B * T, config->vocab_size, 1);
    random_tokens(s->targets, B * T, config->vocab_size, 2);
}

/* Tokens [first, first + length) of every row, as a batch of their own. The arrays live until the next call. */
static MegalodonBatch slice(const Setup *s, int first, int length) {
    static int32_t tokens[B * T], targets[B * T];
    for (int b = 0; b < B; b++) {
        memcpy(tokens + b * length, s->tokens + b * T + first, (size_t)length * sizeof *tokens);
        memcpy(targets + b * length, s->targets + b * T + first, (size_t)length * sizeof *targets);
    }
    return (MegalodonBatch){.tokens = tokens, .targets = targets, .B = B, .T = length, .carry = first > 0};
}

/* Logits (B,T,V) of the sequence in parts; the last part is repeated until the sequence ends. */
static double *run_parts(Setup *s, const int *parts, int num_parts) {
    int V = s->config.vocab_size;
    double *logits = must_allocate((size_t)B * T * (size_t)V * sizeof *logits);
    for (int first = 0, i = 0; first < T; i++) {
        int length = parts[i < num_parts ? i : num_parts - 1];
        if (first + length > T) length = T - first;
        MegalodonBatch batch = slice(s, first, length);
        MegalodonLoss loss;
        must(s->backend->forward(s->model, &batch, &loss));
        int64_t size;
        double *part = fetch(s->backend, s->model, &s->config, &batch, MEGALODON_ACT, "logits", &size);
        for (int b = 0; b < B; b++)
            memcpy(logits + ((size_t)b * T + (size_t)first) * (size_t)V, part + (size_t)b * (size_t)(length * V),
                   (size_t)(length * V) * sizeof *part);
        free(part);
        first += length;
    }
    return logits;
}

/* ---- splits ---- */

static void check_splits(const char *name, const MegalodonConfig *config, bool training) {
    int C = config->chunk_size;
    const struct { int parts[8], count; } splits[] = {
        {{1}, 1}, {{C - 1}, 1}, {{C}, 1}, {{C + 1}, 1}, {{2, 3, 5, 7, 11, 13, 17, 3}, 8}, {{37, 24}, 2},
        {{T - 1, 1}, 2}, {{1, T - 1}, 2}, {{C - 1, 2, C - 1, 1}, 4}, {{2 * C, 1}, 2},
    };
    for (int precision = 0; precision < 2; precision++) {
        Setup s;
        setup_create(&s, precision ? wide : &megalodon_cpu, config, training);
        double *whole = run_parts(&s, (int[]){T}, 1), worst = 0;
        double tolerance = precision ? 1e-12 : 1e-5;
        for (size_t i = 0; i < sizeof splits / sizeof *splits; i++) {
            double *logits = run_parts(&s, splits[i].parts, splits[i].count);
            double error = relative_rms(logits, whole, (size_t)B * T * (size_t)config->vocab_size);
            check(error <= tolerance, "%s, %s, parts of %d,%d...: logits are off by %.2e", s.backend->name, name,
                  splits[i].parts[0], splits[i].parts[1], error);
            worst = fmax(worst, error);
            free(logits);
        }
        printf("%-10s %-24s %s: splits differ from one pass by %.1e\n", s.backend->name, name,
               training ? "training " : "inference", worst);
        free(whole);
        s.backend->destroy(s.model);
    }
}

/* A model for inference computes the same bits as one for training, with or without kept activations. */
static void check_inference(const MegalodonConfig *config) {
    const MegalodonBackend *backends[] = {&megalodon_cpu, wide};
    for (int i = 0; i < 2; i++) {
        Setup training, inference;
        setup_create(&training, backends[i], config, true);
        setup_create(&inference, backends[i], config, false);
        size_t size = (size_t)B * T * (size_t)config->vocab_size;
        for (int length = 5; length <= T; length += 28) {
            double *a = run_parts(&training, &length, 1), *b = run_parts(&inference, &length, 1);
            check(!memcmp(a, b, size * sizeof *a), "%s: inference and training differ, parts of %d", backends[i]->name,
                  length);
            free(a);
            free(b);
        }
        /* last_logits are the logits of the last position. */
        MegalodonBatch batch = slice(&inference, 0, 11);
        MegalodonLoss loss;
        int V = config->vocab_size, equal = 0;
        int64_t count;
        float *last = must_allocate((size_t)(B * V) * sizeof *last);
        must(backends[i]->forward(inference.model, &batch, &loss));
        must(backends[i]->last_logits(inference.model, last));
        double *logits = fetch(backends[i], inference.model, config, &batch, MEGALODON_ACT, "logits", &count);
        for (int b = 0; b < B; b++)
            for (int v = 0; v < V; v++) equal += fabs(last[b * V + v] - logits[(b * 11 + 10) * V + v]) < 1e-5;
        check(equal == B * V, "%s: last_logits are not those of the last position", backends[i]->name);
        free(last);
        free(logits);
        backends[i]->destroy(training.model);
        backends[i]->destroy(inference.model);
    }
}

/* ---- gradients through the state ---- */

/* All tensors of a kind, one after the other, in one array. */
typedef struct Tensors {
    MegalodonTensor list[MODEL_MAX_TENSORS];
    double *values[MODEL_MAX_TENSORS];
    int count;
} Tensors;

static void tensors_fetch(Tensors *t, Setup *s, MegalodonKind kind, int n) {
    t->count = megalodon_tensors(&s->config, kind, B, T, n, t->list, MODEL_MAX_TENSORS);
    for (int i = 0; i < t->count; i++) {
        t->values[i] = must_allocate((size_t)t->list[i].size * sizeof(double));
        if (!strcmp(t->list[i].name, "count")) continue;
        must(s->backend->get(s->model, kind, t->list[i].name, t->values[i], MEGALODON_F64));
    }
}

static void tensors_set(const Tensors *t, Setup *s, MegalodonKind kind) {
    for (int i = 0; i < t->count; i++)
        if (strcmp(t->list[i].name, "count") != 0)
            must(s->backend->set(s->model, kind, t->list[i].name, t->values[i], MEGALODON_F64));
}

static void tensors_free(Tensors *t) {
    for (int i = 0; i < t->count; i++) free(t->values[i]);
    t->count = 0;
}

static void forward_part(Setup *s, int first, int length) {
    MegalodonBatch batch = slice(s, first, length);
    MegalodonLoss loss;
    must(s->backend->forward(s->model, &batch, &loss));
}

/* Gradients of the whole sequence, computed part by part from the end: each part is run again from the state that it
 * had (kept in memory), takes the gradient of the state that it gave to its successor, and yields that of its own. */
static void gradients_by_parts(Setup *s, const int *starts, int num_parts, Tensors *gradients) {
    static Tensors states[MAX_PARTS], after;
    int C = s->config.chunk_size;
    after.count = 0;
    s->backend->zero_gradients(s->model);
    for (int i = 0; i + 1 < num_parts; i++) {
        forward_part(s, starts[i], starts[i + 1] - starts[i]);
        tensors_fetch(&states[i + 1], s, MEGALODON_STATE, starts[i + 1] % C);
    }
    for (int i = num_parts - 1; i >= 0; i--) {
        int64_t count[B];
        for (int b = 0; b < B; b++) count[b] = starts[i];
        if (i > 0) {
            must(s->backend->start_state(s->model, B, count));
            tensors_set(&states[i], s, MEGALODON_STATE);
        }
        forward_part(s, starts[i], starts[i + 1] - starts[i]);
        if (after.count) tensors_set(&after, s, MEGALODON_GRAD_STATE_OUT);
        must(s->backend->backward(s->model, 1. / (B * T)));
        tensors_free(&after);
        if (i == 0) break;
        tensors_fetch(&after, s, MEGALODON_GRAD_STATE_IN, starts[i] % C);
        tensors_free(&states[i]);
    }
    tensors_fetch(gradients, s, MEGALODON_GRAD, 0);
}

static void check_carried_gradients(const char *name, const MegalodonConfig *config) {
    static const int cuts[][6] = {{0, 31, T}, {0, 32, T}, {0, 1, T}, {0, T - 1, T}, {0, 5, 13, 40, 41, T}};
    static const int counts[] = {2, 2, 2, 2, 5};
    Setup s;
    static Tensors whole, parts;
    setup_create(&s, wide, config, true);
    s.backend->zero_gradients(s.model);
    forward_part(&s, 0, T);
    must(s.backend->backward(s.model, 1. / (B * T)));
    tensors_fetch(&whole, &s, MEGALODON_GRAD, 0);
    double worst = 0;
    for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
        gradients_by_parts(&s, cuts[c], counts[c], &parts);
        for (int i = 0; i < whole.count; i++) {
            double error = relative_rms(parts.values[i], whole.values[i], (size_t)whole.list[i].size);
            check(error <= 1e-11, "%s, cut %zu: gradient of %s is off by %.2e", name, c, whole.list[i].name, error);
            worst = fmax(worst, error);
        }
        tensors_free(&parts);
    }
    printf("%-10s %-24s gradients through the state differ from one pass by %.1e\n", s.backend->name, name, worst);
    tensors_free(&whole);
    s.backend->destroy(s.model);
}

/* ---- files ---- */

/* Interrupted after `cut` tokens: the state goes to a file and into a fresh model, which continues bit for bit. */
static void check_saved_state(const MegalodonConfig *config, int cut, const char *path) {
    Setup straight, resumed;
    setup_create(&straight, &megalodon_cpu, config, false);
    setup_create(&resumed, &megalodon_cpu, config, false);
    forward_part(&straight, 0, cut);
    must(checkpoint_state_save(path, &megalodon_cpu, straight.model, config));
    must(checkpoint_state_load(path, &megalodon_cpu, resumed.model, config));
    int rows, n;
    megalodon_cpu.state_shape(resumed.model, &rows, &n);
    check(rows == B && n == cut % config->chunk_size, "a loaded state has %d rows at place %d", rows, n);
    float *a = must_allocate((size_t)(B * config->vocab_size) * sizeof *a);
    float *b = must_allocate((size_t)(B * config->vocab_size) * sizeof *b);
    int same = 0, pieces = 0;
    for (int first = cut; first < T; first += 7, pieces++) {
        int length = first + 7 <= T ? 7 : T - first;
        forward_part(&straight, first, length);
        forward_part(&resumed, first, length);
        must(megalodon_cpu.last_logits(straight.model, a));
        must(megalodon_cpu.last_logits(resumed.model, b));
        same += !memcmp(a, b, (size_t)(B * config->vocab_size) * sizeof *a);
    }
    check(same == pieces, "after %d tokens, a saved and loaded state gives other logits", cut);
    free(a);
    free(b);
    unlink(path);
    megalodon_cpu.destroy(straight.model);
    megalodon_cpu.destroy(resumed.model);
}

/* Rows that have read different numbers of tokens, at the same place in their chunk, and rows that are not. */
static void check_uneven_rows(const MegalodonConfig *config) {
    Setup s;
    setup_create(&s, wide, config, false);
    int C = config->chunk_size;
    int64_t uneven[B] = {3, 3 + 2 * C}, count[B] = {0}, impossible[B] = {3, 4}, negative[B] = {-1, -1};
    check(s.backend->start_state(s.model, B, impossible) != NULL, "rows at different places in their chunk pass");
    check(s.backend->start_state(s.model, B, negative) != NULL, "a negative count passes");
    must(s.backend->start_state(s.model, B, uneven));
    forward_part(&s, 3, 9);
    must(s.backend->get(s.model, MEGALODON_STATE, "count", count, MEGALODON_I64));
    check(count[0] == 12 && count[1] == 12 + 2 * C, "counts after 9 tokens: %lld and %lld", (long long)count[0],
          (long long)count[1]);
    const bool second[B] = {false, true};
    check(s.backend->reset_rows(s.model, second) != NULL, "a row starts anew inside a chunk");
    forward_part(&s, 12, 2 * C - 12);
    must(s.backend->reset_rows(s.model, second));
    must(s.backend->get(s.model, MEGALODON_STATE, "count", count, MEGALODON_I64));
    check(count[0] == 2 * C && count[1] == 0, "counts after a row started anew: %lld and %lld", (long long)count[0],
          (long long)count[1]);
    s.backend->destroy(s.model);
}

int main(void) {
    test_begin("state");
    MegalodonConfig plain = small_config(), other = plain, ones = plain;
    other.chunk_size = 7;
    other.num_heads = 3;
    other.norm_affine = false;
    other.rescale_nffn = other.scale_emb = other.share_emb = true;
    ones.chunk_size = 2;
    ones.cema_ndim = 1;
    ones.swiglu = false;
    check_splits("plain", &plain, true);
    check_splits("plain", &plain, false);
    check_splits("tied, no affine", &other, false);
    check_splits("chunks of two", &ones, false);
    check_inference(&plain);
    check_carried_gradients("plain", &plain);
    check_carried_gradients("tied, no affine", &other);
    check_carried_gradients("chunks of two", &ones);
    char path[] = "/tmp/test_state_XXXXXX";
    int file = mkstemp(path);
    if (file < 0) must("cannot create a temporary file");
    close(file);
    const int cuts[] = {1, 7, 8, 9, 30, 32};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) check_saved_state(&plain, cuts[i], path);
    check_uneven_rows(&plain);
    return test_end();
}
