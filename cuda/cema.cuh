/* cema.cuh - the complex exponential moving average: N complex states a channel, each h_t = q h_{t-1} + p
 * u_t, and y_t = Re(sum_k c_k h_t[k]) + omega u_t with c = gamma / sqrt(N).
 *
 * Sixteen steps at a time, on the tensor cores. With h the states before a group of steps, u_0 .. u_15 its
 * inputs, and k_l = Re(sum_k p c q^l) (+ omega at l = 0)
 *     y_m = sum_{i<=m} k_(m-i) u_i + Re(sum_k c q^(m+1) h)        h' = q^16 h + sum_m p q^(15-m) u_m
 * so that three small matrices of a channel - inputs to outputs, states to outputs, inputs to states - and
 * one complex product a state replace sixteen turns of the recurrence. Time is cut into segments; a segment
 * of a row of the batch is a strip, and a warp owns sixteen strips of one channel:
 *
 *     rows of a product: 16 strips | columns: 16 steps, or 16 states as pairs (re, im) | matrices: registers
 *
 * An accumulator of mma.m16n8k16 holds for a thread the pair (re, im) of one state of two strips, which is
 * also how the next product wants its operand: states never leave their thread. A bf16 input is exact;
 * floats (states, matrices, float inputs) are split into bf16 parts whose sum they are: two parts hold 16
 * bits, three 24. The products of two parts that are both small are left out. The sums are float, and the
 * recurrence itself, q^16 h + ..., is done outside of the tensor cores, which cut off what they should
 * round.
 *
 * Tiles pass through shared memory, which turns them round: global memory is read and written along
 * channels, a product along time. The next tile's loads are under way while one is computed. A first kernel
 * finds the state that each segment would end with had it begun with zero, e; the others begin each segment
 * with what all segments before it left.
 *
 * Backward without any state of the forward, by the same kernels going back in time. The output's
 * dependence on the input is symmetric in time, so du comes out of dy as y does out of u; only where p and
 * c stand changes, and what goes in and comes out are the gradients of the last state and of the first,
 * conjugate (the gradient of Re(z w) by w, as a pair, is (Re z, -Im z)):
 *     W' = q^16 W + sum_m c q^(16-m) dy_m         du_m = sum_{i<=m} k_(m-i) dy_i + Re(sum_k p q^m W)
 * For the parameters, let nu_t = dy_t + q nu_{t+1} and zeta = d nu / d ln q. The loss's linear form is
 * Re(c sum_t p u_t nu_t), and with A = sum u nu and K = dA / dq
 *     dc = p A     dq = c p K     dp = Re(c A)     (an incoming state acts like an input p u_{-1} = h_in)
 * A group of sixteen steps back in time adds, with nu and zeta those after it in time,
 *     A += q V nu + sum_l r_l q^l         V = sum_m u_m q^m,  V^ = dV / d ln q
 *     K += V nu + V^ nu + V zeta + sum_l l r_l q^(l-1)
 * where r_l = sum u_m dy_(m-l), steps counted back in time, is what meets inside groups: products of u and
 * dy on the tensor cores, added up for a whole channel and multiplied by the powers of q once, at the end.
 * r_0 is the gradient of omega.
 */
#ifndef CUDA_CEMA_CUH
#define CUDA_CEMA_CUH

#include "common.cuh"

enum {
    CEMA_GROUP = 16,    /* steps of a group */
    CEMA_STRIPS = 16,   /* of a warp */
    CEMA_CHANNELS = 16, /* of a block, a warp each; or 8, and two blocks an SM */
    CEMA_BLOCKS_PER_SM = 16 / CEMA_CHANNELS,
    CEMA_HALVES = CEMA_CHANNELS / 8, /* of the channels: what a thread moves at once */
    CEMA_THREADS = CEMA_CHANNELS * WARP_SIZE,
    CEMA_TILE = 2 * CEMA_GROUP,                /* the lengths of segments are multiples of it */
    CEMA_UNITS = CEMA_STRIPS * CEMA_GROUP / 2, /* pairs of steps of a channel's group in shared memory */
    CEMA_STATES = 16,                          /* of a launch; more take several */
    CEMA_OWN = CEMA_STATES / 4,                /* of a thread */
    NUM_SCHEDULERS = 4,                        /* of an SM */
    NUM_CEMA_COEFFICIENTS = 5,
    NUM_CEMA_SUMS = 5
};

/* Arrays (D,N), computed once for each value of the parameters. */
struct CemaCoefficients { float *p, *q_re, *q_im, *c_re, *c_im; };
static inline CemaCoefficients cema_coefficients_at(float *memory, int64_t D, int64_t N) {
    return CemaCoefficients{memory, memory + D * N, memory + 2 * D * N, memory + 3 * D * N,
                            memory + 4 * D * N};
}

__device__ inline double logistic(double x) { return 1 / (1 + exp(-x)); }

/* computes: p = sigmoid(alpha), q = (1 - p sigmoid(delta)) exp(i k sigmoid(theta) 2 pi / N), c = gamma /
 * sqrt(N)
 * launch:   grid ceil(D N / 256), block 256: a thread owns one state of one channel
 * traffic:  40 D N bytes
 * needs:    nothing
 * numerics: double, rounded once */
__global__ static void cema_coefficients_kernel(CemaCoefficients out, const float *alpha, const float *delta,
                                                const float *theta, const float *gamma, int D, int N) {
    int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= D * N) return;
    int channel = i / N, k = i % N + 1;
    double p = logistic(alpha[i]), radius = 1 - p * logistic(delta[i]), scale = sqrt(1 / (double)N), sine,
           cosine;
    sincospi(2 * (double)k * logistic(theta[channel]) / (double)N, &sine, &cosine);
    out.p[i] = (float)p;
    out.q_re[i] = (float)(radius * cosine);
    out.q_im[i] = (float)(radius * sine);
    out.c_re[i] = (float)(scale * gamma[2 * i]);
    out.c_im[i] = (float)(scale * gamma[2 * i + 1]);
}

/* alpha, delta (D,N); theta (D); gamma (D,N,2) */
static inline void cema_coefficients(Context *context, CemaCoefficients out, const float *alpha,
                                     const float *delta, const float *theta, const float *gamma, int64_t D,
                                     int64_t N) {
    LAUNCH(cema_coefficients_kernel, blocks_for(D * N, 256), 256, context, out, alpha, delta, theta, gamma,
           (int)D, (int)N);
}

