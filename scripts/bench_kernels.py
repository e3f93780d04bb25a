"""How fast is attention: one command, one table.

    .venv/bin/python scripts/bench_kernels.py --lengths 256,4k,64k --plot bench.png
    XLA_PYTHON_CLIENT_MEM_FRACTION=.97 python scripts/bench_kernels.py --json bench.json

The first, without a GPU: RACE against softmax, in percent of the machine's matrix product peak
(benchmarks/peak_table.py). The second, on a GPU: RACE by kernels and by XLA and softmax by cuDNN,
in percent of the floor by bytes (benchmarks/floor_table.py). Either prints a markdown table.
"""

import argparse
import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Collection, Sequence

import jax

from benchmarks import floor_table, peak_table
from benchmarks.attention import METHODS, Problem, Sizes, input_arrays
from benchmarks.floor_table import IMPLEMENTATIONS, SWEEPS
from benchmarks.peak_table import ROWS, Limits, record, use_all_cores
from benchmarks.plot import FORMATS
from benchmarks.text import SUFFIXES, length_name
from command_line import main_of, why_not_written

LENGTHS = "256,512,1k,2k,4k,16k,64k,256k"
TABLES = {"peak": peak_table, "floor": floor_table}
SHARED = {"table", "repeats", "json"}
FLOOR_ONLY = {"sweep", "implementations"}
ADVICE = """On a GPU set XLA_PYTHON_CLIENT_MEM_FRACTION=.97 in the environment: else JAX takes three
quarters of the memory, and the longest sequences do not fit. A line that does not fit says so."""


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """A reader of numbers above zero."""

    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above zero")
        return value

    read.__name__ = f"positive {kind.__name__}"  # what argparse calls it where `kind` itself fails
    return read


def lengths(text: str) -> list[int]:
    """256,4k,1M -> [256, 4096, 1048576], in rising order."""
    words = [word.strip() for word in text.split(",")]
    try:
        found = {int(w[:-1]) * SUFFIXES[w[-1]] if w[-1:] in SUFFIXES else int(w) for w in words}
    except ValueError:
        found = {0}
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of lengths such as {LENGTHS}")
    return sorted(found)


def one_length(text: str) -> int:
    """1M -> 1048576."""
    try:
        [found] = lengths(text)
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not one length such as 4k") from None
    return found


def names(choices: Collection[str], kind: str) -> Callable[[str], list[str]]:
    """A reader of some of these names, by commas."""

    def read(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        if unknown := [name for name in found if name not in choices]:
            raise argparse.ArgumentTypeError(
                f"no {kind} {unknown[0]!r}; there are {', '.join(choices)}"
            )
        return list(dict.fromkeys(found))

    return read


def output(*suffixes: str) -> Callable[[str], pathlib.Path]:
    """A reader of file names, which refuses what could not be written after all the work."""

    def read(text: str) -> pathlib.Path:
        path = pathlib.Path(text)
        if path.suffix not in suffixes or path.is_dir() or not path.parent.is_dir():
            kinds = " or ".join(suffixes)
            raise argparse.ArgumentTypeError(f"{text} is not a {kinds} file in an existing folder")
        if reason := why_not_written(path):
            raise argparse.ArgumentTypeError(reason)
        return path

    return read


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line; stops with a sentence where it asks for what cannot be."""
    parser = argparse.ArgumentParser(
        description="Times RACE and softmax attention, and prints one markdown table.",
        epilog=ADVICE,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    count, amount = positive(int), positive(float)
    add = parser.add_argument
    add("--table", choices=TABLES, help="without it: floor where JAX finds a GPU, else peak")
    add("--repeats", type=count, default=Limits.repeats, help="samples, of which the median counts")
    add("--json", type=output(".json"), help="write the figures here")
    add = parser.add_argument_group("table floor").add_argument
    sweeps, implementations = names(SWEEPS, "sweep"), names(IMPLEMENTATIONS, "implementation")
    add("--sweep", type=sweeps, default=",".join(SWEEPS), help="parts of the table, by commas")
    everything = ",".join(IMPLEMENTATIONS)
    add("--implementations", type=implementations, default=everything, help="its lines, by commas")
    add = parser.add_argument_group("table peak").add_argument
    add("--lengths", type=lengths, default=LENGTHS, help="T by commas; k is 1024, M is 1024 k")
    add(
        "--rows",
        type=names(ROWS, "row"),
        default=",".join(ROWS),
        help="what to time, by commas",
    )
    add("--batch", type=count, default=Sizes.batch, help="B, sequences")
    add("--heads", type=count, default=Sizes.heads, help="N, heads")
    add("--head_dim", type=count, default=Sizes.head_dim, help="H, width of queries and keys")
    add("--value_dim", type=count, default=Sizes.value_dim, help="V, width of values")
    add("--tables", type=count, default=Sizes.tables, help="L, hash tables")
    add("--planes", type=int, choices=range(1, 11), default=Sizes.planes, help="P, planes a table")
    add("--dtype", choices=("float32", "bfloat16"), default=Sizes.dtype, help="of the inputs")
    add("--decay", action="store_true", help="with the forgetting gate, where RACE is causal")
    add(
        "--seconds",
        type=amount,
        default=Limits.seconds,
        help="for the samples of a run; a longer run is left out",
    )
    add("--memory", type=amount, default=Limits.memory, help="GiB that one run may hold")
    add("--plot", type=output(*FORMATS), help="draw time and memory here, .png or .svg")
    options = parser.parse_args(words)
    if options.value_dim != options.head_dim and any("softmax" in row for row in options.rows):
        parser.error(
            f"softmax rows need equal widths, got --head_dim {options.head_dim} and --value_dim "
            f"{options.value_dim}: choose --rows 'race causal,race bidirectional'"
        )
    longest = options.lengths[-1]
    problem = Problem(longest, **dataclasses.asdict(record(Sizes, options)))
    arrays = input_arrays(problem, METHODS["race"], backward=True)
    gib = 2 * sum(array.nbytes for array in arrays.values()) / 2**30
    if gib > options.memory:
        parser.error(
            f"T = {length_name(longest)} needs {gib:.1f} GiB for inputs and gradients alone, and "
            f"--memory allows {options.memory:g}"
        )
    return options


def check_table(options: argparse.Namespace, table: str) -> None:
    """Stops where an option was given that the table would not heed."""
    for name, default in vars(parse([])).items():
        heeded = name in SHARED or (name in FLOOR_ONLY) == (table == "floor")
        if not heeded and getattr(options, name) != default:
            other = "peak" if table == "floor" else "floor"
            sys.exit(f"--{name} is of the other table: leave it out, or add --table {other}")


def main(words: Sequence[str]) -> None:
    """Prints the table that was asked for, or that suits the machine."""
    options = parse(words)
    use_all_cores(options.heads)
    by_device = "floor" if jax.default_backend() == "gpu" else "peak"
    table = options.table or by_device
    check_table(options, table)
    TABLES[table].main(options)


if __name__ == "__main__":
    main_of(main)
