/* test_damage.c - every cut and every changed bit in the files that programs read.
 *
 * A checkpoint's model, a run's moments, a state and a token file are cut after every byte of their headers, and each
 * bit of the headers is changed, one at a time; of the data, which checksums protect, every so many bits. The library
 * then either refuses the file with a sentence that names it, for which the programs end with status 1, or has loaded
 * exactly what was written. What a file could be taken for is never loaded. The numbers of both are printed.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "../lib/checkpoint.h"
#include "../lib/dataset.h"
#include "model.h"
#include "test.h"

#include <fcntl.h>
#include <unistd.h>

static char folder[] = "/tmp/test_damage_XXXXXX", path[64];
static const MegalodonBackend *const backend = &megalodon_cpu;
static MegalodonConfig config;
static MegalodonModel *model;            /* what files are loaded into            */
static float *expected, *found;          /* the numbers that a file holds         */
static size_t numbers;                   /* how many                              */
static float logits[2 * 31];             /* of a state's two rows                 */
static char hash[CHECKPOINT_HASH] = "0123456789abcdef";

/* MEGALODON_TEST_SHORT is set under sanitizers, which make everything several times slower: fewer bits then. */
static int stride(int usual) { return getenv("MEGALODON_TEST_SHORT") ? 16 * usual + 1 : usual; }

/* Copies all tensors of a kind out of the model; returns where they end. */
static float *fetch_all(MegalodonKind kind, int B, int n, float *out) {
    MegalodonTensor list[MODEL_MAX_TENSORS];
    int count = megalodon_tensors(&config, kind, B, 1, n, list, MODEL_MAX_TENSORS);
    for (int i = 0; i < count; out += list[i++].size) {
        int64_t tokens[2];
        if (strcmp(list[i].name, "count") != 0) {
            must(backend->get(model, kind, list[i].name, out, MEGALODON_F32));
            continue;
        }
        must(backend->get(model, kind, list[i].name, tokens, MEGALODON_I64));
        for (int b = 0; b < B; b++) out[b] = (float)tokens[b];
    }
    return out;
}

/* ---- four kinds of files: how each is loaded, and what it holds ---- */

static const char *load_model(void) {
    MegalodonConfig own;
    const char *error = checkpoint_read_config(path, &own);
    if (!error) error = checkpoint_load(path, backend, model, &config);
    if (error) return error;
    char difference[800];
    checkpoint_config_difference(&own, &config, difference, sizeof difference);
    if (*difference) must(errorf("another configuration was read: %s", difference));
    numbers = (size_t)(fetch_all(MEGALODON_PARAM, 1, 0, found) - found);
    return NULL;
}

static const SafetensorsPair facts[] = {{"step", "7"}, {"note", "a \"b\""}, {NULL, NULL}};

static const char *load_trainer(void) {
    Safetensors trainer;
    const char *error = checkpoint_trainer_load(path, backend, model, &config, &trainer), *text;
    if (error) return error;
    for (int i = 0; facts[i].key && !error; i++) {
        error = checkpoint_fact(&trainer, facts[i].key, &text);
        if (!error && strcmp(text, facts[i].value) != 0) must(errorf("the fact %s was read as %s", facts[i].key, text));
    }
    safetensors_close(&trainer);
    float *end = fetch_all(MEGALODON_MOMENT1, 1, 0, found);
    numbers = (size_t)(fetch_all(MEGALODON_MOMENT2, 1, 0, end) - found);
    return error;
}

static const char *load_state(void) {
    int B, n;
    const char *error = checkpoint_state_resume(path, backend, model, &config, hash, logits);
    if (error) return error;
    backend->state_shape(model, &B, &n);
    float *end = fetch_all(MEGALODON_STATE, B, n, found);
    memcpy(end, logits, sizeof logits);
    numbers = (size_t)(end - found) + 2 * 31;
    return NULL;
}

static const char *load_tokens(void) {
    Dataset data;
    int32_t tokens[64];
    const char *error = dataset_open(&data, path, 1000);
    if (error) return error;
    numbers = (size_t)(data.size < 64 ? data.size : 64);
    error = dataset_window(&data, 0, (int64_t)numbers, tokens);
    for (size_t i = 0; i < numbers; i++) found[i] = (float)tokens[i];
    dataset_close(&data);
    return error;
}

/* ---- damage ---- */

typedef struct Tally { long refused, same, other, nameless; } Tally;

/* Loads the file as it is now, and counts what happened. */
static void load_damaged(Tally *tally, const char *(*load)(void), size_t want) {
    memset(found, 0xA5, want * sizeof *found);               /* nothing of the last load can pass for this one's */
    const char *error = load();
    if (error) {
        tally->refused++;
        tally->nameless += strstr(error, path) == NULL;
    } else if (numbers == want && memcmp(found, expected, want * sizeof *found) == 0) {
        tally->same++;
    } else {
        tally->other++;
    }
}

