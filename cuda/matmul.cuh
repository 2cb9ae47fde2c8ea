/* matmul.cuh - matrix products through cuBLAS, a small kernel for a few rows, and the linear layer on top.
 *
 * float products are true float (no TF32), bf16 products add up in float. All matrices are row-major here;
 * cuBLAS is column-major, so it is asked for C^T = op(B)^T op(A)^T, which is the same memory. All that knows
 * of cuBLAS stands in the first half of this file, behind six functions; -DPLAIN_PRODUCTS=1 takes others.
 */
#ifndef CUDA_MATMUL_CUH
#define CUDA_MATMUL_CUH

#include "common.cuh"

#if PLAIN_PRODUCTS
#include "plain.cuh"
#else
#include <map>
#include <tuple>
#endif

/* Bytes of the memory that cuBLAS works in. */
constexpr size_t CUBLAS_WORKSPACE = PLAIN_PRODUCTS ? 0 : (size_t)32 << 20;

/* A matrix as a product reads it: elements, distance between rows, distance between the matrices of a batch.
 * */
template <typename T> struct Matrix {
    T *data;
    int64_t row_stride, batch_stride;
};
template <typename T> static Matrix<T> matrix(T *data, int64_t row_stride, int64_t batch_stride = 0) {
    return Matrix<T>{data, row_stride, batch_stride};
}

#if PLAIN_PRODUCTS

static inline void start_products(Context *) {}
static inline void use_workspace(Context *) {}
static inline void use_multiprocessors(Context *context, int sms) { context->num_sms = sms; }
static inline void end_products(Context *) {}

template <typename T, typename O>
static void matmul(Context *context, bool transpose_a, bool transpose_b, int64_t M, int64_t N, int64_t K,
                   float alpha, Matrix<const T> A, Matrix<const T> B, float beta, Matrix<O> C,
                   int64_t batch = 1) {
    if (M == 0 || N == 0 || batch == 0) return;
    PlainProduct<T, O> p = {};
    p.out = C.data, p.add = beta != 0 ? C.data : nullptr, p.beta = beta, p.alpha = alpha;
    int64_t a = A.row_stride, b = B.row_stride;
    p.a = PlainOperand<T>{A.data, transpose_a ? 1 : a, transpose_a ? a : 1, A.batch_stride};
    p.b = PlainOperand<T>{B.data, transpose_b ? b : 1, transpose_b ? 1 : b, B.batch_stride};
    p.M = M, p.N = N, p.K = K, p.row_stride = C.row_stride, p.batch_stride = C.batch_stride;
    plain_product(context, p, batch);
}

template <typename T>
static bool linear_at_once(Context *context, T *y, const T *x, const T *weight, const T *bias, const T *add,
                           int64_t M, int64_t N, int64_t K) {
    PlainProduct<T, T> p = {};
    p.out = y, p.add = add, p.bias = bias, p.alpha = p.beta = 1;
    p.a = PlainOperand<T>{x, K, 1, 0}, p.b = PlainOperand<T>{weight, K, 1, 0};
    p.M = M, p.N = N, p.K = K, p.row_stride = N;
    plain_product(context, p, 1);
    return true;
}

#else

/* cuBLAS for a context that has its stream. */
static inline void start_products(Context *context) {
    CHECK_CUBLAS(cublasCreate(&context->cublas));
    CHECK_CUBLAS(cublasLtCreate(&context->cublas_lt));
    CHECK_CUBLAS(cublasSetStream(context->cublas, context->stream));
    /* No TF32, and partial sums of a product split over K stay float. */
    CHECK_CUBLAS(cublasSetMathMode(
        context->cublas,
        (cublasMath_t)(CUBLAS_DEFAULT_MATH | CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION)));
}
/* After context->cublas_workspace, of CUBLAS_WORKSPACE bytes, was set. */
static inline void use_workspace(Context *context) {
    CHECK_CUBLAS(cublasSetWorkspace(context->cublas, context->cublas_workspace, CUBLAS_WORKSPACE));
}
/* Products are planned for so many multiprocessors from here on. */
static inline void use_multiprocessors(Context *context, int sms) {
    context->num_sms = sms;
    CHECK_CUBLAS(cublasSetSmCountTarget(context->cublas, sms));
}
static inline void end_products(Context *context) {
    CHECK_CUBLAS(cublasDestroy(context->cublas));
    CHECK_CUBLAS(cublasLtDestroy(context->cublas_lt));
}

