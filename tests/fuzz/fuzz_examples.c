/* fuzz_examples.c - lib/examples.h: any JSONL file is refused with a sentence, or gives the texts of its lines as rows of
 * tokens, of which each is drawn once. The input's first byte chooses bytes or a tokenizer. */
#include "fuzz.h"

#include "lib/examples.h"

static const char separator[] = "<|endoftext|>";

/* Models of 256 and of 128 bytes, and one with the tokenizer of the tests. */
static const Vocabulary *choose(int choice, DocumentMark *end) {
    static Vocabulary kinds[3];
    static DocumentMark ends[3];
    if (!kinds[0].size) {
        const char *error = vocabulary_load(&kinds[2], "tests/tokenizer/tokenizer.json");
        expect(!error, "%s (run it where the project's Makefile is)", error);
        vocabulary_fit(&kinds[0], 256);
        vocabulary_fit(&kinds[1], 128);
        for (int i = 0; i < 2; i++) expect(!document_mark_text(&ends[i], separator), "the mark is too long");
        document_mark_token(&ends[2], tokenizer_id(&kinds[2].tok, separator));
    }
    *end = ends[choice];
    return &kinds[choice];
}

/* The tokens of an example are those of a line's texts and of the mark. */
static void compare_text(const Examples *e, const Example *item, const Vocabulary *v, const DocumentMark *end,
                         const JsonNode *root) {
    const JsonNode *parts[2] = {json_get(root, "prompt"), json_get(root, "response")};
    const int32_t *at = e->tokens + item->first, *stop = at + item->length;
    if (!parts[1]) parts[1] = json_get(root, "text");
    for (int p = 0; p < 2; p++) {
        size_t count;
        int32_t *ids;
        if (!parts[p]) continue;
        const char *error = vocabulary_encode(v, parts[p]->string, parts[p]->length, &ids, &count);
        expect(!error, "%s", error);
        expect(count <= (size_t)(stop - at) && memcmp(ids, at, count * sizeof *ids) == 0, "another text");
        free(ids);
        at += count;
        if (p == 0) expect(at - e->tokens - item->first == item->prompt, "a prompt of %d tokens", item->prompt);
    }
    expect(stop - at == end->count && memcmp(at, end->tokens, (size_t)end->count * sizeof *at) == 0, "no end");
}

/* Reads the lines again, one by one. */
static void compare_lines(const Examples *e, const Vocabulary *v, const DocumentMark *end, const char *text, size_t n) {
    int64_t found = 0;
    for (size_t at = 0, stop; at < n; at = stop + 1) {
        Json json;
        stop = json_line_end(text, at, n);
        if (json_parse(&json, text + at, stop - at)) continue;       /* a blank line; others were refused */
        expect(found < e->count, "more lines than examples");
        compare_text(e, &e->items[found++], v, end, json.root);
        json_free(&json);
    }
    expect(found == e->count, "%d lines have become %d examples", (int)found, (int)e->count);
}

/* A row has the example's tokens and padding; its targets are the next tokens behind the prompt. */
static void check_rows(const Examples *e, int V) {
    enum { T = 24 };
    int32_t tokens[T], targets[T];
    for (int64_t i = 0; i < e->count; i++) {
        const Example *item = &e->items[i];
        int counted = 0, first = item->prompt > 1 ? item->prompt : 1;
        expect(item->prompt >= 0 && item->prompt < item->length && item->length <= e->longest, "odd lengths");
        if (item->length > T + 1) continue;
        examples_row(e, i, T, tokens, targets);
        for (int t = 0; t < T; t++) {
            expect(tokens[t] >= 0 && tokens[t] < V, "token %d", (int)tokens[t]);
            if (targets[t] == MEGALODON_IGNORE) continue;
            counted++;
            expect(targets[t] >= 0 && targets[t] < V && (t + 1 == T || targets[t] == tokens[t + 1]), "target %d",
                   (int)targets[t]);
        }
        expect(counted == item->length - first, "%d targets of %d tokens", counted, item->length);
    }
}

static void check_draws(const Examples *e, uint64_t seed) {
    bool drawn[256] = {false};
    for (int64_t k = 0; e->count <= 256 && k < e->count; k++) {
        int64_t i = examples_draw(e->count, seed, k);
        expect(i >= 0 && i < e->count && !drawn[i], "example %d is drawn twice", (int)i);
        drawn[i] = true;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static FuzzFile input;
    Examples e;
    DocumentMark end;
    if (size == 0) return 0;
    const Vocabulary *v = choose(bytes[0] % 3, &end);
    fuzz_file(&input, bytes + 1, size - 1);
    const char *error = examples_open(&e, input.path, v, &end);
    expect_sentence(error);
    if (error) return 0;
    compare_lines(&e, v, &end, (const char *)bytes + 1, size - 1);
    check_rows(&e, v->size);
    check_draws(&e, e.hash);
    examples_close(&e);
    return 0;
}
