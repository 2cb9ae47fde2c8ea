/* numdiff.c - where do two numerics part? A table of every tensor of a model, in the order in which it is
 * computed.
 *
 *     ./numdiff --a cpu-double --b cuda-bf16                     both in this process
 *     ./numdiff --dump reference.safetensors                     on one machine ...
 *     ./numdiff --compare reference.safetensors --b cuda-fp32    ... and the comparison on another
 *
 * One forward and one backward run in each numeric, on the same parameters, tokens and dropout masks. Then
 * come, in graph order: the activations, the loss, the state after the forward, the gradients (last layer
 * first, as the backward computes them) and, if asked for, the parameters after one AdamW update. The first
 * tensor past the threshold is where to look: what comes after it inherits its error. The exit status is 0
 * if no tensor is past it.
 *
 * A numeric's results are recorded before the next one runs, so only one model is in memory at a time,
 * beside two recordings. A recording can also be written to a file, the dump, which holds all that is
 * needed to repeat the run.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include "lib/checkpoint.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "megalodon.h"
#include "lib/backends.h"
#include "lib/dataset.h"
#include "lib/error.h"
#include "lib/model_options.h"
#include "lib/options.h"

/* ----------------------------------------------------------------------------------------------------
 * Numerics: a backend and a precision. A port adds one line; NULL stands for a backend that was not built in.
 */

#ifdef MEGALODON_WITH_CUDA
#define CUDA_BACKEND &megalodon_cuda
#else
#define CUDA_BACKEND NULL
#endif

/*    name          backend                precision             rounds to */
#define NUMERICS(X) \
    X("cpu-double", &megalodon_cpu_double, MEGALODON_FP32,       TO_DOUBLE) \
    X("cpu",        &megalodon_cpu,        MEGALODON_FP32,       TO_FP32) \
    X("cuda-fp32",  CUDA_BACKEND,          MEGALODON_FP32,       TO_FP32) \
    X("cuda-bf16",  CUDA_BACKEND,          MEGALODON_BF16_MIXED, TO_BF16)

/* What a numeric rounds its activations to decides how far from another one it may be. The thresholds leave
 * about a factor of ten over what correct backends show on models of some layers. */
typedef enum { TO_DOUBLE, TO_FP32, TO_BF16, NUM_ROUNDINGS } Rounding;
static const struct { const char *name; double threshold; } roundings[NUM_ROUNDINGS] = {
    {"double", 1e-10}, {"fp32", 1e-4}, {"bf16", 5e-2}
};

typedef struct Numeric {
    const char *name;
    const MegalodonBackend *backend;
    MegalodonPrecision precision;
    Rounding rounding;
} Numeric;

static const Numeric numerics[] = {
#define X(name, backend, precision, rounding) {name, backend, precision, rounding},
    NUMERICS(X)
#undef X
};

/* "cpu-double|cpu|...", for the options */
#define NUMERIC_WORD(name, ...) "|" name
#define NUMERIC_WORDS &NUMERICS(NUMERIC_WORD)[1]

/* Finds the numeric that an option names (one of NUMERIC_WORDS). Error: it was not built in, or cannot run
 * here. */
static const char *find_numeric(const char *option, const char *name, const Numeric **out) {
    const Numeric *found = numerics;
    while (strcmp(found->name, name) != 0) found++;
    if (!found->backend)
        return errorf(
            "--%s %s: this program was built without CUDA; build it again where nvcc and a CUDA toolkit are "
            "installed, or compare with a dump from another machine",
            option, name);
    const char *why = found->backend->unavailable ? found->backend->unavailable() : NULL;
    if (why) return errorf("--%s %s cannot run here: %s", option, name, why);
    *out = found;
    return NULL;
}

/* ----------------------------------------------------------------------------------------------------
 * Options.
 *
 *    type    name           default       low  high  unit  group  help
 */
#define LARGE 9007199254740992.                          /* 2^53: every whole number up to it is a double */
#define NUMDIFF_OPTIONS(X) \
    X(CHOICE, a,             "cpu-double", 0, 0, NUMERIC_WORDS, "Numerics", \
      "the reference: errors are relative to it; with --dump, the one that is dumped") \
    X(CHOICE, b,             "cpu",        0, 0, NUMERIC_WORDS, "Numerics", "the one that is measured") \
    X(REAL,   threshold,     NULL,         0, 1e6, "X", "Numerics", \
      "largest relative RMS that passes; if not given, 1e-10 where both compute in double, 5e-2 where one computes " \
      "in bf16, and 1e-4 otherwise") \
    X(FLAG,   apply_dropout, NULL,         0, 0, "", "Numerics", \
      "run with the model's dropout, the same masks on both sides") \
    X(FLAG,   update,        NULL,         0, 0, "", "Numerics", \
      "also apply one AdamW update and compare the parameters after it") \
    X(TEXT,   data,          NULL,         0, 0, "PATH", "Text", \
      "a text file, a .npy file of token numbers, or a folder of either; without it, pseudo-random tokens") \
    X(INT,    batch,         "2",          1, 1 << 20, "ROWS", "Text", "rows of the batch") \
    X(INT,    seq_len,       NULL,         1, 1 << 30, "TOKENS", "Text", \
      "tokens of a row; if not given, one more than the model's chunk") \
    X(TEXT,   only,          NULL,         0, 0, "PREFIX", "Table", \
      "show and judge only tensors whose name starts so, such as act.layers.0. or grad.") \
    X(TEXT,   csv,           NULL,         0, 0, "FILE", "Table", "write the table to a CSV file, too") \
    X(TEXT,   dump,          NULL,         0, 0, "FILE", "Dumps", \
      "run --a alone and write all that it computed to a safetensors file; compare nothing") \
    X(FLAG,   dump_params,   NULL,         0, 0, "", "Dumps", \
      "put the parameters into the dump, so that the other machine needs neither checkpoint nor seed") \
    X(TEXT,   compare,       NULL,         0, 0, "FILE", "Dumps", \
      "take this dump as the reference and repeat its run with --b") \
    X(TEXT,   with,          NULL,         0, 0, "FILE", "Dumps", \
      "compare the dump of --compare with this one and compute nothing") \
    X(INT,    threads,       "0",          0, 4096, "N", "Run", "CPU threads; 0: all cores") \
    X(TEXT,   checkpoint,    NULL,         0, 0, "PATH", "Model", \
      "a checkpoint that ./train wrote: a file, the folder of a step, or a run's folder, for its newest step") \
    X(FLAG,   no_verify,     NULL,         0, 0, "", "Model", \
      "load checkpoints and dumps without comparing their checksums") \
    X(LONG,   seed,          "1234",       0, LARGE, "N", "Model", \
      "fixes the parameters where there is no checkpoint, the pseudo-random tokens, and the dropout masks") \
    X(TEXT,   preset,        NULL,         0, 0, "NAME", "Model", \
      "a size by name (see ./train --help); the options below change parts of it")

