/* backends.h - the backends that this program was built with, and the choice of one.
 */
#ifndef LIB_BACKENDS_H
#define LIB_BACKENDS_H

#include <stdbool.h>
#include <string.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../megalodon.h"
#include "error.h"
#include "memory.h"

/* All backends, the preferred one first; ends at NULL. */
static inline const MegalodonBackend *const *backend_list(void) {
    static const MegalodonBackend *const list[] = {
#ifdef MEGALODON_WITH_CUDA
        &megalodon_cuda,
#endif
        &megalodon_cpu,
        NULL
    };
    return list;
}

/* Finds the backend called `name`; "auto" is the first that can run here. precision: "fp32" or "bf16". Error: it was
 * not built in, it cannot run here and why, or it does not know the precision. */
static inline const char *backend_choose(const char *name, const char *precision, const MegalodonBackend **backend,
                                         MegalodonPrecision *kind) {
    bool automatic = strcmp(name, "auto") == 0;
    *backend = NULL;
    for (int i = 0; backend_list()[i] && !*backend; i++) {
        const MegalodonBackend *each = backend_list()[i];
        if (!automatic && strcmp(each->name, name) != 0) continue;
        const char *why = each->unavailable ? each->unavailable() : NULL;
        if (!why) *backend = each;
        else if (!automatic) return errorf("--backend %s cannot run here: %s", name, why);
    }
    if (!*backend)
        return errorf("--backend %s: this program was built without it; build it again where nvcc and a CUDA toolkit "
                      "are installed, or choose --backend cpu", name);
    *kind = strcmp(precision, "bf16") == 0 ? MEGALODON_BF16_MIXED : MEGALODON_FP32;
    if (*kind == MEGALODON_BF16_MIXED && *backend == &megalodon_cpu)
        return errorf("--precision bf16 needs a GPU; the cpu backend computes in fp32");
    return NULL;
}

/* The max_bytes of a model: what there is on a CPU. A GPU's backend asks its device. */
static inline int64_t backend_bytes(const MegalodonBackend *backend) {
    return strncmp(backend->name, "cpu", 3) == 0 ? memory_available() : 0;
}

/* Sets the number of threads, if one is asked for (0: what OpenMP chooses), and returns how many there are. Error: more
 * than one where the program was built without OpenMP. */
static inline const char *backend_threads(int wanted, int *threads) {
#ifdef _OPENMP
    if (wanted > 0) omp_set_num_threads(wanted);
    *threads = omp_get_max_threads();
#else
    *threads = 1;
    if (wanted > 1) return errorf("--threads %d: this program was built without OpenMP and has one thread", wanted);
#endif
    return NULL;
}

#endif
