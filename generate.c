/* generate.c - lets a trained Megalodon continue a text.
 *
 *     ./generate --prompt "Once upon a time" --max-tokens 500
 *
 * The prompt goes through the model in pieces, then one token at a time comes out. The model remembers all that it has
 * read in a state of fixed size, so a token costs the same after a hundred tokens and after a hundred million, and
 * memory does not grow. The state can be saved, so that a book is read once and continued many times:
 *
 *     ./generate --prompt-file book.txt --save-state book.state --max-tokens 0
 *     ./generate --load-state book.state --prompt "And then " --seed 7
 *
 * The text goes to stdout as it is made, everything else to stderr.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include "lib/checkpoint.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "megalodon.h"
#include "lib/backends.h"
#include "lib/error.h"
#include "lib/memory.h"
#include "lib/options.h"
#include "lib/report.h"
#include "lib/sampler.h"
#include "lib/text.h"
#include "lib/vocabulary.h"

/* Tokens of the prompt that go through the model at once, unless --read-size says otherwise: enough to keep the
 * backend busy, few enough to cost little memory. */
enum { READ_SIZE_CPU = 512, READ_SIZE_GPU = 4096 };

/* ------------------------------------------------------------------------------------------------------------
 * Options.
 *
 *    type    name         default             low  high  unit  group  help
 */
#define LARGE 9007199254740992.                          /* 2^53: every whole number up to it is a double */
#define GENERATE_OPTIONS(X) \
    X(TEXT,   checkpoint,  CHECKPOINT_DEFAULT, 0, 0, "PATH", "Model", \
      "a checkpoint that ./train wrote: a file, the folder of a step, or a run's folder, which stands for its " \
      "newest step; the default is the TinyStories model that comes with the project") \
    X(FLAG,   no_verify,   NULL,               0, 0, "", "Model", \
      "load checkpoint and state without comparing their checksums") \
    X(TEXT,   tokenizer,   NULL,               0, 0, "FILE", "Model", \
      "the tokenizer.json of the model, if it does not lie beside it, where ./train puts it") \
    X(TEXT,   prompt,      NULL,               0, 0, "TEXT", "Text", \
      "text to continue, which is printed first; without this, --prompt-file and --load-state: Once upon a time") \
    X(TEXT,   prompt_file, NULL,               0, 0, "FILE", "Text", \
      "read the text to continue from a file of any size; -: from stdin; it is not printed") \
    X(INT,    read_size,   "0",                0, 1 << 20, "N", "Text", \
      "tokens to read at once; more is faster up to a point and takes more memory; 0: 512 on a CPU, 4096 on a GPU") \
    X(LONG,   max_tokens,  "500",              0, LARGE, "N", "Text", "tokens to generate at most") \
    X(TEXT,   stop,        NULL,               0, 0, "TEXT", "Text", \
      "stop when this text comes and do not print it, for example '<|endoftext|>'") \
    X(TEXT,   save_state,  NULL,               0, 0, "FILE", "State", \
      "after the prompt, write what the model remembers to a file, from which --load-state goes on") \
    X(TEXT,   load_state,  NULL,               0, 0, "FILE", "State", \
      "go on from what --save-state wrote for the same model; --prompt and --prompt-file then follow that text") \
    X(REAL,   temperature, "0.8",              0, 100, "X", "Sampling", \
      "below 1 prefers likely tokens, above 1 unlikely ones; 0: always the most likely one") \
    X(INT,    top_k,       "0",                0, 1 << 30, "N", "Sampling", \
      "draw from the N most likely tokens; 0: from all") \
    X(REAL,   top_p,       "0.95",             1e-6, 1, "X", "Sampling", \
      "draw from the fewest tokens whose probabilities add up to X; 1: from all") \
    X(LONG,   seed,        "1234",             0, LARGE, "N", "Sampling", \
      "another seed gives another text; the same one gives the same text") \
    X(INT,    threads,     "0",                0, 4096, "N", "Run", "CPU threads; 0: all cores") \
    X(CHOICE, backend,     "auto",             0, 0, "auto|cpu|cuda", "Run", \
      "what computes; auto: a GPU if there is one") \
    X(CHOICE, precision,   "fp32",             0, 0, "fp32|bf16", "Run", \
      "number format of weights and activations; bf16 needs a GPU")

typedef struct Values { GENERATE_OPTIONS(OPTION_MEMBER) } Values;
static const Option generate_table[] = { GENERATE_OPTIONS(OPTION_ROW) };

