#!/bin/sh
# test_words.sh - models whose tokens are not bytes, and examples of prompts and responses, as a user meets them: train,
# generate and evaluate with a tokenizer, fine-tuning on JSONL, and what must be refused. Runs from the top folder;
# MEGALODON_BIN says where the programs are. What the numbers mean is the matter of test_vocabulary.c and
# test_finetune.c.

. tests/cli.sh
train=$bin/train
generate=$bin/generate
evaluate=$bin/evaluate
tokenize=$bin/tokenize
tokenizer=tests/tokenizer/tokenizer.json

# losses FILE: the losses of a log
losses() {
    cut -d, -f3 "$1"
}

tiny="--num-layers 2 --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 4 --chunk-size 16
      --norm-num-groups 4"
encode() {                                  # encode TEXT NPY
    "$tokenize" --tokenizer $tokenizer --data "$1" --out "$2" 2> "$dir/err" || fail "tokenize $1"
}

# ---------------------------------------------------------------------------------------------------------------------
# A model of words: stories as tokens, one document each.

head -c 40000 data/tinystories_valid.txt > "$dir/stories.txt"
encode "$dir/stories.txt" "$dir/stories.npy"
words="--data $dir/stories.npy --tokenizer $tokenizer --batch 2 --seq-len 32 $tiny --steps 20 --lr 0.01"
good "train" "$train" $words --checkpoint-dir "$dir/a" --save-every 10 --log "$dir/a.csv" --sample-every 10 \
    --sample-tokens 20 --prompt "Once upon"
for text in "--vocab-size 2048" "tokenizer    2,048 tokens" "bits/byte" "sample: Once upon"; do
    holds "train" "$text" "$dir/out"
done
if awk -F, 'END { exit !($5 > 0.5 && $5 < 10) }' "$dir/a.csv"; then ok; else fail "val_bpb in the log"; fi
same "the tokenizer of a checkpoint" $tokenizer "$dir/a/step-00000020/tokenizer.json"
good "resume" "$train" --resume "$dir/a/step-00000010" --checkpoint-dir "$dir/b"
for file in model.safetensors trainer.safetensors tokenizer.json; do
    same "20 steps = 10 + 10" "$dir/a/step-00000020/$file" "$dir/b/step-00000020/$file"
done
good "init" "$train" --init "$dir/a" --data "$dir/stories.npy" --batch 2 --seq-len 32 --steps 1 --checkpoint-dir "$dir/c"
same "a new run keeps the tokenizer of its weights" $tokenizer "$dir/c/step-00000001/tokenizer.json"
good "more tokens than the tokenizer's" "$train" $words --vocab-size 2100 --checkpoint-dir "$dir/d"

# Another spelling of the same file is the same tokenizer; another tokenizer is refused.
sed 's/,"merges"/, "merges"/' $tokenizer > "$dir/spelled.json"
sed 's/\["h","e"\],\["Ġ","t"\]/["Ġ","t"],["h","e"]/' $tokenizer > "$dir/other.json"
cmp -s $tokenizer "$dir/other.json" && fail "the other tokenizer is the same"
good "the same tokenizer, spelled otherwise" "$generate" --checkpoint "$dir/a" --tokenizer "$dir/spelled.json" --max-tokens 1

story="$generate --checkpoint $dir/a --temperature 0 --max-tokens 30"
good "generate" $story --prompt "Once upon a time"
cp "$dir/out" "$dir/first"
holds "the prompt comes first" "Once upon a time" "$dir/out"
holds "statistics" "read 4 tokens" "$dir/err"
good "generate from the file" "$generate" --checkpoint "$dir/a/step-00000020/model.safetensors" --temperature 0 \
    --max-tokens 30 --prompt "Once upon a time"
