/* test_finetune.c - examples of prompt and response: how they are read, which targets count, in which order they come,
 * every line that must be refused; and a model that learns the responses alone.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include "../lib/examples.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "model.h"
#include "test.h"

static char path[] = "/tmp/test_finetune.XXXXXX";            /* a file of the moment */
static Vocabulary bytes_vocabulary, bpe;
static DocumentMark mark;

static const char *open_text(Examples *e, const char *text, const Vocabulary *v, const DocumentMark *end) {
    FILE *file = fopen(path, "wb");
    if (!file || fputs(text, file) < 0 || fclose(file) != 0) must("cannot write the file of the test");
    return examples_open(e, path, v, end);
}

/* The example's row by hand: `prompt` and `response` encoded one after the other, then the end. Targets are tokens
 * from the response's first one on, wherever something stands before it. */
static void expect_row(const Examples *e, int64_t i, int T, const Vocabulary *v, const char *prompt,
                       const char *response, const DocumentMark *end) {
    int32_t *first, *second, row[512], tokens[512], targets[512];
    size_t a = 0, b = 0, n = 0;
    must(vocabulary_encode(v, prompt, strlen(prompt), &first, &a));
    must(vocabulary_encode(v, response, strlen(response), &second, &b));
    for (size_t k = 0; k < a; k++) row[n++] = first[k];
    for (size_t k = 0; k < b; k++) row[n++] = second[k];
    for (int k = 0; k < end->count; k++) row[n++] = end->tokens[k];
    int wrong = 0, counted = 0;
    examples_row(e, i, T, tokens, targets);
    for (int t = 0; t < T; t++) {
        bool is_target = t + 1 < (int)n && t + 1 >= (int)a;
        wrong += tokens[t] != (t < (int)n ? row[t] : 0);
        wrong += targets[t] != (is_target ? row[t + 1] : MEGALODON_IGNORE);
        counted += is_target;
    }
    check(wrong == 0, "example %d, T %d: %d places wrong", (int)i, T, wrong);
    check(counted == (int)(n - (a ? a : 1)), "example %d: %d targets", (int)i, counted);
    check(e->items[i].length == (int)n && e->items[i].prompt == (int)a, "example %d: %d tokens, %d of the prompt",
          (int)i, e->items[i].length, e->items[i].prompt);
    free(first);
    free(second);
}

static void test_rows(const Vocabulary *v, const DocumentMark *end) {
    Examples e;
    const char *error = open_text(&e,
        "{\"prompt\": \"What is it?\\n\", \"response\": \"A \\u00e9t\\u00e9, \\\"summer\\\".\"}\r\n"
        "\n  \t\r\n"
        "{\"response\":\"second\",\"prompt\":\"\"}\n"
        "   {\"text\": \"All of this counts, \\ud83d\\ude00.\"}   \n"
        "{\"prompt\": \"The same\", \"response\": \" The same\"}", v, end);
    if (!check(!error, "%s", error)) return;
    check(e.count == 4, "%d examples", (int)e.count);
    for (int T = e.longest - 1; T < e.longest + 40; T += 13) {
        expect_row(&e, 0, T, v, "What is it?\n", "A \xc3\xa9t\xc3\xa9, \"summer\".", end);
        expect_row(&e, 1, T, v, "", "second", end);
        expect_row(&e, 2, T, v, "", "All of this counts, \xf0\x9f\x98\x80.", end);
        expect_row(&e, 3, T, v, "The same", " The same", end);
    }
    int longest = 0;
    for (int64_t i = 0; i < e.count; i++) if (e.items[i].length > longest) longest = e.items[i].length;
    check(e.longest == longest && (e.longest_line == 1 || e.longest_line == 5), "the longest has %d tokens, line %d",
          e.longest, (int)e.longest_line);
    uint64_t hash = e.hash;
    examples_close(&e);
    must(open_text(&e, "{\"text\":\"two\"}", v, end));
    check(e.hash != hash && e.count == 1, "other examples have the same hash");
    examples_close(&e);
}

