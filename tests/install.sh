#!/bin/sh
# install.sh - what `make install` puts where: a program compiles and runs against the header and both libraries, the
# installed programs find their model, manual pages have every option, and `make uninstall` removes all of it.
#
#   make test-install
#
# Runs from the top folder; MAKE, CC and MEGALODON_BUILD say what builds, with what, and where.

make=${MAKE:-make}
cc=${CC:-cc}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"

ok() {
    passed=$((passed + 1))
}
fail() {
    failed=$((failed + 1))
    echo "FAIL: $*"
    tail -n 12 "$dir/log" 2> /dev/null | sed 's/^/    /'
}
skip() {
    skipped=$((skipped + 1))
    echo "skipped: $*"
}
# good NAME COMMAND...: status 0
good() {
    name=$1
    shift
    if "$@" > "$dir/log" 2>&1; then ok; else fail "$name"; fi
}
# same NAME FILE FILE
same() {
    if cmp -s "$2" "$3"; then ok; else fail "$1: $2 and $3 differ"; fi
}
# install_into GOAL VARIABLE=VALUE...
install_into() {
    "$make" --no-print-directory "$@"
}

prefix=$dir/usr
good "make install" install_into install "PREFIX=$prefix"
for program in train generate evaluate tokenize numdiff; do
    good "$program --help" "$prefix/bin/megalodon-$program" --help
done

# The same files, under a folder that stands for /, and nothing outside of it.
good "make install with DESTDIR" install_into install "PREFIX=$prefix" "DESTDIR=$dir/dest"
good "DESTDIR holds what PREFIX holds" diff -r "$prefix" "$dir/dest$prefix"
[ "$(find "$dir/dest" -type f | wc -l)" -eq "$(find "$dir/dest$prefix" -type f | wc -l)" ] && ok || fail "files elsewhere"

# From any folder, without being told of a model.
(cd / && "$prefix/bin/megalodon-generate" --max-tokens 20 --seed 1 --backend cpu) > "$dir/story" 2> "$dir/log"
[ $? -eq 0 ] && [ "$(wc -c < "$dir/story")" -ge 36 ] && ok || fail "the installed generate finds no model"

# A program of somebody else: it gives a model its initial values and prints the sum of its last logits.
cat > "$dir/use.c" << 'END'
#include <megalodon.h>
#include <stdio.h>

int main(void) {
    MegalodonConfig config;
    MegalodonModel *model;
    MegalodonOptions options = {0};
    MegalodonBatch batch = {0};
    int32_t tokens[5] = {1, 2, 3, 4, 5};
    float logits[256];
    double sum = 0;
    const char *error = megalodon_preset("demo", &config);
    options.max_batch = 1;
    options.max_length = 5;
    batch.tokens = tokens;
    batch.B = 1;
    batch.T = 5;
    if (!error) error = megalodon_cpu.create(&model, &config, &options);
    if (!error) error = megalodon_initialise(&megalodon_cpu, model, &config, 1234);
    if (!error) error = megalodon_cpu.forward(model, &batch, NULL);
    if (!error) error = megalodon_cpu.last_logits(model, logits);
    if (error) {
        printf("%s\n", error);
        return 1;
    }
    for (int i = 0; i < config.vocab_size; i++) sum += logits[i];
    printf("%lld parameters, sum of the logits %.4f\n", (long long)megalodon_num_parameters(&config), sum);
    megalodon_cpu.destroy(model);
    return 0;
}
END
value() {                                   # value NAME: a line of megalodon.pc
    sed -n "s/^$1: *//p" "$prefix/lib/pkgconfig/megalodon.pc" |
        sed "s|\${includedir}|$prefix/include|; s|\${libdir}|$prefix/lib|"
}
strict="-std=c11 -Wall -Wextra -Werror"
# shellcheck disable=SC2046
good "compiles against the shared library" $cc $strict "$dir/use.c" $(value Cflags) $(value Libs) -o "$dir/shared"
# shellcheck disable=SC2046
good "compiles against the static library" $cc $strict "$dir/use.c" $(value Cflags) "$prefix/lib/libmegalodon.a" \
    $(value Libs.private) -o "$dir/static"
