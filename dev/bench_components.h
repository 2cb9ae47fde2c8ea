/* bench_components.h - each component of the model alone, forward and backward.
 *
 * A call's inputs are rotated among as many copies as it takes to leave the caches, so that every call reads
 * memory. On a GPU the device's own clock is read and its queue is never empty: the host's part is not in the
 * time, except in the backward of the embedding, which plans on the host.
 *
 * Bytes: every argument of a call once, read or written. FLOP: see component_flops.
 */
#ifndef DEV_BENCH_COMPONENTS_H
#define DEV_BENCH_COMPONENTS_H

#include "bench.h"
#include "bench_ceilings.h"
#include "bench_model.h"

enum { MOST_COPIES = 64 };

/* One component on buffers that stay where they are. The Call says which arguments there are; its values are
 * unused. */
typedef struct Piece {
    Call call;
    const MegalodonComponentFunctions *functions;
    int copies, next;
    void *args[MOST_COPIES][MEGALODON_MAX_ARGS], *grads[MOST_COPIES][MEGALODON_MAX_ARGS];
} Piece;

typedef struct PieceTimes {
    double seconds[2], flops[2], bytes[2];       /* forward, backward */
    double error;                                /* NAN: not checked  */
} PieceTimes;

static Port bench_port(const Bench *bench) {
#ifdef MEGALODON_WITH_CUDA
    if (bench->on_gpu)
        return (Port){bench->backend->name,
                      bench->backend->components,
                      bench->precision == MEGALODON_BF16_MIXED ? MEGALODON_BF16 : MEGALODON_F32,
                      MEGALODON_F32,
                      megalodon_cuda_alloc,
                      megalodon_cuda_free,
                      megalodon_cuda_upload,
                      megalodon_cuda_download};
#endif
    return host_port(bench->backend, false);
}

/* ---- what a call has to do ---- */

/* FLOP of the forward ([0]) and backward ([1]) of a call: additions, multiplications, quotients, exponentials
 * and roots count 1 each, those that occur once for each element of the component's tensors; what occurs once
 * a row or channel is left out. The counts are those of megalodon.c's loops, with these exceptions. Attention
 * counts the products of visible pairs, 2 (z + e) forward and twice that backward, and not its softmax.
 * CEMA's backward counts the states that it computes again once. Cross-entropy counts every row, ignored or
 * not. */
static void component_flops(MegalodonComponentId id, const MegalodonShape *s, double flops[2]) {
    const MegalodonConfig *c = &s->config;
    double rows = (double)s->B * s->T, D = c->model_dim, E = c->value_dim, Z = c->z_dim, N = c->cema_ndim;
    double F = c->ffn_hidden_dim, V = c->vocab_size, pairs = (double)s->B * attention_pairs(c, s->T);
    const struct { double elements, forward, backward; } counts[MEGALODON_NUM_COMPONENTS] = {
        [MEGALODON_EMBEDDING] = {rows * D, 1, 2},
        [MEGALODON_TIMESTEPNORM] = {rows * D, 9, 24}, /* moments 4, y 5; moments, sums 7, dx 8, weights 5 */
        [MEGALODON_CEMA] = {rows * D, 12 * N + 2, 34 * N + 4}, /* states 8 N, y 4 N; states, adjoint 26 N  */
        [MEGALODON_RMSNORM] = {rows * D, 5, 12},
        [MEGALODON_LINEAR] = {rows * E, 2 * D + 1, 4 * D + 1},
        [MEGALODON_ZNORM] = {rows * Z, 3, 7},
        [MEGALODON_QK_AFFINE] = {rows * Z, 7, 14},
        [MEGALODON_ROPE] = {rows * Z, 3, 3},
        [MEGALODON_SILU] = {rows * E, 5, 9},
        [MEGALODON_ATTENTION] = {pairs * (Z + E), 2, 4},
        [MEGALODON_GATE] = {rows * E, 1, 2},
        [MEGALODON_LAYERNORM] = {rows * D, 9, 20},
        [MEGALODON_SWIGLU] = {rows * F, 6, 12},
        [MEGALODON_RESCALE] = {rows * D, 2, 3},
        [MEGALODON_DROPOUT] = {rows * D, 1, 1},
        [MEGALODON_CROSS_ENTROPY] = {rows * V, 4, 5},
    };
    flops[0] = counts[id].elements * counts[id].forward;
    flops[1] = counts[id].elements * counts[id].backward;
}

