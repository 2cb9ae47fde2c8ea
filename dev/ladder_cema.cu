/* ladder_cema.cu - the kernels of CEMA, from one thread a channel to the tensor cores.
 *
 * The last version of each direction is the one that trains: cema_forward and cema_backward of
 * cuda/cema.cuh, called, not copied. The ones before it each have one idea. Truth is the naive version in
 * double.
 */
#include "ladder.cuh"

#include "../cuda/cema.cuh"

#define OPTIONS(X)                                                                                          \
    X(INT, batch, "8", 1, 4096, "ROWS", "Size", "sequences")                                                \
    X(INT, seq_len, "4096", 1, 1048576, "STEPS", "Size", "steps of a sequence")                             \
    X(INT, model_dim, "1024", 1, 65536, "CHANNELS", "Size", "channels")                                     \
    X(INT, cema_ndim, "16", 1, 16, "STATES", "Size", "states of a channel")
struct Values {
    OPTIONS(OPTION_MEMBER)
};
static const Option options[] = {OPTIONS(OPTION_ROW)};

enum { MOST_STATES = 16, LANES = 8 };

struct Sizes { int B, steps, D, N; };

/* ----------------------------------------------------------------------------------------------------------
 * 1. naive: the recurrence as it is written
 */

/* computes: y_t = Re(sum_k c_k h_t[k]) + omega u_t, h_t = q h_{t-1} + p u_t
 * launch:   grid ceil(B D / 128), block 128: a thread owns a channel of a row and walks through time
 * traffic:  2 B T D sizeof(T) bytes
 * needs:    N <= 16
 * numerics: Real */
template <typename Real, typename Out, typename T>
__global__ void naive_forward_kernel(Out *y, const T *u, CemaCoefficients coef, const float *omega,
                                     Sizes s) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)s.B * s.D) return;
    int b = (int)(i / s.D), d = (int)(i % s.D);
    Real re[MOST_STATES] = {}, im[MOST_STATES] = {};
    for (int t = 0; t < s.steps; t++) {
        int64_t at = ((int64_t)b * s.steps + t) * s.D + d; // y[b,t,d]
        Real x = (Real)to_float(u[at]), sum = (Real)omega[d] * x;
#pragma unroll
        for (int k = 0; k < MOST_STATES; k++) {
            if (k >= s.N) continue;
            int64_t state = (int64_t)d * s.N + k;
            Real q_re = coef.q_re[state], q_im = coef.q_im[state], before = re[k];
            re[k] = q_re * before - q_im * im[k] + (Real)coef.p[state] * x;
            im[k] = q_re * im[k] + q_im * before;
            sum += (Real)coef.c_re[state] * re[k] - (Real)coef.c_im[state] * im[k];
        }
        y[at] = (Out)sum;
    }
}

/* Gradients of p, q, c, each (B,D,N), and of omega, (B,D). */
template <typename Real> struct Sums { Real *dp, *dq_re, *dq_im, *dc_re, *dc_im, *domega; };

/* computes: du_t = p Re(sum c nu_t) + omega dy_t, nu_t = dy_t + q nu_{t+1}, kappa_t = nu_{t+1} + q
 *           kappa_{t+1}; dc = conj(sum p u nu), dq = conj(c sum p u kappa), dp = Re(c sum u nu), domega =
 *           sum u dy
 * launch:   grid ceil(B D / 128), block 128: a thread owns a channel of a row and walks back through time
 * traffic:  3 B T D sizeof(T) bytes
 * needs:    N <= 16
 * numerics: Real */
