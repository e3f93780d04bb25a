"""A figure of time and memory over length, as PNG or SVG."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.text import length_name

# Text stays text: the file is small, and its words can be found and read at any size.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "benchmarks", "font.size": 11}
FORMATS = (".png", ".svg")


class Point(NamedTuple):
    """One program at one length; what is None is left out."""

    label: str
    length: int
    backward: bool
    ms: float | None
    held_bytes: int | None


def plot(points: Sequence[Point], path: pathlib.Path) -> None:
    """Draws two panels with logarithmic axes.

    Time has whole lines with the backward pass and dashed ones without. Memory is that of both
    passes together: inputs, outputs and temporaries.
    """
    import matplotlib
    import matplotlib.figure

    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(10, 4.2), layout="constrained")
        times, memory = figure.subplots(1, 2)
        labels = list(dict.fromkeys(point.label for point in points))
        for index, label in enumerate(labels):
            # Markers get smaller, so that lines show which lie on each other.
            style = {"color": f"C{index}", "markersize": max(3, 8 - 1.5 * index)}
            own = [point for point in points if point.label == label]
            both = [point for point in own if point.backward]
            draw(times, [(p.length, p.ms) for p in both], "o-", label=label, **style)
            forward = [(p.length, p.ms) for p in own if not p.backward]
            draw(times, forward, "o--", alpha=0.6, **style)
            held = [(p.length, p.held_bytes and p.held_bytes / 2**20) for p in both]
            draw(memory, held, "o-", label=label, **style)
        times.set(title="time (dashed: forward only)", ylabel="milliseconds")
        memory.set(title="memory, forward and backward", ylabel="MiB")
        ticks = sorted({point.length for point in points})
        for axes in (times, memory):
            axes.set(xscale="log", yscale="log", xlabel="length T, tokens")
            axes.set_xticks(ticks, [length_name(tick) for tick in ticks])
            axes.xaxis.minorticks_off()
            axes.yaxis.set_major_formatter("{x:g}")
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        times.legend(frameon=False)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def draw(axes, pairs: Sequence[tuple[int, float | None]], style: str, **options) -> None:
    """One line through the points that are known."""
    known = [(length, value) for length, value in pairs if value]
    axes.plot([length for length, _ in known], [value for _, value in known], style, **options)