/* Reads the command line. Returns false if only the help page was asked for. */
static bool read_options(Values *v, int argc, char **argv) {
    static OptionSet set;
    bool help;
    options_init(&set, "generate", "[options]", "Continues a text with a Megalodon language model that ./train made.");
    options_add(&set, generate_table, OPTION_COUNT(generate_table), v);
    die_if(options_parse(&set, argc, argv, &help));
    if (help) {
        options_print_help(stdout, &set);
        return false;
    }
    if (v->prompt && v->prompt_file) die("--prompt and --prompt-file exclude each other; give one of them");
    if (!v->prompt && !v->prompt_file && !v->load_state) v->prompt = "Once upon a time";
    if (v->stop && strlen(v->stop) > TEXT_STOP_MAX)
        die(errorf("--stop: expected at most %d bytes, found %zu", TEXT_STOP_MAX, strlen(v->stop)));
    static const char *const idle[] = {"top-k", "top-p", "seed"};
    for (size_t i = 0; i < 3; i++)
        if (v->temperature == 0 && options_given(&set, idle[i]))
            die(errorf("--%s does nothing with --temperature 0, which always takes the most likely token", idle[i]));
    return true;
}

/* ------------------------------------------------------------------------------------------------------------
 * The model.
 */

typedef struct Generator {
    MegalodonConfig config;
    const MegalodonBackend *backend;
    MegalodonModel *model;
    Vocabulary vocabulary;       /* what its tokens mean                                */
    char hash[CHECKPOINT_HASH];  /* of the model; only where a state is saved or loaded */
    int64_t before, read;        /* tokens: of the loaded state, and of the prompt      */
    int64_t bytes_read;          /* of the prompt                                       */
    int read_size;
    Sampler sampler;
    float *logits;               /* vocab_size: after the last token                    */
} Generator;

static void load_model(Generator *g, const Values *v) {
    MegalodonPrecision precision;
    int threads;
    die_if(checkpoint_is_there(v->checkpoint));
    die_if(checkpoint_read_config(v->checkpoint, &g->config));
    die_if(vocabulary_of_checkpoint(&g->vocabulary, v->checkpoint, v->tokenizer, &g->config));
    die_if(backend_choose(v->backend, v->precision, &g->backend, &precision));
    die_if(backend_threads(v->threads, &threads));
    g->read_size = v->read_size ? v->read_size : g->backend == &megalodon_cpu ? READ_SIZE_CPU : READ_SIZE_GPU;
    MegalodonOptions options = {.max_batch = 1, .max_length = g->read_size, .carry = true, .precision = precision,
                                .max_bytes = backend_bytes(g->backend)};
    die_if(g->backend->create(&g->model, &g->config, &options));
    die_if(checkpoint_load(v->checkpoint, g->backend, g->model, &g->config));
    if (v->load_state || v->save_state) die_if(checkpoint_hash(v->checkpoint, g->hash));
    g->logits = malloc((size_t)g->config.vocab_size * sizeof *g->logits);
    if (!g->logits) die("no memory for the logits");
    die_if(sampler_create(&g->sampler, g->config.vocab_size, v->temperature, v->top_k, v->top_p, (uint64_t)v->seed));
}

/* ------------------------------------------------------------------------------------------------------------
 * The state in a file: what the model has read up to now, so that it need not be read again.
 */

/* Loads the state and the logits after its last token. */
static void load_state(Generator *g, const Values *v) {
    int64_t count;
    char tokens[32];
    const char *error = checkpoint_state_resume(v->load_state, g->backend, g->model, &g->config, g->hash, g->logits);
    if (!error) error = g->backend->get(g->model, MEGALODON_STATE, "count", &count, MEGALODON_I64);
    if (!error && count == 0) error = errorf("%s: is the state before the first token", v->load_state);
    if (error) die(errorf("--load-state %s", error));
    g->before = count;
    fprintf(stderr, "the state of %s has read %s tokens\n", v->load_state, report_count(count, tokens));
}

static void save_state(Generator *g, const char *path) {
    const char *error = checkpoint_state_write(path, g->backend, g->model, &g->config, g->hash, g->logits);
    if (error) die(errorf("--save-state %s", error));
}

/* A book takes minutes to read: whether its state can be written at all is asked before. */
static void check_writable(const char *path) {
    SafetensorsOutput output;
    struct stat info;
    if (stat(path, &info) == 0 && !S_ISREG(info.st_mode))
        die(errorf("--save-state %s: is there already, but is not a file", path));
    const char *error = safetensors_begin(&output, path);
    if (error) die(errorf("--save-state %s", error));
    safetensors_abort(&output);
}

