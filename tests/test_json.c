/* test_json.c - the JSON reader against what a stranger's file may hold.
 *
 * Documents that must be accepted and what they mean, documents that must be refused, every truncation and every single
 * byte changed of one that uses the whole grammar, nesting, huge numbers, large objects; and the writer's output read
 * back. Build it with -fsanitize=address,undefined to see that nothing is read or written out of bounds: each text is
 * parsed from a heap block of exactly its size.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <time.h>

#include "lib/json.h"
#include "tests/test.h"

/* Parses a copy of exactly `length` bytes, so that a sanitizer sees a read past the end. */
static const char *parse(Json *json, const char *text, size_t length) {
    char *copy = malloc(length ? length : 1);
    if (!copy) die("out of memory");
    memcpy(copy, text, length);
    const char *error = json_parse(json, copy, length);
    free(copy);
    return error;
}

/* Follows every link of a document that was accepted; returns how many nodes it has. */
static size_t walk(const JsonNode *node) {
    size_t nodes = 1, children = 0;
    for (const JsonNode *child = json_first(node); child; child = json_next(node, child)) {
        nodes += walk(child);
        children++;
        if ((child->key != NULL) != (node->type == JSON_OBJECT)) return 0;
    }
    if (node->type == JSON_STRING && node->string[node->length] != '\0') return 0;
    return children == node->count ? nodes : 0;
}

static const char *const valid[] = {
    "null", "true", "false", "0", "-0", "1", "-1", "12345678901234567890", "1.5", "1e5", "1E+5", "1e-5", "0.0e0",
    "-0.5E2",
    "\"\"", "\"a\"", "[]", "{}", " [ ] ", "\t{\r\n}\n", "[1]", "[1,2]", "[[],[[]],{}]", "{\"a\":1}",
    "{\"a\":1,\"b\":2}", "{\"\":0}", "{\"a\":{\"a\":{\"a\":[]}}}", "\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"",
    "\"\\u0041\\u00e9\\u20AC\\uD83D\\uDE00\"",
    "\"\x7F\"", "\"\xC2\x80 \xDF\xBF \xE0\xA0\x80 \xED\x9F\xBF \xEE\x80\x80 \xF0\x90\x80\x80 \xF4\x8F\xBF\xBF\"",
    "\"\\uFFFF\"", "\"\xEF\xBF\xBF\"", "\"\\u0000\"", "1e-400", "0.1e-99999", "[true,false,null]", "{\"a\":1,\"A\":2}",
    "{\"\\u0000\":1,\"\\u0000\\u0000\":2}",
};

