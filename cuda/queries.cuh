/* queries.cuh - from z to queries and keys: z-norm, affine and RoPE, one by one as components and fused for
 * the model.
 */
#ifndef CUDA_QUERIES_CUH
#define CUDA_QUERIES_CUH

#include "common.cuh"

enum { QUERY_WARPS = 8, QUERY_THREADS = QUERY_WARPS * WARP_SIZE, QUERY_ROWS = 16 };

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
    int rows;             /* B T */
    const int64_t *count; /* (B) tokens before, on the device; NULL: none */
    int steps, H, z, C;
};

/* Position in its chunk of token `row` = b T + t. The count is read on the device, so that a recorded pass
 * can be replayed. Most calls have none, and a division of 64 bits costs more than the rest of a kernel
 * here. */
__device__ inline int chunk_position(const QueryShape &shape, int row) {
    int t = row % shape.steps;
    if (!shape.count) return t % shape.C;
    return (int)((shape.count[row / shape.steps] + t) % shape.C);
}

/* The widest vector, of pairs at least, that heads of z elements can be read in; and how many lanes of a
 * warp (a power of two) share a head. */
template <typename T, typename... P> static int head_vector(int64_t z, const P *...pointers) {
    int width = vector_width<T>(z, pointers...);
    return width < 2 ? 2 : width;
}
static inline int head_lanes(int64_t z, int vec) {
    int lanes = 1;
    while (lanes < WARP_SIZE && lanes * vec < z) lanes *= 2;
    return lanes;
}
/* Runs a statement with the constant VEC, which is head_vector's answer. */
#define WITH_PAIRS(T, width, ...)                                                                           \
    do {                                                                                                    \
        if ((width) == 16 / (int)sizeof(T)) {                                                               \
            constexpr int VEC = 16 / (int)sizeof(T);                                                        \
            __VA_ARGS__;                                                                                    \
        } else {                                                                                            \
            constexpr int VEC = 2;                                                                          \
            __VA_ARGS__;                                                                                    \
        }                                                                                                   \
    } while (0)

/* (cos, sin) of VEC / 2 pairs; angles NULL: no turn */
template <int VEC> __device__ inline void load_angles(float (&angle)[VEC], const float2 *angles) {
#pragma unroll
    for (int i = 0; i < VEC; i += 2) angle[i] = 1, angle[i + 1] = 0;
    if (angles) load<VEC>(angle, (const float *)angles);
}
template <int VEC>
__device__ inline void turn(float (&value)[VEC], const float (&angle)[VEC], float direction) {
#pragma unroll
    for (int i = 0; i < VEC; i += 2) {
        float2 turned = turn_pair(value[i], value[i + 1], make_float2(angle[i], angle[i + 1]), direction);
        value[i] = turned.x, value[i + 1] = turned.y;
    }
}

/* computes: zn = NORM ? zz / sqrt(mean over the head of zz^2 + eps) : zz;  q = rope(zn (1 + gamma[0]) /
 * sqrt(z) + beta[0])
 *           and k with gamma[1], beta[1]; zn, or q and k, may be NULL (not wanted), the table too (no turn)
 * launch:   grid ceil(B T H lanes / 256), block 256: `lanes` lanes own a head of a step, each a vector of
 *           pairs and, in a large head, every lanes-th after it
 * traffic:  (1 + outputs) B T Z sizeof(T) bytes, the table from the caches
 * needs:    z even; VEC wants z and pointers in multiples of VEC elements
 * numerics: float, fixed order: deterministic */
