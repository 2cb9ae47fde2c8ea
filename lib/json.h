/* json.h - a small strict JSON reader and writer.
 *
 * The reader accepts RFC 8259 and nothing else, and it is meant for files from strangers: it cannot
 * overflow the stack, its time is linear in the text (n log n in the keys of one object), and it refuses
 * what other readers let through and then disagree about: duplicate keys, trailing text, text that is not
 * UTF-8, lone surrogates, numbers too large for a double.
 *
 *     Json json;
 *     const char *error = json_parse(&json, text, length);
 *     const JsonNode *vocab = json_get(json.root, "vocab");
 *     for (const JsonNode *entry = json_first(vocab); entry; entry = json_next(vocab, entry))
 *         use(entry->key, entry->integer);
 *     json_free(&json);
 *
 * A document is one array of nodes in the order of the text. A container comes right before its first
 * child, and every node knows how many nodes it covers, so "next sibling" is one addition and freeing a
 * document is two calls.
 */
#ifndef LIB_JSON_H
#define LIB_JSON_H

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

enum { JSON_MAX_DEPTH = 256 };       /* containers inside each other */

typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } JsonType;

typedef struct JsonNode {
    JsonType type;
    bool boolean;                    /* JSON_BOOL                                                         */
    bool is_integer;                 /* JSON_NUMBER: written without '.' and exponent, and fits an int64  */
    uint32_t count;                  /* JSON_ARRAY, JSON_OBJECT: number of children                       */
    uint32_t span;                   /* nodes of this subtree, itself included                            */
    uint32_t key_length, length;     /* bytes of key and string; both also end in a 0 byte                */
    const char *key;                 /* NULL unless the parent is an object                               */
    const char *string;              /* JSON_STRING: decoded to UTF-8; "\u0000" gives a 0 byte inside     */
    int64_t integer;                 /* if is_integer: the exact value                                    */
    double number;                   /* JSON_NUMBER: the nearest double                                   */
} JsonNode;

typedef struct Json {
    JsonNode *root;                  /* all nodes; the first is the document's value */
    char *text;                      /* all decoded strings                          */
} Json;

/* What a node is, for messages. */
static inline const char *json_type_name(const JsonNode *node) {
    static const char *const names[] = {"null", "a boolean", "a number", "a string", "an array", "an object"};
    return node ? names[node->type] : "nothing";
}

/* Children one by one; NULL after the last one, and for anything that has none. */
static inline const JsonNode *json_first(const JsonNode *parent) {
    return parent && parent->count ? parent + 1 : NULL;
}
static inline const JsonNode *json_next(const JsonNode *parent, const JsonNode *child) {
    return child + child->span < parent + parent->span ? child + child->span : NULL;
}

/* The member of an object with this key, NULL if there is none or `object` is not an object. Looks at one
 * key after the other: to use most members of a large object, walk over them instead. */
static inline const JsonNode *json_get(const JsonNode *object, const char *key) {
    if (!object || object->type != JSON_OBJECT) return NULL;
    size_t length = strlen(key);
    for (const JsonNode *child = json_first(object); child; child = json_next(object, child))
        if (child->key_length == length && memcmp(child->key, key, length) == 0) return child;
    return NULL;
}

/* True if the node is this string. */
static inline bool json_is(const JsonNode *node, const char *string) {
    size_t length = strlen(string);
    return node && node->type == JSON_STRING && node->length == length &&
           memcmp(node->string, string, length) == 0;
}

/* Number of bytes (1 to 4) of the UTF-8 character at s, of which `left` >= 1 bytes exist; 0 if it is not
 * one. Overlong forms, surrogates and values above U+10FFFF are no characters. */