static const char *const invalid[] = {
    "", " ", "\n", "nul", "nulll", "True", "NaN", "nan", "Infinity", "-Infinity", "inf", "undefined", "'a'", "a",
    "+1", "-", "--1", "01", "-01", "00", "1.", ".5", "-.5", "1.e5", "1e", "1e+", "1e5.5", "0x10", "1_000", "1 2", "1a",
    "- 1",
    "1e400", "-1e400", "\"", "\"a", "\"\\", "\"\\\"", "\"\\x41\"", "\"\\a\"", "\"\\u\"", "\"\\u12\"", "\"\\u123\"",
    "\"\\u12G4\"", "\"\\U0041\"", "\"\\uD800\"", "\"\\uD800x\"", "\"\\uD800\\n\"", "\"\\uD800\\u0041\"",
    "\"\\uD800\\uD800\"", "\"\\uDC00\"", "\"\\uDC00\\uD800\"", "\"\\uD83D\\uDE0\"", "\"\\uD83D\\\"", "\"a\nb\"",
    "\"a\tb\"", "\"\x01\"", "\"\x1F\"",
    "\"\x80\"", "\"\xC0\x80\"", "\"\xC1\xBF\"", "\"\xC2\"", "\"\xC2 \"", "\"\xE0\x80\x80\"", "\"\xE0\x9F\xBF\"",
    "\"\xED\xA0\x80\"", "\"\xED\xBF\xBF\"", "\"\xE2\x82\"", "\"\xF0\x8F\xBF\xBF\"", "\"\xF4\x90\x80\x80\"",
    "\"\xF5\x80\x80\x80\"", "\"\xFF\"", "\"\xFE\"", "\"\xF0\x9F\x98\"", "\"\xE9\"",
    "\xEF\xBB\xBF{}", "\xC2\xA0[]", "[]\xE2\x80\xA8", "[", "]", "{", "}", "[1", "[1,", "[1,]", "[,1]", "[,]", "[1 2]",
    "[1,,2]", "[1}", "{1}", "{\"a\"}", "{\"a\":}", "{\"a\":1", "{\"a\":1,", "{\"a\":1,}", "{,}", "{\"a\" 1}", "{a:1}",
    "{'a':1}", "{1:1}", "{\"a\":1]", "{\"a\":1 \"b\":2}", "{\"a\"::1}", "{\"a\":1}}", "[]]", "[][]", "{}{}", "[] x",
    "null null", "\"a\" \"b\"", "[1]//", "/* */[]", "[1]#", "[\"a\":1]", "{\"a\":1,\"a\":2}", "{\"a\":1,\"\\u0061\":2}",
    "{\"\":1,\"\":2}", "{\"b\":{\"a\":1,\"c\":2,\"a\":3}}", "[\x0B]", "[\x0C]", "{\"a\":1,\"b\":2,\"c\":3,\"b\":4}",
    "\"\\ud83d\\u\"", "[1,2", "{\"a\":[1,{\"b\":2]}",
};

static void test_tables(void) {
    Json json;
    for (size_t i = 0; i < sizeof valid / sizeof *valid; i++) {
        const char *error = parse(&json, valid[i], strlen(valid[i]));
        if (!check(error == NULL, "valid document %zu <%s>: %s", i, valid[i], error)) continue;
        check(walk(json.root) == json.root->span, "valid document %zu <%s>: its nodes do not add up", i, valid[i]);
        json_free(&json);
    }
    for (size_t i = 0; i < sizeof invalid / sizeof *invalid; i++) {
        const char *error = parse(&json, invalid[i], strlen(invalid[i]));
        check(error != NULL, "invalid document %zu <%s> was accepted", i, invalid[i]);
        if (error) check(strncmp(error, "line ", 5) == 0, "invalid document %zu: no place in <%s>", i, error);
        json_free(&json);
    }
    check(parse(&json, "[1,\0 2]", 7) != NULL, "a 0 byte between values was accepted");
    check(parse(&json, "\"\0\"", 3) != NULL, "a 0 byte in a string was accepted");
    check(parse(&json, "\"\\\0\"", 4) != NULL, "an escaped 0 byte was accepted");
    check(parse(&json, "1\0", 2) != NULL, "a 0 byte after the document was accepted");
}

