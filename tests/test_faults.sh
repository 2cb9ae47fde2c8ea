#!/bin/sh
# test_faults.sh - what disks, signals, other processes and diverging numbers do to the programs: a sentence and status
# 1, or they carry on; no checkpoint is lost. Runs from the top folder; MEGALODON_BIN says where the programs are, and
# MEGALODON_BUILD where the disk that fails on purpose is (tests/faults/shim.c).

bin=${MEGALODON_BIN:-.}
shim=$(cd "${MEGALODON_BUILD:-build}" && pwd)/shim.so
train=$bin/train
generate=$bin/generate
# In memory where that can be: every checkpoint is made durable, for which a disk takes its time.
[ -z "$TMPDIR" ] && [ -d /dev/shm ] && [ -w /dev/shm ] && export TMPDIR=/dev/shm
dir=$(mktemp -d) || exit 1
trap 'kill -9 $(jobs -p) 2> /dev/null; umount "$dir/disk" 2> /dev/null; rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=2
export ASAN_OPTIONS="$ASAN_OPTIONS:verify_asan_link_order=0"     # the shim is loaded before the sanitizer

ok() {
    passed=$((passed + 1))
}
fail() {
    failed=$((failed + 1))
    echo "FAIL: $*"
    sed 's/^/    /' "$dir/out" "$dir/err" 2> /dev/null | tail -n 12
}
skip() {
    skipped=$((skipped + 1))
    echo "skip: $*"
}
run() {                                     # run COMMAND...: sets $status; the output is in $dir/out and $dir/err
    "$@" > "$dir/out" 2> "$dir/err" < /dev/null
    status=$?
}
# good NAME COMMAND...: status 0 and no error on stderr
good() {
    name=$1
    shift
    run "$@"
    if [ $status -eq 0 ] && ! grep -q '^error' "$dir/err"; then ok; else fail "$name: status $status"; fi
}
# bad TEXT COMMAND...: status 1, and the last line on stderr is an error with TEXT in it
bad() {
    text=$1
    shift
    run "$@"
    last=
    while IFS= read -r line; do                             # no process is started: there are many of these
        case $line in profiling:*) ;; *) last=$line ;; esac     # where a program counts the lines that it runs
    done < "$dir/err"
    case $status-$last in
        "1-error: "*"$text"*) ok ;;
        *) fail "expected an error with \"$text\": $*: status $status" ;;
    esac
}
# holds NAME TEXT FILE
holds() {
    if grep -qF -e "$2" "$3"; then ok; else fail "$1: no \"$2\" in $3"; fi
}
# same NAME FOLDER FOLDER: two checkpoints are the same, bit for bit
same() {
    if cmp -s "$2/model.safetensors" "$3/model.safetensors" && cmp -s "$2/trainer.safetensors" "$3/trainer.safetensors"
    then ok; else fail "$1: $2 and $3 differ"; fi
}
# wait_for TEXT FILE: until it is there, 20 seconds at most
wait_for() {
    i=0
    while [ $i -lt 400 ] && ! grep -q "$1" "$2" 2> /dev/null; do
        sleep 0.05
        i=$((i + 1))
    done
}

tiny="--num-layers 1 --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 4 --chunk-size 16
      --norm-num-groups 4"
i=0
while [ $i -lt 200 ]; do
    echo "The cat no. $i sat on the mat."
    i=$((i + 1))
done > "$dir/text"
data="--data $dir/text --batch 2 --seq-len 24 $tiny --val-fraction 0"
fit="$data --lr 0.01"

# The run that all others are compared with: every step of it.
good "a run" "$train" $fit --steps 8 --save-every 1 --keep 100 --checkpoint-dir "$dir/whole"

for threads in 1 3 7; do
    run "$train" $fit --steps 8 --threads $threads --checkpoint-dir "$dir/threads$threads"
    if grep -q "built without OpenMP" "$dir/err"; then continue; fi
    same "$threads threads" "$dir/whole/step-00000008" "$dir/threads$threads/step-00000008"
done

# ---------------------------------------------------------------------------------------------------------------------
# Options: each one of each program with values that are none. What an option takes, --help tells by its unit.

