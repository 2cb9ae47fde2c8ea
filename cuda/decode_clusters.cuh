/* decode_clusters.cuh - attention of one token a row, whose parts are put together in shared memory.
 *
 * The blocks of a cluster share out the keys of some columns. Each sends what it knows into the shared memory
 * of the others, every block's share of the columns to that block, and ends its own share when all has come:
 * nothing passes through memory, no block works alone at the end, and the barrier that counts the bytes is all
 * that a block waits for. Heads have at most 256 numbers, so that a warp's eight keys fit in its registers, as
 * the columns of mma.m16n8k16:
 *
 *     lane = 4 group + part: numbers 8 part .. 8 part + 7 of each chunk of 32 of key `group`; as much of the
 *     query, the same in all rows; the scores of keys 2 part and 2 part + 1
 *
 * As in decode_tiles.cuh it does not matter which of the product's k a number is. The keys and values of the
 * tokens before are in registers before the wait.
 */
#ifndef CUDA_DECODE_CLUSTERS_CUH
#define CUDA_DECODE_CLUSTERS_CUH

#include "decode_warps.cuh"
#include "hopper.cuh"

/* 8 or 16: blocks of a cluster in this kernel, which takes the place of the others where sizes allow it. */
#ifndef DECODE_CLUSTERS
#define DECODE_CLUSTERS 0
#endif

enum {
    CLUSTER_HEAD = 256, /* largest z */
    CLUSTER_CHUNKS = CLUSTER_HEAD / 32,
    CLUSTER_KEYS = 8, /* of a warp's product */
    CLUSTER_STEP = DECODE_WARPS * CLUSTER_KEYS /* from a warp's keys to its next ones */
};

/* WIDTH numbers, two of them a word. */
template <int WIDTH> struct alignas(2 * WIDTH) PairWords { uint32_t word[WIDTH / 2]; };

/* A warp's keys and values from one on, in TILES groups. Where there is none, zeros. */
template <int TILES, int WIDTH> struct ClusterKeys {
    uint4 key[TILES][CLUSTER_CHUNKS];
    PairWords<WIDTH> value[TILES][CLUSTER_KEYS];

    /* Asks for those from `first` on, before `end`: of the values the lane's columns, if it has any. */
    __device__ void request(const bf16 *keys, const bf16 *values, int64_t key_step, int64_t value_step, int z,
                            int first, int end, bool in_row) {
        int lane = (int)threadIdx.x % WARP_SIZE, group = lane / 4, part = lane % 4;
#pragma unroll
        for (int t = 0; t < TILES; t++, first += CLUSTER_STEP) {
            const bf16 *key_row = keys + (first + group) * key_step + part * 8;
            int numbers = first + group < end ? z - part * 8 : 0, rows = in_row ? end - first : 0;
#pragma unroll
            for (int i = 0; i < CLUSTER_CHUNKS; i++) {
                key[t][i] = make_uint4(0, 0, 0, 0);
                if (i * 32 < numbers) key[t][i] = *(const uint4 *)(key_row + i * 32);
            }
            const bf16 *value_row = values + first * value_step;
#pragma unroll
            for (int i = 0; i < CLUSTER_KEYS; i++, value_row += value_step) {
                value[t][i] = {};
                if (i < rows) value[t][i] = *(const PairWords<WIDTH> *)value_row;
            }
        }
    }
    /* The new token's, if it is among these: number `place` from the first on. new_key: in shared memory. */
    __device__ void insert(const uint4 *new_key, const PairWords<WIDTH> &newest, int place) {
        int lane = (int)threadIdx.x % WARP_SIZE;
#pragma unroll
        for (int t = 0; t < TILES; t++, place -= CLUSTER_STEP) {
#pragma unroll
            for (int i = 0; i < CLUSTER_CHUNKS; i++)
                if (place == lane / 4) key[t][i] = new_key[i * 4 + lane % 4];
#pragma unroll
            for (int i = 0; i < CLUSTER_KEYS; i++)
                if (place == i) value[t][i] = newest;
        }
    }
};

