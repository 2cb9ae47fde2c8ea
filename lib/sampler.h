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
    float *weights;              /* 2 vocab_size: probabilities, not yet divided by their sum: of all tokens, or of a
                                  * list of tokens; then of a part of the list */
    int32_t *tokens;             /* 2 vocab_size + 8: the list, its part, and room for sampler_write */
    int32_t places[256][8];      /* the places of the ones in a mask of eight, see sampler_list       */
} Sampler;

static inline void sampler_destroy(Sampler *sampler) {
    free(sampler->weights);
    free(sampler->tokens);
    sampler->weights = NULL;
    sampler->tokens = NULL;
}

/* Of eight bytes that are 0 or 1: a number below 256 that tells them apart, and their sum. */
static inline uint32_t sampler_mask(uint64_t bytes) { return (uint32_t)(bytes * 0x0102040810204080 >> 56); }
static inline int sampler_ones(uint64_t bytes) { return (int)(bytes * 0x0101010101010101 >> 56); }

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
    sampler->weights = malloc(2 * (size_t)vocab_size * sizeof *sampler->weights);
    sampler->tokens = malloc((2 * (size_t)vocab_size + 8) * sizeof *sampler->tokens);
    for (int subset = 0; subset < 256; subset++) {
        uint8_t in[8];
        int ones = 0;
        uint64_t bytes;
        for (int k = 0; k < 8; k++) in[k] = subset >> k & 1;
        memcpy(&bytes, in, sizeof bytes);
        for (int k = 0; k < 8; k++)
            if (in[k]) sampler->places[sampler_mask(bytes)][ones++] = k;
    }
    if (sampler->weights && sampler->tokens) return NULL;
    sampler_destroy(sampler);
    return errorf("sampler: no memory for %d tokens", vocab_size);
}

/* A large vocabulary is gone through for every token of a text, so what does that are loops that compilers turn into
 * vectors: without a branch, and with sums and maxima side by side, in a fixed order. They take a block at a time, and
 * after each the sums in float are added up in double. */
enum { SAMPLER_BLOCK = 1024, SAMPLER_LANES = 32 };

static inline int sampler_least(int a, int b) { return a < b ? a : b; }

/* The most likely token, of equal ones the first; -1 if a logit is NaN or +infinite. */
static inline int sampler_best(const float *logits, int n) {
    float largest = -HUGE_VALF;
    int best = 0;                                    /* for now the first of its block */
    for (int first = 0; first < n; first += SAMPLER_BLOCK) {
        const float *block = logits + first;
        int size = sampler_least(SAMPLER_BLOCK, n - first);
        float tops[SAMPLER_LANES], top = -HUGE_VALF;
        int32_t numbers[SAMPLER_LANES], all_numbers = 1;
        for (int k = 0; k < SAMPLER_LANES; k++) tops[k] = -HUGE_VALF, numbers[k] = 1;
        for (int i = 0; i < size; i += SAMPLER_LANES)
            for (int k = 0; k < sampler_least(SAMPLER_LANES, size - i); k++) {
                tops[k] = block[i + k] > tops[k] ? block[i + k] : tops[k];
                numbers[k] &= block[i + k] < HUGE_VALF;
            }
        for (int k = 0; k < SAMPLER_LANES; k++) {
            top = tops[k] > top ? tops[k] : top;
            all_numbers &= numbers[k];
        }
        if (!all_numbers) return -1;
        if (top > largest) largest = top, best = first;
    }
    while (logits[best] != largest) best++;
    return best;
}

typedef union SamplerFloat { float number; uint32_t bits; } SamplerFloat;

static inline uint32_t sampler_bits(float number) { return (SamplerFloat){.number = number}.bits; }

/* 2^x for x <= 0, to about 1e-7 of it; 0 where that would be smaller than 2^-126. Unlike the library's it can be
 * computed for several x at once: 2^k 2^f with f between -1/2 and 1/2. Of all polynomials of this degree that are 1
 * at 0, this one has the least relative error: 2e-8. */
