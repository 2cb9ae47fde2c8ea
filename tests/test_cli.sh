#!/bin/sh
# test_cli.sh - what a user meets: both programs with good input, with every kind of bad input, stopped, resumed, and
# with a reader that goes away.

. tests/cli.sh
train=$bin/train
generate=$bin/generate

# A model so small that a step takes milliseconds, and a text of 6,000 bytes.
tiny="--num-layers 2 --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 4 --chunk-size 16
      --norm-num-groups 4"
other=$(echo "$tiny" | sed 's/--num-layers 2/--num-layers 3/; s/--chunk-size 16/--chunk-size 8/')
i=0
while [ $i -lt 200 ]; do
    echo "The cat no. $i sat on the mat."
    i=$((i + 1))
done > "$dir/text"
fit="--data $dir/text --batch 2 --seq-len 24 $tiny"

# ---------------------------------------------------------------------------------------------------------------------
# Good input: train, log, evaluate, sample, resume.

good "train --help" "$train" --help
holds "train --help" "--model-dim" "$dir/out"
holds "train --help" "demo" "$dir/out"
good "train -h" "$train" -h
good "generate --help" "$generate" --help
holds "generate --help" "--top-p" "$dir/out"

# dropout, several passes a step and a clip that bites: resuming must be exact with all of it
long="$fit --steps 20 --lr 0.01 --accumulate 2 --dropout 0.1 --attention-dropout 0.1 --clip 0.5 --eval-every 10
      --eval-batches 2"
good "train" "$train" $long --checkpoint-dir "$dir/a" --save-every 10 --log "$dir/a.csv" --sample-every 10 \
    --sample-tokens 20 --prompt "The cat"
for text in "parameters" "activations" "total" "tokens to train on" "step 20/20 | loss" "bits/byte" "held-out loss" \
    "tok/s" "left" "done after step 20 of 20" "sample: The cat" "--model-dim 16"; do
    holds "train's output" "$text" "$dir/out"
done
holds "the log" "step,tokens,loss,val_loss,val_bpb,grad_norm,lr,ms,tokens_per_s" "$dir/a.csv"
if [ "$(wc -l < "$dir/a.csv")" -eq 21 ]; then ok; else fail "the log: expected 21 lines"; fi
if [ -f "$dir/a/step-00000010/model.safetensors" ] && [ -f "$dir/a/latest" ]; then ok; else fail "checkpoints"; fi

good "resume" "$train" --resume "$dir/a/step-00000010" --checkpoint-dir "$dir/b" --log "$dir/b.csv" --threads 1
same "20 steps = 10 + save + load + 10 (on one thread)" "$dir/a/step-00000020/model.safetensors" \
    "$dir/b/step-00000020/model.safetensors"
same "the same for the moments" "$dir/a/step-00000020/trainer.safetensors" "$dir/b/step-00000020/trainer.safetensors"
# A log that went on after the checkpoint is cut back to it, and continued.
cut -d, -f1-7 "$dir/a.csv" > "$dir/a.cut"
good "resume with a log" "$train" --resume "$dir/a/step-00000010" --checkpoint-dir "$dir/c" --log "$dir/a.csv"
cut -d, -f1-7 "$dir/a.csv" > "$dir/c.cut"
same "the log of a resumed run" "$dir/a.cut" "$dir/c.cut"
good "resume in the same folder" "$train" --resume "$dir/b" --steps 22 --log-every 1
holds "a changed option" "instead of the checkpoint's 20" "$dir/err"
good "--init" "$train" --init "$dir/a" --data "$dir/text" --batch 2 --seq-len 24 --steps 2 --checkpoint-dir none
good "--tokens" "$train" $fit --tokens 100 --checkpoint-dir none
holds "--tokens" "--steps 3 " "$dir/out"
good "--quiet" "$train" $fit --steps 3 --quiet --checkpoint-dir none
if [ "$(wc -l < "$dir/out")" -eq 1 ]; then ok; else fail "--quiet: expected one line"; fi
for schedule in linear constant; do
    good "$schedule" "$train" $fit --steps 4 --warmup 2 --schedule $schedule --checkpoint-dir none --log "$dir/l.csv"
