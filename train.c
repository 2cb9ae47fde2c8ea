/* train.c - trains a Megalodon on text.
 *
 *     ./train --data my.txt
 *
 * What a step needs comes in the order in which it is needed: the rows of a batch, the learning rate, the step itself,
 * evaluation, samples, the loop, main. Options, checkpoints and setting up are in lib/trainer.h. The model is behind
 * the table of functions in megalodon.h: nothing here knows which backend computes it.
 *
 * A run is exact: the rows of a step are a function of (seed, step, row), or with --carry-state of where the rows were
 * before, so a run that was saved and resumed computes the same bits as one that was never stopped, with any number of
 * threads.
 */
#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif

#include <float.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "megalodon.h"
#include "lib/error.h"
#include "lib/report.h"
#include "lib/sampler.h"
#include "lib/text.h"
#include "lib/trainer.h"

/* The first Ctrl-C, SIGTERM or SIGHUP asks the loop to stop after its step and to save; a second one ends the program at
 * once. Where nobody reads the output any more (`| head`), the run is saved and ends too, quietly. */
static volatile sig_atomic_t stop_signal = 0;

static void on_signal(int signal) {
    if (stop_signal && signal != SIGPIPE) _exit(128 + signal);
    if (!stop_signal) stop_signal = signal;
}

static void catch_signals(void) {
    static const int signals[] = {SIGINT, SIGTERM, SIGHUP, SIGPIPE};
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART}, before;
    sigemptyset(&action.sa_mask);
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) {
        bool ignored = sigaction(signals[i], NULL, &before) == 0 && before.sa_handler == SIG_IGN;
        if (!ignored || signals[i] != SIGHUP) sigaction(signals[i], &action, NULL);       /* nohup stays nohup */
    }
}

static const char *signal_name(int signal) {
    return signal == SIGINT ? "Ctrl-C" : signal == SIGTERM ? "SIGTERM" : signal == SIGHUP ? "SIGHUP" : "SIGPIPE";
}

/* ------------------------------------------------------------------------------------------------------------
 * Data of a step.
 */

/* Fills row `row` of the batch with the window that starts at token `start` of the range, or with example `start`. The
 * targets are the tokens one place further; --within-documents leaves out those that begin a document. */
static void load_row(Run *run, const Range *range, int64_t start, int64_t row) {
    int T = run->values.seq_len;
    int32_t *tokens = run->tokens + row * T, *targets = run->targets + row * T;
    if (range->examples) {
        examples_row(range->examples, range->first + start, T, tokens, targets);
        return;
    }
    die_if(dataset_window(range->data, range->first + start, (int64_t)T + 1, run->window));
    memcpy(tokens, run->window, (size_t)T * sizeof *tokens);
    memcpy(targets, run->window + 1, (size_t)T * sizeof *targets);
    if (run->values.within_documents)
        die_if(documents_leave_out(&run->mark, range->data, range->first + start, T, run->window, targets));
}

/* The rows of a step start at random places; examples come each once before any comes again. Rows are counted from the
 * start of the run, so no state has to be saved, and --batch 8 --accumulate 2 sees what --batch 16 sees. */
static void load_random_rows(Run *run, int64_t rows) {
    const Range *range = &run->training;
    uint64_t key = megalodon_random((uint64_t)run->values.seed, 0x64617461); /* "data": apart from other uses */
    uint64_t starts = (uint64_t)(range->count - run->values.seq_len);
    for (int64_t row = 0; row < rows; row++) {
        int64_t counter = run->step * rows + row;
        int64_t start = range->examples ? examples_draw(range->count, key, counter)
                                        : (int64_t)(megalodon_random(key, (uint64_t)counter) % starts);
        load_row(run, range, start, row);
    }
}

/* With --carry-state, row b of each pass is the next segment of stream b. */
static void load_next_segments(Run *run, int64_t rows) {
    int64_t T = run->values.seq_len;
    for (int64_t row = 0; row < rows; row++)
        die_if(streams_next(&run->streams, (int)(row % run->values.batch), run->tokens + row * T,
                            run->targets + row * T, &run->fresh[row]));
}

