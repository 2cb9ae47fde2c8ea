/* token.cuh - one token a row in one launch: the step of generation in bf16.
 *
 * decode.cuh makes a token with six launches a block, each of which waits for the one before. Here every
 * processor runs one block of threads from the embedding to the logits, and two things keep the device's
 * memory busy:
 *
 *   Weights. A block owns some rows of every matrix. Which bytes it will need is known from the start, so
 *   each warp asks for them in order, through a ring in shared memory, as far ahead as the ring is long: up
 *   to a whole layer. A lane reads only what it asked for itself, so no barrier stands between the copy and
 *   its use.
 *
 *   Results. What one stage hands to the next are a few thousand numbers. They are published as words of 64
 *   bits, two bf16 (or one float) and the epoch, a number that no other layer or step has. Whoever needs a
 *   word reads it until its epoch is the expected one: data and flag arrive together, in one trip through the
 *   L2 cache, and there is no barrier over the grid. A buffer is written again one layer later. By then all
 *   its readers are done, because each of them published what the stages between were made of.
 *
 * The stages of a layer, each over all blocks; the owner of a row of an output keeps what only it needs:
 *
 *   norm       x -> u = TimestepNorm(x), c = CEMA(u)        owners of D: the channel's states
 *   products   c, u -> zz; r, v and h = m Wh1^T + bh1 + x   owners of Z, E, E and D: r, v, h stay
 *   scores     zz -> q k^T                                  a warp takes a run of keys
 *   values     scores -> ar = softmax(scores) v r           owners of E: their columns of the values
 *   products   ar -> y = ar Wh2^T + h                       owners of D
 *   products   y -> hidden = silu(fc1 n) (* fc3 n)          owners of F; n = LayerNorm(y)
 *   products   hidden -> x = alpha fc2 hidden + x           owners of D: x stays as well
 *
 * A product takes the matrix units: up to 8 rows of the batch times 8 rows of weights at once. The warps of a
 * block split K, and their sums are added in a fixed order.
 */
#ifndef CUDA_TOKEN_CUH
#define CUDA_TOKEN_CUH

#include "decode.cuh"

/* Bytes of a layer's weights for each processor from which on one launch is faster than six. With fewer, a
 * layer takes as long as its instructions, of which there are more here: on an H100 mega200M (0.2 MB) takes
 * 0.56 ms a token in one launch and 0.48 in six a layer, mega1.3B (0.8 MB) 1.64 and 1.77. */
#ifndef TOKEN_LEAST_WEIGHTS
#define TOKEN_LEAST_WEIGHTS (512 << 10)
#endif

enum {
    TOKEN_THREADS = 512,
    TOKEN_WARPS = TOKEN_THREADS / WARP_SIZE,
    TOKEN_ROWS = 8,   /* largest batch, and rows of weights in a tile: the matrix unit's sizes */
    TOKEN_DEPTH = 32, /* columns of a tile that are one piece: 16 bytes for each lane */
    TOKEN_PASS = 64,  /* rows of an output that are added up together, with 4 rows of the batch or fewer */
    TOKEN_SUMS = TOKEN_PASS * 4,
    TOKEN_HEAD = 256, /* largest z: 8 entries a lane */
    TOKEN_KEYS = 4,   /* keys whose values a thread has in registers */
    TOKEN_PART = 10,  /* floats of a part of the attention: its top, its sum, 8 columns */
    TOKEN_D = 256,    /* largest B times rows of D that a block owns; the same for E and F below */
    TOKEN_E = 512,
    TOKEN_F = 1024,
    TOKEN_Z = 64,
    TOKEN_PATIENCE = 1 << 24 /* reads of a word that does not come, some seconds */
};

/* The matrices of a layer in the order in which a step reads them; the output matrix follows the last layer.
 * */
enum {
    TOKEN_WZ,
    TOKEN_WH1,
    TOKEN_WR,
    TOKEN_WV,
    TOKEN_WH2,
    TOKEN_FC1,
    TOKEN_FC3,
    TOKEN_FC2,
    TOKEN_MATRICES,
    TOKEN_OUTPUT = TOKEN_MATRICES
};

/* The vectors of a layer and their sizes. */
#define FOR_TOKEN_VECTORS(X)                                                                                 \
    X(timenorm_weight, p.D)                                                                                  \
    X(timenorm_bias, p.D)                                                                                    \
    X(rmsnorm_weight, p.D)                                                                                   \
    X(wz_bias, p.Z)                                                                                          \
    X(wh1_bias, p.D) X(wr_bias, p.E) X(wv_bias, p.E) X(gamma, 2 * p.Z) X(beta, 2 * p.Z)                      \
        X(ffnnorm_weight, p.D) X(ffnnorm_bias, p.D) X(ffn_alpha, p.D)
#define X(name, size) const bf16 *name;
struct TokenVectors {
    FOR_TOKEN_VECTORS(X)
};
#undef X
enum { TOKEN_VECTORS = sizeof(TokenVectors) / sizeof(const bf16 *) };

/* All that a layer reads and writes, in device memory. Pointers are NULL where the configuration has no such
 * thing. */
struct TokenLayer {
    const bf16 *matrix[TOKEN_MATRICES];
    TokenVectors vector;
    const float *omega;
    CemaCoefficients coef;
    double *mean, *var; /* (B,G) */
    float *h;           /* (B,D,N,2) */
    bf16 *k, *v;        /* (B,C,H,z), (B,C,H,e) */
};

struct TokenStep {
    const TokenLayer *layers;                                      /* (L) */
    const bf16 *embed, *final_weight, *final_bias, *output_weight; /* (V,D), (D), (D), (V,D) */
    double *final_mean, *final_var;                                /* (B,G) */
    const float2 *rope;                                            /* (C,z/2) */
    const int32_t *tokens;                                         /* (B) */
    int64_t *count;                                                /* (B), goes up by one */
    unsigned *epoch;                                               /* the last one used; goes up by L + 1 */
    unsigned *arrivals;                                            /* zero between steps */
    uint64_t *x, *uc, *zz, *score, *ar, *y, *hidden; /* words: (B,D/2), (B,2,D/2), (B,Z/2), (B,H,C), ... */
    float *logits;                                   /* (B,V) */
    int L, B, D, N, H, Z, E, F, G, C, V;
    bool swiglu;
    float scale, eps;
};

/* ----------------------------------------------------------------------------------------------------------
 * Instructions
 */

/* 16 bytes from global to shared memory, on their own time; the line's other half comes to the L2 cache. */
__device__ inline void copy_async(void *to, const void *from) {
#ifdef __CUDA_ARCH__
    asm volatile(
        "cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
        "l"(from));
#endif
}
/* What was copied since the last call is a group, which may be empty. */
__device__ inline void end_copy_group() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.commit_group;" ::);
#endif
}
/* Waits until at most `groups` of this thread's groups are on their way. */
template <int groups> __device__ inline void wait_for_copies() {
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#endif
}

/* sum[row, column] += over 16 k: x[row, k] w[column, k]; rows 8 to 15 of the unit stay empty. Lane 4 i + j
 * has, of x's row i and of w's row i, four k (in a's and b's two words, the same for both), and of the sums
 * row i, columns 2 j and 2 j + 1. */
__device__ inline void multiply_tile(float (&sum)[4], unsigned a0, unsigned a1, unsigned b0, unsigned b1) {
#ifdef __CUDA_ARCH__
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%5}, {%7,%8}, "
                 "{%0,%1,%2,%3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a0), "r"(0), "r"(a1), "r"(b0), "r"(b1));
#endif
}

/* Words that blocks hand to each other: each is written and read as a whole, and orders nothing else. */
__device__ inline void write_word(uint64_t *to, uint64_t word) {
#ifdef __CUDA_ARCH__
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(word));
#endif
}
__device__ inline uint64_t read_word(const uint64_t *from) {
    uint64_t word = 0;
#ifdef __CUDA_ARCH__
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(from));
#endif
    return word;
}
__device__ inline void read_two_words(uint64_t (&word)[2], const uint64_t *from) {
#ifdef __CUDA_ARCH__
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0,%1}, [%2];" : "=l"(word[0]), "=l"(word[1]) : "l"(from));
#endif
}
/* A word that never comes is a mistake of ours: the launch ends with an error instead of hanging. */
__device__ inline void lose_patience(int &reads) {
#ifdef __CUDA_ARCH__
    if (++reads == TOKEN_PATIENCE) __trap();
#endif
}