/* Complex numbers. Powers are made in double and then rounded. */
template <typename Real> struct CemaNumber { Real re, im; };
using CemaComplex = CemaNumber<double>;
using CemaFloat = CemaNumber<float>;
template <typename Real>
__device__ inline CemaNumber<Real> operator*(CemaNumber<Real> a, CemaNumber<Real> b) {
    return CemaNumber<Real>{a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <typename Real>
__device__ inline CemaNumber<Real> operator+(CemaNumber<Real> a, CemaNumber<Real> b) {
    return CemaNumber<Real>{a.re + b.re, a.im + b.im};
}
template <typename Real> __device__ inline CemaNumber<Real> operator*(Real a, CemaNumber<Real> b) {
    return CemaNumber<Real>{a * b.re, a * b.im};
}
__device__ inline CemaComplex to_double(CemaFloat a) { return CemaComplex{a.re, a.im}; }
__device__ inline CemaFloat to_float(CemaComplex a) { return CemaFloat{(float)a.re, (float)a.im}; }
__device__ inline CemaComplex cema_power(CemaFloat base, int n) {
    CemaComplex power = {1, 0}, q = to_double(base);
    for (; n > 0; n /= 2, q = q * q)
        if (n % 2) power = power * q;
    return power;
}

/* One state's coefficients; 0 beyond N and D. */
struct CemaState {
    float p;
    CemaFloat q, c;
    __device__ CemaState(const CemaCoefficients &coef, int d, int k, int D, int N) : p(0), q{0, 0}, c{0, 0} {
        if (d >= D || k >= N) return;
        int64_t i = (int64_t)d * N + k;
        p = coef.p[i], q = CemaFloat{coef.q_re[i], coef.q_im[i]}, c = CemaFloat{coef.c_re[i], coef.c_im[i]};
    }
};

/* ----------------------------------------------------------------------------------------------------------
 * Products on the tensor cores. In a fragment of mma.m16n8k16, lane = 4 group + pair holds
 *     rows a (16,16):   rows group, group + 8; columns 2 pair, 2 pair + 1, and those + 8
 *     table b (16,8):   column group; rows 2 pair, 2 pair + 1, and those + 8
 *     sum c (16,8):     rows group, group + 8; columns 2 pair, 2 pair + 1
 * with two neighbours of bf16 in a word. Everything is split into PARTS of bf16.
 */
template <int PARTS> struct CemaRows { uint32_t a[PARTS][4]; };
template <int PARTS> struct CemaTable { uint32_t b[PARTS][2]; };

/* How many parts an input, a table of outputs (and the states they are made from), a table that leads to
 * states and one that leads to gradients of parameters consist of. */
template <typename T> struct CemaParts {
    static constexpr int INPUT = std::is_same<T, float>::value ? 3 : 1;
    static constexpr int OUTPUT = std::is_same<T, float>::value ? 3 : 2;
    static constexpr int STATE = 3;
    static constexpr int GRADIENT = OUTPUT;
};

/* part[i][at] for two neighbours: each part is what the ones before it left, rounded. */
template <int PARTS, int WORDS>
__device__ inline void cema_split(uint32_t (&part)[PARTS][WORDS], int at, float low, float high) {
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        uint32_t bits = part[i][at] = word_of(low, high);
        low -= low_bf16(bits), high -= high_bf16(bits);
    }
}

/* A lane's four entries of a table, in the order of the fragment: rows 2 pair + {0, 1, 8, 9}. */
template <int PARTS>
__device__ inline void cema_table(CemaTable<PARTS> &table, float v0, float v1, float v2, float v3) {
    cema_split(table.b, 0, v0, v1);
    cema_split(table.b, 1, v2, v3);
}

/* c += a b, one part of each */
__device__ inline void tensor_product(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                 "{%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* sum[n] += rows table[n], small terms first. A product waits long for the one before it in the same sum,
 * so that several sums take turns. */
template <int A, int B, int COUNT>
__device__ inline void cema_multiply(float (&sum)[COUNT][4], const CemaRows<A> &rows,
                                     const CemaTable<B> (&table)[COUNT]) {
#pragma unroll
    for (int both = (A > B ? A : B) - 1; both >= 0; both--)
#pragma unroll
        for (int i = 0; i < A; i++)
#pragma unroll
            for (int n = 0; n < COUNT; n++)
                if (both - i >= 0 && both - i < B) tensor_product(sum[n], rows.a[i], table[n].b[both - i]);
}

/* Rows and columns of an 8 x 8 matrix, two neighbours in a word, change places. */
__device__ inline uint32_t tensor_transpose(uint32_t word) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
    return out;
}

/* ----------------------------------------------------------------------------------------------------------
 * Strips of time, and how they pass through shared memory
 */

/* Time of each row of a batch cut into `count` segments of `length` steps, of which the first begins at
 * `offset` (zero, or before the first step). Segment s of row b is strip b count + s. reverse: time runs
 * backward, so that step 0 is the last. */
struct CemaStrips {
    int B, count, length, offset;
    bool reverse;
};

struct CemaStrip {
    int b, segment;
    int skip, steps; /* its own steps from `skip` up to `steps` exist */
    int64_t first;   /* row of the tensor where its step 0 is */
    __device__ CemaStrip(const CemaStrips &strips, int index, int all_steps) {
        b = index / strips.count, segment = index % strips.count;
        int begin = segment * strips.length + strips.offset;
        skip = max(-begin, 0), steps = b < strips.B ? min(strips.length, all_steps - begin) : 0;
        first = (int64_t)b * all_steps + (strips.reverse ? all_steps - 1 - begin : begin);
    }
};

/* How many segments, and their length. rows: the most strips of a batch together, for any batch up to this
 * one and any number of steps, so that a dry run of the largest batch takes enough scratch. */
struct CemaSegments { int64_t count, length, rows; };
static inline CemaSegments cema_segments(Context *context, int64_t B, int64_t steps, int64_t D) {
    int64_t blocks = (int64_t)context->num_sms * CEMA_BLOCKS_PER_SM / ceil_div(D, CEMA_CHANNELS);
    int64_t rows = (blocks > 1 ? blocks : 1) * CEMA_STRIPS, wanted = rows / B > 1 ? rows / B : 1;
    int64_t length = ceil_div(ceil_div(steps, wanted), CEMA_TILE) * CEMA_TILE;
    return CemaSegments{ceil_div(steps, length), length, rows > B ? rows : B};
}
/* Multiprocessors that have nothing to do while these sizes are computed. */
static inline int cema_idle(Context *context, int64_t B, int64_t steps, int64_t D) {
    int64_t strips = B * cema_segments(context, B, steps, D).count;
    int64_t blocks = ceil_div(D, CEMA_CHANNELS) * ceil_div(strips, CEMA_STRIPS);
    int64_t busy = ceil_div(blocks, CEMA_BLOCKS_PER_SM);
    return busy < context->num_sms ? context->num_sms - (int)busy : 0;
}
static inline CemaStrips cema_strips(const CemaSegments &segments, int64_t B, int64_t count, bool reverse) {
    return CemaStrips{(int)B, (int)count, (int)segments.length, 0, reverse};
}
static inline unsigned cema_blocks(const CemaStrips &strips) {
    return blocks_for((int64_t)strips.B * strips.count, CEMA_STRIPS);
}

/* How many steps, in whole tiles, every strip has. */
__device__ inline int cema_even_steps(const CemaStrips &strips, int all_steps, int tile) {
    int last = all_steps - (strips.count - 1) * strips.length;
    return min(strips.length, last) / tile * tile;
}

/* Shared memory holds a plane for each of two slots and each channel: 16 strips by 16 steps, two steps a
 * unit. The order of units makes the threads of a warp that write one channel's strips or read one channel
 * as a fragment meet different banks: rows 4 to 7 of eight swap their halves, and in the upper eight
 * channels neighbouring pairs of rows change places, because a mover's two halves write both kinds at a
 * time. */
template <typename T> using CemaUnit = Packed<T, 2>;
__device__ inline int cema_unit(int slot, int channel, int row, int pair) {
    row ^= channel < 8 ? 0 : 2;
    int half = (pair / 4 + row / 4) % 2;
    return (slot * CEMA_CHANNELS + channel) * CEMA_UNITS + row * (CEMA_GROUP / 2) + half * 4 + pair % 4;
}

/* A thread moves two steps of eight channels: words as they stand in global memory, on which nothing waits
 * until they are put into shared memory. */
template <typename T> struct CemaShare {
    static constexpr int WORDS = 2 * (int)sizeof(T);
    uint32_t word[2][WORDS];
};
struct CemaMover {
    int slot, row, pair, half, d; /* d: the first of its channels */
    int step, turn;               /* of the tile: its first, and +1 or -1 to the second */
    int skip, steps;
    int stride;    /* elements from a step to the next */
    int64_t first; /* element where step 0 and d are */
    /* flip: the steps of a group stand in shared memory from the last to the first. */
    __device__ CemaMover(const CemaStrips &strips, int all_steps, int D) {
        int thread = (int)threadIdx.x;
        half = thread % CEMA_HALVES, pair = thread / CEMA_HALVES % 8;
        row = thread / (8 * CEMA_HALVES) % CEMA_STRIPS, slot = thread / (8 * CEMA_HALVES * CEMA_STRIPS);
        d = (int)blockIdx.x * CEMA_CHANNELS + half * 8;
        step = 2 * pair, turn = 1;
        CemaStrip strip(strips, (int)blockIdx.y * CEMA_STRIPS + row, all_steps);
        skip = strip.skip, steps = d < D ? strip.steps : 0;
        first = strip.first * D + d, stride = strips.reverse ? -D : D;
    }
    __device__ void flip() { step = CEMA_GROUP - 1 - 2 * pair, turn = -1; }
    __device__ bool has(int s) const { return s >= skip && s < steps; }
    __device__ int64_t at(int s) const { return first + (int64_t)s * stride; }
};
static_assert(CEMA_THREADS == 2 * CEMA_STRIPS * (CEMA_GROUP / 2) * (CEMA_CHANNELS / 8),
              "the threads cover two slots");

/* A tile's steps from tile_first on; zero outside the strip. WIDE: rows may be read in units of 16
 * bytes. */
template <bool WIDE, typename T>
__device__ inline void cema_fetch(CemaShare<T> &held, const T *x, const CemaMover &mover, int tile_first,
                                  int D) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int s = tile_first + mover.step + k * mover.turn;
        const T *from = x + mover.at(s);
#pragma unroll
        for (int i = 0; i < CemaShare<T>::WORDS; i++) held.word[k][i] = 0;
        if (!mover.has(s)) continue;
        if constexpr (WIDE) {
#pragma unroll
            for (int i = 0; i < CemaShare<T>::WORDS; i += 4) {
                Packed<uint32_t, 4> part = packed<4>(reinterpret_cast<const uint32_t *>(from) + i);
#pragma unroll
                for (int j = 0; j < 4; j++) held.word[k][i + j] = part.v[j];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (mover.d + i >= D) continue;
                if constexpr (sizeof(T) == 2)
                    held.word[k][i / 2] |= (uint32_t)reinterpret_cast<const uint16_t *>(from)[i]
                                           << i % 2 * 16;
                else
                    held.word[k][i] = reinterpret_cast<const uint32_t *>(from)[i];
            }
        }
    }
}

/* Loads that are under way while a tile is computed go to shared memory, 32 bytes a thread, so that no
 * registers wait for them. That is for bf16 that may be read 16 bytes at a time; anything else is
 * fetched when it is wanted. */
struct alignas(16) CemaStage { uint32_t word[2][CEMA_THREADS][4]; };
template <typename T> struct CemaEarly { using Stage = char; };
template <> struct CemaEarly<bf16> { using Stage = CemaStage; };

