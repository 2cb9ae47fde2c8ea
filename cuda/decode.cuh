/* decode.cuh - one token a row, for at most 8 rows: the kernels of a step of generation.
 *
 * A step reads every weight once and computes little, so two things count: that the device's memory is never
 * idle, and how many kernels wait for one another. Six kernels make a block:
 *
 *   decode_norm        u = TimestepNorm(x), c = CEMA(u), their states          (the last one: the final norm)
 *   decode_products    z, r and m Wh1^T + x from m = RMSNorm(c); v from u, straight into the state
 *   decode_attention   q, k, scores, values, and the gate: ar = a r
 *   decode_products    y = ar Wh2^T + (m Wh1^T + x)
 *   decode_products    hidden = silu(fc1 LayerNorm(y)) (* fc3 LayerNorm(y))
 *   decode_products    x = alpha fc2 hidden + x                                (the last one: the logits)
 *
 * Each starts while the one before it still runs (programmatic dependent launch, from compute capability 9.0
 * on): it asks for its weights, which nothing in a step changes, and only then waits for the results of the
 * kernel before. All positions are read from the state's counts on the device: the same launches serve every
 * token, and can be recorded once.
 */
#ifndef CUDA_DECODE_CUH
#define CUDA_DECODE_CUH

#include "cema.cuh"
#include "matmul.cuh"
#include "queries.cuh"
#include "timeline.cuh"
#include "timestepnorm.cuh"

/* 1: a kernel of a step lets the next one start as soon as all of its own blocks have begun, not only when
 * the kernel before it has ended: several are then in their first part, where they ask for weights. */
#ifndef DECODE_EARLY
#define DECODE_EARLY 0
#endif
/* Not 0: a kernel of a step also asks for at most so many MiB of the weights of the kernels after it, so that
 * they are in the L2 cache when those come, which may have to wait for registers until then. */
#ifndef DECODE_AHEAD
#define DECODE_AHEAD 0
#endif

/* 1: decode_norm has a channel's parameters and states in registers before the wait. */
#ifndef DECODE_NORM_HELD
#define DECODE_NORM_HELD 0
#endif
/* Not 0: percent of a processor's memory that all kernels of a step want as shared memory, so that it need not be
 * divided anew between two of them. */
#ifndef DECODE_CARVEOUT
#define DECODE_CARVEOUT 0
#endif

/* 1: the first products of a layer also ask for the keys and values of the tokens before. */
#ifndef DECODE_KEYS_AHEAD
#define DECODE_KEYS_AHEAD 0
#endif

enum {
    DECODE_ROWS = 8, /* largest batch */
    DECODE_THREADS = 256,
    DECODE_WARPS = DECODE_THREADS / WARP_SIZE,
    DECODE_TILE = 8192, /* numbers of the input in shared memory, all rows together */
    DECODE_NORM_THREADS = 512,
    DECODE_LANES = 16,    /* lanes that share a channel's states */
    DECODE_SPLITS = 16,   /* parts of the keys that are worked on at the same time */
    DECODE_KEYS = 64,     /* keys of a part that are worked on together */
    DECODE_MAX_HEAD = 1024, /* largest z */
    DECODE_LINE = 128,    /* bytes that one prefetch brings to the L2 cache */
    DECODE_MAX_PRODUCTS = 4
};

/* The first thing in a kernel of a step. */
__device__ inline void start_next_kernel() {
#if DECODE_EARLY && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Waits for the kernel before, whose results (and those of all kernels before it) can be read from here on,
 * and lets the next kernel start. Whatever a kernel does before this call may only read what no kernel of
 * the step writes before it: weights, counts, and the state as the last step left it. It may write what no
 * kernel of the step reads but later ones, after their own wait. Each kernel has a block that waits, so that
 * the end of a kernel is also the end of all kernels before it. */
__device__ inline void follow_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#if !DECODE_EARLY
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
#endif
}

/* Asks for the lines of `bytes` bytes, shared out over `threads` threads. */
__device__ inline void prefetch_bytes(const void *memory, int64_t bytes, int thread, int threads) {
#ifdef __CUDA_ARCH__
    for (int64_t at = (int64_t)thread * DECODE_LINE; at < bytes; at += (int64_t)threads * DECODE_LINE)
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char *)memory + at));
#endif
}