/* ------------------------------------------------------------------------------------------------------------
 * The prompt: read in pieces, so that its size does not matter.
 */

/* Runs text through the model, after what it has read before, --read-size tokens at a time. */
static void read_text(Generator *g, const void *text, size_t length) {
    int32_t *ids;
    size_t count, size = (size_t)g->read_size;
    const char *error = vocabulary_encode(&g->vocabulary, text, length, &ids, &count);
    if (error) die(errorf("the prompt, from byte %" PRId64 " on: %s", g->bytes_read, error));
    for (size_t at = 0; at < count; at += size) {
        int n = (int)(count - at < size ? count - at : size);
        die_if(text_feed(g->backend, g->model, ids + at, n, g->before + g->read > 0));
        g->read += n;
    }
    g->bytes_read += (int64_t)length;
    free(ids);
}

/* Text of a file or a pipe that is not read yet. It is encoded up to a place where that changes no token. */
typedef struct PromptFile {
    const char *name;
    FILE *file;
    uint8_t *bytes;
    size_t used, room;
    bool ended;
} PromptFile;

/* Reads on, and runs what is certain through the model. A piece has as many bytes as would be --read-size tokens if
 * each were one byte, so that the prompt's size does not matter; text without a place to cut makes it grow. */
static void read_piece(Generator *g, PromptFile *p) {
    if (p->room - p->used < (size_t)g->read_size) {
        size_t room = 2 * p->used + (size_t)g->read_size;
        uint8_t *bytes = realloc(p->bytes, room);
        if (!bytes) die(errorf("--prompt-file %s: no memory for %zu bytes", p->name, room));
        p->bytes = bytes;
        p->room = room;
    }
    size_t n = fread(p->bytes + p->used, 1, (size_t)g->read_size, p->file);
    if (ferror(p->file)) die(errorf("--prompt-file %s: cannot be read: %s", p->name, strerror(errno)));
    p->used += n;
    p->ended = n < (size_t)g->read_size;
    size_t whole = p->ended ? p->used : vocabulary_cut(&g->vocabulary, p->bytes, p->used);
    read_text(g, p->bytes, whole);
    p->used -= whole;
    memmove(p->bytes, p->bytes + whole, p->used);
}

/* Bytes in use: on a GPU of the device, by all programs there; on a CPU by this one. 0 where the system does not tell. */
static int64_t memory_in_use(const Generator *g) {
    MegalodonMemory memory;
    g->backend->memory(g->model, &memory);
    return memory.device_used > 0 ? memory.device_used : memory_resident();
}

/* A long prompt takes minutes: a terminal shows every second how far it is, a log gets a line now and then. `size`, in
 * bytes, is 0 where it is not known. */
static void show_reading(const Generator *g, int64_t size, double start, double *shown) {
    char tokens[32], left[32], used[32];
    double now = report_seconds(), rate = (double)g->read / (now - start);
    bool terminal = isatty(STDERR_FILENO);
    if (now - *shown < (terminal ? 1 : 5)) return;
    fprintf(stderr, "%sread %s tokens", terminal ? "\r" : "", report_count(g->read, tokens));
    if (size > g->bytes_read) fprintf(stderr, ", %.0f%%", 100. * (double)g->bytes_read / (double)size);
    fprintf(stderr, ", %.0f tok/s", rate);
    if (size > g->bytes_read && g->bytes_read > 0)
        fprintf(stderr, ", left %s", report_duration((double)(size - g->bytes_read) / (double)g->bytes_read
                                                     * (now - start), left));
    fprintf(stderr, ", %s in use", report_bytes(memory_in_use(g), used));
    fprintf(stderr, "%s", terminal ? "\033[K" : "\n");
    *shown = now;
}

/* Memory does not grow with the prompt: here is what to check it by. memory: in use after the first `read` tokens. */
static void show_memory(const Generator *g, int64_t memory, int64_t read) {
    char first[32], tokens[32], last[32], all[32];
    fprintf(stderr, "%smemory in use: %s bytes after %s tokens, %s bytes after %s tokens\n",
            g->backend == &megalodon_cpu ? "" : "device ", report_count(memory, first),
            report_count(read, tokens), report_count(memory_in_use(g), last), report_count(g->read, all));
}

