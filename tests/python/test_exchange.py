#!/usr/bin/env python3
"""Compares dev/megalodon_torch.py with the recorded results and with our own programs, and checks that files go both
ways: safetensors, states, and the released implementation's .pth.

    python3 tests/python/test_exchange.py [--bin FOLDER]
"""
import argparse
import contextlib
import io
import json
import pickle
import re
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from checks import ROOT, Checks, Programs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_pth
import megalodon_torch
from megalodon_torch import Config, Megalodon

TINYSTORIES = ROOT / "models/tinystories/model.safetensors"
VALID = ROOT / "data/tinystories_valid.txt"
# Together every option in both of its values, odd sizes, and chunks that end inside, at and after a call.
CONFIGS = {
    "plain": Config(num_layers=2, model_dim=30, num_heads=3, z_dim=12, value_dim=36, ffn_hidden_dim=20, cema_ndim=3,
                    chunk_size=7, norm_num_groups=5, vocab_size=61, swiglu=False, norm_affine=False, norm_eps=1e-3),
    "options": Config(num_layers=2, model_dim=48, num_heads=2, z_dim=24, value_dim=64, ffn_hidden_dim=40, cema_ndim=16,
                      chunk_size=80, norm_num_groups=4, vocab_size=256, swiglu=True, rescale_nffn=True, scale_emb=True,
                      share_emb=True, rope_base=10000.0),
    "short": Config(num_layers=1, model_dim=8, num_heads=1, z_dim=4, value_dim=8, ffn_hidden_dim=8, cema_ndim=1,
                    chunk_size=1, norm_num_groups=1, vocab_size=10, rescale_nffn=True),
}


def shaken(config, seed):
    """A model whose every parameter counts: none of the weights and biases that start at zero is left there."""
    torch.manual_seed(seed)
    model = Megalodon(config)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.2 * torch.randn_like(value))
    return model


def run(model, tokens, targets, state=None):
    """Logits, loss and the state after, with the gradients in model and in `state`."""
    model.zero_grad()
    logits, after = model(tokens.long(), state)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.long().flatten())
    loss.backward()
    return logits, loss, after


def gradients(model):
    return {name: value.grad for name, value in model.named_parameters()}


def starting_with(prefix, tensors):
    return {name[len(prefix):]: value for name, value in tensors.items() if name.startswith(prefix)}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers.

def test_golden(checks):
    """The recorded results of the released model's equations, in double and in float."""
    for path in sorted((ROOT / "tests/golden").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            config, facts = Config.from_json(file.metadata()["config"]), file.metadata()
        want = load_file(path)
        for dtype, tolerances in ((torch.float64, (1e-6, 1e-6)), (torch.float32, (1e-5, 1e-4))):
            what = f"golden {path.stem}, {'double' if dtype == torch.float64 else 'float'}"
            model = Megalodon(config).to(dtype)
            model.load_state_dict({name: value.to(dtype) for name, value in starting_with("param.", want).items()})
            state, given = None, starting_with("state_in.", want)
            if given:
                like = model.empty_state(len(want["input.tokens"]))
                state = {name: given[name].to(like[name]).requires_grad_(name != "count") for name in like}
                state["count"] = state["count"].expand(len(want["input.tokens"]))
            logits, loss, after = run(model, want["input.tokens"], want["input.targets"], state)
            checks.compare(f"{what}, logits and loss", {"logits": logits, "loss": loss.view(1)},
                           {"logits": want["act.logits"], "loss": want["loss"]}, tolerances[0])
            checks.compare(f"{what}, state", {name: value for name, value in after.items() if name != "count"},
                           {name: value for name, value in starting_with("state_out.", want).items()
                            if name != "count"}, tolerances[0])
            checks.check(f"{what}: count", (after["count"] == want["state_out.count"]).all())
            found = {**gradients(model),
                     **{f"state_in.{name}": value.grad for name, value in (state or {}).items() if name != "count"}}
            checks.compare(f"{what}, gradients", found, starting_with("grad.", want), tolerances[1])
        if "adamw" in facts:
            train_golden(checks, config, want, json.loads(facts["adamw"]))


def train_golden(checks, config, want, adamw):
    """Ten steps of PyTorch's AdamW are ten of ours."""
    model = Megalodon(config).double()
    model.load_state_dict({name: value.double() for name, value in starting_with("param.", want).items()})
    optimiser = torch.optim.AdamW(model.parameters(), lr=adamw["lr"], betas=(adamw["beta1"], adamw["beta2"]),
                                  eps=adamw["eps"], weight_decay=adamw["weight_decay"])
    losses, norms = [], []
    for tokens in want["train.tokens"]:
        losses.append(run(model, tokens[:, :-1], tokens[:, 1:])[1].detach())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), adamw["clip"]))
        optimiser.step()
    checks.compare("golden train, ten steps", {"losses": torch.stack(losses), "grad_norms": torch.stack(norms)},
                   {"losses": want["train.losses"], "grad_norms": want["train.grad_norms"]}, 1e-6)
    checks.compare("golden train, parameters after them", dict(model.named_parameters()),
                   starting_with("train.param.", want), 1e-6)


