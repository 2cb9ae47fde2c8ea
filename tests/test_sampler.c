/* test_sampler.c - drawing from logits: distributions, limits, repeatability, and outputs that are no numbers. Also
 * the writer that turns drawn bytes into text.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <stdlib.h>
#include <string.h>

#include "../lib/sampler.h"
#include "../lib/text.h"
#include "test.h"

enum { V = 300, MANY = 9841, DRAWS = 40000 };

static void make_logits(float *logits) {
    for (int i = 0; i < V; i++) logits[i] = (float)(4 * sin(0.7 * i) + 2 * cos(0.13 * i * i));
}

typedef struct Entry { double weight; int32_t token; } Entry;

static int compare_entries(const void *a, const void *b) {
    const Entry *x = a, *y = b;
    if (x->weight != y->weight) return x->weight > y->weight ? -1 : 1;
    return x->token < y->token ? -1 : x->token > y->token;
}

/* What the settings allow, computed the plain way: sorts everything and cuts. Returns how many of n. */
static int expected_entries(const float *logits, int n, double temperature, int top_k, double top_p, Entry *all) {
    double sum = 0, reached = 0, largest = -HUGE_VAL;
    int cut = 0, few = top_k > 0 && top_k < n ? top_k : n;
    for (int i = 0; i < n; i++) largest = fmax(largest, logits[i]);
    for (int i = 0; i < n; i++) all[i] = (Entry){exp((logits[i] - largest) / temperature), i};
    qsort(all, (size_t)n, sizeof *all, compare_entries);
    for (int i = 0; i < few; i++) sum += all[i].weight;
    while (cut < few && reached < top_p * sum) reached += all[cut++].weight;
    return cut;
}

/* The probabilities that the settings define. */
static void expected_probabilities(const float *logits, double temperature, int top_k, double top_p, double *p) {
    Entry all[V];
    double sum = 0;
    int cut = expected_entries(logits, V, temperature, top_k, top_p, all);
    for (int i = 0; i < cut; i++) sum += all[i].weight;
    for (int i = 0; i < V; i++) p[i] = 0;
    for (int i = 0; i < cut; i++) p[all[i].token] = all[i].weight / sum;
}

static void test_distribution(double temperature, int top_k, double top_p) {
    float logits[V];
    double p[V];
    int seen[V] = {0};
    Sampler sampler;
    make_logits(logits);
    expected_probabilities(logits, temperature, top_k, top_p, p);
    const char *error = sampler_create(&sampler, V, temperature, top_k, top_p, 7);
    if (!check(!error, "create: %s", error)) return;
    int outside = 0;
    for (int i = 0; i < DRAWS && !error; i++) {
        int32_t token = -1;
        error = sampler_next(&sampler, logits, &token);
        if (token >= 0 && token < V) seen[token]++;
        else outside++;
    }
    check(!error, "T %g, k %d, p %g: %s", temperature, top_k, top_p, error);
    double chi2 = 0;
    int classes = 0;
    for (int i = 0; i < V; i++) {
        if (p[i] == 0) outside += seen[i];
        if (p[i] * DRAWS < 5) continue;
        chi2 += (seen[i] - p[i] * DRAWS) * (seen[i] - p[i] * DRAWS) / (p[i] * DRAWS);
        classes++;
    }
    check(outside == 0, "T %g, k %d, p %g: %d draws outside of the allowed tokens", temperature, top_k, top_p, outside);
    /* Mean classes - 1, standard deviation sqrt(2 classes): five of those are never passed by chance. */
    check(chi2 < classes + 5 * sqrt(2. * classes), "T %g, k %d, p %g: chi-square %g over %d tokens", temperature, top_k,
          top_p, chi2, classes);
    sampler_destroy(&sampler);
}

static const float *entry_logits;                    /* what compare_logits looks at */
static int compare_logits(const void *a, const void *b) {
    float x = entry_logits[((const Entry *)a)->token], y = entry_logits[((const Entry *)b)->token];
    return x != y ? (x > y ? -1 : 1) : ((const Entry *)a)->token < ((const Entry *)b)->token ? -1 : 1;
}

/* Does a cut draw go through the allowed tokens, most likely first, as it would after a sort? From the sampler's own
 * weights, so that nothing but the rounding of sums lies between: 1e-7 of what all weigh. */
