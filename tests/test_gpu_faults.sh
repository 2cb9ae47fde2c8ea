#!/bin/sh
# test_gpu_faults.sh - what a program says where a GPU is missing, too old, full, or lost: one sentence and status 1.
#
# It needs programs with CUDA in them and no GPU: tests/faults/gpu.c stands in for one, which is preloaded and lets each
# call of CUDA and cuBLAS fail in turn. Runs from the top folder; MEGALODON_BIN says where the programs are, and
# MEGALODON_BUILD where the stand-in is.

. tests/cli.sh
gpu=$(cd "$build" && pwd)/gpu.so
train=$bin/train
generate=$bin/generate

i=0
while [ $i -lt 100 ]; do
    echo "The cat no. $i sat on the mat."
    i=$((i + 1))
done > "$dir/text"
tiny="--num-layers 1 --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 4 --chunk-size 16
      --norm-num-groups 4"
fit="--data $dir/text --batch 2 --seq-len 24 $tiny --val-fraction 0 --backend cuda"

run "$train" $fit --steps 1 --checkpoint-dir none
if grep -q "built without it" "$dir/err"; then
    echo "skip: the programs were built without CUDA"
    echo "test_gpu_faults: 0 passed, 0 failed, 1 skipped"
    exit 0
fi
if ! { [ -s "$gpu" ] && LD_PRELOAD="$gpu" "$train" --help > /dev/null 2>&1; }; then
    echo "skip: the stand-in of a GPU cannot be loaded"
    echo "test_gpu_faults: 0 passed, 0 failed, 1 skipped"
    exit 0
fi

# on SETTINGS... -- COMMAND...: runs with the stand-in
on() {
    settings=
    while [ "$1" != -- ]; do
        settings="$settings $1"
        shift
    done
    shift
    run env $settings LD_PRELOAD="$gpu" "$@"
}
# says TEXT: status 1, and the only error on stderr has TEXT in it
says() {
    if [ $status -eq 1 ] && [ "$(grep -c '^error: ' "$dir/err")" -eq 1 ] && tail -n 1 "$dir/err" | grep '^error: ' |
        grep -qF -e "$1"; then ok; else fail "expected \"$1\" ($settings): status $status"; fi
}
# works NAME: status 0 and no error
works() {
    if [ $status -eq 0 ] && ! grep -q '^error' "$dir/err"; then ok; else fail "$1 ($settings): status $status"; fi
}

# ---- no device, or none that will do ----

once="$train $fit --steps 1 --checkpoint-dir none"
on GPU_DEVICES=0 -- $once
says "--backend cuda cannot run here: no CUDA device was found"
on GPU_FAIL=cudaGetDeviceCount GPU_ERROR=35 GPU_DRIVER=0 -- $once
says "this machine has no NVIDIA driver"
on GPU_FAIL=cudaGetDeviceCount GPU_ERROR=35 GPU_DRIVER=11040 -- $once
says "the driver knows CUDA 11.4 and this program was built for "
says ": update the driver"
on GPU_MAJOR=7 -- $once
says "the device has compute capability 7.x and at least 8.0 is needed"
on GPU_FAIL=cudaDeviceGetAttribute GPU_ERROR=46 -- $once
says "another program has the device for itself"
on GPU_FAIL=cudaGetLastError GPU_ERROR=209 -- $once
says "build it again on this machine"
for missing in GPU_DEVICES=0 GPU_MAJOR=7; do
    on $missing -- "$train" ${fit%--backend cuda} --steps 1 --checkpoint-dir none
    works "--backend auto"
    holds "--backend auto" "backend cpu" "$dir/out"
done

# ---- memory: the bytes needed and free, and the batch that fits; that batch then fits, and the next one does not ----

sized() {                                    # sized BATCH
    on GPU_MEMORY=100000000 -- "$train" --data "$dir/text" --seq-len 512 --batch "$1" $tiny --val-fraction 0 \
        --backend cuda --steps 1 --checkpoint-dir none
}
sized 4096
says " bytes) for a batch of 4096 x 512 tokens, and "
says " (100000000 bytes) are free; a batch of "
fitting=$(sed -n 's/.*; a batch of \([0-9]*\) rows would fit$/\1/p' "$dir/err")
sized "${fitting:-0}"
works "a batch of ${fitting:-none}, which would fit,"
sized $((2 * ${fitting:-0}))
says "a batch of $fitting rows would fit"
on GPU_MEMORY=1000000 -- $once
says "not even one row would fit"
# The least that it can do with is enough (and a page, for what is found out about the device before).
least=$(sed -n 's/.* GiB of device memory (\([0-9]*\) bytes) for .*/\1/p' "$dir/err")
on GPU_MEMORY=$((${least:-0} + 4096)) -- $once
works "a step in just enough memory"

