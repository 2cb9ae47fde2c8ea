/* test_training.c - training does what it says, bit for bit where that is promised.
 *
 * Causality, resuming from files, threads and repeated runs are compared bit by bit: a difference in the last place
 * there is a leak, a forgotten number or a race, and grows. Learning itself is tested on a line of text.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "../lib/checkpoint.h"
#include "model.h"
#include "test.h"

#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static const MegalodonBackend *const backend = &megalodon_cpu;
static const MegalodonAdamW ADAMW = {.lr = 2e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1,
                                     .clip = 1};
static bool shorter;

/* ---- helpers ---- */

/* All parameters (or gradients, moments) of a model in one array of floats. */
static float *snapshot(MegalodonModel *model, const MegalodonConfig *config, MegalodonKind kind, size_t *bytes) {
    static MegalodonTensor list[MODEL_MAX_TENSORS];
    int count = megalodon_tensors(config, kind, 1, 1, 0, list, MODEL_MAX_TENSORS);
    float *all = must_allocate((size_t)megalodon_num_parameters(config) * sizeof *all), *at = all;
    for (int i = 0; i < count; i++) {
        must(backend->get(model, kind, list[i].name, at, MEGALODON_F32));
        at += list[i].size;
    }
    *bytes = (size_t)(at - all) * sizeof *all;
    return all;
}

static bool equal_snapshots(float *a, float *b, size_t bytes) {
    bool equal = !memcmp(a, b, bytes);
    free(a);
    free(b);
    return equal;
}

/* One training step on random tokens that depend on the step alone. Returns the mean loss. */
static double train_step(MegalodonModel *model, const MegalodonConfig *config, int B, int T, int64_t step,
                         double *grad_norm) {
    int32_t *tokens = must_allocate((size_t)(B * T) * sizeof *tokens);
    int32_t *targets = must_allocate((size_t)(B * T) * sizeof *targets);
    random_tokens(tokens, B * T, config->vocab_size, (uint64_t)(2 * step));
    random_tokens(targets, B * T, config->vocab_size, (uint64_t)(2 * step + 1));
    MegalodonBatch batch = {.tokens = tokens, .targets = targets, .B = B, .T = T, .dropout = true, .seed = 5,
                            .step = (uint64_t)step};
    MegalodonAdamW adamw = ADAMW;
    MegalodonLoss loss;
    adamw.step = step;
    backend->zero_gradients(model);
    must(backend->forward(model, &batch, &loss));
    must(backend->backward(model, 1. / (double)loss.counted));
    must(backend->update(model, &adamw, grad_norm));
    free(tokens);
    free(targets);
    return loss.nll_sum / (double)loss.counted;
}

static MegalodonConfig dropout_config(void) {
    MegalodonConfig config = small_config();
    config.dropout = config.hidden_dropout = config.attention_dropout = 0.1;
    return config;
}

/* ---- causality ---- */

/* Changing token t changes no logit before t, bit for bit, and some logit at t. */
static void check_causality(const char *name, const MegalodonConfig *config, int B, int T) {
    int V = config->vocab_size, leaks = 0, deaf = 0, leaking_at = -1;
    MegalodonOptions options = {.max_batch = B, .max_length = T, .training = true, .keep_activations = true};
    MegalodonModel *model = model_create(backend, config, &options, 3);
    int32_t *tokens = must_allocate((size_t)(B * T) * sizeof *tokens);
    random_tokens(tokens, B * T, V, 8);
    MegalodonBatch batch = {.tokens = tokens, .B = B, .T = T};
    size_t row = (size_t)V * sizeof(float);
    float *before = must_allocate((size_t)(B * T) * row), *after = must_allocate((size_t)(B * T) * row);
    must(backend->forward(model, &batch, NULL));
    must(backend->get(model, MEGALODON_ACT, "logits", before, MEGALODON_F32));
    for (int t = 0; t < T; t += shorter ? 7 : 1) {
        /* One row of the batch is changed; the others must not notice at all. */
        int b = t % B, old = tokens[b * T + t];
        tokens[b * T + t] = (old + 1) % V;
        must(backend->forward(model, &batch, NULL));
        must(backend->get(model, MEGALODON_ACT, "logits", after, MEGALODON_F32));
        for (int other = 0; other < B; other++) {
            size_t first = (size_t)(other * T) * (size_t)V, length = (size_t)(other == b ? t : T) * row;
            if (!memcmp(before + first, after + first, length)) continue;
            leaks++;
            leaking_at = t;
        }
        deaf += !memcmp(before + (size_t)(b * T + t) * (size_t)V, after + (size_t)(b * T + t) * (size_t)V, row);
        tokens[b * T + t] = old;
    }
    check(leaks == 0, "%s: %d changed tokens, such as %d, change outputs before them or in other rows", name, leaks,
          leaking_at);
    check(deaf == 0, "%s: %d changed tokens change nothing at their place", name, deaf);
    free(tokens);
    free(before);
    free(after);
    backend->destroy(model);
}

