/* test_golden.c - compares a backend with recorded numbers.
 *
 *     test_golden [--backend NAME] [--double] FILE...
 *
 * FILE is a fixture of the format "megalodon-fixture-1": a safetensors file with a configuration, parameters, tokens
 * and what a float64 implementation made of them. Without an option every file runs on cpu and on cpu-double; --double
 * is short for --backend cpu-double. One line a file: `ok` or `FAIL`, and for each backend how many tensors were
 * compared and the worst of them. The exit status is 0 only if all hold.
 *
 * A tensor's error is RMS(ours - fixture) / RMS(fixture); where the fixture is under 1e-6 ours must be, too.
 *
 * Tolerances: the fixtures are rounded to float32, which alone makes 3e-8. In double everything has to agree to 1e-6.
 * In float, activations pass through sums of some hundred roundings of 6e-8 and through two norms a block: 1e-5.
 * Gradients go through all of that twice: 1e-4. So do parameters after ten AdamW steps, and the losses and gradient
 * norms on the way, which depend on all gradients before: 1e-4 as well.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "../lib/checkpoint.h"
#include "test.h"

static const double FLOAT_FORWARD = 1e-5, FLOAT_BACKWARD = 1e-4, DOUBLE_ALL = 1e-6;

/* One file on one backend. */
typedef struct Run {
    const Safetensors *file;
    const MegalodonBackend *backend;
    MegalodonModel *model;
    MegalodonConfig config;
    int B, T;
    int32_t *tokens, *targets;
    double forward_tolerance, backward_tolerance;
    int compared;
    double worst_ratio;              /* error / tolerance of the worst tensor */
    double worst_error;
    char worst[MEGALODON_MAX_NAME + 32];
    bool failed;
} Run;

/* ---- comparing ---- */

/* Compares `ours` with the fixture's tensor and remembers the worst. */
static void compare_values(Run *run, const SafetensorsTensor *want, const double *ours, double tolerance) {
    double *theirs = malloc((size_t)want->size * sizeof *theirs + 1);
    if (!theirs) die("out of memory");
    safetensors_to_double(want, theirs);
    double error = relative_rms(ours, theirs, (size_t)want->size);
    free(theirs);
    run->compared++;
    if (!(error <= tolerance)) run->failed = true;
    if (run->worst[0] && error / tolerance <= run->worst_ratio) return;
    run->worst_ratio = error / tolerance;
    run->worst_error = error;
    snprintf(run->worst, sizeof run->worst, "%s", want->name);
}

/* Fetches one of the model's tensors and compares it with `want`. Error: another shape. */
static const char *compare_tensor(Run *run, const SafetensorsTensor *want, MegalodonKind kind,
                                  const MegalodonTensor *tensor, double tolerance) {
    char expected[SAFETENSORS_SHAPE_TEXT], found[SAFETENSORS_SHAPE_TEXT];
    if (want->ndim != tensor->ndim || memcmp(want->dims, tensor->dims, (size_t)want->ndim * sizeof *want->dims) != 0)
        return errorf("tensor %s: expected shape %s, found %s", want->name,
                      safetensors_shape_text(tensor->ndim, tensor->dims, expected),
                      safetensors_shape_text(want->ndim, want->dims, found));
    double *ours = malloc((size_t)tensor->size * sizeof *ours + 1);
    if (!ours) return "out of memory";
    const char *error = run->backend->get(run->model, kind, tensor->name, ours, MEGALODON_F64);
    if (!error) compare_values(run, want, ours, tolerance);
    else error = errorf("tensor %s: %s", want->name, error);
    free(ours);
    return error;
}

/* Compares every tensor of the file whose name is PREFIX + the name of one of the model's tensors of this kind. One
 * that the model does not have is an error, but among activations, where each side may know more than the other. */
