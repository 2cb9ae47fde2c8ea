/* test_vocabulary.c - what a model's tokens mean: bytes or a tokenizer's, the tokenizer that lies beside a checkpoint
 * and is the right one, and text that comes token by token.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include "../lib/vocabulary.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model.h"
#include "test.h"

static char root[] = "/tmp/test_vocabulary.XXXXXX";
static char *json_text;                      /* tests/tokenizer/tokenizer.json, 2,048 tokens */
static const MegalodonBackend *const backend = &megalodon_cpu;

static const char *path_of(const char *name) {
    static char paths[8][256];
    static int next;
    char *path = paths[next++ % 8];
    snprintf(path, sizeof paths[0], "%s/%s", root, name);
    return path;
}

static void write_text(const char *name, const char *text) {
    must(checkpoint_write_text(path_of(name), text));
}

/* `text` with the first `from` replaced; free() it. */
static char *replaced(const char *text, const char *from, const char *to) {
    const char *at = strstr(text, from);
    if (!check(at != NULL, "the test's own tokenizer has no \"%s\"", from)) exit(test_end());
    size_t before = (size_t)(at - text);
    char *out = must_allocate(strlen(text) + strlen(to) + 1);
    memcpy(out, text, before);
    strcpy(out + before, to);
    strcat(out, at + strlen(from));
    return out;
}

/* The hash of a tokenizer.json with a replacement in it. */
static void hash_of(const char *from, const char *to, char hash[CHECKPOINT_HASH]) {
    Vocabulary v;
    char *text = replaced(json_text, from, to);
    write_text("changed.json", text);
    const char *error = vocabulary_load(&v, path_of("changed.json"));
    if (check(!error, "with %s: %s", to, error)) memcpy(hash, v.hash, CHECKPOINT_HASH);
    vocabulary_close(&v);
    free(text);
}

/* The hash is one of what a tokenizer does, not of how its file is written. */
static void test_hash(void) {
    char own[CHECKPOINT_HASH], other[CHECKPOINT_HASH];
    hash_of("1.0", "1.0", own);
    static const char *const same[][2] = {{"{\"version\"", "{ \n \"version\""}, {"\"dropout\":null,", ""}};
    for (size_t i = 0; i < sizeof same / sizeof *same; i++) {
        hash_of(same[i][0], same[i][1], other);
        check(strcmp(own, other) == 0, "%s: written otherwise, but the hash differs", same[i][1]);
    }
    static const char *const changes[][2] = {
        {"\"special\":true", "\"special\":false"}, {"\"lstrip\":false", "\"lstrip\":true"},
        {"\"add_prefix_space\":false", "\"add_prefix_space\":true"},
        {"\"ignore_merges\":false", "\"ignore_merges\":true"}};
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        hash_of(changes[i][0], changes[i][1], other);
        check(strcmp(own, other) != 0, "%s: the hash does not notice", changes[i][1]);
    }
    /* Two merges that change places: the same tokens, but other texts may be cut otherwise. */
    char *first = strstr(json_text, "\"merges\":[");
    if (!check(first != NULL, "no merges")) return;
    first += strlen("\"merges\":[");
    char *second = strstr(first, "],[") ? strstr(first, "],[") + 2 : NULL;
    char *end = second && strstr(second, "],[") ? strstr(second, "],[") + 1 : NULL;
    if (!check(end && *first == '[', "merges are not written as pairs")) return;
    char from[256], to[256];
    snprintf(from, sizeof from, "%.*s", (int)(end - first), first);
    snprintf(to, sizeof to, "%.*s,%.*s", (int)(end - second), second, (int)(second - 1 - first), first);
    hash_of(from, to, other);
    check(strcmp(own, other) != 0, "%s to %s: the hash does not notice", from, to);
}