template <typename T, int VEC, bool NORM>
__global__ void queries_forward_kernel(T *q, T *k, T *zn, const T *zz, const T *gamma, const T *beta,
                                       const float2 *table, QueryShape shape, float eps, int lanes) {
    int unit = (int)blockIdx.x * (QUERY_THREADS / lanes) + (int)threadIdx.x / lanes;
    bool active = unit < shape.rows * shape.H;
    if (!active) unit = 0; // the shuffles below want every lane
    int lane = (int)threadIdx.x % lanes, z = shape.z, Z = shape.H * z, row = unit / shape.H;
    int h = unit - row * shape.H;
    int64_t at = (int64_t)unit * z;
    const float2 *angles = table ? table + chunk_position(shape, row) * (z / 2) : nullptr;
    float rstd = 1, inverse = 1.0f / sqrtf((float)z), value[VEC], angle[VEC], w[VEC], b[VEC], out[VEC];
    if (NORM) {
        float squares = 0;
        for (int j = lane * VEC; j < z; j += lanes * VEC) {
            load<VEC>(value, zz + at + j);
#pragma unroll
            for (int i = 0; i < VEC; i++) squares += value[i] * value[i];
        }
        rstd = 1.0f / sqrtf(lanes_sum(squares, lanes) / (float)z + eps);
    }
    if (!active) return;
    for (int j = lane * VEC; j < z; j += lanes * VEC) {
        if (!NORM || z > lanes * VEC) load<VEC>(value, zz + at + j);
#pragma unroll
        for (int i = 0; i < VEC; i++) value[i] *= rstd;
        if (zn) store<VEC>(zn + at + j, value);
        if (!q) continue;
        load_angles<VEC>(angle, angles ? angles + j / 2 : nullptr);
#pragma unroll
        for (int which = 0; which < 2; which++) {
            load<VEC>(w, gamma + which * Z + h * z + j);
            load<VEC>(b, beta + which * Z + h * z + j);
#pragma unroll
            for (int i = 0; i < VEC; i++) out[i] = value[i] * (1.0f + w[i]) * inverse + b[i];
            turn<VEC>(out, angle, 1);
            store<VEC>((which ? k : q) + at + j, out);
        }
    }
}

/* ---- heads that a vector a lane holds: what the model runs, but for very wide heads and steps that read the
 * count on the device. A row is asked for while the one before is worked on. ---- */

enum { QUERY_BLOCKS_PER_SM = 3 };

/* Where a thread stands: `lanes` lanes keep a head's columns and walk down every gridDim.x-th of its rows. */
struct QueryWalk {
    int lane, z, Z, column, group, groups;
    bool has; /* columns: the last lanes may have none */
    __device__ QueryWalk(const QueryShape &shape, int lanes, int vec) {
        lane = (int)threadIdx.x % lanes, group = (int)threadIdx.x / lanes, groups = QUERY_THREADS / lanes;
        z = shape.z, Z = shape.H * z, column = (int)blockIdx.y * z + lane * vec, has = lane * vec < z;
    }
    /* (cos, sin) of the columns' pairs in token `row`, where no tokens were before */
    template <int VEC>
    __device__ VectorWords<float, VEC> angles(const float2 *table, const QueryShape &shape, int row) const {
        unsigned position = (unsigned)row % (unsigned)shape.steps % (unsigned)shape.C;
        return words_at<VEC>((const float *)(table + position * (unsigned)(z / 2)) + lane * VEC);
    }
};

/* computes: as queries_forward_kernel with everything wanted but perhaps zn
 * launch:   grid (at most 3 blocks a multiprocessor, H), block 256: see QueryWalk
 * traffic:  (1 + outputs) B T Z sizeof(T) bytes, the table from the caches
 * needs:    z even and at most a vector a lane, no count; VEC wants z and pointers in multiples of VEC
 *           elements
 * numerics: float, fixed order: deterministic */