static const char *compare_kind(Run *run, const char *prefix, MegalodonKind kind, double tolerance) {
    const char *error = NULL;
    int B, n;
    run->backend->state_shape(run->model, &B, &n);
    if (kind == MEGALODON_GRAD_STATE_IN) {
        const SafetensorsTensor *k = safetensors_find(run->file, "state_in.layers.0.k");
        n = k && k->ndim == 4 ? (int)k->dims[1] : 0;
    }
    for (size_t i = 0; i < run->file->count && !error; i++) {
        const SafetensorsTensor *want = &run->file->tensors[i];
        const char *name = want->name + strlen(prefix);
        MegalodonTensor tensor;
        if (strncmp(want->name, prefix, strlen(prefix)) != 0) continue;
        if (kind == MEGALODON_GRAD && strncmp(name, "state_in.", 9) == 0) continue;
        if (kind == MEGALODON_STATE && strcmp(name, "count") == 0) continue;
        const char *unknown = megalodon_find_tensor(&run->config, kind, run->B, run->T, n, name, &tensor);
        if (unknown && kind == MEGALODON_ACT) continue;
        error = unknown ? errorf("tensor %s: %s", want->name, unknown)
                        : compare_tensor(run, want, kind, &tensor, tolerance);
    }
    return error;
}

/* ---- reading a fixture ---- */

static const char *find_tensor(const Safetensors *file, const char *name, int ndim, const SafetensorsTensor **out) {
    *out = safetensors_find(file, name);
    if (!*out) return errorf("expected the tensor %s, found none", name);
    if ((*out)->ndim != ndim) return errorf("tensor %s: expected %d dimensions, found %d", name, ndim, (*out)->ndim);
    return NULL;
}

/* Integers of a tensor, each in [low, high). *out is malloc'ed. */
static const char *read_integers(const SafetensorsTensor *tensor, int64_t low, int64_t high, int32_t **out) {
    int64_t *wide = malloc((size_t)tensor->size * sizeof *wide + 1);
    *out = malloc((size_t)tensor->size * sizeof **out + 1);
    const char *error = wide && *out ? safetensors_to_int64(tensor, wide) : "out of memory";
    for (int64_t i = 0; i < tensor->size && !error; i++) {
        if (wide[i] < low || wide[i] >= high)
            error = errorf("tensor %s: element %" PRId64 ": expected a number from %" PRId64 " to %" PRId64
                           ", found %" PRId64, tensor->name, i, low, high - 1, wide[i]);
        (*out)[i] = (int32_t)wide[i];
    }
    free(wide);
    return error;
}

/* Configuration, sizes and tokens. Nothing of the file is believed: sizes are those of tensors that are there. */
static const char *read_inputs(Run *run) {
    const char *format = safetensors_metadata(run->file, "format"), *text = safetensors_metadata(run->file, "config");
    if (!format || strcmp(format, "megalodon-fixture-1") != 0)
        return errorf("expected the format \"megalodon-fixture-1\" in __metadata__, found %.80s",
                      format ? format : "none");
    if (!text) return "expected \"config\" in __metadata__, found none";
    const char *error = checkpoint_config_parse(text, &run->config);
    if (error) return error;
    if ((size_t)run->config.num_layers > run->file->count)
        return errorf("the configuration has %d layers, but the file only %zu tensors", run->config.num_layers,
                      run->file->count);
    CheckpointList list = {.items = NULL};
    error = checkpoint_list(&list, &run->config, MEGALODON_PARAM, 1, 0, "param.");
    if (!error) error = checkpoint_list_check(&list, run->file, "param.");
    free(list.items);
    const SafetensorsTensor *tokens, *targets;
    if (!error) error = find_tensor(run->file, "input.tokens", 2, &tokens);
    if (!error) error = find_tensor(run->file, "input.targets", 2, &targets);
    if (error) return error;
    if (tokens->size < 1 || tokens->size > INT32_MAX / 2 ||
        memcmp(tokens->dims, targets->dims, 2 * sizeof *tokens->dims) != 0)
        return "input.tokens and input.targets: expected equal shapes of at least one token";
    run->B = (int)tokens->dims[0];
    run->T = (int)tokens->dims[1];
    error = read_integers(tokens, 0, run->config.vocab_size, &run->tokens);
    if (!error) error = read_integers(targets, MEGALODON_IGNORE, run->config.vocab_size, &run->targets);
    return error;
}