# Memory that is free and cannot be had.
on GPU_COUNT="$dir/count" -- $once
works "a step"
pieces=$(sed -n 's/^cudaMalloc //p' "$dir/count")
i=0
while [ $i -lt "${pieces:-0}" ]; do
    on GPU_FAIL=cudaMalloc GPU_AFTER=$i -- $once
    says "memory"
    [ $i -eq 0 ] || holds "piece $i" "out of device memory: asked for " "$dir/err"
    [ $i -eq 0 ] || holds "piece $i" " bytes) are free; a smaller batch needs less" "$dir/err"
    i=$((i + 1))
done
for call in cudaMallocHost cublasCreate_v2 cublasGemmEx; do
    on GPU_FAIL=$call -- $once
    says "; the device's memory is full: a smaller batch needs less of it"
done

# ---- passes that come again are recorded, in training too: the first step is made, the second one recorded; without
# memory for a recording all are made as they come, and it is not tried again ----

# counted CALL NUMBER: the last run with GPU_COUNT made this call so many times
counted() {
    if [ "$(sed -n "s/^$1 //p" "$dir/count")" = "$2" ]; then ok; else
        fail "$1: expected $2 calls, found $(sed -n "s/^$1 //p" "$dir/count") ($settings)"
    fi
}
several="$train $fit --steps 4 --checkpoint-dir none"
on GPU_COUNT="$dir/count" -- $several
works "four steps"
counted cudaGraphInstantiate 2
counted cudaGraphLaunch 6
on GPU_COUNT="$dir/count" GPU_FAIL=cudaGraphInstantiate -- $several
works "four steps without memory for a recording"
counted cudaGraphInstantiate 2
counted cudaGraphLaunch ""
on GPU_COUNT="$dir/count" -- $several --accumulate 3
works "micro-batches"
counted cudaGraphInstantiate 2
on GPU_COUNT="$dir/count" -- $several --dropout 0.1
works "dropout"
counted cudaGraphLaunch ""

# ---- a device that is lost: at the first, the middle and the last of each call; a product that has no algorithm is
# computed in another way, so that this call may fail where the device is not lost ----

# lose NAME COMMAND...
lose() {
    name=$1
    shift
    on GPU_COUNT="$dir/count" -- "$@"
    works "$name"
    calls=0
    while read -r call number; do
        calls=$((calls + 1))
        error=719 sentence=" failed: "
        case $call in
            cublas*) error=13 ;;
            cudaGetDeviceCount) sentence="no CUDA device was found (" ;;
        esac
        for after in $(printf '%s\n' 0 $((number / 2)) $((number - 1)) | sort -nu); do
            # In the middle only this call fails and those after it work: nobody but the one who made it can see it.
            lost=1
            [ $after -eq 0 ] || [ $after -eq $((number - 1)) ] || [ $call = cublasLtMatmulAlgoGetHeuristic ] || lost=0
            rm -rf "$dir/lost"
            on GPU_FAIL=$call GPU_AFTER=$after GPU_ERROR=$error GPU_LOST=$lost -- "$@"
            says "$sentence"
        done
    done < "$dir/count"
    if [ $calls -ge 30 ]; then ok; else fail "$name: only $calls calls were seen"; fi
}
lose "training" "$train" $fit --steps 2 --save-every 1 --checkpoint-dir "$dir/lost"
lose "training in bf16" $once --precision bf16
on GPU_MAJOR=9 -- "$train" $fit --steps 1 --checkpoint-dir "$dir/run"
works "a run"
lose "generation" "$generate" --backend cuda --checkpoint "$dir/run" --max-tokens 4 --prompt abc

# A token's attention runs in clusters of blocks, or in another way where a device has no room for them.
bf16="$generate --backend cuda --precision bf16 --checkpoint $dir/run --max-tokens 4 --prompt abc"
GPU_HOPPER=1
export GPU_HOPPER
lose "generation in clusters" $bf16
holds "generation in clusters" "cudaOccupancyMaxActiveClusters" "$dir/count"
for clusters in 0 -1; do
    on GPU_CLUSTERS=$clusters -- $bf16
    works "generation without clusters"
done
unset GPU_HOPPER

# What was saved before stays.
rm -rf "$dir/run"
on GPU_FAIL=cudaStreamSynchronize GPU_AFTER=300 GPU_ERROR=719 GPU_LOST=1 -- "$train" $fit --steps 1000 --warmup 0 \
    --save-every 1 --checkpoint-dir "$dir/run"
says "; the device is lost to this program: start it again, a training run from its last checkpoint by --resume"
step=$(sed 's/step-0*//' "$dir/run/latest")
on GPU_MAJOR=9 -- "$train" --resume "$dir/run" --steps $((step + 2))
works "going on with another device"

finish test_gpu_faults
