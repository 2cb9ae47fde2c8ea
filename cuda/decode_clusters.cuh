/* decode_clusters.cuh - attention of one token a row in bf16, whose parts are put together in shared memory.
 *
 * The 16 blocks of a cluster share out the keys of some columns. Each sends what it knows into the shared
 * memory of the others, every block's share of the columns to that block, and ends its own share when all has
 * come: nothing passes through memory, no block works alone at the end, and the barrier that counts the bytes
 * is all that a block waits for. Heads have at most 256 numbers, so that a warp's eight keys fit in its
 * registers, as the columns of mma.m16n8k16:
 *
 *     lane = 4 group + part: numbers 8 part .. 8 part + 7 of each chunk of 32 of key `group`; as much of the
 *     query, the same in all rows; the scores of keys 2 part and 2 part + 1
 *
 * As in decode_tiles.cuh it does not matter which of the product's k a number is. The keys and values of the
 * tokens before are there before the wait: in registers, or the values in shared memory.
 *
 * A cluster begins when all of its blocks find room in one group of processors. With everything in registers
 * a processor has room for two blocks, and an H100 80GB for 14 clusters. One that finds none works when
 * others have ended, and the next kernel's blocks wait for its beginning. With values in shared memory there
 * is room for three blocks and for 21 clusters, each of them slower: the way for more clusters than find room
 * otherwise.
 *
 * Where there are no such clusters, and for other sizes and types, decode_attention.cuh is the way.
 */
#ifndef CUDA_DECODE_CLUSTERS_CUH
#define CUDA_DECODE_CLUSTERS_CUH

#include "decode_attention.cuh"
#include "hopper.cuh"

enum {
    CLUSTER_BLOCKS = 16,
    CLUSTER_HEAD = 256, /* largest z */
    CLUSTER_CHUNKS = CLUSTER_HEAD / 32,
    CLUSTER_KEYS = 8, /* of a warp at a time */
    CLUSTER_ROUND = DECODE_WARPS * CLUSTER_KEYS, /* of a block at a time */
    CLUSTER_WIDTH = 8, /* columns of a lane */
    CLUSTER_COLUMNS = WARP_SIZE * CLUSTER_WIDTH, /* as many as threads */
    CLUSTER_SHARE = CLUSTER_COLUMNS / CLUSTER_BLOCKS /* columns that a block ends */
};

/* A lane's columns of a warp's values: in registers .. */
template <bool SHARED> struct ClusterValues {
    enum { WARP_BYTES = CLUSTER_COLUMNS * (int)sizeof(float) }; /* of shared memory: for its totals */
    uint4 held[CLUSTER_KEYS];
    __device__ explicit ClusterValues(char *) {}
    /* Asks for number i, or for zeros. some: any place that may be read. */
    __device__ void request(int i, const bf16 *from, const bf16 *, bool here) {
        held[i] = make_uint4(0, 0, 0, 0);
        if (here) held[i] = *(const uint4 *)from;
    }
    __device__ void arrive() const {}
    __device__ uint4 get(int i) const { return held[i]; }
};

/* .. or in the warp's part of shared memory, where at the end its totals take their place. */
template <> struct ClusterValues<true> {
    enum { WARP_BYTES = CLUSTER_KEYS * WARP_SIZE * (int)sizeof(uint4) };
    uint4 *place; /* of the first one; no other lane writes or reads it */
    __device__ explicit ClusterValues(char *memory) : place((uint4 *)memory + threadIdx.x % WARP_SIZE) {}
    __device__ void request(int i, const bf16 *from, const bf16 *some, bool here) {
        copy_early(place + i * WARP_SIZE, here ? from : some, here);
    }
    /* After this they are there. */
    __device__ void arrive() const { wait_for_copies(); }
    __device__ uint4 get(int i) const { return place[i * WARP_SIZE]; }
};

