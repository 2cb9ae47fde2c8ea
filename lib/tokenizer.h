/* tokenizer.h - text to tokens and back, by a tokenizer.json of byte-level BPE.
 *
 *     Tokenizer tok;
 *     die_if(tokenizer_load("tokenizer.json", &tok));
 *     die_if(tokenizer_encode(&tok, text, n, ids, tokenizer_capacity(n), &count));
 *     die_if(tokenizer_decode_token(&tok, ids[0], &bytes, &length));
 *     tokenizer_free(&tok);
 *
 * The ids are those of the Python package `tokenizers` (encode with add_special_tokens=False), and so are the bytes of
 * decode. Encoding takes four steps:
 *
 *   1. Added tokens such as <|endoftext|> are found in the text and become their ids.
 *   2. The text between them is cut into words by a regular expression. Here it is a few loops over character classes.
 *   3. Each byte of a word becomes the token that stands for this byte.
 *   4. Neighbours are merged: always the pair that comes first in the list of merges, and of equal ones the leftmost,
 *      until no pair is in the list.
 *
 * Most words of a text are tokens themselves. Loading finds out which tokens the merges really arrive at, so encoding
 * such a word is one look into a hash table.
 *
 * The library takes only valid UTF-8. Here a byte that is no part of a character counts as a symbol of its own, so
 * that any bytes can be encoded, and decoding gives them back.
 */
#ifndef LIB_TOKENIZER_H
#define LIB_TOKENIZER_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "json.h"
#include "unicode_tables.h"

/* How the text between added tokens is cut into words. Written as regular expressions these are
 *   GPT2:    's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
 *   CL100K:  (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|
 *            \s+(?!\S)|\s+        (Llama 3; with \p{N} instead of \p{N}{1,3} Qwen 2)
 */
typedef enum { TOKENIZER_GPT2, TOKENIZER_CL100K } TokenizerPattern;

/* Classes of characters, as in unicode_tables.h. */
enum { CLASS_OTHER, CLASS_LETTER, CLASS_NUMBER, CLASS_SPACE, CLASS_MASK = 3, CLASS_WORD = 4 };

enum { TOKENIZER_NO_ID = -1, TOKENIZER_MAX_SIZE = 1 << 24, TOKENIZER_LETTERS = 324 };

typedef struct TokenizerToken {
    uint32_t start, length;          /* its bytes are tok->bytes[start, start + length)                    */
    bool exists;
    bool spelled;                    /* the vocabulary spells it in letters that stand for bytes           */
    bool whole;                      /* encoding its bytes as one word gives this token                    */
    bool special;                    /* an added token with the flag "special"                             */
} TokenizerToken;

typedef struct TokenizerMerge {      /* a slot of a hash table; key: left id << 32 | right id              */
    uint64_t key;
    uint32_t rank;                   /* place in the list of merges, the first being 0                     */
    int32_t id;                      /* the token that the pair becomes; TOKENIZER_NO_ID: an empty slot    */
} TokenizerMerge;

typedef struct TokenizerAdded {      /* a token that is found in the text before anything else             */
    char *content;
    size_t length;
    int32_t id;
    bool single_word;                /* only where no character of a word stands before or after it        */
    bool lstrip, rstrip;             /* takes the white space before, after it with it                     */
    bool normalized;                 /* looked for after those that are not                                */
    bool special;
} TokenizerAdded;

typedef struct Tokenizer {
    int32_t size;                    /* ids are [0, size)                                                  */
    TokenizerToken *tokens;
    uint8_t *bytes;                  /* of all tokens                                                      */
    int32_t *words;                  /* hash table: bytes of a token that is `spelled` to its id           */
    size_t words_mask;
    TokenizerMerge *merges;          /* hash table                                                         */
    size_t merges_mask;
    TokenizerAdded *added;
    int added_count;
    size_t added_longest;            /* bytes                                                              */
    bool added_starts[2][256];       /* [normalized][byte]: does one begin with this byte?                 */
    TokenizerPattern pattern;
    int digits;                      /* CL100K: numerals in one word at most                               */
    bool add_prefix_space;           /* text between added tokens gets a space before it if it has none    */
    bool ignore_merges;              /* a word that is a token is taken without asking the merges          */
    int32_t byte_id[256];            /* the token of each byte                                             */
    int16_t letter_byte[TOKENIZER_LETTERS];  /* code point to the byte that it stands for, or -1           */
    uint8_t ascii_class[128];
} Tokenizer;

static inline void tokenizer_free(Tokenizer *tok) {
    for (int i = 0; i < tok->added_count; i++) free(tok->added[i].content);
    free(tok->added);
    free(tok->tokens);
    free(tok->bytes);
    free(tok->words);
    free(tok->merges);
    memset(tok, 0, sizeof *tok);
}

/* ------------------------------------------------------------------------------------------------------------------
 * Characters.
 */

/* The code point of the valid UTF-8 character of `size` bytes at s. */
static inline uint32_t tokenizer_code_point(const uint8_t *s, int size) {
    if (size == 1) return s[0];
    uint32_t code = s[0] & (0xffu >> (size + 1));
    for (int i = 1; i < size; i++) code = code << 6 | (s[i] & 0x3f);
    return code;
}

/* Class of a code point, with CLASS_WORD: the last change at or before it counts. */
static inline int unicode_class(uint32_t code) {
    int low = 0, high = UNICODE_CHANGES - 1;
    while (low < high) {
        int middle = low + (high - low + 1) / 2;
        if (unicode_changes[middle] >> 3 <= code) low = middle;
        else high = middle - 1;
    }
    return (int)(unicode_changes[low] & 7);
}

/* Class and size of the character at s, of which `left` >= 1 bytes exist. A byte that starts no character is one of
 * CLASS_OTHER. */
static inline int tokenizer_class(const Tokenizer *tok, const uint8_t *s, size_t left, int *size) {
    *size = 1;
    if (s[0] < 0x80) return tok->ascii_class[s[0]];
    int length = json_utf8(s, left);
    if (length == 0) return CLASS_OTHER;
    *size = length;
    return unicode_class(tokenizer_code_point(s, length));
}

/* Class and size of the character that ends at s[at], at >= 1. UTF-8 can be read backwards: a character's first byte
 * never stands inside of another one. */
