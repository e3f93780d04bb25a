"""Time and memory of one attention operation over length: one command, one figure.

    .venv/bin/python scripts/bench_scaling.py --out runs/scaling.json
    .venv/bin/python scripts/bench_scaling.py --methods race_streamed --from 75M --to 75M

Measures RACE, softmax and RACE streamed, forward and backward, at lengths that double until a
method reaches a limit. The points go to the file --out as they are measured, and the figure to the
file of the same name that ends in .svg. The same command goes on where it was stopped.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence

from bench_kernels import lengths, names, output, positive
from benchmarks import scaling_figure
from benchmarks.scaling import (
    GROWTH,
    Limits,
    Record,
    Setting,
    fill,
    in_own_process,
    look,
    series_of,
)

FORMS = ("causal", "bidirectional")
# By platform: the dtype of the inputs, and the tokens of a segment where the sequence is streamed.
DEFAULTS = {"cpu": ("float32", 16 * 2**10), "gpu": ("bfloat16", 256 * 2**10)}
TINY = """--from 64 --to 128 --heads 2 --head_dim 8 --tables 2 --planes 2 --segment_length 32
--repeats 1""".split()


def one_length(text: str) -> int:
    """1M -> 1048576."""
    found = lengths(text)
    if len(found) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not one length such as 4k")
    return found[0]


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line; stops with a sentence where it asks for what cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Lengths are given as 4096, 4k or 1M. k is 1024, and M is 1024 k. docs/operation.md "
        "says what N, H, V, L and P are.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, count, amount = parser.add_argument, positive(int), positive(float)
    everything = ",".join(GROWTH)
    add("--methods", type=names(GROWTH, "method"), default=everything, help="by commas")
    add("--forms", type=names(FORMS, "form"), default=",".join(FORMS), help="by commas")
    add("--from", dest="first", type=one_length, default="1k", help="the shortest sequence")
    add("--to", dest="longest", type=one_length, default="1024M", help="the longest sequence")
    add("--seconds", type=amount, default=Limits.seconds, help="a longer run is not started")
    add("--memory", type=amount, help="GiB that a run may hold; without it: the GPU's, or 8")
    add("--repeats", type=count, default=Limits.repeats, help="samples, of which the median counts")
    add("--heads", type=count, default=Setting.heads, help="N")
    add("--head_dim", type=count, default=Setting.head_dim, help="H and V")
    add("--tables", type=count, default=Setting.tables, help="L")
    add(
        "--planes", type=int, choices=range(1, 11), default=Setting.planes, help="P, planes a table"
    )
    add(
        "--dtype", choices=("float32", "bfloat16"), help="without it: bfloat16 on a GPU, or float32"
    )
    add("--segment_length", type=one_length, help="without it: 256k on a GPU, or 16k")
    add("--out", type=output(".json"), default="scaling.json", help="the points; .svg beside it")
    add("--fresh", action="store_true", help="drop the points that --out has")
    add("--draw", action="store_true", help="measure nothing: draw and print what --out has")
    add("--tiny", action="store_true", help="a trial of seconds, with sizes and lengths of its own")
    options = parser.parse_args(words)
    if options.tiny:
        options = parser.parse_args([*words, *TINY])
    if options.longest < options.first:
        parser.error(f"--to {options.longest} is below --from {options.first}")
    if options.draw and not options.out.exists():
        parser.error(f"--draw needs points, and there is no {options.out}; run without it first")
    return options


def measure(options: argparse.Namespace) -> dict:
    """Measures what the file lacks; returns all that it has."""
    found = in_own_process(look, options.heads)
    if "stopped" in found:
        sys.exit(f"JAX does not start: {found['stopped']}")
    machine = found["machine"]
    dtype, segment_length = DEFAULTS["gpu" if machine["platform"] == "gpu" else "cpu"]
    setting = Setting(
        heads=options.heads,
        head_dim=options.head_dim,
        value_dim=options.head_dim,
        tables=options.tables,
        planes=options.planes,
        dtype=options.dtype or dtype,
        segment_length=options.segment_length or segment_length,
    )
    try:
        record = Record(options.out, machine, setting, fresh=options.fresh)
    except ValueError as error:
        sys.exit(str(error))
    limits = Limits(options.seconds, options.memory or found["memory"], options.repeats)
    series = series_of(options.methods, options.forms)
    if not series:
        sys.exit("race_streamed is causal: add --forms causal, or another method")
    print(f"{dataclasses.asdict(setting)}\n{machine}", flush=True)
    fill(record, series, options.first, options.longest, setting, limits)
    return record.content


def main(words: Sequence[str]) -> None:
    """Measures, prints a markdown table and draws the figure."""
    options = parse(words)
    old = options.draw and json.loads(options.out.read_text("utf-8"))
    content = old or measure(options)
    print(scaling_figure.table(content))
    figure: pathlib.Path = options.out.with_suffix(".svg")
    scaling_figure.draw(content, figure)
    print(f"{options.out} has the points, {figure} the figure")


if __name__ == "__main__":
    main(sys.argv[1:])
