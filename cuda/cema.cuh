/* cema.cuh - the complex exponential moving average: N complex states a channel, each h_t = q h_{t-1} + p
 * u_t, and y_t = Re(sum_k c_k h_t[k]) + omega u_t with c = gamma / sqrt(N).
 *
 * Eight lanes share a channel, R states each (N <= 8 R), and take eight steps at a time. With s the state
 * before a group of steps, x_0 .. x_7 its inputs, and k_l = Re(sum p c q^l) (+ omega at l = 0)
 *     s'  = q^8 s + sum_m q^(7-m) x_m         y_m = Re(q^(m+1) (p c s)) + sum_{i<=m} k_(m-i) x_i
 * so that only one complex product in eight steps waits for another, and the sum over i is a channel's, not
 * a state's. A butterfly that halves the steps while it adds the lanes leaves lane m with the whole of step
 * m. The powers of q are made in double, once for each thread. The kernels keep h / p; p is at least 1e-18
 * in that division, far below what a float sum could show.
 *
 * Tiles of 64 steps and 32 channels pass through shared memory: global memory is read and written along
 * channels while a lane walks along time; the next tile's loads are under way while one is computed. Where
 * rows and channels do not fill the device, time is cut into segments: a first kernel finds the state that
 * each segment would end with had it begun with zero, and the second begins each one with what all segments
 * before it left, s = q^length s + end.
 *
 * Backward without any state of the forward. The output's dependence on the input is symmetric in time: with
 *     nu_t    = dy_t + q nu_{t+1}                 (backward in time, complex)
 *     kappa_t = nu_{t+1} + q kappa_{t+1}          (d nu_t / d q)
 * the loss's linear form sum_t dy_t Re(c h_t) is Re(c sum_t p u_t nu_t), so that
 *     du_t = p Re(c nu_t) + omega dy_t     dc = sum p u nu     dq = c sum p u kappa     dp = Re(c sum u nu)
 * and a state that came in acts like an input p u_{-1} = h_in. A real pair's gradient of Re(z w) by w is (Re
 * z, -Im z). The gradient of the outgoing state, G, adds rho_t = q rho_{t+1}, rho_{T-1} = conj G, and its
 * derivative sigma the same way. A group of eight steps, counted from its end (so m = 0 is the latest), has
 *     sum u nu    += nu V            V  = sum u_m q^(m+1)
 *     sum u kappa += kappa V + nu V' V' = dV/dq
 * besides what meets inside the group: sum_l r_l q^l, where r_l = sum u_m dy_(m-l) is added up for a whole
 * channel and multiplied by the powers of q once, at the end. r_0 is the gradient of omega.
 */
#ifndef CUDA_CEMA_CUH
#define CUDA_CEMA_CUH

#include "common.cuh"

enum {
    CEMA_LANES = 8,     /* lanes of a channel, and steps of a group */
    CEMA_CHANNELS = 32, /* of a block */
    CEMA_THREADS = CEMA_LANES * CEMA_CHANNELS,
    CEMA_STEPS = 64,             /* of a tile */
    CEMA_PITCH = CEMA_STEPS + 4, /* 16-byte reads of a warp's four channels find different banks */
    CEMA_WARPS_PER_SM = 16,
    CEMA_MAX_STATES = 64,
    NUM_CEMA_COEFFICIENTS = 5,
    NUM_CEMA_SUMS = 5
};
constexpr float CEMA_SMALLEST_P = 1e-18f;

/* Arrays (D,N), computed once for each value of the parameters. */
struct CemaCoefficients {
    float *p, *q_re, *q_im, *c_re, *c_im;
};
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

/* Adds part[i] over the lanes of a channel, for eight steps at once: lane i gets step i. Seven shuffles. */
__device__ inline float transpose_sum(float (&part)[CEMA_LANES], int lane) {
#pragma unroll
    for (int width = CEMA_LANES / 2; width > 0; width /= 2) {
        bool upper = lane & width;
#pragma unroll
        for (int i = 0; i < width; i++) {
            float keep = upper ? part[i + width] : part[i], give = upper ? part[i] : part[i + width];
            part[i] = keep + __shfl_xor_sync(FULL_MASK, give, width);
        }
    }
    return part[0];
}

/* Time cut into segments of `length` steps, a multiple of a tile's. rows: the most segments of all rows of a
 * batch together, for any batch and length, so that a dry run of the largest batch takes enough scratch. */
struct CemaSegments { int64_t count, length, rows; };
static inline CemaSegments cema_segments(Context *context, int64_t B, int64_t steps, int64_t D) {
    int64_t row_warps = ceil_div(D, CEMA_CHANNELS) * (CEMA_THREADS / WARP_SIZE);
    int64_t rows = (int64_t)context->num_sms * CEMA_WARPS_PER_SM / row_warps;
    int64_t wanted = rows / B > 1 ? rows / B : 1;
    int64_t length = ceil_div(ceil_div(steps, wanted), CEMA_STEPS) * CEMA_STEPS;
    return CemaSegments{ceil_div(steps, length), length, rows > B ? rows : B};
}

/* Where a thread stands, and the segment of its block. */
struct CemaPlace {
    int channel, lane, d; /* channel of the block, lane of the channel, channel of the model */
    int b, segment, begin, end;
    int64_t row; /* of (segment, b) */
    __device__ CemaPlace(int segment_here, int length, int steps) {
        channel = (int)threadIdx.x / CEMA_LANES, lane = (int)threadIdx.x % CEMA_LANES;
        d = (int)blockIdx.x * CEMA_CHANNELS + channel, b = (int)blockIdx.z, segment = segment_here;
        begin = segment * length, end = min(begin + length, steps);
        row = (int64_t)segment * gridDim.z + b;
    }
};

