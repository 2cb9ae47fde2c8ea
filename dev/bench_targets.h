/* bench_targets.h - the shapes that this project wants to be fast at, and what each has to reach.
 *
 * Every row is a run of this program in a process of its own, so that one that fails, for want of memory or
 * otherwise, costs its own line only. Options that are given beside `targets` replace those of every row.
 */
#ifndef DEV_BENCH_TARGETS_H
#define DEV_BENCH_TARGETS_H

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "bench.h"

enum { ROW_SECONDS = 90, MOST_ARGUMENTS = 128, MOST_CHARACTERS = 4096 };

typedef struct Target {
    const char *name, *unit;         /* unit: of the number that counts                        */
    double must, goal;               /* for one H100; milliseconds and GiB are good when small */
    const char *command;             /* NULL: another number of the row before                 */
} Target;

#define OF_7B " --preset mega7.3B --num-layers 2 --chunk-size 4096 --vocab-size 512 --forward-backward"
static const Target targets[] = {
    {"step mega200M 8x4096", "tokens/s", 350e3, 420e3, "step --preset mega200M --batch 8 --seq-len 4096"},
    {"  its memory", "GiB", 20, 14, NULL},
    {"step mega200M 1x32768", "tokens/s", 350e3, 420e3, "step --preset mega200M --batch 1 --seq-len 32768"},
    {"step mega1.3B 4x4096", "tokens/s", 62e3, 72e3, "step --preset mega1.3B --batch 4 --seq-len 4096"},
    {"step mega1.3B 1x32768", "tokens/s", 60e3, 72e3, "step --preset mega1.3B --batch 1 --seq-len 32768"},
    {"2 blocks of 7.3B 4x4096", "tokens/s", 185e3, 205e3, "step --batch 4 --seq-len 4096" OF_7B},
    {"2 blocks of 7.3B 1x32768", "tokens/s", 185e3, 205e3, "step --batch 1 --seq-len 32768" OF_7B},
    {"step bytes12M 32x2048", "tokens/s", 3e6, 4.5e6, "step --preset bytes12M --batch 32 --seq-len 2048"},
    {"CEMA 8x4096x1024", "ms", 0.9, 0.5,
     "components --only cema --preset mega200M --batch 8 --seq-len 4096"},
    {"CEMA 1x32768x1024", "ms", 0.9, 0.5,
     "components --only cema --preset mega200M --batch 1 --seq-len 32768"},
    {"TimestepNorm 8x4096x1024", "ms", 0.35, 0.2,
     "components --only timestepnorm --preset mega200M --batch 8 --seq-len 4096"},
    {"TimestepNorm 1x32768x1024", "ms", 0.35, 0.2,
     "components --only timestepnorm --preset mega200M --batch 1 --seq-len 32768"},
    {"generate mega200M", "tokens/s", 3500, 5500, "generate --preset mega200M --batch 1 --seq-len 512"},
    {"generate mega1.3B", "tokens/s", 700, 950, "generate --preset mega1.3B --batch 1 --seq-len 512"},
    {"read mega200M 1x4096", "tokens/s", 900e3, 1.3e6, "read --preset mega200M --batch 1 --seq-len 4096"},
};
enum { NUM_TARGETS = sizeof targets / sizeof *targets };

/* The arguments of a run, and the memory of those that are put together here. */
typedef struct Arguments {
    char *list[MOST_ARGUMENTS + 1];
    int count;
    char memory[MOST_CHARACTERS];
    size_t used;
} Arguments;

static void add_argument(Arguments *a, const char *text, size_t length) {
    if (a->count == MOST_ARGUMENTS || a->used + length + 1 > sizeof a->memory)
        die("bench targets: too many options, or too long ones");
    char *copy = a->memory + a->used;
    memcpy(copy, text, length);
    copy[length] = 0;
    a->used += length + 1;
    a->list[a->count++] = copy;
    a->list[a->count] = NULL;
}

static bool is_given(const Bench *bench, const char *name, size_t length) {
    for (int i = 0; i < bench->set.count; i++)
        if (bench->set.given[i] && strlen(bench->set.names[i]) == length &&
            memcmp(bench->set.names[i], name, length) == 0)
            return true;
    return false;
}

