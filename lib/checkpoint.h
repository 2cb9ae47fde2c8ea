/* checkpoint.h - models and training runs on disk.
 *
 * A model is one safetensors file with the parameters' released names in float32, and in __metadata__ "format":
 * "megalodon-checkpoint-1" and "config", the configuration as JSON. That file is all that generation needs.
 *
 * A training run writes a directory:
 *
 *     runs/demo/step-00001000/model.safetensors      the model
 *     runs/demo/step-00001000/trainer.safetensors    AdamW's moments; as strings: step, data position, seed, ...
 *     runs/demo/step-00001000/state.safetensors      the model's state, where training carries one
 *     runs/demo/step-00001000/tokenizer.json         the tokenizer, where the model's tokens are not bytes
 *     runs/demo/latest                               the text "step-00001000"
 *
 * The files that belong together appear together: they are written in step-00001000.tmp, made durable, and the
 * directory is renamed; then `latest` is replaced by a file that says the new name; then old steps go. A kill at any
 * moment leaves `latest` naming a whole directory, and at worst some *.tmp, which the next write removes.
 *
 * A state is one safetensors file too: what the model remembers of the tokens so far. It can be written and read
 * alone, so that a long text is read once and then continued many times; doc/state.md describes the file.
 *
 * Everything goes through a backend's get and set, so each backend reads what another one wrote. Errors name the file,
 * the tensor, what was expected and what was found; a file is checked as a whole, its checksums too, before the model
 * is touched.
 */
#ifndef LIB_CHECKPOINT_H
#define LIB_CHECKPOINT_H

#include "safetensors.h"             /* first: it asks for POSIX */

#include <dirent.h>

#include "../megalodon.h"

#define CHECKPOINT_MODEL_FORMAT   "megalodon-checkpoint-1"
#define CHECKPOINT_TRAINER_FORMAT "megalodon-trainer-1"
#define CHECKPOINT_STATE_FORMAT   "megalodon-state-1"

/* The model that programs take if they are told no other. Installed programs are told where theirs lies. */
#ifndef CHECKPOINT_DEFAULT
#define CHECKPOINT_DEFAULT "models/tinystories/model.safetensors"
#endif

enum { CHECKPOINT_MAX_NAME = 64,     /* bytes of "step-00001000" and of its kin */
       CHECKPOINT_HASH = 17 };       /* bytes of a hash as text: 16 digits       */
#define CHECKPOINT_MAX_COUNT ((int64_t)1 << 53)      /* tokens that a row of a state can have seen */

/* Are checksums compared when a file is loaded? A program that is told --no-verify sets this to false, once, before it
 * loads the first one. */
