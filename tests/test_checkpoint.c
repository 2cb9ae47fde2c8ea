/* test_checkpoint.c - models and runs on disk: what is saved comes back bit for bit, what does not fit is refused with
 * a sentence that says why, and a write that is killed at any of its system calls leaves a whole checkpoint.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <dirent.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

/* Every call that changes the disk is counted, and the process ends before the one that is chosen, as if it was killed
 * there: no buffer is flushed and no file is cleaned up. */
static int calls, last_call = -1;
static void count_call(void) {
    if (calls++ == last_call) _exit(99);
}
static int counted_rename(const char *from, const char *to) { count_call(); return rename(from, to); }
static int counted_fsync(int descriptor) { count_call(); return fsync(descriptor); }
static int counted_mkdir(const char *path, mode_t mode) { count_call(); return mkdir(path, mode); }
static int counted_unlink(const char *path) { count_call(); return unlink(path); }
static int counted_rmdir(const char *path) { count_call(); return rmdir(path); }
static FILE *counted_fopen(const char *path, const char *mode) { count_call(); return fopen(path, mode); }
static size_t counted_fwrite(const void *bytes, size_t size, size_t count, FILE *file) {
    count_call();
    return fwrite(bytes, size, count, file);
}
#define rename counted_rename
#define fsync counted_fsync
#define mkdir counted_mkdir
#define unlink counted_unlink
#define rmdir counted_rmdir
#define fopen counted_fopen
#define fwrite counted_fwrite

#include "lib/checkpoint.h"
#include "tests/model.h"
#include "tests/test.h"

static char folder[] = "/tmp/test_checkpoint.XXXXXX";
static const MegalodonBackend *const backend = &megalodon_cpu;

/* A path in the test's folder; the last few stay valid. */
static const char *in_folder(const char *name) {
    static char paths[16][256];
    static int next;
    char *path = paths[next++ % 16];
    snprintf(path, 256, "%s/%s", folder, name);
    return path;
}

/* A copy of all parameters and moments of a model, one after the other; free it. */
static float *all_values(MegalodonModel *model, const MegalodonConfig *config, size_t *size) {
    static const MegalodonKind kinds[] = {MEGALODON_PARAM, MEGALODON_MOMENT1, MEGALODON_MOMENT2};
    MegalodonTensor tensors[MODEL_MAX_TENSORS];
    int count = megalodon_tensors(config, MEGALODON_PARAM, 1, 1, 0, tensors, MODEL_MAX_TENSORS);
    float *values = must_allocate(3 * (size_t)megalodon_num_parameters(config) * sizeof *values), *end = values;
    for (int k = 0; k < 3; k++)
        for (int i = 0; i < count; end += tensors[i++].size)
            must(backend->get(model, kinds[k], tensors[i].name, end, MEGALODON_F32));
    *size = (size_t)(end - values) * sizeof *values;
    return values;
}

static MegalodonModel *new_model(const MegalodonConfig *config, uint64_t seed) {
    MegalodonOptions options = {.max_batch = 2, .max_length = 16, .training = true, .carry = true};
    return model_create(backend, config, &options, seed);
}

/* One step of training on a batch that is a function of `step`. */
static void train(MegalodonModel *model, const MegalodonConfig *config, int64_t step) {
    int32_t tokens[32], targets[32];
    random_tokens(tokens, 32, config->vocab_size, (uint64_t)step);
    random_tokens(targets, 32, config->vocab_size, (uint64_t)step + 1000);
    MegalodonBatch batch = {.tokens = tokens, .targets = targets, .B = 2, .T = 16, .carry = step > 1};
    MegalodonAdamW adamw = {.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .clip = 1,
                            .step = step};
    MegalodonLoss loss;
    double norm;
    backend->zero_gradients(model);
    must(backend->forward(model, &batch, &loss));
    must(backend->backward(model, 1. / 32));
    must(backend->update(model, &adamw, &norm));
}

/* Checks that an error was reported and says `part`. */
static void expect_error(const char *error, const char *part) {
    if (check(error != NULL, "expected an error with <%s>, found none", part))
        check(strstr(error, part) != NULL, "expected <%s> in <%s>", part, error);
}

