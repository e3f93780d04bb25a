"""What the codes of a prompt cost, beside the attention of the prompt.

A prompt is read densely. Its keys are coded once and written to the cache. The time of this is
compared with that of causal attention of the same prompt, in cuDNN on a GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from benchmarks.arrays import Random
from benchmarks.decode_cells import (
    DEFAULT_RATIO,
    SPREADS,
    Cell,
    Setting,
    Shape,
    code_bytes,
    possible,
)
from benchmarks.timing import Clock, time_run, words
from race_jax.sparse import SparseCache, SparseConfig


def measure(
    setting: Setting, cells: Sequence[Cell], clock: Clock, repeats: int
) -> Iterator[dict[str, Any]]:
    """Yields a row for every cell that `prompts` has returned."""
    attention: dict[Shape, float | str] = {}
    for cell in cells:
        shape, config = cell.shape, cell.config(setting)
        if shape not in attention:
            attention[shape] = timed(attend, lambda s=shape: draw(s, setting), clock, repeats)

        def inputs(shape: Shape = shape, config: SparseConfig = config) -> Any:
            sizes = shape.rows, shape.capacity, shape.kv_heads, setting.head_dim
            empty = SparseCache.init(jax.random.key(0), *sizes, config=config)
            return empty, *draw(shape, setting)[1:]

        coding = timed(code, inputs, clock, repeats)
        yield row(shape.capacity, cell.method, coding, attention[shape])


def prompts(setting: Setting, lengths: Sequence[int], methods: Sequence[str]) -> list[Cell]:
    """Returns a cell for every length of a prompt and every method that stores codes."""
    kv_heads, rows = SPREADS[0]
    shapes = [Shape(rows, kv_heads, length) for length in sorted(lengths)]
    cells = [Cell(shape, method, DEFAULT_RATIO, "head") for shape in shapes for method in methods]
    found = [cell for part in possible([cells], setting) for cell in part]
    return [cell for cell in found if code_bytes(cell.config(setting), cell.shape, setting)]


def draw(shape: Shape, setting: Setting) -> list[jax.Array]:
    """Queries, keys and values of a prompt."""
    counts = {"query": setting.heads, "key": shape.kv_heads, "value": shape.kv_heads}
    return [
        Random((shape.rows, shape.capacity, heads, setting.head_dim), "bfloat16").draw(name)
        for name, heads in counts.items()
    ]


def attend(inputs: Sequence[jax.Array]) -> jax.Array:
    """Causal attention of a prompt."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    return jax.nn.dot_product_attention(*inputs, is_causal=True, implementation=implementation)


def code(inputs: Any) -> list[jax.Array]:
    """The codes of a prompt in an empty cache. Keys and values are not copied."""
    cache, key, value = inputs
    full = cache.append(key, value)
    return jax.tree.leaves((full.codes, full.factor, full.value_norm, full.pages))


def timed(call: Callable, draw: Callable[[], Any], clock: Clock, repeats: int) -> float | str:
    """Microseconds of a program of what is drawn, or why it did not run."""
    try:
        inputs = draw()
        run = jax.jit(call).lower(inputs).compile()
        return time_run(run, inputs, clock, repeats).ms * 1e3
    except Exception as error:  # noqa: BLE001 - whatever it is, the other lines still count
        return words(error)


def row(length: int, method: str, coding: float | str, attention: float | str) -> dict[str, Any]:
    """One line of the table.

    Example:
      >>> row(32768, "hamming", 5.0, 1000.0)["share"]
      0.005
      >>> row(32768, "hamming", "out of memory", 1000.0)["stopped"]
      'out of memory'
    """
    found: dict[str, Any] = {"length": length, "method": method}
    stopped = next((x for x in (coding, attention) if isinstance(x, str)), "")
    if not stopped:
        found |= {"coding_us": coding, "attention_us": attention, "share": coding / attention}
    return found | {"stopped": stopped}
