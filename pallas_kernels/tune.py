"""Times blocks on this machine's GPU and keeps those that beat the heuristic in a table.

    python -m pallas_kernels.tune --features 64 --value_dims 128 --forms causal,gate --write

In: sizes of problem classes. Out: a markdown table, a line a kernel; with --write the better
blocks in tuned.json, from which blocks.choose_blocks takes them. No equation.

One kernel at a time leaves the heuristic's blocks. Its time is that of the kernel, and whatever its
blocks change in XLA's steps round it: narrow blocks leave sums to them.
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import backend
from pallas_kernels.blocks import (
    DTYPES,
    TABLE,
    Block,
    Blocks,
    Pipeline,
    ProblemClass,
    candidates,
    device_kind,
    fits_warpgroups,
    heuristic_blocks,
    record_item,
)
from pallas_kernels.tiles import padded

LEAST_GAIN = 0.03  # of the heuristic's time; less is noise
THREADS = 12
ITERATIONS = 5
TABLES = 4  # L of the problems that are timed; P follows from F
# Padded sizes.
FEATURES, VALUE_DIMS = (64, 128, 256), (16, 32, 64, 128, 256)
COLUMNS = ("class", "kernel", "heuristic's ms", "best ms", "best block")
FORMS = {"causal": (True, False), "gate": (True, True), "bidirectional": (False, False)}


@dataclasses.dataclass(frozen=True)
class Step:
    """The kernel that a field of Blocks belongs to, and results that are made by it."""

    kernel: str  # part of its name in a profile, and of no other's
    results: tuple[str, ...]
    is_backward: bool = False


CAUSAL = {
    "sums": Step("causal_sums", ("final_numerator",)),
    "outputs": Step("causal_outputs", ("out",)),
    "query": Step("causal_query_gradients", ("zq",), True),
    "reverse": Step("causal_reverse_sums", ("initial_numerator", "initial_mass"), True),
    # causal_key_value_gradients where it makes the values' gradients too.
    "key": Step("causal_key_", ("zk",), True),
    "value": Step("causal_value_gradients", ("value",), True),
}
BIDIRECTIONAL = {
    "sums": Step("causal_sums", ("total_numerator",)),
    "outputs": Step("bidirectional_read", ("out",)),
    "query": Step("bidirectional_query_gradients", ("zq", "initial_numerator"), True),
    "key": Step("bidirectional_key_value_gradients", ("zk", "value"), True),
}
KERNELS = {step.kernel for step in (*CAUSAL.values(), *BIDIRECTIONAL.values())}


class Timing(NamedTuple):
    """Milliseconds of one kernel, and of the steps of XLA in the same program."""

    kernel: float
    rest: float = 0.0


class Found(NamedTuple):
    """What the candidates of one kernel came to; times in milliseconds."""

    heuristic_ms: float
    best_ms: float
    best: Block | Pipeline


def problem_class(form: str, features: int, value_dim: int, dtype: str) -> ProblemClass:
    """The class of the problems that `draw` makes."""
    is_causal, gate = FORMS[form]
    itemsize = jnp.dtype(dtype).itemsize
    suits = fits_warpgroups(features, padded(TABLES * planes_of(features)), value_dim, itemsize)
    return ProblemClass(features, value_dim, itemsize, is_causal, gate, is_causal and suits)


def planes_of(features: int) -> int:
    """P, of F = L * 2**P."""
    return (features // TABLES).bit_length() - 1


def steps(problem: ProblemClass) -> dict[str, Step]:
    """The kernels of a class, by field of Blocks."""
    if not problem.is_causal:
        return BIDIRECTIONAL
    return {f: step for f, step in CAUSAL.items() if f != "value" or not problem.warpgroups}


def draw(problem: ProblemClass, length: int, heads: int) -> tuple[tuple, tuple]:
    """Random arguments of the forward, and of the backward pass: states and cotangents too."""
    seeds, make = itertools.count(), jax.jit(jax.random.normal, static_argnums=(1, 2))

    def tokens(*sizes: int, dtype: str = DTYPES[problem.itemsize]) -> jax.Array:
        return make(jax.random.key(next(seeds)), (1, length, heads, *sizes), dtype)

    def state(*sizes: int) -> jax.Array:
        shape = 1, heads, problem.features, *sizes
        return make(jax.random.key(next(seeds)), shape, "float32")

    z, value_dim = (TABLES, planes_of(problem.features)), problem.value_dim
    given = [tokens(*z), tokens(*z), tokens(value_dim), jnp.full((heads,), 2.0)]
    initial = state(value_dim), abs(state())
    if problem.is_causal:
        decay = -0.05 * abs(tokens(dtype="float32")) if problem.gate else None
        given += [decay, None, None, *initial, jnp.zeros((1,), jnp.int32)]
        kept = jax.jit(pallas_kernels.causal_forward)(*given)[1:]
    else:
        given += [None, *initial]
        kept = jax.jit(pallas_kernels.bidirectional_forward)(*given)[1:]
    return tuple(given), (*given, *kept, tokens(value_dim), state(value_dim), state())


def program(problem: ProblemClass, step: Step, config: Blocks) -> Callable[..., tuple]:
    """The forward or backward pass as a function of its arrays, cut down to the step's results."""
    form = "causal" if problem.is_causal else "bidirectional"
    run = getattr(pallas_kernels, f"{form}_{'backward' if step.is_backward else 'forward'}")

    def results(*arrays):
        found = run(*arrays, config=config)
        return tuple(getattr(found, name) for name in step.results)

    return results


