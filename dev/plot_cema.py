#!/usr/bin/env python3
"""plot_cema.py - what the moving averages of a model have learnt, as a picture.

    python3 dev/plot_cema.py models/tinystories --out doc/cema.png

Above, on the left: every state of every channel, how long it remembers against how fast it turns; on the
right, what three channels do to each frequency. Below: impulse responses, that is, what becomes of a single 1.
Of each block three channels are drawn: by how late their response comes on average, an early one, a typical
one and a late one.

Letters and formulas are those of doc/cema.md. Needs numpy and matplotlib.
"""
import argparse
import io
import json
import os
import sys

INK, GRID, BAND = "#333333", "#dddddd", "#f3e3c8"
KINDS = [("early", 0.05, "#9aa5b1"), ("typical", 0.5, "#1f6fb2"), ("late", 0.99, "#d1495b")]


def parse_arguments():
    parser = argparse.ArgumentParser(description="Draws the CEMA kernels of a model as a PNG.")
    parser.add_argument("model", metavar="PATH", help="a model file, the folder of a step, or a run's folder")
    parser.add_argument("--out", default="cema.png", metavar="FILE", help="the picture (default: %(default)s)")
    parser.add_argument("--lags", type=int, default=40, metavar="N",
                        help="steps of a response (default: %(default)s)")
    parser.add_argument("--blocks", metavar="I,J,...",
                        help="whose responses to draw (default: six, evenly spaced)")
    arguments = parser.parse_args()
    if arguments.lags < 2:
        parser.error(f"--lags: expected 2 or more, found {arguments.lags}")
    try:
        arguments.blocks = arguments.blocks and [int(i) for i in arguments.blocks.split(",")]
    except ValueError:
        parser.error(f"--blocks: expected numbers with commas between them, found '{arguments.blocks}'")
    return arguments


def model_file(path):
    """The model file that a path stands for."""
    latest = os.path.join(path, "latest")
    if os.path.isfile(latest):
        with open(latest, encoding="utf-8") as file:
            path = os.path.join(path, file.read().strip())
    return os.path.join(path, "model.safetensors") if os.path.isdir(path) else path


def read_cema(path):
    """A dict a block: alpha, delta (D,N), theta (D,1), gamma (D,N) complex and omega (D), in double. A
    safetensors file is the length of its header, the header as JSON, and the data."""
    import numpy
    names = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
    try:
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > os.path.getsize(path):
                raise ValueError("it ends before its header does")
            header = json.loads(file.read(start - 8))
        data = numpy.memmap(path, dtype="u1", mode="r", offset=start)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {path}: is no safetensors file: {error}")
    blocks = []
    while f"layers.{len(blocks)}.mega.cema.alpha" in header:
        block = {}
        for name in ("alpha", "delta", "theta", "gamma", "omega"):
            entry = header[f"layers.{len(blocks)}.mega.cema.{name}"]
            begin, end = entry["data_offsets"]
            values = data[begin:end].view(names[entry["dtype"]])
            if entry["dtype"] == "BF16":                 # the upper half of a float
                values = (values.astype("<u4") << 16).view("<f4")
            block[name] = values.astype("f8").reshape(entry["shape"])
        D, N = block["alpha"].shape[:2]
        block.update(alpha=block["alpha"].reshape(D, N), delta=block["delta"].reshape(D, N),
                     theta=block["theta"].reshape(D, 1), omega=block["omega"].reshape(D),
                     gamma=block["gamma"][..., 0] + 1j * block["gamma"][..., 1])
        blocks.append(block)
    if not blocks:
        sys.exit(f"error: {path}: has no tensor layers.0.mega.cema.alpha; is it a Megalodon?")
    return blocks


def memory(alpha, delta):
    """1/(-ln |q|) in tokens."""
    import numpy
    return -1 / numpy.log1p(-1 / ((1 + numpy.exp(-alpha)) * (1 + numpy.exp(-delta))))


def turns(theta, N):
    """Turns a token of each state, 0 to 1/2: more than half a turn is a smaller one the other way round."""
    import numpy
    turn = numpy.arange(1, N + 1) / N / (1 + numpy.exp(-theta))
    return numpy.minimum(turn, 1 - turn)


def responses(block, lags):
    """K_l of every channel, l = 0 ... lags-1, omega included in K_0: (D,lags)."""
    import numpy
    D, N = block["alpha"].shape
    p = 1 / (1 + numpy.exp(-block["alpha"]))
    radius = 1 - p / (1 + numpy.exp(-block["delta"]))
    phase = 2 * numpy.pi * numpy.arange(1, N + 1) / N / (1 + numpy.exp(-block["theta"]))
    kernel = numpy.empty((D, lags))
    for l in range(lags):
        q_l = radius ** l * numpy.exp(1j * l * phase)
        kernel[:, l] = (block["gamma"] / N ** 0.5 * p * q_l).sum(1).real
    kernel[:, 0] += block["omega"]
    return kernel