/* How many of the first `places` targets count, and in *bytes how much text they stand for. */
static int64_t count_targets(const Run *run, int64_t places, int64_t *bytes) {
    int64_t counted = 0;
    for (int64_t i = 0; i < places; i++) {
        if (run->targets[i] == MEGALODON_IGNORE) continue;
        *bytes += vocabulary_token_bytes(&run->vocabulary, run->targets[i]);
        counted++;
    }
    return counted;
}

/* Loads all rows of the next step, pass after pass; returns how many targets count, or 1 where none does: short rows
 * can lie between documents alone, and their loss of 0 has to be divided by something. */
static int64_t load_step(Run *run) {
    int64_t rows = (int64_t)run->values.batch * run->values.accumulate;
    int64_t places = tokens_per_step(run), bytes = 0;
    if (run->values.carry_state) load_next_segments(run, rows);
    else load_random_rows(run, rows);
    int64_t counted = count_targets(run, places, &bytes);
    run->places += places;
    run->padding += places - counted;
    run->bytes_per_token = run->bytes_known && counted > 0 ? (double)bytes / (double)counted : NAN;
    return counted > 0 ? counted : 1;
}

/* ------------------------------------------------------------------------------------------------------------
 * The rows' state, which --carry-state passes from one segment to the next. The gradient does not follow it.
 */

/* Empties the state of the rows that begin a document in this pass. Returns whether the forward pass goes on from a
 * state: not where all rows begin one, as at the start of a run. */
static bool carry_rows(Run *run, int pass) {
    int B = run->values.batch, empty = 0;
    const bool *fresh = run->fresh + (int64_t)pass * B;
    if (!run->values.carry_state) return false;
    for (int row = 0; row < B; row++) empty += fresh[row];
    if (empty == 0 || empty == B) return empty == 0;
    die_if(run->backend->reset_rows(run->model, fresh));
    return true;
}

/* Numbers that are not finite would stay in the state for ever: after a bad step all rows start from an empty one. */
static void forget_rows(Run *run) {
    for (int row = 0; run->values.carry_state && row < run->values.batch; row++) run->streams.fresh[row] = true;
}

/* An evaluation and a sample use the training model itself. In between, the program holds the rows' state. */
static void hold_state(Run *run) {
    if (run->values.carry_state) die_if(state_take(&run->held, run->backend, run->model, &run->config));
}
static void return_state(Run *run) {
    if (run->values.carry_state) die_if(state_give(&run->held, run->backend, run->model));
}

/* ------------------------------------------------------------------------------------------------------------
 * Learning rate of the step after `step` finished ones:
 *     warm-up    lr * (step + 1) / warmup
 *     then       lr * (r + (1 - r) * f(p)),  r = min_lr_ratio, p = share of the steps after the warm-up,
 *                f(p) = (1 + cos(pi p)) / 2, or 1 - p, or 1
 */
static double learning_rate(const Values *v, int64_t step) {
    if (step < v->warmup) return v->lr * (double)(step + 1) / (double)v->warmup;
    double p = v->steps > v->warmup ? (double)(step - v->warmup) / (double)(v->steps - v->warmup) : 1;
    double f = 1;
    if (strcmp(v->schedule, "cosine") == 0) f = 0.5 * (1 + cos(3.14159265358979323846 * p));
    if (strcmp(v->schedule, "linear") == 0) f = 1 - p;
    return v->lr * (v->min_lr_ratio + (1 - v->min_lr_ratio) * f);
}

/* ------------------------------------------------------------------------------------------------------------
 * One step: forward and backward over all passes, then the update. A loss or a norm that is not finite, or a spike,
 * changes no weight; the step is counted and the run goes on, up to --max-bad-steps in a row.
 */

/* One pass of step `step`, which starts from an empty state. */
static MegalodonBatch batch_of(const Run *run, int64_t step, int pass) {
    const Values *v = &run->values;
    int64_t first = (int64_t)pass * v->batch * v->seq_len;
    return (MegalodonBatch){.tokens = run->tokens + first, .targets = run->targets + first, .B = v->batch,
                            .T = v->seq_len, .dropout = true, .seed = (uint64_t)v->seed,
                            .step = (uint64_t)step * (uint64_t)v->accumulate + (uint64_t)pass};
}

