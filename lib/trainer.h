/* trainer.h - a training run: its options, what it holds, how it is saved, resumed and set up.
 *
 * train.c trains; this is the rest of it. The functions end the program with a sentence when something is wrong with
 * what the user gave.
 */
#ifndef LIB_TRAINER_H
#define LIB_TRAINER_H

#include "checkpoint.h"              /* first: it asks for POSIX */

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../megalodon.h"
#include "backends.h"
#include "cema_init.h"
#include "dataset.h"
#include "divergence.h"
#include "documents.h"
#include "error.h"
#include "examples.h"
#include "lock.h"
#include "model_options.h"
#include "options.h"
#include "report.h"
#include "state.h"
#include "streams.h"
#include "vocabulary.h"

/* ------------------------------------------------------------------------------------------------------------
 * Options. The values of all groups but "Files" and "Run" are kept in checkpoints and come back with --resume.
 *
 *    type    name           default     low  high  unit  group  help
 */
#define LARGE 9007199254740992.                          /* 2^53: every whole number up to it is a double */
#define TRAIN_OPTIONS(X) \
    X(TEXT,   data,          NULL,       0, 0, "PATH", "Data", \
      "what to train on: a text file (each byte is a token), a .npy file of token numbers (uint16 or uint32), a " \
      "folder of either, taken in the order of their names, or a .jsonl file of prompts and responses, of which only " \
      "the responses are learnt") \
    X(TEXT,   val,           NULL,       0, 0, "PATH", "Data", \
      "held-out data for the evaluation; without it the end of --data is held out") \
    X(REAL,   val_fraction,  "0.05",     0, 0.9, "X", "Data", \
      "share of --data to hold out where there is no --val; 0: no evaluation") \
    X(TEXT,   document_separator, "<|endoftext|>", 0, 0, "TEXT", "Data", \
      "a document ends after this text and the line feed behind it; in token files after this token of the tokenizer, " \
      "or the token of this number; none: only at the end of its file. For --carry-state, --within-documents and " \
      ".jsonl files, where it is put behind each response") \
    X(FLAG,   within_documents, NULL,    0, 0, "", "Data", \
      "predict no token across the end of a document; with --carry-state it is always so") \
    X(INT,    batch,         "16",       1, 1 << 20, "ROWS", "Training", "sequences in one forward pass") \
    X(INT,    seq_len,       "512",      1, 1 << 30, "TOKENS", "Training", \
      "tokens in a sequence; any length, also beyond the model's chunk") \
    X(INT,    accumulate,    "1",        1, 1 << 20, "N", "Training", \
      "forward and backward passes in a step: a batch of N times --batch rows in the memory of --batch") \
    X(FLAG,   carry_state,   NULL,       0, 0, "", "Training", \
      "each row reads a text of its own from beginning to end, --seq-len tokens after the other, and keeps its " \
      "state until a document ends; without it, rows start at random places with an empty state") \
    X(LONG,   steps,         "1000",     1, LARGE, "N", "Training", "optimiser steps of the whole run") \
    X(LONG,   tokens,        NULL,       1, LARGE, "N", "Training", \
      "tokens of the whole run, rounded up to whole steps; instead of --steps") \
    X(LONG,   seed,          "1234",     0, LARGE, "N", "Training", \
      "fixes the initial weights, the order of the data and dropout") \
    X(CHOICE, cema_init,     "released", 0, 0, "released|spread|hold", "Training", \
      "how long CEMA remembers at the start; released: a few tokens; spread: averages over 2 to --cema-memory tokens; " \
      "hold: every second channel adds up what comes in") \
    X(REAL,   cema_memory,   "2048",     2.5, 1e9, "TOKENS", "Training", \
      "longest memory of --cema-init spread and hold") \
    X(CHOICE, precision,     "fp32",     0, 0, "fp32|bf16", "Training", \
      "number format of weights and activations; bf16 needs a GPU") \
    X(REAL,   lr,            "0.001",    0, 10, "X", "Optimiser", "highest learning rate of AdamW") \
    X(LONG,   warmup,        NULL,       0, LARGE, "STEPS", "Optimiser", \
      "steps of linear rise to --lr; if not given, a tenth of --steps, at most 1000") \
    X(CHOICE, schedule,      "cosine",   0, 0, "cosine|linear|constant", "Optimiser", \
      "how the learning rate goes on after the warm-up") \
    X(REAL,   min_lr_ratio,  "0.1",      0, 1, "X", "Optimiser", \
      "what the schedule ends at, as a share of --lr") \
    X(REAL,   beta1,         "0.9",      0, 0.999999, "X", "Optimiser", "decay of the mean of gradients") \
    X(REAL,   beta2,         "0.95",     0, 0.999999, "X", "Optimiser", "decay of the mean of their squares") \
    X(REAL,   adam_eps,      "1e-8",     1e-30, 1, "X", "Optimiser", "added to the root of that mean") \
    X(REAL,   weight_decay,  "0.1",      0, 10, "X", "Optimiser", "decoupled decay, on every parameter") \
    X(BOOL,   cema_decay,    "true",     0, 0, "true|false", "Optimiser", \
      "weight decay on CEMA's parameters too, as in the released code") \
    X(REAL,   clip,          "1",        0, 1e9, "NORM", "Optimiser", \
      "largest norm of the gradient over all parameters; 0: no clipping") \
    X(INT,    max_bad_steps, "10",       1, 1 << 30, "N", "Optimiser", \
      "stop after so many skipped steps in a row; a step is skipped, and changes nothing, if its loss or its " \
      "gradient is not finite or a spike") \
    X(REAL,   spike_guard,   "0",        0, 1e6, "Z", "Optimiser", \
      "a loss or a gradient norm is a spike if it lies more than Z standard deviations above the mean of the last " \
      "100 steps; 0: nothing is") \
    X(LONG,   eval_every,    "250",      0, LARGE, "STEPS", "Evaluation", \
      "steps between evaluations on held-out data; 0: only at the end") \
    X(INT,    eval_batches,  "8",        1, 1 << 20, "N", "Evaluation", \
      "size of an evaluation in units of --batch rows, evenly spread over the held-out data") \
    X(LONG,   sample_every,  "0",        0, LARGE, "STEPS", "Evaluation", \
      "steps between samples of the model's own text; 0: none") \
    X(LONG,   sample_tokens, "200",      1, LARGE, "N", "Evaluation", "length of a sample") \
    X(TEXT,   prompt,        "Once upon a time", 0, 0, "TEXT", "Evaluation", "beginning of a sample") \
    X(TEXT,   checkpoint_dir, "checkpoints", 0, 0, "FOLDER", "Files", \
      "where checkpoints are written; none: nowhere") \
    X(LONG,   save_every,    "1000",     0, LARGE, "STEPS", "Files", \
      "steps between checkpoints; 0: only at the end and when stopped") \
    X(INT,    keep,          "3",        1, 1 << 20, "N", "Files", "checkpoints to keep; older ones are deleted") \
    X(CHOICE, on_save_error, "continue", 0, 0, "continue|stop", "Files", \
      "what to do where a checkpoint or the log cannot be written, on a full disk for example: say so and go on, or " \
      "stop; the checkpoints before stay in any case") \
    X(FLAG,   no_verify,     NULL,       0, 0, "", "Files", \
      "load checkpoints without comparing their checksums, and do not read back what was written") \
    X(TEXT,   resume,        NULL,       0, 0, "PATH", "Files", \
      "go on from a checkpoint or from the newest one of a folder, with its options") \
    X(TEXT,   init,          NULL,       0, 0, "PATH", "Files", \
      "start a new run from the weights and the model of a checkpoint, with a fresh optimiser; for fine-tuning") \
    X(TEXT,   tokenizer,     NULL,       0, 0, "FILE", "Files", \
      "the tokenizer.json that made the .npy files of --data, or is to encode its .jsonl; a copy is kept with each " \
      "checkpoint. With --resume and --init it is the checkpoint's") \
    X(TEXT,   log,           NULL,       0, 0, "FILE", "Files", "a CSV file with a row for every step") \
    X(LONG,   log_every,     "10",       1, LARGE, "STEPS", "Run", "steps between lines of progress") \
    X(INT,    threads,       "0",        0, 4096, "N", "Run", "CPU threads; 0: all cores") \
    X(CHOICE, backend,       "auto",     0, 0, "auto|cpu|cuda", "Run", "what computes; auto: a GPU if there is one") \
    X(FLAG,   quiet,         NULL,       0, 0, "", "Run", "print nothing but errors and the last line")