/* What documents mean. */
static void test_values(void) {
    static const char text[] =
        "{\"int\": -9223372036854775808, \"max\": 9223372036854775807, \"over\": 9223372036854775808,"
        " \"real\": 0.1, \"whole\": 3.0, \"exponent\": 1e3, \"zero\": -0, \"text\": \"a\\u00e9\\uD83D\\uDE00\\u0000z\","
        " \"list\": [10, [20], {\"x\": 30}, \"40\", true, null], \"exact\": 9007199254740993}";
    Json json;
    const char *error = parse(&json, text, sizeof text - 1);
    if (!check(error == NULL, "%s", error)) return;
    const JsonNode *root = json.root, *node = json_get(root, "int");
    check(root->type == JSON_OBJECT && root->count == 10, "the root is an object of 10 members");
    check(node && node->is_integer && node->integer == INT64_MIN, "the smallest int64");
    node = json_get(root, "max");
    check(node && node->is_integer && node->integer == INT64_MAX, "the largest int64");
    node = json_get(root, "over");
    check(node && !node->is_integer && node->number == 9223372036854775808., "2^63 is a double, not an int64");
    node = json_get(root, "exact");
    check(node && node->is_integer && node->integer == 9007199254740993, "2^53 + 1 stays exact");
    node = json_get(root, "real");
    check(node && !node->is_integer && node->number == 0.1, "0.1");
    node = json_get(root, "whole");
    check(node && !node->is_integer && node->number == 3, "3.0 is no integer");
    node = json_get(root, "exponent");
    check(node && !node->is_integer && node->number == 1000, "1e3 is no integer");
    node = json_get(root, "zero");
    check(node && node->is_integer && node->integer == 0 && signbit(node->number), "-0");
    node = json_get(root, "text");
    check(node && node->length == 9 && memcmp(node->string, "a\xC3\xA9\xF0\x9F\x98\x80\0z", 10) == 0, "escapes");
    check(json_get(root, "none") == NULL && json_get(root, "in") == NULL, "keys that are not there");
    check(json_get(json_get(root, "list"), "x") == NULL && json_get(NULL, "x") == NULL, "no object, no member");
    check(json_first(json_get(root, "int")) == NULL, "a number has no children");
    int place = 0;
    node = json_get(root, "list");
    static const JsonType types[] = {JSON_NUMBER, JSON_ARRAY, JSON_OBJECT, JSON_STRING, JSON_BOOL, JSON_NULL};
    for (const JsonNode *child = json_first(node); child; child = json_next(node, child), place++)
        check(child->type == types[place] && !child->key, "child %d of the list is %s", place, json_type_name(child));
    check(place == 6 && node->count == 6, "the list has 6 children, not %d", place);
    json_free(&json);
}

