"""Measures the cells of the benchmark of decoding, shape by shape, and returns rows for tables.

All programs of a shape are compiled before the first one is timed. Memory is estimated before it is
allocated: a program that does not fit is not run, and its row says so.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from benchmarks import decode_programs as programs
from benchmarks.decode_cells import (
    DEFAULT_RATIO,
    WINDOW_ONLY,
    Cell,
    Setting,
    Shape,
    bytes_read,
    dense_bytes,
    layers_that_fit,
)
from benchmarks.decode_quality import draw_runs, quality
from benchmarks.timing import Clock, memory_limit, record_all, time_run, total, words
from race_jax.sparse import SparseCache

WORKERS = 16
QUALITY_ROWS = 2
IMPLEMENTATIONS = ("pallas", "xla")


@dataclasses.dataclass(frozen=True)
class Limits:
    """How long and how often.

    Attributes:
      repeats: the runs of which the median counts.
      seconds: after so many seconds no further cell is begun.
      implementation: "pallas", "xla", or None for the kernels where they run.
    """

    repeats: int = 7
    seconds: float = 180.0
    implementation: str | None = None


class Pool:
    """Compiles programs in threads. A program that cannot be compiled becomes a sentence."""

    def __init__(self):
        self._threads = ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1))
        self._begun: list[Future] = []
        self._qualities: dict[tuple, Future] = {}

    def compile(self, call: Callable, *structs: Any) -> Future:
        """Begins to compile a function for arguments of these shapes."""

        def work() -> jax.stages.Compiled | str:
            try:
                return jax.jit(call).lower(*structs).compile()
            except Exception as error:  # noqa: BLE001 - whatever it is, the other lines still count
                return words(error)

        future = self._threads.submit(work)
        self._begun.append(future)
        return future

    def quality(self, cell: Cell, setting: Setting, implementation: str | None) -> Future:
        """Begins to compile the quality of a cell, which several shapes may have in common."""
        length = min(cell.shape.capacity, setting.quality_length)
        shape = dataclasses.replace(cell.shape, rows=QUALITY_ROWS, capacity=length)
        cell = dataclasses.replace(cell, shape=shape)
        if (cell, implementation) not in self._qualities:
            call = runs_quality(cell, setting, implementation)
            self._qualities[cell, implementation] = self.compile(call, jax.random.key(0))
        return self._qualities[cell, implementation]

    def settle(self) -> None:
        """Waits until everything is compiled, because compilation would disturb the clock."""
        wait(self._begun)
        self._begun.clear()


@dataclasses.dataclass
class Plan:
    """What is compiled for one cell. Times are those of `layers` layers."""

    cell: Cell
    layers: int
    implementation: str
    why: str
    whole: Future
    stages: dict[str, Future]
    quality: Future


def plan_cell(cell: Cell, setting: Setting, limits: Limits, pool: Pool, layers: int) -> Plan:
    """Chooses the implementation of a cell, and begins to compile its programs."""
    config = cell.config(setting)
    struct = programs.coded_struct(cell, setting)
    query = programs.query_random(cell.shape, setting).struct()
    name, why = limits.implementation or "pallas", ""
    if name == "pallas":
        why = programs.can_run(programs.sparse_layer(name), query, struct)
    # Where one kernel is missing, the others may still run beside XLA.
    asked = None if why else name
    layer, stages = programs.sparse_layer(asked), {}
    if asked != "pallas" and cell.ratio == DEFAULT_RATIO and cell.method != WINDOW_ONLY:
        stages = compile_stages(programs.stage_layers(config), query, struct, layers, pool)
    if cell.method == WINDOW_ONLY:
        # A cache that drops what has left the window holds as many tokens as the budget.
        layer = fastest_dense_layer(query, struct.kv)
        small = Shape(cell.shape.rows, cell.shape.kv_heads, config.budget)
        struct = programs.cache_struct(small, setting)
    whole = pool.compile(programs.step(layer), [(query, struct)] * layers)
    of_runs = pool.quality(cell, setting, asked)
    return Plan(cell, layers, asked or "xla", why, whole, stages, of_runs)


def fastest_dense_layer(query: Any, struct: Any) -> programs.Layer:
    """Dense attention by the kernels where they run, and by cuDNN or XLA elsewhere."""
    layers = programs.dense_layers()
    for name in ("ours, pallas", "cuDNN"):
        if not programs.can_run(layers[name], query, struct):
            return layers[name]
    return layers["ours, xla"]


def compile_stages(layers, query: Any, struct: SparseCache, count: int, pool: Pool) -> dict:
    """Begins to compile the stages of the XLA path, each over all layers."""
    scores = jax.eval_shape(layers["scores"], query, struct)
    indices = jax.eval_shape(layers["select"], scores, struct.kv)
    selection = jax.eval_shape(as_selection, indices)
    pairs = {
        "scores": (query, struct),
        "select": (scores, struct.kv),
        "attend": (query, (struct.kv, selection)),
    }
    return {
        name: pool.compile(programs.step(layers[name]), [pair] * count)
        for name, pair in pairs.items()
    }


def as_selection(indices: jax.Array) -> Any:
    """Full lists, which those of the benchmark are."""
    count = jax.numpy.full(indices.shape[:3], indices.shape[-1], "int32")
    return programs.Selection(indices, count)


def runs_quality(cell: Cell, setting: Setting, implementation: str | None) -> Callable:
    """Returns a function from a key to the quality of the cell on `runs`."""
    config, shape = cell.config(setting), cell.shape
    wanted = dataclasses.replace(config, window=setting.window)

    def measure(key: jax.Array) -> Any:
        sizes = shape.rows, shape.capacity, setting.heads, shape.kv_heads, setting.head_dim
        query, kv = draw_runs(key, *sizes)
        cache = SparseCache.of(jax.random.fold_in(key, 1), kv, config)
        return quality(query, cache, wanted, implementation)

    return measure


def run_or_why(
    future: Future, inputs: Any, clock: Clock, repeats: int
) -> tuple[dict[str, Any], jax.stages.Compiled | None]:
    """Times a compiled program: medians in milliseconds, and a run's kernels; or `stopped`."""
    run = future.result()
    if isinstance(run, str):
        return {"stopped": run}, None
    memory = run.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    if held > memory_limit():
        return {"stopped": "out of memory"}, None
    try:
        timing = time_run(run, inputs, clock, repeats if clock.missing else 1)
        if clock.missing:
            return {"ms": timing.ms, "wall_ms": timing.wall_ms, "kernels": []}, run
        found = sorted(record_all(run, inputs, repeats, 2), key=total)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other lines still count
        return {"stopped": words(error)}, None
    ms = statistics.median(map(total, found))
    return {"ms": ms, "wall_ms": timing.wall_ms, "kernels": found[len(found) // 2]}, run


def merged(kernels: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Adds up the milliseconds of the kernels of a run by name."""
    found: dict[str, float] = {}
    for name, ms in kernels:
        found[name] = found.get(name, 0.0) + ms
    return found


class Bench:
    """Measures cells, and keeps the rows."""

    def __init__(self, setting: Setting, limits: Limits, clock: Clock, rate: float):
        self.setting, self.limits, self.clock, self.rate = setting, limits, clock, rate
        self.rows: list[dict] = []
        self.dense: list[dict] = []
        self.left_out = 0
        self._best: dict[Shape, dict] = {}
        self._start, self._pool = time.monotonic(), Pool()

    def measure(self, parts: Sequence[Sequence[Cell]]) -> Iterator[dict]:
        """Yields a row for every cell. The programs of a part are compiled before any is timed."""
        for cells in parts:
            if self.is_late():
                self.left_out += len(cells)
                continue
            by_shape: dict[Shape, list[Cell]] = {}
            for cell in cells:
                by_shape.setdefault(cell.shape, []).append(cell)
            plans = {shape: self._plan(shape, own) for shape, own in by_shape.items()}
            self._pool.settle()
            for shape in list(plans):
                yield from self._measure_shape(shape, *plans.pop(shape))

    def _plan(self, shape: Shape, cells: list[Cell]) -> tuple[int, dict, list[Plan]]:
        layers = min(layers_that_fit(cell, self.setting, memory_limit()) for cell in cells)
        if layers == 0:
            return 0, {}, []
        struct = programs.cache_struct(shape, self.setting)
        query = programs.query_random(shape, self.setting).struct()
        dense = {
            name: self._pool.compile(programs.step(layer), [(query, struct)] * layers)
            for name, layer in programs.dense_layers().items()
            if shape not in self._best and not programs.can_run(layer, query, struct)
        }
        cells = sorted(cells, key=lambda cell: cell.method)  # those with the same codes together
        plans = [plan_cell(c, self.setting, self.limits, self._pool, layers) for c in cells]
        return layers, dense, plans

    def _measure_shape(self, shape: Shape, layers: int, dense: dict, plans: list) -> Iterator[dict]:
        if layers == 0 or self.is_late():
            self.left_out += max(1, len(plans))
            return
        kv = programs.draw_caches(shape, self.setting, layers)
        random = programs.query_random(shape, self.setting)
        queries = [random.draw(f"query {i}") for i in range(layers)]
        if shape not in self._best:
            pairs = list(zip(queries, kv, strict=True))
            self._best[shape] = self._time_dense(shape, dense, pairs)
        best = self._best[shape]
        coding, coded = None, []
        for plan in plans:
            if self.is_late():
                self.left_out += 1
                continue
            config = plan.cell.config(self.setting)
            if plan.cell.method == WINDOW_ONLY:
                small = dataclasses.replace(shape, capacity=config.budget)
                coded, coding = programs.draw_caches(small, self.setting, layers), None
            elif coding != config.coding():
                coded, inputs = [], []  # the old codes go first
                coded, coding = programs.with_codes(kv, config), config.coding()
            if coding is not None:
                coded = [dataclasses.replace(cache, config=config) for cache in coded]
            inputs = list(zip(queries, coded, strict=True))
            row = self._row(plan, inputs) | self._quality(plan)
            row["dense_us"], row["dense"] = best.get("us"), best.get("name")
            row["gain"] = best["us"] / row["us"] if best and row.get("us") else None
            self.rows.append(row)
            yield row

    def _time_dense(self, shape: Shape, dense: dict, inputs: Any) -> dict:
        """Times the dense baselines, and returns the fastest."""
        read = dense_bytes(shape, self.setting)
        found = []
        for name, future in dense.items():
            figures, _ = run_or_why(future, inputs, self.clock, self.limits.repeats)
            row = {"shape": dataclasses.asdict(shape), "name": name, "bytes": read}
            row |= self._times(figures, len(inputs), read)
            self.dense.append(row)
            if not row["stopped"]:
                found.append(row)
        return min(found, key=lambda row: row["us"], default={})

    def _times(self, figures: dict, layers: int, read: int) -> dict:
        """Microseconds of one layer, and the time that its bytes take at the copy rate."""
        row: dict[str, Any] = {"layers": layers, "floor_us": read / self.rate * 1e6}
        row["stopped"] = figures.get("stopped", "")
        if not row["stopped"]:
            row["us"] = figures["ms"] / layers * 1e3
            row["wall_us"] = figures["wall_ms"] / layers * 1e3
        return row

    def _row(self, plan: Plan, inputs: Any) -> dict:
        cell, layers = plan.cell, len(inputs)
        read = bytes_read(cell, self.setting)
        row = dataclasses.asdict(cell) | {"shape": dataclasses.asdict(cell.shape), "bytes": read}
        row |= {"implementation": plan.implementation, "why": plan.why}
        figures, _ = run_or_why(plan.whole, inputs, self.clock, self.limits.repeats)
        row |= self._times(figures, layers, read)
        kernels = figures.get("kernels", ())
        if any("sparse_" in name for name, _ in kernels):
            row["implementation"] = "mixed" if plan.why else "pallas"
            stages = programs.stage_of(kernels)
            row["stages"] = {name: ms / layers * 1e3 for name, ms in stages.items()}
        elif plan.stages:
            row["stages"] = self._stages(plan, inputs)
        row["kernels"] = merged(kernels)
        return row

    def _stages(self, plan: Plan, inputs: Any) -> dict[str, float]:
        """Times scores, selection and attention by themselves, in microseconds of one layer."""
        found, now = {}, inputs
        for name in ("scores", "select", "attend"):
            figures, run = run_or_why(plan.stages[name], now, self.clock, self.limits.repeats)
            if run is None:
                return found
            found[name] = figures["ms"] / len(inputs) * 1e3
            if name == "scores":
                now = [(x, cache.kv) for x, (_, cache) in zip(run(now), inputs, strict=True)]
            elif name == "select":
                lists = map(as_selection, run(now))
                now = [(q, (c.kv, x)) for x, (q, c) in zip(lists, inputs, strict=True)]
        return found

    def _quality(self, plan: Plan) -> dict:
        """The quality on `runs`. A scorer whose scores are all the same is an error."""
        run = plan.quality.result()
        row = {"quality_length": min(plan.cell.shape.capacity, self.setting.quality_length)}
        if isinstance(run, str):
            return row | {"quality_stopped": run}
        found = run(jax.random.key(7))
        if not float(found.spread) > 0:
            raise RuntimeError(f"the scores of {plan.cell.method!r} are the same for all tokens")
        return row | {name: float(getattr(found, name)) for name in ("recall", "mass", "error")}

    def is_late(self) -> bool:
        return time.monotonic() - self._start > self.limits.seconds
