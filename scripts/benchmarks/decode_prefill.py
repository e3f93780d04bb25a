"""What the codes of a prompt cost, beside the attention of the prompt.

A prompt is read densely. Its keys are coded once and written to the cache. The time of this is
compared with that of causal attention of the same prompt, in cuDNN on a GPU.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax

from benchmarks.arrays import Random
from benchmarks.decode_cells import SPREADS, Cell, Setting, Shape, code_bytes
from benchmarks.timing import Clock, time_run, words
from race_jax.sparse import SparseCache


def measure(
    setting: Setting, lengths: Sequence[int], methods: Sequence[str], clock: Clock, repeats: int
) -> Iterator[dict[str, Any]]:
    """Yields a row for every method that stores codes and every length of a prompt."""
    kv_heads, rows = SPREADS[0]
    for length in sorted(lengths):
        shape = Shape(rows, kv_heads, length)
        # The codes do not depend on the ratio, and this one fits the forced tokens of any length.
        cells = [Cell(shape, method, 1, "head") for method in methods]
        cells = [c for c in cells if code_bytes(c.config(setting), shape, setting)]
        if not cells:
            continue
        prompt = draw(shape, setting)
        attention = timed(attend, prompt, clock, repeats)
        for cell in cells:
            config = cell.config(setting)
            sizes = shape.rows, shape.capacity, shape.kv_heads, setting.head_dim
            empty = SparseCache.init(jax.random.key(0), *sizes, config=config)
            coding = timed(code, (empty, *prompt[1:]), clock, repeats)
            yield row(length, cell.method, coding, attention)


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


def timed(call: Any, inputs: Any, clock: Clock, repeats: int) -> float | str:
    """Microseconds of a program, or why it did not run."""
    try:
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
