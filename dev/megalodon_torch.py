#!/usr/bin/env python3
"""megalodon_torch.py - Megalodon as a PyTorch module that reads and writes this project's files.

    from megalodon_torch import Megalodon
    model = Megalodon.load("models/tinystories")        # a file, the folder of a step, or a run's folder
    logits, state = model(tokens)                       # tokens (B,T); logits (B,T,V)
    logits, state = model(more_tokens, state)           # goes on after them
    model.save("model.safetensors")                     # ./generate --checkpoint model.safetensors

    python3 dev/megalodon_torch.py models/tinystories --prompt "Once upon a time"

It computes what megalodon.c computes, in a form that one can read beside doc/model.md: autograd makes the
backward, and nothing is done for speed that would hide a formula. Letters are those of megalodon.h. The
parameters have the names of the released implementation, so state_dict() is the checkpoint. Any T goes,
across chunks, with or without a state; a sequence in any pieces gives the same logits, and gradients flow
through the state from piece to piece.

Needs torch and safetensors, and a device that knows float64 (a CPU or an NVIDIA GPU).
"""
import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

MODEL_FORMAT, STATE_FORMAT = "megalodon-checkpoint-1", "megalodon-state-1"


@dataclass
class Config:
    """What fixes a model: MEGALODON_CONFIG_FIELDS of megalodon.h, with its defaults."""
    num_layers: int = 6
    model_dim: int = 384
    num_heads: int = 1
    z_dim: int = 96
    value_dim: int = 768
    ffn_hidden_dim: int = 768
    cema_ndim: int = 16
    chunk_size: int = 512
    norm_num_groups: int = 32
    vocab_size: int = 256
    swiglu: bool = True
    rescale_nffn: bool = False
    scale_emb: bool = False
    share_emb: bool = False
    norm_affine: bool = True
    norm_eps: float = 1e-5
    rope_base: float = 100000.0
    dropout: float = 0.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0

    @classmethod
    def from_json(cls, text):
        """Reads a configuration as files have it. ValueError: a key that is unknown or missing."""
        values, names = json.loads(text), {field.name for field in fields(cls)}
        if unknown := set(values) - names:
            raise ValueError(f"config: unknown key {min(unknown)}")
        if missing := {name for name in names - set(values) if "dropout" not in name}:
            raise ValueError(f"config: {min(missing)} is missing")
        return cls(**values)


# ----------------------------------------------------------------------------------------------------
# The operations that a Transformer does not have.

class TimestepNorm(nn.Module):
    """Normalises each group of D/G features by the moments of all steps so far, this one included."""

    def __init__(self, D, G, eps):
        super().__init__()
        self.G, self.eps = G, eps
        self.weight, self.bias = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))

    def forward(self, x, count, mean, var):
        """x (B,T,D) after count (B) steps with the moments mean, var (B,G): the output, and the moments then.
        The sums are double: there a mean square minus the square of a mean loses nothing that matters."""
        B, T, D = x.shape
        groups = x.double().view(B, T, self.G, -1)
        before = count.view(B, 1, 1).double()
        steps = before + torch.arange(1, T + 1, device=x.device).view(1, T, 1)
        first = (before * mean[:, None] + groups.mean(-1).cumsum(1)) / steps
        second = (before * (var + mean.square())[:, None] + groups.square().mean(-1).cumsum(1)) / steps
        var = second - first.square()                                                       # (B,T,G)
        y = (groups - first[..., None]) * torch.rsqrt(var + self.eps)[..., None]
        return y.view(B, T, D).to(x.dtype) * (1 + self.weight) + self.bias, first[:, -1], var[:, -1]