same "a run's folder and its model file" "$dir/first" "$dir/out"
# Tokens that mean nothing are not drawn, even where the model has seen nothing else: 2,048 and 2,049 are not among the
# tokenizer's. Each of the 20 tokens is some text.
{
    printf '\223NUMPY\001\000\166\000'
    printf '%-117s\n' "{'descr': '<u2', 'fortran_order': False, 'shape': (1000,), }"
    i=0
    while [ $i -lt 500 ]; do printf '\000\010\001\010'; i=$((i + 1)); done
} > "$dir/beyond.npy"
beyond="--data $dir/beyond.npy --batch 2 --seq-len 16 $tiny --steps 30 --lr 0.02"
good "unknown tokens" "$train" $beyond --vocab-size 2100 --checkpoint-dir "$dir/u"
good "and their tokenizer" "$generate" --checkpoint "$dir/u" --tokenizer $tokenizer --prompt "A" --max-tokens 20
if [ "$(wc -c < "$dir/out")" -gt 20 ]; then ok; else fail "tokens that mean nothing are drawn"; fi
bad "token 0 is 2048, but the model knows only 0 to 2047" "$train" $beyond --tokenizer $tokenizer --vocab-size 2100 \
    --checkpoint-dir none
bad "token 1 is 2049" "$evaluate" --checkpoint "$dir/u" --tokenizer $tokenizer --data "$dir/beyond.npy"
# A prompt through a file, in pieces of any size, and through a pipe: the same tokens.
good "--prompt" $story --prompt "$(head -c 3000 "$dir/stories.txt")"
holds "--prompt" "tokens" "$dir/err"
tail -c +3001 "$dir/out" > "$dir/long"
printf %s "$(head -c 3000 "$dir/stories.txt")" > "$dir/prompt"
for size in 1 7 100 4096; do
    good "pieces of $size" $story --prompt-file "$dir/prompt" --read-size $size
    same "pieces of $size" "$dir/long" "$dir/out"
done
{ head -c 700 "$dir/prompt"; sleep 0.2; tail -c +701 "$dir/prompt"; } | $story --prompt-file - > "$dir/out" 2> "$dir/err"
same "a pipe" "$dir/long" "$dir/out"
good "--save-state" $story --prompt-file "$dir/prompt" --save-state "$dir/state"
good "--load-state" $story --load-state "$dir/state"
same "a state of words" "$dir/long" "$dir/out"
# --stop is text, also where one token or several make it.
printf %s "$(cat "$dir/first")" | tail -c 2 > "$dir/stop"
good "--stop" $story --prompt "Once upon a time" --stop "$(cat "$dir/stop")"
if [ "$(wc -c < "$dir/out")" -lt "$(wc -c < "$dir/first")" ]; then ok; else fail "--stop did not stop"; fi

# Characters of several tokens: whatever the number of tokens, no half of one is written.
i=0
while [ $i -lt 60 ]; do printf '日本語の文章です。😀 '; i=$((i + 1)); done > "$dir/japanese"
encode "$dir/japanese" "$dir/japanese.npy"
good "train on characters of several tokens" "$train" --data "$dir/japanese.npy" --tokenizer $tokenizer --batch 4 \
    --seq-len 64 $tiny --steps 60 --lr 0.02 --checkpoint-dir "$dir/j"
seen=0
for tokens in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    good "$tokens tokens" "$generate" --checkpoint "$dir/j" --prompt "日本" --temperature 0 --max-tokens $tokens
    if iconv -f UTF-8 -t UTF-8 < "$dir/out" > /dev/null 2>&1; then ok; else fail "$tokens tokens: half a character"; fi
    [ "$(wc -c < "$dir/out")" -gt "$seen" ] && longer=$((${longer:-0} + 1))
    seen=$(wc -c < "$dir/out")
done
if [ "$longer" -gt 3 ] && [ "$longer" -lt 20 ]; then ok; else fail "$longer of 20 tokens ended a character"; fi

