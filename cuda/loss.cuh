/* loss.cuh - the loss and its gradient in one pass over the logits: what a training step runs. The component
 * cross_entropy stands in pointwise.cuh.
 */
#ifndef CUDA_LOSS_CUH
#define CUDA_LOSS_CUH

#include "pointwise.cuh"

/* Rows of thousands of logits are held in registers, LOSS_HELD vectors a thread, and read once; shorter
 * rows, which would leave most of a block's threads without work, and longer ones are read twice. */
enum { LOSS_THREADS = 1024, LOSS_HELD = 8, LOSS_HELD_THREADS = 512 };

/* computes: nll[row] = lse - logits[row, target], lse = log sum exp logits[row];  dlogits[row, v] =
 *           exp(logits[row, v] - lse) - (v == target); both 0 where the target is ignored
 * launch:   grid rows, block 32..1024: a block owns a row; two blocks a multiprocessor, so that the second
 *           reading of 32,000 logits in bf16 finds both rows in the first cache
 * traffic:  2 rows V sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants V and pointers in multiples of 16 bytes; VEC 1 takes anything; dlogits
 *           may be logits
 * numerics: float, fixed order: deterministic */
template <typename T, int VEC>
__global__ void __launch_bounds__(LOSS_THREADS, 2)
    loss_kernel(T *dlogits, float *nll, const T *logits, const int32_t *targets, int V) {
    __shared__ float shared[LOSS_THREADS / WARP_SIZE];
    const T *row = logits + (int64_t)blockIdx.x * V;
    T *drow = dlogits + (int64_t)blockIdx.x * V;
    int target = targets[blockIdx.x];
    bool ignored = target == MEGALODON_IGNORE; // the same for the whole block
    /* read before anything is written: the gradient may lie over the logits */
    float at_target = ignored || threadIdx.x != 0 ? 0.0f : to_float(row[target]);
    float lse = row_lse<T, VEC>(row, V, shared), value[VEC];
    if (threadIdx.x == 0) nll[blockIdx.x] = ignored ? 0.0f : lse - at_target;
    for (int v = (int)threadIdx.x * VEC; v < V; v += (int)blockDim.x * VEC) {
        load<VEC>(value, row + v);
#pragma unroll
        for (int i = 0; i < VEC; i++)
            value[i] = ignored ? 0.0f : __expf(value[i] - lse) - (v + i == target ? 1.0f : 0.0f);
        store<VEC>(drow + v, value);
    }
}

/* 16 bytes of logits as words, since the compiler takes a register for each bf16 of an array of them. */
template <typename T> struct HeldLogits {
    Packed<uint32_t, 4> words;
    __device__ void load(const T *from, bool here) {
        uint32_t nothing = sizeof(T) == 2 ? 0xFF80FF80u : 0xFF800000u; // -inf
        words = Packed<uint32_t, 4>{{nothing, nothing, nothing, nothing}};
        if (here) words = packed<4>(reinterpret_cast<const uint32_t *>(from));
    }
    __device__ float operator[](int i) const {
        if constexpr (sizeof(T) == 4) return __uint_as_float(words.v[i]);
        return i % 2 ? high_bf16(words.v[i / 2]) : low_bf16(words.v[i / 2]);
    }
};

/* computes: as loss_kernel
 * launch:   grid rows, block 32..512: a block owns a row, a thread eight vectors of it in registers, all
 *           asked for at once; two blocks a multiprocessor, one's row moves while the other's is computed.
 *           exp(x - lse) is 2^(x log2 e - shift), a multiplication and addition and a power
 * traffic:  2 rows V sizeof(T) bytes
 * needs:    V at most 8 VEC times the block; V and pointers in multiples of 16 bytes; dlogits may be logits
 * numerics: float, fixed order: deterministic */
