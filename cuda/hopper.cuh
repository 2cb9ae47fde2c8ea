/* hopper.cuh - the instructions of compute capability 9.0 that C++ has no names for: matrix products of four
 * warps out of shared memory, tiles copied into it by hardware, the barriers that count their bytes, and
 * clusters, whose blocks run at the same time and reach each other's shared memory.
 *
 * They exist in code for the target sm_90a only. Everything that uses them asks hopper_code() first and has
 * another way.
 */
#ifndef CUDA_HOPPER_CUH
#define CUDA_HOPPER_CUH

#include <cuda.h>

#include "common.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && !PLAIN_PRODUCTS
#define HOPPER_CODE 1
#else
#define HOPPER_CODE 0
#endif

enum { WARPGROUP = 128, SWIZZLE_BYTES = 128 };

/* Dynamic shared memory, from a multiple of 1024 bytes on, as the swizzle wants it. */
__device__ inline char *dynamic_shared() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
}
__device__ inline uint32_t shared_address(const void *pointer) {
    return (uint32_t)__cvta_generic_to_shared(pointer);
}

#define LAUNCH_WITH_SHARED(kernel, grid, block, bytes, context, ...)                                        \
    do {                                                                                                    \
        CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)(bytes))); \
        kernel<<<(grid), (block), (bytes), (context)->stream>>>(__VA_ARGS__);                               \
        CHECK_CUDA(cudaGetLastError());                                                                     \
    } while (0)

/* ---- barriers in shared memory ---- */

/* A phase ends when `arrivals` have arrived and all announced bytes have come. */
__device__ inline void barrier_init(uint64_t *barrier, int arrivals) {
#if HOPPER_CODE
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals));
#endif
}
/* Makes initialised barriers known to the copying hardware. */
__device__ inline void barriers_ready() {
#if HOPPER_CODE
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ inline void barrier_arrive(uint64_t *barrier) {
#if HOPPER_CODE
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}
/* Arrives and announces bytes. */
__device__ inline void barrier_expect(uint64_t *barrier, int bytes) {
#if HOPPER_CODE
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
#endif
}
/* Waits for the end of the phase of this parity. */
__device__ inline void barrier_wait(uint64_t *barrier, int parity) {
#if HOPPER_CODE
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@done bra ready;\n"
                 "bra again;\n"
                 "ready:\n"
                 "}" ::"r"(shared_address(barrier)),
                 "r"(parity)
                 : "memory");
#endif
}

/* ---- clusters ---- */

/* Makes initialised barriers known to the other blocks of the cluster and to what they copy. */
__device__ inline void cluster_barriers_ready() {
#if HOPPER_CODE
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
/* All threads of all blocks of the cluster meet, each warp as one, in two halves. They hand no stores over
 * but cluster_barriers_ready's. */
__device__ inline void cluster_arrive() {
#if HOPPER_CODE
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
__device__ inline void cluster_wait() {
#if HOPPER_CODE
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
/* Writes to the same place of another block's shared memory, or of this one's, and counts the 4 bytes at the
 * same barrier there: whoever has waited for it reads them. */
__device__ inline void send_there(float *place, uint64_t *barrier, int rank, float value) {
#if HOPPER_CODE
    asm volatile("{\n"
                 ".reg .b32 there, counts;\n"
                 "mapa.shared::cluster.u32 there, %0, %2;\n"
                 "mapa.shared::cluster.u32 counts, %1, %2;\n"
                 "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %3, [counts];\n"
                 "}" ::"r"(shared_address(place)),
                 "r"(shared_address(barrier)), "r"(rank), "f"(value)
                 : "memory");
#endif
}

/* ---- tiles ---- */

/* Asks for a tile of 64 columns (128 bytes) of a map's matrix from (row, column) on. Rows outside the matrix
 * come as zeros. The tile's 16-byte pieces lie swizzled: piece i of row r at i ^ (r mod 8). */
__device__ inline void load_tile(void *to, const CUtensorMap *map, int row, int column, uint64_t *barrier) {
#if HOPPER_CODE
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3}], [%4];" ::"r"(shared_address(to)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
                 : "memory");
#endif
}

/* Asks for bytes, a multiple of 16, from a multiple of 16 on; `barrier` counts them. */
__device__ inline void load_bytes(void *to, const void *from, int bytes, uint64_t *barrier) {
#if HOPPER_CODE
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
#endif
}

/* A policy for bytes that nobody will read again soon: they leave the second cache before others. */
__device__ inline uint64_t goes_first() {
    uint64_t policy = 0;
#if HOPPER_CODE
    asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
#endif
    return policy;
}
/* copy_early with a policy. */
__device__ inline void copy_aside(void *to, const void *from, uint64_t policy) {
#if HOPPER_CODE
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "l"(policy)
                 : "memory");
#endif
}

/* Four matrices of 8 x 8 bf16 into shared memory. A lane's word[m] is two neighbouring columns of matrix m,
 * row lane / 4, columns 2 (lane mod 4) and the next; `row`: where row (lane mod 8) of matrix lane / 8 goes,
 * 16 bytes. Loads may pass it: __syncwarp() before these bytes are read. */
