"""How a long sequence is cut, and one loop that walks over the pieces.

Comes in: arrays with time on axis 1. Goes out: what a step carried and wrote.

    T tokens = blocks x chunks x chunk, every block alike, padded at the end only
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core.shapes import Size


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How one platform walks over the tokens.

    Attributes:
      chunk: most tokens that are handled at once.
      parallel: all blocks at once (a wide machine), or one after the other (a core).
    """

    chunk: int
    parallel: bool


class Layout(NamedTuple):
    """Equal blocks of equal chunks.

    Attributes:
      blocks: blocks of the sequence.
      chunks: chunks of a block.
      chunk: tokens of a chunk.
    """

    blocks: Size
    chunks: Size
    chunk: int

    @property
    def block(self) -> Size:
        """Tokens of a block."""
        return self.chunks * self.chunk

    @property
    def length(self) -> Size:
        """Tokens of the whole, padding included."""
        return self.blocks * self.block


def is_known(length: Any) -> bool:
    """Whether a length is a number, rather than a symbol of ``jax.export``."""
    return isinstance(length, int)


def layout(length: Size, blocks: Size, chunk: int) -> Layout:
    """The most even layout of ``length`` tokens: 65 of them give two chunks of 33, not 64 and 1.

    A symbolic length (``jax.export``) is cut into full chunks; their number is symbolic.
    """
    if not is_known(length):
        return Layout(blocks, -(-length // (blocks * chunk)), chunk)
    block = -(-length // blocks)
    count = -(-block // chunk)
    return Layout(blocks, count, -(-block // count))


def sweep(
    step: Callable[[Any, Any, jax.Array], tuple[Any, Any]],
    carry: Any,
    arrays: Any,
    buffers: Any,
    *,
    chunk: int,
    count: Size,
    start: jax.typing.ArrayLike = 0,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """Walks over ``count`` chunks of ``arrays`` from ``start`` on and writes ``buffers`` in place.

    A ``fori_loop`` with slices in and updates out, rather than ``lax.scan``: nothing is transposed
    and nothing but the carry is kept.

    Args:
      step: ``(carry, chunk of arrays, index of the chunk) -> (carry, chunk of buffers)``.
      carry: any pytree.
      arrays: pytree of ``(B, T, ...)``.
      buffers: pytree of ``(B, T, ...)``, of the structure that ``step`` writes.
      chunk: tokens of a chunk.
      count: number of chunks.
      start: first token, may be traced.
      reverse: walk from the last chunk to the first.

    Returns:
      The carry after the last step, and the buffers.
    """

    def body(turn: jax.Array, loop: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, buffers = loop
        index = count - 1 - turn if reverse else turn
        at = start + index * chunk
        piece = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, at, chunk, axis=1), arrays)
        carry, written = step(carry, piece, index)
        buffers = jax.tree.map(
            lambda buffer, new: jax.lax.dynamic_update_slice_in_dim(
                buffer, new.astype(buffer.dtype), at, axis=1
            ),
            buffers,
            written,
        )
        return carry, buffers

    return jax.lax.fori_loop(0, count, body, (carry, buffers))


def pad_time(x: jax.Array, length: Size, mode: str = "constant") -> jax.Array:
    """Appends zeros (or the last element, ``mode="edge"``) up to ``length`` on axis 1."""
    missing = length - x.shape[1]
    if is_known(missing) and not missing:
        return x
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2), mode=mode)


def split_blocks(x: jax.Array, blocks: Size) -> jax.Array:
    """``(B, blocks * t, ...)`` as ``(B * blocks, t, ...)``: blocks become part of the batch."""
    return x.reshape(x.shape[0] * blocks, x.shape[1] // blocks, *x.shape[2:])


def join_blocks(x: jax.Array, blocks: Size) -> jax.Array:
    """The inverse of ``split_blocks``."""
    return x.reshape(x.shape[0] // blocks, x.shape[1] * blocks, *x.shape[2:])