static const char *load_parameters(Run *run) {
    CheckpointList list = {.backend = run->backend, .model = run->model};
    const char *error = checkpoint_list(&list, &run->config, MEGALODON_PARAM, 1, 0, "param.");
    if (!error) error = checkpoint_list_load(&list, run->file);
    free(list.items);
    return error;
}

/* ---- running ---- */

/* One number against a tensor of one element. */
static const char *compare_number(Run *run, const char *name, double ours, double tolerance) {
    const SafetensorsTensor *want = safetensors_find(run->file, name);
    if (!want) return NULL;
    if (want->size != 1) return errorf("tensor %s: expected one number, found %" PRId64, name, want->size);
    compare_values(run, want, &ours, tolerance);
    return NULL;
}

/* The outgoing count: one number for all rows. */
static const char *compare_count(Run *run) {
    const SafetensorsTensor *want = safetensors_find(run->file, "state_out.count");
    int64_t *ours = malloc((size_t)run->B * sizeof *ours);
    if (!want || !ours) {
        free(ours);
        return want ? "out of memory" : NULL;
    }
    const char *error = run->backend->get(run->model, MEGALODON_STATE, "count", ours, MEGALODON_I64);
    for (int b = 0; b < run->B && !error; b++)
        if (want->size < 1 || (double)ours[b] != safetensors_element(want, 0))
            error = errorf("state_out.count: row %d has read %" PRId64 " tokens", b, ours[b]);
    free(ours);
    if (!error) run->compared++;
    return error;
}

/* Forward and backward on input.*, from state_in.* if there is one. */
static const char *check_gradients_and_state(Run *run) {
    bool carry = safetensors_find(run->file, "state_in.count") != NULL;
    const char *error = carry ? checkpoint_state_read(run->file, "state_in.", run->backend, run->model, &run->config)
                              : NULL;
    MegalodonBatch batch = {.tokens = run->tokens, .targets = run->targets, .B = run->B, .T = run->T, .carry = carry};
    MegalodonLoss loss = {0, 0};
    if (!error) error = run->backend->forward(run->model, &batch, &loss);
    if (error) return error;
    double mean = loss.nll_sum / (double)loss.counted;
    error = compare_number(run, "loss", mean, run->forward_tolerance);
    const SafetensorsTensor *nll = safetensors_find(run->file, "nll");
    MegalodonTensor tensor;
    if (!error && nll) error = megalodon_find_tensor(&run->config, MEGALODON_ACT, run->B, run->T, 0, "nll", &tensor);
    if (!error && nll) error = compare_tensor(run, nll, MEGALODON_ACT, &tensor, run->forward_tolerance);
    if (!error) error = compare_kind(run, "act.", MEGALODON_ACT, run->forward_tolerance);
    if (!error) error = compare_kind(run, "state_out.", MEGALODON_STATE, run->forward_tolerance);
    if (!error) error = compare_count(run);
    if (!error) error = run->backend->backward(run->model, 1. / (double)loss.counted);
    if (!error) error = compare_kind(run, "grad.", MEGALODON_GRAD, run->backward_tolerance);
    if (!error && carry) error = compare_kind(run, "grad.state_in.", MEGALODON_GRAD_STATE_IN, run->backward_tolerance);
    return error;
}

/* A number of the "adamw" object. */
static const char *adamw_number(const Json *json, const char *key, double *value) {
    const JsonNode *node = json_get(json->root, key);
    if (!node || node->type != JSON_NUMBER) return errorf("adamw: expected a number \"%s\"", key);
    *value = node->number;
    return NULL;
}