template <typename T> constexpr cudaDataType_t cuda_type() {
    return std::is_same<T, float>::value ? CUDA_R_32F : CUDA_R_16BF;
}

/* C[i] = alpha op(A[i]) op(B[i]) + beta C[i] for i < batch; op(A) is M,K, op(B) is K,N, C is M,N; op
 * transposes if asked. */
template <typename T, typename O>
static void matmul(Context *context, bool transpose_a, bool transpose_b, int64_t M, int64_t N, int64_t K,
                   float alpha, Matrix<const T> A, Matrix<const T> B, float beta, Matrix<O> C,
                   int64_t batch = 1) {
    if (context->dry_run || M == 0 || N == 0 || batch == 0) return;
    cublasOperation_t op_b = transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N,
                      op_a = transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N;
    if (batch == 1)
        CHECK_CUBLAS(cublasGemmEx(context->cublas, op_b, op_a, (int)N, (int)M, (int)K, &alpha, B.data,
                                  cuda_type<T>(), (int)B.row_stride, A.data, cuda_type<T>(),
                                  (int)A.row_stride, &beta, C.data, cuda_type<O>(), (int)C.row_stride,
                                  CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
    else
        CHECK_CUBLAS(cublasGemmStridedBatchedEx(
            context->cublas, op_b, op_a, (int)N, (int)M, (int)K, &alpha, B.data, cuda_type<T>(),
            (int)B.row_stride, B.batch_stride, A.data, cuda_type<T>(), (int)A.row_stride, A.batch_stride,
            &beta, C.data, cuda_type<O>(), (int)C.row_stride, C.batch_stride, (int)batch,
            CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}

/* ----------------------------------------------------------------------------------------------------------
 * y = x W^T (+ bias) (+ add): cuBLASLt does the additions in its epilogue.
 */

/* What a plan of cuBLASLt depends on: sizes, types, whether bias and add are there, alignment of each
 * pointer. */
using PlanKey =
    std::tuple<int64_t, int64_t, int64_t, int, bool, bool, unsigned, unsigned, unsigned, unsigned>;
struct Plan {
    bool usable;
    cublasLtMatmulAlgo_t algorithm;
};

static inline unsigned alignment_of(const void *pointer) {
    uintptr_t bits = (uintptr_t)pointer | 256;
    return (unsigned)(bits & (~bits + 1));
}

/* Returns false if cuBLASLt has no way to do it; then nothing was written. */
template <typename T>
static bool linear_at_once(Context *context, T *y, const T *x, const T *weight, const T *bias, const T *add,
                           int64_t M, int64_t N, int64_t K) {
    static std::map<PlanKey, Plan> plans;
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t layout_w, layout_x, layout_y;
    cublasOperation_t transpose = CUBLAS_OP_T;
    cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_BIAS;
    CHECK_CUBLAS(cublasLtMatmulDescInit(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CHECK_CUBLAS(
        cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_TRANSA, &transpose, sizeof transpose));
    if (bias) {
        CHECK_CUBLAS(cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue,
                                                    sizeof epilogue));
        CHECK_CUBLAS(
            cublasLtMatmulDescSetAttribute(&product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof bias));
    }
    CHECK_CUBLAS(cublasLtMatrixLayoutInit(&layout_w, cuda_type<T>(), (uint64_t)K, (uint64_t)N, K));
    CHECK_CUBLAS(cublasLtMatrixLayoutInit(&layout_x, cuda_type<T>(), (uint64_t)K, (uint64_t)M, K));
    CHECK_CUBLAS(cublasLtMatrixLayoutInit(&layout_y, cuda_type<T>(), (uint64_t)N, (uint64_t)M, N));

    const T *c = add ? add : y;
    PlanKey key(M, N, K, (int)sizeof(T), bias != nullptr, add != nullptr, alignment_of(x),
                alignment_of(weight), alignment_of(y), alignment_of(c));
    auto found = plans.find(key);
    if (found == plans.end()) {
        cublasLtMatmulPreferenceOpaque_t preference;
        CHECK_CUBLAS(cublasLtMatmulPreferenceInit(&preference));
        CHECK_CUBLAS(cublasLtMatmulPreferenceSetAttribute(&preference,
                                                          CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                          &CUBLAS_WORKSPACE, sizeof(size_t)));
        const struct {
            cublasLtMatmulPreferenceAttributes_t attribute;
            const void *pointer;
        } alignments[] = {{CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, weight},
                          {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, x},
                          {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c},
                          {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, y}};
        for (const auto &each : alignments) {
            uint32_t bytes = alignment_of(each.pointer);
            CHECK_CUBLAS(
                cublasLtMatmulPreferenceSetAttribute(&preference, each.attribute, &bytes, sizeof bytes));
        }
        cublasLtMatmulHeuristicResult_t result;
        int results = 0;
        cublasStatus_t status =
            cublasLtMatmulAlgoGetHeuristic(context->cublas_lt, &product, &layout_w, &layout_x, &layout_y,
                                           &layout_y, &preference, 1, &result, &results);
        Plan plan;
        plan.usable = status == CUBLAS_STATUS_SUCCESS && results > 0;
        if (plan.usable) plan.algorithm = result.algo;
        found = plans.emplace(key, plan).first;
    }
    if (!found->second.usable) return false;
    float one = 1, beta = add ? 1.0f : 0.0f;
    CHECK_CUBLAS(cublasLtMatmul(context->cublas_lt, &product, &one, weight, &layout_w, x, &layout_x, &beta,
                                c, &layout_y, y, &layout_y, &found->second.algorithm,
                                context->cublas_workspace, CUBLAS_WORKSPACE,
                                context->stream));
    return true;
}

#endif

/* computes: y[row, j] = y[row, j] + bias[j] (if any) + add[row, j] (if any)
 * launch:   grid ceil(rows columns / 256), block 256: a thread owns one element
 * traffic:  3 rows columns sizeof(T) bytes
 * needs:    nothing; only where cuBLASLt has no fused way, such as odd sizes
 * numerics: float */
template <typename T>
__global__ void add_to_rows_kernel(T *y, const T *bias, const T *add, int64_t count, int columns) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    float value = to_float(y[i]);
    if (bias) value += to_float(bias[i % columns]);
    if (add) value += to_float(add[i]);
    y[i] = from_float<T>(value);
}

/* Few rows: reading the weight is all the work, so a warp a column of the output reads one row of it for all
 * rows of x. */
enum { FEW_ROWS = 8, FEW_ROWS_WARPS = 4 };

/* computes: y[m, j] = sum over k of x[m, k] weight[j, k] (+ bias[j]) (+ add[m, j]), m < M <= 8
 * launch:   grid ceil(N / 4), block 128: a warp owns one j, its lanes split k
 * traffic:  N K sizeof(T) bytes, read once; x comes from the caches
 * needs:    VEC 16 / sizeof(T) wants K and pointers in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float sums in a fixed order: deterministic; y may be add */
template <typename T, typename O, int VEC, int ROWS>
__global__ void linear_few_rows_kernel(O *y, const T *x, const T *weight, const T *bias, const O *add, int M,
                                       int N, int K) {
    int j = (int)blockIdx.x * FEW_ROWS_WARPS + (int)threadIdx.x / WARP_SIZE,
        lane = (int)threadIdx.x % WARP_SIZE;
    if (j >= N) return; // a whole warp leaves: no shuffle below lacks a lane
    float sum[ROWS] = {};
    const T *w = weight + (int64_t)j * K;
#pragma unroll 4
    for (int k = lane * VEC; k < K; k += WARP_SIZE * VEC) {
        float wk[VEC], xk[VEC];
        load<VEC>(wk, w + k);
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
            if (m >= M) break;
            load<VEC>(xk, x + (int64_t)m * K + k);
#pragma unroll
            for (int i = 0; i < VEC; i++) sum[m] += wk[i] * xk[i];
        }
    }
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
        if (m >= M) break;
        float total = warp_sum(sum[m]);
        if (lane == 0) {
            if (bias) total += to_float(bias[j]);
            if (add) total += to_float(add[(int64_t)m * N + j]);
            y[(int64_t)m * N + j] = from_float<O>(total);
        }
    }
}

template <typename T, typename O>
static void linear_few_rows(Context *context, O *y, const T *x, const T *weight, const T *bias, const O *add,
                            int M, int N, int K) {
    WITH_VEC(T, vectorises<T>(K, x, weight), {
        if (M == 1)
            LAUNCH((linear_few_rows_kernel<T, O, VEC, 1>), blocks_for(N, FEW_ROWS_WARPS),
                   FEW_ROWS_WARPS * WARP_SIZE, context, y, x, weight, bias, add, M, N, K);
        else
            LAUNCH((linear_few_rows_kernel<T, O, VEC, FEW_ROWS>), blocks_for(N, FEW_ROWS_WARPS),
                   FEW_ROWS_WARPS * WARP_SIZE, context, y, x, weight, bias, add, M, N, K);
    });
}

/* y = x W^T + bias + add. y is M,N, x is M,K, weight is N,K; bias (N) and add (M,N) may be NULL; add may be
 * y. */
template <typename T>
static void linear_forward(Context *context, T *y, const T *x, const T *weight, const T *bias, const T *add,
                           int64_t M, int64_t N, int64_t K) {
    if (context->dry_run) return;
    if (M <= FEW_ROWS) {
        linear_few_rows(context, y, x, weight, bias, add, (int)M, (int)N, (int)K);
        return;
    }
    if ((bias || add) && linear_at_once(context, y, x, weight, bias, add, M, N, K)) return;
    bool in_place = add == y; // then beta adds it; another add comes after
    matmul(context, false, true, M, N, K, 1.0f, matrix(x, K), matrix(weight, K), in_place ? 1.0f : 0.0f,
           matrix(y, N));
    const T *rest = in_place ? nullptr : add;
    if (bias || rest)
        LAUNCH((add_to_rows_kernel<T>), blocks_for(M * N, 256), 256, context, y, bias, rest, M * N, (int)N);
}

/* y = x W^T:  dx (+)= dy W. dx is M,K, dy is M,N, weight is N,K. Gaps: see Gaps. */
template <typename T>
static void linear_backward_input(Context *context, T *dx, bool accumulate, const T *dy, const T *weight,
                                  int64_t M, int64_t N, int64_t K, Gaps gaps = {}) {
    matmul(context, false, false, M, K, N, 1.0f, matrix(dy, N + gaps.dy), matrix(weight, K),
           accumulate ? 1.0f : 0.0f, matrix(dx, K + gaps.dx));
}

/* y = x W^T:  dW (+)= dy^T x. dweight is N,K. */
template <typename T>
static void linear_backward_weight(Context *context, float *dweight, bool accumulate, const T *dy,
                                   const T *x, int64_t M, int64_t N, int64_t K, Gaps gaps = {}) {
    matmul(context, true, false, N, K, M, 1.0f, matrix(dy, N + gaps.dy), matrix(x, K),
           accumulate ? 1.0f : 0.0f, matrix(dweight, K));
}

/* ---- products beside other kernels ----
 *
 * Nothing in a backward waits for the gradients of weights. Kernels that are bound by memory need no more
 * than some of the multiprocessors, so a product on the others costs little. The order of things makes them
 * meet:
 *
 *     main stream   ... | side_ready | a product | side_start | kernels bound by memory | ... | side_join
 *     side stream                                  the gradient of a weight, on its share of multiprocessors
 *
 * What waits may begin while the main stream's product runs, and has the first right to multiprocessors which
 * that leaves; what follows on the main stream gets the rest. Everything is in the order of the calls again
 * after side_join, and the results do not depend on who runs when.
 */

enum {
    /* The side stream's share of multiprocessors, in percent: the only one that was timed. A step of
     * bytes12M on an H100 took 24.6 ms with it, 24.9 without. */
    SIDE_PERCENT = 80,
    /* Where CEMA leaves so many percent of them idle, because there are few channels, those are used as well;
     * chosen, not tuned. */
    SIDE_LEAST = 20,
    /* Large gradients fill the device by themselves and would only take turns with the main stream: there is
     * a side stream where none of a block's weights has more tiles of SIDE_TILE x SIDE_TILE numbers than this
     * percentage of multiprocessors. On an H100 (132 of them, so at most 66 tiles) a block's largest weight
     * has 18 tiles in bytes12M, which gained, and 160 in mega200M, whose step took 98.6 ms with a side
     * stream and 98.5 without. This was timed when each weight's gradient was a product of its own; some now
     * share one, which has more tiles. */
    SIDE_TILE = 128,
    SIDE_TILES_PERCENT = 50,
};

/* largest: rows times columns of a block's largest weight */
static inline bool side_pays(const Context *context, int64_t largest) {
    int64_t tiles = ceil_div(largest, SIDE_TILE * SIDE_TILE);
    return tiles * 100 <= context->num_sms * SIDE_TILES_PERCENT;
}

/* linear_backward_weight, on the side stream from the next side_start on. dy and x must stay until
 * side_join. */
template <typename T>
static void linear_backward_weight_aside(Context *context, float *dweight, bool accumulate, const T *dy,
                                         const T *x, int64_t M, int64_t N, int64_t K, Gaps gaps = {}) {
    if (!context->side.context || context->dry_run) {
        linear_backward_weight(context, dweight, accumulate, dy, x, M, N, K, gaps);
        return;
    }
    REQUIRE(context->side.num_waiting < MAX_WAITING);
    context->side.waiting[context->side.num_waiting++] = {dweight, dy, x, M, N, K, accumulate, gaps.dy};
}

/* What waits may begin when all that the main stream was given up to here is done. */
static inline void side_ready(Context *context) {
    if (context->side.num_waiting) CHECK_CUDA(cudaEventRecord(context->side.ready, context->stream));
}

/* sms: how many multiprocessors it may have */
template <typename T> static void side_start(Context *context, int sms) {
    SideStream *side = &context->side;
    if (!side->num_waiting) return;
    CHECK_CUDA(cudaStreamWaitEvent(side->context->stream, side->ready, 0));
    use_multiprocessors(side->context, sms);
    for (int i = 0; i < side->num_waiting; i++) {
        const auto &p = side->waiting[i];
        linear_backward_weight(side->context, p.dweight, p.accumulate, (const T *)p.dy, (const T *)p.x, p.M,
                               p.N, p.K, Gaps{0, p.dy_gap, 0});
    }
    side->num_waiting = 0;
    side->busy = true;
}
/* With the share of all that they have beside kernels which would take any. */
template <typename T> static void side_start(Context *context) {
    side_start<T>(context, context->num_sms * SIDE_PERCENT / 100);
}

/* Is it worth while to leave so many multiprocessors to the side stream? */
static inline bool side_fits(const Context *context, int sms) {
    return context->side.context && sms * 100 >= context->num_sms * SIDE_LEAST;
}

/* The main stream goes on when the side stream has nothing left to do. */
static inline void side_join(Context *context) {
    SideStream *side = &context->side;
    REQUIRE(!side->num_waiting);
    if (!side->busy) return;
    CHECK_CUDA(cudaEventRecord(side->done, side->context->stream));
    CHECK_CUDA(cudaStreamWaitEvent(context->stream, side->done, 0));
    side->busy = false;
}

/* y = x W^T + bias:  dx = dy W;  dW += dy^T x;  dbias += column sums of dy. Any of the three may be NULL. */
template <typename T>
static void linear_backward(Context *context, T *dx, float *dweight, float *dbias, const T *dy, const T *x,
                            const T *weight, int64_t M, int64_t N, int64_t K) {
    if (dx) linear_backward_input(context, dx, false, dy, weight, M, N, K);
    if (dweight) linear_backward_weight(context, dweight, true, dy, x, M, N, K);
    if (dbias) add_column_sums(context, dbias, dy, M, N);
}

#endif