def test_programs(checks, programs, folder):
    """Logits, activations, state and gradients of our own program, on the same files and tokens."""
    cases = [(name, None, 3 * config.chunk_size + 5, ()) for name, config in CONFIGS.items()]
    cases += [("tinystories", TINYSTORIES, 2 * 512 + 76, ("--data", VALID))]
    for name, path, length, options in cases:
        if path is None:
            path = folder / f"{name}.safetensors"
            shaken(CONFIGS[name], 1).save(path)
        dump = folder / "dump.safetensors"
        programs.run("numdiff", "--a", "cpu", "--dump", dump, "--dump-params", "--checkpoint", path, "--seq-len", length,
                     *options)
        want, model = load_file(dump), Megalodon.load(path)
        acts = {}
        for i, layer in enumerate(model.layers):
            layer.mega.register_forward_hook(lambda m, a, out, i=i: acts.update({f"layers.{i}.mega": out[0]}))
            layer.register_forward_hook(lambda m, a, out, i=i: acts.update({f"layers.{i}.block": out[0]}))
        model.output.final_norm.register_forward_hook(lambda m, a, out: acts.update({"final_norm": out[0]}))
        model.eval()
        logits, loss, after = run(model, want["input.tokens"], want["input.targets"])
        checks.same_bits(f"{name}, parameters that the program read", dict(model.named_parameters()),
                         starting_with("param.", want))
        what = f"{name}, {length} tokens in chunks of {model.config.chunk_size}"
        checks.compare(f"{what}, logits and loss", {"logits": logits, "loss": loss.view(1)},
                       {"logits": want["act.logits"], "loss": want["loss"]}, 1e-5)
        checks.compare(f"{what}, activations", acts, {key: want[f"act.{key}"] for key in acts}, 1e-5)
        checks.compare(f"{what}, state", after, starting_with("state_out.", want), 1e-5)
        checks.compare(f"{what}, gradients", gradients(model), starting_with("grad.", want), 1e-4)


def test_pieces(checks):
    """Any division into calls gives the same logits, the same state and, through it, the same gradients."""
    for name, sizes in (("plain", (1, 6, 7, 3, 11, 1, 20)), ("options", (79, 2, 64, 65, 80, 1, 9))):
        model = shaken(CONFIGS[name], 2).double()
        tokens = torch.randint(model.config.vocab_size, (2, sum(sizes) + 1))
        whole, _, after = run(model, tokens[:, :-1], tokens[:, 1:])
        want = {key: value.clone() for key, value in gradients(model).items()}
        model.zero_grad()
        state, logits = None, []
        for piece in tokens[:, :-1].split(sizes, dim=1):
            out, state = model(piece, state)
            logits.append(out)
        logits = torch.cat(logits, 1)
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        checks.compare(f"{name}, {len(sizes)} pieces", {"logits": logits, **state}, {"logits": whole, **after}, 1e-10)
        checks.compare(f"{name}, gradients through {len(sizes)} pieces", gradients(model), want, 1e-10)


def test_initial(checks, programs, folder):
    """PyTorch's initial values are drawn from the distributions of ours."""
    sizes = ["--num-layers", "2", "--model-dim", "96", "--ffn-hidden-dim", "64", "--value-dim", "128", "--rescale-nffn",
             "true", "--norm-num-groups", "8", "--chunk-size", "8"]
    programs.run("numdiff", "--a", "cpu", "--dump", folder / "init.safetensors", "--dump-params", *sizes)
    with safe_open(folder / "init.safetensors", framework="pt") as file:
        config = Config.from_json(file.metadata()["config"])
    want = starting_with("param.", load_file(folder / "init.safetensors"))
    torch.manual_seed(3)
    found = dict(Megalodon(config).named_parameters())
    checks.check("initial values: names", found.keys() == want.keys())
    fixed = [name for name, value in want.items() if name.endswith("theta") or value.min() == value.max()]
    checks.compare("initial values that are fixed but for their order",
                   *({name: side[name].detach().flatten().sort().values for name in fixed} for side in (found, want)),
                   1e-6)
    for name, value in want.items():
        a, b = found[name].detach().flatten(), value.flatten()
        if name not in fixed:
            ratio = (a.square().mean().sqrt() / b.square().mean().sqrt()).item()
            sure = 6 / len(b) ** 0.5                     # six standard deviations of such a ratio
            checks.check(f"initial {name}: deviation", abs(ratio - 1) < sure, f"{ratio:.3f} times ours")


