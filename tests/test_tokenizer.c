/* test_tokenizer.c - ids against those that the Python package `tokenizers` gave for a hard text, any bytes at all,
 * cuts in the middle of a text, characters that come in parts, and every tokenizer.json that must be refused.
 *
 * tests/python/test_tokenizer.py compares many more bytes with the package itself; it also wrote the expected ids.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "../lib/dataset.h"
#include "../lib/text.h"
#include "../lib/tokenizer.h"
#include "test.h"

static char folder[] = "/tmp/test_tokenizer.XXXXXX";
static char temporary[64];                   /* a tokenizer.json of the moment */
static char *json_text;                      /* tests/tokenizer/tokenizer.json */
static size_t json_length;
static uint64_t random_state = 1234;
static long long compared;

static uint32_t random_below(uint32_t n) {
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 33) % n;
}

static void write_file(const char *path, const void *bytes, size_t n) {
    FILE *file = fopen(path, "wb");
    if (check(file != NULL, "%s: cannot be written", path)) {
        check(fwrite(bytes, 1, n, file) == n, "writing %s", path);
        fclose(file);
    }
}

/* `text` with the first `from` replaced, or from `from` on if `to` is NULL; free() it. */
static char *replaced(const char *text, const char *from, const char *to) {
    const char *at = strstr(text, from);
    if (!check(at != NULL, "the test's own tokenizer has no \"%s\"", from)) exit(test_end());
    size_t before = (size_t)(at - text), length = to ? strlen(to) : 0;
    const char *after = to ? at + strlen(from) : at + strlen(at);
    char *out = malloc(before + length + strlen(after) + 1);
    memcpy(out, text, before);
    if (to) memcpy(out + before, to, length);
    strcpy(out + before + length, after);
    return out;
}

static const char *load_text(const char *text, size_t length, Tokenizer *tok) {
    write_file(temporary, text, length);
    return tokenizer_load(temporary, tok);
}

/* ------------------------------------------------------------------------------------------------------------------
 * The variants of the tokenizer that tests/python/test_tokenizer.py makes as well.
 */

#define BYTE_LEVEL "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":true}"
#define SPLIT(regex) \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{\"Regex\":\"" regex "\"}," \
    "\"behavior\":\"Isolated\",\"invert\":false},{\"type\":\"ByteLevel\",\"add_prefix_space\":false," \
    "\"trim_offsets\":true,\"use_regex\":false}]}"
#define GPT2 "'s|'t|'re|'ve|'m|'ll|'d| ?\\\\p{L}+| ?\\\\p{N}+| ?[^\\\\s\\\\p{L}\\\\p{N}]+|\\\\s+(?!\\\\S)|\\\\s+"
#define CL100K(digits) "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\\\r\\\\n\\\\p{L}\\\\p{N}]?\\\\p{L}+|\\\\p{N}" digits \
    "| ?[^\\\\s\\\\p{L}\\\\p{N}]+[\\\\r\\\\n]*|\\\\s*[\\\\r\\\\n]+|\\\\s+(?!\\\\S)|\\\\s+"

static char *variant_gpt2(void) { return replaced(json_text, "1.0", "1.0"); }

static char *variant_prefix(void) {
    return replaced(json_text, "\"add_prefix_space\":false", "\"add_prefix_space\":true");
}

static char *variant_split(void) { return replaced(json_text, BYTE_LEVEL, SPLIT(GPT2)); }

static char *variant_llama3(void) {
    char *text = replaced(json_text, BYTE_LEVEL, SPLIT(CL100K("{1,3}")));
    char *out = replaced(text, "\"ignore_merges\":false", "\"ignore_merges\":true");
    free(text);
    return out;
}

static char *variant_qwen2(void) { return replaced(json_text, BYTE_LEVEL, SPLIT(CL100K(""))); }

