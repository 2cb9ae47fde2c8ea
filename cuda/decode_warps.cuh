/* decode_warps.cuh - attention of one token a row, in which warps do not wait for one another.
 *
 * The kernel of decode.cuh again, with the same parts of the keys and the same end, for heads of at most 32
 * VEC numbers: each warp makes the query for itself, with a lane's numbers in its registers, and keeps the
 * largest score and the sums of its own keys until the end. The first keys and values, the query's constants
 * and its angle are in registers before the wait.
 */
#ifndef CUDA_DECODE_WARPS_CUH
#define CUDA_DECODE_WARPS_CUH

#include "decode.cuh"

/* 1: this kernel, where sizes allow it. */
#ifndef DECODE_ATTENTION_WARPS
#define DECODE_ATTENTION_WARPS 0
#endif

/* A lane's numbers of the query or the key, from those that are normalised: turned, and rounded as they are
 * kept. inverse: 1/sqrt z. */
template <typename T, int VEC>
__device__ inline void turn_numbers(float (&to)[VEC], const float (&normed)[VEC],
                                    const Words<T, VEC> &gamma, const Words<T, VEC> &beta,
                                    const float2 (&angle)[VEC / 2], float inverse) {
    float factor[VEC], shift[VEC];
    unpack<T, VEC>(factor, gamma);
    unpack<T, VEC>(shift, beta);
#pragma unroll
    for (int i = 0; i < VEC; i += 2) {
        float2 turned =
            turn_pair(normed[i] * (1.0f + factor[i]) * inverse + shift[i],
                      normed[i + 1] * (1.0f + factor[i + 1]) * inverse + shift[i + 1], angle[i / 2], 1);
        to[i] = to_float(from_float<T>(turned.x)), to[i + 1] = to_float(from_float<T>(turned.y));
    }
}

/* What a warp knows of its keys. */
template <int VEC> struct WarpAttention { float top, sum, total[VEC]; };

/* computes: k into the state, and gated = r softmax(q k^T) v over the keys of the chunk so far
 * launch:   grid (16 parts of the keys, ceil(e / (32 VEC)), B H), block 256: a warp takes every 8th key, a
 *           lane VEC numbers of the query and the keys, and VEC columns
 * traffic:  B (n + 1) (E + Z) sizeof(T) bytes, the keys again for each block of columns from the L2 cache
 * needs:    VEC 16 / sizeof(T), at most 32 VEC numbers a head, z, e and pointers in multiples of 16 bytes
 * numerics: float, keys, warps and parts in a fixed order: deterministic */
template <typename T, int VEC>
__global__ void __launch_bounds__(DECODE_THREADS, 2)
    decode_attention_warps_kernel(const __grid_constant__ DecodeAttention<T> p) {
    constexpr int EACH = DECODE_KEYS / DECODE_WARPS, COLUMNS = WARP_SIZE * VEC;
    __shared__ float warp_totals[DECODE_WARPS][COLUMNS], warp_tops[DECODE_WARPS], warp_sums[DECODE_WARPS];
    __shared__ int arrived;
    mark(p.launch, STAGE_ENTERED);
    start_next_kernel();
    int bh = (int)blockIdx.z, b = bh / p.H, h = bh % p.H;
    int warp = (int)threadIdx.x / WARP_SIZE, lane = (int)threadIdx.x % WARP_SIZE, d = lane * VEC;
    int n = (int)(p.count[b] % p.C), share = n / DECODE_SPLITS + 1, splits = n / share + 1;
    int begin = (int)blockIdx.x * share, end = min(begin + share, n + 1);
    if (begin > n) return; // the whole block leaves: a short chunk has fewer parts
    int column = ((int)blockIdx.y * WARP_SIZE + lane) * VEC;
    bool in_head = d < p.z, in_row = column < p.e;
    int64_t k_width = (int64_t)p.H * p.z, v_width = (int64_t)p.H * p.e;
    T *keys = p.k + (int64_t)b * p.C * k_width + (int64_t)h * p.z + d;
    const T *values = p.v + (int64_t)b * p.C * v_width + (int64_t)h * p.e + column;

    const Words<T, VEC> nothing = {};
    Words<T, VEC> key[EACH], value[EACH], gamma[2], beta[2];
    float2 angle[VEC / 2];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
        int j = begin + warp + i * DECODE_WARPS;
        key[i] = j < end && j != n && in_head ? *(const Words<T, VEC> *)(keys + j * k_width) : nothing;
        value[i] = j < end && j != n && in_row ? *(const Words<T, VEC> *)(values + j * v_width) : nothing;
    }
#pragma unroll
    for (int which = 0; which < 2; which++) {
        int at = (which * p.H + h) * p.z + d;
        gamma[which] = in_head ? *(const Words<T, VEC> *)(p.gamma + at) : nothing;
        beta[which] = in_head ? *(const Words<T, VEC> *)(p.beta + at) : nothing;
    }
