/* recall.c - what does a model remember, and over how many chunks? doc/recall.md tells what came out.
 *
 *     recall show       prints a few sequences
 *     recall train      trains a small model on them and saves it
 *     recall test       asks a model and counts the right answers by distance, number of facts and hops
 *
 * lib/recall.h makes the sequences. Nothing is read from a file: every step of training sees new ones, and the test
 * sees others than the training, so that there is nothing to learn but to remember.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/checkpoint.h"          /* first: it asks for POSIX */

#include "megalodon.h"
#include "lib/backends.h"
#include "lib/cema_init.h"
#include "lib/error.h"
#include "lib/model_options.h"
#include "lib/options.h"
#include "lib/recall.h"
#include "lib/report.h"

#define RECALL_OPTIONS(X) \
    X(CHOICE, task,       "pairs",      0, 0, "pairs|needle|hops", "Task", "see the head of lib/recall.h") \
    X(TEXT,   facts,      "1,2,4,8",    0, 0, "LIST", "Task", "facts (chains) of a sequence: one of these") \
    X(TEXT,   distances,  "0,1,4,16,64", 0, 0, "LIST", "Task", "chunks between a fact and its question, ascending") \
    X(INT,    hops,       "1",          1, RECALL_MAX_HOPS, "N", "Task", "facts of a chain, with --task hops") \
    X(INT,    letters,    "2",          1, RECALL_MAX_LETTERS, "N", "Task", "letters of a name") \
    X(INT,    unit,       NULL,         8, 1 << 20, "TOKENS", "Task", \
      "a chunk, in which distances are counted; if not given, the model's") \
    X(TEXT,   haystack,   NULL,         0, 0, "FILE", "Task", "a text to use as filler instead of random capitals") \
    X(LONG,   seed,       "1",          0, 9007199254740992., "N", "Task", "fixes weights and sequences") \
    X(INT,    batch,      "16",         1, 4096, "ROWS", "Running", "sequences at once, at most") \
    X(INT,    steps,      "2000",       1, 1 << 30, "N", "Training", \
      "steps; each takes the next of --distances as its longest") \
    X(LONG,   step_tokens, NULL,        1, 1 << 30, "N", "Training", \
      "tokens of a step at most: long sequences come with fewer rows; if not given, always --batch rows") \
    X(REAL,   grow,       "0",          0, 0.9, "X", "Training", \
      "share of the steps in which the distances join one after the other, the nearest first; 0: all from the start") \
    X(REAL,   lr,         "0.002",      0, 1, "X", "Training", \
      "highest learning rate: a tenth of the steps warm up; after it, and after --grow, it falls to a tenth") \
    X(CHOICE, cema_init,  "released",   0, 0, "released|spread|hold", "Training", "see ./train --help") \
    X(REAL,   cema_memory, "2048",      2.5, 1e9, "TOKENS", "Training", \
      "longest memory of --cema-init spread and hold") \
    X(BOOL,   cema_decay, "true",       0, 0, "true|false", "Training", "weight decay on CEMA's parameters too") \
    X(TEXT,   init,       NULL,         0, 0, "FILE", "Training", "begin with the weights of this model") \
    X(TEXT,   out,        "recall.safetensors", 0, 0, "FILE", "Training", "the trained model") \
    X(TEXT,   checkpoint, "recall.safetensors", 0, 0, "FILE", "Test", "the model to ask") \
    X(INT,    questions,  "256",        1, 1 << 20, "N", "Test", \
      "questions for each number of facts, over all distances; the last sequence may have some more") \
    X(TEXT,   csv,        NULL,         0, 0, "FILE", "Test", "also write every count to this file") \
    X(CHOICE, backend,    "auto",       0, 0, "auto|cpu|cuda", "Running", "what computes") \
    X(CHOICE, precision,  "fp32",       0, 0, "fp32|bf16", "Running", "number format (bf16: GPU only)") \
    X(INT,    threads,    "0",          0, 4096, "N", "Running", "CPU threads; 0: all cores")

