/* evaluate.c - measures a trained Megalodon on texts.
 *
 *     ./evaluate --checkpoint runs/mine --data books
 *     ./evaluate --checkpoint runs/mine --data books --by-context 1K,16K,256K,all --plot context.svg
 *     ./evaluate --checkpoint runs/mine --data books --by-position
 *     ./evaluate --checkpoint runs/mine --cema
 *
 * The first reads every file as one stream, the state carried from its first token to its last. The second scores the
 * same predictions again with the context cut to each length. The third tells what it costs that attention starts
 * anew with every chunk, and what the carried state is worth there. The fourth looks at the weights alone.
 * lib/evaluation.h defines what is scored, and computes it.
 *
 * Results go to stdout, progress to stderr.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include "lib/checkpoint.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "megalodon.h"
#include "lib/backends.h"
#include "lib/cema_report.h"
#include "lib/chart.h"
#include "lib/dataset.h"
#include "lib/error.h"
#include "lib/evaluation.h"
#include "lib/options.h"
#include "lib/report.h"
#include "lib/vocabulary.h"

enum { MAX_LENGTHS = 24, MAX_PASSES = MAX_LENGTHS + 3, MAX_BUCKETS = 40, FILES_SHOWN = 20, LABEL = 32 };
enum { CPU_BATCH = 4, CPU_READ = 512, GPU_BATCH = 8, GPU_READ = 4096 };
enum { SECONDS_A_LINE = 30 };        /* between lines of progress where stderr is a file */

/* ------------------------------------------------------------------------------------------------------------
 * Options.
 *
 *    type    name         default             low  high  unit  group  help
 */
#define LARGE 9007199254740992.                          /* 2^53: every whole number up to it is a double */
#define EVALUATE_OPTIONS(X) \
    X(TEXT,   checkpoint,  CHECKPOINT_DEFAULT, 0, 0, "PATH", "Model", \
      "a checkpoint that ./train wrote: a file, the folder of a step, or a run's folder, which stands for its " \
      "newest step; the default is the TinyStories model that comes with the project") \
    X(FLAG,   no_verify,   NULL,               0, 0, "", "Model", \
      "load the checkpoint without comparing its checksums") \
    X(TEXT,   tokenizer,   NULL,               0, 0, "FILE", "Model", \
      "the tokenizer.json of the model, if it does not lie beside it, where ./train puts it; it tells how many bytes a " \
      "token stands for") \
    X(TEXT,   data,        NULL,               0, 0, "PATH", "Data", \
      "what to score: a text file (each byte is a token), a .npy file of token numbers, or a folder of either; each " \
      "file is a text of its own") \
    X(LONG,   limit,       "0",                0, LARGE, "TOKENS", "Data", \
      "score only the first TOKENS of each file; 0: all") \
    X(INT,    files,       "0",                0, 1 << 30, "N", "Data", "score only the first N files; 0: all") \
    X(REAL,   bytes_per_token, NULL,           1e-3, 1e6, "X", "Data", \
      "for token files of an unknown tokenizer: bytes of the text divided by its tokens; gives bits per byte, which " \
      "models of different tokens can be compared by") \
    X(TEXT,   by_context,  NULL,               0, 0, "LIST", "Measures", \
      "score the same predictions with the context cut to each of these lengths, for example 1K,4K,64K,1M,all; " \
      "windows start from an empty state; K is 1024, M is 1024 K, all is the whole file") \
    X(FLAG,   by_position, NULL,               0, 0, "", "Measures", \
      "loss by position in the chunk: what it costs that attention starts anew with each, and what the carried state " \
      "gains there") \
    X(FLAG,   cema,        NULL,               0, 0, "", "Measures", \
      "how long each layer's CEMA remembers; needs a checkpoint alone, no --data") \
    X(LONG,   block,       "4096",             1, LARGE, "TOKENS", "Measures", \
      "the errors are found by drawing blocks of so many predictions") \
    X(LONG,   seed,        "1234",             0, LARGE, "N", "Measures", "fixes these draws") \
    X(TEXT,   csv,         NULL,               0, 0, "FILE", "Files", "write the results as CSV, too") \
    X(TEXT,   plot,        NULL,               0, 0, "FILE.svg", "Files", \
      "draw --by-context and --by-position") \
    X(INT,    batch,       "0",                0, 1 << 16, "ROWS", "Run", \
      "windows that are read side by side, at most; 0: 4 on a CPU, 8 on a GPU") \
    X(INT,    read_size,   "0",                0, 1 << 24, "TOKENS", "Run", \
      "tokens of a window that are read at once; changes memory and speed only; 0: 512 on a CPU, 4096 on a GPU") \
    X(INT,    threads,     "0",                0, 4096, "N", "Run", "CPU threads; 0: all cores") \
    X(CHOICE, backend,     "auto",             0, 0, "auto|cpu|cuda", "Run", \
      "what computes; auto: a GPU if there is one") \
    X(CHOICE, precision,   "fp32",             0, 0, "fp32|bf16", "Run", \
      "number format of weights and activations; bf16 needs a GPU")