template <bool WIDE, typename T>
__device__ inline void cema_request(typename CemaEarly<T>::Stage &stage, const T *x, const CemaMover &mover,
                                    int tile_first, int D) {
    if constexpr (sizeof(T) == 2 && WIDE) {
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int s = tile_first + mover.step + k * mover.turn;
            bool here = mover.has(s);
            copy_early(stage.word[k][threadIdx.x], here ? x + mover.at(s) : x, here);
        }
    }
}
template <bool WIDE, typename T>
__device__ inline void cema_receive(CemaShare<T> &held, typename CemaEarly<T>::Stage &stage, const T *x,
                                    const CemaMover &mover, int tile_first, int D) {
    if constexpr (sizeof(T) == 2) {
        if constexpr (WIDE) {
            wait_for_copies();
#pragma unroll
            for (int k = 0; k < 2; k++) {
                Packed<uint32_t, 4> part = packed<4>(stage.word[k][threadIdx.x]);
#pragma unroll
                for (int i = 0; i < 4; i++) held.word[k][i] = part.v[i];
            }
            return;
        }
    }
    cema_fetch<WIDE>(held, x, mover, tile_first, D);
}

/* Words of two rows of a matrix of bf16, two neighbours each, to words of its columns, and back. */
__device__ inline uint32_t cema_lows(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ inline uint32_t cema_highs(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }

/* What was requested, into the tile. */
template <bool WIDE, typename T>
__device__ inline void cema_move(CemaUnit<T> *tile, typename CemaEarly<T>::Stage &stage, const T *x,
                                 const CemaMover &mover, int tile_first, int D) {
    CemaShare<T> held;
    cema_receive<WIDE, T>(held, stage, x, mover, tile_first, D);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        CemaUnit<T> *to = tile + cema_unit(mover.slot, mover.half * 8 + i, mover.row, mover.pair);
        if constexpr (sizeof(T) == 2) {
            uint32_t a = held.word[0][i / 2], b = held.word[1][i / 2];
            *reinterpret_cast<uint32_t *>(to) = i % 2 ? cema_highs(a, b) : cema_lows(a, b);
        } else {
            *to = CemaUnit<T>{{__uint_as_float(held.word[0][i]), __uint_as_float(held.word[1][i])}};
        }
    }
}

/* The tile's outputs as words of global memory */
template <typename T>
__device__ inline void cema_take(CemaShare<T> &out, const CemaUnit<T> *tile, const CemaMover &mover) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        const CemaUnit<T> *a = tile + cema_unit(mover.slot, mover.half * 8 + i, mover.row, mover.pair),
                          *b = tile + cema_unit(mover.slot, mover.half * 8 + i + 1, mover.row, mover.pair);
        if constexpr (sizeof(T) == 2) {
            uint32_t even = *reinterpret_cast<const uint32_t *>(a),
                     odd = *reinterpret_cast<const uint32_t *>(b);
            out.word[0][i / 2] = cema_lows(even, odd), out.word[1][i / 2] = cema_highs(even, odd);
        } else {
#pragma unroll
            for (int k = 0; k < 2; k++)
                out.word[k][i] = __float_as_uint(a->v[k]), out.word[k][i + 1] = __float_as_uint(b->v[k]);
        }
    }
}

template <typename T> __device__ inline void cema_add(CemaShare<T> &out, const CemaShare<T> &before) {
#pragma unroll
    for (int k = 0; k < 2; k++)
#pragma unroll
        for (int i = 0; i < CemaShare<T>::WORDS; i++) {
            if constexpr (sizeof(T) == 2) {
                uint32_t a = out.word[k][i], b = before.word[k][i];
                out.word[k][i] = word_of(low_bf16(a) + low_bf16(b), high_bf16(a) + high_bf16(b));
            } else {
                out.word[k][i] =
                    __float_as_uint(__uint_as_float(out.word[k][i]) + __uint_as_float(before.word[k][i]));
            }
        }
}

template <bool WIDE, typename T>
__device__ inline void cema_write(T *y, const CemaShare<T> &out, const CemaMover &mover, int tile_first,
                                  int D) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        int s = tile_first + mover.step + k * mover.turn;
        T *to = y + mover.at(s);
        if (!mover.has(s)) continue;
        if constexpr (WIDE) {
#pragma unroll
            for (int i = 0; i < CemaShare<T>::WORDS; i += 4) {
                Packed<uint32_t, 4> part;
#pragma unroll
                for (int j = 0; j < 4; j++) part.v[j] = out.word[k][i + j];
                *reinterpret_cast<Packed<uint32_t, 4> *>(reinterpret_cast<uint32_t *>(to) + i) = part;
            }
        } else {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (mover.d + i >= D) continue;
                if constexpr (sizeof(T) == 2)
                    reinterpret_cast<uint16_t *>(to)[i] = (uint16_t)(out.word[k][i / 2] >> i % 2 * 16);
                else
                    reinterpret_cast<uint32_t *>(to)[i] = out.word[k][i];
            }
        }
    }
}

/* Between two barriers a warp computes a tile and carries data, in either order: the warps of a scheduler do
 * not all do the same at the same time. */
__device__ inline bool cema_carries_first() {
    return (int)threadIdx.x / WARP_SIZE / NUM_SCHEDULERS % 2 == 1;
}

/* Where a thread stands in the products: its channel, and lane = 4 group + pair of the fragments. Its two
 * rows are strips of their own; CEMA_OWN states are its own, and it holds CEMA_OWN columns of tables that
 * lead to states, the (re, im)[group % 2] of one state each. */
struct CemaPlace {
    int channel, d, group, pair;
    int row[2];     /* among the strips of the grid */
    int low, upper; /* units of the lower and upper eight steps of its first row */
    int matrix;     /* unit where its row of a matrix begins, see tensor_load */
    int states;     /* the first of the launch */
    __device__ explicit CemaPlace(int first_state) : states(first_state) {
        int lane = (int)threadIdx.x % WARP_SIZE;
        channel = (int)threadIdx.x / WARP_SIZE, d = (int)blockIdx.x * CEMA_CHANNELS + channel;
        group = lane / 4, pair = lane % 4;
        row[0] = (int)blockIdx.y * CEMA_STRIPS + group, row[1] = row[0] + 8;
        low = cema_unit(0, channel, group, pair), upper = cema_unit(0, channel, group, pair + 4);
        matrix = cema_unit(0, channel, lane % 16, lane / 16 * 4);
    }
    __device__ int state(int j) const { return states + 4 * j + pair; }
    __device__ int column(int j) const { return states + 4 * j + group / 2; }
    /* A lane's i-th word of a fragment of rows. */
    __device__ int unit(int slot, int i) const {
        return (i / 2 ? upper : low) + i % 2 * (CEMA_UNITS / 2) + slot * CEMA_CHANNELS * CEMA_UNITS;
    }
};

/* Four 8 x 8 matrices of bf16 from shared memory, the lower left (rows 8 to 15) second and the upper right
 * third; `row`: lane 8 m + i holds where row i of matrix m is. TRANSPOSED: each matrix for itself. */
template <bool TRANSPOSED> __device__ inline void tensor_load(uint32_t (&a)[4], const void *row) {
    uint32_t from = (uint32_t)__cvta_generic_to_shared(row);
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                     : "r"(from)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                     : "r"(from)
                     : "memory");
}

/* The channel's strips and steps as a fragment. */
template <typename T>
__device__ inline void cema_rows(CemaRows<CemaParts<T>::INPUT> &rows, const CemaUnit<T> *tile,
                                 const CemaPlace &place, int slot) {
    if constexpr (CemaParts<T>::INPUT == 1) {
        tensor_load<false>(rows.a[0], tile + place.matrix + slot * CEMA_CHANNELS * CEMA_UNITS);
    } else {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            CemaUnit<T> unit = tile[place.unit(slot, i)];
            cema_split(rows.a, i, unit.v[0], unit.v[1]);
        }
    }
}
/* The same with each of its four matrices transposed. */
template <typename T>
__device__ inline void cema_rows_transposed(CemaRows<CemaParts<T>::INPUT> &out,
                                            const CemaRows<CemaParts<T>::INPUT> &rows,
                                            const CemaUnit<T> *tile, const CemaPlace &place, int slot) {
    if constexpr (CemaParts<T>::INPUT == 1) {
        tensor_load<true>(out.a[0], tile + place.matrix + slot * CEMA_CHANNELS * CEMA_UNITS);
    } else {
#pragma unroll
        for (int part = 0; part < CemaParts<T>::INPUT; part++)
#pragma unroll
            for (int i = 0; i < 4; i++) out.a[part][i] = tensor_transpose(rows.a[part][i]);
    }
}

/* q^0 .. q^15 of a launch's states, made by a warp in double, a state by two lanes, and kept as floats in
 * shared memory of its own; and what only some lanes want, q^16 and q^length. The powers of a state begin
 * at another bank than those of the state before it. */
