/* bench_model.h - whole models: a training step, generation token by token, reading a stream.
 *
 * FLOP of a model are those of its matrix products, a multiplication and an addition each: every linear
 * layer, the output layer, and in attention only the keys that a query sees. The backward counts twice the
 * forward; what a backend computes again is not counted.
 */
#ifndef DEV_BENCH_MODEL_H
#define DEV_BENCH_MODEL_H

#include "../lib/sampler.h"
#include "bench.h"
#include "bench_ceilings.h"

/* Query and key pairs of T tokens from the start of a chunk: a query sees its chunk up to itself. */
static double attention_pairs(const MegalodonConfig *c, int64_t T) {
    double C = c->chunk_size, rest_tokens = (double)(T % c->chunk_size);
    return (double)(T / c->chunk_size) * C * (C + 1) / 2 + rest_tokens * (rest_tokens + 1) / 2;
}

/* FLOP of a forward over B rows of T tokens, with the output layer for `logit_rows` tokens in all. */
static double forward_flops(const MegalodonConfig *c, int64_t B, int64_t T, int64_t logit_rows) {
    double D = c->model_dim, Z = c->z_dim, E = c->value_dim, F = c->ffn_hidden_dim;
    double weights = D * Z + 3 * D * E + D * D + (c->swiglu ? 3 : 2) * D * F;
    double layer = 2 * (double)(B * T) * weights + 2 * (double)B * attention_pairs(c, T) * (Z + E);
    return c->num_layers * layer + 2 * (double)logit_rows * D * c->vocab_size;
}

/* ----------------------------------------------------------------------------------------------------
 * A training step
 */

typedef enum { FORWARD_TIME, BACKWARD_TIME, UPDATE_TIME, WHOLE_TIME, NUM_TIMES } StepTime;

typedef struct Step {
    const Bench *bench;
    MegalodonModel *model;
    MegalodonBatch batch;
    int64_t updates;
    double loss;
    double seconds[NUM_TIMES];       /* of the last step */
} Step;

/* One step, with or without the update. apart: wait for a GPU between the parts, so that their times mean
 * something; else only the whole time does. */
static void step_run(Step *step, bool update, bool apart) {
    const MegalodonBackend *backend = step->bench->backend;
    MegalodonLoss loss;
    double norm = 0, times[4];
    times[0] = report_seconds();
    backend->zero_gradients(step->model);
    die_if(backend->forward(step->model, &step->batch, &loss));
    times[1] = report_seconds();
    die_if(backend->backward(step->model, 1 / (double)loss.counted));
    if (apart) wait_for(step->bench);
    times[2] = report_seconds();
    /* wide models diverge in their first steps at the rate of narrow ones */
    MegalodonAdamW adamw = {.lr = 0.4 / step->bench->config.model_dim, .beta1 = 0.9, .beta2 = 0.95,
                            .eps = 1e-8, .weight_decay = 0.1, .clip = 1, .step = step->updates + update};
    if (update) die_if(backend->update(step->model, &adamw, &norm));
    wait_for(step->bench);
    times[3] = report_seconds();
    for (int i = 0; i < 3; i++) step->seconds[i] = times[i + 1] - times[i];
    step->seconds[WHOLE_TIME] = times[3] - times[0];
    step->updates += update;
    step->loss = loss.nll_sum / (double)loss.counted;
    if (!isfinite(step->loss) || !isfinite(norm))
        die(errorf("bench step: after %lld updates the loss is %g and the gradient's norm %g",
                   (long long)step->updates, step->loss, norm));
}

/* Medians over some steps with so many threads. On a GPU the parts are timed in steps of their own: to wait
 * between them costs time. Without updates every step must find the very same loss. */