# Bits per byte: of each file, and of all. 1,000 and 3,000 bytes of text; special tokens have none.
mkdir "$dir/two"
head -c 1000 "$dir/stories.txt" > "$dir/1.txt"
tail -c 3000 "$dir/stories.txt" > "$dir/2.txt"
for i in 1 2; do encode "$dir/$i.txt" "$dir/two/$i.npy"; done
good "evaluate" "$evaluate" --checkpoint "$dir/a" --data "$dir/two" --csv "$dir/e.csv"
holds "evaluate" "bits/byte" "$dir/out"
holds "evaluate" "bytes of text" "$dir/out"
# Text that a file's predictions stand for: all of it but the first token's, the marks, and the line breaks beside them.
text_bytes() {
    "$tokenize" --tokenizer $tokenizer --decode "$1" --out - | sed 's/<|endoftext|>//g' | wc -c
}
first() {                                   # first NPY: bytes of the first token; the header has 128
    { head -c 128 "$1" | sed 's/(\([0-9]*\),)/(1,)/'; tail -c +129 "$1" | head -c 2; } > "$dir/one.npy"
    printf '\223NUMPY\001\000\166\000' > "$dir/first.npy"
    printf "%-117s\n" "{'descr': '<u2', 'fortran_order': False, 'shape': (1,), }" >> "$dir/first.npy"
    tail -c +129 "$1" | head -c 2 >> "$dir/first.npy"
    "$tokenize" --tokenizer $tokenizer --decode "$dir/first.npy" --out - | wc -c
}
one=$(($(text_bytes "$dir/two/1.npy") - $(first "$dir/two/1.npy")))
two=$(($(text_bytes "$dir/two/2.npy") - $(first "$dir/two/2.npy")))
if awk -F, -v one=$one -v two=$two '
    function off(x, y) { x -= y; return x > 1e-5 || x < -1e-5 }
    $1 == "file" { n[++files] = $5; l[files] = $6; b[files] = $9 }
    $1 == "total" { t = $9 }
    END { exit files != 2 || off(b[1], l[1] * n[1] / one / log(2)) || off(b[2], l[2] * n[2] / two / log(2)) ||
          off(t, (l[1] * n[1] + l[2] * n[2]) / (one + two) / log(2)) }' "$dir/e.csv"; then ok
else fail "bits per byte of $one and $two bytes: $(cat "$dir/e.csv")"; fi
good "evaluate by context" "$evaluate" --checkpoint "$dir/a" --data "$dir/two" --by-context 16,all --by-position

# ---------------------------------------------------------------------------------------------------------------------
# Documents of a token file: the mark in it is as good as the end of a file.

mkdir "$dir/split" "$dir/joined"
printf 'The first story is about a dog. It is not long.' > "$dir/split/1"
printf 'The second one is about a cat, and it is longer than the first by a word or two, or by three.' > "$dir/split/2"
{ cat "$dir/split/1"; echo; echo "<|endoftext|>"; cat "$dir/split/2"; } > "$dir/joined/1"
mkdir "$dir/split.npys"
for i in 1 2; do encode "$dir/split/$i" "$dir/split.npys/$i.npy"; done
encode "$dir/joined/1" "$dir/joined.npy"
carry="--tokenizer $tokenizer --carry-state --batch 1 --seq-len 16 $tiny --steps 6 --lr 0 --val-fraction 0
       --checkpoint-dir none"
good "a folder of documents" "$train" --data "$dir/split.npys" $carry --log "$dir/split.csv"
good "a file of documents" "$train" --data "$dir/joined.npy" $carry --log "$dir/joined.csv"
holds "a file of documents" "--document-separator '<|endoftext|>'" "$dir/out"
good "the mark by number" "$train" --data "$dir/joined.npy" $carry --document-separator 0 --log "$dir/number.csv"
good "no mark" "$train" --data "$dir/joined.npy" $carry --document-separator none --log "$dir/none.csv"
losses "$dir/split.csv" > "$dir/split.loss"
losses "$dir/joined.csv" > "$dir/joined.loss"
losses "$dir/number.csv" > "$dir/number.loss"
losses "$dir/none.csv" > "$dir/none.loss"
same "documents of a folder and of a file" "$dir/split.loss" "$dir/joined.loss"
same "a mark by name and by number" "$dir/joined.loss" "$dir/number.loss"
if cmp -s "$dir/joined.loss" "$dir/none.loss"; then fail "the mark does nothing"; else ok; fi
good "resume with a mark" "$train" --data "$dir/joined.npy" --tokenizer $tokenizer --carry-state --batch 1 --seq-len 16 \
    $tiny --steps 2 --val-fraction 0 --document-separator 0 --checkpoint-dir "$dir/m"
good "resume with a mark" "$train" --resume "$dir/m" --steps 3
holds "resume with a mark" "--document-separator 0" "$dir/out"

