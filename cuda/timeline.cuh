/* timeline.cuh - where the time of a step of generation goes, with -DDECODE_TIMELINE=1.
 *
 * Each block of each kernel of a step notes its processor's clock at a few places. When a model is destroyed,
 * its recorded step is made once more between two calibrations, which tell for each processor what its clock
 * shows at two moments of the device's common time; then one layer is printed, averaged over all but the
 * first. Without the switch nothing of this is compiled, and mark() is empty.
 *
 *     make NVCCFLAGS="-O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -DDECODE_TIMELINE=1" build/bench
 *     ./build/bench generate --backend cuda --precision bf16 --preset mega200M --batch 1
 *
 * "gap" is the time from the end of the kernel before to the first block whose wait is over.
 */
#ifndef CUDA_TIMELINE_CUH
#define CUDA_TIMELINE_CUH

#include "common.cuh"

#ifndef DECODE_TIMELINE
#define DECODE_TIMELINE 0
#endif

/* Places in a kernel, in their order. A kernel that lacks one leaves it out. */
enum TimelineStage { STAGE_ENTERED, STAGE_WAITED, STAGE_INPUT, STAGE_MULTIPLIED, STAGE_ENDED, NUM_STAGES };

#if DECODE_TIMELINE

#include <algorithm>
#include <vector>

enum { TIMELINE_LAUNCHES = 320, TIMELINE_BLOCKS = 1024, TIMELINE_PROCESSORS = 256 };

struct TimelineBlock {
    long long clock[NUM_STAGES]; /* 0: not noted */
    long long processor;
};
struct TimelineMoment { long long time_ns, clock; };

__device__ TimelineBlock timeline_blocks[TIMELINE_LAUNCHES][TIMELINE_BLOCKS];
__device__ TimelineMoment timeline_moments[2][TIMELINE_PROCESSORS];

struct TimelineLaunch { const char *name; int blocks, layer; };
static std::vector<TimelineLaunch> timeline_launches; /* of the pass that was launched last */
static int timeline_layer;

__device__ inline int timeline_processor() {
    unsigned processor;
    asm volatile("mov.u32 %0, %%smid;" : "=r"(processor));
    return (int)processor;
}

/* Notes that the block's first thread has come to a place. launch: the kernel's number in the step. */
__device__ inline void mark(int launch, TimelineStage stage) {
    int block = (int)(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));
    if (threadIdx.x != 0 || launch >= TIMELINE_LAUNCHES || block >= TIMELINE_BLOCKS) return;
    TimelineBlock *noted = &timeline_blocks[launch][block];
    noted->clock[stage] = clock64();
    if (stage == STAGE_ENTERED) noted->processor = timeline_processor();
}

/* computes: what each processor's clock shows at a tick of the common time
 * launch:   grid 2 blocks a processor, block 1024; the last block of a processor is the one that counts
 * traffic:  none
 * needs:    nothing
 * numerics: exact to the time that reading takes, some 30 ns */
__global__ static void timeline_calibrate_kernel(int which) {
    if (threadIdx.x != 0) return;
    long long before, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(before));
    do asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    while (now == before);
    int processor = timeline_processor();
    if (processor < TIMELINE_PROCESSORS)
        timeline_moments[which][processor] = TimelineMoment{now, clock64()};
}

/* What launch_step calls: the number of a kernel in the step. */
static inline int timeline_number(const Context *context, const char *name, dim3 grid) {
    if (context->dry_run) return 0;
    timeline_launches.push_back(TimelineLaunch{name, (int)(grid.x * grid.y * grid.z), timeline_layer});
    return (int)timeline_launches.size() - 1;
}
static inline void timeline_begin() { timeline_launches.clear(), timeline_layer = 0; }
static inline void timeline_next_layer() { timeline_layer++; }

/* First and last time, over a launch's blocks, of each stage in microseconds; last < first: never noted. */
struct TimelineTimes { double first[NUM_STAGES], last[NUM_STAGES]; };

static std::vector<TimelineTimes> timeline_times(const std::vector<TimelineBlock> &blocks,
                                                 const std::vector<TimelineMoment> &moments) {
    std::vector<TimelineTimes> times(timeline_launches.size());
    long long origin = 0;
    for (const TimelineMoment &moment : moments)
        if (moment.time_ns && (!origin || moment.time_ns < origin)) origin = moment.time_ns;
    for (size_t i = 0; i < times.size(); i++) {
        std::fill(times[i].first, times[i].first + NUM_STAGES, 1e30);
        std::fill(times[i].last, times[i].last + NUM_STAGES, -1e30);
        for (int j = 0; j < std::min(timeline_launches[i].blocks, (int)TIMELINE_BLOCKS); j++) {
            const TimelineBlock &block = blocks[i * TIMELINE_BLOCKS + (size_t)j];
            const TimelineMoment &a = moments[(size_t)block.processor],
                                 &b = moments[TIMELINE_PROCESSORS + (size_t)block.processor];
            for (int stage = 0; stage < NUM_STAGES; stage++) {
                if (!block.clock[stage] || b.clock == a.clock) continue;
                double ns = (double)(a.time_ns - origin) + (double)(block.clock[stage] - a.clock) *
                                                               (double)(b.time_ns - a.time_ns) /
                                                               (double)(b.clock - a.clock);
                times[i].first[stage] = std::min(times[i].first[stage], 1e-3 * ns);
                times[i].last[stage] = std::max(times[i].last[stage], 1e-3 * ns);
            }
        }
    }
    return times;
}

