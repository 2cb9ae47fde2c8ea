/* sampler.h - draws the next token from logits.
 *
 * Temperature, then the top_k most likely tokens, then the fewest of those whose probabilities reach top_p. The draw
 * is a function of (seed, number of the draw) alone, so a text can be continued from any place without a hidden state:
 * setting `draws` to the number of tokens drawn before is enough.
 */
#ifndef LIB_SAMPLER_H
#define LIB_SAMPLER_H

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../megalodon.h"
#include "error.h"

typedef struct Sampler {
    int vocab_size;
    double temperature;          /* 0: the most likely token           */
    int top_k;                   /* 0: all                             */
    double top_p;                /* 1: all                             */
    uint64_t seed, draws;        /* draws: tokens drawn so far         */
    double *weights;             /* vocab_size: of the tokens that can still be drawn, not yet divided by their sum */
    int32_t *tokens;             /* vocab_size: which these are        */
} Sampler;

static inline void sampler_destroy(Sampler *sampler) {
    free(sampler->weights);
    free(sampler->tokens);
    sampler->weights = NULL;
    sampler->tokens = NULL;
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
    sampler->weights = malloc((size_t)vocab_size * sizeof *sampler->weights);
    sampler->tokens = malloc((size_t)vocab_size * sizeof *sampler->tokens);
    if (sampler->weights && sampler->tokens) return NULL;
    sampler_destroy(sampler);
    return errorf("sampler: no memory for %d tokens", vocab_size);
}

/* The most likely token, of equal ones the first; -1 if a logit is NaN or +infinite. A large vocabulary is gone through
 * for every token of a text, so these are loops that compilers turn into vectors: they may reorder integers, not
 * floats, and the places below are in the order of the floats. */
static inline int32_t sampler_place(float logit) {
    int32_t bits;
    memcpy(&bits, &logit, sizeof bits);
    return bits < 0 ? INT32_MIN - bits : bits;       /* -0 and 0 have the same place */
}
static inline int sampler_best(const float *logits, int n) {
    const int32_t infinity = 0x7F800000;             /* its place; those of NaN are beyond it or below its negative */
    int32_t largest = INT32_MIN, smallest = INT32_MAX, first = n;
    for (int i = 0; i < n; i++) {
        int32_t place = sampler_place(logits[i]);
        largest = place > largest ? place : largest;
        smallest = place < smallest ? place : smallest;
    }
    if (largest >= infinity || smallest < -infinity) return -1;
    for (int i = 0; i < n; i++) {
        int32_t found = sampler_place(logits[i]) == largest ? i : n;
        first = found < first ? found : first;
    }
    return first;
}

/* exp(x) for x <= 0, to about 1e-15 of it; 0 where that would be smaller than 1e-307. Unlike the library's it can be
 * computed for several x at once: 2^k exp(r) with r between -ln(2)/2 and ln(2)/2. */
static inline double sampler_exp(double x) {
    const double to_integer = 0x1.8p52;              /* a sum with it has the nearest integer in its last bits */
    double sum = x * 1.44269504088896340736 + to_integer, k = sum - to_integer;
    double r = (x - k * 0x1.62e42fee00000p-1) - k * 0x1.a39ef35793c76p-33;      /* ln(2) in two parts */
    double p = 1.0 / 6227020800;                     /* the series up to r^13 / 13! */
    p = p * r + 1.0 / 479001600;
    p = p * r + 1.0 / 39916800;
    p = p * r + 1.0 / 3628800;
    p = p * r + 1.0 / 362880;
    p = p * r + 1.0 / 40320;
    p = p * r + 1.0 / 5040;
    p = p * r + 1.0 / 720;
    p = p * r + 1.0 / 120;
    p = p * r + 1.0 / 24;
    p = p * r + 1.0 / 6;
    p = p * r + 0.5;
    p = p * r + 1;
    p = p * r + 1;
    uint64_t power, bits;
    memcpy(&power, &sum, sizeof power);
    memcpy(&bits, &p, sizeof bits);
    bits = (bits + (power << 52)) & -(uint64_t)(x > -706);      /* without a branch, which would make it one by one */
    memcpy(&p, &bits, sizeof p);
    return p;
}

/* In the order that all cuts go by: is entry i before entry k? The more likely first; equal ones in the order of their
 * numbers, so that the order is the same on every machine. */
static inline bool sampler_before(const Sampler *s, int i, int k) {
    return s->weights[i] != s->weights[k] ? s->weights[i] > s->weights[k] : s->tokens[i] < s->tokens[k];
}

static inline void sampler_swap(Sampler *s, int i, int k) {
    double weight = s->weights[i];
    int32_t token = s->tokens[i];
    s->weights[i] = s->weights[k], s->tokens[i] = s->tokens[k];
    s->weights[k] = weight, s->tokens[k] = token;
}

/* Restores the heap of the first `size` entries below `i`; its root is the entry that comes last in the order above. */
static inline void sampler_sift(Sampler *s, int size, int i) {
    for (int child; (child = 2 * i + 1) < size; i = child) {
        if (child + 1 < size && sampler_before(s, child, child + 1)) child++;
        if (sampler_before(s, child, i)) return;
        sampler_swap(s, i, child);
    }
}