static void check_draw(const char *name, const float *logits, int n, int top_k, double top_p, uint64_t seed) {
    static Entry all[MANY];
    Sampler sampler;
    int32_t token = -1;
    if (!check(!sampler_create(&sampler, n, 0.8, top_k, top_p, seed), "create")) return;
    int best = sampler_best(logits, n), few = top_k > 0 && top_k < n ? top_k : n;
    double largest = 0, off = 0, sum = 0;
    for (int i = 0; i < n; i++) largest = i && logits[i] <= largest ? largest : logits[i];
    check(best >= 0 && logits[best] == largest, "%s, %d tokens: the best is %d", name, n, best);
    sampler_weigh(&sampler, logits, logits[best]);
    for (int i = 0; i < n; i++) {
        double x = (logits[i] - largest) / 0.8, weight = sampler.weights[i];
        all[i] = (Entry){weight, i};
        if (x > -87) off = fmax(off, fabs(weight / exp(x) - 1) / (1 - x));
        else off = fmax(off, weight);
    }
    check(off < 3e-7, "%s, %d tokens: a weight is off by %g", name, n, off);
    entry_logits = logits;
    if (few < n) qsort(all, (size_t)n, sizeof *all, compare_logits);
    qsort(all, (size_t)few, sizeof *all, compare_entries);
    for (int i = 0; i < few; i++) sum += all[i].weight;
    /* the nucleus for a share that is smaller by the rounding, and for one that is larger */
    double reached = 0, least = 0, most = 0, rounding = 1e-7 * sum, before = 0;
    int cut = 0;
    for (; cut < few && (cut == 0 || reached < top_p * sum + rounding); cut++) {
        if (cut == 0 || reached < top_p * sum - rounding) least = reached + all[cut].weight;
        reached += all[cut].weight;
    }
    most = reached;
    double uniform = (double)((megalodon_random(seed, 0) >> 11) + 1) * 0x1p-53;
    const char *error = sampler_next(&sampler, logits, &token);
    int place = 0;
    for (; place < cut && all[place].token != token; place++) before += all[place].weight;
    bool right = !error && place < cut && before <= uniform * most + rounding &&
                 before + all[place].weight >= uniform * least - rounding;
    check(right, "%s, %d tokens, top-k %d, top-p %g, seed %d: drew %d, %g to %g of %g, expected %g", name, n, top_k,
          top_p, (int)seed, (int)token, before, before + all[place < n ? place : 0].weight, sum, uniform * most);
    sampler_destroy(&sampler);
}

static double uniform_number(uint64_t seed, int i) {
    return (double)(megalodon_random(seed, (uint64_t)i) >> 11) * 0x1p-53;
}

/* Flat and steep distributions, logits of which many are equal, forbidden tokens, and a few tokens that weigh more than
 * all others together, anywhere in a large vocabulary. */
static void test_cuts(int n) {
    static float logits[MANY];
    static const double shares[] = {0.01, 0.3, 0.5, 0.95, 0.999999};
    for (uint64_t seed = 0; seed < (n > 1000 ? 5 : 40); seed++) {
        double top_p = shares[seed % 5];
        int top_k = n / 2 < 1 ? 1 : (int)(1 + megalodon_random(seed, 1) % (uint64_t)(seed % 2 ? n / 2 : n / 20 + 1));
#define DRAW(name, logit)                                          \
        for (int i = 0; i < n; i++) logits[i] = (float)(logit);    \
        check_draw(name, logits, n, 0, top_p, seed);               \
        check_draw(name, logits, n, top_k, top_p, seed);           \
        check_draw(name, logits, n, top_k, 1, seed)
        DRAW("steep", 10 * uniform_number(seed, i));
        DRAW("very steep", 400 * uniform_number(seed, i) - 1000);
        DRAW("flat", 0.5 * uniform_number(seed, i));
        DRAW("four values", 2 * floor(4 * uniform_number(seed, i)));
        DRAW("equal", 0);
        DRAW("half forbidden", i % 2 && i != n - 1 ? -HUGE_VAL : 10 * uniform_number(seed, i));
        DRAW("one allowed", i != (int)(seed * 977 % (uint64_t)n) ? -HUGE_VAL : -3);
        DRAW("few", 5 * uniform_number(seed, i) + (megalodon_random(seed + 1, (uint64_t)i) % (n / 5 + 1u) ? 0 : 15));
        DRAW("powers", -log(1 + (i + seed * 1237) % (uint64_t)n));
#undef DRAW
    }
}