static inline float sampler_power(float x) {
    const float to_integer = 0x1.8p23f;              /* a sum with it has the nearest integer in its last bits */
    float sum = x + to_integer, f = x - (sum - to_integer);
    float p = 1.55946778e-4f;
    p = p * f + 1.34066434e-3f;
    p = p * f + 9.61769279e-3f;
    p = p * f + 5.55031039e-2f;
    p = p * f + 2.40226522e-1f;
    p = p * f + 6.93147242e-1f;
    p = p * f + 1;
    uint32_t bits = sampler_bits(p) + (sampler_bits(sum) << 23);
    return (SamplerFloat){.bits = bits & -(uint32_t)(x > -126)}.number;     /* without a branch: several at once */
}

static inline float sampler_total(float *sums) {
    for (int half = SAMPLER_LANES / 2; half > 0; half /= 2)
        for (int k = 0; k < half; k++) sums[k] += sums[k + half];
    return sums[0];
}

/* Sum of those of n weights that are smaller than `bound`. */
static inline double sampler_sum(const float *weights, int n, float bound) {
    double total = 0;
    for (int first = 0; first < n; first += SAMPLER_BLOCK) {
        const float *block = weights + first;
        int size = sampler_least(SAMPLER_BLOCK, n - first);
        float sums[SAMPLER_LANES] = {0};
        for (int i = 0; i < size; i += SAMPLER_LANES)
            for (int k = 0; k < sampler_least(SAMPLER_LANES, size - i); k++)
                sums[k] += block[i + k] < bound ? block[i + k] : 0;
        total += sampler_total(sums);
    }
    return total;
}

/* weight = 2^(scale (logit - largest logit)) */
static inline float sampler_scale(const Sampler *s) {
    return (float)fmin(1.44269504088896340736 / s->temperature, FLT_MAX);
}

/* The weights of all tokens; returns their sum. top: the largest logit. */
static inline double sampler_weigh(Sampler *s, const float *logits, float top) {
    float scale = sampler_scale(s);
    double total = 0;
    for (int first = 0; first < s->vocab_size; first += SAMPLER_BLOCK) {
        const float *block = logits + first;
        float *weights = s->weights + first, sums[SAMPLER_LANES] = {0};
        int size = sampler_least(SAMPLER_BLOCK, s->vocab_size - first);
        for (int i = 0; i < size; i += SAMPLER_LANES)
            for (int k = 0; k < sampler_least(SAMPLER_LANES, size - i); k++) {
                weights[i + k] = sampler_power((block[i + k] - top) * scale);
                sums[k] += weights[i + k];
            }
        total += sampler_total(sums);
    }
    return total;
}

/* Draws from all tokens, in the order of their numbers: the block, then the token. */
static inline int32_t sampler_draw_any(const Sampler *s, double target) {
    int first = 0, likely = 0;
    double reached = 0;
    for (; first + SAMPLER_BLOCK < s->vocab_size; first += SAMPLER_BLOCK) {
        double sum = sampler_sum(s->weights + first, SAMPLER_BLOCK, HUGE_VALF);
        if (reached + sum >= target) break;
        reached += sum;
    }
    for (int i = first; i < s->vocab_size && reached < target; i++) {
        reached += s->weights[i];
        if (s->weights[i] > 0) likely = i;           /* rounding can leave the target at the very end */
    }
    return likely;
}

static inline void sampler_write(int32_t *restrict tokens, const int32_t *restrict places, int32_t first) {
    for (int k = 0; k < 8; k++) tokens[k] = first + places[k];
}

/* Lists the tokens whose values are at least `bound`, in the order of their numbers; returns how many. It takes eight
 * neighbours at a time, and writes eight: those that do not belong to the list are written over. */
static inline int sampler_list(Sampler *s, const float *values, float bound) {
    int n = 0;
    for (int first = 0; first < s->vocab_size; first += SAMPLER_BLOCK) {
        const float *block = values + first;
        int size = sampler_least(SAMPLER_BLOCK, s->vocab_size - first);
        uint8_t in[SAMPLER_BLOCK + 8];
        for (int i = 0; i < size; i++) in[i] = block[i] >= bound;
        memset(in + size, 0, 8);
        for (int i = 0; i < size; i += 8) {
            uint64_t bytes;
            memcpy(&bytes, in + i, sizeof bytes);
            sampler_write(s->tokens + n, s->places[sampler_mask(bytes)], first + i);
            n += sampler_ones(bytes);
        }
    }
    return n;
}

