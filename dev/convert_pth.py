#!/usr/bin/env python3
"""convert_pth.py - checkpoints between the released PyTorch implementation and this project, both ways.

    python3 dev/convert_pth.py released/ --out model.safetensors      a folder: config.json, consolidated.pth
    python3 dev/convert_pth.py weights.pth --chunk-size 2048 --out model.safetensors      one file of weights
    python3 dev/convert_pth.py runs/mine --out released/              the other way: a folder that it loads
    python3 dev/convert_pth.py runs/mine --out weights.pth            the weights alone

Parameters have the same names on both sides. The released files also hold buffers that follow from the sizes:
the frequencies of RoPE, and a prior for each TimestepNorm, which the released sizes leave empty. Numbers are
copied bit for bit, in the type that they have. Needs torch and safetensors. Only tensors are read from a .pth
file: it is a pickle, which could otherwise run any program.
"""
import argparse
import json
import pickle
import re
import sys
import warnings
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

sys.path.insert(0, str(Path(__file__).resolve().parent))
from megalodon_torch import MODEL_FORMAT, Config, Megalodon, model_file, save  # noqa: E402

PRIOR = ("prior_count", "prior_mean", "prior_logv")
# What weights without a configuration may not tell, and what is assumed then; None: the user has to say it.
ASSUMED = {"chunk_size": None, "num_heads": None, "norm_num_groups": None, "norm_eps": 1e-5,
           "rope_base": 10000.0, "scale_emb": False}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The dimension that a model-parallel run splits over its ranks; all else is the same on every rank.
SPLIT = ((r"embed\.weight|output\.output\.weight|.*\.(wh2|fc2)\.weight|.*\.mega\.(gamma|beta)", 1),
         (r".*\.cema\..*|.*\.(timenorm|final_norm)\.(weight|bias|prior_mean|prior_logv)", 0),
         (r".*\.(wz|wv|wr|wh1)\.(weight|bias)|.*\.(fc1|fc3)\.weight", 0))


class ConvertError(ValueError):
    """Something is wrong with what the user gave; the sentence says what."""


def expected_tensors(config):
    """Name -> shape of every parameter of a configuration."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Megalodon(config).state_dict().items()}


def check_tensors(config, tensors):
    """Are they the parameters of this configuration? ConvertError: the first one that is not."""
    expected = expected_tensors(config)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ConvertError(f"{name}: expected the shape {list(expected[name])}, found no such tensor")
        if name not in expected:
            raise ConvertError(f"{name}: a Megalodon of this configuration has no such tensor")
        if tuple(tensors[name].shape) != expected[name]:
            raise ConvertError(f"{name}: expected the shape {list(expected[name])}, found "
                               f"{list(tensors[name].shape)}")


def rope_frequencies(z, base):
    return base ** (-torch.arange(0, z, 2, dtype=torch.float64) / z)


# ----------------------------------------------------------------------------------------------------
# From the released implementation.

def read_pth(path):
    """The tensors of one .pth file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")              # about pickles that are refused all the same
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConvertError(f"{path}: there is no such file") from None
    except pickle.UnpicklingError:
        raise ConvertError(f"{path}: holds more than tensors, which could run a program; not read") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise ConvertError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ConvertError(f"{path}: expected a state dict, names with tensors, found something else")
    return state


def merge(shards):
    """One state dict of those of all ranks of a model-parallel run."""
    if len({frozenset(shard) for shard in shards}) > 1:
        raise ConvertError("the files of the ranks do not hold the same names")
    out = {}
    for name, first in shards[0].items():
        parts = [shard[name] for shard in shards]
        dim = next((dim for pattern, dim in SPLIT if re.fullmatch(pattern, name)), None)
        if dim is None and not all(torch.equal(first, part) for part in parts):
            raise ConvertError(f"{name}: expected the same numbers on every rank, found different ones")
        out[name] = first if dim is None else torch.cat(parts, dim)
    return out


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConvertError(f"{path}: there is no such file; the folder should have config.json, "
                           "consolidate_config.json and consolidated.pth") from None
    except (OSError, ValueError) as error:
        raise ConvertError(f"{path}: {error}") from None


def read_released(path):
    """The state dict of a file, or of a folder with all its ranks, and the folder's configuration or {}."""
    path = Path(path)
    if not path.is_dir():
        return read_pth(path), {}
    if list(path.glob("model.ckpt.*.pth")) and not list(path.glob("consolidated*.pth")):
        raise ConvertError(f"{path}: is a training checkpoint, cut into pieces; consolidate it first")
    ranks = read_json(path / "consolidate_config.json").get("model_parallel_size")
    if not isinstance(ranks, int) or ranks < 1:
        raise ConvertError(f"{path}/consolidate_config.json: expected model_parallel_size, 1 or more")
    names = ["consolidated.pth"] if ranks == 1 else [f"consolidated.{rank:02d}.pth" for rank in range(ranks)]
    return merge([read_pth(path / name) for name in names]), read_json(path / "config.json").get("model", {})