typedef struct Values { EVALUATE_OPTIONS(OPTION_MEMBER) } Values;
static const Option evaluate_table[] = { EVALUATE_OPTIONS(OPTION_ROW) };

/* ------------------------------------------------------------------------------------------------------------
 * The job: what is scored, with which contexts, and what came out.
 */

typedef struct Length {              /* an entry of --by-context              */
    char label[LABEL];
    int64_t tokens;                  /* INT64_MAX: all                        */
    int pass;
} Length;

typedef struct Pass {
    int64_t context, offset;         /* no context is above the longest text  */
} Pass;

typedef struct Job {
    Values values;
    MegalodonConfig config;
    const MegalodonBackend *backend;
    MegalodonModel *model;
    Vocabulary vocabulary;               /* what the model's tokens mean */
    Dataset data;
    Evaluation evaluation;
    Length lengths[MAX_LENGTHS];
    int num_lengths;
    Pass passes[MAX_PASSES];
    int num_passes;
    int whole;                       /* pass over whole texts; -1: none                                 */
    int one_chunk, shifted;          /* for --by-position: over windows of a chunk; moved by half a chunk */
    EvaluationSums sums[MAX_PASSES];
    Bootstrap bootstrap;
    int64_t done, total;             /* predictions, for the progress */
    double start, shown;
    bool bytes_known;                /* losses can be told in bits a byte: text, a tokenizer, or --bytes-per-token */
    double unit;                     /* of a nat a token in what is printed: bits a byte, where known      */
    const char *unit_name;
} Job;

/* Reads one entry of the list: digits, then K or M or nothing; or "all". */
static bool parse_length(const char *text, size_t n, int64_t *tokens) {
    int64_t value = 0, factor = 1;
    if (n == 3 && memcmp(text, "all", 3) == 0) {
        *tokens = INT64_MAX;
        return true;
    }
    if (n > 0 && (text[n - 1] == 'K' || text[n - 1] == 'k')) factor = 1 << 10;
    if (n > 0 && (text[n - 1] == 'M' || text[n - 1] == 'm')) factor = 1 << 20;
    n -= factor > 1;
    if (n < 1 || n > 12) return false;
    for (size_t i = 0; i < n; i++) {
        if (text[i] < '0' || text[i] > '9') return false;
        value = 10 * value + (text[i] - '0');
    }
    *tokens = value * factor;
    return value > 0;
}

static void parse_lengths(Job *job, const char *list) {
    for (const char *at = list;; at++) {
        size_t n = strcspn(at, ",");
        Length *length = &job->lengths[job->num_lengths];
        if (job->num_lengths == MAX_LENGTHS) die(errorf("--by-context: expected at most %d lengths", MAX_LENGTHS));
        if (!parse_length(at, n, &length->tokens))
            die(errorf("--by-context: expected lengths such as 1K,4096,1M,all, found \"%.*s\" among them",
                       n < 40 ? (int)n : 40, at));
        if (job->num_lengths > 0 && length->tokens <= length[-1].tokens)
            die(errorf("--by-context: expected each length to be larger than the one before, found \"%.*s\"", (int)n,
                       at));
        if (length->tokens == INT64_MAX) snprintf(length->label, LABEL, "all");
        else report_count(length->tokens, length->label);
        job->num_lengths++;
        at += n;
        if (!*at) return;
    }
}

/* Reads the command line. Returns false if only the help page was asked for. */
static bool read_options(Job *job, int argc, char **argv) {
    static OptionSet set;
    Values *v = &job->values;
    bool help;
    options_init(&set, "evaluate", "--data PATH [options]",
                 "Measures a Megalodon language model that ./train made: loss, perplexity and bits per byte of texts.");
    options_add(&set, evaluate_table, OPTION_COUNT(evaluate_table), v);
    die_if(options_parse(&set, argc, argv, &help));
    if (help) {
        options_print_help(stdout, &set);
        return false;
    }
    if (!v->cema && !v->data) die("--data is missing; give a text to score, or --cema to look at the weights alone");
    static const char *const idle[] = {"data", "by-context", "by-position", "plot"};
    for (size_t i = 0; v->cema && i < 4; i++)
        if (options_given(&set, idle[i]))
            die(errorf("--%s does not go with --cema, which looks at the weights alone; run evaluate twice", idle[i]));
    if (v->plot && !v->by_context && !v->by_position)
        die("--plot draws what --by-context and --by-position measure; give one of them or both");
    if (v->limit == 1) die("--limit 1 leaves nothing to score: a prediction takes one token to read and one to guess");
    if (v->by_context) parse_lengths(job, v->by_context);
    if (v->plot && v->by_context && job->lengths[0].tokens == INT64_MAX)
        die("--plot needs a number among the lengths of --by-context; all alone is no curve");
    return true;
}