static inline int json_utf8(const unsigned char *s, size_t left) {
    if (s[0] < 0x80) return 1;
    int length = s[0] >= 0xC2 && s[0] <= 0xDF   ? 2
                 : (s[0] & 0xF0) == 0xE0        ? 3
                 : s[0] >= 0xF0 && s[0] <= 0xF4 ? 4
                                                : 0;
    if (length == 0 || left < (size_t)length) return 0;
    for (int i = 1; i < length; i++)
        if ((s[i] & 0xC0) != 0x80) return 0;
    if ((s[0] == 0xE0 && s[1] < 0xA0) || (s[0] == 0xED && s[1] > 0x9F)) return 0;     /* overlong; surrogates */
    if ((s[0] == 0xF0 && s[1] < 0x90) || (s[0] == 0xF4 && s[1] > 0x8F)) return 0;     /* overlong; too large  */
    return length;
}

/* ----------------------------------------------------------------------------------------------------
 * The reader's inside. Each function returns an error sentence or NULL and moves `at` forward.
 */

typedef struct JsonReader {
    const unsigned char *start, *at, *end;
    JsonNode *nodes;
    size_t count, capacity;
    char *text, *tail;                     /* decoded strings and their end                             */
    const JsonNode **keys;                 /* scratch: the members of one object, sorted                */
    size_t keys_capacity;
    uint32_t open[JSON_MAX_DEPTH];         /* the containers that are open, outermost first             */
    int depth;
    const char *key;                       /* the key read last: belongs to the next node               */
    uint32_t key_length;
} JsonReader;

/* An error at one place of the text. Lines and columns count from 1, columns in characters. */
static inline const char *json_error_at(const JsonReader *r, const unsigned char *place, const char *what) {
    size_t line = 1, column = 1;
    for (const unsigned char *s = r->start; s < place; s++) {
        if (*s == '\n') {
            line++;
            column = 1;
        } else if ((*s & 0xC0) != 0x80) {
            column++;
        }
    }
    return errorf("line %zu, column %zu: %s", line, column, what);
}

/* The same, with what stands there instead. */
static inline const char *json_expected(const JsonReader *r, const char *expected) {
    if (r->at == r->end)
        return json_error_at(r, r->at, errorf("expected %s, found the end of the text", expected));
    if (*r->at > ' ' && *r->at < 0x7F)
        return json_error_at(r, r->at, errorf("expected %s, found '%c'", expected, *r->at));
    return json_error_at(r, r->at, errorf("expected %s, found the byte 0x%02X", expected, *r->at));
}

static inline void json_skip_space(JsonReader *r) {
    while (r->at < r->end && (*r->at == ' ' || *r->at == '\n' || *r->at == '\t' || *r->at == '\r')) r->at++;
}

/* Four hexadecimal digits; -1 if they are not there. */
static inline int json_hex4(JsonReader *r) {
    int value = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        int c = r->at < r->end ? *r->at : 0, low = c | 0x20;
        int digit = c >= '0' && c <= '9' ? c - '0' : low >= 'a' && low <= 'f' ? low - 'a' + 10 : -1;
        if (digit < 0) return -1;
        value = value * 16 + digit;
    }
    return value;
}

/* The part of \uXXXX after the u, as UTF-8. A character above U+FFFF is written as two escapes, a surrogate
 * pair. */
static inline const char *json_unicode_escape(JsonReader *r) {
    const unsigned char *place = r->at - 2;
    int code = json_hex4(r);
    if (code >= 0xD800 && code <= 0xDBFF) {
        bool pair = r->end - r->at >= 2 && r->at[0] == '\\' && r->at[1] == 'u';
        if (pair) r->at += 2;
        int low = pair ? json_hex4(r) : 0;
        if (low >= 0 && (low < 0xDC00 || low > 0xDFFF))
            return json_error_at(r, place,
                                 "this surrogate has no second half (\\uDC00 to \\uDFFF must follow)");
        code = low < 0 ? -1 : 0x10000 + (code - 0xD800) * 0x400 + (low - 0xDC00);
    } else if (code >= 0xDC00 && code <= 0xDFFF) {
        return json_error_at(r, place, "this second half of a surrogate pair has no first half before it");
    }
    if (code < 0) return json_expected(r, "four hexadecimal digits after \\u");
    if (code < 0x80) {
        *r->tail++ = (char)code;
    } else if (code < 0x800) {
        *r->tail++ = (char)(0xC0 | code >> 6);
        *r->tail++ = (char)(0x80 | (code & 0x3F));
    } else {
        if (code < 0x10000) {
            *r->tail++ = (char)(0xE0 | code >> 12);
        } else {
            *r->tail++ = (char)(0xF0 | code >> 18);
            *r->tail++ = (char)(0x80 | (code >> 12 & 0x3F));
        }
        *r->tail++ = (char)(0x80 | (code >> 6 & 0x3F));
        *r->tail++ = (char)(0x80 | (code & 0x3F));
    }
    return NULL;
}

