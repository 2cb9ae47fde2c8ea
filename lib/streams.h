/* streams.h - long texts for training: every row of a batch follows a text of its own.
 *
 * The data is divided into B streams of nearly equal length, one a row, and each stream into documents. A row reads
 * its stream segment by segment, up to T tokens each, and keeps its state from one segment to the next. A segment ends
 * at the latest where its document ends; the rest of the row's places is padding whose targets do not count, and the
 * row's next segment starts the next document with an empty state. So the loss of a document's tokens is the one that
 * a single pass over the whole document would give, whatever T is. At the end of its stream a row starts it again.
 *
 *     document  |------------- A ------------|---- B ----|
 *     segments  |  T tokens  |  T tokens  |x ..|  ...     x: a short one; dots: padding
 *
 * documents.h tells where documents end. The first token of a document is never a target: nothing stands before it.
 */
#ifndef LIB_STREAMS_H
#define LIB_STREAMS_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

#include "../megalodon.h"
#include "dataset.h"
#include "documents.h"
#include "error.h"

typedef struct Streams {
    Dataset *data;
    int64_t first, count;            /* the range of the data that is divided                       */
    int B, T;
    DocumentMark mark;               /* ends a document                                             */
    int64_t *next;                   /* B: token of the data at which a row's next segment starts   */
    bool *fresh;                     /* B: that segment begins a document: its state is empty       */
    int32_t *window;                 /* a segment with its surroundings                             */
} Streams;

static inline int64_t streams_begin(const Streams *s, int row) {
    return s->first + s->count / s->B * row + s->count % s->B * row / s->B;
}
static inline int64_t streams_end(const Streams *s, int row) { return streams_begin(s, row + 1); }

static inline void streams_close(Streams *s) {
    free(s->next);
    free(s->fresh);
    free(s->window);
    *s = (Streams){0};
}

/* Divides tokens [first, first + count) of the data; every row starts at the beginning of its stream. Error: a stream
 * would not have two tokens, or no memory. */
static inline const char *streams_open(Streams *s, Dataset *data, int64_t first, int64_t count, int B, int T,
                                       const DocumentMark *mark) {
    *s = (Streams){.data = data, .first = first, .count = count, .B = B, .T = T, .mark = *mark};
    if (count / B < 2)
        return errorf("%s: %lld tokens cannot be divided into %d streams, one a row, of at least two tokens; use more "
                      "text or fewer rows", data->path, (long long)count, B);
    s->next = malloc((size_t)B * sizeof *s->next);
    s->fresh = malloc((size_t)B * sizeof *s->fresh);
    s->window = malloc(((size_t)T + DOCUMENT_MARK_MAX + 2) * sizeof *s->window);
    if (!s->next || !s->fresh || !s->window) {
        streams_close(s);
        return errorf("no memory for %d streams in segments of %d tokens", B, T);
    }
    for (int row = 0; row < B; row++) {
        s->next[row] = streams_begin(s, row);
        s->fresh[row] = true;
    }
    return NULL;
}

/* Reads the row's next tokens, up to T and the one after them, with as much before them as a separator needs that
 * began there. *size tells how many tokens the window holds, *before how many of them stand before the row's next one,
 * and *end where a document ends in any case: at the end of the file or of the stream. */
static inline const char *streams_load(Streams *s, int row, int *before, int *size, int64_t *end) {
    const DatasetFile *file = &s->data->files[dataset_file_of(s->data, s->next[row])];
    int64_t at = s->next[row], low = at - s->mark.count, high = at + s->T + 1;
    *end = file->first + file->count;
    if (*end > streams_end(s, row)) *end = streams_end(s, row);
    if (low < file->first) low = file->first;
    if (high > *end) high = *end;
    *before = (int)(at - low);
    *size = (int)(high - low);
    return dataset_window(s->data, low, high - low, s->window);
}

/* Fills one row of a batch, T tokens and T targets, with its next segment and moves the row on. *fresh: the segment
 * starts from an empty state. At least one target counts. Error: a file cannot be read, or no document of the row's
 * stream has two tokens. */
static inline const char *streams_next(Streams *s, int row, int32_t *tokens, int32_t *targets, bool *fresh) {
    for (bool wrapped = false;;) {
        int before, size;
        int64_t at = s->next[row], limit;
        const char *error = streams_load(s, row, &before, &size, &limit);
        if (error) return error;
        /* Whether a document ends at a place depends on the text around it alone, not on where segments were cut. */
        int end = document_end(&s->mark, s->window, before, size);
        /* The document ends inside the window unless the window was cut by T alone. */
        bool ends = end < size || at + size - before == limit;
        int length = end - before < s->T ? end - before : s->T;
        bool last = ends && length == end - before;
        int counted = last ? length - 1 : length;
        *fresh = s->fresh[row];
        s->next[row] = at + length;
        s->fresh[row] = last;
        if (s->next[row] == streams_end(s, row)) s->next[row] = streams_begin(s, row);
        for (int t = 0; t < s->T; t++) {
            tokens[t] = t < length ? s->window[before + t] : 0;
            targets[t] = t < counted ? s->window[before + t + 1] : MEGALODON_IGNORE;
        }
        if (counted > 0) return NULL;
        /* What is left of a document is one token without a successor: there is nothing to learn from it. */
        if (s->next[row] != streams_begin(s, row)) continue;
        if (wrapped) return errorf("%s: no document in the stream of row %d has two tokens", s->data->path, row);
        wrapped = true;
    }
}

/* Sets where a row goes on, as `next` and `fresh` told it when they were saved. Error: that is not in its stream. */
static inline const char *streams_seek(Streams *s, int row, int64_t next, bool fresh) {
    if (next < streams_begin(s, row) || next >= streams_end(s, row))
        return errorf("row %d would go on at token %lld, but its stream is [%lld, %lld)", row, (long long)next,
                      (long long)streams_begin(s, row), (long long)streams_end(s, row));
    s->next[row] = next;
    s->fresh[row] = fresh;
    return NULL;
}

#endif