LD_LIBRARY_PATH=$prefix/lib DYLD_LIBRARY_PATH=$prefix/lib "$dir/shared" > "$dir/shared.out" 2> "$dir/log" && ok ||
    fail "runs with the shared library"
"$dir/static" > "$dir/static.out" 2> "$dir/log" && ok || fail "runs with the static library"
same "both libraries" "$dir/shared.out" "$dir/static.out"
grep -q '^2124416 parameters' "$dir/static.out" && ok || fail "the program's output: $(cat "$dir/static.out")"
cat "$dir/static.out"
if command -v pkg-config > /dev/null; then
    pkg() { PKG_CONFIG_PATH=$prefix/lib/pkgconfig pkg-config "$@" megalodon > "$dir/log" 2>&1; }
    good "pkg-config knows the library" pkg --cflags --libs
    good "pkg-config knows what the static one needs" pkg --static --libs
else
    skip "pkg-config is not here"
fi
c++ --version > /dev/null 2>&1 && { good "the header is one of C++, too" c++ -x c++ -fsyntax-only \
    "$prefix/include/megalodon.h"; } || skip "no C++ compiler"
# Only names of this library are visible to others.
nm -g "$prefix/lib/libmegalodon.a" 2> /dev/null | awk 'NF == 3 && $2 != "U" && $3 !~ /^_?megalodon_/' > "$dir/log"
[ ! -s "$dir/log" ] && ok || fail "the library has names that do not begin with megalodon_"

# Manual pages: every option, no complaint of those who read them.
for program in train generate evaluate tokenize numdiff; do
    page=$prefix/share/man/man1/megalodon-$program.1
    "$prefix/bin/megalodon-$program" --help | sed -n 's/^  \(--[a-z0-9-]*\).*/\1/p' > "$dir/options"
    missing=
    while read -r option; do
        escaped=$(printf '%s' "$option" | sed 's/-/\\-/g')
        grep -qF -e "\\fB$escaped" "$page" || missing="$missing $option"
    done < "$dir/options"
    [ -s "$dir/options" ] && [ -z "$missing" ] && ok || fail "the manual page of $program lacks:$missing"
    if command -v groff > /dev/null; then
        groff -man -Tutf8 -ww -z "$page" > "$dir/log" 2>&1 && [ ! -s "$dir/log" ] && ok || fail "groff on $page"
    fi
    if command -v mandoc > /dev/null; then
        good "mandoc on $page" mandoc -T lint -W error "$page"
    fi
done
command -v groff > /dev/null || skip "groff is not here"
command -v mandoc > /dev/null || skip "mandoc is not here"
if command -v man > /dev/null && man -l "$prefix/share/man/man1/megalodon-train.1" > "$dir/page" 2> "$dir/log"; then
    grep -q 'megalodon-train' "$dir/page" && ok || fail "man -l shows another page"
    col -b < "$dir/page" | grep -qe '--weight-decay X' && ok || fail "man -l does not show --weight-decay X"
else
    skip "man -l does not work here"
fi

# A prefix without spaces from / on is asked for; names of programs can be chosen.
install_into install PREFIX=relative > "$dir/log" 2>&1 && fail "a relative PREFIX" || ok
install_into install "PREFIX=$dir/a b" > "$dir/log" 2>&1 && fail "a PREFIX with a space" || ok
good "names" install_into install "PREFIX=$prefix" "DESTDIR=$dir/other" PROGRAM_PREFIX=mega-
page=$dir/other$prefix/share/man/man1/mega-train.1
[ -x "$dir/other$prefix/bin/mega-train" ] && grep -q '^mega.-train .- Trains' "$page" && ok || fail "mega-train"

# A foreign file beside ours stays.
echo mine > "$prefix/bin/mine"
good "make uninstall" install_into uninstall "PREFIX=$prefix"
find "$prefix" -type f -o -type l > "$dir/log"
[ "$(cat "$dir/log")" = "$prefix/bin/mine" ] && ok || fail "make uninstall left or took other files"
[ ! -d "$prefix/share/megalodon" ] && ok || fail "make uninstall left its folder"

echo "test_install: $passed passed, $failed failed, $skipped skipped"
echo "$passed passed, $failed failed"
[ $failed -eq 0 ] && [ $passed -gt 0 ]