/* A string, from its opening quote on. An escape is never shorter than what it stands for and the two
 * quotes pay for the 0 byte, so all decoded strings together fit in as many bytes as the text has. */
static inline const char *json_string(JsonReader *r, const char **string, uint32_t *length) {
    static const char letters[] = "\"\\/bfnrt", meant[] = "\"\\/\b\f\n\r\t";
    const unsigned char *quote = r->at++;
    *string = r->tail;
    while (r->at < r->end && *r->at != '"') {
        if (*r->at == '\\') {
            const char *letter = r->end - r->at >= 2 && r->at[1] ? strchr(letters, r->at[1]) : NULL;
            bool unicode = r->end - r->at >= 2 && r->at[1] == 'u';
            r->at += 1 + (letter || unicode);
            if (letter) {
                *r->tail++ = meant[letter - letters];
            } else if (unicode) {
                const char *error = json_unicode_escape(r);
                if (error) return error;
            } else {
                return json_expected(r, "one of \" \\ / b f n r t u after a backslash");
            }
            continue;
        }
        int size = json_utf8(r->at, (size_t)(r->end - r->at));
        if (*r->at < ' ')
            return json_expected(r, "no control character inside a string (write it as \\u00XX)");
        if (size == 0) return json_expected(r, "UTF-8");
        for (; size > 0; size--) *r->tail++ = (char)*r->at++;
    }
    if (r->at == r->end) return json_error_at(r, quote, "this string has no closing quote");
    r->at++;
    *length = (uint32_t)(r->tail - *string);
    *r->tail++ = '\0';
    return NULL;
}

/* Skips digits and says how many there were. */
static inline size_t json_digits(JsonReader *r) {
    const unsigned char *first = r->at;
    while (r->at < r->end && *r->at >= '0' && *r->at <= '9') r->at++;
    return (size_t)(r->at - first);
}

/* -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?   The grammar is checked here, the value is left to the C
 * library, which rounds correctly and needs the number's text to end in a 0 byte. */
static inline const char *json_number(JsonReader *r, JsonNode *node) {
    const unsigned char *first = r->at;
    if (*r->at == '-') r->at++;
    bool zero = r->at < r->end && *r->at == '0';
    size_t digits = json_digits(r);
    if (digits == 0) return json_expected(r, "a digit");
    if (zero && digits > 1)
        return json_error_at(r, first, "a number does not start with 0 and another digit");
    node->is_integer = true;
    if (r->at < r->end && *r->at == '.') {
        node->is_integer = false;
        r->at++;
        if (json_digits(r) == 0) return json_expected(r, "a digit after the decimal point");
    }
    if (r->at < r->end && (*r->at | 0x20) == 'e') {
        node->is_integer = false;
        r->at++;
        if (r->at < r->end && (*r->at == '+' || *r->at == '-')) r->at++;
        if (json_digits(r) == 0) return json_expected(r, "a digit in the exponent");
    }
    size_t length = (size_t)(r->at - first);
    memcpy(r->tail, first, length);        /* borrowed: the next string overwrites it */
    r->tail[length] = '\0';
    node->number = strtod(r->tail, NULL);
    if (!isfinite(node->number)) return json_error_at(r, first, "this number is too large for a double");
    if (node->is_integer) {
        errno = 0;
        long long value = strtoll(r->tail, NULL, 10);
        node->is_integer = errno == 0;
        node->integer = node->is_integer ? value : 0;
    }
    return NULL;
}

