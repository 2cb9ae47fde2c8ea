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

enum { V = 300, DRAWS = 40000 };

static void make_logits(float *logits) {
    for (int i = 0; i < V; i++) logits[i] = (float)(4 * sin(0.7 * i) + 2 * cos(0.13 * i * i));
}

/* The probabilities that the settings define, computed the plain way: sort everything, cut, divide by the sum. */
static void expected_probabilities(const float *logits, double temperature, int top_k, double top_p, double *p) {
    SamplerEntry all[V];
    double sum = 0, reached = 0;
    for (int i = 0; i < V; i++) all[i] = (SamplerEntry){exp((double)logits[i] / temperature), i};
    qsort(all, V, sizeof *all, sampler_compare);
    int n = top_k > 0 && top_k < V ? top_k : V, cut = 0;
    for (int i = 0; i < n; i++) sum += all[i].weight;
    while (cut < n && reached < top_p * sum) reached += all[cut++].weight;
    for (int i = 0; i < V; i++) p[i] = 0;
    for (int i = 0; i < cut; i++) p[all[i].token] = all[i].weight / reached;
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
    logits[3] = HUGE_VALF;
    check(sampler_next(&s, logits, &token) != NULL, "a logit is infinite");
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
