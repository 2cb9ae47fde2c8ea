/* queries.cuh - from z to queries and keys: z-norm, affine and RoPE, one by one as components and fused for
 * the model.
 */
#ifndef CUDA_QUERIES_CUH
#define CUDA_QUERIES_CUH

#include "common.cuh"

enum { QUERY_WARPS = 8 };

/* ----------------------------------------------------------------------------------------------------------
 * RoPE: the pair (x[2i], x[2i+1]) turns by the angle position base^(-2i/z), position = (n + t) mod C.
 */

/* computes: table[position, i] = (cos, sin) of position base^(-2i/z)
 * launch:   grid ceil(C z/2 / 256), block 256: a thread owns one pair at one position
 * traffic:  4 C z bytes
 * needs:    z even
 * numerics: double, rounded once */
__global__ static void rope_table_kernel(float2 *table, int C, int z, double base) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)C * (z / 2)) return;
    double angle = (double)(i / (z / 2)) * pow(base, -2 * (double)(i % (z / 2)) / (double)z);
    table[i] = make_float2((float)cos(angle), (float)sin(angle));
}

static inline void rope_table(Context *context, float2 *table, int64_t C, int64_t z, double base) {
    LAUNCH(rope_table_kernel, blocks_for(C * (z / 2), 256), 256, context, table, (int)C, (int)z, base);
}

/* (x, y) turned by the angle whose (cos, sin) is given; direction -1 turns back */
__device__ inline float2 turn_pair(float x, float y, float2 angle, float direction) {
    float sine = direction * angle.y;
    return make_float2(x * angle.x - y * sine, x * sine + y * angle.x);
}

/* computes: y[b, t, h, pair i] = x[b, t, h, pair i] turned by table[(n + t) mod C, i]
 * launch:   grid ceil(B T H z/2 / 256), block 256: a thread owns a pair
 * traffic:  2 B T Z sizeof(T) bytes
 * needs:    z even; y may be x
 * numerics: float */
template <typename T>
__global__ void rope_kernel(T *y, const T *x, const float2 *table, float direction, int64_t pairs, int n,
                            int steps, int H, int half, int C) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= pairs) return;
    int64_t t = i / half / H % steps;
    float2 result = turn_pair(to_float(x[2 * i]), to_float(x[2 * i + 1]),
                              table[(n + t) % C * half + i % half], direction);
    y[2 * i] = from_float<T>(result.x);
    y[2 * i + 1] = from_float<T>(result.y);
}

/* y, x (B,T,H,z); table (C,z/2) */
template <typename T>
static void rope_forward(Context *context, T *y, const T *x, const float2 *table, int64_t n, int64_t B,
                         int64_t steps, int64_t H, int64_t z, int64_t C) {
    int64_t pairs = B * steps * H * (z / 2);
    LAUNCH((rope_kernel<T>), blocks_for(pairs, 256), 256, context, y, x, table, 1.0f, pairs, (int)n,
           (int)steps, (int)H, (int)(z / 2), (int)C);
}
/* A turn's transpose is the turn back:  dx = turn(dy, -angle) */
template <typename T>
static void rope_backward(Context *context, T *dx, const T *dy, const float2 *table, int64_t n, int64_t B,
                          int64_t steps, int64_t H, int64_t z, int64_t C) {
    int64_t pairs = B * steps * H * (z / 2);
    LAUNCH((rope_kernel<T>), blocks_for(pairs, 256), 256, context, dx, dy, table, -1.0f, pairs, (int)n,
           (int)steps, (int)H, (int)(z / 2), (int)C);
}

/* ----------------------------------------------------------------------------------------------------------
 * z-norm, affine, and all three together.
 */

struct QueryShape {
    int64_t rows;         /* B T */
    const int64_t *count; /* (B) tokens before, on the device; NULL: none */
    int steps, H, z, C;
};

/* Position in its chunk of token `row` = b T + t. The count is read on the device, so that a recorded pass
 * can be replayed. */
__device__ inline int64_t chunk_position(const QueryShape &shape, int64_t row) {
    int64_t before = shape.count ? shape.count[row / shape.steps] : 0;
    return (before + row % shape.steps) % shape.C;
}