/* A member's key and the colon after it; `at` is where the key must start. */
static inline const char *json_key(JsonReader *r) {
    json_skip_space(r);
    if (r->at == r->end || *r->at != '"') return json_expected(r, "a key in quotes");
    const char *error = json_string(r, &r->key, &r->key_length);
    if (error) return error;
    json_skip_space(r);
    if (r->at == r->end || *r->at != ':') return json_expected(r, "':' after the key");
    r->at++;
    return NULL;
}

static inline int json_compare_keys(const void *a, const void *b) {
    const JsonNode *x = *(const JsonNode *const *)a, *y = *(const JsonNode *const *)b;
    if (x->key_length != y->key_length) return x->key_length < y->key_length ? -1 : 1;
    return memcmp(x->key, y->key, x->key_length);
}

/* Looks for a key that an object has twice. Sorting the keys needs no hash function, which a hostile file
 * could make collide, and stays fast for the hundred thousand entries of a vocabulary. */
static inline const char *json_check_keys(JsonReader *r, const JsonNode *object) {
    if (object->count > r->keys_capacity) {
        const JsonNode **keys = realloc(r->keys, 2 * (size_t)object->count * sizeof *keys);
        if (!keys) return errorf("out of memory for %" PRIu32 " keys", object->count);
        r->keys = keys;
        r->keys_capacity = 2 * (size_t)object->count;
    }
    size_t count = 0;
    for (const JsonNode *child = json_first(object); child; child = json_next(object, child))
        r->keys[count++] = child;
    if (count > 1) qsort(r->keys, count, sizeof *r->keys, json_compare_keys);
    for (size_t i = 1; i < count; i++)
        if (json_compare_keys(&r->keys[i - 1], &r->keys[i]) == 0)
            return json_error_at(r, r->at, errorf("the object that ends here has the key \"%.80s\" twice",
                                                  r->keys[i]->key));
    return NULL;
}

/* Reads one value, of a container only the opening bracket, into a new node. */
static inline const char *json_value(JsonReader *r) {
    static const struct { const char *word; JsonType type; bool boolean; } words[] = {
        {"null", JSON_NULL, false}, {"true", JSON_BOOL, true}, {"false", JSON_BOOL, false}};
    if (r->count == r->capacity) {
        size_t capacity = r->capacity ? 2 * r->capacity : 64;
        JsonNode *nodes = realloc(r->nodes, capacity * sizeof *nodes);
        if (!nodes) return errorf("out of memory for %zu JSON values", capacity);
        r->nodes = nodes;
        r->capacity = capacity;
    }
    JsonNode *node = &r->nodes[r->count];
    *node = (JsonNode){.span = 1, .key = r->key, .key_length = r->key_length};
    r->key = NULL;
    r->key_length = 0;
    json_skip_space(r);
    int c = r->at < r->end ? *r->at : 0;
    const char *error = NULL;
    if (c == '{' || c == '[') {
        if (r->depth == JSON_MAX_DEPTH)
            return json_error_at(r, r->at,
                                 errorf("more than %d containers inside each other", JSON_MAX_DEPTH));
        node->type = c == '{' ? JSON_OBJECT : JSON_ARRAY;
        r->open[r->depth++] = (uint32_t)r->count;
        r->at++;
    } else if (c == '"') {
        node->type = JSON_STRING;
        error = json_string(r, &node->string, &node->length);
    } else if (c == '-' || (c >= '0' && c <= '9')) {
        node->type = JSON_NUMBER;
        error = json_number(r, node);
    } else {
        size_t i = 0, length = 0, left = (size_t)(r->end - r->at);
        for (; i < 3; i++) {
            length = strlen(words[i].word);
            if (left >= length && memcmp(r->at, words[i].word, length) == 0) break;
        }
        if (i == 3) return json_expected(r, "a value");
        node->type = words[i].type;
        node->boolean = words[i].boolean;
        r->at += length;
    }
    r->count++;
    return error;
}

