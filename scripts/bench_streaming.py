"""What streaming costs: time and memory of one gradient of a whole model, by length.

    .venv/bin/python scripts/bench_streaming.py --lengths 16k,64k,256k --segment_length 8k
    .venv/bin/python scripts/bench_streaming.py --file 1M --segment_length 8k

The first compares the gradient over a sequence in memory with that of the whole at once. The second
writes a file of random bytes, computes one gradient from it, and tells the peak memory of the
process. Processor seconds add up over cores, and count no time for which other programs ran.
"""

import argparse
import functools
import pathlib
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence

import jax
import numpy as np
from flax import nnx

from bench_kernels import lengths, one_length, positive
from benchmarks.byte_model import ByteModel, shifted
from benchmarks.text import header, length_name, markdown, progress_bar
from benchmarks.timing import wall_clock
from command_line import main_of
from race_jax import streaming
from race_jax.models import ModelConfig

GIB = 2**30
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes
COLUMNS = {
    "tokens": 6,
    "gradient": 26,
    "s": 8,
    "processor s": 11,
    "µs a token": 10,
    "temporaries, GiB": 16,
}


def byte_model(options: argparse.Namespace) -> tuple[Callable, nnx.State, object]:
    """A step over bytes, its parameters and the state before the first byte."""
    model = ByteModel(ModelConfig(num_layers=options.layers, width=options.width))
    params, fixed = model.variables()
    return model.step(fixed), params, model.state(params, fixed)


def random_bytes(count: int) -> np.ndarray:
    """The same bytes every time."""
    return np.random.default_rng(0).integers(0, 256, count, np.uint8)


def processor_seconds() -> float:
    """What this process has used of the processor."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def compare(options: argparse.Namespace) -> None:
    """Prints a line for each length and each way to the gradient."""
    step, params, state = byte_model(options)
    cut = functools.partial(streaming.value_and_grad, step, segment_length=options.segment_length)

    def whole(params, state, sequence):
        return jax.value_and_grad(lambda params: step(params, state, sequence)[1][0])(params)

    ways = {
        "whole": whole,
        "streamed": cut(),
        "streamed, every state kept": cut(group_size=1),
        "streamed, truncated": cut(truncated=True),
    }
    print(*header(COLUMNS), sep="\n")
    bar = progress_bar(len(options.lengths) * len(ways) * options.repeats)
    for length in options.lengths:
        arguments = params, state, shifted(random_bytes(length + 1)[None].astype(np.int32))
        runs = {}
        for name, way in ways.items():
            compiled = jax.jit(way).lower(*arguments).compile()
            memory = compiled.memory_analysis().temp_size_in_bytes / GIB
            if memory <= options.memory:
                runs[name] = functools.partial(lambda run, x: run(*x), compiled), memory
        walls, cores = ({name: [] for name in runs} for _ in range(2))
        for _ in range(options.repeats):
            for name, (run, _) in runs.items():
                before = processor_seconds()
                walls[name].append(wall_clock(run, arguments) / 1e3)
                cores[name].append(processor_seconds() - before)
                bar.update()
        for name, (_, memory) in runs.items():
            wall, core = (statistics.median(times[name]) for times in (walls, cores))
            figures = f"{wall:.2f}", f"{core:.2f}", f"{wall / length * 1e6:.2f}", f"{memory:.3f}"
            bar.write(markdown([length_name(length), name, *figures], COLUMNS))
    bar.close()


def from_file(options: argparse.Namespace) -> None:
    """Prints the time and the peak memory of one gradient over the bytes of a file."""
    step, params, state = byte_model(options)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "tokens.bin")
        random_bytes(options.file + 1).tofile(path)
        tokens = np.memmap(path, np.uint8, mode="r")
        segments = streaming.Segments(shifted(tokens[None]), options.segment_length)
        bar = progress_bar(0)

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        run = streaming.host_value_and_grad(step, truncated=options.truncated, progress=show)
        seconds = wall_clock(lambda segments: run(params, state, segments), segments) / 1e3
        bar.close()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB
    print(
        f"{options.file:,} tokens from a file: {seconds:.1f} s with compilation, "
        f"{seconds / options.file * 1e6:.2f} µs a token; at most {peak:.2f} GiB in memory"
    )


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add, count = parser.add_argument, positive(int)
    add("--lengths", type=lengths, default="16k,64k", help="by commas; k is 1024, M is 1024 k")
    add("--segment_length", type=one_length, default="8k", help="tokens of a segment")
    add("--file", type=one_length, help="tokens of a file to read, in place of the comparison")
    add("--truncated", action="store_true", help="with --file: stop gradients at borders")
    add("--layers", type=count, default=2, help="blocks of the model")
    add("--width", type=count, default=64, help="width of the model")
    add("--repeats", type=count, default=3, help="runs, of which the median counts")
    add("--memory", type=positive(float), default=8.0, help="GiB that temporaries may take")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> None:
    """Prints what was asked for."""
    options = parse(words)
    (from_file if options.file else compare)(options)


if __name__ == "__main__":
    main_of(main)
