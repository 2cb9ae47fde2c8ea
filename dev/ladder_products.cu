/* ladder_products.cu - products with SiLU and gates in their epilogue, from a thread a number to the tensor
 * cores, with a kernel after cuBLAS and without one.
 *
 * The last version of each direction is that of cuda/fused.cuh, called, not copied. The products are those of
 * the models that the speed targets name; truth is computed on the device, in double.
 */
#include "ladder.cuh"

#include "../cuda/fused.cuh"

#define OPTIONS(X)                                                                                          \
    X(TEXT, product, NULL, 0, 0, "NAME", "Size", "only products whose names begin so, such as mega200M")    \
    X(FLAG, quick, NULL, 0, 0, "", "Measuring", "without the naive version")                                \
    X(INT, rows, "0", 0, 1048576, "ROWS", "Size", "one product of other sizes, all ways: rows")             \
    X(INT, columns, "2048", 256, 65536, "COLUMNS", "Size", "its columns, a multiple of 256")                \
    X(INT, depth, "1024", 64, 65536, "DEPTH", "Size", "the numbers a product adds up, a multiple of 64")
struct Values {
    OPTIONS(OPTION_MEMBER)
};
static const Option options[] = {OPTIONS(OPTION_ROW)};

/* A product of rows,depth and depth,columns; gated: with a second factor beside the SiLU's. */
struct Shape {
    const char *name;
    int64_t rows, columns, depth;
    bool backward, gated, biased; /* biased: adds one; in the backward, its gradient is wanted */
    bool causal;                  /* the gradient of attention's values: depth is the size of a chunk */
};
/* mega200M's with 8 x 4,096 tokens, mega1.3B's with 4 x 4,096, bytes12M's with 32 x 2,048. In the backward, h
 * is wanted once more. */
static const Shape shapes[] = {
    {"bytes12M/wr", 65536, 768, 384, false, true, true},
    {"bytes12M/wh2", 65536, 768, 384, true, true, true},
    {"mega200M/wv", 32768, 2048, 1024, false, false, true},
    {"mega200M/wr", 32768, 2048, 1024, false, true, true},
    {"mega200M/fc1", 32768, 2560, 1024, false, false, false},
    {"mega200M/wh2", 32768, 2048, 1024, true, true, true},
    {"mega200M/fc2", 32768, 2560, 1024, true, false, false},
    {"mega1.3B/wv", 16384, 4096, 2048, false, false, true},
    {"mega1.3B/wr", 16384, 4096, 2048, false, true, true},
    {"mega1.3B/fc1", 16384, 4864, 2048, false, false, false},
    {"mega1.3B/wh2", 16384, 4096, 2048, true, true, true},
    {"mega1.3B/fc2", 16384, 4864, 2048, true, false, false},
    {"bytes12M/dv", 65536, 768, 512, true, false, true, true},
    {"mega200M/dv", 32768, 2048, 2048, true, false, true, true},
    {"mega1.3B/dv", 16384, 4096, 2048, true, false, true, true},
};

/* One set of arguments: in (rows,depth); one, two, three (rows,columns) are written: y, h, or dx, da, h; x
 * and other (rows,columns) are read: of x the backward's, of other the gate. Causal: in is the weights of
 * attention, a row for each query, with 0 for later keys; other is the gradient of its output, and only dx is
 * written. dbias (columns) gets the backward's column sums of dx: of each set its own, since what set 0 left
 * is looked at again after runs on others. */
struct Arguments {
    bf16 *in, *one, *two, *three, *x, *other;
    float *dbias;
};
/* Common to all sets: weight (columns,depth) or, backward, (depth,columns); bias (columns). */
struct Parameters { bf16 *weight, *bias; };
struct Truth { double *one, *two, *three, *dbias; };

/* ----------------------------------------------------------------------------------------------------------
 * 1. naive: a thread owns a number of the product
 */

enum { SIDE = 16 };

