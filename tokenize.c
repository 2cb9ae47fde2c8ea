/* tokenize.c - turns text into a file of token numbers, and back.
 *
 *     ./tokenize --tokenizer tokenizer.json --data my.txt --out tokens.npy
 *     ./tokenize --tokenizer tokenizer.json --data my.jsonl --out tokens.npy      {"text": "..."} a line
 *     ./tokenize --data my.jsonl --out my.txt              its texts alone, for models of bytes
 *     ./tokenize --tokenizer tokenizer.json --decode tokens.npy --out text.txt
 *
 * The token file is what numpy.save writes: one dimension of uint16, or of uint32 if the tokenizer has more than 65536
 * tokens. ./train reads it as it is. Text of any size goes through a buffer of a few megabytes, cut only where the cut
 * changes no token.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <errno.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lib/dataset.h"
#include "lib/error.h"
#include "lib/json.h"
#include "lib/options.h"
#include "lib/report.h"
#include "lib/tokenizer.h"

enum { BLOCK = 4 << 20, NPY_HEADER = 128, DECODE_BLOCK = 1 << 14 };

/* ------------------------------------------------------------------------------------------------------------
 * Options.
 *
 *    type    name         default             low  high  unit  group  help
 */
#define TOKENIZE_OPTIONS(X) \
    X(TEXT,   tokenizer,   NULL,               0, 0, "FILE", "Files", \
      "a tokenizer.json of byte-level BPE, such as GPT-2's or one of dev/train_tokenizer.py") \
    X(TEXT,   data,        NULL,               0, 0, "PATH", "Files", \
      "text to turn into tokens: a file, a folder whose files follow one another in the order of their names, or a " \
      ".jsonl file, whose lines {\"text\": ...} are documents") \
    X(TEXT,   decode,      NULL,               0, 0, "PATH", "Files", \
      "a .npy file of tokens to turn back into text") \
    X(TEXT,   out,         NULL,               0, 0, "FILE", "Files", \
      "the file to write; -: the text of --decode goes to stdout") \
    X(TEXT,   end,         "<|endoftext|>",    0, 0, "TOKEN", "Documents", \
      "the added token that ends each document; each file ends a document, and where this token stands in the text " \
      "one ends too, with the line breaks right before and after it") \
    X(FLAG,   exact,       NULL,               0, 0, "", "Documents", \
      "encode the bytes as they are: drop no line breaks at the ends of documents and add no token")

typedef struct Values { TOKENIZE_OPTIONS(OPTION_MEMBER) } Values;
static const Option tokenize_table[] = { TOKENIZE_OPTIONS(OPTION_ROW) };

/* Reads the command line. Returns false if only the help page was asked for. */
static bool read_options(Values *v, int argc, char **argv) {
    static OptionSet set;
    bool help;
    options_init(&set, "tokenize", "--tokenizer FILE (--data PATH | --decode FILE) --out FILE",
                 "Turns text into a file of token numbers for ./train, or such a file back into text.");
    options_add(&set, tokenize_table, OPTION_COUNT(tokenize_table), v);
    die_if(options_parse(&set, argc, argv, &help));
    if (help) {
        options_print_help(stdout, &set);
        return false;
    }
    if (!v->tokenizer && (!v->data || !dataset_is_jsonl(v->data)))
        die("--tokenizer is missing; expected a tokenizer.json");
    if (!v->data == !v->decode) die("give either --data (text to tokens) or --decode (tokens to text)");
    if (!v->out) die("--out is missing; expected the name of the file to write");
    if (!v->tokenizer && dataset_is_npy(v->out))
        die(errorf("--out %s: without --tokenizer, the texts of --data are written as they are; give the tokenizer, or "
                   "another name", v->out));
    if (v->tokenizer && v->data && !dataset_is_npy(v->out))
        die(errorf("--out %s: a token file's name must end in .npy; ./train would take it for text", v->out));
    if (v->decode && !dataset_is_npy(v->decode))
        die(errorf("--decode %s: expected a .npy file of tokens", v->decode));
    return true;
}