struct CemaPowers {
    CemaFloat *own, group, length; /* the latter two of state lane / 2 */
    __device__ CemaPowers(void *memory, const CemaCoefficients &coef, const CemaPlace &place, int steps,
                          int D, int N) {
        int lane = (int)threadIdx.x % WARP_SIZE, k = lane / 2, first = lane % 2 * 8;
        CemaFloat q = CemaState(coef, place.d, place.states + k, D, N).q;
        CemaComplex eighth = cema_power(q, 8), now = first ? eighth : CemaComplex{1, 0};
        own = (CemaFloat *)memory + place.channel * CEMA_STATES * CEMA_GROUP;
#pragma unroll
        for (int m = 0; m < 8; m++, now = now * to_double(q)) own[at(k, first + m)] = to_float(now);
        group = to_float(eighth * eighth), length = to_float(cema_power(q, steps));
        __syncwarp(); // the powers are there
    }
    __device__ static int at(int k, int m) { return k * CEMA_GROUP + (m + k) % CEMA_GROUP; }
    __device__ CemaFloat operator()(int k, int m) const { return own[at(k, m)]; }
    __device__ static CemaFloat of(CemaFloat x, int k) {
        return CemaFloat{__shfl_sync(FULL_MASK, x.re, 2 * k), __shfl_sync(FULL_MASK, x.im, 2 * k)};
    }
};
__device__ inline float cema_part(CemaFloat z, int im) { return im ? z.im : z.re; }

/* CEMA_OWN complex numbers of each of a thread's two rows, (re, im) each, as the sums of products leave
 * them. */
struct CemaPairs { float v[CEMA_OWN][4]; };

/* q^16 of a thread's states */
struct CemaTurn {
    float re[CEMA_OWN], im[CEMA_OWN];
    __device__ CemaTurn(const CemaPowers &powers, const CemaPlace &place) {
#pragma unroll
        for (int j = 0; j < CEMA_OWN; j++) {
            CemaFloat power = powers.of(powers.group, 4 * j + place.pair);
            re[j] = power.re, im[j] = power.im;
        }
    }
};

/* h = q^16 h + add; i: which row */
__device__ inline void cema_turn(float (&h)[4], int i, const CemaTurn &turn, int j, const float (&add)[4]) {
    float re = h[2 * i], im = h[2 * i + 1];
    h[2 * i] = fmaf(-turn.im[j], im, fmaf(turn.re[j], re, add[2 * i]));
    h[2 * i + 1] = fmaf(turn.im[j], re, fmaf(turn.re[j], im, add[2 * i + 1]));
}
/* slope = q^16 (slope + 16 h) + add: the derivative of that by ln q; before h takes its turn */
__device__ inline void cema_turn_slope(float (&slope)[4], const float (&h)[4], int i, const CemaTurn &turn,
                                       int j, const float (&add)[4]) {
    float re = fmaf(CEMA_GROUP, h[2 * i], slope[2 * i]),
          im = fmaf(CEMA_GROUP, h[2 * i + 1], slope[2 * i + 1]);
    slope[2 * i] = fmaf(-turn.im[j], im, fmaf(turn.re[j], re, add[2 * i]));
    slope[2 * i + 1] = fmaf(turn.im[j], re, fmaf(turn.re[j], im, add[2 * i + 1]));
}

/* One segment more: h = q^length h + factor end and the slope by ln q beside it (if slopes is not NULL);
 * ends and slopes at this segment's. power: q^length. */
__device__ inline void cema_pass_segment(CemaFloat &h, CemaFloat &slope, const float *end,
                                         const float *end_slope, CemaFloat factor, CemaFloat power,
                                         int length) {
    if (end_slope) slope = power * (slope + (float)length * h) + CemaFloat{end_slope[0], end_slope[1]};
    h = power * h + factor * CemaFloat{end[0], end[1]};
}

/* What all segments before a thread's strips left: h and slope as cema_pass_segment takes them on. ends,
 * slopes: (segments,B,D,N,2) */
__device__ inline void cema_start(CemaPairs &h, CemaPairs &slope, const float *ends, const float *slopes,
                                  const CemaFloat (&factor)[CEMA_OWN], const CemaPowers &powers,
                                  const CemaPlace &place, const CemaStrips &strips, int steps, int D,
                                  int N) {
    CemaStrip strip[2] = {CemaStrip(strips, place.row[0], steps), CemaStrip(strips, place.row[1], steps)};
    CemaFloat power[CEMA_OWN];
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++) power[j] = powers.of(powers.length, 4 * j + place.pair);
    if (place.d >= D) return;
    /* All states at once, since each segment's waits for memory. */
    for (int segment = 0; segment < max(strip[0].segment, strip[1].segment); segment++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < CEMA_OWN; j++) {
                int k = place.state(j);
                if (segment >= strip[i].segment || strip[i].steps == 0 || k >= N) continue;
                int64_t at = ((((int64_t)segment * strips.B + strip[i].b) * D + place.d) * N + k) * 2;
                CemaFloat now = {h.v[j][2 * i], h.v[j][2 * i + 1]},
                          turn = {slope.v[j][2 * i], slope.v[j][2 * i + 1]};
                cema_pass_segment(now, turn, ends + at, slopes ? slopes + at : nullptr, factor[j], power[j],
                                  strips.length);
                h.v[j][2 * i] = now.re, h.v[j][2 * i + 1] = now.im;
                slope.v[j][2 * i] = turn.re, slope.v[j][2 * i + 1] = turn.im;
            }
}

/* computes: ends[segment,b,d,k] = e after the segment, from zero, e_s = q e_{s-1} + x_s, and slopes = d e /
 *           d ln q
 * launch:   grid (ceil(D / 16), ceil(strips / 16)), block 512: a warp owns 16 strips of a channel
 * traffic:  B count length D sizeof(T) bytes
 * needs:    CEMA_STATES states from first_state on; strips as long as `length`, a multiple of 32, the first
 *           of a row perhaps with steps before step 0, which are zero; slopes if SLOPES; WIDE: D a multiple
 *           of 8, x of 16 bytes
 * numerics: as at the head of this file; fixed order: deterministic */
template <typename T, bool WIDE, bool SLOPES>
__global__ void __launch_bounds__(CEMA_THREADS, CEMA_BLOCKS_PER_SM)
    cema_ends_kernel(float *ends, float *slopes, const T *x, CemaCoefficients coef, CemaStrips strips,
                     int first_state, int steps, int D, int N) {
    constexpr int SLOTS = sizeof(T) == 2 ? 2 : 1, TILE = SLOTS * CEMA_GROUP, STATE = CemaParts<T>::STATE;
    alignas(16) __shared__ CemaUnit<T> tiles[2][SLOTS * CEMA_CHANNELS * CEMA_UNITS];
    CemaPlace place(first_state);
    __shared__ typename CemaEarly<T>::Stage stage;
    CemaMover mover(strips, steps, D);
    bool moves = mover.slot < SLOTS;
    mover.step += mover.slot * CEMA_GROUP;
    if (moves) cema_request<WIDE, T>(stage, x, mover, 0, D);
    CemaPowers powers(tiles, coef, place, 0, D, N);
    CemaTable<STATE> plain[CEMA_OWN], hat[SLOPES ? CEMA_OWN : 1];
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++) {
        int k = 4 * j + place.group / 2, im = place.group % 2, m = CEMA_GROUP - 1 - 2 * place.pair;
        float v[4] = {cema_part(powers(k, m), im), cema_part(powers(k, m - 1), im),
                      cema_part(powers(k, m - 8), im), cema_part(powers(k, m - 9), im)};
        cema_table(plain[j], v[0], v[1], v[2], v[3]);
        if constexpr (SLOPES)
            cema_table(hat[j], (float)m * v[0], (float)(m - 1) * v[1], (float)(m - 8) * v[2],
                       (float)(m - 9) * v[3]);
    }
    CemaTurn turn(powers, place);
    CemaPairs e = {}, slope = {};
    __syncthreads(); // the powers are no longer needed
    int first = 0, now = 0;
    auto carry = [&]() {
        if (!moves || first + TILE >= strips.length) return;
        cema_move<WIDE, T>(tiles[now ^ 1], stage, x, mover, first + TILE, D);
        cema_request<WIDE, T>(stage, x, mover, first + 2 * TILE, D);
    };
    if (moves) cema_move<WIDE, T>(tiles[0], stage, x, mover, 0, D);
    if (moves) cema_request<WIDE, T>(stage, x, mover, TILE, D);
    for (; first < strips.length; first += TILE, now ^= 1) {
        __syncthreads(); // the tile is whole; the other one has been read by all
        if (cema_carries_first()) carry();
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            CemaRows<CemaParts<T>::INPUT> rows;
            cema_rows<T>(rows, tiles[now], place, slot);
            float add[CEMA_OWN][4] = {}, add_slope[SLOPES ? CEMA_OWN : 1][4] = {};
            cema_multiply(add, rows, plain);
            if constexpr (SLOPES) cema_multiply(add_slope, rows, hat);
#pragma unroll
            for (int j = 0; j < CEMA_OWN; j++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if constexpr (SLOPES) cema_turn_slope(slope.v[j], e.v[j], i, turn, j, add_slope[j]);
                    cema_turn(e.v[j], i, turn, j, add[j]);
                }
        }
        if (!cema_carries_first()) carry();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        CemaStrip strip(strips, place.row[i], steps);
        if (strip.steps == 0 || place.d >= D) continue;
#pragma unroll
        for (int j = 0; j < CEMA_OWN; j++) {
            int k = place.state(j);
            if (k >= N) continue;
            int64_t at = ((((int64_t)strip.segment * strips.B + strip.b) * D + place.d) * N + k) * 2;
            ends[at] = e.v[j][2 * i], ends[at + 1] = e.v[j][2 * i + 1];
            if constexpr (SLOPES) slopes[at] = slope.v[j][2 * i], slopes[at + 1] = slope.v[j][2 * i + 1];
        }
    }
}