def sizes_of(state):
    """The fields of the configuration that the tensors themselves tell."""
    def shape(name):
        if name not in state:
            raise ConvertError(f"{name}: expected this tensor, found none; is this a Megalodon?")
        return state[name].shape

    mega, nffn = "layers.0.mega.", "layers.0.nffn."
    blocks = [int(found[1]) for name in state if (found := re.match(r"layers\.(\d+)\.", name))]
    sizes = {"vocab_size": shape("embed.weight")[0], "model_dim": shape("embed.weight")[1],
             "num_layers": max(blocks, default=-1) + 1,
             "z_dim": shape(mega + "wz.weight")[0], "value_dim": shape(mega + "wv.weight")[0],
             "cema_ndim": shape(mega + "cema.alpha")[1], "ffn_hidden_dim": shape(nffn + "fc1.weight")[0],
             "swiglu": nffn + "fc3.weight" in state, "rescale_nffn": nffn + "alpha" in state,
             "norm_affine": nffn + "norm.weight" in state}
    if "output.final_norm.prior_mean" in state:
        sizes["norm_num_groups"] = state["output.final_norm.prior_mean"].numel()
    if "rope.freqs" in state:
        frequencies = state["rope.freqs"].double()
        sizes["num_heads"] = sizes["z_dim"] // (2 * len(frequencies))
        if len(frequencies) > 1:                         # the second is base^(-2/z)
            sizes["rope_base"] = float(f"{frequencies[1].item() ** -len(frequencies):.4g}")
    return sizes


def configure(state, conf, given):
    """The configuration that fits the tensors. conf: the released one, {} if there is none; given: fields
    that the user says, or None. What the tensors tell must agree with both."""
    sizes, ours = sizes_of(state), {field.name for field in fields(Config)}
    told = {name: value for name, value in conf.items() if name in ours and value not in (None, -1)}
    if conf:
        told.setdefault("rope_base", 10000.0)
    if conf.get("output_size", -1) not in (-1, sizes["vocab_size"]):
        raise ConvertError(f"config.json: output_size {conf['output_size']}: expected vocab_size, which is "
                           f"{sizes['vocab_size']}; other sizes are not supported")
    for name, value in given.items():
        if value is not None and name in told:
            raise ConvertError(f"--{name.replace('_', '-')} does nothing here: config.json says {told[name]}")
    told.update({name: value for name, value in given.items() if value is not None})
    rounding = 1e-3 if state.get("rope.freqs", torch.empty(0)).dtype == torch.float32 else 0.5
    for name, value in sizes.items():
        known = told.setdefault(name, value)
        close = abs(known - value) <= rounding * abs(value) if name == "rope_base" else known == value
        if not close:
            raise ConvertError(f"{name}: the tensors say {value}, the configuration {known}")
    told.setdefault("share_emb", torch.equal(state["embed.weight"], state["output.output.weight"])
                    if "output.output.weight" in state else True)
    for name, value in ASSUMED.items():
        if told.setdefault(name, value) is None:
            raise ConvertError(f"{name}: the tensors do not tell it; give --{name.replace('_', '-')} N")
    return Config(**told)


