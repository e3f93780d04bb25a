"""Integer keys in the order of scores, and the sample of a row.

Forced tokens have the largest key, and hidden ones the smallest.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiles import power_of_two

LEAST, MOST = -(2**31), 2**31 - 1  # hidden tokens have LEAST, and forced ones MOST
SAMPLE = 4096  # tokens of a row from which the selection takes its threshold, at most
GOLDEN = 0x9E3779B1 - 2**32  # 2^32 over the golden ratio; products with it are well mixed
HIGHEST = float(jnp.finfo(jnp.float32).max)


def sample_size(capacity: int, most: int = SAMPLE) -> int:
    """Returns the size of the sample of a row, a power of two.

    Example:
      >>> from pallas_kernels.sparse.keys import sample_size
      >>> sample_size(700), sample_size(131072)
      (1024, 4096)
    """
    return min(most, power_of_two(capacity))


def sample_shift(end: jax.Array, size: int, capacity: int) -> jax.Array:
    """Returns the least s such that a sample of this size has one of every 2^s of `end` tokens.

    The sample is then more than half full, unless there are fewer tokens than it has room for.
    """
    shift = jnp.zeros_like(end)
    for doubled in range(max(0, (capacity - 1).bit_length() - size.bit_length() + 1)):
        shift += (end > size << doubled).astype(end.dtype)
    return shift


def sampled_slots(places: jax.Array, shift: jax.Array) -> jax.Array:
    """Returns the slot that each place of the sample stands for.

    Place i stands for one of the 2^s slots from i 2^s on. Which one it is differs from place to
    place, as if it were drawn at random, because scores may have a period.
    """
    mixed = lax.shift_right_logical(places * jnp.int32(GOLDEN), 12)
    return (places << shift) + (mixed & ((1 << shift) - 1))


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