typedef struct Values {
    const char *preset;
    TRAIN_OPTIONS(OPTION_MEMBER)
} Values;

static const Option train_table[] = { TRAIN_OPTIONS(OPTION_ROW) };
static const Option preset_table[] = {
    OPTION_ROW(TEXT, preset, NULL, 0, 0, "NAME", "Model", "a size by name; the options below change parts of it")
};

/* ------------------------------------------------------------------------------------------------------------
 * The run: everything that main sets up and a step uses.
 */

typedef struct Range {           /* the part of the data that is trained on, or held out */
    Dataset *data;
    Examples *examples;          /* NULL: the data is no .jsonl file */
    int64_t first, count;        /* tokens, or examples */
} Range;

typedef struct Run {
    OptionSet options;
    Values values;
    MegalodonConfig config;
    const MegalodonBackend *backend;
    MegalodonModel *model;
    MegalodonPrecision precision;
    int threads;
    Vocabulary vocabulary;       /* what the model's tokens mean                      */
    Dataset data, val;           /* val stays empty where the end of data is held out */
    Examples examples, val_examples;     /* instead of data and val: .jsonl files     */
    bool bytes_known;            /* of each token: losses are told in bits a byte, too */
    DocumentMark mark;           /* ends a document                                   */
    Range training, held_out;    /* held_out.count is 0: no evaluation                */
    uint64_t data_hash, val_hash;
    int32_t *tokens, *targets;   /* accumulate * batch * seq_len each: a whole step   */
    int32_t *window;             /* seq_len + 1 + DOCUMENT_MARK_MAX                   */
    double bytes_per_token;      /* of the targets of the last step; NAN: not known   */
    Streams streams;             /* --carry-state: what each row reads                */
    bool *fresh;                 /* accumulate * batch: a row starts from an empty state */
    int32_t *prompt;             /* --prompt as tokens: of a sample                   */
    size_t prompt_count;
    StateCopy held;              /* the rows' state while the model does something else */
    int64_t places, padding;     /* tokens of this process's steps; those without a target */
    int64_t step;                /* steps done                                        */
    int64_t updates;             /* steps that changed the weights: AdamW's own count */
    int64_t bad_steps;           /* steps that did not, since the start               */
    int bad_in_a_row;
    int bad_pass;                /* the last step's first pass whose loss is not finite; -1: none */
    SpikeGuard guard;            /* --spike-guard: what it learnt                     */
    double loss_limit, norm_limit;       /* what it allowed in the last step          */
    bool spike;                  /* the last step was one                             */
    FolderLock lock;             /* of --checkpoint-dir                               */
    bool log_failed;             /* it was said that the log cannot be written        */
    int64_t saved_step;          /* of the newest checkpoint; -1: none                */
    int model_rows;              /* the options' first row of the model's fields       */
    Report report;
} Run;

