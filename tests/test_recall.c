/* test_recall.c - sequences of lib/recall.h are what its head says, and the spread start of CEMA is what its says.
 */
#include "../lib/cema_report.h"      /* first: it asks for POSIX */

#include "../lib/cema_init.h"
#include "../lib/recall.h"
#include "model.h"
#include "test.h"

enum { LETTERS = 2, UNIT = 128 };

static Recall recall_of(RecallTask task, int hops) {
    return (Recall){.task = task, .unit = UNIT, .letters = LETTERS, .hops = hops, .num_distances = 4,
                    .distances = {0, 1, 4, 7}, .seed = 5};
}

static bool is_name(const int32_t *tokens, const int32_t *other) {
    for (int k = 0; k < LETTERS; k++)
        if (tokens[k] != other[k]) return false;
    return true;
}

/* Follows `hops` facts "ab=cd;" from the name at `from`; returns where the last one's second name stands, or -1. */
static int follow(const int32_t *tokens, int links, int from, int hops) {
    for (; hops > 0; hops--) {
        int next = -1;
        for (int i = 0; i < links; i++) {
            int fact = i * (2 * LETTERS + 2);
            if (is_name(tokens + fact, tokens + from)) next = fact + LETTERS + 1;
        }
        if (next < 0) return -1;
        from = next;
    }
    return from;
}

/* Each question can be answered from the facts, stands at its distance, and its answer alone counts. */
static void check_sequence(const Recall *r, uint64_t number, int facts, int last, int *asked) {
    int T = recall_length(r, last), counted = 0;
    int32_t *tokens = must_allocate((size_t)T * sizeof *tokens), *targets = must_allocate((size_t)T * sizeof *targets);
    RecallQuestion questions[RECALL_MAX_NAMES];
    for (int t = 0; t < T; t++) tokens[t] = targets[t] = -7;
    recall_make(r, number, facts, last, tokens, targets, questions);
    int outside = 0, wrong = 0;
    for (int t = 0; t < T; t++) {
        bool counts = targets[t] != MEGALODON_IGNORE;
        outside += tokens[t] < 0 || tokens[t] > 127;
        wrong += counts && (t + 1 == T || targets[t] != tokens[t + 1]);
        counted += counts;
    }
    check(outside == 0 && wrong == 0, "%d tokens are no text, %d targets are not the next token", outside, wrong);
    check(counted == facts * LETTERS, "%d targets count, expected %d", counted, facts * LETTERS);
    for (int i = 0; i < facts; i++) {
        const RecallQuestion *q = &questions[i];
        int name = q->at - 1 - (r->task == RECALL_HOPS) - LETTERS;
        int answer = follow(tokens, facts * r->hops, name, q->hops);
        check(answer >= 0 && is_name(tokens + answer, tokens + q->at), "sequence %d, question %d has another answer",
              (int)number, i);
        check(q->at / UNIT == r->distances[q->distance], "question %d stands in chunk %d, expected %d", i,
              q->at / UNIT, r->distances[q->distance]);
        check(targets[q->at - 1] == tokens[q->at], "the answer of question %d does not count", i);
        if (r->task == RECALL_HOPS) check(tokens[q->at - 2] == '0' + q->hops, "question %d says another number", i);
        asked[q->distance]++;
    }
    free(tokens);
    free(targets);
}

static void check_task(RecallTask task, int hops, int facts) {
    Recall r = recall_of(task, hops);
    int asked[4] = {0}, least = 1 << 30, most = 0;
    must(recall_check(&r, facts, 3));
    for (uint64_t number = 0; number < 40; number++) check_sequence(&r, number, facts, (int)(number % 4), asked);
    for (uint64_t number = 0; number < 400; number++) {
        RecallQuestion questions[RECALL_MAX_NAMES];
        static int32_t tokens[8 * UNIT], targets[8 * UNIT];
        if (number == 0) memset(asked, 0, sizeof asked);
        recall_make(&r, number, facts, 3, tokens, targets, questions);
        for (int i = 0; i < facts; i++) asked[questions[i].distance]++;
    }
    for (int d = 0; d < 4; d++) {
        least = asked[d] < least ? asked[d] : least;
        most = asked[d] > most ? asked[d] : most;
    }
    check(least > 70 * facts && most < 130 * facts, "distances are asked %d to %d times in 400 sequences", least, most);
}

/* The same number gives the same sequence, another one another. */
static void check_repeatable(void) {
    Recall r = recall_of(RECALL_PAIRS, 1);
    static int32_t a[8 * UNIT], b[8 * UNIT], c[8 * UNIT], targets[8 * UNIT];
    RecallQuestion questions[RECALL_MAX_NAMES];
    recall_make(&r, 3, 4, 3, a, targets, questions);
    recall_make(&r, 3, 4, 3, b, targets, questions);
    recall_make(&r, 4, 4, 3, c, targets, questions);
    check(memcmp(a, b, sizeof a) == 0, "the same sequence twice differs");
    check(memcmp(a, c, sizeof a) != 0, "two sequences are the same");
    static const uint8_t text[] = "It was the best of times, it was the worst of times, it was the age of wisdom... ";
    static uint8_t hay[64 * sizeof text];
    for (size_t i = 0; i < sizeof hay; i++) hay[i] = text[i % (sizeof text - 1)];
    r.haystack = hay;
    r.haystack_size = sizeof hay;
    recall_make(&r, 3, 1, 3, a, targets, questions);
    int same = 0;
    for (int t = 2 * UNIT; t < 3 * UNIT; t++) same += a[t] >= 'a' || a[t] == ' ' || a[t] == ',' || a[t] == '.';
    check(same > UNIT - 8, "the filler is not the haystack: %d of %d", same, UNIT);
}