/* A checkpoint with or without a tokenizer beside it, and every way in which the two do not fit. */
static void test_checkpoints(void) {
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 1, .max_length = 4};
    config.vocab_size = 2050;                                /* two more than the tokenizer has */
    MegalodonModel *model = model_create(backend, &config, &options, 1);
    Vocabulary v, given;
    must(vocabulary_load(&given, "tests/tokenizer/tokenizer.json"));
    check(given.size == 2048, "%d tokens", given.size);

    const char *file = path_of("model.safetensors");
    must(checkpoint_save(file, backend, model, &config));
    const char *error = vocabulary_of_checkpoint(&v, file, NULL, &config);
    check(error && strstr(error, "has 2050 tokens and there is no tokenizer.json"), "no tokenizer: %s", error);
    error = vocabulary_of_checkpoint(&v, file, "tests/tokenizer/tokenizer.json", &config);
    check(!error && v.size == 2050 && !v.bytes, "a tokenizer that is named: %s", error);
    vocabulary_close(&v);
    write_text("tokenizer.json", json_text);
    error = vocabulary_of_checkpoint(&v, root, NULL, &config);
    check(!error && v.size == 2050 && strcmp(v.hash, given.hash) == 0, "a tokenizer beside the model: %s", error);
    /* The two tokens that mean nothing cannot be drawn. */
    float logits[2050];
    for (int i = 0; i < 2050; i++) logits[i] = i >= 2048 ? 100 : 1;
    vocabulary_forbid(&v, logits);
    int wrong = 0;
    for (int i = 0; i < 2050; i++) wrong += logits[i] != (i < 2048 ? 1 : -HUGE_VALF);
    check(wrong == 0, "%d of 2050 logits are wrong", wrong);
    vocabulary_close(&v);

    /* The model says which tokenizer it was trained with. */
    must(checkpoint_save_at(file, backend, model, &config, NULL, given.hash));
    error = vocabulary_of_checkpoint(&v, file, NULL, &config);
    check(!error, "the right tokenizer: %s", error);
    vocabulary_close(&v);
    must(checkpoint_save_at(file, backend, model, &config, NULL, "00000000deadbeef"));
    error = vocabulary_of_checkpoint(&v, file, NULL, &config);
    check(error && strstr(error, "is not the tokenizer that the model in"), "another tokenizer: %s", error);
    error = vocabulary_of_checkpoint(&v, file, "tests/tokenizer/tokenizer.json", &config);
    check(error && strstr(error, "is not the tokenizer"), "another tokenizer that is named: %s", error);
    unlink(path_of("tokenizer.json"));
    error = vocabulary_of_checkpoint(&v, file, NULL, &config);
    check(error && strstr(error, "was trained with a tokenizer, but there is no"), "a lost tokenizer: %s", error);
    write_text("tokenizer.json", "{}");
    error = vocabulary_of_checkpoint(&v, file, NULL, &config);
    check(error && strstr(error, "tokenizer.json"), "a tokenizer without anything: %s", error);
    unlink(path_of("tokenizer.json"));

    /* Fewer tokens than the tokenizer; bytes. */
    error = vocabulary_fit(&given, 2047);
    check(error && strstr(error, "2048 tokens, but the model knows only 2047"), "too few tokens: %s", error);
    config.vocab_size = 256;
    MegalodonModel *bytes = model_create(backend, &config, &options, 1);
    must(checkpoint_save(file, backend, bytes, &config));
    error = vocabulary_of_checkpoint(&v, file, NULL, &config);
    check(!error && v.bytes && v.size == 256 && !v.json, "a model of bytes: %s", error);
    vocabulary_close(&v);
    vocabulary_close(&given);
    backend->destroy(model);
    backend->destroy(bytes);
}

/* Does text[0, n) end inside a character? Told from the last bytes by the rules of UTF-8: what is there must be the
 * beginning of a character, and would be one with more bytes behind it. */
static bool ends_inside(const char *text, size_t n) {
    static const unsigned char more[] = {0x80, 0x90, 0xa0, 0xbf};
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        unsigned char s[8];
        memcpy(s, text + n - back, back);
        if (json_utf8(s, back) > 0) return false;
        for (size_t length = back + 1; length <= 4; length++)
            for (int first = 0; first < 4; first++) {
                memset(s + back, 0x80, 8 - back);
                s[back] = more[first];
                if (json_utf8(s, length) == (int)length) return true;
            }
    }
    return false;
}