typedef struct Values { NUMDIFF_OPTIONS(OPTION_MEMBER) } Values;
static const Option numdiff_table[] = { NUMDIFF_OPTIONS(OPTION_ROW) };

typedef struct Options {
    OptionSet set;
    Values values;
    MegalodonConfig config;          /* the fields that were given, where they were given */
    int model_rows;                  /* the set's first row of the model's fields         */
} Options;

/* An option that has no effect beside another one is refused: it would be taken for done. */
static void refuse(const Options *o, const char *name, const char *because) {
    if (options_given(&o->set, name)) die(errorf("--%s does nothing %s", name, because));
}

static void check_options(const Options *o) {
    const Values *v = &o->values;
    static const char *const of_table[] = {"only", "csv", "threshold", "b", "compare"};
    static const char *const of_run[] = {"seed",    "preset",        "data",  "batch",
                                         "seq-len", "apply-dropout", "update"};
    if (v->with && !v->compare) die("--with FILE needs --compare FILE, the dump to compare it with");
    for (size_t i = 0; v->dump && i < sizeof of_table / sizeof *of_table; i++)
        refuse(o, of_table[i], "with --dump, which compares nothing");
    if (!v->dump) refuse(o, "dump-params", "without --dump");
    if (v->checkpoint) refuse(o, "preset", "with --checkpoint, which says the model's size");
    if (!v->compare) return;
    refuse(o, "a", "with --compare: the dump is the reference");
    for (size_t i = 0; i < sizeof of_run / sizeof *of_run; i++)
        refuse(o, of_run[i], "with --compare: the dump says which run to repeat");
    for (int i = o->model_rows; i < o->set.count; i++)
        refuse(o, o->set.names[i], "with --compare: the dump says which model it is of");
    if (!v->with) return;
    refuse(o, "b", "with --with, which computes nothing");
    refuse(o, "checkpoint", "with --with, which computes nothing");
    refuse(o, "threads", "with --with, which computes nothing");
}

/* Reads the command line. Returns false if only the help page was asked for. */
static bool read_options(Options *o, int argc, char **argv) {
    bool help;
    options_init(
        &o->set, "numdiff", "[options]",
        "Compares two numerics of a Megalodon tensor by tensor, in the order of computation, and names the "
        "first tensor past a threshold; the exit status is 0 if there is none.");
    options_add(&o->set, numdiff_table, OPTION_COUNT(numdiff_table), &o->values);
    o->model_rows = o->set.count;
    options_add(&o->set, model_table, OPTION_COUNT(model_table), &o->config);
    die_if(options_parse(&o->set, argc, argv, &help));
    if (help) options_print_help(stdout, &o->set);
    else check_options(o);
    return !help;
}

/* ----------------------------------------------------------------------------------------------------
 * Inputs: all that the result of a run depends on. Two numerics get the same.
 */

typedef struct Inputs {
    MegalodonConfig config;
    int B, T;
    int32_t *tokens, *targets;       /* B,T                                                     */
    uint64_t seed;                   /* of initial values, built-in tokens and dropout masks    */
    bool dropout, update;
    const char *origin;              /* of the parameters: "seed", "checkpoint" or "dump"       */
    MegalodonTensor *list;           /* the parameters ...                                      */
    float **parameters;              /* ... and their values                                    */
    int num_parameters;
    uint64_t hash;                   /* of those values: two runs without it are not comparable */
} Inputs;

/* Memory, or the end of the program: before the system promises what it does not have. */
static void *allocate(size_t count, size_t size) {
    double bytes = (double)count * (double)size;
    int64_t available = bytes > 1e8 ? memory_available() : 0;
    if (available > 0 && bytes > (double)available)
        die(errorf("%.0f bytes are needed for %zu numbers, and %" PRId64 " are free; use a smaller model, --batch or "
                   "--seq-len", bytes, count, available));
    void *memory = calloc(count ? count : 1, size);
    if (!memory)
        die(errorf("no memory for %zu elements of %zu bytes; use a smaller model, --batch or --seq-len",
                   count, size));
    return memory;
}

static void allocate_parameters(Inputs *in) {
    in->num_parameters = megalodon_tensors(&in->config, MEGALODON_PARAM, 1, 1, 0, NULL, 0);
    in->list = allocate((size_t)in->num_parameters, sizeof *in->list);
    in->parameters = allocate((size_t)in->num_parameters, sizeof *in->parameters);
    megalodon_tensors(&in->config, MEGALODON_PARAM, 1, 1, 0, in->list, in->num_parameters);
    for (int i = 0; i < in->num_parameters; i++)
        in->parameters[i] = allocate((size_t)in->list[i].size, sizeof(float));
}

/* FNV-1a over the bits of all parameters, a word at a time. */
static void hash_parameters(Inputs *in) {
    uint64_t h = 0xcbf29ce484222325u;
    for (int i = 0; i < in->num_parameters; i++)
        for (int64_t j = 0; j < in->list[i].size; j++) {
            uint32_t bits;
            memcpy(&bits, &in->parameters[i][j], sizeof bits);
            h = (h ^ bits) * 0x100000001b3u;
        }
    in->hash = h;
}

