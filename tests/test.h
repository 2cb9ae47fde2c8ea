/* test.h - what every test program shares: counted checks, and a comparison that cannot be fooled by NaN.
 *
 *     test_begin("json");
 *     check(error == NULL, "document %d: %s", i, error);
 *     return test_end();
 *
 * A failed check prints one line and the program goes on. The last line is "test_json: N passed, N failed"; the exit
 * status is 0 only if something was checked and nothing failed.
 */
#ifndef TESTS_TEST_H
#define TESTS_TEST_H

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum { TEST_MAX_SHOWN = 30 };        /* failures printed; the rest are only counted */

typedef struct Test {
    const char *name;
    long passed, failed, skipped;
} Test;

/* One program is one translation unit, so this is the one record of it. */
static Test test;

static inline void test_begin(const char *name) {
    test = (Test){.name = name};
    setvbuf(stdout, NULL, _IOLBF, 0);    /* what was printed before a crash must be seen */
}

/* Counts one check and returns `ok`, so that what depends on it can be left out: if (!check(...)) return; */
#if defined(__GNUC__)
__attribute__((__format__(__printf__, 4, 5)))
#endif
static inline bool test_check(bool ok, const char *file, int line, const char *format, ...) {
    if (ok) {
        test.passed++;
        return true;
    }
    if (++test.failed <= TEST_MAX_SHOWN) {
        va_list args;
        printf("FAIL %s:%d: ", file, line);
        va_start(args, format);
        vprintf(format, args);
        va_end(args);
        printf("\n");
    }
    return false;
}
#define check(ok, ...) test_check((ok), __FILE__, __LINE__, __VA_ARGS__)

/* A case that cannot run here: it is counted and printed, so that it does not pass unseen. */
static inline void test_skip(const char *why) {
    test.skipped++;
    printf("skip: %s\n", why);
}

/* Is `name` among `names`, which commas separate? All are among NULL. */
static inline bool test_among(const char *names, const char *name) {
    size_t length = strlen(name);
    for (const char *at = names; at; at = strchr(at, ','), at += at != NULL)
        if (!strncmp(at, name, length) && (at[length] == ',' || !at[length])) return true;
    return !names;
}

/* What the command line of a test chooses: a short form, and of backends and parts those named between commas (NULL:
 * all). */
typedef struct TestChoice {
    bool brief;
    const char *backends, *parts;
} TestChoice;

/* Reads [--short] [--backend NAMES] [--only NAMES]. False: there is something else. */
static inline bool test_choose(TestChoice *choice, int argc, char **argv) {
    *choice = (TestChoice){.brief = false};
    for (int i = 1; i < argc; i++) {
        const char **names = !strcmp(argv[i], "--backend") ? &choice->backends
                             : !strcmp(argv[i], "--only")  ? &choice->parts : NULL;
        if (!strcmp(argv[i], "--short")) choice->brief = true;
        else if (names && i + 1 < argc) *names = argv[++i];
        else return false;
    }
    return true;
}

/* Root of the mean square; NaN or infinite where an element is. */
static inline double test_rms(const double *x, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) sum += x[i] * x[i];
    return n ? sqrt(sum / (double)n) : 0;
}

/* RMS(ours - want) / RMS(want) over n elements. Where `want` is under 1e-6 a ratio means nothing: the result is 0 if
 * ours is under 1e-6 too, else infinite. Anything that is not finite, on either side, gives infinity, so that
 * check(relative_rms(...) <= tolerance, ...) fails. */
static inline double relative_rms(const double *ours, const double *want, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        double d = ours[i] - want[i];
        sum += d * d;
    }
    double size = test_rms(want, n), error = n ? sqrt(sum / (double)n) : 0;
    if (!isfinite(size) || !isfinite(error)) return INFINITY;
    if (size < 1e-6) return test_rms(ours, n) < 1e-6 ? 0 : INFINITY;
    return error / size;
}

/* The larger of two errors, for which NaN is infinitely large: fmax would drop it. */
static inline double worse(double worst, double error) { return isnan(error) ? INFINITY : fmax(worst, error); }

/* Prints the verdict; main returns what this returns. A program that checked nothing has failed. */
static inline int test_end(void) {
    if (test.failed > TEST_MAX_SHOWN) printf("... and %ld more failures\n", test.failed - TEST_MAX_SHOWN);
    printf("test_%s: %ld passed, %ld failed", test.name, test.passed, test.failed);
    if (test.skipped) printf(", %ld skipped", test.skipped);
    printf("\n");
    return test.passed > 0 && test.failed == 0 ? 0 : 1;
}

#endif
