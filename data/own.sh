#!/bin/sh
# data/own.sh - a folder of one's own text, or JSONL, made ready for training.
#
#     sh data/own.sh --source my_texts --name mine
#     sh data/own.sh --source questions.jsonl --name questions
#
# Every file of the folder, and of the folders in it, is a document; so is what stands between lines <|endoftext|> in
# one. Cleaned: carriage returns, control characters, white space at the ends of lines, runs of empty lines. Files that
# are not text and files that are the same as one before are left out, and so are names that start with a dot. One
# document of twenty is held out; of fewer than twenty documents the last twentieth of the text is.
#
# In a .jsonl file each line is {"text": ...}, a document, or {"prompt": ..., "response": ...}, an example for
# fine-tuning. Examples go to train.jsonl and val.jsonl, which ./train reads as they are; one of twenty is held out.

name=own
about='Makes a folder of your own text, or a file of JSONL, ready for training.'
more_options='  --name NAME        what to call it: the files go to data/NAME [own]
'
option() {
    [ "$1" = --name ] || return 1
    case $2 in */* | .*) die "--name: expected a plain name, found \"$2\"" ;; esac
    given_name=$2
}
given_name=
. "$(dirname "$0")/lib.sh"
options "$@"
[ -n "$source" ] || die "--source is missing; name a folder of text, a text file, or a .jsonl file"
case $source in *://*) die "--source $source: expected a folder or a file on this machine" ;; esac
[ -z "$given_name" ] || [ "$out" != "$top/data/$name" ] || out=$top/data/$given_name
parts=$out/parts                             # what is made on the way

# is_text FILE: has it no zero byte among the first ones?
is_text() {
    [ $(($(head -c 8192 "$1" | wc -c))) -eq $(($(head -c 8192 "$1" | tr -d '\000' | wc -c))) ]
}
# seen FILE: is it the same as one before? Files are compared only where their checksums agree.
seen() {
    key=$(cksum < "$1" | tr ' ' '-')
    if [ -f "$parts/seen/$key" ] && cmp -s "$1" "$(cat "$parts/seen/$key")"; then return 0; fi
    printf '%s\n' "$1" > "$parts/seen/$key"
    return 1
}

# Goes through the files, and writes documents and examples, each kind into one file.
collect() {
    rm -rf "$parts"
    mkdir -p "$parts/seen"
    : > "$parts/documents"
    : > "$parts/examples"
    find "$source" -type f ! -path "$source/*/.*" ! -path "$source/.*" | sort > "$parts/files"
    total=$(($(wc -l < "$parts/files"))) so_far=0 skipped=0 doubles=0
    while IFS= read -r path; do
        so_far=$((so_far + 1))
        bar $so_far $total "${path##*/}"
        if ! is_text "$path"; then
            skipped=$((skipped + 1))
        elif seen "$path"; then
            doubles=$((doubles + 1))
        else
            case $path in
            *.jsonl)
                if grep -v '^[[:space:]]*$' "$path" | head -n 1 | grep -q '"response"'; then
                    grep -v '^[[:space:]]*$' "$path" >> "$parts/examples"
                else
                    [ -x "$tokenize" ] || die "$tokenize reads .jsonl files and is not built; run make first"
                    "$tokenize" --data "$path" --out "$parts/lines.txt" 2> "$parts/log" || die "$(cat "$parts/log")"
                    with_marks "$parts/lines.txt" >> "$parts/documents"
                fi
                ;;
            *) with_marks "$path" >> "$parts/documents" ;;
            esac
        fi
    done < "$parts/files"
    clear_bar
    say "$source: $total files; left out: $skipped that are no text, $doubles that are there twice"
    [ -s "$parts/documents" ] || [ -s "$parts/examples" ] || die "--source $source: holds no text"
}

# documents KEEP: the documents whose number modulo 20 is 0 (KEEP = 1) or is not (KEEP = 0)
documents() {
    awk -v mark="$mark" -v keep="$1" '{ if ((number % 20 == 19) == keep) print; if ($0 == mark) number++ }' \
        "$parts/documents"
}
divide_documents() {
    [ -s "$parts/documents" ] || return 0
    total=$(size "$parts/documents")
    count=$(grep -cxF "$mark" "$parts/documents" || true)
    if [ "$count" -ge 20 ]; then
        produce "$out/val.txt" $((total / 20)) documents 1
        produce "$out/train.txt" $((total - total / 20)) documents 0
    else
        produce "$out/val.txt" $((total / 20)) tail -c $((total / 20)) "$parts/documents"
        produce "$out/train.txt" $((total - total / 20)) head -c $((total - total / 20)) "$parts/documents"
    fi
    say "$count documents, $total bytes"
}
# examples KEEP: likewise; the same line twice counts once. Fewer than twenty hold out the last one.
examples() {
    awk '!seen[$0]++' "$parts/examples" > "$parts/distinct"
    awk -v keep="$1" -v count="$(($(wc -l < "$parts/distinct")))" \
        '((count < 20 ? NR == count : NR % 20 == 0) ? 1 : 0) == keep' "$parts/distinct"
}
divide_examples() {
    [ -s "$parts/examples" ] || return 0
    produce "$out/val.jsonl" 0 examples 1
    produce "$out/train.jsonl" 0 examples 0
    say "$(($(wc -l < "$parts/distinct"))) examples"
}

recipe "own text from $source"
if [ ! -f "$out/DONE" ]; then
    rm -f "$out"/train.* "$out"/val.*
    collect
    divide_documents
    divide_examples
    rm -rf "$parts"
    : > "$out/DONE"
fi
if [ -f "$out/train.txt" ]; then tokens train val; fi
finish train val