static void step_seconds(Step *step, int threads, double medians[NUM_TIMES]) {
    const Bench *bench = step->bench;
    int repeats = bench->values.repeats, extra = bench->on_gpu ? (repeats + 1) / 2 : 0;
    bool update = !bench->values.forward_backward;
    double *seconds[NUM_TIMES], loss = 0;
    set_threads(threads);
    for (int i = 0; i < NUM_TIMES; i++) seconds[i] = host_allocate((size_t)repeats * sizeof **seconds);
    for (int r = -1; r < repeats + extra; r++) {
        bool apart = !bench->on_gpu || r >= repeats;
        step_run(step, update, apart);
        if (r < 0) loss = step->loss;
        if (!update && step->loss != loss)
            report_wrong(bench,
                         errorf("bench step: the same batch and weights gave the losses %.17g and %.17g",
                                loss, step->loss));
        if (r < 0) continue; /* the first step warms up */
        if (r < repeats) seconds[WHOLE_TIME][r] = step->seconds[WHOLE_TIME];
        for (int i = 0; i < WHOLE_TIME && apart; i++) seconds[i][r % repeats] = step->seconds[i];
    }
    for (int i = 0; i < NUM_TIMES; i++) {
        medians[i] = median(seconds[i], i == WHOLE_TIME || !extra ? repeats : extra);
        free(seconds[i]);
    }
}

/* Compares the loss of each of the first tokens with that of the CPU, or on the CPU with that in double:
 * enough to see a wrong weight or kernel, and cheap for a model of any length. */
static void step_check_forward(Step *step) {
    enum { MOST_TOKENS = 64 };
    const Bench *bench = step->bench;
    const MegalodonBackend *other = bench->on_gpu ? &megalodon_cpu : &megalodon_cpu_double;
    MegalodonBatch batch = step->batch;
    int64_t rows = (int64_t)batch.B * batch.T;
    float *ours = host_allocate((size_t)rows * sizeof *ours);
    double theirs[MOST_TOKENS], mean = 0, spread = 0, difference = 0;
    MegalodonLoss loss;
    MegalodonModel *reference;
    batch.dropout = false;
    die_if(bench->backend->forward(step->model, &batch, &loss));
    die_if(bench->backend->get(step->model, MEGALODON_ACT, "nll", ours, MEGALODON_F32));
    batch.B = 1;
    if (batch.T > MOST_TOKENS) batch.T = MOST_TOKENS;
    MegalodonOptions options = {.max_batch = 1, .max_length = batch.T};
    die_if(other->create(&reference, &bench->config, &options));
    die_if(megalodon_initialise(other, reference, &bench->config, 1));
    die_if(other->forward(reference, &batch, &loss));
    die_if(other->get(reference, MEGALODON_ACT, "nll", theirs, MEGALODON_F64));
    other->destroy(reference);
    for (int i = 0; i < batch.T; i++) mean += theirs[i] / batch.T;
    for (int i = 0; i < batch.T; i++) {
        spread += (theirs[i] - mean) * (theirs[i] - mean);
        difference += (ours[i] - theirs[i]) * (ours[i] - theirs[i]);
    }
    free(ours);
    /* one token has no spread: its loss itself is the measure */
    double error = sqrt(difference / (spread > 0 ? spread : mean * mean));
    double allowed = bench->precision == MEGALODON_BF16_MIXED ? 0.1 : 1e-3;
    printf("losses of the first %d tokens: %.1e from those of %s, relative to their spread\n", batch.T, error,
           other->name);
    record(bench, "step", bench->values.preset, "error of losses", error);
    if (!(error < allowed))
        report_wrong(bench, errorf("bench step: the losses of the first tokens differ from those of %s by %g "
                                   "of their spread; at most %g is expected", other->name, error, allowed));
}

