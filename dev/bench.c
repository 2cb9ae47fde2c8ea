/* bench.c - how fast this machine runs the model, and how far that is from what the machine can do.
 *
 *     bench matmul       the matrix product against OpenBLAS, if it is installed
 *     bench step         a training step, on one thread and on all
 *     bench generate     generation against reading every weight once a token
 *     bench components   each component of the model, forward and backward
 *     bench all          all of these (the default)
 *
 * Everything that is compared is measured in the same run, in turns: a busy machine slows both sides. Times
 * are medians of --repeats samples, each long enough for the clock, after a warm-up. Inputs are random
 * numbers, and every result that is timed is also checked, so that a fast wrong answer is an error.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "megalodon.h"
#include "lib/backends.h"
#include "lib/error.h"
#include "lib/options.h"
#include "lib/report.h"
#include "tests/component.h"
#ifdef MEGALODON_WITH_CUDA
#include "cuda/megalodon_cuda.h"
#endif

#define BENCH_OPTIONS(X)                                                                                              \
    X(TEXT,   backend,   "auto", 0, 0,       "NAME",      "Model",   "cpu, cuda or auto")                             \
    X(CHOICE, precision, "fp32", 0, 0,       "fp32|bf16", "Model",   "type of activations (bf16: GPU only)")          \
    X(TEXT,   preset,    "bytes12M", 0, 0,   "NAME",      "Model",   "size of the model, by name")                    \
    X(INT,    batch,     "8",    1, 65536,   "ROWS",      "Shape",   "sequences at once")                             \
    X(INT,    seq_len,   "512",  1, 1048576, "TOKENS",    "Shape",   "tokens of a sequence or prompt")                \
    X(INT,    threads,   "0",    0, 1024,    "COUNT",     "Running", "threads; 0: what OpenMP chooses")               \
    X(INT,    repeats,   "9",    1, 1001,    "COUNT",     "Running", "samples of which the median is told")           \
    X(FLAG,   no_check,  NULL,   0, 0,       "",          "Running", "do not compare components with double")         \
    X(TEXT,   csv,       NULL,   0, 0,       "PATH",      "Running", "also write every number to this file")

typedef struct Values { BENCH_OPTIONS(OPTION_MEMBER) } Values;
static const Option bench_options[] = { BENCH_OPTIONS(OPTION_ROW) };

/* cblas_sgemm(order, transpose_a, transpose_b, M, N, K, alpha, a, lda, b, ldb, beta, c, ldc) */
typedef void (*Sgemm)(int, int, int, int, int, int, float, const float *, int, const float *, int, float,
                      float *, int);
enum { ROW_MAJOR = 101, AS_IT_IS = 111, TRANSPOSED = 112 };

typedef struct Bench {
    Values values;
    MegalodonConfig config;
    const MegalodonBackend *backend;
    MegalodonPrecision precision;
    bool on_gpu;
    int threads;
    FILE *csv;
    Sgemm sgemm;                     /* NULL: no OpenBLAS here */
    void (*sgemm_threads)(int);
} Bench;

/* ----------------------------------------------------------------------------------------------------
 * Time
 */

static int compare_doubles(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, compare_doubles);
    return n % 2 ? x[n / 2] : (x[n / 2 - 1] + x[n / 2]) / 2;
}

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
    int inner;                       /* calls in one sample */
} Work;

static double sample(const Bench *bench, const Work *work) {
    double start = report_seconds();
    for (int i = 0; i < work->inner; i++) work->run(work->context);
    wait_for(bench);
    return (report_seconds() - start) / work->inner;
}

/* Warms up and chooses `inner` so that a sample takes 20 ms at least. */
static void prepare(const Bench *bench, Work *work) {
    work->inner = 1;
    sample(bench, work);
    while (work->inner < 4096 && sample(bench, work) * work->inner < 0.02) work->inner *= 2;
}

/* Seconds of one call: the median sample. */
static double seconds_of(const Bench *bench, Work work) {
    double *seconds = host_allocate((size_t)bench->values.repeats * sizeof *seconds);
    prepare(bench, &work);
    for (int i = 0; i < bench->values.repeats; i++) seconds[i] = sample(bench, &work);
    double middle = median(seconds, bench->values.repeats);
    free(seconds);
    return middle;
}

