"""Text that is hard for a tokenizer: where rules meet, where Unicode is odd, where words have no end."""
import random

SPACES = [chr(c) for c in (9, 10, 11, 12, 13, 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F,
                           0x205F, 0x3000)]
# They look like white space or nothing, but are none.
FALSE_SPACES = ["\x1c", "\x1d", "\x1e", "\x1f", "\u180e", "\u200b", "\u2060", "\ufeff", "\x00", "\x7f"]

SAMPLES = [
    # contractions, in every case and beside everything
    "I'm you're he's we've she'll they'd don't can't I'M YOU'RE HE'S WE'VE SHE'LL THEY'D DON'T 'tis 'twas",
    "'s 't 're 've 'm 'll 'd's's''s'''t 'x 'r 'v 'l 're're'rer'llama'dare 's\n's x's 1's !'s 'ſ don’t it’s 'S'T'Re'vE'lL",
    # numerals of many scripts, fractions, circled and Roman ones
    "0 12 345 6789 12345 ٠١٢٣٤ ०१२३ ০১২ ๐๑๒๓ 〇一二三 ½ ¾ ² ³ ₁₂ Ⅷ ⅻ ① ⑳ ㊿ 𝟘𝟙𝟚 𝟎𝟏 １２３ ௰௱ x2 2x a1b2c3 1,234.56",
    # combining marks are neither letters nor numbers
    "é e\u0301 ñ n\u0303 Å A\u030a Z\u0351\u036b\u0343\u036a\u0302\u036b\u033d\u034f\u0334\u0319\u0324a\u0301\u0302l"
    "g\u0321\u0353\u0332o \u0301alone 각 각 किताब நன்றி สวัสดี ກຳ Ǆ ǅ ǆ ŉ ß ẞ ı İ ﬁ ﬃ ﬅ",
    # CJK, kana, Hangul, full width
    "日本語のテキストです。 中文，没有空格！ 한국어 텍스트 ｆｕｌｌｗｉｄｔｈ　ＴＥＸＴ ｶﾀｶﾅ 𠀀𠮷𪚥 㐀 々〆ヶ ゛゜ ー",
    # right to left
    "שלום עולם! مرحبا بالعالم، ١٢٣ \u200fabc\u200e \u202eabc\u202c ـــ العَرَبِيَّة עִבְרִית פּ ܐܒܓ ދިވެހި",
    # emoji: skin tones, families joined by U+200D, flags, keycaps, variation selectors
    "😀😃 👍🏽 👩‍👩‍👧‍👦 👨🏿‍🚀 🏳️‍🌈 🏴‍☠️ 🇩🇪🇫🇷🇯🇵 1️⃣ #️⃣ ☺️ ☺︎ ❤️‍🔥 🧑🏻‍❤️‍💋‍🧑🏿 🏴󠁧󠁢󠁥󠁮󠁧󠁿 a😀b 1😀2 ' 😀's",
    # planes, private use, not characters, the last code point
    "𐍈 𝒜𝓑𝕮 𝔘𝔫𝔦 🂡 \ue000\uf8ff \U000f0000 \U0010ffff \ufffe\uffff \ufffd ￼ \ufff9x\ufffb 𞤀𞤁 𑄀 𓀀 𒀀 ꙮ Ꮳ ꭰ",
    # punctuation
    "--- ... ?!?! “quotes” ‘single’ «guillemets» — – ‒ ‐ _under_score_ __init__ a_b $100 €50 50% #tag @user a/b\\c <b>x</b>",
    "if (x==1){y+=2;} // done\n\tfor(i=0;i<10;++i)\n\t\tprintf(\"%d\\n\",i);\r\n\r\n    return  0 ;   \n  }\n",
    "<|endoftext|>x <|endoftext|> y<|endoftext|><|endoftext|>\n<|endoftext <|endoftext|<|endoftext|>> |endoftext|>",
    "Ġthe Ċ Āā ĉ Ń ł ġ naïve foobarfoo  foobar\u3000foobar [R] \n x word wordy sword 1word word1 _word éword word. [R]word "
    "a two words  two words [R] two words foo two words [R]  foobar <|[R] <| foo",
]


def every_space():
    """Each kind of white space alone, doubled, and between everything that a rule looks at."""
    parts = []
    for space in SPACES + FALSE_SPACES:
        for a, b in (("a", "b"), ("1", "2"), ("!", "?"), ("'s", "'s"), ("a", "!"), ("é", "日")):
            parts += [a, space, b, space, space, a, " ", space, b, space, " ", a, "\n", space, "\n", b]
    return "".join(parts)


def long_words():
    return " ".join(["a" * 1000, "ab" * 300, "0123456789" * 40, "!?" * 150, "日本" * 150, "é" * 300, "e\u0301" * 200,
                     " " * 300, "\n" * 270, "\t \n" * 90, "'" * 280, "'s" * 100, "thethe" * 300, "\u3000" * 100])


def hard_text(seed=1234, length=4000):
    """All of the above and random text made of it. Valid UTF-8, always the same."""
    rng = random.Random(seed)
    return "\n".join([*SAMPLES, every_space(), long_words(), random_text(rng, length)]) + "  "


def random_text(rng, length):
    """`length` pieces, each a character, a run of one, a contraction or a word."""
    alphabet = sorted({c for sample in SAMPLES for c in sample}) + SPACES + FALSE_SPACES
    words = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'Ll", " the", "The", "ing", "<|endoftext|>", "\r\n", " ",
             " ", " ", "\n", "'", "1", "a", "<|", "|>", "word", "[R]", " two words", "foo", "foobar"]
    out = []
    for _ in range(length):
        kind = rng.random()
        if kind < 0.3:
            out.append(rng.choice(words))
        elif kind < 0.4:
            out.append(rng.choice(alphabet) * rng.randint(2, 6))
        elif kind < 0.5:
            code = rng.randrange(0x110000 if rng.random() < 0.3 else 0x3000)
            out.append(chr(code) if not 0xD800 <= code < 0xE000 else "?")
        else:
            out.append(rng.choice(alphabet))
    return "".join(out)


def every_character():
    """Each character of the first two planes, and some of the others, where its class decides what happens: after a
    letter, a numeral, a space, an apostrophe, and before "word"."""
    codes = [*range(0xD800), *range(0xE000, 0x20000), *range(0x20000, 0x110000, 97), *range(0xE0000, 0xE0200)]
    return "".join(f"a{c}b1{c}2 {c}{c}!{c}'{c} {c}word" for c in map(chr, codes))
