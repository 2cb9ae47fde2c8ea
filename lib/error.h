/* error.h - one way to report what went wrong.
 *
 * A function that can fail returns NULL when it worked and otherwise one sentence: what, where, what was expected, what
 * was found, and a hint. Library code passes the sentence up; only a program ends, with die().
 */
#ifndef LIB_ERROR_H
#define LIB_ERROR_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#define ERROR_FORMAT(text, first) __attribute__((__format__(__printf__, text, first)))
#else
#define ERROR_FORMAT(text, first)
#endif

enum { ERROR_MAX = 1024 };           /* bytes of a sentence; a longer one is cut */

/* Formats a sentence and returns it; it stays valid until the next errorf in the same thread. An earlier sentence may
 * be among the arguments, so that a caller can put its own context in front of what it was told. */
ERROR_FORMAT(1, 2) static inline const char *errorf(const char *format, ...) {
    static _Thread_local char sentence[ERROR_MAX];
    char fresh[ERROR_MAX];           /* the arguments may point into `sentence` */
    va_list args;
    va_start(args, format);
    vsnprintf(fresh, sizeof fresh, format, args);
    va_end(args);
    for (char *s = fresh; *s; s++)   /* names out of a stranger's file must not steer the terminal */
        if ((*s > 0 && *s < ' ' && *s != '\n') || *s == 0x7F) *s = '?';
    memcpy(sentence, fresh, strlen(fresh) + 1);
    return sentence;
}

/* Clang's analyser does not look into a function with "..." and follows paths on which it returns NULL. */
#ifdef __clang_analyzer__
#define errorf(...) ((void)printf(__VA_ARGS__), "a sentence")
#endif

/* Ends a program because of its user's input or its environment: "error: SENTENCE" on stderr, exit status 1. What the
 * program printed before comes first, also where stdout and stderr are one file. */
_Noreturn static inline void die(const char *sentence) {
    fflush(stdout);
    fprintf(stderr, "error: %s\n", sentence);
    exit(1);
}

/* die(), if there is something to say. */
static inline void die_if(const char *sentence) {
    if (sentence) die(sentence);
}

#endif
