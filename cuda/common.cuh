/* common.cuh - what every kernel of the CUDA backend stands on: checked calls, the launch, scratch memory,
 * the two activation types, vector loads, reductions and the dropout mask.
 *
 * Conventions of all kernels here
 *   A launcher (a host function with the component's name) checks nothing that the model has checked; sizes
 *   are free: any B, T, D... Vectorised paths are chosen at run time, when rows and pointers are multiples
 *   of 16 bytes. T is the activation type: float or __nv_bfloat16. Arithmetic is float, statistics are float
 *   or double. Nothing adds floats atomically: sums over rows are partial sums in a fixed order, then one
 *   more fixed-order sum.
 */
#ifndef CUDA_COMMON_CUH
#define CUDA_COMMON_CUH

/* -DPLAIN_PRODUCTS=1: every matrix product by plain.cuh's kernel, without cuBLAS and without the instructions
 * of Hopper */
#ifndef PLAIN_PRODUCTS
#define PLAIN_PRODUCTS 0
#endif

#if !PLAIN_PRODUCTS
#include <cublasLt.h>
#include <cublas_v2.h>
#endif
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../megalodon.h"

using bf16 = __nv_bfloat16;

/* ----------------------------------------------------------------------------------------------------------
 * Errors of the environment: file, line, and the end of the program. User errors never come here.
 */

[[noreturn]] static inline void cuda_failed(const char *what, const char *call, const char *file, int line,
                                            const char *hint = "") {
    fflush(stdout);
    int length = (int)strcspn(call, "("); // of its name
    fprintf(stderr, "error: %s:%d: %.*s failed: %s%s\n", file, line, length, call, what, hint);
    exit(1);
}

#define MEMORY_HINT "; the device's memory is full: a smaller batch needs less of it"
#define LOST_HINT                                                                                           \
    "; the device is lost to this program: start it again, a training run from its last checkpoint by "     \
    "--resume"

/* What the user can do about a failed call; nothing where the message says it all. */
static inline const char *cuda_hint(cudaError_t status) {
    switch (status) {
    case cudaErrorMemoryAllocation: return MEMORY_HINT;
    case cudaErrorDevicesUnavailable: return "; another program has the device for itself";
    case cudaErrorNoKernelImageForDevice:
        return "; this program was built for other devices: build it again on this machine";
    case cudaErrorECCUncorrectable:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchFailure:
    case cudaErrorLaunchTimeout:
    case cudaErrorNoDevice:
    case cudaErrorSystemNotReady:
    case cudaErrorUnknown:
        return LOST_HINT;
    default: return "";
    }
}