static inline int64_t tokens_per_step(const Run *run) {
    return (int64_t)run->values.batch * run->values.seq_len * run->values.accumulate;
}

/* ------------------------------------------------------------------------------------------------------------
 * Options that the program gives itself.
 */

/* Gives an option a value that the program worked out, so that it is printed and saved like any other. */
static inline void set_text(Run *run, int i, const char *text) {
    char *copy = malloc(strlen(text) + 1);                   /* lives as long as the run */
    if (!copy) die("no memory for the options");
    die_if(options_set(&run->options, i, strcpy(copy, text)));
}

static inline void set_number(Run *run, const char *name, int64_t value) {
    char text[32];
    snprintf(text, sizeof text, "%" PRId64, value);
    set_text(run, options_index(&run->options, name), text);
}

static inline void show_int(Run *run, int i, int value) {
    char text[32];
    snprintf(text, sizeof text, "%d", value);
    set_text(run, i, text);
}

static inline void show_bool(Run *run, int i, bool value) {
    set_text(run, i, value ? "true" : "false");
}

/* With as many digits as give the same number back. */
static inline void show_double(Run *run, int i, double value) {
    char text[32];
    for (int digits = 6; digits <= 17; digits++) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    set_text(run, i, text);
}

/* ------------------------------------------------------------------------------------------------------------
 * Checkpoints. Beside weights and moments they hold the facts that a run depends on: the options, how far it came,
 * and what data it saw.
 */

/* Is this option kept in a checkpoint? "Model" is not: the configuration stands in the model's own file. --tokens is
 * not: it was turned into --steps. */
static inline bool is_kept(const OptionSet *set, int i) {
    static const char *const groups[] = {"Data", "Training", "Optimiser", "Evaluation"};
    bool kept = false;
    for (int g = 0; g < 4; g++) kept = kept || strcmp(set->rows[i].group, groups[g]) == 0;
    return kept && strcmp(set->names[i], "tokens") != 0;
}

/* Where each row goes on: "12 345 678", and "010" for rows that begin a document. Free both. */
static inline void streams_to_text(const Streams *streams, char **next, char **fresh) {
    int at = 0;
    *next = malloc((size_t)streams->B * 21 + 1);
    *fresh = malloc((size_t)streams->B + 1);
    if (!*next || !*fresh) die("no memory to write down where the rows of the batch are");
    for (int row = 0; row < streams->B; row++) {
        at += sprintf(*next + at, "%s%" PRId64, row ? " " : "", streams->next[row]);
        (*fresh)[row] = streams->fresh[row] ? '1' : '0';
    }
    (*fresh)[streams->B] = '\0';
}

static inline const char *write_checkpoint(Run *run) {
    enum { NUMBERS = 5 };
    static char keys[OPTIONS_MAX][OPTION_NAME_MAX + 8], numbers[NUMBERS][32], guard[GUARD_TEXT];
    SafetensorsPair facts[OPTIONS_MAX + NUMBERS + 5];
    char *next = NULL, *fresh = NULL;
    int count = 0, rows, n;
    const char *error = lock_keep(&run->lock, run->values.checkpoint_dir);
    if (error) return error;
    snprintf(numbers[0], 32, "%" PRId64, run->updates);
    snprintf(numbers[1], 32, "%" PRId64, run->bad_steps);
    snprintf(numbers[2], 32, "%d", run->bad_in_a_row);
    snprintf(numbers[3], 32, "%016" PRIx64, run->data_hash);
    snprintf(numbers[4], 32, "%016" PRIx64, run->val_hash);
    static const char *const names[NUMBERS] = {"updates", "bad_steps", "bad_in_a_row", "data_hash", "val_hash"};
    for (int i = 0; i < NUMBERS; i++) facts[count++] = (SafetensorsPair){names[i], numbers[i]};
    facts[count++] = (SafetensorsPair){"backend", run->backend->name};
    for (int i = 0; i < run->options.count; i++) {
        if (!is_kept(&run->options, i) || !run->options.texts[i]) continue;
        snprintf(keys[i], sizeof keys[i], "option.%s", run->options.names[i]);
        facts[count++] = (SafetensorsPair){keys[i], run->options.texts[i]};
    }
    if (run->values.carry_state) {
        streams_to_text(&run->streams, &next, &fresh);
        facts[count++] = (SafetensorsPair){"stream_next", next};
        facts[count++] = (SafetensorsPair){"stream_fresh", fresh};
    }
    if (run->values.spike_guard > 0) {
        guard_to_text(&run->guard, guard);
        facts[count++] = (SafetensorsPair){"spike_guard", guard};
    }
    facts[count] = (SafetensorsPair){NULL, NULL};
    run->backend->state_shape(run->model, &rows, &n);        /* no rows: stopped before the first step */
    CheckpointTokenizer tokenizer = {run->vocabulary.json, run->vocabulary.hash};
    error = checkpoint_write_with(run->values.checkpoint_dir, run->step, run->values.keep, run->backend, run->model,
                                  &run->config, facts, run->values.carry_state && rows > 0,
                                  tokenizer.json ? &tokenizer : NULL);
    free(next);
    free(fresh);
    return error;
}

static inline bool saves(const Run *run) {
    return strcmp(run->values.checkpoint_dir, "none") != 0;
}

/* Saves the run. A checkpoint that cannot be written in the middle of a run is no reason to lose the run: unless
 * --on-save-error says otherwise, it says so and tries again when the next one is due. At the end it is an error. */
