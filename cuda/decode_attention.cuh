/* decode_attention.cuh - attention of one token a row for every type and size.
 *
 * The keys 0..n of a row, the token's own included, are cut into at most DECODE_SPLITS equal parts. A block
 * takes one part for WARP_SIZE VEC columns of the values; of the blocks of the same columns the last one to
 * arrive adds the parts up, in their order, so that it does not matter which one it is.
 */
#ifndef CUDA_DECODE_ATTENTION_CUH
#define CUDA_DECODE_ATTENTION_CUH

#include "decode.cuh"

enum {
    DECODE_SPLITS = 16, /* parts of the keys that are worked on at the same time */
    DECODE_KEYS = 64,   /* keys of a part that are worked on together */
    DECODE_MAX_HEAD = 1024 /* largest z */
};

template <typename T> struct DecodeAttention {
    T *gated, *k;        /* (B,H,e); (B,C,H,z), which takes the new key in */
    float *partial;      /* (B,H,splits,e): sums of exp(score - top) v */
    float2 *parts;       /* (B,H,columns' blocks,splits): the largest score, the sum of exp(score - it) */
    int *arrivals;       /* (B,H,columns' blocks): zero between steps */
    const T *zz, *r, *v; /* (B,H,z), (B,H,e), (B,C,H,e) with the new value in place */
    const T *gamma, *beta; /* (2,H,z) */
    const float2 *rope;    /* (C,z/2) */
    const int64_t *count;  /* (B) */
    int H, z, e, C;
    float eps;
    int launch; /* the kernel's number in the step, for its timeline */
};

/* q (with 1/sqrt z) to shared memory, and where the block has the new token its key too, rounded as it is
 * kept; one block for all columns writes that to the state. By the whole block. */
template <typename T>
__device__ inline void decode_query(float *query, float *key, float *scratch, const DecodeAttention<T> &p,
                                    int b, int h, int n, bool has_new, bool writes) {
    const T *zz = p.zz + ((int64_t)b * p.H + h) * p.z;
    float squares = 0, inverse = 1.0f / sqrtf((float)p.z);
    for (int i = (int)threadIdx.x; i < p.z; i += DECODE_THREADS) {
        float value = to_float(zz[i]);
        squares += value * value;
    }
    float rstd = 1.0f / sqrtf(block_sum(squares, scratch) / (float)p.z + p.eps);
    for (int i = (int)threadIdx.x; i < p.z / 2; i += DECODE_THREADS) {
        float2 angle = p.rope[(int64_t)n * (p.z / 2) + i];
        float first = to_float(zz[2 * i]) * rstd, second = to_float(zz[2 * i + 1]) * rstd;
#pragma unroll
        for (int which = 0; which < 2; which++) {
            int j = (which * p.H + h) * p.z + 2 * i;
            float2 turned = turn_pair(
                first * (1.0f + to_float(p.gamma[j])) * inverse + to_float(p.beta[j]),
                second * (1.0f + to_float(p.gamma[j + 1])) * inverse + to_float(p.beta[j + 1]), angle, 1);
            T x = from_float<T>(turned.x), y = from_float<T>(turned.y);
            float *to = which ? key : query;
            to[2 * i] = to_float(x), to[2 * i + 1] = to_float(y);
            if (which && has_new && writes) {
                T *kept = p.k + (((int64_t)b * p.C + n) * p.H + h) * p.z + 2 * i;
                kept[0] = x, kept[1] = y;
            }
        }
    }
    __syncthreads(); // query and key are there
}

