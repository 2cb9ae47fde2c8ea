#!/usr/bin/env python3
"""draw_block.py - the picture of a block in README.md and doc/model.md, as SVG.

    python3 dev/draw_block.py doc/block.svg

Needs nothing but Python. Numbers are pixels; a shape is named by its centre.
"""
import sys

WIDTH, HEIGHT = 880, 1010
INK, SOFT, FONT = "#24292f", "#6e7781", "font-family='Helvetica, Arial, sans-serif'"
# What kind of operation a box is: its fill, its border, and its line in the legend.
KINDS = {
    "memory": ("#fde7c8", "#c77700", "remembers all of the text, in a state of fixed size"),
    "chunk": ("#d8ecff", "#1f6fb2", "looks back to the start of its chunk"),
    "matrix": ("#e4f3e1", "#3c8031", "a matrix product"),
    "point": ("#f1f1f3", "#8a8f98", "number by number, or a norm of one token"),
}


class Picture:
    def __init__(self):
        self.parts = []

    def add(self, text):
        self.parts.append(text)

    def text(self, x, y, words, size=14, colour=INK, anchor="middle", style=""):
        self.add(f"<text x='{x}' y='{y + size * 0.35:.1f}' font-size='{size}' fill='{colour}' "
                 f"text-anchor='{anchor}' {style}>{words}</text>")

    def box(self, x, y, lines, kind, width=150, height=None):
        """An operation, its name in the first line and what it computes in the others."""
        fill, border, _ = KINDS[kind]
        height = height or 20 + 17 * len(lines)
        self.add(f"<rect x='{x - width / 2}' y='{y - height / 2}' width='{width}' height='{height}' rx='7' "
                 f"fill='{fill}' stroke='{border}' stroke-width='1.5'/>")
        for i, line in enumerate(lines):
            at = y + 17 * (i - (len(lines) - 1) / 2)
            self.text(x, at, line, 15 if i == 0 else 12, INK if i == 0 else SOFT,
                      style="font-weight='bold'" if i == 0 else "")

    def state(self, x, y, lines, width=150):
        """What is carried from call to call."""
        height = 14 + 15 * len(lines)
        self.add(f"<rect x='{x - width / 2}' y='{y - height / 2}' width='{width}' height='{height}' rx='3' "
                 f"fill='#fffdf5' stroke='#c77700' stroke-width='1.2' stroke-dasharray='5 3'/>")
        for i, line in enumerate(lines):
            self.text(x, y + 15 * (i - (len(lines) - 1) / 2), line, 12)

    def operator(self, x, y, sign):
        self.add(f"<circle cx='{x}' cy='{y}' r='13' fill='white' stroke='{INK}' stroke-width='1.5'/>")
        self.text(x, y, sign, 18)

    def arrow(self, *points, colour=INK, both=False):
        """A line along the points with a head at its end, or a dashed one with two for what is read and written."""
        path = " ".join(f"{x},{y}" for x, y in points)
        dashes = "stroke-dasharray='5 3' marker-start='url(#state)'" if both else ""
        head = "state" if both else "residual" if colour != INK else "head"
        self.add(f"<polyline points='{path}' fill='none' stroke='{'#c77700' if both else colour}' "
                 f"stroke-width='1.6' marker-end='url(#{head})' {dashes}/>")

    def dot(self, x, y, colour=INK):
        """Where a line forks."""
        self.add(f"<circle cx='{x}' cy='{y}' r='3.4' fill='{colour}'/>")

    def label(self, x, y, name, shape="", anchor="start"):
        self.text(x, y, f"<tspan font-style='italic' font-weight='bold'>{name}</tspan> "
                        f"<tspan fill='{SOFT}' font-size='12'>{shape}</tspan>", 15, anchor=anchor)