static inline void save(Run *run, bool last) {
    if (!saves(run)) return;
    const char *error = write_checkpoint(run);
    bool stop = last || strcmp(run->values.on_save_error, "stop") == 0;
    char newest[96] = "no checkpoint was saved before";
    report_clear_bar(&run->report);
    if (!error) {
        run->saved_step = run->step;
        return;
    }
    if (run->saved_step >= 0)
        snprintf(newest, sizeof newest, "the newest checkpoint is that of step %" PRId64, run->saved_step);
    error = errorf("step %" PRId64 " could not be saved: %s; %s", run->step, error, newest);
    if (stop) die(error);
    fprintf(stderr, "warning: %s; training goes on\n", error);
}

/* Appends a row to the log. One that cannot be written is treated like a checkpoint that cannot; it is said once. */
static inline void write_log(Run *run, const ReportRow *row) {
    const char *error = report_csv_row(&run->report, row);
    if (!error || run->log_failed) return;
    run->log_failed = true;
    report_clear_bar(&run->report);
    fprintf(stderr, "warning: %s\n", error);
    if (strcmp(run->values.on_save_error, "continue") == 0) return;
    save(run, true);
    die("stopped because the log cannot be written, as --on-save-error says");
}

/* A run with --carry-state has a state for each row of the batch; one without has none to go on from. */
static inline void check_carried(Run *run, const Safetensors *trainer) {
    const char *carried = safetensors_metadata(trainer, "option.carry-state");
    const char *batch = safetensors_metadata(trainer, "option.batch");
    if (!carried && options_given(&run->options, "carry-state"))
        die("--resume: this run was trained without --carry-state; start a run with it from these weights by --init");
    if (carried && batch && options_given(&run->options, "batch") && atoi(batch) != run->values.batch)
        die(errorf("--resume: the checkpoint has the states of %s rows, which --batch %d cannot go on from", batch,
                   run->values.batch));
}

/* Takes over the options of the checkpoint in `directory`; those on the command line go first, with a warning where
 * the run will differ from the one that it continues. */
static inline void restore_options(Run *run, const char *directory) {
    char path[SAFETENSORS_MAX_PATH], key[OPTION_NAME_MAX + 8];
    Safetensors trainer;
    OptionSet *set = &run->options;
    die_if(checkpoint_join(path, directory, "trainer.safetensors"));
    die_if(checkpoint_open(&trainer, path, CHECKPOINT_TRAINER_FORMAT));
    check_carried(run, &trainer);
    for (int i = 0; i < set->count; i++) {
        snprintf(key, sizeof key, "option.%s", set->names[i]);
        const char *text = safetensors_metadata(&trainer, key);
        if (!is_kept(set, i) || !text) continue;
        if (strcmp(set->names[i], "steps") == 0 && options_given(set, "tokens")) continue;
        if (strcmp(set->names[i], "val") == 0 && options_given(set, "val-fraction")) continue;
        if (set->given[i]) {
            if (strcmp(set->rows[i].group, "Evaluation") != 0 && strcmp(set->texts[i], text) != 0)
                fprintf(stderr, "warning: --%s %s instead of the checkpoint's %s: the run goes on, but not bit for "
                        "bit\n", set->names[i], set->texts[i], text);
            continue;
        }
        set_text(run, i, text);
    }
    safetensors_close(&trainer);
}

/* Has the data changed? `what` is the option; changed data is refused unless that option asks for other data. */
static inline void check_hash(Run *run, const Safetensors *trainer, const char *what, const char *fact, uint64_t hash) {
    char found[32];
    const char *saved;
    die_if(checkpoint_fact(trainer, fact, &saved));
    snprintf(found, sizeof found, "%016" PRIx64, hash);
    if (strcmp(saved, found) == 0 || options_given(&run->options, what)) return;
    die(errorf("--resume: the data of --%s has changed since the checkpoint was written (hash %s, then %s); to go on "
               "with it all the same, give --%s", what, found, saved, what));
}

/* Lets each row of the batch go on where the checkpoint left it; its state was loaded before. */
static inline void restore_streams(Run *run, const Safetensors *trainer) {
    const char *next, *fresh, *data_hash;
    char hash[32], *end;
    int rows, n;
    die_if(checkpoint_fact(trainer, "stream_next", &next));
    die_if(checkpoint_fact(trainer, "stream_fresh", &fresh));
    die_if(checkpoint_fact(trainer, "data_hash", &data_hash));
    snprintf(hash, sizeof hash, "%016" PRIx64, run->data_hash);
    if (strcmp(hash, data_hash) != 0) {
        fprintf(stderr, "warning: --data is other data than before: every row starts it with an empty state\n");
        return;
    }
    if (strlen(fresh) != (size_t)run->values.batch || strspn(fresh, "01") != strlen(fresh))
        die(errorf("%s: expected \"stream_fresh\" to be 0 or 1 for each of %d rows, found \"%.40s\"", trainer->path,
                   run->values.batch, fresh));
    run->backend->state_shape(run->model, &rows, &n);
    for (int row = 0; row < run->values.batch; row++, next = end) {
        int64_t at = strtoll(next, &end, 10);
        const char *error = end == next ? "the list of the rows' places ends early"
                                        : streams_seek(&run->streams, row, at, fresh[row] == '1');
        if (!error && fresh[row] != '1' && (rows != run->values.batch || n != 0))
            error = "state.safetensors is missing, or its rows are not at the start of a chunk";
        if (error) die(errorf("%s: --carry-state cannot go on: %s", trainer->path, error));
    }
    if (*next != '\0')
        die(errorf("%s: --carry-state cannot go on: expected the places of %d rows, found more: \"%.40s\"",
                   trainer->path, run->values.batch, next));
}