/* Text to tokens and back: a text that is cut anywhere by vocabulary_cut gives the tokens of the whole; what is written
 * token by token never ends inside a character; the bytes of the tokens are those of the text. */
static void test_text(bool bytes) {
    char *hard, *out = NULL;
    size_t n, count, size = 0;
    int32_t *ids, *part;
    Vocabulary v = {0};
    must(json_read_text("tests/tokenizer/hard.txt", &hard, &n));
    if (!bytes) must(vocabulary_load(&v, "tests/tokenizer/tokenizer.json"));
    must(vocabulary_fit(&v, bytes ? 256 : 2048));
    must(vocabulary_encode(&v, hard, n, &ids, &count));
    if (bytes) check(count == n, "%zu bytes are %zu tokens", n, count);
    size_t at = 0, read = 0, seen = 0, step = 1, wrong = 0;
    for (; read < n; step = step * 7 % 1009) {               /* pieces of many sizes */
        read = n - read < step ? n : read + step;
        size_t whole = read == n ? n - at : vocabulary_cut(&v, hard + at, read - at), parts = 0;
        must(vocabulary_encode(&v, hard + at, whole, &part, &parts));
        wrong += seen + parts > count || memcmp(part, ids + seen, parts * sizeof *ids) != 0;
        seen += parts;
        at += whole;
        free(part);
    }
    check(wrong == 0 && seen == count, "cut into pieces: %zu wrong, %zu tokens instead of %zu", wrong, seen, count);

    TextWriter writer = {.file = open_memstream(&out, &size)};
    size_t halves = 0, told = 0;
    for (size_t i = 0; i < count; i++) {
        vocabulary_put(&v, &writer, ids[i]);
        told += (size_t)vocabulary_token_bytes(&v, ids[i]);
        if (!bytes && tokenizer_is_special(&v.tok, ids[i])) told += strlen("<|endoftext|>");
        fflush(writer.file);
        halves += ends_inside(out, size);
    }
    text_end(&writer);
    fclose(writer.file);
    check(halves == 0, "half a character was written %zu times", halves);
    check(size == n && memcmp(out, hard, n) == 0, "the text that comes back is another one");
    check(told == n, "the tokens stand for %zu bytes, the text has %zu", told, n);
    if (!bytes) {
        int32_t end = tokenizer_id(&v.tok, "<|endoftext|>");
        check(vocabulary_token_bytes(&v, end) == 0, "a special token is no text");
        check(vocabulary_token_bytes(&v, 5000) == 0, "a token that does not exist is no text");
    }
    free(out);
    free(ids);
    free(hard);
    vocabulary_close(&v);
}

/* A small vocabulary of bytes. */
static void test_small(void) {
    Vocabulary v = {0};
    int32_t *ids;
    size_t count;
    must(vocabulary_fit(&v, 100));
    must(vocabulary_encode(&v, "Ac", 2, &ids, &count));
    check(count == 2 && ids[0] == 'A' && ids[1] == 'c', "two letters");
    free(ids);
    const char *error = vocabulary_encode(&v, "Acd", 3, &ids, &count);
    check(error && strstr(error, "byte 2 of the text is 100, but the model knows only 0 to 99"), "%s", error);
    check(ids == NULL, "a text that cannot be encoded leaves memory");
}

int main(void) {
    size_t length;
    test_begin("vocabulary");
    if (!check(mkdtemp(root) != NULL, "no folder for the test")) return test_end();
    must(json_read_text("tests/tokenizer/tokenizer.json", &json_text, &length));
    test_hash();
    test_checkpoints();
    check(ends_inside("a\xe6\x97", 3) && ends_inside("\xf0", 1) && !ends_inside("\xe6\x97\xa5", 3) &&
          !ends_inside("a", 1) && !ends_inside("\xff", 1) && !ends_inside("a\x80", 2), "the test's own rule");
    test_text(true);
    test_text(false);
    test_small();
    free(json_text);
    char command[64];
    snprintf(command, sizeof command, "rm -rf %s", root);
    check(system(command) == 0, "cleaning up");
    return test_end();
}
