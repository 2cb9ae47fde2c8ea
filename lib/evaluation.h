/* evaluation.h - the loss of a model on texts, with the context cut to any length.
 *
 * A text of n tokens asks for n - 1 predictions. Prediction t is that of token t + 1 and is made after reading token t,
 * t = 0 .. n-2; nothing precedes the first token, so that one is not predicted. With context c the text is cut into
 * windows: window w reads tokens [w c, (w + 1) c) from an empty state and makes the predictions of these numbers. So
 *
 *     prediction t is made from the tokens floor(t / c) c .. t:   between 1 and c of them, (c + 1) / 2 on average
 *
 * and every c scores exactly the same predictions, each of them once; the last window of a text is the shorter one.
 * From c = n - 1 on the whole text is one window, a single stream whose state is carried from its start to its end.
 *
 * Windows run side by side, as the rows of a batch, in pieces of `read_size` tokens, with the state carried from piece
 * to piece. Nothing grows with the length of a window or of a text but the sums, a few numbers a block.
 *
 * Losses are summed by block: a text's predictions [i block, (i + 1) block). How much the mean depends on which text
 * was there to be scored is estimated by the bootstrap: blocks are drawn anew, with replacement, as many as there are,
 * and the deviation of the means of many such draws is the error. All passes are drawn together, so the error of
 * a difference between two context lengths is that of pairs, much smaller than the errors of the two.
 */
#ifndef LIB_EVALUATION_H
#define LIB_EVALUATION_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "../megalodon.h"
#include "dataset.h"
#include "error.h"

/* Sums are kept for several series of predictions: all; those after the first chunk of a text; the first halves of
 * those chunks; and buckets that divide the positions in those chunks: 0, 1, 2-3, 4-7, ... A text's first chunk is only
 * in the series of all, since nothing comes before it that a state could carry. */
enum { EVALUATION_ALL, EVALUATION_LATER_CHUNKS, EVALUATION_FIRST_HALF, EVALUATION_FIRST_BUCKET };

typedef struct EvaluationText {
    int file;                        /* in the dataset                                     */
    int64_t first;                   /* its first token, counted from the dataset's        */
    int64_t predictions, first_block;
    int64_t bytes;                   /* of text that the predicted tokens stand for; 0: not known */
} EvaluationText;

typedef struct Evaluation {
    const MegalodonBackend *backend;
    MegalodonModel *model;           /* for inference; max_batch and max_length fit the two numbers below */
    Dataset *data;
    int batch, read_size;            /* rows and tokens of a forward, at most                             */
    int chunk;                       /* C: what positions are counted in                                  */
    int series;                      /* 1, or EVALUATION_FIRST_BUCKET + buckets                           */
    int64_t block;                   /* predictions in a block                                            */
    EvaluationText *texts;           /* the files that have at least two tokens                           */
    int num_texts;
    int64_t predictions, longest;    /* of all texts; of the longest one                                  */
    int64_t blocks;
    struct EvaluationWindow *rows;   /* the windows of a batch: batch                                     */
    struct EvaluationWindow *tails;  /* what is left of each text after its full windows: num_texts       */
    int32_t *tokens, *targets;       /* batch * read_size                                                 */
    int32_t *line;                   /* read_size + 1                                                     */
    float *nll;                      /* batch * read_size                                                 */
} Evaluation;

/* One pass over all predictions: sums and numbers of them, (blocks, series). */
typedef struct EvaluationSums {
    double *nll;
    int64_t *count;
} EvaluationSums;

typedef struct EvaluationWindow {
    int text;
    int64_t start, length;           /* predictions of the text */
} EvaluationWindow;

/* Bucket of a position in the chunk: 0 for 0, then 1 + floor(log2 position). */
static inline int evaluation_bucket(int64_t position) {
    int bucket = 0;
    while (position >> bucket) bucket++;
    return bucket;
}