/* Without cuts a draw goes through the tokens in the order of their numbers. */
static void test_order(int n) {
    static float logits[MANY];
    for (uint64_t seed = 0; seed < 40; seed++) {
        int32_t token = -1;
        Sampler sampler;
        for (int i = 0; i < n; i++) logits[i] = (float)(seed % 2 ? 8 * uniform_number(seed, i) : 0);
        if (!check(!sampler_create(&sampler, n, 0.8, 0, 1, seed), "create")) return;
        const char *error = sampler_next(&sampler, logits, &token);
        double sum = 0, before = 0, uniform = (double)((megalodon_random(seed, 0) >> 11) + 1) * 0x1p-53;
        for (int i = 0; i < n; i++) sum += sampler.weights[i];
        for (int i = 0; i < token; i++) before += sampler.weights[i];
        check(!error && token >= 0 && token < n && before <= (uniform + 1e-7) * sum &&
              before + sampler.weights[token] >= (uniform - 1e-7) * sum,
              "%d tokens, seed %d: drew %d after %g of %g, expected %g", n, (int)seed, (int)token, before, sum,
              uniform * sum);
        sampler_destroy(&sampler);
    }
}

/* The largest logit and what is none, wherever they are; lists and sums of every length. */
static void test_places(void) {
    static float logits[2100];
    Sampler sampler;
    for (int n = 1; n <= 2100; n += n < 70 ? 1 : 61) {
        if (!check(!sampler_create(&sampler, n, 1, 0, 1, 1), "create")) return;
        for (int at = 0; at < n; at += n < 70 ? 1 : 23) {
            for (int i = 0; i < n; i++) logits[i] = -5;
            logits[at] = -1, logits[n - 1] = -1;
            int best = sampler_best(logits, n);
            check(best == at, "%d tokens: the best is %d, expected %d", n, best, at);
            int listed = sampler_list(&sampler, logits, -1), expected = at == n - 1 ? 1 : 2;
            check(listed == expected && sampler.tokens[0] == at && sampler.tokens[listed - 1] == n - 1,
                  "%d tokens: listed %d, first %d, expected %d and %d", n, listed, (int)sampler.tokens[0], expected,
                  at);
            logits[at] = NAN;
            check(sampler_best(logits, n) == -1, "%d tokens: number %d is NaN", n, at);
            logits[at] = HUGE_VALF;
            check(sampler_best(logits, n) == -1, "%d tokens: number %d is infinite", n, at);
        }
        for (int i = 0; i < n; i++) logits[i] = (float)(i % 3);
        int listed = sampler_list(&sampler, logits, 1), right = 0;
        for (int i = 0, k = 0; i < n; i++)
            if (i % 3) right += k < listed && sampler.tokens[k++] == i;
        double sum = sampler_sum(logits, n, 2);
        check(sum == (n + 1) / 3, "%d tokens: those below 2 weigh %g", n, sum);
        check(listed == n - (n + 2) / 3 && right == listed, "%d tokens: %d listed, %d right", n, listed, right);
        sampler_destroy(&sampler);
    }
}

static void test_power(void) {
    double worst = 0;
    for (double x = 0; x > -126; x -= 0.000917) worst = fmax(worst, fabs(sampler_power((float)x) / exp2((float)x) - 1));
    check(worst < 2e-7, "2^x is off by %g of itself", worst);
    check(sampler_power(0) == 1 && sampler_power(-127) == 0 && sampler_power(-1e30f) == 0 &&
          sampler_power(-HUGE_VALF) == 0, "2^x at its ends");
}

static void test_limits(void) {
    float logits[V];
    int32_t token = -1, other = -1;
    Sampler a, b;
    make_logits(logits);
    logits[17] = logits[23] = 50;                            /* equal: the lower number wins */
    check(!sampler_create(&a, V, 0, 0, 1, 1), "create greedy");
    check(!sampler_next(&a, logits, &token) && token == 17, "greedy: expected 17, found %d", (int)token);
    sampler_destroy(&a);
    check(!sampler_create(&a, V, 1, 1, 1, 1), "create top-k 1");
    check(!sampler_next(&a, logits, &token) && token == 17, "top-k 1: expected 17, found %d", (int)token);
    sampler_destroy(&a);
    check(!sampler_create(&a, V, 1, 0, 1e-6, 1), "create top-p 1e-6");
    check(!sampler_next(&a, logits, &token) && token == 17, "top-p 1e-6: expected 17, found %d", (int)token);
    sampler_destroy(&a);
    check(!sampler_create(&a, V, 1e-300, 0, 1, 1), "create T 1e-300");
    check(!sampler_next(&a, logits, &token) && (token == 17 || token == 23), "T 1e-300: found %d", (int)token);
    sampler_destroy(&a);

    /* One allowed token, whatever the settings. */
    for (int i = 0; i < V; i++) logits[i] = -HUGE_VALF;
    logits[V - 1] = -1e30f;
    check(!sampler_create(&a, V, 2, 5, 0.5, 1), "create");
    for (int i = 0; i < 20; i++)
        check(!sampler_next(&a, logits, &token) && token == V - 1, "one token allowed: found %d", (int)token);
    sampler_destroy(&a);

    /* The same seed and the same count of draws give the same token, without what was drawn between. */
    make_logits(logits);
    check(!sampler_create(&a, V, 1, 0, 0.9, 99) && !sampler_create(&b, V, 1, 0, 0.9, 99), "create two");
    for (int i = 0; i < 100; i++) {
        check(!sampler_next(&a, logits, &token), "draw a");
        b.draws = (uint64_t)i;
        check(!sampler_next(&b, logits, &other) && token == other, "draw %d: %d and %d", i, (int)token, (int)other);
    }
    sampler_destroy(&a);
    sampler_destroy(&b);
}

