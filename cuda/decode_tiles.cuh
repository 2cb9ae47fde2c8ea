/* decode_tiles.cuh - the products of a step of generation on the tensor cores, in bf16.
 *
 * What a step waits for is not its arithmetic but the way from the end of one kernel to the end of the next,
 * so all that can be done before the wait is done there: weights lie in registers and the constants of norms
 * in shared memory when the input comes. A block has sixteen outputs, its warps share out K in chunks of 32:
 *
 *     rows of mma.m16n8k16: 16 outputs (of a gated product: 8 and their 8 gates) | columns: the rows of x
 *     lane = 4 group + part: weights of outputs group and group + 8, numbers 8 part .. 8 part + 7 of a chunk
 *
 * A lane so reads 16 bytes of each output at a time. Which of the product's k a number is does not matter as
 * long as weights and inputs agree. A plain input goes from memory straight into registers, of one row through
 * shared memory: there a copy brings it past the weights that the next kernel asks for. A normalised one
 * passes through shared memory as two bf16 whose sum it is to 16 bits: of several rows, in two products; of
 * one row, whose product would leave seven columns empty, in two columns of one. With one row, a norm's
 * moments also come in only at the end (see OwnColumn): a warp waits for no numbers but those it multiplies.
 *
 * With one row, a layer's first kernel also is its TimestepNorm and CEMA (an "opening"): c = Re(sum_k c_k
 * (q_k h_k + p_k u)) + omega u = response.x + response.y u, where response depends only on the states that
 * the step before left. Blocks beside those of the layer before's fc2 compute it, before their wait, and
 * move that layer's own states on after it; for the first layer the step's first kernel computes it, while
 * the token is on its way from the host. Each block of the opening then makes all of u and c itself, where
 * sizes allow with four channels a thread that stay in its registers from x to u and c.
 */
#ifndef CUDA_DECODE_TILES_CUH
#define CUDA_DECODE_TILES_CUH

#include "decode_products.cuh"
#include "hopper.cuh"

enum {
    TILE_OUTPUTS = 16,
    TILE_CHUNK = 32, /* numbers of K that a warp multiplies at a time */
    TILE_PAD = 32,   /* between rows of the input in shared memory, so that they lie in other banks */
    TILE_MAX_SHARED = 100 * 1024,
    TILE_BROUGHT = 16 * 1024, /* bytes of a plain row that a copy brings, at most */
    TILE_MANY_THREADS = 704, /* for registers: the next kernel's blocks find some beside 16 warps */
    TILE_SMALL_HELD = 4, /* chunks that each of 16 warps holds at most where these are all of K .. */
    TILE_SMALL_THREADS = 1024, /* .. and, for registers: a block finds room beside one of attention */
    TILE_STATE_LANES = 16, /* lanes that share a channel's states */
    TILE_MANY_CHANNELS = 16 * WARP_SIZE / TILE_STATE_LANES, /* of a block of 16 warps */
    TOKEN_THREADS = 16 * WARP_SIZE,
    TOKEN_MAX_DIM = TOKEN_THREADS * 4
};

/* What an opening needs of the step before. response NULL: only the norm. */
struct DecodePrepared {
    float2 *response; /* (D) */
    double *moments;  /* (2G+2): means, variances, 1 / (count + 1), nothing */
};

/* weight (D), bias (D): TimestepNorm's. mean, var (G): the state, written. u (D): for DecodeStates, where
 * there is a response. 2^lane_bits lanes share a group. */
struct DecodeOpening {
    DecodePrepared prepared;
    const bf16 *weight, *bias;
    double *mean, *var;
    float *u;
    int G, size, lane_bits; /* size D/G */
    int lanes; /* threads of four channels that make a group, see OpeningLane; 0: see opening_statistics */
    float inverse_size;
};

/* The states' part of a step: prepared, of the next layer's mean, var (G), h (D,N,2) and omega (D), or of the
 * final norm's mean and var; and own_h (D,N,2), NULL: none, which moves on by u (D). */
struct DecodeStates {
    DecodePrepared prepared;
    CemaCoefficients coef, own_coef;
    const float *h, *omega, *u;
    float *own_h;
    const double *mean, *var;
    const int64_t *count;
    int D, G, N, blocks; /* blocks: set by the launcher; 0 where D is 0 */
};

struct DecodeTiles {
    DecodeProducts<bf16> products; /* each product's blocks: its tiles */
    DecodeOpening opening;
    DecodeStates states;
    int tiles, tile_blocks, K;
    float inverse_K;
    bool opens, plain; /* plain: so are all inputs */
    bool brought; /* plain, and one row that a copy brings to shared memory */
    int launch; /* the kernel's number in the step, for its timeline */
};

/* The first kernel of a step whose layers open. token: where the host has it. */
struct DecodeToken {
    DecodeStates states; /* of D channels, and without own_h */
    bf16 *x;             /* (D) */
    const bf16 *embed;   /* (V,D) */
    const int32_t *token;
    float scale;
    int launch; /* the kernel's number in the step, for its timeline */
};

/* ----------------------------------------------------------------------------------------------------------
 * Shared memory: constants of a norm, the input in two parts, and what an opening keeps between its phases
 */

struct TileShared {
    uint4 *own;      /* (K/32, OWN_COLUMNS, 4): where warps make their own input, in place of the next two */
    bf16 *constants; /* (3,K) */
    bf16 *input;     /* (inputs, 2 parts, M, K + TILE_PAD) */
    bf16 *x;         /* (K): from here on only in an opening */
    float2 *response, *statistics; /* (K), (G): mean and 1 / standard deviation */
    double *moments;               /* (2G+2) */
};

/* Bytes; with base, also the places. */
__host__ __device__ inline size_t tile_shared(const DecodeTiles &p, char *base, TileShared *to) {
    size_t K = (size_t)p.K, G = (size_t)p.opening.G, rows = (size_t)p.products.M;
    if (p.plain) return p.brought ? K * sizeof(bf16) : 0;
    size_t input = 3 * K * sizeof(bf16), inputs = p.opens ? 2 : 1;
    size_t x = input + inputs * 2 * rows * (K + TILE_PAD) * sizeof(bf16), response = x + K * sizeof(bf16);
    size_t moments = response + K * sizeof(float2), statistics = moments + (2 * G + 2) * sizeof(double);
    if (to)
        *to = TileShared{(uint4 *)base,
                         (bf16 *)base,
                         (bf16 *)(base + input),
                         (bf16 *)(base + x),
                         (float2 *)(base + response),
                         (float2 *)(base + statistics),
                         (double *)(base + moments)};
    return p.opens ? statistics + G * sizeof(float2) : x;
}

