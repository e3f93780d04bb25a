"""Integer keys in the order of scores, and the search for the key of a given rank.

Forced tokens have the largest key, and hidden ones the smallest.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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


class Bounds(NamedTuple):
    """Two keys, and how many keys reach each of them."""

    low: jax.Array
    high: jax.Array
    at_low: jax.Array
    at_high: jax.Array


def search(count: Callable, wanted, bounds: Bounds) -> Bounds:
    """Narrows bounds down to the key that `wanted` keys reach.

    Every turn counts at the middle of the bounds and at the place where `wanted` would lie on a
    straight line, so that it halves them at least.

    Args:
      count: returns how many keys reach the first and the second of two ascending keys.
      wanted: how many keys shall reach the lower bound.
      bounds: at least `wanted` keys reach the lower one, and fewer reach the upper one.

    Returns:
      Bounds of which exactly `wanted` keys reach the lower one, or between which no key lies.
    """

    def turn(bounds: Bounds) -> Bounds:
        low, high, at_low, at_high = bounds
        middle = mean(low, high)
        between = jnp.maximum(at_low - at_high, 1).astype(jnp.float32)
        half = ((high >> 1) - (low >> 1)).astype(jnp.float32)
        half = (half * ((at_low - wanted).astype(jnp.float32) / between)).astype(jnp.int32)
        guess = jnp.minimum(jnp.maximum(low + half + half, low + 1), high - 1)
        first, second = jnp.minimum(middle, guess), jnp.maximum(middle, guess)
        at_first, at_second = count(first, second)
        above, below = at_second >= wanted, at_first < wanted
        return Bounds(
            jnp.where(above, second, jnp.where(below, low, first)),
            jnp.where(above, high, jnp.where(below, first, second)),
            jnp.where(above, at_second, jnp.where(below, at_low, at_first)),
            jnp.where(above, at_high, jnp.where(below, at_first, at_second)),
        )

    def goes_on(bounds: Bounds) -> jax.Array:
        return (bounds.at_low > wanted) & (mean(bounds.low, bounds.high) > bounds.low)

    return lax.while_loop(goes_on, turn, bounds)


def reaching(keys: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns how many of at most 2**15 - 1 keys reach each of two keys, by one sum."""
    both = (keys >= first).astype(jnp.int32) + ((keys >= second).astype(jnp.int32) << 16)
    both = jnp.sum(both)
    return both & 0xFFFF, both >> 16
