#!/usr/bin/env python3
"""plot.py - pictures of training runs, from the CSV files that `train --log` writes.

    python3 dev/plot.py build/demo.csv                                  one run: build/demo.png
    python3 dev/plot.py a.csv b.csv --label fp32 --label bf16 --out runs.png
    python3 dev/plot.py a.csv b.csv --zoom-steps 20 --panels loss,difference

Needs matplotlib, and nothing else of the project does. Each run is a colour. The first one is drawn widest
and below the others, so that runs which agree are still seen, one inside the other.
"""
import argparse
import csv
import os
import sys

PANELS = {
    "loss": "loss, nats per token",
    "held-out": "held-out loss, nats per token",
    "lr": "learning rate",
    "norm": "norm of the gradient",
    "speed": "tokens per second",
    "difference": "distance from the first run's loss, relative",
}
COLUMNS = ["step", "loss", "val_loss", "grad_norm", "lr", "tokens_per_s"]
INK, GRID = "#333333", "#dddddd"


def parse_arguments():
    parser = argparse.ArgumentParser(description="Draws CSV logs of train as a PNG.")
    parser.add_argument("logs", nargs="+", metavar="LOG.csv", help="logs of `train --log`")
    parser.add_argument("--out", help="the picture (default: the first log's name with .png)")
    parser.add_argument("--label", action="append", default=[], help="name of a run, in the logs' order")
    parser.add_argument("--zoom-steps", type=int, metavar="N", help="draw the first N steps only")
    parser.add_argument("--panels", default="loss,lr,norm,speed",
                        help="what to draw, of " + ", ".join(PANELS) + " (default: %(default)s)")
    parser.add_argument("--points", action="append", default=[], metavar="NAME=STEP:LOSS,STEP:LOSS,...",
                        help="held-out losses that were measured elsewhere, as marks in the loss panel")
    parser.add_argument("--loss-range", metavar="LOW:HIGH", help="what the loss panel shows")
    parser.add_argument("--title", help="a line above the picture")
    arguments = parser.parse_args()
    arguments.panels = arguments.panels.split(",")
    for panel in arguments.panels:
        if panel not in PANELS:
            parser.error(f"--panels: '{panel}' is none of {', '.join(PANELS)}")
    if len(arguments.label) > len(arguments.logs):
        parser.error(f"--label: {len(arguments.label)} names for {len(arguments.logs)} logs")
    if "difference" in arguments.panels and len(arguments.logs) < 2:
        parser.error("--panels difference compares runs: give two logs or more")
    arguments.points = [parse_points(parser, text) for text in arguments.points]
    arguments.loss_range = parse_range(parser, arguments.loss_range)
    return arguments


def parse_points(parser, text):
    """"NAME=250:1.2,500:1.1" as the name, the steps and the losses."""
    try:
        name, pairs = text.split("=", 1)
        pairs = [pair.split(":") for pair in pairs.split(",")]
        return name, [int(step) for step, _ in pairs], [float(loss) for _, loss in pairs]
    except ValueError:
        parser.error(f"--points: expected NAME=STEP:LOSS,STEP:LOSS,..., found '{text}'")


def parse_range(parser, text):
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(":"))
        return low, high
    except ValueError:
        parser.error(f"--loss-range: expected LOW:HIGH, found '{text}'")


def read_log(path, steps):
    """The columns of a log as lists of numbers, empty cells as None. steps: the last one to keep, or None."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        sys.exit(f"{path}: not a log of train: no column or no row of {', '.join(missing)}")
    try:
        run = {name: [float(row[name]) if row[name] else None for row in rows] for name in COLUMNS}
    except (TypeError, ValueError) as error:
        sys.exit(f"{path}: a row is damaged: {error}")
    keep = [i for i, step in enumerate(run["step"]) if steps is None or step <= steps]
    if not keep:
        sys.exit(f"{path}: none of the first {steps} steps is in it")
    return {name: [values[i] for i in keep] for name, values in run.items()}


def smooth(values, width):
    """The mean over the last `width` values, fewer at the beginning: single batches are noisy."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