static const char *read_adamw(const Run *run, MegalodonAdamW *adamw) {
    const char *text = safetensors_metadata(run->file, "adamw");
    Json json;
    if (!text) return "expected \"adamw\" in __metadata__ beside train.tokens, found none";
    const char *error = json_parse(&json, text, strlen(text));
    if (error) return errorf("adamw: %s", error);
    error = adamw_number(&json, "lr", &adamw->lr);
    if (!error) error = adamw_number(&json, "beta1", &adamw->beta1);
    if (!error) error = adamw_number(&json, "beta2", &adamw->beta2);
    if (!error) error = adamw_number(&json, "eps", &adamw->eps);
    if (!error) error = adamw_number(&json, "weight_decay", &adamw->weight_decay);
    if (!error) error = adamw_number(&json, "clip", &adamw->clip);
    json_free(&json);
    return error;
}

/* AdamW steps on train.tokens from param.*: losses, gradient norms, final parameters. */
static const char *train(Run *run, const SafetensorsTensor *tokens, const int32_t *all, double *losses, double *norms) {
    MegalodonAdamW adamw = {0};
    int B = (int)tokens->dims[1], T = (int)tokens->dims[2] - 1;
    int32_t *inputs = malloc((size_t)B * (size_t)T * sizeof *inputs + 1);
    int32_t *targets = malloc((size_t)B * (size_t)T * sizeof *targets + 1);
    const char *error = inputs && targets ? read_adamw(run, &adamw) : "out of memory";
    if (!error) error = load_parameters(run);
    for (int64_t s = 0; s < tokens->dims[0] && !error; s++) {
        for (int b = 0; b < B; b++)
            for (int t = 0; t < T; t++) {
                const int32_t *row = all + ((size_t)s * (size_t)B + (size_t)b) * (size_t)(T + 1);   /* tokens[s,b,:] */
                inputs[b * T + t] = row[t];
                targets[b * T + t] = row[t + 1];
            }
        MegalodonBatch batch = {.tokens = inputs, .targets = targets, .B = B, .T = T};
        MegalodonLoss loss;
        adamw.step = s + 1;
        run->backend->zero_gradients(run->model);
        error = run->backend->forward(run->model, &batch, &loss);
        if (error) break;
        losses[s] = loss.nll_sum / (double)loss.counted;
        error = run->backend->backward(run->model, 1. / (double)loss.counted);
        if (!error) error = run->backend->update(run->model, &adamw, &norms[s]);
    }
    free(inputs);
    free(targets);
    return error;
}

static const char *check_training(Run *run) {
    const SafetensorsTensor *tokens = safetensors_find(run->file, "train.tokens");
    if (!tokens) return NULL;
    if (tokens->ndim != 3 || tokens->size < 1 || tokens->dims[1] > run->B || tokens->dims[2] - 1 > run->T ||
        tokens->dims[2] < 2)
        return "tensor train.tokens: expected shape S,B,T+1 with batches no larger than input.tokens";
    int32_t *all = NULL;
    double *losses = calloc((size_t)tokens->dims[0], sizeof *losses);
    double *norms = calloc((size_t)tokens->dims[0], sizeof *norms);
    const char *error = losses && norms ? read_integers(tokens, 0, run->config.vocab_size, &all) : "out of memory";
    if (!error) error = train(run, tokens, all, losses, norms);
    const char *const names[] = {"train.losses", "train.grad_norms"};
    for (int i = 0; i < 2 && !error; i++) {
        const SafetensorsTensor *want = safetensors_find(run->file, names[i]);
        if (want && want->size != tokens->dims[0]) error = errorf("tensor %s: expected one number a step", names[i]);
        else if (want) compare_values(run, want, i ? norms : losses, run->backward_tolerance);
    }
    if (!error) error = compare_kind(run, "train.param.", MEGALODON_PARAM, run->backward_tolerance);
    free(all);
    free(losses);
    free(norms);
    return error;
}

/* Runs one file on one backend; what it compared is in `run`. */
static const char *run_file(Run *run) {
    const char *error = read_inputs(run);
    MegalodonOptions options = {.max_batch = run->B, .max_length = run->T, .training = true, .keep_activations = true,
                                .carry = true, .state_gradients = true};
    if (!error) error = run->backend->create(&run->model, &run->config, &options);
    if (!error) error = load_parameters(run);
    if (!error) error = check_gradients_and_state(run);
    if (!error) error = check_training(run);
    if (!error && run->compared == 0) error = "there is nothing in it to compare with";
    if (run->model) run->backend->destroy(run->model);
    free(run->tokens);
    free(run->targets);
    return error;
}

