/* bench.h - what all benchmarks share: the options, the clock, the table of numbers, random inputs.
 */
#ifndef DEV_BENCH_H
#define DEV_BENCH_H

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "lib/backends.h"
#include "lib/error.h"
#include "lib/model_options.h"
#include "lib/options.h"
#include "lib/report.h"
#include "megalodon.h"
#include "tests/component.h"
#ifdef MEGALODON_WITH_CUDA
#include "bench_cuda.h"
#include "cuda/megalodon_cuda.h"
#endif

#define BENCH_OPTIONS(X)                                                                                                \
    X(TEXT,   backend,          "auto",     0, 0,       "NAME",      "Running", "cpu, cuda or auto")                    \
    X(CHOICE, precision,        "fp32",     0, 0,       "fp32|bf16", "Running", "type of activations (bf16: GPU only)") \
    X(INT,    threads,          "0",        0, 1024,    "COUNT",     "Running", "threads; 0: what OpenMP chooses")      \
    X(INT,    repeats,          "9",        1, 1001,    "COUNT",     "Running", "samples of which the median is told")  \
    X(FLAG,   no_check,         NULL,       0, 0,       "",          "Running", "do not verify what is timed")          \
    X(TEXT,   ceilings,         NULL,       0, 0,       "P,F,M",     "Running",                                         \
      "take these ceilings and measure none: TFLOP/s of products and of fp32, GB/s; 0: unknown")                        \
    X(TEXT,   csv,              NULL,       0, 0,       "PATH",      "Running", "also write every number to this file") \
    X(INT,    batch,            NULL,       1, 65536,   "ROWS",      "Shape", "sequences at once [8; read: 1]")         \
    X(INT,    seq_len,          NULL,       1, 1048576, "TOKENS",    "Shape",                                           \
      "tokens of a sequence, a prompt or a call [512; read: 4096]")                                                     \
    X(FLAG,   forward_backward, NULL,       0, 0,       "",          "Shape", "step: leave the update out")             \
    X(TEXT,   only,             NULL,       0, 0,       "NAME",      "Shape", "components: this one alone")             \
    X(TEXT,   preset,           "bytes12M", 0, 0,       "NAME",      "Model", "a size by name; the rest changes it")

typedef struct Values { BENCH_OPTIONS(OPTION_MEMBER) } Values;
static const Option bench_table[] = { BENCH_OPTIONS(OPTION_ROW) };

/* cblas_sgemm(order, transpose_a, transpose_b, M, N, K, alpha, a, lda, b, ldb, beta, c, ldc) */
typedef void (*Sgemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float,
                      float *, int);
enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };

/* What this machine can do, FLOP/s and bytes/s; NAN where it is not known. Shares are told of these. */
typedef struct Ceilings {
    double product;                  /* a large matrix product in the run's precision                      */
    double fp32;                     /* the same in fp32: the arithmetic outside of products               */
    double memory;                   /* GPU: a copy, read + written; CPU: reading with all threads         */
} Ceilings;

typedef struct Bench {
    Values values;
    OptionSet set;
    int model_rows;                  /* the set's first row of the model's fields */
    const char *program;             /* as it was called                          */
    const char *which;               /* the benchmark's name                      */
    MegalodonConfig given, config;   /* the model's options, and the model        */
    const MegalodonBackend *backend;
    MegalodonPrecision precision;
    bool on_gpu;
    int threads;
    int64_t cache_bytes;             /* of the largest cache                      */
    Ceilings ceilings;
    char *wrong;                     /* ERROR_MAX bytes: the first result that was wrong, or "" */
    FILE *csv;
    Sgemm sgemm;                     /* NULL: no OpenBLAS here                    */
    void (*sgemm_threads)(int);
} Bench;

/* ----------------------------------------------------------------------------------------------------
 * Numbers
 */

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, compare_doubles);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

/* One number for --csv: which benchmark, what was measured, the value in its unit. No name holds a comma. */
static void record(const Bench *bench, const char *benchmark, const char *what, const char *unit,
                   double value) {
    if (bench->csv && isfinite(value)) fprintf(bench->csv, "%s,%s,%s,%.6g\n", benchmark, what, unit, value);
}

/* Says that a result is wrong. The run goes on, since a time is worth knowing even then, and ends with this
 * sentence as its error. */
static void report_wrong(const Bench *bench, const char *sentence) {
    printf("WRONG: %s\n", sentence);
    if (!*bench->wrong) snprintf(bench->wrong, ERROR_MAX, "%s", sentence);
}

/* "63%", or "-" where the ceiling is not known; out has room for 16 bytes. Returns out. */
static const char *percent(double share, char *out) {
    if (isfinite(share)) snprintf(out, 16, "%.0f%%", 100 * share);
    else strcpy(out, "-");
    return out;
}