/* A thread moves two channels and four steps of a tile between global and shared memory. `paired`: the two
 * channels may be read at once; otherwise, D is odd or an address is, they are read one by one. */
template <typename T> struct CemaShare { Packed<T, 2> pair[4]; };
struct CemaMover {
    int column, step, d;
    __device__ CemaMover() {
        column = 2 * ((int)threadIdx.x % (CEMA_CHANNELS / 2));
        step = 4 * ((int)threadIdx.x / (CEMA_CHANNELS / 2));
        d = (int)blockIdx.x * CEMA_CHANNELS + column;
    }
};
static_assert(CEMA_STEPS == 4 * CEMA_THREADS / (CEMA_CHANNELS / 2), "the threads cover a tile");

/* Outside the tensor: zero. */
template <typename T>
__device__ inline void cema_fetch(CemaShare<T> &held, const T *x, const CemaMover &mover, int b, int first,
                                  int steps, int D, bool paired) {
    int t = first + mover.step;
    const T *from = x + ((int64_t)b * steps + t) * D + mover.d;
#pragma unroll
    for (int k = 0; k < 4; k++, from += D) {
        held.pair[k].v[0] = held.pair[k].v[1] = from_float<T>(0.0f);
        if (t + k >= steps || mover.d >= D) continue;
        if (paired)
            held.pair[k] = *reinterpret_cast<const Packed<T, 2> *>(from);
        else {
            held.pair[k].v[0] = from[0];
            if (mover.d + 1 < D) held.pair[k].v[1] = from[1];
        }
    }
}

template <typename T>
__device__ inline void cema_put(float (*tile)[CEMA_PITCH], const CemaShare<T> &held,
                                const CemaMover &mover) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float value[4];
#pragma unroll
        for (int k = 0; k < 4; k++) value[k] = to_float(held.pair[k].v[i]);
        store<4>(&tile[mover.column + i][mover.step], value);
    }
}

/* y (+)= the tile */
template <typename T>
__device__ inline void cema_write(T *y, bool accumulate, const float (*tile)[CEMA_PITCH],
                                  const CemaMover &mover, int b, int first, int steps, int D, bool paired) {
    float value[2][4], pair[2];
    load<4>(value[0], &tile[mover.column][mover.step]);
    load<4>(value[1], &tile[mover.column + 1][mover.step]);
    CemaShare<T> before;
    if (accumulate) cema_fetch(before, (const T *)y, mover, b, first, steps, D, paired);
    int t = first + mover.step;
    T *to = y + ((int64_t)b * steps + t) * D + mover.d;
#pragma unroll
    for (int k = 0; k < 4; k++, to += D) {
        if (t + k >= steps || mover.d >= D) continue;
#pragma unroll
        for (int i = 0; i < 2; i++)
            pair[i] = value[i][k] + (accumulate ? to_float(before.pair[k].v[i]) : 0.0f);
        if (paired)
            store<2>(to, pair);
        else {
            to[0] = from_float<T>(pair[0]);
            if (mover.d + 1 < D) to[1] = from_float<T>(pair[1]);
        }
    }
}

/* Eight steps of a channel in the order in which a scan meets them. */
template <bool BACKWARD> __device__ inline void cema_group(float (&x)[CEMA_LANES], const float *from) {
    float low[4], high[4];
    load<4>(low, from), load<4>(high, from + 4);
#pragma unroll
    for (int i = 0; i < 4; i++)
        x[BACKWARD ? 7 - i : i] = low[i], x[BACKWARD ? 3 - i : 4 + i] = high[i];
}

template <int R> struct CemaStates { float re[R], im[R]; };
/* (D,N) coefficients of a lane's states; what lies beyond N or D is `otherwise`. */
template <int R>
__device__ inline void cema_load(float (&to)[R], const float *from, int d, int first, int D, int N,
                                 float otherwise) {
#pragma unroll
    for (int r = 0; r < R; r++)
        to[r] = d < D && first + r < N ? from[(int64_t)d * N + first + r] : otherwise;
}