/* A warp's keys and values from one on. Where there is none, zeros. */
template <bool SHARED> struct ClusterKeys {
    enum { WARP_BYTES = ClusterValues<SHARED>::WARP_BYTES, BYTES = DECODE_WARPS * WARP_BYTES };
    uint4 key[CLUSTER_CHUNKS];
    ClusterValues<SHARED> value;
    __device__ explicit ClusterKeys(char *memory) : value(memory) {}

    /* Asks for those from `first` on, before `end`: of the values the lane's columns, if it has any. The new
     * token is number n: its key comes from elsewhere, and so does its value if that is in registers; else it
     * is asked for if it is there, and its place left alone before. */
    __device__ void request(const bf16 *keys, const bf16 *values, int64_t key_step, int64_t value_step, int z,
                            int first, int end, int n, bool there, bool in_row) {
        int lane = (int)threadIdx.x % WARP_SIZE, group = lane / 4, part = lane % 4, before = min(end, n);
        const bf16 *key_row = keys + (first + group) * key_step + part * 8;
        int numbers = first + group < before ? z - part * 8 : 0;
        int rows = in_row ? (SHARED ? end : before) - first : 0;
        bool later = SHARED && !there && n < end;
#pragma unroll
        for (int i = 0; i < CLUSTER_CHUNKS; i++) {
            key[i] = make_uint4(0, 0, 0, 0);
            if (i * 32 < numbers) key[i] = *(const uint4 *)(key_row + i * 32);
        }
        const bf16 *value_row = values + first * value_step;
#pragma unroll
        for (int i = 0; i < CLUSTER_KEYS; i++, value_row += value_step)
            if (!later || first + i != n) value.request(i, value_row, keys, i < rows);
    }
    /* The new token's, if it is among these: number `place` from the first on. new_key: in shared memory. A
     * value in shared memory has come as the others have. */
    __device__ void insert(const uint4 *new_key, const uint4 &newest, int place) {
        int lane = (int)threadIdx.x % WARP_SIZE;
#pragma unroll
        for (int i = 0; i < CLUSTER_CHUNKS; i++)
            if (place == lane / 4) key[i] = new_key[i * 4 + lane % 4];
        if constexpr (!SHARED)
#pragma unroll
            for (int i = 0; i < CLUSTER_KEYS; i++)
                if (place == i) value.held[i] = newest;
    }
};

/* score[i]: of key 2 part + i; -INFINITY from key `count` on. */
template <bool SHARED>
__device__ inline void cluster_scores(float (&score)[2], const uint4 *query, const ClusterKeys<SHARED> &keys,
                                      int count) {
    int part = (int)threadIdx.x % 4;
    float sum[2][4] = {}; // two sums, so that products need not wait for one another
#pragma unroll
    for (int i = 0; i < CLUSTER_CHUNKS; i++) {
        uint4 q = query[i * 4 + part], k = keys.key[i];
        const uint32_t a[2][4] = {{q.x, q.x, q.y, q.y}, {q.z, q.z, q.w, q.w}};
        const uint32_t b[2][2] = {{k.x, k.y}, {k.z, k.w}};
        tensor_product(sum[0], a[0], b[0]);
        tensor_product(sum[1], a[1], b[1]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) score[i] = part * 2 + i < count ? sum[0][i] + sum[1][i] : -INFINITY;
}

/* What a warp knows of its keys: the largest score, the sum of exp(score - it) over the lane's own keys, and
 * those of exp(score - it) value over all keys, in the lane's columns. */
struct ClusterSums { float top, sum, total[CLUSTER_WIDTH]; };

/* Adds some keys to what a warp knows. By a whole warp. */
template <bool SHARED>
__device__ inline void cluster_add(ClusterSums &own, const float (&score)[2],
                                   const ClusterKeys<SHARED> &keys) {
    float largest = fmaxf(own.top, fmaxf(score[0], score[1])), weight[2];
    largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, 2)); // all groups have the same scores
    float keep = __expf(own.top - largest);
    own.top = largest, own.sum *= keep;
#pragma unroll
    for (int i = 0; i < 2; i++) own.sum += weight[i] = __expf(score[i] - largest);
#pragma unroll
    for (int c = 0; c < CLUSTER_WIDTH; c++) own.total[c] *= keep;