/* score[t][i]: of key t CLUSTER_STEP + 2 part + i; -INFINITY from key `count` on. */
template <int TILES, int WIDTH>
__device__ inline void cluster_scores(float (&score)[TILES][2], const uint4 *query,
                                      const ClusterKeys<TILES, WIDTH> &keys, int count) {
    int part = (int)threadIdx.x % 4;
    float sum[TILES][2][4] = {}; // two sums, so that products need not wait for one another
#pragma unroll
    for (int i = 0; i < CLUSTER_CHUNKS; i++) {
        uint4 q = query[i * 4 + part];
        const uint32_t a[2][4] = {{q.x, q.x, q.y, q.y}, {q.z, q.z, q.w, q.w}};
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            uint4 k = keys.key[t][i];
            const uint32_t b[2][2] = {{k.x, k.y}, {k.z, k.w}};
            tensor_product(sum[t][0], a[0], b[0]);
            tensor_product(sum[t][1], a[1], b[1]);
        }
    }
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 2; i++)
            score[t][i] = t * CLUSTER_STEP + part * 2 + i < count ? sum[t][0][i] + sum[t][1][i] : -INFINITY;
}

/* Adds some keys to what a warp knows; own.sum: of the lane's own keys. By a whole warp. */
template <int TILES, int WIDTH>
__device__ inline void cluster_add(WarpAttention<WIDTH> &own, const float (&score)[TILES][2],
                                   const ClusterKeys<TILES, WIDTH> &keys) {
    float largest = own.top, weight[TILES][2];
#pragma unroll
    for (int t = 0; t < TILES; t++) largest = fmaxf(largest, fmaxf(score[t][0], score[t][1]));
    largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 2)); // all groups have the same scores
    float keep = __expf(own.top - largest);
    own.top = largest, own.sum *= keep;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < 2; i++) own.sum += weight[t][i] = __expf(score[t][i] - largest);
#pragma unroll
    for (int c = 0; c < WIDTH; c++) own.total[c] *= keep;
#pragma unroll
    for (int t = 0; t < TILES; t++)
#pragma unroll
        for (int i = 0; i < CLUSTER_KEYS; i++) {
            float factor = __shfl_sync(FULL_MASK, weight[t][i % 2], i / 2);
#pragma unroll
            for (int c = 0; c < WIDTH; c += 2) { // a bf16 is the upper half of a float
                uint32_t word = keys.value[t][i].word[c / 2];
                own.total[c] = fmaf(factor, __uint_as_float(word << 16), own.total[c]);
                own.total[c + 1] = fmaf(factor, __uint_as_float(word & ~0xffffu), own.total[c + 1]);
            }
        }
}

/* What turns a lane's numbers d .. d + 7 into the query and the new key. */
struct QueryNumbers {
    uint4 gamma[2], beta[2];
    float2 angle[4];
    /* Asks for all of a head's; by the whole block. */
    __device__ static void prefetch(const DecodeAttention<bf16> &p, int h, int n) {
        int at = (int)threadIdx.x * (DECODE_LINE / (int)sizeof(bf16)), own = h * p.z + at;
        if (at >= p.z) return;
        prefetch_bytes(p.gamma + own, 1, 0, 1), prefetch_bytes(p.gamma + p.H * p.z + own, 1, 0, 1);
        prefetch_bytes(p.beta + own, 1, 0, 1), prefetch_bytes(p.beta + p.H * p.z + own, 1, 0, 1);
        const float2 *angles = p.rope + n * (p.z / 2) + at / 2;
        prefetch_bytes(angles, 1, 0, 1), prefetch_bytes((const char *)angles + DECODE_LINE, 1, 0, 1);
    }
    __device__ QueryNumbers(const DecodeAttention<bf16> &p, int h, int n, int d) {
        if (d >= p.z) d = 0; // what comes of them is zero: so is zz
#pragma unroll
        for (int which = 0; which < 2; which++) {
            int at = (which * p.H + h) * p.z + d;
            gamma[which] = *(const uint4 *)(p.gamma + at), beta[which] = *(const uint4 *)(p.beta + at);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) angle[i] = p.rope[n * (p.z / 2) + d / 2 + i];
    }
};

/* The query (with 1/sqrt z) to shared memory and, where they are not NULL, the new key there and to the state.
 * zz: the lane's numbers, from number 8 lane on. By a whole warp. */
__device__ inline void cluster_query(uint4 *query, uint4 *new_key, bf16 *kept, const QueryNumbers &numbers,
                                     const uint4 &zz, int z, float eps) {
    int lane = (int)threadIdx.x % WARP_SIZE, d = lane * 8;
    float normed[8], turned[8], squares = 0;
    unpack<bf16, 8>(normed, zz);
#pragma unroll
    for (int i = 0; i < 8; i++) squares = fmaf(normed[i], normed[i], squares);
    float inverse = rsqrtf((float)z), rstd = rsqrtf(warp_sum(squares) * (inverse * inverse) + eps);
#pragma unroll
    for (int i = 0; i < 8; i++) normed[i] *= rstd;
    turn_numbers<bf16, 8>(turned, normed, numbers.gamma[0], numbers.beta[0], numbers.angle, inverse);
    store<8>((bf16 *)(query + lane), turned);
    if (new_key) {
        turn_numbers<bf16, 8>(turned, normed, numbers.gamma[1], numbers.beta[1], numbers.angle, inverse);
        store<8>((bf16 *)(new_key + lane), turned);
        if (kept && d < z) store<8>(kept + d, turned);
    }
    __syncwarp(); // the warp's query and key are there
}