/* ------------------------------------------------------------------------------------------------------------
 * The output: a file under another name that gets its own when it is whole, so that a run that was interrupted leaves
 * nothing that looks complete.
 */

typedef struct Output {
    const char *path;
    char *temporary;
    FILE *file;
    int width;                       /* bytes a token */
    int64_t tokens;
} Output;

_Noreturn static void output_die(Output *out, const char *doing) {
    const char *error = errorf("%s: cannot %s: %s", out->path, doing, strerror(errno));
    if (out->temporary) remove(out->temporary);
    die(error);
}

/* Ends the program for another reason than the output, and leaves no half of a file. */
_Noreturn static void output_end(Output *out, const char *error) {
    if (out->temporary) remove(out->temporary);
    die(error);
}
static void output_die_if(Output *out, const char *error) {
    if (error) output_end(out, error);
}

static void output_open(Output *out, const char *path) {
    size_t size = strlen(path) + 16;
    *out = (Output){.path = path};
    if (strcmp(path, "-") == 0) {
        out->file = stdout;
        return;
    }
    char *name = malloc(size);
    if (!name) output_die(out, "be named");
    snprintf(name, size, "%s.tmp", path);
    out->file = fopen(name, "wb");
    if (!out->file) output_die(out, "be written");
    out->temporary = name;
}

/* The .npy header for out->tokens tokens. It is always as long, so it can be written again when they are counted. */
static void output_header(Output *out) {
    char header[NPY_HEADER + 1];
    static const char dict[] = "%cNUMPY%c%c%c%c{'descr': '<u%d', 'fortran_order': False, 'shape': (%lld,), }";
    int n = snprintf(header, sizeof header, dict, 0x93, 1, 0, NPY_HEADER - 10, 0, out->width, (long long)out->tokens);
    memset(header + n, ' ', (size_t)(NPY_HEADER - n));
    header[NPY_HEADER - 1] = '\n';
    if (fwrite(header, 1, NPY_HEADER, out->file) != NPY_HEADER) output_die(out, "be written");
}

static void output_tokens(Output *out, const int32_t *ids, size_t n) {
    static uint8_t block[1 << 16];
    size_t used = 0;
    for (size_t i = 0; i < n; i++) {
        for (int b = 0; b < out->width; b++) block[used++] = (uint8_t)((uint32_t)ids[i] >> (8 * b));
        if (used + 4 <= sizeof block && i + 1 < n) continue;
        if (fwrite(block, 1, used, out->file) != used) output_die(out, "be written");
        used = 0;
    }
    out->tokens += (int64_t)n;
}

static void output_close(Output *out) {
    if (fflush(out->file) != 0) output_die(out, "be written");
    if (!out->temporary) return;
    if (fsync(fileno(out->file)) != 0 || fclose(out->file) != 0) output_die(out, "be written");
    if (rename(out->temporary, out->path) != 0) output_die(out, "get its name");
    free(out->temporary);
}

/* ------------------------------------------------------------------------------------------------------------
 * Text to tokens.
 */

typedef struct Encoder {
    const Tokenizer *tok;            /* NULL: texts are written as they are        */
    Output *out;
    bool exact;
    const char *end;                 /* spelling of the token that ends a document */
    size_t end_length;
    int32_t end_id;
    uint8_t *buffer;                 /* text that is not encoded yet               */
    size_t used, room;
    int32_t *ids;
    size_t ids_room;
    bool at_start;                   /* the document has no text yet               */
    bool has_tokens;                 /* the document has tokens                    */
    int64_t bytes, documents;        /* of text                                    */
    int64_t read, total;             /* bytes of the files, and of all of them     */
    double started, shown;           /* seconds                                    */
} Encoder;

