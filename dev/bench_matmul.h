/* bench_matmul.h - matrix products on the CPU, through the component "linear", next to OpenBLAS, which is
 * looked for when the program runs: y = x W^T, dx = dy W, dW += dy^T x.
 */
#ifndef DEV_BENCH_MATMUL_H
#define DEV_BENCH_MATMUL_H

#include <dlfcn.h>

#include "bench.h"

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
    double *seconds[3], host = 0, flops = 2. * p->M * p->K * p->N;
    Work work[2] = {{product_ours, p, false, 1}, {product_theirs, p, false, 1}};
    for (int i = 0; i < 3; i++) seconds[i] = host_allocate((size_t)repeats * sizeof **seconds);
    for (int side = 0; side < sides; side++) {
        rest(bench);
        prepare(bench, &work[side], &host);
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

#endif
