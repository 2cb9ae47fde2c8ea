/* test_large.c - sizes past 2^31 elements and files past 4 GB: right answers, or a sentence.
 *
 *     test_large             what takes a second or two: sparse files, a sparse table of embeddings, and the same tests as
 *                            below with small sizes
 *     test_large --large     (`make test-large`) every component with tensors of more than 2^31 elements, a million
 *                            tokens in one training step, and a file of more than 4 GB that is really written; a part
 *                            of it by name, as main has them: test_large --large sequence
 *
 * A tensor of 2^31 floats would take 8 GiB, and some components have six. Here it is one window of memory, mapped again
 * and again behind itself: to the program an array of any length, in which row b is row b mod PERIOD. All tensors of a
 * call have that period, so a component whose rows do not depend on each other must write in every window what it
 * writes in a call with PERIOD rows. An index that overflows reads or writes somewhere else, or outside. One thread does
 * it, as two would meet in a window. Where the system tells how much memory is resident, it counts a window for each
 * place: tens of gigabytes, of which a few megabytes exist.
 */
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE
#endif
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "../lib/dataset.h"
#include "../lib/memory.h"
#include "../lib/safetensors.h"
#include "component.h"
#include "model.h"
#include "test.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#endif

static char folder[] = "/tmp/test_large_XXXXXX";
static bool large, shorter;          /* MEGALODON_TEST_SHORT is set where everything is several times slower */

static const char *in_folder(const char *name) {
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

/* ---- files: sparse ones, which have a size but take no place ---- */

/* A file of `size` bytes that are 0. */
static int sparse_file(const char *path, int64_t size) {
    int descriptor = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (descriptor < 0 || ftruncate(descriptor, size) != 0) must("a file of many gigabytes cannot be made in /tmp");
    return descriptor;
}

static void put(int descriptor, int64_t at, const void *bytes, size_t size) {
    if (pwrite(descriptor, bytes, size, at) != (ssize_t)size) must("a sparse file cannot be written");
}

/* Tensors of more than 2^31 and 2^32 elements, the second one past the first 8 GiB of the file. */
static void check_reader(void) {
    const int64_t many = ((int64_t)1 << 31) + 3, more = ((int64_t)1 << 32) + 5, places[] = {0, many / 2, many - 1};
    const float numbers[] = {1.5f, -2.25f, 3e38f};
    const uint8_t first = 7, last = 250;
    char header[512];
    snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"F32\",\"shape\":[%" PRId64 "],\"data_offsets\":[0,%" PRId64 "]},"
             "\"b\":{\"dtype\":\"U8\",\"shape\":[%" PRId64 ",1],\"data_offsets\":[%" PRId64 ",%" PRId64 "]}}", many, 4 * many,
             more, 4 * many, 4 * many + more);
    int64_t data = 8 + (int64_t)strlen(header), size = data + 4 * many + more;
    const char *path = in_folder("tensors");
    int descriptor = sparse_file(path, size);
    unsigned char length[8] = {(unsigned char)(data - 8), (unsigned char)((data - 8) >> 8)};
    put(descriptor, 0, length, 8);
    put(descriptor, 8, header, strlen(header));
    for (int i = 0; i < 3; i++) put(descriptor, data + 4 * places[i], &numbers[i], 4);
    put(descriptor, data + 4 * many, &first, 1);
    put(descriptor, size - 1, &last, 1);
    Safetensors file;
    const char *error = safetensors_open(&file, path);
    if (check(!error, "%s", error ? error : "")) {
        const SafetensorsTensor *a = safetensors_find(&file, "a"), *b = safetensors_find(&file, "b");
        check(a && b && a->size == many && b->size == more && b->dims[0] == more, "the sizes of large tensors");
        for (int i = 0; i < 3; i++)
            check(safetensors_element(a, places[i]) == numbers[i], "element %" PRId64 " of a large tensor is %g", places[i],
                  safetensors_element(a, places[i]));
        check(safetensors_element(b, 0) == first && safetensors_element(b, more - 1) == last, "the ends of a tensor of "
              "more than 4 GiB are %g and %g", safetensors_element(b, 0), safetensors_element(b, more - 1));
        safetensors_close(&file);
    }
    /* One byte less is noticed without reading the rest. */
    if (ftruncate(descriptor, size - 1) != 0) must("a sparse file cannot be cut");
    error = safetensors_open(&file, path);
    check(error && strstr(error, "truncated"), "a large file that is cut: %s", error ? error : "accepted");
    close(descriptor);
    unlink(path);
}

