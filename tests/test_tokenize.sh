#!/bin/sh
# test_tokenize.sh - what a user of ./tokenize meets: documents, folders, the way back, and bad input. Runs from the
# top folder; MEGALODON_BIN says where the programs are.

. tests/cli.sh
tokenize=$bin/tokenize
tokenizer=tests/tokenizer/tokenizer.json

# good TEXT ARGUMENTS...: status 0, and TEXT on stderr
good() {
    text=$1
    shift
    run "$tokenize" "$@"
    if [ $status -eq 0 ] && ! grep -q '^error' "$dir/err" && { [ -z "$text" ] || grep -qF -e "$text" "$dir/err"; }
    then ok; else fail "expected \"$text\": tokenize $*: status $status"; fi
}
# bad TEXT ARGUMENTS...: status 1, one line on stderr, an error with TEXT in it, and no new file
bad() {
    text=$1
    shift
    run "$tokenize" "$@"
    if [ $status -eq 1 ] && [ "$(wc -l < "$dir/err")" -eq 1 ] && grep -q '^error: ' "$dir/err" &&
        grep -qF -e "$text" "$dir/err" && [ ! -e "$dir/new.npy" ] && [ ! -e "$dir/new.npy.tmp" ]
    then ok; else fail "expected an error with \"$text\": tokenize $*: status $status"; fi
}
# same WANT FILE: the file has exactly the bytes that printf makes of WANT
same() {
    # shellcheck disable=SC2059
    printf "$1" > "$dir/want"
    if cmp -s "$dir/want" "$2"; then ok; else fail "$2: expected $1, found $(cat "$2")"; fi
}
encode() {
    wanted=$1
    shift
    good "$wanted" --tokenizer $tokenizer --out "$dir/ids.npy" --data "$@"
    good "" --tokenizer $tokenizer --decode "$dir/ids.npy" --out "$dir/text"
}

# Byte for byte: more than one buffer of text, with marks that become tokens; any bytes; a folder.
for i in 1 2 3 4; do cat data/tinystories_sample.txt; done > "$dir/large.txt"
encode "bytes a token" "$dir/large.txt" --exact
if cmp -s "$dir/large.txt" "$dir/text"; then ok; else fail "14 MB of stories came back changed"; fi
encode "bytes a token" tests/tokenizer/hard.txt --exact
if cmp -s tests/tokenizer/hard.txt "$dir/text"; then ok; else fail "the hard text came back changed"; fi
cmp -s tests/tokenizer/hard_gpt2.npy "$dir/ids.npy" && ok || fail "hard.txt: other bytes than numpy.save wrote"
head -c 300000 /dev/urandom > "$dir/noise"
encode "bytes a token" "$dir/noise" --exact
if cmp -s "$dir/noise" "$dir/text"; then ok; else fail "random bytes came back changed"; fi

# Documents: the mark takes the line breaks beside it, empty documents leave no trace, each file ends a document.
printf 'one\n<|endoftext|>\n\ntwo\r\n<|endoftext|>\r\n<|endoftext|>\n\nthree' > "$dir/a.txt"
encode "3 documents" "$dir/a.txt"
same 'one<|endoftext|>\ntwo<|endoftext|>\nthree<|endoftext|>' "$dir/text"
mkdir "$dir/folder"
printf 'first\n' > "$dir/folder/1"
printf 'second\n<|endoftext|>\n' > "$dir/folder/2"
printf '<|endoftext|>third' > "$dir/folder/3"
encode "3 documents" "$dir/folder"
same 'first<|endoftext|>second<|endoftext|>third<|endoftext|>' "$dir/text"
encode "220 documents" data/tinystories_valid.txt
good "" --tokenizer $tokenizer --decode "$dir/ids.npy" --out -
cmp -s "$dir/out" "$dir/text" && ok || fail "--out - writes another text"

# JSONL: each line is a document; without a tokenizer its texts alone are written.
printf '{"text": "one\\n"}\r\n\n{"text": "two \\u00e9<|endoftext|>three"}\n {"text": ""}\n{"text":"four"}' > "$dir/lines.jsonl"
encode "4 documents" "$dir/lines.jsonl"
same 'one<|endoftext|>two \303\251<|endoftext|>three<|endoftext|>four<|endoftext|>' "$dir/text"
good "3 documents" --data "$dir/lines.jsonl" --out "$dir/lines.txt"
same 'one\n<|endoftext|>\ntwo \303\251<|endoftext|>three\n<|endoftext|>\nfour\n<|endoftext|>\n' "$dir/lines.txt"
printf '{"text": "one"}\n{"text": 2}\n' > "$dir/bad.jsonl"
bad "line 2: expected {" --tokenizer $tokenizer --data "$dir/bad.jsonl" --out "$dir/new.npy"
printf '{"text": "one"}\nx\n' > "$dir/bad.jsonl"
bad "line 2: column 1: expected a value" --tokenizer $tokenizer --data "$dir/bad.jsonl" --out "$dir/new.npy"
printf '{"prompt": "one", "response": "two"}\n' > "$dir/bad.jsonl"
bad "a response is no text" --tokenizer $tokenizer --data "$dir/bad.jsonl" --out "$dir/new.npy"
bad "--exact does not go with" --tokenizer $tokenizer --data "$dir/lines.jsonl" --out "$dir/new.npy" --exact
bad "without --tokenizer" --data "$dir/lines.jsonl" --out "$dir/new.npy"

bad "--tokenizer is missing" --data "$dir/a.txt" --out "$dir/new.npy"
bad "either --data" --tokenizer $tokenizer --out "$dir/new.npy"
bad "either --data" --tokenizer $tokenizer --data a --decode b.npy --out "$dir/new.npy"
bad "--out is missing" --tokenizer $tokenizer --data "$dir/a.txt"
bad "must end in .npy" --tokenizer $tokenizer --data "$dir/a.txt" --out "$dir/new.txt"
bad "expected a .npy file" --tokenizer $tokenizer --decode "$dir/a.txt" --out "$dir/new.txt"
bad "cannot open" --tokenizer "$dir/absent.json" --data "$dir/a.txt" --out "$dir/new.npy"
bad "line 1, column 1" --tokenizer "$dir/a.txt" --data "$dir/a.txt" --out "$dir/new.npy"
bad "cannot be opened" --tokenizer $tokenizer --data "$dir/absent" --out "$dir/new.npy"
bad "holds tokens already" --tokenizer $tokenizer --data tests/tokenizer/hard_gpt2.npy --out "$dir/new.npy"
bad "no special token of this name" --tokenizer $tokenizer --data "$dir/a.txt" --end '</s>' --out "$dir/new.npy"
bad "cannot be written" --tokenizer $tokenizer --data "$dir/a.txt" --out "$dir/absent/new.npy"
bad "unknown option" --tokenizer $tokenizer --dada "$dir/a.txt" --out "$dir/new.npy"
# A token that this tokenizer does not have: the ids of a larger vocabulary.
bad "token" --tokenizer $tokenizer --decode tests/tokenizer/hard_added.npy --out "$dir/new.npy"

finish test_tokenize
