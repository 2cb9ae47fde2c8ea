/* test_stream.c - text without end: a million tokens, states that move between backends, and rows of a batch that each
 * follow a text of their own.
 *
 * A million tokens give the same logits however they are cut into calls, and no more memory is used after a million
 * than after ten thousand. Calls of one token read only the last 50,000 of the million, for the sake of time.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include "../lib/checkpoint.h"
#include "../lib/backends.h"
#include "../lib/state.h"
#include "../lib/streams.h"
#include "model.h"
#include "test.h"

#include <unistd.h>

static const MegalodonBackend *const wide = &megalodon_cpu_double;
static char folder[] = "/tmp/test_stream_XXXXXX";

static const char *in_folder(const char *name) {
    static char paths[4][128];
    static int turn;
    char *path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

/* MEGALODON_TEST_SHORT is set under sanitizers, which make everything several times slower. */
static bool is_short(void) { return getenv("MEGALODON_TEST_SHORT") != NULL; }

/* ---- a million tokens ---- */

enum { LARGEST_CALL = 65536, SMALL = 777, PAGE = 4096, SINGLE = 50000 };

/* Two blocks of everything, as small as they get: a million tokens in a second or two. */
static MegalodonConfig tiny_config(void) {
    MegalodonConfig config = small_config();
    config.model_dim = 8;
    config.num_heads = 1;
    config.z_dim = 4;
    config.value_dim = 8;
    config.ffn_hidden_dim = 8;
    config.cema_ndim = 2;
    config.norm_num_groups = 2;
    config.chunk_size = 32;
    return config;
}

/* CEMA with memories from a few tokens to 20,000: what was read long ago must count, or the test would see little of
 * it. The decay |q| = 1 - sigmoid(alpha) sigmoid(delta) comes close to 1 where both are far below 0. */
static void lengthen_memories(const MegalodonBackend *backend, MegalodonModel *model, const MegalodonConfig *config) {
    int size = config->model_dim * config->cema_ndim;
    float *values = must_allocate((size_t)size * sizeof *values);
    for (int i = 0; i < size; i++) values[i] = -5.f * (float)i / (float)size;
    static const char *const names[] = {"layers.0.mega.cema.alpha", "layers.0.mega.cema.delta",
                                        "layers.1.mega.cema.alpha", "layers.1.mega.cema.delta"};
    for (int i = 0; i < 4; i++) must(backend->set(model, MEGALODON_PARAM, names[i], values, MEGALODON_F32));
    free(values);
}

typedef struct Stream {
    const MegalodonBackend *backend;
    MegalodonConfig config;
    MegalodonModel *model;
    int64_t read;                    /* tokens so far */
    int32_t *piece;                  /* LARGEST_CALL  */
} Stream;

static Stream stream_create(const MegalodonBackend *backend, int max_length) {
    Stream s = {.backend = backend, .config = tiny_config()};
    MegalodonOptions options = {.max_batch = 1, .max_length = max_length, .carry = true};
    s.model = model_create(backend, &s.config, &options, 5);
    lengthen_memories(backend, s.model, &s.config);
    s.piece = must_allocate((size_t)max_length * sizeof *s.piece);
    return s;
}

static void stream_destroy(Stream *s) {
    s->backend->destroy(s->model);
    free(s->piece);
}

/* Reads up to token `end` in calls of `length`. The text is a function of the position and lies nowhere. Its letters
 * become others as it goes on, so that its statistics never settle. */
static void stream_read(Stream *s, int64_t end, int length) {
    while (s->read < end) {
        int n = end - s->read < length ? (int)(end - s->read) : length;
        for (int i = 0; i < n; i++) {
            uint64_t at = (uint64_t)(s->read + i), bits = megalodon_random(17, at);
            s->piece[i] = (int32_t)(bits % 12 + at / 60000) % s->config.vocab_size;
        }
        MegalodonBatch batch = {.tokens = s->piece, .B = 1, .T = n, .carry = s->read > 0};
        must(s->backend->forward(s->model, &batch, NULL));
        s->read += n;
    }
}

