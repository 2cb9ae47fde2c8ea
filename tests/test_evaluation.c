/* test_evaluation.c - what evaluate measures, against a plain recomputation.
 *
 * Every window of every text is run alone, in one call, in double; the losses that come out are added up by the
 * definition. evaluation_pass, with any number of rows and any read size, must find the same sums and numbers.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "../lib/cema_report.h"
#include "../lib/chart.h"
#include "../lib/evaluation.h"
#include "model.h"
#include "test.h"

#include <unistd.h>

/* Sizes of the texts: an empty one and one of a single token, which have no predictions, among others. */
static const int sizes[] = {97, 0, 203, 1, 2, 331, 203};
enum { TEXTS = 7, LONGEST = 331, BLOCK = 50, C = 8, BUCKETS = 4 };

static double worst_seen[2];         /* largest error of a mean: backend in double, in float */
static char folder[] = "/tmp/test_evaluation.XXXXXX";
static int32_t tokens[TEXTS][LONGEST];

static void file_name(char *path, size_t size, int i) { snprintf(path, size, "%s/%d.txt", folder, i); }

/* Writes the texts: random bytes under the model's vocabulary. */
static void make_texts(int vocab_size) {
    char path[256];
    if (!mkdtemp(folder)) must("no folder for the texts");
    for (int i = 0; i < TEXTS; i++) {
        random_tokens(tokens[i], sizes[i], vocab_size, (uint64_t)i);
        file_name(path, sizeof path, i);
        FILE *file = fopen(path, "wb");
        if (!file) must("a text cannot be written");
        for (int t = 0; t < sizes[i]; t++) fputc(tokens[i][t], file);
        fclose(file);
    }
}

static void remove_texts(void) {
    char path[256];
    for (int i = 0; i < TEXTS; i++) {
        file_name(path, sizeof path, i);
        remove(path);
    }
    rmdir(folder);
}

/* Losses of one text, by the definition: a window at a time, alone, from an empty state, in one call. */
static void plain_losses(MegalodonModel *model, const int32_t *text, int predictions, int context, int offset,
                         double *nll) {
    for (int start = offset; start < predictions; start += context) {
        int T = predictions - start < context ? predictions - start : context;
        MegalodonBatch batch = {.tokens = text + start, .targets = text + start + 1, .B = 1, .T = T};
        MegalodonLoss loss;
        must(megalodon_cpu_double.forward(model, &batch, &loss));
        must(megalodon_cpu_double.get(model, MEGALODON_ACT, "nll", nll + start, MEGALODON_F64));
    }
}

/* Is prediction t of a text in this series? Spelled out, not computed as in evaluation.h. */
static bool is_in_series(int t, int series) {
    static const int bucket_of[C] = {0, 1, 2, 2, 3, 3, 3, 3};
    if (series == EVALUATION_ALL) return true;
    if (t < C) return false;
    if (series == EVALUATION_LATER_CHUNKS) return true;
    if (series == EVALUATION_FIRST_HALF) return t % C < 4;
    return bucket_of[t % C] == series - EVALUATION_FIRST_BUCKET;
}

typedef struct Case { int context, offset, limit; } Case;

