/* test_dataset.c - tokens from text and from .npy files: windows, folders, identity, and every header that is not what
 * it should be.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../lib/dataset.h"
#include "../lib/documents.h"
#include "test.h"

static char root[] = "/tmp/test_dataset.XXXXXX";

/* "ROOT/NAME", in one of a few buffers that are used in turn. */
static const char *path_of(const char *name) {
    static char paths[4][256];
    static int next = 0;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", root, name);
    return path;
}

static void write_file(const char *name, const void *bytes, size_t n) {
    FILE *file = fopen(path_of(name), "wb");
    if (check(file && fwrite(bytes, 1, n, file) == n, "writing %s", name)) fclose(file);
}

/* A .npy file of version 1.0 with this header text and these bytes after it. */
static size_t make_npy(uint8_t *out, const char *header, const void *data, size_t bytes) {
    size_t n = strlen(header);
    memcpy(out, "\x93NUMPY\x01", 7);
    out[7] = 0;
    out[8] = (uint8_t)n;
    out[9] = (uint8_t)(n >> 8);
    memcpy(out + 10, header, n);
    if (bytes > 0) memcpy(out + 10 + n, data, bytes);
    return 10 + n + bytes;
}

static void write_npy(const char *name, const char *header, const void *data, size_t bytes) {
    uint8_t file[4096];
    write_file(name, file, make_npy(file, header, data, bytes));
}

/* Opening must fail with a sentence that has `hint` in it. */
static void expect_refused(const char *name, const char *hint) {
    Dataset ds;
    const char *error = dataset_open(&ds, path_of(name), 256);
    if (check(error != NULL, "%s: was taken; expected an error with \"%s\"", name, hint))
        check(strstr(error, hint) != NULL, "%s: expected \"%s\" in \"%s\"", name, hint, error);
    else dataset_close(&ds);
}

static void test_text(void) {
    enum { N = 200000 };                                     /* several blocks of reading */
    static uint8_t bytes[N];
    static int32_t window[N];
    Dataset ds;
    for (int i = 0; i < N; i++) bytes[i] = (uint8_t)(i * 7 + i / 251);
    write_file("text", bytes, N);
    const char *error = dataset_open(&ds, path_of("text"), 256);
    if (!check(!error, "%s", error)) return;
    check(ds.size == N && ds.text && ds.num_files == 1, "text: size %lld", (long long)ds.size);
    const struct { int64_t offset, length; } windows[] = {{0, 0}, {0, 1}, {0, N}, {N - 1, 1}, {N, 0}, {65530, 12},
                                                          {12345, 131072}};
    for (size_t w = 0; w < sizeof windows / sizeof windows[0]; w++) {
        int64_t wrong = 0;
        error = dataset_window(&ds, windows[w].offset, windows[w].length, window);
        for (int64_t i = 0; i < windows[w].length; i++) wrong += window[i] != bytes[windows[w].offset + i];
        check(!error && wrong == 0, "window %zu: %lld wrong tokens, %s", w, (long long)wrong, error);
    }
    check(dataset_window(&ds, N, 1, window) != NULL, "one token past the end");
    check(dataset_window(&ds, -1, 1, window) != NULL, "before the start");
    check(dataset_window(&ds, 1, INT64_MAX, window) != NULL, "a length that overflows");
    check(truncate(path_of("text"), N / 2) == 0, "truncate");
    error = dataset_window(&ds, N - 10, 10, window);
    check(error && strstr(error, "ends at byte"), "a file that shrank: %s", error);
    dataset_close(&ds);

    check(!dataset_open(&ds, path_of("text"), 128), "open with a small vocabulary");
    error = dataset_window(&ds, 0, 100, window);             /* byte 19 is 133 */
    check(error && strstr(error, "token 19 is 133"), "a byte outside of the vocabulary: %s", error);
    dataset_close(&ds);
}

