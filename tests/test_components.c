/* test_components.c - every component, forward and backward, of one backend against another.
 *
 * The reference is the double version of megalodon.c, whose gradients test_gradcheck has compared with finite
 * differences. A candidate gets the same inputs, rounded to its own types first, so that only its arithmetic differs.
 * A line a case tells the relative RMS error and the largest error (relative to the RMS of the tensor) of the worst
 * output and of the worst gradient.
 *
 * Tolerances: a float has 24 bits, so one rounding is 6e-8 and sums of some hundred terms stay under 1e-6. 1e-5 for
 * outputs and 1e-4 for gradients (which pass through more sums, and through differences in the norms) leave room for
 * another order of summation, and none for a wrong term. A bf16 tensor may differ more, see rounding_tolerance.
 *
 *     test_components [--short] [--backend NAME,...] [--only COMPONENT,...]
 *
 * The short form is for tools under which every kernel takes a hundred times as long: the smallest sizes at which each
 * variant of each kernel still runs, in all of its branches.
 *
 * A new backend joins by one entry in `candidates`: its types, and four functions that reach its memory.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "component.h"
#include "test.h"

#ifdef MEGALODON_WITH_CUDA
#include "../cuda/megalodon_cuda.h"
#endif

typedef struct Candidate {
    const MegalodonBackend *backend;
    Port port;
    MegalodonPrecision precision;
    bool large;                              /* fast enough for the large shapes */
} Candidate;

static const double FORWARD_TOLERANCE = 1e-5, BACKWARD_TOLERANCE = 1e-4;

/* What a tensor in bf16 may differ more: twice what rounding the exact result to bf16 does to it, once for the rounding
 * that any correct kernel makes at the end, once for those of operands on the way. 0 for every other type. */
static double rounding_tolerance(const Candidate *candidate, const MegalodonArg *arg, const double *want,
                                 int64_t size) {
    if (port_dtype(&candidate->port, arg->type) != MEGALODON_BF16) return 0;
    double *rounded = host_allocate((size_t)(size + 1) * sizeof *rounded);
    uint16_t cell;
    for (int64_t i = 0; i < size; i++) {
        dtype_store(MEGALODON_BF16, &cell, 0, want[i]);
        rounded[i] = dtype_load(MEGALODON_BF16, &cell, 0);
    }
    double error = relative_rms(rounded, want, (size_t)size);
    free(rounded);
    return 2 * error;
}

/* The worst tensor of a case, by error / tolerance. */
typedef struct Worst {
    const char *name;
    double rms, largest, ratio;
} Worst;

/* Compares one tensor with a tolerance, and remembers it if it is the worst so far. NaN is infinitely wrong. */
static void compare_tensor(Worst *worst, const char *name, const double *ours, const double *want, int64_t size,
                           double tolerance) {
    double scale = test_rms(want, (size_t)size), largest = 0;
    double rms = relative_rms(ours, want, (size_t)size);
    for (int64_t i = 0; i < size; i++) largest = worse(largest, fabs(ours[i] - want[i]));
    if (worst->name && rms / tolerance <= worst->ratio) return;
    *worst = (Worst){name, rms, scale > 0 ? largest / scale : largest, rms / tolerance};
}

/* Runs a component on both ports and counts two checks: its outputs and its gradients. */
static void check_component(const Candidate *candidate, const Port *reference, MegalodonComponentId id,
                            const char *what, const MegalodonShape *fp32_shape, bool with_state, bool with_optional) {
    char where[128];
    MegalodonShape shape = *fp32_shape;
    shape.precision = candidate->precision;
    snprintf(where, sizeof where, "%s %s, %s, B=%d T=%d n=%d", candidate->port.name, megalodon_components[id].name,
             what, shape.B, shape.T, shape.n);
    Call ours, want;
    call_create(&ours, id, &shape, with_state, with_optional, 40u + (uint64_t)id);
    call_create(&want, id, fp32_shape, with_state, with_optional, 40u + (uint64_t)id);
    call_round(&ours, &candidate->port);
    call_round(&want, &candidate->port);
    const char *error = call_run(&ours, &candidate->port, true);
    check(!error, "%s: %s", where, error ? error : "");
    error = call_run(&want, reference, true);
    check(!error, "%s: reference: %s", where, error ? error : "");
    Worst forward = {.name = NULL}, backward = {.name = NULL};
    for (int i = 0; i < ours.num_args; i++) {
        const MegalodonArg *arg = &ours.component->args[i];
        int64_t size = ours.size[i];
        if (call_is_output(arg->role))
            compare_tensor(&forward, arg->name, ours.value[i], want.value[i], size,
                           FORWARD_TOLERANCE + rounding_tolerance(candidate, arg, want.value[i], size));
        if (call_has_gradient(arg->role) && ours.grad_present[i])
            compare_tensor(&backward, arg->name, ours.grad[i], want.grad[i], size,
                           BACKWARD_TOLERANCE + rounding_tolerance(candidate, arg, want.grad[i], size));
    }
    const char *in = backward.name ? backward.name : "-";
    check(forward.ratio <= 1, "%s: %s is off by %.2e, %.1f times what it may", where, forward.name, forward.rms,
          forward.ratio);
    check(backward.ratio <= 1, "%s: gradient of %s is off by %.2e, %.1f times what it may", where, in, backward.rms,
          backward.ratio);
    printf("%-64s forward %-8s %.1e (max %.1e)  backward %-8s %.1e (max %.1e)\n", where, forward.name, forward.rms,
           forward.largest, in, backward.rms, backward.largest);
    call_destroy(&ours);
    call_destroy(&want);
}