/* Ends the program now, not after hours of scoring, if a file cannot be written. What it held before goes. */
static FILE *open_output(const char *option, const char *name) {
    FILE *file = name ? fopen(name, "w") : NULL;
    if (name && !file) die(errorf("--%s %s: cannot be written: %s", option, name, strerror(errno)));
    return file;
}

static void close_output(const char *option, const char *name, FILE *file) {
    bool failed = ferror(file);
    if (fclose(file) != 0 || failed) die(errorf("--%s %s: cannot be written: %s", option, name, strerror(errno)));
}

/* ------------------------------------------------------------------------------------------------------------
 * Setting up.
 */

/* The number of the pass with this context. Contexts beyond the longest text are one and the same. */
static int add_pass(Job *job, int64_t context, int64_t offset) {
    if (context > job->evaluation.longest) context = job->evaluation.longest;
    for (int i = 0; i < job->num_passes; i++)
        if (job->passes[i].context == context && job->passes[i].offset == offset) return i;
    job->passes[job->num_passes] = (Pass){context, offset};
    for (int i = 0; i < job->evaluation.num_texts; i++) {
        int64_t predictions = job->evaluation.texts[i].predictions;
        job->total += predictions > offset ? predictions - offset : 0;
    }
    die_if(evaluation_sums_create(&job->sums[job->num_passes], &job->evaluation));
    return job->num_passes++;
}

/* Counts the bytes of text that the predicted tokens stand for: each is one in text, as many as the tokenizer says in
 * token files. A token that the model does not know is found now, and not after hours of scoring. */
static void count_bytes(Job *job) {
    enum { WINDOW = 1 << 14 };
    static int32_t window[WINDOW];
    Evaluation *e = &job->evaluation;
    if (job->data.text) die_if(dataset_check(&job->data));
    for (int i = 0; i < e->num_texts; i++) {
        EvaluationText *text = &e->texts[i];
        text->bytes = job->data.text ? text->predictions : 0;
        for (int64_t at = 0; at < text->predictions && !job->data.text; at += WINDOW) {
            int64_t n = text->predictions - at < WINDOW ? text->predictions - at : WINDOW;
            die_if(dataset_window(&job->data, text->first + 1 + at, n, window));
            for (int64_t t = 0; t < n && job->vocabulary.json; t++)
                text->bytes += vocabulary_token_bytes(&job->vocabulary, window[t]);
        }
    }
}

/* What turns nats a token into bits a byte. */
static void choose_unit(Job *job) {
    const Values *v = &job->values;
    const Evaluation *e = &job->evaluation;
    int64_t bytes = 0;
    if (v->bytes_per_token > 0 && (job->data.text || job->vocabulary.json))
        die(errorf("--bytes-per-token is for token files of an unknown tokenizer; here %s",
                   job->data.text ? "the data is text, of which each byte is a token"
                                  : "the model's tokenizer tells how many bytes a token has"));
    for (int i = 0; i < e->num_texts; i++) bytes += e->texts[i].bytes;
    double bytes_per_token = bytes > 0 ? (double)bytes / (double)e->predictions : v->bytes_per_token;
    job->bytes_known = bytes_per_token > 0;
    job->unit = job->bytes_known ? 1 / log(2) / bytes_per_token : 1;
    job->unit_name = job->bytes_known ? "bits/byte" : "nats/token";
}