static void test_config(void) {
    static const struct { const char *from, *to, *part; } changes[] = {
        {"\"num_layers\":2", "\"num_layers\":2.5", "num_layers to be an integer"},
        {"\"num_layers\":2", "\"num_layers\":99999999999", "num_layers to be an integer"},
        {"\"num_layers\":2", "\"num_layers\":\"2\"", "found a string"},
        {"\"num_layers\":2", "\"layers\":2", "unknown key \"layers\""},
        {"\"num_layers\":2,", "", "\"num_layers\" is missing"},
        {"\"num_layers\":2", "\"num_layers\":2,\"num_layers\":2", "twice"},
        {"\"num_layers\":2", "\"num_layers\":0", "config: "},
        {"\"num_heads\":2", "\"num_heads\":5", "config: "},
        {"\"swiglu\":true", "\"swiglu\":1", "swiglu to be true or false"},
        {"\"swiglu\":true", "\"swiglu\":null", "found null"},
        {"\"norm_eps\":1e-05", "\"norm_eps\":false", "norm_eps to be a number"},
        {"\"norm_eps\":1e-05", "\"norm_eps\":1e999", "too large"},
        {"\"dropout\":0.1,", "", NULL},
        {"\"rope_base\":100000", "\"rope_base\":1e4", NULL},
    };
    MegalodonConfig config = small_config(), read;
    config.dropout = 0.1;
    config.norm_eps = 1e-5;
    JsonWriter w = {0};
    checkpoint_put_config(&w, &config);
    if (!check(!w.error, "%s", w.error)) return;
    const char *error = checkpoint_config_parse(w.text, &read);
    check(error == NULL, "%s in %s", error, w.text);
#define X(type, field, default_value, meaning) check(config.field == read.field, "%s changed", #field);
    MEGALODON_CONFIG_FIELDS(X)
#undef X
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        char text[2048], *place = strstr(w.text, changes[i].from);
        if (!check(place != NULL, "no %s in %s", changes[i].from, w.text)) continue;
        snprintf(text, sizeof text, "%.*s%s%s", (int)(place - w.text), w.text, changes[i].to,
                 place + strlen(changes[i].from));
        error = checkpoint_config_parse(text, &read);
        if (changes[i].part) expect_error(error, changes[i].part);
        else check(error == NULL, "%s: %s", changes[i].to, error);
    }
    expect_error(checkpoint_config_parse("[]", &read), "expected an object");
    expect_error(checkpoint_config_parse("", &read), "line 1");
    free(w.text);
}

/* A model file: the same bits come back; a model of other sizes and damaged files are refused and change nothing. */
static void test_model(void) {
    MegalodonConfig config = small_config(), other = config, read;
    MegalodonModel *model = new_model(&config, 1), *copy = new_model(&config, 2);
    const char *path = in_folder("model.safetensors");
    must(checkpoint_save(path, backend, model, &config));
    must(checkpoint_read_config(path, &read));
    check(read.model_dim == config.model_dim && read.vocab_size == config.vocab_size, "the configuration");
    size_t size;
    float *want = all_values(model, &config, &size), *before = all_values(copy, &config, &size), *after;
    other.ffn_hidden_dim += 4;
    MegalodonModel *wider = new_model(&other, 3);
    expect_error(checkpoint_load(path, backend, wider, &other), "tensor layers.0.nffn.fc1.weight: expected "
                 "shape [32,24], found [28,24]");
    backend->destroy(wider);
    other = config;
    other.share_emb = true;
    MegalodonModel *tied = new_model(&other, 3);
    expect_error(checkpoint_load(path, backend, tied, &other), "tensor output.output.weight: the configuration");
    must(checkpoint_save(in_folder("tied"), backend, tied, &other));
    backend->destroy(tied);
    expect_error(checkpoint_load(in_folder("tied"), backend, copy, &config), "found no such tensor");
    expect_error(checkpoint_load(in_folder("none"), backend, copy, &config), "cannot open");
    expect_error(checkpoint_load("tests/golden/base.safetensors", backend, copy, &config), "checkpoint-1");
    after = all_values(copy, &config, &size);
    check(memcmp(before, after, size) == 0, "a refused file changed the model");
    free(after);
    must(checkpoint_load(folder, backend, copy, &config));       /* the folder that holds model.safetensors */
    after = all_values(copy, &config, &size);
    check(memcmp(want, after, size) == 0, "a saved and loaded model differs");
    unlink(in_folder("tied"));
    unlink(path);
    free(want);
    free(before);
    free(after);
    backend->destroy(model);
    backend->destroy(copy);
}

