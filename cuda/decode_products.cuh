/* decode_products.cuh - the products of a step of generation for every type and size.
 *
 * What a product is (DecodeProduct) stands here for decode_tiles.cuh too, which makes those in bf16 whose K
 * is a multiple of 32. These kernels make the others and fp32's: the input lies in shared memory, a warp has
 * one or a few outputs, and its lanes share out the sum.
 */
#ifndef CUDA_DECODE_PRODUCTS_CUH
#define CUDA_DECODE_PRODUCTS_CUH

#include "decode.cuh"

enum {
    DECODE_TILE = 8192, /* numbers of the input in shared memory, all rows together */
    DECODE_MAX_PRODUCTS = 4
};

/* The last two only in an opening (see decode_tiles.cuh): u = TimestepNorm(x), and RMSNorm(CEMA(u)). */
enum DecodeInput { DECODE_PLAIN, DECODE_RMSNORM, DECODE_LAYERNORM, DECODE_NORMED, DECODE_AVERAGED };

/* out = scale act(input(x) W^T + bias) + add, act(s) = s, silu(s), or silu(s) (input(x) second^T). */
template <typename T> struct DecodeProduct {
    const T *weight, *second;      /* (N,K); second NULL: none */
    const T *bias, *scale, *add;   /* (N), (N), (M,N); each NULL: none */
    const T *x;                    /* (M,K) */
    const T *norm_weight, *norm_bias; /* (K), NULL: none */
    DecodeInput input;
    bool silu;
    T *out;                /* (M,N), or the row count[m] mod C of (M,C,N) where count is not NULL */
    float *wide_out;       /* (M,N), instead of out where it is not NULL */
    const int64_t *count;
    int C, N, K, blocks; /* blocks: set by the launcher */
};

/* Products that start together. All have the same K. advance (M), NULL: none, goes up by one. */
template <typename T> struct DecodeProducts {
    DecodeProduct<T> product[DECODE_MAX_PRODUCTS];
    int number, M;
    float eps;
    int64_t *advance;
    int launch; /* the kernel's number in the step, for its timeline */
};

/* Place of number k of the input in its row of shared memory: such that the lanes of a warp, each with VEC
 * neighbours, read 16 bytes at a time from neighbouring places. */
template <int VEC> __device__ inline int place_in_row(int k) {
    if (VEC < 8) return k;
    return (k & ~255) | (k >> 2 & 1) << 7 | (k >> 3 & 31) << 2 | (k & 3);
}
template <int VEC> __device__ inline void load_from_row(float (&to)[VEC], const float *row, int k) {
    if constexpr (VEC == 1) {
        to[0] = row[k];
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i += 4) {
            float4 part = *(const float4 *)(row + place_in_row<VEC>(k + i));
            to[i] = part.x, to[i + 1] = part.y, to[i + 2] = part.z, to[i + 3] = part.w;
        }
    }
}

/* Sum over a row of x, or of (x - mean)^2, by a whole warp. */
template <typename T, int VEC, bool SQUARES>
__device__ inline float decode_row_sum(const T *row, int K, float mean) {
    float sum = 0, value[VEC];
#pragma unroll 4
    for (int k = (int)threadIdx.x % WARP_SIZE * VEC; k < K; k += WARP_SIZE * VEC) {
        unpack<T, VEC>(value, *(const Words<T, VEC> *)(row + k));
#pragma unroll
        for (int i = 0; i < VEC; i++)
            sum += SQUARES ? (value[i] - mean) * (value[i] - mean) : value[i];
    }
    return warp_sum(sum);
}

/* Brings numbers [first, last) of every row of the input to shared memory, normalised. */
template <typename T, int VEC, int ROWS>
__device__ inline void decode_fill(float (*tile)[DECODE_TILE / ROWS], const DecodeProduct<T> &q, int M,
                                   int first, int last, const float *mean, const float *rstd) {
    constexpr int EACH = VEC < 4 ? VEC : 4; // few registers: the weights hold many
#pragma unroll 1
    for (int k = first + (int)threadIdx.x * EACH; k < last; k += DECODE_THREADS * EACH) {
        float w[EACH] = {}, b[EACH] = {}, value[EACH];
        if (q.norm_weight) load<EACH>(w, q.norm_weight + k);
        if (q.norm_bias) load<EACH>(b, q.norm_bias + k);
#pragma unroll
        for (int m = 0; m < ROWS; m++) {
            if (m >= M) break;
            load<EACH>(value, q.x + (int64_t)m * q.K + k);
            if (q.input != DECODE_PLAIN) {
#pragma unroll
                for (int i = 0; i < EACH; i++)
                    value[i] = (value[i] - mean[m]) * rstd[m] * (1.0f + w[i]) + b[i];
            }
            if constexpr (EACH == 1)
                tile[m][k - first] = value[0];
            else
                *(float4 *)(tile[m] + place_in_row<VEC>(k - first)) =
                    make_float4(value[0], value[1], value[2], value[3]);
        }
    }
}