#define CHECK_CUDA(call)                                                                                    \
    do {                                                                                                    \
        cudaError_t status_ = (call);                                                                       \
        if (status_ != cudaSuccess)                                                                         \
            cuda_failed(cudaGetErrorString(status_), #call, __FILE__, __LINE__, cuda_hint(status_));        \
    } while (0)
/* For a call that may be refused with this one error. False: it was, and the error is not found again
 * later. */
#define CHECK_CUDA_UNLESS(refusal, call) cuda_granted(refusal, call, #call, __FILE__, __LINE__)
static inline bool cuda_granted(cudaError_t refusal, cudaError_t status, const char *call, const char *file,
                                int line) {
    if (status == refusal) cudaGetLastError();
    else if (status != cudaSuccess)
        cuda_failed(cudaGetErrorString(status), call, file, line, cuda_hint(status));
    return status == cudaSuccess;
}
#if !PLAIN_PRODUCTS
static inline const char *cublas_hint(cublasStatus_t status) {
    switch (status) {
    case CUBLAS_STATUS_NOT_INITIALIZED: // what a device without room for its handle says
    case CUBLAS_STATUS_ALLOC_FAILED: return MEMORY_HINT;
    case CUBLAS_STATUS_ARCH_MISMATCH: return "; at least compute capability 8.0 is needed";
    case CUBLAS_STATUS_EXECUTION_FAILED:
    case CUBLAS_STATUS_INTERNAL_ERROR: return LOST_HINT;
    default: return "";
    }
}
#define CHECK_CUBLAS(call)                                                                                  \
    do {                                                                                                    \
        cublasStatus_t status_ = (call);                                                                    \
        if (status_ != CUBLAS_STATUS_SUCCESS)                                                               \
            cuda_failed(cublasGetStatusString(status_), #call, __FILE__, __LINE__, cublas_hint(status_));   \
    } while (0)
#endif
/* An always-on assertion: a mistake of ours, not of the user. */
#define REQUIRE(condition)                                                                                  \
    do {                                                                                                    \
        if (!(condition)) cuda_failed(#condition, "assertion", __FILE__, __LINE__);                         \
    } while (0)

/* ----------------------------------------------------------------------------------------------------------
 * Context: where work goes, and the scratch memory that launchers borrow from.
 *
 * Scratch is a stack. Everything runs in one stream, so memory that a launcher gave back may be handed out
 * again at once: the kernels that use it run after those that used it before. A dry run takes scratch and
 * launches nothing; create() makes one to learn how much scratch a step needs.
 */

enum { WARP_SIZE = 32, SCRATCH_ALIGN = 256 };
constexpr unsigned FULL_MASK = 0xffffffffu;

/* Sums over rows that are still partial sums: sum[j] += sum over r < count of partial[r, j]. */
struct PendingSum {
    float *sum;
    const float *partial;
    int count, columns;
};
enum { MAX_SUMS = 16 };

/* A second stream beside the main one, see matmul.cuh. context NULL: there is none. */
enum { MAX_WAITING = 2 };
struct SideStream {
    struct Context *context; /* its stream and what products need; no scratch */
    cudaEvent_t ready, done;
    struct {
        float *dweight;
        const void *dy, *x;
        int64_t M, N, K;
        bool accumulate;
        int dy_gap; /* see Gaps */
    } waiting[MAX_WAITING]; /* products for the next side_start */
    int num_waiting;
    bool busy; /* it was given work that nobody waits for yet */
};

struct Context {
    cudaStream_t stream;
    SideStream side;
#if !PLAIN_PRODUCTS
    cublasHandle_t cublas;
    cublasLtHandle_t cublas_lt;
#endif
    void *cublas_workspace;
    int num_sms;
    bool hopper;  /* see hopper.cuh */
    bool streams; /* in a step of generation, see decode_streams.cuh */
    char *scratch;
    size_t scratch_bytes, scratch_used, scratch_peak;
    size_t pending_bytes; /* of the partial sums, which grow down from the end of scratch */
    PendingSum pending[MAX_SUMS];
    int num_pending;
    bool dry_run;
};

/* Gives back what was taken since its construction. */
struct ScratchScope {
    Context *context;
    size_t mark;
    explicit ScratchScope(Context *c) : context(c), mark(c->scratch_used) {}
    ~ScratchScope() { context->scratch_used = mark; }
    ScratchScope(const ScratchScope &) = delete;
    ScratchScope &operator=(const ScratchScope &) = delete;
};

static inline size_t scratch_size(size_t bytes) {
    return (bytes + SCRATCH_ALIGN - 1) / SCRATCH_ALIGN * SCRATCH_ALIGN;
}
static inline void check_scratch(Context *context) {
    size_t used = context->scratch_used + context->pending_bytes;
    if (used > context->scratch_peak) context->scratch_peak = used;
    REQUIRE(context->dry_run || used <= context->scratch_bytes);
}

template <typename T> static T *take(Context *context, int64_t count) {
    T *memory = (T *)(context->scratch + context->scratch_used);
    context->scratch_used += scratch_size((size_t)count * sizeof(T));
    check_scratch(context);
    return memory;
}

/* Where a dry run's scratch begins: made up, but not null, since null means absent. */
static inline char *no_scratch() { return (char *)(uintptr_t)SCRATCH_ALIGN; }

/* kernel may need parentheses: LAUNCH((kernel<T, 4>), grid, block, context, arguments...). */
#define LAUNCH(kernel, grid, block, context, ...)                                                           \
    do {                                                                                                    \
        if (!(context)->dry_run) {                                                                          \
            kernel<<<(grid), (block), 0, (context)->stream>>>(__VA_ARGS__);                                 \
            CHECK_CUDA(cudaGetLastError());                                                                 \
        }                                                                                                   \
    } while (0)

static inline void fill(Context *context, void *memory, int byte, size_t bytes) {
    if (!context->dry_run && bytes) CHECK_CUDA(cudaMemsetAsync(memory, byte, bytes, context->stream));
}
static inline void clear(Context *context, void *memory, size_t bytes) { fill(context, memory, 0, bytes); }

static inline void copy(Context *context, void *to, const void *from, size_t bytes) {
    if (!context->dry_run && bytes)
        CHECK_CUDA(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, context->stream));
}

/* rows rows of row_bytes each, at these distances */
static inline void copy_rows(Context *context, void *to, size_t to_pitch, const void *from,
                             size_t from_pitch, size_t row_bytes, size_t rows) {
    if (!context->dry_run && row_bytes && rows)
        CHECK_CUDA(cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, row_bytes, rows,
                                     cudaMemcpyDeviceToDevice, context->stream));
}

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline unsigned blocks_for(int64_t work, int64_t per_block) {
    return (unsigned)ceil_div(work, per_block);
}

/* Divides a multiprocessor's memory so that `blocks` blocks of a kernel, as many as its registers let in,
 * find their shared memory and the first cache has the rest. The driver by itself keeps more for blocks. */
template <typename K> static void fit_cache(const Context *context, K *kernel, int blocks) {
    if (context->dry_run) return;
    cudaFuncAttributes code = {};
    int device = 0, all = 0, own = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
    CHECK_CUDA(cudaDeviceGetAttribute(&own, cudaDevAttrReservedSharedMemoryPerBlock, device));
    CHECK_CUDA(cudaFuncGetAttributes(&code, (const void *)kernel));
    int percent = (int)ceil_div(100 * blocks * ((int64_t)code.sharedSizeBytes + own), all);
    CHECK_CUDA(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    percent < 100 ? percent : 100));
}