template <typename Real, typename Out, typename T>
__global__ void naive_backward_kernel(Out *du, Sums<Real> sums, const T *dy, const T *u,
                                      CemaCoefficients coef, const float *omega, Sizes s) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)s.B * s.D) return;
    int b = (int)(i / s.D), d = (int)(i % s.D);
    Real nu[MOST_STATES][2] = {}, kappa[MOST_STATES][2] = {}, u_nu[MOST_STATES][2] = {},
         u_kappa[MOST_STATES][2] = {}, skip = 0;
    for (int t = s.steps - 1; t >= 0; t--) {
        int64_t at = ((int64_t)b * s.steps + t) * s.D + d; // du[b,t,d]
        Real x = (Real)to_float(u[at]), g = (Real)to_float(dy[at]), sum = (Real)omega[d] * g;
        skip += x * g;
#pragma unroll
        for (int k = 0; k < MOST_STATES; k++) {
            if (k >= s.N) continue;
            int64_t state = (int64_t)d * s.N + k;
            Real q_re = coef.q_re[state], q_im = coef.q_im[state];
            Real re = q_re * kappa[k][0] - q_im * kappa[k][1] + nu[k][0];
            kappa[k][1] = q_re * kappa[k][1] + q_im * kappa[k][0] + nu[k][1], kappa[k][0] = re;
            re = q_re * nu[k][0] - q_im * nu[k][1] + g;
            nu[k][1] = q_re * nu[k][1] + q_im * nu[k][0], nu[k][0] = re;
            sum += (Real)coef.p[state] * ((Real)coef.c_re[state] * re - (Real)coef.c_im[state] * nu[k][1]);
            for (int part = 0; part < 2; part++)
                u_nu[k][part] += x * nu[k][part], u_kappa[k][part] += x * kappa[k][part];
        }
        du[at] = (Out)sum;
    }
    sums.domega[i] = skip;
#pragma unroll
    for (int k = 0; k < MOST_STATES; k++) {
        if (k >= s.N) continue;
        int64_t state = (int64_t)d * s.N + k, at = i * s.N + k;
        Real p = coef.p[state], c_re = coef.c_re[state], c_im = coef.c_im[state];
        sums.dp[at] = c_re * u_nu[k][0] - c_im * u_nu[k][1];
        sums.dc_re[at] = p * u_nu[k][0], sums.dc_im[at] = -p * u_nu[k][1];
        sums.dq_re[at] = p * (c_re * u_kappa[k][0] - c_im * u_kappa[k][1]);
        sums.dq_im[at] = -p * (c_re * u_kappa[k][1] + c_im * u_kappa[k][0]);
    }
}

/* ----------------------------------------------------------------------------------------------------------
 * 2. lanes: sixteen lanes share a channel, a state each: sixteen times the threads
 */

/* computes: as naive
 * launch:   grid ceil(B D / 16), block 256: 16 lanes own a channel of a row, each lane a state
 * traffic:  2 B T D sizeof(T) bytes; a step costs four shuffles
 * needs:    N <= 16
 * numerics: float */
template <typename T>
__global__ void lanes_forward_kernel(T *y, const T *u, CemaCoefficients coef, const float *omega, Sizes s) {
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / MOST_STATES;
    int k = (int)threadIdx.x % MOST_STATES, b = (int)(i / s.D), d = (int)(i % s.D);
    bool here = b < s.B, owns = here && k < s.N;
    int64_t state = (int64_t)d * s.N + k;
    float p = owns ? coef.p[state] : 0.0f, q_re = owns ? coef.q_re[state] : 0.0f,
          q_im = owns ? coef.q_im[state] : 0.0f, c_re = owns ? coef.c_re[state] : 0.0f,
          c_im = owns ? coef.c_im[state] : 0.0f, re = 0, im = 0;
    for (int t = 0; t < s.steps; t++) {
        int64_t at = ((int64_t)b * s.steps + t) * s.D + d; // y[b,t,d]
        float x = here ? to_float(u[at]) : 0.0f, before = re;
        re = fmaf(q_re, before, fmaf(-q_im, im, p * x));
        im = fmaf(q_re, im, q_im * before);
        float sum = lanes_sum(c_re * re - c_im * im, MOST_STATES);
        if (here && k == 0) y[at] = from_float<T>(fmaf(omega[d], x, sum));
    }
}

/* ----------------------------------------------------------------------------------------------------------
 * 3. groups: eight steps at once, so that one complex product in eight steps waits for another
 */