/* computes: y = in W^T + bias, h = silu(y) other; or g = in W, dx = g a silu'(x), da = g silu(x),
 *           h = a silu(x); or causal, of each chunk, g = in^T other, dx = g silu'(x)
 * launch:   grid (ceil(columns / 16), ceil(rows / 16)), block (16, 16): a thread owns a number; tiles of the
 *           operands go through shared memory
 * traffic:  a sixteenth of 2 rows columns depth sizeof(bf16) bytes, most of it from the caches
 * needs:    depth a multiple of 16
 * numerics: Real */
template <typename Real, typename Out>
__global__ void naive_kernel(Out *one, Out *two, Out *three, const bf16 *in, const bf16 *weight,
                             const bf16 *bias, const bf16 *x, const bf16 *other, Shape s) {
    __shared__ Real a[SIDE][SIDE + 1], b[SIDE][SIDE + 1];
    int i = (int)threadIdx.y, j = (int)threadIdx.x;
    int64_t row = (int64_t)blockIdx.y * SIDE + i, column = (int64_t)blockIdx.x * SIDE + j,
            other_column = (int64_t)blockIdx.x * SIDE + i;
    Real sum = 0;
    int64_t chunk = row / s.depth * s.depth; // causal: its first row
    if (s.causal) weight = other + chunk * s.columns;
    for (int64_t k = 0; k < s.depth; k += SIDE) {
        int64_t at = s.causal ? (chunk + k + j) * s.depth + row - chunk : row * s.depth + k + j;
        a[i][j] = row < s.rows ? (Real)to_float(in[at]) : (Real)0;
        b[i][j] = s.backward ? (Real)to_float(weight[(k + i) * s.columns + column])
                             : (Real)to_float(weight[other_column * s.depth + k + j]);
        __syncthreads(); // the tiles are there
        for (int d = 0; d < SIDE; d++) sum += a[i][d] * (s.backward ? b[d][j] : b[j][d]);
        __syncthreads(); // all have read them
    }
    if (row >= s.rows) return;
    int64_t at = row * s.columns + column;
    Real gate = s.gated ? (Real)to_float(other[at]) : (Real)1;
    if (!s.backward) {
        if (s.biased) sum += (Real)to_float(bias[column]);
        one[at] = (Out)sum, two[at] = (Out)(sum / (1 + (Real)exp(-(double)sum)) * gate);
        return;
    }
    Real v = (Real)to_float(x[at]), logistic = 1 / (1 + (Real)exp(-(double)v));
    one[at] = (Out)(sum * gate * logistic * (1 + v * (1 - logistic)));
    if (s.gated) two[at] = (Out)(sum * v * logistic);
    if (!s.causal) three[at] = (Out)(gate * v * logistic);
}
static void naive_product(Context *context, const Arguments &set, const Parameters &p, const Shape &s) {
    dim3 grid(blocks_for(s.columns, SIDE), blocks_for(s.rows, SIDE)), block(SIDE, SIDE);
    LAUNCH((naive_kernel<float, bf16>), grid, block, context, set.one, set.two, set.three, set.in, p.weight,
           p.bias, set.x, set.other, s);
    if (s.backward && s.biased) add_column_sums(context, set.dbias, set.one, s.rows, s.columns);
}

/* computes: weights[query, key] = 0 for the keys of a chunk behind the query
 * launch:   grid ceil(rows C / 256), block 256: a thread owns a weight
 * traffic:  about rows C bytes
 * needs:    nothing
 * numerics: none */
__global__ static void causal_kernel(bf16 *weights, int64_t count, int64_t C) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count && i % C > i / C % C) weights[i] = from_float<bf16>(0.0f);
}

/* computes: dbias[j] = sum over rows of dx[row, j], in double
 * launch:   grid ceil(columns / 256), block 256: a thread owns a column
 * traffic:  8 rows columns bytes
 * needs:    nothing
 * numerics: double */