static void step_row(const Step *step, int threads, const double seconds[NUM_TIMES], double flops,
                     int64_t before) {
    const Bench *bench = step->bench;
    const Values *v = &bench->values;
    double rate = flops / seconds[WHOLE_TIME], bytes = model_bytes(bench, step->model, before);
    double tokens = (double)step->batch.B * step->batch.T;
    /* a share of what the same number of threads does in a product */
    double ceiling = threads == bench->threads ? bench->ceilings.product : openblas_rate(bench, threads);
    char what[96], share[16];
    if (bench->on_gpu) printf("%7s", "-");
    else printf("%7d", threads);
    printf(" %9.2f %9.2f %9.2f ", 1e3 * seconds[WHOLE_TIME], 1e3 * seconds[FORWARD_TIME],
           1e3 * seconds[BACKWARD_TIME]);
    if (v->forward_backward) printf("%9s", "-");
    else printf("%9.2f", 1e3 * seconds[UPDATE_TIME]);
    printf(" %11.0f %9.3f %7s %8.2f\n", tokens / seconds[WHOLE_TIME], 1e-12 * rate,
           percent(rate / ceiling, share), bytes / GIB);
    snprintf(what, sizeof what, "%s %dx%d%s", v->preset, step->batch.B, step->batch.T,
             v->forward_backward ? " forward+backward" : "");
    if (!bench->on_gpu) snprintf(what + strlen(what), sizeof what - strlen(what), " threads %d", threads);
    record(bench, "step", what, "ms", 1e3 * seconds[WHOLE_TIME]);
    record(bench, "step", what, "forward ms", 1e3 * seconds[FORWARD_TIME]);
    record(bench, "step", what, "backward ms", 1e3 * seconds[BACKWARD_TIME]);
    if (!v->forward_backward) record(bench, "step", what, "update ms", 1e3 * seconds[UPDATE_TIME]);
    record(bench, "step", what, "tokens/s", tokens / seconds[WHOLE_TIME]);
    record(bench, "step", what, "TFLOP/s", 1e-12 * rate);
    record(bench, "step", what, "share of the ceiling", rate / ceiling);
    record(bench, "step", what, "GiB", bytes / GIB);
}

static void bench_step(Bench *bench) {
    const Values *v = &bench->values;
    const MegalodonConfig *c = &bench->config;
    Step step = {.bench = bench};
    int B = v->batch ? v->batch : 8, T = v->seq_len ? v->seq_len : 512;
    MegalodonOptions options = {
        .max_batch = B, .max_length = T, .training = true, .precision = bench->precision};
    int64_t tokens = (int64_t)B * T, before = device_used(bench);
    double flops = 3 * forward_flops(c, B, T, tokens);
    bool has_dropout = c->dropout > 0 || c->hidden_dropout > 0 || c->attention_dropout > 0;
    char count[32];
    printf("\nstep%s: %s, %s parameters, %d x %d tokens, %.3g TFLOP; medians of %d\n",
           v->forward_backward ? " without update" : "", v->preset,
           report_count(megalodon_num_parameters(c), count), B, T, 1e-12 * flops, v->repeats);
    die_if(bench->backend->create(&step.model, c, &options));
    die_if(megalodon_initialise(bench->backend, step.model, c, 1));
    int32_t *ids = random_tokens(tokens + 1, c->vocab_size, 5);
    step.batch = (MegalodonBatch){.tokens = ids, .targets = ids + 1, .B = B, .T = T, .dropout = has_dropout};
    if (!v->no_check) step_check_forward(&step);
    printf("%7s %9s %9s %9s %9s %11s %9s %7s %8s\n", "threads", "ms", "forward", "backward", "update",
           "tokens/s", "TFLOP/s", "share", "GiB");
    /* the batch is the same every time, so gradients that are right let a model learn it; its losses before
     * the first update and after the last are taken without dropout */
    step.batch.dropout = false;
    step_run(&step, false, false);
    double first_loss = step.loss, all_threads = 0;
    step.batch.dropout = has_dropout;
    for (int threads = bench->threads;; threads = 1) {
        double seconds[NUM_TIMES];
        step_seconds(&step, threads, seconds);
        step_row(&step, threads, seconds, flops, before);
        if (threads == bench->threads) all_threads = seconds[WHOLE_TIME];
        if (threads == 1 || bench->on_gpu) {
            if (bench->threads > 1 && !bench->on_gpu)
                printf("%d threads are %.2f times as fast as one\n", bench->threads,
                       seconds[WHOLE_TIME] / all_threads);
            break;
        }
    }
    set_threads(bench->threads);
    for (int i = 0; v->forward_backward && i < 3; i++) step_run(&step, true, false);
    step.batch.dropout = false;
    step_run(&step, false, false);
    printf("loss at first: %.3f, after %lld updates: %.3f\n", first_loss, (long long)step.updates, step.loss);
    if (!(step.loss < first_loss)) report_wrong(bench, "bench step: the loss did not fall");
    free(ids);
    bench->backend->destroy(step.model);
}

/* ----------------------------------------------------------------------------------------------------
 * Generation
 */

