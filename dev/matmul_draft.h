/* ------------------------------------------------------------------------------------------------------------------
 * Matrix product. Nearly all the arithmetic of the model is here, so this one function is blocked for registers and
 * caches; every other loop of this file is written to be read.
 *
 *            NC columns
 *         +----+----+----+      A tile of C (MR x NR) stays in vector registers while k runs through a block of KC.
 *      KC | B  | B  | B  |      Step k multiplies MR numbers, column k of a panel of A, by NR numbers, row k of a
 *         +----+----+----+      panel of B. The packed block of B (KC x NC, panel after panel) stays in the
 *           NR   NR   NR        second-level cache while all of A passes by; a packed panel of A (MR x KC) stays in
 *    KC                         the first-level cache while the panels of B pass by.
 *   +---+ +----+----+----+
 *   | A | | C  | C  | C  | MR   Packing also hides the strides and fills ragged edges with zeros, so that one kernel
 *   +---+ +----+----+----+      serves all. The threads pack a block of B together, then share out the tiles of C.
 *   | A | | C  | C  | C  | MR
 *   +---+ +----+----+----+
 *
 * An element is summed in an order that follows from K alone, whatever M, N, the threads and its place in a tile. So
 * the bits are the same for any number of threads, and a row of C depends on the same row of A only, as long as the
 * same way is taken: with few rows (generation) B is read once where it lies, without packing.
 */
#if defined(__AVX512F__)
enum { VECTOR_BYTES = 64, MR = 14 };     /* 32 registers: 14 x 2 for C, 2 for B, 1 for A */
#elif defined(__AVX__)
enum { VECTOR_BYTES = 32, MR = 6 };      /* 16 registers: 6 x 2 for C, 2 for B, 1 for A  */
#elif defined(__aarch64__)
enum { VECTOR_BYTES = 16, MR = 14 };     /* 32 registers                                 */
#else
enum { VECTOR_BYTES = 16, MR = 6 };      /* SSE2: 16 registers                           */
#endif
enum {
    LANES = VECTOR_BYTES / sizeof(real),
    NR = 2 * LANES,                                      /* columns of a tile                               */
    KC = 384,                                            /* depth of a block                                */
    KC_STRIDE = KC + 16,                                 /* keeps rows of A off each other's cache sets     */
    NC = 512 * sizeof(float) / sizeof(real) / NR * NR,   /* columns of a block of B                         */
    FEW_ROWS = 12,                                       /* up to here packing W^T costs more than it gains */
    ROWS = 4,                                            /* summed together without packing                 */
    DOT_VECTORS = 4,                                     /* independent sums of a dot product, in vectors   */
    STRIP_VECTORS = 4                                    /* columns that a thread sums at once, in vectors  */
};

#if defined(__GNUC__)
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")
typedef real Vector __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
ALWAYS_INLINE Vector vector_load(const real *p) { return *(const Vector *)p; }
ALWAYS_INLINE void vector_store(real *p, Vector v) { *(Vector *)p = v; }
ALWAYS_INLINE Vector vector_add(Vector x, Vector y) { return x + y; }
ALWAYS_INLINE Vector vector_multiply_add(Vector x, Vector y, Vector z) { return x * y + z; }
ALWAYS_INLINE Vector vector_scale_add(real s, Vector y, Vector z) { return s * y + z; }
#else
#define ALWAYS_INLINE static inline
#define UNROLL
typedef struct { real lane[LANES]; } Vector;
ALWAYS_INLINE Vector vector_load(const real *p) { Vector v; memcpy(&v, p, sizeof v); return v; }
ALWAYS_INLINE void vector_store(real *p, Vector v) { memcpy(p, &v, sizeof v); }
ALWAYS_INLINE Vector vector_add(Vector x, Vector y) {
    for (int i = 0; i < LANES; i++) x.lane[i] += y.lane[i];
    return x;
}
ALWAYS_INLINE Vector vector_multiply_add(Vector x, Vector y, Vector z) {
    for (int i = 0; i < LANES; i++) z.lane[i] = x.lane[i] * y.lane[i] + z.lane[i];
    return z;
}
ALWAYS_INLINE Vector vector_scale_add(real s, Vector y, Vector z) {
    for (int i = 0; i < LANES; i++) z.lane[i] = s * y.lane[i] + z.lane[i];
    return z;
}
#endif

