"""Softmax attention to the last tokens only, at a cost linear in the length.

A token t sees itself and the w - 1 tokens before it:

    out_t = sum_{t - w < s <= t} softmax_s(q_t . k_s / sqrt(H) - m (t - s)) v_s

The sequence is cut into blocks of w tokens, so that a block's queries need two blocks of keys. The
state is the last w tokens.
"""

from __future__ import annotations

import dataclasses
import numbers

import jax
import jax.numpy as jnp

from race_jax.core import masking, shards
from race_jax.core.rotary import rotate
from race_jax.core.shapes import check_heads
from race_jax.core.state import EMPTY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WindowState:
    """The last tokens of each sequence, the newest at the end.

    Attributes:
      key: ``(B, w, K, H)``.
      value: ``(B, w, K, V)``.
      segments: ``(B, w)`` int32, the segment of each token, or -1 where there is none. Tokens of
        segments that have ended count as none.
      segment: ``(B,)`` int32, the segment of the last token, or -1 before the first token.

    Example:
      >>> from race_jax.core.sliding_window import WindowState
      >>> WindowState.init(batch=1, window=16, kv_heads=2, head_dim=8, value_dim=4).value.shape
      (1, 16, 2, 4)
    """

    key: jax.Array
    value: jax.Array
    segments: jax.Array
    segment: jax.Array

    @classmethod
    def init(
        cls,
        batch: int,
        window: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> WindowState:
        """Returns the state before any token."""
        return cls(
            jnp.zeros((batch, window, kv_heads, head_dim), dtype),
            jnp.zeros((batch, window, kv_heads, value_dim), dtype),
            jnp.full((batch, window), EMPTY, jnp.int32),
            jnp.full((batch,), EMPTY, jnp.int32),
        )


_TOKENS = {"query": shards.TOKENS, "key": shards.TOKENS, "value": shards.TOKENS}
_STATE = WindowState(shards.TOKENS, shards.TOKENS, shards.SLOTS, shards.ROWS)


def sliding_window_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    window: int,
    rope_base: float | None = None,
    slopes: jax.Array | None = None,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: WindowState | None = None,
    return_state: bool = False,
) -> jax.Array | tuple[jax.Array, WindowState]:
    """Computes causal softmax attention to the last ``window`` tokens.

        out_t = sum_{t - w < s <= t} softmax_s(q_t . k_s / sqrt(H) - m (t - s)) v_s

    Padded slots do not count as tokens: the window holds the last w real ones. Logits and sums are
    float32 or wider.

    Args:
      query: ``(B, T, N, H)``.
      key: ``(B, T, K, H)``. Query head n reads key/value head ``n // (N // K)``.
      value: ``(B, T, K, V)``. The output has its dtype.
      window: w, the number of tokens that a token sees, itself included.
      rope_base: the base of rotary positions, which turn pair i of a head's numbers by
        ``p base**(-2 i / H)``, or None for no positions. They are exact at every length, because
        they are counted inside the window.
      slopes: ``(N,)``, by how much the logits of a head fall per token of distance, the m of ALiBi,
        or None.
      key_value_mask: ``(B, T)`` bool, True where there is a token.
      segment_ids: ``(B, T)`` int >= 0, in contiguous runs. A token sees only its own segment.
      initial_state: the state of earlier tokens, which this call continues. The keys and values of
        new tokens are rounded to its dtype.
      return_state: whether to return the state after the last token as well.

    Returns:
      The output ``(B, T, N, V)``, or the output and a `WindowState`. Padded slots give zeros.

    Raises:
      ValueError: if shapes do not fit, or the state has another window, batch or heads.
      TypeError: if query, key or value are not floating, or the window is not an integer.

    Example:
      >>> import jax.numpy as jnp
      >>> from race_jax.core.sliding_window import sliding_window_attention
      >>> x, value = jnp.ones((1, 3, 1, 2)), jnp.arange(3.0).reshape(1, 3, 1, 1)
      >>> sliding_window_attention(x, x, value, window=2).ravel().tolist()
      [0.0, 0.5, 1.5]

    Source: Child et al. 2019, section 4.2, and Beltagy et al. 2020 (Longformer), section 3.1.
    """
    _check(query, key, value, window, initial_state)
    batch, length, kv_heads, value_dim = value.shape
    masking.check_key_value_mask(key_value_mask, (batch, length))
    masking.check_segment_ids(segment_ids, (batch, length), key_value_mask)
    state = initial_state
    if state is None:
        dtype = jnp.promote_types(key.dtype, value.dtype)
        state = WindowState.init(batch, window, kv_heads, key.shape[3], value_dim, dtype)
    tokens = {"query": query, "key": key, "value": value}
    masks = {"mask": key_value_mask, "segment_ids": segment_ids}
    masks = {name: x for name, x in masks.items() if x is not None}
    heads = {} if slopes is None else {"slopes": slopes.reshape(kv_heads, -1)}
    kinds = dict.fromkeys(masks, shards.SLOTS) | dict.fromkeys(heads, shards.HEADS)
    out, state = shards.over_shards(
        lambda arrays, _: _attend(rope_base, **arrays),
        {**tokens, **masks, **heads, "state": state},
        {**_TOKENS, **kinds, "state": _STATE},
        (shards.TOKENS, _STATE),
        kv_heads=kv_heads,
        splits_sequence=False,
    )
    return (out, state) if return_state else out


