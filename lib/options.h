/* options.h - the command line of a program, declared once.
 *
 * A program lists its options in one X-macro. The struct that holds the values, the parser, the range checks, --help
 * and the configuration that is printed at the start all derive from that list:
 *
 *     #define OPTIONS(X) \
 *         X(INT,  batch, "8",  1, 65536, "ROWS", "Training", "sequences in one forward pass") \
 *         X(TEXT, data,  NULL, 0, 0,     "PATH", "Data",     "text file or folder of text files")
 *     typedef struct Values { OPTIONS(OPTION_MEMBER) } Values;
 *     static const Option table[] = { OPTIONS(OPTION_ROW) };
 *
 *     options_init(&set, "train", "--data PATH [options]", "Trains a model.");
 *     options_add(&set, table, OPTION_COUNT(table), &values);
 *     die_if(options_parse(&set, argc, argv, &help));
 *
 * A field num_layers is spelled --num-layers. Options are long and take their value as `--name value` or
 * `--name=value`; a FLAG takes none. Nothing is clamped or guessed: a value that is not exactly right is an error.
 *
 * Besides --help each program knows --man, which --help does not list: it writes the same page as a manual page, and
 * --man=NAME does so for a program that is installed as NAME. `make install` uses it.
 */
#ifndef LIB_OPTIONS_H
#define LIB_OPTIONS_H

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

typedef enum { OPTION_INT, OPTION_LONG, OPTION_REAL, OPTION_BOOL, OPTION_CHOICE, OPTION_TEXT, OPTION_FLAG } OptionType;

typedef struct Option {
    const char *field;           /* name in the struct; '_' is spelled '-' on the command line             */
    OptionType type;
    size_t offset;               /* of the value in the program's struct                                    */
    const char *fallback;        /* default, as one would type it; NULL: none (0, false or NULL)            */
    double low, high;            /* least and largest number allowed; high may not pass 2^53                */
    const char *unit;            /* what --help calls the value; a CHOICE lists its words here: "a|b|c"     */
    const char *group, *help;    /* heading in --help, and one sentence                                     */
} Option;

/* C types of the values. A CHOICE is kept as its word. */
#define OPTION_C_INT    int
#define OPTION_C_LONG   int64_t
#define OPTION_C_REAL   double
#define OPTION_C_BOOL   bool
#define OPTION_C_CHOICE const char *
#define OPTION_C_TEXT   const char *
#define OPTION_C_FLAG   bool

