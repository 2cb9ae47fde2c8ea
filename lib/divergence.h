/* divergence.h - training that goes wrong: steps that stand out, and where numbers stop being finite.
 *
 * The guard knows the mean and the standard deviation of the loss and of the gradient's norm over about the last
 * hundred good steps. A value is a spike if it lies more than Z standard deviations above the mean; a deviation of less
 * than 1% of the mean counts as that much, so that a series which hardly moves has no spikes. A step that was skipped
 * teaches the guard nothing.
 */
#ifndef LIB_DIVERGENCE_H
#define LIB_DIVERGENCE_H

#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../megalodon.h"
#include "error.h"

/* ------------------------------------------------------------------------------------------------------------------
 * Spikes.
 */

enum { GUARD_LOSS, GUARD_NORM, GUARD_VALUES };
enum { GUARD_WINDOW = 100, GUARD_LEAST = 20, GUARD_TEXT = 160 };     /* steps; steps; bytes */

typedef struct SpikeGuard {
    int64_t seen;                    /* good steps                            */
    double mean[GUARD_VALUES], variance[GUARD_VALUES];
} SpikeGuard;

/* What a value may be at most; infinite as long as too few steps were seen. z = 0: no guard. */
static inline double guard_limit(const SpikeGuard *guard, int value, double z) {
    if (z <= 0 || guard->seen < GUARD_LEAST) return INFINITY;
    return guard->mean[value] + z * fmax(sqrt(guard->variance[value]), 0.01 * fabs(guard->mean[value]));
}

/* Takes in the values of a good step:  d = x - mean;  mean += a d;  variance = (1 - a) (variance + a d^2),
 * a = 1 / (steps seen), at least 1 / GUARD_WINDOW. */
static inline void guard_learn(SpikeGuard *guard, double loss, double norm) {
    const double x[GUARD_VALUES] = {loss, norm};
    guard->seen++;
    double a = 1. / (double)(guard->seen < GUARD_WINDOW ? guard->seen : GUARD_WINDOW);
    for (int i = 0; i < GUARD_VALUES; i++) {
        double d = x[i] - guard->mean[i];
        guard->mean[i] += a * d;
        guard->variance[i] = (1 - a) * (guard->variance[i] + a * d * d);
    }
}

