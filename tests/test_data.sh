#!/bin/sh
# test_data.sh - the scripts of data/: without a network, from small files made here. Downloads are tested with
# addresses of the form file://, which curl treats like others. Runs from the top folder; MEGALODON_BIN says where the
# programs are.

. tests/cli.sh
case $bin in /*) ;; *) bin=$(pwd)/$bin ;; esac
export MEGALODON_BIN="$bin"
tokenizer=tests/tokenizer/tokenizer.json
skipped=0

skip() {
    skipped=$((skipped + 1))
    echo "skip: $*"
}
# good NAME SCRIPT ARGUMENTS...: status 0 and no error
good() {
    what=$1
    shift
    run sh "$@"
    if [ $status -eq 0 ] && ! grep -q '^error' "$dir/err"; then ok; else fail "$what: status $status"; fi
}
# bad TEXT SCRIPT ARGUMENTS...: status 1 and an error with TEXT in it, as the last line
bad() {
    text=$1
    shift
    run sh "$@"
    if [ $status -eq 1 ] && tail -n 1 "$dir/err" | grep '^error: ' | grep -qF -e "$text"; then ok
    else fail "expected an error with \"$text\": $*: status $status"; fi
}
# is FILE TEXT: the file has exactly the bytes that printf makes of TEXT
is() {
    # shellcheck disable=SC2059
    printf "$2" > "$dir/want"
    if cmp -s "$dir/want" "$1"; then ok; else fail "$1: expected \"$2\", found \"$(cat "$1")\""; fi
}
# nothing_to_do NAME FOLDER SCRIPT ARGUMENTS...: a second run changes no file
nothing_to_do() {
    what=$1 folder=$2
    shift 2
    find "$folder" -type f -exec ls -li {} + > "$dir/before"
    good "$what again" "$@"
    holds "$what again" "nothing to do" "$dir/err"
    find "$folder" -type f -exec ls -li {} + > "$dir/after"
    same "$what again" "$dir/before" "$dir/after"
}

# ----------------------------------------------------------------------------------------------------------------------
# Options.

for script in tinystories wikitext2 wikitext103 enwik8 pg19 own; do
    good "$script --help" data/$script.sh --help
    holds "$script --help" "--source PLACE" "$dir/out"
    bad "unknown option --sauce" data/$script.sh --sauce x
    bad "unexpected argument" data/$script.sh x
    bad "--out needs a value" data/$script.sh --out
    bad "--out is empty" data/$script.sh --out=
    bad "neither a folder nor an address" data/$script.sh --source "$dir/none"
    bad "is not a file" data/$script.sh --tokenizer "$dir/none"
    bad "exclude each other" data/$script.sh --tokenizer $tokenizer --vocab-size 500
    bad "expected a whole number" data/$script.sh --vocab-size 5x
done
bad "expected 1 or 2" data/tinystories.sh --version 3
bad "expected yes or no" data/wikitext2.sh --words maybe
bad "from 1 on" data/pg19.sh --books 0
bad "--source is missing" data/own.sh
good "requests" data/requests.sh --out "$dir/requests"
if [ "$(cat "$dir"/requests/*.jsonl | wc -l)" -eq 446 ]; then ok; else fail "requests: $(wc -l "$dir"/requests/*)"; fi
bad "on this machine" data/own.sh --source http://127.0.0.1/x
bad "expected a plain name" data/own.sh --source data --name ../x

nothing_to_do "requests" "$dir/requests" data/requests.sh --out "$dir/requests"

# ----------------------------------------------------------------------------------------------------------------------
# TinyStories: cleaning, tokens, a second run, an interrupted one.

mkdir "$dir/ts"
{
    printf '\357\273\277<|endoftext|>\r\n\r\n\r\nOne  \r\n\r\n\r\n\r\ntwo\t\r\n\r\n<|endoftext|>\r\n'
    printf '<|endoftext|>\nthree\001\n<|endoftext|>four<|endoftext|>\n\n five \302\205\n'
} > "$dir/ts/TinyStories-train.txt"
printf 'held out\n<|endoftext|>\n' > "$dir/ts/TinyStories-valid.txt"
stories="data/tinystories.sh --source $dir/ts --out $dir/stories"
good "tinystories" $stories --tokenizer $tokenizer
is "$dir/stories/train.txt" \
    'One\n\ntwo\n<|endoftext|>\nthree\n<|endoftext|>\nfour\n<|endoftext|>\n five \302\205\n<|endoftext|>\n'
is "$dir/stories/val.txt" 'held out\n<|endoftext|>\n'
holds "tinystories" "is not the official file" "$dir/err"
holds "tinystories" "./train --data $dir/stories/train.npy --tokenizer $dir/stories/tokenizer.json" "$dir/out"
"$bin/tokenize" --tokenizer $tokenizer --decode "$dir/stories/train.npy" --out "$dir/text" 2> "$dir/err"
is "$dir/text" 'One\n\ntwo<|endoftext|>three<|endoftext|>four<|endoftext|> five \302\205<|endoftext|>'
nothing_to_do "tinystories" "$dir/stories" $stories --tokenizer $tokenizer
# A run that was killed left one file out, and another half written under its other name.
cp "$dir/stories/train.txt" "$dir/train.txt"
rm "$dir/stories/train.txt" "$dir/stories/val.npy"
printf 'One' > "$dir/stories/train.txt.tmp.999999"
good "after a kill" $stories --tokenizer $tokenizer
same "after a kill" "$dir/train.txt" "$dir/stories/train.txt"
if [ -f "$dir/stories/val.npy" ] && ! ls "$dir"/stories/*.tmp* > /dev/null 2>&1; then ok; else fail "after a kill: files"; fi
bad "was made as \"tinystories version 1" $stories --version 2
sed 's/,"merges"/, "merges"/' $tokenizer > "$dir/other.json"
bad "is another tokenizer" $stories --tokenizer "$dir/other.json"
rm "$dir/stories/train.txt"
: > "$dir/ts/TinyStories-train.txt"
good "an empty original" $stories
is "$dir/stories/train.txt" ''
rm "$dir/ts/TinyStories-train.txt" "$dir/stories/train.txt"
bad "has no TinyStories-train.txt" $stories

# ----------------------------------------------------------------------------------------------------------------------
# Downloads.

if command -v curl > /dev/null; then
    i=0
    while [ $i -lt 3000 ]; do
        echo "story $i"
        if [ $((i % 10)) -eq 9 ]; then echo '<|endoftext|>'; fi
        i=$((i + 1))
    done > "$dir/ts/TinyStories-train.txt"
    original=$dir/ts/TinyStories-train.txt
    size=$(wc -c < "$original")
    remote="data/tinystories.sh --source file://$dir/ts --out"
    good "a download" $remote "$dir/d1"
    same "a download" "$original" "$dir/d1/train.txt"
    if ls "$dir"/d1/download/*.part > /dev/null 2>&1; then fail "a download left its part"; else ok; fi
    rm -r "$dir/d1/download"
    nothing_to_do "a download" "$dir/d1" $remote "$dir/d1"
    # An interrupted download goes on where it stopped: the part is marked, to see it again in the result.
    mkdir -p "$dir/d2/download"
    { printf 'STORY'; head -c $((size / 2)) "$original" | tail -c +6; } > "$dir/d2/download/TinyStories-train.txt.part"
    good "a download that goes on" $remote "$dir/d2"
    { printf 'STORY'; tail -c +6 "$original"; } > "$dir/marked"
    same "a download that goes on" "$dir/marked" "$dir/d2/train.txt"
    # A part that is longer than the original, or just as long, is no part of it.
    for more in x ''; do
        rm -rf "$dir/d3"
        mkdir -p "$dir/d3/download"
        { cat "$original"; printf %s "$more"; } > "$dir/d3/download/TinyStories-train.txt.part"
        good "a part of ${more:-no} more" $remote "$dir/d3"
        same "a part of ${more:-no} more" "$original" "$dir/d3/train.txt"
    done
    bad "could not be downloaded; file://$dir/none/TinyStories-valid.txt: " data/tinystories.sh \
        --source "file://$dir/none" --out "$dir/d4"
    holds "no such file" "name that by --source" "$dir/err"
    bad "could not be downloaded; http://127.0.0.1:9/TinyStories-valid.txt: " data/tinystories.sh \
        --source http://127.0.0.1:9 --out "$dir/d4"
    if [ ! -f "$dir/d4/val.txt" ]; then ok; else fail "a failed download left a text"; fi

    # Checksums and other addresses: a script like those of data/, with files of its own.
    mkdir "$dir/data"
    cp data/lib.sh "$dir/data"
    sum=$(printf 'the file' | { sha256sum 2> /dev/null || shasum -a 256; } | sed 's/ .*//')
    printf 'the file' > "$dir/right"
    printf 'the flie' > "$dir/wrong"
    cat > "$dir/data/some.sh" << END
