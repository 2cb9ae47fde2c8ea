#!/bin/sh
# test_evaluate.sh - evaluate as a user meets it: its tables, its files, and every kind of bad input. What the numbers
# mean is the matter of test_evaluation.c.

. tests/cli.sh
evaluate=$bin/evaluate

# column MEASURE NAME NUMBER FILE: a field of the row of a measure with this name; "loss" is the sixth
column() {
    awk -F, -v m="$1" -v n="\"$2\"" -v c="$3" '$1 == m && $2 == n { print $c }' "$4"
}
# near NAME A B: two numbers that are there and agree to 1e-4
near() {
    if awk -v a="$2" -v b="$3" 'BEGIN { exit !(a != "" && b != "" && a - b < 1e-4 && b - a < 1e-4) }'; then ok
    else fail "$1: \"$2\" and \"$3\""; fi
}

# A model that takes milliseconds, trained for a moment; texts of 6,700 and 1,900 bytes.
mkdir "$dir/texts"
i=0
while [ $i -lt 200 ]; do
    echo "The cat no. $i sat on the mat, again."
    i=$((i + 1))
done > "$dir/texts/a"
head -c 1900 "$dir/texts/a" > "$dir/texts/b"
good "train" "$bin/train" --data "$dir/texts/a" --batch 2 --seq-len 32 --steps 30 --lr 0.01 --num-layers 2 \
    --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 4 --chunk-size 16 --norm-num-groups 4 \
    --checkpoint-dir "$dir/model"
score="$evaluate --checkpoint $dir/model --data $dir/texts --backend cpu --block 256"

# ---------------------------------------------------------------------------------------------------------------------
# Measures.

good "--help" "$evaluate" --help
holds "--help" "--by-context" "$dir/out"
good "a folder" $score --csv "$dir/whole.csv"
for text in "perplexity" "bits/byte" "texts/a" "texts/b" "error"; do holds "a folder" "$text" "$dir/out"; done
holds "progress" "tok/s" "$dir/err"
loss=$(column total "$dir/texts" 6 "$dir/whole.csv")
# The total is the mean of both texts, weighted by their predictions.
near "files add up" "$loss" "$(awk -F, '$1 == "file" { n += $5; s += $5 * $6 } END { print s / n }' "$dir/whole.csv")"
near "perplexity" "$(column total "$dir/texts" 8 "$dir/whole.csv")" "$(awk -v l="$loss" 'BEGIN { print exp(l) }')"
near "bits per byte" "$(column total "$dir/texts" 9 "$dir/whole.csv")" \
    "$(awk -v l="$loss" 'BEGIN { print l / log(2) }')"
bytes=$(cat "$dir/texts/a" "$dir/texts/b" | wc -c)
if [ "$(column total "$dir/texts" 5 "$dir/whole.csv")" = $((bytes - 2)) ]; then ok; else fail "predictions"; fi

all="--by-context 16,64,1K,1M,all --by-position"
good "contexts and positions" $score $all --csv "$dir/1.csv" --plot "$dir/1.svg"
for text in "By context" "64" "1,024" "1,048,576" "beyond the longest" "By position" "reset costs"; do
    holds "contexts and positions" "$text" "$dir/out"