/* ----------------------------------------------------------------------------------------------------------
 * Types and vectors
 */

/* Statistics that must be good to float's last bits are summed in double when activations are float. */
template <typename T> using Accum = std::conditional_t<std::is_same<T, float>::value, double, float>;
template <typename A> struct alignas(2 * sizeof(A)) Pair { A x, y; };

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
/* Two bf16 as the word that they are in memory. A bf16 is the upper half of a float. */
__device__ inline float low_bf16(uint32_t word) { return __uint_as_float(word << 16); }
__device__ inline float high_bf16(uint32_t word) { return __uint_as_float(word & 0xFFFF0000u); }
__device__ inline uint32_t word_of(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t *>(&pair);
}
template <typename T> __host__ __device__ inline T from_float(float x);
template <> __host__ __device__ inline float from_float<float>(float x) { return x; }
template <> __host__ __device__ inline bf16 from_float<bf16>(float x) { return __float2bfloat16(x); }

template <typename T, int VEC> struct alignas(sizeof(T) * VEC) Packed { T v[VEC]; };

template <int VEC, typename T> __device__ inline Packed<T, VEC> packed(const T *from) {
    return *reinterpret_cast<const Packed<T, VEC> *>(from);
}

template <int VEC, typename T> __device__ inline void load(float (&to)[VEC], const T *from) {
    Packed<T, VEC> packed = *reinterpret_cast<const Packed<T, VEC> *>(from);
#pragma unroll
    for (int i = 0; i < VEC; i++) to[i] = to_float(packed.v[i]);
}

template <int VEC, typename T> __device__ inline void store(T *to, const float (&from)[VEC]) {
    Packed<T, VEC> packed;
#pragma unroll
    for (int i = 0; i < VEC; i++) packed.v[i] = from_float<T>(from[i]);
    *reinterpret_cast<Packed<T, VEC> *>(to) = packed;
}

/* A vector as the words that it is in memory. Of an array of bf16 the compiler makes a register for each
 * number, and so waits for a load where it is asked for, not where it is needed. */
template <typename T, int VEC> struct alignas(sizeof(T) * VEC) VectorWords {
    using Word = std::conditional_t<(VEC * sizeof(T) < 4), uint16_t, uint32_t>;
    Word v[VEC * sizeof(T) / sizeof(Word)];
};
template <int VEC, typename T> __device__ inline VectorWords<T, VEC> words_at(const T *from) {
    return *reinterpret_cast<const VectorWords<T, VEC> *>(from);
}
template <int VEC> __device__ inline void numbers_of(float (&to)[VEC], const VectorWords<float, VEC> &words) {
#pragma unroll
    for (int i = 0; i < VEC; i++) to[i] = __uint_as_float(words.v[i]);
}
template <int VEC> __device__ inline void numbers_of(float (&to)[VEC], const VectorWords<bf16, VEC> &words) {
#pragma unroll
    for (int i = 0; i < VEC; i++) to[i] = i % 2 ? high_bf16(words.v[i / 2]) : low_bf16(words.v[i / 2]);
}

