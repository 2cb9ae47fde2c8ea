/* fuzz_checkpoint.c - lib/checkpoint.h: any file is refused with a sentence, or is loaded as the parameters, the moments
 * and the state of a small model. A configuration that is accepted has lists of tensors whose sizes can be counted. */
#include "fuzz.h"

#include "lib/checkpoint.h"
#include "lib/state.h"

static MegalodonConfig config;
static const MegalodonBackend *const backend = &megalodon_cpu;

/* The smallest model that has all parts. */
static MegalodonModel *small_model(void) {
    MegalodonModel *model = NULL;
    MegalodonOptions options = {.max_batch = 3, .max_length = 4, .training = true, .carry = true};
    megalodon_default_config(&config);
    config.num_layers = 1;
    config.model_dim = 4;
    config.z_dim = 2;
    config.value_dim = 2;
    config.ffn_hidden_dim = 3;
    config.cema_ndim = 1;
    config.chunk_size = 4;
    config.norm_num_groups = 2;
    config.vocab_size = 3;
    const char *error = backend->create(&model, &config, &options);
    if (!error) error = megalodon_initialise(backend, model, &config, 1);
    expect(!error, "%s", error);
    return model;
}

/* What a program does with the configuration of a file before it makes the model. */
static void use_config(const char *path) {
    MegalodonConfig own;
    Safetensors file;
    CheckpointList list = {.backend = backend};
    const char *error = checkpoint_open_model(&file, path, &own);
    expect_sentence(error);
    if (error) return;
    expect(!(error = megalodon_validate(&own)), "an invalid configuration was accepted: %s", error);
    expect(megalodon_num_parameters(&own) > 0, "a model of %lld parameters", (long long)megalodon_num_parameters(&own));
    if (own.num_layers <= 8) {
        error = checkpoint_list(&list, &own, MEGALODON_PARAM, 1, 0, "");
        expect(!error, "%s", error);
        for (size_t i = 0; i < list.count; i++)
            expect(list.items[i].tensor.size > 0, "%s has no elements", list.items[i].name);
        expect_sentence(checkpoint_list_check(&list, &file, ""));
    }
    free(list.items);
    safetensors_close(&file);
}

/* Each of the things that a file may be. The hash of the last model that was loaded makes states belong to it. */
static const char *load_model(const char *path, MegalodonModel *model, char hash[CHECKPOINT_HASH]) {
    use_config(path);
    const char *error = checkpoint_load(path, backend, model, &config);
    if (!error && (error = checkpoint_hash(path, hash))) expect(false, "loaded, but it has no hash: %s", error);
    return error;
}

static const char *load_trainer(const char *path, MegalodonModel *model) {
    Safetensors trainer;
    int64_t step;
    uint64_t seed;
    double loss;
    const char *error = checkpoint_trainer_load(path, backend, model, &config, &trainer);
    if (error) return error;
    expect_sentence(checkpoint_fact_int64(&trainer, "step", &step));
    expect_sentence(checkpoint_fact_uint64(&trainer, "seed", &seed));
    expect_sentence(checkpoint_fact_double(&trainer, "loss", &loss));
    safetensors_close(&trainer);
    return NULL;
}

static const char *load_state(const char *path, MegalodonModel *model, const char *hash) {
    static StateCopy copy;
    float logits[3 * 3];
    const char *error = checkpoint_state_resume(path, backend, model, &config, *hash ? hash : NULL, logits);
    if (error) error = checkpoint_state_load(path, backend, model, &config);
    if (error) return error;
    expect(!(error = state_take(&copy, backend, model, &config)), "a state was loaded, but: %s", error);
    return NULL;
}

/* Loads the file as what it says that it is. */
static const char *load(const char *path, MegalodonModel *model) {
    static char hash[CHECKPOINT_HASH];
    Safetensors file;
    char format[64] = "";
    const char *error = safetensors_open(&file, path);
    if (error) return error;
    const char *found = safetensors_metadata(&file, "format");
    if (found) snprintf(format, sizeof format, "%s", found);
    safetensors_close(&file);
    if (strcmp(format, CHECKPOINT_TRAINER_FORMAT) == 0) return load_trainer(path, model);
    if (strcmp(format, CHECKPOINT_STATE_FORMAT) == 0) return load_state(path, model, hash);
    return load_model(path, model, hash);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static FuzzFile input;
    static MegalodonModel *model;
    if (!model) model = small_model();
    fuzz_safetensors_file(&input, bytes, size);
    *checkpoint_verifies() = true;
    const char *error = load(input.path, model);
    expect_sentence(error);
    if (!error || !strstr(error, "checksum")) return 0;
    *checkpoint_verifies() = false;                          /* as --no-verify reads it */
    expect_sentence(load(input.path, model));
    return 0;
}
