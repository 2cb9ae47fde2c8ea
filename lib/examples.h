/* examples.h - prompts and responses to fine-tune a model on, from JSONL: one JSON object a line.
 *
 *     {"prompt": "Q: What is the capital of France?\nA: ", "response": "Paris."}
 *     {"text": "A text without a prompt."}
 *
 * An example is one row of a batch: the tokens of the prompt, of the response, and of the mark that ends a document, so
 * that the model learns where to stop. Nothing is put between them. Only the response and the mark are targets; of a
 * "text" all tokens but the first are. The rest of the row is padding, whose targets do not count.
 *
 *     tokens   p1  p2  p3  r1  r2  end  0  0
 *     targets   -   -  r1  r2 end   -   -  -        -: MEGALODON_IGNORE
 *
 * Examples are padded and not packed: the state runs through a row from its first token to its last, so a second
 * example in the same row would be read as the continuation of the first. Prompt and response are encoded one after the
 * other, as they are when a prompt is given to ./generate.
 *
 * All of the file is held in memory, as tokens of 4 bytes.
 */
#ifndef LIB_EXAMPLES_H
#define LIB_EXAMPLES_H

#include "vocabulary.h"              /* first: it asks for POSIX */

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../megalodon.h"
#include "documents.h"
#include "error.h"
#include "json.h"

typedef struct Example {
    int64_t first;                   /* its first token in Examples.tokens                          */
    int length, prompt;              /* tokens in all, and of the prompt                            */
} Example;

typedef struct Examples {
    const char *path;
    int32_t *tokens;
    Example *items;
    int64_t count, num_tokens;
    size_t room, tokens_room;        /* that there is memory for                                    */
    int longest;                     /* tokens of the longest example ...                           */
    int64_t longest_line;            /* ... and its line, counted from 1                            */
    uint64_t hash;                   /* of the file's bytes                                         */
} Examples;

static inline void examples_close(Examples *e) {
    free(e->tokens);
    free(e->items);
    *e = (Examples){0};
}

/* ------------------------------------------------------------------------------------------------------------------
 * Reading.
 */

static inline const char *examples_append(Examples *e, const int32_t *ids, size_t count) {
    size_t need = (size_t)e->num_tokens + count;
    if (need > e->tokens_room) {
        bool countable = need <= SIZE_MAX / 2 / sizeof *e->tokens;
        int32_t *tokens = countable ? realloc(e->tokens, 2 * need * sizeof *tokens) : NULL;
        if (!tokens) return errorf("no memory for %zu tokens of examples", 2 * need);
        e->tokens = tokens;
        e->tokens_room = 2 * need;
    }
    if (count > 0) memcpy(e->tokens + e->num_tokens, ids, count * sizeof *ids);
    e->num_tokens += (int64_t)count;
    return NULL;
}

/* Appends the tokens of a string of the file. */
static inline const char *examples_append_text(Examples *e, const Vocabulary *v, const JsonNode *node) {
    int32_t *ids;
    size_t count;
    const char *error = vocabulary_encode(v, node->string, node->length, &ids, &count);
    if (error) return error;
    error = examples_append(e, ids, count);
    free(ids);
    return error;
}

/* The members of one line. Error: what is missing, unknown or no text. */
static inline const char *examples_members(const JsonNode *root, const JsonNode **prompt, const JsonNode **response) {
    static const char expected[] = "expected {\"prompt\": ..., \"response\": ...} or {\"text\": ...}";
    const JsonNode *text = json_get(root, "text");
    *prompt = json_get(root, "prompt");
    *response = json_get(root, "response");
    if (root->type != JSON_OBJECT) return errorf("%s, found %s", expected, json_type_name(root));
    for (const JsonNode *member = json_first(root); member; member = json_next(root, member)) {
        if (member != text && member != *prompt && member != *response)
            return errorf("%s, found the key \"%.80s\"; leave it out, or make it a part of the prompt", expected,
                          member->key);
        if (member->type != JSON_STRING)
            return errorf("\"%s\": expected a text, found %s", member->key, json_type_name(member));
    }
    if (text ? *prompt || *response : !*prompt || !*response)
        return errorf("%s, found %s", expected, text ? "\"text\" beside one of the others" : *prompt ? "no \"response\""
                      : *response ? "no \"prompt\"" : "none of these keys");
    if (text) *response = text;
    if ((*response)->length == 0)
        return errorf("\"%s\" is empty; there is nothing to learn from it", text ? "text" : "response");
    return NULL;
}

