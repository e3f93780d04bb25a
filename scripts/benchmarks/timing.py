"""Time and memory of programs, and how fast the machine copies and multiplies.

Time is the median over several runs. On a GPU it is device time, the sum of a run's kernels as
CUPTI records them; elsewhere, or where CUPTI cannot be had, it is the wall clock. All times are in
milliseconds.
"""

import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from benchmarks.arrays import Random
from benchmarks.programs import Inputs, Program

Kernels = Sequence[tuple[str, float]]  # one run: names and milliseconds, in order

GIB = 2**30
LONG_RUN, LONG_REPEATS = 20.0, 5  # a run above so many milliseconds is repeated so often at most
WALL_REPEATS = 3
SHORTEST_SAMPLE = 20.0  # milliseconds; by the wall clock a sample repeats a shorter run
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


@dataclasses.dataclass
class Figures:
    """What is known of a program; `stopped` says why there is no time."""

    floor_bytes: int = 0
    floor_operations: float = 0.0
    temporary_bytes: int | None = None
    array_bytes: int | None = None
    ms: float | None = None
    wall_ms: float | None = None
    kernels: dict[str, float] = dataclasses.field(default_factory=dict)
    stopped: str = ""

    @classmethod
    def of(cls, program: Program, stopped: str = "") -> "Figures":
        """What is known before the program is compiled."""
        return cls(program.floor_bytes, program.floor_operations, stopped=stopped)

    def note_memory(self, run: jax.stages.Compiled, devices: int = 1) -> None:
        """Adds what the compiler says of memory, for all devices together."""
        memory = run.memory_analysis()
        arrays = memory.argument_size_in_bytes + memory.output_size_in_bytes
        self.array_bytes = arrays * devices
        self.temporary_bytes = memory.temp_size_in_bytes * devices

    @property
    def held_bytes(self) -> int | None:
        """All that is on the device at once: inputs, outputs and temporaries."""
        return None if self.array_bytes is None else self.array_bytes + self.temporary_bytes

    @property
    def extra_percent(self) -> float | None:
        """Temporary memory over that of inputs and outputs."""
        return self.array_bytes and 100 * self.temporary_bytes / self.array_bytes

    def floor_percent(self, rate: float) -> float | None:
        """The time that the fewest bytes take at this copy rate, over the time taken."""
        return self.ms and 100 * self.floor_bytes / rate / (self.ms * 1e-3)

    def peak_percent(self, peak: float) -> float | None:
        """The time that the fewest operations take at this peak, over the time taken."""
        return self.ms and 100 * self.floor_operations / peak / (self.ms * 1e-3)