__device__ inline void store_matrices(char *row, const uint32_t (&word)[4]) {
#if HOPPER_CODE
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     shared_address(row)),
                 "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3]));
#endif
}

using EncodeTiled = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                                 const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

/* The map of a (rows, columns) matrix in tiles of tile_rows x 64; gap: the numbers between rows. data and the
 * distance between rows have to be multiples of 16 bytes. The function is the driver's: it is asked
 * for by name, so that no program has to link with the driver. */
static inline CUtensorMap tile_map(const bf16 *data, int64_t rows, int64_t columns, int tile_rows,
                                   int64_t gap = 0) {
    static EncodeTiled encode = nullptr;
    if (!encode) {
        cudaDriverEntryPointQueryResult found;
        void *function = nullptr;
        CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                    cudaEnableDefault, &found));
        REQUIRE(found == cudaDriverEntryPointSuccess);
        encode = (EncodeTiled)function;
    }
    CUtensorMap map;
    cuuint64_t sizes[2] = {(cuuint64_t)columns, (cuuint64_t)rows},
               strides[1] = {(cuuint64_t)(columns + gap) * sizeof(bf16)};
    cuuint32_t box[2] = {SWIZZLE_BYTES / sizeof(bf16), (cuuint32_t)tile_rows}, steps[2] = {1, 1};
    REQUIRE(encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, (void *)data, sizes, strides, box, steps,
                   CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS);
    return map;
}

/* ---- products of four warps ---- */

/* How a product finds an operand in shared memory: from an address on, groups of 8 rows of 128 bytes are
 * group_bytes apart. Where the rows run along K, block_bytes says nothing. Where they are K, a row has 64
 * numbers of the other side, and the next such 64 lie block_bytes further; A has no more than these. */
__device__ inline uint64_t operand(const void *from, int block_bytes, int group_bytes) {
    constexpr uint64_t swizzle_128 = 1;
    return (uint64_t)((shared_address(from) & 0x3ffff) >> 4) | (uint64_t)(block_bytes >> 4) << 16 |
           (uint64_t)(group_bytes >> 4) << 32 | swizzle_128 << 62;
}

/* Before the first product on accumulators that other instructions touched. */
__device__ inline void products_begin() {
#if HOPPER_CODE
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
/* What was asked for since the last call is one group. */
__device__ inline void products_commit() {
#if HOPPER_CODE
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}
/* Waits until at most so many groups are under way. */
template <int GROUPS> __device__ inline void products_wait() {
#if HOPPER_CODE
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
#endif
}
/* After the last wait: from here on the accumulators may be read. */
__device__ inline void products_done(float (&d)[128]) {
#if HOPPER_CODE
#pragma unroll
    for (int i = 0; i < 128; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}
/* d (+)= A B of 64 x 256 numbers, 16 deep: A 64 rows along K, B 256 rows along K, or each 16 rows of K. A
 * thread's d[4 i + 2 h + j] is row 16 warp + lane / 4 + 8 h, column 8 i + 2 (lane mod 4) + j. */
#define ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define ACC16(i) ACC4(i), ACC4(i + 4), ACC4(i + 8), ACC4(i + 12)
template <bool A_ROWS_OF_K, bool B_ROWS_OF_K>
__device__ inline void product_64x256(float (&d)[128], uint64_t a, uint64_t b, bool add) {
#if HOPPER_CODE
    asm volatile("{\n"
                 ".reg .pred add;\n"
                 "setp.ne.b32 add, %130, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
                 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
                 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
                 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
                 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
                 "%128, %129, add, 1, 1, %131, %132;\n"
                 "}"
                 : ACC16(0), ACC16(16), ACC16(32), ACC16(48), ACC16(64), ACC16(80), ACC16(96), ACC16(112)
                 : "l"(a), "l"(b), "r"((int)add), "n"(A_ROWS_OF_K ? 1 : 0), "n"(B_ROWS_OF_K ? 1 : 0));
#endif
}

/* sigmoid of common.cuh in four instructions: without the care for exponentials under 2^-126, to which 1 is
 * added anyway, and for quotients under 2^-126, which are 0 here. All other numbers are the same. */
__device__ inline float quick_sigmoid(float x) {
    float result = 0;
#if HOPPER_CODE
    float power = power_of_two(x * -1.44269504088896340736f); // log2 e
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(1.0f + power));
#endif
    return result;
}

/* ---- is there such code, and a device for it? ---- */

__global__ static void hopper_code_kernel(int *answer) { *answer = HOPPER_CODE; }

/* Asks the device itself: the program may have been built for other targets, or made for this device from
 * code without these instructions. `answer`: memory on the device. */
static inline bool hopper_code(Context *context, int *answer) {
    int there = 0;
    LAUNCH(hopper_code_kernel, 1, 1, context, answer);
    CHECK_CUDA(cudaMemcpyAsync(&there, answer, sizeof there, cudaMemcpyDeviceToHost, context->stream));
    CHECK_CUDA(cudaStreamSynchronize(context->stream));
    return there == 1;
}

#endif