/* ---- same bits ---- */

/* 20 steps = 10 + save + load into a new model + 10. */
static void check_resume(void) {
    MegalodonConfig config = dropout_config();
    MegalodonOptions options = {.max_batch = 3, .max_length = 19, .training = true};
    MegalodonModel *straight = model_create(backend, &config, &options, 1);
    MegalodonModel *first = model_create(backend, &config, &options, 1);
    MegalodonModel *second = model_create(backend, &config, &options, 99);
    double losses[21], norms[21], loss, norm;
    char run[] = "/tmp/test_training_XXXXXX", path[64];
    if (!mkdtemp(run)) must("cannot create a temporary directory");
    for (int64_t step = 1; step <= 20; step++)
        losses[step] = train_step(straight, &config, 3, 19, step, &norms[step]);
    for (int64_t step = 1; step <= 10; step++) {
        loss = train_step(first, &config, 3, 19, step, &norm);
        check(loss == losses[step] && norm == norms[step], "step %d of a second run differs: loss %.9g, not %.9g",
              (int)step, loss, losses[step]);
    }
    const SafetensorsPair facts[] = {{"note", "ten"}, {NULL, NULL}};
    Safetensors trainer;
    must(checkpoint_write(run, 10, 1, backend, first, &config, facts, false));
    const char *error = checkpoint_resume(run, backend, second, &config, &trainer);
    if (check(!error, "resuming: %s", error ? error : "")) {
        int64_t step = 0;
        must(checkpoint_fact_int64(&trainer, "step", &step));
        check(step == 10, "the checkpoint is of step %d", (int)step);
        safetensors_close(&trainer);
        for (step = 11; step <= 20; step++) {
            loss = train_step(second, &config, 3, 19, step, &norm);
            check(loss == losses[step] && norm == norms[step], "resumed step %d: loss %.9g, not %.9g", (int)step, loss,
                  losses[step]);
        }
        const MegalodonKind kinds[] = {MEGALODON_PARAM, MEGALODON_MOMENT1, MEGALODON_MOMENT2};
        for (int k = 0; k < 3; k++) {
            size_t bytes;
            float *a = snapshot(straight, &config, kinds[k], &bytes), *b = snapshot(second, &config, kinds[k], &bytes);
            check(equal_snapshots(a, b, bytes), "after 20 steps kind %d of a resumed run differs", (int)kinds[k]);
        }
    }
    snprintf(path, sizeof path, "%s/step-00000010", run);
    checkpoint_remove(path);
    checkpoint_remove(run);
    backend->destroy(straight);
    backend->destroy(first);
    backend->destroy(second);
}

#ifdef _OPENMP
/* A model that is large enough for every loop to be worth two threads, and odd enough for uneven shares. This runs
 * first and leaves three threads behind: a thread that OpenMP gives up takes its scratch memory with it, which the
 * leak checker would report. So seven threads, four of which are given up, are left out under the sanitizers. */