/* What the blocks of a cluster send one another: each its sums of the receiver's columns, and of the weights. */
template <int SPLITS, int SHARE> struct ClusterMail {
    float totals[SPLITS][SHARE], tops[SPLITS], sums[SPLITS];
    uint64_t barrier;
};

/* computes: k into the state, and gated = r softmax(q k^T) v over the keys of the chunk so far
 * launch:   grid (SPLITS ceil(e / (32 WIDTH)), H, B) in clusters of SPLITS, block 256: a warp takes every 8th
 *           eight keys (TILES of them at a time), a lane WIDTH columns
 * traffic:  B (n + 1) (E + Z) 2 bytes, the keys again for each cluster from the L2 cache
 * needs:    Hopper; z at most 256, z, e and pointers in multiples of 16 bytes
 * numerics: exact products, float sums; keys, warps and parts in a fixed order: deterministic */
template <int SPLITS, int TILES, int WIDTH>
__global__ void __launch_bounds__(DECODE_THREADS, 2)
    decode_attention_clusters_kernel(const __grid_constant__ DecodeAttention<bf16> p) {
    constexpr int COLUMNS = WARP_SIZE * WIDTH, SHARE = COLUMNS / SPLITS, ROUND = TILES * CLUSTER_STEP;
    __shared__ uint4 query[DECODE_WARPS][WARP_SIZE], new_key[WARP_SIZE]; // each warp makes a query for itself
    __shared__ float warp_totals[DECODE_WARPS][COLUMNS], warp_tops[DECODE_WARPS], warp_sums[DECODE_WARPS];
    __shared__ ClusterMail<SPLITS, SHARE> mail[1];
    mark(p.launch, STAGE_ENTERED);
    start_next_kernel();
    int thread = (int)threadIdx.x, warp = thread / WARP_SIZE, lane = thread % WARP_SIZE;
    int b = (int)blockIdx.z, h = (int)blockIdx.y, rank = (int)blockIdx.x % SPLITS;
    int n = (int)((uint64_t)p.count[b] % (uint32_t)p.C), share = n / SPLITS + 1, begin = rank * share;
    if (thread == 0) {
        barrier_init(&mail->barrier, 1);
        cluster_barriers_ready();
        barrier_expect(&mail->barrier, SPLITS * (SHARE + 2) * (int)sizeof(float));
    }
    __syncwarp(); // a warp arrives as one
    cluster_arrive(); // the barrier is there, and the block's shared memory its own
    int first_column = (int)blockIdx.x / SPLITS * COLUMNS, column = first_column + lane * WIDTH;
    int end = min(begin + share, n + 1), base = begin + warp * CLUSTER_KEYS;
    bool in_row = column < p.e, has_new = begin <= n && n < end;
    int64_t key_step = p.H * p.z, value_step = p.H * p.e;
    bf16 *keys = p.k + (int64_t)b * p.C * key_step + h * p.z;
    const bf16 *values = p.v + (int64_t)b * p.C * value_step + h * p.e + column;

    ClusterKeys<TILES, WIDTH> held;
    held.request(keys, values, key_step, value_step, p.z, base, min(end, n), in_row);
    QueryNumbers::prefetch(p, h, n);
#pragma unroll 1
    for (int j = begin + ROUND + warp; j < min(end, n); j += DECODE_WARPS) {
        int at = lane * (DECODE_LINE / (int)sizeof(bf16));
        if (at < p.z) prefetch_bytes(keys + j * key_step + at, 1, 0, 1);
        if (in_row && lane % (DECODE_LINE / (2 * WIDTH)) == 0) prefetch_bytes(values + j * value_step, 1, 0, 1);
    }
    follow_previous_kernel();
    mark(p.launch, STAGE_WAITED);

    uint4 zz = make_uint4(0, 0, 0, 0);
    if (lane * 8 < p.z) zz = *(const uint4 *)(p.zz + (b * p.H + h) * p.z + lane * 8);
    QueryNumbers numbers(p, h, n, lane * 8);
    int own_column = first_column + rank * SHARE + thread;
    bool ends = thread < SHARE && own_column < p.e;
    int64_t out = (int64_t)(b * p.H + h) * p.e + own_column;
    float gate = ends ? to_float(p.r[out]) : 0.0f;
    bool makes_key = has_new && (n - begin) / CLUSTER_KEYS % DECODE_WARPS == warp;
    PairWords<WIDTH> newest = {};
    if (makes_key && in_row) newest = *(const PairWords<WIDTH> *)(values + n * value_step);
    cluster_query(query[warp], makes_key ? new_key : nullptr,
                  blockIdx.x < SPLITS ? keys + n * key_step : nullptr, numbers, zz, p.z, p.eps);
    mark(p.launch, STAGE_INPUT);

    WarpAttention<WIDTH> own = {-FLT_MAX, 0, {}}; // finite: without a key it is multiplied by exp(0)
#pragma unroll 1
    for (; base < end; base += ROUND) {
        if (base >= begin + ROUND)
            held.request(keys, values, key_step, value_step, p.z, base, min(end, n), in_row);
        if (makes_key) held.insert(new_key, newest, n - base);
        float score[TILES][2];
        cluster_scores(score, query[warp], held, end - base);
        cluster_add(own, score, held);
    }
    own.sum = lanes_sum(own.sum, 4);
    if (lane == 0) warp_tops[warp] = own.top, warp_sums[warp] = own.sum;
    store<WIDTH>(warp_totals[warp] + lane * WIDTH, own.total);
    __syncthreads(); // what all warps know is there
    float top = warp_tops[0], sum = 0, all = 0;
#pragma unroll
    for (int i = 1; i < DECODE_WARPS; i++) top = fmaxf(top, warp_tops[i]);
#pragma unroll
    for (int i = 0; i < DECODE_WARPS; i++) {
        float factor = __expf(warp_tops[i] - top);
        sum = fmaf(factor, warp_sums[i], sum);
        all = fmaf(factor, warp_totals[i][thread % COLUMNS], all);
    }
    cluster_wait(); // all blocks have begun
    if (thread < COLUMNS)
        send_there(&mail->totals[rank][thread % SHARE], &mail->barrier, thread / SHARE, all);
    if (thread < SPLITS) send_there(&mail->tops[rank], &mail->barrier, thread, top);
    if (thread < SPLITS) send_there(&mail->sums[rank], &mail->barrier, thread, sum);
    mark(p.launch, STAGE_MULTIPLIED);
    ask_ahead(p.ahead);
    barrier_wait(&mail->barrier, 0); // no block leaves before all has come that is sent to it
    if (ends) {
        top = mail->tops[0], sum = all = 0;
#pragma unroll
        for (int s = 1; s < SPLITS; s++) top = fmaxf(top, mail->tops[s]);
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            float factor = __expf(mail->tops[s] - top);
            sum = fmaf(factor, mail->sums[s], sum);
            all = fmaf(factor, mail->totals[s][thread], all);
        }
        p.gated[out] = from_float<bf16>(__fdividef(all, sum) * gate);
    }
    mark(p.launch, STAGE_ENDED);
}

