"""How long a program runs on its device, kernel by kernel, and how fast the device copies.

In: compiled programs and their inputs. Out: medians of device time, the sum of a run's kernels as
CUPTI records them; of wall-clock time, with the reason, where CUPTI cannot be had.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from random_arrays import normal

Kernels = Sequence[tuple[str, float]]  # one run: names and milliseconds, in order

LONG_RUN, LONG_REPEATS = 20.0, 5  # a run above so many milliseconds is repeated so often at most
WALL_REPEATS = 3
COPY_ELEMENTS = 2**28  # 1 GiB of float32; of bfloat16 XLA copies a fifth slower


@dataclasses.dataclass(frozen=True)
class Clock:
    """Where times come from; `missing` says why it is not the device's own record."""

    missing: str = ""

    def describe(self) -> str:
        """For the head of a table."""
        if self.missing:
            return f"WALL CLOCK, not device time, because CUPTI cannot be had ({self.missing})"
        return "device time by CUPTI (the sum of a run's kernels)"


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians of one program in milliseconds, and the kernels of a middle run by name."""

    ms: float
    wall_ms: float
    kernels: dict[str, float]


def first_line(error: Exception) -> str:
    """What an error says first, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def find_clock() -> Clock:
    """CUPTI where a trial run gives kernels, else the wall clock."""
    try:
        record(jax.jit(jnp.sin), jnp.ones(1000), 1)
    except (ImportError, AttributeError, RuntimeError) as error:
        return Clock(missing=first_line(error))
    return Clock()


def record(program: Callable, inputs: object, iterations: int) -> list[Kernels]:
    """The kernels of so many runs; their outputs are alive together while it goes on."""
    from jax.experimental.mosaic.gpu import profiler

    # [1]: a name for the outputs would keep them alive into the caller's next call.
    found = profiler.measure(program, aggregate=False, iterations=iterations)(inputs)[1]
    return read_runs(found)


def read_runs(found: Sequence | None) -> list[Kernels]:
    """One list of (kernel, ms) a run; the profiler gives a single run without the outer list."""
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return [found] if isinstance(found[0], tuple) else list(found)


def record_all(program: Callable, inputs: object, repeats: int, together: int) -> list[Kernels]:
    """Runs in groups of `together`, or one by one where a group fails.

    A group fails where its outputs do not fit, or where its runs differ in the order of kernels.
    """
    runs = []
    while len(runs) < repeats:
        try:
            runs += record(program, inputs, min(together, repeats - len(runs)))
        except RuntimeError:
            if together == 1:
                raise
            together = 1
    return runs


def wall_clock(program: Callable, inputs: object) -> float:
    """Milliseconds of one call, by the wall clock."""
    start = time.perf_counter()
    jax.block_until_ready(program(inputs))
    return (time.perf_counter() - start) * 1e3


def time_program(
    program: Callable, inputs: object, clock: Clock, repeats: int, together: int = 1
) -> Timing:
    """The median time of a program; `together` runs may have their outputs alive at once."""
    wall_clock(program, inputs)  # the first call loads the program
    walls = [wall_clock(program, inputs) for _ in range(WALL_REPEATS)]
    if min(walls) > LONG_RUN:
        repeats = min(repeats, LONG_REPEATS)
    if clock.missing:
        walls += [wall_clock(program, inputs) for _ in range(repeats - len(walls))]
        return Timing(statistics.median(walls), statistics.median(walls), {})
    runs = sorted(record_all(program, inputs, repeats, together), key=total)
    kernels: dict[str, float] = {}
    for name, ms in runs[len(runs) // 2]:
        kernels[name] = kernels.get(name, 0.0) + ms
    return Timing(statistics.median(map(total, runs)), statistics.median(walls), kernels)


def total(kernels: Kernels) -> float:
    """Milliseconds of one run."""
    return sum(ms for _, ms in kernels)


def copy_rate(clock: Clock, elements: int = COPY_ELEMENTS) -> float:
    """Bytes a second, read and written, of x * 2 over a large float32 array."""
    array = normal((elements,), jnp.float32)(0)
    program = jax.jit(lambda x: x * 2).lower(array).compile()
    return 2 * array.nbytes / time_program(program, array, clock, repeats=11).ms * 1e3