static void train_step(Run *run, ReportRow *row) {
    const Values *v = &run->values;
    double start = report_seconds(), nll_sum = 0, scale = 1 / (double)load_step(run);
    run->bad_pass = -1;
    run->loss_limit = guard_limit(&run->guard, GUARD_LOSS, v->spike_guard);
    run->norm_limit = guard_limit(&run->guard, GUARD_NORM, v->spike_guard);
    run->backend->zero_gradients(run->model);
    for (int pass = 0; pass < v->accumulate; pass++) {
        MegalodonBatch batch = batch_of(run, run->step, pass);
        MegalodonLoss loss;
        batch.carry = carry_rows(run, pass);
        die_if(run->backend->forward(run->model, &batch, &loss));
        die_if(run->backend->backward(run->model, scale));
        nll_sum += loss.nll_sum;
        if (!isfinite(loss.nll_sum) && run->bad_pass < 0) run->bad_pass = pass;
    }
    MegalodonAdamW adamw = {.lr = learning_rate(v, run->step), .beta1 = v->beta1, .beta2 = v->beta2,
                            .eps = v->adam_eps, .weight_decay = v->weight_decay, .clip = v->clip,
                            .step = run->updates + 1, .spare_cema = !v->cema_decay};
    double loss = nll_sum * scale, norm = NAN;
    if (isfinite(run->norm_limit)) adamw.max_norm = run->norm_limit;
    if (loss > run->loss_limit) adamw.max_norm = DBL_MIN;                    /* tells the norm and changes nothing */
    if (isfinite(loss)) die_if(run->backend->update(run->model, &adamw, &norm));
    bool finite = isfinite(loss) && isfinite(norm), good;
    run->spike = finite && (loss > run->loss_limit || norm > run->norm_limit);
    good = finite && !run->spike;
    if (good && v->spike_guard > 0) guard_learn(&run->guard, loss, norm);
    run->step++;
    run->updates += good;
    run->bad_steps += !good;
    run->bad_in_a_row = good ? 0 : run->bad_in_a_row + 1;
    if (!good) forget_rows(run);

    double seconds = report_seconds() - start;
    *row = (ReportRow){.step = run->step, .steps = v->steps, .tokens = run->step * tokens_per_step(run),
                       .loss = loss, .bytes_per_token = run->bytes_per_token, .val_loss = NAN, .val_bpb = NAN,
                       .grad_norm = fabs(norm), .lr = adamw.lr,
                       .ms = 1e3 * seconds, .tokens_per_s = (double)tokens_per_step(run) / seconds};
}

/* Too many steps in a row were skipped. */
static bool has_failed(const Run *run) { return run->bad_in_a_row >= run->values.max_bad_steps; }

/* Says where in the last step numbers stopped being finite; empty if it was a spike. It may take the model apart to find
 * out, so the run ends after it. */
static void find_cause(Run *run, char *out, size_t size) {
    char tensor[DIVERGENCE_NAME] = "";
    MegalodonOptions options = {.precision = run->precision, .max_bytes = backend_bytes(run->backend)};
    MegalodonBatch batch = batch_of(run, run->step - 1, run->bad_pass < 0 ? 0 : run->bad_pass);
    *out = '\0';
    if (run->spike) return;
    bool found = divergence_in_parameters(run->backend, run->model, &run->config, tensor);
    if (!found && run->bad_pass < 0)
        found = divergence_in_gradients(run->backend, run->model, &run->config, tensor);
    else if (!found)
        found = divergence_in_forward(run->backend, &run->model, &run->config, &options, &batch, tensor);
    if (found) snprintf(out, size, "; the first tensor that is not finite, in the order of computation, is %s", tensor);
}

