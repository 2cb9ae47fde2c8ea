/* ladder.cuh - one harness for kernel ladders: several versions of one computation, from naive to final,
 * each with one idea more than the one before it, under the same inputs, the same check and the same clock.
 *
 * A ladder is a program of its own (dev/ladder_NAME.cu, `make build/ladder_NAME`). It fills several sets of
 * arguments, computes the truth once in double, and gives each version to ladder_step, which runs it on
 * poisoned outputs, compares, times and prints a line. The exit status is 1 if any version was wrong.
 *
 * Time: CUDA events around one run, the median of many, after a warm-up. Successive runs take different
 * sets of arguments, so many that together they are three times the second-level cache: a run finds nothing
 * there that the run before it left.
 */
#ifndef DEV_LADDER_CUH
#define DEV_LADDER_CUH

#include "../cuda/common.cuh"

#include <algorithm>
#include <cmath>
#include <vector>

/* These headers are C; here they are read as C++. */
#define _Noreturn [[noreturn]]
#define _Thread_local thread_local
#include "../lib/options.h"

/* Every ladder's options; a ladder adds its sizes in a table of its own. */
#define LADDER_OPTIONS(X)                                                                                   \
    X(INT, repeats, "50", 1, 100000, "COUNT", "Measuring", "timed runs of which the median is told")        \
    X(TEXT, only, NULL, 0, 0, "NAME", "Measuring", "run only the version with this name")
struct LadderOptions {
    LADDER_OPTIONS(OPTION_MEMBER)
};

struct Ladder {
    LadderOptions options;
    Context context; /* launchers of cuda/ want one: a stream, the number of SMs, scratch memory */
    double peak;     /* bytes of device memory a second, as rated */
    size_t cache;    /* bytes of the second-level cache */
    double first_ms; /* of the first version; 0 before it ran */
    double flop;     /* of a run, for versions that are bound by arithmetic; 0: not told */
    double ms;       /* of the last version; negative if it was wrong */
    bool wrong, any; /* was a version wrong; did one run */
};

/* Reads the command line: `table`, a program's own options whose values lie in `values`, and
 * LADDER_OPTIONS. Ends the program after --help and, with one sentence, on an error. */
static inline void ladder_options(Ladder *ladder, int argc, char **argv, const char *program,
                                  const char *summary, const Option *table, int count, void *values) {
    using Values = LadderOptions;
    static const Option common[] = {LADDER_OPTIONS(OPTION_ROW)};
    static OptionSet set;
    bool help = false;
    *ladder = Ladder{};
    options_init(&set, program, "[options]", summary);
    options_add(&set, table, count, values);
    options_add(&set, common, OPTION_COUNT(common), &ladder->options);
    die_if(options_parse(&set, argc, argv, &help));
    if (!help) return;
    options_print_help(stdout, &set);
    exit(0);
}

/* count elements of device memory; all bits are set, which is NaN in every format. */
template <typename T> static T *ladder_allocate(int64_t count) {
    void *memory = nullptr;
    CHECK_CUDA(cudaMalloc(&memory, (size_t)count * sizeof(T)));
    CHECK_CUDA(cudaMemset(memory, 0xFF, (size_t)count * sizeof(T)));
    CHECK_CUDA(cudaDeviceSynchronize()); // kernels run in another stream
    return (T *)memory;
}

/* Finds the device and prints what it is. scratch_bytes: what the launchers of cuda/ may borrow. */
static inline void ladder_open(Ladder *ladder, size_t scratch_bytes) {
    int device = 0, clock = 0, width = 0, cache = 0;
    cudaDeviceProp properties;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaGetDeviceProperties(&properties, device));
    CHECK_CUDA(cudaDeviceGetAttribute(&clock, cudaDevAttrMemoryClockRate, device));      // kHz
    CHECK_CUDA(cudaDeviceGetAttribute(&width, cudaDevAttrGlobalMemoryBusWidth, device)); // bits
    CHECK_CUDA(cudaDeviceGetAttribute(&cache, cudaDevAttrL2CacheSize, device));
    CHECK_CUDA(cudaDeviceGetAttribute(&ladder->context.num_sms, cudaDevAttrMultiProcessorCount, device));
    CHECK_CUDA(cudaStreamCreateWithFlags(&ladder->context.stream, cudaStreamNonBlocking));
    ladder->context.scratch = ladder_allocate<char>((int64_t)scratch_bytes);
    ladder->context.scratch_bytes = scratch_bytes;
    ladder->peak = 2.0 * clock * 1e3 * width / 8;
    ladder->cache = (size_t)cache;
    printf("%s, %d SMs, %.0f GB/s rated, cache %.0f MiB; median of %d runs\n", properties.name,
           ladder->context.num_sms, ladder->peak / 1e9, cache / 1048576.0, ladder->options.repeats);
    printf("%-22s %9s %8s %6s %8s %9s  %s\n", "version", "ms", "GB/s", "peak", "faster", "error",
           "its idea");
}

