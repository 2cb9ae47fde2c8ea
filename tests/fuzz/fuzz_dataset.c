/* fuzz_dataset.c - lib/dataset.h and lib/streams.h: any file is refused with a sentence as a .npy file or as a text, or
 * gives the tokens that it holds, in windows and in streams. */
#include "fuzz.h"

#include "lib/dataset.h"
#include "lib/streams.h"

static FuzzFile input;
static char folder[] = "/dev/shm/fuzz_dataset_XXXXXX", npy[64];

static void remove_folder(void) {
    unlink(npy);
    rmdir(folder);
}

/* A .npy file is known by its name, and a file in memory has none: so a link has it. */
static void make_name(void) {
    if (npy[0]) return;
    expect(mkdtemp(folder), "cannot create %s", folder);
    snprintf(npy, sizeof npy, "%s/tokens.npy", folder);
    expect(symlink(input.path, npy) == 0, "cannot create %s", npy);
    atexit(remove_folder);
}

/* A header as a .npy file has it, of the right length, for bytes that start with '{' and have a line feed. */
static void write_file(const uint8_t *bytes, size_t size) {
    const uint8_t *feed = size > 0 && bytes[0] == '{' ? memchr(bytes, '\n', size) : NULL;
    size_t length = feed ? (size_t)(feed + 1 - bytes) : 0;
    uint8_t head[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (uint8_t)length, (uint8_t)(length >> 8)};
    fuzz_file(&input, head, feed ? 10 : 0);
    fuzz_file_write(&input, bytes, size, feed ? 10 : 0);
}

/* Streams give each token of a document once as a token, and never run out. */
static void use_streams(Dataset *ds, int B, int T) {
    Streams streams;
    int32_t tokens[16], targets[16];
    bool fresh;
    DocumentMark mark;
    const char *error = NULL;
    if (ds->text) error = document_mark_text(&mark, "\n\n");
    else document_mark_token(&mark, 0);
    expect(!error, "%s", error);
    error = streams_open(&streams, ds, 0, ds->size, B, T, &mark);
    expect_sentence(error);
    if (error) return;
    for (int i = 0; i < 12 && !error; i++) {
        error = streams_next(&streams, i % B, tokens, targets, &fresh);
        expect_sentence(error);
        for (int t = 0; t < T && !error; t++)
            expect(targets[t] == MEGALODON_IGNORE || (targets[t] >= 0 && targets[t] < ds->vocab_size),
                   "target %d is %d", t, (int)targets[t]);
    }
    streams_close(&streams);
}

static void use(const char *path, const uint8_t *bytes, size_t size, int vocab_size) {
    Dataset ds;
    int32_t all[4096], part[64];
    uint64_t hash, again;
    const char *error = dataset_open(&ds, path, vocab_size);
    expect_sentence(error);
    if (error) return;
    int64_t n = ds.size < 4096 ? ds.size : 4096;
    error = dataset_window(&ds, 0, n, all);
    expect_sentence(error);
    for (int64_t t = 0; t < n && !error; t++) expect(all[t] >= 0 && all[t] < vocab_size, "token %d", (int)all[t]);
    for (int64_t t = 0; ds.text && t < n && !error && bytes[0] != '{'; t++) expect(all[t] == bytes[t], "another byte");
    /* Windows anywhere: a part of what was read, or refused. */
    for (int i = 0; i < 4 && !error; i++) {
        int64_t from = (int64_t)bytes[(size_t)i * size / 4] % (n + 2), length = i * 16;
        const char *refused = dataset_window(&ds, from, length, part);
        bool inside = from + length <= ds.size;
        expect(from + length > n || !inside || !refused, "%s", refused);
        if (!refused && from + length <= n)
            expect(memcmp(part, all + from, (size_t)length * sizeof *part) == 0, "another window");
        expect(inside || refused, "a window behind the end");
    }
    expect_sentence(dataset_window(&ds, -1, 1, part));
    expect(!(error = dataset_hash(&ds, &hash)) && !(error = dataset_hash(&ds, &again)), "%s", error);
    expect(hash == again, "two hashes of one file");
    use_streams(&ds, 1 + bytes[0] % 3, 1 + bytes[size - 1] % 16);
    dataset_close(&ds);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    if (size == 0) return 0;
    write_file(bytes, size);
    make_name();
    use(npy, bytes, size, 1000);
    use(input.path, bytes, size, 256);
    return 0;
}
