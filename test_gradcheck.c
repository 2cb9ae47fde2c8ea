/* test_gradcheck.c - every backward against finite differences of its forward, in double.
 *
 * The derivative of J along one entry x is taken from four values of J (central differences at h and 2h,
 * combined so that the h^2 terms cancel):
 *     dJ/dx = (8 (J(x+h) - J(x-h)) - (J(x+2h) - J(x-2h))) / (12 h) + O(h^4)
 * In double with h = 1e-3 that leaves some 1e-9 of a typical gradient, so a tolerance of 1e-6 sees any real
 * mistake. (In float the rounding of J alone hides errors under 1e-4: that is why this file compiles
 * megalodon.c in double.)
 *
 * First each component of megalodon_components: J is the sum of its outputs and its outgoing state, each
 * multiplied by a random number. Then whole tiny models, through the table that the programs use. Of a
 * large tensor a random subset of entries is taken, and one random direction through all of them, so that
 * no entry goes unseen.
 *
 * A test that cannot fail proves nothing: each gradient is also scaled by 1.01, and the same comparison
 * must reject it.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#define MEGALODON_REAL double
#include "megalodon.c"

#include "tests/component.h"
#include "tests/test.h"

static const double TOLERANCE = 1e-6;
static const double MUTATION = 1.01;
/* Gradients whose RMS is below this are zero for the finite differences, whose own noise is near 1e-12. */
static const double NEGLIGIBLE = 1e-9;

/* MEGALODON_TEST_SHORT: fewer entries of each tensor, for the sanitizers. */
static int max_entries = 40, max_model_entries = 16;

/* ---- the comparison ---- */

/* J as a function of numbers that lie in memory: value(context) reads them and computes J. */
typedef struct Function {
    double (*value)(void *context);
    void *context;
} Function;

/* dJ/ds at s = 0 of x + s * direction; direction NULL: along entry `entry`. x is left as it was. */
static double slope(const Function *f, double *x, int64_t size, const double *direction, int64_t entry) {
    static const double steps[4] = {1, -1, 2, -2};
    const double h = 1e-3;
    double values[4], *before = malloc((size_t)size * sizeof *before);
    if (!before) exit(1);
    memcpy(before, x, (size_t)size * sizeof *x);
    for (int s = 0; s < 4; s++) {
        if (direction) for (int64_t i = 0; i < size; i++) x[i] = before[i] + steps[s] * h * direction[i];
        else x[entry] = before[entry] + steps[s] * h;
        values[s] = f->value(f->context);
    }
    memcpy(x, before, (size_t)size * sizeof *x);
    free(before);
    return (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * h);
}

typedef struct Comparison {
    double error;      /* relative, over the tensor            */
    double mutated;    /* the same with the gradient times 1.01 */
    bool zero;         /* both gradients are negligible        */
} Comparison;

/* Compares a gradient of J with respect to x with finite differences. Every compared number, an entry's
 * derivative or the one along a direction as long as one entry, has the size of RMS(gradient): the error is
 * relative to that. */
static Comparison compare_gradient(const Function *f, double *x, int64_t size, const double *gradient,
                                   int entries, uint64_t seed) {
    Random random = {seed, 0};
    double *direction = malloc((size_t)size * sizeof *direction);
    if (!direction) exit(1);
    double square = 0, along = 0, difference = 0, mutated = 0, seen = 0, numeric = 0;
    for (int64_t i = 0; i < size; i++) {
        direction[i] = draw_normal(&random) / sqrt((double)size);
        square += gradient[i] * gradient[i];
        along += gradient[i] * direction[i];
    }
    int64_t samples = size <= entries ? size : entries;
    for (int64_t s = 0; s <= samples; s++) {
        int64_t entry = size <= entries ? s : draw_below(&random, size);
        double ours = s < samples ? gradient[entry] : along;
        double truth = slope(f, x, size, s < samples ? NULL : direction, entry);
        difference += (ours - truth) * (ours - truth);
        mutated += (MUTATION * ours - truth) * (MUTATION * ours - truth);
        seen += ours * ours;
        numeric += truth * truth;
    }
    free(direction);
    double count = (double)(samples + 1), mean = square / (double)size;
    double scale = sqrt(fmax(seen / count, mean));
    bool zero = scale < NEGLIGIBLE && sqrt(numeric / count) < NEGLIGIBLE;
    return (Comparison){zero ? 0 : sqrt(difference / count) / scale, zero ? 0 : sqrt(mutated / count) / scale,
                        zero};
}