template <typename T>
__global__ void __launch_bounds__(LOSS_HELD_THREADS, 2)
    loss_held_kernel(T *dlogits, float *nll, const T *logits, const int32_t *targets, int V) {
    constexpr int VEC = 16 / (int)sizeof(T);
    constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;
    __shared__ float shared[LOSS_HELD_THREADS / WARP_SIZE];
    const T *row = logits + (int64_t)blockIdx.x * V;
    T *drow = dlogits + (int64_t)blockIdx.x * V;
    int target = targets[blockIdx.x], first = (int)threadIdx.x * VEC, step = (int)blockDim.x * VEC;
    float value[VEC] = {}, largest = -INFINITY, sum = 0;
    if (target == MEGALODON_IGNORE) { // the whole block leaves
        if (threadIdx.x == 0) nll[blockIdx.x] = 0;
        for (int v = first; v < V; v += step) store<VEC>(drow + v, value);
        return;
    }
    HeldLogits<T> held[LOSS_HELD];
#pragma unroll
    for (int k = 0; k < LOSS_HELD; k++) held[k].load(row + first + k * step, first + k * step < V);
#pragma unroll
    for (int k = 0; k < LOSS_HELD; k++)
#pragma unroll
        for (int i = 0; i < VEC; i++) largest = fmaxf(largest, held[k][i]);
    float shift = LOG2_E * block_max(largest, shared);
#pragma unroll
    for (int k = 0; k < LOSS_HELD; k++)
#pragma unroll
        for (int i = 0; i < VEC; i++) sum += power_of_two(fmaf(held[k][i], LOG2_E, -shift)); // 2^-inf is 0
    shift += log2f(block_sum(sum, shared));
#pragma unroll
    for (int k = 0; k < LOSS_HELD; k++) {
        int v = first + k * step;
        if (v >= V) break;
#pragma unroll
        for (int i = 0; i < VEC; i++) value[i] = power_of_two(fmaf(held[k][i], LOG2_E, -shift));
        if (target >= v && target < v + VEC) // one thread's
#pragma unroll
            for (int i = 0; i < VEC; i++)
                if (v + i == target) nll[blockIdx.x] = LN_2 * shift - held[k][i], value[i] -= 1;
        store<VEC>(drow + v, value);
    }
}

/* nll (rows), dlogits (rows,V): the loss of each row and its gradient; logits (rows,V), targets (rows) */
template <typename T>
static void loss_and_gradient(Context *context, T *dlogits, float *nll, const T *logits,
                              const int32_t *targets, int64_t rows, int64_t V) {
    WITH_VEC(T, vectorises<T>(V, logits, dlogits), {
        int64_t held = ceil_div(V, VEC * LOSS_HELD * WARP_SIZE) * WARP_SIZE;
        if (VEC > 1 && held > 2 * WARP_SIZE && held <= LOSS_HELD_THREADS) {
            LAUNCH((loss_held_kernel<T>), (unsigned)rows, (unsigned)held, context, dlogits, nll, logits,
                   targets, (int)V);
            return;
        }
        int64_t warps = ceil_div(V, VEC * WARP_SIZE), most = LOSS_THREADS / WARP_SIZE;
        unsigned threads = (unsigned)(warps < most ? warps : most) * WARP_SIZE;
        LAUNCH((loss_kernel<T, VEC>), (unsigned)rows, threads, context, dlogits, nll, logits, targets,
               (int)V);
    });
}

/* computes: x[i] *= scale
 * launch:   grid ceil(count / (256 VEC)), block 256: a thread owns VEC elements
 * traffic:  2 count sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants count and x in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float */
template <typename T, int VEC> __global__ void scale_kernel(T *x, float scale, int64_t count) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (at >= count) return;
    float value[VEC];
    load<VEC>(value, x + at);
#pragma unroll
    for (int i = 0; i < VEC; i++) value[i] *= scale;
    store<VEC>(x + at, value);
}
template <typename T> static void scale_in_place(Context *context, T *x, float scale, int64_t count) {
    WITH_VEC(T, vectorises<T>(count, x),
             LAUNCH((scale_kernel<T, VEC>), blocks_for(count, 256 * VEC), 256, context, x, scale, count));
}

/* computes: to[i] = scale from[i], added to what is there if asked
 * launch:   grid ceil(count / (256 VEC)), block 256: a thread owns VEC elements
 * traffic:  8 count bytes, 12 where it adds
 * needs:    VEC 4 wants count and pointers in multiples of 16 bytes; VEC 1 takes anything
 * numerics: float */
template <int VEC>
__global__ void scaled_kernel(float *to, const float *from, float scale, bool add, int64_t count) {
    int64_t at = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * VEC;
    if (at >= count) return;
    float value[VEC], sum[VEC] = {};
    load<VEC>(value, from + at);
    if (add) load<VEC>(sum, to + at);
#pragma unroll
    for (int i = 0; i < VEC; i++) sum[i] += scale * value[i];
    store<VEC>(to + at, sum);
}
/* to (+)= scale from */
static inline void copy_scaled(Context *context, float *to, const float *from, float scale, bool add,
                               int64_t count) {
    WITH_VEC(float, vectorises<float>(count, to, from),
             LAUNCH((scaled_kernel<VEC>), blocks_for(count, 256 * VEC), 256, context, to, from, scale, add,
                    count));
}

#endif
