/* test_guards.c - what stands between a run and its loss: the guard against spikes, the search for the first number that
 * is not finite, the limits of an update and of a model's memory, the lock of a folder, and the refusal to save what is
 * worth nothing.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "../lib/checkpoint.h"

#include <float.h>
#include <sys/wait.h>
#include <unistd.h>

#include "../lib/backends.h"
#include "../lib/divergence.h"
#include "../lib/lock.h"
#include "../lib/memory.h"
#include "model.h"
#include "test.h"

static char folder[] = "/tmp/test_guards_XXXXXX";

/* Checks that an error was reported and says `part`. */
static void expect_error(const char *error, const char *part) {
    if (check(error != NULL, "expected an error with <%s>, found none", part))
        check(strstr(error, part) != NULL, "expected <%s> in <%s>", part, error);
}

/* ---- spikes ---- */

static void check_guard(void) {
    SpikeGuard guard = {0}, copy;
    char text[GUARD_TEXT], again[GUARD_TEXT];
    double sum = 0, squares = 0;
    for (int i = 0; i < 60; i++) {
        double loss = 2 + sin(i), norm = 1 + 0.1 * cos(3 * i);
        check((i < GUARD_LEAST) == isinf(guard_limit(&guard, GUARD_LOSS, 3)), "after %d steps the limit is %g", i,
              guard_limit(&guard, GUARD_LOSS, 3));
        guard_learn(&guard, loss, norm);
        sum += loss;
        squares += loss * loss;
    }
    /* Up to the window's length it is the plain mean and variance. */
    double mean = sum / 60, deviation = sqrt(squares / 60 - mean * mean);
    check(fabs(guard.mean[GUARD_LOSS] - mean) < 1e-12, "the mean is %.15f, by hand %.15f", guard.mean[GUARD_LOSS], mean);
    check(fabs(guard_limit(&guard, GUARD_LOSS, 3) - (mean + 3 * deviation)) < 1e-12, "the limit is %.15f, by hand %.15f",
          guard_limit(&guard, GUARD_LOSS, 3), mean + 3 * deviation);
    check(isinf(guard_limit(&guard, GUARD_NORM, 0)), "a guard that is off has a limit");
    /* Later it forgets: after a thousand steps at another level, the old one is gone. */
    for (int i = 0; i < 1000; i++) guard_learn(&guard, 5 + sin(i), 1);
    check(fabs(guard.mean[GUARD_LOSS] - 5) < 0.05 && fabs(guard.variance[GUARD_LOSS] - 0.5) < 0.05,
          "after another thousand steps: mean %.3f, variance %.3f", guard.mean[GUARD_LOSS], guard.variance[GUARD_LOSS]);
    for (int i = 0; i < 1000; i++) guard_learn(&guard, 5, 1);
    check(guard_limit(&guard, GUARD_LOSS, 3) > 5.1, "a series that does not move has the limit %g",
          guard_limit(&guard, GUARD_LOSS, 3));
    guard_learn(&guard, 1. / 3, 1e-300);
    guard_to_text(&guard, text);
    const char *error = guard_from_text(text, &copy);
    check(!error && memcmp(&guard, &copy, sizeof copy) == 0, "the guard from %s is another one", text);
    static const char *const wrong[] = {"", "x", "1 2 3 4", "1 2 3 4 5 6", "1 2 3 4 5x", "-1 2 3 4 5", "1 nan 3 4 5",
                                        "1 2 -3 4 5", "1 2 3 inf 5"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        expect_error(guard_from_text(wrong[i], &copy), "five numbers");
    guard_to_text(&copy, again);
    check(strcmp(text, again) == 0, "a guard that was refused has changed the one before");
}

/* ---- the first number that is not finite ---- */

enum { ROWS = 4, LENGTH = 13 };

static MegalodonModel *trained(const MegalodonBackend *backend, const MegalodonConfig *config, MegalodonBatch *batch) {
    static int32_t tokens[ROWS * LENGTH], targets[ROWS * LENGTH];
    MegalodonOptions options = {.max_batch = ROWS, .max_length = LENGTH, .training = true};
    random_tokens(tokens, ROWS * LENGTH, config->vocab_size, 1);
    random_tokens(targets, ROWS * LENGTH, config->vocab_size, 2);
    *batch = (MegalodonBatch){.tokens = tokens, .targets = targets, .B = ROWS, .T = LENGTH, .dropout = true};
    return model_create(backend, config, &options, 7);
}

static void set_all(const MegalodonBackend *backend, MegalodonModel *model, const MegalodonConfig *config,
                    MegalodonKind kind, const char *name, float value) {
    MegalodonTensor tensor;
    must(megalodon_find_tensor(config, kind, 1, 1, 0, name, &tensor));
    float *values = must_allocate((size_t)tensor.size * sizeof *values);
    for (int64_t i = 0; i < tensor.size; i++) values[i] = value;
    must(backend->set(model, kind, name, values, MEGALODON_F32));
    free(values);
}

static void check_search(const MegalodonBackend *backend) {
    MegalodonConfig config = small_config();
    MegalodonBatch batch;
    MegalodonOptions options = {0};
    MegalodonLoss loss;
    char name[DIVERGENCE_NAME] = "nothing";
    config.dropout = 0.1;
    MegalodonModel *model = trained(backend, &config, &batch);
    must(backend->forward(model, &batch, &loss));
    must(backend->backward(model, 1));
    check(!divergence_in_parameters(backend, model, &config, name) &&
          !divergence_in_gradients(backend, model, &config, name), "%s: %s of a sound model", backend->name, name);
    set_all(backend, model, &config, MEGALODON_GRAD, "layers.1.mega.wz.weight", NAN);
    set_all(backend, model, &config, MEGALODON_GRAD, "layers.0.nffn.fc1.weight", INFINITY);
    check(divergence_in_gradients(backend, model, &config, name) &&
          strcmp(name, "the gradient of layers.1.mega.wz.weight") == 0, "%s: %s", backend->name, name);
    set_all(backend, model, &config, MEGALODON_PARAM, "layers.1.mega.gamma", -INFINITY);
    check(divergence_in_parameters(backend, model, &config, name) && strcmp(name, "the parameter layers.1.mega.gamma") == 0,
          "%s: %s", backend->name, name);
    backend->destroy(model);
    /* Weights that are finite, and too large for a product: all rows at once, and row by row where memory is short. */
    for (int pass = 0; pass < 2; pass++) {
        model = trained(backend, &config, &batch);
        set_all(backend, model, &config, MEGALODON_PARAM, "layers.1.mega.wv.weight", 1e38f);
        if (pass == 1) {
            MegalodonModel *probe = NULL;
            MegalodonMemory m;
            MegalodonOptions one = {.max_batch = 1, .max_length = LENGTH, .keep_activations = true};
            must(backend->create(&probe, &config, &one));
            backend->memory(probe, &m);
            options.max_bytes = m.parameters + m.activations + m.state + m.workspace + 4096;
            backend->destroy(probe);
        }
        strcpy(name, "nothing");
        check(divergence_in_forward(backend, &model, &config, &options, &batch, name) && model == NULL &&
              strcmp(name, "the activation layers.1.v_linear") == 0, "%s, pass %d: %s", backend->name, pass, name);
        options.max_bytes = 0;
    }
    model = trained(backend, &config, &batch);
    check(!divergence_in_forward(backend, &model, &config, &options, &batch, name), "%s: %s of a sound model",
          backend->name, name);
}

/* ---- limits ---- */

/* A norm above the limit changes nothing, one below it is used as without a limit. */
static void check_max_norm(const MegalodonBackend *backend) {
    MegalodonConfig config = small_config();
    MegalodonBatch batch;
    MegalodonAdamW adamw = {.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .step = 1};
    float before[2 * 12], after[3][2 * 12];
    double norm[3];
    for (int i = 0; i < 3; i++) {
        MegalodonModel *model = trained(backend, &config, &batch);
        must(backend->get(model, MEGALODON_PARAM, "layers.0.mega.gamma", before, MEGALODON_F32));
        must(backend->forward(model, &batch, NULL));
        must(backend->backward(model, 1e-2));
        adamw.max_norm = i == 0 ? 0 : i == 1 ? norm[0] * 1.0001 : norm[0] * 0.9999;
        must(backend->update(model, &adamw, &norm[i]));
        must(backend->get(model, MEGALODON_PARAM, "layers.0.mega.gamma", after[i], MEGALODON_F32));
        backend->destroy(model);
    }
    check(norm[1] == norm[0] && norm[2] == norm[0], "%s: the norm is %g, %g and %g", backend->name, norm[0], norm[1], norm[2]);
    check(memcmp(after[0], after[1], sizeof before) == 0, "%s: a norm below the limit is used otherwise", backend->name);
    check(memcmp(after[2], before, sizeof before) == 0, "%s: a norm above the limit changes weights", backend->name);
    check(memcmp(after[0], before, sizeof before) != 0, "%s: an update changes nothing", backend->name);
}

/* Hashes the loss and all gradients of a batch on new weights. */
static uint64_t gradients_hash(const MegalodonBackend *backend, const MegalodonConfig *config,
                               const MegalodonOptions *options) {
    int32_t tokens[ROWS * LENGTH];
    MegalodonBatch batch = {.tokens = tokens, .targets = tokens, .B = ROWS, .T = LENGTH, .dropout = true};
    MegalodonLoss loss;
    MegalodonModel *model = model_create(backend, config, options, 17);
    int count = megalodon_tensors(config, MEGALODON_PARAM, 1, 1, 0, NULL, 0);
    MegalodonTensor *params = must_allocate((size_t)count * sizeof *params);
    megalodon_tensors(config, MEGALODON_PARAM, 1, 1, 0, params, count);
    random_tokens(tokens, ROWS * LENGTH, config->vocab_size, 1);
    backend->zero_gradients(model);
    must(backend->forward(model, &batch, &loss));
    must(backend->backward(model, 1.0 / (ROWS * LENGTH)));
    uint64_t hash = 14695981039346656037u ^ (uint64_t)(loss.nll_sum * 1e6);
    for (int i = 0; i < count; i++) {
        size_t bytes = (size_t)params[i].size * sizeof(float);
        unsigned char *numbers = must_allocate(bytes);
        must(backend->get(model, MEGALODON_GRAD, params[i].name, numbers, MEGALODON_F32));
        for (size_t j = 0; j < bytes; j++) hash = (hash ^ numbers[j]) * 1099511628211u;
        free(numbers);
    }
    free(params);
    backend->destroy(model);
    return hash;
}

/* The bytes of a model with these options. */
static int64_t model_bytes(const MegalodonBackend *backend, const MegalodonConfig *config,
                           const MegalodonOptions *options) {
    MegalodonModel *model = NULL;
    MegalodonMemory m;
    must(backend->create(&model, config, options));
    backend->memory(model, &m);
    backend->destroy(model);
    return megalodon_total_memory(&m);
}

/* The least bytes in which a model can be had: a backend may keep more where there is memory. Each plan is checked:
 * it is the same when it is made again, and what is kept changes no bit. */
static int64_t least_bytes(const MegalodonBackend *backend, const MegalodonConfig *config, MegalodonOptions options) {
    MegalodonModel *model = NULL;
    int64_t bytes = model_bytes(backend, config, &options);
    uint64_t hash = gradients_hash(backend, config, &options);
    for (;;) {
        check(model_bytes(backend, config, &options) == bytes, "%s: another plan for the same model", backend->name);
        check(gradients_hash(backend, config, &options) == hash, "%s: other gradients in %lld bytes", backend->name,
              (long long)bytes);
        options.max_bytes = bytes - 1;
        if (backend->create(&model, config, &options)) return bytes;
        backend->destroy(model);
        int64_t fewer = model_bytes(backend, config, &options);
        if (fewer >= bytes) return bytes; /* not every backend counts to the byte */
        bytes = fewer;
    }
}

/* A model that needs more than it may have is refused, and the batch that is named does fit. */
static void check_max_bytes(const MegalodonBackend *backend) {
    MegalodonConfig config = small_config(), wide = small_config();
    MegalodonOptions options = {.max_batch = 64, .max_length = 32, .training = true, .carry = true};
    MegalodonModel *model = NULL;
    int64_t whole = least_bytes(backend, &config, options);
    options.precision = MEGALODON_BF16_MIXED;
    if (backend != &megalodon_cpu) least_bytes(backend, &config, options);
    /* A GPU may gate in the products' epilogues. Many numbers, since few have other bits when factors change places. */
    wide.model_dim = 64, wide.value_dim = wide.ffn_hidden_dim = 1024, wide.swiglu = true;
    if (backend != &megalodon_cpu) least_bytes(backend, &wide, options);
    options.precision = MEGALODON_FP32;
    options.max_bytes = whole;
    const char *error = backend->create(&model, &config, &options);
    check(!error, "%s: %s", backend->name, error ? error : "");
    if (!error) backend->destroy(model);
    for (int64_t bytes = whole - 65536; bytes > 1; bytes /= 2) {
        options.max_batch = 64;
        options.max_bytes = bytes;
        error = backend->create(&model, &config, &options);
        if (!check(error && strstr(error, "bytes) for a batch of 64 x 32 tokens"), "%s: with %lld bytes: %s", backend->name,
                   (long long)bytes, error ? error : "created")) continue;
        const char *hint = strstr(error, "a batch of ");          /* the first one names the whole batch */
        hint = hint ? strstr(hint + 1, "; a batch of ") : NULL;
        check((hint != NULL) != (strstr(error, "not even one row") != NULL), "%s: %s", backend->name, error);
        if (!hint) continue;
        int rows = atoi(hint + strlen("; a batch of "));
        for (int i = 1; i <= 2; i++) {                            /* it fits, and twice as many rows do not */
            options.max_batch = i * rows;
            error = backend->create(&model, &config, &options);
            check((error == NULL) == (i == 1), "%s: %d rows in %lld bytes: %s", backend->name, i * rows, (long long)bytes,
                  error ? error : "created");
            if (!error) backend->destroy(model);
        }
    }
    options = (MegalodonOptions){.max_batch = 1 << 30, .max_length = 1 << 30, .training = true};
    expect_error(backend->create(&model, &config, &options), "bytes for a single tensor");
    check(memory_available() >= 0, "the memory that is free: %lld", (long long)memory_available());
}

/* ---- what is not saved ---- */

static void check_save(void) {
    const MegalodonBackend *backend = &megalodon_cpu;
    MegalodonConfig config = small_config();
    MegalodonBatch batch;
    MegalodonModel *model = trained(backend, &config, &batch);
    SafetensorsPair facts[] = {{NULL, NULL}};
    char path[SAFETENSORS_MAX_PATH], latest[SAFETENSORS_MAX_PATH], before[SAFETENSORS_MAX_PATH];
    must(checkpoint_join(path, folder, "run"));
    must(checkpoint_write(path, 1, 1, backend, model, &config, facts, false));
    must(checkpoint_directory(path, before));
    set_all(backend, model, &config, MEGALODON_MOMENT2, "layers.1.mega.wz.weight", INFINITY);
    expect_error(checkpoint_write(path, 2, 1, backend, model, &config, facts, false),
                 "tensor moment2.layers.1.mega.wz.weight: number 0 is not finite");
    set_all(backend, model, &config, MEGALODON_PARAM, "embed.weight", NAN);
    expect_error(checkpoint_write(path, 2, 1, backend, model, &config, facts, false), "tensor embed.weight: number 0");
    must(checkpoint_directory(path, latest));
    check(strcmp(latest, before) == 0, "a checkpoint that is not finite became the latest: %s", latest);
    MegalodonModel *again = trained(backend, &config, &batch);
    const char *error = checkpoint_load(path, backend, again, &config);
    check(!error, "the checkpoint before: %s", error ? error : "");
    backend->destroy(model);
    backend->destroy(again);
}

/* ---- requests that a model cannot answer ---- */

static void check_requests(const MegalodonBackend *backend) {
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 2, .max_length = 8, .training = true}, wrong = options;
    MegalodonModel *model = model_create(backend, &config, &options, 3), *none = NULL;
    int32_t tokens[16];
    float three[3] = {1, -0.1f, NAN}, *embed = must_allocate(sizeof *embed * 8192);
    uint16_t half[8192];
    const bool rows[2] = {true, false};
    random_tokens(tokens, 16, config.vocab_size, 1);
    MegalodonBatch batch = {.tokens = tokens, .B = 2, .T = 8};
    must(backend->forward(model, &batch, NULL));
    batch.carry = true;
    expect_error(backend->forward(model, &batch, NULL), "made without `carry`");
    expect_error(backend->reset_rows(model, rows), "no state whose rows could start anew");
    expect_error(backend->set(model, MEGALODON_ACT, "embed", embed, MEGALODON_F32), "is a result and cannot be set");
    expect_error(backend->get(model, MEGALODON_STATE, "count", embed, MEGALODON_I64), "made without carry");
    expect_error(backend->get(model, MEGALODON_PARAM, "embed.weight", embed, MEGALODON_I64), "not of the type asked for");
    expect_error(backend->set(model, MEGALODON_PARAM, "embed.weight", embed, MEGALODON_I64), "cannot be set from");
    /* bfloat16: what comes out goes in again and is the same; a NaN stays one. */
    size_t size = (size_t)config.vocab_size * (size_t)config.model_dim;
    check(size <= 8192, "the model is larger than this test");
    must(backend->get(model, MEGALODON_PARAM, "embed.weight", embed, MEGALODON_F32));
    memcpy(embed, three, sizeof three);
    must(backend->set(model, MEGALODON_PARAM, "embed.weight", embed, MEGALODON_F32));
    must(backend->get(model, MEGALODON_PARAM, "embed.weight", half, MEGALODON_BF16));
    check(half[0] == 0x3F80 && half[1] == 0xBDCD && (half[2] & 0x7FFF) > 0x7F80, "1, -0.1 and NaN are %04x %04x %04x",
          half[0], half[1], half[2]);
    must(backend->set(model, MEGALODON_PARAM, "embed.weight", half, MEGALODON_BF16));
    must(backend->get(model, MEGALODON_PARAM, "embed.weight", embed, MEGALODON_F32));
    check(embed[0] == 1 && embed[1] == -0.10009765625f && isnan(embed[2]), "they come back as %g %.9g %g",
          (double)embed[0], (double)embed[1], (double)embed[2]);
    backend->destroy(model);
    options.carry = true;
    model = model_create(backend, &config, &options, 3);
    expect_error(backend->reset_rows(model, rows), "no state whose rows could start anew");
    batch.carry = false;
    must(backend->forward(model, &batch, NULL));
    batch.carry = true;
    batch.B = 1;
    expect_error(backend->forward(model, &batch, NULL), "the state has 2 rows and the batch 1");
    expect_error(backend->get(model, MEGALODON_STATE, "count", embed, MEGALODON_F32), "not of the type asked for");
    const int64_t count[3] = {0, 0, 0};
    expect_error(backend->start_state(model, 3, count), "a state of 3 rows does not fit a model made for 2");
    backend->destroy(model);
    wrong.max_batch = 0;
    expect_error(backend->create(&none, &config, &wrong), "both must be at least 1");
    wrong = options;
    wrong.precision = MEGALODON_BF16_MIXED;
    expect_error(backend->create(&none, &config, &wrong), "computes in fp32; bf16 needs the CUDA backend");
    free(embed);
}

