/* model.h - whole models for the tests: a small configuration, tokens, and tensors fetched by name. */
#ifndef TESTS_MODEL_H
#define TESTS_MODEL_H

#include "../megalodon.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MODEL_MAX_TENSORS = 256 };

/* Ends the program at an error that no check expects. */
static inline void must(const char *error) {
    if (!error) return;
    fflush(stdout);
    fprintf(stderr, "unexpected error: %s\n", error);
    exit(1);
}

/* Memory, or the end of the program. */
static inline void *must_allocate(size_t bytes) {
    void *memory = malloc(bytes ? bytes : 1);
    if (!memory) must("out of memory");
    return memory;
}

/* Two blocks, two heads, chunks of 8: everything that the large models have, in a hundredth of a second. */
static inline MegalodonConfig small_config(void) {
    MegalodonConfig config;
    megalodon_default_config(&config);
    config.num_layers = 2;
    config.model_dim = 24;
    config.num_heads = 2;
    config.z_dim = 12;
    config.value_dim = 36;
    config.ffn_hidden_dim = 28;
    config.cema_ndim = 4;
    config.chunk_size = 8;
    config.norm_num_groups = 4;
    config.vocab_size = 31;
    return config;
}

static inline void random_tokens(int32_t *tokens, int count, int vocab_size, uint64_t seed) {
    for (int i = 0; i < count; i++)
        tokens[i] = (int32_t)(megalodon_random(seed, (uint64_t)i) % (uint64_t)vocab_size);
}

/* A model with initial values. */
static inline MegalodonModel *model_create(const MegalodonBackend *backend, const MegalodonConfig *config,
                                           const MegalodonOptions *options, uint64_t seed) {
    MegalodonModel *model = NULL;
    must(backend->create(&model, config, options));
    must(megalodon_initialise(backend, model, config, seed));
    return model;
}

/* One tensor of the model as doubles (free it). batch gives B and T of the last forward; its size goes to *size. */
static inline double *fetch(const MegalodonBackend *backend, MegalodonModel *model, const MegalodonConfig *config,
                            const MegalodonBatch *batch, MegalodonKind kind, const char *name, int64_t *size) {
    MegalodonTensor tensor;
    int B, n;
    backend->state_shape(model, &B, &n);
    must(megalodon_find_tensor(config, kind, batch->B, batch->T, n, name, &tensor));
    double *values = must_allocate((size_t)tensor.size * sizeof *values);
    must(backend->get(model, kind, name, values, MEGALODON_F64));
    *size = tensor.size;
    return values;
}

#endif