/* computes: zn = NORM ? zz / sqrt(mean over the head of zz^2 + eps) : zz;  q = rope(zn (1 + gamma[0]) /
 * sqrt(z) + beta[0])
 *           and k with gamma[1], beta[1]; zn, or q and k, may be NULL (not wanted), the table too (no turn)
 * launch:   grid ceil(B T H / 8), block 256: a warp owns a head of a step, a lane every 32nd pair
 * traffic:  (1 + outputs) B T Z sizeof(T) bytes
 * needs:    z even
 * numerics: float, fixed order: deterministic */
template <typename T, bool NORM>
__global__ void queries_forward_kernel(T *q, T *k, T *zn, const T *zz, const T *gamma, const T *beta,
                                       const float2 *table, QueryShape shape, float eps) {
    int64_t unit = (int64_t)blockIdx.x * QUERY_WARPS + threadIdx.x / WARP_SIZE;
    if (unit >= shape.rows * shape.H) return; // a whole warp leaves
    int lane = (int)threadIdx.x % WARP_SIZE, z = shape.z, Z = shape.H * z, h = (int)(unit % shape.H);
    int64_t at = unit * z, position = chunk_position(shape, unit / shape.H);
    float rstd = 1, inverse = 1.0f / sqrtf((float)z);
    if (NORM) {
        float squares = 0;
        for (int j = lane; j < z; j += WARP_SIZE) squares += to_float(zz[at + j]) * to_float(zz[at + j]);
        rstd = 1.0f / sqrtf(warp_sum(squares) / (float)z + eps);
    }
    for (int i = lane; i < z / 2; i += WARP_SIZE) {
        float first = to_float(zz[at + 2 * i]) * rstd, second = to_float(zz[at + 2 * i + 1]) * rstd;
        if (zn) zn[at + 2 * i] = from_float<T>(first), zn[at + 2 * i + 1] = from_float<T>(second);
        if (!q) continue;
        float2 angle = table ? table[position * (z / 2) + i] : make_float2(1, 0);
#pragma unroll
        for (int which = 0; which < 2; which++) {
            T *out = which ? k : q;
            int j = which * Z + h * z + 2 * i;
            float2 turned = turn_pair(
                first * (1.0f + to_float(gamma[j])) * inverse + to_float(beta[j]),
                second * (1.0f + to_float(gamma[j + 1])) * inverse + to_float(beta[j + 1]), angle, 1);
            out[at + 2 * i] = from_float<T>(turned.x);
            out[at + 2 * i + 1] = from_float<T>(turned.y);
        }
    }
}

template <typename T>
static void znorm_forward(Context *context, T *zn, const T *zz, int64_t rows, int64_t H, int64_t z,
                          float eps) {
    QueryShape shape = {rows, nullptr, 1, (int)H, (int)z, 1};
    LAUNCH((queries_forward_kernel<T, true>), blocks_for(rows * H, QUERY_WARPS), QUERY_WARPS * WARP_SIZE,
           context, (T *)nullptr, (T *)nullptr, zn, zz, (const T *)nullptr, (const T *)nullptr,
           (const float2 *)nullptr, shape, eps);
}
template <typename T>
static void qk_affine_forward(Context *context, T *q, T *k, const T *zn, const T *gamma, const T *beta,
                              int64_t rows, int64_t H, int64_t z) {
    QueryShape shape = {rows, nullptr, 1, (int)H, (int)z, 1};
    LAUNCH((queries_forward_kernel<T, false>), blocks_for(rows * H, QUERY_WARPS), QUERY_WARPS * WARP_SIZE,
           context, q, k, (T *)nullptr, zn, gamma, beta, (const float2 *)nullptr, shape, 0.0f);
}
/* znorm_forward, qk_affine_forward and two rope_forwards in one; zn NULL: not wanted */
template <typename T>
static void queries_forward(Context *context, T *q, T *k, T *zn, const T *zz, const T *gamma, const T *beta,
                            const float2 *table, QueryShape shape, float eps) {
    LAUNCH((queries_forward_kernel<T, true>), blocks_for(shape.rows * shape.H, QUERY_WARPS),
           QUERY_WARPS * WARP_SIZE, context, q, k, zn, zz, gamma, beta, table, shape, eps);
}

/* zn = zz rstd:  dzz = rstd (dzn - zz rstd^2 mean(dzn zz))
 * computes: dzz of one head
 * launch:   grid ceil(B T H / 8), block 256: a warp owns a head of a step
 * traffic:  3 B T Z sizeof(T) bytes
 * needs:    nothing; dzz may be dzn
 * numerics: float, fixed order: deterministic */