/* Sends for `bytes` bytes, a multiple of 16, by the whole block; wait_for_copies and a barrier follow. NULL:
 * zeros. */
template <int THREADS> __device__ inline void tile_send_for(void *to, const void *from, int bytes) {
#pragma unroll 1
    for (int at = (int)threadIdx.x * 16; at < bytes; at += THREADS * 16) {
        if (from) copy_early((char *)to + at, (const char *)from + at, true);
        else *(uint4 *)((char *)to + at) = make_uint4(0, 0, 0, 0);
    }
}

/* Sends for the word of memory in which number `at` of an array lies: its half at % 2. */
__device__ inline void tile_send_for_word(void *to, const bf16 *from, int64_t at) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                 :
                 : "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from + (at & ~1))
                 : "memory");
}

/* A load that stays where it is written. Compilers put one off to the first use of its result, and then it
 * waits for what else is used before. */
__device__ inline uint2 load_here(const uint2 *from) {
    uint2 words;
#ifdef __CUDA_ARCH__
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(from) : "memory");
#else
    words = *from;
#endif
    return words;
}

/* Four numbers, or zeros. */
__device__ inline uint2 four_of(const bf16 *from, int at) {
    return from ? *(const uint2 *)(from + at) : make_uint2(0, 0);
}
__device__ inline void unpack_four(float (&to)[4], uint2 words) {
    to[0] = low_bf16(words.x), to[1] = high_bf16(words.x);
    to[2] = low_bf16(words.y), to[3] = high_bf16(words.y);
}

/* Sends for the norm's constants, K numbers each: (weight, bias), in an opening and RMSNorm's weight. */
template <int THREADS>
__device__ inline void tile_constants(bf16 *to, const DecodeTiles &p, const DecodeProduct<bf16> &q) {
    int bytes = p.K * (int)sizeof(bf16);
    tile_send_for<THREADS>(to, p.opens ? p.opening.weight : q.norm_weight, bytes);
    tile_send_for<THREADS>(to + p.K, p.opens ? p.opening.bias : q.norm_bias, bytes);
    if (p.opens) tile_send_for<THREADS>(to + 2 * p.K, q.norm_weight, bytes);
}

/* Four numbers as two rows of bf16, `distance` numbers apart, whose sum they are. */
__device__ inline void tile_split(bf16 *to, int distance, const float (&value)[4]) {
    /* in pairs, since one instruction rounds two */
    uint2 first = make_uint2(word_of(value[0], value[1]), word_of(value[2], value[3]));
    *(uint2 *)to = first;
    *(uint2 *)(to + distance) =
        make_uint2(word_of(value[0] - low_bf16(first.x), value[1] - high_bf16(first.x)),
                   word_of(value[2] - low_bf16(first.y), value[3] - high_bf16(first.y)));
}

/* Sum over the `threads` neighbouring threads that share a row, a multiple of 32. scratch: a float a warp,
 * not used by the call before. */
__device__ inline float tile_row_sum(float value, int threads, float *scratch) {
    int warps = threads / WARP_SIZE, first = (int)threadIdx.x / threads * warps;
    value = warp_sum(value);
    if (threadIdx.x % WARP_SIZE == 0) scratch[threadIdx.x / WARP_SIZE] = value;
    __syncthreads(); // every warp's part is there
    float total = 0;
    for (int i = 0; i < warps; i++) total += scratch[first + i];
    return total;
}

/* RMSNorm or LayerNorm of all rows, or the rows as they are. A row has as many threads as there are for each
 * of M rows, M rounded up to a power of two. */
template <int WARPS>
__device__ inline void tile_normalise(const DecodeTiles &p, const DecodeProduct<bf16> &q,
                                      const TileShared &shared, float (&scratch)[2][WARPS]) {
    int K = p.K, M = p.products.M, threads = WARPS * WARP_SIZE;
    for (int rows = 1; rows < M; rows *= 2) threads /= 2;
    int row = (int)threadIdx.x / threads, first = (int)threadIdx.x % threads * 4, step = threads * 4;
    const bf16 *x = q.x + (int64_t)min(row, M - 1) * K;
    float mean = 0, sum = 0, value[4], weight[4], bias[4];
    if (q.input == DECODE_LAYERNORM) {
#pragma unroll 4
        for (int k = first; k < K; k += step) {
            load<4>(value, x + k);
            sum += (value[0] + value[1]) + (value[2] + value[3]);
        }
        mean = tile_row_sum(sum, threads, scratch[0]) / (float)K;
        sum = 0;
    }
#pragma unroll 4
    for (int k = first; k < K; k += step) {
        load<4>(value, x + k);
#pragma unroll
        for (int i = 0; i < 4; i++) sum = fmaf(value[i] - mean, value[i] - mean, sum);
    }
    float rstd = 1.0f / sqrtf(tile_row_sum(sum, threads, scratch[1]) / (float)K + p.products.eps);
#pragma unroll 1
    for (int k = first; row < M && k < K; k += step) {
        load<4>(value, x + k);
        load<4>(weight, shared.constants + k);
        load<4>(bias, shared.constants + K + k);
#pragma unroll
        for (int i = 0; i < 4 && q.input != DECODE_PLAIN; i++)
            value[i] = (value[i] - mean) * rstd * (1.0f + weight[i]) + bias[i];
        tile_split(shared.input + row * (K + TILE_PAD) + k, M * (K + TILE_PAD), value);
    }
}

/* ----------------------------------------------------------------------------------------------------------
 * A normalised input of one row, of which each warp makes what it multiplies
 */

/* norm(x) W^T = rstd (sum_k (x_k - x_0) (1 + w_k) W_k - (mean - x_0) sum_k (1 + w_k) W_k) + sum_k b_k W_k,
 * so that no warp has to know mean and rstd before it multiplies. Without x_0 little would be left of these
 * sums where the mean is large; with it no term is larger than about sqrt(K) standard deviations. With one
 * row, the eight columns of mma.m16n8k16 have room for all that these sums are of, which so cost no products
 * of their own: the first two are two bf16 whose sum is (x_k - x_0) (1 + w_k); w_k and 1 make the second
 * sum. */
enum OwnColumn { OWN_HIGH, OWN_LOW, OWN_WEIGHT, OWN_ONE, OWN_BIAS, OWN_COLUMNS };

/* Each two columns are one sum. */
enum OwnSum { OWN_INPUT_SUM, OWN_WEIGHT_SUM, OWN_BIAS_SUM, OWN_SUMS };

enum { OWN_AHEAD = 2 }; /* of a lane's pieces of the input that are read at the same time */