struct CemaComplex { double re, im; };
__device__ inline CemaComplex operator*(CemaComplex a, CemaComplex b) {
    return CemaComplex{a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
__device__ inline CemaComplex cema_power(CemaComplex q, int n) {
    CemaComplex power = {1, 0};
    for (; n > 0; n /= 2, q = q * q)
        if (n % 2) power = power * q;
    return power;
}

/* What a lane knows of its states: p, and q^(m+1) at power[m]. */
template <int R> struct CemaLane {
    float p[R];
    CemaStates<R> power[CEMA_LANES];
    __device__ CemaLane(const CemaCoefficients &coef, int d, int first_state, int D, int N) {
        cema_load<R>(p, coef.p, d, first_state, D, N, 1.0f);
        cema_load<R>(power[0].re, coef.q_re, d, first_state, D, N, 0.0f);
        cema_load<R>(power[0].im, coef.q_im, d, first_state, D, N, 0.0f);
#pragma unroll
        for (int r = 0; r < R; r++) {
            CemaComplex q = {power[0].re[r], power[0].im[r]}, now = q;
#pragma unroll
            for (int m = 1; m < CEMA_LANES; m++) {
                now = now * q;
                power[m].re[r] = (float)now.re, power[m].im[r] = (float)now.im;
            }
        }
    }
};

/* c p, with 0 beyond N and D */
template <int R>
__device__ inline CemaStates<R> cema_output_factor(const CemaCoefficients &coef, const float (&p)[R], int d,
                                                   int first_state, int D, int N) {
    CemaStates<R> pc;
    cema_load<R>(pc.re, coef.c_re, d, first_state, D, N, 0.0f);
    cema_load<R>(pc.im, coef.c_im, d, first_state, D, N, 0.0f);
#pragma unroll
    for (int r = 0; r < R; r++) pc.re[r] *= p[r], pc.im[r] *= p[r];
    return pc;
}

/* taps[i] = k_(lane - i), what input i of a group adds to the lane's own step; 0 for i > lane. */
template <int R>
__device__ inline void cema_taps(float (&taps)[CEMA_LANES], const CemaLane<R> &lane, const CemaStates<R> &pc,
                                 float omega, int own) {
#pragma unroll
    for (int i = 0; i < CEMA_LANES; i++) taps[i] = 0;
#pragma unroll
    for (int lag = 0; lag < CEMA_LANES; lag++) {
        float k = 0;
#pragma unroll
        for (int r = 0; r < R; r++)
            k += lag == 0 ? pc.re[r]
                          : pc.re[r] * lane.power[lag ? lag - 1 : 0].re[r] -
                                pc.im[r] * lane.power[lag ? lag - 1 : 0].im[r];
        k = lanes_sum(k, CEMA_LANES) + (lag == 0 ? omega : 0.0f);
#pragma unroll
        for (int i = 0; i < CEMA_LANES; i++)
            if (own - i == lag) taps[i] = k;
    }
}

/* s = q^8 s + sum_m q^(7-m) x_m */
template <int R>
__device__ inline void cema_advance(CemaStates<R> &s, const CemaLane<R> &lane,
                                    const float (&x)[CEMA_LANES]) {
    const CemaStates<R>(&power)[CEMA_LANES] = lane.power;
#pragma unroll
    for (int r = 0; r < R; r++) {
        float re = x[7], im = power[0].im[r] * x[6];
        re = fmaf(power[0].re[r], x[6], re);
#pragma unroll
        for (int m = 5; m >= 0; m--) {
            re = fmaf(power[6 - m].re[r], x[m], re);
            im = fmaf(power[6 - m].im[r], x[m], im);
        }
        re = fmaf(-power[7].im[r], s.im[r], fmaf(power[7].re[r], s.re[r], re));
        s.im[r] = fmaf(power[7].im[r], s.re[r], fmaf(power[7].re[r], s.im[r], im));
        s.re[r] = re;
    }
}

/* part[m] = the lane's share of Re(q^(m+1) (pc s)) */
template <int R>
__device__ inline void cema_outputs(float (&part)[CEMA_LANES], const CemaLane<R> &lane,
                                    const CemaStates<R> &pc, const CemaStates<R> &s) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        float re = pc.re[r] * s.re[r] - pc.im[r] * s.im[r], im = pc.re[r] * s.im[r] + pc.im[r] * s.re[r];
#pragma unroll
        for (int m = 0; m < CEMA_LANES; m++)
            part[m] = fmaf(lane.power[m].re[r], re,
                           fmaf(-lane.power[m].im[r], im, r == 0 ? 0.0f : part[m]));
    }
}

/* z = q z + add */
template <int R>
__device__ inline void cema_turn(CemaStates<R> &z, const CemaStates<R> &q, const CemaStates<R> &add) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        float re = fmaf(-q.im[r], z.im[r], fmaf(q.re[r], z.re[r], add.re[r]));
        z.im[r] = fmaf(q.im[r], z.re[r], fmaf(q.re[r], z.im[r], add.im[r]));
        z.re[r] = re;
    }
}
template <int R> __device__ inline void cema_turn(CemaStates<R> &z, const CemaStates<R> &q, float add) {
#pragma unroll
    for (int r = 0; r < R; r++) {
        float re = fmaf(-q.im[r], z.im[r], fmaf(q.re[r], z.re[r], add));
        z.im[r] = fmaf(q.im[r], z.re[r], q.re[r] * z.im[r]);
        z.re[r] = re;
    }
}

/* kappa and nu over eight steps back:  kappa = q^8 kappa + 8 q^7 nu + sum_m (7-m) q^(6-m) dy_m */
template <int R>
__device__ inline void cema_advance_back(CemaStates<R> &kappa, CemaStates<R> &nu, const CemaLane<R> &lane,
                                         const float (&dy)[CEMA_LANES]) {
    const CemaStates<R>(&power)[CEMA_LANES] = lane.power;
    float weighted[CEMA_LANES - 1];
#pragma unroll
    for (int m = 0; m < CEMA_LANES - 1; m++) weighted[m] = (float)(7 - m) * dy[m];
#pragma unroll
    for (int r = 0; r < R; r++) {
        float re = weighted[6], im = power[0].im[r] * weighted[5], nu_re = 8 * nu.re[r],
              nu_im = 8 * nu.im[r];
        re = fmaf(power[0].re[r], weighted[5], re);
#pragma unroll
        for (int m = 4; m >= 0; m--) {
            re = fmaf(power[5 - m].re[r], weighted[m], re);
            im = fmaf(power[5 - m].im[r], weighted[m], im);
        }
        re = fmaf(-power[6].im[r], nu_im, fmaf(power[6].re[r], nu_re, re));
        im = fmaf(power[6].im[r], nu_re, fmaf(power[6].re[r], nu_im, im));
        re = fmaf(-power[7].im[r], kappa.im[r], fmaf(power[7].re[r], kappa.re[r], re));
        kappa.im[r] = fmaf(power[7].im[r], kappa.re[r], fmaf(power[7].re[r], kappa.im[r], im));
        kappa.re[r] = re;
    }
    cema_advance<R>(nu, lane, dy);
}

