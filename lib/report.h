/* report.h - what training tells: one line an interval, a bar on a terminal, a CSV file.
 */
#ifndef LIB_REPORT_H
#define LIB_REPORT_H

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "error.h"

/* Seconds on a clock that is never set back. */
static inline double report_seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* "1,234,567"; out has room for 32 bytes. Returns out. */
static inline const char *report_count(int64_t n, char *out) {
    char digits[32];
    int length = snprintf(digits, sizeof digits, "%lld", (long long)n), at = 0;
    for (int i = 0; i < length; i++) {
        if (i > 0 && (length - i) % 3 == 0 && digits[i - 1] != '-') out[at++] = ',';
        out[at++] = digits[i];
    }
    out[at] = 0;
    return out;
}

/* "45s", "1m05s", "2h03m", "3d04h"; out has room for 32 bytes. Returns out. */
static inline const char *report_duration(double seconds, char *out) {
    int64_t s = seconds < 0 ? 0 : seconds > 1e15 ? (int64_t)1e15 : (int64_t)(seconds + 0.5);
    if (s < 60) snprintf(out, 32, "%llds", (long long)s);
    else if (s < 3600) snprintf(out, 32, "%lldm%02llds", (long long)(s / 60), (long long)(s % 60));
    else if (s < 86400) snprintf(out, 32, "%lldh%02lldm", (long long)(s / 3600), (long long)(s / 60 % 60));
    else snprintf(out, 32, "%lldd%02lldh", (long long)(s / 86400), (long long)(s / 3600 % 24));
    return out;
}

/* "12.3 MiB"; out has room for 32 bytes. Returns out. */
static inline const char *report_bytes(int64_t bytes, char *out) {
    static const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
    double n = (double)bytes;
    int unit = 0;
    for (; n >= 1024 && unit < 4; unit++) n /= 1024;
    snprintf(out, 32, unit ? "%.1f %s" : "%.0f %s", n, units[unit]);
    return out;
}

/* One finished step. NAN stands for "not measured". */
typedef struct ReportRow {
    int64_t step, steps;             /* steps done, and all that there will be               */
    int64_t tokens;                  /* seen since the very start                            */
    double loss;                     /* nats a token                                         */
    double bytes_per_token;          /* of text, in the targets of that loss; NAN: not known */
    double val_loss, val_bpb;        /* held out: nats a token, bits a byte                  */
    double grad_norm, lr;            /* the norm is the one before clipping                  */
    double ms, tokens_per_s;
    double seconds_left;
} ReportRow;

/* ------------------------------------------------------------------------------------------------------------------
 * Lines and the bar. On a terminal the last line is a bar that is drawn over; files get plain lines alone.
 */

typedef struct Report {
    bool terminal, quiet;
    bool bar_shown;
    double bar_drawn;                /* when, in seconds                                      */
    FILE *csv;
    const char *csv_path;
} Report;

static inline double report_bits(double nats) {
    return nats / log(2);
}

static inline void report_clear_bar(Report *report) {
    if (report->bar_shown) printf("\r\033[K");
    report->bar_shown = false;
}

/* The line of an interval; `loss` and `ms` are means over it. */
static inline void report_line(Report *report, const ReportRow *row) {
    char left[32];
    report_clear_bar(report);
    if (report->quiet) return;
    int width = snprintf(NULL, 0, "%lld", (long long)row->steps);
    printf("step %*lld/%lld | loss %.4f nats", width, (long long)row->step, (long long)row->steps, row->loss);
    if (row->bytes_per_token > 0) printf(" | %.4f bits/byte", report_bits(row->loss) / row->bytes_per_token);
    printf(" | norm %.3f | lr %.3e | %.1f ms | %.0f tok/s | left %s\n", row->grad_norm, row->lr, row->ms,
           row->tokens_per_s, report_duration(row->seconds_left, left));
    fflush(stdout);
}

