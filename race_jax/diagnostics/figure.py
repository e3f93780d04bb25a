"""A figure of what the diagnostics found, as SVG."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from race_jax.diagnostics.buckets import Buckets
from race_jax.diagnostics.kernels import Errors
from race_jax.extras import require

# Text stays text, and the same figure is the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "race_jax", "font.size": 9}


def draw(
    path: str | pathlib.Path,
    *,
    errors: Mapping[str, Errors] | None = None,
    buckets: Buckets | None = None,
    context: Any = None,
) -> None:
    """Draws one panel for each argument that is given.

    Args:
      path: the SVG file, whose name ends in ".svg".
      errors: by the name of its line, the error by the number of tables. A dotted line shows
        1 / sqrt(L).
      buckets: what `buckets` returned. The shares of each table are sorted, and drawn over the rank
        of the bucket, beside the share 1 / R of equally full buckets.
      context: what `effective_context` returned, ``(B, T, K)``. A line is the mean over the batch
        of one head.

    Raises:
      ValueError: if there is nothing to draw, or the file has another ending.
      TypeError: if `errors` is not a dict.
      ModuleNotFoundError: if matplotlib is not installed.

    Example:
      >>> import jax.numpy as jnp, pathlib, tempfile
      >>> from race_jax import diagnostics
      >>> path = pathlib.Path(tempfile.mkdtemp(), "gate.svg")
      >>> draw(path, context=diagnostics.effective_context(jnp.zeros((1, 9, 2))))
      >>> "effective context" in path.read_text()
      True
    """
    require("race_jax.diagnostics.draw", "train", {"matplotlib": "matplotlib"})
    import matplotlib
    import matplotlib.figure

    given = (errors, _errors), (buckets, _buckets), (context, _context)
    panels: list[tuple[Any, Callable]] = [(what, how) for what, how in given if what is not None]
    if not panels:
        raise ValueError("nothing to draw: give errors, buckets or context")
    if pathlib.Path(path).suffix.lower() != ".svg":
        raise ValueError(f"the figure is an SVG file; got {str(path)!r}, so name it with .svg")
    with matplotlib.rc_context(STYLE):
        size = 3.6 * len(panels) + 0.4, 3.2
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for one, (what, how) in zip(axes, panels, strict=True):
            how(one, what)
            one.grid(alpha=0.3)
            one.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def _errors(axes: Any, errors: Mapping[str, Errors]) -> None:
    if not isinstance(errors, Mapping):
        raise TypeError(f"errors must be a dict, as in {{'P = 4': errors}}; got {type(errors)}")
    for label, found in errors.items():
        axes.errorbar(found.tables, found.mean, found.deviation, marker="o", capsize=3, label=label)
    first = next(iter(errors.values()))
    law = first.mean[0] * np.sqrt(first.tables[0] / first.tables)
    axes.plot(first.tables, law, ":", color="0.4", label="1 / √L")
    axes.set(
        **{"xscale": "log", "yscale": "log", "xlabel": "tables L"},
        ylabel="attention on wrong keys",
    )
    axes.set_xticks(first.tables, [str(number) for number in first.tables])
    axes.xaxis.minorticks_off()
    axes.legend(frameon=False)


def _buckets(axes: Any, found: Buckets) -> None:
    share = -np.sort(-np.asarray(found.share), axis=-1)
    tables, number = share.shape
    rank = np.arange(1, number + 1)
    for table in share:
        axes.plot(rank, table, color="C0", alpha=max(0.15, 1 / tables))
    axes.axhline(1 / number, linestyle=":", color="0.4")
    axes.xaxis.get_major_locator().set_params(integer=True)
    entropy = float(np.mean(np.asarray(found.entropy)))
    axes.set(
        **{"xlabel": "bucket, the fullest first", "ylabel": "share of tokens"},
        **{"ylim": (0, None), "title": f"entropy {entropy:.2f} of {np.log2(number):.0f} bits"},
    )


def _context(axes: Any, context: Any) -> None:
    means = np.asarray(context).mean(axis=0)
    for head, line in enumerate(means.T):
        axes.plot(np.arange(1, len(line) + 1), line, label=f"head {head}")
    axes.set(
        **{"xscale": "log", "yscale": "log", "xlabel": "position"},
        ylabel="effective context, tokens",
    )
    if means.shape[1] <= 8:
        axes.legend(frameon=False)