/* First and last position of a bucket; the last bucket may end early, with its chunk. */
static inline int64_t evaluation_bucket_first(int bucket) { return bucket == 0 ? 0 : (int64_t)1 << (bucket - 1); }
static inline int64_t evaluation_bucket_last(int bucket, int chunk) {
    int64_t last = ((int64_t)1 << bucket) - 1;
    return last < chunk ? last : chunk - 1;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Setting up.
 */

/* Lists the texts: one a file, of at most `limit` tokens (0: all) and at most `files` of them (0: all). Nothing needs a
 * model yet. positions: keep the series of positions, too. Error: no file has two tokens, or no memory. */
static inline const char *evaluation_plan(Evaluation *e, Dataset *data, int64_t limit, int files, int chunk,
                                          int64_t block, bool positions) {
    int count = files > 0 && files < data->num_files ? files : data->num_files;
    *e = (Evaluation){.data = data, .chunk = chunk, .block = block, .series = 1};
    if (positions) e->series = EVALUATION_FIRST_BUCKET + evaluation_bucket(chunk - 1) + 1;
    e->texts = calloc((size_t)count, sizeof *e->texts);
    e->tails = calloc((size_t)count, sizeof *e->tails);
    if (!e->texts || !e->tails) return errorf("%s: no memory for the list of its files", data->path);
    for (int i = 0; i < count; i++) {
        int64_t tokens = data->files[i].count;
        if (limit > 0 && tokens > limit) tokens = limit;
        if (tokens < 2) continue;                            /* nothing to predict */
        e->texts[e->num_texts++] = (EvaluationText){.file = i, .first = data->files[i].first,
                                                    .predictions = tokens - 1, .first_block = e->blocks};
        e->predictions += tokens - 1;
        e->blocks += (tokens - 1 + block - 1) / block;
        if (tokens - 1 > e->longest) e->longest = tokens - 1;
    }
    if (e->num_texts == 0)
        return errorf("%s: fewer than two tokens to score%s; a prediction takes one to read and one to guess",
                      data->path, count > 1 ? " in each of its files" : "");
    return NULL;
}

/* Gives the plan its model. Error: no memory. */
static inline const char *evaluation_attach(Evaluation *e, const MegalodonBackend *backend, MegalodonModel *model,
                                            int batch, int read_size) {
    size_t tokens = (size_t)batch * (size_t)read_size;
    e->backend = backend;
    e->model = model;
    e->batch = batch;
    e->read_size = read_size;
    e->rows = malloc((size_t)batch * sizeof *e->rows);
    e->tokens = malloc(tokens * sizeof *e->tokens);
    e->targets = malloc(tokens * sizeof *e->targets);
    e->line = malloc(((size_t)read_size + 1) * sizeof *e->line);
    e->nll = malloc(tokens * sizeof *e->nll);
    if (e->rows && e->tokens && e->targets && e->line && e->nll) return NULL;
    return errorf("no memory for %d rows of %d tokens", batch, read_size);
}

static inline void evaluation_destroy(Evaluation *e) {
    free(e->texts);
    free(e->tails);
    free(e->rows);
    free(e->tokens);
    free(e->targets);
    free(e->line);
    free(e->nll);
    memset(e, 0, sizeof *e);
}

static inline const char *evaluation_sums_create(EvaluationSums *sums, const Evaluation *e) {
    size_t cells = (size_t)e->blocks * (size_t)e->series;
    sums->nll = calloc(cells, sizeof *sums->nll);
    sums->count = calloc(cells, sizeof *sums->count);
    return sums->nll && sums->count ? NULL : errorf("no memory for the sums of %zu blocks and series", cells);
}

static inline void evaluation_sums_destroy(EvaluationSums *sums) {
    free(sums->nll);
    free(sums->count);
    *sums = (EvaluationSums){0};
}

/* ------------------------------------------------------------------------------------------------------------------
 * Windows: first the full ones, in the order of the texts, then what is left of each text, longest first, so that rows
 * of one batch are of one length or nearly so.
 */

typedef struct EvaluationCursor {
    int64_t context, offset;
    int64_t start;                   /* and text: of the next full window */
    int text;
    int tail, num_tails;
} EvaluationCursor;

/* The longest first; those of one length in the order of the texts. */
static inline int evaluation_by_length(const void *a, const void *b) {
    const EvaluationWindow *x = a, *y = b;
    if (x->length != y->length) return x->length < y->length ? 1 : -1;
    return (x->text > y->text) - (x->text < y->text);
}

static inline EvaluationCursor evaluation_cursor(Evaluation *e, int64_t context, int64_t offset) {
    EvaluationCursor cursor = {.context = context, .offset = offset, .start = offset};
    for (int i = 0; i < e->num_texts; i++) {
        int64_t rest = (e->texts[i].predictions - offset) % context;
        if (rest <= 0) continue;                             /* below 0: the text ends before the offset */
        e->tails[cursor.num_tails++] = (EvaluationWindow){i, e->texts[i].predictions - rest, rest};
    }
    qsort(e->tails, (size_t)cursor.num_tails, sizeof *e->tails, evaluation_by_length);
    return cursor;
}

/* The next window, without taking it; its length is 0 at the end. */
static inline EvaluationWindow evaluation_peek(const Evaluation *e, EvaluationCursor *cursor) {
    while (cursor->text < e->num_texts) {
        if (e->texts[cursor->text].predictions - cursor->start >= cursor->context)
            return (EvaluationWindow){cursor->text, cursor->start, cursor->context};
        cursor->text++;
        cursor->start = cursor->offset;
    }
    return cursor->tail < cursor->num_tails ? e->tails[cursor->tail] : (EvaluationWindow){0};
}

static inline void evaluation_take(const Evaluation *e, EvaluationCursor *cursor) {
    if (cursor->text < e->num_texts) cursor->start += cursor->context;
    else cursor->tail++;
}

/* Takes the next windows as rows of a batch; returns how many, 0 at the end. A row that is shorter than the first one
 * reads zeros after its end, which cost time and count for nothing; so it may be shorter by a quarter at most. */
static inline int evaluation_next_rows(Evaluation *e, EvaluationCursor *cursor) {
    int rows = 0;
    while (rows < e->batch) {
        EvaluationWindow window = evaluation_peek(e, cursor);
        if (window.length == 0 || (rows > 0 && window.length < e->rows[0].length - e->rows[0].length / 4)) break;
        e->rows[rows++] = window;
        evaluation_take(e, cursor);
    }
    return rows;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Scoring.
 */

/* Predictions [at, at + T) of a window that lie in it, 0 to T. */
static inline int64_t evaluation_piece(const EvaluationWindow *window, int64_t at, int64_t T) {
    int64_t rest = window->length - at;
    return rest < 0 ? 0 : rest < T ? rest : T;
}

/* Fills row `row` of a batch of length T with the window's tokens from `at` on. */
static inline const char *evaluation_fill(Evaluation *e, int row, int64_t at, int64_t T) {
    const EvaluationWindow *window = &e->rows[row];
    int64_t count = evaluation_piece(window, at, T), first = e->texts[window->text].first + window->start + at;
    int32_t *tokens = e->tokens + row * T, *targets = e->targets + row * T;
    if (count > 0) {
        const char *error = dataset_window(e->data, first, count + 1, e->line);
        if (error) return error;
        memcpy(tokens, e->line, (size_t)count * sizeof *tokens);
        memcpy(targets, e->line + 1, (size_t)count * sizeof *targets);
    }
    for (int64_t i = count; i < T; i++) {
        tokens[i] = 0;
        targets[i] = MEGALODON_IGNORE;
    }
    return NULL;
}

/* Adds a row's losses to the sums. Error: one of them is not finite. */
static inline const char *evaluation_add(const Evaluation *e, int row, int64_t at, int64_t T, EvaluationSums *sums) {
    const EvaluationWindow *window = &e->rows[row];
    const EvaluationText *text = &e->texts[window->text];
    int64_t count = evaluation_piece(window, at, T);
    for (int64_t i = 0; i < count; i++) {
        int64_t t = window->start + at + i, cell = (text->first_block + t / e->block) * e->series;
        double nll = (double)e->nll[row * T + i];
        if (!isfinite(nll))
            return errorf("%s: the model's loss at token %lld is not finite (%g); its weights are damaged or their "
                          "training failed", e->data->files[text->file].path, (long long)(t + 1), nll);
        sums->nll[cell + EVALUATION_ALL] += nll;
        sums->count[cell + EVALUATION_ALL]++;
        if (e->series == 1 || t < e->chunk) continue;
        int bucket = EVALUATION_FIRST_BUCKET + evaluation_bucket(t % e->chunk);
        sums->nll[cell + EVALUATION_LATER_CHUNKS] += nll;
        sums->count[cell + EVALUATION_LATER_CHUNKS]++;
        sums->nll[cell + bucket] += nll;
        sums->count[cell + bucket]++;
        if (t % e->chunk >= e->chunk / 2) continue;
        sums->nll[cell + EVALUATION_FIRST_HALF] += nll;
        sums->count[cell + EVALUATION_FIRST_HALF]++;
    }
    return NULL;
}

/* Called after each forward with the number of predictions that it made. */
typedef void EvaluationProgress(void *context, int64_t predictions);

/* Scores every prediction from `offset` of each text on with the given context, at least 1, and adds to the sums. An
 * offset moves the windows, and with them the chunks of the model; positions are counted from the text's start all the
 * same. progress may be NULL. Error: what the data or the backend says, or a loss that is not finite. */
static inline const char *evaluation_pass(Evaluation *e, int64_t context, int64_t offset, EvaluationSums *sums,
                                          EvaluationProgress *progress, void *whose) {
    EvaluationCursor cursor = evaluation_cursor(e, context, offset);
    const char *error = NULL;
    for (int rows; (rows = evaluation_next_rows(e, &cursor)) > 0;) {
        int64_t length = e->rows[0].length;                  /* the longest of them */
        for (int64_t at = 0; at < length; at += e->read_size) {
            int64_t T = evaluation_piece(&e->rows[0], at, e->read_size), made = 0;
            for (int row = 0; row < rows && !error; row++) error = evaluation_fill(e, row, at, T);
            MegalodonBatch batch = {.tokens = e->tokens, .targets = e->targets, .B = rows, .T = (int)T,
                                    .carry = at > 0};
            MegalodonLoss loss;
            if (!error) error = e->backend->forward(e->model, &batch, &loss);
            if (!error) error = e->backend->get(e->model, MEGALODON_ACT, "nll", e->nll, MEGALODON_F32);
            for (int row = 0; row < rows && !error; row++) error = evaluation_add(e, row, at, T, sums);
            if (error) return error;
            for (int row = 0; row < rows; row++) made += evaluation_piece(&e->rows[row], at, T);
            if (progress) progress(whose, made);
        }
    }
    return NULL;
}

/* Mean loss of a series over blocks [first, first + count), in nats a token; NAN where it has no prediction. The number
 * of them goes to *predictions if that is not NULL. */
static inline double evaluation_mean(const Evaluation *e, const EvaluationSums *sums, int series, int64_t first,
                                     int64_t count, int64_t *predictions) {
    double nll = 0;
    int64_t n = 0;
    for (int64_t i = first; i < first + count; i++) {
        nll += sums->nll[i * e->series + series];
        n += sums->count[i * e->series + series];
    }
    if (predictions) *predictions = n;
    return n > 0 ? nll / (double)n : NAN;
}

/* ------------------------------------------------------------------------------------------------------------------
 * The bootstrap.
 */

enum { BOOTSTRAP_DRAWS = 1000 };

typedef struct Bootstrap {
    int passes, series;
    double *means;                   /* (draws, passes, series), nats a token; NULL: too few blocks for an error */
} Bootstrap;

/* Draws BOOTSTRAP_DRAWS times as many blocks as there are. The same seed gives the same draws, whatever the passes.
 * A single block leaves nothing to draw: all errors are then NAN. Error: no memory. */
static inline const char *bootstrap_create(Bootstrap *b, const Evaluation *e, const EvaluationSums *sums, int passes,
                                           uint64_t seed) {
    int64_t blocks = e->blocks;
    *b = (Bootstrap){.passes = passes, .series = e->series};
    if (blocks < 2) return NULL;
    int64_t *drawn = malloc((size_t)blocks * sizeof *drawn);
    b->means = malloc((size_t)BOOTSTRAP_DRAWS * (size_t)passes * (size_t)e->series * sizeof *b->means);
    if (!drawn || !b->means) {
        free(drawn);
        free(b->means);
        return errorf("no memory for the bootstrap of %lld blocks", (long long)blocks);
    }
    for (int64_t draw = 0; draw < BOOTSTRAP_DRAWS; draw++) {
        memset(drawn, 0, (size_t)blocks * sizeof *drawn);
        for (int64_t i = 0; i < blocks; i++)
            drawn[megalodon_random(seed, (uint64_t)(draw * blocks + i)) % (uint64_t)blocks]++;
        for (int pass = 0; pass < passes; pass++) {
            for (int s = 0; s < e->series; s++) {
                double nll = 0, count = 0;
                for (int64_t i = 0; i < blocks; i++) {
                    nll += (double)drawn[i] * sums[pass].nll[i * e->series + s];
                    count += (double)drawn[i] * (double)sums[pass].count[i * e->series + s];
                }
                b->means[(draw * passes + pass) * e->series + s] = nll / count;
            }
        }
    }
    free(drawn);
    return NULL;
}

static inline void bootstrap_destroy(Bootstrap *b) {
    free(b->means);
    b->means = NULL;
}

/* A mean of one draw; pass -1 stands for the number 0. */
static inline double bootstrap_at(const Bootstrap *b, int64_t draw, int pass, int series) {
    return pass < 0 ? 0 : b->means[(draw * b->passes + pass) * b->series + series];
}

/* Standard error, in nats a token, of the difference between two means; other_pass -1: of the first one itself. NAN if
 * there is none: a single block, or a series that one of the draws missed. */
static inline double bootstrap_error(const Bootstrap *b, int pass, int series, int other_pass, int other_series) {
    double sum = 0, squares = 0;
    for (int64_t draw = 0; b->means && draw < BOOTSTRAP_DRAWS; draw++)
        sum += bootstrap_at(b, draw, pass, series) - bootstrap_at(b, draw, other_pass, other_series);
    for (int64_t draw = 0; b->means && draw < BOOTSTRAP_DRAWS; draw++) {
        double d = bootstrap_at(b, draw, pass, series) - bootstrap_at(b, draw, other_pass, other_series)
                 - sum / BOOTSTRAP_DRAWS;
        squares += d * d;
    }
    return b->means ? sqrt(squares / (BOOTSTRAP_DRAWS - 1)) : NAN;
}

#endif