/* The matrices of a scan: inputs to outputs, states to outputs, inputs to states. */
template <typename T> struct CemaScan {
    CemaTable<CemaParts<T>::OUTPUT> taps[2], out[CEMA_OWN / 2][2];
    CemaTable<CemaParts<T>::STATE> in[CEMA_OWN];
};

/* Forward, inputs enter the state by p q^(15-m) and the state the output by c q q^m; back in time, by c q
 * q^(15-m) and p q^m. */
__device__ inline CemaFloat cema_way_in(const CemaState &s, bool reverse) {
    return reverse ? s.c * s.q : CemaFloat{s.p, 0};
}
__device__ inline CemaFloat cema_way_out(const CemaState &s, bool reverse) {
    return reverse ? CemaFloat{s.p, 0} : s.c * s.q;
}

template <typename T>
__device__ inline void cema_scan_tables(CemaScan<T> &scan, const CemaPowers &powers,
                                        const CemaCoefficients &coef, float omega, const CemaPlace &place,
                                        bool reverse, int D, int N) {
    float k_low = 0, k_high = 0; /* k_l of lags group and group + 8 */
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++) {
        int k = 4 * j + place.group / 2, im = place.group % 2, m = CEMA_GROUP - 1 - 2 * place.pair;
        CemaFloat in = cema_way_in(CemaState(coef, place.d, place.column(j), D, N), reverse);
        cema_table(scan.in[j], cema_part(in * powers(k, m), im), cema_part(in * powers(k, m - 1), im),
                   cema_part(in * powers(k, m - 8), im), cema_part(in * powers(k, m - 9), im));
        CemaState own(coef, place.d, place.state(j), D, N);
        CemaFloat low = powers(4 * j + place.pair, place.group),
                  high = powers(4 * j + place.pair, place.group + 8), pc = own.p * own.c,
                  out = cema_way_out(own, reverse);
        k_low += pc.re * low.re - pc.im * low.im, k_high += pc.re * high.re - pc.im * high.im;
        low = out * low, high = out * high;
        cema_split(scan.out[j / 2][0].b, j % 2, low.re, -low.im);
        cema_split(scan.out[j / 2][1].b, j % 2, high.re, -high.im);
    }
    k_low = lanes_sum(k_low, 4) + (place.group == 0 ? omega : 0.0f), k_high = lanes_sum(k_high, 4);
#pragma unroll
    for (int o = 0; o < 2; o++) {
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int lag = 8 * o + place.group - 2 * place.pair - i % 2 - i / 2 * 8, from = 4 * (lag & 7);
            float low = __shfl_sync(FULL_MASK, k_low, from), high = __shfl_sync(FULL_MASK, k_high, from);
            v[i] = lag < 0 ? 0.0f : lag < 8 ? low : high;
        }
        cema_table(scan.taps[o], v[0], v[1], v[2], v[3]);
    }
}

/* The last steps of row i's strip that are no whole group, one by one and out of global memory: h = q h
 * + in x. */
template <typename T>
__device__ inline void cema_tail(CemaPairs &h, const T *x, const CemaCoefficients &coef,
                                 const CemaPlace &place, const CemaStrips &strips, int i, int steps, int D,
                                 int N) {
    CemaStrip strip(strips, place.row[i], steps);
    if (place.d >= D) return;
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++) {
        CemaState s(coef, place.d, place.state(j), D, N);
        CemaFloat now = {h.v[j][2 * i], h.v[j][2 * i + 1]}, in = cema_way_in(s, strips.reverse);
        for (int m = strip.steps / CEMA_GROUP * CEMA_GROUP; m < strip.steps; m++) {
            float value = to_float(x[(strip.first + (strips.reverse ? -m : m)) * D + place.d]);
            now = s.q * now + value * in;
        }
        h.v[j][2 * i] = now.re, h.v[j][2 * i + 1] = now.im;
    }
}

/* A group of one slot: outputs take the place of inputs, and the states of rows that have a whole group
 * left go on; all rows have unless RAGGED. */
template <bool RAGGED, typename T>
__device__ inline void cema_scan_group(CemaUnit<T> *tile, CemaPairs &h, const CemaScan<T> &scan,
                                       const CemaTurn &turn, const CemaPlace &place, int slot,
                                       const int (&left)[2]) {
    constexpr int OUTPUT = CemaParts<T>::OUTPUT;
    CemaRows<CemaParts<T>::INPUT> rows;
    cema_rows<T>(rows, tile, place, slot);
    CemaRows<OUTPUT> states[CEMA_OWN / 2];
    float y[CEMA_OWN / 2][2][4] = {}; /* of the two halves of a group; a sum each for every eight states */
    cema_multiply(y[0], rows, scan.taps);
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            cema_split(states[j / 2].a, j % 2 * 2 + i, h.v[j][2 * i], h.v[j][2 * i + 1]);
#pragma unroll
    for (int both = OUTPUT - 1; both >= 0; both--)
#pragma unroll
        for (int part = 0; part <= both; part++)
#pragma unroll
            for (int n = 0; n < CEMA_OWN; n++)
                tensor_product(y[n / 2][n % 2], states[n / 2].a[part],
                               scan.out[n / 2][n % 2].b[both - part]);
    float add[CEMA_OWN][4] = {};
    cema_multiply(add, rows, scan.in);
    __syncwarp(); // all lanes have read the inputs whose place the outputs take
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float first = y[0][i / 2][i % 2 * 2], second = y[0][i / 2][i % 2 * 2 + 1];
#pragma unroll
        for (int n = 1; n < CEMA_OWN / 2; n++)
            first += y[n][i / 2][i % 2 * 2], second += y[n][i / 2][i % 2 * 2 + 1];
        tile[place.unit(slot, i)] = CemaUnit<T>{{from_float<T>(first), from_float<T>(second)}};
    }
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (!RAGGED || left[i] >= CEMA_GROUP) cema_turn(h.v[j], i, turn, j, add[j]);
}

/* computes: forward y_t = Re(sum c h_t) + omega x_t with h_t = q h_{t-1} + p x_t, from h_in to h_out;
 *           reverse, the same of gradients: x is dy, y is du, h_in is dh_out and h_out is dh_in
 * launch:   grid (ceil(D / 16), ceil(B segments / 16)), block 512: a warp owns 16 strips of a channel
 * traffic:  2 B T D sizeof(T) bytes, 3 if it ADDS to y, as it does for states from the 17th on
 * needs:    CEMA_STATES states from first_state on; h_in NULL is zero, h_out NULL is not wanted; they may
 *           be the same memory unless there are several segments; omega NULL is zero; ends from
 *           cema_ends_kernel; y is not x; WIDE: D a multiple of 8, x and y of 16 bytes
 * numerics: as at the head of this file; y is rounded to T before it is added; fixed order: deterministic */
template <typename T, bool WIDE, bool ADDS>
__global__ void __launch_bounds__(CEMA_THREADS, CEMA_BLOCKS_PER_SM)
    cema_scan_kernel(T *y, float *h_out, const T *x, const float *h_in, const float *ends,
                     CemaCoefficients coef, const float *omega, CemaStrips strips, int first_state,
                     int steps, int D, int N) {
    constexpr int SLOTS = sizeof(T) == 2 ? 2 : 1, TILE = SLOTS * CEMA_GROUP;
    alignas(16) __shared__ CemaUnit<T> tiles[2][SLOTS * CEMA_CHANNELS * CEMA_UNITS];
    CemaPlace place(first_state);
    __shared__ typename CemaEarly<T>::Stage stage;
    CemaMover mover(strips, steps, D);
    bool moves = mover.slot < SLOTS;
    mover.step += mover.slot * CEMA_GROUP;
    if (moves) cema_request<WIDE, T>(stage, x, mover, 0, D);
    CemaPowers powers(tiles, coef, place, strips.length, D, N);
    CemaScan<T> scan;
    cema_scan_tables(scan, powers, coef, omega && place.d < D ? omega[place.d] : 0.0f, place, strips.reverse,
                     D, N);
    CemaTurn turn(powers, place);
    CemaPairs h = {};
    float sign = strips.reverse ? -1.0f : 1.0f; /* gradients of states are conjugate */
    int row_steps[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        CemaStrip strip(strips, place.row[i], steps);
        row_steps[i] = strip.steps;
        if (!h_in || strip.steps == 0 || place.d >= D) continue;
#pragma unroll
        for (int j = 0; j < CEMA_OWN; j++) {
            int k = place.state(j);
            if (k >= N) continue;
            const float *in = h_in + (((int64_t)strip.b * D + place.d) * N + k) * 2;
            h.v[j][2 * i] = in[0], h.v[j][2 * i + 1] = sign * in[1];
        }
    }
    CemaPairs no_slope = {};
    CemaFloat way_in[CEMA_OWN];
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++)
        way_in[j] = cema_way_in(CemaState(coef, place.d, place.state(j), D, N), strips.reverse);
    cema_start(h, no_slope, ends, nullptr, way_in, powers, place, strips, steps, D, N);
    __syncthreads(); // the powers are no longer needed
    int now = 0, first = 0, longest = min(strips.length, steps);
    /* The outputs before this tile go out, the inputs after it come in. */
    auto carry = [&]() {
        if (moves && first > 0) {
            CemaShare<T> before, out;
            if constexpr (ADDS) cema_fetch<WIDE>(before, (const T *)y, mover, first - TILE, D);
            cema_take(out, tiles[now ^ 1], mover);
            if constexpr (ADDS) cema_add(out, before);
            cema_write<WIDE>(y, out, mover, first - TILE, D);
        }
        if (!moves || first + TILE >= longest) return;
        cema_move<WIDE, T>(tiles[now ^ 1], stage, x, mover, first + TILE, D);
        cema_request<WIDE, T>(stage, x, mover, first + 2 * TILE, D);
    };
    if (moves) cema_move<WIDE, T>(tiles[0], stage, x, mover, 0, D);
    if (moves) cema_request<WIDE, T>(stage, x, mover, TILE, D);
    auto next = [&](auto ragged) {
        __syncthreads(); // this tile is whole, and so are the outputs of the one before
        if (cema_carries_first()) carry();
#pragma unroll
        for (int slot = 0; slot < SLOTS; slot++) {
            int begin = first + slot * CEMA_GROUP, left[2] = {row_steps[0] - begin, row_steps[1] - begin};
            cema_scan_group<ragged.value>(tiles[now], h, scan, turn, place, slot, left);
        }
        if (!cema_carries_first()) carry();
        first += TILE, now ^= 1;
    };
    for (int even = cema_even_steps(strips, steps, TILE); first < even;) next(std::false_type());
    while (first < longest) next(std::true_type());
    __syncthreads(); // the last outputs are whole
    carry();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        CemaStrip strip(strips, place.row[i], steps);
        if (!h_out || strip.steps == 0 || strip.segment < strips.count - 1 || place.d >= D) continue;
        cema_tail(h, x, coef, place, strips, i, steps, D, N);