__global__ static void column_truth_kernel(double *dbias, const double *dx, Shape s) {
    int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (j >= s.columns) return;
    double sum = 0;
    for (int64_t row = 0; row < s.rows; row++) sum += dx[row * s.columns + j];
    dbias[j] = sum;
}

/* ----------------------------------------------------------------------------------------------------------
 * 2. cuBLAS and a kernel after it; 3. one kernel
 */

/* As attention's backward does it: the keys of a quarter of a chunk, or of 256, with all later queries. */
static void cublas_causal(Context *context, const Arguments &set, const Shape &s) {
    int64_t C = s.depth, block = std::max(C / 4, std::min(C, (int64_t)256));
    for (int64_t first = 0; first < C; first += block) {
        const bf16 *weights = set.in + first * C + first, *da = set.other + first * s.columns;
        matmul(context, true, false, std::min(block, C - first), s.columns, C - first, 1.0f,
               matrix(weights, C, C * C), matrix(da, s.columns, C * s.columns), 0.0f,
               matrix(set.one + first * s.columns, s.columns, C * s.columns), s.rows / C);
    }
}
static void cublas_product(Context *context, const Arguments &set, const Parameters &p, const Shape &s) {
    if (s.causal)
        cublas_causal(context, set, s);
    else if (s.backward)
        linear_backward_input<bf16>(context, set.one, false, set.in, p.weight, s.rows, s.depth, s.columns);
    else
        linear_forward<bf16>(context, set.one, set.in, p.weight, s.biased ? p.bias : nullptr, nullptr, s.rows,
                             s.columns, s.depth);
}
static void cublas_and_kernel(Context *context, const Arguments &set, const Parameters &p, const Shape &s) {
    const bf16 *gate = s.gated ? set.other : nullptr;
    cublas_product(context, set, p, s);
    if (s.backward)
        silu_gate_backward<bf16>(context, set.one, s.gated ? set.two : nullptr,
                                 s.causal ? nullptr : set.three, s.biased ? set.dbias : nullptr, set.one,
                                 set.x, gate, s.rows, s.columns, no_dropout());
    else
        silu_gate<bf16>(context, set.two, nullptr, set.one, gate, s.rows * s.columns, no_dropout());
}

static void fused(Context *context, const Arguments &set, const Parameters &p, const Shape &s) {
    const bf16 *gate = s.gated ? set.other : nullptr;
    if (s.causal)
        causal_silu_backward(context, set.one,
                             take_sum(context, set.dbias, s.rows / FUSED_WARP_ROWS, s.columns), set.in,
                             set.other, set.x, s.rows / s.depth, s.depth, s.columns, 0, s.columns);
    else if (s.backward)
        linear_gate_backward<bf16>(context, set.one, s.gated ? set.two : nullptr, set.three,
                                   s.biased ? set.dbias : nullptr, set.in, p.weight, set.x, gate, s.rows,
                                   s.depth, s.columns, no_dropout());
    else
        linear_silu_forward<bf16>(context, set.two, set.one, nullptr, set.in, p.weight,
                                  s.biased ? p.bias : nullptr, gate, s.rows, s.columns, s.depth,
                                  no_dropout());
}

/* ----------------------------------------------------------------------------------------------------------
 * The program
 */

/* Of every version, the milliseconds for each product so far, in a line. */
struct Table {
    std::vector<const char *> products, versions;
    std::vector<std::vector<double>> ms;
    void add(const char *product, const char *version, double time) {
        if (std::isnan(time)) return; // --only has left it out
        if (products.empty() || products.back() != product) products.push_back(product);
        size_t i = 0;
        while (i < versions.size() && versions[i] != version) i++;
        if (i == versions.size()) versions.push_back(version), ms.emplace_back();
        ms[i].resize(products.size() - 1, NAN);
        ms[i].push_back(time);
    }
    void print() const {
        printf("\n%-18s", "milliseconds");
        for (const char *product : products) printf(" %12s", product);
        for (size_t i = 0; i < versions.size(); i++) {
            printf("\n%-18s", versions[i]);
            for (double time : ms[i])
                if (time < 0)
                    printf(" %12s", "wrong");
                else
                    printf(" %12.4f", time);
        }
        printf("\n");
    }
};

