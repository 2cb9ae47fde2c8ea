#!/bin/sh
# test_kill.sh - a run that is killed again and again, at random moments, while it writes a checkpoint after every step.
#
#   sh tests/test_kill.sh [KILLS]             (default: 12; `make test-kill` makes it 200)
#
# After each kill the newest checkpoint must be whole, and equal bit for bit to that of the same step of a run that was
# never killed; then the run goes on from it. So every checkpoint is loaded, resumed and compared. The model is so small
# that most of a step is spent on its checkpoint. Some kills come at a random time, some as soon as a checkpoint begins
# to appear; how many left a half of one behind is counted, and some must: if none of them did, more are tried.

bin=${MEGALODON_BIN:-.}
kills=${1:-${KILLS:-12}}
[ -z "$TMPDIR" ] && [ -d /dev/shm ] && [ -w /dev/shm ] && export TMPDIR=/dev/shm     # fast; a kill is a kill anywhere
dir=$(mktemp -d) || exit 1
trap 'kill -9 $(jobs -p) 2> /dev/null; rm -rf "$dir"' EXIT
passed=0 failed=0 halves=0 runs=1 kept=0
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
STEPS=120                                   # of the run; when it is done it starts anew

ok() {
    passed=$((passed + 1))
}
fail() {
    failed=$((failed + 1))
    echo "FAIL: $*"
    tail -n 5 "$dir/log"
}
random=$$
next_random() {                             # sets $random: a number from 0 to 32767, another one each time
    random=$(((random * 1103515245 + 12345) % 2147483648))
    random=$((random / 65536))
}

i=0
while [ $i -lt 200 ]; do
    echo "The cat no. $i sat on the mat."
    i=$((i + 1))
done > "$dir/text"
fit="--data $dir/text --batch 3 --seq-len 32 --num-layers 1 --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16
     --cema-ndim 4 --chunk-size 16 --norm-num-groups 4 --val-fraction 0 --dropout 0.1 --carry-state --steps $STEPS"
"$bin/train" $fit --save-every 1 --quiet --keep 1000 --checkpoint-dir "$dir/whole" > "$dir/log" 2>&1 || fail "the run without kills"

# The newest checkpoint is the one that was never interrupted.
compare() {
    newest=$(cat "$dir/run/latest")          # step-00000007, or step-00000007-2 if it was written before and lost
    step=$(echo "$newest" | cut -d - -f 1,2)
    for file in model trainer state; do
        if cmp -s "$dir/whole/$step/$file.safetensors" "$dir/run/$newest/$file.safetensors"; then ok
        else fail "kill $kill: $file of $newest differs"; fi
    done
}

kill=0
while [ $kill -lt "$kills" ] || { [ $halves -eq 0 ] && [ $kill -lt $((10 * kills)) ]; }; do
    if [ -f "$dir/run/latest" ]; then set -- --resume "$dir/run"; else set -- $fit --checkpoint-dir "$dir/run"; fi
    "$bin/train" "$@" --save-every 1 --keep 2 --quiet > "$dir/log" 2>&1 &
    pid=$!
    next_random
    if [ $((kill % 2)) -eq 0 ]; then
        sleep "0.$(printf '%03d' $((random % 150)))"
    else                                    # from the moment when a new step begins to appear, at most 10 ms later
        i=0
        while [ $i -lt 2000 ] && ! ls -d "$dir"/run/step-*.tmp > /dev/null 2>&1 && kill -0 $pid 2> /dev/null; do
            i=$((i + 1))
        done
        [ $((random % 3)) -eq 0 ] || sleep "0.00$((random % 10))"
    fi
    kill -9 $pid 2> /dev/null
    wait $pid 2> /dev/null
    status=$?
    if [ $status -ne 137 ] && [ $status -ne 0 ]; then fail "kill $kill: the run failed by itself, status $status"; fi
    kill=$((kill + 1))
    if ls -d "$dir"/run/*.tmp* > /dev/null 2>&1; then halves=$((halves + 1)); fi
    if [ -f "$dir/run/latest" ]; then
        compare
        kept=$((kept + 1))
        if [ "$step" = "$(printf 'step-%08d' $STEPS)" ]; then
            rm -rf "$dir/run"
            runs=$((runs + 1))
        fi
    fi
done
# What is left goes on to its end, and nothing of the killed ones stays.
if [ -f "$dir/run/latest" ]; then set -- --resume "$dir/run"; else set -- $fit --checkpoint-dir "$dir/run"; fi
if "$bin/train" "$@" --save-every 1 --keep 2 --quiet > "$dir/log" 2>&1; then ok; else fail "the last run"; fi
compare
if [ "$step" = "$(printf 'step-%08d' $STEPS)" ]; then ok; else fail "the run ended at $step"; fi
if ls -d "$dir"/run/*.tmp* > /dev/null 2>&1; then fail "a half of a checkpoint is left"; else ok; fi
if [ "$halves" -gt 0 ]; then ok; else fail "none of $kill kills came while a checkpoint was written"; fi

echo "$kill kills, $halves of them in the middle of a checkpoint; $kept newest checkpoints compared and gone on from;" \
    "$runs runs of $STEPS steps"
echo "test_kill: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