static void stream_logits(Stream *s, double *out) {
    float logits[64];
    must(s->backend->last_logits(s->model, logits));
    for (int i = 0; i < s->config.vocab_size; i++) out[i] = logits[i];
}

static void check_memory(int64_t early, int64_t late) {
    if (is_short()) test_skip("memory: a sanitizer keeps what was freed");
    else if (early == 0) test_skip("memory: /proc/self/statm is not here");
    else
        check((double)late <= 1.01 * (double)early, "resident memory went from %lld bytes after 10,000 tokens to %lld",
              (long long)early, (long long)late);
}

/* The statistics of all norms, one after the other; returns how many. */
static int statistics(Stream *s, double *out) {
    static const char *const names[] = {"layers.0.norm.mean", "layers.0.norm.var", "layers.1.norm.mean",
                                        "layers.1.norm.var", "final_norm.mean", "final_norm.var"};
    int count = 0;
    for (int i = 0; i < 6; i++, count += s->config.norm_num_groups)
        must(s->backend->get(s->model, MEGALODON_STATE, names[i], out + count, MEGALODON_F64));
    return count;
}

static void check_million(const MegalodonBackend *backend) {
    int64_t end = is_short() ? 100000 : 1000000;
    double want[64], logits[64], want_statistics[16], ours[16];
    Stream reference = stream_create(wide, PAGE);
    stream_read(&reference, end, PAGE);
    stream_logits(&reference, want);
    int num_statistics = statistics(&reference, want_statistics), V = reference.config.vocab_size;

    const struct { const char *name; int length, largest; } ways[] = {
        {"calls of 4096", PAGE, PAGE}, {"calls of 777", SMALL, SMALL},
        {"one of 65,536, 4096, then 1", PAGE, LARGEST_CALL}};
    double first[64];
    for (int i = 0; i < 3; i++) {
        Stream s = stream_create(backend, ways[i].largest);
        stream_read(&s, 10000, ways[i].length);
        int64_t early = memory_resident();
        if (ways[i].largest > PAGE) stream_read(&s, 10000 + ways[i].largest, ways[i].largest);
        stream_read(&s, end - SINGLE, ways[i].length);
        stream_read(&s, end, ways[i].largest > PAGE ? 1 : ways[i].length);
        /* The large call is the first to touch memory that was set aside for it. */
        if (ways[i].largest <= PAGE) check_memory(early, memory_resident());
        MegalodonMemory memory;
        backend->memory(s.model, &memory);
        bool on_cpu = strncmp(backend->name, "cpu", 3) == 0;
        check(on_cpu == (memory.device_used == 0), "%s: %lld bytes of the device's memory are in use", backend->name,
              (long long)memory.device_used);
        stream_logits(&s, logits);
        statistics(&s, ours);
        if (i == 0) memcpy(first, logits, sizeof first);
        double apart = relative_rms(logits, first, (size_t)V), error = relative_rms(logits, want, (size_t)V);
        double drift = relative_rms(ours, want_statistics, (size_t)num_statistics);
        const char *name = backend->name, *way = ways[i].name;
        check(apart <= 1e-5, "%s, %s: logits differ from those of calls of 4096 by %.2e", name, way, apart);
        check(error <= 1e-4, "%s, %s: logits differ from double precision by %.2e", name, way, error);
        check(drift <= 1e-5, "%s, %s: statistics differ from double precision by %.2e", name, way, drift);
        printf("%-10s %lld tokens, %-28s logits %.1e from calls of 4096, %.1e from double; statistics %.1e\n", name,
               (long long)end, way, apart, error, drift);
        stream_destroy(&s);
    }
    stream_destroy(&reference);
}

/* ---- states between backends ---- */

/* Writes `count` greedy tokens after the state of s, whose last logits are given. */
static void greedy(Stream *s, float *logits, int32_t *out, int count) {
    for (int i = 0; i < count; i++) {
        int best = 0;
        for (int v = 1; v < s->config.vocab_size; v++)
            if (logits[v] > logits[best]) best = v;
        out[i] = best;
        MegalodonBatch batch = {.tokens = &out[i], .B = 1, .T = 1, .carry = true};
        must(s->backend->forward(s->model, &batch, NULL));
        must(s->backend->last_logits(s->model, logits));
    }
}