static void check_threads(void) {
    MegalodonConfig config;
    megalodon_default_config(&config);
    config.num_layers = 2;
    config.model_dim = 96;
    config.z_dim = 48;
    config.num_heads = 2;
    config.value_dim = 136;
    config.ffn_hidden_dim = 120;
    config.chunk_size = 37;
    config.dropout = config.hidden_dropout = config.attention_dropout = 0.1;
    MegalodonOptions options = {.max_batch = 3, .max_length = 101, .training = true, .keep_activations = true};
    float *reference[4] = {NULL};
    const char *names[4] = {"logits", "gradients", "parameters", "second moments"};
    static const int counts[] = {1, 2, 3, 7};
    for (int run = 0; run < (shorter ? 3 : 4); run++) {
        int threads = counts[run];
        omp_set_num_threads(threads);
        MegalodonModel *model = model_create(backend, &config, &options, 1);
        double norm;
        for (int64_t step = 1; step <= 2; step++) train_step(model, &config, 3, 101, step, &norm);
        float *ours[4];
        size_t bytes[4] = {(size_t)3 * 101 * (size_t)config.vocab_size * sizeof(float)};
        ours[0] = must_allocate(bytes[0]);
        must(backend->get(model, MEGALODON_ACT, "logits", ours[0], MEGALODON_F32));
        ours[1] = snapshot(model, &config, MEGALODON_GRAD, &bytes[1]);
        ours[2] = snapshot(model, &config, MEGALODON_PARAM, &bytes[2]);
        ours[3] = snapshot(model, &config, MEGALODON_MOMENT2, &bytes[3]);
        for (int i = 0; i < 4; i++) {
            if (threads == 1) reference[i] = ours[i];
            else check(!memcmp(ours[i], reference[i], bytes[i]), "%s differ between 1 and %d threads", names[i],
                       threads);
            if (threads > 1) free(ours[i]);
        }
        backend->destroy(model);
    }
    for (int i = 0; i < 4; i++) free(reference[i]);
    omp_set_num_threads(3);
}
#endif

/* ---- the optimiser's rules ---- */

/* A batch in one piece, and as two halves whose gradients add up, with the mean over both. */
static void check_accumulation(void) {
    MegalodonConfig config = small_config();
    enum { B = 4, T = 21 };
    MegalodonOptions options = {.max_batch = B, .max_length = T, .training = true};
    int32_t tokens[B * T], targets[B * T];
    random_tokens(tokens, B * T, config.vocab_size, 1);
    random_tokens(targets, B * T, config.vocab_size, 2);
    for (int i = 0; i < B * T; i += 5) targets[i] = MEGALODON_IGNORE;
    const MegalodonBackend *wide = &megalodon_cpu_double;
    MegalodonModel *model = model_create(wide, &config, &options, 1);
    MegalodonTensor list[MODEL_MAX_TENSORS];
    int count = megalodon_tensors(&config, MEGALODON_GRAD, 1, 1, 0, list, MODEL_MAX_TENSORS);
    double *whole[MODEL_MAX_TENSORS], *halves;
    MegalodonLoss loss, first, second;
    int64_t size;
    MegalodonBatch batch = {.tokens = tokens, .targets = targets, .B = B, .T = T}, half = batch;
    must(wide->forward(model, &batch, &loss));
    must(wide->backward(model, 1. / (double)loss.counted));
    for (int i = 0; i < count; i++)
        whole[i] = fetch(wide, model, &config, &batch, MEGALODON_GRAD, list[i].name, &size);
    wide->zero_gradients(model);
    half.B = B / 2;
    must(wide->forward(model, &half, &first));
    must(wide->backward(model, 1. / (double)loss.counted));
    half.tokens += half.B * T;
    half.targets += half.B * T;
    must(wide->forward(model, &half, &second));
    must(wide->backward(model, 1. / (double)loss.counted));
    check(first.counted + second.counted == loss.counted, "two halves count %lld and %lld targets of %lld",
          (long long)first.counted, (long long)second.counted, (long long)loss.counted);
    check(fabs(first.nll_sum + second.nll_sum - loss.nll_sum) < 1e-10, "two halves have another loss than the whole");
    for (int i = 0; i < count; i++) {
        halves = fetch(wide, model, &config, &batch, MEGALODON_GRAD, list[i].name, &size);
        double error = relative_rms(halves, whole[i], (size_t)size);
        check(error <= 1e-12, "two halves: gradient of %s differs by %.2e", list[i].name, error);
        free(halves);
        free(whole[i]);
    }
    wide->destroy(model);
}

/* Sets every gradient of a model to one number. */
static void fill_gradients(MegalodonModel *model, const MegalodonConfig *config, float value) {
    MegalodonTensor list[MODEL_MAX_TENSORS];
    int count = megalodon_tensors(config, MEGALODON_GRAD, 1, 1, 0, list, MODEL_MAX_TENSORS);
    float *values = must_allocate((size_t)megalodon_num_parameters(config) * sizeof *values);
    for (int64_t j = 0; j < megalodon_num_parameters(config); j++) values[j] = value;
    for (int i = 0; i < count; i++) must(backend->set(model, MEGALODON_GRAD, list[i].name, values, MEGALODON_F32));
    free(values);
}

/* Clipping scales by clip / norm when the norm is larger, and leaves smaller ones alone; what it did shows in the first
 * moment, which after one step is (1 - beta1) times the gradient used. */