/* Adds part[i] over eight lanes; lane i gets the sum of step i. */
__device__ inline float transposed_sum(float (&part)[LANES], int lane) {
#pragma unroll
    for (int width = LANES / 2; width > 0; width /= 2)
#pragma unroll
        for (int i = 0; i < width; i++) {
            float keep = lane & width ? part[i + width] : part[i];
            float give = lane & width ? part[i] : part[i + width];
            part[i] = keep + __shfl_xor_sync(FULL_MASK, give, width);
        }
    return part[0];
}

/* computes: y_m = Re(sum c q^(m+1) h) + sum_{i<=m} k_(m-i) u_i, h' = q^8 h + sum_m p q^(7-m) u_m for eight
 *           steps, k_l = Re(sum p c q^l) and omega at l = 0
 * launch:   grid ceil(B D / 32), block 256: 8 lanes own a channel of a row, each two states and a step of 8
 * traffic:  2 B T D sizeof(T) bytes; eight steps cost seven shuffles
 * needs:    N <= 16
 * numerics: float */
template <typename T>
__global__ void groups_forward_kernel(T *y, const T *u, CemaCoefficients coef, const float *omega, Sizes s) {
    constexpr int R = MOST_STATES / LANES;
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    int lane = (int)threadIdx.x % LANES, b = (int)(i / s.D), d = (int)(i % s.D);
    bool here = b < s.B;
    float p[R], power_re[R][LANES + 1], power_im[R][LANES + 1], c_re[R], c_im[R], re[R] = {}, im[R] = {};
#pragma unroll
    for (int r = 0; r < R; r++) {
        int k = lane * R + r;
        bool owns = here && k < s.N;
        int64_t state = (int64_t)d * s.N + k;
        p[r] = owns ? coef.p[state] : 0.0f;
        c_re[r] = owns ? coef.c_re[state] : 0.0f, c_im[r] = owns ? coef.c_im[state] : 0.0f;
        CemaComplex q = {owns ? coef.q_re[state] : 0.0f, owns ? coef.q_im[state] : 0.0f}, power = {1, 0};
#pragma unroll
        for (int n = 0; n <= LANES; n++, power = power * q)
            power_re[r][n] = (float)power.re, power_im[r][n] = (float)power.im;
    }
    float taps[LANES] = {}; /* what input i adds to the lane's own step */
#pragma unroll
    for (int lag = 0; lag < LANES; lag++) {
        float k = 0;
#pragma unroll
        for (int r = 0; r < R; r++) k += p[r] * (c_re[r] * power_re[r][lag] - c_im[r] * power_im[r][lag]);
        k = lanes_sum(k, LANES) + (lag == 0 && here ? omega[d] : 0.0f);
#pragma unroll
        for (int j = 0; j < LANES; j++)
            if (lane - j == lag) taps[j] = k;
    }
    for (int first = 0; first < s.steps; first += LANES) {
        int64_t at = ((int64_t)b * s.steps + first) * s.D + d; // y[b,first,d]
        float x[LANES], part[LANES] = {};
#pragma unroll
        for (int m = 0; m < LANES; m++)
            x[m] = here && first + m < s.steps ? to_float(u[at + (int64_t)m * s.D]) : 0.0f;
#pragma unroll
        for (int r = 0; r < R; r++) {
            float ch_re = c_re[r] * re[r] - c_im[r] * im[r], ch_im = c_re[r] * im[r] + c_im[r] * re[r];
            float add_re = 0, add_im = 0, before = re[r];
#pragma unroll
            for (int m = 0; m < LANES; m++) {
                part[m] = fmaf(power_re[r][m + 1], ch_re, fmaf(-power_im[r][m + 1], ch_im, part[m]));
                add_re = fmaf(power_re[r][LANES - 1 - m], x[m], add_re);
                add_im = fmaf(power_im[r][LANES - 1 - m], x[m], add_im);
            }
            re[r] = fmaf(power_re[r][LANES], before, fmaf(-power_im[r][LANES], im[r], p[r] * add_re));
            im[r] = fmaf(power_im[r][LANES], before, fmaf(power_re[r][LANES], im[r], p[r] * add_im));
        }
        float sum = transposed_sum(part, lane);
#pragma unroll
        for (int m = 0; m < LANES; m++) sum = fmaf(taps[m], x[m], sum);
        if (here && first + lane < s.steps) y[at + (int64_t)lane * s.D] = from_float<T>(sum);
    }
}