static MegalodonConfig odd_config(void) {
    MegalodonConfig config;
    megalodon_default_config(&config);
    config.model_dim = 45;
    config.num_heads = 3;
    config.z_dim = 30;
    config.value_dim = 51;
    config.ffn_hidden_dim = 37;
    config.cema_ndim = 5;
    config.chunk_size = 13;
    config.norm_num_groups = 5;
    config.vocab_size = 101;
    return config;
}

static bool has_role(MegalodonComponentId id, MegalodonRole role) {
    for (const MegalodonArg *arg = megalodon_components[id].args; arg->name; arg++)
        if (arg->role == role) return true;
    return false;
}

/* Rows and heads too large for a block of threads to hold at once. */
static MegalodonConfig wide_config(void) {
    MegalodonConfig config = odd_config();
    config.model_dim = 1284;
    config.value_dim = 1281;
    config.ffn_hidden_dim = config.z_dim = 1030;
    config.num_heads = 1;
    config.cema_ndim = 2;
    config.norm_num_groups = 3;
    return config;
}

/* CEMA with more states than a launch takes, channels that are read eight at a time, and time in segments of which the
 * last one is shorter and no whole number of groups. */
static void check_many_states(const Candidate *candidate, const Port *reference) {
    MegalodonShape shape = {odd_config(), 2, 333, 3, 3, MEGALODON_FP32};
    shape.config.model_dim = 40;
    shape.config.cema_ndim = 20;
    check_component(candidate, reference, MEGALODON_CEMA, "20 states", &shape, true, true);
}

/* Rows of a norm that one, two, four or eight warps hold, and more of them than all blocks take in four turns. */
static void check_row_lengths(const Candidate *candidate, const Port *reference, MegalodonComponentId id) {
    static const int lengths[] = {384, 512, 1024, 2048, 4096};
    MegalodonConfig rows = wide_config();
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        rows.model_dim = lengths[i];
        check_component(candidate, reference, id, "rows",
                        &(MegalodonShape){rows, 1, lengths[i] == 2048 ? 1700 : 37, 0, 3, MEGALODON_FP32}, true, true);
    }
}

/* The short form. A GPU's kernels come in variants by the width of what may be loaded at once, and treat long rows,
 * many rows and long times in their own ways. */