#pragma unroll
        for (int j = 0; j < CEMA_OWN; j++) {
            int k = place.state(j);
            if (k >= N) continue;
            float *out = h_out + (((int64_t)strip.b * D + place.d) * N + k) * 2;
            out[0] = h.v[j][2 * i], out[1] = sign * h.v[j][2 * i + 1];
        }
    }
}

/* Runs a statement for each CEMA_STATES of the N states, from first_state on, with the constant WIDE. */
#define WITH_CEMA_STATES(N, wide, ...)                                                                      \
    for (int first_state = 0; first_state < (N); first_state += CEMA_STATES) {                              \
        if (wide) {                                                                                         \
            constexpr bool WIDE = true;                                                                     \
            __VA_ARGS__;                                                                                    \
        } else {                                                                                            \
            constexpr bool WIDE = false;                                                                    \
            __VA_ARGS__;                                                                                    \
        }                                                                                                   \
    }

/* May eight channels be read in units of 16 bytes? */
template <typename T, typename... P> static bool cema_wide(int64_t D, const P *...pointers) {
    return D % 8 == 0 && vectorises<T>(D, pointers...);
}

/* What segments of `strips` end with from zero, for the first `count` of each row. */
template <typename T>
static void cema_ends(Context *context, float *ends, float *slopes, const T *x, CemaCoefficients coef,
                      CemaStrips strips, int64_t steps, int64_t D, int64_t N) {
    bool wide = cema_wide<T>(D, x);
    if (strips.count == 0) return;
    dim3 grid(blocks_for(D, CEMA_CHANNELS), cema_blocks(strips));
    WITH_CEMA_STATES(N, wide, {
        if (slopes)
            LAUNCH((cema_ends_kernel<T, WIDE, true>), grid, CEMA_THREADS, context, ends, slopes, x, coef,
                   strips, first_state, (int)steps, (int)D, (int)N);
        else
            LAUNCH((cema_ends_kernel<T, WIDE, false>), grid, CEMA_THREADS, context, ends, slopes, x, coef,
                   strips, first_state, (int)steps, (int)D, (int)N);
    });
}

template <typename T>
static void cema_scan(Context *context, T *y, float *h_out, const T *x, const float *h_in, const float *ends,
                      CemaCoefficients coef, const float *omega, CemaStrips strips, int64_t steps, int64_t D,
                      int64_t N) {
    bool wide = cema_wide<T>(D, x, y);
    dim3 grid(blocks_for(D, CEMA_CHANNELS), cema_blocks(strips));
    WITH_CEMA_STATES(N, wide, {
        if (first_state == 0)
            LAUNCH((cema_scan_kernel<T, WIDE, false>), grid, CEMA_THREADS, context, y, h_out, x, h_in, ends,
                   coef, omega, strips, first_state, (int)steps, (int)D, (int)N);
        else
            LAUNCH((cema_scan_kernel<T, WIDE, true>), grid, CEMA_THREADS, context, y, h_out, x, h_in, ends,
                   coef, nullptr, strips, first_state, (int)steps, (int)D, (int)N);
    });
}

/* y, u (B,T,D); h_out, h_in (B,D,N,2) float, perhaps the same; omega (D). */
template <typename T>
static void cema_forward(Context *context, T *y, float *h_out, const T *u, const float *h_in,
                         CemaCoefficients coef, const float *omega, int64_t B, int64_t steps, int64_t D,
                         int64_t N) {
    ScratchScope scope(context);
    CemaSegments segments = cema_segments(context, B, steps, D);
    float *ends = take<float>(context, segments.rows * D * N * 2);
    /* The first segment's blocks read h_in when the last one's may have written h_out already. */
    float *other = take<float>(context, B * D * N * 2);
    float *last = segments.count > 1 && h_out && h_out == h_in ? other : h_out;
    cema_ends<T>(context, ends, nullptr, u, coef, cema_strips(segments, B, segments.count - 1, false), steps,
                 D, N);
    cema_scan<T>(context, y, last, u, h_in, ends, coef, omega,
                 cema_strips(segments, B, segments.count, false), steps, D, N);
    if (last != h_out) copy(context, h_out, last, (size_t)(B * D * N * 2) * sizeof(float));
}

/* Where a backward's sums go: gradients of p, q and c before the sum over rows, each (rows,D,N), and of
 * omega, (rows,D). */
struct CemaSums { float *dp, *dq_re, *dq_im, *dc_re, *dc_im, *domega; };

/* (re, im) of CEMA_OWN states, summed over a thread's rows. */
struct CemaTotals { float re[CEMA_OWN], im[CEMA_OWN]; };
__device__ inline void cema_add_product(float &re, float &im, const float (&a)[4], const float (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        re = fmaf(a[i], b[i], fmaf(-a[i + 1], b[i + 1], re));
        im = fmaf(a[i], b[i + 1], fmaf(a[i + 1], b[i], im));
    }
}

/* What a thread carries through time: nu and zeta of its states, the sums of V nu and of V^ nu + V zeta,
 * and sums of u_m dy_j over strips, m = group and group + 8, at steps 15 - j of a group. */
struct CemaBackward {
    CemaPairs nu, zeta;
    CemaTotals a, k;
    float meet[2][4];
};

/* A group: u in slot 0, dy, from the last step of the group to the first, in slot 1. */
template <bool RAGGED, typename T>
__device__ inline void cema_sums_group(CemaBackward &s, const CemaUnit<T> *tile,
                                       const CemaTable<CemaParts<T>::GRADIENT> (&tables)[CEMA_OWN][2],
                                       const CemaTurn &turn, const CemaPlace &place, const int (&left)[2]) {
    constexpr int INPUT = CemaParts<T>::INPUT;
    CemaRows<INPUT> u, dy;
    cema_rows<T>(u, tile, place, 0);
    cema_rows<T>(dy, tile, place, 1);
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++) {
        float v[2][4] = {}, add[2][4] = {}; /* and by ln q */
        cema_multiply(v, u, tables[j]);
        cema_multiply(add, dy, tables[j]);
        cema_add_product(s.a.re[j], s.a.im[j], v[0], s.nu.v[j]);
        cema_add_product(s.k.re[j], s.k.im[j], v[1], s.nu.v[j]);
        cema_add_product(s.k.re[j], s.k.im[j], v[0], s.zeta.v[j]);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            if (RAGGED && left[i] < CEMA_GROUP) continue;
            cema_turn_slope(s.zeta.v[j], s.nu.v[j], i, turn, j, add[1]);
            cema_turn(s.nu.v[j], i, turn, j, add[0]);
        }
    }
    /* u transposed times dy: strips are what is summed over. */
    CemaRows<INPUT> u_turned, dy_turned, columns;
    CemaTable<INPUT> table[2];
    cema_rows_transposed<T>(u_turned, u, tile, place, 0);
    cema_rows_transposed<T>(dy_turned, dy, tile, place, 1);
#pragma unroll
    for (int part = 0; part < INPUT; part++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            columns.a[part][i] = u_turned.a[part][i / 2 + i % 2 * 2];
            table[i / 2].b[part][i % 2] = dy_turned.a[part][i];
        }
    float sum[2][4] = {};
    cema_multiply(sum, columns, table);
#pragma unroll
    for (int o = 0; o < 2; o++)