/* ----------------------------------------------------------------------------------------------------------
 * The program
 */

/* One set of arguments. */
struct Arguments { bf16 *u, *y, *dy, *du; };

/* Parameters, their gradients, and the sums of the naive backward. */
struct Parameters { float *alpha, *delta, *theta, *gamma, *omega; };

static Parameters allocate_parameters(int64_t D, int64_t N) {
    return Parameters{ladder_allocate<float>(D * N), ladder_allocate<float>(D * N),
                      ladder_allocate<float>(D), ladder_allocate<float>(2 * D * N),
                      ladder_allocate<float>(D)};
}
static void clear_parameters(Context *context, const Parameters &g, int64_t D, int64_t N) {
    clear(context, g.alpha, (size_t)(D * N) * sizeof(float));
    clear(context, g.delta, (size_t)(D * N) * sizeof(float));
    clear(context, g.theta, (size_t)D * sizeof(float));
    clear(context, g.gamma, (size_t)(2 * D * N) * sizeof(float));
    clear(context, g.omega, (size_t)D * sizeof(float));
}

template <typename Real> static Sums<Real> allocate_sums(int64_t rows, int64_t D, int64_t N) {
    Sums<Real> sums;
    for (Real **x : {&sums.dp, &sums.dq_re, &sums.dq_im, &sums.dc_re, &sums.dc_im})
        *x = ladder_allocate<Real>(rows * D * N);
    sums.domega = ladder_allocate<Real>(rows * D);
    return sums;
}

/* The parameters' gradients in double. */
struct Truth { std::vector<double> y, du, alpha, delta, theta, gamma, omega; };

/* What cema_parameters_kernel computes, from the naive sums in double. */
static void parameters_truth(Ladder *ladder, Truth *truth, const Sums<double> &sums, const Parameters &w,
                             const Sizes &s) {
    int64_t D = s.D, N = s.N, states = D * N;
    std::vector<double> sum[6], alpha = ladder_fetch(ladder, w.alpha, states),
                                delta = ladder_fetch(ladder, w.delta, states),
                                theta = ladder_fetch(ladder, w.theta, D);
    const double *from[6] = {sums.dp, sums.dq_re, sums.dq_im, sums.dc_re, sums.dc_im, sums.domega};
    for (int i = 0; i < 6; i++) {
        int64_t row = i < 5 ? states : D;
        std::vector<double> all = ladder_fetch(ladder, from[i], s.B * row);
        sum[i].assign((size_t)row, 0);
        for (int64_t j = 0; j < s.B * row; j++) sum[i][(size_t)(j % row)] += all[(size_t)j];
    }
    truth->alpha.resize((size_t)states), truth->delta.resize((size_t)states);
    truth->gamma.resize((size_t)(2 * states)), truth->theta.assign((size_t)D, 0), truth->omega = sum[5];
    auto logistic = [](double x) { return 1 / (1 + std::exp(-x)); };
    for (size_t i = 0; i < (size_t)states; i++) {
        size_t d = i / (size_t)N, k = i % (size_t)N;
        double a = logistic(alpha[i]), b = logistic(delta[i]), rate = logistic(theta[d]), radius = 1 - a * b;
        double turn = (double)(k + 1) * 6.283185307179586 / (double)N, phase = turn * rate;
        double dr = sum[1][i] * std::cos(phase) + sum[2][i] * std::sin(phase);
        truth->alpha[i] = (sum[0][i] - b * dr) * a * (1 - a);
        truth->delta[i] = -a * dr * b * (1 - b);
        truth->theta[d] +=
            radius * (sum[2][i] * std::cos(phase) - sum[1][i] * std::sin(phase)) * turn * rate * (1 - rate);
        truth->gamma[2 * i] = sum[3][i] / std::sqrt((double)N);
        truth->gamma[2 * i + 1] = sum[4][i] / std::sqrt((double)N);
    }
}