/* One number for --csv: which benchmark, what was measured, and the value in its unit. */
static void record(const Bench *bench, const char *benchmark, const char *what, const char *unit,
                   double value) {
    if (bench->csv) fprintf(bench->csv, "%s,%s,%s,%.6g\n", benchmark, what, unit, value);
}

static void set_threads(int threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
}

/* ----------------------------------------------------------------------------------------------------
 * Matrix products, through the component "linear": y = x W^T, dx = dy W, dW += dy^T x
 */

static void load_openblas(Bench *bench) {
    /* these two make OpenBLAS choose code for another processor than this one */
    unsetenv("OPENBLAS_CORETYPE");
    unsetenv("OPENBLAS_L2_SIZE");
    void *library = dlopen("libopenblas.so.0", RTLD_NOW);
    if (!library) return;
    const char *(*core)(void) = (const char *(*)(void))dlsym(library, "openblas_get_corename");
    bench->sgemm = (Sgemm)dlsym(library, "cblas_sgemm");
    bench->sgemm_threads = (void (*)(int))dlsym(library, "openblas_set_num_threads");
    if (!bench->sgemm_threads) bench->sgemm = NULL;
    if (bench->sgemm) printf("OpenBLAS: code for %s\n", core ? core() : "an unknown processor");
}

typedef enum { USE_FORWARD, USE_INPUT_GRADIENT, USE_WEIGHT_GRADIENT, NUM_USES } Use;
static const char *const use_names[NUM_USES] = {"y = x W^T", "dx = dy W", "dW += dy^T x"};

typedef struct Product {
    const Bench *bench;
    Use use;
    int M, K, N;                     /* x is M,K; W is N,K; y is M,N */
    MegalodonShape shape;
    float *x, *W, *y, *ours, *theirs;
    int64_t out_size;
} Product;

static void product_ours(void *context) {
    Product *p = context;
    const MegalodonComponentFunctions *linear = &p->bench->backend->components[MEGALODON_LINEAR];
    void *args[] = {p->use == USE_FORWARD ? p->ours : p->y, p->x, p->W, NULL};
    void *grads[] = {p->y, p->use == USE_INPUT_GRADIENT ? p->ours : NULL,
                     p->use == USE_WEIGHT_GRADIENT ? p->ours : NULL, NULL};
    if (p->use == USE_FORWARD) linear->forward(args, &p->shape);
    else linear->backward(grads, args, &p->shape);
}

static void product_theirs(void *context) {
    Product *p = context;
    int M = p->M, K = p->K, N = p->N;
    if (p->use == USE_FORWARD)
        p->bench->sgemm(ROW_MAJOR, AS_IT_IS, TRANSPOSED, M, N, K, 1, p->x, K, p->W, K, 0, p->theirs, N);
    else if (p->use == USE_INPUT_GRADIENT)
        p->bench->sgemm(ROW_MAJOR, AS_IT_IS, AS_IT_IS, M, K, N, 1, p->y, N, p->W, K, 0, p->theirs, K);
    else
        p->bench->sgemm(ROW_MAJOR, TRANSPOSED, AS_IT_IS, N, K, M, 1, p->y, N, p->x, K, 1, p->theirs, K);
}

static float *random_floats(int64_t size, uint64_t key) {
    float *x = host_allocate((size_t)size * sizeof *x);
    for (int64_t i = 0; i < size; i++)
        x[i] = (float)(megalodon_random(key, (uint64_t)i) >> 40) * (2.f / 16777216.f) - 1;
    return x;
}

