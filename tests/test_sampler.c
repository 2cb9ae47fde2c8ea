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

enum { V = 300, MANY = 3280, DRAWS = 40000 };

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

/* With top-p a draw goes through the allowed tokens, most likely first: the same token as after a sort, for flat and
 * steep distributions and for logits of which many are equal. */
static void test_nucleus(int n, double spread, bool equal) {
    static float logits[MANY];
    static Entry all[MANY];
    static const double shares[] = {0.01, 0.3, 0.5, 0.95, 0.999999};
    for (uint64_t seed = 0; seed < 40; seed++) {
        double top_p = shares[seed % 5];
        int32_t token = -1;
        Sampler sampler;
        for (int i = 0; i < n; i++) {
            double uniform = (double)(megalodon_random(seed, (uint64_t)i) >> 11) * 0x1p-53;
            logits[i] = (float)(spread * (equal ? floor(4 * uniform) : uniform));
        }
        if (!check(!sampler_create(&sampler, n, 0.8, 0, top_p, seed), "create")) break;
        int cut = expected_entries(logits, n, 0.8, 0, top_p, all), place = 0;
        double sum = 0, reached = 0;
        for (int i = 0; i < cut; i++) sum += all[i].weight;
        double target = (double)((megalodon_random(seed, 0) >> 11) + 1) * 0x1p-53 * sum;
        for (reached = all[0].weight; place < cut - 1 && reached < target;) reached += all[++place].weight;
        check(!sampler_next(&sampler, logits, &token) && token == all[place].token,
              "%d tokens, spread %g, top-p %g, seed %d: drew %d, expected %d", n, spread, top_p, (int)seed, (int)token,
              (int)all[place].token);
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
        test_nucleus(n, 10, false);
        test_nucleus(n, 0.5, false);
        test_nucleus(n, 2, true);
        test_nucleus(n, 0, true);
    }
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
