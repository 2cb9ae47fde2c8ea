/* test_stress.c - numbers at the edge: large means, constant inputs, a million steps.
 *
 * Float is compared with double on the same inputs (those are rounded to float first). What can go wrong here does not
 * show in a gradient check on nice random numbers: a variance from a difference of squares, a running mean that stops
 * moving when 1/n falls below the last bit, powers of a decay that drift, an exponential that overflows.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "component.h"
#include "model.h"
#include "test.h"

static Port single, wide;            /* the two ports: float and double */

static MegalodonConfig narrow_config(void) {
    MegalodonConfig config;
    megalodon_default_config(&config);
    config.model_dim = 4;
    config.norm_num_groups = 2;
    config.cema_ndim = 4;
    config.num_heads = 1;
    config.z_dim = 8;
    config.value_dim = 8;
    config.ffn_hidden_dim = 8;
    config.chunk_size = 16;
    config.vocab_size = 29;
    return config;
}

static int find_arg(const Call *call, const char *name) {
    for (int i = 0; i < call->num_args; i++)
        if (!strcmp(call->component->args[i].name, name)) return i;
    fprintf(stderr, "%s has no argument %s\n", call->component->name, name);
    exit(1);
}

/* Runs two equal calls, one in float, one in double, and checks outputs and gradients against tolerances. */
static void compare_calls(Call *ours, Call *want, const char *what, double forward_tolerance,
                          double backward_tolerance) {
    call_round(ours, &single);
    call_round(want, &single);
    const char *error = call_run(ours, &single, true);
    check(!error, "%s: %s", what, error ? error : "");
    error = call_run(want, &wide, true);
    check(!error, "%s in double: %s", what, error ? error : "");
    double forward = 0, backward = 0;
    for (int i = 0; i < ours->num_args; i++) {
        const MegalodonArg *arg = &ours->component->args[i];
        if (call_is_output(arg->role)) {
            double e = relative_rms(ours->value[i], want->value[i], (size_t)ours->size[i]);
            check(e <= forward_tolerance, "%s: %s is off by %.2e", what, arg->name, e);
            forward = fmax(forward, e);
        } else if (call_has_gradient(arg->role) && ours->grad_present[i]) {
            double e = relative_rms(ours->grad[i], want->grad[i], (size_t)ours->size[i]);
            check(e <= backward_tolerance, "%s: gradient of %s is off by %.2e", what, arg->name, e);
            backward = fmax(backward, e);
        }
    }
    printf("%-56s forward %.1e  backward %.1e\n", what, forward, backward);
    call_destroy(ours);
    call_destroy(want);
}

typedef void Spoil(Call *call);

/* A component on random values that `spoil` changed. */
static void check_spoiled(MegalodonComponentId id, const char *what, const MegalodonShape *shape, bool with_state,
                          Spoil *spoil, double forward_tolerance, double backward_tolerance) {
    Call ours, want;
    call_create(&ours, id, shape, with_state, true, 8);
    call_create(&want, id, shape, with_state, true, 8);
    spoil(&ours);
    spoil(&want);
    compare_calls(&ours, &want, what, forward_tolerance, backward_tolerance);
}

/* ---- ways to spoil ---- */

static void add_to(Call *call, const char *name, double amount) {
    int i = find_arg(call, name);
    for (int64_t j = 0; j < call->size[i]; j++) call->value[i][j] += amount;
}
static void times(Call *call, const char *name, double amount) {
    int i = find_arg(call, name);
    for (int64_t j = 0; j < call->size[i]; j++) call->value[i][j] *= amount;
}
static void mean_1000(Call *call) { add_to(call, "x", 1e3); }
static void mean_1000_in_state(Call *call) {
    add_to(call, "x", 1e3);
    add_to(call, "mean_in", 1e3);
}
/* The first group of features (the first two of four) holds one number for all time. */
static void constant_group(Call *call) {
    int x = find_arg(call, "x"), D = call->shape.config.model_dim;
    for (int64_t j = 0; j < call->size[x]; j++)
        if (j % D < D / call->shape.config.norm_num_groups) call->value[x][j] = 0.7;
}
static void constant(Call *call) { times(call, "x", 0), add_to(call, "x", 0.7); }
static void zero(Call *call) { times(call, "x", 0); }
static void zero_heads(Call *call) { times(call, "zz", 0); }
static void tiny(Call *call) { times(call, "x", 1e-15); }
static void large_scores(Call *call) { times(call, "q", 30), times(call, "k", 30); }
static void medium_scores(Call *call) { times(call, "q", 8), times(call, "k", 8); }
static void large_logits(Call *call) { times(call, "logits", 300), add_to(call, "logits", 1e4); }
static void large_silu(Call *call) { times(call, "x", 200); }