static Product product_create(const Bench *bench, Use use, int M, int K, int N) {
    Product p = {.bench = bench, .use = use, .M = M, .K = K, .N = N};
    p.shape = (MegalodonShape){.config = bench->config, .B = 1, .T = M};
    p.shape.config.model_dim = K;
    p.shape.config.value_dim = N;
    p.x = random_floats((int64_t)M * K, 1);
    p.W = random_floats((int64_t)N * K, 2);
    p.y = random_floats((int64_t)M * N, 3);
    p.out_size = use == USE_FORWARD          ? (int64_t)M * N
                 : use == USE_INPUT_GRADIENT ? (int64_t)M * K
                                             : (int64_t)N * K;
    p.ours = host_allocate((size_t)p.out_size * sizeof(float));
    p.theirs = host_allocate((size_t)p.out_size * sizeof(float));
    memset(p.ours, 0, (size_t)p.out_size * sizeof(float));
    memset(p.theirs, 0, (size_t)p.out_size * sizeof(float));
    return p;
}

static void product_destroy(Product *p) {
    free(p->x), free(p->W), free(p->y), free(p->ours), free(p->theirs);
}

/* Runs one call of ours on a clean output and compares a thousand of its elements, spread over it, with
 * sums in double. */
static void product_check(Product *p) {
    enum { ELEMENTS = 1000 };
    memset(p->ours, p->use == USE_WEIGHT_GRADIENT ? 0 : CALL_POISON, (size_t)p->out_size * sizeof(float));
    product_ours(p);
    int64_t columns = p->use == USE_FORWARD ? p->N : p->K;
    int depth = p->use == USE_FORWARD ? p->K : p->use == USE_INPUT_GRADIENT ? p->N : p->M;
    for (int i = 0; i < ELEMENTS; i++) {
        int64_t at = (int64_t)(megalodon_random(4, (uint64_t)i) % (uint64_t)p->out_size);
        int64_t row = at / columns, column = at % columns;
        double sum = 0;
        for (int64_t k = 0; k < depth; k++) {
            if (p->use == USE_FORWARD) sum += (double)p->x[row * p->K + k] * p->W[column * p->K + k];
            else if (p->use == USE_INPUT_GRADIENT)
                sum += (double)p->y[row * p->N + k] * p->W[k * p->K + column];
            else sum += (double)p->y[k * p->N + row] * p->x[k * p->K + column];
        }
        /* rounding grows like the square root of the depth; sums of products of such numbers like a third
         * of it */
        if (!(fabs(sum - p->ours[at]) < 1e-5 * sqrt(depth)))
            die(errorf("bench matmul: %s for %d x %d x %d is wrong at [%lld,%lld]: expected %.9g, found %.9g",
                       use_names[p->use], p->M, p->K, p->N, (long long)row, (long long)column, sum,
                       p->ours[at]));
    }
}

/* GFLOP/s of both sides, sampled in turns; *ratio is the median over the turns. theirs and ratio: NAN without
 * OpenBLAS. */
static void product_rates(Product *p, double *ours, double *theirs, double *ratio) {
    const Bench *bench = p->bench;
    int repeats = bench->values.repeats, sides = bench->sgemm ? 2 : 1;
    double *seconds[3], flops = 2. * p->M * p->K * p->N;
    Work work[2] = {{product_ours, p, 1}, {product_theirs, p, 1}};
    for (int i = 0; i < 3; i++) seconds[i] = host_allocate((size_t)repeats * sizeof **seconds);
    for (int side = 0; side < sides; side++) {
        rest(bench);
        prepare(bench, &work[side]);
    }
    for (int i = 0; i < repeats; i++) {
        seconds[1][i] = NAN;
        for (int side = 0; side < sides; side++) {
            rest(bench);
            sample(bench, &work[side]);
            seconds[side][i] = sample(bench, &work[side]);
        }
        seconds[2][i] = seconds[1][i] / seconds[0][i];
    }
    *ours = 1e-9 * flops / median(seconds[0], repeats);
    *theirs = bench->sgemm ? 1e-9 * flops / median(seconds[1], repeats) : NAN;
    *ratio = bench->sgemm ? median(seconds[2], repeats) : NAN;
    for (int i = 0; i < 3; i++) free(seconds[i]);
}