/* computes: score[j] = q . k[first + j] for j < keys; key n comes from shared memory. A warp has 8 keys. */
template <typename T, int VEC>
__device__ inline void decode_scores(float *score, const float *query, const float *key,
                                     const DecodeAttention<T> &p, int b, int h, int first, int keys, int n) {
    constexpr int EACH = DECODE_KEYS / DECODE_WARPS;
    int warp = (int)threadIdx.x / WARP_SIZE, lane = (int)threadIdx.x % WARP_SIZE;
    int64_t width = (int64_t)p.H * p.z;
    const T *k = p.k + ((int64_t)b * p.C + first) * width + (int64_t)h * p.z;
    float sum[EACH] = {}, x[VEC];
    for (int d = lane * VEC; d < p.z; d += WARP_SIZE * VEC) {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int j = warp + i * DECODE_WARPS;
            if (j >= keys) break;
            if (first + j == n) {
#pragma unroll
                for (int c = 0; c < VEC; c++) x[c] = key[d + c];
            } else {
                load<VEC>(x, k + j * width + d);
            }
#pragma unroll
            for (int c = 0; c < VEC; c++) sum[i] = fmaf(query[d + c], x[c], sum[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        float total = warp_sum(sum[i]);
        if (lane == 0) score[warp + i * DECODE_WARPS] = total;
    }
    __syncthreads(); // all scores are there
}

/* The last block of some columns: gated = r sum over parts of exp(top_s - top) partial_s / sum. */
template <typename T>
__device__ inline void decode_combine(const DecodeAttention<T> &p, int64_t bh, int64_t unit, int splits,
                                      int column) {
    float2 part[DECODE_SPLITS];
    float partial[DECODE_SPLITS], top = -INFINITY, sum = 0, total = 0;
#pragma unroll
    for (int s = 0; s < DECODE_SPLITS; s++) {
        part[s] = make_float2(-INFINITY, 0), partial[s] = 0;
        if (s >= splits) continue;
        part[s] = __ldcg(p.parts + unit * DECODE_SPLITS + s);
        partial[s] = __ldcg(p.partial + (bh * DECODE_SPLITS + s) * p.e + column);
    }
#pragma unroll
    for (int s = 0; s < DECODE_SPLITS; s++) top = fmaxf(top, part[s].x);
#pragma unroll
    for (int s = 0; s < DECODE_SPLITS; s++) {
        float factor = expf(part[s].x - top); // 0 where there is no such part
        sum = fmaf(factor, part[s].y, sum);
        total = fmaf(factor, partial[s], total);
    }
    int64_t at = bh * p.e + column;
    p.gated[at] = from_float<T>(total / sum * to_float(p.r[at]));
}

/* computes: k into the state, and gated = r softmax(q k^T) v over the keys of the chunk so far
 * launch:   grid (16 parts of the keys, ceil(e / (32 VEC)), B H), block 256: a warp takes every 8th key, a
 *           lane VEC columns
 * traffic:  B (n + 1) (E + Z) sizeof(T) bytes, the keys again for each block of columns from the L2 cache
 * needs:    z even, at most 1024; VEC 16 / sizeof(T) wants z, e and pointers in multiples of 16 bytes
 * numerics: float, keys and parts in a fixed order: deterministic */
template <typename T, int VEC>
__global__ void __launch_bounds__(DECODE_THREADS, 2)
    decode_attention_kernel(const __grid_constant__ DecodeAttention<T> p) {
    constexpr int EACH = DECODE_KEYS / DECODE_WARPS, COLUMNS = WARP_SIZE * VEC;
    __shared__ float query[DECODE_MAX_HEAD], key[DECODE_MAX_HEAD], score[DECODE_KEYS];
    __shared__ float warp_sums[DECODE_WARPS][COLUMNS], scratch[DECODE_WARPS];
    __shared__ int arrived;
    mark(p.launch, STAGE_ENTERED);
    start_next_kernel();
    int bh = (int)blockIdx.z, b = bh / p.H, h = bh % p.H;
    int warp = (int)threadIdx.x / WARP_SIZE, lane = (int)threadIdx.x % WARP_SIZE;
    int n = (int)(p.count[b] % p.C), share = n / DECODE_SPLITS + 1, splits = n / share + 1;
    int begin = (int)blockIdx.x * share, end = min(begin + share, n + 1);
    if (begin > n) return; // the whole block leaves: a short chunk has fewer parts
    int column = ((int)blockIdx.y * WARP_SIZE + lane) * VEC;
    int64_t k_width = (int64_t)p.H * p.z, v_width = (int64_t)p.H * p.e;
    const T *v = p.v + (int64_t)b * p.C * v_width + (int64_t)h * p.e + column;
    for (int j = begin + warp; j < min(end, n); j += DECODE_WARPS) {
        prefetch_bytes(p.k + ((int64_t)b * p.C + j) * k_width + (int64_t)h * p.z, p.z * (int)sizeof(T), lane,
                       WARP_SIZE);
        if (column < p.e && lane % (DECODE_LINE / (VEC * (int)sizeof(T))) == 0)
            prefetch_bytes(v + j * v_width, 1, 0, 1);
    }
    follow_previous_kernel();
    mark(p.launch, STAGE_WAITED);

    decode_query<T>(query, key, scratch, p, b, h, n, end > n, blockIdx.y == 0);
    mark(p.launch, STAGE_INPUT);
    float top = -INFINITY, sum = 0, total[VEC] = {};
    for (int first = begin; first < end; first += DECODE_KEYS) {
        int keys = min((int)DECODE_KEYS, end - first);
        Words<T, VEC> value[EACH]; // on their way while the scores are computed
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int j = warp + i * DECODE_WARPS;
            if (j < keys && column < p.e)
                value[i] = *(const Words<T, VEC> *)(v + (int64_t)(first + j) * v_width);
        }
        decode_scores<T, VEC>(score, query, key, p, b, h, first, keys, n);
        float own[2], largest = top;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int j = lane + i * WARP_SIZE;
            own[i] = j < keys ? score[j] : -INFINITY;
            largest = fmaxf(largest, own[i]);
        }
        largest = warp_max(largest);
        float keep = expf(top - largest); // 0 the first time
        sum = sum * keep + warp_sum(expf(own[0] - largest) + expf(own[1] - largest));
        top = largest;
#pragma unroll
        for (int c = 0; c < VEC; c++) total[c] *= keep;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int j = warp + i * DECODE_WARPS;
            if (j >= keys || column >= p.e) break;
            float weight = expf(score[j] - largest), x[VEC];
            unpack<T, VEC>(x, value[i]);
#pragma unroll
            for (int c = 0; c < VEC; c++) total[c] = fmaf(weight, x[c], total[c]);
        }
        __syncthreads(); // all have read the scores: the next keys' may overwrite them
    }
