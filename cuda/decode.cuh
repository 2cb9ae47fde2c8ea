/* decode.cuh - one token a row, for at most 8 rows: a step of generation, and its first kernel.
 *
 * A step reads every weight once and computes little, so two things count: that the device's memory is never
 * idle, and how many kernels wait for one another. Six kernels make a block:
 *
 *   decode_norm        u = TimestepNorm(x), c = CEMA(u), their states          (the last one: the final norm)
 *   products           z, r and m Wh1^T + x from m = RMSNorm(c); v from u, straight into the state
 *   attention          q, k, scores, values, and the gate: ar = a r
 *   products           y = ar Wh2^T + (m Wh1^T + x)
 *   products           hidden = silu(fc1 LayerNorm(y)) (* fc3 LayerNorm(y))
 *   products           x = alpha fc2 hidden + x                                (the last one: the logits)
 *
 * decode_norm stands here. decode_products.cuh and decode_attention.cuh have the others for every type and
 * size; decode_tiles.cuh has products in bf16 on the tensor cores, which for one row take decode_norm in as
 * well: those after it make u and c, and its states are made ready beside the last ones of the block before,
 * for the first block in a small kernel that brings in the token. decode_streams.cuh has those products whose
 * weights are many, and decode_clusters.cuh attention in bf16 by clusters of blocks.
 *
 * Each kernel lets the next one start as soon as all of its own blocks have begun (programmatic dependent
 * launch, from compute capability 9.0 on); attention in clusters, whose blocks begin late, only when they
 * have asked for their keys and values, since what a multiprocessor is asked for comes in that order. Several
 * are then in their first part, where they ask for their weights, which nothing in a step changes; only after
 * it do they wait for the results of the kernels before. All positions are read from the state's counts on the
 * device: the same launches serve every token, and can be recorded once.
 */
#ifndef CUDA_DECODE_CUH
#define CUDA_DECODE_CUH

#include "cema.cuh"
#include "matmul.cuh"
#include "queries.cuh"
#include "timeline.cuh"
#include "timestepnorm.cuh"

enum {
    DECODE_ROWS = 8, /* largest batch */
    DECODE_THREADS = 256,
    DECODE_WARPS = DECODE_THREADS / WARP_SIZE,
    DECODE_NORM_THREADS = 512,
    DECODE_LANES = 16, /* lanes that share a channel's states */
    DECODE_LINE = 128 /* bytes that one prefetch brings to the L2 cache */
};

/* Early in a kernel of a step: the next one may start when all blocks of this one have come here. */
__device__ inline void start_next_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Waits for the kernel before, whose results (and those of all kernels before it) can be read from here on.
 * Whatever a kernel does before this call may only read what no kernel of the step writes before it: weights,
 * counts, and the state as the last step left it. It may write what no kernel of the step reads but later
 * ones, after their own wait. Each kernel has a block that waits, so that the end of a kernel is also the end
 * of all kernels before it. */
__device__ inline void follow_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/* Asks for the lines of `bytes` bytes, shared out over `threads` threads. */
__device__ inline void prefetch_bytes(const void *memory, int64_t bytes, int thread, int threads) {
#ifdef __CUDA_ARCH__
    for (int64_t at = (int64_t)thread * DECODE_LINE; at < bytes; at += (int64_t)threads * DECODE_LINE)
        asm volatile("prefetch.global.L2 [%0];" ::"l"((const char *)memory + at));
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
            else
                to[2 * i] = low_bf16(word[i]), to[2 * i + 1] = high_bf16(word[i]);
        }
    }
}

/* So many blocks of a row of the grid are a cluster. */
static inline cudaLaunchAttribute in_clusters(unsigned blocks) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = blocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    return attribute;
}

/* Launches a kernel of a step, which may start before the one before it has ended, but for the first one: it
 * reads counts that the last kernel of the step before moves on. Code for an older device has no way to wait,
 * so it starts in the usual order. bytes: of shared memory whose size is known only here. cluster: blocks of
 * one.
 *
 * A processor divides its memory into shared memory and cache anew only when no block is on it. Where
 * products take all of it as shared memory, a kernel with another division would begin when the last block of
 * the one before has ended: there, all kernels of the step have the same. */
template <typename P>
static void launch_step(Context *context, const char *name, void (*kernel)(const P), dim3 grid,
                        unsigned threads, P arguments, bool is_first = false, size_t bytes = 0,
                        unsigned cluster = 1) {
    if (context->dry_run) return;
    arguments.launch = timeline_number(context, name, grid);
    cudaFuncAttributes code;
    CHECK_CUDA(cudaFuncGetAttributes(&code, (const void *)kernel));
    CHECK_CUDA(cudaFuncSetAttribute((const void *)kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    context->streams ? cudaSharedmemCarveoutMaxShared
                                                     : cudaSharedmemCarveoutDefault));
    cudaLaunchAttribute attributes[2] = {};
    unsigned number = 0;
    if (code.ptxVersion >= 90 && !is_first) {
        attributes[number].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attributes[number++].val.programmaticStreamSerializationAllowed = 1;
    }
    if (cluster > 1) attributes[number++] = in_clusters(cluster);
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

/* Parameters of a channel. */
struct DecodeChannel {
    float weight, bias, omega;
    template <typename T>
    __device__ DecodeChannel(const DecodeNorm<T> &p, int d)
        : weight(to_float(p.weight[d])), bias(to_float(p.bias[d])), omega(p.c ? p.omega[d] : 0.0f) {}
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
    int d = first + min(own, size - 1); // the first channel and state are in registers before the wait
    DecodeChannel channel(p, d);
    DecodeState state;
    if (p.c && lane < p.N) state = DecodeState(h, p.coef, (int64_t)d * p.N + lane);
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
            if (sizeof(A) < 8) shared_rstd = rsqrtf((float)m.var + p.eps);
            else shared_rstd = (float)(1.0 / sqrt(m.var + (double)p.eps));
        }
    }
    __syncthreads(); // the group's statistics are there
    mark(p.launch, STAGE_INPUT);

    /* All lanes make the same number of rounds, so that the sums over lanes find them all. */
#pragma unroll 1
    for (int i = own; i - own < size; i += DECODE_NORM_THREADS / DECODE_LANES) {
        d = first + i;
        bool active = i < size;
        int64_t at = (int64_t)b * p.D + d;
        float u = 0, sum = 0;
        if (active) {
            if (i != own) channel = DecodeChannel(p, d);
            T value = from_float<T>(scale * to_float(x[d]));
            u = (float)(to_float(value) - shared_mean) * shared_rstd * (1.0f + channel.weight) + channel.bias;
            if (lane == 0) p.u[at] = from_float<T>(u);
            if (lane == 0 && p.tokens) p.embedded[at] = value;
            for (int k = lane; p.c && k < p.N; k += DECODE_LANES) {
                int64_t place = (int64_t)d * p.N + k;
                if (i != own || k != lane) state = DecodeState(h, p.coef, place);
                sum += state.move(h, place, u);
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

#endif
