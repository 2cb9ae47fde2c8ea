/* documents.h - where one document of the data ends and the next one begins.
 *
 * Data is one long row of tokens. A document ends at the end of its file, and after each separator: in text the bytes
 * of a mark such as <|endoftext|>, together with a line feed that follows them; in token files one token, the one that
 * ./tokenize puts after each document. Training uses the ends in two ways: rows that carry their state start a new
 * document with an empty one (streams.h), and rows at random places leave out the predictions across an end, if they
 * are told to (--within-documents).
 */
#ifndef LIB_DOCUMENTS_H
#define LIB_DOCUMENTS_H

#include <stdint.h>
#include <string.h>

#include "../megalodon.h"
#include "dataset.h"
#include "error.h"

enum { DOCUMENT_MARK_MAX = 256 };    /* tokens of a separator */

typedef struct DocumentMark {
    int32_t tokens[DOCUMENT_MARK_MAX];
    int count;                       /* 0: no separator, only the end of a file ends a document             */
    int32_t line_feed;               /* a token that belongs to a separator if it follows it; -1: none does */
} DocumentMark;

/* A separator in text. Error: it is too long. */
static inline const char *document_mark_text(DocumentMark *mark, const char *text) {
    size_t length = strlen(text);
    *mark = (DocumentMark){.line_feed = '\n'};
    if (length > DOCUMENT_MARK_MAX)
        return errorf("--document-separator: expected at most %d bytes, found %zu", DOCUMENT_MARK_MAX, length);
    for (size_t i = 0; i < length; i++) mark->tokens[i] = (uint8_t)text[i];
    mark->count = (int)length;
    return NULL;
}

/* A separator that is one token. */
static inline void document_mark_token(DocumentMark *mark, int32_t token) {
    *mark = (DocumentMark){.tokens = {token}, .count = 1, .line_feed = -1};
}

/* Index in window[0, size) of the first end of a document after `after`: just behind a separator and its line feed.
 * `size` where there is none. The window has to begin mark->count tokens before `after`, or where the file does. */
static inline int document_end(const DocumentMark *mark, const int32_t *window, int after, int size) {
    int i = after > mark->count ? after - mark->count : 0;
    for (; mark->count > 0 && i + mark->count <= size; i++) {
        int end = i + mark->count;
        if (memcmp(window + i, mark->tokens, (size_t)mark->count * sizeof *window) != 0) continue;
        if (end < size && window[end] == mark->line_feed) end++;
        if (end > after) return end;
    }
    return size;
}

/* For the row whose tokens are [start, start + T) of the data: sets the targets (T) that begin a document to
 * MEGALODON_IGNORE, as nothing before them tells what they are. window: scratch, T + 1 + DOCUMENT_MARK_MAX entries.
 * Error: a file cannot be read. */
static inline const char *documents_leave_out(const DocumentMark *mark, Dataset *data, int64_t start, int T,
                                              int32_t *window, int32_t *targets) {
    int64_t last = start + T + 1;                            /* behind the last target */
    for (int64_t at = start; at < last;) {                   /* file by file */
        const DatasetFile *file = &data->files[dataset_file_of(data, at)];
        int64_t stop = file->first + file->count < last ? file->first + file->count : last;
        int64_t low = at - mark->count < file->first ? file->first : at - mark->count;
        int before = (int)(at - low), size = (int)(stop - low);
        const char *error = dataset_window(data, low, stop - low, window);
        if (error) return error;
        if (at > start) targets[at - start - 1] = MEGALODON_IGNORE;
        for (int end = before; (end = document_end(mark, window, end, size)) < size;)
            targets[at - start + end - before - 1] = MEGALODON_IGNORE;
        at = stop;
    }
    return NULL;
}

#endif