typedef struct Values { RECALL_OPTIONS(OPTION_MEMBER) } Values;
static const Option recall_table[] = { RECALL_OPTIONS(OPTION_ROW) };

enum { MAX_FACTS = RECALL_MAX_NAMES };
static const uint64_t TEST_SEQUENCES = 1ull << 40;   /* the numbers of the test's sequences begin here */

typedef struct Experiment {
    OptionSet options;
    Values values;
    MegalodonConfig config;
    Recall recall;
    int num_facts, facts[RECALL_MAX_LIST];
    const MegalodonBackend *backend;
    MegalodonPrecision precision;
    MegalodonModel *model;
    int32_t *tokens, *targets;       /* batch * length */
    RecallQuestion (*questions)[MAX_FACTS];    /* of each row */
} Experiment;

/* ----------------------------------------------------------------------------------------------------
 * Setting up
 */

/* "0,1,4": ascending whole numbers. */
static int parse_list(const char *option, const char *text, int low, int *out) {
    int count = 0;
    for (const char *at = text; count < RECALL_MAX_LIST; at++) {
        char *end;
        errno = 0;
        long value = strtol(at, &end, 10);
        bool digit = *at >= '0' && *at <= '9', ends = *end == ',' || *end == '\0';
        if (!digit || !ends || errno || value < low || value > 1 << 20 || (count && value <= out[count - 1]))
            die(errorf("--%s: expected ascending whole numbers from %d with commas between them, such as 1,2,4; found "
                       "\"%s\"", option, low, option_quoted(text)));
        out[count++] = (int)value;
        at = end;
        if (*end == '\0') return count;
    }
    die(errorf("--%s: more than %d numbers", option, RECALL_MAX_LIST));
}

/* A model of about a million parameters with short chunks, so that 64 of them are soon passed. */
static void small_model(MegalodonConfig *config) {
    megalodon_default_config(config);
    config->num_layers = 4;
    config->model_dim = 128;
    config->z_dim = 64;
    config->value_dim = 256;
    config->ffn_hidden_dim = 256;
    config->chunk_size = 128;
    config->norm_num_groups = 16;
}

static void read_haystack(Recall *r, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) die(errorf("--haystack %s: cannot be read: %s", path, strerror(errno)));
    enum { LARGEST = 1 << 26 };
    uint8_t *text = malloc(LARGEST);
    if (!text) die("no memory for the haystack");
    r->haystack_size = (int64_t)fread(text, 1, LARGEST, file);
    if (ferror(file)) die(errorf("--haystack %s: cannot be read: %s", path, strerror(errno)));
    fclose(file);
    r->haystack = text;
}

static void set_up_task(Experiment *e) {
    const Values *v = &e->values;
    Recall *r = &e->recall;
    r->task = strcmp(v->task, "pairs") == 0 ? RECALL_PAIRS : strcmp(v->task, "hops") == 0 ? RECALL_HOPS : RECALL_NEEDLE;
    r->unit = options_given(&e->options, "unit") ? v->unit : e->config.chunk_size;
    r->letters = v->letters;
    r->hops = v->hops;
    r->seed = megalodon_random((uint64_t)v->seed, 0x72656361); /* "reca": apart from the weights */
    r->num_distances = parse_list("distances", v->distances, 0, r->distances);
    if (r->task != RECALL_HOPS && v->hops > 1) die("--hops does nothing without --task hops");
    if (r->task == RECALL_NEEDLE) {
        if (options_given(&e->options, "facts")) die("--facts does nothing with --task needle, which has one fact");
        e->num_facts = 1, e->facts[0] = 1;
    } else {
        e->num_facts = parse_list("facts", v->facts, 1, e->facts);
    }
    if (v->haystack) read_haystack(r, v->haystack);
    die_if(recall_check(r, e->facts[e->num_facts - 1], r->num_distances - 1));
    if (e->config.vocab_size < 128)
        die(errorf("a sequence is text and needs the bytes below 128, but the model has %d tokens",
                   e->config.vocab_size));
}