/* May rows of `columns` elements be read 16 bytes at a time? Absent (null) pointers do not object. */
template <typename T, typename... P> static bool vectorises(int64_t columns, const P *...pointers) {
    uintptr_t bits = ((uintptr_t)pointers | ... | 0);
    return columns % (16 / (int64_t)sizeof(T)) == 0 && bits % 16 == 0;
}

/* Runs a statement with the constant VEC: 16 bytes' worth of T, or 1. */
#define WITH_VEC(T, wide, ...)                                                                              \
    do {                                                                                                    \
        if (wide) {                                                                                         \
            constexpr int VEC = 16 / (int)sizeof(T);                                                        \
            __VA_ARGS__;                                                                                    \
        } else {                                                                                            \
            constexpr int VEC = 1;                                                                          \
            __VA_ARGS__;                                                                                    \
        }                                                                                                   \
    } while (0)

/* Gradients of several layers' outputs may lie side by side, so that one product takes them all. The numbers
 * between the end of a row and the beginning of the next, of each tensor: */
struct Gaps {
    int dx, dy, da;
};

/* The widest vector of 16 bytes, 8 bytes or one element that rows of `columns` elements can be read in. */
template <typename T, typename... P> static int vector_width(int64_t columns, const P *...pointers) {
    uintptr_t bits = ((uintptr_t)pointers | ... | 0);
    int64_t wide = 16 / (int64_t)sizeof(T), half = wide / 2;
    if (columns % wide == 0 && bits % 16 == 0) return (int)wide;
    return columns % half == 0 && bits % 8 == 0 ? (int)half : 1;
}
/* Runs a statement with the constant VEC, which is vector_width's answer. */
#define WITH_WIDTH(T, width, ...)                                                                           \
    do {                                                                                                    \
        if ((width) == 16 / (int)sizeof(T)) {                                                               \
            constexpr int VEC = 16 / (int)sizeof(T);                                                        \
            __VA_ARGS__;                                                                                    \
        } else if ((width) == 8 / (int)sizeof(T)) {                                                         \
            constexpr int VEC = 8 / (int)sizeof(T);                                                         \
            __VA_ARGS__;                                                                                    \
        } else {                                                                                            \
            constexpr int VEC = 1;                                                                          \
            __VA_ARGS__;                                                                                    \
        }                                                                                                   \
    } while (0)

/* Asks for bytes, into shared memory, that need no registers on their way: zeros if not `here`. */
template <int BYTES = 16> __device__ inline void copy_early(void *to, const void *from, bool here) {
    static_assert(BYTES == 16 || BYTES == 8 || BYTES == 4, "what cp.async copies");
    uint32_t place = (uint32_t)__cvta_generic_to_shared(to);
    int bytes = here ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                     :
                     : "r"(place), "l"(from), "r"(bytes)
                     : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     :
                     : "r"(place), "l"(from), "n"(BYTES), "r"(bytes)
                     : "memory");
}
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }
/* What the thread asked for since the last call is one group. */
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }
/* Waits until at most so many of the thread's groups are under way. */
template <int GROUPS> __device__ inline void copies_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(GROUPS) : "memory");
}

/* 2^x, 0 where that is no normal number: one instruction */
__device__ inline float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* The device's own exponential and quotient: some units in the last place, a fraction of the instructions. */
__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ inline float silu(float x) { return x * sigmoid(x); }
/* d silu(x) / dx = s (1 + x (1 - s)) with s = sigmoid(x) */
__device__ inline float silu_slope(float x) {
    float s = sigmoid(x);
    return s * (1.0f + x * (1.0f - s));
}

/* ----------------------------------------------------------------------------------------------------------
 * Dropout: the mask is megalodon_random of (key, index), so that every backend draws the same one.
 */

struct Dropout {
    uint64_t key, threshold; /* dropped when (bits >> 40) < threshold; 0: no dropout */
    float scale;             /* 1 / (1 - p) */
};

static inline Dropout make_dropout(double p, uint64_t key) {
    Dropout dropout = {key, (uint64_t)(p * 16777216.0), (float)(1.0 / (1.0 - p))};
    return dropout;
}
static inline Dropout no_dropout() { return Dropout{0, 0, 1.0f}; }