#define OPTION_MEMBER(type, field, fallback, low, high, unit, group, help) OPTION_C_##type field;
/* A program that uses OPTION_ROW names its struct Values. */
#define OPTION_ROW(type, field, fallback, low, high, unit, group, help) \
    {#field, OPTION_##type, offsetof(Values, field), fallback, low, high, unit, group, help},
#define OPTION_COUNT(table) ((int)(sizeof(table) / sizeof((table)[0])))

#define OPTIONS_SYNTAX "Options take a value as --name value or --name=value. [defaults] stand in brackets."

enum { OPTIONS_MAX = 96, OPTION_NAME_MAX = 32, OPTION_HELP_COLUMN = 30, OPTION_WIDTH = 100 };

typedef struct OptionSet {
    const char *program, *usage, *summary;
    int count;
    Option rows[OPTIONS_MAX];
    char names[OPTIONS_MAX][OPTION_NAME_MAX];    /* as typed, without the dashes          */
    void *values[OPTIONS_MAX];                   /* where each value is stored            */
    const char *texts[OPTIONS_MAX];              /* each value as text; NULL: none        */
    const char *man;                             /* name of the manual page that is asked for; NULL: none  */
    bool given[OPTIONS_MAX];                     /* was it on the command line?           */
} OptionSet;

/* ------------------------------------------------------------------------------------------------------------------
 * Building the set.
 */

static inline void options_init(OptionSet *set, const char *program, const char *usage, const char *summary) {
    memset(set, 0, sizeof *set);
    set->program = program;
    set->usage = usage;
    set->summary = summary;
}

/* Index of an option by its name as typed (without dashes), or -1. */
static inline int options_find(const OptionSet *set, const char *name) {
    for (int i = 0; i < set->count; i++)
        if (strcmp(set->names[i], name) == 0) return i;
    return -1;
}

/* For the program's own questions: a name that does not exist is a mistake in the program. */
static inline int options_index(const OptionSet *set, const char *name) {
    int i = options_find(set, name);
    if (i < 0) {
        fprintf(stderr, "%s: internal error: no option is called %s\n", set->program, name);
        abort();
    }
    return i;
}

static inline bool options_given(const OptionSet *set, const char *name) {
    return set->given[options_index(set, name)];
}

/* A value as it stands between quotes in an error: short, on one line, without control characters. */
static inline const char *option_quoted(const char *text) {
    static _Thread_local char out[64];
    size_t n = 0;
    for (; n < sizeof out - 4 && text[n]; n++) out[n] = iscntrl((unsigned char)text[n]) ? '?' : text[n];
    snprintf(out + n, sizeof out - n, "%s", text[n] ? "..." : "");
    return out;
}

/* What a value has to be, for errors: "a whole number from 1 to 8". */
static inline void option_expected(const Option *option, char *out, size_t size) {
    switch (option->type) {
    case OPTION_INT:
    case OPTION_LONG:
        snprintf(out, size, "a whole number from %.16g to %.16g", option->low, option->high);
        break;
    case OPTION_REAL:
        snprintf(out, size, "a number from %.16g to %.16g", option->low, option->high);
        break;
    case OPTION_BOOL:
        snprintf(out, size, "true or false");
        break;
    case OPTION_CHOICE: {
        size_t n = (size_t)snprintf(out, size, "one of ");
        for (const char *c = option->unit; *c && n + 3 < size; c++) {
            if (*c == '|') out[n++] = ',', out[n++] = ' ';
            else out[n++] = *c;
        }
        out[n] = 0;
        break;
    }
    default:
        snprintf(out, size, "some text");
    }
}

/* Is `word` one of "a|b|c"? */
static inline bool option_is_choice(const char *choices, const char *word) {
    size_t n = strlen(word);
    for (const char *c = choices; n > 0 && *c;) {
        size_t length = strcspn(c, "|");
        if (length == n && memcmp(c, word, n) == 0) return true;
        c += length + (c[length] == '|');
    }
    return false;
}

/* Digits with at most a minus sign in front, and nothing else. */
static inline bool option_number_is_whole(const char *text, int64_t *out) {
    const char *digits = text + (*text == '-');
    if (!*digits || digits[strspn(digits, "0123456789")]) return false;
    errno = 0;
    *out = strtoll(text, NULL, 10);
    if (errno) *out = *text == '-' ? INT64_MIN : INT64_MAX;    /* out of any option's range */
    return true;
}

/* A decimal number. strtod alone would also take spaces, hexadecimal, "inf" and "nan". */
static inline bool option_number_is_real(const char *text, double *out) {
    char *end;
    if (!strpbrk(text, "0123456789") || text[strspn(text, "0123456789.eE+-")]) return false;
    errno = 0;
    *out = strtod(text, &end);
    if (errno == ERANGE && fabs(*out) < 1) *out = NAN;         /* it would silently become zero */
    return *end == 0 && end != text && *text != '+';
}

/* Checks `text` and stores it as the value of option i. `text` must live as long as the set. Error: option, what was
 * expected, what was found. */
static inline const char *options_set(OptionSet *set, int i, const char *text) {
    const Option *option = &set->rows[i];
    char expected[512];
    int64_t whole = 0;
    double real = 0;
    bool ok = true;
    option_expected(option, expected, sizeof expected);
    if (!*text) return errorf("--%s is empty; expected %s", set->names[i], expected);
    switch (option->type) {
    case OPTION_INT:
    case OPTION_LONG:
        ok = option_number_is_whole(text, &whole) && (double)whole >= option->low && (double)whole <= option->high;
        if (ok && option->type == OPTION_INT) *(int *)set->values[i] = (int)whole;
        else if (ok) *(int64_t *)set->values[i] = whole;
        break;
    case OPTION_REAL:
        ok = option_number_is_real(text, &real) && real >= option->low && real <= option->high;
        if (ok) *(double *)set->values[i] = real;
        break;
    case OPTION_BOOL:
    case OPTION_FLAG:
        ok = strcmp(text, "true") == 0 || strcmp(text, "false") == 0;
        if (ok) *(bool *)set->values[i] = *text == 't';
        break;
    case OPTION_CHOICE:
        ok = option_is_choice(option->unit, text);
        if (ok) *(const char **)set->values[i] = text;
        break;
    case OPTION_TEXT:
        *(const char **)set->values[i] = text;
        break;
    }
    if (!ok) return errorf("--%s: expected %s, found \"%s\"", set->names[i], expected, option_quoted(text));
    set->texts[i] = text;
    return NULL;
}

/* Stores what an option without a default is until it is given: 0, false or NULL. */
static inline void options_clear(OptionSet *set, int i) {
    switch (set->rows[i].type) {
    case OPTION_INT:
        *(int *)set->values[i] = 0;
        break;
    case OPTION_LONG:
        *(int64_t *)set->values[i] = 0;
        break;
    case OPTION_REAL:
        *(double *)set->values[i] = 0;
        break;
    case OPTION_BOOL:
    case OPTION_FLAG:
        *(bool *)set->values[i] = false;
        break;
    case OPTION_CHOICE:
    case OPTION_TEXT:
        *(const char **)set->values[i] = NULL;
        break;
    }
}

/* Adds a table whose values live in the struct at `values`, and stores the defaults. A table that is wrong in itself
 * (too long, a name twice, a default out of range) is a mistake in the program, which ends at once. */
static inline void options_add(OptionSet *set, const Option *table, int count, void *values) {
    for (int row = 0; row < count; row++) {
        char name[OPTION_NAME_MAX];
        size_t length = strlen(table[row].field);
        int i = set->count;
        if (i == OPTIONS_MAX || length >= sizeof name) abort();
        for (size_t c = 0; c <= length; c++) name[c] = table[row].field[c] == '_' ? '-' : table[row].field[c];
        if (options_find(set, name) >= 0) abort();
        memcpy(set->names[i], name, length + 1);
        set->rows[i] = table[row];
        set->values[i] = (char *)values + table[row].offset;
        set->count++;
        options_clear(set, i);
        if (!table[row].fallback) continue;
        const char *error = options_set(set, i, table[row].fallback);
        if (error) {
            fprintf(stderr, "%s: internal error: default of %s\n", set->program, error);
            abort();
        }
    }
}

/* ------------------------------------------------------------------------------------------------------------------
 * Parsing.
 */

/* Edits (insert, delete, replace) that turn a into b; names are short, so one row of the table is enough. */
static inline int option_distance(const char *a, const char *b) {
    int row[OPTION_NAME_MAX + 1], m = (int)strlen(a), n = (int)strlen(b);
    if (m > OPTION_NAME_MAX || n > OPTION_NAME_MAX) return m + n;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; i <= m; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int replace = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            int change = row[j] < row[j - 1] ? row[j] + 1 : row[j - 1] + 1;
            row[j] = replace < change ? replace : change;
        }
    }
    return row[n];
}