static void allocate_batch(Experiment *e) {
    size_t places = (size_t)e->values.batch * (size_t)recall_length(&e->recall, e->recall.num_distances - 1);
    e->tokens = malloc(places * sizeof *e->tokens);
    e->targets = malloc(places * sizeof *e->targets);
    e->questions = malloc((size_t)e->values.batch * sizeof *e->questions);
    if (!e->tokens || !e->targets || !e->questions) die(errorf("no memory for %zu tokens", places));
}

static void create_model(Experiment *e, bool training) {
    MegalodonOptions options = {.max_batch = e->values.batch, .training = training, .keep_activations = !training,
                                .max_length = recall_length(&e->recall, e->recall.num_distances - 1),
                                .precision = e->precision};
    die_if(e->backend->create(&e->model, &e->config, &options));
}

/* ----------------------------------------------------------------------------------------------------
 * recall show
 */

static void show(Experiment *e) {
    const Recall *r = &e->recall;
    for (int i = 0; i < e->num_facts; i++) {
        int last = r->num_distances - 1, length = recall_length(r, last);
        recall_make(r, (uint64_t)i, e->facts[i], last, e->tokens, e->targets, e->questions[0]);
        printf("%d fact%s, %d tokens, chunks of %d (chunks without anything are left out)\n", e->facts[i],
               e->facts[i] > 1 ? "s" : "", length, r->unit);
        for (int d = -1; d <= last; d++) {
            int chunk = d < 0 ? 0 : r->distances[d];
            if (d == 0 && chunk == 0) continue;          /* with the facts, above */
            printf("%6d  ", chunk);
            for (int t = chunk * r->unit; t < (chunk + 1) * r->unit; t++)
                putchar(e->tokens[t] >= ' ' && e->tokens[t] < 127 ? e->tokens[t] : '_');
            printf("\n");
        }
    }
}

/* ----------------------------------------------------------------------------------------------------
 * recall train
 */

/* The learning rate of a step: linear warm-up, constant while distances join, then a cosine down to a tenth. */
static double learning_rate(const Values *v, int step) {
    int warmup = v->steps / 10 + 1, joined = (int)(v->grow * v->steps);
    int begin = joined > warmup ? joined : warmup;
    if (step < warmup) return v->lr * (step + 1) / warmup;
    if (step < begin) return v->lr;
    double p = (double)(step - begin) / (v->steps - begin + 1);
    return v->lr * (0.1 + 0.45 * (1 + cos(3.14159265358979323846 * p)));
}

/* The farthest distance of a step's questions: each of those that have joined in turn. */
static int farthest_distance(const Experiment *e, int step) {
    int distances = e->recall.num_distances;
    double share = (double)step / e->values.steps, grow = e->values.grow;
    int joined = share < grow ? 1 + (int)(share / grow * distances) : distances;
    return step % joined;
}

/* Sequences of a step whose farthest question is at distance `last`. */
static int rows_of(const Experiment *e, int last) {
    int64_t fitting = e->values.batch;
    if (options_given(&e->options, "step-tokens")) fitting = e->values.step_tokens / recall_length(&e->recall, last);
    return fitting < e->values.batch ? (int)fitting : e->values.batch;
}

/* Ends the program before the first step if one of them could not be made. */
static void check_steps(const Experiment *e) {
    for (int last = 0; last < e->recall.num_distances; last++) {
        die_if(recall_check(&e->recall, e->facts[0], last));
        if (rows_of(e, last) < 1)
            die(errorf("--step-tokens %lld: a sequence with a question %d chunks away has %d tokens",
                       (long long)e->values.step_tokens, e->recall.distances[last], recall_length(&e->recall, last)));
    }
}

