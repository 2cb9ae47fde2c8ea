/* bench.c - how fast this machine runs the model, and how far that is from what the machine can do.
 *
 *     bench ceilings     what the machine can do: a large product, reading or copying memory
 *     bench matmul       CPU: the matrix product against OpenBLAS, if it is installed
 *     bench step         a training step; --forward-backward leaves the update out
 *     bench generate     generation against reading every weight once a token
 *     bench read         reading a stream in calls of many tokens
 *     bench components   each component of the model, forward and backward
 *     bench layers       the model's linear layers one by one, forward and backward
 *     bench all          all of these, except matmul on a GPU and layers on a CPU (the default)
 *     bench targets      a fixed list of shapes, with what this project wants to reach on one H100
 *
 * Any preset, with any option of the model changed, any batch and length, any backend. Ceilings are measured
 * first, and every rate is told as a share of them. Everything that is compared is measured in the same run:
 * a busy machine slows both sides. Times are medians of --repeats samples, each long enough for the clock,
 * after a warm-up. Inputs are random numbers, and every result that is timed is also checked, so that a fast
 * wrong answer is an error.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include "bench.h"
#include "bench_ceilings.h"
#include "bench_components.h"
#include "bench_matmul.h"
#include "bench_model.h"
#include "bench_targets.h"

static void bench_matmul(Bench *bench) {
    static const int shapes[][3] = {{1024, 384, 384}, {1024, 1536, 384}, {4096, 1024, 1024}, {4, 1024, 4096},
                                    {1, 1024, 4096}};
    if (bench->on_gpu)
        die("bench matmul: only for the cpu backend; on a GPU, bench layers times the products of a model");
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
 * The program
 */

typedef enum { ON_CPU = 1, ON_GPU = 2 } Where;

static const struct {
    const char *name;
    void (*run)(Bench *bench);       /* NULL: the ceilings alone, or targets */
    int in_all;                      /* where `all` runs it                  */
} benchmarks[] = {
    {"ceilings", NULL, 0},
    {"matmul", bench_matmul, ON_CPU},
    {"step", bench_step, ON_CPU | ON_GPU},
    {"generate", bench_generate, ON_CPU | ON_GPU},
    {"read", bench_read, ON_CPU | ON_GPU},
    {"components", bench_components, ON_CPU | ON_GPU},
    {"layers", bench_layers, ON_GPU},
    {"targets", NULL, 0},
};
enum { NUM_BENCHMARKS = sizeof benchmarks / sizeof *benchmarks };

/* Does an option do anything in this benchmark? */
static bool matters(const char *option, const char *benchmark) {
    static const char *const always[] = {"backend", "precision", "threads", "repeats", "ceilings", "csv"};
    bool is_all = strcmp(benchmark, "all") == 0;
    for (size_t i = 0; i < sizeof always / sizeof *always; i++)
        if (strcmp(option, always[i]) == 0) return true;
    if (strcmp(option, "forward-backward") == 0) return is_all || strcmp(benchmark, "step") == 0;
    if (strcmp(option, "only") == 0) return is_all || strcmp(benchmark, "components") == 0;
    return strcmp(benchmark, "ceilings") != 0 && strcmp(benchmark, "matmul") != 0;
}

/* Reads the command line. Returns false if only the help page was asked for. */
static bool read_options(Bench *bench, int argc, char **argv) {
    OptionSet *set = &bench->set;
    bool help, known = strcmp(bench->which, "all") == 0;
    char names[160] = "";
    for (int i = 0; i < NUM_BENCHMARKS; i++) {
        known = known || strcmp(bench->which, benchmarks[i].name) == 0;
        snprintf(names + strlen(names), sizeof names - strlen(names), "%s, ", benchmarks[i].name);
    }
    if (!known)
        die(errorf("unknown benchmark \"%s\"; expected %sor all", option_quoted(bench->which), names));
    options_init(set, "bench", "[ceilings|matmul|step|generate|read|components|layers|targets|all] [options]",
                 "Measures the model on this machine, next to what the machine can do.");
    options_add(set, bench_table, OPTION_COUNT(bench_table), &bench->values);
    bench->model_rows = set->count;
    options_add(set, model_table, OPTION_COUNT(model_table), &bench->given);
    die_if(options_parse(set, argc, argv, &help));
    if (help) options_print_help(stdout, set);
    if (help) return false;
    for (int i = 0; i < set->count; i++)
        if (set->given[i] && !matters(set->names[i], bench->which))
            die(errorf("--%s does nothing in bench %s", set->names[i], bench->which));
    MegalodonComponentId any;
    if (bench->values.only) die_if(find_component(bench->values.only, &any));
    if (bench->values.ceilings) die_if(read_ceilings(bench->values.ceilings, &bench->ceilings));
    return true;
}