def from_released(state, conf=None, **given):
    """A released state dict as (Config, tensors) of this project. ConvertError: what does not fit."""
    config = configure(state, conf or {}, given)
    tensors = dict(state)
    if "rope.freqs" in tensors:
        found = tensors.pop("rope.freqs")
        wanted = rope_frequencies(config.z_dim // config.num_heads, config.rope_base)
        tolerance = 1e-5 if found.dtype == torch.float32 else 1e-2
        if found.shape != wanted.shape or not torch.allclose(found.double(), wanted, rtol=tolerance, atol=0):
            raise ConvertError(f"rope.freqs: expected powers of rope_base {config.rope_base:g}, found others")
    for name in [name for name in tensors if name.endswith(PRIOR)]:
        if tensors.pop(name).count_nonzero():
            raise ConvertError(f"{name}: expected 0, found a prior; this project has none")
    if config.share_emb and "output.output.weight" in tensors:
        if not torch.equal(tensors.pop("output.output.weight"), tensors["embed.weight"]):
            raise ConvertError("output.output.weight: expected the embedding, which share_emb ties it to, "
                               "found another matrix")
    check_tensors(config, tensors)
    return config, tensors


# ----------------------------------------------------------------------------------------------------
# To the released implementation.

def read_ours(path):
    """Configuration and tensors of a checkpoint of this project."""
    path = model_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != MODEL_FORMAT:
                raise ConvertError(f"{path}: is not a model of this project")
            config = Config.from_json(facts["config"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise ConvertError(f"{path}: {error}") from None
    check_tensors(config, tensors)
    return config, tensors


def to_released(config, tensors):
    """The state dict that the released implementation loads without a missing or an unexpected name."""
    state, G = dict(tensors), config.norm_num_groups
    if config.share_emb:
        state["output.output.weight"] = state["embed.weight"]
    for norm in [f"layers.{i}.mega.timenorm" for i in range(config.num_layers)] + ["output.final_norm"]:
        state[f"{norm}.prior_count"] = torch.tensor(0, dtype=torch.int64)
        state[f"{norm}.prior_mean"], state[f"{norm}.prior_logv"] = torch.zeros(G), torch.zeros(G)
    state["rope.freqs"] = rope_frequencies(config.z_dim // config.num_heads, config.rope_base).float()
    return state


def write_released(out, config, state):
    """Writes a .pth file, or a folder with the configuration beside it."""
    out = Path(out)
    if out.suffix == ".pth":
        torch.save(state, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    torch.save(state, out / "consolidated.pth")
    facts = {"model_parallel_size": 1, "dtype": DTYPES.get(state["embed.weight"].dtype, "fp32")}
    (out / "consolidate_config.json").write_text(json.dumps(facts) + "\n")
    whole = {"model": {**asdict(config), "output_size": -1}, "tokenizer": {"path": None}}
    (out / "config.json").write_text(json.dumps(whole, indent=1) + "\n")


def convert(args):
    source = Path(args.source)
    given = {name: getattr(args, name) for name in ASSUMED} | {"scale_emb": True if args.scale_emb else None}
    if not source.exists():
        raise ConvertError(f"{source}: there is no such file or folder")
    released = source.suffix in (".pth", ".pt") or (source.is_dir() and list(source.glob("*.pth")))
    if released:
        if args.out.suffix != ".safetensors":
            raise ConvertError(f"--out {args.out}: expected a name that ends in .safetensors")
        state, conf = read_released(source)
        config, tensors = from_released(state, conf, **given)
        save(args.out, tensors, {"format": MODEL_FORMAT, "config": json.dumps(asdict(config))})
        if not conf:
            print(f"no config.json: took norm_eps {config.norm_eps:g}, scale_emb {config.scale_emb}, share_emb "
                  f"{config.share_emb}, rope_base {config.rope_base:g}")
    else:
        if idle := [name for name, value in given.items() if value is not None]:
            raise ConvertError(f"--{idle[0].replace('_', '-')} does nothing here: {source} says it")
        if args.out.suffix == ".safetensors":
            raise ConvertError(f"--out {args.out}: expected a folder or a name that ends in .pth")
        config, tensors = read_ours(source)
        write_released(args.out, config, to_released(config, tensors))
    count = sum(value.numel() for value in tensors.values())
    print(f"{args.out}: {len(tensors)} tensors, {count:,} parameters, {config.num_layers} blocks of width "
          f"{config.model_dim}")


def main():
    parser = argparse.ArgumentParser(
        description="Converts checkpoints between this project and the released implementation of Megalodon; "
                    "the source decides the direction.")
    parser.add_argument("source", metavar="SOURCE",
                        help="a .pth file or a folder of the released code; or a model file, the folder of a "
                             "step or of a run of this project")
    parser.add_argument("--out", type=Path, required=True, metavar="PATH",
                        help="model.safetensors; or, the other way, a folder or a .pth file")
    only = parser.add_argument_group("only for weights without their config.json")
    only.add_argument("--chunk-size", type=int, metavar="N", help="tokens of a chunk")
    only.add_argument("--num-heads", type=int, metavar="N", help="attention heads, if there is no rope.freqs")
    only.add_argument("--norm-num-groups", type=int, metavar="N", help="groups, if no norm has a prior")
    only.add_argument("--norm-eps", type=float, metavar="X", help="epsilon of every norm [1e-5]")
    only.add_argument("--rope-base", type=float, metavar="X", help="if there is no rope.freqs [10000]")
    only.add_argument("--scale-emb", action="store_true", help="embeddings are multiplied by sqrt(D)")
    try:
        convert(parser.parse_args())
    except (ConvertError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