/* What a printed line tells: the worst tensor of a case, and how far the mutation stood from the tolerance. */
typedef struct Summary {
    char worst[MEGALODON_MAX_NAME];
    double error, least_mutated;
    int tensors, zeros;
} Summary;

/* Counts both checks of a comparison. NaN fails the first (no comparison with NaN is true) and the second. */
static void count_comparison(Summary *summary, const char *where, const char *name, Comparison c) {
    check(c.error <= TOLERANCE, "%s: gradient of %s is off by %.2e", where, name, c.error);
    summary->tensors++;
    if (c.zero) summary->zeros++;
    else {
        check(c.mutated > TOLERANCE && isfinite(c.mutated), "%s: a gradient of %s that is 1%% off passed",
              where, name);
        if (summary->least_mutated == 0 || c.mutated < summary->least_mutated)
            summary->least_mutated = c.mutated;
    }
    if (summary->tensors == 1 || !(c.error <= summary->error)) {
        snprintf(summary->worst, sizeof summary->worst, "%s", name);
        summary->error = c.error;
    }
}

static void print_summary(const char *where, const Summary *summary) {
    printf("%-52s %3d tensors, worst %-30s %.1e, 1%% seen as %.1e", where, summary->tensors, summary->worst,
           summary->error, summary->least_mutated);
    if (summary->zeros) printf(", %d all zero", summary->zeros);
    printf("\n");
}

/* ---- components ---- */

/* Odd sizes on purpose: nothing is a multiple of a vector, heads and groups are 3. */
static MegalodonConfig odd_config(void) {
    MegalodonConfig config;
    megalodon_default_config(&config);
    config.num_layers = 2;
    config.model_dim = 15;
    config.num_heads = 3;
    config.z_dim = 18;
    config.value_dim = 21;
    config.ffn_hidden_dim = 13;
    config.cema_ndim = 5;
    config.chunk_size = 7;
    config.norm_num_groups = 3;
    config.vocab_size = 11;
    config.rope_base = 1e4;
    config.swiglu = true;
    return config;
}

/* J of a component call: sum of outputs times cotangents. */
static double component_objective(void *context) {
    Call *call = context;
    Port port = host_port(&megalodon_cpu_double, true);
    const char *error = call_run(call, &port, false);
    if (error) return NAN;
    double sum = 0;
    for (int i = 0; i < call->num_args; i++)
        if (call_has_cotangent(call->component->args[i].role) && call->grad_present[i])
            for (int64_t j = 0; j < call->size[i]; j++) sum += call->grad[i][j] * call->value[i][j];
    return sum;
}

static bool same_values(const double *a, const double *b, int64_t size, double tolerance) {
    for (int64_t i = 0; i < size; i++)
        if (!(fabs(a[i] - b[i]) <= tolerance * (1 + fabs(b[i])))) return false;
    return true;
}

/* Runs a call again whose gradients are known (`want`), and expects the same ones. start: what the
 * gradients of the weights are filled with before, as the backward is to add to it. */
static void check_same_gradients(Call *call, const Port *port, double *const *want, double start,
                                 const char *where, const char *why) {
    for (int i = 0; i < call->num_args; i++)
        if (call->component->args[i].role == MEGALODON_WEIGHT)
            for (int64_t j = 0; j < call->size[i]; j++) call->grad[i][j] = start;
    const char *error = call_run(call, port, true);
    check(!error, "%s: %s", where, error ? error : "");
    for (int i = 0; i < call->num_args; i++) {
        const MegalodonArg *arg = &call->component->args[i];
        if (!call->grad_present[i]) continue;
        if (arg->role == MEGALODON_WEIGHT)
            for (int64_t j = 0; j < call->size[i]; j++) call->grad[i][j] -= start;
        check(same_values(call->grad[i], want[i], call->size[i], 1e-11), "%s: gradient of %s %s", where,
              arg->name, why);
    }
}

/* The rules of gradients: a weight's is added to what is there, an input's is written whatever was there
 * (call_run fills it with NaN), and one of an incoming state that nobody wants (NULL) changes no other. */