#pragma unroll
    for (int i = 0; i < CLUSTER_KEYS; i++) {
        float factor = __shfl_sync(FULL_MASK, weight[i % 2], i / 2), value[CLUSTER_WIDTH];
        unpack<bf16, CLUSTER_WIDTH>(value, keys.value.get(i));
#pragma unroll
        for (int c = 0; c < CLUSTER_WIDTH; c++) own.total[c] = fmaf(factor, value[c], own.total[c]);
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
        bool here = d < p.z; // what comes of other lanes' numbers is zero: so are zz and beta
        if (!here) d = 0;
#pragma unroll
        for (int which = 0; which < 2; which++) {
            int at = (which * p.H + h) * p.z + d;
            gamma[which] = *(const uint4 *)(p.gamma + at);
            beta[which] = here ? *(const uint4 *)(p.beta + at) : make_uint4(0, 0, 0, 0);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) angle[i] = p.rope[n * (p.z / 2) + d / 2 + i];
    }
    /* The lane's numbers of the query (which 0) or the key (1), from those that are normalised.
     * inverse: 1/sqrt z. */
    __device__ void turn(float (&to)[8], const float (&normed)[8], int which, float inverse) const {
        float factor[8], shift[8];
        unpack<bf16, 8>(factor, gamma[which]);
        unpack<bf16, 8>(shift, beta[which]);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            float2 pair = turn_pair(normed[i] * (1.0f + factor[i]) * inverse + shift[i],
                                    normed[i + 1] * (1.0f + factor[i + 1]) * inverse + shift[i + 1],
                                    angle[i / 2], 1);
            to[i] = pair.x, to[i + 1] = pair.y;
        }
    }
};

/* The query (with 1/sqrt z) to shared memory and, where they are not NULL, the new key there and to the
 * state. zz: the lane's numbers, from number 8 lane on. By a whole warp. */
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
    numbers.turn(turned, normed, 0, inverse);
    store<8>((bf16 *)(query + lane), turned);
    if (new_key) {
        numbers.turn(turned, normed, 1, inverse);
        store<8>((bf16 *)(new_key + lane), turned);
        if (kept && d < z) store<8>(kept + d, turned);
    }
    __syncwarp(); // the warp's query and key are there
}

/* What the blocks of a cluster send one another: sums of the receiver's columns, and of the weights. */
struct ClusterMail {
    float totals[CLUSTER_BLOCKS][CLUSTER_SHARE], tops[CLUSTER_BLOCKS], sums[CLUSTER_BLOCKS];
    uint64_t barrier;
};

/* computes: k into the state, and gated = r softmax(q k^T) v over the keys of the chunk so far
 * launch:   grid (16 ceil(e / 256), H, B) in clusters of 16, block 256: a warp takes every 8th eight keys of
 *           the block's part, a lane 8 columns. SHARED: values lie in shared memory
 * traffic:  B (n + 1) (E + Z) 2 bytes, the keys again for each cluster from the L2 cache
 * needs:    Hopper; z at most 256, z, e and pointers in multiples of 16 bytes;
 *           ClusterKeys' BYTES of shared memory
 * numerics: exact products, float sums; keys, warps and parts in a fixed order: deterministic */