/* Weights of later kernels. */
enum { AHEAD_PARTS = 3 };
struct DecodeAhead {
    const void *memory[AHEAD_PARTS]; /* NULL: none */
    int64_t bytes[AHEAD_PARTS];
    template <typename T> void add(const T *weights, int64_t count) {
        int64_t left = (int64_t)DECODE_AHEAD << 20;
        for (int i = 0; i < AHEAD_PARTS; i++) {
            if (!memory[i]) {
                int64_t all = count * (int64_t)sizeof(T);
                memory[i] = weights, bytes[i] = all < left ? all : left;
                return;
            }
            left -= bytes[i];
        }
    }
};

/* By all threads of the grid, when nothing that is waited for can come after it. */
__device__ inline void ask_ahead(const DecodeAhead &ahead) {
#if DECODE_AHEAD && defined(__CUDA_ARCH__)
    int64_t threads = (int64_t)gridDim.x * gridDim.y * gridDim.z * blockDim.x;
    int64_t block = blockIdx.x + (int64_t)gridDim.x * (blockIdx.y + (int64_t)gridDim.y * blockIdx.z);
#pragma unroll 1
    for (int i = 0; i < AHEAD_PARTS; i++)
#pragma unroll 1
        for (int64_t at = (block * blockDim.x + threadIdx.x) * DECODE_LINE; at < ahead.bytes[i];
             at += threads * DECODE_LINE)
            asm volatile("prefetch.global.L2 [%0];" ::"l"((const char *)ahead.memory[i] + at));
#endif
}

/* What a layer keeps of each token of a row, in two arrays of B times C rows of row_bytes; count (B). */
struct DecodeKept {
    const void *memory[2]; /* NULL: none */
    int64_t row_bytes[2];
    const int64_t *count;
    int B, C;
};

/* Asks for what is kept of the tokens of the chunk so far; by `blocks` blocks of the grid, before the wait. */
__device__ inline void ask_kept(const DecodeKept &kept, int blocks) {
#if DECODE_KEYS_AHEAD && defined(__CUDA_ARCH__)
    if (!kept.memory[0]) return;
    int64_t thread = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, threads = (int64_t)blocks * blockDim.x;
#pragma unroll 1
    for (int b = 0; b < kept.B; b++) {
        int64_t rows = (int64_t)((uint64_t)kept.count[b] % (uint32_t)kept.C);
#pragma unroll 1
        for (int i = 0; i < 2; i++) {
            const char *memory = (const char *)kept.memory[i] + (int64_t)b * kept.C * kept.row_bytes[i];
#pragma unroll 1
            for (int64_t at = thread * DECODE_LINE; at < rows * kept.row_bytes[i]; at += threads * DECODE_LINE)
                asm volatile("prefetch.global.L2 [%0];" ::"l"(memory + at));
        }
    }
#endif
}

/* VEC numbers that wait in registers until they are used: as whole words, since a bf16 on its own would take
 * a register of 32 bits. */
template <typename T, int VEC> using Words = std::conditional_t<VEC == 1, T, uint4>;

template <typename T, int VEC> __device__ inline void unpack(float (&to)[VEC], const Words<T, VEC> &words) {
    if constexpr (VEC == 1) {
        to[0] = to_float(words);
    } else {
        const unsigned word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if constexpr (VEC == 4)
                to[i] = __uint_as_float(word[i]);
            else // a bf16 is the upper half of a float
                to[2 * i] = __uint_as_float(word[i] << 16),
                       to[2 * i + 1] = __uint_as_float(word[i] & ~0xffffu);
        }
    }
}

/* Launches a kernel of a step, which may start before the one before it has ended, but for the first one: it
 * reads counts that the last kernel of the step before moves on. Code for an older device has no way to wait,
 * so it starts in the usual order. bytes: of shared memory whose size is known only here. cluster: so many
 * blocks of a row of the grid are one. */
template <typename P>
static void launch_step(Context *context, const char *name, void (*kernel)(const P), dim3 grid,
                        unsigned threads, P arguments, bool is_first = false, size_t bytes = 0,
                        unsigned cluster = 1) {
    if (context->dry_run) return;
    arguments.launch = timeline_number(context, name, grid);
    cudaFuncAttributes code;
    CHECK_CUDA(cudaFuncGetAttributes(&code, (const void *)kernel));
    if (DECODE_CARVEOUT)
        CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                        DECODE_CARVEOUT));
    cudaLaunchAttribute attributes[2] = {};
    unsigned number = 0;
    if (code.ptxVersion >= 90 && !is_first) {
        attributes[number].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[number++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) {
        attributes[number].id = cudaLaunchAttributeClusterDimension;
        attributes[number].val.clusterDim.x = cluster;
        attributes[number].val.clusterDim.y = attributes[number].val.clusterDim.z = 1, number++;
    }
    cudaLaunchConfig_t config = {grid, dim3(threads), bytes, context->stream, attributes, number};
    CHECK_CUDA(cudaLaunchKernelEx(&config, kernel, arguments));
}