static inline int tokenizer_class_before(const Tokenizer *tok, const uint8_t *s, size_t at, int *size) {
    for (size_t back = 1; back <= 4 && back <= at; back++) {
        if ((s[at - back] & 0xc0) == 0x80) continue;
        int kind = tokenizer_class(tok, s + at - back, back, size);
        if ((size_t)*size == back) return kind;
        break;
    }
    *size = 1;
    return CLASS_OTHER;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Cutting text into words. Each function returns where the word that starts at s[at] ends; the text ends at s[n].
 */

/* End of the characters of one class from `at` on, at most `limit` of them. */
static inline size_t tokenizer_run(const Tokenizer *tok, const uint8_t *s, size_t at, size_t n, int kind,
                                   size_t limit) {
    int size;
    for (; at < n && limit > 0; at += (size_t)size, limit--)
        if ((tokenizer_class(tok, s + at, n - at, &size) & CLASS_MASK) != kind) break;
    return at;
}

/* The apostrophe at s[at] and what belongs to it in 's 't 're 've 'm 'll 'd; `at` if it is none of them. If `fold`, in
 * any case; the long s (U+017F) then is an s as well. */
static inline size_t tokenizer_contraction(const uint8_t *s, size_t at, size_t n, bool fold) {
    uint8_t bit = fold ? 0x20 : 0;
    uint8_t a = n - at > 1 ? s[at + 1] | bit : 0, b = n - at > 2 ? s[at + 2] | bit : 0;
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return at + 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return at + 3;
    if (fold && n - at > 2 && s[at + 1] == 0xc5 && s[at + 2] == 0xbf) return at + 3;
    return at;
}

/* White space that no other rule takes. \s+(?!\S) leaves its last character to the word that follows, unless the text
 * ends here; \s+ takes a single one. */
static inline size_t tokenizer_space(const Tokenizer *tok, const uint8_t *s, size_t at, size_t n) {
    int size;
    size_t end = tokenizer_run(tok, s, at, n, CLASS_SPACE, SIZE_MAX);
    if (end == n) return end;
    tokenizer_class_before(tok, s, end, &size);
    return end - (size_t)size > at ? end - (size_t)size : end;
}

static inline size_t tokenizer_word_gpt2(const Tokenizer *tok, const uint8_t *s, size_t at, size_t n) {
    int size;
    if (s[at] == '\'') {
        size_t end = tokenizer_contraction(s, at, n, false);
        if (end > at) return end;
    }
    size_t first = at + (s[at] == ' ' && at + 1 < n);        /* the optional space of " ?" */
    int kind = tokenizer_class(tok, s + first, n - first, &size) & CLASS_MASK;
    if (kind == CLASS_SPACE) return tokenizer_space(tok, s, at, n);
    return tokenizer_run(tok, s, first + (size_t)size, n, kind, SIZE_MAX);
}

static inline size_t tokenizer_word_cl100k(const Tokenizer *tok, const uint8_t *s, size_t at, size_t n) {
    int size, next_size, next = -1;
    if (s[at] == '\'') {
        size_t end = tokenizer_contraction(s, at, n, true);
        if (end > at) return end;
    }
    int kind = tokenizer_class(tok, s + at, n - at, &size) & CLASS_MASK;
    size_t second = at + (size_t)size;
    if (second < n) next = tokenizer_class(tok, s + second, n - second, &next_size) & CLASS_MASK;
    if (kind == CLASS_LETTER) return tokenizer_run(tok, s, at, n, CLASS_LETTER, SIZE_MAX);
    if (kind == CLASS_NUMBER) return tokenizer_run(tok, s, at, n, CLASS_NUMBER, (size_t)tok->digits);
    if (next == CLASS_LETTER && s[at] != '\r' && s[at] != '\n')
        return tokenizer_run(tok, s, second, n, CLASS_LETTER, SIZE_MAX);
    if (kind == CLASS_OTHER || (s[at] == ' ' && next == CLASS_OTHER)) {
        size_t end = tokenizer_run(tok, s, second, n, CLASS_OTHER, SIZE_MAX);
        while (end < n && (s[end] == '\r' || s[end] == '\n')) end++;
        return end;
    }
    /* \s*[\r\n]+ ends after the last line break of the white space. */
    size_t end = tokenizer_run(tok, s, at, n, CLASS_SPACE, SIZE_MAX);
    while (end > at && s[end - 1] != '\r' && s[end - 1] != '\n') end--;
    return end > at ? end : tokenizer_space(tok, s, at, n);
}

/* ------------------------------------------------------------------------------------------------------------------
 * Hash tables: open addressing in a power of two of slots, of which at most half are taken.
 */

static inline size_t tokenizer_slots(size_t count) {
    size_t slots = 16;
    while (slots < 2 * count) slots *= 2;
    return slots;
}

static inline uint64_t tokenizer_mix(uint64_t x) {
    x = (x ^ x >> 32) * 0x9e3779b97f4a7c15u;
    return x ^ x >> 29;
}

/* The slot of a pair of tokens: its own, or the empty one where it belongs. */
static inline TokenizerMerge *tokenizer_merge(const Tokenizer *tok, int32_t left, int32_t right) {
    uint64_t key = (uint64_t)left << 32 | (uint32_t)right;
    size_t i = (size_t)tokenizer_mix(key) & tok->merges_mask;
    while (tok->merges[i].id != TOKENIZER_NO_ID && tok->merges[i].key != key) i = (i + 1) & tok->merges_mask;
    return &tok->merges[i];
}

/* The slot of a token's bytes: it holds the token's id, or TOKENIZER_NO_ID where they would belong. */
static inline int32_t *tokenizer_word(const Tokenizer *tok, const uint8_t *bytes, size_t n) {
    uint64_t hash = n;
    for (size_t i = 0; i < n; i++) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    size_t i = (size_t)tokenizer_mix(hash) & tok->words_mask;
    for (; tok->words[i] != TOKENIZER_NO_ID; i = (i + 1) & tok->words_mask) {
        const TokenizerToken *token = &tok->tokens[tok->words[i]];
        if (token->length == n && memcmp(tok->bytes + token->start, bytes, n) == 0) break;
    }
    return &tok->words[i];
}

/* ------------------------------------------------------------------------------------------------------------------
 * Encoding.
 */

enum { TOKENIZER_SHORT = 256 };      /* bytes of a word whose scratch memory lies on the stack */

/* A word of n bytes on its way to tokens. Symbols form a list; one that was merged into the symbol on its left is -1.
 * The heap holds rank << 32 | position of pairs, so that its least entry is the pair to merge next. An entry whose
 * pair has changed since then is recognised by its rank, which no two pairs share. */
typedef struct TokenizerWord {
    int32_t *symbol;                 /* n     */
    uint32_t *before, *after;        /* n     */
    uint64_t *heap;                  /* 3 n   */
    size_t heap_count, room;
    uint64_t small[TOKENIZER_SHORT * 36 / 8];
    uint64_t *large;
} TokenizerWord;

typedef struct TokenizerJob {
    const Tokenizer *tok;
    int32_t *ids;
    size_t count, capacity;
    uint8_t *prefixed;               /* a copy of text with a space before it */
    TokenizerWord word;
} TokenizerJob;

/* Memory for a word of n bytes. False: there is none. */
static inline bool tokenizer_reserve(TokenizerWord *w, size_t n) {
    uint64_t *memory = w->small;
    if (n <= w->room) return true;
    if (n > TOKENIZER_SHORT) {
        if (n > UINT32_MAX / 2 || n > SIZE_MAX / 80) return false;
        n *= 2;
        free(w->large);
        memory = w->large = malloc(n * 36);
        w->room = 0;
        if (!memory) return false;
    } else {
        n = TOKENIZER_SHORT;
    }
    w->heap = memory;
    w->symbol = (int32_t *)(memory + 3 * n);
    w->before = (uint32_t *)(w->symbol + n);
    w->after = w->before + n;
    w->room = n;
    return true;
}

static inline void tokenizer_push(TokenizerWord *w, uint64_t entry) {
    size_t i = w->heap_count++;
    for (; i > 0 && w->heap[(i - 1) / 2] > entry; i = (i - 1) / 2) w->heap[i] = w->heap[(i - 1) / 2];
    w->heap[i] = entry;
}

static inline uint64_t tokenizer_pop(TokenizerWord *w) {
    uint64_t least = w->heap[0], last = w->heap[--w->heap_count];
    size_t i = 0;
    for (size_t child = 1; child < w->heap_count; child = 2 * i + 1) {
        if (child + 1 < w->heap_count && w->heap[child + 1] < w->heap[child]) child++;
        if (w->heap[child] >= last) break;
        w->heap[i] = w->heap[child];
        i = child;
    }
    w->heap[i] = last;
    return least;
}

/* Queues the pair of the symbol at position i and the one after it, if it is in the list of merges. */
static inline void tokenizer_queue(const Tokenizer *tok, TokenizerWord *w, uint32_t i, uint32_t n) {
    if (w->after[i] >= n) return;
    const TokenizerMerge *merge = tokenizer_merge(tok, w->symbol[i], w->symbol[w->after[i]]);
    if (merge->id != TOKENIZER_NO_ID) tokenizer_push(w, (uint64_t)merge->rank << 32 | i);
}

/* Merges the bytes of a word of n >= 1 bytes. The result is the list of w->symbol from position 0 on, by w->after.
 * Takes O(n log n): each merge removes a symbol and queues two pairs at most. */
static inline bool tokenizer_merge_word(const Tokenizer *tok, TokenizerWord *w, const uint8_t *bytes, size_t size) {
    if (!tokenizer_reserve(w, size)) return false;
    uint32_t n = (uint32_t)size;
    w->heap_count = 0;
    for (uint32_t i = 0; i < n; i++) {
        w->symbol[i] = tok->byte_id[bytes[i]];
        w->before[i] = i - 1;
        w->after[i] = i + 1;
    }
    for (uint32_t i = 0; i < n; i++) tokenizer_queue(tok, w, i, n);
    while (w->heap_count > 0) {
        uint64_t entry = tokenizer_pop(w);
        uint32_t i = (uint32_t)entry, j = w->after[i];
        if (w->symbol[i] < 0 || j >= n) continue;
        const TokenizerMerge *merge = tokenizer_merge(tok, w->symbol[i], w->symbol[j]);
        if (merge->id == TOKENIZER_NO_ID || merge->rank != entry >> 32) continue;
        w->symbol[i] = merge->id;
        w->symbol[j] = -1;
        w->after[i] = w->after[j];
        if (w->after[i] < n) w->before[w->after[i]] = i;
        if (i > 0) tokenizer_queue(tok, w, w->before[i], n);
        tokenizer_queue(tok, w, i, n);
    }
    return true;
}

static inline const char *tokenizer_emit(TokenizerJob *job, int32_t id) {
    if (job->count == job->capacity)
        return errorf("the text has more than the %zu tokens that there is room for", job->capacity);
    job->ids[job->count++] = id;
    return NULL;
}

/* Encodes one word. */
static inline const char *tokenizer_encode_word(TokenizerJob *job, const uint8_t *s, size_t n) {
    const Tokenizer *tok = job->tok;
    int32_t id = *tokenizer_word(tok, s, n);
    if (id != TOKENIZER_NO_ID && tok->tokens[id].whole) return tokenizer_emit(job, id);
    if (!tokenizer_merge_word(tok, &job->word, s, n))
        return errorf("no memory to encode a word of %zu bytes without a space in it", n);
    const char *error = NULL;
    for (uint32_t i = 0; !error && i < n; i = job->word.after[i]) error = tokenizer_emit(job, job->word.symbol[i]);
    return error;
}

/* Encodes text without added tokens. */
static inline const char *tokenizer_encode_plain(TokenizerJob *job, const uint8_t *s, size_t n) {
    const Tokenizer *tok = job->tok;
    const char *error = NULL;
    if (tok->add_prefix_space && n > 0 && s[0] != ' ') {
        uint8_t *copy = realloc(job->prefixed, n + 1);
        if (!copy) return errorf("no memory for %zu bytes of text", n + 1);
        job->prefixed = copy;
        copy[0] = ' ';
        memcpy(copy + 1, s, n);
        s = copy;
        n++;
    }
    for (size_t at = 0; !error && at < n;) {
        size_t end = tok->pattern == TOKENIZER_GPT2 ? tokenizer_word_gpt2(tok, s, at, n)
                                                    : tokenizer_word_cl100k(tok, s, at, n);
        error = tokenizer_encode_word(job, s + at, end - at);
        at = end;
    }
    return error;
}

/* The longest added token that stands at s[at], among those with this `normalized`; NULL if there is none. */
static inline const TokenizerAdded *tokenizer_added_at(const Tokenizer *tok, const uint8_t *s, size_t at, size_t n,
                                                       bool normalized) {
    const TokenizerAdded *best = NULL;
    for (int i = 0; i < tok->added_count; i++) {
        const TokenizerAdded *a = &tok->added[i];
        if (a->normalized == normalized && a->length <= n - at && (!best || a->length > best->length) &&
            memcmp(s + at, a->content, a->length) == 0) best = a;
    }
    return best;
}

/* Is the added token at s[at] there as a word of its own? */
static inline bool tokenizer_is_single(const Tokenizer *tok, const TokenizerAdded *a, const uint8_t *s, size_t at,
                                       size_t n) {
    int size;
    size_t end = at + a->length;
    if (at > 0 && (tokenizer_class_before(tok, s, at, &size) & CLASS_WORD)) return false;
    return end == n || !(tokenizer_class(tok, s + end, n - end, &size) & CLASS_WORD);
}

/* Encodes s[0, n) around the added tokens with this `normalized`; what lies between them goes on to the next round, and
 * then to the words. From left to right the longest token counts, and one that is refused because it is no single word
 * is passed over as a whole: a shorter one inside of it is not looked for. */
static inline const char *tokenizer_encode_added(TokenizerJob *job, const uint8_t *s, size_t n, bool normalized) {
    const Tokenizer *tok = job->tok;
    size_t done = 0;
    const char *error = NULL;
    int size;
    for (size_t at = 0; at < n;) {
        const TokenizerAdded *a = NULL;
        if (tok->added_starts[normalized][s[at]]) a = tokenizer_added_at(tok, s, at, n, normalized);
        if (!a) {
            at++;
            continue;
        }
        size_t start = at, end = at + a->length;
        at = end;
        if (a->single_word && !tokenizer_is_single(tok, a, s, start, n)) continue;
        while (a->lstrip && start > done) {
            if ((tokenizer_class_before(tok, s, start, &size) & CLASS_MASK) != CLASS_SPACE) break;
            start -= (size_t)size;
        }
        if (a->rstrip) end = tokenizer_run(tok, s, end, n, CLASS_SPACE, SIZE_MAX);
        if (done < start) {
            error = normalized ? tokenizer_encode_plain(job, s + done, start - done)
                               : tokenizer_encode_added(job, s + done, start - done, true);
            if (error) return error;
        }
        error = tokenizer_emit(job, a->id);
        if (error) return error;
        done = end;
    }
    if (done == n) return NULL;
    return normalized ? tokenizer_encode_plain(job, s + done, n - done)
                      : tokenizer_encode_added(job, s + done, n - done, true);
}

/* Encodes `bytes` of length n, which need not be UTF-8. ids has room for `capacity` entries and receives *count;
 * tokenizer_capacity(n) entries are always enough. Several threads may share one tokenizer. Error: not enough room, or
 * no memory. */
static inline const char *tokenizer_encode(const Tokenizer *tok, const void *bytes, size_t n, int32_t *ids,
                                           size_t capacity, size_t *count) {
    TokenizerJob job;
    job.tok = tok;
    job.ids = ids;
    job.count = 0;
    job.capacity = capacity;
    job.prefixed = NULL;
    job.word.room = 0;
    job.word.large = NULL;
    const char *error = tokenizer_encode_added(&job, bytes, n, false);
    free(job.word.large);
    free(job.prefixed);
    *count = job.count;
    return error;
}

/* Tokens that n bytes have at most: one a byte, and a prefix space for each stretch between added tokens. */
static inline size_t tokenizer_capacity(size_t n) { return n + n / 2 + 1; }

/* The largest p in (0, n) such that the text s[0, p) and the text from s[p] on, encoded one after the other, give the
 * tokens of the whole, whatever follows s[n). 0: there is no such place in sight; try again with more text.
 *
 * A space after a character that is no white space always starts a word, and no rule looks back. A line break does so
 * as well, but not where CL100K has it follow a symbol or where a prefix space would be put before it. Added tokens
 * that touch the place and could notice the difference rule it out. */
static inline size_t tokenizer_cut(const Tokenizer *tok, const void *text, size_t n) {
    const uint8_t *s = text;
    bool lines = tok->pattern == TOKENIZER_GPT2 && !tok->add_prefix_space;
    size_t margin = tok->added_longest + 1;                  /* what touches p must be seen whole */
    for (size_t p = n > margin ? n - margin : 0; p > 0; p--) {
        int size;
        if (s[p] != ' ' && !(lines && s[p] == '\n')) continue;
        bool safe = (tokenizer_class_before(tok, s, p, &size) & CLASS_MASK) != CLASS_SPACE;
        for (int i = 0; safe && i < tok->added_count; i++) {
            const TokenizerAdded *a = &tok->added[i];
            bool spaced = memchr(a->content, ' ', a->length) || memchr(a->content, '\n', a->length);
            if (!spaced && !a->rstrip && !a->single_word) continue;
            size_t from = p > a->length ? p - a->length : 0;
            for (size_t at = from; safe && at <= p; at++)
                safe = memcmp(s + at, a->content, a->length) != 0;
        }
        if (safe) return p;
    }
    return 0;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Decoding and questions.
 */

/* Number of ids: they are [0, size). */
static inline int tokenizer_vocab_size(const Tokenizer *tok) { return tok->size; }

/* Is the token one of those that mark something rather than being text? */
static inline bool tokenizer_is_special(const Tokenizer *tok, int32_t id) {
    return id >= 0 && id < tok->size && tok->tokens[id].special;
}

/* The bytes of a token, which stay with the tokenizer. They may be a part of a character: put them through a
 * TextWriter (text.h) before a reader sees them. Error: there is no such token. */
static inline const char *tokenizer_decode_token(const Tokenizer *tok, int32_t id, const uint8_t **bytes, size_t *n) {
    *bytes = NULL;
    *n = 0;
    if (id < 0 || id >= tok->size)
        return errorf("token %ld is not one of the tokenizer's, which are 0 to %d", (long)id, (int)tok->size - 1);
    *bytes = tok->bytes + tok->tokens[id].start;
    *n = tok->tokens[id].length;
    return NULL;
}

/* The bytes that `length` bytes of the vocabulary's spelling stand for, at most as many. Returns their number, or -1 if
 * a character stands for no byte. `out` may be NULL. */
static inline int64_t tokenizer_spelled(const Tokenizer *tok, const char *spelling, size_t length, uint8_t *out) {
    const uint8_t *s = (const uint8_t *)spelling;
    int64_t n = 0;
    for (size_t at = 0; at < length;) {
        int size = json_utf8(s + at, length - at);
        uint32_t code = size ? tokenizer_code_point(s + at, size) : TOKENIZER_LETTERS;
        if (code >= TOKENIZER_LETTERS || tok->letter_byte[code] < 0) return -1;
        if (out) out[n] = (uint8_t)tok->letter_byte[code];
        n++;
        at += (size_t)size;
    }
    return n;
}

/* The id of a token as the file spells it, such as "<|endoftext|>"; TOKENIZER_NO_ID if there is none. */
static inline int32_t tokenizer_id(const Tokenizer *tok, const char *spelling) {
    uint8_t bytes[256];
    size_t length = strlen(spelling);
    for (int i = 0; i < tok->added_count; i++)
        if (tok->added[i].length == length && memcmp(tok->added[i].content, spelling, length) == 0)
            return tok->added[i].id;
    int64_t n = length <= sizeof bytes ? tokenizer_spelled(tok, spelling, length, bytes) : -1;
    return n > 0 ? *tokenizer_word(tok, bytes, (size_t)n) : TOKENIZER_NO_ID;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Loading. A file that asks for anything that is not done here is refused: ids that are nearly right would spoil a
 * training run without a sign.
 */

/* The letters that spell bytes: printable ones of Latin-1 stand for themselves, the other 68 bytes for U+0100 on. */
static inline void tokenizer_init_letters(Tokenizer *tok) {
    int next = 256;
    for (int c = 0; c < TOKENIZER_LETTERS; c++) tok->letter_byte[c] = -1;
    for (int byte = 0; byte < 256; byte++) {
        bool printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
        tok->letter_byte[printable ? byte : next++] = (int16_t)byte;
        tok->byte_id[byte] = TOKENIZER_NO_ID;
    }
    for (uint32_t c = 0; c < 128; c++) tok->ascii_class[c] = (uint8_t)unicode_class(c);
}

/* A member that is missing or null. */
static inline bool tokenizer_absent(const JsonNode *object, const char *key) {
    const JsonNode *node = json_get(object, key);
    return !node || node->type == JSON_NULL;
}

/* The name of a part of the file, for messages. */
static inline const char *tokenizer_type(const JsonNode *part) {
    const JsonNode *type = json_get(part, "type");
    return type && type->type == JSON_STRING ? type->string : json_type_name(part);
}

/* A member that must be true or false. */
static inline const char *tokenizer_bool(const JsonNode *object, const char *what, const char *key, bool *out) {
    const JsonNode *node = json_get(object, key);
    if (!node || node->type != JSON_BOOL)
        return errorf("\"%s\" of %s: expected true or false, found %s", key, what, json_type_name(node));
    *out = node->boolean;
    return NULL;
}

/* The part of the pre-tokenizer that is called ByteLevel. */
static inline const char *tokenizer_byte_level(Tokenizer *tok, const JsonNode *part, bool *use_regex) {
    *use_regex = true;                                       /* files older than the key mean true */
    static const char what[] = "the pre-tokenizer ByteLevel";
    const char *error = tokenizer_bool(part, what, "add_prefix_space", &tok->add_prefix_space);
    if (!error && json_get(part, "use_regex")) error = tokenizer_bool(part, what, "use_regex", use_regex);
    return error;
}

/* The part that is called Split: its regular expression must be one of those that this file spells out in loops. */
static inline const char *tokenizer_split(Tokenizer *tok, const JsonNode *part) {
    static const char gpt2[] = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
    static const char cl100k_head[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}";
    static const char cl100k_tail[] = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
    static const struct { const char *digits; int count; } numbers[] = {{"", 1}, {"{1,3}", 3}};
    char known[256];
    bool invert = true;
    const JsonNode *regex = json_get(json_get(part, "pattern"), "Regex");
    const char *error = tokenizer_bool(part, "the pre-tokenizer Split", "invert", &invert);
    if (error) return error;
    if (!json_is(json_get(part, "behavior"), "Isolated") || invert || !regex || regex->type != JSON_STRING)
        return "the pre-tokenizer Split is known only with a Regex, the behavior Isolated and invert false";
    tok->pattern = TOKENIZER_GPT2;
    if (json_is(regex, gpt2)) return NULL;
    tok->pattern = TOKENIZER_CL100K;
    for (int i = 0; i < 2; i++) {
        snprintf(known, sizeof known, "%s%s%s", cl100k_head, numbers[i].digits, cl100k_tail);
        tok->digits = numbers[i].count;
        if (json_is(regex, known)) return NULL;
    }
    return errorf("the regular expression of the pre-tokenizer is not one of those that are known here (those of "
                  "GPT-2, Llama 3 and Qwen 2): %.300s", regex->string);
}

/* ByteLevel, or a Sequence of Split and ByteLevel. */
static inline const char *tokenizer_read_pre_tokenizer(Tokenizer *tok, const JsonNode *part) {
    static const char expected[] = "expected ByteLevel, or a Sequence of Split and ByteLevel";
    bool use_regex;
    const JsonNode *split = NULL;
    if (json_is(json_get(part, "type"), "Sequence")) {
        const JsonNode *list = json_get(part, "pretokenizers");
        if (!list || list->type != JSON_ARRAY || list->count < 1 || list->count > 2)
            return errorf("the pre-tokenizer is a Sequence of another length; %s", expected);
        if (list->count == 2) split = json_first(list);
        part = split ? json_next(list, split) : json_first(list);
        if (split && !json_is(json_get(split, "type"), "Split"))
            return errorf("the pre-tokenizer starts with %.80s; %s", tokenizer_type(split), expected);
    }
    if (!json_is(json_get(part, "type"), "ByteLevel"))
        return errorf("the pre-tokenizer is %.80s; %s (this tokenizer is not byte-level)", tokenizer_type(part),
                      expected);
    const char *error = tokenizer_byte_level(tok, part, &use_regex);
    if (error) return error;
    if (!split) return use_regex ? NULL : "the pre-tokenizer ByteLevel has use_regex false and no Split before it, "
                                          "so words would have no ends; expected one of the two";
    if (use_regex || tok->add_prefix_space)
        return "the pre-tokenizer ByteLevel after a Split is known only with use_regex and add_prefix_space false";
    return tokenizer_split(tok, split);
}

/* Everything but the lists: which kind of tokenizer is it? */
static inline const char *tokenizer_read_kind(Tokenizer *tok, const JsonNode *root) {
    static const char *const absent[] = {"truncation", "padding"};
    static const char *const affixes[] = {"continuing_subword_prefix", "end_of_word_suffix"};
    const JsonNode *model = json_get(root, "model"), *part;
    if (root->type != JSON_OBJECT) return errorf("expected an object, found %s", json_type_name(root));
    if ((part = json_get(root, "version")) && !json_is(part, "1.0"))
        return "\"version\" is not \"1.0\", the only one that is known";
    if (!model || model->type != JSON_OBJECT)
        return errorf("\"model\": expected an object, found %s; is this a tokenizer.json of the package tokenizers?",
                      json_type_name(model));
    if (json_get(model, "type") && !json_is(json_get(model, "type"), "BPE"))
        return errorf("the model is %.80s; only byte-level BPE is known", tokenizer_type(model));
    for (int i = 0; i < 2; i++) {
        if (!tokenizer_absent(root, absent[i]))
            return errorf("\"%s\" is set; it would change the text, so it must be null", absent[i]);
        if (!tokenizer_absent(model, affixes[i]) && !json_is(json_get(model, affixes[i]), ""))
            return errorf("\"%s\" of the model is set; it must be null or empty", affixes[i]);
    }
    part = json_get(model, "dropout");
    if (part && part->type != JSON_NULL && (part->type != JSON_NUMBER || part->number != 0))
        return "\"dropout\" of the model is set; encoding would be random, so it must be null or 0";
    part = json_get(model, "byte_fallback");
    if (part && part->type != JSON_NULL && (part->type != JSON_BOOL || part->boolean))
        return "\"byte_fallback\" of the model is not false; only byte-level BPE is known, which needs none";
    part = json_get(model, "ignore_merges");
    if (part && part->type != JSON_NULL && part->type != JSON_BOOL)
        return errorf("\"ignore_merges\": expected true or false, found %s", json_type_name(part));
    tok->ignore_merges = part && part->type == JSON_BOOL && part->boolean;
    part = json_get(root, "normalizer");
    const JsonNode *inside = json_get(part, "normalizers");
    if (!tokenizer_absent(root, "normalizer") && !(json_is(json_get(part, "type"), "Sequence") && inside &&
                                                   inside->type == JSON_ARRAY && inside->count == 0))
        return errorf("the normalizer %.80s is not known; it must be null, so that decoding gives the text back",
                      tokenizer_type(part));
    part = json_get(root, "post_processor");
    if (!tokenizer_absent(root, "post_processor") && !json_is(json_get(part, "type"), "ByteLevel"))
        return errorf("the post-processor %.80s is not known; it adds tokens to each text, so set it to null if they "
                      "are not wanted", tokenizer_type(part));
    if (!json_is(json_get(json_get(root, "decoder"), "type"), "ByteLevel"))
        return errorf("the decoder is %.80s; expected ByteLevel", tokenizer_type(json_get(root, "decoder")));
    return tokenizer_read_pre_tokenizer(tok, json_get(root, "pre_tokenizer"));
}

/* Stores the bytes of a new token: those that its letters spell, or if a character is no such letter its spelling as
 * it stands. The package decodes so. */
static inline const char *tokenizer_add_token(Tokenizer *tok, const JsonNode *id, const char *spelling, size_t length,
                                              uint32_t *used, int32_t *out) {
    if (id->type != JSON_NUMBER || !id->is_integer || id->integer < 0 || id->integer >= tok->size)
        return errorf("the id of \"%.80s\" is not a whole number from 0 to %d, though the file has %d tokens",
                      spelling, (int)tok->size - 1, (int)tok->size);
    TokenizerToken *token = &tok->tokens[id->integer];
    if (token->exists)
        return errorf("the id %d of \"%.80s\" belongs to another token as well", (int)id->integer, spelling);
    int64_t n = tokenizer_spelled(tok, spelling, length, tok->bytes + *used);
    token->exists = true;
    token->spelled = n > 0;
    token->start = *used;
    token->length = n >= 0 ? (uint32_t)n : (uint32_t)length;
    if (n < 0) memcpy(tok->bytes + *used, spelling, length);
    *used += token->length;
    *out = (int32_t)id->integer;
    return NULL;
}

/* Reads "vocab", whose keys the JSON reader knows to differ. */
static inline const char *tokenizer_read_vocab(Tokenizer *tok, const JsonNode *vocab, uint32_t *used) {
    size_t slots = tokenizer_slots(vocab->count);
    tok->words = malloc(slots * sizeof *tok->words);
    if (!tok->words) return "no memory for the vocabulary";
    tok->words_mask = slots - 1;
    for (size_t i = 0; i < slots; i++) tok->words[i] = TOKENIZER_NO_ID;
    for (const JsonNode *entry = json_first(vocab); entry; entry = json_next(vocab, entry)) {
        int32_t id = TOKENIZER_NO_ID;
        const char *error = tokenizer_add_token(tok, entry, entry->key, entry->key_length, used, &id);
        if (error) return error;
        const TokenizerToken *token = &tok->tokens[id];
        if (!token->spelled) continue;
        *tokenizer_word(tok, tok->bytes + token->start, token->length) = id;
        if (token->length == 1) tok->byte_id[tok->bytes[token->start]] = id;
    }
    for (int byte = 0; byte < 256; byte++)
        if (tok->byte_id[byte] == TOKENIZER_NO_ID)
            return errorf("the vocabulary has no token for the byte 0x%02X; a byte-level vocabulary has all 256 (train "
                          "with initial_alphabet=ByteLevel.alphabet())", byte);
    return NULL;
}

/* The two tokens of a merge, spelled "a b" or ["a", "b"]. False: it is neither. */
static inline bool tokenizer_merge_parts(const JsonNode *node, const char *part[2], size_t length[2]) {
    if (node->type == JSON_STRING) {
        const char *space = memchr(node->string, ' ', node->length);
        if (!space) return false;
        part[0] = node->string;
        part[1] = space + 1;
        length[0] = (size_t)(space - node->string);
        length[1] = node->length - length[0] - 1;
        return true;
    }
    if (node->type != JSON_ARRAY || node->count != 2) return false;
    const JsonNode *child = json_first(node);
    for (int i = 0; i < 2; i++, child = json_next(node, child)) {
        if (child->type != JSON_STRING) return false;
        part[i] = child->string;
        length[i] = child->length;
    }
    return true;
}

/* Reads "merges". Of a pair that the list has twice the later place counts, as in the package. */
static inline const char *tokenizer_read_merges(Tokenizer *tok, const JsonNode *list, uint8_t *scratch) {
    size_t slots = tokenizer_slots(list->count);
    uint32_t rank = 0;
    tok->merges = malloc(slots * sizeof *tok->merges);
    if (!tok->merges) return "no memory for the merges";
    tok->merges_mask = slots - 1;
    for (size_t i = 0; i < slots; i++) tok->merges[i] = (TokenizerMerge){.id = TOKENIZER_NO_ID};
    for (const JsonNode *node = json_first(list); node; node = json_next(list, node), rank++) {
        const char *part[2];
        size_t length[2];
        int32_t ids[3];
        int64_t n[2];
        uint8_t *at = scratch;                               /* a, then b: together the bytes of ab */
        if (!tokenizer_merge_parts(node, part, length))
            return errorf("merge %lu is not of the form \"a b\" or [\"a\", \"b\"]", (unsigned long)rank);
        for (int i = 0; i < 2; i++) {
            n[i] = tokenizer_spelled(tok, part[i], length[i], at);
            ids[i] = n[i] > 0 ? *tokenizer_word(tok, at, (size_t)n[i]) : TOKENIZER_NO_ID;
            if (ids[i] == TOKENIZER_NO_ID)
                return errorf("merge %lu: \"%.*s\" is not in the vocabulary, or not spelled in letters for bytes",
                              (unsigned long)rank, length[i] < 80 ? (int)length[i] : 80, part[i]);
            at += n[i];
        }
        ids[2] = *tokenizer_word(tok, scratch, (size_t)(n[0] + n[1]));
        if (ids[2] == TOKENIZER_NO_ID)
            return errorf("merge %lu: what \"%.*s\" and \"%.80s\" become is not in the vocabulary",
                          (unsigned long)rank, length[0] < 80 ? (int)length[0] : 80, part[0], part[1]);
        *tokenizer_merge(tok, ids[0], ids[1]) =
            (TokenizerMerge){.key = (uint64_t)ids[0] << 32 | (uint32_t)ids[1], .rank = rank, .id = ids[2]};
    }
    return NULL;
}

/* Reads one entry of "added_tokens". One that the vocabulary has must have the same id there; any other one must have
 * the id *next, since the package numbers these itself, in the order of the file and after the vocabulary. */
static inline const char *tokenizer_read_added(Tokenizer *tok, const JsonNode *entry, const JsonNode *in_vocab,
                                               int32_t *next, uint32_t *used) {
    const JsonNode *content = json_get(entry, "content"), *id = json_get(entry, "id");
    TokenizerAdded *a = &tok->added[tok->added_count];
    char what[128];
    if (!content || content->type != JSON_STRING || content->length == 0)
        return errorf("added token %d: \"content\": expected a text that is not empty, found %s", tok->added_count,
                      json_type_name(content));
    if (!id) return errorf("the added token \"%.80s\" has no id", content->string);
    *a = (TokenizerAdded){.length = content->length};
    snprintf(what, sizeof what, "the added token \"%.80s\"", content->string);
    const struct { const char *key; bool *out; } flags[] = {
        {"single_word", &a->single_word}, {"lstrip", &a->lstrip}, {"rstrip", &a->rstrip},
        {"normalized", &a->normalized}, {"special", &a->special}};
    for (size_t i = 0; i < sizeof flags / sizeof *flags; i++) {
        const char *error = tokenizer_bool(entry, what, flags[i].key, flags[i].out);
        if (error) return error;
    }
    for (int i = 0; i < tok->added_count; i++)
        if (tok->added[i].length == a->length && memcmp(tok->added[i].content, content->string, a->length) == 0)
            return errorf("%s is there twice", what);
    if (in_vocab) {
        if (id->type != JSON_NUMBER || !id->is_integer || id->integer != in_vocab->integer)
            return errorf("%s has another id than in the vocabulary, where it is %d", what, (int)in_vocab->integer);
        a->id = (int32_t)in_vocab->integer;
    } else {
        const char *error = tokenizer_add_token(tok, id, content->string, content->length, used, &a->id);
        if (error) return error;
        if (a->id != *next)
            return errorf("%s has the id %d; expected %d: tokens that the vocabulary lacks follow it without a gap",
                          what, (int)a->id, (int)*next);
        ++*next;
    }
    tok->tokens[a->id].special = a->special;
    a->content = malloc(a->length + 1);
    if (!a->content) return "no memory for the added tokens";
    memcpy(a->content, content->string, a->length + 1);
    tok->added_starts[a->normalized][(uint8_t)a->content[0]] = true;
    if (a->length > tok->added_longest) tok->added_longest = a->length;
    tok->added_count++;
    return NULL;
}

/* Sets found[i] to the vocabulary's entry that is spelled like the i-th of `count` added tokens; those that it lacks
 * stay as they are. All are looked for at once, since a vocabulary is long. */
static inline void tokenizer_find_added(const JsonNode *vocab, const JsonNode *const *content, int count,
                                        const JsonNode **found) {
    for (const JsonNode *entry = json_first(vocab); entry; entry = json_next(vocab, entry))
        for (int i = 0; i < count; i++)
            if (content[i] && content[i]->type == JSON_STRING && content[i]->length == entry->key_length &&
                memcmp(content[i]->string, entry->key, entry->key_length) == 0) found[i] = entry;
}

/* Reads the three lists. Ids must be 0, 1, 2 ... without a gap: the package itself numbers added tokens anew if there
 * is one, and a model has a row for each. */
static inline const char *tokenizer_read_lists(Tokenizer *tok, const JsonNode *root) {
    enum { ADDED_MAX = 4096 };
    const JsonNode *model = json_get(root, "model"), *vocab = json_get(model, "vocab");
    const JsonNode *merges = json_get(model, "merges"), *added = json_get(root, "added_tokens");
    const JsonNode *found[ADDED_MAX] = {NULL}, *content[ADDED_MAX];
    const char *error = NULL;
    if (!vocab || vocab->type != JSON_OBJECT)
        return errorf("\"vocab\" of the model: expected an object, found %s", json_type_name(vocab));
    if (!merges || merges->type != JSON_ARRAY)
        return errorf("\"merges\" of the model: expected an array, found %s", json_type_name(merges));
    if (added && added->type != JSON_ARRAY && added->type != JSON_NULL)
        return errorf("\"added_tokens\": expected an array, found %s", json_type_name(added));
    if (vocab->count > TOKENIZER_MAX_SIZE || (added && added->count > ADDED_MAX))
        return errorf("more than %d tokens or %d added tokens", TOKENIZER_MAX_SIZE, ADDED_MAX);
    int count = 0, extra = 0;
    size_t room = 0, longest = 0;
    for (const JsonNode *entry = json_first(added); entry; entry = json_next(added, entry))
        content[count++] = json_get(entry, "content");
    tokenizer_find_added(vocab, content, count, found);
    for (const JsonNode *entry = json_first(vocab); entry; entry = json_next(vocab, entry)) room += entry->key_length;
    for (int i = 0; i < count; i++) {
        if (found[i]) continue;
        extra++;
        room += content[i] ? content[i]->length : 0;
    }
    /* A string of the merges may be longer than any token, if the file is wrong. */
    for (const JsonNode *node = json_first(merges); node; node = json_next(merges, node)) {
        size_t length = node->length;
        for (const JsonNode *part = json_first(node); part; part = json_next(node, part)) length += part->length;
        if (length > longest) longest = length;
    }
    tok->size = (int32_t)vocab->count + extra;
    tok->tokens = calloc((size_t)tok->size + 1, sizeof *tok->tokens);
    tok->bytes = malloc(room + 1);
    tok->added = calloc((size_t)count + 1, sizeof *tok->added);
    uint8_t *scratch = malloc(longest + 1);
    if (!tok->tokens || !tok->bytes || !tok->added || !scratch) error = "no memory for the vocabulary";
    uint32_t used = 0;
    if (!error) error = tokenizer_read_vocab(tok, vocab, &used);
    if (!error) error = tokenizer_read_merges(tok, merges, scratch);
    free(scratch);
    int32_t next = (int32_t)vocab->count;
    int i = 0;
    for (const JsonNode *entry = json_first(added); !error && entry; entry = json_next(added, entry))
        error = tokenizer_read_added(tok, entry, found[i++], &next, &used);
    return error;
}

/* Finds the tokens that the merges arrive at when they start from the token's own bytes. */
static inline const char *tokenizer_find_whole(Tokenizer *tok) {
    TokenizerWord w;
    bool ok = true;
    w.room = 0;
    w.large = NULL;
    for (int32_t id = 0; ok && id < tok->size; id++) {
        TokenizerToken *token = &tok->tokens[id];
        /* An added token outside of the vocabulary may be spelled like one of it. */
        if (!token->spelled || *tokenizer_word(tok, tok->bytes + token->start, token->length) != id) continue;
        token->whole = tok->ignore_merges;
        if (token->whole) continue;
        ok = tokenizer_merge_word(tok, &w, tok->bytes + token->start, token->length);
        token->whole = ok && w.after[0] >= token->length;
    }
    free(w.large);
    return ok ? NULL : "no memory for a token of the vocabulary";
}

/* Reads a tokenizer.json from memory; `path` names it in messages. tokenizer_free() gives the memory back, and `text` is
 * not needed afterwards. Error: what was expected and what was found; nothing is left to free then. */
static inline const char *tokenizer_parse(const char *path, const char *text, size_t length, Tokenizer *tok) {
    Json json;
    memset(tok, 0, sizeof *tok);
    const char *error = json_parse(&json, text, length);
    if (error) return errorf("%s: %s", path, error);
    tokenizer_init_letters(tok);
    error = tokenizer_read_kind(tok, json.root);
    if (!error) error = tokenizer_read_lists(tok, json.root);
    if (!error) error = tokenizer_find_whole(tok);
    if (error) error = errorf("%s: %s", path, error);        /* while the texts that it quotes still exist */
    json_free(&json);
    if (error) tokenizer_free(tok);
    return error;
}

/* The same from a file. */
static inline const char *tokenizer_load(const char *path, Tokenizer *tok) {
    char *text;
    size_t length;
    memset(tok, 0, sizeof *tok);
    const char *error = json_read_text(path, &text, &length);
    if (error) return error;
    error = tokenizer_parse(path, text, length, tok);
    free(text);
    return error;
}

/* A number that tells one tokenizer from another: over everything that encoding and decoding depend on. The same
 * tokenizer written again, with other spaces or in another order of keys, has the same number. */
static inline uint64_t tokenizer_hash(const Tokenizer *tok) {
    const uint64_t prime = 0x100000001b3u;
    uint64_t hash = 0xcbf29ce484222325u, merges = 0;         /* FNV-1a; merges stand in no order, so they are added */
    uint8_t kind[] = {(uint8_t)tok->pattern, tok->pattern == TOKENIZER_CL100K ? (uint8_t)tok->digits : 0,
                      tok->add_prefix_space, tok->ignore_merges};
    for (size_t i = 0; i < sizeof kind; i++) hash = (hash ^ kind[i]) * prime;
    for (int32_t id = 0; id < tok->size; id++) {
        const TokenizerToken *token = &tok->tokens[id];
        hash = (hash ^ token->length ^ (uint64_t)token->spelled << 32 ^ (uint64_t)token->special << 33) * prime;
        for (uint32_t i = 0; i < token->length; i++) hash = (hash ^ tok->bytes[token->start + i]) * prime;
    }
    for (int i = 0; i < tok->added_count; i++) {
        const TokenizerAdded *a = &tok->added[i];
        hash = (hash ^ (uint32_t)a->id) * prime;
        hash = (hash ^ (uint64_t)(a->single_word | a->lstrip << 1 | a->rstrip << 2 | a->normalized << 3)) * prime;
    }
    for (size_t i = 0; i <= tok->merges_mask; i++) {
        const TokenizerMerge *merge = &tok->merges[i];
        if (merge->id != TOKENIZER_NO_ID) merges += tokenizer_mix(merge->key ^ tokenizer_mix(merge->rank + 1));
    }
    return tokenizer_mix(hash ^ merges);
}

#endif