#pragma unroll
        for (int i = 0; i < 4; i++) s.meet[o][i] += sum[o][i];
}

/* The last steps of row i's strip that are no whole group, as cema_tail: nu = q nu + dy, zeta = q (zeta
 * + nu). */
template <typename T>
__device__ inline void cema_sums_tail(CemaBackward &s, const T *dy, const CemaCoefficients &coef,
                                      const CemaPlace &place, const CemaStrips &strips, int i, int steps,
                                      int D, int N) {
    CemaStrip strip(strips, place.row[i], steps);
    if (place.d >= D) return;
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++) {
        CemaFloat q = CemaState(coef, place.d, place.state(j), D, N).q;
        CemaFloat nu = {s.nu.v[j][2 * i], s.nu.v[j][2 * i + 1]},
                  zeta = {s.zeta.v[j][2 * i], s.zeta.v[j][2 * i + 1]};
        for (int m = strip.steps / CEMA_GROUP * CEMA_GROUP; m < strip.steps; m++) {
            zeta = q * (zeta + nu);
            nu = q * nu + CemaFloat{to_float(dy[(strip.first - m) * D + place.d]), 0};
        }
        s.nu.v[j][2 * i] = nu.re, s.nu.v[j][2 * i + 1] = nu.im;
        s.zeta.v[j][2 * i] = zeta.re, s.zeta.v[j][2 * i + 1] = zeta.im;
    }
}

/* The end of a channel's sums, by its warp, through CEMA_STATES * 8 floats of shared memory of its own. An
 * incoming state acts like an input: its products with q nu and with nu + zeta at the first step. */
template <typename T>
__device__ inline void cema_sums_finish(CemaBackward &s, const CemaSums &sums, float *own, const T *dy,
                                        const float *h_in, const CemaCoefficients &coef,
                                        const CemaPlace &place, const CemaStrips &strips, int steps, int D,
                                        int N) {
    int lane = (int)threadIdx.x % WARP_SIZE;
    float r = 0; /* of lag `lane` */
    for (int m = 0; m < 2; m++) {
        /* Half of the sums of u_m dy_j at a time: m = group + 8 half. */
#pragma unroll
        for (int o = 0; o < 2; o++)
#pragma unroll
            for (int i = 0; i < 2; i++)
                own[place.group * CEMA_GROUP + 8 * o + 2 * place.pair + i] = s.meet[o][(m ? 2 : 0) + i];
        __syncwarp(); // they are there
        for (int row = 0; row < 8; row++) {
            int j = CEMA_GROUP - 1 - (row + 8 * m - lane); /* dy_j is of step 15 - j, lane steps earlier */
            if (lane < CEMA_GROUP && j < CEMA_GROUP) r += own[row * CEMA_GROUP + j];
        }
        __syncwarp(); // and read
    }
    CemaTotals h_nu = {}, h_zeta = {};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        CemaStrip strip(strips, place.row[i], steps);
        if (!h_in || strip.steps == 0 || strip.segment < strips.count - 1 || place.d >= D) continue;
        cema_sums_tail(s, dy, coef, place, strips, i, steps, D, N);
#pragma unroll
        for (int j = 0; j < CEMA_OWN; j++) {
            int k = place.state(j);
            if (k >= N) continue;
            const float *h = h_in + (((int64_t)strip.b * D + place.d) * N + k) * 2;
            const float *nu = s.nu.v[j] + 2 * i, *zeta = s.zeta.v[j] + 2 * i;
            h_nu.re[j] += h[0] * nu[0] - h[1] * nu[1], h_nu.im[j] += h[0] * nu[1] + h[1] * nu[0];
            h_zeta.re[j] += h[0] * zeta[0] - h[1] * zeta[1], h_zeta.im[j] += h[0] * zeta[1] + h[1] * zeta[0];
        }
    }
    CemaTotals *all[4] = {&s.a, &s.k, &h_nu, &h_zeta};
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float sum = i % 2 ? all[i / 2]->im[j] : all[i / 2]->re[j];
            for (int step = 4; step < WARP_SIZE; step *= 2) sum += __shfl_xor_sync(FULL_MASK, sum, step);
            if (place.group == i) own[(4 * j + place.pair) * 8 + i] = sum;
        }
    __syncwarp(); // all states' totals are there
    if (lane == 0 && place.d < D && place.states == 0) sums.domega[(int64_t)blockIdx.y * D + place.d] = r;
    int k = place.states + lane;
    CemaState state(coef, place.d, k, D, N);
    CemaComplex q = to_double(state.q), c = to_double(state.c), power = {1, 0}, a = {0, 0}, slope = {0, 0};
    for (int lag = 0; lag < CEMA_GROUP; lag++) {
        /* slope: the derivative of a by q; r_16 is 0 */
        double here = __shfl_sync(FULL_MASK, r, lag),
               next = __shfl_sync(FULL_MASK, r, (lag + 1) % WARP_SIZE);
        a = a + here * power, slope = slope + (lag + 1) * next * power;
        power = power * q;
    }
    if (lane >= 4 * CEMA_OWN || k >= N || place.d >= D) return;
    const float *t = own + lane * 8;
    double p = state.p;
    a = a + q * CemaComplex{t[0], t[1]}, slope = slope + CemaComplex{t[0], t[1]} + CemaComplex{t[2], t[3]};
    CemaComplex dp = c * a, dc = p * a + q * CemaComplex{t[4], t[5]};
    CemaComplex dq = c * (p * slope + CemaComplex{t[4], t[5]} + CemaComplex{t[6], t[7]});
    int64_t at = ((int64_t)blockIdx.y * D + place.d) * N + k;
    sums.dp[at] = (float)dp.re;
    sums.dq_re[at] = (float)dq.re, sums.dq_im[at] = (float)-dq.im;
    sums.dc_re[at] = (float)dc.re, sums.dc_im[at] = (float)-dc.im;
}

/* computes: the gradients of p, q, c and omega but for what dh_out adds, a row of them for 16 strips
 * launch:   grid (ceil(D / 16), ceil(B segments / 16)), block 512: a warp owns 16 strips of a channel
 * traffic:  2 B T D sizeof(T) bytes
 * needs:    CEMA_STATES states from first_state on; strips in reverse; ends and slopes of dy from
 *           cema_ends_kernel; WIDE: D a multiple of 8, dy and u of 16 bytes
 * numerics: as at the head of this file, sums over time in float; fixed order: deterministic */
template <typename T, bool WIDE>
__global__ void __launch_bounds__(CEMA_THREADS, CEMA_BLOCKS_PER_SM)
    cema_sums_kernel(CemaSums sums, const T *dy, const T *u, const float *h_in, const float *ends,
                     const float *slopes, CemaCoefficients coef, CemaStrips strips, int first_state,
                     int steps, int D, int N) {
    constexpr int BUFFERS = sizeof(T) == 2 ? 2 : 1, PARTS = CemaParts<T>::GRADIENT;
    alignas(16) __shared__ CemaUnit<T> tiles[BUFFERS][2 * CEMA_CHANNELS * CEMA_UNITS];
    static_assert(sizeof tiles >= CEMA_CHANNELS * CEMA_STATES * 8 * sizeof(float), "room for the end");
    CemaPlace place(first_state);
    __shared__ typename CemaEarly<T>::Stage stage;
    CemaMover mover(strips, steps, D);
    const T *from = mover.slot == 0 ? u : dy;
    if (mover.slot == 1) mover.flip();
    cema_request<WIDE, T>(stage, from, mover, 0, D);
    CemaPowers powers(tiles, coef, place, strips.length, D, N);
    CemaTable<PARTS> tables[CEMA_OWN][2]; /* of powers, and of their derivatives by ln q */
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++) {
        int k = 4 * j + place.group / 2, im = place.group % 2, m = 2 * place.pair;
        float v[4] = {cema_part(powers(k, m), im), cema_part(powers(k, m + 1), im),
                      cema_part(powers(k, m + 8), im), cema_part(powers(k, m + 9), im)};
        cema_table(tables[j][0], v[0], v[1], v[2], v[3]);
        cema_table(tables[j][1], (float)m * v[0], (float)(m + 1) * v[1], (float)(m + 8) * v[2],
                   (float)(m + 9) * v[3]);
    }
    CemaTurn turn(powers, place);
    CemaBackward s = {};
    int row_steps[2];
#pragma unroll
    for (int i = 0; i < 2; i++) row_steps[i] = CemaStrip(strips, place.row[i], steps).steps;
    CemaFloat plainly[CEMA_OWN];
