"""RACE against softmax on any machine, in percent of its matrix product peak.

Prints a markdown table of medians, temporary memory, and the percentage of the machine's matrix
product peak, measured in the same run, that the fewest possible operations make. Inputs are random,
runs are sampled in turn, and all cores are used.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import AxisType, Mesh
from tqdm import tqdm

from benchmarks.attention import METHODS, Problem, Sizes, program
from benchmarks.plot import Point, plot
from benchmarks.programs import Inputs
from benchmarks.text import header, length_name, markdown, number, progress_bar
from benchmarks.timing import GIB, Figures, matmul_peak, time_in_turn

COMPILE_TOKENS = 32768  # compiling takes about as long as running so many tokens; for the time left
COLUMNS = {
    "T": 4,
    "attention": 21,
    "forward, ms": 11,
    "forward+backward, ms": 20,
    "softmax / this": 14,
    "temporary, MiB": 14,
    "% of peak, forward": 18,
    "% of peak, both": 15,
}

# The rows by name: a method of benchmarks/attention.py, and whether it is causal.
ROWS = {
    f"{method} {direction}": (method, direction == "causal")
    for direction in ("causal", "bidirectional")
    for method in ("race", "softmax")
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Samples of a run, seconds that they may take, and GiB that it may hold, inputs included."""

    repeats: int = 10
    seconds: float = 20.0
    memory: float = 8.0


class Row(NamedTuple):
    """What was measured of one attention in one direction at one length."""

    attention: str
    backward: bool
    length: int = 0
    figures: Figures = Figures()


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor that is at most `limit`."""
    return max(n for n in range(1, limit + 1) if number % n == 0)


def use_all_cores(heads: int) -> None:
    """One XLA host device a usable core, as many as divide the heads; before JAX's first use."""
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    jax.config.update("jax_num_cpu_devices", largest_divisor(heads, cores))


def head_mesh(heads: int) -> Mesh:
    """The devices of this process that the heads are spread over."""
    devices = jax.local_devices()[: largest_divisor(heads, jax.local_device_count())]
    return jax.make_mesh((len(devices),), ("heads",), devices=devices, axis_types=(AxisType.Auto,))


def expected_stop(before: Row, length: int, limits: Limits) -> str:
    """Why a length need not be tried, judged by the one before; empty where it should be."""
    if before.figures.ms is None:
        return before.figures.stopped
    growth = METHODS[ROWS[before.attention][0]].growth
    expected = before.figures.ms * 1e-3 * (length / before.length) ** growth
    return f"over {limits.seconds:g} s" if expected > limits.seconds else ""


def prepare(
    old: Row, sizes: Sizes, length: int, inputs: Inputs, mesh: Mesh, limits: Limits
) -> tuple[Row, tuple | None]:
    """A row, and what is to be sampled for it: a compiled run and its inputs, or None.

    `old` is the row of the length before; `inputs` are shared by all rows of this length.
    """
    method, causal = ROWS[old.attention]
    problem = Problem(length, causal, **dataclasses.asdict(sizes))
    if not causal:
        problem = dataclasses.replace(problem, decay=False)  # only the causal form can forget
    made = program(problem, method, backward=old.backward)
    figures = Figures.of(made, stopped=expected_stop(old, length, limits))
    row = old._replace(length=length, figures=figures)
    if figures.stopped:
        return row, None
    run = made.compile(mesh)
    figures.note_memory(run, mesh.size)
    if figures.held_bytes > limits.memory * GIB:
        figures.stopped = f"over {limits.memory:g} GiB"
        return row, None
    return row, (run, made.draw(inputs, mesh))


def measure(
    before: Sequence[Row], sizes: Sizes, length: int, mesh: Mesh, limits: Limits, progress: tqdm
) -> list[Row]:
    """All rows at one length; `before` holds those of the last length, or empty ones at first."""
    inputs: Inputs = {}
    rows, timed, runs = [], [], []
    for old in before:
        row, run = prepare(old, sizes, length, inputs, mesh, limits)
        rows.append(row)
        if run:
            timed.append(row)
            runs.append(run)
        progress.update(COMPILE_TOKENS)
    for row, ms in zip(timed, time_in_turn(runs, limits.repeats, limits.seconds), strict=True):
        row.figures.ms = ms
    progress.update(length * len(rows))
    return rows


def table_lines(rows: Sequence[Row], peak: float) -> list[str]:
    """One line of the table for each variant, from all rows of one length."""
    found = {(row.attention, row.backward): row for row in rows}
    lines = []
    for name in dict.fromkeys(row.attention for row in rows):
        pair = found[name, False].figures, found[name, True].figures
        both, direction = pair[1], name.split()[-1]
        rival = found.get((f"softmax {direction}", True))
        known = rival and rival.figures.ms and both.ms
        cells = [length_name(found[name, True].length), name]
        cells += [number(figures.ms, 2) or figures.stopped for figures in pair]
        cells += [number(rival.figures.ms / both.ms if known else None, 2)]
        cells += [number(both.temporary_bytes, 1, 2**-20)]
        cells += [number(figures.peak_percent(peak), 1) for figures in pair]
        lines.append(markdown(cells, COLUMNS))
    return lines


def record(kind: type, options: argparse.Namespace):
    """The fields of one record, from the command line."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


def row_fields(row: Row, peak: float) -> dict:
    """A row for a JSON file."""
    figures = row.figures
    return {
        "attention": row.attention,
        "backward": row.backward,
        "length": row.length,
        "seconds": figures.ms and figures.ms * 1e-3,
        "temporary_bytes": figures.temporary_bytes,
        "held_bytes": figures.held_bytes,
        "stopped": figures.stopped,
        "percent_of_peak": figures.peak_percent(peak),
    }


def save(options: argparse.Namespace, machine: dict, rows: Sequence[Row]) -> None:
    """Writes the files that were asked for."""
    if options.json:
        content = {"machine": machine, "sizes": dataclasses.asdict(record(Sizes, options))}
        content["rows"] = [row_fields(row, machine["peak"]) for row in rows]
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.plot:
        points = [
            Point(row.attention, row.length, row.backward, row.figures.ms, row.figures.held_bytes)
            for row in rows
        ]
        plot(points, options.plot)


def main(options: argparse.Namespace) -> None:
    """Measures length by length, printing each line of the table as it is known."""
    sizes, limits = record(Sizes, options), record(Limits, options)
    mesh = head_mesh(sizes.heads)
    device = mesh.devices.flat[0]
    dtype = "float32" if device.platform == "cpu" else sizes.dtype
    peak = matmul_peak(mesh, dtype)
    machine = {"jax": jax.__version__, "device": device.device_kind, "devices": mesh.size}
    machine |= {"peak": peak, "peak_dtype": dtype}
    print(f"{sizes}\n{mesh.size} x {device.device_kind}, jax {jax.__version__}, ", end="")
    print(
        f"{dtype} matrix product {peak / 1e9:,.1f} GFLOP/s\n",
        *header(COLUMNS),
        sep="\n",
        flush=True,
    )
    latest = [Row(name, backward) for name in options.rows for backward in (False, True)]
    total = sum(len(latest) * (COMPILE_TOKENS + length) for length in options.lengths)
    rows = []
    with progress_bar(total) as progress:
        for length in options.lengths:
            latest = measure(latest, sizes, length, mesh, limits, progress)
            progress.write("\n".join(table_lines(latest, peak)), file=sys.stdout)
            rows += latest
    save(options, machine, rows)
