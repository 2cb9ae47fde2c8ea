/* bench_ceilings.h - what the machine can do, measured before anything is told as a share of it.
 *
 *   GPU  a copy of 1 GiB within the device, bytes read and written; cuBLAS on 8192 x 8192 matrices, in the
 *        run's precision and in fp32
 *   CPU  the sum of 512 MiB, bytes read; OpenBLAS, if it is installed, on 4096 x 1024 x 1024
 */
#ifndef DEV_BENCH_CEILINGS_H
#define DEV_BENCH_CEILINGS_H

#include "bench.h"
#include "bench_matmul.h"

/* ---- CPU ---- */

/* Sums a buffer much larger than any cache with all threads. */
typedef struct Stream {
    float *data;
    int64_t size;
    double sum;
} Stream;

static double sum_block(const float *x, int64_t size) {
    float sum = 0;
    #ifdef _OPENMP
    #pragma omp simd reduction(+ : sum)
    #endif
    for (int64_t i = 0; i < size; i++) sum += x[i];
    return sum;
}

static void stream_read(void *context) {
    enum { BLOCK = 1 << 16 };
    Stream *stream = context;
    double sum = 0;
    #ifdef _OPENMP
    #pragma omp parallel for schedule(static) reduction(+ : sum)
    #endif
    for (int64_t i = 0; i < stream->size; i += BLOCK) sum += sum_block(stream->data + i, BLOCK);
    stream->sum = sum;
}

/* Bytes a second that this machine reads from memory. */
static double read_bandwidth(const Bench *bench) {
    Stream stream = {.size = (int64_t)1 << 27};      /* 512 MiB */
    stream.data = host_allocate((size_t)stream.size * sizeof(float));
    for (int64_t i = 0; i < stream.size; i++) stream.data[i] = (float)(i & 3);
    double seconds = seconds_of(bench, (Work){stream_read, &stream, false, 1});
    if (stream.sum != 1.5 * (double)stream.size) die("bench ceilings: the sum over the buffer is wrong");
    free(stream.data);
    return (double)stream.size * sizeof(float) / seconds;
}

/* FLOP/s of OpenBLAS with so many threads; NAN without it. */
static double openblas_rate(const Bench *bench, int threads) {
    double ours, theirs, ratio;
    if (!bench->sgemm) return NAN;
    Product p = product_create(bench, USE_FORWARD, 4096, 1024, 1024);
    bench->sgemm_threads(threads);
    product_rates(&p, &ours, &theirs, &ratio);
    product_destroy(&p);
    return 1e9 * theirs;
}

/* ---- GPU ---- */

#ifdef MEGALODON_WITH_CUDA

enum { SQUARE = 8192, PATTERN_ROWS = 512 };

/* A square matrix whose row i is row i mod 512 of random numbers. */
typedef struct SquareMatrix {
    float *pattern;                  /* PATTERN_ROWS,SQUARE as the device holds them */
    void *device;
} SquareMatrix;

typedef struct SquareProduct {
    SquareMatrix a, b;
    void *c;
    bool is_bf16;
} SquareProduct;

static SquareMatrix square_create(MegalodonDType type, uint64_t key) {
    int64_t size = (int64_t)PATTERN_ROWS * SQUARE;
    size_t bytes = (size_t)size * dtype_bytes(type);
    SquareMatrix m = {random_floats(size, key), megalodon_cuda_alloc(bytes * (SQUARE / PATTERN_ROWS))};
    unsigned char *staged = host_allocate(bytes);
    for (int64_t i = 0; i < size; i++) {
        dtype_store(type, staged, i, m.pattern[i]);
        m.pattern[i] = (float)dtype_load(type, staged, i);
    }
    for (size_t at = 0; at < bytes * (SQUARE / PATTERN_ROWS); at += bytes)
        megalodon_cuda_upload((char *)m.device + at, staged, bytes);
    free(staged);
    return m;
}

static void square_run(void *context) {
    SquareProduct *p = context;
    bench_cuda_matmul(p->c, p->a.device, p->b.device, SQUARE, p->is_bf16);
}

