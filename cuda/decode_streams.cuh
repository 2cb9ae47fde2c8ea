/* decode_streams.cuh - the products of a step of generation whose weights are many: all of them come through
 * shared memory.
 *
 * Memory is busy only as long as enough of it is on its way. Registers hold half of what a multiprocessor has
 * to multiply of a large product, and threads that ask for more than the load queue takes wait there. Here
 * one thread asks, for whole rows, and hardware brings them (cp.async.bulk), so that all of a
 * multiprocessor's shared memory is on its way at the same time, for a kernel and the next:
 *
 *     a block: one tile of 8 or 16 outputs, whose weights it asks for before the wait; its smallness lets
 *     blocks of the next kernel in as soon as one has ended
 *     a tile: one or two groups of 8 outputs, each with a barrier that counts its bytes; warps share out K in
 *     chunks of 32, two neighbours at a time
 *
 * Weights are the columns of mma.m16n8k16 here and the input its rows: of the sixteen, the first eight are
 * the high parts of the rows of x and the others their low parts (see decode_tiles.cuh), so that both are one
 * product. A lane reads 16 bytes of weights at a time, as there.
 */
#ifndef CUDA_DECODE_STREAMS_CUH
#define CUDA_DECODE_STREAMS_CUH

#include <algorithm>

#include "decode_tiles.cuh"
#include "hopper.cuh"

enum {
    /* Bytes of weights for each multiprocessor from which on products are streams: less than that fits in
     * registers, which are there sooner. */
    STREAM_LEAST = 96 * 1024,
    /* The same of a layer's first products, which are its most: with less, no product of the step is a
     * stream, not even the logits', and the division of shared memory and cache is the driver's. */
    STREAM_STEP_LEAST = 96 * 1024,
    STREAM_TILE_BYTES = 64 * 1024, /* tiles have 16 outputs if these have no more bytes of weights, else 8 */
    STREAM_WARPS = 4, /* of a block: more end sooner, fewer leave registers to the blocks of attention */
    STREAM_THREADS = STREAM_WARPS * WARP_SIZE,
    STREAM_HELD = 2, /* of a thread's vectors of a norm's constants, in registers before the wait */
    STREAM_MAX_SHARED = 110 * 1024 /* at least two blocks a multiprocessor */
};

/* Numbers from a row of the input to the next in shared memory: an odd number of 64 bytes. */
__host__ __device__ inline int stream_stride(int K) { return (K + 63) / 64 * 64 + 32; }

/* Asks for a tile's weights: of each group of eight outputs the rows are neighbours, so that one instruction
 * does. Rows past the last output hold anything: their sums are not written. By one thread, which has
 * initialised the barriers. */
template <int GROUPS>
__device__ inline void stream_request(bf16 *weights, uint64_t *arrived, const DecodeProduct<bf16> &q,
                                      int unit) {
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        int first = (q.second ? unit : unit * GROUPS + g) * 8, bytes = min(8, q.N - first) * q.K * 2;
        barrier_expect(&arrived[g], max(bytes, 0));
        const bf16 *from = (q.second && g ? q.second : q.weight) + (int64_t)first * q.K;
        if (bytes > 0) load_bytes(weights + g * 8 * q.K, from, bytes, &arrived[g]);
    }
}

/* Of all warps, in place of weights: memory of their own could cost a multiprocessor a block. */
template <int ROWS> struct StreamSums { float of[STREAM_WARPS][TILE_OUTPUTS][ROWS + 1]; };

/* Eight numbers of the input and of its norm's weight and bias. */
struct StreamNumbers { uint4 x, weight, bias; };

__device__ inline uint4 stream_words(const bf16 *from, int k) {
    return from ? *(const uint4 *)(from + k) : make_uint4(0, 0, 0, 0);
}

/* Two sums over the `threads` neighbouring threads that share a row, a power of two. */
__device__ inline void stream_row_sums(float (&sum)[2], int threads, float (&scratch)[2][STREAM_WARPS]) {
    int lanes = min(threads, (int)WARP_SIZE), warps = threads / WARP_SIZE;
    int warp = (int)threadIdx.x / WARP_SIZE, first = warp / max(warps, 1) * warps;
#pragma unroll
    for (int i = 0; i < 2; i++) sum[i] = lanes_sum(sum[i], lanes);
    if (warps <= 1) return;
    if (threadIdx.x % WARP_SIZE == 0) scratch[0][warp] = sum[0], scratch[1][warp] = sum[1];
    __syncthreads(); // every warp's part is there
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] = 0;
        for (int j = 0; j < warps; j++) sum[i] += scratch[i][first + j];
    }
}

