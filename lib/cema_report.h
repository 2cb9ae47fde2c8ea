/* cema_report.h - how long a model's CEMA remembers, seen from its weights alone.
 *
 * State k = 1..N of a channel is multiplied by q in every step:
 *
 *     q = (1 - a d) exp(i phase),   phase = k s 2 pi / N,   a, d, s = sigmoid(alpha, delta, theta)
 *     memory   1 / (-ln |q|)        tokens until what it holds has faded to 1/e
 *     period   2 pi / |arg q|       tokens until it has turned once; 2 is the shortest one
 *
 * Both are told for each layer, over its D N states, as a median, the value that 99% do not pass, the longest one, and
 * a histogram with bins from power of two to power of two.
 */
#ifndef LIB_CEMA_REPORT_H
#define LIB_CEMA_REPORT_H

#include "checkpoint.h"              /* first: it asks for POSIX */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../megalodon.h"
#include "error.h"
#include "report.h"

enum { CEMA_BINS = 16 };             /* under 1, 1 to 2, ..., from 2^14 on without an end */

typedef struct CemaQuantity {
    double median, most, longest;    /* most: 99% are not above it */
    int64_t bins[CEMA_BINS], states;
} CemaQuantity;

typedef struct CemaLayer { CemaQuantity memory, period; } CemaLayer;

static inline double cema_sigmoid(double x) { return 1 / (1 + exp(-x)); }

static inline double cema_memory(double alpha, double delta) {
    return 1 / -log1p(-cema_sigmoid(alpha) * cema_sigmoid(delta));
}

/* k counts from 1. A turn of more than half a circle is a smaller one the other way round. */
static inline double cema_period(double theta, int k, int N) {
    double turn = k * cema_sigmoid(theta) / N;               /* in circles: 0 to 1 */
    return 1 / (turn > 0.5 ? 1 - turn : turn);
}

static inline int cema_compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts the values, which are not negative but may be infinite. */
static inline CemaQuantity cema_quantity(double *values, int64_t count) {
    CemaQuantity q = {.states = count};
    qsort(values, (size_t)count, sizeof *values, cema_compare);
    q.median = (values[(count - 1) / 2] + values[count / 2]) / 2;
    q.most = values[(int64_t)ceil(0.99 * (double)count) - 1];
    q.longest = values[count - 1];
    for (int64_t i = 0; i < count; i++) {
        int bin = 0;
        while (bin < CEMA_BINS - 1 && values[i] >= ldexp(1, bin)) bin++;
        q.bins[bin]++;
    }
    return q;
}

/* Reads a parameter of a layer as doubles; out has the tensor's size. Error: it is missing, or of another shape. */
static inline const char *cema_read(const Safetensors *file, const MegalodonConfig *config, int layer,
                                    const char *field, double *out) {
    char name[MEGALODON_MAX_NAME];
    MegalodonTensor expected;
    snprintf(name, sizeof name, "layers.%d.mega.cema.%s", layer, field);
    const char *error = megalodon_find_tensor(config, MEGALODON_PARAM, 1, 1, 0, name, &expected);
    if (error) return error;
    const SafetensorsTensor *found = safetensors_find(file, name);
    if (!found) return errorf("%s: has no tensor %s", file->path, name);
    if (found->size != expected.size)
        return errorf("%s: tensor %s: expected %lld numbers, found %lld", file->path, name, (long long)expected.size,
                      (long long)found->size);
    if (*checkpoint_verifies() && (error = safetensors_verify_tensor(file, found))) return error;
    safetensors_to_double(found, out);
    for (int64_t i = 0; i < expected.size; i++)
        if (!isfinite(out[i]))
            return errorf("%s: tensor %s: number %lld is not finite", file->path, name, (long long)i);
    return NULL;
}

/* Describes every layer of a checkpoint, and after them all together: num_layers + 1 entries, which the caller frees.
 * Error: what is wrong with the checkpoint. */