/* Added tokens with every flag. */
static char *variant_added(void) {
    static const struct { const char *content, *flags; } rows[] = {
        {"foo", ""}, {"foobar", "lstrip"}, {"[R]", "rstrip"}, {"word", "single_word normalized"},
        {" two words", "normalized"}, {"endoftext", "special"}, {"na\xc3\xafve", "special normalized"},
        {"<|", "lstrip rstrip"}};
    static const char *const names[] = {"single_word", "lstrip", "rstrip", "normalized", "special"};
    char list[4096] = "\"special\":true}";
    size_t n = strlen(list);
    for (int i = 0; i < 8; i++) {
        n += (size_t)snprintf(list + n, sizeof list - n, ",{\"id\":%d,\"content\":\"%s\"", 2048 + i, rows[i].content);
        for (int f = 0; f < 5; f++)
            n += (size_t)snprintf(list + n, sizeof list - n, ",\"%s\":%s", names[f],
                                  strstr(rows[i].flags, names[f]) ? "true" : "false");
        n += (size_t)snprintf(list + n, sizeof list - n, "}");
    }
    return replaced(json_text, "\"special\":true}", list);
}

/* Every other merge and then the first hundred merges, which the list has twice so, as strings "a b". */
static char *variant_merges(void) {
    Json json;
    JsonWriter w = {0};
    char *head = replaced(json_text, "\"merges\":", NULL);
    check(json_parse(&json, json_text, json_length) == NULL, "the test's own tokenizer is JSON");
    const JsonNode *list = json_get(json_get(json.root, "model"), "merges");
    json_put_raw(&w, head);
    json_put_bytes(&w, "\"merges\":", 9);
    w.comma = false;
    json_open(&w, '[');
    for (int round = 0; round < 2; round++) {
        int i = 0;
        for (const JsonNode *pair = json_first(list); pair; pair = json_next(list, pair), i++) {
            char both[256];
            if (round == 0 ? i % 2 == 1 : i >= 100) continue;
            snprintf(both, sizeof both, "%s %s", pair[1].string, pair[2].string);
            json_put_string(&w, both);
        }
    }
    json_close(&w, ']');
    json_put_bytes(&w, "}}", 2);
    json_free(&json);
    free(head);
    char *untyped = replaced(w.text, "\"type\":\"BPE\",", ""), *out = replaced(untyped, "\"version\":\"1.0\",", "");
    free(w.text);
    free(untyped);
    return out;
}

static const struct Variant {
    const char *name, *expected;             /* ids of hard.txt                            */
    char *(*make)(void);
    bool exact;                              /* decoding gives the very bytes of the text  */
} variants[] = {
    {"gpt2", "hard_gpt2", variant_gpt2, true},       {"prefix", "hard_prefix", variant_prefix, false},
    {"split", "hard_gpt2", variant_split, true},     {"llama3", "hard_llama3", variant_llama3, true},
    {"qwen2", "hard_qwen2", variant_qwen2, true},    {"added", "hard_added", variant_added, false},
    {"merges", "hard_merges", variant_merges, true},
};
enum { VARIANTS = sizeof variants / sizeof *variants };

static bool load_variant(int v, Tokenizer *tok) {
    char *text = variants[v].make();
    const char *error = load_text(text, strlen(text), tok);
    free(text);
    return check(error == NULL, "%s: %s", variants[v].name, error);
}

/* ------------------------------------------------------------------------------------------------------------------
 * Good tokenizers.
 */

/* Ids of a text in new memory. */
static int32_t *encode(const Tokenizer *tok, const void *text, size_t n, size_t *count) {
    int32_t *ids = malloc(tokenizer_capacity(n) * sizeof *ids);
    const char *error = tokenizer_encode(tok, text, n, ids, tokenizer_capacity(n), count);
    check(error == NULL, "encoding %zu bytes: %s", n, error);
    return ids;
}

/* Do the ids stand for exactly this text? */
static bool decodes_to(const Tokenizer *tok, const int32_t *ids, size_t count, const void *text, size_t n) {
    size_t at = 0;
    for (size_t i = 0; i < count; i++) {
        const uint8_t *bytes;
        size_t length;
        if (tokenizer_decode_token(tok, ids[i], &bytes, &length)) return false;
        if (length > n - at || memcmp((const uint8_t *)text + at, bytes, length) != 0) return false;
        at += length;
    }
    return at == n;
}

