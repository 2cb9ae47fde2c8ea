/* fuzz_lists.c - the small texts that programs read: the command line of ./evaluate with its list of lengths, the spike
 * guard's numbers, the names of steps. The input's first byte chooses one of them. */
#include "fuzz.h"

#include <setjmp.h>

/* evaluate.c ends the program at an error; here that is a jump back, and what it says is thrown away. */
static jmp_buf back;
static FILE *sink;
static _Noreturn void jump_back(int status) {
    expect(status == 1, "exit status %d", status);
    longjmp(back, 1);
}
#define exit jump_back
#define main evaluate_main
#undef stderr
#undef stdout
#define stderr sink
#define stdout sink
#include "../../evaluate.c"
#undef exit
#undef main
#include "../../lib/divergence.h"

/* Lists of lengths are ascending and positive. */
static void read_command(char *text) {
    static Job job;
    static char name[] = "evaluate", data[] = "--data=x", by_context[4200];
    char *argv[3] = {name, data, by_context};
    memset(&job, 0, sizeof job);
    snprintf(by_context, sizeof by_context, "--by-context=%s", text);
    if (setjmp(back)) return;
    if (!read_options(&job, 3, argv)) return;
    expect(job.num_lengths >= 1 && job.num_lengths <= MAX_LENGTHS, "%d lengths", job.num_lengths);
    for (int i = 0; i < job.num_lengths; i++)
        expect(job.lengths[i].tokens > (i ? job.lengths[i - 1].tokens : 0), "length %d does not ascend", i);
}

static void read_guard(const char *text) {
    SpikeGuard guard, again;
    char written[GUARD_TEXT];
    const char *error = guard_from_text(text, &guard);
    expect_sentence(error);
    if (error) return;
    guard_to_text(&guard, written);
    expect(!guard_from_text(written, &again) && memcmp(&guard, &again, sizeof guard) == 0, "another guard");
    guard.seen %= GUARD_WINDOW;
    guard_learn(&guard, 1, 1);
    guard_limit(&guard, GUARD_LOSS, 3);
}

static void read_step(const char *text) {
    char name[CHECKPOINT_MAX_NAME];
    int64_t step;
    int revision;
    if (!checkpoint_parse_step_name(text, "", &step, &revision)) return;
    checkpoint_step_name(name, step, revision);
    expect(strcmp(name, text) == 0, "another name");
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static char printed[1 << 14];
    if (size == 0 || size > 4096) return 0;
    if (!sink) sink = fmemopen(printed, sizeof printed, "w");
    rewind(sink);
    char *text = malloc(size);                               /* so that the sanitizer sees its end */
    expect(text, "no memory");
    memcpy(text, bytes + 1, size - 1);
    text[size - 1] = '\0';
    if (bytes[0] % 3 == 0) read_command(text);
    else if (bytes[0] % 3 == 1) read_guard(text);
    else read_step(text);
    free(text);
    return 0;
}