template <typename T, int VEC>
__global__ void __launch_bounds__(QUERY_THREADS, QUERY_BLOCKS_PER_SM)
    queries_forward_ahead_kernel(T *q, T *k, T *zn, const T *zz, const T *gamma, const T *beta,
                                 const float2 *table, QueryShape shape, float eps, int lanes) {
    QueryWalk walk(shape, lanes, VEC);
    float inverse = rsqrtf((float)walk.z), share = 1.0f / (float)walk.z, w[2][VEC] = {}, b[2][VEC] = {};
    if (walk.has)
#pragma unroll
        for (int which = 0; which < 2; which++) {
            load<VEC>(w[which], gamma + which * walk.Z + walk.column);
            load<VEC>(b[which], beta + which * walk.Z + walk.column);
#pragma unroll
            for (int i = 0; i < VEC; i++) w[which][i] = inverse + inverse * w[which][i];
        }
    VectorWords<T, VEC> next = {};
    VectorWords<float, VEC> next_angle = {};
    int begin = (int)blockIdx.x * walk.groups, stride = (int)gridDim.x * walk.groups;
    auto ask = [&](int row) {
        if (row >= shape.rows || !walk.has) return;
        next = words_at<VEC>(zz + (int64_t)row * walk.Z + walk.column);
        next_angle = walk.template angles<VEC>(table, shape, row);
    };
    ask(begin + walk.group);
    for (; begin < shape.rows; begin += stride) {
        int row = begin + walk.group;
        float value[VEC], angle[VEC], out[VEC], squares = 0;
        numbers_of(value, next);
        numbers_of(angle, next_angle);
#pragma unroll
        for (int i = 0; i < VEC; i++) squares += value[i] * value[i];
        ask(row + stride);
        float rstd = rsqrtf(lanes_sum(squares, lanes) * share + eps);
        if (row >= shape.rows || !walk.has) continue;
        int64_t at = (int64_t)row * walk.Z + walk.column;
#pragma unroll
        for (int i = 0; i < VEC; i++) value[i] *= rstd;
        if (zn) store<VEC>(zn + at, value);
#pragma unroll
        for (int which = 0; which < 2; which++) {
#pragma unroll
            for (int i = 0; i < VEC; i++) out[i] = value[i] * w[which][i] + b[which][i];
            turn<VEC>(out, angle, 1);
            store<VEC>((which ? k : q) + at, out);
        }
    }
}

/* Do the kernels of this part serve the model's forward and backward? */
static inline bool queries_ahead(const QueryShape &shape, int vec) {
    return !shape.count && shape.z <= WARP_SIZE * vec;
}