/* A warp's own chunks in pieces, four numbers long, of which a lane has every 32nd. */
template <int WARPS> struct OwnPieces {
    static constexpr int IN_CHUNK = TILE_CHUNK / 4;
    static constexpr int CHUNKS = WARP_SIZE / IN_CHUNK * WARPS; /* from a lane's piece to its next */
    int k, pieces; /* of x, the lane's first number; the whole warp's pieces */
    Packed<bf16, 4> piece[OWN_AHEAD];
    float first; /* x_0 */

    __device__ OwnPieces(int K) {
        int warp = (int)threadIdx.x / WARP_SIZE, lane = (int)threadIdx.x % WARP_SIZE;
        k = (lane / IN_CHUNK * WARPS + warp) * TILE_CHUNK + lane % IN_CHUNK * 4;
        pieces = max(K / TILE_CHUNK - warp + WARPS - 1, 0) / WARPS * IN_CHUNK;
    }
    /* Is there a piece number i? */
    __device__ bool has(int i) const { return (int)threadIdx.x % WARP_SIZE + i * WARP_SIZE < pieces; }
    /* Reads those from number i on. */
    __device__ void read(const bf16 *x, int i) {
        if (i == 0) first = to_float(x[0]);
#pragma unroll
        for (int j = 0; j < OWN_AHEAD; j++) {
            piece[j] = Packed<bf16, 4>{};
            if (has(i + j)) piece[j] = packed<4>(x + k + (i + j) * (CHUNKS * TILE_CHUNK));
        }
    }
    /* The place of number i in a column. */
    __device__ bf16 *place(const TileShared &shared, int i, OwnColumn column) const {
        int chunk = k / TILE_CHUNK + i * CHUNKS;
        return (bf16 *)shared.own + (chunk * OWN_COLUMNS + column) * TILE_CHUNK + k % TILE_CHUNK;
    }
};

/* Sends for the columns that do not depend on x, of the warp's own chunks; wait_for_copies and a barrier of
 * the warp follow. */
template <int WARPS>
__device__ inline void own_constants(const TileShared &shared, int K, const DecodeProduct<bf16> &q) {
    constexpr uint32_t TWO_ONES = 0x3F803F80;
    int warp = (int)threadIdx.x / WARP_SIZE, lane = (int)threadIdx.x % WARP_SIZE;
#pragma unroll 1
    for (int chunk = lane / 4 * WARPS + warp; chunk * TILE_CHUNK < K; chunk += WARP_SIZE / 4 * WARPS) {
        int k = chunk * TILE_CHUNK + lane % 4 * 8;
        uint4 *to = shared.own + chunk * (OWN_COLUMNS * 4) + lane % 4;
        if (q.norm_weight) copy_early(to + OWN_WEIGHT * 4, q.norm_weight + k, true);
        else to[OWN_WEIGHT * 4] = make_uint4(0, 0, 0, 0);
        if (q.norm_bias) copy_early(to + OWN_BIAS * 4, q.norm_bias + k, true);
        else to[OWN_BIAS * 4] = make_uint4(0, 0, 0, 0);
        to[OWN_ONE * 4] = make_uint4(TWO_ONES, TWO_ONES, TWO_ONES, TWO_ONES);
    }
}

/* The columns of x, of the warp's own chunks, whose first pieces have been read; the lane's part of the sums
 * of x - x_0 and of its square. Only LAYERNORM has a mean: elsewhere 0 stands for that sum and for x_0. */
template <int WARPS>
__device__ inline void own_input(float &sum, float &squares, const DecodeProduct<bf16> &q,
                                 const TileShared &shared, OwnPieces<WARPS> &own) {
    float first = q.input == DECODE_LAYERNORM ? own.first : 0.0f;
    sum = squares = 0;
    wait_for_copies();
    __syncwarp(); // the warp's constants are there
#pragma unroll 1
    for (int i = 0; own.has(i); i += OWN_AHEAD) {
        if (i) own.read(q.x, i);
#pragma unroll
        for (int j = 0; j < OWN_AHEAD; j++) {
            if (!own.has(i + j)) break;
            float weight[4], value[4];
            load<4>(weight, own.place(shared, i + j, OWN_WEIGHT));
#pragma unroll
            for (int n = 0; n < 4; n++) {
                float difference = to_float(own.piece[j].v[n]) - first;
                sum += difference, squares = fmaf(difference, difference, squares);
                value[n] = fmaf(difference, weight[n], difference);
            }
            tile_split(own.place(shared, i + j, OWN_HIGH), (OWN_LOW - OWN_HIGH) * TILE_CHUNK, value);
        }
    }
    if (q.input != DECODE_LAYERNORM) sum = 0;
    __syncwarp(); // the warp's columns are there
}

/* What ends a product, from all warps' sums of x - x_0 and of its square. */
struct OwnNorm {
    float distance, rstd; /* mean - x_0, 1 / standard deviation */
    template <int WARPS>
    __device__ OwnNorm(const DecodeTiles &p, const DecodeProduct<bf16> &q, const float (&moments)[2][WARPS]) {
        float sum = 0, squares = 0;
#pragma unroll
        for (int i = 0; i < WARPS; i++) sum += moments[0][i], squares += moments[1][i];
        distance = sum * p.inverse_K;
        float var = fmaxf(fmaf(squares, p.inverse_K, -distance * distance), 0.0f);
        rstd = q.input == DECODE_PLAIN ? 1.0f : rsqrtf(var + p.products.eps);
    }
    /* An output's sum, from those of all warps. */
    template <int WARPS>
    __device__ float total(const float (&sums)[WARPS][TILE_OUTPUTS][OWN_SUMS + 1], int output) const {
        float total = 0, weights = 0, constant = 0;
#pragma unroll 4
        for (int i = 0; i < WARPS; i++) { // few at a time: registers wait for the next tile's weights
            float4 sum = *(const float4 *)sums[i][output];
            total += sum.x, weights += sum.y, constant += sum.z;
        }
        return fmaf(rstd, fmaf(-distance, weights, total), constant);
    }
};

/* ----------------------------------------------------------------------------------------------------------
 * The opening of a layer, for one row
 */