/* Loads weights, moments and progress. */
static inline void restore_run(Run *run, const char *directory) {
    Safetensors trainer;
    int64_t bad_in_a_row;
    const char *backend;
    die_if(checkpoint_resume(directory, run->backend, run->model, &run->config, &trainer));
    die_if(checkpoint_fact_count(&trainer, "step", CHECKPOINT_MAX_COUNT, &run->step));
    die_if(checkpoint_fact_count(&trainer, "updates", run->step, &run->updates));
    die_if(checkpoint_fact_count(&trainer, "bad_steps", run->step, &run->bad_steps));
    die_if(checkpoint_fact_count(&trainer, "bad_in_a_row", run->bad_steps < INT32_MAX ? run->bad_steps : INT32_MAX,
                                 &bad_in_a_row));
    run->bad_in_a_row = (int)bad_in_a_row;
    run->saved_step = run->step;
    const char *guard = safetensors_metadata(&trainer, "spike_guard");
    const char *error = guard ? guard_from_text(guard, &run->guard) : NULL;
    if (error) die(errorf("%s: \"spike_guard\" in __metadata__: %s", trainer.path, error));
    check_hash(run, &trainer, "data", "data_hash", run->data_hash);
    if (run->values.val) check_hash(run, &trainer, "val", "val_hash", run->val_hash);
    if (run->values.carry_state) restore_streams(run, &trainer);
    die_if(checkpoint_fact(&trainer, "backend", &backend));
    if (strcmp(backend, run->backend->name) != 0)
        fprintf(stderr, "warning: the checkpoint was made by the backend %s, this is %s: the run goes on, but not bit "
                "for bit\n", backend, run->backend->name);
    safetensors_close(&trainer);
    if (run->step >= run->values.steps)
        die(errorf("--resume: step %" PRId64 " of %" PRId64 " is already done; give --steps to train further",
                   run->step, run->values.steps));
}

/* ------------------------------------------------------------------------------------------------------------
 * Setting up, in the order in which set_up_run calls it.
 */

/* Options that contradict each other, or that would silently do nothing. */
static inline void check_options(Run *run) {
    OptionSet *set = &run->options;
    Values *v = &run->values;
    static const char *const pairs[][2] = {{"steps", "tokens"}, {"val", "val-fraction"}, {"resume", "init"},
                                           {"preset", "resume"}, {"preset", "init"}, {"tokenizer", "resume"}};
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0]; i++)
        if (options_given(set, pairs[i][0]) && options_given(set, pairs[i][1]))
            die(errorf("--%s and --%s exclude each other; give one of them", pairs[i][0], pairs[i][1]));
    for (int i = 0; i < set->count && v->resume; i++)
        if (set->given[i] && strcmp(set->rows[i].group, "Model") == 0)
            die(errorf("--resume takes the model from the checkpoint; --%s cannot be given with it", set->names[i]));
    if (options_given(set, "cema-init") && (v->init || v->resume))
        die(errorf("--cema-init chooses the initial values of a new model; with --%s they come from a checkpoint",
                   v->init ? "init" : "resume"));
    bool released = strcmp(v->cema_init, "released") == 0;
    if (options_given(set, "cema-memory") && released)
        die("--cema-memory does nothing without --cema-init spread or hold");
    if (released) run->options.texts[options_index(set, "cema-memory")] = NULL;
    static const char *const idle[][2] = {{"sample-tokens", "sample-every"}, {"prompt", "sample-every"}};
    for (size_t i = 0; i < 2; i++)
        if (options_given(set, idle[i][0]) && v->sample_every == 0)
            die(errorf("--%s does nothing without --%s", idle[i][0], idle[i][1]));
    if (v->carry_state && v->within_documents)
        die("--within-documents does nothing with --carry-state, which never predicts across the end of a document");
    if (options_given(set, "min-lr-ratio") && strcmp(v->schedule, "constant") == 0)
        die("--min-lr-ratio does nothing with --schedule constant");
    if (!v->data) die("--data is missing: name a text file, for example --data data/tinystories_sample.txt");
    if ((double)v->batch * v->seq_len * v->accumulate > LARGE)
        die(errorf("--batch %d, --seq-len %d and --accumulate %d make a step of more tokens than can be counted",
                   v->batch, v->seq_len, v->accumulate));
    bool examples = dataset_is_jsonl(v->data);
    if (examples && (v->carry_state || v->within_documents))
        die(errorf("--%s does nothing for a .jsonl file: each of its examples is a row of its own",
                   v->carry_state ? "carry-state" : "within-documents"));
    if (examples && options_given(set, "tokens"))
        die("--tokens does not go with a .jsonl file, whose rows are padded; give --steps");
    if (!v->carry_state && !v->within_documents && !examples) {
        if (options_given(set, "document-separator"))
            die("--document-separator does nothing without --carry-state, --within-documents or a .jsonl file");
        set->texts[options_index(set, "document-separator")] = NULL;
    }
    if (v->tokens) set_number(run, "steps", (v->tokens - 1) / tokens_per_step(run) + 1);
    if (v->steps > INT64_MAX / tokens_per_step(run))
        die(errorf("--steps %" PRId64 " of %" PRId64 " tokens each are more tokens than can be counted", v->steps,
                   tokens_per_step(run)));
    if (!run->options.texts[options_index(set, "warmup")])
        set_number(run, "warmup", v->steps / 10 < 1000 ? v->steps / 10 : 1000);
    if (v->warmup > v->steps)
        die(errorf("--warmup %" PRId64 " is longer than the whole run of %" PRId64 " steps", v->warmup, v->steps));
}