/* ---- the lock ---- */

static int lock_in_child(const char *run) {
    int status = 0;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        FolderLock lock = {.descriptor = -1};
        const char *error = lock_take(&lock, run);
        char parent[64];
        snprintf(parent, sizeof parent, "another run (process %ld)", (long)getppid());
        _exit(!error ? 0 : strstr(error, parent) ? 1 : 2);
    }
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 99;
}

static void check_lock(void) {
    FolderLock lock = {.descriptor = -1};
    char run[SAFETENSORS_MAX_PATH], moved[SAFETENSORS_MAX_PATH];
    must(checkpoint_join(run, folder, "a/b/locked"));
    must(checkpoint_join(moved, folder, "moved"));
    must(lock_take(&lock, run));
    if (lock.impossible) {
        test_skip("locks: the file system of /tmp knows none");
        return;
    }
    check(lock_in_child(run) == 1, "a folder that is locked can be locked again");
    must(lock_keep(&lock, run));
    check(lock_in_child(run) == 1, "keeping a lock gives it back");
    lock_release(&lock);
    check(lock_in_child(run) == 0, "a lock that was given back is still there");
    check(lock_in_child(run) == 0, "a process that ended keeps its lock");
    must(lock_take(&lock, run));
    if (rename(run, moved) != 0) must("a folder cannot be moved");
    must(lock_keep(&lock, run));
    check(lock_in_child(run) == 1, "a folder that was made again is not locked");
    check(lock_in_child(moved) == 0, "the old folder is still locked");
    lock_release(&lock);
    expect_error(lock_take(&lock, "/dev/null/run"), "cannot create the directory");
    expect_error(lock_take(&lock, "/proc"), "cannot write in this folder");
}

int main(void) {
    test_begin("guards");
    if (!mkdtemp(folder)) must("cannot create a folder in /tmp");
    check_guard();
    check_search(&megalodon_cpu_double);
    for (int i = 0; backend_list()[i]; i++) {
        if (backend_list()[i]->unavailable && backend_list()[i]->unavailable()) {
            test_skip(backend_list()[i]->unavailable());
            continue;
        }
        check_search(backend_list()[i]);
        check_max_norm(backend_list()[i]);
        check_max_bytes(backend_list()[i]);
    }
    check_requests(&megalodon_cpu);
    check_requests(&megalodon_cpu_double);
    check_save();
    check_lock();
    char command[64];
    snprintf(command, sizeof command, "rm -r %s", folder);
    if (system(command) != 0) must(command);
    return test_end();
}
