/* recall.h - sequences that can only be continued by remembering what stood in them.
 *
 * A sequence begins with facts, goes on with filler, and asks for the facts later. Names are random letters, so an
 * answer can be found in the sequence and nowhere else:
 *
 *     qk=tb;vn=ec;  WQRZMVNAKQ...  vn?ec;  PXQ...  qk?tb;
 *
 * Facts stand in the first chunk. A question's distance d is the number of chunks between the two: 0 stands in the
 * first chunk itself, behind the facts, d > 0 in chunk d (in a model with this chunk size, attention sees the facts
 * at distance 0 only). Every fact is asked for once, at one of the distances in turn, so no answer can be copied from
 * an earlier one.
 *
 *   pairs    N facts; each is asked for
 *   needle   one fact, and the filler is a real text where one is given
 *   hops     N chains of facts ab=cd;cd=ef;ef=gh; in random order; "ab3?gh;" asks for the name three facts on
 *
 * Everything is a function of (seed, number of the sequence).
 */
#ifndef LIB_RECALL_H
#define LIB_RECALL_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "../megalodon.h"
#include "error.h"

enum {
    RECALL_MAX_LIST = 16,            /* distances, numbers of facts                              */
    RECALL_MAX_NAMES = 512,          /* of a sequence                                            */
    RECALL_MAX_LETTERS = 8,
    RECALL_MAX_HOPS = 9              /* a question says their number with one digit               */
};

typedef enum { RECALL_PAIRS, RECALL_NEEDLE, RECALL_HOPS } RecallTask;

typedef struct Recall {
    RecallTask task;
    int unit;                        /* tokens of a chunk                                         */
    int letters;                     /* of a name                                                 */
    int hops;                        /* facts of a chain; 1 unless the task is hops               */
    int num_distances, distances[RECALL_MAX_LIST];    /* in chunks, ascending                     */
    const uint8_t *haystack;         /* filler, haystack_size bytes; NULL: random capital letters */
    int64_t haystack_size;
    uint64_t seed;
} Recall;

/* A question of a sequence: its answer is tokens [at, at + letters). */
typedef struct RecallQuestion {
    int at, distance, hops;          /* distance: index into distances                            */
} RecallQuestion;

/* Tokens of a fact "ab=cd;" and of a question with its answer "ab?cd;" or "ab3?cd;". */
static inline int recall_fact_size(const Recall *r) { return 2 * r->letters + 2; }
static inline int recall_question_size(const Recall *r) {
    return 2 * r->letters + 2 + (r->task == RECALL_HOPS);
}

/* Tokens of a sequence whose farthest question is at distances[last]. */
static inline int recall_length(const Recall *r, int last) { return (r->distances[last] + 1) * r->unit; }

/* Whether `facts` facts (chains) can be asked for at distances [0, last]: the facts and the questions of distance 0
 * have to fit in one chunk, those of another distance in theirs. Error: the sizes. */
static inline const char *recall_check(const Recall *r, int facts, int last) {
    int here = (facts + last) / (last + 1), names = facts * (r->hops + 1);
    int first = facts * r->hops * recall_fact_size(r) + (r->distances[0] == 0 ? here * recall_question_size(r) : 0);
    int other = here * recall_question_size(r);
    double possible = 1;
    for (int i = 0; i < r->letters; i++) possible *= 26;
    if (names > RECALL_MAX_NAMES || names > possible / 4)
        return errorf("%d names of %d letters in one sequence are too many: at most %.0f can stay distinct at random",
                      names, r->letters, possible / 4 < RECALL_MAX_NAMES ? possible / 4 : RECALL_MAX_NAMES);
    if (first > r->unit || other > r->unit)
        return errorf("%d facts of %d hops need %d tokens with their questions, and a chunk has %d; use fewer facts or "
                      "a longer --unit", facts, r->hops, first > other ? first : other, r->unit);
    return NULL;
}

/* How many of the ascending numbers of facts fit: where the farthest question is near, more of them meet in a chunk. */
static inline int recall_fitting(const Recall *r, const int *facts, int count, int last) {
    int fitting = 0;
    while (fitting < count && !recall_check(r, facts[fitting], last)) fitting++;
    return fitting;
}

/* Draws one of `count` numbers of facts for a sequence, the more often the smaller it is: many facts are many answers,
 * and so each number has the same share of the loss. Most of it would come from what cannot be learned yet, otherwise. */
static inline int recall_draw_facts(const Recall *r, const int *facts, int count, uint64_t number) {
    double sum = 0, at = (double)(megalodon_random(r->seed, ~number) >> 11) * 0x1p-53;
    for (int i = 0; i < count; i++) sum += 1. / facts[i];
    for (int i = 0; i < count - 1; i++)
        if ((at -= 1 / (facts[i] * sum)) < 0) return facts[i];
    return facts[count - 1];
}