/* Bytes of the weights that one token reads: all but the embedding, of which it reads a row. */
static double weight_bytes(const Bench *bench) {
    MegalodonTensor embed;
    int64_t parameters = megalodon_num_parameters(&bench->config);
    die_if(megalodon_find_tensor(&bench->config, MEGALODON_PARAM, 1, 1, 0, "embed.weight", &embed));
    if (!bench->config.share_emb) parameters -= embed.size;
    return (double)parameters * (bench->precision == MEGALODON_BF16_MIXED ? 2 : 4);
}

typedef struct Generation {
    const Bench *bench;
    MegalodonModel *model;
    int rows;
    int32_t *next;                   /* rows: the tokens to feed */
    float *logits;                   /* rows,V                   */
    int unseen;                      /* rows of logits that no one has looked through */
} Generation;

/* Are all of them numbers? In integers, which a compiler turns into vectors: on a CPU this is part of every token's
 * time. */
static bool all_finite(const float *values, int n) {
    const int32_t exponent = 0x7F800000;             /* of infinities and NaN */
    int32_t wild = 0;
    for (int i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        wild |= (bits & exponent) == exponent;
    }
    return !wild;
}

static void generation_look(Generation *g) {
    if (!all_finite(g->logits, g->unseen * g->bench->config.vocab_size))
        die("bench generate: the logits are not all finite");
    g->unseen = 0;
}

/* Feeds the next token of each row and chooses the most likely one after it. While a GPU is at work, the logits of the
 * step before are looked through. */
static void generation_step(void *context) {
    Generation *g = context;
    int V = g->bench->config.vocab_size;
    MegalodonBatch batch = {.tokens = g->next, .B = g->rows, .T = 1, .carry = true};
    die_if(g->bench->backend->forward(g->model, &batch, NULL));
    generation_look(g);
    die_if(g->bench->backend->last_logits(g->model, g->logits));
    g->unseen = g->rows;
    for (int row = 0; row < g->rows; row++) {
        g->next[row] = sampler_best(g->logits + (int64_t)row * V, V);
        if (g->next[row] < 0) generation_look(g); /* which ends here */
    }
}

/* Relative RMS of what differs between two sets of logits of the last token, each reached another way. */
static void check_logits(const Bench *bench, const float *ours, const float *theirs, int64_t size,
                         const char *what) {
    double difference = 0, total = 0;
    for (int64_t i = 0; i < size; i++) {
        difference += ((double)ours[i] - theirs[i]) * ((double)ours[i] - theirs[i]);
        total += (double)theirs[i] * theirs[i];
    }
    double error = sqrt(difference / total), allowed = bench->precision == MEGALODON_BF16_MIXED ? 0.1 : 1e-3;
    if (!(error < allowed))
        report_wrong(bench, errorf("bench %s: the logits differ by %g (relative); at most %g is expected",
                                   what, error, allowed));
    printf("%s: the logits differ by %.1e (relative)\n", what, error);
}

/* A token after a text, fed by itself, must give the logits that it gives at the end of the text. text: rows
 * of T+1. */
static void generation_check(Generation *g, const int32_t *text, int T) {
    const MegalodonBackend *backend = g->bench->backend;
    int64_t size = (int64_t)g->rows * g->bench->config.vocab_size;
    float *expected = host_allocate((size_t)size * sizeof *expected);
    int32_t *before = host_allocate((size_t)g->rows * (size_t)T * sizeof *before);
    MegalodonBatch whole = {.tokens = text, .B = g->rows, .T = T + 1};
    MegalodonBatch most = {.tokens = before, .B = g->rows, .T = T};
    for (int row = 0; row < g->rows; row++) {
        memcpy(before + (int64_t)row * T, text + (int64_t)row * (T + 1), (size_t)T * sizeof *before);
        g->next[row] = text[(int64_t)row * (T + 1) + T];
    }
    die_if(backend->forward(g->model, &whole, NULL));
    die_if(backend->last_logits(g->model, expected));
    die_if(backend->forward(g->model, &most, NULL));
    generation_step(g);
    check_logits(g->bench, g->logits, expected, size, "generate");
    free(expected);
    free(before);
}

