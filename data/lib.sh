# data/lib.sh - what the scripts of this folder share: options, downloads, checksums, cleaning, tokens, a bar.
#
# A script sets `name` and `about`, reads this file, and calls `options "$@"`. Every file is made under another name and
# renamed when it is whole, so a file that is there is complete: a second run finds nothing to do, and one that was
# interrupted goes on with what is missing, a download in the middle of its file.
#
# POSIX sh, awk, sed, tr, find; curl for what is not on this machine yet.
# shellcheck shell=sh disable=SC2034,SC2154

set -eu
export LC_ALL=C                              # bytes, not characters
mark='<|endoftext|>'                         # a line of its own between documents
top=$(cd "$(dirname "$0")/.." && pwd)
tokenize=${MEGALODON_BIN:-$top}/tokenize
made=0                                       # files that this run has made
watcher=                                     # the process that draws the bar, while there is one
bar_shown=

say() {
    clear_bar
    printf '%s\n' "$*" >&2
}
die() {
    say "error: $*"
    exit 1
}
trap '[ -z "$watcher" ] || kill "$watcher" 2> /dev/null; clear_bar; exit 130' INT TERM HUP

# ----------------------------------------------------------------------------------------------------------------------
# Options.

usage() {
    cat << END
usage: sh data/$name.sh [options]

$about

  --out FOLDER       where the files go [data/$name]
  --source PLACE     a folder or an address (https://..., file://...) that has the original files, instead of their home
  --tokenizer FILE   a tokenizer.json: write token files, too (train.npy ...)
  --vocab-size N     train a tokenizer of N tokens on the text for this; needs Python and its package tokenizers
${more_options:-}  --help             this page
END
}

# Reads the options; a script that has more of them defines `option NAME VALUE`, which fails for one it does not know.
options() {
    out=$top/data/$name source='' tokenizer='' vocab_size=''
    while [ $# -gt 0 ]; do
        case $1 in
        --help | -h)
            usage
            exit 0
            ;;
        --*=*) key=${1%%=*} value=${1#*=} ;;
        --*)
            [ $# -ge 2 ] || die "$1 needs a value"
            key=$1 value=$2
            shift
            ;;
        *) die "unexpected argument \"$1\"; options are spelled --name value (see --help)" ;;
        esac
        shift
        [ -n "$value" ] || die "$key is empty"
        case $key in
        --out) out=$value ;;
        --source) source=${value%/} ;;
        --tokenizer) tokenizer=$value ;;
        --vocab-size) vocab_size=$value ;;
        *)
            { [ -n "${more_options:-}" ] && option "$key" "$value"; } || die "unknown option $key (see --help)"
            ;;
        esac
    done
    [ -z "$tokenizer" ] || [ -z "$vocab_size" ] || die "--tokenizer and --vocab-size exclude each other"
    [ -z "$tokenizer" ] || [ -f "$tokenizer" ] || die "--tokenizer $tokenizer: is not a file"
    case $vocab_size in *[!0-9]*) die "--vocab-size: expected a whole number, found \"$vocab_size\"" ;; esac
    if [ -n "$tokenizer$vocab_size" ] && [ ! -x "$tokenize" ]; then
        die "$tokenize: is not built; run make first"
    fi
    case $source in
    '' | *://*) ;;
    *) [ -d "$source" ] || [ -f "$source" ] || die "--source $source: is neither a folder nor an address" ;;
    esac
}

# recipe WORDS...: what the files in the folder are made of. A folder that has files of another kind is left alone.
recipe() {
    mkdir -p "$out" || die "--out $out: cannot be created"
    [ "$(cat "$out/RECIPE" 2> /dev/null)" != "$*" ] || return 0
    if [ -f "$out/RECIPE" ] &&
        [ -n "$(find "$out" -type f ! -name RECIPE | head -n 1)" ]; then
        die "$out: was made as \"$(cat "$out/RECIPE")\", not as \"$*\"; choose another --out, or delete it"
    fi
    printf '%s\n' "$*" > "$out/RECIPE.tmp" && mv "$out/RECIPE.tmp" "$out/RECIPE"
}

# ----------------------------------------------------------------------------------------------------------------------
# The bar. Only a terminal gets one.