/* The naive version in double, on set 0. */
static void compute_truth(Ladder *ladder, Truth *truth, const Arguments &set, CemaCoefficients coef,
                          const Parameters &w, const Sizes &s) {
    int64_t size = (int64_t)s.B * s.steps * s.D;
    unsigned blocks = blocks_for((int64_t)s.B * s.D, 128);
    double *out = ladder_allocate<double>(size);
    Sums<double> sums = allocate_sums<double>(s.B, s.D, s.N);
    LAUNCH((naive_forward_kernel<double, double, bf16>), blocks, 128, &ladder->context, out, set.u, coef,
           w.omega, s);
    truth->y = ladder_fetch(ladder, out, size);
    LAUNCH((naive_backward_kernel<double, double, bf16>), blocks, 128, &ladder->context, out, sums, set.dy,
           set.u, coef, w.omega, s);
    truth->du = ladder_fetch(ladder, out, size);
    parameters_truth(ladder, truth, sums, w, s);
    CHECK_CUDA(cudaFree(out));
}

/* Tolerances: rounding to bf16 alone leaves 1.7e-3; gradients of parameters are float. */
static const double OUTPUT_TOLERANCE = 3.3e-3, GRADIENT_TOLERANCE = 1e-4;

static void climb_forward(Ladder *ladder, const std::vector<Arguments> &sets, CemaCoefficients coef,
                          const Parameters &w, const Truth &truth, const Sizes &s) {
    Context *context = &ladder->context;
    int64_t channels = (int64_t)s.B * s.D, size = channels * s.steps;
    double bytes = 2.0 * (double)size * sizeof(bf16);
    int count = (int)sets.size();
    LadderOutput<bf16> y = {"y", sets[0].y, size, &truth.y, OUTPUT_TOLERANCE};
    printf("forward\n");
    ladder_step(
        ladder, "naive", "a thread owns a channel and walks through time", bytes, count,
        [&](int i) {
            LAUNCH((naive_forward_kernel<float, bf16, bf16>), blocks_for(channels, 128), 128, context,
                   sets[(size_t)i].y, sets[(size_t)i].u, coef, w.omega, s);
        },
        y);
    ladder_step(
        ladder, "lanes", "a lane a state: sixteen times the threads", bytes, count,
        [&](int i) {
            LAUNCH(lanes_forward_kernel<bf16>, blocks_for(channels * MOST_STATES, 256), 256, context,
                   sets[(size_t)i].y, sets[(size_t)i].u, coef, w.omega, s);
        },
        y);
    ladder_step(
        ladder, "groups", "eight steps at once, one shuffle a step", bytes, count,
        [&](int i) {
            LAUNCH(groups_forward_kernel<bf16>, blocks_for(channels * LANES, 256), 256, context,
                   sets[(size_t)i].y, sets[(size_t)i].u, coef, w.omega, s);
        },
        y);
    ladder_step(
        ladder, "cema_forward", "sixteen steps as products on the tensor cores; time in segments", bytes,
        count,
        [&](int i) {
            cema_forward<bf16>(context, sets[(size_t)i].y, nullptr, sets[(size_t)i].u, nullptr, coef,
                               w.omega, s.B, s.steps, s.D, s.N);
        },
        y);
}