/* Parameters from an open file, where their names stand behind `prefix`. */
static const char *read_parameters(Inputs *in, const Safetensors *file, const char *prefix) {
    CheckpointList list = {.items = NULL};
    const char *error = checkpoint_list(&list, &in->config, MEGALODON_PARAM, 1, 0, prefix);
    if (!error) error = checkpoint_list_check(&list, file, prefix);
    for (size_t i = 0; i < list.count && !error; i++)
        safetensors_to_float(safetensors_find(file, list.items[i].name), in->parameters[i]);
    free(list.items);
    return error;
}

static void load_checkpoint_parameters(Inputs *in, const char *checkpoint) {
    char path[SAFETENSORS_MAX_PATH];
    MegalodonConfig own;
    Safetensors file;
    die_if(checkpoint_model_path(checkpoint, path));
    die_if(checkpoint_open_model(&file, path, &own));
    die_if(read_parameters(in, &file, ""));
    safetensors_close(&file);
}

/* The parameters from where `origin` says. `dump` is the file that has them, if it is "dump". */
static void load_parameters(Inputs *in, const char *checkpoint, const Safetensors *dump) {
    allocate_parameters(in);
    if (strcmp(in->origin, "checkpoint") == 0) {
        load_checkpoint_parameters(in, checkpoint);
    } else if (strcmp(in->origin, "dump") == 0) {
        die_if(read_parameters(in, dump, "param."));
    } else {
        for (int i = 0; i < in->num_parameters; i++)
            megalodon_initial_values(&in->config, &in->list[i], in->seed, in->parameters[i]);
    }
    hash_parameters(in);
}

/* Tokens of the batch and, as targets, the tokens one place further. Row b of a file starts at its token b
 * T. */
static void load_tokens(Inputs *in, const char *data) {
    size_t size = (size_t)in->B * (size_t)in->T;
    int32_t *window = allocate((size_t)in->T + 1, sizeof *window);
    uint64_t key = megalodon_random(in->seed, 0x746f6b656e73);           /* "tokens": apart from other uses */
    Dataset dataset;
    in->tokens = allocate(size, sizeof *in->tokens);
    in->targets = allocate(size, sizeof *in->targets);
    if (data) die_if(dataset_open(&dataset, data, in->config.vocab_size));
    for (int b = 0; b < in->B; b++) {
        int64_t first = (int64_t)b * in->T;
        if (data) die_if(dataset_window(&dataset, first, (int64_t)in->T + 1, window));
        for (int t = 0; t <= in->T && !data; t++)
            window[t] =
                (int32_t)(megalodon_random(key, (uint64_t)(first + b + t)) % (uint64_t)in->config.vocab_size);
        memcpy(in->tokens + first, window, (size_t)in->T * sizeof *window);
        memcpy(in->targets + first, window + 1, (size_t)in->T * sizeof *window);
    }
    if (data) dataset_close(&dataset);
    free(window);
}

/* The inputs as the command line describes them. */
static void inputs_from_options(Inputs *in, const Options *o) {
    const Values *v = &o->values;
    if (v->checkpoint) die_if(checkpoint_read_config(v->checkpoint, &in->config));
    else die_if(megalodon_preset(v->preset ? v->preset : megalodon_presets[0].name, &in->config));
    int row = o->model_rows;
#define X(type, field, fallback, meaning) \
    if (o->set.given[row++]) in->config.field = o->config.field;
    MEGALODON_CONFIG_FIELDS(X)
#undef X
    const char *error = megalodon_validate(&in->config);
    if (error) die(errorf("model: %s", error));
    bool has_dropout =
        in->config.dropout > 0 || in->config.hidden_dropout > 0 || in->config.attention_dropout > 0;
    static const char *const rates[] = {"dropout", "hidden-dropout", "attention-dropout"};
    if (v->apply_dropout && !has_dropout)
        die("--apply-dropout: the model has no dropout; give --dropout, --hidden-dropout or "
            "--attention-dropout");
    for (int i = 0; i < 3 && !v->apply_dropout; i++) refuse(o, rates[i], "without --apply-dropout");
    in->B = v->batch;
    in->T = v->seq_len ? v->seq_len : in->config.chunk_size + 1;
    in->seed = (uint64_t)v->seed;
    in->dropout = v->apply_dropout;
    in->update = v->update;
    in->origin = v->checkpoint ? "checkpoint" : "seed";
    load_tokens(in, v->data);
    load_parameters(in, v->checkpoint, NULL);
}

static void inputs_free(Inputs *in) {
    for (int i = 0; i < in->num_parameters; i++) free(in->parameters[i]);
    free(in->parameters);
    free(in->list);
    free(in->tokens);
    free(in->targets);
}

/* ----------------------------------------------------------------------------------------------------
 * The plan: every tensor that is compared, in graph order. It follows from the inputs, so a dump need not
 * store it.
 */

typedef enum { ACTIVATIONS, LOSS, STATE, GRADIENTS, NORM, UPDATED, NUM_PARTS } Part;

typedef struct Item {
    Part part;
    MegalodonTensor tensor;                  /* its name in the model, its shape */
    char name[MEGALODON_MAX_NAME + 16];      /* in the table and in dumps        */
} Item;

typedef struct Plan {
    Item *items;
    int count;
} Plan;

static const struct { const char *prefix; MegalodonKind kind; } parts[NUM_PARTS] = {
    [ACTIVATIONS] = {"act.", MEGALODON_ACT},
    [STATE] = {"state_out.", MEGALODON_STATE},
    [GRADIENTS] = {"grad.", MEGALODON_GRAD},
    [UPDATED] = {"updated.", MEGALODON_PARAM},
};

static void plan_number(Plan *plan, Part part, const char *name) {
    Item *item = &plan->items[plan->count++];
    *item = (Item){.part = part, .tensor = {.ndim = 1, .dims = {1}, .size = 1, .layer = -1}};
    snprintf(item->name, sizeof item->name, "%s", name);
}

