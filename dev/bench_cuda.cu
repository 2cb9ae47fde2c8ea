/* bench_cuda.cu - the benchmark's part for a CUDA device; bench_cuda.h says what each function does. */
#include "bench_cuda.h"

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define CHECK(call, good, words)                                                                            \
    do {                                                                                                    \
        auto status_ = (call);                                                                              \
        if (status_ != (good)) {                                                                            \
            fprintf(stderr, "%s:%d: %s failed: %s\n", __FILE__, __LINE__, #call, words(status_));           \
            exit(1);                                                                                        \
        }                                                                                                   \
    } while (0)
#define CHECK_CUDA(call)   CHECK(call, cudaSuccess, cudaGetErrorString)
#define CHECK_CUBLAS(call) CHECK(call, CUBLAS_STATUS_SUCCESS, cublasGetStatusString)

void bench_cuda_device(char *name, int64_t *l2_bytes) {
    int device = 0;
    cudaDeviceProp properties;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaGetDeviceProperties(&properties, device));
    CHECK_CUDA(cudaFree(nullptr)); // starts the device, so that its own memory is not counted as ours later
    snprintf(name, 256, "%s", properties.name);
    *l2_bytes = properties.l2CacheSize;
}

int64_t bench_cuda_used(void) {
    size_t available = 0, all = 0;
    CHECK_CUDA(cudaDeviceSynchronize());
    CHECK_CUDA(cudaMemGetInfo(&available, &all));
    return (int64_t)(all - available);
}

void bench_cuda_copy(void *to, const void *from, size_t bytes) {
    CHECK_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, nullptr));
}

void bench_cuda_matmul(void *c, const void *a, const void *b, int n, bool is_bf16) {
    static cublasHandle_t handle;
    static void *workspace;
    const size_t workspace_bytes = (size_t)32 << 20;
    cudaDataType_t type = is_bf16 ? CUDA_R_16BF : CUDA_R_32F;
    float one = 1, zero = 0;
    if (!handle) {
        CHECK_CUBLAS(cublasCreate(&handle));
        CHECK_CUBLAS(cublasSetMathMode(handle, CUBLAS_DEFAULT_MATH));
        CHECK_CUDA(cudaMalloc(&workspace, workspace_bytes));
        CHECK_CUBLAS(cublasSetWorkspace(handle, workspace, workspace_bytes));
    }
    /* cuBLAS is column-major: c^T = b^T a^T is the same memory */
    CHECK_CUBLAS(cublasGemmEx(handle, CUBLAS_OP_N, CUBLAS_OP_N, n, n, n, &one, b, type, n, a, type, n, &zero,
                              c, type, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

/* Copies that take the device about this long, at most 20 ms: at 3 TB/s, 128 MiB are read and written in 0.09
 * ms; a slower device is busy for longer. They also leave nothing of the inputs in the caches. */
static void keep_busy(double seconds) {
    static char *memory;
    const size_t bytes = (size_t)128 << 20;
    // a call that waits for the device would else be answered with ever longer waits
    const double longest = 0.02;
    if (!memory) {
        CHECK_CUDA(cudaMalloc((void **)&memory, 2 * bytes));
        CHECK_CUDA(cudaMemset(memory, 0x3c, 2 * bytes));
    }
    int copies = 1 + (int)((seconds < longest ? seconds : longest) / 0.9e-4);
    for (int i = 0; i < copies; i++) bench_cuda_copy(memory, memory + bytes, bytes);
}

double bench_cuda_seconds(void (*run)(void *context), void *context, int calls, double queue_seconds,
                          double *host_seconds) {
    static cudaEvent_t start, end;
    float ms = 0;
    if (!start) {
        CHECK_CUDA(cudaEventCreate(&start));
        CHECK_CUDA(cudaEventCreate(&end));
    }
    keep_busy(queue_seconds);
    auto before = std::chrono::steady_clock::now();
    CHECK_CUDA(cudaEventRecord(start, nullptr));
    for (int i = 0; i < calls; i++) run(context);
    CHECK_CUDA(cudaEventRecord(end, nullptr));
    *host_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - before).count();
    CHECK_CUDA(cudaEventSynchronize(end));
    CHECK_CUDA(cudaGetLastError());
    CHECK_CUDA(cudaEventElapsedTime(&ms, start, end));
    return 1e-3 * ms;
}