/* Moves the k first of n entries in the order above to the front, in no order: a heap of the best k so far,
 * O(n log k). */
static inline void sampler_keep_top(Sampler *s, int n, int k) {
    for (int i = k / 2 - 1; i >= 0; i--) sampler_sift(s, k, i);
    for (int i = k; i < n; i++) {
        if (sampler_before(s, 0, i)) continue;
        sampler_swap(s, 0, i);
        sampler_sift(s, k, 0);
    }
}

/* The fewest entries, first ones in the order above, whose weights reach `target` > 0: how many of n. Moves them to the
 * front, the last of them to their end, without ordering the others: where a sort would go on in both parts, this does
 * in the one where the target is reached. */
static inline int sampler_reach(Sampler *s, int n, double target) {
    int first = 0, last = n;                         /* entries before `first` are in, those from `last` on are not */
    double reached = 0;                              /* the weights of those before `first` */
    while (first < last) {
        int middle = first + (last - first) / 2, end = last - 1, place = first;
        if (sampler_before(s, first, middle)) sampler_swap(s, first, middle);
        if (sampler_before(s, end, middle)) sampler_swap(s, end, middle);
        if (sampler_before(s, first, end)) sampler_swap(s, first, end);
        /* middle, end, first are in order: the pivot is the second of the three */
        double sum = 0;
        for (int i = first; i < end; i++) {
            if (!sampler_before(s, i, end)) continue;
            sum += s->weights[i];
            sampler_swap(s, i, place++);
        }
        sampler_swap(s, place, end);
        if (reached + sum >= target) {
            last = place;
            continue;
        }
        reached += sum + s->weights[place];
        first = place + 1;
        if (reached >= target) break;
    }
    return first > 0 ? first : 1;
}

/* Keeps the fewest of n entries, most likely first, whose weights reach top_p of `sum`. Returns how many. */
static inline int sampler_keep_nucleus(Sampler *s, int n, double sum) {
    /* An entry below this cannot belong to the nucleus: all such entries together weigh less than (1 - top_p) of the
     * sum. Leaving them out first makes few out of a large vocabulary. */
    double least = (1 - s->top_p) * sum / n;
    int kept = 0;
    for (int i = 0; i < n; i++) {
        double weight = s->weights[i];
        s->weights[kept] = weight, s->tokens[kept] = s->tokens[i];
        kept += weight >= least;
    }
    return sampler_reach(s, kept, s->top_p * sum);
}

/* Sum of the first n weights: eight sums side by side, in a fixed order. */
static inline double sampler_sum(const Sampler *s, int n) {
    enum { LANES = 8 };
    double sums[LANES] = {0};
    int whole = n / LANES * LANES;
    for (int i = 0; i < whole; i += LANES)
        for (int k = 0; k < LANES; k++) sums[k] += s->weights[i + k];
    for (int i = whole; i < n; i++) sums[0] += s->weights[i];
    for (int k = 1; k < LANES; k++) sums[0] += sums[k];
    return sums[0];
}

/* Draws a token from logits (vocab_size floats); -INFINITY forbids a token. Error: a logit that is NaN or +infinite,
 * or nothing to choose from. */
static inline const char *sampler_next(Sampler *sampler, const float *logits, int32_t *token) {
    double *weights = sampler->weights;
    int32_t *tokens = sampler->tokens;
    int n = sampler->vocab_size, best = sampler_best(logits, n);
    if (best < 0) {
        for (best = 0; logits[best] < HUGE_VALF;) best++;
        return errorf("the model's output for token %d is %g; its weights or its state are damaged", best,
                      (double)logits[best]);
    }
    if (logits[best] == -HUGE_VALF) return errorf("every token has probability zero; there is nothing to draw");
    uint64_t draw = sampler->draws++;
    *token = best;
    if (sampler->temperature == 0) return NULL;
    double top = logits[best], scale = fmin(1 / sampler->temperature, DBL_MAX);
    for (int i = 0; i < n; i++) weights[i] = logits[i];
    for (int i = 0; i < n; i++) tokens[i] = i;
    if (sampler->top_k > 0 && sampler->top_k < n) {
        sampler_keep_top(sampler, n, sampler->top_k);
        n = sampler->top_k;
    }
    for (int i = 0; i < n; i++) weights[i] = sampler_exp((weights[i] - top) * scale);
    double sum = sampler_sum(sampler, n), reached = 0;
    /* 53 random bits: uniform in (0, 1] */
    double uniform = (double)((megalodon_random(sampler->seed, draw) >> 11) + 1) * 0x1p-53;
    if (sampler->top_p < 1) {
        n = sampler_keep_nucleus(sampler, n, sum);
        sum = sampler_sum(sampler, n);
        *token = tokens[sampler_reach(sampler, n, uniform * sum) - 1];
        return NULL;
    }
    for (int i = 0; i < n && reached < uniform * sum; i++) {
        reached += weights[i];
        if (weights[i] > 0) *token = tokens[i];      /* rounding can leave the target at the very end */
    }
    return NULL;
}

#endif
