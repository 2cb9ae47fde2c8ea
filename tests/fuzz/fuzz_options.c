/* fuzz_options.c - lib/options.h: any command line, an argument a line, is refused with a sentence, or its values lie in
 * their ranges and are the same when the printed configuration is read again. */
#include "fuzz.h"

#include "lib/model_options.h"
#include "lib/options.h"

#define FUZZ_OPTIONS(X) \
    X(INT,    batch,     "8",      1, 65536, "ROWS",      "Training", "sequences in one forward pass") \
    X(LONG,   steps,     "1000",   0, 9e15,  "N",         "Training", "updates") \
    X(REAL,   lr,        "1e-3",   0, 1e3,   "X",         "Training", "the largest learning rate") \
    X(REAL,   low,       NULL,     -5, 5,    "X",         "Training", "may be below 0") \
    X(BOOL,   carry,     "true",   0, 0,     "true|false", "Training", "carry the state") \
    X(FLAG,   no_verify, NULL,     0, 0,     "",          "Run",      "do not compare checksums") \
    X(CHOICE, backend,   "auto",   0, 0,     "auto|cpu|cuda", "Run",  "what computes") \
    X(TEXT,   data,      NULL,     0, 0,     "PATH",      "Data",     "text file or folder of text files")

typedef struct Values { FUZZ_OPTIONS(OPTION_MEMBER) } Values;
static const Option fuzz_table[] = { FUZZ_OPTIONS(OPTION_ROW) };

enum { MOST = 64 };                  /* arguments */

typedef struct Job {
    OptionSet set;
    Values values;
    MegalodonConfig config;
} Job;

static const char *read_line(Job *job, int argc, char **argv, bool *help) {
    memset(&job->values, 0xA5, sizeof job->values);
    memset(&job->config, 0xA5, sizeof job->config);
    options_init(&job->set, "fuzz", "[options]", "Reads a command line.");
    options_add(&job->set, fuzz_table, OPTION_COUNT(fuzz_table), &job->values);
    options_add(&job->set, model_table, OPTION_COUNT(model_table), &job->config);
    return options_parse(&job->set, argc, argv, help);
}

/* Copies the input's lines into `text`, each of them an argument. */
static int split(const uint8_t *bytes, size_t size, char *text, char **argv) {
    int argc = 1;
    argv[0] = text + size;
    memcpy(text, bytes, size);
    text[size] = '\0';
    for (size_t at = 0; at < size && argc < MOST; at++) {
        argv[argc++] = text + at;
        while (at < size && text[at] != '\n') at++;
        text[at] = '\0';
    }
    return argc;
}

static void check_ranges(const Job *job) {
    for (int i = 0; i < job->set.count; i++) {
        const Option *option = &job->set.rows[i];
        const void *value = job->set.values[i];
        if (!job->set.texts[i]) continue;
        double number = option->type == OPTION_INT ? *(const int *)value
                      : option->type == OPTION_LONG ? (double)*(const int64_t *)value
                      : option->type == OPTION_REAL ? *(const double *)value : option->low;
        expect(number >= option->low && number <= option->high, "%s is %g", option->field, number);
        if (option->type == OPTION_CHOICE)
            expect(option_is_choice(option->unit, *(const char *const *)value), "%s is no choice", option->field);
    }
}

/* Every value as one would type it, and the same values from that. */
static void read_again(const Job *job) {
    static Job again;
    static char texts[OPTIONS_MAX][64];
    char *argv[2 * OPTIONS_MAX + 1] = {texts[0]};
    int argc = 1;
    bool help;
    for (int i = 0; i < job->set.count; i++) {
        const char *value = job->set.texts[i];
        if (!value || strncmp(value, "--", 2) == 0) continue;
        snprintf(texts[i], sizeof texts[i], "--%s", job->set.names[i]);
        argv[argc++] = texts[i];
        if (job->set.rows[i].type != OPTION_FLAG) argv[argc++] = (char *)(uintptr_t)value;
    }
    const char *error = read_line(&again, argc, argv, &help);
    expect(!error, "%s", error);
    for (int i = 0; i < job->set.count; i++) {
        const char *a = job->set.texts[i], *b = again.set.texts[i];
        expect(!a || strncmp(a, "--", 2) == 0 || (b && strcmp(a, b) == 0), "%s has changed", job->set.names[i]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static Job job;
    static FILE *sink;
    static char printed[1 << 16], text[8192];
    char *argv[MOST];
    bool help;
    if (size + 1 > sizeof text) return 0;
    if (!sink) sink = fmemopen(printed, sizeof printed, "w");
    expect(sink, "no memory");
    const char *error = read_line(&job, split(bytes, size, text, argv), argv, &help);
    expect_sentence(error);
    if (error) return 0;
    check_ranges(&job);
    read_again(&job);
    rewind(sink);
    options_print_values(sink, &job.set);
    if (help) options_print_help(sink, &job.set);
    return 0;
}