/* Calls each(k, StreamNumbers) for every vector of a thread, k its place in the row. x: the row. held: of the
 * first ones. */
template <typename Each>
__device__ inline void stream_each(const StreamNumbers (&held)[STREAM_HELD], const DecodeProduct<bf16> &q,
                                   const bf16 *x, int first, int step, Each each) {
#pragma unroll
    for (int i = 0; i < STREAM_HELD; i++)
        if (first + i * step < q.K) each(first + i * step, held[i]);
#pragma unroll 1
    for (int k = first + STREAM_HELD * step; k < q.K; k += step)
        each(k, StreamNumbers{stream_words(x, k), stream_words(q.norm_weight, k),
                              stream_words(q.norm_bias, k)});
}

/* A thread's place in the input: a row has as many threads as there are for each of M rows, M rounded up to a
 * power of two. */
struct StreamPlace {
    int threads, row, first, step;
    __device__ explicit StreamPlace(int M) : threads(STREAM_THREADS) {
        for (int rows = 1; rows < M; rows *= 2) threads /= 2;
        row = (int)threadIdx.x / threads, first = (int)threadIdx.x % threads * 8, step = threads * 8;
    }
};

/* RMSNorm or LayerNorm of all rows, or the rows as they are, to shared memory: (2 parts, M, stride). held:
 * has the constants, and takes the numbers. */
__device__ inline void stream_normalise(bf16 *input, StreamNumbers (&held)[STREAM_HELD], const DecodeTiles &p,
                                        const DecodeProduct<bf16> &q, const StreamPlace &place,
                                        float (&scratch)[2][STREAM_WARPS]) {
    int K = p.K, M = p.products.M, stride = stream_stride(K), first = place.first, step = place.step;
    const bf16 *x = q.x + (int64_t)min(place.row, M - 1) * K;
#pragma unroll
    for (int i = 0; i < STREAM_HELD; i++)
        if (first + i * step < K) held[i].x = stream_words(x, first + i * step);
    /* Mean and variance at once, from what is left of the numbers without the first one: small where the mean
     * is large. */
    float mean = 0, rstd = 1, sum[2] = {}, reference = q.input == DECODE_LAYERNORM ? to_float(x[0]) : 0.0f;
    if (q.input != DECODE_PLAIN) {
        stream_each(held, q, x, first, step, [&](int, const StreamNumbers &numbers) {
            float value[8];
            unpack<bf16, 8>(value, numbers.x);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float difference = value[i] - reference;
                sum[0] += difference, sum[1] = fmaf(difference, difference, sum[1]);
            }
        });
        stream_row_sums(sum, place.threads, scratch);
        float distance = q.input == DECODE_LAYERNORM ? sum[0] * p.inverse_K : 0.0f;
        mean = reference + distance;
        rstd = rsqrtf(fmaxf(fmaf(sum[1], p.inverse_K, -distance * distance), 0.0f) + p.products.eps);
    }
    if (place.row >= M) return;
    stream_each(held, q, x, first, step, [&](int k, const StreamNumbers &numbers) {
        float value[8], weight[8], bias[8], rest[8];
        unpack<bf16, 8>(value, numbers.x);
        unpack<bf16, 8>(weight, numbers.weight);
        unpack<bf16, 8>(bias, numbers.bias);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (q.input != DECODE_PLAIN) value[i] = (value[i] - mean) * rstd * (1.0f + weight[i]) + bias[i];
            rest[i] = value[i] - to_float(from_float<bf16>(value[i]));
        }
        store<8>(input + place.row * stride + k, value);
        store<8>(input + (M + place.row) * stride + k, rest);
    });
}

/* Sends for the rows as they are; wait_for_copies and a barrier follow. */
__device__ inline void stream_plain(bf16 *input, const DecodeProduct<bf16> &q, int M,
                                    const StreamPlace &place) {
    if (place.row >= M) return;
#pragma unroll 1
    for (int k = place.first; k < q.K; k += place.step)
        copy_early(input + place.row * stream_stride(q.K) + k, q.x + (int64_t)place.row * q.K + k, true);
}

/* The warp's sums of groups of outputs: of outputs 8 g + 2 part and the next, for row lane / 4: in the first
 * two numbers its high part's and in the others its low part's. Chunks are taken two by two, and lanes of odd
 * outputs read the second one first: rows of weights lie side by side, so that neighbours of the same k would
 * lie in the same banks. */