/* Bytes of all arguments that a call touches, each counted once: what the forward must move, or the backward.
 * Of the embedding's table, at most as many rows as there are tokens. */
static double piece_bytes(const Call *call, const Port *port, bool backward) {
    double bytes = 0, rows = (double)call->shape.B * call->shape.T;
    for (int i = 0; i < call->num_args; i++) {
        const MegalodonArg *arg = &call->component->args[i];
        double count = (double)call->size[i], touched = rows * call->shape.config.model_dim;
        if (call->id == MEGALODON_EMBEDDING && arg->role == MEGALODON_WEIGHT && count > touched)
            count = touched;
        double size = count * (double)dtype_bytes(port_dtype(port, arg->type));
        bool read = !backward || arg->role != MEGALODON_OUT;
        if (call->present[i] && read) bytes += size;
        if (call->grad_present[i] && backward) bytes += size;
    }
    return bytes;
}

/* Share of the ceilings in a call of so many seconds: the time that its FLOP or its bytes need at the least,
 * whichever is longer, over the time that it took. */
static double piece_floor(const Bench *bench, MegalodonComponentId id, double flops, double bytes) {
    const Ceilings *c = &bench->ceilings;
    bool products = id == MEGALODON_LINEAR || id == MEGALODON_ATTENTION;
    double arithmetic = flops / (products ? c->product : c->fp32), memory = bytes / c->memory;
    return !isfinite(arithmetic) || memory > arithmetic ? memory : arithmetic;
}

/* ---- data ---- */

/* Sizes and presence of the arguments of a call without a state. */
static void piece_layout(Piece *piece, const Port *port, MegalodonComponentId id,
                         const MegalodonShape *shape) {
    Call *call = &piece->call;
    memset(piece, 0, sizeof *piece);
    *call = (Call){.id = id, .component = &megalodon_components[id], .shape = *shape};
    piece->functions = &port->functions[id];
    for (; call->num_args < MEGALODON_MAX_ARGS && call->component->args[call->num_args].name;
         call->num_args++) {
        int i = call->num_args;
        const MegalodonArg *arg = &call->component->args[i];
        int64_t dims[MEGALODON_MAX_DIMS];
        int ndim = megalodon_shape(arg->shape, &shape->config, shape->B, shape->T, shape->n, dims);
        call->size[i] = 1;
        for (int d = 0; d < ndim; d++) call->size[i] *= dims[d];
        call->present[i] = arg->role != MEGALODON_STATE_IN;
        call->grad_present[i] =
            call->present[i] && (call_has_cotangent(arg->role) || call_has_gradient(arg->role));
    }
}

/* Argument i or its gradient on the host, as the port holds it: what the call reads is random, what it adds
 * to is zero, what it writes is NaN. Every element is drawn by its own place, so that all threads draw. */
static void *piece_draw(const Piece *piece, const Port *port, int i, bool gradient, int copy) {
    const Call *call = &piece->call;
    const MegalodonArg *arg = &call->component->args[i];
    MegalodonDType type = port_dtype(port, arg->type);
    size_t bytes = (size_t)call->size[i] * dtype_bytes(type);
    void *data = host_allocate(bytes ? bytes : 1);
    bool is_count = strcmp(arg->name, "count") == 0, adds = gradient && arg->role == MEGALODON_WEIGHT;
    if (gradient ? !call_has_cotangent(arg->role) : call_is_output(arg->role) || is_count) {
        /* without a state no step came before: count is 0 */
        memset(data, is_count || adds ? 0 : CALL_POISON, bytes);
        return data;
    }
    #ifdef _OPENMP
    #pragma omp parallel for schedule(static)
    #endif
    for (int64_t j = 0; j < call->size[i]; j++) {
        Random random = {(uint64_t)(copy * 2 * MEGALODON_MAX_ARGS + 2 * i + gradient), (uint64_t)j * 4};
        dtype_store(type, data, j,
                    gradient ? draw_normal(&random) : call_random_value(call, arg, j, &random));
    }
    return data;
}