/* One step on sequences whose farthest question is at distance `last`. Returns the mean loss of an answer's letter. */
static double train_step(Experiment *e, int step, int last) {
    const Values *v = &e->values;
    int T = recall_length(&e->recall, last), rows = rows_of(e, last);
    int choices = recall_fitting(&e->recall, e->facts, e->num_facts, last);
    for (int row = 0; row < rows; row++) {
        uint64_t number = (uint64_t)step * (uint64_t)v->batch + (uint64_t)row;
        int facts = recall_draw_facts(&e->recall, e->facts, choices, number);
        recall_make(&e->recall, number, facts, last, e->tokens + (int64_t)row * T, e->targets + (int64_t)row * T,
                    e->questions[row]);
    }
    MegalodonBatch batch = {.tokens = e->tokens, .targets = e->targets, .B = rows, .T = T, .dropout = true,
                            .seed = (uint64_t)v->seed, .step = (uint64_t)step};
    MegalodonAdamW adamw = {.lr = learning_rate(v, step), .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8,
                            .weight_decay = 0.1, .clip = 1, .step = step + 1, .spare_cema = !v->cema_decay};
    MegalodonLoss loss;
    double norm;
    e->backend->zero_gradients(e->model);
    die_if(e->backend->forward(e->model, &batch, &loss));
    die_if(e->backend->backward(e->model, 1 / (double)loss.counted));
    die_if(e->backend->update(e->model, &adamw, &norm));
    if (!isfinite(loss.nll_sum) || !isfinite(norm))
        die(errorf("step %d: loss %g, gradient norm %g; a lower --lr may help", step + 1, loss.nll_sum, norm));
    return loss.nll_sum / (double)loss.counted;
}

static void train(Experiment *e) {
    const Values *v = &e->values;
    int distances = e->recall.num_distances, lines = v->steps < 20 ? v->steps : 20;
    double loss[RECALL_MAX_LIST], start;
    int64_t tokens = 0, seen[RECALL_MAX_LIST] = {0};
    MegalodonMemory memory;
    char time[32], count[32];
    check_steps(e);
    create_model(e, true);
    if (v->init) die_if(checkpoint_load(v->init, e->backend, e->model, &e->config));
    else die_if(megalodon_initialise(e->backend, e->model, &e->config, (uint64_t)v->seed));
    if (!v->init) die_if(cema_start(e->backend, e->model, &e->config, v->cema_init, v->cema_memory));
    e->backend->memory(e->model, &memory);
    printf("%s parameters, %s; loss in nats a letter of an answer, guessing costs %.2f; by farthest distance:\n  step",
           report_count(megalodon_num_parameters(&e->config), count),
           report_bytes(megalodon_total_memory(&memory), time), log(26));
    for (int d = 0; d < distances; d++) printf(" %7d", e->recall.distances[d]);
    printf("\n");
    start = report_seconds();
    for (int step = 0; step < v->steps; step++) {
        int last = farthest_distance(e, step);
        double now = train_step(e, step, last);
        loss[last] = seen[last]++ == 0 ? now : 0.9 * loss[last] + 0.1 * now;
        tokens += (int64_t)rows_of(e, last) * recall_length(&e->recall, last);
        if ((int64_t)(step + 1) * lines / v->steps == (int64_t)step * lines / v->steps) continue;
        printf("%6d", step + 1);
        for (int d = 0; d < distances; d++)
            if (seen[d]) printf(" %7.4f", loss[d]);
            else printf("       -");
        printf("\n");
        fflush(stdout);
    }
    double seconds = report_seconds() - start;
    die_if(checkpoint_save(v->out, e->backend, e->model, &e->config));
    printf("%s tokens in %s; saved %s\n", report_count(tokens, count), report_duration(seconds, time), v->out);
}

/* ----------------------------------------------------------------------------------------------------
 * recall test
 */

/* mixed: the answer is wrong, and begins as the answer to another question of the sequence. */
typedef struct Count { int64_t asked, right, mixed; } Count;

/* The likeliest token at `at`, after all that stands before it. logits: V of each token of the row. */
static int32_t likeliest(const Experiment *e, const float *logits, int at) {
    int V = e->config.vocab_size;
    const float *row = logits + (int64_t)(at - 1) * V;
    int32_t best = 0;
    for (int i = 0; i < V; i++) {
        if (!isfinite(row[i])) die("a logit of the model is not finite");
        if (row[i] > row[best]) best = i;
    }
    return best;
}

/* Counts the answer to question i of a row: right is one of which each letter is the likeliest token, given the letters
 * before it. A model that knows which names there were, and not which belongs to which, mixes them. */