static inline int64_t min_i64(int64_t x, int64_t y) { return x < y ? x : y; }

/* C(rows,columns) = A(MR,kc) B(kc,NR), or += if add, for one tile. A[i,k] = a[i*a_row + k*a_column], B[k,j] =
 * b[k*NR + j]: packed panels whose missing rows and columns are zero. */
ALWAYS_INLINE void matmul_tile(real *c, int64_t ldc, int rows, int columns, bool add,
                               const real *a, int a_row, int a_column, const real *b, int kc) {
    Vector sum[MR][2];
    memset(sum, 0, sizeof sum);
    for (int k = 0; k < kc; k++) {
        Vector b0 = vector_load(b + k * NR), b1 = vector_load(b + k * NR + LANES);
        UNROLL
        for (int i = 0; i < MR; i++) {
            real a_ik = a[i * a_row + k * a_column];
            sum[i][0] = vector_scale_add(a_ik, b0, sum[i][0]);
            sum[i][1] = vector_scale_add(a_ik, b1, sum[i][1]);
        }
    }
    if (rows == MR && columns == NR) {
        UNROLL
        for (int i = 0; i < MR; i++) {
            real *c_i = c + i * ldc;
            vector_store(c_i, add ? vector_add(vector_load(c_i), sum[i][0]) : sum[i][0]);
            vector_store(c_i + LANES, add ? vector_add(vector_load(c_i + LANES), sum[i][1]) : sum[i][1]);
        }
    } else {
        real tile[MR][NR];
        memcpy(tile, sum, sizeof tile);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < columns; j++) c[i * ldc + j] = add ? c[i * ldc + j] + tile[i][j] : tile[i][j];
    }
}

/* Packs A(rows,kc) for matmul_tile. Rows that are contiguous in memory stay rows (MR,KC_STRIDE), anything else
 * becomes columns (kc,MR): whichever is a plain copy. */
static void pack_a(real *packed, const real *a, int64_t rsa, int64_t csa, int rows, int kc) {
    if (csa == 1) {
        for (int i = 0; i < MR; i++) {
            if (i < rows) memcpy(packed + i * KC_STRIDE, a + i * rsa, kc * sizeof(real));
            else memset(packed + i * KC_STRIDE, 0, kc * sizeof(real));
        }
    } else if (rsa == 1 && rows == MR) {
        for (int k = 0; k < kc; k++) memcpy(packed + k * MR, a + k * csa, MR * sizeof(real));
    } else {
        for (int k = 0; k < kc; k++)
            for (int i = 0; i < MR; i++) packed[k * MR + i] = i < rows ? a[i * rsa + k * csa] : 0;
    }
}

/* Packs B(kc,columns) as kc rows of NR numbers. */
static void pack_b(real *packed, const real *b, int64_t rsb, int64_t csb, int columns, int kc) {
    if (columns < NR) memset(packed, 0, (size_t)kc * NR * sizeof(real));
    if (csb == 1 && columns == NR) {
        for (int k = 0; k < kc; k++) memcpy(packed + k * NR, b + k * rsb, NR * sizeof(real));
    } else if (rsb == 1 && columns == NR) {
        /* a transposition: four columns at a time, in runs so short that the rows they fill stay in the cache */
        enum { RUN = 32, GROUP = 4 };
        for (int k0 = 0; k0 < kc; k0 += RUN)
            for (int j = 0; j < NR; j += GROUP)
                for (int k = k0; k < min_i64(k0 + RUN, kc); k++) {
                    real group[GROUP];
                    for (int i = 0; i < GROUP; i++) group[i] = b[(j + i) * csb + k];
                    memcpy(packed + k * NR + j, group, sizeof group);
                }
    } else {
        for (int k = 0; k < kc; k++)
            for (int j = 0; j < columns; j++) packed[k * NR + j] = b[k * rsb + j * csb];
    }
}

