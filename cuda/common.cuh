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

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <type_traits>

#include "../megalodon.h"

using bf16 = __nv_bfloat16;

/* ----------------------------------------------------------------------------------------------------------
 * Errors of the environment: file, line, and the end of the program. User errors never come here.
 */

[[noreturn]] static inline void cuda_failed(const char *what, const char *call, const char *file, int line) {
    fprintf(stderr, "%s:%d: %s failed: %s\n", file, line, call, what);
    exit(1);
}

#define CHECK_CUDA(call)                                                                                    \
    do {                                                                                                    \
        cudaError_t status_ = (call);                                                                       \
        if (status_ != cudaSuccess) cuda_failed(cudaGetErrorString(status_), #call, __FILE__, __LINE__);    \
    } while (0)
#define CHECK_CUBLAS(call)                                                                                  \
    do {                                                                                                    \
        cublasStatus_t status_ = (call);                                                                    \
        if (status_ != CUBLAS_STATUS_SUCCESS)                                                               \
            cuda_failed(cublasGetStatusString(status_), #call, __FILE__, __LINE__);                         \
    } while (0)
/* An always-on assertion: a mistake of ours, not of the user. */
#define REQUIRE(condition)                                                                                  \
    do {                                                                                                    \
        if (!(condition)) cuda_failed("assertion", #condition, __FILE__, __LINE__);                         \
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

struct Context {
    cudaStream_t stream;
    cublasHandle_t cublas;
    cublasLtHandle_t cublas_lt;
    void *cublas_workspace;
    size_t cublas_workspace_bytes;
    int num_sms, shared_bytes; /* shared memory that a block can have */
    bool cooperative;          /* launches may ask for all blocks at the same time */
    char *scratch;
    size_t scratch_bytes, scratch_used, scratch_peak;
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

template <typename T> static T *take(Context *context, int64_t count) {
    size_t bytes = ((size_t)count * sizeof(T) + SCRATCH_ALIGN - 1) / SCRATCH_ALIGN * SCRATCH_ALIGN;
    T *memory = (T *)(context->scratch + context->scratch_used);
    context->scratch_used += bytes;
    if (context->scratch_used > context->scratch_peak) context->scratch_peak = context->scratch_used;
    REQUIRE(context->dry_run || context->scratch_used <= context->scratch_bytes);
    return memory;
}

/* kernel may need parentheses: LAUNCH((kernel<T, 4>), grid, block, context, arguments...). */
#define LAUNCH(kernel, grid, block, context, ...)                                                           \
    do {                                                                                                    \
        if (!(context)->dry_run) {                                                                          \
            kernel<<<(grid), (block), 0, (context)->stream>>>(__VA_ARGS__);                                 \
            CHECK_CUDA(cudaGetLastError());                                                                 \
        }                                                                                                   \
    } while (0)

static inline void clear(Context *context, void *memory, size_t bytes) {
    if (!context->dry_run && bytes) CHECK_CUDA(cudaMemsetAsync(memory, 0, bytes, context->stream));
}

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

/* ----------------------------------------------------------------------------------------------------------
 * Types and vectors
 */

/* Statistics that must be good to float's last bits are summed in double when activations are float. */
template <typename T> using Accum = std::conditional_t<std::is_same<T, float>::value, double, float>;
template <typename A> struct alignas(2 * sizeof(A)) Pair { A x, y; };

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
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
 * (the gradient of a weight or bias). Such a kernel gives each block SWEEP_ROWS rows; its threads own
 * columns and walk down the rows, and the block writes one or more rows of partial sums. add_partials then
 * adds those to the gradient.
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

/* How many rows of partial sums a sweep over `rows` rows writes at most. */
static inline int sweep_groups(int64_t columns, int vec) {
    int64_t vectors = ceil_div(columns, vec);
    return (int)(SWEEP_THREADS / (vectors < SWEEP_THREADS ? vectors : SWEEP_THREADS));
}
static inline unsigned sweep_blocks(int64_t rows) { return blocks_for(rows, SWEEP_ROWS); }

/* Partial sums for the worst case of a sweep, VEC 16 bytes of bf16 or less. */
static inline float *take_partials(Context *context, int64_t rows, int64_t columns) {
    return take<float>(context, (int64_t)sweep_blocks(rows) * sweep_groups(columns, 8) * columns);
}

/* Few columns leave most of the device idle, so many rows are summed in slices first. */
enum { PARTIAL_LANES = 32, PARTIAL_GROUPS = 16, PARTIAL_SLICE = 64, PARTIAL_SLICES = 64 };

/* computes: sum[j] += sum over r of partial[r, j], r < count; with several slices, sum[slice, j] = the
 *           slice's part
 * launch:   grid (ceil(columns / 32), slices), block 32 x 16: a thread walks every 16th row of one column
 * traffic:  4 count columns bytes read, 8 columns bytes read and written
 * needs:    nothing
 * numerics: float, one fixed order: deterministic */
__global__ static void add_partials_kernel(float *sum, const float *partial, int64_t count, int columns) {
    __shared__ float shared[PARTIAL_GROUPS][PARTIAL_LANES];
    int column = (int)blockIdx.x * PARTIAL_LANES + (int)threadIdx.x;
    int64_t share = (count + gridDim.y - 1) / gridDim.y, first = share * blockIdx.y,
            last = min(first + share, count);
    float total = 0;
    if (column < columns) {
#pragma unroll 4
        for (int64_t row = first + threadIdx.y; row < last; row += PARTIAL_GROUPS)
            total += partial[row * columns + column];
    }
    shared[threadIdx.y][threadIdx.x] = total;
    __syncthreads(); // all groups' sums are there
    if (threadIdx.y == 0 && column < columns) {
        for (int i = 1; i < PARTIAL_GROUPS; i++) total += shared[i][threadIdx.x];
        if (gridDim.y > 1)
            sum[(int64_t)blockIdx.y * columns + column] = total;
        else
            sum[column] += total;
    }
}

static inline void add_partials(Context *context, float *sum, const float *partial, int64_t count,
                                int64_t columns) {
    ScratchScope scope(context);
    float *slice_sums = take<float>(context, PARTIAL_SLICES * columns);
    dim3 block(PARTIAL_LANES, PARTIAL_GROUPS);
    unsigned blocks = blocks_for(columns, PARTIAL_LANES), slices = blocks_for(count, PARTIAL_SLICE);
    unsigned wanted = 2 * (unsigned)context->num_sms / blocks;
    if (slices > wanted) slices = wanted;
    if (slices > PARTIAL_SLICES) slices = PARTIAL_SLICES;
    if (slices > 1) {
        LAUNCH(add_partials_kernel, dim3(blocks, slices), block, context, slice_sums, partial, count,
               (int)columns);
        partial = slice_sums, count = slices;
    }
    LAUNCH(add_partials_kernel, blocks, block, context, sum, partial, count, (int)columns);
}

/* computes: partial[block and group, j] = sum over the block's rows of x[row, j]
 * launch:   grid ceil(rows / 32), block 256: a thread owns VEC columns (see Sweep)
 * traffic:  rows columns sizeof(T) bytes read
 * needs:    VEC 16 / sizeof(T) wants columns and pointers in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float, fixed order: deterministic */
template <typename T, int VEC>
__global__ void column_sums_kernel(float *partial, const T *x, int64_t rows, int columns) {
    Sweep sweep(columns, VEC);
    if (sweep.group >= sweep.groups) return;
    int64_t first = (int64_t)blockIdx.x * SWEEP_ROWS, last = min(first + SWEEP_ROWS, rows);
    float *out = partial + ((int64_t)blockIdx.x * sweep.groups + sweep.group) * columns;
    for (int c = sweep.lane * VEC; c < columns; c += sweep.lanes * VEC) {
        float sum[VEC] = {}, value[VEC];
        for (int64_t row = first + sweep.group; row < last; row += sweep.groups) {
            load<VEC>(value, x + row * columns + c);
#pragma unroll
            for (int i = 0; i < VEC; i++) sum[i] += value[i];
        }
#pragma unroll
        for (int i = 0; i < VEC; i++) out[c + i] = sum[i];
    }
}

/* sum[j] += sum over rows of x[row, j] */
template <typename T>
static void add_column_sums(Context *context, float *sum, const T *x, int64_t rows, int64_t columns) {
    ScratchScope scope(context);
    float *partial = take_partials(context, rows, columns);
    WITH_VEC(T, vectorises<T>(columns, x), {
        LAUNCH((column_sums_kernel<T, VEC>), sweep_blocks(rows), SWEEP_THREADS, context, partial, x, rows,
               (int)columns);
        add_partials(context, sum, partial, (int64_t)sweep_blocks(rows) * sweep_groups(columns, VEC),
                     columns);
    });
}

#endif