/* The option that was probably meant, or NULL: the first that starts with `name`, else the closest by edits. */
static inline const char *options_closest(const OptionSet *set, const char *name) {
    const char *best = NULL;
    int least = (int)strlen(name) / 3 + 2;
    for (int i = 0; i < set->count && strlen(name) >= 3; i++)
        if (strncmp(set->names[i], name, strlen(name)) == 0) return set->names[i];
    for (int i = 0; i < set->count; i++) {
        int distance = option_distance(name, set->names[i]);
        if (distance < least) least = distance, best = set->names[i];
    }
    return best;
}

/* Reads the command line into the values. *help: --help, -h or --man was there, and nothing after it was looked at.
 * Error: the first thing that is wrong. The texts of argv must stay. */
static inline const char *options_parse(OptionSet *set, int argc, char **argv, bool *help) {
    *help = false;
    for (int a = 1; a < argc; a++) {
        char name[OPTION_NAME_MAX] = "";
        if (strcmp(argv[a], "--help") == 0 || strcmp(argv[a], "-h") == 0) {
            *help = true;
            return NULL;
        }
        if (strcmp(argv[a], "--man") == 0 || (strncmp(argv[a], "--man=", 6) == 0 && argv[a][6])) {
            set->man = argv[a][5] ? argv[a] + 6 : set->program;
            *help = true;
            return NULL;
        }
        if (strncmp(argv[a], "--", 2) != 0)
            return errorf("unexpected argument \"%s\"; options are spelled --name value (see --help)",
                          option_quoted(argv[a]));
        const char *equals = strchr(argv[a], '=');
        size_t length = equals ? (size_t)(equals - argv[a] - 2) : strlen(argv[a] + 2);
        if (length < sizeof name) memcpy(name, argv[a] + 2, length);
        int i = options_find(set, name);
        if (i < 0) {
            const char *closest = length < sizeof name ? options_closest(set, name) : NULL;
            if (closest) return errorf("unknown option --%s; did you mean --%s?", option_quoted(name), closest);
            return errorf("unknown option %s; --help lists all of them", option_quoted(argv[a]));
        }
        if (set->given[i]) return errorf("--%s is given twice", name);
        set->given[i] = true;
        const char *value = equals ? equals + 1 : a + 1 < argc ? argv[a + 1] : NULL;
        if (set->rows[i].type == OPTION_FLAG) {
            if (equals) return errorf("--%s takes no value, found \"%s\"", name, option_quoted(value));
            value = "true";
        } else if (!equals) {
            if (!value) return errorf("--%s needs a value (%s)", name, set->rows[i].unit);
            if (strncmp(value, "--", 2) == 0)
                return errorf("--%s needs a value (%s), found the option %s; a value that starts with dashes is "
                              "written --%s=VALUE", name, set->rows[i].unit, option_quoted(value), name);
            a++;
        }
        const char *error = options_set(set, i, value);
        if (error) return error;
    }
    return NULL;
}