/* A text of 5 GB and a token file of more than 2^31 tokens: what stands at a place is read from that place. */
static void check_data(void) {
    const int64_t size = 5000000007, places[] = {0, 2147483645, 4294967293, 4999999997};
    const char *path = in_folder("text");
    Dataset data;
    int32_t window[8];
    uint64_t hash, other;
    int descriptor = sparse_file(path, size);
    for (int i = 0; i < 4; i++) put(descriptor, places[i], "seven!!", 7);
    must(dataset_open(&data, path, 256));
    check(data.size == size, "a text of 5 GB has %" PRId64 " tokens", data.size);
    for (int i = 0; i < 4; i++) {
        must(dataset_window(&data, places[i], 7, window));
        bool same = true;
        for (int k = 0; k < 7; k++) same = same && window[k] == "seven!!"[k];
        check(same, "the text at %" PRId64 " is not what was written there", places[i]);
    }
    must(dataset_hash(&data, &hash));
    dataset_close(&data);
    if (ftruncate(descriptor, size + 1) != 0) must("a sparse file cannot grow");
    must(dataset_open(&data, path, 256));
    must(dataset_hash(&data, &other));
    check(hash != other, "one byte more leaves the hash of 5 GB as it is");
    dataset_close(&data);
    close(descriptor);
    unlink(path);

    char header[128] = "\x93NUMPY\x01";
    const int64_t count = ((int64_t)1 << 31) + 9;
    const uint16_t token = 513;
    int length = snprintf(header + 10, 118, "{'descr': '<u2', 'fortran_order': False, 'shape': (%" PRId64 ",), }\n", count);
    header[8] = (char)length;
    path = in_folder("tokens.npy");
    descriptor = sparse_file(path, 10 + length + 2 * count);
    put(descriptor, 0, header, 10 + (size_t)length);
    put(descriptor, 10 + length + 2 * (count - 1), &token, 2);
    must(dataset_open(&data, path, 1000));
    must(dataset_window(&data, count - 3, 3, window));
    check(data.size == count && window[2] == 513 && window[1] == 0, "the end of 2^31 tokens is %d", (int)window[2]);
    dataset_close(&data);
    close(descriptor);
    unlink(path);
}

/* A file of more than 4 GB from the writer, read back with its checksums. */
static const char *fill_counting(void *context, size_t index, void *out) {
    uint32_t *numbers = out;
    (void)index;
    for (int64_t i = 0; i < *(const int64_t *)context; i++) numbers[i] = (uint32_t)i * 2654435761u;
    return NULL;
}
static void check_writer(void) {
    int64_t count = large ? ((int64_t)1 << 30) + 7 : 1000;
    const SafetensorsTensor tensors[] = {
        {.name = "a", .dtype = SAFETENSORS_I32, .ndim = 1, .dims = {count}, .size = count},
        {.name = "b", .dtype = SAFETENSORS_I32, .ndim = 1, .dims = {count}, .size = count}};
    const char *path = in_folder("written");
    Safetensors file;
    must(safetensors_write(path, tensors, 2, NULL, fill_counting, &count));
    must(safetensors_open(&file, path));
    const SafetensorsTensor *b = safetensors_find(&file, "b");
    check(b && b->size == count && safetensors_element(b, count - 1) == (int32_t)((uint32_t)(count - 1) * 2654435761u),
          "the last number of %" PRId64, count);
    const char *error = safetensors_verify(&file);
    check(!error, "%s", error ? error : "");
    printf("a file of %zu bytes was written and read\n", file.map_bytes);
    safetensors_close(&file);
    unlink(path);
}

