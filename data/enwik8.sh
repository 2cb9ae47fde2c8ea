#!/bin/sh
# data/enwik8.sh - enwik8: the first 100 million bytes of a dump of the English Wikipedia of 2006.
#
#     sh data/enwik8.sh
#
# The customary split: 90 million bytes to train on, 5 million and 5 million held out, cut where these numbers fall.
# Nothing is cleaned and nothing is marked; results on enwik8 are bits per byte of the XML as it is. A shorter file (by
# --source) is divided in the same proportions. Licence of the data: GFDL and CC BY-SA 3.0.

name=enwik8
about='Downloads enwik8 (Mahoney): 90 MB of Wikipedia as XML to train on, 5 MB and 5 MB held out.'
. "$(dirname "$0")/lib.sh"
options "$@"

recipe "enwik8${source:+ from $source}"
if [ ! -f "$out/train.txt" ] || [ ! -f "$out/val.txt" ] || [ ! -f "$out/test.txt" ]; then
    sum=2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8
    if [ -n "$source" ] && [ -f "$source/enwik8" ]; then
        file=$source/enwik8
    else
        fetch enwik8.zip '' http://mattmahoney.net/dc/enwik8.zip https://data.deepai.org/enwik8.zip
        produce "$out/download/enwik8" 100000000 member "$file" enwik8
        file=$out/download/enwik8
    fi
    check_sum "$file" $sum "$file"
    total=$(size "$file")
    held=$((total / 20))
    rest=$((total - 2 * held))
    [ $held -gt 0 ] || die "$file: $total bytes are too few to divide"
    produce "$out/train.txt" $rest head -c $rest "$file"
    middle() {
        tail -c $((2 * held)) "$file" | head -c $held
    }
    produce "$out/val.txt" $held middle
    produce "$out/test.txt" $held tail -c $held "$file"
fi
tokens train val test
finish train val test