/* Tells of a step that was skipped, and ends the run when there were too many. */
static void check_bad_step(Run *run, const ReportRow *row) {
    char spike[96] = "", cause[160 + DIVERGENCE_NAME];
    if (run->bad_in_a_row == 0) return;
    report_clear_bar(&run->report);
    if (run->spike)
        snprintf(spike, sizeof spike, ", a spike: up to %g and %g were expected", run->loss_limit, run->norm_limit);
    fprintf(stderr, "step %lld: loss %g, gradient norm %g%s; the step was skipped (%d in a row, %lld in all)\n",
            (long long)run->step, row->loss, row->grad_norm, spike, run->bad_in_a_row, (long long)run->bad_steps);
    if (!has_failed(run)) return;
    const char *what = run->spike ? "skipped" : "not finite";
    const char *hint = "a lower --lr, a longer --warmup or a smaller --clip may help";
    find_cause(run, cause, sizeof cause);
    if (run->saved_step >= 0)
        die(errorf("%d steps in a row were %s; the last good checkpoint is step %lld in %s%s; %s", run->bad_in_a_row,
                   what, (long long)run->saved_step, run->values.checkpoint_dir, cause, hint));
    die(errorf("%d steps in a row were %s; no checkpoint was saved%s; %s", run->bad_in_a_row, what, cause, hint));
}

/* ------------------------------------------------------------------------------------------------------------
 * Evaluation: mean loss in nats a token over rows at fixed places, evenly spread over the held-out data, so that
 * two evaluations differ only by the model. Each row starts from an empty state.
 */
static void evaluate(Run *run, ReportRow *report) {
    const Values *v = &run->values;
    bool examples = run->held_out.examples != NULL;
    int64_t T = v->seq_len, last = run->held_out.count - (examples ? 1 : T + 1);     /* last possible start */
    int64_t rows = (int64_t)v->eval_batches * v->batch;
    int64_t fitting = examples ? run->held_out.count : (run->held_out.count - 1) / T;
    double nll_sum = 0;
    int64_t counted = 0, bytes = 0;
    if (rows > fitting) rows = fitting;                                      /* no token counts twice */
    hold_state(run);
    for (int64_t first = 0; first < rows; first += v->batch) {
        int B = (int)(rows - first < v->batch ? rows - first : v->batch);
        for (int row = 0; row < B; row++) {
            int64_t start = rows > 1 ? (int64_t)((double)last * (double)(first + row) / (double)(rows - 1)) : 0;
            load_row(run, &run->held_out, start, row);
        }
        MegalodonBatch batch = {.tokens = run->tokens, .targets = run->targets, .B = B, .T = (int)T};
        MegalodonLoss loss;
        die_if(run->backend->forward(run->model, &batch, &loss));
        nll_sum += loss.nll_sum;
        counted += count_targets(run, B * T, &bytes);
    }
    return_state(run);
    report->val_loss = nll_sum / (double)counted;
    if (run->bytes_known && bytes > 0) report->val_bpb = report_bits(nll_sum / (double)bytes);
}

/* ------------------------------------------------------------------------------------------------------------
 * A sample of the model's own text, at temperature 0.8. It uses the training model itself, one row, and leaves
 * weights and gradients alone.
 */
static void print_sample(Run *run) {
    const Values *v = &run->values;
    const Vocabulary *vocabulary = &run->vocabulary;
    TextWriter writer = {.file = stdout, .printable = true};
    Sampler sampler;
    int V = run->config.vocab_size;
    float *logits = malloc((size_t)V * sizeof *logits);
    if (!logits) die("no memory for a sample's logits");
    die_if(sampler_create(&sampler, V, 0.8, 0, 1, megalodon_random((uint64_t)v->seed, (uint64_t)run->step)));
    hold_state(run);
    report_clear_bar(&run->report);
    printf("sample: %s", v->prompt);
    for (size_t at = 0; at < run->prompt_count;) {
        size_t left = run->prompt_count - at;
        int n = left < (size_t)v->seq_len ? (int)left : v->seq_len;
        die_if(text_feed(run->backend, run->model, run->prompt + at, n, at > 0));
        at += (size_t)n;
    }
    for (int64_t i = 0; i < v->sample_tokens && !stop_signal; i++) {
        int32_t token;
        die_if(run->backend->last_logits(run->model, logits));
        vocabulary_forbid(vocabulary, logits);
        die_if(sampler_next(&sampler, logits, &token));
        vocabulary_put(vocabulary, &writer, token);
        die_if(text_feed(run->backend, run->model, &token, 1, true));
    }
    return_state(run);
    text_end(&writer);
    printf("\n");
    fflush(stdout);
    sampler_destroy(&sampler);
    free(logits);
}