static void *piece_upload(const Piece *piece, const Port *port, int i, bool gradient, int copy) {
    void *host = piece_draw(piece, port, i, gradient, copy);
    size_t bytes =
        (size_t)piece->call.size[i] * dtype_bytes(port_dtype(port, piece->call.component->args[i].type));
    void *device = port->allocate(bytes ? bytes : 1);
    port->upload(device, host, bytes);
    free(host);
    return device;
}

static void piece_add_copy(Piece *piece, const Port *port) {
    int copy = piece->copies++;
    for (int i = 0; i < piece->call.num_args; i++) {
        if (piece->call.present[i]) piece->args[copy][i] = piece_upload(piece, port, i, false, copy);
        if (piece->call.grad_present[i]) piece->grads[copy][i] = piece_upload(piece, port, i, true, copy);
    }
}

static void piece_destroy(Piece *piece, const Port *port) {
    for (int copy = 0; copy < piece->copies; copy++)
        for (int i = 0; i < piece->call.num_args; i++) {
            if (piece->args[copy][i]) port->release(piece->args[copy][i]);
            if (piece->grads[copy][i]) port->release(piece->grads[copy][i]);
        }
    piece->copies = 0;
}

static void piece_forward(void *context) {
    Piece *piece = context;
    piece->functions->forward(piece->args[piece->next], &piece->call.shape);
    piece->next = (piece->next + 1) % piece->copies;
}

static void piece_backward(void *context) {
    Piece *piece = context;
    piece->functions->backward(piece->grads[piece->next], piece->args[piece->next], &piece->call.shape);
    piece->next = (piece->next + 1) % piece->copies;
}

/* ---- verification ---- */

/* Argument i of copy 0 as megalodon_cpu_double wants it: the port's rounded values in double, integers as
 * they are. */
static void *exact_argument(const Piece *piece, const Port *port, int i, bool gradient) {
    MegalodonDType type = port_dtype(port, piece->call.component->args[i].type);
    void *drawn = piece_draw(piece, port, i, gradient, 0);
    if (type == MEGALODON_I32 || type == MEGALODON_I64) return drawn;
    int64_t size = piece->call.size[i];
    double *values = host_allocate((size_t)(size + 1) * sizeof *values);
    #ifdef _OPENMP
    #pragma omp parallel for schedule(static)
    #endif
    for (int64_t j = 0; j < size; j++) values[j] = dtype_load(type, drawn, j);
    free(drawn);
    return values;
}

/* RMS of the difference between what lies on the device and `exact`, over the RMS of exact; infinity if there
 * is a NaN. */
static double piece_difference(const Piece *piece, const Port *port, int i, const void *device,
                               const double *exact) {
    MegalodonDType type = port_dtype(port, piece->call.component->args[i].type);
    int64_t size = piece->call.size[i];
    size_t bytes = (size_t)size * dtype_bytes(type);
    void *found = host_allocate(bytes ? bytes : 1);
    double difference = 0, total = 0;
    port->download(found, device, bytes);
    #ifdef _OPENMP
    #pragma omp parallel for schedule(static) reduction(+ : difference, total)
    #endif
    for (int64_t j = 0; j < size; j++) {
        double d = dtype_load(type, found, j) - exact[j];
        difference += d * d;
        total += exact[j] * exact[j];
    }
    free(found);
    difference = sqrt(difference / (total > 0 ? total : 1));
    return isfinite(difference) ? difference : INFINITY;
}

/* Runs copy 0 once, forward and backward, and the same call in double on the CPU. Returns the largest
 * relative error of all outputs and gradients; infinity if one of them has a NaN. */