static void bench_matmul(Bench *bench) {
    static const int shapes[][3] = {{1024, 384, 384}, {1024, 1536, 384}, {4096, 1024, 1024}, {4, 1024, 4096},
                                    {1, 1024, 4096}};
    if (bench->on_gpu) {
        printf("\nmatmul: only for the cpu backend; a GPU's matrix products are its vendor's library\n");
        return;
    }
    printf("\nmatmul, %d thread%s: x is M,K and W is N,K; medians of %d turns, GFLOP/s\n", bench->threads,
           bench->threads == 1 ? "" : "s", bench->values.repeats);
    printf("%6s %6s %6s  %-13s %9s %9s %7s\n", "M", "K", "N", "product", "ours", "OpenBLAS", "ratio");
    if (bench->sgemm) bench->sgemm_threads(bench->threads);
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        for (int use = 0; use < NUM_USES; use++) {
            Product p = product_create(bench, (Use)use, shapes[s][0], shapes[s][1], shapes[s][2]);
            double ours, theirs, ratio;
            char what[64];
            product_check(&p);
            product_rates(&p, &ours, &theirs, &ratio);
            printf("%6d %6d %6d  %-13s %9.1f ", p.M, p.K, p.N, use_names[use], ours);
            if (bench->sgemm) printf("%9.1f %7.2f\n", theirs, ratio);
            else printf("%9s %7s\n", "-", "-");
            snprintf(what, sizeof what, "%dx%dx%d %s", p.M, p.K, p.N, use_names[use]);
            record(bench, "matmul", what, "GFLOP/s", ours);
            if (bench->sgemm) record(bench, "matmul", what, "ratio to OpenBLAS", ratio);
            product_destroy(&p);
        }
    }
    if (!bench->sgemm) printf("libopenblas.so.0 was not found: nothing to compare with\n");
}

/* ----------------------------------------------------------------------------------------------------
 * A training step
 */

static int32_t *random_tokens(int64_t count, int vocab_size, uint64_t key) {
    int32_t *tokens = host_allocate((size_t)count * sizeof *tokens);
    for (int64_t i = 0; i < count; i++)
        tokens[i] = (int32_t)(megalodon_random(key, (uint64_t)i) % (uint64_t)vocab_size);
    return tokens;
}

typedef struct Step {
    const Bench *bench;
    MegalodonModel *model;
    MegalodonBatch batch;
    int64_t updates;
    double first_loss, loss;
    double seconds[3];               /* forward, backward, update of the last step */
} Step;

static void step_run(Step *step) {
    const MegalodonBackend *backend = step->bench->backend;
    MegalodonLoss loss;
    double norm, times[4];
    times[0] = report_seconds();
    backend->zero_gradients(step->model);
    die_if(backend->forward(step->model, &step->batch, &loss));
    times[1] = report_seconds();
    die_if(backend->backward(step->model, 1 / (double)loss.counted));
    wait_for(step->bench);
    times[2] = report_seconds();
    /* wide models diverge in their first steps at the rate of narrow ones */
    MegalodonAdamW adamw = {.lr = 0.4 / step->bench->config.model_dim, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                            .weight_decay = 0.1, .clip = 1, .step = ++step->updates};
    die_if(backend->update(step->model, &adamw, &norm));
    wait_for(step->bench);
    times[3] = report_seconds();
    for (int i = 0; i < 3; i++) step->seconds[i] = times[i + 1] - times[i];
    step->loss = loss.nll_sum / (double)loss.counted;
    if (step->updates == 1) step->first_loss = step->loss;
    if (!isfinite(step->loss) || !isfinite(norm))
        die(errorf("bench step: step %lld has loss %g and gradient norm %g", (long long)step->updates,
                   step->loss, norm));
}

/* Medians over some steps with so many threads: forward, backward, update, whole step. */
static void step_seconds(Step *step, int threads, double medians[4]) {
    int repeats = step->bench->values.repeats;
    double *seconds[4];
    set_threads(threads);
    for (int i = 0; i < 4; i++) seconds[i] = host_allocate((size_t)repeats * sizeof **seconds);
    step_run(step);
    for (int r = 0; r < repeats; r++) {
        step_run(step);
        for (int i = 0; i < 3; i++) seconds[i][r] = step->seconds[i];
        seconds[3][r] = step->seconds[0] + step->seconds[1] + step->seconds[2];
    }
    for (int i = 0; i < 4; i++) {
        medians[i] = median(seconds[i], repeats);
        free(seconds[i]);
    }
}