/* The text in pieces, each as long as tokenizer_cut finds in a window, must give the ids of the whole. */
static void check_cuts(const Tokenizer *tok, const char *name, const uint8_t *text, size_t n, const int32_t *want,
                       size_t want_count, size_t window) {
    int32_t *ids = malloc(tokenizer_capacity(n) * sizeof *ids);
    size_t at = 0, count = 0, pieces = 0, width = window;
    while (at < n) {
        size_t left = n - at, piece = left, got = 0;
        if (left > width) {
            uint8_t *seen = malloc(width);           /* all that the function may look at */
            memcpy(seen, text + at, width);
            piece = tokenizer_cut(tok, seen, width);
            free(seen);
            if (piece == 0) {
                width *= 2;
                continue;
            }
        }
        const char *error = tokenizer_encode(tok, text + at, piece, ids + count, tokenizer_capacity(n) - count, &got);
        if (!check(error == NULL, "%s, window %zu: %s", name, window, error)) break;
        count += got;
        at += piece;
        width = window;
        pieces++;
    }
    check(pieces > 1, "%s: text of %zu bytes was never cut in windows of %zu", name, n, window);
    check(count == want_count && memcmp(ids, want, count * sizeof *ids) == 0,
          "%s: %zu pieces in windows of %zu have other tokens than the whole", name, pieces, window);
    free(ids);
}

static void test_variant(int v, const char *hard, size_t n) {
    Tokenizer tok;
    Dataset expected;
    char path[128];
    size_t count, wrong = 0;
    snprintf(path, sizeof path, "tests/tokenizer/%s.npy", variants[v].expected);
    if (!load_variant(v, &tok)) return;
    const char *error = dataset_open(&expected, path, tokenizer_vocab_size(&tok));
    if (check(error == NULL, "%s", error)) {
        int32_t *ids = encode(&tok, hard, n, &count), *want = malloc((size_t)expected.size * sizeof *want);
        check(dataset_window(&expected, 0, expected.size, want) == NULL, "%s cannot be read", path);
        check(count == (size_t)expected.size, "%s: %zu tokens, expected %lld", variants[v].name, count,
              (long long)expected.size);
        while (wrong < count && wrong < (size_t)expected.size && ids[wrong] == want[wrong]) wrong++;
        check(wrong == count, "%s: token %zu is %d", variants[v].name, wrong, wrong < count ? (int)ids[wrong] : -1);
        if (variants[v].exact)
            check(decodes_to(&tok, ids, count, hard, n), "%s: decoding gives another text", variants[v].name);
        for (size_t window = 40; window < n; window = 3 * window + 7)
            check_cuts(&tok, variants[v].name, (const uint8_t *)hard, n, ids, count, window);
        compared += (long long)n;
        free(ids);
        free(want);
        dataset_close(&expected);
    }
    tokenizer_free(&tok);
}

/* Where words end, for rules that the small vocabulary cannot see: it has no token of two digits. */
static void test_words(void) {
    static const struct { int variant; const char *text, *words; } cases[] = {
        {0, "I'll we'd'S 12345!?\n\n  x \t1 'sa  ", "I|'ll| we|'d|'|S| 12345|!?|\n\n | x| |\t|1| '|sa|  |"},
        {0, "a\xc2\xa0\xc2\xa0""b \xd9\xa1\xc2\xb2 e\xcc\x81", "a|\xc2\xa0|\xc2\xa0|b| \xd9\xa1\xc2\xb2| e|\xcc\x81|"},
        {3, "I'LL 1234567!?\n\n  x \t1 $y'\xc5\xbf\n z", "I|'LL| |123|456|7|!?\n\n| | x| |\t|1| $|y|'\xc5\xbf|\n| z|"},
        {4, "(a) 123 \n \n b\r\n\tif!\n", "(a|)| |1|2|3| \n \n| b|\r\n|\tif|!\n|"}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Tokenizer tok;
        char out[256] = "";
        const uint8_t *s = (const uint8_t *)cases[i].text;
        size_t n = strlen(cases[i].text), used = 0;
        if (!load_variant(cases[i].variant, &tok)) continue;
        for (size_t at = 0, end; at < n; at = end) {
            end = tok.pattern == TOKENIZER_GPT2 ? tokenizer_word_gpt2(&tok, s, at, n)
                                                : tokenizer_word_cl100k(&tok, s, at, n);
            if (!check(end > at && end <= n, "\"%s\": a word from %zu to %zu", cases[i].text, at, end)) break;
            memcpy(out + used, s + at, end - at);
            used += end - at;
            out[used++] = '|';
        }
        check(strcmp(out, cases[i].words) == 0, "%s: \"%s\" was cut as %s", variants[cases[i].variant].name,
              cases[i].text, out);
        tokenizer_free(&tok);
    }
}