/* FLOP/s of cuBLAS; some elements are compared with sums in double. */
static double square_rate(const Bench *bench, bool is_bf16) {
    enum { ELEMENTS = 200 };
    MegalodonDType type = is_bf16 ? MEGALODON_BF16 : MEGALODON_F32;
    size_t row = SQUARE * dtype_bytes(type);
    SquareProduct p = {square_create(type, 11), square_create(type, 12), megalodon_cuda_alloc(SQUARE * row),
                       is_bf16};
    unsigned char *found = host_allocate(row);
    double seconds = seconds_of(bench, (Work){square_run, &p, true, 1});
    for (int i = 0; i < ELEMENTS; i++) {
        int64_t at = (int64_t)(megalodon_random(13, (uint64_t)i) % ((uint64_t)SQUARE * SQUARE));
        int64_t r = at / SQUARE, column = at % SQUARE;
        double sum = 0;
        for (int64_t k = 0; k < SQUARE; k++)
            sum += (double)p.a.pattern[r % PATTERN_ROWS * SQUARE + k] *
                   p.b.pattern[k % PATTERN_ROWS * SQUARE + column];
        megalodon_cuda_download(found, (char *)p.c + (size_t)r * row, row);
        /* such a sum is about as large as a third of sqrt(SQUARE) */
        double allowed = (is_bf16 ? 0.02 : 1e-4) * sqrt(SQUARE), value = dtype_load(type, found, column);
        if (!(fabs(value - sum) < allowed))
            die(errorf("bench ceilings: the vendor's product is wrong at [%lld,%lld]: expected %g, found %g",
                       (long long)r, (long long)column, sum, value));
    }
    free(found), free(p.a.pattern), free(p.b.pattern);
    megalodon_cuda_free(p.a.device), megalodon_cuda_free(p.b.device), megalodon_cuda_free(p.c);
    return 2. * SQUARE * SQUARE * SQUARE / seconds;
}

typedef struct DeviceCopy {
    char *to, *from;
    size_t bytes;
} DeviceCopy;

static void copy_run(void *context) {
    DeviceCopy *c = context;
    bench_cuda_copy(c->to, c->from, c->bytes);
}

/* Bytes a second, read and written, of a copy within the device. */
static double copy_bandwidth(const Bench *bench) {
    const size_t piece = (size_t)1 << 26, bytes = (size_t)1 << 30;
    DeviceCopy c = {megalodon_cuda_alloc(bytes), megalodon_cuda_alloc(bytes), bytes};
    float *x = random_floats((int64_t)(piece / sizeof(float)), 14), *found = host_allocate(piece);
    for (size_t at = 0; at < bytes; at += piece) megalodon_cuda_upload(c.from + at, x, piece);
    double seconds = seconds_of(bench, (Work){copy_run, &c, true, 1});
    for (size_t at = 0; at < bytes; at += piece) {
        megalodon_cuda_download(found, c.to + at, piece);
        if (memcmp(found, x, piece)) die("bench ceilings: the copy within the device is not the original");
    }
    free(x), free(found);
    megalodon_cuda_free(c.to), megalodon_cuda_free(c.from);
    return 2. * (double)bytes / seconds;
}
#endif

/* ---- both ---- */

/* Reads --ceilings: three numbers from an earlier run. Error: what was expected. */
static const char *read_ceilings(const char *text, Ceilings *out) {
    double values[3];
    char copy[128], *part = copy;
    if (strlen(text) >= sizeof copy) return errorf("--ceilings is too long; expected three numbers: P,F,M");
    strcpy(copy, text);
    for (int i = 0; i < 3; i++) {
        char *comma = strchr(part, ',');
        if ((comma != NULL) != (i < 2))
            return errorf("--ceilings: expected three numbers with commas between, found \"%s\"",
                          option_quoted(text));
        if (comma) *comma = 0;
        if (!option_number_is_real(part, &values[i]) || values[i] < 0)
            return errorf("--ceilings: expected a number from 0 on, found \"%s\"", option_quoted(part));
        if (values[i] == 0) values[i] = NAN;
        if (comma) part = comma + 1;
    }
    *out = (Ceilings){1e12 * values[0], 1e12 * values[1], 1e9 * values[2]};
    return NULL;
}

static void measure_ceilings(Bench *bench) {
    Ceilings *c = &bench->ceilings;
#ifdef MEGALODON_WITH_CUDA
    if (bench->on_gpu) {
        bool is_bf16 = bench->precision == MEGALODON_BF16_MIXED;
        c->memory = copy_bandwidth(bench);
        c->fp32 = square_rate(bench, false);
        c->product = is_bf16 ? square_rate(bench, true) : c->fp32;
        return;
    }
#endif
    c->memory = read_bandwidth(bench);
    c->product = c->fp32 = openblas_rate(bench, bench->threads);
}

/* Measures the ceilings, unless the command line told them, and prints them. */
static void find_ceilings(Bench *bench) {
    const Ceilings *c = &bench->ceilings;
    bool given = bench->values.ceilings != NULL;
    if (!given) measure_ceilings(bench);
    printf("ceilings%s: products ", given ? " (given)" : "");
    if (isfinite(c->product)) printf("%.4g TFLOP/s", 1e-12 * c->product);
    else printf("unknown");
    if (isfinite(c->fp32) && c->fp32 != c->product) printf(", in fp32 %.4g TFLOP/s", 1e-12 * c->fp32);
    if (isfinite(c->memory)) printf(", memory %.4g GB/s\n", 1e-9 * c->memory);
    else printf(", memory unknown\n");
    record(bench, "ceilings", "product", "TFLOP/s", 1e-12 * c->product);
    record(bench, "ceilings", "fp32", "TFLOP/s", 1e-12 * c->fp32);
    record(bench, "ceilings", "memory", "GB/s", 1e-9 * c->memory);
}

#endif