class CEMA(nn.Module):
    """h_t = q h_{t-1} + p u_t, y_t = Re(sum over k of c h_t) + omega u_t, with N complex states a channel."""
    BLOCK = 64                       # steps: a convolution inside of a block, the state from block to block

    def __init__(self, D, N):
        super().__init__()
        self.alpha = nn.Parameter(0.2 * torch.randn(D, N, 1))
        self.delta = nn.Parameter(0.2 * torch.randn(D, N, 1))
        turn = torch.exp(-math.log(D) / D * torch.arange(1, D + 1))[torch.randperm(D)]      # 1/D to nearly 1
        self.theta = nn.Parameter(torch.logit(turn).view(D, 1, 1))
        self.gamma = nn.Parameter(torch.stack([torch.randn(D, N), torch.zeros(D, N)], -1))
        self.omega = nn.Parameter(nn.init.trunc_normal_(torch.empty(D, 1), std=0.25, a=-1, b=1))

    def coefficients(self, steps):
        """p (D,N,1), the powers q^0 ... q^steps (D,N,steps+1) and c (D,N,1), in double."""
        a, d, s = (torch.sigmoid(w.double()) for w in (self.alpha, self.delta, self.theta))
        N, l = self.alpha.shape[1], torch.arange(steps + 1, device=a.device)
        k = torch.arange(1, N + 1, device=a.device).view(1, N, 1)
        powers = torch.polar((1 - a * d) ** l, l * k * s * (2 * math.pi / N))
        return a, powers, torch.view_as_complex(self.gamma.double())[..., None] / math.sqrt(N)

    def forward(self, u, h):
        """u (B,T,D) and the state h (B,D,N,2) before it: y (B,T,D) and the state after it."""
        B, T, D = u.shape
        M = min(self.BLOCK, T)
        p, powers, c = self.coefficients(M)
        kernel = (c * p * powers).sum(1).real                                               # K_l, (D,M+1)
        lag = torch.arange(M, device=u.device).view(M, 1) - torch.arange(M, device=u.device)
        toeplitz = torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0).to(u.dtype)        # (D,M,M): K_{i-j}
        wide = torch.view_as_complex(h)
        into, out, powers = ((p * powers).to(wide.dtype), (c * powers).to(wide.dtype), powers.to(wide.dtype))
        y = []
        for block in u.split(M, dim=1):
            m = block.shape[1]
            from_state = torch.einsum("dni,bdn->bid", out[..., 1:m + 1], wide).real         # Re(c q^{i+1} h)
            y.append(torch.einsum("dij,bjd->bid", toeplitz[:, :m, :m], block) + from_state)
            inputs = torch.einsum("bjd,dnj->bdn", block.to(wide.dtype), into[..., :m].flip(-1))
            wide = powers[..., m] * wide + inputs
        return torch.cat(y, 1) + self.omega.view(D) * u, torch.view_as_real(wide)


def rope(x, first, chunk, base):
    """Turns the pairs (2i, 2i+1) of x (B,T,H,z) by position * base^(-2i/z). Positions restart with each
    chunk; `first` is that of x[:, 0]."""
    T, z = x.shape[1], x.shape[3]
    position = (first + torch.arange(T, dtype=torch.float64, device=x.device)) % chunk
    angle = torch.outer(position, base ** (-torch.arange(0, z, 2, dtype=torch.float64, device=x.device) / z))
    cos, sin = angle.cos()[:, None].to(x.dtype), angle.sin()[:, None].to(x.dtype)           # (T,1,z/2)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def attention(q, k, v, k_past, v_past, chunk, dropout):
    """Each query sees the keys of its own chunk up to itself. q, k (B,T,H,z), v (B,T,H,e); k_past (B,n,H,z)
    and v_past (B,n,H,e) are those of the chunk that T continues. Returns (B,T,H,e), and the keys and values
    of the chunk that is unfinished then."""
    out, start, n = [], 0, k_past.shape[1]
    while start < q.shape[1]:
        size = min(chunk - n, q.shape[1] - start)                       # up to the end of this chunk
        keys = torch.cat([k_past, k[:, start:start + size]], 1)
        values = torch.cat([v_past, v[:, start:start + size]], 1)
        scores = torch.einsum("bihz,bjhz->bhij", q[:, start:start + size], keys)
        future = torch.ones(size, n + size, dtype=torch.bool, device=q.device).triu(n + 1)
        weights = dropout(torch.softmax(scores.masked_fill(future, -math.inf), -1))
        out.append(torch.einsum("bhij,bjhe->bihe", weights, values))
        start, n = start + size, (n + size) % chunk
        k_past, v_past = keys[:, :n], values[:, :n]                     # nothing where the chunk is full
    return torch.cat(out, 1), k_past, v_past