static void test_folder(void) {
    int32_t window[16];
    uint64_t first = 0, second = 0, third = 0;
    Dataset ds;
    check(mkdir(path_of("folder"), 0777) == 0, "mkdir");
    expect_refused("folder", "holds no files");
    write_file("folder/b", "defg", 4);
    write_file("folder/a", "abc", 3);
    write_file("folder/empty", "", 0);
    write_file("folder/z", "hi", 2);
    write_file("folder/.hidden", "no", 2);
    const char *error = dataset_open(&ds, path_of("folder"), 256);
    if (!check(!error, "%s", error)) return;
    check(ds.size == 9 && ds.num_files == 4, "folder: %lld tokens in %d files", (long long)ds.size, ds.num_files);
    error = dataset_window(&ds, 0, 9, window);
    for (int i = 0; i < 9; i++)
        check(!error && window[i] == "abcdefghi"[i], "folder: token %d is %d", i, (int)window[i]);
    error = dataset_window(&ds, 6, 2, window);
    check(!error && window[0] == 'g' && window[1] == 'h', "a window over two files");
    check(!dataset_hash(&ds, &first), "hash");
    dataset_close(&ds);

    write_file("folder/z", "hI", 2);
    check(!dataset_open(&ds, path_of("folder"), 256) && !dataset_hash(&ds, &second), "hash again");
    check(first != second, "a changed byte changes the hash");
    dataset_close(&ds);
    write_file("folder/z", "I", 1);                          /* the same bytes, divided otherwise */
    write_file("folder/b", "defgh", 5);
    check(!dataset_open(&ds, path_of("folder"), 256) && !dataset_hash(&ds, &third), "hash again");
    check(third != second, "a byte that moves to another file changes the hash");
    dataset_close(&ds);

    uint16_t tokens[2] = {0, 0};
    write_npy("folder/c.npy", "{'descr': '<u2', 'fortran_order': False, 'shape': (2,), }\n", tokens, 4);
    expect_refused("folder", "one kind");
    check(unlink(path_of("folder/c.npy")) == 0 && mkdir(path_of("folder/sub"), 0777) == 0, "mkdir sub");
    expect_refused("folder", "not a regular file");
}

static void test_npy(void) {
    const uint8_t two[] = {1, 0, 255, 0, 0, 1};              /* 1, 255, 256 */
    const uint8_t four[] = {1, 0, 0, 0, 0, 0, 1, 0};         /* 1, 65536    */
    int32_t window[4];
    Dataset ds;
    write_npy("u2.npy", "{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }      \n", two, 6);
    const char *error = dataset_open(&ds, path_of("u2.npy"), 1000);
    if (check(!error, "%s", error)) {
        error = dataset_window(&ds, 0, 3, window);
        check(!error && ds.size == 3 && !ds.text && window[0] == 1 && window[1] == 255 && window[2] == 256,
              "uint16: %lld tokens, %d %d %d, %s", (long long)ds.size, (int)window[0], (int)window[1], (int)window[2],
              error);
        dataset_close(&ds);
    }
    error = dataset_open(&ds, path_of("u2.npy"), 256);
    if (check(!error, "%s", error)) {
        error = dataset_window(&ds, 1, 2, window);
        check(error && strstr(error, "token 2 is 256"), "outside of the vocabulary: %s", error);
        dataset_close(&ds);
    }
    /* Keys in another order, double quotes, no comma and no space: still a Python dict. */
    write_npy("u4.npy", "{\"shape\":(2,),\"fortran_order\":True,\"descr\":\"<u4\"}\n", four, 8);
    error = dataset_open(&ds, path_of("u4.npy"), 100000);
    if (check(!error, "%s", error)) {
        error = dataset_window(&ds, 0, 2, window);
        check(!error && window[0] == 1 && window[1] == 65536, "uint32: %d %d", (int)window[0], (int)window[1]);
        dataset_close(&ds);
    }
}