# --within-documents: no prediction across an end. One row over all of the text, at a rate of 0: the loss times the
# number of targets differs by the loss of what is left out.
within="--batch 1 --seq-len 62 $tiny --steps 2 --lr 0 --val-fraction 0 --checkpoint-dir none"
printf 'one.\n<|endoftext|>\ntwo.\n<|endoftext|>\nthree and some more of it.\n' > "$dir/marks"
good "across documents" "$train" --data "$dir/marks" $within --log "$dir/across.csv"
good "--within-documents" "$train" --data "$dir/marks" $within --within-documents --log "$dir/within.csv"
holds "--within-documents" "3.2% padding" "$dir/out"
good "--within-documents, words" "$train" --data "$dir/joined.npy" --tokenizer $tokenizer --within-documents --batch 1 \
    --seq-len 16 $tiny --steps 2 --val-fraction 0 --checkpoint-dir none
bad "never predicts across" "$train" --data "$dir/marks" $within --within-documents --carry-state

# ---------------------------------------------------------------------------------------------------------------------
# Fine-tuning: the loss of the responses falls, the run resumes bit for bit.

i=0
while [ $i -lt 40 ]; do
    printf '{"prompt": "What is %d?\\n", "response": "It is a number."}\n' $i
    i=$((i + 1))
done > "$dir/qa.jsonl"
qa="--data $dir/qa.jsonl --batch 4"
tune="$qa --lr 0.01 --warmup 2 --steps 30"
good "a byte model to start from" "$train" --data "$dir/stories.txt" --batch 2 --seq-len 24 $tiny --steps 4 \
    --checkpoint-dir "$dir/base"
good "fine-tune" "$train" --init "$dir/base" $tune --checkpoint-dir "$dir/tuned" --save-every 15 --log "$dir/t.csv"
for text in "38 examples to train on, 2 held out" "--seq-len 39" "% padding" "bits/byte" "3.16 times"; do
    holds "fine-tune" "$text" "$dir/out"
done
if awk -F, 'NR == 2 { first = $3 } END { exit !(first > 2 && $3 < first / 2 && $4 < first / 2) }' "$dir/t.csv"; then ok
else fail "fine-tune: the loss of the responses does not fall: $(losses "$dir/t.csv" | tr '\n' ' ')"; fi
good "resume" "$train" --resume "$dir/tuned/step-00000015" --checkpoint-dir "$dir/tuned2" --threads 1
same "30 steps = 15 + 15" "$dir/tuned/step-00000030/model.safetensors" "$dir/tuned2/step-00000030/model.safetensors"
good "ask" "$generate" --checkpoint "$dir/tuned" --prompt "What is 7?
" --stop '<|endoftext|>' --temperature 0 --max-tokens 60
good "the tokenizer's words" "$train" --init "$dir/a" $tune --val "$dir/qa.jsonl" --checkpoint-dir "$dir/tuned3"
same "and its file" $tokenizer "$dir/tuned3/step-00000030/tokenizer.json"
good "no mark" "$train" --init "$dir/base" $qa --document-separator none --steps 1 --checkpoint-dir none
holds "no mark" "--seq-len 26" "$dir/out"
good "longer rows" "$train" --init "$dir/base" $qa --seq-len 100 --steps 1 --checkpoint-dir none

# ---------------------------------------------------------------------------------------------------------------------
# What must be refused.

bad "is text, but the model reads the tokens" "$train" --data "$dir/stories.txt" --tokenizer $tokenizer --checkpoint-dir none
bad "is text, but the model reads the tokens" "$evaluate" --checkpoint "$dir/a" --data "$dir/stories.txt"
bad "--tokenizer and --resume exclude" "$train" --resume "$dir/a" --tokenizer $tokenizer
bad "the model knows only 256" "$train" --init "$dir/base" --tokenizer $tokenizer --data "$dir/stories.npy" \
    --checkpoint-dir none
bad "the model knows only 2000" "$train" $words --vocab-size 2000 --checkpoint-dir none
bad "is not the tokenizer that the model" "$generate" --checkpoint "$dir/a" --tokenizer "$dir/other.json" --max-tokens 1
bad "is not the tokenizer that the model" "$evaluate" --checkpoint "$dir/a" --tokenizer "$dir/other.json" --data "$dir/two"
bad "is not the tokenizer that the model" "$train" --init "$dir/a" --tokenizer "$dir/other.json" --data "$dir/stories.npy" \
    --checkpoint-dir none