name=some
about='A test.'
. "$dir/data/lib.sh"
options "\$@"
recipe some
fetch some.txt $sum "file://$dir/\$FIRST" "file://$dir/\$SECOND"
produce "\$out/train.txt" 8 cat "\$file"
finish train
END
    export FIRST=right SECOND=none
    good "the first address" "$dir/data/some.sh" --out "$dir/s1"
    is "$dir/s1/train.txt" 'the file'
    FIRST=none SECOND=right
    good "the second address" "$dir/data/some.sh" --out "$dir/s2"
    is "$dir/s2/train.txt" 'the file'
    SECOND=none
    bad "$dir/none: " "$dir/data/some.sh" --out "$dir/s3"
    if [ "$(grep -o "file://" "$dir/err" | wc -l)" -ge 4 ]; then ok; else fail "both addresses are named"; fi
    FIRST=wrong SECOND=right
    bad "expected $sum; the download was damaged" "$dir/data/some.sh" --out "$dir/s4"
    if ls "$dir"/s4/download/* > /dev/null 2>&1; then fail "a damaged download is kept"; else ok; fi
    FIRST=right
    mkdir -p "$dir/s5/download"
    printf 'the f' > "$dir/s5/download/some.txt.part"
    good "a part and a checksum" "$dir/data/some.sh" --out "$dir/s5"
    is "$dir/s5/train.txt" 'the file'
    mkdir -p "$dir/s6/download"
    printf 'THE f' > "$dir/s6/download/some.txt.part"
    bad "expected $sum" "$dir/data/some.sh" --out "$dir/s6"
    good "and then from the start" "$dir/data/some.sh" --out "$dir/s6"
    is "$dir/s6/train.txt" 'the file'
else
    skip "downloads: curl is not installed"
fi

# ----------------------------------------------------------------------------------------------------------------------
# WikiText: from an archive and from files that are unpacked.

wikitext() {
    is "$1/train.txt" ' \n = First = \n \n Text of the first . \n = b ; c = \n and more . \n = e ; f = \n \n = = Part = = \n \n = g = \n h \n \n<|endoftext|>\n = Second thing = \n \n More , with \303\211 . \n'
    is "$1/val.txt" ' \n = Only = \n \n Held out . \n'
    is "$1/test.txt" ' \n = A = \n \n x \n \n<|endoftext|>\n = B = \n \n y \n \n<|endoftext|>\n = C = \n \n z \n'
}
if command -v unzip > /dev/null || command -v bsdtar > /dev/null || command -v python3 > /dev/null; then
    good "wikitext2" data/wikitext2.sh --source tests/data --out "$dir/w1"
    wikitext "$dir/w1"
    holds "wikitext2" "test.txt: 3 articles" "$dir/err"
    nothing_to_do "wikitext2" "$dir/w1" data/wikitext2.sh --source tests/data --out "$dir/w1"
    mkdir "$dir/damaged" "$dir/unpacked"
    head -c 300 tests/data/wikitext-2-raw-v1.zip > "$dir/damaged/wikitext-2-raw-v1.zip"
    bad "could not be made" data/wikitext2.sh --source "$dir/damaged" --out "$dir/w2"
    cp "$dir"/w1/download/*.raw "$dir/unpacked"
    good "wikitext103, unpacked" data/wikitext103.sh --source "$dir/unpacked" --out "$dir/w3"
    wikitext "$dir/w3"
    for split in train valid test; do mv "$dir/unpacked/wiki.$split.raw" "$dir/unpacked/wiki.$split.tokens"; done
    good "wikitext2, words" data/wikitext2.sh --words yes --source "$dir/unpacked" --out "$dir/w4"
    wikitext "$dir/w4"
    bad "has no wikitext-2-raw-v1.zip" data/wikitext2.sh --source "$dir/unpacked" --out "$dir/w5"
else
    skip "archives: neither unzip nor bsdtar nor python3 is installed"
fi

# ----------------------------------------------------------------------------------------------------------------------
# enwik8: every byte is in one of the three files, in order.

mkdir "$dir/e"
head -c 10007 data/tinystories_valid.txt > "$dir/e/enwik8"
good "enwik8" data/enwik8.sh --source "$dir/e" --out "$dir/enwik8"
cat "$dir/enwik8/train.txt" "$dir/enwik8/val.txt" "$dir/enwik8/test.txt" > "$dir/whole"
same "enwik8" "$dir/e/enwik8" "$dir/whole"
if [ "$(wc -c < "$dir/enwik8/val.txt")" -eq 500 ] && [ "$(wc -c < "$dir/enwik8/test.txt")" -eq 500 ]; then ok
else fail "enwik8: the parts"; fi
nothing_to_do "enwik8" "$dir/enwik8" data/enwik8.sh --source "$dir/e" --out "$dir/enwik8"
printf x > "$dir/e/enwik8"
bad "too few to divide" data/enwik8.sh --source "$dir/e" --out "$dir/enwik8.2"

# ----------------------------------------------------------------------------------------------------------------------
# PG-19: books of a folder and of an address.

mkdir -p "$dir/g/train" "$dir/g/validation" "$dir/g/test"
for i in 1 2 3 4 5; do printf 'Book %d\r\n\r\nText\n' $i > "$dir/g/train/$i.txt"; done
printf 'Held out\n' > "$dir/g/validation/7.txt"
printf 'Test\n' > "$dir/g/test/8.txt"
good "pg19" data/pg19.sh --source "$dir/g" --out "$dir/pg" --books 3 --tokenizer $tokenizer
if [ "$(ls "$dir/pg/train")" = "1.txt
2.txt
3.txt" ]; then ok; else fail "pg19 --books 3: $(ls "$dir/pg/train")"; fi
is "$dir/pg/train/2.txt" 'Book 2\n\nText\n'
"$bin/tokenize" --tokenizer $tokenizer --decode "$dir/pg/train.npy" --out "$dir/text" 2> "$dir/err"
is "$dir/text" 'Book 1\n\nText<|endoftext|>Book 2\n\nText<|endoftext|>Book 3\n\nText<|endoftext|>'
nothing_to_do "pg19" "$dir/pg" data/pg19.sh --source "$dir/g" --out "$dir/pg" --books 3 --tokenizer $tokenizer
good "a folder of books is data" -c "'$bin/train' --data '$dir/pg/train' --val-fraction 0 --batch 1 --seq-len 8 \
    --steps 1 --num-layers 1 --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 2 \
    --norm-num-groups 4 --checkpoint-dir none"
if command -v curl > /dev/null; then
    for split in train validation test; do
        (cd "$dir/g" && ls $split/*.txt) > "$dir/g/${split}_files.txt"
    done
    good "pg19, downloaded" data/pg19.sh --source "file://$dir/g" --out "$dir/pg2"
    if [ "$(ls "$dir/pg2/train" | wc -l)" -eq 5 ]; then ok; else fail "pg19, downloaded: $(ls "$dir/pg2/train")"; fi
    is "$dir/pg2/train/5.txt" 'Book 5\n\nText\n'
    # An interrupted run: two books are missing, and one of the others is marked, to see whether it is fetched again.
    printf 'mine' > "$dir/pg2/train/1.txt"
    rm "$dir/pg2/train/2.txt" "$dir/pg2/train/4.txt"
    good "pg19 goes on" data/pg19.sh --source "file://$dir/g" --out "$dir/pg2"
    is "$dir/pg2/train/1.txt" 'mine'
    is "$dir/pg2/train/4.txt" 'Book 4\n\nText\n'
    rm "$dir/pg2/train/3.txt" "$dir/pg2/train/4.txt" "$dir/g/train/4.txt"
    bad "train/4.txt could not be downloaded from file://$dir/g" data/pg19.sh --source "file://$dir/g" --out "$dir/pg2"
    printf 'Book 4 again\n' > "$dir/g/train/4.txt"
    good "pg19 goes on after an error" data/pg19.sh --source "file://$dir/g" --out "$dir/pg2"
    is "$dir/pg2/train/3.txt" 'Book 3\n\nText\n'
    is "$dir/pg2/train/4.txt" 'Book 4 again\n'
else
    skip "books: curl is not installed"
fi

# ----------------------------------------------------------------------------------------------------------------------
# One's own text.

mkdir -p "$dir/own/deep/er" "$dir/own/.git"
i=1
while [ $i -le 38 ]; do
    printf 'Document %d\r\n' $i > "$dir/own/deep/$(printf %02d $i) name.txt"
    i=$((i + 1))
done
printf 'Document 7\r\n' > "$dir/own/deep/er/the same as 7"
printf 'not\000text' > "$dir/own/picture.png"
printf 'secret' > "$dir/own/.hidden"
printf 'secret' > "$dir/own/.git/config"
printf '{"text": "From a line\\n"}\n\n{"text": "From \\"another\\""}\n' > "$dir/own/lines.jsonl"
good "own" data/own.sh --source "$dir/own" --out "$dir/o1" --tokenizer $tokenizer
holds "own" "left out: 1 that are no text, 1 that are there twice" "$dir/err"
holds "own" "40 documents" "$dir/err"
is "$dir/o1/val.txt" 'Document 20\n<|endoftext|>\nFrom "another"\n<|endoftext|>\n'
if [ "$(grep -cxF '<|endoftext|>' "$dir/o1/train.txt")" -eq 38 ]; then ok; else fail "own: $(cat "$dir/o1/train.txt")"; fi
if grep -q -e secret -e "Document 20" "$dir/o1/train.txt"; then fail "own: what does not belong there"; else ok; fi
if [ -f "$dir/o1/train.npy" ] && [ ! -d "$dir/o1/parts" ]; then ok; else fail "own: files"; fi
nothing_to_do "own" "$dir/o1" data/own.sh --source "$dir/own" --out "$dir/o1" --tokenizer $tokenizer
# A run that was killed between its files begins again.
cp "$dir/o1/train.txt" "$dir/want.txt"
rm "$dir/o1/DONE"
printf 'half' > "$dir/o1/train.txt"
good "own after a kill" data/own.sh --source "$dir/own" --out "$dir/o1"
same "own after a kill" "$dir/want.txt" "$dir/o1/train.txt"
# The command that is printed can be typed, whatever the folder is called.
good "a strange name" data/own.sh --source "$dir/own" --out "$dir/it's mine" --tokenizer $tokenizer
eval "printf '%s\\n' $(tail -n 1 "$dir/out")" > "$dir/words"
printf '%s\n' ./train --data "$dir/it's mine/train.npy" --tokenizer "$dir/it's mine/tokenizer.json" \
    --val "$dir/it's mine/val.npy" --checkpoint-dir "runs/it's mine" > "$dir/want"
same "a strange name" "$dir/want" "$dir/words"
# A single file: the end of it is held out.
head -c 5000 data/tinystories_valid.txt > "$dir/one.txt"
good "own, one file" data/own.sh --source "$dir/one.txt" --out "$dir/o2"
cat "$dir/o2/train.txt" "$dir/o2/val.txt" > "$dir/whole"
head -c 5000 "$dir/whole" > "$dir/begin"
same "own, one file" "$dir/one.txt" "$dir/begin"
if [ "$(wc -c < "$dir/o2/val.txt")" -eq 250 ]; then ok; else fail "own, one file: $(wc -c < "$dir/o2/val.txt") held out"; fi
# Examples.
i=1
while [ $i -le 45 ]; do
    printf '{"prompt": "Question %d\\n", "response": "Answer"}\n' $i
    if [ $((i % 9)) -eq 0 ]; then printf '\n{"prompt": "Question 1\\n", "response": "Answer"}\n'; fi
    i=$((i + 1))
done > "$dir/qa.jsonl"
good "own, examples" data/own.sh --source "$dir/qa.jsonl" --out "$dir/o3"
holds "own, examples" "45 examples" "$dir/err"
holds "own, examples" "./train --data $dir/o3/train.jsonl --val $dir/o3/val.jsonl" "$dir/out"
is "$dir/o3/val.jsonl" '{"prompt": "Question 20\\n", "response": "Answer"}\n{"prompt": "Question 40\\n", "response": "Answer"}\n'
if [ "$(wc -l < "$dir/o3/train.jsonl")" -eq 43 ]; then ok; else fail "own, examples: $(wc -l < "$dir/o3/train.jsonl")"; fi
good "examples are data" -c "'$bin/train' --data '$dir/o3/train.jsonl' --val '$dir/o3/val.jsonl' --batch 1 --steps 1 \
    --num-layers 1 --model-dim 16 --z-dim 8 --value-dim 16 --ffn-hidden-dim 16 --cema-ndim 2 --norm-num-groups 4 \
    --checkpoint-dir none"
printf '{"txt": "wrong"}\n' > "$dir/wrong.jsonl"
bad "line 1: expected {\"text\"" data/own.sh --source "$dir/wrong.jsonl" --out "$dir/o4"
mkdir "$dir/nothing"
bad "holds no text" data/own.sh --source "$dir/nothing" --out "$dir/o5"

[ $skipped -eq 0 ] || more=", $skipped skipped"
echo "test_data: $passed passed, $failed failed${more:-}"
[ "$failed" -eq 0 ]
