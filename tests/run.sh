#!/bin/sh
# Runs test programs and adds up their last lines.
#
#   sh tests/run.sh COMMAND...
#
# Each COMMAND is one shell command whose output ends in "NAME: N passed, N failed" (and ", N skipped" if it skipped
# any). One that crashes, says nothing of the kind, or fails without counting it counts as one failure: a test that
# cannot speak must not pass. The exit status is 0 only if nothing failed. MEGALODON_JOBS says how many commands run at a
# time (1), MEGALODON_RUN is put before every command: an emulator, for programs of another machine.

logs=${MEGALODON_BUILD:-build}/logs
jobs=${MEGALODON_JOBS:-1}

# count WORD LINE: the number before WORD, or nothing.
count() {
    printf '%s\n' "$2" | sed -n "s/.*[ :]\([0-9][0-9]*\) $1.*/\1/p"
}

# run_one N: runs command N of $logs/commands, says how it ended, and notes it in $logs/N.result.
run_one() {
    command=$(sed -n "$1p" "$logs/commands")
    name=$(printf '%s\n' "$command" | sed 's/^[^ ]*python //; s/^sh //; s/ .*//; s/.*\///; s/\.py$//')
    log=$logs/$name.log
    start=$(date +%s)
    sh -c "${MEGALODON_RUN:-} $command" > "$log" 2>&1
    status=$?
    seconds=$(($(date +%s) - start))
    line=$(grep -E '^[a-z_0-9]+: [0-9]+ passed, [0-9]+ failed' "$log" | tail -n 1)
    p=$(count passed "$line") f=$(count failed "$line") s=$(count skipped "$line")
    if [ -z "$p" ] || [ -z "$f" ]; then
        p=0 f=1
        line="${name%.sh}: no result, exit status $status"
    elif [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then
        f=1
        line="$line, but exit status $status"
    elif [ "$p" -eq 0 ] && [ "$f" -eq 0 ] && [ "${s:-0}" -eq 0 ]; then
        f=1
        line="$line: it checked nothing"
    fi
    if [ "$f" -ne 0 ]; then cat "$log"; fi
    printf '%-64s %4d s\n' "$line" "$seconds"
    echo "$p $f ${s:-0} $log" > "$logs/$1.result"
}

if [ "$1" = --one ]; then
    run_one "$2"
    exit 0
fi

[ $# -gt 0 ] || { echo "no tests"; exit 1; }
mkdir -p "$logs" || exit 1
rm -f "$logs"/*.result
printf '%s\n' "$@" > "$logs/commands"
# A thread that waits asleep leaves its core to the others on a busy machine.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

passed=0 failed=0 skipped=0 broken= n=0
while [ $n -lt $# ]; do
    n=$((n + 1))
    echo $n
done | xargs -P "$jobs" -n 1 sh "$0" --one

n=0
while [ $n -lt $# ]; do
    n=$((n + 1))
    p=0 f=1 s=0 log="$logs, command $n"
    [ ! -f "$logs/$n.result" ] || read -r p f s log < "$logs/$n.result"
    [ "$f" -eq 0 ] || broken="$broken $log"
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
done

[ -z "$broken" ] || echo "failed:$broken"
[ "$skipped" -eq 0 ] || echo "$skipped skipped"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
