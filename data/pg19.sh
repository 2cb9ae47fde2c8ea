#!/bin/sh
# data/pg19.sh - PG-19: 28,752 books of Project Gutenberg that were published before 1919.
#
#     sh data/pg19.sh --books 500
#
# The official split. One book is one file and one document: train/, val/ and test/ are folders, which ./train takes as
# they are. Carriage returns are dropped and nothing else. The texts are in the public domain in the USA; the collection
# has the Apache License 2.0.

name=pg19
about='Downloads PG-19 (Rae and others, 2019): 28,602 books to train on, 50 and 100 held out, 11 GB.'
more_options='  --books N          only the first N books to train on [28602]
'
books=28602
option() {
    [ "$1" = --books ] || return 1
    books=$2
    case $books in '' | *[!0-9]* | 0) die "--books: expected a whole number from 1 on, found \"$books\"" ;; esac
}
. "$(dirname "$0")/lib.sh"
options "$@"

lists=https://huggingface.co/datasets/deepmind/pg19/resolve/4d28bd77e66947ad3835cf78ed7aaeb4dd87ad8b/data
home=https://storage.googleapis.com/deepmind-gutenberg
at_once=16                                   # downloads side by side

# list_of SPLIT: sets $list to a file of names such as train/10005.txt
list_of() {
    list=$out/download/$1_files.txt
    [ ! -f "$list" ] || return 0
    case $1 in
    train) sum=145b5f0896cc2fff3231222874a0f324ee04559144ecf25a873d294eb161719c ;;
    validation) sum=e66d9f76a39a7a73a62270e98395c9532d306ecd2b7a10ae4098dcdd133d179b ;;
    test) sum=c84c08139695f3312df83239a1a41e7b9cde1baf7c08bfcf230ae09eaaf18d8c ;;
    esac
    if [ -d "$source/$1" ]; then                             # a folder of books needs no list
        mkdir -p "$out/download"
        (cd "$source" && find "$1/" -name '*.txt' | sort) > "$list.tmp"
        mv "$list.tmp" "$list"
        [ -s "$list" ] || die "--source $source/$1: holds no .txt files"
    else
        fetch "$1_files.txt" $sum "$lists/$1_files.txt"
        list=$file
    fi
}

# download FOLDER: the books that the file `next` names, several at a time; where that fails, one by one, which tells
# what is wrong. Each is $download/NAME.part then.
download() {
    while read -r book; do
        printf 'url = "%s/%s"\noutput = "%s/%s.part"\n' "${source:-$home}" "$book" "$download" "${book##*/}"
    done < "$download/next" > "$download/batch"
    curl --parallel --parallel-max $at_once --silent --fail --location --connect-timeout 20 --retry 3 \
        --config "$download/batch" 2> /dev/null && return 0
    while read -r book; do
        curl_to "$download/${book##*/}.part" "${source:-$home}/$book" ||
            die "$book could not be downloaded from ${source:-$home}: $reason; run this again to go on, or put the books" \
                "into a folder and name that by --source"
    done < "$download/next"
}

# split NAME FOLDER COUNT: the first COUNT books of a split
split() {
    list_of "$1"
    mkdir -p "$out/$2" "$download"
    head -n "$3" "$list" > "$download/wanted"
    while read -r book; do
        [ -f "$out/$2/${book##*/}" ] || printf '%s\n' "$book"
    done < "$download/wanted" > "$download/missing"
    total=$(($(wc -l < "$download/missing"))) first=1
    while [ $first -le $total ]; do
        bar $first $total "$2: $total books"
        sed -n "$first,$((first + 4 * at_once - 1))p" "$download/missing" > "$download/next"
        [ $remote = no ] || download
        while read -r book; do
            own=${book##*/} from=$download/${book##*/}.part
            [ $remote = yes ] || from=$source/$book
            [ -f "$from" ] || die "--source $source: has no $book"
            tr -d '\r' < "$from" > "$out/$2/.$own" && mv "$out/$2/.$own" "$out/$2/$own"
            [ $remote = no ] || rm -f "$from"
            made=$((made + 1))
        done < "$download/next"
        first=$((first + 4 * at_once))
    done
    clear_bar
    rm -f "$download/wanted" "$download/missing" "$download/next" "$download/batch"
}

download=$out/download remote=yes
case $source in '' | *://*) ;; *) remote=no ;; esac
recipe "pg19 books $books${source:+ from $source}"
split validation val 50
split test test 100
split train train "$books"
tokens train val test
finish train val test