/* Statistics of each group with this step, from x in shared memory; the first block writes them. */
template <int THREADS> __device__ inline void opening_statistics(const DecodeTiles &p, const TileShared &s) {
    constexpr int AHEAD = 4; // numbers that are read at the same time
    const DecodeOpening &o = p.opening;
    int size = o.size, lanes = 1 << o.lane_bits, lane = (int)threadIdx.x & (lanes - 1);
    /* All lanes make the same number of rounds, so that the sums over lanes find them all. */
#pragma unroll 1
    for (int first = 0; first < o.G; first += THREADS >> o.lane_bits) {
        int place = first + ((int)threadIdx.x >> o.lane_bits), g = min(place, o.G - 1);
        const bf16 *x = s.x + g * size;
        float mean = 0, sum = 0, squares = 0;
#pragma unroll
        for (int round = 0; round < 2; round++) { // the mean, then the squares of the differences to it
#pragma unroll 1
            for (int i = lane; i < size; i += AHEAD * lanes) {
                float value[AHEAD];
#pragma unroll
                for (int j = 0; j < AHEAD; j++) value[j] = to_float(x[min(i + j * lanes, size - 1)]);
#pragma unroll
                for (int j = 0; j < AHEAD; j++) {
                    float difference = i + j * lanes < size ? value[j] - mean : 0.0f;
                    sum += difference, squares = fmaf(difference, difference, squares);
                }
            }
            if (round == 0) mean = lanes_sum(sum, lanes) * o.inverse_size, squares = 0;
        }
        float var = lanes_sum(squares, lanes) * o.inverse_size;
        if (lane != 0 || place != g) continue;
        double share = s.moments[2 * o.G], before = s.moments[g], spread = s.moments[o.G + g];
        double difference = (double)mean - before, all_mean = before + share * difference;
        double all_var =
            spread + share * ((double)var - spread) + share * (1 - share) * difference * difference;
        s.statistics[g] = make_float2((float)all_mean, 1.0f / sqrtf((float)all_var + p.products.eps));
        if (blockIdx.x == 0) o.mean[g] = all_mean, o.var[g] = all_var;
    }
}

/* Two inputs: u, and, unless the block's first and so all of its tiles take u, c (1 + RMSNorm's weight)
 * without RMSNorm's own factor, which is one number and comes in at the end. squares[warp]: the sum of the
 * warp's c^2. */
template <int WARPS>
__device__ inline void tile_open(const DecodeTiles &p, const DecodeProduct<bf16> &first, const TileShared &s,
                                 float *squares) {
    constexpr int THREADS = WARPS * WARP_SIZE;
    const DecodeOpening &o = p.opening;
    const bool averages = first.input == DECODE_AVERAGED;
    int K = p.K, size = o.size;
    tile_send_for<THREADS>(s.x, first.x, K * (int)sizeof(bf16));
    tile_send_for<THREADS>(s.moments, o.prepared.moments, (2 * o.G + 2) * (int)sizeof(double));
    if (averages) tile_send_for<THREADS>(s.response, o.prepared.response, K * (int)sizeof(float2));
    wait_for_copies();
    __syncthreads(); // x, the moments, the response and the constants are there
    opening_statistics<THREADS>(p, s);
    __syncthreads(); // all groups' statistics are there
    float sum = 0;
#pragma unroll 1
    for (int k = (int)threadIdx.x * 4; k < K; k += THREADS * 4) {
        float weight[4], bias[4], value[4];
        load<4>(weight, s.constants + k);
        load<4>(bias, s.constants + K + k);
        load<4>(value, s.x + k);
        int g = (int)(((float)k + 0.5f) * o.inverse_size), end = (g + 1) * size; // g = k / size
#pragma unroll
        for (int i = 0; i < 4; i++) {
            if (k + i >= end) g++, end += size;
            float2 statistics = s.statistics[g];
            value[i] = (value[i] - statistics.x) * statistics.y * (1.0f + weight[i]) + bias[i];
        }
        tile_split(s.input + k, K + TILE_PAD, value);
        if (!averages) continue;
        if (blockIdx.x == 0) store<4>(o.u + k, value);
        load<4>(weight, s.constants + 2 * K + k);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 response = s.response[k + i];
            float c = fmaf(response.y, value[i], response.x);
            sum = fmaf(c, c, sum);
            value[i] = c * (1.0f + weight[i]);
        }
        tile_split(s.input + 2 * (K + TILE_PAD) + k, K + TILE_PAD, value);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP_SIZE == 0) squares[threadIdx.x / WARP_SIZE] = sum;
}

/* The same from a thread's four channels, where lanes of a warp make whole groups: nothing waits for other
 * warps between x and the two inputs. */
struct OpeningLane {
    uint2 weight, bias, average;
    int k, group; /* the first channel, its group */
    bool active, averages;

    /* Before the wait. */
    __device__ void prepare(const DecodeTiles &p, const DecodeProduct<bf16> &first) {
        const DecodeOpening &o = p.opening;
        active = (int)threadIdx.x * 4 < p.K, averages = first.input == DECODE_AVERAGED;
        k = active ? (int)threadIdx.x * 4 : 0; // the others work along: sums want whole warps
        group = (int)(((float)k + 0.5f) * o.inverse_size); // k / size
        weight = four_of(o.weight, k), bias = four_of(o.bias, k);
        average = averages ? four_of(first.norm_weight, k) : make_uint2(0, 0);
    }

    /* As tile_open, and x to shared memory. */
    __device__ void open(const DecodeTiles &p, const DecodeProduct<bf16> &first, const TileShared &s,
                         float *squares_of_warps) const {
        const DecodeOpening &o = p.opening;
        const double *moments = o.prepared.moments;
        uint2 words = load_here((const uint2 *)(first.x + k));
        double before = moments[group], spread = moments[o.G + group], share = moments[2 * o.G];
        float4 response[2] = {};
        if (averages) {
            const float4 *from = (const float4 *)(o.prepared.response + k);
            response[0] = from[0], response[1] = from[1];
        }
        float value[4], factor[4], shift[4], sum = 0, squares = 0;
        unpack_four(value, words);
        float reference = __shfl_sync(FULL_MASK, value[0], (int)threadIdx.x % WARP_SIZE & -o.lanes);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float difference = value[i] - reference;
            sum += difference, squares = fmaf(difference, difference, squares);
        }
        for (int step = o.lanes / 2; step > 0; step /= 2) {
            sum += __shfl_xor_sync(FULL_MASK, sum, step);
            squares += __shfl_xor_sync(FULL_MASK, squares, step);
        }
        Pair<float> own = moments_of(reference, sum, squares, o.inverse_size);
        double difference = (double)own.x - before, all_mean = before + share * difference;
        double all_var =
            spread + share * ((double)own.y - spread) + share * (1 - share) * difference * difference;
        float mean = (float)all_mean, rstd = rsqrtf((float)all_var + p.products.eps);
        bool writes = blockIdx.x == 0 && active;
        if (writes && k == group * o.size) o.mean[group] = all_mean, o.var[group] = all_var;
        unpack_four(factor, weight), unpack_four(shift, bias);
#pragma unroll
        for (int i = 0; i < 4; i++) value[i] = (value[i] - mean) * rstd * (1.0f + factor[i]) + shift[i];
        if (active) {
            *(uint2 *)(s.x + k) = words;
            tile_split(s.input + k, p.K + TILE_PAD, value);
        }
        if (!averages) return;
        if (writes) store<4>(o.u + k, value);
        const float from[4][2] = {{response[0].x, response[0].y}, {response[0].z, response[0].w},
                                  {response[1].x, response[1].y}, {response[1].z, response[1].w}};
        unpack_four(factor, average);
        squares = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float c = fmaf(from[i][1], value[i], from[i][0]);
            squares = fmaf(c, c, squares);
            value[i] = c * (1.0f + factor[i]);
        }
        if (active) tile_split(s.input + 2 * (p.K + TILE_PAD) + k, p.K + TILE_PAD, value);
        squares = warp_sum(active ? squares : 0.0f);
        if (threadIdx.x % WARP_SIZE == 0) squares_of_warps[threadIdx.x / WARP_SIZE] = squares;
    }
};