/* computes: ends[row, d, k] = the state that a segment ends with, from zero: h / p, or nu and kappa
 * launch:   grid (ceil(D / 32), segments - 1, B), block 256: 8 lanes own a channel of a segment; the last
 *           segment, backward the first, is left out
 * traffic:  B T D sizeof(T) bytes; arithmetic bounds it: 2.5 N fused multiply-adds an element, backward 5 N
 * needs:    N <= 8 R; `length` a multiple of 64
 * numerics: float; fixed order: deterministic */
template <typename T, int R, bool BACKWARD>
__global__ void __launch_bounds__(CEMA_THREADS, R <= 2 ? 2 : 1)
    cema_ends_kernel(float *ends, const T *x, CemaCoefficients coef, int length, int steps, int D, int N,
                     bool paired) {
    alignas(16) __shared__ float tile[2][CEMA_CHANNELS][CEMA_PITCH];
    CemaPlace place((int)blockIdx.y + (BACKWARD ? 1 : 0), length, steps);
    CemaMover mover;
    int first_state = place.lane * R, tiles = (place.end - place.begin + CEMA_STEPS - 1) / CEMA_STEPS;
    CemaLane<R> lane(coef, place.d, first_state, D, N);
    CemaStates<R> state = {}, slope = {};
    CemaShare<T> held;
    int first = place.begin + (BACKWARD ? (tiles - 1) * CEMA_STEPS : 0);
    int stride = BACKWARD ? -CEMA_STEPS : CEMA_STEPS;
    cema_fetch(held, x, mover, place.b, first, steps, D, paired);
    for (int i = 0; i < tiles; i++, first += stride) {
        cema_put(tile[i % 2], held, mover);
        __syncthreads(); // the tile is whole; the other one has been read by all
        if (i + 1 < tiles) cema_fetch(held, x, mover, place.b, first + stride, steps, D, paired);
#pragma unroll 2
        for (int s = 0; s < CEMA_STEPS; s += CEMA_LANES) {
            float value[CEMA_LANES];
            cema_group<BACKWARD>(value,
                                 &tile[i % 2][place.channel][BACKWARD ? CEMA_STEPS - CEMA_LANES - s : s]);
            if constexpr (BACKWARD)
                cema_advance_back<R>(slope, state, lane, value);
            else
                cema_advance<R>(state, lane, value);
        }
    }
    if (place.d >= D) return;
    constexpr int WIDTH = BACKWARD ? 4 : 2;
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (first_state + r >= N) continue;
        float *end = ends + ((place.row * D + place.d) * N + first_state + r) * WIDTH;
        end[0] = state.re[r], end[1] = state.im[r];
        if constexpr (BACKWARD) end[2] = slope.re[r], end[3] = slope.im[r];
    }
}

/* h after one more step of input u */
template <int R>
__device__ inline float cema_step(CemaStates<R> &h, const CemaStates<R> &q, const CemaStates<R> &pc,
                                  float u) {
    float sum = 0;
    cema_turn<R>(h, q, u);
#pragma unroll
    for (int r = 0; r < R; r++) sum += pc.re[r] * h.re[r] - pc.im[r] * h.im[r];
    return sum;
}

/* computes: y_t = Re(sum c h_t) + omega u_t, h_t = q h_{t-1} + p u_t, and the last h
 * launch:   grid (ceil(D / 32), segments, B), block 256: 8 lanes own a channel of a segment
 * traffic:  2 B T D sizeof(T) bytes; arithmetic bounds it: 4.8 N fused multiply-adds an element
 * needs:    N <= 8 R; h_in NULL is zero, h_out NULL is not wanted; they may be the same memory unless there
 *           are several segments; ends from cema_ends_kernel, NULL if there is one segment
 * numerics: float, powers of q in double; fixed order: deterministic */
template <typename T, int R>
__global__ void __launch_bounds__(CEMA_THREADS, R <= 2 ? 2 : 1)
    cema_forward_kernel(T *y, float *h_out, const T *u, const float *h_in, const float *ends,
                        CemaCoefficients coef, const float *omega, int length, int steps, int D, int N,
                        bool paired) {
    alignas(16) __shared__ float tile[2][CEMA_CHANNELS][CEMA_PITCH];
    CemaPlace place((int)blockIdx.y, length, steps);
    CemaMover mover;
    CemaShare<T> held;
    cema_fetch(held, u, mover, place.b, place.begin, steps, D, paired);
    int d = place.d, first_state = place.lane * R;
    CemaLane<R> lane(coef, d, first_state, D, N);
#pragma unroll
    for (int r = 0; r < R; r++) lane.p[r] = fmaxf(lane.p[r], CEMA_SMALLEST_P);
    CemaStates<R> pc = cema_output_factor<R>(coef, lane.p, d, first_state, D, N), h;
    float taps[CEMA_LANES], omega_d = d < D ? omega[d] : 0.0f;
    cema_taps<R>(taps, lane, pc, omega_d, place.lane);
    int64_t state = (((int64_t)place.b * D + d) * N + first_state) * 2;
#pragma unroll
    for (int r = 0; r < R; r++) {
        bool real = d < D && first_state + r < N;
        h.re[r] = real && h_in ? h_in[state + 2 * r] / lane.p[r] : 0.0f;
        h.im[r] = real && h_in ? h_in[state + 2 * r + 1] / lane.p[r] : 0.0f;
        if (!real || place.segment == 0) continue;
        CemaComplex now = {h.re[r], h.im[r]}, q = {lane.power[0].re[r], lane.power[0].im[r]};
        CemaComplex power = cema_power(q, length);
        for (int i = 0; i < place.segment; i++) {
            const float *end =
                ends + ((((int64_t)i * gridDim.z + place.b) * D + d) * N + first_state + r) * 2;
            now = power * now;
            now.re += end[0], now.im += end[1];
        }
        h.re[r] = (float)now.re, h.im[r] = (float)now.im;
    }
    for (int first = place.begin, buffer = 0; first < place.end; first += CEMA_STEPS, buffer ^= 1) {
        float(*now)[CEMA_PITCH] = tile[buffer];
        cema_put(now, held, mover);
        __syncthreads(); // the tile is whole
        if (first + CEMA_STEPS < place.end)
            cema_fetch(held, u, mover, place.b, first + CEMA_STEPS, steps, D, paired);
        int count = min((int)CEMA_STEPS, place.end - first), s = 0;
#pragma unroll 2
        for (; s + CEMA_LANES <= count; s += CEMA_LANES) {
            float value[CEMA_LANES], part[CEMA_LANES];
            cema_group<false>(value, &now[place.channel][s]);
            cema_outputs<R>(part, lane, pc, h);
            cema_advance<R>(h, lane, value);
            float total = transpose_sum(part, place.lane);
#pragma unroll
            for (int i = 0; i < CEMA_LANES; i++) total = fmaf(taps[i], value[i], total);
            __syncwarp(); // all lanes of the channel have read these steps: the outputs may take their place
            now[place.channel][s + place.lane] = total;
        }
        if (s < count) {
            /* Past the end the state must stay as it is: the last steps one by one. */
            float part[CEMA_LANES];
#pragma unroll
            for (int j = 0; j < CEMA_LANES; j++)
                part[j] =
                    s + j < count ? cema_step<R>(h, lane.power[0], pc, now[place.channel][s + j]) : 0.0f;
            float total = transpose_sum(part, place.lane);
            __syncwarp(); // as above
            float *own = &now[place.channel][s + place.lane];
            *own = fmaf(omega_d, *own, total);
        }
        __syncthreads(); // the outputs are whole
        cema_write(y, false, now, mover, place.b, first, steps, D, paired);
    }
    if (!h_out || d >= D || place.end < steps) return;
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (first_state + r >= N) continue;
        h_out[state + 2 * r] = h.re[r] * lane.p[r];
        h_out[state + 2 * r + 1] = h.im[r] * lane.p[r];
    }
}

