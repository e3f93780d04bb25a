"""The tables and figures of the benchmark of decoding, from its rows.

The break-even length of a method is where its gain over dense attention passes 1. Between two
lengths the logarithm of the gain is taken as linear in that of the length.
"""

import itertools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks.plot import STYLE
from benchmarks.text import header, length_name, markdown, number

COLUMNS = {
    "B": 1,
    "K": 2,
    "S": 4,
    "method": 22,
    "ratio": 5,
    "lists": 5,
    "runs": 6,
    "µs": 7,
    "wall µs": 7,
    "scores": 7,
    "select": 7,
    "attend": 7,
    "MB": 6,
    "floor µs": 8,
    "dense µs": 8,
    "gain": 5,
    "recall": 6,
    "mass": 5,
    "error": 5,
}
DENSE_COLUMNS = {"B": 1, "K": 2, "S": 4, "dense": 20, "µs": 8, "wall µs": 8, "floor µs": 8}
PREFILL_COLUMNS = {"prompt": 6, "method": 22, "coding µs": 9, "attention µs": 12, "share, %": 8}


def table(rows: Sequence[dict]) -> list[str]:
    """The lines of the table of all cells."""
    return [*header(COLUMNS), *map(line, rows)]


def line(row: dict) -> str:
    """One cell as a line of the table."""
    stages, stopped = row.get("stages", {}), row["stopped"]
    cells = [
        *sizes(row["shape"]),
        row["method"],
        f"{row['ratio']}x",
        row["selection"],
        row["implementation"],
        stopped[:40].replace("|", "/") or number(row["us"], 1),
        number(row.get("wall_us"), 1),
        *(number(stages.get(name), 1) for name in ("scores", "select", "attend")),
        number(row["bytes"], 1, 1e-6),
        number(row["floor_us"], 1),
        number(row.get("dense_us"), 1),
        number(row.get("gain"), 2),
        *(number(row.get(name), 3) for name in ("recall", "mass", "error")),
    ]
    return markdown(cells, COLUMNS)


def dense_table(rows: Sequence[dict]) -> list[str]:
    """The lines of the table of the dense baselines."""
    lines = header(DENSE_COLUMNS)
    for row in rows:
        us = row["stopped"][:60].replace("|", "/") or number(row["us"], 1)
        cells = [*sizes(row["shape"]), row["name"], us]
        cells += [number(row.get("wall_us"), 1), number(row["floor_us"], 1)]
        lines.append(markdown(cells, DENSE_COLUMNS))
    return lines


def prefill_table(rows: Sequence[dict]) -> list[str]:
    """The lines of the table of what it costs to code a prompt, or none."""
    lines = header(PREFILL_COLUMNS) if rows else []
    for row in rows:
        us = row["stopped"][:40].replace("|", "/") or number(row["coding_us"], 1)
        cells = [length_name(row["length"]), row["method"], us]
        cells += [number(row.get("attention_us"), 1), number(row.get("share"), 2, 100)]
        lines.append(markdown(cells, PREFILL_COLUMNS))
    return lines


def sizes(shape: dict) -> list[str]:
    """The sizes of a shape as cells."""
    return [str(shape["rows"]), str(shape["kv_heads"]), length_name(shape["capacity"])]


