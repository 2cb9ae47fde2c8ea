/* cema_init.h - another start for CEMA: memories spread over all lengths.
 *
 * A state of CEMA keeps a share |q| = 1 - p d of itself at each step, with p = sigmoid(alpha) and d = sigmoid(delta),
 * so that it remembers for about 1/(p d) steps. The released initialisation draws alpha and delta near zero: p and d
 * are near one half, and every memory is about 3.5 steps long. Here state k of N remembers for
 *     M_k = 2 (longest/2)^((N-k)/(N-1))        p = 1/M_k        d = 0.95
 * steps: 2 for the last state, `longest` for the first, whose phase turns slowest. The input is scaled by p, so a
 * long memory is an average of many steps and not their sum: its gain at its own frequency is p/(1 - |q|) = 1/d, the
 * same for all lengths.
 */
#ifndef LIB_CEMA_INIT_H
#define LIB_CEMA_INIT_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "../megalodon.h"
#include "error.h"

#define CEMA_SPREAD_D 0.95           /* sigmoid(delta): near 1, so that p alone sets the memory */
#define CEMA_SPREAD_SHORTEST 2.0     /* steps */

static inline double cema_logit(double p) { return log(p) - log1p(-p); }

/* Sets alpha and delta of every layer as above. longest: steps, more than 2.
 * Error: no memory, or what the backend says. */
static inline const char *cema_spread(const MegalodonBackend *backend, MegalodonModel *model,
                                      const MegalodonConfig *config, double longest) {
    int D = config->model_dim, N = config->cema_ndim;
    size_t states = (size_t)D * (size_t)N;
    const char *error = NULL;
    float *alpha = malloc(states * sizeof *alpha), *delta = malloc(states * sizeof *delta);
    if (!alpha || !delta) error = errorf("no memory for the %zu states of a layer's CEMA", states);
    for (size_t i = 0; i < states && !error; i++) {
        int k = (int)(i % (size_t)N) + 1;
        double share = N > 1 ? (double)(N - k) / (N - 1) : 1;
        double memory = CEMA_SPREAD_SHORTEST * pow(longest / CEMA_SPREAD_SHORTEST, share);
        alpha[i] = (float)cema_logit(1 / memory);
        delta[i] = (float)cema_logit(CEMA_SPREAD_D);
    }
    for (int l = 0; l < config->num_layers && !error; l++) {
        char name[MEGALODON_MAX_NAME];
        snprintf(name, sizeof name, "layers.%d.mega.cema.alpha", l);
        error = backend->set(model, MEGALODON_PARAM, name, alpha, MEGALODON_F32);
        snprintf(name, sizeof name, "layers.%d.mega.cema.delta", l);
        if (!error) error = backend->set(model, MEGALODON_PARAM, name, delta, MEGALODON_F32);
    }
    free(alpha);
    free(delta);
    return error;
}

#endif