/* A text that was read by one backend is continued by the other: from a file, and from a copy in memory. */
static void check_crossing(const MegalodonBackend *from, const MegalodonBackend *to) {
    enum { COUNT = 200 };
    static const char hash[CHECKPOINT_HASH] = "0123456789abcdef";
    float logits[64], loaded[64];
    int32_t want[COUNT], ours[COUNT], copied[COUNT];
    StateCopy copy = {0};
    const char *path = in_folder("state");
    for (int length = 509; length <= 512; length += 3) {             /* inside a chunk, and at the end of one */
        Stream a = stream_create(from, PAGE), b = stream_create(to, PAGE), c = stream_create(to, PAGE);
        stream_read(&a, length, 100);
        must(from->last_logits(a.model, logits));
        must(checkpoint_state_write(path, from, a.model, &a.config, hash, logits));
        must(checkpoint_state_resume(path, to, b.model, &b.config, hash, loaded));
        check(memcmp(logits, loaded, (size_t)a.config.vocab_size * sizeof *logits) == 0, "loaded logits differ");
        must(state_take(&copy, from, a.model, &a.config));
        must(state_give(&copy, to, c.model));
        greedy(&b, loaded, ours, COUNT);
        memcpy(loaded, logits, sizeof logits);
        greedy(&c, loaded, copied, COUNT);
        greedy(&a, logits, want, COUNT);
        check(memcmp(want, ours, sizeof want) == 0, "%s to %s by file after %d tokens: another text", from->name,
              to->name, length);
        check(memcmp(want, copied, sizeof want) == 0, "%s to %s by copy after %d tokens: another text", from->name,
              to->name, length);
        const char *error = checkpoint_state_resume(path, to, b.model, &b.config, "fedcba9876543210", NULL);
        check(error && strstr(error, "state of another model of the same size"), "another model: %s", error);
        MegalodonConfig other = b.config;
        other.rope_base = 5000;
        error = checkpoint_state_resume(path, to, b.model, &other, hash, NULL);
        check(error && strstr(error, "rope_base 100000 and 5000"), "another configuration: %s", error);
        stream_destroy(&a);
        stream_destroy(&b);
        stream_destroy(&c);
    }
    state_free(&copy);
    unlink(path);
}

/* ---- streams: which tokens a row sees ---- */

/* Two files. Documents end behind "##" and a line feed, if there is one; one separator is the last text of a file, two
 * follow each other, one document is a single letter. */
static const char *const texts[] = {"alpha beta gamma##\ndelta##\n##eps##zeta eta theta iota kappa lambda mu nu xi##",
                                    "one two three##\n4##\nfive six seven eight nine"};
/* Ends of the documents, counted from the start of both. */
static const int ends[] = {19, 27, 29, 34, 77, 93, 97, 122};

static bool is_end(int64_t at) {
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (ends[i] == at) return true;
    return false;
}

static void write_texts(void) {
    must(checkpoint_make_directory(in_folder("texts")));
    for (int i = 0; i < 2; i++) {
        FILE *file = fopen(in_folder(i ? "texts/2" : "texts/1"), "w");
        if (!file || fputs(texts[i], file) < 0 || fclose(file) != 0) must("cannot write a text");
    }
}

/* Two rounds through the streams of B rows in segments of T: every token but the first of a document is the target of
 * the token before it exactly once a round, in order, and a row is fresh exactly where a document begins. */