static void judge(const Experiment *e, const float *logits, const int32_t *tokens, const RecallQuestion *questions,
                  int facts, int i, Count *count) {
    const RecallQuestion *q = &questions[i];
    int32_t first = likeliest(e, logits, q->at);
    bool right = first == tokens[q->at], mixed = false;
    for (int k = 1; k < e->recall.letters && right; k++)
        right = likeliest(e, logits, q->at + k) == tokens[q->at + k];
    for (int j = 0; j < facts && first != tokens[q->at]; j++) mixed = mixed || first == tokens[questions[j].at];
    count->asked++;
    count->right += right;
    count->mixed += mixed;
}

/* Asks all questions of as many sequences of `facts` facts as give --questions questions. */
static void ask(Experiment *e, int facts, float *logits, Count counts[RECALL_MAX_LIST][RECALL_MAX_HOPS + 1]) {
    const Recall *r = &e->recall;
    int last = r->num_distances - 1, T = recall_length(r, last), V = e->config.vocab_size;
    int sequences = (e->values.questions + facts - 1) / facts;
    for (int first = 0; first < sequences; first += e->values.batch) {
        int rows = sequences - first < e->values.batch ? sequences - first : e->values.batch;
        for (int row = 0; row < rows; row++)
            recall_make(r, TEST_SEQUENCES + (uint64_t)(first + row), facts, last, e->tokens + (int64_t)row * T,
                        e->targets + (int64_t)row * T, e->questions[row]);
        MegalodonBatch batch = {.tokens = e->tokens, .targets = e->targets, .B = rows, .T = T};
        die_if(e->backend->forward(e->model, &batch, NULL));
        die_if(e->backend->get(e->model, MEGALODON_ACT, "logits", logits, MEGALODON_F32));
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < facts; i++) {
                const RecallQuestion *q = &e->questions[row][i];
                judge(e, logits + (int64_t)row * T * V, e->tokens + (int64_t)row * T, e->questions[row], facts, i,
                      &counts[q->distance][q->hops]);
            }
    }
}

/* A line of shares, a column a distance: over all hops, or of one number of them. mixed: of mixed answers, not right
 * ones. A condition inside the loop over hops would meet a fault of gcc 12, which mixes up the members at -O3 with
 * AVX2. */
static void print_counts(const Experiment *e, int hops, bool mixed,
                         Count counts[RECALL_MAX_LIST][RECALL_MAX_HOPS + 1]) {
    int from = hops ? hops : 1, to = hops ? hops : e->recall.hops;
    for (int d = 0; d < e->recall.num_distances; d++) {
        Count sum = {0, 0, 0};
        for (int h = from; h <= to; h++) {
            sum.asked += counts[d][h].asked;
            sum.right += counts[d][h].right;
            sum.mixed += counts[d][h].mixed;
        }
        int64_t given = mixed ? sum.mixed : sum.right;
        if (sum.asked) printf(" %6.1f%%", 100. * (double)given / (double)sum.asked);
        else printf("       -");
    }
    printf("\n");
}