/* One state's part in h = q h + p u. */
struct StateMove {
    float p, q_re, q_im, re, im;
    __device__ StateMove(const CemaCoefficients &coef, const float *h, int64_t i)
        : p(coef.p[i]), q_re(coef.q_re[i]), q_im(coef.q_im[i]), re(h[2 * i]), im(h[2 * i + 1]) {}
};

/* The response of the block's channels. */
template <int THREADS> __device__ inline void decode_response(const DecodeStates &p, int block) {
    int lane = (int)threadIdx.x % TILE_STATE_LANES;
    int d = (block * THREADS + (int)threadIdx.x) / TILE_STATE_LANES, channel = min(d, p.D - 1);
    float constant = 0, factor = 0, omega = p.omega[channel];
#pragma unroll 1
    for (int k = lane; k < p.N; k += TILE_STATE_LANES) {
        int64_t i = (int64_t)channel * p.N + k;
        StateMove s(p.coef, p.h, i);
        float c_re = p.coef.c_re[i], c_im = p.coef.c_im[i];
        constant += c_re * (s.q_re * s.re - s.q_im * s.im) - c_im * (s.q_im * s.re + s.q_re * s.im);
        factor += c_re * s.p;
    }
    constant = lanes_sum(constant, TILE_STATE_LANES), factor = lanes_sum(factor, TILE_STATE_LANES);
    if (lane == 0 && d < p.D) p.prepared.response[d] = make_float2(constant, omega + factor);
}

/* The moments, by one block. */
template <int THREADS> __device__ inline void decode_moments(const DecodeStates &p) {
#pragma unroll 1
    for (int g = (int)threadIdx.x; g < p.G; g += THREADS) {
        double mean = p.mean[g], var = p.var[g]; // both asked for before one is stored
        p.prepared.moments[g] = mean, p.prepared.moments[p.G + g] = var;
    }
    if (threadIdx.x == THREADS - 1) // of another warp, which waits for the count meanwhile
        p.prepared.moments[2 * p.G] = 1 / ((double)p.count[0] + 1);
}

/* The blocks beside the tiles: see DecodeStates. */
template <int THREADS> __device__ inline void decode_states(const DecodeStates &p, int block) {
    int thread = (int)threadIdx.x, lane = thread % TILE_STATE_LANES;
    int d = (block * THREADS + thread) / TILE_STATE_LANES;
    int64_t first = (int64_t)d * p.N;
    if (p.prepared.response) decode_response<THREADS>(p, block);
    if (block == 0) decode_moments<THREADS>(p);
    if (!p.own_h || d >= p.D || lane >= p.N) {
        follow_previous_kernel();
        return;
    }
    StateMove s(p.own_coef, p.own_h, first + lane);
    follow_previous_kernel();
    float u = p.u[d];
#pragma unroll 1
    for (int k = lane;;) {
        float *h = p.own_h + 2 * (first + k);
        h[0] = fmaf(-s.q_im, s.im, fmaf(s.q_re, s.re, s.p * u)), h[1] = fmaf(s.q_im, s.re, s.q_re * s.im);
        k += TILE_STATE_LANES;
        if (k >= p.N) break;
        s = StateMove(p.own_coef, p.own_h, first + k);
    }
}

/* computes: x = scale embed[token], and the response and the moments for layer 0 (see DecodeStates)
 * launch:   grid 2 + states.blocks, block 512: the first block makes x, the second the moments
 * traffic:  the token from the host, about 2 microseconds, and then 4 D bytes; beside it 28 D N
 * needs:    D a multiple of 4 and at most TOKEN_MAX_DIM, pointers of 8 bytes
 * numerics: x exact but for its rounding, the moments in double, the response in float: deterministic */
__global__ static void __launch_bounds__(TOKEN_THREADS, 1)
    decode_token_kernel(const __grid_constant__ DecodeToken p) {
    mark(p.launch, STAGE_ENTERED);
    start_next_kernel();
    int k = (int)threadIdx.x * 4;
    /* The longest way stands first: instructions come from memory as well. And each of its warps asks for the
     * token, so that no barrier stands between that and the row. */
    if (blockIdx.x == 0 && k < p.states.D) {
        int32_t token = *p.token;
        uint2 words = load_here((const uint2 *)(p.embed + (int64_t)token * p.states.D + k));
        mark(p.launch, STAGE_WAITED);
        float value[4];
        unpack_four(value, words);
#pragma unroll
        for (int i = 0; i < 4; i++) value[i] *= p.scale;
        store<4>(p.x + k, value);
    }
    if (blockIdx.x == 1) decode_moments<TOKEN_THREADS>(p.states);
    if (blockIdx.x > 1) decode_response<TOKEN_THREADS>(p.states, (int)blockIdx.x - 2);
    mark(p.launch, STAGE_ENDED);
}

/* ----------------------------------------------------------------------------------------------------------
 * The products
 */

/* A tile: its product, its number in it, and a lane's two rows of weights. */
struct TilePlace {
    const DecodeProduct<bf16> *q;
    int unit;
    const bf16 *row[2];
};

__device__ inline TilePlace tile_place_of(const DecodeTiles &p, int tile) {
    int which = 0, group = (int)threadIdx.x % WARP_SIZE / 4;
    while (tile >= p.products.product[which].blocks) tile -= p.products.product[which++].blocks;
    TilePlace place = {&p.products.product[which], tile, {}};
    const DecodeProduct<bf16> &q = *place.q;
#pragma unroll
    for (int r = 0; r < 2; r++) { // past the end the last output again, which is not written
        int j = q.second ? tile * 8 + group : tile * TILE_OUTPUTS + r * 8 + group;
        place.row[r] = (q.second && r ? q.second : q.weight) + (int64_t)min(j, q.N - 1) * q.K;
    }
    return place;
}

