#!/bin/sh
# test_bench.sh - the benchmark on tiny shapes: every part runs and verifies itself, its CSV file can be read, its
# counts are right, and what it cannot do is refused.

. tests/cli.sh
bench=$build/bench

# number BENCHMARK UNIT: the first value with this unit in the CSV file
number() {
    awk -F, -v b="$1" -v u="$2" '$1 == b && $3 == u { print $4; exit }' "$dir/csv"
}
# is_true NAME EXPRESSION: of awk
is_true() {
    if awk "BEGIN { exit !($2) }" /dev/null 2> "$dir/err"; then ok; else fail "$1: $2"; fi
}
# csv_is_read NAME: the header, and rows of four fields of which the last is a number
csv_is_read() {
    if awk -F, 'NR == 1 { if ($0 != "benchmark,what,unit,value") exit 1; next }
                NF != 4 || $4 !~ /^-?[0-9.]+(e[-+][0-9]+)?$/ { exit 1 } END { exit NR < 2 }' "$dir/csv"
    then ok; else fail "$1: the CSV file cannot be read: $(tail -n 3 "$dir/csv")"; fi
}

# Two blocks, two heads, chunks of 8, a batch of rows that end inside a chunk.
D=24 H=2 Z=12 E=36 F=28 N=4 C=8 V=31 L=2 B=2 T=21
model="--model-dim $D --num-heads $H --z-dim $Z --value-dim $E --ffn-hidden-dim $F --cema-ndim $N --chunk-size $C
       --norm-num-groups 4 --vocab-size $V --num-layers $L"
shape="--batch $B --seq-len $T --repeats 1 --threads 1 --backend cpu --csv $dir/csv"
fast="--ceilings 0.1,0.1,10"

# A step. Its FLOP, counted here pair by pair: three times the forward's.
# shellcheck disable=SC2086
good "step" "$bench" step $shape $fast $model
csv_is_read "step"
flops=$(awk -v D=$D -v H=$H -v Z=$Z -v E=$E -v F=$F -v C=$C -v V=$V -v L=$L -v B=$B -v T=$T 'BEGIN {
    for (t = 0; t < T; t++) for (s = t - t % C; s <= t; s++) pairs++
    matrices = Z * D + E * D + E * D + D * D + D * E + F * D + F * D + D * F
    print 3 * (L * B * (T * 2 * matrices + pairs * 2 * (Z + E)) + B * T * 2 * V * D) }')
ms=$(number step ms) rate=$(number step TFLOP/s) tokens=$(number step tokens/s)
is_true "FLOP of a step" "($rate * 1e9 * $ms / $flops - 1) ^ 2 < 1e-6"
is_true "tokens of a step" "($tokens * $ms / 1e3 / ($B * $T) - 1) ^ 2 < 1e-6"
is_true "share of a step" "($(number step 'share of the ceiling') - $rate / 0.1) ^ 2 < 1e-8"
is_true "memory of a step" "$(number step GiB) > 0"
is_true "forward, backward and update are parts" \
    "$(number step 'forward ms') + $(number step 'backward ms') + $(number step 'update ms') <= 1.01 * $ms"
is_true "the losses are compared" "$(number step 'error of losses') < 1e-4"

# shellcheck disable=SC2086
{
    good "step without swiglu" "$bench" step $shape $fast $model --swiglu false
    two=$(awk "BEGIN { print $(number step TFLOP/s) * $(number step ms) * 1e9 }")
    is_true "two matrices in place of three" "($flops - $two - 6 * $L * $B * $T * $D * $F) ^ 2 < 1e-6 * $flops ^ 2"
    good "forward and backward" "$bench" step $shape $fast $model --forward-backward
    if grep -q 'update ms' "$dir/csv"; then fail "an update was timed"; else ok; fi
    is_true "forward and backward learn in the end" "$(number step ms) > 0"
    good "step with dropout" "$bench" step $shape $fast $model --dropout 0.1 --hidden-dropout 0.1 \
        --attention-dropout 0.1
    good "step of one token" "$bench" step $fast $model --batch 1 --seq-len 1 --repeats 1 --threads 1 --backend cpu
    good "step unchecked" "$bench" step $shape $fast $model --no-check
    if grep -q 'error of losses' "$dir/csv"; then fail "--no-check checked"; else ok; fi

    # Generation, a stream, components, layers.
    good "generate" "$bench" generate $shape $fast $model
    csv_is_read "generate"
    is_true "two batch sizes" "$(grep -c 'tokens/s' "$dir/csv") == 2"
    good "read" "$bench" read $shape $fast $model
    csv_is_read "read"
    is_true "tokens of a call" "($(number read tokens/s) * $(number read ms) / 1e3 / ($B * $T) - 1) ^ 2 < 1e-6"
    good "read unchecked" "$bench" read $shape $fast $model --no-check
    good "components" "$bench" components $shape $fast $model
    csv_is_read "components"
    is_true "every component" "$(grep -c '^components,[a-z_]*,ms,' "$dir/csv") == 16"
    good "one component" "$bench" components $shape $fast $model --only cema
    is_true "one component alone" "$(grep -c '^components,[a-z_]*,ms,' "$dir/csv") == 1"
    flops=$(awk "BEGIN { print $B * $T * $D * (12 * $N + 2) }")
    is_true "FLOP of CEMA" \
        "($(number components 'forward TFLOP/s') * 1e9 * $(number components 'forward ms') / $flops - 1) ^ 2 < 1e-6"
    bytes=$(awk "BEGIN { print 4 * (2 * $B * $T * $D + 2 * $B * $D * $N + $D * (4 * $N + 2)) }")
    is_true "bytes of CEMA" \
        "($(number components 'forward GB/s') * 1e6 * $(number components 'forward ms') / $bytes - 1) ^ 2 < 1e-6"
    good "layers" "$bench" layers $shape $fast $model
    csv_is_read "layers"
    good "unknown ceilings" "$bench" step $shape $model --ceilings 0,0,0
    if grep -q 'share of the ceiling' "$dir/csv"; then fail "a share of nothing"; else ok; fi
}