/* sum[m][r] += w[r] . x[m] for VEC numbers from place k of the tile on */
template <typename T, int VEC, int ROWS, int OUTPUTS>
__device__ inline void decode_multiply(float (&sum)[ROWS][OUTPUTS], const Words<T, VEC> (&w)[OUTPUTS],
                                       const float (*tile)[DECODE_TILE / ROWS], int M, int k) {
    float x[VEC], weight[OUTPUTS][VEC];
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++) unpack<T, VEC>(weight[r], w[r]);
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
        if (m >= M) break;
        load_from_row<VEC>(x, tile[m], k);
#pragma unroll
        for (int r = 0; r < OUTPUTS; r++)
#pragma unroll
            for (int i = 0; i < VEC; i++) sum[m][r] = fmaf(weight[r][i], x[i], sum[m][r]);
    }
}

/* computes: each of the products (see DecodeProduct)
 * launch:   grid blocks of all products, block 256: a warp owns OUTPUTS numbers of the output (or one number
 *           of a gated product, which takes two rows of weights), its lanes split K
 * traffic:  the weights, N K sizeof(T) bytes each, once for all rows
 * needs:    VEC 16 / sizeof(T) wants K and pointers in multiples of 16 bytes; VEC 1 takes anything; M <= ROWS
 * numerics: float sums in a fixed order: deterministic; out may be add */
template <typename T, int VEC, int ROWS, int OUTPUTS>
__global__ void __launch_bounds__(DECODE_THREADS, ROWS == 1 && OUTPUTS <= 2 ? 3 : 2)
    decode_products_kernel(const __grid_constant__ DecodeProducts<T> p) {
    constexpr int TILE = DECODE_TILE / ROWS, STRIDE = WARP_SIZE * VEC;
    constexpr int FEW = OUTPUTS == 1 ? 4 : 2, HELD = FEW < TILE / STRIDE ? FEW : TILE / STRIDE;
    __shared__ float4 tile_memory[DECODE_TILE / 4];
    __shared__ float mean[ROWS], rstd[ROWS];
    float(*tile)[TILE] = (float(*)[TILE])tile_memory;
    mark(p.launch, STAGE_ENTERED);
    start_next_kernel();
    int warp = (int)threadIdx.x / WARP_SIZE, lane = (int)threadIdx.x % WARP_SIZE;
    int which = 0, block = (int)blockIdx.x;
    while (block >= p.product[which].blocks) block -= p.product[which++].blocks;
    const DecodeProduct<T> &q = p.product[which];
    int K = q.K, N = q.N, M = ROWS == 1 ? 1 : p.M, unit = block * DECODE_WARPS + warp;

    /* The weights first: some to registers, the others to the L2 cache. Past the end a warp computes the last
     * output again, and does not write it. */
    int output[OUTPUTS];
    const T *row[OUTPUTS];
    float bias[OUTPUTS], scale[OUTPUTS];
    Words<T, VEC> held[HELD][OUTPUTS];
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++) {
        output[r] = q.second ? unit : unit * OUTPUTS + r;
        int j = min(output[r], N - 1);
        row[r] = (q.second && r ? q.second : q.weight) + (int64_t)j * K;
        bias[r] = q.bias ? to_float(q.bias[j]) : 0.0f;
        scale[r] = q.scale ? to_float(q.scale[j]) : 1.0f;
    }
#pragma unroll
    for (int i = 0; i < HELD; i++)