static int matmul_threads(void) {
#ifdef _OPENMP
    if (!omp_in_parallel()) return omp_get_max_threads();
#endif
    return 1;
}

/* One block: C(M,nc) = A(M,kc) B(kc,nc), or += if add, by all the threads of the parallel region around the call.
 * packed_b is theirs together, packed_a each one's own. */
static void matmul_block(real *c, int64_t ldc, const real *a, int64_t rsa, int64_t csa, const real *b, int64_t rsb,
                         int64_t csb, int64_t M, int nc, int kc, bool add, int threads, real *packed_b, real *packed_a) {
    int panels = (nc + NR - 1) / NR;
    /* implicit barriers: nobody multiplies before all is packed, nobody packs again before all is multiplied */
    OMP(for schedule(dynamic))
    for (int p = 0; p < panels; p++)
        pack_b(packed_b + (int64_t)p * NR * kc, b + p * NR * csb, rsb, csb, (int)min_i64(nc - p * NR, NR), kc);

    /* a task is MR rows and, where that makes too few tasks for the threads, only a part of the panels */
    int64_t row_panels = (M + MR - 1) / MR;
    int parts = (int)min_i64(panels, threads == 1 ? 1 : (4 * threads + row_panels - 1) / row_panels);
    OMP(for schedule(dynamic))
    for (int64_t task = 0; task < row_panels * parts; task++) {
        int64_t m = task / parts * MR;
        int part = (int)(task % parts), rows = (int)min_i64(M - m, MR);
        pack_a(packed_a, a + m * rsa, rsa, csa, rows, kc);
        for (int p = panels * part / parts; p < panels * (part + 1) / parts; p++) {
            const real *panel = packed_b + (int64_t)p * NR * kc;
            real *tile = c + m * ldc + p * NR;
            int columns = (int)min_i64(nc - p * NR, NR);
            if (csa == 1) matmul_tile(tile, ldc, rows, columns, add, packed_a, KC_STRIDE, 1, panel, kc);
            else matmul_tile(tile, ldc, rows, columns, add, packed_a, 1, MR, panel, kc);
        }
    }
}

/* c(rows) = A(rows,K) b(K), all contiguous along k: sum i of DOT_VECTORS x LANES sums takes every k that is i modulo
 * their number, and then they are added in pairs. */
ALWAYS_INLINE void matmul_dots(real *c, int64_t ldc, const real *a, int64_t rsa, const real *b, int rows, int64_t K,
                               bool add) {
    enum { STEP = DOT_VECTORS * LANES };
    Vector sum[ROWS][DOT_VECTORS];
    memset(sum, 0, sizeof sum);
    int64_t k = 0;
    for (; k + STEP <= K; k += STEP)
        UNROLL
        for (int j = 0; j < DOT_VECTORS; j++) {
            Vector b_kj = vector_load(b + k + j * LANES);
            UNROLL
            for (int m = 0; m < rows; m++)
                sum[m][j] = vector_multiply_add(vector_load(a + m * rsa + k + j * LANES), b_kj, sum[m][j]);
        }
    for (int m = 0; m < rows; m++) {
        real lanes[LANES];
        if (k < K) {
            real rest[2][STEP] = {{0}};
            memcpy(rest[0], a + m * rsa + k, (size_t)(K - k) * sizeof(real));
            memcpy(rest[1], b + k, (size_t)(K - k) * sizeof(real));
            for (int j = 0; j < DOT_VECTORS; j++)
                sum[m][j] = vector_multiply_add(vector_load(rest[0] + j * LANES), vector_load(rest[1] + j * LANES),
                                                sum[m][j]);
        }
        for (int width = DOT_VECTORS / 2; width > 0; width /= 2)
            for (int j = 0; j < width; j++) sum[m][j] = vector_add(sum[m][j], sum[m][j + width]);
        vector_store(lanes, sum[m][0]);
        for (int width = LANES / 2; width > 0; width /= 2)
            for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
        c[m * ldc] = add ? c[m * ldc] + lanes[0] : lanes[0];
    }
}