/* The state goes to a file and back; a file whose tensors do not fit is refused, however many rows it claims. */
static void test_state(void) {
    MegalodonConfig config = small_config();
    MegalodonModel *model = new_model(&config, 1), *copy = new_model(&config, 1);
    const char *path = in_folder("state");
    expect_error(checkpoint_state_save(path, backend, model, &config), "has no state to save");
    train(model, &config, 1);
    must(checkpoint_state_save(path, backend, model, &config));
    must(checkpoint_state_load(path, backend, copy, &config));
    double a[8], b[8];
    must(backend->get(model, MEGALODON_STATE, "final_norm.var", a, MEGALODON_F64));
    must(backend->get(copy, MEGALODON_STATE, "final_norm.var", b, MEGALODON_F64));
    check(memcmp(a, b, sizeof a) == 0, "a saved and loaded statistic differs");
    expect_error(checkpoint_load(path, backend, copy, &config), "expected the format");
    static const int64_t counts[2] = {3, -1};
    static const double mean[8];
    SafetensorsPair metadata[] = {{"format", CHECKPOINT_STATE_FORMAT}, {NULL, NULL}};
    SafetensorsTensor tensors[] = {
        {.name = "count", .dtype = SAFETENSORS_I64, .ndim = 1, .dims = {1}, .size = 1, .data = counts},
        {.name = "final_norm.mean", .dtype = SAFETENSORS_F64, .ndim = 2, .dims = {2000000000, 0}, .data = mean}};
    must(safetensors_write(path, tensors, 2, metadata, NULL, NULL));
    expect_error(checkpoint_state_load(path, backend, copy, &config), "expected shape [rows,4]");
    tensors[1].dims[0] = 2;
    tensors[1].dims[1] = 4;
    tensors[1].size = 8;
    must(safetensors_write(path, tensors, 2, metadata, NULL, NULL));
    expect_error(checkpoint_state_load(path, backend, copy, &config), "found no such tensor");
    tensors[0].dims[0] = tensors[0].size = 2;
    must(safetensors_write(path, tensors, 2, metadata, NULL, NULL));
    expect_error(checkpoint_state_load(path, backend, copy, &config), "found -1");
    tensors[0].dtype = SAFETENSORS_F64;
    must(safetensors_write(path, tensors, 2, metadata, NULL, NULL));
    expect_error(checkpoint_state_load(path, backend, copy, &config), "expected dtype I64");
    unlink(path);
    backend->destroy(model);
    backend->destroy(copy);
}

/* Number of entries of a folder; those named in the list are counted in *listed. */
static int entries(const char *path, const char *const *list, int *listed) {
    int count = 0;
    DIR *directory = opendir(path);
    *listed = 0;
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        if (entry->d_name[0] == '.') continue;
        count++;
        for (int i = 0; list[i]; i++) *listed += strcmp(entry->d_name, list[i]) == 0;
    }
    if (directory) closedir(directory);
    return count;
}