# ----------------------------------------------------------------------------------------------------------------------
# Files.

def test_config(checks):
    """The fields, types and defaults of megalodon.h."""
    rows = re.findall(r"^    X\((int|bool|double), +(\w+), +([\w.-]+),", (ROOT / "megalodon.h").read_text(), re.M)
    types = {"int": int, "bool": bool, "double": float}
    want = [(name, types[kind], types[kind](default) if kind != "bool" else default == "true")
            for kind, name, default in rows]
    checks.check("configuration", want == [(f.name, f.type, f.default) for f in fields(Config)],
                 f"megalodon.h has {want}")


def test_safetensors(checks, programs, folder):
    """What our programs write opens with the package as it is: a run's model, its moments, a state."""
    from safetensors.numpy import load_file as load_numpy
    sizes = ["--num-layers", "2", "--model-dim", "16", "--z-dim", "8", "--value-dim", "16", "--ffn-hidden-dim", "16",
             "--cema-ndim", "4", "--chunk-size", "16", "--norm-num-groups", "4"]
    programs.run("train", "--data", VALID, "--steps", "2", "--batch", "2", "--seq-len", "24", "--checkpoint-dir",
                 folder / "run", "--quiet", *sizes)
    model = Megalodon.load(folder / "run")
    step = folder / "run" / (folder / "run/latest").read_text().strip()
    found = {name: torch.from_numpy(value) for name, value in load_numpy(step / "model.safetensors").items()}
    checks.same_bits("a run's model, through numpy", found, {k: v.detach() for k, v in model.named_parameters()})
    moments = load_numpy(step / "trainer.safetensors")
    want = {f"moment{i}.{name}": tuple(value.shape) for i in (1, 2) for name, value in model.named_parameters()}
    checks.check("a run's moments", {name: value.shape for name, value in moments.items()} == want)
    checks.check("a run's moments are numbers", all((value == value).all() for value in moments.values()))
    model = Megalodon.load(TINYSTORIES)
    found = load_file(TINYSTORIES)
    checks.check("models/tinystories is in bf16", all(value.dtype == torch.bfloat16 for value in found.values()))
    checks.same_bits("models/tinystories", {k: v.float() for k, v in found.items()},
                     {k: v.detach() for k, v in model.named_parameters()})


def test_states(checks, programs, folder):
    """A text that our program begins and PyTorch continues, and the other way round."""
    text, first = VALID.read_bytes()[:2000], 1300
    (folder / "first.txt").write_bytes(text[:first])
    (folder / "all.txt").write_bytes(text)
    programs.run("generate", "--prompt-file", folder / "first.txt", "--max-tokens", "0", "--backend", "cpu",
                 "--save-state", folder / "ours.state")
    model = Megalodon.load(TINYSTORIES).eval()
    tokens = torch.tensor([list(text)])
    with torch.no_grad():
        logits, state = model(tokens[:, :first])
        want, last = model.load_state(folder / "ours.state")
        checks.compare(f"state of generate after {first} tokens", {"last_logits": logits[:, -1], **state},
                       {"last_logits": last, **want}, 1e-5)
        logits, state = model(tokens[:, first:], want)
        model.save_state(folder / "torch.state", state, logits[:, -1], TINYSTORIES)
    greedy = ["--max-tokens", "200", "--temperature", "0", "--backend", "cpu"]
    alone = programs.run("generate", "--prompt-file", folder / "all.txt", *greedy)
    together = programs.run("generate", "--load-state", folder / "torch.state", *greedy)
    checks.check("generate goes on from PyTorch's state", together == alone and len(alone) >= 200,
                 f"{together[:80]} and {alone[:80]}")
    checks.bytes += len(alone)
    refused = programs.attempt([programs.folder / "generate", "--load-state", folder / "wrong.state", "--max-tokens", 1])
    checks.check("a state that is not there", refused.returncode == 1)
    written = Megalodon(CONFIGS["options"])
    try:
        written.load_state(folder / "options.safetensors")
        checks.check("a model is no state", False)
    except ValueError as error:
        checks.check("a model is no state", megalodon_torch.STATE_FORMAT in str(error))


