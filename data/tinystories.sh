#!/bin/sh
# data/tinystories.sh - TinyStories: two million short stories in the words of a small child.
#
#     sh data/tinystories.sh
#
# The official split. Cleaning leaves one line <|endoftext|> after each story and drops empty stories and runs of empty
# lines. Licence of the data: CDLA-Sharing-1.0 (data/LICENSE-CDLA-Sharing-1.0.txt).

name=tinystories
about='Downloads TinyStories (Eldan and Li, 2023): 1.9 GB of stories to train on, 19 MB held out.'
more_options='  --version 1|2      1: the stories of GPT-3.5 and GPT-4; 2: of GPT-4 alone (2.2 GB) [1]
'
version=1
option() {
    [ "$1" = --version ] || return 1
    version=$2
    case $version in 1 | 2) ;; *) die "--version: expected 1 or 2, found \"$version\"" ;; esac
}
. "$(dirname "$0")/lib.sh"
options "$@"

home=https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main
if [ "$version" = 1 ]; then
    train=TinyStories-train.txt train_sum=c5cf5e22ff13614e830afbe61a99fbcbe8bcb7dd72252b989fa1117a368d401f
    val=TinyStories-valid.txt val_sum=94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4
else
    train=TinyStoriesV2-GPT4-train.txt train_sum=6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443
    val=TinyStoriesV2-GPT4-valid.txt val_sum=6874bae9a4c1a4e7edcf0e53b86c17817e9cf881fc75ff2368da457b80c0585d
fi

recipe "tinystories version $version${source:+ from $source}"
if [ ! -f "$out/val.txt" ]; then
    fetch $val $val_sum $home/$val
    produce "$out/val.txt" "$(size "$file")" with_marks "$file"
fi
if [ ! -f "$out/train.txt" ]; then
    fetch $train $train_sum $home/$train
    produce "$out/train.txt" "$(size "$file")" with_marks "$file"
fi
tokens train val
finish train val