/* 0 or 1/(1-p) for one element. The arithmetic is megalodon_random's, bit for bit. */
__device__ inline float keep_scale(const Dropout &dropout, uint64_t index) {
    if (dropout.threshold == 0) return 1.0f;
    uint64_t z = dropout.key + (index + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    return (z >> 40) < dropout.threshold ? 0.0f : dropout.scale;
}

/* The same for VEC elements from `index` on: one branch where nothing is dropped. */
template <int VEC>
__device__ inline void keep_scales(float (&keep)[VEC], const Dropout &dropout, int64_t index) {
#pragma unroll
    for (int i = 0; i < VEC; i++) keep[i] = 1.0f;
    if (dropout.threshold == 0) return;
#pragma unroll
    for (int i = 0; i < VEC; i++) keep[i] = keep_scale(dropout, (uint64_t)(index + i));
}

/* value[i] times the mask of the element `index` + i */
template <int VEC> __device__ inline void drop(float (&value)[VEC], const Dropout &dropout, int64_t index) {
    if (dropout.threshold == 0) return;
#pragma unroll
    for (int i = 0; i < VEC; i++) value[i] *= keep_scale(dropout, (uint64_t)(index + i));
}

/* ----------------------------------------------------------------------------------------------------------
 * Reductions in a fixed order
 */

/* Sum over groups of `lanes` neighbouring lanes (a power of two); every lane of the warp must call it. */
template <typename A> __device__ inline A lanes_sum(A x, int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(FULL_MASK, x, step);
    return x;
}
template <typename A> __device__ inline A warp_sum(A x) { return lanes_sum(x, WARP_SIZE); }
__device__ inline float warp_max(float x) {
    for (int step = WARP_SIZE / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, step));
    return x;
}

/* Sum over the block, the same value in every thread. shared: one A a warp. */
template <typename A> __device__ inline A block_sum(A x, A *shared) {
    int warp = threadIdx.x / WARP_SIZE, warps = (blockDim.x + WARP_SIZE - 1) / WARP_SIZE;
    x = warp_sum(x);
    if (threadIdx.x % WARP_SIZE == 0) shared[warp] = x;
    __syncthreads(); // every warp's part is in shared
    A total = 0;
    for (int i = 0; i < warps; i++) total += shared[i];
    __syncthreads(); // all have read it: the caller may use shared again
    return total;
}
__device__ inline float block_max(float x, float *shared) {
    int warp = threadIdx.x / WARP_SIZE, warps = (blockDim.x + WARP_SIZE - 1) / WARP_SIZE;
    x = warp_max(x);
    if (threadIdx.x % WARP_SIZE == 0) shared[warp] = x;
    __syncthreads(); // every warp's part is in shared
    float largest = shared[0];
    for (int i = 1; i < warps; i++) largest = fmaxf(largest, shared[i]);
    __syncthreads(); // all have read it: the caller may use shared again
    return largest;
}

/* Column sums. Many backward kernels produce, besides a result a row, a sum over all rows for each column
 * (the gradient of a weight or bias). Such a kernel gives each block SWEEP_ROWS rows; its threads own columns
 * and walk down the rows, and the block writes one row of partial sums into memory of take_sum. add_sums then
 * adds those of several kernels to their gradients.
 *
 *   threads of a block:   | group 0: columns 0..D-1 in vectors | group 1: the same columns, the next row |
 *   ...
 */
enum { SWEEP_ROWS = 32, SWEEP_THREADS = 256 };

struct Sweep {
    int lanes, groups, group, lane; /* lanes threads share a row; groups rows are walked at a time */
    __device__ Sweep(int columns, int vec) {
        int vectors = (columns + vec - 1) / vec;
        lanes = vectors < (int)blockDim.x ? vectors : (int)blockDim.x;
        groups = (int)blockDim.x / lanes;
        group = (int)threadIdx.x / lanes;
        lane = (int)threadIdx.x % lanes;
    }
};

/* Memory for what a thread's group adds to a sweep's row of partial sums. */
template <int VEC> using SweepSums = Packed<float, VEC>[SWEEP_THREADS];

/* Writes row[j] = the sum over the groups, j < columns, where each thread comes with the sums of its one
 * vector of columns: for sweeps whose rows have at most a vector a thread. The whole block calls it. */
