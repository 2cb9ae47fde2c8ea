# Makefile - builds the programs and everything that proves them. `make help` lists the targets.
#
# Variables that one may set on the command line:
#   CC=clang        another C compiler
#   ARCH=           portable code instead of this machine's instructions (default -march=native)
#   OPT=-O1         another optimisation than -O3, MODEL_OPT=... another one for megalodon.c alone
#   OPENMP=0        one thread, even where the compiler knows OpenMP
#   LIBOMP=...      libomp for a clang that has none of its own, as Apple's (default: where Homebrew puts it)
#   CUDA=0          no CUDA, even where nvcc and megalodon.cu are there
#   CUDA_HOME=...   the CUDA toolkit (default: where nvcc lies)
#   PREFIX=...      where `make install` puts everything (default /usr/local)
#   DESTDIR=...     a folder that stands for / while it does so, for those who make packages
# One line without this file builds each program as well: see README.md.

BUILD ?= build
BIN   ?= .
# Apple's compiler for its own processors spells it in another way.
ARCH  ?= $(if $(filter Darwin-arm64,$(shell uname -sm | tr ' ' -)),-mcpu=native,-march=native)
OPT   ?= -O3

# -std=c11 alone would make gcc round between a product and a sum; contraction into one fused multiply-add is what the
# one-line build of the README gets, and half of the matrix product's speed. Nothing here relaxes IEEE any further.
CFLAGS ?=
ALL_CFLAGS := -std=c11 $(OPT) $(ARCH) -ffp-contract=fast -Wall -Wextra -Werror $(CFLAGS)
# Files past 2 GB and the inodes of large disks, also on machines of 32 bits.
ALL_CFLAGS += -D_FILE_OFFSET_BITS=64
# The oldest way to compute on an x86 of 32 bits keeps 80 bits of some numbers and not of others; SSE rounds them all.
ALL_CFLAGS += $(if $(filter i386-% i486-% i586-% i686-%,$(shell $(CC) -dumpmachine 2> /dev/null)),-msse2 -mfpmath=sse)
LDLIBS := -lm

# ---------------------------------------------------------------------------------------------------------------------
# What is there? One line each.

comma := ,

quiet_goals := clean help uninstall
announce := $(if $(filter $(quiet_goals),$(MAKECMDGOALS)),,yes)

# Does a program with OpenMP build with these flags?
try_openmp = $(shell d=$$(mktemp -d) \
            && printf '\043include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n' > $$d/t.c \
            && $(CC) $(1) $$d/t.c -o $$d/t $(2) > /dev/null 2>&1 && echo 1 || echo 0; rm -rf "$$d")
OPENMP_CFLAGS := -fopenmp
ifeq ($(OPENMP)$(LIBOMP),)
OPENMP := $(call try_openmp,$(OPENMP_CFLAGS))
ifeq ($(OPENMP),0)
LIBOMP := $(shell brew --prefix libomp 2> /dev/null)
endif
endif
ifneq ($(LIBOMP),)
OPENMP_CFLAGS := -Xpreprocessor -fopenmp -I$(LIBOMP)/include
OPENMP_LDLIBS := -L$(LIBOMP)/lib -lomp
ifneq ($(OPENMP),1)
OPENMP := $(call try_openmp,$(OPENMP_CFLAGS),$(OPENMP_LDLIBS))
endif
endif
ifeq ($(OPENMP),1)
ALL_CFLAGS += $(OPENMP_CFLAGS)
LDLIBS := $(OPENMP_LDLIBS) $(LDLIBS)
OPENMP_SAYS := yes$(if $(LIBOMP),$(comma) with libomp in $(LIBOMP))
else
# The simd pragmas need no library; the parallel ones are left out without a warning.
ALL_CFLAGS += -fopenmp-simd -Wno-unknown-pragmas
OPENMP_SAYS := no: the programs use one thread
endif