static void check_briefly(const Candidate *candidate, const Port *reference, MegalodonComponentId id) {
    MegalodonConfig odd = odd_config(), dropout = odd, even = odd, half = odd, wide = wide_config(), few = odd;
    bool stateful = has_role(id, MEGALODON_STATE_IN);
    check_component(candidate, reference, id, "no state", &(MegalodonShape){odd, 3, 17, 0, 3, MEGALODON_FP32}, false,
                    false);
    if (stateful)
        check_component(candidate, reference, id, "state in", &(MegalodonShape){odd, 1, 9, 5, 3, MEGALODON_FP32}, true,
                        true);
    dropout.dropout = dropout.hidden_dropout = dropout.attention_dropout = 0.25;
    check_component(candidate, reference, id, "dropout", &(MegalodonShape){dropout, 2, 31, 2, 3, MEGALODON_FP32}, true,
                    true);
    /* Loads of 16 bytes, and of 8. */
    even.model_dim = 80, even.num_heads = 2, even.z_dim = 32, even.value_dim = 48, even.ffn_hidden_dim = 40;
    even.cema_ndim = 16, even.chunk_size = 16, even.vocab_size = 104, even.attention_dropout = even.dropout = 0.25;
    even.hidden_dropout = 0.25;
    check_component(candidate, reference, id, "even", &(MegalodonShape){even, 2, 37, 3, 3, MEGALODON_FP32}, true, true);
    half = even, half.model_dim = candidate->precision == MEGALODON_FP32 ? 30 : 60, half.num_heads = 1;
    half.z_dim = half.value_dim = half.model_dim, half.dropout = half.hidden_dropout = half.attention_dropout = 0;
    check_component(candidate, reference, id, "half", &(MegalodonShape){half, 2, 37, 3, 3, MEGALODON_FP32}, true, true);
    if (id == MEGALODON_LINEAR) { // few rows, and one
        check_component(candidate, reference, id, "few", &(MegalodonShape){even, 4, 2, 0, 3, MEGALODON_FP32}, true,
                        true);
        check_component(candidate, reference, id, "one", &(MegalodonShape){even, 1, 1, 0, 3, MEGALODON_FP32}, true,
                        true);
        check_component(candidate, reference, id, "one", &(MegalodonShape){odd, 1, 1, 0, 3, MEGALODON_FP32}, true,
                        true);
    }
    if (id == MEGALODON_TIMESTEPNORM) { // groups of many features
        MegalodonConfig group = odd;
        group.norm_num_groups = half.norm_num_groups = 1;
        check_component(candidate, reference, id, "group", &(MegalodonShape){group, 2, 70, 3, 3, MEGALODON_FP32}, true,
                        true);
        check_component(candidate, reference, id, "group, half", &(MegalodonShape){half, 2, 70, 3, 3, MEGALODON_FP32},
                        true, true);
    }
    /* With and without wide loads. */
    bool products = id == MEGALODON_LINEAR || id == MEGALODON_ATTENTION;
    for (int i = 0; i < 2 && !products; i++) {
        check_component(candidate, reference, id, "wide", &(MegalodonShape){wide, 2, 5, 3, 3, MEGALODON_FP32}, true,
                        true);
        wide.model_dim = wide.value_dim = wide.ffn_hidden_dim = wide.z_dim = wide.vocab_size = 2304;
    }
    if (id == MEGALODON_RMSNORM || id == MEGALODON_LAYERNORM) check_row_lengths(candidate, reference, id);
    if (id == MEGALODON_RMSNORM || id == MEGALODON_LAYERNORM) // more rows than all blocks take in one turn
        check_component(candidate, reference, id, "many rows", &(MegalodonShape){wide, 1, 800, 0, 3, MEGALODON_FP32},
                        true, true);
    if (id == MEGALODON_CEMA) check_many_states(candidate, reference);
    /* Time for which sums get one more level, and tokens with many rows. */
    few.model_dim = few.z_dim = few.value_dim = few.vocab_size = 6, few.cema_ndim = 2, few.norm_num_groups = 3;
    if (id == MEGALODON_TIMESTEPNORM || id == MEGALODON_CEMA || id == MEGALODON_EMBEDDING)
        check_component(candidate, reference, id, "long", &(MegalodonShape){few, 4, 1100, 4, 3, MEGALODON_FP32}, true,
                        true);
    /* Rows of scores held by one, two, four or eight warps, and longer ones: most of a chunk comes from the state. */
    static const int keys[] = {300, 900, 1900, 4000, 4200};
    for (size_t i = 0; i < sizeof keys / sizeof *keys && id == MEGALODON_ATTENTION; i++) {
        few.chunk_size = keys[i] + 64, few.num_heads = 1, few.z_dim = few.value_dim = 24;
        check_component(candidate, reference, id, "long chunk",
                        &(MegalodonShape){few, 1, 64, keys[i], 3, MEGALODON_FP32}, true, true);
    }
}

