"""RACE and cuDNN's softmax on a GPU, in percent of the floor by bytes.

Prints the copy rate of the card, then a markdown table of median device times, of what part of each
the floor is (the fewest bytes at the copy rate of this run), and of temporary memory over that of
the program's inputs and outputs. All programs are compiled first, side by side, so that nothing
else runs while one is timed. A failure becomes a word of the table.
"""

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

import jax
from tqdm import tqdm

from benchmarks.attention import METHODS, K, M, Problem, program
from benchmarks.programs import Inputs, Program
from benchmarks.text import header, length_name, markdown, number, progress_bar
from benchmarks.timing import (
    GIB,
    Clock,
    Figures,
    copy_rate,
    find_clock,
    memory_limit,
    time_program,
    words,
)

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
IMPLEMENTATIONS = ("pallas from z", "pallas from qkv", "xla from qkv", "cudnn softmax")
LEGEND = """both: forward and backward; floor: the fewest bytes at the copy rate; extra: temporaries
over inputs and outputs; GiB: all of these; resident: gradients of a loss of the outputs"""


def case(length: int, *, width: int = 128, tables: int = 4, planes: int = 4, **rest) -> Problem:
    """A problem of the table: B = 1, H = V, bfloat16."""
    sizes = {"tables": tables, "planes": planes, "head_dim": width, "value_dim": width}
    return Problem(length, dtype="bfloat16", **sizes, **rest)


three = functools.partial(case, tables=3, planes=3)

# A star: each sweep leaves the base point, case(length), in one direction.
SWEEPS = {
    "lengths": [case(t) for t in (K, 2 * K, 4 * K, 16 * K, 64 * K, 256 * K, M, 4 * M, 16 * M)],
    "features": [case(M, tables=2, planes=2), three(M)],
    "heads": [case(t, heads=32) for t in (32 * K, 128 * K)],
    "widths": [case(M, width=64)],
    "gate": [three(M, decay=True), case(M, decay=True)],
    "bidirectional": [
        *(three(t, causal=False) for t in (M, 4 * M, 12 * M)),
        case(M, causal=False),
    ],
    "resident": [three(t, resident=True) for t in (12 * M, 16 * M)],
}


class Job(NamedTuple):
    """One program of the table."""

    case: Problem
    attention: str
    backward: bool
    program: Program

    def compile(self) -> jax.stages.Compiled | str:
        """The program, or why there is none; the makers of its inputs as well."""
        try:
            return self.program.compile()
        except Exception as error:  # noqa: BLE001 - whatever it is, the other lines still count
            return words(error)


@dataclasses.dataclass
class Line:
    """A line of the table: figures by direction, True with the backward pass."""

    case: Problem
    attention: str
    figures: dict[bool, Figures]


def form(problem: Problem) -> str:
    """The form of a problem as the table names it."""
    words = ["causal" if problem.causal else "bidirectional"]
    return ", ".join(words + ["gate"] * problem.decay + ["resident"] * problem.resident)


def plan(cases: Sequence[Problem], attentions: Sequence[str]) -> list[list[Job]]:
    """The programs of each line of the table, in order."""
    return [
        [
            Job(case, name, backward, program(case, name, backward=backward))
            for backward in (False, True)
            if backward or not case.resident
        ]
        for case in cases
        for name in attentions
        if METHODS[name].runs(case)
    ]


def compile_all(jobs: Sequence[Job], progress: tqdm) -> dict[Job, jax.stages.Compiled | str]:
    """Every program; those with large queries one after the other, beside the rest."""
    workers = min(WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(workers) as many:
        futures = {}
        for job in jobs:
            pool = one if job.program.inputs["query"].nbytes > LARGE else many
            futures[pool.submit(job.compile)] = job
        found = {}
        for future in as_completed(futures):
            found[futures[future]] = future.result()
            progress.update()
    return found


def measure(
    job: Job, run: jax.stages.Compiled | str, inputs: Inputs, clock: Clock, repeats: int
) -> Figures:
    """Times one program that was compiled, or says why it was not."""
    if isinstance(run, str):
        return Figures.of(job.program, stopped=run)
    return time_program(job.program, clock, repeats, run=run, shared=inputs)


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
    case, none = line.case, Figures()
    pair = line.figures.get(False, none), line.figures.get(True, none)
    hashes = METHODS[line.attention].hashes
    cells = [length_name(case.length), form(case)]
    cells += [f"({case.planes},{case.tables})" if hashes else ""]
    cells += [str(case.heads), str(case.head_dim), line.attention]
    cells += [number(f.ms, 3) or f.stopped[:WORD].replace("|", "/") for f in pair]
    cells += [number(f.floor_percent(rate), 1) for f in pair]
    cells += [number(f.extra_percent, 1) for f in pair]
    cells += [number(pair[1].held_bytes, 2, 1 / GIB)]
    return markdown(cells, COLUMNS)


def uncounted(lines: Sequence[Line]) -> list[str]:
    """Long runs where the wall clock shows more than the kernels: copies are not kernels."""
    return [
        f"{length_name(line.case.length)} {form(line.case)}, {line.attention}: kernels "
        f"{f.ms:.2f} ms, wall clock {f.wall_ms:.2f} ms"
        for line in lines
        for f in line.figures.values()
        if f.ms and f.wall_ms > 1.1 * f.ms + 1
    ]


def case_fields(case: Problem) -> dict:
    """What the cases of this table differ in, for a JSON file."""
    names = ("length", "causal", "resident", "tables", "planes", "heads")
    fields = {name: getattr(case, name) for name in names}
    return fields | {"gate": case.decay, "width": case.head_dim}


def content(machine: dict, lines: Sequence[Line]) -> dict:
    """Everything known, for a JSON file."""
    rows = [
        case_fields(line.case)
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