/* A line break after a symbol is a place to cut in GPT-2's rules, but in those of Llama 3 it belongs to the symbol, and
 * a prefix space would be put before it. */
static void test_cut(void) {
    static const char text[] = "a!?\nbbbbbbbbbbbbbbbbbbbbbbbbbbbb", spaces[] = "a!?\nb cccccccccccccccccccccccc";
    static const size_t want[][2] = {{3, 5}, {0, 5}, {3, 5}, {0, 5}, {0, 5}};
    for (int v = 0; v < 5; v++) {
        Tokenizer tok;
        if (!load_variant(v, &tok)) continue;
        size_t first = tokenizer_cut(&tok, text, sizeof text - 1);
        size_t second = tokenizer_cut(&tok, spaces, sizeof spaces - 1);
        check(first == want[v][0] && second == want[v][1], "%s: cut at %zu and %zu", variants[v].name, first, second);
        tokenizer_free(&tok);
    }
}

static void test_questions(void) {
    static const struct { const char *spelling; int32_t id; } known[] = {
        {"<|endoftext|>", 0}, {"!", 1}, {"absent", -1}, {"", -1}, {"[R]", 2050}, {" two words", 2052},
        {"na\xc3\xafve", 2054}};
    Tokenizer tok;
    const uint8_t *bytes;
    size_t n, count;
    int32_t ids[8];
    if (!load_variant(5, &tok)) return;
    check(tokenizer_vocab_size(&tok) == 2056, "%d tokens", tokenizer_vocab_size(&tok));
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        check(tokenizer_id(&tok, known[i].spelling) == known[i].id, "\"%s\" has the id %d", known[i].spelling,
              (int)tokenizer_id(&tok, known[i].spelling));
    int32_t the = tokenizer_id(&tok, "\xc4\xa0the");         /* "Ġthe" */
    check(the > 0 && !tokenizer_decode_token(&tok, the, &bytes, &n) && n == 4 && !memcmp(bytes, " the", 4), "Ġthe");
    check(tokenizer_is_special(&tok, 0) && tokenizer_is_special(&tok, 2053), "special tokens");
    check(!tokenizer_is_special(&tok, 1) && !tokenizer_is_special(&tok, 2048) && !tokenizer_is_special(&tok, -1) &&
          !tokenizer_is_special(&tok, 2056), "tokens that are not special");
    for (int i = 0; i < 3; i++) {
        static const int32_t outside[] = {-1, 2056, INT32_MAX};
        const char *error = tokenizer_decode_token(&tok, outside[i], &bytes, &n);
        check(error && strstr(error, "0 to 2055") && n == 0, "token %d: %s", (int)outside[i], error);
    }
    check(tokenizer_encode(&tok, "", 0, ids, 0, &count) == NULL && count == 0, "an empty text has no tokens");
    const char *error = tokenizer_encode(&tok, "a b c", 5, ids, 2, &count);
    check(error && strstr(error, "2 tokens") && count == 2, "no room: %s", error);
    tokenizer_free(&tok);
}

/* Token by token through a TextWriter: what was written must never end inside a character. */
static void test_streaming(const char *hard, size_t n) {
    Tokenizer tok;
    size_t count, seen = 0, halves = 0;
    if (!load_variant(0, &tok)) return;
    int32_t *ids = encode(&tok, hard, n, &count);
    char *out = NULL;
    size_t size = 0;
    TextWriter writer = {.file = open_memstream(&out, &size)};
    for (size_t i = 0; i < count; i++) {
        const uint8_t *bytes;
        size_t length;
        check(tokenizer_decode_token(&tok, ids[i], &bytes, &length) == NULL, "token %zu", i);
        seen += length;
        for (size_t b = 0; b < length; b++) text_put(&writer, bytes[b]);
        fflush(writer.file);
        halves += size < seen;
        if (size > 0 && text_whole((const uint8_t *)out + (size > 8 ? size - 8 : 0), size > 8 ? 8 : size) !=
            (size > 8 ? 8 : size)) check(false, "after token %zu half a character is written", i);
    }
    text_end(&writer);
    fclose(writer.file);
    check(halves > 100, "only %zu of the hard text's tokens ended inside a character", halves);
    check(size == n && memcmp(out, hard, n) == 0, "the streamed text is another one");
    free(out);
    free(ids);
    tokenizer_free(&tok);
}