/* A lane's weights in HELD of the warp's chunks, from chunk `first` on. */
template <int WARPS, int HELD>
__device__ inline void tile_weights(uint4 (&held)[HELD][2], const TilePlace &place, int K, int first) {
    int part = (int)threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        int k = (first + i * WARPS) * TILE_CHUNK;
#pragma unroll
        for (int r = 0; r < 2; r++)
            if (k < K) held[i][r] = *(const uint4 *)(place.row[r] + k + part * 8);
    }
}

/* Asks for the weights of the warp's chunks that its registers do not hold. */
template <int WARPS>
__device__ inline void tile_prefetch(const TilePlace &place, int K, int first) {
    int part = (int)threadIdx.x % 4;
#pragma unroll 1
    for (int k = first * TILE_CHUNK; k < K; k += WARPS * TILE_CHUNK)
        if (part < 2) prefetch_bytes((part ? place.row[1] : place.row[0]) + k, 1, 0, 1);
}

/* sum += weights x of a chunk; two sums, so that products need not wait for one another */
__device__ inline void tile_multiply(float (&sum)[2][4], const uint4 (&w)[2], const uint4 &x) {
    const uint32_t a[2][4] = {{w[0].x, w[1].x, w[0].y, w[1].y}, {w[0].z, w[1].z, w[0].w, w[1].w}};
    const uint32_t b[2][2] = {{x.x, x.y}, {x.z, x.w}};
    tensor_product(sum[0], a[0], b[0]);
    tensor_product(sum[1], a[1], b[1]);
}

/* The sums of the held chunks, and then, HELD at a time, of the others. input: in shared memory, unless it is
 * PLAIN and not brought there; the warp's OWN columns lie as its lanes want them. */
template <int WARPS, int HELD, bool OPENS, bool PLAIN, bool OWN>
__device__ inline void tile_sums(float (&sum)[2][4], uint4 (&held)[HELD][2], const DecodeTiles &p, int tile,
                                 const void *input) {
    int warp = (int)threadIdx.x / WARP_SIZE, column = (int)threadIdx.x % WARP_SIZE / 4;
    int part = (int)threadIdx.x % 4, K = p.K, M = p.products.M;
    const int columns = OWN ? (int)OWN_COLUMNS : OPENS ? 2 : M; // the others are zeros
    const uint4 nothing = make_uint4(0, 0, 0, 0);
    const bf16 *x = (const bf16 *)input + column * (PLAIN ? K : K + TILE_PAD);
    const uint4 *own = (const uint4 *)input + column * 4 + part;
    for (int first = warp; first * TILE_CHUNK < K; first += WARPS * HELD) {
        if (first != warp) tile_weights<WARPS>(held, tile_place_of(p, tile), K, first);
        uint4 value[HELD];
#pragma unroll
        for (int i = 0; i < HELD && (PLAIN || OWN); i++) { // all on their way at the same time
            int chunk = first + i * WARPS, k = chunk * TILE_CHUNK;
            const uint4 *from = PLAIN ? (const uint4 *)(x + k + part * 8) : own + chunk * (OWN_COLUMNS * 4);
            value[i] = column < columns && k < K ? *from : nothing;
        }
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            int k = (first + i * WARPS) * TILE_CHUNK;
            if (k >= K) break;
            if (PLAIN || OWN) {
                tile_multiply(sum, held[i], value[i]);
                continue;
            }
            const bf16 *at = x + k + part * 8;
            tile_multiply(sum, held[i], column < columns ? *(const uint4 *)at : nothing);
            if (OPENS) continue; // the second part is the second column
            tile_multiply(sum, held[i],
                          column < columns ? *(const uint4 *)(at + M * (K + TILE_PAD)) : nothing);
        }
        if (WARPS == 16 && HELD == TILE_SMALL_HELD) break; // these were all
    }
}

/* The warp's sums to shared memory: (outputs, ROWS). PAIRS: each is of two columns. */
template <bool PAIRS, int ROWS>
__device__ inline void tile_keep(float (&to)[TILE_OUTPUTS][ROWS + 1], const float (&sum)[2][4]) {
    int lane = (int)threadIdx.x % WARP_SIZE, pair = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        float even = sum[0][i] + sum[1][i], odd = sum[0][i + 1] + sum[1][i + 1];
        float *row = to[i / 2 * 8 + lane / 4];
        if (!PAIRS) row[pair * 2] = even, row[pair * 2 + 1] = odd;
        else if (pair < ROWS) row[pair] = even + odd;
    }
}

/* What the ends of a tile's outputs want, in shared memory. add: for each thread that ends an output. */
struct TileEnds {
    float bias[TILE_OUTPUTS], scale[TILE_OUTPUTS];
    bf16 add[DECODE_ROWS * TILE_OUTPUTS][2]; /* what is added to it, or its neighbour */
    int64_t row[DECODE_ROWS];                /* of the output, for each row of the input */
};

/* A thread ends an output of a row: threads 0, 1, .. those of row 0, threads 16, 17, .. those of row 1. */
struct TileEnd {
    const DecodeProduct<bf16> *q;
    int output, j, m;
    bool active;
    __device__ TileEnd(const DecodeTiles &p, int tile, int tile_outputs = TILE_OUTPUTS) {
        output = (int)threadIdx.x % TILE_OUTPUTS, m = (int)threadIdx.x / TILE_OUTPUTS;
        TilePlace place = tile_place_of(p, tile);
        q = place.q;
        int outputs = q->second ? tile_outputs / 2 : tile_outputs;
        j = place.unit * outputs + output;
        active = m < p.products.M && output < outputs && j < q->N;
    }
};

/* Before the wait: what no kernel of the step writes. */
__device__ inline void tile_ends(TileEnds &ends, const TileEnd &end) {
    if (!end.active) return;
    const DecodeProduct<bf16> &q = *end.q;
    if (end.m == 0) {
        ends.bias[end.output] = q.bias ? to_float(q.bias[end.j]) : 0.0f;
        ends.scale[end.output] = q.scale ? to_float(q.scale[end.j]) : 1.0f;
    }
    if (end.output == 0) ends.row[end.m] = q.count ? (int64_t)end.m * q.C + q.count[end.m] % q.C : end.m;
}

