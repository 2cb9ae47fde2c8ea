/* cema_init.h - other starts for CEMA than the released one.
 *
 * A state of CEMA keeps a share |q| = 1 - p d of itself at each step, with p = sigmoid(alpha) and d = sigmoid(delta),
 * so that it remembers for about 1/(p d) steps. Of an input u it takes p u.
 *
 *   released   alpha and delta are drawn near zero: p and d are near one half, and every memory is about 3.5 steps long.
 *
 *   spread     averages over all lengths. State k of N remembers for
 *                  M_k = 2 (longest/2)^((N-k)/(N-1))        p = 1/M_k        d = 0.95
 *              steps: 2 for the last state, `longest` for the first, whose phase turns slowest. The input is scaled by
 *              p, so a long memory is an average of many steps and not their sum: its gain at its own frequency is
 *              p/(1 - |q|) = 1/d, the same for all lengths. A single input leaves little in it.
 *
 *   hold       sums. All states of every second channel remember for `longest` steps, with
 *                  p = 1/2        d = 2/longest        sigmoid(theta) = 1/longest
 *              so that a single input stays, at half its size, and turns by one circle at most while it is there.
 *              Whatever comes in adds up: the model has to see to it that little comes in that need not be kept. The
 *              other channels are as released, short filters.
 */
#ifndef LIB_CEMA_INIT_H
#define LIB_CEMA_INIT_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../megalodon.h"
#include "error.h"

#define CEMA_SPREAD_D 0.95           /* sigmoid(delta): near 1, so that p alone sets the memory */
#define CEMA_SPREAD_SHORTEST 2.0     /* steps */
enum { CEMA_HOLD_EVERY = 2 };        /* one channel of so many holds */

static inline double cema_logit(double p) { return log(p) - log1p(-p); }

/* The values of a layer: alpha and delta D,N, theta D. */
static inline void cema_spread(const MegalodonConfig *config, double longest, float *alpha, float *delta) {
    int N = config->cema_ndim;
    for (int i = 0; i < config->model_dim * N; i++) {
        int k = i % N + 1;
        double share = N > 1 ? (double)(N - k) / (N - 1) : 1;
        double memory = CEMA_SPREAD_SHORTEST * pow(longest / CEMA_SPREAD_SHORTEST, share);
        alpha[i] = (float)cema_logit(1 / memory);
        delta[i] = (float)cema_logit(CEMA_SPREAD_D);
    }
}

static inline void cema_hold(const MegalodonConfig *config, double longest, float *alpha, float *delta, float *theta) {
    int N = config->cema_ndim;
    for (int j = 0; j < config->model_dim; j += CEMA_HOLD_EVERY) {
        for (int i = j * N; i < (j + 1) * N; i++) {
            alpha[i] = 0;
            delta[i] = (float)cema_logit(2 / longest);
        }
        theta[j] = (float)cema_logit(1 / longest);
    }
}

/* Gives CEMA of an initialised model the start called `way`: released (nothing changes), spread or hold. longest:
 * steps, more than 2. Error: no memory, or what the backend says. */
static inline const char *cema_start(const MegalodonBackend *backend, MegalodonModel *model,
                                     const MegalodonConfig *config, const char *way, double longest) {
    size_t D = (size_t)config->model_dim, states = D * (size_t)config->cema_ndim;
    bool spreads = strcmp(way, "spread") == 0;
    if (!spreads && strcmp(way, "hold") != 0) return NULL;
    float *alpha = malloc((2 * states + D) * sizeof *alpha);
    if (!alpha) return errorf("no memory for the %zu states of a layer's CEMA", states);
    float *delta = alpha + states, *theta = delta + states, *const values[] = {alpha, delta, theta};
    static const char *const fields[] = {"alpha", "delta", "theta"};
    char names[3][MEGALODON_MAX_NAME];
    const char *error = NULL;
    for (int l = 0; l < config->num_layers && !error; l++) {
        for (int i = 0; i < 3 && !error; i++) {
            snprintf(names[i], sizeof names[i], "layers.%d.mega.cema.%s", l, fields[i]);
            error = backend->get(model, MEGALODON_PARAM, names[i], values[i], MEGALODON_F32);
        }
        if (error) break;
        if (spreads) cema_spread(config, longest, alpha, delta);
        else cema_hold(config, longest, alpha, delta, theta);
        for (int i = 0; i < 3 && !error; i++)
            error = backend->set(model, MEGALODON_PARAM, names[i], values[i], MEGALODON_F32);
    }
    free(alpha);
    return error;
}

#endif
