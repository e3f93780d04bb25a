"""RACE and cuDNN's softmax on a GPU, in percent of the floor by bytes.

In: sweeps and implementations by name. Out: the copy rate of the card, then a markdown table of
median device times, of what part of each the floor is (scripts/floor_cases.py, at the copy rate of
this run), and of temporary memory over that of the program's inputs and outputs. All programs are
compiled first, side by side, so that nothing else runs while one is timed. A failure becomes a word
of the table.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import jax
from tqdm import tqdm

from device_time import Clock, copy_rate, find_clock, first_line, time_program
from floor_cases import (
    IMPLEMENTATIONS,
    SWEEPS,
    Case,
    Inputs,
    array_bytes,
    draw,
    floor_bytes,
    input_shapes,
    program,
)
from random_arrays import normal
from table_text import header, length_name, markdown, number, progress_bar

GIB = 2**30
WORKERS = 12
LARGE = 2 * GIB  # XLA tries out products on arrays of their size: above it, one program at a time
WORD = 60  # letters of an error in the table; the JSON file has its first line whole
COLUMNS = {
    "T": 4,
    "form": 16,
    "(P,L)": 5,
    "heads": 5,
    "H = V": 5,
    "attention": 15,
    "forward, ms": 13,
    "both, ms": 13,
    "% of floor, forward": 19,
    "% of floor, both": 16,
    "extra %, forward": 16,
    "extra %, both": 13,
    "GiB, both": 9,
}
LEGEND = """both: forward and backward; floor: the fewest bytes at the copy rate; extra: temporaries
over inputs and outputs; GiB: all of these; resident: gradients of a loss of the outputs"""


class Job(NamedTuple):
    """One program of the table: a case, an implementation by name, and whether it goes back."""

    case: Case
    attention: str
    backward: bool

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Those of its inputs."""
        return input_shapes(self.case, IMPLEMENTATIONS[self.attention], backward=self.backward)

    def compile(self) -> jax.stages.Compiled | str:
        """The program, or why there is none; the makers of its inputs as well."""
        implementation, shapes = IMPLEMENTATIONS[self.attention], self.shapes()
        try:
            for shape in shapes.values():
                normal(shape.shape, shape.dtype)
            run = program(self.case, implementation, backward=self.backward)
            return jax.jit(run).lower(shapes).compile()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other lines still count
            return words(error)


@dataclasses.dataclass
class Figures:
    """What is known of a program; `stopped` says why there is no time."""

    floor_bytes: int
    temporary_bytes: int | None = None
    array_bytes: int | None = None
    ms: float | None = None
    wall_ms: float | None = None
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    stopped: str = ""

    @property
    def held_bytes(self) -> int | None:
        """All that is on the device at once: inputs, outputs and temporaries."""
        return None if self.array_bytes is None else self.array_bytes + self.temporary_bytes

    @property
    def extra_percent(self) -> float | None:
        """Temporary memory over that of inputs and outputs."""
        return self.array_bytes and 100 * self.temporary_bytes / self.array_bytes

    def floor_percent(self, rate: float) -> float | None:
        """The time that the floor takes at this copy rate, over the time taken."""
        return self.ms and 100 * self.floor_bytes / rate / (self.ms * 1e-3)


@dataclasses.dataclass
class Line:
    """A line of the table: figures by direction, True with the backward pass."""

    case: Case
    attention: str
    figures: dict[bool, Figures]


def plan(cases: Sequence[Case], attentions: Sequence[str]) -> list[list[Job]]:
    """The programs of each line of the table, in order."""
    return [
        [Job(case, name, backward) for backward in (False, True) if backward or not case.resident]
        for case in cases
        for name in attentions
        if IMPLEMENTATIONS[name].runs(case)
    ]


def words(error: Exception) -> str:
    """An error as the table says it."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return first_line(error)


def compile_all(jobs: Sequence[Job], progress: tqdm) -> dict[Job, jax.stages.Compiled | str]:
    """Every program; those with large queries one after the other, beside the rest."""
    workers = min(WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(workers) as many:
        futures = {}
        for job in jobs:
            pool = one if array_bytes(job.shapes()["query"]) > LARGE else many
            futures[pool.submit(job.compile)] = job
        found = {}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            progress.update()
    return found


def memory_limit() -> int:
    """Bytes that JAX may use of the device; a CPU does not say, and is for trials only."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 8 * GIB)