/* Any bytes: parts of characters, surrogates, overlong forms, bytes that UTF-8 never has, and random ones. */
static void test_bytes(void) {
    static const char *const pieces[] = {
        "\xed\xa0\x80", "\xed\xb0\x80", "\xc0\x80", "\xe2\x80", "\xf0\x9f\x98", "\xff\xfe", "\x80", "\xf4\x90\x80\x80",
        "\xe3\x80\x80", "\xc2\xa0", " ", "\n", "'s", "'", "the", " a", "\xf0\x9f\x98\x80", "1", "\xe6\x97\xa5", "!",
        "\r\n", "<|endoftext|>", "<|endo", "foo", " two words", "[R]", "word"};
    enum { PIECES = sizeof pieces / sizeof *pieces, LENGTH = 4000 };
    static uint8_t text[LENGTH + 32];
    int rounds = getenv("MEGALODON_TEST_SHORT") ? 10 : 60;
    for (int v = 0; v < VARIANTS; v++) {
        Tokenizer tok;
        if (!load_variant(v, &tok)) continue;
        for (int round = 0; round < rounds; round++) {
            size_t n = 0, count, size = 1 + random_below(LENGTH);
            while (n < size) {
                uint32_t kind = random_below(PIECES + 3);
                if (kind >= PIECES) {
                    text[n++] = (uint8_t)random_below(256);
                } else {
                    memcpy(text + n, pieces[kind], strlen(pieces[kind]));
                    n += strlen(pieces[kind]);
                }
            }
            uint8_t *exact = malloc(n);              /* a read past the end is seen by the sanitizer */
            memcpy(exact, text, n);
            int32_t *ids = encode(&tok, exact, n, &count);
            if (variants[v].exact)
                check(decodes_to(&tok, ids, count, exact, n), "%s: %zu random bytes come back changed",
                      variants[v].name, n);
            if (n > 1000) check_cuts(&tok, variants[v].name, exact, n, ids, count, 30 + random_below(200));
            free(ids);
            free(exact);
        }
        tokenizer_free(&tok);
    }
}

/* A word of a million letters takes n log n steps, not n^2. */
static void test_long_word(void) {
    enum { N = 1 << 20 };
    Tokenizer tok;
    size_t count;
    char *text = malloc(N);
    if (load_variant(0, &tok)) {
        for (int i = 0; i < N; i++) text[i] = "theandwas"[random_below(9)];
        int32_t *ids = encode(&tok, text, N, &count);
        check(count < N * 3 / 4 && decodes_to(&tok, ids, count, text, N), "a word of a million letters");
        free(ids);
        tokenizer_free(&tok);
    }
    free(text);
}

static void test_speed(void) {
    Tokenizer tok;
    char *text;
    size_t n, count;
    const char *error = json_read_text("data/tinystories_sample.txt", &text, &n);
    if (error) {
        test_skip(error);
        return;
    }
    if (load_variant(0, &tok)) {
        clock_t start = clock();
        int32_t *ids = encode(&tok, text, n, &count);
        double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
        check(decodes_to(&tok, ids, count, text, n), "the sample of TinyStories comes back changed");
        printf("encoded %zu bytes as %zu tokens: %.1f MB/s of one core\n", n, count, (double)n / 1e6 / seconds);
        free(ids);
        tokenizer_free(&tok);
    }
    free(text);
}

/* ------------------------------------------------------------------------------------------------------------------
 * Tokenizers that must be refused.
 */

static void expect_refused(const char *text, size_t length, const char *what, const char *hint) {
    Tokenizer tok;
    const char *error = load_text(text, length, &tok);
    if (check(error != NULL, "%s: was taken; expected an error with \"%s\"", what, hint))
        check(strstr(error, hint) && strstr(error, temporary) && !strchr(error, '\n'), "%s: expected \"%s\" in \"%s\"",
              what, hint, error);
    else tokenizer_free(&tok);
}