/* One case against its plain sums, in a backend with a tolerance. */
static void check_case(const MegalodonBackend *backend, MegalodonModel *model, MegalodonModel *plain, Dataset *data,
                       Case c, int rows, int read_size, double tolerance) {
    Evaluation e;
    EvaluationSums sums;
    double nll[LONGEST], worst = 0;
    int64_t block = 0, wrong = 0;
    must(evaluation_plan(&e, data, c.limit, 0, C, BLOCK, true));
    must(evaluation_attach(&e, backend, model, rows, read_size));
    must(evaluation_sums_create(&sums, &e));
    check(e.series == EVALUATION_FIRST_BUCKET + BUCKETS, "%d series", e.series);
    must(evaluation_pass(&e, c.context, c.offset, &sums, NULL, NULL));
    for (int i = 0; i < TEXTS; i++) {
        int size = c.limit > 0 && c.limit < sizes[i] ? c.limit : sizes[i], predictions = size - 1;
        if (predictions < 1) continue;
        plain_losses(plain, tokens[i], predictions, c.context, c.offset, nll);
        for (int first = 0; first < predictions; first += BLOCK, block++) {
            for (int s = 0; s < e.series; s++) {
                double sum = 0;
                int64_t count = 0;
                for (int t = first; t < first + BLOCK && t < predictions; t++) {
                    if (t < c.offset || !is_in_series(t, s)) continue;
                    sum += nll[t];
                    count++;
                }
                wrong += count != sums.count[block * e.series + s];
                worst = worse(worst, fabs(sum - sums.nll[block * e.series + s]) / fmax((double)count, 1));
            }
        }
    }
    check(block == e.blocks, "%lld blocks, expected %lld", (long long)e.blocks, (long long)block);
    check(wrong == 0, "%s, context %d, offset %d: %lld numbers of predictions are wrong", backend->name, c.context,
          c.offset, (long long)wrong);
    worst_seen[backend == &megalodon_cpu] = fmax(worst_seen[backend == &megalodon_cpu], worst);
    check(worst <= tolerance, "%s, context %d, offset %d, limit %d, %d rows of %d: a mean is off by %.2e nats",
          backend->name, c.context, c.offset, c.limit, rows, read_size, worst);
    evaluation_sums_destroy(&sums);
    evaluation_destroy(&e);
}

static void check_passes(void) {
    static const Case cases[] = {{1, 0, 0}, {3, 0, 0}, {8, 0, 0}, {8, 0, 98}, {20, 0, 0}, {100, 0, 0}, {150, 0, 0},
                                 {LONGEST - 1, 0, 0}, {LONGEST - 1, 4, 0}, {30, 4, 0}};
    static const int shapes[][2] = {{1, LONGEST}, {3, 7}, {4, 64}};
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 4, .max_length = LONGEST, .carry = true};
    const MegalodonBackend *backends[] = {&megalodon_cpu_double, &megalodon_cpu};
    MegalodonModel *plain = model_create(&megalodon_cpu_double, &config, &options, 5);
    Dataset data;
    must(dataset_open(&data, folder, config.vocab_size));
    for (int b = 0; b < 2; b++) {
        MegalodonModel *model = model_create(backends[b], &config, &options, 5);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
            for (int shape = 0; shape < 3; shape++)
                if (b == 0 || (int)(i % 3) == shape)         /* losses come back as float, in both */
                    check_case(backends[b], model, plain, &data, cases[i], shapes[shape][0], shapes[shape][1],
                               b == 0 ? 1e-6 : 2e-5);
        backends[b]->destroy(model);
    }
    megalodon_cpu_double.destroy(plain);
    dataset_close(&data);
    printf("means of blocks are off by %.1e nats (double, losses fetched as float) and %.1e (float)\n", worst_seen[0],
           worst_seen[1]);
}

/* Windows by themselves: each prediction is in one window, none is longer than the context, all rows of a batch are
 * nearly of one length. */