static void test_bad_headers(void) {
    const uint8_t data[] = {1, 0, 2, 0, 3, 0};
    const struct { const char *header, *hint; } cases[] = {
        {"{'descr': '>u2', 'fortran_order': False, 'shape': (3,), }\n", "its type is >u2, big-endian, neither <u2 nor <u4"},
        {"{'descr': '>u4', 'fortran_order': False, 'shape': (1,), }\n", "its type is >u4, big-endian"},
        {"{'descr': '|u1', 'fortran_order': False, 'shape': (6,), }\n", "its type is |u1, neither"},
        {"{'descr': '<u8', 'fortran_order': False, 'shape': (1,), }\n", "its type is <u8, neither"},
        {"{'descr': '<i2', 'fortran_order': False, 'shape': (3,), }\n", "uint16"},
        {"{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }\n", "uint16"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (3,1), }\n", "one dimension"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (3), }\n", "one dimension"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (), }\n", "one dimension"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (-3,), }\n", "one dimension"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (99999999999999999999999,), }\n", "one dimension"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (4,), }\n", "tells of 4 tokens"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (2,), }\n", "tells of 2 tokens"},
        {"{'descr': '<u4', 'fortran_order': False, 'shape': (1,), }\n", "tells of 1 tokens"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (18014398509481987,), }\n", "tells of"},
        {"{'descr': '<u2', 'fortran_order': False, }\n", "lacks"},
        {"{'descr': '<u2', 'descr': '<u2', 'fortran_order': False, 'shape': (3,), }\n", "repeated"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (3,), 'more': 1, }\n", "unknown"},
        {"{'descr': '<u2', 'fortran_order': Perhaps, 'shape': (3,), }\n", "fortran_order"},
        {"{'descr': '<u2' 'fortran_order': False, 'shape': (3,), }\n", "comma"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }", "line feed"},
        {"{'descr': '<u2', 'fortran_order': False, 'shape': (3,), } x\n", "line feed"},
        {"{'descr: '<u2', 'fortran_order': False, 'shape': (3,), }\n", "not a dict"},
        {"{'descr': [('a', '<u2')], 'fortran_order': False, 'shape': (3,), }\n", "simple type"},
        {"", "does not start"},
        {"{", "not a dict"},
        {"\n", "does not start"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        write_npy("bad.npy", cases[i].header, data, sizeof data);
        expect_refused("bad.npy", cases[i].hint);
    }
    write_file("bad.npy", "", 0);
    expect_refused("bad.npy", "too few");
    write_file("bad.npy", "just some text, long enough", 27);
    expect_refused("bad.npy", "not a .npy file");
    write_file("bad.npy", "\x93NUMPY\x09\0\x10\0{}          ", 22);
    expect_refused("bad.npy", "version 9.0");
    write_file("bad.npy", "\x93NUMPY\x01\0\xff\xff{}          ", 22);
    expect_refused("bad.npy", "too long");
    write_file("bad.npy", "\x93NUMPY\x02\0\xff\xff\xff\xff{}        ", 22);
    expect_refused("bad.npy", "too long");
}

/* A file cut anywhere, and a header with any bit flipped: an error, or a file that still means the same numbers. */
static void test_damage(void) {
    const char *header = "{'descr': '<u2', 'fortran_order': False, 'shape': (3,), }   \n";
    const uint8_t data[] = {1, 0, 2, 0, 3, 0};
    uint8_t whole[256], damaged[256];
    size_t n = make_npy(whole, header, data, sizeof data);
    Dataset ds;
    for (size_t cut = 0; cut < n; cut++) {
        write_file("cut.npy", whole, cut);
        if (!check(dataset_open(&ds, path_of("cut.npy"), 256) != NULL, "cut at byte %zu: was taken", cut))
            dataset_close(&ds);
    }
    for (size_t bit = 0; bit < 8 * (n - sizeof data); bit++) {
        int32_t window[3] = {0, 0, 0};
        memcpy(damaged, whole, n);
        damaged[bit / 8] ^= (uint8_t)(1 << bit % 8);
        write_file("flip.npy", damaged, n);
        if (dataset_open(&ds, path_of("flip.npy"), 256) != NULL) continue;
        const char *error = dataset_window(&ds, 0, ds.size < 3 ? ds.size : 3, window);
        check(!error && ds.size == 3 && window[0] == 1 && window[1] == 2 && window[2] == 3,
              "bit %zu: taken with %lld tokens", bit, (long long)ds.size);
        dataset_close(&ds);
    }
}

