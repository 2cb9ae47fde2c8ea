/* fuzz_encode.c - lib/tokenizer.h and lib/text.h: any text becomes tokens whose bytes are the text again, the same ones
 * where it is cut in two at the places that are said to be safe. The input's first byte chooses how words are cut. */
#include "fuzz.h"

#include "lib/text.h"
#include "lib/tokenizer.h"

static Tokenizer base;

/* The tokenizer of the tests with the pattern that `choice` names. */
static Tokenizer choose(int choice) {
    if (!base.size) {
        const char *error = tokenizer_load("tests/tokenizer/tokenizer.json", &base);
        expect(!error, "%s (run it where the project's Makefile is)", error);
    }
    Tokenizer tok = base;
    tok.pattern = choice & 1 ? TOKENIZER_CL100K : TOKENIZER_GPT2;
    tok.digits = choice & 2 ? 3 : 1;
    if (choice & 4) tok.added_count = 0, memset(tok.added_starts, 0, sizeof tok.added_starts);
    return tok;
}

static size_t encode(const Tokenizer *tok, const uint8_t *text, size_t n, int32_t *ids) {
    size_t count;
    const char *error = tokenizer_encode(tok, text, n, ids, tokenizer_capacity(n), &count);
    expect(!error, "%s", error);
    return count;
}

/* The bytes of the tokens are those of the text, except where an added token takes white space with it. */
static void decode(const Tokenizer *tok, const int32_t *ids, size_t count, const uint8_t *text, size_t n) {
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        const uint8_t *bytes;
        size_t length;
        const char *error = tokenizer_decode_token(tok, ids[i], &bytes, &length);
        expect(!error, "%s", error);
        if (tok->added_count > 0) continue;
        expect(length <= n - at && memcmp(text + at, bytes, length) == 0, "token %zu has other bytes", i);
        at += length;
    }
    expect(tok->added_count > 0 || at == n, "%zu bytes have become %zu", n, at);
}

/* The writer holds bytes back and loses none before the stop text. */
static void write_text(const uint8_t *text, size_t n, FILE *sink) {
    TextWriter plain = {.file = sink, .printable = true}, stopping = {.file = sink, .stop = "ab\xc3\xa9"};
    for (size_t i = 0; i < n; i++) text_put(&plain, text[i]), text_put(&stopping, text[i]);
    bool stop = false;
    for (size_t i = 0; i + 4 <= n && !stop; i++) stop = memcmp(text + i, "ab\xc3\xa9", 4) == 0;
    expect(stop == stopping.stopped, "the stop text was %s", stop ? "not seen" : "not there");
    expect(plain.held < 4 && stopping.held < 8, "%zu and %zu bytes are held back", plain.held, stopping.held);
    text_end(&plain);
    text_end(&stopping);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static FILE *sink;
    static char written[1 << 13];
    if (size == 0 || size > 512) return 0;
    if (!sink) sink = fmemopen(written, sizeof written, "w");
    Tokenizer tok = choose(bytes[0]);
    uint8_t *text = malloc(size);                            /* so that the sanitizer sees its end */
    size_t n = size - 1, cut;
    int32_t *ids = malloc((tokenizer_capacity(size) + 1) * sizeof *ids);
    int32_t *parts = malloc((tokenizer_capacity(size) + 1) * sizeof *parts);
    expect(text && ids && parts && sink, "no memory");
    memcpy(text, bytes + 1, n);
    size_t count = encode(&tok, text, n, ids);
    decode(&tok, ids, count, text, n);
    if ((cut = tokenizer_cut(&tok, text, n)) > 0) {
        expect(cut < n, "a cut at %zu of %zu", cut, n);
        size_t first = encode(&tok, text, cut, parts);
        size_t second = encode(&tok, text + cut, n - cut, parts + first);
        expect(first + second == count && memcmp(ids, parts, count * sizeof *ids) == 0,
               "%zu tokens are others when the text is cut at %zu", count, cut);
    }
    rewind(sink);
    write_text(text, n, sink);
    free(text);
    free(ids);
    free(parts);
    return 0;
}
