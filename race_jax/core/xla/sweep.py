"""The layout of a long sequence, and the loop that walks over its chunks.

    T tokens = blocks x chunks x chunk

All blocks are alike, and padding is appended at the end only. Time is axis 1 of every array.
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
      chunk: the largest number of tokens per step.
      parallel: whether all blocks run at once (GPU, TPU) or one after the other (CPU).
    """

    chunk: int
    parallel: bool


class Layout(NamedTuple):
    """Equal blocks of equal chunks.

    Attributes:
      blocks: the number of blocks in the sequence.
      chunks: the number of chunks in a block.
      chunk: the number of tokens in a chunk.
    """

    blocks: Size
    chunks: Size
    chunk: int

    @property
    def block(self) -> Size:
        """The number of tokens in a block."""
        return self.chunks * self.chunk

    @property
    def length(self) -> Size:
        """The number of tokens in the sequence, padding included."""
        return self.blocks * self.block


def is_known(length: Any) -> bool:
    """Returns whether a length is a number, and not a symbolic size of ``jax.export``."""
    return isinstance(length, int)


def layout(length: Size, blocks: Size, chunk: int) -> Layout:
    """Returns the most even layout of ``length`` tokens.

    65 tokens give two chunks of 33, rather than one of 64 and one of 1. A symbolic length is cut
    into full chunks, whose number is symbolic.
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
    """Walks over ``count`` chunks of ``arrays`` from ``start`` on, and writes ``buffers`` in place.

    This is a ``fori_loop`` that slices its inputs and updates its outputs. Unlike ``lax.scan``, it
    transposes nothing, and it keeps nothing but the carry.

    Args:
      step: ``(carry, chunk of arrays, index of the chunk) -> (carry, chunk of buffers)``.
      carry: any pytree.
      arrays: a pytree of ``(B, T, ...)``.
      buffers: a pytree of ``(B, T, ...)``, of the structure that ``step`` writes.
      chunk: the number of tokens in a chunk.
      count: the number of chunks.
      start: the first token; it may be traced.
      reverse: whether to walk from the last chunk to the first.

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
    """Appends zeros (or the last element, if ``mode="edge"``) up to ``length`` on axis 1."""
    missing = length - x.shape[1]
    if is_known(missing) and not missing:
        return x
    return jnp.pad(x, ((0, 0), (0, missing)) + ((0, 0),) * (x.ndim - 2), mode=mode)


def split_blocks(x: jax.Array, blocks: Size) -> jax.Array:
    """Makes blocks part of the batch: ``(B, blocks * t, ...)`` becomes ``(B * blocks, t, ...)``."""
    return x.reshape(x.shape[0] * blocks, x.shape[1] // blocks, *x.shape[2:])


def join_blocks(x: jax.Array, blocks: Size) -> jax.Array:
    """Undoes ``split_blocks``."""
    return x.reshape(x.shape[0] // blocks, x.shape[1] * blocks, *x.shape[2:])