static void check_gradient_rules(Call *call, const Port *port, const char *where) {
    double *want[MEGALODON_MAX_ARGS] = {NULL};
    bool stateful = false;
    for (int i = 0; i < call->num_args; i++) {
        want[i] = host_allocate((size_t)(call->size[i] + 1) * sizeof(double));
        memcpy(want[i], call->grad[i], (size_t)call->size[i] * sizeof(double));
        stateful = stateful || call->component->args[i].role == MEGALODON_STATE_IN;
    }
    check_same_gradients(call, port, want, 0.625, where, "is not added to what is there, or not written");
    for (int i = 0; i < call->num_args; i++)
        if (call->component->args[i].role == MEGALODON_STATE_IN) call->grad_present[i] = false;
    if (stateful)
        check_same_gradients(call, port, want, 0, where, "depends on whether the state's is wanted");
    for (int i = 0; i < call->num_args; i++) free(want[i]);
}

/* One component on one shape: all its gradients, then their rules. */
static void check_component(MegalodonComponentId id, const char *what, const MegalodonShape *shape,
                            bool with_state, bool with_optional, bool state_cotangents) {
    char where[128];
    snprintf(where, sizeof where, "%s, %s, B=%d T=%d n=%d", megalodon_components[id].name, what, shape->B,
             shape->T, shape->n);
    Call call;
    Port port = host_port(&megalodon_cpu_double, true);
    call_create(&call, id, shape, with_state, with_optional, 1000u + (uint64_t)id);
    for (int i = 0; i < call.num_args; i++)
        if (!state_cotangents && call.component->args[i].role == MEGALODON_STATE_OUT)
            call.grad_present[i] = false;
    const char *error = call_run(&call, &port, true);
    check(!error, "%s: %s", where, error ? error : "");
    Summary summary = {.error = 0};
    Function f = {component_objective, &call};
    for (int i = 0; i < call.num_args; i++) {
        const MegalodonArg *arg = &call.component->args[i];
        if (!call.grad_present[i] || !call_has_gradient(arg->role) || call.size[i] == 0) continue;
        count_comparison(
            &summary, where, arg->name,
            compare_gradient(&f, call.value[i], call.size[i], call.grad[i], max_entries, (uint64_t)i));
    }
    check_gradient_rules(&call, &port, where);
    print_summary(where, &summary);
    call_destroy(&call);
}

static bool has_role(MegalodonComponentId id, MegalodonRole role) {
    for (const MegalodonArg *arg = megalodon_components[id].args; arg->name; arg++)
        if (arg->role == role) return true;
    return false;
}

static bool has_optional(MegalodonComponentId id) {
    for (const MegalodonArg *arg = megalodon_components[id].args; arg->name; arg++)
        if (call_is_optional(&megalodon_components[id], arg)) return true;
    return false;
}