/* ---- arrays without an end ---- */

enum { PERIOD = 1024 };              /* rows of the batch in a window: 4 MiB, which stay near the processor */

typedef struct Ring {
    char *memory;
    size_t bytes, window;            /* all of it; what is behind it */
} Ring;

/* An array of `rows` rows of row_bytes each, in which only PERIOD rows exist. */
static Ring ring_create(int64_t rows, size_t row_bytes) {
    Ring ring = {.window = PERIOD * row_bytes};
    char path[64] = "/dev/shm/test_large_XXXXXX";            /* a disk would be busy with what is written again and again */
    int descriptor = mkstemp(path);
    if (descriptor < 0) descriptor = open(in_folder("ring"), O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (descriptor < 0 || ftruncate(descriptor, (off_t)ring.window) != 0) must("a window cannot be made");
    unlink(path);
    unlink(in_folder("ring"));
    ring.bytes = ((size_t)rows * row_bytes + ring.window - 1) / ring.window * ring.window;
    ring.memory = mmap(NULL, ring.bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (ring.memory == MAP_FAILED) must("there are no addresses for a large array");
    for (size_t at = 0; at < ring.bytes; at += ring.window)
        if (mmap(ring.memory + at, ring.window, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, descriptor, 0) == MAP_FAILED)
            must("a large array cannot be mapped");
    close(descriptor);
    return ring;
}

/* ---- components ---- */

enum { WIDTH = 64, STEPS = 16 };     /* columns of every tensor, tokens of a row: 1024 numbers in a row */

static MegalodonShape large_shape(int B) {
    MegalodonShape shape = {.B = B, .T = STEPS, .key = 5};
    megalodon_default_config(&shape.config);
    MegalodonConfig *c = &shape.config;
    c->model_dim = c->z_dim = c->value_dim = c->ffn_hidden_dim = c->vocab_size = WIDTH;
    c->num_heads = 2;
    c->cema_ndim = 1;
    c->chunk_size = STEPS;
    c->norm_num_groups = 4;
    return shape;
}

typedef struct LargeCall {
    MegalodonShape shape;
    int num_args;
    Ring value[MEGALODON_MAX_ARGS], grad[MEGALODON_MAX_ARGS];
    size_t row_bytes[MEGALODON_MAX_ARGS];    /* of a row of the batch; all bytes of a weight */
    void *args[MEGALODON_MAX_ARGS], *grads[MEGALODON_MAX_ARGS];
} LargeCall;

static bool has_rows(const MegalodonArg *arg) { return arg->shape[0] == 'B'; }
static bool has_gradient(const MegalodonArg *arg) {
    return arg->role == MEGALODON_OUT || arg->role == MEGALODON_IN || arg->role == MEGALODON_WEIGHT;
}

/* Small random numbers; indices are tokens, and no row has seen any before. */
static void fill_window(const MegalodonArg *arg, MegalodonDType type, void *memory, size_t bytes, uint64_t key) {
    Random random = {.key = key};
    for (int64_t i = 0; i < (int64_t)(bytes / dtype_bytes(type)); i++)
        dtype_store(type, memory, i, arg->type == MEGALODON_I64_ARG ? 0
                                   : arg->role == MEGALODON_INDEX  ? (double)draw_below(&random, WIDTH)
                                                                   : draw_uniform(&random) - 0.5);
}

static LargeCall call_prepare(const MegalodonComponent *component, const Port *port, int B) {
    LargeCall call = {.shape = large_shape(B)};
    for (; call.num_args < MEGALODON_MAX_ARGS && component->args[call.num_args].name; call.num_args++) {
        int i = call.num_args;
        const MegalodonArg *arg = &component->args[i];
        int64_t dims[MEGALODON_MAX_DIMS], size = 1;
        int ndim = megalodon_shape(arg->shape, &call.shape.config, 1, STEPS, 0, dims);
        for (int k = 0; k < ndim; k++) size *= dims[k];
        MegalodonDType type = port_dtype(port, arg->type);
        call.row_bytes[i] = (size_t)size * dtype_bytes(type);
        if (arg->role == MEGALODON_STATE_IN) continue;
        int64_t rows = has_rows(arg) ? B : PERIOD;
        call.value[i] = ring_create(rows, call.row_bytes[i]);
        fill_window(arg, type, call.value[i].memory, call.value[i].window, (uint64_t)i);
        call.args[i] = call.value[i].memory;
        if (!has_gradient(arg)) continue;
        call.grad[i] = ring_create(rows, call.row_bytes[i]);
        if (arg->role == MEGALODON_OUT)
            fill_window(arg, type, call.grad[i].memory, call.grad[i].window, 100 + (uint64_t)i);
        call.grads[i] = call.grad[i].memory;
    }
    return call;
}

static void call_free(LargeCall *call) {
    for (int i = 0; i < call->num_args; i++) {
        if (call->value[i].memory) munmap(call->value[i].memory, call->value[i].bytes);
        if (call->grad[i].memory) munmap(call->grad[i].memory, call->grad[i].bytes);
    }
}

/* How far the windows of two calls are apart, relative to the second. */
static double window_error(MegalodonDType type, const Ring *a, const Ring *b, size_t bytes, double factor) {
    double difference = 0, square = 0;
    for (int64_t i = 0; i < (int64_t)(bytes / dtype_bytes(type)); i++) {
        double x = dtype_load(type, a->memory, i), y = factor * dtype_load(type, b->memory, i);
        difference += (x - y) * (x - y);
        square += y * y;
    }
    return sqrt(difference) <= 1e-30 ? 0 : isfinite(difference) ? sqrt(difference / square) : INFINITY;
}

/* The attention's gradients of keys and values are cleared first, all of them, and then added to, query by query: in a
 * window they become sums over all rows that it stands for. */
static bool adds_to(MegalodonComponentId id, const MegalodonArg *arg) {
    return id == MEGALODON_ATTENTION && (strcmp(arg->name, "k") == 0 || strcmp(arg->name, "v") == 0);
}

/* A call with many rows against one with PERIOD of them, forward and backward. */
static void check_component(const Port *port, MegalodonComponentId id, int B) {
    const MegalodonComponent *component = &megalodon_components[id];
    LargeCall many = call_prepare(component, port, B), few = call_prepare(component, port, PERIOD);
    const MegalodonComponentFunctions *functions = &port->functions[id];
    /* A bias is added in a second pass over the output, which would meet each window many times. */
    if (id == MEGALODON_LINEAR) many.args[3] = few.args[3] = many.grads[3] = few.grads[3] = NULL;
    functions->forward(many.args, &many.shape);
    functions->forward(few.args, &few.shape);
    functions->backward(many.grads, many.args, &many.shape);
    functions->backward(few.grads, few.args, &few.shape);
    double elements = 0;
    for (int i = 0; i < many.num_args; i++) {
        const MegalodonArg *arg = &component->args[i];
        MegalodonDType type = port_dtype(port, arg->type);
        if (call_is_output(arg->role)) {
            double error = window_error(type, &many.value[i], &few.value[i], few.value[i].window, 1);
            check(error <= 1e-6, "%s with %d rows: %s differs by %.1e", component->name, B, arg->name, error);
            elements = fmax(elements, (double)B * (double)many.row_bytes[i] / (double)dtype_bytes(type));
        } else if (many.grads[i]) {
            /* A sum over all rows is as many times as large, but for the rounding of that many floats, and for three rows
             * that come once more: they weigh little among two windows, and nothing among two thousand. */
            bool weight = arg->role == MEGALODON_WEIGHT, sums = weight || adds_to(id, arg);
            double error = window_error(type, &many.grad[i], &few.grad[i],
                                        weight ? many.row_bytes[i] : few.grad[i].window, sums ? (double)B / PERIOD : 1);
            check(error <= (!sums ? 1e-6 : large ? 0.02 : 0.05), "%s with %d rows: the gradient of %s differs by %.1e", component->name, B,
                  arg->name, error);
        }
    }
    if (large) printf("%s: an output of %.0f numbers\n", component->name, elements);
    call_free(&many);
    call_free(&few);
}

static int rows_of_batch(void) { return large ? (1 << 21) + 3 : 2 * PERIOD + 3; }   /* times 1024: past 2^31 */

/* Goes on with one thread; returns how many there were. */
static int one_thread(void) {
#ifdef _OPENMP
    int threads = omp_get_max_threads();
    omp_set_num_threads(1);
    return threads;
#else
    return 1;
#endif
}
static void many_threads(int threads) {
#ifdef _OPENMP
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
}

/* A mask depends on the place of an element, so windows differ: the last one is what stays. */
static void check_dropout(void) {
    Port port = host_port(&megalodon_cpu, false);
    int B = rows_of_batch();
    LargeCall call = call_prepare(&megalodon_components[MEGALODON_DROPOUT], &port, B);
    call.shape.config.dropout = 0.5;
    int threads = one_thread();
    port.functions[MEGALODON_DROPOUT].forward(call.args, &call.shape);
    many_threads(threads);
    const float *x = call.args[1], *y = call.args[0];
    int wrong = 0;
    for (int64_t row = B - 3; row < B; row++)
        for (int64_t i = row * STEPS * WIDTH; i < (row + 1) * STEPS * WIDTH; i++)
            wrong += y[i] != ((megalodon_random(call.shape.key, (uint64_t)i) >> 40) < 1 << 23 ? 0 : 2 * x[i]);
    check(wrong == 0, "dropout with %d rows: %d of the last numbers are wrong", B, wrong);
    call_free(&call);
}

static void check_components(void) {
    Port port = host_port(&megalodon_cpu, false);
    int threads = one_thread();
    for (int id = 0; id < MEGALODON_NUM_COMPONENTS; id++)
        check_component(&port, (MegalodonComponentId)id, rows_of_batch());
    many_threads(threads);
}

/* A table of embeddings of more than 2^31 numbers, of which only the last rows are there. */
static void check_embedding(void) {
    enum { D = 1024, ROWS = 5 };
    const int64_t V = ((int64_t)1 << 21) + 10;
    MegalodonShape shape = {.B = 1, .T = ROWS};
    int32_t tokens[ROWS];
    float out[ROWS * D];
    megalodon_default_config(&shape.config);
    shape.config.model_dim = D;
    shape.config.vocab_size = (int)V;
    float *table = mmap(NULL, (size_t)(V * D) * sizeof *table, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (table == MAP_FAILED) {
        test_skip("there are no addresses for a table of 8 GiB");
        return;
    }
    for (int i = 0; i < ROWS; i++) {
        tokens[i] = (int32_t)(V - 1 - 2 * i);
        for (int d = 0; d < D; d++) table[(V - 1 - 2 * i) * D + d] = (float)(i * D + d);
    }
    void *args[] = {out, tokens, table};
    megalodon_cpu.components[MEGALODON_EMBEDDING].forward(args, &shape);
    int wrong = 0;
    for (int i = 0; i < ROWS * D; i++) wrong += out[i] != (float)i;
    check(wrong == 0, "%d numbers of the last embeddings are wrong", wrong);
    void *grads[] = {out, NULL, table};
    megalodon_cpu.components[MEGALODON_EMBEDDING].backward(grads, args, &shape);
    for (int i = 0; i < ROWS; i++)
        for (int d = 0; d < D; d++) wrong += table[(V - 1 - 2 * i) * D + d] != (float)(2 * (i * D + d));
    check(wrong == 0, "%d numbers of the last embeddings' gradients are wrong", wrong);
    munmap(table, (size_t)(V * D) * sizeof *table);
}

/* ---- a million tokens in one step ---- */

typedef struct Step { double loss, norm; } Step;

/* Forward and backward over one row of T tokens. */
static Step long_step(const MegalodonBackend *backend, const MegalodonConfig *config, const int32_t *tokens, int T) {
    MegalodonOptions options = {.max_batch = 1, .max_length = T, .training = true};
    MegalodonModel *model = model_create(backend, config, &options, 3);
    MegalodonBatch batch = {.tokens = tokens, .targets = tokens + 1, .B = 1, .T = T};
    MegalodonAdamW adamw = {.step = 1};
    MegalodonLoss loss;
    Step step;
    must(backend->forward(model, &batch, &loss));
    must(backend->backward(model, 1. / (double)loss.counted));
    must(backend->update(model, &adamw, &step.norm));
    step.loss = loss.nll_sum / (double)loss.counted;
    backend->destroy(model);
    return step;
}

/* The same loss from calls of 1000 tokens that pass the state on. */
static double pieces_loss(const MegalodonBackend *backend, const MegalodonConfig *config, const int32_t *tokens, int T) {
    MegalodonOptions options = {.max_batch = 1, .max_length = 1000};
    MegalodonModel *model = model_create(backend, config, &options, 3);
    double nll_sum = 0;
    for (int t = 0; t < T; t += 1000) {
        MegalodonBatch batch = {.tokens = tokens + t, .targets = tokens + t + 1, .B = 1, .T = T - t < 1000 ? T - t : 1000,
                                .carry = t > 0};
        MegalodonLoss loss;
        must(backend->forward(model, &batch, &loss));
        nll_sum += loss.nll_sum;
    }
    backend->destroy(model);
    return nll_sum / T;
}

static void check_long_sequence(void) {
    const int T = large ? 1 << 20 : shorter ? 1 << 12 : 1 << 15;
    MegalodonConfig config = small_config();
    config.num_layers = 1;
    config.model_dim = config.value_dim = config.ffn_hidden_dim = 8;
    config.num_heads = 1;
    config.z_dim = 4;
    config.cema_ndim = config.norm_num_groups = 2;
    config.chunk_size = 32;
    int32_t *tokens = must_allocate(((size_t)T + 1) * sizeof *tokens);
    for (int i = 0; i <= T; i++) {
        uint64_t bits = megalodon_random(9, (uint64_t)i);
        tokens[i] = (int32_t)(bits % 12 + (uint64_t)i / 3000) % config.vocab_size;       /* never settles */
    }
    Step ours = long_step(&megalodon_cpu, &config, tokens, T), wide = long_step(&megalodon_cpu_double, &config, tokens, T);
    double pieces = pieces_loss(&megalodon_cpu_double, &config, tokens, T);
    printf("%d tokens in one step: loss %.9f, in double %.9f, in pieces %.9f; norm of the gradient %.7f and %.7f\n", T,
           ours.loss, wide.loss, pieces, ours.norm, wide.norm);
    check(fabs(wide.loss - pieces) < 1e-9, "%d tokens in one call or in pieces: %.12f and %.12f", T, wide.loss, pieces);
    check(fabs(ours.loss - wide.loss) < 1e-6, "%d tokens in float: %.9f, in double %.9f", T, ours.loss, wide.loss);
    check(fabs(ours.norm / wide.norm - 1) < 1e-4, "%d tokens: gradient norm %.9f, in double %.9f", T, ours.norm, wide.norm);
    free(tokens);
}

int main(int argc, char **argv) {
    static const struct { const char *name; void (*run)(void); bool wide; } parts[] = {
        {"reader", check_reader, true},         {"data", check_data, true},
        {"embedding", check_embedding, true},   {"writer", check_writer, false},
        {"components", check_components, false}, {"dropout", check_dropout, false},
        {"sequence", check_long_sequence, false}};
    const char *only = argc > 2 ? argv[2] : NULL;
    large = argc > 1 && strcmp(argv[1], "--large") == 0;
    shorter = getenv("MEGALODON_TEST_SHORT") != NULL;
    test_begin("large");
    if (!mkdtemp(folder)) must("cannot create a folder in /tmp");
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        if (only && strcmp(only, parts[i].name) != 0) continue;
        if (parts[i].wide && sizeof(void *) < 8) test_skip("more than 4 GiB: this machine has no addresses for them");
        else parts[i].run();
    }
    rmdir(folder);
    return test_end();
}