/* ------------------------------------------------------------------------------------------------------------
 * The loop around it.
 */

static bool is_due(int64_t step, int64_t every) {
    return every > 0 && step % every == 0;
}

static void print_evaluation(Run *run, const ReportRow *row) {
    report_clear_bar(&run->report);
    if (run->report.quiet) return;
    printf("step %lld: held-out loss %.4f nats", (long long)run->step, row->val_loss);
    if (isfinite(row->val_bpb)) printf(" | %.4f bits/byte", row->val_bpb);
    printf("\n");
    fflush(stdout);
}

/* The last line, also of a quiet run. */
static void print_end(Run *run, const ReportRow *row, double seconds) {
    char tokens[32], time[32];
    report_clear_bar(&run->report);
    if (stop_signal) printf("stopped by %s", signal_name(stop_signal));
    else printf("done");
    printf(" after step %lld of %lld: %s tokens, %s", (long long)run->step, (long long)run->values.steps,
           report_count(run->step * tokens_per_step(run), tokens), report_duration(seconds, time));
    if (isfinite(row->val_loss)) printf("; held-out loss %.4f nats", row->val_loss);
    if (isfinite(row->val_bpb)) printf(" = %.4f bits/byte", row->val_bpb);
    if (run->bad_steps > 0) printf("; %lld steps skipped", (long long)run->bad_steps);
    if (run->padding > 0) printf("; %.1f%% padding", 100. * (double)run->padding / (double)run->places);
    if (run->saved_step >= 0) printf("; saved in %s", run->values.checkpoint_dir);
    else printf("; nothing was saved");
    printf("\n");
}

static void train(Run *run) {
    const Values *v = &run->values;
    double start = report_seconds(), loss_sum = 0, bytes_sum = 0, ms_sum = 0;
    int64_t first = run->step, summed = 0;
    ReportRow row = {.val_loss = NAN, .val_bpb = NAN};
    while (run->step < v->steps && !stop_signal) {
        train_step(run, &row);
        bool last = run->step == v->steps;
        row.seconds_left = (report_seconds() - start) / (double)(run->step - first) * (double)(v->steps - run->step);
        loss_sum += row.loss;
        bytes_sum += row.bytes_per_token;
        ms_sum += row.ms;
        summed++;
        if (is_due(run->step, v->log_every) || last || run->step == first + 1) {
            ReportRow mean = row;
            mean.loss = loss_sum / (double)summed;
            mean.bytes_per_token = bytes_sum / (double)summed;
            mean.ms = ms_sum / (double)summed;
            mean.tokens_per_s = 1e3 * (double)tokens_per_step(run) / mean.ms;
            report_line(&run->report, &mean);
            loss_sum = bytes_sum = ms_sum = 0;
            summed = 0;
        }
        report_bar(&run->report, &row);
        if (run->held_out.count > 0 && (is_due(run->step, v->eval_every) || last) && !has_failed(run)) {
            evaluate(run, &row);
            print_evaluation(run, &row);
        }
        write_log(run, &row);
        check_bad_step(run, &row);
        if (is_due(run->step, v->sample_every)) print_sample(run);
        if (is_due(run->step, v->save_every) && !last) save(run, false);
    }
    if (run->saved_step != run->step) save(run, true);
    print_end(run, &row, report_seconds() - start);
}

int main(int argc, char **argv) {
    static Run run;                                          /* large for a stack */
    safetensors_catch_signals();
    if (!set_up_run(&run, argc, argv)) return 0;
    catch_signals();
    train(&run);
    end_run(&run);
    return 0;
}