/* The tokenizer: the checkpoint's, or the one that is named. A model that has read bytes cannot go on with another
 * meaning of its tokens, so only a model of no known tokenizer gets one. */
static inline void load_tokenizer(Run *run, const char *resumed) {
    const Values *v = &run->values;
    const char *from = resumed ? resumed : v->init;
    if (from) die_if(vocabulary_find(&run->vocabulary, from, v->tokenizer));
    else if (v->tokenizer) die_if(vocabulary_load(&run->vocabulary, v->tokenizer));
}

/* The configuration: from the checkpoint, or from the preset; then the options that change it. A new model has as many
 * tokens as its tokenizer, unless it is told otherwise. */
static inline void choose_model(Run *run, const char *resumed) {
    OptionSet *set = &run->options;
    const char *from = resumed ? resumed : run->values.init;
    MegalodonConfig given = run->config;                 /* where options_parse stored the options of the model */
    if (from) {
        die_if(checkpoint_read_config(from, &run->config));
    } else {
        const char *preset = run->values.preset ? run->values.preset : megalodon_presets[0].name;
        die_if(megalodon_preset(preset, &run->config));
        die_if(options_set(set, options_index(set, "preset"), preset));
        if (run->vocabulary.json) run->config.vocab_size = run->vocabulary.size;
    }
    int i = run->model_rows;
#define X(type, field, fallback, meaning) \
    if (set->given[i++]) run->config.field = given.field;
    MEGALODON_CONFIG_FIELDS(X)
#undef X
    const char *error = megalodon_validate(&run->config);
    if (error) die(errorf("model: %s", error));
    die_if(vocabulary_fit(&run->vocabulary, run->config.vocab_size));
    /* The printed configuration shows every field, wherever it came from. */
    i = run->model_rows;
#define X(type, field, fallback, meaning) show_##type(run, i++, run->config.field);
    MEGALODON_CONFIG_FIELDS(X)
#undef X
}

/* What ends a document of the data: bytes in text, one token where a tokenizer made it. */
static inline void choose_mark(Run *run, bool text) {
    const char *separator = run->values.document_separator;
    bool given = options_given(&run->options, "document-separator");
    int64_t number;
    run->mark = (DocumentMark){.line_feed = -1};
    if (!run->options.texts[options_index(&run->options, "document-separator")]) return;
    if (strcmp(separator, "none") == 0) return;
    if (text) {
        die_if(document_mark_text(&run->mark, separator));
        return;
    }
    int32_t token = TOKENIZER_NO_ID;
    if (option_number_is_whole(separator, &number)) {
        if (number < 0 || number >= run->config.vocab_size)
            die(errorf("--document-separator %s: expected the number of one of the model's tokens, 0 to %d", separator,
                       run->config.vocab_size - 1));
        token = (int32_t)number;
    } else if (run->vocabulary.json) {
        token = tokenizer_id(&run->vocabulary.tok, separator);
    }
    if (token != TOKENIZER_NO_ID) document_mark_token(&run->mark, token);
    else if (run->vocabulary.json)
        die(errorf("--document-separator %s: the tokenizer has no such token; name the one that ends documents, or "
                   "none", separator));
    else if (given)
        die("--document-separator is a text and means nothing where --data holds token numbers: give the number of the "
            "token that ends documents, or --tokenizer");
    else run->options.texts[options_index(&run->options, "document-separator")] = NULL;
}

/* Opens one of --data and --val, and hashes it. */
static inline void open_part(Run *run, const char *option, const char *path, Dataset *data, Examples *examples,
                             uint64_t *hash, Range *range) {
    const Vocabulary *vocabulary = &run->vocabulary;
    if (dataset_is_jsonl(path)) {
        if (vocabulary->bytes && vocabulary->size > 256)
            die(errorf("--%s %s: examples are text, but the model has %d tokens; name the --tokenizer that makes them",
                       option, path, vocabulary->size));
        choose_mark(run, vocabulary->bytes);
        die_if(examples_open(examples, path, vocabulary, &run->mark));
        *hash = examples->hash;
        *range = (Range){NULL, examples, 0, examples->count};
        return;
    }
    die_if(dataset_open(data, path, vocabulary_known(vocabulary)));
    if (data->text && vocabulary->json)
        die(errorf("--%s %s: is text, but the model reads the tokens of a tokenizer; first turn it into them: "
                   "./tokenize --tokenizer tokenizer.json --data %s --out tokens.npy", option, path, path));
    die_if(dataset_check(data));
    die_if(dataset_hash(data, hash));
    *range = (Range){data, NULL, 0, data->size};
}

/* Every example must fit into a row: cutting one off would train on half an answer. A run that is not told how long its
 * rows are gets the shortest that fit. */
static inline void fit_examples(Run *run, bool resumed) {
    Values *v = &run->values;
    const Examples *longest = &run->examples;
    if (run->val_examples.longest > longest->longest) longest = &run->val_examples;
    if (!options_given(&run->options, "seq-len") && !resumed) set_number(run, "seq-len", longest->longest - 1);
    if (longest->longest - 1 > v->seq_len)
        die(errorf("%s, line %" PRId64 ": this example has %d tokens, which need a --seq-len of %d, but it is %d; give "
                   "a larger one, or leave out the longest examples", longest->path, longest->longest_line,
                   longest->longest, longest->longest - 1, v->seq_len));
}