#pragma unroll
        for (int r = 0; r < OUTPUTS; r++) {
            int k = i * STRIDE + lane * VEC;
            if (k < K) held[i][r] = *(const Words<T, VEC> *)(row[r] + k);
        }
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++)
        prefetch_bytes(row[r] + HELD * STRIDE, (int64_t)(K - HELD * STRIDE) * (int)sizeof(T), lane,
                       WARP_SIZE);
    follow_previous_kernel();
    mark(p.launch, STAGE_WAITED);

    if (p.advance && blockIdx.x == 0 && (int)threadIdx.x < M) p.advance[threadIdx.x]++;
    float sum[ROWS][OUTPUTS] = {}, add[OUTPUTS] = {}; // lane m ends row m
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++)
        if (q.add && lane < M && output[r] < N) add[r] = to_float(q.add[(int64_t)lane * N + output[r]]);
    if (q.input != DECODE_PLAIN) {
        if (warp < M) {
            const T *x = q.x + (int64_t)warp * K;
            float middle = 0; // RMSNorm takes the squares themselves
            if (q.input == DECODE_LAYERNORM) middle = decode_row_sum<T, VEC, false>(x, K, 0) / (float)K;
            float var = decode_row_sum<T, VEC, true>(x, K, middle) / (float)K;
            if (lane == 0) mean[warp] = middle, rstd[warp] = 1.0f / sqrtf(var + p.eps);
        }
        __syncthreads(); // every row's moments are there
    }
    for (int first = 0; first < K; first += TILE) {
        int last = min(first + TILE, K), k = first + lane * VEC;
        if (first > 0) __syncthreads(); // all have read the last part of the input
        decode_fill<T, VEC, ROWS>(tile, q, M, first, last, mean, rstd);
        __syncthreads(); // this part of the input is there
        if (first == 0) mark(p.launch, STAGE_INPUT);
        if (first == 0) {
#pragma unroll
            for (int i = 0; i < HELD; i++)
                if (k + i * STRIDE < K)
                    decode_multiply<T, VEC, ROWS, OUTPUTS>(sum, held[i], tile, M, k + i * STRIDE);
            k += HELD * STRIDE;
        }
#pragma unroll(OUTPUTS == 1 ? 4 : 2)
        for (; k < last; k += STRIDE) {
            Words<T, VEC> w[OUTPUTS];
#pragma unroll
            for (int r = 0; r < OUTPUTS; r++) w[r] = *(const Words<T, VEC> *)(row[r] + k);
            decode_multiply<T, VEC, ROWS, OUTPUTS>(sum, w, tile, M, k - first);
        }
    }

    mark(p.launch, STAGE_MULTIPLIED);
    float total[OUTPUTS] = {};
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
        if (m >= M) break;
#pragma unroll
        for (int r = 0; r < OUTPUTS; r++) {
            float all = warp_sum(sum[m][r]);
            if (lane == m) total[r] = all;
        }
    }
    if (lane >= M) return;
    int64_t place = q.count ? (int64_t)lane * q.C + q.count[lane] % q.C : lane;
#pragma unroll
    for (int r = 0; r < OUTPUTS; r++) {
        if (output[r] >= N || (q.second && r)) continue;
        float value = total[r] + bias[r];
        if (q.silu) value = silu(value);
        if (q.second) value *= total[OUTPUTS - 1];
        value = fmaf(scale[r], value, add[r]);
        if (q.wide_out)
            q.wide_out[place * N + output[r]] = value;
        else
            q.out[place * N + output[r]] = from_float<T>(value);
    }
    mark(p.launch, STAGE_ENDED);
}

template <typename T, int VEC, int ROWS, int OUTPUTS>
static void launch_products(Context *context, DecodeProducts<T> p) {
    int blocks = 0;
    for (int i = 0; i < p.number; i++) {
        int per_block = DECODE_WARPS * (p.product[i].second ? 1 : OUTPUTS);
        p.product[i].blocks = (int)ceil_div(p.product[i].N, per_block);
        blocks += p.product[i].blocks;
    }
    launch_step(context, "products", decode_products_kernel<T, VEC, ROWS, OUTPUTS>, dim3((unsigned)blocks),
                DECODE_THREADS, p);
}

/* One warp takes several outputs only where every processor still has two blocks: a gated product must. */
template <typename T> static void decode_products(Context *context, const DecodeProducts<T> &p) {
    int64_t outputs = 0, two_each = (int64_t)context->num_sms * DECODE_WARPS * 2;
    bool wide = true, gated = false;
    for (int i = 0; i < p.number; i++) {
        const DecodeProduct<T> &q = p.product[i];
        wide = wide && vectorises<T>(q.K, q.weight, q.second, q.x, q.norm_weight, q.norm_bias);
        gated = gated || q.second;
        outputs += q.N;
    }
    WITH_VEC(T, wide, {
        if (p.M == 1 && !gated && outputs >= 4 * two_each)
            launch_products<T, VEC, 1, 4>(context, p);
        else if (p.M == 1 && (gated || outputs >= 2 * two_each))
            launch_products<T, VEC, 1, 2>(context, p);
        else if (p.M == 1)
            launch_products<T, VEC, 1, 1>(context, p);
        else if (gated || outputs >= 2 * two_each)
            launch_products<T, VEC, DECODE_ROWS, 2>(context, p);
        else
            launch_products<T, VEC, DECODE_ROWS, 1>(context, p);
    });
}

#endif
