/* megalodon_cuda.h - device memory for programs that call the components of megalodon_cuda one by one.
 *
 * The component table takes device pointers there. A test or a benchmark gets and fills them with these four
 * functions; all of them wait until the work before them is done, and a failure ends the program with file
 * and line.
 */
#ifndef MEGALODON_CUDA_H
#define MEGALODON_CUDA_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Device memory of so many bytes, aligned to 256; zero bytes give a valid pointer too. */
void *megalodon_cuda_alloc(size_t bytes);
void megalodon_cuda_free(void *device);
void megalodon_cuda_upload(void *device, const void *host, size_t bytes);
void megalodon_cuda_download(void *host, const void *device, size_t bytes);
/* Waits for the device: before a host clock is read. */
void megalodon_cuda_wait(void);

#ifdef __cplusplus
}
#endif
#endif