/* ----------------------------------------------------------------------------------------------------------
 * TimestepNorm and CEMA
 */

/* tokens, embed and embedded: the first block's input, x = scale embed[token], which is written for the later
 * kernels; tokens NULL: x is given. c NULL: the norm alone. mean, var and h are moved on in place. */
template <typename T> struct DecodeNorm {
    T *u, *c, *embedded;               /* (B,D) */
    double *mean, *var;                /* (B,G) */
    float *h;                          /* (B,D,N,2) */
    const T *x, *embed, *weight, *bias; /* (B,D), (V,D), (D), (D) */
    const int32_t *tokens;             /* (B) */
    const int64_t *count;              /* (B) */
    CemaCoefficients coef;
    const float *omega; /* (D) */
    int D, G, N;
    float scale, eps;
    int launch; /* the kernel's number in the step, for its timeline */
};

/* One state of a channel: h = q h + p u. */
struct DecodeState {
    float p, q_re, q_im, c_re, c_im, re, im;
    __device__ DecodeState() {}
    /* h: all states of the row */
    __device__ DecodeState(const float *h, const CemaCoefficients &coef, int64_t i)
        : p(coef.p[i]), q_re(coef.q_re[i]), q_im(coef.q_im[i]), c_re(coef.c_re[i]), c_im(coef.c_im[i]),
          re(h[2 * i]), im(h[2 * i + 1]) {}
    /* Moves it on; returns Re(c h). */
    __device__ float move(float *h, int64_t i, float u) const {
        float new_re = fmaf(-q_im, im, fmaf(q_re, re, p * u)), new_im = fmaf(q_im, re, q_re * im);
        h[2 * i] = new_re, h[2 * i + 1] = new_im;
        return c_re * new_re - c_im * new_im;
    }
};

/* What a lane wants of a channel d of a row. */
template <typename T> struct DecodeChannel {
    float weight, bias, omega;
    DecodeState state; /* number `lane` of N, if there is one and it is wanted */
    __device__ DecodeChannel(const DecodeNorm<T> &p, const float *h, int d, int lane, bool want_state)
        : weight(to_float(p.weight[d])), bias(to_float(p.bias[d])), omega(p.c ? p.omega[d] : 0.0f) {
        if (want_state && p.c && lane < p.N) state = DecodeState(h, p.coef, (int64_t)d * p.N + lane);
    }
};

/* computes: the group's mean and variance with this step, u = (x - mean) / sqrt(var + eps) (1 + w) + b, and
 *           c = Re(sum c_k h_k) + omega u with h = q h + p u
 * launch:   grid (G, B), block 512: a block owns a group; its first warp the statistics; 16 lanes a channel
 * traffic:  36 B D N bytes: coefficients and states
 * needs:    nothing
 * numerics: statistics in double, CEMA in float, fixed order: deterministic */