def time_program(
    program: Program,
    clock: Clock,
    repeats: int,
    *,
    run: jax.stages.Compiled | None = None,
    shared: Inputs | None = None,
) -> Figures:
    """Times a program on one device. A failure becomes a word, so that a table goes on.

    Args:
      program: what to time.
      clock: where times come from (`find_clock`).
      repeats: how many runs the median is taken of, at most.
      run: the program compiled, where the caller has done so.
      shared: inputs that the caller keeps for the next program; those that are missing are added.

    Returns:
      Time and memory; where the program does not fit or fails, the reason in `stopped`.
    """
    figures = Figures.of(program)
    try:
        run = run or program.compile()
        figures.note_memory(run)
        free = memory_limit() - figures.held_bytes
        if free < 0:
            figures.stopped = "out of memory"
            return figures
        # Recorded runs keep their outputs till the last: half of what is free may hold them.
        together = 1 + min(repeats, free // 2 // max(1, run.memory_analysis().output_size_in_bytes))
        inputs = program.draw({} if shared is None else shared)
        timing = time_run(run, inputs, clock, repeats, together)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other lines still count
        figures.stopped = words(error)
        return figures
    figures.ms, figures.wall_ms, figures.kernels = timing.ms, timing.wall_ms, timing.kernels
    return figures


def time_run(
    run: Callable, inputs: object, clock: Clock, repeats: int, together: int = 1
) -> Timing:
    """The median time of a run; `together` runs may have their outputs alive at once."""
    wall_clock(run, inputs)  # the first call loads the program
    walls = [wall_clock(run, inputs) for _ in range(WALL_REPEATS)]
    if min(walls) > LONG_RUN:
        repeats = min(repeats, LONG_REPEATS)
    if clock.missing:
        walls += [wall_clock(run, inputs) for _ in range(repeats - len(walls))]
        return Timing(statistics.median(walls), statistics.median(walls), {})
    runs = sorted(record_all(run, inputs, repeats, together), key=total)
    kernels: dict[str, float] = {}
    for name, ms in runs[len(runs) // 2]:
        kernels[name] = kernels.get(name, 0.0) + ms
    return Timing(statistics.median(map(total, runs)), statistics.median(walls), kernels)


def time_in_turn(
    runs: Sequence[tuple[Callable, object]], repeats: int, seconds: float
) -> list[float]:
    """The median time of each run by the wall clock, with samples of all of them in turn.

    A busy moment of the machine so hits all runs. None is sampled for longer than `seconds`, but
    each at least once.
    """
    # The first call warms up and tells how often a short run is repeated within a sample. If it
    # takes so long that the warming up is nothing, it is the only one.
    first = [wall_clock(*run) for run in runs]
    calls = [math.ceil(SHORTEST_SAMPLE / ms) for ms in first]
    samples = [[ms] if ms >= seconds * 1e3 else [] for ms in first]
    for _ in range(repeats):
        for run, number, found in zip(runs, calls, samples, strict=True):
            if sum(found) < seconds * 1e3:
                found.append(wall_clock(*run, calls=number))
    return [statistics.median(found) for found in samples]


def wall_clock(run: Callable, inputs: object, calls: int = 1) -> float:
    """Milliseconds of one call, by the wall clock; the mean of so many."""
    start = time.perf_counter()
    for _ in range(calls):
        jax.block_until_ready(run(inputs))
    return (time.perf_counter() - start) * 1e3 / calls


def find_clock() -> Clock:
    """CUPTI where a trial run gives kernels, else the wall clock."""
    try:
        record(jax.jit(jnp.sin), jnp.ones(1000), 1)
    except (ImportError, AttributeError, RuntimeError) as error:
        return Clock(missing=first_line(error))
    return Clock()


def record(run: Callable, inputs: object, iterations: int) -> list[Kernels]:
    """The kernels of so many runs; their outputs are alive together while it goes on."""
    from jax.experimental.mosaic.gpu import profiler

    # [1]: a name for the outputs would keep them alive into the caller's next call.
    found = profiler.measure(run, aggregate=False, iterations=iterations)(inputs)[1]
    return read_runs(found)


def read_runs(found: Sequence | None) -> list[Kernels]:
    """One list of (kernel, ms) a run; the profiler gives a single run without the outer list."""
    if not found:
        raise RuntimeError("the profiler saw no kernel")
    return [found] if isinstance(found[0], tuple) else list(found)


def record_all(run: Callable, inputs: object, repeats: int, together: int) -> list[Kernels]:
    """Runs in groups of `together`, or one by one where a group fails.

    A group fails where its outputs do not fit, or where its runs differ in the order of kernels.
    """
    runs = []
    while len(runs) < repeats:
        try:
            runs += record(run, inputs, min(together, repeats - len(runs)))
        except RuntimeError:
            if together == 1:
                raise
            together = 1
    return runs


def total(kernels: Kernels) -> float:
    """Milliseconds of one run."""
    return sum(ms for _, ms in kernels)


def copy_rate(clock: Clock, elements: int = COPY_ELEMENTS) -> float:
    """Bytes a second, read and written, of x * 2 over a large float32 array."""
    copy = Program("copy", lambda inputs: inputs["x"] * 2, {"x": Random((elements,))})
    inputs = copy.draw({})
    return 2 * inputs["x"].nbytes / time_run(copy.compile(), inputs, clock, repeats=11).ms * 1e3


def matmul_peak(mesh: Mesh, dtype: str, size: int = 2048) -> float:
    """Operations a second of one large matrix product a device: the best of five."""
    split = PartitionSpec(mesh.axis_names[0])
    matrices = {"x": Random((mesh.size, size, size), dtype, split=split)}
    product = Program("product", lambda inputs: inputs["x"] @ inputs["x"], matrices, split=split)
    run, inputs = product.compile(mesh), product.draw({}, mesh)
    best = min(wall_clock(run, inputs) for _ in range(5))
    return 2 * size**3 * mesh.size / (best * 1e-3)


def memory_limit() -> int:
    """Bytes that JAX may use of the device; a CPU does not say, and is for trials only."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 8 * GIB)


def peak_bytes() -> int:
    """The most memory that this process has held so far.

    On a GPU these are the bytes that JAX has allocated on the first device at once. On a CPU it is
    the peak resident memory of the whole process, Python and the compiler included.
    """
    held = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if held is not None:
        return held
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def words(error: Exception) -> str:
    """An error as a table says it."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return "out of memory"
    return first_line(error)


def first_line(error: Exception) -> str:
    """What an error says first, or its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
