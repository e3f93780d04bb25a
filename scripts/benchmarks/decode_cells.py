"""What the benchmark of decoding measures: sizes, methods, ratios, and the bytes that each reads.

A cell is one way to attend from one token to a cache of S tokens. The model of its bytes, for B
rows, K key/value heads, M lists (N, or K if heads share them) and the budget R:

    what scores read   B K S (bits of a code and its factor), or the keys, or pages
    kept rows          B M R (H + V) * 2
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from race_jax.sparse import SparseCache, SparseConfig, budget_for

WINDOW_ONLY = "window only"
# The options of `SparseConfig` by the name that tables use.
METHODS = {
    "quantized, 4 bits": {"scorer": "quantized", "code_bits": 4},
    "quantized, 2 bits": {"scorer": "quantized", "code_bits": 2},
    "sign_linear, 256 bits": {"scorer": "sign_linear", "num_rotations": 2},
    "sign_linear, 128 bits": {"scorer": "sign_linear", "num_rotations": 1},
    "hamming, 256 bits": {"scorer": "hamming", "num_rotations": 2},
    "socket, 600 bits": {"scorer": "socket", "value_weighting": True},
    "socket_unit, 600 bits": {"scorer": "socket_unit"},
    "quest": {"scorer": "quest"},
    "oracle": {"scorer": "oracle"},
    "random + window": {"scorer": "random"},
    WINDOW_ONLY: {"scorer": "random"},
}
DEFAULT_METHOD = "quantized, 4 bits"
# Methods of the figures, for which all ratios are measured.
SWEPT = (
    DEFAULT_METHOD,
    "sign_linear, 256 bits",
    "socket, 600 bits",
    "quest",
    "oracle",
    "random + window",
    WINDOW_ONLY,
)
RATIOS = (5, 10, 20, 33, 50)
DEFAULT_RATIO = 33
SPREADS = ((8, 1), (8, 8), (32, 1), (32, 8))  # key/value heads, and rows
BYTES = 2  # of a number of a cache


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all cells share: N, H = V, the forced tokens, and the number of distinct caches."""

    heads: int = 32
    head_dim: int = 128
    sink: int = 16
    window: int = 128
    layers: int = 8
    quality_length: int = 16384


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a cache: B, K and S. Its rows hold three tokens less than there is room for."""

    rows: int
    kv_heads: int
    capacity: int

    @property
    def length(self) -> int:
        """The tokens of a row. It divides no tile, and ends before the buffer."""
        return self.capacity - 3

    def cache_bytes(self, setting: Setting) -> int:
        """The bytes of the keys and values of one layer."""
        return 2 * self.rows * self.capacity * self.kv_heads * setting.head_dim * BYTES


@dataclasses.dataclass(frozen=True)
class Cell:
    """One method at one ratio. `selection` is "head" or "group"."""

    shape: Shape
    method: str
    ratio: int
    selection: str

    def config(self, setting: Setting) -> SparseConfig:
        """The options of sparse attention."""
        budget = budget_for(self.shape.capacity, self.ratio)
        window = setting.window
        if self.method == WINDOW_ONLY:
            window = max(window, budget - setting.sink)
        return SparseConfig(
            budget=budget,
            sink=setting.sink,
            window=window,
            selection=self.selection,
            dense_below=0,
            **METHODS[self.method],
        )


@functools.cache
def code_bytes(config: SparseConfig, shape: Shape, setting: Setting) -> int:
    """The bytes that one layer stores besides keys and values."""
    sizes = shape.rows, shape.capacity, shape.kv_heads, setting.head_dim
    cache = jax.eval_shape(lambda: SparseCache.init(jax.random.key(0), *sizes, config=config))
    parts = cache.codes, cache.factor, cache.value_norm, cache.pages
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in parts if x is not None)


def bytes_read(cell: Cell, setting: Setting) -> int:
    """The bytes that one layer and step read, by the model of this module."""
    config, shape = cell.config(setting), cell.shape
    lists = shape.kv_heads if cell.selection == "group" else setting.heads
    kept = shape.rows * lists * config.budget * 2 * setting.head_dim * BYTES
    if config.scorer == "oracle":
        return shape.cache_bytes(setting) // 2 + kept
    return code_bytes(config, shape, setting) + kept


def layers_that_fit(cell: Cell, setting: Setting, limit: int) -> int:
    """The number of distinct caches that fit in `limit` bytes, at most that of the setting.

    Two thirds are for the caches. The rest is for what programs hold for a while.
    """
    each = cell.shape.cache_bytes(setting)
    if cell.method != WINDOW_ONLY:
        each += code_bytes(cell.config(setting), cell.shape, setting)
    return min(setting.layers, limit * 2 // 3 // each)


def every(setting: Setting, lengths: Sequence[int], methods: Sequence[str]) -> list[list[Cell]]:
    """Returns the whole grid, in one part for every shape."""
    parts = []
    for (kv_heads, rows), length in itertools.product(SPREADS, lengths):
        shape, lists = Shape(rows, kv_heads, length), selections(kv_heads, setting)
        grid = itertools.product(methods, RATIOS, lists)
        parts.append([Cell(shape, *rest) for rest in grid])
    return possible(parts, setting)


def main_part(setting: Setting, lengths: Sequence[int], methods: Sequence[str]) -> list[list[Cell]]:
    """Returns the cells that say most, in parts.

    The parts are: one method at all lengths, for one and for more rows or heads; all methods at one
    length; and some methods at all ratios.
    """
    best = DEFAULT_METHOD if DEFAULT_METHOD in methods else methods[0]
    sweeps = [
        [
            Cell(Shape(rows, kv_heads, length), best, DEFAULT_RATIO, lists)
            for length in lengths
            for lists in selections(kv_heads, setting)
        ]
        for kv_heads, rows in SPREADS[:3]
    ]
    kv_heads, rows = SPREADS[0]
    center = Shape(rows, kv_heads, sorted(lengths)[-2:][0])
    pairs = itertools.product(methods, selections(kv_heads, setting))
    compared = [Cell(center, method, DEFAULT_RATIO, lists) for method, lists in pairs]
    swept = [method for method in methods if method in SWEPT]
    ratios = [Cell(center, *pair, "head") for pair in itertools.product(swept, RATIOS)]
    first, more_rows, more_heads = sweeps
    return possible([first, compared, more_rows + more_heads, ratios], setting)


def possible(parts: Sequence[Sequence[Cell]], setting: Setting) -> list[list[Cell]]:
    """The parts without repetition, and without budgets that the forced tokens exceed."""
    least, seen, found = setting.sink + setting.window, set(), []
    for part in parts:
        new = [c for c in part if budget_for(c.shape.capacity, c.ratio) >= least]
        new = [c for c in dict.fromkeys(new) if c not in seen]
        seen |= set(new)
        found.append(new)
    return [part for part in found if part]


def selections(kv_heads: int, setting: Setting) -> tuple[str, ...]:
    """Group selection is that of a head where every head has keys of its own."""
    return ("head",) if kv_heads == setting.heads else ("head", "group")


def in_small() -> tuple[Setting, list[int]]:
    """Sizes for a trial on a CPU, with two lengths."""
    small = Setting(heads=32, head_dim=16, sink=4, window=16, layers=2, quality_length=1024)
    return small, [1024, 2048]


def dense_bytes(shape: Shape, setting: Setting) -> int:
    """The bytes that dense attention reads of one layer."""
    return math.ceil(shape.cache_bytes(setting) * shape.length / shape.capacity)


def describe(shape: Shape) -> str:
    """A shape in words."""
    return f"B = {shape.rows}, K = {shape.kv_heads}, S = {shape.capacity:,}"


def estimate(parts: Sequence[Sequence[Cell]], setting: Setting, limit: int) -> list[str]:
    """Says what every shape would hold, without allocating anything."""
    cells, lines = [cell for part in parts for cell in part], []
    for shape in dict.fromkeys(cell.shape for cell in cells):
        own = [cell for cell in cells if cell.shape == shape]
        layers = min(layers_that_fit(cell, setting, limit) for cell in own)
        gib = layers * shape.cache_bytes(setting) / 2**30
        lines.append(
            f"{describe(shape)}: {len(own)} cells, {layers} layers, {gib:.2f} GiB of cache"
        )
    return lines