/* ----------------------------------------------------------------------------------------------------------
 * Words
 */

__device__ inline unsigned pack_pair(float x, float y) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(x, y);
    return *(unsigned *)&pair;
}
__device__ inline unsigned epoch_of(uint64_t word) { return (unsigned)(word >> 32); }
__device__ inline void publish(uint64_t *to, unsigned payload, unsigned epoch) {
    write_word(to, (uint64_t)epoch << 32 | payload);
}
__device__ inline unsigned await_word(const uint64_t *from, unsigned epoch) {
    uint64_t word;
    int reads = 0;
    while (epoch_of(word = read_word(from)) != epoch) lose_patience(reads);
    return (unsigned)word;
}

/* 8 neighbouring bf16 of COUNT rows (row i at from[i], NULL: none), each in four words: all rows' words are
 * asked for together, again and again until all have come. */
template <int COUNT>
__device__ inline void await_eights(uint4 (&to)[COUNT], const uint64_t *const (&from)[COUNT],
                                    unsigned epoch) {
    bool ready;
    int reads = 0;
    do {
        uint64_t word[COUNT][2][2];
        ready = true;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (!from[i]) continue;
            read_two_words(word[i][0], from[i]);
            read_two_words(word[i][1], from[i] + 2);
        }
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            if (!from[i]) continue;
#pragma unroll
            for (int j = 0; j < 4; j++) ready = ready && epoch_of(word[i][j / 2][j % 2]) == epoch;
            to[i] = make_uint4((unsigned)word[i][0][0], (unsigned)word[i][0][1], (unsigned)word[i][1][0],
                               (unsigned)word[i][1][1]);
        }
        if (!ready) lose_patience(reads);
    } while (!ready);
}

__device__ inline float first_of(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline float second_of(unsigned pair) { return __uint_as_float(pair & ~0xffffu); }
__device__ inline uint4 pack_eight(const float (&x)[8]) {
    return make_uint4(pack_pair(x[0], x[1]), pack_pair(x[2], x[3]), pack_pair(x[4], x[5]),
                      pack_pair(x[6], x[7]));
}
__device__ inline uint4 eight_at(const bf16 *from) { return *(const uint4 *)from; }

/* ----------------------------------------------------------------------------------------------------------
 * How the work is shared out
 */

struct TokenRows {
    int first, count;
};

/* The rows of an output of N that a block makes: its part of N / blocks, in whole units. */
__host__ __device__ inline TokenRows token_rows(int N, int unit, int block, int blocks) {
    int64_t units = (N + unit - 1) / unit;
    int first = (int)(units * block / blocks) * unit, last = (int)(units * (block + 1) / blocks) * unit;
    return TokenRows{first, (last < N ? last : N) - first};
}

/* The columns of a product, in pieces of TOKEN_DEPTH, that a warp takes; every warp of a block has `most` at
 * most. */
struct TokenColumns {
    int first, count, most;
};
__host__ __device__ inline TokenColumns token_columns(int K, int warp) {
    int pieces = K / TOKEN_DEPTH, most = (pieces + TOKEN_WARPS - 1) / TOKEN_WARPS, first = warp * most;
    int count = pieces - first < most ? pieces - first : most;
    return TokenColumns{first, count > 0 ? count : 0, most};
}
/* Distance of two rows in a warp's slab, which holds its columns of an input: an odd number of 64 bytes, so
 * that the matrix unit's reads of two rows meet different banks. */
__host__ __device__ inline int slab_stride(int K) { return (token_columns(K, 0).most | 1) * TOKEN_DEPTH; }
/* Rows of an output that are added up together. */
__host__ __device__ inline int pass_rows(int B) {
    return TOKEN_SUMS / B < TOKEN_PASS ? TOKEN_SUMS / B / TOKEN_ROWS * TOKEN_ROWS : (int)TOKEN_PASS;
}

struct TokenMatrix {
    int first, count, K, warps;
}; /* the rows that the block owns; how many warps have columns */

/* The smallest power of two that is not below count is 1 << span_shift(count): indices are split by shifts,
 * since a division takes as long as a small product. */
__device__ inline int span_shift(int count) { return count > 1 ? WARP_SIZE - __clz(count - 1) : 0; }

/* `count` keys from key `key` of row b and head h on, through the keys of the next heads and rows. */
struct TokenRun {
    int b, h, key, count;
    __device__ void next(int n, int H) {
        count--;
        if (key++ < n) return;
        key = 0;
        if (++h == H) h = 0, b++;
    }
};

/* Places in shared memory after TokenShared, in bytes. */
struct TokenLayout {
    int slabs, slab, norms, norm, sums, sum, ring, end;
};

/* What the threads of a block share. Arrays of rows are [b][row of the block]. */
struct TokenShared {
    TokenLayout layout;
    TokenRows D, E;
    int group_size, first_group, groups; /* of TimestepNorm, those that the block has channels of */
    TokenRun run[TOKEN_WARPS];           /* the keys that each warp takes */
    TokenMatrix matrix[TOKEN_MATRICES + 1];
    int vector_bytes[TOKEN_VECTORS];
    TokenLayer layer[2]; /* this one and the next */
    float2 moments[TOKEN_WARPS][TOKEN_ROWS];
    float x[TOKEN_D], h[TOKEN_D], u[TOKEN_D], still[TOKEN_D], gain[TOKEN_D];
    float time_weight[TOKEN_D], time_bias[TOKEN_D], h_bias[TOKEN_D], alpha[TOKEN_D];
    double mean[TOKEN_D], var[TOKEN_D]; /* new statistics, [b][group of the block] */
    float r[TOKEN_E], r_bias[TOKEN_E], v_bias[TOKEN_E];
    alignas(16) bf16 v[TOKEN_E];
    float z_bias[TOKEN_Z], gate[TOKEN_F];
    int token[TOKEN_ROWS];
    double count[TOKEN_ROWS];
};

__host__ __device__ inline TokenLayout token_layout(const TokenStep &p, int blocks, int ring) {
    TokenLayout l;
    int widest = slab_stride(p.D), units = (p.E / 8 + blocks - 1) / blocks;
    if (widest < slab_stride(p.E)) widest = slab_stride(p.E);
    if (widest < slab_stride(p.F)) widest = slab_stride(p.F);
    int attention = units * TOKEN_WARPS * TOKEN_PART, product = TOKEN_WARPS * p.B * pass_rows(p.B);
    l.slab = p.B * widest * (int)sizeof(bf16);
    l.norm = 2 * token_columns(p.D, 0).most * TOKEN_DEPTH * (int)sizeof(bf16);
    l.sum = (attention > product ? attention : product) * (int)sizeof(float);
    l.slabs = ((int)sizeof(TokenShared) + 127) / 128 * 128;
    l.norms = l.slabs + TOKEN_WARPS * l.slab;
    l.sums = l.norms + TOKEN_WARPS * l.norm;
    l.ring = (l.sums + 2 * l.sum + 127) / 128 * 128;
    l.end = l.ring + TOKEN_WARPS * ring * WARP_SIZE * (int)sizeof(uint4);
    return l;
}

/* A thread's view of its block. Registers are few: what can be had from shared memory is left there. */
struct TokenBlock {
    TokenShared *shared;
    int n;                /* tokens of the chunk before this one */
    int slab_at, norm_at; /* places in shared memory, in bytes: of the warp's input and norm weights ... */
    int sums_at, other;   /* ... and of the block's two buffers of sums, the first to be used next */
    __device__ int thread() const { return (int)threadIdx.x; }
    __device__ int warp() const { return (int)threadIdx.x / WARP_SIZE; }
    __device__ int lane() const { return (int)threadIdx.x % WARP_SIZE; }
    /* lane = 4 row + column: its place in the matrix unit */
    __device__ int row() const { return lane() / 4; }
    __device__ int column() const { return lane() % 4; }
    __device__ char *at(int place) const { return (char *)shared + place; }
    __device__ bf16 *slab() const { return (bf16 *)at(slab_at); }
    __device__ bf16 *norm() const { return (bf16 *)at(norm_at); }
    /* The buffers take turns, with a barrier between writing and reading one: when a buffer's turn comes
     * again, the other's barrier has passed, and with it all readers. */
    __device__ float *next_sums() {
        int next = sums_at;
        sums_at = other, other = next;
        return (float *)at(next);
    }
};

/* ----------------------------------------------------------------------------------------------------------
 * The stream of weights
 */

/* A warp's pieces of all weights of a step, in the order of use: matrix by matrix, tiles of 8 rows, pieces of
 * 32 columns. A lane has 8 columns of one row. RING - 1 pieces are on their way at any time. */
template <int RING> struct WeightStream {
    const TokenStep &p;
    const TokenMatrix *matrix;
    uint4 *ring;                    /* this lane's place in the first slot */
    const bf16 *from, *next_weight; /* the next piece; the matrix after the one that is read ... */
    int next;                       /* ... and which it is: layer TOKEN_MATRICES + its place in the layer */
    int rows, columns, column,
        K;    /* rows left, the warp's columns and the one at hand, in the matrix that is read */
    int slot; /* the next one to take */

    __device__ WeightStream(const TokenStep &p, const TokenBlock &s)
        : p(p), matrix(s.shared->matrix), from(nullptr), next_weight(nullptr), next(-1), rows(0), columns(0),
          column(0), K(0), slot(0) {
        ring = (uint4 *)s.at(s.shared->layout.ring) + s.warp() * RING * WARP_SIZE + s.lane();
        find_matrix();
        begin_matrix();
        for (int piece = 0; piece < RING - 1; piece++) ask(piece);
    }
    __device__ const TokenMatrix &shape(int which) const {
        return matrix[which < p.L * TOKEN_MATRICES ? which % TOKEN_MATRICES : (int)TOKEN_MATRICES];
    }
    /* Finds the next matrix of which the warp has a part, and asks for its address, long before that is
     * needed. */
    __device__ void find_matrix() {
        int end = p.L * TOKEN_MATRICES, warp = (int)threadIdx.x / WARP_SIZE;
        do next++;
        while (next <= end && (shape(next).count == 0 || token_columns(shape(next).K, warp).count == 0));
        if (next <= end)
            next_weight =
                next < end ? p.layers[next / TOKEN_MATRICES].matrix[next % TOKEN_MATRICES] : p.output_weight;
    }
    __device__ void begin_matrix() {
        if (next > p.L * TOKEN_MATRICES) {
            rows = 0;
            return;
        }
        int warp = (int)threadIdx.x / WARP_SIZE, lane = (int)threadIdx.x % WARP_SIZE;
        TokenColumns c = token_columns(shape(next).K, warp);
        K = shape(next).K, rows = shape(next).count, columns = c.count, column = 0;
        from =
            next_weight + (int64_t)(shape(next).first + lane / 4) * K + c.first * TOKEN_DEPTH + lane % 4 * 8;
        find_matrix();
    }
    /* Asks for one more piece; after the last one the groups are empty. */
    __device__ void ask(int into) {
        if (rows > 0) {
            if ((int)threadIdx.x % WARP_SIZE / 4 < rows) copy_async(ring + into * WARP_SIZE, from);
            from += TOKEN_DEPTH;
            if (++column == columns) {
                column = 0, rows -= TOKEN_ROWS;
                from += (int64_t)TOKEN_ROWS * K - columns * TOKEN_DEPTH;
                if (rows <= 0) begin_matrix();
            }
        }
        end_copy_group();
    }
    /* The next piece; the slot of the one before it is filled again. */
    __device__ uint4 take() {
        wait_for_copies<RING - 2>();
        uint4 piece = ring[slot * WARP_SIZE];
        ask(slot == 0 ? RING - 1 : slot - 1);
        slot = slot + 1 == RING ? 0 : slot + 1;
        return piece;
    }
};

/* ----------------------------------------------------------------------------------------------------------
 * Products
 */

/* Brings the warp's columns of an input (B,K), rows `distance` words apart, to its slab. */
__device__ inline void token_receive(const TokenStep &p, const TokenBlock &s, const uint64_t *words,
                                     int64_t distance, unsigned epoch, int K) {
    constexpr int EACH = 2;
    TokenColumns c = token_columns(K, s.warp());
    int units = c.count * (TOKEN_DEPTH / 8), shift = span_shift(units), stride = slab_stride(K);
    int total = units ? p.B << shift : 0;
    bf16 *slab = s.slab();
    words += c.first * TOKEN_DEPTH / 2;
    __syncwarp(); // all lanes have read what the slab held before
    for (int first = s.lane(); first < total; first += WARP_SIZE * EACH) {
        const uint64_t *from[EACH];
        uint4 value[EACH];
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            int at = first + each * WARP_SIZE, b = at >> shift, unit = at & ((1 << shift) - 1);
            from[each] = at < total && unit < units ? words + b * distance + unit * 4 : nullptr;
        }
        await_eights<EACH>(value, from, epoch);
#pragma unroll
        for (int each = 0; each < EACH; each++) {
            int at = first + each * WARP_SIZE;
            if (from[each])
                *(uint4 *)(slab + (at >> shift) * stride + (at & ((1 << shift) - 1)) * 8) = value[each];
        }
    }
    __syncwarp(); // the slab is there
}