static void check_clipping(void) {
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 1, .max_length = 8, .training = true};
    double root = sqrt((double)megalodon_num_parameters(&config));
    const struct { float gradient; double clip, used; } cases[] = {
        {3, 1, 1 / root}, {3, 0, 3}, {(float)(0.25 / root), 1, 0.25 / root}, {1e18f, 1, 1 / root}, {1e-20f, 1, 1e-20},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        MegalodonModel *model = model_create(backend, &config, &options, 1);
        MegalodonAdamW adamw = ADAMW;
        double norm;
        float moment[2 * 12];
        adamw.clip = cases[i].clip;
        adamw.step = 1;
        fill_gradients(model, &config, cases[i].gradient);
        must(backend->update(model, &adamw, &norm));
        check(fabs(norm / (cases[i].gradient * root) - 1) < 1e-5, "case %zu: gradient norm %g, not %g", i, norm,
              cases[i].gradient * root);
        must(backend->get(model, MEGALODON_MOMENT1, "layers.1.mega.gamma", moment, MEGALODON_F32));
        check(fabs(moment[5] / (0.1 * cases[i].used) - 1) < 1e-5, "case %zu: a gradient of %g was used as %g, not %g",
              i, cases[i].gradient, moment[5] / 0.1, cases[i].used);
        backend->destroy(model);
    }
}

/* One update by hand: bias-corrected moments, decoupled decay. */
static void check_adamw(void) {
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 1, .max_length = 8, .training = true};
    MegalodonModel *model = model_create(backend, &config, &options, 1);
    MegalodonAdamW adamw = ADAMW;
    float before[12], after[12], gradient[12];
    double m = 0, v = 0, x = 0, norm;
    adamw.clip = 0;
    fill_gradients(model, &config, 0);
    for (adamw.step = 1; adamw.step <= 5; adamw.step++) {
        for (int i = 0; i < 12; i++) gradient[i] = (float)(0.1 * (double)(adamw.step * adamw.step) - 0.05 * i);
        must(backend->set(model, MEGALODON_GRAD, "layers.0.mega.wz.bias", gradient, MEGALODON_F32));
        if (adamw.step == 1) {
            for (int i = 0; i < 12; i++) before[i] = 0.5f + 0.1f * (float)i;
            must(backend->set(model, MEGALODON_PARAM, "layers.0.mega.wz.bias", before, MEGALODON_F32));
            x = before[7];
        }
        must(backend->update(model, &adamw, &norm));
        double g = gradient[7];
        m = 0.9 * m + 0.1 * g;
        v = 0.95 * v + 0.05 * g * g;
        double step = (m / (1 - pow(0.9, (double)adamw.step))) / (sqrt(v / (1 - pow(0.95, (double)adamw.step))) + 1e-8);
        x -= adamw.lr * (step + adamw.weight_decay * x);
        must(backend->get(model, MEGALODON_PARAM, "layers.0.mega.wz.bias", after, MEGALODON_F32));
        check(fabs(after[7] - x) < 1e-6, "AdamW, step %d: %.9g, by hand %.9g", (int)adamw.step, after[7], x);
    }
    backend->destroy(model);
}

/* With a gradient of zero an update is the decay alone; spare_cema keeps it from CEMA's parameters and from no other. */
static void check_spared(void) {
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 2, .max_length = 16, .training = true};
    for (int spare = 0; spare < 2; spare++) {
        MegalodonModel *model = model_create(backend, &config, &options, 1);
        MegalodonAdamW adamw = ADAMW;
        adamw.spare_cema = spare;
        adamw.step = 1;
        int count = megalodon_tensors(&config, MEGALODON_PARAM, 1, 1, 0, NULL, 0);
        MegalodonTensor *list = must_allocate((size_t)count * sizeof *list);
        megalodon_tensors(&config, MEGALODON_PARAM, 1, 1, 0, list, count);
        for (int i = 0; i < count; i++) {
            float *ones = must_allocate((size_t)list[i].size * sizeof *ones);
            for (int64_t k = 0; k < list[i].size; k++) ones[k] = 1;
            must(backend->set(model, MEGALODON_PARAM, list[i].name, ones, MEGALODON_F32));
            free(ones);
        }
        must(backend->update(model, &adamw, NULL));
        for (int i = 0; i < count; i++) {
            bool kept = spare && strstr(list[i].name, ".cema.");
            float *after = must_allocate((size_t)list[i].size * sizeof *after), worst = 0;
            float want = kept ? 1 : (float)(1 - adamw.lr * adamw.weight_decay);
            must(backend->get(model, MEGALODON_PARAM, list[i].name, after, MEGALODON_F32));
            for (int64_t k = 0; k < list[i].size; k++) worst = fmaxf(worst, fabsf(after[k] - want));
            check(worst < 1e-7f, "decay of %s, spare_cema %d: off by %g", list[i].name, spare, (double)worst);
            free(after);
        }
        free(list);
        backend->destroy(model);
    }
}