template <typename T>
__global__ void __launch_bounds__(DECODE_NORM_THREADS)
    decode_norm_kernel(const __grid_constant__ DecodeNorm<T> p) {
    using A = Accum<T>;
    __shared__ A shared_mean;
    __shared__ float shared_rstd;
    __shared__ int32_t token;
    mark(p.launch, STAGE_ENTERED);
    start_next_kernel();
    int b = (int)blockIdx.y, size = p.D / p.G, first = (int)blockIdx.x * size, thread = (int)threadIdx.x;
    int64_t group = (int64_t)b * p.G + blockIdx.x;
    Moments<double> before = {}; // of the thread that will write them
    if (thread == 0) before = Moments<double>{(double)p.count[b], p.mean[group], p.var[group]};
    if (p.c) {
        const float *arrays[] = {p.coef.p, p.coef.q_re, p.coef.q_im, p.coef.c_re, p.coef.c_im};
        int64_t states = (int64_t)size * p.N, at = (int64_t)first * p.N;
#pragma unroll
        for (int i = 0; i < NUM_CEMA_COEFFICIENTS; i++)
            prefetch_bytes(arrays[i] + at, states * 4, thread, DECODE_NORM_THREADS);
        prefetch_bytes(p.h + ((int64_t)b * p.D * p.N + at) * 2, states * 8, thread, DECODE_NORM_THREADS);
    }
    int lane = thread % DECODE_LANES, own = thread / DECODE_LANES;
    float *h = p.h + (int64_t)b * p.D * p.N * 2;
    DecodeChannel<T> channel(p, h, first + min(own, size - 1), lane, DECODE_NORM_HELD);
    const T *x = p.x + (int64_t)b * p.D;
    if (p.tokens) { // one thread asks: they may lie on the host
        if (thread == 0) token = p.tokens[b];
        __syncthreads(); // the token is there
        x = p.embed + (int64_t)token * p.D;
    }
    float scale = p.tokens ? p.scale : 1.0f;
    follow_previous_kernel();
    mark(p.launch, STAGE_WAITED);

    if (thread < WARP_SIZE) {
        A sum = 0, squares = 0;
        for (int i = thread; i < size; i += WARP_SIZE)
            sum += to_float(from_float<T>(scale * to_float(x[first + i])));
        A mean = warp_sum(sum) / (A)size;
        for (int i = thread; i < size; i += WARP_SIZE) {
            A difference = to_float(from_float<T>(scale * to_float(x[first + i]))) - mean;
            squares += difference * difference;
        }
        A var = warp_sum(squares) / (A)size;
        if (thread == 0) {
            Moments<double> m = merge(before, Moments<double>{1, (double)mean, (double)var});
            p.mean[group] = m.mean, p.var[group] = m.var;
            shared_mean = (A)m.mean;
            if (DECODE_NORM_HELD && sizeof(A) < 8) shared_rstd = rsqrtf((float)m.var + p.eps);
            else shared_rstd = (float)(1.0 / sqrt(m.var + (double)p.eps));
        }
    }
    __syncthreads(); // the group's statistics are there
    mark(p.launch, STAGE_INPUT);

    /* All lanes make the same number of rounds, so that the sums over lanes find them all. */
#pragma unroll 1
    for (int i = own; i - own < size; i += DECODE_NORM_THREADS / DECODE_LANES) {
        int d = first + i;
        bool active = i < size, held = DECODE_NORM_HELD && i == own;
        int64_t at = (int64_t)b * p.D + d;
        float u = 0, sum = 0;
        if (active) {
            if (i != own) channel = DecodeChannel<T>(p, h, d, lane, false);
            T value = from_float<T>(scale * to_float(x[d]));
            u = (float)(to_float(value) - shared_mean) * shared_rstd * (1.0f + channel.weight) + channel.bias;
            if (lane == 0) p.u[at] = from_float<T>(u);
            if (lane == 0 && p.tokens) p.embedded[at] = value;
            for (int k = lane; p.c && k < p.N; k += DECODE_LANES) {
                int64_t state = (int64_t)d * p.N + k;
                if (!held || k != lane) channel.state = DecodeState(h, p.coef, state);
                sum += channel.state.move(h, state, u);
            }
        }
        sum = lanes_sum(sum, DECODE_LANES);
        if (active && p.c && lane == 0) p.c[at] = from_float<T>(fmaf(channel.omega, u, sum));
    }
    mark(p.launch, STAGE_ENDED);
}

template <typename T> static void decode_norm(Context *context, const DecodeNorm<T> &p, int64_t B) {
    launch_step(context, "norm, CEMA", decode_norm_kernel<T>, dim3((unsigned)p.G, (unsigned)B),
                DECODE_NORM_THREADS, p, p.tokens != nullptr);
}

/* ----------------------------------------------------------------------------------------------------------
 * Products with a vector for each row
 */

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
template <int VEC> __device__ inline int tile_place(int k) {
    if (VEC < 8) return k;
    return (k & ~255) | (k >> 2 & 1) << 7 | (k >> 3 & 31) << 2 | (k & 3);
}
template <int VEC> __device__ inline void tile_load(float (&to)[VEC], const float *row, int k) {
    if constexpr (VEC == 1) {
        to[0] = row[k];
    } else {
#pragma unroll
        for (int i = 0; i < VEC; i += 4) {
            float4 part = *(const float4 *)(row + tile_place<VEC>(k + i));
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
                *(float4 *)(tile[m] + tile_place<VEC>(k - first)) =
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
        tile_load<VEC>(x, tile[m], k);
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

/* ----------------------------------------------------------------------------------------------------------
 * Attention of one token a row
 */

/* The keys 0..n of a row, the token's own included, are cut into at most DECODE_SPLITS equal parts. A block
 * takes one part for WARP_SIZE VEC columns of the values; of the blocks of the same columns the last one to
 * arrive adds the parts up, in their order, so that it does not matter which one it is. */
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
    DecodeAhead ahead;
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