/* Opens the data, and divides it where the end of it is held out. */
static inline void open_data(Run *run, bool resumed) {
    Values *v = &run->values;
    open_part(run, "data", v->data, &run->data, &run->examples, &run->data_hash, &run->training);
    if (v->val) {
        open_part(run, "val", v->val, &run->val, &run->val_examples, &run->val_hash, &run->held_out);
        if (run->val.text != run->data.text || !run->held_out.examples != !run->training.examples)
            die("--data and --val must be of one kind: both text, both .npy, or both .jsonl");
        run->options.texts[options_index(&run->options, "val-fraction")] = NULL;     /* it says nothing now */
    } else if (v->val_fraction > 0) {
        int64_t held_out = (int64_t)((double)run->training.count * v->val_fraction);
        run->training.count -= held_out;
        run->held_out = run->training;
        run->held_out.first = run->training.count;
        run->held_out.count = held_out;
    }
    if (run->training.examples) fit_examples(run, resumed);
    else choose_mark(run, run->data.text);
    run->bytes_known = run->vocabulary.json || run->data.text || run->training.examples;
    bool evaluates = v->val || v->val_fraction > 0;
    int64_t least = (int64_t)v->seq_len + 1;
    if (run->training.examples) {
        if (evaluates && run->held_out.count < 1)
            die(errorf("--data %s: %" PRId64 " examples are too few to hold out a share of %g; name held-out examples "
                       "by --val, or give --val-fraction 0", v->data, run->training.count, v->val_fraction));
        return;
    }
    if (run->training.count < least)
        die(errorf("--data %s: %" PRId64 " tokens to train on are fewer than one sequence of --seq-len %d and its "
                   "target; use more text or a smaller --seq-len", v->data, run->training.count, v->seq_len));
    if (evaluates && run->held_out.count < least)
        die(errorf("%s: %" PRId64 " held-out tokens are fewer than one sequence of --seq-len %d and its target; use "
                   "more held-out text, a smaller --seq-len, or --val-fraction 0", v->val ? v->val : v->data,
                   run->held_out.count, v->seq_len));
}

/* --carry-state: gives each row its part of the data to train on. */
static inline void open_streams(Run *run) {
    const Values *v = &run->values;
    int T = v->seq_len, C = run->config.chunk_size;
    if (!v->carry_state) return;
    if (T % C != 0)
        die(errorf("--carry-state: --seq-len %d is not a multiple of the model's --chunk-size %d; every segment has "
                   "to end where a chunk does, so that a row can start a new document; use %d or %d", T, C,
                   T < C ? C : T / C * C, (T / C + (T < C ? 2 : 1)) * C));
    die_if(streams_open(&run->streams, &run->data, run->training.first, run->training.count, v->batch, T,
                        &run->mark));
}

/* Refuses to mix two runs in one folder: only the run that is resumed may go on in its own. */
static inline void check_folder(Run *run, const char *resumed) {
    OptionSet *set = &run->options;
    char parent[SAFETENSORS_MAX_PATH];
    struct stat own, other;
    int i = options_index(set, "checkpoint-dir");
    if (resumed) {
        safetensors_parent(resumed, parent);
        if (!set->given[i]) set_text(run, i, parent);
    }
    const char *folder = run->values.checkpoint_dir;
    if (!saves(run) || !checkpoint_exists(folder, "latest")) return;
    if (resumed && stat(folder, &own) == 0 && stat(parent, &other) == 0 && own.st_ino == other.st_ino
        && own.st_dev == other.st_dev) return;
    die(errorf("--checkpoint-dir %s already holds the checkpoints of a run; go on with it by --resume %s, or choose "
               "another folder", folder, folder));
}

/* Makes this run the only one that writes to its folder. `latest` may have moved on while this one was starting. */
static inline void lock_folder(Run *run, const char *resumed) {
    char newest[SAFETENSORS_MAX_PATH];
    const char *folder = run->values.checkpoint_dir;
    if (!saves(run)) return;
    const char *error = lock_take(&run->lock, folder);
    if (error) die(errorf("--checkpoint-dir %s", error));
    if (run->lock.impossible)
        fprintf(stderr, "warning: the file system of %s knows no locks: see to it that no other run uses this folder\n",
                folder);
    if (!resumed) return;
    die_if(checkpoint_directory(run->values.resume, newest));
    if (strcmp(newest, resumed) != 0)
        die(errorf("--resume %s: another run has written %s meanwhile; start again to go on from there",
                   run->values.resume, newest));
}

static inline void create_model(Run *run, const char *resumed) {
    const Values *v = &run->values;
    size_t rows = (size_t)v->batch * (size_t)v->accumulate, tokens = rows * (size_t)v->seq_len;
    MegalodonOptions options = {.max_batch = v->batch, .max_length = v->seq_len, .training = true,
                                .carry = v->sample_every > 0 || v->carry_state, .precision = run->precision,
                                .max_bytes = backend_bytes(run->backend)};
    if (v->sample_every > 0 && run->vocabulary.bytes && run->config.vocab_size > 256)
        die(errorf("--sample-every: a sample is text, but this model has %d tokens and not the 256 bytes; name the "
                   "--tokenizer that tells what they mean", run->config.vocab_size));
    if (v->sample_every > 0) {
        const char *error = vocabulary_encode(&run->vocabulary, v->prompt, strlen(v->prompt), &run->prompt,
                                              &run->prompt_count);
        if (error) die(errorf("--prompt: %s", error));
    }
    die_if(run->backend->create(&run->model, &run->config, &options));
    int64_t available = memory_available();
    if (available > 0 && 2 * sizeof *run->tokens * tokens > (size_t)available)
        die(errorf("--accumulate %d: the %zu tokens and targets of a step need %zu bytes, and %" PRId64 " are free",
                   v->accumulate, tokens, 2 * sizeof *run->tokens * tokens, available));
    run->tokens = malloc(tokens * sizeof *run->tokens);
    run->targets = malloc(tokens * sizeof *run->targets);
    run->window = malloc(((size_t)v->seq_len + 1 + DOCUMENT_MARK_MAX) * sizeof *run->window);
    run->fresh = calloc(rows, sizeof *run->fresh);
    if (!run->tokens || !run->targets || !run->window || !run->fresh)
        die(errorf("no memory for the %zu tokens of a step", tokens));
    if (resumed) restore_run(run, resumed);
    else if (v->init) die_if(checkpoint_load(v->init, run->backend, run->model, &run->config));
    else {
        die_if(megalodon_initialise(run->backend, run->model, &run->config, (uint64_t)v->seed));
        die_if(cema_start(run->backend, run->model, &run->config, v->cema_init, v->cema_memory));
    }
}