static void check_components(void) {
    for (int i = 0; i < MEGALODON_NUM_COMPONENTS; i++) {
        MegalodonComponentId id = (MegalodonComponentId)i;
        bool stateful = has_role(id, MEGALODON_STATE_IN);
        MegalodonConfig config = odd_config(), other = config;
        /* 17 tokens from the third of a chunk of 7 on: a partial chunk, two whole ones, a partial one. */
        check_component(id, stateful ? "state in" : "plain",
                        &(MegalodonShape){config, 2, 17, 3, 5, MEGALODON_FP32}, true, true, true);
        if (stateful) {
            check_component(id, "no state", &(MegalodonShape){config, 2, 17, 0, 5, MEGALODON_FP32}, false,
                            true, true);
            check_component(id, "empty state", &(MegalodonShape){config, 3, 8, 0, 5, MEGALODON_FP32}, true,
                            true, true);
            check_component(id, "state in, no gradient out",
                            &(MegalodonShape){config, 2, 9, 4, 5, MEGALODON_FP32}, true, true, false);
        }
        if (has_optional(id))
            check_component(id, "no weights", &(MegalodonShape){config, 2, 9, 0, 5, MEGALODON_FP32}, true,
                            false, true);
        /* Wider than the blocks of columns that a thread owns. */
        other.model_dim = 70;
        other.norm_num_groups = 2;
        other.value_dim = 105;
        other.ffn_hidden_dim = 67;
        other.vocab_size = 83;
        check_component(id, "wide", &(MegalodonShape){other, 2, 6, 5, 5, MEGALODON_FP32}, true, true, true);
        other = config;
        /* The last token of a chunk, alone. */
        check_component(id, "one token", &(MegalodonShape){config, 3, 1, 6, 5, MEGALODON_FP32}, true, true,
                        true);
        other.dropout = 0.3;
        other.hidden_dropout = 0.2;
        other.attention_dropout = 0.4;
        other.scale_emb = true;
        check_component(id, "dropout", &(MegalodonShape){other, 2, 15, 2, 9, MEGALODON_FP32}, true, true,
                        true);
        /* Everything that can be one is one, and one group holds one feature, whose norm is all epsilon: a
         * larger one, since the differences cannot follow a step of width sqrt(eps). */
        other = config;
        other.num_heads = other.cema_ndim = other.chunk_size = other.model_dim = other.norm_num_groups = 1;
        other.norm_eps = 0.1;
        check_component(id, "ones", &(MegalodonShape){other, 2, 5, 0, 5, MEGALODON_FP32}, stateful, true,
                        true);
    }
    /* Long enough for a scan in blocks to hand its state on several times, and to start again in the middle
     * of one. */
    MegalodonConfig narrow = odd_config();
    narrow.model_dim = 2;
    narrow.norm_num_groups = 1;
    narrow.cema_ndim = 3;
    check_component(MEGALODON_CEMA, "long", &(MegalodonShape){narrow, 2, 301, 3, 5, MEGALODON_FP32}, true,
                    true, true);
    check_component(MEGALODON_TIMESTEPNORM, "long", &(MegalodonShape){narrow, 2, 301, 3, 5, MEGALODON_FP32},
                    true, true, true);
    /* Chunks of several blocks of queries, the first of them begun. */
    narrow.chunk_size = 97;
    narrow.num_heads = 2;
    narrow.z_dim = narrow.value_dim = 4;
    narrow.attention_dropout = 0.1;
    check_component(MEGALODON_ATTENTION, "long", &(MegalodonShape){narrow, 2, 150, 40, 5, MEGALODON_FP32},
                    true, true, true);
}

/* ---- whole models ---- */

enum { MAX_TENSORS = 80 };

typedef struct ModelCase {
    const char *name;
    MegalodonConfig config;
    int B, T, n;
    bool carry, dropout;
} ModelCase;

/* A tensor with the values that the finite differences move and the gradient that the backward gave. */
typedef struct Variable {
    MegalodonTensor tensor;
    MegalodonKind kind;
    double *value, *gradient;
} Variable;

/* A model, its batch, and J = mean loss + <cotangents, state that goes out>. */
typedef struct Problem {
    const ModelCase *model_case;
    MegalodonModel *model;
    MegalodonBatch batch;
    int64_t count[8];
    double scale;
    Variable variables[2 * MAX_TENSORS];
    int num_variables, num_out;
    Variable out[MAX_TENSORS];           /* gradient: the cotangents; value: where the state is fetched to */
} Problem;

static const MegalodonBackend *const backend = &megalodon_cpu_double;

/* Stops at an error that no check expects. */
static void must(const char *error) {
    if (!error) return;
    fprintf(stderr, "test_gradcheck: %s\n", error);
    exit(1);
}

/* Runs the forward from the problem's values: parameters, incoming state. */
static MegalodonLoss problem_forward(Problem *p) {
    MegalodonLoss loss;
    if (p->batch.carry) must(backend->start_state(p->model, p->batch.B, p->count));
    for (int i = 0; i < p->num_variables; i++)
        must(backend->set(p->model, p->variables[i].kind, p->variables[i].tensor.name, p->variables[i].value,
                          MEGALODON_F64));
    must(backend->forward(p->model, &p->batch, &loss));
    return loss;
}

static double problem_objective(void *context) {
    Problem *p = context;
    double sum = p->scale * problem_forward(p).nll_sum;
    for (int i = 0; i < p->num_out; i++) {
        Variable *out = &p->out[i];
        must(backend->get(p->model, MEGALODON_STATE, out->tensor.name, out->value, MEGALODON_F64));
        for (int64_t j = 0; j < out->tensor.size; j++) sum += out->gradient[j] * out->value[j];
    }
    return sum;
}