static double piece_check(Piece *piece, const Port *port) {
    Call *call = &piece->call;
    const MegalodonComponentFunctions *exact = &megalodon_cpu_double.components[call->id];
    void *args[MEGALODON_MAX_ARGS] = {NULL}, *grads[MEGALODON_MAX_ARGS] = {NULL};
    double worst = 0;
    piece_forward(piece);
    piece->next = 0;
    piece_backward(piece);
    piece->next = 0;
    for (int i = 0; i < call->num_args; i++) {
        if (call->present[i]) args[i] = exact_argument(piece, port, i, false);
        if (call->grad_present[i]) grads[i] = exact_argument(piece, port, i, true);
    }
    exact->forward(args, &call->shape);
    exact->backward(grads, args, &call->shape);
    for (int i = 0; i < call->num_args; i++) {
        MegalodonRole role = call->component->args[i].role;
        if (call->present[i] && call_is_output(role))
            worst = fmax(worst, piece_difference(piece, port, i, piece->args[0][i], args[i]));
        if (call->grad_present[i] && call_has_gradient(role))
            worst = fmax(worst, piece_difference(piece, port, i, piece->grads[0][i], grads[i]));
        free(args[i]), free(grads[i]);
    }
    return worst;
}

/* ---- time ---- */

/* Times one component on B rows of T tokens, and compares it with double, unless --no-check. */
static PieceTimes time_component(const Bench *bench, MegalodonComponentId id, const MegalodonConfig *config,
                                 int B, int T) {
    static Piece piece;
    Port port = bench_port(bench);
    MegalodonShape shape = {.config = *config, .B = B, .T = T, .key = 8, .precision = bench->precision};
    PieceTimes times = {.error = NAN};
    if (id == MEGALODON_DROPOUT) shape.config.dropout = 0.1;       /* with 0 there is nothing to do */
    piece_layout(&piece, &port, id, &shape);
    piece_add_copy(&piece, &port);
    if (!bench->values.no_check) times.error = piece_check(&piece, &port);
    component_flops(id, &shape, times.flops);
    for (int part = 0; part < 2; part++) times.bytes[part] = piece_bytes(&piece.call, &port, part);
    /* twice the cache: nothing is left of a copy when its turn comes again */
    while (piece.copies < MOST_COPIES && piece.copies * times.bytes[0] < 2. * (double)bench->cache_bytes)
        piece_add_copy(&piece, &port);
    for (int i = 0; i < piece.copies; i++) piece_forward(&piece);  /* what the backwards read */
    times.seconds[0] = seconds_of(bench, (Work){piece_forward, &piece, true, 1});
    times.seconds[1] = seconds_of(bench, (Work){piece_backward, &piece, true, 1});
    piece_destroy(&piece, &port);
    return times;
}

static void component_heading(const Bench *bench, const char *first) {
    printf("%-22s %9s %9s %9s %8s %8s %9s %9s %7s%s\n", first, "fwd ms", "bwd ms", "both ms", "fwd GB/s",
           "bwd GB/s", "fwd TF/s", "bwd TF/s", "share", bench->values.no_check ? "" : "  error");
}

static void component_row(const Bench *bench, MegalodonComponentId id, const char *name,
                          const PieceTimes *times) {
    const char *parts[2] = {"forward", "backward"};
    double both = times->seconds[0] + times->seconds[1], least = 0;
    char share[16], unit[64];
    for (int part = 0; part < 2; part++) {
        double seconds = times->seconds[part];
        double floor = piece_floor(bench, id, times->flops[part], times->bytes[part]);
        const struct { const char *unit; double value; } numbers[] = {
            {"ms", 1e3 * seconds}, {"GB/s", 1e-9 * times->bytes[part] / seconds},
            {"TFLOP/s", 1e-12 * times->flops[part] / seconds}, {"share of the ceiling", floor / seconds}};
        for (size_t n = 0; n < sizeof numbers / sizeof *numbers; n++) {
            snprintf(unit, sizeof unit, "%s %s", parts[part], numbers[n].unit);
            record(bench, bench->which, name, unit, numbers[n].value);
        }
        least += floor;
    }
    printf("%-22s %9.4f %9.4f %9.4f %8.1f %8.1f %9.4f %9.4f %7s", name, 1e3 * times->seconds[0],
           1e3 * times->seconds[1], 1e3 * both, 1e-9 * times->bytes[0] / times->seconds[0],
           1e-9 * times->bytes[1] / times->seconds[1], 1e-12 * times->flops[0] / times->seconds[0],
           1e-12 * times->flops[1] / times->seconds[1], percent(least / both, share));
    if (!bench->values.no_check) printf(" %7.1e", times->error);
    printf("\n");
    record(bench, bench->which, name, "ms", 1e3 * both);
    record(bench, bench->which, name, "share of the ceiling", least / both);
    record(bench, bench->which, name, "error", times->error);
    /* float sums over a long sequence stay far below this; bf16 keeps 8 bits */
    double allowed = bench->precision == MEGALODON_BF16_MIXED ? 0.03 : 1e-3;
    if (!bench->values.no_check && !(times->error < allowed))
        report_wrong(bench, errorf("bench %s: %s differs from double by %g; at most %g is expected",
                                   bench->which, name, times->error, allowed));
}