typedef struct Drawing { Sampler sampler; const float *logits; } Drawing;

static void drawing_step(void *context) {
    Drawing *d = context;
    int32_t token;
    die_if(sampler_next(&d->sampler, d->logits, &token));
}

/* What `generate` adds to each token with its own settings. Logits of a model that has learnt nothing are all alike;
 * these have a standard deviation of 3, by the sum of twelve uniform numbers. */
static void bench_drawing(const Bench *bench) {
    const double temperature = 0.8, top_p = 0.95, deviation = 3;
    int V = bench->config.vocab_size;
    float *logits = host_allocate((size_t)V * sizeof *logits);
    for (int i = 0; i < V; i++) {
        double sum = -6;
        for (uint64_t k = 0; k < 12; k++) sum += (double)(megalodon_random(k, (uint64_t)i) >> 11) * 0x1p-53;
        logits[i] = (float)(deviation * sum);
    }
    Drawing drawing = {.logits = logits};
    die_if(sampler_create(&drawing.sampler, V, temperature, 0, top_p, 1));
    double seconds = seconds_of(bench, (Work){drawing_step, &drawing, false, 1});
    printf("drawing one of %d tokens, temperature %g, top-p %g: %.1f us a row more, on the host\n", V, temperature,
           top_p, 1e6 * seconds);
    record(bench, "generate", "drawing a token", "us", 1e6 * seconds);
    sampler_destroy(&drawing.sampler);
    free(logits);
}

static void bench_generate(Bench *bench) {
    const Values *v = &bench->values;
    const MegalodonConfig *c = &bench->config;
    int B = v->batch ? v->batch : 8, T = v->seq_len ? v->seq_len : 512;
    MegalodonOptions options = {.max_batch = B, .max_length = T + 1, .precision = bench->precision};
    Generation g = {.bench = bench};
    int64_t before = device_used(bench);
    double bytes = weight_bytes(bench), ceiling = bench->ceilings.memory;
    printf("\ngenerate: %s after %d tokens; a token reads %.1f MB of weights, memory gives %.1f GB/s\n",
           v->preset, T, 1e-6 * bytes, 1e-9 * ceiling);
    die_if(bench->backend->create(&g.model, c, &options));
    die_if(megalodon_initialise(bench->backend, g.model, c, 1));
    int32_t *text = random_tokens((int64_t)B * (T + 1), c->vocab_size, 6);
    g.next = random_tokens(B, c->vocab_size, 7);
    g.logits = host_allocate((size_t)B * (size_t)c->vocab_size * sizeof *g.logits);
    if (!v->no_check) g.rows = B, generation_check(&g, text, T);
    printf("%7s %10s %10s %10s %7s %8s\n", "rows", "ms", "tokens/s", "GB/s", "share", "GiB");
    for (g.rows = 1;; g.rows = B) {
        char what[64], share[16];
        MegalodonBatch batch = {.tokens = text, .B = g.rows, .T = T};
        die_if(bench->backend->forward(g.model, &batch, NULL));
        double seconds = seconds_of(bench, (Work){generation_step, &g, false, 1});
        generation_look(&g);
        double rate = bytes / seconds, used = model_bytes(bench, g.model, before);
        printf("%7d %10.3f %10.0f %10.1f %7s %8.2f\n", g.rows, 1e3 * seconds, g.rows / seconds, 1e-9 * rate,
               percent(rate / ceiling, share), used / GIB);
        snprintf(what, sizeof what, "%s rows %d", v->preset, g.rows);
        record(bench, "generate", what, "ms", 1e3 * seconds);
        record(bench, "generate", what, "tokens/s", g.rows / seconds);
        record(bench, "generate", what, "GB/s", 1e-9 * rate);
        record(bench, "generate", what, "share of the ceiling", rate / ceiling);
        record(bench, "generate", what, "GiB", used / GIB);
        if (g.rows == B) break;
    }
    if (!bench->on_gpu) printf("A share over 100%% means that weights come from a cache.\n");
    bench_drawing(bench);
    free(text), free(g.next), free(g.logits);
    bench->backend->destroy(g.model);
}

/* ----------------------------------------------------------------------------------------------------
 * Reading a stream: call after call, the state carried
 */

