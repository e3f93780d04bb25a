"""Time and memory over length of one attention operation, or a whole model, and its gradient.

A point is one method at one length. It is measured in a process of its own, so that its peak memory
is its own and a crash ends no more than the point. The compiler says how much memory a program
needs before any of it is allocated, and a program that needs too much is not run. The process that
calls `fill` never touches the device.
"""

import dataclasses
import datetime
import json
import multiprocessing
import os
import pathlib
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import ClassVar

import jax
from tqdm import tqdm

from benchmarks.attention import Problem, Sizes, program
from benchmarks.model_scaling import ModelSetting
from benchmarks.peak_table import head_mesh, use_all_cores
from benchmarks.programs import Program
from benchmarks.streamed import streamed
from benchmarks.text import length_name, progress_bar, share, speed
from benchmarks.timing import (
    GIB,
    Clock,
    Figures,
    find_clock,
    matmul_peak,
    memory_limit,
    peak_bytes,
    time_in_turn,
    time_run,
    words,
)

GROWTH = {"race": 1, "softmax": 2, "race_streamed": 1}  # the power of T that a method's time has
ON_GPU = {"softmax": "cudnn softmax"}  # names in benchmarks/attention.py, where they differ
START_SECONDS = 10.0  # to start a process and compile a program; for the time left
SAMPLING_SECONDS = 20.0  # for all samples of a point, of which there is at least one
TICK = 0.5  # seconds between two looks at a running point
LONG_RUN = 1000.0  # milliseconds; a longer run is timed by the wall clock alone
POINT = dict.fromkeys(("seconds", "peak_bytes", "estimated_bytes"), None) | {"stopped": ""}
POINT |= dict.fromkeys(("operations", "compile_seconds"), None)
# By platform: the dtype of the inputs, and the tokens of a segment where the sequence is streamed.
DEFAULTS = {"cpu": ("float32", 16 * 2**10), "gpu": ("bfloat16", 256 * 2**10)}
# By platform: the rows of the matrices whose product is the peak.
PRODUCT = {"cpu": 2048, "gpu": 16384}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting(Sizes):
    """What all points of a file about one operation have in common but the machine.

    `benchmarks.model_scaling.ModelSetting` is the same for a whole model.

    Attributes:
      FORMS: the forms that a method may have.
      by_kernels: whether a short run on a GPU takes as long as its kernels do, and the time between
        them is not counted.
      dtype: that of the inputs; None leaves it to `completed`.
      segment_length: the tokens of a segment where the sequence is streamed; None leaves it to
        `completed`.
    """

    FORMS: ClassVar[tuple[str, ...]] = ("causal", "bidirectional")
    by_kernels: ClassVar[bool] = True

    dtype: str | None = None
    segment_length: int | None = None

    @property
    def parts(self) -> int:
        """The number of parts that the devices of a CPU can share, which are the heads."""
        return self.heads

    def completed(self, platform: str) -> "Setting":
        """The setting with what the platform decides, "cpu" or "gpu"."""
        dtype, tokens = DEFAULTS[platform]
        return dataclasses.replace(
            self, dtype=self.dtype or dtype, segment_length=self.segment_length or tokens
        )

    def facts(self) -> dict:
        """What a file says of the setting beside its fields."""
        return {}

    def problem(self, length: int, *, causal: bool) -> Problem:
        """One attention problem of this setting."""
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(Sizes)}
        return Problem(length, causal, **sizes)

    def program(self, method: str, length: int, *, causal: bool) -> Program:
        """The output and the gradients by a method of `GROWTH`."""
        problem = self.problem(length, causal=causal)
        if method == "race_streamed":
            return streamed(problem, self.segment_length)
        on_gpu = jax.default_backend() == "gpu"
        return program(problem, ON_GPU.get(method, method) if on_gpu else method, backward=True)


AnySetting = Setting | ModelSetting


@dataclasses.dataclass(frozen=True)
class Limits:
    """Where a method stops.

    Attributes:
      seconds: for one run.
      memory: GiB that a run may hold, by the compiler's account.
      repeats: samples, of which the median counts.
    """

    seconds: float = 60.0
    memory: float = 8.0
    repeats: int = 5


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of the figure: a method of `GROWTH` in one form."""

    method: str
    causal: bool

    @property
    def name(self) -> str:
        """For tables and messages."""
        return f"{self.method} {'causal' if self.causal else 'bidirectional'}"

    def expected(self, field: str, known: dict, length: int) -> float:
        """A figure at a greater length, from a point that is known."""
        return known[field] * (length / known["length"]) ** GROWTH[self.method]

    def program(self, length: int, setting: AnySetting) -> Program:
        """The program to measure on this machine's device."""
        return setting.program(self.method, length, causal=self.causal)


def series_of(methods: Sequence[str], forms: Sequence[str]) -> list[Series]:
    """The lines of the figure. Streaming is for causal attention."""
    found = [Series(method, form == "causal") for form in forms for method in methods]
    return [series for series in found if series.causal or series.method != "race_streamed"]