static void bench_step(Bench *bench) {
    const Values *v = &bench->values;
    Step step = {.bench = bench};
    MegalodonOptions options = {.max_batch = v->batch, .max_length = v->seq_len, .training = true,
                                .precision = bench->precision};
    int64_t tokens = (int64_t)v->batch * v->seq_len, parameters = megalodon_num_parameters(&bench->config);
    char count[32];
    printf("\nstep: %s, %s parameters, %d x %d tokens; medians of %d steps\n", v->preset,
           report_count(parameters, count), v->batch, v->seq_len, v->repeats);
    printf("%7s %9s %9s %9s %9s %10s %9s %17s\n", "threads", "ms", "forward", "backward", "update",
           "tokens/s", "GFLOP/s", "share of OpenBLAS");
    die_if(bench->backend->create(&step.model, &bench->config, &options));
    die_if(megalodon_initialise(bench->backend, step.model, &bench->config, 1));
    int32_t *ids = random_tokens(tokens + 1, bench->config.vocab_size, 5);
    step.batch =
        (MegalodonBatch){.tokens = ids, .targets = ids + 1, .B = v->batch, .T = v->seq_len, .dropout = true};
    double all_threads = 0;
    for (int threads = bench->threads;; threads = 1) {
        double ms[4], blas, ours, ratio;
        char what[64];
        step_seconds(&step, threads, ms);
        /* 6 = a multiplication and an addition, once in the forward and twice in the backward */
        double rate = 6e-9 * (double)parameters * (double)tokens / ms[3];
        printf("%7d %9.1f %9.1f %9.1f %9.1f %10.0f %9.1f", threads, 1e3 * ms[3], 1e3 * ms[0], 1e3 * ms[1],
               1e3 * ms[2], (double)tokens / ms[3], rate);
        snprintf(what, sizeof what, "%s %dx%d threads %d", v->preset, v->batch, v->seq_len, threads);
        record(bench, "step", what, "ms", 1e3 * ms[3]);
        record(bench, "step", what, "tokens/s", (double)tokens / ms[3]);
        record(bench, "step", what, "GFLOP/s", rate);
        if (bench->sgemm && !bench->on_gpu) {
            Product p = product_create(bench, USE_FORWARD, 4096, 1024, 1024);
            bench->sgemm_threads(threads);
            product_rates(&p, &ours, &blas, &ratio);
            product_destroy(&p);
            printf(" %6.0f%% of %.1f", 100 * rate / blas, blas);
            record(bench, "step", what, "share of OpenBLAS", rate / blas);
        }
        printf("\n");
        if (threads == bench->threads) all_threads = ms[3];
        if (threads == 1 || bench->on_gpu) {
            if (bench->threads > 1 && !bench->on_gpu)
                printf("%d threads are %.2f times as fast as one\n", bench->threads, ms[3] / all_threads);
            break;
        }
    }
    set_threads(bench->threads);
    /* the batch is the same every time, so a model that learns at all learns it */
    printf("loss of step 1: %.3f, of step %lld: %.3f\n", step.first_loss, (long long)step.updates, step.loss);
    if (!(step.loss < step.first_loss)) die(errorf("bench step: the loss did not fall"));
    free(ids);
    bench->backend->destroy(step.model);
}

/* ----------------------------------------------------------------------------------------------------
 * Generation
 */

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
    double seconds = seconds_of(bench, (Work){stream_read, &stream, 1});
    if (stream.sum != 1.5 * (double)stream.size) die("bench generate: the sum over the buffer is wrong");
    free(stream.data);
    return (double)stream.size * sizeof(float) / seconds;
}

/* Bytes of the weights that one token reads: all but the embedding, of which it reads a row. */
static double weight_bytes(const Bench *bench) {
    MegalodonTensor embed;
    int64_t parameters = megalodon_num_parameters(&bench->config);
    die_if(megalodon_find_tensor(&bench->config, MEGALODON_PARAM, 1, 1, 0, "embed.weight", &embed));
    if (!bench->config.share_emb) parameters -= embed.size;
    return (double)parameters * (bench->precision == MEGALODON_BF16_MIXED ? 2 : 4);
}

