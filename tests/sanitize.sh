#!/bin/sh
# Runs the GPU tests, in their short forms, under the four tools of compute-sanitizer.
#
#   sh tests/sanitize.sh FOLDER [TOOL...]
#
# FOLDER holds test_golden, test_backends and test_components, built by `make sanitize`; their outputs go there too.
# Each part of a program under each tool is a process with LIMIT seconds (900), and JOBS of them (one a processor) run
# side by side, so that one that crashes or hangs spoils nothing else. TOTAL seconds (3600) after the start the rest
# fails. A table of all results comes last: seconds, errors (of racecheck: hazards), and the exit status of those that
# failed; 124 is a part that took too long. The exit status is 0 only if everything passed.
#
# racecheck follows every access to shared memory, and nearly all of them are the plain product's. That one kernel has
# its races looked for where linear layers of all sizes are tested, and elsewhere runs unwatched: minutes, not hours.

folder=${1:?usage: sh tests/sanitize.sh FOLDER [TOOL...]}
shift
limit=${LIMIT:-900}
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
# One thread each: the processors have other parts to run.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY=passive

# run_part TOOL NAME COMMAND...: one process; its line of the table goes to a file.
run_part() {
    tool=$1 name=$2 log=$folder/sanitize/$1-$2.log
    shift 2
    start=$(date +%s)
    left=$((DEADLINE - start))
    [ "$left" -lt "$limit" ] && limit=$((left > 1 ? left : 1))
    unwatched=
    case $tool-$* in
        racecheck-*linear*) ;;
        racecheck-*) unwatched=$UNWATCHED ;;
    esac
    # shellcheck disable=SC2086
    timeout -k 5 "$limit" compute-sanitizer $OPTIONS $unwatched --tool "$tool" --error-exitcode 9 "$@" > "$log" 2>&1
    status=$?
    found=$(sed -n -e 's/.*RACECHECK SUMMARY: \([0-9]*\) hazard.*/\1/p' \
        -e 's/.*ERROR SUMMARY: \([0-9]*\) error.*/\1/p' "$log" | tail -n 1)
    verdict=failed
    [ "$status" -eq 0 ] && [ "$found" = 0 ] && grep -q ' 0 failed' "$log" && verdict=passed
    echo "$name $tool $verdict ${found:--} $status $(($(date +%s) - start))" > "$log.line"
    [ "$verdict" = passed ] || echo "$tool $name: $verdict, exit status $status, ${found:-no} errors: $log"
}

if [ "${1:-}" = --part ]; then
    shift
    run_part "$@"
    exit 0
fi

if ! command -v compute-sanitizer > /dev/null; then
    echo "error: compute-sanitizer is not in PATH; it comes with CUDA" >&2
    exit 1
fi
rm -rf "$folder/sanitize"
mkdir -p "$folder/sanitize" || exit 1
# Many at a time look for a port each, and start slowly.
OPTIONS=
UNWATCHED=
for option in "--launch-timeout 120" "--max-connections 128"; do
    compute-sanitizer --help 2>&1 | grep -q -e "${option% *}" && OPTIONS="$OPTIONS $option"
done
option="--kernel-name-exclude kns=plain_product_kernel"
compute-sanitizer --help 2>&1 | grep -q -e "${option% *}" && UNWATCHED=$option
start=$(date +%s)
export OPTIONS UNWATCHED LIMIT="$limit" DEADLINE=$((start + ${TOTAL:-3600}))

# The longest parts first.
parts() {
    small=embedding,rmsnorm,linear,znorm,qk_affine,rope,silu,gate,layernorm,swiglu,rescale,dropout,cross_entropy
    for type in bf16 fp32; do
        for part in generation wide shapes update,dropout state,reading; do
            echo "backends-$type-$part $folder/test_backends --short --backend cuda-$type --only $part"
        done
        for part in attention cema timestepnorm $small; do
            echo "components-$type-${part%%,*} $folder/test_components --short --backend cuda-$type --only $part"
        done
    done
    echo "golden $folder/test_golden --backend cuda" tests/golden/*.safetensors
}

# The slowest tool last: where TOTAL ends before it, the others have come to an end.
[ $# -gt 0 ] || set -- memcheck initcheck synccheck racecheck
for tool in "$@"; do
    parts | sed "s/^/$tool /"
done | xargs -P "$jobs" -L 1 sh tests/sanitize.sh "$folder" --part

cat "$folder"/sanitize/*.line | awk -v seconds=$(($(date +%s) - start)) '
    !($1 in line) { name[++names] = $1; line[$1] = 1 }
    !($2 in known) { tool[++tools] = $2; known[$2] = 1 }
    { cell[$1, $2] = sprintf("%s %ss%s", $3 == "passed" ? "ok" : "FAILED", $6,
                             $3 == "passed" ? "" : " (" $4 " errors, status " $5 ")") }
    { if ($3 == "passed") passed++; else failed++ }
    END {
        printf "%-40s", ""
        for (t = 1; t <= tools; t++) printf " %-14s", tool[t]
        print ""
        for (n = 1; n <= names; n++) {
            printf "%-40s", name[n]
            for (t = 1; t <= tools; t++) printf " %-14s", cell[name[n], tool[t]]
            print ""
        }
        printf "sanitize: %d passed, %d failed, %d s\n", passed, failed, seconds
        exit failed > 0 || passed == 0
    }'
