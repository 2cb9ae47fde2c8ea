/* shim.c - a disk that fails on purpose: a library to be preloaded into a program of ours.
 *
 *     SHIM_FOLDER=/tmp/run SHIM_ROOM=5000 LD_PRELOAD=build/shim.so ./train ...
 *
 * Only files and folders whose names begin with SHIM_FOLDER are touched. What goes wrong there:
 *
 *     SHIM_ROOM=N            the disk is full after N bytes: the write that passes N is short, the next ones fail
 *     SHIM_FLIP=N            byte number N that is written has a bit changed, and nothing is said
 *     SHIM_FAIL=CALL         a call fails: fopen, fsync, rename or mkdir
 *     SHIM_ERROR=N           with this errno (default ENOSPC)
 *     SHIM_AFTER=N           only after N calls of it that work
 *     SHIM_TIMES=N           so many times (default: for ever); for SHIM_ROOM, failing writes before there is room again
 *
 * Files that are opened for writing become streams whose bytes pass through shim_write below, because the C library's
 * own streams do not call `write` by a name that could be taken over.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { STREAMS = 64 };

static struct { FILE *file; int descriptor; } streams[STREAMS];      /* those that shim_write serves */
static long long written, failures, calls;

static long long setting(const char *name, long long fallback) {
    const char *text = getenv(name);
    return text ? atoll(text) : fallback;
}

static bool is_ours(const char *path) {
    const char *folder = getenv("SHIM_FOLDER");
    return folder && strncmp(path, folder, strlen(folder)) == 0;
}

/* Should this call fail? errno is set then. */
static bool fails(const char *call, const char *path) {
    const char *chosen = getenv("SHIM_FAIL");
    if (!chosen || strcmp(chosen, call) != 0 || (path && !is_ours(path))) return false;
    if (calls++ < setting("SHIM_AFTER", 0)) return false;
    if (failures >= setting("SHIM_TIMES", 1LL << 60)) return false;
    failures++;
    errno = (int)setting("SHIM_ERROR", ENOSPC);
    return true;
}

static ssize_t shim_write(void *cookie, const char *bytes, size_t size) {
    int descriptor = (int)(long)cookie;
    long long room = setting("SHIM_ROOM", 1LL << 60) - written, flip = setting("SHIM_FLIP", -1);
    if (room < (long long)size && failures < setting("SHIM_TIMES", 1LL << 60)) {
        failures++;
        ssize_t some = room > 0 ? write(descriptor, bytes, (size_t)room) : 0;
        written += some > 0 ? some : 0;
        errno = ENOSPC;
        return some > 0 ? some : 0;      /* less than `size` is how such a stream says that it failed */
    }
    char *copy = malloc(size + 1);
    if (!copy) return 0;
    memcpy(copy, bytes, size);
    if (flip >= written && flip < written + (long long)size) copy[flip - written] ^= 4;
    ssize_t some = write(descriptor, copy, size);
    free(copy);
    written += some > 0 ? some : 0;
    return some > 0 ? some : 0;
}

static int shim_seek(void *cookie, off64_t *offset, int whence) {
    off64_t at = lseek64((int)(long)cookie, *offset, whence);
    if (at >= 0) *offset = at;
    return at >= 0 ? 0 : -1;
}

static int shim_close(void *cookie) {
    for (int i = 0; i < STREAMS; i++)
        if (streams[i].file && streams[i].descriptor == (int)(long)cookie) streams[i].file = NULL;
    return close((int)(long)cookie);
}

FILE *fopen(const char *path, const char *mode) {
    FILE *(*real)(const char *, const char *) = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, "fopen");
    if (mode[0] == 'r' || !is_ours(path)) return real(path, mode);
    if (fails("fopen", path)) return NULL;
    int descriptor = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0666), i = 0;
    if (descriptor < 0) return NULL;
    cookie_io_functions_t functions = {.write = shim_write, .seek = shim_seek, .close = shim_close};
    FILE *file = fopencookie((void *)(long)descriptor, mode, functions);
    while (i < STREAMS - 1 && streams[i].file) i++;
    streams[i].file = file;
    streams[i].descriptor = descriptor;
    return file;
}

/* The name where a program asked for large files. */
FILE *fopen64(const char *path, const char *mode) { return fopen(path, mode); }

int fileno(FILE *file) {
    int (*real)(FILE *) = (int (*)(FILE *))dlsym(RTLD_NEXT, "fileno");
    for (int i = 0; i < STREAMS; i++)
        if (streams[i].file == file) return streams[i].descriptor;
    return real(file);
}

int fsync(int descriptor) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return fails("fsync", NULL) ? -1 : real(descriptor);
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
    return fails("rename", to) ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    int (*real)(const char *, mode_t) = (int (*)(const char *, mode_t))dlsym(RTLD_NEXT, "mkdir");
    return fails("mkdir", path) ? -1 : real(path, mode);
}
