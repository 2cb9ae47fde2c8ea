/* gpu.c - a GPU that is none and that fails on purpose: a library to be preloaded into a program of ours that was built
 * with CUDA. It needs no device and no driver.
 *
 *     GPU_FAIL=cudaMemcpyAsync GPU_ERROR=700 LD_PRELOAD=build/gpu.so ./train --backend cuda ...
 *
 * Its memory is the host's, its kernels compute nothing, and copies are made; so a program runs to its end with numbers
 * that mean nothing, and every call of CUDA and cuBLAS on the way can be made to fail:
 *
 *     GPU_FAIL=CALL          this call fails
 *     GPU_ERROR=N            with this status (default 2: no memory; for cuBLAS 3: no memory)
 *     GPU_AFTER=N            only after N calls of it that work
 *     GPU_LOST=1             from then on every other call of CUDA fails too, as it does where a device is lost
 *     GPU_MEMORY=N           bytes of its memory (default 1 GiB)
 *     GPU_DEVICES=N          how many there are (default 1)
 *     GPU_DRIVER=N           the version of CUDA that the driver knows (default: that of the program)
 *     GPU_MAJOR=N            compute capability (default 9)
 *     GPU_HOPPER=1           its kernels say that they are code for Hopper, in the only memory of 4 bytes
 *     GPU_CLUSTERS=N         clusters of blocks that run at the same time (default 8; below 0: the call refuses them)
 *     GPU_COUNT=FILE         at the end, the calls are counted into this file: "NAME NUMBER" a line
 */
#define _GNU_SOURCE
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CALLS = 128 };
static struct { const char *name; long number; } calls[CALLS];
static int lost;                     /* the status of all calls after the one that failed; 0: none did */
static int last;                     /* what cudaGetLastError will say                                 */
static size_t used;                  /* bytes of the device's memory                                   */

static long long setting(const char *name, long long fallback) {
    const char *text = getenv(name);
    return text ? atoll(text) : fallback;
}

__attribute__((destructor)) static void write_counts(void) {
    FILE *file = getenv("GPU_COUNT") ? fopen(getenv("GPU_COUNT"), "w") : NULL;
    for (int i = 0; file && i < CALLS && calls[i].name; i++) fprintf(file, "%s %ld\n", calls[i].name, calls[i].number);
    if (file) fclose(file);
}

/* Counts a call. Returns its status: 0, or what it is told to fail with. */
static int status_of(const char *name, long long usual) {
    const char *chosen = getenv("GPU_FAIL");
    int i = 0;
    while (i < CALLS - 1 && calls[i].name && strcmp(calls[i].name, name) != 0) i++;
    calls[i].name = name;
    long before = calls[i].number++;
    if (lost) return usual == CUBLAS_STATUS_ALLOC_FAILED ? (int)CUBLAS_STATUS_EXECUTION_FAILED : lost;
    if (!chosen || strcmp(chosen, name) != 0 || before < setting("GPU_AFTER", 0)) return 0;
    int status = (int)setting("GPU_ERROR", usual);
    if (setting("GPU_LOST", 0)) lost = status;
    return last = status;
}
#define CUDA_STATUS ((cudaError_t)status_of(__func__, cudaErrorMemoryAllocation))
#define BLAS_STATUS ((cublasStatus_t)status_of(__func__, CUBLAS_STATUS_ALLOC_FAILED))

/* ---- the device ---- */

cudaError_t cudaGetDeviceCount(int *count) {
    *count = (int)setting("GPU_DEVICES", 1);
    cudaError_t status = CUDA_STATUS;
    return !status && *count == 0 ? cudaErrorNoDevice : status;
}
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return CUDA_STATUS;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr what, int device) {
    (void)device;
    *value = what == cudaDevAttrComputeCapabilityMajor ? (int)setting("GPU_MAJOR", 9) : 4;
    return CUDA_STATUS;
}
cudaError_t cudaDriverGetVersion(int *version) {
    *version = (int)setting("GPU_DRIVER", CUDART_VERSION);
    return CUDA_STATUS;
}
cudaError_t cudaRuntimeGetVersion(int *version) {
    *version = CUDART_VERSION;
    return CUDA_STATUS;
}
cudaError_t cudaGetLastError(void) {
    cudaError_t status = CUDA_STATUS, before = (cudaError_t)last;
    last = cudaSuccess;
    return status ? status : before;
}
cudaError_t cudaDeviceSynchronize(void) { return CUDA_STATUS; }