/* ------------------------------------------------------------------------------------------------------------------
 * Printing.
 */

/* Prints words from `column` on, with line breaks before `OPTION_WIDTH`; the next lines start at `indent`. */
static inline void option_print_wrapped(FILE *file, const char *words, int column, int indent) {
    while (*words) {
        int length = (int)strcspn(words, " ");
        if (column > indent && column + 1 + length > OPTION_WIDTH) {
            fprintf(file, "\n%*s", indent, "");
            column = indent;
        } else if (column > indent) {
            fputc(' ', file);
            column++;
        }
        fprintf(file, "%.*s", length, words);
        column += length;
        words += length + (words[length] == ' ');
    }
    fputc('\n', file);
}

/* The range worth telling: one that excludes nothing sensible would only be noise. */
static inline void option_describe(const Option *option, char *out, size_t size) {
    bool number = option->type == OPTION_INT || option->type == OPTION_LONG || option->type == OPTION_REAL;
    size_t n = (size_t)snprintf(out, size, "%s", option->help);
    if (number && n < size && option->high < 1e6)
        n += (size_t)snprintf(out + n, size - n, " (%.16g to %.16g)", option->low, option->high);
    if (option->fallback && option->type != OPTION_FLAG && n < size)
        snprintf(out + n, size - n, " [%s]", option->fallback);
}

/* Prints a text of one line as troff, the language of manual pages, which would take "-" for a hyphen, "'" for a
 * quotation mark, and a line that begins with a period for a command. */
static inline void option_print_troff(FILE *file, const char *text) {
    static const char special[] = "\\-'`^~";
    static const char *const spelled[] = {"\\e", "\\-", "\\(aq", "\\(ga", "\\(ha", "\\(ti"};
    if (*text == '.') fputs("\\&", file);
    for (; *text; text++) {
        const char *found = strchr(special, *text);
        if (found) fputs(spelled[found - special], file);
        else fputc(*text, file);
    }
}

/* What stands before the options of a manual page. Its title is the summary's first sentence without the period. */
static inline void options_print_man_head(FILE *file, const OptionSet *set) {
    const char *end = strstr(set->summary, ". ");
    char title[256];
    snprintf(title, sizeof title, "%.*s", end ? (int)(end - set->summary) : (int)strlen(set->summary) - 1, set->summary);
    fprintf(file, ".TH \"");
    for (const char *c = set->man; *c; c++) fputc(toupper((unsigned char)*c), file);
    fprintf(file, "\" 1 \"\" \"megalodon.c\"\n.ad l\n.SH NAME\n");
    option_print_troff(file, set->man);
    fprintf(file, " \\- ");
    option_print_troff(file, title);
    fprintf(file, "\n.SH SYNOPSIS\n\\fB");
    option_print_troff(file, set->man);
    fprintf(file, "\\fR ");
    option_print_troff(file, set->usage);
    fprintf(file, "\n.SH DESCRIPTION\n");
    option_print_troff(file, set->summary);
    fprintf(file, "\n.PP\nThe exit status is 0 if all went well, and 1 after an error, which standard error tells in one "
                  "sentence.\n.SH OPTIONS\n");
    option_print_troff(file, OPTIONS_SYNTAX);
    fputc('\n', file);
}