/* Each number of facts gives as many answers as another. */
static void check_shares(void) {
    Recall r = recall_of(RECALL_PAIRS, 1);
    static const int facts[] = {1, 2, 4, 8, 16};
    enum { NUMBERS = 40000, COUNT = 5 };
    int answers[17] = {0};
    check(recall_fitting(&r, facts, COUNT, 0) == 4, "%d numbers of facts fit in one chunk, expected 4",
          recall_fitting(&r, facts, COUNT, 0));
    check(recall_fitting(&r, facts, COUNT, 3) == 5, "16 facts do not fit where four chunks ask for them");
    for (uint64_t number = 0; number < NUMBERS; number++) {
        int drawn = recall_draw_facts(&r, facts, COUNT, number);
        answers[drawn] += drawn;
    }
    double even = NUMBERS / (1 + 1 / 2. + 1 / 4. + 1 / 8. + 1 / 16.);
    for (int i = 0; i < COUNT; i++)
        check(fabs(answers[facts[i]] / even - 1) < 0.1, "%d facts give %d answers, expected about %.0f", facts[i],
              answers[facts[i]], even);
}

static void check_refused(void) {
    Recall r = recall_of(RECALL_PAIRS, 1);
    check(recall_check(&r, 16, 0) != NULL, "16 facts and 16 questions fit in a chunk of %d", UNIT);
    check(recall_check(&r, 8, 3) == NULL, "8 facts do not fit");
    r.letters = 1;
    check(recall_check(&r, 4, 3) != NULL, "8 names of one letter are accepted");
}

/* Memories of a model that was spread reach from 2 to the longest, and the gain is the same for all. */
static void check_spread(void) {
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 1, .max_length = 8};
    MegalodonModel *model = model_create(&megalodon_cpu, &config, &options, 1);
    int states = config.model_dim * config.cema_ndim, N = config.cema_ndim;
    float *alpha = must_allocate((size_t)states * sizeof *alpha), *delta = must_allocate((size_t)states * sizeof *delta);
    must(cema_start(&megalodon_cpu, model, &config, "spread", 2048));
    must(megalodon_cpu.get(model, MEGALODON_PARAM, "layers.1.mega.cema.alpha", alpha, MEGALODON_F32));
    must(megalodon_cpu.get(model, MEGALODON_PARAM, "layers.1.mega.cema.delta", delta, MEGALODON_F32));
    for (int i = 0; i < states; i++) {
        int k = i % N;
        double p = cema_sigmoid(alpha[i]), want = 2 * pow(1024, (double)(N - 1 - k) / (N - 1));
        check(fabs(1 / p / want - 1) < 1e-4, "state %d remembers %g steps, expected %g", k, 1 / p, want);
        double gain = p / (p * cema_sigmoid(delta[i]));
        check(fabs(gain - 1 / 0.95) < 1e-4, "state %d has gain %g", k, gain);
        if (k == 0) check(fabs(cema_memory(alpha[i], delta[i]) / (2048 / 0.95) - 1) < 1e-3, "the longest memory is %g",
                          cema_memory(alpha[i], delta[i]));
    }
    free(alpha);
    free(delta);
    megalodon_cpu.destroy(model);
}

/* Every second channel holds a single input at half its size for so long, and the others are as they were. */
static void check_hold(void) {
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 1, .max_length = 8};
    MegalodonModel *model = model_create(&megalodon_cpu, &config, &options, 1);
    int D = config.model_dim, N = config.cema_ndim, wrong = 0;
    size_t states = (size_t)(D * N);
    float *before = must_allocate(2 * states * sizeof *before), *after = must_allocate(2 * states * sizeof *after);
    float *theta = must_allocate((size_t)D * sizeof *theta);
    for (int turn = 0; turn < 2; turn++) {
        float *out = turn ? after : before;
        must(megalodon_cpu.get(model, MEGALODON_PARAM, "layers.1.mega.cema.alpha", out, MEGALODON_F32));
        must(megalodon_cpu.get(model, MEGALODON_PARAM, "layers.1.mega.cema.delta", out + states, MEGALODON_F32));
        if (!turn) must(cema_start(&megalodon_cpu, model, &config, "hold", 1000));
    }
    must(megalodon_cpu.get(model, MEGALODON_PARAM, "layers.1.mega.cema.theta", theta, MEGALODON_F32));
    for (int j = 0; j < D; j++)
        for (int i = j * N; i < (j + 1) * N; i++) {
            float alpha = after[i], delta = after[states + (size_t)i];
            if (j % 2 != 0) wrong += alpha != before[i] || delta != before[states + (size_t)i];
            else wrong += alpha != 0 || fabs(cema_memory(alpha, delta) / 1000 - 1) > 1e-3 ||
                          cema_period(theta[j], i % N + 1, N) < 999;
        }
    check(wrong == 0, "%d states of %d are not as they should be", wrong, D * N);
    must(cema_start(&megalodon_cpu, model, &config, "released", 1000));
    must(megalodon_cpu.get(model, MEGALODON_PARAM, "layers.1.mega.cema.alpha", before, MEGALODON_F32));
    check(memcmp(before, after, states * sizeof *before) == 0, "the start called released changes something");
    free(before);
    free(after);
    free(theta);
    megalodon_cpu.destroy(model);
}

int main(void) {
    test_begin("recall");
    check_task(RECALL_PAIRS, 1, 1);
    check_task(RECALL_PAIRS, 1, 8);
    check_task(RECALL_NEEDLE, 1, 1);
    check_task(RECALL_HOPS, 3, 3);
    check_task(RECALL_HOPS, 6, 2);
    check_repeatable();
    check_shares();
    check_refused();
    check_spread();
    check_hold();
    return test_end();
}