/* Small random values near those of a model in training: norms near 1, everything else of the size of its
 * init. */
static void random_tensor(Variable *variable, Random *random, double size) {
    int64_t n = variable->tensor.size;
    variable->value = host_allocate((size_t)(n + 1) * sizeof(double));
    variable->gradient = host_allocate((size_t)(n + 1) * sizeof(double));
    bool is_var = strstr(variable->tensor.name, "norm.var") != NULL;
    for (int64_t j = 0; j < n; j++) {
        double x = draw_normal(random);
        variable->value[j] = is_var && variable->kind == MEGALODON_STATE ? 0.3 + fabs(x) : size * x;
        variable->gradient[j] = 0.1 * draw_normal(random);
    }
}

/* Lists what J depends on, with random values: every parameter, and the state that comes in. */
static void problem_create(Problem *p, const ModelCase *c, int32_t *tokens, int32_t *targets,
                           Random *random) {
    *p = (Problem){.model_case = c};
    MegalodonTensor list[MAX_TENSORS];
    int counted = 0, vocabulary = c->config.vocab_size;
    for (int i = 0; i < c->B * c->T; i++) {
        tokens[i] = (int32_t)draw_below(random, vocabulary);
        targets[i] = i % 7 == 3 ? MEGALODON_IGNORE : (int32_t)draw_below(random, vocabulary);
        counted += targets[i] != MEGALODON_IGNORE;
    }
    p->scale = 1. / counted;
    p->batch = (MegalodonBatch){tokens, targets, c->B, c->T, c->carry, c->dropout, 11, 3};
    for (int b = 0; b < c->B; b++) p->count[b] = c->n + (int64_t)c->config.chunk_size * (b + 1);
    MegalodonOptions options = {.max_batch = c->B, .max_length = c->T, .training = true, .carry = c->carry,
                                .state_gradients = c->carry};
    must(megalodon_validate(&c->config));
    must(backend->create(&p->model, &c->config, &options));
    int num = megalodon_tensors(&c->config, MEGALODON_PARAM, c->B, c->T, c->n, list, MAX_TENSORS);
    for (int i = 0; i < num; i++) {
        Variable *variable = &p->variables[p->num_variables++];
        *variable = (Variable){list[i], MEGALODON_PARAM, NULL, NULL};
        bool matrix = list[i].ndim == 2 && list[i].dims[1] > 2 && list[i].init != MEGALODON_INIT_ZERO;
        random_tensor(variable, random, matrix ? 1 / sqrt((double)list[i].dims[1]) : 0.4);
    }
    if (!c->carry) return;
    num = megalodon_tensors(&c->config, MEGALODON_STATE, c->B, c->T, c->n, list, MAX_TENSORS);
    for (int i = 0; i < num; i++) {
        if (!strcmp(list[i].name, "count")) continue;
        Variable *variable = &p->variables[p->num_variables++];
        *variable = (Variable){list[i], MEGALODON_STATE, NULL, NULL};
        random_tensor(variable, random, 0.5);
    }
    num = megalodon_tensors(&c->config, MEGALODON_STATE, c->B, c->T, (c->n + c->T) % c->config.chunk_size,
                            list, MAX_TENSORS);
    for (int i = 0; i < num; i++) {
        if (!strcmp(list[i].name, "count")) continue;
        p->out[p->num_out] = (Variable){list[i], MEGALODON_GRAD_STATE_OUT, NULL, NULL};
        random_tensor(&p->out[p->num_out++], random, 0);
    }
}

static void problem_destroy(Problem *p) {
    for (int i = 0; i < p->num_variables; i++) {
        free(p->variables[i].value);
        free(p->variables[i].gradient);
    }
    for (int i = 0; i < p->num_out; i++) {
        free(p->out[i].value);
        free(p->out[i].gradient);
    }
    backend->destroy(p->model);
}