/* Training interrupted, saved with its state and resumed in a fresh model equals training in one go. */
static void test_resume(void) {
    MegalodonConfig config = small_config();
    MegalodonModel *straight = new_model(&config, 5), *resumed = new_model(&config, 6);
    SafetensorsPair facts[] = {{"seed", "18446744073709551615"}, {"best", "0.10000000000000001"}, {"note", "x 1"},
                               {"debt", "-1"}, {NULL, NULL}};
    const char *run = in_folder("a/b/run"), *text;
    Safetensors trainer;
    for (int64_t step = 1; step <= 3; step++) {
        train(straight, &config, step);
        must(checkpoint_write(run, step, 2, backend, straight, &config, facts, true));
    }
    int listed, count = entries(run, (const char *const[]){"latest", "step-00000002", "step-00000003", NULL}, &listed);
    check(count == 3 && listed == 3, "%d entries in the run, %d of the expected 3", count, listed);
    must(checkpoint_resume(run, backend, resumed, &config, &trainer));
    int64_t step = 0;
    uint64_t seed = 0;
    double best = 0;
    check(!checkpoint_fact_int64(&trainer, "step", &step) && step == 3, "step %lld", (long long)step);
    check(!checkpoint_fact_uint64(&trainer, "seed", &seed) && seed == UINT64_MAX, "the seed");
    check(!checkpoint_fact_double(&trainer, "best", &best) && best == (double)0.1, "the best loss");
    check(!checkpoint_fact(&trainer, "note", &text) && !strcmp(text, "x 1"), "a string");
    expect_error(checkpoint_fact_int64(&trainer, "seed", &step), "to be an integer, found");
    expect_error(checkpoint_fact_int64(&trainer, "note", &step), "to be an integer, found");
    expect_error(checkpoint_fact_double(&trainer, "none", &best), "found none");
    check(!checkpoint_fact_count(&trainer, "step", 3, &step) && step == 3, "step 3 of 3");
    expect_error(checkpoint_fact_count(&trainer, "step", 2, &step), "to be from 0 to 2, found 3");
    expect_error(checkpoint_fact_count(&trainer, "seed", 2, &step), "to be an integer, found");
    expect_error(checkpoint_fact_count(&trainer, "debt", 2, &step), "to be from 0 to 2, found -1");
    safetensors_close(&trainer);
    for (step = 4; step <= 6; step++) {
        train(straight, &config, step);
        train(resumed, &config, step);
    }
    size_t size;
    float *a = all_values(straight, &config, &size), *b = all_values(resumed, &config, &size);
    check(memcmp(a, b, size) == 0, "a resumed run differs from one that was not interrupted");
    free(a);
    free(b);
    must(checkpoint_write(run, 3, 9, backend, resumed, &config, facts, false));          /* a step written twice */
    count = entries(run, (const char *const[]){"step-00000003-2", NULL}, &listed);
    check(count == 4 && listed == 1, "%d entries, %d of them the second step 3", count, listed);
    must(checkpoint_resume(run, backend, straight, &config, &trainer));
    check(strstr(trainer.path, "step-00000003-2") != NULL, "latest is %s", trainer.path);
    safetensors_close(&trainer);
    char command[512];
    snprintf(command, sizeof command, "cp %s/step-00000002/trainer.safetensors %s/step-00000003", run, run);
    if (system(command) == 0)
        expect_error(checkpoint_resume(in_folder("a/b/run/step-00000003"), backend, straight, &config, &trainer),
                     "trainer.safetensors is of step 2, but model.safetensors of 3");
    FILE *latest = fopen(in_folder("a/b/run/latest"), "wb");
    if (latest) fprintf(latest, "../../somewhere\n"), fclose(latest);
    expect_error(checkpoint_resume(run, backend, straight, &config, &trainer), "expected the name of a step");
    latest = fopen(in_folder("a/b/run/latest"), "wb");
    if (latest) fprintf(latest, "step-00000777"), fclose(latest);
    expect_error(checkpoint_resume(run, backend, straight, &config, &trainer), "but there is no");
    expect_error(checkpoint_resume(run, backend, straight, &config, &trainer),
                 "the newest step that is there is ");
    expect_error(checkpoint_resume(run, backend, straight, &config, &trainer), "/step-00000003-2");
    expect_error(checkpoint_resume(in_folder("a"), backend, straight, &config, &trainer), "holds no checkpoint");
    expect_error(checkpoint_write("/dev/null/x", 1, 1, backend, straight, &config, facts, false), "cannot create");
    snprintf(command, sizeof command, "rm -r %s", in_folder("a"));
    check(system(command) == 0, "%s", command);
    backend->destroy(straight);
    backend->destroy(resumed);
}