static void plan(Job *job) {
    const Values *v = &job->values;
    die_if(checkpoint_is_there(v->checkpoint));
    die_if(checkpoint_read_config(v->checkpoint, &job->config));
    die_if(vocabulary_find(&job->vocabulary, v->checkpoint, v->tokenizer));
    die_if(vocabulary_fit(&job->vocabulary, job->config.vocab_size));
    die_if(dataset_open(&job->data, v->data, vocabulary_known(&job->vocabulary)));
    if (job->data.text && job->vocabulary.json)
        die(errorf("--data %s: is text, but the model reads the tokens of its tokenizer; first turn it into them: "
                   "./tokenize --tokenizer tokenizer.json --data %s --out tokens.npy", v->data, v->data));
    Evaluation *e = &job->evaluation;
    die_if(evaluation_plan(e, &job->data, v->limit, v->files, job->config.chunk_size, v->block, v->by_position));
    if (v->by_position && e->longest <= job->config.chunk_size)
        die(errorf("--by-position compares chunks after the first of a text, but the longest text here asks for %lld "
                   "predictions and a chunk has %d", (long long)e->longest, job->config.chunk_size));
    job->whole = -1;
    if (!v->by_context || v->by_position) job->whole = add_pass(job, INT64_MAX, 0);
    for (int i = 0; i < job->num_lengths; i++) {
        Length *length = &job->lengths[i];
        length->pass = add_pass(job, length->tokens, 0);
        if (job->passes[length->pass].context == e->longest) job->whole = length->pass;
    }
    if (v->by_position) {
        job->one_chunk = add_pass(job, job->config.chunk_size, 0);
        job->shifted = add_pass(job, INT64_MAX, job->config.chunk_size / 2);
    }
    count_bytes(job);
    choose_unit(job);
}

/* Creates the model, as large as the plan needs it. */
static void load_model(Job *job) {
    const Values *v = &job->values;
    Evaluation *e = &job->evaluation;
    MegalodonPrecision precision;
    int threads;
    int64_t shortest = e->longest, longest = 0, windows = 0;
    die_if(backend_choose(v->backend, v->precision, &job->backend, &precision));
    die_if(backend_threads(v->threads, &threads));
    bool cpu = job->backend == &megalodon_cpu;
    int64_t batch = v->batch > 0 ? v->batch : cpu ? CPU_BATCH : GPU_BATCH;
    int64_t length = v->read_size > 0 ? v->read_size : cpu ? CPU_READ : GPU_READ;
    for (int i = 0; i < job->num_passes; i++) {
        if (job->passes[i].context < shortest) shortest = job->passes[i].context;
        if (job->passes[i].context > longest) longest = job->passes[i].context;
    }
    for (int i = 0; i < e->num_texts; i++) windows += (e->texts[i].predictions + shortest - 1) / shortest;
    if (length > longest) length = longest;
    if (batch > windows) batch = windows;
    MegalodonOptions options = {.max_batch = (int)batch, .max_length = (int)length, .carry = true,
                                .precision = precision, .max_bytes = backend_bytes(job->backend)};
    die_if(job->backend->create(&job->model, &job->config, &options));
    die_if(checkpoint_load(v->checkpoint, job->backend, job->model, &job->config));
    die_if(evaluation_attach(e, job->backend, job->model, (int)batch, (int)length));

    MegalodonMemory memory;
    char text[3][32];
    job->backend->memory(job->model, &memory);
    printf("megalodon evaluate, backend %s, %s, %d thread%s\n", job->backend->name, v->precision, threads,
           threads == 1 ? "" : "s");
    printf("model        %s: %s parameters, chunks of %d tokens\n", v->checkpoint,
           report_count(megalodon_num_parameters(&job->config), text[0]), job->config.chunk_size);
    printf("data         %s: %s %s, %s prediction%s%s\n", v->data, report_count(e->num_texts, text[0]),
           e->num_texts == 1 ? "text" : "texts", report_count(e->predictions, text[1]),
           e->predictions == 1 ? "" : "s", job->data.text ? " of a byte each" : "");
    if (job->vocabulary.json)
        printf("tokenizer    %s tokens; a prediction stands for %.3f bytes of text\n",
               report_count(tokenizer_vocab_size(&job->vocabulary.tok), text[0]), 1 / log(2) / job->unit);
    printf("memory       %s, whatever the length of the texts: %" PRId64 " row%s of %" PRId64 " tokens at a time\n",
           report_bytes(memory.parameters + memory.activations + memory.state + memory.workspace, text[2]), batch,
           batch == 1 ? "" : "s", length);
    printf("errors       one standard error, from %d draws of %s block%s of %" PRId64 " predictions\n",
           BOOTSTRAP_DRAWS, report_count(e->blocks, text[2]), e->blocks == 1 ? "" : "s", v->block);
    if (e->blocks < 2) printf("             (a single block has none; a smaller --block gives more)\n");
    fflush(stdout);
}

/* ------------------------------------------------------------------------------------------------------------
 * Scoring.
 */