def read_points(path: pathlib.Path) -> dict:
    """Reads a file that `Record` has written.

    Raises:
        ValueError: it holds something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        content = None
    parts = {"machine": dict, "setting": dict, "points": list}
    if not isinstance(content, dict) or any(
        not isinstance(content.get(name), kind) for name, kind in parts.items()
    ):
        raise ValueError(
            f"{path} does not hold points of this command; give another --out, or --fresh to write "
            "over it"
        )
    return content


class Record:
    """The points of one machine and one setting, in a JSON file that is written after each point.

    Args:
      path: the file. A point with a time that it holds already is not measured again; one that was
        stopped is tried again, because the limits may be others now.
      machine: the device and the versions.
      setting: the sizes of the problem.
      facts: what else the file says; it keeps what the run found that began it.
      fresh: whether to start with no points.

    Raises:
      ValueError: the file has points of another machine or setting.
    """

    def __init__(
        self,
        path: pathlib.Path,
        machine: dict,
        setting: AnySetting,
        facts: dict | None = None,
        *,
        fresh: bool = False,
    ):
        self.path = path
        self.content = {"machine": machine, "setting": dataclasses.asdict(setting)}
        self.content |= {"facts": facts or {}, "points": []}
        if fresh or not path.exists():
            return
        old = read_points(path)
        for part in ("machine", "setting"):
            for name, value in self.content[part].items():
                if old[part].get(name) != value:
                    raise ValueError(
                        f"{path} has points with {name} = {old[part].get(name)}, and this run has "
                        f"{name} = {value}; give another --out, or --fresh to drop the old points"
                    )
        self.content |= {"facts": old.get("facts", facts or {}), "points": old["points"]}

    def measured(self, series: Series) -> list[dict]:
        """The points of a series that have a time, in the order of their lengths."""
        own = [p for p in self.content["points"] if p["series"] == series.name]
        return sorted((p for p in own if not p["stopped"]), key=lambda point: point["length"])

    def add(self, series: Series, length: int, figures: dict) -> dict:
        """Adds a point, in place of an old one, and writes the file, which is always whole."""
        today = datetime.datetime.now(datetime.UTC).date().isoformat()
        point = {"series": series.name, "length": length} | POINT | figures
        point |= {"date": today, "commit": commit()}
        place = series.name, length
        others = [p for p in self.content["points"] if (p["series"], p["length"]) != place]
        self.content["points"] = [*others, point]
        draft = self.path.with_name(self.path.name + ".tmp")
        draft.write_text(json.dumps(self.content, indent=1) + "\n", "utf-8")
        os.replace(draft, self.path)
        return point


def commit() -> str:
    """The commit of the code that runs, or nothing outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        here = pathlib.Path(__file__).parent
        done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def look(wanted: AnySetting) -> dict:
    """The device, the setting that is measured on it, and GiB that JAX may use.

    It is called in a process of its own.
    """
    use_all_cores(wanted.parts)
    device = jax.devices()[0]
    platform = "gpu" if device.platform == "gpu" else "cpu"
    mesh = head_mesh(1 if platform == "gpu" else wanted.parts)
    machine = {
        "platform": device.platform,
        "device": device.device_kind,
        "devices": mesh.size,
        "jax": jax.__version__,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    }
    setting = wanted.completed(platform)
    dtype = setting.dtype if platform == "gpu" else "float32"
    facts = {"matmul_rate": matmul_peak(mesh, dtype, PRODUCT[platform])} | setting.facts()
    return {"machine": machine, "memory": memory_limit() / GIB, "setting": setting, "facts": facts}


def measure(series: Series, length: int, setting: AnySetting, limits: Limits) -> dict:
    """Time and memory of one point; called in a process of its own."""
    use_all_cores(setting.parts)
    on_gpu = jax.default_backend() == "gpu"
    mesh = None if on_gpu else head_mesh(setting.parts)
    try:
        made = series.program(length, setting)
        start = time.monotonic()
        run = made.compile(mesh)
        found = {"compile_seconds": time.monotonic() - start}
        needed = Figures.of(made)
        needed.note_memory(run, mesh.size if mesh else 1)
        found |= {
            "estimated_bytes": needed.held_bytes,
            "operations": needed.floor_operations or None,
        }
        if needed.held_bytes > limits.memory * GIB:
            need = f"would need {needed.held_bytes / GIB:.3g} GiB of {limits.memory:.3g} GiB"
            return found | {"stopped": need}
        inputs = made.draw({}, mesh)
        [ms] = time_in_turn([(run, inputs)], limits.repeats, SAMPLING_SECONDS)
        if on_gpu and setting.by_kernels and ms < LONG_RUN:
            clock: Clock = find_clock()
            ms = time_run(run, inputs, clock, limits.repeats).ms
    except Exception as error:  # noqa: BLE001 - whatever it is, the other series go on
        return {"stopped": words(error)}
    return found | {"seconds": ms * 1e-3, "peak_bytes": peak_bytes()}