/* A bar on a terminal, drawn ten times a second; a log gets the last line alone. */
static void show_progress(Encoder *e) {
    enum { WIDTH = 30 };
    double now = report_seconds(), rate = (double)e->read / (now - e->started);
    char bar[WIDTH + 1], left[32];
    if (now - e->shown < 0.1 || e->total == 0 || e->read == 0 || !isatty(STDERR_FILENO)) return;
    for (int i = 0; i < WIDTH; i++) bar[i] = i < (int)(WIDTH * e->read / e->total) ? '#' : '.';
    bar[WIDTH] = 0;
    fprintf(stderr, "\r[%s] %3.0f%% %s, %.1f MB/s, left %s\033[K", bar, 100. * (double)e->read / (double)e->total,
            e->out->path, rate / 1e6, report_duration((double)(e->total - e->read) / rate, left));
    e->shown = now;
}

static void encode_text(Encoder *e, const uint8_t *text, size_t n) {
    size_t need = tokenizer_capacity(n), count;
    if (!e->ids || need > e->ids_room) {
        free(e->ids);
        e->ids_room = need;
        e->ids = need <= SIZE_MAX / sizeof *e->ids ? malloc(need * sizeof *e->ids) : NULL;
        if (!e->ids) output_end(e->out, errorf("no memory for %zu tokens", need));
    }
    output_die_if(e->out, tokenizer_encode(e->tok, text, n, e->ids, need, &count));
    output_tokens(e->out, e->ids, count);
    if (count > 0) e->has_tokens = true;
}

/* Ends the document; one without any token leaves no trace. */
static void end_document(Encoder *e) {
    if (e->has_tokens) {
        output_tokens(e->out, &e->end_id, 1);
        e->documents++;
    }
    e->has_tokens = false;
    e->at_start = true;
}

/* n without the line break at the end of text[0, n). */
static size_t without_break(const uint8_t *text, size_t n) {
    if (n > 0 && text[n - 1] == '\n') n--;
    if (n > 0 && text[n - 1] == '\r') n--;
    return n;
}

/* The first place of the end-of-document token in text[0, n), or n. */
static size_t find_end(const Encoder *e, const uint8_t *text, size_t n) {
    for (size_t at = 0; at + e->end_length <= n; at++) {
        const uint8_t *first = memchr(text + at, e->end[0], n - at);
        if (!first) break;
        at = (size_t)(first - text);
        if (at + e->end_length <= n && memcmp(first, e->end, e->end_length) == 0) return at;
    }
    return n;
}

/* Encodes what is certain of the buffer, or all of it if the file is read to its end. Returns how much that was. */
static size_t encode_buffer(Encoder *e, bool whole) {
    size_t at = 0;
    while (at < e->used) {
        uint8_t *text = e->buffer + at;
        size_t left = e->used - at;
        if (!e->exact) {
            if (e->at_start) {
                /* A carriage return and a line feed are one line break; wait until both are here. */
                if (left < 2 && !whole) break;
                size_t skip = text[0] == '\n' ? 1 : left > 1 && text[0] == '\r' && text[1] == '\n' ? 2 : 0;
                e->at_start = false;
                at += skip;
                if (skip) continue;
            }
            size_t n = find_end(e, text, left);
            if (n < left) {
                encode_text(e, text, without_break(text, n));
                end_document(e);
                at += n + e->end_length;
                continue;
            }
        }
        size_t cut = tokenizer_cut(e->tok, text, left);
        if (whole) cut = left;
        encode_text(e, text, whole && !e->exact ? without_break(text, cut) : cut);
        at += cut;
        break;
    }
    return at;
}

/* Makes room for `more` bytes in the buffer. */
static void reserve(Encoder *e, const char *path, size_t more) {
    if (e->room - e->used >= more) return;
    size_t room = 2 * e->room + more;
    uint8_t *buffer = realloc(e->buffer, room);
    if (!buffer) output_end(e->out, errorf("%s: no memory for %zu bytes of text", path, room));
    e->buffer = buffer;
    e->room = room;
}

/* Never NULL: a text that cannot be opened ends the program. */
static FILE *open_text(Encoder *e, const char *path) {
    FILE *file = fopen(path, "rb");
    if (file) return file;
    output_end(e->out, errorf("%s: cannot be opened: %s", path, strerror(errno)));
}