/* C(rows,columns) = A(rows,K) B(K,columns) for contiguous rows of B: the sums of a strip of columns stay in
 * registers. */
ALWAYS_INLINE void matmul_strip(real *c, int64_t ldc, const real *a, int64_t rsa, const real *b, int64_t rsb,
                                int columns, int rows, int64_t K, bool add) {
    enum { WIDTH = STRIP_VECTORS * LANES };
    Vector sum[ROWS][STRIP_VECTORS];
    real padded[WIDTH] = {0}, sums[ROWS][WIDTH];
    memset(sum, 0, sizeof sum);
    for (int64_t k = 0; k < K; k++) {
        const real *b_k = b + k * rsb;
        if (columns < WIDTH) b_k = memcpy(padded, b_k, (size_t)columns * sizeof(real));
        UNROLL
        for (int j = 0; j < STRIP_VECTORS; j++) {
            Vector b_kj = vector_load(b_k + j * LANES);
            UNROLL
            for (int m = 0; m < rows; m++) sum[m][j] = vector_scale_add(a[m * rsa + k], b_kj, sum[m][j]);
        }
    }
    memcpy(sums, sum, sizeof sums);
    for (int m = 0; m < rows; m++)
        for (int j = 0; j < columns; j++) c[m * ldc + j] = add ? c[m * ldc + j] + sums[m][j] : sums[m][j];
}

/* One of the two above; `rows` must be a constant, so that the sums become registers. */
ALWAYS_INLINE void matmul_rows(real *c, int64_t ldc, const real *a, int64_t rsa, const real *b, int64_t rsb,
                               int columns, int rows, int64_t K, bool add) {
    if (rsb == 1) matmul_dots(c, ldc, a, rsa, b, rows, K, add);
    else matmul_strip(c, ldc, a, rsa, b, rsb, columns, rows, K, add);
}

/* Few rows, contiguous in A, and B contiguous one way or the other: bounded by the reading of B, which comes from memory
 * once, a column or a strip of columns at a time. */
static void matmul_few_rows(real *c, int64_t ldc, const real *a, int64_t rsa, const real *b, int64_t rsb, int64_t csb,
                            int64_t M, int64_t N, int64_t K, bool add) {
    int threads = N * K < 1 << 17 ? 1 : matmul_threads();
    int64_t step = rsb == 1 ? 1 : STRIP_VECTORS * LANES;
    (void)threads;                                       /* unused without OpenMP */
    OMP(parallel for schedule(static) num_threads(threads) if(threads > 1))
    for (int64_t n = 0; n < N; n += step) {
        for (int64_t m = 0; m < M; m += ROWS) {
            real *c_mn = c + m * ldc + n;
            const real *a_m = a + m * rsa, *b_n = b + n * csb;
            int columns = (int)min_i64(N - n, step);
            switch (min_i64(M - m, ROWS)) {
            case 1: matmul_rows(c_mn, ldc, a_m, rsa, b_n, rsb, columns, 1, K, add); break;
            case 2: matmul_rows(c_mn, ldc, a_m, rsa, b_n, rsb, columns, 2, K, add); break;
            case 3: matmul_rows(c_mn, ldc, a_m, rsa, b_n, rsb, columns, 3, K, add); break;
            default: matmul_rows(c_mn, ldc, a_m, rsa, b_n, rsb, columns, ROWS, K, add);
            }
        }
    }
}

/* C(M,N) = A(M,K) B(K,N), or C += A B if accumulate. Elements are addressed by strides: A[m,k] = a[m*rsa + k*csa],
 * B[k,n] = b[k*rsb + n*csb], C[m,n] = c[m*ldc + n]. Any sizes >= 0 (K = 0: an empty sum); C overlaps neither A nor B.
 * Runs on all threads, or on one when called inside a parallel region or when the product is small. */
