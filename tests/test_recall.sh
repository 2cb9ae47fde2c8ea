#!/bin/sh
# test_recall.sh - dev/recall.c on models that learn in a second, and its bad input. What the sequences are is the
# matter of test_recall.c, what larger models remember that of doc/recall.md.

. tests/cli.sh
recall=$build/recall
tiny="--num-layers 2 --model-dim 32 --z-dim 16 --value-dim 32 --ffn-hidden-dim 32 --cema-ndim 4 --chunk-size 32
      --norm-num-groups 4 --backend cpu"
model=$dir/model.safetensors

good "show" "$recall" show $tiny --facts 1,2 --distances 0,1
holds "show" "2 facts, 64 tokens, chunks of 32" "$dir/out"
good "train" "$recall" train $tiny --facts 1,2 --distances 0,1 --letters 1 --steps 40 --batch 4 --out "$model"
holds "train" "saved $model" "$dir/out"
good "test" "$recall" test --backend cpu --checkpoint "$model" --facts 1,2 --distances 0,1,3 --letters 1 \
    --questions 15 --batch 4 --csv "$dir/csv"
# Fifteen sequences of one fact; and of two facts eight, which is one question more.
asked=$(awk -F, 'NR > 1 { n += $5 } END { print n }' "$dir/csv")
if [ "$asked" = 31 ]; then ok; else fail "$asked questions were counted, expected 31"; fi
# No answer is both right and mixed up with another, and one fact cannot be mixed up.
odd=$(awk -F, 'NR > 1 && ($6 + $7 > $5 || ($2 == 1 && $7 > 0))' "$dir/csv" | wc -l)
if [ "$odd" = 0 ]; then ok; else fail "$odd lines of the counts contradict themselves"; fi
# The table tells of every distance and number of hops that was asked for.
good "hops" "$recall" test --backend cpu --checkpoint "$model" --task hops --hops 5 --facts 1 --distances 0,1 \
    --letters 1 --questions 80 --batch 4 --csv "$dir/csv"
for hops in 1 2 3 4 5; do
    told=$(grep "^ *$hops hop" "$dir/out" | tr -cd % | wc -c)
    asked=$(awk -F, -v hops=$hops '$3 == hops' "$dir/csv" | wc -l)
    if [ "$told" = 2 ] && [ "$asked" = 2 ]; then ok; else fail "$hops hops: $told shares of $asked distances"; fi
done
good "init" "$recall" train --backend cpu --init "$model" --facts 1 --distances 0 --steps 2 --batch 2 --out "$dir/b"
good "spread" "$recall" train $tiny --cema-init spread --cema-decay false --facts 1 --distances 0 --steps 2 \
    --batch 2 --out "$dir/c"
# The distances join one after the other: the second after a quarter of the steps, for every second step. Long sequences
# come with fewer rows: 12 steps of 4 x 32 tokens and 8 of 2 x 64.
good "grow" "$recall" train $tiny --cema-init hold --cema-memory 64 --facts 1,2 --distances 0,1 --steps 20 --batch 4 \
    --step-tokens 128 --grow 0.5 --out "$dir/d"
holds "grow" "2,560 tokens" "$dir/out"
if [ "$(awk '$3 == "-"' "$dir/out" | wc -l)" = 5 ]; then ok; else fail "the second distance did not join after step 5"; fi
yes "It was the best of times, it was the worst of times." | head -n 200 > "$dir/hay"
good "needle" "$recall" show $tiny --task needle --haystack "$dir/hay" --distances 0,2
holds "needle" "best of times" "$dir/out"

bad "found \"\"" "$recall"
bad "found \"learn\"" "$recall" learn
bad "use fewer facts or a longer --unit" "$recall" show $tiny --facts 20 --distances 0
bad "a sequence with a question 1 chunks away has 64 tokens" "$recall" train $tiny --facts 1 --distances 0,1 \
    --step-tokens 40 --out "$dir/none"
bad "use fewer facts or a longer --unit" "$recall" train $tiny --facts 4 --distances 0,1 --out "$dir/none"
bad "ascending whole numbers" "$recall" show $tiny --distances 4,1
bad "ascending whole numbers" "$recall" show $tiny --facts 1,,2
bad "ascending whole numbers" "$recall" show $tiny --facts 0
bad "does nothing without --task hops" "$recall" show $tiny --hops 2
bad "too many" "$recall" show $tiny --letters 1 --facts 6
bad "does nothing with --task needle" "$recall" show $tiny --task needle --facts 2
bad "cannot be read" "$recall" show $tiny --haystack "$dir/none"
bad "the model is that of" "$recall" test --checkpoint "$model" --num-layers 3
bad "needs the bytes below 128" "$recall" show $tiny --facts 1 --vocab-size 100

finish test_recall
