"""What sparse decoding costs and keeps, and from which length on it pays: one command, one table.

    .venv/bin/python scripts/bench_decode.py --out runs/decode.json
    .venv/bin/python scripts/bench_decode.py --full --seconds 3600 --out runs/decode.json

A line is one scorer at one ratio of all tokens to those that are read. It gives the device time of
one layer and step (the sum of its kernels as CUPTI records them), the wall time of one compiled
step over all layers divided by their number, the bytes that a layer reads and how long these take
at the copy rate of the card, the gain over the fastest dense attention, and what was kept: recall,
mass and error on random keys that are alike over 32 neighbors (benchmarks/decode_quality.py).
Appending the token is not part of a step. If time is left, another table compares the time that
the codes of a prompt take with that of its attention. The rows go to the file --out, a markdown
table to the file of the same name that ends in .md, and a figure to that which ends in .svg.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jaxlib

from bench_kernels import lengths, names, output, positive
from benchmarks import decode_prefill, decode_report
from benchmarks.decode_cells import METHODS, Setting, estimate, every, in_small, main_part
from benchmarks.decode_runs import IMPLEMENTATIONS, Bench, Limits
from benchmarks.text import header
from benchmarks.timing import COPY_ELEMENTS, copy_rate, find_clock, memory_limit
from command_line import main_of

LENGTHS = "16k,32k,64k,128k,256k"
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm"


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line; stops with a sentence where it asks for what cannot be."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, count = parser.add_argument, positive(int)
    everything = ",".join(METHODS).replace(", ", " ")
    methods = names([name.replace(", ", " ") for name in METHODS], "method")
    add("--methods", type=methods, default=everything, help="by commas")
    add("--lengths", type=lengths, default=LENGTHS, help="S by commas; k is 1024")
    add("--full", action="store_true", help="the whole grid, and not only its main part")
    add("--implementation", choices=IMPLEMENTATIONS, help="without it: kernels where they run")
    add("--repeats", type=count, default=Limits.repeats, help="runs, of which the median counts")
    seconds = positive(float)
    add("--seconds", type=seconds, default=Limits.seconds, help="no cell is begun after these")
    add("--out", type=output(".json"), default="decode.json", help="the rows; .md, .svg beside it")
    add("--draw", type=pathlib.Path, metavar="FILE", help="draw rows of a file, measure nothing")
    add("--dry", action="store_true", help="print sizes and memory, and measure nothing")
    add("--tiny", action="store_true", help="a trial of seconds, with sizes of its own")
    options = parser.parse_args(words)
    options.methods = [name for name in METHODS if name.replace(", ", " ") in options.methods]
    return options


def machine(clock, rate: float) -> dict:
    """The card, its clocks, the versions and the copy rate."""
    found = {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "python": sys.version.split()[0],
        "clock": clock.describe(),
        "copy_bytes_per_second": rate,
        "memory_limit": memory_limit(),
    }
    if found["platform"] == "gpu":
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            found[QUERY] = run.stdout.strip()
        except (OSError, subprocess.SubprocessError) as error:
            found[QUERY] = f"unknown, because nvidia-smi failed: {error}"
    return found


def head(content: dict) -> list[str]:
    """The lines before the table."""
    about, setting = content["machine"], content["setting"]
    rate = about["copy_bytes_per_second"]
    return [
        f"{about['device']}; {about.get(QUERY, '')}; JAX {about['jax']}, jaxlib {about['jaxlib']}",
        f"copy rate {rate / 1e9:.0f} GB/s, read and written; {about['clock']}",
        f"N = {setting['heads']}, H = V = {setting['head_dim']}, bfloat16, sink {setting['sink']}, "
        f"window {setting['window']}, at most {setting['layers']} distinct caches; µs and MB are "
        "those of one layer",
    ]


def report(content: dict) -> str:
    """All tables as one page."""
    even = decode_report.break_even_lines(content["break_even"])
    parts = [
        head(content),
        decode_report.dense_table(content["dense"]),
        decode_report.table(content["rows"]),
        decode_report.prefill_table(content["prefill"]),
        ["Break-even:", "", *(f"- {line}" for line in even or ["no method at several lengths"])],
        content["notes"],
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def notes(bench: Bench) -> list[str]:
    """Which lines are missing, and why kernels did not run."""
    lines = []
    if bench.left_out:
        lines.append(f"{bench.left_out} cells were left out for lack of time or memory.")
    reasons = {row["method"]: row["why"] for row in bench.rows if row["why"]}
    for row in bench.rows:
        if "quality_stopped" in row:
            reasons[row["method"] + ", quality"] = row["quality_stopped"]
    lines += [f"{method}: {why}" for method, why in reasons.items()]
    return lines


def draw(content: dict, out: pathlib.Path) -> None:
    """Draws the figure of a file of rows, beside `out`."""
    figure = out.with_suffix(".svg")
    decode_report.draw(content["rows"], figure, content["machine"]["device"])
    print(f"{figure} has the figure")


def main(words: Sequence[str]) -> None:
    """Measures, prints every line when it is known, and writes the files."""
    options = parse(words)
    if options.draw:
        draw(json.loads(options.draw.read_text()), options.out)
        return
    setting, sizes = in_small() if options.tiny else (Setting(), options.lengths)
    parts = (every if options.full else main_part)(setting, sizes, options.methods)
    print("\n".join(estimate(parts, setting, memory_limit())), flush=True)
    if options.dry:
        print(f"{sum(map(len, parts))} cells")
        return
    clock = find_clock()
    rate = copy_rate(clock, 2**20 if options.tiny else COPY_ELEMENTS)
    limits = Limits(options.repeats, options.seconds, options.implementation)
    bench = Bench(setting, limits, clock, rate)
    content: dict[str, Any] = {"machine": machine(clock, rate), "prefill": []}
    content |= {"setting": dataclasses.asdict(setting)}
    print("\n".join([*head(content), "", *header(decode_report.COLUMNS)]), flush=True)
    for row in bench.measure(parts):
        print(decode_report.line(row), flush=True)
        content |= {"rows": bench.rows, "dense": bench.dense, "notes": notes(bench)}
        content["break_even"] = decode_report.break_even(bench.rows)
        options.out.write_text(json.dumps(content, indent=1))
    if not bench.rows:
        sys.exit("nothing was measured: raise --seconds, or give shorter --lengths")
    prompts = decode_prefill.prompts(setting, sizes, options.methods)
    coded = decode_prefill.measure(setting, prompts, clock, options.repeats)
    while not bench.is_late() and (row := next(coded, None)):
        content["prefill"].append(row)
        options.out.write_text(json.dumps(content, indent=1))
    if missing := len(prompts) - len(content["prefill"]):
        content["notes"].append(f"{missing} lines about prompts were left out: raise --seconds.")
    page = report(content)
    print("\n" + page)
    table: pathlib.Path = options.out.with_suffix(".md")
    table.write_text(page)
    draw(content, options.out)
    print(f"{options.out} has the rows, {table} the tables")


if __name__ == "__main__":
    main_of(main)
