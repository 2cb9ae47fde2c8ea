#!/bin/sh
# Runs fuzzing targets, two at a time.
#
#   sh tests/fuzz/run.sh SECONDS FOLDER TARGET...
#
# Each TARGET starts from the inputs in tests/fuzz/corpus and from those that earlier runs found, which lie in
# FOLDER/corpus, and runs for SECONDS, or as many inputs as FUZZ_RUNS says. An input that breaks a reader is written to
# FOLDER, and its name printed: give it to the target as its one argument to see it again. FUZZ_JOBS is how many run at
# a time. The exit status is 0 only if nothing was found.

if [ "$1" = --one ]; then
    limit=$2 folder=$3 target=$4
    name=$(basename "$target")
    name=${name#fuzz_}
    mkdir -p "$folder/corpus/$name"
    "$target" "$limit" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$folder/$name-" "$folder/corpus/$name" "tests/fuzz/corpus/$name" > "$folder/$name.log" 2>&1
    echo $? > "$folder/$name.status"
    exit 0
fi

limit=-max_total_time=$1 folder=$2
[ -z "$FUZZ_RUNS" ] || limit=-runs=$FUZZ_RUNS
shift 2
passed=0 failed=0 total=0
printf '%s\n' "$@" | xargs -P "${FUZZ_JOBS:-2}" -n 1 sh "$0" --one "$limit" "$folder"

for target in "$@"; do
    name=$(basename "$target")
    name=${name#fuzz_}
    status=$(cat "$folder/$name.status" 2> /dev/null)
    rm -f "$folder/$name.status"
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$folder/$name.log")
    rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$folder/$name.log")
    if [ "${status:-1}" -eq 0 ] && [ "${runs:-0}" -gt 0 ]; then
        passed=$((passed + 1))
        printf 'fuzz_%-14s %12d executions, %7d a second\n' "$name" "$runs" "$rate"
    else
        failed=$((failed + 1))
        grep -a -v '^#' "$folder/$name.log" | tail -n 60
        echo "fuzz_$name: a finding, exit status ${status:-none} (output in $folder/$name.log)"
    fi
    total=$((total + ${runs:-0}))
done

echo "fuzz: $total executions in all"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