NVCC ?= $(shell command -v nvcc 2> /dev/null || ls /usr/local/cuda/bin/nvcc 2> /dev/null)
ifeq ($(wildcard megalodon.cu),)
CUDA_SAYS := no: megalodon.cu is not here; the CPU programs are built
else ifeq ($(NVCC),)
CUDA_SAYS := no: nvcc was not found; the CPU programs are built
else ifeq ($(CUDA),0)
CUDA_SAYS := no: switched off by CUDA=0; the CPU programs are built
else
CUDA_SAYS := yes: $(NVCC)
CUDA_HOME ?= $(patsubst %/bin/,%,$(dir $(realpath $(NVCC))))
CUDA_OBJECT := $(BUILD)/megalodon_cuda.o
ALL_CFLAGS += -DMEGALODON_WITH_CUDA
CUDA_LDLIBS := -L$(CUDA_HOME)/lib64 -Wl,-rpath,$(CUDA_HOME)/lib64 -lcudart -lcublas -lcublasLt -lstdc++
# Machine code for 8.0 and 9.0, and PTX from which the driver makes code for anything newer.
NVCCFLAGS ?= -O3 -std=c++17 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90a,code=sm_90a -gencode arch=compute_90,code=compute_90
endif

ifneq ($(announce),)
$(info OpenMP: $(OPENMP_SAYS))
$(info CUDA: $(CUDA_SAYS))
endif

# ---------------------------------------------------------------------------------------------------------------------
# Targets

