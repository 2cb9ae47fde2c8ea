/* text.h - text that a model makes byte by byte, as a reader sees it.
 *
 * A model of bytes makes "é" in two steps and a stop text in many. The writer holds bytes back until they are whole
 * characters and certainly not the beginning of the stop text.
 */
#ifndef LIB_TEXT_H
#define LIB_TEXT_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "../megalodon.h"

enum { TEXT_STOP_MAX = 256 };        /* bytes of a stop text */

typedef struct TextWriter {
    FILE *file;
    const char *stop;                /* text that ends the writing and is not written; NULL: none     */
    bool printable;                  /* write control characters as '?', for the sake of a terminal   */
    bool stopped;                    /* the stop text came                                            */
    size_t held;
    uint8_t bytes[TEXT_STOP_MAX + 8];
} TextWriter;

/* Length of the longest start of bytes[0, n) that does not end inside a UTF-8 character. Bytes that can never become a
 * character count as whole: they are passed on as they are. */
static inline size_t text_whole(const uint8_t *bytes, size_t n) {
    for (size_t back = 1; back <= 3 && back <= n; back++) {
        uint8_t byte = bytes[n - back];
        if ((byte & 0xc0) == 0x80) continue;                 /* a continuation: its first byte stands before it */
        size_t length = byte >= 0xf0 && byte < 0xf8 ? 4 : byte >= 0xe0 && byte < 0xf0 ? 3 :
                        byte >= 0xc2 && byte < 0xe0 ? 2 : 1;
        return back < length ? n - back : n;
    }
    return n;
}

static inline void text_write(TextWriter *writer, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint8_t byte = writer->bytes[i];
        bool control = (byte < 32 && byte != '\n' && byte != '\t') || byte == 127;
        fputc(writer->printable && control ? '?' : byte, writer->file);
    }
    writer->held -= n;
    memmove(writer->bytes, writer->bytes + n, writer->held);
}

/* Takes one byte and writes what has become certain. Does nothing after the stop text. */
static inline void text_put(TextWriter *writer, uint8_t byte) {
    size_t stop = writer->stop ? strlen(writer->stop) : 0, keep = 0;
    if (writer->stopped) return;
    writer->bytes[writer->held++] = byte;
    if (stop > 0 && writer->held >= stop && memcmp(writer->bytes + writer->held - stop, writer->stop, stop) == 0) {
        writer->held -= stop;
        writer->stopped = true;
        return;
    }
    for (size_t n = 1; n < stop && n <= writer->held; n++)
        if (memcmp(writer->bytes + writer->held - n, writer->stop, n) == 0) keep = n;
    text_write(writer, text_whole(writer->bytes, writer->held - keep));
}

/* Writes what was held back for the stop text. A character whose last bytes never came is left out. */
static inline void text_end(TextWriter *writer) {
    text_write(writer, text_whole(writer->bytes, writer->held));
    writer->held = 0;
}

/* Runs n tokens of one row through a model, from its state or from an empty one. */
static inline const char *text_feed(const MegalodonBackend *backend, MegalodonModel *model, const int32_t *tokens,
                                    int n, bool carry) {
    MegalodonBatch batch = {.tokens = tokens, .B = 1, .T = n, .carry = carry};
    return backend->forward(model, &batch, NULL);
}

#endif
