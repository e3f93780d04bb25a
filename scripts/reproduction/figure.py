"""The figure of a table: one panel for each data set, or lines over the size of the data.

In a panel every row is a point with its deviation. If the data sets form a series, such as
sequences of growing length, there is one panel with a line for each row.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.plot import STYLE
from experiments.table import Data, Method, Table
from reproduction.results import cells

COLORS = {"race": "#0072b2", "softmax": "#d55e00"}
OTHER_COLOR = "0.4"


def draw(table: Table, content: Mapping[str, Any], path: Path) -> bool:
    """Draws the first metric of each data set as an SVG file.

    Args:
        table: the table.
        content: what `reproduction.results.collect` returned.
        path: the file.

    Returns:
        Whether there was anything to draw.
    """
    import matplotlib
    import matplotlib.figure

    records = [record for record in content["runs"] if record["scores"]]
    shown = {record["data"] for record in records}
    data = [d for d in table.data if d.name in shown]
    if not data:
        return False
    with matplotlib.rc_context(STYLE | {"font.size": 9}):
        figure = matplotlib.figure.Figure(layout="constrained")
        if all(d.size is not None for d in data):
            figure.set_size_inches(9.5, 4.2)
            _lines(figure.subplots(), table, data, records)
        else:
            rows = len({record["method"] for record in records})
            figure.set_size_inches(2.2 + 2.8 * len(data), 1.6 + 0.26 * rows)
            panels = figure.subplots(1, len(data), sharey=True, squeeze=False)[0]
            for axes, d in zip(panels, data, strict=True):
                _panel(axes, table.methods, d, records)
        title = f"{table.title}, budget {content['budget']}"
        if content["budget"] == "tiny":
            title += ": a trial, whose numbers mean nothing"
        figure.suptitle(title, x=0.01, ha="left")
        figure.savefig(path, format="svg", metadata={"Date": None})
    return True


def _panel(axes: Any, methods: Sequence[Method], data: Data, records: Sequence[dict]) -> None:
    """Draws a point for each method, the first one at the top."""
    metric = data.metrics[0]
    measured = {record["method"] for record in records}
    rows = [method for method in methods if method.name in measured]
    found = [cells(records, data.name, method.name, metric.path) for method in reversed(rows)]
    means = [one.mean * metric.scale for one in found if one is not None]
    lowest, highest = usual_range(means)
    for height, (method, one) in enumerate(zip(reversed(rows), found, strict=True)):
        if one is None:
            continue
        mean, style = one.mean * metric.scale, {"color": _color(method)}
        if lowest <= mean <= highest:
            deviation = (one.deviation or 0.0) * metric.scale
            axes.errorbar(mean, height, xerr=deviation, fmt="o", capsize=3, **style)
        else:  # far away from the others, which would be drawn on top of each other
            left = mean < lowest
            text = f"← {mean:.{metric.digits}f}" if left else f"{mean:.{metric.digits}f} →"
            place = {"ha": "left" if left else "right", "va": "center"}
            x = 0.02 if left else 0.98
            axes.text(x, height, text, transform=axes.get_yaxis_transform(), **place, **style)
    axes.set_yticks(range(len(rows)), [method.label for method in reversed(rows)])
    axes.set(title=data.label, xlabel=metric.label, ylim=(-0.6, len(rows) - 0.4))
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def usual_range(numbers: Sequence[float], factor: float = 5.0) -> tuple[float, float]:
    """Returns the ends of the range around the median that the axis of a panel shows.

    Half of the numbers are not further from the median than the range's half length / `factor`.

    Example:
        >>> usual_range([1.0, 2.0, 3.0, 4.0, 99.0])
        (-2.0, 8.0)
    """
    middle = statistics.median(numbers)
    spread = factor * statistics.median(abs(number - middle) for number in numbers)
    return (middle - spread, middle + spread) if spread else (min(numbers), max(numbers))


def _lines(axes: Any, table: Table, data: Sequence[Data], records: Sequence[dict]) -> None:
    """Draws a line for each method over the sizes of the data sets."""
    metric = data[0].metrics[0]
    for index, method in enumerate(table.methods):
        points = [(d.size, cells(records, d.name, method.name, metric.path)) for d in data]
        known = [(size, found) for size, found in points if found is not None]
        if known:
            axes.errorbar(
                [size for size, _ in known],
                [found.mean * metric.scale for _, found in known],
                [(found.deviation or 0.0) * metric.scale for _, found in known],
                marker="o",
                capsize=3,
                color=f"C{index % 10}",
                linestyle="-" if index < 10 else "--",
                label=method.label,
            )
    sizes = sorted({d.size for d in data})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set(xlabel=table.size_label, ylabel=metric.label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(loc="outside right center", frameon=False)


def _color(method: Method) -> str:
    return COLORS.get(str(method.settings.get("model.attention")), OTHER_COLOR)