typedef struct Generation {
    const Bench *bench;
    MegalodonModel *model;
    int rows;
    int32_t *next;                   /* rows: the tokens to feed */
    float *logits;                   /* rows,V                   */
} Generation;

/* Feeds the next token of each row and chooses the most likely one after it. */
static void generation_step(void *context) {
    Generation *g = context;
    int V = g->bench->config.vocab_size;
    MegalodonBatch batch = {.tokens = g->next, .B = g->rows, .T = 1, .carry = true};
    die_if(g->bench->backend->forward(g->model, &batch, NULL));
    die_if(g->bench->backend->last_logits(g->model, g->logits));
    for (int row = 0; row < g->rows; row++) {
        const float *logits = g->logits + (int64_t)row * V;
        int best = 0;
        for (int i = 0; i < V; i++) {
            if (!isfinite(logits[i]))
                die(errorf("bench generate: logit %d of row %d is %g", i, row, logits[i]));
            if (logits[i] > logits[best]) best = i;
        }
        g->next[row] = best;
    }
}

static void bench_generate(Bench *bench) {
    const Values *v = &bench->values;
    MegalodonOptions options = {
        .max_batch = v->batch, .max_length = v->seq_len, .precision = bench->precision};
    Generation g = {.bench = bench};
    double bytes = weight_bytes(bench), bandwidth = bench->on_gpu ? NAN : read_bandwidth(bench);
    printf("\ngenerate: %s after %d tokens; a token reads %.1f MB of weights", v->preset, v->seq_len,
           1e-6 * bytes);
    if (!bench->on_gpu) printf("; memory gives %.1f GB/s", 1e-9 * bandwidth);
    printf("\n%7s %10s %10s %10s %17s\n", "rows", "ms", "tokens/s", "GB/s", "share of memory's");
    die_if(bench->backend->create(&g.model, &bench->config, &options));
    die_if(megalodon_initialise(bench->backend, g.model, &bench->config, 1));
    g.next = random_tokens((int64_t)v->batch * v->seq_len, bench->config.vocab_size, 6);
    g.logits = host_allocate((size_t)v->batch * (size_t)bench->config.vocab_size * sizeof *g.logits);
    for (g.rows = 1;; g.rows = v->batch) {
        char what[64];
        /* the text before, then tokens one by one; the first of them are the text's, which does not matter
         * here */
        MegalodonBatch text = {.tokens = g.next, .B = g.rows, .T = v->seq_len};
        die_if(bench->backend->forward(g.model, &text, NULL));
        double seconds = seconds_of(bench, (Work){generation_step, &g, 1});
        printf("%7d %10.3f %10.0f %10.1f", g.rows, 1e3 * seconds, g.rows / seconds, 1e-9 * bytes / seconds);
        if (!bench->on_gpu) printf(" %16.0f%%", 100 * bytes / seconds / bandwidth);
        printf("\n");
        snprintf(what, sizeof what, "%s rows %d", v->preset, g.rows);
        record(bench, "generate", what, "tokens/s", g.rows / seconds);
        record(bench, "generate", what, "GB/s", 1e-9 * bytes / seconds);
        if (g.rows == v->batch) break;
    }
    if (!bench->on_gpu) printf("A share over 100%% means that weights come from a cache.\n");
    free(g.next);
    free(g.logits);
    bench->backend->destroy(g.model);
}

/* ----------------------------------------------------------------------------------------------------
 * Components
 */

static Port bench_port(const Bench *bench) {
#ifdef MEGALODON_WITH_CUDA
    if (bench->on_gpu)
        return (Port){bench->backend->name,
                      bench->backend->components,
                      bench->precision == MEGALODON_BF16_MIXED ? MEGALODON_BF16 : MEGALODON_F32,
                      MEGALODON_F32,
                      megalodon_cuda_alloc,
                      megalodon_cuda_free,
                      megalodon_cuda_upload,
                      megalodon_cuda_download};
#endif
    return host_port(bench->backend, false);
}

/* A component on buffers that stay where they are. */
typedef struct Piece {
    Call *call;
    const MegalodonComponentFunctions *functions;
    void *args[MEGALODON_MAX_ARGS], *grads[MEGALODON_MAX_ARGS];
} Piece;

