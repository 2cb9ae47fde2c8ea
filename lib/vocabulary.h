/* vocabulary.h - what the numbers that a model reads and writes mean: bytes, or the tokens of a tokenizer.
 *
 * A model of up to 256 tokens without a tokenizer is one of bytes. Any other model comes with its tokenizer: train
 * stores a copy beside each checkpoint, as tokenizer.json, and the model's file says which one it was by a hash. So a
 * checkpoint is all that one needs to turn its tokens into text:
 *
 *     die_if(vocabulary_of_checkpoint(&vocabulary, "runs/mine", NULL, &config));
 *     die_if(vocabulary_encode(&vocabulary, text, n, &ids, &count));
 *     vocabulary_put(&vocabulary, &writer, ids[0]);
 *     vocabulary_close(&vocabulary);
 */
#ifndef LIB_VOCABULARY_H
#define LIB_VOCABULARY_H

#include "checkpoint.h"              /* first: it asks for POSIX */

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../megalodon.h"
#include "error.h"
#include "text.h"
#include "tokenizer.h"

typedef struct Vocabulary {
    int size;                        /* V: ids that the model knows are [0, size)                      */
    bool bytes;                      /* each byte is a token; there is no tokenizer                    */
    Tokenizer tok;                   /* unless bytes                                                   */
    char *json;                      /* tokenizer.json, word for word; NULL: there is none             */
    char hash[CHECKPOINT_HASH];      /* tokenizer_hash as text                                         */
} Vocabulary;

static inline void vocabulary_close(Vocabulary *v) {
    if (v->json) tokenizer_free(&v->tok);
    free(v->json);
    *v = (Vocabulary){0};
}

/* ------------------------------------------------------------------------------------------------------------------
 * Opening.
 */

/* Reads a tokenizer.json; the model's size is still to be set by vocabulary_fit. */
static inline const char *vocabulary_load(Vocabulary *v, const char *path) {
    size_t length;
    *v = (Vocabulary){0};
    const char *error = json_read_text(path, &v->json, &length);
    if (error) return error;
    error = tokenizer_parse(path, v->json, length, &v->tok);
    if (error) {
        free(v->json);
        *v = (Vocabulary){0};
        return error;
    }
    v->size = tokenizer_vocab_size(&v->tok);
    snprintf(v->hash, sizeof v->hash, "%016" PRIx64, tokenizer_hash(&v->tok));
    return NULL;
}

/* Sets the number of tokens of the model, V. Without a tokenizer each byte is a token, as far as V goes. Error: the
 * tokenizer has tokens that the model does not know. A model may have more than its tokenizer; they are never drawn. */
static inline const char *vocabulary_fit(Vocabulary *v, int V) {
    v->bytes = v->json == NULL;
    v->size = V;
    if (v->bytes || tokenizer_vocab_size(&v->tok) <= V) return NULL;
    return errorf("the tokenizer has %d tokens, but the model knows only %d; give --vocab-size %d to a new model, or "
                  "the tokenizer that this model was made for", tokenizer_vocab_size(&v->tok), V,
                  tokenizer_vocab_size(&v->tok));
}

/* The tokenizer of a checkpoint: the file `given` if that is not NULL, else tokenizer.json beside the model, else none.
 * Error: there is none and the model was trained with one, it is another one than the model was trained with, or what
 * is wrong with the file. */
static inline const char *vocabulary_find(Vocabulary *v, const char *checkpoint, const char *given) {
    char beside[SAFETENSORS_MAX_PATH], hash[CHECKPOINT_HASH];
    bool there = false;
    *v = (Vocabulary){0};
    const char *error = checkpoint_tokenizer(checkpoint, beside, &there, hash);
    if (!error && (given || there)) error = vocabulary_load(v, given ? given : beside);
    if (error) return error;
    if (!v->json && *hash)
        return errorf("%s: this model was trained with a tokenizer, but there is no %s; put the tokenizer.json there, "
                      "or name it by --tokenizer", checkpoint, beside);
    if (v->json && *hash && strcmp(hash, v->hash) != 0) {
        error = errorf("%s: is not the tokenizer that the model in %s was trained with (its hash is %s, that of the "
                       "model's %s); the model's numbers would mean other words", given ? given : beside, checkpoint,
                       v->hash, hash);
        vocabulary_close(v);
    }
    return error;
}