/* Changes each bit of bytes [first, last) of the file, `every` bits apart. */
static Tally flip_bits(const char *(*load)(void), size_t want, int descriptor, size_t first, size_t last, int every) {
    Tally tally = {0};
    for (size_t bit = 8 * first; bit < 8 * last; bit += (size_t)every) {
        unsigned char good, bad;
        if (pread(descriptor, &good, 1, (off_t)(bit / 8)) != 1) must("a byte cannot be read");
        bad = (unsigned char)(good ^ 1 << bit % 8);
        if (pwrite(descriptor, &bad, 1, (off_t)(bit / 8)) != 1) must("a byte cannot be written");
        load_damaged(&tally, load, want);
        if (pwrite(descriptor, &good, 1, (off_t)(bit / 8)) != 1) must("a byte cannot be written");
    }
    return tally;
}

/* Damages a file of `header` bytes before its data in every way. A bit that changes no meaning need not be noticed: in
 * the key "checksum" itself, without which the rest is as it was. */
static void check_damage(const char *name, const char *(*load)(void), size_t header, int data_stride) {
    struct stat info;
    must(load());
    size_t want = numbers;
    memcpy(expected, found, want * sizeof *found);
    int descriptor = open(path, O_RDWR);
    if (descriptor < 0 || fstat(descriptor, &info) != 0) must("the file cannot be opened");
    size_t size = (size_t)info.st_size;
    Tally flips = flip_bits(load, want, descriptor, 0, header, stride(1)), data = {0}, cuts = {0};
    check(flips.refused > 0 && flips.other == 0 && flips.nameless == 0, "%s: of the header's bits, %ld changed what "
          "was loaded and %ld errors named no file", name, flips.other, flips.nameless);
    if (data_stride > 0) {
        data = flip_bits(load, want, descriptor, header, size, stride(data_stride));
        check(data.refused > 0 && data.same == 0 && data.other == 0 && data.nameless == 0, "%s: of the data's bits, %ld "
              "were not noticed, %ld changed what was loaded and %ld errors named no file", name, data.same, data.other,
              data.nameless);
    }
    load_damaged(&cuts, load, want);
    check(cuts.same == 1, "%s: the undamaged file does not load", name);
    cuts = (Tally){0};
    for (size_t length = size; length-- > 0;) {
        if (length > header && length < size - 1) length = header;
        if (ftruncate(descriptor, (off_t)length) != 0) must("a file cannot be cut");
        load_damaged(&cuts, load, want);
    }
    check(cuts.refused == (long)header + 2 - (size == header + 1) && cuts.same + cuts.other + cuts.nameless == 0,
          "%s: of the cuts, %ld were refused, %ld not, and %ld errors named no file", name, cuts.refused,
          cuts.same + cuts.other, cuts.nameless);
    close(descriptor);
    printf("%s: %ld cuts refused; bits of the header: %ld refused, %ld without a meaning; of the data: %ld refused\n",
           name, cuts.refused, flips.refused, flips.same, data.refused);
}

/* Bytes before the data of a safetensors file. */
static size_t header_bytes(void) {
    Safetensors file;
    must(safetensors_open(&file, path));
    size_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | ((const unsigned char *)file.map)[i];
    safetensors_close(&file);
    return 8 + length;
}

static void check_files(void) {
    MegalodonOptions options = {.max_batch = 2, .max_length = 16, .training = true, .carry = true};
    int32_t tokens[26], targets[26];
    config = small_config();
    config.num_layers = 1;
    size_t parameters = (size_t)megalodon_num_parameters(&config);
    expected = must_allocate(2 * parameters * sizeof *expected);
    found = must_allocate(2 * parameters * sizeof *found);
    model = model_create(backend, &config, &options, 4);
    random_tokens(tokens, 26, config.vocab_size, 1);
    random_tokens(targets, 26, config.vocab_size, 2);
    MegalodonBatch batch = {.tokens = tokens, .targets = targets, .B = 2, .T = 13};
    MegalodonAdamW adamw = {.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .step = 1};
    MegalodonLoss loss;
    double norm;
    must(backend->forward(model, &batch, &loss));
    must(backend->backward(model, 1. / 26));
    must(backend->update(model, &adamw, &norm));
    must(checkpoint_save(path, backend, model, &config));
    check_damage("a model", load_model, header_bytes(), 37);
    must(checkpoint_trainer_save(path, backend, model, &config, facts));
    check_damage("a run's moments", load_trainer, header_bytes(), 97);
    for (int i = 0; i < 2 * 31; i++) logits[i] = (float)i;
    must(checkpoint_state_write(path, backend, model, &config, hash, logits));
    check_damage("a state", load_state, header_bytes(), 7);
    backend->destroy(model);
}