/* Uniform in (-1, 1), drawn by all threads. */
static float *random_floats(int64_t size, uint64_t key) {
    float *x = host_allocate((size_t)size * sizeof *x);
    #ifdef _OPENMP
    #pragma omp parallel for schedule(static)
    #endif
    for (int64_t i = 0; i < size; i++)
        x[i] = (float)(megalodon_random(key, (uint64_t)i) >> 40) * (2.f / 16777216.f) - 1;
    return x;
}

static int32_t *random_tokens(int64_t count, int vocab_size, uint64_t key) {
    int32_t *tokens = host_allocate((size_t)count * sizeof *tokens);
    for (int64_t i = 0; i < count; i++)
        tokens[i] = (int32_t)(megalodon_random(key, (uint64_t)i) % (uint64_t)vocab_size);
    return tokens;
}

/* ----------------------------------------------------------------------------------------------------
 * Time
 */

/* Waits for a GPU to finish; a CPU always has. */
static void wait_for(const Bench *bench) {
#ifdef MEGALODON_WITH_CUDA
    if (bench->on_gpu) megalodon_cuda_wait();
#else
    (void)bench;
#endif
}

/* Says so if other programs are running: two threads that wait for each other lose whole time slices to
 * them. */
static void warn_if_busy(void) {
    double load = 0;
    FILE *file = fopen("/proc/loadavg", "r");
    if (!file) return;
    if (fscanf(file, "%lf", &load) == 1 && load > 0.5)
        printf(
            "note: the load average is %.1f already; times will be too long, those of several threads most\n",
            load);
    fclose(file);
}

/* Lets idle threads of the other side fall asleep: for some milliseconds they spin on the cores about to be
 * measured. What comes next should run once without a clock, until the system has spread its own threads
 * over the cores. */
static void rest(const Bench *bench) {
    struct timespec pause = {0, 50000000};
    if (bench->threads > 1) nanosleep(&pause, NULL);
}

/* Something to time. */
typedef struct Work {
    void (*run)(void *context);
    void *context;
    bool device_alone;               /* on a GPU: by the device's clock, without the host's part */
    int inner;                       /* calls in one sample                                      */
} Work;

/* Seconds of one call, the mean of a sample. *host: what the host took to ask for them all, if
 * device_alone. */
static double sample_on(const Bench *bench, const Work *work, double *host) {
#ifdef MEGALODON_WITH_CUDA
    if (bench->on_gpu && work->device_alone)
        return bench_cuda_seconds(work->run, work->context, work->inner, 1.5 * *host, host) / work->inner;
#endif
    (void)host;
    double start = report_seconds();
    for (int i = 0; i < work->inner; i++) work->run(work->context);
    wait_for(bench);
    return (report_seconds() - start) / work->inner;
}

static double sample(const Bench *bench, const Work *work) {
    double host = 0;
    return sample_on(bench, work, &host);
}

/* Warms up and chooses `inner` so that a sample takes 20 ms at least. On a device's own clock 5 ms are
 * enough, and 32 calls: more would not fit into its queue, and the host would be part of the time. */
static void prepare(const Bench *bench, Work *work, double *host) {
    bool device = bench->on_gpu && work->device_alone;
    double least = device ? 0.005 : 0.02;
    int most = device ? 32 : 4096;
    work->inner = 1;
    sample_on(bench, work, host);
    while (work->inner < most && sample_on(bench, work, host) * work->inner < least) work->inner *= 2;
}

/* Seconds of one call: the median sample. */
static double seconds_of(const Bench *bench, Work work) {
    double *seconds = host_allocate((size_t)bench->values.repeats * sizeof *seconds), host = 0;
    prepare(bench, &work, &host);
    for (int i = 0; i < bench->values.repeats; i++) seconds[i] = sample_on(bench, &work, &host);
    double middle = median(seconds, bench->values.repeats);
    free(seconds);
    return middle;
}

static void set_threads(int threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
}

/* ----------------------------------------------------------------------------------------------------
 * Memory
 */

/* Bytes in use on the device, whoever allocated them; 0 on the CPU. */
static int64_t device_used(const Bench *bench) {
#ifdef MEGALODON_WITH_CUDA
    if (bench->on_gpu) return bench_cuda_used();
#endif
    (void)bench;
    return 0;
}

/* Bytes of a model that has been used: what it says it allocated, and on a device at least what its creation
 * and its first calls took away from the free memory. `before`: device_used() before it was created. */
static double model_bytes(const Bench *bench, const MegalodonModel *model, int64_t before) {
    MegalodonMemory m;
    bench->backend->memory(model, &m);
    int64_t told = megalodon_total_memory(&m);
    int64_t taken = device_used(bench) - before;
    return (double)(taken > told ? taken : told);
}

#define GIB (1024. * 1024. * 1024.)

#endif