template <bool SHARED>
__global__ static void __launch_bounds__(DECODE_THREADS, SHARED ? 3 : 2)
    decode_attention_clusters_kernel(const __grid_constant__ DecodeAttention<bf16> p) {
    extern __shared__ uint4 cluster_memory[]; // WARP_BYTES for each warp
    __shared__ uint4 query[DECODE_WARPS][WARP_SIZE], new_key[WARP_SIZE]; // each warp makes a query for itself
    __shared__ float warp_tops[DECODE_WARPS], warp_sums[DECODE_WARPS];
    __shared__ ClusterMail mail;
    mark(p.launch, STAGE_ENTERED);
    int thread = (int)threadIdx.x, warp = thread / WARP_SIZE, lane = thread % WARP_SIZE;
    int b = (int)blockIdx.z, h = (int)blockIdx.y, rank = (int)blockIdx.x % CLUSTER_BLOCKS;
    int n = (int)((uint64_t)p.count[b] % (uint32_t)p.C), share = n / CLUSTER_BLOCKS + 1, begin = rank * share;
    if (thread == 0) {
        barrier_init(&mail.barrier, 1);
        cluster_barriers_ready();
        barrier_expect(&mail.barrier, CLUSTER_BLOCKS * (CLUSTER_SHARE + 2) * (int)sizeof(float));
    }
    __syncwarp(); // a warp arrives as one
    cluster_arrive(); // the barrier is there, and the block's shared memory its own
    int first_column = (int)blockIdx.x / CLUSTER_BLOCKS * CLUSTER_COLUMNS;
    int column = first_column + lane * CLUSTER_WIDTH;
    int end = min(begin + share, n + 1), base = begin + warp * CLUSTER_KEYS;
    bool in_row = column < p.e, has_new = begin <= n && n < end;
    int64_t key_step = p.H * p.z, value_step = p.H * p.e;
    bf16 *keys = p.k + (int64_t)b * p.C * key_step + h * p.z;
    const bf16 *values = p.v + (int64_t)b * p.C * value_step + h * p.e + column;

    constexpr int BYTES = ClusterKeys<SHARED>::WARP_BYTES;
    char *memory = (char *)cluster_memory + warp * BYTES;
    ClusterKeys<SHARED> held(memory);
    held.request(keys, values, key_step, value_step, p.z, base, end, n, false, in_row);
    QueryNumbers::prefetch(p, h, n);
#pragma unroll 1
    for (int j = begin + CLUSTER_ROUND + warp; j < min(end, n); j += DECODE_WARPS) {
        int at = lane * (DECODE_LINE / (int)sizeof(bf16));
        if (at < p.z) prefetch_bytes(keys + j * key_step + at, 1, 0, 1);
        if (in_row && lane % (DECODE_LINE / (2 * CLUSTER_WIDTH)) == 0)
            prefetch_bytes(values + j * value_step, 1, 0, 1);
    }
    follow_previous_kernel();
    start_next_kernel(); // only now: h2's weights would stand in the way of these keys and values
    mark(p.launch, STAGE_WAITED);

    uint4 zz = make_uint4(0, 0, 0, 0);
    if (lane * 8 < p.z) zz = *(const uint4 *)(p.zz + (b * p.H + h) * p.z + lane * 8);
    QueryNumbers numbers(p, h, n, lane * 8);
    int own_column = first_column + rank * CLUSTER_SHARE + thread;
    bool ends = thread < CLUSTER_SHARE && own_column < p.e;
    int64_t out = (int64_t)(b * p.H + h) * p.e + own_column;
    float gate = ends ? to_float(p.r[out]) : 0.0f;
    bool makes_key = has_new && (n - begin) / CLUSTER_KEYS % DECODE_WARPS == warp;
    uint4 newest = make_uint4(0, 0, 0, 0);
    if (SHARED && makes_key && n - base < CLUSTER_KEYS)
        held.value.request(n - base, values + n * value_step, keys, in_row);
    else if (!SHARED && makes_key && in_row)
        newest = *(const uint4 *)(values + n * value_step);
    cluster_query(query[warp], makes_key ? new_key : nullptr,
                  blockIdx.x < CLUSTER_BLOCKS ? keys + n * key_step : nullptr, numbers, zz, p.z, p.eps);
    mark(p.launch, STAGE_INPUT);

    ClusterSums own = {-FLT_MAX, 0, {}}; // finite: without a key it is multiplied by exp(0)
#pragma unroll 1
    for (; base < end; base += CLUSTER_ROUND) {
        if (base >= begin + CLUSTER_ROUND)
            held.request(keys, values, key_step, value_step, p.z, base, end, n, true, in_row);
        held.value.arrive();
        if (makes_key) held.insert(new_key, newest, n - base);
        float score[2];
        cluster_scores(score, query[warp], held, end - base);
        cluster_add(own, score, held);
    }
    own.sum = lanes_sum(own.sum, 4);
    if (lane == 0) warp_tops[warp] = own.top, warp_sums[warp] = own.sum;
    held.value.arrive(); // in a warp without keys they may still come
    __syncwarp();        // nobody reads them any more
    store<CLUSTER_WIDTH>((float *)memory + lane * CLUSTER_WIDTH, own.total);
    __syncthreads(); // what all warps know is there
    float top = warp_tops[0], sum = 0, all = 0;
#pragma unroll
    for (int i = 1; i < DECODE_WARPS; i++) top = fmaxf(top, warp_tops[i]);
#pragma unroll
    for (int i = 0; i < DECODE_WARPS; i++) {
        float factor = __expf(warp_tops[i] - top);
        sum = fmaf(factor, warp_sums[i], sum);
        all = fmaf(factor, ((const float *)cluster_memory)[i * (BYTES / 4) + thread], all);
    }
    cluster_wait(); // all blocks have begun
    send_there(&mail.totals[rank][thread % CLUSTER_SHARE], &mail.barrier, thread / CLUSTER_SHARE, all);
    if (thread < CLUSTER_BLOCKS) send_there(&mail.tops[rank], &mail.barrier, thread, top);
    if (thread < CLUSTER_BLOCKS) send_there(&mail.sums[rank], &mail.barrier, thread, sum);
    mark(p.launch, STAGE_MULTIPLIED);
    barrier_wait(&mail.barrier, 0); // no block leaves before all has come that is sent to it
    if (ends) {
        top = mail.tops[0], sum = all = 0;
#pragma unroll
        for (int s = 1; s < CLUSTER_BLOCKS; s++) top = fmaxf(top, mail.tops[s]);
#pragma unroll
        for (int s = 0; s < CLUSTER_BLOCKS; s++) {
            float factor = __expf(mail.tops[s] - top);
            sum = fmaf(factor, mail.sums[s], sum);
            all = fmaf(factor, mail.totals[s][thread], all);
        }
        p.gated[out] = from_float<bf16>(__fdividef(all, sum) * gate);
    }
    mark(p.launch, STAGE_ENDED);
}