/* The model that the killed run saves at a step is known from the step alone. */
static bool holds(MegalodonModel *model, const MegalodonConfig *config, int64_t step) {
    MegalodonModel *want = new_model(config, (uint64_t)step);
    size_t size;
    float *a = all_values(want, config, &size), *b = all_values(model, config, &size);
    bool same = memcmp(a, b, size) == 0;
    free(a);
    free(b);
    backend->destroy(want);
    return same;
}

/* Steps 1 and 2 are there; a process that writes step 3 and deletes step 1 is killed before its k-th call, for every k.
 * What is then resumed is step 2 or step 3, whole, and the next write leaves nothing of the killed one. */
static void test_kill(void) {
    MegalodonConfig config = small_config();
    config.num_layers = 1;
    SafetensorsPair facts[] = {{NULL, NULL}};
    MegalodonModel *models[5], *resumed = new_model(&config, 99);
    for (int i = 0; i < 5; i++) models[i] = new_model(&config, (uint64_t)i);
    const char *run = in_folder("run");
    const CheckpointTokenizer words = {"{\"model\": \"as it was read\"}\n", "0123456789abcdef"};
    int old = 0, new = 0, status = 0;
    for (int k = 0; k < 1000; k++) {
        for (int64_t step = 1; step <= 2; step++)
            must(checkpoint_write(run, step, 2, backend, models[step], &config, facts, false));
        fflush(stdout);
        pid_t child = fork();
        if (child < 0) die("cannot fork");
        if (child == 0) {
            calls = 0;
            last_call = k;
            _exit(checkpoint_write_with(run, 3, 2, backend, models[3], &config, facts, false, &words) ? 1 : 0);
        }
        waitpid(child, &status, 0);
        Safetensors trainer;
        int64_t step = 0;
        const char *error = checkpoint_resume(run, backend, resumed, &config, &trainer);
        if (check(error == NULL, "killed before call %d: %s", k, error)) {
            error = checkpoint_fact_int64(&trainer, "step", &step);
            check(!error && (step == 2 || step == 3) && holds(resumed, &config, step),
                  "killed before call %d: what is there is not step 2 or 3", k);
            /* The tokenizer of step 3 is there with it, whole, and the model names it; step 2 has none. */
            char path[SAFETENSORS_MAX_PATH], hash[CHECKPOINT_HASH], *text = NULL;
            size_t length = 0;
            bool there = false;
            must(checkpoint_tokenizer(run, path, &there, hash));
            check(there == (step == 3) && !strcmp(hash, there ? words.hash : ""), "killed before call %d: step %d %s a "
                  "tokenizer, \"%s\"", k, (int)step, there ? "has" : "lacks", hash);
            if (there) must(json_read_text(path, &text, &length));
            check(!there || !strcmp(text, words.json), "killed before call %d: the tokenizer is not whole", k);
            free(text);
            old += step == 2;
            new += step == 3;
            safetensors_close(&trainer);
        }
        must(checkpoint_write(run, 4, 1, backend, models[4], &config, facts, false));
        int listed, count = entries(run, (const char *const[]){"latest", "step-00000004", NULL}, &listed);
        check(count == 2 && listed == 2, "killed before call %d: %d entries after the next write", k, count);
        char command[512];
        snprintf(command, sizeof command, "rm -r %s", run);
        if (system(command) != 0) die(command);
        if (WIFEXITED(status) && WEXITSTATUS(status) == 0) break;        /* it came to its end */
        check(WIFEXITED(status) && WEXITSTATUS(status) == 99, "killed before call %d: the writer failed by itself", k);
    }
    check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the writer never came to its end");
    check(old > 20 && new > 3, "%d kills left the old step, %d the new one: were the calls counted?", old, new);
    for (int i = 0; i < 5; i++) backend->destroy(models[i]);
    backend->destroy(resumed);
}

int main(void) {
    test_begin("checkpoint");
    if (!mkdtemp(folder)) die("cannot create a folder in /tmp");
    test_config();
    test_model();
    test_state();
    test_resume();
    test_kill();
    rmdir(folder);
    return test_end();
}