static inline void print_start(Run *run) {
    const Values *v = &run->values;
    char a[32], b[32], c[32];
    MegalodonMemory m;
    if (v->quiet) return;
    printf("megalodon train, backend %s, %s, %d thread%s\n", run->backend->name, v->precision, run->threads,
           run->threads == 1 ? "" : "s");
    options_print_values(stdout, &run->options);
    printf("parameters   %s\n", report_count(megalodon_num_parameters(&run->config), a));
    run->backend->memory(run->model, &m);
    const struct { const char *kind; int64_t bytes; } kinds[] = {
        {"parameters", m.parameters}, {"gradients", m.gradients}, {"moments", m.moments},
        {"activations", m.activations}, {"state", m.state}, {"workspace", m.workspace},
        {"total", megalodon_total_memory(&m)}};
    for (int i = 0; i < 7; i++)
        printf("%-12s %-12s %12s\n", i ? "" : "memory", kinds[i].kind, report_bytes(kinds[i].bytes, a));
    bool examples = run->training.examples != NULL;
    double draws = (double)v->steps * (examples ? (double)v->batch * v->accumulate : (double)tokens_per_step(run));
    if (run->vocabulary.json)
        printf("tokenizer    %s tokens; a copy is kept with each checkpoint\n",
               report_count(tokenizer_vocab_size(&run->vocabulary.tok), a));
    printf("data         %s %s to train on, %s held out%s\n", report_count(run->training.count, a),
           examples ? "examples" : "tokens", report_count(run->held_out.count, b),
           run->vocabulary.bytes && run->bytes_known ? "; each byte is a token" : "");
    printf("run          %s tokens a step, %s in all: %.2f times the data\n", report_count(tokens_per_step(run), a),
           report_count(v->steps * tokens_per_step(run), c), draws / (double)run->training.count);
    if (v->carry_state)
        printf("streams      %d rows of %s tokens; a row keeps its state until a document ends\n", v->batch,
               report_count(run->training.count / v->batch, a));
    if (run->step > 0) printf("resumed      after step %" PRId64 "\n", run->step);
    fflush(stdout);
}

/* The help page, with the sizes that --preset knows. */
static inline void print_train_help(const Run *run) {
    options_print_help(stdout, &run->options);
    options_print_heading(stdout, &run->options, "Presets (the first is the default)");
    for (const MegalodonPreset *preset = megalodon_presets; preset->name; preset++)
        options_print_row(stdout, &run->options, preset->name, "", preset->meaning);
}

/* Everything before the first step. Returns false if only the help page was asked for. */
static inline bool set_up_run(Run *run, int argc, char **argv) {
    char directory[SAFETENSORS_MAX_PATH];
    const char *resumed = NULL;                          /* folder of the step to go on from  */
    bool help;
    run->saved_step = -1;
    run->lock.descriptor = -1;
    options_init(&run->options, "train", "--data PATH [options]",
                 "Trains a Megalodon language model on text and saves it for ./generate. Ctrl-C saves and stops; "
                 "--resume goes on bit for bit.");
    options_add(&run->options, train_table, OPTION_COUNT(train_table), &run->values);
    options_add(&run->options, preset_table, OPTION_COUNT(preset_table), &run->values);
    run->model_rows = run->options.count;
    options_add(&run->options, model_table, OPTION_COUNT(model_table), &run->config);
    die_if(options_parse(&run->options, argc, argv, &help));
    if (help) {
        print_train_help(run);
        return false;
    }
    *checkpoint_verifies() = !run->values.no_verify;
    if (run->values.resume) {
        die_if(checkpoint_directory(run->values.resume, directory));
        resumed = directory;
        check_folder(run, resumed);
        lock_folder(run, resumed);                       /* before anything is read that another run may delete */
        restore_options(run, resumed);
    }
    check_options(run);
    die_if(backend_choose(run->values.backend, run->values.precision, &run->backend, &run->precision));
    die_if(backend_threads(run->values.threads, &run->threads));
    load_tokenizer(run, resumed);
    choose_model(run, resumed);
    if (!resumed) check_folder(run, NULL);
    open_data(run, resumed != NULL);
    open_streams(run);
    if (!resumed) lock_folder(run, NULL);
    create_model(run, resumed);
    run->report.quiet = run->values.quiet;
    run->report.terminal = isatty(STDOUT_FILENO);
    if (run->values.log) die_if(report_csv_open(&run->report, run->values.log, run->step));
    print_start(run);
    return true;
}

static inline void end_run(Run *run) {
    if (run->report.csv) fclose(run->report.csv);
    lock_release(&run->lock);
    run->backend->destroy(run->model);
    dataset_close(&run->data);
    dataset_close(&run->val);
    examples_close(&run->examples);
    examples_close(&run->val_examples);
    vocabulary_close(&run->vocabulary);
    free(run->prompt);
    free(run->tokens);
    free(run->targets);
    free(run->window);
    free(run->fresh);
    streams_close(&run->streams);
    state_free(&run->held);
}

#endif