# ----------------------------------------------------------------------------------------------------------------------
# The released implementation's files.

def as_bits(tensors):
    return {name: value.detach() for name, value in tensors.items()}


def convert(*args):
    """Runs the converter in this process, which has PyTorch at hand: status, stdout and stderr."""
    out, err, status, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = ["convert_pth.py", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            convert_pth.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        err.write("" if isinstance(end.code, int) else f"{end.code}\n")
    finally:
        sys.argv = argv
    return status, out.getvalue(), err.getvalue()


def test_pth(checks, programs, folder):
    """There and back, as a folder, as a single file and as the files of two ranks, in float and in bf16."""
    for name, path in [(name, folder / f"{name}.safetensors") for name in CONFIGS] + [("tinystories", TINYSTORIES)]:
        want, out = load_file(path), folder / f"{name}_released"
        there = convert(path, "--out", out)
        state = torch.load(out / "consolidated.pth", weights_only=True)
        back = convert(out, "--out", folder / "back.safetensors")
        checks.check(f"{name} to .pth and back", there[0] == back[0] == 0, there[2] + back[2])
        checks.same_bits(f"{name} to .pth and back", load_file(folder / "back.safetensors"), want)
        config = Megalodon.load(path).config
        checks.check(f"{name}: configuration", Megalodon.load(folder / "back.safetensors").config == config)
        extra = {"rope.freqs"} | {f"{norm}.{x}" for x in convert_pth.PRIOR for norm in
                                  ["output.final_norm"] + [f"layers.{i}.mega.timenorm" for i in range(config.num_layers)]}
        checks.check(f"{name}: names of the released code",
                     state.keys() == want.keys() | extra | {"output.output.weight"}, str(state.keys() ^ want.keys()))
        programs.run("numdiff", "--dump", folder / "d", "--checkpoint", folder / "back.safetensors", "--seq-len", "3")
        alone = {"chunk_size": config.chunk_size, "norm_eps": config.norm_eps, "scale_emb": config.scale_emb or None}
        found, tensors = convert_pth.from_released(state, **alone)
        expected = {**asdict(config), "dropout": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        if config.z_dim // config.num_heads == 2:        # one frequency, which is 1 for every base
            expected["rope_base"] = found.rope_base
        checks.check(f"{name}: configuration from the tensors", asdict(found) == expected, str(found))
        checks.same_bits(f"{name} from its .pth alone", as_bits(tensors), want)
    test_ranks(checks, folder)


def split_dimension(name):
    """What the released layers split over ranks; written down anew, so that a mistake in the converter shows."""
    name = re.sub(r"^layers\.\d+\.", "", name)
    if name in ("rope.freqs", "mega.rmsnorm.weight", "nffn.norm.weight", "nffn.norm.bias", "nffn.alpha") \
            or name.endswith("prior_count"):
        return None
    return 1 if name in ("embed.weight", "output.output.weight", "mega.wh2.weight", "nffn.fc2.weight", "mega.gamma",
                         "mega.beta") else 0


def write_ranks(out, state, ranks):
    """Puts the files of a model-parallel run into a folder that has config.json: each rank has its part of what is
    split, and all of the rest."""
    for rank in range(ranks):
        part = {}
        for name, value in state.items():
            dim = split_dimension(name)
            part[name] = value if dim is None else value.chunk(ranks, dim)[rank].clone()
        torch.save(part, out / f"consolidated.{rank:02d}.pth")
    (out / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": ranks, "dtype": "fp32"}))
    (out / "consolidated.pth").unlink(missing_ok=True)


def test_ranks(checks, folder):
    """A checkpoint of two ranks is merged, if they agree."""
    source, out = folder / "options_released", folder / "ranks"
    out.mkdir()
    (out / "config.json").write_text((source / "config.json").read_text())
    state = torch.load(source / "consolidated.pth", weights_only=True)
    write_ranks(out, state, 2)
    status, _, err = convert(out, "--out", folder / "merged.safetensors")
    if checks.check("two ranks", status == 0, err):
        checks.same_bits("two ranks", load_file(folder / "merged.safetensors"), load_file(folder / "options.safetensors"))
    part = torch.load(out / "consolidated.01.pth", weights_only=True)
    part["layers.0.nffn.alpha"] = part["layers.0.nffn.alpha"] + 1
    torch.save(part, out / "consolidated.01.pth")
    status, _, err = convert(out, "--out", folder / "never.safetensors")
    checks.check("ranks that disagree", status == 1 and "layers.0.nffn.alpha" in err, err)


class Program:
    """What a pickle could do to its reader."""

    def __reduce__(self):
        return print, ("a program ran",)


def test_bad_pth(checks, folder):
    """Each mistake ends in one sentence and status 1, and leaves no file."""
    good = torch.load(folder / "plain_released/consolidated.pth", weights_only=True)
    conf = json.loads((folder / "plain_released/config.json").read_text())
    config, tensors = convert_pth.read_ours(folder / "plain.safetensors")
    wrong = folder / "wrong"

    def refused(text, *args, out="never.safetensors"):
        status, printed, err = convert(*args, "--out", folder / out)
        lines = err.splitlines()
        checks.check(f'expected an error with "{text}"', status == 1 and len(lines) == 1
                     and lines[0].startswith("error: ") and text in lines[0] and "a program ran" not in printed
                     and not (folder / "never.safetensors").exists(), err[-300:])

    def weights(change):
        state = dict(good)
        change(state)
        torch.save(state, folder / "bad.pth")
        return folder / "bad.pth", "--chunk-size", 7

    def folder_with(model=conf["model"], state=good, ranks=1):
        wrong.mkdir(exist_ok=True)
        torch.save(state, wrong / "consolidated.pth")
        (wrong / "config.json").write_text(json.dumps({"model": model}))
        (wrong / "consolidate_config.json").write_text(json.dumps({"model_parallel_size": ranks}))
        return wrong

    alone = Programs.attempt([sys.executable, ROOT / "dev/convert_pth.py", "absent.pth", "--out", "never.safetensors"])
    checks.check("the converter as a program", alone.returncode == 1 and alone.stderr.startswith(b"error: absent.pth"))
    refused("no such file", folder / "absent.pth")
    refused("give --chunk-size", folder / "plain_released/consolidated.pth")
    refused("embed.weight", *weights(lambda s: s.pop("embed.weight")))
    refused("layers.1.mega.wz.bias: expected the shape [12]", *weights(lambda s: s.pop("layers.1.mega.wz.bias")))
    refused("layers.1.mega.more", *weights(lambda s: s.update({"layers.1.mega.more": torch.zeros(3)})))
    refused("found [5]", *weights(lambda s: s.update({"layers.1.mega.wz.bias": torch.zeros(5)})))
    refused("found a prior", *weights(lambda s: s.update({"output.final_norm.prior_count": torch.tensor(3)})))
    refused("rope.freqs", *weights(lambda s: s.update({"rope.freqs": s["rope.freqs"].flip(0)})))
    refused("z_dim: the tensors say 12, the configuration 16", folder_with({**conf["model"], "z_dim": 16}))
    refused("rope_base", folder_with({**conf["model"], "rope_base": None}))
    refused("output_size", folder_with({**conf["model"], "output_size": 7}))
    refused("share_emb", folder_with({**conf["model"], "share_emb": True}))
    refused("does nothing here", folder_with(), "--chunk-size", 7)
    refused("model_parallel_size", folder_with(ranks=0))
    refused("consolidated.00.pth", folder_with(ranks=2))
    refused("does nothing here", folder / "plain.safetensors", "--chunk-size", 7, out="never")
    refused("ends in .safetensors", folder_with(), out="never.pth")
    refused("ends in .pth", folder / "plain.safetensors")
    refused("not a model of this project", folder / "torch.state", out="never")
    (folder / "program.pth").write_bytes(pickle.dumps({"embed.weight": Program()}))
    refused("could run a program", folder / "program.pth")
    torch.save({"embed.weight": Program()}, folder / "program.pth")
    refused("could run a program", folder / "program.pth")
    (folder / "cut.pth").write_bytes((folder / "plain_released/consolidated.pth").read_bytes()[:5000])
    refused("cut.pth", folder / "cut.pth", "--chunk-size", 7)
    save_file({name: value for name, value in tensors.items() if "wv" not in name}, folder / "lacks.safetensors",
              {"format": megalodon_torch.MODEL_FORMAT, "config": json.dumps(asdict(config))})
    refused("wv", folder / "lacks.safetensors", out="never")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=ROOT)
    programs = Programs(parser.parse_args().bin.resolve())
    torch.set_num_threads(2)
    checks = Checks("test_exchange")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        test_config(checks)
        test_golden(checks)
        test_programs(checks, programs, folder)
        test_pieces(checks)
        test_initial(checks, programs, folder)
        test_safetensors(checks, programs, folder)
        test_states(checks, programs, folder)
        test_pth(checks, programs, folder)
        test_bad_pth(checks, folder)
    checks.finish()


if __name__ == "__main__":
    main()