done
holds "constant after the warm-up" ",0.001," "$dir/l.csv"
good "no held-out data" "$train" $fit --steps 2 --val-fraction 0 --checkpoint-dir none
good "--val" "$train" $fit --steps 2 --val "$dir/text" --checkpoint-dir none
mkdir "$dir/texts" && cp "$dir/text" "$dir/texts/1" && cp "$dir/text" "$dir/texts/2"
good "a folder" "$train" --data "$dir/texts" --batch 2 --seq-len 24 $tiny --steps 2 --checkpoint-dir none
# A .npy file of the tokens 0 to 9, many times: 8 bytes of magic and version, the header's length, the header.
{
    printf '\223NUMPY\001\000\076\000'
    printf '%-61s\n' "{'descr': '<u2', 'fortran_order': False, 'shape': (500,), }"
    i=0
    while [ $i -lt 50 ]; do
        printf '\000\000\001\000\002\000\003\000\004\000\005\000\006\000\007\000\010\000\011\000'
        i=$((i + 1))
    done
} > "$dir/tokens.npy"
npy="--data $dir/tokens.npy --batch 2 --seq-len 16 $tiny --checkpoint-dir none --steps 2"
good "token files" "$train" $npy --vocab-size 10
if grep -q "bits/byte" "$dir/out"; then fail "tokens are not bytes"; else ok; fi

# --carry-state: documents of many lengths, rows that start anew at different times, several segments a step, and
# evaluations and samples in between that must not disturb the rows' states. 20 steps = 10 + save + load + 10.
i=0
while [ $i -lt 60 ]; do
    head -c $((i * 37 % 211 + 5)) "$dir/text"
    echo "<|endoftext|>"
    i=$((i + 1))
done > "$dir/stories"
carry="--data $dir/stories --carry-state --batch 3 --seq-len 32 $tiny --steps 20 --lr 0.01 --dropout 0.1"
good "carry-state" "$train" $carry --accumulate 2 --eval-every 4 --sample-every 10 --sample-tokens 9 --prompt The \
    --checkpoint-dir "$dir/e" --save-every 10
holds "carry-state" "3 rows of" "$dir/out"
holds "carry-state" "% padding" "$dir/out"
holds "carry-state" "--document-separator '<|endoftext|>'" "$dir/out"
if [ -f "$dir/e/step-00000010/state.safetensors" ]; then ok; else fail "carry-state: no state in the checkpoint"; fi
good "resume with a state" "$train" --resume "$dir/e/step-00000010" --checkpoint-dir "$dir/f" --threads 1
for file in model trainer state; do
    same "carry-state: 20 steps = 10 + 10, $file" "$dir/e/step-00000020/$file.safetensors" \
        "$dir/f/step-00000020/$file.safetensors"
done
good "carry-state, undisturbed" "$train" $carry --accumulate 2 --eval-every 0 --checkpoint-dir "$dir/g"
same "evaluations and samples change nothing" "$dir/e/step-00000020/model.safetensors" \
    "$dir/g/step-00000020/model.safetensors"
# Two segments of 32 in a step are one sequence of 64, as long as no document ends.
for length in 32 64; do
    good "segments of $length" "$train" --data "$dir/text" --carry-state --batch 1 --seq-len $length $tiny --steps 1 \
        --accumulate $((64 / length)) --checkpoint-dir none --log "$dir/l$length.csv"
done
if paste -d, "$dir/l32.csv" "$dir/l64.csv" |
    awk -F, 'NR == 2 { d = $3 - $12; exit !($3 > 1 && d * d < 1e-10) }'; then ok
else fail "two carried segments are one sequence: $(cut -d, -f3 "$dir/l32.csv" "$dir/l64.csv")"; fi
# A row that starts a document beside one that goes on: the losses are those of two runs with one row each. The second
# row has documents of 32 and 64 bytes. At a rate of 0 all steps have the same weights.
head -c 96 "$dir/text" > "$dir/row1"
{ head -c 18 "$dir/text"; echo "<|endoftext|>"; tail -c 64 "$dir/text"; } > "$dir/row2"
cat "$dir/row1" "$dir/row2" > "$dir/row12"
for row in 1 2 12; do
    good "rows $row" "$train" --data "$dir/row$row" --carry-state --batch $((row / 12 + 1)) --seq-len 32 $tiny --steps 3 \
        --lr 0 --val-fraction 0 --checkpoint-dir none --log "$dir/r$row.csv"