static void encode_file(Encoder *e, const char *path) {
    FILE *file = open_text(e, path);
    e->used = 0;
    e->at_start = true;
    for (bool whole = false; !whole;) {
        reserve(e, path, BLOCK / 2);                         /* text without a place to cut makes it grow */
        size_t n = fread(e->buffer + e->used, 1, e->room - e->used, file);
        if (ferror(file)) output_end(e->out, errorf("%s: cannot be read: %s", path, strerror(errno)));
        e->used += n;
        e->bytes += (int64_t)n;
        e->read += (int64_t)n;
        whole = e->used < e->room;
        size_t done = encode_buffer(e, whole);
        e->used -= done;
        memmove(e->buffer, e->buffer + done, e->used);
        show_progress(e);
    }
    fclose(file);
    if (!e->exact) end_document(e);
}

/* The "text" of a line. Error: it is not JSON, or something else is in it. */
static const char *line_text(const Json *json, const JsonNode **text) {
    *text = json_get(json->root, "text");
    if (json_get(json->root, "response"))
        return "a response is no text; ./train --data reads a file of prompts and responses as it is";
    if (!*text || (*text)->type != JSON_STRING || json->root->count != 1)
        return errorf("expected {\"text\": \"...\"} and no other key, found %s", json_type_name(json->root));
    return NULL;
}

/* Writes a text and the mark of its end, each in lines of their own. */
static void write_text(Encoder *e, const char *text, size_t n) {
    FILE *file = e->out->file;
    size_t end = without_break((const uint8_t *)text, n);
    if (end == 0) return;
    if (fwrite(text, 1, end, file) != end || fprintf(file, "\n%s\n", e->end) < 0) output_die(e->out, "be written");
    e->documents++;
}

/* Encodes a .jsonl file, a line at a time: each is a document. */
static void encode_lines(Encoder *e, const char *path) {
    FILE *file = open_text(e, path);
    char *line = NULL;
    size_t room = 0;
    ssize_t n;
    for (int64_t number = 1; (n = getline(&line, &room, file)) > 0; number++) {
        Json json;
        const JsonNode *text = NULL;
        size_t blank = 0;
        e->read += n;
        while (blank < (size_t)n && strchr(" \t\r\n", line[blank]) && line[blank]) blank++;
        if (blank == (size_t)n) continue;
        const char *error = json_parse(&json, line, (size_t)n);
        /* Each line is a document of its own, so its reader counts from line 1. */
        if (error && strncmp(error, "line 1, ", 8) == 0) error += 8;
        if (!error) error = line_text(&json, &text);
        if (error) output_end(e->out, errorf("%s, line %lld: %s", path, (long long)number, error));
        e->bytes += (int64_t)text->length;
        if (!e->tok) {
            write_text(e, text->string, text->length);
        } else {
            e->used = 0;
            e->at_start = true;
            reserve(e, path, text->length);
            if (text->length > 0) memcpy(e->buffer, text->string, text->length);
            e->used = text->length;
            encode_buffer(e, true);
            end_document(e);
        }
        json_free(&json);
        show_progress(e);
    }
    if (!feof(file)) output_end(e->out, errorf("%s: cannot be read: %s", path, strerror(errno)));
    fclose(file);
    free(line);
}

/* The size of a .jsonl file, which is read by its lines and is no dataset. */
static int64_t jsonl_size(const char *path) {
    struct stat info;
    if (stat(path, &info) != 0) die(errorf("--data %s: cannot be opened: %s", path, strerror(errno)));
    return info.st_size;
}

/* The texts of a .jsonl file, without a tokenizer. */
static void extract(const Values *v) {
    Output out;
    Encoder e = {.out = &out, .end = v->end, .total = jsonl_size(v->data), .started = report_seconds()};
    char bytes[32], documents[32];
    output_open(&out, v->out);
    encode_lines(&e, v->data);
    output_close(&out);
    fprintf(stderr, "%s%s: %s bytes, %s documents\n", e.shown > 0 ? "\r\033[K" : "", out.path,
            report_count(e.bytes, bytes), report_count(e.documents, documents));
}