/* Brings the warp's columns of a norm's weight and bias to shared memory; NULL: zeros. Comes before the wait
 * for the norm's input, which is longer. */
__device__ inline void token_norm_weights(const TokenStep &p, const TokenBlock &s, const bf16 *weight,
                                          const bf16 *bias) {
    TokenColumns c = token_columns(p.D, s.warp());
    for (int at = s.lane() * 8; at < c.count * TOKEN_DEPTH; at += WARP_SIZE * 8) {
        const uint4 zero = make_uint4(0, 0, 0, 0);
        int column = c.first * TOKEN_DEPTH + at;
        *(uint4 *)(s.norm() + at) = weight ? eight_at(weight + column) : zero;
        *(uint4 *)(s.norm() + c.most * TOKEN_DEPTH + at) = bias ? eight_at(bias + column) : zero;
    }
}

/* Sum over the four lanes that share a row. */
__device__ inline float four_sum(float x) { return lanes_sum(x, 4); }

/* slab = c (1 + w). The rest of RMSNorm is a factor of each row, which the product's sums get (token_rstd).
 * */
__device__ inline void token_rmsnorm(const TokenStep &p, const TokenBlock &s) {
    TokenColumns c = token_columns(p.D, s.warp());
    float squares = 0, x[8], w[8];
    for (int k = s.column() * 8; s.row() < p.B && k < c.count * TOKEN_DEPTH; k += TOKEN_DEPTH) {
        bf16 *at = s.slab() + s.row() * slab_stride(p.D) + k;
        unpack<bf16, 8>(x, eight_at(at));
        unpack<bf16, 8>(w, eight_at(s.norm() + k));
#pragma unroll
        for (int e = 0; e < 8; e++) squares += x[e] * x[e], x[e] *= 1.0f + w[e];
        *(uint4 *)at = pack_eight(x);
    }
    squares = four_sum(squares);
    if (s.column() == 0 && s.row() < p.B) s.shared->moments[s.warp()][s.row()].x = squares;
    __syncwarp(); // the slab is there again
}
/* 1 / sqrt(mean c^2 + eps) of a row, from `warps` warps; after the barrier in a product that follows
 * token_rmsnorm. */
__device__ inline float token_rstd(const TokenStep &p, const TokenBlock &s, int b, int warps) {
    float squares = 0;
#pragma unroll
    for (int warp = 0; warp < TOKEN_WARPS; warp++)
        if (warp < warps) squares += s.shared->moments[warp][b].x;
    return 1.0f / sqrtf(squares / (float)p.D + p.eps);
}

