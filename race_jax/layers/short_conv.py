"""Short convolution: mixes each token's hidden state with those of the three tokens before it.

With x_{t-j} the j-th real token before t in the segment of t, or zero if there is none,

    y_t = sum_{j=0..3} kernel_j * x_{t-j}

The last three hidden states, called taps, are passed on to the next call.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from race_jax.core import masking, sequence, shards
from race_jax.core.shapes import Axis

WIDTH = 4  # tokens that an output depends on, its own included
TAPS = WIDTH - 1  # tokens that a later call needs


def identity_kernel(
    features: tuple[int, ...], dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Returns the kernel ``(4, *features)`` that leaves every token unchanged."""
    return jnp.zeros((WIDTH, *features), dtype).at[0].set(1)


def short_convolution(
    x: jax.Array,
    kernel: jax.Array,
    *,
    taps: jax.Array,
    segment: jax.Array,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    axis_name: Axis | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Applies a depthwise causal convolution over the real tokens of a segment.

        y_t = sum_j kernel[j] * x_{t-j}

    A padded slot is not a token: it is skipped by the tokens after it, and its own output is zero.
    Sums are kept in float32 or wider.

    Args:
      x: ``(B, T, D)``, hidden states, or heads ``(B, T, K, H)``. Padded slots may hold any value.
      kernel: ``(4, D)`` or ``(4, K, H)``. Row j weighs the j-th token back.
      taps: ``(B, 3, D)`` or ``(B, 3, K, H)``, the last tokens before the call, oldest first, zero
        where there is none.
      segment: ``(B,)`` int32, the segment that the taps belong to.
      mask: ``(B, T)`` bool, True where there is a token.
      segment_ids: ``(B, T)`` int, in contiguous runs. Without them all tokens belong to the taps'
        segment.
      axis_name: inside ``jax.shard_map``, the mesh axis over whose devices the sequence is split.
        The devices exchange taps only.

    Returns:
      The output in x's shape and dtype, and the taps after the call in the shape and dtype of
      `taps`.

    Source: beyond the paper.
    """
    has_heads = x.ndim == 4
    if has_heads:  # their axis comes first, where the mesh axes of heads are expected
        kernel, taps = jnp.moveaxis(kernel, 1, 0), jnp.moveaxis(taps, 2, 1)
    arrays = {"x": x, "kernel": kernel, "taps": taps, "segment": segment}
    arrays |= {"mask": mask, "segment_ids": segment_ids}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    kinds = dict.fromkeys(arrays, shards.SLOTS) | {
        "segment": shards.ROWS,
        "x": shards.TOKENS,
        "kernel": shards.HEADS,
        "taps": shards.TABLES,
    }
    run = _convolve_heads if has_heads else _convolve_stretch
    # Rows of the batch are independent, and so are heads. Features are not split.
    out, after = shards.over_shards(
        lambda arrays, axis_name: run(axis_name, **arrays),
        arrays,
        kinds,
        (shards.TOKENS, shards.TABLES),
        kv_heads=x.shape[2] if has_heads else 1,
        axis_name=axis_name,
    )
    return out, jnp.moveaxis(after, 1, 2) if has_heads else after


def _convolve_heads(
    axis_name: Axis | None,
    x: jax.Array,
    kernel: jax.Array,
    taps: jax.Array,
    **masks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """``_convolve_stretch`` of heads, with kernels ``(K, 4, H)`` and taps ``(B, K, 3, H)``."""
    flat = lambda x: x.reshape(*x.shape[:-2], math.prod(x.shape[-2:]))  # noqa: E731
    kernel, taps = jnp.moveaxis(kernel, 0, 1), jnp.moveaxis(taps, 1, 2)
    out, after = _convolve_stretch(axis_name, flat(x), flat(kernel), flat(taps), **masks)
    return out.reshape(x.shape), jnp.moveaxis(after.reshape(taps.shape), 2, 1)


def _convolve_stretch(
    axis_name: Axis | None,
    x: jax.Array,
    kernel: jax.Array,
    taps: jax.Array,
    segment: jax.Array,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``short_convolution`` of one device's stretch of the sequence, and of its rows."""
    if axis_name is None:
        return _convolve(x, kernel, taps, segment, mask, segment_ids)
    entering = sequence.entering_segment(segment_ids, mask, segment, x.shape[1], axis_name)
    _, own = _convolve(x, kernel, jnp.zeros_like(taps), entering, mask, segment_ids)
    filled = masking.fill_segments(segment_ids, mask, entering)
    last = entering if filled is None else filled[:, -1]
    count = jnp.full_like(last, x.shape[1]) if mask is None else mask.sum(axis=1, dtype=jnp.int32)
    # Taps go on to the next stretch only if the segment does.
    kept = jnp.where(last == entering, jnp.minimum(count, TAPS), TAPS)
    before = sequence.entering_window(own, kept, taps, axis_name)
    out, after = _convolve(x, kernel, before, entering, mask, segment_ids)
    return out, sequence.from_last(after, axis_name)


def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    taps: jax.Array,
    segment: jax.Array,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``short_convolution`` of one device's rows."""
    length = x.shape[1]
    tokens = jnp.concatenate([taps.astype(x.dtype), masking.select_tokens(x, mask)], axis=1)
    slots = None if mask is None else _earlier_slots(mask)

    def earlier(array: jax.Array, back: int) -> jax.Array:
        """Returns the element `back` real tokens before each slot, and before the end."""
        if slots is None:
            return array[:, TAPS - back : TAPS - back + length + 1]
        index = slots[back - 1].reshape(*slots[0].shape, *(1,) * (array.ndim - 2))
        return jnp.take_along_axis(array, index, axis=1)

    if segment_ids is not None:
        before = jnp.broadcast_to(segment[:, None], (x.shape[0], TAPS)).astype(segment_ids.dtype)
        ids = jnp.concatenate([before, segment_ids], axis=1)
        own_ids = jnp.concatenate([segment_ids, earlier(ids, 1)[:, -1:]], axis=1)

    dtype = jnp.promote_types(x.dtype, jnp.float32)
    kernel = kernel.astype(dtype)[:, None, None]  # (4, 1, 1, D), beside (B, T, D)
    mixed = kernel[0] * tokens[:, TAPS:].astype(dtype)
    new_taps = []
    for back in range(1, WIDTH):
        tap = earlier(tokens, back)  # (B, T + 1, D)
        if segment_ids is not None:
            tap = jnp.where((earlier(ids, back) == own_ids)[..., None], tap, 0)
        mixed += kernel[back] * tap[:, :-1].astype(dtype)
        new_taps.insert(0, tap[:, -1])
    mixed = masking.select_tokens(mixed.astype(x.dtype), mask)
    return mixed, jnp.stack(new_taps, axis=1).astype(taps.dtype)


def _earlier_slots(mask: jax.Array) -> list[jax.Array]:
    """Returns the slots of the three real tokens before each slot, and before the end.

    Slots are counted from the oldest tap. Taps count as real tokens, so that three always exist.
    """
    real = jnp.pad(mask, ((0, 0), (TAPS, 0)), constant_values=True)
    latest = jax.lax.cummax(jnp.where(real, jnp.arange(real.shape[1])[None], 0), axis=1)
    slots = [latest[:, TAPS - 1 :]]
    while len(slots) < TAPS:
        slots.append(jnp.take_along_axis(latest, slots[-1] - 1, axis=1))
    return slots
