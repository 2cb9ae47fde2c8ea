#!/bin/sh
# test_run.sh - tests/run.sh itself: what it adds up, and that a test which crashes, says nothing, checks nothing or
# contradicts itself is a failure. Runs from the top folder.

. tests/cli.sh

# script NAME BODY: a test of this body, run by "sh $dir/NAME.sh"
script() {
    printf '%s\n' "$2" > "$dir/$1.sh"
}
# gives STATUS LINE NAME...: running these scripts, with one and with two at a time, ends with this status and line
gives() {
    want=$1 line=$2
    shift 2
    for jobs in 1 2; do
        commands=
        for name in "$@"; do commands="$commands 'sh $dir/$name.sh a b'"; done
        run env MEGALODON_JOBS=$jobs MEGALODON_BUILD="$dir/build" sh -c "sh tests/run.sh $commands"
        last=$(tail -n 1 "$dir/out")
        if [ $status -eq "$want" ] && [ "$last" = "$line" ]; then ok
        else fail "$*, $jobs at a time: status $status, \"$last\", expected $want, \"$line\""; fi
    done
}

script good 'echo "some words"; echo "good: 3 passed, 0 failed"'
script more 'sleep 0.2; [ "$1 $2" = "a b" ] && echo "more: 40 passed, 0 failed, 2 skipped"'
script wrong 'echo "wrong: 5 passed, 1 failed"; exit 1'
script hides 'echo "hides: 5 passed, 1 failed"'
script late 'echo "late: 5 passed, 0 failed"; exit 7'
script silent 'true'
script crashes 'kill -SEGV $$'
script nothing 'echo "nothing: 0 passed, 0 failed"'
script skips 'echo "skips: 0 passed, 0 failed, 1 skipped"'
script reads 'cat; echo "reads: 1 passed, 0 failed"'

gives 0 "3 passed, 0 failed" good
gives 0 "43 passed, 0 failed" more good
holds "the number of those skipped" "2 skipped" "$dir/out"
gives 0 "0 passed, 0 failed" skips
gives 0 "1 passed, 0 failed" reads
gives 1 "8 passed, 1 failed" wrong good
holds "a failure shows its log" "some words" "$dir/build/logs/good.sh.log"
holds "a failure is named" "failed: $dir/build/logs/wrong.sh.log" "$dir/out"
gives 1 "5 passed, 1 failed" hides
gives 1 "5 passed, 1 failed" late
holds "a status that contradicts" "but exit status 7" "$dir/out"
gives 1 "3 passed, 1 failed" silent good
gives 1 "3 passed, 1 failed" good crashes
gives 1 "0 passed, 1 failed" nothing
gives 1 "58 passed, 6 failed" good more silent wrong crashes nothing late hides skips
run sh tests/run.sh
if [ $status -eq 1 ]; then ok; else fail "no tests at all: status $status"; fi

finish test_run