/* A terminal shows the progress once a second, on one line; a file gets a line now and then. */
static void show_progress(void *whose, int64_t predictions) {
    Job *job = whose;
    double now = report_seconds(), rate;
    bool terminal = isatty(STDERR_FILENO);
    char done[32], total[32], left[32];
    job->done += predictions;
    if (now - job->shown < (terminal ? 1 : SECONDS_A_LINE)) return;
    rate = (double)job->done / (now - job->start);
    fprintf(stderr, "%sscored %s of %s tokens, %.0f tok/s, left %s%s", terminal ? "\r" : "",
            report_count(job->done, done), report_count(job->total, total), rate,
            report_duration((double)(job->total - job->done) / rate, left), terminal ? "\033[K" : "\n");
    job->shown = now;
}

static void score(Job *job) {
    char tokens[32], time[32];
    job->start = job->shown = report_seconds();
    for (int i = 0; i < job->num_passes; i++)
        die_if(evaluation_pass(&job->evaluation, job->passes[i].context, job->passes[i].offset, &job->sums[i],
                               show_progress, job));
    double seconds = report_seconds() - job->start;
    fprintf(stderr, "%sscored %s tokens in %s (%.0f tok/s)\n", isatty(STDERR_FILENO) ? "\r\033[K" : "",
            report_count(job->done, tokens), report_duration(seconds, time), (double)job->done / seconds);
    die_if(bootstrap_create(&job->bootstrap, &job->evaluation, job->sums, job->num_passes,
                            (uint64_t)job->values.seed));
}

/* Mean loss of a series over all blocks, in nats a token. */
static double mean_of(const Job *job, int pass, int series, int64_t *predictions) {
    return evaluation_mean(&job->evaluation, &job->sums[pass], series, 0, job->evaluation.blocks, predictions);
}

/* A number in a column, or a dash where there is none. */
static void print_column(double x, int width, int digits) {
    if (isfinite(x)) printf(" %*.*f", width, digits, x);
    else printf(" %*s", width, "-");
}

/* ------------------------------------------------------------------------------------------------------------
 * The results as CSV: a row a loss, of all measures in one table. In rows of contexts the difference is to the first
 * context; rows of position_shifted and position_empty have theirs to the row `position` before them.
 */
typedef struct CsvRow {
    const char *measure, *name;
    int64_t first, last, predictions;                        /* first and last position; -1: none */
    double loss, error, difference, difference_error;        /* nats a token; NAN: none           */
    double unit;                                             /* of its own; 0: that of the job    */
} CsvRow;

static void csv_row(const Job *job, FILE *csv, const CsvRow *row) {
    if (!csv) return;
    fprintf(csv, "%s,\"", row->measure);
    for (const char *c = row->name; *c; c++) fprintf(csv, *c == '"' ? "\"\"" : "%c", *c);
    fprintf(csv, "\",");
    if (row->first >= 0) fprintf(csv, "%" PRId64 ",%" PRId64, row->first, row->last);
    else fprintf(csv, ",");
    fprintf(csv, ",%" PRId64 ",", row->predictions);
    report_csv_number(csv, row->loss, ",");
    report_csv_number(csv, row->error, ",");
    report_csv_number(csv, exp(row->loss), ",");
    double unit = !job->bytes_known ? NAN : row->unit > 0 ? row->unit : job->unit;
    report_csv_number(csv, row->loss * unit, ",");
    report_csv_number(csv, row->error * unit, ",");
    report_csv_number(csv, row->difference, ",");
    report_csv_number(csv, row->difference_error, "\n");
}

/* ------------------------------------------------------------------------------------------------------------
 * Whole texts.
 */

static void print_files(const Job *job, FILE *csv) {
    const Evaluation *e = &job->evaluation;
    char count[32];
    printf("\n  predictions  nats/token  perplexity%s   file\n", job->bytes_known ? "  bits/byte" : "");
    for (int i = 0; i < e->num_texts; i++) {
        const EvaluationText *text = &e->texts[i];
        int64_t end = i + 1 < e->num_texts ? e->texts[i + 1].first_block : e->blocks;
        const char *path = job->data.files[text->file].path;
        double loss = evaluation_mean(e, &job->sums[job->whole], EVALUATION_ALL, text->first_block,
                                      end - text->first_block, NULL);
        /* A token of one file may stand for more bytes than one of another. */
        double unit = text->bytes > 0 ? (double)text->predictions / (double)text->bytes / log(2) : job->unit;
        CsvRow row = {"file", path, -1, -1, text->predictions, loss, NAN, NAN, NAN, unit};
        csv_row(job, csv, &row);
        if (i == FILES_SHOWN) printf("  ... and %d more; --csv tells of all of them\n", e->num_texts - i);
        if (i >= FILES_SHOWN) continue;
        printf("  %11s  %10.4f  %#10.4g", report_count(text->predictions, count), loss, exp(loss));
        if (job->bytes_known) printf("  %9.4f", loss * unit);
        printf("   %s\n", path);
    }
}