/* Lists tokens among which the nucleus is, with their weights: all others together weigh less than (1 - top_p) of the
 * sum. So that there are few, their least weight is guessed from a part of the vocabulary. Returns how many. */
static inline int sampler_list_nucleus(Sampler *s, double sum, double *others) {
    enum { RUN = 16, RUNS = 128 };
    int n = s->vocab_size;
    double allowed = 0.99 * (1 - s->top_p) * sum;    /* less than that for what sums are rounded by */
    float bound = (float)(allowed / n);              /* is never too high */
    if (n >= 4 * RUN * RUNS) {
        static const float factors[] = {65536, 256, 16, 4, 2, 1.5f, 1.2f};
        float part[RUN * RUNS];
        double share = 0.8 * allowed * RUN * RUNS / n;
        for (int i = 0; i < RUNS; i++)
            memcpy(part + i * RUN, s->weights + (int64_t)n * i / RUNS, RUN * sizeof *part);
        for (size_t i = 0; i < sizeof factors / sizeof *factors; i++) {
            float more = bound * factors[i];
            if (more <= allowed && sampler_sum(part, RUN * RUNS, more) < share) bound = more;
        }
    }
    while ((*others = sampler_sum(s->weights, n, bound)) >= allowed) bound /= 4;
    n = sampler_list(s, s->weights, bound);
    for (int i = 0; i < n; i++) s->weights[i] = s->weights[s->tokens[i]];
    return n;
}

/* The order that all cuts go by: the more likely first; equal ones in the order of their numbers, so that the order is
 * the same on every machine. */
static inline bool sampler_before(const float *values, int32_t a, int32_t b) {
    return values[a] != values[b] ? values[a] > values[b] : a < b;
}

/* Restores the heap of the first `size` of a list below place i; its root is the one that comes last in that order. */
static inline void sampler_sift(const float *values, int32_t *heap, int size, int i) {
    for (int child; (child = 2 * i + 1) < size; i = child) {
        if (child + 1 < size && sampler_before(values, heap[child], heap[child + 1])) child++;
        if (sampler_before(values, heap[child], heap[i])) return;
        int32_t number = heap[i];
        heap[i] = heap[child], heap[child] = number;
    }
}

/* The k-th in that order of n listed numbers: the root of a heap of the best k so far, O(n log k). Mixes the list. */
static inline int32_t sampler_kth(const float *values, int32_t *list, int n, int k) {
    for (int i = k / 2 - 1; i >= 0; i--) sampler_sift(values, list, k, i);
    for (int i = k; i < n; i++) {
        if (sampler_before(values, list[0], list[i])) continue;
        list[0] = list[i];
        sampler_sift(values, list, k, 0);
    }
    return list[0];
}

/* Lists the k most likely tokens without those of probability zero, with their weights; returns how many. They are
 * taken in groups first: the k-th of the largest logits of groups is at most the k-th of all, and few are above it. */
static inline int sampler_list_top(Sampler *s, const float *logits, float top, int k) {
    enum { GROUP = 16 };
    int32_t *list = s->tokens, *part = list + s->vocab_size;
    float bound = -HUGE_VALF, *tops = s->weights;
    int groups = s->vocab_size / GROUP, kept = 0;
    if (k <= groups) {
        for (int g = 0; g < groups; g++) tops[g] = logits[g], list[g] = g;
        for (int i = 1; i < GROUP; i++)
            for (int g = 0; g < groups; g++) {
                float logit = logits[i * groups + g];
                tops[g] = logit > tops[g] ? logit : tops[g];
            }
        bound = tops[sampler_kth(tops, list, groups, k)];
    }
    int n = sampler_list(s, logits, bound);
    memcpy(part, list, (size_t)n * sizeof *part);
    int32_t last = sampler_kth(logits, part, n, k);
    float scale = sampler_scale(s);
    for (int i = 0; i < n; i++) {
        int32_t token = list[i];
        list[kept] = token;
        s->weights[kept] = sampler_power((logits[token] - top) * scale);
        kept += !sampler_before(logits, last, token) && s->weights[kept] > 0;
    }
    return kept;
}

