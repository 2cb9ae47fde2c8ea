#!/bin/sh
# Runs fuzzing targets one after the other.
#
#   sh tests/fuzz/run.sh SECONDS FOLDER TARGET...
#
# Each TARGET starts from the inputs in tests/fuzz/corpus and from those that earlier runs found, which lie in
# FOLDER/corpus, and runs for SECONDS. An input that breaks a reader is written to FOLDER, and its name printed: give it
# to the target as its one argument to see it again. The exit status is 0 only if nothing was found.

seconds=$1 folder=$2
shift 2
passed=0 failed=0 total=0

for target in "$@"; do
    name=$(basename "$target")
    name=${name#fuzz_}
    mkdir -p "$folder/corpus/$name"
    "$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$folder/$name-" "$folder/corpus/$name" "tests/fuzz/corpus/$name" > "$folder/$name.log" 2>&1
    status=$?
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$folder/$name.log")
    rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$folder/$name.log")
    if [ "$status" -eq 0 ] && [ "${runs:-0}" -gt 0 ]; then
        passed=$((passed + 1))
        printf 'fuzz_%-14s %12d executions, %7d a second\n' "$name" "$runs" "$rate"
    else
        failed=$((failed + 1))
        grep -a -v '^#' "$folder/$name.log" | tail -n 60
        echo "fuzz_$name: a finding, exit status $status (output in $folder/$name.log)"
    fi
    total=$((total + ${runs:-0}))
done

echo "fuzz: $total executions in all"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