/* Words between spaces, without the options (and their values) that the user gave. */
static void add_words(Arguments *a, const Bench *bench, const char *words) {
    for (bool skip = false; *words; words += strspn(words, " ")) {
        size_t length = strcspn(words, " ");
        bool option = strncmp(words, "--", 2) == 0;
        skip = option ? is_given(bench, words + 2, length - 2) : skip;
        if (!skip) add_argument(a, words, length);
        words += length;
    }
}

/* The options that the user gave, for a run of `benchmark`. */
static void add_given(Arguments *a, const Bench *bench, bool (*matters)(const char *, const char *),
                      const char *benchmark) {
    for (int i = 0; i < bench->set.count; i++) {
        char option[OPTION_NAME_MAX + 3];
        const char *name = bench->set.names[i];
        if (!bench->set.given[i] || strcmp(name, "csv") == 0 || !matters(name, benchmark)) continue;
        snprintf(option, sizeof option, "--%s", name);
        add_argument(a, option, strlen(option));
        if (bench->set.rows[i].type == OPTION_FLAG) continue;
        add_argument(a, bench->set.texts[i], strlen(bench->set.texts[i]));
    }
}

/* Runs this program. Returns true if it ended well; else `why` (MOST_CHARACTERS) holds the last line that it
 * said, or what ended it. */