/* Messages name the place, what was expected and what was found. */
static void test_messages(void) {
    static const struct { const char *text, *error; } cases[] = {
        {"{\n  \"a\": 1,\n  b: 2\n}", "line 3, column 3: expected a key in quotes, found 'b'"},
        {"[1,\n2", "line 2, column 2: expected ',' or ']', found the end of the text"},
        {"[\"\xC3\xA9\xC3\xA9\" 1]", "line 1, column 7: expected ',' or ']', found '1'"},
        {"[\x01]", "line 1, column 2: expected a value, found the byte 0x01"},
        {"{\"k\":1,\"k\":2}", "line 1, column 13: the object that ends here has the key \"k\" twice"},
        {"\n \"abc", "line 2, column 2: this string has no closing quote"},
        {"[1] 2", "line 1, column 5: expected nothing after the document's value, found '2'"},
        {"[012]", "line 1, column 2: a number does not start with 0 and another digit"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Json json;
        const char *error = parse(&json, cases[i].text, strlen(cases[i].text));
        check(error && strcmp(error, cases[i].error) == 0, "expected <%s>, found <%s>", cases[i].error,
              error ? error : "no error");
    }
}

static const char whole_grammar[] =
    " {\"k\": [0, -1, 2.5, 3e-2, -4.5E+6, true, false, null, \"\", \"a\\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9"
    "\\uD83D\\uDE00\"],\n"
    "\t\"\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80\": {\"x\": {}, \"y\": [[], [1]], \"z\": 12345678901234567890}}\r\n";

/* No prefix of an object is a document; no changed byte may crash the reader, and what it accepts must be whole. */
static void test_mutations(void) {
    size_t length = sizeof whole_grammar - 1, object = length - 2;         /* without the last line's end */
    char text[sizeof whole_grammar];
    Json json;
    check(parse(&json, whole_grammar, length) == NULL, "the document itself");
    json_free(&json);
    for (size_t n = 0; n < object; n++) {
        check(parse(&json, whole_grammar, n) != NULL, "the first %zu bytes were accepted", n);
        json_free(&json);
    }
    long accepted = 0, broken = 0;
    for (size_t i = 0; i < length; i++) {
        for (int byte = 0; byte < 256; byte++) {
            memcpy(text, whole_grammar, length);
            text[i] = (char)byte;
            if (parse(&json, text, length)) continue;
            accepted++;
            broken += walk(json.root) != json.root->span;
            json_free(&json);
        }
        memcpy(text, whole_grammar, i);                                    /* and one byte left out */
        memcpy(text + i, whole_grammar + i + 1, length - i - 1);
        if (parse(&json, text, length - 1)) continue;
        broken += walk(json.root) != json.root->span;
        json_free(&json);
    }
    check(broken == 0, "%ld changed documents were accepted with nodes that do not add up", broken);
    check(accepted > (long)length, "only %ld changed documents are valid: is the reader too strict?", accepted);
}

static void test_depth(void) {
    enum { DEEP = 1000000 };
    char *text = malloc(2 * DEEP);
    if (!text) die("out of memory");
    Json json;
    for (int depth = JSON_MAX_DEPTH; depth <= JSON_MAX_DEPTH + 1; depth++) {
        memset(text, '[', (size_t)depth);
        memset(text + depth, ']', (size_t)depth);
        const char *error = parse(&json, text, 2 * (size_t)depth);
        check((error == NULL) == (depth <= JSON_MAX_DEPTH), "%d arrays inside each other: %s", depth,
              error ? error : "accepted");
        json_free(&json);
    }
    memset(text, '[', DEEP);
    memset(text + DEEP, ']', DEEP);
    check(parse(&json, text, 2 * DEEP) != NULL, "a million arrays inside each other were accepted");
    check(parse(&json, text, DEEP) != NULL, "a million open arrays were accepted");
    for (size_t i = 0; i + 5 <= DEEP; i += 5) memcpy(text + i, "{\"a\":", 5);
    check(parse(&json, text, DEEP) != NULL, "many open objects were accepted");
    free(text);
}

/* Numbers of a million digits: their value is right or they are refused. */
static void test_long_numbers(void) {
    enum { DIGITS = 1000000 };
    char *text = malloc(DIGITS + 16);
    if (!text) die("out of memory");
    Json json;
    memset(text, '9', DIGITS);
    check(parse(&json, text, DIGITS) != NULL, "a number of a million digits was accepted");
    memcpy(text, "0.", 2);
    const char *error = parse(&json, text, DIGITS);
    if (check(error == NULL, "0.999...: %s", error)) check(json.root->number == 1, "0.999... is 1");
    json_free(&json);
    memset(text + 2, '0', DIGITS - 2);
    memcpy(text + DIGITS, "1e999999", 8);
    error = parse(&json, text, DIGITS + 8);
    if (check(error == NULL, "0.000...1e999999: %s", error)) check(json.root->number == 1, "0.000...1e999999 is 1");
    json_free(&json);
    memcpy(text, "1e99999999999999999999", 22);
    check(parse(&json, text, 22) != NULL, "1e99999999999999999999 was accepted");
    free(text);
}

/* As large as the vocabulary of a tokenizer: an object of n keys is read in a second, and one key too many is found. */
static void test_large_object(void) {
    enum { KEYS = 200000 };
    JsonWriter w = {0};
    char key[32];
    json_open(&w, '{');
    for (int i = 0; i < KEYS; i++) {
        snprintf(key, sizeof key, "token %d", i);
        json_put_key(&w, key);
        json_put_int(&w, i);
    }
    size_t before = w.length;
    json_close(&w, '}');
    Json json;
    clock_t start = clock();
    const char *error = parse(&json, w.text, w.length);
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    if (check(error == NULL, "%d keys: %s", KEYS, error)) {
        int64_t place = 0, wrong = 0;
        for (const JsonNode *entry = json_first(json.root); entry; entry = json_next(json.root, entry))
            wrong += entry->integer != place++;
        check(place == KEYS && wrong == 0, "%" PRId64 " entries, %" PRId64 " wrong", place, wrong);
        json_free(&json);
    }
    check(seconds < 5, "%d keys took %.1f s: is the check for duplicates quadratic?", KEYS, seconds);
    w.length = before;
    w.comma = true;
    json_put_key(&w, "token 77777");
    json_put_int(&w, 0);
    json_close(&w, '}');
    error = parse(&json, w.text, w.length);
    check(error && strstr(error, "\"token 77777\" twice"), "a duplicate among %d keys: %s", KEYS, error);
    free(w.text);
}

/* What the writer makes, the reader reads back. */
static void test_writer(void) {
    static const double numbers[] = {0, -0., 1, 0.1, 1e-5, 1. / 3, 1e300, 5e-324, 1.7976931348623157e308, -2.5};
    enum { COUNT = sizeof numbers / sizeof *numbers };
    static const char hard[] = "quote \" backslash \\ line\n tab\t zero\0 \x01\x1F\x7F \xC3\xA9\xF0\x9F\x98\x80";
    JsonWriter w = {0};
    json_open(&w, '{');
    json_put_key(&w, "text");
    json_put_text(&w, hard, sizeof hard - 1);
    json_put_key(&w, "a \"key\"");
    json_put_bool(&w, true);
    json_put_key(&w, "min");
    json_put_int(&w, INT64_MIN);
    json_put_key(&w, "raw");
    json_put_raw(&w, "[null]");
    json_put_key(&w, "empty");
    json_open(&w, '[');
    json_close(&w, ']');
    json_put_key(&w, "numbers");
    json_open(&w, '[');
    for (int i = 0; i < COUNT; i++) json_put_double(&w, numbers[i]);
    json_close(&w, ']');
    json_close(&w, '}');
    Json json;
    const char *error = w.error ? w.error : parse(&json, w.text, w.length);
    if (check(error == NULL, "%s in <%s>", error, w.text)) {
        const JsonNode *node = json_get(json.root, "text");
        check(node && node->length == sizeof hard - 1 && memcmp(node->string, hard, sizeof hard) == 0, "a hard string");
        node = json_get(json.root, "a \"key\"");
        check(node && node->type == JSON_BOOL && node->boolean, "a key with quotes");
        node = json_get(json.root, "min");
        check(node && node->integer == INT64_MIN, "the smallest int64");
        node = json_get(json.root, "numbers");
        check(node && node->count == COUNT && json_get(json.root, "raw")->count == 1, "the lists");
        int i = 0;
        for (const JsonNode *x = json_first(node); x; x = json_next(node, x), i++)
            check(x->number == numbers[i], "number %d: wrote %.17g, read %.17g", i, numbers[i], x->number);
        check(strstr(w.text, "1e-05") && strstr(w.text, "0.1,"), "numbers are written in few digits: %s", w.text);
        json_free(&json);
    }
    free(w.text);
    w = (JsonWriter){0};
    json_put_double(&w, NAN);
    check(w.error != NULL, "NaN was written");
    free(w.text);
    w = (JsonWriter){0};
    json_put_string(&w, "latin1 \xE9");
    check(w.error != NULL, "a string that is not UTF-8 was written");
    free(w.text);
}

static void test_files(void) {
    char *text;
    size_t length;
    const char *error = json_read_text("/nonexistent/file.json", &text, &length);
    check(error && strstr(error, "/nonexistent/file.json: cannot open"), "a missing file: %s", error);
    error = json_read_text(".", &text, &length);
    check(error && strstr(error, "cannot read") && !text, "a directory was read as a file: %s", error);
    error = json_read_text("LICENSE", &text, &length);
    if (check(!error && length > 100 && strlen(text) == length, "a file: %s", error)) free(text);
}

int main(void) {
    test_begin("json");
    test_tables();
    test_values();
    test_messages();
    test_mutations();
    test_depth();
    test_long_numbers();
    test_large_object();
    test_writer();
    test_files();
    return test_end();
}