static void check_spoiled_components(void) {
    MegalodonConfig config = narrow_config();
    MegalodonShape shape = {config, 2, 45, 0, 1, MEGALODON_FP32}, carried = {config, 2, 45, 5, 1, MEGALODON_FP32};
    /* A float near 1000 is known to 3e-5, but the inputs are rounded before: only the arithmetic counts. The
     * statistics that the backward is given are floats, which leaves 3e-5 of a standard deviation. */
    check_spoiled(MEGALODON_TIMESTEPNORM, "timestepnorm, mean 1e3", &shape, false, mean_1000, 1e-4, 1e-4);
    check_spoiled(MEGALODON_TIMESTEPNORM, "timestepnorm, mean 1e3, state in", &carried, true, mean_1000_in_state, 1e-4,
                  1e-4);
    check_spoiled(MEGALODON_LAYERNORM, "layernorm, mean 1e3", &shape, false, mean_1000, 1e-4, 3e-4);
    check_spoiled(MEGALODON_RMSNORM, "rmsnorm, mean 1e3", &shape, false, mean_1000, 1e-5, 1e-3);
    check_spoiled(MEGALODON_TIMESTEPNORM, "timestepnorm, a constant group", &shape, false, constant_group, 1e-4, 1e-3);
    check_spoiled(MEGALODON_LAYERNORM, "layernorm, constant", &shape, false, constant, 1e-4, 1e-4);
    check_spoiled(MEGALODON_TIMESTEPNORM, "timestepnorm, zero", &shape, false, zero, 1e-5, 1e-4);
    check_spoiled(MEGALODON_LAYERNORM, "layernorm, zero", &shape, false, zero, 1e-5, 1e-4);
    check_spoiled(MEGALODON_RMSNORM, "rmsnorm, zero", &shape, false, zero, 1e-5, 1e-4);
    check_spoiled(MEGALODON_ZNORM, "znorm, zero", &shape, false, zero_heads, 1e-5, 1e-4);
    check_spoiled(MEGALODON_TIMESTEPNORM, "timestepnorm, tiny", &shape, false, tiny, 1e-5, 1e-4);
    check_spoiled(MEGALODON_RMSNORM, "rmsnorm, tiny", &shape, false, tiny, 1e-5, 1e-4);
    /* Scores in the thousands: a softmax that does not subtract its maximum overflows. A float score of 4000 is known
     * to 2e-4, and so is the weight that an exponential makes of it. Most gradients vanish there, and what is left of
     * them comes from a few near ties: only their size is certain. */
    check_spoiled(MEGALODON_ATTENTION, "attention, scores in the thousands", &carried, true, large_scores, 1e-3, 0.3);
    check_spoiled(MEGALODON_ATTENTION, "attention, scores in the hundreds", &carried, true, medium_scores, 1e-4, 1e-2);
    check_spoiled(MEGALODON_CROSS_ENTROPY, "cross_entropy, logits near 1e4", &shape, false, large_logits, 1e-3, 1e-2);
    check_spoiled(MEGALODON_SILU, "silu, inputs in the hundreds", &shape, false, large_silu, 1e-5, 1e-4);
}

/* ---- a million steps ---- */

static long million = 1000000;

/* How a stream of inputs looks: mean, and a slow drift that the statistics have to follow. */
typedef struct Stream {
    MegalodonComponentId id;
    const char *what, *input, *output;
    double mean, drift;
    double decay;                    /* CEMA: added to alpha, makes its memory longer */
} Stream;

/* Inputs of a stream, the same however it is cut, rounded to float. */
static double *stream_inputs(const Stream *stream, int D) {
    double *x = host_allocate((size_t)(million * D) * sizeof *x);
    Random random = {99, 0};
    for (long t = 0; t < million; t++)
        for (int d = 0; d < D; d++)
            x[t * D + d] = (float)(stream->mean + stream->drift * (double)t / (double)million + draw_normal(&random));
    return x;
}

/* Weights that do not depend on the length of the call. */
static void stream_weights(const Stream *stream, Call *call) {
    for (int i = 0; i < call->num_args; i++) {
        const MegalodonArg *arg = &call->component->args[i];
        Random random = {500u + (uint64_t)i, 0};
        if (arg->role != MEGALODON_WEIGHT) continue;
        for (int64_t j = 0; j < call->size[i]; j++) {
            call->value[i][j] = call_random_value(call, arg, j, &random);
            if (!strcmp(arg->name, "alpha")) call->value[i][j] += stream->decay;
        }
    }
}