template <typename T>
__global__ void znorm_backward_kernel(T *dzz, const T *dzn, const T *zz, int64_t units, int z, float eps) {
    int64_t unit = (int64_t)blockIdx.x * QUERY_WARPS + threadIdx.x / WARP_SIZE;
    if (unit >= units) return; // a whole warp leaves
    int lane = (int)threadIdx.x % WARP_SIZE;
    float squares = 0, products = 0;
    for (int j = lane; j < z; j += WARP_SIZE) {
        float value = to_float(zz[unit * z + j]);
        squares += value * value;
        products += value * to_float(dzn[unit * z + j]);
    }
    float rstd = 1.0f / sqrtf(warp_sum(squares) / (float)z + eps);
    float factor = rstd * rstd * warp_sum(products) / (float)z;
    for (int j = lane; j < z; j += WARP_SIZE)
        dzz[unit * z + j] =
            from_float<T>(rstd * (to_float(dzn[unit * z + j]) - to_float(zz[unit * z + j]) * factor));
}

template <typename T>
static void znorm_backward(Context *context, T *dzz, const T *dzn, const T *zz, int64_t rows, int64_t H,
                           int64_t z, float eps) {
    LAUNCH((znorm_backward_kernel<T>), blocks_for(rows * H, QUERY_WARPS), QUERY_WARPS * WARP_SIZE, context,
           dzz, dzn, zz, rows * H, (int)z, eps);
}

/* Gradient of one entry pair before RoPE, for q and for k, and through the affine onto zn. */
struct PairGradient {
    float q[2], k[2], zn[2];
};
template <typename T>
__device__ inline PairGradient pair_gradient(const T *dq, const T *dk, const T *gamma, float2 angle,
                                             int64_t at, int column, int Z, float inverse) {
    float2 q = turn_pair(to_float(dq[at]), to_float(dq[at + 1]), angle, -1);
    float2 k = turn_pair(to_float(dk[at]), to_float(dk[at + 1]), angle, -1);
    PairGradient g = {{q.x, q.y}, {k.x, k.y}, {0, 0}};
#pragma unroll
    for (int i = 0; i < 2; i++)
        g.zn[i] = inverse * (g.q[i] * (1.0f + to_float(gamma[column + i])) +
                             g.k[i] * (1.0f + to_float(gamma[Z + column + i])));
    return g;
}

/* q = rope(zn (1 + g0) / sqrt z + b0), k with g1, b1:  dzn = (dq' (1 + g0) + dk' (1 + g1)) / sqrt z, dq' =
 * dq turned back; dg0 += dq' zn / sqrt z;  db0 += dq';  and NORM: zn = zz rstd, dzz = rstd (dzn - zn
 * mean(dzn zn)), dbias += dzz computes: dzz, partial sums (block and group) of dgamma (2,Z), dbeta (2,Z)
 * and, if wanted, of dzz (Z)
 * launch:   grid ceil(B T / 32), block 256: head by head, first a warp a row for the mean, then a thread
 *           walks down a pair
 * traffic:  4 B T Z sizeof(T) bytes, dq, dk and zz a second time from the caches
 * needs:    z even; dzz may not be dq, dk or zz
 * numerics: float sums in a fixed order: deterministic */