static void check_windows(void) {
    Evaluation e;
    Dataset data;
    must(dataset_open(&data, folder, 256));
    for (int64_t context = 1; context < LONGEST + 20; context = context * 3 / 2 + 1) {
        for (int64_t offset = 0; offset < 10; offset += 4) {
            static char seen[TEXTS][LONGEST];
            int64_t repeated = 0, covered = 0, expected = 0, uneven = 0;
            memset(seen, 0, sizeof seen);
            must(evaluation_plan(&e, &data, 0, 0, C, BLOCK, false));
            must(evaluation_attach(&e, NULL, NULL, 3, 1));
            EvaluationCursor cursor = evaluation_cursor(&e, context, offset);
            for (int rows; (rows = evaluation_next_rows(&e, &cursor)) > 0;) {
                for (int row = 0; row < rows; row++) {
                    const EvaluationWindow *w = &e.rows[row];
                    uneven += w->length > e.rows[0].length || 4 * w->length < 3 * e.rows[0].length;
                    uneven += w->length < 1 || w->length > context || (w->start - offset) % context != 0;
                    for (int64_t t = w->start; t < w->start + w->length; t++) repeated += seen[w->text][t]++ != 0;
                }
            }
            for (int i = 0; i < e.num_texts; i++) {
                if (e.texts[i].predictions > offset) expected += e.texts[i].predictions - offset;
                for (int t = 0; t < LONGEST; t++) covered += seen[i][t] != 0;
            }
            check(repeated == 0 && covered == expected && uneven == 0, "context %lld, offset %lld: %lld of %lld "
                  "predictions, %lld twice, %lld bad windows", (long long)context, (long long)offset,
                  (long long)covered, (long long)expected, (long long)repeated, (long long)uneven);
            evaluation_destroy(&e);
        }
    }
    must(evaluation_plan(&e, &data, 0, 1, C, BLOCK, false));
    check(e.num_texts == 1 && e.predictions == sizes[0] - 1, "one file: %lld predictions", (long long)e.predictions);
    evaluation_destroy(&e);
    dataset_close(&data);
}

/* Blocks of one size and independent losses: the error is deviation / sqrt(blocks), which the draws have to find. */
static void check_bootstrap(void) {
    enum { N = 300 };
    static double nll[3][N];
    static int64_t count[N];
    Evaluation e = {.blocks = N, .series = 1};
    EvaluationSums sums[3];
    Bootstrap b, again;
    double mean = 0, squares = 0;
    for (int i = 0; i < N; i++) {
        count[i] = 10;
        nll[0][i] = 10 + (double)(megalodon_random(3, (uint64_t)i) >> 11) / 9007199254740992. * 10;
        nll[1][i] = nll[0][i] + 5;                                           /* 0.5 nats worse, everywhere */
        nll[2][i] = nll[0][i] + (i % 2 ? 1 : -1);
        mean += nll[0][i] / 10 / N;
    }
    for (int i = 0; i < N; i++) squares += (nll[0][i] / 10 - mean) * (nll[0][i] / 10 - mean);
    for (int pass = 0; pass < 3; pass++) sums[pass] = (EvaluationSums){nll[pass], count};
    must(bootstrap_create(&b, &e, sums, 3, 1));
    must(bootstrap_create(&again, &e, sums, 3, 1));
    double expected = sqrt(squares) / N, found = bootstrap_error(&b, 0, 0, -1, 0);
    double pairs = bootstrap_error(&b, 2, 0, 0, 0), expected_pairs = 0.1 / sqrt(N);
    check(fabs(found / expected - 1) < 0.1, "error %.5f, expected %.5f", found, expected);
    check(fabs(pairs / expected_pairs - 1) < 0.1, "error of pairs %.5f, expected %.5f", pairs, expected_pairs);
    check(bootstrap_error(&b, 1, 0, 0, 0) < 1e-12, "a constant difference has an error");
    check(bootstrap_error(&again, 0, 0, -1, 0) == found, "the same seed gives another error");
    check(fabs(evaluation_mean(&e, &sums[1], 0, 0, N, NULL) - mean - 0.5) < 1e-12, "the mean");
    bootstrap_destroy(&b);
    bootstrap_destroy(&again);
    must(bootstrap_create(&b, &e, sums, 3, 2));
    check(bootstrap_error(&b, 0, 0, -1, 0) != found, "another seed gives the same error");
    bootstrap_destroy(&b);
    e.blocks = 1;
    must(bootstrap_create(&b, &e, sums, 3, 1));
    check(isnan(bootstrap_error(&b, 0, 0, -1, 0)), "a single block has an error");
    bootstrap_destroy(&b);
}

