/* state.h - a copy of a model's state in the program's own memory.
 *
 * The state is all that a model remembers of the tokens so far. A program that wants to use the model for something
 * else in between (an evaluation, a sample) takes a copy and gives it back. Numbers are held as doubles, so that every
 * backend gets back exactly what it gave.
 *
 *     StateCopy copy = {0};
 *     die_if(state_take(&copy, backend, model, &config));
 *     ...
 *     die_if(state_give(&copy, backend, model));
 *     state_free(&copy);
 *
 * doc/state.md lists the tensors and tells how a state is written to a file.
 */
#ifndef LIB_STATE_H
#define LIB_STATE_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../megalodon.h"
#include "error.h"

typedef struct StateCopy {
    int B, n;                        /* rows, and their place in the chunk                              */
    int64_t *count;                  /* tokens that each row has seen: B                                */
    int num_tensors;
    MegalodonTensor *tensors;        /* the state's list, "count" among them; the first dimension is B  */
    double *numbers;                 /* their values, one tensor after the other                        */
    size_t capacity;                 /* numbers that there is room for                                  */
} StateCopy;

static inline void state_free(StateCopy *copy) {
    free(copy->count);
    free(copy->tensors);
    free(copy->numbers);
    *copy = (StateCopy){0};
}

/* Lists the tensors of a state of B rows at place n and makes room for them. Memory is kept from copy to copy and
 * grows only when a larger state comes. */
static inline const char *state_prepare(StateCopy *copy, const MegalodonConfig *config, int B, int n) {
    int num_tensors = megalodon_tensors(config, MEGALODON_STATE, B, 1, n, NULL, 0);
    size_t size = 0;
    MegalodonTensor *tensors = realloc(copy->tensors, (size_t)num_tensors * sizeof *tensors);
    if (tensors) copy->tensors = tensors;
    int64_t *count = B <= copy->B ? copy->count : realloc(copy->count, (size_t)B * sizeof *count);
    if (count) copy->count = count;
    if (!tensors || !count) return errorf("no memory for a copy of the state of %d rows", B);
    megalodon_tensors(config, MEGALODON_STATE, B, 1, n, tensors, num_tensors);
    for (int i = 0; i < num_tensors; i++) size += (size_t)tensors[i].size;
    if (size > copy->capacity) {
        double *numbers = realloc(copy->numbers, size * sizeof *numbers);
        if (!numbers) return errorf("no memory for a copy of the state of %d rows, %zu numbers", B, size);
        copy->numbers = numbers;
        copy->capacity = size;
    }
    copy->num_tensors = num_tensors;
    copy->B = B;
    copy->n = n;
    return NULL;
}

static inline bool state_is_count(const MegalodonTensor *tensor) {
    return strcmp(tensor->name, "count") == 0;
}

/* Copies the model's state. Error: it has none, or there is no memory. */
static inline const char *state_take(StateCopy *copy, const MegalodonBackend *backend, MegalodonModel *model,
                                     const MegalodonConfig *config) {
    int B, n;
    backend->state_shape(model, &B, &n);
    if (B == 0) return errorf("the model has no state to copy: it has not read a token");
    const char *error = state_prepare(copy, config, B, n);
    double *at = copy->numbers;
    for (int i = 0; i < copy->num_tensors && !error; at += copy->tensors[i++].size) {
        const char *name = copy->tensors[i].name;
        error = state_is_count(&copy->tensors[i])
              ? backend->get(model, MEGALODON_STATE, name, copy->count, MEGALODON_I64)
              : backend->get(model, MEGALODON_STATE, name, at, MEGALODON_F64);
    }
    return error;
}

/* Makes the copy the model's state. The model may be another one, of any backend, with the same configuration. */
static inline const char *state_give(const StateCopy *copy, const MegalodonBackend *backend, MegalodonModel *model) {
    const char *error = backend->start_state(model, copy->B, copy->count);
    const double *at = copy->numbers;
    for (int i = 0; i < copy->num_tensors && !error; at += copy->tensors[i++].size)
        if (!state_is_count(&copy->tensors[i]))
            error = backend->set(model, MEGALODON_STATE, copy->tensors[i].name, at, MEGALODON_F64);
    return error;
}

#endif