static void climb_backward(Ladder *ladder, const std::vector<Arguments> &sets, CemaCoefficients coef,
                           const Parameters &w, const Truth &truth, const Sizes &s) {
    Context *context = &ladder->context;
    int64_t channels = (int64_t)s.B * s.D, size = channels * s.steps, D = s.D, N = s.N;
    double bytes = 3.0 * (double)size * sizeof(bf16);
    int count = (int)sets.size();
    Parameters g = allocate_parameters(D, N);
    Sums<float> sums = allocate_sums<float>(s.B, D, N);
    LadderOutput<bf16> du = {"du", sets[0].du, size, &truth.du, OUTPUT_TOLERANCE};
    LadderOutput<float> alpha = {"dalpha", g.alpha, D * N, &truth.alpha, GRADIENT_TOLERANCE},
                        delta = {"ddelta", g.delta, D * N, &truth.delta, GRADIENT_TOLERANCE},
                        theta = {"dtheta", g.theta, D, &truth.theta, GRADIENT_TOLERANCE},
                        gamma = {"dgamma", g.gamma, 2 * D * N, &truth.gamma, GRADIENT_TOLERANCE},
                        omega = {"domega", g.omega, D, &truth.omega, GRADIENT_TOLERANCE};
    printf("backward\n");
    ladder->first_ms = 0;
    ladder_step(
        ladder, "naive", "a thread owns a channel and walks back through time", bytes, count,
        [&](int i) {
            const Arguments &set = sets[(size_t)i];
            clear_parameters(context, g, D, N);
            LAUNCH((naive_backward_kernel<float, bf16, bf16>), blocks_for(channels, 128), 128, context,
                   set.du, sums, set.dy, set.u, coef, w.omega, s);
            CemaSums rows = {sums.dp, sums.dq_re, sums.dq_im, sums.dc_re, sums.dc_im, sums.domega};
            LAUNCH(cema_parameters_kernel, blocks_for(D, 256 / N), 256, context, g.alpha, g.delta, g.theta,
                   g.gamma, g.omega, rows, w.alpha, w.delta, w.theta, s.B, s.D, s.N);
        },
        du, alpha, delta, theta, gamma, omega);
    ladder_step(
        ladder, "cema_backward", "the forward's kernels back in time; sums of groups, not of steps", bytes,
        count,
        [&](int i) {
            const Arguments &set = sets[(size_t)i];
            clear_parameters(context, g, D, N);
            cema_backward<bf16>(context, set.du, nullptr, g.alpha, g.delta, g.theta, g.gamma, g.omega,
                                set.dy, nullptr, set.u, nullptr, coef, w.alpha, w.delta, w.theta, w.omega,
                                s.B, s.steps, D, N);
        },
        du, alpha, delta, theta, gamma, omega);
}

int main(int argc, char **argv) {
    Ladder ladder;
    Values values;
    ladder_options(&ladder, argc, argv, "ladder_cema",
                   "Times versions of CEMA's kernels, bf16, and checks each against double.", options,
                   OPTION_COUNT(options), &values);
    Sizes s = {values.batch, values.seq_len, values.model_dim, values.cema_ndim};
    int64_t D = s.D, N = s.N, size = (int64_t)s.B * s.steps * D;
    Context *context = &ladder.context;
    ladder_open(&ladder, (size_t)256 << 20);
    Parameters w = allocate_parameters(D, N);
    ladder_fill(&ladder, w.alpha, D * N, 1, 0.0f, 0.2f);
    ladder_fill(&ladder, w.delta, D * N, 2, 0.0f, 0.2f);
    ladder_fill(&ladder, w.theta, D, 3, -3.0f, 2.0f);
    ladder_fill(&ladder, w.gamma, 2 * D * N, 4, 0.0f, 1.0f);
    ladder_fill(&ladder, w.omega, D, 5, 0.0f, 0.25f);
    CemaCoefficients coef =
        cema_coefficients_at(ladder_allocate<float>(D * N * NUM_CEMA_COEFFICIENTS), D, N);
    cema_coefficients(context, coef, w.alpha, w.delta, w.theta, w.gamma, D, N);
    std::vector<Arguments> sets((size_t)ladder_sets(&ladder, 2.0 * (double)size * sizeof(bf16)));
    for (size_t i = 0; i < sets.size(); i++) {
        sets[i] = Arguments{ladder_allocate<bf16>(size), ladder_allocate<bf16>(size),
                            ladder_allocate<bf16>(size), ladder_allocate<bf16>(size)};
        ladder_fill(&ladder, sets[i].u, size, 10 + 2 * i, 0.0f, 1.0f);
        ladder_fill(&ladder, sets[i].dy, size, 11 + 2 * i, 0.0f, 1.0f);
    }
    Truth truth;
    compute_truth(&ladder, &truth, sets[0], coef, w, s);
    climb_forward(&ladder, sets, coef, w, truth, s);
    climb_backward(&ladder, sets, coef, w, truth, s);
    return ladder_close(&ladder);
}
