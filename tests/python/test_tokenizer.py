#!/usr/bin/env python3
"""Compares ./tokenize with the package `tokenizers`: the ids of texts, and the text of ids.

    python3 tests/python/test_tokenizer.py [--bin FOLDER] [--texts FOLDER] [--gpt2 FOLDER] [--only NAME]
                                           [--random MEGABYTES]
    python3 tests/python/test_tokenizer.py --write-fixtures

Without options: the hard text, random text, every character of Unicode and the texts of data/, by the tokenizer of
tests/tokenizer and by variants of it that differ in their rules. --texts adds all files of a folder (.txt, .xml, .raw,
.tokens, .tsv); --gpt2 names a folder with gpt2_vocab.json and gpt2_merges.txt, and adds GPT-2's own tokenizer.
--write-fixtures writes what tests/test_tokenizer.c expects.
"""
import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/python"))
import hard_text  # noqa: E402

FIXTURES = ROOT / "tests/tokenizer"
SUFFIXES = {".txt", ".xml", ".raw", ".tokens", ".tsv"}
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")


def split(regex):
    """A Sequence of Split and ByteLevel."""
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}


def with_added(config):
    """Added tokens with every flag; tests/test_tokenizer.c has the same list."""
    first = len(config["model"]["vocab"])
    rows = [("foo", ""), ("foobar", "lstrip"), ("[R]", "rstrip"), ("word", "single_word normalized"),
            (" two words", "normalized"), ("endoftext", "special"), ("naïve", "special normalized"), ("<|", "lstrip rstrip")]
    # The package gives an added token that the vocabulary has the id that it has there.
    assert not any(content in config["model"]["vocab"] for content, _ in rows)
    for i, (content, flags) in enumerate(rows):
        flags = {flag: flag in flags.split() for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        config["added_tokens"].append({"id": first + i, "content": content, **flags})


def variants(config):
    """(name, tokenizer.json as a dict) for every form of the rules."""
    def copy():
        return json.loads(json.dumps(config))
    yield "gpt2", copy()
    c = copy()
    c["pre_tokenizer"]["add_prefix_space"] = True
    yield "prefix", c
    c = copy()
    c["pre_tokenizer"] = split(GPT2)
    yield "split", c
    for name, digits in (("llama3", "{1,3}"), ("qwen2", "")):
        c = copy()
        c["pre_tokenizer"] = split(CL100K % digits)
        c["model"]["ignore_merges"] = name == "llama3"
        yield name, c
    c = copy()
    with_added(c)
    yield "added", c
    c = copy()
    # Half of the merges, spelled the old way, so that many tokens cannot be reached; and some of them twice.
    c["model"]["merges"] = [" ".join(pair) for pair in c["model"]["merges"][::2] + c["model"]["merges"][:100]]
    del c["model"]["type"], c["version"]
    yield "merges", c


def pairs(config):
    """A tokenizer that merges any two bytes, in random order: a word that starts or ends elsewhere shows in the ids even
    where no ordinary vocabulary has a token for it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    both = [(a, b) for a in letters for b in letters]
    random.Random(7).shuffle(both)
    vocab = {"<|endoftext|>": 0}
    for token in letters + [a + b for a, b in both]:
        vocab[token] = len(vocab)
    for name, regex in (("llama3", CL100K % "{1,3}"), ("qwen2", CL100K % ""), ("gpt2", GPT2)):
        c = json.loads(json.dumps({**config, "model": {**config["model"], "vocab": vocab, "merges": both}}))
        c["pre_tokenizer"] = split(regex)
        yield f"pairs {name}", c


class Checker:
    def __init__(self, program, folder):
        self.program, self.folder = program, Path(folder)
        self.bytes = self.texts = self.failed = 0

    def run(self, *args):
        return subprocess.run([str(self.program), *map(str, args)], check=True, capture_output=True).stderr.decode()

    def compare(self, name, path, library, text, source):
        """One text by one tokenizer: ids, and what both make of these ids."""
        self.run("--tokenizer", path, "--data", source, "--out", self.folder / "ids.npy", "--exact")
        ours = np.load(self.folder / "ids.npy")
        want = np.array(library.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        self.run("--tokenizer", path, "--decode", self.folder / "ids.npy", "--out", self.folder / "text")
        decoded = (self.folder / "text").read_bytes()
        self.bytes += len(text.encode())
        self.texts += 1
        if not np.array_equal(ours, want):
            n = min(len(ours), len(want))
            at = int(np.argmax(ours[:n] != want[:n])) if (ours[:n] != want[:n]).any() else n
            around = library.decode(want[max(0, at - 8):at + 8].tolist(), skip_special_tokens=False)
            print(f"FAIL {name}: token {at}: ours {ours[at:at + 6].tolist()}, want {want[at:at + 6].tolist()}: {around!r}")
            self.failed += 1
        if decoded.decode(errors="replace") != library.decode(want.tolist(), skip_special_tokens=False):
            print(f"FAIL {name}: the decoded text differs from the library's")
            self.failed += 1
        return ours


def gpt2_config(folder):
    vocab = json.loads((folder / "gpt2_vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "gpt2_merges.txt").read_text(encoding="utf-8").split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    end = {"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False, "special": True}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
            "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
            "model": {"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                      "fuse_unk": False, "vocab": vocab, "merges": merges}}


def write_fixtures(config):
    text = hard_text.hard_text()
    (FIXTURES / "hard.txt").write_bytes(text.encode())
    for name, variant in variants(config):
        if name == "split":                         # must equal gpt2, which it spells in another way
            continue
        ids = Tokenizer.from_str(json.dumps(variant)).encode(text, add_special_tokens=False).ids
        np.save(FIXTURES / f"hard_{name}.npy", np.array(ids, dtype="<u2"))
        print(f"hard_{name}.npy: {len(ids)} tokens of {len(text.encode())} bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=ROOT)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--gpt2", type=Path)
    parser.add_argument("--only", metavar="NAME", help="of all tokenizers only this one, for example GPT-2")
    parser.add_argument("--random", type=float, default=0.5, help="megabytes of random text for each tokenizer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write-fixtures", action="store_true")
    args = parser.parse_args()
    config = json.loads((FIXTURES / "tokenizer.json").read_text(encoding="utf-8"))
    if args.write_fixtures:
        write_fixtures(config)
        return
    rng = random.Random(args.seed)
    texts = {"hard text": hard_text.hard_text(), "random text": hard_text.random_text(rng, int(args.random * 4e5)),
             "every character": hard_text.every_character()}
    files = sorted((ROOT / "data").glob("*.txt"))
    tokenizers = [(name, variant, name == "gpt2") for name, variant in [*variants(config), *pairs(config)]]
    if args.gpt2:
        tokenizers.append(("GPT-2", gpt2_config(args.gpt2), True))
    if args.only:
        tokenizers = [row for row in tokenizers if row[0] == args.only]
        if not tokenizers:
            sys.exit(f"error: --only {args.only}: there is no such tokenizer")
    if args.texts:
        files += sorted(p for p in args.texts.rglob("*") if p.is_file() and p.suffix in SUFFIXES)
    for path in files:
        data = path.read_bytes()
        texts[str(path)] = data.decode()            # as it is: read_text would change the line breaks
    with tempfile.TemporaryDirectory() as folder:
        checker = Checker(args.bin / "tokenize", folder)
        for name, variant, whole in tokenizers:
            tokenizer = Path(folder) / f"{name}.json"
            tokenizer.write_text(json.dumps(variant, ensure_ascii=False), encoding="utf-8")
            library = Tokenizer.from_file(str(tokenizer))
            before = checker.bytes
            for i, (title, text) in enumerate(texts.items()):
                # One form of the rules is enough for plain text, and three see every class of characters differently.
                if (i >= 3 and not whole) or (i == 2 and name not in ("added", "pairs llama3", "pairs gpt2")):
                    continue
                source = Path(folder) / "source.txt"
                source.write_bytes(text.encode())
                checker.compare(f"{name}, {title}", tokenizer, library, text, source)
            print(f"{name}: {checker.bytes - before:,} bytes compared", flush=True)
    print(f"test_tokenizer: {2 * checker.texts - checker.failed} passed, {checker.failed} failed; "
          f"{checker.bytes:,} bytes in {checker.texts} texts compared")
    sys.exit(1 if checker.failed else 0)


if __name__ == "__main__":
    main()