/* The bar: at most ten times a second, so that drawing it costs nothing. */
static inline void report_bar(Report *report, const ReportRow *row) {
    enum { WIDTH = 30 };
    double now = report_seconds();
    char bar[WIDTH + 1], left[32];
    if (!report->terminal || report->quiet || now - report->bar_drawn < 0.1) return;
    int done = row->steps > 0 ? (int)(WIDTH * row->step / row->steps) : WIDTH;
    for (int i = 0; i < WIDTH; i++) bar[i] = i < done ? '#' : '.';
    bar[WIDTH] = 0;
    printf("\r[%s] %3.0f%% step %lld/%lld, loss %.4f, left %s\033[K", bar,
           row->steps > 0 ? 100. * (double)row->step / (double)row->steps : 100., (long long)row->step,
           (long long)row->steps, row->loss, report_duration(row->seconds_left, left));
    fflush(stdout);
    report->bar_drawn = now;
    report->bar_shown = true;
}

/* ------------------------------------------------------------------------------------------------------------------
 * The CSV file: a row a step.
 */

#define REPORT_CSV_HEADER "step,tokens,loss,val_loss,val_bpb,grad_norm,lr,ms,tokens_per_s\n"

/* Copies the header and the rows up to `step` of an earlier log, so that a resumed run goes on where its checkpoint
 * was made, whatever was logged after it. Anything that is not such a log is refused, not overwritten. */
static inline const char *report_csv_copy(const char *path, FILE *from, FILE *to, int64_t step) {
    char line[512];
    if (!fgets(line, sizeof line, from)) return NULL;
    if (strcmp(line, REPORT_CSV_HEADER) != 0)
        return errorf("--log %s: exists and is not a log of this program; choose another name", path);
    /* A row that was cut off by a kill has no line feed and is left out. */
    while (fgets(line, sizeof line, from) && strchr(line, '\n') && strtoll(line, NULL, 10) <= step) fputs(line, to);
    return NULL;
}

/* Opens the log. After step 0 it starts anew; else the rows up to `step` of an earlier log are kept. Error: file and
 * reason. */
static inline const char *report_csv_open(Report *report, const char *path, int64_t step) {
    size_t size = strlen(path) + 8;
    char *fresh = malloc(size);
    if (!fresh) return errorf("--log %s: no memory for its name", path);
    snprintf(fresh, size, "%s.tmp", path);
    FILE *old = fopen(path, "r");
    const char *error = NULL;
    report->csv = fopen(fresh, "w");
    report->csv_path = path;
    if (!report->csv) error = errorf("--log %s: cannot be written: %s", path, strerror(errno));
    if (!error) fputs(REPORT_CSV_HEADER, report->csv);
    if (!error && old) error = report_csv_copy(path, old, report->csv, step > 0 ? step : -1);
    if (!error && (fflush(report->csv) != 0 || rename(fresh, path) != 0))
        error = errorf("--log %s: cannot be written: %s", path, strerror(errno));
    if (error && report->csv) remove(fresh);
    if (old) fclose(old);
    free(fresh);
    return error;
}

/* A number, or nothing where there is none. Nine digits tell every float apart. */
static inline void report_csv_number(FILE *file, double x, const char *after) {
    if (isfinite(x)) fprintf(file, "%.9g%s", x, after);
    else fprintf(file, "%s%s", isnan(x) ? "" : x > 0 ? "inf" : "-inf", after);
}

/* Appends a row, whole, so that another program can follow the file. Error: file and reason (a full disk). */
static inline const char *report_csv_row(Report *report, const ReportRow *row) {
    FILE *csv = report->csv;
    if (!csv) return NULL;
    fprintf(csv, "%lld,%lld,", (long long)row->step, (long long)row->tokens);
    report_csv_number(csv, row->loss, ",");
    report_csv_number(csv, row->val_loss, ",");
    report_csv_number(csv, row->val_bpb, ",");
    report_csv_number(csv, row->grad_norm, ",");
    report_csv_number(csv, row->lr, ",");
    fprintf(csv, "%.3f,%.1f\n", row->ms, row->tokens_per_s);
    if (fflush(csv) != 0) return errorf("--log %s: cannot be written: %s", report->csv_path, strerror(errno));
    return NULL;
}

#endif