static void timeline_print_layer(const std::vector<TimelineTimes> &times) {
    const char *stages[NUM_STAGES] = {"entered", "waited", "input there", "multiplied", "ended"};
    std::vector<size_t> starts; /* the first launch of each layer but the first; then that of what follows */
    for (size_t i = 1; i < times.size(); i++)
        if (timeline_launches[i].layer != timeline_launches[i - 1].layer) starts.push_back(i);
    if (starts.size() < 2) return;
    size_t layers = starts.size() - 1, kernels = starts[1] - starts[0];
    printf("one layer, mean of %zu; microseconds since the layer before ended, first and last block\n", layers);
    printf("%-18s %6s %7s", "kernel", "blocks", "gap");
    for (const char *stage : stages) printf(" %15s", stage);
    printf("\n");
    for (size_t k = 0; k < kernels; k++) {
        double gap = 0, first[NUM_STAGES] = {}, last[NUM_STAGES] = {};
        bool noted[NUM_STAGES] = {};
        for (size_t l = 0; l < layers; l++) {
            size_t i = starts[l] + k;
            double origin = times[starts[l] - 1].last[STAGE_ENDED];
            gap += (times[i].first[STAGE_WAITED] - times[i - 1].last[STAGE_ENDED]) / (double)layers;
            for (int stage = 0; stage < NUM_STAGES; stage++) {
                noted[stage] = times[i].last[stage] >= times[i].first[stage];
                first[stage] += (times[i].first[stage] - origin) / (double)layers;
                last[stage] += (times[i].last[stage] - origin) / (double)layers;
            }
        }
        const TimelineLaunch &launch = timeline_launches[starts[0] + k];
        printf("%-18s %6d %7.2f", launch.name, launch.blocks, gap);
        for (int stage = 0; stage < NUM_STAGES; stage++) {
            if (noted[stage]) printf(" %7.2f %7.2f", first[stage], last[stage]);
            else printf(" %7s %7s", "-", "-");
        }
        printf("\n");
    }
    double whole = times[starts[layers] - 1].last[STAGE_ENDED] - times[starts[0] - 1].last[STAGE_ENDED];
    printf("a layer takes %.2f\n", whole / (double)layers);
}

/* Makes the recorded step some times more, the last one between two calibrations, and prints its timeline. */
static void timeline_report(Context *context, cudaGraphExec_t step) {
    if (timeline_launches.size() < 2 || timeline_launches.size() > TIMELINE_LAUNCHES) return;
    for (int i = 0; i < 20; i++) CHECK_CUDA(cudaGraphLaunch(step, context->stream));
    void *noted;
    CHECK_CUDA(cudaGetSymbolAddress(&noted, timeline_blocks));
    CHECK_CUDA(cudaMemsetAsync(noted, 0, sizeof timeline_blocks, context->stream));
    for (int which = 0; which < 2; which++) {
        timeline_calibrate_kernel<<<(unsigned)context->num_sms * 2, 1024, 0, context->stream>>>(which);
        CHECK_CUDA(cudaGetLastError());
        if (which == 0) CHECK_CUDA(cudaGraphLaunch(step, context->stream));
    }
    CHECK_CUDA(cudaStreamSynchronize(context->stream));
    std::vector<TimelineBlock> blocks((size_t)TIMELINE_LAUNCHES * TIMELINE_BLOCKS);
    std::vector<TimelineMoment> moments((size_t)2 * TIMELINE_PROCESSORS);
    CHECK_CUDA(cudaMemcpyFromSymbol(blocks.data(), timeline_blocks, blocks.size() * sizeof(TimelineBlock)));
    CHECK_CUDA(
        cudaMemcpyFromSymbol(moments.data(), timeline_moments, moments.size() * sizeof(TimelineMoment)));
    std::vector<TimelineTimes> times = timeline_times(blocks, moments);
    const TimelineTimes &begin = times.front(), &end = times.back();
    printf("\ntimeline: %zu kernels; the first is entered at 0, the last has ended at %.2f microseconds\n",
           times.size(), end.last[STAGE_ENDED] - begin.first[STAGE_ENTERED]);
    for (size_t i : {(size_t)0, times.size() - 1})
        printf("%s: waited from %.2f, ended at %.2f\n", timeline_launches[i].name,
               times[i].first[STAGE_WAITED] - begin.first[STAGE_ENTERED],
               times[i].last[STAGE_ENDED] - begin.first[STAGE_ENTERED]);
    timeline_print_layer(times);
}

#else

__device__ inline void mark(int, TimelineStage) {}
static inline int timeline_number(const Context *, const char *, dim3) { return 0; }
static inline void timeline_begin() {}
static inline void timeline_next_layer() {}

#endif

#endif