clear_bar() {
    [ -z "$bar_shown" ] || printf '\r\033[K' >&2
    bar_shown=
}
# bar SO_FAR TOTAL LABEL; a TOTAL of 0 is not known
bar() {
    [ -t 2 ] || return 0
    awk -v so_far="$1" -v total="$2" -v label="$3" 'BEGIN {
        share = total > 0 ? so_far / total : 0
        if (share > 1) share = 1
        for (i = 0; i < 30; i++) line = line (i < int(30 * share) ? "#" : ".")
        if (total > 0) printf "\r[%s] %3d%% %s\033[K", line, 100 * share, label
        else printf "\r%s: %.1f MB\033[K", label, so_far / 1e6 }' >&2
    bar_shown=yes
}
# size FILE: bytes, 0 if there is none
size() {
    if [ -f "$1" ]; then echo $(($(wc -c < "$1"))); else echo 0; fi
}
# watch FILE TOTAL LABEL: draws the bar of a growing file, until `unwatch`
watch() {
    [ -t 2 ] || return 0
    bar_shown=yes
    while :; do
        bar "$(size "$1")" "$2" "$3"
        sleep 1
    done &
    watcher=$!
}
unwatch() {
    [ -n "$watcher" ] || return 0
    kill "$watcher" 2> /dev/null || true
    wait "$watcher" 2> /dev/null || true
    watcher=
    clear_bar
}
# produce FILE TOTAL COMMAND...: FILE is what COMMAND writes to stdout. TOTAL, the bytes to expect, is for the bar alone.
# The temporary name is one of this process, so that a run that was killed, but whose command still writes, does no harm.
produce() {
    product=$1 expected=$2
    shift 2
    [ ! -f "$product" ] || return 0
    mkdir -p "$(dirname "$product")"
    rm -f "$product".tmp.*
    watch "$product.tmp.$$" "$expected" "${product##*/}"
    "$@" > "$product.tmp.$$" || {
        unwatch
        rm -f "$product.tmp.$$"
        die "$product: could not be made"
    }
    unwatch
    mv "$product.tmp.$$" "$product"
    made=$((made + 1))
}

# ----------------------------------------------------------------------------------------------------------------------
# Originals.

# sha256 FILE: its checksum, or nothing where no program computes one
sha256() {
    if command -v sha256sum > /dev/null; then sha256sum < "$1"
    elif command -v shasum > /dev/null; then shasum -a 256 < "$1"
    elif command -v openssl > /dev/null; then openssl dgst -sha256 -r < "$1"
    fi | sed 's/ .*//'
}
# check_sum FILE SUM ADDRESS: a download that is not what it should be is of no use. What --source names is taken as it
# is, so that a part of a data set will do.
check_sum() {
    [ -n "$2" ] || return 0
    found=$(sha256 "$1")
    if [ -z "$found" ]; then
        say "note: no program for sha256 is here; the checksum of ${1##*/} is not compared"
    elif [ "$found" != "$2" ]; then
        if [ -n "$source" ]; then
            say "note: $3 is not the official file (sha256 $found, not $2); going on with it"
            return 0
        fi
        rm -f "$1"
        die "$3: has the sha256 $found, expected $2; the download was damaged or the file has changed, and was deleted"
    fi
}

# curl_to FILE ADDRESS: downloads, going on where an earlier attempt stopped. The status is curl's, the reason is in
# $reason.
curl_to() {
    progress=--silent
    [ ! -t 2 ] || progress=--progress-bar
    for attempt in resume restart; do
        code=0
        reason=$(curl $progress --fail --location --connect-timeout 20 --retry 3 --continue-at - --output "$1" \
            --write-out '%{http_code} %{errormsg}' "$2") || code=$?
        # Where the original is not longer than the part that is here, the server says 416 and curl 33 or 36: once more,
        # from the start.
        case "$code $reason" in
        "22 416"* | 33* | 36*) [ $attempt = restart ] || rm -f "$1" ;;
        *) break ;;
        esac
    done
    reason="${reason#* } (curl's error $code)"
    return $code
}

# fetch FILE SUM ADDRESS...: sets $file to a copy of FILE on this machine: in the folder of --source, or downloaded from
# there or from the first of the addresses that answers.
fetch() {
    fetched=$1 sum=$2
    shift 2
    file=$out/download/$fetched
    [ ! -f "$file" ] || return 0
    case $source in
    '') ;;
    *://*) set -- "$source/$fetched" ;;
    *)
        file=$source/$fetched
        [ -f "$file" ] || die "--source $source: has no $fetched"
        check_sum "$file" "$sum" "$file"
        return 0
        ;;
    esac
    command -v curl > /dev/null || die "curl is not installed; download $1 to a folder and name that by --source"
    mkdir -p "$(dirname "$file")"
    tried=
    for address in "$@"; do
        say "$fetched: from $address"
        if curl_to "$file.part" "$address"; then
            check_sum "$file.part" "$sum" "$address"
            mv "$file.part" "$file"
            made=$((made + 1))
            return 0
        fi
        tried="$tried $address: $reason;"
    done
    die "$fetched could not be downloaded;$tried without internet, put the file into a folder and name that by --source"
}

