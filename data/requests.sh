#!/bin/sh
# data/requests.sh - examples for fine-tuning, made from the stories that come with the project; needs no network.
#
#     sh data/requests.sh
#
# Each example asks for a story about someone and something, and answers with the first paragraph of a story that names
# both: {"prompt": "A story about Tim and a frog:\n", "response": "Once upon a time, ..."}. The stories of
# data/tinystories_sample.txt are to train on, those of data/tinystories_valid.txt are held out.

name=requests
about='Makes examples for fine-tuning out of the stories in data/: requests for a story, and how it begins.'
. "$(dirname "$0")/lib.sh"
options "$@"

# requests FILE: JSONL
requests() {
    awk -v mark="$mark" '
        BEGIN {
            count = split("ball bear bee bird boat book box bug bus cake car cat cow dog doll duck fish flower fox frog " \
                "hat kite mouse pig pond rabbit robot rock ship shoe train tree truck turtle", things)
            first = 1
        }
        $0 == mark { first = 1; next }
        !first { next }
        {
            first = 0
            if (length($0) < 60 || length($0) > 180 || $0 ~ /[^ -~]/) next
            if (!match($0, /named [A-Z][a-z]+[., ]/)) next
            hero = substr($0, RSTART + 6, RLENGTH - 7)
            best = 0
            for (i = 1; i <= count; i++) {
                at = match($0, "[ ]" things[i] "[., ]")
                if (at > 0 && (best == 0 || at < best)) { best = at; thing = things[i] }
            }
            if (!best) next
            gsub(/\\/, "\\\\")
            gsub(/"/, "\\\"")
            printf "{\"prompt\": \"A story about %s and a %s:\\n\", \"response\": \"%s\"}\n", hero, thing, $0
        }' "$1"
}

recipe requests
produce "$out/val.jsonl" 0 requests "$top/data/tinystories_valid.txt"
produce "$out/train.jsonl" 0 requests "$top/data/tinystories_sample.txt"
finish train val
