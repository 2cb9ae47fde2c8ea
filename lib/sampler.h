/* sampler.h - draws the next token from logits.
 *
 * Temperature, then the top_k most likely tokens, then the fewest of those whose probabilities reach top_p. The draw
 * is a function of (seed, number of the draw) alone, so a text can be continued from any place without a hidden state:
 * setting `draws` to the number of tokens drawn before is enough.
 */
#ifndef LIB_SAMPLER_H
#define LIB_SAMPLER_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "../megalodon.h"
#include "error.h"

typedef struct SamplerEntry {
    double weight;               /* probability, not yet divided by the sum */
    int32_t token;
} SamplerEntry;

typedef struct Sampler {
    int vocab_size;
    double temperature;          /* 0: the most likely token           */
    int top_k;                   /* 0: all                             */
    double top_p;                /* 1: all                             */
    uint64_t seed, draws;        /* draws: tokens drawn so far         */
    SamplerEntry *entries;       /* vocab_size                         */
} Sampler;

static inline void sampler_destroy(Sampler *sampler) {
    free(sampler->entries);
    sampler->entries = NULL;
}

/* Error: a setting out of range, or no memory. */
static inline const char *sampler_create(Sampler *sampler, int vocab_size, double temperature, int top_k, double top_p,
                                         uint64_t seed) {
    *sampler = (Sampler){.vocab_size = vocab_size, .temperature = temperature, .top_k = top_k, .top_p = top_p,
                         .seed = seed};
    if (vocab_size < 1) return errorf("sampler: expected at least one token, found %d", vocab_size);
    if (!(temperature >= 0 && temperature < HUGE_VAL))
        return errorf("sampler: expected a temperature of 0 or more, found %g", temperature);
    if (top_k < 0) return errorf("sampler: expected top-k of 0 (all) or more, found %d", top_k);
    if (!(top_p > 0 && top_p <= 1)) return errorf("sampler: expected top-p above 0 and at most 1, found %g", top_p);
    sampler->entries = malloc((size_t)vocab_size * sizeof *sampler->entries);
    return sampler->entries ? NULL : errorf("sampler: no memory for %d entries", vocab_size);
}

/* Most likely first; equal ones in the order of their numbers, so that the order is the same on every machine. */
static inline int sampler_compare(const void *a, const void *b) {
    const SamplerEntry *x = a, *y = b;
    if (x->weight != y->weight) return x->weight > y->weight ? -1 : 1;
    return x->token < y->token ? -1 : x->token > y->token;
}

/* Restores the heap below `i`; its root is the entry that comes last in the order above. */
static inline void sampler_sift(SamplerEntry *heap, int size, int i) {
    for (int child; (child = 2 * i + 1) < size; i = child) {
        if (child + 1 < size && sampler_compare(&heap[child + 1], &heap[child]) > 0) child++;
        if (sampler_compare(&heap[i], &heap[child]) >= 0) return;
        SamplerEntry swap = heap[i];
        heap[i] = heap[child];
        heap[child] = swap;
    }
}

/* Moves the k most likely of n entries to the front, in no order: a heap of the best k so far, O(n log k). */
static inline void sampler_keep_top(SamplerEntry *entries, int n, int k) {
    for (int i = k / 2 - 1; i >= 0; i--) sampler_sift(entries, k, i);
    for (int i = k; i < n; i++) {
        if (sampler_compare(&entries[i], &entries[0]) >= 0) continue;
        entries[0] = entries[i];
        sampler_sift(entries, k, 0);
    }
}

/* Keeps the fewest entries, most likely first, whose weights reach top_p of the sum. Returns how many. */
static inline int sampler_keep_nucleus(SamplerEntry *entries, int n, double top_p) {
    double sum = 0, reached = 0;
    for (int i = 0; i < n; i++) sum += entries[i].weight;
    /* An entry below this cannot belong to the nucleus: all such entries together weigh less than (1 - top_p) of the
     * sum. Leaving them out first makes the sort short for large vocabularies. */
    double least = (1 - top_p) * sum / n;
    int kept = 0, nucleus = 0;
    for (int i = 0; i < n; i++)
        if (entries[i].weight >= least) entries[kept++] = entries[i];
    qsort(entries, (size_t)kept, sizeof *entries, sampler_compare);
    while (nucleus < kept && reached < top_p * sum) reached += entries[nucleus++].weight;
    return nucleus;
}

/* Draws a token from logits (vocab_size floats); -INFINITY forbids a token. Error: a logit that is NaN or +infinite,
 * or nothing to choose from. */
static inline const char *sampler_next(Sampler *sampler, const float *logits, int32_t *token) {
    SamplerEntry *entries = sampler->entries;
    int n = sampler->vocab_size, best = 0;
    for (int i = 0; i < n; i++) {
        if (isnan(logits[i]) || logits[i] == HUGE_VALF)
            return errorf("the model's output for token %d is %g; its weights or its state are damaged", i,
                          (double)logits[i]);
        if (logits[i] > logits[best]) best = i;
    }
    if (logits[best] == -HUGE_VALF) return errorf("every token has probability zero; there is nothing to draw");
    uint64_t draw = sampler->draws++;
    *token = best;
    if (sampler->temperature == 0) return NULL;
    for (int i = 0; i < n; i++)
        entries[i] = (SamplerEntry){exp(((double)logits[i] - (double)logits[best]) / sampler->temperature), i};
    if (sampler->top_k > 0 && sampler->top_k < n) {
        sampler_keep_top(entries, n, sampler->top_k);
        n = sampler->top_k;
    }
    if (sampler->top_p < 1) n = sampler_keep_nucleus(entries, n, sampler->top_p);

    double sum = 0, reached = 0;
    for (int i = 0; i < n; i++) sum += entries[i].weight;
    /* 53 random bits: uniform in [0, 1) */
    double target = (double)(megalodon_random(sampler->seed, draw) >> 11) * 0x1p-53 * sum;
    for (int i = 0; i < n; i++) {
        reached += entries[i].weight;
        if (entries[i].weight > 0) *token = entries[i].token;   /* rounding can leave target at the very end */
        if (target < reached) break;
    }
    return NULL;
}

#endif