static inline const char *cema_describe(const char *path, MegalodonConfig *config, CemaLayer **layers) {
    char model[SAFETENSORS_MAX_PATH];
    Safetensors file;
    const char *error = checkpoint_model_path(path, model);
    if (!error) error = checkpoint_open_model(&file, model, config);
    if (error) return error;
    int L = config->num_layers, D = config->model_dim, N = config->cema_ndim;
    size_t states = (size_t)D * (size_t)N;
    double *alpha = malloc(states * sizeof *alpha), *delta = malloc(states * sizeof *delta);
    double *theta = malloc((size_t)D * sizeof *theta);
    double *memory = malloc((size_t)L * states * sizeof *memory), *period = malloc((size_t)L * states * sizeof *period);
    *layers = calloc((size_t)L + 1, sizeof **layers);
    if (!alpha || !delta || !theta || !memory || !period || !*layers)
        error = errorf("no memory for the %zu states of a layer's CEMA", states);
    for (int l = 0; l < L && !error; l++) {
        double *m = memory + (size_t)l * states, *p = period + (size_t)l * states;
        error = cema_read(&file, config, l, "alpha", alpha);
        if (!error) error = cema_read(&file, config, l, "delta", delta);
        if (!error) error = cema_read(&file, config, l, "theta", theta);
        for (size_t i = 0; i < states && !error; i++) {
            m[i] = cema_memory(alpha[i], delta[i]);
            p[i] = cema_period(theta[i / (size_t)N], (int)(i % (size_t)N) + 1, N);
        }
        if (!error) (*layers)[l] = (CemaLayer){cema_quantity(m, (int64_t)states), cema_quantity(p, (int64_t)states)};
    }
    if (!error)
        (*layers)[L] = (CemaLayer){cema_quantity(memory, (int64_t)states * L),
                                   cema_quantity(period, (int64_t)states * L)};
    free(alpha);
    free(delta);
    free(theta);
    free(memory);
    free(period);
    safetensors_close(&file);
    if (error) {
        free(*layers);
        *layers = NULL;
    }
    return error;
}

/* "3.5", "1,024", "inf"; out has room for 32 bytes. */
static inline const char *cema_number(double x, char *out) {
    if (isfinite(x) && x >= 1000 && x < 1e15) return report_count((int64_t)llround(x), out);
    snprintf(out, 32, x < 1e15 ? "%.1f" : "%.2e", x);
    return out;
}

/* A row a layer; then the histogram of all layers as bars. `period` chooses the quantity. */
static inline void cema_print(FILE *out, const CemaLayer *layers, int num_layers, bool period) {
    enum { BAR = 50 };
    const CemaQuantity *all = period ? &layers[num_layers].period : &layers[num_layers].memory;
    char text[3][32];
    int last = 0;
    int64_t largest = 0;
    for (int b = 0; b < CEMA_BINS; b++) {
        if (all->bins[b] > 0) last = b;
        if (all->bins[b] > largest) largest = all->bins[b];
    }
    fprintf(out, "%-40s share of the states in %%, by tokens: from\n  layer    median       99%%   longest ", "");
    for (int b = 0; b <= last; b++) fprintf(out, " %5.0f", b == 0 ? 0 : ldexp(1, b - 1));
    fprintf(out, "\n");
    for (int l = 0; l <= num_layers; l++) {
        const CemaQuantity *q = period ? &layers[l].period : &layers[l].memory;
        if (l < num_layers) fprintf(out, "%7d", l);
        else fprintf(out, "%7s", "all");
        fprintf(out, " %9s %9s %9s ", cema_number(q->median, text[0]), cema_number(q->most, text[1]),
                cema_number(q->longest, text[2]));
        for (int b = 0; b <= last; b++) {
            if (q->bins[b] > 0) fprintf(out, " %5.1f", 100. * (double)q->bins[b] / (double)q->states);
            else fprintf(out, "     .");
        }
        fprintf(out, "\n");
    }
    fprintf(out, "\n");
    for (int b = 0; b <= last; b++) {
        char bar[BAR + 1];
        int length = (int)ceil((double)BAR * (double)all->bins[b] / (double)largest);
        memset(bar, '#', (size_t)length);
        bar[length] = 0;
        if (b == CEMA_BINS - 1) fprintf(out, "  %7.0f  or more ", ldexp(1, b - 1));
        else fprintf(out, "  %7.0f to %5.0f ", b == 0 ? 0 : ldexp(1, b - 1), ldexp(1, b));
        fprintf(out, " %5.1f%% %s\n", 100. * (double)all->bins[b] / (double)all->states, bar);
    }
}

/* A row a layer and quantity, with the numbers of states in the bins. */
static inline void cema_csv(FILE *out, const CemaLayer *layers, int num_layers) {
    fprintf(out, "layer,quantity,states,median,percentile_99,longest");
    for (int b = 0; b < CEMA_BINS; b++) fprintf(out, ",from_%.0f", b == 0 ? 0 : ldexp(1, b - 1));
    fprintf(out, "\n");
    for (int row = 0; row < 2 * (num_layers + 1); row++) {
        int l = row / 2;
        const CemaQuantity *q = row % 2 ? &layers[l].period : &layers[l].memory;
        if (l < num_layers) fprintf(out, "%d", l);
        else fprintf(out, "all");
        fprintf(out, ",%s,%lld,", row % 2 ? "period" : "memory", (long long)q->states);
        report_csv_number(out, q->median, ",");
        report_csv_number(out, q->most, ",");
        report_csv_number(out, q->longest, "");
        for (int b = 0; b < CEMA_BINS; b++) fprintf(out, ",%lld", (long long)q->bins[b]);
        fprintf(out, "\n");
    }
}

#endif
