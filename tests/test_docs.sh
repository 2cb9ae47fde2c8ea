#!/bin/sh
# test_docs.sh - what the README and the pages of doc/ say can be done: every link leads somewhere; every option, target
# of make, file and function that they name is there; code that they quote is the code; programs and scripts that they
# print run and give what they print. Runs from the top folder; MEGALODON_BIN and MEGALODON_BUILD say where the programs
# are.

. tests/cli.sh
pages=$(ls README.md SECURITY.md doc/*.md data/README.md models/*/README.md)

# check NAME: $dir/wrong has a line for each thing that is wrong, and should be empty
check() {
    : > "$dir/err"
    sort -u "$dir/wrong" > "$dir/out"
    if [ -s "$dir/out" ]; then fail "$1"; else ok; fi
}

# ---------------------------------------------------------------------------------------------------------------------
# Pages in parts: "FILE<tab>TEXT" for each line of prose, and for each command of a block with its continuation lines.

for page in $pages; do
    awk -v page="$page" -v commands="$dir/commands" '
        /^ *```/ { block = !block; next }
        !block { print page "\t" $0 }
        block || /^    / {
            line = $0
            while (line ~ /\\$/ && (getline more) > 0) { sub(/\\$/, "", line); line = line more }
            sub(/^ */, "", line)
            print page "\t" line >> commands
        }' "$page"
done > "$dir/prose"
# Words between backticks.
awk -F '\t' '{
    n = split($2, part, "`")
    for (i = 2; i < n; i += 2) print $1 "\t" part[i]
}' "$dir/prose" > "$dir/code"

# Links to files of the project, with the heading that they name as the hosting sites spell it.
awk -F '\t' '/^[^\t]*\t#+ / {
    slug = tolower($2)
    sub(/^#+ /, "", slug)
    gsub(/[^a-z0-9 _-]/, "", slug)
    gsub(/ /, "-", slug)
    print $1 "#" slug
}' "$dir/prose" > "$dir/headings"
awk -F '\t' '{ text = text "\n" $1 "\t" $2 } END {
    n = split(text, line, "\n")
    for (i = 1; i <= n; i++) {
        split(line[i], part, "\t")
        rest = part[2]
        # a link may begin on one line and end on the next
        if (split(line[i + 1], next_part, "\t") == 2 && next_part[1] == part[1]) rest = rest " " next_part[2]
        while (match(rest, /\]\([^) ]+\)/)) {
            print part[1] "\t" substr(rest, RSTART + 2, RLENGTH - 3)
            rest = substr(rest, RSTART + RLENGTH)
        }
    }
}' "$dir/prose" | grep -v 'http' | sort -u > "$dir/links"
while IFS="$(printf '\t')" read -r page link; do
    file=${link%%#*} heading=
    case $link in *\#*) heading=${link#*#} ;; esac
    target=$page
    [ -z "$file" ] || target=$(dirname "$page")/$file
    [ -e "$target" ] || echo "$page: no $link"
    target=$(printf '%s\n' "$target" | sed 's,^\./,,; :a; s,[^/.][^/]*/\.\./,,; ta')
    [ -z "$heading" ] || grep -qxF "$target#$heading" "$dir/headings" || echo "$page: no heading $link"
done < "$dir/links" > "$dir/wrong"
check "links"
for page in $pages; do
    case $page in README.md | *LICENSE*) ;; *) grep -qF "($page" README.md || echo "README.md does not lead to $page" ;; esac
done > "$dir/wrong"
check "pages that the README leads to"
if [ "$(wc -l < "$dir/links")" -ge 40 ]; then ok; else fail "links: only some were found"; fi

# ---------------------------------------------------------------------------------------------------------------------
# Options: those of a command belong to its program, those in prose to some program or script.

for program in train generate evaluate tokenize numdiff; do
    "$bin/$program" --help | sed -n 's/^ *\(--[a-z0-9-]*\).*/\1/p' > "$dir/options-$program"