/* All shapes of one component: T around the chunk size, a prime, 1; with and without a state; then real sizes. */
static void check_shapes(const Candidate *candidate, const Port *reference, MegalodonComponentId id) {
    MegalodonConfig odd = odd_config(), real, dropout = odd, wide = wide_config(), narrow = odd;
    int C = odd.chunk_size, lengths[] = {1, C - 1, C, C + 1, 53};
    bool stateful = has_role(id, MEGALODON_STATE_IN);
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++)
        for (int B = 1; B <= 3; B += 2) {
            MegalodonShape shape = {odd, B, lengths[i], 0, 3, MEGALODON_FP32};
            check_component(candidate, reference, id, "no state", &shape, false, true);
            shape.n = 5;
            if (stateful) check_component(candidate, reference, id, "state in", &shape, true, true);
        }
    check_component(candidate, reference, id, "no weights", &(MegalodonShape){odd, 2, 31, 0, 3, MEGALODON_FP32}, false,
                    false);
    dropout.dropout = dropout.hidden_dropout = dropout.attention_dropout = 0.25;
    dropout.scale_emb = true;
    check_component(candidate, reference, id, "dropout", &(MegalodonShape){dropout, 2, 31, 2, 3, MEGALODON_FP32}, true,
                    true);
    check_component(candidate, reference, id, "wide", &(MegalodonShape){wide, 2, 9, 3, 3, MEGALODON_FP32}, true, true);
    if (id == MEGALODON_RMSNORM || id == MEGALODON_LAYERNORM) check_row_lengths(candidate, reference, id);
    if (id == MEGALODON_RMSNORM || id == MEGALODON_LAYERNORM) // and more rows than all blocks take in one turn
        check_component(candidate, reference, id, "wide, many", &(MegalodonShape){wide, 2, 800, 3, 3, MEGALODON_FP32},
                        true, true);
    if (id == MEGALODON_CEMA) check_many_states(candidate, reference);
    /* More time than 32 times 32 steps, which is where sums over time get one more level. */
    narrow.model_dim = narrow.z_dim = narrow.value_dim = 6, narrow.cema_ndim = 2, narrow.norm_num_groups = 3;
    check_component(candidate, reference, id, "long", &(MegalodonShape){narrow, 2, 2100, 4, 3, MEGALODON_FP32}, true,
                    true);
    /* Rows of scores of every length that a GPU treats in its own way: held by one, two, four or eight warps, and
     * too long for that; and so many chunks that it cuts them into blocks. */
    static const int chunks[] = {300, 900, 2100, 4200};
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks && id == MEGALODON_ATTENTION; i++) {
        MegalodonConfig narrow = odd;
        narrow.num_heads = 1, narrow.z_dim = 6, narrow.value_dim = 9, narrow.chunk_size = chunks[i];
        narrow.attention_dropout = i % 2 ? 0.25 : 0;
        MegalodonShape shape = {narrow, i == 0 ? 100 : 1, chunks[i], 0, 3, MEGALODON_FP32};
        check_component(candidate, reference, id, "long chunk", &shape, false, true);
    }
    megalodon_default_config(&real);
    real.chunk_size = candidate->large ? real.chunk_size : 64;
    int T = candidate->large ? 4096 : 150;
    check_component(candidate, reference, id, "real", &(MegalodonShape){real, 2, T, 7, 3, MEGALODON_FP32}, true, true);
}

static void usage(const Candidate *candidates, size_t count) {
    fprintf(stderr, "usage: test_components [--short] [--backend NAME,...] [--only COMPONENT,...]\n  NAME:");
    for (size_t i = 0; i < count; i++) fprintf(stderr, " %s", candidates[i].port.name);
    fprintf(stderr, "\n  COMPONENT:");
    for (int id = 0; id < MEGALODON_NUM_COMPONENTS; id++) fprintf(stderr, " %s", megalodon_components[id].name);
    fprintf(stderr, "\n");
    exit(1);
}

int main(int argc, char **argv) {
    const Candidate candidates[] = {
        {&megalodon_cpu, host_port(&megalodon_cpu, false), MEGALODON_FP32, false},
#ifdef MEGALODON_WITH_CUDA
        {&megalodon_cuda,
         {"cuda-fp32", megalodon_cuda.components, MEGALODON_F32, MEGALODON_F32, megalodon_cuda_alloc,
          megalodon_cuda_free, megalodon_cuda_upload, megalodon_cuda_download}, MEGALODON_FP32, true},
        {&megalodon_cuda,
         {"cuda-bf16", megalodon_cuda.components, MEGALODON_BF16, MEGALODON_F32, megalodon_cuda_alloc,
          megalodon_cuda_free, megalodon_cuda_upload, megalodon_cuda_download}, MEGALODON_BF16_MIXED, true},
#endif
    };
    const size_t count = sizeof candidates / sizeof *candidates;
    TestChoice choice;
    if (!test_choose(&choice, argc, argv)) usage(candidates, count);
    test_begin("components");
    Port reference = host_port(&megalodon_cpu_double, true);
    bool any = false;
    for (size_t i = 0; i < count; i++) {
        const char *why = candidates[i].backend->unavailable();
        if (!test_among(choice.backends, candidates[i].port.name)) continue;
        for (int id = 0; id < MEGALODON_NUM_COMPONENTS; id++) {
            char text[256];
            if (!test_among(choice.parts, megalodon_components[id].name)) continue;
            any = true;
            snprintf(text, sizeof text, "%s %s: %s", candidates[i].port.name, megalodon_components[id].name,
                     why ? why : "");
            if (why) test_skip(text);
            else if (choice.brief) check_briefly(&candidates[i], &reference, (MegalodonComponentId)id);
            else check_shapes(&candidates[i], &reference, (MegalodonComponentId)id);
        }
    }
    if (!any) usage(candidates, count);
    return test_end();
}
