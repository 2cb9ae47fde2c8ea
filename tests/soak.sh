#!/bin/sh
# soak.sh - an hour of training and a million generated tokens: memory must stay flat, and nothing may stop by itself.
#
#   sh tests/soak.sh [MINUTES [TOKENS]]       (default: 60 and 1000000; `make soak`)
#
# Training does all that it can do on the way: evaluations, samples, checkpoints, the log, carried states. The resident
# memory of the program is read every few seconds. The largest value after the first tenth of the time may not
# be more than 2% above the largest one within it.

bin=${MEGALODON_BIN:-.}
minutes=${1:-60}
tokens=${2:-1000000}
dir=$(mktemp -d) || exit 1
trap 'kill -9 $(jobs -p) 2> /dev/null; rm -rf "$dir"' EXIT
passed=0 failed=0
export OMP_WAIT_POLICY=passive

# watch PID SECONDS PAUSE FILE: a line "seconds KiB" after each pause, until the process ends or the time is over
watch() {
    begin=$(date +%s)
    while kill -0 "$1" 2> /dev/null; do
        now=$(($(date +%s) - begin))
        kib=$(sed -n 's/^VmRSS:[^0-9]*\([0-9]*\).*/\1/p' "/proc/$1/status" 2> /dev/null)
        [ -z "$kib" ] || echo "$now $kib"
        [ "$now" -lt "$2" ] || break
        sleep "$3"
    done > "$4"
}
# flat NAME FILE
flat() {
    if awk -v name="$1" '
        { at[NR] = $1; kib[NR] = $2 }
        END {
            for (i = 1; i <= NR; i++)
                if (i <= 2 || at[i] <= at[NR] / 10) { if (kib[i] > first) first = kib[i] } else if (kib[i] > later) later = kib[i]
            printf "%s: %d readings in %d s; at most %d KiB in the first tenth, %d KiB later\n", name, NR, at[NR], first, later
            exit !(NR >= 5 && later <= 1.02 * first)
        }' "$2"; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAIL: $1: the memory grows"; fi
}
# ended NAME STATUS FILE
ended() {
    if [ "$2" -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAIL: $1: status $2"; fi
    tail -n 1 "$3"
}

[ -r /proc/self/status ] || { echo "the memory of a process cannot be read here: there is no /proc"; exit 1; }
model="--num-layers 2 --model-dim 32 --z-dim 16 --value-dim 64 --ffn-hidden-dim 64 --cema-ndim 8 --chunk-size 64
       --norm-num-groups 4"
"$bin/train" --data data/tinystories_sample.txt --val data/tinystories_valid.txt $model --batch 4 --seq-len 128 \
    --carry-state --dropout 0.1 --steps 1000000000 --warmup 100 --lr 0.002 --eval-every 500 --eval-batches 4 \
    --sample-every 1000 --sample-tokens 50 --save-every 500 --keep 2 --log "$dir/log.csv" --log-every 1000 \
    --checkpoint-dir "$dir/run" > "$dir/train" 2>&1 &
pid=$!
watch $pid $((minutes * 60)) 6 "$dir/train.rss"
kill -INT $pid
wait $pid
ended "training" $? "$dir/train"
flat "training" "$dir/train.rss"

"$bin/generate" --checkpoint "$dir/run" --max-tokens "$tokens" > "$dir/text" 2> "$dir/generate" &
pid=$!
watch $pid 86400 1 "$dir/generate.rss"
wait $pid
ended "generation" $? "$dir/generate"
flat "generation" "$dir/generate.rss"
bytes=$(($(wc -c < "$dir/text") - 16))
if [ "$bytes" -eq "$tokens" ]; then passed=$((passed + 1)); else failed=$((failed + 1)); echo "FAIL: $bytes bytes"; fi

echo "soak: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