done
if paste -d, "$dir/r1.csv" "$dir/r2.csv" "$dir/r12.csv" | awk -F, '
    NR > 1 { a = NR < 4 ? 32 : 31; b = NR == 3 ? 32 : 31; d = (a * $3 + b * $12) / (a + b) - $21; sum += d * d }
    END { exit !(NR == 4 && sum < 1e-10) }'; then ok
else fail "a row that starts anew: $(cut -d, -f3 "$dir/r1.csv" "$dir/r2.csv" "$dir/r12.csv")"; fi
mkdir "$dir/books" && cp "$dir/text" "$dir/books/1" && cp "$dir/stories" "$dir/books/2"
good "carry-state, a folder" "$train" --data "$dir/books" --carry-state --batch 2 --seq-len 32 $tiny --steps 3 \
    --document-separator none --checkpoint-dir none
good "carry-state, token files" "$train" $npy --carry-state

# Ctrl-C and SIGTERM: a checkpoint, one line, status 0; and the run goes on from there.
for signal in INT TERM; do
    "$train" $fit --steps 1000000 --warmup 2 --checkpoint-dir "$dir/$signal" > "$dir/out" 2> "$dir/err" &
    pid=$!
    i=0
    while [ $i -lt 200 ] && ! grep -q "step *10/" "$dir/out"; do
        sleep 0.1
        i=$((i + 1))
    done
    kill -$signal $pid
    wait $pid
    status=$?
    if [ $status -eq 0 ] && [ ! -s "$dir/err" ]; then ok; else fail "SIG$signal: status $status"; fi
    holds "SIG$signal" "stopped by" "$dir/out"
    step=$(sed 's/step-0*//' "$dir/$signal/latest")
    good "going on after SIG$signal" "$train" --resume "$dir/$signal" --steps $((step + 2))
    holds "going on after SIG$signal" "after step $((step + 2)) of" "$dir/out"
done

# Numbers that overflow: the steps are skipped, then the run stops and names the last good checkpoint.
# Decay of 10 at a rate of 10 multiplies every weight by -99 in each step.
run "$train" $fit --steps 400 --lr 10 --weight-decay 10 --schedule constant --warmup 0 --max-bad-steps 3 \
    --save-every 2 --checkpoint-dir "$dir/bad" --log "$dir/bad.csv"
if [ $status -eq 1 ]; then ok; else fail "divergence: status $status"; fi
holds "divergence" "the step was skipped (2 in a row" "$dir/err"
holds "divergence" "error: 3 steps in a row were not finite; the last good checkpoint is step" "$dir/err"
good "what a diverged run saved" "$generate" --checkpoint "$dir/bad/step-00000002" --max-tokens 1

# ---------------------------------------------------------------------------------------------------------------------
# Good input: generate.

story="$generate --checkpoint $dir/a --prompt The"
make="$story --max-tokens 50"
good "generate" $make
cp "$dir/out" "$dir/first"
holds "the prompt comes first" "The" "$dir/out"
holds "statistics" "generated 50 tokens in" "$dir/err"
if [ "$(wc -c < "$dir/out")" -le 53 ]; then ok; else fail "generate: more than prompt and tokens"; fi
good "generate again" $make --threads 1
same "the same seed, another number of threads" "$dir/first" "$dir/out"
good "generate from a step" "$generate" --checkpoint "$dir/a/step-00000020" --prompt The --max-tokens 50
same "a run's folder and its newest step" "$dir/first" "$dir/out"
good "generate from a file" "$generate" --checkpoint "$dir/a/step-00000020/model.safetensors" --prompt The \
    --max-tokens 50