/* An output's sum, from those of all warps: (warps, outputs, rows). */
template <int WARPS, int ROWS>
__device__ inline float tile_total(const float (&sums)[WARPS][TILE_OUTPUTS][ROWS + 1], int output, int m) {
    float total = 0;
#pragma unroll
    for (int i = 0; i < WARPS; i++) total += sums[i][output][m];
    return total;
}

/* total, gate: the sums of the output and of its gate. factor: of the former. add: to the sum. */
__device__ inline void tile_finish(const TileEnd &end, const TileEnds &ends, float total, float gate,
                                   float factor, bf16 add) {
    const DecodeProduct<bf16> &q = *end.q;
    float value = fmaf(total, factor, ends.bias[end.output]);
    if (q.silu) value = silu(value);
    if (q.second) value *= gate;
    value = fmaf(ends.scale[end.output], value, to_float(add));
    int64_t at = ends.row[end.m] * q.N + end.j;
    if (q.wide_out) q.wide_out[at] = value;
    else q.out[at] = from_float<bf16>(value);
}

/* The block's next tile: asks for its weights. Returns its product. */
template <int WARPS, int HELD>
__device__ inline const DecodeProduct<bf16> *tile_request(uint4 (&held)[HELD][2], const DecodeTiles &p,
                                                          int tile) {
    int warp = (int)threadIdx.x / WARP_SIZE;
    TilePlace place = tile_place_of(p, tile);
    tile_weights<WARPS>(held, place, p.K, warp);
    tile_prefetch<WARPS>(place, p.K, warp + WARPS * HELD);
    return place.q;
}

__device__ inline bool same_input(const DecodeProduct<bf16> &a, const DecodeProduct<bf16> &b) {
    return a.x == b.x && a.input == b.input && a.norm_weight == b.norm_weight && a.norm_bias == b.norm_bias;
}

/* computes: each of the products (see DecodeProduct), in the opening after TimestepNorm and CEMA; and beside
 *           them the states' part (see DecodeStates)
 * launch:   grid tile_blocks + states.blocks, block 32 WARPS: a block owns 16 outputs at a time, a warp every
 *           WARPS-th chunk of K
 * traffic:  the weights, N K 2 bytes each, once for all rows; the states' part: 56 D N bytes
 * needs:    K a multiple of 32, pointers of 16 bytes, M <= 8 (OPENS, OWN: 1), tile_shared's bytes of shared
 *           memory
 * numerics: exact products, float sums by chunks, columns, warps in order: deterministic; out may be add */
template <int WARPS, int HELD, bool OPENS, bool PLAIN, bool OWN>
__global__ void __launch_bounds__(WARPS < 16                ? WARPS * WARP_SIZE
                                  : HELD == TILE_SMALL_HELD ? (int)TILE_SMALL_THREADS
                                                            : (int)TILE_MANY_THREADS,
                                  WARPS == 8 ? 3 : 1)
    decode_tiles_kernel(const __grid_constant__ DecodeTiles p) {
    constexpr int THREADS = WARPS * WARP_SIZE, ROWS = OPENS ? 1 : OWN ? (int)OWN_SUMS : (int)DECODE_ROWS;
    extern __shared__ uint4 tile_memory[];
    __shared__ __align__(16) float sums[WARPS][TILE_OUTPUTS][ROWS + 1];
    __shared__ float scratch[2][WARPS];
    __shared__ TileEnds ends;
    __shared__ uint64_t arrived; // counts what is brought
    mark(p.launch, STAGE_ENTERED);
    start_next_kernel();
    if ((int)blockIdx.x >= p.tile_blocks) {
        decode_states<THREADS>(p.states, (int)blockIdx.x - p.tile_blocks);
        return;
    }
    int warp = (int)threadIdx.x / WARP_SIZE, lane = (int)threadIdx.x % WARP_SIZE, K = p.K;
    int tile = (int)blockIdx.x;
    TileShared shared = {};
    if (!PLAIN) tile_shared(p, (char *)tile_memory, &shared);
    uint4 held[HELD][2];
    const bool lanes = OPENS && p.opening.lanes;
    const DecodeProduct<bf16> *q = tile_request<WARPS>(held, p, tile);
    const DecodeProduct<bf16> *constants = q, *ready = nullptr; // whose are, whose input is in shared memory
    if (OWN) own_constants<WARPS>(shared, K, *constants);
    else if (!PLAIN && !lanes) tile_constants<THREADS>(shared.constants, p, *constants);
    OpeningLane opening;
    if (OPENS) opening.prepare(p, *q);
    TileEnd end(p, tile);
    tile_ends(ends, end);
    OwnPieces<WARPS> own(K);
    if (PLAIN && p.brought) {
        if (threadIdx.x == 0) {
            barrier_init(&arrived, 1);
            barriers_ready();
        }
        __syncthreads(); // the barrier is there
    }
    follow_previous_kernel();
    mark(p.launch, STAGE_WAITED);

    if (PLAIN && p.brought) {
        if (threadIdx.x == 0) {
            barrier_expect(&arrived, K * (int)sizeof(bf16));
            load_bytes(tile_memory, q->x, K * (int)sizeof(bf16), &arrived);
        }
        barrier_wait(&arrived, 0);
    }
    if (OPENS) { // one input for all turns
        if (lanes) opening.open(p, *q, shared, scratch[0]);
        else tile_open<WARPS>(p, *q, shared, scratch[0]);
        __syncthreads(); // the input is there
    }
    for (;;) {
        float own_sum = 0, own_squares = 0;
        bool news = !PLAIN && !OPENS && !(ready && same_input(*ready, *q));
        if (news && OWN) {
            if (constants != q) own_constants<WARPS>(shared, K, *q);
            own.read(q->x, 0);
            own_input<WARPS>(own_sum, own_squares, *q, shared, own);
            ready = q;
        } else if (news) {
            if (constants != q) {
                __syncthreads(); // nobody reads another input and its constants any more
                tile_constants<THREADS>(shared.constants, p, *q);
            }
            wait_for_copies(); // of the constants, which are read after a barrier
            tile_normalise<WARPS>(p, *q, shared, scratch);
            __syncthreads(); // the input is there
            ready = q;
        }
        mark(p.launch, STAGE_INPUT);
        int64_t added = (int64_t)end.m * end.q->N + end.j; // an opening adds its x, which is in shared memory
        if (!OPENS && end.active && end.q->add) tile_send_for_word(ends.add[threadIdx.x], end.q->add, added);
        bool averaged = OPENS && q->input == DECODE_AVERAGED;
        float sum[2][4] = {};
        const void *input = shared.input + (averaged ? 2 * (K + TILE_PAD) : 0);
        if (OWN) input = shared.own;
        if (PLAIN) input = p.brought ? (const void *)tile_memory : q->x;
        tile_sums<WARPS, HELD, OPENS, PLAIN, OWN>(sum, held, p, tile, input);
        tile_keep<OPENS || OWN, ROWS>(sums[warp], sum);
        if (news && OWN) {
            own_sum = warp_sum(own_sum), own_squares = warp_sum(own_squares);
            if (lane == 0) scratch[0][warp] = own_sum, scratch[1][warp] = own_squares;
        }
        mark(p.launch, STAGE_MULTIPLIED);
        tile += p.tile_blocks;
        bool last = (WARPS > 8 && !OPENS) || tile >= p.tiles; // the former: there is a block for each tile
        if (!last) q = tile_request<WARPS>(held, p, tile); // on their way while this turn's sums are added up
        wait_for_copies();
        __syncthreads(); // all warps' sums are there
        if (end.active) {
            bf16 add = from_float<bf16>(0.0f);
            if (end.q->add) add = OPENS ? shared.x[end.j] : ends.add[threadIdx.x][added & 1];
            float squares = 0, factor = 1;
            if (OPENS && end.q->input == DECODE_AVERAGED) {
#pragma unroll
                for (int i = 0; i < WARPS; i++) squares += scratch[0][i];
                factor = rsqrtf(fmaf(squares, p.inverse_K, p.products.eps));
            }
            float total, gate = 0;
            if constexpr (OWN) {
                const OwnNorm norm(p, *end.q, scratch);
                total = norm.total(sums, end.output);
                if (end.q->second) gate = norm.total(sums, end.output + 8);
            } else {
                total = tile_total<WARPS, ROWS>(sums, end.output, end.m);
                if (end.q->second) gate = tile_total<WARPS, ROWS>(sums, end.output + 8, end.m);
            }
            tile_finish(end, ends, total, gate, factor, add);
        }
        if (last) break;
        __syncthreads(); // all have read the sums and the ends
        end = TileEnd(p, tile);
        tile_ends(ends, end);
    }
    if (p.products.advance && blockIdx.x == 0 && (int)threadIdx.x < p.products.M)
        p.products.advance[threadIdx.x]++;
    mark(p.launch, STAGE_ENDED);
}

