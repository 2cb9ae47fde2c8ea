/* cema.cuh - the complex exponential moving average: N complex states a channel, each h_t = q h_{t-1} + p
 * u_t, and y_t = Re(sum_k c_k h_t[k]) + omega u_t with c = gamma / sqrt(N).
 *
 * Parallel over rows, channels and states; sequential in time, with the states in registers. A channel's N
 * states are split over LANES neighbouring lanes of R states each (N <= R LANES), more lanes where there are
 * few channels to share out. Tiles of 32 steps pass through shared memory: global memory is read and written
 * along channels while a lane walks along time; the next tile's loads are under way while one is computed.
 * For LANES steps at a time every lane has a part of each step's output; a butterfly that halves the steps
 * while it adds the lanes leaves lane i with the whole of step i.
 *
 * The kernels keep h / p: then a step costs four fused multiply-adds for the state and two for the output
 * (its factor is c p). p is at least 1e-18 in that division, far below what a float sum could show.
 *
 * Backward without any state of the forward. The output's dependence on the input is symmetric in time: with
 *     nu_t    = dy_t + q nu_{t+1}                 (backward in time, complex)
 *     kappa_t = nu_{t+1} + q kappa_{t+1}          (d nu_t / d q)
 * the loss's linear form sum_t dy_t Re(c h_t) is Re(c sum_t p u_t nu_t), so that
 *     du_t = p Re(c nu_t) + omega dy_t     dc = sum p u nu     dq = c sum p u kappa     dp = Re(c sum u nu)
 * and a state that came in acts like an input p u_{-1} = h_in. A real pair's gradient of Re(z w) by w is (Re
 * z, -Im z). The gradient of the outgoing state, G, adds rho_t = q rho_{t+1}, rho_{T-1} = conj G, and its
 * derivative sigma the same way.
 */
#ifndef CUDA_CEMA_CUH
#define CUDA_CEMA_CUH

#include "common.cuh"