/* All tensors of a part. Gradients come in reverse: the backward runs from the loss to the embedding. */
static void plan_part(Plan *plan, const Inputs *in, Part part) {
    int n = in->T % in->config.chunk_size;
    int count = megalodon_tensors(&in->config, parts[part].kind, in->B, in->T, n, NULL, 0);
    MegalodonTensor *list = allocate((size_t)count, sizeof *list);
    megalodon_tensors(&in->config, parts[part].kind, in->B, in->T, n, list, count);
    for (int i = 0; i < count; i++) {
        Item *item = &plan->items[plan->count++];
        *item = (Item){.part = part, .tensor = list[part == GRADIENTS ? count - 1 - i : i]};
        snprintf(item->name, sizeof item->name, "%s%s", parts[part].prefix, item->tensor.name);
    }
    free(list);
}

static Plan make_plan(const Inputs *in) {
    size_t most = 2;
    for (int part = 0; part < NUM_PARTS; part++)
        if (parts[part].prefix)
            most += (size_t)megalodon_tensors(&in->config, parts[part].kind, in->B, in->T, 0, NULL, 0);
    Plan plan = {.items = allocate(most, sizeof *plan.items)};
    plan_part(&plan, in, ACTIVATIONS);
    plan_number(&plan, LOSS, "loss");
    plan_part(&plan, in, STATE);
    plan_part(&plan, in, GRADIENTS);
    if (!in->update) return plan;
    plan_number(&plan, NORM, "grad_norm");
    plan_part(&plan, in, UPDATED);
    return plan;
}

/* ----------------------------------------------------------------------------------------------------
 * Recordings: what one numeric made of the inputs.
 */

typedef struct Recording {
    char label[128];                 /* "cpu" or "cpu in FILE"                                          */
    Rounding rounding;
    SafetensorsTensor *values;       /* one an item of the plan; data NULL: this side does not keep it  */
    int not_kept;
    bool owned;                      /* the data was allocated here; else it lies in `file`             */
    Safetensors file;
} Recording;

/* An empty place for an item, with its shape. */
static SafetensorsTensor describe(const Item *item, SafetensorsDType dtype) {
    SafetensorsTensor value = {.name = item->name, .dtype = dtype, .ndim = item->tensor.ndim,
                               .size = item->tensor.size};
    memcpy(value.dims, item->tensor.dims, sizeof item->tensor.dims);
    value.bytes = (size_t)value.size * safetensors_dtype_bytes(dtype);
    return value;
}

/* Statistics of the state are double in every backend; counts are integers. */
static SafetensorsDType item_dtype(const Item *item, Rounding rounding) {
    MegalodonDType dtype =
        item->part == STATE ? checkpoint_dtype(MEGALODON_STATE, item->tensor.name) : MEGALODON_F32;
    if (dtype == MEGALODON_I64) return SAFETENSORS_I64;
    return dtype == MEGALODON_F64 || rounding == TO_DOUBLE ? SAFETENSORS_F64 : SAFETENSORS_F32;
}

/* Fetches the tensors of one part. A backend may not keep every activation; anything else it must have. */
static void record_part(Recording *r, const Plan *plan, Part part, const MegalodonBackend *backend,
                        MegalodonModel *model) {
    for (int i = 0; i < plan->count; i++) {
        const Item *item = &plan->items[i];
        if (item->part != part) continue;
        SafetensorsTensor *value = &r->values[i];
        *value = describe(item, item_dtype(item, r->rounding));
        void *data = allocate(value->bytes, 1);
        if (value->dtype != SAFETENSORS_I64) memset(data, 0xff, value->bytes);   /* NaN: what is not written shows */
        MegalodonDType dtype = value->dtype == SAFETENSORS_I64 ? MEGALODON_I64
                             : value->dtype == SAFETENSORS_F64 ? MEGALODON_F64 : MEGALODON_F32;
        const char *error = backend->get(model, parts[part].kind, item->tensor.name, data, dtype);
        value->data = data;
        if (!error) continue;
        if (part != ACTIVATIONS) die(errorf("%s: %s: %s", r->label, item->name, error));
        free(data);
        value->data = NULL;
        r->not_kept++;
    }
}

/* Records the only number of a part. */
static void record_number(Recording *r, const Plan *plan, Part part, double number) {
    for (int i = 0; i < plan->count; i++) {
        if (plan->items[i].part != part) continue;
        double *data = allocate(1, sizeof *data);
        *data = number;
        r->values[i] = describe(&plan->items[i], SAFETENSORS_F64);
        r->values[i].data = data;
    }
}

/* Runs one numeric on the inputs. */
static void record(Recording *r, const Plan *plan, const Inputs *in, const Numeric *numeric) {
    const MegalodonBackend *backend = numeric->backend;
    MegalodonModel *model = NULL;
    MegalodonOptions options = {.max_batch = in->B,
                                .max_length = in->T,
                                .training = true,
                                .keep_activations = true,
                                .carry = true,
                                .precision = numeric->precision,
                                .max_bytes = backend_bytes(backend)};
    MegalodonBatch batch = {.tokens = in->tokens, .targets = in->targets, .B = in->B, .T = in->T,
                            .dropout = in->dropout, .seed = in->seed};
    MegalodonLoss loss = {0, 0};
    *r = (Recording){.rounding = numeric->rounding, .owned = true};
    r->values = allocate((size_t)plan->count, sizeof *r->values);
    snprintf(r->label, sizeof r->label, "%s", numeric->name);
    die_if(backend->create(&model, &in->config, &options));
    for (int i = 0; i < in->num_parameters; i++)
        die_if(backend->set(model, MEGALODON_PARAM, in->list[i].name, in->parameters[i], MEGALODON_F32));

    die_if(backend->forward(model, &batch, &loss));
    record_part(r, plan, ACTIVATIONS, backend, model);
    record_number(r, plan, LOSS, loss.nll_sum / (double)loss.counted);
    record_part(r, plan, STATE, backend, model);
    backend->zero_gradients(model);
    die_if(backend->backward(model, 1 / (double)loss.counted));
    record_part(r, plan, GRADIENTS, backend, model);
    if (in->update) {
        /* A first update with a tiny eps is lr times the sign of the gradient, and says nothing but where
         * signs of tiny gradients differ. This eps is above most gradients, so that the update is a smooth
         * function of them. */
        MegalodonAdamW adamw = {
            .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-3, .weight_decay = 0.1, .clip = 1, .step = 1};
        double norm = NAN;
        die_if(backend->update(model, &adamw, &norm));
        record_number(r, plan, NORM, norm);
        record_part(r, plan, UPDATED, backend, model);
    }
    backend->destroy(model);
}