/* Picks R for N. Calls it as f(R). */
#define WITH_CEMA_STATES(N, f)                                                                              \
    do {                                                                                                    \
        REQUIRE((N) <= CEMA_MAX_STATES);                                                                    \
        if ((N) > 32)                                                                                       \
            f(8);                                                                                           \
        else if ((N) > 16)                                                                                  \
            f(4);                                                                                           \
        else if ((N) > 8)                                                                                   \
            f(2);                                                                                           \
        else                                                                                                \
            f(1);                                                                                           \
    } while (0)

/* May the two channels of a mover be read at once? Absent (null) pointers do not object. */
template <typename T, typename... P> static bool cema_pairs(int64_t D, const P *...pointers) {
    return D % 2 == 0 && ((uintptr_t)pointers | ...) % (2 * sizeof(T)) == 0;
}

/* y, u (B,T,D); h_out, h_in (B,D,N,2) float; omega (D). */
template <typename T>
static void cema_forward(Context *context, T *y, float *h_out, const T *u, const float *h_in,
                         CemaCoefficients coef, const float *omega, int64_t B, int64_t steps, int64_t D,
                         int64_t N) {
    ScratchScope scope(context);
    CemaSegments segments = cema_segments(context, B, steps, D);
    bool paired = cema_pairs<T>(D, y, u), several = segments.count > 1;
    unsigned columns = blocks_for(D, CEMA_CHANNELS), rows = (unsigned)B, count = (unsigned)segments.count;
    float *ends = take<float>(context, segments.rows * D * N * 2);
    /* The first segment's blocks read h_in when the last one's may have written h_out already. */
    float *other = take<float>(context, B * D * N * 2);
    float *last = several && h_out && h_out == h_in ? other : h_out;
#define CEMA_FORWARD(R)                                                                                     \
    do {                                                                                                    \
        if (several)                                                                                        \
            LAUNCH((cema_ends_kernel<T, R, false>), dim3(columns, count - 1, rows), CEMA_THREADS, context,  \
                   ends, u, coef, (int)segments.length, (int)steps, (int)D, (int)N, paired);                \
        LAUNCH((cema_forward_kernel<T, R>), dim3(columns, count, rows), CEMA_THREADS, context, y, last, u,  \
               h_in, several ? ends : nullptr, coef, omega, (int)segments.length, (int)steps, (int)D,       \
               (int)N, paired);                                                                             \
    } while (0)
    WITH_CEMA_STATES(N, CEMA_FORWARD);
#undef CEMA_FORWARD
    if (last != h_out) copy(context, h_out, last, (size_t)(B * D * N * 2) * sizeof(float));
}

/* The gradient of the outgoing state: rho and sigma, and the sums of u Re rho and u sigma. */
template <int R> struct CemaOutgoing {
    CemaStates<R> rho, sigma, u_sigma;
    float u_rho[R];
};

/* Step T-1 has rho = conj G itself; `turn` is for the steps before it. Returns the lane's part of p Re(sum
 * rho). */
template <int R>
__device__ inline float cema_outgoing_step(CemaOutgoing<R> &s, const CemaStates<R> &q, const float (&p)[R],
                                           float u, bool turn) {
    float sum = 0;
    if (turn) {
        cema_turn<R>(s.sigma, q, s.rho);
        cema_turn<R>(s.rho, q, 0.0f);
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
        s.u_rho[r] = fmaf(u, s.rho.re[r], s.u_rho[r]);
        s.u_sigma.re[r] = fmaf(u, s.sigma.re[r], s.u_sigma.re[r]);
        s.u_sigma.im[r] = fmaf(u, s.sigma.im[r], s.u_sigma.im[r]);
        sum = fmaf(p[r], s.rho.re[r], sum);
    }
    return sum;
}