values() {
    case $1 in
        *"|"*) echo 'x y|z 1e99' ;;
        N | ROWS | TOKENS | STEPS) echo 'x 1x 1.5 1e99 -1 99999999999999999999 0x10 nan - ,' ;;
        X | NORM | Z) echo 'x 1x 1e999 -1 0x1p3 nan inf 1e . +1' ;;
    esac
}
for program in train generate evaluate numdiff tokenize; do
    [ -x "$bin/$program" ] || continue
    "$bin/$program" --help | sed -n 's/^  --\([a-z0-9-]*\) \([^ ]*\).*/\1 \2/p' > "$dir/options"
    while read -r option unit; do
        set -f
        case $unit in
            *"|"* | [A-Z]*)
                for value in $(values "$unit"); do
                    bad "--$option: expected" "$bin/$program" "--$option=$value"
                done
                bad "--$option is empty" "$bin/$program" "--$option="
                bad "--$option needs a value" "$bin/$program" "--$option"
                case $unit in
                    TEXT | PATH | F* | LIST) bad "given twice" "$bin/$program" "--$option" x "--$option=y" ;;
                esac
                ;;
            *)                              # a flag: what follows it is the help
                bad "--$option takes no value" "$bin/$program" "--$option=true"
                bad "--$option is given twice" "$bin/$program" "--$option" "--$option"
                ;;
        esac
        set +f
    done < "$dir/options"
done

# Sizes that no machine has are refused before anything is allocated, with the bytes.
big="$train --data $dir/text --val-fraction 0 --checkpoint-dir none --steps 1"
bad "bytes) are free; not even one row would fit" $big --num-layers 4096 --model-dim 65536
bad "bytes for a single tensor" $big --chunk-size 1048576 --z-dim 1048576 --value-dim 1048576
bad "more tokens than can be counted" $big --batch 1048576 --seq-len 1073741824 --accumulate 1048576
bad "more tokens than can be counted" $big --batch 1048576 --seq-len 1073741824 --accumulate 1048575
if [ -r /proc/meminfo ]; then
    bad "a batch of " $big --batch 65536 --seq-len 4000
    bad "targets of a step need" $big $tiny --batch 1 --seq-len 6000 --accumulate 1048576 --backend cpu
else
    skip "memory: the system does not tell how much there is"
fi

# Files that may not be read. Root may read everything.
if [ "$(id -u)" -ne 0 ]; then as=env; else as="setpriv --reuid=65534 --clear-groups"; fi
chmod 755 "$dir"
cp "$train" "$generate" "$dir/"
if $as "$dir/train" --help > /dev/null 2>&1; then
    cp "$dir/text" "$dir/secret"
    cp -r "$dir/whole/step-00000001" "$dir/hidden"
    chmod 000 "$dir/secret" "$dir/hidden/model.safetensors"
    mkdir "$dir/closed"
    chmod 555 "$dir/closed"
    bad "Permission denied" $as "$dir/train" --data "$dir/secret" --checkpoint-dir none
    bad "Permission denied" $as "$dir/generate" --checkpoint "$dir/hidden"
    bad "Permission denied" $as "$dir/generate" --checkpoint "$dir/whole" --prompt-file "$dir/secret"
    bad "Permission denied" $as "$dir/train" $fit --steps 2 --checkpoint-dir "$dir/closed/run"
    bad "cannot write in this folder: Permission denied" $as "$dir/train" $fit --steps 2 --checkpoint-dir "$dir/closed"
    chmod 755 "$dir/closed"
else
    skip "files that may not be read: there is no way to be another user"
fi

# ---------------------------------------------------------------------------------------------------------------------
# Damage: a bit of a checkpoint's data is noticed by every program, and --no-verify looks away.

cp -r "$dir/whole/step-00000004" "$dir/damaged"
size=$(wc -c < "$dir/damaged/model.safetensors")
printf '\125' | dd of="$dir/damaged/model.safetensors" bs=1 seek=$((size - 1001)) conv=notrunc 2> /dev/null
bad "expected the checksum" "$generate" --checkpoint "$dir/damaged" --max-tokens 1
holds "a damaged file" "damaged/model.safetensors: tensor " "$dir/err"
bad "expected the checksum" "$bin/evaluate" --checkpoint "$dir/damaged" --data "$dir/text"
bad "expected the checksum" "$bin/numdiff" --checkpoint "$dir/damaged"
bad "expected the checksum" "$train" --resume "$dir/damaged" --checkpoint-dir none
bad "expected the checksum" "$train" --init "$dir/damaged" --data "$dir/text" --batch 2 --seq-len 24 --checkpoint-dir none
good "--no-verify" "$generate" --checkpoint "$dir/damaged" --max-tokens 1 --no-verify
good "--no-verify" "$bin/evaluate" --checkpoint "$dir/damaged" --data "$dir/text" --no-verify
good "--no-verify" "$train" --resume "$dir/damaged" --checkpoint-dir none --no-verify
cp "$dir/whole/step-00000004/model.safetensors" "$dir/damaged/model.safetensors"
good "the file as it was" "$train" --resume "$dir/damaged" --checkpoint-dir "$dir/mended"
same "a resumed run" "$dir/whole/step-00000008" "$dir/mended/step-00000008"