# ----------------------------------------------------------------------------------------------------
# The block and the model. Norm weights are stored as w and used as 1 + w.

class Norm(nn.Module):
    """Weight, and for LayerNorm a bias, that are absent without norm_affine."""

    def __init__(self, c, bias):
        super().__init__()
        self.eps, self.centered = c.norm_eps, bias
        self.weight = nn.Parameter(torch.zeros(c.model_dim)) if c.norm_affine else None
        self.bias = nn.Parameter(torch.zeros(c.model_dim)) if c.norm_affine and bias else None

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True) if self.centered else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        x = x if self.weight is None else x * (1 + self.weight)
        return x if self.bias is None else x + self.bias


def linear(inputs, outputs, bias):
    layer = nn.Linear(inputs, outputs, bias)
    nn.init.normal_(layer.weight, std=1 / math.sqrt(3 * inputs))
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def boundary(layer, D):
    """Initial values of the matrices between tokens and the width D."""
    nn.init.trunc_normal_(layer.weight, std=1 / math.sqrt(D), a=-3 / math.sqrt(D), b=3 / math.sqrt(D))
    return layer


class Mega(nn.Module):
    """The first half of a block: moving average, attention in the chunk, gate. Returns y, the first hop."""

    def __init__(self, c):
        super().__init__()
        D, Z, E = c.model_dim, c.z_dim, c.value_dim
        self.config = c
        self.timenorm, self.cema = TimestepNorm(D, c.norm_num_groups, c.norm_eps), CEMA(D, c.cema_ndim)
        self.rmsnorm = Norm(c, bias=False)
        self.wz, self.wv, self.wr = linear(D, Z, True), linear(D, E, True), linear(D, E, True)
        self.wh1, self.wh2 = linear(D, D, True), linear(E, D, False)
        self.gamma, self.beta = nn.Parameter(torch.zeros(2, Z)), nn.Parameter(torch.zeros(2, Z))
        self.dropout, self.hidden_dropout = nn.Dropout(c.dropout), nn.Dropout(c.hidden_dropout)
        self.attention_dropout = nn.Dropout(c.attention_dropout)

    def forward(self, x, count, state):
        c, (mean, var, h, k_past, v_past) = self.config, state
        B, T, _ = x.shape
        H, z = c.num_heads, c.z_dim // c.num_heads
        u, mean, var = self.timenorm(x, count, mean, var)
        ema, h = self.cema(u, h)
        m = self.hidden_dropout(self.rmsnorm(ema))
        zn = self.wz(m).view(B, T, H, z)
        zn = zn * torch.rsqrt(zn.square().mean(-1, keepdim=True) + c.norm_eps)
        first = k_past.shape[1]
        q, k = (rope(zn * (1 + gamma.view(H, z)) / math.sqrt(z) + beta.view(H, z), first, c.chunk_size,
                     c.rope_base) for gamma, beta in zip(self.gamma, self.beta))
        v = F.silu(self.wv(u)).view(B, T, H, -1)
        a, k_past, v_past = attention(q, k, v, k_past, v_past, c.chunk_size, self.attention_dropout)
        gated = self.hidden_dropout(a.reshape(B, T, -1) * F.silu(self.wr(m)))
        y = self.dropout(self.wh1(m) + self.wh2(gated)) + x
        return y, (mean, var, h, k_past, v_past)


class FeedForward(nn.Module):
    """The second half of a block. Its residual, the second hop, starts at x, the block's input."""

    def __init__(self, c, layer):
        super().__init__()
        self.norm = Norm(c, bias=True)
        self.fc1, self.fc2 = (linear(i, o, False) for i, o in ((c.model_dim, c.ffn_hidden_dim),
                                                               (c.ffn_hidden_dim, c.model_dim)))
        self.fc3 = linear(c.model_dim, c.ffn_hidden_dim, False) if c.swiglu else None
        self.alpha = nn.Parameter(torch.full((c.model_dim,), 0.1 * 0.5 ** layer)) if c.rescale_nffn else None
        self.dropout, self.hidden_dropout = nn.Dropout(c.dropout), nn.Dropout(c.hidden_dropout)

    def forward(self, y, x):
        n = self.norm(y)
        hidden = F.silu(self.fc1(n)) * (1 if self.fc3 is None else self.fc3(n))
        f = self.dropout(self.fc2(self.hidden_dropout(hidden)))
        return x + (f if self.alpha is None else self.alpha * f)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.mega, self.nffn = Mega(c), FeedForward(c, layer)

    def forward(self, x, count, state):
        y, state = self.mega(x, count, state)
        return self.nffn(y, x), state