/* So many clusters find room on the device at the same time; 0: the kernel does not run there. A cluster
 * stays within a group of processors, and not every device must have room in one for more than 8 blocks. */
template <bool SHARED> static int cluster_room(Context *context) {
    auto kernel = decode_attention_clusters_kernel<SHARED>;
    int clusters = 0;
    cudaLaunchAttribute attribute = in_clusters(CLUSTER_BLOCKS);
    cudaLaunchConfig_t config = {dim3(CLUSTER_BLOCKS), dim3(DECODE_THREADS), ClusterKeys<SHARED>::BYTES,
                                 context->stream, &attribute, 1};
    CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    bool runs = CHECK_CUDA_UNLESS(cudaErrorInvalidClusterSize,
                                  cudaOccupancyMaxActiveClusters(&clusters, kernel, &config));
    return runs ? clusters : 0;
}

/* The room for clusters with values in registers; 0: heads of these sizes take another way. */
static inline int attention_cluster_room(Context *context, int64_t z, int64_t e) {
    if (!context->hopper || z > CLUSTER_HEAD || !vectorises<bf16>(z) || !vectorises<bf16>(e)) return 0;
    int room = cluster_room<false>(context), shared_room = cluster_room<true>(context);
    if (DECODE_TIMELINE)
        printf("attention: room for %d clusters with values in registers, %d with them in shared memory\n",
               room, shared_room);
    return shared_room > 0 ? room : 0;
}

template <bool SHARED>
static void launch_clusters(Context *context, const DecodeAttention<bf16> &p, dim3 grid) {
    launch_step(context, "attention", decode_attention_clusters_kernel<SHARED>, grid, DECODE_THREADS, p,
                false, ClusterKeys<SHARED>::BYTES, CLUSTER_BLOCKS);
}

/* room: attention_cluster_room. */
template <typename T>
static void decode_step_attention(Context *context, const DecodeAttention<T> &p, int64_t B, int room) {
    if constexpr (std::is_same<T, bf16>::value)
        if (room > 0) {
            unsigned clusters = blocks_for(p.e, CLUSTER_COLUMNS);
            dim3 grid(CLUSTER_BLOCKS * clusters, (unsigned)p.H, (unsigned)B);
            if (clusters * p.H * B > room) launch_clusters<true>(context, p, grid);
            else launch_clusters<false>(context, p, grid);
            return;
        }
    decode_attention(context, p, B);
}

#endif