/* Forward and backward; leaves every gradient in its variable. */
static void problem_backward(Problem *p) {
    problem_forward(p);
    for (int i = 0; i < p->num_out; i++)
        must(backend->set(p->model, MEGALODON_GRAD_STATE_OUT, p->out[i].tensor.name, p->out[i].gradient,
                          MEGALODON_F64));
    must(backend->backward(p->model, p->scale));
    for (int i = 0; i < p->num_variables; i++) {
        Variable *variable = &p->variables[i];
        MegalodonKind kind = variable->kind == MEGALODON_PARAM ? MEGALODON_GRAD : MEGALODON_GRAD_STATE_IN;
        must(backend->get(p->model, kind, variable->tensor.name, variable->gradient, MEGALODON_F64));
    }
}

/* Backward twice without zero_gradients: the parameters' gradients add up, the state's are written anew. */
static void check_accumulation(Problem *p, const char *where) {
    double *once[2 * MAX_TENSORS];
    for (int i = 0; i < p->num_variables; i++) {
        size_t bytes = (size_t)p->variables[i].tensor.size * sizeof(double);
        once[i] = host_allocate(bytes + sizeof(double));
        memcpy(once[i], p->variables[i].gradient, bytes);
    }
    backend->zero_gradients(p->model);
    problem_backward(p);
    problem_backward(p);
    for (int i = 0; i < p->num_variables; i++) {
        const Variable *variable = &p->variables[i];
        double times = variable->kind == MEGALODON_PARAM ? 2 : 1;
        for (int64_t j = 0; j < variable->tensor.size; j++) once[i][j] *= times;
        check(same_values(variable->gradient, once[i], variable->tensor.size, 1e-11),
              "%s: two backwards give %s another gradient than %g times one", where, variable->tensor.name,
              times);
        free(once[i]);
    }
}

static void check_model(const ModelCase *c) {
    Random random = {123, 0};
    int32_t tokens[128], targets[128];
    static Problem problem;
    Problem *p = &problem;
    problem_create(p, c, tokens, targets, &random);
    char where[128];
    snprintf(where, sizeof where, "model, %s, B=%d T=%d n=%d", c->name, c->B, c->T, c->n);
    backend->zero_gradients(p->model);
    problem_backward(p);
    Summary summary = {.error = 0};
    Function f = {problem_objective, p};
    for (int i = 0; i < p->num_variables; i++) {
        Variable *variable = &p->variables[i];
        char name[MEGALODON_MAX_NAME + 16];
        snprintf(name, sizeof name, "%s%s", variable->kind == MEGALODON_STATE ? "state " : "",
                 variable->tensor.name);
        if (variable->tensor.size == 0) continue;
        count_comparison(&summary, where, name,
                         compare_gradient(&f, variable->value, variable->tensor.size, variable->gradient,
                                          max_model_entries, (uint64_t)i));
    }
    check_accumulation(p, where);
    print_summary(where, &summary);
    problem_destroy(p);
}

static void check_models(void) {
    MegalodonConfig plain = odd_config(), everything = plain, bare = plain, dropout = plain, ones = plain,
                    tied;
    plain.swiglu = false;
    everything.rescale_nffn = everything.scale_emb = everything.share_emb = true;
    bare.norm_affine = false;
    dropout.dropout = 0.2;
    dropout.hidden_dropout = 0.3;
    dropout.attention_dropout = 0.25;
    dropout.rescale_nffn = true;
    tied = dropout;
    tied.share_emb = tied.scale_emb = true;
    /* One head, one group, one state, chunks of two. */
    ones.num_heads = ones.norm_num_groups = ones.cema_ndim = ones.num_layers = 1;
    ones.chunk_size = 2;
    const ModelCase cases[] = {
        {"plain", plain, 2, 17, 0, false, false},
        {"swiglu, rescale, tied, scaled", everything, 2, 16, 0, false, false},
        {"no affine", bare, 3, 9, 0, false, false},
        {"all dropouts", dropout, 2, 15, 0, false, true},
        {"state in and out", plain, 3, 15, 3, true, false},
        {"state in and out, all dropouts, tied", tied, 2, 13, 6, true, true},
        {"state at a chunk's start", bare, 2, 8, 0, true, false},
        {"one token", plain, 2, 1, 2, true, false},
        {"ones", ones, 2, 7, 0, false, false},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        check_model(&cases[i]);
    }
}

int main(void) {
    if (getenv("MEGALODON_TEST_SHORT")) max_entries = 6, max_model_entries = 1;
    test_begin("gradcheck");
    check_components();
    check_models();
    return test_end();
}