/* The numbers of a token file carry no checksum: a run knows its data by a hash. So only the header is changed. */
static void check_tokens(void) {
    char header[128] = "\x93NUMPY\x01";
    int length = snprintf(header + 10, 118, "%-69s\n", "{'descr': '<u2', 'fortran_order': False, 'shape': (50,), }");
    header[8] = (char)length;
    FILE *file = fopen(path, "wb");
    if (!file) must("a token file cannot be written");
    fwrite(header, 1, 10 + (size_t)length, file);
    for (int i = 0; i < 50; i++) fprintf(file, "%c%c", i * 7 % 256, i % 3);
    fclose(file);
    check_damage("a token file", load_tokens, 10 + (size_t)length, 0);
}

/* The text that names the newest step: each of its bits, and each length. What it then names is loaded whole, or there is
 * a sentence. */
static void check_latest(void) {
    MegalodonOptions options = {.max_batch = 1, .max_length = 4, .training = true};
    char run[SAFETENSORS_MAX_PATH], latest[SAFETENSORS_MAX_PATH], command[SAFETENSORS_MAX_PATH + 8], *good;
    long refused = 0, others = 0, wrong = 0;
    size_t size;
    must(checkpoint_join(run, folder, "run"));
    must(checkpoint_join(latest, run, "latest"));
    model = model_create(backend, &config, &options, 6);
    for (int64_t step = 2; step <= 3; step++) must(checkpoint_write(run, step, 2, backend, model, &config, facts + 2, false));
    must(json_read_text(latest, &good, &size));
    for (size_t i = 0; i < 9 * size; i++) {
        bool cut = i >= 8 * size;
        FILE *file = fopen(latest, "wb");
        if (!file) must("the name of the newest step cannot be written");
        if (!cut) good[i / 8] ^= (char)(1 << i % 8);
        fwrite(good, 1, cut ? i - 8 * size : size, file);
        fclose(file);
        if (!cut) good[i / 8] ^= (char)(1 << i % 8);
        Safetensors trainer;
        int64_t step = 0;
        const char *error = checkpoint_resume(run, backend, model, &config, &trainer);
        refused += error != NULL;
        wrong += error && !strstr(error, run);
        if (error) continue;
        must(checkpoint_fact_int64(&trainer, "step", &step));
        others += step == 2;
        wrong += step != 2 && step != 3;
        safetensors_close(&trainer);
    }
    check(refused > 0 && wrong == 0, "of the names of a newest step, %ld led to something that is none", wrong);
    printf("the name of the newest step: %ld changes refused, %ld named the step before\n", refused, others);
    free(good);
    backend->destroy(model);
    snprintf(command, sizeof command, "rm -r %s", run);
    if (system(command) != 0) must(command);
}

/* --no-verify: a changed bit of the data passes, one of the header's numbers does not; a file without checksums is
 * read like any other. */
static void check_without(void) {
    MegalodonOptions options = {.max_batch = 1, .max_length = 1};
    model = model_create(backend, &config, &options, 5);
    must(checkpoint_save(path, backend, model, &config));
    size_t header = header_bytes();
    int descriptor = open(path, O_RDWR);
    unsigned char byte = 0;
    if (descriptor < 0 || pread(descriptor, &byte, 1, (off_t)header + 100) != 1) must("the file cannot be read");
    byte ^= 1;
    if (pwrite(descriptor, &byte, 1, (off_t)header + 100) != 1) must("the file cannot be written");
    const char *error = checkpoint_load(path, backend, model, &config);
    check(error && strstr(error, "expected the checksum") && strstr(error, "tensor "), "a changed bit: %s", error);
    *checkpoint_verifies() = false;
    error = checkpoint_load(path, backend, model, &config);
    check(!error, "a changed bit without checksums: %s", error);
    if (ftruncate(descriptor, (off_t)header + 100) != 0) must("the file cannot be cut");
    check(checkpoint_load(path, backend, model, &config) != NULL, "a cut file is loaded without checksums");
    *checkpoint_verifies() = true;
    close(descriptor);
    backend->destroy(model);
    /* The model that comes with the project has no checksums: the Python package that rounded it writes none. */
    Safetensors file;
    must(safetensors_open(&file, "models/tinystories/model.safetensors"));
    error = safetensors_verify(&file);
    check(!error, "%s", error);
    safetensors_close(&file);
}

int main(void) {
    test_begin("damage");
    if (!mkdtemp(folder)) must("cannot create a folder in /tmp");
    snprintf(path, sizeof path, "%s/file", folder);
    check_files();
    unlink(path);
    snprintf(path, sizeof path, "%s/file.npy", folder);
    check_tokens();
    unlink(path);
    snprintf(path, sizeof path, "%s/file", folder);
    check_without();
    unlink(path);
    check_latest();
    rmdir(folder);
    free(expected);
    free(found);
    return test_end();
}