def choose_channels(kernel):
    """The channels of KINDS: by the mean lag of a response, weighted by its squares."""
    import numpy
    energy = numpy.square(kernel)
    delay = (energy * numpy.arange(kernel.shape[1])).sum(1) / numpy.maximum(energy.sum(1), 1e-300)
    order = numpy.argsort(delay, kind="stable")
    return [int(order[round(share * (len(order) - 1))]) for _, share, _ in KINDS]


def finish(axes, title, x, y=None):
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.set_xlabel(x, fontsize=9, color=INK)
    axes.set_ylabel(y, fontsize=9, color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=8, colors=INK)


def draw_states(axes, blocks, pyplot):
    """Memory against frequency, a dot a state, and where fresh models have theirs."""
    import numpy
    N = blocks[0]["alpha"].shape[1]
    fresh = memory(*0.2 * numpy.random.default_rng(1).standard_normal((2, 100000)))
    axes.axhspan(*numpy.percentile(fresh, (0.5, 99.5)), color=BAND, zorder=0, label="99% of a fresh model's")
    for i, block in enumerate(blocks):
        colour = pyplot.colormaps["viridis"](0.9 * i / max(1, len(blocks) - 1))
        axes.scatter(turns(block["theta"], N).ravel(), memory(block["alpha"], block["delta"]).ravel(), s=2.5,
                     color=colour, alpha=0.45, linewidths=0, label=f"block {i}", rasterized=True)
    axes.set_yscale("log")
    ticks = [tick for tick in (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 5000, 20000)
             if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]]
    axes.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xscale("log")
    axes.set_xlim(right=0.5)
    legend = axes.legend(fontsize=7.5, frameon=False, ncols=1 + (len(blocks) > 9), markerscale=4, loc="upper right")
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    finish(axes, f"all {sum(block['alpha'].size for block in blocks):,} states: decay against frequency",
           "turns a token", "memory, tokens")


def draw_spectra(axes, kernel, channels, block):
    """|sum of K_l exp(-2 pi i f l)| of the three channels of a block."""
    import numpy
    frequency = numpy.linspace(0, 0.5, 400)
    waves = numpy.exp(-2j * numpy.pi * frequency[:, None] * numpy.arange(kernel.shape[1]))
    for (name, _, colour), channel in zip(KINDS, channels):
        axes.plot(frequency, abs(waves @ kernel[channel]), color=colour, linewidth=1.6,
                  label=f"{name}, channel {channel}")
    axes.set_xlim(0, 0.5)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    finish(axes, f"block {block}: what three channels do to each frequency", "turns a token", "gain")


def draw_responses(axes, kernel, channels, block, lags):
    for (name, _, colour), channel in zip(KINDS, channels):
        axes.plot(range(lags), kernel[channel, :lags], color=colour, linewidth=1.3, marker="o", markersize=2.5,
                  label=f"{name}, channel {channel}")
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.legend(fontsize=7.5, frameon=False)
    finish(axes, f"block {block}: impulse responses", "tokens later")


def save(figure, path):
    """A PNG of 256 colours: a third of the size for thousands of dots."""
    from PIL import Image
    whole = io.BytesIO()
    figure.savefig(whole, dpi=100, bbox_inches="tight")
    Image.open(whole).convert("RGB").quantize(256).save(path, optimize=True)


def main():
    arguments = parse_arguments()
    try:
        import matplotlib
        import numpy
    except ImportError:
        sys.exit("error: plot_cema.py needs numpy and matplotlib: python3 -m pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = model_file(arguments.model)
    blocks = read_cema(path)
    chosen = arguments.blocks or sorted({round(i * (len(blocks) - 1) / 5) for i in range(6)})
    if wrong := [i for i in chosen if not 0 <= i < len(blocks)]:
        sys.exit(f"error: --blocks: expected numbers from 0 to {len(blocks) - 1}, found {wrong[0]}")
    longest = max(memory(block["alpha"], block["delta"]).max() for block in blocks)
    length = int(min(max(arguments.lags, 8 * longest), 4096))           # long enough for sums and spectra
    kernels = {i: responses(blocks[i], length) for i in chosen}
    channels = {i: choose_channels(kernels[i]) for i in chosen}

    rows = -(-len(chosen) // 3)
    figure = pyplot.figure(figsize=(11, 4 + 2.4 * rows))
    above, below = figure.add_gridspec(2, 1, height_ratios=(4, 2.4 * rows), hspace=0.32 - 0.04 * rows)
    left, right = (figure.add_subplot(place) for place in above.subgridspec(1, 2, wspace=0.18))
    draw_states(left, blocks, pyplot)
    draw_spectra(right, kernels[chosen[-1]], channels[chosen[-1]], chosen[-1])
    for place, i in zip(below.subgridspec(rows, 3, hspace=0.55, wspace=0.22), chosen):
        draw_responses(figure.add_subplot(place), kernels[i], channels[i], i, arguments.lags)
    for i, block in enumerate(blocks):
        values = memory(block["alpha"], block["delta"])
        print(f"block {i}: memory median {numpy.median(values):.3f}, longest {values.max():.3f} tokens")
    try:
        save(figure, arguments.out)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {arguments.out}: {error}")
    print(f"{arguments.out}: {path}, blocks {', '.join(map(str, chosen))}")


if __name__ == "__main__":
    main()