/* slab = (y - mean) / sqrt(var + eps) (1 + w) + b, over the whole rows. By the whole block. */
__device__ inline void token_layernorm(const TokenStep &p, const TokenBlock &s) {
    TokenColumns c = token_columns(p.D, s.warp());
    int width = c.count * TOKEN_DEPTH;
    bf16 *row = s.slab() + min(s.row(), p.B - 1) * slab_stride(p.D);
    float sum = 0, squares = 0, x[8], w[8], b[8];
    for (int k = s.column() * 8; k < width; k += TOKEN_DEPTH) {
        unpack<bf16, 8>(x, eight_at(row + k));
#pragma unroll
        for (int e = 0; e < 8; e++) sum += x[e];
    }
    sum = four_sum(sum);
    float own = width ? sum / (float)width : 0; // squares are taken about the warp's own mean
    for (int k = s.column() * 8; k < width; k += TOKEN_DEPTH) {
        unpack<bf16, 8>(x, eight_at(row + k));
#pragma unroll
        for (int e = 0; e < 8; e++) squares += (x[e] - own) * (x[e] - own);
    }
    squares = four_sum(squares);
    if (s.column() == 0 && s.row() < p.B) s.shared->moments[s.warp()][s.row()] = make_float2(sum, squares);
    __syncthreads();                       // every warp's moments are there
    constexpr int SHARE = TOKEN_WARPS / 4; // a lane adds a quarter of the warps' moments
    float2 part[SHARE];
    float total = 0, var = 0;
#pragma unroll
    for (int k = 0; k < SHARE; k++) {
        int warp = s.column() * SHARE + k;
        part[k] = make_float2(0, 0);
        if (token_columns(p.D, warp).count) part[k] = s.shared->moments[warp][min(s.row(), p.B - 1)];
        total += part[k].x;
    }
    float mean = four_sum(total) / (float)p.D;
#pragma unroll
    for (int k = 0; k < SHARE; k++) {
        float count = (float)(token_columns(p.D, s.column() * SHARE + k).count * TOKEN_DEPTH);
        float difference = count ? part[k].x / count - mean : 0.0f;
        var += part[k].y + count * difference * difference;
    }
    var = four_sum(var);
    float rstd = 1.0f / sqrtf(var / (float)p.D + p.eps);
    for (int k = s.column() * 8; s.row() < p.B && k < width; k += TOKEN_DEPTH) {
        unpack<bf16, 8>(x, eight_at(row + k));
        unpack<bf16, 8>(w, eight_at(s.norm() + k));
        unpack<bf16, 8>(b, eight_at(s.norm() + c.most * TOKEN_DEPTH + k));
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = (x[e] - mean) * rstd * (1.0f + w[e]) + b[e];
        *(uint4 *)(row + k) = pack_eight(x);
    }
    __syncwarp(); // the slab is there again
}

/* Each warp's part of slab . matrix[row] for `rows` rows of the block from row `first` on, to `sums`:
 * [warp][b][row]. */
template <int RING>
__device__ inline void token_multiply(float *sums, const TokenStep &p, const TokenBlock &s,
                                      WeightStream<RING> &weights, const TokenMatrix &matrix, int rows,
                                      int together) {
    int pieces = token_columns(matrix.K, s.warp()).count;
    const bf16 *x = s.slab() + min(s.row(), p.B - 1) * slab_stride(matrix.K) + s.column() * 8;
    sums += (s.warp() * p.B + s.row()) * together + s.column() * 2;
    for (int tile = 0; tile < rows; tile += TOKEN_ROWS) {
        float even[4] = {}, odd[4] = {}; // two chains of sums
#pragma unroll 2
        for (int piece = 0; piece < pieces; piece++) {
            uint4 a = eight_at(x + piece * TOKEN_DEPTH), b = weights.take();
            multiply_tile(even, a.x, a.y, b.x, b.y);
            multiply_tile(odd, a.z, a.w, b.z, b.w);
        }
        if (s.row() < p.B && pieces)
            *(float2 *)(sums + tile) = make_float2(even[0] + odd[0], even[1] + odd[1]);
    }
}

/* ----------------------------------------------------------------------------------------------------------
 * TimestepNorm and CEMA
 */

/* Channel d of the block, states lane, lane + DECODE_LANES, ...: calls f(state's place in the coefficients,
 * in h). */
template <typename F>
__device__ inline void for_each_state(const TokenStep &p, const TokenBlock &s, int b, int row, int lane,
                                      F &&f) {
    int64_t d = s.shared->D.first + row;
    for (int k = lane; k < p.N; k += DECODE_LANES) f(d * p.N + k, ((b * p.D + d) * p.N + k) * 2);
}

/* What can be done before x is there. With h' = q h + p u, c = Re(sum c h') + omega u is linear in u: still =
 * Re(sum c q h), gain = Re(sum c p) + omega, c = still + gain u. And the parameters that belong to the
 * block's rows. w NULL: the final norm, whose weight and bias are given. By the whole block. */
__device__ inline void token_prepare(const TokenStep &p, const TokenBlock &s, const TokenLayer *w) {
    TokenShared *t = s.shared;
    __syncthreads(); // all are done with the last layer's parameters
    const bf16 *weight = w ? w->vector.timenorm_weight : p.final_weight,
               *bias = w ? w->vector.timenorm_bias : p.final_bias;
    for (int row = s.thread(); row < s.shared->D.count; row += TOKEN_THREADS) {
        t->time_weight[row] = 1.0f + to_float(weight[s.shared->D.first + row]);
        t->time_bias[row] = to_float(bias[s.shared->D.first + row]);
        if (!w) continue;
        t->h_bias[row] = to_float(w->vector.wh1_bias[s.shared->D.first + row]);
        t->alpha[row] = w->vector.ffn_alpha ? to_float(w->vector.ffn_alpha[s.shared->D.first + row]) : 1.0f;
    }
    for (int row = s.thread(); w && row < s.shared->E.count; row += TOKEN_THREADS) {
        t->r_bias[row] = to_float(w->vector.wr_bias[s.shared->E.first + row]);
        t->v_bias[row] = to_float(w->vector.wv_bias[s.shared->E.first + row]);
    }
    TokenMatrix z = t->matrix[TOKEN_WZ];
    for (int row = s.thread(); w && row < z.count; row += TOKEN_THREADS)
        t->z_bias[row] = to_float(w->vector.wz_bias[z.first + row]);

    int rows = s.shared->D.count, shift = span_shift(rows), lane = s.thread() % DECODE_LANES;
    int units = w && rows ? p.B << shift : 0;
    /* All lanes make the same number of rounds, so that the sums over lanes find them all. */
    for (int round = 0; round < units; round += TOKEN_THREADS / DECODE_LANES) {
        int unit = round + s.thread() / DECODE_LANES, b = unit >> shift, row = unit & ((1 << shift) - 1);
        bool active = unit < units && row < rows;
        float still = 0, gain = 0;
        if (active)
            for_each_state(p, s, b, row, lane, [&](int64_t i, int64_t at) {
                float2 h = *(const float2 *)(w->h + at);
                float c_re = w->coef.c_re[i], c_im = w->coef.c_im[i], q_re = w->coef.q_re[i],
                      q_im = w->coef.q_im[i];
                still += c_re * (q_re * h.x - q_im * h.y) - c_im * (q_im * h.x + q_re * h.y);
                gain += c_re * w->coef.p[i];
            });
        still = lanes_sum(still, DECODE_LANES), gain = lanes_sum(gain, DECODE_LANES);
        if (active && lane == 0)
            t->still[b * rows + row] = still, t->gain[row] = gain + w->omega[s.shared->D.first + row];
    }
    __syncthreads(); // all of it is there
}

/* x[b, d]: the embedding in the first layer, else what the last one published. */
__device__ inline float token_x(const TokenStep &p, const TokenBlock &s, int b, int d, int layer,
                                unsigned epoch) {
    if (layer == 0) {
        float value = p.scale * to_float(p.embed[(int64_t)s.shared->token[b] * p.D + d]);
        return to_float(from_float<bf16>(value));
    }
    unsigned pair = await_word(p.x + ((int64_t)b * p.D + d) / 2, epoch - 1);
    return d % 2 ? second_of(pair) : first_of(pair);
}

/* u and c of the block's channels, published; layer L is the final norm, which has no c. A warp takes a group
 * of a row, whole, even where the block has only some of its channels. */