static void recording_free(Recording *r, const Plan *plan) {
    for (int i = 0; i < plan->count && r->owned; i++) free((void *)r->values[i].data);
    if (!r->owned) safetensors_close(&r->file);
    free(r->values);
}

/* ----------------------------------------------------------------------------------------------------
 * Dumps: a recording and its inputs in one safetensors file. __metadata__ has the configuration, the
 * numeric and where the parameters come from; tensors are input.tokens, input.targets, the recording's, and
 * param.* if they were asked for.
 */

#define DUMP_FORMAT "megalodon-dump-1"

/* A shape of two dimensions for the file's tensors. */
static SafetensorsTensor describe_tokens(const char *name, const Inputs *in, const int32_t *data) {
    return (SafetensorsTensor){.name = name, .dtype = SAFETENSORS_I32, .ndim = 2, .dims = {in->B, in->T},
                               .size = (int64_t)in->B * in->T, .data = data};
}

/* Where a run's parameters come from, for people. */
static const char *origin_text(const char *origin) {
    return strcmp(origin, "seed") == 0 ? "the initial values of its seed"
         : strcmp(origin, "dump") == 0 ? "in the dump" : "those of a checkpoint";
}

static void write_dump(const char *path, const Recording *r, const Plan *plan, const Inputs *in,
                       bool with_parameters) {
    size_t count = 0, most = (size_t)plan->count + (size_t)in->num_parameters + 2;
    SafetensorsTensor *tensors = allocate(most, sizeof *tensors);
    char (*names)[MEGALODON_MAX_NAME + 16] = allocate((size_t)in->num_parameters, sizeof *names);
    tensors[count++] = describe_tokens("input.tokens", in, in->tokens);
    tensors[count++] = describe_tokens("input.targets", in, in->targets);
    for (int i = 0; i < in->num_parameters && with_parameters; i++) {
        SafetensorsTensor *value = &tensors[count++];
        snprintf(names[i], sizeof names[i], "param.%s", in->list[i].name);
        *value = (SafetensorsTensor){.name = names[i], .dtype = SAFETENSORS_F32, .ndim = in->list[i].ndim,
                                     .size = in->list[i].size, .data = in->parameters[i]};
        memcpy(value->dims, in->list[i].dims, sizeof in->list[i].dims);
    }
    for (int i = 0; i < plan->count; i++)
        if (r->values[i].data) tensors[count++] = r->values[i];
    JsonWriter config = {0};
    char seed[32], hash[32];
    checkpoint_put_config(&config, &in->config);
    if (config.error) die(errorf("%s: config: %s", path, config.error));
    snprintf(seed, sizeof seed, "%" PRIu64, in->seed);
    snprintf(hash, sizeof hash, "%016" PRIx64, in->hash);
    SafetensorsPair metadata[] = {
        {"format", DUMP_FORMAT}, {"config", config.text}, {"numeric", r->label},
        {"rounding", roundings[r->rounding].name}, {"seed", seed}, {"dropout", in->dropout ? "true" : "false"},
        {"update", in->update ? "true" : "false"}, {"parameters", with_parameters ? "dump" : in->origin},
        {"parameters_hash", hash}, {NULL, NULL}};
    die_if(safetensors_write(path, tensors, count, metadata, NULL, NULL));
    printf("%s: %zu tensors of %s, rows x tokens %d x %d; parameters: %s\n", path, count, r->label, in->B,
           in->T, origin_text(with_parameters ? "dump" : in->origin));
    if (r->not_kept) printf("%d activations that %s does not keep are not in it\n", r->not_kept, r->label);
    free(config.text);
    free(names);
    free(tensors);
}

/* Integers of one of the inputs, each in [low, vocab_size). */
static int32_t *read_tokens(const Safetensors *file, const char *name, int low, Inputs *in) {
    const SafetensorsTensor *tensor = safetensors_find(file, name);
    if (!tensor || tensor->ndim != 2 || tensor->size < 1 || tensor->size > INT32_MAX)
        die(errorf("%s: expected the tensor %s with the shape [rows,tokens], found %s", file->path, name,
                   tensor ? "another shape" : "no such tensor"));
    if (in->B && (tensor->dims[0] != in->B || tensor->dims[1] != in->T))
        die(errorf("%s: tensor %s: expected the shape [%d,%d] of the tokens, found another one", file->path,
                   name, in->B, in->T));
    in->B = (int)tensor->dims[0];
    in->T = (int)tensor->dims[1];
    int64_t *wide = allocate((size_t)tensor->size, sizeof *wide);
    int32_t *out = allocate((size_t)tensor->size, sizeof *out);
    const char *error = safetensors_to_int64(tensor, wide);
    if (error) die(errorf("%s: %s", file->path, error));
    for (int64_t i = 0; i < tensor->size; i++) {
        if (wide[i] < low || wide[i] >= in->config.vocab_size)
            die(errorf("%s: tensor %s: element %" PRId64 ": expected a number from %d to %d, found %" PRId64,
                       file->path, name, i, low, in->config.vocab_size - 1, wide[i]));
        out[i] = (int32_t)wide[i];
    }
    free(wide);
    return out;
}

/* A fact that is one of two or more words; returns its number. */
static int read_word(const Safetensors *file, const char *key, const char *const *words, int count) {
    const char *text;
    die_if(checkpoint_fact(file, key, &text));
    for (int i = 0; i < count; i++)
        if (strcmp(text, words[i]) == 0) return i;
    die(errorf(
        "%s: \"%s\" in __metadata__ is \"%.40s\", which this program does not know; is the dump from a newer "
        "one?",
        file->path, key, text));
}