PROGRAMS := $(addprefix $(BIN)/,train generate evaluate $(basename $(wildcard numdiff.c tokenize.c)))
TESTS := $(sort $(patsubst %.c,$(BUILD)/%,$(notdir $(wildcard tests/test_*.c test_gradcheck.c))))
TEST_SCRIPTS := $(sort $(wildcard tests/test_*.sh))
GOLDEN ?= $(sort $(wildcard tests/golden/*.safetensors))
# What `make test` runs: the golden runner wants its files, everything else runs as it is.
TEST_PROGRAMS := $(foreach t,$(TESTS),$(if $(filter %/test_golden,$(t)),"$(t) $(GOLDEN)","$(t)"))
TEST_COMMANDS := $(TEST_PROGRAMS) $(foreach t,$(TEST_SCRIPTS),"sh $(t)")

# What the tests of faults preload into the programs.
SHIMS := $(BUILD)/shim.so $(if $(CUDA_OBJECT),$(BUILD)/gpu.so)

MODEL_OBJECTS := $(BUILD)/megalodon.o $(CUDA_OBJECT)
TEST_OBJECTS := $(MODEL_OBJECTS) $(BUILD)/megalodon_double.o

.PHONY: all test test-cross test-programs build-tests test-python test-install test-kill test-large soak demo asan bench \
        sanitize sanitize-programs \
        golden lib install uninstall fuzz lint lint-tidy lint-cppcheck lint-gcc coverage test-musl integer clean help
.DELETE_ON_ERROR:
.SECONDARY:

all: $(PROGRAMS) ## build ./train, ./generate, ./evaluate, ./tokenize and ./numdiff (the default)

# `make -j2 test` runs two of them at a time (a make before 4.2 does not tell its number: one then).
JOBS = $(or $(patsubst -j%,%,$(filter -j%,$(MAKEFLAGS))),1)

test: $(PROGRAMS) $(TESTS) $(BUILD)/recall $(BUILD)/bench $(SHIMS) ## prove every number: all tests, ends in "N passed, N failed"
	@MEGALODON_BIN=$(BIN) MEGALODON_BUILD=$(BUILD) MEGALODON_JOBS=$(JOBS) sh tests/run.sh $(TEST_COMMANDS)

build-tests: $(PROGRAMS) $(TESTS) $(BUILD)/recall $(BUILD)/bench $(SHIMS) ## build the tests without running them

demo: $(PROGRAMS) ## train a small model on TinyStories for about three minutes, then let it write a story
	@MEGALODON_BIN=$(BIN) sh dev/demo.sh

# Shorter cases, the same programs: the sanitizers make everything several times slower. What is not the model is quicker
# to compile without optimisation than it is to run with it.
asan: ## run all tests under AddressSanitizer and UBSan, with shorter cases
	@MEGALODON_TEST_SHORT=1 $(MAKE) --no-print-directory test BUILD=$(BUILD)/asan BIN=$(BUILD)/asan CUDA=0 OPT="-O0 -g1" \
	    MODEL_OPT="-O1 -g" CFLAGS="$(CFLAGS) -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

# Shell tests are left out: they would run compilers and other programs of this machine. Linked statically, so that the
# emulator needs no libraries of the other machine.
CROSS ?= aarch64-linux-gnu
EMULATOR ?= qemu-$(patsubst i686,i386,$(firstword $(subst -, ,$(CROSS))))
CROSS_ARCH ?=
# All tests, or some: CROSS_TESTS="json golden". EMULATOR= where this machine runs the other one's programs itself.
CROSS_TESTS ?=
test-cross: ## run the C tests as another machine would: CROSS=aarch64-linux-gnu, s390x-linux-gnu, i686-linux-gnu ...
	@MEGALODON_TEST_SHORT=1 $(MAKE) --no-print-directory test-programs BUILD=$(BUILD)/$(CROSS) BIN=$(BUILD)/$(CROSS) \
	    CC=$(CROSS)-gcc ARCH="$(CROSS_ARCH)" OPT=-O2 OPENMP=0 CUDA=0 CFLAGS="$(CFLAGS) -static" RUN="$(EMULATOR)" \
	    $(if $(CROSS_TESTS),TESTS="$(addprefix $(BUILD)/$(CROSS)/test_,$(CROSS_TESTS))")

test-programs: $(TESTS)
	@MEGALODON_RUN="$(RUN)" MEGALODON_BUILD=$(BUILD) MEGALODON_JOBS=$(JOBS) sh tests/run.sh $(TEST_PROGRAMS)

test-musl: ## run the C tests with another C library, linked statically: musl-gcc
	@MEGALODON_TEST_SHORT=1 $(MAKE) --no-print-directory test-programs BUILD=$(BUILD)/musl BIN=$(BUILD)/musl \
	    CC=musl-gcc ARCH= OPT=-O2 OPENMP=0 CUDA=0 CFLAGS="$(CFLAGS) -static"

# Unsigned arithmetic that wraps and shifts that lose bits are what hashes and random numbers are made of, and the kind of
# a number changes on purpose where bytes are packed: these checks of the group "integer" are left out. What remains:
# overflow of signed numbers, division by zero, and shifts by too much.
integer: ## run the tests of the readers under clang's -fsanitize=undefined,integer
	@MEGALODON_TEST_SHORT=1 $(MAKE) --no-print-directory test-programs BUILD=$(BUILD)/integer BIN=$(BUILD)/integer \
	    CC=clang ARCH= OPT="-O1 -g" OPENMP=0 CUDA=0 TESTS="$(addprefix $(BUILD)/integer/test_,$(INTEGER_TESTS))" \
	    CFLAGS="$(CFLAGS) -fsanitize=undefined,integer -fno-sanitize-recover=all \
	        -fno-sanitize=unsigned-integer-overflow,unsigned-shift-base,implicit-conversion"
INTEGER_TESTS := json safetensors checkpoint config dataset tokenizer stream state sampler damage

# The numbers of lines are those of the programs that run: a function that nobody calls is not there to be counted.
coverage: ## which lines of megalodon.c and lib/ `make test` runs (gcov); fails below 95%
	@mkdir -p $(BUILD)/coverage && rm -f $(BUILD)/coverage/*.gcda
	@-GCOV_ERROR_FILE=/dev/null MEGALODON_TEST_SHORT=1 $(MAKE) --no-print-directory test BUILD=$(BUILD)/coverage \
	    BIN=$(BUILD)/coverage CC=gcc OPENMP=0 CUDA=0 OPT="-O1 -g" CFLAGS="$(CFLAGS) --coverage -fprofile-update=atomic"
	@sh tests/coverage.sh $(BUILD)/coverage 95

# ---- fuzzing: every reader against bytes from a machine that looks for new paths through it ----

SECONDS ?= 30
FUZZ_CC ?= clang
FUZZ_FLAGS := -std=c11 -O2 -g -Wall -Wextra -Werror -Wno-unknown-pragmas -fsanitize=address,undefined \
    -fno-sanitize-recover=all -fno-omit-frame-pointer -I.
# Watching each comparison of two numbers costs half of the speed and tells little about texts.
FUZZ_COVER := -fno-sanitize-coverage=trace-cmp
FUZZERS := $(sort $(patsubst tests/fuzz/%.c,$(BUILD)/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c)))

fuzz: $(FUZZERS) ## give each reader SECONDS=30 of libFuzzer's inputs under the sanitizers (clang), two at a time
	@sh tests/fuzz/run.sh $(SECONDS) $(BUILD)/fuzz $(FUZZERS)

$(BUILD)/fuzz/megalodon.o: megalodon.c megalodon.h
	@mkdir -p $(@D)
	$(FUZZ_CC) $(FUZZ_FLAGS) -fsanitize=fuzzer-no-link $(FUZZ_COVER) -c $< -o $@
$(BUILD)/fuzz/fuzz_%: tests/fuzz/fuzz_%.c $(BUILD)/fuzz/megalodon.o tests/fuzz/fuzz.h $(wildcard lib/*.h) evaluate.c tokenize.c
	$(FUZZ_CC) $(FUZZ_FLAGS) -fsanitize=fuzzer $(FUZZ_COVER) $< $(BUILD)/fuzz/megalodon.o -lm -o $@

# ---- analysis: three programs that read the source; what they look for, and what not, is in .clang-tidy ----

# cppcheck's returnDanglingLifetime takes the sentence that a call returns for a pointer to the call's arguments.
#
# The readers are headers, so programs that use all of them are read as a whole. Elsewhere, as in the kernels of
# megalodon.c, it is a contract of the arguments which pointers may be NULL together and which numbers are above 0; an
# analyser of paths does not know it, and the rest of clang-tidy's checks reads those files.
LINT_PATHS := generate.c tokenize.c
LINT_REST := evaluate.c numdiff.c dev/recall.c megalodon.c
LINT := $(LINT_PATHS) $(LINT_REST)
LINT_FLAGS := -std=c11 -I. -Wno-unknown-pragmas

lint: lint-tidy lint-cppcheck lint-gcc ## clang-tidy, cppcheck and gcc -fanalyzer, as far as they are installed
	@echo "lint: nothing found"
lint-tidy:
	@if command -v clang-tidy > /dev/null; then \
	    printf '%s\n' $(LINT_PATHS) | xargs -P 2 -I@ clang-tidy -quiet @ -- $(LINT_FLAGS) 2> /dev/null && \
	    printf '%s\n' $(LINT_REST) | \
	        xargs -P 2 -I@ clang-tidy -quiet -checks='-clang-analyzer-*' @ -- $(LINT_FLAGS) 2> /dev/null; \
	else echo "skipped: clang-tidy is not installed"; fi
lint-cppcheck:
	@if command -v cppcheck > /dev/null; then \
	    cppcheck -j 2 --quiet --std=c11 --enable=warning,performance,portability --error-exitcode=1 -I. \
	        --suppress=missingIncludeSystem --suppress=returnDanglingLifetime $(LINT_PATHS) evaluate.c; \
	else echo "skipped: cppcheck is not installed"; fi
lint-gcc:
	@if gcc --version > /dev/null 2>&1; then \
	    printf '%s\n' $(LINT_PATHS) | xargs -P 2 -I@ gcc $(LINT_FLAGS) -O0 -Wall -Wextra -Werror -fanalyzer -c @ -o /dev/null; \
	else echo "skipped: gcc is not installed"; fi

KILLS ?= 200
test-kill: $(PROGRAMS) ## kill a training run KILLS times (200) while it writes checkpoints; none may be lost
	@MEGALODON_BIN=$(BIN) sh tests/test_kill.sh $(KILLS)

test-large: $(BUILD)/test_large ## tensors of more than 2^31 elements, files past 4 GB, a million tokens in a step
	@$(BUILD)/test_large --large

# Every product by our own kernel (see cuda/plain.cuh): the tools see all that a step does, and no instruction of
# Hopper's that they cannot follow.
SANITIZE_ARCH ?= -arch=native
sanitize: ## run the GPU tests, short, under compute-sanitizer: memory, races, uninitialised values, barriers
	@$(MAKE) --no-print-directory sanitize-programs BUILD=$(BUILD)/sanitize BIN=$(BUILD)/sanitize \
	    NVCCFLAGS="-O3 -std=c++17 -lineinfo $(SANITIZE_ARCH) -DPLAIN_PRODUCTS=1"
	@sh tests/sanitize.sh $(BUILD)/sanitize
sanitize-programs: $(addprefix $(BUILD)/test_,golden backends components)

SOAK_MINUTES ?= 60
SOAK_TOKENS ?= 1000000
soak: $(PROGRAMS) ## train for an hour and generate a million tokens; the memory must stay flat
	@MEGALODON_BIN=$(BIN) sh tests/soak.sh $(SOAK_MINUTES) $(SOAK_TOKENS)

bench: $(BUILD)/bench ## measure training, generation and every component next to what this machine can do
	@$(BUILD)/bench

golden: $(BUILD)/test_golden ## check the fixtures of tests/golden, or GOLDEN="FILE..."
	@$(BUILD)/test_golden $(GOLDEN)

test-python: $(PROGRAMS) ## compare with PyTorch, JAX and tokenizers, in a virtual environment of its own
	@MEGALODON_BIN=$(BIN) MEGALODON_BUILD=$(BUILD) sh tests/python/run.sh

test-install: ## install into a temporary folder, compile a program against the library, uninstall
	@MAKE="$(MAKE)" CC="$(CC)" MEGALODON_BUILD=$(BUILD) sh tests/install.sh

clean: ## remove everything that make built
	rm -rf $(BUILD) $(PROGRAMS)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' Makefile

# ---------------------------------------------------------------------------------------------------------------------
# Installing. Programs with names as general as "train" get a prefix there, and so do their manual pages.

PREFIX         ?= /usr/local
PROGRAM_PREFIX ?= megalodon-
BINDIR         ?= $(PREFIX)/bin
LIBDIR         ?= $(PREFIX)/lib
INCLUDEDIR     ?= $(PREFIX)/include
MANDIR         ?= $(PREFIX)/share/man
MODELDIR       ?= $(PREFIX)/share/megalodon/tinystories

ifneq ($(filter install uninstall,$(MAKECMDGOALS)),)
ifeq ($(filter 1/%,$(words $(DESTDIR)$(PREFIX))$(PREFIX)),)
$(error PREFIX "$(PREFIX)", DESTDIR "$(DESTDIR)": expected a PREFIX that begins with /, and no spaces)
endif
endif

# The library is the CPU code. Its interface may still change: then the number in the name does, too.
ifeq ($(shell uname -s),Darwin)
SHARED := libmegalodon.0.dylib
SHARED_LINK := libmegalodon.dylib
SHARED_FLAGS := -dynamiclib -install_name $(LIBDIR)/$(SHARED)
else
SHARED := libmegalodon.so.0
SHARED_LINK := libmegalodon.so
SHARED_FLAGS := -shared -Wl,-soname,$(SHARED)
endif

INSTALLED := $(notdir $(PROGRAMS))
MODEL_FILES := $(wildcard $(addprefix models/tinystories/,model.safetensors tokenizer.json README.md))
INSTALL_PROGRAMS := $(addprefix $(BUILD)/install/,$(INSTALLED))
INSTALL_FILES = $(foreach p,$(INSTALLED),$(BINDIR)/$(PROGRAM_PREFIX)$(p) $(MANDIR)/man1/$(PROGRAM_PREFIX)$(p).1) \
    $(INCLUDEDIR)/megalodon.h $(LIBDIR)/libmegalodon.a $(LIBDIR)/$(SHARED) $(LIBDIR)/$(SHARED_LINK) \
    $(LIBDIR)/pkgconfig/megalodon.pc $(addprefix $(MODELDIR)/,$(notdir $(MODEL_FILES)))

lib: $(BUILD)/libmegalodon.a $(BUILD)/$(SHARED) ## build the CPU code as a static and a shared library

define PKGCONFIG
prefix=$(PREFIX)
libdir=$(LIBDIR)
includedir=$(INCLUDEDIR)

Name: megalodon
Description: the Megalodon language model on the CPU
Version: 0
Cflags: -I$${includedir}
Libs: -L$${libdir} -lmegalodon
Libs.private: $(if $(filter 1,$(OPENMP)),$(if $(LIBOMP),$(OPENMP_LDLIBS),-fopenmp)) -lm
endef
export PKGCONFIG

install: $(INSTALL_PROGRAMS) lib ## install programs, header, library, manual pages and the TinyStories model
	@mkdir -p $(addprefix $(DESTDIR),$(sort $(dir $(INSTALL_FILES))))
	@for p in $(INSTALLED); do \
	    install -m 755 $(BUILD)/install/$$p $(DESTDIR)$(BINDIR)/$(PROGRAM_PREFIX)$$p || exit 1; \
	    $(BUILD)/install/$$p --man=$(PROGRAM_PREFIX)$$p > $(DESTDIR)$(MANDIR)/man1/$(PROGRAM_PREFIX)$$p.1 || exit 1; \
	done
	@install -m 644 megalodon.h $(DESTDIR)$(INCLUDEDIR)
	@install -m 644 $(BUILD)/libmegalodon.a $(DESTDIR)$(LIBDIR)
	@install -m 755 $(BUILD)/$(SHARED) $(DESTDIR)$(LIBDIR)
	@ln -sf $(SHARED) $(DESTDIR)$(LIBDIR)/$(SHARED_LINK)
	@printf '%s\n' "$$PKGCONFIG" > $(DESTDIR)$(LIBDIR)/pkgconfig/megalodon.pc
	@install -m 644 $(MODEL_FILES) $(DESTDIR)$(MODELDIR)
	@for f in $(INSTALL_FILES); do echo "$(DESTDIR)$$f"; done

uninstall: ## remove what `make install` with the same PREFIX put there
	rm -f $(addprefix $(DESTDIR),$(INSTALL_FILES))
	@rmdir $(DESTDIR)$(MODELDIR) $(patsubst %/,%,$(dir $(DESTDIR)$(MODELDIR))) 2> /dev/null || true

# ---------------------------------------------------------------------------------------------------------------------
# Rules. Objects depend on the headers that the compiler saw (-MMD) and on the flags, so that a changed flag rebuilds.

FLAGS_LINE := $(CC) $(ALL_CFLAGS) | $(MODEL_OPT) | $(NVCC) $(NVCCFLAGS)
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)
	@printf '%s\n' '$(FLAGS_LINE)' | cmp -s - $@ || printf '%s\n' '$(FLAGS_LINE)' > $@
.PHONY: FORCE
FORCE:

$(addprefix $(BUILD)/,megalodon.o megalodon_double.o megalodon_pic.o test_gradcheck.o): ALL_CFLAGS += $(MODEL_OPT)

COMPILE = $(CC) $(ALL_CFLAGS) -I. -MMD -MP -c $< -o $@
LINK = $(CC) $(ALL_CFLAGS) $(filter %.o,$^) $(CUDA_LDLIBS) $(LDLIBS) -o $@

$(BUILD)/%.o: %.c $(BUILD)/flags
	$(COMPILE)
$(BUILD)/%.o: tests/%.c $(BUILD)/flags
	$(COMPILE)
$(BUILD)/%.o: dev/%.c $(BUILD)/flags
	$(COMPILE)

# The same source in double: a second backend, megalodon_cpu_double, for the tests.
$(BUILD)/megalodon_double.o: megalodon.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -DMEGALODON_REAL=double -DMEGALODON_BACKEND_ONLY -MMD -MP -c $< -o $@

$(BUILD)/megalodon_cuda.o: megalodon.cu $(BUILD)/flags
	$(NVCC) $(NVCCFLAGS) -MMD -MP -c $< -o $@
$(BUILD)/bench_cuda.o: dev/bench_cuda.cu $(BUILD)/flags
	$(NVCC) $(NVCCFLAGS) -MMD -MP -c $< -o $@

$(BIN)/train: $(BUILD)/train.o $(MODEL_OBJECTS)
	$(LINK)
$(BIN)/generate: $(BUILD)/generate.o $(MODEL_OBJECTS)
	$(LINK)
$(BIN)/evaluate: $(BUILD)/evaluate.o $(MODEL_OBJECTS)
	$(LINK)
# It reads no model.
$(BIN)/tokenize: $(BUILD)/tokenize.o
	$(CC) $(ALL_CFLAGS) $< $(LDLIBS) -o $@
# It compares any two backends, the one in double among them.
$(BIN)/numdiff: $(BUILD)/numdiff.o $(TEST_OBJECTS)
	$(LINK)

# The gradient check includes megalodon.c itself, compiled in double, and so links nothing else of ours.
$(BUILD)/test_gradcheck: $(BUILD)/test_gradcheck.o
	$(CC) $(ALL_CFLAGS) $< $(LDLIBS) -o $@

# The library: the same source, such that it can lie anywhere in memory.
$(BUILD)/megalodon_pic.o: megalodon.c $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -fPIC -MMD -MP -c $< -o $@
$(BUILD)/libmegalodon.a: $(BUILD)/megalodon_pic.o
	rm -f $@
	$(AR) rcs $@ $<
$(BUILD)/$(SHARED): $(BUILD)/megalodon_pic.o
	$(CC) $(ALL_CFLAGS) $(SHARED_FLAGS) $< $(LDLIBS) -o $@

# Installed programs are those of `make all`, but for the place of their model.
$(BUILD)/install/place: FORCE
	@mkdir -p $(BUILD)/install
	@printf '%s\n' '$(MODELDIR)' | cmp -s - $@ || printf '%s\n' '$(MODELDIR)' > $@
$(BUILD)/install/%.o: %.c $(BUILD)/install/place $(BUILD)/flags
	$(CC) $(ALL_CFLAGS) -DCHECKPOINT_DEFAULT='"$(MODELDIR)/model.safetensors"' -I. -MMD -MP -c $< -o $@
$(addprefix $(BUILD)/install/,train generate evaluate): %: %.o $(MODEL_OBJECTS)
	$(LINK)
$(BUILD)/install/tokenize: $(BUILD)/install/tokenize.o
	$(CC) $(ALL_CFLAGS) $< $(LDLIBS) -o $@
$(BUILD)/install/numdiff: $(BUILD)/install/numdiff.o $(TEST_OBJECTS)
	$(LINK)

$(filter-out %/test_gradcheck,$(TESTS)): $(BUILD)/%: $(BUILD)/%.o $(TEST_OBJECTS)
	$(LINK)
$(BUILD)/recall: $(BUILD)/recall.o $(MODEL_OBJECTS)
	$(LINK)
# A disk that fails on purpose, for tests/test_fault*.sh, which do without it where it cannot be built.
$(BUILD)/shim.so: tests/faults/shim.c $(BUILD)/flags
	@$(CC) -std=c11 -O1 -Wall -Wextra -Werror -shared -fPIC $< -o $@ -ldl || : > $@
# A GPU that is none and that fails on purpose, for tests/test_gpu_faults.sh.
$(BUILD)/gpu.so: tests/faults/gpu.c $(BUILD)/flags
	@$(CC) -std=c11 -O1 -Wall -Wextra -Werror -shared -fPIC -isystem $(CUDA_HOME)/include $< -o $@ || : > $@

# The benchmark looks for OpenBLAS when it runs, so it builds without.
$(BUILD)/bench: $(BUILD)/bench.o $(TEST_OBJECTS) $(if $(CUDA_OBJECT),$(BUILD)/bench_cuda.o)
	$(LINK) -ldl

# Kernel ladders: versions of one kernel under one harness. They run on a GPU only and are not part of `all`.
$(BUILD)/ladder_%: dev/ladder_%.cu $(BUILD)/flags
	$(NVCC) $(NVCCFLAGS) -MMD -MP -MF $@.d $< -o $@

-include $(wildcard $(BUILD)/*.d $(BUILD)/install/*.d)