/* ---- memory: the size stands in front of each piece ---- */

enum { FRONT = 256 };

static cudaError_t take(void **pointer, size_t bytes, size_t limit, cudaError_t status) {
    if (!status && limit && bytes > limit - used) status = cudaErrorMemoryAllocation;
    char *base = status ? NULL : aligned_alloc(FRONT, (bytes + 2 * FRONT - 1) / FRONT * FRONT);
    *pointer = NULL;
    if (!base) return status ? status : cudaErrorMemoryAllocation;
    *(size_t *)(void *)base = limit ? bytes : 0;
    used += limit ? bytes : 0;
    *pointer = base + FRONT;
    memset(*pointer, 0, bytes);
    return cudaSuccess;
}
static void give_back(void *pointer) {
    if (!pointer) return;
    used -= *(size_t *)(void *)((char *)pointer - FRONT);
    free((char *)pointer - FRONT);
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    cudaError_t status = take(pointer, bytes, (size_t)setting("GPU_MEMORY", 1LL << 30), CUDA_STATUS);
    if (!status && bytes == sizeof(int)) *(int *)*pointer = (int)setting("GPU_HOPPER", 0);
    return status;
}
cudaError_t cudaMallocHost(void **pointer, size_t bytes) { return take(pointer, bytes, 0, CUDA_STATUS); }
cudaError_t cudaFree(void *pointer) {
    give_back(pointer);
    return CUDA_STATUS;
}
cudaError_t cudaFreeHost(void *pointer) {
    give_back(pointer);
    return CUDA_STATUS;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *all) {
    *all = (size_t)setting("GPU_MEMORY", 1LL << 30);
    *free_bytes = *all - used;
    return CUDA_STATUS;
}
cudaError_t cudaMemset(void *pointer, int value, size_t bytes) {
    memset(pointer, value, bytes);
    return CUDA_STATUS;
}
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) {
    (void)stream;
    memset(pointer, value, bytes);
    return CUDA_STATUS;
}
cudaError_t cudaMemcpy(void *out, const void *in, size_t bytes, enum cudaMemcpyKind kind) {
    (void)kind;
    memmove(out, in, bytes);
    return CUDA_STATUS;
}
cudaError_t cudaMemcpyAsync(void *out, const void *in, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind, (void)stream;
    memmove(out, in, bytes);
    return CUDA_STATUS;
}
cudaError_t cudaMemcpy2DAsync(void *out, size_t out_pitch, const void *in, size_t in_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
    (void)kind, (void)stream;
    for (size_t row = 0; row < height; row++)
        memmove((char *)out + row * out_pitch, (const char *)in + row * in_pitch, width);
    return CUDA_STATUS;
}

/* ---- streams, events, graphs, kernels ---- */

static int anything;                 /* what all handles point to */

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    (void)flags;
    *stream = (cudaStream_t)(void *)&anything;
    return CUDA_STATUS;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    (void)flags, (void)priority;
    *stream = (cudaStream_t)(void *)&anything;
    return CUDA_STATUS;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = *greatest = 0;
    return CUDA_STATUS;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) {
    return (void)stream, (void)event, (void)flags, CUDA_STATUS;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return (void)stream, CUDA_STATUS; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return (void)stream, CUDA_STATUS; }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    return (void)stream, (void)mode, CUDA_STATUS;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    (void)stream;
    *graph = (cudaGraph_t)(void *)&anything;
    return CUDA_STATUS;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *graph, cudaGraph_t from, unsigned long long flags) {
    (void)from, (void)flags;
    *graph = (cudaGraphExec_t)(void *)&anything;
    return CUDA_STATUS;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return (void)graph, CUDA_STATUS; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return (void)graph, CUDA_STATUS; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
    return (void)graph, (void)stream, CUDA_STATUS;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    (void)flags;
    *event = (cudaEvent_t)(void *)&anything;
    return CUDA_STATUS;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return (void)event, CUDA_STATUS; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { return (void)event, (void)stream, CUDA_STATUS; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { return (void)event, CUDA_STATUS; }
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *kernel) {
    (void)kernel;
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    return CUDA_STATUS;
}
cudaError_t cudaFuncSetAttribute(const void *kernel, enum cudaFuncAttribute what, int value) {
    return (void)kernel, (void)what, (void)value, CUDA_STATUS;
}
cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, const void *kernel, const cudaLaunchConfig_t *config) {
    (void)kernel, (void)config;
    *clusters = (int)setting("GPU_CLUSTERS", 8);
    cudaError_t status = CUDA_STATUS;
    return !status && *clusters < 0 ? last = cudaErrorInvalidClusterSize : status;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **arguments) {
    return (void)config, (void)kernel, (void)arguments, CUDA_STATUS;
}
/* What <<<...>>> calls. */
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    (void)function;
    *kernel = (cudaKernel_t)(void *)&anything;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return (void)kernel, (void)grid, (void)block, (void)arguments, (void)shared, (void)stream, CUDA_STATUS;
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    return (void)kernel, (void)grid, (void)block, (void)arguments, (void)shared, (void)stream, CUDA_STATUS;
}

