/* fuzz_tokenizer.c - lib/tokenizer.h: any tokenizer.json is refused with a sentence, or encodes all bytes to tokens that
 * exist. A file must have a token for each of the 256 bytes, which a fuzzer would never keep whole; so an input that
 * does not start with '{' is up to four lines, put where a file has its added tokens, its pre-tokenizer, more entries of
 * the vocabulary, and its merges. */
#include "fuzz.h"

#include "lib/tokenizer.h"

/* Part number i of the input's lines; an empty one where there are fewer. */
static void put_line(JsonWriter *w, const uint8_t *bytes, size_t size, int i) {
    for (; i > 0; i--) {
        const uint8_t *feed = memchr(bytes, '\n', size);
        if (!feed) return;
        size -= (size_t)(feed + 1 - bytes);
        bytes = feed + 1;
    }
    const uint8_t *feed = memchr(bytes, '\n', size);
    json_put_bytes(w, (const char *)bytes, feed ? (size_t)(feed - bytes) : size);
}

static void put_string(JsonWriter *w, const char *text) { json_put_bytes(w, text, strlen(text)); }

/* "!":0,"\"":1, ...: the letters that stand for bytes. */
static void put_letters(JsonWriter *w) {
    int next = 256, id = 0;
    for (int byte = 0; byte < 256; byte++) {
        bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
        int code = printable ? byte : next++;
        char entry[32];
        snprintf(entry, sizeof entry, "%s\"\\u%04x\":%d", byte ? "," : "", (unsigned)code, id++);
        put_string(w, entry);
    }
}

/* The file that has the input's lines in it. */
static void write_file(FuzzFile *file, const uint8_t *bytes, size_t size) {
    static JsonWriter letters;
    JsonWriter w = {0};
    if (size > 0 && bytes[0] == '{') {
        fuzz_file(file, bytes, size);
        return;
    }
    if (!letters.text) put_letters(&letters);
    put_string(&w, "{\"version\":\"1.0\",\"added_tokens\":[");
    put_line(&w, bytes, size, 0);
    put_string(&w, "],\"normalizer\":null,\"decoder\":{\"type\":\"ByteLevel\"},\"pre_tokenizer\":");
    put_line(&w, bytes, size, 1);
    put_string(&w, ",\"model\":{\"type\":\"BPE\",\"vocab\":{");
    json_put_bytes(&w, letters.text, letters.length);
    put_line(&w, bytes, size, 2);
    put_string(&w, "},\"merges\":[");
    put_line(&w, bytes, size, 3);
    put_string(&w, "]}}");
    expect(!w.error, "%s", w.error);
    fuzz_file(file, w.text, w.length);
    free(w.text);
}

static void use(const Tokenizer *tok, const uint8_t *text, size_t n) {
    int32_t ids[1024];
    size_t count;
    if (n > 600) n = 600;
    const char *error = tokenizer_encode(tok, text, n, ids, tokenizer_capacity(n), &count);
    expect(!error, "%s", error);
    for (size_t i = 0; i < count; i++) {
        const uint8_t *token;
        size_t length;
        error = tokenizer_decode_token(tok, ids[i], &token, &length);
        expect(!error, "%s", error);
        tokenizer_is_special(tok, ids[i]);
    }
    for (int32_t id = 0; id < tokenizer_vocab_size(tok); id++) {
        const uint8_t *token;
        size_t length;
        expect(!tokenizer_decode_token(tok, id, &token, &length), "token %d has no bytes", (int)id);
    }
    expect(tokenizer_cut(tok, text, n) <= n, "a cut behind the text");
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static FuzzFile input;
    Tokenizer tok;
    write_file(&input, bytes, size);
    const char *error = tokenizer_load(input.path, &tok);
    expect_sentence(error);
    if (error) return 0;
    use(&tok, bytes, size);
    tokenizer_id(&tok, "<|endoftext|>");
    tokenizer_free(&tok);
    return 0;
}