def in_own_process(
    call: Callable[..., dict], *arguments: object, tick: Callable[[], object] = lambda: None
) -> dict:
    """What a call returns that runs in a new process, or why there is nothing, as `stopped`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send, args=(sender, call, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        while not receiver.poll(TICK):
            tick()
        return receiver.recv()
    except EOFError:
        process.join()
        return {"stopped": f"its process ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def send(sender: Connection, call: Callable[..., dict], arguments: Sequence[object]) -> None:
    """Runs in the new process, which ends with the one that started it."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    sender.send(call(*arguments))


def end_with_parent() -> None:
    """Waits for the parent process to end, however that comes, and ends this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def refusal(series: Series, length: int, known: Sequence[dict], limits: Limits) -> str:
    """Why a length need not be tried, judged by the longest one before it; or nothing."""
    before = [point for point in known if point["length"] < length]
    if not before:
        return ""
    seconds = series.expected("seconds", before[-1], length)
    if seconds <= limits.seconds:
        return ""
    return f"would take about {seconds:.3g} s of {limits.seconds:g} s"


def ladder(first: int, longest: int, step: int) -> list[int]:
    """The lengths to measure: each `step` times the one before, and the longest.

    >>> ladder(1, 10, 2)
    [1, 2, 4, 8, 10]
    """
    found = [first]
    while found[-1] * step < longest:
        found.append(found[-1] * step)
    return found + [longest] * (longest > found[-1])


def seconds_left(
    active: Sequence[Series], record: Record, lengths: Sequence[int], limits: Limits
) -> float:
    """About how long these lengths take, judged by the points so far."""
    total = 0.0
    for series in active:
        known = record.measured(series)
        have = {point["length"] for point in known}
        for now in lengths:
            if refusal(series, now, known, limits):
                break
            before = [point for point in known if point["length"] < now]
            held = before and series.expected("estimated_bytes", before[-1], now)
            if held and held > limits.memory * GIB:
                break
            if now not in have:
                run = series.expected("seconds", before[-1], now) if before else 0.0
                total += START_SECONDS + run + max(run, min(limits.repeats * run, SAMPLING_SECONDS))
            if not known:
                break  # nothing is known yet of this series
    return total


class Bar:
    """How far all of it is, in seconds, where somebody watches."""

    def __init__(self):
        self._start = time.monotonic()
        self._bar: tqdm = progress_bar(0)

    def expect(self, left: float) -> None:
        """Takes a new estimate of the seconds left."""
        self._bar.total = time.monotonic() - self._start + left
        self.tick()

    def tick(self) -> None:
        """Moves on with the clock."""
        self._bar.n = min(time.monotonic() - self._start, self._bar.total)
        self._bar.refresh()

    def say(self, line: str) -> None:
        """Prints a line without breaking the bar."""
        with self._bar.external_write_mode():
            print(line, flush=True)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()


def fill(
    record: Record,
    active: Sequence[Series],
    lengths: Sequence[int],
    setting: AnySetting,
    limits: Limits,
) -> None:
    """Measures these lengths, in rising order, until every series has stopped."""
    bar, rate = Bar(), record.content["facts"].get("matmul_rate")
    try:
        for index, length in enumerate(lengths):
            going = []
            for series in active:
                known = record.measured(series)
                if any(point["length"] == length for point in known):
                    going.append(series)
                    continue
                bar.expect(seconds_left(active, record, lengths[index:], limits))
                if stopped := refusal(series, length, known, limits):
                    figures = {"stopped": stopped}
                else:
                    call = (measure, series, length, setting, limits)
                    figures = in_own_process(*call, tick=bar.tick)
                point = record.add(series, length, figures)
                bar.say(line(point, rate))
                if not point["stopped"]:
                    going.append(series)
            active = going
    finally:
        bar.close()


def line(point: dict, matmul_rate: float | None = None) -> str:
    """A point in words, with its share of a rate in operations a second if both are known."""
    start = f"{length_name(point['length']):>5} {point['series']:22}"
    if point["stopped"]:
        return f"{start} stops: {point['stopped']}"
    peak, estimated = point["peak_bytes"] / GIB, point["estimated_bytes"] / GIB
    parts = [
        f"{point['seconds']:.4g} s",
        f"{speed(point)} tokens/s",
        f"peak memory {peak:.3g} GiB ({estimated:.3g} GiB estimated)",
    ]
    if point["compile_seconds"]:
        parts.append(f"compiled in {point['compile_seconds']:.3g} s")
    if point["operations"] and matmul_rate:
        each = point["operations"] / point["length"]
        parts.append(f"{each / 1e6:.4g} MFLOP/token, {share(point, matmul_rate)} of peak")
    return f"{start} {', '.join(parts)}"
