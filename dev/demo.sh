#!/bin/sh
# demo.sh - what `make demo` runs: trains a small model on TinyStories, tells its held-out loss, lets it write a story.
#
# About three minutes on two CPU cores, the build included. Everything that it writes is in build/demo; the model stays
# there for ./generate --checkpoint build/demo.
set -e
bin=${MEGALODON_BIN:-.}
dir=build/demo

rm -rf "$dir"
"$bin/train" --data data/tinystories_sample.txt --val data/tinystories_valid.txt --preset demo \
    --batch 4 --seq-len 256 --steps 900 --lr 0.004 --warmup 50 --min-lr-ratio 0.02 \
    --eval-every 300 --eval-batches 32 --checkpoint-dir "$dir" --log "build/demo.csv"
echo
"$bin/generate" --checkpoint "$dir" --prompt "Once upon a time" --max-tokens 800 --temperature 0.7 --stop '<|endoftext|>' --seed 7
echo
echo "Try another one: ./generate --checkpoint build/demo --prompt 'The little dog' --seed 8"