/* Many examples, so that memory grows several times. */
static void test_many(void) {
    enum { COUNT = 5000 };
    Examples e;
    int wrong = 0;
    char *text = must_allocate(COUNT * 48), *at = text;
    for (int i = 0; i < COUNT; i++) at += sprintf(at, "{\"prompt\":\"%d\",\"response\":\"%d\"}\n", i, i * i);
    must(open_text(&e, text, &bytes_vocabulary, &mark));
    check(e.count == COUNT, "%d examples of %d", (int)e.count, COUNT);
    for (int i = 0; i < COUNT; i++) {
        char row[64];
        int n = sprintf(row, "%d%d<|end|>", i, i * i);
        const Example *item = &e.items[i];
        wrong += item->length != n;
        for (int k = 0; k < n && k < item->length; k++) wrong += e.tokens[item->first + k] != row[k];
    }
    check(wrong == 0, "%d tokens of %d examples are wrong", wrong, COUNT);
    examples_close(&e);
    free(text);
}

static void test_refused(void) {
    static const struct { const char *text, *hint; } cases[] = {
        {"", "holds no examples"},
        {"\n\n", "holds no examples"},
        {"{\"text\":\"one\"}\nnot json\n", "line 2: column 1: expected a value"},
        {"{\"text\":\"one\"\n", "line 1: column"},
        {"{\"text\":\"one\"} {\"text\":\"two\"}\n", "line 1: column 16"},
        {"{\"prompt\":\"a\",\n\"response\":\"b\"}", "line 1: column"},
        {"{\"text\":\"\xff\"}", "expected UTF-8"},
        {"[\"a\",\"b\"]", "found an array"},
        {"\"a\"", "found a string"},
        {"null", "found null"},
        {"{}", "none of these keys"},
        {"{\"prompt\":\"a\"}", "no \"response\""},
        {"{\"response\":\"a\"}", "no \"prompt\""},
        {"{\"text\":\"a\",\"prompt\":\"b\"}", "\"text\" beside"},
        {"{\"text\":\"a\",\"response\":\"b\"}", "\"text\" beside"},
        {"{\"prompt\":\"a\",\"response\":\"b\",\"id\":7}", "found the key \"id\""},
        {"{\"instruction\":\"a\",\"output\":\"b\"}", "found the key \"instruction\""},
        {"{\"prompt\":7,\"response\":\"b\"}", "\"prompt\": expected a text, found a number"},
        {"{\"prompt\":\"a\",\"response\":null}", "\"response\": expected a text, found null"},
        {"{\"prompt\":\"a\",\"response\":[\"b\"]}", "\"response\": expected a text, found an array"},
        {"{\"prompt\":\"a\",\"response\":\"\"}", "\"response\" is empty"},
        {"{\"text\":\"\"}", "\"text\" is empty"},
        {"{\"text\":\"a\",\"text\":\"b\"}", "the key \"text\" twice"},
        {"{\"text\":\"one\"}\n{\"text\":\"two\"}\n\n{\"text\":3}\n", "line 4: \"text\": expected a text"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Examples e;
        const char *error = open_text(&e, cases[i].text, &bytes_vocabulary, &mark);
        if (check(error != NULL, "case %zu was taken", i))
            check(strstr(error, cases[i].hint) && strstr(error, path), "case %zu: expected \"%s\" in \"%s\"", i,
                  cases[i].hint, error);
        else examples_close(&e);
    }
    Examples e;
    DocumentMark none = {.line_feed = -1};
    const char *error = open_text(&e, "{\"text\":\"a\"}", &bytes_vocabulary, &none);
    check(error && strstr(error, "one token long"), "a single token: %s", error);
    Vocabulary small = {.bytes = true, .size = 100};
    error = open_text(&e, "{\"text\":\"abc\"}\n{\"text\":\"abcd\"}", &small, &none);
    check(error && strstr(error, "line 2: byte 3 of the text is 100"), "a byte outside of the vocabulary: %s", error);
    error = examples_open(&e, "/no/such/file.jsonl", &bytes_vocabulary, &mark);
    check(error && strstr(error, "cannot open"), "no file: %s", error);
    /* Damage anywhere: an error or examples, but no crash. */
    static const char good[] = "{\"prompt\":\"a\\u00e9\",\"response\":\"b\\n\"}\n{\"text\":\"c\"}\n";
    int taken = 0;
    for (size_t bit = 0; bit < 8 * (sizeof good - 1); bit++) {
        char text[sizeof good];
        memcpy(text, good, sizeof good);
        text[bit / 8] ^= (char)(1 << bit % 8);
        if (open_text(&e, text, &bytes_vocabulary, &mark)) continue;
        taken++;
        check(e.count >= 1 && e.count <= 3, "bit %zu: %d examples", bit, (int)e.count);
        examples_close(&e);
    }
    check(taken > 10, "only %d of the damaged files were examples still", taken);
}

/* Each example once in every round, in another order each time; the same seed gives the same order. */
static void test_draws(void) {
    enum { MOST = 300 };
    int wrong = 0, same_place = 0, places = 0, same_seed = 0;
    for (int64_t count = 1; count <= MOST; count += count < 20 ? 1 : 7) {
        int64_t before[MOST] = {0};
        for (int64_t round = 0; round < 3; round++) {
            bool seen[MOST] = {false};
            for (int64_t i = 0; i < count; i++) {
                int64_t drawn = examples_draw(count, 42, round * count + i);
                if (drawn < 0 || drawn >= count || seen[drawn]) wrong++;
                else seen[drawn] = true;
                if (round > 0 && count > 20) same_place += drawn == before[i], places++;
                wrong += drawn != examples_draw(count, 42, round * count + i);
                same_seed += count > 20 && drawn == examples_draw(count, 43, round * count + i);
                before[i] = drawn;
            }
        }
    }
    check(wrong == 0, "%d draws are no permutation", wrong);
    /* About one of `count` would be the same by chance: under 2% here. */
    check(same_place < places / 20, "%d of %d examples came at the place of the round before", same_place, places);
    check(same_seed < places / 20, "%d examples came at the same place with another seed", same_seed);
    check(examples_draw(INT64_C(3) << 40, 1, INT64_C(5) << 40) >= 0, "a very large number of examples");
}

/* The loss of a row is that of the response alone, whatever the padding. */
static void test_loss(const MegalodonBackend *backend) {
    enum { T = 64 };
    MegalodonConfig config = small_config();
    MegalodonOptions options = {.max_batch = 1, .max_length = T, .training = true};
    config.vocab_size = 256;
    MegalodonModel *model = model_create(backend, &config, &options, 3);
    Examples e;
    int32_t tokens[T], targets[T], all[T];
    double nll[T], sum = 0;
    MegalodonLoss loss, shorter;
    must(open_text(&e, "{\"prompt\":\"What is the answer?\",\"response\":\" 42.\"}", &bytes_vocabulary, &mark));
    int n = e.items[0].length, prompt = e.items[0].prompt;
    examples_row(&e, 0, T, tokens, targets);
    for (int t = 0; t < T; t++) all[t] = t + 1 < n ? tokens[t + 1] : MEGALODON_IGNORE;
    MegalodonBatch batch = {.tokens = tokens, .targets = all, .B = 1, .T = T};
    must(backend->forward(model, &batch, &loss));
    must(backend->get(model, MEGALODON_ACT, "nll", nll, MEGALODON_F64));
    for (int t = prompt - 1; t + 1 < n; t++) sum += nll[t];
    batch.targets = targets;
    must(backend->forward(model, &batch, &loss));
    check(loss.counted == n - prompt, "%lld targets count, not %d", (long long)loss.counted, n - prompt);
    check(fabs(loss.nll_sum / sum - 1) < 1e-5, "the loss is %.9g, by hand %.9g", loss.nll_sum, sum);
    batch.T = n - 1;
    must(backend->forward(model, &batch, &shorter));
    check(fabs(loss.nll_sum / shorter.nll_sum - 1) < 1e-5, "padding changes the loss from %.9g to %.9g",
          shorter.nll_sum, loss.nll_sum);
    examples_close(&e);
    backend->destroy(model);
}

/* Mean nll of the tokens [from, to) of a row, each predicted from those before it. */
static double mean_nll(const MegalodonBackend *backend, MegalodonModel *model, const int32_t *row, int n, int from,
                       int to) {
    int32_t targets[128];
    double nll[128], sum = 0;
    for (int t = 0; t < n; t++) targets[t] = t + 1 < n ? row[t + 1] : MEGALODON_IGNORE;
    MegalodonBatch batch = {.tokens = row, .targets = targets, .B = 1, .T = n};
    must(backend->forward(model, &batch, NULL));
    must(backend->get(model, MEGALODON_ACT, "nll", nll, MEGALODON_F64));
    for (int t = from; t < to; t++) sum += nll[t - 1];
    return sum / (to - from);
}

/* A few examples by heart: the model says the response and the end mark after each prompt, and has not learnt to say the
 * prompts. */
static void test_learning(const MegalodonBackend *backend) {
    enum { T = 40, ROWS = 4, STEPS = 30 };
    static const char text[] =
        "{\"prompt\":\"qzjx: \",\"response\":\"the sea\"}\n{\"prompt\":\"wkvy: \",\"response\":\"a hill\"}\n"
        "{\"prompt\":\"gbpd: \",\"response\":\"my dog\"}\n{\"prompt\":\"hrmc: \",\"response\":\"no one\"}\n";
    MegalodonConfig config;
    megalodon_default_config(&config);
    config.num_layers = 2;
    config.model_dim = config.ffn_hidden_dim = 64;
    config.z_dim = 32;
    config.value_dim = 64;
    config.cema_ndim = 4;
    config.chunk_size = 32;
    config.norm_num_groups = 4;
    MegalodonOptions options = {.max_batch = ROWS, .max_length = T, .training = true, .carry = true};
    MegalodonModel *model = model_create(backend, &config, &options, 1);
    Examples e;
    int32_t tokens[ROWS * T], targets[ROWS * T];
    double norm, prompts = 0, responses = 0;
    must(open_text(&e, text, &bytes_vocabulary, &mark));
    MegalodonAdamW adamw = {.lr = 3e-3, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .clip = 1};
    for (adamw.step = 1; adamw.step <= STEPS; adamw.step++) {
        for (int row = 0; row < ROWS; row++)
            examples_row(&e, examples_draw(e.count, 1, (adamw.step - 1) * ROWS + row), T, tokens + row * T,
                         targets + row * T);
        MegalodonBatch batch = {.tokens = tokens, .targets = targets, .B = ROWS, .T = T};
        MegalodonLoss loss;
        backend->zero_gradients(model);
        must(backend->forward(model, &batch, &loss));
        must(backend->backward(model, 1. / (double)loss.counted));
        must(backend->update(model, &adamw, &norm));
    }
    for (int i = 0; i < ROWS; i++) {
        const int32_t *row = e.tokens + e.items[i].first;
        int n = e.items[i].length, prompt = e.items[i].prompt;
        prompts += mean_nll(backend, model, row, n, 1, prompt - 2) / ROWS;
        responses += mean_nll(backend, model, row, n, prompt, n) / ROWS;
    }
    printf("%d steps on %d examples: %.3f nats a token of a response, %.3f of a prompt\n", STEPS, ROWS, responses,
           prompts);
    check(responses < 0.3, "the responses are not learnt: %.3f nats", responses);
    check(prompts > 3, "the prompts are learnt, too: %.3f nats", prompts);
    examples_close(&e);
    backend->destroy(model);
}

int main(void) {
    test_begin("finetune");
    int file = mkstemp(path);
    if (!check(file >= 0, "no file for the test")) return test_end();
    close(file);
    must(vocabulary_fit(&bytes_vocabulary, 256));
    must(vocabulary_load(&bpe, "tests/tokenizer/tokenizer.json"));
    must(vocabulary_fit(&bpe, bpe.size));
    must(document_mark_text(&mark, "<|end|>"));
    DocumentMark none = {.line_feed = -1}, token;
    document_mark_token(&token, tokenizer_id(&bpe.tok, "<|endoftext|>"));
    test_rows(&bytes_vocabulary, &mark);
    test_rows(&bytes_vocabulary, &none);
    test_rows(&bpe, &token);
    test_rows(&bpe, &none);
    test_many();
    test_refused();
    test_draws();
    test_loss(&megalodon_cpu);
    test_loss(&megalodon_cpu_double);
    test_learning(&megalodon_cpu);
    vocabulary_close(&bpe);
    unlink(path);
    return test_end();
}