/* The number of a component by its name. Error: the unknown name and the known ones. */
static const char *find_component(const char *name, MegalodonComponentId *out) {
    char known[512] = "";
    for (int id = 0; id < MEGALODON_NUM_COMPONENTS; id++) {
        *out = (MegalodonComponentId)id;
        if (strcmp(megalodon_components[id].name, name) == 0) return NULL;
        snprintf(known + strlen(known), sizeof known - strlen(known), " %s", megalodon_components[id].name);
    }
    return errorf("--only: there is no component \"%s\"; known ones:%s", option_quoted(name), known);
}

static void bench_components(Bench *bench) {
    const Values *v = &bench->values;
    int B = v->batch ? v->batch : 8, T = v->seq_len ? v->seq_len : 512;
    MegalodonComponentId only;
    if (v->only) die_if(find_component(v->only, &only));
    printf("\ncomponents: %s on %s, B %d, T %d; medians of %d; bytes count every argument once\n", v->preset,
           bench->backend->name, B, T, v->repeats);
    component_heading(bench, "component");
    for (int i = 0; i < MEGALODON_NUM_COMPONENTS; i++) {
        MegalodonComponentId id = (MegalodonComponentId)i;
        if (v->only && id != only) continue;
        PieceTimes times = time_component(bench, id, &bench->config, B, T);
        component_row(bench, id, megalodon_components[id].name, &times);
    }
}

/* ----------------------------------------------------------------------------------------------------
 * The linear layers of a model, one by one
 */

static void bench_layers(Bench *bench) {
    const Values *v = &bench->values;
    const MegalodonConfig *c = &bench->config;
    int B = v->batch ? v->batch : 8, T = v->seq_len ? v->seq_len : 512;
    const struct { const char *name; int K, N, times; } layers[] = {
        {"wz", c->model_dim, c->z_dim, c->num_layers},
        {"wv wr", c->model_dim, c->value_dim, 2 * c->num_layers},
        {"wh1", c->model_dim, c->model_dim, c->num_layers},
        {"wh2", c->value_dim, c->model_dim, c->num_layers},
        {c->swiglu ? "fc1 fc3" : "fc1", c->model_dim, c->ffn_hidden_dim, (c->swiglu ? 2 : 1) * c->num_layers},
        {"fc2", c->ffn_hidden_dim, c->model_dim, c->num_layers},
        {"output", c->model_dim, c->vocab_size, 1},
    };
    double total = 0;
    printf("\nlayers: the linear layers of %s on %s, with a bias, %d x %d tokens; medians of %d\n", v->preset,
           bench->backend->name, B, T, v->repeats);
    component_heading(bench, "layer");
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++) {
        MegalodonConfig config = *c;
        char name[64];
        config.model_dim = layers[i].K;
        config.value_dim = layers[i].N;
        PieceTimes times = time_component(bench, MEGALODON_LINEAR, &config, B, T);
        snprintf(name, sizeof name, "%s %dx%d", layers[i].name, layers[i].N, layers[i].K);
        component_row(bench, MEGALODON_LINEAR, name, &times);
        total += layers[i].times * (times.seconds[0] + times.seconds[1]);
    }
    printf("all of them, %d blocks and the output: %.3f ms a step\n", c->num_layers, 1e3 * total);
    record(bench, "layers", "all", "ms", 1e3 * total);
}

#endif