/* Copies the state that went out into the one that comes in: each NAME_out into NAME_in. */
static void carry_state(Call *call, long seen) {
    for (int i = 0; i < call->num_args; i++) {
        const MegalodonArg *arg = &call->component->args[i];
        if (arg->role != MEGALODON_STATE_OUT) continue;
        char name[32];
        snprintf(name, sizeof name, "%.*s_in", (int)(strlen(arg->name) - strlen("_out")), arg->name);
        int in = find_arg(call, name);
        memcpy(call->value[in], call->value[i], (size_t)call->size[i] * sizeof(double));
    }
    for (int i = 0; i < call->num_args; i++)
        if (!strcmp(call->component->args[i].name, "count"))
            for (int64_t j = 0; j < call->size[i]; j++) call->value[i][j] = (double)seen;
}

/* Runs the stream through a port in pieces of `piece` tokens; y gets the outputs. */
static void run_stream(const Stream *stream, const Port *port, const double *x, long piece, double *y) {
    MegalodonConfig config = narrow_config();
    int D = config.model_dim;
    Call call = {.num_args = 0};
    for (long start = 0; start < million; start += piece) {
        long T = start + piece <= million ? piece : million - start;
        if (call.num_args == 0 || T != call.shape.T) {
            /* The first piece, or a shorter last one: a call of this length, which takes the state over. */
            Call before = call;
            call_create(&call, stream->id, &(MegalodonShape){config, 1, (int)T, 0, 1, MEGALODON_FP32}, true, true, 3);
            stream_weights(stream, &call);
            for (int i = 0; i < call.num_args; i++) {
                MegalodonRole role = call.component->args[i].role;
                if (role != MEGALODON_STATE_IN && role != MEGALODON_STATE_OUT) continue;
                if (before.num_args) memcpy(call.value[i], before.value[i], (size_t)call.size[i] * sizeof(double));
                else memset(call.value[i], 0, (size_t)call.size[i] * sizeof(double));
            }
            call_destroy(&before);
        }
        carry_state(&call, start);
        memcpy(call.value[find_arg(&call, stream->input)], x + start * D, (size_t)(T * D) * sizeof *x);
        const char *error = call_run(&call, port, false);
        if (error) check(false, "%s: %s", stream->what, error);
        memcpy(y + start * D, call.value[find_arg(&call, stream->output)], (size_t)(T * D) * sizeof *y);
    }
    call_destroy(&call);
}

static void check_stream(const Stream *stream) {
    int D = narrow_config().model_dim;
    size_t size = (size_t)(million * D), last = size / 100;
    double *x = stream_inputs(stream, D);
    double *want = host_allocate(size * sizeof *want), *ours = host_allocate(size * sizeof *ours);
    run_stream(stream, &wide, x, million, want);
    const long pieces[] = {million, 997};
    for (int i = 0; i < 2; i++) {
        run_stream(stream, &single, x, pieces[i], ours);
        double whole = relative_rms(ours, want, size), end = relative_rms(ours + size - last, want + size - last, last);
        printf("%-40s in pieces of %7ld: float against double %.1e, at the end %.1e\n", stream->what, pieces[i], whole,
               end);
        check(whole <= 1e-4 && end <= 1e-4, "%s, pieces of %ld: off by %.2e, at the end by %.2e", stream->what,
              pieces[i], whole, end);
    }
    run_stream(stream, &wide, x, 997, ours);
    double split = relative_rms(ours, want, size);
    check(split <= 1e-11, "%s: in double, pieces differ from one call by %.2e", stream->what, split);
    free(x);
    free(want);
    free(ours);
}

static void check_streams(void) {
    const Stream streams[] = {
        {MEGALODON_TIMESTEPNORM, "timestepnorm", "x", "y", 0, 0, 0},
        {MEGALODON_TIMESTEPNORM, "timestepnorm, mean 1e3 and drifting", "x", "y", 1e3, 10, 0},
        {MEGALODON_CEMA, "cema", "u", "y", 0, 0, 0},
        {MEGALODON_CEMA, "cema, memory of thousands of steps", "u", "y", 0, 0, -8},
        {MEGALODON_CEMA, "cema, mean 1e3", "u", "y", 1e3, 10, -4},
    };
    for (size_t i = 0; i < sizeof streams / sizeof *streams; i++) check_stream(&streams[i]);
}