/* A lane's running values of the backward: nu, kappa, the sums of u nu and u kappa but for what meets inside
 * groups; and pairs[i], the sum of u of the lane's own step times dy of step i. */
template <int R> struct CemaBackward {
    CemaStates<R> nu, kappa, u_nu, u_kappa;
    float pairs[CEMA_LANES];
};

/* The sums of u nu and u kappa take what eight steps' u have to do with the nu and kappa before them. */
template <int R>
__device__ inline void cema_collect(CemaBackward<R> &s, const CemaLane<R> &lane,
                                    const float (&u)[CEMA_LANES]) {
    const CemaStates<R>(&power)[CEMA_LANES] = lane.power;
    float weighted[CEMA_LANES];
#pragma unroll
    for (int m = 0; m < CEMA_LANES; m++) weighted[m] = (float)(m + 1) * u[m];
#pragma unroll
    for (int r = 0; r < R; r++) {
        float re = 0, im = 0, slope_re = weighted[0], slope_im = 0; // V and V'
#pragma unroll
        for (int m = 0; m < CEMA_LANES; m++) {
            re = fmaf(power[m].re[r], u[m], re);
            im = fmaf(power[m].im[r], u[m], im);
            if (m == 0) continue;
            slope_re = fmaf(power[m ? m - 1 : 0].re[r], weighted[m], slope_re);
            slope_im = fmaf(power[m ? m - 1 : 0].im[r], weighted[m], slope_im);
        }
        float nu_re = s.nu.re[r], nu_im = s.nu.im[r], kappa_re = s.kappa.re[r], kappa_im = s.kappa.im[r];
        s.u_nu.re[r] = fmaf(nu_re, re, fmaf(-nu_im, im, s.u_nu.re[r]));
        s.u_nu.im[r] = fmaf(nu_re, im, fmaf(nu_im, re, s.u_nu.im[r]));
        s.u_kappa.re[r] = fmaf(kappa_re, re, fmaf(-kappa_im, im, s.u_kappa.re[r]));
        s.u_kappa.im[r] = fmaf(kappa_re, im, fmaf(kappa_im, re, s.u_kappa.im[r]));
        s.u_kappa.re[r] = fmaf(nu_re, slope_re, fmaf(-nu_im, slope_im, s.u_kappa.re[r]));
        s.u_kappa.im[r] = fmaf(nu_re, slope_im, fmaf(nu_im, slope_re, s.u_kappa.im[r]));
    }
}

/* Adds what met inside groups, sum_l r_l q^l and its derivative; returns r_0. */
template <int R>
__device__ inline float cema_collect_pairs(CemaBackward<R> &s, const CemaLane<R> &lane, int own) {
    float r_0 = 0;
#pragma unroll
    for (int lag = 0; lag < CEMA_LANES; lag++) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < CEMA_LANES; i++)
            if (own - i == lag) sum = s.pairs[i];
        sum = lanes_sum(sum, CEMA_LANES);
        if (lag == 0) r_0 = sum;
#pragma unroll
        for (int r = 0; r < R; r++) {
            /* q^lag, and lag q^(lag-1) */
            float re = lag > 0 ? lane.power[lag > 0 ? lag - 1 : 0].re[r] : 1.0f,
                  im = lag > 0 ? lane.power[lag > 0 ? lag - 1 : 0].im[r] : 0.0f,
                  slope_re = lag > 1 ? lane.power[lag > 1 ? lag - 2 : 0].re[r] : (float)lag,
                  slope_im = lag > 1 ? lane.power[lag > 1 ? lag - 2 : 0].im[r] : 0.0f;
            float factor = lag > 1 ? (float)lag : 1.0f;
            s.u_nu.re[r] = fmaf(sum, re, s.u_nu.re[r]);
            s.u_nu.im[r] = fmaf(sum, im, s.u_nu.im[r]);
            s.u_kappa.re[r] = fmaf(factor * sum, slope_re, s.u_kappa.re[r]);
            s.u_kappa.im[r] = fmaf(factor * sum, slope_im, s.u_kappa.im[r]);
        }
    }
    return r_0;
}

/* nu and kappa after all segments that come later in time:  kappa = q^n kappa + n q^(n-1) nu + end */
template <int R>
__device__ inline void cema_begin_back(CemaBackward<R> &s, const CemaLane<R> &lane, const float *ends,
                                       const CemaPlace &place, int length, int first_state, int D, int N) {
    int segments = (int)gridDim.y;
    if (place.segment == segments - 1 || place.d >= D) return;
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (first_state + r >= N) continue;
        CemaComplex nu = {0, 0}, kappa = {0, 0}, q = {lane.power[0].re[r], lane.power[0].im[r]};
        CemaComplex before = cema_power(q, length - 1), power = before * q;
        for (int i = segments - 1; i > place.segment; i--) {
            const float *end =
                ends + ((((int64_t)i * gridDim.z + place.b) * D + place.d) * N + first_state + r) * 4;
            CemaComplex turned = power * kappa, slope = before * nu;
            kappa.re = turned.re + (double)length * slope.re + end[2];
            kappa.im = turned.im + (double)length * slope.im + end[3];
            nu = power * nu;
            nu.re += end[0], nu.im += end[1];
        }
        s.nu.re[r] = (float)nu.re, s.nu.im[r] = (float)nu.im;
        s.kappa.re[r] = (float)kappa.re, s.kappa.im[r] = (float)kappa.im;
    }
}

/* Where a backward's sums go: gradients of p, q and c before the sum over rows, each (segments,B,D,N), and
 * of omega, (segments,B,D). */