static void print_whole(const Job *job, FILE *csv) {
    int64_t predictions;
    double loss = mean_of(job, job->whole, EVALUATION_ALL, &predictions);
    double error = bootstrap_error(&job->bootstrap, job->whole, EVALUATION_ALL, -1, 0);
    CsvRow row = {"total", job->values.data, -1, -1, predictions, loss, error, NAN, NAN, 0};
    csv_row(job, csv, &row);
    if (job->evaluation.num_texts > 1) print_files(job, csv);
    printf("\nThe state carried from the start of each text to its end:\n");
    printf("loss %.4f nats/token, perplexity %#.4g", loss, exp(loss));
    if (job->bytes_known) printf(", %.4f bits/byte", loss * job->unit);
    if (isfinite(error)) printf(" (error %.4f %s)", error * job->unit, job->unit_name);
    printf("\n");
}

/* ------------------------------------------------------------------------------------------------------------
 * By context.
 */

static void print_contexts(const Job *job, FILE *csv) {
    const Evaluation *e = &job->evaluation;
    const Bootstrap *b = &job->bootstrap;
    char count[32];
    int base = job->lengths[0].pass;
    double first = mean_of(job, base, EVALUATION_ALL, NULL);
    bool beyond = false;
    printf("\nBy context: the same %s predictions each time, in windows that start from an empty state\n\n",
           report_count(e->predictions, count));
    printf("       context  nats/token  perplexity%s    error      gain    error\n",
           job->bytes_known ? "  bits/byte" : "");
    for (int i = 0; i < job->num_lengths; i++) {
        const Length *length = &job->lengths[i];
        int64_t predictions;
        double loss = mean_of(job, length->pass, EVALUATION_ALL, &predictions);
        double error = bootstrap_error(b, length->pass, EVALUATION_ALL, -1, 0);
        double difference = i > 0 ? loss - first : NAN;
        double difference_error = i > 0 ? bootstrap_error(b, length->pass, EVALUATION_ALL, base, EVALUATION_ALL) : NAN;
        char name[32];
        snprintf(name, sizeof name, "%" PRId64, length->tokens);
        CsvRow row = {"context", length->tokens == INT64_MAX ? "all" : name, -1, -1, predictions, loss, error,
                      difference, difference_error, 0};
        csv_row(job, csv, &row);
        printf("%14s  %10.4f  %#10.4g", length->label, loss, exp(loss));
        if (job->bytes_known) printf("  %9.4f", loss * job->unit);
        print_column(error * job->unit, 8, 4);
        print_column(-difference * job->unit, 9, 4);
        print_column(difference_error * job->unit, 8, 4);
        beyond = beyond || (length->tokens != INT64_MAX && length->tokens > e->longest);
        printf("%s\n", length->tokens != INT64_MAX && length->tokens > e->longest ? "  *" : "");
    }
    printf("\nErrors and gains are in %s. The gain is over context %s; its error is that of pairs.\n", job->unit_name,
           job->lengths[0].label);
    if (beyond) printf("* beyond the longest text, %s predictions: scored as whole texts\n",
                       report_count(e->longest, count));
}

/* ------------------------------------------------------------------------------------------------------------
 * By position in the chunk. Three passes score the same predictions: one with the state carried; one that starts half
 * a chunk later in the text, so that in the first half of a chunk attention reaches half a chunk further back; and
 * one over windows of a chunk, to which no state is carried.
 */

typedef struct Estimate { double loss, error, difference, difference_error; } Estimate;      /* nats a token */

typedef struct Position {            /* a series: a bucket, or several */
    char name[LABEL];
    int64_t first, last, predictions;
    Estimate carried, shifted, empty;
} Position;

static Estimate estimate(const Job *job, int pass, int series) {
    return (Estimate){.loss = mean_of(job, pass, series, NULL),
                      .error = bootstrap_error(&job->bootstrap, pass, series, -1, 0),
                      .difference = mean_of(job, pass, series, NULL) - mean_of(job, job->whole, series, NULL),
                      .difference_error = bootstrap_error(&job->bootstrap, pass, series, job->whole, series)};
}