/* The configuration: the preset, and the options that change it. */
static void choose_model(Bench *bench) {
    int i = bench->model_rows;
    die_if(megalodon_preset(bench->values.preset, &bench->config));
#define X(type, field, fallback, meaning) \
    if (bench->set.given[i++]) bench->config.field = bench->given.field;
    MEGALODON_CONFIG_FIELDS(X)
#undef X
    const char *error = megalodon_validate(&bench->config);
    if (error) die(errorf("model: %s", error));
}

/* Bytes of the processor's largest cache; 32 MiB where the system does not tell. */
static int64_t largest_cache(void) {
#ifdef _SC_LEVEL3_CACHE_SIZE
    if (sysconf(_SC_LEVEL3_CACHE_SIZE) > 0) return sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return 32 << 20;
}

static void choose_machine(Bench *bench) {
    const Values *v = &bench->values;
    die_if(backend_choose(v->backend, v->precision, &bench->backend, &bench->precision));
    die_if(backend_threads(v->threads, &bench->threads));
    bench->on_gpu = bench->backend != &megalodon_cpu;
    /* what is wanted of a GPU is meant in bf16 */
    if (bench->on_gpu && strcmp(bench->which, "targets") == 0 && !options_given(&bench->set, "precision"))
        bench->values.precision = "bf16", bench->precision = MEGALODON_BF16_MIXED;
    bench->cache_bytes = largest_cache();
    printf("backend %s, %s, %d thread%s\n", bench->backend->name, v->precision, bench->threads,
           bench->threads == 1 ? "" : "s");
#ifdef MEGALODON_WITH_CUDA
    if (bench->on_gpu) {
        char name[256], bytes[32];
        bench_cuda_device(name, &bench->cache_bytes);
        printf("device %s, L2 cache %s\n", name, report_bytes(bench->cache_bytes, bytes));
        return;
    }
#endif
    warn_if_busy();
    load_openblas(bench);
}

int main(int argc, char **argv) {
    static Bench bench;
    static char wrong[ERROR_MAX];
    int failed = 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    bench.wrong = wrong;
    bench.program = argv[0];
    bench.which = "all";
    if (argc > 1 && argv[1][0] != '-') {
        bench.which = argv[1];
        argv++, argc--;
    }
    if (!read_options(&bench, argc, argv)) return 0;
    const char *asked = bench.which, *csv = bench.values.csv;
    bool is_all = strcmp(asked, "all") == 0;
    choose_model(&bench);
    if (csv) {
        bench.csv = fopen(csv, "w");
        if (!bench.csv) die(errorf("--csv %s: cannot be written: %s", csv, strerror(errno)));
        fprintf(bench.csv, "benchmark,what,unit,value\n");
    }
    choose_machine(&bench);
    if (strcmp(asked, "targets") == 0) refuse_targets(&bench);
    find_ceilings(&bench);
    if (strcmp(asked, "targets") == 0) failed = run_targets(&bench, matters);
    for (int i = 0; i < NUM_BENCHMARKS; i++) {
        bench.which = benchmarks[i].name;
        bool wanted =
            is_all ? benchmarks[i].in_all & (bench.on_gpu ? ON_GPU : ON_CPU) : !strcmp(asked, bench.which);
        if (wanted && benchmarks[i].run) benchmarks[i].run(&bench);
    }
    if (bench.csv && fclose(bench.csv) != 0) die(errorf("--csv %s: cannot be written", csv));
    die_if(*wrong ? wrong : NULL);
    return failed ? 1 : 0;
}
