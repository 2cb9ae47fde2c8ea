# Makefile - builds the programs and everything that proves them. `make help` lists the targets.
#
# Variables that one may set on the command line:
#   CC=clang        another C compiler
#   ARCH=           portable code instead of this machine's instructions (default -march=native)
#   OPENMP=0        one thread, even where the compiler knows OpenMP
#   CUDA=0          no CUDA, even where nvcc and megalodon.cu are there
#   CUDA_HOME=...   the CUDA toolkit (default: where nvcc lies)
# One line without this file builds each program as well: see README.md.

BUILD ?= build
BIN   ?= .
ARCH  ?= -march=native
OPT   ?= -O3

# -std=c11 alone would make gcc round between a product and a sum; contraction into one fused multiply-add is what the
# one-line build of the README gets, and half of the matrix product's speed. Nothing here relaxes IEEE any further.
CFLAGS ?=
ALL_CFLAGS := -std=c11 $(OPT) $(ARCH) -ffp-contract=fast -Wall -Wextra -Werror $(CFLAGS)
# Files past 2 GB and the inodes of large disks, also on machines of 32 bits.
ALL_CFLAGS += -D_FILE_OFFSET_BITS=64
LDLIBS := -lm

# ---------------------------------------------------------------------------------------------------------------------
# What is there? One line each.

quiet_goals := clean help
announce := $(if $(filter $(quiet_goals),$(MAKECMDGOALS)),,yes)

ifeq ($(OPENMP),)
OPENMP := $(shell d=$$(mktemp -d) \
            && printf '\043include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n' > $$d/t.c \
            && $(CC) -fopenmp $$d/t.c -o $$d/t > /dev/null 2>&1 && echo 1 || echo 0; rm -rf "$$d")
endif
ifeq ($(OPENMP),1)
ALL_CFLAGS += -fopenmp
OPENMP_SAYS := yes
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
NVCCFLAGS ?= -O3 -std=c++17 -gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=[sm_90,compute_90]
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

MODEL_OBJECTS := $(BUILD)/megalodon.o $(CUDA_OBJECT)
TEST_OBJECTS := $(MODEL_OBJECTS) $(BUILD)/megalodon_double.o

.PHONY: all test test-cross test-programs build-tests test-python test-kill test-large soak demo asan bench golden clean help
.DELETE_ON_ERROR:
.SECONDARY:

all: $(PROGRAMS) ## build ./train, ./generate, ./evaluate, ./tokenize and ./numdiff (the default)

test: $(PROGRAMS) $(TESTS) $(BUILD)/recall $(BUILD)/bench $(BUILD)/shim.so ## prove every number: all tests, ends in "N passed, N failed"
	@MEGALODON_BIN=$(BIN) MEGALODON_BUILD=$(BUILD) sh tests/run.sh $(TEST_COMMANDS)

build-tests: $(PROGRAMS) $(TESTS) $(BUILD)/recall $(BUILD)/bench $(BUILD)/shim.so ## build the tests without running them

demo: $(PROGRAMS) ## train a small model on TinyStories for about three minutes, then let it write a story
	@MEGALODON_BIN=$(BIN) sh dev/demo.sh

# Shorter cases, the same programs: the sanitizers make everything several times slower.
asan: ## run all tests under AddressSanitizer and UBSan, with shorter cases
	@MEGALODON_TEST_SHORT=1 $(MAKE) --no-print-directory test BUILD=$(BUILD)/asan BIN=$(BUILD)/asan CUDA=0 OPT="-O1 -g" \
	    CFLAGS="$(CFLAGS) -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"