def draw():
    p, residual = Picture(), "#a03d9a"
    left, main, middle, right = 130, 300, 480, 650       # Wh1, the trunk with r, queries and keys, values

    # x to m: the two recurrences.
    p.label(main + 12, 38, "x", "the block's input (B,T,D)")
    p.arrow((main, 28), (main, 76))
    p.box(main, 98, ["TimestepNorm"], "memory")
    p.state(left - 20, 98, ["count, mean and", "variance of a group"])
    p.arrow((left + 57, 98), (main - 78, 98), both=True)
    p.arrow((main, 117), (main, 176))
    p.label(main - 12, 146, "u", "", "end")
    p.dot(main, 146)
    p.box(main, 204, ["CEMA", "h = q h + p u"], "memory")
    p.state(left - 20, 204, ["N complex numbers", "of each channel"])
    p.arrow((left + 57, 204), (main - 78, 204), both=True)
    p.arrow((main, 232), (main, 264))
    p.box(main, 284, ["RMSNorm"], "point")
    p.arrow((main, 303), (main, 384))
    p.dot(main, 336)
    p.label(main + 8, 322, "m", "(B,T,D)")

    # Queries and keys from m, values from u.
    p.arrow((main, 336), (middle, 336), (middle, 356))
    p.box(middle, 376, ["Wz"], "matrix", 130)
    p.arrow((middle, 395), (middle, 418))
    p.box(middle, 452, ["norm of each head", "two weights and biases", "RoPE"], "point", 180)
    p.arrow((main, 146), (right, 146), (right, 418))
    p.box(right, 446, ["Wv", "then silu"], "matrix", 130)
    centre = (middle + right) / 2
    p.arrow((middle, 489), (middle, 538))
    p.label(middle - 10, 514, "q, k", "(B,T,H,z)", "end")
    p.arrow((right, 474), (right, 538))
    p.label(right + 10, 514, "v", "(B,T,H,e)")
    p.box(centre, 566, ["attention in the chunk", "softmax(q k) v"], "chunk", 320)
    p.state(centre + 75, 642, ["keys and values of", "the unfinished chunk"])
    p.arrow((centre + 75, 619), (centre + 75, 596), both=True)

    # The gate and the first hop.
    p.box(main, 412, ["Wr", "then silu"], "matrix", 130)
    p.arrow((main, 440), (main, 635))
    p.label(main - 10, 514, "r", "(B,T,E)", "end")
    p.arrow((middle, 594), (middle, 650), (main + 15, 650))
    p.label(middle - 10, 620, "a", "(B,T,E)", "end")
    p.operator(main, 650, "&#215;")
    p.arrow((main, 663), (main, 690))
    p.box(main, 709, ["Wh2"], "matrix", 130)
    p.arrow((main, 728), (main, 761))
    p.operator(main, 776, "+")
    p.arrow((main, 336), (left, 336), (left, 690))
    p.box(left, 709, ["Wh1"], "matrix", 130)
    p.arrow((left, 728), (left, 776), (main - 15, 776))
    p.label(main - 10, 806, "y", "(B,T,D)", "end")
    p.arrow((main, 789), (main, 824))

    # The feed-forward layer and the second hop. Both hops start at x.
    p.box(main, 843, ["LayerNorm"], "point")
    p.arrow((main, 862), (main, 882))
    p.box(main, 910, ["feed-forward", "fc2(silu(fc1) &#183; fc3)"], "matrix", 190)
    p.arrow((main, 938), (main, 953))
    p.operator(main, 968, "+")
    p.arrow((main, 981), (main, 1006))
    p.dot(main, 52, residual)
    p.arrow((main, 52), (790, 52), (790, 776), (main + 16, 776), colour=residual)
    p.dot(790, 52, residual)
    p.arrow((790, 52), (830, 52), (830, 968), (main + 16, 968), colour=residual)
    p.text(560, 764, "first hop", 13, residual)
    p.text(560, 956, "second hop: again from x, not from y", 13, residual)
    p.label(main + 12, 996, "x", "of the next block")
    legend(p, 468, 806)
    return p


def legend(p, x, y):
    for i, (fill, border, words) in enumerate(KINDS.values()):
        p.add(f"<rect x='{x}' y='{y + 23 * i - 8}' width='22' height='16' rx='4' fill='{fill}' stroke='{border}'/>")
        p.text(x + 32, y + 23 * i, words, 12, anchor="start")
    p.add(f"<rect x='{x}' y='{y + 84}' width='22' height='16' rx='3' fill='#fffdf5' stroke='#c77700' "
          "stroke-dasharray='4 2'/>")
    p.text(x + 32, y + 92, "state: goes from call to call", 12, anchor="start")


def svg(picture):
    heads = "".join(f"<marker id='{name}' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' "
                    f"orient='auto-start-reverse'><path d='M0,0 L8,4 L0,8 z' fill='{colour}'/></marker>"
                    for name, colour in (("head", INK), ("state", "#c77700"), ("residual", "#a03d9a")))
    return (f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT + 14}' width='{WIDTH}' "
            f"height='{HEIGHT + 14}' {FONT}>\n<title>A block of Megalodon</title>\n<defs>{heads}</defs>\n"
            f"<rect width='{WIDTH}' height='{HEIGHT + 14}' rx='10' fill='white'/>\n"
            + "\n".join(picture.parts) + "\n</svg>\n")


def main():
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".svg"):
        sys.exit("usage: draw_block.py FILE.svg")
    try:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            file.write(svg(draw()))
    except OSError as error:
        sys.exit(f"error: {sys.argv[1]}: {error.strerror}")
    print(sys.argv[1])


if __name__ == "__main__":
    main()