mkdir "$dir/lost"
cp "$dir/a/step-00000020/model.safetensors" "$dir/lost"
bad "there is no $dir/lost/tokenizer.json" "$generate" --checkpoint "$dir/lost/model.safetensors" --max-tokens 1
good "a tokenizer that is named" "$generate" --checkpoint "$dir/lost" --tokenizer $tokenizer --max-tokens 1
head -c 5000 $tokenizer > "$dir/lost/tokenizer.json"
bad "tokenizer.json: line" "$generate" --checkpoint "$dir/lost" --max-tokens 1
bad "cannot open" "$train" --data "$dir/stories.npy" --tokenizer "$dir/none.json" --checkpoint-dir none
# A token outside of the vocabulary is found before the first step, wherever it is.
encode "$dir/stories.txt" "$dir/bad.npy"
{ head -c -2 "$dir/bad.npy" 2> /dev/null || head -c $(($(wc -c < "$dir/bad.npy") - 2)) "$dir/bad.npy"; } > "$dir/cut.npy"
printf '\377\177' >> "$dir/cut.npy"
last=$((($(wc -c < "$dir/cut.npy") - 128) / 2 - 1))
bad "token $last is 32767, but the model knows only 0 to 2047" "$train" --data "$dir/cut.npy" --tokenizer $tokenizer \
    $tiny --batch 2 --seq-len 32 --checkpoint-dir none
bad "token $last is 32767" "$evaluate" --checkpoint "$dir/a" --data "$dir/cut.npy"
bad "tokenizer tells how many bytes" "$evaluate" --checkpoint "$dir/a" --data "$dir/two" --bytes-per-token 3
good "a model of unknown tokens" "$train" --data "$dir/stories.npy" $tiny --vocab-size 3000 --batch 1 --seq-len 16 \
    --steps 1 --checkpoint-dir "$dir/k"
bad "has 3000 tokens and there is no tokenizer.json" "$generate" --checkpoint "$dir/k"
bad "examples are text, but the model has 2048 tokens" "$train" --data "$dir/qa.jsonl" --vocab-size 2048 $tiny \
    --checkpoint-dir none
bad "no such token" "$train" --data "$dir/joined.npy" $carry --document-separator '<|end|>'
bad "0 to 2047" "$train" --data "$dir/joined.npy" $carry --document-separator 2048

bad "line 11: this example has 40 tokens, which need a --seq-len of 39" "$train" --init "$dir/base" $qa --seq-len 20 \
    --checkpoint-dir none
echo '{"prompt": "a"}' > "$dir/half.jsonl"
bad "line 1: expected" "$train" --data "$dir/half.jsonl" --checkpoint-dir none
head -n 5 "$dir/qa.jsonl" > "$dir/few.jsonl"
bad "too few to hold out" "$train" --data "$dir/few.jsonl" --checkpoint-dir none
bad "must be of one kind" "$train" --data "$dir/qa.jsonl" --val "$dir/stories.txt" --checkpoint-dir none
bad "must be of one kind" "$train" --data "$dir/stories.txt" --val "$dir/qa.jsonl" --checkpoint-dir none
bad "a row of its own" "$train" $tune --carry-state --checkpoint-dir none
bad "a row of its own" "$train" $tune --within-documents --checkpoint-dir none
bad "--tokens does not go with" "$train" --data "$dir/qa.jsonl" --tokens 100 --checkpoint-dir none
bad "holds examples, not a text" "$evaluate" --checkpoint "$dir/base" --data "$dir/qa.jsonl"
mkdir "$dir/mixed" && cp "$dir/qa.jsonl" "$dir/mixed"
bad "holds examples, not a text" "$train" --data "$dir/mixed" --checkpoint-dir none
cp "$dir/qa.jsonl" "$dir/changed.jsonl"
good "data that will change" "$train" --data "$dir/changed.jsonl" --batch 2 $tiny --steps 2 --save-every 1 \
    --checkpoint-dir "$dir/n"
sed 's/number/letter/' "$dir/qa.jsonl" > "$dir/changed.jsonl"
bad "has changed since the checkpoint" "$train" --resume "$dir/n/step-00000001"

finish test_words