/* A gradient that is not finite changes nothing, and the caller sees it. */
static void check_nonfinite(void) {
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 2, .max_length = 16, .training = true};
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        MegalodonModel *model = model_create(backend, &config, &options, 1);
        MegalodonAdamW adamw = ADAMW;
        double norm;
        train_step(model, &config, 2, 16, 1, &norm);
        size_t bytes;
        const MegalodonKind kinds[] = {MEGALODON_PARAM, MEGALODON_MOMENT1, MEGALODON_MOMENT2};
        float *before[3], spoiled[24] = {0};
        for (int k = 0; k < 3; k++) before[k] = snapshot(model, &config, kinds[k], &bytes);
        spoiled[13] = bad[i];
        must(backend->set(model, MEGALODON_GRAD, "layers.1.mega.gamma", spoiled, MEGALODON_F32));
        adamw.step = 2;
        must(backend->update(model, &adamw, &norm));
        check(!isfinite(norm), "a gradient of %g gives the norm %g", bad[i], norm);
        for (int k = 0; k < 3; k++)
            check(equal_snapshots(before[k], snapshot(model, &config, kinds[k], &bytes), bytes),
                  "a gradient of %g changes kind %d", bad[i], (int)kinds[k]);
        backend->destroy(model);
    }
}

/* ---- learning ---- */

/* The first loss is near ln V + 0.5: the logits of a fresh model are nearly independent normals of variance 1. */
static void check_first_loss(void) {
    MegalodonConfig config;
    megalodon_default_config(&config);
    enum { B = 2, T = 256 };
    if (shorter) config.num_layers = 1;
    MegalodonOptions options = {.max_batch = B, .max_length = T, .training = true};
    MegalodonModel *model = model_create(backend, &config, &options, 1);
    int32_t tokens[B * T], targets[B * T];
    random_tokens(tokens, B * T, config.vocab_size, 3);
    random_tokens(targets, B * T, config.vocab_size, 4);
    MegalodonBatch batch = {.tokens = tokens, .targets = targets, .B = B, .T = T};
    MegalodonLoss loss;
    must(backend->forward(model, &batch, &loss));
    double mean = loss.nll_sum / (double)loss.counted, expected = log(config.vocab_size) + 0.5;
    printf("first loss %.4f, ln V + 0.5 = %.4f\n", mean, expected);
    check(fabs(mean - expected) < 0.15, "the first loss is %.4f, not near %.4f", mean, expected);
    backend->destroy(model);
}

/* A few hundred steps learn a line of text by heart, and the model then says it again from its first letters. */
static void check_overfit(void) {
    static const char line[] = "The shark swam past the reef, turned once, and remembered everything it had seen. ";
    enum { T = sizeof line - 2, PROMPT = 10 };
    MegalodonConfig config;
    megalodon_default_config(&config);
    config.num_layers = 2;
    config.model_dim = config.ffn_hidden_dim = 64;
    config.z_dim = 32;
    config.value_dim = 128;
    config.cema_ndim = 8;
    config.chunk_size = 16;
    config.norm_num_groups = 4;
    MegalodonOptions options = {.max_batch = 1, .max_length = T, .training = true, .carry = true};
    MegalodonModel *model = model_create(backend, &config, &options, 1);
    int32_t tokens[T], targets[T];
    for (int t = 0; t < T; t++) tokens[t] = (unsigned char)line[t], targets[t] = (unsigned char)line[t + 1];
    MegalodonBatch batch = {.tokens = tokens, .targets = targets, .B = 1, .T = T};
    MegalodonAdamW adamw = ADAMW;
    MegalodonLoss loss = {0, 1};
    double norm, first = 0;
    int steps = shorter ? 60 : 300;
    for (adamw.step = 1; adamw.step <= steps; adamw.step++) {
        backend->zero_gradients(model);
        must(backend->forward(model, &batch, &loss));
        if (adamw.step == 1) first = loss.nll_sum / T;
        must(backend->backward(model, 1. / T));
        must(backend->update(model, &adamw, &norm));
    }
    double last = loss.nll_sum / T;
    printf("a line of text: loss %.3f, after %d steps %.5f\n", first, steps, last);
    check(last < (shorter ? 1 : 0.02), "after %d steps on one line the loss is %.4f", steps, last);
    /* Greedy generation from the state. */
    float *logits = must_allocate((size_t)config.vocab_size * sizeof *logits);
    batch.T = PROMPT;
    batch.targets = NULL;
    must(backend->forward(model, &batch, NULL));
    int right = 0;
    for (int t = PROMPT; t <= T; t++) {
        int32_t best = 0;
        must(backend->last_logits(model, logits));
        for (int v = 1; v < config.vocab_size; v++) if (logits[v] > logits[best]) best = v;
        right += best == (unsigned char)line[t];
        MegalodonBatch one = {.tokens = &best, .B = 1, .T = 1, .carry = true};
        must(backend->forward(model, &one, NULL));
    }
    check(shorter || right == T - PROMPT + 1, "the model repeats %d of %d letters", right, T - PROMPT + 1);
    free(logits);
    backend->destroy(model);
}