same "a run's folder and its model file" "$dir/first" "$dir/out"
good "another seed" $make --seed 2
if cmp -s "$dir/first" "$dir/out"; then fail "another seed gave the same text"; else ok; fi
good "greedy" $make --temperature 0
cp "$dir/out" "$dir/greedy"
good "top-k 1" $make --top-k 1
same "greedy and top-k 1" "$dir/greedy" "$dir/out"
good "top-p" $make --top-p 0.5 --top-k 20 --temperature 1.5
# The stop text: where greedy text has "x" for the first time, stopping at x gives what stands before it.
good "--stop" $make --temperature 0 --stop "$(tail -c 1 "$dir/greedy")"
if [ "$(wc -c < "$dir/out")" -lt "$(wc -c < "$dir/greedy")" ]; then ok; else fail "--stop did not stop"; fi
printf The > "$dir/prompt"
good "--prompt-file" "$generate" --checkpoint "$dir/a" --prompt-file "$dir/prompt" --max-tokens 50
tail -c +4 "$dir/first" > "$dir/rest"
same "--prompt-file gives the same text without the prompt" "$dir/rest" "$dir/out"
"$generate" --checkpoint "$dir/a" --prompt-file - --max-tokens 50 < "$dir/prompt" > "$dir/out" 2> "$dir/err"
same "a prompt on stdin" "$dir/rest" "$dir/out"
# A prompt of several pieces gives the same text from a file and through a pipe that trickles.
good "a long prompt" "$generate" --checkpoint "$dir/a" --prompt-file "$dir/text" --max-tokens 20
holds "a long prompt" "bytes after 512 tokens, " "$dir/err"
cp "$dir/out" "$dir/long"
{ head -c 700 "$dir/text"; sleep 0.2; tail -c +701 "$dir/text"; } |
    "$generate" --checkpoint "$dir/a" --prompt-file - --max-tokens 20 > "$dir/out" 2> "$dir/err"
same "a long prompt through a pipe" "$dir/long" "$dir/out"
good "pieces of another size" "$generate" --checkpoint "$dir/a" --prompt-file "$dir/text" --max-tokens 20 \
    --read-size 77
same "pieces of another size" "$dir/long" "$dir/out"
good "no tokens" $story --max-tokens 0

# A state: read once, go on many times, as if the text had just been read; a state that goes on can be saved again.
from="$generate --checkpoint $dir/a --max-tokens 20"
good "--save-state" $from --prompt-file "$dir/text" --save-state "$dir/state"
same "--save-state changes nothing" "$dir/long" "$dir/out"
good "--load-state" $from --load-state "$dir/state" --threads 1
same "--load-state goes on as if the text had just been read" "$dir/long" "$dir/out"
holds "--load-state" "has read 6,290 tokens" "$dir/err"
head -c 3000 "$dir/text" > "$dir/half"
tail -c +3001 "$dir/text" > "$dir/rest"
good "half a text" "$generate" --checkpoint "$dir/a" --prompt-file "$dir/half" --save-state "$dir/state.half" \
    --max-tokens 0
good "the other half" $from --load-state "$dir/state.half" --prompt-file "$dir/rest" --save-state "$dir/state.half"
same "two halves are one text" "$dir/long" "$dir/out"
good "a state saved again" $from --load-state "$dir/state.half"
same "a state saved again" "$dir/long" "$dir/out"
good "a prompt after a state" $from --load-state "$dir/state" --prompt "The dog"
holds "a prompt after a state" "The dog" "$dir/out"
if ls "$dir"/state*.tmp* > /dev/null 2>&1; then fail "--save-state left a temporary file"; else ok; fi
# A reader that goes away ends the program quietly.
{ $story --max-tokens 1000000 2> "$dir/err"; echo $? > "$dir/status"; } | head -c 20 > "$dir/out"
if [ "$(cat "$dir/status")" -eq 0 ] && [ ! -s "$dir/err" ]; then ok; else fail "a closed pipe"; fi

# ---------------------------------------------------------------------------------------------------------------------
# Bad input: options. Each is one line on stderr and status 1.