template <int VEC>
__device__ inline void sweep_row(float *row, const Sweep &sweep, int columns, const float (&sum)[VEC],
                                 SweepSums<VEC> &shared) {
    float *groups = shared[0].v;
    __syncthreads(); // nobody reads what an earlier call left in shared any more
    if (sweep.group < sweep.groups) store<VEC>(shared[sweep.group * sweep.lanes + sweep.lane].v, sum);
    __syncthreads(); // the sums of all groups are there
    for (int c = (int)threadIdx.x; c < columns; c += (int)blockDim.x) {
        float total = 0;
        for (int group = 0; group < sweep.groups; group++) total += groups[group * sweep.lanes * VEC + c];
        row[c] = total;
    }
}

static inline unsigned sweep_blocks(int64_t rows) { return blocks_for(rows, SWEEP_ROWS); }
/* Threads of a block: whole rows' worth of vectors, if that is not more than 256. */
static inline unsigned sweep_threads(int64_t columns, int vec) {
    int64_t vectors = ceil_div(columns, vec), groups = vectors < SWEEP_THREADS ? SWEEP_THREADS / vectors : 1;
    int64_t threads = ceil_div(vectors * groups, WARP_SIZE) * WARP_SIZE;
    return (unsigned)(threads < SWEEP_THREADS ? threads : (int64_t)SWEEP_THREADS);
}

/* All sums of one launch. A sum's rows are cut into slices; blocks are numbered by sum, slice and column. */
enum { SUM_LANES = 32, SUM_GROUPS = 16, SUM_SLICE = 128 };
struct ColumnSums {
    PendingSum of[MAX_SUMS];
    int first_block[MAX_SUMS + 1], first_slice[MAX_SUMS]; /* first_slice: where its slices' sums lie */
    float *slice_sums;
    int *arrived, number; /* arrived: a counter for each first slice's block, zero before the launch */
};

/* Sum of 16 rows of 32, column by column, in every thread of the first row. */
__device__ inline float sum_groups(float mine, float (&shared)[SUM_GROUPS][SUM_LANES]) {
    shared[threadIdx.y][threadIdx.x] = mine;
    __syncthreads(); // all groups' sums are there
    float total = 0;
    if (threadIdx.y == 0)
        for (int i = 0; i < SUM_GROUPS; i++) total += shared[i][threadIdx.x];
    __syncthreads(); // shared may be used again
    return total;
}

/* computes: sum[j] += sum over r of partial[r, j], r < count, for several sums
 * launch:   grid: over all sums, slices ceil(columns / 32); block 32 x 16: a thread walks every 16th row of
 *           one column of a slice; the last block of a column to finish adds up the slices
 * traffic:  4 count columns bytes read, 8 columns bytes read and written
 * needs:    nothing
 * numerics: float, one fixed order whichever block is last: deterministic */
__global__ static void add_sums_kernel(ColumnSums sums) {
    __shared__ float shared[SUM_GROUPS][SUM_LANES];
    __shared__ bool last;
    int i = 0;
    while ((int)blockIdx.x >= sums.first_block[i + 1]) i++;
    const PendingSum pending = sums.of[i];
    int blocks = (pending.columns + SUM_LANES - 1) / SUM_LANES;
    int slices = (sums.first_block[i + 1] - sums.first_block[i]) / blocks;
    int slice = ((int)blockIdx.x - sums.first_block[i]) / blocks,
        block = ((int)blockIdx.x - sums.first_block[i]) % blocks;
    int column = block * SUM_LANES + (int)threadIdx.x, first = slice * SUM_SLICE;
    int end = min(first + (int)SUM_SLICE, pending.count);
    float total = 0;
    if (column < pending.columns) {
#pragma unroll 8
        for (int row = first + (int)threadIdx.y; row < end; row += SUM_GROUPS)
            total += pending.partial[(int64_t)row * pending.columns + column];
    }
    total = sum_groups(total, shared);
    if (slices > 1) {
        float *mine = sums.slice_sums + sums.first_slice[i] + (int64_t)slice * pending.columns;
        if (threadIdx.y == 0 && column < pending.columns) mine[column] = total;
        __threadfence(); // this block's sums are visible before its arrival is
        __syncthreads(); // of all its threads
        if (threadIdx.x == 0 && threadIdx.y == 0)
            last = atomicAdd(sums.arrived + sums.first_block[i] + block, 1) == slices - 1;
        __syncthreads(); // everyone knows
        if (!last) return;
        __threadfence(); // what the others wrote before they arrived is read after
        total = 0;
        if (column < pending.columns)
            for (int s = (int)threadIdx.y; s < slices; s += SUM_GROUPS)
                total +=
                    __ldcg(sums.slice_sums + sums.first_slice[i] + (int64_t)s * pending.columns + column);
        total = sum_groups(total, shared);
    }
    if (threadIdx.y == 0 && column < pending.columns) pending.sum[column] += total;
}