__device__ inline void token_norm(const TokenStep &p, const TokenBlock &s, int layer, const double *old_mean,
                                  const double *old_var, unsigned epoch) {
    TokenShared *t = s.shared;
    int size = t->group_size, groups = t->groups;
    for (int unit = s.warp(), b = 0, own = unit; unit < p.B * groups;
         unit += TOKEN_WARPS, own += TOKEN_WARPS) {
        while (own >= groups) own -= groups, b++;
        int group = t->first_group + own;
        Moments<double> before = {t->count[b], old_mean[b * p.G + group], old_var[b * p.G + group]};
        double share = 1.0 / (before.count + 1.0); // of this step; before x is there
        float sum = 0, squares = 0, held = 0;
        for (int i = s.lane(); i < size; i += WARP_SIZE) {
            float value = token_x(p, s, b, group * size + i, layer, epoch);
            if (i == s.lane()) held = value;
            sum += value;
        }
        float mean = warp_sum(sum) / (float)size;
        for (int i = s.lane(); i < size; i += WARP_SIZE) {
            float value = i == s.lane() ? held : token_x(p, s, b, group * size + i, layer, epoch);
            squares += (value - mean) * (value - mean);
        }
        float var = warp_sum(squares) / (float)size;
        double difference = (double)mean - before.mean, new_mean = before.mean + share * difference,
               new_var = before.var + share * ((double)var - before.var) +
                         share * (1.0 - share) * difference * difference;
        float center = (float)new_mean, rstd = 1.0f / sqrtf((float)new_var + p.eps);
        if (s.lane() == 0) t->mean[unit] = new_mean, t->var[unit] = new_var;
        for (int start = 0; start < size; start += WARP_SIZE) {
            int i = start + s.lane(), d = group * size + i, row = d - t->D.first;
            bool owned = i < size && row >= 0 && row < t->D.count;
            float u = 0, c = 0;
            if (owned) {
                float value = i == s.lane() ? held : token_x(p, s, b, d, layer, epoch);
                int at = b * t->D.count + row;
                u = (value - center) * rstd * t->time_weight[row] + t->time_bias[row];
                if (layer < p.L) c = fmaf(t->gain[row], u, t->still[at]);
                t->u[at] = u;
                if (layer == 0) t->x[at] = value;
            }
            float next_u = __shfl_down_sync(FULL_MASK, u, 1), next_c = __shfl_down_sync(FULL_MASK, c, 1);
            if (!owned || d % 2) continue;
            uint64_t *to = p.uc + ((int64_t)b * 2 * p.D + d) / 2;
            publish(to, pack_pair(u, next_u), epoch);
            if (layer < p.L) publish(to + p.D / 2, pack_pair(c, next_c), epoch);
        }
    }
}

/* The states after the step: h = q h + p u, and the groups' statistics, which the block writes that owns the
 * group's first channel. All of u has been received by now, so every block has read the old ones. */
__device__ inline void token_update(const TokenStep &p, const TokenBlock &s, const TokenLayer *w,
                                    double *mean, double *var) {
    TokenShared *t = s.shared;
    for (int unit = s.thread(), b = 0, own = unit; unit < p.B * t->groups;
         unit += TOKEN_THREADS, own += TOKEN_THREADS) {
        while (own >= t->groups) own -= t->groups, b++;
        int group = t->first_group + own, at = b * p.G + group;
        if (group * t->group_size >= t->D.first) mean[at] = t->mean[unit], var[at] = t->var[unit];
    }
    int rows = t->D.count, shift = span_shift(rows), lane = s.thread() % DECODE_LANES;
    int units = w && rows ? p.B << shift : 0;
    for (int unit = s.thread() / DECODE_LANES; unit < units; unit += TOKEN_THREADS / DECODE_LANES) {
        int b = unit >> shift, row = unit & ((1 << shift) - 1);
        if (row >= rows) continue;
        float u = t->u[b * rows + row];
        for_each_state(p, s, b, row, lane, [&](int64_t c, int64_t at) {
            float2 h = *(const float2 *)(w->h + at);
            float q_re = w->coef.q_re[c], q_im = w->coef.q_im[c];
            *(float2 *)(w->h + at) =
                make_float2(fmaf(-q_im, h.y, fmaf(q_re, h.x, w->coef.p[c] * u)), fmaf(q_im, h.x, q_re * h.y));
        });
    }
}

/* ----------------------------------------------------------------------------------------------------------
 * Attention
 */

/* A lane's 8 entries of the query (which 0) or the key (1), rounded as keys are kept. */
__device__ inline void token_turn(float (&to)[8], const float (&zn)[8], const uint4 &gamma, const uint4 &beta,
                                  const float2 (&angle)[4], float inverse) {
    float g[8], b[8];
    unpack<bf16, 8>(g, gamma);
    unpack<bf16, 8>(b, beta);
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        float2 turned = turn_pair(zn[i] * (1.0f + g[i]) * inverse + b[i],
                                  zn[i + 1] * (1.0f + g[i + 1]) * inverse + b[i + 1], angle[i / 2], 1);
        to[i] = to_float(from_float<bf16>(turned.x)), to[i + 1] = to_float(from_float<bf16>(turned.y));
    }
}