static void test_errors(void) {
    float logits[4] = {0, 1, 2, 3};
    int32_t token;
    Sampler s;
    check(sampler_create(&s, 0, 1, 0, 1, 1) != NULL, "no tokens");
    check(sampler_create(&s, 4, -1, 0, 1, 1) != NULL, "negative temperature");
    check(sampler_create(&s, 4, NAN, 0, 1, 1) != NULL, "temperature NaN");
    check(sampler_create(&s, 4, 1, -1, 1, 1) != NULL, "negative top-k");
    check(sampler_create(&s, 4, 1, 0, 0, 1) != NULL, "top-p 0");
    check(sampler_create(&s, 4, 1, 0, NAN, 1) != NULL, "top-p NaN");
    if (!check(!sampler_create(&s, 4, 0, 0, 1, 1), "create")) return;
    logits[3] = NAN;
    check(sampler_next(&s, logits, &token) != NULL, "a logit is NaN");
    logits[3] = -NAN;
    check(sampler_next(&s, logits, &token) != NULL, "a logit is NaN of the other sign");
    logits[3] = HUGE_VALF;
    check(sampler_next(&s, logits, &token) != NULL, "a logit is infinite");
    for (int i = 0; i < 4; i++) logits[i] = -0.0f;
    logits[2] = 0;
    check(!sampler_next(&s, logits, &token) && token == 0, "0 and -0 are equal: found %d", (int)token);
    for (int i = 0; i < 4; i++) logits[i] = -HUGE_VALF;
    check(sampler_next(&s, logits, &token) != NULL, "nothing to draw from");
    sampler_destroy(&s);
}

/* Puts bytes one by one, and checks that no prefix of what is written ever ends inside a character. */
static void test_text(const char *name, const char *bytes, size_t n, const char *stop, const char *expected) {
    char found[256];
    FILE *file = tmpfile();
    if (!check(file != NULL, "tmpfile")) return;
    TextWriter writer = {.file = file, .stop = stop};
    for (size_t i = 0; i < n; i++) {
        text_put(&writer, (uint8_t)bytes[i]);
        fflush(file);
        long length = ftell(file);
        check(length <= (long)strlen(expected), "%s: %ld bytes after byte %zu", name, length, i);
        check(text_whole((const uint8_t *)expected, (size_t)length) == (size_t)length,
              "%s: half a character after byte %zu", name, i);
    }
    text_end(&writer);
    rewind(file);
    size_t length = fread(found, 1, sizeof found - 1, file);
    found[length] = 0;
    check(strcmp(found, expected) == 0, "%s: expected \"%s\", found \"%s\"", name, expected, found);
    fclose(file);
}

int main(void) {
    test_begin("sampler");
    test_distribution(1, 0, 1);
    test_distribution(0.7, 0, 1);
    test_distribution(1, 10, 1);
    test_distribution(1, 0, 0.9);
    test_distribution(1.3, 50, 0.8);
    test_distribution(1, V, 1);
    for (int n = 1; n <= MANY; n = n * 3 + 1) {
        test_cuts(n);
        test_order(n);
    }
    test_places();
    test_power();
    test_limits();
    test_errors();
#define TEXT(name, bytes, stop, expected) test_text(name, bytes, sizeof bytes - 1, stop, expected)
    TEXT("plain", "hello", NULL, "hello");
    TEXT("characters of 2, 3 and 4 bytes", "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z", NULL,
         "a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80z");
    TEXT("cut in a character", "ab\xf0\x9f\x98", NULL, "ab");
    TEXT("no character", "a\x80\xff\xc3z", NULL, "a\x80\xff\xc3z");
    TEXT("stop", "one<|end|>two", "<|end|>", "one");
    TEXT("almost stop", "one<|en<|end<|end|>", "<|end|>", "one<|en<|end");
    TEXT("stop that never comes", "one<|end|", "<|end|>", "one<|end|");
    TEXT("stop that repeats itself", "xaabaabaaac", "aabaaa", "xaab");
    TEXT("stop after half a character", "\xc3<|", "<|", "");
#undef TEXT
    return test_end();
}