/* Adds all pending sums to their gradients. */
static inline void add_sums(Context *context) {
    if (context->num_pending == 0) return;
    ScratchScope scope(context);
    ColumnSums sums = {};
    int blocks = 0, slice_sums = 0;
    bool several = false; // does a sum have several slices?
    for (int i = 0; i < context->num_pending; i++) {
        const PendingSum *pending = &context->pending[i];
        int slices = (int)ceil_div(pending->count, SUM_SLICE);
        several = several || slices > 1;
        sums.of[i] = *pending;
        sums.first_slice[i] = slice_sums;
        slice_sums += slices * pending->columns;
        blocks += slices * (int)ceil_div(pending->columns, SUM_LANES);
        sums.first_block[i + 1] = blocks;
    }
    sums.slice_sums = take<float>(context, slice_sums);
    sums.arrived = take<int>(context, blocks);
    if (several) clear(context, sums.arrived, (size_t)blocks * sizeof(int)); // else nobody counts
    LAUNCH(add_sums_kernel, (unsigned)blocks, dim3(SUM_LANES, SUM_GROUPS), context, sums);
    context->num_pending = 0;
    context->pending_bytes = 0;
}

/* The next add_sums adds `count` rows of partial sums to sum (columns). */
static inline void sum_later(Context *context, float *sum, float *partial, int64_t count, int64_t columns) {
    REQUIRE(context->num_pending < MAX_SUMS);
    context->pending[context->num_pending++] = PendingSum{sum, partial, (int)count, (int)columns};
}
/* Memory for such rows, or NULL if sum is NULL. The caller's kernel writes all of them. */
static inline float *take_sum(Context *context, float *sum, int64_t count, int64_t columns) {
    if (!sum) return nullptr;
    context->pending_bytes += scratch_size((size_t)(count * columns) * sizeof(float));
    check_scratch(context);
    float *partial = (float *)(context->scratch + context->scratch_bytes - context->pending_bytes);
    sum_later(context, sum, partial, count, columns);
    return partial;
}

/* computes: partial[block, j] = sum over the block's rows of x[row, j]
 * launch:   grid ceil(rows / 32), block 256: a thread owns VEC columns (see Sweep)
 * traffic:  rows columns sizeof(T) bytes read
 * needs:    VEC 16 / sizeof(T) wants columns, gap and x in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float, fixed order: deterministic */
template <typename T, int VEC>
__global__ void column_sums_kernel(float *partial, const T *x, int rows, int columns, int gap) {
    __shared__ SweepSums<VEC> shared;
    Sweep sweep(columns, VEC);
    int first = (int)blockIdx.x * SWEEP_ROWS, last = min(first + (int)SWEEP_ROWS, rows);
    float *out = partial + (int64_t)blockIdx.x * columns, sum[VEC] = {}, value[VEC];
    for (int c = sweep.lane * VEC; sweep.group < sweep.groups && c < columns; c += sweep.lanes * VEC) {
#pragma unroll
        for (int i = 0; i < VEC; i++) sum[i] = 0;
#pragma unroll 4
        for (int row = first + sweep.group; row < last; row += sweep.groups) {
            load<VEC>(value, x + (int64_t)row * (columns + gap) + c);
#pragma unroll
            for (int i = 0; i < VEC; i++) sum[i] += value[i];
        }
        if (sweep.groups == 1) store<VEC>(out + c, sum);
    }
    if (sweep.groups > 1) sweep_row<VEC>(out, sweep, columns, sum, shared);
}

/* sum[j] += sum over rows of x[row, j], with the next add_sums; gap: the numbers between rows of x */
template <typename T>
static void add_column_sums(Context *context, float *sum, const T *x, int64_t rows, int64_t columns,
                            int gap = 0) {
    float *partial = take_sum(context, sum, sweep_blocks(rows), columns);
    WITH_VEC(T, vectorises<T>(columns | gap, x),
             LAUNCH((column_sums_kernel<T, VEC>), sweep_blocks(rows), sweep_threads(columns, VEC), context,
                    partial, x, (int)rows, (int)columns, gap));
}

#endif
