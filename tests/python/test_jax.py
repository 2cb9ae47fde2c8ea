#!/usr/bin/env python3
"""Compares our program with the public package megalodon-jax, another implementation of the same model: logits of our
checkpoints by both, whole and in pieces, and a model of that package in our program. Files go through the converter.

    python3 tests/python/test_jax.py [--bin FOLDER]
"""
import argparse
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import equinox as eqx  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import megalodon_jax as mj  # noqa: E402
import torch  # noqa: E402
from checks import ROOT, Checks, Programs  # noqa: E402
from megalodon_jax.convert import (export_upstream_state_dict, load_upstream_checkpoint,  # noqa: E402
                                   load_upstream_state_dict)
from safetensors.torch import load_file  # noqa: E402

import convert_pth  # noqa: E402
from megalodon_torch import MODEL_FORMAT, save  # noqa: E402
from test_exchange import CONFIGS, TINYSTORIES, VALID, shaken, write_ranks  # noqa: E402


def jax_config(config):
    """Our configuration as that package's: the fields have the same names."""
    return mj.MegalodonConfig(**asdict(config))


def load(config, state):
    """The package's model with our parameters. Only the shapes of its own initial values are made."""
    model = eqx.filter_eval_shape(mj.MegalodonForCausalLM, jax_config(config), key=jax.random.key(0))
    return load_upstream_state_dict(model, state)


def logits_of(model, tokens):
    return eqx.filter_jit(lambda model, tokens: model(tokens)[0])(model, tokens)


def ours(programs, folder, path, length, *options):
    """Tokens (B,T) and the logits (B,T,V) that our program computes of them."""
    programs.run("numdiff", "--a", "cpu", "--dump", folder / "dump", "--checkpoint", path, "--seq-len", length, *options)
    dump = load_file(folder / "dump")
    return jnp.asarray(dump["input.tokens"].numpy()), dump["act.logits"]


def in_pieces(model, tokens, sizes):
    """The package's logits of pieces, its cache carried from one to the next."""
    forward = eqx.filter_jit(lambda model, piece, cache: model(piece, cache=cache, return_cache=True))
    cache, out, start = mj.init_cache(model.config), [], 0
    for size in sizes:
        logits, cache = forward(model, tokens[:, start:start + size], cache)
        out.append(logits)
        start += size
    return jnp.concatenate(out, 1)


def test_ours(checks, programs, folder):
    """Our checkpoints, the trained one among them."""
    # The package compiles a function for each length of a piece, which takes longer than running it.
    cases = [("plain", (4,) * 7), ("options", (48,) * 5), ("tinystories", (1100,))]
    for name, sizes in cases:
        path, options, length = folder / f"{name}.safetensors", (), sum(sizes)
        if name == "tinystories":
            path, options = TINYSTORIES, ("--data", VALID)
        else:
            shaken(CONFIGS[name], 4).save(path)
        config, tensors = convert_pth.read_ours(path)
        state = convert_pth.to_released(config, tensors)
        if name == "options":                            # from two ranks, which the package merges by itself
            convert_pth.write_released(folder / "ranks", config, state)
            write_ranks(folder / "ranks", state, 2)
            model = load_upstream_checkpoint(folder / "ranks", jax_config(config), key=jax.random.key(0))
        else:
            model = load(config, state)
        tokens, want = ours(programs, folder, path, length, *options)
        what = f"{name}, {length} tokens in chunks of {config.chunk_size}"
        checks.compare(what, {"logits": logits_of(model, tokens)}, {"logits": want}, 2e-5)
        if len(sizes) > 1:
            checks.compare(f"{what}, {len(sizes)} pieces", {"logits": in_pieces(model, tokens, sizes)},
                           {"logits": want}, 2e-5)


def test_theirs(checks, programs, folder):
    """A model that the package made, by way of the released names, in our program."""
    config = CONFIGS["plain"]
    model = eqx.filter_jit(mj.MegalodonForCausalLM)(jax_config(config), key=jax.random.key(1))
    torch.save(export_upstream_state_dict(model), folder / "theirs.pth")
    state, _ = convert_pth.read_released(folder / "theirs.pth")
    found, tensors = convert_pth.from_released(state, chunk_size=config.chunk_size, norm_eps=config.norm_eps)
    checks.check("a model of the package: configuration", found == config, str(found))
    save(folder / "theirs.safetensors", tensors, {"format": MODEL_FORMAT, "config": json.dumps(asdict(found))})
    tokens, want = ours(programs, folder, folder / "theirs.safetensors", 26)
    checks.compare("a model of the package, 26 tokens", {"logits": logits_of(model, tokens)}, {"logits": want}, 2e-5)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=ROOT)
    programs = Programs(parser.parse_args().bin.resolve())
    checks = Checks("test_jax")
    with tempfile.TemporaryDirectory() as name:
        test_ours(checks, programs, Path(name))
        test_theirs(checks, programs, Path(name))
    checks.finish()


if __name__ == "__main__":
    main()