/* The guard as text that gives back the same bits, for a checkpoint. */
static inline void guard_to_text(const SpikeGuard *guard, char text[GUARD_TEXT]) {
    snprintf(text, GUARD_TEXT, "%" PRId64 " %.17g %.17g %.17g %.17g", guard->seen, guard->mean[0], guard->variance[0],
             guard->mean[1], guard->variance[1]);
}
static inline const char *guard_from_text(const char *text, SpikeGuard *guard) {
    SpikeGuard read = {0};
    int length = 0;
    int count = sscanf(text, "%" SCNd64 " %lf %lf %lf %lf%n", &read.seen, &read.mean[0], &read.variance[0],
                       &read.mean[1], &read.variance[1], &length);
    bool ok = count == 5 && text[length] == '\0' && read.seen >= 0;
    for (int i = 0; i < GUARD_VALUES && ok; i++)
        ok = isfinite(read.mean[i]) && isfinite(read.variance[i]) && read.variance[i] >= 0;
    if (!ok) return errorf("expected the spike guard's five numbers, found \"%.60s\"", text);
    *guard = read;
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------------------
 * The first tensor that is not finite, in the order of computation.
 */

enum { DIVERGENCE_NAME = MEGALODON_MAX_NAME + 32 };

/* Looks through the tensors of a kind, from the first or from the last one on. Tensors that the backend did not keep
 * are passed over. Returns whether one holds a number that is not finite; `out` is then "WHAT NAME". */
static inline bool divergence_in(const MegalodonBackend *backend, MegalodonModel *model, const MegalodonConfig *config,
                                 MegalodonKind kind, int B, int T, bool backwards, const char *what,
                                 char out[DIVERGENCE_NAME]) {
    int count = megalodon_tensors(config, kind, B, T, 0, NULL, 0);
    MegalodonTensor *list = malloc((size_t)count * sizeof *list);
    float *values = NULL;
    bool found = false;
    int64_t room = 0;
    if (list) megalodon_tensors(config, kind, B, T, 0, list, count);
    for (int i = 0; i < count && list && !found; i++) {
        const MegalodonTensor *tensor = &list[backwards ? count - 1 - i : i];
        float *more = tensor->size > room ? realloc(values, (size_t)tensor->size * sizeof *values) : values;
        if (!more) break;
        values = more;
        if (tensor->size > room) room = tensor->size;
        if (backend->get(model, kind, tensor->name, values, MEGALODON_F32)) continue;
        for (int64_t k = 0; k < tensor->size && !found; k++) found = !isfinite(values[k]);
        if (found) snprintf(out, DIVERGENCE_NAME, "%s %s", what, tensor->name);
    }
    free(values);
    free(list);
    return found;
}

static inline bool divergence_in_parameters(const MegalodonBackend *backend, MegalodonModel *model,
                                            const MegalodonConfig *config, char out[DIVERGENCE_NAME]) {
    return divergence_in(backend, model, config, MEGALODON_PARAM, 1, 1, false, "the parameter", out);
}

/* A backward pass starts at the end of the graph. */
static inline bool divergence_in_gradients(const MegalodonBackend *backend, MegalodonModel *model,
                                           const MegalodonConfig *config, char out[DIVERGENCE_NAME]) {
    return divergence_in(backend, model, config, MEGALODON_GRAD, 1, 1, true, "the gradient of", out);
}

/* Computes `rows` rows of T tokens again, as many at once as fit into memory, with every activation kept, and looks for
 * the first one that is not finite. *model is destroyed and becomes NULL, so that there is room for it: a last resort.
 * batch: the rows' tokens, T, dropout, seed and step. */
static inline bool divergence_in_forward(const MegalodonBackend *backend, MegalodonModel **model,
                                         const MegalodonConfig *config, const MegalodonOptions *training,
                                         const MegalodonBatch *batch, char out[DIVERGENCE_NAME]) {
    MegalodonOptions options = {.max_batch = batch->B, .max_length = batch->T, .keep_activations = true,
                                .precision = training->precision, .max_bytes = training->max_bytes};
    int count = megalodon_tensors(config, MEGALODON_PARAM, 1, 1, 0, NULL, 0);
    MegalodonTensor *list = malloc((size_t)count * sizeof *list);
    float *all = malloc((size_t)megalodon_num_parameters(config) * sizeof *all), *at = all;
    MegalodonModel *fresh = NULL;
    bool found = false;
    const char *error = list && all ? NULL : "no memory";
    MegalodonBatch part = *batch;
    if (list) megalodon_tensors(config, MEGALODON_PARAM, 1, 1, 0, list, count);
    for (int i = 0; i < count && !error; at += list[i++].size)
        error = backend->get(*model, MEGALODON_PARAM, list[i].name, at, MEGALODON_F32);
    backend->destroy(*model);
    *model = NULL;
    while (!error && backend->create(&fresh, config, &options) != NULL && (options.max_batch /= 2) > 0) fresh = NULL;
    at = all;
    for (int i = 0; i < count && !error && fresh; at += list[i++].size)
        error = backend->set(fresh, MEGALODON_PARAM, list[i].name, at, MEGALODON_F32);
    for (int row = 0; row < batch->B && !error && fresh && !found; row += options.max_batch) {
        part.tokens = batch->tokens + (int64_t)row * batch->T;
        part.targets = batch->targets + (int64_t)row * batch->T;
        part.B = batch->B - row < options.max_batch ? batch->B - row : options.max_batch;
        part.carry = false;
        error = backend->forward(fresh, &part, NULL);
        if (!error) found = divergence_in(backend, fresh, config, MEGALODON_ACT, part.B, part.T, false,
                                          "the activation", out);
    }
    if (fresh) backend->destroy(fresh);
    free(list);
    free(all);
    return found;
}

#endif
