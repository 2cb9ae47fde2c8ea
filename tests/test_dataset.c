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
    memcpy(out + 10 + n, data, bytes);
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
        {"{'descr': '>u2', 'fortran_order': False, 'shape': (3,), }\n", "little-endian"},
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
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", root);
    check(system(command) == 0, "cleaning up");
    return test_end();
}
