# data/wikitext.sh - the common part of wikitext2.sh and wikitext103.sh, which set `name`, `about`, `number` and the
# checksums.
#
# The text stays as it is, byte for byte, so that losses can be compared; only a line <|endoftext|> is put before each
# article but the first. An article begins with its title, " = Title = ", between two lines without a word.
# shellcheck shell=sh disable=SC2154

more_options='  --words yes|no     yes: the edition in which rare words are <unk>, for comparisons of words; no: all words [no]
'
words=no
option() {
    [ "$1" = --words ] || return 1
    words=$2
    case $words in yes | no) ;; *) die "--words: expected yes or no, found \"$words\"" ;; esac
}
. "$(dirname "$0")/lib.sh"
options "$@"

if [ $words = no ]; then edition=wikitext-$number-raw sum=$raw_sum ending=raw
else edition=wikitext-$number sum=$words_sum ending=tokens
fi

# articles FILE: the text with marks between articles. A title is known by the line after it, so one line is held back.
articles() {
    awk -v mark="$mark" '
        function is_blank(line) { return line ~ /^[ \r]*$/ }
        function is_title(line) { return line ~ /^ = [^=].* = \r?$/ }
        NR > 1 { if (is_title(held) && is_blank(before) && is_blank($0) && articles++) print mark; print held }
        { before = NR > 1 ? held : ""; held = $0 }
        END { if (NR > 0) print held }' "$1"
}

recipe "$edition${source:+ from $source}"
for split in train valid test; do
    target=$out/$split.txt
    [ $split != valid ] || target=$out/val.txt
    [ ! -f "$target" ] || continue
    text=wiki.$split.$ending
    if [ -n "$source" ] && [ -f "$source/$text" ]; then      # a folder of files that are unpacked
        text=$source/$text
    else
        fetch $edition-v1.zip $sum https://wikitext.smerity.com/$edition-v1.zip \
            https://s3.amazonaws.com/research.metamind.io/wikitext/$edition-v1.zip
        produce "$out/download/$text" 0 member "$file" "$edition/$text"
        text=$out/download/$text
    fi
    produce "$target" "$(size "$text")" articles "$text"
    say "${target##*/}: $(($(grep -cxF "$mark" "$target" || true) + 1)) articles"
done
tokens train val test
finish train val test
