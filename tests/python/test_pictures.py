#!/usr/bin/env python3
"""Draws every kind of picture, looks whether something is on it, and checks what the CEMA picture says of a model.

    python3 tests/python/test_pictures.py [--bin FOLDER]
"""
import argparse
import csv
import re
import sys
import tempfile
import xml.dom.minidom
from pathlib import Path

import numpy as np
import torch
from checks import ROOT, Checks, Programs
from PIL import Image
from safetensors.torch import load_file

import plot_cema
from megalodon_torch import Megalodon

LOGS = [ROOT / "doc/learning/fp32.csv", ROOT / "doc/learning/bf16.csv"]
TINYSTORIES = ROOT / "models/tinystories"


def draw(checks, script, *args, bad=None):
    """Runs a script; bad: the text of the error that it has to end in."""
    done = Programs.attempt([sys.executable, ROOT / "dev" / script, *args])
    error = done.stderr.decode()
    if bad is None:
        checks.check(f"{script} {' '.join(map(str, args))}", done.returncode == 0, error[-300:])
    else:
        checks.check(f'{script}: an error with "{bad}"', done.returncode != 0 and bad in error
                     and "Traceback" not in error, error[-300:])
    return done.stdout.decode()


def inked(path):
    """The share of a picture's pixels that are not white."""
    return float((np.asarray(Image.open(path).convert("L")) < 250).mean())


def test_logs(checks, folder):
    out = folder / "runs.png"
    draw(checks, "plot.py", LOGS[0], "--out", out)
    one = inked(out)
    checks.check("one run", 0.01 < one < 0.5, f"{one:.3f} of the picture is drawn on")
    draw(checks, "plot.py", *LOGS, "--label", "fp32", "--label", "bf16", "--out", out, "--panels",
         "loss,held-out,lr,norm,speed,difference", "--points", "elsewhere=500:1.2,1000:1.1", "--title", "two runs")
    size = Image.open(out).size
    checks.check("six panels are three rows of two", size[1] > size[0], str(size))
    checks.check("two runs", inked(out) > 0.01)
    draw(checks, "plot.py", folder / "absent.csv", bad="absent.csv")
    draw(checks, "plot.py", ROOT / "README.md", "--out", out, bad="not a log of train")
    draw(checks, "plot.py", LOGS[0], "--panels", "loss,colour", bad="colour")
    draw(checks, "plot.py", LOGS[0], "--panels", "difference", bad="two logs or more")
    draw(checks, "plot.py", LOGS[0], "--out", folder / "absent/runs.png", bad="absent/runs.png")


def test_cema(checks, programs, folder):
    """The memories are those that evaluate tells, and a response is what the model does to a single 1."""
    out = folder / "cema.png"
    printed = draw(checks, "plot_cema.py", TINYSTORIES, "--out", out)
    checks.check("the picture of CEMA", 0.05 < inked(out) < 0.6 and out.stat().st_size < 200_000, str(inked(out)))
    programs.run("evaluate", "--cema", "--csv", folder / "cema.csv")
    with open(folder / "cema.csv", newline="") as file:
        want = {row["layer"]: row for row in csv.DictReader(file) if row["quantity"] == "memory"}
    found = re.findall(r"block (\d+): memory median ([\d.]+), longest ([\d.]+) tokens", printed)
    checks.check("all blocks are told", len(found) == len(want) - 1, printed)
    for block, median, longest in found:
        row = want[block]
        checks.check(f"memory of block {block}", abs(float(median) - float(row["median"])) < 6e-4
                     and abs(float(longest) - float(row["longest"])) < 6e-4, f"{median}, {longest} and {row}")
    model, blocks = Megalodon.load(TINYSTORIES).double(), plot_cema.read_cema(plot_cema.model_file(TINYSTORIES))
    state = model.empty_state(1)["layers.0.cema"]
    impulse = torch.zeros(1, 100, model.config.model_dim, dtype=torch.float64)
    impulse[:, 0] = 1
    with torch.no_grad():
        checks.compare("impulse responses", {str(i): plot_cema.responses(block, 100) for i, block in enumerate(blocks)},
                       {str(i): layer.mega.cema(impulse, state)[0][0].T for i, layer in enumerate(model.layers)}, 1e-10)
    wide = load_file(TINYSTORIES / "model.safetensors")
    checks.compare("bf16 is read", {"delta": blocks[3]["delta"]},
                   {"delta": wide["layers.3.mega.cema.delta"].double()[..., 0]}, 0)
    draw(checks, "plot_cema.py", TINYSTORIES, "--out", out, "--blocks", "5,0", "--lags", "12")
    draw(checks, "plot_cema.py", TINYSTORIES, "--out", out, "--blocks", "6", bad="from 0 to 5, found 6")
    draw(checks, "plot_cema.py", TINYSTORIES, "--out", out, "--lags", "1", bad="2 or more")
    draw(checks, "plot_cema.py", ROOT / "README.md", "--out", out, bad="no safetensors file")
    draw(checks, "plot_cema.py", folder / "absent", "--out", out, bad="absent")
    draw(checks, "plot_cema.py", ROOT / "tests/golden/base.safetensors", "--out", out, bad="is it a Megalodon?")


def test_block(checks, folder):
    """The picture in doc/ is the one that the script draws."""
    out = folder / "block.svg"
    draw(checks, "draw_block.py", out)
    xml.dom.minidom.parse(str(out))
    checks.check("doc/block.svg is current", out.read_bytes() == (ROOT / "doc/block.svg").read_bytes())
    draw(checks, "draw_block.py", folder / "block.png", bad="FILE.svg")
    draw(checks, "draw_block.py", folder / "absent/block.svg", bad="absent/block.svg")


def test_docs(checks):
    """Every picture that a page shows is there, is small, and is shown somewhere."""
    pages = [ROOT / "README.md", *sorted((ROOT / "doc").glob("*.md")), *sorted((ROOT / "models").rglob("*.md"))]
    shown = set()
    for page in pages:
        for link in re.findall(r"!\[[^]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            path = (page.parent / link).resolve()
            shown.add(path)
            checks.check(f"{page.name}: {link}", path.is_file() and path.stat().st_size < 200_000)
    files = {path.resolve() for kind in ("png", "svg") for path in (ROOT / "doc").rglob(f"*.{kind}")}
    checks.check("pictures of doc/ that no page shows", files <= shown, str(files - shown))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=ROOT)
    programs = Programs(parser.parse_args().bin.resolve())
    checks = Checks("test_pictures")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        test_logs(checks, folder)
        test_cema(checks, programs, folder)
        test_block(checks, folder)
        test_docs(checks)
    checks.finish()


if __name__ == "__main__":
    main()