template <int GROUPS, bool PLAIN>
__device__ inline void stream_sums(float (&sum)[GROUPS][4], const bf16 *weights, const bf16 *input,
                                   uint64_t *arrived, int K, int M) {
    int warp = (int)threadIdx.x / WARP_SIZE, row = (int)threadIdx.x % WARP_SIZE / 4;
    int stride = stream_stride(K), part = (int)threadIdx.x % 4 * 8, odd = row % 2;
    const bf16 *w = weights + row * K + part, *x = input + row * stride + part;
    const uint4 nothing = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        float part_sum[2][2][4] = {}; // four, so that products need not wait for one another
        barrier_wait(&arrived[g], 0);
#pragma unroll 2
        for (int k = warp * 2 * TILE_CHUNK; k < K; k += STREAM_WARPS * 2 * TILE_CHUNK) {
            uint4 read[2];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int at = k + (i ^ odd) * TILE_CHUNK;
                read[i] = at < K ? *(const uint4 *)(w + g * 8 * K + at) : nothing;
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int at = k + i * TILE_CHUNK;
                uint4 high = nothing, low = nothing, words = odd ? read[1 - i] : read[i];
                if (at < K && row < M) high = *(const uint4 *)(x + at);
                if (at < K && row < M && !PLAIN) low = *(const uint4 *)(x + M * stride + at);
                const uint32_t a[2][4] = {{high.x, low.x, high.y, low.y}, {high.z, low.z, high.w, low.w}};
                const uint32_t b[2][2] = {{words.x, words.y}, {words.z, words.w}};
                tensor_product(part_sum[i][0], a[0], b[0]);
                tensor_product(part_sum[i][1], a[1], b[1]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++)
            sum[g][i] = (part_sum[0][0][i] + part_sum[0][1][i]) + (part_sum[1][0][i] + part_sum[1][1][i]);
    }
}

/* computes: each of the products (see DecodeProduct)
 * launch:   grid tiles, block 32 STREAM_WARPS: a block owns 8 GROUPS outputs, its warps share out K
 * traffic:  the weights, N K 2 bytes each, once for all rows: all that fits in the shared memory of the
 *           multiprocessors is on its way at the same time
 * needs:    Hopper; K a multiple of 32, pointers of 16 bytes, M <= ROWS, stream_bytes of shared memory;
 *           GROUPS 2 where a product is gated
 * numerics: exact products, float sums in a fixed order: deterministic; out may be add */
template <int GROUPS, int ROWS, bool PLAIN>
__global__ void __launch_bounds__(STREAM_THREADS, 640 / STREAM_THREADS) // 96 registers
    decode_streams_kernel(const __grid_constant__ DecodeTiles p) {
    extern __shared__ uint4 stream_memory[];
    __shared__ uint64_t arrived[GROUPS];
    __shared__ float scratch[2][STREAM_WARPS];
    __shared__ TileEnds ends;
    mark(p.launch, STAGE_ENTERED);
    int thread = (int)threadIdx.x, lane = thread % WARP_SIZE, K = p.K, M = ROWS == 1 ? 1 : p.products.M;
    bf16 *weights = (bf16 *)stream_memory, *input = weights + GROUPS * 8 * K;
    StreamSums<ROWS> &sums = *(StreamSums<ROWS> *)stream_memory;
    TilePlace tile = tile_place_of(p, (int)blockIdx.x);
    const DecodeProduct<bf16> &q = *tile.q;
    if (thread == 0) {
        for (int g = 0; g < GROUPS; g++) barrier_init(&arrived[g], 1);
        barriers_ready();
        stream_request<GROUPS>(weights, arrived, q, tile.unit);
    }
    start_next_kernel(); // whose weights so come after these
    StreamPlace place(M);
    StreamNumbers held[STREAM_HELD] = {};
#pragma unroll
    for (int i = 0; i < STREAM_HELD && !PLAIN; i++) {
        int k = place.first + i * place.step;
        if (k >= K) continue;
        held[i].weight = stream_words(q.norm_weight, k), held[i].bias = stream_words(q.norm_bias, k);
    }
    TileEnd end(p, (int)blockIdx.x, GROUPS * 8);
    tile_ends(ends, end);
    follow_previous_kernel();
    mark(p.launch, STAGE_WAITED);

    int64_t added = (int64_t)end.m * q.N + end.j;
    if (end.active && q.add) tile_send_for_word(ends.add[thread], q.add, added);
    if (PLAIN) {
        stream_plain(input, q, M, place);
        wait_for_copies();
    } else {
        stream_normalise(input, held, p, q, place, scratch);
    }
    __syncthreads(); // the input is there, and the barriers for those who wait at them
    mark(p.launch, STAGE_INPUT);
    float sum[GROUPS][4];
    stream_sums<GROUPS, PLAIN>(sum, weights, input, arrived, K, M);
    __syncthreads(); // nobody reads weights any more
#pragma unroll
    for (int i = 0; i < GROUPS * 2; i++)
        if (lane / 4 < ROWS)
            sums.of[thread / WARP_SIZE][i / 2 * 8 + lane % 4 * 2 + i % 2][lane / 4] =
                sum[i / 2][i % 2] + sum[i / 2][i % 2 + 2];
    mark(p.launch, STAGE_MULTIPLIED);
    wait_for_copies();
    __syncthreads(); // all warps' sums are there
    if (end.active) {
        bf16 add = q.add ? ends.add[thread][added & 1] : from_float<bf16>(0.0f);
        float total = tile_total<STREAM_WARPS, ROWS>(sums.of, end.output, end.m), gate = 0;
        if (q.second) gate = tile_total<STREAM_WARPS, ROWS>(sums.of, end.output + 8, end.m);
        tile_finish(end, ends, total, gate, 1.0f, add);
    }
    if (p.products.advance && blockIdx.x == 0 && thread < M) p.products.advance[thread]++;
    mark(p.launch, STAGE_ENDED);
}