#pragma unroll
    for (int c = 0; c < VEC; c++) warp_sums[warp][lane * VEC + c] = total[c];
    __syncthreads(); // the warps' sums are there
    mark(p.launch, STAGE_MULTIPLIED);
    int64_t unit = (int64_t)bh * gridDim.y + blockIdx.y;
    column = (int)blockIdx.y * COLUMNS + (int)threadIdx.x;
    bool active = (int)threadIdx.x < COLUMNS && column < p.e;
    if (active) {
        float all = 0;
        for (int i = 0; i < DECODE_WARPS; i++) all += warp_sums[i][threadIdx.x];
        p.partial[((int64_t)bh * DECODE_SPLITS + blockIdx.x) * p.e + column] = all;
    }
    if (threadIdx.x == 0) p.parts[unit * DECODE_SPLITS + blockIdx.x] = make_float2(top, sum);
    __threadfence(); // this block's part can be seen before its arrival is counted
    __syncthreads(); // all of the block's part is written
    if (threadIdx.x == 0) {
        arrived = atomicAdd(p.arrivals + unit, 1) + 1;
        if (arrived == splits) p.arrivals[unit] = 0; // for the next step
        __threadfence();
    }
    __syncthreads(); // all know whether they are the last
    if (arrived == splits && active) decode_combine<T>(p, bh, unit, splits, column);
    mark(p.launch, STAGE_ENDED);
}

/* How many numbers of `partial`, `parts` and `arrivals` a call needs at most. */
struct DecodeAttentionSizes { int64_t partial, parts, arrivals; };
static inline DecodeAttentionSizes decode_attention_sizes(int64_t B, int64_t H, int64_t e) {
    int64_t units = B * H * ceil_div(e, WARP_SIZE);
    return DecodeAttentionSizes{B * H * DECODE_SPLITS * e, units * DECODE_SPLITS, units};
}

template <typename T> static void decode_attention(Context *context, const DecodeAttention<T> &p, int64_t B) {
    WITH_VEC(T, vectorises<T>(p.z, p.k) && vectorises<T>(p.e, p.v),
             launch_step(context, "attention", decode_attention_kernel<T, VEC>,
                         dim3(DECODE_SPLITS, blocks_for(p.e, WARP_SIZE * VEC), (unsigned)(B * p.H)),
                         DECODE_THREADS, p));
}

#endif