static Position position_of(const Job *job, int series) {
    const Estimate none = {NAN, NAN, NAN, NAN};
    int C = job->config.chunk_size, bucket = series - EVALUATION_FIRST_BUCKET;
    Position p = {.name = "all", .first = 0, .last = C - 1, .shifted = none};
    if (series == EVALUATION_FIRST_HALF) p.last = C / 2 - 1;
    if (bucket >= 0) {
        p.first = evaluation_bucket_first(bucket);
        p.last = evaluation_bucket_last(bucket, C);
    }
    if (p.first == p.last) snprintf(p.name, LABEL, "%" PRId64, p.first);
    else snprintf(p.name, LABEL, "%" PRId64 "-%" PRId64, p.first, p.last);
    mean_of(job, job->whole, series, &p.predictions);
    p.carried = estimate(job, job->whole, series);
    p.empty = estimate(job, job->one_chunk, series);
    if (p.last < C / 2) p.shifted = estimate(job, job->shifted, series);
    p.carried.difference = p.carried.difference_error = NAN;
    return p;
}

static void position_csv(const Job *job, FILE *csv, const Position *p) {
    static const char *const measures[] = {"position", "position_shifted", "position_empty"};
    const Estimate *estimates[] = {&p->carried, &p->shifted, &p->empty};
    for (int i = 0; i < 3; i++) {
        CsvRow row = {measures[i], p->name, p->first, p->last, p->predictions, estimates[i]->loss,
                      estimates[i]->error, estimates[i]->difference, estimates[i]->difference_error, 0};
        if (!isnan(row.loss)) csv_row(job, csv, &row);
    }
}

static void print_positions(const Job *job, FILE *csv) {
    int buckets = job->evaluation.series - EVALUATION_FIRST_BUCKET, C = job->config.chunk_size;
    double unit = job->unit;
    Position half = position_of(job, EVALUATION_FIRST_HALF), all = position_of(job, EVALUATION_LATER_CHUNKS);
    char count[32];
    printf("\nBy position in the chunk of %d, in all chunks but the first of each text; %s\n\n", C, job->unit_name);
    printf("  position  predictions      loss    error  reset costs    error  state gains    error\n");
    for (int i = 0; i <= buckets + 1; i++) {
        Position p = i < buckets ? position_of(job, EVALUATION_FIRST_BUCKET + i) : i == buckets ? half : all;
        if (p.predictions == 0) continue;
        position_csv(job, csv, &p);
        printf("%s%10s %12s ", i == buckets ? "\n" : "", p.name, report_count(p.predictions, count));
        print_column(p.carried.loss * unit, 8, 4);
        print_column(p.carried.error * unit, 8, 4);
        print_column(-p.shifted.difference * unit, 12, 4);
        print_column(p.shifted.difference_error * unit, 8, 4);
        print_column(p.empty.difference * unit, 12, 4);
        print_column(p.empty.difference_error * unit, 8, 4);
        printf("\n");
    }
    printf("\nloss: with the state carried. reset costs: so much less is it where attention reaches half a chunk\n"
           "further back. state gains: so much more is it in windows of one chunk that start from an empty state.\n");
}

/* ------------------------------------------------------------------------------------------------------------
 * The plot.
 */

/* Fills a chart of the contexts. x, y, error: MAX_LENGTHS each. */
static Chart chart_contexts(const Job *job, double *x, double *y, double *error, char *note, size_t size) {
    const Evaluation *e = &job->evaluation;
    int count = 0, base = job->lengths[0].pass;
    double own = bootstrap_error(&job->bootstrap, base, EVALUATION_ALL, -1, 0) * job->unit;
    char predictions[32];
    Chart chart = {.title = "Loss by context", .note = note, .x_label = "context in tokens", .num_series = 1,
                   .y_label = job->bytes_known ? "bits per byte" : "nats per token", .level = NAN};
    for (int i = 0; i < job->num_lengths; i++) {
        const Length *length = &job->lengths[i];
        double loss = mean_of(job, length->pass, EVALUATION_ALL, NULL) * job->unit;
        if (length->tokens == INT64_MAX) {
            chart.level = loss;
            chart.level_label = "whole texts";
            continue;
        }
        x[count] = (double)length->tokens;
        y[count] = loss;
        error[count++] = length->pass == base ? NAN : job->unit * bootstrap_error(&job->bootstrap, length->pass,
                                                                                  EVALUATION_ALL, base, EVALUATION_ALL);
    }
    chart.series[0] = (ChartSeries){"", x, y, error, count};
    int n = snprintf(note, size, "%s predictions", report_count(e->predictions, predictions));
    if (isfinite(own))
        snprintf(note + n, size - (size_t)n, "; bars: error of the difference to the first point, whose own error is "
                 "%.4f", own);
    return chart;
}