/* A file far larger than memory: nothing of it is held but what is asked for. The file has holes instead of blocks. */
static void test_large(void) {
    const int64_t count = (int64_t)100 << 30;                /* tokens of two bytes: 200 GiB */
    char header[128];
    int32_t window[8];
    uint64_t hash;
    Dataset ds;
    snprintf(header, sizeof header, "{'descr': '<u2', 'fortran_order': False, 'shape': (%lld,), }\n", (long long)count);
    write_npy("large.npy", header, NULL, 0);
    off_t start = (off_t)(10 + strlen(header));
    const uint8_t last[] = {7, 0, 1, 2};
    int file = open(path_of("large.npy"), O_WRONLY);
    bool made = file >= 0 && ftruncate(file, start + 2 * (off_t)count) == 0 &&
                pwrite(file, last, 4, start + 2 * (off_t)count - 4) == 4;
    if (file >= 0) close(file);
    if (!made) {
        test_skip("a file of 200 GiB with holes: this disk cannot have one");
    } else {
        const char *error = dataset_open(&ds, path_of("large.npy"), 1000);
        if (check(!error, "%s", error)) {
            check(ds.size == count, "200 GiB: %lld tokens", (long long)ds.size);
            error = dataset_window(&ds, count - 3, 3, window);
            check(!error && window[0] == 0 && window[1] == 7 && window[2] == 513, "the last tokens: %d %d %d, %s",
                  (int)window[0], (int)window[1], (int)window[2], error);
            error = dataset_check(&ds);                      /* parts of it, in a moment */
            check(!error, "%s", error);
            check(!dataset_hash(&ds, &hash), "hash");
            dataset_close(&ds);
        }
    }
    unlink(path_of("large.npy"));
}

/* Every token of data that is not huge is looked at before a run. */
static void test_vocabulary(void) {
    enum { N = 50000 };
    static uint16_t tokens[N];
    char header[128];
    Dataset ds;
    snprintf(header, sizeof header, "{'descr': '<u2', 'fortran_order': False, 'shape': (%d,), }\n", N);
    for (int place = 0; place < N; place += place < 4 ? 1 : 12345) {
        static uint8_t file[2 * N + 128], bytes[2 * N];
        for (int i = 0; i < N; i++) tokens[i] = (uint16_t)(i == place ? 300 : i % 300);
        for (int i = 0; i < N; i++) bytes[2 * i] = (uint8_t)tokens[i], bytes[2 * i + 1] = (uint8_t)(tokens[i] >> 8);
        write_file("check.npy", file, make_npy(file, header, bytes, sizeof bytes));
        char hint[64];
        snprintf(hint, sizeof hint, "token %d is 300, but the model knows only 0 to 299", place);
        const char *error = dataset_open(&ds, path_of("check.npy"), 300);
        if (!check(!error, "%s", error)) continue;
        error = dataset_check(&ds);
        check(error && strstr(error, hint), "expected \"%s\" in %s", hint, error);
        ds.vocab_size = 301;
        check(!dataset_check(&ds), "all tokens are known, but the check says no");
        dataset_close(&ds);
    }
    write_file("bytes", "abc\xff", 4);
    check(!dataset_open(&ds, path_of("bytes"), 256) && !dataset_check(&ds), "bytes");
    ds.vocab_size = 255;
    check(dataset_check(&ds) != NULL, "the byte 255 is one of 255 tokens");
    dataset_close(&ds);
    write_file("lines.jsonl", "{}\n", 3);
    expect_refused("lines.jsonl", "holds examples");
}

/* ------------------------------------------------------------------------------------------------------------------
 * Documents: which predictions go across an end. Each of the texts is told again by a second, slow search.
 */