/* Adds the example of one line. */
static inline const char *examples_add(Examples *e, const Vocabulary *v, const DocumentMark *end, const char *line,
                                       size_t length, int64_t number) {
    Json json;
    const JsonNode *prompt, *response;
    Example item = {.first = e->num_tokens};
    const char *error = json_parse(&json, line, length);
    /* Each line is a document of its own, so its reader counts from line 1. */
    if (error) return strncmp(error, "line 1, ", 8) == 0 ? error + 8 : error;
    error = examples_members(json.root, &prompt, &response);
    if (!error && prompt) error = examples_append_text(e, v, prompt);
    item.prompt = (int)(e->num_tokens - item.first);
    if (!error) error = examples_append_text(e, v, response);
    if (!error) error = examples_append(e, end->tokens, (size_t)end->count);
    if (!error && e->num_tokens - item.first > INT32_MAX / 2) error = errorf("the example is too long");
    if (!error && e->num_tokens - item.first < 2)
        error = errorf("the example is one token long; a prediction takes one to read and one to guess");
    if (error) error = errorf("%s", error);                  /* while the texts that it quotes still exist */
    json_free(&json);
    if (error) return error;
    item.length = (int)(e->num_tokens - item.first);
    if ((size_t)e->count == e->room) {
        size_t room = e->room ? 2 * e->room : 1024;
        Example *items = realloc(e->items, room * sizeof *items);
        if (!items) return errorf("no memory for %zu examples", room);
        e->items = items;
        e->room = room;
    }
    e->items[e->count++] = item;
    if (item.length > e->longest) {
        e->longest = item.length;
        e->longest_line = number;
    }
    return NULL;
}

/* Reads a file of examples; `path` must stay. end: what is put behind each of them. Error: the file, the line, and what
 * is wrong with it; nothing is left to close then. */
static inline const char *examples_open(Examples *e, const char *path, const Vocabulary *v, const DocumentMark *end) {
    char *text;
    size_t length;
    int64_t number = 0;
    *e = (Examples){.path = path, .hash = 0xcbf29ce484222325u};
    const char *error = json_read_text(path, &text, &length);
    if (error) return error;
    for (size_t i = 0; i < length; i++) e->hash = (e->hash ^ (uint8_t)text[i]) * 0x100000001b3u;
    for (size_t at = 0, stop; !error && at < length; at = stop + 1) {
        size_t first = at;
        stop = json_line_end(text, at, length);
        number++;
        while (first < stop && (text[first] == ' ' || text[first] == '\t' || text[first] == '\r')) first++;
        if (first == stop) continue;                         /* a blank line */
        error = examples_add(e, v, end, text + at, stop - at, number);
        if (error) error = errorf("%s, line %lld: %s", path, (long long)number, error);
    }
    if (!error && e->count == 0) error = errorf("%s: holds no examples", path);
    free(text);
    if (error) examples_close(e);
    return error;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Rows.
 */

/* Fills a row of T tokens and T targets with example i, which has at most T + 1 tokens. */
static inline void examples_row(const Examples *e, int64_t i, int T, int32_t *tokens, int32_t *targets) {
    const Example *item = &e->items[i];
    for (int t = 0; t < T; t++) {
        bool counts = t + 1 < item->length && t + 1 >= item->prompt;
        tokens[t] = t < item->length ? e->tokens[item->first + t] : 0;
        targets[t] = counts ? e->tokens[item->first + t + 1] : MEGALODON_IGNORE;
    }
}

/* The example that is drawn as number `draw` from `count` of them: each one once in every `count` draws, in an order
 * that is another one each time and depends on the seed. It needs no memory, so a run that is resumed goes on with the
 * same examples.
 *
 * Four rounds of a Feistel network permute the numbers of 2 h bits: (l, r) becomes (r, l xor f(r)), which can be undone
 * whatever f is. A number that lands outside of [0, count) is sent through again until it lands inside. */
static inline int64_t examples_draw(int64_t count, uint64_t seed, int64_t draw) {
    uint64_t key = megalodon_random(seed, (uint64_t)(draw / count)), x = (uint64_t)(draw % count);
    int half = 1;
    while (((uint64_t)1 << 2 * half) < (uint64_t)count) half++;
    do {
        uint64_t mask = ((uint64_t)1 << half) - 1, left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < 4; round++) {
            uint64_t mixed = left ^ (megalodon_random(key, right << 2 | round) & mask);
            left = right;
            right = mixed;
        }
        x = left << half | right;
    } while (x >= (uint64_t)count);
    return (int64_t)x;
}

#endif