/* Finds the tokenizer of a checkpoint and fits it to the model. Error: as above; or the model has more tokens than there
 * are bytes and no tokenizer. */
static inline const char *vocabulary_of_checkpoint(Vocabulary *v, const char *checkpoint, const char *given,
                                                   const MegalodonConfig *config) {
    const char *error = vocabulary_find(v, checkpoint, given);
    if (!error) error = vocabulary_fit(v, config->vocab_size);
    if (error) return error;
    if (v->bytes && v->size > 256)
        return errorf("%s: this model has %d tokens and there is no tokenizer.json beside it that tells what they "
                      "mean; name one by --tokenizer", checkpoint, v->size);
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Text to tokens and back.
 */

/* The tokens of text[0, n), in memory that the caller frees. Error: a byte that a model of bytes does not know (which
 * and where), or no memory. */
static inline const char *vocabulary_encode(const Vocabulary *v, const void *text, size_t n, int32_t **ids,
                                            size_t *count) {
    size_t room = v->bytes ? n + 1 : tokenizer_capacity(n);
    *ids = room <= SIZE_MAX / sizeof **ids ? malloc(room * sizeof **ids) : NULL;
    if (!*ids) return errorf("no memory for the %zu tokens of a text", room);
    const char *error = NULL;
    if (!v->bytes) error = tokenizer_encode(&v->tok, text, n, *ids, room, count);
    for (size_t i = 0; v->bytes && i < n; i++) {
        int byte = ((const uint8_t *)text)[i];
        (*ids)[i] = byte;
        if (byte >= v->size && !error)
            error = errorf("byte %zu of the text is %d, but the model knows only 0 to %d", i, byte, v->size - 1);
    }
    if (v->bytes) *count = n;
    if (error) {
        free(*ids);
        *ids = NULL;
    }
    return error;
}

/* The largest p in (0, n] such that text[0, p) can be encoded without knowing what follows; 0: more text is needed. */
static inline size_t vocabulary_cut(const Vocabulary *v, const void *text, size_t n) {
    return v->bytes ? n : tokenizer_cut(&v->tok, text, n);
}

/* Writes what a token stands for, as soon as its characters are whole. */
static inline void vocabulary_put(const Vocabulary *v, TextWriter *writer, int32_t token) {
    const uint8_t *bytes;
    size_t n;
    if (v->bytes) text_put(writer, (uint8_t)token);
    else if (!tokenizer_decode_token(&v->tok, token, &bytes, &n))
        for (size_t i = 0; i < n; i++) text_put(writer, bytes[i]);
}

/* The number of tokens that stand for something: those of the tokenizer, which may be fewer than the model's. */
static inline int vocabulary_known(const Vocabulary *v) {
    return v->bytes ? v->size : tokenizer_vocab_size(&v->tok);
}

/* Makes it impossible to draw a token that stands for nothing. logits: size. */
static inline void vocabulary_forbid(const Vocabulary *v, float *logits) {
    for (int token = vocabulary_known(v); token < v->size; token++) logits[token] = -HUGE_VALF;
}

/* Bytes of text that a token stands for. The special ones, such as <|endoftext|>, are none of the text: 0. */
static inline int64_t vocabulary_token_bytes(const Vocabulary *v, int32_t token) {
    const uint8_t *bytes;
    size_t n = 1;
    if (v->bytes) return 1;
    if (tokenizer_is_special(&v->tok, token) || tokenizer_decode_token(&v->tok, token, &bytes, &n)) return 0;
    return (int64_t)n;
}

#endif