static void climb(Ladder *ladder, Table *table, const std::vector<Arguments> &sets, const Parameters &p,
                  const Truth &truth, const Shape &s, bool quick) {
    Context *context = &ladder->context;
    int64_t size = s.rows * s.columns;
    int count = (int)sets.size(), arrays = s.backward ? 3 + 2 * s.gated : 2 + s.gated;
    int64_t operands = s.causal ? s.rows * s.depth / 2 : (s.rows + s.columns) * s.depth;
    double bytes = (double)sizeof(bf16) * (double)(arrays * size + operands);
    /* Rounding to bf16 leaves 1.7e-3 each time: the product is rounded, then what comes of it. */
    LadderOutput<bf16> one = {s.backward ? "dx" : "y", sets[0].one, size, nullptr, 4e-3, truth.one},
                       two = {s.backward ? "da" : "h", sets[0].two, size, nullptr, 4e-3, truth.two},
                       three = {"h", sets[0].three, size, nullptr, 4e-3, truth.three};
    LadderOutput<float> dbias = {"dbias", sets[0].dbias, s.columns, nullptr, 4e-3, truth.dbias};
    ladder->flop = (s.causal ? 1.0 : 2.0) * (double)size * (double)s.depth, ladder->first_ms = 0;
    printf("%s: %lld rows, %lld columns, depth %lld, %s\n", s.name, (long long)s.rows, (long long)s.columns,
           (long long)s.depth, s.causal ? "backward, causal" : s.backward ? "backward" : "forward");
    auto step = [&](const char *name, const char *idea, auto version) {
        ladder->ms = NAN;
        auto run = [&](int i) {
            const Arguments &set = sets[(size_t)i];
            clear(context, set.dbias, (size_t)s.columns * sizeof(float)); // sums are added to it
            version(set);
            add_sums(context);
        };
        if (!s.backward)
            ladder_step(ladder, name, idea, bytes, count, run, one, two);
        else if (s.causal)
            ladder_step(ladder, name, idea, bytes, count, run, one, dbias);
        else if (s.gated && s.biased)
            ladder_step(ladder, name, idea, bytes, count, run, one, two, three, dbias);
        else
            ladder_step(ladder, name, idea, bytes, count, run, one, three);
        table->add(s.name, name, ladder->ms);
    };
    int repeats = ladder->options.repeats;
    ladder->options.repeats = std::min(repeats, 3); // it takes a hundred times as long as the others
    if (!quick)
        step("naive", "a thread owns a number, tiles in shared memory",
             [&](const Arguments &set) { naive_product(context, set, p, s); });
    ladder->options.repeats = repeats;
    ladder->ms = NAN;
    ladder_step(ladder, "cublas_alone", "the product, without SiLU and gate", bytes, count,
                [&](int i) { cublas_product(context, sets[(size_t)i], p, s); });
    table->add(s.name, "cublas_alone", ladder->ms);
    step("cublas", "tensor cores; the product is written, read, written",
         [&](const Arguments &set) { cublas_and_kernel(context, set, p, s); });
    if (!context->hopper) return;
    step("fused", "one kernel writes a tile while it multiplies the next",
         [&](const Arguments &set) { fused(context, set, p, s); });
}

/* The truth of set 0. */
static void compute_truth(Ladder *ladder, const Truth &truth, const Arguments &set, const Parameters &p,
                          const Shape &s) {
    dim3 grid(blocks_for(s.columns, SIDE), blocks_for(s.rows, SIDE)), block(SIDE, SIDE);
    LAUNCH((naive_kernel<double, double>), grid, block, &ladder->context, truth.one, truth.two, truth.three,
           set.in, p.weight, p.bias, set.x, set.other, s);
    if (s.backward)
        LAUNCH(column_truth_kernel, blocks_for(s.columns, 256), 256, &ladder->context, truth.dbias, truth.one,
               s);
}