/* ----------------------------------------------------------------------------------------------------------
 * Launchers
 */

template <int WARPS, int HELD, bool OPENS, bool PLAIN, bool OWN = false>
static void launch_tiles(Context *context, const char *name, DecodeTiles &p) {
    auto kernel = decode_tiles_kernel<WARPS, HELD, OPENS, PLAIN, OWN>;
    p.tile_blocks = min(p.tiles, context->num_sms * (WARPS == 8 ? 3 : 1));
    int channels = WARPS * WARP_SIZE / TILE_STATE_LANES;
    p.states.blocks = (int)ceil_div(p.states.D, channels);
    size_t bytes = tile_shared(p, nullptr, nullptr);
    if (bytes > 16 * 1024 && !context->dry_run)
        CHECK_CUDA(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, TILE_MAX_SHARED));
    launch_step<DecodeTiles>(context, name, kernel, dim3((unsigned)(p.tile_blocks + p.states.blocks)),
                             (unsigned)(WARPS * WARP_SIZE), p, false, bytes);
}

static inline void decode_token(Context *context, DecodeToken p) {
    p.states.blocks = (int)ceil_div(p.states.D, TILE_MANY_CHANNELS);
    launch_step(context, "token, states", decode_token_kernel, dim3((unsigned)(2 + p.states.blocks)),
                TOKEN_THREADS, p, true);
}

/* Completes p: are these products, with this opening, what the kernel takes? */
static inline bool tiles_fit(DecodeTiles *p) {
    bool fit = p->products.M <= DECODE_ROWS;
    p->plain = true;
    p->K = p->products.product[0].K, p->inverse_K = 1.0f / (float)p->K;
    p->tiles = 0;
    for (int i = 0; i < p->products.number; i++) {
        DecodeProduct<bf16> &q = p->products.product[i];
        fit = fit && q.K % TILE_CHUNK == 0 &&
              vectorises<bf16>(q.K, q.weight, q.second, q.x, q.norm_weight, q.norm_bias, q.add);
        p->plain = p->plain && q.input == DECODE_PLAIN;
        q.blocks = (int)ceil_div(q.N, q.second ? TILE_OUTPUTS / 2 : (int)TILE_OUTPUTS);
        p->tiles += q.blocks;
    }
    if (p->opens) {
        DecodeOpening *o = &p->opening;
        fit = fit && p->products.M == 1 && vectorises<bf16>(p->K, o->weight, o->bias);
        for (o->lane_bits = 5; o->lane_bits > 0 && o->G << o->lane_bits > 8 * WARP_SIZE;) o->lane_bits--;
        o->size = p->K / o->G, o->inverse_size = 1.0f / (float)o->size;
        /* four channels for each thread of a block, and 1, 2, 4, .. or 32 threads for each group */
        bool lanes = p->K <= 4 * 8 * WARP_SIZE && o->size % 4 == 0 && 4 * WARP_SIZE % o->size == 0;
        o->lanes = lanes ? o->size / 4 : 0;
        for (int i = 0; i < p->products.number; i++) {
            const DecodeProduct<bf16> &q = p->products.product[i];
            fit = fit && (!q.add || q.add == q.x);
        }
    }
    return fit && tile_shared(*p, nullptr, nullptr) <= TILE_MAX_SHARED;
}

/* Few tiles are worked on by more warps each, since a tile stays with its processor. */
static inline void decode_tiles(Context *context, const char *name, DecodeTiles p) {
    p.brought = p.plain && context->hopper && p.products.M == 1 && p.products.number == 1 &&
                p.K * (int)sizeof(bf16) <= TILE_BROUGHT;
    bool few = p.tiles <= context->num_sms, own = p.products.M == 1 && !p.plain;
    bool small = few && p.plain && p.K <= 16 * TILE_SMALL_HELD * TILE_CHUNK;
    if (p.opens) launch_tiles<8, 4, true, false>(context, name, p);
    else if (small) launch_tiles<16, TILE_SMALL_HELD, false, true>(context, name, p);
    else if (few && own) launch_tiles<16, 5, false, false, true>(context, name, p);
    else if (few && p.plain) launch_tiles<16, 5, false, true>(context, name, p);
    else if (few) launch_tiles<16, 5, false, false>(context, name, p);
    else if (own) launch_tiles<8, 4, false, false, true>(context, name, p);
    else if (p.plain) launch_tiles<8, 4, false, true>(context, name, p);
    else launch_tiles<8, 4, false, false>(context, name, p);
}

#endif