/* The query of row b and head h, as soon as zz is published, and the new key, rounded as keys are kept. */
__device__ inline void token_query(float (&query)[8], uint4 &key, const TokenStep &p, const TokenBlock &s,
                                   const TokenLayer &w, int b, int h, unsigned epoch) {
    int z = p.Z / p.H, at = s.lane() * 8, column = h * z + at;
    bool active = at < z;
    float2 angle[4];
    uint4 gamma[2], beta[2], zz[1] = {make_uint4(0, 0, 0, 0)};
#pragma unroll
    for (int which = 0; which < 2; which++) {
        gamma[which] = active ? eight_at(w.vector.gamma + which * p.Z + column) : zz[0];
        beta[which] = active ? eight_at(w.vector.beta + which * p.Z + column) : zz[0];
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
        angle[i] = active ? p.rope[(int64_t)s.n * (z / 2) + at / 2 + i] : make_float2(1, 0);
    const uint64_t *from[1] = {active ? p.zz + ((int64_t)b * p.Z + column) / 2 : nullptr};
    await_eights<1>(zz, from, epoch);
    float squares = 0, zn[8], turned[8], inverse = 1.0f / sqrtf((float)z);
    unpack<bf16, 8>(zn, zz[0]);
#pragma unroll
    for (int i = 0; i < 8; i++) squares += zn[i] * zn[i];
    float rstd = 1.0f / sqrtf(warp_sum(squares) / (float)z + p.eps);
#pragma unroll
    for (int i = 0; i < 8; i++) zn[i] *= rstd;
    token_turn(query, zn, gamma[0], beta[0], angle, inverse);
    token_turn(turned, zn, gamma[1], beta[1], angle, inverse);
    key = pack_eight(turned);
}

/* score[b,h,j] = q . k[j] for the warp's run of (b, h, j), published; the new key goes to the state. */
__device__ inline void token_scores(const TokenStep &p, const TokenBlock &s, const TokenLayer &w,
                                    unsigned epoch) {
    constexpr int EACH = 2;
    TokenRun run = s.shared->run[s.warp()];
    int z = p.Z / p.H, at = s.lane() * 8, known = -1;
    bool active = at < z;
    float query[8], x[8];
    uint4 fresh = make_uint4(0, 0, 0, 0), old[EACH]; // the new key, and the next old ones
#pragma unroll 1
    for (int item = 0; run.count > 0; item++, run.next(s.n, p.H)) {
        if (item % EACH == 0) {
            TokenRun ahead = run;
#pragma unroll
            for (int i = 0; i < EACH; i++, ahead.next(s.n, p.H))
                if (active && ahead.count > 0 && ahead.key < s.n)
                    old[i] = eight_at(w.k + ((int64_t)ahead.b * p.C + ahead.key) * p.Z + ahead.h * z + at);
        }
        int bh = run.b * p.H + run.h;
        if (bh != known) token_query(query, fresh, p, s, w, run.b, run.h, epoch);
        known = bh;
        if (run.key == s.n) {
            old[0] = fresh;
            if (active) *(uint4 *)(w.k + ((int64_t)run.b * p.C + s.n) * p.Z + run.h * z + at) = fresh;
        }
        float sum = 0;
        unpack<bf16, 8>(x, old[0]);
#pragma unroll
        for (int i = 0; i < 8; i++) sum = fmaf(query[i], x[i], sum);
        sum = warp_sum(active ? sum : 0.0f);
        if (s.lane() == 0) publish(p.score + (int64_t)bh * p.C + run.key, __float_as_uint(sum), epoch);
#pragma unroll
        for (int i = 0; i + 1 < EACH; i++) old[i] = old[i + 1];
    }
}

/* How the threads of a block share its columns of the values: neighbouring lanes take neighbouring units of 8
 * columns, `lanes` (a power of two) at a time, and each such set of lanes every `steps`-th key. */
struct TokenValues {
    int lanes, unit, first, steps;
    __device__ explicit TokenValues(const TokenBlock &s) {
        int shift = min(span_shift(s.shared->E.count / 8), 5);
        lanes = 1 << shift, unit = s.thread() & (lanes - 1), first = s.thread() >> shift,
        steps = TOKEN_THREADS >> shift;
    }
};

/* Up to TOKEN_KEYS old values of row b, from key `first` on. */
__device__ inline void token_load_values(uint4 (&value)[TOKEN_KEYS], const TokenStep &p, const TokenBlock &s,
                                         const TokenValues &share, const TokenLayer &w, int b, int unit,
                                         int first) {
    const bf16 *v = w.v + (int64_t)b * p.C * p.E + s.shared->E.first + unit * 8;
#pragma unroll
    for (int i = 0; i < TOKEN_KEYS; i++) {
        int key = first + i * share.steps;
        if (unit * 8 < s.shared->E.count && key < s.n) value[i] = eight_at(v + (int64_t)key * p.E);
    }
}

/* Asks the L2 cache for the keys and values of the chunk. */
__device__ inline void token_prefetch_chunk(const TokenStep &p, const TokenBlock &s, const TokenLayer &w) {
    TokenValues share(s);
    int z = p.Z / p.H;
    for (TokenRun run = s.shared->run[s.warp()]; run.count > 0; run.next(s.n, p.H))
        if (run.key < s.n)
            prefetch_bytes(w.k + ((int64_t)run.b * p.C + run.key) * p.Z + run.h * z, z * (int)sizeof(bf16),
                           s.lane(), WARP_SIZE);
    if (share.unit % 2) return; // two units are one sector of 32 bytes
    for (int b = 0; b < p.B; b++)
        for (int unit = share.unit; unit * 8 < s.shared->E.count; unit += share.lanes)
            for (int key = share.first; key < s.n; key += share.steps)
                prefetch_bytes(w.v + ((int64_t)b * p.C + key) * p.E + s.shared->E.first + unit * 8, 1, 0, 1);
}

/* A thread's part of softmax(scores) v: its keys' largest score (top), the sum of exp(score - it), and the
 * weighted sum of its 8 columns. held: the first old values where have_held, afterwards anything. */
__device__ inline void token_thread_values(float &top, float &sum, float (&total)[8],
                                           uint4 (&held)[TOKEN_KEYS], bool have_held, const TokenStep &p,
                                           const TokenBlock &s, const TokenValues &share, const TokenLayer &w,
                                           int b, int unit, unsigned epoch) {
    float x[8];
    int column = s.shared->E.first + unit * 8;
    const uint64_t *scores = p.score + ((int64_t)b * p.H + column / (p.E / p.H)) * p.C;
    top = -INFINITY, sum = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) total[i] = 0;
    for (int first = share.first; unit * 8 < s.shared->E.count && first <= s.n;
         first += share.steps * TOKEN_KEYS) {
        if (!have_held || first != share.first) token_load_values(held, p, s, share, w, b, unit, first);
        float score[TOKEN_KEYS], largest = top;
        bool ready;
        int reads = 0;
        do { // the scores are asked for together, until all have come
            ready = true;
#pragma unroll
            for (int i = 0; i < TOKEN_KEYS; i++) {
                int key = first + i * share.steps;
                uint64_t word = key <= s.n ? read_word(scores + key) : (uint64_t)epoch << 32;
                ready = ready && epoch_of(word) == epoch;
                score[i] = key <= s.n ? __uint_as_float((unsigned)word) : -INFINITY;
            }
            if (!ready) lose_patience(reads);
        } while (!ready);
#pragma unroll
        for (int i = 0; i < TOKEN_KEYS; i++) largest = fmaxf(largest, score[i]);
        float keep = __expf(top - largest); // 0 the first time
        top = largest, sum *= keep;
#pragma unroll
        for (int i = 0; i < 8; i++) total[i] *= keep;
#pragma unroll
        for (int i = 0; i < TOKEN_KEYS; i++) {
            int key = first + i * share.steps;
            if (key > s.n) break;
            if (key == s.n) held[i] = eight_at(s.shared->v + b * s.shared->E.count + unit * 8);
            float weight = __expf(score[i] - top);
            unpack<bf16, 8>(x, held[i]);
            sum += weight;
#pragma unroll
            for (int e = 0; e < 8; e++) total[e] = fmaf(weight, x[e], total[e]);
        }
    }
}

/* The warp's part, from the lanes that have the same columns, to `to`: top, sum, 8 columns. While there are
 * several columns left, a lane hands half of them to its partner and takes the partner's half of the rest. */
__device__ inline void token_warp_values(float *to, const TokenBlock &s, const TokenValues &share, float top,
                                         float sum, float (&total)[8], bool writes) {
    float largest = top;
    int width = 8, column = 0;
#pragma unroll
    for (int step = WARP_SIZE / 2; step > 0; step /= 2)
        if (step >= share.lanes) largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, step));
    float keep = top == -INFINITY ? 0.0f : __expf(top - largest); // a lane without keys adds nothing
    sum *= keep;
#pragma unroll
    for (int i = 0; i < 8; i++) total[i] *= keep;
#pragma unroll
    for (int step = WARP_SIZE / 2, half = 4; step > 0; step /= 2, half /= 2) {
        if (step < share.lanes) continue;
        sum += __shfl_xor_sync(FULL_MASK, sum, step);
        bool upper = s.lane() & step;
        if (half == 0) total[0] += __shfl_xor_sync(FULL_MASK, total[0], step);
#pragma unroll
        for (int i = 0; i < half; i++) {
            float mine = upper ? total[i + half] : total[i], other = upper ? total[i] : total[i + half];
            total[i] = mine + __shfl_xor_sync(FULL_MASK, other, step);
        }
        if (half) width = half, column += upper ? half : 0;
    }
    if (!writes) return;
    if (s.lane() < share.lanes) to[0] = largest, to[1] = sum;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (i < width) to[2 + column + i] = total[i];
}

/* ar = r softmax(scores) v for the block's columns, published. held: the first old values of row 0. By the
 * whole block. */
__device__ inline void token_values(const TokenStep &p, TokenBlock &s, const TokenValues &share,
                                    const TokenLayer &w, uint4 (&held)[TOKEN_KEYS], unsigned epoch) {
    int columns = s.shared->E.count, units = columns / 8;
    for (int b = 0; b < p.B; b++) {
        float *parts = s.next_sums();
        /* All lanes make the same number of rounds, so that the sums over lanes find them all. */
        for (int round = 0; round < units; round += share.lanes) {
            int unit = round + share.unit;
            float top, sum, total[8];
            token_thread_values(top, sum, total, held, round == 0, p, s, share, w, b, unit, epoch);
            if (b + 1 < p.B && round + share.lanes >= units) // the next row's first values
                token_load_values(held, p, s, share, w, b + 1, share.unit, share.first);
            token_warp_values(parts + (unit * TOKEN_WARPS + s.warp()) * TOKEN_PART, s, share, top, sum, total,
                              unit < units);
        }
        __syncthreads(); // all warps' parts are there
        /* 16 lanes add the warps' parts of two columns. */
        for (int at = s.thread() / TOKEN_WARPS; at < units * 4; at += TOKEN_THREADS / TOKEN_WARPS) {
            const float *part = parts + (at / 4 * TOKEN_WARPS + s.thread() % TOKEN_WARPS) * TOKEN_PART;
            float top = part[0], sum = part[1], x = part[2 + at % 4 * 2], y = part[3 + at % 4 * 2],
                  largest = top;
            for (int step = TOKEN_WARPS / 2; step > 0; step /= 2)
                largest = fmaxf(largest, __shfl_xor_sync(FULL_MASK, largest, step));
            float keep = __expf(top - largest); // 0 where a warp had no key
            sum = lanes_sum(sum * keep, TOKEN_WARPS);
            x = lanes_sum(x * keep, TOKEN_WARPS), y = lanes_sum(y * keep, TOKEN_WARPS);
            if (s.thread() % TOKEN_WARPS) continue;
            const float *r = s.shared->r + b * columns + at * 2;
            publish(p.ar + ((int64_t)b * p.E + s.shared->E.first) / 2 + at,
                    pack_pair(x / sum * r[0], y / sum * r[1]), epoch);
        }
    }
}