#define FLAGS ",\"single_word\":false,\"lstrip\":false,\"rstrip\":false,\"normalized\":false,\"special\":false"

static void test_refused(void) {
    static const struct { const char *from, *to, *hint; } cases[] = {
        {"\"version\":\"1.0\"", "\"version\":\"2.0\"", "version"},
        {"\"truncation\":null", "\"truncation\":{}", "truncation"},
        {"\"padding\":null", "\"padding\":3", "padding"},
        {"\"normalizer\":null", "\"normalizer\":{\"type\":\"NFC\"}", "normalizer NFC"},
        {"\"normalizer\":null", "\"normalizer\":[]", "normalizer an array"},
        {"\"post_processor\":null", "\"post_processor\":{\"type\":\"TemplateProcessing\"}", "TemplateProcessing"},
        {BYTE_LEVEL, "{\"type\":\"Whitespace\"}", "pre-tokenizer is Whitespace"},
        {BYTE_LEVEL, "null", "pre-tokenizer is null"},
        {BYTE_LEVEL, "{\"type\":\"ByteLevel\",\"add_prefix_space\":0}", "add_prefix_space"},
        {BYTE_LEVEL, "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"use_regex\":1}", "use_regex"},
        {BYTE_LEVEL, "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"use_regex\":false}", "use_regex false"},
        {BYTE_LEVEL, "{\"type\":\"Sequence\",\"pretokenizers\":[]}", "another length"},
        {BYTE_LEVEL, "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Digits\"},{}]}", "starts with Digits"},
        {BYTE_LEVEL, SPLIT("\\\\s+"), "regular expression"},
        {"\"decoder\":{\"type\":\"ByteLevel\"", "\"decoder\":{\"type\":\"WordPiece\"", "decoder is WordPiece"},
        {"\"type\":\"BPE\"", "\"type\":\"Unigram\"", "model is Unigram"},
        {"\"dropout\":null", "\"dropout\":0.1", "dropout"},
        {"\"byte_fallback\":false", "\"byte_fallback\":true", "byte_fallback"},
        {"\"ignore_merges\":false", "\"ignore_merges\":\"no\"", "ignore_merges"},
        {"\"continuing_subword_prefix\":null", "\"continuing_subword_prefix\":\"##\"", "continuing_subword_prefix"},
        {"\"end_of_word_suffix\":null", "\"end_of_word_suffix\":\"</w>\"", "end_of_word_suffix"},
        {"\"model\":{", "\"model\":7,\"x\":{", "\"model\""},
        {"\"vocab\":{", "\"vocab\":[],\"x\":{", "\"vocab\""},
        {"\"merges\":[", "\"merges\":{},\"x\":[", "\"merges\""},
        {"\"added_tokens\":[", "\"added_tokens\":1,\"x\":[", "\"added_tokens\""},
        {"\"!\":1,", "\"!\":2048,", "0 to 2047"},
        {"\"!\":1,", "\"!\":-1,", "0 to 2047"},
        {"\"!\":1,", "\"!\":1.5,", "0 to 2047"},
        {"\"!\":1,", "\"!\":\"1\",", "0 to 2047"},
        {"\"!\":1,", "\"!\":2,", "belongs to another token"},
        {"\"!\":1,", "\"!!!!\":1,", "byte 0x21"},
        {"\"!\":1,", "\"\\\"\":1,", "twice"},
        {"\"merges\":[", "\"merges\":[\"the\",", "merge 0 is not of the form"},
        {"\"merges\":[", "\"merges\":[[\"t\"],", "merge 0 is not of the form"},
        {"\"merges\":[", "\"merges\":[[\"t\",4],", "merge 0 is not of the form"},
        {"\"merges\":[", "\"merges\":[5,", "merge 0 is not of the form"},
        {"\"merges\":[", "\"merges\":[[\"t\",\"zzz\"],", "\"zzz\" is not in the vocabulary"},
        {"\"merges\":[", "\"merges\":[[\"\",\"t\"],", "is not in the vocabulary"},
        {"\"merges\":[", "\"merges\":[[\"t\",\"\xe6\x97\xa5\"],", "is not in the vocabulary"},
        {"\"merges\":[", "\"merges\":[\"q q\",", "become is not in the vocabulary"},
        {"\"id\":0,", "\"id\":1,", "another id than in the vocabulary"},
        {"\"id\":0,", "", "has no id"},
        {"\"id\":0,\"content\":\"<|endoftext|>\"", "\"id\":3000,\"content\":\"<x>\"", "0 to 2048"},
        {"\"id\":0,\"content\":\"<|endoftext|>\"", "\"id\":5,\"content\":\"<x>\"", "belongs to another token"},
        {"\"added_tokens\":[{", "\"added_tokens\":[{\"id\":2049,\"content\":\"<x>\"" FLAGS "},{\"id\":2048,"
         "\"content\":\"<y>\"" FLAGS "},{", "has the id 2049; expected 2048"},
        {"\"content\":\"<|endoftext|>\"", "\"content\":\"\"", "not empty"},
        {"\"content\":\"<|endoftext|>\"", "\"content\":[1]", "found an array"},
        {"\"lstrip\":false,", "", "\"lstrip\""},
        {"\"special\":true", "\"special\":1", "\"special\""},
        {"\"added_tokens\":[{", "\"added_tokens\":[3,{", "found nothing"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *text = replaced(json_text, cases[i].from, cases[i].to);
        expect_refused(text, strlen(text), cases[i].to, cases[i].hint);
        free(text);
    }
    expect_refused("", 0, "an empty file", "line 1");
    expect_refused("[]", 2, "an array", "expected an object, found an array");
    expect_refused("{}", 2, "an empty object", "\"model\"");
    expect_refused(json_text, json_length / 2, "half of a file", "line 1");
    Tokenizer tok;
    const char *error = tokenizer_load("/nonexistent/tokenizer.json", &tok);
    check(error && strstr(error, "/nonexistent/tokenizer.json"), "a file that is not there: %s", error);
}

/* Files with random damage: an error or a tokenizer that works, but never a crash. */
static void test_damage(void) {
    int rounds = getenv("MEGALODON_TEST_SHORT") ? 60 : 400, taken = 0;
    char *text = malloc(json_length + 1);
    static const char marks[] = "\"{}[],:0 1\\ue\xff";
    for (int round = 0; round < rounds; round++) {
        Tokenizer tok;
        memcpy(text, json_text, json_length + 1);
        for (uint32_t i = 0; i <= random_below(4); i++) {
            /* Half of the damage goes to the first bytes, where the rules stand. */
            size_t at = random_below((uint32_t)(round % 2 ? json_length : 1200));
            text[at] = random_below(2) ? marks[random_below(sizeof marks - 1)]
                                       : text[random_below((uint32_t)json_length)];
        }
        if (load_text(text, json_length, &tok) == NULL) {
            size_t count;
            int32_t *ids = encode(&tok, json_text, 3000, &count);
            check(count > 0, "a damaged tokenizer gives no tokens");
            free(ids);
            tokenizer_free(&tok);
            taken++;
        }
    }
    printf("%d of %d damaged files still held a tokenizer\n", taken, rounds);
    free(text);
}

int main(void) {
    char *hard;
    size_t n;
    test_begin("tokenizer");
    if (!check(mkdtemp(folder) != NULL, "no folder for temporary files")) return test_end();
    snprintf(temporary, sizeof temporary, "%s/tokenizer.json", folder);
    const char *error = json_read_text("tests/tokenizer/tokenizer.json", &json_text, &json_length);
    if (!check(error == NULL, "%s", error)) return test_end();
    error = json_read_text("tests/tokenizer/hard.txt", &hard, &n);
    if (!check(error == NULL, "%s", error)) return test_end();
    for (int v = 0; v < VARIANTS; v++) test_variant(v, hard, n);
    printf("%lld bytes of hard text by %d tokenizers have the expected ids\n", compared, VARIANTS);
    test_words();
    test_cut();
    test_questions();
    test_streaming(hard, n);
    test_bytes();
    test_long_word();
    test_speed();
    test_refused();
    test_damage();
    free(hard);
    free(json_text);
    remove(temporary);
    rmdir(folder);
    return test_end();
}
