/* bench_cuda.h - what the benchmark needs of a CUDA device besides the backend: a clock of the device's own,
 * and two pieces of work that the vendor's libraries do, for the ceilings. Everything goes to the default
 * stream, as the components do. A failure ends the program with file and line.
 */
#ifndef DEV_BENCH_CUDA_H
#define DEV_BENCH_CUDA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The device's name (out has room for 256 bytes) and the size of its L2 cache in bytes. */
void bench_cuda_device(char *name, int64_t *l2_bytes);
/* Device memory in use, in bytes, by all programs; waits for the device first. */
int64_t bench_cuda_used(void);
/* Asks for a copy within the device. */
void bench_cuda_copy(void *to, const void *from, size_t bytes);
/* Asks cuBLAS for c = a b of row-major n x n matrices, of bf16 (added up in float) or of float (no TF32). */
void bench_cuda_matmul(void *c, const void *a, const void *b, int n, bool is_bf16);
/* Seconds that the device needs for run(context), called `calls` times, by its own clock. The device is kept
 * busy with other work for about `queue_seconds` first: in that time the host asks for all of the calls, so
 * that the device never waits for the host. *host_seconds: how long the host took to ask. */
double bench_cuda_seconds(void (*run)(void *context), void *context, int calls, double queue_seconds,
                          double *host_seconds);

#ifdef __cplusplus
}
#endif
#endif