enum { READ_CALLS = 4 };             /* different texts, read in turn */

typedef struct Reading {
    const Bench *bench;
    MegalodonModel *model;
    int32_t *text;                   /* READ_CALLS,B,T */
    int B, T, next;
    bool started;                    /* there is a state to go on from */
} Reading;

static void reading_call(void *context) {
    Reading *r = context;
    MegalodonBatch batch = {
        .tokens = r->text + (int64_t)r->next * r->B * r->T, .B = r->B, .T = r->T, .carry = r->started};
    die_if(r->bench->backend->forward(r->model, &batch, NULL));
    r->next = (r->next + 1) % READ_CALLS;
    r->started = true;
}

/* Reads one text from an empty state in calls of `length` tokens; logits: B,V, those of its last token. */
static void read_in_pieces(const Reading *r, int length, float *logits) {
    const MegalodonBackend *backend = r->bench->backend;
    int32_t *piece = host_allocate((size_t)r->B * (size_t)length * sizeof *piece);
    for (int t = 0; t < r->T; t += length) {
        int count = r->T - t < length ? r->T - t : length;
        for (int row = 0; row < r->B; row++)
            memcpy(piece + (int64_t)row * count, r->text + (int64_t)row * r->T + t,
                   (size_t)count * sizeof *piece);
        MegalodonBatch batch = {.tokens = piece, .B = r->B, .T = count, .carry = t > 0};
        die_if(backend->forward(r->model, &batch, NULL));
    }
    die_if(backend->last_logits(r->model, logits));
    free(piece);
}

/* A text read in three calls leads to the logits that it leads to in one. */
static void reading_check(Reading *r) {
    int64_t size = (int64_t)r->B * r->bench->config.vocab_size;
    float *whole = host_allocate((size_t)size * sizeof *whole),
          *pieces = host_allocate((size_t)size * sizeof *pieces);
    read_in_pieces(r, r->T, whole);
    read_in_pieces(r, (r->T + 2) / 3, pieces);
    check_logits(r->bench, pieces, whole, size, "read");
    free(whole), free(pieces);
}

static void bench_read(Bench *bench) {
    const Values *v = &bench->values;
    const MegalodonConfig *c = &bench->config;
    Reading r = {.bench = bench, .B = v->batch ? v->batch : 1, .T = v->seq_len ? v->seq_len : 4096};
    MegalodonOptions options = {.max_batch = r.B, .max_length = r.T, .precision = bench->precision};
    int64_t tokens = (int64_t)r.B * r.T, before = device_used(bench);
    char what[96], share[16];
    printf("\nread: %s, calls of %d x %d tokens, the state carried; medians of %d\n", v->preset, r.B, r.T,
           v->repeats);
    die_if(bench->backend->create(&r.model, c, &options));
    die_if(megalodon_initialise(bench->backend, r.model, c, 1));
    r.text = random_tokens(READ_CALLS * tokens, c->vocab_size, 9);
    if (!v->no_check) reading_check(&r);
    /* a call from the start of a chunk, which it is if T is a multiple of chunk_size; the output layer is not
     * needed */
    double flops = forward_flops(c, r.B, r.T, 0),
           seconds = seconds_of(bench, (Work){reading_call, &r, false, 1});
    double rate = flops / seconds, used = model_bytes(bench, r.model, before);
    printf("%10s %12s %9s %7s %8s\n", "ms a call", "tokens/s", "TFLOP/s", "share", "GiB");
    printf("%10.3f %12.0f %9.3f %7s %8.2f\n", 1e3 * seconds, (double)tokens / seconds, 1e-12 * rate,
           percent(rate / bench->ceilings.product, share), used / GIB);
    snprintf(what, sizeof what, "%s %dx%d", v->preset, r.B, r.T);
    record(bench, "read", what, "ms", 1e3 * seconds);
    record(bench, "read", what, "tokens/s", (double)tokens / seconds);
    record(bench, "read", what, "TFLOP/s", 1e-12 * rate);
    record(bench, "read", what, "share of the ceiling", rate / bench->ceilings.product);
    record(bench, "read", what, "GiB", used / GIB);
    free(r.text);
    bench->backend->destroy(r.model);
}

#endif
