/* component.h - calls one component of the model on random data, through any backend.
 *
 * Everything that is known of a component comes from megalodon_components: how many arguments, what they are, their
 * shapes. A Call holds the values of all arguments as double on the host; a Port says how a backend wants them (types,
 * memory). So one harness checks gradients, compares backends and later a device, whose memory the host cannot touch.
 *
 * What a call may write is filled with NaN first and stands between guards, and what it may only read is compared
 * afterwards: an output that was not written, a write outside and a spoiled input are all seen.
 */
#ifndef TESTS_COMPONENT_H
#define TESTS_COMPONENT_H

#include "../megalodon.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CALL_GUARD_BYTES = 64, CALL_GUARD = 0xA5, CALL_POISON = 0xFF /* all ones is a NaN in every format */ };

/* A backend's components and its memory. `real` and `stat` are the types of its REAL and STAT arguments. */
typedef struct Port {
    const char *name;
    const MegalodonComponentFunctions *functions;
    MegalodonDType real, stat;
    void *(*allocate)(size_t bytes);
    void (*release)(void *memory);
    void (*upload)(void *device, const void *host, size_t bytes);
    void (*download)(void *host, const void *device, size_t bytes);
} Port;

/* One call. value[i] holds argument i (integers too); after a call the outputs. grad[i] holds d loss / d output for
 * outputs (read), what a weight's gradient is added to, and after a call the gradients of inputs and weights. */
typedef struct Call {
    MegalodonComponentId id;
    const MegalodonComponent *component;
    MegalodonShape shape;
    int num_args;
    int64_t size[MEGALODON_MAX_ARGS];
    bool present[MEGALODON_MAX_ARGS];        /* false: the backend gets NULL */
    bool grad_present[MEGALODON_MAX_ARGS];
    double *value[MEGALODON_MAX_ARGS], *grad[MEGALODON_MAX_ARGS];
} Call;

/* ---- random numbers: the project's own generator, so that every run checks the same numbers ---- */

typedef struct Random { uint64_t key, counter; } Random;

/* Uniform in (0, 1). */
static inline double draw_uniform(Random *random) {
    return ((double)(megalodon_random(random->key, random->counter++) >> 11) + 0.5) / 9007199254740992.;
}

/* Standard normal (Box and Muller). */
static inline double draw_normal(Random *random) {
    double radius = sqrt(-2 * log(draw_uniform(random)));
    return radius * cos(6.283185307179586 * draw_uniform(random));
}

static inline int64_t draw_below(Random *random, int64_t n) {
    return (int64_t)(draw_uniform(random) * (double)n);
}

/* ---- types ---- */

static inline size_t dtype_bytes(MegalodonDType type) {
    return type == MEGALODON_BF16 ? 2 : type == MEGALODON_F32 || type == MEGALODON_I32 ? 4 : 8;
}

