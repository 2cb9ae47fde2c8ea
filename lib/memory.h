/* memory.h - how much memory there is to take, so that a program can refuse a model that does not fit instead of being
 * killed in the middle of it.
 */
#ifndef LIB_MEMORY_H
#define LIB_MEMORY_H

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <unistd.h>

/* A number of bytes in a file of one line; -1 where there is no such file, or a word such as "max" in it. */
static inline int64_t memory_read(const char *path) {
    FILE *file = fopen(path, "r");
    long long bytes = -1;
    if (!file) return -1;
    if (fscanf(file, "%lld", &bytes) != 1) bytes = -1;
    fclose(file);
    return bytes;
}

/* Bytes that this process can still take: what the system calls available and its free swap, or less where a container
 * has a limit. 0 where the system does not tell (anything but Linux): there the first allocation that fails is the
 * limit. */
static inline int64_t memory_available(void) {
    FILE *file = fopen("/proc/meminfo", "r");
    char line[256];
    long long kib = 0, total = 0;
    bool told = false;
    while (file && fgets(line, sizeof line, file)) {
        bool available = sscanf(line, "MemAvailable: %lld", &kib) == 1;
        if (!available && sscanf(line, "SwapFree: %lld", &kib) != 1) continue;
        total += kib;
        told = told || available;
    }
    if (file) fclose(file);
    if (!told) return 0;
    int64_t bytes = total * 1024, limit = memory_read("/sys/fs/cgroup/memory.max");
    if ((uint64_t)bytes > SIZE_MAX) bytes = (int64_t)SIZE_MAX;       /* 4 GiB for a process of 32 bits */
    if (limit < 0) limit = memory_read("/sys/fs/cgroup/memory/memory.limit_in_bytes");
    return limit > 0 && limit < bytes ? limit : bytes;
}

/* Bytes that this process holds in memory, or 0 where the system does not tell (anything but Linux). */
static inline int64_t memory_resident(void) {
    FILE *file = fopen("/proc/self/statm", "r");
    long long pages = 0;
    if (!file) return 0;
    if (fscanf(file, "%*s %lld", &pages) != 1) pages = 0;
    fclose(file);
    return (int64_t)pages * sysconf(_SC_PAGESIZE);
}

#endif
