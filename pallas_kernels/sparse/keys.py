"""Integer keys in the order of scores, and the sample of a row.

Forced tokens have the largest key, and hidden ones the smallest.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LEAST, MOST = -(2**31), 2**31 - 1  # hidden tokens have LEAST, and forced ones MOST
SAMPLE = 4096  # tokens of a row from which the selection takes its threshold, at most
HIGHEST = float(jnp.finfo(jnp.float32).max)


def sample_size(capacity: int, most: int = SAMPLE) -> int:
    """Returns the size of the sample of a row, a power of two.

    Example:
      >>> from pallas_kernels.sparse.keys import sample_size
      >>> sample_size(700), sample_size(131072)
      (1024, 4096)
    """
    return min(most, 1 << max(capacity - 1, 0).bit_length())


def sample_shift(end: jax.Array, size: int, capacity: int) -> jax.Array:
    """Returns s such that every 2^s-th of the first `end` tokens makes a sample of this size.

    It is the least one that makes the sample fit. So at least half of it is filled if there are as
    many tokens.
    """
    shift = jnp.zeros_like(end)
    for doubled in range(max(0, (capacity - 1).bit_length() - size.bit_length() + 1)):
        shift += (end > size << doubled).astype(end.dtype)
    return shift


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