/* Is place i of text[0, n), i >= 1, the first of a document? */
static bool begins(const char *text, int n, int i, const char *mark) {
    int m = (int)strlen(mark);
    for (int end = i - 1; m > 0 && end <= i; end++)          /* the mark ends before the place, or before its line feed */
        if (end >= m && memcmp(text + end - m, mark, (size_t)m) == 0) {
            bool feed = end < n && text[end] == '\n';
            if (end == i ? !feed : feed) return true;
        }
    return false;
}

static void expect_left_out(Dataset *ds, const DocumentMark *mark, const char *const *files, const char *text) {
    int n[2] = {(int)strlen(files[0]), (int)strlen(files[1])}, size = n[0] + n[1], wrong = 0, left_out = 0;
    static int32_t window[1024];
    int32_t targets[256];
    for (int T = 1; T < size; T += T < 5 ? 1 : 7) {
        for (int start = 0; start + T < size; start++) {
            for (int t = 0; t < T; t++) targets[t] = 1000 + t;
            const char *error = documents_leave_out(mark, ds, start, T, window, targets);
            if (!check(!error, "%s", error)) return;
            for (int t = 0; t < T; t++) {
                int at = start + t + 1, file = at >= n[0];
                bool first = at == n[0] || begins(files[file], n[file], at - file * n[0], text);
                wrong += targets[t] != (first ? MEGALODON_IGNORE : 1000 + t);
                left_out += first;
            }
        }
    }
    check(wrong == 0, "mark \"%s\": %d targets wrong", text, wrong);
    check(left_out > 100, "mark \"%s\": only %d targets were left out", text, left_out);
}

static void test_documents(void) {
    static const char *const files[] = {"alpha beta##\ngamma##delta##\n##eps##\n\nzeta eta##",
                                        "\none##two three###four#five#\nsix##\n"};
    Dataset ds;
    DocumentMark mark;
    check(mkdir(path_of("documents"), 0777) == 0, "mkdir");
    write_file("documents/1", files[0], strlen(files[0]));
    write_file("documents/2", files[1], strlen(files[1]));
    const char *error = dataset_open(&ds, path_of("documents"), 256);
    if (!check(!error, "%s", error)) return;
    const char *const marks[] = {"##", "#", " ", "a##\ng", "zzz"};
    for (size_t i = 0; i < sizeof marks / sizeof *marks; i++) {
        check(!document_mark_text(&mark, marks[i]), "mark %zu", i);
        if (i < 3) expect_left_out(&ds, &mark, files, marks[i]);
    }
    /* A token is one without a line feed. */
    int32_t targets[80], window[512];
    document_mark_token(&mark, '#');
    for (int t = 0; t < 30; t++) targets[t] = 0;
    error = documents_leave_out(&mark, &ds, 0, 30, window, targets);
    for (int t = 0; t < 30; t++)
        check(!error && targets[t] == (files[0][t] == '#' ? MEGALODON_IGNORE : 0), "token mark: target %d is %d", t,
              (int)targets[t]);
    char long_mark[300];
    memset(long_mark, 'x', sizeof long_mark);
    long_mark[257] = 0;
    error = document_mark_text(&mark, long_mark);
    check(error && strstr(error, "at most 256 bytes"), "a mark of 257 bytes: %s", error);
    dataset_close(&ds);
}

int main(void) {
    test_begin("dataset");
    if (!check(mkdtemp(root) != NULL, "no folder for the test")) return test_end();
    Dataset ds;
    check(dataset_open(&ds, "", 256) != NULL, "no name");
    expect_refused("nothing", "cannot be opened");
    write_file("none", "", 0);
    expect_refused("none", "is empty");
    expect_refused("none/below", "cannot be opened");
    test_text();
    test_folder();
    test_npy();
    test_bad_headers();
    test_damage();
    test_large();
    test_vocabulary();
    test_documents();
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", root);
    check(system(command) == 0, "cleaning up");
    return test_end();
}