/* Forward and backward over many steps in one call: sums of that many terms in the gradients of the weights. */
static void check_long_gradients(void) {
    MegalodonShape shape = {narrow_config(), 1, (int)(million / 10), 0, 1, MEGALODON_FP32};
    static const MegalodonComponentId ids[] = {MEGALODON_TIMESTEPNORM, MEGALODON_CEMA, MEGALODON_RMSNORM,
                                               MEGALODON_LAYERNORM, MEGALODON_LINEAR};
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++) {
        Call ours, want;
        char what[64];
        snprintf(what, sizeof what, "%s, %d steps in one call", megalodon_components[ids[i]].name, shape.T);
        call_create(&ours, ids[i], &shape, false, true, 21);
        call_create(&want, ids[i], &shape, false, true, 21);
        compare_calls(&ours, &want, what, 1e-5, 1e-4);
    }
}

/* ---- a whole model whose activations have a mean of 1e3 ---- */

static void check_model_with_mean(void) {
    MegalodonConfig config = small_config();
    enum { B = 2, T = 40 };
    int32_t tokens[B * T];
    random_tokens(tokens, B * T, config.vocab_size, 5);
    MegalodonOptions options = {.max_batch = B, .max_length = T, .training = true, .keep_activations = true};
    MegalodonBatch batch = {.tokens = tokens, .targets = tokens, .B = B, .T = T};
    double *logits[2], *gradient[2];
    const MegalodonBackend *backends[2] = {&megalodon_cpu, &megalodon_cpu_double};
    int64_t size = 0, grad_size = 0;
    for (int i = 0; i < 2; i++) {
        MegalodonModel *model = model_create(backends[i], &config, &options, 4);
        double *embed = fetch(backends[i], model, &config, &batch, MEGALODON_PARAM, "embed.weight", &size);
        for (int64_t j = 0; j < size; j++) embed[j] = (float)(1e3 + embed[j] * sqrt(config.model_dim));
        must(backends[i]->set(model, MEGALODON_PARAM, "embed.weight", embed, MEGALODON_F64));
        free(embed);
        MegalodonLoss loss;
        must(backends[i]->forward(model, &batch, &loss));
        must(backends[i]->backward(model, 1. / (double)loss.counted));
        logits[i] = fetch(backends[i], model, &config, &batch, MEGALODON_ACT, "logits", &size);
        gradient[i] = fetch(backends[i], model, &config, &batch, MEGALODON_GRAD, "layers.0.mega.wz.weight", &grad_size);
        backends[i]->destroy(model);
    }
    double forward = relative_rms(logits[0], logits[1], (size_t)size);
    double backward = relative_rms(gradient[0], gradient[1], (size_t)grad_size);
    printf("%-56s forward %.1e  backward %.1e\n", "model, residual stream with mean 1e3", forward, backward);
    /* The residual stream itself is rounded to 3e-5 at each of the four hops. */
    check(forward <= 1e-3, "a model with a mean of 1e3: logits are off by %.2e", forward);
    check(backward <= 1e-2, "a model with a mean of 1e3: gradients are off by %.2e", backward);
    for (int i = 0; i < 2; i++) {
        free(logits[i]);
        free(gradient[i]);
    }
}

/* ---- the last positions of a long chunk, whose angles a float does not hold well enough: 6e-5 instead of 3e-8 ---- */

static void check_far_positions(void) {
    enum { T = 4096, SIZE = 16 };
    MegalodonShape shape = {.B = 1, .T = T};
    megalodon_default_config(&shape.config);
    shape.config.num_heads = 1;
    shape.config.z_dim = SIZE;
    shape.config.chunk_size = T;
    float *x = must_allocate(T * SIZE * sizeof *x), *y = must_allocate(T * SIZE * sizeof *y);
    for (int i = 0; i < T * SIZE; i++) x[i] = i % 2 ? 0 : 1;             /* turned, a pair (1, 0) is (cos, sin) */
    megalodon_cpu.components[MEGALODON_ROPE].forward((void *[]){y, x}, &shape);
    double largest = 0;
    int wrong = 0;
    for (int i = 0; i < T * SIZE; i++) {
        int pair = i % SIZE / 2;
        double angle = i / SIZE * pow(shape.config.rope_base, -2. * pair / SIZE);
        double off = fabs(y[i] - (i % 2 ? sin(angle) : cos(angle)));
        if (!(off <= 1e-7)) wrong++;
        largest = fmax(largest, off);
    }
    check(wrong == 0, "RoPE at positions up to %d: %d numbers are off, by up to %.1e", T - 1, wrong, largest);
    printf("RoPE at positions up to %d: off by at most %.1e\n", T - 1, largest);
    free(x);
    free(y);
}

int main(void) {
    test_begin("stress");
    if (getenv("MEGALODON_TEST_SHORT")) million = 50000;
    single = host_port(&megalodon_cpu, false);
    wide = host_port(&megalodon_cpu_double, true);
    check_spoiled_components();
    check_streams();
    check_long_gradients();
    check_model_with_mean();
    check_far_positions();
    return test_end();
}