static void check_streams(int B, int T) {
    char whole[256];
    Dataset data;
    Streams s;
    DocumentMark mark;
    int32_t *tokens = must_allocate((size_t)T * sizeof *tokens), *targets = must_allocate((size_t)T * sizeof *targets);
    snprintf(whole, sizeof whole, "%s%s", texts[0], texts[1]);
    must(dataset_open(&data, in_folder("texts"), 256));
    int64_t size = (int64_t)strlen(whole);
    check(size == data.size && is_end(size), "the text of the test has %lld bytes", (long long)size);
    must(document_mark_text(&mark, "##"));
    must(streams_open(&s, &data, 0, size, B, T, &mark));
    for (int row = 0; row < B; row++) {
        int64_t begin = streams_begin(&s, row), end = streams_end(&s, row), at = begin;
        int wrong = 0, round = 0, t;
        for (int guard = 0; round < 2 && guard < 1000; guard++) {
            bool fresh, expected = at == begin || is_end(at);
            must(streams_next(&s, row, tokens, targets, &fresh));
            /* Single tokens are skipped: what is left of a document when its segment was full. */
            for (; at + 1 == end || is_end(at + 1); expected = true)
                if (++at == end) at = begin, round++;
            wrong += fresh != expected;
            for (t = 0; t < T && targets[t] != MEGALODON_IGNORE; t++, at++)
                wrong += tokens[t] != whole[at] || targets[t] != whole[at + 1] || at + 1 >= end || is_end(at + 1);
            if (t < T) wrong += ++at != end && !is_end(at);          /* it ended with its document */
            if (at == end) at = begin, round++;
            wrong += s.next[row] != at;
        }
        check(wrong == 0 && round >= 2, "B %d, T %d: row %d: %d wrong, %d rounds", B, T, row, wrong, round);
    }
    check(streams_seek(&s, 0, size, true) != NULL || B == 1, "a place in another row's stream passes");
    streams_close(&s);
    check(streams_open(&s, &data, 0, size, (int)size, T, &mark) != NULL, "streams of one token pass");
    dataset_close(&data);
    free(tokens);
    free(targets);
}

/* ---- training with a carried state ---- */

enum { ROWS = 3, SEGMENT = 16, PARTS = 4 };

static MegalodonModel *training_model(const MegalodonBackend *backend, const MegalodonConfig *config, int max_length) {
    MegalodonOptions options = {.max_batch = ROWS, .max_length = max_length, .training = true, .carry = true};
    return model_create(backend, config, &options, 3);
}

/* Segments with a carried state have the loss of one sequence that is as long as all of them. */
static void check_segments(const MegalodonBackend *backend, double tolerance) {
    MegalodonConfig config = small_config();
    int32_t tokens[ROWS * SEGMENT * 2 + 1], part[2][ROWS * SEGMENT];
    MegalodonModel *once = training_model(backend, &config, 2 * SEGMENT);
    MegalodonModel *twice = training_model(backend, &config, SEGMENT);
    MegalodonLoss whole, loss, sum = {0};
    random_tokens(tokens, ROWS * SEGMENT * 2 + 1, config.vocab_size, 9);
    MegalodonBatch batch = {.tokens = tokens, .targets = tokens + 1, .B = ROWS, .T = 2 * SEGMENT};
    must(backend->forward(once, &batch, &whole));
    for (int segment = 0; segment < 2; segment++) {
        for (int i = 0; i < ROWS * SEGMENT; i++)
            for (int next = 0; next < 2; next++)
                part[next][i] = tokens[i / SEGMENT * 2 * SEGMENT + segment * SEGMENT + i % SEGMENT + next];
        batch = (MegalodonBatch){.tokens = part[0], .targets = part[1], .B = ROWS, .T = SEGMENT, .carry = segment > 0};
        must(backend->forward(twice, &batch, &loss));
        must(backend->backward(twice, 1. / (ROWS * SEGMENT)));       /* the cut: each segment has its own */
        sum.nll_sum += loss.nll_sum;
        sum.counted += loss.counted;
    }
    double error = fabs(sum.nll_sum - whole.nll_sum) / whole.nll_sum;
    check(error <= tolerance && sum.counted == whole.counted, "%s: the loss of two segments is off by %.2e",
          backend->name, error);
    printf("%-10s two carried segments differ from one sequence in loss by %.1e\n", backend->name, error);
    backend->destroy(once);
    backend->destroy(twice);
}

/* One row forgets what it read, the others go on: their losses are those of runs in which nothing was forgotten, and
 * its loss is that of an empty state. */