/* ---- the program ---- */

typedef struct Choice {
    const MegalodonBackend *backend;
    bool is_double, by_default;
} Choice;

static const Choice choices[] = {
    {&megalodon_cpu, false, true},
    {&megalodon_cpu_double, true, true},
#ifdef MEGALODON_WITH_CUDA
    {&megalodon_cuda, false, false},
#endif
};
enum { NUM_CHOICES = sizeof choices / sizeof *choices };

/* One line for one file: its verdict over the chosen backends. */
static void check_file(const char *path, const bool chosen[NUM_CHOICES]) {
    char line[2048];
    size_t length = 0;
    bool ok = true;
    Safetensors file;
    const char *error = safetensors_open(&file, path);
    if (error) {
        printf("FAIL %s\n", error);
        test.failed++;
        return;
    }
    for (int i = 0; i < NUM_CHOICES && length < sizeof line; i++) {
        if (!chosen[i]) continue;
        const char *name = choices[i].backend->name;
        Run run = {.file = &file, .backend = choices[i].backend, .forward_tolerance = FLOAT_FORWARD,
                   .backward_tolerance = FLOAT_BACKWARD};
        if (choices[i].is_double) run.forward_tolerance = run.backward_tolerance = DOUBLE_ALL;
        error = run_file(&run);
        if (error || run.failed) ok = false;
        if (error || run.failed) test.failed++;
        else test.passed++;
        if (error) length += (size_t)snprintf(line + length, sizeof line - length, "  %s: %s", name, error);
        else length += (size_t)snprintf(line + length, sizeof line - length, "  %s: %d tensors, worst %s %.1e", name,
                                        run.compared, run.worst, run.worst_error);
    }
    printf("%-4s %s%s\n", ok ? "ok" : "FAIL", path, line);
    safetensors_close(&file);
}

static void usage(void) {
    fprintf(stderr, "usage: test_golden [--backend NAME] [--double] FILE...\n  NAME: ");
    for (int i = 0; i < NUM_CHOICES; i++) fprintf(stderr, "%s%s", i ? ", " : "", choices[i].backend->name);
    fprintf(stderr, "; without it every file runs on the CPU in float and in double\n");
    exit(1);
}

/* Adds a backend to the chosen ones. */
static void choose(const char *name, bool chosen[NUM_CHOICES]) {
    for (int i = 0; i < NUM_CHOICES; i++) {
        if (strcmp(choices[i].backend->name, name) != 0) continue;
        chosen[i] = true;
        return;
    }
    fprintf(stderr, "test_golden: --backend %s is not built in\n", name);
    usage();
}

int main(int argc, char **argv) {
    bool chosen[NUM_CHOICES] = {false}, any = false;
    int first = 1;
    test_begin("golden");
    for (; first < argc && strncmp(argv[first], "--", 2) == 0; first++) {
        if (strcmp(argv[first], "--double") == 0) choose(megalodon_cpu_double.name, chosen);
        else if (strcmp(argv[first], "--backend") == 0 && first + 1 < argc) choose(argv[++first], chosen);
        else usage();
        any = true;
    }
    if (first >= argc) usage();
    for (int i = 0; i < NUM_CHOICES; i++) {
        if (!any) chosen[i] = choices[i].by_default;
        const char *why = chosen[i] ? choices[i].backend->unavailable() : NULL;
        if (!why) continue;
        chosen[i] = false;
        for (int f = first; f < argc; f++) test_skip(errorf("%s on %s: %s", argv[f], choices[i].backend->name, why));
    }
    any = false;
    for (int i = 0; i < NUM_CHOICES; i++) any = any || chosen[i];
    for (; first < argc && any; first++) check_file(argv[first], chosen);
    return test_end();
}