def measure(
    job: Job, run: jax.stages.Compiled | str, inputs: Inputs, clock: Clock, repeats: int
) -> Figures:
    """Times one program, after drawing what `inputs` lacks; says why where that cannot be."""
    figures = Figures(floor_bytes(job.case, IMPLEMENTATIONS[job.attention], backward=job.backward))
    if isinstance(run, str):
        figures.stopped = run
        return figures
    try:
        memory = run.memory_analysis()
        figures.temporary_bytes = memory.temp_size_in_bytes
        figures.array_bytes = memory.argument_size_in_bytes + memory.output_size_in_bytes
        free = memory_limit() - figures.held_bytes
        if free < 0:
            figures.stopped = "out of memory"
            return figures
        # Recorded runs keep their outputs till the last: half of what is free may hold them.
        together = 1 + min(repeats, free // 2 // memory.output_size_in_bytes)
        for name, shape in job.shapes().items():
            if name not in inputs:
                inputs[name] = draw(job.case, name, shape)
        timing = time_program(run, inputs, clock, repeats, together)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other lines still count
        figures.stopped = words(error)
        return figures
    figures.ms, figures.wall_ms, figures.kernels = timing.ms, timing.wall_ms, timing.kernels
    return figures


def measured(
    jobs: Sequence[Sequence[Job]], clock: Clock, repeats: int, progress: tqdm
) -> Iterator[Line]:
    """Compiles everything, then gives line after line as it is known."""
    programs = compile_all([job for line in jobs for job in line], progress)
    for line in jobs:
        inputs: Inputs = {}  # of this line only: no two lines have theirs on the card at once
        figures = {
            job.backward: measure(job, programs.pop(job), inputs, clock, repeats) for job in line
        }
        inputs.clear()
        progress.update(len(line))
        yield Line(line[0].case, line[0].attention, figures)


def table_line(line: Line, rate: float) -> str:
    """The text of one line."""
    case, none = line.case, Figures(0)
    pair = line.figures.get(False, none), line.figures.get(True, none)
    hashes = IMPLEMENTATIONS[line.attention].hashes
    cells = [length_name(case.length), case.form]
    cells += [f"({case.planes},{case.tables})" if hashes else ""]
    cells += [str(case.heads), str(case.width), line.attention]
    cells += [number(f.ms, 3) or f.stopped[:WORD].replace("|", "/") for f in pair]
    cells += [number(f.floor_percent(rate), 1) for f in pair]
    cells += [number(f.extra_percent, 1) for f in pair]
    cells += [number(pair[1].held_bytes, 2, 1 / GIB)]
    return markdown(cells, COLUMNS)


def uncounted(lines: Sequence[Line]) -> list[str]:
    """Long runs where the wall clock shows more than the kernels: copies are not kernels."""
    return [
        f"{length_name(line.case.length)} {line.case.form}, {line.attention}: kernels "
        f"{f.ms:.2f} ms, wall clock {f.wall_ms:.2f} ms"
        for line in lines
        for f in line.figures.values()
        if f.ms and f.wall_ms > 1.1 * f.ms + 1
    ]


def content(machine: dict, lines: Sequence[Line]) -> dict:
    """Everything known, for a JSON file."""
    rows = [
        dataclasses.asdict(line.case)
        | {"attention": line.attention, "backward": backward}
        | dataclasses.asdict(figures)
        | {"floor_percent": figures.floor_percent(machine["copy_rate"])}
        | {"extra_percent": figures.extra_percent}
        for line in lines
        for backward, figures in line.figures.items()
    ]
    return {"machine": machine, "rows": rows}


def main(options: argparse.Namespace) -> None:
    """Prints the card and its copy rate, then each line as it is known, which it also saves."""
    clock, device = find_clock(), jax.local_devices()[0]
    rate = copy_rate(clock)
    machine = {"jax": jax.__version__, "device": device.device_kind, "clock": clock.describe()}
    machine |= {"copy_rate": rate, "memory_limit": memory_limit()}
    print(f"{device.device_kind}, jax {jax.__version__}, B = 1, bfloat16, medians of ", end="")
    print(f"{clock.describe()}\ncopy rate of the card {rate / 1e12:.2f} TB/s, ", end="")
    print(f"memory for JAX {memory_limit() / GIB:.1f} GiB\n{LEGEND}\n")
    print(*header(COLUMNS), sep="\n", flush=True)
    jobs = plan([case for name in options.sweep for case in SWEEPS[name]], options.implementations)
    lines = []
    with progress_bar(2 * sum(map(len, jobs))) as progress:
        for line in measured(jobs, clock, options.repeats, progress):
            lines.append(line)
            progress.write(table_line(line, rate), file=sys.stdout)
            sys.stdout.flush()
            if options.json:
                options.json.write_text(json.dumps(content(machine, lines), indent=2) + "\n")
    if notes := uncounted(lines):
        print("\nCopies, or waiting, beside the kernels:", *notes, sep="\n")