template <typename T, bool NORM>
static void queries_forward_any(Context *context, T *q, T *k, T *zn, const T *zz, const T *gamma,
                                const T *beta, const float2 *table, QueryShape shape, float eps) {
    WITH_PAIRS(T, head_vector<T>(shape.z, q, k, zn, zz, gamma, beta), {
        int lanes = head_lanes(shape.z, VEC);
        if (NORM && q && table && queries_ahead(shape, VEC)) {
            int64_t blocks = min(ceil_div((int64_t)shape.rows * lanes, QUERY_THREADS),
                                 ceil_div((int64_t)context->num_sms * QUERY_BLOCKS_PER_SM, shape.H));
            LAUNCH((queries_forward_ahead_kernel<T, VEC>), dim3((unsigned)blocks, (unsigned)shape.H),
                   QUERY_THREADS, context, q, k, zn, zz, gamma, beta, table, shape, eps, lanes);
            return;
        }
        LAUNCH((queries_forward_kernel<T, VEC, NORM>),
               blocks_for((int64_t)shape.rows * shape.H * lanes, QUERY_THREADS), QUERY_THREADS, context, q,
               k, zn, zz, gamma, beta, table, shape, eps, lanes);
    });
}
template <typename T>
static void znorm_forward(Context *context, T *zn, const T *zz, int64_t rows, int64_t H, int64_t z,
                          float eps) {
    QueryShape shape = {(int)rows, nullptr, 1, (int)H, (int)z, 1};
    queries_forward_any<T, true>(context, nullptr, nullptr, zn, zz, nullptr, nullptr, nullptr, shape, eps);
}
template <typename T>
static void qk_affine_forward(Context *context, T *q, T *k, const T *zn, const T *gamma, const T *beta,
                              int64_t rows, int64_t H, int64_t z) {
    QueryShape shape = {(int)rows, nullptr, 1, (int)H, (int)z, 1};
    queries_forward_any<T, false>(context, q, k, nullptr, zn, gamma, beta, nullptr, shape, 0.0f);
}
/* znorm_forward, qk_affine_forward and two rope_forwards in one; zn NULL: not wanted */
template <typename T>
static void queries_forward(Context *context, T *q, T *k, T *zn, const T *zz, const T *gamma, const T *beta,
                            const float2 *table, QueryShape shape, float eps) {
    queries_forward_any<T, true>(context, q, k, zn, zz, gamma, beta, table, shape, eps);
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

/* What the backward needs of one vector of a head. */
template <int VEC> struct HeadVector {
    float q[VEC], k[VEC], zn[VEC], zz[VEC]; /* gradients of q and k before RoPE and of zn; zz */
};
template <typename T, int VEC>
__device__ inline void load_head(HeadVector<VEC> &v, const T *dq, const T *dk, const T *zz, const T *gamma,
                                 const float2 *angles, int Z, float inverse) {
    float angle[VEC], w[2][VEC];
    load<VEC>(v.q, dq);
    load<VEC>(v.k, dk);
    load<VEC>(v.zz, zz);
    load<VEC>(w[0], gamma);
    load<VEC>(w[1], gamma + Z);
    load_angles<VEC>(angle, angles);
    turn<VEC>(v.q, angle, -1);
    turn<VEC>(v.k, angle, -1);
#pragma unroll
    for (int i = 0; i < VEC; i++)
        v.zn[i] = inverse * (v.q[i] * (1.0f + w[0][i]) + v.k[i] * (1.0f + w[1][i]));
}

/* Rows of gradients may begin anywhere: only wide vectors, which head_vector has found aligned, are stored as
 * such. */
template <int VEC, typename T> __device__ inline void store_head(T *to, const float (&from)[VEC]) {
    if (VEC == 2)
        to[0] = from_float<T>(from[0]), to[1] = from_float<T>(from[1]);
    else
        store<VEC>(to, from);
}

/* Sums that a thread makes for its vector of columns while it walks down the rows. */
enum { DGAMMA_Q, DGAMMA_K, DBETA_Q, DBETA_K, DBIAS, NUM_QUERY_SUMS };

/* q = rope(zn (1 + g0) / sqrt z + b0), k with g1, b1:  dzn = (dq' (1 + g0) + dk' (1 + g1)) / sqrt z, dq' =
 * dq turned back; dg0 += dq' zn / sqrt z;  db0 += dq';  and NORM: zn = zz rstd, dzz = rstd (dzn - zn
 * mean(dzn zn)), dbias += dzz
 * computes: dzz, partial sums of dgamma (2,Z), dbeta (2,Z) and, if wanted, of dzz (Z)
 * launch:   grid (ceil(B T lanes / (256 16)), H), block 256: as the forward, but a group of lanes keeps its
 *           head and walks down 16 rows; a head too large for a warp is the whole block's
 * traffic:  4 B T Z sizeof(T) bytes, the table from the caches
 * needs:    z even; VEC wants z, dzz_gap and pointers in multiples of VEC elements, but pairs of dzz may
 *           begin anywhere; dzz may not be dq, dk or zz
 * numerics: float sums in a fixed order: deterministic */
template <typename T, int VEC, bool NORM>
__global__ void __launch_bounds__(QUERY_THREADS, 2)
    queries_backward_kernel(T *dzz, float *partial_gamma, float *partial_beta, float *partial_bias,
                            const T *dq, const T *dk, const T *zz, const T *gamma, const float2 *table,
                            QueryShape shape, float eps, int lanes, int dzz_gap) {
    __shared__ SweepSums<VEC> shared;
    __shared__ float warp_sums[QUERY_WARPS];
    int z = shape.z, Z = shape.H * z, column = (int)blockIdx.y * z;
    Sweep sweep(lanes * VEC, VEC);
    bool whole = lanes > WARP_SIZE, wide = z > lanes * VEC; // wide: sums wait in memory from row to row
    float inverse = 1.0f / sqrtf((float)z), sum[NUM_QUERY_SUMS][VEC] = {};
    int64_t row_sums = (int64_t)blockIdx.x * Z + column;
    float *out[NUM_QUERY_SUMS] = {partial_gamma + row_sums + (int64_t)blockIdx.x * Z,
                                  partial_gamma + row_sums + (int64_t)blockIdx.x * Z + Z,
                                  partial_beta + row_sums + (int64_t)blockIdx.x * Z,
                                  partial_beta + row_sums + (int64_t)blockIdx.x * Z + Z,
                                  partial_bias ? partial_bias + row_sums : nullptr};
    HeadVector<VEC> v;
    int first = (int)blockIdx.x * sweep.groups, stride = (int)gridDim.x * sweep.groups;
    for (int begin = first; begin < shape.rows; begin += stride) {
        bool active = begin + sweep.group < shape.rows;
        bool again = begin > first; // then the sums in memory are some
        int row = active ? begin + sweep.group : begin;
        int64_t at = (int64_t)row * Z + column;
        const float2 *angles = table ? table + chunk_position(shape, row) * (z / 2) : nullptr;
        float squares = 0, products = 0;
        for (int j = sweep.lane * VEC; j < z; j += lanes * VEC) {
            load_head<T, VEC>(v, dq + at + j, dk + at + j, zz + at + j, gamma + column + j,
                              angles ? angles + j / 2 : nullptr, Z, inverse);
#pragma unroll
            for (int i = 0; i < VEC; i++) squares += v.zz[i] * v.zz[i], products += v.zn[i] * v.zz[i];
        }
        float rstd = 1, mean = 0; // mean: of dzn zn
        if (NORM) {
            squares = whole ? block_sum(squares, warp_sums) : lanes_sum(squares, lanes);
            products = whole ? block_sum(products, warp_sums) : lanes_sum(products, lanes);
            rstd = 1.0f / sqrtf(squares / (float)z + eps), mean = rstd * products / (float)z;
        }
        for (int j = sweep.lane * VEC; active && j < z; j += lanes * VEC) {
            if (wide)
                load_head<T, VEC>(v, dq + at + j, dk + at + j, zz + at + j, gamma + column + j,
                                  angles ? angles + j / 2 : nullptr, Z, inverse);
#pragma unroll
            for (int s = 0; s < NUM_QUERY_SUMS; s++) {
#pragma unroll
                for (int i = 0; wide && i < VEC; i++) sum[s][i] = again && out[s] ? out[s][j + i] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < VEC; i++) {
                float zn = v.zz[i] * rstd, dz = rstd * (v.zn[i] - zn * mean);
                sum[DGAMMA_Q][i] += v.q[i] * zn * inverse, sum[DGAMMA_K][i] += v.k[i] * zn * inverse;
                sum[DBETA_Q][i] += v.q[i], sum[DBETA_K][i] += v.k[i];
                sum[DBIAS][i] += dz;
                v.zz[i] = dz;
            }
            store_head<VEC>(dzz + at + (int64_t)row * dzz_gap + j, v.zz);
#pragma unroll
            for (int s = 0; s < NUM_QUERY_SUMS; s++)
                if (wide && out[s]) store<VEC>(out[s] + j, sum[s]);
        }
    }
    if (wide) return;
#pragma unroll
    for (int s = 0; s < NUM_QUERY_SUMS; s++)
        if (out[s]) sweep_row<VEC>(out[s], sweep, z, sum[s], shared);
}

/* computes: as queries_backward_kernel with NORM and a table
 * launch:   grid (ceil(B T lanes / (256 16)), H), block 256: see QueryWalk
 * traffic:  4 B T Z sizeof(T) bytes, the table from the caches
 * needs:    z even and at most a vector a lane, no count; VEC wants z, dzz_gap and pointers in multiples of
 *           VEC elements, but pairs of dzz may begin anywhere; dzz may not be dq, dk or zz
 * numerics: float sums in a fixed order: deterministic */
template <typename T, int VEC>
__global__ void __launch_bounds__(QUERY_THREADS, 2)
    queries_backward_ahead_kernel(T *dzz, float *partial_gamma, float *partial_beta, float *partial_bias,
                                  const T *dq, const T *dk, const T *zz, const T *gamma, const float2 *table,
                                  QueryShape shape, float eps, int lanes, int dzz_gap) {
    __shared__ SweepSums<VEC> shared;
    QueryWalk walk(shape, lanes, VEC);
    float inverse = rsqrtf((float)walk.z), share = 1.0f / (float)walk.z, sum[NUM_QUERY_SUMS][VEC] = {};
    VectorWords<T, VEC> w[2] = {}, next_q = {}, next_k = {}, next_zz = {};
    VectorWords<float, VEC> next_angle = {};
    if (walk.has)
        w[0] = words_at<VEC>(gamma + walk.column), w[1] = words_at<VEC>(gamma + walk.Z + walk.column);
    int begin = (int)blockIdx.x * walk.groups, stride = (int)gridDim.x * walk.groups;
    auto ask = [&](int row) {
        if (row >= shape.rows || !walk.has) return;
        int64_t at = (int64_t)row * walk.Z + walk.column;
        next_q = words_at<VEC>(dq + at), next_k = words_at<VEC>(dk + at);
        next_zz = words_at<VEC>(zz + at);
        next_angle = walk.template angles<VEC>(table, shape, row);
    };
    ask(begin + walk.group);
    for (; begin < shape.rows; begin += stride) {
        int row = begin + walk.group;
        float q[VEC], k[VEC], z[VEC], dzn[VEC], angle[VEC], gain[2][VEC], squares = 0, products = 0;
        numbers_of(q, next_q);
        numbers_of(k, next_k);
        numbers_of(z, next_zz);
        numbers_of(gain[0], w[0]);
        numbers_of(gain[1], w[1]);
        numbers_of(angle, next_angle);
        ask(row + stride);
        turn<VEC>(q, angle, -1);
        turn<VEC>(k, angle, -1);
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            dzn[i] = inverse * (q[i] * (1.0f + gain[0][i]) + k[i] * (1.0f + gain[1][i]));
            squares += z[i] * z[i], products += dzn[i] * z[i];
        }
        for (int step = lanes / 2; step > 0; step /= 2) {
            squares += __shfl_xor_sync(FULL_MASK, squares, step);
            products += __shfl_xor_sync(FULL_MASK, products, step);
        }
        float rstd = rsqrtf(squares * share + eps), mean = rstd * products * share; // mean: of dzn zn
        if (row >= shape.rows || !walk.has) continue;
#pragma unroll
        for (int i = 0; i < VEC; i++) {
            float zn = z[i] * rstd, dz = rstd * (dzn[i] - zn * mean);
            sum[DGAMMA_Q][i] += q[i] * zn, sum[DGAMMA_K][i] += k[i] * zn;
            sum[DBETA_Q][i] += q[i], sum[DBETA_K][i] += k[i];
            sum[DBIAS][i] += dz;
            z[i] = dz;
        }
        store_head<VEC>(dzz + (int64_t)row * (walk.Z + dzz_gap) + walk.column, z);
    }
#pragma unroll
    for (int i = 0; i < VEC; i++) sum[DGAMMA_Q][i] *= inverse, sum[DGAMMA_K][i] *= inverse;
    Sweep sweep(lanes * VEC, VEC);
    int64_t head = (int64_t)blockIdx.y * walk.z, row_sums = (int64_t)blockIdx.x * walk.Z + head;
    int64_t two_sums = (int64_t)blockIdx.x * 2 * walk.Z + head;
    sweep_row<VEC>(partial_gamma + two_sums, sweep, walk.z, sum[DGAMMA_Q], shared);
    sweep_row<VEC>(partial_gamma + two_sums + walk.Z, sweep, walk.z, sum[DGAMMA_K], shared);
    sweep_row<VEC>(partial_beta + two_sums, sweep, walk.z, sum[DBETA_Q], shared);
    sweep_row<VEC>(partial_beta + two_sums + walk.Z, sweep, walk.z, sum[DBETA_K], shared);
    sweep_row<VEC>(partial_bias + row_sums, sweep, walk.z, sum[DBIAS], shared);
}