/* A heading of the help page or, if that is asked for, of the manual page. */
static inline void options_print_heading(FILE *file, const OptionSet *set, const char *heading) {
    if (set->man) {
        fprintf(file, ".SS ");
        option_print_troff(file, heading);
        fputc('\n', file);
    } else {
        fprintf(file, "\n%s\n", heading);
    }
}

/* A row under it: a term such as "--batch", its value such as "ROWS" or "", and what there is to say. */
static inline void options_print_row(FILE *file, const OptionSet *set, const char *term, const char *unit,
                                     const char *text) {
    if (set->man) {
        fprintf(file, ".TP\n\\fB");
        option_print_troff(file, term);
        fprintf(file, "\\fR");
        if (*unit) {
            fprintf(file, " \\fI");
            option_print_troff(file, unit);
            fprintf(file, "\\fR");
        }
        fputc('\n', file);
        option_print_troff(file, text);
        fputc('\n', file);
    } else {
        int column = fprintf(file, "  %s%s%s", term, *unit ? " " : "", unit);
        if (column + 2 > OPTION_HELP_COLUMN) column = fprintf(file, "\n") - 1;
        fprintf(file, "%*s", OPTION_HELP_COLUMN - column, "");
        option_print_wrapped(file, text, OPTION_HELP_COLUMN, OPTION_HELP_COLUMN);
    }
}

/* The help page, or the manual page: usage, summary, every option under its group with range and default. */
static inline void options_print_help(FILE *file, const OptionSet *set) {
    if (set->man) {
        options_print_man_head(file, set);
    } else {
        fprintf(file, "usage: %s %s\n\n", set->program, set->usage);
        option_print_wrapped(file, set->summary, 0, 0);
        fprintf(file, "\n%s\n", OPTIONS_SYNTAX);
    }
    for (int i = 0; i < set->count; i++) {
        const Option *option = &set->rows[i];
        char term[OPTION_NAME_MAX + 2], text[1024];
        if (i == 0 || strcmp(option->group, set->rows[i - 1].group) != 0)
            options_print_heading(file, set, option->group);
        /* Long lists of words would push everything else to the right: they go into the text. */
        bool words = option->type == OPTION_CHOICE && strlen(option->unit) + strlen(set->names[i]) > 24;
        snprintf(term, sizeof term, "--%s", set->names[i]);
        option_describe(option, text, sizeof text);
        if (words) {
            size_t n = strlen(text);
            snprintf(text + n, sizeof text - n, ": %s", option->unit);
        }
        options_print_row(file, set, term, option->type == OPTION_FLAG ? "" : words ? "NAME" : option->unit, text);
    }
    if (set->man) options_print_heading(file, set, "Help");
    else fputc('\n', file);
    options_print_row(file, set, "--help, -h", "", "this page");
}

/* Prints a value so that a shell reads it back as one word. */
static inline int option_format(char *out, size_t size, const char *name, const char *text) {
    static const char plain[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-+./,:=@%";
    bool quote = text[strspn(text, plain)] != 0;
    int n = snprintf(out, size, "--%s %s", name, quote ? "'" : "");
    for (; *text && n + 8 < (int)size; text++) {
        if (*text == '\'') n += snprintf(out + n, size - (size_t)n, "'\\''");
        else out[n++] = *text;
    }
    return n + snprintf(out + n, size - (size_t)n, "%s", quote ? "'" : "");
}

/* Prints every value that is set, a paragraph a group, in the form in which one could type it again. */
static inline void options_print_values(FILE *file, const OptionSet *set) {
    enum { INDENT = 13 };
    const char *group = "";
    int column = 0;
    for (int i = 0; i < set->count; i++) {
        const Option *option = &set->rows[i];
        char item[4096];
        if (!set->texts[i]) continue;
        int length = option_format(item, sizeof item, set->names[i], set->texts[i]);
        if (option->type == OPTION_FLAG) length = snprintf(item, sizeof item, "--%s", set->names[i]);
        if (strcmp(group, option->group) != 0) {
            fprintf(file, "%s%-*s", *group ? "\n" : "", INDENT, option->group);
            group = option->group;
            column = INDENT;
        } else if (column + 1 + length > OPTION_WIDTH) {
            fprintf(file, "\n%*s", INDENT, "");
            column = INDENT;
        } else {
            column += fprintf(file, " ");
        }
        column += fprintf(file, "%s", item);
    }
    fprintf(file, "\n");
}

#endif