for program in "$train" "$generate"; do
    bad "unexpected argument" "$program" text
    bad "unexpected argument" "$program" -x
    bad "unexpected argument" "$program" ""
    bad "unknown option" "$program" --
    bad "unknown option" "$program" --no-such-option-at-all-and-longer-than-any-name 1
    bad "did you mean --threads?" "$program" --thraeds 2
    bad "needs a value" "$program" --seed
    bad "needs a value" "$program" --seed --threads
    bad "given twice" "$program" --seed 1 --seed 1
    bad "is empty" "$program" --seed ""
    bad "is empty" "$program" --seed=
    for value in x 1x -1 1.5 1e99 0x10 " 1" "1 " 99999999999999999999 nan inf - ,; do
        bad "--seed: expected a whole number" "$program" --seed "$value"
    done
    bad "one of auto, cpu, cuda" "$program" --backend gpu
    bad "one of auto, cpu, cuda" "$program" --backend "auto|cpu"
    bad "--threads: expected" "$program" --threads 1000000
done
for value in x 1e999 -1 nan inf 0x1p3 1e-400 1e . "" 11 +1; do
    bad "--lr" "$train" --lr "$value"
done
bad "takes no value" "$train" --quiet=true
bad "true or false" "$train" --swiglu yes
bad "one of cosine, linear, constant" "$train" --schedule ""
bad "--temperature: expected" "$generate" --temperature -0.1
bad "--top-p: expected" "$generate" --top-p 0
bad "--top-p: expected" "$generate" --top-p 1.01
bad "--stop" "$generate" --stop "$(head -c 300 "$dir/text")"

# Options that contradict each other, or would silently do nothing.
bad "exclude each other" "$train" $fit --steps 3 --tokens 100
bad "exclude each other" "$train" $fit --val "$dir/text" --val-fraction 0.1
bad "exclude each other" "$train" --resume "$dir/a" --init "$dir/a"
bad "does nothing" "$train" $fit --prompt hello
bad "does nothing" "$train" $fit --schedule constant --min-lr-ratio 0.5
bad "takes the model from the checkpoint" "$train" --resume "$dir/a" --model-dim 16
bad "longer than the whole run" "$train" $fit --steps 5 --warmup 6
bad "more tokens than can be counted" "$train" $fit --steps 9007199254740992 --accumulate 60000
bad "--document-separator does nothing" "$train" $fit --document-separator x
bad "--seq-len 24 is not a multiple of the model's --chunk-size 16" "$train" $fit --carry-state
bad "at most 256 bytes" "$train" $carry --document-separator "$(head -c 300 "$dir/text")" --checkpoint-dir none
bad "where --data holds token numbers" "$train" $npy --carry-state --document-separator x
bad "cannot be divided into 4000 streams" "$train" --data "$dir/text" $tiny --carry-state --batch 4000 --seq-len 32
bad "which --batch 2 cannot go on from" "$train" --resume "$dir/e/step-00000010" --batch 2 --checkpoint-dir none
# edited NAME TEXT SED...: the facts of a run, changed in a way that keeps their length, are refused with TEXT
edited() {
    rm -rf "$dir/edited"
    cp -r "$dir/e/step-00000010" "$dir/edited"
    LC_ALL=C sed "$2" "$dir/e/step-00000010/trainer.safetensors" > "$dir/edited/trainer.safetensors"
    bad "$1" "$train" --resume "$dir/edited" --checkpoint-dir none --no-verify
    bad "expected the checksum" "$train" --resume "$dir/edited" --checkpoint-dir none
}
edited '"updates" in __metadata__ to be from 0 to 10, found 99' 's/"updates":"10"/"updates":"99"/'
edited '"updates" in __metadata__ to be from 0 to 10, found -1' 's/"updates":"10"/"updates":"-1"/'
edited '"bad_steps" in __metadata__ to be an integer, found "x"' 's/"bad_steps":"0"/"bad_steps":"x"/'
edited '"bad_in_a_row" in __metadata__ to be from 0 to 0, found 5' 's/"bad_in_a_row":"0"/"bad_in_a_row":"5"/'
edited 'expected "stream_fresh" to be 0 or 1 for each of 3 rows, found "0x0"' 's/"stream_fresh":"..."/"stream_fresh":"0x0"/'
edited 'expected the places of 3 rows, found more' 's/"stream_next":"[0-9]*\([0-9]\)[0-9][0-9] \([0-9 ]*\)"/"stream_next":"\1 \2 7"/'
edited 'but its stream is [' 's/\("stream_next":"[0-9 ]* \)[0-9]\([0-9]*"\)/\19\2/'
bad "was trained without --carry-state" "$train" --resume "$dir/a/step-00000010" --carry-state --checkpoint-dir none
bad "exclude each other" "$generate" --prompt a --prompt-file b
bad "does nothing" "$generate" --temperature 0 --top-p 0.5
bad "bf16 needs a GPU" "$train" $fit --backend cpu --precision bf16
bad "bf16 needs a GPU" "$generate" --checkpoint "$dir/a" --backend cpu --precision bf16