/* ----------------------------------------------------------------------------------------------------------
 * The step
 */

/* Asks for what a layer reads besides matrices: its chunk, its vectors, a warp each and every block its part
 * of them, and the coefficients and states of the block's channels. Long before they are needed, since the
 * memory is busy with weights that were asked for earlier. */
__device__ inline void token_prefetch(const TokenStep &p, const TokenBlock &s, const TokenLayer &w) {
    int warp = s.warp(), first = s.shared->D.first * p.N, states = s.shared->D.count * p.N;
    token_prefetch_chunk(p, s, w);
    if (warp < TOKEN_VECTORS) {
        const bf16 *vector = ((const bf16 *const *)&w.vector)[warp];
        if (vector)
            prefetch_bytes(vector, s.shared->vector_bytes[warp], s.lane() * (int)gridDim.x + (int)blockIdx.x,
                           WARP_SIZE * (int)gridDim.x);
        return;
    }
    const float *coefficients = w.coef.p + first; // five arrays, one after the other
#pragma unroll 1
    for (int i = warp - TOKEN_VECTORS; i < NUM_CEMA_COEFFICIENTS + p.B; i += TOKEN_WARPS - TOKEN_VECTORS) {
        int b = i - NUM_CEMA_COEFFICIENTS;
        const float *from =
            b < 0 ? coefficients + (int64_t)i * p.D * p.N : w.h + ((int64_t)b * p.D * p.N + first) * 2;
        prefetch_bytes(from, states * (b < 0 ? 4 : 8), s.lane(), WARP_SIZE);
    }
}

/* What comes before a product: its input, as soon as it is published, to the warps' slabs. By the whole
 * block. */
__device__ inline void token_input(const TokenStep &p, TokenBlock &s, const TokenLayer &w,
                                   const TokenMatrix &matrix, int which, unsigned epoch,
                                   uint4 (&held)[TOKEN_KEYS]) {
    TokenShared *t = s.shared;
    TokenValues share(s);
    const uint64_t *words = p.uc; // u
    int64_t distance = p.D;
    if (which == TOKEN_WZ) {
        token_norm_weights(p, s, w.vector.rmsnorm_weight, nullptr);
        words += p.D / 2; // c
    } else if (which == TOKEN_WH1) {
        token_load_values(held, p, s, share, w, 0, share.unit, share.first); // on their way while zz is
        return;
    } else if (which == TOKEN_WR) {
        token_update(p, s, &w, w.mean, w.var); // Wh1's barrier has passed: all of c was received
        return;
    } else if (which == TOKEN_FC3) {
        return; // the slab is as it was
    } else if (which == TOKEN_WV) {
        token_scores(p, s, w, epoch); // while they are on their way, v
    } else if (which == TOKEN_WH2) {
        __syncthreads(); // r and v are there
        token_values(p, s, share, w, held, epoch);
        words = p.ar, distance = p.E / 2;
    } else if (which == TOKEN_FC1) {
        token_norm_weights(p, s, w.vector.ffnnorm_weight, w.vector.ffnnorm_bias);
        words = p.y, distance = p.D / 2;
    } else if (which == TOKEN_FC2) {
        words = p.hidden, distance = p.F / 2;
    }
    /* Who makes nothing of an input does not wait for it. */
    bool reads_c = t->D.count || t->E.count || t->matrix[TOKEN_WZ].count;
    if (which == TOKEN_WZ ? !reads_c : matrix.count == 0) return;
    token_receive(p, s, words, distance, epoch, matrix.K);
    if (which == TOKEN_WZ) token_rmsnorm(p, s);
    if (which == TOKEN_FC1) token_layernorm(p, s);
}

/* What becomes of two sums of a product: of row b and the block's rows `row` and `row` + 1 (which the output
 * matrix may not have). */
__device__ inline void token_finish(const TokenStep &p, const TokenBlock &s, const TokenLayer &w,
                                    const TokenMatrix &matrix, int which, unsigned epoch, int b, int row,
                                    float x, float y) {
    TokenShared *t = s.shared;
    int at = b * matrix.count + row, column = matrix.first + row;
    switch (which) {
    case TOKEN_WZ:
        publish(p.zz + ((int64_t)b * p.Z + column) / 2, pack_pair(x + t->z_bias[row], y + t->z_bias[row + 1]),
                epoch);
        break;
    case TOKEN_WH1: {
        unsigned pair = pack_pair(x + t->h_bias[row] + t->x[at], y + t->h_bias[row + 1] + t->x[at + 1]);
        t->h[at] = first_of(pair), t->h[at + 1] = second_of(pair);
        break;
    }
    case TOKEN_WR: {
        unsigned pair = pack_pair(silu(x + t->r_bias[row]), silu(y + t->r_bias[row + 1]));
        t->r[at] = first_of(pair), t->r[at + 1] = second_of(pair);
        break;
    }
    case TOKEN_WV: {
        unsigned pair = pack_pair(silu(x + t->v_bias[row]), silu(y + t->v_bias[row + 1]));
        *(unsigned *)(t->v + at) = pair;
        *(unsigned *)(w.v + ((int64_t)b * p.C + s.n) * p.E + column) = pair;
        break;
    }
    case TOKEN_WH2:
        publish(p.y + ((int64_t)b * p.D + column) / 2, pack_pair(x + t->h[at], y + t->h[at + 1]), epoch);
        break;
    case TOKEN_FC1:
        x = silu(x), y = silu(y);
        if (p.swiglu) t->gate[at] = x, t->gate[at + 1] = y; // the same thread finishes fc3's rows
        else publish(p.hidden + ((int64_t)b * p.F + column) / 2, pack_pair(x, y), epoch);
        break;
    case TOKEN_FC3:
        publish(p.hidden + ((int64_t)b * p.F + column) / 2, pack_pair(t->gate[at] * x, t->gate[at + 1] * y),
                epoch);
        break;
    case TOKEN_FC2: {
        unsigned pair = pack_pair(fmaf(t->alpha[row], x, t->x[at]), fmaf(t->alpha[row + 1], y, t->x[at + 1]));
        publish(p.x + ((int64_t)b * p.D + column) / 2, pair, epoch);
        t->x[at] = first_of(pair), t->x[at + 1] = second_of(pair);
        break;
    }
    default:
        p.logits[(int64_t)b * p.V + column] = x;
        if (row + 1 < matrix.count) p.logits[(int64_t)b * p.V + column + 1] = y;
    }
}

/* A product: its sums over the warps' columns, a pass of rows at a time, and what becomes of them. By the
 * whole block. There is one loop over all products of a layer, so that this code is there once: the processor
 * has to fetch it. */
template <int RING>
__device__ inline void token_product(const TokenStep &p, TokenBlock &s, WeightStream<RING> &weights,
                                     const TokenLayer &w, const TokenMatrix &matrix, int which,
                                     unsigned epoch) {
    int together = pass_rows(p.B);
    for (int first = 0; first < matrix.count; first += together) {
        int rows = min(together, matrix.count - first), pairs = (rows + 1) / 2, shift = span_shift(pairs);
        float *sums = s.next_sums();
        token_multiply(sums, p, s, weights, matrix, rows, together);
        __syncthreads(); // all warps' sums are there
        for (int at = s.thread(); at < p.B << shift; at += TOKEN_THREADS) {
            int b = at >> shift, pair = at & ((1 << shift) - 1);
            if (pair >= pairs) continue;
            const float *part = sums + b * together + pair * 2;
            float factor = which <= TOKEN_WR ? token_rstd(p, s, b, matrix.warps) : 1.0f, x = 0, y = 0;
#pragma unroll
            for (int warp = 0; warp < TOKEN_WARPS; warp++, part += p.B * together) {
                if (warp >= matrix.warps) continue;
                float2 two = *(const float2 *)part;
                x += two.x, y += two.y;
            }
            token_finish(p, s, w, matrix, which, epoch, b, first + pair * 2, x * factor, y * factor);
        }
    }
}

