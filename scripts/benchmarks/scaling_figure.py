"""The figure and the table of time and memory over length.

Both panels have logarithmic axes. The name of a line stands at its end. Causal attention has whole
lines, bidirectional attention dashed ones.
"""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.plot import STYLE
from benchmarks.text import length_name, markdown, share, speed
from benchmarks.timing import GIB

COLORS = {"race": "#0072b2", "softmax": "#d55e00", "race_streamed": "#009e73"}
WORDS = {"race": "RACE", "softmax": "softmax", "race_streamed": "RACE, streamed"}
LINES = {"causal": "-", "bidirectional": (0, (4, 2))}
# A field of the points, its unit, the name of the axis, and the base of its ticks.
PANELS = (("seconds", 1.0, "time, s", 10), ("peak_bytes", GIB, "peak memory, GiB", 2))
MOST_TICKS = 6  # with a label, on the axis of lengths
POWERS = range(6, 33)
LABEL_GAP = 13.0  # points between two labels


def draw(content: dict, path: pathlib.Path) -> None:
    """Draws the points of a record as an SVG file.

    Args:
      content: what `benchmarks.scaling.Record` writes.
      path: the file.
    """
    import matplotlib
    import matplotlib.figure

    with matplotlib.rc_context(STYLE | {"font.size": 10}):
        figure = matplotlib.figure.Figure(figsize=(11, 4.6), layout="constrained")
        for axes, (field, unit, label, base) in zip(figure.subplots(1, 2), PANELS, strict=True):
            ends = panel(axes, content["points"], field, unit)
            axes.set(xscale="log", yscale="log", xlabel="length, tokens", ylabel=label)
            if ends:
                lengths = [p["length"] for p in content["points"] if not p["stopped"]]
                style_axes(axes, lengths, base)
                name_lines(figure, axes, ends)
        figure.suptitle(title(content), fontsize=11)
        figure.savefig(path, format="svg", metadata={"Date": None})


def title(content: dict) -> str:
    """What was measured where."""
    setting, machine = content["setting"], content["machine"]
    if machine["platform"] != "cpu":
        device = machine["device"]
    else:
        device = f"{machine['devices']} CPU devices" if machine["devices"] > 1 else "a CPU"
    if "layers" in setting:
        millions = content["facts"]["parameters"] / 1e6
        what = (
            f"A language model of bytes, value and gradient: {setting['layers']} layers of width "
            f"{setting['width']}, {millions:.3g} M parameters, {setting['heads']} heads"
        )
    else:
        what = (
            f"One attention operation, forward and backward: {setting['heads']} heads of "
            f"{setting['head_dim']}"
        )
    numbers = f"P = {setting['planes']}, L = {setting['tables']}, {setting['dtype']}"
    return f"{what}, {numbers}, {device}"


def known_points(points: Sequence[dict], name: str) -> list[dict]:
    """The points of a series that have a time, in the order of their lengths."""
    own = [point for point in points if point["series"] == name and not point["stopped"]]
    return sorted(own, key=lambda point: point["length"])


def panel(axes: Any, points: Sequence[dict], field: str, unit: float) -> list[tuple]:
    """Draws one line for each series; returns where it ends, and its name and color."""
    ends = []
    for name in dict.fromkeys(point["series"] for point in points):
        known = known_points(points, name)
        if not known:
            continue
        method, form = name.split()
        x, y = [p["length"] for p in known], [p[field] / unit for p in known]
        style = {"color": COLORS[method], "linestyle": LINES[form]}
        axes.plot(x, y, marker="o", markersize=3, linewidth=1.6, **style)
        words = WORDS[method] if method == "race_streamed" else f"{WORDS[method]}, {form}"
        ends.append((x[-1], y[-1], words, COLORS[method]))
    return ends


def style_axes(axes: Any, lengths: Sequence[int], base: int) -> None:
    """Ticks at powers, a light grid, and room for the names on the right."""
    from matplotlib.ticker import LogLocator, NullFormatter

    shortest, longest = min(lengths), max(lengths)
    wide = (longest / shortest) ** 0.42 if longest > shortest else 4.0
    axes.set_xlim(shortest / 1.4, longest * max(4.0, wide))
    powers = [2**power for power in POWERS if shortest <= 2**power <= longest]
    step = next(step for step in (1, 2, 4, 8) if len(powers[::step]) <= MOST_TICKS)
    axes.set_xticks(powers[::step], [length_name(tick) for tick in powers[::step]])
    axes.set_xticks(powers, minor=True)
    axes.xaxis.set_minor_formatter(NullFormatter())
    low, high = (math.log(edge, base) for edge in axes.get_ylim())
    axes.set_ylim(base ** math.floor(low), base ** math.ceil(high))  # two numbers at least
    axes.yaxis.set_major_locator(LogLocator(base, numticks=20))
    between = [1.5] if base == 2 else range(2, 10)
    axes.yaxis.set_minor_locator(LogLocator(base, subs=between, numticks=200))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(which="major", color="0.85", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def name_lines(figure: Any, axes: Any, ends: Sequence[tuple]) -> None:
    """Writes each name beside the end of its line, and moves those apart that would overlap."""
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    placed: list[tuple[float, float]] = []
    for x, y, words, color in sorted(ends, key=lambda end: end[1]):
        left, height = axes.transData.transform((x, y)) * scale
        shifted = height
        for other_left, other in placed:
            if abs(other_left - left) < 120 and shifted < other + LABEL_GAP:
                shifted = other + LABEL_GAP
        placed.append((left, shifted))
        axes.annotate(
            words,
            (x, y),
            xytext=(7, shifted - height),
            textcoords="offset points",
            color=color,
            verticalalignment="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
        )


def table(content: dict) -> str:
    """A markdown table: a line for each length, and a cell for each series."""
    points, rate = content["points"], content.get("facts", {}).get("matmul_rate")
    names = list(dict.fromkeys(point["series"] for point in points))
    found = {(point["series"], point["length"]): point for point in points}
    lines = [["T", *(name.replace("_", " ") for name in names)]]
    for length in sorted({point["length"] for point in points}):
        cells = [cell(found.get((name, length)), rate) for name in names]
        lines.append([length_name(length), *cells])
    widths = {str(i): max(map(len, column)) for i, column in enumerate(zip(*lines, strict=True))}
    dashes = ["-" * width for width in widths.values()]
    return "\n".join(markdown(cells, widths) for cells in [lines[0], dashes, *lines[1:]])


def cell(point: dict | None, matmul_rate: float | None) -> str:
    """Seconds, GiB, and the speed where operations were counted; or why there are none."""
    if point is None or point["stopped"]:
        return point["stopped"].replace("|", "/") if point else ""
    parts = [f"{point['seconds']:.3g} s", f"{point['peak_bytes'] / GIB:.2f} GiB"]
    if point.get("operations") and matmul_rate:
        parts += [f"{speed(point)} tokens/s", f"{share(point, matmul_rate)} of peak"]
    return ", ".join(parts)
