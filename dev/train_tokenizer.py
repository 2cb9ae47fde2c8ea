#!/usr/bin/env python3
"""Trains a byte-level BPE tokenizer that ./tokenize, ./train and ./generate read.

    pip install tokenizers==0.23.3
    python3 dev/train_tokenizer.py --data data/tinystories_sample.txt --vocab-size 2048 --out tokenizer.json

The 256 bytes are always in the vocabulary, so the tokenizer spells any text. <|endoftext|> has the id 0; where it stands
in the text, a document ends, and no token is learnt across it.
"""
import argparse
import json
import sys
from pathlib import Path

END = "<|endoftext|>"


def documents(paths, end):
    """Text between the ends of documents, with the line breaks next to them dropped."""
    for path in paths:
        for text in path.read_text(encoding="utf-8", errors="replace").split(end):
            text = text.removeprefix("\n").removesuffix("\n")
            if text:
                yield text


def train(paths, vocab_size, min_frequency=2, end=END, special=()):
    """A `tokenizers.Tokenizer` with GPT-2's rules, trained on the files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=[end, *special],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(documents(paths, end), trainer)
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description="Trains a byte-level BPE tokenizer and writes a tokenizer.json.")
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=2048, metavar="N", help="tokens in all [%(default)s]")
    parser.add_argument("--min-frequency", type=int, default=2, metavar="N",
                        help="a pair must be there so often to be merged [%(default)s]")
    parser.add_argument("--end", default=END, metavar="TOKEN", help="ends a document [%(default)s]")
    parser.add_argument("--special", nargs="*", default=[], metavar="TOKEN", help="more special tokens")
    args = parser.parse_args()
    least = 257 + len(args.special)
    if args.vocab_size < least:
        sys.exit(f"error: --vocab-size {args.vocab_size} is too small; the bytes and special tokens alone are {least}")
    for path in args.data:
        if not path.is_file():
            sys.exit(f"error: --data {path}: is not a file")
    try:
        tokenizer = train(args.data, args.vocab_size, args.min_frequency, args.end, args.special)
    except ImportError:
        sys.exit("error: the package tokenizers is missing; pip install tokenizers==0.23.3")
    size = tokenizer.get_vocab_size()
    text = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    args.out.write_text(text, encoding="utf-8")
    print(f"{args.out}: {size} tokens")
    if size < args.vocab_size:
        print(f"no pair is left that occurs {args.min_frequency} times; the text is too small for {args.vocab_size} tokens")


if __name__ == "__main__":
    main()