template <int SPLITS, int TILES, int WIDTH>
static void launch_attention_clusters(Context *context, const DecodeAttention<bf16> &p, int64_t B) {
    auto kernel = decode_attention_clusters_kernel<SPLITS, TILES, WIDTH>;
    if (SPLITS > 8 && !context->dry_run) // more than every device with clusters takes
        CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    launch_step(context, "attention", kernel,
                dim3(SPLITS * blocks_for(p.e, WARP_SIZE * WIDTH), (unsigned)p.H, (unsigned)B), DECODE_THREADS,
                p, false, 0, SPLITS);
}

/* decode_step_attention, in clusters where they can be. */
template <typename T>
static void decode_cluster_attention(Context *context, const DecodeAttention<T> &p, int64_t B) {
    if constexpr (std::is_same<T, bf16>::value) {
        if (DECODE_CLUSTERS && context->hopper && p.z <= CLUSTER_HEAD &&
            vectorises<bf16>(p.z, p.k, p.zz, p.gamma, p.beta) && vectorises<bf16>(p.e, p.v)) {
            if (DECODE_CLUSTERS == 16) launch_attention_clusters<16, 1, 8>(context, p, B);
            else launch_attention_clusters<8, 2, 4>(context, p, B);
            return;
        }
    }
    decode_step_attention(context, p, B);
}

#endif
