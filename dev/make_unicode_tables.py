#!/usr/bin/env python3
"""Writes lib/unicode_tables.h: which characters are letters, numbers, white space and parts of words.

    python3 dev/make_unicode_tables.py > lib/unicode_tables.h

The tables have to agree with those inside the `tokenizers` library, or the two would cut text at different places.
Its version 0.23 knows Unicode 16.0.0, which Python has in its module `unicodedata` since 3.14. An older Python uses
`pip install unicodedata2==16.0.0`, the same module with newer tables. Any other version is refused, because every
release of Unicode adds letters. tests/python/test_tokenizer.py compares each character with the library.
"""
import sys
import unicodedata

VERSION = "16.0.0"

# White_Space, the Unicode property. It is not a category and the module does not have it, but it has not changed
# since 2013 and the standard promises that it hardly ever will.
SPACES = [*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000]

# Characters of words that their category does not give away: the letters in circles and squares, which are
# Alphabetic though they are symbols, and the two joiners.
WORD_SYMBOLS = [*range(0x24B6, 0x24EA), *range(0x1F130, 0x1F14A), *range(0x1F150, 0x1F16A), *range(0x1F170, 0x1F18A),
                0x200C, 0x200D]

OTHER, LETTER, NUMBER, SPACE, WORD = 0, 1, 2, 3, 4


def tables():
    """The module with the right version."""
    if unicodedata.unidata_version == VERSION:
        return unicodedata
    try:
        import unicodedata2
    except ImportError:
        unicodedata2 = None
    if unicodedata2 and unicodedata2.unidata_version == VERSION:
        return unicodedata2
    sys.exit(f"error: this Python knows Unicode {unicodedata.unidata_version}, but {VERSION} is needed; use Python 3.14 "
             f"or run: pip install unicodedata2=={VERSION}")


def classes(module):
    """The class of every code point, as a list of 0x110000 numbers."""
    of_category = {}
    for category in ("Lu", "Ll", "Lt", "Lm", "Lo"):
        of_category[category] = LETTER | WORD
    for category, value in {"Nd": NUMBER | WORD, "Nl": NUMBER | WORD, "No": NUMBER,
                            "Mn": WORD, "Mc": WORD, "Me": WORD, "Pc": WORD}.items():
        of_category[category] = value
    out = [of_category.get(module.category(chr(c)), OTHER) for c in range(0x110000)]
    for c in SPACES:
        out[c] = SPACE
    for c in WORD_SYMBOLS:
        out[c] |= WORD
    return out


def main():
    values = classes(tables())
    changes = [c for c in range(0x110000) if c == 0 or values[c] != values[c - 1]]
    print(f"""/* unicode_tables.h - classes of characters in Unicode {VERSION}. Written by dev/make_unicode_tables.py; do not edit.
 *
 * Each entry is a code point at which the class changes, times 8, plus the class from there on: 0 other, 1 letter
 * (\\p{{L}}), 2 number (\\p{{N}}), 3 white space (\\s), and 4 more if the character can be a part of a word (\\w).
 */
#ifndef LIB_UNICODE_TABLES_H
#define LIB_UNICODE_TABLES_H

#include <stdint.h>

#define UNICODE_TABLES_VERSION "{VERSION}"
enum {{ UNICODE_CHANGES = {len(changes)} }};

static const uint32_t unicode_changes[UNICODE_CHANGES] = {{""")
    line = "   "
    for c in changes:
        entry = f" 0x{c * 8 + values[c]:x},"
        if len(line) + len(entry) > 108:
            print(line)
            line = "   "
        line += entry
    print(line)
    print("};\n\n#endif")


if __name__ == "__main__":
    main()
