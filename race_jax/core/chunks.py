"""Chunks of a sequence, for a scan over time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

CHUNK = 64  # tokens per step of a scan


def cut(arrays: dict[str, Any]) -> dict[str, Any]:
    """Cuts arrays ``(B, T, ...)`` into chunks ``(chunks, B, C, ...)``.

    The slots after the end hold zeros. In the array ``segment`` they go on with the last segment,
    so that they start no new one.

    Args:
      arrays: arrays by name, or None. T must not be 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from race_jax.core import chunks
      >>> chunks.cut({"x": jnp.ones((2, 65, 3))})["x"].shape
      (2, 2, 64, 3)
    """

    def one(name: str, x: jax.Array | None) -> jax.Array | None:
        if x is None:
            return None
        mode = "edge" if name == "segment" else "constant"
        room = [(0, 0), (0, -x.shape[1] % CHUNK)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, room, mode=mode)
        x = x.reshape(x.shape[0], x.shape[1] // CHUNK, CHUNK, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    return {name: one(name, x) for name, x in arrays.items()}


def join(x: jax.Array, length: int) -> jax.Array:
    """Joins chunks ``(chunks, B, C, ...)`` to an array ``(B, T, ...)`` of the length T."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * CHUNK, *x.shape[3:])[:, :length]