#pragma unroll
    for (int j = 0; j < CEMA_OWN; j++) plainly[j] = CemaFloat{1, 0};
    cema_start(s.nu, s.zeta, ends, slopes, plainly, powers, place, strips, steps, D, N);
    __syncthreads(); // the powers are no longer needed
    int now = 0, first = 0, longest = min(strips.length, steps);
    auto carry = [&]() {
        if (first + CEMA_GROUP >= longest) return;
        cema_move<WIDE, T>(tiles[(now + 1) % BUFFERS], stage, from, mover, first + CEMA_GROUP, D);
        cema_request<WIDE, T>(stage, from, mover, first + 2 * CEMA_GROUP, D);
    };
    cema_move<WIDE, T>(tiles[0], stage, from, mover, 0, D);
    cema_request<WIDE, T>(stage, from, mover, CEMA_GROUP, D);
    auto next = [&](auto ragged) {
        __syncthreads(); // the tile is whole; the other one has been read by all
        if (BUFFERS == 2 && cema_carries_first()) carry();
        int left[2] = {row_steps[0] - first, row_steps[1] - first};
        cema_sums_group<ragged.value, T>(s, tiles[now], tables, turn, place, left);
        if (BUFFERS == 1) __syncthreads(); // the only tile has been read by all
        if (BUFFERS == 1 || !cema_carries_first()) carry();
        now = (now + 1) % BUFFERS, first += CEMA_GROUP;
    };
    for (int even = cema_even_steps(strips, steps, CEMA_GROUP); first < even;) next(std::false_type());
    while (first < longest) next(std::true_type());
    __syncthreads(); // the tiles are no longer needed
    float *own = reinterpret_cast<float *>(tiles) + place.channel * CEMA_STATES * 8;
    cema_sums_finish(s, sums, own, dy, h_in, coef, place, strips, steps, D, N);
}

/* computes: what dh_out adds to the gradients of p and q: with G = conj dh_out, H the last state's sum of
 *           inputs, h_{T-1} = p H + q^T h_in, and H = u_{T-1} + q E where E and dE / d ln q come from the
 *           ends of the steps before:  dp = Re(G H), dq = G (p dH / dq + T q^(T-1) h_in), dc = 0; a row of
 *           sums for each b
 * launch:   grid ceil(B D N / 256), block 256: a thread owns a state of a row of the batch
 * traffic:  (28 + 16 segments) B D N bytes
 * needs:    ends and slopes of u's first T-1 steps, whose segments end at their end
 * numerics: double; fixed order: deterministic */
template <typename T>
__global__ void cema_outgoing_kernel(CemaSums sums, const float *dh_out, const T *u, const float *h_in,
                                     const float *ends, const float *slopes, CemaCoefficients coef,
                                     CemaStrips strips, int row, int steps, int D, int N) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, states = (int64_t)D * N;
    if (i >= strips.B * states) return;
    int b = (int)(i / states), d = (int)(i % states / N), k = (int)(i % N);
    CemaState s(coef, d, k, D, N);
    CemaFloat e = {0, 0}, turn = {0, 0}, power = to_float(cema_power(s.q, strips.length));
    for (int segment = 0; segment < strips.count; segment++) {
        int64_t at = ((int64_t)segment * strips.B * states + i) * 2;
        cema_pass_segment(e, turn, ends + at, slopes + at, CemaFloat{1, 0}, power, strips.length);
    }
    CemaComplex g = {dh_out[2 * i], -dh_out[2 * i + 1]};
    CemaFloat last = {to_float(u[((int64_t)b * steps + steps - 1) * D + d]), 0};
    CemaComplex sum = to_double(s.q * e + last), slope = to_double(s.p * (e + turn));
    if (h_in)
        slope =
            slope + (double)steps * (cema_power(s.q, steps - 1) * CemaComplex{h_in[2 * i], h_in[2 * i + 1]});
    CemaComplex dq = g * slope, dp = g * sum;
    int64_t at = (int64_t)(row + b) * states + i % states;
    sums.dp[at] = (float)dp.re, sums.dq_re[at] = (float)dq.re, sums.dq_im[at] = (float)-dq.im;
    sums.dc_re[at] = sums.dc_im[at] = 0;
    if (k == 0) sums.domega[(int64_t)(row + b) * D + d] = 0;
}

/* With a = sigmoid(alpha), s = sigmoid(delta), phi = k sigmoid(theta) 2 pi / N, q = (1 - a s) exp(i phi):
 *     da = dp - s dr,  ds = -a dr,  dr = dq . (cos phi, sin phi),  dphi = dq . (-q_im, q_re)
 * computes: dalpha, ddelta, dtheta, dgamma, domega += from the sums, over rows (of all segments) and, for
 *           theta, over states
 * launch:   grid ceil(D / channels), block 256: a thread owns a state of a channel, N make a channel
 * traffic:  20 rows D N bytes read
 * needs:    N <= 256
 * numerics: double, fixed order: deterministic */
__global__ static void cema_parameters_kernel(float *dalpha, float *ddelta, float *dtheta, float *dgamma,
                                              float *domega, CemaSums sums, const float *alpha,
                                              const float *delta, const float *theta, int rows, int D,
                                              int N) {
    __shared__ double dphase[256];
    int channels = 256 / N, channel = (int)threadIdx.x / N, k = (int)threadIdx.x % N;
    int d = (int)blockIdx.x * channels + channel;
    bool active = channel < channels && d < D;
    double turn = 0, rate = active ? logistic(theta[d]) : 0;
    if (active) {
        int64_t i = (int64_t)d * N + k;
        double dp = 0, dq_re = 0, dq_im = 0, dc_re = 0, dc_im = 0;
#pragma unroll 4
        for (int row = 0; row < rows; row++) {
            int64_t at = (int64_t)row * D * N + i;
            dp += sums.dp[at], dq_re += sums.dq_re[at], dq_im += sums.dq_im[at];
            dc_re += sums.dc_re[at], dc_im += sums.dc_im[at];
        }
        double a = logistic(alpha[i]), s = logistic(delta[i]), radius = 1 - a * s, sine, cosine,
               scale = sqrt(1 / (double)N);
        sincospi(2 * (double)(k + 1) * rate / (double)N, &sine, &cosine);
        double dr = dq_re * cosine + dq_im * sine;
        dalpha[i] += (float)((dp - s * dr) * a * (1 - a));
        ddelta[i] += (float)(-a * dr * s * (1 - s));
        dgamma[2 * i] += (float)(scale * dc_re);
        dgamma[2 * i + 1] += (float)(scale * dc_im);
        turn = radius * (dq_im * cosine - dq_re * sine) * (double)(k + 1);
    }
    dphase[threadIdx.x] = turn;
    __syncthreads(); // all states' shares of dtheta are there
    if (!active || k != 0) return;
    double total = 0, skip = 0;
    for (int j = 0; j < N; j++) total += dphase[threadIdx.x + j];
    for (int row = 0; row < rows; row++) skip += sums.domega[(int64_t)row * D + d];
    dtheta[d] += (float)(total * 6.283185307179586 / (double)N * rate * (1 - rate));
    domega[d] += (float)skip;
}

/* du (B,T,D) written, not dy; dh_in (NULL: not wanted), dh_out (NULL: zero) as h; the parameters' gradients
 * are added to. */
template <typename T>
static void cema_backward(Context *context, T *du, float *dh_in, float *dalpha, float *ddelta, float *dtheta,
                          float *dgamma, float *domega, const T *dy, const float *dh_out, const T *u,
                          const float *h_in, CemaCoefficients coef, const float *alpha, const float *delta,
                          const float *theta, const float *omega, int64_t B, int64_t steps, int64_t D,
                          int64_t N) {
    ScratchScope scope(context);
    CemaSegments segments = cema_segments(context, B, steps, D);
    CemaStrips strips = cema_strips(segments, B, segments.count, true);
    int64_t rows = cema_blocks(strips), most = blocks_for(segments.rows, CEMA_STRIPS) + B,
            size = most * D * N;
    float *memory = take<float>(context, NUM_CEMA_SUMS * size + most * D);
    float *ends = take<float>(context, segments.rows * D * N * 2);
    float *slopes = take<float>(context, segments.rows * D * N * 2);
    CemaSums sums = {
        memory, memory + size, memory + 2 * size, memory + 3 * size, memory + 4 * size, memory + 5 * size};
    bool wide = cema_wide<T>(D, dy, u);
    if (dh_out) {
        /* Segments that end with step T-2: it is the first that reaches before step 0. */
        CemaSegments before = cema_segments(context, B, steps > 1 ? steps - 1 : 1, D);
        CemaStrips all = cema_strips(before, B, steps > 1 ? before.count : 0, false);
        all.offset = (int)(steps - 1 - before.count * before.length);
        cema_ends<T>(context, ends, slopes, u, coef, all, steps, D, N);
        LAUNCH(cema_outgoing_kernel<T>, blocks_for(B * D * N, 256), 256, context, sums, dh_out, u, h_in,
               ends, slopes, coef, all, (int)rows, (int)steps, (int)D, (int)N);
        rows += B;
    }
    cema_ends<T>(context, ends, slopes, dy, coef, cema_strips(segments, B, segments.count - 1, true), steps,
                 D, N);
    dim3 grid(blocks_for(D, CEMA_CHANNELS), cema_blocks(strips));
    WITH_CEMA_STATES(N, wide,
                     LAUNCH((cema_sums_kernel<T, WIDE>), grid, CEMA_THREADS, context, sums, dy, u, h_in,
                            ends, slopes, coef, strips, first_state, (int)steps, (int)D, (int)N));
    cema_scan<T>(context, du, dh_in, dy, dh_out, ends, coef, omega, strips, steps, D, N);
    LAUNCH(cema_parameters_kernel, blocks_for(D, 256 / N), 256, context, dalpha, ddelta, dtheta, dgamma,
           domega, sums, alpha, delta, theta, (int)rows, (int)D, (int)N);
}

#endif