/* Dynamic shared memory of a tile of so many outputs: weights and input, later sums. */
static inline size_t stream_bytes(const DecodeTiles &p, int outputs) {
    size_t input = (size_t)(p.plain ? 1 : 2) * (size_t)p.products.M * (size_t)stream_stride(p.K);
    size_t sums = p.products.M == 1 ? sizeof(StreamSums<1>) : sizeof(StreamSums<DECODE_ROWS>);
    return std::max(((size_t)outputs * (size_t)p.K + input) * sizeof(bf16), sums);
}

template <int GROUPS, int ROWS, bool PLAIN>
static void launch_streams(Context *context, const char *name, const DecodeTiles &p) {
    auto kernel = decode_streams_kernel<GROUPS, ROWS, PLAIN>;
    if (!context->dry_run)
        CHECK_CUDA(
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, STREAM_MAX_SHARED));
    launch_step<DecodeTiles>(context, name, kernel, dim3((unsigned)p.tiles), STREAM_THREADS, p, false,
                             stream_bytes(p, GROUPS * 8));
}

template <int GROUPS, int ROWS>
static void launch_streams(Context *context, const char *name, const DecodeTiles &p) {
    if (p.plain) launch_streams<GROUPS, ROWS, true>(context, name, p);
    else launch_streams<GROUPS, ROWS, false>(context, name, p);
}

/* Are there streams in a step, if the weights of a layer's first products are so many numbers? */
static inline bool step_streams(const Context *context, int64_t numbers) {
    return context->hopper &&
           numbers * (int64_t)sizeof(bf16) >= (int64_t)STREAM_STEP_LEAST * context->num_sms;
}

/* Launches the products if their weights are many and the kernel takes them. */
static bool decode_streams(Context *context, const char *name, DecodeTiles p) {
    int64_t weights = 0;
    bool gated = false;
    for (int i = 0; i < p.products.number; i++) {
        const DecodeProduct<bf16> &q = p.products.product[i];
        gated = gated || q.second;
        weights += (int64_t)q.N * q.K * (q.second ? 2 : 1) * (int64_t)sizeof(bf16);
    }
    int outputs = gated || p.K * TILE_OUTPUTS * (int)sizeof(bf16) <= STREAM_TILE_BYTES ? 16 : 8;
    if (!context->streams || weights < (int64_t)STREAM_LEAST * context->num_sms ||
        stream_bytes(p, outputs) > STREAM_MAX_SHARED)
        return false;
    p.tiles = 0;
    for (int i = 0; i < p.products.number; i++) {
        DecodeProduct<bf16> &q = p.products.product[i];
        q.blocks = (int)ceil_div(q.N, q.second ? outputs / 2 : outputs);
        p.tiles += q.blocks;
    }
    bool one = p.products.M == 1;
    if (outputs == 16 && one) launch_streams<2, 1>(context, name, p);
    else if (outputs == 16) launch_streams<2, DECODE_ROWS>(context, name, p);
    else if (one) launch_streams<1, 1>(context, name, p);
    else launch_streams<1, DECODE_ROWS>(context, name, p);
    return true;
}

/* decode_products, in bf16 as streams, or by tiles where they fit. */
template <typename T>
static void decode_step_products(Context *context, const char *name, const DecodeProducts<T> &products) {
    if constexpr (std::is_same<T, bf16>::value) {
        DecodeTiles tiles = {};
        tiles.products = products;
        if (tiles_fit(&tiles)) {
            if (!decode_streams(context, name, tiles)) decode_tiles(context, name, tiles);
            return;
        }
    }
    decode_products(context, products);
}

#endif
