/* lock.h - one run a folder: a lock that a run holds on the folder of its checkpoints for as long as it lives.
 *
 *     FolderLock lock = {.descriptor = -1};
 *     die_if(lock_take(&lock, "runs/demo"));
 *     ... before each write: die_if(lock_keep(&lock, "runs/demo"));
 *     lock_release(&lock);
 *
 * The system gives the lock back when the process ends, however it ends, so a file called `lock` that was left behind
 * locks nothing and is used again. Needs POSIX: see safetensors.h.
 */
#ifndef LIB_LOCK_H
#define LIB_LOCK_H

#include "checkpoint.h"              /* first: it asks for POSIX */

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"

typedef struct FolderLock {
    int descriptor;                  /* of FOLDER/lock; -1: no lock is held                        */
    bool impossible;                 /* the file system knows no locks: there is nothing to hold   */
} FolderLock;

static inline void lock_release(FolderLock *lock) {
    if (lock->descriptor >= 0) close(lock->descriptor);      /* which gives the lock back */
    lock->descriptor = -1;
}

/* Takes the lock of a folder, which is created if need be; so this also tells whether one can write there at all.
 * Error: another process has it, and which; or the folder cannot be created or written. */
static inline const char *lock_take(FolderLock *lock, const char *folder) {
    char path[SAFETENSORS_MAX_PATH];
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    lock_release(lock);
    const char *error = checkpoint_make_directory(folder);
    if (!error) error = checkpoint_join(path, folder, "lock");
    if (error) return error;
    lock->descriptor = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (lock->descriptor < 0) return errorf("%s: cannot write in this folder: %s", folder, strerror(errno));
    lock->impossible = false;
    if (fcntl(lock->descriptor, F_SETLK, &whole) == 0) return NULL;
    if (errno == EACCES || errno == EAGAIN) {
        bool known = fcntl(lock->descriptor, F_GETLK, &whole) == 0 && whole.l_type != F_UNLCK && whole.l_pid > 0;
        char process[48] = "";
        if (known) snprintf(process, sizeof process, " (process %ld)", (long)whole.l_pid);
        error = errorf("%s: another run%s writes its checkpoints here; let it end first, or choose another folder",
                       folder, process);
    } else {
        lock->impossible = true;
    }
    lock_release(lock);
    return error;
}

/* Makes sure that the lock is still that of the folder: one that was removed and created again has lost its own.
 * Error: as for lock_take. */
static inline const char *lock_keep(FolderLock *lock, const char *folder) {
    char path[SAFETENSORS_MAX_PATH];
    struct stat held, there;
    const char *error = checkpoint_join(path, folder, "lock");
    if (error || lock->impossible) return error;
    bool same = lock->descriptor >= 0 && fstat(lock->descriptor, &held) == 0 && stat(path, &there) == 0 &&
                held.st_ino == there.st_ino && held.st_dev == there.st_dev;
    return same ? NULL : lock_take(lock, folder);
}

#endif