def compiled(jobs: Mapping[Any, tuple[Callable, tuple]]) -> dict[Any, Any]:
    """Each job's compiled program, or what went wrong in its place; many are made at a time."""
    done: dict[Any, Future | str] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for job, (function, arguments) in jobs.items():
            try:
                done[job] = pool.submit(jax.jit(function).lower(*arguments).compile)
            except Exception as error:  # noqa: BLE001  compilers have kinds of their own
                done[job] = summary(error)
    return {job: x if isinstance(x, str) else _outcome(x) for job, x in done.items()}


def _outcome(future: Future) -> Any:
    error = future.exception()
    return future.result() if error is None else summary(error)


def by_cupti(run: Callable, arguments: tuple, kernel: str) -> Timing:
    """Medians of device time."""
    from jax.experimental.mosaic.gpu import profiler

    # [1]: a name for the outputs would keep them alive.
    runs = profiler.measure(run, aggregate=False, iterations=ITERATIONS)(*arguments)[1]
    if not runs:
        raise RuntimeError("the profiler saw no kernel")
    return read_runs(runs, kernel)


def read_runs(runs: Sequence[Sequence[tuple[str, float]]], kernel: str) -> Timing:
    """Medians over runs of the time in one kernel and in those that are none of ours."""
    if not any(kernel in name for name, _ in runs[0]):
        names = ", ".join(name for name, _ in runs[0])
        raise RuntimeError(f"no kernel called {kernel} ran; these did: {names}")
    own = [sum(ms for name, ms in run if kernel in name) for run in runs]
    rest = [sum(ms for name, ms in run if not any(x in name for x in KERNELS)) for run in runs]
    return Timing(statistics.median(own), statistics.median(rest))


def by_wall_clock(run: Callable, arguments: tuple, kernel: str) -> Timing:
    """Medians of the whole program's time, which holds other kernels beside the one asked for."""
    del kernel
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(ITERATIONS):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append((time.perf_counter() - start) * 1e3)
    return Timing(statistics.median(times))


def find_clock() -> Callable[[Callable, tuple, str], Timing]:
    """CUPTI where a trial run gives kernels, else the wall clock, which it says."""
    try:
        by_cupti(jax.jit(jnp.sin), (jnp.ones(1000),), "")
    except (ImportError, AttributeError, RuntimeError) as error:
        say(f"WALL CLOCK of whole programs, not kernels: CUPTI cannot be had ({summary(error)})")
        return by_wall_clock
    return by_cupti


def tune(problem: ProblemClass, length: int, heads: int, clock: Callable) -> dict[str, Found]:
    """The best block of every kernel of a class, by field of Blocks."""
    start, blocks, passes = time.perf_counter(), heuristic_blocks(problem), steps(problem)
    arguments = draw(problem, length, heads)
    jobs = {}
    for field, step in passes.items():
        for block in candidates(problem, field):
            function = program(problem, step, dataclasses.replace(blocks, **{field: block}))
            jobs[field, block] = function, arguments[step.is_backward]
    programs = compiled(jobs)
    say(f"{problem.name}: {len(jobs)} programs in {time.perf_counter() - start:.0f} s; timing")
    times: dict[str, dict] = {field: {} for field in passes}
    for (field, block), run in programs.items():
        step, failure = passes[field], run
        if not isinstance(run, str):
            try:
                times[field][block] = clock(run, arguments[step.is_backward], step.kernel)
                continue
            except RuntimeError as error:
                failure = summary(error)
        say(f"{problem.name}: {field} failed with {block}: {failure}")
    chosen = {field: getattr(blocks, field) for field in passes}
    return {f: best(times[f], block) for f, block in chosen.items() if block in times[f]}