/* bf16 is the upper half of a float; round to nearest, ties to even. */
static inline uint16_t bf16_from_double(double x) {
    float f = (float)x;
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if (isnan(f)) return 0x7fff;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline double dtype_load(MegalodonDType type, const void *data, int64_t i) {
    switch (type) {
    case MEGALODON_F32: return ((const float *)data)[i];
    case MEGALODON_F64: return ((const double *)data)[i];
    case MEGALODON_I32: return ((const int32_t *)data)[i];
    case MEGALODON_I64: return (double)((const int64_t *)data)[i];
    default: break;
    }
    uint32_t bits = (uint32_t)((const uint16_t *)data)[i] << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline void dtype_store(MegalodonDType type, void *data, int64_t i, double x) {
    switch (type) {
    case MEGALODON_F32: ((float *)data)[i] = (float)x; break;
    case MEGALODON_F64: ((double *)data)[i] = x; break;
    case MEGALODON_I32: ((int32_t *)data)[i] = (int32_t)x; break;
    case MEGALODON_I64: ((int64_t *)data)[i] = (int64_t)x; break;
    default: ((uint16_t *)data)[i] = bf16_from_double(x); break;
    }
}

static inline MegalodonDType port_dtype(const Port *port, MegalodonArgType type) {
    switch (type) {
    case MEGALODON_REAL_ARG: return port->real;
    case MEGALODON_STAT_ARG: return port->stat;
    case MEGALODON_WIDE_ARG: return MEGALODON_F64;
    case MEGALODON_I32_ARG: return MEGALODON_I32;
    default: return MEGALODON_I64;
    }
}

/* ---- the host's memory as a port's ---- */

static inline void *host_allocate(size_t bytes) {
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) {
        fprintf(stderr, "out of memory: %zu bytes\n", bytes);
        exit(1);
    }
    return memory;
}
static inline void host_release(void *memory) { free(memory); }
static inline void host_copy(void *to, const void *from, size_t bytes) { memcpy(to, from, bytes); }

/* A port for a backend that works in the host's memory. */
static inline Port host_port(const MegalodonBackend *backend, bool is_double) {
    MegalodonDType type = is_double ? MEGALODON_F64 : MEGALODON_F32;
    return (Port){backend->name, backend->components, type, type, host_allocate, host_release, host_copy, host_copy};
}

/* ---- calls ---- */

static inline bool call_is_output(MegalodonRole role) {
    return role == MEGALODON_OUT || role == MEGALODON_SAVED || role == MEGALODON_STATE_OUT;
}
/* Roles with a gradient that comes in (outputs), and with one that goes out. */
static inline bool call_has_cotangent(MegalodonRole role) {
    return role == MEGALODON_OUT || role == MEGALODON_STATE_OUT;
}
static inline bool call_has_gradient(MegalodonRole role) {
    return role == MEGALODON_IN || role == MEGALODON_STATE_IN || role == MEGALODON_WEIGHT;
}

/* The arguments that a model may leave out: no affine, no bias, no learned scale. */
static inline bool call_is_optional(const MegalodonComponent *component, const MegalodonArg *arg) {
    static const char *const optional[][2] = {{"rmsnorm", "weight"}, {"layernorm", "weight"}, {"layernorm", "bias"},
                                              {"linear", "bias"},    {"rescale", "alpha"}};
    for (size_t i = 0; i < sizeof optional / sizeof *optional; i++)
        if (!strcmp(optional[i][0], component->name) && !strcmp(optional[i][1], arg->name)) return true;
    return false;
}

/* A random value that makes sense for this argument: variances are positive, tokens are below V, norm weights are
 * small because they are used as 1 + w, every fifth target or so is ignored. */
static inline double call_random_value(const Call *call, const MegalodonArg *arg, int64_t i, Random *random) {
    const MegalodonConfig *config = &call->shape.config;
    if (!strcmp(arg->name, "tokens")) return (double)draw_below(random, config->vocab_size);
    if (!strcmp(arg->name, "targets"))
        return draw_uniform(random) < 0.2 ? MEGALODON_IGNORE : (double)draw_below(random, config->vocab_size);
    if (!strcmp(arg->name, "count")) return call->shape.n + (double)config->chunk_size * (double)(1 + i);
    double x = draw_normal(random);
    if (!strcmp(arg->name, "var_in")) return 0.2 + fabs(x);
    if (!strcmp(arg->name, "logits")) return 2 * x;
    if (arg->role == MEGALODON_WEIGHT && call->id == MEGALODON_LINEAR) return x / sqrt(config->model_dim);
    if (arg->role == MEGALODON_WEIGHT && call->id != MEGALODON_CEMA && call->id != MEGALODON_EMBEDDING) return 0.3 * x;
    return x;
}

/* Prepares a call on random values. with_state: a state comes in (else those arguments are NULL and counts are 0);
 * with_optional: the optional arguments are there. All gradients are wanted and all cotangents given. */
static inline void call_create(Call *call, MegalodonComponentId id, const MegalodonShape *shape, bool with_state,
                               bool with_optional, uint64_t seed) {
    *call = (Call){.id = id, .component = &megalodon_components[id], .shape = *shape};
    Random random = {seed, 0};
    for (; call->num_args < MEGALODON_MAX_ARGS && call->component->args[call->num_args].name; call->num_args++) {
        int i = call->num_args;
        const MegalodonArg *arg = &call->component->args[i];
        int64_t dims[MEGALODON_MAX_DIMS];
        int ndim = megalodon_shape(arg->shape, &shape->config, shape->B, shape->T, shape->n, dims);
        call->size[i] = 1;
        for (int d = 0; d < ndim; d++) call->size[i] *= dims[d];
        call->present[i] = (with_state || arg->role != MEGALODON_STATE_IN) &&
                           (with_optional || !call_is_optional(call->component, arg));
        call->grad_present[i] = call->present[i] && (call_has_cotangent(arg->role) || call_has_gradient(arg->role));
        call->value[i] = host_allocate((size_t)(call->size[i] + 1) * sizeof(double));
        call->grad[i] = host_allocate((size_t)(call->size[i] + 1) * sizeof(double));
        for (int64_t j = 0; j < call->size[i]; j++) {
            call->value[i][j] = call_is_output(arg->role) ? 0 : call_random_value(call, arg, j, &random);
            call->grad[i][j] = call_has_cotangent(arg->role) ? draw_normal(&random) : 0;
            if (!strcmp(arg->name, "count") && !with_state) call->value[i][j] = 0;
        }
    }
}

static inline void call_destroy(Call *call) {
    for (int i = 0; i < call->num_args; i++) {
        free(call->value[i]);
        free(call->grad[i]);
    }
    call->num_args = 0;
}

/* Rounds what a call reads to the port's types, so that two ports that compute on it start from the same numbers. */
static inline void call_round(Call *call, const Port *port) {
    for (int i = 0; i < call->num_args; i++) {
        MegalodonDType type = port_dtype(port, call->component->args[i].type);
        double cell;
        for (int64_t j = 0; j < call->size[i]; j++) {
            dtype_store(type, &cell, 0, call->value[i][j]);
            call->value[i][j] = dtype_load(type, &cell, 0);
            dtype_store(type, &cell, 0, call->grad[i][j]);
            call->grad[i][j] = dtype_load(type, &cell, 0);
        }
    }
}

/* One guarded buffer of a port: staged holds guard, data, guard as they stand on the device. */
typedef struct CallBuffer {
    unsigned char *staged, *device;
    size_t bytes;                    /* of the data */
} CallBuffer;

static inline void buffer_create(CallBuffer *buffer, const Port *port, MegalodonDType type, int64_t size,
                                 const double *values) {
    buffer->bytes = (size_t)size * dtype_bytes(type);
    size_t total = buffer->bytes + 2 * CALL_GUARD_BYTES;
    buffer->staged = host_allocate(total);
    memset(buffer->staged, CALL_GUARD, total);
    unsigned char *data = buffer->staged + CALL_GUARD_BYTES;
    if (!values) memset(data, CALL_POISON, buffer->bytes);
    else for (int64_t j = 0; j < size; j++) dtype_store(type, data, j, values[j]);
    buffer->device = port->allocate(total);
    port->upload(buffer->device, buffer->staged, total);
}

static inline void *buffer_data(const CallBuffer *buffer) {
    return buffer->device ? buffer->device + CALL_GUARD_BYTES : NULL;
}

/* Fetches a buffer and gives it back. values: where its data goes; NULL: it was read only and must be as it was.
 * Returns what is wrong with it, or NULL. */
static inline const char *buffer_finish(CallBuffer *buffer, const Port *port, MegalodonDType type, int64_t size,
                                        double *values) {
    const char *wrong = NULL;
    if (!buffer->device) return NULL;
    size_t total = buffer->bytes + 2 * CALL_GUARD_BYTES;
    unsigned char *now = host_allocate(total);
    port->download(now, buffer->device, total);
    if (!values && memcmp(now, buffer->staged, total)) wrong = "an argument that is only read was changed";
    for (int j = 0; j < CALL_GUARD_BYTES; j++)
        if (now[j] != CALL_GUARD || now[total - 1 - (size_t)j] != CALL_GUARD) wrong = "wrote outside an argument";
    if (values) for (int64_t j = 0; j < size; j++) values[j] = dtype_load(type, now + CALL_GUARD_BYTES, j);
    port->release(buffer->device);
    free(now);
    free(buffer->staged);
    *buffer = (CallBuffer){NULL, NULL, 0};
    return wrong;
}

/* Runs the forward and, if asked, the backward on a port. Outputs land in value, gradients in grad; what the backend
 * did not write is NaN there. Returns NULL, or what the call did wrong (valid until the next one). */
static inline const char *call_run(Call *call, const Port *port, bool backward) {
    static char message[160];
    const char *error = NULL;
    CallBuffer arg_buffers[MEGALODON_MAX_ARGS] = {{NULL, NULL, 0}};
    CallBuffer grad_buffers[MEGALODON_MAX_ARGS] = {{NULL, NULL, 0}};
    void *args[MEGALODON_MAX_ARGS] = {NULL}, *grads[MEGALODON_MAX_ARGS] = {NULL};
    for (int i = 0; i < call->num_args; i++) {
        const MegalodonArg *arg = &call->component->args[i];
        MegalodonDType type = port_dtype(port, arg->type);
        bool reads = !call_is_output(arg->role);
        bool grad_reads = call_has_cotangent(arg->role) || arg->role == MEGALODON_WEIGHT;
        if (call->present[i]) buffer_create(&arg_buffers[i], port, type, call->size[i], reads ? call->value[i] : NULL);
        if (call->grad_present[i] && backward)
            buffer_create(&grad_buffers[i], port, type, call->size[i], grad_reads ? call->grad[i] : NULL);
        args[i] = buffer_data(&arg_buffers[i]);
        grads[i] = buffer_data(&grad_buffers[i]);
    }
    const MegalodonComponentFunctions *functions = &port->functions[call->id];
    functions->forward(args, &call->shape);
    if (backward) functions->backward(grads, args, &call->shape);
    for (int i = 0; i < call->num_args; i++) {
        const MegalodonArg *arg = &call->component->args[i];
        MegalodonDType type = port_dtype(port, arg->type);
        const char *wrong = buffer_finish(&arg_buffers[i], port, type, call->size[i],
                                          call_is_output(arg->role) ? call->value[i] : NULL);
        const char *grad_wrong = buffer_finish(&grad_buffers[i], port, type, call->size[i],
                                               call_has_gradient(arg->role) ? call->grad[i] : NULL);
        if (!wrong && !grad_wrong) continue;
        snprintf(message, sizeof message, "%s %s%s: %s", call->component->name, wrong ? "" : "gradient of ", arg->name,
                 wrong ? wrong : grad_wrong);
        error = message;
    }
    return error;
}

#endif