/* How many sets of arguments of `bytes` each are three times the cache. */
static inline int ladder_sets(const Ladder *ladder, double bytes) {
    return std::max(2, (int)std::ceil(3.0 * (double)ladder->cache / bytes));
}

/* computes: x[i] = mean + spread * (the sum of four uniform numbers, scaled to variance 1), from (seed, i)
 * launch:   grid ceil(count / 256), block 256: a thread owns an element
 * traffic:  count sizeof(T) bytes
 * needs:    nothing
 * numerics: the same numbers on every device */
template <typename T>
__global__ void ladder_fill_kernel(T *x, int64_t count, uint64_t seed, float mean, float spread) {
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    uint64_t z = (seed * 0xD1B54A32D192ED03ull) ^ ((uint64_t)i + 1) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    z ^= z >> 31;
    float sum = 0;
    for (int k = 0; k < 4; k++) sum += (float)((z >> (16 * k)) & 0xFFFF) / 65536.0f - 0.5f;
    x[i] = from_float<T>(mean + spread * sum * 1.7320508f);
}
template <typename T>
static void ladder_fill(Ladder *ladder, T *x, int64_t count, uint64_t seed, float mean, float spread) {
    LAUNCH(ladder_fill_kernel<T>, blocks_for(count, 256), 256, &ladder->context, x, count, seed, mean,
           spread);
}

/* Device memory on the host, as double. */
template <typename T> static std::vector<double> ladder_fetch(Ladder *ladder, const T *x, int64_t count) {
    std::vector<T> host((size_t)count);
    CHECK_CUDA(cudaStreamSynchronize(ladder->context.stream));
    CHECK_CUDA(cudaMemcpy(host.data(), x, (size_t)count * sizeof(T), cudaMemcpyDeviceToHost));
    std::vector<double> out((size_t)count);
    for (size_t i = 0; i < out.size(); i++) {
        if constexpr (std::is_same<T, double>::value)
            out[i] = host[i];
        else
            out[i] = (double)to_float(host[i]);
    }
    return out;
}

/* An output of a version: where it lies in set 0, what it should be, and how far off it may be, as
 * RMS(difference) / RMS(truth). */
template <typename T> struct LadderOutput {
    const char *name;
    T *x;
    int64_t count;
    const std::vector<double> *truth;
    double tolerance;
    const double *on_device; /* the truth there instead, where it is large; NULL: truth */
};

/* What a block finds out: sums of (x - truth)^2 and truth^2, and the largest |x - truth| / (|truth| + typical).
 */
struct LadderSums { double difference, size, largest; };
enum { LADDER_SUM_BLOCKS = 1024, LADDER_SUM_THREADS = 256 };

/* computes: LadderSums of each block's share
 * launch:   grid 1024, block 256: a thread takes every 262,144th
 * traffic:  count (sizeof(T) + 8) bytes
 * needs:    nothing
 * numerics: double, fixed order */
template <typename T>
__global__ void ladder_error_kernel(LadderSums *sums, const T *x, const double *truth, int64_t count,
                                    double typical) {
    __shared__ double shared[LADDER_SUM_THREADS / WARP_SIZE];
    __shared__ float shared_largest[LADDER_SUM_THREADS / WARP_SIZE];
    LadderSums own = {};
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += (int64_t)gridDim.x * blockDim.x) {
        double d = (double)to_float(x[i]) - truth[i];
        own.difference += d * d, own.size += truth[i] * truth[i];
        own.largest = fmax(own.largest, fabs(d) / (fabs(truth[i]) + typical));
    }
    own.difference = block_sum(own.difference, shared);
    own.size = block_sum(own.size, shared);
    own.largest = block_max((float)own.largest, shared_largest);
    if (threadIdx.x == 0) sums[blockIdx.x] = own;
}
template <typename T>
static LadderSums ladder_sums(Ladder *ladder, const T *x, const double *truth, int64_t count, double typical) {
    ScratchScope scope(&ladder->context);
    LadderSums *sums = take<LadderSums>(&ladder->context, LADDER_SUM_BLOCKS), all = {};
    LAUNCH(ladder_error_kernel<T>, LADDER_SUM_BLOCKS, LADDER_SUM_THREADS, &ladder->context, sums, x, truth,
           count, typical);
    std::vector<double> each = ladder_fetch(ladder, (const double *)sums, 3 * LADDER_SUM_BLOCKS);
    for (size_t i = 0; i < each.size(); i += 3) {
        all.difference += each[i], all.size += each[i + 1];
        all.largest = std::max(all.largest, each[i + 2]);
    }
    return all;
}