static void check_forgetting(const MegalodonBackend *backend) {
    MegalodonConfig config = small_config();
    int32_t tokens[PARTS][ROWS * SEGMENT], targets[PARTS][ROWS * SEGMENT];
    MegalodonModel *model = training_model(backend, &config, SEGMENT);
    StateCopy copy = {0};
    const bool second[ROWS] = {false, true};
    double kept[PARTS][ROWS * SEGMENT], ours[ROWS * SEGMENT], empty[ROWS * SEGMENT];
    for (int i = 0; i < PARTS; i++) {
        random_tokens(tokens[i], ROWS * SEGMENT, config.vocab_size, 20 + (uint64_t)i);
        random_tokens(targets[i], ROWS * SEGMENT, config.vocab_size, 40 + (uint64_t)i);
    }
    for (int i = 0; i < PARTS; i++) {
        MegalodonBatch batch = {.tokens = tokens[i], .targets = targets[i], .B = ROWS, .T = SEGMENT, .carry = i > 0};
        must(backend->forward(model, &batch, NULL));
        must(backend->get(model, MEGALODON_ACT, "nll", kept[i], MEGALODON_F64));
    }
    MegalodonBatch last = {.tokens = tokens[2], .targets = targets[2], .B = ROWS, .T = SEGMENT};
    must(backend->forward(model, &last, NULL));
    must(backend->get(model, MEGALODON_ACT, "nll", empty, MEGALODON_F64));
    for (int i = 0; i < PARTS - 1; i++) {
        MegalodonBatch batch = {.tokens = tokens[i], .targets = targets[i], .B = ROWS, .T = SEGMENT, .carry = i > 0};
        if (i == 2) must(backend->reset_rows(model, second));
        must(backend->forward(model, &batch, NULL));
    }
    must(backend->get(model, MEGALODON_ACT, "nll", ours, MEGALODON_F64));
    for (int row = 0; row < ROWS; row++) {
        const double *want = row == 1 ? empty : kept[2];
        check(memcmp(ours + row * SEGMENT, want + row * SEGMENT, SEGMENT * sizeof *want) == 0,
              "%s: row %d after row 1 forgot", backend->name, row);
    }
    /* The copy is exact: the run goes on bit for bit from one that was taken before something else was computed. */
    for (int i = 0; i < PARTS; i++) {
        MegalodonBatch batch = {.tokens = tokens[i], .targets = targets[i], .B = ROWS, .T = SEGMENT, .carry = i > 0};
        if (i == PARTS - 1) {
            must(state_take(&copy, backend, model, &config));
            last.B = 1;
            must(backend->forward(model, &last, NULL));
            must(state_give(&copy, backend, model));
        }
        must(backend->forward(model, &batch, NULL));
    }
    must(backend->get(model, MEGALODON_ACT, "nll", ours, MEGALODON_F64));
    check(memcmp(ours, kept[PARTS - 1], sizeof ours) == 0, "%s: a state taken and given back differs", backend->name);
    state_free(&copy);
    backend->destroy(model);
}

int main(void) {
    int threads;
    test_begin("stream");
    must(backend_threads(1, &threads));      /* the models are so small that a second one would only be waited for */
    if (!mkdtemp(folder)) must("cannot create a temporary folder");
    write_texts();
    for (int B = 1; B <= 5; B++)
        for (int T = 1; T <= 130; T += T < 24 ? 1 : 53) check_streams(B, T);
    for (int i = 0; i < 2; i++) {
        check_segments(i ? wide : &megalodon_cpu, i ? 1e-13 : 1e-6);
        check_forgetting(i ? wide : &megalodon_cpu);
        check_crossing(i ? wide : &megalodon_cpu, i ? &megalodon_cpu : wide);
    }
    check_million(&megalodon_cpu);
#ifdef MEGALODON_WITH_CUDA
    const char *why = megalodon_cuda.unavailable();
    if (why) {
        test_skip(why);
    } else {
        check_segments(&megalodon_cuda, 1e-6);
        check_crossing(&megalodon_cpu, &megalodon_cuda);
        check_crossing(&megalodon_cuda, &megalodon_cpu);
        check_million(&megalodon_cuda);
    }
#endif
    unlink(in_folder("texts/1"));
    unlink(in_folder("texts/2"));
    rmdir(in_folder("texts"));
    rmdir(folder);
    return test_end();
}