enum {
    CEMA_STEPS = 32,
    CEMA_THREADS = 128,
    CEMA_WARPS_PER_SM = 8,
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

/* Adds part[i] over the LANES lanes of a channel, for LANES steps at once: lane i gets step i. LANES - 1
 * shuffles. */
template <int LANES> __device__ inline float transpose_sum(float (&part)[LANES], int lane) {
#pragma unroll
    for (int width = LANES / 2; width > 0; width /= 2) {
        bool upper = lane & width;
#pragma unroll
        for (int i = 0; i < width; i++) {
            float keep = upper ? part[i + width] : part[i], give = upper ? part[i] : part[i + width];
            part[i] = keep + __shfl_xor_sync(FULL_MASK, give, width);
        }
    }
    return part[0];
}

/* Where a thread stands. THREADS / LANES channels share a block. */
template <int R, int LANES> struct CemaPlace {
    static constexpr int CHANNELS = CEMA_THREADS / LANES, PER_THREAD = CEMA_STEPS / LANES;
    int channel, lane, d, first_d, b; /* channel of the block, lane of the channel, channel of the model */
    __device__ CemaPlace() {
        channel = (int)threadIdx.x / LANES, lane = (int)threadIdx.x % LANES;
        first_d = (int)blockIdx.x * CHANNELS, d = first_d + channel, b = (int)blockIdx.y;
    }
};

/* This thread's share of a tile, on its way from global to shared memory. Outside the tensor: zero. */
template <typename T, int R, int LANES>
__device__ inline void cema_fetch(float (&held)[CEMA_STEPS / LANES], const T *x,
                                  const CemaPlace<R, LANES> &place, int first, int steps, int D) {
    constexpr int CHANNELS = CemaPlace<R, LANES>::CHANNELS;
#pragma unroll
    for (int j = 0; j < CEMA_STEPS / LANES; j++) {
        int i = (int)threadIdx.x + j * CEMA_THREADS, t = first + i / CHANNELS,
            d = place.first_d + i % CHANNELS;
        held[j] = t >= 0 && t < steps && d < D ? to_float(x[((int64_t)place.b * steps + t) * D + d]) : 0.0f;
    }
}

template <int R> struct CemaStates { float re[R], im[R]; };
/* (D,N) or (B,D,N) coefficients of a lane's states; what lies beyond N or D is `otherwise`. */
template <int R>
__device__ inline void cema_load(float (&to)[R], const float *from, int d, int first, int D, int N,
                                 float otherwise) {
#pragma unroll
    for (int r = 0; r < R; r++)
        to[r] = d < D && first + r < N ? from[(int64_t)d * N + first + r] : otherwise;
}

/* One step of every state of a lane: h = q h + u; returns the lane's part of the output. */
template <int R>
__device__ inline float cema_step(CemaStates<R> &h, const CemaStates<R> &q, const CemaStates<R> &c,
                                  float u) {
    float from_re = 0, from_im = 0;
#pragma unroll
    for (int r = 0; r < R; r++) {
        float re = fmaf(-q.im[r], h.im[r], fmaf(q.re[r], h.re[r], u)),
              im = fmaf(q.im[r], h.re[r], q.re[r] * h.im[r]);
        h.re[r] = re, h.im[r] = im;
        from_re = fmaf(c.re[r], re, from_re);
        from_im = fmaf(c.im[r], im, from_im);
    }
    return from_re - from_im;
}

/* computes: y_t = Re(sum c h_t) + omega u_t, h_t = q h_{t-1} + p u_t, and the last h
 * launch:   grid (ceil(D LANES / 128), B), block 128: LANES lanes own a channel of a row for all of time
 * traffic:  2 B T D sizeof(T) bytes; arithmetic bounds it: 6 N fused multiply-adds an element
 * needs:    N <= R LANES; h_in NULL is zero, h_out NULL is not wanted; they may be the same memory
 * numerics: float; the recurrence itself, no powers of q; fixed order: deterministic */
template <typename T, int R, int LANES>
__global__ void __launch_bounds__(CEMA_THREADS)
    cema_forward_kernel(T *y, float *h_out, const T *u, const float *h_in, CemaCoefficients coef,
                        const float *omega, int steps, int D, int N) {
    using Place = CemaPlace<R, LANES>;
    __shared__ float tile[2][CEMA_STEPS][Place::CHANNELS];
    Place place;
    int d = place.d, first_state = place.lane * R;
    CemaStates<R> q, c, h;
    float p[R], held[Place::PER_THREAD], omega_d = d < D ? omega[d] : 0.0f;
    cema_load<R>(p, coef.p, d, first_state, D, N, 1.0f);
    cema_load<R>(q.re, coef.q_re, d, first_state, D, N, 0.0f);
    cema_load<R>(q.im, coef.q_im, d, first_state, D, N, 0.0f);
    cema_load<R>(c.re, coef.c_re, d, first_state, D, N, 0.0f);
    cema_load<R>(c.im, coef.c_im, d, first_state, D, N, 0.0f);
    int64_t state = (((int64_t)place.b * D + d) * N + first_state) * 2;
#pragma unroll
    for (int r = 0; r < R; r++) {
        bool real = h_in && d < D && first_state + r < N;
        p[r] = fmaxf(p[r], CEMA_SMALLEST_P);
        h.re[r] = real ? h_in[state + 2 * r] / p[r] : 0.0f;
        h.im[r] = real ? h_in[state + 2 * r + 1] / p[r] : 0.0f;
        c.re[r] *= p[r], c.im[r] *= p[r];
    }
    cema_fetch<T>(held, u, place, 0, steps, D);
    for (int first = 0, buffer = 0; first < steps; first += CEMA_STEPS, buffer ^= 1) {
        float(*now)[Place::CHANNELS] = tile[buffer];
#pragma unroll
        for (int j = 0; j < Place::PER_THREAD; j++) (&now[0][0])[threadIdx.x + j * CEMA_THREADS] = held[j];
        __syncthreads(); // the tile is whole
        cema_fetch<T>(held, u, place, first + CEMA_STEPS, steps, D);
        int count = min((int)CEMA_STEPS, steps - first);
        for (int s = 0; s < count; s += LANES) {
            float part[LANES];
#pragma unroll
            for (int j = 0; j < LANES; j++) {
                /* Past the end the state must stay as it is. */
                part[j] = s + j < count ? cema_step<R>(h, q, c, now[s + j][place.channel]) : 0.0f;
            }
            float total = transpose_sum<LANES>(part, place.lane);
            __syncwarp(); // all lanes of the channel have read these steps: the outputs may take their place
            float *own = &now[s + place.lane][place.channel];
            *own = fmaf(omega_d, *own, total);
        }
        __syncthreads(); // the outputs are whole
#pragma unroll
        for (int j = 0; j < Place::PER_THREAD; j++) {
            int i = (int)threadIdx.x + j * CEMA_THREADS, t = first + i / Place::CHANNELS;
            int column = place.first_d + i % Place::CHANNELS;
            if (t < steps && column < D)
                y[((int64_t)place.b * steps + t) * D + column] = from_float<T>((&now[0][0])[i]);
        }
    }
    if (!h_out || d >= D) return;
#pragma unroll
    for (int r = 0; r < R; r++)
        if (first_state + r < N)
            h_out[state + 2 * r] = h.re[r] * p[r], h_out[state + 2 * r + 1] = h.im[r] * p[r];
}

/* Picks R and LANES for N and for the number of channels: few lanes a channel need fewer instructions, but
 * all of the device's schedulers want several warps. Calls it as f(R, LANES). */
#define WITH_CEMA_LANES(context, B, D, N, f)                                                                \
    do {                                                                                                    \
        int64_t lanes_wanted = (int64_t)(context)->num_sms * CEMA_WARPS_PER_SM * WARP_SIZE / ((B) * (D));   \
        if ((N) > 32)                                                                                       \
            f(4, 16);                                                                                       \
        else if ((N) > 16)                                                                                  \
            f(2, 16);                                                                                       \
        else if (lanes_wanted <= 2)                                                                         \
            f(8, 2);                                                                                        \
        else if (lanes_wanted <= 4)                                                                         \
            f(4, 4);                                                                                        \
        else if (lanes_wanted <= 8)                                                                         \
            f(2, 8);                                                                                        \
        else                                                                                                \
            f(1, 16);                                                                                       \
    } while (0)

/* y, u (B,T,D); h_out, h_in (B,D,N,2) float; omega (D). */
template <typename T>
static void cema_forward(Context *context, T *y, float *h_out, const T *u, const float *h_in,
                         CemaCoefficients coef, const float *omega, int64_t B, int64_t steps, int64_t D,
                         int64_t N) {
#define CEMA_FORWARD(R, LANES)                                                                              \
    LAUNCH((cema_forward_kernel<T, R, LANES>), dim3(blocks_for(D *LANES, CEMA_THREADS), (unsigned)B),       \
           CEMA_THREADS, context, y, h_out, u, h_in, coef, omega, (int)steps, (int)D, (int)N)
    WITH_CEMA_LANES(context, B, D, N, CEMA_FORWARD);
#undef CEMA_FORWARD
}

/* z = q z + add, complex; add is the new term */
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

/* A lane's running values of the backward: nu, kappa, and the sums of u nu and u kappa. */
template <int R> struct CemaBackward { CemaStates<R> nu, kappa, u_nu, u_kappa; };

/* One step back in time; returns the lane's part of p Re(sum c nu), with pc = p c. */
template <int R>
__device__ inline float cema_step_back(CemaBackward<R> &s, const CemaStates<R> &q, const CemaStates<R> &pc,
                                       float u, float dy) {
    float from_re = 0, from_im = 0;
    cema_turn<R>(s.kappa, q, s.nu);
    cema_turn<R>(s.nu, q, dy);
#pragma unroll
    for (int r = 0; r < R; r++) {
        s.u_nu.re[r] = fmaf(u, s.nu.re[r], s.u_nu.re[r]);
        s.u_nu.im[r] = fmaf(u, s.nu.im[r], s.u_nu.im[r]);
        s.u_kappa.re[r] = fmaf(u, s.kappa.re[r], s.u_kappa.re[r]);
        s.u_kappa.im[r] = fmaf(u, s.kappa.im[r], s.u_kappa.im[r]);
        from_re = fmaf(pc.re[r], s.nu.re[r], from_re);
        from_im = fmaf(pc.im[r], s.nu.im[r], from_im);
    }
    return from_re - from_im;
}

/* The same for the gradient of the outgoing state: rho and sigma, and the sums of u Re rho and u sigma. */
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

/* Where a backward's sums go: gradients of p, q and c before the sum over rows, each (B,D,N), and of omega,
 * (B,D). */
struct CemaSums {
    float *dp, *dq_re, *dq_im, *dc_re, *dc_im, *domega;
};

/* computes: du_t (+)= p Re(sum c nu_t + rho_t) + omega dy_t, dh_in, and each row's gradients of p, q, c and
 * omega
 * launch:   grid (ceil(D LANES / 128), B), block 128: LANES lanes own a channel of a row for all of time
 * traffic:  3 B T D sizeof(T) bytes, 4 if du is added to; arithmetic bounds it: 14 N fused multiply-adds an
 *           element
 * needs:    N <= R LANES; OUTGOING if and only if dh_out is there; du may be dy unless it is added to
 * numerics: float; fixed order: deterministic */
template <typename T, int R, int LANES, bool OUTGOING>
__global__ void __launch_bounds__(CEMA_THREADS)
    cema_backward_kernel(T *du, bool accumulate, float *dh_in, CemaSums sums, const T *dy,
                         const float *dh_out, const T *u, const float *h_in, CemaCoefficients coef,
                         const float *omega, int steps, int D, int N) {
    using Place = CemaPlace<R, LANES>;
    __shared__ float tile_u[2][CEMA_STEPS][Place::CHANNELS], tile_dy[2][CEMA_STEPS][Place::CHANNELS];
    Place place;
    int d = place.d, first_state = place.lane * R;
    CemaStates<R> q, pc;
    CemaBackward<R> s = {};
    CemaOutgoing<OUTGOING ? R : 1> out = {};
    float p[R], held_u[Place::PER_THREAD], held_dy[Place::PER_THREAD], omega_d = d < D ? omega[d] : 0.0f,
                                                                       domega = 0;
    cema_load<R>(p, coef.p, d, first_state, D, N, 0.0f);
    cema_load<R>(q.re, coef.q_re, d, first_state, D, N, 0.0f);
    cema_load<R>(q.im, coef.q_im, d, first_state, D, N, 0.0f);
    cema_load<R>(pc.re, coef.c_re, d, first_state, D, N, 0.0f);
    cema_load<R>(pc.im, coef.c_im, d, first_state, D, N, 0.0f);
    int64_t state = ((int64_t)place.b * D + d) * N + first_state; // (B,D,N); a complex number is two of them
#pragma unroll
    for (int r = 0; r < R; r++) {
        pc.re[r] *= p[r], pc.im[r] *= p[r];
        if constexpr (OUTGOING) {
            bool real = d < D && first_state + r < N;
            out.rho.re[r] = real ? dh_out[(state + r) * 2] : 0.0f;
            out.rho.im[r] = real ? -dh_out[(state + r) * 2 + 1] : 0.0f;
        }
    }
    int last_tile = (steps - 1) / CEMA_STEPS * CEMA_STEPS;
    cema_fetch<T>(held_u, u, place, last_tile, steps, D);
    cema_fetch<T>(held_dy, dy, place, last_tile, steps, D);
    for (int first = last_tile, buffer = 0; first >= 0; first -= CEMA_STEPS, buffer ^= 1) {
        float(*now_u)[Place::CHANNELS] = tile_u[buffer], (*now_dy)[Place::CHANNELS] = tile_dy[buffer];
#pragma unroll
        for (int j = 0; j < Place::PER_THREAD; j++) {
            (&now_u[0][0])[threadIdx.x + j * CEMA_THREADS] = held_u[j];
            (&now_dy[0][0])[threadIdx.x + j * CEMA_THREADS] = held_dy[j];
        }
        __syncthreads(); // the tiles are whole
        cema_fetch<T>(held_u, u, place, first - CEMA_STEPS, steps, D);
        cema_fetch<T>(held_dy, dy, place, first - CEMA_STEPS, steps, D);
        /* Steps past the end have dy = 0 and come first, when nu and kappa are still zero: they change
         * nothing. */
        for (int base = CEMA_STEPS - LANES; base >= 0; base -= LANES) {
            float part[LANES];
#pragma unroll
            for (int j = LANES - 1; j >= 0; j--) {
                float u_t = now_u[base + j][place.channel], dy_t = now_dy[base + j][place.channel];
                part[j] = cema_step_back<R>(s, q, pc, u_t, dy_t);
                if constexpr (OUTGOING) {
                    int t = first + base + j;
                    if (t < steps) part[j] += cema_outgoing_step<R>(out, q, p, u_t, t < steps - 1);
                }
            }
            float total = transpose_sum<LANES>(part, place.lane);
            __syncwarp(); // all lanes of the channel have read these steps: the outputs may take their place
            float *own = &now_dy[base + place.lane][place.channel];
            domega = fmaf(*own, now_u[base + place.lane][place.channel], domega);
            *own = fmaf(omega_d, *own, total);
        }
        __syncthreads(); // the outputs are whole
#pragma unroll
        for (int j = 0; j < Place::PER_THREAD; j++) {
            int i = (int)threadIdx.x + j * CEMA_THREADS, t = first + i / Place::CHANNELS;
            int column = place.first_d + i % Place::CHANNELS;
            if (t >= steps || column >= D) continue;
            int64_t at = ((int64_t)place.b * steps + t) * D + column;
            du[at] = from_float<T>((&now_dy[0][0])[i] + (accumulate ? to_float(du[at]) : 0.0f));
        }
    }
    domega = lanes_sum(domega, LANES);
    /* One more step back, with no dy: what an input at time -1, the incoming state, would meet. */
    cema_turn<R>(s.kappa, q, s.nu);
    cema_turn<R>(s.nu, q, 0.0f);
    if constexpr (OUTGOING) {
        cema_turn<R>(out.sigma, q, out.rho);
        cema_turn<R>(out.rho, q, 0.0f);
    }
    if (d >= D) return; // no shuffle comes after this
    if (place.lane == 0) sums.domega[(int64_t)place.b * D + d] = domega;
#pragma unroll
    for (int r = 0; r < R; r++) {
        if (first_state + r >= N) continue;
        int64_t at = state + r, coefficient = (int64_t)d * N + first_state + r;
        float c_re = coef.c_re[coefficient], c_im = coef.c_im[coefficient];
        float h_re = h_in ? h_in[at * 2] : 0.0f, h_im = h_in ? h_in[at * 2 + 1] : 0.0f;
        float dc_re = p[r] * s.u_nu.re[r] + h_re * s.nu.re[r] - h_im * s.nu.im[r];
        float dc_im = p[r] * s.u_nu.im[r] + h_re * s.nu.im[r] + h_im * s.nu.re[r];
        float k_re = p[r] * s.u_kappa.re[r] + h_re * s.kappa.re[r] - h_im * s.kappa.im[r];
        float k_im = p[r] * s.u_kappa.im[r] + h_re * s.kappa.im[r] + h_im * s.kappa.re[r];
        float dq_re = c_re * k_re - c_im * k_im, dq_im = c_re * k_im + c_im * k_re;
        float dp = c_re * s.u_nu.re[r] - c_im * s.u_nu.im[r];
        float dh_re = c_re * s.nu.re[r] - c_im * s.nu.im[r], dh_im = c_re * s.nu.im[r] + c_im * s.nu.re[r];
        if constexpr (OUTGOING) {
            dq_re += p[r] * out.u_sigma.re[r] + h_re * out.sigma.re[r] - h_im * out.sigma.im[r];
            dq_im += p[r] * out.u_sigma.im[r] + h_re * out.sigma.im[r] + h_im * out.sigma.re[r];
            dp += out.u_rho[r];
            dh_re += out.rho.re[r], dh_im += out.rho.im[r];
        }
        sums.dp[at] = dp;
        sums.dq_re[at] = dq_re, sums.dq_im[at] = -dq_im;
        sums.dc_re[at] = dc_re, sums.dc_im[at] = -dc_im;
        if (dh_in) dh_in[at * 2] = dh_re, dh_in[at * 2 + 1] = -dh_im;
    }
}

/* With a = sigmoid(alpha), s = sigmoid(delta), phi = k sigmoid(theta) 2 pi / N, q = (1 - a s) exp(i phi):
 *     da = dp - s dr,  ds = -a dr,  dr = dq . (cos phi, sin phi),  dphi = dq . (-q_im, q_re)
 * computes: dalpha, ddelta, dtheta, dgamma, domega += from the sums, over rows and, for theta, over states
 * launch:   grid ceil(D / channels), block 256: a thread owns a state of a channel, N of them make a channel
 * traffic:  20 B D N bytes read
 * needs:    N <= 256
 * numerics: double, fixed order: deterministic */
__global__ static void cema_parameters_kernel(float *dalpha, float *ddelta, float *dtheta, float *dgamma,
                                              float *domega, CemaSums sums, const float *alpha,
                                              const float *delta, const float *theta, int B, int D, int N) {
    __shared__ double dphase[256];
    int channels = 256 / N, channel = (int)threadIdx.x / N, k = (int)threadIdx.x % N;
    int d = (int)blockIdx.x * channels + channel;
    bool active = channel < channels && d < D;
    double turn = 0, rate = active ? logistic(theta[d]) : 0;
    if (active) {
        int64_t i = (int64_t)d * N + k;
        double dp = 0, dq_re = 0, dq_im = 0, dc_re = 0, dc_im = 0;
        for (int b = 0; b < B; b++) {
            int64_t at = (int64_t)b * D * N + i;
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
    for (int b = 0; b < B; b++) skip += sums.domega[(int64_t)b * D + d];
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
    int64_t size = B * D * N;
    float *memory = take<float>(context, NUM_CEMA_SUMS * size + B * D);
    CemaSums sums = {
        memory, memory + size, memory + 2 * size, memory + 3 * size, memory + 4 * size, memory + 5 * size};
#define CEMA_BACKWARD(R, LANES, OUTGOING)                                                                   \
    LAUNCH((cema_backward_kernel<T, R, LANES, OUTGOING>),                                                   \
           dim3(blocks_for(D *LANES, CEMA_THREADS), (unsigned)B), CEMA_THREADS, context, du, accumulate,    \
           dh_in, sums, dy, dh_out, u, h_in, coef, omega, (int)steps, (int)D, (int)N)
#define CEMA_BACKWARD_PLAIN(R, LANES) CEMA_BACKWARD(R, LANES, false)
    if (!dh_out)
        WITH_CEMA_LANES(context, B, D, N, CEMA_BACKWARD_PLAIN);
    else if (N > 32)
        CEMA_BACKWARD(4, 16, true);
    else if (N > 16)
        CEMA_BACKWARD(2, 16, true);
    else
        CEMA_BACKWARD(1, 16, true);
#undef CEMA_BACKWARD_PLAIN
#undef CEMA_BACKWARD
    LAUNCH(cema_parameters_kernel, blocks_for(D, 256 / N), 256, context, dalpha, ddelta, dtheta, dgamma,
           domega, sums, alpha, delta, theta, (int)B, (int)D, (int)N);
}

#endif