/* The document: values, and after each value whatever may follow it. The stack of open containers is an
 * array, so nesting costs four bytes a level and no recursion. */
static inline const char *json_document(JsonReader *r) {
    for (;;) {
        int depth = r->depth;
        const char *error = json_value(r);
        if (error) return error;
        bool opened = r->depth > depth;
        for (;;) {                                   /* close what ends here, up to the next value */
            json_skip_space(r);
            if (r->depth == 0)
                return r->at == r->end ? NULL : json_expected(r, "nothing after the document's value");
            JsonNode *parent = &r->nodes[r->open[r->depth - 1]];
            bool object = parent->type == JSON_OBJECT;
            if (r->at < r->end && *r->at == (object ? '}' : ']')) {
                parent->span = (uint32_t)(r->count - r->open[r->depth - 1]);
                if (object && (error = json_check_keys(r, parent))) return error;
                r->at++;
                r->depth--;
                opened = false;
                continue;
            }
            if (!opened) {
                if (r->at == r->end || *r->at != ',')
                    return json_expected(r, object ? "',' or '}'" : "',' or ']'");
                r->at++;
            }
            parent->count++;
            if (object && (error = json_key(r))) return error;
            break;
        }
    }
}

/* ----------------------------------------------------------------------------------------------------
 * The reader.
 */

static inline void json_free(Json *json) {
    free(json->root);
    free(json->text);
    *json = (Json){0};
}

/* Reads one document from `length` bytes, which are not needed afterwards. Error: line, column, what was
 * expected and what was found; nothing is left to free then. */
static inline const char *json_parse(Json *json, const char *text, size_t length) {
    *json = (Json){0};
    if (length >= UINT32_MAX)
        return errorf("a JSON text of %zu bytes is too long (the limit is 4 GiB)", length);
    const unsigned char *start = (const unsigned char *)text;
    JsonReader r = {.start = start, .at = start, .end = start + length};
    r.text = r.tail = malloc(length + 1);
    const char *error =
        r.text ? json_document(&r) : errorf("out of memory for %zu bytes of JSON text", length);
    free((void *)r.keys);
    *json = (Json){.root = r.nodes, .text = r.text};
    if (error) json_free(json);
    return error;
}

/* Where the line ends that begins at text[at], of n bytes in all: at its line feed, or at n. */
static inline size_t json_line_end(const char *text, size_t at, size_t n) {
    const char *feed = memchr(text + at, '\n', n - at);
    return feed ? (size_t)(feed - text) : n;
}

/* Reads a file into memory: *text has *length bytes and a 0 byte after them; free() it. Error: the file and
 * why. */
static inline const char *json_read_text(const char *path, char **text, size_t *length) {
    size_t capacity = 1 << 16;
    FILE *file = fopen(path, "rb");
    *length = 0;
    *text = NULL;
    if (!file) return errorf("%s: cannot open: %s", path, strerror(errno));
    const char *error = NULL;
    while (!error) {
        char *more = realloc(*text, capacity);
        if (!more) {
            error = errorf("%s: out of memory for %zu bytes", path, capacity);
            break;
        }
        *text = more;
        *length += fread(*text + *length, 1, capacity - 1 - *length, file);
        if (ferror(file)) error = errorf("%s: cannot read: %s", path, strerror(errno));
        if (*length < capacity - 1) break;           /* the end of the file */
        if (!error && capacity > SIZE_MAX / 2)
            error = errorf("%s: has more than %zu bytes, too many for this machine's memory", path, capacity);
        capacity *= 2;
    }
    fclose(file);
    if (error) {
        free(*text);
        *text = NULL;
    } else {
        (*text)[*length] = '\0';
    }
    return error;
}