static inline bool *checkpoint_verifies(void) {
    static bool verifies = true;
    return &verifies;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 1. The configuration as JSON.
 */

static inline void checkpoint_put_int(JsonWriter *w, int value) { json_put_int(w, value); }
static inline void checkpoint_put_bool(JsonWriter *w, bool value) { json_put_bool(w, value); }
static inline void checkpoint_put_double(JsonWriter *w, double value) { json_put_double(w, value); }

/* Writes the configuration as a JSON object, every field in the header's order. */
static inline void checkpoint_put_config(JsonWriter *w, const MegalodonConfig *config) {
    json_open(w, '{');
#define X(type, field, default_value, meaning) json_put_key(w, #field), checkpoint_put_##type(w, config->field);
    MEGALODON_CONFIG_FIELDS(X)
#undef X
    json_close(w, '}');
}

static inline const char *checkpoint_get_int(const JsonNode *node, int *value) {
    if (!node->is_integer || node->integer < INT32_MIN || node->integer > INT32_MAX) return "an integer of 32 bits";
    *value = (int)node->integer;
    return NULL;
}
static inline const char *checkpoint_get_bool(const JsonNode *node, bool *value) {
    *value = node->boolean;
    return node->type == JSON_BOOL ? NULL : "true or false";
}
static inline const char *checkpoint_get_double(const JsonNode *node, double *value) {
    *value = node->number;
    return node->type == JSON_NUMBER ? NULL : "a number";
}

/* What to say about one field: `member` is its value in the file or NULL, `expected` what it should have been or NULL.
 * A dropout may be left out, as it does not change what the parameters mean; anything else must be said. */
static inline const char *checkpoint_field_error(const char *name, const JsonNode *member, const char *expected) {
    if (!member) return strstr(name, "dropout") ? NULL : errorf("config: \"%s\" is missing", name);
    if (!expected) return NULL;
    return errorf("config: expected %s to be %s, found %s", name, expected,
                  member->type == JSON_NUMBER ? "another number" : json_type_name(member));
}

/* Reads a configuration from JSON and validates it. Error: an unknown key, a missing one, a wrong type, or a relation
 * between the sizes that does not hold. */
static inline const char *checkpoint_config_parse(const char *text, MegalodonConfig *config) {
    Json json;
    const char *error = json_parse(&json, text, strlen(text));
    if (error) return errorf("config: %s", error);
    megalodon_default_config(config);
    if (json.root->type != JSON_OBJECT)
        error = errorf("config: expected an object, found %s", json_type_name(json.root));
    const JsonNode *member = error ? NULL : json_first(json.root);
    for (; member && !error; member = json_next(json.root, member)) {
        bool known = false;
#define X(type, field, default_value, meaning) known = known || strcmp(member->key, #field) == 0;
        MEGALODON_CONFIG_FIELDS(X)
#undef X
        if (!known) error = errorf("config: unknown key \"%.80s\"; is the file from a newer program?", member->key);
    }
#define X(type, field, default_value, meaning)                                                        \
    if (!error) {                                                                                     \
        const JsonNode *value = json_get(json.root, #field);                                          \
        const char *expected = value ? checkpoint_get_##type(value, &config->field) : NULL;           \
        error = checkpoint_field_error(#field, value, expected);                                      \
    }
    MEGALODON_CONFIG_FIELDS(X)
#undef X
    if (!error && (error = megalodon_validate(config))) error = errorf("config: %s", error);
    json_free(&json);
    return error;
}

static inline int checkpoint_print_int(char *out, size_t size, int value) {
    return snprintf(out, size, "%d", value);
}
static inline int checkpoint_print_bool(char *out, size_t size, bool value) {
    return snprintf(out, size, "%s", value ? "true" : "false");
}
static inline int checkpoint_print_double(char *out, size_t size, double value) {
    return snprintf(out, size, "%.12g", value);
}

/* Says in which fields two configurations differ, "num_layers 2 and 4, chunk_size 16 and 32"; out is empty where they
 * agree. Dropouts are left out: they change how a model is trained, not what it computes afterwards. */
static inline void checkpoint_config_difference(const MegalodonConfig *a, const MegalodonConfig *b, char *out,
                                                size_t size) {
    size_t at = 0;
    char first[32], second[32];
    out[0] = '\0';
#define X(type, field, default_value, meaning)                                                        \
    if (a->field != b->field && !strstr(#field, "dropout") && at < size) {                            \
        checkpoint_print_##type(first, sizeof first, a->field);                                       \
        checkpoint_print_##type(second, sizeof second, b->field);                                     \
        at += (size_t)snprintf(out + at, size - at, "%s%s %s and %s", at ? ", " : "", #field, first, second); \
    }
    MEGALODON_CONFIG_FIELDS(X)
#undef X
}

/* ------------------------------------------------------------------------------------------------------------------
 * 2. Lists of tensors between a model and a file.
 */

typedef struct CheckpointItem {
    MegalodonKind kind;
    MegalodonDType dtype;                            /* in the file, when we write it                   */
    MegalodonTensor tensor;                          /* its name in the model, its shape                */
    char name[MEGALODON_MAX_NAME + 32];              /* its name in the file                            */
    bool outside;                                    /* it is no tensor of the model, but lies in ...   */
    float *memory;                                   /* ... this memory; NULL: nobody wants to read it  */
} CheckpointItem;

typedef struct CheckpointList {
    const MegalodonBackend *backend;
    MegalodonModel *model;
    CheckpointItem *items;
    size_t count;
} CheckpointList;

/* The state's statistics are double in every backend and count is int64. */
static inline MegalodonDType checkpoint_dtype(MegalodonKind kind, const char *name) {
    if (kind != MEGALODON_STATE) return MEGALODON_F32;
    return strcmp(name, "count") == 0 ? MEGALODON_I64 : strstr(name, "norm.") ? MEGALODON_F64 : MEGALODON_F32;
}

/* Makes room for `more` items. */
static inline const char *checkpoint_list_grow(CheckpointList *list, size_t more) {
    CheckpointItem *items = realloc(list->items, (list->count + more) * sizeof *items);
    if (!items) return errorf("out of memory for a list of %zu tensors", list->count + more);
    list->items = items;
    return NULL;
}

/* Appends all tensors of a kind, in the file called PREFIX + their name. B and n matter for the state only. */
static inline const char *checkpoint_list(CheckpointList *list, const MegalodonConfig *config, MegalodonKind kind,
                                          int B, int n, const char *prefix) {
    int count = megalodon_tensors(config, kind, B, 1, n, NULL, 0);
    MegalodonTensor *tensors = malloc((size_t)count * sizeof *tensors);
    const char *error = tensors ? checkpoint_list_grow(list, (size_t)count) : errorf("out of memory for a list");
    if (error) {
        free(tensors);
        return error;
    }
    megalodon_tensors(config, kind, B, 1, n, tensors, count);
    for (int i = 0; i < count; i++) {
        CheckpointItem *item = &list->items[list->count++];
        *item = (CheckpointItem){.kind = kind, .dtype = checkpoint_dtype(kind, tensors[i].name), .tensor = tensors[i]};
        snprintf(item->name, sizeof item->name, "%.31s%s", prefix, tensors[i].name);
    }
    free(tensors);
    return NULL;
}

/* Appends a tensor (B,width) of floats that the model does not have. */
static inline const char *checkpoint_list_outside(CheckpointList *list, const char *name, int B, int width,
                                                  float *memory) {
    const char *error = checkpoint_list_grow(list, 1);
    if (error) return error;
    CheckpointItem *item = &list->items[list->count++];
    *item = (CheckpointItem){.dtype = MEGALODON_F32, .outside = true, .memory = memory,
                             .tensor = {.ndim = 2, .dims = {B, width}, .size = (int64_t)B * width, .layer = -1}};
    snprintf(item->name, sizeof item->name, "%s", name);
    return NULL;
}

/* Parameters and moments that are not finite are worth nothing, and must not take the place of some that are. */
static inline const char *checkpoint_fill(void *context, size_t index, void *out) {
    const CheckpointList *list = context;
    const CheckpointItem *item = &list->items[index];
    const char *error = list->backend->get(list->model, item->kind, item->tensor.name, out, item->dtype);
    if (error || item->dtype != MEGALODON_F32 || item->kind == MEGALODON_STATE) return error;
    for (int64_t i = 0; i < item->tensor.size; i++)
        if (!isfinite(((const float *)out)[i])) return errorf("number %" PRId64 " is not finite", i);
    return NULL;
}

/* Writes a list to a file and frees it. */
static inline const char *checkpoint_list_write(CheckpointList *list, const char *path,
                                                const SafetensorsPair *metadata) {
    SafetensorsTensor *tensors = calloc(list->count + 1, sizeof *tensors);
    const char *error = tensors ? NULL : errorf("%s: out of memory for a list of %zu tensors", path, list->count);
    for (size_t i = 0; i < list->count && tensors; i++) {
        const CheckpointItem *item = &list->items[i];
        tensors[i].name = item->name;
        tensors[i].dtype = item->dtype == MEGALODON_I64 ? SAFETENSORS_I64
                         : item->dtype == MEGALODON_F64 ? SAFETENSORS_F64 : SAFETENSORS_F32;
        tensors[i].ndim = item->tensor.ndim;
        tensors[i].size = item->tensor.size;
        memcpy(tensors[i].dims, item->tensor.dims, sizeof item->tensor.dims);
        tensors[i].data = item->memory;
    }
    if (!error) error = safetensors_write(path, tensors, list->count, metadata, checkpoint_fill, list);
    free(tensors);
    free(list->items);
    return error;
}

/* Checks that a file has every tensor of a list with the right shape and a floating type, and no other tensor whose
 * name starts with the prefix, and that their bytes are those that were written. The state's count is checked by its
 * reader. */
static inline const char *checkpoint_list_check(const CheckpointList *list, const Safetensors *file,
                                                const char *prefix) {
    for (size_t i = 0; i < list->count; i++) {
        const CheckpointItem *item = &list->items[i];
        const SafetensorsTensor *found = safetensors_find(file, item->name);
        char expected[SAFETENSORS_SHAPE_TEXT], shape[SAFETENSORS_SHAPE_TEXT];
        safetensors_shape_text(item->tensor.ndim, item->tensor.dims, expected);
        if (!found)
            return errorf("%s: tensor %s: expected shape %s, found no such tensor", file->path, item->name, expected);
        if (item->dtype == MEGALODON_I64) continue;
        if (found->ndim != item->tensor.ndim ||
            memcmp(found->dims, item->tensor.dims, (size_t)found->ndim * sizeof *found->dims) != 0)
            return errorf("%s: tensor %s: expected shape %s, found %s", file->path, item->name, expected,
                          safetensors_shape_text(found->ndim, found->dims, shape));
        if (found->dtype != SAFETENSORS_F64 && found->dtype != SAFETENSORS_F32 && found->dtype != SAFETENSORS_F16 &&
            found->dtype != SAFETENSORS_BF16)
            return errorf("%s: tensor %s: expected dtype F32 (or F64, F16, BF16), found %s", file->path, item->name,
                          safetensors_dtype_name(found->dtype));
    }
    for (size_t i = 0; i < file->count; i++) {
        const char *name = file->tensors[i].name;
        bool known = strncmp(name, prefix, strlen(prefix)) != 0;
        for (size_t k = 0; k < list->count && !known; k++) known = strcmp(name, list->items[k].name) == 0;
        if (!known) return errorf("%s: tensor %.120s: the configuration in use has no such tensor", file->path, name);
    }
    const char *error = NULL;
    for (size_t i = 0; i < list->count && !error && *checkpoint_verifies(); i++)
        error = safetensors_verify_tensor(file, safetensors_find(file, list->items[i].name));
    return error;
}

/* Puts a checked list's tensors into the model. Float64 in the file stays float64, everything narrower fits float32. */
static inline const char *checkpoint_list_load(const CheckpointList *list, const Safetensors *file) {
    const char *error = NULL;
    for (size_t i = 0; i < list->count && !error; i++) {
        const CheckpointItem *item = &list->items[i];
        if (item->dtype == MEGALODON_I64) continue;
        const SafetensorsTensor *found = safetensors_find(file, item->name);
        if (item->outside) {
            if (item->memory) safetensors_to_float(found, item->memory);
            continue;
        }
        bool wide = found->dtype == SAFETENSORS_F64;
        void *buffer = malloc((size_t)found->size * (wide ? sizeof(double) : sizeof(float)) + 1);
        if (!buffer) return errorf("%s: tensor %s: out of memory", file->path, item->name);
        if (wide) safetensors_to_double(found, buffer);
        else safetensors_to_float(found, buffer);
        error = list->backend->set(list->model, item->kind, item->tensor.name, buffer,
                                   wide ? MEGALODON_F64 : MEGALODON_F32);
        if (error) error = errorf("%s: tensor %s: %s", file->path, item->name, error);
        free(buffer);
    }
    return error;
}

/* Opens a file of one of our formats and checks its header's checksum. */
static inline const char *checkpoint_open(Safetensors *file, const char *path, const char *format) {
    const char *error = safetensors_open(file, path);
    if (error) return error;
    const char *found = safetensors_metadata(file, "format");
    if (!found || strcmp(found, format) != 0)
        error = errorf("%s: expected the format \"%s\" in __metadata__, found %.80s", path, format,
                       found ? found : "none; it was not written by this project");
    else if (*checkpoint_verifies())
        error = safetensors_verify_header(file);
    if (error) safetensors_close(file);
    return error;
}

/* ------------------------------------------------------------------------------------------------------------------
 * 3. Models. A path may be a model file, the directory of one step, or a run's directory, which stands for its latest.
 */

static inline const char *checkpoint_join(char out[SAFETENSORS_MAX_PATH], const char *directory, const char *name) {
    int length = snprintf(out, SAFETENSORS_MAX_PATH, "%s/%s", directory, name);
    return length < SAFETENSORS_MAX_PATH ? NULL : errorf("%.80s...: this path is too long", directory);
}

static inline bool checkpoint_exists(const char *directory, const char *name) {
    char path[SAFETENSORS_MAX_PATH];
    struct stat status;
    return !checkpoint_join(path, directory, name) && stat(path, &status) == 0;
}

/* The name of a step's directory. Steps written twice into one run are told apart by a revision, from 1 on. */
static inline void checkpoint_step_name(char name[CHECKPOINT_MAX_NAME], int64_t step, int revision) {
    int length = snprintf(name, CHECKPOINT_MAX_NAME, "step-%08" PRId64, step);
    if (revision > 1) snprintf(name + length, CHECKPOINT_MAX_NAME - (size_t)length, "-%d", revision);
}

/* The reverse; false if `name` is not exactly such a name, followed by `suffix`. */
static inline bool checkpoint_parse_step_name(const char *name, const char *suffix, int64_t *step, int *revision) {
    char plain[CHECKPOINT_MAX_NAME], expected[CHECKPOINT_MAX_NAME + 8], *end;
    if (strncmp(name, "step-", 5) != 0) return false;
    *step = strtoll(name + 5, &end, 10);
    long number = *end == '-' ? strtol(end + 1, NULL, 10) : 1;
    *revision = number > 0 && number < 1000000 ? (int)number : 1;
    checkpoint_step_name(plain, *step, *revision);
    snprintf(expected, sizeof expected, "%s%s", plain, suffix);
    return strcmp(name, expected) == 0;
}

/* The name of the newest step that a run's directory holds, for a message where `latest` is of no use. */
static inline bool checkpoint_newest_step(const char *run, char out[CHECKPOINT_MAX_NAME]) {
    DIR *directory = opendir(run);
    int64_t step, best = -1;
    int revision, best_revision = 0;
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        char path[SAFETENSORS_MAX_PATH];
        if (!checkpoint_parse_step_name(entry->d_name, "", &step, &revision)) continue;
        if (checkpoint_join(path, run, entry->d_name) || !checkpoint_exists(path, "model.safetensors")) continue;
        if (step < best || (step == best && revision < best_revision)) continue;
        best = step;
        best_revision = revision;
        checkpoint_step_name(out, step, revision);
    }
    if (directory) closedir(directory);
    return best >= 0;
}

/* The directory that holds the files of `path`: follows `latest`. Error: there is no checkpoint. */
static inline const char *checkpoint_directory(const char *path, char out[SAFETENSORS_MAX_PATH]) {
    struct stat status;
    if (strlen(path) >= SAFETENSORS_MAX_PATH) return errorf("%.80s...: this path is too long", path);
    if (stat(path, &status) != 0) return errorf("%s: cannot open: %s", path, strerror(errno));
    if (!S_ISDIR(status.st_mode)) {
        safetensors_parent(path, out);
        return NULL;
    }
    if (checkpoint_exists(path, "model.safetensors")) {
        memcpy(out, path, strlen(path) + 1);
        return NULL;
    }
    if (!checkpoint_exists(path, "latest"))
        return errorf("%s: holds no checkpoint: expected model.safetensors or the file latest in it", path);
    char latest[SAFETENSORS_MAX_PATH], newest[CHECKPOINT_MAX_NAME], *name = NULL;
    size_t length = 0;
    int64_t step;
    int revision;
    const char *error = checkpoint_join(latest, path, "latest");
    if (!error) error = json_read_text(latest, &name, &length);
    if (error) return error;
    if (length && name[length - 1] == '\n') name[length - 1] = '\0';
    if (!checkpoint_parse_step_name(name, "", &step, &revision))
        error = errorf("%s: expected the name of a step such as step-00001000, found \"%.40s\"", latest, name);
    else if (!(error = checkpoint_join(out, path, name)) && !checkpoint_exists(out, "model.safetensors"))
        error = errorf("%s: names %s, but there is no %s/model.safetensors", latest, name, out);
    if (error && checkpoint_newest_step(path, newest))
        error = errorf("%s; the newest step that is there is %s/%s", error, path, newest);
    free(name);
    return error;
}

/* The model file of `path`. */
static inline const char *checkpoint_model_path(const char *path, char out[SAFETENSORS_MAX_PATH]) {
    char directory[SAFETENSORS_MAX_PATH];
    struct stat status;
    const char *error = checkpoint_directory(path, directory);
    if (error) return error;
    bool is_directory = stat(path, &status) == 0 && S_ISDIR(status.st_mode);
    if (is_directory) return checkpoint_join(out, directory, "model.safetensors");
    memcpy(out, path, strlen(path) + 1);
    return NULL;
}

/* Opens a model file and reads its configuration. */
static inline const char *checkpoint_open_model(Safetensors *file, const char *path, MegalodonConfig *config) {
    const char *error = checkpoint_open(file, path, CHECKPOINT_MODEL_FORMAT);
    if (error) return error;
    const char *text = safetensors_metadata(file, "config");
    error = text ? checkpoint_config_parse(text, config) : "expected \"config\" in __metadata__, found none";
    if (!error) return NULL;
    safetensors_close(file);
    return errorf("%s: %s", path, error);
}

/* Is there anything at `path`, the value of --checkpoint? Error: why not, and what to do. */
static inline const char *checkpoint_is_there(const char *path) {
    struct stat info;
    if (stat(path, &info) == 0) return NULL;
    return errorf("--checkpoint %s: %s; train a model first, for example by `make demo` or by ./train --data FILE",
                  path, strerror(errno));
}

/* Reads the configuration of a model on disk, from which a model can be created that checkpoint_load then fills. */
static inline const char *checkpoint_read_config(const char *path, MegalodonConfig *config) {
    char model[SAFETENSORS_MAX_PATH];
    Safetensors file;
    const char *error = checkpoint_model_path(path, model);
    if (!error && !(error = checkpoint_open_model(&file, model, config))) safetensors_close(&file);
    return error;
}

/* Fills a model, created with `config`, with the parameters on disk. The file's own configuration is read and must be
 * valid, but only its shapes have to agree: a caller may change what is no shape, such as chunk_size. */
static inline const char *checkpoint_load(const char *path, const MegalodonBackend *backend, MegalodonModel *model,
                                          const MegalodonConfig *config) {
    char model_path[SAFETENSORS_MAX_PATH];
    MegalodonConfig own;
    Safetensors file;
    CheckpointList list = {.backend = backend, .model = model};
    const char *error = checkpoint_model_path(path, model_path);
    if (!error) error = checkpoint_open_model(&file, model_path, &own);
    if (error) return error;
    error = checkpoint_list(&list, config, MEGALODON_PARAM, 1, 0, "");
    if (!error) error = checkpoint_list_check(&list, &file, "");
    if (!error) error = checkpoint_list_load(&list, &file);
    free(list.items);
    safetensors_close(&file);
    return error;
}

/* A tokenizer that goes with a model. */
typedef struct CheckpointTokenizer {
    const char *json;                                /* tokenizer.json, word for word          */
    const char *hash;                                /* tells it from others; stands in the model's metadata */
} CheckpointTokenizer;

/* Where the tokenizer of a model lies: in `out` the path of tokenizer.json beside it, in *there whether it exists, and
 * in `hash` that of the tokenizer which the model was trained with; empty if the model's file names none. */
static inline const char *checkpoint_tokenizer(const char *path, char out[SAFETENSORS_MAX_PATH], bool *there,
                                               char hash[CHECKPOINT_HASH]) {
    char directory[SAFETENSORS_MAX_PATH], model[SAFETENSORS_MAX_PATH];
    Safetensors file;
    const char *error = checkpoint_directory(path, directory);
    if (!error) error = checkpoint_model_path(path, model);
    if (!error) error = checkpoint_join(out, directory, "tokenizer.json");
    if (!error) error = checkpoint_open(&file, model, CHECKPOINT_MODEL_FORMAT);
    if (error) return error;
    const char *named = safetensors_metadata(&file, "tokenizer");
    snprintf(hash, CHECKPOINT_HASH, "%s", named ? named : "");
    *there = checkpoint_exists(directory, "tokenizer.json");
    safetensors_close(&file);
    return NULL;
}

/* Writes a model file; step and the hash of a tokenizer, if not NULL, are noted in it. */
static inline const char *checkpoint_save_at(const char *path, const MegalodonBackend *backend, MegalodonModel *model,
                                             const MegalodonConfig *config, const char *step, const char *tokenizer) {
    CheckpointList list = {.backend = backend, .model = model};
    JsonWriter json = {0};
    checkpoint_put_config(&json, config);
    SafetensorsPair metadata[] = {{"format", CHECKPOINT_MODEL_FORMAT}, {"config", json.text},
                                  {NULL, NULL}, {NULL, NULL}, {NULL, NULL}};
    int pairs = 2;
    if (step) metadata[pairs++] = (SafetensorsPair){"step", step};
    if (tokenizer) metadata[pairs] = (SafetensorsPair){"tokenizer", tokenizer};
    const char *error = json.error ? errorf("%s: config: %s", path, json.error)
                                   : checkpoint_list(&list, config, MEGALODON_PARAM, 1, 0, "");
    if (error) free(list.items);
    else error = checkpoint_list_write(&list, path, metadata);
    free(json.text);
    return error;
}

/* Writes a model file: PATH is the old file or the new one at every moment. */
static inline const char *checkpoint_save(const char *path, const MegalodonBackend *backend, MegalodonModel *model,
                                          const MegalodonConfig *config) {
    return checkpoint_save_at(path, backend, model, config, NULL, NULL);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 4. The model's state: what it remembers of the tokens so far.
 */

/* Takes `size` bytes of a file into a hash: FNV-1a over words of 8 bytes, with a rotation that brings the upper bits down. */
static inline uint64_t checkpoint_hash_bytes(uint64_t hash, const void *bytes, size_t size) {
    for (size_t i = 0; i < size; i += 8) {
        uint64_t word = safetensors_load((const char *)bytes + i, size - i < 8 ? size - i : 8);
        hash = (hash ^ word) * 0x100000001b3u;
        hash = hash << 29 | hash >> 35;
    }
    return hash;
}

/* A number that tells one model's parameters from another's: over names, types, shapes and values, in the order of the
 * names, so that a copy of the file, or the same model saved again, has the same. */
static inline const char *checkpoint_hash(const char *path, char out[CHECKPOINT_HASH]) {
    char model[SAFETENSORS_MAX_PATH];
    Safetensors file;
    uint64_t hash = 0xcbf29ce484222325u;
    const char *error = checkpoint_model_path(path, model);
    if (!error) error = checkpoint_open(&file, model, CHECKPOINT_MODEL_FORMAT);
    if (error) return error;
    for (size_t i = 0; i < file.count; i++) {
        const SafetensorsTensor *tensor = &file.tensors[i];
        const char *dtype = safetensors_dtype_name(tensor->dtype);
        int64_t dims[SAFETENSORS_MAX_DIMS];
        safetensors_copy(dims, tensor->dims, (size_t)tensor->ndim, sizeof *dims);
        hash = checkpoint_hash_bytes(hash, tensor->name, strlen(tensor->name));
        hash = checkpoint_hash_bytes(hash, dtype, strlen(dtype));
        hash = checkpoint_hash_bytes(hash, dims, (size_t)tensor->ndim * sizeof *dims);
        hash = checkpoint_hash_bytes(hash, tensor->data, tensor->bytes);
    }
    safetensors_close(&file);
    snprintf(out, CHECKPOINT_HASH, "%016" PRIx64, hash);
    return NULL;
}

/* Writes the state after the last forward, and with it, where they are not NULL, the checkpoint_hash of the model that
 * it belongs to and the logits (B,V) of the last position, from which a text can go on without another token. PATH is
 * the old file or the new one at every moment. Error: there is no state, or the file cannot be written. */
static inline const char *checkpoint_state_write(const char *path, const MegalodonBackend *backend,
                                                 MegalodonModel *model, const MegalodonConfig *config,
                                                 const char *hash, float *logits) {
    CheckpointList list = {.backend = backend, .model = model};
    JsonWriter json = {0};
    int B, n;
    backend->state_shape(model, &B, &n);
    if (B == 0) return errorf("%s: the model has no state to save: it has not read a token", path);
    checkpoint_put_config(&json, config);
    SafetensorsPair metadata[] = {{"format", CHECKPOINT_STATE_FORMAT}, {"config", json.text},
                                  {hash ? "model" : NULL, hash}, {NULL, NULL}};
    const char *error = json.error ? errorf("%s: config: %s", path, json.error)
                                   : checkpoint_list(&list, config, MEGALODON_STATE, B, n, "");
    if (!error && logits) error = checkpoint_list_outside(&list, "last_logits", B, config->vocab_size, logits);
    if (error) free(list.items);
    else error = checkpoint_list_write(&list, path, metadata);
    free(json.text);
    return error;
}

/* Writes the state alone. */
static inline const char *checkpoint_state_save(const char *path, const MegalodonBackend *backend,
                                                MegalodonModel *model, const MegalodonConfig *config) {
    return checkpoint_state_write(path, backend, model, config, NULL, NULL);
}

/* The rows' token counts: one a row, or a single one that holds for all rows. *count is malloc'ed. */
static inline const char *checkpoint_state_count(const Safetensors *file, const char *prefix,
                                                 const MegalodonConfig *config, int *B, int64_t **count) {
    char name[MEGALODON_MAX_NAME + 32];
    snprintf(name, sizeof name, "%.31sfinal_norm.mean", prefix);
    const SafetensorsTensor *mean = safetensors_find(file, name);
    /* The groups are checked here too: a tensor without elements could claim any number of rows. */
    if (!mean || mean->ndim != 2 || mean->dims[0] < 1 || mean->dims[0] > INT32_MAX ||
        mean->dims[1] != config->norm_num_groups)
        return errorf("%s: tensor %s: expected shape [rows,%d], found %s", file->path, name, config->norm_num_groups,
                      mean ? "another one" : "no such tensor");
    snprintf(name, sizeof name, "%.31scount", prefix);
    const SafetensorsTensor *found = safetensors_find(file, name);
    if (!found || found->ndim != 1 || (found->size != 1 && found->size != mean->dims[0]))
        return errorf("%s: tensor %s: expected shape [%" PRId64 "] or [1], found %s", file->path, name, mean->dims[0],
                      found ? "another one" : "no such tensor");
    *B = (int)mean->dims[0];
    *count = malloc((size_t)*B * sizeof **count);
    if (!*count) return errorf("%s: out of memory for %d rows", file->path, *B);
    const char *error = safetensors_to_int64(found, *count);
    if (error) return errorf("%s: %s", file->path, error);
    for (int b = (int)found->size; b < *B; b++) (*count)[b] = (*count)[0];
    for (int b = 0; b < *B; b++)
        if ((*count)[b] < 0 || (*count)[b] > CHECKPOINT_MAX_COUNT)
            return errorf("%s: tensor %s: expected token counts from 0 to %" PRId64 ", found %" PRId64, file->path,
                          name, CHECKPOINT_MAX_COUNT, (*count)[b]);
    return NULL;
}

/* Loads the state from the tensors of an open file whose names start with `prefix` ("" in our own files), and the
 * logits (B,V) into `logits`, which may be NULL. The file is checked as a whole before the model's state changes. */
static inline const char *checkpoint_state_read_with(const Safetensors *file, const char *prefix,
                                                     const MegalodonBackend *backend, MegalodonModel *model,
                                                     const MegalodonConfig *config, float *logits) {
    CheckpointList list = {.backend = backend, .model = model};
    int B = 0;
    int64_t *count = NULL;
    const char *error = checkpoint_state_count(file, prefix, config, &B, &count);
    if (!error) {
        int n = (int)(count[0] % config->chunk_size);
        error = checkpoint_list(&list, config, MEGALODON_STATE, B, n, prefix);
    }
    if (!error && (logits || safetensors_find(file, "last_logits")))
        error = checkpoint_list_outside(&list, "last_logits", B, config->vocab_size, logits);
    if (!error) error = checkpoint_list_check(&list, file, prefix);
    if (!error && (error = backend->start_state(model, B, count))) error = errorf("%s: %s", file->path, error);
    if (!error) error = checkpoint_list_load(&list, file);
    free(list.items);
    free(count);
    return error;
}
static inline const char *checkpoint_state_read(const Safetensors *file, const char *prefix,
                                                const MegalodonBackend *backend, MegalodonModel *model,
                                                const MegalodonConfig *config) {
    return checkpoint_state_read_with(file, prefix, backend, model, config, NULL);
}

/* Is an open state file one of a model with this configuration and, if hash is not NULL, with these parameters? Error:
 * every field that differs, with both values. */
static inline const char *checkpoint_state_check(const Safetensors *file, const MegalodonConfig *config,
                                                 const char *hash) {
    const char *text = safetensors_metadata(file, "config"), *found = safetensors_metadata(file, "model");
    char difference[800];
    MegalodonConfig own;
    if (text) {
        const char *error = checkpoint_config_parse(text, &own);
        if (error) return errorf("%s: %s", file->path, error);
        checkpoint_config_difference(&own, config, difference, sizeof difference);
        if (*difference)
            return errorf("%s: is the state of a model of another configuration; the state's and this model's: %s",
                          file->path, difference);
    }
    if (!hash) return NULL;
    if (!text || !found)
        return errorf("%s: expected \"config\" and \"model\" in __metadata__, which say whose state this is",
                      file->path);
    if (strcmp(found, hash) != 0)
        return errorf("%s: is the state of another model of the same size: its parameters have the hash %.40s, those "
                      "in use %s; a state means something only to the model that made it", file->path, found, hash);
    return NULL;
}

/* Loads what checkpoint_state_write wrote: the next forward with `carry` goes on from it. hash: checkpoint_hash of the
 * model in use, or NULL if any parameters will do; logits (B,V, with room for the model's largest B): NULL if they are
 * not wanted. Error: what is wrong with the file, whose model it belongs to, or how many rows it has; the model's
 * state is as it was before. */
static inline const char *checkpoint_state_resume(const char *path, const MegalodonBackend *backend,
                                                  MegalodonModel *model, const MegalodonConfig *config,
                                                  const char *hash, float *logits) {
    Safetensors file;
    const char *error = checkpoint_open(&file, path, CHECKPOINT_STATE_FORMAT);
    if (error) return error;
    error = checkpoint_state_check(&file, config, hash);
    if (!error) error = checkpoint_state_read_with(&file, "", backend, model, config, logits);
    safetensors_close(&file);
    return error;
}

/* Loads the state alone. */
static inline const char *checkpoint_state_load(const char *path, const MegalodonBackend *backend,
                                                MegalodonModel *model, const MegalodonConfig *config) {
    return checkpoint_state_resume(path, backend, model, config, NULL, NULL);
}

/* ------------------------------------------------------------------------------------------------------------------
 * 5. Training runs.
 */

/* Writes AdamW's moments and the caller's facts: strings with distinct keys other than "format". */
static inline const char *checkpoint_trainer_save(const char *path, const MegalodonBackend *backend,
                                                  MegalodonModel *model, const MegalodonConfig *config,
                                                  const SafetensorsPair *facts) {
    CheckpointList list = {.backend = backend, .model = model};
    size_t count = 0;
    while (facts[count].key) count++;
    SafetensorsPair *metadata = malloc((count + 2) * sizeof *metadata);
    const char *error = metadata ? NULL : errorf("%s: out of memory for %zu facts", path, count);
    if (!error) {
        metadata[0] = (SafetensorsPair){"format", CHECKPOINT_TRAINER_FORMAT};
        memcpy(metadata + 1, facts, (count + 1) * sizeof *metadata);
        error = checkpoint_list(&list, config, MEGALODON_MOMENT1, 1, 0, "moment1.");
    }
    if (!error) error = checkpoint_list(&list, config, MEGALODON_MOMENT2, 1, 0, "moment2.");
    if (error) free(list.items);
    else error = checkpoint_list_write(&list, path, metadata);
    free(metadata);
    return error;
}

/* Loads the moments and leaves the file open, so that the caller reads its facts and then closes it. */
static inline const char *checkpoint_trainer_load(const char *path, const MegalodonBackend *backend,
                                                  MegalodonModel *model, const MegalodonConfig *config,
                                                  Safetensors *trainer) {
    CheckpointList list = {.backend = backend, .model = model};
    const char *error = checkpoint_open(trainer, path, CHECKPOINT_TRAINER_FORMAT);
    if (error) return error;
    error = checkpoint_list(&list, config, MEGALODON_MOMENT1, 1, 0, "moment1.");
    if (!error) error = checkpoint_list(&list, config, MEGALODON_MOMENT2, 1, 0, "moment2.");
    if (!error) error = checkpoint_list_check(&list, trainer, "");
    if (!error) error = checkpoint_list_load(&list, trainer);
    free(list.items);
    if (error) safetensors_close(trainer);
    return error;
}

/* One fact as the caller wrote it. Error: it is missing. The value is valid until the file is closed. */
static inline const char *checkpoint_fact(const Safetensors *trainer, const char *key, const char **value) {
    *value = safetensors_metadata(trainer, key);
    return *value ? NULL : errorf("%s: expected \"%s\" in __metadata__, found none", trainer->path, key);
}

/* What to say about a fact that should have been a number and ends at `end` if it is one. */
static inline const char *checkpoint_fact_error(const Safetensors *trainer, const char *key, const char *text,
                                                const char *end, const char *expected) {
    if (errno == 0 && end != text && *end == '\0') return NULL;
    return errorf("%s: expected \"%s\" in __metadata__ to be %s, found \"%.40s\"", trainer->path, key, expected, text);
}

/* Facts that are numbers: the whole string must be one. Write doubles with "%.17g" and they come back exactly. */
static inline const char *checkpoint_fact_int64(const Safetensors *trainer, const char *key, int64_t *value) {
    const char *text, *error = checkpoint_fact(trainer, key, &text);
    if (error) return error;
    char *end;
    errno = 0;
    *value = strtoll(text, &end, 10);
    return checkpoint_fact_error(trainer, key, text, end, "an integer");
}
/* A number of things, from 0 to `most`. */
static inline const char *checkpoint_fact_count(const Safetensors *trainer, const char *key, int64_t most,
                                                int64_t *value) {
    const char *error = checkpoint_fact_int64(trainer, key, value);
    if (error || (*value >= 0 && *value <= most)) return error;
    return errorf("%s: expected \"%s\" in __metadata__ to be from 0 to %" PRId64 ", found %" PRId64, trainer->path, key,
                  most, *value);
}
static inline const char *checkpoint_fact_uint64(const Safetensors *trainer, const char *key, uint64_t *value) {
    const char *text, *error = checkpoint_fact(trainer, key, &text);
    if (error) return error;
    char *end;
    errno = 0;
    *value = strtoull(text, &end, 10);               /* which takes "-1" for a large number */
    return checkpoint_fact_error(trainer, key, text, strchr(text, '-') ? text : end, "an integer from 0 on");
}
static inline const char *checkpoint_fact_double(const Safetensors *trainer, const char *key, double *value) {
    const char *text, *error = checkpoint_fact(trainer, key, &text);
    if (error) return error;
    char *end;
    *value = strtod(text, &end);
    errno = 0;                                       /* a tiny number is as good as any */
    return checkpoint_fact_error(trainer, key, text, end, "a number");
}

/* Makes a directory and those above it, where they do not exist. */
static inline const char *checkpoint_make_directory(const char *path) {
    char part[SAFETENSORS_MAX_PATH];
    size_t length = strlen(path);
    if (length >= sizeof part) return errorf("%.80s...: this path is too long", path);
    for (size_t i = 1; i <= length; i++) {
        if (path[i] != '/' && path[i] != '\0') continue;
        memcpy(part, path, i);
        part[i] = '\0';
        if (mkdir(part, 0777) != 0 && errno != EEXIST)
            return errorf("%s: cannot create the directory: %s", part, strerror(errno));
    }
    return NULL;
}

/* Deletes the directory of one step: the files in it, then itself. What cannot be deleted stays; it does no harm. */
static inline void checkpoint_remove(const char *path) {
    DIR *directory = opendir(path);
    if (!directory) return;
    char file[SAFETENSORS_MAX_PATH];
    for (struct dirent *entry; (entry = readdir(directory));)
        if (entry->d_name[0] != '.' && !checkpoint_join(file, path, entry->d_name)) unlink(file);
    closedir(directory);
    rmdir(path);
}

/* Deletes what a killed write left behind (*.tmp, latest.tmp.*), and all but the newest `keep` of the steps up to
 * `step`; keep = 0 keeps all. Later steps, of a run that this one goes back on, are not ours to delete. A step is
 * renamed to *.tmp before its files go, so that a kill in between leaves no half of one under its name. */
static inline void checkpoint_prune(const char *run, int64_t step, int keep) {
    typedef struct Entry { int64_t step; int revision; } Entry;
    Entry *entries = NULL;
    size_t count = 0;
    char name[CHECKPOINT_MAX_NAME], path[SAFETENSORS_MAX_PATH], temporary[SAFETENSORS_MAX_PATH];
    DIR *directory = opendir(run);
    if (!directory) return;
    for (struct dirent *entry; (entry = readdir(directory));) {
        Entry found;
        if (checkpoint_parse_step_name(entry->d_name, ".tmp", &found.step, &found.revision)) {
            if (!checkpoint_join(path, run, entry->d_name)) checkpoint_remove(path);
        } else if (strncmp(entry->d_name, "latest.tmp.", 11) == 0) {
            if (!checkpoint_join(path, run, entry->d_name)) unlink(path);
        } else if (checkpoint_parse_step_name(entry->d_name, "", &found.step, &found.revision) && found.step <= step) {
            Entry *more = realloc(entries, (count + 1) * sizeof *more);
            if (!more) break;
            entries = more;
            entries[count++] = found;
        }
    }
    closedir(directory);
    for (size_t i = 0; i < count && keep > 0; i++) {
        int newer = 0;
        for (size_t k = 0; k < count; k++)
            newer += entries[k].step > entries[i].step ||
                     (entries[k].step == entries[i].step && entries[k].revision > entries[i].revision);
        checkpoint_step_name(name, entries[i].step, entries[i].revision);
        if (newer < keep || checkpoint_join(path, run, name)) continue;
        int length = snprintf(temporary, sizeof temporary, "%s.tmp", path);
        if (length < SAFETENSORS_MAX_PATH && rename(path, temporary) == 0) checkpoint_remove(temporary);
    }
    free(entries);
}

/* Writes a text file that is there whole or not at all. */
static inline const char *checkpoint_write_text(const char *path, const char *text) {
    SafetensorsOutput output;
    const char *error = safetensors_begin(&output, path);
    if (error) return error;
    fputs(text, output.file);                        /* commit sees it if this fails */
    return safetensors_commit(&output);
}

/* Makes `latest` say a name. */
static inline const char *checkpoint_point_latest(const char *run, const char *name) {
    SafetensorsOutput output;
    char latest[SAFETENSORS_MAX_PATH];
    const char *error = checkpoint_join(latest, run, "latest");
    if (!error) error = safetensors_begin(&output, latest);
    if (error) return error;
    fprintf(output.file, "%s\n", name);              /* commit sees it if this fails */
    return safetensors_commit(&output);
}

/* Writes the files of one step into a directory. */
static inline const char *checkpoint_write_files(const char *directory, const MegalodonBackend *backend,
                                                 MegalodonModel *model, const MegalodonConfig *config,
                                                 const char *step, const SafetensorsPair *facts, bool with_state,
                                                 const CheckpointTokenizer *tokenizer) {
    char path[SAFETENSORS_MAX_PATH];
    size_t count = 0;
    while (facts[count].key) count++;
    SafetensorsPair *all = malloc((count + 2) * sizeof *all);
    if (!all) return errorf("%s: out of memory for %zu facts", directory, count);
    all[0] = (SafetensorsPair){"step", step};
    memcpy(all + 1, facts, (count + 1) * sizeof *all);
    const char *error = checkpoint_join(path, directory, "model.safetensors");
    if (!error) error = checkpoint_save_at(path, backend, model, config, step, tokenizer ? tokenizer->hash : NULL);
    if (!error) error = checkpoint_join(path, directory, "trainer.safetensors");
    if (!error) error = checkpoint_trainer_save(path, backend, model, config, all);
    if (!error && with_state) error = checkpoint_join(path, directory, "state.safetensors");
    if (!error && with_state) error = checkpoint_state_save(path, backend, model, config);
    if (!error && tokenizer) error = checkpoint_join(path, directory, "tokenizer.json");
    if (!error && tokenizer) error = checkpoint_write_text(path, tokenizer->json);
    free(all);
    return error;
}

/* Reads the files of one step again and compares their checksums: before older steps go, the new one is known to be
 * good. */
static inline const char *checkpoint_read_back(const char *directory) {
    static const char *const names[] = {"model.safetensors", "trainer.safetensors", "state.safetensors"};
    const char *error = NULL;
    for (int i = 0; i < 3 && !error; i++) {
        char path[SAFETENSORS_MAX_PATH];
        Safetensors file;
        if (!checkpoint_exists(directory, names[i])) continue;
        error = checkpoint_join(path, directory, names[i]);
        if (error || (error = safetensors_open(&file, path))) break;
        error = safetensors_verify(&file);
        safetensors_close(&file);
    }
    return error ? errorf("it does not read back as it was written: %s", error) : NULL;
}

/* Writes the checkpoint of a training run after `step` updates into the directory `run`, which is created if need be,
 * and then deletes all but the newest `keep` (0: keeps all). facts: what else resuming needs, strings with distinct
 * keys other than "format" and "step". with_state: training carries the model's state from batch to batch. tokenizer:
 * NULL for a model of bytes. Error: what failed; the checkpoints before are as they were. */
static inline const char *checkpoint_write_with(const char *run, int64_t step, int keep,
                                                const MegalodonBackend *backend, MegalodonModel *model,
                                                const MegalodonConfig *config, const SafetensorsPair *facts,
                                                bool with_state, const CheckpointTokenizer *tokenizer) {
    char name[CHECKPOINT_MAX_NAME], number[32];
    char path[SAFETENSORS_MAX_PATH], temporary[SAFETENSORS_MAX_PATH];
    if (step < 0) return errorf("%s: a step cannot be negative", run);
    const char *error = checkpoint_make_directory(run);
    if (error) return error;
    checkpoint_prune(run, step, 0);
    int revision = 1;
    do checkpoint_step_name(name, step, revision++);
    while (checkpoint_exists(run, name));
    if ((error = checkpoint_join(path, run, name))) return error;
    if (snprintf(temporary, sizeof temporary, "%s.tmp", path) >= SAFETENSORS_MAX_PATH)
        return errorf("%.80s...: this path is too long", path);
    if (mkdir(temporary, 0777) != 0) return errorf("%s: cannot create the directory: %s", temporary, strerror(errno));
    snprintf(number, sizeof number, "%" PRId64, step);
    error = checkpoint_write_files(temporary, backend, model, config, number, facts, with_state, tokenizer);
    if (!error && *checkpoint_verifies()) error = checkpoint_read_back(temporary);
    if (!error && rename(temporary, path) != 0) error = errorf("%s: cannot rename: %s", temporary, strerror(errno));
    if (error) {
        checkpoint_remove(temporary);
        return error;
    }
    error = safetensors_sync_directory(run);
    if (!error) error = checkpoint_point_latest(run, name);
    if (!error) checkpoint_prune(run, step, keep);
    return error;
}

/* The same for a model of bytes. */
static inline const char *checkpoint_write(const char *run, int64_t step, int keep, const MegalodonBackend *backend,
                                           MegalodonModel *model, const MegalodonConfig *config,
                                           const SafetensorsPair *facts, bool with_state) {
    return checkpoint_write_with(run, step, keep, backend, model, config, facts, with_state, NULL);
}

/* Loads what checkpoint_write wrote: parameters, moments and, where there is one, the state. `path` is a run's
 * directory or one step's, `config` that of checkpoint_read_config. `trainer` stays open for checkpoint_fact ("step"
 * among them) and is to be closed by the caller. Error: the files are no pair, or what is wrong with one of them. */
static inline const char *checkpoint_resume(const char *path, const MegalodonBackend *backend, MegalodonModel *model,
                                            const MegalodonConfig *config, Safetensors *trainer) {
    char directory[SAFETENSORS_MAX_PATH], file[SAFETENSORS_MAX_PATH];
    const char *error = checkpoint_directory(path, directory);   /* once: `latest` may move on while we read */
    if (!error) error = checkpoint_load(directory, backend, model, config);
    if (!error) error = checkpoint_join(file, directory, "trainer.safetensors");
    if (!error) error = checkpoint_trainer_load(file, backend, model, config, trainer);
    if (error) return error;
    Safetensors opened;
    MegalodonConfig own;
    const char *step;
    error = checkpoint_fact(trainer, "step", &step);
    if (!error) error = checkpoint_join(file, directory, "model.safetensors");
    if (!error && !(error = checkpoint_open_model(&opened, file, &own))) {
        const char *other = safetensors_metadata(&opened, "step");
        if (!other || strcmp(other, step) != 0)
            error = errorf("%s: trainer.safetensors is of step %.40s, but model.safetensors of %.40s", directory, step,
                           other ? other : "no step");
        safetensors_close(&opened);
    }
    if (!error && checkpoint_exists(directory, "state.safetensors")) {
        error = checkpoint_join(file, directory, "state.safetensors");
        if (!error) error = checkpoint_state_load(file, backend, model, config);
    }
    if (error) safetensors_close(trainer);
    return error;
}

#endif
