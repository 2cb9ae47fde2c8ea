/* fuzz_tokenize.c - tokenize.c: any .jsonl file is refused with a sentence, or its texts become tokens or one text; any
 * other file is a text and becomes tokens, which with --exact are its bytes again. The input's first byte chooses. */
#include "fuzz.h"

#include <setjmp.h>

/* tokenize.c ends the program at an error; here that is a jump back, what it says is thrown away, and what it holds in
 * this moment is given back. */
static jmp_buf back;
static FILE *sink, *kept_file;
static char *kept_line;
static ssize_t kept_length;
static _Noreturn void jump_back(int status) {
    expect(status == 1, "exit status %d", status);
    longjmp(back, 1);
}
#define exit jump_back
#include "lib/json.h"
static Json kept_json;
static const char *keep_parse(Json *json, const char *text, size_t length) {
    const char *error = json_parse(json, text, length);
    kept_json = *json;
    return error;
}
static void keep_free(Json *json) {
    json_free(json);
    kept_json = *json;
}
#define fopen(path, mode) (kept_file = fopen(path, mode))
#define getline(line, room, file) (kept_length = getline(line, room, file), kept_line = *(line), kept_length)
#define json_parse keep_parse
#define json_free keep_free
#define main tokenize_main
#undef stderr
#define stderr sink
#include "../../tokenize.c"
#undef main
#undef exit
#undef fopen
#undef json_parse
#undef json_free

static char written[1 << 18];
static Encoder e;                    /* its buffers stay from input to input */
static Output out;

static void begin(bool tokens, bool exact) {
    static Tokenizer tok;
    static char printed[1 << 12];
    if (!tok.size) {
        const char *error = tokenizer_load("tests/tokenizer/tokenizer.json", &tok);
        expect(!error, "%s (run it where the project's Makefile is)", error);
        sink = fmemopen(printed, sizeof printed, "w");
        out.file = fmemopen(written, sizeof written, "w");
        expect(sink && out.file, "no memory");
        out.path = "-";
        e.end = "<|endoftext|>";
        e.end_length = strlen(e.end);
        e.end_id = tokenizer_id(&tok, e.end);
        e.out = &out;
    }
    e.tok = tokens ? &tok : NULL;
    e.exact = exact;
    e.bytes = e.documents = out.tokens = 0;
    e.has_tokens = false;
    out.width = 2;
    rewind(sink);
    rewind(out.file);
}

/* The tokens that were written exist, no document is without an end, and the exact ones spell the text. */
static void check_tokens(const uint8_t *text, size_t n) {
    int64_t ends = 0;
    size_t at = 0;
    for (int64_t i = 0; i < out.tokens; i++) {
        const uint8_t *bytes;
        size_t length;
        int32_t id = (uint8_t)written[2 * i] | (uint8_t)written[2 * i + 1] << 8;
        const char *error = tokenizer_decode_token(e.tok, id, &bytes, &length);
        expect(!error, "%s", error);
        ends += id == e.end_id;
        if (!e.exact) continue;
        expect(length <= n - at && memcmp(text + at, bytes, length) == 0, "token %d has other bytes", (int)i);
        at += length;
    }
    expect(e.exact ? at == n : ends == e.documents, "%d ends of %d documents", (int)ends, (int)e.documents);
}

/* Each line that is not blank is an object with a text alone, and all of their bytes were read. */
static void check_lines(const char *text, size_t n) {
    int64_t bytes = 0;
    for (size_t at = 0, stop; at < n; at = stop + 1) {
        Json json;
        stop = json_line_end(text, at, n);
        while (at < stop && (text[at] == ' ' || text[at] == '\t' || text[at] == '\r')) at++;
        if (at == stop) continue;
        const char *error = json_parse(&json, text + at, stop - at);
        expect(!error, "%s", error);
        const JsonNode *member = json_get(json.root, "text");
        expect(member && member->type == JSON_STRING && json.root->count == 1, "a line without a text was taken");
        bytes += member->length;
        json_free(&json);
    }
    expect(bytes == e.bytes, "%d bytes of %d were read", (int)e.bytes, (int)bytes);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static FuzzFile input;
    if (size == 0 || size > 4096) return 0;
    bool lines = bytes[0] & 1, tokens = !lines || bytes[0] & 2, exact = !lines && bytes[0] & 4;
    fuzz_file(&input, bytes + 1, size - 1);
    begin(tokens, exact);
    if (setjmp(back)) {
        fclose(kept_file);
        free(kept_line);
        json_free(&kept_json);
        expect(lines, "a text is refused");
        return 0;
    }
    if (lines) encode_lines(&e, input.path);
    else encode_file(&e, input.path);
    expect(fflush(out.file) == 0, "the output has no room");
    if (tokens) check_tokens(bytes + 1, size - 1);
    if (lines) check_lines((const char *)bytes + 1, size - 1);
    else expect(e.bytes == (int64_t)size - 1, "%d bytes of text", (int)e.bytes);
    return 0;
}