#pragma unroll
    for (int i = 0; i < VEC / 2; i++)
        angle[i] = in_head ? p.rope[(int64_t)n * (p.z / 2) + d / 2 + i] : make_float2(0, 0);
    for (int j = begin + DECODE_KEYS + warp; j < min(end, n); j += DECODE_WARPS) {
        if (in_head && d % (DECODE_LINE / (int)sizeof(T)) == 0) prefetch_bytes(keys + j * k_width, 1, 0, 1);
        if (in_row && d % (DECODE_LINE / (int)sizeof(T)) == 0) prefetch_bytes(values + j * v_width, 1, 0, 1);
    }
    ask_ahead(p.ahead);
    follow_previous_kernel();
    mark(p.launch, STAGE_WAITED);

    Words<T, VEC> zz = nothing;
    if (in_head) zz = *(const Words<T, VEC> *)(p.zz + ((int64_t)b * p.H + h) * p.z + d);
    if (end > n && (n - begin) % DECODE_WARPS == warp && in_row) {
        Words<T, VEC> newest = *(const Words<T, VEC> *)(values + n * v_width);
#pragma unroll
        for (int i = 0; i < EACH; i++)
            if (begin + warp + i * DECODE_WARPS == n) value[i] = newest;
    }
    float query[VEC], own_key[VEC], normed[VEC], x[VEC], squares = 0;
    unpack<T, VEC>(normed, zz);
#pragma unroll
    for (int i = 0; i < VEC; i++) squares = fmaf(normed[i], normed[i], squares);
    float rstd = 1.0f / sqrtf(warp_sum(squares) / (float)p.z + p.eps);
#pragma unroll
    for (int i = 0; i < VEC; i++) normed[i] *= rstd;
    float inverse = 1.0f / sqrtf((float)p.z);
    turn_numbers<T, VEC>(query, normed, gamma[0], beta[0], angle, inverse);
    turn_numbers<T, VEC>(own_key, normed, gamma[1], beta[1], angle, inverse);
    if (end > n && blockIdx.y == 0 && warp == 0 && in_head) store<VEC>(keys + n * k_width, own_key);
    mark(p.launch, STAGE_INPUT);

    WarpAttention<VEC> own = {-INFINITY, 0, {}};
    for (int first = begin + warp; first < end; first += DECODE_KEYS) {
        if (first >= begin + DECODE_KEYS) {
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int j = first + i * DECODE_WARPS;
                key[i] = value[i] = nothing;
                if (j < end && j != n && in_head) key[i] = *(const Words<T, VEC> *)(keys + j * k_width);
                if (j < end && in_row) value[i] = *(const Words<T, VEC> *)(values + j * v_width);
            }
        }
        float score[EACH], largest = own.top;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            int j = first + i * DECODE_WARPS;
            unpack<T, VEC>(x, key[i]);
            score[i] = 0;
#pragma unroll
            for (int c = 0; c < VEC; c++) score[i] = fmaf(query[c], j == n ? own_key[c] : x[c], score[i]);
        }
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            score[i] = warp_sum(score[i]);
            if (first + i * DECODE_WARPS >= end) score[i] = -INFINITY;
            largest = fmaxf(largest, score[i]);
        }
        float keep = expf(own.top - largest); // 0 the first time
        own.top = largest, own.sum *= keep;
#pragma unroll
        for (int c = 0; c < VEC; c++) own.total[c] *= keep;
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            float weight = expf(score[i] - largest); // 0 where there is no such key
            own.sum += weight;
            unpack<T, VEC>(x, value[i]);
#pragma unroll
            for (int c = 0; c < VEC; c++) own.total[c] = fmaf(weight, x[c], own.total[c]);
        }
    }
    if (lane == 0) warp_tops[warp] = own.top, warp_sums[warp] = own.sum;
    store<VEC>(warp_totals[warp] + d, own.total);
    __syncthreads(); // what all warps know is there
    mark(p.launch, STAGE_MULTIPLIED);

    int64_t unit = (int64_t)bh * gridDim.y + blockIdx.y;
    column = (int)blockIdx.y * COLUMNS + (int)threadIdx.x;
    bool active = (int)threadIdx.x < COLUMNS && column < p.e;
    float top = warp_tops[0], sum = 0, all = 0;
#pragma unroll
    for (int i = 1; i < DECODE_WARPS; i++) top = fmaxf(top, warp_tops[i]);
#pragma unroll
    for (int i = 0; i < DECODE_WARPS; i++) {
        float factor = expf(warp_tops[i] - top); // 0 for a warp without keys
        sum = fmaf(factor, warp_sums[i], sum);
        if (active) all = fmaf(factor, warp_totals[i][threadIdx.x], all);
    }
    if (active) p.partial[((int64_t)bh * DECODE_SPLITS + blockIdx.x) * p.e + column] = all;
    if (threadIdx.x == 0) p.parts[unit * DECODE_SPLITS + blockIdx.x] = make_float2(top, sum);
    __syncthreads(); // all of the block's part is written
    if (threadIdx.x == 0) {
        __threadfence(); // and can be seen before its arrival is counted
        arrived = atomicAdd(p.arrivals + unit, 1) + 1;
        if (arrived == splits) p.arrivals[unit] = 0; // for the next step
        __threadfence();
    }
    __syncthreads(); // all know whether they are the last
    if (arrived == splits && active) decode_combine<T>(p, bh, unit, splits, column);
    mark(p.launch, STAGE_ENDED);
}

/* decode_attention, by warps where they can. */
template <typename T>
static void decode_step_attention(Context *context, const DecodeAttention<T> &p, int64_t B) {
    constexpr int VEC = 16 / (int)sizeof(T);
    if (DECODE_ATTENTION_WARPS && p.z <= WARP_SIZE * VEC && vectorises<T>(p.z, p.k, p.zz, p.gamma, p.beta) &&
        vectorises<T>(p.e, p.v))
        launch_step(context, "attention", decode_attention_warps_kernel<T, VEC>,
                    dim3(DECODE_SPLITS, blocks_for(p.e, WARP_SIZE * VEC), (unsigned)(B * p.H)),
                    DECODE_THREADS, p);
    else
        decode_attention(context, p, B);
}

#endif