static void matmul(real *c, int64_t ldc, const real *a, int64_t rsa, int64_t csa, const real *b, int64_t rsb,
                   int64_t csb, int64_t M, int64_t N, int64_t K, bool accumulate) {
    static _Thread_local _Alignas(64) real b_buffer[KC * NC];
    if (M <= 0 || N <= 0) return;
    if (K <= 0) {
        for (int64_t m = 0; m < M && !accumulate; m++) memset(c + m * ldc, 0, N * sizeof(real));
        return;
    }
    if (csa == 1 && ((rsb == 1 && M <= FEW_ROWS) || (csb == 1 && M <= ROWS))) {
        matmul_few_rows(c, ldc, a, rsa, b, rsb, csb, M, N, K, accumulate);
        return;
    }
    int threads = M * N * K < 1 << 19 ? 1 : matmul_threads();
    int64_t blocks = (K + KC - 1) / KC, kc = (K + blocks - 1) / blocks;     /* blocks of nearly equal depth */
    real *packed_b = b_buffer;                                              /* of the calling thread        */
    OMP(parallel num_threads(threads) if(threads > 1))
    {
        static _Thread_local _Alignas(64) real packed_a[MR * KC_STRIDE];
        for (int64_t n = 0; n < N; n += NC)
            for (int64_t k = 0; k < K; k += kc)
                matmul_block(c + n, ldc, a + k * csa, rsa, csa, b + k * rsb + n * csb, rsb, csb, M,
                             (int)min_i64(N - n, NC), (int)min_i64(K - k, kc), accumulate || k > 0,
                             threads, packed_b, packed_a);
    }
}

/* e^x that compilers turn into vector code in a loop. float: x = n ln 2 + r with |r| <= ln(2)/2, a polynomial for
 * e^r (equal-ripple, 3e-9), and 2^n in two factors made of exponent bits, so that results fade through the denormal
 * numbers to 0 and pass into infinity; NaN stays NaN. Error at most 1.01 units in the last place over [-87, 88].
 * double, which serves tests: the library's. */
static inline real real_exp(real x) {
    if (sizeof(real) == sizeof(double)) return (real)exp((double)x);
    const float round = 12582912.0f;                          /* 1.5 * 2^23: adding it rounds to an integer     */
    const uint32_t round_bits = 0x4B400000u, limit = 0x42D00000u, infinity = 0x7F800000u;
    float y = (float)x, scale1, scale2;
    uint32_t bits, sign;
    /* |x| > 104 becomes 104, where the result is 0 or infinity already; on bits, since gcc makes no vector code of a
     * comparison that might meet NaN */
    memcpy(&bits, &y, sizeof bits);
    sign = bits & 0x80000000u;
    bits -= sign;
    bits = sign | (bits > limit && bits <= infinity ? limit : bits);
    memcpy(&y, &bits, sizeof y);

    float shifted = y * 1.44269504f + round, n = shifted - round;
    float r = y - n * 0.693359375f - n * -2.12194440e-4f;     /* ln 2 in two parts: n times the first is exact  */
    float p = 0.0013814536f;
    p = p * r + 0.0083687450f;
    p = p * r + 0.0416683904f;
    p = p * r + 0.1666652040f;
    p = p * r + 0.4999999343f;
    p = p * r * r + r + 1.0f;
    memcpy(&bits, &shifted, sizeof bits);                     /* the low bits hold n                            */
    int32_t whole = (int32_t)(bits - round_bits), half = whole >> 1;
    bits = (uint32_t)(half + 127) << 23;
    memcpy(&scale1, &bits, sizeof scale1);
    bits = (uint32_t)(whole - half + 127) << 23;
    memcpy(&scale2, &bits, sizeof scale2);
    return (real)(p * scale1 * scale2);
}

/* 1 / (1 + e^-x): no cancellation for either sign of x, 0 and 1 at the far ends. */
static inline real real_sigmoid(real x) {
    return 1 / (1 + real_exp(-x));
}