# A result that is wrong: three hundred blocks of width 2 lose what float can tell to rounding. The time is told, and
# the end is an error.
run "$bench" step --backend cpu --threads 1 --repeats 1 $fast --csv "$dir/csv" --num-layers 300 \
    --model-dim 2 --num-heads 1 \
    --z-dim 2 --value-dim 2 --ffn-hidden-dim 2 --cema-ndim 1 --chunk-size 64 --norm-num-groups 2 --vocab-size 16 \
    --batch 1 --seq-len 64
if [ $status -eq 1 ] && grep -q '^WRONG: bench step: the losses of the first tokens' "$dir/out" &&
    grep -q '^error: bench step: the losses of the first tokens' "$dir/err" && grep -q ',tokens/s,' "$dir/csv"
then ok; else fail "a wrong result: status $status"; fi

# The ceilings themselves: half a gigabyte is read, and OpenBLAS runs, where it is.
if [ -z "$MEGALODON_TEST_SHORT" ]; then
    good "ceilings" "$bench" ceilings --backend cpu --threads 1 --repeats 1 --csv "$dir/csv"
    is_true "memory is faster than a disk" "$(number ceilings GB/s) > 0.1"
fi

# The table: rows that work, and a row that does not work costs its own line and the exit status.
# shellcheck disable=SC2086
{
    good "targets" "$bench" targets $fast $model --backend cpu --threads 1 --repeats 1 --batch 1 --seq-len 9 \
        --csv "$dir/csv"
    csv_is_read "targets"
    if grep -q '^15 rows in .* 0 failed$' "$dir/out" && grep -q '^targets,CEMA 8x4096x1024,ms,' "$dir/csv" &&
        grep -q '^step,' "$dir/csv"; then ok; else fail "targets: rows are missing"; fi
    run "$bench" targets $fast --backend cpu --threads 1 --repeats 1 --batch 1 --seq-len 9 \
        --norm-num-groups 48 --no-check
    if [ $status -eq 1 ] && grep -q '^15 rows in .* 14 failed$' "$dir/out" &&
        grep -q '^generate mega200M  *-  *-  *-  *-  failed: error: model: model_dim 1024 is not' "$dir/out" &&
        grep -q '^step bytes12M 32x2048 *[0-9]' "$dir/out"; then ok; else fail "targets with a row that fails"; fi
}
bad "its shapes are for a GPU" "$bench" targets --backend cpu $fast

# One NaN in the output of a component is an error, whatever its other numbers are. (The objects of a build with
# sanitizers or with CUDA want more libraries than are named here.)
sed 's/y\[i\] = x\[i\] \* real_sigmoid/y[i] = i == 77 ? NAN : x[i] * real_sigmoid/' megalodon.c > "$dir/megalodon.c"
if cmp -s megalodon.c "$dir/megalodon.c"; then fail "SiLU was not found in megalodon.c"; fi
if "${CC:-cc}" -O1 -w -I. -c "$dir/megalodon.c" -o "$dir/nan.o" 2> /dev/null &&
    for openmp in -fopenmp ""; do
        "${CC:-cc}" $openmp "$build/bench.o" "$dir/nan.o" "$build/megalodon_double.o" -lm -ldl -o "$dir/bench" \
            2> /dev/null && break
    done && [ -x "$dir/bench" ]; then
    bad "silu differs from double by inf" "$dir/bench" components --only silu --num-layers 1 --batch 1 --seq-len 8 \
        --ceilings 100,100,10
else
    echo "skip: a benchmark of a component with a NaN cannot be linked here"
fi

# What is refused.
bad 'unknown benchmark "speed"' "$bench" speed
bad "--only does nothing in bench step" "$bench" step --only cema
bad "--batch does nothing in bench ceilings" "$bench" ceilings --batch 2
bad "--num-layers does nothing in bench matmul" "$bench" matmul --num-layers 2
bad "--forward-backward does nothing in bench read" "$bench" read --forward-backward
bad "--only does nothing in bench targets" "$bench" targets --only cema
bad 'there is no component "cemas"' "$bench" components --only cemas
bad "model_dim 384 is not a multiple of norm_num_groups 7" "$bench" step --norm-num-groups 7
bad "unknown preset 'mega'" "$bench" step --preset mega
bad "did you mean --batch" "$bench" step --batsh 2
bad "expected a whole number from 1 to 65536" "$bench" step --batch 0
bad "three numbers with commas" "$bench" step --ceilings 1,2
bad "three numbers with commas" "$bench" step --ceilings 1,2,3,4
bad "expected a number from 0 on" "$bench" step --ceilings 1,x,3
bad "expected a number from 0 on" "$bench" step --ceilings=-1,2,3
bad "--precision bf16 needs a GPU" "$bench" step --backend cpu --precision bf16
bad "cannot be written" "$bench" step --csv "$dir/no/such/folder.csv"
good "help" "$bench" --help

finish test_bench