/* ---- cuBLAS ---- */

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
    *handle = (cublasHandle_t)(void *)&anything;
    return BLAS_STATUS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) { return (void)handle, BLAS_STATUS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
    return (void)handle, (void)stream, BLAS_STATUS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
    return (void)handle, (void)mode, BLAS_STATUS;
}
cublasStatus_t cublasSetSmCountTarget(cublasHandle_t handle, int number) {
    return (void)handle, (void)number, BLAS_STATUS;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *memory, size_t bytes) {
    return (void)handle, (void)memory, (void)bytes, BLAS_STATUS;
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t at, cublasOperation_t bt, int m,
                                          int n, int k, const void *alpha, const void *a, cudaDataType a_type, int lda,
                                          long long a_stride, const void *b, cudaDataType b_type, int ldb,
                                          long long b_stride, const void *beta, void *c, cudaDataType c_type, int ldc,
                                          long long c_stride, int count, cublasComputeType_t compute,
                                          cublasGemmAlgo_t algo) {
    (void)handle, (void)at, (void)bt, (void)m, (void)n, (void)k, (void)alpha, (void)a, (void)a_type, (void)lda;
    (void)a_stride, (void)b, (void)b_type, (void)ldb, (void)b_stride, (void)beta, (void)c, (void)c_type, (void)ldc;
    (void)c_stride, (void)count, (void)compute, (void)algo;
    return BLAS_STATUS;
}
cublasStatus_t cublasGemmEx(cublasHandle_t handle, cublasOperation_t at, cublasOperation_t bt, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType a_type, int lda, const void *b,
                            cudaDataType b_type, int ldb, const void *beta, void *c, cudaDataType c_type, int ldc,
                            cublasComputeType_t compute, cublasGemmAlgo_t algo) {
    (void)handle, (void)at, (void)bt, (void)m, (void)n, (void)k, (void)alpha, (void)a, (void)a_type, (void)lda, (void)b;
    (void)b_type, (void)ldb, (void)beta, (void)c, (void)c_type, (void)ldc, (void)compute, (void)algo;
    return BLAS_STATUS;
}
cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) {
    *handle = (cublasLtHandle_t)(void *)&anything;
    return BLAS_STATUS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return (void)handle, BLAS_STATUS; }
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t what, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout,
                              const void *beta, const void *c, cublasLtMatrixLayout_t c_layout, void *d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t *algo, void *workspace,
                              size_t bytes, cudaStream_t stream) {
    (void)handle, (void)what, (void)alpha, (void)a, (void)a_layout, (void)b, (void)b_layout, (void)beta, (void)c;
    (void)c_layout, (void)d, (void)d_layout, (void)algo, (void)workspace, (void)bytes, (void)stream;
    return BLAS_STATUS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t what,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t found[], int *count) {
    (void)handle, (void)what, (void)a, (void)b, (void)c, (void)d, (void)preference;
    memset(found, 0, (size_t)wanted * sizeof *found);
    *count = 1;
    return BLAS_STATUS;
}