/* The same for positions p, which stand at p + 1: the tokens of the chunk that have been read. */
static Chart chart_positions(const Job *job, double x[MAX_BUCKETS], double y[3][MAX_BUCKETS],
                             double error[3][MAX_BUCKETS]) {
    static const char *const labels[] = {"empty state at the chunk's start", "state carried",
                                         "attention half a chunk further back"};
    int buckets = job->evaluation.series - EVALUATION_FIRST_BUCKET, count = 0, first_half = 0;
    Chart chart = {.title = "Loss by position in the chunk", .level = NAN,
                   .x_label = "tokens of the chunk that have been read",
                   .y_label = job->bytes_known ? "bits per byte" : "nats per token",
                   .note = "all chunks but the first of each text; bars: one standard error"};
    for (int i = 0; i < buckets; i++) {
        Position p = position_of(job, EVALUATION_FIRST_BUCKET + i);
        const Estimate *estimates[] = {&p.empty, &p.carried, &p.shifted};
        if (p.predictions == 0) continue;
        x[count] = sqrt((double)(p.first + 1) * (double)(p.last + 1));
        for (int line = 0; line < 3; line++) {
            y[line][count] = estimates[line]->loss * job->unit;
            error[line][count] = estimates[line]->error * job->unit;
        }
        count++;
        if (!isnan(p.shifted.loss)) first_half = count;
    }
    chart.num_series = first_half > 0 ? 3 : 2;
    for (int line = 0; line < chart.num_series; line++)
        chart.series[line] = (ChartSeries){labels[line], x, y[line], error[line], line < 2 ? count : first_half};
    return chart;
}

static void draw(const Job *job, FILE *file) {
    double x[MAX_LENGTHS], y[MAX_LENGTHS], error[MAX_LENGTHS];
    double place[MAX_BUCKETS], loss[3][MAX_BUCKETS], loss_error[3][MAX_BUCKETS];
    char note[256];
    Chart charts[2];
    int count = 0;
    if (job->num_lengths > 0) charts[count++] = chart_contexts(job, x, y, error, note, sizeof note);
    if (job->values.by_position) charts[count++] = chart_positions(job, place, loss, loss_error);
    chart_write(file, charts, count);
}

/* ------------------------------------------------------------------------------------------------------------
 * CEMA.
 */

static void report_cema(Job *job, FILE *csv) {
    CemaLayer *layers;
    const char *path = job->values.checkpoint;
    char count[32];
    die_if(checkpoint_is_there(path));
    die_if(cema_describe(path, &job->config, &layers));
    int L = job->config.num_layers;
    printf("%s: %s states of CEMA a layer, %d for each of %d channels\n", path,
           report_count(layers[0].memory.states, count), job->config.cema_ndim, job->config.model_dim);
    printf("\nMemory: 1/(-ln|q|), tokens until what a state holds has faded to 1/e\n\n");
    cema_print(stdout, layers, L, false);
    printf("\nPeriod: 2 pi/|arg q|, tokens until a state has turned once\n\n");
    cema_print(stdout, layers, L, true);
    if (csv) cema_csv(csv, layers, L);
    free(layers);
}

int main(int argc, char **argv) {
    static Job job;
    const Values *v = &job.values;
    if (!read_options(&job, argc, argv)) return 0;
    *checkpoint_verifies() = !v->no_verify;
    safetensors_catch_signals();
    if (!v->cema) {
        plan(&job);
        load_model(&job);
    }
    FILE *csv = open_output("csv", v->csv), *plot = open_output("plot", v->plot);
    if (v->cema) {
        report_cema(&job, csv);
    } else {
        score(&job);
        if (csv)
            fprintf(csv, "measure,name,first,last,predictions,loss,loss_error,perplexity,bits_per_byte,"
                    "bits_per_byte_error,difference,difference_error\n");
        if (job.whole >= 0) print_whole(&job, csv);
        if (job.num_lengths > 0) print_contexts(&job, csv);
        if (v->by_position) print_positions(&job, csv);
        if (plot) draw(&job, plot);
        job.backend->destroy(job.model);
        for (int i = 0; i < job.num_passes; i++) evaluation_sums_destroy(&job.sums[i]);
        bootstrap_destroy(&job.bootstrap);
        evaluation_destroy(&job.evaluation);
        dataset_close(&job.data);
        vocabulary_close(&job.vocabulary);
    }
    if (csv) close_output("csv", v->csv, csv);
    if (plot) close_output("plot", v->plot, plot);
    if (fflush(stdout) != 0 || ferror(stdout)) die(errorf("the results cannot be written: %s", strerror(errno)));
    return 0;
}