static void read_prompt_file(Generator *g, const char *name) {
    bool is_stdin = strcmp(name, "-") == 0;
    PromptFile p = {.name = name, .file = is_stdin ? stdin : fopen(name, "rb")};
    struct stat info;
    double start = report_seconds(), shown = start;
    int64_t memory = 0, first = 0;           /* in use after the first piece, and its tokens */
    if (!p.file) die(errorf("--prompt-file %s: cannot be opened: %s", name, strerror(errno)));
    bool known = fstat(fileno(p.file), &info) == 0;
    if (known && S_ISDIR(info.st_mode)) die(errorf("--prompt-file %s: is a folder; expected a file", name));
    while (!p.ended) {
        read_piece(g, &p);
        if (first == 0) memory = memory_in_use(g), first = g->read;
        show_reading(g, known && S_ISREG(info.st_mode) ? (int64_t)info.st_size : 0, start, &shown);
    }
    if (shown > start && isatty(STDERR_FILENO)) fprintf(stderr, "\r\033[K");
    if (g->read == 0) die(errorf("--prompt-file %s: is empty; expected some text to continue", name));
    if (g->read > first && memory > 0) show_memory(g, memory, first);
    if (!is_stdin) fclose(p.file);
    free(p.bytes);
}

/* Reads what there is to read; g->logits are those after its last token. */
static void read_all(Generator *g, const Values *v) {
    if (v->load_state) load_state(g, v);
    if (v->prompt) read_text(g, v->prompt, strlen(v->prompt));
    else if (v->prompt_file) read_prompt_file(g, v->prompt_file);
    if (g->read > 0) die_if(g->backend->last_logits(g->model, g->logits));
}

/* ------------------------------------------------------------------------------------------------------------
 * The text.
 */

/* Shows what was written so far. Where nobody reads on (`| head`), the program ends, quietly. */
static void show_text(void) {
    if (fflush(stdout) == 0 && !ferror(stdout)) return;
    if (errno == EPIPE) exit(0);
    die(errorf("the text cannot be written: %s", strerror(errno)));
}

/* Generates up to max_tokens tokens; returns how many. */
static int64_t write_text(Generator *g, const Values *v) {
    /* A terminal would obey control characters; a file or a pipe gets every byte as it is. */
    TextWriter writer = {.file = stdout, .stop = v->stop, .printable = isatty(STDOUT_FILENO)};
    int64_t made = 0;
    int32_t token = 0;
    if (v->prompt) fputs(v->prompt, stdout);
    show_text();
    while (made < v->max_tokens) {
        vocabulary_forbid(&g->vocabulary, g->logits);
        die_if(sampler_next(&g->sampler, g->logits, &token));
        vocabulary_put(&g->vocabulary, &writer, token);
        show_text();
        if (++made == v->max_tokens || writer.stopped) break;
        die_if(text_feed(g->backend, g->model, &token, 1, true));
        die_if(g->backend->last_logits(g->model, g->logits));
    }
    text_end(&writer);
    if (isatty(STDOUT_FILENO)) printf("\n");
    show_text();
    return made;
}

/* "12 tokens in 0.10 s (120 tok/s)" */
static void print_rate(const char *what, int64_t tokens, double seconds, const char *after) {
    char count[32];
    fprintf(stderr, "%s %s tokens in %.2f s (%.0f tok/s)%s", what, report_count(tokens, count), seconds,
            seconds > 0 ? (double)tokens / seconds : 0, after);
}

int main(int argc, char **argv) {
    static Generator g;
    static Values v;
    if (!read_options(&v, argc, argv)) return 0;
    *checkpoint_verifies() = !v.no_verify;
    safetensors_catch_signals();
    signal(SIGPIPE, SIG_IGN);                            /* show_text sees it and ends quietly */
    if (v.save_state) check_writable(v.save_state);
    load_model(&g, &v);

    double start = report_seconds();
    read_all(&g, &v);
    double middle = report_seconds();
    if (v.save_state) save_state(&g, v.save_state);
    double begin = report_seconds();
    int64_t made = write_text(&g, &v);
    double end = report_seconds();

    fprintf(stderr, "\n");
    if (g.read > 0) print_rate("read", g.read, middle - start, "; ");
    print_rate("generated", made, end - begin, "\n");
    g.backend->destroy(g.model);
    sampler_destroy(&g.sampler);
    vocabulary_close(&g.vocabulary);
    free(g.logits);
    return 0;
}