/* What stays the same through a step: the block's rows, its groups, its warps' keys. */
__device__ inline void token_begin(const TokenStep &p, TokenBlock &s, int ring) {
    TokenShared *t = s.shared;
    int blocks = (int)gridDim.x, block = (int)blockIdx.x, thread = s.thread();
    if (thread == 0) {
        t->layout = token_layout(p, blocks, ring);
        t->D = token_rows(p.D, 2, block, blocks), t->E = token_rows(p.E, 8, block, blocks);
        t->group_size = p.D / p.G, t->first_group = t->D.first / t->group_size;
        int last = (t->D.first + t->D.count - 1) / t->group_size;
        t->groups = t->D.count ? last - t->first_group + 1 : 0;
    }
    if (thread == WARP_SIZE) { // a thread of another warp, meanwhile
        int *bytes = t->vector_bytes;
#define X(name, size) *bytes++ = (size) * (int)sizeof(bf16);
        FOR_TOKEN_VECTORS(X)
#undef X
    }
    if (thread <= TOKEN_OUTPUT) {
        const int N[] = {p.Z, p.D, p.E, p.E, p.D, p.F, p.swiglu ? p.F : 0, p.D, p.V};
        const int K[] = {p.D, p.D, p.D, p.D, p.E, p.D, p.D, p.F, p.D};
        bool columns = thread == TOKEN_WR || thread == TOKEN_WV;
        TokenRows rows = token_rows(N[thread], columns ? 8 : thread < TOKEN_OUTPUT ? 2 : 1, block, blocks);
        int most = token_columns(K[thread], 0).most;
        t->matrix[thread] =
            TokenMatrix{rows.first, rows.count, K[thread], (K[thread] / TOKEN_DEPTH + most - 1) / most};
    }
    if (thread < TOKEN_WARPS) {
        int keys = s.n + 1, items = p.B * p.H * keys, warps = blocks * TOKEN_WARPS,
            share = (items + warps - 1) / warps, first = (thread * blocks + block) * share,
            count = min(items - first, share);
        int bh = first / keys;
        t->run[thread] = TokenRun{bh / p.H, bh % p.H, first % keys, max(count, 0)};
    }
    for (int i = thread; i < (int)(sizeof(TokenLayer) / 8); i += TOKEN_THREADS)
        ((uint64_t *)t->layer)[i] = ((const uint64_t *)p.layers)[i];
    if (thread < p.B) t->token[thread] = p.tokens[thread], t->count[thread] = (double)p.count[thread];
    __syncthreads(); // the block's work, the first layer's addresses and the tokens are there
    s.slab_at = t->layout.slabs + s.warp() * t->layout.slab,
    s.norm_at = t->layout.norms + s.warp() * t->layout.norm;
    s.sums_at = t->layout.sums, s.other = t->layout.sums + t->layout.sum;
}

/* computes: the logits of one token a row, and the state after it
 * launch:   grid one block a processor, all of them at the same time, block 512: see the top of this file
 * traffic:  every weight once, the states twice, the keys and values of the chunk so far once
 * needs:    bf16; D, E and F multiples of 32, z and e of 8, z <= 256, D / G even, B <= 8 (token_fits)
 * numerics: float sums of bf16 products in a fixed order: deterministic for a number of processors */
template <int RING>
__global__ void __launch_bounds__(TOKEN_THREADS, 1) token_kernel(const __grid_constant__ TokenStep p) {
    extern __shared__ uint4 token_memory[];
    TokenBlock s;
    TokenShared *t = s.shared = (TokenShared *)token_memory;
    s.n = (int)(p.count[0] % p.C);
    unsigned epoch = *p.epoch;
    token_begin(p, s, RING);
    token_prefetch(p, s, t->layer[0]); // before the weights, or it would wait for them
    WeightStream<RING> weights(p, s);
    uint4 held[TOKEN_KEYS] = {};
#pragma unroll 1
    for (int layer = 0; layer <= p.L; layer++) {
        bool is_last = layer == p.L; // the final norm and the output matrix
        const TokenLayer &w = t->layer[layer % 2], &next = t->layer[(layer + 1) % 2];
        double *mean = is_last ? p.final_mean : w.mean, *var = is_last ? p.final_var : w.var;
        token_prepare(p, s, is_last ? nullptr : &w);
        token_norm(p, s, layer, mean, var, ++epoch);
        for (int i = s.thread(); layer + 1 < p.L && i < (int)(sizeof(TokenLayer) / 8); i += TOKEN_THREADS)
            ((uint64_t *)&next)[i] = ((const uint64_t *)(p.layers + layer + 1))[i];
#pragma unroll 1
        for (int which = is_last ? TOKEN_OUTPUT : 0; which < TOKEN_MATRICES + is_last; which++) {
            if (which == TOKEN_FC1 && layer + 1 < p.L) token_prefetch(p, s, next); // while y is on its way
            TokenMatrix matrix = t->matrix[which];
            token_input(p, s, w, matrix, which, epoch, held);
            token_product(p, s, weights, w, matrix, which, epoch);
        }
    }
    __syncthreads(); // all of u was received: every block has read the old statistics
    token_update(p, s, nullptr, p.final_mean, p.final_var);
    wait_for_copies<0>();
    if (s.thread() > 0) return;
    __threadfence();
    if (atomicAdd(p.arrivals, 1u) + 1 < gridDim.x) return;
    *p.arrivals = 0, *p.epoch = epoch; // the last block leaves everything ready for the next step
    for (int b = 0; b < p.B; b++) p.count[b]++;
}

/* ----------------------------------------------------------------------------------------------------------
 * The launch
 */

/* How far the weights may be asked for ahead: the first of these that the shared memory has room for. */
#define FOR_TOKEN_RINGS(X) X(20) X(10) X(4)

/* The largest number of rows of an output of N that a block owns. */
static inline int most_token_rows(int N, int unit, int blocks) {
    return (int)ceil_div(ceil_div(N, unit), blocks) * unit;
}

/* The ring with which one launch can make the step, 0: none. */
static inline int token_ring(const Context *context, const TokenStep &p) {
    int blocks = context->num_sms, z = p.Z / p.H, e = p.E / p.H;
    bool whole = p.D % TOKEN_DEPTH == 0 && p.E % TOKEN_DEPTH == 0 && p.F % TOKEN_DEPTH == 0 && z % 8 == 0 &&
                 e % 8 == 0 && p.D / p.G % 2 == 0;
    bool small = p.B <= TOKEN_ROWS && z <= TOKEN_HEAD && p.B * most_token_rows(p.D, 2, blocks) <= TOKEN_D &&
                 p.B * most_token_rows(p.E, 8, blocks) <= TOKEN_E &&
                 p.B * most_token_rows(p.F, 2, blocks) <= TOKEN_F &&
                 most_token_rows(p.Z, 2, blocks) <= TOKEN_Z;
    int64_t weights = (int64_t)p.D * (p.Z + 3 * p.E + p.D + (p.swiglu ? 3 : 2) * p.F) * (int)sizeof(bf16);
    bool pays = weights >= (int64_t)TOKEN_LEAST_WEIGHTS * blocks;
    if (!context->cooperative || !whole || !small || !pays) return 0;
#define X(ring)                                                                                              \
    if (token_layout(p, blocks, ring).end <= context->shared_bytes) return ring;
    FOR_TOKEN_RINGS(X)
#undef X
    return 0;
}

/* Lets the kernels have all of a processor's shared memory: once, before the first launch. */
static inline void allow_token_launches(const Context *context) {
#define X(ring)                                                                                              \
    CHECK_CUDA(cudaFuncSetAttribute((const void *)token_kernel<ring>,                                        \
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, context->shared_bytes));
    FOR_TOKEN_RINGS(X)
#undef X
}

/* A cooperative launch: it starts all blocks at the same time, or fails. */
template <int RING> static void launch_token(Context *context, const TokenStep &p) {
    cudaLaunchAttribute together = {};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    cudaLaunchConfig_t config = {dim3((unsigned)context->num_sms),
                                 dim3(TOKEN_THREADS),
                                 (size_t)token_layout(p, context->num_sms, RING).end,
                                 context->stream,
                                 &together,
                                 1};
    CHECK_CUDA(cudaLaunchKernelEx(&config, token_kernel<RING>, p));
}

/* The step; token_ring must have found a ring for it. */
static inline void token_step(Context *context, const TokenStep &p) {
    int found = token_ring(context, p);
    REQUIRE(found > 0);
#define X(ring)                                                                                              \
    if (found == ring) launch_token<ring>(context, p);
    FOR_TOKEN_RINGS(X)
#undef X
}

#endif