/* Opens a dump: its inputs but for the parameters' values, and which numeric it is of. */
static void open_dump(Recording *r, Inputs *in, const char *path) {
    static const char *const booleans[] = {"false", "true"}, *const origins[] = {"seed", "checkpoint",
                                                                                 "dump"};
    const char *words[NUM_ROUNDINGS], *config, *numeric, *hash;
    for (int i = 0; i < NUM_ROUNDINGS; i++) words[i] = roundings[i].name;
    die_if(checkpoint_open(&r->file, path, DUMP_FORMAT));
    if (*checkpoint_verifies()) die_if(safetensors_verify(&r->file));
    die_if(checkpoint_fact(&r->file, "config", &config));
    const char *error = checkpoint_config_parse(config, &in->config);
    if (error) die(errorf("%s: %s", path, error));
    die_if(checkpoint_fact(&r->file, "numeric", &numeric));
    snprintf(r->label, sizeof r->label, "%.40s in %.70s", numeric, path);
    r->rounding = (Rounding)read_word(&r->file, "rounding", words, NUM_ROUNDINGS);
    in->tokens = read_tokens(&r->file, "input.tokens", 0, in);
    in->targets = read_tokens(&r->file, "input.targets", MEGALODON_IGNORE, in);
    die_if(checkpoint_fact_uint64(&r->file, "seed", &in->seed));
    in->dropout = read_word(&r->file, "dropout", booleans, 2) == 1;
    in->update = read_word(&r->file, "update", booleans, 2) == 1;
    in->origin = origins[read_word(&r->file, "parameters", origins, 3)];
    die_if(checkpoint_fact(&r->file, "parameters_hash", &hash));
    in->hash = strtoull(hash, NULL, 16);
}

/* Finds the plan's tensors in an open dump. Only an activation may be missing, and no tensor may have
 * another shape. */
static void read_recording(Recording *r, const Plan *plan) {
    r->values = allocate((size_t)plan->count, sizeof *r->values);
    for (int i = 0; i < plan->count; i++) {
        const Item *item = &plan->items[i];
        const SafetensorsTensor *found = safetensors_find(&r->file, item->name);
        char expected[SAFETENSORS_SHAPE_TEXT], shape[SAFETENSORS_SHAPE_TEXT];
        r->values[i] = describe(item, SAFETENSORS_F32);
        safetensors_shape_text(item->tensor.ndim, item->tensor.dims, expected);
        if (!found && item->part != ACTIVATIONS)
            die(errorf("%s: expected the tensor %s %s, found no such tensor", r->file.path, item->name,
                       expected));
        if (!found) {
            r->not_kept++;
            continue;
        }
        if (strcmp(expected, safetensors_shape_text(found->ndim, found->dims, shape)) != 0)
            die(errorf("%s: tensor %s: expected the shape %s, found %s", r->file.path, item->name, expected,
                       shape));
        r->values[i] = *found;
        r->values[i].name = item->name;
    }
}

/* The parameters that a dump's run had. */
static void load_dump_parameters(Inputs *in, const Recording *dump, const char *checkpoint) {
    uint64_t expected = in->hash;
    bool wants = strcmp(in->origin, "checkpoint") == 0;
    const char *path = dump->file.path;
    if (wants && !checkpoint)
        die(errorf("%s: its parameters are those of a checkpoint and not in the file; give that "
                   "--checkpoint, or dump "
                   "again with --dump-params",
                   path));
    if (!wants && checkpoint)
        die(errorf("--checkpoint does nothing here: %s says which parameters its run had", path));
    load_parameters(in, checkpoint, &dump->file);
    if (in->hash == expected) return;
    die(errorf("%s: the parameters here are not those of the dump (hash %016" PRIx64 ", expected %016" PRIx64
               "); %s",
               path, in->hash, expected,
               wants ? "it was made from another checkpoint"
                     : "another machine's log and cos may give other last bits of initial values: dump with "
                       "--dump-params"));
}

/* Two dumps can be compared if they are of one run: the same model, parameters, tokens and dropout. */
static void check_same_run(const Recording *a, const Inputs *x, const Recording *b, const Inputs *y) {
    const char *what = NULL;
#define X(type, field, fallback, meaning) if (!what && x->config.field != y->config.field) what = #field;
    MEGALODON_CONFIG_FIELDS(X)
#undef X
    size_t bytes = (size_t)x->B * (size_t)x->T * sizeof *x->tokens;
    if (!what && (x->B != y->B || x->T != y->T)) what = "numbers of rows or tokens";
    if (!what && (memcmp(x->tokens, y->tokens, bytes) != 0 || memcmp(x->targets, y->targets, bytes) != 0))
        what = "tokens";
    if (!what && x->hash != y->hash) what = "parameters";
    if (!what && (x->dropout != y->dropout || (x->dropout && x->seed != y->seed))) what = "dropout masks";
    if (what)
        die(errorf("%s and %s are of different runs: they do not have the same %s", a->file.path,
                   b->file.path, what));
}

/* ----------------------------------------------------------------------------------------------------
 * Comparing.
 */

/* A tensor that is nearly zero as a whole, because of cancellation (the gradient of attention's scores
 * where there is only one key), is all rounding error. So an error is relative to the tensor's RMS, but at
 * least to this share of the RMS over all tensors of its part. A tensor that is wrong altogether still
 * shows: at 1e-4, down to a ten-millionth. */
#define FLOOR_SHARE 1e-3

typedef struct Difference {
    bool compared;                   /* both sides have it                   */
    double squares_a, squares;       /* sums over the elements of a^2, (b-a)^2 */
    double relative;                 /* RMS(b - a) / RMS(a)                  */
    double largest, at_a, at_b;      /* the largest |b - a| and both values there; infinite at a NaN */
    int64_t at;                      /* flat index of it                     */
} Difference;

static Difference compare_tensors(const SafetensorsTensor *a, const SafetensorsTensor *b) {
    Difference d = {.compared = true};
    for (int64_t i = 0; i < a->size; i++) {
        double x = safetensors_element(a, i), y = safetensors_element(b, i), error = fabs(y - x);
        if (!isfinite(error)) error = INFINITY;
        if (error > d.largest || i == 0) {
            d.largest = error;
            d.at = i, d.at_a = x, d.at_b = y;
        }
        d.squares_a += x * x;
        d.squares += error * error;
    }
    return d;
}