static bool run_row(const Bench *bench, const Arguments *a, char *why) {
    int ends[2], status = 0;
    char line[MOST_CHARACTERS];
    fflush(NULL);
    if (pipe(ends) != 0) die(errorf("bench targets: no pipe: %s", strerror(errno)));
    pid_t child = fork();
    if (child < 0) die(errorf("bench targets: no process: %s", strerror(errno)));
    if (child == 0) {
        dup2(ends[1], 1), dup2(ends[1], 2);
        close(ends[0]), close(ends[1]);
        alarm(ROW_SECONDS);                      /* stays with the program that takes over */
        execv("/proc/self/exe", a->list);
        execvp(bench->program, a->list);
        fprintf(stderr, "error: %s cannot be run: %s\n", bench->program, strerror(errno));
        _exit(1);
    }
    close(ends[1]);
    FILE *output = fdopen(ends[0], "r");
    if (!output) die(errorf("bench targets: no stream: %s", strerror(errno)));
    strcpy(why, "it said nothing");
    while (fgets(line, sizeof line, output)) {
        line[strcspn(line, "\n")] = 0;
        if (*line) strcpy(why, line);
    }
    fclose(output);
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {}
    if (WIFSIGNALED(status)) {
        if (WTERMSIG(status) == SIGALRM)
            snprintf(why, MOST_CHARACTERS, "it took longer than %d s", ROW_SECONDS);
        else snprintf(why, MOST_CHARACTERS, "it was ended by signal %d", WTERMSIG(status));
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

/* The numbers of a row that the table shows; NAN: the run told none. */
typedef struct Row { double ms, tokens, share, gib; } Row;

/* Reads what a run wrote, the first number of each unit, and repeats it in our own file. */
static Row read_row(const Bench *bench, const char *path) {
    Row row = {NAN, NAN, NAN, NAN};
    char line[512];
    FILE *file = fopen(path, "r");
    if (!file) return row;
    for (int i = 0; fgets(line, sizeof line, file); i++) {
        char benchmark[64], what[128], unit[64];
        double value;
        if (i == 0 || sscanf(line, "%63[^,],%127[^,],%63[^,],%lf", benchmark, what, unit, &value) != 4)
            continue;
        if (strcmp(benchmark, "ceilings") == 0) continue;
        if (bench->csv) fputs(line, bench->csv);
        const struct { const char *unit; double *to; } places[] = {
            {"ms", &row.ms}, {"tokens/s", &row.tokens}, {"share of the ceiling", &row.share},
            {"GiB", &row.gib}};
        for (size_t p = 0; p < sizeof places / sizeof *places; p++)
            if (strcmp(unit, places[p].unit) == 0 && isnan(*places[p].to)) *places[p].to = value;
    }
    fclose(file);
    return row;
}

/* A number with three or four digits that matter, or "-"; in a column of `width`. */
static void print_number(double x, int width) {
    if (isnan(x)) printf(" %*s", width, "-");
    else printf(" %*.*f", width, x < 1 ? 4 : x < 100 ? 2 : x < 1000 ? 1 : 0, x);
}

/* Did the user replace shapes or models? Then the rows are not what their names say. */
static bool rows_are_changed(const Bench *bench) {
    for (int i = 0; i < bench->set.count; i++)
        if (bench->set.given[i] && strcmp(bench->set.rows[i].group, "Running") != 0) return true;
    return false;
}

/* Ends the program where the rows as they are would take hours and all of the memory. */
static void refuse_targets(const Bench *bench) {
    if (!bench->on_gpu && !rows_are_changed(bench))
        die("bench targets: its shapes are for a GPU; on the cpu backend give its rows others, for example "
            "--preset demo --batch 1 --seq-len 64");
}

/* A line of the table. failure: why the row failed, or NULL; some of its numbers may be there anyway. */
static void print_target(const Bench *bench, const Target *target, const Row *row, const char *failure) {
    bool is_rate = strcmp(target->unit, "tokens/s") == 0, is_memory = strcmp(target->unit, "GiB") == 0;
    double value = is_rate ? row->tokens : is_memory ? row->gib : row->ms;
    char share[16], wanted[64];
    bool goal = is_rate ? value >= target->goal : value <= target->goal;
    bool must = is_rate ? value >= target->must : value <= target->must;
    const char *reached = goal ? "goal" : must ? "must" : "not yet";
    printf("%-27s", target->name);
    print_number(target->command ? row->ms : NAN, 10);
    print_number(target->command ? row->tokens : NAN, 10);
    printf(" %6s", target->command ? percent(row->share, share) : "-");
    print_number(row->gib, 7);
    snprintf(wanted, sizeof wanted, "%g, %g %s", target->must, target->goal, target->unit);
    if (failure) printf("  failed: %s\n", failure);
    else if (rows_are_changed(bench)) printf("\n");
    else printf("  %-26s %s\n", wanted, isnan(value) ? "no number" : reached);
    record(bench, "targets", target->name + strspn(target->name, " "), target->unit, value);
}

static void print_heading(const Bench *bench) {
    if (rows_are_changed(bench))
        printf("note: the options given replace the rows' own; their names do not tell it\n");
    printf("%-27s %10s %10s %6s %7s  %-26s %s\n", "", "ms", "tokens/s", "share", "GiB",
           "must, goal (one H100)", "reached");
}

/* Starts the arguments of a run of `command`, whose first word is the benchmark. */
static void begin_arguments(Arguments *a, const Bench *bench, const char *command, const char *path) {
    char precision[32];
    a->count = 0, a->used = 0;
    add_argument(a, bench->program, strlen(bench->program));
    add_words(a, bench, command);
    snprintf(precision, sizeof precision, "--precision %s", bench->values.precision);
    add_words(a, bench, precision);
    add_words(a, bench, "--repeats 5");
    add_argument(a, "--csv", 5);
    add_argument(a, path, strlen(path));
}

/* Measures every row; returns how many failed. matters: does an option do anything in a benchmark? */
static int run_targets(Bench *bench, bool (*matters)(const char *option, const char *benchmark)) {
    char path[] = "/tmp/megalodon_bench_XXXXXX", why[MOST_CHARACTERS], ceilings[128];
    static Arguments arguments;
    Row row = {NAN, NAN, NAN, NAN};
    int failed = 0;
    double start = report_seconds();
    bool ran = false;
    int file = mkstemp(path);
    if (file < 0) die(errorf("bench targets: %s cannot be made: %s", path, strerror(errno)));
    close(file);
    const Ceilings *c = &bench->ceilings;
    snprintf(ceilings, sizeof ceilings, "--ceilings %.6g,%.6g,%.6g",
             isfinite(c->product) ? 1e-12 * c->product : 0, isfinite(c->fp32) ? 1e-12 * c->fp32 : 0,
             isfinite(c->memory) ? 1e-9 * c->memory : 0);
    print_heading(bench);
    for (int i = 0; i < NUM_TARGETS; i++) {
        const Target *target = &targets[i];
        if (target->command) {
            char benchmark[32] = "";
            memcpy(benchmark, target->command, strcspn(target->command, " "));
            begin_arguments(&arguments, bench, target->command, path);
            add_words(&arguments, bench, ceilings);
            add_given(&arguments, bench, matters, benchmark);
            if (truncate(path, 0) != 0) die(errorf("bench targets: %s: %s", path, strerror(errno)));
            ran = run_row(bench, &arguments, why);
            row = read_row(bench, path);
        }
        print_target(bench, target, &row, ran ? NULL : why);
        failed += !ran;
    }
    unlink(path);
    printf("%d rows in %.0f s, %d failed\n", NUM_TARGETS, report_seconds() - start, failed);
    return failed;
}

#endif
