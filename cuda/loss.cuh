/* loss.cuh - the loss and its gradient in one pass over the logits: what a training step runs. The component
 * cross_entropy stands in pointwise.cuh.
 */
#ifndef CUDA_LOSS_CUH
#define CUDA_LOSS_CUH

#include "pointwise.cuh"

enum { LOSS_THREADS = 1024 };

/* computes: nll[row] = lse - logits[row, target], lse = log sum exp logits[row];  dlogits[row, v] =
 *           exp(logits[row, v] - lse) - (v == target); both 0 where the target is ignored
 * launch:   grid rows, block 32..1024: a block owns a row; two blocks a multiprocessor, so that the second
 *           reading of 32,000 logits in bf16 finds both rows in the first cache
 * traffic:  2 rows V sizeof(T) bytes
 * needs:    VEC 16 / sizeof(T) wants V and pointers in multiples of 16 bytes; VEC 1 takes anything; dlogits may
 *           be logits
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

/* nll (rows), dlogits (rows,V): the loss of each row and its gradient; logits (rows,V), targets (rows) */
template <typename T>
static void loss_and_gradient(Context *context, T *dlogits, float *nll, const T *logits,
                              const int32_t *targets, int64_t rows, int64_t V) {
    WITH_VEC(T, vectorises<T>(V, logits, dlogits), {
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