static void climb_shape(Ladder *ladder, Table *table, const Shape &s, bool quick) {
    int64_t size = s.rows * s.columns;
    std::vector<void *> all;
    auto numbers = [&](int64_t count) {
        return all.push_back(ladder_allocate<bf16>(count)), (bf16 *)all.back();
    };
    auto truths = [&](int64_t count) {
        return all.push_back(ladder_allocate<double>(count)), (double *)all.back();
    };
    Parameters p = {numbers(s.columns * s.depth), numbers(s.columns)};
    Truth truth = {truths(size), truths(size), truths(size), truths(s.columns)};
    ladder_fill(ladder, p.weight, s.columns * s.depth, 1, 0.0f, 1.0f / std::sqrt((float)s.depth));
    ladder_fill(ladder, p.bias, s.columns, 2, 0.0f, 0.5f);
    std::vector<Arguments> sets((size_t)ladder_sets(ladder, 2.0 * (double)size * sizeof(bf16)));
    for (size_t i = 0; i < sets.size(); i++) {
        sets[i] = Arguments{numbers(s.rows * s.depth), numbers(size), numbers(size),
                            numbers(size),             numbers(size), numbers(size),
                            ladder_allocate<float>(s.columns)};
        all.push_back(sets[i].dbias);
        ladder_fill(ladder, sets[i].in, s.rows * s.depth, 10 + 3 * i, 0.0f, 1.0f);
        if (s.causal)
            LAUNCH(causal_kernel, blocks_for(s.rows * s.depth, 256), 256, &ladder->context, sets[i].in,
                   s.rows * s.depth, s.depth);
        ladder_fill(ladder, sets[i].x, size, 11 + 3 * i, 0.0f, 1.0f);
        ladder_fill(ladder, sets[i].other, size, 12 + 3 * i, 0.0f, 1.0f);
    }
    compute_truth(ladder, truth, sets[0], p, s);
    climb(ladder, table, sets, p, truth, s, quick);
    for (void *memory : all) CHECK_CUDA(cudaFree(memory));
}

int main(int argc, char **argv) {
    Ladder ladder;
    Values values;
    ladder_options(&ladder, argc, argv, "ladder_products",
                   "Times products with SiLU and gates, bf16, and checks each version against double.", options,
                   OPTION_COUNT(options), &values);
    if (values.columns % FUSED_N)
        die_if(errorf("--columns %d is not a multiple of %d", values.columns, (int)FUSED_N));
    if (values.depth % FUSED_K)
        die_if(errorf("--depth %d is not a multiple of %d", values.depth, (int)FUSED_K));
    ladder_open(&ladder, (size_t)512 << 20);
    Context *context = &ladder.context;
    start_products(context);
    context->cublas_workspace = ladder_allocate<char>((int64_t)CUBLAS_WORKSPACE);
    use_workspace(context);
    context->hopper = hopper_code(context, (int *)context->scratch);
    if (!context->hopper) printf("this device or this build knows no wgmma: the fused version is left out\n");
    Table table;
    if (values.rows) {
        Shape s = {"forward", values.rows, values.columns, values.depth, false, true, true};
        climb_shape(&ladder, &table, s, values.quick);
        s.name = "backward", s.backward = true;
        climb_shape(&ladder, &table, s, values.quick);
        s.name = "causal", s.causal = true, s.gated = false;
        if (s.rows % s.depth == 0 && s.depth % FUSED_M == 0)
            climb_shape(&ladder, &table, s, values.quick);
    } else {
        for (const Shape &s : shapes)
            if (!values.product || strncmp(values.product, s.name, strlen(values.product)) == 0)
                climb_shape(&ladder, &table, s, values.quick);
    }
    table.print();
    return ladder_close(&ladder);
}
