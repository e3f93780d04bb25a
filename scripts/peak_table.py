"""RACE against softmax on any machine, in percent of its matrix product peak.

In: sizes and lengths. Out: a markdown table of medians, temporary memory, and the percentage of the
machine's matrix product peak, measured in the same run, that the fewest possible operations make
(counted in scripts/attention_variants.py). Inputs are random, runs are interleaved, and all cores
are used.
"""

import argparse
import dataclasses
import functools
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from attention_variants import VARIANTS, Inputs, Sizes, compile_run, draw, head_mesh
from table_text import header, length_name, markdown, number, progress_bar

SHORTEST_SAMPLE = 0.02  # seconds; a sample repeats a shorter run
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


@dataclasses.dataclass(frozen=True)
class Limits:
    """Samples of a run, seconds that they may take, and GiB that it may hold, inputs included."""

    repeats: int = 10
    seconds: float = 20.0
    memory: float = 8.0


@dataclasses.dataclass
class Row:
    """What was measured of one variant at one length; `stopped` says why there is no time."""

    attention: str
    backward: bool
    length: int = 0
    seconds: float | None = None
    temporary_bytes: int | None = None
    stopped: str = ""


def timed(run: Callable[[Inputs], object], inputs: Inputs, calls: int = 1) -> float:
    """Mean seconds of so many calls."""
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run(inputs))
    return (time.perf_counter() - start) / calls


def matmul_peak(mesh: Mesh, dtype: str, size: int = 2048) -> float:
    """Operations a second of one large matrix product a device: the best of five."""
    sharding = NamedSharding(mesh, PartitionSpec("heads"))
    shape = (mesh.size, size, size)
    matrices = jax.device_put(jax.random.normal(jax.random.key(1), shape, dtype), sharding)
    product = jax.jit(lambda inputs: inputs["x"] @ inputs["x"])
    best = min(timed(product, {"x": matrices}) for _ in range(5))
    return 2 * size**3 * mesh.size / best


def expected_stop(before: Row, length: int, limits: Limits) -> str:
    """Why a length need not be tried, judged by the one before; empty where it should be."""
    if before.seconds is None:
        return before.stopped
    expected = before.seconds * (length / before.length) ** VARIANTS[before.attention].growth
    return f"over {limits.seconds:g} s" if expected > limits.seconds else ""


def prepare(row: Row, inputs: Inputs, mesh: Mesh, limits: Limits) -> Callable[[], float] | None:
    """Compiles and warms up; gives what takes one sample, or None where memory forbids the run."""
    run = compile_run(VARIANTS[row.attention], inputs, mesh, backward=row.backward)
    memory = run.memory_analysis()
    row.temporary_bytes = memory.temp_size_in_bytes * mesh.size
    outside = (memory.argument_size_in_bytes + memory.output_size_in_bytes) * mesh.size
    if row.temporary_bytes + outside > limits.memory * 2**30:
        row.stopped = f"over {limits.memory:g} GiB"
        return None
    calls = math.ceil(SHORTEST_SAMPLE / timed(run, inputs))
    return functools.partial(timed, run, inputs, calls)


def measure(
    before: Sequence[Row], sizes: Sizes, length: int, mesh: Mesh, limits: Limits, progress: tqdm
) -> list[Row]:
    """All rows at one length, sampled in turn, so that a busy moment of the machine hits all.

    `before` holds the rows of the last length, or empty ones to start with.
    """
    inputs = draw(sizes, length, mesh)
    rows, running = [], []
    for old in before:
        row = Row(old.attention, old.backward, length, stopped=expected_stop(old, length, limits))
        sample = None if row.stopped else prepare(row, inputs, mesh, limits)
        if sample:
            running.append((row, sample, []))
        rows.append(row)
        progress.update(COMPILE_TOKENS)
    for _ in range(limits.repeats):
        for _, sample, samples in running:
            if sum(samples) < limits.seconds:
                samples.append(sample())
    for row, _, samples in running:
        row.seconds = statistics.median(samples)
    progress.update(length * len(rows))
    return rows


def percent_of_peak(row: Row, sizes: Sizes, peak: float) -> float | None:
    """The fewest operations over what the peak would do in the time taken."""
    if row.seconds is None:
        return None
    forward = VARIANTS[row.attention].operations(sizes, row.length)
    operations = forward * sizes.batch * row.length * sizes.heads * (3 if row.backward else 1)
    return 100 * operations / (row.seconds * peak)


def table_lines(rows: Sequence[Row], sizes: Sizes, peak: float) -> list[str]:
    """One line of the table for each variant, from all rows of one length."""
    found = {(row.attention, row.backward): row for row in rows}
    lines = []
    for name in dict.fromkeys(row.attention for row in rows):
        pair = found[name, False], found[name, True]
        both = pair[1]
        rival = found.get((VARIANTS[name].rival, True))
        known = rival and rival.seconds and both.seconds
        cells = [length_name(both.length), name]
        cells += [number(row.seconds, 2, 1e3) or row.stopped for row in pair]
        cells += [number(rival.seconds / both.seconds if known else None, 2)]
        cells += [number(both.temporary_bytes, 1, 2**-20)]
        cells += [number(percent_of_peak(row, sizes, peak), 1) for row in pair]
        lines.append(markdown(cells, COLUMNS))
    return lines


def plot(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Time over length, both logarithmic: whole lines with the backward pass, dashed without."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(dict.fromkeys(row.attention for row in rows)):
        for backward, style in ((True, "o-"), (False, "o--")):
            known = [r for r in rows if (r.attention, r.backward) == (name, backward) and r.seconds]
            label = f"{name}, forward{'+backward' * backward}"
            points = [row.length for row in known], [row.seconds for row in known]
            axes.loglog(*points, style, color=f"C{index}", label=label, markersize=3)
    ticks = sorted({row.length for row in rows})
    axes.set_xticks(ticks, [length_name(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="length T, tokens", ylabel="seconds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def record(kind: type, options: argparse.Namespace):
    """The fields of one record, from the command line."""
    return kind(**{field.name: getattr(options, field.name) for field in dataclasses.fields(kind)})


def save(options: argparse.Namespace, machine: dict, rows: Sequence[Row]) -> None:
    """Writes the files that were asked for."""
    sizes = record(Sizes, options)
    if options.json:
        content = {"machine": machine, "sizes": dataclasses.asdict(sizes), "rows": []}
        for row in rows:
            percent = percent_of_peak(row, sizes, machine["peak"])
            content["rows"].append(dataclasses.asdict(row) | {"percent_of_peak": percent})
        options.json.write_text(json.dumps(content, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


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
            progress.write("\n".join(table_lines(latest, sizes, peak)), file=sys.stdout)
            rows += latest
    save(options, machine, rows)