/* ----------------------------------------------------------------------------------------------------
 * The writer: values one after the other, commas put in where they belong.
 *
 *     JsonWriter w = {0};
 *     json_open(&w, '{'); json_put_key(&w, "dims"); json_put_int(&w, 3); json_close(&w, '}');
 *     if (w.error) ... else use(w.text, w.length);
 *     free(w.text);
 *
 * The first error stays in w.error and later calls do nothing.
 */

typedef struct JsonWriter {
    char *text;                      /* ends in a 0 byte, which length does not count; NULL before the first value */
    size_t length, capacity;
    bool comma;                      /* a value came last: the next one needs a comma before it                    */
    const char *error;               /* a constant sentence, or NULL                                               */
} JsonWriter;

static inline void json_put_bytes(JsonWriter *w, const char *bytes, size_t length) {
    if (w->error) return;
    if (w->capacity - w->length < length + 1) {
        size_t capacity = 2 * (w->capacity + length + 1);
        char *text = realloc(w->text, capacity);
        if (!text) {
            w->error = "out of memory for JSON text";
            return;
        }
        w->text = text;
        w->capacity = capacity;
    }
    memcpy(w->text + w->length, bytes, length);
    w->length += length;
    w->text[w->length] = '\0';
}

/* Text that is JSON already, as one value. */
static inline void json_put_raw(JsonWriter *w, const char *text) {
    if (w->comma) json_put_bytes(w, ",", 1);
    json_put_bytes(w, text, strlen(text));
    w->comma = true;
}

/* bracket: '{' or '[', and '}' or ']'. */
static inline void json_open(JsonWriter *w, char bracket) {
    if (w->comma) json_put_bytes(w, ",", 1);
    json_put_bytes(w, &bracket, 1);
    w->comma = false;
}
static inline void json_close(JsonWriter *w, char bracket) {
    json_put_bytes(w, &bracket, 1);
    w->comma = true;
}

/* A string of `length` bytes, which may hold any character. Error: it is not UTF-8. */
static inline void json_put_text(JsonWriter *w, const char *string, size_t length) {
    const unsigned char *s = (const unsigned char *)string;
    if (w->comma) json_put_bytes(w, ",", 1);
    json_put_bytes(w, "\"", 1);
    for (size_t i = 0; i < length && !w->error;) {
        int size = json_utf8(s + i, length - i);
        char escape[8];
        if (size == 0) {
            w->error = "a string for a JSON text is not UTF-8";
        } else if (s[i] < ' ' || s[i] == '"' || s[i] == '\\') {
            snprintf(escape, sizeof escape, s[i] < ' ' ? "\\u%04x" : "\\%c", s[i]);
            json_put_bytes(w, escape, strlen(escape));
        } else {
            json_put_bytes(w, string + i, (size_t)size);
        }
        i += (size_t)size;
    }
    json_put_bytes(w, "\"", 1);
    w->comma = true;
}
static inline void json_put_string(JsonWriter *w, const char *string) {
    json_put_text(w, string, strlen(string));
}

/* The key of the member whose value is put next. */
static inline void json_put_key(JsonWriter *w, const char *key) {
    json_put_string(w, key);
    json_put_bytes(w, ":", 1);
    w->comma = false;
}

static inline void json_put_bool(JsonWriter *w, bool value) { json_put_raw(w, value ? "true" : "false"); }

static inline void json_put_int(JsonWriter *w, int64_t value) {
    char text[32];
    snprintf(text, sizeof text, "%" PRId64, value);
    json_put_raw(w, text);
}

/* The shortest of 15 to 17 digits that reads back as the same double: 1e-05, not 1.0000000000000001e-05.
 * Error: NaN and infinity, which JSON does not have. */
static inline void json_put_double(JsonWriter *w, double value) {
    char text[32];
    int digits = 15;
    if (!isfinite(value)) {
        w->error = "JSON has no number for NaN or infinity";
        return;
    }
    do snprintf(text, sizeof text, "%.*g", digits, value);
    while (strtod(text, NULL) != value && digits++ < 17);
    json_put_raw(w, text);
}

#endif