/* ---- misuse ---- */

/* Calls that cannot work give a sentence and leave the model usable. */
static void check_misuse(void) {
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 2, .max_length = 8, .training = true};
    MegalodonModel *model = model_create(backend, &config, &options, 1);
    int32_t tokens[16] = {0}, high[16] = {0}, low[16] = {0};
    MegalodonLoss loss;
    high[11] = config.vocab_size;
    low[3] = -1;
    MegalodonBatch batch = {.tokens = tokens, .targets = tokens, .B = 2, .T = 8}, bad = batch;
    check(backend->backward(model, 1) != NULL, "a backward before any forward passes");
    bad.tokens = high;
    check(backend->forward(model, &bad, &loss) != NULL, "a token of V passes");
    bad.tokens = low;
    check(backend->forward(model, &bad, &loss) != NULL, "a token of -1 passes");
    bad = batch;
    bad.targets = high;
    check(backend->forward(model, &bad, &loss) != NULL, "a target of V passes");
    bad = batch;
    bad.B = 3;
    check(backend->forward(model, &bad, &loss) != NULL, "more rows than max_batch pass");
    bad = batch;
    bad.T = 9;
    check(backend->forward(model, &bad, &loss) != NULL, "a longer batch than max_length passes");
    bad.T = 0;
    check(backend->forward(model, &bad, &loss) != NULL, "an empty batch passes");
    float values[2048];
    check(backend->get(model, MEGALODON_PARAM, "nonsense", values, MEGALODON_F32) != NULL, "get of nonsense passes");
    check(backend->set(model, MEGALODON_PARAM, "nonsense", values, MEGALODON_F32) != NULL, "set of nonsense passes");
    must(backend->forward(model, &batch, &loss));
    must(backend->backward(model, 1));
    check(backend->backward(model, 1) != NULL, "a second backward of one forward passes");
    batch.targets = NULL;
    must(backend->forward(model, &batch, NULL));
    check(backend->backward(model, 1) != NULL, "a backward without targets passes");
    backend->destroy(model);
    MegalodonModel *none = NULL;
    config.num_heads = 5;
    check(backend->create(&none, &config, &options) != NULL, "a model of an invalid configuration is created");
}

int main(void) {
    test_begin("training");
    shorter = getenv("MEGALODON_TEST_SHORT") != NULL;
    MegalodonConfig plain = small_config(), other = plain, large = plain;
    other.chunk_size = 5;
    other.cema_ndim = 1;
    other.norm_affine = other.swiglu = false;
    other.share_emb = other.scale_emb = other.rescale_nffn = true;
    /* Wide enough for the blocks of the matrix product, long enough for several blocks of time. */
    large.model_dim = 64;
    large.value_dim = 128;
    large.chunk_size = 50;
    large.num_layers = 1;
#ifdef _OPENMP
    check_threads();
#else
    test_skip("threads: built without OpenMP");
#endif
    check_causality("plain", &plain, 2, 45);
    check_causality("tied, scaled, no affine", &other, 2, 33);
    check_causality("larger", &large, 3, 131);
    check_resume();
    check_accumulation();
    check_clipping();
    check_adamw();
    check_spared();
    check_nonfinite();
    check_first_loss();
    check_overfit();
    check_misuse();
    return test_end();
}