# Models that cannot be.
none="--data $dir/text --checkpoint-dir none"
bad "no-such-preset" "$train" $none --preset no-such-preset
bad "model_dim 190 is not a multiple of norm_num_groups" "$train" $none --model-dim 190
bad "num_heads" "$train" $none --num-heads 3
bad "num_layers is 0" "$train" $none --num-layers 0
bad "dropout is 1" "$train" $none --dropout 1

# ---------------------------------------------------------------------------------------------------------------------
# Bad input: files.

: > "$dir/empty"
head -c 24 "$dir/text" > "$dir/short"
mkdir "$dir/nothing"
bad "--data is missing" "$train"
bad "cannot be opened" "$train" --data "$dir/no-such-file" --checkpoint-dir none
bad "is empty" "$train" --data "$dir/empty" --checkpoint-dir none
bad "holds no files" "$train" --data "$dir/nothing" --checkpoint-dir none
bad "is not a regular file" "$train" --data "$dir" --checkpoint-dir none
bad "is not a regular file" "$train" --data /dev/null --checkpoint-dir none
bad "fewer than one sequence" "$train" --data "$dir/short" --seq-len 24 --val-fraction 0 --checkpoint-dir none
bad "fewer than one sequence" "$train" --data "$dir/text" --val "$dir/short" --seq-len 24 --checkpoint-dir none
bad "held-out tokens are fewer" "$train" --data "$dir/text" --seq-len 2000 --checkpoint-dir none
bad "of one kind" "$train" $npy --val "$dir/text"
bad "the model knows only 0 to 8" "$train" $npy --vocab-size 9
bad "the model knows only 0 to 49" "$train" $fit --vocab-size 50 --checkpoint-dir none
bad "already holds the checkpoints of a run" "$train" $fit --checkpoint-dir "$dir/a"
bad "already holds the checkpoints of a run" "$train" --resume "$dir/a/step-00000010" --checkpoint-dir "$dir/b"
bad "cannot be written" "$train" $fit --checkpoint-dir none --log "$dir/no/such/folder.csv"
bad "is not a log of this program" "$train" $fit --checkpoint-dir none --log "$dir/text"
bad "cannot create the directory" "$train" $fit --steps 1 --checkpoint-dir "$dir/text/below"
bad "is already done" "$train" --resume "$dir/a"
bad "$dir/nothing" "$train" --resume "$dir/nothing"
bad "$dir/text" "$generate" --checkpoint "$dir/text/model.safetensors"
bad "train a model first" "$generate" --checkpoint "$dir/no-such-checkpoint"
bad "$dir/nothing" "$generate" --checkpoint "$dir/nothing"
bad "is empty" "$generate" --checkpoint "$dir/a" --prompt-file "$dir/empty"
bad "is empty" "$generate" --checkpoint "$dir/a" --prompt-file -
bad "cannot be opened" "$generate" --checkpoint "$dir/a" --prompt-file "$dir/no-such-file"
bad "is a folder" "$generate" --checkpoint "$dir/a" --prompt-file "$dir"

# Data that changed since the checkpoint is refused, unless it is asked for by name.
sed 's/cat/dog/' "$dir/text" > "$dir/other"
good "train for a data check" "$train" --data "$dir/other" --batch 2 --seq-len 24 $tiny --steps 3 \
    --save-every 2 --checkpoint-dir "$dir/d"
