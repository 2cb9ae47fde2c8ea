# cli.sh - what the tests of the command line share. A test reads it with `. tests/cli.sh` from the top folder, calls
# the functions below, and ends with finish. MEGALODON_BIN says where the programs are.

bin=${MEGALODON_BIN:-.}
build=${MEGALODON_BUILD:-build}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
# Threads that wait asleep: the models here are so small that waiting is most of the work.
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2

ok() {
    passed=$((passed + 1))
}
fail() {
    failed=$((failed + 1))
    echo "FAIL: $*"
    sed 's/^/    /' "$dir/out" "$dir/err" 2> /dev/null | tail -n 12
}
run() {                                     # run COMMAND...: sets $status; the output is in $dir/out and $dir/err
    "$@" > "$dir/out" 2> "$dir/err" < /dev/null
    status=$?
}
# good NAME COMMAND...: status 0 and nothing on stderr that looks like an error
good() {
    name=$1
    shift
    run "$@"
    if [ $status -eq 0 ] && ! grep -q '^error' "$dir/err"; then ok; else fail "$name: status $status"; fi
}
# bad TEXT COMMAND...: status 1 and exactly one line on stderr, an error with TEXT in it
bad() {
    text=$1
    shift
    run "$@"
    if [ $status -eq 1 ] && [ "$(wc -l < "$dir/err")" -eq 1 ] && grep -q '^error: ' "$dir/err" &&
        grep -qF -e "$text" "$dir/err"; then ok; else fail "expected an error with \"$text\": $*: status $status"; fi
}
# same NAME FILE FILE
same() {
    if cmp -s "$2" "$3"; then ok; else fail "$1: $2 and $3 differ"; fi
}
# holds NAME TEXT FILE
holds() {
    if grep -qF -e "$2" "$3"; then ok; else fail "$1: no \"$2\" in $3"; fi
}
# finish NAME: the line that tests/run.sh counts, and the exit status
finish() {
    echo "$1: $passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}