static void check_errors(void) {
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 2, .max_length = 16, .carry = true};
    MegalodonModel *model = model_create(&megalodon_cpu, &config, &options, 5);
    Evaluation e;
    EvaluationSums sums;
    Dataset data;
    char path[256];
    file_name(path, sizeof path, 3);
    must(dataset_open(&data, path, config.vocab_size));
    const char *error = evaluation_plan(&e, &data, 0, 0, C, BLOCK, false);
    check(error && strstr(error, "fewer than two tokens"), "a text of one token: %s", error ? error : "no error");
    evaluation_destroy(&e);
    dataset_close(&data);

    float nan_weights[31 * 24];
    for (int i = 0; i < 31 * 24; i++) nan_weights[i] = NAN;
    must(megalodon_cpu.set(model, MEGALODON_PARAM, "output.output.weight", nan_weights, MEGALODON_F32));
    file_name(path, sizeof path, 0);
    must(dataset_open(&data, path, config.vocab_size));
    must(evaluation_plan(&e, &data, 0, 0, C, BLOCK, false));
    must(evaluation_attach(&e, &megalodon_cpu, model, 2, 16));
    must(evaluation_sums_create(&sums, &e));
    error = evaluation_pass(&e, 1000, 0, &sums, NULL, NULL);
    check(error && strstr(error, "not finite") && strstr(error, path), "NaN weights: %s", error ? error : "no error");
    evaluation_sums_destroy(&sums);
    evaluation_destroy(&e);
    dataset_close(&data);
    megalodon_cpu.destroy(model);
}

static void check_cema(void) {
    double values[200];
    check(fabs(cema_memory(0, 0) - 1 / -log(0.75)) < 1e-12, "memory of alpha = delta = 0");
    check(fabs(cema_memory(-8, 0.3) / 5190.2 - 1) < 1e-3, "a long memory: %.1f", cema_memory(-8, 0.3));
    check(isfinite(cema_memory(-30, -5)), "a very long memory is not finite");
    check(fabs(cema_period(0, 1, 16) - 32) < 1e-9, "period: half of a sixteenth of a circle");
    check(fabs(cema_period(log(3), 4, 4) - 4) < 1e-9, "period: three quarters of a circle are one the other way");
    for (int i = 0; i < 200; i++) values[i] = (i * 77) % 200;                /* 0 to 199, shuffled */
    CemaQuantity q = cema_quantity(values, 200);
    check(q.median == 99.5 && q.most == 197 && q.longest == 199, "quantiles %g %g %g", q.median, q.most, q.longest);
    check(q.bins[0] == 1 && q.bins[1] == 1 && q.bins[2] == 2 && q.bins[7] == 64 && q.bins[8] == 72, "bins");
}

/* The picture is well formed as far as a few looks tell, for odd input too. */
static void check_chart(void) {
    const double x[] = {1, 1024}, flat[] = {1.5, 1.5}, steep[] = {0, 1e6}, bars[] = {NAN, 0.25};
    Chart charts[] = {
        {.title = "a < b & c", .x_label = "x", .y_label = "y", .level = NAN, .num_series = 1,
         .series = {{"one", x, flat, bars, 2}}},
        {.title = "t", .note = "n", .x_label = "x", .y_label = "y", .level = 3, .level_label = "l", .num_series = 2,
         .series = {{"one", x, steep, bars, 2}, {"two", x, flat, NULL, 1}}},
    };
    char text[1 << 16];
    FILE *file = tmpfile();
    if (!file) must("no temporary file");
    chart_write(file, charts, 2);
    rewind(file);
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    check(strstr(text, "<svg ") == text && strstr(text, "</svg>\n"), "the document's ends");
    check(strstr(text, "a &lt; b &amp; c"), "escapes");
    check(!strstr(text, "nan") && !strstr(text, "inf\""), "a number that is none");
    char name[32];
    check(!strcmp(chart_number(1 << 20, name), "1M") && !strcmp(chart_number(512, name), "512"), "names of numbers");
}

int main(void) {
    test_begin("evaluation");
    make_texts(small_config().vocab_size);
    check_windows();
    check_passes();
    check_bootstrap();
    check_errors();
    check_cema();
    check_chart();
    remove_texts();
    return test_end();
}