/* All differences, relative to the tensors' magnitudes. malloc'ed: one an item of the plan. */
static Difference *compare_recordings(const Plan *plan, const Recording *a, const Recording *b) {
    Difference *differences = allocate((size_t)plan->count, sizeof *differences);
    double squares[NUM_PARTS] = {0}, sizes[NUM_PARTS] = {0};
    for (int i = 0; i < plan->count; i++) {
        const SafetensorsTensor *x = &a->values[i], *y = &b->values[i];
        Part part = plan->items[i].part;
        if (!x->data || !y->data) continue;
        differences[i] = compare_tensors(x, y);
        /* Counts are no part of the state's magnitude, and a bad tensor must not hide the magnitude of the
         * others. */
        if (x->dtype == SAFETENSORS_I64 || !isfinite(differences[i].squares_a)) continue;
        squares[part] += differences[i].squares_a;
        sizes[part] += (double)x->size;
    }
    for (int i = 0; i < plan->count; i++) {
        Difference *d = &differences[i];
        Part part = plan->items[i].part;
        double size = (double)a->values[i].size,
               scale = sizes[part] > 0 ? sqrt(squares[part] / sizes[part]) : 0;
        if (size == 0) continue;                             /* keys and values of an empty chunk */
        double rms_a = sqrt(d->squares_a / size), error = sqrt(d->squares / size);
        double unit = rms_a > FLOOR_SHARE * scale ? rms_a : FLOOR_SHARE * scale;
        d->relative = error == 0 ? 0 : isfinite(unit) && unit > 0 ? error / unit : INFINITY;
    }
    return differences;
}

/* A flat index as (b,t,...). Returns `text`. */
static const char *index_text(const SafetensorsTensor *tensor, int64_t flat,
                              char text[SAFETENSORS_SHAPE_TEXT]) {
    int64_t index[SAFETENSORS_MAX_DIMS] = {0};
    for (int k = tensor->ndim - 1; k >= 0 && tensor->size > 0; k--) {
        index[k] = flat % tensor->dims[k];
        flat /= tensor->dims[k];
    }
    safetensors_shape_text(tensor->ndim, index, text);
    text[0] = '(';
    text[strlen(text) - 1] = ')';
    return text;
}

/* A small number in eight columns; zero and infinity stand out. */
static const char *short_number(double x, char text[16]) {
    if (x == 0) return "0";
    if (!isfinite(x)) return "inf";
    snprintf(text, 16, "%.1e", x);
    return text;
}

typedef struct Verdict {
    int compared, past, first, worst, one_sided;     /* first and worst are places in the plan, -1: none */
} Verdict;

/* Is this item shown and judged? */
static bool is_chosen(const Item *item, const char *only) {
    return !only || strncmp(item->name, only, strlen(only)) == 0;
}

static Verdict judge(const Plan *plan, const Difference *differences, double threshold, const char *only) {
    Verdict verdict = {.first = -1, .worst = -1};
    for (int i = 0; i < plan->count; i++) {
        if (!is_chosen(&plan->items[i], only)) continue;
        if (!differences[i].compared) {
            verdict.one_sided++;
            continue;
        }
        verdict.compared++;
        if (verdict.worst < 0 || differences[i].relative > differences[verdict.worst].relative)
            verdict.worst = i;
        if (differences[i].relative <= threshold) continue;
        if (verdict.past++ == 0) verdict.first = i;
    }
    return verdict;
}

/* The table, with an arrow at the first tensor past the threshold and a star at those after it. */
static void print_table(const Plan *plan, const Recording *a, const Difference *differences,
                        const Verdict *verdict, double threshold, const char *only) {
    int name_width = 6, shape_width = 5;
    char shape[SAFETENSORS_SHAPE_TEXT], at[SAFETENSORS_SHAPE_TEXT], relative[16], largest[16];
    for (int i = 0; i < plan->count; i++) {
        if (!is_chosen(&plan->items[i], only)) continue;
        int name_length = (int)strlen(plan->items[i].name);
        int shape_length = (int)strlen(safetensors_shape_text(a->values[i].ndim, a->values[i].dims, shape));
        if (name_length > name_width) name_width = name_length;
        if (shape_length > shape_width) shape_width = shape_length;
    }
    printf("   %-*s  %-*s  %8s  %8s  %s\n", name_width, "tensor", shape_width, "shape", "rel RMS", "largest",
           "at");
    Part part = GRADIENTS;
    for (int i = 0; i < plan->count; i++) {
        const Difference *d = &differences[i];
        const SafetensorsTensor *value = &a->values[i];
        if (!is_chosen(&plan->items[i], only)) continue;
        if (part < GRADIENTS && plan->items[i].part == GRADIENTS) printf("\n");      /* forward above, backward below */
        part = plan->items[i].part;
        safetensors_shape_text(value->ndim, value->dims, shape);
        if (!d->compared) {
            printf("   %-*s  %-*s  %8s\n", name_width, plan->items[i].name, shape_width, shape, "not kept");
            continue;
        }
        const char *marker = i == verdict->first ? "->" : d->relative > threshold ? " *" : "";
        printf("%-2s %-*s  %-*s  %8s  %8s  %s\n", marker, name_width, plan->items[i].name, shape_width, shape,
               short_number(d->relative, relative), short_number(d->largest, largest),
               d->largest > 0 ? index_text(value, d->at, at) : "-");
    }
}