template <typename T, bool NORM>
__global__ void queries_backward_kernel(T *dzz, float *partial_gamma, float *partial_beta,
                                        float *partial_bias, const T *dq, const T *dk, const T *zz,
                                        const T *gamma, const float2 *table, QueryShape shape, float eps) {
    __shared__ float row_rstd[SWEEP_ROWS], row_mean[SWEEP_ROWS];
    int z = shape.z, half = z / 2, Z = shape.H * z, lane = (int)threadIdx.x % WARP_SIZE;
    int64_t first = (int64_t)blockIdx.x * SWEEP_ROWS, last = min(first + SWEEP_ROWS, shape.rows);
    float inverse = 1.0f / sqrtf((float)z);
    Sweep sweep(half, 1);
    int64_t part = (int64_t)blockIdx.x * sweep.groups + sweep.group;
    for (int h = 0; h < shape.H; h++) {
        for (int64_t row = first + threadIdx.x / WARP_SIZE; NORM && row < last;
             row += SWEEP_THREADS / WARP_SIZE) {
            const float2 *angles = table ? table + chunk_position(shape, row) * half : nullptr;
            float squares = 0, products = 0;
            for (int i = lane; i < half; i += WARP_SIZE) {
                int64_t at = row * Z + h * z + 2 * i;
                float2 angle = angles ? angles[i] : make_float2(1, 0);
                PairGradient g = pair_gradient(dq, dk, gamma, angle, at, h * z + 2 * i, Z, inverse);
                float a = to_float(zz[at]), b = to_float(zz[at + 1]);
                squares += a * a + b * b;
                products += g.zn[0] * a + g.zn[1] * b;
            }
            squares = warp_sum(squares), products = warp_sum(products);
            if (lane == 0) {
                float rstd = 1.0f / sqrtf(squares / (float)z + eps);
                row_rstd[row - first] = rstd;
                row_mean[row - first] = rstd * products / (float)z; // mean(dzn zn)
            }
        }
        __syncthreads(); // the rows' means of this head are there
        for (int i = sweep.lane; i < half && sweep.group < sweep.groups; i += sweep.lanes) {
            float dgamma[2][2] = {}, dbeta[2][2] = {}, dbias[2] = {};
            int column = h * z + 2 * i;
            for (int64_t row = first + sweep.group; row < last; row += sweep.groups) {
                int64_t at = row * Z + column;
                float2 angle = table ? table[chunk_position(shape, row) * half + i] : make_float2(1, 0);
                PairGradient g = pair_gradient(dq, dk, gamma, angle, at, column, Z, inverse);
                float rstd = NORM ? row_rstd[row - first] : 1.0f, mean = NORM ? row_mean[row - first] : 0.0f;
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    float zn = to_float(zz[at + j]) * rstd, dz = rstd * (g.zn[j] - zn * mean);
                    dgamma[0][j] += g.q[j] * zn * inverse, dgamma[1][j] += g.k[j] * zn * inverse;
                    dbeta[0][j] += g.q[j], dbeta[1][j] += g.k[j];
                    dbias[j] += dz;
                    dzz[at + j] = from_float<T>(dz);
                }
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int which = 0; which < 2; which++) {
                    partial_gamma[(part * 2 + which) * Z + column + j] = dgamma[which][j];
                    partial_beta[(part * 2 + which) * Z + column + j] = dbeta[which][j];
                }
                if (partial_bias) partial_bias[part * Z + column + j] = dbias[j];
            }
        }
        __syncthreads(); // all have read the means: the next head may overwrite them
    }
}

template <typename T, bool NORM>
static void queries_backward_any(Context *context, T *dzz, float *dgamma, float *dbeta, float *dbias,
                                 const T *dq, const T *dk, const T *zz, const T *gamma, const float2 *table,
                                 QueryShape shape, float eps) {
    ScratchScope scope(context);
    int64_t parts = (int64_t)sweep_blocks(shape.rows) * sweep_groups(shape.z / 2, 1),
            Z = (int64_t)shape.H * shape.z;
    float *partial_gamma = take<float>(context, parts * 2 * Z),
          *partial_beta = take<float>(context, parts * 2 * Z);
    float *partial_bias = dbias ? take<float>(context, parts * Z) : nullptr;
    LAUNCH((queries_backward_kernel<T, NORM>), sweep_blocks(shape.rows), SWEEP_THREADS, context, dzz,
           partial_gamma, partial_beta, partial_bias, dq, dk, zz, gamma, table, shape, eps);
    add_partials(context, dgamma, partial_gamma, parts, 2 * Z);
    add_partials(context, dbeta, partial_beta, parts, 2 * Z);
    if (dbias) add_partials(context, dbias, partial_bias, parts, Z);
}

template <typename T>
static void qk_affine_backward(Context *context, T *dzn, float *dgamma, float *dbeta, const T *dq,
                               const T *dk, const T *zn, const T *gamma, int64_t rows, int64_t H,
                               int64_t z) {
    QueryShape shape = {rows, nullptr, 1, (int)H, (int)z, 1};
    queries_backward_any<T, false>(context, dzn, dgamma, dbeta, nullptr, dq, dk, zn, gamma, nullptr, shape,
                                   0.0f);
}
/* Backward of queries_forward; dbias is the gradient of the bias that zz was made with: the column sums of
 * dzz. */
template <typename T>
static void queries_backward(Context *context, T *dzz, float *dgamma, float *dbeta, float *dbias,
                             const T *dq, const T *dk, const T *zz, const T *gamma, const float2 *table,
                             QueryShape shape, float eps) {
    queries_backward_any<T, true>(context, dzz, dgamma, dbeta, dbias, dq, dk, zz, gamma, table, shape, eps);
}

#endif