struct CemaSums {
    float *dp, *dq_re, *dq_im, *dc_re, *dc_im, *domega;
};

/* computes: du_t (+)= p Re(sum c nu_t + rho_t) + omega dy_t, dh_in, and each segment's gradients of p, q, c
 *           and omega
 * launch:   grid (ceil(D / 32), segments, B), block 256: 8 lanes own a channel of a segment
 * traffic:  3 B T D sizeof(T) bytes, 4 if du is added to; arithmetic bounds it: 12.6 N fused multiply-adds
 *           an element
 * needs:    N <= 8 R; OUTGOING if and only if dh_out is there, and then one segment; du may be dy unless it
 *           is added to; ends from cema_ends_kernel if there are several segments
 * numerics: float, powers of q in double; fixed order: deterministic */
template <typename T, int R, bool OUTGOING>
__global__ void __launch_bounds__(CEMA_THREADS, R <= 2 && !OUTGOING ? 2 : 1)
    cema_backward_kernel(T *du, bool accumulate, float *dh_in, CemaSums sums, const T *dy,
                         const float *dh_out, const T *u, const float *h_in, const float *ends,
                         CemaCoefficients coef, const float *omega, int length, int steps, int D, int N,
                         bool paired) {
    alignas(16) __shared__ float tile_u[CEMA_CHANNELS][CEMA_PITCH], tile_dy[CEMA_CHANNELS][CEMA_PITCH];
    CemaPlace place((int)blockIdx.y, length, steps);
    CemaMover mover;
    CemaShare<T> held_u, held_dy;
    int last = place.begin + (place.end - 1 - place.begin) / CEMA_STEPS * CEMA_STEPS;
    cema_fetch(held_u, u, mover, place.b, last, steps, D, paired);
    cema_fetch(held_dy, dy, mover, place.b, last, steps, D, paired);
    int d = place.d, first_state = place.lane * R;
    CemaLane<R> lane(coef, d, first_state, D, N);
    CemaStates<R> pc = cema_output_factor<R>(coef, lane.p, d, first_state, D, N);
    CemaBackward<R> s = {};
    CemaOutgoing<OUTGOING ? R : 1> out = {};
    float taps[CEMA_LANES];
    cema_taps<R>(taps, lane, pc, d < D ? omega[d] : 0.0f, place.lane);
    cema_begin_back<R>(s, lane, ends, place, length, first_state, D, N);
    int64_t state = ((int64_t)place.b * D + d) * N + first_state; // (B,D,N); a complex number is two of them
    if constexpr (OUTGOING) {
#pragma unroll
        for (int r = 0; r < R; r++) {
            bool real = d < D && first_state + r < N;
            out.rho.re[r] = real ? dh_out[(state + r) * 2] : 0.0f;
            out.rho.im[r] = real ? -dh_out[(state + r) * 2 + 1] : 0.0f;
        }
    }
    for (int first = last; first >= place.begin; first -= CEMA_STEPS) {
        cema_put(tile_u, held_u, mover);
        cema_put(tile_dy, held_dy, mover);
        __syncthreads(); // the tiles are whole
        if (first > place.begin) {
            cema_fetch(held_u, u, mover, place.b, first - CEMA_STEPS, steps, D, paired);
            cema_fetch(held_dy, dy, mover, place.b, first - CEMA_STEPS, steps, D, paired);
        }
        /* Steps past the end have dy = 0 and come first, when nu and kappa are still zero: they change
         * nothing. */
        for (int base = CEMA_STEPS - CEMA_LANES; base >= 0; base -= CEMA_LANES) {
            float u_now[CEMA_LANES], dy_now[CEMA_LANES], part[CEMA_LANES];
            int own = base + CEMA_LANES - 1 - place.lane; // step m of a group is its m-th from the end
            cema_group<true>(u_now, &tile_u[place.channel][base]);
            cema_group<true>(dy_now, &tile_dy[place.channel][base]);
            cema_outputs<R>(part, lane, pc, s.nu);
            cema_collect<R>(s, lane, u_now);
            cema_advance_back<R>(s.kappa, s.nu, lane, dy_now);
            if constexpr (OUTGOING) {
#pragma unroll
                for (int m = 0; m < CEMA_LANES; m++) {
                    int t = first + base + CEMA_LANES - 1 - m;
                    if (t < steps)
                        part[m] += cema_outgoing_step<R>(out, lane.power[0], lane.p, u_now[m],
                                                         t < steps - 1);
                }
            }
            float total = transpose_sum(part, place.lane), u_own = tile_u[place.channel][own];
#pragma unroll
            for (int i = 0; i < CEMA_LANES; i++) {
                total = fmaf(taps[i], dy_now[i], total);
                s.pairs[i] = fmaf(u_own, dy_now[i], s.pairs[i]);
            }
            __syncwarp(); // all lanes of the channel have read these steps: the outputs may take their place
            tile_dy[place.channel][own] = total;
        }
        __syncthreads(); // the outputs are whole
        cema_write(du, accumulate, tile_dy, mover, place.b, first, steps, D, paired);
        __syncthreads(); // and written: the next tiles may take their place
    }
    float domega = cema_collect_pairs<R>(s, lane, place.lane);
    /* One more step back, with no dy: what an input at time -1, the incoming state, would meet. */
    cema_turn<R>(s.kappa, lane.power[0], s.nu);
    cema_turn<R>(s.nu, lane.power[0], 0.0f);
    if constexpr (OUTGOING) {
        cema_turn<R>(out.sigma, lane.power[0], out.rho);
        cema_turn<R>(out.rho, lane.power[0], 0.0f);
    }
    if (d >= D) return; // no shuffle comes after this
    if (place.lane == 0) sums.domega[place.row * D + d] = domega;
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (first_state + r >= N) continue;
        int64_t at = state + r, coefficient = (int64_t)d * N + first_state + r;
        bool meets = h_in && place.segment == 0;
        float p = lane.p[r], c_re = coef.c_re[coefficient], c_im = coef.c_im[coefficient];
        float h_re = meets ? h_in[at * 2] : 0.0f, h_im = meets ? h_in[at * 2 + 1] : 0.0f;
        float dc_re = p * s.u_nu.re[r] + h_re * s.nu.re[r] - h_im * s.nu.im[r];
        float dc_im = p * s.u_nu.im[r] + h_re * s.nu.im[r] + h_im * s.nu.re[r];
        float k_re = p * s.u_kappa.re[r] + h_re * s.kappa.re[r] - h_im * s.kappa.im[r];
        float k_im = p * s.u_kappa.im[r] + h_re * s.kappa.im[r] + h_im * s.kappa.re[r];
        float dq_re = c_re * k_re - c_im * k_im, dq_im = c_re * k_im + c_im * k_re;
        float dp = c_re * s.u_nu.re[r] - c_im * s.u_nu.im[r];
        float dh_re = c_re * s.nu.re[r] - c_im * s.nu.im[r], dh_im = c_re * s.nu.im[r] + c_im * s.nu.re[r];
        if constexpr (OUTGOING) {
            dq_re += p * out.u_sigma.re[r] + h_re * out.sigma.re[r] - h_im * out.sigma.im[r];
            dq_im += p * out.u_sigma.im[r] + h_re * out.sigma.im[r] + h_im * out.sigma.re[r];
            dp += out.u_rho[r];
            dh_re += out.rho.re[r], dh_im += out.rho.im[r];
        }
        int64_t sum = (place.row * D + d) * N + first_state + r;
        sums.dp[sum] = dp;
        sums.dq_re[sum] = dq_re, sums.dq_im[sum] = -dq_im;
        sums.dc_re[sum] = dc_re, sums.dc_im[sum] = -dc_im;
        if (dh_in && place.segment == 0) dh_in[at * 2] = dh_re, dh_in[at * 2 + 1] = -dh_im;
    }
}