done
near "context 1M is the whole" "$(column context 1048576 6 "$dir/1.csv")" "$loss"
near "all is the whole" "$(column context all 6 "$dir/1.csv")" "$loss"
if [ "$(awk -F, '$1 == "context" { print $5 }' "$dir/1.csv" | sort -u)" = $((bytes - 2)) ]; then ok
else fail "contexts score the same predictions"; fi
# All but the first 16 predictions of each text stand in some bucket of positions: 0, 1, 2-3, 4-7, 8-15.
if [ "$(awk -F, '$1 == "position" && $2 !~ /"0-/ { n++; s += $5 } END { print n, s }' "$dir/1.csv")" = \
    "5 $((bytes - 2 - 32))" ]; then ok; else fail "positions"; fi
holds "the plot" "</svg>" "$dir/1.svg"
good "the same again" $score $all --csv "$dir/2.csv" --plot "$dir/2.svg"
for ending in csv svg; do
    if cmp -s "$dir/1.$ending" "$dir/2.$ending"; then ok; else fail "two runs differ: $ending"; fi
done
good "another shape" $score $all --csv "$dir/3.csv" --batch 7 --read-size 33 --threads 1
for name in 16 64 1024 all; do
    near "rows and read size, context $name" "$(column context $name 6 "$dir/3.csv")" \
        "$(column context $name 6 "$dir/1.csv")"
done
near "and their errors" "$(column context 64 12 "$dir/3.csv")" "$(column context 64 12 "$dir/1.csv")"

good "--limit" $score --limit 100 --csv "$dir/4.csv"
if [ "$(column total "$dir/texts" 5 "$dir/4.csv")" = 198 ]; then ok; else fail "--limit"; fi
good "--files" $score --files 1 --csv "$dir/5.csv"
near "--files" "$(column total "$dir/texts" 6 "$dir/5.csv")" "$(column file "$dir/texts/a" 6 "$dir/whole.csv")"
# Four tokens of 16 bits, 0 to 3; the model knows 256.
{
    printf '\223NUMPY\001\000\076\000'
    printf '%-61s\n' "{'descr': '<u2', 'fortran_order': False, 'shape': (4,), }"
    printf '\000\000\001\000\002\000\003\000'
} > "$dir/tokens.npy"
tokens="$evaluate --checkpoint $dir/model --data $dir/tokens.npy"
good "token files" $tokens --csv "$dir/6.csv"
if grep -q "bits/byte" "$dir/out"; then fail "tokens are not bytes"; else ok; fi
loss=$(column total "$dir/tokens.npy" 6 "$dir/6.csv")
good "--bytes-per-token" $tokens --bytes-per-token 2.5 --csv "$dir/6.csv"
near "--bytes-per-token" "$(column total "$dir/tokens.npy" 9 "$dir/6.csv")" \
    "$(awk -v l="$loss" 'BEGIN { print l / log(2) / 2.5 }')"
good "--cema" "$evaluate" --checkpoint "$dir/model" --cema --csv "$dir/cema.csv"
for text in "Memory" "Period" "median" "longest" "####"; do holds "--cema" "$text" "$dir/out"; done
if [ "$(wc -l < "$dir/cema.csv")" -eq 7 ]; then ok; else fail "--cema: expected a header and 6 rows"; fi
if awk -F, 'NR > 1 { n = 0; for (i = 7; i <= NF; i++) n += $i; if (n != $3) exit 1 }' "$dir/cema.csv"; then ok
else fail "--cema: bins do not add up"; fi

# ---------------------------------------------------------------------------------------------------------------------
# Bad input.

printf x > "$dir/one"
: > "$dir/empty"
bad "--data is missing" "$evaluate" --checkpoint "$dir/model"
bad "train a model first" "$evaluate" --checkpoint "$dir/none" --data "$dir/texts"
bad "cannot be opened" "$evaluate" --checkpoint "$dir/model" --data "$dir/none"
bad "is empty" "$evaluate" --checkpoint "$dir/model" --data "$dir/empty"
bad "fewer than two tokens" "$evaluate" --checkpoint "$dir/model" --data "$dir/one"
bad "holds no checkpoint" "$evaluate" --checkpoint "$dir/texts" --data "$dir/texts"
for list in "" "1K,,2K" "1K," "0" "x" "1G" "99999999999999999999" "-5" "1.5K"; do
    bad "--by-context" $score "--by-context=$list"
done
bad "larger than the one before" $score --by-context 4K,1K
bad "larger than the one before" $score --by-context 1K,1024
bad "--plot draws" $score --plot "$dir/p.svg"
bad "all alone" $score --by-context all --plot "$dir/p.svg"
bad "does not go with --cema" "$evaluate" --checkpoint "$dir/model" --cema --data "$dir/texts"
bad "does not go with --cema" "$evaluate" --checkpoint "$dir/model" --cema --by-position
bad "is for token files" $score --bytes-per-token 3
bad "leaves nothing" $score --limit 1
bad "chunks after the first" $score --by-position --limit 10
bad "cannot be written" $score --csv "$dir/none/x.csv"
bad "cannot be written" $score --by-context 64 --plot "$dir/none/x.svg"
bad "needs a GPU" $score --precision bf16
bad "expected a whole number" $score --batch many
bad "did you mean" $score --by-contxt 1K
head -c 300 "$dir/model/step-00000030/model.safetensors" > "$dir/cut.safetensors"
bad "cut.safetensors" "$evaluate" --checkpoint "$dir/cut.safetensors" --data "$dir/texts"
bad "cut.safetensors" "$evaluate" --checkpoint "$dir/cut.safetensors" --cema
if [ -e /dev/full ]; then bad "cannot be written" "$evaluate" --checkpoint "$dir/model" --cema \
    --csv /dev/full; fi

finish test_evaluate