def break_even(rows: Sequence[dict]) -> list[dict[str, Any]]:
    """Finds for every method that was measured at several lengths where its gain passes 1."""
    series: dict[tuple, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get("gain"):
            shape = row["shape"]
            key = shape["rows"], shape["kv_heads"], row["method"], row["ratio"], row["selection"]
            series.setdefault(key, []).append((shape["capacity"], row["gain"]))
    names = "rows", "kv_heads", "method", "ratio", "selection"
    return [
        dict(zip(names, key, strict=True)) | {"length": crossing(points), "points": sorted(points)}
        for key, points in series.items()
        if len(points) > 1
    ]


def crossing(points: Sequence[tuple[int, float]]) -> float | None:
    """Returns the length from which on all gains are above 1, or None if the last one is not.

    It is 0 if all gains are above 1.

    Example:
      >>> crossing([(1024, 0.5), (2048, 1.0), (4096, 2.0)])
      2048.0
      >>> round(crossing([(1024, 0.5), (4096, 2.0)]))
      2048
    """
    points = sorted(points)
    if points[-1][1] < 1:
        return None
    for (left, low), (right, high) in reversed(list(itertools.pairwise(points))):
        if low < 1 <= high:
            part = -math.log(low) / (math.log(high) - math.log(low))
            return left * (right / left) ** part
    return 0.0


def break_even_lines(found: Sequence[dict]) -> list[str]:
    """Says for every series from which length on it pays."""
    lines = []
    for each in found:
        lengths = [length for length, _ in each["points"]]
        head = (
            f"B = {each['rows']}, K = {each['kv_heads']}, {each['method']}, {each['ratio']}x, per "
            f"{each['selection']}"
        )
        if each["length"] is None:
            lines.append(f"{head}: does not pay up to {max(lengths):,} tokens")
        elif each["length"] == 0:
            lines.append(f"{head}: pays from {min(lengths):,} tokens on or earlier")
        else:
            lines.append(f"{head}: pays from {round(each['length']):,} tokens on")
    return lines


def draw(rows: Sequence[dict], path: pathlib.Path, title: str) -> None:
    """Draws recall and lost mass over bytes and over microseconds, at the size with most methods.

    Args:
      rows: the rows of the benchmark.
      path: the SVG file.
      title: where it was measured. The sizes are added.
    """
    import matplotlib
    import matplotlib.figure

    known = [row for row in rows if not row["stopped"] and "mass" in row]
    if not known:
        return
    shapes = [tuple(row["shape"].values()) for row in known]
    most = max(dict.fromkeys(shapes), key=lambda s: len({r["method"] for r in of(known, s)}))
    own = of(known, most)
    rival = min((row["dense_us"] for row in own if row.get("dense_us")), default=None)
    panels = ("bytes", 1e-6, "MB read by a layer"), ("us", 1.0, "µs of a layer")
    with matplotlib.rc_context(STYLE | {"font.size": 9}):
        figure = matplotlib.figure.Figure(figsize=(11, 7), layout="constrained")
        for row_axes, value in zip(figure.subplots(2, 2), ("recall", "mass"), strict=True):
            for axes, (field, scale, label) in zip(row_axes, panels, strict=True):
                axes.set_xscale("log")
                panel(axes, own, field, scale, value)
                axes.set(xlabel=label, ylabel=value)
                if field == "us" and rival:
                    axes.axvline(rival, color="0.4", linestyle=":", label="dense")
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right", frameon=False)
        sizes_of = "B = {}, {} key/value heads, {:,} tokens".format(*most)
        figure.suptitle(f"{title}: {sizes_of}\nFull points: lists per head. Hollow: per group.")
        figure.savefig(path, format="svg", metadata={"Date": None})


def of(rows: Sequence[dict], shape: tuple) -> list[dict]:
    """The rows of a shape."""
    return [row for row in rows if tuple(row["shape"].values()) == shape]


def panel(axes: Any, rows: Sequence[dict], field: str, scale: float, value: str) -> None:
    """Draws a line for each method over its ratios. Lists of a group are hollow points."""
    from matplotlib.ticker import LogLocator

    methods = list(dict.fromkeys(row["method"] for row in rows))
    for index, method in enumerate(methods):
        color = f"C{index}" if index < 10 else "0.3"
        for selection, face, size in (("head", color, 4), ("group", "none", 7)):
            own = [r for r in rows if (r["method"], r["selection"]) == (method, selection)]
            own.sort(key=lambda row: row["ratio"])
            x, y = [row[field] * scale for row in own], [row[value] for row in own]
            label = method if selection == "head" else None
            style = {"color": color, "markerfacecolor": face, "markersize": size, "linewidth": 1}
            axes.plot(x, y, "o-", label=label, **style)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