/* With a = sigmoid(alpha), s = sigmoid(delta), phi = k sigmoid(theta) 2 pi / N, q = (1 - a s) exp(i phi):
 *     da = dp - s dr,  ds = -a dr,  dr = dq . (cos phi, sin phi),  dphi = dq . (-q_im, q_re)
 * computes: dalpha, ddelta, dtheta, dgamma, domega += from the sums, over rows (of all segments) and, for
 *           theta, over states
 * launch:   grid ceil(D / channels), block 256: a thread owns a state of a channel, N of them make a channel
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

/* du (B,T,D) written, or added to if `accumulate`; dh_in (NULL: not wanted), dh_out (NULL: zero) as h; the
 * parameters' gradients are added to. */
template <typename T>
static void cema_backward(Context *context, T *du, bool accumulate, float *dh_in, float *dalpha,
                          float *ddelta, float *dtheta, float *dgamma, float *domega, const T *dy,
                          const float *dh_out, const T *u, const float *h_in, CemaCoefficients coef,
                          const float *alpha, const float *delta, const float *theta, const float *omega,
                          int64_t B, int64_t steps, int64_t D, int64_t N) {
    ScratchScope scope(context);
    CemaSegments segments = cema_segments(context, B, steps, D);
    if (dh_out) segments.count = 1, segments.length = ceil_div(steps, CEMA_STEPS) * CEMA_STEPS;
    bool paired = cema_pairs<T>(D, du, dy, u);
    unsigned columns = blocks_for(D, CEMA_CHANNELS), rows = (unsigned)B, count = (unsigned)segments.count;
    int64_t size = segments.rows * D * N;
    float *memory = take<float>(context, NUM_CEMA_SUMS * size + segments.rows * D);
    float *ends = take<float>(context, size * 4);
    CemaSums sums = {
        memory, memory + size, memory + 2 * size, memory + 3 * size, memory + 4 * size, memory + 5 * size};
#define CEMA_BACKWARD(R, OUTGOING)                                                                          \
    LAUNCH((cema_backward_kernel<T, R, OUTGOING>), dim3(columns, count, rows), CEMA_THREADS, context, du,   \
           accumulate, dh_in, sums, dy, dh_out, u, h_in, ends, coef, omega, (int)segments.length,           \
           (int)steps, (int)D, (int)N, paired)
#define CEMA_BACKWARD_OUTGOING(R) CEMA_BACKWARD(R, true)
#define CEMA_BACKWARD_PLAIN(R)                                                                              \
    do {                                                                                                    \
        if (count > 1)                                                                                      \
            LAUNCH((cema_ends_kernel<T, R, true>), dim3(columns, count - 1, rows), CEMA_THREADS, context,   \
                   ends, dy, coef, (int)segments.length, (int)steps, (int)D, (int)N, paired);               \
        CEMA_BACKWARD(R, false);                                                                            \
    } while (0)
    if (dh_out)
        WITH_CEMA_STATES(N, CEMA_BACKWARD_OUTGOING);
    else
        WITH_CEMA_STATES(N, CEMA_BACKWARD_PLAIN);
#undef CEMA_BACKWARD_PLAIN
#undef CEMA_BACKWARD_OUTGOING
#undef CEMA_BACKWARD
    LAUNCH(cema_parameters_kernel, blocks_for(D, 256 / N), 256, context, dalpha, ddelta, dtheta, dgamma,
           domega, sums, alpha, delta, theta, (int)(B * segments.count), (int)D, (int)N);
}

#endif