static void encode(const Values *v, const Tokenizer *tok) {
    Dataset files = {.descriptor = -1};
    Output out;
    Encoder e = {.tok = tok, .out = &out, .exact = v->exact, .end = v->end, .end_length = strlen(v->end)};
    char bytes[32], tokens[32], documents[32];
    bool lines = dataset_is_jsonl(v->data);
    if (lines && v->exact) die("--exact does not go with a .jsonl file: its texts need ends");
    /* The dataset knows what a folder of text is; only its list of files is used here. */
    if (!lines) die_if(dataset_open(&files, v->data, 256));
    if (!lines && !files.text) die(errorf("--data %s: holds tokens already; expected text", v->data));
    e.total = lines ? jsonl_size(v->data) : files.size;
    e.end_id = tokenizer_id(tok, v->end);
    if (!e.exact && (e.end_id < 0 || !tokenizer_is_special(tok, e.end_id)))
        die(errorf("--end %s: the tokenizer has no special token of this name; name one that it has, or give --exact "
                   "to mark no ends of documents", v->end));
    output_open(&out, v->out);
    out.width = tokenizer_vocab_size(tok) <= 65536 ? 2 : 4;
    output_header(&out);
    e.started = report_seconds();
    if (lines) encode_lines(&e, v->data);
    for (int i = 0; i < files.num_files; i++) encode_file(&e, files.files[i].path);
    double seconds = report_seconds() - e.started;
    if (fseek(out.file, 0, SEEK_SET) != 0) output_die(&out, "be written");
    output_header(&out);
    output_close(&out);
    if (e.shown > 0) fprintf(stderr, "\r\033[K");
    fprintf(stderr, "%s: %s bytes, %s tokens of uint%d", out.path, report_count(e.bytes, bytes),
            report_count(out.tokens, tokens), 8 * out.width);
    if (!e.exact) fprintf(stderr, ", %s documents", report_count(e.documents, documents));
    fprintf(stderr, "; %.2f bytes a token, %.1f MB/s\n", out.tokens ? (double)e.bytes / (double)out.tokens : 0,
            seconds > 0 ? (double)e.bytes / seconds / 1e6 : 0);
    dataset_close(&files);
    free(e.buffer);
    free(e.ids);
}

/* ------------------------------------------------------------------------------------------------------------
 * Tokens to text.
 */

static void decode(const Values *v, const Tokenizer *tok) {
    Dataset data;
    Output out;
    static int32_t ids[DECODE_BLOCK];
    die_if(dataset_open(&data, v->decode, tokenizer_vocab_size(tok)));
    output_open(&out, v->out);
    for (int64_t at = 0; at < data.size; at += DECODE_BLOCK) {
        int64_t n = data.size - at < DECODE_BLOCK ? data.size - at : DECODE_BLOCK;
        output_die_if(&out, dataset_window(&data, at, n, ids));
        for (int64_t i = 0; i < n; i++) {
            const uint8_t *bytes;
            size_t length;
            output_die_if(&out, tokenizer_decode_token(tok, ids[i], &bytes, &length));
            if (fwrite(bytes, 1, length, out.file) != length) output_die(&out, "be written");
        }
    }
    output_close(&out);
    dataset_close(&data);
}

int main(int argc, char **argv) {
    Values v = {0};
    Tokenizer tok;
    if (!read_options(&v, argc, argv)) return 0;
    signal(SIGXFSZ, SIG_IGN);                    /* a file that may not grow any further is a write that fails */
    if (!v.tokenizer) {
        extract(&v);
        return 0;
    }
    die_if(tokenizer_load(v.tokenizer, &tok));
    if (v.data) encode(&v, &tok);
    else decode(&v, &tok);
    tokenizer_free(&tok);
    return 0;
}