class Output(nn.Module):
    """The norm before the logits, and the output matrix where it is not the embedding."""

    def __init__(self, c):
        super().__init__()
        self.final_norm = TimestepNorm(c.model_dim, c.norm_num_groups, c.norm_eps)
        if not c.share_emb:
            self.output = boundary(nn.Linear(c.model_dim, c.vocab_size, False), c.model_dim)


class Megalodon(nn.Module):
    """A model with initial values, as `train` would make them but from PyTorch's generator."""
    LAYER_STATE = ("norm.mean", "norm.var", "cema", "k", "v")

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.embed = boundary(nn.Embedding(c.vocab_size, c.model_dim), c.model_dim)
        self.layers = nn.ModuleList(Block(c, i) for i in range(c.num_layers))
        self.output = Output(c)
        self.dropout = nn.Dropout(c.dropout)

    def empty_state(self, B):
        """The state before the first token: names and shapes of doc/state.md, the moments in double."""
        c, like = self.config, {"device": self.embed.weight.device, "dtype": self.embed.weight.dtype}
        moments = {"device": like["device"], "dtype": torch.float64}
        state = {"count": torch.zeros(B, dtype=torch.int64, device=like["device"])}
        for i in range(c.num_layers):
            state[f"layers.{i}.norm.mean"] = torch.zeros(B, c.norm_num_groups, **moments)
            state[f"layers.{i}.norm.var"] = torch.zeros(B, c.norm_num_groups, **moments)
            state[f"layers.{i}.cema"] = torch.zeros(B, c.model_dim, c.cema_ndim, 2, **like)
            state[f"layers.{i}.k"] = torch.zeros(B, 0, c.num_heads, c.z_dim // c.num_heads, **like)
            state[f"layers.{i}.v"] = torch.zeros(B, 0, c.num_heads, c.value_dim // c.num_heads, **like)
        state["final_norm.mean"] = torch.zeros(B, c.norm_num_groups, **moments)
        state["final_norm.var"] = torch.zeros(B, c.norm_num_groups, **moments)
        return state

    def forward(self, tokens, state=None):
        """tokens (B,T) after `state`, or after nothing: logits (B,T,V) and the state after them. Detach the
        state's tensors where gradients shall not flow into earlier pieces."""
        before = state or self.empty_state(len(tokens))
        count = before["count"]
        after = {"count": count + tokens.shape[1]}
        x = self.embed(tokens)
        x = self.dropout(x * math.sqrt(self.config.model_dim) if self.config.scale_emb else x)
        for i, layer in enumerate(self.layers):
            names = [f"layers.{i}.{name}" for name in self.LAYER_STATE]
            x, state = layer(x, count, [before[name] for name in names])
            after.update(zip(names, state))
        x, mean, var = self.output.final_norm(x, count, before["final_norm.mean"], before["final_norm.var"])
        after["final_norm.mean"], after["final_norm.var"] = mean, var
        matrix = self.embed.weight if self.config.share_emb else self.output.output.weight
        return F.linear(x, matrix), after

    # ------------------------------------------------------------------------------------------------
    # Files.

    @classmethod
    def load(cls, path):
        """A model of this project: a file, the folder of a step, or a run's folder, which stands for its
        latest step. Weights in bf16 become float32. ValueError: what the file lacks."""
        path = model_file(path)
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != MODEL_FORMAT:
                raise ValueError(f'expected the format "{MODEL_FORMAT}" in __metadata__, '
                                 f'found {facts.get("format", "none")}')
            model = cls(Config.from_json(facts["config"]))
            model.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})
        return model

    def save(self, path):
        """Writes a file that every program of the project reads. An old one stays until it is whole."""
        tensors = {name: value.detach().float().contiguous() for name, value in self.state_dict().items()}
        save(path, tensors, {"format": MODEL_FORMAT, "config": json.dumps(asdict(self.config))})

    def load_state(self, path):
        """Reads what `generate --save-state` or save_state wrote: the state, and the logits (B,V) after its
        last token, or None."""
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            if facts.get("format") != STATE_FORMAT:
                raise ValueError(f'{path}: expected the format "{STATE_FORMAT}" in __metadata__, '
                                 f'found {facts.get("format", "none")}')
            state = {name: file.get_tensor(name) for name in file.keys()}
        like = self.empty_state(1)
        if missing := set(like) - set(state):
            raise ValueError(f"{path}: tensor {min(missing)} is missing")
        logits = state.pop("last_logits", None)
        return {name: state[name].to(like[name]) for name in like}, logits

    def save_state(self, path, state, last_logits, model):
        """Writes a state from which `generate --load-state` goes on. last_logits (B,V): those after its last
        token; model: the path of the model that it belongs to."""
        tensors = {name: value.detach() for name, value in {**state, "last_logits": last_logits}.items()}
        tensors = {name: value if name == "count" or "norm." in name else value.float()
                   for name, value in tensors.items()}
        save(path, tensors, {"format": STATE_FORMAT, "config": json.dumps(asdict(self.config)),
                             "model": model_hash(model)})