/* How n weights spread: their sums in buckets, the largest weights in the first. The logarithm of a weight is about
 * linear in its bits, and these are in the order of the weights. */
enum { SAMPLER_BUCKETS = 256 };
typedef struct SamplerSpread {
    uint32_t highest, last;      /* the bits of the largest weight; the last bucket, 0 if all weights are equal */
    int shift;                   /* the bucket of a weight: (highest - its bits) >> shift                       */
    double sum, sums[SAMPLER_BUCKETS];
} SamplerSpread;

static inline void sampler_spread(SamplerSpread *spread, const float *weights, int n) {
    uint32_t lowest = UINT32_MAX, highest = 0;
    for (int i = 0; i < n; i++) {
        uint32_t bits = sampler_bits(weights[i]);
        lowest = bits < lowest ? bits : lowest;
        highest = bits > highest ? bits : highest;
    }
    uint32_t buckets = (uint32_t)sampler_least(SAMPLER_BUCKETS, n);
    int shift = 0;
    while ((highest - lowest) >> shift >= buckets) shift++;
    *spread = (SamplerSpread){.highest = highest, .last = (highest - lowest) >> shift, .shift = shift};
    for (int i = 0; i < n; i++) spread->sums[(highest - sampler_bits(weights[i])) >> shift] += weights[i];
    for (uint32_t bucket = 0; bucket <= spread->last; bucket++) spread->sum += spread->sums[bucket];
}

/* The first of n listed tokens, the more likely ones before, with which their weights reach `target` > 0; of equal ones
 * those with lower numbers come first. Returns what the weights reach with it. spread: of the list. */
static inline double sampler_reach(Sampler *s, const SamplerSpread *spread, int n, double target, int32_t *token) {
    const float *weights = s->weights;
    const int32_t *tokens = s->tokens;
    float *part_weights = s->weights + s->vocab_size;
    int32_t *part = s->tokens + s->vocab_size;       /* what is in one bucket, in the order of the list */
    SamplerSpread inner;
    double reached = 0;
    while (spread->last > 0) {
        uint32_t bucket = 0;
        while (bucket < spread->last && reached + spread->sums[bucket] < target) reached += spread->sums[bucket++];
        int kept = 0;
        for (int i = 0; i < n; i++) {
            float weight = weights[i];
            part_weights[kept] = weight, part[kept] = tokens[i];
            kept += (spread->highest - sampler_bits(weight)) >> spread->shift == bucket;
        }
        weights = part_weights, tokens = part, n = kept;
        sampler_spread(&inner, weights, n);
        spread = &inner;
    }
    double count = fmin(fmax(ceil((target - reached) / weights[0]), 1), n);
    *token = tokens[(int)count - 1];
    return reached + count * weights[0];
}

/* Draws a token from logits (vocab_size floats); -INFINITY forbids a token. Error: a logit that is NaN or +infinite,
 * or nothing to choose from. */
static inline const char *sampler_next(Sampler *sampler, const float *logits, int32_t *token) {
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
    /* 53 random bits: uniform in (0, 1] */
    double uniform = (double)((megalodon_random(sampler->seed, draw) >> 11) + 1) * 0x1p-53;
    float top = logits[best];
    double others = 0;
    if (sampler->top_k > 0 && sampler->top_k < n) {
        n = sampler_list_top(sampler, logits, top, sampler->top_k);
    } else {
        double sum = sampler_weigh(sampler, logits, top);
        if (sampler->top_p == 1) {
            *token = sampler_draw_any(sampler, uniform * sum);
            return NULL;
        }
        n = sampler_list_nucleus(sampler, sum, &others);
    }
    SamplerSpread spread;
    sampler_spread(&spread, sampler->weights, n);
    double target = sampler->top_p * (spread.sum + others);
    double nucleus = sampler_reach(sampler, &spread, n, target, token);
    /* a draw from `target` on is the last token of the nucleus, which is there already */
    if (uniform * nucleus < target) sampler_reach(sampler, &spread, n, uniform * nucleus, token);
    return NULL;
}

#endif
