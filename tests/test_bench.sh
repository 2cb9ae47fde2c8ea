#!/bin/sh
# test_bench.sh - the benchmark on tiny shapes: every part runs and verifies itself, its CSV file can be read, its counts
# are right, and what it cannot do is refused. Runs from the top folder; MEGALODON_BUILD says where the program is.

bench=${MEGALODON_BUILD:-build}/bench
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1

ok() {
    passed=$((passed + 1))
}
fail() {
    failed=$((failed + 1))
    echo "FAIL: $*"
    sed 's/^/    /' "$dir/out" "$dir/err" 2> /dev/null | tail -n 12
}
run() {                                     # run ARGUMENT...: sets $status; the output is in $dir/out and $dir/err
    "$bench" "$@" > "$dir/out" 2> "$dir/err" < /dev/null
    status=$?
}
# good NAME ARGUMENT...: status 0 and nothing on stderr
good() {
    name=$1
    shift
    run "$@"
    if [ $status -eq 0 ] && [ ! -s "$dir/err" ]; then ok; else fail "$name: status $status"; fi
}
# bad TEXT ARGUMENT...: status 1 and exactly one line on stderr, an error with TEXT in it
bad() {
    text=$1
    shift
    run "$@"
    if [ $status -eq 1 ] && [ "$(wc -l < "$dir/err")" -eq 1 ] && grep -q '^error: ' "$dir/err" &&
        grep -qF -e "$text" "$dir/err"; then ok; else fail "expected an error with \"$text\": $*: status $status"; fi
}
# number BENCHMARK UNIT: the first value with this unit in the CSV file
number() {
    awk -F, -v b="$1" -v u="$2" '$1 == b && $3 == u { print $4; exit }' "$dir/csv"
}
# holds NAME EXPRESSION: an expression of awk that is true
holds() {
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
good "step" step $shape $fast $model
csv_is_read "step"
flops=$(awk -v D=$D -v H=$H -v Z=$Z -v E=$E -v F=$F -v C=$C -v V=$V -v L=$L -v B=$B -v T=$T 'BEGIN {
    for (t = 0; t < T; t++) for (s = t - t % C; s <= t; s++) pairs++
    matrices = Z * D + E * D + E * D + D * D + D * E + F * D + F * D + D * F
    print 3 * (L * B * (T * 2 * matrices + pairs * 2 * (Z + E)) + B * T * 2 * V * D) }')
ms=$(number step ms) rate=$(number step TFLOP/s) tokens=$(number step tokens/s)
holds "FLOP of a step" "($rate * 1e9 * $ms / $flops - 1) ^ 2 < 1e-6"
holds "tokens of a step" "($tokens * $ms / 1e3 / ($B * $T) - 1) ^ 2 < 1e-6"
holds "share of a step" "($(number step 'share of the ceiling') - $rate / 0.1) ^ 2 < 1e-8"
holds "memory of a step" "$(number step GiB) > 0"
holds "forward, backward and update are parts" \
    "$(number step 'forward ms') + $(number step 'backward ms') + $(number step 'update ms') <= 1.01 * $ms"
holds "the losses are compared" "$(number step 'error of losses') < 1e-4"

# shellcheck disable=SC2086
{
    good "step without swiglu" step $shape $fast $model --swiglu false
    two=$(awk "BEGIN { print $(number step TFLOP/s) * $(number step ms) * 1e9 }")
    holds "two matrices in place of three" "($flops - $two - 6 * $L * $B * $T * $D * $F) ^ 2 < 1e-6 * $flops ^ 2"
    good "forward and backward" step $shape $fast $model --forward-backward
    if grep -q 'update ms' "$dir/csv"; then fail "an update was timed"; else ok; fi
    holds "forward and backward learn in the end" "$(number step ms) > 0"
    good "step with dropout" step $shape $fast $model --dropout 0.1 --hidden-dropout 0.1 --attention-dropout 0.1
    good "step of one token" step $fast $model --batch 1 --seq-len 1 --repeats 1 --threads 1 --backend cpu
    good "step unchecked" step $shape $fast $model --no-check
    if grep -q 'error of losses' "$dir/csv"; then fail "--no-check checked"; else ok; fi

    # Generation, a stream, components, layers.
    good "generate" generate $shape $fast $model
    csv_is_read "generate"
    holds "two batch sizes" "$(grep -c 'tokens/s' "$dir/csv") == 2"
    good "read" read $shape $fast $model
    csv_is_read "read"
    holds "tokens of a call" "($(number read tokens/s) * $(number read ms) / 1e3 / ($B * $T) - 1) ^ 2 < 1e-6"
    good "read unchecked" read $shape $fast $model --no-check
    good "components" components $shape $fast $model
    csv_is_read "components"
    holds "every component" "$(grep -c '^components,[a-z_]*,ms,' "$dir/csv") == 16"
    good "one component" components $shape $fast $model --only cema
    holds "one component alone" "$(grep -c '^components,[a-z_]*,ms,' "$dir/csv") == 1"
    flops=$(awk "BEGIN { print $B * $T * $D * (12 * $N + 2) }")
    holds "FLOP of CEMA" \
        "($(number components 'forward TFLOP/s') * 1e9 * $(number components 'forward ms') / $flops - 1) ^ 2 < 1e-6"
    bytes=$(awk "BEGIN { print 4 * (2 * $B * $T * $D + 2 * $B * $D * $N + $D * (4 * $N + 2)) }")
    holds "bytes of CEMA" \
        "($(number components 'forward GB/s') * 1e6 * $(number components 'forward ms') / $bytes - 1) ^ 2 < 1e-6"
    good "layers" layers $shape $fast $model
    csv_is_read "layers"
    good "unknown ceilings" step $shape $model --ceilings 0,0,0
    if grep -q 'share of the ceiling' "$dir/csv"; then fail "a share of nothing"; else ok; fi
}

# The ceilings themselves: half a gigabyte is read, and OpenBLAS runs, where it is.
if [ -z "$MEGALODON_TEST_SHORT" ]; then
    good "ceilings" ceilings --backend cpu --threads 1 --repeats 1 --csv "$dir/csv"
    holds "memory is faster than a disk" "$(number ceilings GB/s) > 0.1"
fi

# The table: rows that work, and a row that does not work costs its own line and the exit status.
# shellcheck disable=SC2086
{
    good "targets" targets $fast $model --backend cpu --threads 1 --repeats 1 --batch 1 --seq-len 9 --csv "$dir/csv"
    csv_is_read "targets"
    if grep -q '^15 rows in .* 0 failed$' "$dir/out" && grep -q '^targets,CEMA 8x4096x1024,ms,' "$dir/csv" &&
        grep -q '^step,' "$dir/csv"; then ok; else fail "targets: rows are missing"; fi
    run targets $fast --backend cpu --threads 1 --repeats 1 --batch 1 --seq-len 9 --norm-num-groups 48 --no-check
    if [ $status -eq 1 ] && grep -q '^15 rows in .* 14 failed$' "$dir/out" &&
        grep -q '^generate mega200M  *-  *-  *-  *-  failed: error: model: model_dim 1024 is not' "$dir/out" &&
        grep -q '^step bytes12M 32x2048 *[0-9]' "$dir/out"; then ok; else fail "targets with a row that fails"; fi
}
bad "its shapes are for a GPU" targets --backend cpu $fast

# What is refused.
bad 'unknown benchmark "speed"' speed
bad "--only does nothing in bench step" step --only cema
bad "--batch does nothing in bench ceilings" ceilings --batch 2
bad "--num-layers does nothing in bench matmul" matmul --num-layers 2
bad "--forward-backward does nothing in bench read" read --forward-backward
bad "--only does nothing in bench targets" targets --only cema
bad 'there is no component "cemas"' components --only cemas
bad "model_dim 384 is not a multiple of norm_num_groups 7" step --norm-num-groups 7
bad "unknown preset 'mega'" step --preset mega
bad "did you mean --batch" step --batsh 2
bad "expected a whole number from 1 to 65536" step --batch 0
bad "three numbers with commas" step --ceilings 1,2
bad "three numbers with commas" step --ceilings 1,2,3,4
bad "expected a number from 0 on" step --ceilings 1,x,3
bad "expected a number from 0 on" step --ceilings=-1,2,3
bad "--precision bf16 needs a GPU" step --backend cpu --precision bf16
bad "cannot be written" step --csv "$dir/no/such/folder.csv"
good "help" --help

echo "test_bench: $passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