static void piece_forward(void *context) {
    Piece *piece = context;
    piece->functions->forward(piece->args, &piece->call->shape);
}

static void piece_backward(void *context) {
    Piece *piece = context;
    piece->functions->backward(piece->grads, piece->args, &piece->call->shape);
}

/* Largest relative RMS error of outputs and gradients against the same call in double. */
static double piece_error(Call *call, const Port *port) {
    Call exact;
    Port reference = host_port(&megalodon_cpu_double, true);
    double worst = 0;
    call_create(&exact, call->id, &call->shape, false, true, 7);
    call_round(&exact, port);
    die_if(call_run(call, port, true));
    die_if(call_run(&exact, &reference, true));
    for (int i = 0; i < call->num_args; i++) {
        MegalodonRole role = call->component->args[i].role;
        for (int part = 0; part < 2; part++) {
            const double *x = part ? call->grad[i] : call->value[i],
                         *y = part ? exact.grad[i] : exact.value[i];
            double difference = 0, size = 0;
            if (!call->present[i] || !(part ? call_has_gradient(role) : call_is_output(role))) continue;
            for (int64_t j = 0; j < call->size[i]; j++) {
                difference += (x[j] - y[j]) * (x[j] - y[j]);
                size += y[j] * y[j];
            }
            double error = sqrt(difference / (size > 0 ? size : 1));
            if (!(error <= worst)) worst = error;            /* also takes NaN */
        }
    }
    call_destroy(&exact);
    return worst;
}

/* Bytes of all arguments that a call touches, each counted once: what the forward must move, or the
 * backward. */
static double piece_bytes(const Call *call, const Port *port, bool backward) {
    double bytes = 0;
    for (int i = 0; i < call->num_args; i++) {
        const MegalodonArg *arg = &call->component->args[i];
        double size = (double)call->size[i] * (double)dtype_bytes(port_dtype(port, arg->type));
        bool read = !backward || arg->role != MEGALODON_OUT;
        if (call->present[i] && read) bytes += size;
        if (call->grad_present[i] && backward) bytes += size;
    }
    return bytes;
}

static void bench_component(const Bench *bench, MegalodonComponentId id, const Port *port) {
    MegalodonShape shape = {.config = bench->config,
                            .B = bench->values.batch,
                            .T = bench->values.seq_len,
                            .key = 8,
                            .precision = bench->precision};
    Call call;
    CallBuffer arg_buffers[MEGALODON_MAX_ARGS], grad_buffers[MEGALODON_MAX_ARGS];
    Piece piece = {.call = &call, .functions = &port->functions[id]};
    double error = NAN;
    if (id == MEGALODON_DROPOUT) shape.config.dropout = 0.1;       /* with 0 there is nothing to do */
    call_create(&call, id, &shape, false, true, 7);
    call_round(&call, port);
    if (!bench->values.no_check) error = piece_error(&call, port);
    memset(arg_buffers, 0, sizeof arg_buffers);
    memset(grad_buffers, 0, sizeof grad_buffers);
    for (int i = 0; i < call.num_args; i++) {
        MegalodonDType type = port_dtype(port, call.component->args[i].type);
        if (call.present[i]) buffer_create(&arg_buffers[i], port, type, call.size[i], call.value[i]);
        if (call.grad_present[i]) buffer_create(&grad_buffers[i], port, type, call.size[i], call.grad[i]);
        piece.args[i] = buffer_data(&arg_buffers[i]);
        piece.grads[i] = buffer_data(&grad_buffers[i]);
    }
    double forward = seconds_of(bench, (Work){piece_forward, &piece, 1});
    double backward = seconds_of(bench, (Work){piece_backward, &piece, 1});
    double forward_rate = 1e-9 * piece_bytes(&call, port, false) / forward;
    double backward_rate = 1e-9 * piece_bytes(&call, port, true) / backward;
    printf("%-14s %10.3f %10.3f %10.1f %10.1f", call.component->name, 1e3 * forward, 1e3 * backward,
           forward_rate, backward_rate);
    if (!bench->values.no_check) printf(" %12.1e", error);
    printf("\n");
    record(bench, "components", call.component->name, "forward ms", 1e3 * forward);
    record(bench, "components", call.component->name, "backward ms", 1e3 * backward);
    record(bench, "components", call.component->name, "forward GB/s", forward_rate);
    record(bench, "components", call.component->name, "backward GB/s", backward_rate);
    for (int i = 0; i < call.num_args; i++) {
        MegalodonDType type = port_dtype(port, call.component->args[i].type);
        die_if(buffer_finish(&arg_buffers[i], port, type, call.size[i], call.value[i]));
        die_if(buffer_finish(&grad_buffers[i], port, type, call.size[i], call.grad[i]));
    }
    call_destroy(&call);
    /* float sums over a long sequence stay far below this; bf16 keeps 8 bits */
    double allowed = port->real == MEGALODON_BF16 ? 0.03 : 1e-3;
    if (!bench->values.no_check && !(error < allowed))
        die(errorf("bench components: %s differs from double by %g; at most %g is expected",
                   megalodon_components[id].name, error, allowed));
}

