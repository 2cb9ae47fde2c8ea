/* fuzz.h - what the fuzzing targets share.
 *
 * A target hands arbitrary bytes to one reader and ends the program if an answer is wrong. Reads and writes out of
 * bounds, leaks and undefined arithmetic are the sanitizers' to find. `make fuzz` builds each fuzz_NAME.c with clang's
 * libFuzzer and starts it from the files of corpus/NAME.
 *
 * The readers take paths. Inputs lie in a file without a directory (memfd), so that a run touches no disk.
 */
#ifndef TESTS_FUZZ_H
#define TESTS_FUZZ_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE                  /* memfd_create */
#endif

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* What libFuzzer calls. */
int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

/* Ends the program with a finding if `ok` is false. */
#define expect(ok, ...)                                                                        \
    do {                                                                                       \
        if (ok) break;                                                                         \
        dprintf(STDERR_FILENO, "%s:%d: ", __FILE__, __LINE__);                                 \
        dprintf(STDERR_FILENO, __VA_ARGS__);                                                   \
        dprintf(STDERR_FILENO, "\n");                                                          \
        abort();                                                                               \
    } while (0)

/* An error names what went wrong in a sentence that fits, and is none of the empty ones. */
static inline void expect_sentence(const char *error) {
    if (error) expect(strlen(error) > 8 && strlen(error) < 1024, "an error of %zu bytes", strlen(error));
}

/* A file that exists in memory alone. `path` opens it. */
typedef struct FuzzFile {
    int descriptor;
    char path[64];
} FuzzFile;

static inline void fuzz_file_write(FuzzFile *file, const void *bytes, size_t size, size_t offset) {
    expect(size == 0 || pwrite(file->descriptor, bytes, size, (off_t)offset) == (ssize_t)size, "cannot write %s",
           file->path);
}

/* Makes the file hold `size` bytes. It is created by the first call. */
static inline void fuzz_file(FuzzFile *file, const void *bytes, size_t size) {
    if (file->path[0] == '\0') {
        file->descriptor = memfd_create("fuzz", MFD_CLOEXEC);
        expect(file->descriptor >= 0, "cannot create a file in memory");
        snprintf(file->path, sizeof file->path, "/proc/self/fd/%d", file->descriptor);
    }
    fuzz_file_write(file, bytes, size, 0);
    /* Afterwards: the pages of the input before are used again, and the system need not make new ones. */
    expect(ftruncate(file->descriptor, (off_t)size) == 0, "cannot truncate %s", file->path);
}

/* The same for a safetensors file. Bytes that start with '{' are a header up to their first 0 byte, with the data behind
 * it, and get the length that the header has: a fuzzer that inserts a letter would have to guess it. Other bytes are the
 * file as it is. */
static inline void fuzz_safetensors_file(FuzzFile *file, const uint8_t *bytes, size_t size) {
    const uint8_t *zero = size > 0 && bytes[0] == '{' ? memchr(bytes, 0, size) : NULL;
    if (!zero) {
        fuzz_file(file, bytes, size);
        return;
    }
    size_t length = (size_t)(zero - bytes);
    uint8_t prefix[8];
    for (int i = 0; i < 8; i++) prefix[i] = (uint8_t)((uint64_t)length >> 8 * i);
    fuzz_file(file, prefix, 8);
    fuzz_file_write(file, bytes, length, 8);
    fuzz_file_write(file, zero + 1, size - length - 1, 8 + length);
}

#endif