# member ZIP NAME: writes a file out of a zip archive to stdout
member() {
    if command -v unzip > /dev/null; then unzip -p "$1" "$2"
    elif command -v bsdtar > /dev/null; then bsdtar -xOf "$1" "$2"
    elif command -v python3 > /dev/null; then
        python3 -c 'import sys, zipfile, shutil
shutil.copyfileobj(zipfile.ZipFile(sys.argv[1]).open(sys.argv[2]), sys.stdout.buffer)' "$1" "$2"
    else die "no program here opens $1; install unzip"
    fi
}

# ----------------------------------------------------------------------------------------------------------------------
# Text.

# clean FILE: line feeds alone, no control characters, no mark of byte order, no white space at the ends of lines, no
# more than one empty line in a row, none at the beginning and the end.
clean() {
    tr -d '\000-\010\013\014\016-\037\177' < "$1" | awk '
        NR == 1 { sub(/^\357\273\277/, "") }
        { sub(/\r$/, ""); gsub(/\r/, "\n"); sub(/[ \t]+$/, "") }
        $0 == "" { empty = 1; next }
        { if (empty && printed) print ""; empty = 0; printed = 1; print }'
}

# with_marks FILE: the same, and around each mark: it stands in a line of its own, after each document that has any text
with_marks() {
    tr -d '\000-\010\013\014\016-\037\177' < "$1" | awk -v mark="$mark" '
        function flush_line(line) {
            sub(/[ \t]+$/, "", line)
            if (line == "") { empty = 1; return }
            if (empty && open) print ""
            empty = 0; open = 1
            print line
        }
        function close_document() { if (open) print mark; open = empty = 0 }
        NR == 1 { sub(/^\357\273\277/, "") }
        {
            sub(/\r$/, "")
            while ((at = index($0, mark)) > 0) {
                flush_line(substr($0, 1, at - 1))
                close_document()
                $0 = substr($0, at + length(mark))
                if ($0 == "") next
            }
            flush_line($0)
        }
        END { close_document() }'
}

# ----------------------------------------------------------------------------------------------------------------------
# Tokens, and the last words.

# tokens SPLIT...: a token file of each SPLIT.txt, or of the files in the folder SPLIT
tokens() {
    [ -n "$tokenizer$vocab_size" ] || return 0
    own=$out/tokenizer.json
    if [ -n "$vocab_size" ] && [ ! -f "$own" ]; then
        train_text=$out/train.txt
        [ -f "$train_text" ] || train_text=$(find "$out/train" -type f -name '*.txt' | sort)
        (
            IFS='
'
            set -f
            # shellcheck disable=SC2086
            python3 "$top/dev/train_tokenizer.py" --vocab-size "$vocab_size" --out "$own.tmp" --data $train_text >&2
        ) || die "$own: could not be trained; see the line above"
        mv "$own.tmp" "$own"
        made=$((made + 1))
    elif [ -n "$tokenizer" ] && [ -f "$own" ]; then
        cmp -s "$tokenizer" "$own" ||
            die "$own: is another tokenizer than $tokenizer; delete it and the .npy files beside it, or choose another --out"
    elif [ -n "$tokenizer" ]; then
        cp "$tokenizer" "$own.tmp" && mv "$own.tmp" "$own"
    fi
    for split in "$@"; do
        [ ! -f "$out/$split.npy" ] || continue
        text=$out/$split.txt
        [ -f "$text" ] || text=$out/$split
        "$tokenize" --tokenizer "$own" --data "$text" --out "$out/$split.npy" || die "$out/$split.npy: could not be made"
        made=$((made + 1))
    done
}

# word TEXT: the text as a shell reads it back as one word
word() {
    case $1 in
    *[!A-Za-z0-9_./-]*) printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf %s "$1" ;;
    esac
}

# finish SPLIT...: what is there now, and how to go on
finish() {
    [ $made -gt 0 ] || say "$out: is complete, there was nothing to do"
    ending=txt
    [ -z "$tokenizer$vocab_size" ] || ending=npy
    for split in "$@"; do
        for file in "$out/$split.txt" "$out/$split.jsonl" "$out/$split.npy"; do
            [ ! -f "$file" ] || printf '%12d bytes  %s\n' "$(size "$file")" "$file"
        done
        [ ! -d "$out/$split" ] || printf '%12d files  %s\n' "$(find "$out/$split" -name '*.txt' | wc -l)" "$out/$split"
    done
    [ -f "$out/train.jsonl" ] && [ $ending = txt ] && ending=jsonl
    data=$out/train.$ending val=$out/val.$ending words=
    [ -f "$data" ] || data=$out/train val=$out/val
    [ $ending = npy ] && words=" --tokenizer $(word "$out/tokenizer.json")"
    echo
    echo "./train --data $(word "$data")$words --val $(word "$val") --checkpoint-dir $(word "runs/${out##*/}")"
}