cp "$dir/text" "$dir/other"
bad "has changed since the checkpoint" "$train" --resume "$dir/d/step-00000002"
good "changed data by name" "$train" --resume "$dir/d/step-00000002" --data "$dir/other"

# Checkpoints that are cut or damaged: a message, never a crash, wherever the file ends.
model=$dir/a/step-00000020/model.safetensors
size=$(wc -c < "$model")
for bytes in 0 1 7 8 9 100 1000 2500 $((size / 2)) $((size - 1)); do
    head -c "$bytes" "$model" > "$dir/cut.safetensors"
    bad "cut.safetensors" "$generate" --checkpoint "$dir/cut.safetensors" --max-tokens 1
done
{ cat "$model"; printf x; } > "$dir/cut.safetensors"
bad "cut.safetensors" "$generate" --checkpoint "$dir/cut.safetensors" --max-tokens 1


good "another size" "$train" --data "$dir/text" --batch 1 --seq-len 16 $other --steps 1 --checkpoint-dir "$dir/h"
# States of other models, states that are cut or damaged, and files that are no states.
bad "num_layers 2 and 3, chunk_size 16 and 8" "$generate" --checkpoint "$dir/h" --load-state "$dir/state"
bad "state of another model of the same size" "$generate" --checkpoint "$dir/e" --load-state "$dir/state"
bad "state of another model of the same size" "$generate" --checkpoint "$dir/a/step-00000010" --load-state "$dir/state"
bad "which say whose state this is" "$generate" --checkpoint "$dir/e" \
    --load-state "$dir/e/step-00000020/state.safetensors"
bad "expected the format" "$generate" --checkpoint "$dir/a" --load-state "$model"
bad "cannot open" "$generate" --checkpoint "$dir/a" --load-state "$dir/no-such-file"
bad "is not a file" "$generate" --checkpoint "$dir/a" --save-state "$dir"
bad "cannot create" "$generate" --checkpoint "$dir/a" --save-state "$dir/no/such/folder/state"
size=$(wc -c < "$dir/state")
for bytes in 0 1 7 8 9 100 1000 $((size / 2)) $((size - 1)); do
    head -c "$bytes" "$dir/state" > "$dir/cut.state"
    bad "cut.state" "$generate" --checkpoint "$dir/a" --load-state "$dir/cut.state" --max-tokens 1
done
{ cat "$dir/state"; printf x; } > "$dir/cut.state"
bad "cut.state" "$generate" --checkpoint "$dir/a" --load-state "$dir/cut.state" --max-tokens 1
sed 's/last_logits/lost_logits/' "$dir/state" > "$dir/cut.state"
bad "its header: expected the checksum" "$generate" --checkpoint "$dir/a" --load-state "$dir/cut.state" --max-tokens 1
bad "last_logits" "$generate" --checkpoint "$dir/a" --load-state "$dir/cut.state" --max-tokens 1 --no-verify
rm "$dir/e/step-00000010/state.safetensors"
bad "state.safetensors is missing" "$train" --resume "$dir/e/step-00000010" --checkpoint-dir none

# The other start of CEMA, and its decay.
good "spread" "$train" $fit --steps 3 --cema-init spread --cema-memory 64 --cema-decay false --checkpoint-dir "$dir/spread"
good "released" "$train" $fit --steps 3 --checkpoint-dir "$dir/released"
if cmp -s "$dir/spread/step-00000003/model.safetensors" "$dir/released/step-00000003/model.safetensors"; then
    fail "--cema-init spread changes nothing"; else ok; fi
good "hold" "$train" $fit --steps 3 --cema-init hold --cema-memory 64 --cema-decay false --checkpoint-dir "$dir/hold"
if cmp -s "$dir/spread/step-00000003/model.safetensors" "$dir/hold/step-00000003/model.safetensors"; then
    fail "--cema-init hold does what spread does"; else ok; fi
good "memories" "$bin/evaluate" --cema --checkpoint "$dir/spread"
bad "does nothing without --cema-init spread" "$train" $fit --steps 3 --cema-memory 64 --checkpoint-dir none
bad "they come from a checkpoint" "$train" $fit --steps 3 --init "$dir/spread" --cema-init spread --checkpoint-dir none

finish test_cli
