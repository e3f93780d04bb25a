"""Integer keys in the order of scores: forced tokens come first, and hidden ones last."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.backend import load

LEAST, MOST = -(2**31), 2**31 - 1  # hidden tokens have LEAST, and forced ones MOST
HIGHEST = float(jnp.finfo(jnp.float32).max)


def tile_of_row(problem: Any, scores: Any, start, tile: int, end) -> tuple[jax.Array, jax.Array]:
    """Returns the slots of a tile of a row, and their keys. Those that are hidden have LEAST.

    No load has a mask, because Triton waits for each element of a masked load before it asks for
    the next one. Scores behind the end are read, and their keys are replaced afterwards.
    """
    slots = start + lax.iota(jnp.int32, tile)
    if problem.capacity % tile == 0:
        read = load(scores, (pl.ds(start, tile),))
    else:
        read = load(scores, (jnp.minimum(slots, problem.capacity - 1),))
    return slots, ranks(problem, read, slots, end)


def ranks(problem: Any, scores: jax.Array, slots: jax.Array, end: jax.Array) -> jax.Array:
    """Returns integers in the order of the scores. Both zeros have one key, and NaN is worst."""
    finite = jnp.where(scores == scores, scores, -HIGHEST)
    finite = jnp.minimum(jnp.maximum(finite, -HIGHEST), HIGHEST)
    bits = lax.bitcast_convert_type(jnp.where(finite == 0, 0.0, finite), jnp.int32)
    keys = jnp.where(bits < 0, bits ^ MOST, bits)
    keys = jnp.where((slots < problem.sink) | (slots >= end - problem.window), MOST, keys)
    return jnp.where(slots < end, keys, LEAST)


def mean(low: jax.Array, high: jax.Array) -> jax.Array:
    """Returns the mean of two keys, rounded down, without overflow."""
    return (low >> 1) + (high >> 1) + (low & high & 1)