# ---------------------------------------------------------------------------------------------------------------------
# Disks. The run goes on or stops as it is told, and what was saved before stays.

# faulty NAME SETTINGS... -- COMMAND...: runs with the shim; the run's folder is new
faulty() {
    rm -rf "$dir/run"
    set -f
    while [ "$1" != -- ]; do
        settings="$settings $1"
        shift
    done
    shift
    run env SHIM_FOLDER="$dir/run" $settings LD_PRELOAD="$shim" "$@"
    settings=
    set +f
    warnings=$(grep -c "training goes on" "$dir/err")
}
unsaved="$train $fit --steps 8 --save-every 2"
saving="$unsaved --keep 2 --checkpoint-dir $dir/run"
# still NAME: status 0, a warning, and in the end the checkpoint that a run without faults has
still() {
    if [ $status -eq 0 ] && ! grep -q '^error' "$dir/err"; then ok; else fail "$1: status $status"; fi
    holds "$1" "could not be saved" "$dir/err"
    holds "$1" "training goes on" "$dir/err"
    same "$1" "$dir/whole/step-00000008" "$dir/run/step-00000008"
    if ls "$dir"/run/*.tmp* > /dev/null 2>&1; then fail "$1: a temporary file was left"; else ok; fi
}
# stopped NAME TEXT STEP: status 1, the error, and the checkpoint of STEP is the newest and can be gone on from
stopped() {
    if [ $status -eq 1 ] && tail -n 1 "$dir/err" | grep '^error: ' | grep -qF -e "$2"; then ok
    else fail "$1: expected an error with \"$2\": status $status"; fi
    if [ "$(cat "$dir/run/latest" 2> /dev/null)" = "step-0000000$3" ]; then ok; else fail "$1: latest is not step $3"; fi
    same "$1" "$dir/whole/step-0000000$3" "$dir/run/step-0000000$3"
    good "$1: going on" "$train" --resume "$dir/run"
    same "$1: going on" "$dir/whole/step-00000008" "$dir/run/step-00000008"
}
if [ -s "$shim" ] && LD_PRELOAD="$shim" "$train" --help > /dev/null 2>&1; then
    # A step takes about 140 kB. The disk is full in the middle of the first file, of the second, and in between.
    for room in 100 9000 50000 130000 150000 200000; do
        faulty SHIM_ROOM=$room SHIM_TIMES=2 -- $saving
        still "a disk full after $room bytes, for a while"
    done
    for room in 150000 200000 270000; do
        faulty SHIM_ROOM=$room -- $saving --on-save-error stop
        if [ "$warnings" -eq 0 ]; then ok; else fail "--on-save-error stop went on"; fi
        stopped "a disk full after $room bytes" "No space left on device; the newest checkpoint is that of step 2" 2
        faulty SHIM_ROOM=$room -- $saving
        stopped "a disk full after $room bytes, to the end" "the newest checkpoint is that of step 2" 2
    done
    # Every call on the way to a checkpoint fails once: with an error of the device, and where nothing may be written.
    for call in fopen fsync rename mkdir; do
        for after in 1 2 3 4 5 6 7; do
            [ $call = mkdir ] && [ $after -gt 4 ] && continue
            faulty SHIM_FAIL=$call SHIM_AFTER=$after SHIM_TIMES=1 SHIM_ERROR=5 -- $saving
            if [ $status -eq 0 ] && [ "$(cat "$dir/run/latest")" = step-00000008 ]; then ok
            else fail "$call number $after fails: status $status"; fi
            holds "$call number $after fails" "Input/output error" "$dir/err"
            same "$call number $after fails" "$dir/whole/step-00000008" "$dir/run/step-00000008"
        done
    done
    faulty SHIM_FAIL=mkdir SHIM_AFTER=3 SHIM_ERROR=30 -- $saving --on-save-error stop
    stopped "a disk that becomes read-only" "Read-only file system; the newest checkpoint is that of step 2" 2
    # A disk that lies: what it wrote is read back before an older step is deleted.
    for byte in 200 3000 20000 70000; do
        faulty SHIM_FLIP=$((140000 + byte)) -- $unsaved --keep 1 --checkpoint-dir "$dir/run"
        still "byte $byte of the second checkpoint is not what was written"
        holds "a disk that lies" "does not read back as it was written" "$dir/err"
    done
    faulty SHIM_FLIP=160000 -- $unsaved --keep 1 --on-save-error stop --checkpoint-dir "$dir/run"
    stopped "the only good checkpoint stays" "does not read back as it was written" 2
    faulty SHIM_ROOM=300 SHIM_TIMES=3 -- $train $fit --steps 8 --checkpoint-dir "$dir/run" --log "$dir/run.csv"
    if [ $status -eq 0 ]; then ok; else fail "a log on a full disk: status $status"; fi
    same "a log on a full disk" "$dir/whole/step-00000008" "$dir/run/step-00000008"
    faulty SHIM_ROOM=300 SHIM_TIMES=1 -- $train $fit --steps 8 --checkpoint-dir "$dir/run" --log "$dir/run.csv" \
        --on-save-error stop
    if [ $status -eq 1 ] && tail -n 1 "$dir/err" | grep -q '^error: stopped because the log cannot be written' &&
        [ -f "$dir/run/latest" ]; then ok; else fail "a log on a full disk, --on-save-error stop: status $status"; fi
else
    skip "disks that fail: the shim cannot be loaded"
fi
# The real thing: the system refuses to let a file grow, and sends a signal about it.
(ulimit -f 20 && exec $unsaved --checkpoint-dir "$dir/small") > "$dir/out" 2> "$dir/err"
status=$?
if [ $status -eq 1 ] && tail -n 1 "$dir/err" | grep -q 'step 8 could not be saved: .*too large'; then ok
else fail "files of at most 10 kB: status $status"; fi

(ulimit -f 2 && exec "$generate" --checkpoint "$dir/whole" --save-state "$dir/state" --max-tokens 0) > "$dir/out" 2> "$dir/err"
status=$?
if [ $status -eq 1 ] && grep -q '^error: --save-state .*too large' "$dir/err" && [ ! -f "$dir/state" ]; then ok
else fail "a state of at most 1 kB: status $status"; fi
(ulimit -f 2 && exec "$bin/tokenize" --tokenizer tests/tokenizer/tokenizer.json --data data/tinystories_valid.txt \
    --out "$dir/tokens.npy") > "$dir/out" 2> "$dir/err"
status=$?
if [ $status -eq 1 ] && grep -q '^error: .*too large' "$dir/err"; then ok
else fail "tokens of at most 1 kB: status $status"; fi

# A real disk that is too small for a third checkpoint, and one that may only be read, where this may be mounted.
mkdir "$dir/disk"
if mount -t tmpfs -o size=400k none "$dir/disk" 2> /dev/null; then
    run $unsaved --keep 2 --checkpoint-dir "$dir/disk/run"
    holds "a small disk" "warning: step 6 could not be saved: " "$dir/err"
    if [ $status -eq 1 ] && tail -n 1 "$dir/err" | grep '^error: step 8 could not be saved: ' |
        grep -q 'No space left on device; the newest checkpoint is that of step 4'; then ok
    else fail "a small disk: status $status"; fi
    same "a small disk" "$dir/whole/step-00000004" "$dir/disk/run/step-00000004"
    mount -o remount,ro "$dir/disk"
    bad "Read-only file system" "$train" --resume "$dir/disk/run"
    bad "Read-only file system" "$generate" --checkpoint "$dir/disk/run" --max-tokens 1 --save-state "$dir/disk/state"
    good "a disk that may be read" "$generate" --checkpoint "$dir/disk/run" --max-tokens 1
    mount -o remount,rw,size=1m "$dir/disk"
    good "a larger disk" "$train" --resume "$dir/disk/run"
    same "a larger disk" "$dir/whole/step-00000008" "$dir/disk/run/step-00000008"
    umount "$dir/disk"
else
    skip "a small disk: nothing may be mounted"
fi
# Results that nobody can read are an error.
if [ -w /dev/full ]; then
    full() {
        "$@" > /dev/full 2> "$dir/err"
        status=$?
        if [ $status -eq 1 ] && grep -q '^error: .*cannot be written: No space left on device' "$dir/err"; then ok
        else fail "standard output is full: $*: status $status"; fi
    }
    full "$generate" --checkpoint "$dir/whole" --max-tokens 20
    full "$bin/evaluate" --checkpoint "$dir/whole" --data "$dir/text"
    full "$bin/numdiff" --checkpoint "$dir/whole"
    echo '{"text": "A story."}' > "$dir/lines.jsonl"
    full "$bin/tokenize" --data "$dir/lines.jsonl" --out -
    bad "cannot be written: No space left on device" "$bin/evaluate" --checkpoint "$dir/whole" --data "$dir/text" --csv /dev/full
else
    skip "a full standard output: there is no /dev/full"
fi

# A folder that goes away in the middle of a run is made again.
rm -rf "$dir/run"
"$train" $fit --steps 1000000 --warmup 0 --save-every 5 --checkpoint-dir "$dir/run" --log-every 5 > "$dir/out" 2> "$dir/err" &
pid=$!
wait_for "step *20/" "$dir/out"
mv "$dir/run" "$dir/moved"
i=0
while [ $i -lt 400 ] && [ ! -f "$dir/run/latest" ]; do
    sleep 0.05
    i=$((i + 1))
done
bad "another run" "$train" --resume "$dir/run"
kill -INT $pid
wait $pid
status=$?
if [ $status -eq 0 ] && [ -f "$dir/run/latest" ] && [ -f "$dir/moved/latest" ]; then ok
else fail "a folder that goes away: status $status"; fi
step=$(sed 's/step-0*//' "$dir/run/latest")
good "a folder that went away" "$train" --resume "$dir/run" --steps $((step + 2))

# ---------------------------------------------------------------------------------------------------------------------
# Several runs in one folder; signals.

rm -rf "$dir/run"
"$train" $fit --steps 1000000 --warmup 0 --save-every 3 --checkpoint-dir "$dir/run" > "$dir/first" 2>&1 &
pid=$!
wait_for "step *10/" "$dir/first"
bad "another run (process $pid) writes its checkpoints here" "$train" --resume "$dir/run"
kill -9 $pid
wait $pid 2> /dev/null
step=$(sed 's/step-0*//' "$dir/run/latest")
# The kill may have come between a checkpoint's own name and `latest`: such a step is left alone by a run that has not
# come so far, and then counts among --keep. Whether or not it came then, there is one from here on.
ahead=$dir/run/step-$(printf %08d $((step + 3)))
[ -d "$ahead" ] || cp -r "$dir/run/$(cat "$dir/run/latest")" "$ahead"
good "a lock that was left behind" "$train" --resume "$dir/run" --steps $((step + 2))
if ls "$dir"/run/*.tmp* > /dev/null 2>&1; then fail "a kill left a temporary file for good"; else ok; fi
count=$(ls -d "$dir"/run/step-* | wc -l)
if [ "$count" -eq 4 ] && [ -d "$ahead" ]; then ok; else fail "--keep 3 and a step ahead: $count checkpoints"; fi
good "past the step ahead" "$train" --resume "$dir/run" --save-every 3 --steps $((step + 9))
count=$(ls -d "$dir"/run/step-* | wc -l)
if [ "$count" -eq 3 ] && [ ! -d "$ahead" ]; then ok; else fail "--keep 3 past a step ahead: $count checkpoints"; fi

# A second signal does not wait: not for the step either, which takes long here.
slow="--data $dir/text --batch 1 --seq-len 512 --accumulate 4000 --val-fraction 0"
for signal in TERM INT; do
    "$train" $slow --steps 10 --threads 1 --checkpoint-dir "$dir/slow" > "$dir/out" 2> "$dir/err" &
    pid=$!
    wait_for "^run" "$dir/out"
    sleep 0.3
    kill -$signal $pid
    sleep 0.2
    kill -$signal $pid
    begin=$(date +%s)
    wait $pid
    status=$?
    expected=143
    [ $signal = TERM ] || expected=130
    if [ $status -eq $expected ] && [ $(($(date +%s) - begin)) -le 5 ] && [ ! -f "$dir/slow/latest" ]; then ok
    else fail "a second SIG$signal: status $status"; fi
done
"$train" $fit --steps 1000000 --warmup 0 --checkpoint-dir "$dir/hup" > "$dir/out" 2> "$dir/err" &
pid=$!
wait_for "step *10/" "$dir/out"
kill -HUP $pid
wait $pid
status=$?
if [ $status -eq 0 ] && [ -f "$dir/hup/latest" ]; then ok; else fail "SIGHUP: status $status"; fi
holds "SIGHUP" "stopped by SIGHUP after step" "$dir/out"
# Nobody reads on: training saves and ends quietly.
{ "$train" $fit --steps 1000000 --warmup 0 --log-every 1 --checkpoint-dir "$dir/pipe" 2> "$dir/err"
  echo $? > "$dir/status"; } | head -n 30 > "$dir/out"
if [ "$(cat "$dir/status")" -eq 0 ] && [ ! -s "$dir/err" ] && [ -f "$dir/pipe/latest" ]; then ok
else fail "train with a closed pipe: status $(cat "$dir/status")"; fi

# ---------------------------------------------------------------------------------------------------------------------
# Numbers that go wrong.

# Decay of 10 at a rate of 10 multiplies every weight by -99 in each step, until a parameter overflows; a checkpoint of
# such weights is refused, so the last good one can be used.
diverge="--lr 10 --weight-decay 10 --schedule constant --warmup 0 --max-bad-steps 3"
run "$train" $data --steps 400 $diverge --save-every 1 --checkpoint-dir "$dir/bad"
if [ $status -eq 1 ]; then ok; else fail "divergence: status $status"; fi
holds "divergence" "error: 3 steps in a row were not finite; the last good checkpoint is step" "$dir/err"
holds "divergence" "the first tensor that is not finite, in the order of computation, is the " "$dir/err"
last=$(sed -n 's/.*the last good checkpoint is step \([0-9]*\).*/\1/p' "$dir/err")
if [ "$(cat "$dir/bad/latest")" = "$(printf 'step-%08d' "$last")" ]; then ok; else fail "divergence: latest"; fi
good "the last good checkpoint" "$generate" --checkpoint "$dir/bad" --max-tokens 1
# The spike guard: a rate that jumps is stopped by it, and a calm run is as it is without.
good "a calm run with a guard" "$train" $fit --steps 8 --spike-guard 6 --checkpoint-dir "$dir/calm"
if cmp -s "$dir/whole/step-00000008/model.safetensors" "$dir/calm/step-00000008/model.safetensors"; then ok
else fail "a calm run differs with a guard"; fi
guarded="$data --lr 0.003 --schedule constant --warmup 0 --spike-guard 1.5"
good "a guarded run" "$train" $guarded --max-bad-steps 1000 --steps 60 --save-every 30 --checkpoint-dir "$dir/guarded"
holds "a guarded run" ", a spike: up to " "$dir/err"
holds "a guarded run" "steps skipped" "$dir/out"
skipped_steps=$(sed -n 's/.*; \([0-9]*\) steps skipped.*/\1/p' "$dir/out")
holds "a guard learns from good steps only" "\"spike_guard\":\"$((60 - skipped_steps)) " \
    "$dir/guarded/step-00000060/trainer.safetensors"
good "a guarded run, resumed" "$train" --resume "$dir/guarded/step-00000030" --checkpoint-dir "$dir/guarded2"
same "a guarded run, resumed" "$dir/guarded/step-00000060" "$dir/guarded2/step-00000060"
bad "steps in a row were skipped" "$train" $guarded --max-bad-steps 1 --steps 200 --checkpoint-dir none

# ---------------------------------------------------------------------------------------------------------------------
# No call of CUDA or cuBLAS goes unchecked: each stands in CHECK_CUDA, CHECK_CUDA_UNLESS or CHECK_CUBLAS, on its line or
# the one before, but for those whose answer is looked at.

looked_at='cudaGetLastError|ErrorString|StatusString|cudaGetDeviceCount|GetVersion|AlgoGetHeuristic'
unchecked=$(cat megalodon.cu cuda/*.cuh | awk -v ok="$looked_at" '
    /(^|[^A-Za-z_])(cuda|cublas|cublasLt)[A-Z][A-Za-z0-9]*\(/ && !/CHECK_CU(DA|BLAS)(_UNLESS)?\(/ && $0 !~ ok &&
    before !~ /CHECK_CU(DA|BLAS)\($|CHECK_CUDA_UNLESS\([A-Za-z]+,$/ && !/^ \*/ { print } { before = $0 }')
if [ -z "$unchecked" ]; then ok; else fail "unchecked: $unchecked"; fi

echo "test_faults: $passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
