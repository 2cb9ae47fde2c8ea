#!/bin/sh
# Which lines of the library and of megalodon.c did programs built with --coverage run?
#
#   sh tests/coverage.sh FOLDER LEAST
#
# Reads FOLDER/*.gcda, prints a line for each file with the lines that nothing ran, and the sum. A file that is compiled
# into several programs counts once: a line is covered if one of them ran it. Fails below LEAST percent.

folder=$1 least=$2
if ! ls "$folder"/*.gcda > /dev/null 2>&1; then
    echo "no coverage data in $folder"
    exit 1
fi
gcov -t "$folder"/*.gcda 2> /dev/null | awk -v least="$least" '
    /^ *-: *0:Source:/ { file = $0; sub(/.*Source:/, "", file); next }
    file == "megalodon.c" || file ~ /^lib\// {
        split($0, part, ":")
        count = part[1]
        gsub(/[ *]/, "", count)
        line = part[2] + 0
        if (count == "-" || line == 0) next
        if (!((file, line) in lines)) { lines[file, line] = 0; order[file, ++total[file]] = line }
        if (count !~ /^[#=]/) lines[file, line] = 1
    }
    END {
        for (file in total) {
            missing = ""
            run = 0
            for (i = 1; i <= total[file]; i++) {
                line = order[file, i]
                if (lines[file, line]) run++
                else missing = missing " " line
            }
            printf "%-22s %5d of %5d lines, %6.2f%%%s\n", file, run, total[file], 100 * run / total[file],
                   missing == "" ? "" : ", not" missing | "sort"
            all += total[file]
            covered += run
        }
        close("sort")
        percent = all ? 100 * covered / all : 0
        printf "coverage: %d of %d lines, %.2f%%\n", covered, all, percent
        exit percent < least
    }'