# Shell tests are left out: they would run compilers and other programs of this machine. Linked statically, so that the
# emulator needs no libraries of the other machine.
CROSS ?= aarch64-linux-gnu
EMULATOR ?= qemu-$(firstword $(subst -, ,$(CROSS)))
CROSS_ARCH ?=
test-cross: ## run the C tests as another machine would, in an emulator: CROSS=aarch64-linux-gnu
	@MEGALODON_TEST_SHORT=1 $(MAKE) --no-print-directory test-programs BUILD=$(BUILD)/$(CROSS) BIN=$(BUILD)/$(CROSS) \
	    CC=$(CROSS)-gcc ARCH="$(CROSS_ARCH)" OPT=-O2 OPENMP=0 CUDA=0 CFLAGS="$(CFLAGS) -static" RUN="$(EMULATOR)"

test-programs: $(TESTS)
	@MEGALODON_RUN="$(RUN)" MEGALODON_BUILD=$(BUILD) sh tests/run.sh $(TEST_PROGRAMS)

KILLS ?= 200
test-kill: $(PROGRAMS) ## kill a training run KILLS times (200) while it writes checkpoints; none may be lost
	@MEGALODON_BIN=$(BIN) sh tests/test_kill.sh $(KILLS)

test-large: $(BUILD)/test_large ## tensors of more than 2^31 elements, files past 4 GB, a million tokens in a step
	@$(BUILD)/test_large --large

SOAK_MINUTES ?= 60
SOAK_TOKENS ?= 1000000
soak: $(PROGRAMS) ## train for an hour and generate a million tokens; the memory must stay flat
	@MEGALODON_BIN=$(BIN) sh tests/soak.sh $(SOAK_MINUTES) $(SOAK_TOKENS)

bench: $(BUILD)/bench ## measure training, generation and every component next to what this machine can do
	@$(BUILD)/bench

golden: $(BUILD)/test_golden ## check the fixtures of tests/golden, or GOLDEN="FILE..."
	@$(BUILD)/test_golden $(GOLDEN)

test-python: $(BIN)/tokenize ## compare the tokenizer with the Python package, in a virtual environment of its own
	@python3 -m venv $(BUILD)/venv
	@$(BUILD)/venv/bin/pip install -q -r tests/python/requirements.txt
	@$(BUILD)/venv/bin/python tests/python/test_tokenizer.py --bin $(abspath $(BIN))

clean: ## remove everything that make built
	rm -rf $(BUILD) $(PROGRAMS)

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

# ---------------------------------------------------------------------------------------------------------------------
# Rules. Objects depend on the headers that the compiler saw (-MMD) and on the flags, so that a changed flag rebuilds.

FLAGS_LINE := $(CC) $(ALL_CFLAGS) | $(NVCC) $(NVCCFLAGS)
$(BUILD)/flags: FORCE
	@mkdir -p $(BUILD)
	@printf '%s\n' '$(FLAGS_LINE)' | cmp -s - $@ || printf '%s\n' '$(FLAGS_LINE)' > $@
.PHONY: FORCE
FORCE:

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

$(filter-out %/test_gradcheck,$(TESTS)): $(BUILD)/%: $(BUILD)/%.o $(TEST_OBJECTS)
	$(LINK)
$(BUILD)/recall: $(BUILD)/recall.o $(MODEL_OBJECTS)
	$(LINK)
# A disk that fails on purpose, for tests/test_fault*.sh, which do without it where it cannot be built.
$(BUILD)/shim.so: tests/faults/shim.c $(BUILD)/flags
	@$(CC) -std=c11 -O1 -Wall -Wextra -Werror -shared -fPIC $< -o $@ -ldl || : > $@

# The benchmark looks for OpenBLAS when it runs, so it builds without.
$(BUILD)/bench: $(BUILD)/bench.o $(TEST_OBJECTS) $(if $(CUDA_OBJECT),$(BUILD)/bench_cuda.o)
	$(LINK) -ldl

# Kernel ladders: versions of one kernel under one harness. They run on a GPU only and are not part of `all`.
$(BUILD)/ladder_%: dev/ladder_%.cu $(BUILD)/flags
	$(NVCC) $(NVCCFLAGS) -MMD -MP -MF $@.d $< -o $@

-include $(wildcard $(BUILD)/*.d)