done
for program in bench recall; do
    "$build/$program" --help 2>&1 | grep -o -e '--[a-z0-9-]*' > "$dir/options-$program"
done
for script in data/*.sh dev/*.py tests/python/*.py; do
    case $script in
    data/*) parts="$script data/lib.sh $(grep -o '[a-z]*\.sh"' "$script" | sed 's,",,; s,^,data/,')" ;;
    *) parts=$script ;;
    esac
    grep -h -o -e '--[a-z][a-z0-9-]*' $parts > "$dir/options-$(basename "$script")"
done
sort -u "$dir"/options-* > "$dir/options"

# Of a command: its program, then its options, up to a pipe or a comment.
awk -F '\t' '{
    line = $2
    sub(/^\$ /, "", line)
    sub(/ #.*/, "", line)
    sub(/ \|.*/, "", line)
    n = split(line, word, /[ =]+/)
    program = ""
    for (i = 1; i <= n && i <= 3 && program == ""; i++)
        if (word[i] ~ /^(\.\/|\.\/build\/|build\/|megalodon-)(train|generate|evaluate|tokenize|numdiff|bench|recall)$/ ||
            word[i] ~ /^(data|dev|tests\/python)\/[a-z_0-9]+\.(sh|py)$/) program = word[i]
    sub(/.*\//, "", program)
    sub(/^megalodon-/, "", program)
    for (; program != "" && i <= n; i++) if (word[i] ~ /^--[a-z]/) print $1 "\t" program "\t" word[i]
}' "$dir/commands" | sort -u > "$dir/used"
while IFS="$(printf '\t')" read -r page program option; do
    grep -qxF -e "$option" "$dir/options-$program" || echo "$page: $program has no option $option"
done < "$dir/used" > "$dir/wrong"
check "options of commands"
if [ "$(wc -l < "$dir/used")" -ge 150 ]; then ok; else fail "options: only some were found"; fi
awk -F '\t' '$2 ~ /^(\.\/)?(--|(train|generate|evaluate|tokenize|numdiff|bench|recall) )/ {
    n = split($2, word, /[^a-z0-9-]+/)
    for (i = 1; i <= n; i++) if (word[i] ~ /^--[a-z]/) print $1 "\t" word[i]
}' "$dir/code" | sort -u |
    while IFS="$(printf '\t')" read -r page option; do
        grep -qxF -e "$option" "$dir/options" || echo "$page: nothing has the option $option"
    done > "$dir/wrong"
check "options in prose"

# ---------------------------------------------------------------------------------------------------------------------
# Targets of make, files, functions.

