"""One sequence over several devices: what a device's stretch of tokens receives from the others.

All functions are called inside ``jax.shard_map``, with the mesh axis that splits the sequence.
Device i of the axis holds the i-th stretch. Only states, and a few tokens or segment ids at the
borders, go from device to device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core import masking
from race_jax.core.shapes import Axis, Size


def on_first(tree: Any, axis_name: Axis) -> Any:
    """Returns the arrays on the first device of the axis, and zeros on the others."""
    first = jax.lax.axis_index(axis_name) == 0
    return jax.tree.map(lambda x: jnp.where(first, x, jnp.zeros_like(x)), tree)


def from_last(tree: Any, axis_name: Axis) -> Any:
    """Returns the arrays of the last device of the axis, on every device."""
    last = jax.lax.axis_index(axis_name) == jax.lax.axis_size(axis_name) - 1
    return jax.lax.psum(
        jax.tree.map(lambda x: jnp.where(last, x, jnp.zeros_like(x)), tree), axis_name
    )


def entering_segment(
    segment_ids: jax.Array | None,
    mask: jax.Array | None,
    initial: jax.Array,
    length: Size,
    axis_name: Axis,
) -> jax.Array:
    """Returns the segment of the last token before each device's stretch, ``(B,)`` int32.

    Args:
      segment_ids: ``(B, T)`` int, the ids of this stretch, or None.
      mask: ``(B, T)`` bool, True where there is a token, or None.
      initial: ``(B,)`` int32, the segment of the state before the whole sequence.
      length: T, the number of slots of this stretch.
      axis_name: the mesh axis that splits the sequence.
    """
    if length == 0:
        return initial
    if segment_ids is None:
        own = jnp.maximum(initial, 0)  # the tokens continue the segment of the state
        has_token = jnp.ones_like(initial, bool)
    else:
        filled = masking.fill_segments(segment_ids, mask, initial)
        own = filled[:, -1]
        has_token = jnp.ones_like(own, bool)
    if mask is not None:
        has_token = mask.any(axis=1)
    gathered = jax.lax.all_gather((own, has_token), axis_name)  # (devices, B)
    return _last_before(*gathered, initial, jax.lax.axis_index(axis_name))


def _last_before(
    values: jax.Array, present: jax.Array, initial: jax.Array, index: jax.Array
) -> jax.Array:
    """Returns the value of the last device before ``index`` that has one, or the initial value."""
    order = jnp.arange(values.shape[0])[:, None]
    latest = jnp.where(present & (order < index), order, -1).max(axis=0)
    found = jnp.take_along_axis(values, jnp.maximum(latest, 0)[None], axis=0)[0]
    return jnp.where(latest >= 0, found, initial)


def entering_count(
    own: jax.Array, starts_anew: jax.Array, initial: jax.Array, axis_name: Axis
) -> jax.Array:
    """Returns the tokens of the present segment before each device's stretch, ``(B,)`` int32.

    Args:
      own: ``(B,)`` int32, the tokens of the segment in which this stretch ends, on this device.
      starts_anew: ``(B,)`` bool, whether that segment begins on this device.
      initial: ``(B,)`` int32, the tokens before the whole sequence.
      axis_name: the mesh axis that splits the sequence.
    """

    def add(before: jax.Array, stretch: tuple[jax.Array, jax.Array]):
        own, starts_anew = stretch
        return own + jnp.where(starts_anew, 0, before), before

    stretches = jax.lax.all_gather((own, starts_anew), axis_name)
    initial = initial + jnp.zeros_like(stretches[0][0])  # varies over the axis as the others do
    _, entering = jax.lax.scan(add, initial, stretches)
    return entering[jax.lax.axis_index(axis_name)]


def entering_window(
    own: jax.Array, count: jax.Array, initial: jax.Array, axis_name: Axis
) -> jax.Array:
    """Returns the last tokens before each device's stretch, ``(B, W, D)``, oldest first.

    Args:
      own: ``(B, W, D)``, the last W tokens of this stretch. Only the last ``count`` are its own.
      count: ``(B,)`` int, from 0 to W. The others are tokens of the stretches before it.
      initial: ``(B, W, D)``, the last tokens before the whole sequence.
      axis_name: the mesh axis that splits the sequence.
    """
    width = own.shape[1]
    place = jnp.arange(width)[None]

    def append(window: jax.Array, stretch: tuple[jax.Array, jax.Array]):
        own, count = stretch
        older = jnp.minimum(place + count[:, None], width - 1)
        moved = jnp.take_along_axis(window, older[..., None], axis=1)
        is_own = place >= width - count[:, None]
        return jnp.where(is_own[..., None], own, moved), window

    stretches = jax.lax.all_gather((own, count), axis_name)
    _, entering = jax.lax.scan(append, initial, stretches)
    return entering[jax.lax.axis_index(axis_name)]