template <typename T, bool NORM>
static void queries_backward_any(Context *context, T *dzz, float *dgamma, float *dbeta, float *dbias,
                                 const T *dq, const T *dk, const T *zz, const T *gamma, const float2 *table,
                                 QueryShape shape, float eps, int dzz_gap) {
    WITH_PAIRS(T, head_vector<T>(shape.z | dzz_gap, dzz, dq, dk, zz, gamma), {
        int lanes = shape.z > WARP_SIZE * VEC ? (int)QUERY_THREADS : head_lanes(shape.z, VEC);
        unsigned blocks = blocks_for((int64_t)shape.rows * lanes, QUERY_THREADS * QUERY_ROWS);
        int64_t Z = (int64_t)shape.H * shape.z;
        float *partial_gamma = take_sum(context, dgamma, blocks, 2 * Z),
              *partial_beta = take_sum(context, dbeta, blocks, 2 * Z),
              *partial_bias = take_sum(context, dbias, blocks, Z);
        if (NORM && table && dgamma && dbeta && dbias && queries_ahead(shape, VEC)) {
            LAUNCH((queries_backward_ahead_kernel<T, VEC>), dim3(blocks, (unsigned)shape.H), QUERY_THREADS,
                   context, dzz, partial_gamma, partial_beta, partial_bias, dq, dk, zz, gamma, table, shape,
                   eps, lanes, dzz_gap);
            return;
        }
        LAUNCH((queries_backward_kernel<T, VEC, NORM>), dim3(blocks, (unsigned)shape.H), QUERY_THREADS,
               context, dzz, partial_gamma, partial_beta, partial_bias, dq, dk, zz, gamma, table, shape, eps,
               lanes, dzz_gap);
    });
}

template <typename T>
static void qk_affine_backward(Context *context, T *dzn, float *dgamma, float *dbeta, const T *dq,
                               const T *dk, const T *zn, const T *gamma, int64_t rows, int64_t H,
                               int64_t z) {
    QueryShape shape = {(int)rows, nullptr, 1, (int)H, (int)z, 1};
    queries_backward_any<T, false>(context, dzn, dgamma, dbeta, nullptr, dq, dk, zn, gamma, nullptr, shape,
                                   0.0f, 0);
}
/* Backward of queries_forward; dbias is the gradient of the bias that zz was made with: the column sums of
 * dzz. The three sums wait for add_sums. dzz_gap: the numbers between rows of dzz. */
template <typename T>
static void queries_backward(Context *context, T *dzz, float *dgamma, float *dbeta, float *dbias,
                             const T *dq, const T *dk, const T *zz, const T *gamma, const float2 *table,
                             QueryShape shape, float eps, int dzz_gap) {
    queries_backward_any<T, true>(context, dzz, dgamma, dbeta, dbias, dq, dk, zz, gamma, table, shape, eps,
                                  dzz_gap);
}

#endif