def best(times: Mapping[Block | Pipeline, Timing], heuristic: Block | Pipeline) -> Found:
    """The block of the least time, in which XLA's steps count by what they grew."""
    base = times[heuristic]
    costs = {block: timing.kernel + timing.rest - base.rest for block, timing in times.items()}
    winner = min(costs, key=costs.__getitem__)
    return Found(base.kernel, costs[winner], winner)


def merge(
    table: Mapping[str, Any], device: str, problem: ProblemClass, found: Mapping[str, Found]
) -> dict[str, Any]:
    """The table with the winners of a class; where the heuristic holds, what stood there goes."""
    classes = dict(table.get(device, {}))
    fields = {f: item for f, item in classes.get(problem.name, {}).items() if f not in found}
    for field, result in found.items():
        if result.best_ms < result.heuristic_ms * (1 - LEAST_GAIN):
            fields[field] = record_item(result.best)
    classes[problem.name] = fields
    filled = {name: items for name, items in classes.items() if items}
    others = {kind: items for kind, items in table.items() if kind != device}
    return others | ({device: filled} if filled else {})


def write(table: Mapping[str, Any], path: pathlib.Path) -> None:
    """Writes the table in one step: a reader finds the old or the new one."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", "utf-8")
    os.replace(draft, path)


def line(problem: ProblemClass, field: str, found: Found) -> str:
    """A kernel's line of the markdown table."""
    times = f"{found.heuristic_ms:.3f} | {found.best_ms:.3f}"
    return f"| {problem.name} | {field} | {times} | {found.best} |"


def summary(error: BaseException) -> str:
    """What an error says first, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def say(text: str) -> None:
    """A line beside the table."""
    print(text, file=sys.stderr, flush=True)


def limit(problem: ProblemClass) -> str | None:
    """Why the kernels cannot run a class, or None."""
    shape, dtype = (1, 64, 1, TABLES, planes_of(problem.features)), DTYPES[problem.itemsize]
    z = jax.ShapeDtypeStruct(shape, dtype)
    value = jax.ShapeDtypeStruct((1, 64, 1, problem.value_dim), dtype)
    return pallas_kernels.supports(z, z, value, is_causal=problem.is_causal)


def length_of(text: str) -> int:
    """1M -> 1048576."""
    length = int(text.rstrip("kM")) * {"k": 2**10, "M": 2**20}.get(text[-1:], 1)
    if length < 1 or length % 64:
        raise argparse.ArgumentTypeError(f"{text} is not a positive multiple of 64")
    return length


def one_of(*choices: Any) -> Callable[[str], list]:
    """A reader of words in a list, each of which must be one of `choices`."""

    def read(text: str) -> list:
        found = [type(choices[0])(word) for word in text.split(",")]
        if unknown := [word for word in found if word not in choices]:
            raise argparse.ArgumentTypeError(f"{unknown} is not among {choices}")
        return found

    return read


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--length", type=length_of, default="1M", help="tokens of a sequence")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--features", type=one_of(*FEATURES), default="64,128,256", help="F")
    parser.add_argument("--value_dims", type=one_of(*VALUE_DIMS), default="64,128", help="V")
    parser.add_argument("--dtypes", type=one_of(*DTYPES.values()), default="bfloat16")
    parser.add_argument("--forms", type=one_of(*FORMS), default=",".join(FORMS))
    parser.add_argument("--write", action="store_true", help=f"merge winners into {TABLE.name}")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: a table on standard output, progress and failures on standard error."""
    options = parse(arguments)
    if jax.default_backend() != "gpu":
        sys.exit(f"Tuning needs an NVIDIA GPU; JAX found {jax.default_backend()} only.")
    if reason := backend.missing():
        sys.exit(f"Tuning cannot start: {reason}.")
    clock = find_clock()
    print(f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|", sep="\n", flush=True)
    words = options.forms, options.features, options.value_dims, options.dtypes
    for problem in itertools.starmap(problem_class, itertools.product(*words)):
        if reason := limit(problem):
            say(f"{problem.name}: left out, {reason}")
            continue
        found = tune(problem, options.length, options.heads, clock)
        for field, result in found.items():
            print(line(problem, field, result), flush=True)
        if options.write:
            table = json.loads(TABLE.read_text("utf-8"))
            write(merge(table, device_kind(), problem, found), TABLE)


if __name__ == "__main__":
    main()