/* RMS(x - truth) / RMS(truth) of one output; NaN is infinitely wrong. With the truth on the device also an
 * eighth of the largest error of a number, by its size and RMS(truth): a few wrong ones do not hide. */
template <typename T> static double ladder_error(Ladder *ladder, const LadderOutput<T> &output) {
    double difference = 0, size = 0, largest = 0;
    if (output.on_device) {
        LadderSums sums = ladder_sums(ladder, output.x, output.on_device, output.count, 1.0);
        difference = sums.difference, size = sums.size;
        double typical = std::sqrt(size / (double)output.count);
        largest = ladder_sums(ladder, output.x, output.on_device, output.count, typical).largest;
    } else {
        std::vector<double> ours = ladder_fetch(ladder, output.x, output.count);
        for (size_t i = 0; i < ours.size(); i++) {
            double d = ours[i] - (*output.truth)[i];
            difference += d * d, size += (*output.truth)[i] * (*output.truth)[i];
        }
    }
    double error = std::max(std::sqrt(difference / size), largest / 8);
    return std::isfinite(error) ? error : INFINITY;
}

/* The median time of a run in milliseconds; run(i) works on set i. */
template <typename Run> static double ladder_time(Ladder *ladder, int sets, const Run &run) {
    cudaEvent_t start, stop;
    std::vector<float> times;
    CHECK_CUDA(cudaEventCreate(&start));
    CHECK_CUDA(cudaEventCreate(&stop));
    for (int i = 0; i < 2 * sets; i++) run(i % sets);
    for (int i = 0; i < ladder->options.repeats; i++) {
        float ms = 0;
        CHECK_CUDA(cudaEventRecord(start, ladder->context.stream));
        run(i % sets);
        CHECK_CUDA(cudaEventRecord(stop, ladder->context.stream));
        CHECK_CUDA(cudaEventSynchronize(stop));
        CHECK_CUDA(cudaEventElapsedTime(&ms, start, stop));
        times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    CHECK_CUDA(cudaEventDestroy(start));
    CHECK_CUDA(cudaEventDestroy(stop));
    return times[times.size() / 2];
}

/* One version: poisons its outputs, runs it on set 0, compares them, times it and prints its line. bytes:
 * what any version has to move at least. T...: the types of the outputs. */
template <typename Run, typename... T>
static void ladder_step(Ladder *ladder, const char *name, const char *idea, double bytes, int sets,
                        const Run &run, const LadderOutput<T> &...outputs) {
    if (ladder->options.only && strcmp(ladder->options.only, name) != 0) return;
    ladder->any = true;
    auto poison = [&](void *x, size_t size) {
        CHECK_CUDA(cudaMemsetAsync(x, 0xFF, size, ladder->context.stream));
    };
    (poison(outputs.x, (size_t)outputs.count * sizeof(T)), ...);
    run(0);
    const char *worst = "";
    char rate[32] = "";
    double largest = 0, ratio = 0;
    bool wrong = false;
    auto judge = [&](const char *output, double error, double tolerance) {
        wrong = wrong || !(error <= tolerance);
        if (!*worst || !(error / tolerance <= ratio))
            worst = output, largest = error, ratio = error / tolerance;
    };
    (judge(outputs.name, ladder_error(ladder, outputs), outputs.tolerance), ...);
    double ms = ladder_time(ladder, sets, run);
    if (ladder->first_ms == 0) ladder->first_ms = ms;
    if (ladder->flop > 0) {
        /* after many runs once more, which is cheap there: a race does not show itself in every run */
        (judge(outputs.name, ladder_error(ladder, outputs), outputs.tolerance), ...);
        snprintf(rate, sizeof rate, "%.0f TFLOP/s: ", ladder->flop / ms * 1e-9);
    }
    printf("%-22s %9.4f %8.0f %5.1f%% %7.1fx %9.1e  %s%s\n", name, ms, bytes / ms / 1e6,
           100 * bytes / ms * 1e3 / ladder->peak, ladder->first_ms / ms, largest, rate, idea);
    if (wrong)
        printf("%-22s WRONG: %s is off by %.2e, %.1f times what it may\n", name, worst, largest, ratio);
    ladder->wrong = ladder->wrong || wrong, ladder->ms = wrong ? -ms : ms;
    fflush(stdout);
}

/* The exit status of the program. */
static inline int ladder_close(const Ladder *ladder) {
    if (!ladder->any) die("--only names no version of this ladder");
    printf(ladder->wrong ? "a version is wrong\n" : "all versions agree with double\n");
    return ladder->wrong ? 1 : 0;
}

#endif