def draw_loss(axes, run, style, label, zoomed):
    """Training loss as a line, for long runs smoothed and over its own noise; held-out loss as dots."""
    steps, loss = run["step"], run["loss"]
    width = 1 if zoomed or len(steps) < 200 else max(5, len(steps) // 75)
    if width > 1:
        axes.plot(steps, loss, color=style["color"], alpha=0.13, linewidth=0.6, zorder=1)
    axes.plot(steps, smooth(loss, width), label=f"{label}, training", **style)
    draw_held_out(axes, run, style, f"{label}, held out")


def draw_held_out(axes, run, style, label):
    """Dots that surround those of later runs, as the lines do. Nothing is drawn if nothing was measured."""
    held_out = [(step, value) for step, value in zip(run["step"], run["val_loss"]) if value is not None]
    if held_out:
        axes.plot(*zip(*held_out), label=label, color=style["color"], linestyle="--", linewidth=1.1,
                  marker="o", markersize=3.5 + 1.3 * style["linewidth"], zorder=10 + style["zorder"])


def draw_panel(axes, panel, runs, arguments, styles):
    zoomed = arguments.zoom_steps is not None
    for (label, run), style in zip(runs, styles):
        if panel == "loss":
            draw_loss(axes, run, style, label, zoomed)
        elif panel == "held-out":
            draw_held_out(axes, run, style, label)
        elif panel == "difference":
            first = dict(zip(runs[0][1]["step"], runs[0][1]["loss"]))
            both = [(step, abs(loss / first[step] - 1)) for step, loss in zip(run["step"], run["loss"])
                    if step in first]
            if run is not runs[0][1] and both:
                # Zero has no place on a logarithmic axis; 1e-9 is less than the last digit of a log.
                axes.plot([step for step, _ in both], [max(value, 1e-9) for _, value in both], label=label,
                          **dict(style, linewidth=1.6, marker="o", markersize=4))
        else:
            column = {"lr": "lr", "norm": "grad_norm", "speed": "tokens_per_s"}[panel]
            axes.plot(run["step"], run[column], label=label, **style)
    if panel in ("loss", "held-out"):
        for (name, steps, losses), marker in zip(arguments.points, "sD^vP*" * 9):
            axes.plot(steps, losses, color=INK, linestyle=":", linewidth=0.9, marker=marker, markersize=9,
                      markerfacecolor="none", label=name + ", held out" * (panel == "loss"), zorder=20)
    if panel == "loss" and arguments.loss_range:
        axes.set_ylim(*arguments.loss_range)
    if panel == "difference" or (panel == "norm" and not zoomed):
        axes.set_yscale("log")
    if panel == "speed":
        axes.set_ylim(bottom=0)
        axes.ticklabel_format(axis="y", style="plain")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_title(PANELS[panel], fontsize=10, color=INK, loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step", fontsize=9, color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    several = len(runs) > 1 or panel in ("loss", "held-out")
    if several and axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=False)


def main():
    arguments = parse_arguments()
    try:
        import matplotlib
    except ImportError:
        sys.exit("plot.py needs matplotlib: python3 -m pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = arguments.label + [os.path.splitext(os.path.basename(path))[0] for path in
                                arguments.logs[len(arguments.label):]]
    runs = [(label, read_log(path, arguments.zoom_steps)) for label, path in zip(labels, arguments.logs)]
    colours = ["#4c9be8", "#d1495b", "#222222", "#2a9d6f", "#8e6bbf", "#e09f3e"]
    step = 3.2 / max(1, len(runs) - 1)
    styles = [{"color": colours[i % len(colours)], "linewidth": 1.3 + step * (len(runs) - 1 - i),
               "zorder": 2 + i} for i in range(len(runs))]

    columns = min(2, len(arguments.panels))
    rows = -(-len(arguments.panels) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(5.2 * columns + 1.2 * (columns == 1), 3.9 * rows),
                                   squeeze=False)
    places = [axes for row in grid for axes in row]
    for axes, panel in zip(places, arguments.panels):
        draw_panel(axes, panel, runs, arguments, styles)
    for axes in places[len(arguments.panels):]:
        axes.set_visible(False)
    if arguments.title:
        figure.suptitle(arguments.title, fontsize=11, color=INK)
    figure.tight_layout()
    out = arguments.out or os.path.splitext(arguments.logs[0])[0] + ".png"
    try:
        figure.savefig(out, dpi=110)
    except (OSError, ValueError) as error:
        sys.exit(f"{out}: {error}")
    print(f"{out}: {len(runs)} run{'s' * (len(runs) > 1)}, {', '.join(arguments.panels)}")


if __name__ == "__main__":
    main()