/* The table for other programs; numbers with all their digits. */
static void write_csv(const char *path, const Plan *plan, const Recording *a, const Difference *differences,
                      double threshold, const char *only) {
    FILE *file = fopen(path, "w");
    char shape[SAFETENSORS_SHAPE_TEXT], at[SAFETENSORS_SHAPE_TEXT];
    if (!file) die(errorf("--csv %s: cannot be written: %s", path, strerror(errno)));
    fprintf(file, "tensor,shape,rel_rms,largest,at,a,b,past\n");
    for (int i = 0; i < plan->count; i++) {
        const Difference *d = &differences[i];
        const SafetensorsTensor *value = &a->values[i];
        if (!is_chosen(&plan->items[i], only) || !d->compared) continue;
        fprintf(file, "%s,\"%s\",%.9g,%.9g,\"%s\",%.17g,%.17g,%d\n", plan->items[i].name,
                safetensors_shape_text(value->ndim, value->dims, shape), d->relative, d->largest,
                index_text(value, d->at, at), d->at_a, d->at_b, d->relative > threshold);
    }
    bool ok = !ferror(file);
    if (fclose(file) != 0 || !ok) die(errorf("--csv %s: cannot be written: %s", path, strerror(errno)));
}

static void print_inputs(const Inputs *in, const Recording *a, const Recording *b, double threshold) {
    printf("a          %s\nb          %s\n", a->label, b->label);
    printf("model      %d layers of width %d, chunks of %d; %" PRId64 " parameters: %s\n",
           in->config.num_layers, in->config.model_dim, in->config.chunk_size,
           megalodon_num_parameters(&in->config), origin_text(in->origin));
    printf("batch      rows x tokens %d x %d, %s dropout, seed %" PRIu64 "\n", in->B, in->T,
           in->dropout ? "with" : "without", in->seed);
    printf("rel RMS    RMS(b - a) / RMS(a); threshold %g\n\n", threshold);
}

/* Where a tensor starts to differ says more than where it differs most: from the second chunk on, in all
 * rows but the first, in the last columns. So the verdict also has the first element, in the order of
 * memory, whose error is past the threshold times the tensor's RMS. */
static int64_t first_bad_element(const SafetensorsTensor *a, const SafetensorsTensor *b, const Difference *d,
                                 double threshold) {
    double allowed = threshold * sqrt(d->squares_a / (double)a->size);
    for (int64_t i = 0; i < a->size; i++)
        if (!(fabs(safetensors_element(b, i) - safetensors_element(a, i)) <= allowed)) return i;
    return d->at;
}

static void print_verdict(const Plan *plan, const Recording *a, const Recording *b,
                          const Difference *differences, const Verdict *verdict, double threshold) {
    char relative[16], largest[16], at[SAFETENSORS_SHAPE_TEXT];
    printf("\n%d tensor%s compared, %d past %g", verdict->compared, verdict->compared == 1 ? "" : "s",
           verdict->past, threshold);
    if (verdict->one_sided) printf(", %d not kept by both sides", verdict->one_sided);
    if (differences[verdict->worst].relative > 0)
        printf("; worst: %s, %s\n", plan->items[verdict->worst].name,
               short_number(differences[verdict->worst].relative, relative));
    else printf("; all are equal\n");
    if (verdict->first < 0) return;
    const SafetensorsTensor *x = &a->values[verdict->first], *y = &b->values[verdict->first];
    const Difference *d = &differences[verdict->first];
    printf("first past the threshold: %s, relative RMS %s\n", plan->items[verdict->first].name,
           short_number(d->relative, relative));
    printf("  largest error %s at %s: a %.9g, b %.9g\n", short_number(d->largest, largest),
           index_text(x, d->at, at), d->at_a, d->at_b);
    int64_t first = first_bad_element(x, y, d, threshold);
    printf("  it begins at %s: a %.9g, b %.9g\n", index_text(x, first, at), safetensors_element(x, first),
           safetensors_element(y, first));
}

/* Compares, prints and returns the exit status. */
static int report(const Plan *plan, const Inputs *in, const Recording *a, const Recording *b,
                  const Options *o) {
    const Values *v = &o->values;
    Rounding coarser = a->rounding > b->rounding ? a->rounding : b->rounding;
    Difference *differences = compare_recordings(plan, a, b);
    double threshold = options_given(&o->set, "threshold") ? v->threshold : roundings[coarser].threshold;
    Verdict verdict = judge(plan, differences, threshold, v->only);
    if (verdict.compared == 0 && v->only)
        die(errorf("--only %s: no tensor that both sides have starts so; names look like act.layers.0.cema, "
                   "state_out.layers.0.k and grad.embed.weight", v->only));
    print_inputs(in, a, b, threshold);
    print_table(plan, a, differences, &verdict, threshold, v->only);
    if (v->csv) write_csv(v->csv, plan, a, differences, threshold, v->only);

    print_verdict(plan, a, b, differences, &verdict, threshold);
    free(differences);
    return verdict.first >= 0;
}

int main(int argc, char **argv) {
    static Options o;
    static Inputs in, other;
    static Recording a, b;
    const Numeric *numeric_a = NULL, *numeric_b = NULL;
    const Values *v = &o.values;
    int threads, status = 0;
    if (!read_options(&o, argc, argv)) return 0;
    *checkpoint_verifies() = !v->no_verify;
    safetensors_catch_signals();
    /* What cannot run is said before anything is computed. */
    if (!v->compare) die_if(find_numeric("a", v->a, &numeric_a));
    if (!v->dump && !v->with) die_if(find_numeric("b", v->b, &numeric_b));
    die_if(backend_threads(v->threads, &threads));

    if (v->compare) open_dump(&a, &in, v->compare);
    else inputs_from_options(&in, &o);
    if (v->with) {
        open_dump(&b, &other, v->with);
        check_same_run(&a, &in, &b, &other);
        in.update = in.update && other.update;
    }
    Plan plan = make_plan(&in);
    if (v->compare) read_recording(&a, &plan);
    else record(&a, &plan, &in, numeric_a);
    if (v->dump) {
        write_dump(v->dump, &a, &plan, &in, v->dump_params);
    } else {
        if (v->compare && !v->with) load_dump_parameters(&in, &a, v->checkpoint);
        if (v->with) read_recording(&b, &plan);
        else record(&b, &plan, &in, numeric_b);
        status = report(&plan, &in, &a, &b, &o);
        recording_free(&b, &plan);
    }
    recording_free(&a, &plan);
    inputs_free(&in);
    inputs_free(&other);
    free(plan.items);
    if (fflush(stdout) != 0 || ferror(stdout)) die(errorf("the results cannot be written: %s", strerror(errno)));
    return status;
}