static void bench_components(Bench *bench) {
    Port port = bench_port(bench);
    printf("\ncomponents: %s on %s, B %d, T %d; medians of %d; GB/s count every argument once\n",
           bench->values.preset, bench->backend->name, bench->values.batch, bench->values.seq_len,
           bench->values.repeats);
    printf("%-14s %10s %10s %10s %10s%s\n", "component", "forward ms", "backw. ms", "GB/s", "GB/s",
           bench->values.no_check ? "" : "  error to double");
    for (int id = 0; id < MEGALODON_NUM_COMPONENTS; id++)
        bench_component(bench, (MegalodonComponentId)id, &port);
}

/* ----------------------------------------------------------------------------------------------------
 * The program
 */

static const struct {
    const char *name;
    void (*run)(Bench *bench);
} benchmarks[] = {
    {"matmul", bench_matmul}, {"step", bench_step}, {"generate", bench_generate}, {"components", bench_components},
};
enum { NUM_BENCHMARKS = sizeof benchmarks / sizeof *benchmarks };

int main(int argc, char **argv) {
    static Bench bench;
    static OptionSet set;
    const char *which = "all";
    bool help, known = false;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1 && argv[1][0] != '-') {
        which = argv[1];
        argv++, argc--;
    }
    for (int i = 0; i < NUM_BENCHMARKS; i++) known = known || strcmp(which, benchmarks[i].name) == 0;
    if (!known && strcmp(which, "all") != 0)
        die(errorf("unknown benchmark \"%s\"; expected matmul, step, generate, components or all",
                   option_quoted(which)));
    options_init(&set, "bench", "[matmul|step|generate|components|all] [options]",
                 "Measures the model on this machine, next to what the machine can do.");
    options_add(&set, bench_options, OPTION_COUNT(bench_options), &bench.values);
    die_if(options_parse(&set, argc, argv, &help));
    if (help) {
        options_print_help(stdout, &set);
        return 0;
    }
    die_if(megalodon_preset(bench.values.preset, &bench.config));
    die_if(backend_choose(bench.values.backend, bench.values.precision, &bench.backend, &bench.precision));
    die_if(backend_threads(bench.values.threads, &bench.threads));
    bench.on_gpu = bench.backend != &megalodon_cpu;
    if (bench.values.csv) {
        bench.csv = fopen(bench.values.csv, "w");
        if (!bench.csv) die(errorf("--csv %s: cannot be written: %s", bench.values.csv, strerror(errno)));
        fprintf(bench.csv, "benchmark,what,unit,value\n");
    }
    printf("backend %s, %d thread%s\n", bench.backend->name, bench.threads, bench.threads == 1 ? "" : "s");
    warn_if_busy();
    load_openblas(&bench);
    for (int i = 0; i < NUM_BENCHMARKS; i++)
        if (strcmp(which, "all") == 0 || strcmp(which, benchmarks[i].name) == 0) benchmarks[i].run(&bench);
    if (bench.csv && fclose(bench.csv) != 0) die(errorf("--csv %s: cannot be written", bench.values.csv));
    return 0;
}
