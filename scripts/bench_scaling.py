"""Time and memory of attention, or of a whole model, over length: one command, one figure.

    .venv/bin/python scripts/bench_scaling.py --out runs/scaling.json
    .venv/bin/python scripts/bench_scaling.py --methods race_streamed --from 75M --to 75M
    .venv/bin/python scripts/bench_scaling.py --model small --to 1M --out runs/model.json

Measures RACE, softmax and RACE streamed, forward and backward, at lengths that double until a
method reaches a limit. With --model it is the value and the gradient of a language model of bytes,
without an optimizer. The points go to the file --out as they are measured, and the figure to the
file of the same name that ends in .svg. The same command goes on where it was stopped.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence

from bench_kernels import names, one_length, output, positive
from benchmarks import scaling_figure
from benchmarks.model_scaling import PRESETS, ModelSetting
from benchmarks.scaling import (
    GROWTH,
    AnySetting,
    Limits,
    Record,
    Setting,
    fill,
    in_own_process,
    ladder,
    look,
    read_points,
    series_of,
)
from command_line import main_of

SIZES = {field.name for kind in (Setting, ModelSetting) for field in dataclasses.fields(kind)}
# Trials of seconds: of the operation, and of a model.
TINY = "--from 64 --to 128 --step 2 --heads 2 --tables 2 --planes 2 --segment_length 32 --repeats 1"
TINY_SIZES = {False: "--head_dim 8", True: "--layers 1 --width 16"}


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
    add("--model", choices=PRESETS, help="sizes of a language model; without it: one operation")
    add("--methods", type=names(GROWTH, "method"), default=everything, help="by commas")
    add("--forms", type=names(Setting.FORMS, "form"), help="by commas; without it: all there are")
    add("--from", dest="first", type=one_length, default="1k", help="the shortest sequence")
    add("--to", dest="longest", type=one_length, default="1024M", help="the longest sequence")
    add("--step", type=count, default=2, help="a length divided by the one before it")
    add("--seconds", type=amount, default=Limits.seconds, help="a longer run is not started")
    add("--memory", type=amount, help="GiB that a run may hold; without it: the GPU's, or 8")
    add("--repeats", type=count, default=Limits.repeats, help="samples, of which the median counts")
    add("--out", type=output(".json"), default="scaling.json", help="the points; .svg beside it")
    add("--fresh", action="store_true", help="drop the points that --out has")
    add("--draw", action="store_true", help="measure nothing: draw and print what --out has")
    add("--tiny", action="store_true", help="a trial of seconds, with sizes and lengths of its own")
    # The defaults of sizes are those of the operation, or of the model.
    group = parser.add_argument_group("sizes", argument_default=argparse.SUPPRESS)
    add = group.add_argument
    add("--heads", type=count, help="N")
    add("--head_dim", type=count, help="H and V of the operation")
    add("--layers", type=count, help="blocks of a model")
    add("--width", type=count, help="D of a model")
    add("--tables", type=count, help="L")
    add("--planes", type=int, choices=range(1, 11), help="P, planes a table")
    add("--dtype", choices=("float32", "bfloat16"), help="without it: bfloat16 on a GPU")
    add(
        "--segment_length",
        type=one_length,
        help="without it: 256k on a GPU, or 16k; of large models less",
    )
    add("--remat", action="store_true", help="compute a model's blocks twice, to save memory")
    options = parser.parse_args(words)
    if options.tiny:
        sizes = TINY_SIZES[options.model is not None]
        options = parser.parse_args([*words, *TINY.split(), *sizes.split()])
    if options.longest < options.first:
        parser.error(f"--to {options.longest} is below --from {options.first}")
    if options.step < 2:
        parser.error(f"--step {options.step} does not make lengths grow")
    if options.draw and not options.out.exists():
        parser.error(f"--draw needs points, and there is no {options.out}; run without it first")
    try:
        options.setting = setting_of(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def setting_of(options: argparse.Namespace) -> AnySetting:
    """The setting that the command line asks for.

    Raises:
      ValueError: a flag does not go with the others.
    """
    base = PRESETS[options.model] if options.model else Setting()
    own = {field.name for field in dataclasses.fields(base)}
    sizes = {name: x for name, x in vars(options).items() if name in SIZES}
    if foreign := sorted(sizes.keys() - own):
        of = "one operation; leave out --model" if options.model else "a model; add --model"
        raise ValueError(f"--{foreign[0]} is a size of {of}")
    if unknown := [form for form in options.forms or () if form not in base.FORMS]:
        raise ValueError(f"a language model has no {unknown[0]} form")
    if "head_dim" in sizes:
        sizes["value_dim"] = sizes["head_dim"]
    return dataclasses.replace(base, **sizes)


def measure(options: argparse.Namespace) -> dict:
    """Measures what the file lacks; returns all that it has."""
    found = in_own_process(look, options.setting)
    if "stopped" in found:
        sys.exit(f"JAX does not start: {found['stopped']}")
    machine, setting, facts = (found[part] for part in ("machine", "setting", "facts"))
    record = Record(options.out, machine, setting, facts, fresh=options.fresh)
    limits = Limits(options.seconds, options.memory or found["memory"], options.repeats)
    series = series_of(options.methods, options.forms or setting.FORMS)
    if not series:
        sys.exit("race_streamed is causal: add --forms causal, or another method")
    print(f"{setting}\n{machine}\n{facts}", flush=True)
    lengths = ladder(options.first, options.longest, options.step)
    fill(record, series, lengths, setting, limits)
    return record.content


def main(words: Sequence[str]) -> None:
    """Measures, prints a markdown table and draws the figure."""
    options = parse(words)
    try:
        content = read_points(options.out) if options.draw else measure(options)
    except ValueError as error:
        sys.exit(str(error))
    print(scaling_figure.table(content))
    figure: pathlib.Path = options.out.with_suffix(".svg")
    scaling_figure.draw(content, figure)
    print(f"{options.out} has the points, {figure} the figure")


if __name__ == "__main__":
    main_of(main)