def _attend(
    rope_base: float | None,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    state: WindowState,
    slopes: jax.Array | None = None,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, WindowState]:
    batch, length = query.shape[:2]
    window = state.key.shape[1]
    ids = masking.fill_segments(segment_ids, mask, state.segment)
    last = masking.last_segment(ids, mask, state.segment, length)
    if ids is None:
        ids = jnp.broadcast_to(jnp.maximum(last, 0)[:, None], (batch, length))
    if not length:
        return jnp.zeros((*query.shape[:3], value.shape[3]), value.dtype), state
    # Runs of one segment are numbered from that of the state, which is run 0. The id of a segment
    # that has ended may come again in a later call, for another document.
    runs = jnp.cumsum(
        ids != jnp.concatenate([state.segment[:, None], ids[:, :-1]], axis=1),
        axis=1,
        dtype=jnp.int32,
    )
    last_run = runs[:, -1:]
    held = (state.segments >= 0) & (state.segments == state.segment[:, None])
    held = jnp.where(held, 0, EMPTY)
    count = jnp.full_like(last, length)
    if mask is not None:  # the tokens move to the front, and padding behind them
        order = jnp.argsort(~mask, axis=1, stable=True)
        query, key, value = (
            jnp.take_along_axis(masking.select_tokens(x, mask), order[..., None, None], axis=1)
            for x in (query, key, value)
        )
        count = mask.sum(axis=1, dtype=jnp.int32)
        runs = jnp.take_along_axis(runs, order, axis=1)
        runs = jnp.where(jnp.arange(length) < count[:, None], runs, EMPTY)
    keys = jnp.concatenate([state.key, key.astype(state.key.dtype)], axis=1)
    values = jnp.concatenate([state.value, value.astype(state.value.dtype)], axis=1)
    all_runs = jnp.concatenate([held, runs], axis=1)
    newest = lambda x: jax.vmap(  # noqa: E731
        lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, window)
    )(x, count)
    segments = jnp.where(newest(all_runs) == last_run, last[:, None], EMPTY)
    after = WindowState(newest(keys), newest(values), segments, last)
    out = _over_blocks(query, keys, values, runs, all_runs, rope_base, slopes).astype(value.dtype)
    if mask is not None:
        back = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        out = masking.select_tokens(jnp.take_along_axis(out, back[..., None, None], axis=1), mask)
    return out, after


def _over_blocks(query, keys, values, runs, all_runs, rope_base, slopes) -> jax.Array:
    """Returns the outputs ``(B, T, N, V)``. Token t stands at slot w + t of the keys."""
    batch, length, heads, width = query.shape
    kv_heads, window = keys.shape[2], keys.shape[1] - length
    block = min(length, window)
    number = -(-length // block)
    spare = number * block - length

    def pad(x: jax.Array, fill: int = 0) -> jax.Array:
        widths = [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=fill)

    def seen(x: jax.Array, fill: int = 0) -> jax.Array:
        """The slots that each block's queries may see, ``(B, number, w + block, ...)``."""
        x = pad(x, fill)
        if number == 1:
            return x[:, None]
        x = x.reshape(batch, number + 1, block, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2)

    dtype = jnp.promote_types(query.dtype, jnp.float32)
    query = pad(query).reshape(batch, number, block, heads, width)
    key, value = seen(keys), seen(values)
    slot, place = jnp.arange(window + block), window + jnp.arange(block)
    if rope_base is not None:
        query, key = rotate(query, place, rope_base), rotate(key, slot, rope_base)
    query = query.reshape(batch, number, block, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("bctkgh,bcskh->bckgts", query, key, preferred_element_type=dtype)
    logits *= width**-0.5
    distance = place[:, None] - slot
    if slopes is not None:
        logits -= slopes.astype(dtype)[..., None, None] * distance
    own = pad(runs, EMPTY).reshape(batch, number, block)
    other = seen(all_runs, EMPTY)
    visible = (own[..., None] == other[:, :, None]) & (other >= 0)[:, :, None]
    visible &= (distance >= 0) & (distance < window)
    visible = visible[:, :, None, None]
    weights = jax.nn.softmax(logits, axis=-1, where=visible)
    weights = jnp.where(visible, weights, 0.0).astype(value.dtype)
    out = jnp.einsum("bckgts,bcskv->bctkgv", weights, value, preferred_element_type=dtype)
    return out.reshape(batch, number * block, heads, out.shape[-1])[:, :length]


def _check(query, key, value, window: int, state: WindowState | None) -> None:
    check_heads(query, key, value)
    for name, array in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {array.dtype}")
    if isinstance(window, bool) or not isinstance(window, numbers.Integral):
        raise TypeError(f"window must be an integer, got {window!r}")
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    if state is None:
        return
    if state.key.shape[1] != window:
        raise ValueError(
            f"the state holds the last {state.key.shape[1]} tokens, and window={window}; continue "
            "with the window that the state was made with"
        )
    for name, held, new in (("key", state.key, key), ("value", state.value, value)):
        wanted = (new.shape[0], window, *new.shape[2:])
        if held.shape != wanted:
            raise ValueError(
                f"initial_state.{name} has shape {held.shape}, and these tokens need {wanted}; "
                "pass the state of an earlier call with them, or WindowState.init"
            )