def model_file(path):
    """The model file that a path stands for."""
    path = Path(path)
    if (path / "latest").is_file():
        path = path / (path / "latest").read_text().strip()
    return path / "model.safetensors" if path.is_dir() else path


def save(path, tensors, facts):
    """Writes a safetensors file, under another name first: `path` is the old file or the whole new one."""
    whole = Path(f"{path}.tmp")
    whole.touch()
    mode = whole.stat().st_mode      # as any file of the user; the package would make it private
    save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, whole, facts)
    whole.chmod(mode)
    whole.replace(path)


def model_hash(path):
    """The number by which states know their model: checkpoint_hash of lib/checkpoint.h, over the tensors in
    the order of their names. About a quarter of a second for 10 MB."""
    data = model_file(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    value, mask = 0xcbf29ce484222325, (1 << 64) - 1
    for name in sorted(header, key=str.encode):
        begin, end = header[name]["data_offsets"]
        shape = b"".join(size.to_bytes(8, "little") for size in header[name]["shape"])
        for part in (name.encode(), header[name]["dtype"].encode(), shape, data[start + begin:start + end]):
            part += b"\0" * (-len(part) % 8)
            for word in memoryview(part).cast("Q"):
                value = (value ^ word) * 0x100000001b3 & mask
                value = (value << 29 | value >> 35) & mask
    return f"{value:016x}"


# ----------------------------------------------------------------------------------------------------
# A small example of use: text of a byte model.

@torch.no_grad()
def write(model, prompt, length, temperature):
    """Bytes after the prompt, one at a time."""
    logits, state = model(torch.tensor([list(prompt)]))
    for _ in range(length):
        logits = logits[0, -1] / max(temperature, 1e-4)
        token = torch.multinomial(torch.softmax(logits, -1), 1)
        yield bytes(token.tolist())
        logits, state = model(token[None], state)


def main():
    parser = argparse.ArgumentParser(description="Continues a text with a byte model, by PyTorch.")
    parser.add_argument("model", metavar="PATH", help="a model file, the folder of a step, or a run's folder")
    parser.add_argument("--prompt", default="Once upon a time", metavar="TEXT")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X")
    parser.add_argument("--seed", type=int, default=1234, metavar="N")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    try:
        model = Megalodon.load(args.model).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        sys.exit(f"error: {args.model}: {error}")
    if model.config.vocab_size > 256:
        sys.exit(f"error: {args.model}: has {model.config.vocab_size} tokens; only byte models write text")
    if not args.prompt:
        sys.exit("error: --prompt: expected at least one byte")
    sys.stdout.buffer.write(args.prompt.encode())
    for byte in write(model, args.prompt.encode(), args.max_tokens, args.temperature):
        sys.stdout.buffer.write(byte)
        sys.stdout.buffer.flush()
    print()


if __name__ == "__main__":
    main()