{
    grep '	make ' "$dir/code"
    awk -F '\t' '{ sub(/^\$ /, "", $2); sub(/ [&|#].*/, "", $2) } $2 ~ /^make / { print $1 "\t" $2 }' "$dir/commands"
} | sed 's/=\$([^)]*)[^ ]*/=/g' | sort -u | while IFS="$(printf '\t')" read -r page command; do
    for word in $command; do
        case $word in
        make | -* | *=*) ;;
        build/test_*) [ -f "tests/${word#build/}.c" ] || [ -f "${word#build/}.c" ] || echo "$page: no $word" ;;
        build/ladder_*) [ -f "dev/${word#build/}.cu" ] || echo "$page: no $word" ;;
        build/*) [ -f "dev/${word#build/}.c" ] || echo "$page: no $word" ;;
        *) grep -q "^$word:" Makefile || echo "$page: no target $word in \"$command\"" ;;
        esac
    done
done > "$dir/wrong"
check "targets of make"

awk -F '\t' '$2 ~ /^(lib|cuda|dev|doc|data|tests|models)\/[A-Za-z0-9_.\/-]*$/ || $2 ~ /^[a-z_]+\.(c|cu|h)$/' "$dir/code" |
    while IFS="$(printf '\t')" read -r page file; do
        [ -e "$file" ] || [ -e "lib/$file" ] || echo "$page: no $file"
    done > "$dir/wrong"
check "files"

cat ./*.[ch]* cuda/* lib/*.h dev/*.* tests/*.[ch] tests/python/*.py | tr -c 'A-Za-z0-9_' '\n' | sort -u > "$dir/names"
awk -F '\t' '$2 ~ /^[a-zA-Z0-9]+(_[a-zA-Z0-9]+)+(\(\))?$/ { sub(/\(\)$/, "", $2); print $1 "\t" $2 }' "$dir/code" |
    while IFS="$(printf '\t')" read -r page name; do
        grep -qxF "$name" "$dir/names" || echo "$page: nothing is named $name"
    done > "$dir/wrong"
check "names"

grep -n -E '@[A-Z]+@|TODO|FIXME|TBD' $pages > "$dir/wrong"
check "places left open"

# ---------------------------------------------------------------------------------------------------------------------
# Code. A block of C without a main is an excerpt of megalodon.c, line by line; one with a main is a program, which must
# print what the block after it shows.

tr -d ' ' < megalodon.c > "$dir/source"
for page in doc/cema.md doc/timestepnorm.md; do
    awk -v prefix="$dir/block-" '
        /^```c$/ { kind = "c"; n++; file = prefix n ".c"; next }
        /^```/ && kind == "" { kind = "text"; file = prefix n ".text" (seen[n]++ ? ".rest" : ""); next }
        /^```$/ { kind = ""; close(file); next }
        kind != "" { print > file }' "$page"
    programs=0
    for block in "$dir"/block-*.c; do
        if grep -q 'int main' "$block"; then
            programs=$((programs + 1))
            good "$page: compile" "${CC:-cc}" -I. "$block" -lm -o "$dir/program"
            run "$dir/program"
            same "$page: the program's output" "$dir/out" "${block%.c}.text"
        else
            tr -d ' ' < "$block" | while read -r line; do
                grep -qF -e "$line" "$dir/source" || echo "$page: not in megalodon.c: $line"
            done > "$dir/wrong"
            check "$page: excerpt"
        fi
    done
    if [ $programs -eq 1 ]; then ok; else fail "$page: $programs programs instead of one"; fi
    rm -f "$dir"/block-*
done

# The checksum, as doc/faults.md computes it, of a model so small that Python's loops do not matter.
if command -v python3 > /dev/null; then
    awk '/^```python$/ { on = 1; next } /^```$/ { on = 0 } on' doc/faults.md > "$dir/sum.py"
    cat >> "$dir/sum.py" <<'EOF'
import json, sys
data = open(sys.argv[1], "rb").read()
size = int.from_bytes(data[:8], "little")
entries = json.loads(data[8:8 + size])
metadata = entries.pop("__metadata__")
expected = metadata.pop("checksum").split()
tensors = {name: (e["dtype"], e["shape"]) for name, e in entries.items()}
begin, end = min(e["data_offsets"] for e in entries.values())
first = min(entries, key=lambda name: entries[name]["data_offsets"][0])
assert expected[0] == f"{header(metadata, tensors):016x}", "the header's word"
at = sorted(entries, key=str.encode).index(first)
assert expected[1 + at] == f"{total(0, data[8 + size + begin:8 + size + end]):016x}", "the word of " + first
EOF
    good "train" "$bin/train" --data data/tinystories_valid.txt --num-layers 1 --model-dim 8 --z-dim 4 --value-dim 8 \
        --ffn-hidden-dim 8 --cema-ndim 2 --chunk-size 8 --norm-num-groups 2 --batch 1 --seq-len 8 --steps 1 \
        --eval-every 0 --eval-batches 1 --checkpoint-dir "$dir/run"
    good "the checksum" python3 "$dir/sum.py" "$dir/run/step-00000001/model.safetensors"
else
    echo "skip: the checksum of doc/faults.md needs python3"
fi

finish test_docs
