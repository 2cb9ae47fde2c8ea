/* fuzz_json.c - lib/json.h: any text is refused with a sentence, or means the same after it was written and read again. */
#include "fuzz.h"

#include "lib/json.h"

static void put(JsonWriter *w, const JsonNode *node) {
    const JsonNode *child = json_first(node);
    switch (node->type) {
    case JSON_NULL: json_put_raw(w, "null"); break;
    case JSON_BOOL: json_put_bool(w, node->boolean); break;
    case JSON_NUMBER: node->is_integer ? json_put_int(w, node->integer) : json_put_double(w, node->number); break;
    case JSON_STRING: json_put_text(w, node->string, node->length); break;
    case JSON_ARRAY:
        json_open(w, '[');
        for (; child; child = json_next(node, child)) put(w, child);
        json_close(w, ']');
        break;
    case JSON_OBJECT:
        json_open(w, '{');
        for (; child; child = json_next(node, child)) {
            json_put_text(w, child->key, child->key_length);
            json_put_bytes(w, ":", 1);
            w->comma = false;
            put(w, child);
        }
        json_close(w, '}');
    }
}

static void compare(const JsonNode *a, const JsonNode *b) {
    /* 2e0 is written as 2, so a number may become an integer; never the reverse. */
    expect(a->type == b->type && a->count == b->count && a->span == b->span, "another tree");
    expect(a->key_length == b->key_length && a->length == b->length, "another length");
    expect(!a->key || memcmp(a->key, b->key, a->key_length + (size_t)1) == 0, "another key");
    expect(!a->string || memcmp(a->string, b->string, a->length + (size_t)1) == 0, "another string");
    expect(a->boolean == b->boolean && a->number == b->number, "another value");
    expect(!a->is_integer || (b->is_integer && a->integer == b->integer), "another integer");
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    Json json, again;
    JsonWriter w = {0};
    const char *error = json_parse(&json, (const char *)bytes, size);
    expect_sentence(error);
    if (error) return 0;
    put(&w, json.root);
    expect(!w.error, "cannot write what was read: %s", w.error);
    error = json_parse(&again, w.text, w.length);
    expect(!error, "cannot read what was written: %s", error);
    for (uint32_t i = 0; i < json.root->span; i++) compare(&json.root[i], &again.root[i]);
    free(w.text);
    json_free(&json);
    json_free(&again);
    return 0;
}
