"""Visibility of keys. Padding and packing are given as per-token vectors, never as T x T masks.

The functions check these vectors, clear padded slots, and assign every padded slot to the segment
before it.

    visible(t, s) = (s <= t if causal) and key_value_mask[s] and segment[t] == segment[s]
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from race_jax.core.shapes import Size

# exp(-80) is 2e-35. A stronger decay makes no difference in float32.
MIN_LOG_DECAY = -80.0


def concrete(x: jax.Array | None) -> np.ndarray | None:
    """Returns the values of an array if they are known now, and None for a traced array."""
    if x is None or isinstance(x, jax.core.Tracer):
        return None
    return np.asarray(x)


def check_array(name: str, x: object) -> None:
    """Checks that an argument is an array, and not a list of numbers, which JAX does not take."""
    if isinstance(x, (list, tuple)):
        raise TypeError(
            f"{name} must be an array, got a {type(x).__name__}; pass jnp.asarray of it"
        )


def check_key_value_mask(mask: Any, shape: tuple[Size, Size], name: str = "key_value_mask") -> None:
    """Checks that a mask is one boolean per key."""
    if mask is None:
        return
    check_array(name, mask)
    if mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        raise ValueError(
            f"{name} must be (B, S) = {shape}, got shape {mask.shape}; pass mask[:, 0, 0, :]"
        )
    if mask.ndim > 2:
        raise ValueError(
            f"{name} must be (B, S) = {shape}, got a dense mask of shape {mask.shape}. "
            "RACE never forms the weight matrix; use is_causal=True for causality, key_value_mask "
            "(B, S) for padding and segment_ids (B, T) for packing"
        )
    if mask.shape != shape:
        raise ValueError(f"{name} must be (B, S) = {shape}, got shape {mask.shape}")
    if mask.dtype != jnp.bool_:
        raise TypeError(
            f"{name} must be bool (True where there is a token), got {mask.dtype}; "
            "pass mask.astype(bool)"
        )


def check_segment_ids(segment_ids: Any, shape: tuple[Size, Size], mask: jax.Array | None) -> None:
    """Checks the form of segment ids and, if they are concrete, that they are contiguous runs."""
    if segment_ids is None:
        return
    check_array("segment_ids", segment_ids)
    if segment_ids.shape != shape:
        raise ValueError(f"segment_ids must be (B, T) = {shape}, got shape {segment_ids.shape}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers, got {segment_ids.dtype}")
    ids, keep = concrete(segment_ids), concrete(mask)
    if ids is None or (mask is not None and keep is None):
        return
    for row in range(ids.shape[0]):
        run = ids[row] if keep is None else ids[row][keep[row]]
        if run.size and run.min() < 0:
            raise ValueError(f"segment_ids must be >= 0, got {run.min()} in row {row}")
        starts = run[np.flatnonzero(np.diff(run, prepend=-1))]
        values, counts = np.unique(starts, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"segment_ids must be contiguous runs, but id {values[counts > 1][0]} occurs in "
                f"several runs of row {row}; give each packed document an id of its own"
            )


def check_log_decay(log_decay: Any, shape: tuple[Size, Size, Size], mask: jax.Array | None) -> None:
    """Checks the form of a gate and, if it is concrete, that it is finite and not positive."""
    if log_decay is None:
        return
    check_array("log_decay", log_decay)
    if log_decay.shape != shape:
        raise ValueError(f"log_decay must be (B, S, K) = {shape}, got shape {log_decay.shape}")
    if not jnp.issubdtype(log_decay.dtype, jnp.floating):
        raise TypeError(f"log_decay must be floating, got {log_decay.dtype}")
    values, keep = concrete(log_decay), concrete(mask)
    if values is None or (mask is not None and keep is None):
        return
    values = values.astype(np.float32) if keep is None else values[keep].astype(np.float32)
    if not np.isfinite(values).all():
        wrong = values[~np.isfinite(values)][0]
        raise ValueError(f"log_decay must be finite, got {wrong}; use -80 to forget everything")
    if values.size and values.max() > 0:
        raise ValueError(
            f"log_decay must be <= 0, got {values.max()}; it is the logarithm of a factor in "
            "(0, 1], for instance jax.nn.log_sigmoid(gate)"
        )


def select_tokens(x: jax.Array | None, mask: jax.Array | None) -> jax.Array | None:
    """Sets padded slots to zero.

    This is a select and not a product, because 0 * NaN is NaN, forward and backward.
    """
    if x is None or mask is None:
        return x
    return jnp.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, jnp.zeros((), x.dtype))


def bound_log_decay(
    log_decay: jax.Array | None,
    mask: jax.Array | None,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array | None:
    """Returns the gate as it is used: between -80 and 0, and zero in padded slots.

    The result has ``dtype``, which is that of the sums. If ``dtype`` is None, the gate keeps its
    own dtype but is widened to at least float32.
    """
    if log_decay is None:
        return None
    log_decay = select_tokens(jnp.asarray(log_decay), mask)
    dtype = jnp.result_type(log_decay, jnp.float32) if dtype is None else dtype
    log_decay = log_decay.astype(dtype)
    # These are selects and not jnp.clip, so that a gate exactly at a bound gets its full gradient
    # and NaN stays NaN.
    log_decay = jnp.where(log_decay < MIN_LOG_DECAY, MIN_LOG_DECAY, log_decay)
    return jnp.where(log_decay > 0.0, 0.0, log_decay)


def fill_segments(
    segment_ids: jax.Array | None, mask: jax.Array | None, initial: jax.Array
) -> jax.Array | None:
    """Gives every padded slot the segment id of the last token before it.

    Args:
      segment_ids: ``(B, T)`` int, or None.
      mask: ``(B, T)`` bool, or None where there is no padding.
      initial: ``(B,)`` int32, the segment of the initial state. Padded slots before the first token
        get it.

    Returns:
      ``(B, T)`` int32, or None without segment ids.
    """
    if segment_ids is None:
        return None
    segment_ids = segment_ids.astype(jnp.int32)
    if mask is None:
        return segment_ids
    slots = jnp.arange(mask.shape[1], dtype=jnp.int32)
    last = jax.lax.cummax(jnp.where(mask, slots[None], -1), axis=1)
    filled = jnp.take_along_axis(segment_ids, jnp.maximum(last, 0), axis=1)
    return jnp.where(last >= 0, filled, initial[:, None])


def last_segment(
    segment_ids: jax.Array | None, mask: jax.Array | None, initial: jax.Array, length: Size
) -> jax.Array:
    """Returns the segment of the state after the tokens, ``(B,)`` int32, from *filled* ids.

    Without segment ids, every token continues the segment of the initial state, or segment 0 if
    that state is empty.
    """
    if length == 0:
        return initial
    if segment_ids is not None:
        return segment_ids[:, -1]
    continued = jnp.maximum(initial, 0)
    if mask is None:
        return continued
    return jnp.where(mask.any(axis=1), continued, initial)