/* The generator of one sequence. */
typedef struct RecallDice {
    uint64_t key, counter;
} RecallDice;
static inline int recall_draw(RecallDice *dice, int sides) {
    return (int)(megalodon_random(dice->key, dice->counter++) % (uint64_t)sides);
}

static inline void recall_shuffle(RecallDice *dice, int *items, int count) {
    for (int i = count - 1; i > 0; i--) {
        int other = recall_draw(dice, i + 1), swap = items[i];
        items[i] = items[other];
        items[other] = swap;
    }
}

/* `count` different names of small letters. */
static inline void recall_names(RecallDice *dice, int letters, int count, char (*names)[RECALL_MAX_LETTERS]) {
    for (int i = 0; i < count; i++)
        for (bool taken = true; taken;) {
            for (int k = 0; k < letters; k++) names[i][k] = (char)('a' + recall_draw(dice, 26));
            taken = false;
            for (int j = 0; j < i && !taken; j++) taken = memcmp(names[i], names[j], (size_t)letters) == 0;
        }
}

static inline int recall_put(int32_t *tokens, int at, const char *name, int letters, char end) {
    for (int k = 0; k < letters; k++) tokens[at + k] = (uint8_t)name[k];
    tokens[at + letters] = (uint8_t)end;
    return at + letters + 1;
}

/* Filler for the whole sequence; facts and questions are written over it. */
static inline void recall_fill(const Recall *r, RecallDice *dice, int32_t *tokens, int length) {
    if (r->haystack && r->haystack_size > length) {
        int64_t start = (int64_t)(megalodon_random(dice->key, ~0ull) % (uint64_t)(r->haystack_size - length));
        for (int t = 0; t < length; t++) tokens[t] = r->haystack[start + t];
    } else {
        for (int t = 0; t < length; t++) tokens[t] = 'A' + recall_draw(dice, 26);
    }
}

/* Makes sequence `number`: recall_length(r, last) tokens, and targets that count at the letters of answers only. Its
 * `facts` questions go to questions[], in the order of the facts. Needs recall_check to have passed. */
static inline void recall_make(const Recall *r, uint64_t number, int facts, int last, int32_t *tokens,
                               int32_t *targets, RecallQuestion *questions) {
    RecallDice dice = {megalodon_random(r->seed, number), 0};
    char names[RECALL_MAX_NAMES][RECALL_MAX_LETTERS];
    int order[RECALL_MAX_NAMES], length = recall_length(r, last), links = facts * r->hops, at = 0;
    recall_fill(r, &dice, tokens, length);
    for (int t = 0; t < length; t++) targets[t] = MEGALODON_IGNORE;
    /* Chain f has the names [f (hops + 1), (f + 1) (hops + 1)); link i of all is one of its facts. */
    recall_names(&dice, r->letters, facts * (r->hops + 1), names);
    for (int i = 0; i < links; i++) order[i] = i;
    recall_shuffle(&dice, order, links);
    for (int i = 0; i < links; i++) {
        int from = order[i] / r->hops * (r->hops + 1) + order[i] % r->hops;
        at = recall_put(tokens, at, names[from], r->letters, '=');
        at = recall_put(tokens, at, names[from + 1], r->letters, ';');
    }
    for (int i = 0; i < facts; i++) order[i] = i;
    recall_shuffle(&dice, order, facts);
    int turn = recall_draw(&dice, last + 1);
    for (int d = 0; d <= last; d++) {
        int here = 0;
        for (int i = 0; i < facts; i++) here += (i + turn) % (last + 1) == d;
        int begin = r->distances[d] == 0 ? at : r->distances[d] * r->unit, end = (r->distances[d] + 1) * r->unit;
        int room = end - begin - here * recall_question_size(r), place = begin + recall_draw(&dice, room + 1);
        for (int i = 0; i < facts; i++) {
            if ((i + turn) % (last + 1) != d) continue;
            int first = order[i] * (r->hops + 1), hops = 1 + recall_draw(&dice, r->hops);
            place = recall_put(tokens, place, names[first], r->letters, '?');
            if (r->task == RECALL_HOPS) {                /* the number stands before the question mark */
                tokens[place - 1] = '0' + hops;
                tokens[place++] = '?';
            }
            questions[order[i]] = (RecallQuestion){place, d, hops};
            for (int k = 0; k < r->letters; k++) targets[place - 1 + k] = (uint8_t)names[first + hops][k];
            place = recall_put(tokens, place, names[first + hops], r->letters, ';');
        }
    }
}

#endif