static void test(Experiment *e) {
    const Recall *r = &e->recall;
    const Values *v = &e->values;
    int64_t T = recall_length(r, r->num_distances - 1);
    float *logits = malloc((size_t)(v->batch * T * e->config.vocab_size) * sizeof *logits);
    static Count counts[RECALL_MAX_LIST][RECALL_MAX_LIST][RECALL_MAX_HOPS + 1];
    static Count all[RECALL_MAX_LIST][RECALL_MAX_HOPS + 1];
    FILE *csv = v->csv ? fopen(v->csv, "w") : NULL;
    if (!logits) die("no memory for the logits of a batch; use a smaller --batch");
    if (v->csv && !csv) die(errorf("--csv %s: cannot be written: %s", v->csv, strerror(errno)));
    create_model(e, false);
    die_if(checkpoint_load(v->checkpoint, e->backend, e->model, &e->config));
    printf("%s, --task %s: right answers, by the distance in chunks of %d tokens; by guessing %.2g%%\n%13s",
           v->checkpoint, v->task, r->unit, 100 * pow(26, -r->letters), "");
    for (int d = 0; d < r->num_distances; d++) printf(" %7d", r->distances[d]);
    printf("\n");
    if (csv) fprintf(csv, "task,facts,hops,distance,asked,right,mixed\n");
    for (int i = 0; i < e->num_facts; i++) {
        ask(e, e->facts[i], logits, counts[i]);
        printf("%6d %-6s", e->facts[i], e->facts[i] == 1 ? "fact" : "facts");
        print_counts(e, 0, false, counts[i]);
        if (e->facts[i] > 1) {
            printf("        mixed");
            print_counts(e, 0, true, counts[i]);
        }
        for (int d = 0; d < r->num_distances; d++)
            for (int h = 1; h <= r->hops; h++) {
                Count c = counts[i][d][h];
                all[d][h].asked += c.asked, all[d][h].right += c.right;
                if (csv && c.asked)
                    fprintf(csv, "%s,%d,%d,%d,%lld,%lld,%lld\n", v->task, e->facts[i], h, r->distances[d],
                            (long long)c.asked, (long long)c.right, (long long)c.mixed);
            }
    }
    for (int h = 1; h <= r->hops && r->hops > 1; h++) {
        printf("%6d %-6s", h, h == 1 ? "hop" : "hops");
        print_counts(e, h, false, all);
    }
    if (csv && fclose(csv) != 0) die(errorf("--csv %s: cannot be written", v->csv));
    free(logits);
}

/* ----------------------------------------------------------------------------------------------------
 * The program
 */

/* The model's configuration: of the checkpoint, or the small model's with what was given on the command line. */
static void choose_model(Experiment *e, const char *from) {
    MegalodonConfig given = e->config;
    if (from) die_if(checkpoint_read_config(from, &e->config));
    else small_model(&e->config);
    for (int i = 0; i < OPTION_COUNT(model_table); i++) {
        const Option *row = &model_table[i];
        char name[OPTION_NAME_MAX];
        snprintf(name, sizeof name, "%s", row->field);
        for (char *c = name; *c; c++) *c = *c == '_' ? '-' : *c;
        if (!options_given(&e->options, name)) continue;
        if (from) die(errorf("--%s cannot be given: the model is that of %s", name, from));
        size_t size = row->type == OPTION_BOOL ? sizeof(bool) : row->type == OPTION_INT ? sizeof(int) : sizeof(double);
        memcpy((char *)&e->config + row->offset, (char *)&given + row->offset, size);
    }
    die_if(megalodon_validate(&e->config));
}

int main(int argc, char **argv) {
    static Experiment e;
    bool help;
    int threads;
    const char *what = argc > 1 && argv[1][0] != '-' ? argv[1] : "";
    bool shows = strcmp(what, "show") == 0, trains = strcmp(what, "train") == 0, tests = strcmp(what, "test") == 0;
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc > 1 && *what) argv++, argc--;
    options_init(&e.options, "recall", "show|train|test [options]", "Trains and tests models on what they remember.");
    options_add(&e.options, recall_table, OPTION_COUNT(recall_table), &e.values);
    options_add(&e.options, model_table, OPTION_COUNT(model_table), &e.config);
    die_if(options_parse(&e.options, argc, argv, &help));
    if (help) {
        options_print_help(stdout, &e.options);
        return 0;
    }
    if (!shows && !trains && !tests)
        die(errorf("expected \"recall show\", \"recall train\" or \"recall test\", found \"%s\"", option_quoted(what)));
    die_if(backend_choose(e.values.backend, e.values.precision, &e.backend, &e.precision));
    die_if(backend_threads(e.values.threads, &threads));
    choose_model(&e, tests ? e.values.checkpoint : trains ? e.values.init : NULL);
    set_up_task(&e);
    allocate_batch(&e);
    if (shows) show(&e);
    if (trains) train(&e);
    if (tests) test(&e);
    if (e.model) e.backend->destroy(e.model);
    free(e.tokens);
    free(e.targets);
    free(e.questions);
    free((void *)e.recall.haystack);
    return 0;
}
